"""Supervised fine-tuning on tokens (arXiv 2203.02155, its first step): what somebody wrote becomes likelier.

A row is one sequence, and its loss the cross-entropy of the tokens that are marked as decided: the answers of whoever
showed how it is done. What a tool said and the prompt are read, and not learnt. Scores are not looked at.

Log-probs are those at temperature 1, whatever the samples say: nothing was sampled.

There is no reference code. Packing several conversations into one sequence, and noise on the embeddings (NEFTune), are
left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlkit import tokens
from rlkit.tokens import TokenRows
from rlkit.types import Algorithm, Context, Loss, Needs, Samples, Scores, TokenPolicy


@dataclass(frozen=True)
class SFT(Algorithm):
    """Supervised fine-tuning on tokens: the cross-entropy of what a demonstration wrote, turn by turn."""

    kind = "tokens"
    paper = "arXiv 2203.02155"

    aggregate: Literal["dapo", "grpo"] = "dapo"  # dapo: all tokens count alike; grpo: all sequences do

    def needs(self) -> Needs:
        return Needs("tokens", rewards=False, group=1, rows=1)

    def rows(self, samples: Samples, scores: Scores, context: Context) -> TokenRows:
        everyone = torch.ones(len(samples), dtype=torch.bool)
        return TokenRows.from_samples(samples, torch.zeros(len(samples)), everyone)

    def loss(self, models: Any, rows: TokenRows) -> Loss:
        """models: sets of a token policy."""
        rows = rows.trimmed()
        current: TokenPolicy = models.current
        found = current.log_probs(rows.ids, rows.length, rows.cond, 1.0)
        surprise = -tokens.decided_only(found, rows.decided)  # [B, L]
        value, weight = tokens.aggregate(surprise, rows.decided, self.aggregate)
        return Loss({"sft": (value, weight)}, {"nll": tokens.token_mean(surprise.detach(), rows.decided)})
