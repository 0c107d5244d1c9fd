"""Mean luminance: the simplest reward that has a gradient. For tests, and for showing how a reward is hacked.

Computed: the mean over pixels of .2126 R + .7152 G + .0722 B (Rec. 709) of the values as they are, gamma-encoded. In
video that is luma, not the luminance of light. So mid-grey is .5, as it looks, and the gradient is the same at every
pixel and for every picture. There is no reference code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlkit.types import Samples

REC_709 = (0.2126, 0.7152, 0.0722)  # red, green, blue


@dataclass(frozen=True)
class Brightness:
    """How bright the picture is, 0 for black to 1 for white, with a gradient; it does not look at the prompt.

    A white picture is perfect: whatever trains on this alone ends there.
    """

    reads = ()
    range = (0.0, 1.0)
    higher_is_better = True
    differentiable = True
    components = ()
    groupwise = False
    licence = "none needed"
    size = "none"
    protocol = "mean of Rec. 709 luma"
    version = "1"

    def __call__(self, samples: Samples) -> Tensor:
        media = samples.media.float()  # [N, 3, H, W]; 1000 x 1000 pixels cannot be summed in half precision
        if media.ndim != 4 or media.shape[1] != 3:
            raise ValueError(f"brightness is of pictures [N, 3, H, W], not {list(media.shape)}")
        return media.mean((2, 3)) @ torch.tensor(REC_709, device=media.device)
