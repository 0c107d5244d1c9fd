"""How the stages of a recipe follow each other: what ends one, what is expected of it, and what the next takes over.

A stage that waits for a number which no evaluation gives would wait to its last step, and nothing would show why: it
is refused here, before anything runs. What is expected is only reported, and may go unmeasured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlkit.errors import RecipeError, nearest

if TYPE_CHECKING:
    from rlkit.stages import Setup, Stage


def check(setup: Setup) -> None:
    """RecipeError for a stage that cannot end as it says, or cannot begin where the one before ended."""
    before: Stage | None = None
    for stage in setup.stages:
        _check_also(setup, stage)
        _check_ending(stage, setup.recipe["stages"][stage.name]["expect"])
        _check_best(stage)
        _check_carry(stage, before)
        before = stage


def arranged(stages: Sequence[Stage], order: Sequence[str] | None) -> tuple[Stage, ...]:
    """The stages that run, in their order, each with those that its evaluation names. RecipeError for other names.

    stages: of the recipe, in its order. order: their names; None: all of them.
    """
    known = {stage.name: stage for stage in stages}
    names = list(known) if order is None else list(order)
    _check_names(names, known, "run.order")
    if not names:
        raise RecipeError("no stage is left to run.", where="run.order", hint=f"The recipe has: {', '.join(known)}.")
    told = {name: stage.evaluate.also for name, stage in known.items()}
    for name, others in told.items():
        _check_names(others, known, f"stages.{name}.evaluate.also")
    return tuple(replace(known[name], also=tuple(known[one] for one in told[name])) for name in names)


def running(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The stages of a resolved recipe that run, in their order."""
    stages = recipe.get("stages") or {}
    order = (recipe.get("run") or {}).get("order")
    _check_names(order or (), stages, "run.order")
    return {name: stages[name] for name in (stages if order is None else order)}


def _check_names(names: Sequence[str], known: Mapping[str, Any], where: str) -> None:
    for name in names:
        if name not in known:
            what = f"the recipe has no stage named {name!r}.{nearest(name, known)}"
            raise RecipeError(what, where=where, hint=f"Its stages: {', '.join(known)}.")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        hint = "To train twice on one task, give the second stage a name of its own."
        raise RecipeError(f"{twice[0]!r} stands there twice.", where=where, hint=hint)


def left_out(recipe: Mapping[str, Any], begin: str | None, only: str | None) -> list[str]:
    """The overrides that leave out the stages before `begin`, or all but `only`. RecipeError for a name that is none.

    recipe: composed. The first stage that is left has nothing to take over.
    """
    stages, order = recipe["stages"], (recipe.get("run") or {}).get("order")
    known = [str(name) for name, stage in stages.items() if stage is not None]
    names = known if order is None or only is not None else list(order)
    first = begin if only is None else only
    if first is None:
        return []
    if first not in names:
        flag = "--from" if only is None else "--only"
        what = f"the recipe has no stage named {first!r}.{nearest(first, names)}"
        raise RecipeError(what, where=flag, hint=f"Its stages: {', '.join(names)}.")
    kept = [first] if only is not None else names[names.index(first) :]
    return [f"run.order=[{','.join(kept)}]", *([f"stages.{first}.carry=null"] if "carry" in stages[first] else [])]


def measured(stage: Stage) -> tuple[str, ...] | None:
    """The columns of an evaluation, as far as they are known beforehand; None: a reward does not say what it gives."""
    from rlkit.record import column_of

    names = [one.name for one in stage.rewards]
    own = {one.name: getattr(one.reward, "components", None) for one in stage.rewards}
    if any(parts is None for parts in own.values()):
        return None
    components: Mapping[str, Any] = {f"{name}/{part}": None for name, parts in own.items() for part in parts or ()}
    return ("reward", *(names if len(names) > 1 else ()), *(column_of(one, components) for one in components))


def _check_also(setup: Setup, stage: Stage) -> None:
    where = f"stages.{stage.name}.evaluate.also"
    if stage.also and setup.policy.parts:
        hint = "Leave it out: a policy of several parts evaluates the stage that it is in."
        raise RecipeError("is for policies of one network.", where=where, hint=hint)
    if stage.also and not (stage.evaluate.ends or stage.evaluate.held_out):
        hint = f"Set stages.{stage.name}.evaluate.held_out."
        raise RecipeError("is made with the stage's own evaluations, and there are none.", where=where, hint=hint)
    for one in stage.also:
        if one.rollout != stage.rollout and any(getattr(two.rollout, "single", False) for two in (one, stage)):
            what = f"the rollout of {one.name!r} would start beside this stage's, and of its kind there can be one."
            raise RecipeError(
                what, where=where, hint=f"Give stages.{one.name}.rollout the same options, or leave it out."
            )


