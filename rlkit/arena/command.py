"""The arena: algorithms side by side, with one policy, one set of prompts and rewards, and one budget of training time.

A contestant is a recipe whose name begins with `arena_`, or any other by its file. Each contestant and seed is one
ordinary run in a process of its own, pinned to a core of its own; a run that failed does not stop the others, and one
that is complete is not run again, so the same command goes on with an arena that was interrupted. Once nothing trains
any more the runs are measured: `arena.json` holds every number, and `arena.md` and `arena.png` are drawn from it alone.

What is compared is the last evaluation with the first, never the best.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit import recipe, registry
from rlkit.arena import page as arena_page
from rlkit.errors import DataError, RecipeError, RlkitError, nearest

if TYPE_CHECKING:
    from rlkit.policy import Policy
    from rlkit.stages import Setup
    from rlkit.types import Samples

PREFIX = "arena_"
REFERENCE = "quickstart"  # whose policy, prompts, evaluation and rewards are everybody's
SECONDS, QUICK_SECONDS, QUICK_PICTURES = 120.0, 20.0, 256
COMPARED, DRAWS = 256, 4  # held-out captions, and noise levels of each, that the divergence is measured at
SHOWN, PICTURES = 32, 8  # held-out captions, and pictures of each, that the diversity is measured at
NOISES = 3  # evaluations of the base that say how much noise alone moves its score

Facts = Mapping[str, Any]


# ---- the command -----------------------------------------------------------------------------------------------------


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="key=value", help="changes to every contestant alike")
    parser.add_argument("--seconds", type=_seconds, help=f"of one core, to train in (default: {SECONDS:g})")
    parser.add_argument("--seeds", type=_seeds, metavar="N,N", help="(default: 0,1,2)")
    parser.add_argument("--algorithms", metavar="A,B", help="of the built-in contestants only these")
    parser.add_argument("--recipes", nargs="+", default=[], metavar="FILE", help="contestants of your own")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where it goes, or goes on (default: runs/arena-TIME)")
    parser.add_argument("--jobs", type=_jobs, default=1, metavar="N", help="runs at once, a core for each (default: 1)")
    parser.add_argument("--split", choices=("held_out", "validation"), default="held_out", help="(default: held_out)")
    quick = f"{QUICK_SECONDS:g} seconds, one seed, {QUICK_PICTURES} pictures"
    parser.add_argument("--quick", action="store_true", help=f"a look, and no measurement: {quick}")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write an arena's table and plot again, run nothing")


def _seconds(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {word!r}")
    return value


def _seeds(word: str) -> tuple[int, ...]:
    parts = word.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise argparse.ArgumentTypeError(f"must be different whole numbers like 0,1,2, not {word!r}")
    return tuple(int(part) for part in parts)


def _jobs(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {word!r}")
    return int(word)


def run(options: argparse.Namespace) -> int:
    """0 when every run was measured, 1 when one of them failed."""
    if options.report:
        print(arena_page.write(options.report))
        return 0
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    seeds = options.seeds or ((0,) if options.quick else (0, 1, 2))
    folder = options.out or Path("runs") / f"arena-{time.strftime('%Y%m%d-%H%M%S')}"
    cores = _cores(options.jobs)
    everyone = contestants(_chosen(options), _words(options), seconds)
    races = [Race(one, seed, folder / f"{one.name}-{seed}") for seed in seeds for one in everyone]
    for race in races:
        race.refuse_another()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"arena: {len(races)} runs of {seconds:g} s in {folder}", flush=True)
    failed = _train(races, cores)
    facts = _measure(races, failed, everyone)
    facts["settings"] = {"seconds": seconds, "seeds": list(seeds), "split": options.split} | facts["settings"]
    facts["settings"] |= {"jobs": options.jobs, "changes": list(options.words)}
    (folder / "arena.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(arena_page.write(folder))
    return 1 if failed else 0


def _words(options: argparse.Namespace) -> list[str]:
    words = [*options.words, f"stages.main.data.held_out_split={options.split}"]
    return words + ([f"stages.main.evaluate.ends={QUICK_PICTURES}"] if options.quick else [])


def _chosen(options: argparse.Namespace) -> list[str]:
    """Recipes by name or file. What is chosen by name may lack the prefix."""
    known = [name.removeprefix(PREFIX) for name in registry.recipes() if name.startswith(PREFIX)]
    wanted = known if options.algorithms is None else [name.strip() for name in options.algorithms.split(",")]
    wanted = list(dict.fromkeys(name.removeprefix(PREFIX) for name in wanted))
    for name in wanted:
        if name not in known:
            hint = f"Known: {', '.join(known)}. A recipe of your own joins by --recipes FILE."
            raise RecipeError(f"no contestant named {name!r}.{nearest(name, known)}", where="--algorithms", hint=hint)
    return [PREFIX + name for name in wanted] + options.recipes


def _cores(jobs: int) -> list[int | None]:
    """A core for each run at a time; None where a process cannot be pinned."""
    if not hasattr(os, "sched_setaffinity"):
        return [None] * jobs
    free = sorted(os.sched_getaffinity(0))
    if jobs > len(free):
        what = f"{jobs} runs at once need as many cores, and there are {len(free)}."
        raise RecipeError(what, where="--jobs", hint="Else their training time would not be theirs alone.")
    return list(free[-jobs:])


# ---- contestants -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    name: str
    recipe: str  # a name or a file
    words: tuple[str, ...]  # changes to it, the budget among them
    setup: Setup
    note: str = ""  # what sets it apart: the rewards that it trains on


def contestants(recipes: Sequence[str], words: Sequence[str], seconds: float) -> list[Contestant]:
    """The recipes, read with the budget in them. RecipeError where one differs in what all must share."""
    reference = recipe.read(REFERENCE, words)
    found: dict[str, Contestant] = {}
    for one in recipes:
        name = Path(one).stem.removeprefix(PREFIX)
        if name in found:
            raise RecipeError(f"two contestants are called {name!r}.", where=one, hint="Rename one of the files.")
        own = recipe.read(one, words)
        if [stage.name for stage in own.stages] != ["main"]:
            raise RecipeError("a contestant has one stage, called main.", where=one)
        _same(one, own, reference)
        budget = f"stages.main.until={{metric: cpu_seconds, above: {seconds}}}"
        changes = (*words, "run.threads=1", budget, *_often(own, seconds))
        found[name] = Contestant(name, one, changes, recipe.read(one, changes), _note(own, reference))
    return list(found.values())


def _same(name: str, own: Setup, reference: Setup) -> None:
    ours, theirs = _shared(own), _shared(reference)
    differ = [f"{key} is {ours[key]!r} and not {theirs[key]!r}" for key in theirs if ours.get(key) != theirs[key]]
    if differ:
        hint = f"Contestants differ in how they learn; the rest is as in {REFERENCE}."
        raise RecipeError(f"this is another task: {', '.join(differ)}.", where=name, hint=hint)


def _shared(setup: Setup) -> dict[str, Any]:
    """What decides where a run begins and how it is judged. How many pictures a step samples is the algorithm's."""
    stage, plain = setup.stages[0], setup.recipe["stages"]["main"]
    data = {f"data.{key}": value for key, value in plain["data"].items() if key not in ("per_step", "group")}
    judged = {f"evaluate.{key}": plain["evaluate"][key] for key in ("held_out", "ends", "weights")}
    steps = {"evaluate.steps": stage.evaluate.steps or stage.rollout.steps}
    return {"policy": setup.recipe["policy"], "precision": setup.options.precision, **data, **judged, **steps}


