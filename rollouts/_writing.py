"""Sampling answers of a token policy in this process: the oracle that other rollouts of words are tested against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.language import LanguagePolicy
from rlkit.rollouts._token_samples import Written, samples_of
from rlkit.types import Context, Plan, Prompt, Samples, generator


class Writing:
    """A started rollout of words. Its weights are the learner's, so `load` only takes note of their version."""

    def __init__(
        self,
        policy: LanguagePolicy,
        processes: Processes,
        most: int,
        temperature: float,
        limit: int | None,
        top_p: float = 1.0,
    ) -> None:
        self.policy, self.processes = policy, processes
        self.most, self.temperature, self.limit, self.top_p = most, temperature, limit, top_p
        self.version = 0

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.version = version

    def health(self) -> str:
        return "ok"

    def collect(self, prompts: PromptBatch, plan: Plan, context: Context) -> Samples:
        """This process's share of the step's samples."""
        share = self.processes.share(len(prompts))
        asked = [prompts.prompts[i // prompts.group] for i in share]
        written = self.write(asked, [(i,) for i in share], plan, context)
        index = torch.arange(share.start, share.stop)
        return samples_of(self.policy, prompts, index, written, self.temperature, self.version, context)

    def write(
        self, prompts: Sequence[Prompt], places: Sequence[tuple[int, ...]], plan: Plan, context: Context
    ) -> list[Written]:
        """One answer to each prompt, whoever asks. Each answer's randomness is its own, keyed by its place."""
        self.policy.conditions.encode(prompts)
        key = (context.seed, context.stage, context.step, "answer")
        size = self.limit or max(1, len(prompts))
        written: list[Written] = []
        for start in range(0, len(prompts), size):
            keys = [prompt.key for prompt in prompts[start : start + size]]
            draws = [generator(*key, *place) for place in places[start : start + size]]
            found = self.policy.answer(keys, draws, self.most, self.temperature, plan.policy_set, self.top_p)
            written += [Written(*one) for one in zip(found.ids, found.log_probs, found.finished, strict=True)]
        return written
