"""What one device holds while a stage runs, and what to change where that is more than it has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rlkit.plan import calls as plan_calls
from rlkit.plan.sizes import Size
from rlkit.stages import Setup, Stage
from rlkit.weights import Lora

SAVED = 21  # values that the backward pass needs for each layer, token and unit of width
AGAIN = 2  # of them with checkpointing, beside those of one layer
PASSING = 8  # values for each token and unit of width that a pass without gradient holds at once
DECODING = 1536  # bytes for each pixel, while an autoencoder of convolutions decodes in fp32
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
    cached: int = 0  # rows whose keys and values are kept while answers are written
    engine: float = 0.0  # bytes that vLLM takes on the same device, its own weights and keys among them
    others: float = 0.0  # bytes of other parts

    @property
    def memory(self) -> dict[str, float]:
        """Bytes by what they are for."""
        size, number = self.size, 2 if self.bf16 else 4
        trained = size.trained(self.lora)
        adapted = number * size.parameters + 4 * trained
        saved = size.saved / size.width if size.saved else SAVED
        row = size.tokens * size.width * number
        kept = size.layers * AGAIN + saved if self.checkpointing else size.layers * saved
        aside = 0.0 if self.lora else size.aside * number  # adapters are on no tower
        aside *= AGAIN / SAVED + 1 / size.layers if self.checkpointing else 1
        lowered = 2 * trained if self.bf16 else 0.0  # autocast's copies of fp32 weights
        passing = max(self.micro_batch * self.each * (row * kept + aside), self.sampled * row * PASSING)
        # Logits, masked, and their gradient; the log-probabilities of one sequence at a time in fp32, with theirs.
        logits = size.tokens * size.vocabulary * (3 * number * self.micro_batch + 12.0)
        cache = float(self.cached * size.tokens * size.kept * size.layers * number)
        more = {"logits": logits, "cache": cache, "engine": self.engine, "others": self.others}
        return {
            "weights": adapted if self.lora else 4 * size.parameters,
            "gradients": 4 * trained * (2 if self.passes > 1 else 1),
            "moments": 8 * trained,
            "sets": 4 * trained * (self.sets if self.sets_on_device else min(self.sets, 1)),
            "activations": passing + lowered,
            "decoding": float(self.pictures * size.pixels * DECODING),
            "encoders": number * size.encoders if self.encoders == "keep" else 0.0,
            **{name: count for name, count in more.items() if count},
        }

    @property
    def total(self) -> float:
        """Bytes at the worst moment: nobody decodes, or writes, while rows are trained on."""
        parts = self.memory
        training = parts["activations"] + parts.get("logits", 0.0)
        sampling = parts["decoding"] + parts.get("cache", 0.0)
        return sum(parts.values()) - min(training, sampling)


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


def cures(footprint: Footprint, stage: Stage, room: float) -> Iterator[str]:
    """What each change would do by itself, cheapest first, and what all of them would do together."""
    where = f"stages.{stage.name}"
    fewer = replace(footprint, micro_batch=1, passes=2)
    alone = footprint.sampled // max(1, footprint.pictures)  # rows of one picture
    changes: list[tuple[str, Footprint, dict[str, Any]]] = [
        ("run.precision=bf16", replace(footprint, bf16=True), {"bf16": True}),
        ("policy.encoders=offload", replace(footprint, encoders="offload"), {"encoders": "offload"}),
        ("policy.sets=cpu", replace(footprint, sets_on_device=False), {"sets_on_device": False}),
        (f"{where}.learner.micro_batch=1", fewer, {"micro_batch": 1, "passes": 2}),
        (f"{where}.rollout.batch=1", replace(footprint, sampled=alone, pictures=1), {"sampled": alone, "pictures": 1}),
        ("policy.checkpointing=true", replace(footprint, checkpointing=True), {"checkpointing": True}),
    ]
    if footprint.engine:
        words = f"{where}.rollout: urls of servers on other devices"
        changes.append((words, replace(footprint, engine=0.0), {"engine": 0.0}))
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
