"""Scores to advantages, and the clipped surrogate that consumes them: for denoising steps and tokens alike.

Pass the scores and groups of *all* ranks. Statistics are fp64 on the CPU in an order fixed by the values, so to the bit
the result does not depend on how the samples were sharded or ordered. Standard deviations are the population's (ddof 0,
as numpy; `torch.std` in TRL, verl and DanceGRPO is sqrt(G / (G - 1)) larger).

Common to all advantages: scores [N], group int64 [N] (any ids, any order), valid bool [N] or None (all valid); the
result is float32 [N] on the scores' device. An invalid sample gets exactly 0 and enters no statistic. A group with a
single valid member or with equal scores gets exactly 0: it carries no preference, and dividing rounding noise by a tiny
std would invent one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlkit.types import Context, Samples, Scores

# Scores are equal if their std is below this, times their mean where that exceeds 1: float32 rounds at 1e-7 of a value.
_EQUAL = 1e-6


def group_norm(scores: Tensor, group: Tensor, *, eps: float = 1e-4, valid: Tensor | None = None) -> Tensor:
    """(R - mean_g) / (std_g + eps): GRPO (arXiv 2402.03300), and the default of the Flow-GRPO code. [N]

    eps shrinks small spreads: a std of 1e-2 gives 0.990 of the unit advantage, 1e-3 gives 0.909, 1e-4 gives 0.5.
    """
    stats = _group_stats(scores, group, valid)
    return _result(stats.centred / (stats.std + eps), scores)


def global_norm(scores: Tensor, group: Tensor, *, eps: float = 1e-4, valid: Tensor | None = None) -> Tensor:
    """(R - mean_g) / (std_all + eps): Flow-GRPO-Fast, DiffusionNFT, AWM. [N]

    std_all is over all valid scores, *not* centred by group: the spread between prompts makes the advantages smaller.
    """
    stats = _group_stats(scores, group, valid)
    used = torch.sort(stats.values[stats.valid]).values
    scale = (float(used.std(correction=0)) if len(used) else 0.0) + eps
    return _result(stats.centred / (scale or 1.0), scores)


def no_std(scores: Tensor, group: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """R - mean_g: Dr. GRPO (arXiv 2503.20783). Its scale is the reward's: tune the learning rate to it. [N]"""
    return _result(_group_stats(scores, group, valid).centred, scores)


def leave_one_out(scores: Tensor, group: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """R_i - mean of the others in the group = n / (n - 1) (R_i - mean_g): RLOO (arXiv 2402.14740). [N]"""
    stats = _group_stats(scores, group, valid)
    return _result(stats.centred * stats.count / (stats.count - 1).clamp(min=1), scores)


def gdpo(
    scores: Tensor,
    group: Tensor,
    weights: Sequence[float] | Tensor | None = None,
    *,
    eps: float = 1e-4,
    valid: Tensor | None = None,
) -> Tensor:
    """S / (std_batch(S) + eps), S = sum_k weight_k (R_k - mean_gk) / (std_gk + eps): GDPO (NVlabs/GDPO). [N]

    scores [N, R], weights [R] (None: ones), valid [N] or [N, R]. A plain sum of rewards is ruled by the one with the
    largest scale; here each counts by its weight. An invalid entry adds 0; a sample with one valid entry is part of the
    batch.

    Differences from the reference code: ddof 0 in both stages, and the batch mean is not subtracted, since it is 0 by
    construction (every group's normalised scores sum to 0) and its rounding would make neutral samples non-zero.
    """
    if scores.ndim != 2:
        raise ValueError(f"gdpo takes scores [N, R], not {tuple(scores.shape)}")
    rewards = scores.shape[1]
    factors = torch.ones(rewards) if weights is None else torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if factors.shape != (rewards,):
        raise ValueError(f"gdpo needs one weight per reward [{rewards}], not {tuple(factors.shape)}")
    if valid is None:
        valid = torch.ones(scores.shape, dtype=torch.bool)
    elif valid.ndim == 1:
        valid = valid[:, None].expand(-1, rewards)
    if valid.shape != scores.shape:
        raise ValueError(f"valid must be [N] or [N, R] = {tuple(scores.shape)}, not {tuple(valid.shape)}")

    total = torch.zeros(scores.shape[0], dtype=torch.float64)
    for index, factor in enumerate(factors.tolist()):
        stats = _group_stats(scores[:, index], group, valid[:, index])
        total = total + factor * stats.centred / (stats.std + eps)
    used = torch.sort(total[valid.any(dim=1).cpu()]).values
    scale = (float(used.square().mean().sqrt()) if len(used) else 0.0) + eps
    return _result(total / (scale or 1.0), scores)


SINGLE = {"group_norm": group_norm, "global_norm": global_norm, "no_std": no_std, "leave_one_out": leave_one_out}
"""The advantages of one number a sample, by the names that options give them."""


def of_step(name: str | None, samples: Samples, scores: Scores, context: Context, alone: str = "group_norm") -> Tensor:
    """The advantage of every sample of the step, over all processes: `gdpo` or one of `SINGLE`. [N_total]

    name None: `alone`, but `gdpo` where several rewards are summed: the sum would be ruled by the one with the largest
    scale.
    """
    group, valid = context.gather(samples.group), context.gather(scores.scored)
    if name is None:
        name = "gdpo" if int((scores.weights != 0).sum()) > 1 and scores.combined is None else alone
    if name == "gdpo":
        counted = scores.weights != 0  # one that is only watched may lack a number where the others have theirs
        return gdpo(context.gather(scores.used[:, counted]), group, scores.weights[counted], valid=valid)
    return SINGLE[name](context.gather(scores.total), group, valid=valid)


def per_step(scores: Tensor, group: Tensor, advantage: Callable[..., Tensor], *, valid: Tensor | None = None) -> Tensor:
    """Each decision compared with its group's at the same step: DenseGRPO (arXiv 2601.20218). [N, K]

    scores [N, K], group [N], valid [N, K] or None; `advantage` is `group_norm` or another of one reward.
    """
    if scores.ndim != 2 or (valid is not None and valid.shape != scores.shape):
        raise ValueError(f"per_step takes scores and valid [N, K], not {tuple(scores.shape)}")
    columns = [
        advantage(scores[:, k], group, valid=None if valid is None else valid[:, k]) for k in range(scores.shape[1])
    ]
    return torch.stack(columns, dim=1) if columns else scores.float()


def zero_std_fraction(scores: Tensor, group: Tensor, valid: Tensor | None = None) -> float:
    """Share of groups, among those with a valid member, whose scores are all equal: they teach nothing. A metric."""
    stats = _group_stats(scores, group, valid)
    alive = torch.unique(stats.index[stats.valid])
    flat = torch.unique(stats.index[stats.valid & stats.flat])
    return len(flat) / max(len(alive), 1)


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float | tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """max(-A rho, -A clamp(rho, 1 - low, 1 + high)), rho = exp(log_prob - old_log_prob): PPO (arXiv 1707.06347, eq. 7).

    One decision per entry, all three [N] or [N, S]; returns the loss and the ratio, of the same shape. `clip` is one
    number or (low, high). The range belongs to the log-prob's reduction: 1e-4 for a latent's mean, 0.2 for a token.
    """
    low, high = (clip, clip) if isinstance(clip, int | float) else clip
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"clip {clip!r}: the ratio is kept within [1 - low, 1 + high], so 0 <= low <= 1 and high >= 0")
    if not log_prob.shape == old_log_prob.shape == advantage.shape:  # broadcasting [N, 1] with [N] would mix samples
        shapes = [tuple(t.shape) for t in (log_prob, old_log_prob, advantage)]
        raise ValueError(f"log_prob, old_log_prob and advantage differ in shape: {shapes}")
    ratio = torch.exp(log_prob - old_log_prob.detach())
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high)), ratio


