"""What can be asked of the tiny world beside pictures: to change one, and to put what another shows into a new one.

    edit        a source picture; "make the circle green", "turn the square into a cross", "remove the circle",
                "add a red square". The object is named by its shape, and by its colour too where the shape is not
                enough. All that the instruction leaves alone keeps its colour, its shape and its place.
    in_context  one picture of an object, or two; "put it in the top left", "put it and a red square", "put it above a
                red square", "put the circle left of the square" (two pictures: the words tell the shapes, only the
                pictures the colours). What is asked for is a caption, with objects that the pictures stand for.

Held-out meanings are never trained on: those of the captions (in_context), and of edits (kind, object, change).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from rlkit.world import grammar
from rlkit.world.grammar import COLOURS, PLACES, RELATIONS, SHAPES, Caption, Object
from rlkit.world.scenes import Item, Scene, compose, fits

TASKS = ("t2i", "edit", "in_context")

# Share of each kind in a drawn batch or a panel.
EDITS = MappingProxyType({"colour": 0.3, "shape": 0.25, "remove": 0.25, "add": 0.2})
IN_CONTEXT = MappingProxyType({"place": 0.35, "two": 0.35, "relation": 0.3})  # the captions that lie behind
HELD_OUT_EDITS = MappingProxyType({"colour": 20, "shape": 12, "remove": 4, "add": 4})
VALIDATION_EDITS = MappingProxyType({"colour": 12, "shape": 8, "remove": 4, "add": 4})
BOTH_SHOWN = 0.5  # share of captions of two objects, of unlike shapes, that come with a picture of each
CROWD = 0.3  # share of sources with a third object


@dataclass(frozen=True)
class Edit:
    """One change. thing: the object that it is about, or that comes in; into: its new colour or shape."""

    kind: str
    thing: tuple[str | None, str]  # (colour, shape); colour None: there is one of this shape
    into: str = ""

    @property
    def text(self) -> str:
        colour, shape = self.thing
        name = f"{colour} {shape}" if colour else shape
        if self.kind == "colour":
            return f"make the {name} {self.into}"
        if self.kind == "shape":
            return f"turn the {name} into a {self.into}"
        return f"remove the {name}" if self.kind == "remove" else f"add a {name}"

    @property
    def result(self) -> Object | None:
        """What the thing is afterwards, its colour being known; None: it is gone."""
        colour, shape = str(self.thing[0]), self.thing[1]
        outcomes = {"colour": (self.into, shape), "shape": (colour, self.into), "add": (colour, shape), "remove": None}
        return outcomes[self.kind]


@dataclass(frozen=True)
class Put:
    """A caption of which the first `shown` objects are told by pictures."""

    caption: Caption
    shown: int = 1

    @property
    def kind(self) -> str:
        return self.caption.kind

    @property
    def text(self) -> str:
        caption = self.caption
        if caption.place is not None:
            return f"put it in the {caption.place}"
        link = caption.relation or "and"
        if self.shown == 1:
            return f"put it {link} a {' '.join(caption.objects[1])}"
        (_, first), (_, second) = caption.objects
        return f"put the {first} {link} the {second}"


@dataclass(frozen=True)
class Example:
    """An instruction with the scenes of its pictures, and one scene that obeys it. In a caption there are none."""

    text: str
    kind: str
    task: str
    shown: tuple[Scene, ...]  # the source, or the references
    answer: Scene


Instruction: TypeAlias = Edit | Put


# ---- reading ---------------------------------------------------------------------------------------------------------


def parse_edit(text: str) -> Edit:
    """The edit a text asks for; ValueError says what is wrong with it."""
    words = text.lower().split()
    if words[:2] == ["add", "a"]:
        thing = _thing(text, words[2:])
        if thing[0] is None:
            raise ValueError(f"{text!r}: expected 'add a <colour> <shape>'")
        return Edit("add", thing)
    if words[:2] == ["remove", "the"]:
        return Edit("remove", _thing(text, words[2:]))
    if words[:2] == ["make", "the"]:
        return Edit("colour", _thing(text, words[2:-1]), _known(text, words[-1], tuple(COLOURS), "colour"))
    if words[:2] == ["turn", "the"] and words[-3:-1] == ["into", "a"]:
        return Edit("shape", _thing(text, words[2:-3]), _known(text, words[-1], SHAPES, "shape"))
    ways = "'make the ... <colour>', 'turn the ... into a <shape>', 'remove the ...', 'add a <colour> <shape>'"
    raise ValueError(f"{text!r} is no instruction to edit; expected {ways}")


def parse_put(text: str, shown: Sequence[Object]) -> Caption:
    """The caption that a text stands for beside pictures of these objects; ValueError says what is wrong."""
    words = text.lower().split()
    if words[:2] == ["put", "it"] and len(shown) == 1:
        return grammar.parse(f"a {' '.join(shown[0])} {' '.join(words[2:])}")
    link = next((way for way in ("and", *RELATIONS) if words[3:-2] == way.split()), None)
    if words[:2] == ["put", "the"] and link and words[-2] == "the" and len(shown) == 2:
        first, second = (_shown(text, shape, shown) for shape in (words[2], words[-1]))
        return grammar.parse(f"a {' '.join(first)} {link} a {' '.join(second)}")
    expected = "'put it <in the place, or and/relation with an object>'" if len(shown) == 1 else "'put the ... the ...'"
    raise ValueError(f"{text!r} is no instruction beside {len(shown)} pictures; expected {expected}")


def _shown(text: str, shape: str, shown: Sequence[Object]) -> Object:
    found = [one for one in shown if one[1] == shape]
    if len(found) != 1:
        raise ValueError(f"{text!r}: {len(found)} of the pictures show a {shape}")
    return found[0]


def _thing(text: str, words: Sequence[str]) -> tuple[str | None, str]:
    if len(words) not in (1, 2):
        raise ValueError(f"{text!r}: expected '<shape>' or '<colour> <shape>', found {' '.join(words)!r}")
    colour = _known(text, words[0], tuple(COLOURS), "colour") if len(words) == 2 else None
    return colour, _known(text, words[-1], SHAPES, "shape")


def _known(text: str, word: str, known: Sequence[str], what: str) -> str:
    if word not in known:
        raise ValueError(f"{text!r}: {word!r} is not a {what}; known: {', '.join(known)}")
    return word


# ---- splits ----------------------------------------------------------------------------------------------------------


@cache
def edits(kind: str) -> tuple[Edit, ...]:
    """Every edit of a kind, the colour always told, in a fixed order."""
    things = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    if kind == "colour":
        return tuple(Edit(kind, thing, into) for thing in things for into in COLOURS if into != thing[0])
    if kind == "shape":
        return tuple(Edit(kind, thing, into) for thing in things for into in SHAPES if into != thing[1])
    if kind in EDITS:
        return tuple(Edit(kind, thing) for thing in things)
    raise ValueError(f"{kind!r} is not a kind of edit; known: {', '.join(EDITS)}")


@cache
def split(name: str, kind: str) -> tuple[Edit, ...]:
    """The edits of one kind and split. What an object becomes is told by kind, object and change, so by the text."""
    if name not in grammar.SPLITS:
        raise ValueError(f"{name!r} is not a split; known: {', '.join(grammar.SPLITS)}")
    order = sorted(edits(kind), key=lambda edit: (zlib.crc32(edit.text.encode()), edit.text))
    held_out = HELD_OUT_EDITS[kind]
    validation = held_out + VALIDATION_EDITS[kind]
    parts = {"held_out": order[:held_out], "validation": order[held_out:validation], "train": order[validation:]}
    chosen = frozenset(parts[name])
    return tuple(edit for edit in edits(kind) if edit in chosen)


def kinds(task: str) -> MappingProxyType[str, float]:
    """The kinds of a task and their shares."""
    if task not in TASKS:
        raise ValueError(f"{task!r} is not a task; known: {', '.join(TASKS)}")
    return {"t2i": grammar.KINDS, "edit": EDITS, "in_context": IN_CONTEXT}[task]


def draw(task: str, split_name: str, n: int, rng: np.random.Generator, only: Sequence[str] = ()) -> list[Example]:
    """`n` examples of a task and split at random: the kind by its weight, then any of that kind. only: these kinds."""
    if task == "t2i" and not only:
        return [_example(task, caption, rng) for caption in grammar.draw(split_name, n, rng)]
    shares = {kind: share for kind, share in kinds(task).items() if not only or kind in only}
    weights = np.array(list(shares.values()))
    chosen = rng.choice(len(shares), size=n, p=weights / weights.sum()).tolist()
    names = list(shares)
    return [_example(task, _any(_pool(task, split_name, names[kind]), rng), rng) for kind in chosen]


def panel(task: str, split_name: str, n: int) -> list[Example]:
    """A fixed list of `n` examples: kinds by their weights and evenly interleaved, those of a kind in rotation."""
    rows: list[tuple[float, int, Example]] = []
    for index, (kind, quota) in enumerate(grammar.quotas(n, kinds(task)).items()):
        pool: list[Caption | Edit] = sorted(
            _pool(task, split_name, kind), key=lambda one: (zlib.crc32(one.text.encode()), one.text)
        )
        for i in range(quota):
            rng = np.random.default_rng([zlib.crc32(f"{task} {split_name} {kind}".encode()), i])
            rows.append(((i + 0.5) / quota, index, _example(task, pool[i % len(pool)], rng)))
    return [example for _, _, example in sorted(rows, key=lambda row: row[:2])]


def _pool(task: str, split_name: str, kind: str) -> tuple[Caption, ...] | tuple[Edit, ...]:
    return split(split_name, kind) if task == "edit" else grammar.split(split_name, kind)


def _any(pool: Sequence[Caption] | Sequence[Edit], rng: np.random.Generator) -> Caption | Edit:
    return pool[int(rng.random() * len(pool))]


# ---- scenes ----------------------------------------------------------------------------------------------------------


def _example(task: str, asked: Caption | Edit, rng: np.random.Generator) -> Example:
    if isinstance(asked, Edit):
        return edit_example(asked, rng)
    if task == "t2i":
        return Example(asked.text, asked.kind, task, (), compose(asked, rng))
    unlike = len(asked.objects) == 2 and asked.objects[0][1] != asked.objects[1][1]
    return put_example(Put(asked, 2 if unlike and rng.random() < BOTH_SHOWN else 1), rng)


def put_example(put: Put, rng: np.random.Generator) -> Example:
    """Pictures of the objects that are shown, each alone and anywhere, and a scene of which the caption is true."""
    shown = tuple(compose(Caption("single", (thing,)), rng) for thing in put.caption.objects[: put.shown])
    return Example(put.text, put.kind, "in_context", shown, compose(put.caption, rng))


def edit_example(edit: Edit, rng: np.random.Generator) -> Example:
    """A source in which the edit (its colour told) can be made in one way only, and the scene that it becomes.

    No two objects of either scene are alike.
    """
    thing = (str(edit.thing[0]), edit.thing[1])
    taken = {thing} | ({edit.result} if edit.result else set())
    free = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in taken]
    others = [free[i] for i in rng.permutation(len(free))[: 1 + int(rng.random() < CROWD)].tolist()]
    while True:
        whole = compose(Caption("several", (thing, *others)), rng)
        source = whole[1:] if edit.kind == "add" else whole
        answer = apply(edit, whole)
        if fits(answer):
            break
    alone = sum(shape == thing[1] for _, shape in (thing, *others)) == 1
    told = replace(edit, thing=(None, thing[1])) if alone and edit.kind != "add" else edit
    return Example(told.text, edit.kind, "edit", (source,), answer)


def apply(edit: Edit, whole: Scene) -> Scene:
    """The scene after an edit of its first object."""
    first, rest = whole[0], whole[1:]
    if edit.result is None:
        return rest
    colour, shape = edit.result
    return (Item(colour, shape, first.x, first.y, first.radius), *rest)


__all__ = [
    "EDITS",
    "IN_CONTEXT",
    "PLACES",
    "TASKS",
    "Edit",
    "Example",
    "Instruction",
    "Put",
    "draw",
    "edit_example",
    "edits",
    "kinds",
    "panel",
    "parse_edit",
    "parse_put",
    "put_example",
    "split",
]
