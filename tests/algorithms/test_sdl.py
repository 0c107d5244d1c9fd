"""SDL: its gradient against an enumerated one, the teacher's reading of the student's tokens, and what it is taught."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backbones import tiny_llm
from making import normal, scores_of
from meeting import Meeting
from torch import Tensor, nn

from rlkit import registry, tokens
from rlkit.agents.experience import Bundle, remembered, told
from rlkit.algorithms.sdl import SDL, SDLRows, TaughtRows, teacher_log_probs
from rlkit.algorithms.token_grpo import TokenGRPO
from rlkit.dist import Processes
from rlkit.episodes import Call, Episode, Program, Turn
from rlkit.errors import DataError, RecipeError
from rlkit.language import LanguagePolicy
from rlkit.learner import Learner, LearnerOptions
from rlkit.types import Context, Prompt, Samples, Scores, Tokens

MakeContext = Callable[..., Context]
CPU = torch.device("cpu")
ALONE: dict[str, Any] = {"policy": None, "weight": 1.0, "aggregate": "sum", "top_share": 1.0}


# ---- the enumerated gradient -----------------------------------------------------------------------------------------

CHOICES = 8
STUDENT, TEACHER = CHOICES, CHOICES + 1  # what stands before the one decided token


class Enumerated(nn.Module):
    """One token of eight, whose logits depend on the token before it: the student's prompt or the teacher's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CHOICES + 2, CHOICES, _weight=normal(CHOICES + 2, CHOICES))

    def log_probs(self, ids: Tensor, length: Tensor, cond: Any, temperature: float = 1.0) -> Tensor:
        every = self.table(ids[:, :-1]).log_softmax(-1)
        chosen = every.gather(-1, ids[:, 1:, None].clamp(max=CHOICES - 1))[..., 0]
        return nn.functional.pad(chosen, (1, 0))


def enumerated(policy: Enumerated, old: Tensor) -> TaughtRows:
    """A row for each token, weighed by its probability when it was sampled: sums over rows are expectations."""
    n, every = CHOICES, torch.arange(CHOICES)
    decided = torch.tensor([[False, True]]).expand(n, 2)
    old_log_prob = torch.stack([torch.zeros(n), old.log()], 1)
    return TaughtRows(
        row=every,
        ids=torch.stack([torch.full((n,), STUDENT), every], 1),
        length=torch.full((n,), 2),
        decided=decided,
        rollout_log_prob=old_log_prob,
        old_log_prob=old_log_prob,
        own=torch.tensor(False),
        advantage=torch.zeros(n, dtype=torch.float64),
        weight=old,
        finished=torch.ones(n, dtype=torch.bool),
        temperature=torch.tensor(1.0),
        cond=("",) * n,
        prompt=torch.ones(n, dtype=torch.int64),
        taught=(None,) * n,
        memory=torch.tensor(1.0),
        unread=torch.tensor(0.0),
        teacher_ids=torch.stack([torch.zeros(n, dtype=torch.int64), torch.full((n,), TEACHER), every], 1),
        teacher_length=torch.full((n,), 3),
        teacher_cond=("taught",) * n,
        too_long=torch.zeros(n, dtype=torch.bool),
    )


def expectation(algorithm: SDL, policy: Enumerated, rows: TaughtRows) -> tuple[Tensor, Tensor]:
    """(value, gradient by the table)."""
    value, weight = algorithm.loss(SimpleNamespace(current=policy), rows).terms["sdl"]
    total = (value * weight).sum()
    (gradient,) = torch.autograd.grad(total, policy.table.weight)
    return total.detach(), gradient


def divergence(policy: Enumerated) -> tuple[Tensor, Tensor]:
    """KL(student || teacher) of all eight, and its gradient, the teacher's part left out."""
    student = policy.table.weight[STUDENT].log_softmax(-1)
    teacher = policy.table.weight[TEACHER].log_softmax(-1).detach()
    total = (student.exp() * (student - teacher)).sum()
    (gradient,) = torch.autograd.grad(total, policy.table.weight)
    return total.detach(), gradient


