"""Weight sync: how a rollout comes to sample with the weights that the learner has just made.

Every push carries a version, which the samples then bear, so that stale ones can be told from fresh ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Receives(Protocol):
    """The side of a rollout that a push sees."""

    def load(self, weights: Mapping[str, Tensor], version: int) -> None: ...


class SharedMemory:
    """For a rollout in the learner's own process: the weights are already there, only their version moves."""

    def push(self, rollout: Receives, version: int) -> None:
        rollout.load({}, version)
