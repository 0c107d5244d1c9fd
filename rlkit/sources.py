"""Where the values of a recipe come from: YAML files, what they extend, and `key=value` on the command line.

Hydra's Compose API merges them. Three rules are ours. An option belongs to the name it was written beside: whoever
changes `algorithm.name` starts from the new entry's defaults. `null` takes a stage or a reward away. The command line
may set any key, whether or not a file did. What a key means is not known here; where it was written is, so that an
error found later can say it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit import registry
from rlkit.errors import RecipeError, RlkitError, nearest

if TYPE_CHECKING:
    import yaml

Keys = tuple[str, ...]
Recipe = dict[str, Any]

TOP = ("run", "policy", "stages")
ENTRIES = ("data", "rollout", "algorithm")  # of a stage: a name with options
COMMAND_LINE = "command line"


def is_override(word: str) -> bool:
    """Whether a word of a command line changes a key, and names no recipe."""
    return bool(re.match(r"[~+]*[^\s=/]+=|~", word))


def refuse_key_alone(word: str) -> None:
    """RecipeError for a word that stands where a recipe does, and is a key that lacks its value."""
    if re.match(rf"({'|'.join(TOP)})\.", word) and not word.endswith((".yaml", ".yml")) and not Path(word).exists():
        raise RecipeError(f"{word!r} is a key, and lacks its =value.", where=COMMAND_LINE, hint=f"Write {word}=VALUE")


def find(name_or_path: str) -> Path:
    """The file of a recipe: a built-in one by its name, or any file by its path."""
    built_in = registry.recipes()
    if name_or_path in built_in:
        return built_in[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        hint = "Name a recipe, or a file in it; to go on with a run: rlkit train --resume DIR"
        raise RecipeError(f"{name_or_path} is a folder.", hint=hint)
    refuse_key_alone(name_or_path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        beside = [str(one) for one in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
        raise RecipeError(f"there is no file {name_or_path!r}.{nearest(str(path), [*beside, *built_in])}")
    hint = f"Known: {', '.join(built_in) or 'none'}. A recipe of your own is given as a path: ./{name_or_path}.yaml"
    raise RecipeError(f"no recipe named {name_or_path!r}.{nearest(name_or_path, built_in)}", hint=hint)


# ------------------------------------------------------------------------------------------------- composing


@dataclass(frozen=True)
class Source:
    """One file, or the command line, with the line of every key in it."""

    name: str
    values: Recipe
    lines: Mapping[Keys, int] = field(default_factory=dict)  # 0 where there are no lines

    def place(self, path: Keys, where: str) -> str:
        line = self.lines.get(path)
        return ": ".join(part for part in (f"{self.name}:{line}" if line else self.name, where) if part)


@dataclass(frozen=True)
class Composed:
    """Plain values, and the sources that they were merged from, the last one winning."""

    values: Recipe
    sources: tuple[Source, ...]

    def place(self, error: RlkitError) -> str:
        """`file:line: key` of what caused an error, or `command line: key`. Of several who wrote it, the last.

        The cause is the key that the error names as its place, or an option below it that its text names, or one that
        its hint would change."""
        path = _split(error.where, self.values) if error.where else ()
        holder = _at(self.values, path)
        quoted = re.findall(r"'([^']+)'", error.what)[:1]  # an unknown option
        words = [one for one in re.findall(r"\w+", error.what) if isinstance(holder, dict) and one in holder]
        named = [(*path, one) for one in (*quoted, *words)]
        named += [_split(one.rstrip("."), self.values) for one in error.hint.split() if one.startswith("stages.")]
        named += [] if isinstance(holder, dict) else [path]
        for source in reversed(self.sources):
            for one in named:
                if one in source.lines:
                    return source.place(one, error.where)
        depth, owner = max((_depth(path, source), i) for i, source in enumerate(self.sources))
        recipe = self.sources[-2]  # the one that was asked for; the last is the command line
        return self.sources[owner].place(path[:depth], error.where) if depth else recipe.place((), error.where)


def _depth(path: Keys, source: Source) -> int:
    """How much of a path this source writes."""
    return next((n for n in range(len(path), 0, -1) if path[:n] in source.lines), 0)


def compose(name_or_path: str, overrides: Sequence[str]) -> Composed:
    """The files of a recipe and the command line, merged."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    files = list(_files(find(name_or_path), ()))
    written = OmegaConf.to_container(OmegaConf.merge(*_own_options(files)), resolve=False)
    assert isinstance(written, dict)  # the files are mappings
    added, removed = _overlay(overrides, {str(key): value for key, value in written.items()}, files)
    sources = (*files, added)
    merged = _merge(sources)
    OmegaConf.set_struct(merged, False)
    for path in removed:
        holder = merged
        for part in path[:-1]:
            holder = holder[part]
        del holder[path[-1]]
    try:
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = Composed({}, sources).place(RecipeError("", where=error.full_key or ""))
        raise RecipeError(f"cannot be filled in: {_reason(error)}.", where=where) from error
    assert isinstance(plain, dict)
    return Composed({str(key): value for key, value in plain.items()}, sources)


