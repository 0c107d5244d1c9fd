"""One reward at work: loaded once, asked in batches, several at a time, within a time limit, and asked again.

Whatever goes wrong with a sample ends as a NaN with a reason, never as a number.
"""

from __future__ import annotations

import math
import pickle
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkit import registry
from rlkit.score_cache import ScoreCache, keys
from rlkit.types import Samples, Unscored

HUNG = 3  # calls in a row without an answer in time, after which the rest of a step is not asked for
LONGEST_PAUSE = 10.0  # seconds before another try
SLACK = 1e-4  # how far beyond its range a number may be, as a share of the range or of 1


@dataclass(frozen=True)
class Asking:
    """How a recipe wants a reward to be asked."""

    batch: int | None = None  # samples a call; None: all of a step's
    workers: int = 1  # calls at a time
    processes: bool = False  # each worker a process of its own: for slow Python, which threads would only share
    timeout: float | None = None  # seconds that a call may take; None: any time
    retries: int = 0  # further tries for a call that failed
    ahead: bool = False  # begin with what is finished while the rest of a step is still being sampled
    cache: str | None = None  # a file of scores, so that none is asked for twice; runs may share it

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("workers", self.workers)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value}")
        if self.retries < 0:
            raise ValueError(f"retries must be 0 or more, not {self.retries}")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, not {self.timeout}")


@dataclass
class Answer:
    """What a reward said of N samples."""

    values: Tensor  # [N] fp32, NaN where not scored
    components: dict[str, Tensor] = field(default_factory=dict)  # name -> [N]
    reasons: Counter[str] = field(default_factory=Counter)  # why samples were not scored, and how many

    def put(self, rows: Tensor, other: Answer) -> None:
        """Take over another answer as that of these rows."""
        self.values[rows] = other.values
        for name, column in other.components.items():
            self.components.setdefault(name, torch.full((len(self.values),), math.nan))[rows] = column
        self.reasons += other.reasons

    @classmethod
    def nothing(cls, n: int, reason: str = "") -> Answer:
        return cls(torch.full((n,), math.nan), {}, Counter({reason: n}) if reason and n else Counter())


