"""What can be asked beside pictures: texts and what they mean, splits, and scenes in which it can be done."""

from collections import Counter

import numpy as np
import pytest

from rlkit.world import grammar, instructions
from rlkit.world.grammar import SPLITS, Caption
from rlkit.world.instructions import EDITS, TASKS, Edit, Put, edits, parse_edit, parse_put
from rlkit.world.scenes import Item, fits

RED, BLUE = ("red", "circle"), ("blue", "square")


@pytest.mark.parametrize("kind", EDITS)
def test_every_edit_is_read_as_what_it_was_written_for(kind: str) -> None:
    for edit in edits(kind):
        assert parse_edit(edit.text) == edit
        assert not grammar.unknown_words(edit.text)
        assert len(edit.text.split()) <= grammar.LENGTH - 2


def test_edits_are_told_as_people_would() -> None:
    assert Edit("colour", (None, "circle"), "green").text == "make the circle green"
    assert Edit("shape", ("red", "square"), "cross").text == "turn the red square into a cross"
    assert Edit("remove", (None, "square")).text == "remove the square"
    assert Edit("add", ("cyan", "triangle")).text == "add a cyan triangle"


@pytest.mark.parametrize(
    ("edit", "result"),
    [
        (Edit("colour", RED, "green"), ("green", "circle")),
        (Edit("shape", RED, "cross"), ("red", "cross")),
        (Edit("remove", RED), None),
        (Edit("add", RED), RED),
    ],
)
def test_what_an_object_becomes(edit: Edit, result: grammar.Object | None) -> None:
    assert edit.result == result


