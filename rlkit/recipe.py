"""Recipes: composed values -> a checked `Setup`.

`resolve` builds the entries, so that a wrong name, option or type is found by the entry that owns it, and fills in the
defaults; `check` looks at what fits together, without any weights; `read` composes, resolves and checks, and a message
then begins with the file and line that caused it, or says that it was the command line.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlkit import recipe_course, recipe_parts, registry, sources
from rlkit.errors import RecipeError, RlkitError, nearest
from rlkit.sources import ENTRIES, TOP, Recipe, is_number, known

if TYPE_CHECKING:
    from rlkit.scoring import WeightedReward
    from rlkit.stages import PolicyOptions, Setup, Stage
    from rlkit.types import Needs
    from rlkit.weights import Lora

STAGE = (
    *(*ENTRIES, "rewards", "total", "learner", "evaluate", "monitors", "train"),
    *("steps", "until", "carry", "anchor", "expect"),
)
REQUIRED = (*ENTRIES, "rewards", "learner", "steps")  # `rewards: {}` says that there are none


def read(name_or_path: str, overrides: Sequence[str] = ()) -> Setup:
    """The recipe, composed, resolved and checked. Every error says where its cause was written."""
    composed = sources.compose(name_or_path, overrides)
    try:
        setup = resolve(composed.values)
        check(setup)
    except RlkitError as error:
        error.where = composed.place(error)
        raise
    return setup


def compose(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The merged recipe as plain values. Only its shape is known to be right: entries are looked up by `resolve`."""
    return sources.compose(name_or_path, overrides).values


# ------------------------------------------------------------------------------------------------- resolving


@dataclass(frozen=True)
class _Numbers:
    """What a stage says about itself, beside its entries."""

    steps: int
    anchor: Literal["base", "stage_start", "ema"] = "base"
    expect: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, not {self.steps}")


def resolve(recipe: Mapping[str, Any]) -> Setup:
    """The recipe with every entry built and every default filled in. `Setup.recipe` resolves to the same again."""
    from rlkit.stages import RunOptions, Setup

    known(recipe, TOP)
    options = registry.construct(RunOptions, _mapping(recipe.get("run"), "run"), "run", what="run")
    policy, plain_policy = _policy(_mapping(recipe.get("policy"), "policy"))
    stages = _mapping(recipe.get("stages"), "stages")
    built = [_stage(str(name), stage, tuple(policy.parts)) for name, stage in stages.items() if stage is not None]
    if not built:
        raise RecipeError("a recipe needs a stage.", where="stages", hint="One alone is called main.")
    order = recipe_course.arranged([stage for stage, _ in built], options.order)
    ways = recipe_parts.trained(tuple(policy.parts), {stage.name: stage.train for stage in order})
    policy = dataclasses.replace(policy, train=ways)
    plain = {"run": _plain(options), "policy": plain_policy, "stages": {stage.name: one for stage, one in built}}
    return Setup(options=options, policy=policy, stages=order, recipe=plain)


def _policy(node: Mapping[str, Any]) -> tuple[PolicyOptions, Recipe]:
    from rlkit.resources import Resources
    from rlkit.stages import PolicyOptions

    means = [one.name for one in dataclasses.fields(Resources)]
    said = ("guidance", "negative", "checkpointing", *means)
    parts = _mapping(node.get("parts"), "policy.parts")
    if parts and node.get("backbone") is not None:
        hint = "Leave out policy.backbone and policy.train (~policy.backbone), or policy.parts."
        raise RecipeError("a policy is of one backbone or of several parts.", where="policy.parts", hint=hint)
    known(node, ("parts", *said) if parts else ("backbone", "train", "conditions", "parts", *said), "policy")
    backbone, lora, whole = None, None, {}
    if not parts:
        backbone, plain = _entry("backbones", node.get("backbone"), "policy.backbone")
        lora, train = _train(_mapping(node.get("train"), "policy.train"), "policy.train")
        whole = {"backbone": plain, "train": train}
    built, several = _parts(parts)
    guidance = 1.0 if node.get("guidance") is None else node["guidance"]
    if not is_number(guidance) or not math.isfinite(guidance) or guidance < 0:
        what = f"must be a number, 0 or more, not {guidance!r}."
        raise RecipeError(what, where="policy.guidance", hint="1 is none; Stable Diffusion 3.5 is used with 4.5.")
    negative = "" if node.get("negative") is None else node["negative"]
    if not isinstance(negative, str):
        raise RecipeError(f"must be a text, not {negative!r}.", where="policy.negative")
    if negative and guidance == 1:
        hint = "Set policy.guidance too; at 1 nothing is compared with it."
        raise RecipeError("a negative prompt needs guidance.", where="policy.negative", hint=hint)
    checkpointing = False if node.get("checkpointing") is None else node["checkpointing"]
    if not isinstance(checkpointing, bool):
        raise RecipeError(f"must be true or false, not {checkpointing!r}.", where="policy.checkpointing")
    conditions = node.get("conditions")
    if conditions is not None and not isinstance(conditions, str):
        raise RecipeError(f"must be a folder, not {conditions!r}.", where="policy.conditions")
    given = {name: node[name] for name in means if node.get(name) is not None}
    resources: Resources = registry.construct(Resources, given, "policy", what="policy")
    if resources.conditions_in_memory is not None and conditions is None:
        hint = "Set policy.conditions to a folder, from which the others come back."
        raise RecipeError("needs a shelf.", where="policy.conditions_in_memory", hint=hint)
    options = PolicyOptions(backbone, lora, float(guidance), negative, checkpointing, conditions, resources, built)
    numbers = {"guidance": options.guidance, "negative": negative, "checkpointing": checkpointing}
    kept = {} if parts else {"conditions": conditions}
    return options, {**({"parts": several} if parts else whole), **numbers, **kept, **_plain(resources)}


