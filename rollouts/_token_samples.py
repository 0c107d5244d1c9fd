"""Answers of a token policy as samples, wherever they were written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlkit.data import PromptBatch
from rlkit.language import LanguagePolicy
from rlkit.types import Context, Samples, Span, Tokens


@dataclass(frozen=True)
class Written:
    """One answer: its tokens, the one that ends it included, and what the policy that wrote it made of each."""

    ids: Sequence[int]
    log_probs: Sequence[float]
    finished: bool
    spans: tuple[Span, ...] = ()


def tokens_of(prompts: Sequence[Tensor], answers: Sequence[Written], temperature: float) -> Tokens:
    """The sequences of N answers behind their prompts' ids [P]. Every token of an answer was decided."""
    prompt = torch.tensor([len(one) for one in prompts], dtype=torch.int64)
    length = prompt + torch.tensor([len(one.ids) for one in answers], dtype=torch.int64)
    longest = int(length.max()) if len(length) else 0
    ids = torch.zeros(len(answers), longest, dtype=torch.int64)
    log_prob = torch.zeros(len(answers), longest)
    decided = torch.zeros(len(answers), longest, dtype=torch.bool)
    for row, (before, answer) in enumerate(zip(prompts, answers, strict=True)):
        start, end = int(prompt[row]), int(length[row])
        ids[row, :start] = before.cpu()
        ids[row, start:end] = torch.tensor(list(answer.ids), dtype=torch.int64)
        log_prob[row, start:end] = torch.tensor(list(answer.log_probs))
        decided[row, start:end] = True
    return Tokens(
        ids=ids,
        length=length,
        prompt=prompt,
        decided=decided,
        log_prob=log_prob,
        finished=torch.tensor([one.finished for one in answers], dtype=torch.bool),
        temperature=temperature,
        spans=tuple(one.spans for one in answers) if any(one.spans for one in answers) else (),
    )


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
    ends = set(policy.model.ends)
    said = [[token for token in one.ids if token not in ends] for one in written]
    return Samples(
        media=torch.zeros(len(index), 0),
        latents=torch.zeros(len(index), 0),
        prompts=asked,
        group=index // prompts.group,
        index=index,
        sample_id=context.step * len(prompts) + index,
        version=version,
        total=len(prompts),
        tokens=tokens_of(before, written, temperature),
        texts=tuple(policy.model.decode(said)) if said else (),
    )
