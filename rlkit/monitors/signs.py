"""Signs in the numbers that a reward is hacked.

What is not trained on falls, a group no longer differs, the policy runs off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from rlkit.monitors.reading import AREA, Action, Alarm, Finding, Memory, Reading, positive
from rlkit.record import column_of, components_of
from rlkit.tracking import HELD_OUT

RELATED = 0.3  # correlation with its reward from which on more of a component is taken to be better
GROUPS, MEMBERS, SIDE = 8, 8, 64  # of a step, whose diversity is measured: this many, and no more pixels a side


@dataclass(frozen=True)
class HeldOut:
    """The trained total rose since the stage began, and something that is not trained on fell: the panel.

    The panel is every reward of weight 0 and every component that rises with its own reward over the pictures of an
    evaluation (correlation .3), which tells scores from counts and error bars; areas have a monitor of their own.
    """

    standard_errors: float = 2.0  # how far below its best a member must be; of both evaluations, taken as independent
    in_a_row: int = 2  # evaluations
    action: Action = "warn"

    moment: ClassVar = "evaluation"

    def __post_init__(self) -> None:
        positive(standard_errors=self.standard_errors, in_a_row=self.in_a_row)

    def look(self, reading: Reading, memory: Memory) -> Finding | None:
        row, total = reading.row, reading.row[f"{HELD_OUT}reward"]
        known: dict[str, int] = memory.setdefault("panel", {})
        known |= {column: sign for column, sign in panel(reading).items() if column not in known}
        if not math.isfinite(total) or not known:
            return None
        first, best = memory.setdefault("first", total), memory.setdefault("best", {})
        falls = {}
        for column, sign in known.items():
            value, error = sign * row.get(column, math.nan), row.get(f"{column}_se", 0.0)
            if math.isfinite(value):
                if value >= best.setdefault(column, [value, error])[0]:
                    best[column] = [value, error]
                falls[column] = (best[column][0] - value) / max(math.hypot(error, best[column][1]), 1e-9)
        if not falls:
            return None
        worst = max(falls, key=lambda column: falls[column])
        bad = total > first and falls[worst] > self.standard_errors
        memory["falls"] = memory.get("falls", 0) + 1 if bad else 0
        figures = {"": falls[worst]}
        if memory["falls"] < self.in_a_row:
            return Finding(figures)
        name, peak = worst.removeprefix(HELD_OUT), known[worst] * best[worst][0]
        text = f"held-out reward went from {first:.3f} to {total:.3f} while {name}, which is not trained on, "
        text += f"went from {peak:.3f} at its best to {row[worst]:.3f} ({falls[worst]:.1f} standard errors)"
        return Finding(figures, Alarm(falls[worst], self.standard_errors, text))


@dataclass(frozen=True)
class Collapse:
    """What is trained on has itself fallen on held-out prompts, far below its best: training has come apart."""

    standard_errors: float = 3.0  # how far below its best; of both evaluations, taken as independent
    in_a_row: int = 2  # evaluations
    action: Action = "warn"

    moment: ClassVar = "evaluation"

    def __post_init__(self) -> None:
        positive(standard_errors=self.standard_errors, in_a_row=self.in_a_row)

    def look(self, reading: Reading, memory: Memory) -> Finding | None:
        total, error = reading.row[f"{HELD_OUT}reward"], reading.row.get(f"{HELD_OUT}reward_se", 0.0)
        if not math.isfinite(total):
            return None
        best = memory.setdefault("best", [total, error])
        if total >= best[0]:
            best[:] = total, error
        fall = (best[0] - total) / max(math.hypot(error, best[1]), 1e-9)
        memory["falls"] = memory.get("falls", 0) + 1 if fall > self.standard_errors else 0
        if memory["falls"] < self.in_a_row:
            return Finding({"": fall})
        text = f"held-out reward, which is trained on, fell from {best[0]:.3f} at its best to {total:.3f} "
        text += f"({fall:.1f} standard errors): a lower or falling rate, a KL or a slower `old` are the usual cures"
        return Finding({"": fall}, Alarm(fall, self.standard_errors, text))


def panel(reading: Reading) -> dict[str, int]:
    """The columns of an evaluation that are not trained on -> 1, or -1 where less is better. Watched rewards first."""
    found, components = {}, components_of(reading.scores, reading.gather)
    signs = {one.name: 1 if getattr(one.reward, "higher_is_better", True) else -1 for one in reading.rewards}
    for one in reading.rewards:
        if not one.weight and one.name in reading.scores.names:
            found[f"{HELD_OUT}{one.name}"] = signs[one.name]
    for name, values in components.items():
        reward = name.split("/", 1)[0]
        if reward in reading.scores.names and not name.endswith(AREA):
            own = reading.gather(reading.scores.raw[:, reading.scores.names.index(reward)])
            if _correlation(reading.gather(values), own * signs.get(reward, 1)) >= RELATED:
                found[f"{HELD_OUT}{column_of(name, components)}"] = 1
    return found


def _correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's, over the finite pairs; 0 where either is constant."""
    both = torch.isfinite(one) & torch.isfinite(other)
    if int(both.sum()) < 3:
        return 0.0
    pair = torch.stack([one[both].double(), other[both].double()])
    pair = pair - pair.mean(1, keepdim=True)
    size = pair.norm(dim=1).prod()
    return float((pair[0] * pair[1]).sum() / size) if size > 1e-12 else 0.0