class Scorer:
    """A reward of a recipe, ready to be asked. It is loaded when the first samples come."""

    def __init__(self, name: str, reward: Any, asking: Asking, device: torch.device, entry: str = "") -> None:
        """`entry`: its name in the catalogue, where the recipe gives it another."""
        self.name, self.reward, self.asking, self.device = name, reward, asking, device
        self.entry = entry or name
        self.groupwise = bool(getattr(reward, "groupwise", True))  # one that does not say may compare
        self.callers: list[Callable[[Samples], Any]] = []  # one a worker
        self.cache: ScoreCache | None = None
        self.begun: list[tuple[Tensor, Future[Answer]]] = []  # (positions in the step, their answer to come)
        self.background: ThreadPoolExecutor | None = None
        self.sleep: Callable[[float], None] = time.sleep

    def start(self) -> None:
        if self.callers:
            return
        with registry.importing("rewards", self.entry, f"rewards.{self.name}"):
            if self.asking.processes:
                self.callers = [_Process(self.reward, self.asking.timeout) for _ in range(self.asking.workers)]
            else:
                loaded = load(self.reward, self.device)
                limit = self.asking.timeout
                self.callers = [loaded if limit is None else _Limited(loaded, limit)] * self.asking.workers
        self.cache = ScoreCache(Path(self.asking.cache)) if self.asking.cache else None

    @property
    def loaded(self) -> Any:
        """What the reward loaded to, in this process: for gradients."""
        self.start()
        first = self.callers[0]
        return first.scorer if isinstance(first, _Limited) else first

    def close(self) -> None:
        self.forget()
        if self.background:
            self.background.shutdown()
            self.background = None
        for caller in {id(one): one for one in self.callers}.values():
            if callable(shut := getattr(caller, "close", None)):
                shut()
        if self.cache:
            self.cache.close()
        self.callers, self.cache = [], None

    def begin(self, samples: Samples) -> None:
        """Score these in the background, unless the reward has to see all of a step. `__call__` waits for them."""
        if not self.asking.ahead or self.groupwise:
            return
        self.start()
        self.background = self.background or ThreadPoolExecutor(1)  # one part after the other: callers are not shared
        self.begun.append((samples.index, self.background.submit(self._score, samples)))

    def forget(self) -> None:
        """Drop what was begun for samples that never came."""
        for _, answer in self.begun:
            answer.cancel()
        self.begun = []

    def __call__(self, samples: Samples) -> Answer:
        if not self.begun:
            return self._score(samples)
        place = {index: row for row, index in enumerate(samples.index.tolist())}
        begun, self.begun = self.begun, []
        whole, left = Answer.nothing(len(samples)), dict(place)
        for indices, answer in begun:
            rows = torch.tensor([place[index] for index in indices.tolist()], dtype=torch.int64)
            whole.put(rows, answer.result())
            for index in indices.tolist():
                del left[index]
        if left:
            rows = torch.tensor(list(left.values()), dtype=torch.int64)
            whole.put(rows, self._score(samples.select(rows)))
        return whole

    def _score(self, samples: Samples) -> Answer:
        self.start()
        if self.cache is None:
            return self._ask(samples)
        names = keys(self.reward, samples, self._fingerprint())
        known = self.cache.get(names)
        answer = Answer.nothing(len(samples))
        for row, key in enumerate(names):
            if key in known:
                value, numbers = known[key]
                columns = {name: torch.tensor([number]) for name, number in numbers.items()}
                answer.put(torch.tensor([row]), Answer(torch.tensor([value]), columns))
        new = torch.tensor([row for row, key in enumerate(names) if key not in known], dtype=torch.int64)
        if len(new):
            fresh = self._ask(samples.select(new))
            answer.put(new, fresh)
            parts = [{name: float(c[i]) for name, c in fresh.components.items()} for i in range(len(new))]
            scores = list(zip(fresh.values.tolist(), parts, strict=True))
            self.cache.put((names[row], score) for row, score in zip(new.tolist(), scores, strict=True))
        return answer

    def _ask(self, samples: Samples) -> Answer:
        """In calls of `batch` samples, as many at a time as there are workers."""
        calls = self._calls(samples)
        answer = Answer.nothing(len(samples))
        if not calls:
            return answer
        idle: queue.SimpleQueue[Callable[[Samples], Any]] = queue.SimpleQueue()
        for caller in self.callers:
            idle.put(caller)
        breaker = _Breaker()

        def work(rows: Tensor) -> Answer:
            caller = idle.get()
            try:
                return self._answer(caller, samples.select(rows), breaker)
            finally:
                idle.put(caller)

        if len(self.callers) == 1:
            found = [work(rows) for rows in calls]
        else:
            with ThreadPoolExecutor(len(self.callers)) as pool:
                found = list(pool.map(work, calls))
        for rows, part in zip(calls, found, strict=True):
            answer.put(rows, part)
        return answer

    def _calls(self, samples: Samples) -> list[Tensor]:
        """Positions of the samples of each call; a groupwise reward is given whole groups."""
        n = len(samples)
        size = self.asking.batch or n
        if not n:
            return []
        if not self.groupwise:
            return list(torch.arange(n).split(size))
        calls: list[list[int]] = [[]]
        for group in samples.group.unique().tolist():
            rows = torch.nonzero(samples.group == group).flatten().tolist()
            if calls[-1] and len(calls[-1]) + len(rows) > size:
                calls.append([])
            calls[-1] += rows
        return [torch.tensor(rows) for rows in calls]

    def _answer(self, caller: Callable[[Samples], Any], samples: Samples, breaker: _Breaker) -> Answer:
        """Of one call. One that goes on failing is asked in parts, so that a bad sample costs only itself, or, if the
        reward compares, its group."""
        answer, failure = self._tries(caller, samples, breaker)
        if answer is not None:
            return answer
        parts = self._parts(samples)
        if len(parts) < 2 or breaker.open:
            return Answer.nothing(len(samples), failure)
        whole = Answer.nothing(len(samples))
        for rows in parts:
            part, _ = self._tries(caller, samples.select(rows), breaker, again=False)
            whole.put(rows, Answer.nothing(len(rows), failure) if part is None else part)
        return whole

    def _parts(self, samples: Samples) -> list[Tensor]:
        if not self.groupwise:
            return list(torch.arange(len(samples)).split(1))
        return [torch.nonzero(samples.group == group).flatten() for group in samples.group.unique()]

    def _tries(
        self, caller: Callable[[Samples], Any], samples: Samples, breaker: _Breaker, again: bool = True
    ) -> tuple[Answer | None, str]:
        """The answer, or None and why there is none."""
        reason = ""
        for attempt in range(1 + self.asking.retries * again):
            if breaker.open:
                return None, f"not asked: {breaker.reason}"
            if attempt:
                self.sleep(min(LONGEST_PAUSE, 2.0 ** (attempt - 1)) * random.uniform(0.5, 1))  # decides no number
            try:
                answer = self._read(caller(samples), len(samples))
            except TimeoutError as error:
                reason = f"TimeoutError: {error}"
                breaker.failed(reason)
            except Exception as error:  # a reward is somebody's code: whatever it raises is its answer, and is reported
                reason = f"{type(error).__name__}: {error}"
            else:
                breaker.worked()
                return answer, ""
        return None, reason

    def _read(self, said: Any, n: int) -> Answer:
        """fp32 columns on the CPU. None and `Unscored` become NaN, and so does a number beyond the reward's range."""
        values, parts = said if isinstance(said, tuple) else (said, {})
        if not isinstance(parts, Mapping):
            raise TypeError(f"a reward returns numbers, or (numbers, components by name), not {type(parts).__name__}")
        reasons: Counter[str] = Counter()
        column = _column(values, n, reasons)
        low, high = getattr(self.loaded_card, "range", None) or (None, None)
        slack = SLACK * max(1.0, (high - low) if low is not None and high is not None else 1.0)
        outside = torch.zeros(n, dtype=torch.bool)
        if low is not None:
            outside |= column < low - slack
        if high is not None:
            outside |= column > high + slack
        if bool(outside.any()):
            reasons[f"outside its range {_range(low, high)}, for instance {float(column[outside][0]):g}"] += int(
                outside.sum()
            )
            column = torch.where(outside, math.nan, column)
        components = {name: _column(part, n, Counter()) for name, part in parts.items()}
        return Answer(column, components, reasons)

    def _fingerprint(self) -> str:
        return "" if self.asking.processes else str(getattr(self.loaded, "fingerprint", ""))

    @property
    def loaded_card(self) -> Any:
        """Where the range stands: what was loaded may know better than its options, as of a reward elsewhere."""
        loaded = None if self.asking.processes else self.loaded
        return loaded if getattr(loaded, "range", None) else self.reward


