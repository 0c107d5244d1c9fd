"""SDL: what a group's best and worst tries teach, distilled into the policy token by token (GenEvolve, arXiv
2605.21605; Skill-SD, arXiv 2604.10674).

A step's groups whose best and worst differ enough are summarised into a memory of experience. The teacher is the policy
itself, without gradient, that reads the request with the experience of the most similar request; it scores the tokens
that the student sampled without it. With l = log p_student - log p_teacher of a token, and rho = p_student / p_old:

    loss = GRPO + weight * (1 / N) sum_i sum_j rho k3(l)        k3(l) = e^-l - 1 + l

over the N sequences that have an experience. The value is an estimate of KL(student || teacher). So is the gradient as
long as rho has one: rho k3 + rho (1 - e^-l) = rho l. Of a detached rho it would be the other KL(teacher || student)'s.
Estimators, which below both caps all pull a token by rho l:

    k3         rho k3(l) with a live rho, held at `rho_cap` above it: there the pull is rho_cap (1 - e^-l)
    k2         sg(rho) l^2 / 2
    log_ratio  sg(rho l) log p, SDPO's (arXiv 2601.20802)

GenEvolve published no training code. Ours are: l is kept within `clamp` in all that is made of it, the pull included; a
clamp that stopped the gradient of k3 would leave rho's alone, e^10 strong and away from the teacher. Which tokens are
the `top_share` is decided in each sequence by itself, by |l|, so that a sequence's loss does not depend on its company;
only these tokens enter the sum or the mean. The same group may be taught with what it has just shown. The teacher has
the weights of the moment, also after the first update of a step. A sequence whose experience is too long for the
backbone is not distilled.

The experience stands in the teacher's system text alone, and its answers are never sampled. Left out: distilling whole
distributions (full or top-k logits), and a teacher that is an average of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlkit import tokens
from rlkit.agents.experience import Bundle, Embed, Embedding, Memory, remembered, told
from rlkit.agents.summaries import Summarise, Summariser, learnt
from rlkit.algorithms.token_grpo import TokenGRPO
from rlkit.errors import DataError
from rlkit.tokens import TokenRows
from rlkit.types import Algorithm, Context, Loss, Needs, Prompt, Samples, Scores, State, TokenPolicy, Tools

# GenEvolve's:
POLICY = TokenGRPO(clip=0.2, clip_high=0.28, kl=1e-3, aggregate="sum")
WEIGHT = 2.0  # of the divergence, summed over tokens
RULES, WORDS = Summariser(), Embedding()


@dataclass(frozen=True)
class SDLRows(TokenRows):
    """Token rows, and what a teacher is to read of each. The student's ids and prompt know nothing of it."""

    prompt: Tensor  # [B] int64, tokens before the student's first answer
    taught: tuple[Prompt | None, ...]  # [B] the prompt with experience; None: there is none
    memory: Tensor  # [] bundles that are remembered
    unread: Tensor  # [] share of the step's comparisons that gave no bundle


@dataclass(frozen=True)
class TaughtRows(SDLRows):
    """The same sequences as the teacher reads them: another prompt, and behind it the same tokens."""

    teacher_ids: Tensor  # [B, T] int64, padded at the end
    teacher_length: Tensor  # [B] int64; 0: not taught
    teacher_cond: tuple[str, ...]  # [B]
    too_long: Tensor  # [B] bool: with the experience there would be no room for the answer


