"""Pictures whose texts fit a query: BM25 over a folder, read when the tool starts, or whatever stands behind a URL.

A folder has a text for each picture: in metadata.jsonl, {"file_name": "a.png", "text": "a red flag"} a line, as
Hugging Face's imagefolder has it, or in NAME.txt beside NAME.png. Pictures are PNG or JPEG, and are read when they are
found. The endpoint is asked with POST {"query": "...", "top_k": 2} and a bearer token, and answers
{"results": [{"title": "...", "image": base64 of a PNG or JPEG}, ...]}, best first.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from torch import Tensor

from rlkit import pictures
from rlkit.agents.tooling import MOST_PICTURES, Observation
from rlkit.endpoints import Pool
from rlkit.errors import DataError
from rlkit.tools import _endpoint, _index

ENDINGS = (".png", ".jpg", ".jpeg")
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Listed:
    """A picture of a folder, and the text by which it is found."""

    file: Path
    text: str


@dataclass(frozen=True)
class ImageSearch:
    """Pictures that fit a query, from a local folder or an endpoint."""

    folder: str | None  # of PNG and JPEG with metadata.jsonl or NAME.txt beside NAME.png; null: there is a url
    top_k: int = 2  # pictures at most
    side: int = 512  # the longer side at most: larger pictures are made smaller
    url: str | None = None  # asked in the place of a folder
    key_env: str | None = None  # the environment variable with the url's bearer token
    seconds: float = 8.0  # for a query at the url, all tries together; keep it below the rollout's limit for a call

    def __post_init__(self) -> None:
        _endpoint.check(self.folder, self.url, self.key_env, self.seconds)
        if not 1 <= self.top_k <= MOST_PICTURES:
            raise ValueError(f"top_k must be 1 to {MOST_PICTURES}, not {self.top_k}")
        if self.side < 1:
            raise ValueError(f"side must be 1 or more, not {self.side}")
        if self.folder == _index.OF_THE_WORLD:
            raise ValueError("the atlas has no pictures: give a folder that has some")

    def start(self) -> None:
        """Read the folder's texts, or find the token: what is wrong with them is known before the first query."""
        _ = self._index if self.url is None else self._pool

    def close(self) -> None:
        pool = self.__dict__.pop("_pool", None)
        if pool is not None:
            pool.close()

    def __call__(self, query: Annotated[str, "a few words of what the picture shows"]) -> Observation:
        """Search pictures. The answer shows those that fit best, with the names to use in reference_images."""
        if self.url is not None:
            results = _endpoint.ask(self._pool, self.url, query, self.top_k)
            found = [(one["title"], decoded(_endpoint.text(one, "image", self.url))) for one in results]
        else:
            listed, index = self._index
            best = [listed[i] for i in index.best(query, self.top_k)]
            found = [(one.text, pictures.read(one.file.read_bytes())) for one in best]
        if not found:
            return Observation("No picture fits this query.")
        shown = tuple((title, smaller(picture, self.side)) for title, picture in found)
        return Observation(f"{len(shown)} picture{'s' if len(shown) > 1 else ''} found.", shown)

    @cached_property
    def _index(self) -> tuple[tuple[Listed, ...], _index.Index]:
        listed = with_texts(_index.folder_of(str(self.folder), ""))
        return listed, _index.Index([one.text for one in listed])

    @cached_property
    def _pool(self) -> Pool:
        return _endpoint.endpoint(str(self.url), self.key_env, self.seconds).open()


def with_texts(folder: Path) -> tuple[Listed, ...]:
    """The pictures of a folder. DataError where one is lacking, or has no text."""
    metadata = folder / METADATA
    if metadata.is_file():
        found = [_of_row(folder, where, row) for where, row in _index.rows(metadata)]
    else:
        found = [Listed(file, _beside(file)) for file in _index.files(folder, ENDINGS)]
    if not found:
        raise DataError("no pictures in this folder", where=str(folder), hint=f"Known: {', '.join(ENDINGS)}.")
    return tuple(found)


def smaller(picture: Tensor, side: int) -> Tensor:
    """[3, H, W] whose longer side is at most `side`."""
    from PIL import Image

    height, width = picture.shape[1:]
    longer = max(height, width)
    if longer <= side:
        return picture
    size = (max(1, round(width * side / longer)), max(1, round(height * side / longer)))
    return pictures.from_pil(pictures.to_pil(picture).resize(size, Image.Resampling.LANCZOS))


def decoded(text: str) -> Tensor:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise DataError("the picture of a result is no base64") from error
    return pictures.read(data)


def _of_row(folder: Path, where: str, row: dict[str, object]) -> Listed:
    name, text = row.get("file_name"), row.get("text")
    if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
        hint = 'Write {"file_name": "a.png", "text": "a red flag"}.'
        raise DataError("this line has no 'file_name' or no 'text'", where=where, hint=hint)
    file = folder / name
    if file.suffix.lower() not in ENDINGS or not file.is_file():
        raise DataError(f"there is no picture {file}", where=where, hint=f"Known: {', '.join(ENDINGS)}.")
    return Listed(file, text)


def _beside(picture: Path) -> str:
    beside = picture.with_suffix(".txt")
    text = _index.text_of(beside).strip() if beside.is_file() else ""
    if not text:
        hint = f"Write it into {beside.name} beside it, or all into {METADATA}."
        raise DataError("this picture has no text", where=str(picture), hint=hint)
    return text
