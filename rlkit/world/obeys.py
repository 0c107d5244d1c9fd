"""From a picture to whether it obeys an instruction that came with other pictures.

What those show is read from their pixels, as the policy has to read it: an instruction and its pictures are all that
is needed. A caption takes part too, as an instruction without pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rlkit.world import grammar
from rlkit.world.checker import CAP, PARTIAL_MATCH, UNKNOWN, Detection, Verdict, detect_batch, judge
from rlkit.world.grammar import Caption, Object
from rlkit.world.instructions import Edit, Example, parse_edit, parse_put
from rlkit.world.scenes import render_scenes

MOVED = 3.5  # pixels that the centre of an object left alone may be away from where it was


EDITED = "several"  # the kind of a caption of what an edit should leave, which no text of the grammar has


@dataclass(frozen=True)
class Asked:
    """A text with the pictures [3, 32, 32] that it came with: one to edit, or references, or none."""

    text: str
    source: npt.NDArray[Any] | None = None
    references: tuple[npt.NDArray[Any], ...] = ()

    @property
    def pictures(self) -> tuple[npt.NDArray[Any], ...]:
        return (() if self.source is None else (self.source,)) + self.references


def asked(example: Example) -> Asked:
    """An example of the world as it is asked, with its pictures."""
    pictures = tuple(render_scenes(example.shown)) if example.shown else ()
    if example.task == "edit":
        return Asked(example.text, source=pictures[0])
    return Asked(example.text, references=pictures)


def check_asked(images: npt.NDArray[Any], rows: Sequence[Asked]) -> list[Verdict | None]:
    """Judges pictures [N, 3, 32, 32] in 0..1; None where what was asked means nothing in this world."""
    if len(images) != len(rows):
        raise ValueError(f"{len(images)} images but {len(rows)} instructions")
    given = [picture for one in rows for picture in one.pictures]
    everything = detect_batch(np.concatenate([images, np.stack(given)]) if given else images)
    made, rest = everything[: len(images)], iter(everything[len(images) :])
    verdicts: list[Verdict | None] = []
    for found, one in zip(made, rows, strict=True):
        shown = [next(rest) for _ in one.pictures]
        try:
            verdicts.append(_judge(found, one, shown))
        except ValueError:
            verdicts.append(None)
    return verdicts


def _judge(found: Sequence[Detection], asked: Asked, shown: Sequence[Sequence[Detection]]) -> Verdict:
    if asked.source is not None:
        if asked.references:
            raise ValueError("no instruction of this world has a source and references")
        return judge_edit(found, shown[0], parse_edit(asked.text))
    if not shown:
        return judge(found, grammar.parse(asked.text))
    return judge(found, parse_put(asked.text, [_only(objects) for objects in shown]))


def _only(objects: Sequence[Detection]) -> Object:
    if len(objects) != 1 or UNKNOWN in (objects[0].colour, objects[0].shape):
        raise ValueError(f"a reference shows {len(objects)} objects, not one that is known")
    return objects[0].colour, objects[0].shape


def judge_edit(found: Sequence[Detection], source: Sequence[Detection], edit: Edit) -> Verdict:
    """Whether the objects found are those of the source after this edit, everything else being where it was.

    clauses: 'edit', and 'kept 1', ..., 'number'. graded: 1 when strict, else half of the mean of the edit's score and
    the mean of the others, so below .5, and a source given back as it was stays below .32. ValueError where the source
    does not tell which object is meant.
    """
    thing = None if edit.kind == "add" else _meant(source, edit)
    kept = [one for one in source if one is not thing]
    free = list(found)
    clauses = {}
    for index, one in enumerate(kept, start=1):
        match = min((d for d in free if _same(d, one)), key=lambda d: _distance(d, one), default=None)
        clauses[f"kept {index}"] = float(match is not None)
        if match is not None:
            free.remove(match)
    wanted = len(kept) + (edit.kind != "remove")
    clauses["number"] = 1 - abs(len(found) - wanted) / max(len(found), wanted, 1)
    clauses["edit"] = _edited(free, thing, edit)
    if all(score == 1 for score in clauses.values()):
        return Verdict(1.0, 1.0, clauses)
    return Verdict(0.0, CAP * sum(edit_parts(clauses)) / 2, clauses)


def edit_parts(clauses: Mapping[str, float]) -> tuple[float, float]:
    """(execution, consistency), by an edit's clauses: was it made, and is all else as it was? The second is the mean of
    the clauses but 'edit'; an object too many or too few is counted there, also one that was to be added or removed."""
    others = [score for name, score in clauses.items() if name != "edit"]
    return clauses["edit"], sum(others) / len(others)


def goals(rows: Sequence[tuple[str, npt.NDArray[Any]]]) -> list[Caption | None]:
    """What there should be after each edit, (its text, the source): a caption of the objects, wherever they are.

    None where the text is no edit of this source.
    """
    edits = [_edit(text) for text, _ in rows]
    sources = [source for (_, source), edit in zip(rows, edits, strict=True) if edit]
    shown = iter(detect_batch(np.stack(sources)) if sources else [])
    wanted: list[Caption | None] = []
    for edit in edits:
        try:
            wanted.append(None if edit is None else goal(next(shown), edit))
        except ValueError:
            wanted.append(None)
    return wanted


def _edit(text: str) -> Edit | None:
    try:
        return parse_edit(text)
    except ValueError:
        return None


def goal(source: Sequence[Detection], edit: Edit) -> Caption:
    """A caption of the objects found in a source, with this edit made. ValueError where one of them is not known."""
    thing = None if edit.kind == "add" else _meant(source, edit)
    kept = [(one.colour, one.shape) for one in source if one is not thing]
    if any(UNKNOWN in one for one in kept) or (thing and thing.colour == UNKNOWN):
        raise ValueError(f"{edit.text!r}: the source shows an object that is not known")
    told = edit if thing is None else replace(edit, thing=(thing.colour, thing.shape))
    return Caption(EDITED, (*kept, *([told.result] if told.result else [])))


def _meant(source: Sequence[Detection], edit: Edit) -> Detection:
    colour, shape = edit.thing
    found = [one for one in source if one.shape == shape and colour in (None, one.colour)]
    if len(found) != 1:
        raise ValueError(f"{edit.text!r}: {len(found)} objects of the source are meant by it")
    return found[0]


def _edited(free: Sequence[Detection], thing: Detection | None, edit: Edit) -> float:
    """How far the change was made, among the objects that are not left from the source."""
    if thing is None:  # to add
        wanted = edit.thing
        near = free
    else:
        near = [one for one in free if _distance(one, thing) <= MOVED]
        if edit.kind == "remove":
            return float(not near)
        wanted = (edit.into, thing.shape) if edit.kind == "colour" else (thing.colour, edit.into)
    if any((one.colour, one.shape) == wanted for one in near):
        return 1.0
    return PARTIAL_MATCH * any(one.colour == wanted[0] or one.shape == wanted[1] for one in near)


def _same(one: Detection, other: Detection) -> bool:
    return (one.colour, one.shape) == (other.colour, other.shape) and _distance(one, other) <= MOVED


def _distance(one: Detection, other: Detection) -> float:
    return math.hypot(one.x - other.x, one.y - other.y)


def check_captions(images: npt.NDArray[Any], texts: Sequence[str]) -> list[Verdict]:
    """Judges captions of pictures [N, 3, 32, 32] in 0..1: every claim true, and nothing in the picture left unsaid.

    A text that is no caption of this world says nothing true: strict and graded are 0.
    """
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images but {len(texts)} captions")
    verdicts = []
    for found, text in zip(detect_batch(images), texts, strict=True):
        try:
            verdicts.append(judge(found, grammar.parse(text)))
        except ValueError:
            verdicts.append(Verdict(0.0, 0.0, {}))
    return verdicts
