"""The LAION aesthetic predictor, version 2: how much would people like the picture, whatever it shows?

Protocol: github.com/christophschuhmann/improved-aesthetic-predictor, weights sac+logos+ava1-l14-linearMSE: the unit
embedding of CLIP ViT-L/14 goes through five linear layers, 768-1024-128-64-16-1.

Differences from the reference code:
* There is no activation between the layers, so they are one linear map; they are multiplied out once, in fp64.
* The picture is resized in floating point and not rounded to bytes in between, so that a gradient can pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlkit.embedding import (
    Pictures,
    answer,
    check_dtype,
    load_pictures,
    load_state,
    nothing,
    spread,
    unscorable_pictures,
)
from rlkit.errors import RewardError

if TYPE_CHECKING:
    from rlkit.types import Samples, Values

WIDTHS = (768, 1024, 128, 64, 16, 1)
LAYERS = (0, 2, 4, 6, 7)  # their places in the checkpoint, where dropout has the others


@dataclass(frozen=True)
class Aesthetic:
    """LAION's aesthetic score of the picture, about 1 to 10, with a gradient. It does not read the prompt.

    Trained on alone, it makes every prompt the same pretty picture: have it beside a reward that reads the prompt.
    Not scored: a picture with pixels that are not finite.
    """

    head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"  # a file, or OWNER/REPOSITORY/FILE on the hub
    model: str = "openai/clip-vit-large-patch14"  # hub name or folder; the head was trained on this one
    dtype: str = "fp32"  # of CLIP; or bf16

    reads = ()
    range = (None, None)
    higher_is_better = True
    components = ()
    groupwise = False
    differentiable = True
    licence = "Apache-2.0 (head), MIT (CLIP)"
    size = "1.2 GB"
    protocol = "LAION aesthetic predictor v2, sac+logos+ava1-l14-linearMSE"
    version = "1"

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    def load(self, device: torch.device) -> _Scorer:
        weight, bias = one_layer(load_state(self.head), self.head)
        return _Scorer(load_pictures(self.model, device, self.dtype), weight.to(device), bias.to(device))


@dataclass(frozen=True)
class _Scorer:
    pictures: Pictures
    weight: Tensor  # [768]
    bias: Tensor  # []

    def __call__(self, samples: Samples) -> Values:
        n, media = len(samples), samples.media
        reasons = unscorable_pictures(media)
        rows = [row for row in range(n) if row not in reasons]
        if not rows:
            return answer(nothing(media), reasons)
        vectors = self.pictures(media if len(rows) == n else media[rows])  # [n, 768]
        values = (vectors * self.weight).sum(-1) + self.bias
        return answer(spread(values.to(media.device), reasons, n), reasons)


def one_layer(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """The five layers as one: weight [768] and bias [], fp32."""
    wanted: dict[str, tuple[int, ...]] = {}
    wanted |= {f"layers.{at}.weight": (to, of) for at, (of, to) in zip(LAYERS, pairwise(WIDTHS), strict=True)}
    wanted |= {f"layers.{at}.bias": (width,) for at, width in zip(LAYERS, WIDTHS[1:], strict=True)}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if wrong := sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)):
        first = wrong[0]
        what = f"{name!r} is not this head: {first} is {found.get(first, 'missing')}, not {wanted.get(first, 'known')}"
        raise RewardError(what, where="rewards.aesthetic.head", hint="Use sac+logos+ava1-l14-linearMSE.pth.")
    weight, bias = torch.eye(WIDTHS[0], dtype=torch.float64), torch.zeros(WIDTHS[0], dtype=torch.float64)
    for at in LAYERS:  # W (A x + a) + b = (W A) x + (W a + b)
        layer = state[f"layers.{at}.weight"].double()
        weight, bias = layer @ weight, layer @ bias + state[f"layers.{at}.bias"].double()
    return weight[0].float(), bias[0].float()