@pytest.mark.parametrize("sampled_by", ["the same weights", "older weights"])
@pytest.mark.parametrize("estimator", ["k3", "k2", "log_ratio"])
def test_the_gradient_is_that_of_the_kl_to_the_teacher(estimator: Any, sampled_by: str) -> None:
    policy = Enumerated()
    old = policy.table.weight[STUDENT].detach()
    old = (old if sampled_by == "the same weights" else old + normal(CHOICES, seed=5) / 2).softmax(-1)
    algorithm = SDL(**ALONE, estimator=estimator, clamp=100.0, rho_cap=1e6)
    value, gradient = expectation(algorithm, policy, enumerated(policy, old))
    expected, pull = divergence(policy)
    assert pull.norm() > 0.1
    assert (gradient - pull).abs().max() < 1e-8
    assert gradient[TEACHER].abs().max() == 0, "the teacher learns nothing"
    if estimator == "k3":
        assert float(value) == pytest.approx(float(expected), abs=1e-8)


def test_a_detached_ratio_would_give_another_kls_gradient() -> None:
    # The reason why rho is live in k3: detached, the value is the same and the gradient is the forward KL's.
    policy = Enumerated()
    student = policy.table.weight[STUDENT].log_softmax(-1)
    teacher = policy.table.weight[TEACHER].log_softmax(-1).detach()
    forward = (teacher.exp() * (teacher - student)).sum()
    k3 = tokens.token_kl(student, teacher)
    (detached,) = torch.autograd.grad((student.exp().detach() * k3).sum(), policy.table.weight, retain_graph=True)
    (other,) = torch.autograd.grad(forward, policy.table.weight)
    assert (detached - other).abs().max() < 1e-8
    old = student.detach().exp()
    _, ours = expectation(SDL(**ALONE, clamp=100.0), policy, enumerated(policy, old))
    assert (ours - detached).abs().max() > 0.05


@pytest.mark.parametrize("estimator", ["k3", "k2", "log_ratio"])
def test_a_teacher_that_agrees_pulls_nobody(estimator: Any) -> None:
    policy = Enumerated()
    with torch.no_grad():
        policy.table.weight[TEACHER] = policy.table.weight[STUDENT]
    old = policy.table.weight[STUDENT].detach().softmax(-1)
    value, gradient = expectation(SDL(**ALONE, estimator=estimator), policy, enumerated(policy, old))
    assert float(value) == 0
    assert gradient.abs().max() == 0


# ---- one token -------------------------------------------------------------------------------------------------------


class Given:
    """A token policy that answers a student and a teacher with one tensor each, by their conditions."""

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        self.student, self.teacher = student, teacher

    def log_probs(self, ids: Tensor, length: Tensor, cond: Sequence[str], temperature: float = 1.0) -> Tensor:
        found = self.teacher if cond[0] == "taught" else self.student
        return found[:, : ids.shape[1]]


def one_token(gap: float, ratio: float, algorithm: SDL) -> tuple[float, float]:
    """(value, gradient by log p) of a token with this l and this p / p_old."""
    rows = enumerated(Enumerated(), torch.ones(CHOICES, dtype=torch.float64)).select(torch.arange(1))
    student = torch.full((1, 2), -1.0, dtype=torch.float64, requires_grad=True)
    teacher = torch.full((1, 3), -1.0 - gap, dtype=torch.float64)
    rows = replace(rows, old_log_prob=torch.full((1, 2), -1.0 - math.log(ratio), dtype=torch.float64))
    found = algorithm.loss(SimpleNamespace(current=Given(student, teacher)), rows)
    value, _ = found.terms["sdl"]
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient[0, 0] == 0
    return float(value.detach()), float(gradient[0, 1])


@pytest.mark.parametrize("gap", [-1.5, 0.7])
def test_the_cap_ends_the_ratios_gradient(gap: float) -> None:
    algorithm = SDL(**ALONE)
    k3 = math.expm1(-gap) + gap
    assert one_token(gap, 1.9, algorithm) == pytest.approx((1.9 * k3, 1.9 * gap))
    assert one_token(gap, 3.0, algorithm) == pytest.approx((2.0 * k3, 2.0 * -math.expm1(-gap)))
    for estimator, value in (("k2", 2.0 * gap**2 / 2), ("log_ratio", 2.0 * gap * -1.0)):
        other = replace(algorithm, estimator=estimator)
        assert one_token(gap, 3.0, other) == pytest.approx((value, 2.0 * gap))


