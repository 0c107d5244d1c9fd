"""`rlkit plan`: what a recipe would take of a machine that need not be there. Everything that it says is predicted."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rlkit import recipe
from rlkit.errors import RecipeError

if TYPE_CHECKING:
    from rlkit.plan.devices import Machine
    from rlkit.plan.stage import Prediction
    from rlkit.stages import Setup

HEADING = "predicted, not measured"
NOT_COUNTED = "rewards, decoding, encoding of prompts, checkpoints and start-up are not counted in the time"
SIZE_SAID = "size"  # of a reward's card


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="RECIPE key=value", help="a recipe's name or file, and changes")
    parser.add_argument("--gpus", default="cpu", metavar="8xH200", help="how many of which device (default: cpu)")
    parser.add_argument("--answer", type=float, default=1.0, metavar="SHARE", help="of the most tokens of an answer")
    parser.add_argument(
        "--read", type=int, metavar="TOKENS", help="of a batch's longest conversation, beside its answers"
    )
    parser.add_argument("--turns", type=float, metavar="N", help="that an agent takes, the mean (default: its limit)")
    parser.add_argument(
        "--drawn", type=float, default=1.0, metavar="SHARE", help="of a step's answers: those that can be, each once"
    )
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace) -> int:
    """0 when every stage fits, 1 when one does not."""
    from rlkit.plan import answers as plan_answers
    from rlkit.plan import devices as plan_devices
    from rlkit.plan import stage as plan_stage

    name, *changes = options.words
    if "=" in name:
        raise RecipeError("which recipe?", hint="For instance rlkit plan RECIPE --gpus 8xH200")
    plan_devices.check(options.gpus)  # before anything is read
    try:
        known = plan_answers.Known(options.answer, options.read, options.turns, options.drawn)
    except ValueError as error:
        raise RecipeError(f"{error}.", hint="For instance --answer 0.5 --read 400.") from error
    setup = recipe.read(name, changes)
    machine = plan_devices.machine(options.gpus, setup.options.threads)
    predictions = plan_stage.predict(setup, machine, known)
    if known != plan_answers.Known() and not any(one.answers for one in predictions):
        what = "no stage of this recipe writes."
        raise RecipeError(what, where="--answer, --read, --turns and --drawn", hint="Leave them out.")
    print(
        json.dumps(described(setup, machine, predictions), indent=2)
        if options.json
        else "\n".join(table(setup, machine, predictions))
    )
    return 0 if all(one.fits for one in predictions) else 1


def described(setup: Setup, machine: Machine, predictions: list[Prediction]) -> dict[str, Any]:
    """The same as plain values."""
    stages = []
    for one in predictions:
        calls = None if one.calls is None else {**asdict(one.calls), "total": one.calls.total, "first": one.first_calls}
        stages.append(
            {
                "stage": one.stage,
                "problem": one.problem,
                "steps": one.steps,
                "samples": one.samples,
                "memory": dict(one.memory or {}),
                "memory_total": one.total,
                "fits": one.fits,
                "advice": list(one.advice),
                "network_calls": calls,
                "flops": one.flops,
                "seconds": dict(one.seconds or {}),
                "step_seconds": one.step_seconds,
                "samples_per_second": _rate(one),
                "hours": one.hours,
                "answers": one.answers,
                "source": "" if one.size is None else one.size.source,
            }
        )
    return {
        "heading": HEADING,
        "device": asdict(machine.device),
        "count": machine.count,
        "not_counted": NOT_COUNTED,
        "rewards": rewards(setup),
        "stages": stages,
    }


def table(setup: Setup, machine: Machine, predictions: list[Prediction]) -> Iterator[str]:
    """Lines for a person."""
    device, precision = machine.device, setup.options.precision
    peak = device.bf16 if precision == "bf16" else device.fp32
    speed = f"{peak / 1e12:.3g} TFLOP/s in {precision}, of which {device.efficiency:.0%} are expected"
    yield f"{HEADING}: {machine.count} x {device.name} ({device.memory / 1e9:.0f} GB, {speed})"
    for one in predictions:
        yield f"stage {one.stage}: {one.steps:,} steps"
        yield from (f"  {key:<10} {text}" for key, text in _lines(one))
    yield f"rewards: {'; '.join(rewards(setup)) or 'none'}"
    yield NOT_COUNTED


def _lines(one: Prediction) -> Iterator[tuple[str, str]]:
    if one.size is None or one.calls is None or one.seconds is None or one.memory is None:
        yield "problem", one.problem
        return
    size, calls = one.size, one.calls
    yield "policy", f"{_short(size.parameters)} parameters, {size.tokens:,} tokens a row: {size.source}"
    parts = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in one.memory.items() if count >= 5e6)
    end = "" if one.fits else ": DOES NOT FIT"
    yield "memory", f"{one.total / 1e9:.2f} of {one.available / 1e9:.0f} GB on each device{end} ({parts})"
    if one.answers:
        yield "answers", one.answers
    for text in one.advice:
        yield "change", text
    split = f"sampling {calls.sampled:,.0f}, without gradient {calls.compared:,.0f}, with {calls.trained:,.0f}"
    first = f"; first step {one.first_calls:,.0f}" if round(one.first_calls) != round(calls.total) else ""
    yield "calls", f"{calls.total:,.0f} a step ({split}){first}"
    yield "FLOPs", f"{one.flops:.3g} a step"
    phases = ", ".join(f"{name} {_seconds(count)}" for name, count in one.seconds.items())
    yield "time", f"{_seconds(one.step_seconds)} a step ({phases}), {_rate(one):.3g} samples/s"
    yield "stage", f"{one.hours:.2f} hours with its evaluations"


def rewards(setup: Setup) -> list[str]:
    """What each reward's card says of its size. Its time is not counted."""
    found = {}
    for stage in setup.stages:
        for one in stage.rewards:
            said = getattr(one.reward, SIZE_SAID, None)
            found[one.name] = f"{one.name} ({said if isinstance(said, str) and said else 'no size on its card'})"
    return list(found.values())


def _rate(one: Prediction) -> float:
    return one.samples / one.step_seconds if one.step_seconds else 0.0


def _short(count: float) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _seconds(count: float) -> str:
    return f"{count:.1f} s" if count >= 10 else f"{count:.2g} s"
