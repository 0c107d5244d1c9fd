"""Scoring: several rewards, each with a weight, over one set of samples.

A sample that a reward could not score is masked and counted, and never becomes a silent 0; when more than a stated
share of a step's samples is lost, the run stops and says why. The numbers of every reward survive to the log as it gave
them; what is trained on is turned so that more is better, shifted, scaled and clipped first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from rlkit.errors import RewardError
from rlkit.scorer import Asking, Scorer, why
from rlkit.total import Total
from rlkit.types import Prompt, Reward, Samples, Scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightedReward:
    """A reward under its name in the recipe, and what the recipe makes of its numbers.

    What counts is clip((r - shift) * scale), r being the reward's number, or its negative where less is better.
    """

    name: str
    reward: Reward
    weight: float  # 0: only watched
    when: Literal["always", "evaluation"] = "always"  # evaluation: held-out samples only, and never trained on
    shift: float = 0.0
    scale: float = 1.0
    clip: tuple[float, float] | None = None
    asking: Asking = field(default_factory=Asking)
    entry: str = ""  # of the catalogue, where its name in the recipe is another

    def value(self, raw: Tensor) -> Tensor:
        """The reward's numbers as the total takes them."""
        turned = raw if getattr(self.reward, "higher_is_better", True) else -raw
        value = (turned - self.shift) * self.scale
        return value if self.clip is None else value.clamp(*self.clip)

    @property
    def bounds(self) -> tuple[float, float]:
        """Where `value` lies, as far as the reward's card says."""
        low, high = getattr(self.reward, "range", None) or (None, None)
        ends = torch.tensor([-math.inf if low is None else low, math.inf if high is None else high])
        least, most = sorted(self.value(ends).tolist())
        return least, most


