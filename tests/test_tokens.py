"""Token maths against closed forms: log-probs, KL estimates, means over tokens, importance weights, rows."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from making import normal
from torch import Tensor

from rlkit import tokens
from rlkit.tokens import TokenRows
from rlkit.types import Prompt, Samples, Tokens

DECIDED = torch.tensor([[False, True, True, True], [False, False, True, False], [False, False, False, False]])


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(*shape, seed=seed).to(dtype).requires_grad_()


# ---- log-probs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_a_log_prob_is_that_of_the_next_token_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(9.0), 0.0], [5.0, 7.0]]])
    found = tokens.log_probs(logits, torch.tensor([[0, 1, 0]]), temperature)
    three, nine = 3 ** (1 / temperature), 9 ** (1 / temperature)
    expected = torch.tensor([[0.0, math.log(three / (1 + three)), math.log(nine / (1 + nine))]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_their_gradient_are_log_softmax(temperature: float) -> None:
    logits, ids = leaf(3, 5, 11), torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))
    pull = normal(3, 5, seed=1)
    found = tokens.log_probs(logits, ids, temperature)
    plain = (logits / temperature).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found[:, 1:], plain)
    assert found[:, 0].abs().max() == 0
    (gradient,) = torch.autograd.grad((found * pull).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((plain * pull[:, 1:]).sum(), logits)
    torch.testing.assert_close(gradient, expected)
    assert gradient[:, -1].abs().max() == 0, "the logits behind the last token say nothing of this sequence"
    (again,) = torch.autograd.grad((found * pull).sum(), logits)  # the learner asks once for each family of terms
    torch.testing.assert_close(again, gradient, rtol=0, atol=0)


def test_log_probs_are_those_of_trl() -> None:
    from trl.trainer.utils import selective_log_softmax

    logits, ids = leaf(2, 6, 9, dtype=torch.float32), torch.randint(9, (2, 6))
    expected = selective_log_softmax(logits[:, :-1], ids[:, 1:], temperature=0.6)
    torch.testing.assert_close(tokens.log_probs(logits, ids, 0.6)[:, 1:], expected, rtol=1e-5, atol=1e-6)


def test_bf16_logits_are_taken_to_fp32_before_anything_is_done_with_them() -> None:
    logits = leaf(2, 4, 300, dtype=torch.bfloat16)
    ids = torch.randint(300, (2, 4), generator=torch.Generator().manual_seed(0))
    found = tokens.log_probs(logits, ids, 0.7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, tokens.log_probs(logits.detach().float(), ids, 0.7), rtol=0, atol=0)
    assert (found - tokens.log_probs(logits.detach().double(), ids, 0.7)).abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.dtype == torch.bfloat16


def test_no_copy_of_the_logits_is_kept_for_the_gradient() -> None:
    logits, ids = leaf(3, 8, 50, dtype=torch.bfloat16), torch.zeros(3, 8, dtype=torch.int64)
    copies: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr() and tensor.numel() >= 50:
            copies.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        tokens.log_probs(logits, ids)
    assert not copies


def test_no_sequences_have_no_log_probs() -> None:
    found = tokens.log_probs(torch.zeros(0, 3, 5, dtype=torch.bfloat16), torch.zeros(0, 3, dtype=torch.int64))
    assert (found.shape, found.dtype) == ((0, 3), torch.float32)


def test_log_probs_refuse_other_shapes_and_temperatures() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits must be \[B, L, V\] and ids \[B, L\], not \(2, 2, 5\) and \(2, 3\)"):
        tokens.log_probs(torch.zeros(2, 2, 5), ids)
    with pytest.raises(ValueError, match="temperature must be above 0, not 0"):
        tokens.log_probs(torch.zeros(2, 3, 5), ids, 0.0)


# ---- KL --------------------------------------------------------------------------------------------------------------


def test_kl_estimates_have_their_closed_forms() -> None:
    log_prob, reference = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    assert tokens.token_kl(log_prob, reference, "k1").item() == pytest.approx(math.log(2))
    assert tokens.token_kl(log_prob, reference, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert tokens.token_kl(log_prob, reference, "k3").item() == pytest.approx(0.5 - 1 + math.log(2))
    for form in ("k1", "k2", "k3"):
        assert tokens.token_kl(log_prob, log_prob, form).item() == 0
    with pytest.raises(ValueError, match="must be k1, k2 or k3, not 'k4'"):
        tokens.token_kl(log_prob, reference, "k4")  # type: ignore[arg-type]


def expected_kl(form: Any, live_ratio: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(value, gradient) of an estimate in expectation over the policy's tokens, and of the KL itself."""
    logits, reference = leaf(7), normal(7, seed=1).log_softmax(0)
    log_prob = logits.log_softmax(0)
    p = log_prob.detach().exp()
    estimate = tokens.token_kl(log_prob, reference, form)
    if live_ratio:
        estimate = estimate * torch.exp(log_prob - log_prob.detach())
    found = (p * estimate).sum()
    kl = (log_prob.exp() * (log_prob - reference)).sum()
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (found, kl)]
    return found.detach(), gradients[0], kl.detach(), gradients[1]


