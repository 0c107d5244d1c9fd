"""The stages of a curriculum, side by side: what each learned, why it ended, and what it did to the others' tasks.

Facts for `rlkit report --json`, lines for the terminal, and two tables of report.html: the stages, and, where a recipe
has `evaluate.also`, how each task fares after each stage, which is what tells forgetting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rlkit.report import page
from rlkit.report.charts import number
from rlkit.report.run import Row, Run, of
from rlkit.tracking import HELD_OUT, held_out

ANCHORS = {"base": "", "stage_start": "anchored to its start", "ema": "anchored to its average"}

# ---- facts -----------------------------------------------------------------------------------------------------------


def course(run: Run, changes: Mapping[str, Mapping[str, Row]], expected: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry for each stage that was to run, in order. `ended` is None where one is still to end, or to begin.

    changes: of each stage's evaluations, by score. expected: the rules of all stages, judged.
    """
    entries = []
    for place, (name, told) in enumerate(run.course.items()):
        steps = max((int(row["step"]) for row in of(run.train, name)), default=0)
        ended, why = _ending(run, name, told, steps)
        own = changes.get(name, {})
        headline = page.headline(own)
        entries.append(
            {
                "name": name,
                "algorithm": (told.get("algorithm") or {}).get("name"),
                "rewards": list(told.get("rewards") or {}),
                "carry": None if place == 0 else told.get("carry"),
                "anchor": told.get("anchor"),
                "steps": steps,
                "planned": int(told.get("steps") or 0),
                "began": name in run.stages or ended is not None,
                "ended": ended,
                "why": why,
                "headline": headline,
                "held_out": own[headline] if headline else None,
                "expect": [rule for rule in expected if rule["stage"] == name],
                "seconds": _seconds([*of(run.train, name), *of(run.evaluations, name)]),
            }
        )
    return entries


def _ending(run: Run, name: str, told: Row, steps: int) -> tuple[str | None, str]:
    """(steps, until, time, alarm, early or None, in words). Early is what the recipe as it stands does not explain."""
    halted = [row for row in of(run.alarms, name) if row.get("action") in ("stop", "roll_back")]
    if halted and halted[-1]["step"] == steps:  # before it went on, if somebody let it
        did = "rolled back" if halted[-1]["action"] == "roll_back" else "run ended"
        return "alarm", f"alarm of {halted[-1]['monitor']}, {did}"
    if not run.ended(name):
        return None, "not ended" if name in run.stages else "never began"
    until = told.get("until") or {}
    metric, above = str(until.get("metric", "")), until.get("above")
    values = [row.get(metric) for row in of(run.evaluations, name)]
    if above is not None and values and values[-1] is not None and values[-1] > above:
        return "until", f"{metric} above {number(above)}"
    if steps >= int(told.get("steps") or 0):
        return "steps", "all steps"
    if until and above is None:
        return "until", f"{metric} rose no more"
    if above is not None and not metric.startswith(HELD_OUT):
        return "time", f"{metric} above {number(above)}"
    return "early", "ended early"


def _seconds(rows: Sequence[Row]) -> float:
    """Of its steps and evaluations, without checkpoints."""
    return float(sum(row[key] or 0.0 for row in rows for key in row if key.startswith("seconds/")))


def tasks(run: Run) -> dict[str, Any] | None:
    """How each task fares before the first stage and after each that has ended; None where no stage asks for others'.

    A cell has the score, its standard error, and both of its change since the row above that has the task.
    """
    asked = dict.fromkeys(task for name in run.course for task in run.also(name))
    scores = {task: _headline_of(run, task) for task in dict.fromkeys([*run.stages, *asked])}
    if not asked or not run.stages:
        return None
    points: list[tuple[str | None, str, list[Row]]] = [(None, run.stages[0], of(run.evaluations, run.stages[0])[:1])]
    points += [(name, name, of(run.evaluations, name)[-1:]) for name in run.stages if run.ended(name)]
    latest: dict[str, dict[str, float | None]] = {}
    rows = []
    for after, stage, evaluation in points:
        cells = {}
        for task, score in scores.items():
            column = f"{HELD_OUT}{score}" if task == stage else f"{HELD_OUT}{score}/{task}"
            value, error = (evaluation[0].get(column + end) if evaluation else None for end in ("", "_se"))
            if value is not None and task in (stage, *run.also(stage)):
                cells[task] = latest[task] = _since(latest.get(task), value, error)
        rows.append({"after": after, "scores": cells})
    return {"score": scores, "rows": rows}


def _since(before: Mapping[str, float | None] | None, value: Any, error: float | None) -> dict[str, float | None]:
    old = None if before is None else before["value"]
    old_error = None if before is None else before["se"]
    return {
        "value": value,
        "se": error,
        "change": None if old is None else value - old,
        "change_se": None if old_error is None or error is None else math.hypot(old_error, error),
    }


def _headline_of(run: Run, task: str) -> str | None:
    """The score that stands for a task, whichever stage has measured it."""
    own = [name for row in of(run.evaluations, task) for name in held_out(row) if "/" not in name]
    others = [name for row in run.evaluations for name in held_out(row) if task in run.also(row["stage"])]
    return page.headline([*own, *(name.removesuffix(f"/{task}") for name in others if name.endswith(f"/{task}"))])


