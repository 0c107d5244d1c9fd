"""Advantage Weighted Matching (AWM, arXiv 2509.25050): a policy gradient whose log-probability is the pretraining loss.

A finished sample is noised afresh, and -mean((v - (noise - clean))^2) stands for its log-probability, at the same sigma
and noise for the trained weights and for `old`, which sampled. What follows is PPO: ratio, clip, group-relative
advantage. The first gradient is A 2 (v - target) / D: flow matching on good samples, and away from bad ones.

`weighting: ghuber` replaces the squared error l by a generalised Huber form (sigma / p) ((l + e)^p - e^p), p being
`power` and e 1e-10, as the reference code's SD3.5 recipes do (p = 0.25).

Differences from the reference code (scxue/advantage_weighted_matching): advantages are clipped at 5 but not divided by
it afterwards, so that its KL weight of .001 is .005 here; the KL is off unless asked for. Its KL to an average of the
weights (`ema_beta`) is left out, and so are its weightings t, t^2 and huber. Its 6 sigmas come one from each part of
the schedule without the first and the last tenth; here they come from all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from rlkit import advantage, flow
from rlkit.types import Algorithm, Context, Loss, Models, Needs, NoisedRows, Plan, Samples, Scores

SMALLEST_ERROR = 1e-10  # the generalised Huber form is steep at 0


@dataclass(frozen=True)
class AWM(Algorithm):
    """AWM: PPO whose log-probability is the flow-matching loss at a fresh sigma and noise; any solver samples."""

    kind = "flow"
    paper = "arXiv 2509.25050"

    clip: float = 1.0  # of the ratio; 1 as in the reference code is hardly ever reached
    draws: int = 4  # rows a sample, each with a fresh sigma and fresh noise
    sigmas: Literal["schedule", "uniform", "logit_normal"] = "schedule"  # schedule: those that sampling used
    solver: Literal["dpm", "euler"] = "dpm"  # of the sampler
    weighting: Literal["none", "ghuber"] = "none"  # of the squared error
    power: float = 0.25  # p of ghuber
    advantage: Literal["global_norm", "group_norm", "no_std", "leave_one_out", "gdpo"] | None = None
    "None: global_norm, or gdpo where several rewards are summed."
    advantage_clip: float = 5.0
    kl: float = 0.0  # weight of mean((v - v_reference)^2)

    def __post_init__(self) -> None:
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip must be above 0 and at most 1, not {self.clip}")
        if self.draws < 1:
            raise ValueError(f"draws must be 1 or more, not {self.draws}")
        if not 0 < self.power <= 1:
            raise ValueError(f"power must be above 0 and at most 1, which is the squared error, not {self.power}")
        if self.advantage_clip <= 0:
            raise ValueError(f"advantage_clip must be above 0, not {self.advantage_clip}")
        if self.kl < 0:
            raise ValueError(f"kl must be 0 or more, not {self.kl}")

    def needs(self) -> Needs:
        return Needs(group=2, rows=self.draws, advantage=True, old=True, reference=self.kl > 0)

    def plan(self, context: Context) -> Plan:
        return Plan(policy_set="old", solver=self.solver)

    def rows(self, samples: Samples, scores: Scores, context: Context) -> NoisedRows:
        everyone = advantage.of_step(self.advantage, samples, scores, context, "global_norm")  # [N_total]
        mine = everyone[samples.index].clamp(-self.advantage_clip, self.advantage_clip)
        generators = (context.generator("sigma", i) for i in samples.index.tolist())
        sigmas = flow.draw_sigmas(self.sigmas, self.draws, generators, samples.sigmas)  # [N, K]
        return NoisedRows.from_samples(samples, mine, scores.scored, sigmas, context)

    def loss(self, models: Models, rows: NoisedRows) -> Loss:
        x = flow.interpolate(rows.clean, rows.noise, rows.sigma)
        v = models.current.velocity(x, rows.sigma, rows.cond)
        v_old = (v if models.old_is_current else models.old.velocity(x, rows.sigma, rows.cond)).detach()
        old = self._log_prob(v_old, rows)
        surrogate, ratio = advantage.clipped_surrogate(self._log_prob(v, rows), old, rows.advantage, self.clip)
        terms = {"policy": (surrogate, rows.weight)}
        away = (ratio.detach() - 1).abs()
        metrics = {
            "ratio/mean": ratio.detach(),
            "ratio/deviation": away,
            "clip_fraction": (away > self.clip).float(),
            "old/log_prob": old,
        }
        if self.kl > 0:
            divergence = flow.v_kl(v, models.reference.velocity(x, rows.sigma, rows.cond))
            terms["kl"] = (self.kl * divergence, rows.weight)
            metrics["kl"] = divergence.detach()
        return Loss(terms, metrics)

    def _log_prob(self, v: Tensor, rows: NoisedRows) -> Tensor:
        """What stands for the log-probability of each row's sample. [B]"""
        error = (v - flow.velocity_target(rows.clean, rows.noise)).square().mean(tuple(range(1, v.ndim)))
        if self.weighting == "none":
            return -error
        bent = (error + SMALLEST_ERROR) ** self.power - SMALLEST_ERROR**self.power
        return -rows.sigma * bent / self.power

    def after(self, policy: Any, context: Context) -> None:
        policy.blend("old", 0.0)  # the next step is sampled, and its ratios are taken, with the weights as they are now