@dataclass(frozen=True)
class SDL(Algorithm):
    """SDL: token GRPO, and distillation of a policy that reads what its best and worst tries have taught."""

    kind = "tokens"
    paper = "arXiv 2605.21605"

    policy: TokenGRPO | None = POLICY
    "Options of token_grpo: a mapping has its defaults, and without one it is as GenEvolve's. null: distillation alone."
    weight: float | None = None  # of the divergence; None: 2.0 of a sum over tokens
    aggregate: Literal["sum", "grpo", "dapo"] | None = None  # of its tokens; None: sum
    estimator: Literal["k3", "k2", "log_ratio"] = "k3"
    rho_cap: float = 2.0  # the largest p_student / p_old that a token is weighed by
    clamp: float = 10.0  # the largest |l|
    top_share: float = 0.1  # of each sequence's tokens, one at least: those with the largest |l|
    gate: Literal["none", "gain"] = "none"
    "gain: only sequences that the experience helps to judge, advantage * mean(log p_teacher - log p_student) > 0."
    gap: float = 0.2  # between the best and worst total of a group that is learnt from
    compare: int = 8  # groups a step that are learnt from: those with the largest gaps
    capacity: int = 500  # bundles that are remembered
    similarity: float = 0.84  # the least cosine of a request and the one whose bundle it is taught with
    summariser: Summariser = RULES  # who compares, {name: rules} or {name: endpoint, endpoints: ..., model: ...}
    embedding: Embedding = WORDS  # how requests are compared, {name: words} or {name: model, path: ...}

    def __post_init__(self) -> None:
        if (self.weight is None) != (self.aggregate is None):
            what = "weight and aggregate go together, since a sum over tokens is as many times larger than their mean"
            raise ValueError(f"{what}: give both, as weight: 2.0 with aggregate: sum, or neither")
        for name, value in (("rho_cap", self.rho_cap - 1), ("clamp", self.clamp), ("weight", self.scale)):
            if not value > 0:
                least = 1 if name == "rho_cap" else 0
                raise ValueError(f"{name} must be above {least}, not {value + least:g}")
        if not 0 < self.top_share <= 1:
            raise ValueError(f"top_share must be above 0 and at most 1, not {self.top_share}")
        if self.gap < 0:
            raise ValueError(f"gap must be 0 or more, not {self.gap}")
        if not -1 <= self.similarity <= 1:
            raise ValueError(f"similarity is a cosine within -1..1, not {self.similarity}")
        for name, count in (("compare", self.compare), ("capacity", self.capacity)):
            if count < 1:
                raise ValueError(f"{name} must be 1 or more, not {count}")

    @property
    def form(self) -> tokens.Aggregate:
        return self.aggregate or "sum"

    @property
    def scale(self) -> float:
        return WEIGHT if self.weight is None else self.weight

    @property
    def grpo(self) -> TokenGRPO:
        """What makes rows; of distillation alone too, whose gate reads advantages."""
        return self.policy or TokenGRPO()

    @property
    def advantage(self) -> str | None:
        """How samples are compared, which a recipe's check of its total wants to know."""
        return self.grpo.advantage

    @cached_property
    def _summarise(self) -> Summarise:
        return self.summariser.open()

    @cached_property
    def _embed(self) -> Embed:
        return self.embedding.open()

    def needs(self) -> Needs:
        if self.policy is None:
            return Needs("tokens", log_prob=True, group=2, rows=1)
        return replace(self.policy.needs(), advantage=False)  # a group of equal scores can still be distilled

    def start(self, tools: Tools) -> State:
        return Memory(self.capacity).state()

    def rows(self, samples: Samples, scores: Scores, context: Context) -> SDLRows:
        if samples.tokens is None or len(samples.episodes) != len(samples):
            raise ValueError("SDL learns from the episodes of an agent: use the rollout `agent`")
        rows = self.grpo.rows(samples, scores, context)
        memory = remembered(context.state, self.capacity)
        memory, unread = learnt(samples, scores, context, memory, self._summarise, self._embed, self.gap, self.compare)
        context.state.update(memory.state())
        return SDLRows(
            **rows.columns(),  # type: ignore[arg-type]
            prompt=samples.tokens.prompt,
            taught=tuple(map(with_experience, samples.prompts, self._found(samples.prompts, memory))),
            memory=torch.tensor(float(len(memory))),
            unread=torch.tensor(unread),
        )

    def _found(self, prompts: Sequence[Prompt], memory: Memory) -> list[Bundle | None]:
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))
        found = memory.find(self._embed(texts), self.similarity) if len(memory) else [None] * len(texts)
        of = dict(zip(texts, found, strict=True))
        return [of[prompt.text] for prompt in prompts]

    def before(self, models: Any, rows: SDLRows, size: int) -> TaughtRows:
        return read_by_teacher(self.grpo.before(models, rows, size), models.current)

    def loss(self, models: Any, rows: TaughtRows) -> Loss:
        """models: sets of a token policy."""
        rows = rows.trimmed()
        current: TokenPolicy = models.current
        log_prob = tokens.decided_only(current.log_probs(*rows.asked), rows.decided)  # [B, L]
        found = self.policy.loss_of(log_prob, models, rows) if self.policy is not None else Loss({})
        there = rows.decided & (rows.teacher_length > 0)[:, None]
        gap = tokens.decided_only(log_prob - teacher_log_probs(current, rows).to(log_prob), there)  # l, [B, L]
        chosen = tokens.largest(gap.abs(), there, self.top_share)
        value, weight = tokens.aggregate(self._divergence(gap, log_prob, rows), chosen, self.form)
        weight = weight * rows.weight
        if self.gate == "gain":
            weight = weight * (-rows.advantage * tokens.token_mean(gap.detach(), there) > 0)
        metrics = self._described(gap.detach(), there, chosen, weight, rows)
        return Loss({**found.terms, "sdl": (self.scale * value, weight)}, {**found.metrics, **metrics})

    def _divergence(self, gap: Tensor, log_prob: Tensor, rows: TokenRows) -> Tensor:
        """Of each token. [B, L]"""
        rho = torch.exp(log_prob - rows.old_log_prob).clamp(max=self.rho_cap)
        held = gap + (gap.clamp(-self.clamp, self.clamp) - gap).detach()  # bounded, and its gradient goes on
        if self.estimator == "k3":
            return rho * tokens.token_kl(held, torch.zeros_like(held))
        if self.estimator == "k2":
            return rho.detach() * held.square() / 2
        return (rho * held).detach() * log_prob

    def _described(
        self, gap: Tensor, there: Tensor, chosen: Tensor, weight: Tensor, rows: TaughtRows
    ) -> dict[str, Tensor]:
        """Metrics of each sequence, without gradient; 0 of one that is not taught. [B] each"""
        divergence = tokens.token_kl(gap.clamp(-self.clamp, self.clamp), torch.zeros_like(gap))
        found = {
            "sdl/taught": rows.teacher_length > 0,
            "sdl/distilled": weight > 0,
            "sdl/too_long": rows.too_long,
            "sdl/divergence": tokens.token_mean(divergence, there),
            "sdl/gap": tokens.token_mean(gap.abs(), there),
            "sdl/gain": -tokens.token_mean(gap, there),
            "sdl/selected": tokens.token_mean(chosen.to(gap), there),
            "sdl/memory": rows.memory.expand(len(rows)),
            "sdl/unread": rows.unread.expand(len(rows)),
        }
        return {name: column.to(gap.dtype) for name, column in found.items()}


