"""Ctrl+C and worse, through the command line: what was trained is kept, and a resume ends as if nothing had been."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from rlkit import checkpoint, cli
from rlkit.tracking import Metrics

STEPS = 60  # a few seconds, so that a signal after the second step comes in time


@pytest.fixture(scope="module")
def words(small_backbone):
    """A small run on the command line, without its folder."""
    return [
        *("train", "quickstart", f"policy.backbone.path={small_backbone}", f"stages.main.steps={STEPS}"),
        *("stages.main.data.per_step=2", "stages.main.data.group=4", "stages.main.learner.batch=12"),
        *("stages.main.rollout.steps=8", "stages.main.algorithm.window=3", "stages.main.algorithm.window_start=[0,4]"),
        *("stages.main.evaluate.every=25", "stages.main.evaluate.held_out=16", "stages.main.learner.ema=0.9"),
        *("run.checkpoint_every=3", "run.threads=1", "run.wandb=disabled", "run.device=cpu"),
    ]


@pytest.fixture(scope="module")
def unbroken(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert cli.main([*words, "--quiet", f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture
def start(words, tmp_path):
    """start(...) begins the run in a process of its own and returns that once two steps are done."""
    begun = []

    def begin(*more):
        command = [sys.executable, "-m", "rlkit.cli", *words, f"run.dir={tmp_path / 'run'}", *more]
        process = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun.append(process)
        metrics = tmp_path / "run" / "metrics.jsonl"
        ends = time.monotonic() + 180
        while not metrics.exists() or metrics.read_text().count('"kind": "train"') < 2:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < ends, "no second step after three minutes"
            time.sleep(0.02)
        return process

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def measured(folder):
    rows = [row for row in Metrics.read(folder) if row["kind"] != "event"]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def same_end(one, other):
    weights = [load_file(folder / "weights" / "diffusion_pytorch_model.safetensors") for folder in (one, other)]
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    saved = [checkpoint.newest(folder).tensors for folder in (one, other)]
    assert saved[0].keys() == saved[1].keys()
    assert [name for name in saved[0] if not torch.equal(saved[0][name], saved[1][name])] == []


def test_ctrl_c_saves_and_says_how_to_go_on(start, unbroken, tmp_path):
    process, folder = start(), tmp_path / "run"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopping after this step" in out
    assert f"Go on with: rlkit train --resume {folder}" in err
    assert "Traceback" not in err
    done = checkpoint.newest(folder).at
    assert 2 <= done < STEPS
    assert [row["at"] for row in measured(folder) if row["kind"] == "train"] == list(range(1, done + 1))
    assert (folder / "report.html").stat().st_size > 0
    assert not (folder / "weights").exists()

    assert cli.main(["train", "--quiet", "--resume", str(folder)]) == 0
    assert measured(folder) == measured(unbroken)
    same_end(folder, unbroken)


def test_a_killed_run_is_resumed_to_the_same_end(start, unbroken, tmp_path):
    process, folder = start(), tmp_path / "run"
    time.sleep(random.uniform(0, 0.5))  # any point must do: in a step, in a checkpoint, between two
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    # What a kill at the worst points leaves besides: half a row of metrics and half a checkpoint.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "stage": "ma')
    draft = folder / "checkpoints" / ".000033-4242"
    draft.mkdir(parents=True)
    (draft / "tensors.safetensors").write_bytes(b"half of it")

    assert cli.main(["train", "--quiet", "--resume", str(folder)]) == 0
    assert measured(folder) == measured(unbroken)
    same_end(folder, unbroken)
    assert not draft.exists()


@pytest.mark.distributed
def test_ctrl_c_reaches_every_process(start, tmp_path):
    process, folder = start("--nproc", "2"), tmp_path / "run"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"Go on with: rlkit train --resume {folder}" in err
    done = checkpoint.newest(folder).at
    assert [row["at"] for row in measured(folder) if row["kind"] == "train"] == list(range(1, done + 1))
    assert (folder / "report.html").exists()
