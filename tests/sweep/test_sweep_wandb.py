"""The same sweep file through W&B: what its agent starts, and what a run of a sweep sends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb_server import Wandb

from rlkit import recipe
from rlkit.sweep import command as sweep
from rlkit.sweep import file as sweep_file
from rlkit.sweep import trials as sweep_trials
from rlkit.sweep.space import text_of
from rlkit.sweep.trials import Board
from rlkit.tracking import Metrics

SHIPPED = Path(__file__).parents[2] / "docs" / "sweeps" / "quickstart.yaml"
LR, KINDS = "stages.main.learner.lr", "stages.main.data.kinds"


def started(file: Path, setting: dict) -> list[str]:
    """What wandb's agent would run for this setting, by the agent's own functions."""
    from wandb.sdk.launch.sweeps import utils

    node = yaml.safe_load(file.read_text())
    words = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in setting.items()}})
    given = {**words, "program": [node["program"]], "env": ["/usr/bin/env"], "interpreter": ["python"]}
    pieces = utils.create_sweep_command(list(node["command"]))
    return [word for one in pieces for word in (given[one[2:-1]] if one.startswith("${") else [one])]


def test_the_agent_and_the_local_sweep_train_the_same_recipes(tmp_path):
    own = sweep_file.read(SHIPPED)
    for trial in sweep.planned(own, (), 1)[::3]:
        program, *theirs = started(SHIPPED, dict(trial.setting))
        assert (program, theirs[:3]) == ("/usr/bin/env", ["rlkit", "train", "quickstart"])
        board = Board(tmp_path, {"words": []}, {})
        ours = sweep_trials.command(own, board, trial, threads=1)
        assert ours[:2] == theirs[1:3]
        mine, agents = (recipe.read(words[0], words[1:]).recipe for words in (ours[1:], theirs[2:]))
        assert mine["stages"] == agents["stages"]
        assert {**mine["run"], "dir": None, "threads": None} == agents["run"]
        assert mine["run"]["seed"] == trial.setting["run.seed"]


def test_values_of_every_kind_are_written_as_the_agent_writes_them():
    setting = {KINDS: ["single", "count"], LR: 1e-5, "run.deterministic": True, "stages.main.until": "null"}
    words = started(SHIPPED, setting)[-4:]
    assert text_of(setting) == words
    plain = recipe.read("quickstart", ["stages.main.learner.lr_end=0", *words]).recipe
    main = plain["stages"]["main"]
    assert (main["data"]["kinds"], main["learner"]["lr"], main["until"]) == (["single", "count"], 1e-5, None)
    assert plain["run"]["deterministic"] is True


def test_a_real_agent_trains_two_trials_and_their_numbers_arrive(tmp_path, small_backbone):
    """`wandb sweep`, and `wandb agent --count 2` that starts `rlkit train`, online against the stand-in."""
    small = [f"policy.backbone.path={small_backbone}", "stages.main.learner.batch=8", "stages.main.steps=2"]
    small += ["stages.main.data.per_step=2", "stages.main.data.group=2", "stages.main.evaluate.held_out=8"]
    small += ["stages.main.evaluate.ends=8", "stages.main.evaluate.every=1", "run.wandb=online"]
    node = yaml.safe_load(SHIPPED.read_text())
    node["command"] = [*node["command"][:4], *small, "${args_no_hyphens}"]
    node["parameters"] = {LR: {"values": [0.001, 0.01]}, "run.seed": {"value": 3}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(node))
    assert sweep_file.read(tmp_path / "mine.yaml").settings() == [{LR: lr, "run.seed": 3} for lr in (0.001, 0.01)]
    tools = Path(sys.executable).parent
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    with Wandb() as server:
        own = {
            name: str(tmp_path / name) for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC")
        }
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        environment = {**clean, **own, **server.environment(), "PATH": path}
        for words in (["sweep", "mine.yaml"], ["agent", "--count", "2", "somebody/rlkit/sw1"]):
            command = [str(tools / "wandb"), *words]
            ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
            assert ran.returncode == 0, ran.stdout + ran.stderr
    assert server.sweep["metric"] == {"name": "held_out/strict", "goal": "maximize"}
    assert list(server.given.values()) == [{LR: 0.001, "run.seed": 3}, {LR: 0.01, "run.seed": 3}]
    assert server.exits == {"run0": 0, "run1": 0}, ran.stdout + ran.stderr
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    for name, folder in zip(server.given, folders, strict=True):
        rows = [row["held_out/strict"] for row in Metrics.read(folder) if "held_out/strict" in row]
        sent = [row["held_out/strict"] for row in server.history[name] if "held_out/strict" in row]
        assert sent == pytest.approx(rows), "a slash in a name is W&B's own: it groups charts by what stands before"
        assert len(rows) == 3, "hyperband counts these as three iterations"
        assert server.summary[name]["held_out/strict"] == pytest.approx(rows[-1]), "what W&B ranks its runs by"
        config = server.configs[name]
        assert config["recipe"]["value"]["stages"]["main"]["learner"]["lr"] == server.given[name][LR]
        assert config[LR]["value"] == server.given[name][LR], "flat, beside the recipe: W&B's charts are over these"
