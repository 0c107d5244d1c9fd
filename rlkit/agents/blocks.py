"""Reads the one block in which an agent's turn ends: a tool call or an answer, as JSON between its tags.

Strict where being lenient would reward carelessness, and literal: what stands in a thought is not looked at, a tag
within a JSON text is text, and nothing is mended. Every reason is written for the policy that reads it as a reply.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from rlkit.agents.schemas import short
from rlkit.episodes import Program

DEEPEST = 16  # lists and objects within each other
LONGEST_WHOLE = 18  # digits: what fits into 64 bits
FORMS = "<tool_call>{...}</tool_call> or <answer>{...}</answer>"

_TAG = re.compile(r"<(/?)(think|tool_call|answer|tool_response)>")
_HALF = re.compile("[\ud800-\udfff]")


class Unreadable(ValueError):
    """A turn that is no tool call and no answer, and why."""


def only_block(text: str) -> tuple[str, Any]:
    """("tool_call" or "answer", what its JSON says) of a turn that has exactly one of them."""
    found = []
    at = _after_first_thought(text)
    while tag := _TAG.search(text, at):
        name = tag[2]
        if name == "tool_response":
            raise Unreadable("what a tool says is not yours to write: end the turn behind its call.")
        if tag[1]:
            raise Unreadable(f"{tag[0]} has no beginning. A turn ends with {FORMS}.")
        if name == "think":
            at = _end(text, "think", tag.end())
        else:
            value, at = _read(text, name, tag.end())
            found.append((name, value))
    if not found:
        raise Unreadable(f"neither a tool call nor an answer. A turn ends with {FORMS}.")
    if len(found) > 1:
        raise Unreadable(f"{len(found)} tool calls or answers in one turn: write one alone.")
    return found[0]


def called(value: Any) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a tool call."""
    if not isinstance(value, dict) or set(value) != {"name", "arguments"}:
        raise Unreadable(f'a tool call is {{"name": ..., "arguments": {{...}}}}, not {short(value)}.')
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise Unreadable(f"the name of a tool is text and its arguments are an object, not {short(value)}.")
    return name, arguments


def program(value: Any) -> Program:
    """What an answer says. A picture may also be written {"img_id": NAME, ...}, as GenEvolve's agent does."""
    if not isinstance(value, dict) or "gen_prompt" not in value or set(value) - {"gen_prompt", "reference_images"}:
        raise Unreadable(f'an answer is {{"gen_prompt": ..., "reference_images": [...]}}, not {short(value)}.')
    prompt, listed = value["gen_prompt"], value.get("reference_images", [])
    if not isinstance(prompt, str) or not prompt.strip():
        raise Unreadable(f"gen_prompt must be a text that says what to draw, not {short(prompt)}.")
    if not isinstance(listed, list):
        raise Unreadable(f"reference_images must be a list of the names of pictures, not {short(listed)}.")
    return Program(prompt, tuple(_named(one) for one in listed))


def _named(one: Any) -> str:
    name = one.get("img_id") if isinstance(one, dict) else one
    if not isinstance(name, str) or not name.strip():
        raise Unreadable(f"reference_images must hold names of pictures, not {short(one)}.")
    return name


def _after_first_thought(text: str) -> int:
    """Where to begin. Some chat templates open the thought themselves: then the turn begins within it."""
    end = text.find("</think>")
    return end + len("</think>") if end >= 0 and "<think>" not in text[:end] else 0


def _end(text: str, name: str, start: int) -> int:
    tag = f"</{name}>"
    end = text.find(tag, start)
    if end < 0:
        raise Unreadable(f"<{name}> has no end: close it with {tag}.")
    return end + len(tag)


def _read(text: str, name: str, start: int) -> tuple[Any, int]:
    """The JSON behind a tag, and where its closing tag ends."""
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        value, end = _DECODER.raw_decode(text, start)
        _check(value, DEEPEST)
    except RecursionError as error:
        raise Unreadable(f"the JSON in <{name}> is nested too deeply.") from error
    except json.JSONDecodeError as error:
        _end(text, name, start)  # a text that was cut off says more than what is wrong with its JSON
        raise Unreadable(f"<{name}> holds no JSON: {error.msg} at character {error.pos - start}.") from error
    except ValueError as error:
        raise Unreadable(f"<{name}> holds no JSON: {error}.") from error
    closing = re.compile(rf"\s*</{name}>").match(text, end)
    if closing is None:
        _end(text, name, end)
        raise Unreadable(f"<{name}> holds more than one JSON object.")
    return value, closing.end()


def _check(value: Any, deepest: int) -> None:
    """That others can write and store what was read."""
    if isinstance(value, str) and _HALF.search(value):
        raise ValueError("half of a character, which no text can hold")
    if isinstance(value, list | dict):
        if not deepest:
            raise RecursionError
        for one in value.values() if isinstance(value, dict) else value:
            _check(one, deepest - 1)
        for key in value if isinstance(value, dict) else ():
            _check(key, deepest)


def _pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number


def _whole(text: str) -> int:
    if len(text) > LONGEST_WHOLE:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_refuse, parse_float=_number, parse_int=_whole)

__all__ = ["Unreadable", "called", "only_block", "program"]
