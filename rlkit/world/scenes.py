"""From a caption to a picture: a random layout that makes the caption true, and its rendering.

Lengths are pixels of a 32 x 32 canvas, x to the right and y down; the centre of the pixel in row i and column j lies
at (j + .5, i + .5).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from rlkit.world.grammar import BACKGROUND, COLOURS, RELATIONS, SHAPES, Caption

FloatArray: TypeAlias = npt.NDArray[np.float32]

SIZE = 32
RADII = (4.2, 6.2)
CROWDED_RADII = (3.9, 5.0)  # with three objects or more
GAP = 1.5  # between bounding boxes: one pixel column always stays empty
RELATION_DISTANCE = 7.0  # between centres, along the axis of the relation
RELATION_SLOPE = 1.2  # how much larger that distance is than the one across
PLACE_MARGIN = 2.0  # from a centre to the middle lines of the canvas

# Half the side of each shape's bounding box, in radii. Areas are then 3.1 (circle), 3.2, 2.6 and 3.1 square radii.
EXTENTS = MappingProxyType({"circle": 1.0, "square": 0.9, "triangle": 1.15, "cross": 1.1})
_CROSS_ARM = 0.45  # half the width of an arm, in radii
_WINDOW = 18  # pixels that hold the largest object at any sub-pixel position
_ATTEMPTS = 24  # positions tried for one object before the layout starts again

PALETTE: FloatArray = np.array(list(COLOURS.values()), dtype=np.float32) / np.float32(255)  # [colours, 3]
CANVAS: FloatArray = np.array(BACKGROUND, dtype=np.float32) / np.float32(255)  # [3]
_COLOUR_INDEX = MappingProxyType({name: index for index, name in enumerate(COLOURS)})


@dataclass(frozen=True, slots=True)
class Item:
    """One object of a scene; (x, y) is the centre of its bounding box."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def extent(self) -> float:
        """Half the side of the bounding box."""
        return self.radius * EXTENTS[self.shape]


Scene: TypeAlias = tuple[Item, ...]


def compose(caption: Caption, rng: np.random.Generator) -> Scene:
    """A random scene of which the caption is true and which holds nothing else."""
    targets = caption.targets
    smallest, largest = RADII if len(targets) < 3 else CROWDED_RADII
    while True:
        scene: list[Item] = []
        for colour, shape in targets:
            radius = smallest + (largest - smallest) * rng.random()
            item = _free_spot(colour, shape, radius, scene, caption.place, rng)
            if item is None:
                break
            scene.append(item)
        if len(scene) == len(targets) and _in_relation(scene, caption.relation):
            return tuple(scene)


def _free_spot(
    colour: str, shape: str, radius: float, others: Sequence[Item], place: str | None, rng: np.random.Generator
) -> Item | None:
    """An item inside the canvas (inside the quadrant `place`, if given) that keeps the gap to the others, if found."""
    extent = radius * EXTENTS[shape]
    border = extent + 0.5
    x_low, x_high = border, SIZE - border
    y_low, y_high = border, SIZE - border
    if place is not None:
        middle = SIZE / 2
        x_low, x_high = (x_low, middle - PLACE_MARGIN) if "left" in place else (middle + PLACE_MARGIN, x_high)
        y_low, y_high = (y_low, middle - PLACE_MARGIN) if "top" in place else (middle + PLACE_MARGIN, y_high)
    random = rng.random
    for _ in range(_ATTEMPTS):
        x = x_low + (x_high - x_low) * random()
        y = y_low + (y_high - y_low) * random()
        if all(max(abs(x - o.x), abs(y - o.y)) >= extent + o.extent + GAP for o in others):
            return Item(colour, shape, x, y, radius)
    return None


def fits(scene: Sequence[Item]) -> bool:
    """Whether every item lies inside the canvas, and no two come closer than half the gap."""
    inside = all(item.extent <= centre <= SIZE - item.extent for item in scene for centre in (item.x, item.y))
    apart = (
        max(abs(one.x - other.x), abs(one.y - other.y)) >= one.extent + other.extent + GAP / 2
        for i, one in enumerate(scene)
        for other in scene[:i]
    )
    return inside and all(apart)


def _in_relation(scene: Sequence[Item], relation: str | None) -> bool:
    if relation is None:
        return True
    if relation not in RELATIONS:
        raise ValueError(f"{relation!r} is not a relation; known: {', '.join(RELATIONS)}")
    first, second = scene
    along, across = second.x - first.x, second.y - first.y
    if relation in ("above", "below"):
        along, across = across, along
    if relation in ("right of", "below"):
        along = -along
    return along >= max(RELATION_DISTANCE, RELATION_SLOPE * abs(across))