@pytest.mark.parametrize("estimator", ["k3", "k2", "log_ratio"])
@pytest.mark.parametrize("gap", [-14.0, 14.0])
def test_beyond_the_clamp_a_token_is_pulled_as_at_the_clamp(gap: float, estimator: Any) -> None:
    # A clamp that stops k3's gradient leaves the ratio's: for l = -14 it is e^10 strong, away from the teacher.
    value, gradient = one_token(gap, 1.0, SDL(**ALONE, estimator=estimator))
    assert gradient == pytest.approx(math.copysign(10.0, gap))
    if estimator == "k3":
        assert value == pytest.approx(math.expm1(-math.copysign(10, gap)) + math.copysign(10, gap))


def test_the_weight_is_genevolves_unless_it_is_given_with_the_aggregate() -> None:
    alone = replace(SDL(policy=None), top_share=1.0)
    assert one_token(0.5, 1.0, alone)[1] == pytest.approx(2.0 * 0.5)
    assert one_token(0.5, 1.0, replace(alone, weight=0.1, aggregate="grpo"))[1] == pytest.approx(0.1 * 0.5)


# ---- a policy that reads conversations -------------------------------------------------------------------------------

WORDS = 11
GO = WORDS - 1  # what stands before each answer


class Reader(nn.Module):
    """A token policy that reads conversations: `guided`, its logits depend on the first token too, which says whether
    there is experience; else on the token before alone."""

    def __init__(self, guided: bool = True, longest: int = 1000, seed: int = 0) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WORDS, _weight=normal(WORDS, WORDS, seed=seed))
        self.lift = nn.Embedding(WORDS, WORDS, _weight=normal(WORDS, WORDS, seed=seed + 1) * guided)
        self.longest, self.known = longest, set[str]()

    def read(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        return [self._ids(prompt) for prompt in prompts]

    def _ids(self, prompt: Prompt) -> Tensor:
        ids = [int("Experience" in prompt.system), *self._spelled(prompt.system + prompt.text), GO]
        for turn in prompt.turns:
            ids += [*turn.answer, *self._spelled(turn.reply), GO]
        if len(ids) >= self.longest:
            raise DataError(f"the prompt has {len(ids)} tokens")
        self.known.add(prompt.key)
        return torch.tensor(ids)

    def _spelled(self, text: str) -> list[int]:
        return [ord(letter) % (WORDS - 1) for letter in text]

    def log_probs(self, ids: Tensor, length: Tensor, cond: Sequence[str], temperature: float = 1.0) -> Tensor:
        assert all(key in self.known for key in cond)
        found = tokens.log_probs(self.table(ids) + self.lift(ids[:, :1]), ids, temperature)
        return torch.where(torch.arange(ids.shape[1]) < length[:, None], found, 0.0)


def models_of(current: Any, reference: Any = None) -> Any:
    return SimpleNamespace(current=current, reference=reference)


REQUESTS = ("draw the flag of Kesh Bay", "draw the flag of Kesh Moor", "paint the emblem of Kesh Bay")


def sampled(policy: Any, n: int = 9, temperature: float = 0.8) -> Samples:
    """Episodes of none, one or two turns before the answer, in groups of three."""
    generator = torch.Generator().manual_seed(3)

    def written(least: int) -> tuple[int, ...]:
        count = int(torch.randint(least, least + 9, (1,), generator=generator))
        return tuple(torch.randint(WORDS - 1, (count,), generator=generator).tolist())

    prompts, sequences, decided, first, episodes = [], [], [], [], []
    for i in range(n):
        turns = tuple(Turn(written(1), f"it is {i}") for _ in range(i % 3))
        prompt = Prompt(i // 3, REQUESTS[i // 3], system="You are an agent.", turns=turns)
        before = policy.read([replace(prompt, turns=turns[:k]) for k in range(len(turns) + 1)])
        answers = [*(turn.answer for turn in turns), written(12)]
        whole = torch.tensor([*before[-1].tolist(), *answers[-1]])
        mask = torch.zeros(len(whole), dtype=torch.bool)
        for start, answer in zip(map(len, before), answers, strict=True):
            mask[start : start + len(answer)] = True
        prompts.append(prompt)
        sequences.append(whole)
        decided.append(mask)
        first.append(len(before[0]))
        call = Call("<tool_call>", "search", {"query": f"query {i}"}, "it is")
        episodes.append(Episode((call,) * len(turns), Program(f"picture {i}"), "answer"))
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    there = nn.utils.rnn.pad_sequence(decided, batch_first=True)
    length = torch.tensor([len(one) for one in sequences])
    with torch.no_grad():
        log_prob = policy.log_probs(ids, length, [prompt.key for prompt in prompts], temperature)
    log_prob = torch.where(there, log_prob.float(), 0.0)
    given = Tokens(ids, length, torch.tensor(first), there, log_prob, torch.ones(n, dtype=torch.bool), temperature)
    index, blank = torch.arange(n), torch.zeros(n, 0)
    texts = tuple(one.program.gen_prompt if one.program else "" for one in episodes)
    return Samples(
        blank, blank, tuple(prompts), index // 3, index, index, 0, n, tokens=given, texts=texts,
        episodes=tuple(episodes),
    )  # fmt: skip


# The first and the last group differ enough to be learnt from.
SCORES = scores_of([0.1, 0.9, 0.2, 0.5, 0.6, 0.5, 0.8, 0.4, 0.3])


def rolled(
    algorithm: SDL, context: Context, policy: Reader, scores: Scores = SCORES
) -> tuple[Samples, SDLRows, TaughtRows]:
    samples = sampled(policy)
    rows = algorithm.rows(samples, scores, context)
    return samples, rows, algorithm.before(models_of(policy), rows, 4)


def gradient_of(policy: Reader, algorithm: SDL, rows: TaughtRows, micro: int | None = None, ref: Any = None) -> Tensor:
    """As the learner has it, over micro-batches."""
    trained: Any = SimpleNamespace(trainable=dict(policy.named_parameters()), device=CPU, sets={})
    learner = Learner(trained, LearnerOptions(lr=1.0, batch=len(rows), micro_batch=micro), Processes())
    learner.gradient(algorithm.loss, models_of(policy, ref), rows)
    return torch.cat([one.grad.clone() for one in policy.parameters() if one.grad is not None])


# ---- what is taught --------------------------------------------------------------------------------------------------


def test_requests_are_taught_with_what_their_groups_have_shown(context: MakeContext) -> None:
    at = context(step=4)
    samples, rows, taught = rolled(SDL(), at, Reader())
    assert [entry.bundle.prompt for entry in remembered(at.state, 500).entries] == ["picture 1", "picture 6"]
    best = Bundle("query 1", "", "", "picture 1", "looked nothing up; wrote: picture 0")
    for i, (prompt, said) in enumerate(zip(samples.prompts, rows.taught, strict=True)):
        if i // 3 == 1:
            assert said is None, "its group has shown nothing"
            continue
        assert said is not None
        assert (said.text, said.turns) == (prompt.text, prompt.turns)
        assert said.system.startswith("You are an agent.\n\nExperience:\n")
        if i // 3 == 0:
            assert said.system == f"You are an agent.\n\n{told(best)}"
    assert (taught.teacher_length > 0).tolist() == [True] * 3 + [False] * 3 + [True] * 3


def test_the_experience_never_reaches_the_student(context: MakeContext) -> None:
    policy = Reader()
    samples, rows, taught = rolled(SDL(), context(), policy)
    assert samples.tokens is not None
    for one in (rows, taught):
        assert torch.equal(one.ids, samples.tokens.ids)
        assert torch.equal(one.length, samples.tokens.length)
        assert one.cond == tuple(prompt.key for prompt in samples.prompts)
    for i, prompt in enumerate(samples.prompts):
        assert "Experience" not in prompt.system
        (whole,) = policy.read([prompt])
        assert torch.equal(taught.ids[i, : len(whole)], whole)
        assert taught.teacher_cond[i] not in taught.cond


def test_the_teacher_reads_the_students_tokens_behind_its_own_prompt(context: MakeContext) -> None:
    policy = Reader()
    _, _, rows = rolled(SDL(), context(), policy)
    for i in (0, 1, 2, 6, 7, 8):
        prompt = rows.taught[i]
        assert prompt is not None
        (first,) = policy.read([replace(prompt, turns=())])
        mine = rows.ids[i, int(rows.prompt[i]) : int(rows.length[i])]
        assert len(first) > int(rows.prompt[i])
        assert rows.teacher_ids[i, : int(rows.teacher_length[i])].tolist() == [*first.tolist(), *mine.tolist()]
        assert rows.teacher_cond[i] == prompt.key


def test_a_token_is_scored_at_its_own_place(context: MakeContext) -> None:
    # The log-probs depend on the token before alone: teacher and student agree, unless they are a place apart.
    policy = Reader(guided=False)
    _, _, rows = rolled(SDL(), context(), policy)
    found = SDL().loss(models_of(policy, policy), rows)
    assert found.metrics["sdl/taught"].sum() == 6
    assert found.metrics["sdl/gap"].abs().max() == 0
    assert found.terms["sdl"][0].abs().max() == 0
    apart = replace(rows, teacher_ids=rows.teacher_ids.roll(1, 1))
    assert SDL().loss(models_of(policy, policy), apart).metrics["sdl/gap"].max() > 0.1


def test_the_teacher_is_the_policy_of_the_moment(context: MakeContext) -> None:
    policy = Reader()
    _, _, rows = rolled(SDL(), context(), policy)
    moved = Reader(seed=7)
    moved.known = policy.known
    some = rows.select(torch.tensor([1]))
    ids = some.teacher_ids[:, : int(some.teacher_length[0])]
    whole = moved.log_probs(ids, some.teacher_length, some.teacher_cond, 0.8)[0]
    mine = teacher_log_probs(moved, some)[0]
    place = torch.nonzero(some.decided[0]).flatten()
    torch.testing.assert_close(mine[place], whole[place + int(some.teacher_length[0] - some.length[0])])
    assert not mine.requires_grad


def test_a_conversation_that_is_read_otherwise_is_an_error(context: MakeContext) -> None:
    class Forgetful(Reader):
        def _ids(self, prompt: Prompt) -> Tensor:
            found = super()._ids(prompt)
            return found.index_fill(0, torch.tensor(-2), 0) if prompt.turns and "Experience" in prompt.system else found

    with pytest.raises(RuntimeError, match="reads a conversation otherwise"):
        rolled(SDL(), context(), Forgetful())


def test_what_is_too_long_is_not_taught_and_counted(context: MakeContext) -> None:
    policy = Reader()
    _, _, whole = rolled(SDL(), context(), policy)
    limit = int(whole.teacher_length[0])  # that of a conversation without turns, and longer than its prompt
    _, _, rows = rolled(SDL(), context(), Reader(longest=limit))
    taught = (rows.teacher_length > 0).tolist()
    assert taught[0]
    assert not all(taught[:3])
    assert rows.too_long.tolist() == [
        prompt is not None and not there for prompt, there in zip(rows.taught, taught, strict=True)
    ]
    found = SDL().loss(models_of(policy, policy), rows)
    assert found.metrics["sdl/too_long"].tolist() == rows.too_long.double().tolist()
    assert (found.terms["sdl"][1] > 0).tolist() == taught


def test_the_memory_reaches_over_steps_and_survives_them(context: MakeContext) -> None:
    algorithm, at = SDL(capacity=3), context()
    at.state.update(algorithm.start(SimpleNamespace(context=at)))  # type: ignore[arg-type]
    algorithm.rows(sampled(Reader()), SCORES, at)
    flat = scores_of([0.5] * 9)
    rows = algorithm.rows(sampled(Reader()), flat, replace(at, step=1))
    assert [prompt is not None for prompt in rows.taught] == [True] * 3 + [False] * 3 + [True] * 3
    assert float(rows.memory) == 2
    rows = algorithm.rows(sampled(Reader()), SCORES, replace(at, step=2))
    assert float(rows.memory) == 3
    assert [entry["step"] for entry in at.state["experience"]] == [0, 2, 2]


def test_several_processes_teach_what_one_does(context: MakeContext) -> None:
    samples = sampled(Reader())
    single = context()
    whole = SDL().rows(samples, SCORES, single)

    def work(part: Tensor) -> Callable[[Any], Any]:
        mine, scores = samples.select(part), scores_of(SCORES.raw[part, 0].tolist())
        at = context(state={})
        return lambda gather: (SDL().rows(mine, scores, replace(at, gather=gather)), at.state)

    parts = (torch.arange(2), torch.arange(2, 8), torch.arange(8, 9))
    for part, (rows, state) in zip(parts, Meeting(3).run([work(part) for part in parts]), strict=True):
        assert state["experience"] == single.state["experience"]
        assert torch.equal(state["experience_vectors"], single.state["experience_vectors"])
        assert rows.taught == tuple(whole.taught[i] for i in part.tolist())
        assert torch.equal(rows.advantage, whole.advantage[part])


def test_a_process_without_samples_has_rows_too(context: MakeContext) -> None:
    policy = Reader()
    _, rows, _ = rolled(SDL(), context(), policy)
    none = rows.select(torch.zeros(0, dtype=torch.int64))
    assert len(SDL().before(models_of(policy), none, 4)) == 0


def test_it_needs_episodes(context: MakeContext) -> None:
    with pytest.raises(ValueError, match="use the rollout `agent`"):
        SDL().rows(replace(sampled(Reader()), episodes=()), SCORES, context())


# ---- the loss of sequences -------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_share": 1.0, "estimator": "log_ratio"},
    {"gate": "gain"},
    {"weight": 0.5, "aggregate": "dapo", "top_share": 0.5},
    {"weight": 0.5, "aggregate": "grpo", "policy": None},
]


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_gradient_does_not_depend_on_how_rows_are_split(
    context: MakeContext, options: dict[str, Any], micro: int
) -> None:
    algorithm, policy = SDL(**options), Reader()
    _, _, rows = rolled(algorithm, context(), policy)
    with torch.no_grad():
        policy.table.weight.mul_(1.1)
    whole = gradient_of(policy, algorithm, rows, ref=policy)
    shuffled = rows.select(torch.tensor([4, 8, 1, 5, 0, 2, 7, 3, 6]))
    part = gradient_of(policy, algorithm, shuffled, micro, policy)
    assert whole.norm() > 1e-2
    assert (part - whole).norm() <= 1e-9 * whole.norm()


def test_the_teacher_gets_no_gradient(context: MakeContext) -> None:
    # Teacher and student are one table: the gradient is as if the teacher's log-probs were numbers.
    algorithm, policy = SDL(**ALONE), Reader()
    _, _, rows = rolled(algorithm, context(), policy)
    found = gradient_of(policy, algorithm, rows)
    teacher = teacher_log_probs(policy, rows).detach()
    log_prob = policy.log_probs(rows.ids, rows.length, rows.cond, 0.8)
    there = rows.decided & (rows.teacher_length > 0)[:, None]
    gap = torch.where(there, log_prob - teacher, 0.0)
    rho = torch.exp(torch.where(there, log_prob - rows.old_log_prob, 0.0))
    assert gap.abs().max() < 10
    total = (rho * (torch.expm1(-gap) + gap)).sum() / 6  # sequences that are taught
    expected = torch.autograd.grad(total, list(policy.parameters()))
    assert found.norm() > 1
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-8)


