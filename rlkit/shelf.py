"""Conditions on disk: encoded prompts that runs and processes share, so that a large text encoder reads each text once.

One safetensors file a prompt, named by the SHA-256 of all that it depends on: the backbone with its options, the state
of the folders that these name, the versions of the libraries that encode, and the prompt's own key. A file is written
under another name and renamed, so that it is there whole or not at all; two processes that write the same one write the
same bytes. What cannot be read is encoded again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rlkit.types import Condition

log = logging.getLogger(__name__)
LIBRARIES = ("rlkit-visual", "torch", "transformers", "diffusers")


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
