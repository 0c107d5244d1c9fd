"""Do the rewards tell good pictures from bad ones? Asked before the first step, where a recipe wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from rlkit.data.prompts import HALVES, read_pairs
from rlkit.errors import RewardError
from rlkit.monitors.reading import positive
from rlkit.scoring import Scoring
from rlkit.types import Prompt, Samples
from rlkit.world import grammar, scenes
from rlkit.world.grammar import COLOURS, NUMBERS, PLACES, SHAPES, Caption


@dataclass(frozen=True)
class Sanity:
    """Do the trained rewards tell known good pictures from known bad ones? Asked before the first step.

    One of `path`, a file of pairs as the data `pairs` reads it, and `world`, that many scenes of the embedded world,
    each against a scene of the same caption with one claim changed.
    """

    path: str | None = None
    world: int | None = None
    at_least: float = 0.9  # share of the pairs that each reward must rank rightly; an unscored one counts as wrong
    action: Literal["warn", "stop"] = "stop"  # stop: refuse to train

    moment: ClassVar = "start"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.world is None):
            raise ValueError("give one of path: FILE OF PAIRS and world: NUMBER OF PAIRS")
        if self.world is not None:
            positive(world=self.world)
        if not 0 < self.at_least <= 1:
            raise ValueError(f"at_least is a share above 0 and up to 1, not {self.at_least}")

    def pairs(self) -> Samples:
        """Good and bad pictures in turns, two a group."""
        if self.world is not None:
            texts, media = _world_pairs(self.world)
        else:
            texts, media = _file_pairs(Path(self.path or ""))
        n = len(media)
        prompts = tuple(Prompt(i // 2, texts[i // 2]) for i in range(n))
        index = torch.arange(n)
        return Samples(media, torch.zeros(n, 0), prompts, index // 2, index, index, version=0, total=n)


def _file_pairs(path: Path) -> tuple[list[str], Tensor]:
    pairs = read_pairs(path)
    pictures = [torch.from_numpy(prompt.metadata[half].read()) for prompt in pairs for half in HALVES]
    return [prompt.text for prompt in pairs], torch.stack(pictures).permute(0, 3, 1, 2).float() / 255


def _world_pairs(count: int) -> tuple[list[str], Tensor]:
    rng = np.random.default_rng(count)
    captions = grammar.draw("validation", count, rng)
    told = [one for caption in captions for one in (caption, _changed(caption, rng))]
    return [caption.text for caption in captions], torch.from_numpy(scenes.render_batch(told, rng))


def _changed(caption: Caption, rng: np.random.Generator) -> Caption:
    """The caption with one claim changed: its number, place or relation, or the colour or shape of its first object."""
    (colour, shape), *others = caption.objects

    def another(value: Any, known: Iterable[Any]) -> Any:
        rest = [one for one in known if one != value]
        return rest[int(rng.integers(len(rest)))]

    claims = [claim for claim in ("count", "place", "relation") if getattr(caption, claim) is not None]
    claim = another(None, ["colour", "shape", *claims])
    if claim == "count":
        return replace(caption, count=another(caption.count, NUMBERS.values()))
    if claim == "place":
        return replace(caption, place=another(caption.place, PLACES))
    if claim == "relation" and caption.relation is not None:
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        return replace(caption, relation=opposite[caption.relation])
    taken = [
        other for other in others if other[1 if claim == "colour" else 0] == (shape if claim == "colour" else colour)
    ]
    if claim == "colour":
        first = another(colour, [one for one in COLOURS if one not in [other[0] for other in taken]]), shape
    else:
        first = colour, another(shape, [one for one in SHAPES if one not in [other[1] for other in taken]])
    return replace(caption, objects=(first, *others))


def judged(
    sanity: Sanity, scoring: Scoring, share: Callable[[int], range], gather: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Each trained reward -> the share of the pairs that it ranks rightly. `share`: of so many, this process's."""
    pairs = sanity.pairs()
    mine = share(len(pairs) // 2)
    samples, found = pairs.select(torch.arange(2 * mine.start, 2 * mine.stop)), {}
    for one in scoring.rewards:
        if one.weight:
            good, bad = one.value(scoring.scorers[one.name](samples).values).view(-1, 2).unbind(1)
            right = good > bad if one.weight > 0 else good < bad  # NaN is never greater
            found[one.name] = float(gather(right.double()).mean())
    return found


def refused(sanity: Sanity, found: Mapping[str, float], where: str) -> RewardError | None:
    """The error to raise where a reward ranks too few pairs rightly."""
    low = [name for name, share in found.items() if share < sanity.at_least]
    if not low:
        return None
    numbers = ", ".join(f"{name} {share:.0%}" for name, share in found.items())
    return RewardError(
        f"the rewards do not tell good pictures from bad ones: of the pairs they rank rightly {numbers}, "
        f"and {sanity.at_least:.0%} are asked for",
        where=where,
        hint="Look at the pairs and the reward, lower at_least, or set action: warn.",
    )
