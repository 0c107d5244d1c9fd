"""The thread behind a reward server: it owns one reward, gathers what waits for it, and answers every sample.

What arrives within ten milliseconds, or while the reward is busy, is scored in one call of at most `max_batch` samples.
A reward that compares the members of a group is asked one request at a time, whole. An exception is for the log; the
answer names the request under which it is found there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any

import torch

from rlkit import registry
from rlkit.types import Samples, Unscored
from rlkit.wire import Result

log = logging.getLogger(__name__)

GATHERING = 0.01  # seconds that the first of a batch waits for others
PATIENCE = 10.0  # seconds that a reward which hangs may hold up the end


@dataclass(frozen=True)
class Card:
    """What `/v1/rewards` says of the reward."""

    name: str
    version: str
    reads: Sequence[str]
    range: Sequence[float | None]
    higher_is_better: bool
    components: Sequence[str]
    groupwise: bool
    config: str  # of version and options: other numbers, another config
    max_batch: int


@dataclass(eq=False)
class Job:
    """A request that waits for its scores."""

    samples: Samples
    id: str
    answer: Future[list[Result]] = field(default_factory=Future)


class Worker:
    """The reward and the thread that owns it. `with` loads it, and at the end answers what it still has."""

    def __init__(self, name: str, options: Mapping[str, Any], device: str | None = None, max_batch: int = 64) -> None:
        self.name, self.options, self.device, self.max_batch = name, options, device, max_batch
        self.jobs: queue.Queue[Job | None] = queue.Queue()  # None: no more will come
        self.ready: Future[Card] = Future()
        self.thread = threading.Thread(target=self._work, name="rlkit-reward", daemon=True)
        self.scorer: Any = None

    def __enter__(self) -> Worker:
        self.thread.start()
        self.ready.result()
        return self

    def __exit__(self, *_: object) -> None:
        self.jobs.put(None)
        self.thread.join(PATIENCE)

    @property
    def card(self) -> Card:
        return self.ready.result()

    def put(self, samples: Samples, id: str) -> Future[list[Result]]:
        """Their answers, when it is their turn."""
        job = Job(samples, id)
        self.jobs.put(job)
        return job.answer

    def _work(self) -> None:
        try:
            self.ready.set_result(self._load())
        except BaseException as error:  # the thread that waits for it raises it
            self.ready.set_exception(error)
            return
        held: Job | None = None
        while (job := held or self.jobs.get()) is not None:
            batch, held = self.gather(job)
            batch = [one for one in batch if one.answer.set_running_or_notify_cancel()]  # some wait no longer
            try:
                self.score(batch)
            except Exception as error:  # an answer that cannot be made costs its requests, and not the server
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
        if callable(close := getattr(self.scorer, "close", None)):
            close()

    def _load(self) -> Card:
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        reward = registry.build("rewards", self.name, self.options, "serve-reward")
        with registry.importing("rewards", self.name, "serve-reward"):
            loader = getattr(reward, "load", None)
            self.scorer = loader(torch.device(device)) if loader else reward
        settings = asdict(reward) if is_dataclass(reward) and not isinstance(reward, type) else repr(self.options)
        version = str(getattr(reward, "version", "1"))
        key = json.dumps([self.name, version, settings], sort_keys=True, default=str)
        return Card(
            name=self.name,
            version=version,
            reads=list(getattr(reward, "reads", ())),
            range=list(getattr(self.scorer, "range", None) or getattr(reward, "range", None) or (None, None)),
            higher_is_better=bool(getattr(reward, "higher_is_better", True)),
            components=list(getattr(self.scorer, "components", getattr(reward, "components", ()))),
            groupwise=bool(getattr(reward, "groupwise", True)),  # one that does not say may compare
            config=hashlib.sha256(key.encode()).hexdigest()[:16],
            max_batch=self.max_batch,
        )

    def gather(self, first: Job) -> tuple[list[Job], Job | None]:
        """The jobs to score together, and one that came and does not fit them."""
        batch, count = [first], len(first.samples)
        until = time.monotonic() + GATHERING
        while not self.card.groupwise and count < self.max_batch:
            try:
                job = self.jobs.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                self.jobs.put(None)  # for the loop, which ends then
                break
            fits = count + len(job.samples) <= self.max_batch
            if not fits or job.samples.media.shape[1:] != first.samples.media.shape[1:]:
                return batch, job
            batch, count = [*batch, job], count + len(job.samples)
        return batch, None

    def score(self, batch: Sequence[Job]) -> None:
        """Answer every job of a batch."""
        if not batch:
            return
        samples, groupwise = _merged([job.samples for job in batch]), self.card.groupwise
        rows = torch.arange(len(samples))
        ids = " ".join(job.id for job in batch)
        results: list[Result] = []
        for part in [rows] if groupwise else rows.split(self.max_batch):
            results += asked(self.scorer, samples.select(part), groupwise, ids)
        for job in batch:
            own, results = results[: len(job.samples)], results[len(job.samples) :]
            known = job.samples.sample_id.tolist()
            job.answer.set_result([replace(one, id=id) for one, id in zip(own, known, strict=True)])


def _merged(several: Sequence[Samples]) -> Samples:
    """The samples of several requests. Groups of different requests stay different."""
    if len(several) == 1:
        return several[0]
    groups, start = [], 0
    for samples in several:
        own = samples.group.unique(return_inverse=True)[1]
        groups.append(own + start)
        start += len(samples)
    rows = torch.arange(start)
    return replace(
        several[0],
        media=torch.cat([samples.media for samples in several]),
        latents=torch.zeros(start, 0),
        prompts=tuple(prompt for samples in several for prompt in samples.prompts),
        group=torch.cat(groups),
        index=rows,
        sample_id=rows,
        total=start,
    )


def asked(scorer: Any, samples: Samples, groupwise: bool, ids: str) -> list[Result]:
    """The reward's answers. If it raises it is asked in parts, so that one bad sample costs itself or its group."""
    try:
        with torch.no_grad():
            return _results(scorer(samples), samples)
    except (Exception, SystemExit):  # a reward is somebody's code: what it raises is for the log
        log.exception("the reward failed on %d samples of request %s", len(samples), ids)
    rows = torch.arange(len(samples))
    parts = [rows[samples.group == one] for one in samples.group.unique()] if groupwise else rows.split(1)
    found: dict[int, Result] = {}
    for part in parts:
        own = samples.select(part)
        results = asked(scorer, own, groupwise, ids) if len(parts) > 1 else _failed(own, ids)
        found.update(zip(part.tolist(), results, strict=True))
    return [found[row] for row in rows.tolist()]


