"""AWM: a ratio of 1 before an update, a first gradient in closed form, and a clip that stops what goes too far."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from making import models_of, normal, scores_of
from torch import Tensor

from rlkit.algorithms.awm import AWM
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.learner import Learner, LearnerOptions
from rlkit.policy import Policy
from rlkit.rollouts.local import Local
from rlkit.types import Context, Needs, NoisedRows, Plan, Prompt, Samples

MakeContext = Callable[..., Context]
PROMPTS = PromptBatch((Prompt(0, "a red circle"), Prompt(1, "two blue crosses")), group=3)
D = 4 * 2 * 2


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


A = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0], dtype=torch.float64)
SIGMA = torch.linspace(0.1, 1.0, 5, dtype=torch.float64)
CLEAN, NOISE, V_OLD = (normal(5, 4, 2, 2, seed=seed) for seed in (1, 2, 3))
TARGET = NOISE - CLEAN
ROWS = NoisedRows(torch.arange(5), CLEAN, NOISE, SIGMA, A, torch.ones(5, dtype=torch.float64), ("",) * 5)


def gradient(algorithm: AWM, rows: NoisedRows, v: Tensor, v_old: Tensor) -> Tensor:
    """Of the sum over rows, with respect to v: each row its own. [B, C, H, W]"""
    v = v.clone().requires_grad_()
    value, weight = algorithm.loss(models_of(v, v_old), rows).terms["policy"]
    (found,) = torch.autograd.grad((value * weight).sum(), v)
    return found


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_first_gradient_is_advantage_weighted_flow_matching() -> None:
    expected = column(A) * 2 * (V_OLD - TARGET) / D
    torch.testing.assert_close(gradient(AWM(), ROWS, V_OLD, V_OLD), expected)


def test_a_step_down_the_gradient_brings_good_samples_nearer() -> None:
    after = V_OLD - 0.5 * gradient(AWM(), ROWS, V_OLD, V_OLD)
    change = (after - TARGET).square().mean((1, 2, 3)) - (V_OLD - TARGET).square().mean((1, 2, 3))
    assert change.sign().tolist() == [1, 1, 0, -1, -1]


def test_the_ratio_is_that_of_two_errors_at_the_same_sigma_and_noise() -> None:
    v = V_OLD + 0.1 * normal(5, 4, 2, 2, seed=5)
    models = models_of(v, V_OLD)
    result = AWM().loss(models, ROWS)
    log_ratio = (V_OLD - TARGET).square().mean((1, 2, 3)) - (v - TARGET).square().mean((1, 2, 3))
    torch.testing.assert_close(result.metrics["ratio/mean"], log_ratio.exp())
    torch.testing.assert_close(result.terms["policy"][0], -A * log_ratio.exp())
    torch.testing.assert_close(result.metrics["old/log_prob"], -(V_OLD - TARGET).square().mean((1, 2, 3)))
    x = column(1 - SIGMA) * CLEAN + column(SIGMA) * NOISE
    for asked in (models.current.asked, models.old.asked):
        torch.testing.assert_close(asked[0], x)
        assert torch.equal(asked[1], SIGMA)


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_the_generalised_huber_form(power: float) -> None:
    algorithm = AWM(weighting="ghuber", power=power)
    error = (V_OLD - TARGET).square().mean((1, 2, 3))
    metrics = algorithm.loss(models_of(V_OLD, V_OLD), ROWS).metrics
    torch.testing.assert_close(metrics["old/log_prob"], -SIGMA / power * ((error + 1e-10) ** power - 1e-10**power))
    slope = column(SIGMA * (error + 1e-10) ** (power - 1))
    expected = column(A) * slope * 2 * (V_OLD - TARGET) / D
    torch.testing.assert_close(gradient(algorithm, ROWS, V_OLD, V_OLD), expected)
    assert gradient(algorithm, ROWS, TARGET, TARGET).isfinite().all(), "steep at 0, but not infinite"


@pytest.mark.parametrize(
    ("closer", "advantage", "alive"),
    [
        (True, 1.0, False),  # already likelier by more than the clip: no reward for more
        (True, -1.0, True),  # likelier although it was bad: pushed back
        (False, -1.0, False),
        (False, 1.0, True),
    ],
)
def test_the_clip_stops_only_what_goes_too_far(closer: bool, advantage: float, alive: bool) -> None:
    v = TARGET + (0.5 if closer else 1.5) * (V_OLD - TARGET)
    rows = replace(ROWS, advantage=torch.full_like(A, advantage))
    found = gradient(AWM(clip=0.1), rows, v, V_OLD).flatten(1).norm(dim=1)
    assert ((found > 0) == alive).all()
    assert AWM(clip=0.1).loss(models_of(v, V_OLD), rows).metrics["clip_fraction"].tolist() == [1.0] * 5


def test_the_gradient_stops_at_old_and_the_reference() -> None:
    v, v_old, v_reference = (normal(5, 4, 2, 2, seed=s).requires_grad_() for s in (1, 2, 3))
    result = AWM(kl=0.1).loss(models_of(v, v_old, v_reference), ROWS)
    sum((value * weight).sum() for value, weight in result.terms.values()).backward()  # type: ignore[union-attr]
    assert v.grad is not None
    assert v_old.grad is None
    assert v_reference.grad is None
    assert not any(values.requires_grad for values in result.metrics.values())


def test_the_kl_is_a_path_of_the_gradient() -> None:  # computed without one it would be logged, and pull nothing
    v, v_reference = normal(5, 4, 2, 2, seed=1).requires_grad_(), normal(5, 4, 2, 2, seed=3)
    result = AWM(kl=0.3).loss(models_of(v, V_OLD, v_reference), ROWS)
    value, weight = result.terms["kl"]
    assert weight is result.terms["policy"][1], "one normaliser, one accumulator"
    (found,) = torch.autograd.grad(value.sum(), v)
    torch.testing.assert_close(found, 0.3 * 2 * (v.detach() - v_reference) / D)
    torch.testing.assert_close(result.metrics["kl"], value.detach() / 0.3)


# ---- rows ------------------------------------------------------------------------------------------------------------


def finished(samples_of: Callable[..., Samples], n: int = 6, group: int = 3) -> Samples:
    samples = samples_of([f"prompt {i // group}" for i in range(n)], group)
    latents = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 4, 2, 2).clone()
    return replace(samples, latents=latents, sigmas=torch.tensor([1.0, 0.8, 0.5, 0.0]))


def test_rows_do_not_depend_on_which_process_holds_a_sample(
    samples_of: Callable[..., Samples], context: MakeContext
) -> None:
    samples, values = finished(samples_of), [0.0, 1.0, 0.5, 0.1, 0.9, 0.2]
    algorithm = AWM(draws=2, sigmas="logit_normal")
    whole = algorithm.rows(samples, scores_of(values), context(3))
    assert len(set(whole.sigma.tolist())) == len(whole), "no two samples share their draws"
    assert whole.row.tolist() == list(range(12))
    everyone = {torch.int64: samples.group, torch.bool: torch.ones(6, dtype=torch.bool)}

    def gather(column: Tensor) -> Tensor:
        return everyone.get(column.dtype, torch.tensor(values))

    # The second process of two: one sample of the first group and two of the second, so alone it knows no group.
    positions = torch.tensor([2, 3, 5])
    torch.rand(3)  # it has drawn something else before
    part = algorithm.rows(samples.select(positions), scores_of([0.5, 0.1, 0.2]), context(3, gather=gather))
    assert part.row.tolist() == [4, 5, 6, 7, 10, 11]
    for name, found in part.columns().items():
        if isinstance(found, Tensor):
            expected = whole.columns()[name]
            assert isinstance(expected, Tensor)
            assert torch.equal(found, expected[part.row]), name


@pytest.mark.parametrize("advantage", ["global_norm", "group_norm", "no_std", "leave_one_out", "gdpo"])
def test_unscored_samples_weigh_nothing_and_shift_nobody(
    samples_of: Callable[..., Samples], context: MakeContext, advantage: Any
) -> None:
    samples = finished(samples_of)
    samples.latents[1] = torch.nan  # it overflowed, which is why it was not scored
    scores = scores_of([0.0, 9.0, 1.0, 0.3, 0.3, 0.3], [True, False, True] + [True] * 3)
    rows = AWM(draws=2, advantage=advantage).rows(samples, scores, context())
    assert rows.weight.tolist() == [1, 1, 0, 0, 1, 1] + [1] * 6
    assert rows.clean.isfinite().all(), "0 times NaN is NaN"
    assert rows.advantage[2:4].tolist() == [0, 0]
    assert rows.advantage[0] < 0 < rows.advantage[4]
    assert rows.advantage[0] == pytest.approx(-float(rows.advantage[4]), abs=1e-6)
    assert rows.advantage[6:].tolist() == [0] * 6, "a group of equal rewards says nothing"


def test_advantages_are_clipped(samples_of: Callable[..., Samples], context: MakeContext) -> None:
    algorithm = AWM(draws=1, advantage="no_std", advantage_clip=0.3)
    rows = algorithm.rows(finished(samples_of, 3), scores_of([0.0, 0.5, 1.0]), context())
    assert rows.advantage.tolist() == pytest.approx([-0.3, 0.0, 0.3], abs=1e-6)


def test_what_sampling_is_asked_for(context: MakeContext) -> None:
    assert AWM().plan(context()) == Plan(policy_set="old", solver="dpm")
    assert AWM(solver="euler").plan(context()).solver == "euler"
    assert AWM(draws=3).needs() == Needs(group=2, rows=3, advantage=True, old=True)
    assert AWM(kl=0.1).needs().reference


# ---- together --------------------------------------------------------------------------------------------------------


def stepped(policy: Policy, algorithm: AWM, context: Context, prompts: PromptBatch = PROMPTS) -> NoisedRows:
    """Half a training step, rewarded by the mean of the first channel."""
    samples = Local(steps=6).start(policy, Processes()).collect(prompts, algorithm.plan(context), context)
    return algorithm.rows(samples, scores_of(samples.latents[:, 0].mean((1, 2)).tolist()), context)


@pytest.mark.parametrize("weighting", ["none", "ghuber"])
def test_the_ratio_is_1_to_the_bit_before_an_update(toy_policy: Policy, context: MakeContext, weighting: Any) -> None:
    toy_policy.keep("old")
    algorithm = AWM(weighting=weighting)
    learner = Learner(toy_policy, LearnerOptions(lr=1e-2, batch=24), Processes())
    for step in range(2):  # after the first step too, since `old` is refreshed
        rows = stepped(toy_policy, algorithm, context(step))
        assert algorithm.loss(toy_policy.models, rows).metrics["ratio/deviation"].max() == 0
        learner.step(algorithm.loss, toy_policy.models, rows)
        assert algorithm.loss(toy_policy.models, rows).metrics["ratio/deviation"].min() > 0
        algorithm.after(toy_policy, context(step))
        kept = toy_policy.sets["old"]
        assert all(torch.equal(kept[name], tensor) for name, tensor in toy_policy.trainable.items())
        assert all(kept[name].data_ptr() != tensor.data_ptr() for name, tensor in toy_policy.trainable.items())


@pytest.mark.parametrize("options", [{}, {"weighting": "ghuber"}, {"sigmas": "uniform", "clip": 0.05}])
def test_the_reward_rises(toy_policy: Policy, context: MakeContext, options: Mapping[str, Any]) -> None:
    toy_policy.keep("old")
    algorithm = AWM(**options)
    prompts = replace(PROMPTS, group=16)
    rollout = Local(steps=6).start(toy_policy, Processes())

    def reward() -> float:
        return float(rollout.collect(prompts, Plan(), context(1000)).latents[:, 0].mean())

    before = reward()
    learner = Learner(toy_policy, LearnerOptions(lr=3e-3, batch=64), Processes())
    for step in range(12):
        for batch in stepped(toy_policy, algorithm, context(step), prompts).batches(64, context(step)):
            learner.step(algorithm.loss, toy_policy.models, batch)
        algorithm.after(toy_policy, context(step))
    assert reward() > before + 0.1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"clip": 0.0}, "clip must be above 0 and at most 1, not 0.0"),
        ({"clip": 1.5}, "clip must be above 0 and at most 1, not 1.5"),
        ({"draws": 0}, "draws must be 1 or more, not 0"),
        ({"power": 0.0}, "power must be above 0 and at most 1, which is the squared error, not 0.0"),
        ({"advantage_clip": 0.0}, "advantage_clip must be above 0, not 0.0"),
        ({"kl": -0.1}, "kl must be 0 or more, not -0.1"),
    ],
)
def test_option_errors(options: Mapping[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AWM(**options)
