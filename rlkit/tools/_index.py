"""Retrieval by words: BM25 over a folder of texts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlkit import world
from rlkit.errors import DataError

K1, B = 1.5, 0.75  # how soon a word that comes again counts less, and how much a long text is held against it
ENDINGS = (".txt", ".md", ".jsonl")
OF_THE_WORLD = "world"  # what a recipe writes for the folders that are shipped for the embedded world


@dataclass(frozen=True)
class Document:
    title: str
    text: str


class Index:
    """Texts, ranked by BM25 (Robertson and Zaragoza 2009) for the words of a query. A word of a query counts once."""

    def __init__(self, texts: Sequence[str]) -> None:
        counted = [Counter(words(text)) for text in texts]
        lengths = np.array([sum(one.values()) for one in counted], dtype=np.float64)  # [N] words
        mean = lengths.mean() if lengths.any() else 1.0
        self.size = len(texts)
        found: dict[str, list[tuple[int, int]]] = {}  # word -> (text, how often)
        for i, one in enumerate(counted):
            for word, count in one.items():
                found.setdefault(word, []).append((i, count))
        self.weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # word -> the texts with it, what it gives
        for word, rows in found.items():
            which, often = np.array(rows).T
            rare = np.log1p((self.size - len(rows) + 0.5) / (len(rows) + 0.5))
            share = often * (K1 + 1) / (often + K1 * (1 - B + B * lengths[which] / mean))
            self.weights[word] = which, rare * share

    def scores(self, query: str) -> np.ndarray:
        """[N], 0 where no word of the query is in the text."""
        total = np.zeros(self.size)
        for word in dict.fromkeys(words(query)):
            if word in self.weights:
                which, weight = self.weights[word]
                total[which] += weight
        return total

    def best(self, query: str, most: int) -> list[int]:
        """The texts that fit best, of equal ones the first; none that has no word of the query."""
        scores = self.scores(query)
        return [int(i) for i in np.argsort(-scores, kind="stable")[:most] if scores[i] > 0]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def folder_of(folder: str, shipped: str) -> Path:
    """Where to read. shipped: the folder for the embedded world, in its package."""
    path = Path(str(world.__file__)).parent / shipped if folder == OF_THE_WORLD else Path(folder).expanduser()
    if not path.is_dir():
        raise DataError("no such folder", where=str(path), hint=f"Give a folder, or {OF_THE_WORLD!r} for the atlas.")
    return path


def documents(folder: Path) -> tuple[Document, ...]:
    """Of every .txt and .md the whole, called as its file; of a .jsonl one a line. Hidden files are left out."""
    found: list[Document] = []
    for file in files(folder, ENDINGS):
        if file.suffix.lower() == ".jsonl":
            found += [Document(_text(row, "title", where), _text(row, "text", where)) for where, row in rows(file)]
        else:
            found.append(Document(file.stem, text_of(file)))
    if not found:
        hint = f'Put {", ".join(ENDINGS)} there; a line of .jsonl is {{"title": "...", "text": "..."}}.'
        raise DataError("no texts in this folder", where=str(folder), hint=hint)
    return tuple(found)


def files(folder: Path, endings: Sequence[str]) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix.lower() in endings and file.is_file() and not hidden:
            yield file


def rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, the object) of each line of a .jsonl. Blank lines are left out."""
    for number, line in enumerate(text_of(file).split("\n"), start=1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"this line is no JSON: {error}", where=where) from error
        if not isinstance(row, dict):
            raise DataError("this line is no object", where=where, hint='Write {"title": "...", "text": "..."}.')
        yield where, row


def text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8", where=str(file), hint="Write it again as UTF-8.") from error


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{key!r} must be a text in this line, not {value!r}", where=where)
    return value
