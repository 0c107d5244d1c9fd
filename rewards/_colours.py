"""The colour of an object in a picture, as CLIP names it: which of ten colour words fits the cut-out best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlkit.clauses import Detection
from rlkit.embedding import AT_ONCE, Clip, feature_tensor, load_clip, unit

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SENTENCES = ("a {colour} {thing}", "a picture of one {thing} that is {colour}", "something {colour}")
GREY = 0x99 / 255  # what an object's surroundings are painted with
LONGEST = 4  # times the shorter side: what lies further out would be cut off after the resizing anyway


@dataclass(frozen=True)
class ColourNames:
    """Names colours of cut-outs, each by itself."""

    clip: Clip

    def __call__(self, cuts: Sequence[Tensor], things: Sequence[str]) -> list[str]:
        """One colour word for each cut-out [3, h, w] of a thing."""
        if not cuts:
            return []
        pictures = self.clip.pictures
        known = list(dict.fromkeys(things))
        sentences = [s.format(colour=colour, thing=t) for t in known for colour in COLOURS for s in SENTENCES]
        texts, _ = self.clip.texts(sentences)
        words = unit(texts.reshape(len(known), len(COLOURS), len(SENTENCES), -1).mean(2))  # [T, colours, E]
        names: list[str] = []
        with torch.no_grad():
            for start in range(0, len(cuts), AT_ONCE):
                some = [one.to(pictures.device, torch.float32)[None] for one in cuts[start : start + AT_ONCE]]
                pixels = torch.cat([pictures.preprocessing(one) for one in some]).to(pictures.dtype)
                rows = [known.index(thing) for thing in things[start : start + AT_ONCE]]
                vectors = unit(feature_tensor(pictures.features(pixels)))  # [n, E]
                best = (words[rows] @ vectors[:, :, None])[..., 0].argmax(1)  # of [n, colours]
                names += [COLOURS[one] for one in best.tolist()]
        return names


def load(path: str, device: torch.device) -> ColourNames:
    return ColourNames(load_clip(path, device, "fp32"))


def cut(picture: Tensor, found: Detection, row: int) -> Tensor:
    """The object's bounding box out of [3, H, W], one pixel at least, on grey where there is a mask."""
    height, width = picture.shape[-2:]
    left, top, right, bottom = found.boxes[row].tolist()
    x0, y0 = min(max(math.floor(left), 0), width - 1), min(max(math.floor(top), 0), height - 1)
    x1, y1 = max(min(math.ceil(right), width), x0 + 1), max(min(math.ceil(bottom), height), y0 + 1)
    if found.masks is not None:
        picture = torch.where(found.masks[row].to(picture.device), picture, GREY)
    return _middle(picture[:, y0:y1, x0:x1])


def _middle(picture: Tensor) -> Tensor:
    """Without the ends of a sliver, which would grow to thousands of pixels when its short side is made as long as
    the network wants it."""
    most = LONGEST * min(picture.shape[-2:])
    height, width = (min(side, most) for side in picture.shape[-2:])
    y, x = (picture.shape[-2] - height) // 2, (picture.shape[-1] - width) // 2
    return picture[:, y : y + height, x : x + width]
