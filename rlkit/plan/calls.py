"""How often a step calls the network: counted by making the step, with a network of one number.

Algorithms, the sampler and the learner are the real ones, so nothing here knows how any of them works, a third party's
included. What is not there is what costs: the latents are of one value, prompts and scores are invented. How many rows
go through the network depends on neither.

Answers of a policy that writes are invented too, a token each: rows are counted, and how long they are is said
elsewhere. Whom an algorithm asks about them, a model or an endpoint, is not opened, and says nothing: what it would
learn from that is not counted.

Not every step is made: the first, one for each way in which the algorithm wants a step sampled, and a few more across
the stage, since some algorithms ask more of later ones. The others count as the nearest made before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlkit import registry
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.episodes import Episode
from rlkit.language import LanguagePolicy
from rlkit.learner import Learner, LearnerOptions
from rlkit.policy import Policy
from rlkit.stages import Stage
from rlkit.types import (
    Condition,
    Context,
    FlowModel,
    Plan,
    Prompt,
    Samples,
    Scores,
    TokenModel,
    Tokens,
    Tools,
    generator,
)

SEED = 0
LOOKED_AT = 500  # steps whose plan is asked for
MADE = 16  # steps at most that are made
LATER = 3  # of them, spread over the stage


@dataclass(frozen=True)
class StepCalls:
    """Rows that go through the network in one step, over all devices; guidance counts twice."""

    sampled: float = 0.0
    compared: float = 0.0  # in training, without a gradient: old, reference
    trained: float = 0.0  # with one
    updates: float = 0.0

    @property
    def total(self) -> float:
        """What a run's metrics call network_calls."""
        return self.sampled + self.compared + self.trained


@dataclass(frozen=True)
class StageCalls:
    start: int  # rows before the first step, which the loop counts with it
    steps: tuple[StepCalls, ...]  # each step that was looked at

    @property
    def mean(self) -> StepCalls:
        count = len(self.steps)
        columns = ("sampled", "compared", "trained", "updates")
        return StepCalls(*(sum(getattr(one, name) for one in self.steps) / count for name in columns))


class OneNumber(nn.Module):
    """A network whose answer is its input times its only weight, and which counts the rows that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.plain = 0  # rows without a gradient
        self.graded = 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.graded += len(x)
        else:
            self.plain += len(x)
        return x * self.weight

    def take(self) -> tuple[int, int]:
        """(rows without a gradient, rows with one) since this was last asked."""
        taken = self.plain, self.graded
        self.plain = self.graded = 0
        return taken


def rehearse(stage: Stage, guidance: float = 1.0, devices: int = 1) -> StageCalls:
    """The network calls of a stage. Several devices share less of a group's beginning: each draws its own part of it,
    as it does where the rollout's `batch` cuts through a group. Of a policy that writes, those of training alone."""
    made = _Rehearsal(stage, guidance, devices)
    start = made.begin()
    return StageCalls(start, tuple(made.each()))


class _Rehearsal:
    def __init__(self, stage: Stage, guidance: float, devices: int) -> None:
        self.stage, self.algorithm = stage, _unasked(stage.algorithm)
        self.net = OneNumber()
        needs = stage.algorithm.needs()
        self.writes = needs.kind == "tokens"
        self.policy: Any
        if self.writes:
            self.policy = LanguagePolicy(_writer(self.net), None, torch.device("cpu"), "fp32", SEED)
        else:
            self.policy = Policy(_model(self.net), None, torch.device("cpu"), "fp32", SEED, guidance)
        for name, wanted in (("old", needs.old), ("reference", needs.reference)):
            if wanted:
                self.policy.keep(name)
        numbers = stage.learner
        # How rows are split over passes does not change how many they are, so all of a batch go at once.
        options = LearnerOptions(lr=1e-6, batch=numbers.batch, epochs=numbers.epochs, ema=numbers.ema)
        self.learner = Learner(self.policy, options, Processes())
        self.models = self.policy.models_with(lambda media, prompts: media.mean(dim=(1, 2, 3)))
        self.state: dict[str, Any] = {}
        self.rollout: Any = None
        if not needs.preference and not self.writes:
            share = math.ceil(stage.data.per_step * stage.data.group / devices)
            sampling = {
                "steps": stage.rollout.steps,
                "batch": min(share, getattr(stage.rollout, "batch", None) or share),
            }
            self.rollout = registry.build("rollouts", "local", sampling).start(self.policy, Processes())

    def context(self, step: int) -> Context:
        steps = self.stage.rollout.steps
        return Context(SEED, self.stage.name, step, steps, self.state, gather=lambda values: values)

    def begin(self) -> int:
        """Let the algorithm calibrate itself; the rows that it takes."""

        def sample(plan: Plan, round: int) -> tuple[Samples, Scores]:
            samples = self.samples(plan, self.context(round))
            return samples, self.scores(samples, round)

        self.state.update(self.algorithm.start(Tools(self.context(0), sample)))
        return sum(self.net.take())

    def each(self) -> list[StepCalls]:
        """Every step that is looked at, in order."""
        plans = [self.algorithm.plan(self.context(step)) for step in range(min(self.stage.steps, LOOKED_AT))]
        made: dict[int, StepCalls] = {}
        for step in _chosen(plans):
            made[step] = self.step(plans[step], step)
        found = []
        for step, plan in enumerate(plans):
            alike = [one for one in made if plans[one] == plan and (one > 0 or step == 0)] or list(made)
            found.append(made[max((one for one in alike if one <= step), default=min(alike))])
        return found

    def step(self, plan: Plan, step: int) -> StepCalls:
        context, size = self.context(step), self.stage.learner.batch
        samples = self.samples(plan, context)
        sampled = sum(self.net.take())
        rows = self.algorithm.rows(samples, self.scores(samples, step), context)
        rows = self.algorithm.before(self.models, rows, self.stage.learner.micro_batch or size)
        before = self.learner.updates
        for epoch in range(self.stage.learner.epochs):
            for batch in rows.batches(size, context, epoch):
                self.learner.step(self.algorithm.loss, self.models, batch)
        self.algorithm.after(self.policy, context)
        compared, trained = self.net.take()
        return StepCalls(sampled, compared, trained, self.learner.updates - before)

    def samples(self, plan: Plan, context: Context) -> Samples:
        data = self.stage.data
        prompts = tuple(Prompt(id=i, text=f"prompt {i}") for i in range(data.per_step))
        batch = PromptBatch(prompts, data.group)
        if self.rollout is None:
            self.policy.conditions.encode(prompts)
            return _written(batch) if self.writes else _handed_out(batch)
        samples: Samples = self.rollout.collect(batch, plan, context)
        return samples

    def scores(self, samples: Samples, step: int) -> Scores:
        """Numbers that differ, so that every group prefers somebody."""
        weights = torch.tensor([one.weight for one in self.stage.rewards] or [1.0])
        raw = torch.rand(len(samples), len(weights), generator=generator("rehearsal", step, len(samples)))
        names = tuple(one.name for one in self.stage.rewards) or ("none",)
        previews = None if samples.previews is None else self.scores(samples.previews, step)
        return Scores(names, raw, torch.ones_like(raw, dtype=torch.bool), weights, previews=previews)


