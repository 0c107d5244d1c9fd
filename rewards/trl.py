"""Reward functions of TRL, as rewards here; and rewards here, as reward functions of TRL.

Protocol: the call of TRL 1.x's GRPOTrainer (huggingface.co/docs/trl, read at 1.16):
    function(prompts=[...], completions=[...], **columns) -> [float | None, ...]
with one column, a list, for each field of the data set. A coroutine function is awaited. None: this function does not
apply to that sample.

As a reward here: prompts are the prompts' texts, completions PIL pictures, and columns the keys of the prompts'
metadata. log_extra and log_metric are taken and dropped.

Differences from TRL's trainer:
* A function is given only the columns that it names, unless it takes **kwargs. TRL gives all, and fails.
* A sample whose metadata lacks a column that the function must have is not scored, and the others are.
* None stays None: the sample is masked. TRL adds the other functions up as if this one had said 0.
* There are no completion_ids, trainer_state or environments: a function that cannot do without is refused when loaded.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlkit import registry
from rlkit.pictures import PictureError, to_pil
from rlkit.types import Prompt, Samples, Unscored

if TYPE_CHECKING:
    from PIL import Image

    from rlkit.types import Reward

Function = Callable[..., Any]
OF_THE_TRAINER = ("completion_ids", "trainer_state", "environments", "log_extra", "log_metric")
OF_THE_PROMPT = ("target_text", "source", "references")


@dataclass(frozen=True)
class Trl:
    """Any TRL reward function, asynchronous ones too; its columns are the keys of the prompts' metadata.

    Its completions are PIL pictures. What it returns None for is not scored. It is called with the whole batch of
    samples, in one thread.
    """

    function: str  # where it is: package.module:function, from the working directory too
    options: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments beside prompts and columns

    reads = ("prompt",)
    optional = ("metadata",)
    range = (None, None)
    higher_is_better = True
    components = ()
    groupwise = False
    licence = "that of the function"
    size = "that of the function"
    protocol = "reward functions of TRL 1.x (huggingface.co/docs/trl)"
    version = "1"

    def __post_init__(self) -> None:
        module, _, name = self.function.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
            raise ValueError(f"function={self.function!r} must be package.module:function")
        taken = sorted({"prompts", "completions", *OF_THE_TRAINER} & set(self.options))
        if taken:
            raise ValueError(f"options cannot hold {', '.join(taken)}: the call gives them itself; rename the option")

    def load(self, device: torch.device) -> _Scorer:
        """Imports the function. Where it computes is its own affair."""
        function = registry.load("rewards", self.function, where="rewards.trl.function")
        required, accepted = _columns(function, self.function, self.options)
        return _Scorer(self, function, required, accepted, _Loop())


def _columns(function: Function, name: str, options: Mapping[str, Any]) -> tuple[list[str], list[str] | None]:
    """(the columns it must have, those that it accepts), without the ones that every call gives; None: it takes any."""
    if not callable(function):
        raise ValueError(f"{name} is {function!r}, which cannot be called: name a function")
    parameters = inspect.signature(function).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    unknown = sorted(set(options) - set(named))
    if unknown and not takes_any:
        raise ValueError(f"{name} takes no {', '.join(unknown)}: it takes {', '.join(named)}")
    required = [p.name for p in named.values() if p.default is p.empty and p.name not in options]
    absent = [one for one in required if one in ("completion_ids", "trainer_state", "environments")]
    if absent:
        raise ValueError(f"{name} asks for {', '.join(absent)}, which pictures have not: give it a default")
    required = [one for one in required if one not in ("prompts", "completions", *OF_THE_TRAINER)]
    return required, None if takes_any else list(named)


@dataclass(frozen=True)
class _Scorer:
    entry: Trl
    function: Function
    required: list[str]
    accepted: list[str] | None  # None: any
    loop: _Loop

    def __call__(self, samples: Samples) -> list[float | Unscored]:
        pictures = [self._picture(*pair) for pair in zip(samples.media, samples.prompts, strict=True)]
        shown = {row: one for row, one in enumerate(pictures) if not isinstance(one, Unscored)}
        values: list[float | Unscored] = [one if isinstance(one, Unscored) else Unscored("") for one in pictures]
        if not shown:
            return values
        answer = self.function(**self._arguments([samples.prompts[row] for row in shown], list(shown.values())))
        answer = list(self.loop.wait(answer) if inspect.isawaitable(answer) else answer)
        if len(answer) != len(shown):
            raise ValueError(f"{self.entry.function} returned {len(answer)} numbers for {len(shown)} pictures")
        for row, value in zip(shown, answer, strict=True):
            none = value is None or math.isnan(value)
            values[row] = Unscored(f"{self.entry.function} returned None") if none else float(value)
        return values

    def _picture(self, picture: Tensor, prompt: Prompt) -> Image.Image | Unscored:
        """What the function is to look at, if it can look at this sample at all."""
        absent = [one for one in self.required if one not in prompt.metadata]
        if absent:
            reason = f"{self.entry.function} needs {', '.join(absent)}: add it to the metadata of the prompts"
            return Unscored(reason)
        try:
            return to_pil(picture)
        except PictureError as error:
            return Unscored(str(error))

    def _arguments(self, prompts: Sequence[Prompt], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        columns = dict.fromkeys(key for prompt in prompts for key in prompt.metadata if isinstance(key, str))
        offered: dict[str, Any] = {key: [prompt.metadata.get(key) for prompt in prompts] for key in columns}
        offered |= {"log_extra": _drop, "log_metric": _drop, **self.entry.options}
        offered |= {"prompts": [prompt.text for prompt in prompts], "completions": pictures}
        return {key: value for key, value in offered.items() if self.accepted is None or key in self.accepted}

    def close(self) -> None:
        self.loop.close()


def _drop(name: str, value: Any) -> None:
    """In the place of the trainer's log."""


