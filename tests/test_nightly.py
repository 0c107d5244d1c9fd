"""The night's runs and what is said of them, with an `rlkit` that only writes down how it was called."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
RECIPES = sorted(file.stem for file in (ROOT / "recipes").glob("world_*.yaml"))
RLKIT = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
case "$1 $2" in
    "train world_dpo") echo "boom: no such thing" >&2; exit 3 ;;
    report*) cat "$FACTS" ;;
esac
"""


def facts(met: bool | None = True, finished: bool = True, **more: Any) -> dict[str, Any]:
    """Of a run that has no strict, as an agent's or a captioner's may not."""
    rules = [{"stage": "main", "metric": "held_out/reward", "rule": "> before", "met": met}]
    held_out = {"reward": {"before": 0.25, "after": 0.5}}
    known = {"finished": finished, "headline": "reward", "held_out": held_out, "seconds": {"total": 90.4}}
    return known | {"course": [{"name": "main"}], "expect": rules} | more


def verdict(folder: Path, *names: str) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / ".ci" / "verdict.py"), str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout


def leave(folder: Path, name: str, told: dict[str, Any] | None, status: str = "0", log: str = "") -> None:
    (folder / f"{name}.status").write_text(status + "\n")
    (folder / f"{name}.log").write_text(log)
    (folder / f"{name}.json").write_text("" if told is None else json.dumps(told))


# ---- what is said of the runs


def test_a_night_that_went_well_says_each_headline_and_rule(tmp_path: Path) -> None:
    leave(tmp_path, "world_a", facts())
    leave(tmp_path, "vllm", None)
    code, said = verdict(tmp_path, "world_a", "vllm")
    assert said.splitlines() == [
        "world_a: reward 0.250 -> 0.500, 90 s",
        "    main: held_out/reward > before: met",
        "vllm: passed",
        "2 runs: all as expected",
    ]
    assert code == 0


def test_each_stage_of_a_curriculum_has_its_headline(tmp_path: Path) -> None:
    course = [
        {"name": "easy", "headline": "strict", "held_out": {"before": 0.1, "after": 0.2}},
        {"name": "hard", "headline": "reward", "held_out": {"before": 0.3, "after": None}},
        {"name": "last", "headline": None, "held_out": None},
    ]
    leave(tmp_path, "world_a", facts(course=course))
    first = "world_a: easy strict 0.100 -> 0.200; hard reward 0.300 -> ?; last nothing measured, 90 s"
    assert verdict(tmp_path, "world_a")[1].splitlines()[0] == first


@pytest.mark.parametrize(
    ("told", "status", "words"),
    [
        (facts(met=False), "0", "held_out/reward > before: NOT MET\n"),
        (facts(met=None), "0", "held_out/reward > before: NOT MET: cannot be judged\n"),
        (facts(finished=False), "0", "    NOT finished\n"),
        (facts(expect=[]), "0", "    NOTHING is expected"),
        (facts(), "3", "bad: FAILED, exit code 3\n    the last\n    words\n"),
        (None, "0", "bad: FAILED, its report cannot be read\n"),
    ],
)
def test_one_bad_run_among_good_ones_is_named(
    tmp_path: Path, told: dict[str, Any] | None, status: str, words: str
) -> None:
    leave(tmp_path, "good", facts())
    leave(tmp_path, "bad", told, status, "the last\nwords\n")
    leave(tmp_path, "better", facts())
    code, said = verdict(tmp_path, "good", "bad", "better")
    assert code == 1
    assert words in said
    assert said.count("held_out/reward > before: met\n") >= 2, "the others are told too"
    assert said.splitlines()[-1] == "3 runs: NOT as expected: bad"


def test_a_run_that_left_nothing_has_failed(tmp_path: Path) -> None:
    code, said = verdict(tmp_path, "world_a")
    assert (code, said.splitlines()[0]) == (1, "world_a: FAILED, exit code unknown")


# ---- what runs


