"""A whole run: its stages in order, the folder that keeps its record, how it stops and how it goes on.

`load_policy`, `draw` and `evaluate_once` are what is done with a run once it is there.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from rlkit import checkpoint
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.errors import CheckpointError, DataError, RecipeError, RlkitError
from rlkit.held_out import prompts_of, score, showing, started_rollout, to_encode
from rlkit.language import LanguagePolicy
from rlkit.parts import Connector, Parts
from rlkit.policy import Policy
from rlkit.record import describe_held_out
from rlkit.resources import without_encoders
from rlkit.run import Interrupted, Run, Stop, begin
from rlkit.shelf import Shelf
from rlkit.stages import Setup
from rlkit.tracking import HELD_OUT, Metrics, Tracker
from rlkit.trainer import train
from rlkit.types import Connection, Context, FlowModel, Plan, Prompt, TokenModel
from rlkit.weights import Lora, Weights

# Of the policy's keys, those that change no bit of its numbers.
HARMLESS = [f"policy.{key}" for key in ("conditions", "conditions_in_memory", "encoders", "sets")]


def run(
    setup: Setup,
    folder: Path,
    processes: Processes,
    resume: bool = False,
    command: str = "",
    started: float | None = None,
    quiet: bool = False,
    tell: Callable[[], Sequence[Path]] = tuple,
) -> None:
    """Train every stage in order and leave the record in `folder`.

    `started`: a `time.monotonic()` from before the imports, so that the seconds of the start are known. With `resume`
    the run goes on after its newest whole checkpoint, or from the beginning if it has none. `tell`: what the first
    process does once the run is over or was stopped, while its mirrors are there; the files it names are for them too.
    Raises Interrupted once the run was asked to stop and has saved itself; CheckpointError, RewardError, DataError.
    """
    with _alone(folder, processes):
        _run(setup, folder, processes, resume, command, started, quiet, tell)


def _run(
    setup: Setup,
    folder: Path,
    processes: Processes,
    resume: bool,
    command: str,
    started: float | None,
    quiet: bool,
    tell: Callable[[], Sequence[Path]],
) -> None:
    started = time.monotonic() if started is None else started
    saved = checkpoint.newest(folder) if resume else None
    if saved:
        same_recipe(setup, saved)
    if (folder / Metrics.NAME).exists():
        Metrics.read(folder)  # for its errors, before anything is written or loaded
    look_ahead(setup, saved.numbers["stage"] if saved else None)
    _prepare(setup, folder, processes, command, resume, saved)
    tracker = Tracker(
        folder,
        config=setup.recipe,
        wandb=setup.options.wandb,
        tensorboard=setup.options.tensorboard,
        trackio=setup.options.trackio,
        quiet=quiet,
        first=processes.first,
    )

    def event(name: str, stage: str, step: int, at: int, **more: Any) -> None:
        tracker.write({"kind": "event", "event": name, "stage": stage, "step": step, "at": at} | more)

    try:
        policy = load_policy(setup, processes)
        if setup.policy.resources.encoders == "free" and isinstance(policy, Policy):
            texts = [text for stage in setup.stages for text in stage.data.open().texts()]
            trained = {stage.name for stage in setup.stages}
            asked = [to_encode(stage, stage.name in trained) for stage in setup.every_stage()]
            policy.free_encoders(chain.from_iterable(asked), texts)
        names = [stage.name for stage in setup.stages]
        first, at = (names.index(saved.numbers["stage"]), saved.at) if saved else (0, 0)
        begun = first + 1 if saved and saved.numbers["done"] else first
        tracker.rewind(saved.at if saved else -1, names[begun:])
        if resume:
            text = f"resumed after step {at}" if saved else "no whole checkpoint: resumed from the start"
            event("resumed", names[first], 0, at, text=text)
            tracker.say(text)
        event("started", names[first], 0, at, **{"seconds/start": time.monotonic() - started})
        with _stop_on_signal(tracker) as stop:
            moments: dict[str, Tensor] | None = None
            for number, stage in enumerate(setup.stages[first:], first):
                under_way = Run(setup, stage, policy, processes, tracker, folder, at, stop)
                try:
                    _begin(under_way, moments, saved)
                    train(under_way)
                finally:
                    under_way.close()
                at = under_way.at
                if under_way.ended_with("stop"):
                    break
                if number + 1 < len(setup.stages):
                    moments = under_way.hand_over(setup.stages[number + 1])
        if processes.first:
            line = policy.export(folder / "weights", under_way.stage.evaluate.weights)
            total = {"seconds/total": time.monotonic() - started}
            event("finished", under_way.stage.name, under_way.done, at, **total, load=line)
    except Interrupted:
        tracker.keep(tell)
        raise
    else:
        tracker.keep(tell)
    finally:
        tracker.close()


@contextmanager
def _alone(folder: Path, processes: Processes) -> Iterator[None]:
    """Hold the run folder. CheckpointError while another process trains in it: each would undo what the other writes.

    The lock is the folder's own and ends with the process, however that ends.
    """
    if not processes.first:
        yield
        return
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "Wait until it ends, or stop it with Ctrl+C; then resume."
            raise CheckpointError("another process trains in this folder.", where=str(folder), hint=hint) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def look_ahead(setup: Setup, begin: str | None = None) -> None:
    """What every stage needs of this machine, before the first one has begun: files of prompts, pairs to judge rewards
    by, and what its rollout says is not installed. RlkitError names the stage. begin: the first that is left."""
    names = [stage.name for stage in setup.stages]
    left = setup.stages[names.index(begin) if begin in names else 0 :]
    for stage in replace(setup, stages=left).every_stage():
        at, sanity = f"stages.{stage.name}", stage.monitors.sanity
        missing = getattr(stage.rollout, "missing", None)
        if missing is not None and (hint := missing()):
            raise RecipeError("needs what is not installed here.", where=f"{at}.rollout", hint=hint)
        for key, look in (("data", stage.data.open), ("monitors.sanity", getattr(sanity, "pairs", None))):
            try:
                if look is not None:
                    look()
            except RlkitError as error:
                error.where = f"{at}.{key}: {error.where}" if error.where else f"{at}.{key}"
                raise
        if stage.until is not None and stage.until.metric.startswith(HELD_OUT) and not prompts_of(stage, 1):
            what = f"the stage waits for {stage.until.metric!r}, and its data has no held-out prompts."
            raise RecipeError(what, where=f"{at}.until.metric", hint=f"Set {at}.data.held_out_path.")


def _begin(run: Run, moments: dict[str, Tensor] | None, saved: checkpoint.Checkpoint | None) -> None:
    """What a stage does before its steps: take over from the one before, or go on where it was stopped."""
    if saved is not None and saved.numbers["stage"] == run.stage.name:
        run.anchor()
        run.restore(saved)
    else:
        run.take_over(moments)
        run.anchor()
    run.tracker.stage(run.stage.name, run.stage.steps, run.done)
    if run.done == 0 and run.saved is None:
        run.begin()
    if run.done == 0:
        run.stop_if_asked()
        run.open()


def load_policy(
    setup: Setup, processes: Processes | None = None, folder: Path | None = None
) -> Policy | LanguagePolicy | Parts:
    """The recipe's policy as its backbone gives it, or with the weights of a run folder's newest checkpoint."""
    processes = processes or Processes()
    options = setup.options
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(options.deterministic)
    policy = _of_parts(setup, processes.device) if setup.policy.parts else _of_one(setup, processes.device)
    processes.same_everywhere(policy.trainable.values())
    if any(stage.anchor == "base" and stage.algorithm.needs().reference for stage in setup.stages):
        policy.keep_base()
    if folder is not None:
        saved = checkpoint.newest(folder)
        if saved is None:
            raise CheckpointError("no whole checkpoint", where=str(folder), hint="Give a run folder that has one.")
        policy.load_state({k.removeprefix("policy/"): v for k, v in saved.tensors.items() if k.startswith("policy/")})
    return policy


def _dtype(setup: Setup, train: Lora | str | None) -> torch.dtype:
    """Of the weights: what is never trained needs no more digits than the network calculates with."""
    return torch.bfloat16 if setup.options.precision == "bf16" and train is not None else torch.float32


def _of_one(setup: Setup, device: torch.device) -> Policy | LanguagePolicy | Parts:
    told, dtype = setup.policy, _dtype(setup, setup.policy.lora)
    model = told.backbone.load(device, dtype)
    if not isinstance(model, FlowModel | TokenModel):
        what = "is no policy by itself: it connects two others."
        raise RecipeError(what, where="policy.backbone", hint="Give policy.parts: a captioner, this, and a generator.")
    shelf = Shelf(Path(told.conditions), setup.recipe["policy"]["backbone"], dtype, device) if told.conditions else None
    if isinstance(model, TokenModel):
        return _writing(setup, model, told.lora, device, shelf)
    policy = _drawing(setup, model, told.lora, device, shelf)
    named = dict(setup.recipe["policy"]["backbone"])
    policy.origin = (named.pop("name"), named)
    return policy


def _of_parts(setup: Setup, device: torch.device) -> Parts:
    """Captioner, connector and generator. The connector is made last: it depends on both others."""
    parts: dict[str, Weights] = {}
    connections: dict[str, Connection] = {}
    for name, backbone in setup.policy.parts.items():
        way = setup.policy.train[name]
        model = backbone.load(device, _dtype(setup, way))
        if isinstance(model, TokenModel):
            parts[name] = writer = _writing(setup, model, way, device)
        elif isinstance(model, FlowModel):
            parts[name] = drawer = _drawing(setup, model, way, device)
        else:
            connections[name] = model
    for name, connection in connections.items():
        options, way = setup.options, setup.policy.train[name]
        parts[name] = Connector(connection, writer, drawer.model, way, options.precision, options.seed)
    policy = Parts({name: parts[name] for name in setup.policy.parts})
    for stage in setup.stages:  # now, not when its turn comes
        only = {name: way.only for name, way in stage.train.items()}
        policy.refuse_unknown(only, f"stages.{stage.name}.train")
    if setup.policy.resources.encoders == "free":
        drawer.model = without_encoders(drawer.model, {})
    return policy


def _writing(
    setup: Setup,
    model: TokenModel,
    train: Lora | Literal["frozen"] | None,
    device: torch.device,
    shelf: Shelf | None = None,
) -> LanguagePolicy:
    options, told = setup.options, setup.policy
    resources = replace(told.resources, encoders="keep") if told.parts else told.resources
    return LanguagePolicy(model, train, device, options.precision, options.seed, told.checkpointing, shelf, resources)


def load_single(setup: Setup, folder: Path | None = None) -> Policy | LanguagePolicy:
    """As `load_policy`, of a recipe whose policy is one network; RecipeError for one of several."""
    policy = load_policy(setup, folder=folder)
    if isinstance(policy, Parts):
        raise RecipeError("is of several parts, and this is for policies of one network.", where="policy.parts")
    return policy


def load_drawing(setup: Setup, processes: Processes | None = None, folder: Path | None = None) -> Policy:
    """As `load_policy`, of a recipe whose policy draws pictures; RecipeError for one that writes."""
    policy = load_policy(setup, processes, folder)
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Parts):
        raise RecipeError("draws pictures of its own captions, and this is for prompts.", where="policy.parts")
    raise RecipeError("writes texts, and this is for policies that draw.", where="policy.backbone")


def _drawing(
    setup: Setup,
    model: FlowModel,
    train: Lora | Literal["frozen"] | None,
    device: torch.device,
    shelf: Shelf | None = None,
) -> Policy:
    options, told = setup.options, setup.policy
    numbers = (options.precision, options.seed, told.guidance, told.negative, told.checkpointing)
    return Policy(model, train, device, *numbers, shelf, told.resources)


def draw(setup: Setup, policy: Policy, prompts: list[str], n: int, seed: int = 0) -> Tensor:
    """Pictures [len(prompts) * n, C, H, W]: n of each prompt, sampled without exploration noise."""
    rows = tuple(Prompt(id=i, text=text) for i, text in enumerate(prompts))
    context = Context(seed, "sample", 0, setup.stages[-1].rollout.steps, {}, Processes().gather)
    with started_rollout(setup.stages[-1], policy, Processes()) as rollout:
        media: Tensor = rollout.collect(PromptBatch(rows, n), showing(setup.stages[-1], policy), context).media
    return media


def reconstruct(
    setup: Setup, folder: Path | None = None, text: str = ""
) -> Callable[[Sequence[Tensor]], tuple[Tensor, list[str]]]:
    """Pictures [3, H, W] -> (what the policy draws of its own captions [N, 3, H, W], those captions).

    Of the backbones, or of a run folder's newest checkpoint. text: that of every prompt. RecipeError for a policy of
    one network.
    """
    policy, stage = load_policy(setup, folder=folder), setup.stages[-1]
    if not isinstance(policy, Parts):
        what = "a picture is put into words and drawn again by a captioner, a connector and a generator."
        raise RecipeError(what, where="policy", hint="Give policy.parts, as world_unified does.")
    policy.stage({}, "flow")

    def again(pictures: Sequence[Tensor]) -> tuple[Tensor, list[str]]:
        rows = tuple(Prompt(id=row, text=text, source=picture) for row, picture in enumerate(pictures))
        context = Context(setup.options.seed, "reconstruct", 0, stage.rollout.steps, {}, Processes().gather)
        with started_rollout(stage, policy, Processes()) as rollout:
            drawn = rollout.collect(PromptBatch(rows, 1), Plan(steps=stage.evaluate.steps), context)
        return drawn.media, list(drawn.texts) or [""] * len(rows)

    return again


def evaluate_once(setup: Setup, folder: Path | None, count: int) -> dict[str, float]:
    """The last stage's held-out scores of the backbone, or of a run folder's newest checkpoint."""
    policy, stage = load_policy(setup, folder=folder), setup.stages[-1]
    begin(policy, stage)
    prompts = prompts_of(stage, count)
    if not prompts:
        raise DataError("there are no held-out prompts", where=f"stages.{stage.name}.data", hint="Set held_out_path.")
    samples, scores = score(stage, policy, Processes(), setup.options, prompts, showing(stage, policy))
    return describe_held_out(samples, scores, Processes().gather) | {"count": len(prompts)}


def same_recipe(setup: Setup, saved: checkpoint.Checkpoint) -> None:
    """Refuse a checkpoint of another recipe. What cannot change the numbers so far may differ."""
    then, now = _flat(saved.numbers["recipe"]), _flat(setup.recipe)
    differ = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key) and not _harmless(key)]
    if differ:
        changes = ", ".join(f"{key}: {then.get(key)!r} -> {now.get(key)!r}" for key in differ)
        raise CheckpointError(
            f"this checkpoint is of another recipe: {changes}",
            where=str(saved.folder),
            hint="Resume with the run's own recipe, or start a new run.",
        )


def _harmless(key: str) -> bool:
    if key in HARMLESS:
        return True
    parts = key.split(".")
    if parts[0] == "run":
        return parts[1] not in ("seed", "precision", "deterministic", "order")
    return parts[0] == "stages" and len(parts) > 2 and parts[2] in ("evaluate", "steps", "until", "expect", "monitors")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {k: v for name, part in tree.items() for k, v in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}


def _prepare(
    setup: Setup,
    folder: Path,
    processes: Processes,
    command: str,
    resume: bool,
    saved: checkpoint.Checkpoint | None,
) -> None:
    """The files that say what the run is. A resumed run keeps those of its start, and no checkpoint beyond `saved`."""
    if processes.first:
        import yaml

        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.set_aside(folder, saved.at if saved else -1)
        if not (resume and (folder / "environment.json").exists()):
            _write(folder / "environment.json", json.dumps(environment(processes, command), indent=1) + "\n")
        _write(folder / "recipe.yaml", yaml.safe_dump(setup.recipe, sort_keys=False, allow_unicode=True))
    processes.wait()


def _write(file: Path, text: str) -> None:
    """Whole or not at all: the run cannot go on without it."""
    draft = file.with_name(f".{file.name}")
    draft.write_text(text)
    draft.replace(file)


def environment(processes: Processes, command: str) -> dict[str, Any]:
    """Where the run ran, for its report."""
    versions = {"python": platform.python_version()}
    for name in ("rlkit-visual", "torch", "diffusers", "transformers", "peft", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a distribution"
    return {
        "command": command or " ".join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes.count,
        "device": str(processes.device),
    }


@contextmanager
def _stop_on_signal(tracker: Tracker) -> Iterator[Stop]:
    """Ctrl+C or a polite kill ends the run after the step under way; a second one ends it at once."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        with suppress(RuntimeError):  # the signal came in the middle of another print, which cannot be entered twice
            tracker.say("stopping after this step; once more to stop at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
