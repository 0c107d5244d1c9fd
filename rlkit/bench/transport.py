"""The transports of weights, measured: the stream of a push to another process, against the same bytes in one piece.

The other process is a child on this machine. Both go over the same transport, in turns: the stream, and one gloo
broadcast; the weights' file, and one plain file written and read. All end in memory that the child had before, and the
first of each is checked for what arrived. `share` is the median of plain / stream over the turns: 1 is no overhead.
"""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkit.errors import RlkitError
from rlkit.workers import transfer

MEMORY = Path("/dev/shm")  # a folder in memory, where there is one
HERE = "127.0.0.1"
PATIENCE = 120.0  # the longest wait for the child, in seconds
WIDEST = 2048  # columns of an invented matrix


@dataclass(frozen=True)
class Transport:
    """One transport."""

    transport: str
    bytes: int
    times: int
    seconds: float  # of a push's stream, median
    plain_seconds: float  # of the same bytes in one piece
    share: float


def transports(size: int, times: int, threads: int = 1) -> list[Transport]:
    """So many bytes of weights to a child process, by each transport, after one turn that warms up and is checked."""
    with _folder(size) as folder:
        weights = invented(size)
        whole = torch.cat([one.reshape(-1) for one in weights.values()]).view(torch.uint8)
        with started(weights, threads) as child:
            return [
                _measured("gloo", times, child, weights, whole, child.stream, child.broadcast),
                _measured("file", times, child, weights, whole, *child.files(folder)),
            ]


def _measured(
    name: str,
    times: int,
    child: Child,
    weights: Mapping[str, Tensor],
    whole: Tensor,
    stream: Callable[[Mapping[str, Tensor]], float],
    plain: Callable[[Tensor], float],
) -> Transport:
    for way in (lambda: stream(weights), lambda: plain(whole)):
        way()
        if child.check() != checksum([whole]):
            raise RlkitError("other bytes arrived than were sent", where=f"transport {name}")
    turns = [(stream(weights), plain(whole)) for _ in range(times)]
    seconds, bare = (statistics.median(side) for side in zip(*turns, strict=True))
    share = statistics.median(one / other for other, one in turns)
    return Transport(name, whole.nbytes, times, seconds, bare, share)


@contextmanager
def _folder(size: int) -> Iterator[Path]:
    """A folder in memory with room for one file."""
    with tempfile.TemporaryDirectory(prefix="rlkit-bench-", dir=MEMORY if MEMORY.is_dir() else None) as name:
        free = shutil.disk_usage(name).free
        if free < 1.1 * size:
            what = f"{size / 1e9:g} GB do not fit into {Path(name).parent}, where {free / 1e9:.3g} GB are free"
            raise RlkitError(what, where="--gigabytes", hint="Ask for less.")
        yield Path(name)


