"""Prompts, and pairs of pictures. What a step draws is a pure function of (seed, stage, step), so a resumed run sees
the same ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from rlkit.errors import DataError, nearest
from rlkit.types import Prompt, seed_of
from rlkit.world import grammar

MORE = ("target_text", "source", "references")  # keys of a JSON line that rewards may read


@dataclass(frozen=True)
class PromptBatch:
    """What one step samples: `group` pictures of each prompt. Sample i of the step belongs to prompt i // group."""

    prompts: tuple[Prompt, ...]
    group: int

    def __len__(self) -> int:
        return len(self.prompts) * self.group


class Prompts(Protocol):
    """An opened data set."""

    def draw(self, seed: int, stage: str, step: int) -> PromptBatch: ...

    def held_out(self, count: int) -> tuple[Prompt, ...]: ...

    def texts(self) -> tuple[str, ...]:
        """Every distinct text of a user's own prompts, to be looked at before the first step."""
        ...


def _check_sizes(per_step: int, group: int) -> None:
    if per_step < 1:
        raise ValueError(f"per_step must be 1 prompt or more, not {per_step}")
    if group < 1:
        raise ValueError(f"group must be 1 or more, not {group}")


@dataclass(frozen=True)
class WorldPrompts:
    """Captions of the embedded world, drawn by kind from one split; held-out meanings are never trained on."""

    gives = ("prompt", "metadata")

    per_step: int  # prompts a step
    group: int  # pictures a prompt
    task: Literal["t2i"] = "t2i"
    kinds: tuple[str, ...] | None = None  # trained on, by the world's weights; None: all
    split: Literal["train", "validation"] = "train"  # never the held-out one
    held_out_split: Literal["held_out", "validation"] = "held_out"  # "validation" is for tuning

    def __post_init__(self) -> None:
        _check_sizes(self.per_step, self.group)
        for kind in self.kinds or ():
            if kind not in grammar.KINDS:
                raise ValueError(f"no kind of caption named {kind!r}.{nearest(kind, grammar.KINDS)}")

    def open(self) -> Prompts:
        return self

    def draw(self, seed: int, stage: str, step: int) -> PromptBatch:
        rng = np.random.default_rng(seed_of(seed, stage, step, "prompts"))
        captions = grammar.draw(self.split, self.per_step, rng)
        if self.kinds:
            weights = np.array([grammar.KINDS[kind] for kind in self.kinds])
            kinds = rng.choice(self.kinds, self.per_step, p=weights / weights.sum()).tolist()
            pools = [grammar.split(self.split, kind) for kind in kinds]
            captions = [pool[int(u * len(pool))] for pool, u in zip(pools, rng.random(self.per_step), strict=True)]
        return PromptBatch(tuple(_prompt(caption) for caption in captions), self.group)

    def held_out(self, count: int) -> tuple[Prompt, ...]:
        """Captions of all kinds, whatever is trained on: leaving a hard one out must not flatter the score."""
        return tuple(_prompt(caption) for caption in grammar.panel(self.held_out_split, count))

    def texts(self) -> tuple[str, ...]:
        return ()


def _prompt(caption: grammar.Caption) -> Prompt:
    return Prompt(id=seed_of(caption.text), text=caption.text, kind=caption.kind)


@dataclass(frozen=True)
class FilePrompts:
    """A file of prompts: one a line, or JSON lines with "prompt" (or "text") and any other keys as metadata.

    Some keys are more than that: "target_text", a text or a list of what should be legible in the picture; "source",
    the file of a picture to edit or to repeat, and "references", a list of such files. Their paths begin where the
    JSON lies.
    """

    path: str
    per_step: int
    group: int
    held_out_path: str | None = None  # evaluated on; none: no held-out evaluation

    def __post_init__(self) -> None:
        _check_sizes(self.per_step, self.group)

    @property
    def gives(self) -> tuple[str, ...]:
        """What the first line has; of a file that is not there yet nothing is known, so nothing is denied."""
        file = Path(self.path)
        if not file.is_file():
            return ("prompt", "metadata", *MORE)
        where, line = next(_lines(file, "prompts"), ("", ""))
        first = _json_object(line, where) if line.startswith("{") else {}
        return ("prompt", "metadata", *(key for key in MORE if key in first))

    def open(self) -> Prompts:
        held_out = read_prompts(Path(self.held_out_path)) if self.held_out_path else ()
        return _File(read_prompts(Path(self.path)), held_out, self.per_step, self.group)


