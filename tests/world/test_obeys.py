"""The checker of instructions accepts what obeys them, and nothing else: not the source, not a neighbour's answer."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rlkit.world import instructions
from rlkit.world.checker import CAP, Verdict, detect
from rlkit.world.grammar import Caption
from rlkit.world.instructions import TASKS, parse_edit
from rlkit.world.obeys import MOVED, Asked, asked, check_asked, edit_parts, goal, goals, judge_edit
from rlkit.world.scenes import FloatArray, Item, render_scenes

CIRCLE = Item("red", "circle", 9.0, 9.0, 5.0)
SQUARE = Item("blue", "square", 22.0, 22.0, 5.0)


def picture(*items: Item) -> FloatArray:
    return render_scenes([items])[0]


def verdict(made: FloatArray, row: Asked) -> Verdict:
    (found,) = check_asked(made[None], [row])
    assert found is not None
    return found


def examples(task: str, seed: int, count: int = 2000) -> list[instructions.Example]:
    return instructions.draw(task, "train", count, np.random.default_rng(seed))


def strict(made: FloatArray, rows: Sequence[Asked]) -> list[float]:
    verdicts = check_asked(made, rows)
    assert all(one is not None for one in verdicts)
    return [one.strict for one in verdicts if one is not None]


@pytest.mark.parametrize("task", TASKS)
def test_what_obeys_is_accepted(task: str) -> None:
    rows = examples(task, 0)
    passed = strict(render_scenes([one.answer for one in rows]), [asked(one) for one in rows])
    assert sum(passed) >= 0.99 * len(rows)


def test_a_source_given_back_is_never_accepted_and_earns_little() -> None:
    rows = [asked(one) for one in examples("edit", 1)]
    for found in check_asked(np.stack([row.pictures[0] for row in rows]), rows):
        assert found is not None
        assert found.strict == 0
        assert found.graded < 0.32


@pytest.mark.parametrize("task", ["edit", "in_context"])
def test_the_answer_to_another_question_is_refused(task: str) -> None:
    rows = examples(task, 2)
    answers = render_scenes([one.answer for one in rows])
    passed = strict(np.roll(answers, 1, axis=0), [asked(one) for one in rows])
    assert sum(passed) <= 0.005 * len(rows), "only where two questions happen to have one answer"


def test_the_wrong_colour_of_a_reference_is_refused() -> None:
    """The words tell the shapes and the pictures the colours: that is what in-context generation has to look up."""
    rows = [one for one in examples("in_context", 3) if len(one.shown) == 2]
    assert len(rows) > 300
    for one in rows:
        (first,), (second,) = one.shown
        swapped = (replace(first, colour=second.colour),), (replace(second, colour=first.colour),)
        if first.colour != second.colour:
            found = verdict(picture(*one.answer), asked(replace(one, shown=swapped)))
            assert found.strict == 0


def edited(*made: Item, source: Sequence[Item], text: str) -> Verdict:
    return verdict(picture(*made), Asked(text, source=picture(*source)))


def test_an_edit_by_its_clauses() -> None:
    both, green = (CIRCLE, SQUARE), replace(CIRCLE, colour="green")
    right = edited(green, SQUARE, source=both, text="make the circle green")
    assert (right.strict, right.graded) == (1, 1)
    assert right.clauses == {"kept 1": 1, "number": 1, "edit": 1}
    left = edited(*both, source=both, text="make the circle green")
    assert left.clauses == {"kept 1": 1, "number": 1, "edit": 0.25}  # the shape is right, the colour is not
    assert left.graded == pytest.approx(CAP * (0.25 + 1) / 2)
    alone = edited(green, source=both, text="make the circle green")
    assert alone.clauses == {"kept 1": 0, "number": 0.5, "edit": 1}
    assert alone.graded == pytest.approx(CAP * (1 + 0.25) / 2)


@pytest.mark.parametrize(
    ("text", "made", "strict"),
    [
        ("remove the circle", (SQUARE,), 1),
        ("remove the circle", (CIRCLE,), 0),
        ("remove the circle", (), 0),
        ("turn the circle into a cross", (replace(CIRCLE, shape="cross"), SQUARE), 1),
        ("turn the circle into a cross", (replace(CIRCLE, shape="cross", colour="cyan"), SQUARE), 0),
        ("add a cyan cross", (CIRCLE, SQUARE, Item("cyan", "cross", 22.0, 9.0, 4.5)), 1),
        ("add a cyan cross", (CIRCLE, SQUARE, Item("cyan", "circle", 22.0, 9.0, 4.5)), 0),
        ("add a cyan cross", (CIRCLE, Item("cyan", "cross", 22.0, 9.0, 4.5)), 0),
    ],
)
def test_edits_done_and_not_done(text: str, made: tuple[Item, ...], strict: int) -> None:
    assert edited(*made, source=(CIRCLE, SQUARE), text=text).strict == strict


def test_what_was_left_alone_must_stay_where_it_was() -> None:
    def shifted(by: float) -> Verdict:
        moved = replace(SQUARE, x=SQUARE.x - by)
        return edited(replace(CIRCLE, colour="green"), moved, source=(CIRCLE, SQUARE), text="make the circle green")

    assert shifted(MOVED - 1).strict == 1
    assert shifted(MOVED + 1).clauses["kept 1"] == 0


def test_the_changed_object_must_stay_where_it_was() -> None:
    moved = Item("green", "circle", 22.0, 9.0, 5.0)
    found = edited(moved, SQUARE, source=(CIRCLE, SQUARE), text="make the circle green")
    assert found.clauses == {"kept 1": 1, "number": 1, "edit": 0}


@pytest.mark.parametrize(
    "row",
    [
        Asked("make the circle green", source=picture(SQUARE)),
        Asked("make the circle green", source=picture(CIRCLE, replace(SQUARE, shape="circle"))),
        Asked("a red circle", source=picture(SQUARE)),
        Asked("put it in the top left", references=(picture(CIRCLE, SQUARE),)),
        Asked("put it in the top left", references=(picture(),)),
        Asked("put it in the top left"),
        Asked("remove the circle", source=picture(CIRCLE), references=(picture(SQUARE),)),
        Asked("a watercolour of a fox"),
    ],
    ids=lambda row: f"{row.text}, {len(row.pictures)} pictures",
)
def test_what_means_nothing_is_not_judged(row: Asked) -> None:
    right = Asked("a red circle")
    nothing, judged = check_asked(np.stack([picture(CIRCLE)] * 2), [row, right])
    assert nothing is None
    assert judged is not None
    assert judged.strict == 1


def test_many_are_judged_as_one_by_one() -> None:
    rows = [one for task in TASKS for one in examples(task, 5, 60)]
    made = render_scenes([one.answer for one in reversed(rows)])
    together = check_asked(made, [asked(one) for one in rows])
    assert together == [verdict(image, asked(one)) for image, one in zip(made, rows, strict=True)]


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="1 images but 2 instructions"):
        check_asked(picture(CIRCLE)[None], [Asked("a red circle")] * 2)
    assert check_asked(np.zeros((0, 3, 32, 32), dtype=np.float32), []) == []


def test_an_edit_of_detections() -> None:
    source = detect(picture(CIRCLE, SQUARE))
    assert judge_edit(detect(picture(SQUARE)), source, parse_edit("remove the circle")).strict == 1
    with pytest.raises(ValueError, match="0 objects of the source are meant"):
        judge_edit(source, source, parse_edit("remove the cross"))


def test_execution_and_consistency_of_an_edit() -> None:
    both, green = (CIRCLE, SQUARE), replace(CIRCLE, colour="green")
    alone = edited(green, source=both, text="make the circle green")
    assert edit_parts(alone.clauses) == (1, 0.25)  # the square is lost: 'kept 1' is 0, 'number' 1/2
    assert alone.graded == CAP * sum(edit_parts(alone.clauses)) / 2
    assert edit_parts(edited(*both, source=both, text="make the circle green").clauses) == (0.25, 1)
    assert edit_parts(edited(source=both, text="remove the circle").clauses) == (1, 0)


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("make the circle green", (("blue", "square"), ("green", "circle"))),
        ("turn the red circle into a cross", (("blue", "square"), ("red", "cross"))),
        ("remove the square", (("red", "circle"),)),
        ("add a cyan cross", (("blue", "square"), ("red", "circle"), ("cyan", "cross"))),
        ("remove the cross", None),
        ("make the red square green", None),
        ("a red circle", None),
        ("a watercolour of a fox", None),
    ],
)
def test_the_goal_of_an_edit(text: str, objects: tuple[tuple[str, str], ...] | None) -> None:
    right = ("remove the circle", picture(CIRCLE))
    found, nothing, after = goals([(text, picture(CIRCLE, SQUARE)), ("make it", picture(CIRCLE)), right])
    assert (found and sorted(found.targets)) == (objects and sorted(objects))
    assert nothing is None
    assert after == Caption("several", ()), "the pictures of other rows are not taken for this one's"


def test_the_goal_has_what_every_answer_shows() -> None:
    rows = examples("edit", 6, 300)
    wanted = goals([(one.text, picture(*one.shown[0])) for one in rows])
    for one, caption in zip(rows, wanted, strict=True):
        assert caption is not None
        assert sorted(caption.targets) == sorted((item.colour, item.shape) for item in one.answer)
    assert goals([]) == []


def test_a_goal_is_not_guessed_where_the_source_shows_what_is_not_known() -> None:
    shown = detect(picture(CIRCLE, SQUARE))
    strange = [replace(one, shape="unknown") if one.shape == "square" else one for one in shown]
    with pytest.raises(ValueError, match="the source shows an object that is not known"):
        goal(strange, parse_edit("remove the circle"))


def test_a_source_of_another_size_matters_only_to_an_edit() -> None:
    assert goals([("a photo of a fox", np.zeros((3, 64, 96), dtype=np.float32))]) == [None]
