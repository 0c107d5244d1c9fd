"""How weights travel from the learner to a worker: as a file, or in packed buckets between two processes.

Both ends are here, so that they cut the same stream at the same places: buckets are a function of names, dtypes and
shapes alone. Needs torch and safetensors, nothing else: a learner without vLLM sends, a worker with vLLM receives.

Nobody is asked for a password on these lines: they belong on a private network, or on one machine.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUCKET = 64 << 20  # bytes sent at a time
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # PEFT's names, which vLLM reads


# ---- one stream of tensors -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One tensor of the stream."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Bucket:
    """Tensors that are sent together, each at its offset. An offset is a multiple of 16: a view needs its alignment."""

    pieces: tuple[Piece, ...]
    offsets: tuple[int, ...]
    bytes: int


def pieces(weights: Mapping[str, Tensor]) -> list[Piece]:
    return [Piece(name, one.dtype, tuple(one.shape)) for name, one in weights.items()]


def described(stream: Sequence[Piece]) -> dict[str, list[Any]]:
    """The stream as json: what a receiver must know before the first bucket."""
    return {
        "names": [one.name for one in stream],
        "dtypes": [str(one.dtype).removeprefix("torch.") for one in stream],
        "shapes": [list(one.shape) for one in stream],
    }


def read_description(names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> list[Piece]:
    """The stream that `described` wrote. ValueError if it is none."""
    if not len(names) == len(dtypes) == len(shapes):
        raise ValueError(f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes: they must be as many")
    stream = []
    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"{name}: torch has no dtype {dtype!r}")
        stream.append(Piece(name, kind, tuple(shape)))
    return stream


def buckets(stream: Sequence[Piece], most: int = BUCKET) -> Iterator[Bucket]:
    """The stream in buckets of at most so many bytes; a larger tensor has a bucket of its own."""
    held: list[Piece] = []
    offsets: list[int] = []
    size = 0
    for piece in stream:
        start = -(-size // 16) * 16
        if held and start + piece.bytes > most:
            yield Bucket(tuple(held), tuple(offsets), size)
            held, offsets, start = [], [], 0
        held.append(piece)
        offsets.append(start)
        size = start + piece.bytes
    if held:
        yield Bucket(tuple(held), tuple(offsets), size)


def pack(bucket: Bucket, weights: Mapping[str, Tensor], into: Tensor) -> Tensor:
    """The bucket's tensors as one row of bytes, on the CPU: the beginning of `into`. Between them stands what stood."""
    row = into[: bucket.bytes]
    for piece, start in zip(bucket.pieces, bucket.offsets, strict=True):
        source = weights[piece.name].detach().to("cpu").contiguous()
        row[start : start + piece.bytes] = source.reshape(-1).view(torch.uint8)
    return row


def unpack(bucket: Bucket, row: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a row of bytes, which share its memory."""
    for piece, start in zip(bucket.pieces, bucket.offsets, strict=True):
        yield piece.name, row[start : start + piece.bytes].view(piece.dtype).reshape(piece.shape)


def _room(bucket: Bucket) -> Tensor:
    return torch.zeros(bucket.bytes, dtype=torch.uint8)


# ---- gloo ------------------------------------------------------------------------------------------------------------


class Line:
    """A process group of a learner (rank 0) and the processes of one worker, beside torch's own default group.

    One line a worker: a worker that dies costs its own line, and no wait is longer than `seconds`.
    """

    def __init__(self, store: Any, rank: int, world: int, seconds: float) -> None:
        from torch.distributed import PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]

        self._store = store  # the group needs it as long as it lives
        self._group: Any = ProcessGroupGloo(PrefixStore("rlkit", store), rank, world, timedelta(seconds=seconds))

    def send(self, weights: Mapping[str, Tensor], most: int = BUCKET) -> None:
        """Two rows take turns: while one is sent, the next bucket is packed into the other."""
        todo = list(buckets(pieces(weights), most))
        rows = [torch.empty(max((one.bytes for one in todo), default=0), dtype=torch.uint8) for _ in range(2)]
        with ThreadPoolExecutor(1, "rlkit-pack") as packing:
            packed = [packing.submit(pack, bucket, weights, rows[0]) for bucket in todo[:1]]
            for turn in range(len(todo)):
                row = packed.pop().result()
                if turn + 1 < len(todo):
                    packed.append(packing.submit(pack, todo[turn + 1], weights, rows[(turn + 1) % 2]))
                self._broadcast(row)

    def receive(self, stream: Sequence[Piece], most: int = BUCKET) -> Iterator[tuple[str, Tensor]]:
        """Each bucket has memory of its own, which its tensors share: a network being loaded may hold on to them."""
        todo = list(buckets(stream, most))
        with ThreadPoolExecutor(1, "rlkit-room") as room:  # new memory is slow to touch: that is done beside the wait
            ready = [room.submit(_room, bucket) for bucket in todo[:1]]
            for turn, bucket in enumerate(todo):
                row = ready.pop().result()
                ready += [room.submit(_room, one) for one in todo[turn + 1 : turn + 2]]
                self._broadcast(row)
                yield from unpack(bucket, row)

    def _broadcast(self, row: Tensor) -> None:
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([row], options).wait()


def listen(host: str, world: int, seconds: float) -> Any:
    """The learner's store, at any free port: where the ends of a line find each other. Its `port` is told to the
    worker, then `Line(store, 0, world, seconds)` waits for it."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(host, 0, world, True, timedelta(seconds=seconds), wait_for_workers=False)


def dial(host: str, port: int, rank: int, world: int, seconds: float) -> Line:
    """The worker's end of a line."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(host, port, world, False, timedelta(seconds=seconds), wait_for_workers=False)
    return Line(store, rank, world, seconds)


def free_port(host: str) -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


# ---- files -----------------------------------------------------------------------------------------------------------


def write_weights(folder: Path, weights: Mapping[str, Tensor], version: int) -> Path:
    """All weights as one file, which is there whole or not at all."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    file, unfinished = folder / f"weights-{version}.safetensors", folder / f".weights-{version}.safetensors"
    save_file(separate(weights), unfinished)
    os.replace(unfinished, file)
    return file


def read_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file, one after the other."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            yield name, file.get_tensor(name)


def write_adapter(folder: Path, weights: Mapping[str, Tensor], version: int, config: Mapping[str, Any]) -> Path:
    """A LoRA adapter in a folder of its own, in PEFT's form. weights: named as PEFT saves them."""
    from safetensors.torch import save_file

    place, unfinished = folder / f"adapter-{version}", folder / f".adapter-{version}"
    for one in (unfinished, place):  # of a run before, which ended between two pushes
        shutil.rmtree(one, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / ADAPTER[0]).write_text(json.dumps(dict(config), indent=1))
    save_file(separate(weights), unfinished / ADAPTER[1])
    os.replace(unfinished, place)
    return place


def forget(folder: Path, kept: Iterable[Path]) -> None:
    """Remove what was written for older versions."""
    keep = set(kept)
    for old in [*folder.glob("weights-*.safetensors"), *folder.glob("adapter-*")]:
        if old in keep:
            continue
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def separate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights on the CPU, none sharing memory with another (tied ones do): safetensors takes no other."""
    seen: set[int] = set()
    apart = {}
    for name, one in weights.items():
        tensor = one.detach().to("cpu").contiguous()
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart
