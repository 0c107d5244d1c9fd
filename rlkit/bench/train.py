"""Benchmarks: how much longer a training step takes than the network calls in it.

The real side is the loop that `rlkit train` runs, with one step at a time. A hook on the network writes down every call
of a step: how many rows, and whether a backward pass goes through it. The ideal side is the bare network making those
calls again, one after the other: no rlkit, no optimiser, nothing kept. The two take turns, since machines are noisy,
and a ratio is the median of ideal / real over the turns: 1 is no overhead at all.

A step's own calls made again cannot show that some of them were needless. `calls` does, beside what is demanded: rows
of sampling, samples x steps (fewer do where a group shares its beginning), and one with gradient for each row trained.

Memory is what torch had allocated on the device at the worst moment, weights included, saving to disk left out. It is
read from the allocator and not from the process, whose size also holds libraries and what earlier steps gave back.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlkit import dist, flow, recipe, session, trainer
from rlkit.errors import RecipeError, nearest
from rlkit.policy import Policy
from rlkit.run import Run
from rlkit.stages import Setup
from rlkit.tracking import Tracker
from rlkit.types import Backbone, Condition, FlowModel, Prompt, Samples, Scores, generator
from rlkit.weights import Weights

BASE = "quickstart"  # every workload is this recipe with changes
STAGE = "stages.main"
QUIET = (  # a run without an eye on it
    *("run.wandb=disabled", "run.keep_checkpoints=1"),
    *(f"{STAGE}.evaluate.every=0", f"{STAGE}.evaluate.held_out=0", f"{STAGE}.evaluate.ends=null"),
)
WORKLOADS: Mapping[str, tuple[str, ...]] = {
    "tiny": (),
    "sd3_50m": (
        "policy.backbone.name=rlkit.bench.train:StandIn",
        *(f"{STAGE}.rewards.composition=null", f"{STAGE}.rewards.rlkit.bench.train:Brightness=1"),
        *(f"{STAGE}.data.per_step=2", f"{STAGE}.data.group=8", f"{STAGE}.rollout.steps=8"),
        *(f"{STAGE}.learner.batch=32", f"{STAGE}.learner.micro_batch=8"),
    ),
}
PHASES = {"encode": "encode", "sample": "sample", "score": "reward", "train": "train", "save": "save"}  # loop -> here


# ---- what stands in for a large model --------------------------------------------------------------------------------

TOKENS, TEXT_WIDTH, POOLED_WIDTH = 77, 4096, 2048  # Stable Diffusion 3's
CHANNELS, SIDE, PIXELS = 16, 16, 8  # latents of 128 px; PIXELS: the side of what one latent becomes


@dataclass(frozen=True)
class StandIn:
    """An untrained SD3 transformer of 49 M parameters at 128 px, with encoders and a decoder that cost nothing."""

    kind = "flow"

    layers: int = 9
    heads: int = 6  # of 64 values each

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        from diffusers import SD3Transformer2DModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = SD3Transformer2DModel(
                sample_size=SIDE,
                patch_size=2,
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                num_layers=self.layers,
                attention_head_dim=64,
                num_attention_heads=self.heads,
                joint_attention_dim=TEXT_WIDTH,
                caption_projection_dim=64 * self.heads,
                pooled_projection_dim=POOLED_WIDTH,
                pos_embed_max_size=SIDE,
            )
        nn.Module.to(net, device, dtype)  # diffusers' own warns whenever it is given a type, the present one too
        return FlowModel(
            net=net.eval(),
            velocity=_velocity,
            encode=partial(_encode, device, dtype),
            decode=_decode,
            sigmas=_sigmas,
            latent_shape=(CHANNELS, SIDE, SIDE),
            lora_targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        )


def _velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    output: Tensor = net(
        hidden_states=x,
        timestep=1000 * sigma,
        encoder_hidden_states=cond["tokens"],
        pooled_projections=cond["pooled"],
        return_dict=False,
    )[0]
    return output


def _encode(device: torch.device, dtype: torch.dtype, prompts: Sequence[Prompt]) -> list[Condition]:
    found: list[Condition] = []
    for prompt in prompts:
        draw = partial(torch.randn, generator=generator("bench", prompt.text))
        tokens, pooled = draw(TOKENS, TEXT_WIDTH), draw(POOLED_WIDTH)
        found.append({"tokens": tokens.to(device, dtype), "pooled": pooled.to(device, dtype)})
    return found


def _decode(latents: Tensor) -> Tensor:
    """The first three channels, enlarged: [N, 16, h, w] -> [N, 3, 8h, 8w] in 0..1."""
    return torch.sigmoid(latents[:, :3]).repeat_interleave(PIXELS, -1).repeat_interleave(PIXELS, -2)


def _sigmas(steps: int) -> Tensor:
    return flow.shift_sigmas(torch.linspace(1, 0, steps + 1), 3.0)


@dataclass(frozen=True)
class Brightness:
    """The mean of a picture's values: a reward that costs nothing and passes a gradient."""

    reads = ()
    differentiable = True

    def __call__(self, samples: Samples) -> Tensor:
        return samples.media.mean(dim=(1, 2, 3))


