"""Supervised fine-tuning: its loss is the cross-entropy of what was decided, and of nothing else."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from making import normal, scores_of
from torch import Tensor, nn

from rlkit import registry, tokens
from rlkit.algorithms.sft import SFT
from rlkit.dist import Processes
from rlkit.errors import RecipeError
from rlkit.learner import Learner, LearnerOptions
from rlkit.tokens import TokenRows
from rlkit.types import Context, Needs, Prompt, Samples, Scores, Tokens

MakeContext = Callable[..., Context]
WORDS = 7
NO_SCORES = Scores((), torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.bool), torch.zeros(0))


class Bigram(nn.Module):
    """A token policy: the logits of a token depend on the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WORDS, _weight=normal(WORDS, WORDS))

    def log_probs(self, ids: Tensor, length: Tensor, cond: Any, temperature: float = 1.0) -> Tensor:
        found = tokens.log_probs(self.table(ids), ids, temperature)
        return torch.where(torch.arange(ids.shape[1]) < length[:, None], found, 0.0)


def shown() -> Samples:
    """Three demonstrations of one, two and three answers' tokens, between them what a tool said; the last was cut."""
    ids = torch.tensor([[1, 2, 3, 0, 0, 0], [1, 4, 5, 6, 0, 0], [1, 2, 5, 4, 3, 6]])
    decided = torch.zeros(3, 6, dtype=torch.bool)
    for row, place in ((0, 2), (1, 1), (1, 3), (2, 1), (2, 2), (2, 5)):
        decided[row, place] = True
    index, length = torch.arange(3), torch.tensor([3, 4, 6])
    finished = torch.tensor([True, True, False])
    given = Tokens(ids, length, torch.ones(3, dtype=torch.int64), decided, torch.zeros(3, 6), finished, 0.7)
    prompts = tuple(Prompt(i, f"request {i}") for i in range(3))
    return Samples(torch.zeros(3, 0), torch.zeros(3, 0), prompts, index, index, index, 0, 3, tokens=given)


def rows_of(context: Context, algorithm: SFT | None = None) -> TokenRows:
    return (algorithm or SFT()).rows(shown(), NO_SCORES, context)


def by_hand(policy: Bigram) -> list[list[float]]:
    """-log p of each decided token, at temperature 1."""
    table = policy.table.weight.detach().log_softmax(-1)
    pairs = [[(2, 3)], [(1, 4), (5, 6)], [(1, 2), (2, 5), (3, 6)]]
    return [[-float(table[before, word]) for before, word in one] for one in pairs]


def test_the_loss_is_the_cross_entropy_of_decided_tokens(context: MakeContext) -> None:
    policy, rows = Bigram(), rows_of(context())
    expected = by_hand(policy)
    for form in ("dapo", "grpo"):
        found = SFT(form).loss(SimpleNamespace(current=policy), rows)
        value, weight = found.terms["sft"]
        assert value.tolist() == pytest.approx([sum(one) / len(one) for one in expected])
        mean = float((value * weight).sum().detach() / weight.sum())
        every = [number for one in expected for number in one]
        means = [math.fsum(one) / len(one) for one in expected]
        assert mean == pytest.approx(sum(every) / 6 if form == "dapo" else sum(means) / 3)
        assert found.metrics["nll"].tolist() == pytest.approx(means)
        assert not found.metrics["nll"].requires_grad


def test_what_nobody_decided_has_no_gradient(context: MakeContext) -> None:
    rows = rows_of(context())
    log_prob = torch.full(rows.ids.shape, -1.0, requires_grad=True)
    with torch.no_grad():
        log_prob[~rows.decided] = -torch.inf  # what a tool said may be next to impossible
    answering = SimpleNamespace(log_probs=lambda ids, length, cond, temperature: log_prob[:, : ids.shape[1]])
    value, weight = SFT().loss(SimpleNamespace(current=answering), rows).terms["sft"]
    (gradient,) = torch.autograd.grad((value * weight).sum() / weight.sum(), log_prob)
    assert torch.equal(gradient, torch.where(rows.decided, -1 / 6, 0.0))


@pytest.mark.parametrize("micro", [None, 1, 2])
def test_the_gradient_does_not_depend_on_how_rows_are_split(context: MakeContext, micro: int | None) -> None:
    policy, rows = Bigram(), rows_of(context())
    trained: Any = SimpleNamespace(trainable=dict(policy.named_parameters()), device=torch.device("cpu"), sets={})
    options = LearnerOptions(lr=1.0, batch=3, micro_batch=micro)
    Learner(trained, options, Processes()).gradient(SFT().loss, SimpleNamespace(current=policy), rows)
    table = policy.table.weight.log_softmax(-1)
    pairs = torch.tensor([(2, 3), (1, 4), (5, 6), (1, 2), (2, 5), (3, 6)])
    (expected,) = torch.autograd.grad(-table[pairs[:, 0], pairs[:, 1]].mean(), policy.table.weight)
    torch.testing.assert_close(policy.table.weight.grad, expected)


def test_all_rows_count_whatever_their_scores(context: MakeContext) -> None:
    for scores in (NO_SCORES, scores_of([0.0, float("nan"), 1.0])):
        rows = SFT().rows(shown(), scores, context())
        assert rows.weight.tolist() == [1.0, 1.0, 1.0]
        assert rows.row.tolist() == [0, 1, 2]


def test_needs_neither_rewards_nor_log_probs_nor_groups() -> None:
    assert SFT().needs() == Needs("tokens", rewards=False, group=1, rows=1)


def test_an_unknown_aggregate_is_refused() -> None:
    with pytest.raises(RecipeError, match="'dapo', 'grpo', not 'dap'"):
        registry.build("algorithms", "sft", {"aggregate": "dap"}, "here")
