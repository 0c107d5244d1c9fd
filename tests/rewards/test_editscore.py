"""EditScore: its formula, its defaults, and the failures that its reference code scores."""

import json
import math

import pytest
import torch

from rlkit.endpoints import Endpoints, Failure, Reply
from rlkit.registry import build, describe
from rlkit.rewards.editscore import EditScore
from rlkit.types import Prompt, Unscored

WHERE = Endpoints(("http://127.0.0.1:1",))
RED, BLUE = (torch.zeros(3, 4, 4) + torch.eye(3)[channel][:, None, None] for channel in (0, 2))
EDIT = Prompt(0, "paint it red", source=BLUE)


def completion(content, finish="stop"):
    return {"choices": [{"finish_reason": finish, "message": {"content": content}}]}


def score(*numbers):
    return completion(json.dumps({"reasoning": "r", "score": list(numbers)}))


def of_quality(body):
    return "well made a picture" in body["messages"][0]["content"]


def pictures(body):
    return [part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url"]


@pytest.fixture
def judge(monkeypatch):
    """judge(semantics, quality, ...) -> (scorer, the requests). Each is JSON, a Failure, or a function of the body."""

    def make(semantics, quality, **options):
        asked = []

        class Pool:
            def map(self, requests):
                asked.extend(one.json for one in requests)
                return [self.reply(one.json) for one in requests]

            def reply(self, body):
                found = quality if of_quality(body) else semantics
                found = found(body) if callable(found) else found
                return found if isinstance(found, Failure) else Reply(200, json.dumps(found).encode())

            def close(self):
                asked.append("closed")

        monkeypatch.setattr(Endpoints, "open", lambda self: Pool())
        return EditScore(WHERE, model="m", **options).load(torch.device("cpu")), asked

    return make


def one(scorer, samples_of, prompt=EDIT, media=RED):
    values, components = scorer(samples_of(media[None], [prompt]))
    return values[0], {name: column[0] for name, column in components.items()}


@pytest.mark.parametrize(
    ("semantics", "quality", "value"),
    [
        ((25, 25), (25, 25), 1.0),
        ((20, 10), (5, 15), math.sqrt(50) / 25),
        ((0, 25), (25, 25), 0.0),
        ((5, 5), (5, 5), 0.2),
    ],
)
def test_the_value_is_the_geometric_mean_of_the_worse_scores(judge, samples_of, semantics, quality, value):
    found, components = one(judge(score(*semantics), score(*quality))[0], samples_of)
    assert found == pytest.approx(value)
    assert components == pytest.approx(
        {
            "semantics": min(semantics) / 25,
            "quality": min(quality) / 25,
            "following": semantics[0] / 25,
            "restraint": semantics[1] / 25,
        }
    )
    assert tuple(components) == EditScore.components


def test_passes_are_averaged_last_and_have_seeds_of_their_own(judge, samples_of):
    """The mean of the passes' values, and not the value of the mean scores, which would be sqrt(.5 * .5) = .5."""
    first: dict[bool, int] = {}

    def swing(body):
        mine = first.setdefault(of_quality(body), body["seed"])
        return score(25, 25) if (body["seed"] == mine) is of_quality(body) else score(0, 0)

    scorer, asked = judge(swing, swing, num_pass=2)
    value, components = one(scorer, samples_of)
    assert len({body["seed"] for body in asked}) == 4
    assert value == pytest.approx(0.0)
    assert (components["semantics"], components["quality"]) == pytest.approx((0.5, 0.5))


def test_the_reference_s_sampling_is_the_default(judge, samples_of):
    scorer, asked = judge(score(20, 20), score(20, 20))
    one(scorer, samples_of)
    for body in asked:
        assert [body[key] for key in ("temperature", "top_p", "top_k", "max_tokens")] == [0.7, 0.9, 20, 512]
        schema = body["response_format"]["json_schema"]["schema"]
        assert list(schema["properties"]) == ["reasoning", "score"], "reasons come first"
        assert schema["properties"]["score"]["items"] == {"type": "integer", "minimum": 0, "maximum": 25}


def test_quality_is_judged_by_the_edited_picture_alone(judge, samples_of):
    scorer, asked = judge(score(20, 20), score(20, 20))
    one(scorer, samples_of)
    by_kind = {of_quality(body): pictures(body) for body in asked}
    assert len(by_kind[True]) == 1
    assert by_kind[False][1:] == by_kind[True]
    assert by_kind[False][0] != by_kind[True][0]
    assert "paint it red" not in json.dumps(next(body for body in asked if of_quality(body)))


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (score(26, 20), "26 is outside 0..25"),
        (score(-1, 20), "-1 is outside 0..25"),
        (completion("a fine edit"), "not one JSON object"),
        (completion('{"reasoning": "the picture is 1024 x 768 pixels and', "length"), "cut off"),
        (completion('{"reasoning": "the picture is 1024 x 768 pixels and'), "not one JSON object"),
        (completion("I'm sorry, but I can't assist with that request."), "not one JSON object"),
        (score(20), "1 numbers and not 2"),
        (score(20, 20, 20), "3 numbers and not 2"),
        (score(), "0 numbers and not 2"),
        (Failure("http://judge answered 503"), "503"),
    ],
)
def test_what_the_reference_scores_in_spite_of_a_failure_is_not_scored(judge, samples_of, broken, why):
    for semantics, quality in ((broken, score(20, 20)), (score(20, 20), broken)):
        found, components = one(judge(semantics, quality)[0], samples_of)
        assert isinstance(found, Unscored)
        assert why in found.reason
        assert set(components.values()) == {None}


