"""Lists of prompts, walked through in epochs: what is held out, of which size a step is, and what broken pictures do.

What a step draws is a pure function of (seed, stage, step) and of the files. Nothing is counted from step to step:
what is remembered below could be computed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from rlkit.data.picture_files import Sieve, Unread, UnreadPrompts
from rlkit.errors import DataError
from rlkit.types import Prompt, seed_of

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class PromptBatch:
    """What one step samples: `group` pictures of each prompt. Sample i of the step belongs to prompt i // group."""

    prompts: tuple[Prompt, ...]
    group: int
    each: Mapping[int, Prompt] = field(default_factory=dict)  # by sample, where the members of a group are told apart

    def __len__(self) -> int:
        return len(self.prompts) * self.group

    def of(self, sample: int) -> Prompt:
        """What one sample of the step is told."""
        return self.each.get(sample) or self.prompts[sample // self.group]


class Prompts(Protocol):
    """An opened data set."""

    def draw(self, seed: int, stage: str, step: int) -> PromptBatch: ...

    def held_out(self, count: int) -> tuple[Prompt, ...]: ...

    def texts(self) -> tuple[str, ...]:
        """Every distinct text of a user's own prompts, to be looked at before the first step."""
        ...

    def everything(self) -> Sequence[Prompt] | None:
        """All that is trained and evaluated on, pictures read as one walks through it; None: there is no end to it."""
        ...


class Source(Prompts, Protocol):
    """What a mixture draws from."""

    def everything(self) -> UnreadPrompts | None: ...

    def shares(self) -> Mapping[Size | None, float]:
        """Which share of the prompts that are trained on has which size."""
        ...

    def take(self, key: tuple[int, str, int], size: Size | None, start: int, count: int) -> tuple[Prompt, ...]:
        """The next `count` prompts of this size after the first `start`, for the key (seed, stage, step)."""
        ...

    def panel_sizes(self) -> Mapping[Size | None, float]:
        """The sizes of the held-out prompts, and how much each counts."""
        ...

    def panel(self, count: int, size: Size | None) -> tuple[Prompt, ...]: ...


def check_counts(per_step: int, group: int) -> None:
    if per_step < 1:
        raise ValueError(f"per_step must be 1 prompt or more, not {per_step}")
    if group < 1:
        raise ValueError(f"group must be 1 or more, not {group}")


@dataclass(frozen=True)
class Choices:
    """What a recipe may say of every list of prompts."""

    per_step: int
    group: int
    held_out_share: float = 0.0
    held_out_salt: str = ""
    sizes: tuple[Size, ...] | None = None
    max_broken: float = 0.0
    verify: bool = False

    def __post_init__(self) -> None:
        check_counts(self.per_step, self.group)
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"held_out_share must be 0 or more and below 1, not {self.held_out_share}")
        if self.held_out_salt and not self.held_out_share:
            raise ValueError("held_out_salt chooses among held_out_share's prompts: give held_out_share too")
        if not 0 <= self.max_broken < 1:
            raise ValueError(f"max_broken must be 0 or more and below 1, not {self.max_broken}: a share of the prompts")
        if self.sizes is not None and not self.sizes:
            raise ValueError("sizes must name one [height, width] or more. Leave it out for the backbone's own size")
        for size in self.sizes or ():
            if min(size) < 1:
                raise ValueError(f"sizes must be [height, width] in pixels, not {list(size)}")
        if self.sizes and len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes names one twice: {[list(one) for one in self.sizes]}")


