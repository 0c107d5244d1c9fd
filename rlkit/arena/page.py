"""What an arena tells: a table and a plot, drawn from `arena.json` alone."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from rlkit.errors import DataError

SCORES = ("strict", "graded")
WIDTH = 120  # of a paragraph

Facts = Mapping[str, Any]


def write(folder: Path) -> Path:
    """arena.md and arena.png, from arena.json alone."""
    file = folder / "arena.json"
    if not file.is_file():
        hint = "Give the folder of an arena that has ended."
        raise DataError("there is no arena.json.", where=str(folder), hint=hint)
    facts = json.loads(file.read_text(encoding="utf-8"))
    draw(facts, folder / "arena.png")
    page = folder / "arena.md"
    page.write_text(table(facts), encoding="utf-8")
    return page


@dataclass(frozen=True)
class Standing:
    """One contestant over its seeds."""

    name: str
    note: str
    runs: tuple[Facts, ...]

    @property
    def gains(self) -> list[float]:
        return [run["after"]["strict"] - run["before"]["strict"] for run in self.runs]

    def mean(self, key: str, score: str = "") -> float:
        return _mean([run[key][score] if score else run[key] for run in self.runs])


def standings(facts: Facts) -> list[Standing]:
    """The contestants of which a run was measured, the largest mean gain first."""
    measured = [run for run in facts["runs"] if "failed" not in run]
    names = dict.fromkeys(run["contestant"] for run in measured)
    found = [tuple(run for run in measured if run["contestant"] == name) for name in names]
    rows = [Standing(runs[0]["contestant"], runs[0]["note"], runs) for runs in found]
    return sorted(rows, key=lambda row: _mean(row.gains), reverse=True)


COLUMNS = (
    *("algorithm", "gain in strict", "range over seeds", "strict", "graded", "steps"),
    *("network calls, millions", "divergence", "diversity"),
)


def table(facts: Facts) -> str:
    """The arena in Markdown: what was done, the table, and what its numbers are worth."""
    base, rows = facts["base"], standings(facts)
    strict, graded = ([scores[name] for scores in base["scores"].values()] for name in SCORES)
    seeds = len(facts["settings"]["seeds"])
    cells = ["*the base*", "", "", _score(_mean(strict)), _score(_mean(graded)), "", "", "0", _score(base["diversity"])]
    lines = [
        *(_done(facts), ""),
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(_row(row, seeds) for row in rows),
        f"| {' | '.join(cells)} |",
        *("", _noise(strict), "", textwrap.fill(MEANINGS, WIDTH)),
    ]
    if rows:
        lines += ["", "![Strict over training time and over network calls](arena.png)"]
    broken = [run for run in facts["runs"] if "failed" in run]
    lines += ["", *(f"* {run['contestant']}, seed {run['seed']}, failed: {run['failed']}" for run in broken)]
    return "\n".join(lines).rstrip() + "\n"


MEANINGS = (
    "Network calls are rows through the network, in sampling and training, forward passes only. Divergence is "
    "mean((v - v_base)²) on noised pictures of the base; diversity is the root mean square difference between pictures "
    "of one caption."
)


def _done(facts: Facts) -> str:
    settings = facts["settings"]
    seeds = [str(seed) for seed in settings["seeds"]]
    text = (
        f"Each run has {settings['seconds']:g} s of one processor core to train in (evaluations not counted), from the "
        f"same base; {'seeds' if len(seeds) > 1 else 'seed'} {_listed(seeds)}. Scores are on "
        f"{facts['base']['pictures']:,} pictures of {settings['split'].replace('_', '-')} captions. The gain is the "
        "last evaluation less the first, "
        "never the best one."
    )
    return textwrap.fill(text, WIDTH)


def _noise(strict: Sequence[float]) -> str:
    low, high = min(strict), max(strict)
    text = (
        f"Noise: in {len(strict)} evaluations of the base that differ in the initial noise alone, strict goes from "
        f"{_score(low)} to {_score(high)}, by {_score(high - low)}. A difference of that size between two rows says "
        "nothing."
    )
    return textwrap.fill(text, WIDTH)


def _row(row: Standing, seeds: int) -> str:
    gains = row.gains
    name = f"{row.name} ({row.note})" if row.note else row.name
    reach = f"{_signed(min(gains))} to {_signed(max(gains))}" if len(gains) > 1 else "one seed"
    if len(gains) < seeds:
        reach += f" ({len(gains)} of {seeds} seeds)"
    cells = [name, _signed(_mean(gains)), reach, *(_score(row.mean("after", score)) for score in SCORES)]
    cells += [f"{row.mean('steps'):,.0f}", f"{row.mean('network_calls') / 1e6:.3g}"]
    cells += [f"{row.mean('divergence'):.2g}", _score(row.mean("diversity"))]
    return f"| {' | '.join(cells)} |"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def _score(value: float) -> str:
    """.393, as the README writes scores."""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def _signed(value: float) -> str:
    return _score(value) if round(value, 3) < 0 else f"+{_score(abs(value))}"


# Ten colours that differ in lightness too, then again with another dash.
COLOURS = ("#1f5fbf", "#d95f02", "#1b8a5a", "#8e3bb0", "#c2185b", "#6b4f2a", "#0097a7", "#a08a00", "#7fb800", "#37474f")


def draw(facts: Facts, path: Path) -> None:
    """Strict against training time and against network calls: means over the seeds, and their range as a band."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    rows = standings(facts)
    if not rows:
        return
    figure = Figure(figsize=(11.5, 4.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    scales = ((0, 1.0, "seconds of one core, training"), (1, 1e-6, "millions of network calls"))
    noise = [scores["strict"] for scores in facts["base"]["scores"].values()]
    for axes, (column, scale, label) in zip(panels, scales, strict=True):
        axes.axhspan(min(noise), max(noise), color="0.86", lw=0, zorder=0)
        for row, colour in zip(rows, cycle(COLOURS)):
            x, middle, low, high = averaged([run["curve"] for run in row.runs], column)
            x = [value * scale for value in x]
            name = f"{_signed(_mean(row.gains))}  {row.name}" + (f"\n           ({row.note})" if row.note else "")
            dash = "--" if row.note else "-"
            axes.plot(x, middle, dash, color=colour, lw=1.8, marker="o", ms=3, label=name)
            if len(row.runs) > 1:
                axes.fill_between(x, low, high, color=colour, alpha=0.1, lw=0)
        axes.set_xlabel(label)
        axes.grid(color="0.9")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=7)
    count = len(facts["settings"]["seeds"])
    panels[0].set_ylabel("strict")
    title = f"{facts['settings']['split'].replace('_', '-').capitalize()} captions drawn right"
    panels[0].set_title(title, loc="left", fontsize=11, fontweight="bold")
    seeds = f"mean and range of {count} seeds" if count > 1 else "one seed"
    panels[1].set_title(f"{seeds}; grey: the base with other noise", loc="right", fontsize=9, color="0.4")
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(
        lines, names, loc="outside right center", frameon=False, fontsize=9, title="gain in strict", alignment="left"
    )
    figure.savefig(path)


def averaged(curves: Sequence[Sequence[Sequence[float]]], column: int) -> tuple[list[float], ...]:
    """(x, mean, lowest, highest) over runs, point by point at equal shares of each run's length.

    Shares, and not equal x: runs end a step apart, and the last point is then the mean of the last scores."""
    import numpy as np

    points = max(len(curve) for curve in curves)
    shares = np.linspace(0.0, 1.0, points)
    ends = np.array([curve[-1][column] for curve in curves], dtype=float)
    scores = []
    for curve, end in zip(curves, ends, strict=True):
        at = np.array([point[column] for point in curve], dtype=float) / end
        scores.append(np.interp(shares, at, [point[2] for point in curve]))
    stacked = np.stack(scores)  # [runs, points]
    lines = (shares * ends.mean(), stacked.mean(0), stacked.min(0), stacked.max(0))
    return tuple(line.tolist() for line in lines)
