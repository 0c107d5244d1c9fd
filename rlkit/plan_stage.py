"""What a stage would take: memory, network calls, FLOPs and hours. Predicted from sizes and a table, never measured.

Counted: forward passes, backward passes at twice the forward (at once where LoRA needs no gradient of most weights),
the forward again with checkpointing, the optimiser's reading and writing, the exchange of gradients between devices,
and evaluations. Not counted: rewards, decoding, encoding of prompts, checkpoints, start-up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlkit import plan_calls
from rlkit.plan_devices import Machine
from rlkit.plan_sizes import Size, size_of
from rlkit.trainer import Setup, Stage
from rlkit.weights import Lora

SAVED = 21  # values that the backward pass needs for each layer, token and unit of width
AGAIN = 2  # of them with checkpointing, beside those of one layer
PASSING = 8  # values for each token and unit of width that a pass without gradient holds at once
DECODING = 1536  # bytes for each pixel, while an autoencoder of convolutions decodes in fp32
UPDATE = 64  # bytes for each trained weight that an optimiser step reads and writes: gradient, clipping, AdamW
ROOM = 0.9  # share of a device's memory that can be planned with; the rest is fragments, kernels and libraries


@dataclass(frozen=True)
class Footprint:
    """All that the memory of one device depends on."""

    size: Size
    lora: Lora | None
    bf16: bool
    sets: int  # copies of the trained weights
    sets_on_device: bool
    micro_batch: int  # rows of one pass with gradient
    each: float  # what of a row goes through the network with gradient: both of a pair, each of several steps, guidance
    passes: int  # of one update
    sampled: int  # rows of one pass of the sampler; guidance doubles them
    pictures: int  # decoded at once
    checkpointing: bool
    encoders: str

    @property
    def memory(self) -> dict[str, float]:
        """Bytes by what they are for."""
        size, number = self.size, 2 if self.bf16 else 4
        trained = size.trained(self.lora)
        frozen = size.parameters if self.lora else 0.0
        row = size.tokens * size.width * number
        kept = size.layers * AGAIN + SAVED if self.checkpointing else size.layers * SAVED
        lowered = 2 * trained if self.bf16 else 0.0  # autocast's copies of fp32 weights
        passing = max(self.micro_batch * self.each * row * kept, self.sampled * row * PASSING)
        return {
            "weights": 4 * trained + number * frozen,
            "gradients": 4 * trained * (2 if self.passes > 1 else 1),
            "moments": 8 * trained,
            "sets": 4 * trained * (self.sets if self.sets_on_device else min(self.sets, 1)),
            "activations": passing + lowered,
            "decoding": float(self.pictures * size.pixels * DECODING),
            "encoders": number * size.encoders if self.encoders == "keep" else 0.0,
        }

    @property
    def total(self) -> float:
        """Bytes at the worst moment: nobody decodes while rows are trained on."""
        parts = self.memory
        return sum(parts.values()) - min(parts["activations"], parts["decoding"])


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

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values()) if self.seconds else 0.0


def predict(setup: Setup, machine: Machine) -> list[Prediction]:
    """Every stage of a recipe on a machine."""
    return [_stage(setup, stage, machine) for stage in setup.stages]


def _stage(setup: Setup, stage: Stage, machine: Machine) -> Prediction:
    if setup.policy.parts or stage.algorithm.needs().kind != "flow":
        what = "a policy of several parts" if setup.policy.parts else "a policy that writes"
        return Prediction(stage.name, f"not predicted: {what}, whose answers end where they want to", steps=stage.steps)
    samples = stage.data.per_step * stage.data.group
    if samples < machine.count:
        what = f"{machine.count} devices cannot share {samples} samples: raise stages.{stage.name}.data.per_step"
        return Prediction(stage.name, what, samples=samples, steps=stage.steps, fits=False)
    size = size_of(setup.policy.backbone, "source" in getattr(stage.data, "gives", ()))
    calls = plan_calls.rehearse(stage, setup.policy.guidance, machine.count)
    held = footprint(setup, stage, machine.count, size, calls.mean)
    room = ROOM * machine.device.memory
    seconds = step_seconds(held, calls.mean, machine, samples)
    return Prediction(
        stage=stage.name,
        size=size,
        memory=held.memory,
        total=held.total,
        available=machine.device.memory,
        fits=held.total <= room,
        advice=() if held.total <= room else tuple(cures(held, stage, room)),
        calls=calls.mean,
        first_calls=calls.start + calls.steps[0].total,
        flops=step_flops(held, calls.mean),
        samples=samples,
        seconds=seconds,
        steps=stage.steps,
        hours=(sum(seconds.values()) * stage.steps + _evaluations(setup, stage, held, machine)) / 3600,
    )


def footprint(setup: Setup, stage: Stage, devices: int, size: Size, calls: plan_calls.StepCalls) -> Footprint:
    """What a recipe's stage holds on one of so many devices."""
    needs, resources = stage.algorithm.needs(), setup.policy.resources
    own = needs.reference and stage.anchor != "ema"
    sets = sum((needs.old, own, stage.learner.ema is not None))
    rows = math.ceil(stage.learner.batch / devices)
    micro = min(rows, stage.learner.micro_batch or rows)
    share = math.ceil(stage.data.per_step * stage.data.group / devices)
    pictures = min(share, getattr(stage.rollout, "batch", None) or share)
    double = 1 if setup.policy.guidance == 1 else 2
    return Footprint(
        size=size,
        lora=setup.policy.lora,
        bf16=setup.options.precision == "bf16",
        sets=sets,
        sets_on_device=resources.sets == "device",
        micro_batch=micro,
        each=calls.trained / (calls.updates * stage.learner.batch) if calls.updates else 1.0,
        passes=math.ceil(rows / micro),
        sampled=pictures * double,
        pictures=pictures,
        checkpointing=setup.policy.checkpointing,
        encoders=resources.encoders,
    )


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