def load(reward: Any, device: torch.device) -> Callable[[Samples], Any]:
    """What is called with samples: the reward itself, or what it loads."""
    loader = getattr(reward, "load", None)
    loaded: Callable[[Samples], Any] = loader(device) if loader else reward
    return loaded


def _range(low: float | None, high: float | None) -> str:
    return f"{'' if low is None else f'{low:g}'}..{'' if high is None else f'{high:g}'}"


def _column(values: Any, n: int, reasons: Counter[str]) -> Tensor:
    if not isinstance(values, Tensor):
        numbers = []
        for value in values:
            if isinstance(value, Unscored):
                reasons[value.reason] += 1
            numbers.append(math.nan if value is None or isinstance(value, Unscored) else float(value))
        values = torch.tensor(numbers)
    column: Tensor = values.detach().to("cpu", torch.float32)
    if column.shape != (n,):
        raise ValueError(f"the reward returned shape {tuple(column.shape)} for {n} samples; it must be ({n},)")
    silent = int((~torch.isfinite(column)).sum()) - sum(reasons.values())
    if silent:
        reasons["it returned NaN, infinity or None"] += silent
    return torch.where(torch.isfinite(column), column, math.nan)


@dataclass
class _Breaker:
    """Whether a reward hangs: then a step does not wait for each of its calls."""

    count: int = 0
    reason: str = ""

    @property
    def open(self) -> bool:
        return self.count >= HUNG

    def failed(self, reason: str) -> None:
        self.count, self.reason = self.count + 1, reason

    def worked(self) -> None:
        if not self.open:
            self.count = 0


