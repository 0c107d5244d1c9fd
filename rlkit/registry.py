"""Finds entries by name: rewards, algorithms, backbones, rollouts, tools; and recipes, which are files.

A built-in is a file: `ocr.py` in the folder of rewards is the reward `ocr`, and its class is the one called OCR (any
capitals, no underscores). Third parties add entries with an entry point in the group `rlkit.rewards` and so on, and a
recipe may name a local class as `package.module:Class`, looked up from the working directory too. Nothing is imported
before it is used: names and descriptions are read from source text and installed metadata, so that listing is quick.
Not here: what an entry must be able to do (types.py) and what fits together (recipe.py).
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import os
import re
import sys
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rlkit.errors import PluginError, RecipeError, RlkitError, nearest

KINDS = ("rewards", "algorithms", "backbones", "rollouts", "tools")
DISTRIBUTION = "rlkit-visual"


@dataclass(frozen=True)
class Option:
    """One field of an entry as its source writes it."""

    name: str
    annotation: str
    default: str | None  # None: it has to be given
    doc: str = ""


@dataclass(frozen=True)
class Entry:
    """What can be said of an entry without importing it: of a third party's, only its name and where it comes from."""

    name: str
    kind: str
    summary: str = ""
    constants: Mapping[str, Any] = field(default_factory=dict)
    fields: tuple[Option, ...] = ()
    source: str = "built in"  # or "distribution version"
    extra: str | None = None  # what to install besides: pip install 'rlkit-visual[EXTRA]'


@dataclass(frozen=True)
class _Claim:
    """One claim to a name: a built-in file or an entry point."""

    name: str
    distribution: str
    version: str
    target: str  # a module, and `:attribute` behind it for an entry point
    file: Path | None = None
    extra: str | None = None

    @property
    def full_name(self) -> str:
        return f"{self.distribution}/{self.name}"


def names(kind: str) -> list[str]:
    """Every name that a recipe may write, sorted. One that is claimed twice is there as `distribution/name`, twice."""
    return [name for name, _ in _listed(kind)]


def describe(kind: str) -> list[Entry]:
    """Every entry of one kind, in the order of `names`, read without importing any."""
    return [_entry(kind, name, claim) for name, claim in _listed(kind)]


def load(kind: str, name: str, where: str = "") -> Any:
    """The class (or, for a third party, any callable) behind a name. Imports that one entry."""
    if ":" in name:
        with _working_directory():
            return _attribute(kind, name, name, where)
    claim = _choose(kind, name, where)
    if claim.file is None:
        return _attribute(kind, name, claim.target, where)
    return getattr(_import(kind, name, claim.target, where), _entry_class(claim, _parse(claim.file)).name)


def build(kind: str, name: str, options: Mapping[str, Any], where: str = "") -> Any:
    """The entry with these options, their names and types checked. `where` opens the message of every error."""
    return construct(load(kind, name, where), options, where, what=name)


def construct(entry: Any, options: Mapping[str, Any], where: str = "", what: str = "") -> Any:
    """Call a class with options that came from YAML; unknown, missing and ill-typed ones are errors.

    Lists become tuples, and whole numbers floats, where the annotation says so; a mapping becomes the dataclass that
    the annotation names. A function is itself the entry and takes no options."""
    what = what or getattr(entry, "__name__", repr(entry))
    if not isinstance(entry, type):
        if options:
            given = ", ".join(map(repr, options))
            raise RecipeError(f"{what} is a function and takes no options, but got {given}.", where=where)
        return entry
    parameters = inspect.signature(entry).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for key in options:
        if key not in known and not takes_any:
            hint = f"Options: {', '.join(known)}." if known else "It has no options."
            raise RecipeError(f"{what} has no option {key!r}.{nearest(str(key), known)}", where=where, hint=hint)
    lacking = [n for n, p in known.items() if p.default is p.empty and n not in options]
    if lacking:
        raise RecipeError(f"{what} needs {', '.join(map(repr, lacking))}.", where=where, hint="Add it beside the name.")
    kinds = {key: _annotation(entry, known[key]) if key in known else Any for key in options}
    values = {key: _fit(value, kinds[key], f"{where}.{key}".lstrip(".")) for key, value in options.items()}
    try:
        return entry(**values)
    except ValueError as error:  # what a __post_init__ says of values that do not go together
        raise RecipeError(f"{what}: {error}", where=where) from error
    except RlkitError as error:
        error.where = _within(where, error.where)
        raise


