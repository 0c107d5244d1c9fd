"""The command line. `rlkit --help` lists the commands, `rlkit COMMAND --help` says what one takes.

Exit codes: 0 done; 1 an error that rlkit explains in one line (RLKIT_DEBUG=1 shows where it came from); 2 a command
line that cannot be read; 130 stopped with Ctrl+C.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from rlkit import __version__, merge, parity
from rlkit.arena import command as arena
from rlkit.bench import sync as bench_sync
from rlkit.commands import bench, catalogue, check, evaluate, pretrain, report, sample, train
from rlkit.errors import RlkitError, nearest
from rlkit.evaluation import unified_bench
from rlkit.plan import command as plan
from rlkit.serve import reward as reward_server
from rlkit.serve import rollout as rollout_server
from rlkit.sweep import command as sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except SystemExit as stop:  # argparse's way to end after a message
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:  # `rlkit list rewards | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return train.INTERRUPTED
    except (RlkitError, OSError) as error:
        if os.environ.get("RLKIT_DEBUG"):
            raise
        rank = os.environ.get("RANK")
        print(f"error: {f'process {rank}: ' if rank else ''}{error}", file=sys.stderr)
        return 1


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"rlkit {__version__}")
        return 0
    name, *rest = words
    if rest and f"{name} {rest[0]}" in COMMANDS:  # a command of two words
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        print(f"error: no command {name!r}.{nearest(name, COMMANDS)} See rlkit --help", file=sys.stderr)
        return 2
    parser = _Parser(prog=f"rlkit {name}", description=COMMANDS[name].summary, allow_abbrev=False)
    COMMANDS[name].arguments(parser)
    return COMMANDS[name].run(parser.parse_intermixed_args(rest))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.findall(r"(?<=\s)--?[\w-]+", message) if "unrecognized" in message else []
        near = nearest(unknown[0], self._option_string_actions) if unknown else ""
        end = "" if message.endswith((".", "?")) else "."
        self.exit(2, f"{self.format_usage()}error: {message}{end}{near}\n")


@dataclass(frozen=True)
class Command:
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "train": Command("Train a recipe, or go on with a run.", train.arguments, train.run),
    "check": Command("Say what a recipe would do, or what is wrong with it, in seconds.", check.arguments, check.run),
    "list": Command("List a catalogue: what a recipe may name.", catalogue.list_arguments, catalogue.list_one),
    "describe": Command(
        "Say what one entry is and which options it has.", catalogue.describe_arguments, catalogue.describe
    ),
    "sample": Command("Draw prompts with a recipe's base model or a run's weights.", sample.arguments, sample.run),
    "eval": Command(
        "Score the held-out prompts once, or a benchmark's with intervals.", evaluate.arguments, evaluate.run
    ),
    "report": Command("Write a run's report again, or print its numbers.", report.arguments, report.run),
    "bench": Command("Time the phases of a step against the bare network's calls.", bench.arguments, bench.run),
    "bench sync": Command(
        "Time pushes of weights to vLLM, and compare log-probs.", bench_sync.arguments, bench_sync.run
    ),
    "arena": Command("Compare algorithms with one budget of training time.", arena.arguments, arena.run),
    "sweep": Command("Run the trials of a W&B sweep file on this machine.", sweep.arguments, sweep.run),
    "serve-reward": Command(
        "Serve a reward to runs on this or other machines.", reward_server.arguments, reward_server.run
    ),
    "serve-rollout": Command(
        "Start the vLLM servers that a recipe asks.", rollout_server.arguments, rollout_server.run
    ),
    "merge": Command("Mix the weights of several runs.", merge.arguments, merge.run),
    "plan": Command("Predict memory, network calls and hours on other devices.", plan.arguments, plan.run),
    "check-backbone": Command("Compare a backbone with diffusers' own pipeline.", parity.arguments, parity.run),
    "pretrain-agent": Command(
        "Make the embedded world's agent from nothing: it reads and copies.", pretrain.arguments, pretrain.agent
    ),
    "pretrain-captioner": Command(
        "Make the embedded world's captioner from nothing.", pretrain.arguments, pretrain.captioner
    ),
    "pretrain-connector": Command(
        "Make what connects the embedded world's captioner and generator.", pretrain.arguments, pretrain.connector
    ),
    "pretrain-encoder": Command(
        "Make the embedded world's image encoder from nothing.", pretrain.arguments, pretrain.encoder
    ),
    "pretrain-world": Command(
        "Make the embedded world's base model from nothing.", pretrain.arguments, pretrain.generator
    ),
    "unified-bench": Command(
        "Compare pictures with what the policy draws from its own captions.", unified_bench.arguments, unified_bench.run
    ),
}


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rlkit COMMAND ...",
            "",
            "Reinforcement-learning post-training for visual generation.",
            "",
            *lines,
            "",
            "rlkit COMMAND --help says what a command takes. RLKIT_DEBUG=1 shows where an error came from.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
