"""GRPO on tokens: its losses against TRL's on the same tensors, and against REINFORCE on a bigram model."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from making import normal, scores_of
from torch import Tensor, nn

from rlkit import tokens
from rlkit.algorithms.token_grpo import TokenGRPO
from rlkit.dist import Processes
from rlkit.learner import Learner, LearnerOptions
from rlkit.tokens import TokenRows
from rlkit.types import Context, Needs, Prompt, Samples, Tokens

MakeContext = Callable[..., Context]
WORDS = 7  # of the bigram model's vocabulary
CPU = torch.device("cpu")


class Answering:
    """A token policy that answers with one tensor, of as many positions as it is asked for, and counts these."""

    def __init__(self, log_prob: Tensor) -> None:
        self.log_prob = log_prob
        self.positions = 0

    def log_probs(self, ids: Tensor, length: Tensor, cond: Any, temperature: float = 1.0) -> Tensor:
        self.positions += ids.numel()
        return self.log_prob[:, : ids.shape[1]]


class Bigram(nn.Module):
    """A token policy: the logits of a token depend on the one before it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WORDS, _weight=normal(WORDS, WORDS, seed=seed))

    def log_probs(self, ids: Tensor, length: Tensor, cond: Any, temperature: float = 1.0) -> Tensor:
        found = tokens.log_probs(self.table(ids), ids, temperature)
        return torch.where(torch.arange(ids.shape[1]) < length[:, None], found, 0.0)


def models_of(current: Any, reference: Any = None) -> Any:
    return SimpleNamespace(current=current, reference=reference)


