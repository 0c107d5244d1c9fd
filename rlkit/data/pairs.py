"""Pairs of pictures, one of them preferred."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.data.picture_files import Picture, report, stop_above
from rlkit.data.tables import json_object, text_lines
from rlkit.errors import DataError, nearest
from rlkit.types import Prompt

log = logging.getLogger(__name__)

HALVES = ("chosen", "rejected")


def read_pairs(path: Path, verify: bool = True, max_broken: float = 0.0) -> tuple[Prompt, ...]:
    """The pairs of a file or folder: prompts with a `Picture` as metadata "chosen" and "rejected".

    DataError with file and line for what cannot be read, for a pair whose halves are the same, and, with `verify`, for
    pictures of several sizes. Pairs whose pictures cannot be read are left out, up to a share of `max_broken`.
    """
    pairs: list[Prompt] = []
    broken: list[DataError] = []
    first: tuple[str, tuple[int, ...]] | None = None
    for prompt in _saved_pairs(path) if path.is_dir() else _json_pairs(path):
        try:
            pixels = _looked_at(prompt, verify)
        except DataError as error:
            if max_broken == 0:
                raise
            broken.append(error)
            continue
        _check_distinct(prompt, pixels)
        for half, shape in zip(HALVES, (one.shape for one in pixels), strict=False):
            where = prompt.metadata[half].where
            first = first or (where, shape)
            if shape != first[1]:
                what = f"the {half} picture is {_size(shape)}, but those from {first[0]} on are {_size(first[1])}"
                raise DataError(what, where=where, hint="Give all pictures one size.")
        pairs.append(prompt)
    seen = len(pairs) + len(broken)
    if broken:
        stop_above(max_broken * seen, broken, seen, max_broken)
        log.warning("left out %s", report(broken, seen))
    if not pairs:
        hint = 'Write one {"prompt": ..., "chosen": ..., "rejected": ...} a line.'
        raise DataError("no pairs in this file", where=str(path), hint=hint)
    return tuple(pairs)


def _looked_at(prompt: Prompt, verify: bool) -> tuple[np.ndarray[Any, Any], ...]:
    """The pixels of both halves; without `verify` none, once both are known to be there."""
    halves = [prompt.metadata[half] for half in HALVES]
    for half in halves:
        half.source()
    return tuple(half.read() for half in halves) if verify else ()


def _check_distinct(prompt: Prompt, pixels: tuple[np.ndarray[Any, Any], ...]) -> None:
    where = prompt.metadata[HALVES[0]].where
    sources = [prompt.metadata[half].source() for half in HALVES]
    if all(isinstance(one, Path) for one in sources) and sources[0].samefile(sources[1]):
        raise DataError(f"chosen and rejected are the same file, {sources[0]}", where=where)
    if pixels and np.array_equal(pixels[0], pixels[1]):
        what = "chosen and rejected have the same pixels"
        raise DataError(what, where=where, hint="Leave this pair out: it says nothing.")


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _json_pairs(path: Path) -> Iterator[Prompt]:
    table: list[dict[str, Any]] = []
    for where, line in text_lines(path, "pairs"):
        record = json_object(line, where)
        _check_keys(record, where)
        table.append({half: record.pop(half) for half in HALVES})
        yield _pair(record.pop("prompt"), record, where, len(table) - 1, table, path.parent)


def _saved_pairs(path: Path) -> Iterator[Prompt]:
    import datasets

    try:
        table = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"not a folder that datasets.save_to_disk wrote: {error}", where=str(path)) from error
    if isinstance(table, datasets.DatasetDict):
        hint = f"Give one of them, for instance {path / next(iter(table), '')}."
        raise DataError(f"holds several splits: {', '.join(table)}", where=str(path), hint=hint)
    _check_keys(table.features, str(path))
    for half in HALVES:
        if isinstance(table.features[half], datasets.Image):  # as it was stored: `Picture` decodes
            table = table.cast_column(half, datasets.Image(decode=False))
    for row, text in enumerate(table.select_columns(["prompt"])):
        yield _pair(text["prompt"], {}, f"{path} row {row}", row, table, path)


def _check_keys(record: Mapping[str, Any], where: str) -> None:
    for key in ("prompt", *HALVES):
        if key not in record:
            close = [one for one in record if nearest(str(one), [key])]
            instead = f", but {close[0]!r}.{nearest(close[0], [key])}" if close else ""
            hint = 'A pair is {"prompt": "a red circle", "chosen": "a.png", "rejected": "b.png"}.'
            raise DataError(f"no {key!r} here{instead}", where=where, hint=hint)


def _pair(text: Any, more: Mapping[str, Any], where: str, row: int, table: Any, folder: Path) -> Prompt:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"'prompt' must be a text, not {text!r}", where=where)
    pictures = {half: Picture(half, where, row, table, folder) for half in HALVES}
    return Prompt(id=row, text=text, metadata={**more, **pictures})