def _check_ending(stage: Stage, expect: Mapping[str, str]) -> None:
    from rlkit.stages import TIMES
    from rlkit.tracking import HELD_OUT, Expectation

    where = f"stages.{stage.name}"
    for metric, rule in expect.items():
        Expectation.parse(rule, where=f"{where}.expect.{metric}")
    until = stage.until
    if until is None or until.metric in TIMES:
        return
    if not until.metric.startswith(HELD_OUT):
        what = f"a stage ends on what an evaluation measures, not on {until.metric!r}."
        hint = f"Write for instance {HELD_OUT}strict, or {TIMES[0]} for its training time."
        raise RecipeError(what, where=f"{where}.until.metric", hint=hint)
    _check_measured(stage, until.metric, f"{where}.until.metric")
    if not stage.evaluate.held_out or not stage.evaluate.every:
        what = f"the stage waits for {until.metric!r}, and nothing is evaluated before its last step."
        raise RecipeError(what, where=f"{where}.until.metric", hint=f"Set {where}.evaluate.every and .held_out.")


def _check_best(stage: Stage) -> None:
    where = f"stages.{stage.name}"
    if stage.monitors.best_by is not None:
        _check_measured(stage, stage.monitors.best_by, f"{where}.monitors.best_by")
    if stage.monitors.rolls_back and not (stage.evaluate.held_out or stage.evaluate.ends):
        name = next(name for name, one in vars(stage.monitors).items() if getattr(one, "action", None) == "roll_back")
        what = "goes back to the weights of the best evaluation, and the stage makes none."
        hint = f"Set {where}.evaluate.held_out, or action: stop."
        raise RecipeError(what, where=f"{where}.monitors.{name}.action", hint=hint)


def _check_measured(stage: Stage, metric: str, where: str) -> None:
    """That an evaluation of this stage gives the number; `NAME/KIND` is that of one kind of prompt, and not looked
    into where only the prompts know their kinds."""
    from rlkit.tracking import HELD_OUT

    name = metric.removeprefix(HELD_OUT)
    column, _, last = name.rpartition("/")
    if last.removesuffix("_se") in {one.name for one in stage.also}:
        what = f"{metric!r} is measured at the two ends of stage {stage.name!r} alone."
        raise RecipeError(what, where=where, hint=f"Name one of the stage's own, such as {HELD_OUT}reward.")
    known = measured(stage)
    if known is None or name.removesuffix("_se") in known:
        return
    if column not in known:
        what = f"no evaluation of stage {stage.name!r} gives {metric!r}.{nearest(name, known)}"
        raise RecipeError(what, where=where, hint=f"It gives: {', '.join(HELD_OUT + one for one in known)}.")
    kinds = _kinds(stage.data)
    if kinds is not None and last not in kinds:
        what = f"no evaluation of stage {stage.name!r} gives {metric!r}.{nearest(last, kinds)}"
        raise RecipeError(what, where=where, hint=f"Its kinds of prompts: {', '.join(kinds)}.")


def check_compared(setup: Setup, metric: str, where: str) -> None:
    """That some stage which runs gives the number, at its last evaluation at least: what runs are compared by."""
    refused = None
    for stage in setup.stages:
        named = metric.removesuffix("_se").rpartition("/")
        own = f"{named[0]}" if named[2] in {one.name for one in stage.also} else metric
        try:
            _check_measured(stage, own, where)
        except RecipeError as error:
            refused = error
        else:
            return
    if refused is not None:
        raise refused


def _kinds(data: Any) -> tuple[str, ...] | None:
    """The kinds of the prompts that an evaluation samples; None: only the prompts know. The embedded world evaluates
    on all of a task's, whatever is trained on."""
    from rlkit.data.prompts import PairFile, WorldPrompts
    from rlkit.world import atlas, grammar, instructions

    if isinstance(data, PairFile) and data.held_out_split:
        return tuple(grammar.KINDS)
    if not isinstance(data, WorldPrompts):
        return None
    return tuple({"caption": grammar.KINDS, "agent": atlas.KINDS}.get(data.task) or instructions.kinds(data.task))


def _check_carry(stage: Stage, before: Stage | None) -> None:
    from rlkit.stages import Carry

    where = f"stages.{stage.name}.carry"
    if before is None:
        if stage.carry != Carry():
            raise RecipeError("the first stage has none before it.", where=where, hint="Leave it out.")
        return
    if stage.carry.weights == "ema" and before.learner.ema is None:
        what = f"stage {before.name!r} keeps no average of its weights."
        hint = f"Set stages.{before.name}.learner.ema, for instance to 0.99."
        raise RecipeError(what, where=f"{where}.weights", hint=hint)
    if stage.carry.optimizer and dict(stage.train) != dict(before.train):
        what = f"stage {before.name!r} trains other parts, or other weights of them: its moments are not of these."
        raise RecipeError(what, where=f"{where}.optimizer", hint="Leave it out, or train the same in both.")


__all__ = ["arranged", "check", "check_compared", "left_out", "measured", "running"]
