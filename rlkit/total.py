"""Several rewards to one number a sample: a weighted sum, a mean, a product or the least of them, and gates over it."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_OPERATORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"\s*([\w./-]+)\s*(<=|>=|<|>)\s*(-?[\d.]+(?:e-?\d+)?)\s*")


@dataclass(frozen=True)
class Gate:
    """A bound on the total of a sample that lacks something: no beauty makes up for an instruction that was ignored."""

    when: str  # "NAME < 0.5" or "NAME/COMPONENT < 0.5"; it reads the number as the reward gave it
    at_most: float  # the total where the condition holds

    def __post_init__(self) -> None:
        self.parsed()

    def parsed(self) -> tuple[str, Callable[[Tensor, float], Tensor], float]:
        """(column, comparison, number)."""
        found = _CONDITION.fullmatch(self.when)
        if not found:
            raise ValueError(f"when: {self.when!r} is no condition. Write NAME < 0.5 or NAME/COMPONENT < 0.5")
        return found[1], _OPERATORS[found[2]], float(found[3])

    @property
    def column(self) -> str:
        return self.parsed()[0]


@dataclass(frozen=True)
class Total:
    """How a sample's rewards become one number, v_k being those that count and w_k their weights.

    sum: sum_k w_k v_k. geometric_mean: prod_k v_k^(w_k / sum w), as VIEScore's overall. product: prod_k v_k^w_k.
    minimum: the least v_k. The last three need numbers of 0 and more: a negative one leaves its sample unscored.
    """

    form: Literal["sum", "geometric_mean", "product", "minimum"] = "sum"
    gates: tuple[Gate, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether it is a weighted sum and nothing else, which an advantage may also take apart."""
        return self.form == "sum" and not self.gates

    def __call__(self, values: Tensor, weights: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """[N], NaN where something that is needed was not scored. values [N, R]; columns: what gates read, each [N]."""
        counted = weights != 0
        total = self._join(values[:, counted], weights[counted])
        for gate in self.gates:
            name, compare, number = gate.parsed()
            held = compare(columns[name], number)
            bounded = torch.where(held, total.clamp(max=gate.at_most), total)
            total = torch.where(torch.isfinite(columns[name]), bounded, torch.nan)
        return total

    def _join(self, values: Tensor, weights: Tensor) -> Tensor:
        if self.form == "sum":
            return values @ weights
        values = torch.where(values < 0, torch.nan, values)
        if self.form == "minimum":
            return torch.where(values.isnan().any(1), torch.nan, values.amin(1))
        powers = weights / weights.sum() if self.form == "geometric_mean" else weights
        return (values**powers).prod(1)