def _evaluations(setup: Setup, stage: Stage, footprint: Footprint, machine: Machine) -> float:
    """Seconds of a stage's evaluations: before the first step, after the last, and every so many between."""
    told = stage.evaluate
    between = (stage.steps - 1) // told.every if told.every else 0
    ends = told.held_out if told.ends is None else told.ends
    pictures = between * told.held_out + 2 * ends
    double = 1 if setup.policy.guidance == 1 else 2
    rows = pictures * (told.steps or stage.rollout.steps) * double
    return step_seconds(footprint, plan_calls.StepCalls(sampled=rows), machine, max(1, pictures))["sample"]


def cures(footprint: Footprint, stage: Stage, room: float) -> Iterator[str]:
    """What each change would do by itself, cheapest first, and what all of them would do together."""
    where = f"stages.{stage.name}"
    fewer = replace(footprint, micro_batch=1, passes=2)
    alone = footprint.sampled // footprint.pictures  # rows of one picture
    changes: list[tuple[str, Footprint, dict[str, Any]]] = [
        ("run.precision=bf16", replace(footprint, bf16=True), {"bf16": True}),
        ("policy.encoders=offload", replace(footprint, encoders="offload"), {"encoders": "offload"}),
        ("policy.sets=cpu", replace(footprint, sets_on_device=False), {"sets_on_device": False}),
        (f"{where}.learner.micro_batch=1", fewer, {"micro_batch": 1, "passes": 2}),
        (f"{where}.rollout.batch=1", replace(footprint, sampled=alone, pictures=1), {"sampled": alone, "pictures": 1}),
        ("policy.checkpointing=true", replace(footprint, checkpointing=True), {"checkpointing": True}),
    ]
    if footprint.lora is None:
        lora = Lora(rank=32)
        words = "policy.train.lora.rank=32 (in the place of all weights)"
        changes.append((words, replace(footprint, lora=lora), {"lora": lora}))
    helping = [one for one in changes if one[1].total < 0.98 * footprint.total]
    for words, changed, _ in helping:
        yield f"{words}: {_gigabytes(changed.total)}{', which fits' if changed.total <= room else ''}"
    together = footprint
    taken: list[str] = []
    for words, _, change in helping:
        together, taken = replace(together, **change), [*taken, words]
        if together.total <= room:
            break
    if len(taken) > 1 and not any(changed.total <= room for _, changed, _ in helping):
        end = "which fits" if together.total <= room else "which still does not fit: choose another device"
        yield f"together ({', '.join(one.split(' ')[0] for one in taken)}): {_gigabytes(together.total)}, {end}"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
