"""A stage under way: everything that the loop touches, and what comes before, between and after its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkit import checkpoint
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.errors import DistributedError, LossError, RecipeError, RlkitError, nearest
from rlkit.held_out import close_rollout, of_one_size, of_others, showing, under
from rlkit.language import LanguagePolicy
from rlkit.learner import Learner
from rlkit.monitors.reading import Reading
from rlkit.monitors.sanity import judged, refused
from rlkit.monitors.watch import Raised, Watch
from rlkit.parts import Parts
from rlkit.policy import Policy
from rlkit.record import describe_ages, describe_held_out, describe_scores, set_aside, write_rows, write_sheet
from rlkit.scoring import Scoring
from rlkit.stages import TIMES, Setup, Stage
from rlkit.sync import SharedMemory
from rlkit.tracking import HELD_OUT, Metrics, Tracker
from rlkit.types import Context, Plan, Prompt, Rows, Samples, Scores, State, Tools, seed_of
from rlkit.weights import Weights


class Interrupted(RlkitError):
    """The run was asked to stop, and has saved itself."""


@dataclass
class Stop:
    """Whether somebody has asked the run to end: one for all of its stages, so that none forgets it."""

    asked: bool = False


class Run:
    """A stage under way: everything that its loop touches."""

    def __init__(
        self,
        setup: Setup,
        stage: Stage,
        policy: Policy | LanguagePolicy | Parts,
        processes: Processes,
        tracker: Tracker,
        folder: Path,
        offset: int = 0,
        stop: Stop | None = None,
    ) -> None:
        fewest = min(stage.data.per_step * stage.data.group, stage.evaluate.held_out or processes.count)
        if fewest < processes.count:
            raise DistributedError(
                f"{processes.count} processes cannot share {fewest} samples",
                where=f"stages.{stage.name}",
                hint="Start fewer, or sample more: data.per_step, data.group, evaluate.held_out.",
            )
        self.setup, self.stage, self.policy, self.processes = setup, stage, policy, processes
        self.tracker, self.folder = tracker, folder
        self.offset = offset  # training steps of the stages before
        self.done = 0  # finished steps of this stage
        self.algorithm = stage.algorithm
        begin(policy, stage)
        self.learner = Learner(policy, stage.learner, processes)
        self.rollout = stage.rollout.start(policy, processes)
        self.prompts = stage.data.open()
        self.scoring = Scoring(stage.rewards, setup.options.max_unscored, stage.total, processes.device)
        self.sync = SharedMemory()
        self.models = policy.models_with(self.scoring.with_gradient)
        self.state: State = {}
        self.clock: dict[str, float] = {}
        self.cpu = 0.0  # seconds of the processor in this step
        self.spent = dict.fromkeys(TIMES, 0.0)  # on this stage's steps so far
        self.over = False
        self.goal_reached = False  # the stage's `until`
        self.closed = False  # the newest evaluation is one of the stage's ends
        self.flat: dict[str, Any] = {}  # of its plateau: the metric, the best so far, and evaluations since
        self.saved: int | None = None  # `done` of the newest checkpoint
        self.stop = stop or Stop()
        self.monitors = Watch(stage.monitors)
        self.ended_by: dict[str, Any] = {}  # the monitors that ended the stage, with their options

    def close(self) -> None:
        """Let go of what rewards and the rollout have loaded or started."""
        self.scoring.close()
        close_rollout(self.rollout)

    @property
    def at(self) -> int:
        return self.offset + self.done

    def context(self, step: int, stage: str | None = None) -> Context:
        return Context(
            seed=self.setup.options.seed,
            stage=stage or self.stage.name,
            step=step,
            sampling_steps=self.stage.rollout.steps,
            state=self.state,
            gather=self.processes.gather,
            # In training steps alone:
            sampled=self.scoring.begin if stage is None else None,
            coming=(lambda more: self.coming(step + more)) if stage is None else None,
        )

    def coming(self, step: int) -> tuple[PromptBatch, Plan, Context] | None:
        """What a step that is not there yet will ask the rollout for, by what the algorithm knows today."""
        if step >= self.stage.steps:
            return None
        context = self.context(step)
        prompts = self.prompts.draw(self.setup.options.seed, self.stage.name, step)
        return prompts, self.algorithm.plan(context), context

    def steps(self) -> Iterator[int]:
        """The steps that are left. Between two of them the run looks whether it should stop."""
        while not self.over:
            self.stop_if_asked()
            self.seed_torch(self.stage.name, self.done)
            yield self.done

    def seed_torch(self, *moment: object) -> None:
        """Seed torch's own generators. rlkit draws nothing from them, but a reward of somebody's may, and then has to
        draw the same in a resumed run."""
        torch.manual_seed(seed_of(self.setup.options.seed, *moment, self.processes.rank))

    def stop_if_asked(self) -> None:
        """Save and raise Interrupted if one process was asked to stop: on all of them alike."""
        if self.processes.any(self.stop.asked):
            if self.saved != self.done:
                self.save()
            raise Interrupted(
                f"stopped after step {self.done} of {self.stage.steps}, and saved",
                where=f"stages.{self.stage.name}",
                hint=f"Go on with: rlkit train --resume {self.folder}",
            )

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started, cpu = time.monotonic(), time.process_time()
        yield
        self.clock[phase] = self.clock.get(phase, 0.0) + time.monotonic() - started
        self.cpu += time.process_time() - cpu

    def report(self, step: int, samples: Samples, scores: Scores) -> None:
        """Close a step: its row of metrics, then the evaluation and the checkpoint that are due."""
        self.done = step + 1
        learned = self.learner.metrics()
        row = {"kind": "train", "stage": self.stage.name, "step": self.done, "at": self.at}
        row |= describe_scores(samples, scores, self.processes.gather) | learned
        row |= describe_ages(samples, step, self.processes.gather)
        row |= {f"seconds/{phase}": seconds for phase, seconds in self.clock.items()} | {"samples": samples.total}
        row["network_calls"] = int(self.processes.add(torch.tensor([self.policy.take_calls()])))
        row["cpu_seconds"] = self.cpu
        for name, seconds in zip(TIMES, (sum(self.clock.values()), self.cpu), strict=True):
            self.spent[name] += seconds
        self.clock, self.cpu = {}, 0.0
        self.watched(row, samples, scores)
        self.over = self.done >= self.stage.steps or self.out_of_time() or bool(self.ended_by)
        every = self.stage.evaluate.every
        if self.over or (every and self.done % every == 0):
            self.goal_reached = self.evaluate(end=self.over)
            self.over = self.over or self.goal_reached or bool(self.ended_by)
        if self.ended_with("roll_back"):
            self.roll_back()
        if self.over and not self.closed:
            self.evaluate(end=True, decides=False)
        if self.over or self.done % self.setup.options.checkpoint_every == 0 or self.monitors.best_at == self.at:
            self.save()

    def open(self) -> None:
        """What comes before the first step and leaves the weights alone: are the rewards sane, what does the policy do
        untrained? A monitor may want to come back to it."""
        self.flat, self.monitors.memory = {}, {}  # a run that was stopped here has them from this very evaluation
        self.warn_of_unread_words()
        self.check_rewards()
        self.evaluate(end=True)
        if self.monitors.best_at == self.at:
            self.save()

    def check_rewards(self) -> None:
        """The monitor `sanity`, where it is asked for. RewardError where it refuses to train."""
        sanity = self.stage.monitors.sanity
        if sanity is None:
            return
        self.seed_torch(self.stage.name, "sanity")
        found = judged(sanity, self.scoring, self.processes.share, self.processes.gather)
        error = refused(sanity, found, f"stages.{self.stage.name}.monitors.sanity")
        row = {"kind": "event", "event": "sanity", "stage": self.stage.name, "step": self.done, "at": self.at}
        row |= {f"monitor/sanity/{name}": share for name, share in found.items()}
        if error is None:
            self.tracker.write(row)
            return
        worst = min(found.values())
        alarm = {"event": "alarm", "monitor": "sanity", "value": worst, "threshold": sanity.at_least}
        self.tracker.write(row | alarm | {"action": sanity.action, "text": f"alarm, sanity: {error.what}"})
        if sanity.action == "stop":
            raise error

    def watched(self, row: dict[str, Any], samples: Samples, scores: Scores) -> None:
        """Write a row with the monitors' figures, and after it the alarms that are new."""
        figures, raised = self.look(row, samples, scores)
        self.write(row | figures, raised)

    def look(self, row: dict[str, Any], samples: Samples, scores: Scores) -> tuple[dict[str, float], list[Raised]]:
        gather, precision = self.processes.gather, self.setup.options.precision
        return self.monitors.look(Reading(row, samples, scores, self.stage.rewards, gather, precision))

    def write(self, row: dict[str, Any], raised: list[Raised]) -> None:
        self.tracker.write(row)
        for one in raised:
            self.tracker.write(self.described(one))
            if one.action != "warn":
                self.ended_by[one.monitor] = self.monitors.options(one.monitor)

    def described(self, raised: Raised) -> dict[str, Any]:
        row = {"kind": "event", "event": "alarm", "stage": self.stage.name, "step": self.done, "at": self.at}
        row |= {"monitor": raised.monitor, "value": raised.alarm.value, "threshold": raised.alarm.threshold}
        does = {"warn": "", "stop": ": the run ends here", "roll_back": ": the stage ends here"}[raised.action]
        return row | {"action": raised.action, "text": f"alarm, {raised.monitor}: {raised.alarm.text}{does}"}

    def ended_with(self, action: str) -> bool:
        """Whether a monitor whose action this is has ended the stage. After `stop` no other stage begins."""
        return any(options["action"] == action for options in self.ended_by.values())

    def roll_back(self) -> None:
        """Put back what the checkpoint of the best evaluation holds, and evaluate it: the stage ends with that.

        Nothing is saved here. One checkpoint comes after it, so that a run killed before does all of this again.
        """
        best = self.monitors.memory.get("best", {})
        row = {"kind": "event", "event": "rolled_back", "stage": self.stage.name, "step": self.done, "at": self.at}
        if best.get("at") is None:
            text = "nothing to go back to: the stage has no evaluation on held-out prompts"
        elif best["at"] == self.at:
            text = (
                f"the evaluation of step {self.at}, which has just been, is the best ({best['by']} {best['value']:.3f})"
            )
        else:
            text = f"back to the weights of step {best['at']}, the best by {best['by']} ({best['value']:.3f})"
        self.tracker.write(row | {"to": best.get("at"), "text": text})
        if best.get("at") not in (None, self.at):
            self.load(checkpoint.at(self.folder, best["at"]))
            self.sync.push(self.rollout, version=self.done + 1)
            self.evaluate(end=True, restored=best["at"])

    @property
    def timed_by_the_clock(self) -> bool:
        return self.stage.until is not None and self.stage.until.metric in TIMES

    def out_of_time(self) -> bool:
        until = self.stage.until
        if until is None or until.above is None or not self.timed_by_the_clock:
            return False
        return self.processes.any(self.spent[until.metric] > until.above)

    def reached(self, row: Mapping[str, Any]) -> bool:
        """Whether an evaluation ends the stage."""
        until = self.stage.until
        if until is None:
            return False
        if self.timed_by_the_clock:
            return False
        if until.metric not in row:
            known = [name for name in row if name.startswith(HELD_OUT) and not name.endswith("_se")]
            what = f"the evaluations have no {until.metric!r}.{nearest(until.metric, known)}"
            where = f"stages.{self.stage.name}.until.metric"
            raise RecipeError(what, where=where, hint=f"Known: {', '.join(known)}.")
        value = float(row[until.metric])
        if until.above is not None:
            return value > until.above
        if not math.isfinite(value):  # nothing was scored: neither a rise nor none
            return False
        best = self.flat.get("best", float("-inf"))
        since = 0 if value > best + until.least else self.flat.get("since", 0) + 1
        self.flat = {"metric": until.metric, "best": max(best, value), "since": since}
        return since >= (until.plateau or 0)

    def evaluate(self, end: bool, restored: int | None = None, decides: bool = True) -> bool:
        """Score the held-out prompts. True when the stage's goal, `until`, is reached.

        end: with as many pictures as the stage's first and last have, and the other tasks that `evaluate.also` names.
        An evaluation that ends the stage does not know it beforehand: one of that size, which decides nothing, then
        follows it. restored: the step whose weights were put back; the pictures of the weights that they replace are
        kept as STEP-alarm, and the monitors do not look again.
        """
        sizes, decides = self.stage.evaluate, decides and restored is None
        ends = sizes.ends or sizes.held_out
        count = ends if end else sizes.held_out
        prompts = of_one_size(self.prompts.held_out(count))
        if not prompts:
            return False
        started = time.monotonic()
        calls = self.policy.take_calls()
        samples, scores = self.sample_held_out(prompts)
        row: dict[str, Any] = {"kind": "evaluation", "stage": self.stage.name, "step": self.done, "at": self.at}
        row |= describe_held_out(samples, scores, self.processes.gather)
        reached = decides and self.reached(row)
        figures, raised = self.look(row, samples, scores) if decides else ({}, [])
        last = reached or any(one.action != "warn" for one in raised)
        self.closed = end or (last and count == ends)
        if self.closed:
            row |= self.of_other_tasks(row)
        self.policy.calls = calls  # an evaluation's are not the next step's
        row |= {"count": len(prompts), "ends": self.closed, "seconds/evaluate": time.monotonic() - started}
        if self.processes.first:
            if restored is not None:
                set_aside(self.folder / "samples", row)
            sheet = write_sheet(self.folder / "samples", row, samples, scores)
            self.tracker.sheet(sheet)
        self.write(row | figures | ({} if restored is None else {"restored": restored}), raised)
        return reached

    def of_other_tasks(self, row: Mapping[str, Any]) -> dict[str, float]:
        """What `evaluate.also` asks for beside the stage's own evaluation, which is `row`."""
        if not self.stage.also:
            return {}
        more = of_others(self.stage, self.policy, self.processes, self.setup.options, self.rollout)
        more |= under(self.stage.name, row) if self.stage.name in self.stage.evaluate.also else {}
        if clash := sorted(row.keys() & more.keys()):
            what = f"{clash[0]} is the score of a kind of this stage's prompts already."
            where = f"stages.{self.stage.name}.evaluate.also"
            raise RecipeError(what, where=where, hint="Give that stage another name.")
        return more

    def sample_held_out(self, prompts: tuple[Prompt, ...]) -> tuple[Samples, Scores]:
        plan = showing(self.stage, self.policy)
        samples = self.rollout.collect(PromptBatch(prompts, 1), plan, self.context(0, "evaluate"))
        self.seed_torch("evaluate")
        return samples, self.scoring(samples, self.processes.gather, held_out=True)

    def warn_of_unread_words(self) -> None:
        """Count a user's prompts that the text encoder cannot read as they are written."""
        texts = self.prompts.texts()
        unread = {text: words for text in texts if (words := self.policy.model.unread(text))}
        if unread:
            text, words = next(iter(unread.items()))
            warning = (
                f"warning: {len(unread)} of {len(texts)} prompts have words that the text encoder cannot read, "
                f"for instance {', '.join(map(repr, words))} in {text!r}"
            )
            row = {"kind": "event", "event": "unknown_words", "stage": self.stage.name, "step": 0, "at": self.at}
            self.tracker.write(row | {"text": warning, "count": len(unread)})

    def begin(self) -> None:
        """What a stage does before its first step, and a resumed one has done: make `old`, calibrate the algorithm."""
        if self.algorithm.needs().old:
            self.policy.keep("old")
        else:
            self.policy.drop("old")
        context = self.context(0)

        def sample(plan: Plan, round: int) -> tuple[Samples, Scores]:
            stage = f"{self.stage.name} start"
            prompts = self.prompts.draw(self.setup.options.seed, stage, round)
            samples = self.rollout.collect(prompts, plan, self.context(round, stage))
            self.seed_torch(stage, round)
            return samples, self.scoring(samples, self.processes.gather)

        with self.timed("start"):
            self.state.update(self.algorithm.start(Tools(context, sample)))

    @contextmanager
    def saving_what_fails(self, batch: Rows, step: int) -> Iterator[None]:
        """Keep the rows whose loss was not finite, for whoever looks for the reason, and say where they are."""
        try:
            yield
        except LossError as error:
            rank = f"-process{self.processes.rank}" if self.processes.count > 1 else ""
            file = self.folder / "failed" / f"{self.stage.name}-{step + 1:06d}{rank}.safetensors"
            write_rows(file, batch, error.row)
            name = type(self.algorithm).__name__
            raise LossError(
                f"{name}: {error.what}, in step {step + 1}",
                where=f"stages.{self.stage.name}.algorithm",
                hint=f"Nothing was updated, and the checkpoints are whole. The rows are in {file}. A lower learner.lr, "
                "a shorter window or rewards without extremes are the usual cures.",
            ) from error

    def take_over(self, moments: Mapping[str, Tensor] | None) -> None:
        """Begin a stage: with the moments of the optimiser before it, if there are any. The average begins anew."""
        if moments is not None:
            self.learner.load_state(moments, {"updates": 0})
        if self.stage.learner.ema is None:
            self.policy.drop("ema")
        else:
            self.policy.keep("ema")

    def anchor(self) -> None:
        """Make the set that the algorithm measures its KL from. A copy of the stage's start is in the checkpoints."""
        if not self.algorithm.needs().reference:
            self.policy.drop("reference")
        elif self.stage.anchor == "base":
            self.policy.keep("reference", self.policy.base)
        elif self.stage.anchor == "ema":
            self.policy.keep("reference", self.policy.sets["ema"])
        elif self.done == 0:
            self.policy.keep("reference")

    def save(self) -> None:
        if self.processes.first:
            optimizer, numbers = self.learner.state()
            remembered = {k: v for k, v in self.state.items() if isinstance(v, Tensor)}
            tensors = {f"policy/{k}": v for k, v in self.policy.state().items()}
            tensors |= {f"optimizer/{k}": v for k, v in optimizer.items()}
            tensors |= {f"state/{k}": v for k, v in remembered.items()}
            described = {
                "stage": self.stage.name,
                "done": self.done,
                "spent": self.spent if self.timed_by_the_clock else None,  # else a run's files would differ by it
                "reached": asdict(self.stage.until) if self.stage.until and self.goal_reached else None,
                "flat": self.flat,
                "monitors": self.monitors.memory,
                "ended_by": self.ended_by,
                "learner": numbers,
                "state": {k: v for k, v in self.state.items() if not isinstance(v, Tensor)},
                "recipe": self.setup.recipe,
            }
            keep, best = self.setup.options.keep_checkpoints, self.monitors.best_at
            checkpoint.save(self.folder, self.at, tensors, described, keep, spare=() if best is None else (best,))
        self.saved = self.done
        self.processes.wait()

    def spent_by_the_record(self) -> dict[str, float]:
        """The stage's times so far, of a run that had no goal by the clock when it was stopped, and now has one."""
        if not self.timed_by_the_clock:
            return {}
        rows = Metrics.read(self.folder)
        steps = [row for row in rows if row.get("kind") == "train" and row.get("stage") == self.stage.name]
        clock = sum(value for row in steps for key, value in row.items() if key.startswith("seconds/"))
        return dict(zip(TIMES, (clock, sum(row["cpu_seconds"] for row in steps)), strict=True))

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Weights, sets, optimiser and the algorithm's state as a checkpoint of this stage has them."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in saved.tensors.items() if k.startswith(prefix)}

        self.policy.load_state(part("policy/"))
        self.learner.load_state(part("optimizer/"), saved.numbers["learner"])
        self.state.clear()
        self.state.update(part("state/") | saved.numbers["state"])
        # What is in the checkpoint is the stage's start, or where the algorithm has moved its reference since.
        if not any(name.startswith("policy/reference/") for name in saved.tensors):
            self.anchor()

    def hand_over(self, following: Stage) -> dict[str, Tensor] | None:
        """End a stage as the one behind it wants to begin: the optimiser's moments, if it takes them."""
        if following.carry.weights == "ema":
            self.policy.adopt("ema")
        return self.learner.state()[0] if following.carry.optimizer else None

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        self.done = self.saved = int(saved.numbers["done"])
        self.offset = saved.at - self.done
        self.spent |= saved.numbers["spent"] or self.spent_by_the_record()
        # `steps` and `until` may have changed since, so that a stage which was over may go on, or end here.
        until = asdict(self.stage.until) if self.stage.until else None
        self.goal_reached = until is not None and until == saved.numbers["reached"]
        flat = saved.numbers.get("flat", {})
        self.flat = flat if self.stage.until and flat.get("metric") == self.stage.until.metric else {}
        self.monitors.memory = saved.numbers.get("monitors", {})
        # Whoever changes a monitor that has ended the stage wants it to go on.
        ended_by = saved.numbers.get("ended_by", {})
        self.ended_by = {name: then for name, then in ended_by.items() if then == self.monitors.options(name)}
        self.over = self.goal_reached or self.done >= self.stage.steps or self.out_of_time() or bool(self.ended_by)
        self.load(saved)
        self.sync.push(self.rollout, version=self.done)  # what it samples is of this step, not of the stage's start


def begin(policy: Weights | Parts, stage: Stage) -> None:
    """Have a policy of several parts train those that the stage says."""
    if isinstance(policy, Parts):
        policy.stage({name: way.only for name, way in stage.train.items()}, stage.algorithm.needs().kind)
