"""Sampling answers of a token policy in this process: the oracle that other rollouts of words are tested against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlkit.data import PromptBatch
from rlkit.dist import Processes
from rlkit.language import LanguagePolicy
from rlkit.rollouts._token_samples import Written, samples_of
from rlkit.types import Context, Plan, Samples, generator


class Writing:
    """A started rollout of words. Its weights are the learner's, so `load` only takes note of their version."""

    def __init__(
        self, policy: LanguagePolicy, processes: Processes, most: int, temperature: float, limit: int | None
    ) -> None:
        self.policy, self.processes = policy, processes
        self.most, self.temperature, self.limit = most, temperature, limit
        self.version = 0

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.version = version

    def health(self) -> str:
        return "ok"

    def collect(self, prompts: PromptBatch, plan: Plan, context: Context) -> Samples:
        """This process's share of the step's samples. Each answer's randomness is its own, keyed by its place."""
        share = self.processes.share(len(prompts))
        index = torch.arange(share.start, share.stop)
        asked = [prompts.prompts[i // prompts.group] for i in index.tolist()]
        self.policy.conditions.encode(asked)
        written: list[Written] = []
        for part in index.split(self.limit or max(1, len(index))):
            keys = [prompts.prompts[i // prompts.group].key for i in part.tolist()]
            key = (context.seed, context.stage, context.step, "answer")
            draws = [generator(*key, i) for i in part.tolist()]
            found = self.policy.answer(keys, draws, self.most, self.temperature, plan.policy_set)
            written += [Written(*one) for one in zip(found.ids, found.log_probs, found.finished, strict=True)]
        return samples_of(self.policy, prompts, index, written, self.temperature, self.version, context)