@dataclass
class _Limited:
    """A call in a thread, waited for so long and no longer. What hangs is left behind: a thread cannot be ended."""

    scorer: Callable[[Samples], Any]
    seconds: float

    def __call__(self, samples: Samples) -> Any:
        box: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                box.put((self.scorer(samples), None))
            except BaseException as error:
                box.put((None, error))

        threading.Thread(target=work, daemon=True).start()
        try:
            answer, error = box.get(timeout=self.seconds)
        except queue.Empty:
            raise TimeoutError(f"no answer within {self.seconds:g} s") from None
        if error:
            raise error
        return answer

    def close(self) -> None:
        if callable(shut := getattr(self.scorer, "close", None)):
            shut()


class _Process:
    """A reward in a process of its own, on the CPU. One that hangs or dies is replaced at the next call.

    What travels is pickled: both ends are this program, over a pipe that nobody else can open."""

    def __init__(self, reward: Any, seconds: float | None) -> None:
        self.reward, self.seconds = reward, seconds
        self.process: Any = None
        self.pipe: connection.Connection | None = None

    def __call__(self, samples: Samples) -> Any:
        if self.process is None or not self.process.is_alive():
            self._start()
        assert self.pipe is not None
        try:
            self.pipe.send_bytes(pickle.dumps(samples))
            if not self.pipe.poll(self.seconds):
                self.close()
                raise TimeoutError(f"no answer within {self.seconds:g} s")
            worked, said = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            self.process.join(1.0)  # its pipe is closed, so it is about to end
            code = self.process.exitcode
            self.close()
            raise RuntimeError(f"its process ended (exit code {code})") from error
        if not worked:
            raise RuntimeError(said)
        return said

    def _start(self) -> None:
        spawn = get_context("spawn")  # a fork would copy locks that other threads hold
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(self.reward, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        if self.pipe is not None:
            self.pipe.close()
        self.process, self.pipe = None, None


def _serve(reward: Any, pipe: connection.Connection) -> None:
    """The other end: answer until the pipe is closed."""
    torch.set_num_threads(1)  # there are as many of these as the recipe wants
    scorer: Callable[[Samples], Any] | None = None
    while True:
        try:
            samples = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            scorer = scorer or load(reward, torch.device("cpu"))
            answer: tuple[bool, Any] = True, scorer(samples)
        except Exception as error:  # goes back to the run, which reports it
            answer = False, f"{type(error).__name__}: {error}"
        pipe.send_bytes(pickle.dumps(answer))


def why(reasons: Mapping[str, int], most: int = 3) -> str:
    """The commonest reasons in words, with how many samples each cost where there are several."""
    if len(reasons) == 1:
        return next(iter(reasons))
    ranked = Counter(dict(reasons)).most_common(most)
    others = len(reasons) - len(ranked)
    return "; ".join(f"{reason} ({n})" for reason, n in ranked) + (f"; and {others} others" if others else "")
