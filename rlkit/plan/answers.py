"""How long the conversations of a policy that writes are, and what it takes one device to write them.

They end where they want to, so that only limits are known: `most` tokens of each answer, in each of an agent's turns,
and as many characters as a tool may say. Whoever has seen a run knows better, and can say so.

Written in this process, each answer begins with the whole conversation being read again, and keys and values are one
tensor that grows; vLLM reads what is new. Rows of a batch are padded to the longest: it is whose length counts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlkit import registry
from rlkit.errors import DataError, RecipeError
from rlkit.plan.devices import Device
from rlkit.plan.words import Words
from rlkit.stages import Stage
from rlkit.types import TokenModel

LETTERS = 4  # of a token, in what tools say
PROMPT = 512  # tokens of a prompt that cannot be read here
EAGER = 5e-4  # seconds a layer, where Python starts each of its kernels anew for every token
TRAFFIC = 0.7  # share of a memory's bandwidth that is reached
MOVED = 3  # times that keys and values move for a token where they are one tensor that grows: read, written, read again


@dataclass(frozen=True)
class Known:
    """What whoever plans knows better than the recipe's limits."""

    answer: float = 1.0  # share of the most tokens that answers have, in each turn
    read: int | None = None  # tokens of the longest conversation of a batch that are not answers
    turns: float | None = None  # of an agent, the mean
    drawn: float = 1.0  # share of a step's answers that are drawn: those that can be, each once

    def __post_init__(self) -> None:
        for name, share in (("answer", self.answer), ("drawn", self.drawn)):
            if not 0 < share <= 1:
                raise ValueError(f"--{name} is a share above 0 and at most 1, not {share}")
        if self.read is not None and self.read < 1:
            raise ValueError(f"--read must be 1 token or more, not {self.read}")
        if self.turns is not None and not 1 <= self.turns < math.inf:
            raise ValueError(f"--turns must be 1 or more, not {self.turns}")


@dataclass(frozen=True)
class Conversation:
    """One row of a policy that writes. In tokens."""

    read: float  # before the first answer, a picture's among them
    said: float  # answers
    replies: float  # in between
    turns: float
    pictures: int
    words: str  # the same for a person

    @property
    def total(self) -> float:
        return self.read + self.said + self.replies


def is_here(data: Any) -> bool:
    """Whether opening this data reads only what is on this machine: a plan downloads nothing."""
    sources = getattr(data, "sources", None)
    several = sources.values() if isinstance(sources, Mapping) else ()
    paths = [getattr(data, "path", None), *(one.get("path") for one in several if isinstance(one, Mapping))]
    return all(Path(one).expanduser().exists() for one in paths if isinstance(one, str))


def writer_of(rollout: Any) -> tuple[Any, Any]:
    """(the agent or relay around it, or itself; the rollout that writes)."""
    whole = getattr(rollout, "agent", rollout)
    inner = getattr(whole, "writer", None)
    if inner is None:
        return whole, whole
    options = dict(inner)
    return whole, registry.build("rollouts", str(options.pop("name", "local")), options, "rollout.writer")


def conversation(stage: Stage, backbone: Any, words: Words, known: Known) -> Conversation:
    """How long a stage's rows are at most, or as long as is known."""
    whole, writer = writer_of(stage.rollout)
    pictures = 1 if words.picture and "source" in getattr(stage.data, "gives", ()) else 0
    found = None if known.read is not None else _prompts(stage, backbone, getattr(whole, "instructions", None) or "")
    first = known.read or found or PROMPT + pictures * words.picture
    most = getattr(whole, "turns", 1)
    turns = most if known.turns is None else min(most, known.turns)
    replies = 0.0 if known.read is not None else (turns - 1) * getattr(whole, "observation", 0) / LETTERS
    of_kind = getattr(inspect.getmodule(type(backbone)), "LONGEST", math.inf)
    longest = float(getattr(backbone, "longest", None) or of_kind)
    if known.read is not None and known.read >= longest:
        what = f"{known.read:,} tokens leave no room for an answer: a row of stage {stage.name!r} has {longest:,.0f}."
        raise RecipeError(what, where="--read", hint="Say fewer, or raise policy.backbone.longest where there is one.")
    room = max(1.0, longest - first)
    said = min(room, turns * writer.most * known.answer)
    origin = "--read" if known.read is not None else "counted" if found is not None else "assumed: see --read"
    limit = "the limit" if known.answer == 1 else f"{known.answer:.3g} of the limit"
    replies = min(replies, room - said)
    text = f"{said:,.0f} tokens, {limit}; {first:,.0f} are read before ({origin})"
    text += f", {replies:,.0f} in between, in {turns:.3g} turns" if turns > 1 else ""
    return Conversation(first, said, replies, turns, pictures, text)


def _prompts(stage: Stage, backbone: Any, instructions: str) -> float | None:
    """Mean tokens of the first step's prompts, of a backbone that ships with rlkit. None: they cannot be read."""
    if getattr(inspect.getmodule(type(backbone)), "BASE", None) is None or getattr(backbone, "path", None):
        return None
    if not is_here(stage.data):
        return None
    try:
        drawn = stage.data.open().draw(0, stage.name, 0).prompts
    except DataError:  # what is here cannot be read: the plan goes on with an assumption, and says so
        return None
    model: TokenModel = backbone.load(torch.device("cpu"), torch.float32)
    told = [replace(one, system="\n\n".join(filter(None, (instructions, one.system)))) for one in drawn]
    lengths = [len(one["ids"]) for one in model.encode(told)]
    return sum(lengths) / len(lengths)


@dataclass(frozen=True)
class Writing:
    """How one device writes its share of a stage's conversations."""

    words: Words
    told: Conversation
    rows: int
    prompts: int  # different ones
    batch: int  # rows that are continued at the same time
    number: int  # bytes
    engine: bool  # vLLM: it keeps what it has read from turn to turn, in pages, and replays its kernels

    @property
    def reading(self) -> float:
        """FLOPs of what is read before an answer's first token."""
        told, words = self.told, self.words
        found = self.prompts * words.flops(told.read, 1, told.pictures)
        for turn in range(1, math.ceil(told.turns)):
            share = min(1.0, told.turns - turn)  # of the rows: as many have this turn
            before = told.read + turn * (told.said + told.replies) / told.turns
            new = told.replies / (told.turns - 1) if self.engine else before
            old = before - new
            found += self.rows * share * words.flops(new, 1, 0 if self.engine else told.pictures, old)
        return found

    @property
    def _context(self) -> float:
        return self.told.read + (self.told.said + self.told.replies) / 2

    @property
    def saying(self) -> float:
        """FLOPs of the answers' tokens."""
        return self.rows * self.told.said * self.words.flops(1, 1, before=self._context)

    def seconds(self, device: Device, speed: float) -> float:
        """One token of a batch takes as long as its arithmetic or as its memory traffic, whichever is longer."""
        words, batch = self.words, min(self.batch, self.rows)
        passes = math.ceil(self.rows / batch) * self.told.said
        keys = batch * self._context * words.kept * words.layers * (1 if self.engine else MOVED)
        traffic = self.number * (words.body + words.head + keys) / (TRAFFIC * device.bandwidth)
        pause = 0.0 if self.engine else EAGER * words.layers
        each = max(batch * words.flops(1, 1, before=self._context) / speed, traffic) + pause
        return self.reading / speed + passes * each
