"""Sampling in other processes of this machine, each with a policy of its own: the sampler of `local`, several times.

Workers are fed with the learner's trainable weights when these have changed, and with encoded prompts: whatever reads
prompts works once, in the learner. Noise is keyed by sample, so that the numbers do not depend on who draws; only a
batch's size shows in the last bits. With `workers: n` the batches are those of `local` with `batch` at a share's size.

Ray is left out: it would be one actor class around `_sampling_process.work`'s three messages, in the place of `Child`.
"""

from __future__ import annotations

import functools
import logging
import math
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkit import dist
from rlkit.data.prompts import PromptBatch
from rlkit.errors import RecipeError
from rlkit.policy import Policy
from rlkit.types import Context, Plan, Samples
from rlkit.weights import Tensors
from rlkit.workers.sample_wire import joined, pack, plain_plan, read_header, read_samples, receive, send, unpack
from rlkit.workers.worker import WorkerError

log = logging.getLogger(__name__)

STARTING = 1800.0  # seconds for a worker to load its backbone
ENDING = 5.0  # seconds for a worker to end by itself
SAID = 2000  # characters of a dead worker's last words in an error


@dataclass(frozen=True)
class Processes:
    """Samples in worker processes on this machine, on one or several devices, in step with the policy that is trained.

    A worker that dies or hangs is started again and draws its share again: the numbers are those of a run without the
    fault.
    """

    kind = "flow"
    gives = ("path", "log_prob", "previews")

    workers: int = 1  # of each learner process
    threads: int = 1  # of torch, in each worker
    device: str | tuple[str, ...] | None = None  # of the workers; several: in turns; None: the learner's
    steps: int = 10  # denoising steps
    batch: int | None = None  # pictures in one forward pass of a worker; None: its share of the step
    timeout: float = 600.0  # seconds for a worker's share of a step, after which it is killed
    restarts: int = 1  # of each worker in a stage

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("threads", 1), ("steps", 1), ("batch", 1), ("restarts", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, not {value}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be seconds above 0, not {self.timeout}")
        if self.device is not None and not self.devices(""):
            raise ValueError("device must name one device or more, or be null")
        for one in self.devices("cpu"):
            try:
                torch.device(one)
            except RuntimeError as error:
                what = f"device must be like cpu, cuda or cuda:1, not {one!r}"
                raise ValueError(what) from error

    def devices(self, own: str) -> tuple[str, ...]:
        """Those that workers take in turns."""
        return (own,) if self.device is None else (self.device,) if isinstance(self.device, str) else self.device

    def start(self, policy: Policy, processes: dist.Processes) -> ProcessesRollout:
        if policy.origin is None:
            what = "its workers load the backbone themselves, and nothing says which backbone this policy is of."
            raise RecipeError(what, where="rollout", hint="Load the policy from a recipe, or use the rollout `local`.")
        return ProcessesRollout(self, policy, processes)


class ProcessesRollout:
    """A started `Processes`. The first step starts the workers."""

    def __init__(self, options: Processes, policy: Policy, processes: dist.Processes) -> None:
        self.options, self.policy, self.processes = options, policy, processes
        self.version = 0
        self.sent = 0  # how many different weights there were so far: the number of the last
        self._last: Any = None  # which they were
        self._folder = tempfile.TemporaryDirectory(prefix="rlkit-processes-")
        devices = options.devices(str(processes.device))
        self.children = [
            Child(
                f"worker {processes.rank * options.workers + i}",
                functools.partial(self._described, devices[i % len(devices)]),
                Path(self._folder.name) / f"worker-{i}.txt",
                options.timeout,
                options.restarts,
            )
            for i in range(options.workers)
        ]

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """The learner has new weights. They are brought with the next request."""
        self.version = version

    def health(self) -> str:
        again = sum(child.faults for child in self.children)
        return "ok" if not again else f"ok, with workers started again: {again}"

    def close(self) -> None:
        """End every worker."""
        for child in self.children:
            child.hang_up()
        for child in self.children:
            child.end(ENDING)
        self._folder.cleanup()

    @torch.no_grad()
    def collect(self, prompts: PromptBatch, plan: Plan, context: Context) -> Samples:
        """This process's share of the step's samples."""
        policy, processes, workers = self.policy, self.processes, len(self.children)
        policy.models[plan.policy_set]  # which says it if there is no such set
        mine = processes.share(len(prompts))
        # Shares of shares are shares: worker w of process r is place r * workers + w among all workers.
        ranks = [processes.rank * workers + w for w in range(workers)]
        everywhere = processes.count * workers
        shares = [replace(processes, rank=rank, count=everywhere).share(len(prompts)) for rank in ranks]
        # A process without samples has one worker draw the shapes of the columns.
        asked = [w for w in range(workers) if shares[w]] or [0]
        policy.conditions.encode(prompts.prompts[i // prompts.group] for i in (mine or range(1)))
        weights = self._weights(plan.policy_set)
        if any(self.children[w].holds != self.sent for w in asked):
            weights()  # packed once, before several threads ask for it

        def ask(w: int) -> tuple[Samples, int]:
            request = self._request(prompts, plan, context, shares[w] or range(1), (ranks[w], everywhere))
            header, tensors = unpack(self.children[w].answer(request, weights, self.sent))
            return read_samples(header, tensors, prompts.prompts), header["calls"]

        parts = []
        with ThreadPoolExecutor(len(asked), "rlkit-processes") as threads:
            for part, calls in threads.map(ask, asked):
                parts.append(part)
                policy.calls += calls
                if context.sampled and len(part) < len(mine):
                    context.sampled(replace(part, path=None, sigmas=None, previews=None, preview_of=None))
        return joined(parts)

    def _request(
        self, prompts: PromptBatch, plan: Plan, context: Context, share: range, place: tuple[int, int]
    ) -> bytes:
        """What a worker is asked: all prompts by their size, those of its share with what the learner encoded."""
        conditions, guided = self.policy.conditions, self.policy.guidance != 1
        drawn = {i // prompts.group for i in share}
        numbers: dict[str, int] = {}
        told: list[tuple[tuple[int, int] | None, int | None, int | None]] = []
        for i, prompt in enumerate(prompts.prompts):
            if i not in drawn:
                told.append((prompt.size, None, None))
                continue
            number = numbers.setdefault(prompt.key, len(numbers))
            twin = numbers.setdefault(conditions.untold([prompt.key])[0], len(numbers)) if guided else None
            told.append((prompt.size, number, twin))
        tensors = {f"{n}/{name}": value for key, n in numbers.items() for name, value in conditions.of(key).items()}
        moment = {key: getattr(context, key) for key in ("seed", "stage", "step", "sampling_steps")}
        header = {"do": "collect", "version": self.version, "weights": self.sent, "prompts": told}
        header |= {"group": prompts.group, "rank": place[0], "count": place[1], "context": moment}
        return pack(header | {"plan": plain_plan(replace(plan, policy_set="current"))}, tensors)

    def _weights(self, name: str) -> Callable[[], bytes]:
        """What gives the message with this set. A set that is not the one that was sent last has a new number."""
        tensors: Tensors = self.policy.trainable if name == "current" else self.policy.sets[name]
        first = next(iter(tensors.values()))
        written = sum(one._version for one in tensors.values())
        now = (name, written, self.policy.moment() if name == "current" else 0)
        # A copy that was made anew is known by its first tensor, which must not be the address of one that is gone.
        if self._last is None or self._last[0] != now or self._last[1]() is not first:
            self.sent, self._last = self.sent + 1, (now, weakref.ref(first))
        number = self.sent
        return functools.cache(lambda: pack({"do": "weights", "number": number}, tensors))

    def _described(self, device: str) -> bytes:
        """What a new worker must know to build its policy."""
        policy, options = self.policy, self.options
        header = {
            "do": "start",
            "origin": policy.origin,
            "lora": None if policy.lora is None else asdict(policy.lora),
            "precision": policy.precision,
            "guidance": policy.guidance,
            "resources": asdict(policy.resources),
            "device": device,
            "threads": options.threads,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "sampler": {"steps": options.steps, "batch": options.batch},
        }
        return pack(header, {})


class Child:
    """A worker as the learner sees it. `faults` counts how often it was started again."""

    def __init__(self, name: str, described: Callable[[], bytes], said: Path, timeout: float, restarts: int) -> None:
        self.name, self.described, self.said = name, described, said
        self.timeout, self.restarts = timeout, restarts
        self.faults = 0
        self.holds = 0  # the number of the weights that it has
        self.process: subprocess.Popen[bytes] | None = None
        self.line: socket.socket | None = None

    def answer(self, request: bytes, weights: Callable[[], bytes], number: int) -> bytes:
        """Its answer under the weights of this number, from a new process if this one fails while it may."""
        while True:
            try:
                if self.process is None:
                    self.start()
                if self.holds != number:
                    self.ask(weights(), self.timeout)
                    self.holds = number
                return self.ask(request, self.timeout)
            except OSError as error:
                reason = self.ended(error)
                if self.faults >= self.restarts:
                    hint = "Look at its last words, lower rollout.batch, or raise rollout.timeout or rollout.restarts."
                    what = f"{self.name} {reason}, after {self.faults} new starts. It said last:\n{self.last_words()}\n"
                    raise WorkerError(what, where="rollout", hint=hint) from error
                self.faults += 1
                log.warning("%s %s: it is started again, and draws its share again", self.name, reason)

    def start(self) -> None:
        """A new process with the backbone's own weights."""
        self.spawn()
        try:
            self.ask(self.described(), STARTING)
        except WorkerError:  # it could not load: nothing of it is of use
            self.end(0)
            raise

    def spawn(self) -> None:
        self.line, other = socket.socketpair()
        module = f"{__package__}._sampling_process"
        with other, self.said.open("wb") as said:
            # In a session of its own, so that Ctrl+C is for the learner, which then ends its step.
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(other.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=[other.fileno()],
                start_new_session=True,
            )

    def ask(self, message: bytes, seconds: float) -> bytes:
        """OSError if it is gone or late; WorkerError for what it says is wrong, which no new start would mend."""
        assert self.line is not None
        send(self.line, message, seconds)
        answer = receive(self.line, seconds)
        error = read_header(answer).get("error")
        if error:
            raise WorkerError(f"{self.name}: {error}.", where="rollout", hint=f"It said last:\n{self.last_words()}")
        return answer

    def hang_up(self) -> None:
        """By this a worker ends."""
        if self.line is not None:
            self.line.close()
        self.line = None

    def end(self, seconds: float) -> int | None:
        """Its exit code, after having killed it if it does not end in this time."""
        process, self.process, self.holds = self.process, None, 0
        self.hang_up()
        if process is None:
            return None
        with suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
        process.kill()
        return process.wait()

    def ended(self, error: OSError) -> str:
        """End what is left of it; how it failed, in words."""
        late = isinstance(error, TimeoutError)
        if late and self.process is not None:
            self.process.kill()
        code = self.end(ENDING)
        if late:
            return f"gave no answer in {self.timeout:g} s and was killed"
        if code is not None and code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with code {code}" if code is not None else f"could not be started ({error})"

    def last_words(self) -> str:
        text = self.said.read_text(errors="replace") if self.said.is_file() else ""
        return text.strip()[-SAID:] or "nothing"