def _note(own: Setup, reference: Setup) -> str:
    ours, theirs = _counted(own), _counted(reference)
    if ours == theirs:
        return ""
    if ours.keys() == theirs.keys():
        return "other options of the reward"
    return f"trained on {' and '.join(ours)}"


def _counted(setup: Setup) -> dict[str, Any]:
    """The rewards that are trained on; at weight 0 one is only watched."""
    return {name: own for name, own in setup.recipe["stages"]["main"]["rewards"].items() if own["weight"]}


def _often(setup: Setup, seconds: float) -> list[str]:
    """As many evaluations within these seconds as the recipe has in its own."""
    until, every = setup.stages[0].until, setup.stages[0].evaluate.every
    if until is None or until.above is None or until.metric != "cpu_seconds" or not every:
        return []
    return [f"stages.main.evaluate.every={max(1, round(every * seconds / until.above))}"]


# ---- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Race:
    """One contestant with one seed, and its run folder. The log and the measured numbers lie beside that."""

    contestant: Contestant
    seed: int
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def numbers(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")

    def finished(self) -> bool:
        from rlkit.report import summary as report

        try:
            return report.Run.open(self.folder).finished
        except DataError:  # it never began, or stopped before its first numbers
            return False

    def command(self) -> list[str]:
        """What `rlkit` is called with: a new run, or one to go on with."""
        words = ["train", self.contestant.recipe, *self.contestant.words, f"run.seed={self.seed}"]
        begun = self.folder.exists()
        return [*words, f"run.dir={self.folder}", *(["--resume", str(self.folder)] if begun else [])]

    def refuse_another(self) -> None:
        """A folder may hold the run of an arena with other settings, which must not be taken for this one's."""
        import yaml

        file = self.folder / "recipe.yaml"
        if not file.is_file():
            return
        then, now = yaml.safe_load(file.read_text(encoding="utf-8")), self.contestant.setup.recipe
        differ = [key for key in _differences(then, now) if not key.startswith("run.")]
        if differ:
            hint = "Choose another --out, or take the folder away."
            raise RecipeError(f"holds another run: {', '.join(differ)} differ.", where=str(self.folder), hint=hint)


def _differences(one: Any, other: Any, at: str = "") -> list[str]:
    """The dotted keys in which two recipes differ."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return [] if one == other else [at]
    keys = dict.fromkeys([*one, *other])
    return [key for k in keys for key in _differences(one.get(k), other.get(k), f"{at}.{k}".lstrip("."))]


def _train(races: Sequence[Race], cores: Sequence[int | None]) -> dict[str, str]:
    """Run what is not complete, as many at once as there are cores; {run: why} of those that failed.

    Ctrl+C or a polite kill ends the runs under way after their step, and they have saved themselves."""
    waiting = [race for race in races if not race.finished()]
    running: dict[int, tuple[Race, subprocess.Popen[bytes]]] = {}
    failed: dict[str, str] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            for place, core in enumerate(cores):
                if place not in running and waiting:
                    race = waiting.pop(0)
                    race.numbers.unlink(missing_ok=True)
                    running[place] = race, _start(race.command(), race.log, core)
                    print(f"{race.folder.name}: begun, {len(waiting)} to come", flush=True)
            for place, (race, child) in list(running.items()):
                if child.poll() is None:
                    continue
                del running[place]
                if child.returncode or not race.finished():
                    why = _last_line(race.log) or f"ended with {child.returncode}, and said nothing"
                    failed[race.folder.name] = why
                    print(f"{race.folder.name}: FAILED: {why}", flush=True)
            time.sleep(0.1 if running else 0)
    finally:
        for _, child in running.values():
            child.terminate()
        for _, child in running.values():
            child.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


def _start(words: Sequence[str], log: Path, core: int | None) -> subprocess.Popen[bytes]:
    """`rlkit WORDS` in a process of its own: Ctrl+C reaches it once, through here, and it shares no core."""

    command = [sys.executable, "-m", "rlkit.cli", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
            preexec_fn=None if core is None else partial(os.sched_setaffinity, 0, {core}),
        )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


# ---- measuring -------------------------------------------------------------------------------------------------------


def _measure(races: Sequence[Race], failed: Mapping[str, str], everyone: Sequence[Contestant]) -> dict[str, Any]:
    """All numbers, as `arena.json` has them. A run that was measured before is not measured again."""
    from rlkit import session
    from rlkit.dist import Processes

    setup = everyone[0].setup
    base = session.load_drawing(setup)
    prompts = setup.stages[0].data.open().held_out(COMPARED)
    clean = sampled(setup, base, prompts, 1)
    runs: list[dict[str, Any]] = []
    for race in races:
        described = {"contestant": race.contestant.name, "seed": race.seed, "note": race.contestant.note}
        why = failed.get(race.folder.name)
        if why is None and not race.numbers.is_file():
            print(f"{race.folder.name}: measuring", flush=True)
            try:
                numbers = told(race.folder) | _compared(race, base, clean)
            except RlkitError as error:  # one damaged folder is no reason to lose the others
                why = str(error)
            else:
                race.numbers.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        found = {"failed": why} if why else json.loads(race.numbers.read_text(encoding="utf-8"))
        runs.append(described | found)
    environment = session.environment(Processes(), "")
    settings = {key: environment[key] for key in ("versions", "machine", "device")}
    return {"settings": settings, "base": _base(setup, base, runs), "runs": runs}


def told(folder: Path) -> dict[str, Any]:
    """A run's own record: scores at both ends, effort, and the curve (seconds, network calls, strict)."""
    from rlkit.report import summary as report

    record = report.Run.open(folder)
    ends = record.evaluations[0], record.evaluations[-1]
    if len(record.evaluations) < 2 or any(f"held_out/{arena_page.SCORES[0]}" not in end for end in ends):
        raise DataError(f"there are not two evaluations with held_out/{arena_page.SCORES[0]}.", where=str(folder))
    effort: dict[int, tuple[float, int]] = {0: (0.0, 0)}  # after so many steps
    seconds, calls = 0.0, 0
    for row in record.train:
        seconds += row["cpu_seconds"]
        calls += row["network_calls"]
        effort[row["step"]] = seconds, calls
    curve = [[*effort[row["step"]], row[f"held_out/{arena_page.SCORES[0]}"]] for row in record.evaluations]
    scores = [{name: end.get(f"held_out/{name}") for name in arena_page.SCORES} for end in ends]
    return {
        "before": scores[0],
        "after": scores[1],
        "pictures": ends[1].get("count"),
        "steps": record.steps,
        "seconds": seconds,
        "samples": sum(row["samples"] for row in record.train),
        "network_calls": calls,
        "curve": curve,
    }


def _compared(race: Race, base: Policy, clean: Samples) -> dict[str, float]:
    from rlkit import session
    from rlkit.held_out import showing

    setup = race.contestant.setup
    policy = session.load_drawing(setup, folder=race.folder)
    weights = showing(setup.stages[0], policy).policy_set
    return {"divergence": divergence(policy, base, clean, weights), "diversity": diversity(setup, policy)}


def sampled(setup: Setup, policy: Policy, prompts: Sequence[Any], group: int) -> Samples:
    """`group` pictures of each prompt, as the stage shows them, from noise that no evaluation has."""
    from rlkit.data.prompts import PromptBatch
    from rlkit.dist import Processes
    from rlkit.held_out import of_one_size, showing, started_rollout
    from rlkit.types import Context

    stage, alone = setup.stages[0], Processes()
    context = Context(0, "arena", 0, stage.rollout.steps, {}, alone.gather)
    batch = PromptBatch(of_one_size(tuple(prompts)), group)
    with started_rollout(stage, policy, alone) as rollout:
        samples: Samples = rollout.collect(batch, showing(stage, policy), context)
    return samples


def divergence(policy: Policy, base: Policy, clean: Samples, weights: str = "current") -> float:
    """mean((v - v_base)^2) over the base's pictures of held-out captions, each at `DRAWS` fresh sigmas and noises."""
    import torch

    from rlkit import flow
    from rlkit.types import generator

    total, count = 0.0, 0
    keys = [prompt.key for prompt in clean.prompts for _ in range(DRAWS)]
    for one in (policy, base):
        one.conditions.encode(clean.prompts)
    sigmas = flow.draw_sigmas("uniform", DRAWS, [generator("arena sigma", i) for i in range(len(clean))]).flatten()
    shape = clean.latents.shape[1:]
    noise = torch.cat([torch.randn(DRAWS, *shape, generator=generator("arena noise", i)) for i in range(len(clean))])
    x = flow.interpolate(clean.latents.repeat_interleave(DRAWS, 0), noise, sigmas)
    with torch.no_grad():
        for part in torch.arange(len(x)).split(256):
            call = x[part], sigmas[part], [keys[i] for i in part.tolist()]
            away = policy.models[weights].velocity(*call) - base.models.current.velocity(*call)
            total, count = total + float(away.double().square().sum()), count + away.numel()
    return total / count


def diversity(setup: Setup, policy: Policy) -> float:
    """How far apart pictures of one caption are: the root mean square over pixels, in the mean over all pairs."""
    import torch

    prompts = setup.stages[0].data.open().held_out(SHOWN)
    media = sampled(setup, policy, prompts, PICTURES).media
    pictures = media.reshape(len(prompts), PICTURES, -1).double()
    return float(torch.stack([torch.pdist(one).mean() for one in pictures]).mean() / pictures.shape[-1] ** 0.5)


def _base(setup: Setup, base: Policy, runs: Sequence[Facts]) -> dict[str, Any]:
    """The base's scores with several noises: the runs begin with one a seed, and what is lacking is evaluated here."""
    from rlkit import session

    scores = {run["seed"]: run["before"] for run in runs if "failed" not in run}
    evaluation = setup.stages[0].evaluate
    count, seed = evaluation.ends or evaluation.held_out, 1000
    while len(scores) < NOISES:
        again = replace(setup, options=replace(setup.options, seed=seed))
        found = session.evaluate_once(again, None, count)
        scores[seed], seed = {name: found[f"held_out/{name}"] for name in arena_page.SCORES}, seed + 1
    return {
        "weights": _fingerprint(base),
        "pictures": count,
        "scores": {str(seed): own for seed, own in scores.items()},
        "diversity": diversity(setup, base),
    }


def _fingerprint(policy: Policy) -> str:
    """SHA-256 of the weights that every run begins with, by name and value."""
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(policy.trainable.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
