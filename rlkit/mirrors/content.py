"""What mirrors show, taken from the record: the numbers of a row, and the table behind a sheet of samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHEET, SAMPLES = "held_out/sheet", "held_out/samples"  # beside the scores; a row's `samples` is a number


@dataclass(frozen=True)
class Numbers:
    """A row of metrics.jsonl. In a run of several stages most numbers are there twice: under their own names over `at`,
    where a stage's curve goes on from the one before, and as STAGE/NAME over the steps of the stage, where the stages
    of several runs lie over each other and each stage's last value stays in sight once the next one has begun."""

    stage: str
    step: int
    at: int
    overall: Mapping[str, float]
    of_stage: Mapping[str, float]


def numbers(row: Mapping[str, Any], several: bool) -> Numbers:
    """`several`: whether the run has more than one stage."""
    overall = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    of_stage = {}
    if several and row["kind"] != "event":
        of_stage = {f"{row['stage']}/{name}": value for name, value in overall.items() if name != "at"}
    return Numbers(row["stage"], row["step"], row["at"], overall, of_stage)


@dataclass(frozen=True)
class Table:
    """The pictures of a sheet, a row for each, and what is known of them; None where nothing is."""

    at: int
    pictures: Mapping[str, Sequence[Any]]  # `picture` [rows] of PIL, and `given`, what prompts came with, if any had
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]  # [rows][columns]

    def with_pictures(self, made: Callable[[Any], Any]) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows, the pictures first, each as `made` makes it of PIL's."""
        first = zip(*self.pictures.values(), strict=True)
        rows = [[*map(made, images), *row] for images, row in zip(first, self.rows, strict=True)]
        return [*self.pictures, *self.columns], rows


def table(sheet: Path) -> Table:
    """Of the PNG of a sheet, and of the JSON beside it."""
    from PIL import Image

    known = json.loads(sheet.with_suffix(".json").read_text(encoding="utf-8"))
    items: Sequence[Mapping[str, Any]] = known["items"]
    columns = tuple(dict.fromkeys(name for item in items for name in item))
    width, height, given = known["width"], known["height"], known["given"]
    pictures, beside = [], []
    with Image.open(sheet) as whole:
        for index in range(len(items)):
            row, column = divmod(index, known["columns"])
            left, top = column * width * (given + 1), row * height
            own = left + width * given
            pictures.append(whole.crop((own, top, own + width, top + height)))
            if given:
                beside.append(whole.crop((left, top, own, top + height)))
    shown = {"picture": pictures} | ({"given": beside} if given else {})
    return Table(known["at"], shown, columns, tuple(tuple(item.get(name) for name in columns) for item in items))
