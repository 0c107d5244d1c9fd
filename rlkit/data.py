"""Prompts. What a step draws is a pure function of (seed, stage, step), so a resumed run sees the same ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from rlkit.errors import DataError, nearest
from rlkit.types import Prompt, seed_of
from rlkit.world import grammar


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
    """A file of prompts: one a line, or JSON lines with "prompt" (or "text") and any other keys as metadata."""

    gives = ("prompt", "metadata")

    path: str
    per_step: int
    group: int
    held_out_path: str | None = None  # evaluated on; none: no held-out evaluation

    def __post_init__(self) -> None:
        _check_sizes(self.per_step, self.group)

    def open(self) -> Prompts:
        held_out = read_prompts(Path(self.held_out_path)) if self.held_out_path else ()
        return _File(read_prompts(Path(self.path)), held_out, self.per_step, self.group)


@dataclass(frozen=True)
class _File:
    prompts: tuple[Prompt, ...]
    kept: tuple[Prompt, ...]
    per_step: int
    group: int
    orders: dict[tuple[int, str, int], np.ndarray[Any, Any]] = field(default_factory=dict)  # shuffles, by epoch

    def draw(self, seed: int, stage: str, step: int) -> PromptBatch:
        """Every prompt once an epoch, in an order drawn anew each epoch."""
        size = len(self.prompts)
        chosen = []
        for position in range(step * self.per_step, (step + 1) * self.per_step):
            key = (seed, stage, position // size)
            if key not in self.orders:
                self.orders[key] = np.random.default_rng(seed_of(*key, "epoch")).permutation(size)
            chosen.append(self.prompts[self.orders[key][position % size]])
        return PromptBatch(tuple(chosen), self.group)

    def held_out(self, count: int) -> tuple[Prompt, ...]:
        return tuple(self.kept[i % len(self.kept)] for i in range(count)) if self.kept else ()

    def texts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(prompt.text for prompt in self.prompts + self.kept))


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a file; empty lines are passed over. DataError with file and line for what cannot be read."""
    try:
        # Some editors begin a file with a mark. Not splitlines: it breaks at characters that JSON allows in a text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"cannot read prompts: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"not a UTF-8 text file: {error}", where=str(path)) from error
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompts.append(_parse_line(line.strip(), len(prompts), path, number))
    if not prompts:
        raise DataError("no prompts in this file", where=str(path), hint="Write one prompt a line.")
    return tuple(prompts)


def _parse_line(line: str, index: int, path: Path, number: int) -> Prompt:
    if not line.startswith("{"):
        return Prompt(id=index, text=line)
    where = f"{path}:{number}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not a JSON object: {error}", where=where) from error
    text = record.pop("prompt", None) or record.pop("text", None)
    if not isinstance(text, str) or not text.strip():
        raise DataError('no "prompt" in this line', where=where, hint='Write {"prompt": "a red circle", ...}.')
    return Prompt(id=index, text=text, metadata=record)


DATA: dict[str, type[WorldPrompts] | type[FilePrompts]] = {"world": WorldPrompts, "prompts": FilePrompts}