def _within(where: str, own: str) -> str:
    """The place of an error in the recipe. An entry knows its options as `rollout.writer`, not which stage it is of."""
    room, _, rest = own.partition(".")
    if not own or own.startswith(f"{where}."):
        return own or where
    return f"{where}.{rest}".rstrip(".") if room in where.split(".") else own


def recipes() -> dict[str, Path]:
    """The built-in recipes by file stem, sub-folders included. Files that start with "_" are parts of others."""
    found: dict[str, Path] = {}
    for file in sorted(_folder("rlkit.recipes").rglob("*.yaml")):
        if file.stem in found:
            both = f"{found[file.stem]} and {file}"
            raise RecipeError(f"two recipes are called {file.stem!r}: {both}.", hint="Rename one of them.")
        if not file.stem.startswith("_"):
            found[file.stem] = file
    return dict(sorted(found.items()))


@contextlib.contextmanager
def importing(kind: str, name: str, where: str = "") -> Iterator[None]:
    """Around the `load()` or `start()` of an entry: a missing third party becomes the line that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise _missing(kind, name, error, where) from error


# ----------------------------------------------------------------------------------------------------- names


def _listed(kind: str) -> list[tuple[str, _Claim]]:
    claims = _claims(kind)
    return [(one.full_name if len(claims[name]) > 1 else name, one) for name in sorted(claims) for one in claims[name]]


def _claims(kind: str) -> dict[str, list[_Claim]]:
    """Name -> who claims it: the built-in file first, then entry points."""
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise PluginError(f"there is no catalogue {kind!r}.{nearest(kind, KINDS)}", hint=f"Catalogues: {known}.")
    claims: dict[str, list[_Claim]] = {}
    for file in sorted(_folder(f"rlkit.{kind}").glob("*.py")):
        if not file.stem.startswith("_"):
            claims[file.stem] = [_Claim(file.stem, DISTRIBUTION, "", f"rlkit.{kind}.{file.stem}", file)]
    for point in metadata.entry_points(group=f"rlkit.{kind}"):
        owner, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", "")
        target = point.value.partition("[")[0].strip()
        claim = _Claim(point.name, owner, version, target, extra=next(iter(point.extras), None))
        if claim not in claims.setdefault(point.name, []):  # a path may show one distribution twice
            claims[point.name].append(claim)
    return claims


def _choose(kind: str, name: str, where: str) -> _Claim:
    claims = _claims(kind)
    owner, _, bare = name.rpartition("/")
    fitting = [one for one in claims.get(bare, []) if not owner or _plain(one.distribution) == _plain(owner)]
    if len(fitting) == 1:
        return fitting[0]
    word = kind.removesuffix("s")
    if fitting:
        who = " and ".join(f"{one.distribution} {one.version}".strip() for one in fitting)
        hint = f"Write one of {', '.join(one.full_name for one in fitting)}."
        raise PluginError(f"{word} {bare!r} is claimed by {who}.", where=where, hint=hint)
    if owner and bare in claims:
        hint = f"There is {', '.join(one.full_name for one in claims[bare])}."
        raise PluginError(f"{owner!r} has no {word} {bare!r}.", where=where, hint=hint)
    hint = f"Known: {', '.join(sorted(claims)) or 'none'}. A class of your own is written package.module:Class."
    raise PluginError(f"no {word} named {name!r}.{nearest(name, claims)}", where=where, hint=hint)


def _plain(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds the folder and runs nothing but rlkit/__init__.py
    if spec is None or not spec.submodule_search_locations:
        raise PluginError(f"this installation of rlkit has no {package}.", hint="In a checkout, run: pip install -e .")
    return Path(next(iter(spec.submodule_search_locations)))


# --------------------------------------------------------------------------------------------------- imports


def _attribute(kind: str, name: str, target: str, where: str) -> Any:
    """`package.module:Class`, imported."""
    module_name, _, path = target.partition(":")
    value: Any = _import(kind, name, module_name, where)
    for part in path.split("."):
        if not hasattr(value, part):
            file = getattr(value, "__file__", None)
            holder = f"{module_name} ({file})" if file else module_name
            near = nearest(part, [one for one in vars(value) if not one.startswith("_")])
            raise PluginError(f"{kind.removesuffix('s')} {name!r}: {holder} has no {part!r}.{near}", where=where)
        value = getattr(value, part)
    return value


def _import(kind: str, name: str, module_name: str, where: str) -> types.ModuleType:
    who = f"{kind.removesuffix('s')} {name!r}"
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):
            hint = "A module of your own is looked up from the working directory." if ":" in name else ""
            raise PluginError(f"{who}: there is no module {error.name!r}.", where=where, hint=hint) from error
        raise _missing(kind, name, error, where) from error
    except RlkitError:
        raise
    except Exception as error:  # whatever a module may do while it is imported: the entry is what has to be named
        what = f"{who}: importing {module_name} failed with {type(error).__name__}: {error}"
        raise PluginError(what, where=where) from error


def _missing(kind: str, name: str, error: ModuleNotFoundError, where: str) -> PluginError:
    """Names the entry's own extra where it has one, else the package that was not found."""
    package = (error.name or str(error)).partition(".")[0]
    what = f"{kind.removesuffix('s')} {name!r} needs {package!r}, which is not installed."
    if ":" not in name:
        claim = _choose(kind, name, where)
        extra = _entry(kind, name, claim).extra
        package = f"'{claim.distribution}[{extra}]'" if extra else package
    return PluginError(what, where=where, hint=f"Run: pip install {package}")


