"""Monitors: is the reward still worth what it says? Watched at every step and evaluation; on unless switched off.

A policy that learns to please its reward shows it elsewhere: what is not trained on falls, the pictures of a prompt
become alike, sharper, brighter, or copies of their source. Each monitor looks at one such thing and compares it with
how the stage began. What it remembers is json and lies in the checkpoint, so that a resumed run sees the same alarms;
its figures are over all processes, so that all of them stop together.

An alarm is a row of metrics.jsonl, once until it is over. `warn` does no more. `stop` saves and ends the run: later
stages would build on what is in doubt. `roll_back` restores the weights of the stage's best evaluation and ends the
stage; the next one begins with them. Warning is the default, since none of these figures is proof.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from rlkit.data import HALVES, read_pairs
from rlkit.errors import RecipeError, RewardError, nearest
from rlkit.record import column_of, components_of
from rlkit.scoring import Scoring, WeightedReward
from rlkit.tracking import HELD_OUT
from rlkit.types import Prompt, Samples, Scores
from rlkit.world import grammar, scenes
from rlkit.world.grammar import COLOURS, NUMBERS, PLACES, SHAPES, Caption

Action = Literal["warn", "stop", "roll_back"]
Memory = dict[str, Any]
"""What a monitor knows of the steps before: json without NaN."""

RELATED = 0.3  # correlation with its reward from which on more of a component is taken to be better
GROUPS, MEMBERS, SIDE = 8, 8, 64  # of a step, whose diversity is measured: this many, and no more pixels a side
CHUNK = 16  # pictures that are looked at together
AREA = "/area"  # the end of a component's name that says how much of the picture text covers


@dataclass(frozen=True)
class Reading:
    """One training step or one evaluation: its row of numbers, and this process's share of the samples."""

    row: Mapping[str, Any]
    samples: Samples
    scores: Scores
    rewards: Sequence[WeightedReward]
    gather: Callable[[Tensor], Tensor]  # [n, ...] of each process -> [sum n, ...] of all, in rank order


@dataclass(frozen=True)
class Alarm:
    value: float
    threshold: float
    text: str


@dataclass(frozen=True)
class Finding:
    """What a monitor saw: figures for the record ("" is its own column, others stand below it), perhaps an alarm."""

    figures: Mapping[str, float]
    alarm: Alarm | None = None


# ---- what is not trained on ------------------------------------------------------------------------------------------


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
        _positive(standard_errors=self.standard_errors, in_a_row=self.in_a_row)

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


# ---- what a group still tells apart ----------------------------------------------------------------------------------


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
        _positive(least=self.least, equal=self.equal, window=self.window)

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
        _positive(least=self.least, window=self.window)

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


# ---- how far the policy has gone -------------------------------------------------------------------------------------


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
        _positive(window=self.window, **{name: cap for name, cap in caps.items() if cap is not None})

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


# ---- what the held-out pictures look like ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharpness:
    """High-frequency energy of held-out pictures (mean absolute Laplacian of the grey picture), and the steps across a
    grid of blocks over the steps inside them, both relative to the stage's first evaluation."""

    least: float = 0.5
    most: float = 2.0
    grid: float = 1.5
    period: int = 8  # pixels of the grid: an autoencoder's patch
    action: Action = "warn"

    moment: ClassVar = "evaluation"

    def __post_init__(self) -> None:
        _positive(least=self.least, most=self.most, grid=self.grid, period=self.period)
        if not self.least < self.most:
            raise ValueError(f"least must be below most, not {self.least} and {self.most}")

    def look(self, reading: Reading, memory: Memory) -> Finding | None:
        means = _means(reading, lambda media: _frequencies(media, self.period))
        if means is None:
            return None
        fine, across, inside = means
        grid = across / max(inside, 1e-6)
        first = memory.setdefault("first", [fine, grid])
        ratio, grid_ratio = ((now + 1e-6) / (then + 1e-6) for now, then in zip((fine, grid), first, strict=True))
        figures = {"": ratio, "grid": grid_ratio}
        for value, bad, bound, what in (
            (ratio, ratio < self.least, self.least, "held-out pictures are blurred or empty: their fine detail"),
            (ratio, ratio > self.most, self.most, "held-out pictures are noisy or oversharp: their fine detail"),
            (grid_ratio, grid_ratio > self.grid, self.grid, f"a grid of {self.period} pixels shows: its contrast"),
        ):
            if bad:
                text = f"{what} is {value:.2f} of what it was at the first evaluation"
                return Finding(figures, Alarm(value, bound, text))
        return Finding(figures)


