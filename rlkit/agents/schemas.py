"""What a callable may be given, read from its signature as a JSON schema, and whether given arguments fit.

The annotations are the only truth: what a language model is shown is what it is held to. Known: str, int, float, bool,
list[...], Literal[...], unions and null; a text in Annotated[..., "text"] describes the argument. Nothing else can be
written as JSON without a second thought, so it is refused where the callable is made a tool, not when it is called.
"""

from __future__ import annotations

import inspect
import math
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlkit.errors import nearest

KNOWN = "str, int, float, bool, list[...], Literal[...], and these with | None"
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}
_WORDS = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
_BRIEF = reprlib.Repr()  # bounded for lists within lists too, where repr would run out of stack
_BRIEF.maxstring = _BRIEF.maxother = 76


@dataclass(frozen=True)
class Schema:
    """Of the arguments of one callable, by their names."""

    properties: Mapping[str, Mapping[str, Any]]
    required: tuple[str, ...]

    @property
    def json(self) -> dict[str, Any]:
        return {"type": "object", "properties": dict(self.properties), "required": list(self.required)}

    def problem(self, arguments: Mapping[str, Any]) -> str:
        """Why the callable cannot be given these; "": it can."""
        for name, value in arguments.items():
            if name not in self.properties:
                known = f"Arguments: {', '.join(self.properties)}." if self.properties else "It takes none."
                return f"there is no argument {short(name)}.{nearest(name, self.properties)} {known}"
            if not fits(value, self.properties[name]):
                return f"{name} must be {words(self.properties[name])}, not {short(value)}."
        lacking = [name for name in self.required if name not in arguments]
        return f"{', '.join(map(repr, lacking))} must be given." if lacking else ""


def schema(tool: Any, name: str) -> Schema:
    """Of a function, of an object that can be called, or of a class of such. ValueError names what it cannot describe.

    name: what messages call it."""
    call, own = _called(tool, name)
    if inspect.iscoroutinefunction(call):
        raise ValueError(f"tool {name!r} is asynchronous: write a plain function, it is called in a thread of its own")
    try:
        parameters = list(inspect.signature(call).parameters.values())[own:]
    except (TypeError, ValueError) as error:  # of some callables that are written in C
        raise ValueError(f"tool {name!r} has no signature that can be read") from error
    spaces = getattr(inspect.unwrap(call), "__globals__", {})
    properties = {one.name: _property(one, spaces, name) for one in parameters}
    return Schema(properties, tuple(one.name for one in parameters if one.default is one.empty))


def description(tool: Any, name: str) -> str:
    """What its docstring says: of the function, or of `__call__`, or of the class."""
    call, own = _called(tool, name)
    text = call.__doc__
    if not text and own:
        owner = tool if isinstance(tool, type) else type(tool)
        generated = f"{owner.__name__}("  # what a dataclass without a docstring is given
        text = "" if (owner.__doc__ or "").startswith(generated) else owner.__doc__
    return inspect.cleandoc(text or "").strip()


def fits(value: Any, kind: Mapping[str, Any]) -> bool:
    if "anyOf" in kind:
        return any(fits(value, one) for one in kind["anyOf"])
    if "enum" in kind:
        return any(value == one and type(value) is type(one) for one in kind["enum"])
    if kind["type"] == "array":
        return isinstance(value, list) and all(fits(one, kind["items"]) for one in value)
    if isinstance(value, bool) or value is None:  # to Python, true is a whole number
        return bool(kind["type"] == _PLAIN[type(value)])
    if kind["type"] == "number":
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return _PLAIN.get(type(value)) == kind["type"]


def words(kind: Mapping[str, Any]) -> str:
    if "anyOf" in kind:
        return " or ".join(words(one) for one in kind["anyOf"])
    if "enum" in kind:
        return f"one of {', '.join(map(repr, kind['enum']))}"
    if kind["type"] == "array":
        return f"a list, each {words(kind['items'])}"
    return _WORDS.get(kind["type"], "null")


def short(value: Any) -> str:
    """For a message: one line, whatever it is."""
    text = _BRIEF.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _called(tool: Any, name: str) -> tuple[Callable[..., Any], int]:
    """What runs when it is called, and how many parameters are its own: the `self` of a method that is not bound."""
    if inspect.isroutine(tool):
        return tool, 0
    owner = tool if isinstance(tool, type) else type(tool)
    for one in owner.__mro__:
        if "__call__" in vars(one):
            return vars(one)["__call__"], 1
    raise ValueError(f"tool {name!r} cannot be called: it is {short(tool)}")


def _property(parameter: inspect.Parameter, spaces: Mapping[str, Any], tool: str) -> dict[str, Any]:
    where = f"tool {tool!r}: the parameter {parameter.name!r}"
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        raise ValueError(f"{where} is {parameter.kind.description}: a tool is called with arguments by name")
    if parameter.annotation is parameter.empty:
        raise ValueError(f"{where} has no type: annotate it with one of {KNOWN}")
    kind = parameter.annotation
    if isinstance(kind, str):
        try:
            kind = eval(kind, dict(spaces))
        except Exception as error:  # whatever stands there: names for type checkers alone are the usual case
            what = f"{where} has the type {kind!r}, which cannot be read ({type(error).__name__})"
            raise ValueError(f"{what}: annotate it with one of {KNOWN}") from error
    told = _kind(kind, where)
    if parameter.default is not parameter.empty:
        if not fits(parameter.default, told):
            raise ValueError(f"{where} must be {words(told)}, and so must its default, {short(parameter.default)}")
        told["default"] = parameter.default
    return told


def _kind(kind: Any, where: str) -> dict[str, Any]:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        said = [one for one in inner[1:] if isinstance(one, str)]
        return _kind(inner[0], where) | ({"description": " ".join(said)} if said else {})
    if kind in (None, *_PLAIN):
        return {"type": _PLAIN[types.NoneType if kind is None else kind]}
    if origin is list:
        return {"type": "array", "items": _kind(inner[0], where)}
    if origin is typing.Literal and all(type(one) in _PLAIN for one in inner):
        return {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_kind(one, where) for one in inner]}
    raise ValueError(f"{where} has the type {kind}, which no JSON schema here describes: use one of {KNOWN}")


__all__ = ["Schema", "description", "fits", "schema", "short", "words"]
