"""What is read from a judge's answer, and all that is not."""

import json
import math
from typing import Any

import pytest

from rlkit.judging.answers import Checklist, Choice, Lines, Numbers, Prose, Tokens, Unreadable

PAIR = Numbers(0, 25, {"score": 2})
GOOD = '{"reasoning": "sharp", "score": [20, 25]}'


def said(content: Any, finish: Any = "stop", **message: Any) -> dict[str, Any]:
    return {"finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}


def pair(score: str) -> dict[str, Any]:
    return said('{"reasoning": "r", "score": %s}' % score)  # noqa: UP031


def tokens(*rows: tuple[str, float], finish: str = "length") -> dict[str, Any]:
    """The first token's most probable values, with their probabilities."""
    top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in rows]
    return {**said("yes", finish), "logprobs": {"content": [{"token": "yes", "logprob": -1.0, "top_logprobs": top}]}}


# ----------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "text",
    [GOOD, f"```json\n{GOOD}\n```", f"```\n{GOOD}```", f"<think>maybe {{25}}</think>\n{GOOD}", f"\n {GOOD} \n"],
    ids=["plain", "fenced", "fenced without a name", "after thinking", "blanks"],
)
def test_numbers_are_read(text):
    assert PAIR.read(said(text)) == {"score": (20.0, 25.0)}


def test_the_ends_of_the_range_and_fractions_are_inside():
    assert PAIR.read(pair("[0, 25]")) == {"score": (0.0, 25.0)}
    assert PAIR.read(pair("[0.5, 24.99]")) == {"score": (0.5, 24.99)}


@pytest.mark.parametrize(
    ("score", "why"),
    [
        ("[26, 20]", "score: 26 is outside 0..25"),
        ("[20, -1]", "score: -1 is outside"),
        ("[20, 25.0001]", "outside"),
        ("[1e999, 1]", "outside"),
        ("[%s, 1]" % ("9" * 400), "outside"),
        ("[%s, 1]" % ("9" * 5000), "not one JSON object"),
        ("[NaN, 1]", "not one JSON object"),
        ("[Infinity, 1]", "not one JSON object"),
        ('["20", 1]', "is no number"),
        ("[true, 1]", "is no number"),
        ("[null, 1]", "is no number"),
        ("[[20], 1]", "is no number"),
        ("[20]", "1 numbers and not 2"),
        ("[20, 20, 20]", "3 numbers and not 2"),
        ("[]", "0 numbers"),
        ("20", "not a list"),
        ("null", "not a list"),
        ('"20"', "not a list"),
    ],
)
def test_a_number_that_is_none_or_outside_is_refused(score, why):
    with pytest.raises(Unreadable, match=why):
        PAIR.read(pair(score))


@pytest.mark.parametrize(
    "text",
    [
        "very good",
        "Score: 25/25",
        '{"reasoning": "1024 x 768 pixels and 25 of 25',
        '{"reasoning": "r", "score": [20, 2',
        f"{GOOD} {GOOD}",
        f"[{GOOD}]",
        f"Here it is: {GOOD}",
        f"The picture reads {GOOD}, which I take no notice of.",
        '{"reasoning": "it reads {"score": [25, 25]}", "score": [3, 4]}',
        '{"reasoning": "r", "score": [1, 1], "score": [25, 25]}',
        "[" * 100_000,
        '{"reasoning": "r", "score": ' + "[" * 100_000,
        "[20, 25]",
        "25",
    ],
    ids=lambda text: text[:40],
)
def test_what_is_not_exactly_one_object_is_refused(text):
    with pytest.raises(Unreadable, match="not one JSON object"):
        PAIR.read(said(text))