def night(tmp_path: Path, *arguments: str, told: dict[str, Any] | None = None, **settings: str) -> tuple[int, str, str]:
    """(its exit code, what it printed, how it called rlkit)."""
    tools = tmp_path / "tools"
    if not tools.exists():
        tools.mkdir()
        (tools / "rlkit").write_text(RLKIT)
        (tools / "rlkit").chmod(0o755)
        (tools / "python").symlink_to(sys.executable)
    (tmp_path / "facts.json").write_text(json.dumps(told or facts()))
    here = {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": f"{tmp_path}/calls", "FACTS": f"{tmp_path}/facts.json"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NIGHTLY_")}
    environment = kept | here | {"NIGHTLY_DIR": str(tmp_path / "out")} | settings
    command = [str(ROOT / ".ci" / "nightly"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    calls = tmp_path / "calls"
    return done.returncode, done.stdout + done.stderr, calls.read_text() if calls.exists() else ""


def test_every_recipe_of_the_world_runs_and_the_quickstart_three_times(tmp_path: Path) -> None:
    assert len(RECIPES) > 10
    code, said, calls = night(tmp_path, "--list")
    assert said.split() == ["quickstart-0", "quickstart-1", "quickstart-2", *RECIPES, "vllm"]
    assert (code, calls) == (0, "")


def test_one_failing_recipe_does_not_hide_the_others(tmp_path: Path) -> None:
    code, said, calls = night(tmp_path, NIGHTLY_ONLY="world_dpo quickstart world_nft")
    out = tmp_path / "out"
    trained = [line for line in calls.splitlines() if line.startswith("train")]
    seeds = [f"train quickstart run.seed={seed} run.dir={out}/quickstart-{seed}" for seed in (0, 1, 2)]
    assert trained == [f"train world_dpo run.dir={out}/world_dpo", *seeds, f"train world_nft run.dir={out}/world_nft"]
    assert "world_dpo: FAILED, exit code 3\n    boom: no such thing\n" in said
    assert said.count("reward 0.250 -> 0.500") == 4
    assert said.endswith("5 runs: NOT as expected: world_dpo\n")
    assert code == 1


def test_side_by_side_each_run_has_one_thread(tmp_path: Path) -> None:
    code, said, calls = night(tmp_path, NIGHTLY_ONLY="world_nft world_edit", NIGHTLY_JOBS="2")
    trained = sorted(line for line in calls.splitlines() if line.startswith("train"))
    assert [line.split()[1:3] for line in trained] == [["world_edit", "run.threads=1"], ["world_nft", "run.threads=1"]]
    assert said.endswith("2 runs: all as expected\n")
    assert code == 0


def test_an_expectation_that_is_not_met_is_the_exit_code(tmp_path: Path) -> None:
    assert night(tmp_path, told=facts(met=False), NIGHTLY_ONLY="world_nft")[0] == 1


def test_what_an_earlier_night_left_is_not_taken_for_this_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    leave(tmp_path / "out", "world_dpo", facts())
    assert night(tmp_path, NIGHTLY_ONLY="world_dpo")[0] == 1


def test_a_name_that_no_run_has_is_refused(tmp_path: Path) -> None:
    code, said, calls = night(tmp_path, NIGHTLY_ONLY="world_nft world_ntf")
    assert (code, calls) == (2, "")
    assert "there is no world_ntf among: quickstart-0" in said


def expected(name: str) -> dict[str, Any]:
    """What each stage of a recipe expects, its own or that of what it extends: as Hydra has it, without the wait."""
    told = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    rules: dict[str, Any] = {}
    for parent in told.get("defaults", []):
        rules |= {} if parent == "_self_" else expected(parent)
    own = told.get("stages") or {}
    rules |= {stage: one.get("expect", rules.get(stage)) for stage, one in own.items() if one is not None}
    order = (told.get("run") or {}).get("order") or rules
    return {stage: rules[stage] for stage in order if own.get(stage, {}) is not None}


@pytest.mark.parametrize("name", ["quickstart", *RECIPES])
def test_each_recipe_says_what_a_healthy_run_shows_at_its_end(name: str) -> None:
    last = list(expected(name).values())[-1]
    assert last, f"recipes/{name}.yaml: its last stage has no `expect`, so its night cannot be judged"