# ---- a list of prompts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """An opened list of prompts. Rows are called by their place in the sieve."""

    sieve: Sieve
    buckets: Mapping[Size | None, tuple[int, ...]]  # the rows to train on, by the size of their pictures
    kept: Mapping[Size | None, tuple[int, ...]]  # the held-out ones
    per_step: int
    group: int
    where: str  # for messages
    instead: Prompts | None = None  # whose prompts are evaluated on in place of `kept`
    orders: dict[tuple[object, ...], np.ndarray[Any, Any]] = field(default_factory=dict)  # shuffles, by epoch

    def draw(self, seed: int, stage: str, step: int) -> PromptBatch:
        """Every prompt once an epoch, in an order drawn anew each epoch. All of one size."""
        size, turn = self._turn(seed, stage, step)
        return PromptBatch(self.take((seed, stage, step), size, turn * self.per_step, self.per_step), self.group)

    def take(self, key: tuple[int, str, int], size: Size | None, start: int, count: int) -> tuple[Prompt, ...]:
        """The place of a broken one is taken by the next of the epoch that this step does not have yet."""
        seed, stage, _ = key
        wanted = [self._row(seed, stage, size, start + k) for k in range(count)]
        found = [self.sieve.read(i) for i in wanted]
        if None in found:
            spare = self._following(seed, stage, size, start + count, set(wanted))
            found = [next(spare, None) if one is None else one for one in found]
        return self._filled(found)

    def _following(self, seed: int, stage: str, size: Size | None, start: int, taken: set[int]) -> Iterator[Prompt]:
        """Every sound row that is not taken yet, from this position on."""
        for position in range(start, start + 2 * len(self.buckets[size])):  # as far as the end of the next epoch
            i = self._row(seed, stage, size, position)
            if i not in taken:
                taken.add(i)
                prompt = self.sieve.read(i)
                if prompt is not None:
                    yield prompt

    def _filled(self, found: list[Prompt | None]) -> tuple[Prompt, ...]:
        """With the others over again where a place is still empty: the whole bucket is smaller than a step."""
        there = [one for one in found if one is not None]
        if not there:
            raise DataError("all pictures of a size are broken", where=self.where)
        return tuple(one or there[k % len(there)] for k, one in enumerate(found))

    def _row(self, seed: int, stage: str, size: Size | None, position: int) -> int:
        rows = self.buckets[size]
        bucket = list(self.buckets).index(size)
        key = (seed, stage, position // len(rows), *([bucket] if bucket else []))
        if key not in self.orders:
            self.orders[key] = np.random.default_rng(seed_of(*key, "epoch")).permutation(len(rows))
        return rows[self.orders[key][position % len(rows)]]

    def _turn(self, seed: int, stage: str, step: int) -> tuple[Size | None, int]:
        """Which size this step has, and how many steps had it before.

        In a cycle of steps each bucket has its share of them exactly, spread evenly: the j-th of its m steps falls
        somewhere in the j-th of m equal parts of the cycle.
        """
        sizes = list(self.buckets)
        if len(sizes) == 1:
            return sizes[0], step
        counts = [len(rows) for rows in self.buckets.values()]
        steps = [count // math.gcd(self.per_step, *counts) for count in counts]  # in a cycle
        cycle, place = divmod(step, sum(steps))
        key = (seed, stage, cycle, "sizes")
        if key not in self.orders:
            rng = np.random.default_rng(seed_of(*key))
            times = np.concatenate([(np.arange(m) + rng.random(m)) / m for m in steps])
            self.orders[key] = np.repeat(np.arange(len(sizes)), steps)[np.argsort(times, kind="stable")]
        bucket = int(self.orders[key][place])
        before = int((self.orders[key][:place] == bucket).sum())
        return sizes[bucket], cycle * steps[bucket] + before

    def shares(self) -> Mapping[Size | None, float]:
        total = sum(len(rows) for rows in self.buckets.values())
        return {size: len(rows) / total for size, rows in self.buckets.items()}

    def held_out(self, count: int) -> tuple[Prompt, ...]:
        """Of one size, that of most of them: pictures of two sizes are no batch."""
        if self.instead is not None:
            return self.instead.held_out(count)
        return self.panel(count, max(self.kept, key=lambda size: len(self.kept[size]))) if self.kept else ()

    def panel_sizes(self) -> Mapping[Size | None, float]:
        total = sum(len(rows) for rows in self.kept.values())
        return {size: len(rows) / total for size, rows in self.kept.items()}

    def panel(self, count: int, size: Size | None) -> tuple[Prompt, ...]:
        found: list[Prompt | None] = []
        for i in self.kept[size] if count else ():
            if len(found) < count and (prompt := self.sieve.read(i)) is not None:
                found.append(prompt)
        return self._filled(found + [None] * (count - len(found))) if count else ()

    def texts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.sieve.rows[i].prompt.text for i in self._rows()))

    def _rows(self) -> list[int]:
        """In the order of the files, what is trained on first."""
        parts = [sorted(i for rows in part.values() for i in rows) for part in (self.buckets, self.kept)]
        return [i for part in parts for i in part]

    def everything(self) -> UnreadPrompts | None:
        """Without what is broken: where that is allowed, every picture is opened to find out."""
        if self.instead is not None:
            return None
        rows = self._rows()
        if self.sieve.max_broken:
            rows = [i for i in rows if self.sieve.read(i) is not None]
        return UnreadPrompts([self.sieve.rows[i] for i in rows])


