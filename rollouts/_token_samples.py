"""Answers of a token policy as samples, wherever they were written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlkit.data.prompts import PromptBatch
from rlkit.language import LanguagePolicy
from rlkit.types import Context, Samples, Span, TokenModel, Tokens


@dataclass(frozen=True)
class Written:
    """One answer: its tokens, the one that ends it included, and what the policy that wrote it made of each."""

    ids: Sequence[int]
    log_probs: Sequence[float]
    finished: bool
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Spoken:
    """One conversation of a policy: its answers, each with how many tokens stand before it."""

    before: Tensor  # [Q] ids of all that stands before the last answer
    answers: tuple[tuple[int, Written], ...]  # the first behind the prompt alone
    finished: bool


def tokens_of(spoken: Sequence[Spoken], temperature: float) -> Tokens:
    """The sequences of N conversations. The tokens of answers were decided; what was said in between was not."""
    prompt = torch.tensor([one.answers[0][0] for one in spoken], dtype=torch.int64)
    ends = [start + len(last.ids) for start, last in (one.answers[-1] for one in spoken)]
    longest = max(ends, default=0)
    ids = torch.zeros(len(spoken), longest, dtype=torch.int64)
    log_prob = torch.zeros(len(spoken), longest)
    decided = torch.zeros(len(spoken), longest, dtype=torch.bool)
    for row, one in enumerate(spoken):
        ids[row, : len(one.before)] = one.before.cpu()
        for start, answer in one.answers:
            end = start + len(answer.ids)
            ids[row, start:end] = torch.tensor(list(answer.ids), dtype=torch.int64)
            log_prob[row, start:end] = torch.tensor(list(answer.log_probs))
            decided[row, start:end] = True
    spans = tuple(_spans(one) for one in spoken)
    return Tokens(
        ids=ids,
        length=torch.tensor(ends, dtype=torch.int64),
        prompt=prompt,
        decided=decided,
        log_prob=log_prob,
        finished=torch.tensor([one.finished for one in spoken], dtype=torch.bool),
        temperature=temperature,
        spans=spans if any(spans) else (),
    )


def _spans(one: Spoken) -> tuple[Span, ...]:
    """Those of all answers, counted from where the first begins."""
    begin = one.answers[0][0]
    placed = ((start - begin, span) for start, answer in one.answers for span in answer.spans)
    return tuple(Span(span.version, span.start + shift, span.end + shift) for shift, span in placed)


def samples_of(
    policy: LanguagePolicy,
    prompts: PromptBatch,
    index: Tensor,
    written: Sequence[Written],
    temperature: float,
    version: int,
    context: Context,
) -> Samples:
    """The samples of the step at these places [N], one answer each; the prompts are encoded."""
    asked = tuple(prompts.prompts[i // prompts.group] for i in index.tolist())
    before = [policy.conditions.of(prompt.key)["ids"] for prompt in asked]
    spoken = [Spoken(ids, ((len(ids), one),), one.finished) for ids, one in zip(before, written, strict=True)]
    return Samples(
        media=torch.zeros(len(index), 0),
        latents=torch.zeros(len(index), 0),
        prompts=asked,
        group=index // prompts.group,
        index=index,
        sample_id=context.step * len(prompts) + index,
        version=version,
        total=len(prompts),
        tokens=tokens_of(spoken, temperature),
        texts=texts_of(policy.model, written),
    )


def texts_of(model: TokenModel, written: Sequence[Written]) -> tuple[str, ...]:
    """What answers say, without the tokens that end them."""
    said = [[token for token in one.ids if token not in model.ends] for one in written]
    return tuple(model.decode(said)) if said else ()