def _parts(node: Mapping[str, Any]) -> tuple[dict[str, Any], Recipe]:
    """The backbones of a policy's parts, by the names that the recipe gives them."""
    built, plain = {}, {}
    for name, part in node.items():
        where = f"policy.parts.{name}"
        part = _mapping(part, where)
        known(part, ("backbone",), where)
        built[str(name)], own = _entry("backbones", part.get("backbone"), f"{where}.backbone")
        plain[str(name)] = {"backbone": own}
    return built, plain


def _train(node: Any, where: str) -> tuple[Lora | None, Recipe]:
    """(LoRA, or None for all weights; the same as YAML)."""
    from rlkit.weights import Lora

    node = _mapping(node, where)
    known(node, ("full", "lora"), where)
    full, lora = node.get("full"), node.get("lora")
    if node and (full not in (None, True, False) or (full is True) == (lora is not None)):
        hint = "Write one of {full: true} and {lora: {rank: 16}}."
        raise RecipeError("either all weights train or LoRA does.", where=where, hint=hint)
    if lora is None:
        return None, {"full": True}
    adapters = registry.construct(Lora, _mapping(lora, f"{where}.lora"), f"{where}.lora", what="lora")
    return adapters, {"lora": _plain(adapters)}


def _stage(name: str, node: Any, parts: Sequence[str]) -> tuple[Stage, Recipe]:
    from rlkit.learner import LearnerOptions
    from rlkit.monitors.watch import Monitors
    from rlkit.stages import Carry, Evaluation, Stage, Until
    from rlkit.total import Total

    where = f"stages.{name}"
    node = _mapping(node, where)
    for key in ("policy", "backbone"):
        if key in node:
            hint = "Set policy.backbone for the run, or begin a second one there (policy.backbone.path: RUN/weights)."
            raise RecipeError("all stages train one network.", where=f"{where}.{key}", hint=hint)
    known(node, STAGE, where)
    train, plain_train = recipe_parts.of_stage(name, node.get("train"), parts, _train)
    lacking = [key for key in REQUIRED if node.get(key) is None]
    if lacking:
        raise RecipeError(f"a stage needs {', '.join(lacking)}.", where=where)
    data, plain_data = _entry("data", node.get("data"), f"{where}.data")
    rollout, plain_rollout = _entry("rollouts", node.get("rollout"), f"{where}.rollout")
    algorithm, plain_algorithm = _entry("algorithms", node.get("algorithm"), f"{where}.algorithm")
    rewards, plain_rewards = _rewards(node.get("rewards"), f"{where}.rewards")
    at = f"{where}.total"
    total = registry.construct(Total, _mapping(node.get("total"), at), at, what="total")
    at = f"{where}.learner"
    learner = registry.construct(LearnerOptions, _mapping(node.get("learner"), at), at, what="learner")
    at = f"{where}.evaluate"
    evaluate = registry.construct(Evaluation, _mapping(node.get("evaluate"), at), at, what="evaluate")
    at = f"{where}.monitors"
    said = _mapping(node.get("monitors"), at)
    off = "monitors" in node and node["monitors"] is None
    monitors = Monitors.none() if off else registry.construct(Monitors, said, at, what="monitors")
    at = f"{where}.until"
    limit = _mapping(node.get("until"), at)
    until = registry.construct(Until, limit, at, what="until") if limit else None
    at = f"{where}.carry"
    carry = registry.construct(Carry, _mapping(node.get("carry"), at), at, what="carry")
    given = {key: node[key] for key in ("steps", "anchor", "expect") if node.get(key) is not None}
    numbers: _Numbers = registry.construct(_Numbers, given, where, what=f"stage {name!r}")
    stage = Stage(
        name=name,
        data=data,
        rollout=rollout,
        algorithm=algorithm,
        rewards=rewards,
        learner=learner,
        evaluate=evaluate,
        steps=numbers.steps,
        until=until,
        carry=carry,
        anchor=numbers.anchor,
        total=total,
        monitors=monitors,
        train=train,
    )
    return stage, {
        **({"train": plain_train} if parts else {}),
        "data": plain_data,
        "rollout": plain_rollout,
        "algorithm": plain_algorithm,
        "rewards": plain_rewards,
        "total": _plain(total),
        "learner": _plain(learner),
        "evaluate": _plain(evaluate),
        "monitors": _plain(monitors),
        "steps": numbers.steps,
        "until": _plain(until),
        "carry": _plain(carry),
        "anchor": numbers.anchor,
        "expect": dict(numbers.expect),
    }


