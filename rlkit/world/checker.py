"""From a picture to the truth of a caption: which objects are there, and which claims hold.

A pixel gets the colour whose direction from the background it shares: the nearest colour would be wrong, because a
half-covered yellow edge is nearest to green. Connected pixels of one colour are an object, and how strongly each of
its pixels is covered is compared with drawn shapes: at this size the outline alone cannot tell a circle from a worn
square. What looks like no known colour or shape still counts as an object that should not be there. Left out: blobs
of fewer than `MIN_AREA` pixels and anything less than half as strong as a colour, which are taken for noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from rlkit.world.grammar import COLOURS, SHAPES, Caption, Object
from rlkit.world.scenes import CANVAS, CROWDED_RADII, PALETTE, RADII, SIZE, FloatArray, signed_distance

IntArray: TypeAlias = npt.NDArray[np.int64]

UNKNOWN = "unknown"
MIN_COSINE = 0.93  # between a pixel's direction from the background and its colour's
MIN_STRENGTH = 0.5  # of the colour's full distance from the background
MIN_AREA = 12  # pixels; anything smaller is ignored
MIN_SIMILARITY = 0.92  # cosine between a silhouette and the most similar drawn one
MAX_ASPECT = 1.62  # of the longer side of the bounding box to the shorter
RELATION_DISTANCE = 4.0  # between centres; scenes are composed with more
PARTIAL_MATCH = 0.25  # an object with only its colour or only its shape right
CAP = 0.5  # the graded score of a picture that breaks a claim stays below this

_GRID = 16  # side of the square to which silhouettes are resized
_COLOUR_NAMES = (*COLOURS, UNKNOWN)
_STRENGTHS: FloatArray = np.linalg.norm(PALETTE - CANVAS, axis=1).astype(np.float32)  # [colours]
_DIRECTIONS: FloatArray = (PALETTE - CANVAS) / _STRENGTHS[:, None]  # [colours, 3]


@dataclass(frozen=True, slots=True)
class Detection:
    """One object found in a picture; (x, y) is the centre of its bounding box, area in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    area: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What holds of a caption in a picture.

    strict: 1 when every claim is true and nothing else is in the picture, else 0. graded: 1 when strict, else half of
    the mean over `clauses`, so below .5. clauses: 'object 1', ..., 'number', and 'relation' or 'place'.
    """

    strict: float
    graded: float
    clauses: dict[str, float]


def check(image: npt.NDArray[Any], caption: Caption) -> Verdict:
    """Judges one picture, [3, 32, 32] in 0..1."""
    return judge(detect(image), caption)


def check_batch(images: npt.NDArray[Any], captions: Sequence[Caption]) -> list[Verdict]:
    """Judges pictures [N, 3, 32, 32] in 0..1, each against its own caption."""
    found = detect_batch(images)
    if len(found) != len(captions):
        raise ValueError(f"{len(found)} images but {len(captions)} captions")
    return [judge(detections, caption) for detections, caption in zip(found, captions, strict=True)]


def detect(image: npt.NDArray[Any]) -> list[Detection]:
    """The objects of one picture, [3, 32, 32] in 0..1, largest first."""
    return detect_batch(np.asarray(image)[None])[0]


def detect_batch(images: npt.NDArray[Any]) -> list[list[Detection]]:
    """The objects of each picture of [N, 3, 32, 32] in 0..1, largest first."""
    if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"expected images of shape [N, 3, {SIZE}, {SIZE}], got {list(images.shape)}")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"expected floating-point images in 0..1, got {images.dtype}")
    labels, strength = _label_colours(images.astype(np.float32, copy=False))
    roots = _label_components(labels)
    flat = roots.ravel()
    pixels = np.flatnonzero(flat >= 0)
    areas_by_root = np.bincount(flat[pixels], minlength=flat.size)
    kept = np.flatnonzero(areas_by_root >= MIN_AREA)
    found: list[list[Detection]] = [[] for _ in range(len(images))]
    if not kept.size:
        return found
    kept = kept[np.argsort(-areas_by_root[kept], kind="stable")]
    areas, colours, owners = areas_by_root[kept], labels.ravel()[kept], kept // (SIZE * SIZE)
    left, right, top, bottom = box = _boxes(flat, pixels, kept)
    shapes = _name_shapes(roots, strength, kept, owners, box)
    x, y = (left + right + 1) / 2, (top + bottom + 1) / 2
    for index, owner in enumerate(owners.tolist()):
        colour = _COLOUR_NAMES[colours[index]]
        found[owner].append(Detection(colour, shapes[index], float(x[index]), float(y[index]), int(areas[index])))
    return found


def _label_colours(images: FloatArray) -> tuple[IntArray, FloatArray]:
    """Of each pixel the colour's index and the distance from the background, both [N, H, W].

    The background's index is -1; a pixel far from it that has no known colour gets the last one.
    """
    offset = images.transpose(0, 2, 3, 1) - CANVAS  # [N, H, W, 3]
    strength: FloatArray = np.sqrt(np.einsum("nhwc,nhwc->nhw", offset, offset))
    along = offset @ _DIRECTIONS.T  # [N, H, W, colours]
    best = along.argmax(axis=-1)
    cosine = np.take_along_axis(along, best[..., None], axis=-1)[..., 0] / np.maximum(strength, 1e-6)
    known = cosine > MIN_COSINE
    labels = np.where(known & (strength > MIN_STRENGTH * _STRENGTHS[best]), best, -1)
    labels[~known & (strength > MIN_STRENGTH * _STRENGTHS.min())] = len(COLOURS)
    return labels.astype(np.int64, copy=False), strength


def _label_components(labels: IntArray) -> IntArray:
    """For each pixel [N, H, W] the smallest flat index of its 4-connected, one-coloured component; background -1."""
    down = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] >= 0)
    across = (labels[:, :, 1:] == labels[:, :, :-1]) & (labels[:, :, 1:] >= 0)
    index = np.arange(labels.size, dtype=np.int64).reshape(labels.shape)
    first = np.concatenate([index[:, :-1][down], index[:, :, :-1][across]])
    second = np.concatenate([index[:, 1:][down], index[:, :, 1:][across]])
    root = index.ravel().copy()
    # Each joined pair hangs the larger of its two roots under the smaller; then every path is cut to its root.
    while first.size:
        low = np.minimum(root[first], root[second])
        high = np.maximum(root[first], root[second])
        np.minimum.at(root, high, low)
        while True:
            shorter = root[root]
            if np.array_equal(shorter, root):
                break
            root = shorter
        open_pairs = root[first] != root[second]
        first, second = first[open_pairs], second[open_pairs]
    return np.where(labels >= 0, root.reshape(labels.shape), -1)


def _boxes(flat: IntArray, pixels: IntArray, kept: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """First and last column, first and last row of each kept component."""
    place = np.full(flat.size, -1, dtype=np.int64)
    place[kept] = np.arange(kept.size)
    member = place[flat[pixels]]
    pixels, member = pixels[member >= 0], member[member >= 0]
    column, row = pixels % SIZE, pixels // SIZE % SIZE
    left, top = np.full(kept.size, SIZE), np.full(kept.size, SIZE)
    right, bottom = np.full(kept.size, -1), np.full(kept.size, -1)
    np.minimum.at(left, member, column)
    np.maximum.at(right, member, column)
    np.minimum.at(top, member, row)
    np.maximum.at(bottom, member, row)
    return left, right, top, bottom


def _silhouettes() -> tuple[IntArray, FloatArray]:
    """Drawn silhouettes, resized and of unit length [K, _GRID * _GRID], and the index of each one's shape [K].

    Every shape at many sizes and sub-pixel positions: a raster this coarse looks different in each.
    """
    radii = np.linspace(CROWDED_RADII[0], RADII[1], 10, dtype=np.float32)
    offsets = (0.0, 0.25, 0.5, 0.75)
    centres = np.arange(SIZE, dtype=np.float32) + 0.5 - SIZE / 2
    silhouettes = []
    for shape, radius, x, y in product(SHAPES, radii, offsets, offsets):
        u, v = (centres - np.float32(x))[None, :], (centres - np.float32(y))[:, None]
        coverage = np.clip(0.5 - signed_distance(shape, u, v, radius), 0, 1)
        columns, rows = np.flatnonzero(coverage.max(axis=0) > 0.5), np.flatnonzero(coverage.max(axis=1) > 0.5)
        resized = coverage[_stretch(rows[:1], len(rows)).T, _stretch(columns[:1], len(columns))].ravel()
        silhouettes.append(resized / np.linalg.norm(resized))
    return np.repeat(np.arange(len(SHAPES)), len(silhouettes) // len(SHAPES)), np.stack(silhouettes)


def _stretch(start: IntArray, length: IntArray | int) -> IntArray:
    """The `_GRID` indices, [M, _GRID], that resize the ranges of `length` from `start` by the nearest neighbour."""
    steps = (np.arange(_GRID) + 0.5) / _GRID * np.reshape(length, (-1, 1))
    return np.reshape(start, (-1, 1)) + steps.astype(np.int64)


_SILHOUETTE_SHAPES, _SILHOUETTES = _silhouettes()


def _name_shapes(
    roots: IntArray,
    strength: FloatArray,
    kept: IntArray,
    owners: IntArray,
    box: tuple[IntArray, IntArray, IntArray, IntArray],
) -> list[str]:
    """The shape of each kept component, by the cosine between its resized silhouette and the drawn ones."""
    left, right, top, bottom = box
    width, height = right - left + 1, bottom - top + 1
    where = owners[:, None, None], _stretch(top, height)[:, :, None], _stretch(left, width)[:, None, :]
    there = roots[where]  # [M, _GRID, _GRID]
    # The background is kept, because an edge covered by less than half carries the shape too; other objects are not.
    covered = np.where((there == kept[:, None, None]) | (there < 0), strength[where], 0).reshape(len(kept), -1)
    covered /= np.linalg.norm(covered, axis=1, keepdims=True)
    similarity = covered @ _SILHOUETTES.T  # [M, K]
    best = similarity.argmax(axis=1)
    aspect = np.maximum(width, height) / np.minimum(width, height)
    known = (similarity[np.arange(len(kept)), best] >= MIN_SIMILARITY) & (aspect <= MAX_ASPECT)
    shapes = _SILHOUETTE_SHAPES[best]
    return [SHAPES[shape] if sure else UNKNOWN for shape, sure in zip(shapes.tolist(), known.tolist(), strict=True)]


def judge(detections: Sequence[Detection], caption: Caption) -> Verdict:
    """Whether these objects, and no others, make a caption true."""
    scores, exact = _assign(detections, caption.targets)
    clauses = {f"object {index + 1}": score for index, score in enumerate(scores)}
    wanted, found = caption.number, len(detections)
    clauses["number"] = 1 - abs(found - wanted) / max(found, wanted)
    if caption.relation is not None:
        clauses["relation"] = float(_related(exact[0], exact[1], caption.relation))
    if caption.place is not None:
        clauses["place"] = float(_placed(exact[0], caption.place))
    if all(score == 1 for score in clauses.values()):
        return Verdict(1.0, 1.0, clauses)
    return Verdict(0.0, CAP * sum(clauses.values()) / len(clauses), clauses)


def _assign(detections: Sequence[Detection], targets: Sequence[Object]) -> tuple[list[float], list[Detection | None]]:
    """The score of each target, and its detection where colour and shape are both right."""
    scores = [0.0] * len(targets)
    exact: list[Detection | None] = [None] * len(targets)
    free = list(detections)
    for index, target in enumerate(targets):
        match = next((d for d in free if (d.colour, d.shape) == target), None)
        if match is not None:
            free.remove(match)
            scores[index], exact[index] = 1.0, match
    # The target with the fewest candidates chooses first: the score then does not depend on the order of the objects.
    candidates = {
        index: [d for d in free if d.colour == targets[index][0] or d.shape == targets[index][1]]
        for index in range(len(targets))
        if exact[index] is None
    }
    taken: list[Detection] = []
    for index in sorted(candidates, key=lambda index: len(candidates[index])):
        match = next((d for d in candidates[index] if not any(d is other for other in taken)), None)
        if match is not None:
            taken.append(match)
            scores[index] = PARTIAL_MATCH
    return scores, exact


def _related(first: Detection | None, second: Detection | None, relation: str) -> bool:
    if first is None or second is None:
        return False
    distance = {
        "left of": second.x - first.x,
        "right of": first.x - second.x,
        "above": second.y - first.y,
        "below": first.y - second.y,
    }[relation]
    return distance > RELATION_DISTANCE


def _placed(thing: Detection | None, place: str) -> bool:
    if thing is None:
        return False
    vertical, horizontal = "top" if thing.y < SIZE / 2 else "bottom", "left" if thing.x < SIZE / 2 else "right"
    return f"{vertical} {horizontal}" == place
