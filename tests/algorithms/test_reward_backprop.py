"""Reward back-propagation: its gradient against ones got in other ways, and what must not leak into it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from making import scores_of
from torch import Tensor, nn

from rlkit import flow, recipe
from rlkit.algorithms.reward_backprop import RewardBackprop, StartRows
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.errors import RecipeError, RewardError
from rlkit.learner import Learner, LearnerOptions
from rlkit.policy import Models, Policy
from rlkit.rollouts.local import Local
from rlkit.scoring import Scoring, WeightedReward
from rlkit.types import Condition, Context, FlowModel, Needs, Prompt, Reward, Samples

MakeContext = Callable[..., Context]
PROMPTS = PromptBatch(tuple(Prompt(i, text) for i, text in enumerate(["a red circle", "two blue crosses", "x"])), 2)
STEPS = 6  # of the context's sampling


def warmth(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """[B] a reward that is curved in every pixel and reads the prompt."""
    wanted = torch.tensor([0.2 + 0.1 * prompt.id for prompt in prompts], device=media.device)
    weight = torch.linspace(1, 2, media[0].numel()).reshape(media[0].shape)
    return 1 - (weight * (media - wanted[:, None, None, None]).square()).mean((1, 2, 3))


def rolled(policy: Policy, algorithm: RewardBackprop, context: Context) -> tuple[Samples, StartRows]:
    samples = Local(steps=STEPS).start(policy, Processes()).collect(PROMPTS, algorithm.plan(context), context)
    return samples, algorithm.rows(samples, scores_of([0.5] * len(samples)), context)


def gradient_of(
    policy: Policy, algorithm: RewardBackprop, rows: StartRows, score: Any = warmth, micro: int | None = None
) -> Tensor:
    learner = Learner(policy, LearnerOptions(lr=1.0, batch=len(rows), micro_batch=micro), Processes())
    learner.gradient(algorithm.loss, Models(policy, score), rows)
    return torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---- plans and rows --------------------------------------------------------------------------------------------------


def test_the_window_is_the_end_of_the_schedule(context: MakeContext) -> None:
    plan = RewardBackprop(last_steps=2).plan(context())
    assert (plan.dynamics, plan.record, plan.window, plan.policy_set) == ("ode", True, (4, 2), "current")
    assert RewardBackprop(form="refl", last_steps=3).plan(context()).window == (3, 1)


def test_random_truncation_is_drawn_from_the_step_and_takes_every_length(context: MakeContext) -> None:
    algorithm = RewardBackprop(random_steps=(2, 5))
    plans = [algorithm.plan(context(step)) for step in range(100)]
    windows = [plan.window for plan in plans if plan.window]
    assert {count for _, count in windows} == {2, 3, 4, 5}
    assert all(first + count == STEPS for first, count in windows)
    torch.manual_seed(7)  # another process
    torch.rand(3)
    assert [algorithm.plan(context(step)) for step in reversed(range(100))] == plans[::-1]
    assert plans[:20] != [algorithm.plan(context(step, seed=1)) for step in range(20)]


def test_needs_say_what_it_costs() -> None:
    assert RewardBackprop(last_steps=3).needs() == Needs(path=True, window=3, rows=1, differentiable=True)
    assert RewardBackprop(random_steps=(1, 7), kl=0.1).needs() == Needs(
        path=True, window=7, rows=1, differentiable=True, reference=True
    )


def test_a_row_is_a_sample_and_starts_where_its_last_steps_do(toy_policy: Policy, context: MakeContext) -> None:
    samples, rows = rolled(toy_policy, RewardBackprop(last_steps=2), context())
    assert samples.path is not None
    assert rows.row.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(rows.x, samples.path.states[:, 0])
    torch.testing.assert_close(rows.sigmas, torch.tensor([[2 / 6, 1 / 6, 0.0]]).expand(6, 3))
    assert rows.cond == ("a red circle",) * 2 + ("two blue crosses",) * 2 + ("x",) * 2
    assert [prompt.id for prompt in rows.prompts] == [0, 0, 1, 1, 2, 2]
    part = rows.select(torch.tensor([4, 1]))
    assert part.sigmas.shape == (2, 3)
    assert [prompt.id for prompt in part.prompts] == [2, 0]
    two = torch.tensor([2, 3])
    share = replace(samples.select(two), path=replace(samples.path, states=samples.path.states[two]))
    some = RewardBackprop(last_steps=2).rows(share, scores_of([0.0, 1.0]), context())
    assert some.row.tolist() == [2, 3], "numbered over all processes"


def test_samples_without_a_path_are_refused(samples_of: Callable[..., Samples], context: MakeContext) -> None:
    with pytest.raises(ValueError, match="carry no path: the plan must set record=True"):
        RewardBackprop().rows(samples_of(["a", "a"]), scores_of([0.0, 1.0]), context())


# ---- the gradient ----------------------------------------------------------------------------------------------------


class Gain(nn.Module):
    """v = a x: its Euler chain is a product, so that every derivative can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x


