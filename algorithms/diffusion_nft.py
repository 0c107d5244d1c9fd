"""DiffusionNFT (arXiv 2509.16117): reinforcement learning on the forward process, by negative-aware fine-tuning.

Finished samples of the policy `old` are noised afresh, and their velocity noise - clean is regressed by two implicit
policies that share the trained network: v+ = v_old + beta (v - v_old) in proportion to the sample's optimality
probability r, v- = v_old - beta (v - v_old) in proportion to 1 - r. No path, density or guidance is needed, so any
solver may sample. Over the population the optimum is v_old + (2 / beta) alpha (v_good - v_old), alpha being the
posterior probability of a good sample; at v = v_old the gradient is 2 beta (2 r - 1) (v_old - target).

r = 1/2 + clip(A / advantage_clip, -1, 1) / 2. In `x0` space, as in the reference code, each branch is the squared error
of its clean prediction over its own mean absolute error, and the first gradient no longer depends on beta.

Differences from the reference code (NVlabs/DiffusionNFT): the KL is off unless asked for (there 1e-4); its sigmas are
the sampler's own in fp32, not its timesteps / 1000 in half precision; `old_decay` counts training steps, which are
there optimiser steps (one or two a training step); 9 of 10 sigmas a sample there are `draws: 9` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlkit import advantage, flow
from rlkit.types import Algorithm, Context, Loss, Models, Needs, NoisedRows, Plan, Samples, Scores

# How much of `old` is kept after n training steps, min(rate * max(0, n - first), most): (first, rate, most).
DECAYS = {"copy": (0, 0.0, 0.0), "slow": (0, 0.001, 0.5), "late": (75, 0.0075, 0.999)}
SMALLEST_ERROR = 1e-5  # of a clean prediction, where it divides
NEUTRAL = 1e-6  # an advantage below this is rounding, and has no sign


@dataclass(frozen=True)
class DiffusionNFT(Algorithm):
    """DiffusionNFT: contrast good and bad samples by flow matching on the forward process; any solver samples."""

    kind = "flow"
    paper = "arXiv 2509.16117"

    beta: float = 1.0  # of the implicit policies: smaller extrapolates further
    draws: int = 4  # rows a sample, each with a fresh sigma and fresh noise
    sigmas: Literal["schedule", "uniform", "logit_normal"] = "schedule"  # schedule: those that sampling used
    solver: Literal["dpm", "euler"] = "dpm"  # of the sampler
    space: Literal["x0", "v"] = "x0"  # of the loss. x0: self-normalised, as in the reference code; v: the paper's
    advantage: Literal["global_norm", "group_norm", "no_std", "leave_one_out", "gdpo"] | None = None
    "None: global_norm, or gdpo where several rewards are summed."
    advantage_clip: float = 5.0  # the advantage at which a sample is good (r = 1) or bad (r = 0) for sure
    advantage_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"  # see `_kept`
    old_decay: Literal["copy", "slow", "late"] = "copy"  # how `old` follows the trained weights: decay types 0, 1, 2
    old_decay_rate: float | None = None  # its rise per training step; None: slow 0.001, late 0.0075 after step 75
    old_decay_most: float | None = None  # where it stops; None: slow 0.5, late 0.999
    kl: float = 0.0  # weight of mean((v - v_reference)^2)

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be above 0, not {self.beta}: at 0 the trained weights would not matter")
        if self.draws < 1:
            raise ValueError(f"draws must be 1 or more, not {self.draws}")
        if self.advantage_clip <= 0:
            raise ValueError(f"advantage_clip must be above 0, not {self.advantage_clip}")
        if self.kl < 0:
            raise ValueError(f"kl must be 0 or more, not {self.kl}")
        if self.old_decay == "copy" and (self.old_decay_rate, self.old_decay_most) != (None, None):
            raise ValueError("old_decay: copy keeps nothing of `old`: use slow or late with a rate or a most")
        if self.old_decay_rate is not None and self.old_decay_rate <= 0:
            raise ValueError(f"old_decay_rate must be above 0, not {self.old_decay_rate}")
        if self.old_decay_most is not None and not 0 <= self.old_decay_most < 1:
            raise ValueError(f"old_decay_most must be within [0, 1), not {self.old_decay_most}: at 1 `old` never moves")

    def needs(self) -> Needs:
        return Needs(group=2, rows=self.draws, advantage=True, old=True, reference=self.kl > 0)

    def plan(self, context: Context) -> Plan:
        return Plan(policy_set="old", solver=self.solver)

    def rows(self, samples: Samples, scores: Scores, context: Context) -> NoisedRows:
        mine = self._kept(
            advantage.of_step(self.advantage, samples, scores, context, "global_norm")[samples.index]
        )  # [N]
        generators = (context.generator("sigma", i) for i in samples.index.tolist())
        sigmas = flow.draw_sigmas(self.sigmas, self.draws, generators, samples.sigmas)  # [N, K]
        return NoisedRows.from_samples(samples, mine, scores.scored, sigmas, context)

    def _kept(self, values: Tensor) -> Tensor:
        """What `advantage_mode` leaves of the advantages: all, those of one sign, 1 where positive, or their sign."""
        clipped = torch.where(values.abs() < NEUTRAL, 0.0, values).clamp(-self.advantage_clip, self.advantage_clip)
        match self.advantage_mode:
            case "positive_only":
                return clipped.clamp(min=0)
            case "negative_only":
                return clipped.clamp(max=0)
            case "one_only":
                return (clipped > 0).to(clipped)
            case "binary":
                return clipped.sign()
        return clipped

    def optimality(self, advantages: Tensor) -> Tensor:
        """r in 0..1: the probability that a sample with this advantage is a good one."""
        return (0.5 + advantages / (2 * self.advantage_clip)).clamp(0, 1)

    def loss(self, models: Models, rows: NoisedRows) -> Loss:
        x = flow.interpolate(rows.clean, rows.noise, rows.sigma)
        target = flow.velocity_target(rows.clean, rows.noise)
        v = models.current.velocity(x, rows.sigma, rows.cond)
        v_old = (v if models.old_is_current else models.old.velocity(x, rows.sigma, rows.cond)).detach()
        away = self.beta * (v - v_old)
        positive = self._error(v_old + away, target, rows.sigma)  # of v+
        negative = self._error(v_old - away, target, rows.sigma)  # of v-
        r = self.optimality(rows.advantage)
        value = r * positive + (1 - r) * negative
        if self.space == "x0":
            value = value * self.advantage_clip / self.beta
        terms = {"policy": (value, rows.weight)}
        metrics = {
            "optimality": r,
            "loss_positive": positive.detach(),
            "loss_negative": negative.detach(),
            "old/distance": flow.v_kl(v.detach(), v_old),
        }
        if self.kl > 0:
            divergence = flow.v_kl(v, models.reference.velocity(x, rows.sigma, rows.cond))
            terms["kl"] = (self.kl * divergence, rows.weight)
            metrics["kl"] = divergence.detach()
        return Loss(terms, metrics)

    def _error(self, v: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
        """How far one implicit policy is from the target, per row. [B]"""
        axes = tuple(range(1, v.ndim))
        if self.space == "v":
            return (v - target).square().mean(axes)
        error = sigma.reshape(-1, *(1,) * len(axes)) * (v - target)  # of the clean prediction x - sigma v
        with torch.no_grad():  # it scales the gradient and is not a path of it
            scale = error.double().abs().mean(axes).clamp(min=SMALLEST_ERROR)
        return error.square().mean(axes) / scale.to(error)

    def after(self, policy: Any, context: Context) -> None:
        policy.blend("old", self.decay(context.step + 1))

    def decay(self, steps: int) -> float:
        """The share of `old` that is kept after so many training steps."""
        first, rate, most = DECAYS[self.old_decay]
        rate = rate if self.old_decay_rate is None else self.old_decay_rate
        most = most if self.old_decay_most is None else self.old_decay_most
        return min(rate * max(0, steps - first), most)