def _chosen(plans: Sequence[Plan]) -> list[int]:
    """The steps that are made: the first, each plan's first one after it, and some more across the stage."""
    firsts: dict[Plan, int] = {}
    for step, plan in enumerate(plans[1:], 1):
        firsts.setdefault(plan, step)
    kept = sorted(firsts.values())
    room = MADE - 1 - LATER
    if len(kept) > room:  # evenly spread over the plans that there are
        kept = [kept[round(i * (len(kept) - 1) / (room - 1))] for i in range(room)]
    spread = [round(i * (len(plans) - 1) / LATER) for i in range(1, LATER + 1)]
    return sorted({0, *kept, *spread})


def _model(net: OneNumber) -> FlowModel:
    def velocity(called: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        answer: Tensor = called(x)
        return answer

    def encode(prompts: Sequence[Prompt]) -> list[Condition]:
        return [{"tokens": torch.zeros(1)} for _ in prompts]

    return FlowModel(
        net=net,
        velocity=velocity,
        encode=encode,
        decode=lambda latents: latents.sigmoid().repeat(1, 3, 1, 1),
        sigmas=lambda steps: torch.linspace(1, 0, steps + 1),
        latent_shape=(1, 1, 1),
        lora_targets=(),
    )


class Nobody:
    """Stands for whoever an algorithm opens: asked about anything, it has nothing to say."""

    def open(self) -> Callable[[Sequence[Any]], list[None]]:
        return lambda asked: [None for _ in asked]


def _unasked(algorithm: Any) -> Any:
    """The algorithm without those whom it would ask: the options that can be opened."""
    options = {one.name: getattr(algorithm, one.name) for one in fields(algorithm)} if is_dataclass(algorithm) else {}
    opened = {name: Nobody() for name, one in options.items() if callable(getattr(one, "open", None))}
    return replace(algorithm, **opened) if opened else algorithm


def _writer(net: OneNumber) -> TokenModel:
    """Of two words."""

    def logits(called: nn.Module, ids: Tensor, there: Tensor, cond: Condition) -> Tensor:
        answer: Tensor = called(torch.zeros(*ids.shape, 2))
        return answer

    return TokenModel(
        net=net,
        logits=logits,
        encode=lambda prompts: [{"ids": torch.zeros(1, dtype=torch.int64)} for _ in prompts],
        decode=lambda answers: ["" for _ in answers],
        ends=(1,),
        longest=2,
        lora_targets=(),
        collate=lambda conditions: {},
        write=lambda folder: None,
    )


def _written(batch: PromptBatch) -> Samples:
    """An answer of one token to each prompt, as the episode of an agent who asked nobody."""
    index = torch.arange(len(batch))
    nothing = torch.zeros(len(batch), 0)
    ones, ids = torch.ones(len(batch), dtype=torch.int64), torch.zeros(len(batch), 2, dtype=torch.int64)
    decided = torch.tensor([False, True]).expand(len(batch), 2)
    chosen = torch.where(decided, math.log(0.5), 0.0)
    return Samples(
        media=nothing,
        latents=nothing,
        prompts=tuple(batch.of(i) for i in index.tolist()),
        group=index // batch.group,
        index=index,
        sample_id=index,
        version=0,
        total=len(batch),
        tokens=Tokens(ids, 2 * ones, ones, decided, chosen, ones.bool(), 1.0),
        texts=("",) * len(batch),
        episodes=(Episode((), None, "turns"),) * len(batch),
    )


def _handed_out(batch: PromptBatch) -> Samples:
    """Pairs of which somebody chose the first, as a data set gives them: nothing is sampled."""
    batch = replace(batch, group=2)
    index = torch.arange(len(batch))
    media = torch.rand(len(batch), 3, 1, 1, generator=generator("rehearsal"))
    return Samples(
        media=media,
        latents=media[:, :1],
        prompts=tuple(batch.of(i) for i in index.tolist()),
        group=index // 2,
        index=index,
        sample_id=index,
        version=0,
        total=len(batch),
        preference=index % 2 == 0,
    )
