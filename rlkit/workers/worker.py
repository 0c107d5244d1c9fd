"""Workers that continue token sequences, as a learner sees them: what is asked, and what comes back.

A worker is asked for whole samples, and says which version of the weights it holds. Where workers run, and how they are
spoken to, is in vllm_offline.py and vllm_server.py; many as one, in pool.py; how weights get there, in push.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from rlkit.errors import RlkitError
from rlkit.types import Span

FRESH = "default"  # the label of a worker that was given no weights since it was started


class WorkerError(RlkitError):
    """A worker that does not answer, refuses an update, or is not what it was said to be."""


@dataclass(frozen=True)
class Request:
    """One prompt to continue. A seed of its own makes an answer the same in any company and on any worker."""

    ids: tuple[int, ...]  # all that stands before the answer; a picture fills as many tokens as the network reads
    most: int  # tokens of an answer
    n: int = 1  # answers
    temperature: float = 1.0  # of softmax(logits / temperature), which the log-probs are of; 0: the most probable token
    seed: int | None = None
    ends: tuple[int, ...] = ()  # tokens that end an answer; no other does
    images: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)  # [3, H, W] in 0..1 each
    picture_token: int | None = None  # the token that pictures fill; no answer holds it, with or without images
    prompt_log_probs: bool = False  # also those of the prompt: of all tokens, and not divided by the temperature

    def __post_init__(self) -> None:
        if not self.ids or min(self.ids) < 0:
            raise ValueError("ids must be one or more token ids, 0 or above")
        if self.most < 1 or self.n < 1:
            raise ValueError(f"most and n must be 1 or more, not {self.most} and {self.n}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or above, not {self.temperature!r}")
        if self.images and self.picture_token is None:
            raise ValueError("a request with images says which token they fill: picture_token")
        if self.images and len(self.images) != self.pictures():
            raise ValueError(f"{len(self.images)} images, and places for {self.pictures()} in ids")

    def pictures(self) -> int:
        """How many runs of the picture token there are: one a picture."""
        fills = [one == self.picture_token for one in self.ids]
        return sum(now and not before for now, before in zip(fills, [False, *fills[:-1]], strict=True))

    def folded(self) -> list[int]:
        """The ids with one token a picture: a worker spreads them out itself, as its network reads them."""
        if not self.images:
            return list(self.ids)
        before = (None, *self.ids[:-1])
        return [one for one, last in zip(self.ids, before, strict=True) if one != self.picture_token or last != one]


@dataclass(frozen=True)
class Answer:
    """One continuation, token by token as it was sampled."""

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]  # of each token, under the weights that sampled it
    spans: tuple[Span, ...]  # which weights those were
    finished: bool  # ended by one of `ends`; false: cut off at `most`
    worker: str
    prompt_log_probs: tuple[float, ...] = ()  # [P] of each prompt token, 0 at the first; (): not asked for


@dataclass(frozen=True)
class Failure:
    """There is no answer, and why."""

    reason: str
    attempts: int
    worker: str  # the last that was asked; "": none was


@dataclass(frozen=True)
class Fault:
    """Why a worker did not answer one request."""

    reason: str
    again: bool = True  # another try may do; false: the request is at fault, and no worker will take it


class Worker(Protocol):
    """Something that continues sequences with weights that can be replaced. The verbs raise WorkerError."""

    name: str  # unique in its pool
    at_once: int  # calls under way
    batch: int  # requests a call

    def answer(self, requests: Sequence[Request], seconds: float) -> list[tuple[Answer, ...] | Fault]:
        """The answers to each request, or why there are none. Never raises, and ends after `seconds`."""

    def label(self) -> str:
        """What was last stamped; FRESH where nothing was since the worker was started."""

    def stamp(self, label: str) -> None: ...

    def pause(self) -> None:
        """Stop between two tokens and keep what is under way; what was computed from the weights is forgotten."""

    def resume(self) -> None: ...

    def abandon(self) -> None:
        """End what is under way, which then fails."""

    def connect(self, info: Mapping[str, Any], seconds: float) -> None: ...

    def start(self) -> None: ...

    def update(self, info: Mapping[str, Any], seconds: float) -> None: ...

    def finish(self, version: int) -> None: ...

    def processes(self) -> int:
        """How many receive weights."""

    def load_adapter(self, version: int, folder: str) -> None:
        """Answer with this LoRA adapter from now on; what is under way ends with its own."""

    def close(self) -> None: ...


class Push(Protocol):
    """How weights get to workers (push.py)."""

    def prepare(self, weights: Any, version: int) -> Any:
        """What is done once for all workers: what the call is given."""

    def __call__(self, worker: Worker, prepared: Any, version: int) -> None:
        """Raises whatever goes wrong; the worker is then asked no more."""


__all__ = ["FRESH", "Answer", "Failure", "Fault", "Push", "Request", "Worker", "WorkerError"]
