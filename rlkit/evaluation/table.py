"""What the records of an evaluation say, alone or beside those of another: tables with intervals, as json and markdown.

Two evaluations are compared in pairs, the same prompt and seed of both: what makes a prompt easy or hard for both takes
no part in a difference, so that its interval is narrower than that of two means apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlkit.errors import DataError
from rlkit.evaluation.evaluate import Record, Records
from rlkit.evaluation.suites import Estimate, summed

ALIKE = ("suite", "prompts", "reward", "counts", "overall")  # what two evaluations must share


def summary(folder: Path) -> dict[str, Any]:
    """Of a folder's records, by sampler; written there too, as summary.json and summary.md."""
    records = Records.open(folder)
    if not records.found:
        raise DataError("there are no records in this folder", where=str(folder), hint="Run the evaluation first.")
    counts = records.identity["counts"]
    samplers = {}
    for sampler in _samplers(records):
        rows = [one for one in records.found.values() if one.sampler == sampler]
        names = dict.fromkeys(name for one in rows for name in one.scores)
        samplers[sampler] = _described(rows, records, lambda one: one.scores.get(counts)) | {
            "seeds": sorted({one.seed for one in rows}),
            "columns": {name: _overall(rows, records, name) for name in names if name != counts},
        }
    facts = {key: records.identity[key] for key in ("suite", "counts", "overall", "count", "checkpoint", "weights")}
    told = facts | {"samplers": samplers}
    (folder / "summary.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (folder / "summary.md").write_text(table(told) + "\n", encoding="utf-8")
    return told


def compare(before: Path, after: Path) -> dict[str, Any]:
    """Differences after - before over the prompts and seeds that both have, by sampler."""
    one, other = Records.open(before), Records.open(after)
    differ = [key for key in ALIKE if one.identity[key] != other.identity[key]]
    if differ:
        what = f"the evaluations differ in {', '.join(differ)}, so their numbers do not compare"
        raise DataError(what, where=f"{before} and {after}", hint="Run one suite with one reward on both.")
    counts = one.identity["counts"]
    samplers = {}
    for sampler in _samplers(one):
        rows = [row for place, row in one.found.items() if row.sampler == sampler and place in other.found]
        if rows:
            described = _described(rows, one, lambda row: _difference(row, other.found[row.place], counts))
            samplers[sampler] = described | {"seeds": sorted({row.seed for row in rows})}
    if not samplers:
        what = "no prompt, seed and sampler is in both evaluations"
        raise DataError(what, where=f"{before} and {after}", hint="Run both with the same --seeds and --samplers.")
    facts = {key: one.identity[key] for key in ("suite", "counts", "overall")}
    return facts | {"before": str(before), "after": str(after), "samplers": samplers}


def _difference(before: Record, after: Record, counts: str) -> float | None:
    then, now = before.scores.get(counts), after.scores.get(counts)
    return None if then is None or now is None else now - then


def _samplers(records: Records) -> list[str]:
    return sorted({one.sampler for one in records.found.values()})


def _described(
    rows: Sequence[Record], records: Records, value: Callable[[Record], float | None]
) -> dict[str, dict[str, Any]]:
    """What each category's rows, and all of them, come to."""
    numbers: dict[str, dict[str, list[float]]] = {}
    count: dict[str, list[bool]] = {}  # category -> of each picture, whether it has a number
    for one in rows:
        prompts = numbers.setdefault(one.category, {}).setdefault(one.key, [])
        found = value(one)
        prompts += [] if found is None else [found]
        count.setdefault(one.category, []).append(found is not None)
    result = summed(numbers, records.identity["overall"])
    everything = [there for one in count.values() for there in one]
    return {
        "overall": _with_counts(result.overall, everything),
        "categories": {name: _with_counts(one, count[name]) for name, one in result.categories.items()},
    }


def _with_counts(estimate: Estimate, there: Sequence[bool]) -> dict[str, Any]:
    return asdict(estimate) | {"pictures": len(there), "unscored": 1 - sum(there) / len(there)}


def _overall(rows: Sequence[Record], records: Records, name: str) -> dict[str, Any]:
    return _described(rows, records, lambda one: one.scores.get(name))["overall"]


# ---- as text ---------------------------------------------------------------------------------------------------------


def table(told: Mapping[str, Any]) -> str:
    """A summary, or a comparison, as markdown."""
    word = "difference" if "before" in told else "mean"
    lines = [f"{told['suite']}: {told['counts']}, overall the mean of the {told['overall']}", ""]
    if "before" in told:
        lines[:1] = [f"{lines[0]}; {told['after']} - {told['before']}, in pairs"]
    lines += [
        f"| sampler | category | {word} | 95 % interval | prompts | pictures | unscored |",
        "|---|---|---|---|---|---|---|",
    ]
    for sampler, one in told["samplers"].items():
        lines += [_line(sampler, name, found, word) for name, found in one["categories"].items()]
        lines.append(_line(sampler, "**overall**", one["overall"], word))
        lines += [_line(sampler, f"overall, {name}", found, word) for name, found in one.get("columns", {}).items()]
    return "\n".join(lines)


def _line(sampler: str, name: str, one: Mapping[str, Any], word: str) -> str:
    sign = "+" if word == "difference" else ""
    mean = "-" if one["mean"] is None else f"{one['mean']:{sign}.3f}"
    interval = "-" if one["low"] is None else f"{one['low']:{sign}.3f} to {one['high']:{sign}.3f}"
    return (
        f"| {sampler} | {name} | {mean} | {interval} | {one['prompts']} | {one['pictures']} | {one['unscored']:.1%} |"
    )
