"""A sweep's parameters: the distributions of W&B's sweep files, each as the value at a share of its probability.

A value reaches a trial as text, `key=value`, and W&B's agent writes that text with Python's `str`. So None and mappings
are refused here: the agent would write `None` and `{'a': 1}`, which no recipe reads as what was meant.

Not here: beta and inv_log_uniform. Different from W&B: what is drawn is rounded to six digits, so that a command line
can be read, and a multiple of `q` is the nearest between min and max, not one beyond them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from rlkit.errors import nearest

DISTRIBUTIONS = {  # the keys of each, the required ones first
    "constant": (("value",), ()),
    "categorical": (("values",), ()),
    "categorical_w_probabilities": (("values", "probabilities"), ()),
    "int_uniform": (("min", "max"), ()),
    "uniform": (("min", "max"), ()),
    "q_uniform": (("min", "max"), ("q",)),
    "log_uniform": (("min", "max"), ()),  # of exponents of e
    "log_uniform_values": (("min", "max"), ()),
    "q_log_uniform": (("min", "max"), ("q",)),
    "q_log_uniform_values": (("min", "max"), ("q",)),
    "normal": ((), ("mu", "sigma")),
    "q_normal": ((), ("mu", "sigma", "q")),
    "log_normal": ((), ("mu", "sigma")),
    "q_log_normal": ((), ("mu", "sigma", "q")),
}
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")  # what W&B takes as the name of a parameter
_DIGITS = 6
MOST = 700.0  # of an exponent of e: beyond 709 there is no number


@dataclass(frozen=True)
class Parameter:
    """One key that the trials differ in. Numbers are those of the file; what they mean is the distribution's."""

    key: str
    distribution: str
    values: tuple[Any, ...] = ()
    probabilities: tuple[float, ...] = ()
    min: float = 0.0
    max: float = 1.0
    q: float = 1
    mu: float = 0.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not KEY.fullmatch(self.key):
            what = f"{self.key!r} is no key that W&B takes: letters, digits and _ . - only"
            raise ValueError(f"{what}. A reward may have a name of its own in the recipe")
        for value in self.values:
            _check_text(value)
        if "values" in DISTRIBUTIONS[self.distribution][0] and not self.values:
            raise ValueError("values is empty")
        if self.probabilities and len(self.probabilities) != len(self.values):
            raise ValueError(f"{len(self.values)} values need as many probabilities, not {len(self.probabilities)}")
        for share in self.probabilities:
            _check_number("a probability", share, whole=False)
        if self.probabilities and (min(self.probabilities) < 0 or not math.isclose(sum(self.probabilities), 1)):
            raise ValueError("probabilities must be 0 or more, and 1 in all")
        if not self.min < self.max:
            raise ValueError(f"min must be below max, not {self.min} and {self.max}")
        if self._logarithmic and self._bounded and not self.distribution.endswith("_values") and self.max > MOST:
            hint = f"{self.distribution.removesuffix('_values')}_values takes the values themselves"
            raise ValueError(f"bounds are exponents of e, and e^{self.max:g} is beyond all numbers; {hint}")
        if self.distribution.endswith("_values") and self.min <= 0:
            raise ValueError(f"min must be above 0, where the logarithm begins, not {self.min}")
        if self.q <= 0 or self.sigma < 0:
            raise ValueError(f"q must be above 0 and sigma not below, not {self.q} and {self.sigma}")
        if self.distribution.startswith("q_") and self._bounded and not self._multiples()[0] <= self._multiples()[1]:
            raise ValueError(f"no multiple of q, {self.q}, lies between min and max")

    @property
    def fixed(self) -> bool:
        """Whether all trials have the same value."""
        return self.distribution == "constant"

    def at(self, share: float) -> Any:
        """The value below which this share (0..1) of the probability lies."""
        if self.values:
            return self.values[self._choice(share)]
        if self.distribution == "int_uniform":
            return min(int(self.max), int(self.min) + math.floor(share * (self.max - self.min + 1)))
        x = self._warp(self._scale()(share))
        if self.distribution.startswith("q_"):
            least, most = self._multiples() if self._bounded else (-math.inf, math.inf)
            multiple = min(most, max(least, round(x / self.q))) * self.q
            return int(multiple) if isinstance(self.q, int) else _rounded(multiple)
        ends = (self._warp(self._scale()(0.0)), self._warp(self._scale()(1.0)))
        return min(ends[1], max(ends[0], _rounded(x))) if self._bounded else _rounded(x)

    def listed(self) -> list[Any]:
        """Every value, for a grid; ValueError where there is no end of them."""
        if self.distribution in ("constant", "categorical"):
            return list(self.values)
        if self.distribution == "int_uniform":
            return list(range(int(self.min), int(self.max) + 1))
        if self.distribution == "q_uniform":  # as W&B counts: from min on, and max is left out
            count = math.ceil((self.max - self.min) / self.q - 1e-9)
            whole = all(isinstance(one, int) for one in (self.min, self.q))
            return [self.min + i * self.q if whole else _rounded(self.min + i * self.q) for i in range(count)]
        raise ValueError(f"a grid has no end of {self.distribution}. Give values, or take method: random")

    def place(self, value: Any) -> tuple[float, ...]:
        """Where a value lies, for distances between settings: 0..1 for numbers, a corner for each of other values."""
        if self.fixed:
            return ()
        if self.values:
            at = self.values.index(value)
            if all(_is_number(one) for one in self.values):
                return (sorted(self.values).index(value) / max(1, len(self.values) - 1),)
            return tuple(math.sqrt(0.5) * (i == at) for i in range(len(self.values)))
        x = math.log(value) if self._logarithmic and value > 0 else value
        if not self._bounded:
            return (NormalDist(self.mu, self.sigma or 1.0).cdf(x),)
        low, high = self._scale()(0.0), self._scale()(1.0)
        return (min(1.0, max(0.0, (x - low) / (high - low))),)

    @property
    def _bounded(self) -> bool:
        return "normal" not in self.distribution

    @property
    def _logarithmic(self) -> bool:
        return "log_" in self.distribution

    def _scale(self) -> Any:
        """share -> the number that is uniform or normal, before an exponential."""
        if not self._bounded:
            normal = NormalDist(self.mu, self.sigma or 1.0)
            return lambda share: normal.inv_cdf(min(1 - 1e-9, max(1e-9, share))) if self.sigma else self.mu
        low, high = self.min, self.max
        if self.distribution.endswith("_values"):
            low, high = math.log(low), math.log(high)
        return lambda share: low + share * (high - low)

    def _warp(self, x: float) -> float:
        return math.exp(x) if self._logarithmic else x

    def _multiples(self) -> tuple[int, int]:
        """The least and the largest n for which n q is not outside of the bounds."""
        low, high = (self._warp(self._scale()(end)) for end in (0.0, 1.0))
        return math.ceil(low / self.q - 1e-9), math.floor(high / self.q + 1e-9)

    def _choice(self, share: float) -> int:
        weights = self.probabilities or (1 / len(self.values),) * len(self.values)
        below = 0.0
        for i, weight in enumerate(weights):
            below += weight
            if share < below:
                return i
        return max(i for i, weight in enumerate(weights) if weight > 0)  # a share of 1, or what rounding left


