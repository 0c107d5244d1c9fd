"""Scores that were given before, in one SQLite file that several processes may share.

What a score depends on is its key: the reward with its version and options, the prompt and whatever else the reward
reads, and the pixels of every picture, sizes included. Only numbers are kept, never the lack of one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkit.types import Samples

Score = tuple[float, dict[str, float]]  # the value, and its components

# Of a reward that does not say what it reads.
EVERYTHING = ("prompt", "metadata", "target_text", "source", "references", "text", "episode")
_SLICE = 500  # keys in one query: SQLite bounds how many


def keys(reward: Any, samples: Samples, fingerprint: str = "") -> list[str]:
    """One key a sample: SHA-256 of all that its score depends on. fingerprint: what was found when it was loaded."""
    kind = type(reward)
    fields = dataclasses.fields(reward) if dataclasses.is_dataclass(reward) else ()
    options = {one.name: _told(getattr(reward, one.name)) for one in fields if one.compare}
    common = [f"{kind.__module__}.{kind.__qualname__}", getattr(reward, "version", "1"), fingerprint, options]
    reads = (*getattr(reward, "reads", EVERYTHING), *getattr(reward, "optional", ()))
    return [_key(common, reads, samples, i) for i in range(len(samples))]


def _told(option: Any) -> Any:
    """An option, and of one that names a file also which state of it: a prompt or weights may change in their place."""
    if not isinstance(option, str) or not Path(option).is_file():
        return option
    state = Path(option).stat()
    return [option, state.st_size, state.st_mtime_ns]


def _key(common: list[Any], reads: Sequence[str], samples: Samples, i: int) -> str:
    prompt = samples.prompts[i]
    texts: dict[str, Any] = {"prompt": prompt.text, "metadata": prompt.metadata, "target_text": prompt.target_text}
    if samples.texts:
        texts["text"] = samples.texts[i]
    if samples.episodes:
        texts["episode"] = repr(samples.episodes[i])
    read = {name: value for name, value in texts.items() if name in reads}
    digest = hashlib.sha256(json.dumps([common, read], sort_keys=True, default=str).encode())
    pictures = [("picture", samples.media[i])] if samples.media.numel() else []  # a token policy draws none
    if "source" in reads and prompt.source is not None:
        pictures.append(("source", prompt.source))
    if "references" in reads:
        pictures += [("reference", one) for one in prompt.references]
    for name, picture in pictures:
        digest.update(f"{name} {tuple(picture.shape)}".encode())
        digest.update(_pixels(picture))
    return digest.hexdigest()


def _pixels(picture: Tensor) -> bytes:
    """As a reward sees them: media are rounded to 1/255 before they are scored."""
    return (picture.detach().cpu() * 255).round().clamp(0, 255).to(torch.uint8).contiguous().numpy().tobytes()


class ScoreCache:
    """An open file of scores. Safe from several threads and processes: a lost race costs a second scoring."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        self.connection = sqlite3.connect(file, timeout=60, check_same_thread=False)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score TEXT NOT NULL)")
        self.connection.commit()

    def get(self, wanted: Sequence[str]) -> dict[str, Score]:
        found: dict[str, Score] = {}
        with self.lock:
            for start in range(0, len(wanted), _SLICE):
                part = wanted[start : start + _SLICE]
                marks = ",".join("?" * len(part))
                rows = self.connection.execute(f"SELECT key, score FROM scores WHERE key IN ({marks})", part)
                found.update((key, _read(score)) for key, score in rows)
        return found

    def put(self, scores: Iterable[tuple[str, Score]]) -> None:
        """Keep those that are numbers."""
        rows = [(key, _written(score)) for key, score in scores if math.isfinite(score[0])]
        with self.lock:
            self.connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)
            self.connection.commit()

    def close(self) -> None:
        self.connection.close()


def _written(score: Score) -> str:
    value, parts = score
    known: Mapping[str, float | None] = {k: v if math.isfinite(v) else None for k, v in parts.items()}
    return json.dumps([value, known])


def _read(text: str) -> Score:
    value, parts = json.loads(text)
    return value, {name: math.nan if part is None else part for name, part in parts.items()}