# ---- for the terminal ------------------------------------------------------------------------------------------------


def lines(entries: Sequence[Row], fared: Row | None) -> list[str]:
    """One for each stage, and one of how all tasks stand at the end."""
    width = max(len(one["name"]) for one in entries)
    told = [f"  {one['name']:<{width}}  {'; '.join(_words(one))}" for one in entries]
    if fared is None or not fared["rows"][-1]["scores"]:
        return told
    cells = {task: f"{cell['value']:.3f}" for task, cell in fared["rows"][-1]["scores"].items()}
    after = fared["rows"][-1]["after"]
    first = "before the first stage" if after is None else f"after {after}"
    return [*told, f"  {first}: {', '.join(f'{task} {cell}' for task, cell in cells.items())}"]


def _words(entry: Row) -> list[str]:
    if not entry["began"]:
        return [entry["why"]]
    why = "" if entry["ended"] == "steps" else f", {entry['why']}"
    words = [f"{_steps(entry)} steps{why}"]
    if entry["held_out"] is not None:
        words.append(f"{entry['headline']} {_moved(entry['held_out'])}")
    words += [f"expected {one['metric']} {one['rule']}: {page.verdict(one['met'])}" for one in entry["expect"]]
    return [*words, page.duration(entry["seconds"])]


def _steps(entry: Row) -> str:
    """Made, and planned as far as the recipe is still there to say it."""
    return f"{entry['steps']:,}" + (f" of {entry['planned']:,}" if entry["planned"] else "")


def _moved(change: Row) -> str:
    if change["after"] is None:
        return f"{change['before']:.3f}"
    return f"{change['before']:.3f} to {change['after']:.3f} ({page.difference(change)})"


# ---- for the page ----------------------------------------------------------------------------------------------------


def table(entries: Sequence[Row]) -> str:
    names = ("stage", "learned by", "steps", "held out", "change", "expected", "took over", "time")
    rows = [f"<tr>{''.join(_cells(one))}</tr>" for one in entries]
    return f'<section><h2>Stages</h2><table class="words"><tr>{_head(names)}</tr>{"".join(rows)}</table></section>'


def _head(names: Sequence[str]) -> str:
    return "".join(f"<th>{escape(name)}</th>" for name in names)


def _cells(entry: Row) -> list[str]:
    """The cells of one stage; of one that never began, what the recipe says of it."""
    steps = _steps(entry) if entry["began"] else ""
    scored, moved, way = "", "", "same"
    if entry["held_out"] is not None:
        change = entry["held_out"]
        scored = f"{change['before']:.3f}" + ("" if change["after"] is None else f" → {change['after']:.3f}")
        if change["change"] is not None:
            moved, way = page.difference(change), page.tone(page.direction(change))
    return [
        _cell(entry["name"]),
        _cell(entry["algorithm"] or "", ", ".join(entry["rewards"])),
        _cell(steps, entry["why"]),
        _cell(scored, entry["headline"] or ""),
        _cell(moved, way=way),
        f"<td>{'<br>'.join(_judged(one) for one in entry['expect'])}</td>",
        _cell(_carried(entry), ANCHORS.get(str(entry["anchor"]), "")),
        _cell(page.duration(entry["seconds"]) if entry["began"] else ""),
    ]


def _cell(text: str, note: str = "", way: str = "") -> str:
    small = "<br>" * bool(text and note) + f"<small>{escape(note)}</small>" * bool(note)
    return f'<td class="{way}">{escape(text)}{small}</td>'


def _judged(rule: Row) -> str:
    way = {True: "up", False: "down", None: "same"}[rule["met"]]
    asked = escape(f"{rule['metric']} {rule['rule']}")
    return f'<code>{asked}</code> <span class="{way}">{page.verdict(rule["met"])}</span>'


def _carried(entry: Row) -> str:
    """What a stage takes over from the one before; the first has the backbone's weights."""
    if entry["carry"] is None:
        return ""
    weights = "averaged weights" if entry["carry"].get("weights") == "ema" else "last weights"
    return weights + (", optimiser's moments" if entry["carry"].get("optimizer") else "")


def matrix(fared: Row | None) -> str:
    """A row before the first stage and one after each: the score on every task. Nothing where it was not measured."""
    if fared is None:
        return ""
    head = _head(["after stage", *(f"{task} ({score or 'not measured'})" for task, score in fared["score"].items())])
    rows = []
    for row in fared["rows"]:
        cells = [_fared(row["scores"].get(task), task == row["after"]) for task in fared["score"]]
        rows.append(f"<tr><td>{escape(row['after'] or '(before the first)')}</td>{''.join(cells)}</tr>")
    note = "Bold: the stage's own task. Colour marks a change of more than two standard errors since the row above."
    table = f"<table><tr>{head}</tr>{''.join(rows)}</table>"
    return f'<section><h2>Each task after each stage</h2>{table}<p class="note">{note}</p></section>'


def _fared(cell: Row | None, own: bool) -> str:
    if cell is None:
        return "<td>–</td>"
    shown = page.score(cell["value"], cell["se"])
    way = page.tone(page.direction(cell)) if page.direction(cell) else ""
    return f'<td class="{way}">{f"<b>{shown}</b>" if own else shown}</td>'


__all__ = ["course", "lines", "matrix", "table", "tasks"]
