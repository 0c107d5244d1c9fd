"""Scenes obey their captions and the canvas, and pictures obey their scenes."""

import numpy as np
import pytest

from rlkit.world import scenes
from rlkit.world.grammar import BACKGROUND, COLOURS, KINDS, SHAPES, draw, parse
from rlkit.world.scenes import Item, compose, render, render_batch, render_scenes

DRAWN = draw("train", 1200, np.random.default_rng(1))


def test_scenes_hold_what_the_caption_names() -> None:
    rng = np.random.default_rng(2)
    for caption in DRAWN:
        assert tuple((item.colour, item.shape) for item in compose(caption, rng)) == caption.targets


def test_layout() -> None:
    rng = np.random.default_rng(3)
    for caption in DRAWN:
        scene = compose(caption, rng)
        low, high = scenes.CROWDED_RADII if len(scene) > 2 else scenes.RADII
        for index, item in enumerate(scene):
            assert low <= item.radius <= high
            assert item.extent <= min(item.x, item.y, scenes.SIZE - item.x, scenes.SIZE - item.y)
            for other in scene[:index]:
                apart = max(abs(item.x - other.x), abs(item.y - other.y))
                assert apart >= item.extent + other.extent + scenes.GAP


@pytest.mark.parametrize(
    ("relation", "axis", "sign"), [("left of", 0, 1), ("right of", 0, -1), ("above", 1, 1), ("below", 1, -1)]
)
def test_relations_dominate(relation: str, axis: int, sign: int) -> None:
    rng = np.random.default_rng(4)
    caption = parse(f"a red circle {relation} a blue cross")
    for _ in range(100):
        first, second = compose(caption, rng)
        offset = (second.x - first.x, second.y - first.y)
        assert sign * offset[axis] >= scenes.RELATION_DISTANCE
        assert abs(offset[axis]) > abs(offset[1 - axis])


@pytest.mark.parametrize("place", ["top left", "top right", "bottom left", "bottom right"])
def test_places(place: str) -> None:
    rng = np.random.default_rng(5)
    middle, margin = scenes.SIZE / 2, scenes.PLACE_MARGIN
    for _ in range(100):
        (item,) = compose(parse(f"a red triangle in the {place}"), rng)
        assert item.x <= middle - margin if "left" in place else item.x >= middle + margin
        assert item.y <= middle - margin if "top" in place else item.y >= middle + margin


def test_a_seed_fixes_the_pictures() -> None:
    one, other = (render_batch(DRAWN[:50], np.random.default_rng(6)) for _ in range(2))
    assert np.array_equal(one, other)


def test_render_and_batch_agree() -> None:
    rng = np.random.default_rng(7)
    chosen = [compose(caption, rng) for caption in DRAWN[:30]]
    batch = render_scenes(chosen)
    assert batch.shape == (30, 3, 32, 32)
    assert batch.dtype == np.float32
    assert batch.min() >= 0
    assert batch.max() <= 1
    for scene, image in zip(chosen, batch, strict=True):
        assert np.array_equal(render(scene), image.transpose(1, 2, 0))


def test_an_empty_scene_is_background() -> None:
    assert np.allclose(render(()), np.array(BACKGROUND) / 255)
    assert render_scenes([]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_centre_has_the_full_colour(colour: str, shape: str) -> None:
    image = render((Item(colour, shape, 14.5, 16.5, 5.0),))
    assert np.allclose(image[16, 14], np.array(COLOURS[colour]) / 255)
    assert np.allclose(image[0, 0], np.array(BACKGROUND) / 255)


def test_a_square_covers_its_area() -> None:
    # Half a side of .9 * 5 = 4.5 pixels around a pixel's centre: exactly 9 x 9 pixels.
    image = render((Item("red", "square", 16.5, 16.5, 5.0),))
    assert np.isclose(image[..., 0], 230 / 255).sum() == 81
    assert np.isclose(image[..., 0], 18 / 255).sum() == 1024 - 81


def test_shapes_are_of_similar_area() -> None:
    full = (230 - 18) / 255
    areas = [((render((Item("red", shape, 16, 16, 6.0),))[..., 0] - 18 / 255) / full).sum() for shape in SHAPES]
    assert max(areas) / min(areas) < 1.35


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 0.37, 0.99])
def test_no_shape_is_cut_by_its_window(shape: str, offset: float) -> None:
    item = Item("red", shape, 15 + offset, 15 + offset, scenes.RADII[1])
    centres = np.arange(scenes.SIZE, dtype=np.float32) + np.float32(0.5)
    u, v = (centres - np.float32(item.x))[None, :], (centres - np.float32(item.y))[:, None]
    coverage = np.clip(0.5 - scenes.signed_distance(shape, u, v, np.array([[item.radius]], dtype=np.float32)), 0, 1)
    wanted = scenes.CANVAS + coverage[..., None] * (scenes.PALETTE[0] - scenes.CANVAS)
    assert np.allclose(render((item,)), wanted, atol=1e-6)


def test_every_kind_was_drawn() -> None:
    assert {caption.kind for caption in DRAWN} == set(KINDS)
