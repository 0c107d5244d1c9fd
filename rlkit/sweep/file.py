"""Sweep files: W&B's format, read so that `rlkit sweep` starts the trials that `wandb agent` would start.

The command must start `rlkit train RECIPE`, and its `${args_no_hyphens}` is where a trial's `key=value` words go:
other forms (`--key=value`) are what a recipe does not read. Nothing else of the command is run here: a local trial is
started with the Python that runs the sweep. What W&B takes and this cannot keep is refused, never ignored.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlkit import recipe, registry, sources
from rlkit.errors import RecipeError, RlkitError, nearest
from rlkit.sweep.space import Parameter, parameter, text_of
from rlkit.sweep.stop import Hyperband

Setting = dict[str, Any]  # a value for each parameter

KEYS = ("program", "command", "method", "metric", "parameters", "early_terminate", "run_cap")
LABELS = ("name", "description", "project", "entity")  # for W&B's pages alone
METHODS = ("grid", "random", "bayes")
SEED = "run.seed"
ARGUMENTS = "${args_no_hyphens}"
COMMAND = '["${env}", "${program}", train, RECIPE, "${args_no_hyphens}"]'
PROCESSES = ("--nproc", "--processes")
_MOST = 1000  # settings of a grid, that nobody asks for more by accident


@dataclass(frozen=True)
class Metric:
    name: str
    goal: Literal["minimize", "maximize"]  # W&B's default is minimize; here it is said


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked in itself. Whether the recipe takes the parameters is `check_setting`'s to say."""

    file: str
    recipe: str
    words: tuple[str, ...]  # of the command, behind the recipe
    method: str
    metric: Metric
    parameters: tuple[Parameter, ...]
    hyperband: Hyperband | None = None
    cap: int | None = None  # trials in all

    @property
    def maximize(self) -> bool:
        return self.metric.goal == "maximize"

    @property
    def processes(self) -> int:
        """Of each trial."""
        counts = [count for word, count in itertools.pairwise(self.words) if word in PROCESSES and count.isdecimal()]
        return max([1, *map(int, counts)])

    def settings(self) -> list[Setting]:
        """Every point of a grid, in the order of the file; the last parameter changes first."""
        several = [one.listed() for one in self.parameters]
        keys = [one.key for one in self.parameters]
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*several)]

    def seeds(self) -> list[Any]:
        """Those that the file lists, for each setting alike; [] where it lists none."""
        several = [one for one in self.parameters if one.key == SEED]
        return [seed for one in several for seed in (one.listed() if self.method == "grid" else one.values)]

    def drawn(self, seed: int, index: int) -> Setting:
        """A random setting: a pure function of the seed and its number, so a longer sweep begins as the shorter."""
        return {one.key: one.at(random.Random(f"{seed} {index} {one.key}").random()) for one in self.parameters}


def read(path: Path) -> Sweep:
    """RecipeError with the file and the key where it is no sweep."""
    file = str(path)
    node = _parse(path)
    for key in node:
        if key not in (*KEYS, *LABELS):
            if key in sources.TOP or key == "defaults":
                hint = f"This looks like a recipe: rlkit train {file}"
            else:
                hint = f"Keys: {', '.join((*KEYS, *LABELS))}."
            raise RecipeError(f"no such key.{nearest(str(key), (*KEYS, *LABELS))}", where=f"{file}: {key}", hint=hint)
    lacking = [key for key in ("program", "command", "method", "metric", "parameters") if node.get(key) is None]
    if lacking:
        raise RecipeError(f"a sweep needs {', '.join(lacking)}.", where=file)
    name, words = _command(node["program"], node["command"], f"{file}: command")
    method = node["method"]
    if method not in METHODS:
        hint = f"Methods: {', '.join(METHODS)}."
        raise RecipeError(f"no method {method!r}.{nearest(str(method), METHODS)}", where=f"{file}: method", hint=hint)
    metric = _construct(Metric, node["metric"], f"{file}: metric")
    stop = node.get("early_terminate")
    hyperband = None if stop is None else _construct(Hyperband, stop, f"{file}: early_terminate")
    cap = node.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        raise RecipeError(f"must be a whole number, 1 or more, not {cap!r}.", where=f"{file}: run_cap")
    if cap is None and method != "grid":
        hint = "Set run_cap to the number of trials."
        raise RecipeError(f"{method} has no end of its own.", where=f"{file}: run_cap", hint=hint)
    parameters = _parameters(node["parameters"], file, method)
    _refuse_twice(words, parameters, f"{file}: command")
    return Sweep(file, name, words, method, metric, parameters, hyperband, cap)


def _parse(path: Path) -> Mapping[Any, Any]:
    """With plain YAML, as W&B reads the file: its ${...} are not OmegaConf's."""
    import yaml

    try:
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise RecipeError(f"this is not YAML: {error.problem or error.context}.", where=where) from error
    except FileNotFoundError as error:
        near = nearest(str(path), map(str, path.parent.glob("*.y*ml")))
        raise RecipeError(f"there is no file {str(path)!r}.{near}", hint="Give a sweep file.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot be read: {error}.", where=str(path)) from error
    if not isinstance(node, Mapping):
        raise RecipeError("a sweep has keys and values.", where=str(path), hint=f"Its keys: {', '.join(KEYS)}.")
    return node


def _construct(kind: type[Any], node: Any, where: str) -> Any:
    if not isinstance(node, Mapping):
        raise RecipeError(f"must be a mapping, not {node!r}.", where=where, hint="Write key: value below it.")
    return registry.construct(kind, {str(key): value for key, value in node.items()}, where, what=where)


