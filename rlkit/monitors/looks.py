"""Signs in the pictures that a reward is hacked: they become sharp, bright, covered with text, or copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rlkit.monitors.reading import AREA, Action, Alarm, Finding, Memory, Reading, positive
from rlkit.record import components_of

CHUNK = 16  # pictures that are looked at together


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
        positive(least=self.least, most=self.most, grid=self.grid, period=self.period)
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
        positive(most=self.most)

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
        positive(most=self.most, times=self.times)

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
        positive(most=self.most, near=self.near)

    def look(self, reading: Reading, memory: Memory) -> Finding | None:
        samples = reading.samples
        if samples.media.ndim != 4:  # words
            return None
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