def sampled(policy: Bigram, n: int = 6, temperature: float = 0.8) -> Samples:
    """Answers that the model gives, of different lengths behind different prompts; each has a word of a tool."""
    generator = torch.Generator().manual_seed(3)
    prompt = torch.arange(n) // 3 + 1
    length = prompt + torch.randint(3, 8, (n,), generator=generator)
    ids = torch.randint(WORDS, (n, int(length.max())), generator=generator)
    position = torch.arange(ids.shape[1])
    with torch.no_grad():
        for i in range(1, ids.shape[1]):  # decisions are drawn; where they are not, the words stay as they are
            drawn = torch.multinomial((policy.table(ids[:, i - 1]) / temperature).softmax(-1), 1, generator=generator)
            ids[:, i] = torch.where((i >= prompt) & (i < length), drawn[:, 0], ids[:, i])
        decided = (position >= prompt[:, None]) & (position < length[:, None])
        decided[torch.arange(n), prompt + 1] = False  # a tool spoke
        log_prob = torch.where(decided, policy.log_probs(ids, length, (), temperature).float(), 0.0)
    finished = torch.arange(n) != 4
    index = torch.arange(n)
    prompts = tuple(Prompt(i // 3, f"prompt {i // 3}") for i in range(n))
    blank = torch.zeros(n, 0, 0, 0)
    given = Tokens(ids, length, prompt, decided, log_prob, finished, temperature)
    return Samples(blank, blank, prompts, index // 3, index, index, version=0, total=n, tokens=given)


SCORES = scores_of([0.0, 0.4, 1.0, 0.3, 0.1, 0.0])


def rolled(algorithm: TokenGRPO, context: Context, seed: int = 0) -> tuple[Bigram, TokenRows]:
    policy = Bigram(seed)
    rows = algorithm.rows(sampled(policy), SCORES, context)
    return policy, algorithm.before(models_of(policy), rows, 4)


def gradient_of(
    policy: Bigram, algorithm: TokenGRPO, rows: TokenRows, micro: int | None = None, ref: Any = None
) -> Any:
    """As the learner has it, over micro-batches."""
    trained: Any = SimpleNamespace(trainable=dict(policy.named_parameters()), device=CPU, sets={})
    learner = Learner(trained, LearnerOptions(lr=1.0, batch=len(rows), micro_batch=micro), Processes())
    learner.gradient(algorithm.loss, models_of(policy, ref), rows)
    assert policy.table.weight.grad is not None
    return policy.table.weight.grad.clone()


# ---- TRL on the same tensors -----------------------------------------------------------------------------------------

ORACLE_LENGTH = 40  # max_completion_length, which Dr. GRPO divides by


@pytest.fixture(scope="module")
def grpo_trainer() -> Any:
    """TRL's trainer, whose loss is a function of its inputs once it is given its log-probs."""
    from trl import GRPOTrainer

    return GRPOTrainer


def trl_loss(
    trainer: Any, options: Mapping[str, Any], log_prob: Tensor, rows: TokenRows, reference: Tensor, weight: Any = None
) -> tuple[Tensor, dict[str, float]]:
    """What TRL makes of these rows, and its metrics. The first token is the prompt."""
    given = {"beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "loss_type": "dapo"}
    given |= {"importance_sampling_level": "token", "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None}
    given |= {"use_vllm": weight is not None, "vllm_importance_sampling_correction": True, "aux_loss_enabled": False}
    given |= {"_entropy_bonus_enabled": False, "current_gradient_accumulation_steps": 1} | dict(options)
    numbers = SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=given.pop("kl_ratio", True))
    alone = SimpleNamespace(gather=lambda one: one, reduce=lambda one, reduction: one, num_processes=1)
    metrics: Any = {"train": defaultdict(list)}
    itself = SimpleNamespace(
        args=numbers,
        accelerator=alone,
        model=SimpleNamespace(training=True),
        max_completion_length=ORACLE_LENGTH,
        _metrics=metrics,
        _get_per_token_logps_and_entropies=lambda *a, **k: (log_prob[:, 1:], torch.zeros_like(log_prob[:, 1:]), None),
        **given,
    )
    decided = rows.decided[:, 1:].int()
    inputs = {
        "prompt_ids": rows.ids[:, :1],
        "prompt_mask": torch.ones_like(rows.ids[:, :1]),
        "completion_ids": rows.ids[:, 1:],
        "completion_mask": torch.ones_like(decided),
        "tool_mask": decided,
        "advantages": rows.advantage,
        "old_per_token_logps": rows.old_log_prob[:, 1:],
        "ref_per_token_logps": reference[:, 1:],
        "num_items_in_batch": decided.sum(),
        "importance_sampling_ratio": weight,
    }
    loss = trainer._compute_loss(itself, None, inputs)
    return loss, {name: values[0] for name, values in metrics["train"].items()}


def oracle_rows(seed: int = 0) -> tuple[TokenRows, Tensor, Tensor]:
    """(rows, log-probs of the current policy with gradient, of the reference): far enough apart for every clip."""
    n, longest = 8, 12
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(4, longest + 1, (n,), generator=generator)
    length[0] = longest
    decided = torch.rand(n, longest, generator=generator) < 0.8
    decided &= (torch.arange(longest) >= 1) & (torch.arange(longest) < length[:, None])
    current = -1 + normal(n, longest, seed=seed + 1) / 2
    old = torch.where(decided, current + normal(n, longest, seed=seed + 2) / 4, 0.0)
    rows = TokenRows(
        row=torch.arange(n),
        ids=torch.zeros(n, longest, dtype=torch.int64),
        length=length,
        decided=decided,
        rollout_log_prob=torch.where(decided, old + normal(n, longest, seed=seed + 3) / 2, 0.0),
        old_log_prob=old,
        own=torch.tensor(True),
        advantage=normal(n, seed=seed + 4),
        weight=torch.ones(n),
        finished=torch.ones(n, dtype=torch.bool),
        temperature=torch.tensor(1.0),
        cond=("",) * n,
    )
    return rows, current.requires_grad_(), -1 + normal(n, longest, seed=seed + 5)


def of_batch(algorithm: TokenGRPO, rows: TokenRows, log_prob: Tensor, reference: Tensor) -> tuple[Tensor, Any]:
    """The learner's mean, and the metrics of each row with their weights."""
    found = algorithm.loss(models_of(Answering(log_prob), Answering(reference)), rows)
    total = sum(((value * weight).sum() / weight.sum() for value, weight in found.terms.values()), torch.zeros(()))
    return total, (found.metrics, found.terms["policy"][1])


def compared(
    trainer: Any, algorithm: TokenGRPO, options: Mapping[str, Any], weight: Tensor | None = None, seed: int = 0
) -> None:
    rows, log_prob, reference = oracle_rows(seed)
    ours, (metrics, weights) = of_batch(algorithm, rows, log_prob, reference)
    theirs, described = trl_loss(trainer, options, log_prob, rows, reference, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(one, log_prob)[0] for one in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    assert gradients[0].abs().max() > 1e-4
    assert gradients[0][~rows.decided].abs().max() == 0
    if algorithm.form == "dapo" and algorithm.level == "token":  # TRL's metrics are means over all tokens
        clipped = float((metrics["clip_fraction"] * weights).sum() / weights.sum())
        assert clipped == pytest.approx(described["clip_ratio/region_mean"], abs=1e-6)
        assert clipped > 0
        if algorithm.kl > 0 and algorithm.kl_form == "k3":
            assert float((metrics["kl"] * weights).sum() / weights.sum()) == pytest.approx(described["kl"])


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("clip_high", [None, 0.28])
@pytest.mark.parametrize(("form", "longest"), [("grpo", None), ("dapo", None), ("dr_grpo", ORACLE_LENGTH)])
def test_losses_and_gradients_are_trls(
    grpo_trainer: Any, form: Any, longest: int | None, clip_high: float | None, kl: float
) -> None:
    algorithm = TokenGRPO(aggregate=form, longest=longest, clip_high=clip_high, kl=kl)
    compared(grpo_trainer, algorithm, {"loss_type": form, "epsilon_high": clip_high or 0.2, "beta": kl})


def test_the_plain_k3_is_trls(grpo_trainer: Any) -> None:
    compared(grpo_trainer, TokenGRPO(kl=0.3, kl_form="k3"), {"beta": 0.3, "kl_ratio": False})


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("form", ["grpo", "dapo"])
def test_gspo_is_trls(grpo_trainer: Any, form: Any, kl: float) -> None:
    algorithm = TokenGRPO(level="sequence", aggregate=form, clip=0.02, clip_high=0.03, kl=kl)
    options = {"importance_sampling_level": "sequence", "loss_type": form, "epsilon_low": 0.02, "epsilon_high": 0.03}
    compared(grpo_trainer, algorithm, options | {"beta": kl})


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_the_correction_for_the_engine_is_trls(grpo_trainer: Any, mode: Any, level: Any) -> None:
    rows, _, _ = oracle_rows()
    gap = ((rows.old_log_prob - rows.rollout_log_prob) * rows.decided)[:, 1:]
    ratio = torch.exp(gap.sum(1, keepdim=True) if level == "sequence" else gap)
    outside = (ratio > 1.5) | (ratio < 1 / 1.5)
    weight = ratio.clamp(max=1.5) if mode == "truncate" else ratio.masked_fill(outside, 0.0)
    assert outside.any()
    algorithm = TokenGRPO(importance=mode, importance_level=level, importance_cap=1.5, kl=0.1)
    compared(grpo_trainer, algorithm, {"beta": 0.1}, weight)


def test_the_defaults_are_trls(grpo_trainer: Any) -> None:
    from trl import GRPOConfig

    theirs = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}
    ours = TokenGRPO()
    assert (ours.form, ours.level, ours.kl) == (
        theirs["loss_type"],
        theirs["importance_sampling_level"],
        theirs["beta"],
    )
    assert ours.bounds == (theirs["epsilon"], theirs["epsilon"])
    assert theirs["epsilon_high"] is None
    assert (ours.mask_cut, ours.kl_form == "k3_ratio") == (
        theirs["mask_truncated_completions"],
        theirs["use_bias_correction_kl"],
    )


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_have_the_advantages_of_their_groups(context: MakeContext) -> None:
    rows = TokenGRPO(advantage="no_std").rows(sampled(Bigram()), SCORES, context())
    expected = [-1.4 / 3, 0.4 - 1.4 / 3, 1 - 1.4 / 3, 0.3 - 0.4 / 3, 0.1 - 0.4 / 3, -0.4 / 3]
    assert rows.advantage.tolist() == pytest.approx(expected)
    assert rows.row.tolist() == list(range(6))
    assert rows.weight.tolist() == [1.0] * 6


def test_advantages_come_from_all_processes(context: MakeContext) -> None:
    whole = sampled(Bigram())
    mine = whole.select(torch.tensor([2, 3]))  # one of each group: alone neither would have an advantage
    everyone = {torch.int64: whole.group, torch.bool: torch.ones(6, dtype=torch.bool), torch.float32: SCORES.total}
    at = context(gather=lambda values: everyone[values.dtype])
    rows = TokenGRPO(advantage="no_std").rows(mine, scores_of([1.0, 0.3]), at)
    assert rows.row.tolist() == [2, 3]
    assert rows.advantage.tolist() == pytest.approx([1 - 1.4 / 3, 0.3 - 0.4 / 3])


def test_advantages_are_clipped(context: MakeContext) -> None:
    rows = TokenGRPO(advantage_clip=0.5).rows(sampled(Bigram()), SCORES, context())
    assert rows.advantage.abs().max() == 0.5


def test_answers_that_a_limit_cut_off_may_be_left_out(context: MakeContext) -> None:
    samples = sampled(Bigram())
    kept = TokenGRPO().rows(samples, SCORES, context())
    masked = TokenGRPO(mask_cut=True).rows(samples, SCORES, context())
    assert kept.weight.tolist() == [1.0] * 6
    assert masked.weight.tolist() == [1, 1, 1, 1, 0, 1]
    others = torch.tensor([0, 1, 2, 3, 5])
    assert torch.equal(masked.advantage[others], kept.advantage[others]), "their group still compares with it"


def test_a_row_that_was_not_scored_changes_nothing(context: MakeContext) -> None:
    policy, algorithm = Bigram(), TokenGRPO(kl=0.1)
    scores = scores_of([0.0, 9.0, 1.0, 0.3, 0.1, 0.0], [True, False, True, True, True, True])
    rows = algorithm.rows(sampled(policy), scores, context())
    assert rows.weight.tolist() == [1, 0, 1, 1, 1, 1]
    without = rows.select(torch.tensor([0, 2, 3, 4, 5]))
    other = rows.ids.clone()
    other[1] = (other[1] + 1) % WORDS
    rows = replace(rows, ids=other)
    whole, part = (gradient_of(policy, algorithm, one, ref=Bigram(1)) for one in (rows, without))
    torch.testing.assert_close(whole, part, rtol=1e-5, atol=1e-9)


# ---- the loss on a bigram model --------------------------------------------------------------------------------------

FORMS: list[Any] = [
    {"aggregate": "grpo"},
    {"aggregate": "dapo"},
    {"aggregate": "dr_grpo", "longest": 10},
    {"aggregate": "sum"},
    {"level": "sequence"},
    {"importance": "truncate"},
    {"importance": "mask", "importance_level": "sequence"},
]


@pytest.mark.parametrize("options", FORMS)
def test_the_first_step_is_reinforce(context: MakeContext, options: Any) -> None:
    algorithm = TokenGRPO(**options)
    policy, rows = rolled(algorithm, context())
    found = gradient_of(policy, algorithm, rows)
    log_prob = torch.where(rows.decided, policy.log_probs(rows.ids, rows.length, rows.cond, 0.8), 0.0)
    count = rows.decided.sum(1)
    of_sequence = rows.advantage * log_prob.sum(1)
    reinforce = {
        "grpo": -(of_sequence / count).mean(),
        "dapo": -of_sequence.sum() / count.sum(),
        "dr_grpo": -of_sequence.mean() / 10,
        "sum": -of_sequence.mean(),
    }[algorithm.form]
    (expected,) = torch.autograd.grad(reinforce, list(policy.parameters()))
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", FORMS)
def test_the_ratio_is_1_before_any_update(context: MakeContext, options: Any) -> None:
    algorithm = TokenGRPO(**options)
    policy, rows = rolled(algorithm, context())
    metrics = algorithm.loss(models_of(policy), rows).metrics
    assert metrics["ratio/deviation"].max() <= 1e-6
    assert metrics["clip_fraction"].max() == 0
    assert not any(column.requires_grad for column in metrics.values())
    entropy = -(rows.old_log_prob.sum(1) / rows.decided.sum(1))
    torch.testing.assert_close(metrics["entropy"].float(), entropy, rtol=1e-4, atol=1e-5)


def test_another_temperature_is_another_policy(context: MakeContext) -> None:
    # Guards log-probs of softmax(logits) for tokens that softmax(logits / 0.8) gave.
    policy, rows = rolled(TokenGRPO(), context())
    wrong = replace(rows, temperature=torch.tensor(1.0))
    assert TokenGRPO().loss(models_of(policy), wrong).metrics["ratio/deviation"].max() > 0.05


@pytest.mark.parametrize("options", FORMS)
def test_equal_scores_teach_nothing(context: MakeContext, options: Any) -> None:
    algorithm, policy = TokenGRPO(**options), Bigram()
    rows = algorithm.rows(sampled(policy), scores_of([0.7] * 6), context())
    assert gradient_of(policy, algorithm, algorithm.before(models_of(policy), rows, 4)).abs().max() == 0


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("options", FORMS)
def test_the_gradient_does_not_depend_on_how_rows_are_split(context: MakeContext, options: Any, micro: int) -> None:
    algorithm = TokenGRPO(**options, kl=0.2)
    _, rows = rolled(algorithm, context())
    moved = Bigram()
    with torch.no_grad():
        moved.table.weight.mul_(1.05)
    whole = gradient_of(moved, algorithm, rows, ref=Bigram(1))
    shuffled = rows.select(torch.tensor([4, 1, 5, 0, 2, 3]))
    part = gradient_of(moved, algorithm, shuffled, micro, Bigram(1))
    assert whole.norm() > 1e-3
    assert (part - whole).norm() <= 1e-5 * whole.norm()


@pytest.mark.parametrize("options", FORMS)
def test_what_a_tool_said_gets_no_gradient(options: Any) -> None:
    # Blanked before the exponential: a word that is next to impossible makes k3 infinite, and 0 times that is NaN.
    algorithm = TokenGRPO(**options, kl=0.5)
    rows, log_prob, reference = oracle_rows()
    with torch.no_grad():
        log_prob[~rows.decided] = -1000.0
        reference[~rows.decided] = torch.nan
    total, (metrics, _) = of_batch(algorithm, rows, log_prob, reference)
    (gradient,) = torch.autograd.grad(total, log_prob)
    assert gradient.isfinite().all()
    assert gradient[~rows.decided].abs().max() == 0
    assert gradient[rows.decided].abs().max() > 0
    assert all(column.isfinite().all() for column in metrics.values())


def one_token(ratio: float, advantage: float, weight: float = 1.0) -> tuple[TokenRows, Tensor]:
    """A sequence whose one decided token has this ratio."""
    rows, _, _ = oracle_rows()
    rows = rows.select(torch.arange(1))
    decided = torch.arange(12)[None] == 5
    old = torch.where(decided, -1.0 - math.log(ratio), 0.0)
    rows = replace(rows, decided=decided, old_log_prob=old, advantage=torch.tensor([advantage]))
    return replace(rows, weight=torch.tensor([weight])), torch.full((1, 12), -1.0, requires_grad=True)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("ratio", "advantage", "alive"),
    [
        (1.27, 1.0, True),  # above 1 + clip, and still within 1 + clip_high
        (1.29, 1.0, False),  # already likelier by more than the clip: no reward for more
        (1.29, -1.0, True),  # likelier although it was bad: pulled back
        (0.81, -1.0, True),
        (0.79, -1.0, False),
        (0.79, 1.0, True),
    ],
)
def test_the_clip_is_asymmetric(level: Any, ratio: float, advantage: float, alive: bool) -> None:
    rows, log_prob = one_token(ratio, advantage)
    algorithm = TokenGRPO(clip=0.2, clip_high=0.28, level=level)
    found = algorithm.loss(models_of(Answering(log_prob)), rows)
    value, _ = found.terms["policy"]
    (gradient,) = torch.autograd.grad(value.sum(), log_prob)
    assert float(gradient[0, 5]) == pytest.approx(-advantage * ratio if alive else 0.0, rel=1e-4)
    assert found.metrics["clip_fraction"].tolist() == [0.0 if alive else 1.0]
    assert found.metrics["ratio/mean"].tolist() == pytest.approx([ratio], rel=1e-4)
    assert found.metrics["ratio/deviation"].tolist() == pytest.approx([abs(ratio - 1)], rel=1e-3)


def test_the_ranges_are_the_papers() -> None:
    assert TokenGRPO().bounds == (0.2, 0.2)
    assert TokenGRPO(clip=0.1).bounds == (0.1, 0.1)
    assert TokenGRPO(clip_high=0.28).bounds == (0.2, 0.28)
    assert TokenGRPO(level="sequence").bounds == (3e-4, 4e-4)
    assert TokenGRPO(level="sequence", clip=1e-3).bounds == (1e-3, 1e-3)
    assert (TokenGRPO().form, TokenGRPO(level="sequence").form) == ("dapo", "grpo")
    assert TokenGRPO(level="sequence", aggregate="dapo").form == "dapo"


@pytest.mark.parametrize("kl_form", ["k2", "k3", "k3_ratio"])
def test_the_kl_is_0_at_the_start_and_pulls_towards_the_reference(context: MakeContext, kl_form: Any) -> None:
    held, plain = TokenGRPO(kl=0.5, kl_form=kl_form), TokenGRPO()
    policy, rows = rolled(plain, context())
    found = held.loss(models_of(policy, Bigram()), rows)
    assert found.metrics["kl"].abs().max() < 1e-12
    assert found.terms["kl"][1] is found.terms["policy"][1], "one normaliser, one accumulator"
    torch.testing.assert_close(gradient_of(policy, held, rows, ref=Bigram()), gradient_of(policy, plain, rows))

    other = Bigram(1)
    pull = gradient_of(policy, held, rows, ref=other) - gradient_of(policy, plain, rows)
    doubled = gradient_of(policy, replace(held, kl=1.0), rows, ref=other) - gradient_of(policy, plain, rows)
    torch.testing.assert_close(doubled, 2 * pull, rtol=1e-4, atol=1e-6)
    assert held.loss(models_of(policy, other), rows).metrics["kl"].min() > 0
    before = float(held.loss(models_of(policy, other), rows).metrics["kl"].mean())
    with torch.no_grad():
        policy.table.weight.sub_(0.05 * pull / pull.norm())
    assert float(held.loss(models_of(policy, other), rows).metrics["kl"].mean()) < before


def test_the_correction_weighs_the_surrogate_and_not_the_ratio() -> None:
    rows, log_prob = one_token(1.0, 1.0)
    gap = torch.where(rows.decided, math.log(1.5), 0.0)
    rows = replace(rows, rollout_log_prob=rows.old_log_prob - gap)

    def pull(**options: Any) -> tuple[float, Mapping[str, Tensor]]:
        found = TokenGRPO(**options).loss(models_of(Answering(log_prob)), rows)
        (gradient,) = torch.autograd.grad(found.terms["policy"][0].sum(), log_prob)
        return float(gradient[0, 5]), found.metrics

    assert pull()[0] == pytest.approx(-1.0)
    free, metrics = pull(importance="truncate")
    assert free == pytest.approx(-1.5)
    assert metrics["ratio/mean"].tolist() == pytest.approx([1.0])
    assert metrics["importance/bounded"].tolist() == [0.0]
    assert metrics["mismatch/deviation"].tolist() == pytest.approx([math.log(1.5)], rel=1e-5)
    held, metrics = pull(importance="truncate", importance_cap=1.2)
    assert held == pytest.approx(-1.2)
    assert metrics["importance/bounded"].tolist() == [1.0]
    cut, metrics = pull(importance="mask", importance_cap=1.2)
    assert cut == 0
    assert metrics["importance/bounded"].tolist() == [1.0], "a step that is masked whole is not silent about it"


def test_importance_measures_the_ratio_from_the_trainers_own_log_probs(context: MakeContext) -> None:
    policy = Bigram()
    samples = sampled(policy)
    assert samples.tokens is not None
    noise = torch.where(samples.tokens.decided, normal(*samples.tokens.ids.shape).float() / 5, 0.0)
    samples = replace(samples, tokens=replace(samples.tokens, log_prob=samples.tokens.log_prob + noise))  # the engine's
    bypassed, corrected = TokenGRPO(), TokenGRPO(importance="truncate", importance_cap=50.0)
    rows = bypassed.rows(samples, SCORES, context())
    assert bypassed.before(models_of(policy), rows, 4) is rows
    metrics = bypassed.loss(models_of(policy), rows).metrics
    assert metrics["ratio/deviation"].max() > 0.1
    assert not any(name.startswith("mismatch") for name in metrics)
    own = corrected.before(models_of(policy), rows, 4)
    metrics = corrected.loss(models_of(policy), own).metrics
    assert metrics["ratio/deviation"].max() < 1e-6
    torch.testing.assert_close(metrics["mismatch/deviation"].float(), noise.abs().amax(1), rtol=1e-3, atol=1e-5)
    with pytest.raises(RuntimeError, match="importance needs the trainer's own log-probs"):
        corrected.loss(models_of(policy), rows)


def test_padding_that_is_common_to_all_costs_nothing() -> None:
    rows, log_prob, reference = oracle_rows()
    short = rows.select(rows.length.argsort()[:2])
    asked = Answering(log_prob[:2])
    TokenGRPO(kl=0.1).loss(models_of(asked, Answering(reference[:2])), short)
    assert asked.positions == 2 * int(short.length.max()) < short.ids.numel()


def test_values_are_per_row() -> None:
    rows, log_prob, reference = oracle_rows()
    algorithm, some = TokenGRPO(kl=0.2, importance="truncate"), torch.tensor([5, 1, 2])
    whole = algorithm.loss(models_of(Answering(log_prob), Answering(reference)), rows)
    part = algorithm.loss(models_of(Answering(log_prob[some]), Answering(reference[some])), rows.select(some))
    for name, (values, weight) in whole.terms.items():
        assert values.shape == weight.shape == (8,)
        torch.testing.assert_close(part.terms[name][0], values[some])
        torch.testing.assert_close(part.terms[name][1], weight[some])
    for name, values in whole.metrics.items():
        torch.testing.assert_close(part.metrics[name], values[some])


# ---- options ---------------------------------------------------------------------------------------------------------


def test_needs() -> None:
    assert TokenGRPO().needs() == Needs(kind="tokens", log_prob=True, group=2, rows=1, advantage=True)
    assert TokenGRPO(kl=0.1).needs().reference


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"clip": 0.0}, "clip must be above 0 and at most 1, not 0.0"),
        ({"clip": 1.5}, "clip must be above 0 and at most 1, not 1.5"),
        ({"clip_high": 0.0}, "clip_high must be above 0, not 0.0"),
        ({"level": "sequence", "clip_high": 0.28}, "clip_high needs `clip` beside it"),
        ({"aggregate": "dr_grpo"}, "longest is what aggregate: dr_grpo divides by"),
        ({"longest": 10}, "longest is what aggregate: dr_grpo divides by"),
        ({"aggregate": "dr_grpo", "longest": 0}, "longest must be 1 token or more, not 0"),
        ({"importance_cap": 1.0}, "importance_cap must be above 1, not 1.0"),
        ({"advantage_clip": 0.0}, "advantage_clip must be above 0, not 0.0"),
        ({"kl": -0.1}, "kl must be 0 or more, not -0.1"),
    ],
)
def test_option_errors(options: Mapping[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TokenGRPO(**options)
