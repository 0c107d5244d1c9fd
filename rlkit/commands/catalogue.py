"""`rlkit list` and `rlkit describe`: what there is to name in a recipe, and what one of it takes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlkit import registry
from rlkit.errors import PluginError, RlkitError, nearest

KINDS = (*registry.KINDS, "recipes")


def list_arguments(parser: argparse.ArgumentParser) -> None:
    # Without one, argparse gives the default to `_kind`, which says what there is: its own message would not.
    parser.add_argument("kind", type=_kind, nargs="?", default="", metavar="KIND", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("--json", action="store_true")


def _kind(word: str) -> str:
    if word not in KINDS:
        what = f"there is no catalogue {word!r}.{nearest(word, KINDS)}" if word else "which catalogue?"
        raise argparse.ArgumentTypeError(f"{what} There are {', '.join(KINDS)}")
    return word


def list_one(options: argparse.Namespace) -> int:
    found = _catalogue(options.kind)
    if options.json:
        print(json.dumps(found, indent=2, default=str))
        return 0
    width = max((len(one["name"]) for one in found), default=0)
    for one in found:
        extra = f"  [pip install '{registry.DISTRIBUTION}[{one['extra']}]']" if one.get("extra") else ""
        source = "" if one["source"] == "built in" else f"  ({one['source']})"
        print(f"{one['name']:<{width}}  {one['summary']}{_facts(one)}{source}{extra}".rstrip())
    return 0


def _facts(one: Mapping[str, Any]) -> str:
    """What an algorithm or a backbone says of itself besides: paper, tasks, size, licence."""
    said = one.get("constants", {})
    if one["kind"] not in ("algorithms", "backbones"):
        return ""
    facts = [said.get("paper"), " and ".join(said.get("tasks", ())), said.get("parameters"), said.get("licence")]
    shown = "; ".join(fact for fact in facts if fact)
    return f"  ({shown})" if shown else ""


def _catalogue(kind: str) -> list[dict[str, Any]]:
    """Every entry of a kind as plain values, read without importing any."""
    if kind != "recipes":
        entries = [asdict(entry) for entry in registry.describe(kind)]
        return [{("options" if key == "fields" else key): value for key, value in one.items()} for one in entries]
    found = []
    for name, file in registry.recipes().items():
        summary = _opening(file).partition("\n")[0]
        found.append({"name": name, "kind": kind, "summary": summary, "source": "built in", "path": str(file)})
    return found


def _opening(file: Path) -> str:
    """The comment that a recipe begins with."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines).strip()


def describe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name")
    parser.add_argument("--json", action="store_true")


def describe(options: argparse.Namespace) -> int:
    everything = [one for kind in KINDS for one in _catalogue(kind)]
    found = [one for one in everything if one["name"] == options.name]
    if not found:
        names = [one["name"] for one in everything]
        hint = f"See rlkit list {'|'.join(KINDS)}"
        raise PluginError(f"nothing is called {options.name!r}.{nearest(options.name, names)}", hint=hint)
    for one in found:
        one["description"] = _description(one)
        if one["kind"] == "tools":
            one["arguments"] = _arguments(one["name"])
    if options.json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2, default=str))
        return 0
    for one in found:
        print(f"{one['name']} ({one['kind'].removesuffix('s')}, {one['source']})\n\n{one['description']}")
        if one["kind"] == "rewards":
            print("\n".join(["", "card:", *_card(one["constants"])]))
        if one["kind"] == "tools":
            print("\n".join(["", "an agent gives it:", *_given(one["arguments"])]))
        if one.get("options"):
            print("\noptions:")
        for option in one.get("options", ()):
            default = "" if option["default"] is None else f" = {option['default']}"
            doc = f"  {option['doc']}" if option["doc"] else ""
            print(f"  {option['name']}: {option['annotation']}{default}{doc}")
    return 0


def _card(constants: Mapping[str, Any]) -> list[str]:
    """What a reward says about itself, a line each."""
    low, high = constants.get("range") or (None, None)
    better = "more" if constants.get("higher_is_better", True) else "less"
    ends = ["any" if end is None else f"{end:g}" for end in (low, high)]
    lines = {
        "range": f"{ends[0]} to {ends[1]}, {better} is better",
        "reads": ", ".join(("image", *constants.get("reads", ()))),
        "looks at": ", ".join(constants.get("optional", ())),
        "components": ", ".join(constants.get("components", ())),
        "compares": "within a group" if constants.get("groupwise") else "",
        "gradient": "passes one to the picture" if constants.get("differentiable") else "",
        "protocol": constants.get("protocol", ""),
        "licence": constants.get("licence", ""),
        "weights": constants.get("size", ""),
    }
    return [f"  {name}: {text}" for name, text in lines.items() if text]


def _arguments(tool: str) -> dict[str, Any]:
    """What an agent gives it, as a JSON schema."""
    from rlkit.agents import schemas

    try:
        return schemas.schema(registry.load("tools", tool), tool).json
    except (RlkitError, ValueError) as error:  # a third party's that cannot be imported, or is no tool
        return {"error": str(error)}


def _given(schema: Mapping[str, Any]) -> list[str]:
    """Its arguments, a line each, as JSON schemas."""
    listed = schema.get("properties", schema)
    return [f"  {name}: {json.dumps(kind, ensure_ascii=False)}" for name, kind in listed.items()] or ["  nothing"]


def _description(one: Mapping[str, Any]) -> str:
    if one["kind"] == "recipes":
        return _opening(Path(one["path"]))
    import inspect

    try:
        entry = registry.load(one["kind"], one["name"])
        parts = (inspect.getdoc(entry), inspect.getdoc(inspect.getmodule(entry)))  # its file says the rest
        return "\n\n".join(part for part in parts if part) or one["summary"]
    except RlkitError:  # what it needs is not installed: its first line is known all the same
        return str(one["summary"])
