"""What suites there are: how each one's prompts are read, which reward scores them, how its numbers are summed up.

A suite is not its benchmark: the detectors, the judges and their questions are those of the rewards here, so that
numbers do not compare with published ones. They compare with each other.

An interval is that of the prompts: as if the suite had drawn its prompts from all that it could ask. The bootstrap
draws prompts, each with all of its seeds, and never pictures: two pictures of one prompt are not two observations.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlkit import registry
from rlkit.data.picture_files import Unread
from rlkit.data.prompts import WorldPrompts
from rlkit.errors import DataError, RecipeError, nearest
from rlkit.evaluation import formats as suite_formats
from rlkit.evaluation.formats import Case
from rlkit.scoring import WeightedReward

if TYPE_CHECKING:
    from rlkit.stages import Stage

JUDGE = "vlm_judge"
DRAWS = 2000  # of the bootstrap
TAILS = (2.5, 97.5)  # per cent, on both sides of a 95 % interval


@dataclass(frozen=True)
class Suite:
    name: str
    what: str
    reward: str  # of the catalogue
    options: Mapping[str, Any]  # of the reward, unless the recipe's own or the command line say otherwise
    overall: Literal["prompts", "categories"]  # what is averaged: all prompts, or the means of the categories
    read: Callable[[Path], tuple[Case, ...]] | None = None  # None: its prompts are the recipe's own
    fixed: Mapping[str, Any] = field(default_factory=dict)  # options that make it this suite
    column: str = ""  # the reward's component that counts; "": its number

    @property
    def judged(self) -> bool:
        return self.reward == JUDGE

    @property
    def counts(self) -> str:
        """The column of a record's scores that counts."""
        return f"{self.reward}/{self.column}" if self.column else self.reward


def _judged(name: str, what: str, mode: str, overall: Any, read: Callable[[Path], tuple[Case, ...]]) -> Suite:
    return Suite(name, what, JUDGE, {}, overall, read, {"mode": mode})


SUITES = {
    one.name: one
    for one in (
        Suite("world", "the embedded world's held-out panel", "composition", {}, "prompts", column="strict"),
        # The official evaluation takes more objects than wanted, and excludes them where that matters; its overall
        # score is the mean of the tags' (github.com/djghosh13/geneval, evaluation/summary_scores.py).
        Suite(
            *("geneval", "GenEval", "geneval", {"at_least": True}, "categories", suite_formats.geneval),
            *({"score": "strict"}, "strict"),
        ),
        _judged("dpg", "DPG-Bench's prompts", "plan", "prompts", suite_formats.dpg),
        _judged("oneig", "OneIG-Bench's prompts", "plan", "categories", suite_formats.oneig),
        _judged("gedit", "GEdit-Bench", "viescore", "categories", suite_formats.gedit),
        _judged("imgedit", "ImgEdit-Bench's basic edits", "two_stage", "categories", suite_formats.imgedit),
        _judged("omnicontext", "OmniContext", "omnicontext", "categories", suite_formats.omnicontext),
        # The mean of all samples: github.com/MeiGen-AI/GenEvolve, scripts/evaluate_images.py, summarize_subset.
        _judged("genevolve", "GenEvolve-Bench, by KScore", "kscore", "prompts", suite_formats.genevolve),
    )
}


def named(name: str) -> Suite:
    if name not in SUITES:
        known = f"Suites: {', '.join(SUITES)}."
        raise RecipeError(f"no suite {name!r}.{nearest(name, SUITES)}", where="--suite", hint=known)
    return SUITES[name]


# ---- its prompts -----------------------------------------------------------------------------------------------------


def cases_of(suite: Suite, path: Path | None, stage: Stage, count: int) -> tuple[Case, ...]:
    """`count`: of the embedded world's panel, in which no prompt is twice: seeds are for that."""
    if suite.read is None:
        if path is not None:
            what = f"the suite {suite.name} has prompts of its own."
            raise RecipeError(what, where="--prompts", hint="Leave it out.")
        return _of_world(suite, stage, count)
    if path is None:
        what = f"the suite {suite.name} reads your copy of the benchmark."
        raise RecipeError(what, where="--prompts", hint="Give its file or folder; docs/evaluation.md says which.")
    if not path.exists():
        raise DataError("no such file or folder", where=str(path), hint="Nothing is downloaded: give your copy.")
    return suite.read(path)


