"""`rlkit bench train`: time the phases of a step against the bare network's calls."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from rlkit.commands.words import positive
from rlkit.errors import nearest

BENCHMARKS = ("train",)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", type=_benchmark, metavar="KIND", help=f"one of {', '.join(BENCHMARKS)}")
    parser.add_argument("words", nargs="*", metavar="key=value", help="changes to the workload's recipe")
    parser.add_argument("--workload", required=True, metavar="NAME", help="what is timed: tiny, sd3_50m")
    parser.add_argument("--algorithm", metavar="NAME", help="with its defaults (default: the workload's own)")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="steps that are timed (default: 3)")
    parser.add_argument("--threads", type=positive, metavar="N", help="of torch (default: torch's own choice)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true")


def _benchmark(word: str) -> str:
    if word not in BENCHMARKS:
        raise argparse.ArgumentTypeError(f"there is no benchmark {word!r}.{nearest(word, BENCHMARKS)}")
    return word


def run(options: argparse.Namespace) -> int:
    from rlkit.bench import train as bench

    words = [f"run.threads={options.threads}"] if options.threads else []
    words += [f"run.device={options.device}"] if options.device else []
    result = bench.train(options.workload, options.algorithm, [*words, *options.words], options.repeats)
    print(json.dumps(asdict(result), indent=2) if options.json else bench.table(result))
    return 0
