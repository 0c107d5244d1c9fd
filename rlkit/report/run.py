"""A run folder, read: the rows of metrics.jsonl by their kind, and the recipe that they are of."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlkit.errors import DataError
from rlkit.recipe_course import running
from rlkit.report.charts import Span
from rlkit.tracking import Metrics

Row = Mapping[str, Any]

TRAINED_ON = ("per_step", "group", "kinds", "split")  # of a stage's data: what does not change its held-out prompts
ASKED = ("when", "batch", "workers", "processes", "timeout", "retries", "ahead", "cache")  # of a reward: not its number
JOINED = ("weight", "shift", "scale", "clip")  # of a reward: what only the total takes from it


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    folder: Path
    rows: list[dict[str, Any]]
    recipe_text: str
    recipe: dict[str, Any]
    environment: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Run:
        import yaml

        if not folder.is_dir():
            hint = "Give the folder that `rlkit train` named when it began."
            raise DataError("there is no such run folder.", where=str(folder), hint=hint)
        rows = Metrics.read(folder) if (folder / Metrics.NAME).exists() else []
        if not rows:
            hint = "The run ended before its first step, or this is not the folder of a run."
            raise DataError(f"no numbers in {Metrics.NAME}.", where=str(folder), hint=hint)
        text = _text(folder / "recipe.yaml")
        recipe = _mapping(folder / "recipe.yaml", text, yaml.safe_load)
        environment = _mapping(folder / "environment.json", _text(folder / "environment.json"), json.loads)
        return cls(folder, rows, text, recipe, environment)

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == "train"]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """One for each point of a stage, since a resumed run may have evaluated its checkpoint again; two where a
        monitor went back: what it left, and what it restored."""
        found = [row for row in self.rows if row["kind"] == "evaluation"]
        latest = {(row["stage"], row["step"], row.get("restored")): row for row in found}
        return sorted(latest.values(), key=lambda row: row["at"])

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == "event"]

    @property
    def alarms(self) -> list[dict[str, Any]]:
        return [row for row in self.events if row["event"] == "alarm"]

    @cached_property
    def stages(self) -> list[str]:
        """In the order in which they ran."""
        return list(dict.fromkeys(row["stage"] for row in self.rows if row["kind"] != "event"))

    @cached_property
    def course(self) -> dict[str, Any]:
        """The stages that were to run, in their order, as the recipe has them; those that ran, where it is lost."""
        return running(self.recipe) or {name: {} for name in self.stages}

    @property
    def finished(self) -> bool:
        said = [row["event"] for row in self.events if row["event"] in ("finished", "interrupted", "resumed")]
        return said[-1:] == ["finished"]

    def alike(self, stage: str, other: str, score: str) -> bool:
        """Whether a held-out score says the same in both stages: of the same prompts, by the same rewards."""
        return self._measure(stage, score) == self._measure(other, score)

    def _measure(self, stage: str, score: str) -> Row:
        """What makes a stage's held-out score what it is, as far as the recipe tells."""
        told = (self.recipe.get("stages") or {}).get(stage) or {}
        data = {name: value for name, value in (told.get("data") or {}).items() if name not in TRAINED_ON}
        rewards = {name: _options(one) for name, one in (told.get("rewards") or {}).items()}
        total = told.get("total") or {}
        if score.partition("/")[0] == "reward":
            counted = {name: one for name, one in rewards.items() if total.get("gates") or one.get("weight") != 0}
            return {"data": data, "rewards": _without(ASKED, counted), "total": total}
        givers = {name: rewards[name] for name in self._givers(score, rewards)}
        return {"data": data, "rewards": _without((*ASKED, *JOINED), givers)}

    def _givers(self, score: str, rewards: Mapping[str, Row]) -> list[str]:
        """The reward of a stage that gives this score, `strict/place` for instance; all of them, where that is unknown.

        Training rows have each component under the name of its reward.
        """
        name = score.partition("/")[0]
        found = [name] if name in rewards else [one for one in rewards if f"{one}/{name}" in self._columns]
        return found if len(found) == 1 else list(rewards)

    @cached_property
    def _columns(self) -> set[str]:
        return {key for row in self.train for key in row}

    def ended(self, stage: str) -> bool:
        return stage in (self.stages if self.finished else self.stages[:-1])

    def also(self, stage: str) -> tuple[str, ...]:
        """The stages whose tasks its evaluations measure, as columns NAME/STAGE: if there are any, its own too."""
        evaluate = (self.course.get(stage) or {}).get("evaluate") or {}
        return tuple(dict.fromkeys((*evaluate["also"], stage))) if evaluate.get("also") else ()

    @property
    def steps(self) -> int:
        return max((int(row["at"]) for row in self.train), default=0)

    @property
    def planned(self) -> int:
        """Steps of all stages, as the recipe has them."""
        return sum(int(stage.get("steps") or 0) for stage in self.course.values())

    def spans(self) -> list[Span]:
        found: list[Span] = []
        for name in self.stages:
            at = [row["at"] for row in (*self.train, *self.evaluations) if row["stage"] == name]
            found.append(Span(name, found[-1].end if found else min(at), max(at)))
        return found


def of(rows: Sequence[Row], stage: str) -> list[Row]:
    return [row for row in rows if row["stage"] == stage]


def _options(reward: Any) -> Row:
    """A recipe that nobody has resolved may have its weight alone."""
    return reward if isinstance(reward, Mapping) else {"weight": reward}


def _without(options: Collection[str], rewards: Mapping[str, Row]) -> dict[str, Row]:
    return {name: {key: one[key] for key in one if key not in options} for name, one in rewards.items()}


def _mapping(file: Path, text: str, read: Callable[[str], Any]) -> dict[str, Any]:
    """Of a file that the run has written; {} of one that is not there, which the report does without."""
    import yaml

    try:
        found = read(text) if text.strip() else {}
    except (ValueError, yaml.YAMLError) as error:
        what = f"cannot be read: {' '.join(str(error).split())}."
        raise DataError(what, where=str(file), hint="Mend it, or take it away: the report does without.") from error
    if not isinstance(found, dict):
        raise DataError("holds no keys and values.", where=str(file), hint="Take it away: the report does without.")
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


__all__ = ["Row", "Run", "of"]
