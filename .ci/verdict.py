"""How each run of a night went, and whether it showed what its recipe expects.   python .ci/verdict.py FOLDER NAME...

Of each NAME the folder has NAME.status, the exit code; NAME.log; and NAME.json, what `rlkit report --json` says. A run
that lacks them has failed. `vllm` is a run of tests, and only has to succeed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

WITHOUT_A_REPORT = ("vllm",)
LAST = 5  # lines of a failed run's log


def main(folder: Path, names: list[str]) -> int:
    told = [judged(folder, name) for name in names]
    for words, _ in told:
        print("\n".join(words))
    wrong = [name for name, (_, well) in zip(names, told, strict=True) if not well]
    print(f"{len(names)} runs: " + (f"NOT as expected: {', '.join(wrong)}" if wrong else "all as expected"))
    return 1 if wrong or not names else 0


def judged(folder: Path, name: str) -> tuple[list[str], bool]:
    """(what to print of a run, whether it went well)."""
    status = read(folder / f"{name}.status").strip()
    if status != "0":
        log = read(folder / f"{name}.log").splitlines()[-LAST:]
        return [f"{name}: FAILED, exit code {status or 'unknown'}", *(f"    {line}" for line in log)], False
    if name in WITHOUT_A_REPORT:
        return [f"{name}: passed"], True
    try:
        facts = json.loads(read(folder / f"{name}.json"))
    except ValueError:
        return [f"{name}: FAILED, its report cannot be read"], False
    rules = [rule for rule in facts["expect"] if rule["met"] is not True]
    words = [f"{name}: {headline(facts)}, {facts['seconds']['total']:.0f} s", *map(expectation, facts["expect"])]
    if not facts["finished"]:
        words.append("    NOT finished")
    if not facts["expect"]:
        words.append("    NOTHING is expected: give the recipe an `expect`")
    return words, facts["finished"] and bool(facts["expect"]) and not rules


def headline(facts: dict[str, Any]) -> str:
    """Of a curriculum, of each stage."""
    if len(facts["course"]) < 2:
        return scored(facts["headline"], facts["held_out"].get(facts["headline"]))
    return "; ".join(f"{one['name']} {scored(one['headline'], one['held_out'])}" for one in facts["course"])


def scored(name: str | None, change: dict[str, Any] | None) -> str:
    if name is None or change is None:
        return "nothing measured"
    after = "?" if change["after"] is None else f"{change['after']:.3f}"
    return f"{name} {change['before']:.3f} -> {after}"


def expectation(rule: dict[str, Any]) -> str:
    verdict = {True: "met", False: "NOT MET", None: "NOT MET: cannot be judged"}[rule["met"]]
    return f"    {rule['stage']}: {rule['metric']} {rule['rule']}: {verdict}"


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