def with_experience(prompt: Prompt, bundle: Bundle | None) -> Prompt | None:
    """The prompt as a teacher reads it, with the experience behind the system text. None: there is nothing to tell."""
    said = told(bundle) if bundle is not None else ""
    return replace(prompt, system=f"{prompt.system}\n\n{said}".strip()) if said else None


# ---- the teacher -----------------------------------------------------------------------------------------------------


def read_by_teacher(rows: SDLRows, policy: TokenPolicy) -> TaughtRows:
    """The rows with the teacher's ids: its own first prompt, and behind it the student's tokens as they are."""
    ids, keys, too_long = [], [], []
    for place, prompt in enumerate(rows.taught):
        tail = rows.ids[place, int(rows.prompt[place]) : int(rows.length[place])]
        found = None if prompt is None else _read(prompt, tail, policy)
        ids.append(torch.zeros(0, dtype=torch.int64) if found is None else found)
        keys.append("" if found is None or prompt is None else prompt.key)
        too_long.append(prompt is not None and found is None)
    return TaughtRows(
        **rows.columns(),  # type: ignore[arg-type]
        teacher_ids=pad_sequence(ids, batch_first=True) if ids else torch.zeros(0, 0, dtype=torch.int64),
        teacher_length=torch.tensor([len(one) for one in ids], dtype=torch.int64),
        teacher_cond=tuple(keys),
        too_long=torch.tensor(too_long, dtype=torch.bool),
    )


def _read(prompt: Prompt, tail: Tensor, policy: TokenPolicy) -> Tensor | None:
    """The teacher's ids [T]; None where there is no room for them. Its key is then known to the policy."""
    try:
        first, whole = (one.cpu() for one in policy.read([replace(prompt, turns=()), prompt]))
    except DataError:  # of what is too long
        return None
    found = torch.cat([first, tail])
    if len(whole) > len(found) or not torch.equal(whole, found[: len(whole)]):
        # A teacher that reads other tokens would score other tokens.
        raise RuntimeError("the backbone reads a conversation otherwise once experience stands in its system text")
    return found


@torch.no_grad()
def teacher_log_probs(policy: TokenPolicy, rows: TaughtRows) -> Tensor:
    """The teacher's log-prob of each token at the student's position of it; 0 in rows that are not taught. [B, L]"""
    taught = torch.nonzero(rows.teacher_length > 0).flatten()
    if not len(taught):
        return torch.zeros_like(rows.old_log_prob)
    length = rows.teacher_length[taught]
    ids = rows.teacher_ids[taught, : int(length.max())]
    keys = tuple(rows.teacher_cond[place] for place in taught.tolist())
    log_prob = policy.log_probs(ids, length, keys, float(rows.temperature))  # [K, T]
    shift = length - rows.length[taught]  # the tails are the same, so that they end together
    place = torch.arange(rows.ids.shape[1], device=ids.device) + shift[:, None]  # [K, L]
    found = log_prob.new_zeros(rows.ids.shape)
    found[taught] = log_prob.gather(1, place.clamp(0, ids.shape[1] - 1))
    return found
