"""Best of N: who is kept, how many rows there are, and what they teach."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from making import scores_of
from torch import Tensor

from rlkit.algorithms.best_of_n import BestOfN, best_of
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.learner import Learner, LearnerOptions
from rlkit.policy import Policy
from rlkit.rollouts.local import Local
from rlkit.types import Context, Needs, NoisedRows, Plan, Prompt, Samples

MakeContext = Callable[..., Context]


def finished(samples_of: Callable[..., Samples], n: int, group: int) -> Samples:
    """Latents say which sample they are."""
    samples = samples_of([f"prompt {i // group}" for i in range(n)], group)
    latents = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 4, 2, 2).clone()
    return replace(samples, latents=latents, sigmas=torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]))


def kept(rows: NoisedRows) -> list[str]:
    """For each row in the order of its id, the caption and sample it was made of."""
    order = torch.argsort(rows.row).tolist()
    return [f"{rows.cond[i]}: {rows.clean[i].mean():g}" for i in order]


# ---- who is kept -----------------------------------------------------------------------------------------------------


def test_the_best_of_each_group_are_kept_best_first() -> None:
    group = torch.tensor([5, 5, 5, 2, 2, 2])
    scores = torch.tensor([0.1, 0.9, 0.5, -3.0, -1.0, -2.0])
    everyone = torch.ones(6, dtype=torch.bool)
    assert best_of(scores, group, everyone, 1).tolist() == [[4], [1]]  # groups by their id
    assert best_of(scores, group, everyone, 2).tolist() == [[4, 5], [1, 2]]


def test_ties_go_to_the_first_and_the_unscored_come_last() -> None:
    group = torch.arange(24) // 12
    scores = torch.tensor([0.0, 1.0, 0.5] * 8)  # 12 a group: enough for a sort that is not stable to show
    assert best_of(scores, group, torch.ones(24, dtype=torch.bool), 4).tolist() == [[1, 4, 7, 10], [13, 16, 19, 22]]
    scored = torch.ones(24, dtype=torch.bool)
    scored[[1, 7]] = False
    assert best_of(scores, group, scored, 3)[0].tolist() == [4, 10, 2]
    # A negative reward is better than none, whose total reads 0.
    few = best_of(torch.tensor([-2.0, 0.0]), torch.zeros(2, dtype=torch.int64), torch.tensor([True, False]), 1)
    assert few.tolist() == [[0]]


def test_winners_have_the_rows_and_the_others_none(samples_of: Callable[..., Samples], context: MakeContext) -> None:
    samples = finished(samples_of, 8, 4)
    algorithm = BestOfN(keep=2, draws=3)
    rows = algorithm.rows(samples, scores_of([0.1, 0.7, 0.4, 0.2, 0.0, 0.0, 0.3, 1.0]), context())
    assert sorted(rows.row.tolist()) == list(range(12))
    winners = ["prompt 0: 1", "prompt 0: 2", "prompt 1: 7", "prompt 1: 6"]
    assert kept(rows) == [name for name in winners for _ in range(3)]
    assert rows.weight.tolist() == [1.0] * 12
    order = torch.argsort(rows.row)
    for part in order.split(3):
        assert len(set(rows.sigma[part].tolist())) == 3, "without replacement"
        assert rows.sigma[part].min() > 0
    assert len(set(rows.noise[:, 0, 0, 0].tolist())) == 12
    assert rows.advantage[order[::3]].tolist() == pytest.approx([0.35, 0.05, 0.675, -0.025])


def test_a_group_that_prefers_nobody_has_rows_of_weight_0(
    samples_of: Callable[..., Samples], context: MakeContext
) -> None:
    samples = finished(samples_of, 12, 3)
    samples.latents[6] = torch.nan
    scores = scores_of(
        [0.3, 0.3, 0.3, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.1, 0.9, 0.2],
        [True] * 6 + [False] * 3 + [True, False, False],
    )
    rows = BestOfN(keep=2, draws=1).rows(samples, scores, context())
    assert sorted(rows.row.tolist()) == list(range(8)), "as many rows as ever"
    weight = rows.weight[torch.argsort(rows.row)].view(4, 2).tolist()
    assert weight == [[0, 0], [1, 1], [0, 0], [0, 0]], "equal, two winners, none scored, one scored"
    assert rows.clean.isfinite().all(), "0 times NaN is NaN"


def test_an_unscored_sample_that_fills_a_place_weighs_nothing(
    samples_of: Callable[..., Samples], context: MakeContext
) -> None:
    scores = scores_of([0.2, 9.0, 0.6, 9.0], [True, False, True, False])
    rows = BestOfN(keep=3, draws=2).rows(finished(samples_of, 4, 4), scores, context())
    assert rows.weight[torch.argsort(rows.row)].tolist() == [1, 1, 1, 1, 0, 0]
    assert kept(rows)[:4] == ["prompt 0: 2"] * 2 + ["prompt 0: 0"] * 2


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 6])
def test_winners_are_chosen_over_all_processes(
    samples_of: Callable[..., Samples], context: MakeContext, cut: int
) -> None:
    """Groups of three, cut in two anywhere: each process makes the rows of the winners that it holds, and no others."""
    samples, values = finished(samples_of, 6, 3), [0.5, 0.2, 0.9, 0.4, 0.4, 0.1]
    algorithm = BestOfN(keep=2, draws=2, sigmas="uniform")
    whole = algorithm.rows(samples, scores_of(values), context(2))
    assert len(set(whole.sigma.tolist())) == len(whole), "no two samples share their draws"
    everyone = {torch.int64: samples.group, torch.bool: torch.ones(6, dtype=torch.bool)}

    def gather(column: Tensor) -> Tensor:
        return everyone.get(column.dtype, torch.tensor(values))

    found: list[int] = []
    for part in (torch.arange(cut), torch.arange(cut, 6)):
        here = scores_of([values[i] for i in part])
        rows = algorithm.rows(samples.select(part), here, context(2, gather=gather))
        found += rows.row.tolist()
        at = torch.tensor([whole.row.tolist().index(row) for row in rows.row.tolist()], dtype=torch.int64)
        assert kept(rows) == kept(whole.select(at))
        for name, column in rows.columns().items():
            if isinstance(column, Tensor):
                expected = whole.columns()[name]
                assert isinstance(expected, Tensor)
                assert torch.equal(column, expected[at]), name
    assert sorted(found) == list(range(8))


def test_what_sampling_is_asked_for(context: MakeContext) -> None:
    assert BestOfN().plan(context()) == Plan(solver="dpm")
    assert BestOfN(solver="euler").plan(context()).solver == "euler"
    assert BestOfN(keep=3, draws=2).needs() == Needs(group=4, pairs=6, advantage=True)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_flow_matching() -> None:
    def normal(seed: int) -> Tensor:
        return torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    clean, noise, v = normal(1), normal(2), normal(3).requires_grad_()
    sigma, weight = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64), torch.tensor([1.0, 0.0, 1.0]).double()
    rows = NoisedRows(torch.arange(3), clean, noise, sigma, torch.tensor([1.0, 0.0, 2.0]), weight, ("", "", ""))
    asked = []

    def velocity(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        asked.append(x)
        return v

    models: Any = SimpleNamespace(current=SimpleNamespace(velocity=velocity))
    result = BestOfN().loss(models, rows)
    value, found = result.terms["matching"]
    torch.testing.assert_close(asked[0], (1 - sigma[:, None, None, None]) * clean + sigma[:, None, None, None] * noise)
    torch.testing.assert_close(value, (v - (noise - clean)).square().mean((1, 2, 3)))
    assert found is weight
    (pull,) = torch.autograd.grad((value * weight).sum(), v)
    torch.testing.assert_close(pull, weight[:, None, None, None] * 2 * (v.detach() - (noise - clean)) / 16)
    assert result.metrics["best/margin"].tolist() == [1, 0, 2]


PROMPTS = PromptBatch((Prompt(0, "a red circle"), Prompt(1, "two blue crosses")), group=16)


@pytest.mark.parametrize("keep", [1, 4])
def test_the_reward_rises(toy_policy: Policy, context: MakeContext, keep: int) -> None:
    algorithm = BestOfN(keep=keep)
    rollout = Local(steps=6).start(toy_policy, Processes())

    def reward() -> float:
        return float(rollout.collect(PROMPTS, Plan(), context(1000)).latents[:, 0].mean())

    before = reward()
    size = 2 * keep * algorithm.draws
    learner = Learner(toy_policy, LearnerOptions(lr=3e-3, batch=size), Processes())
    for step in range(20):
        at = context(step)
        samples = rollout.collect(PROMPTS, algorithm.plan(at), at)
        rows = algorithm.rows(samples, scores_of(samples.latents[:, 0].mean((1, 2)).tolist()), at)
        for batch in rows.batches(size, at):
            learner.step(algorithm.loss, toy_policy.models, batch)
    assert reward() > before + 0.1


def test_a_step_in_which_every_group_is_flat_changes_nothing(toy_policy: Policy, context: MakeContext) -> None:
    algorithm, at = BestOfN(), context()
    samples = Local(steps=6).start(toy_policy, Processes()).collect(PROMPTS, algorithm.plan(at), at)
    rows = algorithm.rows(samples, scores_of([0.5] * 32), at)
    learner = Learner(toy_policy, LearnerOptions(lr=1e-2, batch=len(rows)), Processes())
    learner.gradient(algorithm.loss, toy_policy.models, rows)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in learner.parameters)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"keep": 0}, "keep must be 1 or more, not 0"), ({"draws": 0}, "draws must be 1 or more, not 0")],
)
def test_option_errors(options: Mapping[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        BestOfN(**options)