def plain_policy(net: nn.Module, velocity: Callable[..., Tensor]) -> Policy:
    def encode(texts: Sequence[str]) -> list[Condition]:
        return [{"none": torch.zeros(1)} for _ in texts]

    def sigmas(steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1)

    model = FlowModel(net, velocity, encode, lambda latents: latents, sigmas, (3, 2, 2), lora_targets=())
    return Policy(model, None, torch.device("cpu"), "fp32", 0)


@pytest.mark.parametrize("last_steps", [1, 2, 4, STEPS])
def test_the_gradient_of_a_product_chain_is_the_written_one(last_steps: int, context: MakeContext) -> None:
    # x_K = x_0 (1 + a dt)^K, dt = -1/T; reward mean(x_K): d reward / d a = mean(x_0) K dt (1 + a dt)^(K-1).
    policy = plain_policy(Gain(), lambda net, x, sigma, cond: net(x))
    algorithm = RewardBackprop(last_steps=last_steps)
    _, rows = rolled(policy, algorithm, context())
    found = gradient_of(policy, algorithm, rows, lambda media, prompts: media.mean((1, 2, 3)))
    dt = -1 / STEPS
    written = rows.x.mean() * last_steps * dt * (1 + 0.7 * dt) ** (last_steps - 1)
    assert float(found[0]) == pytest.approx(-float(written), rel=1e-5)


def whole_chain(policy: Policy, context: Context, last_steps: int) -> Tensor:
    """The gradient by automatic differentiation of the whole sampler, cut by hand before the last steps."""
    samples, rows = rolled(policy, RewardBackprop(last_steps=STEPS), context)
    x, sigmas = rows.x, torch.linspace(1, 0, STEPS + 1)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x = x.detach() if step == STEPS - last_steps else x
        x = x + (sigma_next - sigma) * policy.models.current.velocity(x, torch.full((len(x),), sigma), rows.cond)
    loss = -warmth(policy.model.decode(x), samples.prompts).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.trainable.values()))])


@pytest.mark.parametrize("last_steps", [1, 3, STEPS])
def test_the_gradient_is_that_of_the_sampler_cut_by_hand(
    toy_policy: Policy, context: MakeContext, last_steps: int
) -> None:
    algorithm = RewardBackprop(last_steps=last_steps)
    _, rows = rolled(toy_policy, algorithm, context())
    found, expected = gradient_of(toy_policy, algorithm, rows), whole_chain(toy_policy, context(), last_steps)
    assert distance(found, expected) < 1e-5
    if last_steps < STEPS:  # a truncation that cut nothing, or cut elsewhere, would be seen
        assert distance(found, whole_chain(toy_policy, context(), STEPS)) > 0.05
        assert distance(found, whole_chain(toy_policy, context(), last_steps + 1)) > 0.05


