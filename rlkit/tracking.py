"""What a run leaves behind while it runs: metrics.jsonl, what its mirrors show of it, and a line for the eye.

metrics.jsonl is the record: reports, sweeps and `expect` read it and nothing else. Mirrors (W&B, TensorBoard, trackio)
may be absent.

A row names its `kind` ("train", "evaluation", "event"), its `stage`, and how many training steps were finished when it
was written: `step` in the stage, `at` over all stages. The row of the n-th training step and an evaluation of the
weights after it therefore share one `at`.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlkit.errors import DataError, RecipeError
from rlkit.mirrors.mirror import Mirrors

Row = Mapping[str, Any]

HELD_OUT = "held_out/"
ASIDE = "-alarm"  # at the end of a sheet's name: it is of weights that a monitor gave up by going back
_SHEET = re.compile(r"(\d{6,})(-.+)?\.(png|json)")
_PLAIN_LINES = 12  # how many training lines a stage prints where there is no terminal


def held_out(row: Row) -> dict[str, float]:
    """The scores of an evaluation by their short names, without their standard errors."""
    names = (key for key, value in row.items() if key.startswith(HELD_OUT) and value is not None)
    return {name.removeprefix(HELD_OUT): float(row[name]) for name in names if not name.endswith("_se")}


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


class Metrics:
    """Appends to a run's metrics.jsonl, one JSON object a line. One process writes; any may read at any time."""

    NAME = "metrics.jsonl"
    REQUIRED = ("kind", "stage", "step", "at")

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / self.NAME
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._replace(self.read(folder))  # a torn line must not become the beginning of the next one

    def append(self, row: Row) -> None:
        missing = [key for key in self.REQUIRED if key not in row]
        if missing:
            raise ValueError(f"a row of {self.NAME} needs {', '.join(missing)}; it has {', '.join(row)}")
        with self.path.open("a", encoding="utf-8") as file:  # closed, so flushed, row by row: a killed run keeps all
            file.write(_line(row))

    def rewind(self, at: int, to_come: Collection[str] = ()) -> None:
        """Forget what came after the checkpoint of step `at`: rows with a larger `at` go, and those of the stages that
        have yet to begin, whose opening evaluation shares its `at` with the end of the stage before. Others stay."""
        if self.path.exists():
            rows = self.read(self.path.parent)
            self._replace(row for row in rows if row["at"] <= at and row["stage"] not in to_come)

    def _replace(self, rows: Iterable[Row]) -> None:
        temporary = self.path.with_name(f".{self.NAME}.{os.getpid()}")
        temporary.write_text("".join(_line(row) for row in rows), encoding="utf-8")
        os.replace(temporary, self.path)

    @classmethod
    def read(cls, folder: Path) -> list[dict[str, Any]]:
        """The rows in the order they were written. A last line that a killed run tore is left out."""
        path = folder / cls.NAME
        lines = path.read_bytes().splitlines()
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            where, hint = f"{path}:{number}", "Remove it, then try again."
            try:
                row = json.loads(line)
            except ValueError:  # bad JSON, or bad UTF-8
                if number < len(lines):
                    raise DataError("this line is not JSON.", where=where, hint=hint) from None
                break
            if not isinstance(row, dict) or any(key not in row for key in cls.REQUIRED):
                what = f"this line is no row: it needs {', '.join(cls.REQUIRED)}."
                raise DataError(what, where=where, hint=hint)
            rows.append(row)
        return rows


def rewind_sheets(folder: Path, at: int, to_come: Collection[str] = ()) -> None:
    """Remove the sheets of what `Metrics.rewind` forgets, by the numbers in their names and the stages that they name.
    Other files stay."""
    found = {file.stem: match for file in folder.glob("*") if (match := _SHEET.fullmatch(file.name))}
    for stem, match in found.items():
        if int(match[1]) > at or stage_of(folder / f"{stem}.json") in to_come:
            for end in (".png", ".json"):  # the one that names the stage last
                (folder / (stem + end)).unlink(missing_ok=True)


def stage_of(sheet: Path) -> str | None:
    """Of the JSON of a sheet; None of one that is not there, or that a killed run left half-written."""
    try:
        return str(json.loads(sheet.read_text(encoding="utf-8"))["stage"])
    except (OSError, ValueError, KeyError):
        return None


