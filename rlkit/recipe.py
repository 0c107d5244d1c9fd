"""Recipes: composed values -> a checked `Setup`.

`resolve` builds the entries, so that a wrong name, option or type is found by the entry that owns it, and fills in the
defaults; `check` looks at what fits together, without any weights; `read` composes, resolves and checks, and a message
then begins with the file and line that caused it, or says that it was the command line.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlkit import recipe_course, recipe_parts, registry, sources
from rlkit.errors import RecipeError, RlkitError, nearest
from rlkit.recipe_fits import check, rows_per_step
from rlkit.sources import ENTRIES, TOP, Recipe, is_number, known

if TYPE_CHECKING:
    from rlkit.scoring import WeightedReward
    from rlkit.stages import PolicyOptions, Setup, Stage
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
    from rlkit.tracking import HELD_OUT

    where = f"stages.{name}"
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name):
        what = "a stage's name is of letters, digits, _ and -, and begins with a letter or _."
        raise RecipeError(what, where=where, hint="It stands in the names of files and columns, and in run.order.")
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
    if limit and limit.get("metric") is None:
        hint = f"Write for instance {{metric: {HELD_OUT}strict, above: 0.9}}."
        raise RecipeError("names no metric to end on.", where=at, hint=hint)
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


__all__ = ["check", "compose", "read", "resolve", "rows_per_step"]
