"""Sampling in this process: the oracle that other rollouts are tested against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlkit import flow
from rlkit.data import PromptBatch
from rlkit.dist import Processes
from rlkit.policy import Policy
from rlkit.types import Context, Path, Plan, Samples, VelocityModel, generator


@dataclass(frozen=True)
class Local:
    """Samples with the policy that is being trained, in the same process: always in step with it.

    Pictures of one prompt that share their initial noise are equal until the first stochastic step. Up to there, the
    velocity of that step included, each is computed once a prompt.
    """

    kind = "flow"
    gives = ("path", "log_prob")

    steps: int = 10  # denoising steps
    batch: int | None = None  # pictures in one forward pass; None: all

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, not {self.steps}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch must be 1 or more, not {self.batch}")

    def start(self, policy: Policy, processes: Processes) -> LocalRollout:
        return LocalRollout(self, policy, processes)


class LocalRollout:
    """A started `Local`. Its weights are the learner's, so `load` only takes note of their version."""

    def __init__(self, options: Local, policy: Policy, processes: Processes) -> None:
        self.options = options
        self.policy = policy
        self.processes = processes
        self.version = 0

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.version = version

    def health(self) -> str:
        return "ok"

    @torch.no_grad()
    def collect(self, prompts: PromptBatch, plan: Plan, context: Context) -> Samples:
        """This process's share of the step's samples."""
        policy = self.policy
        share = self.processes.share(len(prompts))
        index = torch.arange(share.start, share.stop)
        # With fewer samples than processes, one without a share draws the first and keeps none of it: its columns are
        # then empty, but have the shapes of the others'.
        drawn = index if share else torch.zeros(1, dtype=torch.int64)
        policy.conditions.encode(prompts.prompts[i // prompts.group].text for i in drawn.tolist())
        model = policy.models[plan.policy_set]
        sigmas = policy.model.sigmas(plan.steps or self.options.steps)
        parts = []
        for part in drawn.split(self.options.batch or len(drawn)):
            texts = [prompts.prompts[i // prompts.group].text for i in part.tolist()]
            parts.append(_sample(model, policy, sigmas, plan, context, part, prompts.group, texts))
        latents = torch.cat([latent for latent, _ in parts])
        media = policy.model.decode(latents).float().cpu()[: len(share)]
        return Samples(
            media=(media.clamp(0, 1) * 255).round() / 255,  # what a saved file would hold, in training as in evaluation
            latents=latents.cpu()[: len(share)],
            prompts=tuple(prompts.prompts[i // prompts.group] for i in share),
            group=index // prompts.group,
            index=index,
            sample_id=context.step * len(prompts) + index,
            version=self.version,
            total=len(prompts),
            path=_join([path for _, path in parts if path is not None], len(share)),
        )


def _sample(
    model: VelocityModel,
    policy: Policy,
    sigmas: Tensor,
    plan: Plan,
    context: Context,
    index: Tensor,
    group: int,
    texts: Sequence[str],
) -> tuple[Tensor, Path | None]:
    """Latents [N, C, H, W] and the recorded window of N samples, `index` [N] being their places in the step."""
    def noise(purpose: str, ids: Tensor) -> Tensor:
        # [len(ids), C, H, W]: a generator of its own for each id, so that no draw depends on how samples were split.
        key = (context.seed, context.stage, context.step, purpose)
        draws = [torch.randn(*policy.model.latent_shape, generator=generator(*key, i)) for i in ids.tolist()]
        return torch.stack(draws).to(policy.device)

    steps = len(sigmas) - 1
    first, count = (0, 0) if plan.dynamics == "ode" else plan.window or (0, steps)
    if plan.shared_noise:
        origins, owner = torch.unique(index // group, return_inverse=True)  # [U], [N] -> position in [U]
        rows = [int(torch.nonzero(owner == u)[0]) for u in range(len(origins))]
        x = noise("group noise", origins)
        cond: Sequence[str] = [texts[row] for row in rows]
    else:
        owner, cond = None, texts
        x = noise("noise", index)

    states, means, log_probs = [], [], []
    for step in range(steps):
        sigma, sigma_next = float(sigmas[step]), float(sigmas[step + 1])
        v = model.velocity(x, torch.full((len(x),), sigma), cond)
        if not first <= step < first + count:
            x = flow.ode_step(x, v, sigma, sigma_next)
            continue
        if owner is not None:  # from here on the group's members part
            x, v, cond, owner = x[owner], v[owner], texts, None
        mean, std = flow.sde_step(x, v, sigma, sigma_next, plan.noise_level, plan.dynamics, float(sigmas[1]))
        following = mean + std * noise(f"step {step}", index)
        if plan.record:
            states.append(x)
            means.append(mean)
            log_probs.append(flow.log_prob(following, mean, std))
        x = following
        last = x
    if owner is not None:
        x = x[owner]
    if not states:
        return x, None
    return x, Path(
        states=torch.stack([*states, last], dim=1).cpu(),
        means=torch.stack(means, dim=1).cpu(),
        log_prob=torch.stack(log_probs, dim=1).cpu(),
        sigmas=sigmas[first : first + count + 1],
        steps=torch.arange(first, first + count),
        sigma_max=float(sigmas[1]),
    )


def _join(parts: list[Path], count: int) -> Path | None:
    """The parts as one path, of which the first `count` samples are kept."""

    def column(values: list[Tensor]) -> Tensor:
        return (torch.cat(values) if len(values) > 1 else values[0])[:count]

    if not parts:
        return None
    return replace(
        parts[0],
        states=column([part.states for part in parts]),
        means=column([part.means for part in parts]),
        log_prob=column([part.log_prob for part in parts]),
    )
