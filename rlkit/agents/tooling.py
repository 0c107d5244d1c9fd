"""Tools that an agent calls: what it is told of them, how its turns are understood, and the calls themselves.

A tool is any callable: a function, or a frozen dataclass of options with `__call__`. It gives a text or an
`Observation`. It may have `start()`, to read an index once, and `close()`. What it does wrong is contained: one that
raises, takes too long, or answers with ten megabytes costs its own call and nothing else. The agent is told what went
wrong and goes on.

Not here: when tools are called, and what a picture is called that they show (rollouts).
"""

from __future__ import annotations

import copy
import json
import logging
import queue
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlkit.agents import blocks, schemas
from rlkit.episodes import Call, Program
from rlkit.errors import nearest

log = logging.getLogger(__name__)

Pictures = tuple[tuple[str, Tensor], ...]  # (title, [3, H, W] in 0..1)

MOST_PICTURES = 8  # a call
LONGEST_SIDE = 4096
LONGEST_LINE = 300  # characters of a title, or of what an error says
MOST_STUCK = 100  # threads that one tool may leave behind; above that it is not asked before some of them end

PROTOCOL = """\
You turn a request into the text that a picture is generated from, in turns. Begin each turn with your thoughts between
<think> and </think>. Then write one of these two, and nothing behind it."""
CALLING = """\
To call a tool: <tool_call>{"name": "NAME", "arguments": {...}}</tool_call>
What it says comes back between <tool_response> and </tool_response>."""
ANSWERING = """\
To end: <answer>{"gen_prompt": "...", "reference_images": []}</answer>
gen_prompt describes the whole picture. reference_images names those of the pictures you were shown that the generator
is to be given too."""


@dataclass(frozen=True)
class Observation:
    """What a tool says, and the pictures that it shows."""

    text: str
    pictures: Pictures = ()


@dataclass(frozen=True)
class _Outcome:
    text: str
    pictures: Pictures = ()
    failed: bool = False