def _frequencies(media: Tensor, period: int) -> Tensor:
    """[n, 3]: mean absolute Laplacian; mean step between neighbours across the grid, and inside its blocks."""
    grey = media.mean(1)
    centre = 4 * grey[:, 1:-1, 1:-1]
    fine = centre - grey[:, :-2, 1:-1] - grey[:, 2:, 1:-1] - grey[:, 1:-1, :-2] - grey[:, 1:-1, 2:]
    sides = []
    for steps in (grey.diff(dim=1).abs().mean(2), grey.diff(dim=2).abs().mean(1)):  # [n, H-1], [n, W-1]
        at = torch.arange(1, steps.shape[1] + 1, device=steps.device) % period == 0
        sides.append(
            torch.stack([steps[:, which].nan_to_num().sum(1) / which.sum().clamp(min=1) for which in (at, ~at)])
        )
    across, inside = (sides[0] + sides[1]) / 2
    return torch.stack([fine.abs().flatten(1).mean(1), across, inside], dim=1)


@dataclass(frozen=True)
class Colour:
    """How far the mean colour of held-out pictures, a channel or the saturation, is from the first evaluation's."""

    most: float = 0.15  # of the full scale
    action: Action = "warn"

    moment: ClassVar = "evaluation"

    def __post_init__(self) -> None:
        _positive(most=self.most)

    def look(self, reading: Reading, memory: Memory) -> Finding | None:
        means = _means(reading, _colours)
        if means is None:
            return None
        shifts = [now - then for now, then in zip(means, memory.setdefault("first", means), strict=True)]
        names = (
            ("red", "green", "blue", "saturation") if len(shifts) == 4 else [f"channel {i}" for i in range(len(shifts))]
        )
        worst = max(range(len(shifts)), key=lambda i: abs(shifts[i]))
        figure = abs(shifts[worst])
        if figure <= self.most:
            return Finding({"": figure})
        text = f"the mean {names[worst]} of held-out pictures moved by {shifts[worst]:+.2f} since the first evaluation"
        return Finding({"": figure}, Alarm(figure, self.most, text))


def _colours(media: Tensor) -> Tensor:
    """[n, C + 1]: the mean of each channel, and of the difference between the largest and the smallest."""
    return torch.cat([media.mean((2, 3)), (media.amax(1) - media.amin(1)).mean((1, 2))[:, None]], dim=1)


@dataclass(frozen=True)
class TextArea:
    """The share of the picture that text covers, where a reward has a component NAME/area: large letters please OCR."""

    most: float = 0.5  # of the picture, unless the stage began with more
    times: float = 3.0  # what it was at the first evaluation
    action: Action = "warn"

    moment: ClassVar = "evaluation"

    def __post_init__(self) -> None:
        _positive(most=self.most, times=self.times)

    def look(self, reading: Reading, memory: Memory) -> Finding | None:
        areas = {}
        for name, values in components_of(reading.scores, reading.gather).items():
            everywhere = reading.gather(values).double()
            finite = torch.isfinite(everywhere)
            if name.endswith(AREA) and bool(finite.any()):
                areas[name] = float(everywhere[finite].mean())
        if not areas:
            return None
        first: dict[str, float] = memory.setdefault("first", {})
        for name, area in areas.items():
            bound = min(max(self.most, first.setdefault(name, area)), self.times * max(first[name], 0.01))
            if area > bound:
                text = f"{name} is {area:.2f}; it was {first[name]:.2f} at the first evaluation"
                return Finding({"": max(areas.values())}, Alarm(area, bound, text))
        return Finding({"": max(areas.values())})


@dataclass(frozen=True)
class Copy:
    """The share of held-out pictures that are nearly their source: doing nothing pleases a reward for consistency."""

    most: float = 0.5  # of those that have a source, unless the stage began with more
    near: float = 0.02  # mean absolute difference of the pixels below which a picture is a copy
    action: Action = "warn"

    moment: ClassVar = "evaluation"

    def __post_init__(self) -> None:
        _positive(most=self.most, near=self.near)

    def look(self, reading: Reading, memory: Memory) -> Finding | None:
        samples = reading.samples
        pairs = [(samples.media[i], one.source) for i, one in enumerate(samples.prompts) if one.source is not None]
        copies = torch.tensor([_difference(one, source) < self.near for one, source in pairs], dtype=torch.float64)
        everywhere = reading.gather(copies)
        if not len(everywhere):
            return None
        share = float(everywhere.mean())
        first = memory.setdefault("first", share)
        if share <= max(self.most, first):
            return Finding({"": share})
        text = f"{share:.0%} of the held-out pictures are nearly their source; at the first evaluation {first:.0%} were"
        return Finding({"": share}, Alarm(share, self.most, text))


def _difference(picture: Tensor, source: Tensor) -> float:
    """Mean absolute difference of two pictures [3, H, W], the source brought to the other's size."""
    source = source.to(picture.device, picture.dtype)
    if source.shape != picture.shape:
        source = interpolate(source[None], size=picture.shape[-2:], mode="bilinear", antialias=True)[0]
    return float((picture - source).abs().mean())