def test_the_gradient_is_that_of_finite_differences(toy_policy: Policy, context: MakeContext) -> None:
    """In float64 and in formulas of their own, along three directions."""
    algorithm = RewardBackprop(last_steps=3)
    _, rows = rolled(toy_policy, algorithm, context())
    found = gradient_of(toy_policy, algorithm, rows).double()
    pooled = toy_policy.conditions.batch(rows.cond)["pooled"].double()
    names = list(toy_policy.trainable)
    sizes = [toy_policy.trainable[name].numel() for name in names]
    weights = torch.cat([toy_policy.trainable[name].detach().double().flatten() for name in names])

    def loss(flat: Tensor) -> float:
        part = dict(zip(names, flat.split(sizes), strict=True))
        x = rows.x.double().flatten(1)
        for sigma, sigma_next in pairwise([3 / 6, 2 / 6, 1 / 6, 0.0]):
            seen = torch.cat([x, torch.full((len(x), 1), sigma, dtype=torch.float64), pooled], 1)
            hidden = torch.tanh(seen @ part["mix.weight"].view(28, 25).T + part["mix.bias"])
            x = x + (sigma_next - sigma) * (hidden @ part["out.weight"].view(16, 28).T + part["out.bias"])
        media = toy_policy.model.decode(x.view(-1, 4, 2, 2))
        return -float(warmth(media, rows.prompts).mean())

    for seed in range(3):
        way = torch.randn(len(weights), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        slope = (loss(weights + 1e-5 * way) - loss(weights - 1e-5 * way)) / 2e-5
        assert float(found @ way) == pytest.approx(slope, rel=1e-4, abs=1e-7)


class Steps(nn.Module):
    """One parameter for each step of the schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.linspace(0.5, 1, STEPS))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        at = ((1 - sigma) * STEPS).round().long()
        return self.gains[at][:, None, None, None] * x


@pytest.mark.parametrize(
    ("options", "touched"),
    [
        ({"last_steps": 1}, [5]),
        ({"last_steps": 4}, [2, 3, 4, 5]),
        ({"last_steps": STEPS}, [0, 1, 2, 3, 4, 5]),
        ({"last_steps": 4, "form": "refl"}, [2]),
    ],
)
def test_steps_before_the_cut_get_no_gradient(
    options: Mapping[str, Any], touched: list[int], context: MakeContext
) -> None:
    policy = plain_policy(Steps(), lambda net, x, sigma, cond: net(x, sigma))
    algorithm = RewardBackprop(**options)
    _, rows = rolled(policy, algorithm, context())
    assert not rows.x.requires_grad
    found = gradient_of(policy, algorithm, rows)
    assert torch.nonzero(found).flatten().tolist() == touched


def test_the_random_forms_agree_with_the_fixed_one(toy_policy: Policy, context: MakeContext) -> None:
    drawn, fixed = RewardBackprop(random_steps=(2, 2)), RewardBackprop(last_steps=2)
    _, rows = rolled(toy_policy, fixed, context())
    _, same = rolled(toy_policy, drawn, context())
    assert torch.equal(gradient_of(toy_policy, drawn, same), gradient_of(toy_policy, fixed, rows))


def test_refl_scores_the_clean_prediction(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = RewardBackprop(form="refl", last_steps=4, hinge=2.0)
    _, rows = rolled(toy_policy, algorithm, context())
    assert rows.sigmas.tolist() == [[pytest.approx(4 / 6), 0.0]] * 6
    v = toy_policy.models.current.velocity(rows.x, rows.sigmas[:, 0], rows.cond)
    clean = flow.predict_clean(rows.x, v, 4 / 6)
    loss = torch.relu(2 - warmth(toy_policy.model.decode(clean), rows.prompts)).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(toy_policy.trainable.values()))])
    assert distance(gradient_of(toy_policy, algorithm, rows), expected) < 1e-5
    # From the last step on, both forms are one.
    _, last = rolled(toy_policy, RewardBackprop(), context())
    _, jump = rolled(toy_policy, RewardBackprop(form="refl"), context())
    assert torch.equal(last.sigmas, jump.sigmas)
    assert torch.equal(last.x, jump.x)


def test_the_hinge_leaves_alone_what_is_good_enough(toy_policy: Policy, context: MakeContext) -> None:
    plain = RewardBackprop(last_steps=2)
    _, rows = rolled(toy_policy, plain, context())
    models = Models(toy_policy, warmth)
    reward = plain.loss(models, rows).metrics["reward/in_loss"]
    limit = float(reward.median())
    held = RewardBackprop(last_steps=2, hinge=limit)
    result = held.loss(models, rows)
    torch.testing.assert_close(result.terms["reward"][0].detach(), (limit - reward).clamp(min=0))
    assert result.metrics["beyond_hinge"].tolist() == (reward >= limit).float().tolist()
    below = torch.nonzero(reward < limit).flatten()
    assert 0 < len(below) < len(rows)
    share = len(below) / len(rows)
    expected = share * gradient_of(toy_policy, plain, rows.select(below))
    assert distance(gradient_of(toy_policy, held, rows), expected) < 1e-5


@pytest.mark.parametrize("options", [{"last_steps": 3}, {"last_steps": 3, "kl": 0.3}, {"form": "refl"}])
def test_checkpointing_changes_no_gradient(
    toy_policy: Policy, context: MakeContext, options: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, thrifty = RewardBackprop(**options), RewardBackprop(**options, checkpointing=True)
    toy_policy.keep("reference")
    _, rows = rolled(toy_policy, plain, context())
    with torch.no_grad():
        for parameter in toy_policy.trainable.values():
            parameter.mul_(1.05)
    calls: list[int] = []
    forward = toy_policy.net.forward
    monkeypatch.setattr(toy_policy.net, "forward", lambda *args: (calls.append(1), forward(*args))[1])
    expected = gradient_of(toy_policy, plain, rows)
    once = len(calls)
    found = gradient_of(toy_policy, thrifty, rows)
    assert distance(found, expected) < 1e-6
    assert len(calls) - once > once, "every call with gradient is made twice"


def test_micro_batches_and_rows_apart(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = RewardBackprop(last_steps=2)
    _, rows = rolled(toy_policy, algorithm, context())
    whole = gradient_of(toy_policy, algorithm, rows)
    assert distance(gradient_of(toy_policy, algorithm, rows, micro=4), whole) < 1e-5
    models, some = Models(toy_policy, warmth), torch.tensor([5, 0])
    values = algorithm.loss(models, rows).terms["reward"][0]
    assert values.shape == (6,)
    torch.testing.assert_close(algorithm.loss(models, rows.select(some)).terms["reward"][0], values[some])


def test_the_reward_rises_along_its_gradient(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = RewardBackprop(last_steps=3)  # a loss of the wrong sign would fall
    means = []
    learner = Learner(toy_policy, LearnerOptions(lr=1e-2, batch=6), Processes())
    for step in range(15):
        samples, rows = rolled(toy_policy, algorithm, context(step))
        means.append(float(warmth(samples.media, samples.prompts).mean()))
        learner.step(algorithm.loss, Models(toy_policy, warmth), rows)
    assert means[-1] > means[0] + 0.02


# ---- the KL ----------------------------------------------------------------------------------------------------------


def test_the_kl_is_0_at_the_start_and_pulls_back_later(toy_policy: Policy, context: MakeContext) -> None:
    plain, held = RewardBackprop(last_steps=3), RewardBackprop(last_steps=3, kl=0.5)
    toy_policy.keep("reference")
    _, rows = rolled(toy_policy, plain, context())
    start = held.loss(Models(toy_policy, warmth), rows)
    assert start.metrics["kl"].abs().max() == 0
    assert distance(gradient_of(toy_policy, held, rows), gradient_of(toy_policy, plain, rows)) < 1e-6
    with torch.no_grad():
        for parameter in toy_policy.trainable.values():
            parameter.add_(0.02)
    moved = held.loss(Models(toy_policy, warmth), rows)
    assert moved.metrics["kl"].min() > 0
    torch.testing.assert_close(moved.terms["kl"][0].detach(), 0.5 * moved.metrics["kl"])
    pull = gradient_of(toy_policy, held, rows) - gradient_of(toy_policy, plain, rows)

    # At fixed states: through a state that moves, the reference's half of the gradient would be missing.
    x, states = rows.x, []
    for sigma, sigma_next in pairwise(rows.sigmas.unbind(1)):
        states.append((x, sigma))
        with torch.no_grad():
            x = flow.ode_step(x, toy_policy.models.current.velocity(x, sigma, rows.cond), sigma, sigma_next)
    by_hand = 0.5 * torch.stack([
        flow.v_kl(
            toy_policy.models.current.velocity(x, sigma, rows.cond),
            toy_policy.models.reference.velocity(x, sigma, rows.cond),
        ).mean()
        for x, sigma in states
    ]).mean()  # fmt: skip
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(by_hand, list(toy_policy.trainable.values()))])
    assert expected.norm() > 1e-3
    assert distance(pull, expected) < 1e-4


# ---- rewards ---------------------------------------------------------------------------------------------------------


def test_what_was_not_scored_does_not_reach_the_gradient(toy_policy: Policy, context: MakeContext) -> None:
    def picky(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        nothing = torch.tensor([torch.nan if prompt.text == "x" else 1.0 for prompt in prompts])
        return warmth(media, prompts) * nothing  # NaN, and so is its gradient

    algorithm, at = RewardBackprop(last_steps=2, kl=0.1), context()
    toy_policy.keep("reference")
    samples, _ = rolled(toy_policy, algorithm, at)
    assert samples.path is not None
    samples.path.states[4:] = torch.nan  # it overflowed, too
    rows = algorithm.rows(samples, scores_of([0.1, 0.2, 0.3, 0.4, torch.nan, torch.nan]), at)
    assert rows.weight.tolist() == [1, 1, 1, 1, 0, 0]
    gradient = gradient_of(toy_policy, algorithm, rows, picky)
    assert gradient.isfinite().all()
    kept = gradient_of(toy_policy, algorithm, rows.select(torch.arange(4)), picky)
    assert kept.norm() > 1e-4
    torch.testing.assert_close(gradient, kept, rtol=1e-5, atol=1e-8)
    alone = gradient_of(toy_policy, algorithm, rows, picky, micro=2)  # the last micro-batch has nothing scored
    torch.testing.assert_close(alone, kept, rtol=1e-5, atol=1e-8)


def test_the_path_s_log_probabilities_are_not_read(toy_policy: Policy, context: MakeContext) -> None:
    samples, rows = rolled(toy_policy, RewardBackprop(last_steps=2), context())
    assert samples.path is not None
    assert samples.path.log_prob.isnan().all(), "a noiseless step has no density"
    columns = [column for column in rows.columns().values() if isinstance(column, Tensor)]
    assert all(column.isfinite().all() for column in columns)


def blind(samples: Samples) -> Tensor:
    return (samples.media > 0.5).float().mean((1, 2, 3))


def smooth(samples: Samples) -> Tensor:
    return samples.media.mean((1, 2, 3))


def scoring(**rewards: tuple[Reward, float]) -> Scoring:
    return Scoring(tuple(WeightedReward(name, reward, weight) for name, (reward, weight) in rewards.items()))


def test_a_reward_without_gradient_is_refused_at_run_time(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = RewardBackprop()
    _, rows = rolled(toy_policy, algorithm, context())
    with pytest.raises(RewardError, match="reward 'blind' passes no gradient back to the picture") as caught:
        algorithm.loss(Models(toy_policy, scoring(good=(smooth, 1.0), blind=(blind, 0.5)).with_gradient), rows)
    assert caught.value.where == "rewards.blind"


def test_a_watched_reward_changes_nothing(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = RewardBackprop()
    _, rows = rolled(toy_policy, algorithm, context())
    alone = gradient_of(toy_policy, algorithm, rows, scoring(good=(smooth, 2.0)).with_gradient)
    watched = scoring(blind=(blind, 0.0), good=(smooth, 2.0)).with_gradient
    assert torch.equal(gradient_of(toy_policy, algorithm, rows, watched), alone)


def test_a_reward_without_gradient_is_refused_at_composition_time() -> None:
    setup = recipe.read("world_backprop")
    assert recipe.rows_per_step(setup.stages[0]) == 64
    with pytest.raises(RecipeError, match="passes no gradient back to the picture") as caught:
        recipe.read("world_backprop", ["stages.main.rewards.composition.weight=0.1"])
    assert "stages.main.rewards.composition" in str(caught.value)
    with pytest.raises(RecipeError, match="end after step 10"):
        recipe.read("world_backprop", ["stages.main.algorithm.last_steps=11"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"last_steps": 0}, "last_steps must be 1 or more, not 0: no gradient would reach the policy"),
        ({"random_steps": (0, 3)}, r"random_steps must be \[fewest, most\] .*, not \[0, 3\]"),
        ({"random_steps": (3, 2)}, r"random_steps must be \[fewest, most\] .*, not \[3, 2\]"),
        ({"kl": -0.1}, "kl must be 0 or more, not -0.1"),
    ],
)
def test_option_errors(options: Mapping[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RewardBackprop(**options)
