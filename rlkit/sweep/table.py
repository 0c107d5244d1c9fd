"""The table of a sweep: one row for each setting, its seeds together, the best first.

A trial's value is the last that it logged, never its best. A setting whose trials all finished comes before one that
lacks some: what is left of three seeds after two failed, or were never begun, is no mean of three.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rlkit.sweep.file import SEED, Sweep
from rlkit.sweep.space import text_of
from rlkit.sweep.trials import Board, Trial

Row = Mapping[str, Any]


def facts(sweep: Sweep, board: Board) -> dict[str, Any]:
    """Everything that the table says, as table.json has it."""
    groups: dict[str, list[Trial]] = {}
    for trial in board.trials.values():
        groups.setdefault(json.dumps(_without_seed(trial.setting), sort_keys=True, default=str), []).append(trial)
    rows = sorted((_row(sweep, board, trials) for trials in groups.values()), key=lambda row: _order(sweep, row))
    best = next((row for row in rows if row["mean"] is not None), None)
    show = [name for name in board.facts.get("show", ()) if name != sweep.metric.name]
    never = [name for name in show if best and all(row["more"].get(name, {}).get("mean") is None for row in rows)]
    return {
        "sweep": sweep.file,
        "recipe": sweep.recipe,
        "metric": sweep.metric.name,
        "goal": sweep.metric.goal,
        "show": show,
        "unlogged": [board.unlogged(next(iter(board.trials.values())), name) for name in never],
        "rows": rows,
        "best": None if best is None else {"setting": best["setting"], "command": _again(sweep, board, best)},
    }


def _without_seed(setting: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in setting.items() if key != SEED}


def _row(sweep: Sweep, board: Board, trials: Sequence[Trial]) -> dict[str, Any]:
    """Of the finished trials; of those that were stopped, where none finished."""
    told: list[dict[str, Any]] = []
    counted: list[float] = []
    more: dict[str, list[float]] = {}
    for one in trials:
        values = board.values(one, sweep.metric.name)
        value = values[-1] if values and one.state in ("finished", "stopped") else None
        seed = one.seed if one.seed is not None else one.setting.get(SEED)
        said = {"name": one.name, "seed": seed, "state": one.state, "why": one.why, "value": value}
        told.append({**said, "logged": len(values), "path": str(board.place(one))})
    for state in ("finished", "stopped"):
        counted = [one["value"] for one in told if one["state"] == state and one["value"] is not None]
        if counted:
            chosen = [one for one, said in zip(trials, told, strict=True) if said["state"] == state]
            more = {name: _last(board, chosen, name) for name in board.facts.get("show", ())}
            break
    mean = sum(counted) / len(counted) if counted else None
    begun = {one["seed"] for one in told}
    lacking = [seed for seed in board.facts.get("seeds") or sweep.seeds() if seed not in begun]
    return {
        "setting": _without_seed(trials[0].setting),
        "mean": mean,
        "std": _std(counted),
        "min": min(counted, default=None),
        "max": max(counted, default=None),
        "n": len(counted),
        "of": len(told) + len(lacking),  # trials, with those of the sweep's seeds that were never begun
        "more": {k: {"mean": sum(v) / len(v) if v else None, "std": _std(v), "n": len(v)} for k, v in more.items()},
        "complete": len(counted) == len(told) + len(lacking) and all(one["state"] == "finished" for one in told),
        "trials": told,
    }


def _last(board: Board, trials: Sequence[Trial], metric: str) -> list[float]:
    """What these trials logged of it last; those that never did are left out."""
    logged = [board.values(one, metric) for one in trials]
    return [values[-1] for values in logged if values]


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _order(sweep: Sweep, row: Row) -> tuple[Any, ...]:
    finished = any(one["state"] == "finished" and one["value"] is not None for one in row["trials"])
    rank = row["mean"] if row["mean"] is not None else math.inf
    return not row["complete"], not finished, row["mean"] is None, -rank if sweep.maximize else rank


def _again(sweep: Sweep, board: Board, row: Row) -> str:
    return shlex.join(["rlkit", "train", sweep.recipe, *sweep.words, *board.facts["words"], *text_of(row["setting"])])


def write(sweep: Sweep, board: Board) -> dict[str, Any]:
    told = facts(sweep, board)
    (board.folder / "table.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (board.folder / "table.md").write_text(markdown(told), encoding="utf-8")
    return told


def markdown(told: Mapping[str, Any]) -> str:
    rows = told["rows"]
    keys = [key for key in rows[0]["setting"] if len({str(row["setting"].get(key)) for row in rows}) > 1]
    seeds = any(row["of"] > 1 for row in rows)
    spread = ["min to max", "std", "n"] if seeds else []
    shown = told["show"]
    lines = [[*short(keys).values(), told["metric"], *spread, *shown, "state", "trials"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        ends = "" if row["n"] < 2 else f"{row['min']:.4g} to {row['max']:.4g}"
        count = f"{row['n']}" if row["complete"] else f"{row['n']} of {row['of']}"
        deviation = "" if row["std"] is None else f"{row['std']:.2g}"
        value = "" if row["mean"] is None else f"{row['mean']:.4g}"
        setting = [str(row["setting"].get(key)) for key in keys]
        names = ", ".join(one["name"] for one in row["trials"])
        beside = [_with_spread(row["more"].get(name)) for name in shown]
        lines.append([*setting, value, *([ends, deviation, count] if seeds else []), *beside, _states(row), names])
    text = "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in line)} |" for line in lines)
    return "\n".join([text, "", *_remarks(told)]) + "\n"


def _with_spread(value: Mapping[str, Any] | None) -> str:
    if value is None or value["mean"] is None:
        return ""
    return f"{value['mean']:.4g}" + ("" if value["std"] is None else f" ± {value['std']:.2g}")


def short(keys: Sequence[str]) -> dict[str, str]:
    """Each key by as much of its end as tells it from the others."""
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        found[key] = next((end for end in ends if sum(f".{one}".endswith(f".{end}") for one in keys) == 1), key)
    return found


def _states(row: Row) -> str:
    """Each state once, with how far those came that were stopped."""
    found = []
    for state in dict.fromkeys(one["state"] for one in row["trials"]):
        several = [one for one in row["trials"] if one["state"] == state]
        ends = ", ".join(str(one["logged"]) for one in several)
        found.append(f"stopped after {ends} values" if state == "stopped" else state)
    return ", ".join(found)


def _remarks(told: Mapping[str, Any]) -> list[str]:
    trials = [one for row in told["rows"] for one in row["trials"]]
    troubled = [one for one in trials if one["why"] and one["state"] != "stopped"]
    lines = [f"{one['name']} {one['state']}: {one['why']}" for one in troubled]
    lines += told["unlogged"]
    if told["best"] is not None:
        lines += ["The best setting again (chosen as the best of several it was partly lucky: take other seeds):"]
        lines += ["", f"    {told['best']['command']}"]
    return lines