@pytest.mark.parametrize(
    ("form", "live_ratio", "unbiased", "pulls_as_the_kl"),
    [
        ("k1", False, True, False),
        ("k2", False, False, True),
        ("k3", False, True, False),
        ("k3", True, True, True),
        ("k1", True, True, True),
    ],
)
def test_what_is_unbiased_in_value_may_not_be_in_gradient(
    form: str, live_ratio: bool, unbiased: bool, pulls_as_the_kl: bool
) -> None:
    value, gradient, kl, exact = expected_kl(form, live_ratio)
    assert torch.allclose(value, kl) == unbiased
    assert torch.allclose(gradient, exact) == pulls_as_the_kl


def test_k1_as_a_loss_pulls_nobody() -> None:
    _, gradient, _, exact = expected_kl("k1")
    assert gradient.abs().max() < 1e-12 < exact.abs().max()


def test_a_reference_gets_no_gradient() -> None:
    log_prob, reference = leaf(2, 3), leaf(2, 3, seed=1)
    tokens.token_kl(log_prob, reference, "k3").sum().backward()
    assert log_prob.grad is not None
    assert reference.grad is None


# ---- means -----------------------------------------------------------------------------------------------------------

VALUES = torch.tensor([[9.0, 1.0, 2.0, 6.0], [9.0, 9.0, 5.0, 9.0], [9.0, 9.0, 9.0, 9.0]])


@pytest.mark.parametrize(
    ("form", "longest", "value", "weight", "mean"),
    [
        ("grpo", None, [3.0, 5.0, 0.0], [1.0, 1.0, 0.0], (3 + 5) / 2),
        ("dapo", None, [3.0, 5.0, 0.0], [3.0, 1.0, 0.0], (1 + 2 + 6 + 5) / 4),
        ("dr_grpo", 10, [0.9, 0.5, 0.0], [1.0, 1.0, 0.0], (9 + 5) / 10 / 2),
        ("sum", None, [9.0, 5.0, 0.0], [1.0, 1.0, 0.0], (9 + 5) / 2),
    ],
)
def test_means_over_tokens(form: Any, longest: int | None, value: Any, weight: Any, mean: float) -> None:
    found = tokens.aggregate(VALUES, DECIDED, form, longest)
    torch.testing.assert_close(found[0], torch.tensor(value))
    torch.testing.assert_close(found[1], torch.tensor(weight))
    assert float((found[0] * found[1]).sum() / found[1].sum()) == pytest.approx(mean)


@pytest.mark.parametrize("form", ["grpo", "dapo", "dr_grpo", "sum"])
def test_tokens_of_others_enter_no_mean_whatever_they_are(form: Any) -> None:
    values = torch.where(DECIDED, VALUES, torch.nan).requires_grad_()
    value, weight = tokens.aggregate(values, DECIDED, form, 4)
    assert value.isfinite().all()
    (gradient,) = torch.autograd.grad((value * weight).sum(), values)
    assert gradient[~DECIDED].abs().max() == 0
    assert (gradient[DECIDED] > 0).all()


