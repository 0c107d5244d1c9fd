"""The pictures of a report: line charts as SVG and as PNG, and tiles cut out of sheets of samples.

The SVG is written by hand, so that its colours are those of the page's style sheet, light and dark, and a page with a
dozen charts stays small.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rlkit.tracking import ASIDE

LARGE, SMALL = (540, 250), (340, 190)  # width and height of a chart: what the page shows without scaling the letters
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 20, 26  # room for the numbers at the axes and the names of stages
MOST_POINTS = 400  # of one line: more cannot be told apart at this width
SMALL_TILE = 64  # up to here a tile is pixel art: shown enlarged, pixel by pixel
SHOWN = 192  # pixels of a large tile in the page

TONES = {"a": "#2f6fdb", "b": "#c2700c", "c": "#0f8a62"}  # as in the style sheet, for the PNG


@dataclass(frozen=True)
class Line:
    """One curve over the run's steps. `spread` is the half-width of the band around it, point by point."""

    name: str
    points: Sequence[tuple[float, float]]
    tone: str = "a"
    spread: Sequence[float] | None = None
    marked: bool = False  # a mark at every point: few points, and each of them a measurement

    def thinned(self) -> Line:
        """At most MOST_POINTS points, each the mean of its neighbours."""
        stride = math.ceil(len(self.points) / MOST_POINTS)
        if stride <= 1:
            return self
        pieces = [slice(i, i + stride) for i in range(0, len(self.points), stride)]
        points = [(_mean([x for x, _ in self.points[p]]), _mean([y for _, y in self.points[p]])) for p in pieces]
        spread = None if self.spread is None else [_mean(self.spread[p]) for p in pieces]
        return Line(self.name, points, self.tone, spread, self.marked)

    def bounds(self) -> list[tuple[float, float]]:
        spread = self.spread or [0.0] * len(self.points)
        return [(y - s, y + s) for (_, y), s in zip(self.points, spread, strict=True)]


@dataclass(frozen=True)
class Span:
    """A stage: its name and the steps between which it ran."""

    name: str
    start: float
    end: float


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def number(value: float) -> str:
    """Short: 0.0004, 0.35, 12, 1,200."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """About `most` round numbers between low and high: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Frame:
    """What part of the plane a chart shows, and where on its canvas."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    right: float
    floor: float

    @classmethod
    def around(cls, lines: Sequence[Line], stages: Sequence[Span], size: tuple[int, int]) -> Frame:
        """All points, bands and stages; and zero where it is near."""
        xs = [x for line in lines for x, _ in line.points] + [x for stage in stages for x in (stage.start, stage.end)]
        bounds = [bound for line in lines for bound in line.bounds()]
        low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
        if min(y for line in lines for _, y in line.points) >= 0 and low < 0.35 * high:
            low = 0.0  # also where a band reaches below what the quantity can be
        if high <= low:
            high = low + (abs(low) or 1.0)
        pad = 0.06 * (high - low)
        return cls(
            min(xs), max(*xs, min(xs) + 1), low - (pad if low else 0.0), high + pad, size[0] - RIGHT, size[1] - BOTTOM
        )

    def x(self, value: float) -> float:
        return round(LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - LEFT), 1)

    def y(self, value: float) -> float:
        return round(self.floor - (value - self.y_low) / (self.y_high - self.y_low) * (self.floor - TOP), 1)


def chart(
    title: str,
    lines: Sequence[Line],
    stages: Sequence[Span] = (),
    note: str = "",
    size: tuple[int, int] = LARGE,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A figure of the page: legend, axes, bands and lines; `marks`: steps with what happened there, as upright lines.
    Nothing if no line has a point."""
    lines = [line.thinned() for line in lines if line.points]
    if not lines:
        return ""
    frame = Frame.around(lines, stages, size)
    drawing = _stages(frame, stages) + _axes(frame) + "".join(_line(frame, line) for line in lines)
    drawing += "".join(_mark(frame, at, text) for at, text in marks if frame.x_low <= at <= frame.x_high)
    legend = "".join(f'<span class="key {line.tone}">{escape(line.name)}</span>' for line in lines)
    caption = f"<b>{escape(title)}</b>{legend if len(lines) > 1 else ''}<small>{escape(note)}</small>"
    svg = f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(title)}">{drawing}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def _stages(frame: Frame, stages: Sequence[Span]) -> str:
    """Every other stage shaded, each with its name; a run of one stage needs neither."""
    parts = []
    for index, stage in enumerate(stages if len(stages) > 1 else ()):
        left, width = frame.x(stage.start), frame.x(stage.end) - frame.x(stage.start)
        if index % 2:
            parts.append(f'<rect class="stage" x="{left}" y="{TOP}" width="{width:.1f}" height="{frame.floor - TOP}"/>')
        parts.append(f'<text class="name" x="{left + 4:.1f}" y="{TOP - 6}">{escape(stage.name)}</text>')
    return "".join(parts)


