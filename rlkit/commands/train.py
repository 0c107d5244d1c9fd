"""`rlkit train`: train a recipe in this process or in several, or go on with a run."""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rlkit import recipe, recipe_course, registry
from rlkit.commands.words import positive, recipe_and_changes
from rlkit.errors import DataError, RecipeError

if TYPE_CHECKING:
    from rlkit.dist import Processes
    from rlkit.stages import Setup


STARTED = time.monotonic()  # before torch is imported, so that a run's first phase has its whole length

INTERRUPTED = 130


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="RECIPE key=value", help="a recipe's name or file, and changes")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in this folder")
    which.add_argument("--from", dest="begin", metavar="STAGE", help="leave out the stages before this one")
    which.add_argument("--only", metavar="STAGE", help="leave out all other stages")
    # torchrun reads every --nproc on its command line as its own, so the processes that it starts get --processes.
    parser.add_argument("--nproc", "--processes", type=positive, default=1, metavar="N", help="on this machine")
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def run(options: argparse.Namespace) -> int:
    name, overrides = recipe_and_changes(options.words)
    if name is None and options.resume is not None:
        name = str(options.resume / "recipe.yaml")
        if not Path(name).is_file():
            what = f"there is no run in {options.resume} to go on with."
            hint = f"To begin one there: rlkit train RECIPE --resume {options.resume}"
            if (options.resume / "checkpoints").is_dir():
                what = f"the run in {options.resume} has lost its recipe.yaml."
                hint = f"Say which recipe it is of, with its changes: rlkit train RECIPE --resume {options.resume}"
            raise RecipeError(what, where="--resume", hint=hint)
    if name is None:
        raise RecipeError("which recipe?", hint=f"For instance rlkit train {next(iter(registry.recipes()), 'FILE')}")
    if options.begin or options.only:
        without = recipe_course.left_out(recipe.compose(name, overrides), options.begin, options.only)
        options.words, overrides = [*options.words, *without], [*overrides, *without]  # for other processes too
    setup = recipe.read(name, overrides)
    if options.nproc > 1 and "WORLD_SIZE" not in os.environ:
        _run_folder(setup, name, options.resume)  # for its errors, once and not in every process
        return _launch(options.nproc, _again(options, "--processes"))

    from rlkit import dist, session
    from rlkit.run import Interrupted

    processes = dist.start(options.nproc, setup.options.device)
    folder = _same_folder(processes, _run_folder(setup, name, options.resume) if processes.first else None)
    say = print if processes.first and not options.quiet else _silent
    say(f"run folder: {folder}")
    command = shlex.join(["rlkit", *_again(options, "--nproc")])
    code = 0

    def tell() -> list[Path]:
        return _tell(folder, say)

    try:
        session.run(setup, folder, processes, options.resume is not None, command, STARTED, options.quiet, tell)
    except Interrupted as stop:
        if processes.first:
            print(stop, file=sys.stderr)
        code = INTERRUPTED
    finally:
        processes.close()
    return code


def _again(options: argparse.Namespace, count: str) -> list[str]:
    """The command line again; `count` is how it says the number of processes."""
    words = ["train", *options.words]
    words += ["--resume", str(options.resume)] if options.resume else []
    words += [count, str(options.nproc)] if options.nproc > 1 else []
    return words + (["--quiet"] if options.quiet else [])


def _run_folder(setup: Setup, name: str, resume: Path | None) -> Path:
    """The folder of this run. A new run never writes into one that holds anything."""
    if resume is not None:
        return resume
    if setup.options.dir is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        return Path("runs") / f"{Path(name).stem}-{stamp}-{secrets.token_hex(2)}"
    folder = Path(setup.options.dir).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = f"To go on with the run in it: rlkit train --resume {folder}; for a new one choose another run.dir."
        raise RecipeError(f"{folder} exists and is not empty.", where="run.dir", hint=hint)
    return folder


def _same_folder(processes: Processes, folder: Path | None) -> Path:
    """The first process's choice, on all of them."""
    import torch

    letters = torch.tensor(list(str(folder or "").encode()), dtype=torch.int64)
    return Path(bytes(processes.gather(letters).tolist()).decode())


def _launch(count: int, arguments: Sequence[str]) -> int:
    """Start the processes and wait. They have a session of their own: Ctrl+C reaches them once, through here."""
    from rlkit.dist import launch_command

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // count)), **os.environ}
    child = subprocess.Popen(launch_command(count, arguments), env=environment, start_new_session=True)
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        return INTERRUPTED
    return 1 if code else 0


def _tell(folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Write the report of a run and say how it went. A run that stopped before its first numbers has none."""
    from rlkit.report import summary as report

    try:
        page = report.write(folder)
    except DataError as error:
        say(f"no report: {error}")
        return []
    say(report.sentence(report.summary(folder)))
    say(f"report: {page}")
    return [page]


def _silent(text: str) -> None:
    pass
