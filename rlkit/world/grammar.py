"""The captions of the tiny world: what can be said, what is held out, and how words become tokens.

Every caption is one of five templates. Two captions that mean the same ("A left of B", "B right of A") share a
canonical key, and the three-way split is made over those keys, so that no held-out meaning is seen in training.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

Object: TypeAlias = tuple[str, str]  # (colour, shape)

BACKGROUND = (18, 18, 24)
COLOURS = MappingProxyType(
    {
        "red": (230, 45, 45),
        "green": (45, 190, 60),
        "blue": (50, 85, 240),
        "yellow": (240, 220, 45),
        "purple": (195, 60, 220),
        "cyan": (60, 215, 225),
    }
)
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = MappingProxyType({"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"})
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = MappingProxyType({"two": 2, "three": 3, "four": 4})
PLACES = ("top left", "top right", "bottom left", "bottom right")

# Share of each kind in a drawn batch or a panel.
KINDS = MappingProxyType({"single": 0.18, "two": 0.24, "relation": 0.24, "count": 0.16, "place": 0.18})

SPLITS = ("train", "validation", "held_out")
# Meanings (not captions) kept out of training, per kind: a meaning of `two` or `relation` has two captions each.
HELD_OUT_MEANINGS = MappingProxyType({"single": 5, "two": 20, "relation": 40, "count": 15, "place": 20})
VALIDATION_MEANINGS = MappingProxyType({"single": 4, "two": 15, "relation": 30, "count": 9, "place": 12})
# Picked so that even the kinds with few captions cover colours, shapes, numbers and places evenly in every split.
SPLIT_SALT = 167301

_MIRRORED = MappingProxyType({"right of": "left of", "below": "above"})
_PLURAL_OF = MappingProxyType({shape: plural for plural, shape in PLURALS.items()})
_NUMBER_WORD = MappingProxyType({number: word for word, number in NUMBERS.items()})


@dataclass(frozen=True)
class Caption:
    """One thing that can be said. `parse` and `captions` build valid ones; nothing is checked here."""

    kind: str
    objects: tuple[Object, ...]
    relation: str | None = None
    count: int | None = None
    place: str | None = None

    @property
    def text(self) -> str:
        colour, shape = self.objects[0]
        if self.count is not None:
            return f"{_NUMBER_WORD[self.count]} {colour} {_PLURAL_OF[shape]}"
        first = f"a {colour} {shape}"
        if self.place is not None:
            return f"{first} in the {self.place}"
        if len(self.objects) == 1:
            return first
        return f"{first} {self.relation or 'and'} a {' '.join(self.objects[1])}"

    @property
    def canonical(self) -> str:
        """A key that is equal exactly for captions that mean the same."""
        objects, relation = self.objects, self.relation
        if self.kind == "two":
            objects = tuple(sorted(objects))
        elif relation is not None and relation in _MIRRORED:
            objects, relation = objects[::-1], _MIRRORED[relation]
        detail = relation or self.place or str(self.number)
        return "|".join([self.kind, detail, *(f"{colour} {shape}" for colour, shape in objects)])

    @property
    def number(self) -> int:
        """How many objects the picture must hold."""
        return len(self.objects) if self.count is None else self.count

    @property
    def targets(self) -> tuple[Object, ...]:
        """The objects the picture must hold, one entry each."""
        return self.objects if self.count is None else self.objects * self.count


def parse(text: str) -> Caption:
    """The caption a text stands for; ValueError names the word, or the ending, that fits no template."""
    words = text.lower().split()
    if words and words[0] in NUMBERS:
        return _parse_count(text, words)
    first, rest = _parse_object(text, words), words[3:]
    if not rest:
        return Caption("single", (first,))
    if rest[:2] == ["in", "the"]:
        place = " ".join(rest[2:])
        if place not in PLACES:
            raise ValueError(f"{text!r}: {place!r} is not a place; known: {', '.join(PLACES)}")
        return Caption("place", (first,), place=place)
    relation = next((name for name in ("and", *RELATIONS) if rest[: len(name.split())] == name.split()), None)
    if relation is None:
        ways = ", ".join(repr(way) for way in ("and", *RELATIONS, "in the"))
        raise ValueError(f"{text!r}: {' '.join(rest)!r} cannot follow an object; expected {ways}")
    rest = rest[len(relation.split()) :]
    second = _parse_object(text, rest)
    if rest[3:]:
        raise ValueError(f"{text!r}: {' '.join(rest[3:])!r} cannot follow a second object")
    if first == second:
        raise ValueError(f"{text!r}: the two objects must differ")
    if relation == "and":
        return Caption("two", (first, second))
    return Caption("relation", (first, second), relation=relation)


def _parse_object(text: str, words: Sequence[str]) -> Object:
    if len(words) < 3 or words[0] != "a":
        raise ValueError(f"{text!r}: expected 'a <colour> <shape>', found {' '.join(words[:3])!r}")
    return _colour(text, words[1]), _member(text, words[2], SHAPES, "shape")


def _parse_count(text: str, words: Sequence[str]) -> Caption:
    if len(words) != 3:
        raise ValueError(f"{text!r}: expected '{words[0]} <colour> <shapes>', found {len(words)} words")
    plural = _member(text, words[2], tuple(PLURALS), "plural shape")
    return Caption("count", ((_colour(text, words[1]), PLURALS[plural]),), count=NUMBERS[words[0]])


def _colour(text: str, word: str) -> str:
    return _member(text, word, tuple(COLOURS), "colour")


def _member(text: str, word: str, known: Sequence[str], what: str) -> str:
    if word not in known:
        raise ValueError(f"{text!r}: {word!r} is not a {what}; known: {', '.join(known)}")
    return word


@cache
def captions(kind: str) -> tuple[Caption, ...]:
    """Every caption of a kind, in a fixed order."""
    objects = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    pairs = [(first, second) for first in objects for second in objects if first != second]
    if kind == "single":
        return tuple(Caption(kind, (thing,)) for thing in objects)
    if kind == "two":
        return tuple(Caption(kind, pair) for pair in pairs)
    if kind == "relation":
        return tuple(Caption(kind, pair, relation=relation) for pair in pairs for relation in RELATIONS)
    if kind == "count":
        return tuple(Caption(kind, (thing,), count=count) for thing in objects for count in NUMBERS.values())
    if kind == "place":
        return tuple(Caption(kind, (thing,), place=place) for thing in objects for place in PLACES)
    raise ValueError(f"{kind!r} is not a kind; known: {', '.join(KINDS)}")


@cache
def split(name: str, kind: str | None = None) -> tuple[Caption, ...]:
    """The captions of one split, of one kind or of all, in the order of `captions`."""
    if name not in SPLITS:
        raise ValueError(f"{name!r} is not a split; known: {', '.join(SPLITS)}")
    if kind is None:
        return tuple(caption for each in KINDS for caption in split(name, each))
    everything = captions(kind)
    meanings = sorted({caption.canonical for caption in everything}, key=lambda key: _shuffled(f"{SPLIT_SALT} {key}"))
    held_out = HELD_OUT_MEANINGS[kind]
    validation = held_out + VALIDATION_MEANINGS[kind]
    wanted = {
        "held_out": meanings[:held_out],
        "validation": meanings[held_out:validation],
        "train": meanings[validation:],
    }
    chosen = frozenset(wanted[name])
    return tuple(caption for caption in everything if caption.canonical in chosen)


def _shuffled(key: str) -> tuple[int, str]:
    """A sort key that mixes strings the same way on every machine; the string itself breaks ties."""
    return zlib.crc32(key.encode()), key


def draw(split_name: str, n: int, rng: np.random.Generator) -> list[Caption]:
    """`n` captions of a split at random: the kind by its weight, then any caption of that kind."""
    weights = np.array(list(KINDS.values()))
    kinds = rng.choice(len(KINDS), size=n, p=weights / weights.sum())
    pools = [split(split_name, kind) for kind in KINDS]
    return [pools[kind][int(u * len(pools[kind]))] for kind, u in zip(kinds.tolist(), rng.random(n), strict=True)]


def panel(split_name: str, n: int) -> list[Caption]:
    """A fixed list of `n` captions: kinds by their weights and evenly interleaved, captions of a kind in rotation."""
    rows: list[tuple[float, int, Caption]] = []
    for index, (kind, quota) in enumerate(quotas(n, KINDS).items()):
        pool = sorted(split(split_name, kind), key=lambda caption: _shuffled(caption.text))
        # Placing the i-th of `quota` captions at (i + 1/2) / quota spreads each kind evenly over the list.
        rows += [((i + 0.5) / quota, index, pool[i % len(pool)]) for i in range(quota)]
    return [caption for _, _, caption in sorted(rows, key=lambda row: row[:2])]


def quotas(n: int, shares: Mapping[str, float]) -> dict[str, int]:
    """How many of `n` each kind gets, by the largest remainder."""
    total = sum(shares.values())
    exact = {kind: n * weight / total for kind, weight in shares.items()}
    counts = {kind: int(share) for kind, share in exact.items()}
    by_remainder = sorted(shares, key=lambda kind: counts[kind] - exact[kind])
    for kind in by_remainder[: n - sum(counts.values())]:
        counts[kind] += 1
    return counts


PAD, UNK, BOS, EOS = range(4)  # CLIP pools wrongly at an end token with id 2
LENGTH = 12  # tokens of every tokenized text, <bos> and <eos> included
# The last row is for instructions that change a picture, so that they can share a text encoder with the captions.
VOCABULARY: tuple[str, ...] = (
    *("<pad>", "<unk>", "<bos>", "<eos>"),
    *("a", "and", "left", "right", "of", "above", "below", "in", "the", "top", "bottom"),
    *NUMBERS,
    *COLOURS,
    *SHAPES,
    *PLURALS,
    *("make", "turn", "into", "remove", "add", "put", "from", "reference", "it"),
)
_TOKEN = MappingProxyType({word: token for token, word in enumerate(VOCABULARY)})


def tokenize(text: str) -> list[int]:
    """`LENGTH` token ids: <bos>, the lower-cased words, <eos>, then padding. A text too long is an error."""
    words = text.lower().split()
    if len(words) > LENGTH - 2:
        raise ValueError(f"{text!r} has {len(words)} words; at most {LENGTH - 2} fit")
    tokens = [BOS, *(_TOKEN.get(word, UNK) for word in words), EOS]
    return tokens + [PAD] * (LENGTH - len(tokens))


def unknown_words(text: str) -> list[str]:
    """The words of a text that `tokenize` would turn into <unk>, in their order."""
    return [word for word in text.lower().split() if word not in _TOKEN]