class Scoring:
    """The recipe's rewards at work. They are loaded when they are first asked."""

    def __init__(
        self,
        rewards: Sequence[WeightedReward],
        max_unscored: float = 0.1,
        total: Total | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`max_unscored`: the share of a step's samples, over all processes, that may be lost."""
        self.rewards = tuple(rewards)
        self.max_unscored = max_unscored
        self.total = total or Total()
        device = device or torch.device("cpu")
        self.scorers = {one.name: Scorer(one.name, one.reward, one.asking, device, one.entry) for one in self.rewards}

    def close(self) -> None:
        """Free what was loaded. It is loaded again if it is needed again."""
        for scorer in self.scorers.values():
            scorer.close()

    def begin(self, samples: Samples) -> None:
        """Take finished samples of a step whose other samples are still to come; `__call__` then has all of them."""
        for one in self.rewards:
            if one.when == "always":
                self.scorers[one.name].begin(samples)

    def __call__(self, samples: Samples, gather: Callable[[Tensor], Tensor], held_out: bool = False) -> Scores:
        """`held_out`: with the rewards that are for evaluation alone."""
        asked = [one for one in self.rewards if held_out or one.when == "always"]
        if samples.shots is not None:
            return averaged(self._score(asked, samples.shots, gather), len(samples.shots) // max(1, len(samples)))
        scores = self._score(asked, samples, gather)
        if samples.previews is None:
            return scores
        return replace(scores, previews=self._score(asked, samples.previews, gather))

    def with_gradient(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The total of the rewards [N], with gradient with respect to `media`."""
        n = len(prompts)
        index = torch.arange(n)
        samples = Samples(media, torch.zeros(n, 0), tuple(prompts), index, index, index, version=0, total=n)
        columns: dict[str, Tensor] = {}
        values, weights = [], []
        for entry in self.rewards:
            if not entry.weight:
                continue  # only looked at, so it needs no gradient
            answer = self.scorers[entry.name].loaded(samples)
            raw, parts = answer if isinstance(answer, tuple) else (answer, {})
            if not (isinstance(raw, Tensor) and raw.requires_grad and raw.shape == (n,)):
                raise RewardError(
                    f"reward {entry.name!r} passes no gradient back to the picture",
                    where=f"rewards.{entry.name}",
                    hint="Compute it with torch operations on samples.media, or choose another algorithm.",
                )
            columns |= {entry.name: raw} | {f"{entry.name}/{part}": column for part, column in parts.items()}
            values.append(entry.value(raw))
            weights.append(entry.weight)
        return self.total(torch.stack(values, 1), torch.tensor(weights, device=media.device), columns)

    def _score(self, asked: Sequence[WeightedReward], samples: Samples, gather: Callable[[Tensor], Tensor]) -> Scores:
        raws, components, trouble = [], {}, {}
        for entry in asked:
            answer = self.scorers[entry.name](samples)
            raws.append(answer.values)
            components.update({f"{entry.name}/{part}": numbers for part, numbers in answer.components.items()})
            if answer.reasons:
                trouble[entry.name] = why(answer.reasons)
        names = tuple(entry.name for entry in asked)
        raw = torch.stack(raws, dim=1) if raws else torch.zeros(len(samples), 0)
        values = [entry.value(column) for entry, column in zip(asked, raws, strict=True)]
        weights = torch.tensor([entry.weight for entry in asked])
        scores = Scores(
            names=names,
            raw=raw,
            valid=torch.isfinite(raw),
            weights=weights,
            components=components,
            values=torch.stack(values, dim=1) if raws else None,
        )
        if not self.total.plain:
            columns = dict(zip(names, raws, strict=True)) | components
            scores = replace(scores, combined=self._combine(scores, columns))
        self._check(scores, trouble, gather)
        return scores

    def _combine(self, scores: Scores, columns: Mapping[str, Tensor]) -> Tensor:
        nothing = torch.full((len(scores.raw),), math.nan)
        known = {gate.column: columns.get(gate.column, nothing) for gate in self.total.gates}
        return self.total(scores.used, scores.weights, known)

    def _check(self, scores: Scores, trouble: Mapping[str, str], gather: Callable[[Tensor], Tensor]) -> None:
        """Every process sees the same counts, so all stop together."""
        lost = gather((~scores.valid).sum(0, keepdim=True)).sum(0)  # [R]
        total = int(gather(torch.tensor([len(scores.valid)])).sum())
        for name, count in zip(scores.names, lost.tolist(), strict=True):
            if not count:
                continue
            reason = trouble.get(name, "in another process")
            if count > self.max_unscored * total:
                raise RewardError(
                    f"reward {name!r} scored only {total - count} of {total} samples: {reason}",
                    where=f"rewards.{name}",
                    hint=f"Mend the reward, or raise run.max_unscored (now {self.max_unscored:g})",
                )
            log.warning("reward %r did not score %d of %d samples (masked): %s", name, count, total, reason)
        if self.total.plain:
            return
        gated = int(gather((scores.valid.all(1) & ~scores.scored).sum()[None]).sum())
        if gated > self.max_unscored * total:
            raise RewardError(
                f"{gated} of {total} samples have no total: a gate reads a component that was not given, or a number "
                "is negative",
                where="total",
                hint=f"Mend the gate or the form, or raise run.max_unscored (now {self.max_unscored:g})",
            )


def averaged(scores: Scores, count: int) -> Scores:
    """The means over each `count` neighbours. One that is not scored leaves its mean without a number."""

    def mean(values: Tensor) -> Tensor:
        return values.reshape(-1, count, *values.shape[1:]).mean(1)

    return replace(
        scores,
        raw=mean(scores.raw),
        valid=scores.valid.reshape(-1, count, scores.valid.shape[1]).all(1),
        components={name: mean(values) for name, values in scores.components.items()},
        values=None if scores.values is None else mean(scores.values),
        combined=None if scores.combined is None else mean(scores.combined),
    )


__all__ = ["Scoring", "WeightedReward", "averaged"]
