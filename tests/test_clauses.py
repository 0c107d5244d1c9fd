"""Claims and their judgement: reading GenEval's metadata, and clauses with closed answers."""

import math
import random
from typing import Any

import pytest
import torch

from rlkit.clauses import Detection, Entry, Verdict, Wanted, judge, keep, read, relations, uncoloured, with_colours

LEFT, RIGHT, LOW = (0, 10, 10, 20), (40, 10, 50, 20), (0, 40, 10, 50)  # boxes of 10 x 10
Thing = tuple[str, tuple[float, ...], str]  # (class, box, colour)


def found(*things: Thing) -> Detection:
    """The first thing is the surest."""
    boxes = torch.tensor([box for _, box, _ in things], dtype=torch.float32).reshape(-1, 4)
    scores = torch.linspace(0.99, 0.9, len(things))
    return Detection(boxes, tuple(name for name, _, _ in things), scores, colours=tuple(c for _, _, c in things))


def many(label: str, n: int, colour: str = "") -> list[Thing]:
    return [(label, (20.0 * i, 0.0, 20.0 * i + 10, 10.0), colour) for i in range(n)]


def claims(*include: dict[str, Any], exclude: Any = None, tag: str = "") -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "exclude": exclude}


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
DOG_LEFT = {**DOG, "position": ["left of", 0]}


# ------------------------------------------------------------------------------------------------------ reading


def test_the_lines_of_genevals_own_file_are_read():
    position = read(claims({"class": "teddy bear", "count": 1}, {**DOG, "position": ["right of", 0]}, tag="position"))
    assert position.include == (Entry("teddy bear"), Entry("dog", position=("right of", 0)))
    assert (position.labels, position.colours, position.counting) == (("teddy bear", "dog"), (), False)
    counting = read(claims({"class": "clock", "count": 2}, exclude=[{"class": "clock", "count": 3}], tag="counting"))
    assert counting.include == (Entry("clock", 2),)
    assert counting.exclude == (Entry("clock", 3),)
    assert counting.counting
    assert counting.numbers == {"clock": 2}
    colour = read(claims({**DOG, "color": "black"}, {**CAT, "color": "white"}, tag="color_attr"))
    assert colour.colours == ("black", "white")


def test_null_is_the_same_as_absent():
    """Tables of data sets fill up what a line does not have."""
    full = {"class": "dog", "count": None, "color": None, "position": None, "somebody else's": None}
    assert read({"include": [full], "exclude": None, "tag": None}) == read({"include": [DOG]})
    assert read({"include": [{"class": "dog"}]}).include == (Entry("dog", 1),)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "has no 'include'"),
        ({"include": []}, "has no 'include'"),
        ({"include": "dog"}, "'include' of the prompt's metadata is a list, not 'dog'"),
        ({"include": {"class": "dog"}}, "'include' of the prompt's metadata is a list"),
        ({"include": ["dog"]}, r"include\[0\] is a mapping"),
        ({"include": [{"count": 1}]}, r"include\[0\] names no class"),
        ({"include": [{"class": "  "}]}, "names no class"),
        ({"include": [DOG, {**CAT, "colour": "red"}]}, r"include\[1\] has 'colour'; it may have class, count, color"),
        ({"include": [{**DOG, "count": 0}]}, "count 0; it is a whole number from 1"),
        ({"include": [{**DOG, "count": 1.5}]}, "count 1.5"),
        ({"include": [{**DOG, "count": True}]}, "count True"),
        ({"include": [{**DOG, "color": 3}]}, "color 3; it is a word"),
        ({"include": [CAT, {**DOG, "position": ["near", 0]}]}, "position .*one of left of, right of, above, below"),
        ({"include": [CAT, {**DOG, "position": "left of"}]}, "position 'left of'"),
        ({"include": [CAT, {**DOG, "position": ["left of", True]}]}, "position"),
        ({"include": [CAT, {**DOG, "position": ["left of", 1]}]}, r"include\[1\] stands left of include\[1\]"),
        ({"include": [CAT, {**DOG, "position": ["left of", 2]}]}, "which is no other"),
        ({"include": [CAT, {**DOG, "position": ["left of", -1]}]}, "which is no other"),
        ({"include": [DOG], "exclude": [{**DOG, "color": "red"}]}, r"exclude\[0\] has 'color'"),
        ({"include": [DOG, DOG], "exclude": [{"class": "dog", "count": 2}]}, "forbids as many of 'dog' as include"),
    ],
)
def test_claims_that_cannot_be_checked_say_why(metadata, message):
    with pytest.raises(ValueError, match=message):
        read(metadata)