@dataclass(frozen=True)
class PairFile:
    """Pairs of pictures, one of them preferred, for the rollout `dataset`; the other keys of a line are metadata.

    JSON lines with "prompt" and with "chosen" and "rejected", picture files whose paths begin where the JSON lies; or
    a folder that `datasets.save_to_disk` wrote, with columns of these names.
    """

    gives = ("prompt", "metadata", "pair")

    path: str
    per_step: int  # pairs a step
    group: int = 2  # a pair is a group of two
    held_out_path: str | None = None  # prompts to evaluate on, sampled by the policy; none: no held-out evaluation
    held_out_split: Literal["held_out", "validation"] | None = None  # the embedded world's captions in their place
    verify: bool = True  # look at every picture before the first step; false: only at whether its file is there

    def __post_init__(self) -> None:
        _check_sizes(self.per_step, self.group)
        if self.group != 2:
            raise ValueError(f"group must be 2, not {self.group}: a pair is a group of two pictures. Leave it out")
        if self.held_out_path and self.held_out_split:
            raise ValueError("held_out_path and held_out_split exclude each other: evaluation is on one of them")

    def open(self) -> Prompts:
        held_out = read_prompts(Path(self.held_out_path)) if self.held_out_path else ()
        pairs = read_pairs(Path(self.path), self.verify)
        return _File(pairs, held_out, self.per_step, self.group, self.held_out_split)


