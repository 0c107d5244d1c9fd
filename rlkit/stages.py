"""What a recipe says, once it is read: the run, its policy, and its stages, each with the entries that it uses."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlkit.errors import nearest
from rlkit.learner import LearnerOptions
from rlkit.monitors.watch import Monitors
from rlkit.resources import Resources
from rlkit.scoring import WeightedReward
from rlkit.total import Total
from rlkit.weights import Lora

TIMES = ("seconds", "cpu_seconds")  # what `until` may name beside an evaluation's metrics
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class RunOptions:
    """What concerns the run as a whole and not what it learns."""

    seed: int = 0
    dir: str | None = None  # the run folder; None: runs/RECIPE-TIME
    checkpoint_every: int = 20  # training steps
    keep_checkpoints: int = 2
    deterministic: bool = False  # refuse operations whose result may vary from run to run
    device: str = "auto"  # cuda where there is one, else cpu; or cpu, cuda, mps, or one of several: cuda:1
    precision: Literal["fp32", "bf16"] = "fp32"  # of the network; step maths and weights stay fp32
    max_unscored: float = 0.1  # stop when a reward leaves more than this share of a step's samples without a number
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    tensorboard: bool = False  # event files in the run folder; an extra
    trackio: bool = False  # a page of the local dashboard; an extra
    threads: int | None = None  # of torch, in each process; None: torch's own choice
    order: tuple[str, ...] | None = None  # the stages that run, in this order; None: all, as the recipe has them

    def __post_init__(self) -> None:
        counts = {"checkpoint_every": self.checkpoint_every, "keep_checkpoints": self.keep_checkpoints}
        for name, value in (counts | {"threads": 1 if self.threads is None else self.threads}).items():
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value}")
        if not 0 <= self.max_unscored <= 1:
            raise ValueError(f"max_unscored is a share within 0..1, not {self.max_unscored}")
        if self.device not in DEVICES and not re.fullmatch(r"(cuda|mps):\d+", self.device):
            kind = self.device.partition(":")[0].lower()
            near = nearest("cuda" if kind == "gpu" else kind, DEVICES)
            raise ValueError(f"device must be {', '.join(DEVICES)}, cuda:N or mps:N, not {self.device!r}.{near}")


@dataclass(frozen=True)
class Evaluation:
    """Sampling of held-out prompts without exploration noise, always with the same initial noise."""

    every: int = 20  # training steps; 0: only first and last
    held_out: int = 256  # pictures
    ends: int | None = None  # pictures of the stage's first and last evaluation; None: as many as the others
    steps: int | None = None  # denoising steps; None: as many as in training
    weights: Literal["current", "ema"] = "current"  # what is evaluated, and exported at the end
    also: tuple[str, ...] = ()  # stages whose own evaluation is made too, first and last: is their task forgotten?

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("held_out", self.held_out), ("ends", self.ends or 0)):
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, not {value}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be 1 or more, not {self.steps}")


@dataclass(frozen=True)
class Until:
    """End a stage before its steps are over: once an evaluation's `metric` is above a number, or rises no more.

    plateau: that many evaluations in a row that are not above the best before them by more than `least`.

    The metric `seconds` is the stage's training time, evaluations and checkpoints not counted, and `cpu_seconds` the
    processor's time for it, which hardly depends on what else the machine does: how many steps fit in is then the
    machine's doing, and not repeatable.
    """

    metric: str
    above: float | None = None
    plateau: int | None = None  # evaluations
    least: float = 0.0  # what counts as a rise

    def __post_init__(self) -> None:
        if (self.above is None) == (self.plateau is None):
            raise ValueError("until needs one of `above`, a number, and `plateau`, a number of evaluations")
        if self.above is not None and not math.isfinite(self.above):
            raise ValueError(f"above must be a finite number, not {self.above}")
        if self.above is not None and self.metric in TIMES and self.above <= 0:
            raise ValueError(f"{self.metric} are above {self.above:g} before the first step: `above` must be above 0")
        if self.plateau is not None and self.plateau < 1:
            raise ValueError(f"plateau must be 1 evaluation or more, not {self.plateau}")
        if self.plateau is not None and self.metric in TIMES:
            raise ValueError(f"{self.metric} always rises: it has no plateau. Give `above`")
        if not (math.isfinite(self.least) and self.least >= 0) or (self.least and self.plateau is None):
            raise ValueError(f"least is what a plateau's metric must rise by, 0 or more, not {self.least}")


@dataclass(frozen=True)
class Carry:
    """What a stage takes over from the one before, beside the policy itself."""

    weights: Literal["current", "ema"] = "current"  # it goes on from the last weights, or from their average
    optimizer: bool = False  # the optimiser's moments; the learning rate's schedule begins anew


@dataclass(frozen=True)
class PolicyOptions:
    backbone: Any
    lora: Lora | None  # None: full fine-tuning
    guidance: float = 1.0  # classifier-free guidance, in sampling and training alike; 1: none, and half the work
    negative: str = ""  # what guidance leads away from
    checkpointing: bool = False  # compute activations again in the backward pass instead of keeping them
    conditions: str | None = None  # a folder of encoded prompts, which runs may share; None: only in memory
    resources: Resources = field(default_factory=Resources)  # its keys stand beside the others, under `policy`
    parts: Mapping[str, Any] = field(default_factory=dict)  # backbones by name, of a policy of several; else `backbone`
    train: Mapping[str, Lora | Literal["frozen"] | None] = field(default_factory=dict)  # how each part is ever trained


@dataclass(frozen=True)
class Way:
    """How a stage trains a part: by LoRA or in full (None), and which of these tensors, by words in their names."""

    lora: Lora | None
    only: tuple[str, ...] = ()  # (): all of them


@dataclass(frozen=True)
class Stage:
    name: str
    data: Any
    rollout: Any
    algorithm: Any
    rewards: tuple[WeightedReward, ...]
    learner: LearnerOptions
    evaluate: Evaluation
    steps: int
    until: Until | None = None
    carry: Carry = field(default_factory=Carry)
    anchor: Literal["base", "stage_start", "ema"] = "base"  # what `reference` is
    total: Total = field(default_factory=Total)  # how the rewards become one number
    monitors: Monitors = field(default_factory=Monitors)
    train: Mapping[str, Way] = field(default_factory=dict)  # parts of a policy of several; the others rest
    also: tuple[Stage, ...] = ()  # that `evaluate.also` names, whether or not they run


@dataclass(frozen=True)
class Setup:
    """A recipe with its components built; `recipe` is its text, fully resolved."""

    options: RunOptions
    policy: PolicyOptions
    stages: tuple[Stage, ...]
    recipe: dict[str, Any] = field(default_factory=dict)

    def every_stage(self) -> list[Stage]:
        """The stages that run, then those that are only evaluated."""
        named = [one for stage in self.stages for one in stage.also]
        return list({one.name: one for one in (*self.stages, *named)}.values())
