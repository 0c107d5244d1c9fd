"""Reward back-propagation: the reward's own gradient, passed back through the last steps of the sampler.

The rollout samples as it would show pictures (Euler, no noise) and records the state K steps before the end. The loss
runs these K steps again with gradient, decodes, scores, and is minus the reward of each sample. Earlier steps are a
constant: their gradient grows with the length of the chain and their activations fill the memory.

Three papers are options of this file. DRaFT-K (arXiv 2309.17400, section 4.1): `last_steps` K. AlignProp (arXiv
2310.03739; the manuscript was withdrawn later, its content absorbed elsewhere): K is drawn anew each step,
`random_steps`. ReFL (ImageReward, arXiv 2304.05977, algorithm 1): form `refl` takes one step, which starts K steps
before the end and goes all the way: the clean prediction x - sigma v is what is scored, with the loss relu(hinge - r).

The reward must be differentiable, and the policy learns whatever raises it: watch another one, at weight 0, beside it.

Differences from the reference code: the start states are the rollout's, sampled once a training step, so that with
several updates a step the later ones start from states of slightly older weights. The pretraining loss that ReFL's code
adds is left out; `kl` holds the policy back instead, on velocities. So are image augmentations, and DRaFT-LV, which
repeats the last step with fresh noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlkit import flow
from rlkit.types import Algorithm, Condition, Context, Loss, Models, Needs, Plan, Prompt, Rows, Samples, Scores


@dataclass(frozen=True)
class StartRows(Rows):
    """One row per sample: where its steps with gradient begin, and their sigmas."""

    x: Tensor  # [B, C, H, W]
    sigmas: Tensor  # [B, K+1], the same for all rows; the last is 0
    weight: Tensor  # [B] 0 where the sample was not scored
    prompts: tuple[Prompt, ...]  # [B] what the reward reads
    cond: tuple[str, ...]  # [B] keys into the condition cache


@dataclass(frozen=True)
class RewardBackprop(Algorithm):
    """Reward back-propagation (DRaFT-K, AlignProp, ReFL): a differentiable reward's gradient through the last steps."""

    kind = "flow"
    paper = "arXiv 2309.17400"

    last_steps: int = 1  # K, the steps with gradient
    random_steps: tuple[int, int] | None = None  # K drawn anew each step, both ends included; last_steps is then unused
    form: Literal["draft", "refl"] = "draft"  # all K steps, or one from where they begin to the clean prediction
    hinge: float | None = None  # a picture whose reward is above this teaches nothing: relu(hinge - r); None: -r
    checkpointing: bool = False  # compute activations again instead of keeping them: memory of one step, a third slower
    kl: float = 0.0  # weight of mean((v - v_reference)^2) at the states of the steps with gradient

    def __post_init__(self) -> None:
        if self.last_steps < 1:
            raise ValueError(f"last_steps must be 1 or more, not {self.last_steps}: no gradient would reach the policy")
        low, high = self._range
        if not 1 <= low <= high:
            raise ValueError(f"random_steps must be [fewest, most] with 1 <= fewest <= most, not {[low, high]}")
        if self.kl < 0:
            raise ValueError(f"kl must be 0 or more, not {self.kl}")

    @property
    def _range(self) -> tuple[int, int]:
        return self.random_steps or (self.last_steps, self.last_steps)

    def needs(self) -> Needs:
        return Needs(path=True, window=self._range[1], rows=1, differentiable=True, reference=self.kl > 0)

    def plan(self, context: Context) -> Plan:
        low, high = self._range
        steps = low + int(torch.randint(high - low + 1, (1,), generator=context.generator("last steps")))
        recorded = steps if self.form == "draft" else 1
        return Plan(dynamics="ode", record=True, window=(context.sampling_steps - steps, recorded))

    def rows(self, samples: Samples, scores: Scores, context: Context) -> StartRows:
        path = samples.path
        if path is None:
            raise ValueError("these samples carry no path: the plan must set record=True")
        start = path.states[:, 0]
        kept = scores.scored.reshape(-1, *(1,) * (start.ndim - 1))
        # ReFL's clean prediction is an Euler step to sigma 0.
        sigmas = path.sigmas if self.form == "draft" else torch.stack([path.sigmas[0], torch.tensor(0.0)])
        return StartRows(
            row=samples.index,
            x=torch.where(kept, start, 0.0),  # what overflowed is blank: NaN times a weight of 0 is NaN
            sigmas=sigmas.repeat(len(samples), 1),
            weight=scores.scored.to(torch.float32),
            prompts=samples.prompts,
            cond=tuple(prompt.key for prompt in samples.prompts),
        )

    def loss(self, models: Models, rows: StartRows) -> Loss:
        x, divergence = rows.x, torch.zeros_like(rows.weight)
        steps = list(pairwise(rows.sigmas.unbind(1)))
        told = models.current.told(rows.cond, x)
        for sigma, sigma_next in steps:
            v = self._velocity(models, x, sigma, told)
            if self.kl > 0:
                # At a fixed state: the reference passes no gradient back to it, and half a gradient is a wrong one.
                state = x.detach()
                here = self._velocity(models, state, sigma, told) if x.requires_grad else v
                distance = flow.v_kl(here, models.reference.velocity(state, sigma, rows.cond))
                divergence = divergence + distance / len(steps)
            x = flow.ode_step(x, v, sigma, sigma_next)
        reward = _score(models, models.decode(x), rows)
        value = -reward if self.hinge is None else torch.relu(self.hinge - reward)
        terms = {"reward": (value, rows.weight)}
        metrics = {"reward/in_loss": reward.detach()}
        if self.hinge is not None:
            metrics["beyond_hinge"] = (reward.detach() >= self.hinge).float()
        if self.kl > 0:
            terms["kl"] = (self.kl * divergence, rows.weight)
            metrics["kl"] = divergence.detach()
        return Loss(terms, metrics)

    def _velocity(self, models: Models, x: Tensor, sigma: Tensor, told: Condition) -> Tensor:
        if not self.checkpointing:
            return models.current.velocity(x, sigma, told)
        again: Tensor = checkpoint(models.current.velocity, x, sigma, told, use_reentrant=False)
        return again


def _score(models: Models, media: Tensor, rows: StartRows) -> Tensor:
    """The reward [B] with gradient; rows of weight 0 are not asked about, since their answer may be NaN, and get 0."""
    kept = torch.nonzero(rows.weight).flatten()
    if not len(kept):
        return 0 * media.flatten(1).sum(1)  # still depends on the weights: the learner differentiates it
    values = models.score(media[kept], [rows.prompts[i] for i in kept.tolist()])
    return torch.zeros_like(rows.weight).index_put((kept,), values)