@dataclass(eq=False)
class Toolbox:
    """Tools by the names that an agent calls them. Made once a run; the tools are started with it."""

    tools: Mapping[str, Callable[..., Any]]
    seconds: float = 10.0  # for one call
    longest: int = 4000  # characters of what a tool says; the rest is counted and left out
    hung: int = 3  # calls in a row that took too long, and a tool is left alone until `renew`
    at_once: int = 32  # calls under way: of any number at once, each would wait for the others in its own time
    _schemas: dict[str, schemas.Schema] = field(init=False, repr=False)
    _hangs: Counter[str] = field(init=False, repr=False, default_factory=Counter)
    _stuck: dict[str, list[threading.Thread]] = field(init=False, repr=False, default_factory=dict)
    _noted: set[str] = field(init=False, repr=False, default_factory=set)  # tools whose failure was logged

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= threading.TIMEOUT_MAX:
            raise ValueError(f"seconds must be above 0, not {self.seconds}")
        for name in ("longest", "hung", "at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name, tool in self.tools.items():
            if not re.fullmatch(r"[\w.:/-]{1,64}", name):
                raise ValueError(f"{name!r} is no name of a tool: use letters, digits and _")
            if isinstance(tool, type):
                raise ValueError(f"tool {name!r} is the class {tool.__name__}: give one of its objects")
        self._schemas = {name: schemas.schema(tool, name) for name, tool in self.tools.items()}
        self._each("start")

    def close(self) -> None:
        self._each("close")

    def renew(self) -> None:
        """Once a step: a tool that was left alone is asked again, unless too many of its calls have never ended."""
        self._hangs.clear()
        self._noted.clear()
        self._stuck = {name: [one for one in rows if one.is_alive()] for name, rows in self._stuck.items()}

    def described(self) -> str:
        """What an agent is told: the form of its turns, and each tool with its arguments."""
        if not self.tools:
            return f"{PROTOCOL.replace('one of these two', 'this')}\n\n{ANSWERING}"
        listed = [self._described(name) for name in self.tools]
        return "\n\n".join((PROTOCOL, CALLING, ANSWERING, "Tools:\n" + "\n".join(listed)))

    def parse(self, text: str) -> Call | Program:
        """What a turn asks for. What cannot be done is a Call whose `invalid` says why."""
        try:
            kind, value = blocks.only_block(text)
            if kind == "answer":
                return blocks.program(value)
            tool, arguments = blocks.called(value)
        except blocks.Unreadable as error:
            return Call(text, invalid=str(error))
        return Call(text, tool, arguments, invalid=self._problem(tool, arguments))

    def run(self, calls: Sequence[Call]) -> list[tuple[Call, Pictures]]:
        """Each call with its reply, in order, and the pictures that it is shown. Nothing a tool does is raised here."""
        waiting = deque((i, call) for i, call in enumerate(calls) if not call.invalid)
        outcomes = {i: _Outcome(f"error: {call.invalid}") for i, call in enumerate(calls) if call.invalid}
        done: queue.SimpleQueue[tuple[int, _Outcome]] = queue.SimpleQueue()
        under_way: dict[int, tuple[threading.Thread, float]] = {}  # the thread, and when its time is over
        while waiting or under_way:
            while waiting and len(under_way) < self.at_once:
                i, call = waiting.popleft()
                if self._left_alone(call.tool):
                    outcomes[i] = _failure(f"{call.tool} did not answer for a while and is left alone.")
                else:
                    under_way[i] = (self._begin(i, call, done), time.monotonic() + self.seconds)
            for i, outcome in self._ended(calls, under_way, done):
                outcomes[i] = outcome
        for i, call in enumerate(calls):
            self._note(call.tool, outcomes[i])
        filled = [replace(call, reply=outcomes[i].text, failed=outcomes[i].failed) for i, call in enumerate(calls)]
        return [(call, outcomes[i].pictures) for i, call in enumerate(filled)]

    def _begin(self, i: int, call: Call, done: queue.SimpleQueue[tuple[int, _Outcome]]) -> threading.Thread:
        tool, arguments = self.tools[call.tool], copy.deepcopy(dict(call.arguments))  # a tool may change what it has

        def work() -> None:
            try:
                outcome = observed(tool(**arguments), self.longest)
            except BaseException as error:  # whatever it is, SystemExit too, it is of this call alone
                outcome = _failure(f"{call.tool} failed: {_reason(error)}")
            done.put((i, outcome))

        thread = threading.Thread(target=work, name=f"rlkit-tool-{call.tool}", daemon=True)
        thread.start()
        return thread

    def _ended(
        self,
        calls: Sequence[Call],
        under_way: dict[int, tuple[threading.Thread, float]],
        done: queue.SimpleQueue[tuple[int, _Outcome]],
    ) -> list[tuple[int, _Outcome]]:
        """Wait until a call ends or the time of one is over; take out those that have."""
        if not under_way:
            return []
        try:
            left = min(until for _, until in under_way.values()) - time.monotonic()
            i, outcome = done.get(timeout=max(0.0, left))
        except queue.Empty:
            now = time.monotonic()
            late = [i for i, (_, until) in under_way.items() if until <= now]
            return [(i, self._hang(calls[i].tool, under_way.pop(i)[0])) for i in late]
        if under_way.pop(i, None) is None:  # it was late, and has its outcome
            return []
        self._hangs[calls[i].tool] = 0
        return [(i, outcome)]

    def _hang(self, tool: str, thread: threading.Thread) -> _Outcome:
        self._hangs[tool] += 1
        self._stuck.setdefault(tool, []).append(thread)
        if self._hangs[tool] == self.hung:
            log.warning("tool %s took more than %g s %d times in a row: left alone", tool, self.seconds, self.hung)
        return _failure(f"{tool} did not answer within {self.seconds:g} s.")

    def _left_alone(self, tool: str) -> bool:
        return self._hangs[tool] >= self.hung or len(self._stuck.get(tool, ())) >= MOST_STUCK

    def _note(self, tool: str, outcome: _Outcome) -> None:
        if outcome.failed and tool not in self._noted:
            self._noted.add(tool)
            log.warning("tool %s: %s", tool, outcome.text)

    def _problem(self, tool: str, arguments: Mapping[str, Any]) -> str:
        if tool not in self.tools:
            known = f"Tools: {', '.join(self.tools)}." if self.tools else "There are no tools: write the answer."
            return f"there is no tool {schemas.short(tool)}.{nearest(tool, self.tools)} {known}"
        problem = self._schemas[tool].problem(arguments)
        return f"{tool}: {problem}" if problem else ""

    def _described(self, name: str) -> str:
        said = " ".join(schemas.description(self.tools[name], name).split())
        return f"- {name}: {said}\n  {json.dumps(self._schemas[name].json, ensure_ascii=False)}"

    def _each(self, name: str) -> None:
        for tool in self.tools.values():
            act = getattr(tool, name, None)
            if callable(act):
                act()


def tool_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as an agent writes it."""
    said = json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False)
    return f"<tool_call>{said}</tool_call>"


# ---- what a tool gives -----------------------------------------------------------------------------------------------


def observed(value: Any, longest: int) -> _Outcome:
    """What a tool gave, checked and cut. TypeError or ValueError where it is nothing that can be shown."""
    if isinstance(value, str):
        value = Observation(value)
    if not isinstance(value, Observation) or not isinstance(value.text, str):
        raise TypeError(f"it gave {type(value).__name__}, neither text nor an Observation")
    if len(value.pictures) > MOST_PICTURES:
        raise ValueError(f"it showed {len(value.pictures)} pictures; at most {MOST_PICTURES} can be")
    shown = tuple((_line(title), _picture(one)) for title, one in value.pictures)
    return _Outcome(cut(value.text, longest), shown)


def cut(text: str, longest: int) -> str:
    """The beginning, with a note of how much is left out, and no character that cannot be printed."""
    rest = len(text) - longest
    kept = _printable(text[:longest])
    return f"{kept} [... {rest} more characters]" if rest > 0 else kept


def _printable(text: str) -> str:
    """Control characters, and halves of characters, which no tokenizer can write, become one mark."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text.replace("\r\n", "\n"))


def _line(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"the title of a picture is text, not {type(text).__name__}")
    return cut(" ".join(text[: 10 * LONGEST_LINE].split()), LONGEST_LINE)


def _picture(one: Any) -> Tensor:
    """[3, H, W] in 0..1, of floats in 0..1 or of bytes."""
    if not isinstance(one, Tensor):
        raise TypeError(f"a picture is a tensor [3, H, W], not {type(one).__name__}")
    sized = one.ndim == 3 and one.shape[0] == 3 and all(1 <= side <= LONGEST_SIDE for side in one.shape[1:])
    if not sized or not (one.dtype == torch.uint8 or one.is_floating_point()):
        limit = f"floats or uint8 [3, H, W] of at most {LONGEST_SIDE} a side"
        raise ValueError(f"a picture is {limit}, not {one.dtype} {list(one.shape)}")
    picture = one.detach().to("cpu", torch.float32)
    if one.dtype == torch.uint8:
        return picture / 255
    if not bool(((picture >= 0) & (picture <= 1)).all()):  # NaN is in no range
        raise ValueError("a picture of floats has values outside 0..1")
    return picture


def _reason(error: BaseException) -> str:
    try:
        said = str(error)
    except Exception:  # an error may be unable to say what it is
        said = ""
    return _line(f"{type(error).__name__}: {said}".rstrip(": "))


def _failure(reason: str) -> _Outcome:
    return _Outcome(f"error: {reason}", failed=True)


__all__ = ["Observation", "Pictures", "Toolbox", "tool_call"]