def test_dr_grpo_needs_its_length_and_forms_are_known() -> None:
    for longest in (None, 0):
        with pytest.raises(ValueError, match=f"divides by `longest`, 1 or more tokens, not {longest}"):
            tokens.aggregate(VALUES, DECIDED, "dr_grpo", longest)
    with pytest.raises(ValueError, match="grpo, dapo, dr_grpo or sum, not 'bnpo'"):
        tokens.aggregate(VALUES, DECIDED, "bnpo")  # type: ignore[arg-type]


def test_the_largest_are_a_share_of_each_sequence_and_one_at_least() -> None:
    values = torch.tensor([[9.0, 1.0, 2.0, 6.0], [9.0, 9.0, 5.0, 9.0], [9.0, 9.0, 9.0, 9.0]], requires_grad=True)
    for share, expected in {0.01: [3], 0.34: [3], 0.67: [2, 3], 1.0: [1, 2, 3]}.items():
        found = tokens.largest(values, DECIDED, share)
        assert found.nonzero().tolist() == [[0, place] for place in expected] + [[1, 2]]
        assert not found.requires_grad


def test_of_equally_large_ones_the_first_are_chosen() -> None:
    decided = torch.ones(1, 40, dtype=torch.bool)
    assert tokens.largest(torch.ones(1, 40), decided, 0.1).nonzero()[:, 1].tolist() == [0, 1, 2, 3]
    for count in range(10, 41, 10):  # 0.1 x 30 is more than 3 in floating point
        assert int(tokens.largest(torch.ones(1, 40), decided & (torch.arange(40) < count), 0.1).sum()) == count // 10


def test_what_is_largest_does_not_depend_on_padding_or_company() -> None:
    values, decided = normal(5, 20), normal(5, 20, seed=1) > 0
    whole = tokens.largest(values, decided, 0.3)
    wider = torch.nn.functional.pad(values[2:3], (0, 7), value=99.0), torch.nn.functional.pad(decided[2:3], (0, 7))
    assert torch.equal(tokens.largest(*wider, 0.3)[:, :20], whole[2:3])


def test_a_sequence_ratio_is_the_geometric_mean_of_its_tokens() -> None:
    ratio = torch.tensor([[7.0, 2.0, 4.0, 1.0], [7.0, 7.0, 3.0, 7.0], [7.0, 7.0, 7.0, 7.0]])
    old = normal(3, 4).float()
    found = tokens.sequence_log_ratio(old + ratio.log(), old, DECIDED)
    torch.testing.assert_close(found.exp(), torch.tensor([2.0, 3.0, 1.0]))


# ---- importance ------------------------------------------------------------------------------------------------------

RATIO = torch.tensor([[50.0, 4.0, 0.5, 1.5], [50.0, 0.01, 0.25, 50.0], [50.0, 50.0, 50.0, 50.0]])
ROLLOUT = -2.0 + normal(3, 4, seed=2).float() / 4
TRAINER = ROLLOUT + RATIO.log()


@pytest.mark.parametrize(
    ("weigh", "level", "expected"),
    [
        (tokens.truncated_weight, "token", [[1, 2, 0.5, 1.5], [1, 1, 0.25, 1], [1, 1, 1, 1]]),
        (tokens.masked_weight, "token", [[1, 0, 0.5, 1.5], [1, 1, 0, 1], [1, 1, 1, 1]]),
        (tokens.truncated_weight, "sequence", [[2.0] * 4, [0.25] * 4, [1.0] * 4]),  # the product: 3
        (tokens.masked_weight, "sequence", [[0.0] * 4, [0.0] * 4, [1.0] * 4]),
    ],
)
def test_importance_weights_are_capped_or_cut(weigh: Any, level: Any, expected: Any) -> None:
    trainer = TRAINER.clone().requires_grad_()
    found = weigh(trainer, ROLLOUT, DECIDED, 2.0, level)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    assert not found.requires_grad


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_of_equal_policies_are_exactly_1(level: Any) -> None:
    for weigh in (tokens.truncated_weight, tokens.masked_weight):
        assert torch.equal(weigh(ROLLOUT, ROLLOUT, DECIDED, 2.0, level), torch.ones(3, 4))