@dataclass(frozen=True)
class _GroupStats:
    values: Tensor  # [N] fp64, invalid scores replaced by 0
    valid: Tensor  # [N] bool
    index: Tensor  # [N] group number, 0 .. groups - 1
    count: Tensor  # [N] valid members of the sample's group
    centred: Tensor  # [N] score - group mean; exactly 0 if invalid or flat
    std: Tensor  # [N] of the sample's group; 1 if flat, where the numerator is 0
    flat: Tensor  # [N] bool: the group's scores are equal


def _group_stats(scores: Tensor, group: Tensor, valid: Tensor | None) -> _GroupStats:
    values, group, valid = _checked(scores, group, valid)
    ids, index = torch.unique(group, return_inverse=True)
    by_value = torch.argsort(values, stable=True)
    order = by_value[torch.argsort(index[by_value], stable=True)]  # by group, then by value: sums keep their bits

    def total(column: Tensor) -> Tensor:  # [N] -> [N], the sum over the sample's group
        sums = torch.zeros(len(ids), dtype=torch.float64)
        return sums.index_add(0, index[order], column[order])[index]

    count = total(valid.double())
    mean = total(values) / count.clamp(min=1)
    centred = torch.where(valid, values - mean, 0.0)
    std = torch.sqrt(total(centred.square()) / count.clamp(min=1))
    flat = std < _EQUAL * mean.abs().clamp(min=1)
    centred = torch.where(flat, 0.0, centred)
    return _GroupStats(values, valid, index, count, centred, torch.where(flat, 1.0, std), flat)


def _checked(scores: Tensor, group: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if group.dtype != torch.int64:
        raise TypeError(
            f"group ids must be int64, not {group.dtype}: float32 merges ids above 2^24 and int32 ends at 2^31, so two "
            "prompts would share a group"
        )
    if valid is not None and valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, not {valid.dtype}")
    if scores.ndim != 1 or group.shape != scores.shape or (valid is not None and valid.shape != scores.shape):
        shapes = [tuple(t.shape) for t in (scores, group, valid) if t is not None]
        raise ValueError(f"scores, group and valid must all be [N], not {shapes}")
    values = scores.detach().cpu().double()
    valid = torch.ones(scores.shape, dtype=torch.bool) if valid is None else valid.cpu()
    broken = valid & ~torch.isfinite(values)
    if bool(broken.any()):
        raise ValueError(
            f"{int(broken.sum())} valid scores are not finite, the first at row {int(broken.nonzero()[0])}: "
            "set valid to False where a sample could not be scored"
        )
    return torch.where(valid, values, 0.0), group.cpu(), valid


def _result(advantage: Tensor, scores: Tensor) -> Tensor:
    return advantage.float().to(scores.device)  # in this order: not every device holds fp64
