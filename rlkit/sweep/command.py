"""`rlkit sweep`: the trials of a W&B sweep file on this machine, without W&B.

Grid and random settings are known, and checked, before anything starts; bayes chooses each from what the others
brought. Whoever compares with seeds (`--seeds`, or `run.seed` as a parameter) gets one row a setting, with its spread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlkit import recipe_course, sources
from rlkit.errors import RecipeError, RlkitError
from rlkit.sweep import file as sweep_file
from rlkit.sweep import table as sweep_table
from rlkit.sweep.file import SEED, Setting, Sweep
from rlkit.sweep.trials import INTERRUPTED, OPEN, Board, Crew, Trial, run_trials, still_running
from rlkit.tracking import HELD_OUT

COPY = "sweep.yaml"
CANDIDATES = 300  # settings among which bayes chooses
TRIES = 100  # draws for a setting that was not drawn before


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="FILE key=value", help="a sweep file, and changes to every trial")
    parser.add_argument("--workers", type=_count, default=1, metavar="N", help="trials at once (default: 1)")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where it goes (default: runs/sweep-NAME-TIME)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the sweep in this folder")
    parser.add_argument("--seeds", type=_seeds, default=(), metavar="N,N", help="run every setting with each of these")
    parser.add_argument("--show", nargs="+", default=[], metavar="METRIC", help="more columns of the table")
    parser.add_argument("--draw", type=_count, default=1, metavar="N", help="another N draws other random settings")


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {word!r}")
    return int(word)


def _seeds(word: str) -> tuple[int, ...]:
    parts = [part.strip() for part in word.split(",")]
    if not all(part.isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise argparse.ArgumentTypeError(f"must be different whole numbers like 0,1,2, not {word!r}")
    return tuple(int(part) for part in parts)


def run(options: argparse.Namespace) -> int:
    """0 when every trial finished or was stopped early, 1 when one failed, 130 after Ctrl+C, of the sweep or of one
    trial: there is something to go on with."""
    for word in options.show:
        if sources.is_override(word):
            hint = "Write the changes first: rlkit sweep FILE key=value --show METRIC"
            raise RecipeError(f"{word!r} is a change and no metric.", where="--show", hint=hint)
    sweep, board = _again(options) if options.resume else _new(options)
    crew = Crew.of(options.workers, sweep.processes)
    waiting = [one for one in board.trials.values() if one.state in OPEN]
    print(f"sweep: {_counted(sweep, board)} in {board.folder}, {crew.workers} at a time", flush=True)
    coming = _handed_out(sweep, board, waiting)
    asked = run_trials(sweep, board, crew, partial(next, coming, None))
    told = sweep_table.write(sweep, board)
    print(f"\n{sweep_table.markdown(told)}\n{board.folder / 'table.md'}")
    states = {one.state for one in board.trials.values()}
    if asked or "interrupted" in states:
        print(f"interrupted; go on with: rlkit sweep --resume {board.folder}", file=sys.stderr)
        return INTERRUPTED
    return 1 if "failed" in states else 0


def _counted(sweep: Sweep, board: Board) -> str:
    total = sweep.cap or len(board.trials) if sweep.method == "bayes" else len(board.trials)
    done = sum(one.state not in OPEN for one in board.trials.values())
    return f"{total} trials" + (f", {done} of them done," if done else "")


# ---- a new sweep, or one to go on with -------------------------------------------------------------------------------


def _new(options: argparse.Namespace) -> tuple[Sweep, Board]:
    if not options.words or sources.is_override(options.words[0]):
        raise RecipeError("which sweep?", hint="For instance rlkit sweep FILE.yaml --seeds 0,1,2")
    path, words = Path(options.words[0]), tuple(options.words[1:])
    sweep = sweep_file.read(path)
    sweep_file.refuse_swept(sweep, words, options.seeds)
    folder = options.dir or Path("runs") / f"sweep-{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = f"To go on with the sweep in it: rlkit sweep --resume {folder}; for a new one choose another."
        raise RecipeError(f"{folder} exists and is not empty.", where="--dir", hint=hint)
    sources.value_of("run.dir", str(folder / _name(0)))  # for its error, before the first trial says it
    trials = planned(sweep, options.seeds, options.draw)
    mark = _check(sweep, words, trials, options.draw, options.show)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / COPY)
    facts = {"file": str(path), "words": list(words), "seeds": list(options.seeds), "draw": options.draw, "mark": mark}
    board = Board(folder, facts | {"show": options.show}, {})
    board.put(*trials)
    return sweep, board


def _again(options: argparse.Namespace) -> tuple[Sweep, Board]:
    if options.words or options.seeds or options.dir:
        hint = f"Write rlkit sweep --resume {options.resume}, and --workers if you like."
        raise RecipeError("a sweep goes on as it began.", where="--resume", hint=hint)
    board = Board.open(options.resume)
    board = replace(board, facts={**board.facts, "show": options.show or board.facts.get("show", [])})
    sweep = sweep_file.read(board.folder / COPY)
    left = still_running(board)
    if left:
        hint = f"Wait for it, or end it: kill -INT {left[0].process}"
        raise RecipeError(f"{left[0].name} still runs, as process {left[0].process}.", where="--resume", hint=hint)
    trials = list(board.trials.values())
    show = board.facts["show"]
    if _check(sweep, tuple(board.facts["words"]), trials, board.facts["draw"], show) != board.facts["mark"]:
        hint = "Start a new sweep, or bring the recipe back."
        raise RecipeError(f"{sweep.recipe} has changed since the sweep began.", where=str(board.folder), hint=hint)
    return sweep, board


def _check(sweep: Sweep, words: tuple[str, ...], trials: list[Trial], draw: int, show: Sequence[str]) -> str:
    """Refuse what a trial would refuse, before any starts; a fingerprint of the recipe with the first setting.

    Of a bayes sweep, whose settings nobody knows yet, the ends of every parameter are tried."""
    several = _ends(sweep, draw) if sweep.method == "bayes" else []
    several += [dict(one.setting) for one in trials if one.state != "refused"]
    settings = {json.dumps(one, default=str): one for one in several}
    setups = [sweep_file.check_setting(sweep, words, one) for one in settings.values()]
    for setup in setups:
        for metric, where in ((sweep.metric.name, "metric.name"), *((name, "--show") for name in show)):
            if metric.startswith(HELD_OUT):  # others are of the steps, and what those say only they know
                recipe_course.check_compared(setup, metric, where)
    _warn_of_test_prompts(sweep, setups[0])
    plain = {key: value for key, value in setups[0].recipe.items() if key != "run"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _ends(sweep: Sweep, draw: int) -> list[Setting]:
    """A drawn setting, with each parameter in turn at each of its values, or at both ends."""
    base = sweep.drawn(draw, 0)
    found = [base]
    for one in sweep.parameters:
        found += [{**base, one.key: value} for value in one.values or (one.at(0.0), one.at(1.0))]
    return found


def _warn_of_test_prompts(sweep: Sweep, setup: Any) -> None:
    if not sweep.metric.name.startswith(HELD_OUT):
        return
    stages = recipe_course.running(setup.recipe)
    keys = [key for name in stages for key in _test_splits(stages[name]["data"], f"stages.{name}.data")]
    if keys:
        print(
            f"warning: {sweep.metric.name} is measured on the held-out prompts that results are reported on: settings "
            f"chosen by it are chosen on the test. Add {'=validation '.join(keys)}=validation to the command.",
            file=sys.stderr,
        )


def _test_splits(data: Any, at: str) -> Iterator[str]:
    for key, value in data.items() if isinstance(data, Mapping) else ():
        if key == "held_out_split" and value == "held_out":
            yield f"{at}.{key}"
        yield from _test_splits(value, f"{at}.{key}")


# ---- settings --------------------------------------------------------------------------------------------------------


def planned(sweep: Sweep, seeds: tuple[int, ...], draw: int) -> list[Trial]:
    """The trials that are known now: all of a grid or random sweep, none of bayes. Every setting is run with the first
    seed before any has its second, so that the table is whole early."""
    if sweep.method == "bayes":
        return []
    each: tuple[int | None, ...] = seeds or (None,)
    count = math.ceil((sweep.cap or 1) / len(each))
    settings = sweep.settings() if sweep.method == "grid" else _drawn(sweep, count, draw)
    pairs = [(setting, seed) for seed in each for setting in settings][: sweep.cap]
    return [Trial(_name(i), setting, seed) for i, (setting, seed) in enumerate(pairs)]


def _name(index: int) -> str:
    return f"trial-{index:03}"


def _drawn(sweep: Sweep, count: int, draw: int) -> list[Setting]:
    """Random settings, each once: the same again would only look like another measurement."""
    found: dict[str, Setting] = {}
    for index in range(count * TRIES):
        if len(found) == count:
            break
        one = sweep.drawn(draw, index)
        found.setdefault(json.dumps(one, default=str), one)
    return list(found.values())


def _handed_out(sweep: Sweep, board: Board, waiting: list[Trial]) -> Iterator[Trial]:
    """What is to be run, in order; for bayes each new setting is chosen when a worker is free for it."""
    yield from waiting
    if sweep.method != "bayes":
        return
    each: list[int | None] = list(board.facts["seeds"]) or [None]
    words = tuple(board.facts["words"])
    cap = sweep.cap or 0
    while len(board.trials) < cap:
        setting = proposed(sweep, board)
        trials = [Trial(_name(len(board.trials) + i), setting, seed) for i, seed in enumerate(each)]
        trials = trials[: cap - len(board.trials)]
        try:
            sweep_file.check_setting(sweep, words, setting)
        except RlkitError as error:  # two values that do not go together: recorded, and the next one is chosen
            print(f"{trials[0].name}: refused: {error}", flush=True)
            board.put(*(replace(one, state="refused", why=str(error)) for one in trials))
            continue
        board.put(*trials)
        yield from trials


def proposed(sweep: Sweep, board: Board) -> Setting:
    """The setting from which a Gaussian process expects most, among random ones that were not tried."""
    import numpy as np

    from rlkit.sweep import bayes as sweep_bayes

    tried = [dict(one.setting) for one in board.trials.values()]
    first = len(tried) * CANDIDATES
    drawn = [sweep.drawn(board.facts["draw"], first + i) for i in range(CANDIDATES)]
    candidates = [one for one in drawn if one not in tried] or drawn
    points, values, pending = [], [], []
    for one in board.trials.values():
        own = board.values(one, sweep.metric.name)
        if one.state in ("finished", "stopped") and own:
            points.append(_place(sweep, one.setting))
            values.append(own[-1] if sweep.maximize else -own[-1])
        elif one.state not in ("failed", "refused"):
            pending.append(_place(sweep, one.setting))
    size = len(_place(sweep, candidates[0]))
    others = [_place(sweep, one) for one in candidates]
    shaped = [np.array(one, dtype=float).reshape(len(one), size) for one in (points, pending, others)]
    return candidates[sweep_bayes.propose(shaped[0], np.array(values), shaped[1], shaped[2])]


def _place(sweep: Sweep, setting: Mapping[str, Any]) -> list[float]:
    """Without the seed: whichever it is, it brings another measurement of the same number."""
    return [number for one in sweep.parameters if one.key != SEED for number in one.place(setting[one.key])]
