"""Checks that need two processes which know each other. `test_distributed.py` starts this file under torchrun, once,
since most of the time goes into imports, and asserts on what it leaves in the folder that it is given."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from rlkit import dist, recipe, session
from rlkit.dist import Processes
from rlkit.errors import DistributedError
from rlkit.run import Interrupted, Run
from rlkit.scoring import WeightedReward
from rlkit.types import Loss

# Three groups of five over two processes: 8 and 7 samples, the second group torn apart, rows that divide unevenly.
STAGE = {
    "data": {"name": "world", "per_step": 3, "group": 5},
    "rollout": {"name": "local", "steps": 4},
    "algorithm": {
        "name": "flow_grpo",
        "clip": 2e-3,
        "window": 2,
        "window_start": [0, 1],
        "shared_noise": True,
        "kl": 1,
    },
    "rewards": {"composition": 1.0},  # in its place come the rewards below
    "learner": {"lr": 1e-3, "batch": 10, "ema": 0.9},
    "evaluate": {"every": 2, "held_out": 5},
    "steps": 3,
}


def build(backbone, reward=None, **changes):
    run = {"checkpoint_every": 1, "keep_checkpoints": 99, "wandb": "disabled", "device": "cpu", "deterministic": True}
    policy = {"backbone": {"name": "tiny", "path": backbone}}
    setup = recipe.resolve(
        {"run": {**run, "max_unscored": 1.0}, "policy": policy, "stages": {"main": {**STAGE, **changes}}}
    )
    stages = tuple(
        replace(stage, rewards=(WeightedReward("test", reward or Brightness(), 1.0),)) for stage in setup.stages
    )
    return replace(setup, stages=stages)


class Brightness:
    """Mean brightness, in two components."""

    def __call__(self, samples):
        values = samples.media.mean((1, 2, 3))
        return values, {"red": samples.media[:, 0].mean((1, 2)), "blue": samples.media[:, 2].mean((1, 2))}


class StopSecond(Brightness):
    """The second process alone is asked to stop, in the third step."""

    def __init__(self):
        self.calls = 0

    def __call__(self, samples):
        self.calls += 1
        if self.calls == 5 and os.environ["RANK"] == "1":  # two evaluations and two steps came before
            os.kill(os.getpid(), signal.SIGINT)
        return super().__call__(samples)


class FailSecond(Brightness):
    """Scores nothing on the second process, and so has no components there."""

    def __call__(self, samples):
        if os.environ["RANK"] == "1":
            raise RuntimeError("no GPU left for this reward")
        return super().__call__(samples)


def two_weightings(algorithm):
    """The algorithm's loss with one more term that is averaged over other rows, some of which no process may have."""

    def loss(models, rows):
        result = algorithm.loss(models, rows)
        size = models.current.velocity(rows.x, rows.sigma, rows.cond).square().mean((1, 2, 3))
        weight = (rows.row % 3 == 0).float() * (1 + rows.row % 2)
        return Loss({**result.terms, "size": (size, weight)}, result.metrics)

    return loss


def first_step(setup, processes, batch):
    """Gradients of every mini-batch of the first step, without any update: ([batches, parameters], rows here)."""
    policy = session.load_policy(setup, processes)
    run = Run(setup, setup.stages[0], policy, processes, tracker=None, folder=None)
    run.anchor()
    context = run.context(0)
    samples = run.rollout.collect(run.prompts.draw(0, "main", 0), run.algorithm.plan(context), context)
    scores = run.scoring(samples, processes.gather)
    rows = run.algorithm.rows(samples, scores, context)
    gradients, held = [], []
    for part in rows.batches(batch, context):
        run.learner.gradient(two_weightings(run.algorithm), policy.models, part)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.trainable.values()]))
        held.append(len(part))
    return {
        "gradients": torch.stack(gradients),
        "held": processes.gather(torch.tensor([held])),  # [processes, batches]
        "advantage": processes.gather(rows.advantage),  # in the order of rows: shares are contiguous
        "group": processes.gather(samples.group),
        "row": processes.gather(rows.row),
    }


def weights_everywhere(processes, policy):
    """[processes, parameters]"""
    flat = torch.cat([parameter.detach().flatten() for parameter in policy.trainable.values()])
    return processes.gather(flat[None])


def main(folder, backbone):
    results = {}
    try:
        dist.start(3, "cpu")
    except DistributedError as error:
        results["three asked for"] = str(error)
    processes = dist.start(2, "cpu")
    alone = Processes()

    results["shares"] = processes.gather(torch.tensor([[len(processes.share(n)) for n in range(6)]])).tolist()
    results["gathered"] = processes.gather(torch.arange(3 * processes.rank).float()).tolist()
    results["any"] = [processes.any(flag) for flag in (False, processes.rank == 1, True)]

    torch.manual_seed(processes.rank)  # nothing of rlkit may draw from it
    for batch in (10, 3):
        together = first_step(build(backbone), processes, batch)
        one = first_step(build(backbone), alone, batch)  # on both processes, without a word to each other
        if processes.first:
            torch.save({"together": together, "alone": one}, folder / f"step_{batch}.pt")
    micro = first_step(build(backbone, learner={**STAGE["learner"], "micro_batch": 2}), processes, 10)
    if processes.first:
        torch.save(micro, folder / "micro.pt")

    policies = []
    load = session.load_policy
    session.load_policy = lambda *arguments: policies.append(load(*arguments)) or policies[-1]

    def run(name, setup, who=processes, resume=False):
        session.run(setup, folder / name, who, resume=resume, quiet=True)
        return weights_everywhere(processes, policies[-1]) if who is processes else None

    both = run("two", build(backbone, steps=4))
    results["weights are equal"] = torch.equal(both[0], both[1])
    if processes.first:
        run("one", build(backbone, steps=4), alone)
    processes.wait()
    try:
        run("stopped", build(backbone, StopSecond(), steps=4))
        stopped = "not at all"
    except Interrupted as error:
        stopped = str(error)
    lengths = processes.gather(torch.tensor([len(stopped)]))
    results["stopped"] = [stopped, len(set(lengths.tolist()))]
    run("stopped", build(backbone, steps=4), resume=True)

    few = {"steps": 1, "evaluate": {"every": 0, "ends": 1}, "data": {"name": "world", "per_step": 1, "group": 2}}
    run("few", build(backbone, **few, learner={"lr": 1e-3, "batch": 1}))
    run("failed", build(backbone, FailSecond(), steps=1))

    policies.clear()
    processes.close()
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    results["threads of the group"] = [name for name in threads if "gloo" in name]
    if processes.first:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