# ---- the real step ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of the network."""

    phase: str  # of the loop
    rows: int
    gradient: bool  # whether a backward pass can go through it


@dataclass
class Watch:
    """A step seen from outside: what it asks of the network, and how long its phases take."""

    phase: str = ""
    seconds: dict[str, float] = field(default_factory=dict)  # by phase of the loop
    calls: list[Call] = field(default_factory=list)
    inputs: dict[Call, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)  # of the first like it
    backward: int = 0  # rows that a backward pass went through
    demanded: int = 0  # rows of sampling

    def clear(self) -> None:
        self.seconds, self.calls, self.inputs, self.backward = {}, [], {}, 0

    @contextmanager
    def timing(self, phase: str, device: torch.device) -> Iterator[None]:
        started = _now(device)
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + _now(device) - started

    def hook(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rows = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
        answer = _first(output)
        call = Call(self.phase, rows, answer.requires_grad)
        self.calls.append(call)
        if call not in self.inputs:
            self.inputs[call] = tuple(map(_leaf, args)), {name: _leaf(value) for name, value in kwargs.items()}
        if call.gradient:
            answer.register_hook(partial(self._passed, rows))

    def _passed(self, rows: int, gradient: Tensor) -> None:
        self.backward += rows


def _first(output: Any) -> Tensor:
    """What a network returns: a tensor, or a tuple that begins with it."""
    answer: Tensor = output if isinstance(output, Tensor) else output[0]
    return answer


@dataclass(frozen=True)
class _Watched:
    """A backbone whose text encoders are timed."""

    backbone: Backbone
    watch: Watch

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        model = self.backbone.load(device, dtype)
        if not isinstance(model, FlowModel):
            raise RecipeError("writes texts; what is measured here is sampling pictures.", where="policy.backbone")

        def encode(prompts: Sequence[Prompt]) -> list[Condition]:
            with self.watch.timing("encode", device):
                return model.encode(prompts)

        return replace(model, encode=encode)


class _Timed(Run):
    """The run as it is, under a watch."""

    watch: Watch
    saves = True

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        self.watch.phase = phase
        with super().timed(phase), self.watch.timing(phase, self.policy.device):
            yield

    @property
    def whole(self) -> Weights:
        """The policy, which is one network: `bench` loads no other."""
        assert isinstance(self.policy, Weights)
        return self.policy

    def report(self, step: int, samples: Samples, scores: Scores) -> None:
        steps = 0 if samples.sigmas is None else len(samples.sigmas) - 1  # None: nobody sampled
        self.watch.demanded = samples.total * steps * _passes(self.whole)
        super().report(step, samples, scores)

    def save(self) -> None:
        if self.saves:
            with self.watch.timing("save", self.policy.device):
                super().save()

    def one_step(self) -> None:
        """The loop of `rlkit train`, told that its stage ends after the next step."""
        self.stage = replace(self.stage, steps=self.done + 1)
        self.over = False
        self.watch.clear()
        hook = self.whole.net.register_forward_hook(self.watch.hook, with_kwargs=True)
        try:
            trainer.train(self)
        finally:
            hook.remove()
        self.watch.seconds["sample"] -= self.watch.seconds.get("encode", 0.0)  # the loop counts it as sampling


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- the ideal -------------------------------------------------------------------------------------------------------


def replay(policy: Weights, watch: Watch, calls: Iterable[Call]) -> None:
    """The bare network makes these calls again, forward and, where there was a gradient, backward."""
    for call in calls:
        args, kwargs = watch.inputs[call]
        with policy.autocast(), torch.set_grad_enabled(call.gradient):
            answer = _first(policy.net(*map(_leaf, args), **{name: _leaf(value) for name, value in kwargs.items()}))
        if call.gradient:
            answer.backward(torch.ones_like(answer))
    policy.net.zero_grad()


def _leaf(value: Any) -> Any:
    """The same values out of their graph, without a copy: nothing is kept of it, and no gradients pile up in one."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


# ---- memory ----------------------------------------------------------------------------------------------------------


def _peak(device: torch.device, action: Callable[[], None]) -> int | None:
    """The bytes that `action` adds on the device at its worst moment; None where torch does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not torch.profiler.kineto_available():
        action()
        return None
    with _without_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profiler:
        action()
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextmanager
def _without_stderr() -> Iterator[None]:
    """The profiler writes there when it begins, when it ends, and when something goes that it did not see come."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _alive(device: torch.device) -> int:
    """The bytes of all tensors that Python knows on a device."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and one.device.type == device.type]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def _memory_ratio(run: _Timed, elsewhere: int) -> float | None:
    """Peak of a real step over that of the bare network. `elsewhere`: bytes that were there before the run."""
    device, net = run.policy.device, run.whole.net
    before = _alive(device) - elsewhere
    run.watch.clear()  # what goes away while the profiler looks on, but came before, is counted as staying
    run.saves = False
    real = _peak(device, run.one_step)
    run.saves = True
    kinds = list(run.watch.inputs)  # each kind once more, so that gradients are there while others are computed
    ideal = _peak(device, partial(replay, run.whole, run.watch, [*kinds, *kinds]))
    if real is None or ideal is None:
        return None
    weights = sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))
    return (before + real) / (weights + ideal)


