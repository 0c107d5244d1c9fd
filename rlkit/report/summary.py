"""A run told afterwards, from its folder alone: numbers for scripts, one sentence, and a page that needs no network.

`before` is the first evaluation, `after` the last one, never the best. Where stages ask other questions or have other
rewards, the last one that measured a score speaks for the run, and each has a line of its own. All of it also works for
a run that was killed: it then says how far the run came. Nothing here judges by exit code; `expect` is reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlkit.errors import RecipeError
from rlkit.report import charts, page
from rlkit.report import stages as report_stages
from rlkit.report.page import HEADLINES
from rlkit.report.run import Row, Run, of
from rlkit.tracking import HELD_OUT, Expectation, held_out

NOTES = {"Held-out": "± one standard error", "Training reward": "± one standard deviation over samples"}

# ---- for scripts -----------------------------------------------------------------------------------------------------


def summary(folder: Path) -> dict[str, Any]:
    """The run in numbers, as `rlkit report DIR --json` prints them."""
    return _summary(Run.open(folder))


def _summary(run: Run) -> dict[str, Any]:
    command = str(run.environment.get("command", ""))
    expected = _expectations(run)
    changes = {name: _changes(of(run.evaluations, name)) for name in run.stages}
    result = _result(run)
    headline = page.headline(result)
    return {
        "recipe": _recipe_name(run, command),
        "command": command,
        "finished": run.finished,
        "steps": run.steps,
        "seconds": _seconds(run),
        "headline": headline,
        "held_out": result,
        "held_out_of": result[headline]["of"] if headline else [],
        "stages": {
            name: {metric: {"before": change["before"], "after": change["after"]} for metric, change in found.items()}
            for name, found in changes.items()
        },
        "course": report_stages.course(run, changes, expected),
        "tasks": report_stages.tasks(run),
        "expect": expected,
        "alarms": [_alarm(run, row) for row in run.alarms],
    }


def _alarm(run: Run, row: Row) -> dict[str, Any]:
    """What a monitor raised, and for one that rolled back the step whose weights it restored."""
    kept = ("stage", "step", "at", "monitor", "value", "threshold", "action", "text")
    back = [one for one in run.events if one["event"] == "rolled_back" and one["stage"] == row["stage"]]
    restored = back[-1].get("to") if back and row.get("action") == "roll_back" else None
    return {key: row.get(key) for key in kept} | {"restored": restored}


def _recipe_name(run: Run, command: str) -> str:
    words = command.split()
    named = words[words.index("train") + 1 :][:1] if "train" in words else []
    return Path(named[0]).stem if named and not named[0].startswith("-") else run.folder.name


def _result(run: Run) -> dict[str, dict[str, Any]]:
    """Each held-out score of the last stage, over all stages where it says the same; `of` names those.

    How the tasks of `evaluate.also` fare, NAME/STAGE, is left out.
    """
    last = run.evaluations[-1]["stage"] if run.evaluations else ""
    tasks = {task for name in run.stages for task in run.also(name)}
    found = {}
    for name in _names(run.evaluations):
        alike = {stage for stage in run.stages if run.alike(stage, last, name)}
        rows = [row for row in _measuring(run.evaluations, name) if row["stage"] in alike]
        if rows and ("/" not in name or name.rpartition("/")[2] not in tasks):
            found[name] = _change(rows, name) | {"of": list(dict.fromkeys(row["stage"] for row in rows))}
    return found


def _names(evaluations: Sequence[Row]) -> list[str]:
    """The held-out scores that were measured, the most telling first."""
    names = list(dict.fromkeys(name for row in evaluations for name in held_out(row)))
    return sorted(names, key=lambda name: HEADLINES.index(name) if name in HEADLINES else len(HEADLINES))


def _measuring(evaluations: Sequence[Row], name: str) -> list[Row]:
    return [row for row in evaluations if row.get(HELD_OUT + name) is not None]


def _changes(evaluations: Sequence[Row]) -> dict[str, dict[str, Any]]:
    return {name: _change(_measuring(evaluations, name), name) for name in _names(evaluations)}


def _change(rows: Sequence[Row], name: str) -> dict[str, Any]:
    """A held-out score at the first and at the last of these evaluations; `after` is None where there is only one.

    `change_se` takes the two sets of pictures as independent. They share prompts and seeds, so it is rather too large.
    `count` is of the smaller set: a run that was killed, or went on for longer, may have ended with another size.
    """
    first, last = rows[0], rows[-1] if len(rows) > 1 else {}
    before, before_se = first[HELD_OUT + name], first.get(f"{HELD_OUT}{name}_se")
    after, after_se = last.get(HELD_OUT + name), last.get(f"{HELD_OUT}{name}_se")
    counts = [row.get("count") for row in (first, last)]
    return {
        "before": before,
        "after": after,
        "before_se": before_se,
        "after_se": after_se,
        "change": None if after is None else after - before,
        "change_se": None if before_se is None or after_se is None else math.hypot(before_se, after_se),
        "count": min(filter(None, counts), default=None),
        "before_count": counts[0],
        "after_count": counts[1],
    }


def _seconds(run: Run) -> dict[str, float]:
    """Phases add up over the steps that count: those that a resume took back are not in the record."""

    def added(rows: Sequence[Row], phase: str) -> float:
        return sum(row.get(f"seconds/{phase}") or 0.0 for row in rows)

    seconds = {phase: added(run.train, phase) for phase in ("sample", "score", "train")}
    seconds |= {"evaluate": added(run.evaluations, "evaluate"), "start": added(run.events, "start")}
    said = [row["seconds/total"] for row in run.events if row.get("seconds/total")]
    return {"total": max(sum(seconds.values()), *said, 0.0), **seconds}


def _expectations(run: Run) -> list[dict[str, Any]]:
    found = []
    for name, stage in run.course.items():
        for metric, rule in (stage.get("expect") or {}).items():
            found.append({"stage": name, "metric": metric, "rule": rule, "met": _met(run, name, metric, str(rule))})
    return found


def _met(run: Run, stage: str, metric: str, rule: str) -> bool | None:
    """Whether the rule holds at the stage's end; None where that cannot be said."""
    values = [row[metric] for row in of(run.evaluations, stage) if row.get(metric) is not None]
    if len(values) < 2:  # not measured on held-out prompts: the first and the last tenth of training
        series = [row[metric] for row in of(run.train, stage) if row.get(metric) is not None]
        tenth = math.ceil(len(series) / 10)
        values = [_mean(series[:tenth]), _mean(series[-tenth:])] if len(series) > 1 else []
    if not run.ended(stage) or not values:
        return None
    try:
        return Expectation.parse(rule).met(values[0], values[-1])
    except RecipeError:
        return None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---- for people ------------------------------------------------------------------------------------------------------


