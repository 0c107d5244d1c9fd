"""Does a picture hold what a prompt claims of it? GenEval's claims, judged by what a detector found in the picture.

A prompt's metadata lists what has to be there (`include`: so many of a class, perhaps of a colour, perhaps at a side of
another entry) and what must not (`exclude`). Each claim becomes clauses, and each clause gives exactly one number in
0..1. Strict is 1 where all of them are 1; graded is their mean. Nothing here looks at a picture.

What the clauses of an entry are:
  object, count        one, or several, of the class: 1 - |wanted - found| / wanted; with `at_least` more is no fault
  colour, attribution  how many of them have the colour; attribution where several entries of a prompt have one
  position             how many pairs of them and of the other entry's objects stand as claimed
  exclude              fewer than so many of a class
An object of the wrong colour is not the one that was asked for, and stands nowhere. Where entries share a class, their
counts add up, and the objects are dealt out by colour.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from rlkit.types import Unscored

RELATIONS = ("left of", "right of", "above", "below")
KINDS = ("object", "count", "colour", "position", "attribution", "exclude")
DEAD_ZONE = 0.1  # of the two objects' summed width or height: an offset as small as that is none
MIN_SHARE = 0.5  # of the offset's length that has to lie along the claimed direction


@dataclass(frozen=True)
class Detection:
    """The K objects that were found in one picture."""

    boxes: Tensor  # [K, 4] left, top, right, bottom in pixels
    labels: tuple[str, ...]  # [K] as the wanted ones were spelt
    scores: Tensor  # [K] how sure the detector is
    masks: Tensor | None = None  # [K, H, W] bool
    colours: tuple[str, ...] | None = None  # [K]; None: somebody else has to look

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Sequence[int]) -> Detection:
        rows = list(rows)
        return Detection(
            boxes=self.boxes[rows],
            labels=tuple(self.labels[row] for row in rows),
            scores=self.scores[rows],
            masks=None if self.masks is None else self.masks[rows],
            colours=None if self.colours is None else tuple(self.colours[row] for row in rows),
        )


@dataclass(frozen=True)
class Wanted:
    """What a detector is asked to look for in one picture."""

    labels: tuple[str, ...]
    threshold: float  # no object with a score as low as this is needed
    colours: tuple[str, ...] = ()  # those that are claimed: of interest to a detector that names colours itself


class Detector(Protocol):
    """Finds objects. Anything that answers so can be put in the place of those of the catalogue."""

    def __call__(self, pictures: Tensor, wanted: Sequence[Wanted]) -> Sequence[Detection | Unscored]:
        """One answer a picture of [N, 3, H, W] in 0..1. `Unscored` where it cannot know, as for a class that it was
        never taught: to find nothing is an answer too."""


@dataclass(frozen=True)
class Entry:
    """One line of `include` or, with a label and a count alone, of `exclude`."""

    label: str
    count: int = 1
    colour: str | None = None
    position: tuple[str, int] | None = None  # (relation, which entry of `include` it is relative to)


@dataclass(frozen=True)
class Claims:
    """What a prompt says of its picture."""

    include: tuple[Entry, ...]
    exclude: tuple[Entry, ...] = ()
    counting: bool = False  # the prompt is about a number

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.label for one in (*self.include, *self.exclude)))

    @property
    def colours(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.colour for one in self.include if one.colour))

    @property
    def numbers(self) -> Counter[str]:
        """How many of each class are wanted."""
        total: Counter[str] = Counter()
        for one in self.include:
            total[one.label] += one.count
        return total


@dataclass(frozen=True)
class Verdict:
    """What holds of the claims."""

    strict: float
    graded: float
    clauses: tuple[tuple[str, float], ...]  # (kind, number in 0..1)

    def mean(self, kind: str) -> float:
        """Of the clauses of one kind; NaN where there is none."""
        numbers = [number for one, number in self.clauses if one == kind]
        return sum(numbers) / len(numbers) if numbers else math.nan


# ------------------------------------------------------------------------------------------------ reading claims


def read(metadata: Mapping[str, Any]) -> Claims:
    """The claims of a prompt in GenEval's form. ValueError says what is wrong; null is the same as absent."""
    include = _entries(metadata, "include", ("class", "count", "color", "position"))
    if not include:
        raise ValueError("the prompt's metadata has no 'include', the list of what its picture has to show")
    exclude = _entries(metadata, "exclude", ("class", "count"))
    for row, one in enumerate(include):
        if one.position and (one.position[1] == row or not 0 <= one.position[1] < len(include)):
            raise ValueError(f"include[{row}] stands {one.position[0]} include[{one.position[1]}], which is no other")
    claims = Claims(include, exclude, counting=metadata.get("tag") == "counting")
    for row, one in enumerate(exclude):
        if one.count <= claims.numbers[one.label]:
            raise ValueError(f"exclude[{row}] forbids as many of {one.label!r} as include wants")
    return claims


def _entries(metadata: Mapping[str, Any], key: str, known: Sequence[str]) -> tuple[Entry, ...]:
    lines = metadata.get(key) or ()
    if isinstance(lines, str) or not isinstance(lines, Sequence):
        raise ValueError(f"{key!r} of the prompt's metadata is a list, not {lines!r}")
    return tuple(_entry(line, f"{key}[{row}]", known) for row, line in enumerate(lines))


