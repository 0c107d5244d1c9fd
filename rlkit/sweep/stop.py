"""Hyperband, as W&B's sweep engine defines it: which of the trials under way to stop.

An iteration is one logged value of the metric, not a training step: a held-out metric has as many as there were
evaluations, the one before the first step among them. At each bracket a trial is compared with all that came as far,
running or not, and goes on if it is among the best 1/eta. (arXiv 1603.06560; the definition of the package `sweeps`
0.3.0, whose default is `strict: true`.)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

_MOST = 10**9  # iterations, beyond which no bracket is of use


@dataclass(frozen=True)
class Hyperband:
    type: str = "hyperband"
    min_iter: int | None = None  # the first bracket; the next ones lie at min_iter * eta, * eta^2, ...
    max_iter: int | None = None  # of the longest trial, with s: brackets at max_iter / eta, ..., / eta^s
    eta: float = 3.0
    s: int | None = None
    strict: bool = True  # False: a trial is judged by its best value so far

    def __post_init__(self) -> None:
        if self.type != "hyperband":
            raise ValueError(f"type must be hyperband, not {self.type!r}")
        if self.max_iter is not None and self.s is None:
            raise ValueError("max_iter needs s, the number of brackets below it")
        if self.max_iter is None and self.min_iter is None:
            raise ValueError("needs min_iter, or max_iter and s")
        for name in ("min_iter", "max_iter", "s"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value}")
        if not (math.isfinite(self.eta) and self.eta > 1):
            raise ValueError(f"eta must be above 1, not {self.eta:g}")
        if not self.brackets():
            raise ValueError(f"there is no bracket: max_iter / eta, {self.max_iter} / {self.eta:g}, is below 1")

    def brackets(self) -> list[int]:
        """The iterations at which trials are compared, ascending."""
        found: list[int] = []
        if self.max_iter is not None and self.s is not None:
            band = self.max_iter / self.eta
            while band >= 1 and len(found) < self.s:
                found.append(int(band))
                band /= self.eta
            return sorted(set(found))
        band = float(self.min_iter or 1)
        while band < _MOST:
            found.append(int(band))
            band *= self.eta
        return sorted(set(found))

    def losers(self, values: Mapping[str, Sequence[float]], running: Collection[str], maximize: bool) -> dict[str, int]:
        """{trial: the bracket that it does not pass}. values: what each trial has logged of the metric, in order."""
        sign = -1.0 if maximize else 1.0
        histories = {name: [sign * one for one in own] for name, own in values.items()}
        found = {}
        for name in running:
            own = histories.get(name, [])
            reached = [band for band in self.brackets() if band <= len(own)]
            if not reached:
                continue
            band = reached[-1]
            there = sorted(one[band - 1] for one in histories.values() if len(one) >= band)
            limit = there[int(len(there) / self.eta)]
            if (own[band - 1] if self.strict else min(own)) > limit:
                found[name] = band
        return found
