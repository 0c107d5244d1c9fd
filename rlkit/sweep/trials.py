"""The trials of a sweep: their record on disk, and their processes, as many at a time as there are workers.

`sweep.json` holds every trial and its state, written again at each change, so that a sweep that was killed knows what
it had begun. Each trial is `rlkit train` in a process and a session of its own: Ctrl+C reaches it once, through here,
and it saves itself. What a trial measured is read from its metrics.jsonl and from nowhere else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from rlkit.errors import DataError, nearest
from rlkit.sweep.file import SEED, Sweep
from rlkit.sweep.space import text_of
from rlkit.tracking import Metrics

State = Literal["waiting", "running", "finished", "stopped", "interrupted", "failed", "refused"]

INTERRUPTED = 130  # as `rlkit train` ends after Ctrl+C
OPEN = ("waiting", "interrupted", "failed", "running")  # what a resumed sweep begins, or goes on with
FOLDER = "run.dir="  # of a trial, in its command line
PAUSE = 0.2  # seconds between two looks at the processes


@dataclass(frozen=True)
class Trial:
    """One setting with one seed. Its folder below the sweep's has its name; its log lies beside that."""

    name: str
    setting: Mapping[str, Any]
    seed: int | None = None  # None: the recipe's, or one that the file sweeps
    state: State = "waiting"
    why: str = ""  # of one that failed, was stopped, or never logged the metric
    process: int | None = None  # its id, while it runs

    def said(self) -> str:
        """What sets it apart, as overrides."""
        return " ".join(self.words())

    def words(self) -> list[str]:
        return text_of(self.setting) + ([] if self.seed is None else [f"{SEED}={self.seed}"])


@dataclass(frozen=True)
class Board:
    """The record of a sweep. `facts` is what its command line said; `trials` in the order in which they begin."""

    folder: Path
    facts: Mapping[str, Any]
    trials: dict[str, Trial]

    NAME = "sweep.json"

    @classmethod
    def open(cls, folder: Path) -> Board:
        path = folder / cls.NAME
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            trials = [Trial(**one) for one in facts.pop("trials")]
        except FileNotFoundError as error:
            raise DataError("there is no sweep here to go on with.", where=str(folder)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"is no record of a sweep: {error}.", where=str(path)) from error
        return cls(folder, facts, {one.name: one for one in trials})

    def put(self, *trials: Trial) -> None:
        self.trials.update({one.name: one for one in trials})
        whole = {**self.facts, "trials": [asdict(one) for one in self.trials.values()]}
        temporary = self.folder / f".{self.NAME}"
        temporary.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / self.NAME)

    def place(self, trial: Trial) -> Path:
        return self.folder / trial.name

    def log(self, trial: Trial) -> Path:
        return self.folder / f"{trial.name}.log"

    def values(self, trial: Trial, metric: str) -> list[float]:
        """What the trial has logged of the metric, in order. What a resume measured again counts once."""
        found: dict[tuple[Any, ...], float] = {}
        for row in _rows(self.place(trial)):
            value = row.get(metric)
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[row["kind"], row["stage"], row["step"]] = float(value)
        return list(found.values())

    def finished(self, trial: Trial) -> bool:
        from rlkit.report import summary as report

        try:
            return report.Run.open(self.place(trial)).finished
        except DataError:  # it never began, or stopped before its first numbers
            return False

    def unlogged(self, trial: Trial, metric: str) -> str:
        """Why a finished trial has no value."""
        rows = _rows(self.place(trial))
        names = sorted({key for row in rows for key, value in row.items() if isinstance(value, float)})
        return f"{metric} was never logged.{nearest(metric, names)}"


def _rows(folder: Path) -> list[dict[str, Any]]:
    try:
        return Metrics.read(folder)
    except (FileNotFoundError, DataError):  # not begun; or damaged, and then it counts as a trial without numbers
        return []


def still_running(board: Board) -> list[Trial]:
    """Trials whose processes outlived a sweep that was killed: two in one folder would spoil it."""
    return [one for one in board.trials.values() if one.state == "running" and _alive(one.process, board.place(one))]


def _alive(process: int | None, folder: Path) -> bool:
    """Whether this process is still the one of that folder, however its command line and this one write the path.
    Without /proc a number that is in use counts."""
    if process is None:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):
        return False
    line = Path(f"/proc/{process}/cmdline")
    if not line.exists():
        return True
    words = [os.fsdecode(word) for word in line.read_bytes().split(b"\0")]
    written = [word.removeprefix(FOLDER) for word in words if word.startswith(FOLDER)]
    return folder.resolve() in [(line.parent / "cwd" / one).resolve() for one in written]