def _entry(line: Any, where: str, known: Sequence[str]) -> Entry:
    if not isinstance(line, Mapping):
        raise ValueError(f"{where} is a mapping with {', '.join(known)}, not {line!r}")
    line = {key: value for key, value in line.items() if value is not None}
    if unknown := sorted(set(line) - set(known)):  # a misspelt claim would otherwise be one that always holds
        raise ValueError(f"{where} has {', '.join(map(repr, unknown))}; it may have {', '.join(known)}")
    label, count, colour = line.get("class"), line.get("count", 1), line.get("color")
    if not (isinstance(label, str) and label.strip()):
        raise ValueError(f"{where} names no class")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{where} has count {count!r}; it is a whole number from 1")
    if colour is not None and not (isinstance(colour, str) and colour.strip()):
        raise ValueError(f"{where} has color {colour!r}; it is a word")
    return Entry(label, count, colour, _position(line.get("position"), where))


def _position(value: Any, where: str) -> tuple[str, int] | None:
    match value:
        case None:
            return None
        case [str(relation), int(other)] if relation in RELATIONS and not isinstance(other, bool):
            return relation, other
    raise ValueError(f"{where} has position {value!r}; it is [relation, entry] with one of {', '.join(RELATIONS)}")


# ---------------------------------------------------------------------------------------------- judging pictures


def keep(found: Detection, wanted: Wanted, most: int) -> Detection:
    """Of the wanted classes, what is above the threshold: the surest first, at most `most` of a class."""
    scores = found.scores.tolist()
    taken: Counter[str] = Counter()
    rows = []
    for row in sorted(range(len(found)), key=lambda row: -scores[row]):
        label = found.labels[row]
        if label in wanted.labels and scores[row] > wanted.threshold and taken[label] < most:
            taken[label] += 1
            rows.append(row)
    return found.select(rows)


def uncoloured(claims: Claims, found: Detection) -> list[int]:
    """The objects whose colour has to be known. What `keep` left is sorted: a lone entry takes its first ones."""
    rows: list[int] = []
    for label in dict.fromkeys(one.label for one in claims.include if one.colour):
        entries = [one for one in claims.include if one.label == label]
        rows += _of(label, found)[: entries[0].count if len(entries) == 1 else None]
    return rows


def with_colours(found: Detection, names: Mapping[int, str]) -> Detection:
    """The same objects with the colours of these rows."""
    return replace(found, colours=tuple(names.get(row, "") for row in range(len(found))))


def judge(claims: Claims, found: Detection, at_least: bool = False) -> Verdict:
    """Judges what `keep` left. `at_least`: more than the wanted number is no fault, as in the official evaluation."""
    dealt = _deal(claims.include, found)
    right = [
        [row for row in rows if one.colour in (None, _colour(found, row))]
        for one, rows in zip(claims.include, dealt, strict=True)
    ]
    several = sum(one.colour is not None for one in claims.include) > 1
    clauses: list[tuple[str, float]] = []
    for one, mine in zip(claims.include, right, strict=True):
        number = _number(claims.numbers[one.label], len(_of(one.label, found)), at_least)
        clauses.append(("object" if one.count == 1 else "count", number))
        if one.colour:
            clauses.append(("attribution" if several else "colour", _clip(len(mine) / one.count)))
        if one.position:
            relation, other = one.position
            pairs = one.count * claims.include[other].count
            clauses.append(("position", _clip(_standing(found, mine, right[other], relation) / pairs)))
    for one in claims.exclude:
        if at_least or not claims.numbers[one.label]:  # an exact number already says so
            clauses.append(("exclude", float(len(_of(one.label, found)) < one.count)))
    numbers = [number for _, number in clauses]
    return Verdict(float(min(numbers) == 1), sum(numbers) / len(numbers), tuple(clauses))


def relations(first: Tensor, second: Tensor) -> set[str]:
    """How the first box [4] stands to the second; two words on a diagonal, none where they lie on each other."""
    a, b = first.tolist(), second.tolist()
    offsets = [(a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2 for axis in (0, 1)]  # x to the right, y down
    length = math.hypot(*offsets)
    found = set()
    for axis, (less, more) in enumerate((("left of", "right of"), ("above", "below"))):
        sides = abs(a[axis + 2] - a[axis]) + abs(b[axis + 2] - b[axis])
        beyond = abs(offsets[axis]) - DEAD_ZONE * sides
        if beyond > MIN_SHARE * length:
            found.add(less if offsets[axis] < 0 else more)
    return found


def _number(wanted: int, found: int, at_least: bool) -> float:
    short = max(wanted - found, 0) if at_least else abs(wanted - found)
    return _clip(1 - short / wanted)


def _clip(number: float) -> float:
    return min(max(number, 0.0), 1.0)


def _of(label: str, found: Detection) -> list[int]:
    return [row for row, name in enumerate(found.labels) if name == label]


def _colour(found: Detection, row: int) -> str:
    return found.colours[row] if found.colours else ""


def _deal(include: Sequence[Entry], found: Detection) -> list[list[int]]:
    """The objects that stand for each entry, `count` at most, the surest first.

    Entries that share a class take those of their colour before the rest is dealt out; a lone one gets no choice."""
    shared = Counter(one.label for one in include)
    free = {label: _of(label, found) for label in shared}
    dealt: list[list[int]] = [[] for _ in include]
    for choosy in (True, False):
        for one, mine in zip(include, dealt, strict=True):
            if choosy and (one.colour is None or shared[one.label] == 1):
                continue
            fitting = [row for row in free[one.label] if not choosy or _colour(found, row) == one.colour]
            taken = fitting[: one.count - len(mine)]
            mine += taken
            free[one.label] = [row for row in free[one.label] if row not in taken]
    return dealt


def _standing(found: Detection, mine: Sequence[int], others: Sequence[int], relation: str) -> int:
    """How many pairs stand as claimed."""
    return sum(relation in relations(found.boxes[a], found.boxes[b]) for a in mine for b in others)