# --------------------------------------------------------------------------------------------- what is looked at


def test_keep_takes_the_surest_above_the_threshold():
    boxes, masks = torch.arange(24.0).reshape(6, 4), torch.ones(6, 2, 2, dtype=torch.bool)
    scores = torch.tensor([0.5, 0.375, 0.25, 0.875, 0.875, 0.75])
    things = Detection(boxes, ("dog", "cat", "dog", "dog", "bus", "dog"), scores, masks)
    kept = keep(things, Wanted(("dog", "cat"), 0.25), most=2)
    assert kept.labels == ("dog", "dog", "cat")
    assert kept.scores.tolist() == [0.875, 0.75, 0.375]
    assert torch.equal(kept.boxes, boxes[[3, 5, 1]])
    assert kept.masks is not None
    assert kept.masks.shape == (3, 2, 2)
    assert keep(things, Wanted(("dog",), 0.25), most=16).scores.tolist() == [0.875, 0.75, 0.5]  # not 0.25 itself
    assert len(keep(things, Wanted(("dog",), 0.9), most=16)) == 0


def test_only_colours_that_decide_a_clause_are_asked_for():
    seen = found(*many("dog", 3), *many("cat", 3), *many("bus", 1))
    assert uncoloured(read(claims({**DOG, "color": "red"}, CAT)), seen) == [0]
    assert uncoloured(read(claims({**DOG, "color": "red"}, DOG)), seen) == [0, 1, 2]  # the class is shared
    assert uncoloured(read(claims({"class": "cat", "count": 2, "color": "red"})), seen) == [3, 4]
    assert uncoloured(read(claims(DOG)), seen) == []
    assert with_colours(seen, {1: "red"}).colours == ("", "red", "", "", "", "", "")


# ---------------------------------------------------------------------------------------------------- the clauses


@pytest.mark.parametrize(
    ("wanted", "there", "exact", "at_least"),
    [(1, 0, 0, 0), (1, 1, 1, 1), (1, 2, 0, 1), (1, 5, 0, 1), (2, 1, 0.5, 0.5), (2, 3, 0.5, 1), (4, 3, 0.75, 0.75)],
)
def test_a_number_is_graded_within_0_and_1(wanted, there, exact, at_least):
    """One wanted and five found is 0; in the reference's formula it is -3."""
    what = read(claims({"class": "dog", "count": wanted}))
    kind = "object" if wanted == 1 else "count"
    for loose, number in ((False, exact), (True, at_least)):
        assert judge(what, found(*many("dog", there)), loose) == Verdict(float(number == 1), number, ((kind, number),))


def test_a_wrong_position_is_one_clause_and_earns_nothing():
    """In the reference a second number is appended for it, always 1: three quarters for a wrong picture."""
    what = read(claims(CAT, DOG_LEFT))
    wrong = judge(what, found(("dog", RIGHT, ""), ("cat", LEFT, "")))
    assert wrong.clauses == (("object", 1), ("object", 1), ("position", 0))
    assert (wrong.strict, wrong.graded) == (0, pytest.approx(2 / 3))
    right = judge(what, found(("dog", LEFT, ""), ("cat", RIGHT, "")))
    assert right == Verdict(1, 1, (("object", 1), ("object", 1), ("position", 1)))


def test_where_nothing_is_found_every_clause_is_0():
    nothing = judge(read(claims({**CAT, "color": "red"}, DOG_LEFT)), found())
    assert nothing.clauses == (("object", 0), ("colour", 0), ("object", 0), ("position", 0))
    assert (nothing.strict, nothing.graded) == (0, 0)


