"""Several workers as one: requests spread over them, tried again where a worker is at fault, weights pushed to all.

What goes wrong on a worker's side is tried again, from the beginning, on another one; what is wrong with the request
itself is not. Every request ends as answers or as a `Failure`: failures are data, and nobody scores them.

Of a worker whose weights were changed half-way nothing is known: it is not asked again before it has been restarted and
given whole weights. The pool sees that by its label, which a push sets before it begins, and a restart takes away.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal

from rlkit.workers.worker import FRESH, Answer, Failure, Fault, Push, Request, Worker, WorkerError

log = logging.getLogger(__name__)

FAILURES = 3  # calls in a row that a worker may fail before it is left out until the next look


@dataclass(frozen=True)
class Patience:
    """How long is waited, and how often is tried."""

    tries: int = 4  # of one request
    pause: float = 0.5  # seconds before the second try; doubles with each
    longest_pause: float = 10.0
    request: float = 600.0  # seconds for one try
    deadline: float = 3600.0  # seconds for all requests of one call together
    least: int = 1  # workers that must be left after a push

    def __post_init__(self) -> None:
        if self.tries < 1 or self.least < 1:
            raise ValueError("tries and least must be 1 or more")
        if self.pause < 0 or self.longest_pause < 0:
            raise ValueError("pauses must be seconds, 0 or above")
        if not all(0 < seconds < math.inf for seconds in (self.request, self.deadline)):
            raise ValueError("request and deadline must be seconds above 0")


State = Literal["fresh", "ready", "away", "broken"]
"""fresh: whole weights, but not the pool's version. away: gave no answer. broken: its update failed half-way."""


@dataclass
class _Job:
    index: int
    request: Request
    tries: int = 0
    due: float = 0.0
    last: str = ""  # who failed it


