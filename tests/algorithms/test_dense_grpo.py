"""DenseGRPO: gains that telescope, credit by step, masks that stay local, and a calibration that moves by its step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlkit.algorithms import dense_grpo
from rlkit.algorithms.dense_grpo import DenseGRPO
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.policy import Policy
from rlkit.rollouts.local import Local
from rlkit.types import Context, Plan, Prompt, Samples, Scores, Tools

MakeContext = Callable[..., Context]
PROMPTS = PromptBatch((Prompt(0, "a red circle"), Prompt(1, "two blue crosses")), group=4)
STEPS = 6


def brightness(samples: Samples) -> Tensor:
    return samples.media.mean(dim=(1, 2, 3))


def scored(samples: Samples, raw: Tensor | None = None, previews: Tensor | None = None) -> Scores:
    """Brightness as the reward, of samples and completions alike; or the numbers given."""

    def one(values: Tensor) -> Scores:
        return Scores(("one",), values[:, None], torch.isfinite(values)[:, None], torch.ones(1))

    assert samples.previews is not None
    ahead = one(brightness(samples.previews) if previews is None else previews)
    return replace(one(brightness(samples) if raw is None else raw), previews=ahead)


def rolled(policy: Policy, plan: Plan, context: Context, prompts: PromptBatch = PROMPTS) -> Samples:
    return Local(steps=STEPS).start(policy, Processes()).collect(prompts, plan, context)


def noiseless(plan: Plan) -> Plan:
    return replace(plan, dynamics="ode", noise_level=0.0)


# ---- completions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["own noise", "shared noise"])
@pytest.mark.parametrize("algorithm", [DenseGRPO(), DenseGRPO(window=3, window_start=(1, 1))], ids=["all", "window"])
def test_without_noise_every_state_promises_the_picture_it_becomes(
    toy_policy: Policy, context: MakeContext, algorithm: DenseGRPO, shared: bool
) -> None:
    plan = noiseless(replace(algorithm, shared_noise=shared).plan(context()))
    samples = rolled(toy_policy, plan, context())
    rewards, known = dense_grpo.levels_of(samples, scored(samples))
    assert known.all()
    assert (rewards - rewards[:, -1:]).abs().max() <= 1e-6, "its own ODE: every gain is 0"


def test_gains_add_up_to_the_whole_way(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = DenseGRPO()
    samples = rolled(toy_policy, algorithm.plan(context()), context())
    rewards, _ = dense_grpo.levels_of(samples, scored(samples))
    gains = rewards[:, 1:].double() - rewards[:, :-1].double()
    assert gains.abs().max() > 1e-3
    torch.testing.assert_close(gains.sum(1), (rewards[:, -1] - rewards[:, 0]).double(), rtol=0, atol=1e-12)


def test_the_first_state_is_completed_once_a_group_if_its_noise_is_shared(
    toy_policy: Policy, context: MakeContext
) -> None:
    plan = DenseGRPO(window=3, shared_noise=True).plan(context())
    samples = rolled(toy_policy, plan, context())
    assert samples.previews is not None
    assert samples.preview_of is not None
    assert len(samples.previews) == 2 + 2 * len(samples), "one a group, then k - 1 a sample"
    assert samples.preview_of[:, 0].tolist() == [0] * 4 + [1] * 4
    assert samples.preview_of[:, 1:].unique().numel() == 2 * len(samples)
    texts = [prompt.text for prompt in samples.previews.prompts]
    for row, sample in enumerate(samples.prompts):
        assert {texts[i] for i in samples.preview_of[row].tolist()} == {sample.text}
    assert torch.equal(samples.previews.group[samples.preview_of], samples.group[:, None].expand(-1, 3))


@pytest.mark.parametrize(("steps", "calls"), [(0, STEPS + 4), (1, STEPS), (2, STEPS + 3)])
def test_a_completion_reuses_the_velocity_of_its_state(
    toy_policy: Policy, context: MakeContext, steps: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Window of 3: n = t makes one joint call at each step after the window's first, n = 1 none, n = 2 one a state.
    seen: list[int] = []
    model = toy_policy.model
    counted = replace(model, velocity=lambda net, x, s, c: (seen.append(len(x)), model.velocity(net, x, s, c))[1])
    monkeypatch.setattr(toy_policy, "model", counted)
    plan = DenseGRPO(window=3, window_start=(1, 1), completion_steps=steps).plan(context())
    rolled(toy_policy, plan, context())
    assert len(seen) == calls


def test_one_completion_step_is_the_clean_prediction(toy_policy: Policy, context: MakeContext) -> None:
    plan = DenseGRPO(window=2, window_start=(1, 1), completion_steps=1).plan(context())
    samples = rolled(toy_policy, plan, context())
    assert samples.path is not None
    assert samples.previews is not None
    assert samples.preview_of is not None
    for k in range(2):
        x, sigma = samples.path.states[:, k], samples.path.sigmas[k]
        with torch.no_grad():
            v = toy_policy.models.current.velocity(x, sigma.expand(len(x)), [p.text for p in samples.prompts])
        clean = samples.previews.latents[samples.preview_of[:, k]]
        torch.testing.assert_close(clean, x - sigma * v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True], ids=["own noise", "shared noise"])
def test_completions_do_not_change_the_samples_nor_depend_on_the_batch(
    toy_policy: Policy, context: MakeContext, shared: bool
) -> None:
    plan = DenseGRPO(window=3, shared_noise=shared).plan(context())
    whole = rolled(toy_policy, plan, context())
    without = rolled(toy_policy, replace(plan, completions=None), context())
    assert torch.equal(whole.latents, without.latents)
    assert without.previews is None
    parts = Local(steps=STEPS, batch=3).start(toy_policy, Processes()).collect(PROMPTS, plan, context())
    for samples in (whole, parts):
        assert samples.previews is not None
        assert samples.preview_of is not None
    torch.testing.assert_close(
        parts.previews.latents[parts.preview_of],  # type: ignore[union-attr,index]
        whole.previews.latents[whole.preview_of],  # type: ignore[union-attr,index]
        rtol=1e-5,
        atol=1e-5,
    )


# ---- credit ----------------------------------------------------------------------------------------------------------


def test_every_step_is_compared_with_its_own_groups(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = DenseGRPO(window=2, shared_noise=True)
    samples = rolled(toy_policy, algorithm.plan(context()), context())
    rows = algorithm.rows(samples, scored(samples), context())
    advantage = rows.advantage.reshape(2, 4, 2)  # group, member, step
    torch.testing.assert_close(advantage.mean(1), torch.zeros(2, 2), rtol=0, atol=1e-5)
    assert (advantage[..., 0] != advantage[..., 1]).all(), "a step's credit is its own"


@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        ("gain", [[1.0, -2.0], [-1.0, 2.0]]),
        ("to_go", [[-1.0, -2.0], [1.0, 2.0]]),
        ("level", [[1.0, -1.0], [-1.0, 1.0]]),
    ],
)
def test_credit_by_hand(toy_policy: Policy, context: MakeContext, credit: Any, expected: list[list[float]]) -> None:
    # R by state: sample 0 goes 0, 2, 0; sample 1 goes 0, 0, 2. Centred: half the differences.
    algorithm = DenseGRPO(window=2, credit=credit, advantage="no_std", shared_noise=True)
    prompts = PromptBatch((Prompt(0, "a red circle"),), group=2)
    samples = rolled(toy_policy, algorithm.plan(context()), context(), prompts)
    previews = torch.tensor([0.0, 2.0, 0.0])  # the group's, then each sample's second state
    rows = algorithm.rows(samples, scored(samples, torch.tensor([0.0, 2.0]), previews), context())
    torch.testing.assert_close(rows.advantage.reshape(2, 2), torch.tensor(expected))


def test_an_unscored_completion_masks_the_decisions_that_touch_it(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = DenseGRPO(window=3)
    samples = rolled(toy_policy, algorithm.plan(context()), context())
    assert samples.previews is not None
    assert samples.preview_of is not None
    ahead = torch.rand(len(samples.previews), generator=torch.Generator().manual_seed(0))
    ahead[samples.preview_of[2, 1]] = torch.nan
    rows = algorithm.rows(samples, scored(samples, previews=ahead), context())
    weight = rows.weight.reshape(8, 3)
    assert weight[2].tolist() == [0.0, 0.0, 1.0]
    assert weight.sum() == 8 * 3 - 2
    lost = samples.preview_of.clone()
    lost[5, 0] = -1
    rows = algorithm.rows(replace(samples, preview_of=lost), scored(samples), context())
    assert rows.weight.reshape(8, 3)[5].tolist() == [0.0, 1.0, 1.0]
    assert rows.weight.sum() == 8 * 3 - 1


def test_steps_on_which_a_group_agrees_teach_nothing(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = DenseGRPO(window=2)
    samples = rolled(toy_policy, algorithm.plan(context()), context())
    assert samples.previews is not None
    flat = scored(samples, torch.rand(8), torch.full((len(samples.previews),), 0.3))
    advantage = algorithm.rows(samples, flat, context()).advantage.reshape(8, 2)
    assert (advantage[:, 0] == 0).all(), "0.3 to 0.3 for everyone"
    assert (advantage[:, 1] != 0).any()


def test_samples_without_completions_are_refused(toy_policy: Policy, context: MakeContext) -> None:
    plan = replace(DenseGRPO(window=2).plan(context()), completions=None)
    samples = rolled(toy_policy, plan, context())
    plain = Scores(("one",), torch.rand(8, 1), torch.ones(8, 1, dtype=torch.bool), torch.ones(1))
    with pytest.raises(ValueError, match="carry no completions"):
        DenseGRPO(window=2).rows(samples, plain, context())


# ---- calibration -----------------------------------------------------------------------------------------------------


def test_a_round_moves_each_level_by_its_step_and_respects_the_floor() -> None:
    # Five decisions a step: balanced, all for the better, all for the worse, one tie short of balance.
    gain = torch.tensor([[1, -1, 1, -1, 0], [1, 1, 1, 1, 1], [-1, -1, -1, -1, -1], [1, 1, -1, 0, 0]]).float().T
    psi = torch.tensor([0.5, 0.5, 0.5, 0.5])
    after = dense_grpo.calibrated(psi, gain, balance=2, step=0.01)
    torch.testing.assert_close(after, torch.tensor([0.51, 0.49, 0.49, 0.51]))
    low = dense_grpo.calibrated(torch.full((4,), 0.011), gain, balance=2, step=0.01)
    assert low.tolist() == pytest.approx([0.021, 0.01, 0.01, 0.021])


def test_calibration_starts_at_the_flow_sde_and_is_used_by_every_plan(toy_policy: Policy, context: MakeContext) -> None:
    algorithm, plans = DenseGRPO(calibration=3, noise_level=0.4), []

    def sample(plan: Plan, turn: int) -> tuple[Samples, Scores]:
        plans.append(plan)
        samples = rolled(toy_policy, plan, context(turn, stage="main start"))
        return samples, scored(samples)

    state = algorithm.start(Tools(context(), sample))
    psi = state["psi"]
    assert psi.shape == (STEPS,)
    assert [plan.dynamics for plan in plans] == ["flow", "dance", "dance"]
    sigmas = torch.linspace(1, 0, STEPS + 1)
    flow_sde = 0.4 * torch.sqrt(sigmas[:-1] / (1 - torch.tensor([sigmas[1], *sigmas[1:-1]])))
    moved = (psi[:-1] - flow_sde[:-1]) / 0.01
    torch.testing.assert_close(moved, moved.round(), rtol=0, atol=1e-3)
    assert set(moved.round().abs().int().tolist()) <= {1, 3}, "three rounds of plus or minus one"
    plan = algorithm.plan(context(state=state))
    assert plan.dynamics == "dance"
    assert plan.noise_level == pytest.approx(psi.tolist())
    assert DenseGRPO().start(Tools(context(), sample)) == {}


def test_the_ratio_is_1_with_calibrated_noise(toy_policy: Policy, context: MakeContext) -> None:
    # The loss takes each row's own level: with `flow` dynamics or one level for all the ratio would be off.
    algorithm = DenseGRPO(calibration=1)
    at = context(state={"psi": torch.linspace(0.8, 0.2, STEPS)})
    samples = rolled(toy_policy, algorithm.plan(at), at)
    rows = algorithm.rows(samples, scored(samples), at)
    assert rows.noise_level.unique().numel() == STEPS - 1
    result = algorithm.loss(toy_policy.models, rows)
    assert result.metrics["ratio/deviation"].max() <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_level": 0.0}, "noise_level must be above 0"),
        ({"completion_steps": -1}, "completion_steps must be 0 or more"),
        ({"calibration": -1}, "calibration must be 0 or more"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"window": 0}, "window must be 1 or more"),
        ({"window_start": (3, 1)}, "window_start must be"),
        ({"calibration_step": 0.0}, "must be above 0"),
        ({"kl": -1.0}, "kl must be 0 or more"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseGRPO(**options)