def _axes(frame: Frame) -> str:
    parts = []
    for value in ticks(frame.y_low, frame.y_high):
        y = frame.y(value)
        parts.append(f'<path class="rule" d="M{LEFT} {y}H{frame.right}"/>')
        parts.append(f'<text class="y" x="{LEFT - 7}" y="{y + 4:.1f}">{number(value)}</text>')
    for value in ticks(frame.x_low, frame.x_high, 7):
        if value == int(value):
            parts.append(f'<text class="x" x="{frame.x(value)}" y="{frame.floor + BOTTOM - 6}">{int(value):,}</text>')
    return "".join(parts)


def _line(frame: Frame, line: Line) -> str:
    places = [(frame.x(x), frame.y(y)) for x, y in line.points]
    parts = []
    if line.spread is not None:
        bounds = [(x, low, high) for (x, _), (low, high) in zip(line.points, line.bounds(), strict=True)]
        edge = [(frame.x(x), frame.y(high)) for x, _, high in bounds]
        edge += [(frame.x(x), min(frame.y(low), frame.floor)) for x, low, _ in reversed(bounds)]
        parts.append(f'<polygon class="band {line.tone}" points="{_pairs(edge)}"/>')
    parts.append(f'<polyline class="line {line.tone}" points="{_pairs(places)}"/>')
    if line.marked or len(places) == 1:
        for (x, y), (step, value) in zip(places, line.points, strict=True):
            tip = f"<title>step {number(step)}: {value:.4g}</title>"
            parts.append(f'<circle class="mark {line.tone}" cx="{x}" cy="{y}" r="3">{tip}</circle>')
    return "".join(parts)


def _mark(frame: Frame, at: float, text: str) -> str:
    return f'<path class="alarm" d="M{frame.x(at)} {TOP}V{frame.floor}"><title>{escape(text)}</title></path>'


def _pairs(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in places)


