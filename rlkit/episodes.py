"""What an agent does with a request: turns that call tools and are told something, and the program that ends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """What a policy wrote, token by token, and what was said to it before it wrote again."""

    answer: tuple[int, ...]  # as it was sampled, the token that ends it included where it came
    reply: str  # of a tool, or of whoever reads the answers
    pictures: tuple[Tensor, ...] = field(
        default=(), compare=False, repr=False
    )  # [3, H, W] in 0..1, shown before the reply's words


@dataclass(frozen=True)
class Call:
    """What one turn was understood to ask for, and what came of it."""

    text: str  # all that was written in this turn
    tool: str = ""  # as it was written; "": no call could be read
    arguments: Mapping[str, Any] = field(default_factory=dict)
    reply: str = ""  # what was said to it, as the policy reads it
    invalid: str = ""  # why this was no call that can be made; "": it was one
    failed: bool = False  # the tool itself raised, took too long, or was left alone because it had


@dataclass(frozen=True)
class Program:
    """What an agent's answer tells a generator to draw (GenEvolve, arXiv 2605.21605: z = (g, R))."""

    gen_prompt: str
    reference_images: tuple[str, ...] = ()  # names of pictures that a tool has shown


@dataclass(frozen=True)
class Episode:
    """One request, from its first turn to the answer."""

    calls: tuple[Call, ...]  # every turn but the answer's, in order; also those that were no call
    program: Program | None  # None: no answer came
    # answer: there is a program. The others: what ran out before there was one.
    ended: Literal["answer", "turns", "calls", "tokens"]

    @property
    def valid(self) -> float:
        """The share of the turns that asked for something that can be done, the answer's among them; 0 of none."""
        good = sum(not call.invalid for call in self.calls) + (self.program is not None)
        turns = len(self.calls) + (self.program is not None)
        return good / turns if turns else 0.0


__all__ = ["Call", "Episode", "Program", "Turn"]