def _command(program: Any, command: Any, where: str) -> tuple[str, tuple[str, ...]]:
    """(the recipe, the words behind it) of a command that starts `rlkit train`."""
    hint = f"Write command: {COMMAND}"
    if not isinstance(command, list) or not all(isinstance(one, str) for one in command):
        raise RecipeError(f"must be a list of words, not {command!r}.", where=where, hint=hint)
    words = [str(program) if one == "${program}" else one for one in command if one != "${env}"]
    start, train, rest = words[: words.index("train")] if "train" in words else words, "train" in words, []
    if train:
        rest = words[words.index("train") + 1 :]
    by_name = len(start) == 1 and Path(start[0]).name == "rlkit"
    if not train or not (by_name or start[1:] == ["-m", "rlkit.cli"]):
        raise RecipeError("does not start `rlkit train`.", where=where, hint=f"{hint} and program: rlkit")
    others = [one for one in rest if one.startswith("${") and one != ARGUMENTS]
    if others:
        what = f"{others[0]} writes what a recipe does not read: `--key=value`, or another form than key=value."
        raise RecipeError(what, where=where, hint=f"Use {ARGUMENTS}.")
    if rest.count(ARGUMENTS) != 1:
        raise RecipeError(f"needs {ARGUMENTS} once: the trial's key=value words.", where=where, hint=hint)
    rest.remove(ARGUMENTS)
    if not rest or rest[0].startswith("-") or "=" in rest[0]:
        raise RecipeError("names no recipe behind `train`.", where=where, hint=hint)
    if "--resume" in rest:
        raise RecipeError("--resume is for one run, and a sweep has many.", where=where)
    return rest[0], tuple(rest[1:])


def _parameters(node: Any, file: str, method: str) -> tuple[Parameter, ...]:
    if not isinstance(node, Mapping) or not node:
        hint = "For instance stages.main.learner.lr: {values: [1.0e-4, 3.0e-4]}"
        raise RecipeError("must be a mapping from keys to what to try.", where=f"{file}: parameters", hint=hint)
    found = []
    for key, said in node.items():
        where = f"{file}: parameters.{key}"
        if key == "run.dir":
            raise RecipeError("every trial has a folder of its own.", where=where, hint="Take run.dir out.")
        try:
            one = parameter(str(key), said)
            if method == "grid":
                one.listed()
        except ValueError as error:
            raise RecipeError(f"{error}.".replace("..", "."), where=where) from error
        found.append(one)
    size = 1
    for one in found:
        size *= len(one.listed()) if method == "grid" else 1
    if size > _MOST:
        what = f"a grid of {size:,} settings."
        raise RecipeError(what, where=f"{file}: parameters", hint=f"Up to {_MOST:,} are run; method: random draws.")
    return tuple(found)


def _refuse_twice(words: Iterator[str] | tuple[str, ...], parameters: tuple[Parameter, ...], where: str) -> None:
    """A key that is swept and set: one of the two would win silently."""
    swept = {one.key for one in parameters}
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if key == "run.dir":
            raise RecipeError("every trial has a folder of its own.", where=where, hint="Take run.dir out.")
        if key in swept:
            what = f"{word} sets a key that is swept."
            raise RecipeError(what, where=where, hint=f"Take it out here, or under parameters.{key}.")


def refuse_swept(sweep: Sweep, words: tuple[str, ...], seeds: tuple[int, ...]) -> None:
    """Of the sweep's command line: nothing that the file already has trials for."""
    _refuse_twice(words, sweep.parameters, "command line")
    if seeds and any(one.key == SEED for one in sweep.parameters):
        raise RecipeError(f"{sweep.file} has seeds of its own.", where="--seeds", hint=f"Take parameters.{SEED} out.")
    if seeds and any(word.lstrip("+").startswith(f"{SEED}=") for word in (*sweep.words, *words)):
        raise RecipeError(f"{SEED} is set already.", where="--seeds", hint="Take one of the two out.")


def check_setting(sweep: Sweep, words: tuple[str, ...], setting: Setting) -> Any:
    """The recipe with this setting; RecipeError that names the sweep file and the parameter at fault."""
    fixed = _recipe_words((*sweep.words, *words))
    try:
        return recipe.read(sweep.recipe, [*fixed, *text_of(setting)])
    except RlkitError as error:
        guilty = _guilty(sweep, fixed, setting)
        where = f"{sweep.file}: " + (" and ".join(f"parameters.{key}" for key in guilty) or "command")
        shown = " ".join(text_of({key: setting[key] for key in guilty}))
        place = error.where.removeprefix("command line: ")
        what = ": ".join(part for part in (shown, place, error.what) if part)
        raise RecipeError(what, where=where, hint=error.hint) from error


def _guilty(sweep: Sweep, fixed: list[str], setting: Setting) -> list[str]:
    """The parameters that are refused alone, or else those without any of which the rest is taken."""
    if not _taken(sweep, fixed, {}):
        return []
    alone = [key for key in setting if not _taken(sweep, fixed, {key: setting[key]})]
    without = [key for key in setting if _taken(sweep, fixed, {k: v for k, v in setting.items() if k != key})]
    return without or alone[:1] or list(setting)


def _taken(sweep: Sweep, fixed: list[str], setting: Setting) -> bool:
    try:
        recipe.read(sweep.recipe, [*fixed, *text_of(setting)])
    except RlkitError:  # the question is whether, not why
        return False
    return True


def _recipe_words(words: tuple[str, ...]) -> list[str]:
    """What of a command's words is the recipe's: flags and their numbers are the command's."""
    found, skip = [], False
    for word in words:
        if not word.startswith("--") and not skip:
            found.append(word)
        skip = word in PROCESSES
    return found