@pytest.mark.parametrize(
    "text",
    [
        '{"score": [20, 25]}',
        '{"reasoning": "r", "score": [20, 25], "bonus": 1}',
        '{"reasoning": "r", "scores": [20, 25]}',
        "{}",
        '{"reasoning": {"score": [3, 4]}, "score": [20, 25]}',
    ],
)
def test_other_keys_are_refused(text):
    with pytest.raises(Unreadable, match=r"keys|not a text"):
        PAIR.read(said(text))


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        (said(GOOD, "length"), "cut off"),
        (said(GOOD, "content_filter"), "content_filter"),
        (said(GOOD, None), "not with 'stop'"),
        (said(None, refusal="I cannot help with that"), "refused: 'I cannot help"),
        (said(GOOD, refusal="no"), "refused"),
        (said(None), "no text"),
        (said([{"type": "text", "text": GOOD}]), "no text"),
        (said(""), "empty"),
        (said("  \n"), "empty"),
        (said(f"<think>a draft: {GOOD}"), "empty"),
        (said(f"{GOOD}</think>"), "empty"),
        ({"finish_reason": "stop"}, "no message"),
        ({"finish_reason": "stop", "message": GOOD}, "no message"),
        ({}, "no message"),
    ],
)
def test_an_answer_that_did_not_end_well_is_refused(choice, why):
    with pytest.raises(Unreadable, match=why):
        PAIR.read(choice)


def test_numbers_without_a_list():
    form = Numbers(1, 5, {"execution": None, "consistency": None})
    assert form.read(said('{"reasoning": "r", "consistency": 2, "execution": 5}')) == {
        "execution": (5.0,),
        "consistency": (2.0,),
    }
    with pytest.raises(Unreadable, match="execution"):
        form.read(said('{"reasoning": "r", "consistency": 2, "execution": [5]}'))


def test_the_schema_says_what_is_read_with_the_reasons_first():
    (kind,) = PAIR.fields(guided=True).values()
    schema = kind["json_schema"]["schema"]
    number = {"type": "integer", "minimum": 0, "maximum": 25}
    assert kind["type"] == "json_schema"
    assert list(schema["properties"]) == ["reasoning", "score"]
    assert schema["properties"]["score"] == {"type": "array", "items": number, "minItems": 2, "maxItems": 2}
    assert schema["required"] == ["reasoning", "score"]
    assert schema["additionalProperties"] is False
    assert Numbers(1, 5, {"x": None}).fields(True)["response_format"]["json_schema"]["schema"]["properties"]["x"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 5,
    }
    assert PAIR.fields(guided=False) == {}


# ------------------------------------------------------------------------------------------------- other forms


def test_a_checklist():
    assert Checklist().read(said('{"items": [" a red cup ", "two spoons"]}')) == ("a red cup", "two spoons")
    assert Checklist().fields(True)["response_format"]["json_schema"]["schema"]["properties"]["items"]["maxItems"] == 12


@pytest.mark.parametrize("items", ["[]", '[""]', "[1]", '"a"', json.dumps(["a"] * 13), "null", "{}"])
def test_what_is_no_checklist(items):
    with pytest.raises(Unreadable, match="items"):
        Checklist().read(said('{"items": %s}' % items))  # noqa: UP031


def test_a_choice():
    form = Choice("better", ("first", "second", "tie"))
    assert form.read(said('{"reasoning": "r", "better": "tie"}')) == "tie"
    for wrong in ('"both"', '"First"', "1", "null", '["first"]'):
        with pytest.raises(Unreadable, match="better is"):
            form.read(said('{"reasoning": "r", "better": %s}' % wrong))  # noqa: UP031
    assert form.fields(True)["response_format"]["json_schema"]["schema"]["properties"]["better"] == {
        "enum": ["first", "second", "tie"]
    }


def test_prose():
    assert Prose().read(said("<think>x</think> The sky is red. ")) == "The sky is red."
    with pytest.raises(Unreadable, match="cut off"):
        Prose().read(said("The sky is", "length"))
    assert Prose().fields(True) == {}


ASPECTS = Lines(1, 5, ("Alignment", "Style"))


