"""How few bytes a picture takes as a JPEG file: a reward that everybody can compute, and that everything hacks.

Protocol: the compressibility of DDPO (Black et al. 2023, arXiv 2305.13301) as ddpo-pytorch and flow_grpo compute it,
which is `mode: kb`: minus the file's size in kB (1000 bytes), over 500.
`mode: bits` is minus the bits per pixel that the file has beyond that of a grey picture of the same size.

Differences from the reference code: `bits` is the default, because the header dominates small files. At 32 pixels it is
0.64 kB of the 1.8 kB of pure noise, and all rewards lie within .003. Incompressibility is not an entry of its own: give
the reward a negative weight.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlkit.pictures import PictureError, to_pil
from rlkit.types import Unscored

if TYPE_CHECKING:
    from PIL import Image

    from rlkit.types import Samples

MODES = ("bits", "kb")


@dataclass(frozen=True)
class JpegSize:
    """Minus the size of the picture as a JPEG file; for tests and for showing how a reward is hacked.

    0 is best, and is what a blank picture has: a policy that is trained on this alone forgets its prompts.
    `bits` hardly depends on the size of the picture; `kb` is the formula of the literature.
    """

    mode: str = "bits"  # bits per pixel beyond a grey picture's; kb: kilobytes over 500
    quality: int = 95  # of the JPEG file, 1 to 95

    reads = ()
    range = (None, 0.0)
    higher_is_better = True
    components = ()
    groupwise = False
    licence = "none needed"
    size = "none"
    protocol = "DDPO (arXiv 2305.13301), jpeg compressibility"
    version = "1"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            near = get_close_matches(self.mode, MODES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"mode={self.mode!r} is none of {', '.join(MODES)}{hint}")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality={self.quality} must be 1 to 95: above 95, files grow and pictures stay the same")

    def __call__(self, samples: Samples) -> list[float | Unscored]:
        return [self._one(picture) for picture in samples.media]

    def _one(self, picture: Tensor) -> float | Unscored:
        try:
            image = to_pil(picture)
        except PictureError as error:
            return Unscored(str(error))
        if self.mode == "kb":
            return -_bytes(image, self.quality) / 1000 / 500
        beyond = _bytes(image, self.quality) - _empty(*image.size, self.quality)
        return -8.0 * beyond / (image.width * image.height)


def _bytes(image: Image.Image, quality: int) -> int:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.tell()


@cache
def _empty(width: int, height: int, quality: int) -> int:
    """The least that a file of this size can have: mid-grey has no coefficients at all, another colour has one."""
    return _bytes(to_pil(torch.full((3, height, width), 128 / 255)), quality)