def parameter(key: str, node: Any) -> Parameter:
    """What a sweep file says of one key; ValueError where it makes no sense."""
    if not isinstance(node, Mapping):
        raise ValueError(f"must be a mapping, not {node!r}. Write {key}: {{values: [...]}}")
    if "parameters" in node:
        raise ValueError("is nested, and its trials could not be started. Write the dotted key of each")
    name = node["distribution"] if "distribution" in node else _usual(node)
    if not isinstance(name, str) or name not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise ValueError(f"no distribution {name!r}.{nearest(str(name), DISTRIBUTIONS)} Known: {known}")
    required, optional = DISTRIBUTIONS[name]
    for one in node:
        if one not in (*required, *optional, "distribution"):
            allowed = (*required, *optional)
            raise ValueError(f"{name} has no {one!r}.{nearest(str(one), allowed)} Keys: {', '.join(allowed)}")
    lacking = [one for one in required if one not in node]
    if lacking:
        raise ValueError(f"{name} needs {' and '.join(lacking)}")
    numbers = {one: node[one] for one in ("min", "max", "q", "mu", "sigma") if one in node}
    for one, value in numbers.items():
        _check_number(one, value, whole=name == "int_uniform")
    values = [node["value"]] if name == "constant" else node.get("values", [])
    shares = node.get("probabilities", [])
    for one, several in (("values", values), ("probabilities", shares)):
        if not isinstance(several, list):
            raise ValueError(f"{one} must be a list, not {several!r}")
    return Parameter(key, str(name), tuple(values), tuple(shares), **numbers)


def _usual(node: Mapping[str, Any]) -> str:
    """The distribution that W&B takes where none is named."""
    if "values" in node:
        return "categorical_w_probabilities" if "probabilities" in node else "categorical"
    if "value" in node:
        return "constant"
    if "min" not in node and "max" not in node:
        raise ValueError("says not what to try. Give value, values, or min and max")
    whole = all(isinstance(node.get(one, 0), int) for one in ("min", "max"))
    return "int_uniform" if whole else "uniform"


def _check_number(name: str, value: Any, whole: bool) -> None:
    if not _is_number(value) or not math.isfinite(value):
        written = " Plain YAML reads 1e-4 as text: write 1.0e-4" if isinstance(value, str) else ""
        raise ValueError(f"{name} must be a number, not {value!r}.{written}")
    if whole and not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, not {value!r}")


def _check_text(value: Any) -> None:
    """Refuse what the agent would write otherwise than a recipe reads it."""
    if value is None or isinstance(value, Mapping):
        meant = "'null'" if value is None else "'{a: 1}'"
        raise ValueError(f"{value!r} would reach a recipe as text that it does not read. Put it in quotes: {meant}")
    if isinstance(value, list):
        for one in value:
            _check_text(one)
    elif not isinstance(value, str | bool | int | float) or value == "":
        raise ValueError(f"{value!r} is no value of a recipe. Use texts, numbers, true, false and lists")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def text_of(setting: Mapping[str, Any]) -> list[str]:
    """A setting as overrides, written as W&B's agent writes them."""
    return [f"{key}={value}" for key, value in setting.items()]
