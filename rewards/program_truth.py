"""Does an agent's program say what the embedded world's atlas says? Rules of the world read both; no model is involved.

What is compared are the meanings of two captions, so that a mirrored relation ("A left of B", "B right of A") is the
same. It judges the words alone: what a generator makes of them is another reward's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlkit.world.checker import CAP, PARTIAL_MATCH
from rlkit.world.grammar import Caption, Object, parse

if TYPE_CHECKING:
    from rlkit.types import Samples

SCORES = ("strict", "graded", "mixed")


@dataclass(frozen=True)
class ProgramTruth:
    """Whether an agent's prompt means what the embedded world's atlas says: strict, graded, or the mean of both.

    score: 'strict' is 1 when both captions mean the same, else 0; 'graded' gives partial credit below .5 for each fact
    that is right; 'mixed' is their mean. What is no caption of this world, or no program at all, scores 0.

    Returns (values [N], {"strict": [N], "graded": [N]}); NaN where a prompt's metadata has no caption of this world.
    """

    score: str = "mixed"

    reads = ("text", "metadata")
    range = (0.0, 1.0)
    higher_is_better = True
    components = ("strict", "graded")
    groupwise = False
    licence = "Apache-2.0"
    size = "none"
    protocol = "this repository, rlkit/world/grammar.py"
    version = "1"

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            near = get_close_matches(self.score, SCORES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"score={self.score!r} is none of {', '.join(SCORES)}{hint}")

    def __call__(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        texts = samples.texts or (None,) * len(samples.prompts)  # without texts nothing can be judged
        rows = [_judged(text, one.metadata.get("caption")) for text, one in zip(texts, samples.prompts, strict=True)]
        strict, graded = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), 2).unbind(1)
        values = {"strict": strict, "graded": graded, "mixed": (strict + graded) / 2}[self.score]
        return values, {"strict": strict, "graded": graded}


def _judged(text: str | None, truth: object) -> tuple[float, float]:
    """strict and graded; NaN where there is nothing to compare with."""
    wanted = _read(truth)
    if text is None or wanted is None:
        return math.nan, math.nan
    said = _read(text)
    if said is None:
        return 0.0, 0.0
    return float(said.canonical == wanted.canonical), likeness(said, wanted)


def _read(text: object) -> Caption | None:
    if not isinstance(text, str):
        return None
    try:
        return parse(text)
    except ValueError:
        return None


def likeness(one: Caption, other: Caption) -> float:
    """1 where two captions mean the same, else half of the mean over their facts, so below .5. Symmetric.

    Facts are each object, paired as fits best (all of it, or .25 for the colour or the shape alone; an object too many
    has no pair and is a fact that is wrong), the number, and a place or a relation where either has one. A place is
    right by itself; a relation is right if one object at least is right that stands on the same side of it.
    """
    if one.canonical == other.canonical:
        return 1.0
    facts = _objects(one.objects, other.objects)
    facts.append(min(one.number, other.number) / max(one.number, other.number))
    details = [caption.place or caption.relation for caption in (one, other)]
    if details != [None, None]:
        facts.append(float(_same_place(one, other) or _same_relation(one, other)))
    return CAP * sum(facts) / len(facts)


def _objects(ours: tuple[Object, ...], theirs: tuple[Object, ...]) -> list[float]:
    """The score of each pair, in the better of the two ways to pair them: no caption has more than two."""
    more = max(len(ours), len(theirs))
    left, right = ((*side, *[None] * (more - len(side))) for side in (ours, theirs))
    ways = [[_object(a, b) for a, b in zip(left, way, strict=True)] for way in (right, right[::-1])]
    return max(ways, key=sum)


def _object(one: Object | None, other: Object | None) -> float:
    if one is None or other is None:
        return 0.0
    if one == other:
        return 1.0
    return PARTIAL_MATCH if one[0] == other[0] or one[1] == other[1] else 0.0


def _same_place(one: Caption, other: Caption) -> bool:
    return one.place is not None and one.place == other.place


def _same_relation(one: Caption, other: Caption) -> bool:
    if one.relation is None or other.relation is None:
        return False
    # kind|relation|first|second, with "right of" and "below" told the other way round
    (_, ours, *first), (_, theirs, *second) = one.canonical.split("|"), other.canonical.split("|")
    return ours == theirs and any(a == b for a, b in zip(first, second, strict=True))
