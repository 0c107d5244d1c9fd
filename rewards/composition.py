"""Does the picture show what a caption of the tiny world says? Rules read it back; no model is involved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlkit.world.checker import Verdict, check_batch
from rlkit.world.grammar import Caption, parse

if TYPE_CHECKING:
    from rlkit.types import Samples

SCORES = ("strict", "graded", "mixed")


@dataclass(frozen=True)
class Composition:
    """Whether a picture of the embedded world makes its caption true: strict, graded, or the mean of both.

    score: 'strict' is 1 when every claim is true and nothing else is in the picture; 'graded' gives partial credit
    below .5; 'mixed' is their mean, so that a group without a fully true picture still has a signal. Report strict:
    partial credit alone can look healthy in a picture that breaks a claim.

    Returns (values [N], {"strict": [N], "graded": [N]}); NaN, that is not scored, where a prompt is no caption.
    """

    score: str = "mixed"

    reads = ("prompt",)
    range = (0.0, 1.0)
    higher_is_better = True
    components = ("strict", "graded")
    groupwise = False
    licence = "Apache-2.0"
    size = "none"
    protocol = "this repository, rlkit/world/checker.py"
    version = "1"

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            near = get_close_matches(self.score, SCORES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"score={self.score!r} is none of {', '.join(SCORES)}{hint}")

    def __call__(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        captions = [_caption(prompt.text) for prompt in samples.prompts]
        scored = [row for row, caption in enumerate(captions) if caption is not None]
        images = samples.media.detach()[scored].to("cpu", torch.float32).numpy()
        verdicts = check_batch(images, [caption for caption in captions if caption is not None])
        strict, graded = _columns(verdicts, scored, len(captions))
        values = {"strict": strict, "graded": graded, "mixed": (strict + graded) / 2}[self.score]
        return values, {"strict": strict, "graded": graded}


def _caption(text: str) -> Caption | None:
    try:
        return parse(text)
    except ValueError:
        return None  # a prompt from elsewhere: nothing here can say whether the picture fits it


def _columns(verdicts: list[Verdict], rows: list[int], n: int) -> tuple[Tensor, Tensor]:
    """Strict and graded, each [N], NaN outside `rows`."""
    strict, graded = torch.full((n,), math.nan), torch.full((n,), math.nan)
    strict[rows] = torch.tensor([verdict.strict for verdict in verdicts], dtype=torch.float32)
    graded[rows] = torch.tensor([verdict.graded for verdict in verdicts], dtype=torch.float32)
    return strict, graded