def test_the_tokens_that_count_are_decided_taught_and_among_the_largest(context: MakeContext) -> None:
    algorithm, policy = SDL(policy=None, top_share=0.2), Reader()
    _, _, rows = rolled(algorithm, context(), policy)
    student = policy.log_probs(*rows.asked).detach()
    gap = torch.where(rows.decided, (student - teacher_log_probs(policy, rows)).abs(), -1.0)
    student[~rows.decided] = -1000.0  # what a tool said may be next to impossible
    student.requires_grad_()

    class Mixed:
        def log_probs(self, ids: Tensor, length: Tensor, cond: Sequence[str], temperature: float = 1.0) -> Tensor:
            return student[:, : ids.shape[1]] if cond == rows.cond else policy.log_probs(ids, length, cond, temperature)

    found = algorithm.loss(models_of(Mixed()), rows)
    value, weight = found.terms["sdl"]
    (gradient,) = torch.autograd.grad((value * weight).sum(), student)
    for i in range(9):
        count = max(1, int(rows.decided[i].sum()) // 5) if i // 3 != 1 else 0
        expected = gap[i].argsort(descending=True, stable=True)[:count].sort().values
        assert torch.nonzero(gradient[i]).flatten().tolist() == expected.tolist()
    assert found.metrics["sdl/selected"][0] == pytest.approx(
        max(1, int(rows.decided[0].sum()) // 5) / int(rows.decided[0].sum())
    )


def test_grpo_is_that_of_token_grpo(context: MakeContext) -> None:
    algorithm, policy, other = SDL(), Reader(), Reader(seed=3)
    _, _, rows = rolled(algorithm, context(), policy)
    other.known = policy.known
    assert algorithm.policy is not None
    plain = algorithm.policy.loss(models_of(policy, other), rows)
    found = algorithm.loss(models_of(policy, other), rows)
    assert set(found.terms) == {"policy", "kl", "sdl"}
    for name, (value, weight) in plain.terms.items():
        assert torch.equal(found.terms[name][0], value)
        assert torch.equal(found.terms[name][1], weight)
    for name, column in plain.metrics.items():
        assert torch.equal(found.metrics[name], column)
    assert not any(column.requires_grad or column.shape != (9,) for column in found.metrics.values())


def test_a_student_is_asked_once(context: MakeContext) -> None:
    policy, asked = Reader(), list[int]()
    _, _, rows = rolled(SDL(), context(), policy)

    class Counting:
        def log_probs(self, ids: Tensor, *rest: Any) -> Tensor:
            asked.append(len(ids))
            return policy.log_probs(ids, *rest)

    SDL().loss(models_of(Counting(), policy), rows)
    assert asked == [9, 6], "the student, and a teacher of those that are taught"


def test_what_was_not_scored_or_taught_counts_for_nothing(context: MakeContext) -> None:
    scores = scores_of([0.1, 0.9, math.nan, 0.5, 0.6, 0.5, 0.8, 0.4, 0.3])
    policy = Reader()
    _, _, rows = rolled(SDL(), context(), policy, scores)
    found = SDL().loss(models_of(policy, policy), rows)
    assert found.terms["sdl"][1].tolist() == [1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert found.metrics["sdl/taught"].tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert found.metrics["sdl/distilled"].tolist() == [1, 1, 0, 0, 0, 0, 1, 1, 1]
    for name in ("sdl/divergence", "sdl/gap", "sdl/gain", "sdl/selected"):
        assert found.metrics[name][3:6].abs().max() == 0
    assert found.metrics["sdl/memory"].tolist() == [2.0] * 9
    assert found.metrics["sdl/unread"].tolist() == [0.0] * 9


def test_a_step_that_teaches_nothing_has_no_gradient(context: MakeContext) -> None:
    policy = Reader()
    _, _, rows = rolled(SDL(policy=None), context(), policy, scores_of([0.5] * 9))
    assert rows.teacher_ids.shape == (9, 0)
    assert gradient_of(policy, SDL(policy=None), rows).abs().max() == 0


def test_the_gate_leaves_sequences_that_the_experience_judges_wrongly(context: MakeContext) -> None:
    policy = Reader()
    _, _, rows = rolled(SDL(), context(), policy)
    free = SDL().loss(models_of(policy, policy), rows)
    held = SDL(gate="gain").loss(models_of(policy, policy), rows)
    gap = policy.log_probs(*rows.asked).detach() - teacher_log_probs(policy, rows)
    gain = -(gap * rows.decided).sum(1) / rows.decided.sum(1)
    expected = (rows.advantage * gain > 0) & (rows.teacher_length > 0)
    assert 0 < int(expected.sum()) < 6
    assert held.terms["sdl"][1].tolist() == expected.double().tolist()
    assert torch.equal(held.terms["sdl"][0], free.terms["sdl"][0])
    taught = (rows.teacher_length > 0).double()
    torch.testing.assert_close(held.metrics["sdl/gain"], gain * taught)


def test_a_language_model_teaches_itself(context: MakeContext, tmp_path: Path) -> None:
    """A real network with its chat template: the teacher's log-probs are those of the whole conversation that it reads,
    and every step of the flow fits the other."""
    policy = LanguagePolicy(tiny_llm.loaded(tiny_llm.save(tmp_path, "qwen3"), 2048), None, CPU, "fp32", 0)
    policy.keep("reference")
    algorithm, current = SDL(top_share=1.0, weight=1.0, aggregate="sum"), policy.models.current
    samples = sampled(current)
    rows = algorithm.before(policy.models, algorithm.rows(samples, SCORES, context()), 4)
    found = algorithm.loss(policy.models, rows)
    assert found.metrics["ratio/deviation"].max() < 1e-4
    assert found.metrics["sdl/taught"].tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]
    for i in (1, 8):  # of one turn and of two
        prompt = rows.taught[i]
        assert prompt is not None
        (read,) = current.read([prompt])
        ids = torch.cat([read, rows.ids[i, len(current.read([samples.prompts[i]])[0]) : int(rows.length[i])]])
        with torch.no_grad():
            alone = current.log_probs(ids[None], torch.tensor([len(ids)]), [prompt.key], 0.8)[0, len(read) :]
        mine = teacher_log_probs(current, rows)[i, : int(rows.length[i])][-len(alone) :]
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-4)
    value, weight = found.terms["sdl"]
    gradient = torch.autograd.grad((value * weight).sum(), list(policy.trainable.values()), allow_unused=True)
    assert sum(float(one.norm()) for one in gradient if one is not None) > 0


# ---- options ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_genevolves() -> None:
    one = registry.build("algorithms", "sdl", {})
    assert one == SDL()
    assert (one.policy.bounds, one.policy.kl, one.policy.kl_form, one.policy.form) == (
        (0.2, 0.28), 0.001, "k3_ratio", "sum",
    )  # fmt: skip
    assert (one.form, one.scale, one.estimator, one.rho_cap, one.clamp, one.top_share) == (
        "sum", 2.0, "k3", 2.0, 10.0, 0.1,
    )  # fmt: skip
    assert (one.gap, one.compare, one.capacity, one.similarity, one.gate) == (0.2, 8, 500, 0.84, "none")


def test_options_nest() -> None:
    plain = registry.build(
        "algorithms", "sdl", {"policy": {"kl": 0, "advantage": "no_std"}, "weight": 1, "aggregate": "grpo"}
    )
    assert plain.policy == TokenGRPO(kl=0.0, advantage="no_std")
    assert plain.advantage == "no_std"
    assert not plain.needs().reference
    alone = registry.build("algorithms", "sdl", {"policy": None})
    assert alone.policy is None
    assert (alone.needs().reference, alone.needs().log_prob, alone.needs().group) == (False, True, 2)
    endpoint = {"name": "endpoint", "model": "m", "endpoints": {"urls": ["http://127.0.0.1:9"]}}
    asked = registry.build("algorithms", "sdl", {"summariser": endpoint, "embedding": {"name": "model", "path": "x"}})
    assert asked.summariser.endpoints.urls == ("http://127.0.0.1:9",)
    assert asked.embedding.path == "x"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weight": 1.0}, "weight and aggregate go together"),
        ({"aggregate": "grpo"}, "weight and aggregate go together"),
        ({"weight": 0.0, "aggregate": "sum"}, "weight must be above 0, not 0"),
        ({"rho_cap": 1.0}, "rho_cap must be above 1, not 1"),
        ({"clamp": 0.0}, "clamp must be above 0, not 0"),
        ({"top_share": 0.0}, "top_share must be above 0 and at most 1, not 0.0"),
        ({"top_share": 1.5}, "top_share must be above 0 and at most 1, not 1.5"),
        ({"gap": -0.1}, "gap must be 0 or more, not -0.1"),
        ({"similarity": 1.2}, "similarity is a cosine within -1..1, not 1.2"),
        ({"compare": 0}, "compare must be 1 or more, not 0"),
        ({"capacity": 0}, "capacity must be 1 or more, not 0"),
        ({"estimator": "k1"}, "'k3', 'k2', 'log_ratio', not 'k1'"),
        ({"gate": "gains"}, "Did you mean 'gain'"),
        ({"policy": {"klip": 0.1}}, "has no option 'klip'. Did you mean 'clip'"),
        ({"policy": {"clip": 2.0}}, "clip must be above 0 and at most 1"),
        ({"summariser": {"name": "rule"}}, "here.summariser.name: .* Did you mean 'rules'"),
        ({"embedding": {"name": "model"}}, "here.embedding: .* say name: model with a path"),
    ],
)
def test_option_errors(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        registry.build("algorithms", "sdl", options, "here")
