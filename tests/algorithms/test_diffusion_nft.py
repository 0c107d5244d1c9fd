"""DiffusionNFT: closed-form gradients and optima, rows that do not depend on processes, and how `old` follows."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from making import models_of, normal, scores_of
from torch import Tensor

from rlkit.algorithms.diffusion_nft import DiffusionNFT
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.learner import Learner, LearnerOptions
from rlkit.policy import Policy
from rlkit.rollouts.local import Local
from rlkit.types import Context, Needs, NoisedRows, Plan, Prompt, Samples
from rlkit.weights import Lora

MakeContext = Callable[..., Context]
PROMPTS = PromptBatch((Prompt(0, "a red circle"), Prompt(1, "two blue crosses")), group=3)
D = 4 * 2 * 2


def rows_of(advantage: Tensor, seed: int = 0) -> NoisedRows:
    n = len(advantage)
    clean, noise = normal(n, 4, 2, 2, seed=seed), normal(n, 4, 2, 2, seed=seed + 1)
    sigma = torch.linspace(0.1, 1.0, n, dtype=torch.float64)
    weight = torch.ones(n, dtype=torch.float64)
    return NoisedRows(torch.arange(n), clean, noise, sigma, advantage.double(), weight, ("",) * n)


def advantage_of(r: Tensor) -> Tensor:
    return 5 * (2 * r - 1)


def gradient(algorithm: DiffusionNFT, rows: NoisedRows, v: Tensor, v_old: Tensor) -> Tensor:
    """Of the sum over rows, with respect to v: each row its own. [B, C, H, W]"""
    v = v.clone().requires_grad_()
    value, weight = algorithm.loss(models_of(v, v_old), rows).terms["policy"]
    (found,) = torch.autograd.grad((value * weight).sum(), v)
    return found


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


R = torch.tensor([0.0, 0.2, 0.5, 0.75, 1.0], dtype=torch.float64)
ROWS = rows_of(advantage_of(R))
TARGET = ROWS.noise - ROWS.clean
V_OLD = normal(5, 4, 2, 2, seed=7)


# ---- the loss, row by row --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_the_paper_form_has_its_gradient_at_old_and_its_zero(beta: float) -> None:
    algorithm = DiffusionNFT(space="v", beta=beta)
    at_old = gradient(algorithm, ROWS, V_OLD, V_OLD)
    torch.testing.assert_close(at_old, 2 * beta * column(2 * R - 1) * (V_OLD - TARGET) / D)
    best = V_OLD + column(2 * R - 1) * (TARGET - V_OLD) / beta
    assert gradient(algorithm, ROWS, best, V_OLD).abs().max() < 1e-12
    beside = best + 0.1 * normal(5, 4, 2, 2, seed=9)
    there, here = (algorithm.loss(models_of(v, V_OLD), ROWS).terms["policy"][0] for v in (beside, best))
    assert (there > here).all(), "a minimum"


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_the_reference_code_form_has_a_first_gradient_without_beta(beta: float) -> None:
    found = gradient(DiffusionNFT(space="x0", beta=beta), ROWS, V_OLD, V_OLD)
    error = V_OLD - TARGET
    scale = column(error.abs().mean((1, 2, 3)))
    torch.testing.assert_close(found, 2 * column(ROWS.sigma * ROWS.advantage) * error / (D * scale))


def test_self_normalisation_is_a_scale_and_not_a_path_of_the_gradient() -> None:
    beta, v = 0.5, normal(5, 4, 2, 2, seed=3)
    found = gradient(DiffusionNFT(space="x0", beta=beta), ROWS, v, V_OLD)
    expected = torch.zeros_like(v)
    for sign, share in ((1, R), (-1, 1 - R)):
        error = column(ROWS.sigma) * (V_OLD + sign * beta * (v - V_OLD) - TARGET)
        scale = column(error.abs().mean((1, 2, 3)))
        expected += sign * column(share * ROWS.sigma) * 2 * beta * error / (D * scale)
    torch.testing.assert_close(found, expected * 5 / beta)


def test_a_perfect_prediction_is_not_divided_by_nothing() -> None:
    rows = replace(ROWS, advantage=torch.full_like(R, 5.0))  # r = 1: v+ alone
    assert gradient(DiffusionNFT(), rows, TARGET, TARGET).abs().max() == 0
    nearly = TARGET + 1e-7
    expected = column(rows.sigma**2) * 2 * 1e-7 / (D * 1e-5) * 5  # over the floor, not over the error
    torch.testing.assert_close(
        gradient(DiffusionNFT(), rows, nearly, nearly), expected.expand_as(nearly), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("space", ["x0", "v"])
def test_a_neutral_sample_holds_the_policy_where_it_is(space: Any) -> None:
    rows = replace(ROWS, advantage=torch.zeros_like(R))
    algorithm = DiffusionNFT(space=space)
    assert gradient(algorithm, rows, V_OLD, V_OLD).abs().max() == 0
    away = normal(5, 4, 2, 2, seed=4)
    pull = gradient(replace(algorithm, space="v"), rows, V_OLD + away, V_OLD)
    torch.testing.assert_close(
        pull, 2 * away / D, msg="back to old: without the negative branch it would be v - target"
    )


def test_the_optimality_map() -> None:
    r = DiffusionNFT().optimality(torch.tensor([-5.0, 0.0, 2.5, 5.0, 9.0]))
    assert r.tolist() == [0, 0.5, 0.75, 1, 1]
    assert DiffusionNFT(advantage_clip=2.0).optimality(torch.tensor([-1.0])).tolist() == [0.25]


def test_both_policies_are_asked_at_the_noised_sample() -> None:
    models = models_of(V_OLD, V_OLD)
    DiffusionNFT().loss(models, ROWS)
    x = column(1 - ROWS.sigma) * ROWS.clean + column(ROWS.sigma) * ROWS.noise
    for asked in (models.current.asked, models.old.asked):
        torch.testing.assert_close(asked[0], x)
        assert torch.equal(asked[1], ROWS.sigma)


def test_metrics_say_how_the_branches_stand_and_how_far_old_is() -> None:
    v = V_OLD + 0.5
    metrics = DiffusionNFT(space="v", beta=2.0).loss(models_of(v, V_OLD), ROWS).metrics
    torch.testing.assert_close(metrics["optimality"], R)
    torch.testing.assert_close(metrics["loss_positive"], (V_OLD + 1 - TARGET).square().mean((1, 2, 3)))
    torch.testing.assert_close(metrics["loss_negative"], (V_OLD - 1 - TARGET).square().mean((1, 2, 3)))
    torch.testing.assert_close(metrics["old/distance"], torch.full_like(R, 0.25))


def test_the_gradient_stops_at_old_and_the_reference() -> None:
    v, v_old, v_reference = (normal(5, 4, 2, 2, seed=s).requires_grad_() for s in (1, 2, 3))
    terms = DiffusionNFT(kl=0.1).loss(models_of(v, v_old, v_reference), ROWS).terms
    assert set(terms) == {"policy", "kl"}
    sum((value * weight).sum() for value, weight in terms.values()).backward()  # type: ignore[union-attr]
    assert v.grad is not None
    assert v_old.grad is None
    assert v_reference.grad is None


def test_the_kl_is_a_path_of_the_gradient() -> None:  # computed without one it would be logged, and pull nothing
    v, v_reference = normal(5, 4, 2, 2, seed=1).requires_grad_(), normal(5, 4, 2, 2, seed=3)
    result = DiffusionNFT(kl=0.3).loss(models_of(v, V_OLD, v_reference), ROWS)
    value, weight = result.terms["kl"]
    assert weight is result.terms["policy"][1], "one normaliser, one accumulator"
    (found,) = torch.autograd.grad(value.sum(), v)
    torch.testing.assert_close(found, 0.3 * 2 * (v.detach() - v_reference) / D)
    torch.testing.assert_close(result.metrics["kl"], value.detach() / 0.3)


# ---- the population --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_population_optimum_is_the_guided_velocity(beta: float, sigma: float) -> None:
    """Good samples are those at 2, bad ones those at -2. The expectation over what a state x may come from is exact:
    the posterior of a component is Gaussian, and two nodes integrate a quadratic."""
    x = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    spread = 0.25
    variance = (1 - sigma) ** 2 * spread + sigma**2
    clean, noise, odds = [], [], []
    for centre, share in ((2.0, 0.7), (-2.0, 0.3)):
        mean = centre + (1 - sigma) * spread / variance * (x - (1 - sigma) * centre)
        deviation = math.sqrt(spread * sigma**2 / variance)
        nodes = torch.stack([mean - deviation, mean + deviation])  # [2, X]
        clean.append(nodes)
        noise.append((x - (1 - sigma) * nodes) / sigma)
        odds.append(share * torch.exp(-((x - (1 - sigma) * centre) ** 2) / (2 * variance)))
    nodes, noises = torch.stack(clean), torch.stack(noise)  # [2 components, 2 nodes, X]
    posterior = torch.stack(odds) / sum(odds)  # [2, X]
    v_good, v_bad = (noises - nodes).mean(dim=1)  # [X] each
    v_old = posterior[0] * v_good + posterior[1] * v_bad
    delta = posterior[0] * (v_good - v_old)
    torch.testing.assert_close(delta, posterior[1] * (v_old - v_bad))

    rows = NoisedRows(
        row=torch.arange(nodes.numel()),
        clean=nodes.reshape(-1, 1, 1, 1),
        noise=noises.reshape(-1, 1, 1, 1),
        sigma=torch.full((nodes.numel(),), sigma, dtype=torch.float64),
        advantage=torch.tensor([5.0, -5.0], dtype=torch.float64).repeat_interleave(2 * len(x)),
        weight=(posterior[:, None] / 2).expand(2, 2, len(x)).flatten(),
        cond=("",) * nodes.numel(),
    )
    algorithm = DiffusionNFT(space="v", beta=beta)

    def pull(v: Tensor) -> Tensor:  # [X]
        v = v.clone().requires_grad_()
        models = models_of(v.repeat(4).reshape(-1, 1, 1, 1), v_old.repeat(4).reshape(-1, 1, 1, 1))
        value, weight = algorithm.loss(models, rows).terms["policy"]
        return torch.autograd.grad((value * weight).sum(), v)[0]

    assert pull(v_old + 2 / beta * delta).abs().max() < 1e-11
    torch.testing.assert_close(pull(v_old), -4 * beta * delta)
    if sigma < 1:  # there nothing tells good from bad, but their shares
        assert delta.max() > 2 * delta.min()


# ---- rows ------------------------------------------------------------------------------------------------------------


def finished(samples_of: Callable[..., Samples], n: int = 4, group: int = 2) -> Samples:
    samples = samples_of([f"prompt {i // group}" for i in range(n)], group)
    latents = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 4, 2, 2).clone()
    return replace(samples, latents=latents, sigmas=torch.tensor([1.0, 0.8, 0.5, 0.0]))


def test_rows_unroll_samples_then_draws(samples_of: Callable[..., Samples], context: MakeContext) -> None:
    samples = finished(samples_of)
    rows = DiffusionNFT(draws=3, advantage="no_std").rows(samples, scores_of([0.0, 1.0, 0.5, 0.1]), context())
    assert rows.row.tolist() == list(range(12))
    assert rows.weight.tolist() == [1.0] * 12
    for index in range(4):
        mine = slice(index * 3, index * 3 + 3)
        assert rows.clean[mine].unique().tolist() == [index]
        assert sorted(rows.sigma[mine].tolist(), reverse=True) == samples.sigmas[:-1].tolist()  # type: ignore[index]
        assert set(rows.cond[mine]) == {f"prompt {index // 2}"}
        assert rows.advantage[mine].tolist() == pytest.approx([[-0.5, 0.5, 0.2, -0.2][index]] * 3)
    assert len(set(rows.noise[:, 0, 0, 0].tolist())) == 12, "each row has noise of its own"


def test_rows_do_not_depend_on_which_process_holds_a_sample(
    samples_of: Callable[..., Samples], context: MakeContext
) -> None:
    samples, values = finished(samples_of, n=6, group=3), [0.0, 1.0, 0.5, 0.1, 0.9, 0.2]
    algorithm = DiffusionNFT(draws=2, sigmas="uniform")
    whole = algorithm.rows(samples, scores_of(values), context(3))
    assert len(set(whole.sigma.tolist())) == len(whole), "no two samples share their draws"
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
    none = torch.tensor([], dtype=torch.int64)
    empty = algorithm.rows(samples.select(none), scores_of([]), context(3, gather=gather))
    assert (len(empty), empty.clean.shape) == (0, (0, 4, 2, 2))


@pytest.mark.parametrize("advantage", ["global_norm", "group_norm", "no_std", "leave_one_out", "gdpo"])
def test_unscored_samples_weigh_nothing_and_shift_nobody(
    samples_of: Callable[..., Samples], context: MakeContext, advantage: Any
) -> None:
    samples = finished(samples_of, n=6, group=3)
    samples.latents[1] = torch.nan  # it overflowed, which is why it was not scored
    scores = scores_of([0.0, 9.0, 1.0, 0.3, 0.3, 0.3], [True, False, True] + [True] * 3)
    rows = DiffusionNFT(draws=2, advantage=advantage).rows(samples, scores, context())
    assert rows.weight.tolist() == [1, 1, 0, 0, 1, 1] + [1] * 6
    assert rows.clean.isfinite().all(), "0 times NaN is NaN"
    assert rows.advantage[2:4].tolist() == [0, 0]
    assert rows.advantage[0] < 0 < rows.advantage[4]
    assert rows.advantage[0] == pytest.approx(-float(rows.advantage[4]), abs=1e-6)
    assert rows.advantage[6:].tolist() == [0] * 6, "a group of equal rewards says nothing"


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [-0.5, -0.2, 0.0, 0.5]),
        ("positive_only", [0.0, 0.0, 0.0, 0.5]),
        ("negative_only", [-0.5, -0.2, 0.0, 0.0]),
        ("one_only", [0.0, 0.0, 0.0, 1.0]),
        ("binary", [-1.0, -1.0, 0.0, 1.0]),
    ],
)
def test_advantages_are_clipped_then_chosen(
    samples_of: Callable[..., Samples], context: MakeContext, mode: Any, expected: list[float]
) -> None:
    samples, scores = finished(samples_of, n=4, group=4), scores_of([0.0, 0.8, 1.0, 2.2])  # mean 1
    algorithm = DiffusionNFT(draws=1, advantage="no_std", advantage_clip=0.5, advantage_mode=mode)
    found = algorithm.rows(samples, scores, context()).advantage.tolist()
    assert found == pytest.approx(expected, abs=1e-6), "the third is the mean but for rounding, and has no sign"


def test_what_sampling_is_asked_for(context: MakeContext) -> None:
    assert DiffusionNFT().plan(context()) == Plan(policy_set="old", solver="dpm")
    assert DiffusionNFT(solver="euler").plan(context()).solver == "euler"
    assert DiffusionNFT(draws=3).needs() == Needs(group=2, rows=3, advantage=True, old=True)
    assert DiffusionNFT(kl=0.1).needs().reference


# ---- old -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "steps", "kept"),
    [
        ("copy", [0, 1, 500], [0, 0, 0]),
        ("slow", [0, 100, 500, 1000], [0, 0.1, 0.5, 0.5]),
        ("late", [74, 75, 100, 208, 209, 5000], [0, 0, 0.1875, 0.9975, 0.999, 0.999]),
    ],
)
def test_decay_schedules(schedule: Any, steps: list[int], kept: list[float]) -> None:
    assert [DiffusionNFT(old_decay=schedule).decay(step) for step in steps] == pytest.approx(kept, abs=1e-12)


def test_a_schedule_may_have_other_numbers() -> None:
    algorithm = DiffusionNFT(old_decay="slow", old_decay_rate=1.0, old_decay_most=0.25)
    assert [algorithm.decay(step) for step in (0, 1, 9)] == [0, 0.25, 0.25]


def updated(policy: Policy, by: float = 0.01) -> None:
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(by)


def test_old_is_a_copy_after_every_step_and_no_alias(toy_policy: Policy, context: MakeContext) -> None:
    toy_policy.keep("old")
    toy_policy.keep("ema")  # the average that is evaluated is another set
    average = {name: tensor.clone() for name, tensor in toy_policy.sets["ema"].items()}
    for step in range(3):
        for name, tensor in toy_policy.trainable.items():
            assert torch.equal(toy_policy.sets["old"][name], tensor)
        updated(toy_policy)
        assert all(not torch.equal(toy_policy.sets["old"][n], t) for n, t in toy_policy.trainable.items())
        DiffusionNFT().after(toy_policy, context(step))
    assert all(torch.equal(toy_policy.sets["ema"][name], tensor) for name, tensor in average.items())


def test_old_keeps_the_share_of_the_schedule(toy_policy: Policy, context: MakeContext) -> None:
    toy_policy.keep("old")
    before = {name: tensor.clone() for name, tensor in toy_policy.sets["old"].items()}
    updated(toy_policy)
    DiffusionNFT(old_decay="slow").after(toy_policy, context(99))  # the 100th step: 0.1
    for name, tensor in toy_policy.trainable.items():
        torch.testing.assert_close(toy_policy.sets["old"][name], 0.1 * before[name] + 0.9 * tensor.detach())


def test_lora_factors_are_averaged_and_not_their_product(tiny: Callable[..., Policy], context: MakeContext) -> None:
    policy = tiny(Lora(rank=2))
    updated(policy, 0.1)  # LoRA starts with B = 0
    policy.keep("old")
    before = {name: tensor.clone() for name, tensor in policy.sets["old"].items()}
    updated(policy, 0.3)
    DiffusionNFT(old_decay="slow", old_decay_rate=0.5).after(policy, context(0))
    name = next(name for name in policy.trainable if "lora_A" in name)
    other = name.replace("lora_A", "lora_B")
    product = {
        "of means": policy.sets["old"][other] @ policy.sets["old"][name],
        "before": before[other] @ before[name],
        "now": (policy.trainable[other] @ policy.trainable[name]).detach(),
    }
    for one in (name, other):
        torch.testing.assert_close(policy.sets["old"][one], (before[one] + policy.trainable[one].detach()) / 2)
    gap = product["of means"] - (product["before"] + product["now"]) / 2
    torch.testing.assert_close(gap, torch.full_like(gap, -2 * 0.15**2), rtol=1e-3, atol=1e-5)


# ---- together --------------------------------------------------------------------------------------------------------


def stepped(policy: Policy, algorithm: DiffusionNFT, context: Context, prompts: PromptBatch = PROMPTS) -> NoisedRows:
    """Half a training step, rewarded by the mean of the first channel."""
    samples = Local(steps=6).start(policy, Processes()).collect(prompts, algorithm.plan(context), context)
    return algorithm.rows(samples, scores_of(samples.latents[:, 0].mean((1, 2)).tolist()), context)


def test_old_and_current_agree_to_the_bit_before_an_update(toy_policy: Policy, context: MakeContext) -> None:
    toy_policy.keep("old")
    algorithm = DiffusionNFT(draws=2)
    rows = stepped(toy_policy, algorithm, context())
    assert algorithm.loss(toy_policy.models, rows).metrics["old/distance"].max() == 0
    updated(toy_policy)
    assert algorithm.loss(toy_policy.models, rows).metrics["old/distance"].min() > 0


def test_a_real_step_leaves_old_and_the_reference_alone(toy_policy: Policy, context: MakeContext) -> None:
    toy_policy.keep("old")
    toy_policy.keep("reference")
    kept = {name: {k: t.clone() for k, t in toy_policy.sets[name].items()} for name in ("old", "reference")}
    algorithm = DiffusionNFT(draws=2, kl=0.1)
    rows = stepped(toy_policy, algorithm, context())
    learner = Learner(toy_policy, LearnerOptions(lr=1e-2, batch=len(rows)), Processes())
    learner.step(algorithm.loss, toy_policy.models, rows)
    for name, tensors in kept.items():
        for key, tensor in tensors.items():
            assert torch.equal(toy_policy.sets[name][key], tensor)
            assert not torch.equal(toy_policy.trainable[key], tensor)


@pytest.mark.parametrize(
    ("options", "gain"),
    [
        ({}, 0.1),
        ({"space": "v"}, 0.1),
        ({"old_decay": "slow", "old_decay_rate": 0.1}, 0.02),  # `old`, and what may be gained beyond it, lags behind
    ],
)
def test_the_reward_rises(toy_policy: Policy, context: MakeContext, options: Mapping[str, Any], gain: float) -> None:
    toy_policy.keep("old")
    algorithm = DiffusionNFT(draws=4, **options)
    prompts = replace(PROMPTS, group=16)
    rollout = Local(steps=6).start(toy_policy, Processes())

    def reward() -> float:
        return float(rollout.collect(prompts, Plan(), context(1000)).latents[:, 0].mean())

    before = reward()
    learner = Learner(toy_policy, LearnerOptions(lr=3e-3, batch=128), Processes())
    for step in range(12):
        for batch in stepped(toy_policy, algorithm, context(step), prompts).batches(128, context(step)):
            learner.step(algorithm.loss, toy_policy.models, batch)
        algorithm.after(toy_policy, context(step))
    assert reward() > before + gain


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"beta": 0.0}, "beta must be above 0, not 0.0"),
        ({"draws": 0}, "draws must be 1 or more, not 0"),
        ({"advantage_clip": -1.0}, "advantage_clip must be above 0, not -1.0"),
        ({"kl": -0.1}, "kl must be 0 or more, not -0.1"),
        ({"old_decay_rate": 0.1}, "old_decay: copy keeps nothing of `old`: use slow or late"),
        ({"old_decay": "slow", "old_decay_rate": 0.0}, "old_decay_rate must be above 0, not 0.0"),
        ({"old_decay": "late", "old_decay_most": 1.0}, r"old_decay_most must be within \[0, 1\), not 1.0"),
    ],
)
def test_option_errors(options: Mapping[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DiffusionNFT(**options)
