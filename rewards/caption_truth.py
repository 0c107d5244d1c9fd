"""Is a caption true of the picture it was written for? Rules of the embedded world read both; no model is involved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rlkit.world.obeys import check_captions

if TYPE_CHECKING:
    from rlkit.types import Samples

SCORES = ("strict", "graded", "mixed")


@dataclass(frozen=True)
class CaptionTruth:
    """Whether a caption is true of an embedded world's picture: strict, graded, or the mean of both.

    score: 'strict' is 1 when every claim is true and no object is left unsaid; 'graded' gives partial credit below .5;
    'mixed' is their mean. What is no caption of this world says nothing true: it scores 0.

    Returns (values [N], {"strict": [N], "graded": [N], "words": [N]}); NaN where a prompt has no source picture.
    """

    score: str = "mixed"

    reads = ("text", "source")
    range = (0.0, 1.0)
    higher_is_better = True
    components = ("strict", "graded", "words")
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
        n = len(samples.prompts)
        sources = [None if one.source is None else one.source.detach().cpu().float().numpy() for one in samples.prompts]
        rows = [row for row, source in enumerate(sources) if source is not None]
        strict, graded = torch.full((n,), math.nan), torch.full((n,), math.nan)
        if rows:
            pictures = np.stack([source for source in sources if source is not None])
            verdicts = check_captions(pictures, [samples.texts[row] for row in rows])
            strict[rows] = torch.tensor([verdict.strict for verdict in verdicts], dtype=torch.float32)
            graded[rows] = torch.tensor([verdict.graded for verdict in verdicts], dtype=torch.float32)
        words = torch.tensor([float(len(text.split())) for text in samples.texts])
        values = {"strict": strict, "graded": graded, "mixed": (strict + graded) / 2}[self.score]
        return values, {"strict": strict, "graded": graded, "words": words}