@dataclass(frozen=True)
class Spread:
    """Within-group standard deviation of the total, relative to the first steps; or too many groups of equal scores.

    Where a group has no spread there is nothing to learn, and a reward that all pictures reach may have been hacked.
    """

    least: float = 0.2  # of the first steps' mean
    equal: float = 0.9  # share of groups whose scores are all equal
    window: int = 10  # steps that are averaged, at the start and now
    action: Action = "warn"

    moment: ClassVar = "train"

    def __post_init__(self) -> None:
        positive(least=self.least, equal=self.equal, window=self.window)

    def look(self, reading: Reading, memory: Memory) -> Finding | None:
        if not _has_groups(reading) or not any(one.weight for one in reading.rewards):
            return None
        spread = _averaged(memory, "spread", reading.row["reward/group_std"], self.window)
        equal = _averaged(memory, "equal", reading.row["zero_std"], self.window)
        if spread is None or equal is None:
            return None
        ratio = spread[1] / spread[0] if spread[0] > 0 else 1.0
        figures = {"": ratio, "equal": equal[1]}
        last = f"of the last {self.window} steps"
        if ratio < self.least:
            text = f"the spread of rewards within a group is {ratio:.2f} of what it was in the first steps"
            return Finding(figures, Alarm(ratio, self.least, text))
        if equal[1] > self.equal and equal[1] > equal[0]:
            text = f"in {equal[1]:.0%} of the groups {last} all scores are equal, so that nothing is learned from them"
            return Finding(figures, Alarm(equal[1], self.equal, text))
        return Finding(figures)


@dataclass(frozen=True)
class Diversity:
    """How far apart pictures of one prompt are, relative to the first steps: the RMS over pixels, over all pairs."""

    least: float = 0.4  # of the first steps' mean
    window: int = 10  # steps that are averaged, at the start and now
    action: Action = "warn"

    moment: ClassVar = "train"

    def __post_init__(self) -> None:
        positive(least=self.least, window=self.window)

    def look(self, reading: Reading, memory: Memory) -> Finding | None:
        found = _averaged(memory, "distance", distance(reading), self.window) if _has_groups(reading) else None
        if found is None or not found[0] > 0:
            return None
        ratio = found[1] / found[0]
        if ratio >= self.least:
            return Finding({"": ratio})
        text = f"pictures of one prompt are {ratio:.2f} as far apart as in the first steps"
        return Finding({"": ratio}, Alarm(ratio, self.least, text))


def distance(reading: Reading) -> float:
    """The mean distance of two pictures of a group, over the first groups of the step. NaN where no group has two."""
    samples, gather = reading.samples, reading.gather
    group, index = gather(samples.group).cpu(), gather(samples.index).cpu()
    chosen = torch.cat([index[group == one].sort().values[:MEMBERS] for one in group.unique()[:GROUPS]])
    mine = torch.isin(samples.index.cpu(), chosen)
    pictures, group = (
        gather(_small(samples.media[mine.to(samples.media.device)])).cpu(),
        gather(samples.group.cpu()[mine]),
    )
    each = [torch.pdist(pictures[group == one].flatten(1).double()).mean() for one in group.unique()]
    known = [float(one) for one in each if torch.isfinite(one)]  # a group of one has no pair
    return sum(known) / len(known) / pictures[0].numel() ** 0.5 if known else math.nan