def sentence(facts: Row) -> str:
    """What `summary` says, in words that stay true when nothing rose; then a line for each of several stages."""
    several = report_stages.lines(facts["course"], facts["tasks"]) if len(facts["course"]) > 1 else []
    return "\n".join([" ".join(_sentences(facts)), *several])


def _sentences(facts: Row) -> list[str]:
    """The result first."""
    changes = facts["held_out"]
    effort = f"in {page.duration(facts['seconds']['total'])} and {facts['steps']:,} steps"
    effort += f" of {len(facts['course'])} stages" if len(facts["course"]) > 1 else ""
    stopped = "" if facts["finished"] else "The run did not finish; so far: "
    names = [name for name in HEADLINES if name in changes] or list(changes)[:1]
    if not names:
        return [f"{stopped}{'nothing' if stopped else 'Nothing'} was evaluated on held-out prompts {effort}."]
    first = changes[names[0]]
    told = _told(names[0], first, _whose(facts, first), _images(first))
    words = [f"{stopped}{'held-out' if stopped else 'Held-out'} {told} {effort}."]
    others = []
    for name in names[1:]:
        elsewhere = changes[name]["of"] != first["of"]
        whose = (_whose(facts, changes[name]) or " of all stages") if elsewhere else ""
        others.append(_told(name, changes[name], whose, _images(changes[name]) if elsewhere else ""))
    if others:
        words.append(f"Held-out {', '.join(others)}.")
    ways = {name: page.direction(changes[name]) for name in names}
    alike = "strict" in changes and "reward" in changes and changes["strict"]["of"] == changes["reward"]["of"]
    if alike and ways["reward"] > 0 > ways["strict"]:
        words.append("Reward rose while strict fell: the policy may have learned to please the reward, not the prompt.")
    return words + _alarmed(facts["alarms"]) + _expected(facts["expect"])


