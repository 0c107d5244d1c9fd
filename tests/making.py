"""What tests of algorithms make by hand: scores, tensors, models that answer with one tensor."""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlkit.types import Prompt, Scores


def scores_of(values: Sequence[float], valid: Sequence[bool] | None = None) -> Scores:
    """Of one reward; NaN where not valid, which None leaves to the values themselves."""
    raw = torch.tensor(values)[:, None]
    scored = torch.isfinite(raw) if valid is None else torch.tensor(valid)[:, None]
    return Scores(("one",), torch.where(scored, raw, torch.nan), scored, torch.ones(1))


def told(texts: Iterable[str]) -> list[Prompt]:
    """Prompts of nothing but these texts, so that each is its own key."""
    return [Prompt(i, text) for i, text in enumerate(texts)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """fp64, so that closed forms hold to many digits."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Fixed:
    """A velocity model that answers with one tensor, and remembers what it was asked."""

    def __init__(self, v: Tensor) -> None:
        self.v = v
        self.asked: tuple[Tensor, Tensor] | None = None

    def velocity(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        self.asked = (x, sigma)
        return self.v


def models_of(v: Tensor, v_old: Tensor, v_reference: Tensor | None = None) -> Any:
    """A policy's sets, each `Fixed`; the reference is the current one unless it is given."""
    reference = v if v_reference is None else v_reference
    return SimpleNamespace(current=Fixed(v), old=Fixed(v_old), reference=Fixed(reference), old_is_current=False)