@contextlib.contextmanager
def _working_directory() -> Iterator[None]:
    """Makes the working directory importable while a local class is looked up, behind everything that is installed.

    So a local module imports its neighbours at its top, not later inside a function."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)


# -------------------------------------------------------------------------------------------- reading source


def _entry(kind: str, name: str, claim: _Claim) -> Entry:
    if claim.file is None:
        return Entry(name, kind, source=f"{claim.distribution} {claim.version}".strip(), extra=claim.extra)
    tree = _parse(claim.file)
    body = _entry_class(claim, tree)
    constants = _constants(body.body)
    extra = constants.pop("extra", None) or _constants(tree.body).get("extra")
    summary = (ast.get_docstring(body) or ast.get_docstring(tree) or "").partition("\n")[0]
    return Entry(name, kind, summary, constants, tuple(_options(body, _comments(claim.file))), extra=extra)


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"), str(file))
    except SyntaxError as error:
        raise PluginError(f"{file}:{error.lineno} is not Python: {error.msg}.") from error


def _entry_class(claim: _Claim, tree: ast.Module) -> ast.ClassDef:
    """The class whose name is the file's, capitals and underscores aside."""
    wanted = claim.name.replace("_", "").casefold()
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in classes:
        if node.name.casefold() == wanted:
            return node
    near = nearest(wanted, [node.name for node in classes])
    hint = f"Call it {claim.name.title().replace('_', '')}, capitals as you like."
    raise PluginError(f"{claim.file} has no class for the entry {claim.name!r}.{near}", hint=hint)


