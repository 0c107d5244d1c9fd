"""What a monitor is given, and what it says of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from rlkit.scoring import WeightedReward
from rlkit.types import Samples, Scores

Action = Literal["warn", "stop", "roll_back"]
Memory = dict[str, Any]
"""What a monitor knows of the steps before: json without NaN."""

AREA = "/area"  # the end of a component's name that says how much of the picture text covers


@dataclass(frozen=True)
class Reading:
    """One training step or one evaluation: its row of numbers, and this process's share of the samples."""

    row: Mapping[str, Any]
    samples: Samples
    scores: Scores
    rewards: Sequence[WeightedReward]
    gather: Callable[[Tensor], Tensor]  # [n, ...] of each process -> [sum n, ...] of all, in rank order
    precision: Literal["fp32", "bf16"] = "fp32"  # of the network


@dataclass(frozen=True)
class Alarm:
    value: float
    threshold: float
    text: str


@dataclass(frozen=True)
class Finding:
    """What a monitor saw: figures for the record ("" is its own column, others stand below it), perhaps an alarm."""

    figures: Mapping[str, float]
    alarm: Alarm | None = None


def positive(**options: float) -> None:
    for name, value in options.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be above 0, not {value}")
