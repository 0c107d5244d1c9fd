"""A reward and a tool in a package of their own."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rlkit.types import Samples


@dataclass(frozen=True)
class Warmth:
    """How much redder than blue a picture is, -1 to 1."""

    only_saturated: bool = False  # leave out pixels that are nearly grey

    reads = ()
    range = (-1.0, 1.0)
    higher_is_better = True
    components = ()
    groupwise = False

    def __call__(self, samples: Samples) -> Tensor:
        red, _, blue = samples.media.unbind(1)  # [N, H, W] each
        difference = red - blue
        if not self.only_saturated:
            return difference.mean((1, 2))
        vivid = (samples.media.amax(1) - samples.media.amin(1) > 0.2).float()
        return (difference * vivid).sum((1, 2)) / vivid.sum((1, 2)).clamp(min=1)


def colour_of(temperature: Literal["cold", "mild", "warm"]) -> str:
    """Which colour a temperature is painted in."""
    return {"cold": "blue", "mild": "green", "warm": "red"}[temperature]
