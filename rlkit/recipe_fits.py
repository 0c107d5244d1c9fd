"""What of a recipe fits together, looked at without any weights: kinds, what rewards read, sizes, gates, ages.

A rule that would otherwise be a sentence in the documentation is a refusal here, before anything runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlkit import recipe_course, recipe_parts, registry
from rlkit.errors import RecipeError, nearest

if TYPE_CHECKING:
    from rlkit.stages import Setup, Stage
    from rlkit.types import Needs


def check(setup: Setup) -> None:
    """Refuse what cannot work together, before anything is loaded."""
    recipe_parts.check(setup)
    for stage in setup.stages:
        _check_encoders(setup.policy.resources.encoders, stage)
    for stage in setup.every_stage():
        where = f"stages.{stage.name}"
        needs: Needs = stage.algorithm.needs()
        _check_kinds(setup.policy.backbone, stage, needs, where)
        _check_gives(stage, needs, where)
        _check_ages(stage, needs, where)
        _check_total(stage, where)
        _check_sizes(stage, needs, where)
    recipe_course.check(setup)


def _check_encoders(encoders: str, stage: Stage) -> None:
    from rlkit.data.prompts import WorldPrompts

    if encoders == "free" and isinstance(stage.data, WorldPrompts):
        what = f"the world's prompts (stage {stage.name!r}) have no end: they cannot all be encoded before encoders go."
        raise RecipeError(what, where="policy.encoders", hint="Use `offload`, or `keep`.")


def _check_kinds(backbone: Any, stage: Stage, needs: Needs, where: str) -> None:
    whole = [("policy.backbone", _kinds(backbone))] if backbone is not None else []
    for key, kinds in [*whole, (f"{where}.rollout", _kinds(stage.rollout))]:
        if kinds and needs.kind not in kinds:
            what = f"is for {' and '.join(kinds)}, but the algorithm of stage {stage.name!r} needs {needs.kind}."
            raise RecipeError(what, where=key, hint="Choose an algorithm and a policy of one kind.")


def _kinds(entry: Any) -> tuple[str, ...]:
    """Of a third party's entry that does not say, nothing is known."""
    one = getattr(entry, "kind", None)
    return getattr(entry, "kinds", ()) if one is None else (one,)


def _check_gives(stage: Stage, needs: Needs, where: str) -> None:
    gives = getattr(stage.rollout, "gives", ())
    lacking = [
        word for word in ("path", "log_prob", "previews", "preference") if getattr(needs, word) and word not in gives
    ]
    if lacking:
        what = f"the algorithm needs {' and '.join(lacking)} of each sample, which this rollout does not give."
        hint = f"It gives: {', '.join(gives)}." if gives else "It gives finished samples only."
        raise RecipeError(what, where=f"{where}.rollout", hint=hint)
    made = getattr(stage.rollout, "makes", ("text",) if needs.kind == "tokens" else ("image",))
    given = {*made, *getattr(stage.data, "gives", ("prompt",))}
    for word in getattr(stage.rollout, "reads", ()):
        if word not in given:
            what = f"reads {word!r}, which the data does not give."
            hint = f"It gives: {', '.join(sorted(given - set(made)))}."
            raise RecipeError(what, where=f"{where}.rollout", hint=hint)
    if "pair" in given and "pair" not in getattr(stage.rollout, "reads", ()):
        what = "samples by itself, and would not look at the pairs of pictures that the data gives."
        raise RecipeError(what, where=f"{where}.rollout", hint="The rollout `dataset` hands them out.")
    for reward in stage.rewards:
        reads = getattr(reward.reward, "reads", None)
        seen = {*(reads or ()), *getattr(reward.reward, "optional", ())}
        if "image" not in made and reads is not None and not {"text", "episode"} & seen:
            what = "judges a picture, and a token policy writes a text."
            raise RecipeError(what, where=f"{where}.rewards.{reward.name}", hint="Choose one that reads `text`.")
        for word in reads or ():
            if word not in given:
                what = f"reads {word!r}, which the data does not give."
                hint = f"It gives: {', '.join(sorted(given))}."
                raise RecipeError(what, where=f"{where}.rewards.{reward.name}", hint=hint)
    if not stage.rewards and needs.rewards:
        hint = f"Write for instance {{NAME: 1.0}}; known: {', '.join(registry.names('rewards'))}."
        raise RecipeError("a stage needs a reward.", where=f"{where}.rewards", hint=hint)
    if needs.rewards and not any(reward.weight for reward in stage.rewards):
        raise RecipeError("all weights are 0: nothing would be learned.", where=f"{where}.rewards")
    counted = [one for one in stage.rewards if one.weight]  # at weight 0 a reward is only looked at
    blind = [one.name for one in counted if not getattr(one.reward, "differentiable", False)]
    if needs.differentiable and blind:
        what = "passes no gradient back to the picture, which the algorithm needs."
        hint = "Use a reward that says `differentiable = True`, or another algorithm."
        raise RecipeError(what, where=f"{where}.rewards.{blind[0]}", hint=hint)
    for key, chosen in (("anchor", stage.anchor), ("evaluate.weights", stage.evaluate.weights)):
        if chosen == "ema" and stage.learner.ema is None:
            hint = f"Set {where}.learner.ema, for instance to 0.99."
            raise RecipeError("there is no average of the weights to refer to.", where=f"{where}.{key}", hint=hint)