def test_what_lies_on_the_edge_of_the_mask_stays() -> None:
    gap = torch.tensor([[0.0, 2.0, 0.5, 0.499]]).clamp(min=1e-3).log()
    found = tokens.masked_weight(gap, torch.zeros(1, 4), torch.tensor([[False, True, True, True]]), 2.0, "token")
    torch.testing.assert_close(found, torch.tensor([[1.0, 2.0, 0.5, 0.0]]))


def test_a_hopeless_sequence_overflows_into_the_cap_and_out_of_the_mask() -> None:
    gap = torch.full((1, 500), 5.0)
    everything = torch.ones(1, 500, dtype=torch.bool)
    assert (tokens.truncated_weight(gap, 0 * gap, everything, 2.0, "sequence") == 2).all()
    assert (tokens.masked_weight(gap, 0 * gap, everything, 2.0, "sequence") == 0).all()


def test_levels_are_known() -> None:
    with pytest.raises(ValueError, match="must be token or sequence, not 'word'"):
        tokens.truncated_weight(TRAINER, ROLLOUT, DECIDED, 2.0, "word")  # type: ignore[arg-type]


def test_mismatch_describes_each_sequence() -> None:
    found = tokens.mismatch(TRAINER, ROLLOUT, DECIDED)
    gap = [math.log(4), math.log(2), math.log(1.5)]
    expected = {
        "mismatch/mean": [sum(gap) / 3, math.log(4), 0.0],
        "mismatch/deviation": [math.log(4), math.log(4), 0.0],
        "mismatch/low": [0.5, 0.25, 1.0],
        "mismatch/high": [4.0, 1.0, 1.0],
        "mismatch/effective": [(4 + 0.5 + 1.5) ** 2 / (3 * (16 + 0.25 + 2.25)), 1.0, 1.0],
    }
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(values), rtol=1e-4, atol=1e-6)


# ---- rows ------------------------------------------------------------------------------------------------------------