# ---- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crew:
    """How many trials run at a time, and what of the machine each of them has."""

    workers: int
    threads: int
    devices: tuple[str, ...] = ()  # a CUDA_VISIBLE_DEVICES for each worker; none: as it is

    @classmethod
    def of(cls, workers: int, processes: int = 1) -> Crew:
        """The cores, and the devices of CUDA_VISIBLE_DEVICES, shared out. `processes`: of each trial."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        asked = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(asked) if asked.isdecimal() and int(asked) else max(1, cores // (workers * processes))
        cards = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
        share = len(cards) // workers
        several = [",".join(cards[i * share : (i + 1) * share]) for i in range(workers)]
        return cls(workers, threads, tuple(several) if share else ())


@dataclass
class Child:
    trial: Trial
    process: subprocess.Popen[bytes]
    bracket: int | None = None  # at which it was asked to stop
    size: int = 0  # of its record, when it was last compared


def command(sweep: Sweep, board: Board, trial: Trial, threads: int) -> list[str]:
    """What `rlkit` is called with. A folder that is there is gone on with."""
    folder = board.place(trial)
    words = [*sweep.words, *board.facts["words"]]
    mine = [] if any(word.lstrip("+").startswith("run.threads=") for word in words) else [f"run.threads={threads}"]
    again = ["--resume", str(folder)] if folder.exists() else []
    return ["train", sweep.recipe, *words, *trial.words(), *mine, f"{FOLDER}{folder}", *again]


def start(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """`rlkit WORDS` in a process and a session of its own."""
    whole = [sys.executable, "-m", "rlkit.cli", *words]
    with log.open("ab") as file:
        return subprocess.Popen(
            whole, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=dict(environment), start_new_session=True
        )


def run_trials(sweep: Sweep, board: Board, crew: Crew, following: Callable[[], Trial | None]) -> bool:
    """Run what `following` hands out until it hands out nothing; whether somebody asked the sweep to end.

    The first Ctrl+C, or polite kill, asks the trials to save themselves; the second ends them at once; the third kills.
    """
    children: dict[int, Child] = {}
    told = 0
    with _listening() as asked:
        try:
            while True:
                for place in range(crew.workers):
                    trial = following() if place not in children and not asked else None
                    if trial is not None:
                        children[place] = _begin(sweep, board, crew, place, trial)
                if not children:
                    return bool(asked)
                _look(sweep, board, children, bool(asked))
                _stop_losers(sweep, board, children)
                if len(asked) > told:
                    told = len(asked)
                    print("stopping: trials save themselves; Ctrl+C again to end them at once", file=sys.stderr)
                    for child in children.values():
                        child.process.send_signal(signal.SIGKILL if told > 2 else signal.SIGINT)
                time.sleep(PAUSE if children else 0)
        finally:  # whatever went wrong here, no process stays behind
            for child in children.values():
                child.process.terminate()
            for child in children.values():
                child.process.wait()


@contextmanager
def _listening() -> Iterator[list[int]]:
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _begin(sweep: Sweep, board: Board, crew: Crew, place: int, trial: Trial) -> Child:
    environment = {**os.environ, "OMP_NUM_THREADS": str(crew.threads), "PYTHONUNBUFFERED": "1"}
    environment.setdefault("WANDB_RUN_GROUP", board.folder.name)
    if crew.devices:
        environment["CUDA_VISIBLE_DEVICES"] = crew.devices[place]
    process = start(command(sweep, board, trial, crew.threads), board.log(trial), environment)
    trial = replace(trial, state="running", why="", process=process.pid)
    board.put(trial)
    print(f"{trial.name}: begun: {trial.said()}", flush=True)
    return Child(trial, process)


def _look(sweep: Sweep, board: Board, children: dict[int, Child], asked: bool) -> None:
    """Record the trials that have ended."""
    for place, child in list(children.items()):
        code = child.process.poll()
        if code is None:
            continue
        del children[place]
        trial = replace(_ended(sweep, board, child, code, asked), process=None)
        board.put(trial)
        values = board.values(trial, sweep.metric.name)
        number = f", {sweep.metric.name} {values[-1]:.4g}" if values else ""
        print(f"{trial.name}: {trial.state}{number}{f': {trial.why}' if trial.why else ''}", flush=True)


def _ended(sweep: Sweep, board: Board, child: Child, code: int, asked: bool) -> Trial:
    trial = child.trial
    if code == 0 and board.finished(trial):
        lacking = "" if board.values(trial, sweep.metric.name) else board.unlogged(trial, sweep.metric.name)
        return replace(trial, state="finished", why=lacking)
    if child.bracket is not None:
        return replace(trial, state="stopped", why=f"behind at value {child.bracket} of {sweep.metric.name}")
    if asked or code in (INTERRUPTED, -signal.SIGINT):
        return replace(trial, state="interrupted")
    by_signal = f"killed by signal {-code}" if code < 0 else f"ended with {code}, and said nothing"
    return replace(trial, state="failed", why=by_signal if code < 0 else last_line(board.log(trial)) or by_signal)


def _stop_losers(sweep: Sweep, board: Board, children: Mapping[int, Child]) -> None:
    if sweep.hyperband is None:
        return
    begun = [one for one in board.trials.values() if one.state != "waiting"]
    running = {one.trial.name: one for one in children.values() if one.bracket is None}
    sizes = {name: _size(board.place(one.trial) / Metrics.NAME) for name, one in running.items()}
    if all(running[name].size == size for name, size in sizes.items()):
        return  # nothing new
    for name, size in sizes.items():
        running[name].size = size
    values = {one.name: board.values(one, sweep.metric.name) for one in begun}
    for name, bracket in sweep.hyperband.losers(values, list(running), sweep.maximize).items():
        running[name].bracket = bracket
        running[name].process.send_signal(signal.SIGINT)
        print(f"{name}: stopping: behind at value {bracket} of {sweep.metric.name}", flush=True)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
