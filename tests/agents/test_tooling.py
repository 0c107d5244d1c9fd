"""What an agent is told, how its turns are understood, and that no tool can hurt more than its own call."""

import json
import logging
import threading
from dataclasses import dataclass, field

import pytest
import torch

from rlkit.agents import tooling
from rlkit.agents.tooling import Observation, Toolbox, tool_call
from rlkit.episodes import Call, Program
from rlkit.world import atlas

PATIENCE = 20.0  # seconds after which a test that hangs fails
SOON = 0.05  # seconds that a tool is given which never answers


def echo(text: str) -> str:
    """Say it again."""
    return text


def look(query: str, top_k: int = 3) -> Observation:
    """Look something up."""
    return Observation(f"{top_k} of {query}")


@pytest.fixture
def gate():
    """What tools that hang wait for. Opened at the end, so that no thread outlives its test for long."""
    event = threading.Event()
    yield event
    event.set()


def asked(box, *words):
    """(reply, failed) of calls `NAME` or `NAME text` in one run."""
    pairs = [one.partition(" ") for one in words]
    calls = [box.parse(tool_call(name, {"text": text} if text else {})) for name, _, text in pairs]
    assert not any(one.invalid for one in calls)
    return [(one.reply, one.failed) for one, _ in box.run(calls)]


# ---- what an agent is told, and what it says -------------------------------------------------------------------------


def test_an_agent_is_told_the_form_and_every_tool():
    text = Toolbox({"echo": echo, "look": look}).described()
    assert '<tool_call>{"name": "NAME", "arguments": {...}}</tool_call>' in text
    assert '<answer>{"gen_prompt": "...", "reference_images": []}</answer>' in text
    assert "- echo: Say it again.\n" in text
    schema = json.loads(text.splitlines()[-1])
    assert schema["properties"] == {"query": {"type": "string"}, "top_k": {"type": "integer", "default": 3}}
    assert schema["required"] == ["query"]
    assert len(text) < 1200, "it stands before every request"


def test_without_tools_an_agent_is_told_of_the_answer_alone():
    text = Toolbox({}).described()
    assert "<answer>" in text
    assert "tool" not in text
    assert Toolbox({}).parse(tool_call("echo", {})).invalid == (
        "there is no tool 'echo'. There are no tools: write the answer."
    )


def test_a_call_as_a_teacher_writes_it_is_understood():
    box = Toolbox({"search": look})
    assert atlas.call("search", {"query": "a flag"}, "why").endswith(tool_call("search", {"query": "a flag"}))
    text = atlas.call("search", {"query": "a flag"}, "why")
    assert box.parse(text) == Call(text, "search", {"query": "a flag"})
    assert box.parse(atlas.answer("a red circle", "why")) == Program("a red circle")


@pytest.mark.parametrize(
    ("text", "tool", "reason"),
    [
        ("nothing", "", "neither a tool call nor an answer"),
        ("<answer>{}</answer>", "", "an answer is"),
        ('<tool_call>["look"]</tool_call>', "", "a tool call is"),
        (tool_call("lok", {"query": "a"}), "lok", "there is no tool 'lok'. Did you mean 'look'? Tools: echo, look."),
        (tool_call("look", {"q": "a"}), "look", "look: there is no argument 'q'."),
        (tool_call("look", {}), "look", "look: 'query' must be given."),
        (tool_call("look", {"query": "a", "top_k": "3"}), "look", "look: top_k must be a whole number, not '3'."),
    ],
)
def test_what_cannot_be_done_is_a_call_that_says_why(text, tool, reason):
    box = Toolbox({"echo": echo, "look": look})
    call = box.parse(text)
    assert isinstance(call, Call)
    assert (call.text, call.tool, call.reply, call.failed) == (text, tool, "", False)
    assert call.invalid.startswith(reason)
    ((answered, pictures),) = box.run([call])
    assert answered.reply == f"error: {call.invalid}"
    assert (answered.failed, pictures) == (False, ())


def test_a_name_that_nobody_has_is_cut_in_the_reason():
    call = Toolbox({"echo": echo}).parse(tool_call("x" * 5000, {}))
    assert call.tool == "x" * 5000
    assert len(call.invalid) < 200


# ---- calls -----------------------------------------------------------------------------------------------------------


def test_calls_run_at_the_same_time_and_keep_their_order():
    together = threading.Barrier(3, timeout=PATIENCE)

    def meet(text: str) -> str:
        together.wait()
        return text

    box = Toolbox({"meet": meet}, seconds=PATIENCE)
    said = ["meet a", "meet b", "meet c"]
    assert asked(box, *said) == [("a", False), ("b", False), ("c", False)]


