"""Two processes do what one does: the same gradients, numbers and weights, however samples and rows are split."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlkit import checkpoint, dist, recipe
from rlkit.dist import Processes
from rlkit.errors import DistributedError
from rlkit.run import Run
from rlkit.tracking import Metrics

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def two(small_backbone, tmp_path_factory):
    """What `two_processes.py` left: its folder, and its results."""
    folder = tmp_path_factory.mktemp("two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(folder), str(small_backbone)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return SimpleNamespace(folder=folder, results=json.loads((folder / "results.json").read_text()))


def measured(folder):
    """Rows without seconds."""
    rows = [row for row in Metrics.read(folder) if row["kind"] != "event"]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def relative(one, other):
    """The largest difference, as a share of the largest number."""
    return float((one - other).abs().max() / other.abs().max())


distributed = pytest.mark.distributed


@distributed
@pytest.mark.parametrize("batch", [10, 3])
def test_gradients_do_not_depend_on_who_holds_the_rows(two, batch):
    step = torch.load(two.folder / f"step_{batch}.pt")
    together, alone = step["together"], step["alone"]
    assert together["gradients"].shape == alone["gradients"].shape
    for here, there in zip(together["gradients"], alone["gradients"], strict=True):
        assert there.abs().max() > 0
        assert relative(here, there) <= 1e-5
    held = together["held"]
    assert torch.equal(held.sum(0, keepdim=True), alone["held"])
    assert (held[0] != held[1]).any()  # unevenly
    if batch == 3:
        assert (held == 0).any()  # and not at all


@distributed
def test_gradients_do_not_depend_on_micro_batches(two):
    step, micro = torch.load(two.folder / "step_10.pt"), torch.load(two.folder / "micro.pt")
    assert relative(micro["gradients"], step["alone"]["gradients"]) <= 1e-5


@distributed
def test_a_group_that_lies_on_two_processes_has_the_same_advantages(two):
    step = torch.load(two.folder / "step_10.pt")
    together, alone = step["together"], step["alone"]
    assert together["group"].tolist() == [0] * 5 + [1] * 5 + [2] * 5  # 8 samples here and 7 there
    assert torch.equal(together["row"], alone["row"])
    assert alone["advantage"].abs().max() > 0.5
    torch.testing.assert_close(together["advantage"], alone["advantage"], atol=1e-4, rtol=1e-4)


@distributed
def test_three_steps_give_the_numbers_of_one_process(two):
    here, there = measured(two.folder / "two"), measured(two.folder / "one")
    assert [row["kind"] for row in here] == [row["kind"] for row in there]
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        if one["at"] <= 3:
            assert {name: value for name, value in one.items() if isinstance(value, float)} == pytest.approx(
                {name: value for name, value in other.items() if isinstance(value, float)}, abs=1e-3, rel=1e-3
            )


@distributed
def test_both_processes_end_with_the_same_weights(two):
    assert two.results["weights are equal"]


@distributed
def test_a_stop_that_one_process_hears_stops_both_and_a_resume_gives_the_same_bits(two):
    message, different = two.results["stopped"]
    assert "stopped after step 3 of 4, and saved" in message
    assert different == 1
    assert measured(two.folder / "stopped") == measured(two.folder / "two")
    one, other = checkpoint.newest(two.folder / "stopped"), checkpoint.newest(two.folder / "two")
    assert one.numbers == other.numbers
    assert [name for name in other.tensors if not torch.equal(one.tensors[name], other.tensors[name])] == []


@distributed
def test_a_process_without_samples_still_takes_part(two):
    rows = measured(two.folder / "few")
    assert [(row["kind"], row.get("count"), row.get("samples")) for row in rows] == [
        *(("evaluation", 1, None), ("train", None, 2), ("evaluation", 1, None))
    ]
    assert rows[0]["held_out/red"] > 0


@distributed
def test_a_reward_that_fails_on_one_process_is_masked_there(two):
    (row,) = [row for row in measured(two.folder / "failed") if row["kind"] == "train"]
    assert row["unscored"] == pytest.approx(7 / 15)
    assert row["test/red"] > 0


@distributed
def test_nothing_of_the_group_is_left_once_it_is_closed(two):
    """A thread that is, now and then aborts the interpreter as it ends: a run that went well would look failed."""
    assert two.results["threads of the group"] == []


@distributed
def test_collective_operations(two):
    assert two.results["shares"] == [[0, 1, 1, 2, 2, 3], [0, 0, 1, 1, 2, 2]]
    assert two.results["gathered"] == [0, 1, 2]  # of which the first process had none
    assert two.results["any"] == [False, True, True]


@distributed
def test_more_processes_than_the_launcher_made(two):
    assert "3 processes were asked for, but the launcher made 2" in two.results["three asked for"]
    assert "--nproc 3" in two.results["three asked for"]


@pytest.mark.parametrize(("made", "asked"), [(None, 2), ("2", 1), ("4", 2)])
def test_another_number_of_processes_than_asked_for(monkeypatch, made, asked):
    if made is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)  # what a launcher that starts one process leaves
    else:
        monkeypatch.setenv("WORLD_SIZE", made)
    with pytest.raises(DistributedError, match=f"^--nproc: {asked} processes were asked for, but .* made {made or 1}"):
        dist.start(asked, "cpu")


@pytest.mark.parametrize(
    ("device", "there", "place"), [("cuda", 1, "cuda:0"), ("cuda:1", 2, "cuda:1"), ("auto", 2, "cuda:0")]
)
def test_a_run_has_the_device_that_it_names(monkeypatch, device, there, place):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert dist.start(1, device).device == torch.device(place)
    assert chosen == [torch.device(place).index]


@pytest.mark.parametrize(
    ("made", "device", "there", "message"),
    [
        (1, "cuda", 0, "no CUDA device is available. Use run.device=cpu"),
        (1, "cuda:2", 2, "no CUDA device 2 is available"),
        (2, "cuda:0", 2, "2 processes cannot share the one device cuda:0. Use run.device=cuda"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, made, device, there, message):
    monkeypatch.setenv("WORLD_SIZE", str(made))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(DistributedError, match=message):
        dist.start(made, device)


def test_fewer_samples_than_processes_are_refused_at_the_start():
    small = ["data.per_step=1", "data.group=3", "algorithm.window=3", "learner.batch=9"]
    stage = recipe.read("quickstart", [f"stages.main.{word}" for word in small]).stages[0]
    with pytest.raises(DistributedError, match=r"^stages\.main: 4 processes cannot share 3 samples\. Start fewer, or"):
        Run(None, stage, None, Processes(0, 4), None, None)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_cover_everything_once(count):
    for total in range(20):
        shares = [Processes(rank, count).share(total) for rank in range(count)]
        assert [position for share in shares for position in share] == list(range(total))
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert sizes[0] == max(sizes)  # the first has something to show whenever anyone has
