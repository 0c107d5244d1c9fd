"""The learner: turns per-row losses into one optimiser step, exactly, over micro-batches and processes.

A loss gives values and weights per row; only here are they averaged, term by term, by the sum of weights over all rows
of the mini-batch on all processes. How the rows were split then cannot change the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlkit.dist import Processes
from rlkit.errors import LossError
from rlkit.parts import Parts
from rlkit.types import Loss, Rows
from rlkit.weights import Weights, ema_decay


@dataclass(frozen=True)
class LearnerOptions:
    """The optimiser's numbers. AdamW; the rate rises linearly, stays, and falls linearly if `decay` says so."""

    lr: float
    batch: int  # rows per optimiser step, over all processes
    micro_batch: int | None = None  # rows per forward pass on one process; None: all of them at once
    epochs: int = 1  # passes over a step's rows
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup: int = 0  # optimiser steps
    decay: tuple[int, int] | None = None  # (first, last) optimiser steps between which the rate falls to `lr_end`
    lr_end: float = 0.0
    ema: float | None = None  # decay of the set `ema`; None: no such set
    lr_of: Mapping[str, float] = field(default_factory=dict)  # of a policy's parts, where theirs is another than `lr`

    def __post_init__(self) -> None:
        rates = [(f"lr_of.{part}", rate, 0.0) for part, rate in self.lr_of.items()]
        for name, value, lowest in (("lr", self.lr, 0.0), ("max_grad_norm", self.max_grad_norm, 0.0), *rates):
            if not (math.isfinite(value) and value > lowest):
                raise ValueError(f"{name} must be above 0, not {value}")
        for name, count in (("batch", self.batch), ("micro_batch", self.micro_batch), ("epochs", self.epochs)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be 1 or more, not {count}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema is a decay within [0, 1), not {self.ema}")
        if not 0 <= self.lr_end <= self.lr:
            raise ValueError(f"lr_end must be within 0..lr ({self.lr}), not {self.lr_end}")
        if self.decay is None and self.lr_end:
            raise ValueError("lr_end is where `decay` ends: say decay: [first, last], in optimiser steps")
        if self.decay is not None and not 0 <= self.decay[0] < self.decay[1]:
            raise ValueError(f"decay must be [first, last] optimiser steps, 0 <= first < last, not {list(self.decay)}")

    def rate(self, updates: int) -> float:
        """The learning rate after so many updates. It depends on nothing else, so that a resumed run has the same."""
        warm = min(1.0, (updates + 1) / max(1, self.warmup))
        first, last = self.decay or (updates + 1, updates + 2)
        left = min(1.0, max(0.0, (last - updates) / (last - first)))
        return warm * (self.lr_end + (self.lr - self.lr_end) * left)


LossFunction = Callable[[Any, Any], Loss]


class Learner:
    """The optimiser of one policy. `policy.trainable` are its parameters, in a fixed order.

    Of a policy of several parts each has a rate of its own, and a gradient of its own to clip: one whose gradient is
    large does not hold back the others.
    """

    def __init__(self, policy: Weights | Parts, options: LearnerOptions, processes: Processes) -> None:
        self.policy = policy
        self.options = options
        self.processes = processes
        self.parameters = list(policy.trainable.values())
        self.groups = {name: list(tensors.values()) for name, tensors in groups_of(policy).items()}
        self.optimizer = torch.optim.AdamW(
            [{"params": tensors} for tensors in self.groups.values()],
            lr=options.lr,
            betas=options.betas,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.updates = 0
        self._sums: dict[str, Tensor] = {}  # "name" -> [weighted sum, sum of weights], this process's part
        self._peaks: dict[str, float] = {}
        if options.ema is not None and "ema" not in policy.sets:
            policy.keep("ema")

    def step(self, loss: LossFunction, models: Any, batch: Rows) -> None:
        """One optimiser step over the mini-batch of which this process holds `batch`, possibly no rows.

        LossError, on every process, if the gradient is not finite; nothing has been updated then.
        """
        self.gradient(loss, models, batch)
        longest = self.options.max_grad_norm
        norms = {name: torch.nn.utils.clip_grad_norm_(one, longest) for name, one in self.groups.items()}
        if not all(torch.isfinite(norm) for norm in norms.values()):
            self.optimizer.zero_grad()
            raise self._diagnosis(loss, models, batch)
        for name, norm in norms.items():
            self._note(f"grad_norm/{name}".rstrip("/"), norm.detach().cpu().reshape(1), torch.ones(1))
        for name, group in zip(self.groups, self.optimizer.param_groups, strict=True):
            own = self.options.lr_of.get(name, self.options.lr) / self.options.lr
            group["lr"] = self.options.rate(self.updates) * own
        self.optimizer.step()
        self.policy.updated()
        if self.options.ema is not None:
            self.policy.blend("ema", ema_decay(self.updates, self.options.ema))
        self.updates += 1
        self.optimizer.zero_grad()

    def _diagnosis(self, loss: LossFunction, models: Any, batch: Rows) -> LossError:
        """Which row of this process's batch makes the gradient infinite or NaN: found by halving."""
        if not self._broken(loss, models, batch):
            return LossError("the gradient is not finite, by the rows of another process")
        first, rows = 0, batch
        while len(rows) > 1:
            half = torch.arange(len(rows) // 2)
            if self._broken(loss, models, rows.select(half)):
                rows = rows.select(half)
                continue
            rest = torch.arange(len(half), len(rows))
            if not self._broken(loss, models, rows.select(rest)):
                break  # only their sum overflows
            first, rows = first + len(half), rows.select(rest)
        values = {name: value for name, (value, _) in loss(models, rows.to(self.policy.device)).terms.items()}
        bad = [name for name, value in values.items() if not value.isfinite().all()]
        what = (
            f"the loss term {bad[0]!r} is {values[bad[0]].flatten()[0].item()}" if bad else "the gradient is not finite"
        )
        error = LossError(f"{what} at row {int(rows.row[0])}")
        error.row = first
        return error

    def _broken(self, loss: LossFunction, models: Any, rows: Rows) -> bool:
        """Whether these rows alone have a gradient that is not finite. Nothing is exchanged between processes."""
        for micro in self._micro_batches(rows):
            terms = loss(models, micro).terms.values()
            value = torch.stack([(value * weight).sum() for value, weight in terms]).sum()
            found = torch.autograd.grad(value, self.parameters, allow_unused=True)
            if not all(gradient.isfinite().all() for gradient in found if gradient is not None):
                return True
        return False

    def gradient(self, loss: LossFunction, models: Any, batch: Rows) -> None:
        """Set every parameter's `.grad` to the gradient of the mini-batch's weighted means.

        Sums are accumulated un-normalised, since the sum of weights is known only after the last micro-batch. Terms
        with the same weights share one accumulator; each further weighting costs one more.
        """
        kept: dict[tuple[str, ...], list[Tensor]] = {}
        weights: dict[tuple[str, ...], float] = {}
        for micro in self._micro_batches(batch):
            result = loss(models, micro)
            self._note_metrics(result)
            families = _families(result)
            for i, (names, weight) in enumerate(families.items()):
                value = torch.stack([(result.terms[name][0] * weight).sum() for name in names]).sum()
                found = torch.autograd.grad(
                    value, self.parameters, retain_graph=i + 1 < len(families), allow_unused=True
                )
                pairs = zip(self.parameters, found, strict=True)
                gradients = [torch.zeros_like(p) if g is None else g for p, g in pairs]
                if names in kept:
                    torch._foreach_add_(kept[names], gradients)
                else:
                    kept[names] = gradients
                weights[names] = weights.get(names, 0.0) + float(weight.sum())
        self._combine(kept, weights)

    def _combine(self, kept: dict[tuple[str, ...], list[Tensor]], weights: Mapping[tuple[str, ...], float]) -> None:
        self.optimizer.zero_grad()
        # A process without rows does not know the terms' names; all learn them so that all join the same reductions.
        for names in self._family_names(weights):
            total = self.processes.add(torch.tensor([weights.get(names, 0.0)], dtype=torch.float64)).item()
            if total > 0 and names in kept:
                torch._foreach_mul_(kept[names], 1 / total)
                for parameter, gradient in zip(self.parameters, kept[names], strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.processes.add_gradients(self.parameters)

    def _family_names(self, weights: Mapping[tuple[str, ...], float]) -> list[tuple[str, ...]]:
        if self.processes.count == 1:
            return list(weights)
        text = "\n".join(" ".join(names) for names in weights)
        letters = self.processes.gather(torch.tensor(list((text + "\n").encode()), dtype=torch.int64))
        lines = bytes(letters.tolist()).decode().split("\n")
        return sorted({tuple(line.split(" ")) for line in lines if line})

    def _micro_batches(self, batch: Rows) -> list[Rows]:
        if not len(batch):
            return []
        size = self.options.micro_batch or len(batch)
        return [batch.select(part).to(self.policy.device) for part in torch.arange(len(batch)).split(size)]

    def _note_metrics(self, result: Loss) -> None:
        for name, (value, weight) in result.terms.items():
            self._note(f"loss/{name}", value.detach(), weight)
        weight = next(iter(result.terms.values()))[1]
        for name, values in result.metrics.items():
            self._note(name, values.detach(), weight)

    def _note(self, name: str, values: Tensor, weight: Tensor) -> None:
        values, weight = values.double().cpu(), weight.double().cpu()
        pair = torch.stack([(values * weight).sum(), weight.sum()])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair
        seen = values[weight > 0]
        if len(seen) and name.endswith(("/deviation", "/high")):
            self._peaks[name] = max(self._peaks.get(name, 0.0), float(seen.max()))
        if len(seen) and name.endswith("/low"):
            self._peaks[name] = max(self._peaks.get(name, -math.inf), -float(seen.min()))

    def metrics(self) -> dict[str, float]:
        """What was noted since the last call, over all processes: weighted means, but of `*/deviation` and `*/high` the
        largest and of `*/low` the smallest."""
        names = [names for names in self._family_names({tuple(self._sums): 0.0}) if names]
        order = sorted({name for family in names for name in family})
        means = {}
        for name in order:
            total = self.processes.add(self._sums.get(name, torch.zeros(2, dtype=torch.float64)))
            if self.processes.count > 1 and name.startswith("grad_norm"):
                total = self._sums[name]  # the same number on every process
            if name.endswith(("/deviation", "/high", "/low")):
                sign = -1.0 if name.endswith("/low") else 1.0
                here = self._peaks.get(name, 0.0 if sign > 0 else -math.inf)
                means[name] = sign * float(self.processes.gather(torch.tensor([here], dtype=torch.float64)).max())
            elif total[1] > 0:
                means[name] = float(total[0] / total[1])
        for name, group in zip(self.groups, self.optimizer.param_groups, strict=True):
            means[f"lr/{name}".rstrip("/")] = float(group["lr"])
        self._sums, self._peaks = {}, {}
        return means

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, json) of the optimiser: moments per parameter name, and the number of updates."""
        tensors = {}
        for name, parameter in self.policy.trainable.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.detach()
        return tensors, {"updates": self.updates}

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put back what `state` gave, and nothing else: before its first update an optimiser has no moments."""
        self.updates = int(numbers["updates"])
        self.optimizer.state.clear()
        for name, parameter in self.policy.trainable.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}/{name}" in tensors:
                    self.optimizer.state[parameter][key] = tensors[f"{key}/{name}"].to(parameter.device).clone()


def groups_of(policy: Weights | Parts) -> dict[str, Mapping[str, Tensor]]:
    """The trained tensors by the part that they are of; a policy of one part has no name for it."""
    return dict(policy.groups) if isinstance(policy, Parts) else {"": policy.trainable}


def _families(result: Loss) -> dict[tuple[str, ...], Tensor]:
    """Terms grouped by weights: (names) -> weight [B]. Two terms belong together when their weights are one tensor."""
    by_weight: dict[int, tuple[list[str], Tensor]] = {}
    for name, (_, weight) in result.terms.items():
        by_weight.setdefault(id(weight), ([], weight))[0].append(name)
    return {tuple(names): weight for names, weight in by_weight.values()}