def invented(size: int) -> dict[str, Tensor]:
    """Weights of a transformer in bf16, `size` bytes (one less if that is odd): blocks of matrices and vectors, about
    as wide as a network of this size is. The last tensor is what is left to fill. The values are any bytes at all."""
    width = WIDEST
    while width > 64 and 8 * 24 * width * width > size:  # 24 width^2 bytes a block; eight blocks or more
        width //= 2
    block = {"norm": (width,), "query": (width, width), "key": (width, width), "value": (width, width)}
    block |= {"output": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
    draws, left = torch.Generator().manual_seed(0), size // 2
    weights: dict[str, Tensor] = {}
    while left:
        for name, shape in block.items():
            count = min(math.prod(shape), left)
            values = torch.randint(-(1 << 15), 1 << 15, (count,), generator=draws, dtype=torch.int16)
            whole = shape if count == math.prod(shape) else (count,)
            weights[f"layers.{len(weights) // len(block)}.{name}"] = values.view(torch.bfloat16).view(whole)
            left -= count
            if not left:
                break
    return weights


def checksum(tensors: list[Tensor]) -> int:
    """Of the bytes of all of them, one after the other: any cut into tensors has the same."""
    found = 0
    for one in tensors:
        found = zlib.crc32(one.contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return found


# ---- the sending side ------------------------------------------------------------------------------------------------


class Child:
    """The other process. Each way of sending returns its seconds, until the child says that all is there."""

    def __init__(self, pipe: Any, line: transfer.Line, plain: Any) -> None:
        self._pipe, self._line, self._plain = pipe, line, plain

    def stream(self, weights: Mapping[str, Tensor]) -> float:
        return self._timed("stream", lambda: self._line.send(weights))

    def broadcast(self, whole: Tensor) -> float:
        return self._timed("broadcast", lambda: _broadcast(self._plain, whole))

    def files(self, folder: Path) -> tuple[Callable[[Mapping[str, Tensor]], float], Callable[[Tensor], float]]:
        """The weights' file, and a plain one. What was read is removed again, out of the measured time."""

        def plain(whole: Tensor) -> Path:
            (folder / "plain").write_bytes(whole.numpy().data)
            return folder / "plain"

        return (
            lambda weights: self._written("weights_file", lambda: transfer.write_weights(folder, weights, 1)),
            lambda whole: self._written("plain_file", lambda: plain(whole)),
        )

    def check(self) -> int:
        """The checksum of what the last way brought; the child's memory is blank afterwards."""
        self._tell("check")
        return int(self._answer())

    def _timed(self, verb: str, action: Callable[[], None]) -> float:
        begun = time.perf_counter()
        self._tell(verb)
        action()
        self._answer()
        return time.perf_counter() - begun

    def _written(self, verb: str, write: Callable[[], Path]) -> float:
        begun = time.perf_counter()
        path = write()
        self._tell(verb, str(path))
        self._answer()
        seconds = time.perf_counter() - begun
        path.unlink()
        return seconds

    def _tell(self, verb: str, path: str = "") -> None:
        with _while_it_lives():
            self._pipe.send((verb, path))

    def _answer(self) -> Any:
        with _while_it_lives():
            if self._pipe.poll(PATIENCE):
                return self._pipe.recv()
        raise RlkitError(f"the receiving process said nothing for {PATIENCE:g} s", where="bench sync")


@contextmanager
def _while_it_lives() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise RlkitError("the receiving process ended; what it said stands above", where="bench sync") from error


@contextmanager
def started(weights: Mapping[str, Tensor], threads: int) -> Iterator[Child]:
    """A child that has memory for these weights. It ends with the block."""
    store = transfer.listen(HERE, 2, PATIENCE)
    spawn = get_context("spawn")  # a fork would copy locks that other threads hold
    pipe, theirs = spawn.Pipe()
    description = transfer.described(transfer.pieces(weights))
    process = spawn.Process(target=_receive, args=(theirs, store.port, description, threads), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Child(pipe, transfer.Line(store, 0, 2, PATIENCE), _plain_group(store, 0))
    finally:
        pipe.close()  # by which it knows
        process.join(10)
        process.kill()
        process.join()


# ---- the receiving side ----------------------------------------------------------------------------------------------


def _receive(pipe: Any, port: int, description: Mapping[str, Any], threads: int) -> None:
    """The child: it has memory for the weights and for the same bytes in one piece, and does as it is told."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    torch.set_num_threads(threads)
    stream = transfer.read_description(**description)
    weights = {one.name: torch.zeros(one.shape, dtype=one.dtype) for one in stream}
    whole = torch.zeros(sum(one.bytes for one in stream), dtype=torch.uint8)
    store = TCPStore(HERE, port, 2, False, timedelta(seconds=PATIENCE), wait_for_workers=False)
    line, plain = transfer.Line(store, 1, 2, PATIENCE), _plain_group(store, 1)
    filled: list[Tensor] = []  # by the last way
    while True:
        try:
            verb, path = pipe.recv()
        except EOFError:  # nobody wants more
            return
        said = 0
        if verb == "check":
            said = checksum(filled)
            for one in filled:
                one.zero_()
        elif verb in ("broadcast", "plain_file"):
            _fill(whole, plain, path)
            filled = [whole]
        else:
            for name, one in transfer.read_weights(Path(path)) if path else line.receive(stream):
                weights[name].copy_(one)
            filled = list(weights.values())
        pipe.send(said)


def _fill(whole: Tensor, plain: Any, path: str) -> None:
    if not path:
        return _broadcast(plain, whole)
    with Path(path).open("rb") as file:
        file.readinto(whole.numpy().data)


def _plain_group(store: Any, rank: int) -> Any:
    """A gloo group of parent and child without rlkit's stream on it."""
    from torch.distributed import PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]

    return ProcessGroupGloo(PrefixStore("plain", store), rank, 2, timedelta(seconds=PATIENCE))


def _broadcast(group: Any, row: Tensor) -> None:
    from torch.distributed import BroadcastOptions

    options = BroadcastOptions()
    options.rootRank = 0
    group.broadcast([row], options).wait()
