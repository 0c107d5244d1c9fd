"""`rlkit check`: say what a recipe would do, or what is wrong with it, before anything is loaded.

Of one recipe it tells all; of several, a line each, so that a folder of recipes can be held in order.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit import recipe, sources
from rlkit.errors import RecipeError, RlkitError

if TYPE_CHECKING:
    from rlkit.stages import Setup, Stage


def arguments(parser: argparse.ArgumentParser) -> None:
    help = "one or more recipes' names or files, and changes to all of them"
    parser.add_argument("words", nargs="+", metavar="RECIPE key=value", help=help)
    parser.add_argument("--json", action="store_true", help="the recipe with every default filled in")


def run(options: argparse.Namespace) -> int:
    """0 when all are sound; 1 when one of several is not. RlkitError where one alone is not."""
    names = [word for word in options.words if not sources.is_override(word)]
    overrides = [word for word in options.words if sources.is_override(word)]
    for name in names:
        sources.refuse_key_alone(name)
    if not names:
        raise RecipeError("which recipe?", hint="For instance rlkit check RECIPE key=value")
    if len(names) > 1:
        if options.json:
            raise RecipeError("is for one recipe.", where="--json", hint=f"Name one of {', '.join(names)}.")
        found = [_sound(name, overrides) for name in names]
        return 0 if all(found) else 1
    setup = _read(names[0], overrides)
    if options.json:
        print(json.dumps(setup.recipe, indent=2))
    else:
        _describe(setup)
    return 0


def _sound(name: str, overrides: list[str]) -> bool:
    if Path(name).name.startswith("_"):
        print(f"{name}: a part that others extend, checked with them")
        return True
    try:
        setup = _read(name, overrides, f"{name}: ")
    except RlkitError as error:
        print(f"{name}: {error}")
        return False
    print(f"{name}: ok, {', '.join(f'{stage.name} {stage.steps:,}' for stage in setup.stages)} steps")
    return True


def _read(name: str, overrides: list[str], of: str = "") -> Setup:
    """Read, with its files of prompts: their errors are said now. Files that are not here are only named.

    of: how a line begins that is said of this recipe, where there are others."""
    setup = recipe.read(name, overrides)
    for stage in setup.every_stage():
        plain = setup.recipe["stages"][stage.name]
        absent = _absent(plain["data"])
        if not absent:
            stage.data.open()
        if stage in setup.stages:
            absent += _absent(plain["monitors"].get("sanity") or {})
        if absent:
            what = f"{of}stage {stage.name}: not here yet, and needed to train: {', '.join(absent)}"
            print(what, file=sys.stderr)
    for stage in setup.stages:
        for note in filter(None, (_late(stage), _out_of_reach(stage))):
            print(f"note: {of}stage {stage.name}: {note}", file=sys.stderr)
    return setup


def _out_of_reach(stage: Stage) -> str:
    """A plateau that the stage is too short for. It is no error: whoever tries a recipe out makes it shorter."""
    until, every = stage.until, stage.evaluate.every
    if until is None or until.plateau is None or not every:
        return ""
    made = 1 + (stage.steps - 1) // every  # the opening one, which the others are compared with
    if made > until.plateau:
        return ""
    needed = f"needs {until.plateau + 1} evaluations, the opening one counted"
    return f"until.plateau of {until.plateau} {needed}, and the stage makes {made} before its last step"


def _late(stage: Stage) -> str:
    """A rate that cannot fall as it should, which is no error either."""
    updates = _updates(stage)
    if updates is None or stage.learner.decay is None or stage.learner.decay[1] <= updates * stage.steps:
        return ""
    first, last = stage.learner.decay
    made = updates * stage.steps
    return f"learner.decay lowers the rate from update {first:,} to {last:,}, and the stage makes {made:,}"


def _updates(stage: Stage) -> int | None:
    """How many a step makes; None where only the algorithm knows."""
    rows = recipe.rows_per_step(stage)
    return None if rows is None else rows // stage.learner.batch * stage.learner.epochs


def _describe(setup: Setup) -> None:
    policy = setup.recipe["policy"]
    parts = {name: part["backbone"]["name"] for name, part in policy.get("parts", {}).items()}
    whole = ", ".join(f"{name} {backbone}" for name, backbone in parts.items())
    print(f"policy: {whole or _trains(policy['backbone']['name'], policy['train'])}, {setup.options.precision}")
    for stage in setup.stages:
        plain = setup.recipe["stages"][stage.name]
        print(f"stage {stage.name}: {stage.steps:,} steps")
        if stage.train:
            print(f"  {'trains':<10} {'; '.join(_trains(name, way) for name, way in plain['train'].items())}")
        for key, text in _stage_table(stage, plain).items():
            print(f"  {key:<10} {text}")
    if resting := [name for name in setup.recipe["stages"] if name not in {stage.name for stage in setup.stages}]:
        print(f"rest (run.order): {', '.join(resting)}")
    print("ok")


def _absent(data: Mapping[str, Any]) -> list[str]:
    """Files and folders of an entry that are not there: a recipe may be checked on another machine."""
    if data.get("name") == "hub":  # its path may be a name on the hub
        return []
    named = [data[key] for key in ("path", "held_out_path") if data.get(key)]
    return [one for one in named if not Path(one).expanduser().exists()]


def _trains(name: str, train: Mapping[str, Any]) -> str:
    return f"{name}, LoRA, rank {train['lora']['rank']}" if "lora" in train else f"{name}, all weights"


def _stage_table(stage: Stage, plain: Mapping[str, Any]) -> dict[str, str]:
    """What a stage would do, in a few words for each part."""
    samples = stage.data.per_step * stage.data.group
    learner = f"updates of {stage.learner.batch} rows, rate {stage.learner.lr:g}"
    if (rows := recipe.rows_per_step(stage)) is not None:
        learner = f"{rows:,} rows a step, {_updates(stage)} x {learner}"
    evaluate = stage.evaluate
    count = evaluate.held_out if evaluate.every else evaluate.ends or evaluate.held_out
    often = f"every {evaluate.every} steps" if evaluate.every else "first and last"
    ends = f", {evaluate.ends} first and last" if evaluate.ends and evaluate.every else ""
    data = plain["data"]["name"]
    table = {
        "data": f"{data}: {stage.data.per_step} prompts x {stage.data.group} = {samples} samples a step",
        "rollout": _in_words(plain["rollout"]),
        "algorithm": _in_words(plain["algorithm"]),
        "rewards": ", ".join(
            f"{reward.name} x {reward.weight:g}" if reward.when == "always" else f"{reward.name} in evaluations"
            for reward in stage.rewards
        ),
        "learner": learner,
        "evaluate": f"{count} held-out pictures {often}{ends}",
    }
    if not stage.total.plain:
        gates = "".join(f"; at most {gate.at_most:g} when {gate.when}" for gate in stage.total.gates)
        table["total"] = stage.total.form + gates
    carried = ["the average of the weights"] if stage.carry.weights == "ema" else []
    carried += ["the optimiser's moments"] if stage.carry.optimizer else []
    if carried:
        table["carry"] = f"{' and '.join(carried)} of the stage before"
    if stage.anchor != "base":
        table["anchor"] = stage.anchor
    acting = [f"{name} {one['action']}" for name, one in plain["monitors"].items() if _acts(one)]
    if acting:
        table["monitors"] = f"{', '.join(acting)}; the others warn"
    if stage.monitors.best_by is not None:
        table["best_by"] = f"{stage.monitors.best_by}, to roll back to"
    others = [one.name for one in stage.also if one.name != stage.name]
    if others:
        table["also"] = f"first and last the evaluation of {', '.join(others)}"
    if stage.until is not None:
        limit = stage.until
        flat = f"no higher for {limit.plateau} evaluations"
        table["until"] = f"{limit.metric} {flat if limit.above is None else f'> {limit.above:g}'}"
    if plain["expect"]:
        table["expect"] = ", ".join(f"{metric} {rule}" for metric, rule in plain["expect"].items())
    return table


def _acts(monitor: Any) -> bool:
    return isinstance(monitor, Mapping) and monitor.get("action", "warn") != "warn"


def _in_words(entry: Mapping[str, Any]) -> str:
    options = " ".join(f"{key}={value}" for key, value in entry.items() if key != "name" and value is not None)
    return f"{entry['name']} ({options})" if options else str(entry["name"])
