"""A policy of several parts in a recipe: what each is, which stage trains it and how, and what then cannot be asked.

policy:
  parts:
    captioner: {backbone: {name: tiny_captioner}}
    connector: {backbone: {name: projector}}
    generator: {backbone: {name: tiny}}
stages:
  cold_start:
    train: {captioner: {lora: {rank: 16}}, connector: {full: true}}     # a part that is not here is frozen
  understanding:
    train: {captioner: {lora: {rank: 16}, only: [v_proj]}}     # of its weights, those of such names
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlkit.errors import RecipeError, nearest

if TYPE_CHECKING:
    from rlkit.stages import Setup, Stage, Way
    from rlkit.weights import Lora

    Train = Lora | Literal["frozen"] | None
KINDS = {"tokens": "a captioner", "connection": "a connector", "flow": "a generator"}


def of_stage(
    name: str, node: Any, parts: Sequence[str], read: Callable[[Any, str], tuple[Lora | None, Any]]
) -> tuple[dict[str, Way], dict[str, Any]]:
    """(what a stage trains, and how; the same as YAML)."""
    from rlkit.stages import Way

    where = f"stages.{name}.train"
    if not parts:
        if node is not None:
            raise RecipeError("policy.train says what trains.", where=where, hint="Leave it out, or null.")
        return {}, {}
    if not isinstance(node, Mapping) or not any(one is not None for one in node.values()):
        hint = f"Write for instance {{{parts[0]}: {{lora: {{rank: 16}}}}}}; the other parts are frozen then."
        raise RecipeError("says which parts of the policy the stage trains.", where=where, hint=hint)
    found, plain = {}, {}
    for part, one in node.items():
        if part not in parts:
            what = f"the policy has no part {part!r}.{nearest(str(part), parts)}"
            raise RecipeError(what, where=f"{where}.{part}", hint=f"Its parts: {', '.join(parts)}.")
        if one is not None:
            given = dict(one) if isinstance(one, Mapping) else one
            only = given.pop("only", None) if isinstance(given, dict) else None
            words = _words(only, f"{where}.{part}.only")
            lora, way = read(given or {"full": True}, f"{where}.{part}")
            found[part], plain[part] = Way(lora, words), way | ({"only": list(words)} if words else {})
    return found, plain


def _words(node: Any, where: str) -> tuple[str, ...]:
    if node is None:
        return ()
    if not isinstance(node, list | tuple) or not node or not all(isinstance(one, str) and one for one in node):
        hint = "For instance [lm_head]."
        raise RecipeError(f"is a list of words in the names of weights, not {node!r}.", where=where, hint=hint)
    return tuple(node)


def trained(parts: Sequence[str], stages: Mapping[str, Mapping[str, Way]]) -> dict[str, Train]:
    """How each part is trained by any stage. RecipeError where two would train it in different ways."""
    ways: dict[str, Train] = dict.fromkeys(parts, "frozen")
    first: dict[str, str] = {}
    for stage, train in stages.items():
        for part, one in train.items():
            way = one.lora
            if part in first and ways[part] != way:
                what = f"stage {first[part]!r} trains the {part} in another way."
                hint = "One network has one set of weights: train it alike in both stages."
                raise RecipeError(what, where=f"stages.{stage}.train.{part}", hint=hint)
            ways[part] = way
            first.setdefault(part, stage)
    return ways


def check(setup: Setup) -> None:
    """That the parts make a policy. RecipeError."""
    parts = setup.policy.parts
    if not parts:
        for stage in setup.stages:
            if getattr(stage.rollout, "parts", False):
                what = "is for a policy of a captioner, a connector and a generator, and this one is of one network."
                raise RecipeError(what, where=f"stages.{stage.name}.rollout", hint="Give policy.parts, or use local.")
        return
    kinds = {name: getattr(part, "kind", "") for name, part in parts.items()}
    for kind, called in KINDS.items():
        found = [name for name, one in kinds.items() if one == kind]
        if len(found) != 1:
            what = f"a policy of parts has {called} (a backbone of the kind {kind}), one and no more; here are {found}."
            raise RecipeError(what, where="policy.parts")
    if setup.policy.resources.encoders == "offload":
        hint = "Use `free`, or `keep`: a generator's own encoders are not asked once the run has begun."
        raise RecipeError("is for policies of one network.", where="policy.encoders", hint=hint)
    for stage in setup.stages:
        _check_stage(stage, kinds)


def _check_stage(stage: Stage, kinds: Mapping[str, str]) -> None:
    where = f"stages.{stage.name}"
    if not getattr(stage.rollout, "parts", False):
        what = "samples from one network, and this policy is of three."
        raise RecipeError(what, where=f"{where}.rollout", hint="Use the rollout `relay`.")
    needs = stage.algorithm.needs()
    idle = [part for part in stage.train if needs.kind == "tokens" and kinds[part] != "tokens"]
    if idle:
        what = f"the algorithm trains words, and no gradient of theirs reaches the {idle[0]}."
        raise RecipeError(what, where=f"{where}.train.{idle[0]}", hint="Leave it out: it is frozen then.")
    for part in stage.learner.lr_of:
        if part not in stage.train:
            what = f"the stage does not train {part!r}.{nearest(part, stage.train)}"
            hint = f"It trains: {', '.join(stage.train)}."
            raise RecipeError(what, where=f"{where}.learner.lr_of.{part}", hint=hint)
