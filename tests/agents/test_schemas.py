"""What a signature says of its arguments, and what is refused because nobody could say it in JSON."""

import functools
import json
from dataclasses import dataclass
from typing import Annotated, Literal, Optional

import pytest

from rlkit.agents import schemas
from rlkit.agents.schemas import fits, schema, words


def painted(
    what: str,
    times: int,
    scale: float = 1.0,
    bright: bool = False,
    colours: list[Literal["red", "blue"]] = [],  # noqa: B006
    size: Annotated[int | None, "in pixels"] = None,
):
    """Paint it.

    More."""


@dataclass(frozen=True)
class Painter:
    """Of things."""

    speed: int = 3

    def __call__(self, what: "Annotated[str, 'a thing']") -> "Unknown":  # noqa: F821
        """Paint one thing."""


@dataclass(frozen=True)
class Silent:
    speed: int = 3

    def __call__(self, what: str): ...


def test_a_signature_is_a_schema():
    found = schema(painted, "paint").json
    assert json.loads(json.dumps(found)) == {
        "type": "object",
        "properties": {
            "what": {"type": "string"},
            "times": {"type": "integer"},
            "scale": {"type": "number", "default": 1.0},
            "bright": {"type": "boolean", "default": False},
            "colours": {"type": "array", "items": {"enum": ["red", "blue"]}, "default": []},
            "size": {"anyOf": [{"type": "integer"}, {"type": "null"}], "description": "in pixels", "default": None},
        },
        "required": ["what", "times"],
    }


def test_an_object_a_class_and_a_method_are_described_by_their_call():
    expected = {"what": {"type": "string", "description": "a thing"}}
    for one in (Painter(), Painter, Painter().__call__):
        assert schema(one, "paint").json["properties"] == expected
        assert schemas.description(one, "paint") == "Paint one thing."


def test_a_description_is_the_docstring_and_never_what_a_dataclass_makes_up():
    assert schemas.description(painted, "paint") == "Paint it.\n\nMore."
    assert schemas.description(Silent(), "paint") == ""
    Spoken = type("Spoken", (), {"__doc__": "  Of the class. ", "__call__": lambda self: ""})
    assert schemas.description(Spoken(), "paint") == "Of the class."
    assert schemas.description(lambda: "", "paint") == ""


def test_a_wrapped_function_is_described_by_what_it_wraps():
    @functools.wraps(painted)
    def outer(*everything, **more): ...

    assert schema(outer, "paint") == schema(painted, "paint")


def spread(*words: str): ...
def anything(**more: str): ...
def by_place(what: str, /): ...
def untyped(what): ...
def any_list(what: list): ...
def mapping(what: dict[str, str]): ...
def optional_mapping(what: Optional[dict[str, int]] = None): ...  # noqa: UP045
def unreadable(what: "Nowhere"): ...  # noqa: F821
def wrong_default(what: str = None): ...  # noqa: RUF013
def quoted_inside(what: list["str"]): ...


async def later(what: str): ...


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (spread, r"tool 'paint': the parameter 'words' is variadic positional: .* by name"),
        (anything, "the parameter 'more' is variadic keyword"),
        (by_place, "the parameter 'what' is positional-only"),
        (untyped, r"the parameter 'what' has no type: annotate it with one of str, int"),
        (any_list, "the parameter 'what' has the type <class 'list'>, which no JSON schema"),
        (mapping, r"the parameter 'what' has the type dict\[str, str\]"),
        (optional_mapping, r"the type dict\[str, int\]"),
        (quoted_inside, "the type str, which"),
        (unreadable, r"the type 'Nowhere', which cannot be read \(NameError\)"),
        (wrong_default, "the parameter 'what' must be text, and so must its default, None"),
        (later, "tool 'paint' is asynchronous"),
        (functools.partial(painted, "a"), "the parameter 'args' is variadic positional"),
        (7, "tool 'paint' cannot be called: it is 7"),
        (dict, "tool 'paint' cannot be called"),
    ],
)
def test_what_cannot_be_described_is_refused(tool, message):
    with pytest.raises(ValueError, match=message):
        schema(tool, "paint")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"what": "a", "times": 1}, ""),
        ({"what": "a", "times": 1, "scale": 2, "size": None, "colours": ["red"]}, ""),
        ({"what": "a"}, "'times' must be given."),
        ({}, "'what', 'times' must be given."),
        ({"what": "a", "time": 1}, "there is no argument 'time'. Did you mean 'times'? Arguments: what, times, scale,"),
        ({"what": 3, "times": 1}, "what must be text, not 3."),
        ({"what": "a", "times": True}, "times must be a whole number, not True."),
        ({"what": "a", "times": 1.0}, "times must be a whole number, not 1.0."),
        ({"what": "a", "times": 1, "bright": 1}, "bright must be true or false, not 1."),
        ({"what": "a", "times": 1, "scale": True}, "scale must be a number, not True."),
        ({"what": "a", "times": 1, "size": "9"}, "size must be a whole number or null, not '9'."),
        ({"what": "a", "times": 1, "colours": ["red", "pink"]}, "colours must be a list, each one of 'red', 'blue', "),
        ({"what": "a", "times": 1, "colours": "red"}, "colours must be a list"),
    ],
)
def test_arguments_are_held_to_the_schema(arguments, problem):
    found = schema(painted, "paint").problem(arguments)
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


def test_a_tool_without_arguments_says_so():
    assert schema(lambda: "", "now").problem({"a": 1}) == "there is no argument 'a'. It takes none."


def test_true_is_no_one_in_a_choice():
    assert fits(1, {"enum": [1]})
    assert not fits(True, {"enum": [1]})
    assert not fits(1.0, {"enum": [1]})
    assert not fits(float("inf"), {"type": "number"})


def test_a_message_is_short_whatever_was_given():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert len(schemas.short(deep)) <= 80
    assert len(schemas.short("a" * 10_000)) <= 80
    assert words({"type": "null"}) == "null"
