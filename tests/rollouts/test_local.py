"""Sampling in this process: what it records is what training replays, and nothing depends on how it was computed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from making import told
from test_resources import OWN, WIDE, sized_policy
from torch import Tensor, nn

from rlkit import flow
from rlkit.algorithms.flow_grpo import FlowGRPO
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.policy import Policy
from rlkit.rollouts.local import Local
from rlkit.types import Condition, Context, FlowRows, Path, Plan, Prompt, Samples, generator

STEPS = 6
TEXTS = ("a red circle", "two blue crosses", "a cyan square left of a red triangle")
PROMPTS = PromptBatch(tuple(Prompt(i, text) for i, text in enumerate(TEXTS)), group=2)
LEVEL = {"flow": 0.7, "dance": 0.3, "cps": 0.7}
SHARED = pytest.mark.parametrize("shared", [False, True], ids=["own noise", "shared noise"])
MakeContext = Callable[..., Context]


def planned(dynamics: str = "flow", window: tuple[int, int] = (1, 3), shared: bool = False) -> Plan:
    return Plan(
        dynamics=dynamics,  # type: ignore[arg-type]
        noise_level=LEVEL[dynamics],
        window=window,
        shared_noise=shared,
        record=True,
    )


def collect(
    policy: Policy,
    plan: Plan,
    context: Context,
    *,
    batch: int | None = None,
    processes: Processes | None = None,
    prompts: PromptBatch = PROMPTS,
) -> Samples:
    return Local(steps=STEPS, batch=batch).start(policy, processes or Processes()).collect(prompts, plan, context)


def path_of(samples: Samples) -> Path:
    assert samples.path is not None
    return samples.path


# ---- what training replays -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
@pytest.mark.parametrize(("window", "shared"), [((0, 5), False), ((0, 2), True), ((2, 3), True), ((3, 1), False)])
def test_the_ratio_is_1_before_any_update(
    tiny_policy: Policy, context: MakeContext, dynamics: str, window: tuple[int, int], shared: bool
) -> None:
    # Other batches than the rollout's, in another order: what a learner does.
    samples = collect(tiny_policy, planned(dynamics, window, shared), context())
    n, k = path_of(samples).log_prob.shape
    assert (n, k) == (6, window[1])
    rows = FlowRows.from_path(samples, torch.ones(n), torch.ones(n, dtype=torch.bool))
    algorithm = FlowGRPO(dynamics=dynamics, noise_level=LEVEL[dynamics])  # type: ignore[arg-type]
    with torch.no_grad():
        for part in torch.randperm(n * k, generator=generator("order")).split(7):
            away = algorithm.loss(tiny_policy.models, rows.select(part)).metrics["ratio/deviation"]
            assert away.max() < 1e-6


@pytest.mark.parametrize(("noise_level", "size"), [(0.7, 1e-4), (0.02, 1e-2)])
def test_states_rounded_to_bf16_would_break_the_ratio(
    tiny_policy: Policy, context: MakeContext, noise_level: float, size: float
) -> None:
    # The stored next state decides its own log-probability: rounding it moves the ratio by more than the clip range
    # of 1e-4, the more the smaller the step's noise.
    plan = replace(planned(window=(0, STEPS)), noise_level=noise_level)
    path = path_of(collect(tiny_policy, plan, context()))
    assert path.states.dtype == path.means.dtype == path.log_prob.dtype == torch.float32
    shifts = []
    for step, (sigma, sigma_next) in enumerate(pairwise(path.sigmas.tolist())):
        x = path.states[:, step]
        _, std = flow.sde_step(x, x, sigma, sigma_next, noise_level, "flow", path.sigma_max)
        exact = flow.log_prob(path.states[:, step + 1], path.means[:, step], std)
        rounded = flow.log_prob(path.states[:, step + 1].bfloat16(), path.means[:, step], std)
        torch.testing.assert_close(exact, path.log_prob[:, step], rtol=0, atol=1e-5)
        shifts.append(float((rounded - exact).abs().max()))
    assert max(shifts) > size


@SHARED
@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
def test_recorded_states_chain(tiny_policy: Policy, context: MakeContext, dynamics: str, shared: bool) -> None:
    first, count = window = (2, 3)
    samples = collect(tiny_policy, planned(dynamics, window, shared), context(step=4))
    path = path_of(samples)
    schedule = tiny_policy.model.sigmas(STEPS)
    assert path.states.shape == (6, count + 1, *tiny_policy.model.latent_shape)
    assert path.means.shape == (6, count, *tiny_policy.model.latent_shape)
    assert torch.equal(path.sigmas, schedule[first : first + count + 1])
    assert path.steps.tolist() == [2, 3, 4]
    assert path.sigma_max == float(schedule[1])
    for k, step in enumerate(path.steps.tolist()):
        x, sigma, sigma_next = path.states[:, k], float(schedule[step]), float(schedule[step + 1])
        with torch.no_grad():
            texts = [prompt.text for prompt in samples.prompts]
            v = tiny_policy.models.current.velocity(x, torch.full((6,), sigma), texts)
        mean, std = flow.sde_step(x, v, sigma, sigma_next, LEVEL[dynamics], dynamics, path.sigma_max)
        z = (path.states[:, k + 1] - path.means[:, k]) / std
        torch.testing.assert_close(path.means[:, k], mean, rtol=0, atol=2e-5)
        assert z.std() == pytest.approx(1, abs=0.03)
        assert torch.corrcoef(z.flatten(1)).fill_diagonal_(0).abs().max() < 0.2, "each sample has noise of its own"
    with torch.no_grad():
        texts = [prompt.text for prompt in samples.prompts]
        v = tiny_policy.models.current.velocity(path.states[:, -1], schedule[5].expand(6), texts)
    end = flow.ode_step(path.states[:, -1], v, schedule[5], 0.0)
    torch.testing.assert_close(samples.latents, end, rtol=0, atol=2e-5)


def test_without_noise_or_record_there_is_no_path(tiny_policy: Policy, context: MakeContext) -> None:
    assert collect(tiny_policy, Plan(), context()).path is None
    assert collect(tiny_policy, replace(planned(), record=False), context()).path is None


# ---- the same numbers however they are computed ----------------------------------------------------------------------


def one_by_one(policy: Policy, plan: Plan, context: Context) -> Tensor:
    """The states of every sample, each computed alone and without any short cut: [N, STEPS+1, C, H, W]."""
    sigmas, key = policy.model.sigmas(STEPS), (context.seed, context.stage, context.step)
    first, count = plan.window or (0, STEPS)
    policy.conditions.encode(told(TEXTS))

    def noise(purpose: str, i: int) -> Tensor:
        return torch.randn(1, *policy.model.latent_shape, generator=generator(*key, purpose, i))

    every = []
    for i in range(len(PROMPTS)):
        prompt = i // PROMPTS.group
        states = [noise("group noise", prompt) if plan.shared_noise else noise("noise", i)]
        for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
            with torch.no_grad():
                v = policy.models.current.velocity(states[-1], torch.tensor([sigma]), [TEXTS[prompt]])
            if first <= step < first + count:
                args = (sigma, sigma_next, plan.noise_level, plan.dynamics, float(sigmas[1]))
                mean, std = flow.sde_step(states[-1], v, *args)
                states.append(mean + std * noise(f"step {step}", i))
            else:
                states.append(flow.ode_step(states[-1], v, sigma, sigma_next))
        every.append(torch.cat(states))
    return torch.stack(every)


@SHARED
@pytest.mark.parametrize("window", [(0, 2), (3, 2)])
def test_samples_equal_those_computed_alone(
    toy_policy: Policy, context: MakeContext, window: tuple[int, int], shared: bool
) -> None:
    plan, at = planned(window=window, shared=shared), context(step=2)
    states = one_by_one(toy_policy, plan, at)
    first, count = window
    for batch in (None, 1, 5):  # 5 cuts through a group
        samples = collect(toy_policy, plan, at, batch=batch)
        torch.testing.assert_close(samples.latents, states[:, -1], rtol=0, atol=1e-5)
        torch.testing.assert_close(path_of(samples).states, states[:, first : first + count + 1], rtol=0, atol=1e-5)
    start = states[:, 0].unflatten(0, (3, 2))
    assert bool((start == start[:, :1]).all()) == shared
    assert all((a - b).abs().max() > 0.01 for a, b in pairwise(states[:, -1])), "no two samples are alike"


def test_shared_starts_change_no_number_of_the_real_network(tiny_policy: Policy, context: MakeContext) -> None:
    plan, at = planned(window=(2, 2), shared=True), context()
    samples = collect(tiny_policy, plan, at)
    states = one_by_one(tiny_policy, plan, at)
    torch.testing.assert_close(samples.latents, states[:, -1], rtol=0, atol=5e-5)
    torch.testing.assert_close(path_of(samples).states, states[:, 2:5], rtol=0, atol=5e-5)


def counting(policy: Policy) -> tuple[Policy, list[int]]:
    """The same policy, and the rows of every forward pass of the network."""
    passes: list[int] = []

    def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        passes.append(len(x))
        assert all(len(column) == len(x) == len(sigma) for column in cond.values())
        return policy.model.velocity(net, x, sigma, cond)

    return Policy(replace(policy.model, velocity=velocity), None, policy.device, "fp32", 0), passes


@pytest.mark.parametrize(
    ("plan", "passes"),
    [
        (planned(window=(2, 3)), [6, 6, 6, 6, 6, 6]),
        (planned(window=(2, 3), shared=True), [3, 3, 3, 6, 6, 6]),
        (planned(window=(0, 3), shared=True), [3, 6, 6, 6, 6, 6]),
        (Plan(shared_noise=True), [3, 3, 3, 3, 3, 3]),
    ],
)
def test_what_a_group_shares_is_computed_once(
    toy_policy: Policy, context: MakeContext, plan: Plan, passes: list[int]
) -> None:
    policy, seen = counting(toy_policy)
    samples = collect(policy, plan, context())
    assert seen == passes
    assert len(samples) == 6


@SHARED
@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_together_sample_what_one_samples(
    toy_policy: Policy, context: MakeContext, count: int, shared: bool
) -> None:
    plan = planned(shared=shared)
    whole = collect(toy_policy, plan, context())
    parts = [collect(toy_policy, plan, context(), processes=Processes(rank, count)) for rank in range(count)]
    assert [len(part) for part in parts] == [len(Processes(rank, count).share(6)) for rank in range(count)]
    assert {part.total for part in parts} == {6}
    for name in ("index", "group", "sample_id"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert sum((part.prompts for part in parts), ()) == whole.prompts
    for name in ("latents", "media"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    for name in ("states", "means", "log_prob"):
        joined = torch.cat([getattr(path_of(part), name) for part in parts])
        torch.testing.assert_close(joined, getattr(path_of(whole), name), rtol=0, atol=1e-5)
    assert all(torch.equal(path_of(part).sigmas, path_of(whole).sigmas) for part in parts)


# ---- what comes back -------------------------------------------------------------------------------------------------


def test_columns(tiny_policy: Policy, context: MakeContext) -> None:
    rollout = Local(steps=STEPS).start(tiny_policy, Processes())
    rollout.load({}, 7)
    samples = rollout.collect(PROMPTS, planned(), context(step=5))
    assert (samples.version, samples.total, len(samples)) == (7, 6, 6)
    assert samples.index.tolist() == list(range(6))
    assert samples.group.tolist() == [i // 2 for i in range(6)]
    assert samples.sample_id.tolist() == [30 + i for i in range(6)]
    assert {column.dtype for column in (samples.index, samples.group, samples.sample_id)} == {torch.int64}
    assert [prompt.text for prompt in samples.prompts] == [text for text in TEXTS for _ in range(2)]
    assert samples.latents.dtype == torch.float32
    assert not samples.latents.requires_grad
    assert rollout.health() == "ok"


def test_media_are_what_a_file_would_hold(tiny_policy: Policy, context: MakeContext) -> None:
    media = collect(tiny_policy, planned(), context()).media
    assert media.shape == (6, 3, 32, 32)
    assert media.dtype == torch.float32
    assert media.min() >= 0
    assert media.max() <= 1
    assert torch.equal(media, (media * 255).round() / 255)
    assert torch.equal((media * 255).round().to(torch.uint8).float() / 255, media)


def test_the_seed_and_the_step_decide_and_nothing_else(toy_policy: Policy, context: MakeContext) -> None:
    first = collect(toy_policy, planned(), context(step=3))
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(collect(toy_policy, planned(), context(step=3)).latents, first.latents)
    for other in (context(step=4), context(step=3, seed=1), context(step=3, stage="next")):
        assert (collect(toy_policy, planned(), other).latents - first.latents).flatten(1).abs().amax(1).min() > 0.01


def test_an_evaluation_draws_the_same_noise_each_time(toy_policy: Policy, context: MakeContext) -> None:
    single = replace(PROMPTS, group=1)
    held_out = context(step=0, stage="evaluate")
    before = collect(toy_policy, Plan(), held_out, prompts=single)
    collect(toy_policy, planned(), context(step=8))
    assert torch.equal(collect(toy_policy, Plan(), held_out, prompts=single).media, before.media)
    more = PromptBatch((*PROMPTS.prompts, Prompt(9, "a red square")), 1)
    longer = collect(toy_policy, Plan(), held_out, prompts=more)
    torch.testing.assert_close(longer.latents[:3], before.latents, msg="a longer panel moves no sample")


def test_the_plan_says_which_weights_sample(toy_policy: Policy, context: MakeContext) -> None:
    toy_policy.keep("old")
    before = collect(toy_policy, planned(), context())
    with torch.no_grad():
        for parameter in toy_policy.trainable.values():
            parameter.mul_(1.5)
    old = collect(toy_policy, replace(planned(), policy_set="old"), context())
    assert torch.equal(old.latents, before.latents)
    assert not torch.equal(collect(toy_policy, planned(), context()).latents, before.latents)
    with pytest.raises(KeyError, match="no set 'ema'"):
        collect(toy_policy, replace(planned(), policy_set="ema"), context())


def test_sampling_leaves_no_gradient(toy_policy: Policy, context: MakeContext) -> None:
    samples = collect(toy_policy, planned(), context())
    columns: Sequence[Tensor] = (samples.latents, samples.media, path_of(samples).log_prob)
    assert not any(column.requires_grad for column in columns)


@pytest.mark.parametrize(
    ("options", "text"), [({"steps": 0}, "steps must be 1 or more"), ({"batch": 0}, "batch must be 1 or more, not 0")]
)
def test_option_errors(options: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Local(**options)


def test_a_plan_may_ask_for_another_number_of_steps(tiny_policy: Policy, context: MakeContext) -> None:
    asked = collect(tiny_policy, Plan(steps=STEPS - 2), context())
    options = Local(steps=STEPS - 2).start(tiny_policy, Processes())
    assert torch.equal(asked.latents, options.collect(PROMPTS, Plan(), context()).latents)
    assert not torch.equal(asked.latents, collect(tiny_policy, Plan(), context()).latents)


# ---- a short tail ----------------------------------------------------------------------------------------------------


def test_a_tail_replaces_the_steps_after_the_window_and_no_others(tiny_policy: Policy, context: MakeContext) -> None:
    plan = planned(window=(1, 2), shared=True)
    whole = path_of(collect(tiny_policy, plan, context()))
    short = path_of(collect(tiny_policy, replace(plan, tail=2), context()))
    for column in ("states", "means", "log_prob", "sigmas", "steps"):
        assert torch.equal(getattr(whole, column), getattr(short, column)), "what is trained on does not change"


@pytest.mark.parametrize(("tail", "calls"), [(None, 6), (2, 5), (1, 4), (9, 6)])
def test_a_tail_saves_its_calls(
    toy_policy: Policy, context: MakeContext, monkeypatch: pytest.MonkeyPatch, tail: int | None, calls: int
) -> None:
    seen: list[float] = []
    model = toy_policy.model
    counted = replace(model, velocity=lambda net, x, s, c: (seen.append(float(s[0])), model.velocity(net, x, s, c))[1])
    monkeypatch.setattr(toy_policy, "model", counted)
    samples = collect(toy_policy, replace(planned(window=(1, 2)), tail=tail, solver="dpm"), context())
    assert len(seen) == calls
    assert seen[:3] == pytest.approx([1, 5 / 6, 4 / 6])
    assert samples.sigmas is not None
    assert len(samples.sigmas) == STEPS + 1, "the schedule as it was, for what is computed from it"


def test_the_solver_with_a_memory_forgets_it_at_a_stochastic_step(toy_policy: Policy, context: MakeContext) -> None:
    # The noise of a stochastic step is no slope of the clean prediction.
    plan = replace(planned(window=(1, 2)), solver="dpm")
    samples = collect(toy_policy, plan, context())
    path = path_of(samples)
    x, texts = path.states[:, -1], [prompt.text for prompt in samples.prompts]
    with torch.no_grad():
        behind = None
        for sigma, sigma_next in pairwise(torch.linspace(1, 0, STEPS + 1).tolist()[3:]):
            v = toy_policy.models.current.velocity(x, torch.full((len(x),), sigma), texts)
            following = flow.dpm_step(x, v, sigma, sigma_next, behind)
            behind, x = (flow.predict_clean(x, v, sigma), sigma), following
    torch.testing.assert_close(samples.latents, x, rtol=1e-4, atol=1e-5)


def test_a_recorded_ode_has_states_and_no_density(toy_policy: Policy, context: MakeContext) -> None:
    path = path_of(collect(toy_policy, Plan(record=True, window=(3, 3)), context()))
    assert path.states.shape[1] == 4
    assert path.log_prob.isnan().all(), "a number here would be believed"
    assert path.noise_levels.tolist() == [0.0] * 3


def test_parts_are_told_of_as_they_are_finished(tiny_policy: Policy, context: MakeContext) -> None:
    """So that slow rewards can begin; what is told is what is returned in the end."""
    told: list[Samples] = []
    here = context(sampled=told.append)
    whole = Local(steps=2, batch=3).start(tiny_policy, Processes()).collect(PROMPTS, Plan(), here)
    assert torch.cat([part.index for part in told]).tolist() == whole.index.tolist()
    assert torch.equal(torch.cat([part.media for part in told]), whole.media)
    assert [prompt for part in told for prompt in part.prompts] == list(whole.prompts)
    assert torch.cat([part.group for part in told]).tolist() == whole.group.tolist()
    told.clear()
    Local(steps=2).start(tiny_policy, Processes()).collect(PROMPTS, Plan(), here)
    assert not told, "one part is the whole step"


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_prompts_are_drawn_at_their_size(context: MakeContext) -> None:
    policy = sized_policy(guidance=2.0)
    wide = PromptBatch(tuple(replace(prompt, size=WIDE) for prompt in PROMPTS.prompts), group=2)
    samples = collect(policy, planned(), context(), prompts=wide)
    assert samples.latents.shape == (6, 4, WIDE[0] // 2, WIDE[1] // 2)
    assert samples.media.shape == (6, 3, *WIDE)
    assert samples.sigmas is not None
    assert torch.equal(samples.sigmas, policy.model_at(WIDE).sigmas(STEPS)), "the schedule of its size"
    assert not torch.equal(samples.sigmas, policy.model.sigmas(STEPS))
    path = path_of(samples)
    keys = [prompt.key for prompt in samples.prompts]
    with torch.no_grad():
        v = policy.models.current.velocity(path.states[:, 0], path.sigmas[:1].expand(6), keys)
    mean, _ = flow.sde_step(path.states[:, 0], v, path.sigmas[0], path.sigmas[1], 0.7, "flow", path.sigma_max)
    torch.testing.assert_close(mean, path.means[:, 0], rtol=0, atol=1e-6)


def test_a_size_that_is_the_backbones_own_changes_no_number(context: MakeContext) -> None:
    policy = sized_policy()
    named = PromptBatch(tuple(replace(prompt, size=OWN) for prompt in PROMPTS.prompts), group=2)
    plain, sized = (collect(policy, planned(), context(), prompts=one) for one in (PROMPTS, named))
    assert torch.equal(plain.latents, sized.latents)
    assert torch.equal(plain.media, sized.media)


def test_prompts_of_several_sizes_are_not_drawn_together(context: MakeContext) -> None:
    mixed = PromptBatch((PROMPTS.prompts[0], replace(PROMPTS.prompts[1], size=WIDE)), group=2)
    with pytest.raises(ValueError, match="several sizes cannot be drawn together: the backbone's own, 4 x 8"):
        collect(sized_policy(), planned(), context(), prompts=mixed)