def _small(media: Tensor) -> Tensor:
    size = min(media.shape[-2], SIDE), min(media.shape[-1], SIDE)
    return media if tuple(media.shape[-2:]) == size or not len(media) else adaptive_avg_pool2d(media, size)


def _has_groups(reading: Reading) -> bool:
    """Whether pictures of one prompt were sampled to be compared; pairs of a data set are not ours."""
    return reading.samples.media.ndim == 4 and reading.samples.preference is None and reading.samples.total > 1


def _averaged(memory: Memory, name: str, value: float, window: int) -> tuple[float, float] | None:
    """(mean of the first `window` values, mean of the last) once there are twice as many; None before."""
    first, last = memory.setdefault(f"first {name}", []), memory.setdefault(f"last {name}", [])
    if math.isfinite(value):
        if len(first) < window:
            first.append(value)
        else:
            last.append(value)
            del last[:-window]
    return (sum(first) / window, sum(last) / window) if len(last) == window else None


@dataclass(frozen=True)
class Drift:
    """What the algorithm reports of the way from where the policy was, each against its cap; the figure is a share."""

    kl: float | None = 1.0  # to the anchor, as the algorithm measures it
    ratio: float | None = 0.1  # how far the mean importance ratio is from 1
    clip_fraction: float | None = 0.9  # share of rows that no longer pull
    window: int = 10  # steps that are averaged
    action: Action = "warn"

    moment: ClassVar = "train"

    def __post_init__(self) -> None:
        caps = {"kl": self.kl, "ratio": self.ratio, "clip_fraction": self.clip_fraction}
        positive(window=self.window, **{name: cap for name, cap in caps.items() if cap is not None})

    def look(self, reading: Reading, memory: Memory) -> Finding | None:
        row = reading.row
        seen = {"kl": row.get("kl"), "clip_fraction": row.get("clip_fraction")}
        seen["ratio"] = abs(row["ratio/mean"] - 1) if row.get("ratio/mean") is not None else None
        caps = {"kl": self.kl, "ratio": self.ratio, "clip_fraction": self.clip_fraction}
        shares = {}
        for name, cap in caps.items():
            value, last = seen[name], memory.setdefault(name, [])
            if cap is not None and value is not None and math.isfinite(value):
                last.append(value)
                del last[: -self.window]
                if len(last) == self.window:
                    shares[name] = sum(last) / self.window / cap
        if not shares:
            return None
        name = max(shares, key=lambda one: shares[one])
        cap = caps[name] or 1.0
        if shares[name] <= 1:
            return Finding({"": shares[name]})
        what = "|ratio/mean - 1|" if name == "ratio" else name
        text = f"{what} is {shares[name] * cap:.3g} in the mean of the last {self.window} steps, above {cap:g}"
        return Finding({"": shares[name]}, Alarm(shares[name] * cap, cap, text))


APART = {"fp32": 1e-4, "bf16": 0.05}  # a mean |difference of log-probs| of equal weights that rounding explains


@dataclass(frozen=True)
class Mismatch:
    """The engine that samples and the trainer disagree about the same weights: some did not arrive, or a cache is old.

    Silent about a step with answers of older weights, which may differ, and where the algorithm does not compute the
    trainer's own log-probs of what was sampled.
    """

    at_most: float | None = None  # the mean |difference of log-probs| of a step; None: 1e-4, and 0.05 in bf16
    action: Action = "warn"

    moment: ClassVar = "train"

    def __post_init__(self) -> None:
        if self.at_most is not None:
            positive(at_most=self.at_most)

    def look(self, reading: Reading, memory: Memory) -> Finding | None:
        apart = reading.row.get("mismatch/mean")
        if apart is None or reading.row.get("age/max", 0) > 0:
            return None
        limit = self.at_most or APART[reading.precision]
        if apart <= limit:
            return Finding({"": apart})
        text = f"the engine that samples and the trainer differ by {apart:.2g} in a token's log-prob, in the mean of a "
        text += f"step and with equal weights; {limit:g} is allowed. Is it the same network in the same precision?"
        return Finding({"": apart}, Alarm(apart, limit, text))
