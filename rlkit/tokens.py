"""Log-probs of sampled tokens, what is made of them, and the rows that carry them: tensors, and no model.

A token at position i of ids [B, L] is predicted by the logits at i - 1, so that the first has no log-prob. `decided`
[B, L] says which tokens the policy chose; the others (the prompt, what a tool said, padding) enter no sum and get no
gradient. They are blanked before an exponential, not after: 0 times infinity is NaN.

A temperature belongs to the policy: sampling and training both take log softmax(logits / temperature).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlkit.types import Rows, Samples, TokenPolicy

KLForm = Literal["k1", "k2", "k3"]
Aggregate = Literal["grpo", "dapo", "dr_grpo", "sum"]
Level = Literal["token", "sequence"]


# ---- one token -------------------------------------------------------------------------------------------------------


def log_probs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log p of each token given those before it: [B, L] in fp32 (fp64 of fp64 logits), 0 at the first.

    logits [B, L, V], those at i for token i + 1; ids [B, L], in the padding too within the vocabulary. Logits are the
    largest tensor of a training step: one sequence at a time is taken to fp32, and again when the gradient needs it.
    """
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(f"logits must be [B, L, V] and ids [B, L], not {tuple(logits.shape)} and {tuple(ids.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}: greedy choices have no density")
    found = []
    for one in zip(logits.unbind(), ids.unbind(), strict=True):  # whose gradients are stacked, not summed
        if torch.is_grad_enabled() and logits.requires_grad:
            found.append(checkpoint(_of_sequence, *one, temperature, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(_of_sequence(*one, temperature))
    return torch.stack(found) if found else logits.new_zeros(ids.shape, dtype=_wide(logits.dtype))


def _of_sequence(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    logits = logits[:-1].to(_wide(logits.dtype)) / temperature  # [L-1, V]
    chosen = logits.gather(-1, ids[1:, None]).squeeze(-1)
    return torch.nn.functional.pad(chosen - logits.logsumexp(-1), (1, 0))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def token_kl(log_prob: Tensor, reference: Tensor, form: KLForm = "k3") -> Tensor:
    """Estimates of KL(policy || reference) from tokens that the policy sampled (joschu.net/blog/kl-approx.html). [B, L]

    d = log_prob - reference:
      k1   d             unbiased, and often below 0. No loss: its gradient is 0 in expectation, it pulls nobody.
      k2   d^2 / 2       biased; its gradient is the KL's.
      k3   e^-d - 1 + d  unbiased, never below 0 (GRPO, arXiv 2402.03300, eq. 4). Its gradient is that of the other
                         KL(reference || policy); times the ratio, with its gradient, it is the KL's (DeepSeek-V3.2).
    """
    d = log_prob - reference.detach()
    if form == "k1":
        return d
    if form == "k2":
        return d.square() / 2
    if form == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"the form of a KL must be k1, k2 or k3, not {form!r}")


# ---- one sequence ----------------------------------------------------------------------------------------------------


def decided_only(values: Tensor, decided: Tensor) -> Tensor:
    """The values of decided tokens, 0 in the place of all others. [B, L]"""
    return torch.where(decided, values, torch.zeros_like(values))


def token_mean(values: Tensor, decided: Tensor) -> Tensor:
    """The mean over each sequence's decided tokens; 0 where there are none. [B, L] -> [B]"""
    return decided_only(values, decided).sum(1) / decided.sum(1).clamp(min=1)


def aggregate(values: Tensor, decided: Tensor, form: Aggregate, longest: int | None = None) -> tuple[Tensor, Tensor]:
    """Values of tokens [B, L] as the value and weight of each sequence, [B] both. A loss is sum(vw) / sum(w).

    grpo      (arXiv 2402.03300) a sequence's mean, and all sequences count alike: in a long one each token counts less.
    dapo      (arXiv 2503.14476) the mean over all tokens of all sequences.
    dr_grpo   (arXiv 2503.20783) a sequence's sum over `longest`, one number for all sequences of a run.
    sum       a sequence's sum, and all sequences count alike (verl's seq-mean-token-sum): each token counts as much in
              a long one as in a short one, and the loss is as many times larger as sequences are long.

    A sequence without decided tokens has value 0 and weight 0.
    """
    count = decided.sum(1)
    there = (count > 0).to(values.dtype)
    if form == "grpo":
        return token_mean(values, decided), there
    if form == "dapo":
        return token_mean(values, decided), count.to(values.dtype)
    if form == "dr_grpo":
        if longest is None or longest < 1:
            raise ValueError(f"dr_grpo divides by `longest`, 1 or more tokens, not {longest}")
        return decided_only(values, decided).sum(1) / longest, there
    if form == "sum":
        return decided_only(values, decided).sum(1), there
    raise ValueError(f"tokens are aggregated by grpo, dapo, dr_grpo or sum, not {form!r}")


def largest(values: Tensor, decided: Tensor, share: float) -> Tensor:
    """Which decided tokens are the `share` of their sequence, rounded down but one at least, with the largest values.

    [B, L] bool, without gradient. Of equal ones the first. What else is in the batch does not matter.
    """
    count = decided.sum(1)
    most = (count.double() * share + 1e-6).long().clamp(min=1)  # 0.1 x 30 is 3, whatever the last bit of 0.1 says
    ranked = torch.where(decided, values.detach(), torch.full_like(values, -torch.inf))
    order = torch.sort(ranked, dim=1, descending=True, stable=True).indices
    rank = torch.argsort(order, dim=1)  # of each token
    return decided & (rank < most[:, None])


def sequence_log_ratio(log_prob: Tensor, old_log_prob: Tensor, decided: Tensor) -> Tensor:
    """The mean log-ratio of each sequence's decided tokens: log s_i of GSPO (arXiv 2507.18071, eq. 7). [B]"""
    return token_mean(log_prob - old_log_prob.detach(), decided)


# ---- the engine that sampled, and the trainer ------------------------------------------------------------------------


def importance_ratio(trainer_log_prob: Tensor, rollout_log_prob: Tensor, decided: Tensor, level: Level) -> Tensor:
    """p of the trainer over p of the engine that sampled, for the same weights; without gradient. [B, L]

    token: of each token, 1 where it was not decided. sequence: the product over its tokens, at all of its positions.
    """
    gap = decided_only((trainer_log_prob - rollout_log_prob).detach(), decided)
    if level == "sequence":
        gap = gap.sum(1, keepdim=True).expand_as(gap)
    elif level != "token":
        raise ValueError(f"the level must be token or sequence, not {level!r}")
    return torch.exp(gap)


def truncated_weight(
    trainer_log_prob: Tensor, rollout_log_prob: Tensor, decided: Tensor, cap: float, level: Level
) -> Tensor:
    """Truncated importance sampling: min(ratio, cap), so that no token counts for more than `cap`. [B, L]"""
    return importance_ratio(trainer_log_prob, rollout_log_prob, decided, level).clamp(max=cap)


def masked_weight(
    trainer_log_prob: Tensor, rollout_log_prob: Tensor, decided: Tensor, cap: float, level: Level
) -> Tensor:
    """Masked importance sampling: the ratio, and 0 where it is outside of [1 / cap, cap]. [B, L]"""
    ratio = importance_ratio(trainer_log_prob, rollout_log_prob, decided, level)
    return torch.where((ratio > cap) | (ratio < 1 / cap), torch.zeros_like(ratio), ratio)


def mismatch(trainer_log_prob: Tensor, rollout_log_prob: Tensor, decided: Tensor) -> dict[str, Tensor]:
    """How far the engine that sampled is from the trainer, for each sequence. [B] each

    mean and deviation (the largest): of |difference of log-probs|; low and high: of the tokens' ratios; effective: the
    share of a sequence's tokens that is left of it as a sample of the trainer's policy, (sum r)^2 / (n sum r^2).
    """
    gap = decided_only((trainer_log_prob - rollout_log_prob).detach(), decided).abs()
    ratio = importance_ratio(trainer_log_prob, rollout_log_prob, decided, "token")
    first, second = token_mean(ratio, decided), token_mean(ratio.square(), decided)
    return {
        "mismatch/mean": token_mean(gap, decided),
        "mismatch/deviation": gap.amax(1),
        "mismatch/low": ratio.amin(1),
        "mismatch/high": ratio.amax(1),
        "mismatch/effective": torch.where(second > 0, first.square() / second, 1.0),
    }


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenRows(Rows):
    """One row per sequence: a prompt and its answer, as the policy that sampled saw them."""

    ids: Tensor  # [B, L] int64, padded at the end
    length: Tensor  # [B] int64, without the padding
    decided: Tensor  # [B, L] bool: tokens that the policy chose
    rollout_log_prob: Tensor  # [B, L] as the engine that sampled reported them; 0 where not decided
    old_log_prob: Tensor  # [B, L] what a ratio is measured from: the same, until `recomputed`
    own: Tensor  # [] bool: old_log_prob is the trainer's own
    advantage: Tensor  # [B]
    weight: Tensor  # [B] 0 where the sample was not scored
    finished: Tensor  # [B] bool: false where a limit cut the answer off
    temperature: Tensor  # [] of the distribution sampled from
    cond: tuple[str, ...]  # [B] keys into the condition cache

    @classmethod
    def from_samples(cls, samples: Samples, advantage: Tensor, scored: Tensor) -> TokenRows:
        """advantage [N], scored [N] bool. What was not scored is blank: NaN times a weight of 0 is NaN."""
        tokens = samples.tokens
        if tokens is None:
            raise ValueError("these samples carry no tokens: the rollout and the policy must be of the kind tokens")
        position = torch.arange(tokens.ids.shape[1])
        answer = (position >= tokens.prompt[:, None].clamp(min=1)) & (position < tokens.length[:, None])
        _refuse(tokens.decided & ~answer, samples, "is marked as decided, but lies in the prompt or in the padding")
        used = tokens.decided & scored[:, None]
        _refuse(used & ~torch.isfinite(tokens.log_prob), samples, "was decided, but its log-prob is not finite")
        log_prob = decided_only(tokens.log_prob.float(), used)
        return cls(
            row=samples.index,
            ids=tokens.ids,
            length=tokens.length,
            decided=tokens.decided,
            rollout_log_prob=log_prob,
            old_log_prob=log_prob,
            own=torch.tensor(False),
            advantage=torch.where(scored, advantage, 0.0),
            weight=scored.to(torch.float32),
            finished=tokens.finished,
            temperature=torch.tensor(tokens.temperature),
            cond=tuple(prompt.key for prompt in samples.prompts),
        )

    @property
    def asked(self) -> tuple[Tensor, Tensor, tuple[str, ...], float]:
        """What a policy is asked for its log-probs with."""
        return self.ids, self.length, self.cond, float(self.temperature)

    def trimmed(self) -> Self:
        """The same rows without the padding that is common to all."""
        longest = int(self.length.max()) if len(self) else 0
        cut = {name: getattr(self, name)[:, :longest] for name in _PER_TOKEN}
        return replace(self, **cut)


R = TypeVar("R", bound=TokenRows)
_PER_TOKEN = ("ids", "decided", "rollout_log_prob", "old_log_prob")


def _refuse(bad: Tensor, samples: Samples, what: str) -> None:
    if bool(bad.any()):
        at, token = bad.nonzero()[0].tolist()
        raise ValueError(f"token {token} of sample {int(samples.sample_id[at])} {what}")


def recomputed(rows: R, policy: TokenPolicy, size: int) -> R:
    """The same rows with `policy`'s own log-probs as the old ones, without gradient, `size` rows at a time.

    Before the first update of a step, while the weights are still those that sampled.
    """
    old = torch.zeros_like(rows.old_log_prob)
    with torch.no_grad():
        for part in torch.arange(len(rows)).split(size) if len(rows) else ():
            some = rows.select(part).trimmed()
            found = policy.log_probs(some.ids, some.length, some.cond, float(some.temperature)).to(old)
            old[part, : found.shape[1]] = found
    used = rows.decided & (rows.weight > 0)[:, None]
    return replace(rows, old_log_prob=decided_only(old, used), own=torch.tensor(True))