@pytest.mark.parametrize(
    ("caption", "shown", "text"),
    [
        (Caption("place", (RED,), place="top left"), 1, "put it in the top left"),
        (Caption("two", (RED, BLUE)), 1, "put it and a blue square"),
        (Caption("two", (RED, BLUE)), 2, "put the circle and the square"),
        (Caption("relation", (RED, BLUE), relation="left of"), 1, "put it left of a blue square"),
        (Caption("relation", (RED, BLUE), relation="above"), 2, "put the circle above the square"),
    ],
)
def test_a_caption_hides_behind_its_pictures(caption: Caption, shown: int, text: str) -> None:
    assert Put(caption, shown).text == text
    assert not grammar.unknown_words(text)
    assert parse_put(text, caption.objects[:shown]) == caption
    assert parse_put(text, caption.objects[:shown][::-1]) == caption, "the words say which picture is meant"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paint the circle green", "is no instruction to edit"),
        ("make the circle grene", "'grene' is not a colour"),
        ("make the circel green", "'circel' is not a shape"),
        ("turn the circle into a box", "'box' is not a shape"),
        ("remove the big red circle", "expected '<shape>' or '<colour> <shape>'"),
        ("add a circle", "expected 'add a <colour> <shape>'"),
    ],
)
def test_an_edit_that_means_nothing_says_why(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_edit(text)


@pytest.mark.parametrize(
    ("text", "shown", "message"),
    [
        ("put it in the middle", [RED], "'middle' is not a place"),
        ("put it and a red circle", [RED], "must differ"),
        ("put it in the top left", [RED, BLUE], "beside 2 pictures"),
        ("put the circle and the square", [RED], "beside 1 pictures"),
        ("put the cross and the square", [RED, BLUE], "0 of the pictures show a cross"),
        ("put the circle and the square", [RED, ("blue", "circle")], "2 of the pictures show a circle"),
        ("a red circle", [RED], "beside 1 pictures"),
    ],
)
def test_a_scene_that_means_nothing_says_why(text: str, shown: list[grammar.Object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_put(text, shown)


@pytest.mark.parametrize("kind", EDITS)
def test_splits_of_edits_share_nothing_and_miss_nothing(kind: str) -> None:
    parts = [instructions.split(name, kind) for name in SPLITS]
    assert sorted(edit.text for part in parts for edit in part) == sorted(edit.text for edit in edits(kind))
    assert [len(part) for part in parts[1:]] == [
        instructions.VALIDATION_EDITS[kind],
        instructions.HELD_OUT_EDITS[kind],
    ]
    changes = {edit.into for edit in edits(kind)}
    assert {edit.into for edit in parts[0]} == changes, "training sees every change"


def _meaning(task: str, example: instructions.Example) -> str:
    """Of an edit kind, object and change; of a scene its caption."""
    if task == "edit":
        source, answer = set(_objects(example.shown[0])), set(_objects(example.answer))
        told = parse_edit(example.text)
        thing = next(iter(answer - source)) if told.kind == "add" else next(iter(source - answer))
        return Edit(told.kind, thing, told.into).text
    return parse_put(example.text, [_objects(scene)[0] for scene in example.shown]).canonical


def _objects(scene: tuple[Item, ...]) -> list[grammar.Object]:
    return [(item.colour, item.shape) for item in scene]


@pytest.mark.parametrize("task", ["edit", "in_context"])
def test_no_held_out_meaning_is_drawn_for_training(task: str) -> None:
    rng = np.random.default_rng(0)
    trained = {_meaning(task, one) for one in instructions.draw(task, "train", 4000, rng)}
    for split in ("validation", "held_out"):
        kept = {_meaning(task, one) for one in instructions.panel(task, split, 400)}
        assert len(kept) > 25
        assert not kept & trained


@pytest.mark.parametrize("task", TASKS)
def test_kinds_come_by_their_shares(task: str) -> None:
    counts = Counter(example.kind for example in instructions.draw(task, "train", 4000, np.random.default_rng(1)))
    for kind, share in instructions.kinds(task).items():
        assert abs(counts[kind] / 4000 - share) < 0.03
    panel = Counter(example.kind for example in instructions.panel(task, "held_out", 100))
    assert panel == {kind: round(100 * share) for kind, share in instructions.kinds(task).items()}


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides_a_draw_and_a_panel_is_fixed(task: str) -> None:
    one, again, other = (instructions.draw(task, "train", 20, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one == again != other
    assert instructions.panel(task, "held_out", 30) == instructions.panel(task, "held_out", 30)
    assert len({example.answer for example in instructions.panel(task, "held_out", 400)}) == 400


def test_only_some_kinds() -> None:
    drawn = instructions.draw("edit", "train", 50, np.random.default_rng(0), ("remove",))
    assert {example.kind for example in drawn} == {"remove"}


def test_a_source_allows_its_edit_in_one_way_only() -> None:
    for example in instructions.draw("edit", "train", 1000, np.random.default_rng(2)):
        (source,), edit = example.shown, parse_edit(example.text)
        assert fits(source)
        assert fits(example.answer)
        for scene in (source, example.answer):
            assert len(set(_objects(scene))) == len(scene), "no two objects are alike"
        colour, shape = edit.thing
        meant = [one for one in _objects(source) if one[1] == shape and colour in (None, one[0])]
        assert len(meant) == (0 if edit.kind == "add" else 1)
        alone = sum(one[1] == shape for one in _objects(source)) == 1
        assert edit.kind == "add" or (colour is None) == alone, "the colour is told where it has to be"
        stay = {(item.colour, item.shape, item.x, item.y) for item in source} - {
            (item.colour, item.shape, item.x, item.y) for item in example.answer
        }
        assert len(stay) == (0 if edit.kind == "add" else 1), "the rest stays where it was"


@pytest.mark.parametrize("ask", [lambda: instructions.kinds("draw"), lambda: instructions.edits("move")])
def test_unknown_names_are_refused(ask: object) -> None:
    with pytest.raises(ValueError, match="known: "):
        ask()  # type: ignore[operator]
    with pytest.raises(ValueError, match="'test' is not a split"):
        instructions.split("test", "remove")


def test_what_fits() -> None:
    one = Item("red", "circle", 10.0, 10.0, 5.0)
    assert fits([one, Item("blue", "circle", 21.0, 10.0, 5.0)])
    assert not fits([one, Item("blue", "circle", 20.5, 10.0, 5.0)]), "nearer than half the gap"
    assert not fits([Item("red", "circle", 4.0, 10.0, 5.0)]), "beyond the edge"
