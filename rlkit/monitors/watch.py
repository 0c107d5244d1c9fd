"""Monitors: is the reward still worth what it says? Watched at every step and evaluation; on unless switched off.

A policy that learns to please its reward shows it elsewhere: what is not trained on falls, the pictures of a prompt
become alike, sharper, brighter, or copies of their source. Each monitor looks at one such thing and compares it with
how the stage began. What it remembers is json and lies in the checkpoint, so that a resumed run sees the same alarms;
its figures are over all processes, so that all of them stop together.

An alarm is a row of metrics.jsonl, once until it is over. `warn` does no more. `stop` saves and ends the run: later
stages would build on what is in doubt. `roll_back` restores the weights of the stage's best evaluation and ends the
stage; the next one begins with them. Warning is the default, since none of these figures is proof.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rlkit.errors import RecipeError, nearest
from rlkit.monitors.looks import Colour, Copy, Sharpness, TextArea
from rlkit.monitors.reading import Action, Alarm, Memory, Reading
from rlkit.monitors.sanity import Sanity
from rlkit.monitors.signs import Collapse, Diversity, Drift, HeldOut, Mismatch, Spread, panel
from rlkit.tracking import HELD_OUT


@dataclass(frozen=True)
class Monitors:
    """A stage's monitors: a name with its options; null switches one off, absent is the default."""

    held_out: HeldOut | None = field(default_factory=HeldOut)
    collapse: Collapse | None = field(default_factory=Collapse)
    spread: Spread | None = field(default_factory=Spread)
    diversity: Diversity | None = field(default_factory=Diversity)
    drift: Drift | None = field(default_factory=Drift)
    mismatch: Mismatch | None = field(default_factory=Mismatch)
    sharpness: Sharpness | None = field(default_factory=Sharpness)
    colour: Colour | None = field(default_factory=Colour)
    text_area: TextArea | None = field(default_factory=TextArea)
    copy: Copy | None = field(default_factory=Copy)
    sanity: Sanity | None = None
    best_by: str | None = None  # what `roll_back` goes by; None: the first of the panel, else held_out/reward

    def __post_init__(self) -> None:
        if self.best_by is not None and not self.best_by.startswith(HELD_OUT):
            raise ValueError(f"best_by is a column of the evaluations, such as {HELD_OUT}strict, not {self.best_by!r}")

    @classmethod
    def none(cls) -> Monitors:
        return cls(**{one.name: None for one in fields(cls)})

    @property
    def rolls_back(self) -> bool:
        return any(getattr(one, "action", None) == "roll_back" for one in vars(self).values())


@dataclass(frozen=True)
class Raised:
    """An alarm that was not there the last time."""

    monitor: str
    action: Action
    alarm: Alarm


class Watch:
    """The monitors of one stage at work. `memory` is all that they remember."""

    def __init__(self, monitors: Monitors) -> None:
        self.monitors = monitors
        self.memory: Memory = {}

    def look(self, reading: Reading) -> tuple[dict[str, float], list[Raised]]:
        """(the columns `monitor/NAME`, the alarms that are new) of a step or an evaluation."""
        columns: dict[str, float] = {}
        raised = []
        for name, monitor in vars(self.monitors).items():
            if getattr(monitor, "moment", None) != reading.row["kind"]:
                continue
            own = self._memory_of(name)
            finding = monitor.look(reading, own)
            if finding is None:
                continue
            columns |= {f"monitor/{name}/{part}".rstrip("/"): value for part, value in finding.figures.items()}
            if finding.alarm is not None and not own.get("alarmed"):
                raised.append(Raised(name, monitor.action, finding.alarm))
            own["alarmed"] = finding.alarm is not None
        if reading.row["kind"] == "evaluation" and self.monitors.rolls_back:
            self._note_best(reading)
        return columns, raised

    def _memory_of(self, name: str) -> Memory:
        """What a monitor remembers. One whose options were changed before a resume raises its alarm again, since that
        may do something else now; with another window it begins anew."""
        own, options = self.memory.setdefault(name, {}), self.options(name) or {}
        before = own.get("options", options)
        if before.get("window") != options.get("window"):
            own.clear()
        elif before != options:
            own.pop("alarmed", None)
        own["options"] = options
        return own

    def _note_best(self, reading: Reading) -> None:
        """The earliest of the best evaluations: later ones must be better by something."""
        if self.memory.get("best", {}).get("by", self.monitors.best_by) != self.monitors.best_by is not None:
            del self.memory["best"]  # of a column that the recipe had before
        if "best" not in self.memory:
            members = panel(reading)
            column = self.monitors.best_by or next(iter(members), f"{HELD_OUT}reward")
            if column not in reading.row:
                known = [one for one in reading.row if one.startswith(HELD_OUT) and not one.endswith("_se")]
                what = f"the evaluations have no {column!r}.{nearest(column, known)}"
                raise RecipeError(what, where="monitors.best_by", hint=f"Known: {', '.join(known)}.")
            sign = members.get(column, 1)
            self.memory["best"] = {"by": column, "sign": sign, "at": None, "value": None}
        best = self.memory["best"]
        value = reading.row.get(best["by"], math.nan)
        if math.isfinite(value) and (best["value"] is None or best["sign"] * (value - best["value"]) > 0):
            best |= {"at": reading.row["at"], "value": value}

    @property
    def best_at(self) -> int | None:
        """After how many training steps, over all stages, the best evaluation was."""
        at = self.memory.get("best", {}).get("at")
        return None if at is None else int(at)

    def options(self, name: str) -> dict[str, Any] | None:
        monitor = getattr(self.monitors, name, None)
        return None if monitor is None else asdict(monitor)
