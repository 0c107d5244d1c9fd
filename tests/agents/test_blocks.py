"""Which turns are a tool call or an answer, to the letter; and that nothing a policy writes is more than a reason."""

import json

import pytest

from rlkit.agents.blocks import Unreadable, called, only_block, program
from rlkit.episodes import Program

CALL = '<tool_call>{"name": "find", "arguments": {"what": "a"}}</tool_call>'
SAID = ("tool_call", {"name": "find", "arguments": {"what": "a"}})
ANSWER = '<answer>{"gen_prompt": "a red circle", "reference_images": []}</answer>'


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        f"<think>I look.</think>{CALL}",
        f"<think>I look.</think>\n\nLet me see.\n{CALL}\n",
        f"<think>not {CALL}</think>{CALL}",
        f"<think>not {ANSWER}</think>{CALL}<think>nor {ANSWER}</think>",
        f"<think>I write <think> and {CALL} now</think>{CALL}",
        f"I look, and not by {CALL}.</think>{CALL}",  # the chat template opened the thought
        '<tool_call>\n {"name": "find",\n "arguments": {"what": "a"}} \n</tool_call>',
    ],
)
def test_the_block_outside_of_thoughts_is_read(text):
    assert only_block(text) == SAID


def test_a_tag_within_a_text_of_the_json_is_text():
    what = f"<think> {ANSWER} </tool_call> </answer>"
    text = f"<think>.</think><tool_call>{json.dumps({'name': 'find', 'arguments': {'what': what}})}</tool_call>"
    assert only_block(text)[1]["arguments"]["what"] == what


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "neither a tool call nor an answer"),
        ("I would search for it.", "neither a tool call nor an answer"),
        (f"<think>{CALL}</think>", "neither a tool call nor an answer"),
        (f"{CALL}{CALL}", "2 tool calls or answers in one turn"),
        (f"{CALL}{ANSWER}", "2 tool calls or answers in one turn"),
        (f"<think>{CALL}", "<think> has no end"),
        (CALL.replace("</tool_call>", ""), "<tool_call> has no end"),
        (CALL.replace("</tool_call>", "</answer>"), "<tool_call> has no end"),
        (CALL[:30], "<tool_call> has no end"),
        (f"{CALL}</tool_call>", "</tool_call> has no beginning"),
        (f"{CALL}</think>{CALL}</think>", "</think> has no beginning"),
        (f"{CALL}<tool_response>a red circle</tool_response>", "not yours to write"),
        (CALL.replace("}}", "}"), "<tool_call> holds no JSON: Expecting ',' delimiter at character 43."),
        (CALL.replace("}}", "}} {}"), "holds more than one JSON object"),
        (CALL.replace('"a"', "'a'"), "holds no JSON: Expecting value"),
        (CALL.replace('"a"', "NaN"), "holds no JSON: NaN is no number."),
        (CALL.replace('"a"', "-Infinity"), "holds no JSON: -Infinity is no number."),
        (CALL.replace('"a"', "1e999"), "holds no JSON: 1e999 is too large."),
        (CALL.replace('"a"', "9" * 5000), "holds no JSON: a number of 5000 digits is too large."),
        (CALL.replace('"a"', '"\\ud800"'), "holds no JSON: half of a character"),
        (CALL.replace('"what": "a"', '"what": "a", "what": "b"'), "holds no JSON: a key stands there twice."),
        (CALL.replace('"a"', "[" * 30 + "]" * 30), "nested too deeply"),
        (CALL.replace('"a"', "[" * 200_000 + "]" * 200_000), "nested too deeply"),
        ("<answer>a red circle</answer>", "<answer> holds no JSON"),
    ],
)
def test_everything_else_has_a_reason(text, reason):
    with pytest.raises(Unreadable) as caught:
        only_block(text)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "value",
    [
        [],
        None,
        "find",
        {"name": "find"},
        {"name": "find", "arguments": {}, "id": 1},
        {"name": 3, "arguments": {}},
        {"name": "find", "arguments": '{"what": "a"}'},
    ],
)
def test_a_call_is_a_name_and_arguments(value):
    assert called(SAID[1]) == ("find", {"what": "a"})
    with pytest.raises(Unreadable, match="tool"):
        called(value)


def test_a_program_is_read_in_both_forms():
    assert program({"gen_prompt": "a"}) == Program("a")
    listed = ["IMG_2", {"img_id": "IMG_1", "note": "its colours"}]
    assert program({"gen_prompt": "a", "reference_images": listed}) == Program("a", ("IMG_2", "IMG_1"))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("a", "an answer is"),
        ({}, "an answer is"),
        ({"gen_prompt": "a", "size": 3}, "an answer is"),
        ({"gen_prompt": " "}, "gen_prompt must be a text"),
        ({"gen_prompt": ["a"]}, "gen_prompt must be a text"),
        ({"gen_prompt": "a", "reference_images": "IMG_1"}, "must be a list of the names"),
        ({"gen_prompt": "a", "reference_images": None}, "must be a list of the names"),
        ({"gen_prompt": "a", "reference_images": [1]}, "must hold names of pictures, not 1"),
        ({"gen_prompt": "a", "reference_images": [""]}, "must hold names of pictures"),
        ({"gen_prompt": "a", "reference_images": [{"id": "IMG_1"}]}, "must hold names of pictures, not {'id'"),
    ],
)
def test_what_is_no_program(value, reason):
    with pytest.raises(Unreadable, match=reason):
        program(value)
