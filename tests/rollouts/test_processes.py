"""Sampling in worker processes: the numbers of `local`, whatever happens to a worker.

Most of it runs on a toy backbone, which this file is for the workers: they start in the time that torch needs.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlkit import dist, recipe, registry
from rlkit.data.prompts import PromptBatch
from rlkit.errors import RecipeError
from rlkit.policy import Policy
from rlkit.rollouts import processes as module
from rlkit.rollouts.local import Local
from rlkit.rollouts.processes import Processes, ProcessesRollout
from rlkit.run import Run
from rlkit.scoring import WeightedReward
from rlkit.tracking import Metrics, Tracker
from rlkit.trainer import train
from rlkit.types import Context, FlowModel, Plan, Prompt, Samples
from rlkit.weights import Lora
from rlkit.workers.sample_wire import send
from rlkit.workers.worker import WorkerError

CPU = torch.device("cpu")
HERE = Path(__file__).parent
STEPS = 3
TEXTS = ("a red circle", "two blue crosses", "a cyan square")
PROMPTS = PromptBatch(tuple(Prompt(i, text) for i, text in enumerate(TEXTS)), group=4)  # 6 samples a worker of two
PLAN = Plan(dynamics="flow", noise_level=0.7, window=(0, 2), record=True)
MakeContext = Callable[..., Context]


@dataclass(frozen=True)
class Toy:
    """The toy network of conftest, as a backbone that workers can load."""

    dies: bool = False
    waits: str | None = None  # a pipe that is opened once it waits

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        from conftest import toy_model

        if self.dies:
            print("no room for the network", file=sys.stderr, flush=True)
            os._exit(3)
        if self.waits:
            with open(self.waits, "w"):
                pass
            signal.pause()
        return replace(toy_model(), at=lambda size: replace(toy_model(), latent_shape=(4, size[0] // 2, size[1] // 2)))


@pytest.fixture(scope="module", autouse=True)
def workers_find_the_toy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))
        yield


def toy(**options: Any) -> Policy:
    policy = Policy(Toy().load(CPU, torch.float32), None, CPU, "fp32", 0)
    policy.origin = ("test_processes:Toy", options)
    return policy


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessesRollout]:
    """Two workers. Tests may change the weights and end workers."""
    rollout = Processes(workers=2, steps=STEPS, batch=6, restarts=9).start(toy(), dist.Processes())
    yield rollout
    rollout.close()


def same(one: Any, other: Any) -> bool:
    """To the bit; NaN equals NaN."""
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool(((one == other) | (one != one)).all())
    if isinstance(one, Samples) or type(one).__name__ == "Path":
        assert [name for name in vars(one) if not same(vars(one)[name], vars(other)[name])] == []
        return True
    return bool(one == other)


def locally(rollout: ProcessesRollout, plan: Plan, context: Context, prompts: PromptBatch = PROMPTS) -> Samples:
    """What `local` draws with the learner's policy, in batches as large as a worker's."""
    options = Local(steps=rollout.options.steps, batch=-(-len(prompts) // rollout.options.workers))
    there = options.start(rollout.policy, rollout.processes)
    there.load({}, rollout.version)
    return there.collect(prompts, plan, context)


# ---- the numbers of `local` ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        Plan(),
        replace(PLAN, dynamics="cps", shared_noise=True),
        replace(PLAN, completions=0, shared_noise=True),
        replace(PLAN, dynamics="dance", noise_level=(0.1, 0.2, 0.3), completions=2),
        replace(PLAN, steps=5, tail=1, solver="dpm"),
        Plan(record=True),
    ],
    ids=["grpo", "ode", "shared", "previews", "own previews", "tail", "recorded ode"],
)
def test_the_numbers_are_locals(pool: ProcessesRollout, context: MakeContext, plan: Plan) -> None:
    assert same(pool.collect(PROMPTS, plan, context(step=5)), locally(pool, plan, context(step=5)))


def test_pictures_of_another_size(pool: ProcessesRollout, context: MakeContext) -> None:
    def sized(height: int, width: int) -> PromptBatch:
        return PromptBatch(tuple(replace(one, size=(height, width)) for one in PROMPTS.prompts), 4)

    drawn = pool.collect(sized(8, 2), PLAN, context())
    assert drawn.media.shape == (12, 3, 8, 2)
    assert same(drawn, locally(pool, PLAN, context(), sized(8, 2)))
    assert not torch.equal(drawn.latents.flatten(1), pool.collect(PROMPTS, PLAN, context()).latents.flatten(1))
    faults = [child.faults for child in pool.children]
    with pytest.raises(WorkerError, match=r"worker 0: RuntimeError"):  # the toy has weights for 16 numbers a picture
        pool.collect(sized(8, 4), PLAN, context())
    assert [child.faults for child in pool.children] == faults, "what is wrong with a request no new start would mend"


def test_prompts_with_pictures_are_told_apart(pool: ProcessesRollout, context: MakeContext) -> None:
    pictures = [torch.full((3, 4, 4), shade) for shade in (0.0, 1.0)]
    edits = PromptBatch(tuple(Prompt(i, "brighter", source=one) for i, one in enumerate(pictures)), 2)
    drawn = pool.collect(edits, replace(PLAN, shared_noise=True), context())
    assert same(drawn, locally(pool, replace(PLAN, shared_noise=True), context(), edits))
    assert drawn.prompts[3].source is pictures[1]


def test_learner_processes_share_a_step_and_workers_share_theirs(pool: ProcessesRollout, context: MakeContext) -> None:
    whole = pool.collect(PROMPTS, Plan(), context())
    parts = []
    try:
        for rank in range(3):
            pool.processes = dist.Processes(rank, 3)
            parts.append(pool.collect(PROMPTS, Plan(), context()))
    finally:
        pool.processes = dist.Processes()
    assert [len(part) for part in parts] == [4, 4, 4]
    assert torch.cat([part.index for part in parts]).tolist() == list(range(12))
    torch.testing.assert_close(torch.cat([part.latents for part in parts]), whole.latents, rtol=0, atol=1e-5)


def test_fewer_samples_than_workers(pool: ProcessesRollout, context: MakeContext) -> None:
    one = PromptBatch(PROMPTS.prompts[:1], 1)
    assert same(pool.collect(one, PLAN, context()), locally(pool, PLAN, context(), one))
    try:
        pool.processes = dist.Processes(1, 2)
        empty = pool.collect(one, PLAN, context())
    finally:
        pool.processes = dist.Processes()
    assert len(empty) == 0
    assert empty.latents.shape == (0, 4, 2, 2)


def test_parts_are_told_of_and_calls_counted(pool: ProcessesRollout, context: MakeContext) -> None:
    told: list[Samples] = []
    pool.policy.take_calls()
    whole = pool.collect(PROMPTS, PLAN, context(sampled=told.append))
    assert pool.policy.take_calls() == 12 * STEPS
    assert torch.equal(torch.cat([part.media for part in told]), whole.media)
    assert torch.cat([part.index for part in told]).tolist() == list(range(12))


# ---- weights ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_workers_follow_the_weights_and_are_sent_them_once(
    pool: ProcessesRollout, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = pool.policy
    before = pool.collect(PROMPTS, PLAN, context())
    policy.keep("ema")
    for parameter in policy.trainable.values():
        parameter.mul_(1.3)
    pool.load({}, 7)
    after = pool.collect(PROMPTS, PLAN, context())
    assert same(after, locally(pool, PLAN, context()))
    assert not torch.equal(after.latents, before.latents)
    assert (before.version, after.version) == (0, 7)
    sent = pool.sent
    pool.load({}, 8)  # a version of the same weights
    again = pool.collect(PROMPTS, PLAN, context())
    assert (pool.sent, again.version) == (sent, 8)
    kept = replace(PLAN, policy_set="ema")
    assert torch.equal(pool.collect(PROMPTS, kept, context()).latents, before.latents)
    policy.blend("ema", 0.5)
    assert same(pool.collect(PROMPTS, kept, context()), locally(pool, kept, context()))
    for scale in (2.0, 3.0):  # made anew each time: nothing was written to, and yet it is another
        policy.keep("ema", {name: one * scale for name, one in policy.snapshot().items()})
        assert same(pool.collect(PROMPTS, kept, context()), locally(pool, kept, context()))
    policy.drop("ema")
    with pytest.raises(KeyError, match="no set 'ema'"):
        pool.collect(PROMPTS, kept, context())


def test_a_worker_says_when_it_has_other_weights(pool: ProcessesRollout, context: MakeContext) -> None:
    pool.collect(PROMPTS, PLAN, context())
    held = pool.children[1].holds
    pool.sent = held + 1
    try:
        for child in pool.children:
            child.holds = held + 1  # which is not true
        with pytest.raises(WorkerError, match=f"holds weights {held}, and was asked for weights {held + 1}"):
            pool.collect(PROMPTS, PLAN, context())
    finally:
        pool._last = None  # they are sent again
    assert same(pool.collect(PROMPTS, PLAN, context()), locally(pool, PLAN, context()))


def test_the_shipped_base_with_lora_and_guidance(context: MakeContext) -> None:
    backbone = registry.build("backbones", "tiny", {}).load(CPU, torch.float32)
    policy = Policy(backbone, Lora(rank=2), CPU, "fp32", 1, guidance=2.0, negative="a red circle")
    policy.origin = ("tiny", {})
    rollout = Processes(steps=STEPS).start(policy, dist.Processes())
    try:
        first = rollout.collect(PROMPTS, PLAN, context())
        assert same(first, locally(rollout, PLAN, context()))
        with torch.no_grad():
            for parameter in policy.trainable.values():
                parameter.add_(0.05)
        rollout.load({}, 1)
        second = rollout.collect(PROMPTS, PLAN, context())
        assert same(second, locally(rollout, PLAN, context()))
        assert not torch.equal(first.latents, second.latents)
    finally:
        rollout.close()


def test_a_run_is_the_same_run(tmp_path: Path) -> None:
    stage = {
        "data": {"name": "world", "per_step": 2, "group": 4},
        "rollout": {"name": "local", "steps": STEPS},
        "algorithm": {"name": "flow_grpo", "clip": 2e-3, "window": 2, "window_start": [0, 1], "shared_noise": True},
        "rewards": {"brightness": 1.0},
        "learner": {"lr": 1e-2, "batch": 8},
        "evaluate": {"every": 1, "held_out": 4},
        "steps": 2,
    }
    run = {"wandb": "disabled", "device": "cpu", "threads": 1}
    policy = {"backbone": {"name": "tiny"}, "train": {"full": True}}
    setup = recipe.resolve({"run": run, "policy": policy, "stages": {"main": stage}})

    def brightness(samples: Samples) -> Tensor:
        return samples.media.mean((1, 2, 3))

    def rows(rollout: Any) -> list[dict[str, Any]]:
        here = replace(setup.stages[0], rollout=rollout, rewards=(WeightedReward("test", brightness, 1.0),))
        folder = tmp_path / type(rollout).__name__
        tracker = Tracker(folder, config=setup.recipe, wandb="disabled", quiet=True, first=True)
        under_way = Run(setup, here, toy(), dist.Processes(), tracker, folder)
        try:
            under_way.anchor()
            under_way.begin()
            train(under_way)
        finally:
            under_way.close()
            tracker.close()
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in Metrics.read(folder)]

    expected = rows(Local(steps=STEPS))
    assert [row["kind"] for row in expected] == ["train", "evaluation"] * 2
    assert expected[0] != expected[2]
    assert rows(Processes(steps=STEPS)) == expected


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_in_the_middle_changes_nothing(
    pool: ProcessesRollout, context: MakeContext, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():  # a new worker must get these, not the backbone's own
        for parameter in pool.policy.trainable.values():
            parameter.mul_(0.9)
    expected = pool.collect(PROMPTS, PLAN, context())
    child, faults = pool.children[1], pool.children[1].faults
    process = child.process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)  # so that it cannot have answered
    receive = module.receive

    def killed(line: Any, seconds: float) -> bytes:
        if line is child.line and process.poll() is None:
            process.kill()
        return receive(line, seconds)

    monkeypatch.setattr(module, "receive", killed)
    pool.policy.take_calls()
    with caplog.at_level(logging.WARNING):
        assert same(pool.collect(PROMPTS, PLAN, context()), expected)
    assert pool.policy.take_calls() == 12 * STEPS, "nothing is counted twice"
    assert child.faults == faults + 1
    assert child.process is not process
    assert "worker 1 was ended by SIGKILL: it is started again" in caplog.text
    assert pool.health().startswith("ok, with workers started again: ")


def test_a_worker_that_hangs_is_killed(
    pool: ProcessesRollout, context: MakeContext, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = pool.collect(PROMPTS, PLAN, context())
    child = pool.children[0]
    process, spawn, patience = child.process, child.spawn, child.timeout
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)

    def patient() -> None:  # the time is for the one that hangs: a busy machine may be slow
        child.timeout = patience
        spawn()

    monkeypatch.setattr(child, "timeout", 0.2)
    monkeypatch.setattr(child, "spawn", patient)
    with caplog.at_level(logging.WARNING):
        assert same(pool.collect(PROMPTS, PLAN, context()), expected)
    assert process.poll() == -signal.SIGKILL
    assert "worker 0 gave no answer in" in caplog.text


def test_a_worker_that_dies_twice_ends_the_run_with_its_last_words(context: MakeContext) -> None:
    rollout = Processes(restarts=1).start(toy(dies=True), dist.Processes())
    with pytest.raises(WorkerError) as caught:
        rollout.collect(PROMPTS, PLAN, context())
    assert "rollout: worker 0 ended with code 3, after 1 new starts." in str(caught.value)
    assert "no room for the network" in str(caught.value)
    rollout.close()


def test_a_worker_ends_in_the_middle_of_its_work_when_the_learner_is_gone(tmp_path: Path) -> None:
    pipe = tmp_path / "waiting"
    os.mkfifo(pipe)
    rollout = Processes().start(toy(waits=str(pipe)), dist.Processes())
    (child,) = rollout.children
    child.spawn()
    process = child.process
    assert process is not None
    assert child.line is not None
    send(child.line, child.described())
    with open(pipe):  # until it is in the middle of loading
        pass
    child.line.close()  # as the system does for a learner that was killed
    assert process.wait(120) == 0
    rollout.close()


def test_close_leaves_no_worker(pool: ProcessesRollout, context: MakeContext) -> None:
    pool.collect(PROMPTS, PLAN, context())
    living = [child.process for child in pool.children]
    pool.close()
    assert [process.poll() for process in living if process is not None] == [0, 0]
    pool.close()  # again does nothing


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"workers": 0}, "workers must be 1 or more, not 0"),
        ({"threads": 0}, "threads must be 1 or more"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"batch": 0}, "batch must be 1 or more"),
        ({"restarts": -1}, "restarts must be 0 or more"),
        ({"timeout": 0.0}, "timeout must be seconds above 0"),
        ({"timeout": float("nan")}, "timeout must be seconds above 0"),
        ({"device": ()}, "device must name one device"),
        ({"device": "gpu1"}, "device must be like cpu, cuda or cuda:1, not 'gpu1'"),
    ],
)
def test_option_errors(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Processes(**options)


def test_devices_are_taken_in_turns() -> None:
    options = registry.build("rollouts", "processes", {"workers": 3, "device": ["cuda:0", "cuda:1"]})
    rollout = options.start(toy(), dist.Processes())
    assert [child.described.args[0] for child in rollout.children] == ["cuda:0", "cuda:1", "cuda:0"]
    assert Processes().devices("cuda:3") == ("cuda:3",)
    rollout.close()


def test_a_policy_of_nowhere_is_refused() -> None:
    policy = toy()
    policy.origin = None
    with pytest.raises(RecipeError, match="nothing says which backbone"):
        Processes().start(policy, dist.Processes())
