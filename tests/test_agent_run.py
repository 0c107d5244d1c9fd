"""Runs of an agent: a cold start, then GRPO with SDL; what a stopped one remembers; and what its recipes ask for."""

import math
import shutil
from dataclasses import replace

import pytest
import torch

from rlkit import checkpoint, recipe, session
from rlkit.dist import Processes
from rlkit.scoring import WeightedReward
from rlkit.tracking import Metrics

# The base knows no tool, so that what it writes is short and wrong: what is tested here is the run round it.
SMALL = [
    *("run.threads=1", "run.wandb=disabled", "run.checkpoint_every=1", "run.keep_checkpoints=99", "run.device=cpu"),
    *("stages.cold_start.steps=2", "stages.cold_start.data.per_step=2"),
    "stages.cold_start.learner={batch: 2, lr: 0.003, warmup: 0}",
    *("stages.cold_start.evaluate={every: 0, held_out: 2, ends: 2}", "stages.rl.evaluate={every: 0, held_out: 2}"),
    *("stages.rl.evaluate.ends=2", "stages.rl.steps=3", "stages.rl.data={per_step: 2, group: 2, kinds: [flag]}"),
    *("stages.rl.learner.batch=4", "stages.rl.rollout={turns: 2, writer: {most: 6}}", "stages.rl.algorithm.gap=0.0"),
    *("stages.cold_start.rollout.agent={turns: 2, writer: {most: 6}}", "stages.rl.algorithm.similarity=-1.0"),
]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The recipe in small, and its run. Its answers are all as bad, so that something else tells them apart."""
    setup = recipe.read("world_agent_sdl", SMALL)
    cold, rl = setup.stages
    setup = replace(setup, stages=(cold, replace(rl, rewards=(WeightedReward("lot", lot, 1.0), *rl.rewards))))
    folder = tmp_path_factory.mktemp("agent") / "run"
    session.run(setup, folder, Processes(), quiet=True)
    return setup, folder


def lot(samples):
    tokens = samples.tokens
    return (tokens.ids * tokens.decided).sum(1) % 97 / 97


def measured(folder):
    rows = Metrics.read(folder)
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows if row["kind"] != "event"]


def test_the_cold_start_learns_what_the_teacher_wrote_and_the_next_stage_what_the_agent_did(whole):
    _, folder = whole
    rows = {stage: [row for row in measured(folder) if row["stage"] == stage] for stage in ("cold_start", "rl")}
    taught, learned = ([row for row in rows[stage] if row["kind"] == "train"] for stage in rows)
    assert (len(taught), len(learned)) == (2, 3)
    assert taught[1]["nll"] < taught[0]["nll"] - 0.5
    # The base answers nothing, the teacher always does; and the same policy ended one stage and began the other.
    assert [row["tool_calls/answered"] for row in taught] == [1.0, 1.0]
    assert [row["tool_calls/answered"] for row in learned] == [0.0, 0.0, 0.0]
    ended, begun = rows["cold_start"][-1], rows["rl"][0]
    same = [key for key in ended if key.startswith("held_out/") and "held_out/reward" not in key]
    assert len(same) > 20
    assert [ended[key] for key in same] == [begun[key] for key in same]
    assert learned[0]["ratio/deviation"] < 1e-4, "the trainer sees what the rollout saw"


def test_what_was_learnt_is_remembered_and_taught(whole):
    _, folder = whole
    rows = [row for row in measured(folder) if row["kind"] == "train" and row["stage"] == "rl"]
    assert [row["sdl/memory"] for row in rows] == [2.0, 4.0, 6.0]
    assert [row["sdl/taught"] for row in rows] == [1.0, 1.0, 1.0]
    assert all(math.isfinite(row["loss/sdl"]) and row["loss/sdl"] > 0 for row in rows)
    kept = checkpoint.newest(folder).numbers["state"]["experience"]
    assert [entry["step"] for entry in kept] == [0, 0, 1, 1, 2, 2]
    assert {entry["failure"] for entry in kept} != {""}


def test_a_run_that_was_stopped_remembers_and_ends_with_the_same_bits(whole, tmp_path):
    setup, folder = whole
    again = tmp_path / "run"
    shutil.copytree(folder, again, ignore=shutil.ignore_patterns("weights"))
    for saved in (again / "checkpoints").iterdir():
        if int(saved.name) > 3:
            shutil.rmtree(saved)
    session.run(setup, again, Processes(), resume=True, quiet=True)
    assert measured(again) == measured(folder)
    one, other = checkpoint.newest(folder), checkpoint.newest(again)
    assert one.tensors.keys() == other.tensors.keys()
    assert any(name.startswith("state/experience") for name in one.tensors)
    assert [name for name in one.tensors if not torch.equal(one.tensors[name], other.tensors[name])] == []
    assert one.numbers == other.numbers


def test_the_two_recipes_differ_in_the_algorithm_alone():
    """So that a table of both shows what SDL does."""
    one, other = (recipe.read(name).recipe for name in ("world_agent_grpo", "world_agent_sdl"))
    grpo, sdl = one["stages"]["rl"].pop("algorithm"), other["stages"]["rl"].pop("algorithm")
    assert one == other
    assert sdl["policy"] == {key: value for key, value in grpo.items() if key != "name"}