def test_position_counts_the_pairs_that_stand_so():
    what = read(claims(CAT, {"class": "dog", "count": 2, "position": ["left of", 0]}))
    middle = ("cat", (20, 10, 30, 20), "")
    assert judge(what, found(("dog", LEFT, ""), ("dog", RIGHT, ""), middle)).mean("position") == 0.5
    assert judge(what, found(("dog", LEFT, ""), middle)).mean("position") == 0.5  # one of the two pairs is not there
    assert judge(what, found(("dog", LEFT, ""), ("dog", (0, 12, 10, 22), ""), middle)).strict == 1


def test_a_colour_is_the_share_of_the_wanted_objects():
    three = read(claims({"class": "dog", "count": 3, "color": "red"}))
    seen = found(*many("dog", 2, "red"), ("dog", (90, 0, 99, 9), "blue"))
    assert judge(three, seen).clauses == (("count", 1), ("colour", pytest.approx(2 / 3)))
    assert judge(three, found(*many("dog", 5, "red"))).mean("colour") == 1  # too many, which is the count's fault
    assert judge(three, found(*many("dog", 2, "red"))).mean("colour") == pytest.approx(2 / 3)


def test_a_lone_entry_is_judged_by_its_surest_object():
    one = read(claims({**DOG, "color": "red"}))
    two = found(("dog", LEFT, "blue"), ("dog", RIGHT, "red"))
    assert judge(one, two, at_least=True).clauses == (("object", 1), ("colour", 0))
    assert judge(one, found(*reversed_things(two)), at_least=True).strict == 1


def reversed_things(seen: Detection) -> list[Thing]:
    assert seen.colours
    rows = zip(seen.labels, [tuple(box) for box in seen.boxes.tolist()], seen.colours, strict=True)
    return list(rows)[::-1]


def test_an_object_of_the_wrong_colour_stands_nowhere():
    what = read(claims(CAT, {**DOG_LEFT, "color": "red"}))
    seen = found(("dog", LEFT, "blue"), ("cat", RIGHT, "red"))
    assert judge(what, seen).clauses == (("object", 1), ("object", 1), ("colour", 0), ("position", 0))
    target = read(claims({**CAT, "color": "black"}, DOG_LEFT))  # neither does one that it is relative to
    assert judge(target, seen).mean("position") == 0


def test_attribution_is_the_right_colour_on_the_right_object():
    what = read(claims({**DOG, "color": "red"}, {**CAT, "color": "blue"}))
    swapped = judge(what, found(("dog", LEFT, "blue"), ("cat", RIGHT, "red")))
    assert swapped.clauses == (("object", 1), ("attribution", 0), ("object", 1), ("attribution", 0))
    assert (swapped.strict, swapped.graded) == (0, 0.5)
    assert judge(what, found(("dog", LEFT, "red"), ("cat", RIGHT, "blue"))).strict == 1
    assert math.isnan(swapped.mean("colour"))


@pytest.mark.parametrize("order", [1, -1])
def test_entries_that_share_a_class_are_told_apart_by_colour(order):
    what = read(claims({**DOG, "color": "red"}, {**DOG_LEFT, "color": "blue"}))
    seen = [("dog", LEFT, "blue"), ("dog", RIGHT, "red")]
    assert judge(what, found(*seen[::order])).strict == 1
    mirrored = judge(what, found(("dog", RIGHT, "blue"), ("dog", LEFT, "red")))
    assert (mirrored.strict, mirrored.mean("position")) == (0, 0)
    both_red = judge(what, found(("dog", LEFT, "red"), ("dog", RIGHT, "red")))
    assert both_red.clauses == (("object", 1), ("attribution", 1), ("object", 1), ("attribution", 0), ("position", 0))
    alone = judge(what, found(("dog", LEFT, "blue")))
    assert alone.clauses[:4] == (("object", 0.5), ("attribution", 0), ("object", 0.5), ("attribution", 1))
    plain = judge(read(claims(DOG, {**DOG, "color": "blue"})), found(*seen[::order]))  # the choosy one goes first
    assert plain.strict == 1