def test_no_more_run_at_once_than_is_said():
    lock, now, most = threading.Lock(), [0], [0]
    pair = threading.Barrier(2, timeout=PATIENCE)

    def count(text: str) -> str:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        pair.wait()
        with lock:
            now[0] -= 1
        return text

    box = Toolbox({"count": count}, seconds=PATIENCE, at_once=2)
    assert asked(box, *[f"count {i}" for i in range(8)]) == [(str(i), False) for i in range(8)]
    assert most[0] == 2


def test_equal_calls_are_each_made():
    seen = []

    def count() -> str:
        """Count."""
        seen.append(1)
        return str(len(seen))

    assert {reply for reply, _ in asked(Toolbox({"count": count}), "count", "count")} == {"1", "2"}


def test_a_tool_cannot_change_what_was_asked():
    def spoil(words: list[str]) -> str:
        words.append("more")
        return str(len(words))

    box = Toolbox({"spoil": spoil})
    ((call, _),) = box.run([box.parse(tool_call("spoil", {"words": ["one"]}))])
    assert (call.reply, call.arguments) == ("2", {"words": ["one"]})


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


def failing(error):
    def fail() -> str:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (ValueError("no such\nplace"), "error: bad failed: ValueError: no such place"),
        (SystemExit(3), "error: bad failed: SystemExit: 3"),
        (KeyboardInterrupt(), "error: bad failed: KeyboardInterrupt"),
        (RecursionError("deep"), "error: bad failed: RecursionError: deep"),
        (Mute(), "error: bad failed: Mute"),
        (ValueError("\x00\ud800"), "error: bad failed: ValueError: \ufffd\ufffd"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_tool_that_raises_costs_its_own_call(error, reply):
    box = Toolbox({"bad": failing(error), "echo": echo})
    assert asked(box, "bad", "echo b") == [(reply, True), ("b", False)]


def test_a_long_error_is_cut():
    ((reply, failed),) = asked(Toolbox({"bad": failing(ValueError("x" * 10_000_000))}), "bad")
    assert failed
    assert len(reply) < 400


def test_a_tool_that_hangs_costs_its_own_call(gate):
    def hang(text: str) -> str:
        gate.wait(PATIENCE)
        return text

    box = Toolbox({"hang": hang, "echo": echo}, seconds=0.5)
    late = ("error: hang did not answer within 0.5 s.", True)
    assert asked(box, "echo a", "hang b", "echo c") == [("a", False), late, ("c", False)]


def test_a_tool_that_hung_too_often_is_left_alone_until_the_next_step(gate, caplog):
    begun = []

    def hang() -> str:
        begun.append(1)
        gate.wait(PATIENCE)
        return "late"

    box = Toolbox({"hang": hang}, seconds=SOON, hung=2, at_once=1)
    late = ("error: hang did not answer within 0.05 s.", True)
    alone = ("error: hang did not answer for a while and is left alone.", True)
    with caplog.at_level(logging.WARNING):
        assert asked(box, *["hang"] * 4) == [late, late, alone, alone]
        assert asked(box, "hang") == [alone], "in the next call too"
    assert len(begun) == 2
    assert "tool hang took more than 0.05 s 2 times in a row" in caplog.text
    box.renew()
    assert asked(box, "hang") == [late]
    assert len(begun) == 3


def test_an_answer_in_between_forgives(gate):
    def maybe(text: str) -> str:
        if text == "hang":
            gate.wait(PATIENCE)
        return text

    box = Toolbox({"maybe": maybe}, seconds=0.5, hung=2, at_once=1)
    said = asked(box, "maybe hang", "maybe a", "maybe hang", "maybe b")
    assert [failed for _, failed in said] == [True, False, True, False]


def test_threads_that_never_end_do_not_pile_up(gate, monkeypatch):
    monkeypatch.setattr(tooling, "MOST_STUCK", 2)
    begun = []

    def hang() -> str:
        begun.append(threading.current_thread())
        gate.wait(PATIENCE)
        return "late"

    box = Toolbox({"hang": hang}, seconds=SOON, hung=1)
    for _ in range(5):
        asked(box, "hang")
        box.renew()
    assert len(begun) == 2
    gate.set()
    for thread in begun:
        thread.join(PATIENCE)
    box.renew()
    box.seconds = PATIENCE
    assert asked(box, "hang") == [("late", False)], "once they have ended it is asked again"


def test_threads_end_with_the_process(gate):
    names = {}

    def hang() -> str:
        names[threading.current_thread().name] = threading.current_thread().daemon
        gate.wait(PATIENCE)
        return ""

    asked(Toolbox({"hang": hang}, seconds=SOON), "hang")
    assert names == {"rlkit-tool-hang": True}


def test_a_failure_is_logged_once_a_step(caplog):
    box = Toolbox({"bad": failing(ValueError("no"))})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            asked(box, "bad", "bad")
        assert caplog.text.count("tool bad: error: bad failed: ValueError: no") == 1
        box.renew()
        asked(box, "bad")
    assert caplog.text.count("tool bad:") == 2


# ---- what a tool gives -----------------------------------------------------------------------------------------------


def giving(value):
    def give() -> str:
        return value

    return Toolbox({"give": give}, longest=10)


def test_ten_megabytes_are_cut_and_counted():
    ((reply, failed),) = asked(giving("ab" * 5_000_000), "give")
    assert (reply, failed) == ("ababababab [... 9999990 more characters]", False)
    assert asked(giving("ab" * 5), "give") == [("ababababab", False)]


def test_what_cannot_be_printed_is_marked():
    assert asked(giving("a\x00\x1b\ud800\r\n\tb"), "give") == [("a\ufffd\ufffd\ufffd\n\tb", False)]


@pytest.mark.parametrize("value", [None, 3, b"a", ["a"], ("a", ()), Observation(3)], ids=repr)
def test_what_is_neither_text_nor_observation_is_a_failure(value):
    ((reply, failed),) = asked(giving(value), "give")
    assert failed
    assert "neither text nor an Observation" in reply


def shown(*pairs):
    box = giving(Observation("seen", pairs))
    return box.run([box.parse(tool_call("give", {}))])[0]


def test_pictures_are_floats_whatever_they_were():
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 4)
    parameter = torch.full((3, 1, 1), 0.5, dtype=torch.float64, requires_grad=True)
    call, pictures = shown(("bytes\nof it", levels), ("t" * 1000, parameter))
    assert (call.reply, call.failed) == ("seen", False)
    (title, first), (long, second) = pictures
    assert title == "bytes of it"
    assert len(long) < 350
    torch.testing.assert_close(first[:, 0, 0], torch.tensor([0.0, 0.2, 1.0]))
    assert (first.dtype, tuple(first.shape)) == (torch.float32, (3, 2, 4))
    assert (second.dtype, second.requires_grad) == (torch.float32, False)