# ---- the benchmark ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What `rlkit bench train --json` prints."""

    workload: str
    algorithm: str
    device: str
    threads: int
    repeats: int
    sample_ratio: float
    train_ratio: float
    memory_ratio: float | None
    calls: dict[str, dict[str, int | None]]  # of one step, the last
    seconds: dict[str, float]  # by phase, medians
    ideal_seconds: dict[str, float]


def train(workload: str, algorithm: str | None = None, words: Sequence[str] = (), repeats: int = 3) -> Result:
    """Time training steps of a workload, after one that warms up and one whose memory is measured.

    words: changes to the workload's recipe, such as `run.threads=1`. Raises RecipeError, PluginError.
    """
    setup = compose(workload, algorithm, words)
    with _torch_as_it_was(), tempfile.TemporaryDirectory(prefix="rlkit-bench-") as folder:
        processes = dist.start(1, setup.options.device)
        elsewhere = _alive(processes.device)
        run = _begin(setup, processes, Path(folder))
        run.one_step()
        replay(run.whole, run.watch, list(run.watch.inputs))
        memory_ratio = _memory_ratio(run, elsewhere)
        real, ideal = [], []
        for _ in range(repeats):
            run.one_step()
            real.append({here: run.watch.seconds.get(there, 0.0) for there, here in PHASES.items()})
            ideal.append(_ideal_seconds(run))
        run.tracker.close()
        return Result(
            workload=workload,
            algorithm=setup.recipe["stages"]["main"]["algorithm"]["name"],
            device=str(processes.device),
            threads=torch.get_num_threads(),
            repeats=repeats,
            sample_ratio=_ratio(real, ideal, "sample"),
            train_ratio=_ratio(real, ideal, "train"),
            memory_ratio=memory_ratio,
            calls=_calls(run),
            seconds={phase: statistics.median(one[phase] for one in real) for phase in PHASES.values()},
            ideal_seconds={phase: statistics.median(one[phase] for one in ideal) for phase in ("sample", "train")},
        )


