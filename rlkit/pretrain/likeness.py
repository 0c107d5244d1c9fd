"""What the cosine of two pictures tells: do they show the same, by the captions of the embedded world?

Asked of drawn scenes, a fact at a time, and of what the embedded world's generator draws, which is where a reward has
to tell right from wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from rlkit import flow, registry
from rlkit.embedding import Pictures
from rlkit.types import Prompt, generator
from rlkit.world import checker, grammar, scenes
from rlkit.world.grammar import Caption

FACTS = ("colour", "shape", "binding", "number", "relation", "place")


# ---- captions that differ in one fact --------------------------------------------------------------------------------


@cache
def neighbours(caption: Caption, splits: tuple[str, ...]) -> dict[str, tuple[Caption, ...]]:
    """Of each fact, the captions of these splits that say it differently and all else the same."""
    allowed = _members(splits)
    changed = {fact: tuple(one for one in _changed(caption, fact) if one in allowed) for fact in FACTS}
    return {fact: found for fact, found in changed.items() if found}


@cache
def _members(splits: tuple[str, ...]) -> frozenset[Caption]:
    return frozenset(one for name in splits for one in grammar.split(name))


def _changed(caption: Caption, fact: str) -> list[Caption]:
    if fact in ("colour", "shape"):
        return _with_others(caption, fact)
    if fact == "binding" and len(caption.objects) == 2:
        (colour, shape), (other, form) = caption.objects
        swapped = ((other, shape), (colour, form))
        return [] if colour == other or shape == form else [replace(caption, objects=swapped)]
    if fact == "number":
        if len(caption.objects) == 2:  # one of them missing
            return [Caption("single", (thing,)) for thing in caption.objects]
        if caption.place is not None:
            return []
        others = [None, *grammar.NUMBERS.values()]
        return [Caption("count" if n else "single", caption.objects, count=n) for n in others if n != caption.count]
    if fact == "relation" and caption.relation is not None:
        return [replace(caption, relation=one) for one in grammar.RELATIONS if one != caption.relation]
    if fact == "place" and caption.place is not None:
        return [replace(caption, place=one) for one in grammar.PLACES if one != caption.place]
    return []


def _with_others(caption: Caption, fact: str) -> list[Caption]:
    """The caption with another colour, or shape, of one of its objects."""
    found = []
    for i, (colour, shape) in enumerate(caption.objects):
        objects = (
            [(one, shape) for one in grammar.COLOURS if one != colour]
            if fact == "colour"
            else [(colour, one) for one in grammar.SHAPES if one != shape]
        )
        for thing in objects:
            things = (*caption.objects[:i], thing, *caption.objects[i + 1 :])
            if len(set(things)) == len(things):
                found.append(replace(caption, objects=things))
    return found


# ---- measures --------------------------------------------------------------------------------------------------------


def auc(high: Tensor, low: Tensor) -> float:
    """How often a number of `high` is above one of `low`; a tie counts half. .5 is chance."""
    difference = high[:, None] - low[None]
    return float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())


@torch.no_grad()
def evaluate(encoder: Pictures, split: str, count: int, seed: int = 1) -> dict[str, float]:
    """What the cosine of two pictures tells, over captions of a split.

    same: the mean cosine of two pictures of one caption; FACT: of two whose captions differ in that fact alone.
    auc/FACT: how often the first is above the second, whichever the captions; ordered/FACT: for one source picture.
    p05 and p95: between which the cosines of all these pairs lie.
    """
    numbers = np.random.default_rng(seed)
    splits = tuple(dict.fromkeys((split, "train")))
    captions = grammar.panel(split, count)
    source, again = (_drawn(encoder, captions, numbers) for _ in range(2))
    same = (source * again).sum(-1)
    scores, everything = {"same": same.mean().item()}, [same]
    for fact in FACTS:
        rows = [i for i, one in enumerate(captions) if fact in neighbours(one, splits)]
        others = [neighbours(captions[i], splits)[fact] for i in rows]
        changed = _drawn(encoder, [some[numbers.integers(len(some))] for some in others], numbers)
        other = (source[rows] * changed).sum(-1)
        scores[fact] = other.mean().item()
        scores[f"auc/{fact}"] = auc(same[rows], other)
        scores[f"ordered/{fact}"] = (same[rows] > other).float().mean().item()
        everything.append(other)
    low, high = torch.cat(everything).quantile(torch.tensor([0.05, 0.95])).tolist()
    return {name: round(value, 4) for name, value in (scores | {"p05": low, "p95": high}).items()}


@torch.no_grad()
def evaluate_drawn(encoder: Pictures, split: str, count: int, seed: int = 1, group: int = 4) -> dict[str, float]:
    """The same of pictures by the generator `tiny`, `group` of each caption, beside one drawn scene of the caption.

    drawn/true, drawn/false: the mean cosine of those that the checker finds to show the caption, and of the others.
    auc/drawn: how often one of the first is above one of the second; ordered/drawn: the same within a group, where
    advantages are born; drawn/share: of all pictures, the true ones.
    """
    captions = grammar.panel(split, count)
    sources = encoder(torch.from_numpy(scenes.render_batch(captions, np.random.default_rng(seed))))
    asked = [caption for caption in captions for _ in range(group)]
    media = generated([caption.text for caption in asked], seed)
    true = torch.tensor([one.strict == 1 for one in checker.check_batch(media.numpy(), asked)])
    cosine = (encoder(media) * sources.repeat_interleave(group, 0)).sum(-1)
    groups = zip(cosine.split(group), true.split(group), strict=True)
    within = torch.cat([(c[t][:, None] - c[~t][None]).flatten() for c, t in groups])
    scores = {
        "drawn/share": true.float().mean().item(),
        "drawn/true": cosine[true].mean().item(),
        "drawn/false": cosine[~true].mean().item(),
        "auc/drawn": auc(cosine[true], cosine[~true]),
        "ordered/drawn": ((within > 0).float() + 0.5 * (within == 0).float()).mean().item(),
    }
    return {name: round(value, 4) for name, value in scores.items()}


def generated(texts: Sequence[str], seed: int, steps: int = 10) -> Tensor:
    """Pictures [N, 3, 32, 32] of the backbone `tiny` as it ships: Euler steps without guidance, rounded to bytes."""
    model = registry.build("backbones", "tiny", {}).load(torch.device("cpu"), torch.float32)
    condition = model.collate(model.encode([Prompt(i, text) for i, text in enumerate(texts)]))
    x = torch.randn(len(texts), *model.latent_shape, generator=generator(seed, "draw"))
    for sigma, sigma_next in pairwise(model.sigmas(steps).tolist()):
        x = flow.ode_step(x, model.velocity(model.net, x, torch.full((len(x),), sigma), condition), sigma, sigma_next)
    media: Tensor = (model.decode(x) * 255).round() / 255
    return media


def _drawn(encoder: Pictures, captions: Sequence[Caption], numbers: np.random.Generator) -> Tensor:
    return encoder(torch.from_numpy(scenes.render_batch(captions, numbers)))
