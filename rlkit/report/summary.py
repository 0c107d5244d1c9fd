"""A run told afterwards, from its folder alone: numbers for scripts, one sentence, and a page that needs no network.

`before` is the first evaluation, `after` the last one, never the best. All of it also works for a run that was killed:
it then says how far the run came. Nothing here judges by exit code; `expect` is reported.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rlkit.errors import RecipeError
from rlkit.report import charts, page
from rlkit.report import stages as report_stages
from rlkit.report.page import HEADLINES
from rlkit.report.run import Row, Run, of
from rlkit.tracking import HELD_OUT, Expectation, held_out

TRAINED_ON = ("per_step", "group", "kinds", "split")  # of a stage's data: what does not change its held-out prompts
NOTES = {"Held-out": "± one standard error", "Training reward": "± one standard deviation over samples"}

# ---- for scripts -----------------------------------------------------------------------------------------------------


def summary(folder: Path) -> dict[str, Any]:
    """The run in numbers, as `rlkit report DIR --json` prints them."""
    return _summary(Run.open(folder))


def _summary(run: Run) -> dict[str, Any]:
    command = str(run.environment.get("command", ""))
    comparable, expected = _comparable(run), _expectations(run)
    changes = {name: _changes(of(run.evaluations, name)) for name in run.stages}
    result = _changes(comparable, without={task for name in run.stages for task in run.also(name)})
    return {
        "recipe": _recipe_name(run, command),
        "command": command,
        "finished": run.finished,
        "steps": run.steps,
        "seconds": _seconds(run),
        "headline": page.headline(result),
        "held_out": result,
        "held_out_of": list(dict.fromkeys(row["stage"] for row in comparable)),
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


def _comparable(run: Run) -> list[Row]:
    """The evaluations on what the last stage is evaluated on: a stage of another task asks other questions."""
    known = run.recipe.get("stages") or {}

    def asked(stage: str) -> dict[str, Any]:
        data = (known.get(stage) or {}).get("data") or {}
        return {name: value for name, value in data.items() if name not in TRAINED_ON}

    return [row for row in run.evaluations if asked(row["stage"]) == asked(run.stages[-1])]


def _changes(evaluations: Sequence[Row], without: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Each held-out score at its first and at its last evaluation; `after` is None where there was only one.

    without: stages; how their tasks fare, NAME/STAGE, is left out.
    `change_se` takes the two sets of pictures as independent. They share prompts and seeds, so it is rather too large.
    """
    names = list(dict.fromkeys(name for row in evaluations for name in held_out(row)))
    names = [name for name in names if name.rpartition("/")[2] not in without or "/" not in name]
    names.sort(key=lambda name: HEADLINES.index(name) if name in HEADLINES else len(HEADLINES))
    found = {}
    for name in names:
        having = [row for row in evaluations if name in held_out(row)]
        first, last = having[0], having[-1] if len(having) > 1 else {}
        before, before_se = first[HELD_OUT + name], first.get(f"{HELD_OUT}{name}_se")
        after, after_se = last.get(HELD_OUT + name), last.get(f"{HELD_OUT}{name}_se")
        found[name] = {
            "before": before,
            "after": after,
            "before_se": before_se,
            "after_se": after_se,
            "change": None if after is None else after - before,
            "change_se": None if before_se is None or after_se is None else math.hypot(before_se, after_se),
            "count": (last or first).get("count"),
        }
    return found


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
    told = [_told(name, changes[name], images=name == names[0], whose=_whose(facts)) for name in names]
    words = [f"{stopped}{'held-out' if stopped else 'Held-out'} {told[0]} {effort}."]
    if len(told) > 1:
        words.append(f"Held-out {', '.join(told[1:])}.")
    ways = {name: page.direction(changes[name]) for name in names}
    if ways.get("reward", 0) > 0 > ways.get("strict", 0):
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


def _whose(facts: Row) -> str:
    """Of which stages the scores are, where it is not of all of them."""
    asked = facts["held_out_of"]
    return f" of {' and '.join(asked)}" if 0 < len(asked) < len(facts["course"]) else ""


def _told(name: str, change: Row, images: bool, whose: str) -> str:
    label = (name if name == "reward" else f"{name} reward") + (whose if images else "")
    count = f"{change['count']:,} images" if images and change["count"] else ""
    if change["after"] is None:
        return f"{label} was {change['before']:.3f}{f' ({count})' if count else ''} at its only evaluation"
    verb = {1: "rose", -1: "fell", 0: "did not move beyond the noise:"}[page.direction(change)]
    brackets = page.difference(change) + (f", {count}" if count else "")
    return f"{label} {verb} from {change['before']:.3f} to {change['after']:.3f} ({brackets})"


def write(folder: Path) -> Path:
    """report.html, and beside it before.png, after.png and curve.png for a README."""
    run = Run.open(folder)
    facts, spans, sheets = _summary(run), run.spans(), charts.sheets(folder)
    panels = [("Held-out", page.held_out_lines(run.evaluations)), ("Training reward", page.reward_lines(run.train))]
    charts.curve(folder / "curve.png", panels, spans)
    several = len(facts["course"]) > 1
    marks = [(row["at"], row["text"]) for row in facts["alarms"]]
    pair = charts.pair(sheets)
    for sheet, name in zip(pair, ("before.png", "after.png"), strict=False):
        charts.enlarge(sheet, folder / name)
    sections = [
        page.header(facts, _sentences(facts), run.environment, run.planned),
        page.cards({name: facts["held_out"][name] for name in HEADLINES if name in facts["held_out"]}, _whose(facts)),
        page.alarms(facts["alarms"]),
        report_stages.table(facts["course"]) if several else "",
        report_stages.matrix(facts["tasks"]),
        page.section(
            "Reward", *(charts.chart(title, lines, spans, NOTES[title], marks=marks) for title, lines in panels)
        ),
        page.pictures(pair),
        page.scores(facts["held_out"], _whose(facts)),
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
