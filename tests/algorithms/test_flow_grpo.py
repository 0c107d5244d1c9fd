"""Flow-GRPO: windows, rows, and a loss whose first step is REINFORCE."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from making import scores_of
from torch import Tensor

from rlkit import flow
from rlkit.algorithms.flow_grpo import FlowGRPO
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.learner import Learner, LearnerOptions
from rlkit.policy import Policy
from rlkit.rollouts.local import Local
from rlkit.types import Context, FlowRows, Needs, Path, Prompt, Samples

MakeContext = Callable[..., Context]
PROMPTS = PromptBatch((Prompt(0, "a red circle"), Prompt(1, "two blue crosses")), group=3)


def path_samples(samples_of: Callable[..., Samples], n: int, k: int, group: int = 2, first: int = 0) -> Samples:
    """Samples first .. first + n whose states say which sample and step they belong to."""
    whole = samples_of([f"prompt {i // group}" for i in range(first + n)], group)
    samples = whole.select(torch.arange(first, first + n))
    states = (torch.arange(first, first + n)[:, None] * 10.0 + torch.arange(k + 1))[:, :, None, None, None]
    states = states.expand(n, k + 1, 4, 2, 2).contiguous()
    steps = torch.arange(1, 1 + k)
    log_prob = states[:, :-1, 0, 0, 0] + 0.5
    path = Path(states, states[:, :-1], log_prob, torch.linspace(0.9, 0.1, k + 1), torch.full((k,), 0.7), steps, 0.95)
    return replace(samples, path=path)


def rolled(policy: Policy, algorithm: FlowGRPO, context: Context) -> tuple[Samples, FlowRows]:
    samples = Local(steps=6).start(policy, Processes()).collect(PROMPTS, algorithm.plan(context), context)
    rewards = scores_of([0.0, 0.4, 1.0, 0.3, 0.1, 0.0])
    return samples, algorithm.rows(samples, rewards, context)


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_the_window_lies_within_the_schedule_and_takes_every_start(context: MakeContext) -> None:
    algorithm = FlowGRPO(window=2, window_start=(1, 4))
    windows = [algorithm.plan(context(step)).window for step in range(100)]
    assert {window[0] for window in windows if window} == {1, 2, 3, 4}
    assert {window[1] for window in windows if window} == {2}
    assert windows[:20] != [algorithm.plan(context(step, seed=1)).window for step in range(20)]


def test_the_window_is_drawn_from_the_step_and_not_by_the_process(context: MakeContext) -> None:
    algorithm = FlowGRPO(window=2, window_start=(0, 4))
    first = [algorithm.plan(context(step)) for step in range(10)]
    torch.manual_seed(7)  # another process: another global generator, and it joins at another step
    torch.rand(5)
    assert [algorithm.plan(context(step)) for step in reversed(range(10))] == first[::-1]


@pytest.mark.parametrize("steps", [2, 6, 10])
def test_without_a_window_every_step_but_the_last_is_stochastic(context: MakeContext, steps: int) -> None:
    assert FlowGRPO().plan(context(sampling_steps=steps)).window == (0, steps - 1)


def test_the_plan_passes_the_options_on_and_needs_say_what_they_cost(context: MakeContext) -> None:
    algorithm = FlowGRPO(dynamics="cps", noise_level=0.5, window=3, window_start=(2, 4), shared_noise=True, kl=0.1)
    plan = algorithm.plan(context())
    assert (plan.dynamics, plan.noise_level, plan.shared_noise, plan.record) == ("cps", 0.5, True, True)
    assert algorithm.needs() == Needs(
        path=True, log_prob=True, group=2, window=3, last_start=4, advantage=True, reference=True
    )
    assert not FlowGRPO().needs().reference


def test_a_sliding_window_moves_on_and_begins_again(context: MakeContext) -> None:
    # Guards MixGRPO's empty window: past its last start it rolls back, and is as long as ever.
    algorithm = FlowGRPO(window=2, window_start=(1, 3), window_moves="slide", window_every=5)
    windows = [algorithm.plan(context(step)).window for step in range(20)]
    assert windows == [(1, 2)] * 5 + [(2, 2)] * 5 + [(3, 2)] * 5 + [(1, 2)] * 5
    wide = FlowGRPO(window=2, window_start=(0, 4), window_moves="slide", window_every=1, window_stride=2)
    assert [wide.plan(context(step)).window[0] for step in range(4)] == [0, 2, 4, 1]  # type: ignore[index]


def test_a_tail_takes_the_second_order_solver(context: MakeContext) -> None:
    plan = FlowGRPO(window=2, tail=3).plan(context())
    assert (plan.tail, plan.solver) == (3, "dpm")
    assert FlowGRPO(window=2).plan(context()).solver == "euler"


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_unroll_samples_then_steps(samples_of: Callable[..., Samples], context: MakeContext) -> None:
    samples = path_samples(samples_of, n=4, k=3)
    rows = FlowGRPO(advantage="no_std").rows(samples, scores_of([0.0, 1.0, 0.5, 0.1]), context())
    assert rows.row.tolist() == list(range(12))
    for index in range(4):
        for step in range(3):
            at = index * 3 + step
            assert rows.x[at].unique().tolist() == [index * 10 + step]
            assert rows.x_next[at].unique().tolist() == [index * 10 + step + 1]
            assert rows.old_log_prob[at] == index * 10 + step + 0.5
            assert rows.cond[at] == f"prompt {index // 2}"
            assert rows.sigma[at] == samples.path.sigmas[step]  # type: ignore[union-attr]
            assert rows.sigma_next[at] == samples.path.sigmas[step + 1]  # type: ignore[union-attr]
            assert rows.advantage[at] == pytest.approx([-0.5, 0.5, 0.2, -0.2][index])
    assert rows.weight.tolist() == [1.0] * 12
    assert rows.sigma_max == pytest.approx(0.95)


def test_advantages_come_from_all_processes(samples_of: Callable[..., Samples], context: MakeContext) -> None:
    # This process holds samples 1 and 2 of 4: one of each group, so alone neither would have an advantage.
    samples, scores = path_samples(samples_of, n=2, k=2, first=1), scores_of([1.0, 0.5])
    assert samples.index.tolist() == [1, 2]
    everyone = {
        2: torch.tensor([0, 0, 1, 1]),
        1: torch.tensor([0.0, 1.0, 0.5, 0.1]),
        0: torch.ones(4, dtype=torch.bool),
    }

    def gather(values: Tensor) -> Tensor:
        kind = 2 if values.dtype == torch.int64 else 0 if values.dtype == torch.bool else 1
        assert torch.equal(everyone[kind][1:3], values)
        return everyone[kind]

    rows = FlowGRPO(advantage="no_std").rows(samples, scores, context(gather=gather))
    assert rows.row.tolist() == [2, 3, 4, 5]
    assert rows.advantage.tolist() == pytest.approx([0.5, 0.5, 0.2, 0.2])


@pytest.mark.parametrize("advantage", ["group_norm", "global_norm", "no_std", "leave_one_out", "gdpo"])
def test_unscored_samples_weigh_nothing_and_shift_nobody(
    samples_of: Callable[..., Samples], context: MakeContext, advantage: Any
) -> None:
    algorithm = FlowGRPO(advantage=advantage)
    samples = path_samples(samples_of, n=6, k=2, group=3)
    rows = algorithm.rows(
        samples, scores_of([0.0, 9.0, 1.0, 0.3, 0.3, 0.3], [True, False, True] + [True] * 3), context()
    )
    assert rows.weight.tolist() == [1, 1, 0, 0, 1, 1] + [1] * 6
    assert rows.advantage[2:4].tolist() == [0, 0]
    assert rows.advantage[:2].sum() == pytest.approx(-float(rows.advantage[4:6].sum()), abs=1e-6)
    assert rows.advantage[0] < 0
    assert rows.advantage[6:].tolist() == [0] * 6, "a group of equal rewards says nothing"


def test_a_state_that_overflowed_does_not_reach_the_gradient(toy_policy: Policy, context: MakeContext) -> None:
    algorithm, at = FlowGRPO(window=2, kl=0.1), context()
    toy_policy.keep("reference")
    samples, _ = rolled(toy_policy, algorithm, at)
    assert samples.path is not None
    samples.path.states[1, 1:] = torch.nan
    samples.path.log_prob[1] = torch.nan
    rows = algorithm.rows(samples, scores_of([0.0, 9.0, 1.0, 0.3, 0.1, 0.0], [True, False] + [True] * 4), at)
    gradient = gradient_of(toy_policy, algorithm, rows)
    assert gradient.isfinite().all()
    assert gradient.norm() > 0
    kept = torch.nonzero(rows.weight).flatten()
    torch.testing.assert_close(gradient, gradient_of(toy_policy, algorithm, rows.select(kept)), rtol=1e-5, atol=1e-8)


def test_advantages_are_clipped(samples_of: Callable[..., Samples], context: MakeContext) -> None:
    samples, scores = path_samples(samples_of, n=4, k=1, group=4), scores_of([0.0, 0.0, 0.0, 1.0])
    free = FlowGRPO().rows(samples, scores, context()).advantage
    assert free.max() == pytest.approx(3**0.5, rel=1e-3)
    held = FlowGRPO(advantage_clip=0.5).rows(samples, scores, context()).advantage
    assert held.tolist() == pytest.approx([-0.5, -0.5, -0.5, 0.5])


def test_a_fraction_of_the_steps_is_trained_on_the_same_for_all(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = FlowGRPO(train_fraction=0.6)  # of 5 recorded steps
    chosen = set()
    for step in range(12):
        samples, rows = rolled(toy_policy, algorithm, context(step))
        assert samples.path is not None
        steps = rows.decision.reshape(6, 3)
        assert (steps == steps[0]).all()
        assert len(set(steps[0].tolist())) == 3
        assert rows.row.tolist() == list(range(18))
        at = rows.decision.reshape(6, 3)[0]
        assert torch.equal(rows.x.unflatten(0, (6, 3)), samples.path.states[:, at])
        assert torch.equal(rows.x_next.unflatten(0, (6, 3)), samples.path.states[:, at + 1])
        assert torch.equal(rows.sigma.reshape(6, 3)[0], samples.path.sigmas[at])
        chosen.add(tuple(steps[0].tolist()))
    assert len(chosen) > 1, "drawn anew each step"


def test_noise_weights_are_1_in_the_mean_and_follow_the_std(toy_policy: Policy, context: MakeContext) -> None:
    weighted, plain = FlowGRPO(step_weight="noise", noise_level=0.5), FlowGRPO(noise_level=0.5)
    _, rows = rolled(toy_policy, weighted, context())
    _, equal = rolled(toy_policy, plain, context())
    ratio = (rows.advantage / equal.advantage).reshape(6, 5)
    sigmas = torch.linspace(1, 0, 7)
    scale = 0.5 * torch.sqrt(sigmas[:5] / (1 - torch.tensor([sigmas[1], *sigmas[1:5]]))) * (1 / 6) ** 0.5
    torch.testing.assert_close(ratio[0], scale / scale.mean(), rtol=1e-4, atol=1e-5)
    assert ratio[0].mean() == pytest.approx(1.0, rel=1e-4)


def test_samples_without_a_path_are_refused(samples_of: Callable[..., Samples], context: MakeContext) -> None:
    with pytest.raises(ValueError, match="carry no path: the plan must set record=True"):
        FlowGRPO().rows(samples_of(["a", "a"]), scores_of([0.0, 1.0]), context())


# ---- the loss --------------------------------------------------------------------------------------------------------


def gradient_of(policy: Policy, algorithm: FlowGRPO, rows: FlowRows) -> Tensor:
    learner = Learner(policy, LearnerOptions(lr=1.0, batch=len(rows)), Processes())
    learner.gradient(algorithm.loss, policy.models, rows)
    return torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None])


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
def test_the_first_step_is_reinforce(toy_policy: Policy, context: MakeContext, dynamics: Any) -> None:
    algorithm = FlowGRPO(dynamics=dynamics, noise_level=0.5, window=4)
    _, rows = rolled(toy_policy, algorithm, context())
    v = toy_policy.models.current.velocity(rows.x, rows.sigma, rows.cond)
    mean, std = flow.sde_step(rows.x, v, rows.sigma, rows.sigma_next, 0.5, dynamics, rows.sigma_max)
    reinforce = -(rows.advantage * flow.log_prob(rows.x_next, mean, std)).mean()
    expected = torch.autograd.grad(reinforce, list(toy_policy.trainable.values()), retain_graph=True)
    flat = torch.cat([part.flatten() for part in expected])
    found = gradient_of(toy_policy, algorithm, rows)
    assert flat.norm() > 1e-4
    assert (found - flat).norm() / flat.norm() < 1e-5

    # d log p / d mean = z / (D std): the chain rule by hand, one step further down.
    noise = (rows.x_next - mean.detach()) / std
    pull = (rows.advantage[:, None, None, None] * noise / (mean[0].numel() * std) * mean).flatten(1).sum(1).mean()
    by_hand = torch.cat([p.flatten() for p in torch.autograd.grad(-pull, list(toy_policy.trainable.values()))])
    assert (found - by_hand).norm() / flat.norm() < 1e-5


@pytest.mark.parametrize("kl_form", ["official", "exact", "v", "x"])
def test_the_kl_is_0_at_the_start_and_pulls_once_the_policy_has_moved(
    toy_policy: Policy, context: MakeContext, kl_form: Any
) -> None:
    plain, held = FlowGRPO(window=3), FlowGRPO(window=3, kl=0.5, kl_form=kl_form)
    toy_policy.keep("reference")
    _, rows = rolled(toy_policy, plain, context())
    start = held.loss(toy_policy.models, rows)
    assert start.metrics["kl"].abs().max() == 0
    torch.testing.assert_close(gradient_of(toy_policy, held, rows), gradient_of(toy_policy, plain, rows))

    with torch.no_grad():
        for parameter in toy_policy.trainable.values():
            parameter.add_(0.02)
    moved = held.loss(toy_policy.models, rows)
    assert moved.metrics["kl"].min() > 0
    torch.testing.assert_close(moved.terms["kl"][0].detach(), 0.5 * moved.metrics["kl"])
    # A KL computed without gradient would be logged, and pull nothing.
    free, pulled = gradient_of(toy_policy, plain, rows), gradient_of(toy_policy, held, rows)
    doubled = gradient_of(toy_policy, replace(held, kl=1.0), rows)
    pull = pulled - free
    assert pull.norm() > 1e-4 * free.norm()
    torch.testing.assert_close(doubled - free, 2 * pull, rtol=1e-3, atol=1e-6 * float(free.norm()))
    assert sum(float((p * step).sum()) for p, step in zip(
        pull.split([p.numel() for p in toy_policy.trainable.values()]),
        [torch.full((p.numel(),), 0.02) for p in toy_policy.trainable.values()],
        strict=True,
    )) > 0, "going further the way it went costs more"  # fmt: skip


@pytest.mark.parametrize(
    ("shift", "advantage", "alive"),
    [
        (0.01, 1.0, False),  # already likelier by more than the clip: no reward for more
        (0.01, -1.0, True),  # likelier although it was bad: pulled back
        (-0.01, -1.0, False),
        (-0.01, 1.0, True),
        (0.0005, 1.0, True),
        (-0.0005, -1.0, True),
    ],
)
def test_the_clip_stops_only_what_goes_too_far(
    toy_policy: Policy, context: MakeContext, shift: float, advantage: float, alive: bool
) -> None:
    algorithm = FlowGRPO(window=3, clip=1e-3)
    _, rows = rolled(toy_policy, algorithm, context())
    rows = replace(rows, old_log_prob=rows.old_log_prob - shift, advantage=torch.full_like(rows.advantage, advantage))
    assert (gradient_of(toy_policy, algorithm, rows).norm() > 0) == alive
    metrics = algorithm.loss(toy_policy.models, rows).metrics
    assert metrics["clip_fraction"].unique().tolist() == [float(abs(shift) > 1e-3)]
    torch.testing.assert_close(metrics["ratio/mean"], torch.full_like(rows.sigma, 1 + shift), rtol=0, atol=1e-4)
    assert not any(column.requires_grad for column in metrics.values())


def test_values_are_per_row(toy_policy: Policy, context: MakeContext) -> None:
    toy_policy.keep("reference")
    algorithm = FlowGRPO(window=3, kl=0.2)
    _, rows = rolled(toy_policy, algorithm, context())
    some = torch.tensor([11, 2, 7])
    whole, part = algorithm.loss(toy_policy.models, rows), algorithm.loss(toy_policy.models, rows.select(some))
    for name, (values, weight) in whole.terms.items():
        assert values.shape == weight.shape == rows.sigma.shape
        torch.testing.assert_close(part.terms[name][0], values[some], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"noise_level": 0.0}, "noise_level must be above 0, not 0.0: a noiseless step has no density"),
        ({"dynamics": "cps", "noise_level": 1.5}, "noise_level must be at most 1 with cps, not 1.5"),
        ({"clip": 0.0}, "clip must be above 0 and at most 1, not 0.0"),
        ({"clip": 1.5}, "clip must be above 0 and at most 1, not 1.5"),
        ({"advantage_clip": -1.0}, "advantage_clip must be above 0, not -1.0"),
        ({"window": 0}, "window must be 1 or more, not 0"),
        ({"window": 2, "window_start": (3, 1)}, r"window_start must be \[first, last\] with .*, not \[3, 1\]"),
        ({"window": 2, "window_start": (-1, 1)}, r"window_start must be .*, not \[-1, 1\]"),
        ({"kl": -0.1}, "kl must be 0 or more, not -0.1"),
    ],
)
def test_option_errors(options: Mapping[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FlowGRPO(**options)
