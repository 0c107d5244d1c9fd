"""How new weights get to a worker, in five ways, and the proof that they arrived.

A push stamps the worker as being updated, stops it between two tokens, sends, stamps the version, lets it go on, and
compares what it then says with what the learner's own network says. Whatever fails on the way leaves a stamp that is no
version: by it any learner, also one that is started later, knows that the weights are half old and half new.

file   one safetensors file in a folder that learner and workers share; survives workers that come and go
gloo   packed buckets straight into the worker, one process group a worker
nccl   vLLM's own broadcast between GPUs; the learner needs vLLM too. It has not been run here.
lora   an adapter in a shared folder, under a name of its own for each version: what is under way keeps its own
none   the worker holds the weights already, as one that was just started on the learner's folder does
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rlkit.types import Span
from rlkit.workers import transfer
from rlkit.workers.worker import FRESH, Fault, Request, Worker, WorkerError

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Canary:
    """A request whose answer the learner can compute: log-probs of what was sampled, at the same temperature.

    A temperature other than 1 also shows that the worker tells the log-probs of what it sampled from.
    """

    request: Request
    log_probs: Callable[[tuple[int, ...]], Sequence[float]]  # of the tokens of an answer to this request
    tolerance: float = 1e-4  # the largest difference of one log-prob; bf16 differs by 5e-2

    def check(self, worker: Worker, version: int, seconds: float) -> float:
        """The largest difference. WorkerError if it is too large."""
        (told,) = worker.answer([self.request], seconds)
        if isinstance(told, Fault):
            raise WorkerError(f"no answer after the update: {told.reason}", where=worker.name)
        apart: list[float] = []
        for answer in told:
            if answer.spans != (Span(version, 0, len(answer.ids)),):
                raise WorkerError(f"says {answer.spans} after the update to version {version}", where=worker.name)
            ours = self.log_probs(answer.ids)
            apart += [abs(a - b) for a, b in zip(answer.log_probs, ours, strict=True)]
        worst = math.nan if any(math.isnan(one) for one in apart) else max(apart)
        if not worst <= self.tolerance:
            hint = "Is it the same network in the same precision, and does the worker tell processed_logprobs?"
            what = f"log-probs differ by {worst:.2g} from the learner's after the update; {self.tolerance:g} is allowed"
            raise WorkerError(what, where=worker.name, hint=hint)
        return worst


@dataclass(frozen=True)
class File:
    """A file in a folder that learner and workers share, such as /dev/shm on one machine."""

    folder: Path
    canary: Canary | None = None
    seconds: float = 600.0  # the longest wait for one worker

    def prepare(self, weights: Weights, version: int) -> Path:
        return transfer.write_weights(self.folder, weights, version)

    def __call__(self, worker: Worker, prepared: Path, version: int) -> None:
        def send() -> None:
            worker.start()
            worker.update({"path": str(prepared)}, self.seconds)
            worker.finish(version)

        _updated(worker, version, send, self.canary, self.seconds)

    def forget(self, version: int) -> None:
        """Remove the files of other versions."""
        transfer.forget(self.folder, [self.folder / f"weights-{version}.safetensors"])


@dataclass(frozen=True)
class Gloo:
    """Packed buckets over a process group of the learner and one worker."""

    host: str = "127.0.0.1"  # the learner's address, as workers reach it
    canary: Canary | None = None
    seconds: float = 120.0  # the longest wait for a worker
    _lines: dict[str, transfer.Line] = field(default_factory=dict, repr=False, compare=False)

    def prepare(self, weights: Weights, version: int) -> Weights:
        return weights

    def __call__(self, worker: Worker, prepared: Weights, version: int) -> None:
        if worker.label() == FRESH:  # started meanwhile: its end of the line is gone
            self._lines.pop(worker.name, None)

        def send() -> None:
            line = self._lines.get(worker.name) or self._connect(worker)
            info = transfer.described(transfer.pieces(prepared))
            worker.start()
            _both(lambda: worker.update(info, self.seconds), lambda: line.send(prepared), self.seconds)
            worker.finish(version)
            self._lines[worker.name] = line

        try:
            _updated(worker, version, send, self.canary, self.seconds)
        except BaseException:
            self._lines.pop(worker.name, None)
            raise

    def _connect(self, worker: Worker) -> transfer.Line:
        world = 1 + worker.processes()
        store = transfer.listen(self.host, world, self.seconds)
        info = {"host": self.host, "port": store.port, "world_size": world, "seconds": self.seconds}
        _, line = _both(
            lambda: worker.connect(info, self.seconds),
            lambda: transfer.Line(store, 0, world, self.seconds),
            self.seconds,
        )
        return line


@dataclass(frozen=True)
class Nccl:
    """vLLM's own engine and sender. Both sides need a GPU; on a machine without one, vLLM says so."""

    host: str  # the learner's address, as workers reach it
    canary: Canary | None = None
    seconds: float = 600.0
    _lines: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict, repr=False, compare=False)

    def prepare(self, weights: Weights, version: int) -> Weights:
        return weights

    def __call__(self, worker: Worker, prepared: Weights, version: int) -> None:
        if worker.label() == FRESH:
            self._lines.pop(worker.name, None)

        def send() -> None:
            if worker.name not in self._lines:
                self._lines[worker.name] = self._connect(worker, prepared)
            sender, shared = self._lines[worker.name]
            shared.update(weights=prepared, version=version)
            sender.send_weights()

        try:
            _updated(worker, version, send, self.canary, self.seconds)
        except BaseException:
            self._lines.pop(worker.name, None)
            raise

    def _connect(self, worker: Worker, weights: Weights) -> tuple[Any, dict[str, Any]]:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        shared: dict[str, Any] = {"weights": weights}

        class Source(WeightSource):
            def metadata(self) -> list[Any]:
                return [ParamMeta(one.name, one.dtype, one.shape) for one in transfer.pieces(shared["weights"])]

            def __iter__(self) -> Any:
                return iter(shared["weights"].items())

        info = NCCLTrainerInitInfo(self.host, transfer.free_port(self.host), 1 + worker.processes(), rank=0)
        verbs = _Verbs(worker, self.seconds, shared)
        return WeightTransferTrainerFactory.trainer_init(info, client=verbs, source=Source()), shared