def test_exclusions():
    other = read(claims(DOG, exclude=[CAT]))
    assert judge(other, found(("dog", LEFT, ""))).clauses == (("object", 1), ("exclude", 1))
    assert judge(other, found(("dog", LEFT, ""), ("cat", RIGHT, ""))) == Verdict(
        0, 0.5, (("object", 1), ("exclude", 0))
    )
    two_cats = read(claims(DOG, exclude=[{"class": "cat", "count": 2}]))
    assert judge(two_cats, found(("dog", LEFT, ""), ("cat", RIGHT, ""))).strict == 1


def test_the_official_counting_is_at_least_and_excludes_more():
    what = read(claims({"class": "dog", "count": 2}, exclude=[{"class": "dog", "count": 3}], tag="counting"))
    for n, strict in ((1, 0), (2, 1), (3, 0)):
        assert judge(what, found(*many("dog", n)), at_least=True).strict == strict
        assert judge(what, found(*many("dog", n))).strict == strict
    assert judge(what, found(*many("dog", 3)), at_least=True).clauses == (("count", 1), ("exclude", 0))
    assert judge(what, found(*many("dog", 3))).clauses == (("count", 0.5),)  # an exact count is not judged twice


def test_the_verdict_does_not_depend_on_the_detectors_order():
    what = read(claims({**DOG, "color": "red"}, {**DOG_LEFT, "color": "blue"}, {"class": "cat", "count": 2}))
    seen = found(("dog", LEFT, "blue"), ("dog", RIGHT, "red"), ("cat", LOW, "red"), ("dog", LOW, "red"))
    wanted = Wanted(what.labels, 0.3)
    expected = judge(what, keep(seen, wanted, 16))
    for seed in range(5):
        rows = random.Random(seed).sample(range(4), 4)
        assert judge(what, keep(seen.select(rows), wanted, 16)) == expected


def test_every_number_is_within_0_and_1():
    draw = random.Random(0)
    for _ in range(200):
        include = []
        for row in range(draw.randint(1, 3)):
            one: dict[str, Any] = {"class": draw.choice(["dog", "cat"]), "count": draw.randint(1, 3)}
            one |= {"color": draw.choice(["red", "blue"])} if draw.random() < 0.5 else {}
            one |= {"position": [draw.choice(["left of", "above"]), 0]} if row else {}
            include.append(one)
        seen = found(
            *[
                (draw.choice(["dog", "cat"]), (x, y, x + 9, y + 9), draw.choice(["red", "blue"]))
                for x, y in [(draw.randint(0, 90), draw.randint(0, 90)) for _ in range(draw.randint(0, 9))]
            ]
        )
        verdict = judge(read({"include": include}), seen, draw.random() < 0.5)
        assert all(0 <= number <= 1 for _, number in verdict.clauses)
        assert len(verdict.clauses) == sum(len(one) - 1 for one in include)  # all keys but the class
        assert verdict.graded == pytest.approx(sum(number for _, number in verdict.clauses) / len(verdict.clauses))
        assert (verdict.strict == 1) == all(number == 1 for _, number in verdict.clauses)


# --------------------------------------------------------------------------------------------------- positions


def at(x: float, y: float, side: float = 10) -> torch.Tensor:
    return torch.tensor([x - side / 2, y - side / 2, x + side / 2, y + side / 2])


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (30, 0, {"right of"}),
        (-30, 0, {"left of"}),
        (0, -30, {"above"}),  # y grows downwards
        (0, 30, {"below"}),
        (30, 30, {"right of", "below"}),
        (-30, -30, {"left of", "above"}),
        (30, 10, {"right of"}),  # of a length of 31.6, only 10 - 2 are down
        (0, 0, set()),
        (2, 0, set()),  # within the dead zone: a tenth of both widths
        (4, 0, set()),  # 4 - 2 is not more than half of 4
        (4.1, 0, {"right of"}),
    ],
)
def test_how_two_boxes_stand_to_each_other(x, y, words):
    assert relations(at(50 + x, 50 + y), at(50, 50)) == words


def test_the_dead_zone_grows_with_both_boxes():
    assert relations(at(20, 0), at(0, 0)) == {"right of"}
    assert relations(at(20, 0, side=90), at(0, 0)) == set()  # 20 - 0.1 * (90 + 10) is not more than 10
    assert relations(at(20, 0), at(0, 0, side=90)) == set()
