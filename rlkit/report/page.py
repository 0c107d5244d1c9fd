"""The sections of report.html, each a function from plain numbers to HTML, and its style sheet.

The page loads nothing: no script, font or picture from elsewhere. Everything that a run wrote is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from rlkit.report.charts import SMALL, Line, Sheet, Span, chart, number, tiles
from rlkit.tracking import HELD_OUT

Row = Mapping[str, Any]

HEADLINES = ("strict", "graded", "reward")  # of a run or a stage: the first that was measured stands for it
MONITOR = "monitor/"
PICTURES = 24
SCORES = ("strict", "graded", "reward")  # of one picture, the most telling first
VISIBLE = 0.05  # a smaller change of one picture's score gets no mark
NOISE = 2.0  # standard errors: a smaller change is called none
PHASES = {
    "sample": "sampling",
    "score": "scoring",
    "train": "training",
    "evaluate": "evaluating",
    "start": "starting",
}
DIAGNOSTICS = {  # what to plot of the training rows, where they have it: key -> title, note
    "kl": ("KL to the anchor", ""),
    "ratio/deviation": ("Ratio, furthest from 1", ""),
    "clip_fraction": ("Fraction clipped", ""),
    "grad_norm": ("Gradient norm", ""),
    "reward/group_std": ("Reward spread within a group", ""),
    "zero_std": ("Groups without spread", "fraction"),
    "unscored": ("Samples not scored", "fraction"),
    "loss/policy": ("Policy loss", ""),
    "lr": ("Learning rate", ""),
}


# ---- words -----------------------------------------------------------------------------------------------------------


def headline(measured: Iterable[str]) -> str | None:
    """The score that stands for the others."""
    names = list(measured)
    return next((name for name in (*HEADLINES, *names) if name in names), None)


def direction(change: Row) -> int:
    """1 up, -1 down, 0 neither: the same, or within the noise."""
    moved = change["change"] or 0.0
    if abs(moved) <= NOISE * (change.get("change_se") or 0.0):
        return 0
    return (moved > 0) - (moved < 0)


def difference(change: Row) -> str:
    error = change.get("change_se")
    return f"{change['change']:+.3f}" + ("" if error is None else f" ± {error:.3f}")


def verdict(met: bool | None) -> str:
    return {True: "met", False: "not met", None: "cannot be judged"}[met]


def duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def tone(direction: int) -> str:
    return {1: "up", -1: "down", 0: "same"}[direction]


def score(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + ("" if error is None else f"<small> ± {error:.3f}</small>")


# ---- lines -----------------------------------------------------------------------------------------------------------


def held_out_lines(evaluations: Sequence[Row]) -> list[Line]:
    """Strict and graded; the reward itself only where a recipe has neither."""
    lines = [_held_out_line(evaluations, name, tone) for name, tone in (("strict", "a"), ("graded", "b"))]
    return lines if any(line.points for line in lines) else [_held_out_line(evaluations, "reward", "a")]


def _held_out_line(evaluations: Sequence[Row], name: str, tone: str) -> Line:
    rows = [row for row in evaluations if row.get(HELD_OUT + name) is not None]
    errors = [row.get(f"{HELD_OUT}{name}_se") or 0.0 for row in rows]
    return Line(name, [(row["at"], row[HELD_OUT + name]) for row in rows], tone, errors, marked=True)


def reward_lines(train: Sequence[Row]) -> list[Line]:
    rows = [row for row in train if row.get("reward/mean") is not None]
    spread = [row.get("reward/std") or 0.0 for row in rows]
    return [Line("reward", [(row["at"], row["reward/mean"]) for row in rows], "c", spread)]


def diagnostics(train: Sequence[Row], spans: Sequence[Span]) -> list[str]:
    """A small chart for each quantity that was written and ever changed."""
    figures = []
    for key, (title, note) in DIAGNOSTICS.items():
        points = [(row["at"], row[key]) for row in train if row.get(key) is not None]
        if len({value for _, value in points}) > 1:
            figures.append(chart(title, [Line(title, points, "a")], spans, note, SMALL))
    return figures


def monitors(rows: Sequence[Row], spans: Sequence[Span], marks: Sequence[tuple[float, str]]) -> list[str]:
    """A small chart for each figure of a monitor that ever changed."""
    names = dict.fromkeys(key for row in rows for key in row if key.startswith(MONITOR))
    figures = []
    for key in names:
        points = [(row["at"], row[key]) for row in rows if row.get(key) is not None]
        if len({value for _, value in points}) > 1:
            title = key.removeprefix(MONITOR).replace("/", " · ")
            figures.append(chart(title, [Line(title, points, "a")], spans, "", SMALL, marks))
    return figures


# ---- sections --------------------------------------------------------------------------------------------------------


def document(title: str, sections: Sequence[str]) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main></body></html>\n"
    )


def section(title: str, *parts: str, style: str = "") -> str:
    inside = "".join(parts)
    return f'<section><h2>{escape(title)}</h2><div class="row {style}">{inside}</div></section>' if inside else ""


def header(facts: Row, told: Sequence[str], environment: Row, planned: int) -> str:
    headline, *others = told
    steps = f"{facts['steps']:,}" + (f" of {planned:,}" if planned > facts["steps"] else "") + " steps"
    known = [
        steps,
        duration(facts["seconds"]["total"]),
        environment.get("device"),
        f"{environment['processes']} processes" if environment.get("processes", 1) != 1 else None,
        str(environment.get("started", ""))[:16].replace("T", " "),
    ]
    way, word = ("up", "finished") if facts["finished"] else ("down", "not finished")
    line = " · ".join(escape(str(one)) for one in known if one)
    top = f'<b>{escape(facts["recipe"])}</b><span class="badge {way}">{word}</span>{line}'
    more = f"<p>{escape(' '.join(others))}</p>" if others else ""
    return f'<header><p class="meta">{top}</p><h1>{escape(headline)}</h1>{more}</header>'


def cards(changes: Mapping[str, Row], whose: Mapping[str, str]) -> str:
    """The large numbers on top. whose: of which stages each is, where it is not of all."""
    parts = []
    for name, change in changes.items():
        moved = ""
        if change["change"] is not None:
            moved = f'<span class="{tone(direction(change))}">{difference(change)}</span>'
        now = change["before"] if change["after"] is None else change["after"]
        start = "" if change["after"] is None else f"from {change['before']:.3f} "
        label = escape(f"held-out {name}{whose[name]}")
        parts.append(f'<div class="card"><span>{label}</span><b>{now:.3f}</b>{start}{moved}</div>')
    return f'<div class="cards">{"".join(parts)}</div>' if parts else ""


def alarms(raised: Sequence[Row]) -> str:
    """What the monitors raised. A run without alarms has no such section."""
    if not raised:
        return ""
    does = {"warn": "warned", "stop": "ended the run", "roll_back": "rolled back"}
    rows = []
    for one in raised:
        done = does.get(str(one["action"]), str(one["action"]))
        done += f" to step {one['restored']:,}" if one["restored"] is not None else ""
        numbers = f"{_number(one['value'])} (bound {_number(one['threshold'])})"
        cells = (f"{one['at']:,}", one["stage"], one["monitor"], numbers, done, one["text"])
        rows.append("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("step", "stage", "monitor", "value", "action", "what"))
    return f'<section><h2>Alarms</h2><table class="words"><tr>{head}</tr>{"".join(rows)}</table></section>'


def _number(value: float | None) -> str:
    return "–" if value is None else number(value)


def pictures(pair: Sequence[Sheet], by: Sequence[str] = SCORES) -> str:
    """The same prompts from the same noise, at the first and at the last evaluation.

    by: the scores that say the same of both, in the order of SCORES.
    """
    if not pair:
        return ""
    first, last = pair[0], pair[-1]
    places = {last.key(index): index for index in range(len(last.items))}
    matched = [(index, places[first.key(index)]) for index in range(len(first.items)) if first.key(index) in places]
    matched = matched[:PICTURES]
    olds, news = tiles(first, [old for old, _ in matched]), tiles(last, [new for _, new in matched])
    ways = [_compare(first.items[old], last.items[new], by) for old, new in matched]

    def tiles_of(old: Sequence[str], new: Sequence[str]) -> list[str]:
        return [*old, *new[-1:]] if first is not last else list(old)

    cells = "".join(
        _picture(first.items[old], last.items[new], way, tiles_of(old_tile, new_tile), last.drawn, by)
        for (old, new), way, old_tile, new_tile in zip(matched, ways, olds, news, strict=True)
    )
    beside = "What was given, then: " if first.given else ""
    note = f"{beside}Step {first.at:,}."
    if first is not last:
        sides = "step {}, step {}" if first.given else "Left: step {}. Right: step {}"
        sides = sides if last.drawn else "Said of each picture: step {} → step {}"
        many = f"{len(ways)} {'pictures' if last.drawn else 'texts'}"
        note = f"{beside}{sides.format(f'{first.at:,}', f'{last.at:,}')}. Of these {many}, "
        note += f"{ways.count('better')} got better and {ways.count('worse')} got worse."
    small = "pixels" if first.small and last.small else ""
    return (
        f'<section><h2>Same prompts, same seeds</h2><p class="note">{note}</p>'
        f'<div class="pictures {small}">{cells}</div></section>'
    )


def _compare(before: Row, after: Row, by: Sequence[str]) -> str:
    """By the strictest score that tells them apart: a picture is right or wrong first, and more or less so second."""
    for name in by:
        old, new = before.get(name), after.get(name)
        if old is not None and new is not None and abs(new - old) > VISIBLE:
            return "better" if new > old else "worse"
    return ""


def _picture(before: Row, after: Row, way: str, images: Sequence[str], drawn: bool, by: Sequence[str]) -> str:
    prompt = escape(str(after.get("prompt", "")))
    if "text" in after:  # what was said, of a request if there was one
        words = [str(one.get("text", "")) for one in ((before, after) if before is not after else (after,))]
        said = " → ".join(escape(one) or "–" for one in words)
        prompt = f"{prompt}: {said}" if prompt else said
    if not drawn:
        images = images[-1:]
    style = f' style="width: calc({100 / len(images):.2f}% - 6px)"' if len(images) > 2 else ""
    shown = "".join(f'<img src="{uri}" alt="{prompt}"{style}>' for uri in images)
    mark = {"better": '<i title="better">▲</i> ', "worse": '<i title="worse">▼</i> '}.get(way, "")
    marks = []
    for name in by:
        values = [one.get(name) for one in ((before, after) if before is not after else (after,))]
        if any(value is not None for value in values):
            numbers = " → ".join("–" if value is None else f"{value:.2f}".removesuffix(".00") for value in values)
            marks.append(f"<small>{name}<br>{numbers}</small>")
    return f'<div class="pair {way}">{shown}<p>{mark}{prompt}</p><div class="marks">{"".join(marks)}</div></div>'


def scores(changes: Mapping[str, Row], whose: Mapping[str, str]) -> str:
    """whose: of which stages each is, where it is not of all; said on top where it is the same for all of them."""
    if not changes:
        return ""
    common = whose[next(iter(changes))] if len({whose[name] for name in changes}) == 1 else ""
    rows = []
    for name, change in changes.items():
        label = escape(name.replace("/", " · ") + ("" if common else whose[name]))
        moved = "–" if change["change"] is None else difference(change)
        style = ' class="part"' if "/" in name else ""
        rows.append(
            f"<tr{style}><td>{label}</td><td>{score(change['before'], change['before_se'])}</td>"
            f"<td>{score(change['after'], change['after_se'])}</td>"
            f'<td class="{tone(direction(change))}">{moved}</td></tr>'
        )
    head = "<tr><th>held-out score</th><th>before</th><th>after</th><th>change</th></tr>"
    note = (
        "± is one standard error; that of a change takes the two sets of pictures as independent, which they are not: "
    )
    note += "it is rather too large. Colour marks changes of more than two."
    title = f"<h2>Held-out prompts{escape(common)}</h2>"
    return f'<section>{title}<table>{head}{"".join(rows)}</table><p class="note">{note}</p></section>'


def expectations(expected: Sequence[Row]) -> str:
    if not expected:
        return ""
    ways = {True: "up", False: "down", None: "same"}
    rows = "".join(
        f"<tr><td>{escape(one['stage'])}</td><td><code>{escape(one['metric'])} {escape(str(one['rule']))}</code></td>"
        f'<td class="{ways[one["met"]]}">{verdict(one["met"])}</td></tr>'
        for one in expected
    )
    head = "<tr><th>stage</th><th>rule</th><th>result</th></tr>"
    return f'<section><h2>What the recipe expects</h2><table class="words">{head}{rows}</table></section>'


def timing(seconds: Mapping[str, float], steps: int) -> str:
    total = seconds["total"]
    parts = {label: seconds[phase] for phase, label in PHASES.items()}
    parts["all else"] = max(0.0, total - sum(parts.values()))
    rows = []
    for label, spent in parts.items():
        share = spent / total if total else 0.0
        each = f"{spent / steps:.2f} s" if steps and label in ("sampling", "scoring", "training") else ""
        bar = f'<div class="bar"><div style="width:{share:.1%}"></div></div>'
        rows.append(
            f"<tr><td>{label}</td><td>{spent:,.1f} s</td><td>{share:.0%}</td><td>{each}</td><td>{bar}</td></tr>"
        )
    rows.append(f'<tr class="sum"><td>total</td><td>{total:,.1f} s</td><td></td><td></td><td></td></tr>')
    head = "<tr><th>phase</th><th>time</th><th>share</th><th>each step</th><th></th></tr>"
    return f"<section><h2>Time</h2><table>{head}{''.join(rows)}</table></section>"


def events(rows: Sequence[Row]) -> str:
    """Those with something to say; that a run began or finished stands at the top."""
    told = "".join(f"<li>step {row['at']:,}: {escape(row['text'])}</li>" for row in rows if row.get("text"))
    return f"<section><h2>Events</h2><ul>{told}</ul></section>" if told else ""


def reproduce(command: str, recipe: str, environment: Row) -> str:
    versions = " · ".join(f"{name} {version}" for name, version in (environment.get("versions") or {}).items())
    parts = [f"<h2>To reproduce</h2><pre>{escape(command)}</pre>" if command else "<h2>Recipe</h2>"]
    parts += [f'<p class="note">{escape(versions)}</p>'] if versions else []
    parts += [f'<pre class="long">{escape(recipe)}</pre>'] if recipe else []
    return f"<section>{''.join(parts)}</section>" if command or recipe else ""


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --muted: #6a7280; --rule: #e6e8ec; --card: #f6f7f9;
  --a: #2f6fdb; --b: #c2700c; --c: #0f8a62; --up: #0f7a4f; --down: #c0362c; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e4e7eb; --muted: #949ca8; --rule: #2b3038;
  --card: #1c2026; --a: #7aa8ff; --b: #f0a95b; --c: #4fcb9d; --up: #4fcb9d; --down: #ff8a7e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  "Helvetica Neue", "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1100px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 21px; line-height: 1.45; font-weight: 600; margin: 6px 0 8px; max-width: 60em; text-wrap: pretty; }
h2 { font-size: 16px; font-weight: 600; margin: 0 0 12px; }
section { margin-top: 44px; }
small, .note, .meta { color: var(--muted); font-size: 13px; }
.meta { margin: 0; } .meta b { color: var(--ink); } .note { margin: 6px 0 12px; }
.badge { font-size: 12px; padding: 1px 8px; border-radius: 9px; border: 1px solid; margin: 0 6px; }
.up { color: var(--up); } .down { color: var(--down); } .same { color: var(--muted); }
h1 + p { margin: 0; max-width: 70em; }
.cards { margin-top: 22px; display: flex; gap: 14px; flex-wrap: wrap; }
.card { background: var(--card); border-radius: 8px; padding: 12px 18px; flex: 1 1 200px; font-size: 13px;
  color: var(--muted); }
.card b { display: block; font-size: 28px; font-weight: 600; line-height: 1.3; color: var(--ink); }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 24px; }
.row.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
figcaption { font-size: 13px; margin-bottom: 2px; } figcaption b { margin-right: 10px; font-weight: 600; }
figcaption small { font-size: 12px; }
.key { margin-right: 12px; color: var(--muted); }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin: 0 5px 3px 0; border-radius: 2px;
  background: currentColor; }
.key.a::before { background: var(--a); } .key.b::before { background: var(--b); }
.key.c::before { background: var(--c); }
svg text { font-size: 11px; fill: var(--muted); }
svg .x { text-anchor: middle; } svg .y { text-anchor: end; }
.alarm { stroke: var(--down); stroke-dasharray: 4 3; stroke-width: 1.5; }
.rule { stroke: var(--rule); } .stage { fill: var(--card); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .band { opacity: .16; }
.line.a { stroke: var(--a); } .line.b { stroke: var(--b); } .line.c { stroke: var(--c); }
.band.a, .mark.a { fill: var(--a); } .band.b, .mark.b { fill: var(--b); } .band.c, .mark.c { fill: var(--c); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(236px, 1fr)); gap: 14px; }
.pair { background: var(--card); border-radius: 8px; padding: 10px; border-top: 3px solid var(--rule); }
.pair.better { border-color: var(--up); } .pair.worse { border-color: var(--down); }
.pair img { width: calc(50% - 3px); border-radius: 3px; display: inline-block; vertical-align: top; }
.pair img + img { margin-left: 6px; } .pixels img { image-rendering: pixelated; }
.pair p { margin: 6px 0 0; font-size: 13px; line-height: 1.35; } .pair small { font-size: 12px; }
.pair i { font-style: normal; } .better i { color: var(--up); } .worse i { color: var(--down); }
.marks { display: flex; gap: 14px; margin-top: 4px; line-height: 1.3; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { font-weight: 500; color: var(--muted); font-size: 13px; }
th, td { text-align: right; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child, .words th, .words td { text-align: left; } .words td { white-space: normal; }
.part td:first-child { padding-left: 16px; } .part td { color: var(--muted); } .part td.up { color: var(--up); }
.part td.down { color: var(--down); } .sum td { font-weight: 600; border: 0; }
td:last-child:has(.bar) { width: 40%; } .bar { background: var(--card); border-radius: 3px; height: 10px; }
.bar div { background: var(--a); border-radius: 3px; height: 10px; }
pre { background: var(--card); border-radius: 8px; padding: 14px 16px; overflow: auto; margin: 0 0 12px;
  font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre.long { max-height: 560px; }
code { font: 12.5px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
ul { margin: 0; padding-left: 18px; }
"""
