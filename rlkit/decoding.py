"""Sampling answers in this process, a token at a time, with the keys and values of what was read kept.

A row's randomness is its own: one uniform number a token, drawn from the row's generator, and turned into a token by
the inverse of the distribution function in double precision. So an answer depends neither on what stands beside it nor,
up to its end, on how long it might have become. In bf16 a batch of another shape rounds otherwise, and a token may turn
out differently; in fp32 that takes a number within 1e-6 of a boundary.

With a top-p below 1 tokens come from the nucleus alone (arXiv 1904.09751), and the log-probabilities that are told stay
those of the whole distribution, as the trainer computes them: the ratio of both is 1 before the first update. Ignored
is that the nucleus made its tokens likelier than that, and all others impossible.

Left out: top-k and penalties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlkit.errors import LossError
from rlkit.types import Condition, TokenModel


@dataclass(frozen=True)
class Answers:
    """What N prompts were answered with; the token that ends an answer is a part of it."""

    ids: list[list[int]]
    log_probs: list[list[float]]  # of each token under softmax(logits / temperature)
    finished: list[bool]  # false: cut off by a limit


class Remembering:
    """A network that keeps keys and values, so that it reads each token once.

    It is called with whole sequences, as a network without memory is, and answers for their last column only. The
    network below is called as those of transformers are; pictures are given to it with what is read first. Positions
    are given with every call: networks that read pictures would else remember those of an earlier batch
    (`rope_deltas`).
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._kept: Any = None  # transformers' Cache
        self._read = 0  # columns

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **pictures: Any) -> Any:
        """input_ids [B, L]; attention_mask [B, L], 0 for the padding; position_ids [..., B, L]."""
        output = self._call(
            **(pictures if self._kept is None else {}) | {"use_cache": True, "logits_to_keep": 1},
            input_ids=input_ids[:, self._read :],
            attention_mask=attention_mask,
            position_ids=position_ids[..., self._read :],
            past_key_values=self._kept,
        )
        self._kept, self._read = output.past_key_values, input_ids.shape[1]
        return output

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, in this order; one may be there several times."""
        self._kept.batch_select_indices(rows)


def choose(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tokens [B] and their log-probabilities [B] fp32, on the CPU. logits [B, V]; uniform [B] fp64 in 0..1.

    A temperature of 0 takes the likeliest token, and its log-probability at 1. Log-probabilities are of the whole
    distribution, whatever `top_p` leaves of it.
    """
    log_probs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = log_probs.argmax(dim=-1)
    else:
        probabilities = log_probs.double().exp()
        if torch.are_deterministic_algorithms_enabled():  # a sum along a row is not deterministic on a GPU
            probabilities = probabilities.cpu()
        if top_p < 1:
            probabilities = nucleus(probabilities, top_p)
        below = probabilities.cumsum(dim=-1)
        wanted = uniform[:, None].to(below.device) * below[:, -1:]
        tokens = torch.searchsorted(below, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        tokens = tokens.to(log_probs.device)
    chosen = log_probs.gather(1, tokens[:, None])[:, 0].cpu()
    if not torch.isfinite(chosen).all():
        hint = "The weights have diverged, or `temperature` is too small for these logits."
        raise LossError("the policy's logits are not finite: there is nothing to sample from", hint=hint)
    return tokens.cpu(), chosen


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """[B, V] without all but the smallest set of the likeliest tokens that have `top_p` or more together.

    They are not divided by their sum. Of equally likely tokens the first ones are in the set.
    """
    ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered  # what the likelier ones have together: nothing, of the first
    return torch.zeros_like(probabilities).scatter(-1, places, ordered.where(before < top_p, 0.0))


class Batch:
    """Sequences that grow together. What is shorter is padded at its start, so that all of them end in one column."""

    def __init__(self, model: TokenModel, call: Callable[..., Any], conditions: Sequence[Condition]) -> None:
        self._model = model
        self._reader: Any = Remembering(call)
        self._conditions = list(conditions)
        self._together = model.collate(self._conditions)
        device = next(model.net.parameters()).device
        prompts = [one["ids"].to(device) for one in conditions]
        self._ids = pad_sequence(prompts, batch_first=True, padding_side="left")  # [B, L]
        read = [torch.ones_like(one, dtype=torch.bool) for one in prompts]
        self._there = pad_sequence(read, batch_first=True, padding_side="left")  # [B, L]

    def logits(self) -> Tensor:
        """[B, V] for the token that comes next."""
        return self._model.logits(self._reader, self._ids, self._there, self._together)[:, -1]

    def append(self, tokens: Tensor) -> None:
        """tokens [B]"""
        self._ids = torch.cat([self._ids, tokens[:, None].to(self._ids.device)], dim=1)
        self._there = torch.cat([self._there, self._there.new_ones(len(tokens), 1)], dim=1)

    def select(self, places: Sequence[int]) -> None:
        """Go on with these rows, in this order; one may be there several times."""
        at = torch.tensor(places, device=self._ids.device)
        self._reader.select(at)
        self._ids, self._there = self._ids[at], self._there[at]
        self._conditions = [self._conditions[place] for place in places]
        self._together = self._model.collate(self._conditions)


@torch.no_grad()
def sample(
    model: TokenModel,
    call: Callable[..., Any],
    conditions: Sequence[Condition],
    draws: Sequence[torch.Generator],
    most: int,
    temperature: float,
    top_p: float = 1.0,
) -> Answers:
    """One answer for each condition, of at most `most` tokens, and no longer than fits into the model's `longest`.

    call: the network, or what stands in for it with another set of weights. draws: a generator for each row. Rows that
    share a condition, the very same object, share its first reading.
    """
    limits = _limits(model, conditions, draws, most, temperature, top_p)
    answers = Answers([[] for _ in conditions], [[] for _ in conditions], [False for _ in conditions])
    if not conditions:
        return answers
    uniform = torch.stack([torch.rand(most, generator=one, dtype=torch.float64) for one in draws])  # [N, most]
    distinct = {id(one): one for one in conditions}
    batch = Batch(model, call, list(distinct.values()))
    places = [list(distinct).index(id(one)) for one in conditions]
    logits = batch.logits()[places]
    batch.select(places)
    rows = list(range(len(conditions)))  # those that the batch holds
    going = set(rows)
    for step in range(max(limits)):
        tokens, log_probs = choose(logits, uniform[rows, step], temperature, top_p)
        for row, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist(), strict=True):
            if row not in going:
                continue
            answers.ids[row].append(token)
            answers.log_probs[row].append(log_prob)
            answers.finished[row] = token in model.ends
            if answers.finished[row] or step + 1 == limits[row]:
                going.remove(row)
        if not going:
            break
        batch.append(tokens)
        if 2 * len(going) <= len(rows):  # rows that ended go on unheeded until they are half: to leave takes a copy
            batch.select([place for place, row in enumerate(rows) if row in going])
            rows = [row for row in rows if row in going]
        logits = batch.logits()
    return answers


def _limits(
    model: TokenModel,
    conditions: Sequence[Condition],
    draws: Sequence[torch.Generator],
    most: int,
    temperature: float,
    top_p: float,
) -> list[int]:
    """How many tokens each answer may have. A ValueError for what cannot be sampled."""
    if len(draws) != len(conditions):
        raise ValueError(f"{len(conditions)} rows need a generator each, not {len(draws)} in all")
    if most < 1:
        raise ValueError(f"an answer has one token at least: most must be 1 or more, not {most}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (the likeliest token) or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (all tokens), not {top_p}")
    limits = [min(most, model.longest - len(one["ids"])) for one in conditions]
    if min(limits, default=1) < 1:
        longest = max(len(one["ids"]) for one in conditions)
        raise ValueError(f"a prompt of {longest} tokens leaves no room for an answer within {model.longest}")
    return limits
