"""Win rates within a group: closed forms, order of the two pictures, failed comparisons, lonely samples."""

import base64
import io
import json
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from rlkit.endpoints import Endpoints, Failure, Reply
from rlkit.registry import build, describe
from rlkit.rewards.pairwise import Pairwise
from rlkit.types import Prompt, Unscored

WHERE = Endpoints(("http://127.0.0.1:1",))


def grey(*levels):
    """Pictures of these grey levels, 0..255."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 4, 4) / 255


def level(part):
    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
    return int(np.asarray(Image.open(io.BytesIO(data)))[0, 0, 0])


def shown(body):
    """The grey levels of a request's pictures, in order."""
    return tuple(level(part) for part in body["messages"][-1]["content"] if part["type"] == "image_url")


@pytest.fixture
def judge(monkeypatch):
    """judge(better, ...) -> (scorer, the compared pairs). better(first, second): 'first', ..., a Failure, or a text."""

    def make(better, **options):
        asked = []

        class Pool:
            def map(self, requests):
                return [self.reply(one.json) for one in requests]

            def reply(self, body):
                asked.append(shown(body))
                found = better(*asked[-1])
                if isinstance(found, Failure):
                    return found
                content = json.dumps({"reasoning": "r", "better": found})
                choice = {"finish_reason": "stop", "message": {"content": content}}
                return Reply(200, json.dumps({"choices": [choice]}).encode())

            def close(self):
                asked.append("closed")

        monkeypatch.setattr(Endpoints, "open", lambda self: Pool())
        return Pairwise(WHERE, model="m", **options).load(torch.device("cpu")), asked

    return make


def brighter(first, second):
    return "first" if first > second else "second" if second > first else "tie"


@pytest.mark.parametrize("both_orders", [False, True])
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_a_judge_without_contradictions_gives_k_of_g_minus_1(judge, samples_of, size, both_orders):
    scorer, asked = judge(brighter, both_orders=both_orders)
    ranks = torch.randperm(size, generator=torch.Generator().manual_seed(size)).tolist()
    values, components = scorer(samples_of(grey(*(10 * rank for rank in ranks)), ["x"] * size))
    assert values == pytest.approx([rank / (size - 1) for rank in ranks])
    assert components == {"comparisons": [size - 1.0] * size}
    assert len(asked) == size * (size - 1) // 2 * (2 if both_orders else 1)


def test_ties_are_worth_a_half(judge, samples_of):
    values, _ = judge(lambda first, second: "tie")[0](samples_of(grey(1, 2, 3), ["x"] * 3))
    assert values == [0.5] * 3


def test_equal_pictures_tie_unasked(judge, samples_of):
    scorer, asked = judge(brighter)
    values, components = scorer(samples_of(grey(7, 7, 9), ["x"] * 3))
    assert values == pytest.approx([0.25, 0.25, 1.0])
    assert components == {"comparisons": [2.0] * 3}
    assert (7, 7) not in asked


def test_groups_are_compared_within_themselves(judge, samples_of):
    scorer, asked = judge(brighter)
    values, _ = scorer(samples_of(grey(1, 50, 2, 60, 3, 70), ["a", "b"] * 3, group=[4, 9] * 3))
    assert values == pytest.approx([0, 0, 0.5, 0.5, 1, 1])
    assert all((first < 10) == (second < 10) for first, second in asked)


# ------------------------------------------------------------------------------------------ which stands first


def test_both_orders_cancel_a_favourite_place(judge, samples_of):
    scorer, asked = judge(lambda first, second: "first", both_orders=True)
    values, _ = scorer(samples_of(grey(1, 2, 3, 4), ["x"] * 4))
    assert values == [0.5] * 4
    assert set(asked) == {(a, b) for a in range(1, 5) for b in range(1, 5) if a != b}


def test_every_picture_stands_first_about_as_often(judge, samples_of):
    values, _ = judge(lambda first, second: "first")[0](samples_of(grey(*range(24)), ["x"] * 24))
    assert 0.2 < min(values) < max(values) < 0.8, "a favourite place must not become a favourite picture"


def test_the_order_is_drawn_from_the_pictures_and_favours_nobody(judge, samples_of):
    scorer, asked = judge(brighter)
    scorer(samples_of(grey(*range(24)), ["x"] * 24))
    share = sum(first < second for first, second in asked) / len(asked)
    assert 0.4 < share < 0.6
    again = list(asked)
    asked.clear()
    scorer(samples_of(grey(*reversed(range(24))), ["x"] * 24))
    assert set(asked) == set(again), "the draw does not depend on the order of the samples"


# -------------------------------------------------------------------------------------------- fewer opponents


@pytest.mark.parametrize(("size", "opponents"), [(8, 2), (8, 4), (7, 4), (6, 4), (9, 6)])
def test_everybody_meets_as_many_different_opponents(judge, samples_of, size, opponents):
    scorer, asked = judge(brighter, opponents=opponents)
    values, components = scorer(samples_of(grey(*range(size)), ["x"] * size))
    met = [frozenset(pair) for pair in asked]
    assert len(met) == len(set(met)) == size * opponents // 2
    assert components == {"comparisons": [float(opponents)] * size}
    assert (values[0], values[-1]) == (0, 1)


@pytest.mark.parametrize("opponents", [4, 6, 100])
def test_more_opponents_than_there_are_means_all(judge, samples_of, opponents):
    scorer, asked = judge(brighter, opponents=opponents)
    scorer(samples_of(grey(1, 2, 3, 4), ["x"] * 4))
    assert {frozenset(pair) for pair in asked} == {frozenset(pair) for pair in combinations((1, 2, 3, 4), 2)}


