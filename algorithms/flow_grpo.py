"""Flow-GRPO (arXiv 2505.05470): a clipped policy gradient over the stochastic steps of a flow sampler.

The ODE sampler becomes an SDE with the same marginals, so that each step x -> x_next is a Gaussian decision with a
log-probability (eq. 9). All steps of a sample share its group-normalised advantage (eq. 5), and each is one row of a
PPO loss with a KL penalty (eq. 6).

Options that are papers of their own, the loss being the same:

    Flow-GRPO-Fast                window: 2, window_start: [0, 5]
    MixGRPO (2507.21802)          window: 4, window_start: [0, 19], window_moves: slide (or random), shared_noise: true
    MixGRPO-Flash                 the same with tail: a few steps of DPM-Solver++ after the window
    CPS (2509.05952)              dynamics: cps, noise_level: 0.8 (density: squared and clip: 1e-5 as in its code)
    DanceGRPO (2505.07818)        dynamics: dance, noise_level: 0.3, shared_noise: true, train_fraction: 0.6
    GRPO-Guard (2510.22319)       trust: guard, clip: 2e-6
    Flow-DPPO (verl-omni)         trust: divergence; clip is then the divergence at which a row is left out
    TempFlow-GRPO (2508.04324)    window: 1, window_start: [0, 8], step_weight: noise, shared_noise: true

Differences from the reference code (yifan123/flow_grpo): samples with advantage 0 stay in the batch, so that they still
feel the KL penalty; steps are drawn into mini-batches together, not one optimiser accumulation a step; a group whose
rewards are all equal gives exactly 0. MixGRPO's exponential schedules of the window, its evaluation by two models and
BranchGRPO's tree are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlkit import advantage, flow, surrogate
from rlkit.types import Algorithm, Context, FlowRows, Loss, Models, Needs, Plan, Samples, Scores


@dataclass(frozen=True)
class FlowGRPO(Algorithm):
    """Flow-GRPO: PPO on the denoising steps of a flow model, with group-relative advantages."""

    kind = "flow"
    paper = "arXiv 2505.05470"

    noise_level: float = 0.7  # eta of eq. 9
    dynamics: Literal["flow", "dance", "cps"] = "flow"
    clip: float | None = None  # of the ratio; None: 1e-4 with the mean, 0.2 with the sum
    trust: Literal["clip", "guard", "divergence"] = "clip"  # what keeps an update near the policy that sampled
    reduce: Literal["mean", "sum"] = "mean"  # of the log-probability over the latent's values
    density: Literal["gaussian", "squared"] = "gaussian"  # squared: without 1 / (2 std^2), as in CPS's code
    window: int | None = None  # stochastic steps a sample, contiguous; None: all but the last
    window_start: tuple[int, int] = (0, 0)  # where the window may start, both ends included
    window_moves: Literal["random", "slide"] = "random"  # drawn anew each step, or moved on every `window_every`
    window_every: int = 25  # training steps between two moves of a sliding window
    window_stride: int = 1  # how far it slides; past its last start it begins again
    tail: int | None = None  # noiseless steps after the window, by DPM-Solver++(2M); None: the schedule's, by Euler
    train_fraction: float = 1.0  # share of the recorded steps that is trained on, drawn anew each step
    step_weight: Literal["equal", "noise"] = "equal"  # noise: in proportion to a step's std, 1 in the schedule's mean
    shared_noise: bool = False  # one initial noise per group: its members then differ by their decisions alone
    advantage: Literal["group_norm", "global_norm", "no_std", "leave_one_out", "gdpo"] | None = None
    "None: group_norm, or gdpo where several rewards are summed."
    advantage_clip: float = 5.0
    kl: float = 0.0  # beta of eq. 6
    kl_form: Literal["official", "exact", "v", "x"] = "official"

    def __post_init__(self) -> None:
        if self.noise_level <= 0:
            raise ValueError(f"noise_level must be above 0, not {self.noise_level}: a noiseless step has no density")
        if self.dynamics == "cps" and self.noise_level > 1:
            raise ValueError(f"noise_level must be at most 1 with cps, not {self.noise_level}")
        if self.clip is not None and not 0 < self.clip <= 1:
            raise ValueError(f"clip must be above 0 and at most 1, not {self.clip}")
        if self.trust == "guard" and self.reduce == "sum":
            raise ValueError("guard corrects the mean's bias: use reduce: mean with it")
        if self.advantage_clip <= 0:
            raise ValueError(f"advantage_clip must be above 0, not {self.advantage_clip}")
        counts = (("window", self.window), ("window_every", self.window_every), ("window_stride", self.window_stride))
        for name, count in counts:
            if count is not None and count < 1:
                raise ValueError(f"{name} must be 1 or more, not {count}")
        low, high = self.window_start
        if not 0 <= low <= high:
            raise ValueError(f"window_start must be [first, last] with 0 <= first <= last, not {[low, high]}")
        if self.tail is not None and (self.tail < 1 or self.window is None):
            raise ValueError("tail is a number of steps, 1 or more, after a window: give `window` too")
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"train_fraction must be above 0 and at most 1, not {self.train_fraction}")
        if self.kl < 0:
            raise ValueError(f"kl must be 0 or more, not {self.kl}")

    def needs(self) -> Needs:
        return Needs(
            path=True,
            log_prob=True,
            group=2,
            window=self.window,
            last_start=self.window_start[1],
            train_fraction=self.train_fraction,
            advantage=True,
            reference=self.kl > 0,
        )

    def plan(self, context: Context) -> Plan:
        first = self._window_start(context)
        # Without a window every step but the last is stochastic: the last one's noise would stay in the picture.
        count = self.window or context.sampling_steps - 1 - first
        return Plan(
            dynamics=self.dynamics,
            noise_level=self.noise_level,
            window=(first, count),
            shared_noise=self.shared_noise,
            record=True,
            solver="euler" if self.tail is None else "dpm",
            tail=self.tail,
        )

    def _window_start(self, context: Context) -> int:
        """The same for every process and every group: it is drawn from the step."""
        low, high = self.window_start
        if self.window_moves == "slide":
            return low + context.step // self.window_every * self.window_stride % (high - low + 1)
        return low + int(torch.randint(high - low + 1, (1,), generator=context.generator("window")))

    def rows(self, samples: Samples, scores: Scores, context: Context) -> FlowRows:
        everyone = advantage.of_step(self.advantage, samples, scores, context)  # [N_total]
        mine = everyone[samples.index].clamp(-self.advantage_clip, self.advantage_clip)
        if self.step_weight == "noise":
            mine = mine[:, None] * self._step_weights(samples)
        return FlowRows.from_path(samples, mine, scores.scored, self._trained(samples, context))

    def _step_weights(self, samples: Samples) -> Tensor:
        """[K] std of each recorded step over the mean std of all steps that may be stochastic (TempFlow-GRPO)."""
        assert samples.sigmas is not None
        assert samples.path is not None
        start, end = samples.sigmas[:-2], samples.sigmas[1:-1]  # all but the last step
        blank = torch.zeros(len(start), 1)
        _, std = flow.sde_step(blank, blank, start, end, self.noise_level, self.dynamics, float(samples.sigmas[1]))
        return (std / std.mean()).flatten()[samples.path.steps]

    def _trained(self, samples: Samples, context: Context) -> Tensor | None:
        """[K'] positions among the recorded steps, the same for all samples; None: all of them."""
        if self.train_fraction == 1 or samples.path is None:
            return None
        count = len(samples.path.steps)
        order = torch.randperm(count, generator=context.generator("trained steps"))
        return order[: self.needs().trained(count)].sort().values

    def loss(self, models: Models, rows: FlowRows) -> Loss:
        return surrogate.path_loss(
            models,
            rows,
            dynamics=self.dynamics,
            clip=surrogate.CLIP[self.reduce] if self.clip is None else self.clip,
            trust=self.trust,
            reduce=self.reduce,
            density=self.density,
            kl=self.kl,
            kl_form=self.kl_form,
        )