class _Loop:
    """An event loop in a thread of its own: sessions that a function keeps live as long as the reward, and a caller
    that has a running loop itself, a notebook for instance, is no trouble."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rlkit-trl", daemon=True)
        self._thread.start()

    def wait(self, answer: Awaitable[Any]) -> Any:
        async def awaited() -> Any:
            return await answer

        return asyncio.run_coroutine_threadsafe(awaited(), self._loop).result()

    def close(self) -> None:
        """May be called again."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


# ----------------------------------------------------------------------------------------------- the way back


def as_trl(reward: Reward, device: str = "cpu") -> Callable[..., list[float | None]]:
    """A reward of rlkit as a function that a TRL trainer takes. More is better, as TRL has it; None: not scored.

    Completions are pictures: PIL, or tensors [3, H, W] in 0..1, or messages with one picture among their parts; one
    without a picture gets None. The columns target_text, source and references are the prompt's; all others its
    metadata. Equal prompts are one group. A reward that loads something is loaded here.
    """
    load = getattr(reward, "load", None)
    scorer = reward if load is None else load(torch.device(device))
    sign = 1.0 if getattr(reward, "higher_is_better", True) else -1.0

    def function(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        values: list[float | None] = [None] * len(completions)
        pictures = [_picture(completion) for completion in completions]
        texts = [_text(prompt) for prompt in prompts]
        shapes = dict.fromkeys(tuple(one.shape) for one in pictures if one is not None)
        for shape in shapes:  # samples share one tensor, so pictures of one size are scored together
            rows = [row for row, one in enumerate(pictures) if one is not None and tuple(one.shape) == shape]
            media = torch.stack([one for one in pictures if one is not None and tuple(one.shape) == shape])
            prompted = tuple(_prompt(row, texts.index(texts[row]), texts[row], columns) for row in rows)
            answer = scorer(_samples(media, prompted))
            for row, value in zip(rows, answer[0] if isinstance(answer, tuple) else answer, strict=True):
                scored = not isinstance(value, Unscored) and value is not None and math.isfinite(value)
                values[row] = sign * float(value) if scored else None
        return values

    function.__name__ = getattr(reward, "__name__", type(reward).__name__)  # under which TRL logs it
    return function


def _picture(completion: Any) -> Tensor | None:
    """[3, H, W] in 0..1, of a picture or of the first one in a list of messages."""
    if isinstance(completion, Tensor):
        return completion.float()
    if isinstance(completion, Mapping):  # a message, or a part of one
        return _picture(completion.get("image", completion.get("content")))
    if isinstance(completion, list | tuple):
        return next((found for found in map(_picture, completion) if found is not None), None)
    if completion is None or isinstance(completion, str):
        return None
    return torch.from_numpy(np.array(completion.convert("RGB"))).movedim(-1, 0).float() / 255


def _text(prompt: Any) -> str:
    """A prompt as one text: of messages, what the user says."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        return _text(prompt.get("text", prompt.get("content", "")))
    said = [one for one in prompt if not (isinstance(one, Mapping) and one.get("role", "user") != "user")]
    return "\n".join(text for text in map(_text, said) if text)


def _prompt(row: int, number: int, text: str, columns: Mapping[str, Any]) -> Prompt:
    own = {key: column[row] for key, column in columns.items() if key not in OF_THE_TRAINER}
    target, source, references = (own.pop(key, None) for key in OF_THE_PROMPT)
    return Prompt(
        number,
        text,
        metadata=own,
        target_text=(target,) if isinstance(target, str) else tuple(target or ()),
        source=_picture(source),
        references=tuple(one for one in map(_picture, references or ()) if one is not None),
    )


def _samples(media: Tensor, prompts: tuple[Prompt, ...]) -> Samples:
    rows = torch.arange(len(prompts))
    group = torch.tensor([prompt.id for prompt in prompts])
    return Samples(media, torch.zeros(len(rows), 0), prompts, group, rows, rows, version=0, total=len(rows))
