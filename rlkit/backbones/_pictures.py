"""Pictures that a network reads beside its latents: a source to edit and references, as more tokens of the sequence.

The networks that read them so leave no token out of their attention, and give every row of a batch the same positions.
So pictures are padded to be kept together, and never to be read: the rows whose pictures have equal sizes go through
the network at once, and others by themselves. A batch of pictures of k sizes takes k passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlkit.errors import DataError
from rlkit.pictures import to_pil
from rlkit.types import Condition, Prompt

Grids = tuple[tuple[int, int], ...]
"""Rows and columns of the tokens of each picture."""


def of_prompt(prompt: Prompt, least: int, most: int) -> list[Any]:
    """A prompt's source, then its references, as PIL pictures. A DataError unless there are `least` to `most`."""
    found = [*([] if prompt.source is None else [prompt.source]), *prompt.references]
    if not least <= len(found) <= most:
        wanted = f"{least} to {most}" if least < most else f"{most}"
        what = f"the prompt {prompt.text!r} has {len(found)} pictures, and this backbone reads {wanted}"
        hint = "A source counts as one, and so does each reference."
        raise DataError(what, where=f"prompt {prompt.id}", hint=hint)
    return [to_pil(one) for one in found]


def of_conversation(prompt: Prompt, most: int) -> list[Any]:
    """A prompt's pictures, then those that its turns show, as PIL pictures. A DataError for more than `most`."""
    own = of_prompt(prompt, 0, most)
    shown = [one for turn in prompt.turns for one in turn.pictures]
    if len(own) + len(shown) > most:
        what = f"the conversation about {prompt.text!r} shows {len(own) + len(shown)} pictures"
        where, hint = f"prompt {prompt.id}", "Let its tools show fewer, or let it end after fewer turns."
        raise DataError(f"{what}, and this backbone reads {most} at most", where=where, hint=hint)
    return own + [to_pil(one) for one in shown]


def columns(
    latents: Sequence[Tensor], tokens_of: Callable[[Tensor], Tensor], empty: Tensor, side: int = 2
) -> dict[str, Tensor]:
    """What a condition holds of its pictures: tokens [P, D], and grids [K, 2], on the CPU: they are read as numbers.

    latents: [1, C, h, w] each, a token being side x side of their pixels; empty: [0, D], for a prompt without pictures.
    """
    grids = [(one.shape[2] // side, one.shape[3] // side) for one in latents]
    tokens = torch.cat([empty, *(tokens_of(one)[0] for one in latents)])
    return {"pictures": tokens, "grids": torch.tensor(grids, dtype=torch.int64).reshape(-1, 2)}


def collate(conditions: Sequence[Condition]) -> dict[str, Tensor]:
    """Pictures [B, P, D] and grids [B, K, 2], with zeros where there are fewer."""
    return {name: pad_sequence([one[name] for one in conditions], batch_first=True) for name in ("pictures", "grids")}


def by_grids(cond: Condition, rows: Callable[[Mapping[str, Tensor], Tensor, Grids], Tensor]) -> Tensor:
    """[B, ...] of rows(part of the condition, their places [n], their grids), called once for each set of grids."""
    sets: dict[Grids, list[int]] = {}
    for place, grids in enumerate(cond["grids"].tolist()):
        sets.setdefault(tuple((height, width) for height, width in grids if height), []).append(place)
    answers, order = [], []
    for grids, places in sets.items():
        at = torch.tensor(places)
        part = {name: column[at.to(column.device)] for name, column in cond.items()}
        part["pictures"] = part["pictures"][:, : sum(height * width for height, width in grids)]
        answers.append(rows(part, at, grids))
        order += places
    back = torch.tensor(order).argsort()
    return torch.cat(answers)[back.to(answers[0].device)]