def _reason(error: Exception) -> str:
    absent = re.search(r"Interpolation key '(.+?)' not found", str(error))
    return f"there is no {absent[1]!r}" if absent else str(error).splitlines()[0].rstrip(".")


def _files(path: Path, children: tuple[Path, ...]) -> Iterator[Source]:
    """This file and what it extends, in the order of merging: the last one wins."""
    name, place = _shown(path), path.resolve()
    if place in children:
        raise RecipeError("this recipe extends itself.", where=name, hint="Take the name out of its defaults.")
    values, lines = _parse(path)
    parents = values.pop("defaults", None) or []
    if not isinstance(parents, list) or not all(isinstance(one, str) for one in parents):
        hint = "Write for instance defaults: [quickstart, _self_]"
        raise RecipeError("must be a list of recipes.", where=f"{name}:{lines[('defaults',)]}: defaults", hint=hint)
    if "program" in values and "parameters" in values:
        raise RecipeError("this is a sweep, and no recipe.", where=name, hint=f"Run it with rlkit sweep {name}")
    try:
        known(values, TOP)
    except RecipeError as error:
        error.where = f"{name}:{lines[(error.where,)]}: {error.where}"
        raise
    for parent in parents if "_self_" in parents else [*parents, "_self_"]:
        if parent == "_self_":
            yield Source(name, _spelled_out(values), lines)
            continue
        try:
            file = _parent(parent, path.parent)
        except RecipeError as error:
            error.where = f"{name}:{lines[('defaults',)]}: defaults"
            raise
        yield from _files(file, (*children, place))


def _parent(name: str, folder: Path) -> Path:
    """What a file in `folder` extends under this name: a built-in recipe, or a file beside it."""
    beside = folder / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if name not in registry.recipes() and beside.is_file():
        return beside
    return find(str(beside) if "/" in name or beside.name == name else name)


def _parse(path: Path) -> tuple[Recipe, dict[Keys, int]]:
    """A file's values, and the line of each key. OmegaConf reads 1e-4 as a number, which plain YAML does not."""
    import yaml
    from omegaconf import OmegaConf

    name = _shown(path)
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if tree is None or not isinstance(tree, yaml.MappingNode):
            raise RecipeError("a recipe has keys and values.", where=name, hint=f"Its keys: {', '.join(TOP)}.")
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise RecipeError(f"this is not YAML: {error.problem or error.context}.", where=where) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot be read: {error}.", where=name) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}, dict(_lines(tree, (), name))