def curve(path: Path, panels: Sequence[tuple[str, Sequence[Line]]], stages: Sequence[Span] = ()) -> None:
    """The panels that have points as one PNG, for a README."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    panels = [(title, [line for line in lines if line.points]) for title, lines in panels]
    panels = [(title, lines) for title, lines in panels if lines]
    if not panels:
        return
    figure = Figure(figsize=(5.2 * len(panels), 3.2), dpi=140, layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for stage in stages[1::2]:
            axes.axvspan(stage.start, stage.end, color="0.94", zorder=0)
        for line in lines:
            xs, ys = zip(*line.points, strict=True)
            marker = "o" if line.marked else None
            axes.plot(xs, ys, color=TONES[line.tone], marker=marker, ms=4, lw=1.8, label=line.name)
            if line.spread is not None:
                lows, highs = zip(*line.bounds(), strict=True)
                axes.fill_between(xs, lows, highs, color=TONES[line.tone], alpha=0.16, lw=0)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("training steps")
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        if len(lines) > 1:
            axes.legend(frameon=False, loc="best")
    figure.savefig(path)


# ---- sheets of samples -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """A picture of many samples, tile by tile in rows, and what is known of each.

    A tile is `given` pictures that came with the prompt, and the sample to their right, all width x height.
    """

    path: Path
    at: int
    stage: str
    width: int
    height: int
    given: int
    columns: int
    drawn: bool  # false: the picture of a tile is what its sample, a text, was written about
    items: tuple[dict[str, Any], ...]

    @property
    def of(self) -> tuple[str, int]:
        """Its evaluation: the stage, and the training steps before it."""
        return self.stage, self.at

    @property
    def aside(self) -> bool:
        """Whether it is of weights that a monitor gave up by going back."""
        return self.path.stem.endswith(ASIDE)

    @property
    def small(self) -> bool:
        """Whether its pictures are pixel art."""
        return max(self.width, self.height) <= SMALL_TILE

    def key(self, index: int) -> tuple[Any, Any]:
        """What makes two samples comparable: the same prompt from the same noise."""
        return self.items[index].get("prompt"), self.items[index].get("seed")


def sheets(folder: Path, evaluations: Sequence[Mapping[str, Any]]) -> list[Sheet]:
    """The sheets of these evaluations, in their order; what a monitor left by going back before what it went back to.

    Left out: one that a killed run left half-written, and those of evaluations that are in the record no more, since a
    resumed run took their steps back.
    """
    places = {(row["stage"], row["at"]): place for place, row in enumerate(evaluations)}
    restored = {(row["stage"], row["at"]) for row in evaluations if row.get("restored") is not None}
    found = []
    for path in sorted((folder / "samples").glob("*.json")):
        picture = path.with_suffix(".png")
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            _open(picture)
            numbers = {name: known[name] for name in ("at", "stage", "width", "height", "given", "columns", "drawn")}
            found.append(Sheet(picture, items=tuple(known["items"]), **numbers))
        except (OSError, ValueError, KeyError):
            continue
    found = [one for one in found if one.of in (restored if one.aside else places)]
    return sorted(found, key=lambda one: (places[one.of], not one.aside))


def pair(found: Sequence[Sheet]) -> list[Sheet]:
    """The last sheet, and before it the first one of the same prompts and seeds: others may not show all of them."""
    if not found:
        return []
    last = found[-1]
    known = {last.key(index) for index in range(len(last.items))}
    first = next(sheet for sheet in found if any(sheet.key(index) in known for index in range(len(sheet.items))))
    return [last] if first is last else [first, last]


def _open(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def tiles(sheet: Sheet, indices: Sequence[int]) -> list[list[str]]:
    """Of each of these tiles its pictures as data URIs, the sample last: small ones as they are (the page enlarges
    them), large ones as thumbnails."""
    image = _open(sheet.path)
    found = []
    for index in indices:
        row, column = divmod(index, sheet.columns)
        top, left = row * sheet.height, column * sheet.width * (sheet.given + 1)
        cells = [(left + i * sheet.width, top) for i in range(sheet.given + 1)]
        pictures = [image.crop((x, y, x + sheet.width, y + sheet.height)) for x, y in cells]
        found.append([_as_uri(picture, sheet.small) for picture in pictures])
    return found


def _as_uri(picture: Any, small: bool) -> str:
    if small:
        return _data_uri(picture, "png")
    picture.thumbnail((SHOWN, SHOWN))
    return _data_uri(picture, "jpeg")


def _data_uri(image: Any, form: str) -> str:
    file = io.BytesIO()
    image.save(file, form, optimize=True)
    return f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode()}"


def enlarge(sheet: Sheet, path: Path, times: int = 3) -> None:
    """The sheet as a picture of its own; small tiles enlarged pixel by pixel."""
    from PIL import Image

    image = _open(sheet.path)
    if sheet.small:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    image.save(path, optimize=True)
