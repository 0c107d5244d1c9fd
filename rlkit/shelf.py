"""Conditions: encoded prompts in memory, and on a shelf on disk that runs and processes share.

A large text encoder then reads each text once. On the shelf there is one safetensors file a prompt, named by the
SHA-256 of all that it depends on: the backbone with its options, the state of the folders that these name, the versions
of the libraries that encode, and the prompt's own key. A file is written under another name and renamed, so that it is
there whole or not at all; two processes that write the same one write the same bytes. What cannot be read is encoded
again.

Conversations are passing: what stands in them is drawn anew at every step. They stay in memory until they are let go
of, all at once, and never get onto the shelf.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

from rlkit.errors import DataError
from rlkit.types import Condition, Prompt

log = logging.getLogger(__name__)
LIBRARIES = ("rlkit-visual", "torch", "transformers", "diffusers")


class Encodes(Protocol):
    """What of a model conditions need: a flow model's, or a token model's."""

    @property
    def encode(self) -> Callable[[Sequence[Prompt]], list[Condition]]: ...

    @property
    def collate(self) -> Callable[[Sequence[Condition]], Condition]: ...


class Conditions:
    """Encoded prompts by their key, encoded once. With a `negative` text each has a twin that says this instead.

    model_at: what encodes prompts of a size. near: entered while something is encoded. limit: how many stay in memory,
    those that were used last; the others come back from the shelf.
    """

    def __init__(
        self,
        model_at: Callable[[tuple[int, int] | None], Encodes],
        negative: str | None = None,
        shelf: Shelf | None = None,
        near: Callable[[], AbstractContextManager[None]] = nullcontext,
        limit: int | None = None,
    ) -> None:
        self._model_at, self._near = model_at, near
        self.negative = negative
        self._shelf = shelf
        self._limit = limit
        self._known: dict[str, Condition] = {}  # the one used last is the last one
        self._passing: dict[str, Condition] = {}  # conversations; no limit takes them, for nothing brings them back
        self._encoded: set[str] = set()  # also what is on the shelf alone
        self._twins: dict[str, str] = {}

    def encode(self, prompts: Iterable[Prompt]) -> None:
        new: dict[str, Prompt] = {}
        for prompt in prompts:
            twin = self._twins.get(prompt.key, "")
            if prompt.key in self._encoded and (self.negative is None or twin in self._encoded):
                continue
            told = [prompt]
            if self.negative is not None:
                told.append(replace(prompt, text=self.negative))  # the same pictures: only the words are untold
                self._twins[prompt.key] = told[1].key
            new |= {one.key: one for one in told if not self._has(one)}
        if new:
            with self._near():
                for key, prompt in new.items():  # one by one: beside others its last bits would depend on them
                    (condition,) = self._model_at(prompt.size).encode([prompt])
                    if _passes(prompt):
                        self._passing[key] = condition
                        self._encoded.add(key)
                        continue
                    if self._shelf:
                        self._shelf.put(key, condition)
                    self._remember(key, condition)

    def forget(self, prompts: Iterable[Prompt]) -> None:
        """Let go of those that came with pictures, where new ones are drawn without an end, and of conversations."""
        for prompt in prompts:
            if prompt.source is not None or prompt.references or _passes(prompt):
                for key in (prompt.key, self._twins.pop(prompt.key, "")):
                    self._known.pop(key, None)
                    self._passing.pop(key, None)
                    self._encoded.discard(key)

    def forget_conversations(self) -> None:
        """Let go of every prompt with turns or a `system` of its own, once nothing learns from it any more."""
        self._encoded -= self._passing.keys()
        for key in self._passing:
            self._twins.pop(key, None)
        self._passing.clear()

    def untold(self, keys: Sequence[str]) -> list[str]:
        """The keys of their twins."""
        return [self._twins[key] for key in keys]

    def batch(self, keys: Sequence[str], model: Encodes | None = None, weights: str = "current") -> Condition:
        """{"name": [B, ...]} for B keys, each encoded before, as a model of their size collates them.

        weights: the set that asks. Here all are told the same.
        """
        return (model or self._model_at(None)).collate([self.of(key) for key in keys])

    def of(self, key: str) -> Condition:
        """The condition of a prompt that was encoded before: the very same object each time, while it is in memory."""
        if key in self._passing:
            return self._passing[key]
        if key not in self._known:
            if key not in self._encoded:
                raise KeyError(key)
            if not self._read(key):
                what = f"the encoded prompt {key.splitlines()[0]!r} has vanished from the folder of conditions"
                hint = "Keep the folder while a run uses it, or leave out policy.conditions_in_memory."
                raise DataError(what, where="policy.conditions", hint=hint)
        condition = self._known[key]
        self._remember(key, condition)
        return condition

    def _has(self, prompt: Prompt) -> bool:
        """Whether it need not be encoded."""
        return prompt.key in self._encoded or (not _passes(prompt) and self._read(prompt.key))

    def _read(self, key: str) -> bool:
        """Whether the shelf has it; it is then in memory."""
        condition = self._shelf.get(key) if self._shelf else None
        if condition is not None:
            self._remember(key, condition)
        return condition is not None

    def _remember(self, key: str, condition: Condition) -> None:
        self._known.pop(key, None)
        self._known[key] = condition
        self._encoded.add(key)
        while self._limit is not None and len(self._known) > self._limit:
            del self._known[next(iter(self._known))]


def _passes(prompt: Prompt) -> bool:
    return bool(prompt.turns or prompt.system)


class Shelf:
    """The files of one backbone in one data type."""

    def __init__(self, folder: Path, backbone: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.device = folder, device
        versions = {name: _version(name) for name in LIBRARIES}
        options = {name: _told(value) for name, value in backbone.items()}
        self._common = json.dumps([options, versions, str(dtype)], sort_keys=True, default=str)

    def get(self, key: str) -> Condition | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._file(key)
        if not file.is_file():
            return None
        try:
            return load_file(file, device=str(self.device))
        except (SafetensorError, OSError) as error:
            log.warning("the condition %s cannot be read and is encoded again: %s", file, error)
            return None

    def put(self, key: str, condition: Condition) -> None:
        from safetensors.torch import save_file

        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}-{os.getpid()}-{uuid.uuid4().hex}")
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in condition.items()}, draft)
        os.replace(draft, file)

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(f"{self._common}\n{key}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _told(option: Any) -> Any:
    """An option, and of one that names a folder also which state of it: weights may be saved in the place of others."""
    if not isinstance(option, str) or not Path(option).is_dir():
        return option
    files = sorted(one for one in Path(option).rglob("*") if one.is_file())
    return [option, [[str(one.relative_to(option)), one.stat().st_size, one.stat().st_mtime_ns] for one in files]]
