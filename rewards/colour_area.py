"""Is there as much of each colour as the caption's objects would cover? Smooth in the pixels: it has a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from rlkit.world.grammar import COLOURS, Caption, Object, parse
from rlkit.world.obeys import EDITED, goals
from rlkit.world.scenes import CANVAS, CROWDED_RADII, PALETTE, RADII, SIZE, Item, render_scenes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlkit.types import Prompt, Samples

_OFFSETS = torch.from_numpy(PALETTE - CANVAS)  # [colours, 3] from the background
_STRENGTHS = _OFFSETS.norm(dim=1)  # [colours]
_DIRECTIONS = _OFFSETS / _STRENGTHS[:, None]  # [colours, 3]
_DARK = 0.05  # distance from the background below which a pixel has hardly a direction; smooths the cosine at 0


@dataclass(frozen=True)
class ColourArea:
    """How well the area of each colour fits the caption, 0..1, with a gradient. It sees neither shapes nor places.

    Every pixel belongs to each colour to a degree: by its direction from the background, and by how far it is along it.
    The sums are areas. An area may lie anywhere between those that the caption's objects have when drawn smallest and
    largest; what is missing or too much is counted against what is there and what should be. 1 is best.

    It can be fooled, knowingly: any blot of the right size and colour is as good as a circle, left is as good as right,
    and two halves make a whole. Train on it, and judge by `composition`.

    Of an edit, which is no caption, the objects are those that there should be in the end: it is told what to see, and
    not what was there.

    temperature: the width of the transitions between colours; smaller is closer to the checker, and has less gradient.
    NaN, that is not scored, where a prompt is neither a caption nor an edit of its source.
    """

    temperature: float = 0.1

    reads = ("prompt",)
    optional = ("source",)
    range = (0.0, 1.0)
    higher_is_better = True
    components = ()
    groupwise = False
    differentiable = True
    licence = "Apache-2.0"
    size = "none"
    protocol = "this repository"
    version = "2"

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, not {self.temperature}: a step has no gradient")

    def __call__(self, samples: Samples) -> Tensor:
        found = areas(samples.media, self.temperature)  # [N, colours]
        captions = _wanted(samples.prompts)
        nothing = torch.zeros(2, len(COLOURS))  # not NaN: its gradient would be NaN for all, 0 times NaN being NaN
        bounds = [nothing if caption is None else expected(caption, self.temperature) for caption in captions]
        low, high = torch.stack([nothing, *bounds])[1:].to(found).unbind(1)  # [N, colours] both
        wrong = torch.relu(low - found) + torch.relu(found - high)
        values = 1 - wrong.sum(1) / (low + found).sum(1)
        known = torch.tensor([caption is not None for caption in captions], dtype=torch.bool, device=values.device)
        return torch.where(known, values, torch.nan)


def _wanted(prompts: Sequence[Prompt]) -> list[Caption | None]:
    """What each prompt wants to see; None for one from elsewhere: nothing here can say whether a picture fits it."""
    found = [_caption(prompt.text) for prompt in prompts]
    edits = [row for row, prompt in enumerate(prompts) if found[row] is None and prompt.source is not None]
    rows = [(prompts[row].text, cast(Tensor, prompts[row].source).detach().cpu().float().numpy()) for row in edits]
    for row, caption in zip(edits, goals(rows), strict=True):
        found[row] = caption
    return found


def _caption(text: str) -> Caption | None:
    try:
        return parse(text)
    except ValueError:
        return None


def areas(media: Tensor, temperature: float) -> Tensor:
    """The soft area of each colour, as a share of the picture, [N, colours]. media: [N, 3, H, W] in 0..1."""
    offset = media.movedim(1, -1).float() - torch.from_numpy(CANVAS).to(media.device)  # [N, H, W, 3]
    along = offset @ _DIRECTIONS.to(media.device).T  # [N, H, W, colours]
    cosine = along / (offset.square().sum(-1, keepdim=True) + _DARK**2).sqrt()
    covered = torch.sigmoid((along / _STRENGTHS.to(media.device) - 0.5) / temperature)
    return (torch.softmax(cosine / temperature, dim=-1) * covered).mean((1, 2))


@cache
def expected(caption: Caption, temperature: float) -> Tensor:
    """[2, colours]: the soft areas of the caption's objects, drawn smallest and largest."""
    radii = CROWDED_RADII if caption.number > 2 else RADII
    if caption.kind == EDITED:  # what is kept has the size that it had among more objects, or fewer
        radii = CROWDED_RADII[0], RADII[1]
    empty = _drawn((), temperature)
    objects = [_sizes(thing, radii, temperature) - empty for thing in caption.targets]
    return torch.stack([empty.expand(2, -1), *objects]).sum(0)  # no objects after the last was removed


@cache
def _sizes(thing: Object, radii: tuple[float, float], temperature: float) -> Tensor:
    """[2, colours]: one object in the middle of a picture, smallest and largest."""
    return torch.cat([_drawn((Item(*thing, SIZE / 2, SIZE / 2, radius),), temperature) for radius in radii])


def _drawn(scene: tuple[Item, ...], temperature: float) -> Tensor:
    return areas(torch.from_numpy(render_scenes([scene])), temperature)  # [1, colours]