@pytest.mark.parametrize(
    "picture",
    [
        torch.zeros(1, 2, 2),
        torch.zeros(2, 3, 2, 2),
        torch.zeros(3, 0, 2),
        torch.zeros(3, 1, 4097),
        torch.zeros(3, 2, 2, dtype=torch.int64),
        torch.full((3, 2, 2), 1.5),
        torch.full((3, 2, 2), -0.1),
        torch.full((3, 2, 2), float("nan")),
        "a.png",
    ],
    ids=lambda one: f"{getattr(one, 'dtype', 'path')} {list(getattr(one, 'shape', ()))}",
)
def test_what_is_no_picture_is_a_failure(picture):
    call, pictures = shown(("one", torch.zeros(3, 2, 2)), ("two", picture))
    assert call.failed
    assert "picture" in call.reply
    assert pictures == ()


def test_no_more_than_eight_pictures_and_every_title_is_text():
    one = torch.zeros(3, 2, 2)
    assert len(shown(*[("t", one)] * 8)[1]) == 8
    assert shown(*[("t", one)] * 9)[0].failed
    assert shown((3, one))[0].failed
    assert shown(one)[0].failed


# ---- the box itself --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    log: list[str] = field(default_factory=list)

    def start(self) -> None:
        self.log.append("start")

    def close(self) -> None:
        self.log.append("close")

    def __call__(self, text: str) -> str:
        return text


def test_tools_are_started_with_the_box_and_closed_with_it():
    tool = Kept()
    box = Toolbox({"kept": tool, "echo": echo})
    assert tool.log == ["start"]
    assert asked(box, "kept a") == [("a", False)]
    box.close()
    assert tool.log == ["start", "close"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "seconds must be above 0, not 0"),
        ({"seconds": float("inf")}, "seconds"),
        ({"longest": 0}, "longest must be 1 or more"),
        ({"hung": 0}, "hung must be 1 or more"),
        ({"at_once": 0}, "at_once must be 1 or more"),
        ({"tools": {"a b": echo}}, "'a b' is no name of a tool"),
        ({"tools": {"": echo}}, "'' is no name of a tool"),
        ({"tools": {"kept": Kept}}, "tool 'kept' is the class Kept: give one of its objects"),
        ({"tools": {"any": lambda **more: ""}}, "tool 'any': the parameter 'more'"),
    ],
)
def test_a_box_that_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Toolbox(**{"tools": {"echo": echo}, **options})
