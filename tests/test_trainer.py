"""The loop: what a run leaves, stages, resuming, what stops it; and that a reward rises."""

import errno
import json
import math
import os
import shutil
import signal
from dataclasses import dataclass, fields, replace

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from rlkit import checkpoint, recipe, session
from rlkit.algorithms.flow_grpo import FlowGRPO
from rlkit.backbones import tiny
from rlkit.dist import Processes
from rlkit.errors import CheckpointError, DataError, LossError, RecipeError, RewardError
from rlkit.held_out import of_one_size, to_encode
from rlkit.learner import Learner
from rlkit.run import Interrupted, Run
from rlkit.scoring import WeightedReward
from rlkit.stages import RunOptions, Until
from rlkit.tracking import Metrics
from rlkit.types import Prompt

STAGE = {
    "data": {"name": "world", "per_step": 2, "group": 4},
    "rollout": {"name": "local", "steps": 4},
    "algorithm": {"name": "flow_grpo", "clip": 2e-3, "window": 2, "window_start": [0, 1], "shared_noise": True},
    "rewards": {"composition": {"weight": 1.0, "score": "mixed"}},
    "learner": {"lr": 1e-3, "batch": 8},  # two updates a step
    "evaluate": {"every": 0, "held_out": 16},
    "steps": 2,
}


@pytest.fixture(autouse=True)
def global_state():
    """A run sets switches of torch for its whole process."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_rng_state()
    yield
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])
    torch.set_rng_state(before[2])


@pytest.fixture(scope="module", autouse=True)
def small(small_backbone):
    SMALL["path"] = str(small_backbone)


SMALL = {"name": "tiny"}  # with the path of a smaller network, since what is tested here is the loop


def build(stages=None, train=None, **options):
    """A small recipe, resolved. Each stage is what differs from STAGE, entry by entry."""
    described = {}
    for name, changes in (stages or {"main": {}}).items():
        described[name] = {
            key: {**STAGE.get(key, {}), **changes[key]}
            if isinstance(changes.get(key), dict) and key not in ("rewards", "until", "carry")
            else changes.get(key, STAGE.get(key))
            for key in {**STAGE, **changes}
        }
    run = {"checkpoint_every": 1, "keep_checkpoints": 99, "threads": 1, "wandb": "disabled", "device": "cpu"}
    policy = {"backbone": SMALL, "train": train or {"full": True}}
    return recipe.resolve({"run": {**run, **options}, "policy": policy, "stages": described})


def rewarded(setup, reward):
    """The setup with every stage's reward replaced by a function of the samples."""
    stages = tuple(replace(stage, rewards=(WeightedReward("test", reward, 1.0),)) for stage in setup.stages)
    return replace(setup, stages=stages)


def brightness(samples):
    return samples.media.mean((1, 2, 3))


def go(setup, folder, resume=False):
    """Run it; the rows of its metrics."""
    session.run(setup, folder, Processes(), resume=resume, quiet=True)
    return Metrics.read(folder)


def measured(rows):
    """What training and evaluations measured, without the seconds."""
    return [
        {key: value for key, value in row.items() if "seconds" not in key}
        for row in rows
        if row["kind"] in ("train", "evaluation")
    ]


def of(rows, kind, stage=None):
    return [row for row in rows if row["kind"] == kind and stage in (None, row["stage"])]


def events(rows, name):
    return [row for row in rows if row["kind"] == "event" and row["event"] == name]


def same_end(one, other):
    """Both runs hold the same newest checkpoint, bit for bit (weights, sets, moments, states) and the same weights."""
    a, b = checkpoint.newest(one), checkpoint.newest(other)
    assert a.at == b.at
    assert a.tensors.keys() == b.tensors.keys()
    assert [name for name in a.tensors if not torch.equal(a.tensors[name], b.tensors[name])] == []
    assert a.numbers == b.numbers
    exported = sorted(file.name for file in (one / "weights").iterdir())
    assert exported == sorted(file.name for file in (other / "weights").iterdir())
    for name in exported:
        if name.endswith(".safetensors"):  # not bytes: the header lists its metadata in any order
            a, b = load_file(one / "weights" / name), load_file(other / "weights" / name)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)


