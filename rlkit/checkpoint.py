"""Checkpoints: safetensors and json in a folder that appears whole or not at all.

A checkpoint is written under a name that starts with a dot, flushed to the disk, and renamed. `manifest.json` holds the
SHA-256 of every file, so that a torn or altered one is passed over for the one before. No pickle.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rlkit.errors import CheckpointError

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
FILES = ("numbers.json", "tensors.safetensors")  # beside the manifest


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `at` finished training steps (counted over all stages)."""

    at: int
    folder: Path
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def save(
    run: Path,
    at: int,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    keep: int,
    spare: Collection[int] = (),
) -> Path:
    """Write one checkpoint, then drop all but the newest `keep` and those of the steps in `spare`: nothing is touched
    before the new one is whole."""
    from safetensors.torch import save_file

    final = run / FOLDER / f"{at:06d}"
    draft = run / FOLDER / f".{at:06d}-{os.getpid()}"
    try:
        for left in (run / FOLDER).glob(".*-*"):  # of a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        draft.mkdir(parents=True)
        # Clones, since safetensors refuses tensors that share memory.
        copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(copies, draft / "tensors.safetensors")
        (draft / "numbers.json").write_text(json.dumps(dict(numbers), indent=1))
        sums = {name: _sha256(draft / name) for name in FILES}
        (draft / "manifest.json").write_text(json.dumps({"at": at, "sha256": sums}, indent=1))
        for file in draft.iterdir():
            _flush(file)
        _flush(draft)
        aside = draft.with_name(f".{at:06d}-replaced")
        if final.exists():  # damaged, or of the end of the stage before: away in one move, since to delete takes long
            os.rename(final, aside)
        os.rename(draft, final)
        _flush(final.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise _explain(error, run, at) from error
    except Exception as error:  # safetensors wraps an I/O error in its own exception
        shutil.rmtree(draft, ignore_errors=True)
        if "No space left" in str(error) or "os error 28" in str(error):
            raise _explain(OSError(errno.ENOSPC, "No space left on device"), run, at) from error
        raise
    for old in _finished(run)[:-keep]:
        if int(old.name) not in spare:
            shutil.rmtree(old, ignore_errors=True)
    return final


def at(run: Path, step: int) -> Checkpoint:
    """The checkpoint of one step. CheckpointError where it is not as it was written."""
    folder = run / FOLDER / f"{step:06d}"
    fault = _fault(folder)
    if fault is not None:
        hint = "Resume: the newest whole checkpoint is taken, and it goes on from there."
        raise CheckpointError(f"the checkpoint to go back to is damaged ({fault})", where=str(folder), hint=hint)
    return _load(folder)


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are as they were written; None where there is none."""
    for folder in reversed(_finished(run)):
        fault = _fault(folder)
        if fault is None:
            return _load(folder)
        log.warning("checkpoint %s is damaged (%s); trying the one before", folder, fault)
    return None


def set_aside(run: Path, after: int) -> None:
    """Rename the checkpoints of later steps, which are damaged or they would be gone on from: they would count among
    those that are kept, and the ones that are written now would be the old ones."""
    for folder in _finished(run):
        if int(folder.name) > after:
            target = folder.with_name(f"{folder.name}-damaged")
            shutil.rmtree(target, ignore_errors=True)
            os.rename(folder, target)


def _load(folder: Path) -> Checkpoint:
    from safetensors.torch import load_file

    numbers = json.loads((folder / "numbers.json").read_text())
    return Checkpoint(int(folder.name), folder, load_file(folder / "tensors.safetensors"), numbers)


def _finished(run: Path) -> list[Path]:
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    return sorted((f for f in folder.iterdir() if f.is_dir() and f.name.isdigit()), key=lambda f: int(f.name))


def _fault(folder: Path) -> str | None:
    try:
        sums = json.loads((folder / "manifest.json").read_text())["sha256"]
        for name in FILES:
            if _sha256(folder / name) != sums[name]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain(error: OSError, run: Path, at: int) -> CheckpointError:
    earlier = [folder.name for folder in _finished(run)]
    kept = f"Checkpoint {earlier[-1]} is whole." if earlier else "There is no earlier checkpoint."
    return CheckpointError(
        f"could not write checkpoint {at:06d}: {error.strerror or error}",
        where=str(run / FOLDER),
        hint=f"{kept} Make room, then: rlkit train --resume {run}",
    )
