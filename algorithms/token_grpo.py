"""GRPO on tokens (arXiv 2402.03300): a clipped policy gradient over the answers of a language model.

Every token that the policy chose is a decision, and all tokens of an answer share its group-relative advantage. A row
is one sequence, and its loss is made of its tokens' (eq. 3):

    r_t = p(token) / p_old(token)            loss_t = -min(r_t A, clamp(r_t, 1 - clip, 1 + clip_high) A)

Options that are papers of their own:

    GRPO                      aggregate: grpo, kl: 0.04, kl_form: k3
    GenEvolve (2605.21605)    aggregate: sum, clip: 0.2, clip_high: 0.28, kl: 1.0e-3
    DAPO (2503.14476)         aggregate: dapo, clip: 0.2, clip_high: 0.28, mask_cut: true
    Dr. GRPO (2503.20783)     aggregate: dr_grpo, longest: the limit of an answer, advantage: no_std
    GSPO (2507.18071)         level: sequence; one ratio a sequence, the geometric mean of its tokens'
    truncated importance      importance: truncate, and `mask` to leave out what is too far off: the engine that samples
    sampling                  and the trainer disagree a little about the same weights. The ratio is then measured from
                              the trainer's own log-probs, and the loss weighted by p_trainer / p_engine.

The defaults are those of TRL 1.16 (aggregate, range, no KL), but for `importance`, which costs another forward pass.

Differences from TRL: standard deviations are the population's, and a group of equal scores gives exactly 0; an answer
that is not scored, or was cut off and is masked, does not count among those that a mean is taken over. DAPO's dynamic
sampling and soft punishment of long answers are left out: they are matters of the rollout and of a reward. So are other
losses (CISPO, SAPO, VESPO), and an entropy bonus.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlkit import advantage, tokens
from rlkit.tokens import R, TokenRows
from rlkit.types import Algorithm, Context, Loss, Needs, Samples, Scores, TokenPolicy

# Of the ratio. A sequence's is a mean of many log-ratios, and moves far less than one token's (GSPO, section 5.1).
BOUNDS = {"token": (0.2, 0.2), "sequence": (3e-4, 4e-4)}
WEIGHT = {"truncate": tokens.truncated_weight, "mask": tokens.masked_weight}


@dataclass(frozen=True)
class TokenGRPO(Algorithm):
    """GRPO on tokens: PPO on the answers of a language model, with group-relative advantages."""

    kind = "tokens"
    paper = "arXiv 2402.03300"

    clip: float | None = None  # of the ratio, downwards; None: 0.2, or GSPO's 3e-4 with level: sequence
    clip_high: float | None = None  # upwards; None: as `clip`, or GSPO's 4e-4 where that is not given either
    level: Literal["token", "sequence"] = "token"  # of the ratio that is clipped
    aggregate: Literal["grpo", "dapo", "dr_grpo", "sum"] | None = None  # None: dapo, or grpo with level: sequence
    longest: int | None = None  # tokens, what dr_grpo divides by: the limit of an answer
    mask_cut: bool = False  # leave out answers that a limit cut off
    importance: Literal["off", "truncate", "mask"] = "off"  # correct for the engine that sampled
    importance_level: Literal["token", "sequence"] = "token"  # a sequence's weight is the product of its tokens'
    importance_cap: float = 2.0  # truncate: the largest weight; mask: weights are within 1 / cap and cap
    advantage: Literal["group_norm", "global_norm", "no_std", "leave_one_out", "gdpo"] | None = None
    "None: group_norm, or gdpo where several rewards are summed."
    advantage_clip: float = 5.0
    kl: float = 0.0  # beta of eq. 3
    kl_form: Literal["k2", "k3", "k3_ratio"] = "k3_ratio"
    "k3 is GRPO's; times the ratio (DeepSeek-V3.2) its gradient is the KL's, as that of k2 is until the first update."

    def __post_init__(self) -> None:
        if self.clip is not None and not 0 < self.clip <= 1:
            raise ValueError(f"clip must be above 0 and at most 1, not {self.clip}")
        if self.clip_high is not None and self.clip_high <= 0:
            raise ValueError(f"clip_high must be above 0, not {self.clip_high}")
        if self.clip_high is not None and self.clip is None and self.level == "sequence":
            raise ValueError("clip_high needs `clip` beside it: with level: sequence both are small, as 3e-4 and 4e-4")
        if (self.longest is None) == (self.aggregate == "dr_grpo"):
            raise ValueError("longest is what aggregate: dr_grpo divides by, and only that: give both or neither")
        if self.longest is not None and self.longest < 1:
            raise ValueError(f"longest must be 1 token or more, not {self.longest}")
        if self.importance_cap <= 1:
            raise ValueError(f"importance_cap must be above 1, not {self.importance_cap}: equal policies have weight 1")
        if self.advantage_clip <= 0:
            raise ValueError(f"advantage_clip must be above 0, not {self.advantage_clip}")
        if self.kl < 0:
            raise ValueError(f"kl must be 0 or more, not {self.kl}")

    @property
    def bounds(self) -> tuple[float, float]:
        """How far below and above 1 the ratio may go."""
        low, high = BOUNDS[self.level] if self.clip is None else (self.clip, self.clip)
        return low, high if self.clip_high is None else self.clip_high

    @property
    def form(self) -> tokens.Aggregate:
        """How the tokens of a sequence, and the sequences, are averaged."""
        return self.aggregate or ("dapo" if self.level == "token" else "grpo")

    def needs(self) -> Needs:
        corrects, measured = self.importance != "off", self.kl > 0
        return Needs("tokens", log_prob=True, group=2, rows=1, advantage=True, reference=measured, corrects=corrects)

    def rows(self, samples: Samples, scores: Scores, context: Context) -> TokenRows:
        everyone = advantage.of_step(self.advantage, samples, scores, context)  # [N_total]
        mine = everyone[samples.index].clamp(-self.advantage_clip, self.advantage_clip)
        counted = scores.scored
        if self.mask_cut and samples.tokens is not None:
            counted = counted & samples.tokens.finished
        return TokenRows.from_samples(samples, mine, counted)

    def before(self, models: Any, rows: R, size: int) -> R:
        """The rows with the trainer's own log-probs, before the first update; `size` rows a forward pass."""
        return rows if self.importance == "off" else tokens.recomputed(rows, models.current, size)

    def loss(self, models: Any, rows: TokenRows) -> Loss:
        """models: sets of a token policy."""
        rows = rows.trimmed()
        current: TokenPolicy = models.current
        return self.loss_of(tokens.decided_only(current.log_probs(*rows.asked), rows.decided), models, rows)

    def loss_of(self, log_prob: Tensor, models: Any, rows: TokenRows) -> Loss:
        """The loss where the current policy's log-probs [B, L] of trimmed rows are known, 0 where nobody decided."""
        surrogate, ratio = self._surrogate(log_prob, rows)
        correction, metrics = self._correction(rows)
        value, weight = self._aggregated(surrogate * correction, rows)
        weight = weight * rows.weight
        terms = {"policy": (value, weight)}
        metrics |= self._described(log_prob.detach(), ratio.detach(), rows)
        if self.kl > 0:
            reference: TokenPolicy = models.reference
            known = tokens.decided_only(reference.log_probs(*rows.asked), rows.decided)
            divergence = tokens.token_kl(log_prob, known, "k2" if self.kl_form == "k2" else "k3")
            metrics["kl"] = tokens.token_mean(divergence.detach(), rows.decided)
            divergence = divergence * ratio if self.kl_form == "k3_ratio" else divergence
            terms["kl"] = (self._aggregated(self.kl * divergence, rows)[0], weight)
        return Loss(terms, metrics)

    def _surrogate(self, log_prob: Tensor, rows: TokenRows) -> tuple[Tensor, Tensor]:
        """The clipped surrogate and the ratio of every token, [B, L]; at the level of sequences they are all alike."""
        old = rows.old_log_prob
        if self.level == "sequence":
            log_prob = tokens.sequence_log_ratio(log_prob, old, rows.decided)[:, None].expand_as(old)
            old = torch.zeros_like(old)
        return advantage.clipped_surrogate(log_prob, old, rows.advantage[:, None].expand_as(old), self.bounds)

    def _correction(self, rows: TokenRows) -> tuple[Tensor, dict[str, Tensor]]:
        """What each token's surrogate is multiplied by for the engine's sake, and the metrics of that. [B, L]

        What is masked still counts as a token. Were it not to, a step that is masked whole would be silent about it.
        """
        if self.importance == "off":
            return torch.ones_like(rows.old_log_prob), {}
        if not rows.own:
            raise RuntimeError("importance needs the trainer's own log-probs: `before` comes before the first update")
        both = (rows.old_log_prob, rows.rollout_log_prob, rows.decided)
        weight = WEIGHT[self.importance](*both, self.importance_cap, self.importance_level)
        metrics = tokens.mismatch(*both)
        full = tokens.importance_ratio(*both, self.importance_level)
        return weight, metrics | {"importance/bounded": tokens.token_mean((weight != full).float(), rows.decided)}

    def _aggregated(self, values: Tensor, rows: TokenRows) -> tuple[Tensor, Tensor]:
        return tokens.aggregate(values, rows.decided, self.form, self.longest)

    def _described(self, log_prob: Tensor, ratio: Tensor, rows: TokenRows) -> dict[str, Tensor]:
        """Metrics of each sequence, without gradient. [B] each"""
        low, high = self.bounds
        good = rows.advantage[:, None]
        stopped = ((ratio > 1 + high) & (good > 0)) | ((ratio < 1 - low) & (good < 0))
        decided = rows.decided
        return {
            "ratio/mean": tokens.token_mean(ratio, decided),
            "ratio/deviation": tokens.decided_only((ratio - 1).abs(), decided).amax(1),
            "clip_fraction": tokens.token_mean(stopped.float(), decided),
            # -log p of what was sampled is an estimate of the entropy, unbiased until the first update.
            "entropy": -tokens.token_mean(log_prob, decided),
        }
