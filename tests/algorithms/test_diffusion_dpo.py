"""Diffusion-DPO: pairs that may lie on two processes, one sigma and noise a pair, and a loss with known values."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from making import scores_of
from torch import Tensor

from rlkit import flow
from rlkit.algorithms.diffusion_dpo import DiffusionDPO, PairRows
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.errors import RecipeError
from rlkit.learner import Learner, LearnerOptions
from rlkit.policy import Policy
from rlkit.rollouts.local import Local
from rlkit.types import Context, Needs, Prompt, Samples, Scores

MakeContext = Callable[..., Context]
MakeSamples = Callable[..., Samples]
PROMPTS = PromptBatch((Prompt(0, "a red circle"), Prompt(1, "two blue crosses"), Prompt(2, "a cyan square")), group=4)
REWARDS = [0.0, 0.4, 1.0, 0.3, 0.2, 0.1, 0.0, 0.9, 0.5, 0.1, 0.2, 0.3]


def numbered(samples_of: MakeSamples, n: int, group: int) -> Samples:
    """Samples whose latents are their index everywhere."""
    samples = samples_of([f"prompt {i // group}" for i in range(n)], group)
    return replace(samples, latents=torch.arange(float(n))[:, None, None, None].expand(n, 4, 2, 2).contiguous())


def numbers(latents: Tensor) -> list[float]:
    assert torch.equal(latents, latents[:, :1, :1, :1].expand_as(latents))
    return latents[:, 0, 0, 0].tolist()


def rolled(policy: Policy, algorithm: DiffusionDPO, context: Context) -> PairRows:
    """Rows of pictures that the policy drew; its reference is as it is now."""
    policy.keep("reference")
    samples = Local(steps=6).start(policy, Processes()).collect(PROMPTS, algorithm.plan(context), context)
    return algorithm.rows(samples, scores_of(REWARDS), context)


def gradient_of(policy: Policy, algorithm: DiffusionDPO, rows: PairRows) -> Tensor:
    learner = Learner(policy, LearnerOptions(lr=1.0, batch=len(rows)), Processes())
    learner.gradient(algorithm.loss, policy.models, rows)
    return torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None])


def nudge(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.mul_(1.05)


# ---- which pictures make a pair --------------------------------------------------------------------------------------


def test_the_best_of_each_group_against_its_worst(samples_of: MakeSamples, context: MakeContext) -> None:
    rows = DiffusionDPO(draws=2).rows(numbered(samples_of, 6, 3), scores_of([0.2, 0.9, 0.5, 0.4, 0.1, 0.8]), context())
    assert numbers(rows.winner) == [1, 1, 5, 5]
    assert numbers(rows.loser) == [0, 0, 4, 4]
    assert rows.row.tolist() == [0, 1, 2, 3]
    assert rows.weight.tolist() == [1, 1, 1, 1]
    assert rows.cond == ("prompt 0", "prompt 0", "prompt 1", "prompt 1")


def test_ties_and_narrow_pairs_are_dropped(samples_of: MakeSamples, context: MakeContext) -> None:
    # Group 1 is a tie; group 2 too, but for the last digit of a float32 sum, which a plain `>` would take for a choice.
    last = float(torch.nextafter(torch.tensor(0.7), torch.tensor(1.0)))
    scores = scores_of([0.0, 0.5, 0.3, 0.3, 0.7, last, 0.2, 0.3])
    samples = numbered(samples_of, 8, 2)
    rows = DiffusionDPO().rows(samples, scores, context())
    assert rows.weight.tolist() == [1, 0, 0, 1]
    assert DiffusionDPO(margin=0.2).rows(samples, scores, context()).weight.tolist() == [1, 0, 0, 0]
    assert DiffusionDPO(margin=0.5).rows(samples, scores, context()).weight.tolist() == [0, 0, 0, 0]
    assert rows.row.tolist() == [0, 1, 2, 3], "a step's rows are counted on, so a dropped pair keeps its row"


def test_what_was_not_scored_is_in_no_pair(samples_of: MakeSamples, context: MakeContext) -> None:
    samples = numbered(samples_of, 9, 3)
    valid = [True, False, True, False, True, False, False, False, False]
    scores = scores_of([0.4, 9.0, 0.1, 9.0, 0.5, -9.0, 0.1, 0.2, 0.3], valid)
    rows = DiffusionDPO().rows(samples, scores, context())
    assert rows.weight.tolist() == [1, 0, 0], "a pair needs two scored members"
    assert (numbers(rows.winner)[0], numbers(rows.loser)[0]) == (0, 2)


def test_a_dropped_picture_that_overflowed_does_not_reach_the_gradient(
    toy_policy: Policy, context: MakeContext
) -> None:
    algorithm = DiffusionDPO(beta=10)
    toy_policy.keep("reference")
    samples = Local(steps=6).start(toy_policy, Processes()).collect(PROMPTS, algorithm.plan(context()), context())
    samples.latents[4:8] = torch.nan
    rows = algorithm.rows(samples, scores_of(REWARDS, [True] * 4 + [False] * 4 + [True] * 4), context())
    gradient = gradient_of(toy_policy, algorithm, rows)
    assert gradient.isfinite().all()
    kept = gradient_of(toy_policy, algorithm, rows.select(torch.tensor([0, 2])))
    torch.testing.assert_close(gradient, kept, rtol=1e-4, atol=1e-7)
    assert gradient.norm() > 0


def test_pairs_of_a_data_set_are_its_own(samples_of: MakeSamples, context: MakeContext) -> None:
    samples = replace(numbered(samples_of, 4, 2), preference=torch.tensor([True, False, False, True]))
    unscored = scores_of([5.0, 5.0, 5.0, 5.0], [True, True, False, False])  # rewards have no say
    rows = DiffusionDPO(pairs="dataset").rows(samples, unscored, context())
    assert (numbers(rows.winner), numbers(rows.loser)) == ([0, 3], [1, 2])
    assert rows.weight.tolist() == [1, 1]


@pytest.mark.parametrize(("pairs", "found"), [("dataset", "come from the policy"), ("groups", "carry the choices of")])
def test_pairs_from_elsewhere_than_expected_are_refused(
    samples_of: MakeSamples, context: MakeContext, pairs: Any, found: str
) -> None:
    samples = samples_of(["a", "a"])
    if pairs == "groups":
        samples = replace(samples, preference=torch.tensor([True, False]))
    with pytest.raises(RecipeError, match=rf"^stages\.main\.algorithm\.pairs: pairs are '{pairs}', but .* {found}"):
        DiffusionDPO(pairs=pairs).rows(samples, scores_of([0.0, 1.0]), context())


def over_processes(
    algorithm: DiffusionDPO, samples: Samples, scores: Scores, context: Context, count: int
) -> list[PairRows]:
    """`rows` as `count` processes call it, each with its share and all meeting in every gather."""
    slots: list[Any] = [None] * count
    results: list[Any] = [None] * count
    meet = threading.Barrier(count, timeout=10)

    def work(rank: int) -> None:
        def gather(values: Tensor) -> Tensor:
            slots[rank] = values
            meet.wait()
            everything = torch.cat(slots)
            meet.wait()
            return everything

        share = torch.tensor(list(Processes(rank, count).share(len(samples))), dtype=torch.int64)
        mine = replace(scores, raw=scores.raw[share], valid=scores.valid[share])
        results[rank] = algorithm.rows(samples.select(share), mine, replace(context, gather=gather))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("pairs", ["groups", "dataset"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_pair_that_lies_on_two_processes_is_the_same_pair(
    samples_of: MakeSamples, context: MakeContext, count: int, pairs: Any
) -> None:
    group = 5 if pairs == "groups" else 2
    samples = numbered(samples_of, 5 * group, group)
    if pairs == "dataset":
        samples = replace(samples, preference=torch.arange(10) % 2 == 0)
    scores = scores_of([1.0 - 0.1 * (i % group) for i in range(5 * group)])  # first against last: as far as can be
    algorithm = DiffusionDPO(pairs=pairs, draws=2)
    whole = algorithm.rows(samples, scores, context(3))
    parts = over_processes(algorithm, samples, scores, context(3), count)
    assert len(parts) == count
    held = [int(n) for n in whole.winner[:, 0, 0, 0]], [int(n) for n in whole.loser[:, 0, 0, 0]]
    shares = [set(Processes(rank, count).share(len(samples))) for rank in range(count)]
    assert any(any(w in share and one not in share for share in shares) for w, one in zip(*held, strict=True)), "torn"
    order = torch.argsort(torch.cat([part.row for part in parts]))
    for name, column in whole.columns().items():
        pieces = [getattr(part, name) for part in parts]
        if isinstance(column, Tensor):
            assert torch.equal(torch.cat(pieces)[order], column), name
        else:
            joined = [text for piece in pieces for text in piece]
            assert tuple(joined[i] for i in order.tolist()) == column


def test_a_process_without_a_winner_has_no_rows(samples_of: MakeSamples, context: MakeContext) -> None:
    samples, scores = numbered(samples_of, 4, 4), scores_of([0.0, 0.3, 0.2, 1.0])
    first, second = over_processes(DiffusionDPO(draws=3), samples, scores, context(), 2)
    assert (len(first), len(second)) == (0, 3)
    assert first.winner.shape == first.noise.shape == (0, 4, 2, 2)
    assert numbers(second.loser) == [0, 0, 0]


# ---- sigma and noise -------------------------------------------------------------------------------------------------


class Recorder:
    """Models that remember what they were asked and answer with fixed velocities."""

    def __init__(self, current: Tensor, reference: Tensor) -> None:
        self.asked: list[tuple[Tensor, Tensor, Sequence[str]]] = []
        self.current = self._Set(current, self.asked)
        self.reference = self._Set(reference, self.asked)

    class _Set:
        def __init__(self, answer: Tensor, asked: list[tuple[Tensor, Tensor, Sequence[str]]]) -> None:
            self.answer, self.asked = answer, asked

        def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[str]) -> Tensor:
            self.asked.append((x, sigma, cond))
            return self.answer


def random_rows(n: int = 3, seed: int = 0) -> PairRows:
    source = torch.Generator().manual_seed(seed)
    winner, loser, noise = (torch.randn(n, 4, 2, 2, generator=source) for _ in range(3))
    sigma = torch.rand(n, generator=source)
    cond = tuple(f"prompt {i}" for i in range(n))
    return PairRows(torch.arange(n), winner, loser, noise, sigma, torch.ones(n), cond)


def test_both_halves_get_one_sigma_and_one_noise(context: MakeContext) -> None:
    rows = random_rows()
    models = Recorder(torch.zeros(6, 4, 2, 2), torch.zeros(6, 4, 2, 2))
    DiffusionDPO().loss(models, rows)  # type: ignore[arg-type]
    assert len(models.asked) == 2
    for x, sigma, cond in models.asked:
        assert torch.equal(sigma, rows.sigma.repeat(2))
        assert cond == (*rows.cond, *rows.cond)
        w, one = x.chunk(2)  # noise drawn for each half apart would be left in the difference of the two
        torch.testing.assert_close(w - one, (1 - rows.sigma)[:, None, None, None] * (rows.winner - rows.loser))
        torch.testing.assert_close(w, flow.interpolate(rows.winner, rows.noise, rows.sigma))


def test_draws_of_a_pair_differ_and_follow_from_seed_step_and_pair(
    samples_of: MakeSamples, context: MakeContext
) -> None:
    samples, scores = numbered(samples_of, 6, 2), scores_of([0.0, 1.0] * 3)
    algorithm = DiffusionDPO(draws=4)
    rows = algorithm.rows(samples, scores, context(2))
    torch.manual_seed(5)  # another process: its own global generator
    again = algorithm.rows(samples, scores, context(2))
    assert torch.equal(rows.noise, again.noise)
    assert torch.equal(rows.sigma, again.sigma)
    assert len(set(rows.sigma.tolist())) == 12
    assert len({tuple(one.flatten().tolist()) for one in rows.noise}) == 12
    for other in (context(3), context(2, seed=1), context(2, stage="next")):
        assert not torch.equal(algorithm.rows(samples, scores, other).noise, rows.noise)
    assert abs(float(rows.noise.mean())) < 0.2
    assert float(rows.noise.std()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("sigmas", ["schedule", "uniform", "logit_normal"])
def test_sigmas(samples_of: MakeSamples, context: MakeContext, sigmas: Any) -> None:
    schedule = torch.tensor([1.0, 0.7, 0.2, 0.0])
    samples = replace(numbered(samples_of, 40, 2), sigmas=schedule)
    found = DiffusionDPO(sigmas=sigmas, draws=3).rows(samples, scores_of([0.0, 1.0] * 20), context()).sigma
    assert found.shape == (60,)
    assert found.min() > 0, "at sigma 0 there is nothing to denoise"
    assert found.max() <= 1
    assert (set(found.tolist()) == set(schedule[:-1].tolist())) == (sigmas == "schedule")


# ---- the loss --------------------------------------------------------------------------------------------------------


def fixed(rows: PairRows, winner: float, loser: float) -> Recorder:
    """A reference without error, and a current policy with these errors for the two halves of every pair."""
    target = torch.cat([rows.noise - rows.winner, rows.noise - rows.loser])
    away = torch.tensor([winner] * len(rows) + [loser] * len(rows)).sqrt()[:, None, None, None]
    return Recorder((target + away).requires_grad_(True), target)


@pytest.mark.parametrize(
    ("beta", "winner", "loser", "value", "accuracy"),
    [
        (2000.0, 0.0, 0.0, 0.693147, 0.5),  # before the first update: a tie counts one half, not 0 and not 1
        (2000.0, 0.0, 1e-3, 0.313262, 1.0),
        (5000.0, 0.0, 1e-3, 0.078890, 1.0),
        (2000.0, 2e-3, 3e-3, 0.313262, 1.0),  # worse at both than the reference, but less at the winner
        (2000.0, 1e-3, 0.0, 1.313262, 0.0),
    ],
)
def test_the_values_of_the_loss(beta: float, winner: float, loser: float, value: float, accuracy: float) -> None:
    rows = random_rows()
    result = DiffusionDPO(beta=beta).loss(fixed(rows, winner, loser), rows)  # type: ignore[arg-type]
    values, weight = result.terms["preference"]
    assert values.tolist() == pytest.approx([value] * 3, abs=2e-5)
    assert weight is rows.weight
    assert result.metrics["accuracy"].tolist() == [accuracy] * 3
    assert result.metrics["implicit_margin"].tolist() == pytest.approx([beta / 2 * (loser - winner)] * 3, abs=1e-3)
    assert result.metrics["error/winner"].tolist() == pytest.approx([winner] * 3, abs=1e-6)
    assert result.metrics["error/loser"].tolist() == pytest.approx([loser] * 3, abs=1e-6)


def test_the_slope_at_the_start_is_a_quarter_of_beta() -> None:
    # d loss / d m(winner) = beta / 4, and d m / d v = 2 (v - target) / D by hand.
    rows, beta = random_rows(1), 100.0
    v = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    models = Recorder(v.clone().requires_grad_(True), v)
    DiffusionDPO(beta=beta).loss(models, rows).terms["preference"][0].sum().backward()  # type: ignore[arg-type]
    target = torch.cat([rows.noise - rows.winner, rows.noise - rows.loser])
    by_hand = beta / 4 * 2 * (v - target) / 16 * torch.tensor([1.0, -1.0])[:, None, None, None]
    assert models.current.answer.grad is not None
    torch.testing.assert_close(models.current.answer.grad, by_hand)


def test_the_difference_is_that_of_the_two_errors(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = DiffusionDPO(beta=50, draws=3)
    rows = rolled(toy_policy, algorithm, context())
    nudge(toy_policy)
    result = algorithm.loss(toy_policy.models, rows)
    errors = {}
    for half in ("winner", "loser"):
        clean = getattr(rows, half)
        x = flow.interpolate(clean, rows.noise, rows.sigma)
        for name in ("current", "reference"):
            v = toy_policy.models[name].velocity(x, rows.sigma, rows.cond).detach().double()
            errors[name, half] = (v - (rows.noise - clean).double()).square().mean((1, 2, 3))
    moved = {half: errors["current", half] - errors["reference", half] for half in ("winner", "loser")}
    inside = moved["winner"] - moved["loser"]
    assert inside.abs().min() > 1e-5
    expected = torch.log1p(torch.exp(25 * inside))
    torch.testing.assert_close(result.terms["preference"][0].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.metrics["error/winner"].double(), moved["winner"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(result.metrics["error/loser"].double(), moved["loser"], rtol=1e-3, atol=1e-6)


def test_before_the_first_update_every_difference_is_exactly_0(toy_policy: Policy, context: MakeContext) -> None:
    rows = rolled(toy_policy, DiffusionDPO(draws=4), context())
    metrics = DiffusionDPO().loss(toy_policy.models, rows).metrics
    assert metrics["implicit_margin"].abs().max() == 0
    assert metrics["accuracy"].tolist() == [0.5] * 12


def test_to_swap_the_halves_turns_the_gradient_round(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = DiffusionDPO(beta=100, draws=2)
    rows = rolled(toy_policy, algorithm, context())
    there = gradient_of(toy_policy, algorithm, rows)
    back = gradient_of(toy_policy, algorithm, replace(rows, winner=rows.loser, loser=rows.winner))
    assert there.norm() > 1e-2
    torch.testing.assert_close(back, -there, rtol=1e-4, atol=1e-5 * float(there.norm()))


def test_a_pair_of_the_same_picture_teaches_nothing(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = DiffusionDPO(beta=100, draws=2)
    rows = rolled(toy_policy, algorithm, context())
    nudge(toy_policy)
    size = gradient_of(toy_policy, algorithm, rows).norm()
    same = gradient_of(toy_policy, algorithm, replace(rows, loser=rows.winner)).norm()
    assert same < 1e-5 * size


def test_no_gradient_reaches_the_reference() -> None:
    rows = random_rows()
    models = fixed(rows, 1e-3, 2e-3)
    models.reference.answer = models.reference.answer.clone().requires_grad_(True)
    DiffusionDPO().loss(models, rows).terms["preference"][0].sum().backward()  # type: ignore[arg-type]
    assert models.current.answer.grad is not None
    assert models.reference.answer.grad is None


def test_the_policy_learns_to_prefer(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = DiffusionDPO(beta=20, draws=4)
    rows = rolled(toy_policy, algorithm, context())
    learner = Learner(toy_policy, LearnerOptions(lr=3e-3, batch=12), Processes())
    for _ in range(30):
        learner.step(algorithm.loss, toy_policy.models, rows)
    metrics = algorithm.loss(toy_policy.models, rows).metrics
    assert metrics["accuracy"].mean() > 0.9
    assert metrics["implicit_margin"].mean() > 0.3
    assert (metrics["error/winner"] - metrics["error/loser"]).mean() < 0


# ---- the reference ---------------------------------------------------------------------------------------------------


def test_the_reference_follows_only_when_asked(toy_policy: Policy, context: MakeContext) -> None:
    toy_policy.keep("reference")
    start = toy_policy.snapshot()

    def is_at(weights: Mapping[str, Tensor]) -> bool:
        return all(torch.equal(toy_policy.sets["reference"][name], one) for name, one in weights.items())

    for step in range(6):
        nudge(toy_policy)
        DiffusionDPO().after(toy_policy, context(step))
    assert is_at(start)
    algorithm = DiffusionDPO(refresh_reference=3)
    for step in range(6):
        nudge(toy_policy)
        now = toy_policy.snapshot()
        algorithm.after(toy_policy, context(step))
        assert is_at(now) == (step in (2, 5))
    nudge(toy_policy)
    assert is_at(now), "a copy: what trains on may not take it along"
    assert any(name.startswith("reference/") for name in toy_policy.state()), "and a checkpoint has it"


# ---- options ---------------------------------------------------------------------------------------------------------


def test_needs_follow_from_where_the_pairs_come_from() -> None:
    assert DiffusionDPO(draws=3).needs() == Needs(group=2, pairs=3, reference=True, rewards=True, advantage=True)
    assert DiffusionDPO(pairs="dataset").needs() == Needs(
        group=2, pairs=1, reference=True, rewards=False, preference=True
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"beta": 0.0}, "beta must be above 0, not 0.0"),
        ({"beta": float("inf")}, "beta must be above 0, not inf"),
        ({"draws": 0}, "draws must be 1 row a pair or more, not 0"),
        ({"margin": -0.1}, "margin must be 0 or more, not -0.1"),
        ({"refresh_reference": 0}, "refresh_reference must be 1 step or more, not 0; null is never"),
        ({"pairs": "dataset", "margin": 0.1}, "margin compares scores, which pairs of a data set do not need"),
        ({"pairs": "dataset", "sigmas": "schedule"}, "needs pictures that were sampled: use uniform or logit_normal"),
    ],
)
def test_option_errors(options: Mapping[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DiffusionDPO(**options)
