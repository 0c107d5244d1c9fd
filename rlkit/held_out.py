"""Held-out prompts, drawn and scored without any training: of the stage under way, or of another one's task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.errors import RecipeError
from rlkit.parts import Parts
from rlkit.record import describe_held_out
from rlkit.scoring import Scoring
from rlkit.stages import RunOptions, Stage
from rlkit.tracking import HELD_OUT
from rlkit.types import Context, Plan, Prompt, Samples, Scores, seed_of
from rlkit.weights import Weights


def prompts_of(stage: Stage, count: int) -> tuple[Prompt, ...]:
    """That many of its held-out prompts, as an evaluation draws them; () where its data has none."""
    return of_one_size(stage.data.open().held_out(count))


def of_one_size(prompts: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
    """Prompts as an evaluation draws them. Where they ask for several sizes, all are drawn at the backbone's own: its
    pictures are one tensor, and rewards of pictures of several sizes make no fair mean."""
    if len({prompt.size for prompt in prompts}) < 2:
        return prompts
    return tuple(replace(prompt, size=None) for prompt in prompts)


def to_encode(stage: Stage, trains: bool = True) -> Iterator[Prompt]:
    """All that a stage will ever ask its policy to encode; pictures are read as their prompts are reached.

    trains: False of a stage that is only evaluated. RecipeError, at once, for data to train on that has no end.
    """
    data = stage.data.open()
    every = data.everything() if trains else ()
    if every is None:
        what = f"the data of stage {stage.name!r} has no end, so it cannot all be encoded before the encoders go."
        raise RecipeError(what, where="policy.encoders", hint="Use `offload`, or `keep`.")
    counts = {stage.evaluate.held_out, stage.evaluate.ends or stage.evaluate.held_out}
    held_out = (prompt for count in sorted(counts) for prompt in of_one_size(data.held_out(count)))
    return chain(every, held_out)


def showing(stage: Stage, policy: Weights | Parts) -> Plan:
    """Sampling without exploration noise, as the stage evaluates; an untrained policy has only its own weights."""
    weights = stage.evaluate.weights
    return Plan(steps=stage.evaluate.steps, policy_set=weights if weights in policy.sets else "current")


def score(
    stage: Stage,
    policy: Weights | Parts,
    processes: Processes,
    options: RunOptions,
    prompts: tuple[Prompt, ...],
    plan: Plan,
    rollout: Any = None,
) -> tuple[Samples, Scores]:
    """One sample of each prompt, with the scores of the stage's rewards, which are loaded for it and let go again.

    rollout: one that is there already, and stays. None: the stage's own, likewise for this alone.
    """
    context = Context(options.seed, "evaluate", 0, stage.rollout.steps, {}, processes.gather)
    scoring = Scoring(stage.rewards, options.max_unscored, stage.total, policy.device)
    started = started_rollout(stage, policy, processes) if rollout is None else nullcontext(rollout)
    try:
        with started as used:
            samples = used.collect(PromptBatch(prompts, 1), plan, context)
            torch.manual_seed(seed_of(options.seed, "evaluate", processes.rank))  # what a reward of somebody's may draw
            return samples, scoring(samples, processes.gather, held_out=True)
    finally:
        scoring.close()


@contextmanager
def started_rollout(stage: Stage, policy: Weights | Parts, processes: Processes) -> Iterator[Any]:
    """The stage's rollout, for as long as it is needed: what it has started or loaded ends with it."""
    rollout = stage.rollout.start(policy, processes)
    try:
        yield rollout
    finally:
        close_rollout(rollout)


def close_rollout(rollout: Any) -> None:
    """A third party's may have nothing to close."""
    close = getattr(rollout, "close", None)
    if close is not None:
        close()


def of_others(
    stage: Stage, policy: Weights | Parts, processes: Processes, options: RunOptions, rollout: Any
) -> dict[str, float]:
    """What the other stages that `evaluate.also` names find of these weights: `held_out/COLUMN/STAGE`.

    Prompts, sampling steps and rewards are theirs; the set of the weights is that which this stage evaluates. rollout:
    of this stage, for those that would start the same.
    """
    row: dict[str, float] = {}
    for other in stage.also:
        prompts = prompts_of(other, other.evaluate.ends or other.evaluate.held_out)
        if other.name == stage.name or not prompts:
            continue
        plan = replace(showing(stage, policy), steps=other.evaluate.steps)
        shared = rollout if other.rollout == stage.rollout else None
        samples, scores = score(other, policy, processes, options, prompts, plan, shared)
        row |= under(other.name, describe_held_out(samples, scores, processes.gather))
    return row


def under(stage: str, row: Mapping[str, float]) -> dict[str, float]:
    """The columns of an evaluation with their standard errors, without those by kind, each under the stage's name."""
    names = [name for name in row if name.startswith(HELD_OUT) and f"{name}_se" in row]
    return {f"{name}/{stage}{end}": row[f"{name}{end}"] for name in names for end in ("", "_se")}


__all__ = [
    *("close_rollout", "of_one_size", "of_others", "prompts_of", "score", "showing", "started_rollout"),
    *("to_encode", "under"),
]
