"""Several sources of prompts in one: which source each prompt of a step comes from, and how far each has been read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from rlkit.data.epochs import PromptBatch, Size, Source
from rlkit.data.picture_files import UnreadPrompts
from rlkit.errors import DataError
from rlkit.types import Prompt, seed_of


class Stream(NamedTuple):
    """The prompts of one source and one size."""

    source: str
    size: Size | None
    share: float  # of the mixture's prompts


@dataclass(frozen=True)
class Mixed:
    """An opened mixture. All prompts of a step have one size."""

    sources: Mapping[str, Source]
    weights: Mapping[str, float]
    per_step: int
    group: int
    counted: dict[tuple[int, str], list[np.ndarray[Any, Any]]] = field(default_factory=dict)  # prompts before a step

    def __post_init__(self) -> None:
        sizes = {name: list(source.shares()) for name, source in self.sources.items()}
        without = [name for name, own in sizes.items() if None in own]
        if without and len(without) < len(sizes):
            sized = next(name for name in sizes if name not in without)
            what = f"the source {sized!r} has sizes and {without[0]!r} has none: no step could have both"
            raise DataError(what, where="sources", hint="Give sizes to all sources or to none.")

    def draw(self, seed: int, stage: str, step: int) -> PromptBatch:
        before, counts = self._before(seed, stage, step), self._counts(seed, stage, step)
        prompts = []
        for stream, start, count in zip(self.streams, before.tolist(), counts.tolist(), strict=True):
            if count:
                key = (seed, f"{stage}/{stream.source}", step)
                taken = self.sources[stream.source].take(key, stream.size, start, count)
                prompts += [_told(stream.source, prompt) for prompt in taken]
        return PromptBatch(tuple(prompts), self.group)

    @cached_property
    def streams(self) -> list[Stream]:
        total = sum(self.weights.values())
        return [
            Stream(name, size, self.weights[name] / total * share)
            for name, source in self.sources.items()
            for size, share in source.shares().items()
        ]

    def _counts(self, seed: int, stage: str, step: int) -> np.ndarray[Any, Any]:
        """How many prompts each stream gives to a step: first the step's size is drawn, then each prompt's source."""
        rng = np.random.default_rng(seed_of(seed, stage, step, "mixture"))
        shares = np.array([stream.share for stream in self.streams])
        sizes = list(dict.fromkeys(stream.size for stream in self.streams))
        of_size = np.array([sizes.index(stream.size) for stream in self.streams])
        each = np.bincount(of_size, shares)
        shares = np.where(of_size == rng.choice(len(sizes), p=each / each.sum()), shares, 0.0)
        return rng.multinomial(self.per_step, shares / shares.sum())

    def _before(self, seed: int, stage: str, step: int) -> np.ndarray[Any, Any]:
        """How many prompts each stream gave to all earlier steps together. Counted from the first step on where this
        is asked for the first time, as after a resume."""
        counted = self.counted.setdefault((seed, stage), [np.zeros(len(self.streams), dtype=np.int64)])
        while len(counted) <= step:
            counted.append(counted[-1] + self._counts(seed, stage, len(counted) - 1))
        return counted[step]

    def held_out(self, count: int) -> tuple[Prompt, ...]:
        """By the weights of the sources that have held-out prompts, of the size that weighs most among these."""
        sizes: dict[Size | None, float] = {}
        for name, source in self.sources.items():
            for size, share in source.panel_sizes().items():
                sizes[size] = sizes.get(size, 0.0) + self.weights[name] * share
        if not sizes:
            return ()
        size = max(sizes, key=lambda one: sizes[one])
        names = [name for name, source in self.sources.items() if size in source.panel_sizes()]
        counts = _split(count, [self.weights[name] for name in names])
        panels = [(name, self.sources[name].panel(n, size)) for name, n in zip(names, counts, strict=True) if n]
        return tuple(_told(name, prompt) for name, panel in panels for prompt in panel)

    def texts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(text for source in self.sources.values() for text in source.texts()))

    def everything(self) -> UnreadPrompts | None:
        found = []
        for name, source in self.sources.items():
            own = source.everything()
            if own is None:
                return None
            found += [replace(row, prompt=_told(name, row.prompt)) for row in own.rows]
        return UnreadPrompts(found)


def _told(source: str, prompt: Prompt) -> Prompt:
    """With an id that no other source has. A prompt of no kind is of its source's, so that scores are told apart."""
    return replace(prompt, id=seed_of(source, prompt.id), kind=prompt.kind or source)


def _split(count: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `count`, as near to the weights as can be."""
    wanted = np.array(weights) / sum(weights) * count
    numbers = np.floor(wanted).astype(int)
    short = np.argsort(numbers - wanted, kind="stable")[: count - int(numbers.sum())]
    numbers[short] += 1
    return [int(one) for one in numbers]
