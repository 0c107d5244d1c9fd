"""Pictures that belong to prompts, left where they lie until they are wanted: files, or bytes in a table."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlkit.errors import DataError
from rlkit.types import Prompt

log = logging.getLogger(__name__)
T = TypeVar("T")

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # of the files that a folder of pictures is made of
NAMED = 20  # broken pictures that a message names
FEW = 100  # prompts; a share of fewer says little


@dataclass(frozen=True)
class Picture:
    """A picture of a line, read when it is wanted: only where to find it stays in memory."""

    key: str  # as messages call it: chosen, rejected, source, references[0]
    where: str  # file and line, for messages
    row: int
    table: Any = field(repr=False)  # rows[row][column]: a path from `folder`, or {"bytes": ..., "path": ...}
    folder: Path = field(repr=False)
    column: str = field(default="", repr=False)  # of the table, where it is not the key
    item: int | None = field(default=None, repr=False)  # which of a column that holds lists

    def source(self) -> Path | bytes:
        """The file that holds the picture, or its bytes. DataError if there is neither."""
        stored = self._stored()
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

    def name(self) -> str:
        """What the data calls the picture, wherever its folder lies; of bytes without a path, their digest."""
        stored = self._stored()
        if isinstance(stored, Mapping) and not stored.get("path"):
            return hashlib.sha256(bytes(stored.get("bytes") or b"")).hexdigest()
        return str(stored["path"] if isinstance(stored, Mapping) else stored)

    def read(self) -> np.ndarray[Any, Any]:
        """The pixels [H, W, 3] uint8, turned as the camera says."""
        from PIL import ImageOps

        with self._opened() as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))

    def size(self) -> tuple[int, int]:
        """Height and width, as `read` gives them, from the head of the file alone."""
        from PIL import Image

        with self._opened() as image:
            head = Image.Image.getexif(image)  # a PNG's own reads all of it, for what may stand behind the pixels
            turned = head.get(0x0112, 1) >= 5  # the orientations that lie on their side
            return (image.width, image.height) if turned else (image.height, image.width)

    def _stored(self) -> Any:
        stored = self.table[self.row][self.column or self.key]
        return stored if self.item is None else stored[self.item]

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        from PIL import Image

        source = self.source()
        name = source if isinstance(source, Path) else "in this row"
        try:
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
                yield image
        # What PIL raises at a file that is cut off, no picture, or so large that it may be an attack.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read the {self.key} picture {name}: {error}", where=self.where) from error


def pixels(picture: Picture) -> Tensor:
    """[3, H, W] in 0..1."""
    return torch.from_numpy(picture.read()).movedim(-1, 0).float() / 255


@dataclass(frozen=True)
class Unread:
    """A prompt whose pictures have not been read."""

    prompt: Prompt  # all but its pictures
    source: Picture | None = None
    references: tuple[Picture, ...] = ()

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return (*([] if self.source is None else [self.source]), *self.references)

    def meaning(self) -> tuple[object, ...]:
        """What a network is told by it, but for the size: equal wherever it stands in whichever file."""
        source = None if self.source is None else self.source.name()
        return (self.prompt.text, source, tuple(one.name() for one in self.references))

    def find(self) -> None:
        """DataError if the file of a picture is not there."""
        for one in self.pictures:
            one.source()

    def read(self) -> Prompt:
        if not self.pictures:
            return self.prompt
        source = None if self.source is None else pixels(self.source)
        return replace(self.prompt, source=source, references=tuple(pixels(one) for one in self.references))


class UnreadPrompts(Sequence[Prompt]):
    """Prompts whose pictures are read each time that one is asked for."""

    def __init__(self, rows: Sequence[Unread]) -> None:
        self.rows = tuple(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return UnreadPrompts(self.rows[index]) if isinstance(index, slice) else self.rows[index].read()

    def __iter__(self) -> Iterator[Prompt]:
        return (row.read() for row in self.rows)


@dataclass(frozen=True)
class Sieve:
    """Rows that are read when they are wanted, and a count of those whose pictures cannot be."""

    rows: tuple[Unread, ...]
    max_broken: float  # the run stops above this share of those seen
    seen: set[int] = field(default_factory=set)
    broken: dict[int, DataError] = field(default_factory=dict)

    def read(self, i: int) -> Prompt | None:
        """None: its pictures are broken."""
        known = len(self.broken)
        prompt = self._tried(i, self.rows[i].read)
        if len(self.broken) > known:
            log.warning("left out: %s", self.broken[i])
            self._judge()
        return prompt

    def look(self, whole: bool) -> None:
        """At all rows: that each picture's file is there, and with `whole`, that it can be read."""
        for i, row in enumerate(self.rows):
            self._tried(i, row.read if whole else row.find)

    def settle(self) -> None:
        """Once all rows have been looked at: stop, or name what is left out."""
        if self.broken:
            self._judge()
            log.warning("left out %s", report(list(self.broken.values()), len(self.seen)))

    def size(self, i: int) -> tuple[int, int] | None:
        """Of the row's source, from the head of its file."""
        source = self.rows[i].source
        return None if source is None else self._tried(i, source.size)

    def _tried(self, i: int, act: Callable[[], T]) -> T | None:
        if i in self.broken:
            return None
        try:
            result = act()
        except DataError as error:
            if self.max_broken == 0:
                raise
            self.broken[i] = error
            self.seen.add(i)
            return None
        if self.rows[i].pictures:
            self.seen.add(i)
        return result

    def _judge(self) -> None:
        total = sum(bool(row.pictures) for row in self.rows)
        pardoned = self.max_broken * max(len(self.seen), min(total, FEW))
        stop_above(pardoned, list(self.broken.values()), len(self.seen), self.max_broken)


def stop_above(pardoned: float, broken: Sequence[DataError], seen: int, max_broken: float) -> None:
    if len(broken) > pardoned:
        hint = f"Mend them, or raise max_broken, now {max_broken}."
        raise DataError(f"too many broken pictures: {report(broken, seen)}", hint=hint)


def report(broken: Sequence[DataError], seen: int) -> str:
    names = "; ".join(str(error) for error in broken[:NAMED])
    end = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    return f"{len(broken)} of {seen} prompts with pictures: {names}{end}"