def _comments(file: Path) -> dict[int, str]:
    """Line number -> the comment at the end of it."""
    tokens = tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def _options(body: ast.ClassDef, comments: Mapping[int, str]) -> Iterator[Option]:
    """The fields of a dataclass. A text below a field, or a comment behind it, is its description."""
    for node, after in zip(body.body, [*body.body[1:], None], strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        annotation = _source(node.annotation)
        default = _source(node.value) if node.value else None
        if _is_constant(node) or annotation.endswith("KW_ONLY") or "init=False" in (default or ""):
            continue
        doc = comments.get(node.end_lineno or 0, "")
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            doc = " ".join(after.value.value.split())
        yield Option(node.target.id, annotation, default, doc)


def _constants(body: Sequence[ast.stmt]) -> dict[str, Any]:
    """Public names that are assigned, with their values, or with the source text of what is not a plain literal."""
    values: dict[str, Any] = {}
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if _is_constant(node) else []
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if len(targets) == 1 and isinstance(targets[0], ast.Name) and value and not targets[0].id.startswith("_"):
            values[targets[0].id] = _literal(value)
    return values


def _is_constant(node: ast.stmt) -> typing.TypeGuard[ast.AnnAssign]:
    return isinstance(node, ast.AnnAssign) and bool(re.match(r"(typing\.)?ClassVar\b", _source(node.annotation)))


def _source(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)


def _literal(node: ast.expr) -> Any:
    """The value of a literal; of a set a sorted list, which fits into json and prints the same each time."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("frozenset", "set", "tuple") and len(node.args) < 2:
        return _literal(node.args[0]) if node.args else []
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
    return sorted(value) if isinstance(value, set) else value


# ---------------------------------------------------------------------------------------------- option types

_PLAIN: Mapping[Any, tuple[tuple[type[Any], ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    types.NoneType: ((types.NoneType,), "null"),
}


def _annotation(entry: type, parameter: inspect.Parameter) -> Any:
    """The type behind an annotation. One that only a type checker can resolve is not checked here."""
    if parameter.annotation is parameter.empty:
        return Any
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    try:
        return eval(parameter.annotation, dict(vars(sys.modules[entry.__module__])))
    except (NameError, AttributeError):
        return Any


def _fit(value: Any, kind: Any, where: str) -> Any:
    """The value as the annotation wants it, or a RecipeError. Types that are not named here pass unchecked."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is typing.Annotated:
        return _fit(value, inner[0], where)
    if origin in (typing.Union, types.UnionType):
        return _fit_union(value, inner, kind, where)
    if origin is typing.Literal:
        if any(value == one and type(value) is type(one) for one in inner):
            return value
        raise _wrong(value, kind, where, nearest(str(value), map(str, inner)))
    if origin in _PLAIN:
        accepted, _ = _PLAIN[origin]
        if (isinstance(value, bool) and origin is not bool) or not isinstance(value, accepted):
            raise _wrong(value, kind, where, _unquoted(value, origin))
        return float(value) if origin is float else value
    if origin in (tuple, list, Sequence):
        return _fit_list(value, origin, inner, kind, where)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(value, kind, where)
        return {key: _fit(one, inner[1] if inner else Any, f"{where}.{key}") for key, one in value.items()}
    if isinstance(origin, type) and is_dataclass(origin) and not isinstance(value, origin):
        if not isinstance(value, Mapping):
            raise _wrong(value, kind, where)
        return construct(origin, value, where)
    return Path(value) if origin is Path and isinstance(value, str) else value


def _fit_union(value: Any, members: Sequence[Any], kind: Any, where: str) -> Any:
    others = [one for one in members if one is not types.NoneType]
    if value is None and len(others) < len(members):
        return None
    if len(others) == 1:
        return _fit(value, others[0], where)  # the message of the one member says more
    for one in others:
        with contextlib.suppress(RecipeError):
            return _fit(value, one, where)
    raise _wrong(value, kind, where)


def _fit_list(value: Any, origin: Any, inner: Sequence[Any], kind: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong(value, kind, where)
    each = inner if origin is tuple and inner and inner[-1] is not Ellipsis else [*inner[:1], Any][:1] * len(value)
    if len(each) != len(value):
        raise _wrong(value, kind, where)
    fitted = [_fit(one, part, f"{where}[{i}]") for i, (one, part) in enumerate(zip(value, each, strict=True))]
    return fitted if origin is list else tuple(fitted)


def _wrong(value: Any, kind: Any, where: str, hint: str = "") -> RecipeError:
    return RecipeError(f"must be {_words(kind)}, not {value!r}.", where=where, hint=hint)


def _unquoted(value: Any, origin: type) -> str:
    if isinstance(value, str) and origin in (int, float):
        with contextlib.suppress(ValueError):
            return f"It is text: write {int(value) if origin is int else float(value)} without quotes."
    return ""


def _words(kind: Any) -> str:
    """A type in the words of someone who writes YAML."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in _PLAIN:
        return _PLAIN[origin][1]
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_words, inner))
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)} ({', '.join(map(_words, inner))})"
    if origin in (tuple, list, Sequence):
        return f"a list, each {_words(inner[0])}" if inner else "a list"
    return "a mapping" if origin in (dict, Mapping) or is_dataclass(origin) else str(kind)
