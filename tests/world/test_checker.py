"""The checker accepts true pictures, refuses false ones, and never pays a broken claim more than half."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from rlkit.world import checker, grammar
from rlkit.world.checker import Detection, check, check_batch, detect
from rlkit.world.grammar import COLOURS, KINDS, PLACES, SHAPES, Caption, draw, parse
from rlkit.world.scenes import CANVAS, PALETTE, FloatArray, Item, Scene, compose, render_batch, render_scenes

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def picture(*items: Item) -> FloatArray:
    return render_scenes([items])[0]


def false_captions(caption: Caption, rng: np.random.Generator) -> Iterator[Caption]:
    """Captions that differ from a true one in a single respect."""
    if caption.relation is not None:
        yield replace(caption, relation=OPPOSITE[caption.relation])
    if caption.place is not None:
        yield from (replace(caption, place=place) for place in PLACES if place != caption.place)
    if caption.count is not None:
        near = (caption.count - 1, caption.count + 1)
        yield from (replace(caption, count=count) for count in near if count in grammar.NUMBERS.values())
    if len(caption.objects) == 2:
        (colour, shape), (other_colour, other_shape) = caption.objects
        if colour != other_colour and shape != other_shape:
            # For two objects, swapping the colours and swapping the shapes ask for the same picture.
            yield replace(caption, objects=((other_colour, shape), (colour, other_shape)))
            yield replace(caption, objects=((colour, other_shape), (other_colour, shape)))
        yield Caption("single", caption.objects[:1])  # the picture holds one object too many
    else:
        extra = ("red", "circle") if caption.objects[0] != ("red", "circle") else ("blue", "cross")
        yield Caption("two", (*caption.objects, extra))  # and one too few, or another one
    place = int(rng.integers(len(caption.objects)))
    colour, shape = caption.objects[place]
    colours, shapes = [c for c in COLOURS if c != colour], [s for s in SHAPES if s != shape]
    for changed in ((colours[rng.integers(5)], shape), (colour, shapes[rng.integers(3)])):
        yield replace(caption, objects=(*caption.objects[:place], changed, *caption.objects[place + 1 :]))


def test_true_pictures_are_accepted() -> None:
    rng = np.random.default_rng(0)
    rows = [caption for split in grammar.SPLITS for caption in draw(split, 2000, rng)]
    verdicts = check_batch(render_batch(rows, rng), rows)
    asked = Counter(caption.kind for caption in rows)
    refused = Counter(caption.kind for caption, verdict in zip(rows, verdicts, strict=True) if not verdict.strict)
    assert set(asked) == set(KINDS)
    assert all(refused[kind] <= 0.015 * asked[kind] for kind in KINDS), refused


def test_false_captions_are_refused() -> None:
    rng = np.random.default_rng(1)
    pairs = [
        (caption, wrong)
        for caption in draw("train", 1500, rng)
        for wrong in false_captions(caption, rng)
        if wrong.canonical != caption.canonical
    ]
    assert len(pairs) >= 5000
    verdicts = check_batch(render_batch([true for true, _ in pairs], rng), [wrong for _, wrong in pairs])
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.strict] == []
    assert max(verdict.graded for verdict in verdicts) < checker.CAP


def test_worn_pictures_are_accepted() -> None:
    rng = np.random.default_rng(2)
    rows = draw("train", 800, rng)
    clean = render_batch(rows, rng)
    blurred = clean.copy()
    blurred[..., 1:] = (clean[..., 1:] + clean[..., :-1]) / 2
    noisy = np.clip(clean + rng.normal(0, 10 / 255, clean.shape), 0, 1)
    for images in (blurred, noisy, clean * np.float32(0.8), np.round(clean * 255) / 255):
        strict = [verdict.strict for verdict in check_batch(images, rows)]
        assert np.mean(strict) > 0.98


def test_a_verdict_in_full() -> None:
    image = picture(Item("red", "circle", 8, 16, 5), Item("blue", "square", 24, 16, 5))
    right = check(image, parse("a red circle left of a blue square"))
    assert (right.strict, right.graded) == (1, 1)
    assert right.clauses == {"object 1": 1, "object 2": 1, "number": 1, "relation": 1}
    reversed_ = check(image, parse("a red circle right of a blue square"))
    assert reversed_.clauses == {"object 1": 1, "object 2": 1, "number": 1, "relation": 0}
    assert (reversed_.strict, reversed_.graded) == (0, 0.375)
    recoloured = check(image, parse("a red circle left of a green square"))
    assert recoloured.clauses == {"object 1": 1, "object 2": 0.25, "number": 1, "relation": 0}
    assert recoloured.graded == pytest.approx(0.5 * 2.25 / 4)


def test_places_and_counts() -> None:
    image = picture(Item("red", "cross", 8, 8, 5), Item("red", "cross", 24, 24, 5))
    assert check(image, parse("two red crosses")).strict == 1
    assert check(image, parse("three red crosses")).clauses == {
        "object 1": 1,
        "object 2": 1,
        "object 3": 0,
        "number": pytest.approx(2 / 3),
    }
    one = check(image[:, :, :], parse("a red cross in the top left"))
    assert one.clauses == {"object 1": 1, "number": 0.5, "place": 1}
    assert one.strict == 0


def test_an_empty_picture_scores_nothing() -> None:
    empty = picture()
    assert detect(empty) == []
    for caption in draw("train", 40, np.random.default_rng(3)):
        verdict = check(empty, caption)
        assert (verdict.strict, verdict.graded) == (0, 0)


def test_junk_is_counted_and_specks_are_not() -> None:
    caption = parse("a red circle")
    image = picture(Item("red", "circle", 10, 16, 5))
    speck, blob, grey = image.copy(), image.copy(), image.copy()
    speck[:, 4:7, 24:27] = PALETTE[2][:, None, None]  # 9 pixels
    blob[:, 4:6, 20:30] = PALETTE[2][:, None, None]  # a bar is no shape
    grey[:, 4:10, 22:28] = 0.8
    assert check(speck, caption).strict == 1
    assert [(d.colour, d.shape) for d in detect(blob)] == [("red", "circle"), ("blue", "unknown")]
    assert [(d.colour, d.shape) for d in detect(grey)] == [("red", "circle"), ("unknown", "square")]
    assert check(blob, caption).strict == check(grey, caption).strict == 0


def drawn(inside: np.ndarray) -> FloatArray:
    mask = inside[None].astype(np.float32)
    return CANVAS[:, None, None] + mask * (PALETTE[0] - CANVAS)[:, None, None]


def test_other_shapes_are_unknown() -> None:
    y, x = np.mgrid[:32, :32] - 15.5
    distance = np.hypot(x, y)
    square = np.maximum(abs(x), abs(y)) < 6
    others = {
        "ring": (distance < 6) & (distance > 3),
        "frame": square & (np.maximum(abs(x), abs(y)) > 3),
        "corner": square & ((x < -2) | (y > 2)),
        "triangle on its head": (2 * abs(x) + y < 6) & (y > -6),
        "bar": (abs(x) < 7) & (abs(y) < 3),
    }
    found = {name: [d.shape for d in detect(drawn(inside))] for name, inside in others.items()}
    assert found == {name: ["unknown"] for name in others}


def test_detections_lie_where_items_were_drawn() -> None:
    rng = np.random.default_rng(4)
    scenes: list[Scene] = [compose(caption, rng) for caption in draw("train", 300, rng)]
    for scene, found in zip(scenes, checker.detect_batch(render_scenes(scenes)), strict=True):
        assert len(found) == len(scene)
        assert [d.area for d in found] == sorted((d.area for d in found), reverse=True)
        for item in scene:
            assert any(
                (d.colour, d.shape) == (item.colour, item.shape) and max(abs(d.x - item.x), abs(d.y - item.y)) <= 1
                for d in found
            )


def test_equal_meanings_get_equal_verdicts() -> None:
    rng = np.random.default_rng(5)
    for kind in ("two", "relation"):
        meanings: dict[str, list[Caption]] = {}
        for caption in grammar.captions(kind):
            meanings.setdefault(caption.canonical, []).append(caption)
        shown = list(meanings.values())[::7]
        asked = shown[1:] + shown[:1]  # pictures of another caption: partial credit must agree too
        for truths in (shown, asked):
            images = render_batch([pair[0] for pair in shown], rng)
            first = check_batch(images, [pair[0] for pair in truths])
            second = check_batch(images, [pair[1] for pair in truths])
            assert [v.graded for v in first] == pytest.approx([v.graded for v in second])


def test_partial_credit_is_shared_out_in_any_order() -> None:
    # The red triangle half-matches both targets, the blue circle only the red circle.
    image = picture(Item("red", "triangle", 8, 16, 5), Item("blue", "circle", 24, 16, 5))
    for text in ("a red circle and a red square", "a red square and a red circle"):
        verdict = check(image, parse(text))
        assert (verdict.clauses["object 1"], verdict.clauses["object 2"]) == (0.25, 0.25)


def test_graded_stays_in_range_on_noise() -> None:
    rng = np.random.default_rng(6)
    rows = draw("train", 200, rng)
    coarse = rng.random((200, 3, 8, 8)).repeat(4, axis=2).repeat(4, axis=3)
    for images in (rng.random((200, 3, 32, 32)), coarse):
        for verdict in check_batch(images, rows):
            assert 0 <= verdict.graded < checker.CAP or verdict.strict == 1
            assert all(0 <= score <= 1 for score in verdict.clauses.values())


def test_one_and_many_agree() -> None:
    rng = np.random.default_rng(7)
    rows = draw("train", 60, rng)
    images = render_batch(rows[1:] + rows[:1], rng)
    many = check_batch(images, rows)
    assert [check(image, caption) for image, caption in zip(images, rows, strict=True)] == many
    assert check_batch(images[:0], []) == []


def components_by_search(labels: np.ndarray) -> np.ndarray:
    """A flood fill, the slow way."""
    wide = np.pad(labels, ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    roots = np.full(wide.shape, -1)
    for index, (n, row, column) in enumerate(np.ndindex(labels.shape)):
        todo = [(n, row + 1, column + 1)]
        label = wide[todo[0]]
        while todo:
            n, i, j = todo.pop()
            if label >= 0 and wide[n, i, j] == label and roots[n, i, j] < 0:
                roots[n, i, j] = index
                todo += [(n, i + 1, j), (n, i - 1, j), (n, i, j + 1), (n, i, j - 1)]
    return roots[:, 1:-1, 1:-1]


def test_components_equal_a_flood_fill() -> None:
    rng = np.random.default_rng(8)
    labels = np.concatenate([rng.integers(-1, 2, (3, 32, 32)), rng.integers(-1, 1, (3, 32, 32))])
    spiral = np.full((1, 32, 32), -1)
    for inset in range(0, 14, 2):
        spiral[0, inset, inset:-1] = spiral[0, inset : 32 - inset, 31 - inset] = 0
        spiral[0, 31 - inset, inset : 32 - inset] = spiral[0, inset + 2 : 32 - inset, inset] = 0
    labels = np.concatenate([labels, spiral])
    assert np.array_equal(checker._label_components(labels), components_by_search(labels))


def test_wrong_inputs_are_refused() -> None:
    caption = parse("a red circle")
    with pytest.raises(ValueError, match="expected images of shape"):
        check(np.zeros((32, 32, 3), dtype=np.float32), caption)
    with pytest.raises(ValueError, match="floating-point"):
        check(np.zeros((3, 32, 32), dtype=np.uint8), caption)
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        check_batch(np.zeros((2, 3, 32, 32), dtype=np.float32), [caption])


def test_detections_are_values() -> None:
    assert Detection("red", "circle", 1.0, 2.0, 30) == Detection("red", "circle", 1.0, 2.0, 30)
