"""Samples, weights and plans between the processes of one machine: tensors as safetensors, the rest as JSON.

A message is one safetensors buffer whose metadata holds the header; on a line it stands behind its length, eight bytes.
Nothing is pickled. Prompts do not travel back: who asked has them, and a sample's group says which is its own.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlkit.types import Path, Plan, Prompt, Samples
from rlkit.wire import WireError
from rlkit.workers.transfer import separate

PATH = ("states", "means", "log_prob", "sigmas", "noise_levels", "steps")  # the tensors of a path
COLUMNS = ("media", "latents", "group", "index", "sample_id", "sigmas", "preference", "preview_of")
LENGTH = 8  # bytes that say how long a message is
PIECE = 1 << 20  # bytes read at a time


# ---- messages --------------------------------------------------------------------------------------------------------


def pack(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """One message. The header is JSON: its tuples come back as lists."""
    from safetensors.torch import save

    return save(separate(tensors), {"header": json.dumps(dict(header))})


def unpack(message: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors) of a message; WireError if it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return read_header(message), load(message)
    except SafetensorError as error:
        raise WireError(f"{len(message)} bytes that are no message ({error})") from error


def read_header(message: bytes) -> dict[str, Any]:
    """The header alone; WireError if there is none."""
    try:
        end = LENGTH + int.from_bytes(message[:LENGTH], "little")
        header = json.loads(json.loads(message[LENGTH:end])["__metadata__"]["header"])
    except (ValueError, KeyError, TypeError) as error:
        what = f"{len(message)} bytes that are no message ({type(error).__name__}: {error})"
        raise WireError(what) from error
    if not isinstance(header, dict):
        raise WireError(f"a message's header is a mapping, not {type(header).__name__}")
    return header


# ---- samples ---------------------------------------------------------------------------------------------------------


def pack_samples(samples: Samples, **more: Any) -> bytes:
    """A flow policy's samples, with their path and previews; `more` goes into the header, beside `samples`."""
    if samples.tokens is not None or samples.texts:
        raise WireError("samples of a policy that writes do not travel this way: their tokens would be lost")
    tensors = _tensors(samples, "")
    header: dict[str, Any] = {"version": samples.version, "total": samples.total}
    if samples.path is not None:
        header["sigma_max"] = samples.path.sigma_max
    if samples.previews is not None:
        tensors |= _tensors(samples.previews, "previews/")
    return pack({"samples": header} | more, tensors)


def read_samples(header: Mapping[str, Any], tensors: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> Samples:
    """The samples of an unpacked message. prompts: all of the step's, one a group."""
    told = header["samples"]
    samples = _samples(told, tensors, "", prompts)
    path = {name: tensors[f"path/{name}"] for name in PATH if f"path/{name}" in tensors}
    if path:
        samples = replace(samples, path=Path(**path, sigma_max=told["sigma_max"]))
    if "previews/index" in tensors:
        samples = replace(samples, previews=_samples(told, tensors, "previews/", prompts))
    return samples


def _tensors(samples: Samples, prefix: str) -> dict[str, Tensor]:
    found = {f"{prefix}{name}": getattr(samples, name) for name in COLUMNS if getattr(samples, name) is not None}
    if samples.path is not None:
        found |= {f"{prefix}path/{name}": getattr(samples.path, name) for name in PATH}
    return found


def _samples(told: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str, prompts: Sequence[Prompt]) -> Samples:
    columns: dict[str, Any] = {name: tensors.get(f"{prefix}{name}") for name in COLUMNS}
    lacking = [name for name in ("media", "latents", "group", "index", "sample_id") if columns[name] is None]
    if lacking:
        raise WireError(f"samples without {', '.join(lacking)}")
    groups = columns["group"].tolist()
    if groups and not 0 <= min(groups) <= max(groups) < len(prompts):
        raise WireError(f"samples of the groups {min(groups)} to {max(groups)}; the step has {len(prompts)} prompts")
    return Samples(prompts=tuple(prompts[i] for i in groups), version=told["version"], total=told["total"], **columns)


def joined(parts: Sequence[Samples]) -> Samples:
    """Parts of a step, in ascending order, as one. All have the same schedule, and a path and previews or none."""
    if len(parts) == 1:
        return parts[0]
    path, previews, preview_of = None, None, None
    paths = [one.path for one in parts if one.path is not None]
    if paths:
        columns = ("states", "means", "log_prob")
        path = replace(paths[0], **_together(paths, columns))
    completed = [(one.previews, one.preview_of) for one in parts]
    if completed[0][0] is not None:
        before, moved = 0, []
        for kept, places in completed:
            assert kept is not None
            assert places is not None
            moved.append(torch.where(places < 0, places, places + before))
            before += len(kept)
        previews = _stacked([one for one, _ in completed if one is not None])
        preview_of = torch.cat(moved)
    return replace(_stacked(parts), path=path, previews=previews, preview_of=preview_of)


def _stacked(parts: Sequence[Samples]) -> Samples:
    columns = ("media", "latents", "group", "index", "sample_id")
    return replace(
        parts[0],
        prompts=tuple(prompt for one in parts for prompt in one.prompts),
        **_together(parts, columns),
    )


def _together(parts: Sequence[Any], columns: Sequence[str]) -> dict[str, Any]:
    return {name: torch.cat([getattr(one, name) for one in parts]) for name in columns}


# ---- plans -----------------------------------------------------------------------------------------------------------


def plain_plan(plan: Plan) -> dict[str, Any]:
    """A plan as JSON holds it."""
    return asdict(plan)


def read_plan(told: Mapping[str, Any]) -> Plan:
    """The plan that `plain_plan` wrote. WireError for a key that plans do not have."""
    unknown = sorted(told.keys() - {one.name for one in fields(Plan)})
    if unknown:
        raise WireError(f"a plan with {', '.join(map(repr, unknown))}: both ends must be of the same rlkit")
    values: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in told.items()}
    return Plan(**values)


# ---- the line --------------------------------------------------------------------------------------------------------


def send(line: socket.socket, message: bytes, seconds: float | None = None) -> None:
    """TimeoutError if the other end does not take it in this time, another OSError if there is none any more."""
    line.settimeout(seconds)
    line.sendall(len(message).to_bytes(LENGTH, "little"))
    line.sendall(message)


def receive(line: socket.socket, seconds: float | None = None) -> bytes:
    """The next message, whole. TimeoutError after this time, ConnectionError if the other end has closed."""
    until = None if seconds is None else time.monotonic() + seconds
    length = int.from_bytes(_exactly(line, LENGTH, until), "little")
    return bytes(_exactly(line, length, until))


def _exactly(line: socket.socket, count: int, until: float | None) -> bytearray:
    got = bytearray()
    while len(got) < count:
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError(f"{len(got)} of {count} bytes came in time")
        line.settimeout(left)
        piece = line.recv(min(PIECE, count - len(got)))
        if not piece:
            raise ConnectionError(f"the line was closed after {len(got)} of {count} bytes")
        got += piece
    return got


__all__ = [
    "WireError",
    "joined",
    "pack",
    "pack_samples",
    "plain_plan",
    "read_header",
    "read_plan",
    "read_samples",
    "receive",
    "send",
    "unpack",
]