def _alarmed(alarms: Sequence[Row]) -> list[str]:
    """The first alarm in full: the others often follow from it."""
    if not alarms:
        return []
    first = alarms[0]
    text = first["text"].removeprefix(f"alarm, {first['monitor']}: ")
    words = [f"Monitors raised {len(alarms)} alarm{'s'[: len(alarms) > 1]}, the first at step {first['at']:,}: {text}."]
    back = [one["restored"] for one in alarms if one["restored"] is not None]
    return [*words, f"The weights of step {back[-1]:,} were restored."] if back else words


def _expected(rules: Sequence[Row]) -> list[str]:
    if len(rules) == 1:
        return [f"The recipe expects {rules[0]['metric']} {rules[0]['rule']}: {page.verdict(rules[0]['met'])}."]
    met = [rule["met"] for rule in rules]
    unknown = f", {met.count(None)} cannot be judged" if None in met else ""
    return [f"Of {len(met)} rules that the recipe expects to hold, {met.count(True)} do{unknown}."] if met else []


def _whose(facts: Row, change: Row) -> str:
    """Of which stages a score is, where it is not of all of them."""
    return f" of {' and '.join(change['of'])}" if len(change["of"]) < len(facts["course"]) else ""


def _images(change: Row) -> str:
    """Of how many a change is: the fewer, where its two ends differ, and then of how many its other end."""
    if not change["count"]:
        return ""
    more = [(change[f"{end}_count"] or 0, end) for end in ("before", "after")]
    others = "".join(f", and {count:,} {end}" for count, end in more if count > change["count"])
    return f"{change['count']:,} images{others}"


def _told(name: str, change: Row, whose: str, images: str = "") -> str:
    label = (name if name == "reward" else f"{name} reward") + whose
    if change["after"] is None:
        return f"{label} was {change['before']:.3f}{f' ({images})' if images else ''} at its only evaluation"
    verb = {1: "rose", -1: "fell", 0: "did not move beyond the noise:"}[page.direction(change)]
    brackets = page.difference(change) + (f", {images}" if images else "")
    return f"{label} {verb} from {change['before']:.3f} to {change['after']:.3f} ({brackets})"


def write(folder: Path) -> Path:
    """report.html, and beside it before.png, after.png and curve.png for a README."""
    run = Run.open(folder)
    facts, spans = _summary(run), run.spans()
    panels = [("Held-out", page.held_out_lines(run.evaluations)), ("Training reward", page.reward_lines(run.train))]
    charts.curve(folder / "curve.png", panels, spans)
    several = len(facts["course"]) > 1
    marks = [(row["at"], row["text"]) for row in facts["alarms"]]
    asked = facts["held_out_of"] or run.stages  # none where nothing was scored; there may be pictures all the same
    pair = charts.pair([one for one in charts.sheets(folder, run.evaluations) if one.stage in asked])
    alike = [name for name in page.SCORES if pair and run.alike(pair[0].stage, pair[-1].stage, name)]
    whose = {name: _whose(facts, change) for name, change in facts["held_out"].items()}
    for sheet, name in zip(pair, ("before.png", "after.png"), strict=False):
        charts.enlarge(sheet, folder / name)
    sections = [
        page.header(facts, _sentences(facts), run.environment, run.planned),
        page.cards({name: facts["held_out"][name] for name in HEADLINES if name in facts["held_out"]}, whose),
        page.alarms(facts["alarms"]),
        report_stages.table(facts["course"]) if several else "",
        report_stages.matrix(facts["tasks"]),
        page.section(
            "Reward", *(charts.chart(title, lines, spans, NOTES[title], marks=marks) for title, lines in panels)
        ),
        page.pictures(pair, alike),
        page.scores(facts["held_out"], whose),
        "" if several else page.expectations(facts["expect"]),
        page.section("Training", *page.diagnostics(run.train, spans), style="small"),
        page.section("Monitors", *page.monitors([*run.train, *run.evaluations], spans, marks), style="small"),
        page.timing(facts["seconds"], facts["steps"]),
        page.events([row for row in run.events if row not in run.alarms]),
        page.reproduce(facts["command"], run.recipe_text, run.environment),
    ]
    path = folder / "report.html"
    path.write_text(page.document(f"{facts['recipe']} · rlkit", sections), encoding="utf-8")
    return path


__all__ = ["Run", "sentence", "summary", "write"]
