"""What the commands that make the shipped weights have in common: how the learning rate goes, and what is averaged."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rlkit.weights import ema_decay


def rate(seen: int, total: int, batch: int, warmup: int, decay: float) -> float:
    """The learning rate's factor after `seen` of `total` samples: a linear rise over `warmup` steps, constant, and a
    linear fall to 0 over the last share `decay`."""
    warm = min(1.0, (seen / batch + 1) / warmup)
    left = (total - seen) / (decay * total)
    return min(warm, max(0.0, min(1.0, left)))


@torch.no_grad()
def follow(average: Iterable[Tensor], current: Iterable[Tensor], updates: float, longest: float) -> None:
    """An exponential moving average, in place, after so many updates."""
    torch._foreach_lerp_(list(average), list(current), 1 - ema_decay(updates, longest))