class Pool:
    """Several workers as one. Any thread may ask; a push may come while others ask."""

    def __init__(self, workers: Sequence[Worker], patience: Patience | None = None) -> None:
        names = [one.name for one in workers]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a pool has one or more workers with names of their own, not {names}")
        self.workers = {one.name: one for one in workers}
        self.patience = patience or Patience()
        self.version = -1  # none was pushed yet
        self.states: dict[str, State] = dict.fromkeys(names, "fresh")
        self.reasons: dict[str, str] = {}  # of those that are away or broken
        self.retries = 0  # tries beyond the first, since the pool was made
        self._failures = dict.fromkeys(names, 0)  # in a row
        self._lock = threading.Lock()
        self._change = threading.Lock()  # held by a push: meanwhile labels say nothing
        self._threads = ThreadPoolExecutor(sum(one.at_once for one in workers), "rlkit-worker")

    # ---- weights -----------------------------------------------------------------------------------------------------

    def look(self) -> dict[str, State]:
        """Ask every worker for its label, and take back those that answer again. During a push nothing changes."""
        if self._change.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._change.release()
        return dict(self.states)

    def _look(self) -> None:
        with ThreadPoolExecutor(len(self.workers), "rlkit-look") as threads:
            labels = dict(zip(self.workers, threads.map(_label, self.workers.values()), strict=True))
        with self._lock:
            for name, label in labels.items():
                if isinstance(label, WorkerError):
                    if self.states[name] != "broken":
                        self._set(name, "away", str(label))
                elif label == FRESH or (self.states[name] != "broken" and label.isdecimal()):
                    self._set(name, "ready" if label == str(self.version) else "fresh")
                else:
                    self._set(name, "broken", self.reasons.get(name, f"its update never ended (label {label!r})"))

    def push(self, weights: Any, version: int, by: Push) -> None:
        """Give every worker that can take them these weights, all at the same time. WorkerError if too few did."""
        with self._change:
            self._look()
            able = [name for name, state in self.states.items() if state in ("fresh", "ready")]
            prepared = by.prepare(weights, version)

            def one(name: str) -> str:
                try:
                    by(self.workers[name], prepared, version)
                except Exception as error:  # whatever it was: this worker is out, and the others go on
                    return f"{type(error).__name__}: {error}"
                return ""

            with ThreadPoolExecutor(max(1, len(able)), "rlkit-push") as threads:
                told = dict(zip(able, threads.map(one, able), strict=True))
            with self._lock:
                self.version = version
                for name, reason in told.items():
                    self._set(name, self._after(name, reason, version), reason)
        left = self._ready()
        if len(left) < self.patience.least:
            hint = "Restart them; they get the weights at the next push."
            what = f"version {version} reached {len(left)} of {len(self.workers)} workers: {self.trouble()}"
            raise WorkerError(what, where="push", hint=hint)

    def _after(self, name: str, reason: str, version: int) -> State:
        """What a push left of a worker. One that bears its old label was never touched."""
        if not reason:
            return "ready"
        label = _label(self.workers[name])
        untouched = label == FRESH or (isinstance(label, str) and label.isdecimal() and label != str(version))
        return "away" if untouched else "broken"

    def trouble(self) -> str:
        return "; ".join(f"{name} is {self.states[name]}: {why}" for name, why in self.reasons.items())

    def _set(self, name: str, state: State, reason: str = "") -> None:
        if state in ("away", "broken"):
            log.warning("worker %s is %s: %s", name, state, reason)
            self.reasons[name] = reason
        else:
            self.reasons.pop(name, None)
            self._failures[name] = 0
        self.states[name] = state

    # ---- requests ----------------------------------------------------------------------------------------------------

    def map(self, requests: Sequence[Request]) -> list[tuple[Answer, ...] | Failure]:
        """The answers, in order. No request raises."""
        if any(state != "ready" for state in self.look().values()):
            log.warning("only some workers are asked: %s", self.states)
        results: list[tuple[Answer, ...] | Failure | None] = [None] * len(requests)
        waiting = [_Job(index, one) for index, one in enumerate(requests)]
        flying: dict[Future[list[tuple[Answer, ...] | Fault]], tuple[str, list[_Job]]] = {}
        until = time.monotonic() + self.patience.deadline
        while waiting or flying:
            now = time.monotonic()
            if now >= until:
                break
            waiting = self._send(waiting, flying, now, until)
            if not flying and not self._ready():
                break
            soonest = min((job.due for job in waiting if job.due > now), default=until)
            if not flying:
                time.sleep(max(0.0, min(soonest, until) - now))
                continue
            done, _ = wait(flying, max(0.0, min(soonest, until) - now), FIRST_COMPLETED)
            for future in done:
                name, jobs = flying.pop(future)
                waiting += self._settle(name, jobs, future, results)
        late = f"no answer within the deadline of {self.patience.deadline:g} s"
        none = "no worker is left: " + (self.trouble() or "none was given weights; push first")
        for job in waiting:
            results[job.index] = Failure(none if not self._ready() else late, job.tries, job.last)
        for name, jobs in flying.values():
            for job in jobs:
                results[job.index] = Failure(late, job.tries + 1, name)
        return [one if one is not None else Failure("it was never asked", 0, "") for one in results]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for one in self.workers.values():
            one.close()

    def _ready(self) -> list[str]:
        return [name for name, state in self.states.items() if state == "ready"]

    def _send(self, waiting: list[_Job], flying: dict[Any, tuple[str, list[_Job]]], now: float, until: float) -> Any:
        """Send what is due to those with the least under way; what is left must wait."""
        ready = self._ready()
        load = {name: sum(len(jobs) for one, jobs in flying.values() if one == name) for name in ready}
        calls = {name: sum(one == name for one, _ in flying.values()) for name in ready}
        room = {name: (self.workers[name].at_once - calls[name]) * self.workers[name].batch for name in ready}
        chosen: dict[str, list[_Job]] = {name: [] for name in ready}
        left = []
        for job in waiting:
            free = [name for name in ready if room[name] > 0 and (name != job.last or len(ready) == 1)]
            if job.due > now or not free:
                left.append(job)
                continue
            name = min(free, key=load.__getitem__)
            chosen[name].append(job)
            load[name], room[name] = load[name] + 1, room[name] - 1
        seconds = min(self.patience.request, until - now)
        for name, jobs in chosen.items():
            size = self.workers[name].batch
            for group in (jobs[at : at + size] for at in range(0, len(jobs), size)):
                asked = [job.request for job in group]
                flying[self._threads.submit(self.workers[name].answer, asked, seconds)] = (name, group)
        return left

    def _settle(self, name: str, jobs: list[_Job], future: Future[Any], results: list[Any]) -> list[_Job]:
        """Keep what a call brought; the jobs that are to be tried again."""
        error = future.exception()
        told = future.result() if error is None else [Fault(f"{type(error).__name__}: {error}")] * len(jobs)
        again = []
        for job, outcome in zip(jobs, told, strict=True):
            job.tries, job.last = job.tries + 1, name
            if self.states[name] == "broken":  # from which weights it came, nobody knows
                outcome = Fault(f"its update failed: {self.reasons.get(name, '')}")
            if not isinstance(outcome, Fault):
                results[job.index] = outcome
                self._failures[name] = 0
            elif not outcome.again or job.tries >= self.patience.tries:
                results[job.index] = Failure(outcome.reason, job.tries, name)
            else:
                again.append(job)
                job.due = time.monotonic() + min(
                    self.patience.longest_pause, self.patience.pause * 2 ** (job.tries - 1)
                )
        faults = [one for one in told if isinstance(one, Fault) and one.again]
        with self._lock:
            self.retries += len(again)
            self._failures[name] += bool(faults)
            if self._failures[name] >= FAILURES and self.states[name] == "ready":
                self._set(name, "away", faults[-1].reason)
        return again


def _label(worker: Worker) -> str | WorkerError:
    try:
        return worker.label()
    except WorkerError as error:
        return error


__all__ = ["Patience", "Pool", "State"]