@dataclass(frozen=True)
class _File:
    prompts: tuple[Prompt, ...]
    kept: tuple[Prompt, ...]
    per_step: int
    group: int
    world_split: Literal["held_out", "validation"] | None = None  # evaluated on in place of `kept`
    orders: dict[tuple[int, str, int], np.ndarray[Any, Any]] = field(default_factory=dict)  # shuffles, by epoch

    def draw(self, seed: int, stage: str, step: int) -> PromptBatch:
        """Every prompt once an epoch, in an order drawn anew each epoch."""
        size = len(self.prompts)
        chosen = []
        for position in range(step * self.per_step, (step + 1) * self.per_step):
            key = (seed, stage, position // size)
            if key not in self.orders:
                self.orders[key] = np.random.default_rng(seed_of(*key, "epoch")).permutation(size)
            chosen.append(_with_pictures(self.prompts[self.orders[key][position % size]]))
        return PromptBatch(tuple(chosen), self.group)

    def held_out(self, count: int) -> tuple[Prompt, ...]:
        if self.world_split:
            return WorldPrompts(1, 1, held_out_split=self.world_split).held_out(count)
        return tuple(_with_pictures(self.kept[i % len(self.kept)]) for i in range(count)) if self.kept else ()

    def texts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(prompt.text for prompt in self.prompts + self.kept))


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a file; empty lines are passed over. DataError with file and line for what cannot be read.

    Pictures are looked for, and read when they are drawn: until then each is a `Picture` in the metadata.
    """
    prompts = tuple(_parse_line(line, i, where, path.parent) for i, (where, line) in enumerate(_lines(path, "prompts")))
    if not prompts:
        raise DataError("no prompts in this file", where=str(path), hint="Write one prompt a line.")
    return prompts


def _lines(path: Path, what: str) -> Iterator[tuple[str, str]]:
    """("file:number", line) of every line that is not empty."""
    try:
        # Some editors begin a file with a mark. Not splitlines: it breaks at characters that JSON allows in a text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"cannot read {what}: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"not a UTF-8 text file: {error}", where=str(path)) from error
    yield from ((f"{path}:{i}", line.strip()) for i, line in enumerate(lines, start=1) if line.strip())


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not a JSON object: {error}", where=where) from error
    if not isinstance(record, dict):
        raise DataError(f"not a JSON object: {line[:40]}", where=where)
    return record


def _parse_line(line: str, index: int, where: str, folder: Path) -> Prompt:
    if not line.startswith("{"):
        return Prompt(id=index, text=line)
    record = _json_object(line, where)
    text = record.pop("prompt", None) or record.pop("text", None)
    if not isinstance(text, str) or not text.strip():
        raise DataError('no "prompt" in this line', where=where, hint='Write {"prompt": "a red circle", ...}.')
    target = record.pop("target_text", [])
    spans = [target] if isinstance(target, str) else target
    if not isinstance(spans, list) or not all(isinstance(one, str) for one in spans):
        raise DataError(f"'target_text' must be a text or a list of texts, not {target!r}", where=where)
    return Prompt(id=index, text=text, metadata=_found_pictures(record, where, folder), target_text=tuple(spans))


def _found_pictures(record: Mapping[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """The record with a `Picture` for each file that it names."""
    references = record.get("references", [])
    if not isinstance(references, list):
        raise DataError(f"'references' must be a list of picture files, not {references!r}", where=where)
    files = {"source": record["source"]} if "source" in record else {}
    files |= {f"references[{i}]": one for i, one in enumerate(references)}
    pictures = {key: Picture(key, where, 0, [files], folder) for key in files}
    for picture in pictures.values():
        picture.source()
    found = dict(record)
    if "source" in pictures:
        found["source"] = pictures.pop("source")
    if "references" in record:
        found["references"] = tuple(pictures.values())
    return found


def _with_pictures(prompt: Prompt) -> Prompt:
    """The prompt with its pictures read."""
    found = {key: prompt.metadata[key] for key in ("source", "references") if key in prompt.metadata}
    if not found:
        return prompt
    return replace(
        prompt,
        metadata={key: value for key, value in prompt.metadata.items() if key not in found},
        source=_pixels(found["source"]) if "source" in found else None,
        references=tuple(_pixels(one) for one in found.get("references", ())),
    )


def _pixels(picture: Picture) -> Tensor:
    return torch.from_numpy(picture.read()).movedim(-1, 0).float() / 255  # [3, H, W]


# ---- pairs -----------------------------------------------------------------------------------------------------------

HALVES = ("chosen", "rejected")


@dataclass(frozen=True)
class Picture:
    """A picture of a line, read when it is wanted: only where to find it stays in memory."""

    key: str  # of the line: chosen, rejected, source, references[0]
    where: str  # file and line, for messages
    row: int
    table: Any = field(repr=False)  # rows[row][key]: a path from `folder`, or {"bytes": ..., "path": ...}
    folder: Path = field(repr=False)

    def source(self) -> Path | bytes:
        """The file that holds the picture, or its bytes. DataError if there is neither."""
        stored = self.table[self.row][self.key]
        if isinstance(stored, Mapping):
            if stored.get("bytes") is not None:
                return bytes(stored["bytes"])
            stored = stored.get("path")
        if not isinstance(stored, str) or not stored:
            what = f"{self.key!r} must be the path of a picture, not {stored!r}"
            raise DataError(what, where=self.where, hint=f"Paths begin in {self.folder}.")
        if not (self.folder / stored).is_file():
            what = f"the {self.key} picture {self.folder / stored} does not exist"
            raise DataError(what, where=self.where, hint=f"Paths begin in {self.folder}.")
        return self.folder / stored

    def read(self) -> np.ndarray[Any, Any]:
        """The pixels [H, W, 3] uint8, turned as the camera says."""
        from PIL import Image, ImageOps

        source = self.source()
        name = source if isinstance(source, Path) else "in this row"
        try:
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises at a file that is cut off or no picture
            raise DataError(f"cannot read the {self.key} picture {name}: {error}", where=self.where) from error


def read_pairs(path: Path, verify: bool = True) -> tuple[Prompt, ...]:
    """The pairs of a file or folder: prompts with a `Picture` as metadata "chosen" and "rejected".

    DataError with file and line for what cannot be read, for a pair whose halves are the same, and, with `verify`, for
    pictures of several sizes.
    """
    pairs: list[Prompt] = []
    first: tuple[str, tuple[int, ...]] | None = None
    for prompt in _saved_pairs(path) if path.is_dir() else _json_pairs(path):
        chosen, rejected = (prompt.metadata[half] for half in HALVES)
        sources = [chosen.source(), rejected.source()]
        if all(isinstance(one, Path) for one in sources) and sources[0].samefile(sources[1]):
            raise DataError(f"chosen and rejected are the same file, {sources[0]}", where=chosen.where)
        if verify:
            pixels = chosen.read(), rejected.read()
            for half, shape in zip(HALVES, (one.shape for one in pixels), strict=True):
                first = first or (chosen.where, shape)
                if shape != first[1]:
                    what = f"the {half} picture is {_size(shape)}, but those from {first[0]} on are {_size(first[1])}"
                    raise DataError(what, where=chosen.where, hint="Give all pictures one size.")
            if np.array_equal(*pixels):
                what = "chosen and rejected have the same pixels"
                raise DataError(what, where=chosen.where, hint="Leave this pair out: it says nothing.")
        pairs.append(prompt)
    if not pairs:
        hint = 'Write one {"prompt": ..., "chosen": ..., "rejected": ...} a line.'
        raise DataError("no pairs in this file", where=str(path), hint=hint)
    return tuple(pairs)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _json_pairs(path: Path) -> Iterator[Prompt]:
    table: list[dict[str, Any]] = []
    for where, line in _lines(path, "pairs"):
        record = _json_object(line, where)
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


DATA: dict[str, type[WorldPrompts] | type[FilePrompts] | type[PairFile]] = {
    "world": WorldPrompts,
    "prompts": FilePrompts,
    "pairs": PairFile,
}
