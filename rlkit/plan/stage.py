"""What a stage would take: network calls, FLOPs and hours. Predicted from sizes and a table, never measured.

Counted: forward passes, backward passes at twice the forward (at once where LoRA needs no gradient of most weights),
the forward again with checkpointing, the optimiser's reading and writing, the exchange of gradients between devices,
evaluations (of other stages too, where `evaluate.also` names them), and the writing of answers. Not counted: rewards,
decoding, encoding of prompts, checkpoints, start-up.

Of a policy of parts, each stage has the work of its own: the captioner writes, and reads what it wrote; the generator
draws; what the stage trains has a backward pass. The connector is two layers, and is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlkit import registry
from rlkit.data.prompts import WorldPrompts
from rlkit.errors import DataError
from rlkit.held_out import prompts_of
from rlkit.plan import answers as plan_answers
from rlkit.plan import calls as plan_calls
from rlkit.plan.answers import Conversation, Known, Writing, is_here, writer_of
from rlkit.plan.devices import Device, Machine
from rlkit.plan.memory import ROOM, Footprint, cures, footprint
from rlkit.plan.sizes import Size, size_of
from rlkit.plan.words import Words, words_of
from rlkit.stages import Setup, Stage
from rlkit.weights import Lora

UPDATE = 64  # bytes for each trained weight that an optimiser step reads and writes: gradient, clipping, AdamW
LIMITS = Known()  # nothing but those


@dataclass(frozen=True)
class Prediction:
    """One stage; numbers of a step are means over the steps."""

    stage: str
    problem: str = ""  # why there are no numbers, or why it cannot run
    size: Size | None = None
    memory: Mapping[str, float] | None = None  # bytes on one device
    total: float = 0.0
    available: float = 0.0
    fits: bool = True
    advice: tuple[str, ...] = ()
    calls: plan_calls.StepCalls | None = None
    first_calls: float = 0.0  # of the first step, calibration included
    flops: float = 0.0  # of a step, over all devices
    samples: int = 0
    seconds: Mapping[str, float] | None = None  # of a step, by phase
    steps: int = 0
    hours: float = 0.0  # of the stage, with its evaluations
    answers: str = ""  # how long they are taken to be

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values()) if self.seconds else 0.0


def predict(setup: Setup, machine: Machine, known: Known = LIMITS) -> list[Prediction]:
    """Every stage of a recipe on a machine."""
    return [_stage(setup, stage, machine, known) for stage in setup.stages]


def _stage(setup: Setup, stage: Stage, machine: Machine, known: Known) -> Prediction:
    samples = stage.data.per_step * stage.data.group
    if samples < machine.count:
        what = f"{machine.count} devices cannot share {samples} samples: raise stages.{stage.name}.data.per_step"
        return Prediction(stage.name, what, samples=samples, steps=stage.steps, fits=False)
    work = _work(setup, stage, machine, known)
    held, seconds, room = work.held, work.seconds, ROOM * machine.device.memory
    return Prediction(
        stage=stage.name,
        size=held.size,
        memory=held.memory,
        total=held.total,
        available=machine.device.memory,
        fits=held.total <= room,
        advice=work.advice + (() if held.total <= room else tuple(cures(held, stage, room))),
        calls=work.calls,
        first_calls=work.first,
        flops=work.flops,
        samples=samples,
        seconds=seconds,
        steps=stage.steps,
        hours=(sum(seconds.values()) * stage.steps + work.evaluations) / 3600,
        answers=work.answers,
    )


@dataclass(frozen=True)
class Work:
    """A step of a stage, of whatever parts it takes; means over the steps."""

    held: Footprint
    calls: plan_calls.StepCalls
    first: float
    flops: float
    seconds: Mapping[str, float]
    evaluations: float  # seconds, of the whole stage
    answers: str = ""
    advice: tuple[str, ...] = ()


def _work(setup: Setup, stage: Stage, machine: Machine, known: Known) -> Work:
    if setup.policy.parts or stage.algorithm.needs().kind != "flow":
        return _of_words(setup, stage, machine, known)
    size = size_of(setup.policy.backbone, _edits(stage))
    calls = plan_calls.rehearse(stage, setup.policy.guidance, machine.count)
    held = footprint(setup, stage, machine.count, size, calls.mean)
    seconds = step_seconds(held, calls.mean, machine, stage.data.per_step * stage.data.group)
    evaluated = _evaluations(setup, stage, held, machine)
    first = calls.start + calls.steps[0].total
    return Work(held, calls.mean, first, step_flops(held, calls.mean), seconds, evaluated)


def step_flops(footprint: Footprint, calls: plan_calls.StepCalls) -> float:
    """Over all devices."""
    backward = 1 if footprint.lora else 2
    passes = 1 + backward + footprint.checkpointing
    return footprint.size.flops * (calls.sampled + calls.compared + passes * calls.trained)


def step_seconds(footprint: Footprint, calls: plan_calls.StepCalls, machine: Machine, samples: int) -> dict[str, float]:
    """By phase. A device with one sample more than others makes them wait."""
    device, one = machine.device, footprint.size.flops
    speed = (device.bf16 if footprint.bf16 else device.fp32) * device.efficiency
    uneven = math.ceil(samples / machine.count) / samples  # share of the busiest device
    sampling = one * calls.sampled
    trained = footprint.size.trained(footprint.lora)
    exchange = 2 * 4 * trained / machine.link if machine.count > 1 else 0.0  # a ring sends all of it twice
    return {
        "sample": sampling * uneven / speed,
        "train": (step_flops(footprint, calls) - sampling) * uneven / speed,
        "update": calls.updates * UPDATE * trained / device.bandwidth,
        "exchange": calls.updates * exchange,
    }


def _edits(stage: Stage) -> bool:
    """Whether each row has another picture in its sequence."""
    return "source" in getattr(stage.data, "gives", ())


def _panels(stage: Stage) -> tuple[int, int]:
    """(prompts of the stage's first and of its last evaluation, prompts of each one between)."""
    asked = stage.evaluate.ends or stage.evaluate.held_out, stage.evaluate.held_out
    there = _there(stage, max(asked))
    return min(asked[0], there), min(asked[1], there)


def _there(stage: Stage, count: int) -> int:
    """How many held-out prompts an evaluation finds that asks for so many: as many, where nothing here can tell."""
    # The embedded world has as many as anybody asks for, and would draw a picture for each.
    if not count or isinstance(stage.data, WorldPrompts) or not is_here(stage.data):
        return count
    try:
        return len(prompts_of(stage, count))
    except DataError:
        return count


def _evaluated(stage: Stage) -> int:
    """Samples of a stage's evaluations: before the first step, after the last, and every so many between."""
    ends, each = _panels(stage)
    between = (stage.steps - 1) // stage.evaluate.every if stage.evaluate.every else 0
    return between * each + 2 * ends


def _of_others(stage: Stage) -> Iterator[tuple[Stage, int]]:
    """The other stages that `evaluate.also` names, each with its samples at the two ends of this one.

    They are drawn with the stage's own evaluations: where that has no prompts, there are none.
    """
    others = [one for one in stage.also if one.name != stage.name]
    if others and _panels(stage)[0]:
        yield from ((one, 2 * _panels(one)[0]) for one in others)


def _evaluations(setup: Setup, stage: Stage, footprint: Footprint, machine: Machine) -> float:
    """Seconds of a stage's evaluations."""
    double, seconds = _double(setup.policy.guidance), 0.0
    for one, pictures in ((stage, _evaluated(stage)), *_of_others(stage)):
        alike = _edits(one) == _edits(stage)
        held = footprint if alike else replace(footprint, size=size_of(setup.policy.backbone, _edits(one)))
        rows = pictures * (one.evaluate.steps or one.rollout.steps) * double
        seconds += step_seconds(held, plan_calls.StepCalls(sampled=rows), machine, max(1, pictures))["sample"]
    return seconds


# ---- policies that write ---------------------------------------------------------------------------------------------

NOTHING = Lora(rank=0)  # a network of which nothing learns
SERVERS = "an engine cannot share one of several learner processes: give urls of servers (rlkit serve-rollout)"


def _of_words(setup: Setup, stage: Stage, machine: Machine, known: Known) -> Work:
    """A stage of a policy that writes, alone or with a generator that draws what it wrote."""
    parts = {getattr(one, "kind", ""): (name, one) for name, one in setup.policy.parts.items()}
    name, backbone = parts.get("tokens", ("", setup.policy.backbone))
    words = words_of(backbone)
    told = plan_answers.conversation(stage, backbone, words, known)
    calls = plan_calls.rehearse(stage, setup.policy.guidance, machine.count)
    acts = stage.algorithm.needs().kind == "tokens"  # the network that writes is the one that learns
    writes = _writing(setup, stage, machine, words, told, acts)
    drawn = _drawn(setup, stage, parts.get("flow"), acts, calls.mean)
    if writes.rows and acts:
        drawn = replace(drawn, rows=drawn.rows * known.drawn)
    writer = _writer_held(setup, stage, machine, name, told, calls.mean, writes, acts)
    heard = writes.rows * words.flops(told.said, 1) if parts else 0.0  # its own words, read for the generator
    speed = _speed(setup, machine.device)
    seconds = {
        "write": (writes.seconds(machine.device, speed) if writes.rows else 0.0) + heard / speed,
        "draw": drawn.rows * drawn.flops / machine.count / speed,
    }
    samples = stage.data.per_step * stage.data.group
    evaluations = _evaluated(stage) * _showing(setup, stage, machine, words, told, acts, drawn)
    for named, pictures in _of_others(stage):  # never of a policy of parts
        talk = plan_answers.conversation(named, backbone, words, known)
        theirs = _drawn(setup, named, None, acts, calls.mean)
        evaluations += pictures * _showing(setup, named, machine, words, talk, acts, theirs)
    # Devices that have one conversation less than the busiest wait, and compute nothing.
    written = (samples if acts else stage.data.per_step) if writes.rows else 0
    flops = (writes.reading + writes.saying + heard) * written / max(1, writes.rows) + drawn.rows * drawn.flops
    learning = replace(calls.mean, sampled=0.0)
    trained = [(writer if acts or drawn.held is None else drawn.held, learning)]
    if not acts and name in stage.train:
        trained.append((writer, replace(learning, compared=0.0)))
    for one, own in trained:
        flops += step_flops(one, own)
        for phase, count in step_seconds(one, own, machine, samples).items():
            seconds[phase] = seconds.get(phase, 0.0) + count
    held = trained[0][0]
    other = drawn.held if held is writer else writer
    shown = replace(calls.mean, sampled=written * (told.said + bool(parts)) + drawn.rows)
    first = replace(calls.steps[0], sampled=shown.sampled)
    _, entry = writer_of(stage.rollout)
    alone = writes.engine and not entry.urls and machine.count > 1
    return Work(
        held=replace(held, others=0.0 if other is None else other.total),
        calls=shown,
        first=calls.start + first.total,
        flops=flops,
        seconds={phase: count for phase, count in seconds.items() if count},
        evaluations=evaluations,
        answers=told.words,
        advice=(SERVERS,) if alone else (),
    )


def _speed(setup: Setup, device: Device) -> float:
    return (device.bf16 if setup.options.precision == "bf16" else device.fp32) * device.efficiency


def _writing(
    setup: Setup,
    stage: Stage,
    machine: Machine,
    words: Words,
    told: Conversation,
    acts: bool,
    always: bool = False,
) -> Writing:
    """What one device writes in a step: an answer a sample, one a prompt for a generator to draw, no demonstration.

    always: where demonstrations are handed out too, as an evaluation writes.
    """
    _, entry = writer_of(stage.rollout)
    prompts = math.ceil(stage.data.per_step / machine.count)
    rows = math.ceil(stage.data.per_step * stage.data.group / machine.count) if acts else prompts
    rows = 0 if getattr(stage.rollout, "agent", None) is not None and not always else rows
    engine = getattr(entry, "gpu_share", None) is not None
    batch = entry.sequences if engine else entry.batch or max(rows, 1)
    number = 2 if setup.options.precision == "bf16" else 4
    return Writing(words, told, rows, min(rows, prompts), batch, number, engine)


def _showing(
    setup: Setup, stage: Stage, machine: Machine, words: Words, told: Conversation, acts: bool, drawn: Drawn
) -> float:
    """Seconds of one sample of an evaluation."""
    speed = _speed(setup, machine.device)
    shows = _writing(setup, stage, machine, words, told, acts, always=True)  # each prompt has an answer of its own
    heard = shows.rows * words.flops(told.said, 1) if setup.policy.parts else 0.0
    rows = stage.data.per_step * (stage.data.group if acts else 1)
    said = (shows.seconds(machine.device, speed) + heard / speed) / rows
    return said + drawn.shown * drawn.flops / machine.count / speed


def _writer_held(
    setup: Setup,
    stage: Stage,
    machine: Machine,
    name: str,
    told: Conversation,
    calls: plan_calls.StepCalls,
    writes: Writing,
    acts: bool,
) -> Footprint:
    """Of the network that writes, as the stage trains it. name: of the part that it is; "": of none."""
    words, way = writes.words, stage.train.get(name)
    lora = setup.policy.lora if not name else NOTHING if way is None else way.lora
    learns = 0.0 if lora is NOTHING else words.trained(lora, way.only if way else ())
    # Words that only tell a generator what to draw are read by themselves, and nobody asks for their logits.
    size = words.row(told.total, told.total, told.pictures, learns) if acts else words.row(told.said, 1, 0, learns)
    _, entry = writer_of(stage.rollout)
    share = entry.gpu_share if writes.engine and not entry.urls else 0.0
    held = footprint(setup, stage, machine.count, size, calls)
    return replace(
        held,
        lora=lora,
        each=1.0 if learns else 0.0,
        sampled=0,
        pictures=0,
        sets=held.sets if acts else 0,
        cached=0 if writes.engine else min(writes.batch, writes.rows),
        engine=share * machine.device.memory,
    )


@dataclass(frozen=True)
class Drawn:
    rows: float  # through the generator in a step, over all devices
    shown: float  # for one sample of an evaluation
    flops: float  # of one
    held: Footprint | None  # None: nobody draws here


def _drawn(setup: Setup, stage: Stage, part: tuple[str, Any] | None, acts: bool, calls: plan_calls.StepCalls) -> Drawn:
    """What is drawn of the words: by a part of the policy, or by the renderer of an agent. At most: equal words are not
    drawn twice, and answers that cannot be understood not at all (`Known.drawn`)."""
    samples = stage.data.per_step * stage.data.group
    whole, _ = writer_of(stage.rollout)
    if part is not None:
        name, backbone = part
        size, way = size_of(backbone), stage.train.get(name)
        held = replace(footprint(setup, stage, 1, size, calls), lora=NOTHING if way is None else way.lora)
        double = _double(setup.policy.guidance)
        shown = float((stage.evaluate.steps or whole.steps) * double)
        if not acts:
            return Drawn(calls.sampled, shown, size.flops, held)
        rows = samples * whole.pictures * whole.steps * double
        return Drawn(float(rows), whole.pictures * shown, size.flops, replace(held, each=0.0, sets=0))
    told = dict(getattr(whole, "renderer", None) or {})
    if "backbone" not in told:
        return Drawn(0.0, 0.0, 0.0, None)
    options, double = dict(told["backbone"]), _double(told.get("guidance", 1.0))
    entry = registry.build("backbones", str(options.pop("name", "")), options, "rollout.renderer.backbone")
    size, at_once = size_of(entry), min(samples, told.get("batch") or samples)
    held = footprint(setup, stage, 1, size, calls)
    held = replace(held, lora=NOTHING, each=0.0, sets=0, sampled=at_once * double, pictures=at_once)
    rows = float(told.get("steps", 10) * double)
    return Drawn(samples * rows, rows, size.flops, held)


def _double(guidance: float) -> int:
    return 1 if guidance == 1 else 2