# ---- opening ---------------------------------------------------------------------------------------------------------


def listed(rows: Sequence[Unread], kept: Sequence[Unread], choices: Choices, where: str, look: bool = True) -> Listed:
    """`kept`: held-out prompts that are known as such. `look`: whether each picture's file is there."""
    train, held = list(range(len(rows))), list(range(len(rows), len(rows) + len(kept)))
    if choices.held_out_share:
        train, held = _split(rows, choices, where)
    sieve = Sieve((*rows, *kept), choices.max_broken)
    if look or choices.verify:
        sieve.look(choices.verify)
    sized = _sized(sieve, choices.sizes, where)
    sieve.settle()
    sieve = replace(sieve, rows=tuple(sized))
    order = choices.sizes or (sized[0].prompt.size,)
    buckets, kept_ones = (_buckets(sized, chosen, order) for chosen in (train, held))
    return Listed(sieve, buckets, kept_ones, choices.per_step, choices.group, where)


def _split(rows: Sequence[Unread], choices: Choices, where: str) -> tuple[list[int], list[int]]:
    """Which rows are trained on, and which are held out: by a hash, so that neither order nor other rows matter.

    The held-out ones are in the order of their hashes, and the first few of them are a fair choice too.
    """
    hashes = [seed_of("held out", choices.held_out_salt, *row.meaning()) for row in rows]
    limit = choices.held_out_share * 2**63
    train = [i for i, one in enumerate(hashes) if one >= limit]
    held = sorted((i for i, one in enumerate(hashes) if one < limit), key=lambda i: hashes[i])
    if not train or not held:
        what = f"held_out_share: {choices.held_out_share} holds {len(held)} of {len(rows)} prompts out"
        hint = "Change the share, or give held-out prompts of their own." if len(rows) > 1 else "One cannot be shared."
        raise DataError(what, where=where, hint=hint)
    return train, held


def _sized(sieve: Sieve, sizes: Sequence[Size] | None, where: str) -> list[Unread]:
    """The rows with the size that their pictures are to have."""
    if sizes is None:
        said = list(dict.fromkeys(row.prompt.size for row in sieve.rows))
        if len(said) > 1:
            each = [list(one) if one else "none" for one in said[:4]]
            hint = "Say `sizes: [[height, width], ...]`: each prompt then gets the nearest of these."
            raise DataError(f"prompts of several sizes: {', '.join(map(str, each))}", where=where, hint=hint)
        return list(sieve.rows)
    found = []
    for i, row in enumerate(sieve.rows):
        wanted = row.prompt.size or sieve.size(i)
        chance = 0 if wanted else seed_of("size", *row.meaning()) % len(sizes)
        size = _nearest_size(wanted, sizes) if wanted else sizes[chance]
        found.append(replace(row, prompt=replace(row.prompt, size=size)))
    return found


def _nearest_size(wanted: Size, sizes: Sequence[Size]) -> Size:
    """Of the nearest shape; of those of one shape, the nearest in area."""

    def distance(size: Size) -> tuple[float, float]:
        shape = math.log(size[0] / size[1]) - math.log(wanted[0] / wanted[1])
        return round(abs(shape), 9), abs(math.log(size[0] * size[1]) - math.log(wanted[0] * wanted[1]))

    return min(sizes, key=distance)


def _buckets(
    rows: Sequence[Unread], chosen: Sequence[int], order: Sequence[Size | None]
) -> dict[Size | None, tuple[int, ...]]:
    """The chosen rows by size, in the order of the sizes; a size that none has is left out."""
    found = {size: tuple(i for i in chosen if rows[i].prompt.size == size) for size in order}
    return {size: members for size, members in found.items() if members}