def _means(reading: Reading, measure: Callable[[Tensor], Tensor]) -> list[float] | None:
    """The means over all pictures of what `measure` says of each, [n, K]; None where there is nothing to measure."""
    media = reading.samples.media
    if media.ndim != 4 or min(media.shape[-2:]) < 3:
        return None
    parts = [measure(part.float()) for part in media.split(CHUNK)] if len(media) else [measure(media.float())]
    return list(map(float, reading.gather(torch.cat(parts).double()).mean(0).tolist()))


# ---- before the first step -------------------------------------------------------------------------------------------


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
            _positive(world=self.world)
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


# ---- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Monitors:
    """A stage's monitors: a name with its options; null switches one off, absent is the default."""

    held_out: HeldOut | None = field(default_factory=HeldOut)
    spread: Spread | None = field(default_factory=Spread)
    diversity: Diversity | None = field(default_factory=Diversity)
    drift: Drift | None = field(default_factory=Drift)
    sharpness: Sharpness | None = field(default_factory=Sharpness)
    colour: Colour | None = field(default_factory=Colour)
    text_area: TextArea | None = field(default_factory=TextArea)
    copy: Copy | None = field(default_factory=Copy)
    sanity: Sanity | None = None
    best_by: str | None = None  # what `roll_back` goes by; None: the first of the panel, else held_out/reward

    def __post_init__(self) -> None:
        if self.best_by is not None and not self.best_by.startswith(HELD_OUT):
            raise ValueError(f"best_by is a column of the evaluations, such as {HELD_OUT}strict, not {self.best_by!r}")

    @classmethod
    def none(cls) -> Monitors:
        return cls(**{one.name: None for one in fields(cls)})

    @property
    def rolls_back(self) -> bool:
        return any(getattr(one, "action", None) == "roll_back" for one in vars(self).values())


@dataclass(frozen=True)
class Raised:
    """An alarm that was not there the last time."""

    monitor: str
    action: Action
    alarm: Alarm


class Watch:
    """The monitors of one stage at work. `memory` is all that they remember."""

    def __init__(self, monitors: Monitors) -> None:
        self.monitors = monitors
        self.memory: Memory = {}

    def look(self, reading: Reading) -> tuple[dict[str, float], list[Raised]]:
        """(the columns `monitor/NAME`, the alarms that are new) of a step or an evaluation."""
        columns: dict[str, float] = {}
        raised = []
        for name, monitor in vars(self.monitors).items():
            if getattr(monitor, "moment", None) != reading.row["kind"]:
                continue
            own = self.memory.setdefault(name, {})
            finding = monitor.look(reading, own)
            if finding is None:
                continue
            columns |= {f"monitor/{name}/{part}".rstrip("/"): value for part, value in finding.figures.items()}
            if finding.alarm is not None and not own.get("alarmed"):
                raised.append(Raised(name, monitor.action, finding.alarm))
            own["alarmed"] = finding.alarm is not None
        if reading.row["kind"] == "evaluation" and self.monitors.rolls_back:
            self._note_best(reading)
        return columns, raised

    def _note_best(self, reading: Reading) -> None:
        """The earliest of the best evaluations: later ones must be better by something."""
        if "best" not in self.memory:
            members = panel(reading)
            column = self.monitors.best_by or next(iter(members), f"{HELD_OUT}reward")
            if column not in reading.row:
                known = [one for one in reading.row if one.startswith(HELD_OUT) and not one.endswith("_se")]
                what = f"the evaluations have no {column!r}.{nearest(column, known)}"
                raise RecipeError(what, where="monitors.best_by", hint=f"Known: {', '.join(known)}.")
            sign = members.get(column, 1)
            self.memory["best"] = {"by": column, "sign": sign, "at": None, "value": None}
        best = self.memory["best"]
        value = reading.row.get(best["by"], math.nan)
        if math.isfinite(value) and (best["value"] is None or best["sign"] * (value - best["value"]) > 0):
            best |= {"at": reading.row["at"], "value": value}

    @property
    def best_at(self) -> int | None:
        """After how many training steps, over all stages, the best evaluation was."""
        at = self.memory.get("best", {}).get("at")
        return None if at is None else int(at)

    def options(self, name: str) -> dict[str, Any] | None:
        monitor = getattr(self.monitors, name, None)
        return None if monitor is None else asdict(monitor)


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


def _positive(**options: float) -> None:
    for name, value in options.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be above 0, not {value}")


__all__ = ["Action", "Alarm", "Finding", "Monitors", "Raised", "Reading", "Watch", "judged", "panel", "refused"]
