"""A package that is installed beside rlkit adds entries, and a run uses them by name."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from rlkit import cli, recipe
from rlkit.errors import RecipeError
from rlkit.tracking import Metrics

MODULE = '''
from dataclasses import dataclass

from rlkit.algorithms.flow_grpo import FlowGRPO


@dataclass(frozen=True)
class Brightness:
    """How bright a picture is."""

    gain: float = 1.0

    def __call__(self, samples):
        values = samples.media.mean((1, 2, 3)) * self.gain
        return values, {"red": samples.media[:, 0].mean((1, 2))}


@dataclass(frozen=True)
class Calm(FlowGRPO):
    """Flow-GRPO with a noise level of its own."""

    noise_level: float = 0.3
'''


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path with a distribution as an installer leaves it."""
    folder = tmp_path / "site"
    info = folder / "acme_rewards-0.3.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-rewards\nVersion: 0.3.0\n")
    points = {"rewards": "acme_brightness = acme:Brightness", "algorithms": "acme_calm = acme:Calm"}
    text = "\n".join(f"[rlkit.{group}]\n{line}\n" for group, line in points.items())
    (info / "entry_points.txt").write_text(text)
    (folder / "acme.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("acme", None)


def test_a_run_uses_a_reward_and_an_algorithm_of_another_package(site, small_backbone, tmp_path):
    folder = tmp_path / "run"
    words = [
        *("train", "quickstart", "--quiet", f"policy.backbone.path={small_backbone}", f"run.dir={folder}"),
        *("run.threads=1", "run.wandb=disabled", "run.device=cpu", "stages.main.steps=1"),
        *("stages.main.data.per_step=2", "stages.main.data.group=4", "stages.main.learner.batch=12"),
        *("stages.main.evaluate.held_out=16", "stages.main.rollout.steps=8"),
        *("stages.main.rewards.composition=null", "stages.main.rewards.acme_brightness={weight: 2.0, gain: 3.0}"),
        *("stages.main.algorithm={name: acme_calm, window: 3, clip: 2.0e-3}", "stages.main.expect=null"),
    ]
    assert cli.main(words) == 0
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())["stages"]["main"]
    assert recipe["rewards"] == {"acme_brightness": {"weight": 2.0, "gain": 3.0}}
    assert (recipe["algorithm"]["name"], recipe["algorithm"]["noise_level"]) == ("acme_calm", 0.3)
    (row,) = [row for row in Metrics.read(folder) if row["kind"] == "train"]
    assert row["reward/mean"] == pytest.approx(2 * row["acme_brightness/mean"])
    assert 0 < row["acme_brightness/red"] <= 1
    assert row["unscored"] == 0


def test_an_option_of_a_reward_that_recipes_keep_for_themselves_is_refused(site):
    (site / "acme.py").write_text(MODULE.replace("gain", "clip"))
    with pytest.raises(RecipeError, match="acme_brightness has an option 'clip', a word by which every recipe means"):
        recipe.read("quickstart", ["stages.main.rewards={acme_brightness: 1.0}"])


def test_they_are_listed_with_where_they_come_from(site):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "rlkit.cli", "list", "rewards", "--json"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    sources = {entry["name"]: entry["source"] for entry in json.loads(listed.stdout)}
    assert sources["acme_brightness"] == "acme-rewards 0.3.0"
    assert sources["composition"] == "built in"