def cut(whole, folder, at):
    """A copy of a run as if it had been killed some time after its checkpoint of step `at`."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("weights"))
    for saved in (folder / "checkpoints").iterdir():
        if int(saved.name) > at:
            shutil.rmtree(saved)
    return folder


# ------------------------------------------------------------------------------------------ what a run leaves


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One finished run of three steps: (setup, folder, rows)."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    setup = build({"main": {"steps": 3, "evaluate": {"every": 2, "ends": 24}}}, checkpoint_every=2)
    return setup, folder, go(setup, folder)


def test_a_run_leaves_its_record(plain):
    setup, folder, rows = plain
    assert {file.name for file in folder.iterdir()} == {
        *("recipe.yaml", "metrics.jsonl", "environment.json", "samples", "checkpoints", "weights")
    }
    assert recipe.resolve(yaml.safe_load((folder / "recipe.yaml").read_text())).recipe == setup.recipe
    environment = json.loads((folder / "environment.json").read_text())
    assert (environment["processes"], environment["device"]) == (1, "cpu")
    assert sorted(file.name for file in (folder / "checkpoints").iterdir()) == ["000002", "000003"]
    sheets = sorted(file.name for file in (folder / "samples").iterdir())
    assert sheets == [f"00000{at}.{kind}" for at in (0, 2, 3) for kind in ("json", "png")]
    assert [(row["kind"], row["step"], row["at"]) for row in rows] == [
        *(("event", 0, 0), ("evaluation", 0, 0), ("train", 1, 1), ("train", 2, 2), ("evaluation", 2, 2)),
        *(("train", 3, 3), ("evaluation", 3, 3), ("event", 3, 3)),
    ]
    assert [row["count"] for row in of(rows, "evaluation")] == [24, 16, 24]  # `ends` is for the first and the last


def test_every_number_of_a_step_is_there_and_finite(plain):
    rows = of(plain[2], "train")
    names = {"reward/mean", "reward/std", "reward/group_std", "composition/mean", "composition/strict", "zero_std"}
    names |= {"unscored", "loss/policy", "ratio/mean", "ratio/deviation", "clip_fraction", "grad_norm", "lr"}
    names |= {"seconds/sample", "seconds/score", "seconds/train", "cpu_seconds", "samples", "network_calls"}
    for row in rows:
        assert names <= row.keys()
        assert all(math.isfinite(row[name]) for name in names)
        assert (row["samples"], row["unscored"], row["lr"]) == (8, 0, 1e-3)


def test_the_exported_weights_load_as_the_row_says(plain):
    from diffusers import SD3Transformer2DModel

    _, folder, rows = plain
    said = events(rows, "finished")[0]["load"]
    net = eval(said, {"SD3Transformer2DModel": SD3Transformer2DModel})
    saved = checkpoint.newest(folder).tensors
    for name, value in net.state_dict().items():
        if f"policy/current/{name}" in saved:
            assert torch.equal(value, saved[f"policy/current/{name}"]), name


def test_nothing_has_moved_when_a_step_first_looks_back(tmp_path):
    """Before the first update the policy is the one that sampled: the ratio of every row is 1."""
    everything = {"learner": {"batch": 16}, "steps": 1}  # one update a step
    for name, train in (("full", {"full": True}), ("lora", {"lora": {"rank": 4}})):
        row = of(go(build({"main": everything}, train=train), tmp_path / name), "train")[0]
        assert row["ratio/deviation"] <= 1e-5
        assert row["clip_fraction"] == 0
        assert row["grad_norm"] > 0


def test_the_same_recipe_gives_the_same_numbers_and_another_seed_does_not(plain, tmp_path):
    setup, folder, rows = plain
    again = go(setup, tmp_path / "again")
    assert measured(again) == measured(rows)
    same_end(folder, tmp_path / "again")
    other = go(replace(setup, options=replace(setup.options, seed=1)), tmp_path / "other")
    assert of(other, "train")[0]["reward/mean"] != of(rows, "train")[0]["reward/mean"]


# ------------------------------------------------------------------------------------------------------ stages


def test_stages_run_in_order_and_share_the_policy(tmp_path):
    from_here = {"algorithm": {"kl": 0.01}, "anchor": "stage_start"}
    setup = build({"first": {}, "second": {**from_here, "learner": {"lr": 1e-4, "warmup": 4}}})
    rows = go(setup, tmp_path)
    steps = [(row["stage"], row["step"], row["at"]) for row in of(rows, "train")]
    assert steps == [("first", 1, 1), ("first", 2, 2), ("second", 1, 3), ("second", 2, 4)]
    assert [row["lr"] for row in of(rows, "train")] == pytest.approx([1e-3, 1e-3, 5e-5, 1e-4])
    # The same weights draw the same held-out pictures, so the second begins where the first ended.
    began, ended, begun, _ = ({k: v for k, v in row.items() if "held_out/" in k} for row in of(rows, "evaluation"))
    assert ended == begun
    assert ended != began
    last = checkpoint.newest(tmp_path).tensors
    at_two = checkpoint._load(tmp_path / "checkpoints" / "000002").tensors
    reference = [name for name in last if name.startswith("policy/reference/")]
    assert reference
    assert all(torch.equal(last[name], at_two[name.replace("/reference/", "/current/")]) for name in reference)


def test_a_stage_ends_early_once_its_goal_is_reached(tmp_path):
    goal = {"metric": "held_out/reward", "above": -1.0}
    first = {"steps": 9, "until": goal, "evaluate": {"every": 2}}
    rows = go(build({"first": first, "second": {"steps": 1}}), tmp_path)
    steps = [(row["kind"], row["stage"], row["step"], row["at"]) for row in rows if row["kind"] != "event"]
    assert steps == [
        *(("evaluation", "first", 0, 0), ("train", "first", 1, 1), ("train", "first", 2, 2)),
        *(("evaluation", "first", 2, 2), ("evaluation", "second", 0, 2), ("train", "second", 1, 3)),
        ("evaluation", "second", 1, 3),
    ]


def test_a_stage_ends_once_its_goal_rises_no_more_and_a_resumed_one_remembers_how_long(tmp_path):
    """Evaluations .1 (before the first step), .3, .35, .36, .2: with least .1, only the second is a rise."""
    values = iter([0.1, 0.3, 0.35, 0.36, 0.2, 0.9, 0.35, 0.36, 0.2])

    class Evaluated:
        def __call__(self, samples):
            return brightness(samples) * 0 + (next(values) if len(samples) == 16 else brightness(samples))

    until = {"metric": "held_out/reward", "plateau": 3, "least": 0.1}
    setup = rewarded(build({"main": {"steps": 9, "until": until, "evaluate": {"every": 1}}}), Evaluated())
    rows = go(setup, tmp_path / "whole")
    assert [row["step"] for row in of(rows, "evaluation")] == [0, 1, 2, 3, 4]
    next(values)
    again = go(setup, cut(tmp_path / "whole", tmp_path / "run", at=1), resume=True)
    assert [row["step"] for row in of(again, "evaluation")] == [0, 1, 2, 3, 4]


def test_a_stage_goes_on_from_the_average_or_the_last_weights_of_the_one_before(tmp_path):
    """And an average begins anew with each stage, or is gone with one that keeps none."""
    kept = {"learner": {"ema": 0.9}, "steps": 2}

    def begun(name, carry):
        setup = build({"first": kept, "second": {"learner": {"lr": 1e-30}, "carry": carry, "steps": 1}})
        go(setup, tmp_path / name)
        ended = checkpoint._load(tmp_path / name / "checkpoints" / "000002").tensors
        return ended, checkpoint.newest(tmp_path / name).tensors

    ended, last = begun("ema", {"weights": "ema"})
    names = [name for name in last if name.startswith("policy/current/")]
    average = {name: ended[name.replace("/current/", "/ema/")] for name in names}
    assert all(torch.equal(last[name], average[name]) for name in names)
    assert not all(torch.equal(ended[name], average[name]) for name in names)
    assert not any(name.startswith("policy/ema/") for name in last)
    ended, last = begun("current", {})
    assert all(torch.equal(last[name], ended[name]) for name in names)
    setup = build({"first": kept, "second": {**kept, "learner": {"lr": 1e-30, "ema": 0.9}, "steps": 1}})
    go(setup, tmp_path / "anew")
    last = checkpoint.newest(tmp_path / "anew").tensors
    assert all(torch.equal(last[name], last[name.replace("/current/", "/ema/")]) for name in names)


def test_a_stage_may_take_over_the_moments_of_the_optimiser(tmp_path):
    def moments(carry):
        slow = {"learner": {"lr": 1e-30}, "steps": 1, "carry": carry}
        folder = tmp_path / str(len(carry))
        go(build({"first": {"steps": 2}, "second": slow}), folder)
        last = checkpoint.newest(folder).tensors
        return next(value for name, value in last.items() if name.startswith("optimizer/step/"))

    # Two updates a step; AdamW counts on, the schedule of the rate does not.
    assert (float(moments({"optimizer": True})), float(moments({}))) == (6.0, 2.0)


@pytest.mark.parametrize("metric", ["seconds", "cpu_seconds"])
def test_a_stage_may_end_by_its_training_time_and_remembers_it(metric, tmp_path):
    goal = {"metric": metric, "above": 1e-9}
    setup = build({"main": {"steps": 9, "until": goal, "evaluate": {"every": 0, "held_out": 4, "ends": 6}}})
    rows = go(setup, tmp_path)
    assert [(row["kind"], row["step"]) for row in rows if row["kind"] != "event"] == [
        ("evaluation", 0),
        ("train", 1),
        ("evaluation", 1),
    ]
    assert of(rows, "evaluation")[-1]["count"] == 6, "its last evaluation is the stage's end"
    assert checkpoint.newest(tmp_path).numbers["spent"][metric] > 0
    assert of(rows, "train")[0]["network_calls"] > 0


def test_a_goal_that_is_not_reached_changes_nothing(plain, tmp_path):
    goal = {"metric": "held_out/reward", "above": 1e9}
    setup = build({"main": {"steps": 3, "evaluate": {"every": 2, "ends": 24}, "until": goal}}, checkpoint_every=2)
    assert measured(go(setup, tmp_path)) == measured(plain[2])


# ---------------------------------------------------------------------------------------------------- resuming

KL = {"algorithm": {"kl": 0.02}, "learner": {"ema": 0.9, "epochs": 2, "warmup": 3}}
VARIANTS = {  # how both stages of three steps are trained, and what trains
    "base": ({**KL, "anchor": "base"}, None),
    "stage_start": ({**KL, "anchor": "stage_start"}, None),
    "ema": ({**KL, "anchor": "ema"}, None),
    "lora": ({**KL, "anchor": "stage_start"}, {"lora": {"rank": 4}}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def unbroken(request, tmp_path_factory):
    """A run of two stages with every checkpoint kept: (setup, folder, rows)."""
    stage, train = VARIANTS[request.param]
    carry = {"carry": {"weights": "ema", "optimizer": True}} if request.param == "ema" else {}
    setup = build({"first": {**stage, "steps": 3}, "second": {**stage, **carry, "steps": 3}}, train=train)
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return setup, folder, go(setup, folder)


@pytest.mark.parametrize("at", [2, 3, 5], ids=["within the first stage", "at its end", "within the second stage"])
def test_a_resumed_run_gives_the_bits_of_an_unbroken_one(unbroken, tmp_path, at):
    setup, folder, rows = unbroken
    resumed = cut(folder, tmp_path / "run", at)
    assert checkpoint.newest(resumed).at == at
    again = go(setup, resumed, resume=True)
    assert measured(again) == measured(rows)
    assert events(again, "resumed")[0]["text"] == f"resumed after step {at}"
    same_end(folder, resumed)


def test_prompts_that_come_back_are_read_as_they_were_the_first_time(tmp_path):
    """A resumed run encodes them again, beside others than the unbroken run did: that must not change a bit."""
    texts = ("a red circle", "two blue crosses", "a cyan square left of a red triangle", "a green star", "one cross")
    path = words(tmp_path / "prompts.txt", *texts)
    data = {"name": "prompts", "path": path, "per_step": 2, "group": 4}
    setup = rewarded(build({"main": {"data": data, "steps": 9}}), brightness)
    rows = go(setup, tmp_path / "whole")
    for at in (1, 2, 3):
        again = cut(tmp_path / "whole", tmp_path / f"from_{at}", at)
        assert measured(go(setup, again, resume=True)) == measured(rows)
        same_end(tmp_path / "whole", again)


def test_every_set_moved_so_that_the_comparison_means_something(unbroken):
    _, folder, rows = unbroken
    first = checkpoint._load(folder / "checkpoints" / "000001").tensors
    last = checkpoint.newest(folder).tensors
    sets = {name.split("/")[1] for name in last if name.startswith("policy/")}
    assert sets >= {"current", "ema"}
    for kind in ("policy/current", "policy/ema", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
        moved = [not torch.equal(first[name], last[name]) for name in last if name.startswith(f"{kind}/")]
        assert sum(moved) > len(moved) / 2, kind
    assert max(row["kl"] for row in of(rows, "train")) > 0


def test_a_reward_that_draws_draws_the_same_after_a_resume(tmp_path):
    def drawing(samples):
        return brightness(samples) + torch.rand(len(samples))

    setup = rewarded(build({"main": {"steps": 3}}), drawing)
    rows = go(setup, tmp_path / "whole")
    torch.rand(7)  # another process: another state of the generator
    again = go(setup, cut(tmp_path / "whole", tmp_path / "run", at=1), resume=True)
    assert measured(again) == measured(rows)
    same_end(tmp_path / "whole", tmp_path / "run")


class StopAt:
    """Brightness, but a reward that presses Ctrl+C when it is asked for the n-th time."""

    def __init__(self, call, times=1):
        self.left, self.times = call, times

    def __call__(self, samples):
        self.left -= 1
        for _ in range(self.times if self.left == 0 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return brightness(samples)


# Calls: the opening evaluation, two steps, the closing evaluation; and the same again for the second stage.
@pytest.mark.parametrize(
    ("call", "done"),
    [(1, 0), (2, 1), (4, 2), (5, 2), (6, 3)],
    ids=["before the first step", "in a step", "at the end of a stage", "at the next one's start", "in its first step"],
)
def test_a_run_that_was_told_to_stop_ends_as_if_it_had_not_been(tmp_path, call, done):
    setup = build({"first": {"anchor": "stage_start", "algorithm": {"kl": 0.02}}, "second": {}})
    whole = go(rewarded(setup, brightness), tmp_path / "whole")
    folder = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"rlkit train --resume {folder}"):
        go(rewarded(setup, StopAt(call)), folder)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.newest(folder).at == done
    again = go(rewarded(setup, brightness), folder, resume=True)
    assert measured(again) == measured(whole)
    same_end(tmp_path / "whole", folder)


def test_a_stop_during_the_last_step_lets_the_run_finish(tmp_path):
    rows = go(rewarded(build(), StopAt(4)), tmp_path)
    assert events(rows, "finished")


def test_a_second_stop_does_not_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(rewarded(build(), StopAt(3, times=2)), tmp_path)
    assert checkpoint.newest(tmp_path).at == 1


def test_without_a_checkpoint_a_resume_begins_at_the_first_step(plain, tmp_path):
    setup, folder, rows = plain
    killed = cut(folder, tmp_path / "killed", at=0)
    again = go(setup, killed, resume=True)
    assert measured(again) == measured(rows)
    assert events(again, "resumed")[0]["text"] == "no whole checkpoint: resumed from the start"
    same_end(folder, killed)
    new = tmp_path / "new"
    assert measured(go(setup, new, resume=True)) == measured(rows)  # nor does it need a folder


def test_resuming_a_finished_run_changes_nothing(plain, tmp_path):
    setup, folder, rows = plain
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    again = go(setup, copy, resume=True)
    assert measured(again) == measured(rows)
    assert events(again, "finished")
    same_end(folder, copy)


def test_a_damaged_checkpoint_is_passed_over(plain, tmp_path):
    setup, folder, rows = plain
    for name, damage in (
        ("tensors.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-9] + b"corrupted")),
        ("numbers.json", lambda file: file.unlink()),
        ("manifest.json", lambda file: file.write_text("{")),
    ):
        broken = tmp_path / name
        shutil.copytree(folder, broken, ignore=shutil.ignore_patterns("weights"))
        damage(broken / "checkpoints" / "000003" / name)
        assert checkpoint.newest(broken).at == 2
    assert measured(go(setup, broken, resume=True)) == measured(rows)
    same_end(folder, broken)


def test_what_a_killed_save_left_is_ignored_and_removed(plain, tmp_path):
    setup, folder, rows = plain
    resumed = cut(folder, tmp_path / "run", at=2)
    draft = resumed / "checkpoints" / ".000003-4242"
    draft.mkdir()
    (draft / "tensors.safetensors").write_bytes(b"half of it")
    assert measured(go(setup, resumed, resume=True)) == measured(rows)
    assert sorted(file.name for file in (resumed / "checkpoints").iterdir()) == ["000002", "000003"]
    same_end(folder, resumed)


def test_a_checkpoint_of_another_recipe_is_refused_with_the_keys(plain, tmp_path):
    folder = plain[1]
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    other = {"steps": 3, "evaluate": {"every": 2, "ends": 24}, "learner": {"lr": 2e-3}, "algorithm": {"clip": 1e-3}}
    with pytest.raises(CheckpointError) as refused:
        go(build({"main": other}, seed=3), copy, resume=True)
    message = str(refused.value)
    assert "run.seed: 0 -> 3" in message
    assert "stages.main.learner.lr: 0.001 -> 0.002" in message
    assert "stages.main.algorithm.clip: 0.002 -> 0.001" in message
    assert "steps" not in message
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before


def test_a_finished_run_goes_on_when_it_is_given_more_steps(plain, tmp_path):
    _, folder, rows = plain
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    # run.* is free too, but for what changes the numbers.
    longer = build({"main": {"steps": 5, "evaluate": {"every": 2, "ends": 24}}}, checkpoint_every=3, keep_checkpoints=1)
    again = go(longer, copy, resume=True)
    assert [row["at"] for row in of(again, "train")] == [1, 2, 3, 4, 5]
    assert measured(again)[: len(measured(rows))] == measured(rows)
    assert sorted(file.name for file in (copy / "checkpoints").iterdir()) == ["000005"]
    assert yaml.safe_load((copy / "recipe.yaml").read_text())["stages"]["main"]["steps"] == 5


def test_a_run_that_is_given_fewer_steps_than_it_took_ends(plain, tmp_path):
    copy = cut(plain[1], tmp_path / "run", at=2)
    again = go(build({"main": {"steps": 1, "evaluate": {"every": 2, "ends": 24}}}), copy, resume=True)
    assert [row["at"] for row in of(again, "train")] == [1, 2]
    assert events(again, "finished")


def test_a_goal_that_was_reached_stays_reached(tmp_path):
    first = {"steps": 4, "until": {"metric": "held_out/reward", "above": -1.0}, "evaluate": {"every": 1}}
    setup = build({"first": first, "second": {"steps": 1}})
    rows = go(setup, tmp_path / "whole")
    again = go(setup, cut(tmp_path / "whole", tmp_path / "run", at=1), resume=True)
    assert measured(again) == measured(rows)
    same_end(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("options", [{"checkpoint_every": 0}, {"keep_checkpoints": 0}, {"threads": 0}])
def test_options_of_a_run_are_checked(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        RunOptions(**options)


class Told:
    """Scores an evaluation (16 samples) with the next of these values, and may press Ctrl+C at the first."""

    def __init__(self, *values, stop=False):
        self.values, self.stop = list(values), stop

    def __call__(self, samples):
        if len(samples) != 16:
            return brightness(samples)
        if self.stop:
            self.stop = False
            os.kill(os.getpid(), signal.SIGINT)
        return brightness(samples) * 0 + self.values.pop(0)


def test_an_opening_that_was_broken_off_counts_once_for_a_plateau(tmp_path):
    until = {"metric": "held_out/reward", "plateau": 2}
    setup = build({"main": {"steps": 9, "until": until, "evaluate": {"every": 1}}})
    whole = go(rewarded(setup, Told(0.3, 0.2, 0.5, 0.4, 0.4)), tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(rewarded(setup, Told(0.3, stop=True)), tmp_path / "run")
    again = go(rewarded(setup, Told(0.3, 0.2, 0.5, 0.4, 0.4)), tmp_path / "run", resume=True)
    assert [row["step"] for row in of(whole, "evaluation")] == [0, 1, 2, 3, 4]
    assert measured(again) == measured(whole)


def test_a_stage_that_ended_by_its_time_trains_no_more_when_resumed(tmp_path):
    setup = build({"first": {"steps": 9, "until": {"metric": "cpu_seconds", "above": 1e-9}}, "second": {"steps": 1}})
    rows = go(setup, tmp_path / "whole")
    again = go(setup, cut(tmp_path / "whole", tmp_path / "run", at=1), resume=True)
    assert [(row["stage"], row["at"]) for row in of(again, "train")] == [("first", 1), ("second", 2)]
    assert [(row["stage"], row["at"]) for row in of(rows, "train")] == [("first", 1), ("second", 2)]


def test_another_goal_has_a_plateau_of_its_own(tmp_path):
    def until(metric, plateau):
        return {"until": {"metric": metric, "plateau": plateau, "least": 5.0}, "steps": 9, "evaluate": {"every": 1}}

    rows = go(build({"main": until("held_out/reward", 1)}), tmp_path)
    assert of(rows, "train")[-1]["step"] == 1
    rows = go(build({"main": until("held_out/strict", 2)}), tmp_path, resume=True)
    assert of(rows, "train")[-1]["step"] == 4, "the first evaluation rises, the two after it do not"


def test_a_goal_by_the_clock_that_comes_later_counts_the_time_so_far(tmp_path):
    go(build({"main": {"steps": 2}}), tmp_path)
    goal = {"metric": "cpu_seconds", "above": 1e9}
    rows = go(build({"main": {"steps": 3, "until": goal}}), tmp_path, resume=True)
    spent = checkpoint.newest(tmp_path).numbers["spent"]["cpu_seconds"]
    assert spent == pytest.approx(sum(row["cpu_seconds"] for row in of(rows, "train")))


@pytest.mark.parametrize("ends", [24, None])
def test_a_stage_that_reaches_its_goal_is_measured_as_at_its_begin(tmp_path, ends):
    until = {"metric": "held_out/reward", "above": -1.0}
    setup = build({"main": {"steps": 9, "until": until, "evaluate": {"every": 2, "ends": ends}}})
    rows = of(go(setup, tmp_path), "evaluation")
    more = [(0, 24, True), (2, 16, False), (2, 24, True)] if ends else [(0, 16, True), (2, 16, True)]
    assert [(row["step"], row["count"], row["ends"]) for row in rows] == more


def test_a_goal_that_no_evaluation_measures_is_refused_at_the_first(tmp_path):
    """A kind of prompt is not always known beforehand. Else the stage would wait to its last step."""
    until = {"metric": "held_out/brightness/singel", "above": 0.5}
    setup = rewarded(build({"main": {"steps": 2, "evaluate": {"every": 1}}}), brightness)
    stage = replace(setup.stages[0], until=Until(**until))
    with pytest.raises(RecipeError, match="no 'held_out/brightness/singel'") as error:
        go(replace(setup, stages=(stage,)), tmp_path)
    assert error.value.where == "stages.main.until.metric"
    assert not of(Metrics.read(tmp_path), "train")


def test_an_evaluation_without_a_score_is_no_sign_of_a_plateau(tmp_path):
    until = {"metric": "held_out/reward", "plateau": 1}
    setup = build({"main": {"steps": 3, "until": until, "evaluate": {"every": 1}}}, max_unscored=1.0)
    rows = go(rewarded(setup, Told(0.3, math.nan, 0.4, 0.2)), tmp_path)
    assert [row["step"] for row in of(rows, "train")] == [1, 2, 3]


def test_a_damaged_checkpoint_takes_nobodys_place(plain, tmp_path):
    """With one to be kept, those that are written after it would be the older ones, and go."""
    _, folder, rows = plain
    run = cut(folder, tmp_path / "run", at=0)
    shutil.copytree(folder / "checkpoints" / "000003", run / "checkpoints" / "000100")
    (run / "checkpoints" / "000100" / "numbers.json").unlink()
    setup = build({"main": {"steps": 3, "evaluate": {"every": 2, "ends": 24}}}, keep_checkpoints=1)
    assert measured(go(setup, run, resume=True)) == measured(rows)
    assert sorted(file.name for file in (run / "checkpoints").iterdir()) == ["000003", "000100-damaged"]
    assert checkpoint.newest(run).at == 3


def test_an_optimiser_that_goes_back_to_its_start_has_no_moments():
    setup = build()
    learner = Learner(session.load_policy(setup), setup.stages[0].learner, Processes())
    for parameter in learner.policy.trainable.values():
        parameter.grad = torch.ones_like(parameter)
    learner.optimizer.step()
    assert learner.state()[0]
    learner.load_state({}, {"updates": 0})
    assert learner.state()[0] == {}


@dataclass(frozen=True)
class Calibrated(FlowGRPO):
    """Remembers what its first samples were given."""

    def start(self, tools):
        _, scores = tools.sample(self.plan(tools.context), 0)
        return {"seen": scores.raw.clone()}


def test_what_calibrates_an_algorithm_draws_the_same_after_a_resume(tmp_path):
    def drawing(samples):
        return brightness(samples) + torch.rand(len(samples))

    setup = rewarded(build({"first": {"steps": 1}, "second": {"steps": 1}}), drawing)
    algorithm = Calibrated(**{one.name: getattr(setup.stages[1].algorithm, one.name) for one in fields(FlowGRPO)})
    setup = replace(setup, stages=(setup.stages[0], replace(setup.stages[1], algorithm=algorithm)))
    go(setup, tmp_path / "whole")
    torch.rand(7)
    go(setup, cut(tmp_path / "whole", tmp_path / "run", at=1), resume=True)
    assert "state/seen" in checkpoint.newest(tmp_path / "run").tensors
    same_end(tmp_path / "whole", tmp_path / "run")


# ------------------------------------------------------------------------------------- before the first stage


class Lacking:
    steps, kind = 4, "flow"

    def missing(self):
        return "Run: pip install it."


AHEAD = {
    "prompts": ({"data": {"name": "prompts", "path": "nowhere.txt"}}, "stages.second.data: nowhere.txt"),
    "pairs": ({"monitors": {"sanity": {"path": "nowhere.jsonl"}}}, "stages.second.monitors.sanity: nowhere.jsonl"),
}


@pytest.mark.parametrize("case", AHEAD)
def test_what_a_later_stage_lacks_is_said_before_the_first_one_begins(tmp_path, case):
    changes, where = AHEAD[case]
    with pytest.raises(DataError) as error:
        go(build({"first": {}, "second": changes}), tmp_path)
    assert error.value.where == where
    assert not any(tmp_path.iterdir())


def test_what_a_finished_stage_has_had_is_not_asked_for_again(tmp_path):
    file = tmp_path / "prompts.txt"
    data = {"name": "prompts", "path": words(file, "a red circle"), "per_step": 1}
    setup = build({"first": {"data": data, "learner": {"batch": 4}, "rewards": {"brightness": 1.0}}, "second": {}})
    rows = go(setup, tmp_path / "whole")
    file.unlink()
    again = go(setup, cut(tmp_path / "whole", tmp_path / "run", at=3), resume=True)
    assert measured(again) == measured(rows)


def test_a_goal_that_no_held_out_prompt_can_reach_is_refused(tmp_path):
    data = {"name": "prompts", "path": words(tmp_path / "prompts.txt", "a red circle")}
    until = {"metric": "held_out/reward", "above": 0.5}
    second = {"data": data, "until": until, "evaluate": {"every": 1}, "rewards": {"brightness": 1.0}}
    with pytest.raises(RecipeError, match="its data has no held-out prompts") as error:
        go(build({"first": {}, "second": second}), tmp_path / "run")
    assert error.value.where == "stages.second.until.metric"
    assert not any((tmp_path / "run").iterdir())


def test_a_later_stages_rollout_says_what_it_lacks_before_the_first_one_begins(tmp_path):
    setup = build({"first": {}, "second": {}})
    setup = replace(setup, stages=(setup.stages[0], replace(setup.stages[1], rollout=Lacking())))
    with pytest.raises(RecipeError, match=r"not installed here. Run: pip install it\.") as error:
        go(setup, tmp_path)
    assert error.value.where == "stages.second.rollout"


def test_two_processes_do_not_train_in_one_folder(plain, tmp_path):
    setup, folder, rows = plain
    run = cut(folder, tmp_path / "run", at=2)
    with session._alone(run, Processes()), pytest.raises(CheckpointError, match="another process trains"):
        go(setup, run, resume=True)
    assert measured(go(setup, run, resume=True)) == measured(rows), "it went away, and nothing was changed"


def test_a_broken_record_is_refused_before_anything_is_loaded(plain, tmp_path, monkeypatch):
    setup, folder, _ = plain
    run = cut(folder, tmp_path / "run", at=2)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("{broken\n" + text)
    monkeypatch.setattr(session, "load_policy", lambda *_: pytest.fail("the policy was loaded"))
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        go(setup, run, resume=True)


def test_a_stage_that_cannot_open_lets_go_of_what_it_has_started(tmp_path, monkeypatch):
    closed = []
    close = Run.close
    monkeypatch.setattr(Run, "close", lambda run: (closed.append(run.stage.name), close(run)))
    with pytest.raises(RewardError):
        go(rewarded(build(), Broken(math.nan, count=99)), tmp_path)
    assert closed == ["main"]


# --------------------------------------------------------------------------------------------- what goes wrong


def words(file, *lines):
    file.write_text("".join(f"{line}\n" for line in lines))
    return str(file)


def test_an_empty_file_of_prompts(tmp_path):
    data = {"name": "prompts", "path": words(tmp_path / "prompts.txt", "", " "), "per_step": 2, "group": 4}
    setup = build({"main": {"data": data}})
    with pytest.raises(DataError, match=r"prompts\.txt: no prompts in this file"):
        go(setup, tmp_path / "run")


def test_words_that_cannot_be_read_are_said_once_and_counted(tmp_path):
    path = words(tmp_path / "prompts.txt", "a red circle", "a red zeppelin", "an ornate blue square", "a red circle")
    data = {"name": "prompts", "path": path, "held_out_path": path, "per_step": 2, "group": 4}
    rows = go(rewarded(build({"main": {"data": data}}), brightness), tmp_path / "run")
    (event,) = events(rows, "unknown_words")
    assert event["count"] == 2
    assert "2 of 3 prompts" in event["text"]
    assert "'zeppelin'" in event["text"]
    assert len(of(rows, "train")) == 2


class Broken:
    """Brightness, but `value` in place of the first `count` numbers of every call after the first `good`."""

    def __init__(self, value, count=1, good=0):
        self.value, self.count, self.good = value, count, good

    def __call__(self, samples):
        values = brightness(samples)
        self.good -= 1
        if self.good < 0:
            values[: self.count] = self.value
        return values


def test_a_sample_without_a_number_is_masked_and_counted(tmp_path):
    big = {"data": {"group": 8}, "learner": {"batch": 32}, "steps": 1}  # 1 of 16 samples is within the tenth
    ends = {}
    for name, value in (("nan", math.nan), ("inf", math.inf), ("zero", 0.0)):
        rows = go(rewarded(build({"main": big}), Broken(value)), tmp_path / name)
        (row,) = of(rows, "train")
        assert row["unscored"] == (0 if name == "zero" else 1 / 16)
        ends[name] = checkpoint.newest(tmp_path / name).tensors["policy/current/proj_out.weight"]
        assert torch.isfinite(ends[name]).all()
        assert all(math.isfinite(v) for k, v in row.items() if isinstance(v, float))
    assert torch.equal(ends["nan"], ends["inf"])
    assert not torch.equal(ends["nan"], ends["zero"])


def test_too_many_without_a_number_stop_the_run_and_spare_the_checkpoint(tmp_path):
    setup = build({"main": {"steps": 4}})
    folder = tmp_path / "run"
    with pytest.raises(RewardError, match=r"'test' scored only 7 of 8 samples"):
        go(rewarded(setup, Broken(math.nan, good=3)), folder)  # an evaluation and two steps
    assert checkpoint.newest(folder).at == 2
    assert [row["at"] for row in of(Metrics.read(folder), "train")] == [1, 2]
    whole = go(rewarded(setup, brightness), tmp_path / "whole")
    assert measured(go(rewarded(setup, brightness), folder, resume=True)) == measured(whole)
    same_end(tmp_path / "whole", folder)


def test_a_reward_of_ones_own_is_named_by_module_and_class(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "class Brightness:\n"
        "    def __init__(self, gain: float = 1.0):\n"
        "        self.gain = gain\n"
        "    def __call__(self, samples):\n"
        "        return samples.media.mean((1, 2, 3)) * self.gain\n"
    )
    monkeypatch.chdir(tmp_path)
    own = {"my_rewards:Brightness": {"weight": 0.5, "gain": 4.0}}
    rows = go(build({"main": {"rewards": own, "steps": 1}}), tmp_path / "run")
    (row,) = of(rows, "train")
    assert row["reward/mean"] == pytest.approx(0.5 * row["my_rewards:Brightness/mean"])
    assert 0 < row["my_rewards:Brightness/mean"] <= 4


@pytest.mark.parametrize("wrapped", [False, True], ids=["as the system says it", "as safetensors does"])
def test_a_full_disk_stops_the_run_and_keeps_the_older_checkpoint(plain, tmp_path, monkeypatch, wrapped):
    import safetensors
    from safetensors.torch import save_file

    calls = []

    def fail_second(tensors, file, **more):
        calls.append(file)
        if len(calls) == 2:
            file.write_bytes(b"half of it")
            error = "Error while serializing: I/O error: No space left on device (os error 28)"
            raise safetensors.SafetensorError(error) if wrapped else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, file, **more)

    setup, folder, rows = plain
    monkeypatch.setattr("safetensors.torch.save_file", fail_second)
    full = tmp_path / "full"
    with pytest.raises(CheckpointError) as stopped:
        go(setup, full)
    assert "No space left" in str(stopped.value)
    assert "Checkpoint 000002 is whole. Make room, then: rlkit train --resume" in str(stopped.value)
    assert [file.name for file in (full / "checkpoints").iterdir()] == ["000002"]
    assert measured(go(setup, full, resume=True)) == measured(rows)
    same_end(folder, full)


# ------------------------------------------------------------------------------------------------- it learns


def test_the_reward_rises(tmp_path):
    """On the shipped backbone, with a reward that any policy can raise. With the advantage's sign turned it falls."""
    path = words(tmp_path / "prompts.txt", "a red circle", "a blue square")
    stage = {
        "data": {"name": "prompts", "path": path, "per_step": 2, "group": 8},
        "learner": {"lr": 3e-4, "batch": 32},
        "steps": 20,
    }
    setup = rewarded(build({"main": stage}, checkpoint_every=99), brightness)
    setup = replace(setup, policy=replace(setup.policy, backbone=tiny.Tiny()))
    rewards = [row["reward/mean"] for row in of(go(setup, tmp_path / "run"), "train")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.05


# ---------------------------------------------------------------------------------- a loss that is not finite


@dataclass(frozen=True)
class Overflows(FlowGRPO):
    """In its second step one row's advantage is infinite."""

    def rows(self, samples, scores, context):
        rows = super().rows(samples, scores, context)
        if context.step == 1:
            rows.advantage[11] = math.inf
        return rows


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_rows(tmp_path):
    setup = build({"main": {"steps": 3}})
    algorithm = Overflows(clip=2e-3, window=2, window_start=(0, 1), shared_noise=True)
    setup = replace(setup, stages=(replace(setup.stages[0], algorithm=algorithm),))
    with pytest.raises(LossError) as caught:
        session.run(setup, tmp_path, Processes(), quiet=True)
    text = str(caught.value)
    assert text.startswith("stages.main.algorithm: Overflows: the loss term 'policy' is ")
    assert "at row 11, in step 2" in text
    file = tmp_path / "failed" / "main-000002.safetensors"
    assert str(file) in text
    with safe_open(file, "pt") as saved:
        culprit, cond = json.loads(saved.metadata()["culprit"]), json.loads(saved.metadata()["cond"])
        row, advantage = saved.get_tensor("row"), saved.get_tensor("advantage")
    assert row[culprit] == 11
    assert advantage[culprit] == math.inf
    assert len(cond) == len(row) == 8
    assert checkpoint.newest(tmp_path).at == 1, "what was saved before is whole"


# ---- several sizes, and encoders that leave --------------------------------------------------------------------------


def test_an_evaluation_is_of_one_size():
    prompts = tuple(Prompt(i, "a", size=size) for i, size in enumerate([(4, 4), (4, 4), (4, 8)]))
    assert of_one_size(prompts[:2]) == prompts[:2], "one size is kept"
    assert [one.size for one in of_one_size(prompts)] == [None] * 3
    assert [one.id for one in of_one_size(prompts)] == [0, 1, 2]
    assert of_one_size(()) == ()


def test_what_is_to_be_encoded_is_the_data_and_each_evaluation_as_it_is_drawn():
    held_out = tuple(Prompt(i, f"h{i}", size=(4, 4 + 4 * (i == 2))) for i in range(3))

    @dataclass(frozen=True)
    class Data:
        every: tuple[Prompt, ...] | None

        def open(self):
            return self

        def everything(self):
            return self.every

        def held_out(self, count):
            return held_out[:count]

    stage = build({"main": {"evaluate": {"held_out": 2, "ends": 3}}}).stages[0]
    prompts = tuple(Prompt(i, f"t{i}") for i in range(2))
    found = [(one.text, one.size) for one in to_encode(replace(stage, data=Data(prompts)))]
    assert found[:2] == [("t0", None), ("t1", None)]
    assert set(found[2:]) == {("h0", (4, 4)), ("h1", (4, 4)), ("h0", None), ("h1", None), ("h2", None)}
    with pytest.raises(RecipeError, match="the data of stage 'main' has no end"):
        to_encode(replace(stage, data=Data(None)))
    evaluated = to_encode(replace(stage, data=Data(None)), trains=False)
    assert {one.text for one in evaluated} == {"h0", "h1", "h2"}, "nothing that is trained on"


def test_a_stage_that_is_only_evaluated_needs_no_end_to_its_prompts(tmp_path):
    """The world's have none, and an evaluation's are as many as it says."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "held_out.txt").write_text("a green square\n")
    files = {"name": "prompts", "path": str(tmp_path / "prompts.txt"), "held_out_path": str(tmp_path / "held_out.txt")}
    setup = build({"main": {"data": files, "rewards": {"brightness": 1.0}, "evaluate": {"held_out": 2}}, "world": {}})
    main, world = setup.stages
    policy = replace(setup.policy, resources=replace(setup.policy.resources, encoders="free"))
    setup = replace(setup, policy=policy, stages=(replace(main, also=(world,)),))
    recipe.check(setup)
    session.run(setup, tmp_path / "run", Processes(), quiet=True)
    assert "held_out/reward/world" in [row for row in Metrics.read(tmp_path / "run") if row["kind"] == "evaluation"][-1]
    with pytest.raises(RecipeError, match="have no end"):
        recipe.check(replace(setup, stages=(main, world)))


def test_a_run_without_its_encoders_has_the_numbers_of_one_with_them(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue xyzzy\n")
    (tmp_path / "held_out.txt").write_text("a green square\n")
    files = {"name": "prompts", "path": str(tmp_path / "prompts.txt"), "held_out_path": str(tmp_path / "held_out.txt")}
    changes = {"data": files, "rewards": {"brightness": 1.0}, "evaluate": {"held_out": 2}}
    rows = {}
    for encoders in ("keep", "free"):
        setup = build({"main": changes, "second": changes})
        resources = replace(setup.policy.resources, encoders=encoders)
        setup = replace(setup, policy=replace(setup.policy, resources=resources))
        session.run(setup, tmp_path / encoders, Processes(), quiet=True)
        timeless = ("seconds", "cpu", "at_time", "time")
        rows[encoders] = [
            {key: value for key, value in row.items() if not key.startswith(timeless)}
            for row in Metrics.read(tmp_path / encoders)
            if row["kind"] in ("train", "evaluation") or row.get("event") == "unknown_words"
        ]
    assert rows["free"] == rows["keep"]
    assert sum(row.get("event") == "unknown_words" for row in rows["free"]) == 2, "each stage warns"