def _line(row: Row) -> str:
    return json.dumps(_plain(row), allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """The value as JSON has it: numbers of numpy and torch become floats, NaN and infinities null."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    number = float(value)
    return number if math.isfinite(number) else None


# ---- what a healthy run shows ----------------------------------------------------------------------------------------


_SIZE = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RULE = re.compile(rf"(>=|<=|>|<)\s*(?:(before)(?:\s*([+-])\s*({_SIZE}))?|([+-]?{_SIZE}))")


@dataclass(frozen=True)
class Expectation:
    """A rule of a recipe's `expect`: a comparison, then a number, or `before` with or without an offset.

    For instance `> before + 0.15`, `>= before`, `< 0.02`.
    """

    sign: str
    relative: bool  # to the value before the stage
    offset: float

    @classmethod
    def parse(cls, rule: str, *, where: str = "") -> Expectation:
        match = _RULE.fullmatch(rule.strip())
        if match is None:
            raise RecipeError(
                f"{rule!r} is no rule.", where=where, hint="Write one like '> before + 0.15', '>= before' or '< 0.02'."
            )
        sign, before, direction, size, number = match.groups()
        return cls(sign, before is not None, float(number or (direction or "") + (size or "0")))

    def met(self, before: float, after: float) -> bool:
        bound = self.offset + (before if self.relative else 0.0)
        return {">": after > bound, ">=": after >= bound, "<": after < bound, "<=": after <= bound}[self.sign]


# ---- progress --------------------------------------------------------------------------------------------------------


class Progress:
    """The progress of one stage: a bar on a terminal, else plain lines, about twelve of them and the evaluations."""

    def __init__(self, total: int, stage: str, quiet: bool = False, done: int = 0) -> None:
        self.total, self.stage, self.quiet, self._first = total, stage, quiet, done
        self._every = max(1, total // _PLAIN_LINES)
        self._start = time.monotonic()
        self._held_out: dict[str, float] = {}
        self._bar: Any = None
        self._task: Any = None
        if not quiet and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = _bar()
            self._task = self._bar.add_task(stage, total=total, completed=done, numbers="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        if self.quiet:
            return
        if self._bar is not None:  # above the bar, which would be torn by a print
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def update(self, row: Row) -> None:
        if row["kind"] == "train":
            self._train(row)
        elif row["kind"] == "evaluation":
            self._held_out = held_out(row)
            self.say(f"{self.stage} {row['step']}/{self.total}  {_evaluation_line(row)}")
        elif row.get("text"):
            self.say(str(row["text"]))

    def _train(self, row: Row) -> None:
        step = int(row["step"])
        numbers = "  ".join(_train_numbers(row, self._held_out.get("strict")))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step % self._every == 0 or step in (self._first + 1, self.total):
            pace = (time.monotonic() - self._start) / max(1, step - self._first)
            left = f"  {_clock(pace * (self.total - step))} left" if step < self.total else ""
            self.say(f"{self.stage} {step}/{self.total}  {numbers}{left}")


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        console=Console(file=sys.stdout),
    )


def _train_numbers(row: Row, strict: float | None) -> list[str]:
    values = {
        "reward": (row.get("reward/mean"), ".3f"),
        "held-out strict": (strict, ".3f"),
        "kl": (row.get("kl"), ".2g"),
        "ratio off by": (row.get("ratio/deviation"), ".1g"),
        "clipped": (row.get("clip_fraction"), ".0%"),
    }
    words = [f"{name} {value:{form}}" for name, (value, form) in values.items() if value is not None]
    seconds = sum(row.get(f"seconds/{phase}") or 0.0 for phase in ("sample", "score", "train"))
    if row.get("samples") and seconds:
        words.append(f"{row['samples'] / seconds:.3g} samples/s")
    return words


def _evaluation_line(row: Row) -> str:
    words = []
    for name, value in held_out(row).items():
        if "/" not in name:  # kinds of prompt are for the report
            error = row.get(f"{HELD_OUT}{name}_se")
            words.append(f"{name} {value:.3f}" + (f" ± {error:.3f}" if error is not None else ""))
    count = f" ({row['count']:,} images)" if row.get("count") else ""
    return f"held out: {', '.join(words)}{count}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ---- all three -------------------------------------------------------------------------------------------------------


class Tracker:
    """The three together, on the first process. On any other every method does nothing, so callers need not ask."""

    def __init__(
        self,
        folder: Path,
        *,
        config: Mapping[str, Any],
        wandb: str = "auto",
        tensorboard: bool = False,
        trackio: bool = False,
        quiet: bool = False,
        first: bool = True,
    ) -> None:
        self._folder, self._first, self._quiet = folder, first, quiet
        self._progress: Progress | None = None
        if first:
            self._metrics = Metrics(folder)
            self._mirrors = Mirrors(folder, config, self.say, wandb=wandb, tensorboard=tensorboard, trackio=trackio)

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """A stage of `total` steps begins, or goes on after `done` of them."""
        if self._first:
            self._leave_stage()
            self._progress = Progress(total, name, self._quiet, done).__enter__()

    def write(self, row: Row) -> None:
        if self._first:
            row = _plain(row)
            self._metrics.append(row)
            self._mirrors.log(row)
            if row.get("event") == "alarm":
                self._mirrors.alert(f"{row['stage']}, step {row['step']}: {row['monitor']}", row["text"], row["at"])
            if self._progress is not None:
                self._progress.update(row)

    def say(self, text: str) -> None:
        if not self._first or self._quiet:
            return
        if self._progress is not None:
            self._progress.say(text)
        else:
            print(text, flush=True)

    def sheet(self, path: Path) -> None:
        """An evaluation's pictures, already in the run folder: a PNG, and beside it what each one is and scored."""
        if self._first:
            self._mirrors.sheet(path)

    def rewind(self, at: int, to_come: Collection[str] = ()) -> None:
        """Forget what came after the checkpoint of step `at`, and of stages that have yet to begin: rows and sheets."""
        if self._first:
            self._metrics.rewind(at, to_come)
            rewind_sheets(self._folder / "samples", at, to_come)

    def keep(self, told: Callable[[], Sequence[Path]]) -> None:
        """The run is over: `told` tells of it and names the files that it wrote, which mirrors get with the record."""
        if self._first:
            self._leave_stage()
            record = (self._folder / name for name in ("recipe.yaml", Metrics.NAME))
            self._mirrors.keep([*told(), *(file for file in record if file.exists())])

    def close(self) -> None:
        if self._first:
            self._leave_stage()
            self._mirrors.finish()

    def _leave_stage(self) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None