@dataclass(frozen=True)
class _Verbs:
    """A worker as vLLM's sender wants to call it."""

    worker: Worker
    seconds: float
    shared: Mapping[str, Any]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.worker.connect(init_info, self.seconds)

    def start_weight_update(self) -> None:
        self.worker.start()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.worker.update(update_info, self.seconds)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.worker.finish(self.shared["version"])


@dataclass(frozen=True)
class Lora:
    """An adapter of each version in a shared folder. The network below it is never touched, so nothing is half done."""

    folder: Path
    config: Mapping[str, Any]  # PEFT's adapter_config.json
    canary: Canary | None = None
    seconds: float = 600.0

    def prepare(self, weights: Weights, version: int) -> Path:
        return transfer.write_adapter(self.folder, weights, version, self.config)

    def __call__(self, worker: Worker, prepared: Path, version: int) -> None:
        worker.load_adapter(version, str(prepared))
        worker.stamp(str(version))
        if self.canary is not None:
            self.canary.check(worker, version, self.seconds)

    def forget(self, version: int) -> None:
        """Remove older adapters, but for the one before: it may still be read."""
        numbers = (one.name.removeprefix("adapter-") for one in self.folder.glob("adapter-*"))
        kept = sorted(int(one) for one in numbers if one.isdecimal() and int(one) <= version)[-2:]
        transfer.forget(self.folder, [self.folder / f"adapter-{one}" for one in kept])


@dataclass(frozen=True)
class Nothing:
    """Only the version is told."""

    canary: Canary | None = None
    seconds: float = 600.0

    def prepare(self, weights: Weights, version: int) -> Weights:
        return weights

    def __call__(self, worker: Worker, prepared: Weights, version: int) -> None:
        worker.stamp(str(version))
        if self.canary is not None:
            self.canary.check(worker, version, self.seconds)


def _updated(worker: Worker, version: int, send: Callable[[], None], canary: Canary | None, seconds: float) -> None:
    """Send while the worker stands still; `send` ends with the new stamp. Afterwards the proof."""
    worker.pause()
    try:
        worker.stamp(f"updating-{version}")
        send()
        worker.resume()
        if canary is not None:
            canary.check(worker, version, seconds)
    except BaseException:
        for undo in (worker.abandon, lambda: worker.stamp(f"broken-{version}")):
            with suppress(WorkerError):  # it may be gone altogether; then there is nothing to end
                undo()
        raise


def _both(theirs: Callable[[], Any], ours: Callable[[], Any], seconds: float) -> tuple[Any, Any]:
    """Two sides of one exchange at the same time. The first error of either ends it.

    The other side's thread is then left to its own timeout: nothing can call it back from inside the exchange.
    """
    sides = [_started(theirs), _started(ours)]
    done, late = wait(sides, seconds + 30.0, FIRST_EXCEPTION)  # both have timeouts of their own, which say more
    for one in sides:
        if one in done:
            one.result()
    if late:
        raise WorkerError(f"the exchange did not end within {seconds:g} s", where="push")
    return sides[0].result(), sides[1].result()


def _started(side: Callable[[], Any]) -> Future[Any]:
    """In a thread that does not keep the process alive."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(side())
        except BaseException as error:  # told to whoever waits
            future.set_exception(error)

    threading.Thread(target=run, name="rlkit-exchange", daemon=True).start()
    return future


__all__ = ["Canary", "File", "Gloo", "Lora", "Nccl", "Nothing", "Weights"]
