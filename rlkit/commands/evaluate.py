"""`rlkit eval`: score held-out prompts once, or the prompts of a suite with several seeds and intervals."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit import sources
from rlkit.commands.words import positive, recipe_or_run
from rlkit.errors import RecipeError

if TYPE_CHECKING:
    from rlkit.stages import Setup


OF_A_SUITE = ("prompts", "seeds", "samplers", "weights", "judge", "judge_model", "judge_key_env", "reward", "out")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="RUN_OR_RECIPE key=value", help="a run's newest weights or a recipe's base model"
    )
    parser.add_argument("--held-out", type=positive, metavar="N", help="pictures (default: the recipe's)")
    parser.add_argument("--suite", metavar="NAME", help="a benchmark in the place of the recipe's held-out prompts")
    parser.add_argument("--prompts", type=Path, metavar="PATH", help="your copy of the suite's prompts")
    parser.add_argument("--seeds", metavar="LIST", help="of a suite (default: 0,1,2,3)")
    parser.add_argument("--samplers", metavar="LIST", help="of a suite: ode, sde (default: ode)")
    parser.add_argument(
        "--weights", choices=("current", "ema"), help="of a suite (default: those that the recipe says)"
    )
    parser.add_argument("--judge", metavar="URLS", help="OpenAI-compatible endpoints (default: the recipe's vlm_judge)")
    parser.add_argument("--judge-model", metavar="NAME", help="at these endpoints (default: the only one there)")
    parser.add_argument("--judge-key-env", metavar="NAME", help="the environment variable that holds their key")
    parser.add_argument("--reward", action="append", metavar="key=value", help="an option of the suite's reward")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of a suite's records, in which it can go on")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar="DIR", help="the records of two evaluations of a suite"
    )
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace) -> int:
    if options.suite is None:
        stray = [name for name in OF_A_SUITE if getattr(options, name) is not None]
        if stray:
            raise RecipeError("goes with --suite NAME.", where=f"--{stray[0].replace('_', '-')}")
    if options.compare is not None:
        if options.words or options.suite is not None:
            hint = "Give two folders alone: rlkit eval --compare DIR DIR"
            raise RecipeError("compares what has been evaluated.", where="--compare", hint=hint)
        from rlkit.evaluation import table as evaluation_table

        return _say_suite(evaluation_table.compare(*options.compare), options.json)
    if not options.words:
        raise RecipeError("which run or recipe?", hint="For instance rlkit eval runs/NAME")
    setup, folder = recipe_or_run(options.words[0], options.words[1:])
    if options.suite is not None:
        return _suite(setup, folder, options)

    from rlkit import session

    scores = session.evaluate_once(setup, folder, options.held_out or setup.stages[-1].evaluate.held_out)
    if options.json:
        finite = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        print(json.dumps(finite, indent=2))
        return 0
    for name, value in scores.items():
        if not name.endswith("_se"):
            error = f" ± {scores[f'{name}_se']:.3f}" if f"{name}_se" in scores else ""
            print(f"{name:<28} {value if name == 'count' else f'{value:.3f}'}{error}")
    return 0


def _suite(setup: Setup, folder: Path | None, options: argparse.Namespace) -> int:
    from rlkit.evaluation import evaluate as evaluation
    from rlkit.evaluation import table as evaluation_table

    judge = None
    if options.judge is not None:
        urls = [one.strip() for one in options.judge.split(",") if one.strip()]
        judge = {"endpoints": {"urls": urls, "key_env": options.judge_key_env}, "model": options.judge_model}
    elif options.judge_model or options.judge_key_env:
        raise RecipeError("goes with --judge URL.", where="--judge-model" if options.judge_model else "--judge-key-env")
    if options.held_out is not None and options.suite != "world":
        hint = "Leave it out: all of --prompts is drawn."
        raise RecipeError("is for the suite world.", where="--held-out", hint=hint)
    given = {key: sources.value_of(f"--reward {key}", value) for key, value in map(_option, options.reward or ())}
    settings = evaluation.Settings(
        suite=options.suite,
        prompts=options.prompts,
        seeds=_seeds(options.seeds or "0,1,2,3"),
        samplers=tuple(one.strip() for one in (options.samplers or "ode").split(",")),
        out=options.out,
        weights=options.weights,
        count=options.held_out,
        judge=judge,
        reward=given,
    )
    out = evaluation.evaluate(setup, folder, Path(options.words[0]).stem, settings)
    told = evaluation_table.summary(out)
    if not options.json:
        print(f"records: {out}")
    return _say_suite(told, options.json)


def _say_suite(told: Mapping[str, Any], as_json: bool) -> int:
    from rlkit.evaluation import table as evaluation_table

    print(json.dumps(told, indent=2) if as_json else evaluation_table.table(told))
    return 0


def _seeds(text: str) -> tuple[int, ...]:
    words = [one.strip() for one in text.split(",")]
    if not all(one.isdecimal() for one in words):
        raise RecipeError(f"must be numbers with commas between them, not {text!r}.", where="--seeds")
    return tuple(int(one) for one in words)


def _option(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise RecipeError(f"{word!r} is not key=value.", where="--reward", hint="For instance detector=owlv2")
    return key, value
