"""The forms that a judge's answer may have, and how strictly each is read.

A form says what a chat request must carry for it, and reads one choice of the reply. An answer that is not exactly of
its form is Unreadable: a number is never guessed, mended or taken from the middle of a text. Only the answer itself is
read, so what a prompt or a picture says can never pass for a score; nor can a score that the judge merely quotes.

Not here: what is asked, whom, and how often (judge.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_WHY = {"type": "string"}


class Unreadable(ValueError):
    """An answer that gives no number, and why."""


class Form(Protocol):
    """One form of answer."""

    @property
    def sampled(self) -> bool:
        """Whether another seed may give another answer, so that asking again has a point."""

    def fields(self, guided: bool) -> dict[str, Any]:
        """What a chat request carries for it. guided: the endpoint can be held to a JSON schema."""

    def read(self, choice: Mapping[str, Any]) -> Any:
        """What the reply's choice says. Unreadable if it is not exactly of this form."""


@dataclass(frozen=True)
class Prose:
    """Any text that was not cut off."""

    sampled = True

    def fields(self, guided: bool) -> dict[str, Any]:
        return {}

    def read(self, choice: Mapping[str, Any]) -> str:
        return text_of(choice)


@dataclass(frozen=True)
class Numbers:
    """{"reasoning": "...", KEY: number, KEY: [number, ...], ...} with every number in low..high."""

    low: int
    high: int
    counts: Mapping[str, int | None]  # key -> the length of its list; None: a number without a list

    sampled = True

    def fields(self, guided: bool) -> dict[str, Any]:
        number = {"type": "integer", "minimum": self.low, "maximum": self.high}
        kinds = {
            key: number if count is None else {"type": "array", "items": number, "minItems": count, "maxItems": count}
            for key, count in self.counts.items()
        }
        return _schema({"reasoning": _WHY, **kinds}) if guided else {}

    def read(self, choice: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
        found = object_of(choice, {"reasoning", *self.counts})
        _reasoning(found)
        return {key: self._numbers(key, found[key], count) for key, count in self.counts.items()}

    def _numbers(self, key: str, value: Any, count: int | None) -> tuple[float, ...]:
        values = [value] if count is None else value
        if not isinstance(values, list):
            raise Unreadable(f"{key} is {_short(value)} and not a list of {count}")
        if count is not None and len(values) != count:
            raise Unreadable(f"{key} has {len(values)} numbers and not {count}")
        for one in values:
            if isinstance(one, bool) or not isinstance(one, int | float):
                raise Unreadable(f"{key} has {_short(one)}, which is no number")
            if not self.low <= one <= self.high:  # false for infinity too; JSON's NaN is refused before
                raise Unreadable(f"{key}: {_short(one)} is outside {self.low}..{self.high}")
        return tuple(float(one) for one in values)


@dataclass(frozen=True)
class Checklist:
    """{"items": ["...", ...]}, at least one and at most `most`."""

    most: int = 12

    sampled = True

    def fields(self, guided: bool) -> dict[str, Any]:
        items = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": self.most}
        return _schema({"items": items}) if guided else {}

    def read(self, choice: Mapping[str, Any]) -> tuple[str, ...]:
        items = object_of(choice, {"items"})["items"]
        if not isinstance(items, list) or not all(isinstance(one, str) and one.strip() for one in items):
            raise Unreadable(f"items is {_short(items)} and not a list of texts")
        if not 1 <= len(items) <= self.most:
            raise Unreadable(f"the checklist has {len(items)} items; 1 to {self.most} were asked for")
        return tuple(one.strip() for one in items)


@dataclass(frozen=True)
class Choice:
    """{"reasoning": "...", KEY: one of the options}."""

    key: str
    options: tuple[str, ...]

    sampled = True

    def fields(self, guided: bool) -> dict[str, Any]:
        return _schema({"reasoning": _WHY, self.key: {"enum": list(self.options)}}) if guided else {}

    def read(self, choice: Mapping[str, Any]) -> str:
        found = object_of(choice, {"reasoning", self.key})
        _reasoning(found)
        if found[self.key] not in self.options:
            raise Unreadable(f"{self.key} is {_short(found[self.key])}, none of {', '.join(self.options)}")
        return found[self.key]


@dataclass(frozen=True)
class Lines:
    """One line `NAME Score (LOW-HIGH): NUMBER` for each name, in this order, and nothing else."""

    low: int
    high: int
    names: tuple[str, ...]

    sampled = True

    def fields(self, guided: bool) -> dict[str, Any]:
        return {}  # a model that was trained to answer in lines is not held to JSON

    def read(self, choice: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
        lines = [line.strip() for line in text_of(choice).splitlines() if line.strip()]
        if len(lines) != len(self.names):
            raise Unreadable(f"the answer has {len(lines)} lines and not {len(self.names)}")
        return {name: (self._number(name, line),) for name, line in zip(self.names, lines, strict=True)}

    def _number(self, name: str, line: str) -> float:
        head = re.escape(f"{name} Score ({self.low}-{self.high}):")
        match = re.fullmatch(rf"{head}\s*(-?[0-9]{{1,9}}(?:\.[0-9]{{1,9}})?)", line)
        if match is None:
            raise Unreadable(f"{_short(line)} is not the line of the {name} score")
        if not self.low <= float(match[1]) <= self.high:
            raise Unreadable(f"{name}: {match[1]} is outside {self.low}..{self.high}")
        return float(match[1])


@dataclass(frozen=True)
class Tokens:
    """The probabilities of some one-token answers, read from the 20 most probable first tokens at temperature 0.

    Tokens that differ in capitals or in a leading space only are added up. If the labels together have less than
    `least` of the probability, the model answers something else, and the share within the labels means nothing.
    """

    labels: tuple[str, ...]
    least: float = 0.5

    sampled = False

    def fields(self, guided: bool) -> dict[str, Any]:
        # Never guided: a schema would move all the probability onto the labels and hide what is read here.
        return {"max_tokens": 1, "temperature": 0, "top_p": 1, "top_k": None, "logprobs": True, "top_logprobs": 20}

    def read(self, choice: Mapping[str, Any]) -> dict[str, float]:
        """Label -> probability; their sum is the coverage. A single token always ends with the reason "length"."""
        found = dict.fromkeys(self.labels, 0.0)
        whole = 0.0
        for token, log_probability in _top(choice):
            probability = math.exp(log_probability)
            whole += probability
            if token in found:
                found[token] += probability
        if whole > 1.001:
            raise Unreadable(f"the tokens' probabilities add up to {whole:.3g}")
        covered = sum(found.values())
        if not covered >= self.least:
            raise Unreadable(f"only {covered:.2g} of the probability is on {'/'.join(self.labels)}")
        return found


def _top(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(folded token, log-probability) of the most probable first tokens."""
    try:
        rows = choice["logprobs"]["content"][0]["top_logprobs"]
        pairs = [(row["token"], row["logprob"]) for row in rows]
    except (KeyError, IndexError, TypeError) as error:
        raise Unreadable("the reply has no top_logprobs: the endpoint must allow 20 of them") from error
    for token, number in pairs:
        if not isinstance(token, str) or isinstance(number, bool) or not isinstance(number, int | float):
            raise Unreadable(f"{_short([token, number])} is no token with its log-probability")
        if not number <= 1e-3:
            raise Unreadable(f"a log-probability of {number}")
    # Some endpoints give tokens as their vocabulary writes them: with Ġ or ▁ for a leading space.
    return [(token.replace("Ġ", " ").replace("▁", " ").strip().casefold(), number) for token, number in pairs]


def text_of(choice: Mapping[str, Any]) -> str:
    """The whole answer, without the thinking before it."""
    message = choice.get("message")
    if not isinstance(message, Mapping):
        raise Unreadable("the reply has no message")
    if message.get("refusal"):
        raise Unreadable(f"the judge refused: {_short(message['refusal'])}")
    reason = choice.get("finish_reason")
    if reason == "length":
        raise Unreadable("the answer was cut off at its token limit")
    if reason != "stop":
        raise Unreadable(f"the answer ended with {_short(reason)} and not with 'stop'")
    text = message.get("content")
    if not isinstance(text, str):
        raise Unreadable("the reply's message has no text")
    _, closed, text = text.rpartition("</think>")
    if not text.strip() or (not closed and text.lstrip().startswith("<think>")):
        raise Unreadable("the answer is empty")
    return text.strip()


def object_of(choice: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    """The answer as one JSON object with these keys. A code fence around it is taken off; any other word is too many:
    it might be a quotation."""
    text = text_of(choice)
    fenced = re.fullmatch(r"```(?:json)?\s*(\{.*\})\s*```", text, re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else text, object_pairs_hook=_pairs, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"the answer is not one JSON object: {_short(text)}") from error
    if not isinstance(found, dict):
        raise Unreadable(f"the answer is not one JSON object: {_short(text)}")
    if set(found) != keys:
        raise Unreadable(f"the answer has the keys {_short(sorted(found))} and not {sorted(keys)}")
    return found


def _pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _reasoning(found: Mapping[str, Any]) -> None:
    if not isinstance(found["reasoning"], str):
        raise Unreadable(f"reasoning is {_short(found['reasoning'])} and not a text")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The property order is the order in which the judge writes: its reasons come before its numbers."""
    schema = {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    }


__all__ = ["Checklist", "Choice", "Form", "Lines", "Numbers", "Prose", "Tokens", "Unreadable", "object_of", "text_of"]