def signed_distance(shape: str, u: FloatArray, v: FloatArray, radius: FloatArray) -> FloatArray:
    """Distance to a shape's edge at offset (u, v) from its centre, negative inside (a bound of it near corners)."""
    u = np.abs(u)
    extent = radius * np.float32(EXTENTS[shape])
    if shape == "circle":
        return np.sqrt(u * u + v * v) - extent
    if shape == "square":
        return np.maximum(u, np.abs(v)) - extent
    if shape == "cross":
        v, arm = np.abs(v), radius * np.float32(_CROSS_ARM)
        return np.minimum(np.maximum(u - extent, v - arm), np.maximum(u - arm, v - extent))
    if shape == "triangle":
        # The slanted edge runs from (0, -extent) to (extent, extent); its normal is (2, -1) / sqrt(5).
        slant = (2 * u - v - extent) / np.float32(math.sqrt(5))
        return np.maximum(slant, v - extent)
    raise ValueError(f"{shape!r} is not a shape; known: {', '.join(SHAPES)}")


def render(scene: Scene) -> FloatArray:
    """The picture of a scene, [32, 32, 3] in 0..1, with edges smoothed over one pixel."""
    return np.ascontiguousarray(render_scenes([scene])[0].transpose(1, 2, 0))


def render_batch(captions: Sequence[Caption], rng: np.random.Generator) -> FloatArray:
    """One random true picture for each caption, [N, 3, 32, 32] in 0..1."""
    return render_scenes([compose(caption, rng) for caption in captions])


def render_scenes(scenes: Sequence[Scene]) -> FloatArray:
    """The pictures of many scenes, [N, 3, 32, 32] in 0..1; a later item covers an earlier one."""
    # The canvas is wider by one window on each side, so that no window needs clipping.
    wide = SIZE + 2 * _WINDOW
    canvas = np.empty((len(scenes), wide, wide, 3), dtype=np.float32)
    canvas[:] = CANVAS
    items = [item for scene in scenes for item in scene]
    owners = np.array([index for index, scene in enumerate(scenes) for _ in scene], dtype=np.int64)
    slots = np.array([slot for scene in scenes for slot in range(len(scene))], dtype=np.int64)
    if items:
        rows, columns, coverage = _windows(items)
        colours = PALETTE[[_COLOUR_INDEX[item.colour] for item in items]]
        # Items of one slot lie in different pictures, so that one assignment can paint them all.
        for slot in range(int(slots.max()) + 1):
            chosen = np.flatnonzero(slots == slot)
            where = (owners[chosen][:, None, None], rows[chosen][:, :, None], columns[chosen][:, None, :])
            under = canvas[where]
            canvas[where] = under + coverage[chosen][..., None] * (colours[chosen][:, None, None, :] - under)
    inside = slice(_WINDOW, _WINDOW + SIZE)
    return np.ascontiguousarray(canvas[:, inside, inside].transpose(0, 3, 1, 2))


def _windows(items: Sequence[Item]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], FloatArray]:
    """Rows [M, W] and columns [M, W] of each item's window on the wide canvas, and its coverage [M, W, W] in 0..1."""
    numbers = np.array([(item.x, item.y, item.radius) for item in items], dtype=np.float32)
    steps = np.arange(_WINDOW) - _WINDOW // 2
    columns = np.floor(numbers[:, 0]).astype(np.int64)[:, None] + steps
    rows = np.floor(numbers[:, 1]).astype(np.int64)[:, None] + steps
    u = (columns + np.float32(0.5) - numbers[:, :1]).astype(np.float32)[:, None, :]
    v = (rows + np.float32(0.5) - numbers[:, 1:2]).astype(np.float32)[:, :, None]
    coverage = np.empty((len(items), _WINDOW, _WINDOW), dtype=np.float32)
    shapes = np.array([item.shape for item in items])
    for shape in np.unique(shapes).tolist():
        chosen = np.flatnonzero(shapes == shape)
        radius = numbers[chosen, 2][:, None, None]
        coverage[chosen] = np.clip(0.5 - signed_distance(shape, u[chosen], v[chosen], radius), 0, 1)
    return rows + _WINDOW, columns + _WINDOW, coverage