def _check_ages(stage: Stage, needs: Needs, where: str) -> None:
    """Answers of older weights must be weighed for that, or training is biased and nothing shows it."""
    ahead = getattr(stage.rollout, "ahead", 0)
    if ahead and not needs.corrects:
        what = f"ahead: {ahead} samples with older weights than those that learn, and the algorithm corrects for none."
        options = getattr(stage.algorithm, "__dataclass_fields__", {})
        cure = f"Set {where}.algorithm.importance: truncate, or" if "importance" in options else "Set"
        raise RecipeError(what, where=f"{where}.rollout.ahead", hint=f"{cure} ahead: 0.")


def _check_total(stage: Stage, where: str) -> None:
    """That the total can be formed of these rewards, and that the advantage does not need their sum's parts."""
    if stage.total.plain:
        return
    counted = [one for one in stage.rewards if one.weight]
    if getattr(stage.algorithm, "advantage", None) == "gdpo":
        what = "gdpo compares each reward by itself, so it never sees a total that is more than their sum."
        raise RecipeError(what, where=f"{where}.total", hint=f"Leave out {where}.algorithm.advantage, or the total.")
    for one in counted:
        if stage.total.form != "sum" and one.bounds[0] < 0:
            what = f"{stage.total.form} needs numbers of 0 and more, and {one.name} goes down to {one.bounds[0]:g}."
            hint = f"Set {where}.rewards.{one.name}.shift and .scale, or .clip: [0.0, 1.0]."
            raise RecipeError(what, where=f"{where}.total.form", hint=hint)
        if stage.total.form != "sum" and one.weight < 0:
            hint = "A weight is an exponent here."
            raise RecipeError("must be above 0.", where=f"{where}.rewards.{one.name}.weight", hint=hint)
    parts = {one.name: getattr(one.reward, "components", None) for one in stage.rewards if one.when == "always"}
    for i, gate in enumerate(stage.total.gates):
        name, _, part = gate.column.partition("/")
        known = [*parts, *(f"{one}/{each}" for one, own in parts.items() for each in own or ())]
        undeclared = part and name in parts and parts[name] is None  # a reward that does not list its components
        if gate.column not in known and not undeclared:
            what = f"no reward or component named {gate.column!r} is scored in training.{nearest(gate.column, known)}"
            raise RecipeError(what, where=f"{where}.total.gates[{i}].when", hint=f"Known: {', '.join(known)}.")


def _check_sizes(stage: Stage, needs: Needs, where: str) -> None:
    if stage.data.group < needs.group:
        what = f"must be {needs.group} or more, not {stage.data.group}: rewards are compared within a group."
        raise RecipeError(what, where=f"{where}.data.group")
    if needs.path:
        _check_window(stage, needs, where)
    rows = rows_per_step(stage)
    batch = stage.learner.batch
    if rows is not None and rows % batch:
        divisors = [size for size in range(1, rows + 1) if rows % size == 0]
        near = {max(d for d in divisors if d < batch), min((d for d in divisors if d > batch), default=rows)}
        what = f"{batch} does not divide the {rows} rows of a step ({_counted(stage, needs)})."
        hint = f"Use {' or '.join(map(str, sorted(near)))}."
        raise RecipeError(what, where=f"{where}.learner.batch", hint=hint)


def _check_window(stage: Stage, needs: Needs, where: str) -> None:
    steps = stage.rollout.steps
    if needs.window is None and needs.last_start:
        hint = f"Give {where}.algorithm.window too."
        raise RecipeError("a window that moves (window_start) needs a length.", where=f"{where}.algorithm", hint=hint)
    if needs.window is None and steps < 2:
        what = f"{steps} sampling step leaves none to record: the last one is not."
        raise RecipeError(what, where=f"{where}.rollout.steps", hint="Use 2 or more.")
    last = needs.last_start + (needs.window or 1)
    if last > steps:
        what = (
            f"window: {needs.window} steps from {needs.last_start} on (window_start) end after step {steps}, the last."
        )
        hint = f"Start it at {max(0, steps - (needs.window or 1))} or before, or raise {where}.rollout.steps."
        raise RecipeError(what, where=f"{where}.algorithm", hint=hint)


def rows_per_step(stage: Stage) -> int | None:
    """How many rows a training step gives to the learner; None where only the algorithm knows."""
    needs: Needs = stage.algorithm.needs()
    prompts, group = stage.data.per_step, stage.data.group
    if needs.pairs is not None:
        return int(prompts * needs.pairs)
    if needs.rows is not None:
        return int(prompts * group * needs.rows)
    return int(prompts * group * _recorded(stage, needs)) if needs.path else None


def _counted(stage: Stage, needs: Needs) -> str:
    """How `rows_per_step` comes about."""
    prompts = f"{stage.data.per_step} prompts"
    if needs.pairs is not None:
        return f"{prompts} x {needs.pairs} pairs"
    if needs.rows is not None:
        return f"{prompts} x {stage.data.group} x {needs.rows} rows a sample"
    return f"{prompts} x {stage.data.group} x {_recorded(stage, needs)} recorded steps"


def _recorded(stage: Stage, needs: Needs) -> int:
    return needs.trained(int(needs.window or stage.rollout.steps - 1))


__all__ = ["check", "rows_per_step"]