def test_an_answer_that_failed_is_asked_for_again(judge, samples_of):
    seen = []

    def later(body):
        seen.append(body["seed"])
        return score(26, 20) if len(seen) < 3 else score(25, 25)

    value, _ = one(judge(later, score(25, 25))[0], samples_of)
    assert value == pytest.approx(1.0)
    assert len(set(seen)) == 3


def test_one_bad_sample_costs_itself_only(judge, samples_of):
    prompts = [EDIT, Prompt(1, "no source"), Prompt(2, "", source=BLUE), EDIT]
    media = torch.stack([RED, RED, RED, RED * torch.nan])
    values, _ = judge(score(25, 25), score(25, 25))[0](samples_of(media, prompts))
    assert values[0] == pytest.approx(1.0)
    assert [one.reason for one in values[1:3]] == ["the prompt has no source picture", "the prompt is empty"]
    assert "NaN" in values[3].reason


def test_no_samples(judge, samples_of):
    scorer, asked = judge(None, None)
    values, components = scorer(samples_of(torch.zeros(0, 3, 4, 4), []))
    assert (values, set(map(len, components.values())), asked) == ([], {0}, [])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_pass": 0}, "num_pass"),
        ({"attempts": 0}, "attempts"),
        ({"prompts": {"pq": "x.txt"}}, "Prompts here: semantics, quality"),
        ({"prompts": {"quality": "/nowhere.txt"}}, "cannot be read"),
    ],
)
def test_wrong_options(options, why):
    with pytest.raises(ValueError, match=why):
        EditScore(WHERE, **options)


def test_the_card_and_a_recipe(tmp_path):
    (card,) = (one for one in describe("rewards") if one.name == "editscore")
    assert card.constants["reads"] == ("prompt", "source")
    assert all(option.doc for option in card.fields)
    (tmp_path / "pq.txt").write_text("---\n$picture")
    options = {"endpoints": {"urls": ["http://127.0.0.1:8000"]}, "prompts": {"quality": str(tmp_path / "pq.txt")}}
    reward = build("rewards", "editscore", options)
    assert reward.num_pass == 1
    assert reward.version != EditScore(WHERE).version, "other prompts, other numbers"