def _lines(node: yaml.Node, above: Keys, name: str) -> Iterator[tuple[Keys, int]]:
    from yaml import MappingNode

    if isinstance(node, MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"):
                raise RecipeError(f"the key {key.value} is no text.", where=f"{name}:{line}", hint="Put it in quotes.")
            yield (*above, str(key.value)), line
            yield from _lines(value, (*above, str(key.value)), name)


def _spelled_out(values: Recipe) -> Recipe:
    """`algorithm: NAME` and `rewards: {NAME: weight}` in their long form, so that merging keeps what lies beside."""
    values = {**values}
    if isinstance(policy := values.get("policy"), dict) and isinstance(policy.get("backbone"), str):
        values["policy"] = {**policy, "backbone": {"name": policy["backbone"]}}
    elif isinstance(policy, dict) and isinstance(parts := policy.get("parts"), dict):
        values["policy"] = {**policy, "parts": {name: _spelled_out_part(part) for name, part in parts.items()}}
    if isinstance(stages := values.get("stages"), dict):
        values["stages"] = {name: _spelled_out_stage(stage) for name, stage in stages.items()}
    return values


def _spelled_out_part(part: Any) -> Any:
    short = isinstance(part, dict) and isinstance(part.get("backbone"), str)
    return {**part, "backbone": {"name": part["backbone"]}} if short else part


def _spelled_out_stage(stage: Any) -> Any:
    if not isinstance(stage, dict):
        return stage
    stage = {key: {"name": one} if key in ENTRIES and isinstance(one, str) else one for key, one in stage.items()}
    if isinstance(rewards := stage.get("rewards"), dict):
        stage["rewards"] = {name: {"weight": one} if is_number(one) else one for name, one in rewards.items()}
    return stage


def _merge(sources: Sequence[Source]) -> Any:
    """All sources in one, the last one winning, as an OmegaConf config."""
    import hydra
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    names = [f"rlkit_source_{i}" for i in range(len(sources))]
    for name, values in zip(names, _own_options(sources), strict=True):
        store.store(name=name, node=values)
    store.store(name="rlkit_recipe", node={"defaults": [*names, "_self_"]})
    with hydra.initialize_config_module("rlkit.recipes", version_base="1.3"):
        return hydra.compose("rlkit_recipe")


def _own_options(sources: Sequence[Source]) -> list[Recipe]:
    """The values of each source, without the options of entries whose name a later source changes."""
    everything = [_copy(source.values) for source in sources]
    for i, values in enumerate(everything):
        for path, choice in _choices(values):
            earlier = [name for one in everything[:i] for at, name in _choices(one) if at == path]
            if earlier and earlier[-1] != choice:
                for one in everything[:i]:
                    if isinstance(holder := _at(one, path[:-1]), dict):
                        holder.pop(path[-1], None)
    return everything


def _choices(values: Recipe) -> Iterator[tuple[Keys, str]]:
    """Where this source chooses between entries, or between training all weights and LoRA, and what it chooses."""
    train = _at(values, ("policy", "train"))
    for key in train if isinstance(train, dict) else ():
        if train[key] is not None and train[key] is not False:
            yield ("policy", "train"), str(key)
    stages = values.get("stages")
    places = [("stages", str(stage), key) for stage in (stages if isinstance(stages, dict) else ()) for key in ENTRIES]
    parts = _at(values, ("policy", "parts"))
    ours = [("policy", "parts", str(part), "backbone") for part in (parts if isinstance(parts, dict) else ())]
    for path in [("policy", "backbone"), *ours, *places]:
        entry = _at(values, path)
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            yield path, entry["name"]


def _overlay(overrides: Sequence[str], recipe: Recipe, files: Sequence[Source]) -> tuple[Source, list[Keys]]:
    """The command line as a source, and the keys that it removes. Whether the last part of a key exists is
    for the entry to say, which knows its options."""
    values: Recipe = {}
    removed = []
    for text in overrides:
        if text.startswith("~"):
            removed.append(_present(text[1:], recipe))
            continue
        key, equals, value = text.lstrip("+").partition("=")
        if not equals or not key:
            raise RecipeError(f"{text!r} is not key=value.", where=COMMAND_LINE, hint="For instance run.seed=1")
        path = _split(key, recipe)
        _check_beginning(key, path, recipe)
        _check_stage(key, path, values, recipe, files)
        _put(values, path, value_of(key, value))
    return Source(COMMAND_LINE, _spelled_out(values), dict.fromkeys(_paths(values), 0)), removed


def _put(values: Recipe, path: Keys, new: Any) -> None:
    for part in path[:-1]:
        if not isinstance(values.setdefault(part, {}), dict):
            values[part] = {}
        values = values[part]
    old = values.get(path[-1])
    values[path[-1]] = {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new


def _check_beginning(key: str, path: Keys, recipe: Recipe) -> None:
    if path[0] not in TOP:
        ends = {one[-1]: ".".join(one) for one in sorted(_paths(recipe), key=len, reverse=True)}  # the shortest wins
        close = nearest(path[-1], ends).rpartition(" ")[2].strip("'?")
        near = f" Did you mean {ends[close]!r}?" if close else ""
        raise RecipeError(f"no key {key!r}.{near}", where=COMMAND_LINE, hint=f"A key begins with {', '.join(TOP)}.")


def _check_stage(key: str, path: Keys, given: Recipe, recipe: Recipe, files: Sequence[Source]) -> None:
    """That a key below a stage is of one that there is, and that nobody has switched off. given: by words before it."""
    if path[0] != "stages" or len(path) < 3:
        return
    here, there = (one if isinstance(one := values.get("stages"), dict) else {} for values in (given, recipe))
    stages = {**there, **here}
    known = [name for name, stage in stages.items() if stage is not None]
    hint = f"Stages: {', '.join(known)}." if known else "All stages are switched off."
    if path[1] not in stages:
        raise RecipeError(f"{key}: no stage {path[1]!r}.{nearest(path[1], known)}", where=COMMAND_LINE, hint=hint)
    if path[1] not in known:
        writers = [one.place(path[:2], "") for one in files if path[:2] in one.lines]  # the last has the last word
        by = "an earlier word" if path[1] in here else (writers or ["the recipe"])[-1]
        what = f"{key}: stage {path[1]!r} is switched off (null) by {by}."
        raise RecipeError(what, where=COMMAND_LINE, hint=hint)


def _present(key: str, recipe: Recipe) -> Keys:
    path = _split(key.partition("=")[0], recipe)
    if path not in set(_paths(recipe)):
        near = nearest(key, [".".join(one) for one in _paths(recipe)])
        raise RecipeError(f"~{key} removes a key that is not there.{near}", where=COMMAND_LINE)
    return path


def _split(key: str, recipe: Any) -> Keys:
    """A dotted key as its parts. A name that has dots itself (a reward `package.module:Class`) stays one part."""
    parts = key.split(".")
    path: list[str] = []
    while parts:
        own = next((n for n in range(1, len(parts) + 1) if ":" in parts[n - 1]), 1) if path[-1:] == ["rewards"] else 1
        fitting = [n for n in range(1, len(parts) + 1) if isinstance(recipe, dict) and ".".join(parts[:n]) in recipe]
        count = max([*fitting, own])
        path.append(".".join(parts[:count]))
        recipe = recipe.get(path[-1]) if isinstance(recipe, dict) else None
        parts = parts[count:]
    return tuple(path)


def value_of(key: str, text: str) -> Any:
    """What follows the equals sign: YAML's scalars, lists and mappings, and any other text as it is."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    where = f"{COMMAND_LINE}: {key}"
    if not text:
        raise RecipeError("has no value.", where=where, hint=f"For nothing at all write {key}=null")
    try:
        parsed = OverridesParser.create().parse_override(f"value={text}")
    except HydraException as error:
        if text[0] not in "[{\"'":
            return text  # a path, a rule: text with signs that the grammar keeps for itself
        hint = "Lists are written [1,2], mappings {a: 1}; text with brackets or commas goes into quotes inside them."
        raise RecipeError(f"cannot read {text!r}.", where=where, hint=hint) from error
    if parsed.is_sweep_override():
        raise RecipeError(f"needs one value, not {text!r}.", where=where, hint="A list is written [1,2].")
    return parsed.value()


# -------------------------------------------------------------------------------------------------- shapes


def known(node: Mapping[str, Any], keys: Sequence[str], where: str = "") -> None:
    """Refuse a key that is none of these."""
    for key in node:
        if key not in keys:
            place = f"{where}.{key}".lstrip(".")
            raise RecipeError(f"no such key.{nearest(key, keys)}", where=place, hint=f"Keys: {', '.join(keys)}.")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(path: Path) -> str:
    """A path as short as it can be and still be found from here."""
    here = os.path.relpath(path)
    return str(path) if here.startswith("..") else here


def _at(values: Any, path: Keys) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _paths(values: Any, above: Keys = ()) -> Iterator[Keys]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield (*above, str(key))
            yield from _paths(value, (*above, str(key)))


def _copy(values: Any) -> Any:
    return {key: _copy(value) for key, value in values.items()} if isinstance(values, dict) else values