def token_samples() -> Samples:
    """Three answers: of three tokens, of one behind a prompt of two, and of one token between a tool's words."""
    decided = torch.tensor(
        [
            [False, True, True, True, False, False],
            [False, False, True, False, False, False],
            [False, False, True, False, True, False],
        ]
    )
    some = Tokens(
        ids=torch.arange(18).reshape(3, 6),
        length=torch.tensor([4, 3, 5]),
        prompt=torch.tensor([1, 2, 2]),
        decided=decided,
        log_prob=torch.where(decided, -torch.arange(18.0).reshape(3, 6), 0.0),
        finished=torch.tensor([True, False, True]),
        temperature=0.7,
    )
    index = torch.arange(3) + 4  # of a process that is not the first
    prompts = tuple(Prompt(i, f"prompt {i}") for i in range(3))
    blank = torch.zeros(3, 0, 0, 0)
    return Samples(blank, blank, prompts, index // 2, index, index + 100, version=0, total=8, tokens=some)


def rows_of(samples: Samples, scored: tuple[bool, ...] = (True, True, True)) -> TokenRows:
    return TokenRows.from_samples(samples, torch.tensor([1.0, 2.0, 3.0]), torch.tensor(scored))


def test_a_sequence_is_a_row() -> None:
    samples = token_samples()
    rows = rows_of(samples)
    assert samples.tokens is not None
    assert rows.row.tolist() == [4, 5, 6]
    assert torch.equal(rows.ids, samples.tokens.ids)
    assert torch.equal(rows.decided, samples.tokens.decided)
    assert torch.equal(rows.old_log_prob, samples.tokens.log_prob)
    assert torch.equal(rows.rollout_log_prob, samples.tokens.log_prob)
    assert rows.length.tolist() == [4, 3, 5]
    assert rows.advantage.tolist() == [1.0, 2.0, 3.0]
    assert rows.weight.tolist() == [1.0] * 3
    assert rows.finished.tolist() == [True, False, True]
    assert rows.cond == ("prompt 0", "prompt 1", "prompt 2")
    assert float(rows.temperature) == pytest.approx(0.7)
    assert not rows.own


def test_rows_can_be_chosen_and_moved() -> None:
    some = rows_of(token_samples()).select(torch.tensor([2, 0])).to(torch.device("cpu"))
    assert some.row.tolist() == [6, 4]
    assert some.cond == ("prompt 2", "prompt 0")
    assert some.ids[:, 0].tolist() == [12, 0]
    assert some.temperature.ndim == 0
    assert len(some.select(torch.arange(0)).trimmed()) == 0


def test_what_is_not_scored_is_blank() -> None:
    samples = token_samples()
    assert samples.tokens is not None
    samples.tokens.log_prob[1] = torch.nan
    rows = TokenRows.from_samples(
        samples, torch.tensor([1.0, torch.nan, 3.0]), scored=torch.tensor([True, False, True])
    )
    assert rows.weight.tolist() == [1.0, 0.0, 1.0]
    assert rows.advantage.tolist() == [1.0, 0.0, 3.0]
    assert rows.old_log_prob[1].abs().max() == 0


def test_trimming_takes_the_common_padding_away() -> None:
    rows = rows_of(token_samples())
    assert rows.trimmed().ids.shape == (3, 5)
    short = rows.select(torch.tensor([1, 0])).trimmed()
    assert [getattr(short, name).shape for name in ("ids", "decided", "old_log_prob", "rollout_log_prob")] == [
        (2, 4)
    ] * 4
    assert torch.equal(short.ids, rows.ids[torch.tensor([1, 0]), :4])


@pytest.mark.parametrize(
    ("at", "text"),
    [
        ((1, 1), "token 1 of sample 105 is marked as decided, but lies in the prompt"),
        ((2, 5), "token 5 of sample 106 is marked as decided, but lies in the prompt or in the padding"),
        ((0, 0), "token 0 of sample 104 is marked"),
    ],
)
def test_decided_tokens_lie_in_the_answer(at: tuple[int, int], text: str) -> None:
    samples = token_samples()
    assert samples.tokens is not None
    samples.tokens.decided[at] = True
    with pytest.raises(ValueError, match=text):
        rows_of(samples)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_log_prob_that_is_missing_is_named(value: float) -> None:
    samples = token_samples()
    assert samples.tokens is not None
    samples.tokens.log_prob[2, 4] = value
    with pytest.raises(ValueError, match="token 4 of sample 106 was decided, but its log-prob is not finite"):
        rows_of(samples)
    samples.tokens.log_prob[2] = torch.tensor([0.0, 0.0, -1.0, math.nan, -1.0, 0.0])  # of a tool's word
    assert rows_of(samples).old_log_prob.isfinite().all()


def test_samples_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="these samples carry no tokens"):
        rows_of(replace(token_samples(), tokens=None))


class Counting:
    """A token policy whose log-probs are its rows' ids, and which remembers what it was asked."""

    def __init__(self) -> None:
        self.weight = torch.ones((), requires_grad=True)
        self.asked: list[tuple[tuple[int, ...], tuple[str, ...], float]] = []

    def log_probs(self, ids: Tensor, length: Tensor, cond: Any, temperature: float = 1.0) -> Tensor:
        self.asked.append((tuple(ids.shape), tuple(cond), temperature))
        return -ids.float() * self.weight


def test_recomputed_rows_have_the_trainers_own_log_probs() -> None:
    rows, policy = rows_of(token_samples(), (True, True, False)), Counting()
    found = tokens.recomputed(rows, policy, 2)
    assert [asked[:2] for asked in policy.asked] == [((2, 4), ("prompt 0", "prompt 1")), ((1, 5), ("prompt 2",))]
    assert all(asked[2] == pytest.approx(0.7) for asked in policy.asked)
    expected = torch.where(rows.decided, -rows.ids.float(), 0.0)
    assert torch.equal(found.old_log_prob[:2], expected[:2])
    assert found.old_log_prob[2].abs().max() == 0, "not scored: blank"
    assert torch.equal(found.rollout_log_prob, rows.rollout_log_prob)
    assert found.own
    assert not found.old_log_prob.requires_grad
    assert not rows.own


def test_no_rows_are_recomputed_too() -> None:
    none, policy = rows_of(token_samples()).select(torch.arange(0)), Counting()
    assert tokens.recomputed(none, policy, 2).own
    assert not policy.asked