@pytest.mark.parametrize("options", [{}, {"opponents": 2}, {"both_orders": True}])
def test_values_do_not_depend_on_the_order_of_the_samples(judge, samples_of, options):
    levels, order = [3, 9, 1, 7, 5, 11], [4, 0, 5, 2, 1, 3]

    def noisy(first, second):  # contradicts itself, but is a function of what it sees
        return ("first", "second", "tie")[(3 * first + 5 * second) % 3]

    values, _ = judge(noisy, **options)[0](samples_of(grey(*levels), ["x"] * 6))
    moved, _ = judge(noisy, **options)[0](samples_of(grey(*(levels[i] for i in order)), ["x"] * 6))
    assert moved == [values[i] for i in order]
    assert len(set(values)) > 1


# ---------------------------------------------------------------------------------------------- what is not scored


def test_a_failed_comparison_leaves_out_that_pair_only(judge, samples_of):
    def broken(first, second):
        return Failure("gone") if {first, second} == {10, 30} else brighter(first, second)

    values, components = judge(broken)[0](samples_of(grey(10, 20, 30), ["x"] * 3))
    assert values == pytest.approx([0.0, 0.5, 1.0])
    assert components == {"comparisons": [1.0, 2.0, 1.0]}


def test_half_a_comparison_is_none(judge, samples_of):
    """One of two orders is not enough: what is left has a favourite place."""

    def broken(first, second):
        return Failure("gone") if (first, second) == (20, 10) else "first"

    values, _ = judge(broken, both_orders=True)[0](samples_of(grey(10, 20), ["x"] * 2))
    assert values == [Unscored("none of its 1 comparisons succeeded: gone")] * 2


def test_a_sample_without_any_comparison_is_not_scored(judge, samples_of):
    def broken(first, second):
        return "both" if 30 in (first, second) else brighter(first, second)

    scorer, asked = judge(broken, attempts=2)
    values, components = scorer(samples_of(grey(10, 20, 30), ["x"] * 3))
    assert values[:2] == [0.0, 1.0]
    assert "none of its 2 comparisons succeeded: better is 'both'" in values[2].reason
    assert components == {"comparisons": [1.0, 1.0, None]}
    assert len(asked) == 3 + 2, "each failed comparison is asked for once more"


def test_a_group_of_one_is_not_scored(judge, samples_of):
    scorer, asked = judge(brighter)
    values, components = scorer(samples_of(grey(1, 2, 3), ["x"] * 3, group=[0, 0, 1]))
    assert values == [0.0, 1.0, Unscored("a group of one has nobody to compare with")]
    assert components["comparisons"][2] is None
    assert len(asked) == 1


def test_a_bad_picture_costs_its_sample_only(judge, samples_of):
    media = grey(10, 20, 30).clone()
    media[1] = torch.nan
    values, _ = judge(brighter)[0](samples_of(media, ["x"] * 3))
    assert (values[0], values[2]) == (0.0, 1.0)
    assert "NaN" in values[1].reason


def test_empty_prompts_are_not_scored(judge, samples_of):
    values, _ = judge(brighter)[0](samples_of(grey(1, 2), ["", " "]))
    assert values == [Unscored("the prompt is empty")] * 2


def test_no_samples(judge, samples_of):
    scorer, asked = judge(brighter)
    assert scorer(samples_of(torch.zeros(0, 3, 4, 4), [])) == ([], {"comparisons": []})
    assert asked == []


# ------------------------------------------------------------------------------------------------------ options


def test_edits_are_compared_with_their_source_in_view(judge, samples_of):
    prompts = [Prompt(0, "brighten", source=grey(99)[0])] * 2
    scorer, asked = judge(lambda source, first, second: brighter(first, second), template="pairwise_edit")
    assert scorer(samples_of(grey(1, 2), prompts))[0] == [0.0, 1.0]
    assert [pair[0] for pair in asked] == [99]
    assert Pairwise(WHERE, template="pairwise_edit").reads == ("prompt", "source")
    assert Pairwise(WHERE).reads == ("prompt",)
    assert Pairwise(WHERE).version != Pairwise(WHERE, template="pairwise_edit").version
    values, _ = scorer(samples_of(grey(1, 2), ["no", "source"]))
    assert values == [Unscored("the prompt has no source picture")] * 2


def test_a_prompt_file_of_one_s_own(judge, samples_of, tmp_path):
    (tmp_path / "mine.txt").write_text("---\n$second or $first")
    scorer, _ = judge(lambda second, first: brighter(first, second), template=str(tmp_path / "mine.txt"))
    assert scorer(samples_of(grey(1, 2), ["", ""]))[0] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"opponents": 3}, "even number"),
        ({"opponents": 0}, "even number"),
        ({"opponents": -2}, "even number"),
        ({"attempts": 0}, "attempts"),
        ({"template": "/nowhere.txt"}, "cannot be read"),
    ],
)
def test_wrong_options(options, why):
    with pytest.raises(ValueError, match=why):
        Pairwise(WHERE, **options)


def test_a_prompt_file_that_does_not_show_both(tmp_path):
    (tmp_path / "mine.txt").write_text("---\n$first")
    with pytest.raises(ValueError, match=r"must show \$first and \$second"):
        Pairwise(WHERE, template=str(tmp_path / "mine.txt"))


def test_the_card_and_a_recipe():
    (card,) = (one for one in describe("rewards") if one.name == "pairwise")
    assert card.constants["groupwise"] is True
    assert all(option.doc for option in card.fields)
    assert build("rewards", "pairwise", {"endpoints": {"urls": ["http://127.0.0.1:8000"]}}).opponents is None
