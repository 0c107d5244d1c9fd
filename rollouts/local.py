"""Sampling in this process: the oracle that other rollouts are tested against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from rlkit import flow
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.language import LanguagePolicy
from rlkit.policy import Policy
from rlkit.rollouts._writing import Writing
from rlkit.types import Context, FlowModel, Path, Plan, Samples, VelocityModel, generator


@dataclass(frozen=True)
class Local:
    """Samples with the policy that is being trained, in the same process: always in step with it.

    Pictures of one prompt that share their initial noise are equal until the first stochastic step. Up to there, the
    velocity of that step included, each is computed once a prompt.
    """

    kinds = ("flow", "tokens")
    gives = ("path", "log_prob", "previews")

    steps: int = 10  # denoising steps
    batch: int | None = None  # pictures, or answers, in one forward pass; None: all
    most: int = 64  # tokens of an answer, of a token policy
    temperature: float = 1.0  # at which answers are sampled: a part of the policy, in training too
    # Answers are sampled from the likeliest tokens alone, those that have this share together. Training does not know.
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, not {self.steps}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch must be 1 or more, not {self.batch}")
        if self.most < 1:
            raise ValueError(f"most must be 1 token or more, not {self.most}")
        if not self.temperature > 0:
            what = f"temperature must be above 0, not {self.temperature}: greedy choices have no density"
            raise ValueError(what)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (all tokens), not {self.top_p}")

    def start(self, policy: Policy | LanguagePolicy, processes: Processes) -> LocalRollout | Writing:
        if isinstance(policy, LanguagePolicy):
            return Writing(policy, processes, self.most, self.temperature, self.batch, self.top_p)
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
        sizes = sorted({one.size or (0, 0) for one in prompts.prompts})
        if len(sizes) > 1:
            listed = ", ".join(f"{height} x {width}" if height else "the backbone's own" for height, width in sizes)
            raise ValueError(f"prompts of several sizes cannot be drawn together: {listed}")
        flow_model = policy.model_at(prompts.prompts[0].size)
        share = self.processes.share(len(prompts))
        index = torch.arange(share.start, share.stop)
        # With fewer samples than processes, one without a share draws the first and keeps none of it: its columns are
        # then empty, but have the shapes of the others'.
        drawn = index if share else torch.zeros(1, dtype=torch.int64)
        policy.conditions.encode(prompts.of(i) for i in drawn.tolist())
        model = policy.models[plan.policy_set]
        sigmas = flow_model.sigmas(plan.steps or self.options.steps)
        limit = self.options.batch
        parts, media = [], []
        for part in drawn.split(limit or len(drawn)):
            keys = [prompts.of(i).key for i in part.tolist()]
            done = _Sampling(model, flow_model, sigmas, plan, context, part, prompts.group, keys, limit).run()
            parts.append(done)
            media.append(self._pictures(done.latents))
            if context.sampled and len(part) < len(index):
                context.sampled(self._finished(prompts, part, media[-1], done.latents, context))
        kept = len(share)
        latents = torch.cat([part.latents for part in parts])[:kept]
        samples = replace(
            self._finished(prompts, index, torch.cat(media)[:kept], latents, context),
            path=_join([part.path for part in parts if part.path is not None], kept),
            sigmas=sigmas,
        )
        return self._with_previews(samples, parts) if plan.completions is not None else samples

    def _finished(
        self, prompts: PromptBatch, index: Tensor, media: Tensor, latents: Tensor, context: Context
    ) -> Samples:
        """The samples of the step at these places."""
        return Samples(
            media=media,
            latents=latents.cpu(),
            prompts=tuple(prompts.of(i) for i in index.tolist()),
            group=index // prompts.group,
            index=index,
            sample_id=context.step * len(prompts) + index,
            version=self.version,
            total=len(prompts),
        )

    def _pictures(self, latents: Tensor) -> Tensor:
        media = self.policy.model_for(latents).decode(latents).float().cpu()
        return (media.clamp(0, 1) * 255).round() / 255  # what a saved file would hold, in training as in evaluation

    def _with_previews(self, samples: Samples, parts: list[_Sampled]) -> Samples:
        """The samples with the completions of their recorded states, each a sample like any other."""
        offset, columns, latents, parents = 0, [], [], []
        for part in parts:
            columns.append(part.preview_of + offset)
            latents.append(part.previews)
            parents.append(part.preview_parent)
            offset += len(part.previews)
        at = torch.cat(parents)  # [M] index in the step
        if not len(samples):  # this process holds no sample
            at, latents = at[:0], [part.previews[:0] for part in parts]
        where = at - int(samples.index[0]) if len(samples) else at
        plain = samples.select(where)
        clean = torch.cat(latents)
        previews = replace(plain, media=self._pictures(clean), latents=clean.cpu())
        return replace(samples, previews=previews, preview_of=torch.cat(columns)[: len(samples)])


@dataclass(frozen=True)
class _Sampled:
    latents: Tensor  # [N, C, H, W]
    path: Path | None
    previews: Tensor  # [M, C, H, W]
    preview_of: Tensor  # [N, K]
    preview_parent: Tensor  # [M] index in the step


class _Sampling:
    """N samples on their way from noise to latents, `index` [N] being their places in the step."""

    def __init__(
        self,
        model: VelocityModel,
        drawn: FlowModel,
        sigmas: Tensor,
        plan: Plan,
        context: Context,
        index: Tensor,
        group: int,
        keys: Sequence[str],
        limit: int | None,
    ) -> None:
        self.model, self.drawn, self.plan, self.context = model, drawn, plan, context
        self.device = next(drawn.net.parameters()).device
        self.index, self.keys, self.limit = index, keys, limit
        steps = len(sigmas) - 1
        stochastic = plan.dynamics != "ode"
        self.first, self.count = plan.window or (0, steps) if stochastic or plan.record else (0, 0)
        self.sigmas = _shortened(sigmas, self.first + self.count, plan.tail)
        # Before the members of a group part, one row stands for those that are told the same: `members` are the rows
        # that they grow from.
        self.members: Tensor | None = None
        self.cond = keys
        if plan.shared_noise:
            told = list(zip((index // group).tolist(), keys, strict=True))
            rows = list(dict.fromkeys(told))
            self.members = torch.tensor([rows.index(one) for one in told])
            self.x = self.beginning("group noise", torch.tensor([row for row, _ in rows]))
            self.cond = [key for _, key in rows]
        else:
            self.x = self.beginning("noise", index)
        self.behind: tuple[Tensor, float] | None = None  # what the second-order solver remembers
        self.after_window = self.x
        self.states: list[Tensor] = []
        self.means: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self.open: list[Tensor] = []  # completions under way, one entry a decision
        self.open_cond: list[Sequence[str]] = []
        self.preview_rows: list[Tensor] = []  # [N] each: the row of the decision's completion that is a sample's own

    def noise(self, purpose: str, ids: Tensor) -> Tensor:
        # [len(ids), C, H, W]: a generator of its own for each id, so that no draw depends on how samples were split.
        key = (self.context.seed, self.context.stage, self.context.step, purpose)
        draws = [torch.randn(*self.drawn.latent_shape, generator=generator(*key, i)) for i in ids.tolist()]
        return torch.stack(draws).to(self.device)

    def beginning(self, purpose: str, ids: Tensor) -> Tensor:
        return self.noise(purpose, ids) * self.drawn.start

    def run(self) -> _Sampled:
        for step in range(len(self.sigmas) - 1):
            sigma, sigma_next = float(self.sigmas[step]), float(self.sigmas[step + 1])
            v = self.model.velocity(self.x, torch.full((len(self.x),), sigma), self.cond)
            self.advance_completions(sigma, sigma_next)
            if self.first <= step < self.first + self.count:
                if self.plan.completions is not None:
                    self.open_completion(v, sigma, sigma_next)
                if self.members is not None:  # from here on the group's members part
                    self.x, v = self.x[self.members], v[self.members]
                    self.cond, self.members = self.keys, None
                self.decide(step, v, sigma, sigma_next)
            else:
                self.x = self.noiseless(v, sigma, sigma_next)
        x = self.x if self.members is None else self.x[self.members]
        return _Sampled(x, self.path(), *self.previews())

    def noiseless(self, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
        if self.plan.solver == "euler":
            return flow.ode_step(self.x, v, sigma, sigma_next)
        following = flow.dpm_step(self.x, v, sigma, sigma_next, self.behind)
        self.behind = flow.predict_clean(self.x, v, sigma), sigma
        return following

    def decide(self, step: int, v: Tensor, sigma: float, sigma_next: float) -> None:
        """One step of the window: stochastic unless the plan's dynamics have no noise."""
        level, dynamics = self.plan.level(step), self.plan.dynamics
        mean, std = flow.sde_step(self.x, v, sigma, sigma_next, level, dynamics, float(self.sigmas[1]))
        density = dynamics != "ode"
        following = mean + std * self.noise(f"step {step}", self.index) if density else mean
        if self.plan.record:
            self.states.append(self.x)
            self.means.append(mean)
            nothing = torch.full((len(mean),), torch.nan, device=mean.device)
            self.log_probs.append(flow.log_prob(following, mean, std) if density else nothing)
        self.x, self.behind = following, None
        self.after_window = following  # of the window so far

    def open_completion(self, v: Tensor, sigma: float, sigma_next: float) -> None:
        """Begin the noiseless completion of the present state. Its first step needs no call: `v` is this state's."""
        own = torch.arange(len(self.x)) if self.members is None else self.members
        self.preview_rows.append(own + sum(len(one) for one in self.open))
        x, calls = self.x, self.plan.completions or 0
        if not calls:
            self.open.append(flow.ode_step(x, v, sigma, sigma_next))
        else:
            grid = torch.linspace(sigma, 0, calls + 1).tolist()
            for here, there in pairwise(grid):
                v = v if here == grid[0] else self.velocity(x, here, self.cond)
                x = flow.ode_step(x, v, here, there)
            self.open.append(x)
        self.open_cond.append(self.cond)

    def advance_completions(self, sigma: float, sigma_next: float) -> None:
        """One step of all completions together: they stand at the same sigma, whichever decision they began at."""
        if not self.open or self.plan.completions:
            return
        x, cond = torch.cat(self.open), [key for keys in self.open_cond for key in keys]
        following = flow.ode_step(x, self.velocity(x, sigma, cond), sigma, sigma_next)
        self.open = list(following.split([len(one) for one in self.open]))

    def velocity(self, x: Tensor, sigma: float, cond: Sequence[str]) -> Tensor:
        """In pieces no larger than the rollout's batch."""
        size = self.limit or len(x)
        pieces = []
        for start in range(0, len(x), size):
            part = x[start : start + size]
            pieces.append(self.model.velocity(part, torch.full((len(part),), sigma), cond[start : start + size]))
        return torch.cat(pieces)

    def path(self) -> Path | None:
        if not self.states:
            return None
        first, end = self.first, self.first + self.count
        return Path(
            states=torch.stack([*self.states, self.after_window], dim=1).cpu(),
            means=torch.stack(self.means, dim=1).cpu(),
            log_prob=torch.stack(self.log_probs, dim=1).cpu(),
            sigmas=self.sigmas[first : end + 1],
            noise_levels=torch.tensor([self.plan.level(step) for step in range(first, end)]),
            steps=torch.arange(first, end),
            sigma_max=float(self.sigmas[1]),
        )

    def previews(self) -> tuple[Tensor, Tensor, Tensor]:
        """(latents [M], preview_of [N, K], parents [M]); of members that share one, the first is its parent."""
        if not self.open:
            return self.x[:0], torch.zeros(len(self.index), 0, dtype=torch.int64), self.index[:0]
        rows = torch.stack(self.preview_rows, dim=1)
        parents = torch.full((sum(len(one) for one in self.open),), int(self.index.max()))
        for column in rows.unbind(1):
            parents.scatter_reduce_(0, column, self.index, "amin")
        return torch.cat(self.open), rows, parents


def _shortened(sigmas: Tensor, end: int, tail: int | None) -> Tensor:
    """The schedule with `tail` of its steps after step `end`, as evenly spread as they can be; [T+1] if None."""
    left = len(sigmas) - 1 - end
    if tail is None or tail >= left:
        return sigmas
    places = torch.linspace(0, left, tail + 1).round().to(torch.int64)
    return torch.cat([sigmas[:end], sigmas[end + places]])


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