def _of_world(suite: Suite, stage: Stage, count: int) -> tuple[Case, ...]:
    if not isinstance(stage.data, WorldPrompts):
        what = "is for recipes on the embedded world, and this one's data is another."
        hint = f"Suites for prompts of yours: {', '.join(name for name in SUITES if name != suite.name)}."
        raise RecipeError(what, where="--suite world", hint=hint)
    panel = {prompt.key: prompt for prompt in stage.data.held_out(count)}
    return tuple(Case(str(one.id), one.kind or "all", Unread(one)) for one in panel.values())


# ---- its reward ------------------------------------------------------------------------------------------------------


def reward_of(
    suite: Suite, stage: Stage, judge: Mapping[str, Any] | None, given: Mapping[str, Any] | None = None
) -> WeightedReward:
    """The reward that scores a suite: with the options of the recipe's own of that name, where it has one.

    judge: `endpoints` and `model`, of the command line. given: more options of it, which count before all others.
    """
    own = next((one for one in stage.rewards if (one.entry or one.name) == suite.reward), None)
    options = {**suite.options, **(asdict(own.reward) if own is not None else {})}  # type: ignore[call-overload]
    if judge is not None and not suite.judged:
        what = f"the suite {suite.name} is scored by {suite.reward}, which asks no judge."
        raise RecipeError(what, where="--judge", hint="Leave it out.")
    if suite.judged:
        if judge is None and own is None:
            hint = f"Give --judge URL of an OpenAI-compatible endpoint, or a reward {JUDGE} in the recipe's last stage."
            raise RecipeError(f"the suite {suite.name} needs a judge.", where="--judge", hint=hint)
        if options.get("mode") != suite.fixed["mode"]:  # prompt files belong to a mode
            options.pop("prompts", None)
        options |= judge or {}
    options |= {**suite.fixed, **(given or {})}
    reward = registry.build("rewards", suite.reward, options, "--reward")
    plain = WeightedReward(suite.reward, reward, 1.0)
    return plain if own is None else replace(plain, asking=own.asking)


# ---- its numbers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval. None where there is nothing, or one prompt of which no spread is known."""

    mean: float | None
    low: float | None
    high: float | None
    error: float | None  # the bootstrap's standard deviation
    prompts: int  # that have a number


@dataclass(frozen=True)
class Summary:
    overall: Estimate
    categories: Mapping[str, Estimate]


def summed(values: Mapping[str, Mapping[str, Sequence[float]]], overall: str, draws: int = DRAWS) -> Summary:
    """`values`: category -> prompt -> its numbers, one for each seed that was scored; none where there is none."""
    means = {
        category: np.array([statistics.fmean(numbers) for numbers in prompts.values() if numbers])
        for category, prompts in sorted(values.items())
    }
    groups = {category: found for category, found in means.items() if len(found)}
    rng = np.random.default_rng(0)
    drawn = {category: _bootstrap(found, rng, draws) for category, found in groups.items()}
    each = {
        category: _estimate(found.mean(), drawn[category], len(found), len(found) > 1)
        if len(found)
        else Estimate(None, None, None, None, 0)
        for category, found in ((name, means[name]) for name in means)
    }
    if not groups:
        return Summary(Estimate(None, None, None, None, 0), each)
    everything = np.concatenate(list(groups.values()))
    count = len(everything)
    if overall == "prompts":
        return Summary(_estimate(everything.mean(), _bootstrap(everything, rng, draws), count, count > 1), each)
    mean = np.mean([found.mean() for found in groups.values()])
    # A category of one prompt has a spread that is not known, and so has a mean which it is part of.
    known = all(len(found) > 1 for found in groups.values())
    return Summary(_estimate(mean, np.mean(list(drawn.values()), axis=0), count, known), each)


def _bootstrap(values: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """[draws] means of as many values [n], drawn with replacement."""
    found: np.ndarray = values[rng.integers(len(values), size=(draws, len(values)))].mean(axis=1)
    return found


def _estimate(mean: Any, drawn: np.ndarray, prompts: int, known: bool) -> Estimate:
    if not known:
        return Estimate(float(mean), None, None, None, prompts)
    low, high = np.percentile(drawn, TAILS)
    return Estimate(float(mean), float(low), float(high), float(drawn.std()), prompts)


__all__ = ["SUITES", "Estimate", "Suite", "Summary", "cases_of", "named", "reward_of", "summed"]