def compose(workload: str, algorithm: str | None = None, words: Sequence[str] = ()) -> Setup:
    """The workload's recipe, checked. With another algorithm a step's rows may not divide into the recipe's updates:
    the step is then one update, in passes as large as before."""
    if workload not in WORKLOADS:
        what, hint = f"no workload named {workload!r}.{nearest(workload, WORKLOADS)}", f"Known: {', '.join(WORKLOADS)}."
        raise RecipeError(what, where="--workload", hint=hint)
    chosen = [*QUIET, *WORKLOADS[workload]]
    chosen += [f"{STAGE}.algorithm.name={algorithm}"] if algorithm else []
    stage = recipe.resolve(recipe.compose(BASE, [*chosen, *words])).stages[0]
    rows, learner = recipe.rows_per_step(stage), stage.learner
    if rows is not None and rows % learner.batch:
        size = min(rows, learner.micro_batch or learner.batch)
        chosen += [f"{STAGE}.learner.batch={rows}", f"{STAGE}.learner.micro_batch={size}"]
    return recipe.read(BASE, [*chosen, *words])


def _begin(setup: Setup, processes: dist.Processes, folder: Path) -> _Timed:
    """A run that stands before its first step, as `session.run` brings it there."""
    watch = Watch()
    options = replace(setup.policy, backbone=_Watched(setup.policy.backbone, watch))
    policy = session.load_drawing(replace(setup, policy=options), processes)
    tracker = Tracker(folder, config=setup.recipe, wandb=setup.options.wandb, quiet=True)
    run = _Timed(setup, setup.stages[0], policy, processes, tracker, folder)
    run.watch = watch
    run.anchor()
    run.begin()
    return run


def _ideal_seconds(run: _Timed) -> dict[str, float]:
    seconds = {}
    for phase in ("sample", "train"):
        started = _now(run.policy.device)
        replay(run.whole, run.watch, [call for call in run.watch.calls if call.phase == phase])
        seconds[phase] = _now(run.policy.device) - started
    return seconds


def _ratio(real: Sequence[Mapping[str, float]], ideal: Sequence[Mapping[str, float]], phase: str) -> float:
    """The median over the turns: steps differ in what they demand, the two sides of a turn do not."""
    return statistics.median(bare[phase] / whole[phase] for whole, bare in zip(real, ideal, strict=True))


def _calls(run: _Timed) -> dict[str, dict[str, int | None]]:
    found: dict[str, dict[str, int | None]] = {}
    for phase in ("sample", "train"):
        rows = [call.rows for call in run.watch.calls if call.phase == phase]
        found[phase] = {"calls": len(rows), "rows": sum(rows)}
    found["train"]["backward"] = run.watch.backward
    found["demanded"] = {"sample": run.watch.demanded, "train": _trained_rows(run)}
    return found


def _trained_rows(run: _Timed) -> int | None:
    """The rows that a step needs a gradient of; None where only the algorithm knows."""
    needs, rows = run.algorithm.needs(), recipe.rows_per_step(run.stage)
    if rows is None or needs.differentiable:  # the latter go through the sampler, several calls a row
        return None
    return rows * (1 if needs.pairs is None else 2) * run.stage.learner.epochs * _passes(run.whole)


def _passes(policy: Weights) -> int:
    """Guidance asks the network twice, with the text and without."""
    return 2 if isinstance(policy, Policy) and policy.guidance != 1 else 1


@contextmanager
def _torch_as_it_was() -> Iterator[None]:
    """A run sets switches of torch for its whole process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def table(result: Result) -> str:
    """The result for people."""
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    lines = [f"{result.workload}, {result.algorithm}, {result.device}, {threads}, {result.repeats} repeats", ""]
    lines.append(f"{'seconds a step':<16}{'real':>9}{'ideal':>9}{'ratio':>9}")
    ratios = {"sample": result.sample_ratio, "train": result.train_ratio}
    for phase, seconds in result.seconds.items():
        bare = f"{result.ideal_seconds[phase]:9.3f}{ratios[phase]:9.3f}" if phase in ratios else ""
        lines.append(f"  {phase:<14}{seconds:9.3f}{bare}")
    memory = "unknown" if result.memory_ratio is None else f"{result.memory_ratio:.3f}"
    lines.append(f"{'peak memory':<34}{memory:>9}")
    lines.append("")
    for phase, made in ((name, result.calls[name]) for name in ("sample", "train")):
        demanded = result.calls["demanded"][phase]
        beside = "" if demanded is None else f", {demanded:,} demanded"
        backward = f" ({made['backward']:,} backward)" if "backward" in made else ""
        lines.append(f"network calls, {phase}: {made['calls']:,} with {made['rows']:,} rows{backward}{beside}")
    return "\n".join(lines)