def test_lines():
    text = "Alignment Score (1-5): 4\n\n Style Score (1-5):3.5 \n"
    assert ASPECTS.read(said(text)) == {"Alignment": (4.0,), "Style": (3.5,)}


@pytest.mark.parametrize(
    "text",
    [
        "Alignment Score (1-5): 4",
        "Alignment Score (1-5): 6\nStyle Score (1-5): 3",
        "Alignment Score (1-5): -1\nStyle Score (1-5): 3",
        "Style Score (1-5): 3\nAlignment Score (1-5): 4",
        "Alignment Score (1-5): 4\nStyle Score (1-5): 3\nAlignment Score (1-5): 5",
        "Alignment Score (1-5): 4 of 5\nStyle Score (1-5): 3",
        "Alignment Score (1-5): X\nStyle Score (1-5): 3",
        "Alignment Score (1-5): 1e0\nStyle Score (1-5): 3",
        "Alignment Score (1-5): ٤\nStyle Score (1-5): 3",
    ],
)
def test_other_lines_are_refused(text):
    with pytest.raises(Unreadable):
        ASPECTS.read(said(text))


# ------------------------------------------------------------------------------------------------- first tokens

YES_NO = Tokens(("yes", "no"))


def test_tokens_are_folded_over_capitals_and_spaces():
    found = YES_NO.read(tokens(("Yes", 0.3), (" yes", 0.2), ("ĠYES", 0.1), ("▁No", 0.2), ("no", 0.1), ("maybe", 0.05)))
    assert found == pytest.approx({"yes": 0.6, "no": 0.3})


def test_a_label_that_is_not_there_has_no_probability():
    assert YES_NO.read(tokens(("yes", 0.9))) == pytest.approx({"yes": 0.9, "no": 0.0})


def test_only_whole_tokens_count():
    digits = Tokens(("1", "5"))
    assert digits.read(tokens(("5", 0.6), ("10", 0.2), ("15", 0.1))) == pytest.approx({"1": 0.0, "5": 0.6})


@pytest.mark.parametrize(
    "rows",
    [[("Sure", 0.99)], [("yes", 0.3), ("no", 0.19)], [("<think>", 1.0)], [("y", 0.9)], []],
    ids=["neither", "too little", "a thinking model", "a part of it", "nothing"],
)
def test_too_little_coverage_is_refused(rows):
    with pytest.raises(Unreadable, match="of the probability is on yes/no"):
        YES_NO.read(tokens(*rows))


def test_half_of_the_probability_is_enough():
    assert sum(YES_NO.read(tokens(("yes", 0.5))).values()) == pytest.approx(0.5)


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"content": []}, {"content": [{"token": "yes"}]}, 3])
def test_missing_log_probabilities_are_refused(logprobs):
    with pytest.raises(Unreadable, match="top_logprobs"):
        YES_NO.read({**said("yes"), "logprobs": logprobs})
    with pytest.raises(Unreadable, match="top_logprobs"):
        YES_NO.read(said("yes"))


@pytest.mark.parametrize("number", [0.5, math.nan, True, None, "0"])
def test_what_is_no_log_probability_is_refused(number):
    choice = tokens(("yes", 0.9))
    choice["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = number
    with pytest.raises(Unreadable, match="log-probability"):
        YES_NO.read(choice)


def test_probabilities_above_one_together_are_refused():
    with pytest.raises(Unreadable, match=r"add up to 1\.5"):
        YES_NO.read(tokens(("yes", 0.9), ("no", 0.6)))


def test_the_first_token_is_asked_for_unguided_and_cold():
    fields = YES_NO.fields(guided=True)
    assert (fields["max_tokens"], fields["temperature"]) == (1, 0)
    assert (fields["logprobs"], fields["top_logprobs"]) == (True, 20)
    assert "response_format" not in fields
    assert not YES_NO.sampled
