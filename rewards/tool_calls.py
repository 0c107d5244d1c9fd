"""How often does an agent ask for something that can be done? Counted from its episodes; no model is involved.

A valid call is one that could be made: a tool that is there, arguments that fit. Whether the tool then failed is not
the agent's fault, and is counted beside it. Nothing is said of whether a call was of any use: at a weight above 0 this
alone teaches to answer at once, which is a share of 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlkit.episodes import Episode
    from rlkit.types import Samples


@dataclass(frozen=True)
class ToolCalls:
    """The share of an agent's turns that asked for something that can be done, its answer among them.

    Returns (values [N], components [N]). valid: the same share. calls, invalid: turns with a call that could be made,
    and those without one. failed: calls whose tool failed. turns: all of them, with the answer. answered: 1 for an
    episode that ended with a program. NaN where the samples have no episodes.
    """

    reads = ("episode",)
    range = (0.0, 1.0)
    higher_is_better = True
    components = ("valid", "calls", "invalid", "failed", "turns", "answered")
    groupwise = False
    licence = "none needed"
    size = "none"
    protocol = "this repository"
    version = "1"

    def __call__(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        rows = [_counted(one) for one in samples.episodes]
        if not rows:
            rows = [[math.nan] * len(self.components)] * len(samples)
        table = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), len(self.components))
        return table[:, 0], dict(zip(self.components, table.unbind(1), strict=True))


def _counted(episode: Episode) -> list[float]:
    """As many numbers as there are components, in their order."""
    answered = episode.program is not None
    invalid = sum(bool(call.invalid) for call in episode.calls)
    failed = sum(call.failed for call in episode.calls)
    calls = len(episode.calls)
    return [episode.valid, calls - invalid, invalid, failed, calls + answered, answered]