def _entry(kind: str, node: Any, where: str) -> tuple[Any, Recipe]:
    """A name with its options -> (the entry, all its options as YAML)."""
    from rlkit.data.prompts import DATA

    node = {"name": node} if isinstance(node, str) else _mapping(node, where)
    name = node.get("name")
    if not isinstance(name, str) or not name:
        known = ", ".join(DATA if kind == "data" else registry.names(kind))
        raise RecipeError("needs a name.", where=where, hint=f"Known: {known}.")
    options = {key: value for key, value in node.items() if key != "name"}
    if kind != "data":
        entry = registry.build(kind, name, options, where)
    elif name in DATA:
        entry = registry.construct(DATA[name], options, where, what=f"data {name!r}")
    else:
        hint = f"Known: {', '.join(DATA)}."
        raise RecipeError(f"no data named {name!r}.{nearest(name, DATA)}", where=where, hint=hint)
    return entry, {"name": name, **(_plain(entry) if dataclasses.is_dataclass(entry) else options)}


@dataclass(frozen=True)
class _Use:
    """What a recipe may say of a reward beside the reward's own options."""

    reward: str | None = None  # of the catalogue; None: the one of this name
    weight: float | None = None  # None: 1, or 0 for evaluation alone
    when: Literal["always", "evaluation"] = "always"
    shift: float = 0.0
    scale: float = 1.0
    clip: tuple[float, float] | None = None
    batch: int | None = None
    workers: int = 1
    processes: bool = False
    timeout: float | None = None
    retries: int = 0
    ahead: bool = False
    cache: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("shift", self.shift), ("scale", self.scale)):
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, not {value}")
        if self.when == "evaluation" and self.weight:
            raise ValueError("when: evaluation is for what is watched, so its weight is 0. Leave the weight out")
        if self.scale == 0:
            raise ValueError("scale must not be 0. A reward of weight 0 is watched and counts for nothing")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip must be [least, most], not {list(self.clip)}")


def _rewards(node: Any, where: str) -> tuple[tuple[WeightedReward, ...], Recipe]:
    from rlkit.scorer import Asking
    from rlkit.scoring import WeightedReward

    ours = {one.name for one in dataclasses.fields(_Use)}
    rewards, plain = [], {}
    for name, value in _mapping(node, where).items():
        if value is None:
            continue
        at = f"{where}.{name}"
        if not isinstance(value, Mapping) and not is_number(value):
            hint = "Write NAME: 1.0 or NAME: {weight: 1.0, OPTION: VALUE}."
            raise RecipeError(f"must be a number or a mapping, not {value!r}.", where=at, hint=hint)
        given = {"weight": value} if is_number(value) else dict(value)
        said = {key: given.pop(key) for key in list(given) if key in ours}
        use: _Use = registry.construct(_Use, said, at, what=name)
        reward = registry.build("rewards", use.reward or name, given, at)
        options = () if inspect.isroutine(reward) else inspect.signature(type(reward)).parameters
        taken = [one for one in options if one in ours]
        if taken:
            what = f"{use.reward or name} has an option {taken[0]!r}, a word by which every recipe means its own."
            raise RecipeError(what, where=at, hint=f"Rename it in the reward. Such words: {', '.join(sorted(ours))}.")
        asked = {one.name: getattr(use, one.name) for one in dataclasses.fields(Asking)}
        asking = registry.construct(Asking, asked, at, what=name)
        weight = use.weight if use.weight is not None else float(use.when == "always")
        if not math.isfinite(weight):
            raise RecipeError(f"must be a finite number, not {weight}.", where=f"{at}.weight")
        numbers = (use.when, use.shift, use.scale, use.clip)
        rewards.append(WeightedReward(name, reward, weight, *numbers, asking, use.reward or ""))
        own = _plain(reward) if dataclasses.is_dataclass(reward) else given
        changed = {key: one for key, one in _plain(use).items() if key != "weight" and one != getattr(_Use, key)}
        plain[name] = {"weight": weight, **changed, **own}
    return tuple(rewards), plain


# -------------------------------------------------------------------------------------------------- checking


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


# --------------------------------------------------------------------------------------------------- shapes


def _mapping(node: Any, where: str) -> Mapping[str, Any]:
    if node is None:
        return {}
    if not isinstance(node, Mapping):
        raise RecipeError(f"must be a mapping, not {node!r}.", where=where, hint="Write key: value below it.")
    return node


def _plain(value: Any) -> Any:
    """A dataclass, a tuple or a path as YAML has it."""
    if dataclasses.is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value) if one.init}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