def _failed(samples: Samples, ids: str) -> list[Result]:
    reason = f"the reward raised an exception; the server's log has it under {ids}"
    return [Result(id, None, status="failed", reason=reason) for id in samples.sample_id.tolist()]


def _results(said: Any, samples: Samples) -> list[Result]:
    values, parts = said if isinstance(said, tuple) else (said, {})
    columns = {name: _listed(part, len(samples)) for name, part in parts.items()}
    results = []
    for i, (id, value) in enumerate(zip(samples.sample_id.tolist(), _listed(values, len(samples)), strict=True)):
        numbers = {name: one if isinstance(one := column[i], float) else None for name, column in columns.items()}
        if isinstance(value, float):
            results.append(Result(id, value, numbers))
        else:
            results.append(Result(id, None, numbers, "failed", value or "it gave no reason"))
    return results


def _listed(values: Any, n: int) -> list[float | str]:
    """Each sample's number, or why it has none."""
    listed = values.detach().flatten().tolist() if isinstance(values, torch.Tensor) else list(values)
    if len(listed) != n:
        raise ValueError(f"the reward returned {len(listed)} numbers for {n} samples")
    numbers: list[float | str] = []
    for value in listed:
        if isinstance(value, Unscored):
            numbers.append(value.reason)
        elif value is None or not math.isfinite(value):
            numbers.append("the reward returned NaN, infinity or None")
        else:
            numbers.append(float(value))
    return numbers
