"""The command line. `rlkit --help` lists the commands, `rlkit COMMAND --help` says what one takes.

Exit codes: 0 done; 1 an error that rlkit explains in one line (RLKIT_DEBUG=1 shows where it came from); 2 a command
line that cannot be read; 130 stopped with Ctrl+C.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from rlkit import __version__, check, merge, parity, recipe, recipe_course, registry, sources
from rlkit.arena import command as arena
from rlkit.bench import sync as bench_sync
from rlkit.errors import DataError, PluginError, RecipeError, RlkitError, nearest
from rlkit.evaluation import unified_bench
from rlkit.plan import command as plan
from rlkit.serve import reward as reward_server
from rlkit.serve import rollout as rollout_server
from rlkit.sweep import command as sweep

if TYPE_CHECKING:
    from rlkit.dist import Processes
    from rlkit.stages import Setup

STARTED = time.monotonic()  # before torch is imported, so that a run's first phase has its whole length
INTERRUPTED = 130
KINDS = (*registry.KINDS, "recipes")
BENCHMARKS = ("train",)


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
        return INTERRUPTED
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


# ---------------------------------------------------------------------------------------------------- train


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="RECIPE key=value", help="a recipe's name or file, and changes")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in this folder")
    which.add_argument("--from", dest="begin", metavar="STAGE", help="leave out the stages before this one")
    which.add_argument("--only", metavar="STAGE", help="leave out all other stages")
    # torchrun reads every --nproc on its command line as its own, so the processes that it starts get --processes.
    parser.add_argument("--nproc", "--processes", type=_positive, default=1, metavar="N", help="on this machine")
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def _train(options: argparse.Namespace) -> int:
    name, overrides = _recipe_words(options.words)
    if name is None and options.resume is not None:
        name = str(options.resume / "recipe.yaml")
        if not Path(name).is_file():
            hint = f"To begin one there: rlkit train RECIPE --resume {options.resume}"
            raise RecipeError(f"there is no run in {options.resume} to go on with.", where="--resume", hint=hint)
    if name is None:
        raise RecipeError("which recipe?", hint=f"For instance rlkit train {next(iter(registry.recipes()), 'FILE')}")
    if options.begin or options.only:
        without = recipe_course.left_out(recipe.compose(name, overrides), options.begin, options.only)
        options.words, overrides = [*options.words, *without], [*overrides, *without]  # for other processes too
    setup = recipe.read(name, overrides)
    if options.nproc > 1 and "WORLD_SIZE" not in os.environ:
        _run_folder(setup, name, options.resume)  # for its errors, once and not in every process
        return _launch(options.nproc, _train_words(options, "--processes"))

    from rlkit import dist, session, trainer

    processes = dist.start(options.nproc, setup.options.device)
    folder = _same_folder(processes, _run_folder(setup, name, options.resume) if processes.first else None)
    say = print if processes.first and not options.quiet else _silent
    say(f"run folder: {folder}")
    command = shlex.join(["rlkit", *_train_words(options, "--nproc")])
    code = 0

    def tell() -> list[Path]:
        return _tell(folder, say)

    try:
        session.run(setup, folder, processes, options.resume is not None, command, STARTED, options.quiet, tell)
    except trainer.Interrupted as stop:
        if processes.first:
            print(stop, file=sys.stderr)
        code = INTERRUPTED
    finally:
        processes.close()
    return code


def _recipe_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """(the recipe or None, overrides). The recipe is the first word, unless that changes a key."""
    if not words or sources.is_override(words[0]):
        return None, list(words)
    return words[0], list(words[1:])


def _train_words(options: argparse.Namespace, count: str) -> list[str]:
    """The command line again; `count` is how it says the number of processes."""
    words = ["train", *options.words]
    words += ["--resume", str(options.resume)] if options.resume else []
    words += [count, str(options.nproc)] if options.nproc > 1 else []
    return words + (["--quiet"] if options.quiet else [])


def _run_folder(setup: Setup, name: str, resume: Path | None) -> Path:
    """The folder of this run. A new run never writes into one that holds anything."""
    if resume is not None:
        return resume
    if setup.options.dir is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        return Path("runs") / f"{Path(name).stem}-{stamp}-{secrets.token_hex(2)}"
    folder = Path(setup.options.dir).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = f"To go on with the run in it: rlkit train --resume {folder}; for a new one choose another run.dir."
        raise RecipeError(f"{folder} exists and is not empty.", where="run.dir", hint=hint)
    return folder


def _same_folder(processes: Processes, folder: Path | None) -> Path:
    """The first process's choice, on all of them."""
    import torch

    letters = torch.tensor(list(str(folder or "").encode()), dtype=torch.int64)
    return Path(bytes(processes.gather(letters).tolist()).decode())


def _launch(count: int, arguments: Sequence[str]) -> int:
    """Start the processes and wait. They have a session of their own: Ctrl+C reaches them once, through here."""
    from rlkit.dist import launch_command

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // count)), **os.environ}
    child = subprocess.Popen(launch_command(count, arguments), env=environment, start_new_session=True)
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        return INTERRUPTED
    return 1 if code else 0


def _tell(folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Write the report of a run and say how it went. A run that stopped before its first numbers has none."""
    from rlkit.report import summary as report

    try:
        page = report.write(folder)
    except DataError as error:
        say(f"no report: {error}")
        return []
    say(report.sentence(report.summary(folder)))
    say(f"report: {page}")
    return [page]


def _silent(text: str) -> None:
    pass


# ------------------------------------------------------------------------------------------ list and describe


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", type=_kind, metavar="KIND", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("--json", action="store_true")


def _kind(word: str) -> str:
    if word not in KINDS:
        raise argparse.ArgumentTypeError(f"there is no catalogue {word!r}.{nearest(word, KINDS)}")
    return word


def _list(options: argparse.Namespace) -> int:
    found = _catalogue(options.kind)
    if options.json:
        print(json.dumps(found, indent=2, default=str))
        return 0
    width = max((len(one["name"]) for one in found), default=0)
    for one in found:
        extra = f"  [pip install '{registry.DISTRIBUTION}[{one['extra']}]']" if one.get("extra") else ""
        source = "" if one["source"] == "built in" else f"  ({one['source']})"
        print(f"{one['name']:<{width}}  {one['summary']}{_facts(one)}{source}{extra}".rstrip())
    return 0


def _facts(one: Mapping[str, Any]) -> str:
    """What an algorithm or a backbone says of itself besides: paper, tasks, size, licence."""
    said = one.get("constants", {})
    if one["kind"] not in ("algorithms", "backbones"):
        return ""
    facts = [said.get("paper"), " and ".join(said.get("tasks", ())), said.get("parameters"), said.get("licence")]
    shown = "; ".join(fact for fact in facts if fact)
    return f"  ({shown})" if shown else ""


def _catalogue(kind: str) -> list[dict[str, Any]]:
    """Every entry of a kind as plain values, read without importing any."""
    if kind != "recipes":
        entries = [asdict(entry) for entry in registry.describe(kind)]
        return [{("options" if key == "fields" else key): value for key, value in one.items()} for one in entries]
    found = []
    for name, file in registry.recipes().items():
        summary = _opening(file).partition("\n")[0]
        found.append({"name": name, "kind": kind, "summary": summary, "source": "built in", "path": str(file)})
    return found


def _opening(file: Path) -> str:
    """The comment that a recipe begins with."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines).strip()


def _describe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name")
    parser.add_argument("--json", action="store_true")


def _describe(options: argparse.Namespace) -> int:
    everything = [one for kind in KINDS for one in _catalogue(kind)]
    found = [one for one in everything if one["name"] == options.name]
    if not found:
        names = [one["name"] for one in everything]
        hint = f"See rlkit list {'|'.join(KINDS)}"
        raise PluginError(f"nothing is called {options.name!r}.{nearest(options.name, names)}", hint=hint)
    for one in found:
        one["description"] = _description(one)
        if one["kind"] == "tools":
            one["arguments"] = _arguments(one["name"])
    if options.json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2, default=str))
        return 0
    for one in found:
        print(f"{one['name']} ({one['kind'].removesuffix('s')}, {one['source']})\n\n{one['description']}")
        if one["kind"] == "rewards":
            print("\n".join(["", "card:", *_card(one["constants"])]))
        if one["kind"] == "tools":
            print("\n".join(["", "an agent gives it:", *_given(one["arguments"])]))
        if one.get("options"):
            print("\noptions:")
        for option in one.get("options", ()):
            default = "" if option["default"] is None else f" = {option['default']}"
            doc = f"  {option['doc']}" if option["doc"] else ""
            print(f"  {option['name']}: {option['annotation']}{default}{doc}")
    return 0


def _card(constants: Mapping[str, Any]) -> list[str]:
    """What a reward says about itself, a line each."""
    low, high = constants.get("range") or (None, None)
    better = "more" if constants.get("higher_is_better", True) else "less"
    ends = ["any" if end is None else f"{end:g}" for end in (low, high)]
    lines = {
        "range": f"{ends[0]} to {ends[1]}, {better} is better",
        "reads": ", ".join(("image", *constants.get("reads", ()))),
        "looks at": ", ".join(constants.get("optional", ())),
        "components": ", ".join(constants.get("components", ())),
        "compares": "within a group" if constants.get("groupwise") else "",
        "gradient": "passes one to the picture" if constants.get("differentiable") else "",
        "protocol": constants.get("protocol", ""),
        "licence": constants.get("licence", ""),
        "weights": constants.get("size", ""),
    }
    return [f"  {name}: {text}" for name, text in lines.items() if text]


def _arguments(tool: str) -> dict[str, Any]:
    """What an agent gives it, as a JSON schema."""
    from rlkit.agents import schemas

    try:
        return schemas.schema(registry.load("tools", tool), tool).json
    except (RlkitError, ValueError) as error:  # a third party's that cannot be imported, or is no tool
        return {"error": str(error)}


def _given(schema: Mapping[str, Any]) -> list[str]:
    """Its arguments, a line each, as JSON schemas."""
    listed = schema.get("properties", schema)
    return [f"  {name}: {json.dumps(kind, ensure_ascii=False)}" for name, kind in listed.items()] or ["  nothing"]


def _description(one: Mapping[str, Any]) -> str:
    if one["kind"] == "recipes":
        return _opening(Path(one["path"]))
    import inspect

    try:
        entry = registry.load(one["kind"], one["name"])
        parts = (inspect.getdoc(entry), inspect.getdoc(inspect.getmodule(entry)))  # its file says the rest
        return "\n\n".join(part for part in parts if part) or one["summary"]
    except RlkitError:  # what it needs is not installed: its first line is known all the same
        return str(one["summary"])


# ------------------------------------------------------------------------------------------- sample and eval


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RECIPE_OR_RUN", help="a recipe's base model or a run's newest weights")
    parser.add_argument("words", nargs="+", metavar="PROMPT key=value")
    parser.add_argument("--n", type=_positive, default=8, help="pictures of each prompt (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="where the picture goes (default: grid.png)")
    parser.add_argument("--seed", type=int, default=0)


def _sample(options: argparse.Namespace) -> int:
    overrides = [word for word in options.words if sources.is_override(word)]
    prompts = [word for word in options.words if word not in overrides]
    if not prompts:
        raise RecipeError("what shall it draw?", hint='For instance rlkit sample RECIPE "a red circle"')
    setup, folder = _recipe_or_run(options.source, overrides)

    from rlkit import dist, session

    policy = session.load_drawing(setup, dist.start(1, setup.options.device), folder)
    for prompt in prompts:
        for word in policy.model.unread(prompt):
            print(f"warning: the text encoder cannot read {word!r} in {prompt!r}", file=sys.stderr)
    pictures = session.draw(setup, policy, prompts, options.n, options.seed)
    _write_grid(options.out, pictures, columns=options.n if len(prompts) > 1 else min(options.n, 8))
    print(options.out)
    return 0


def _recipe_or_run(word: str, overrides: Sequence[str]) -> tuple[Setup, Path | None]:
    folder = Path(word)
    if not folder.is_dir():
        return recipe.read(word, overrides), None
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError("this folder is not a run: it has no recipe.yaml.", where=word)
    return recipe.read(str(folder / "recipe.yaml"), overrides), folder


def _write_grid(path: Path, pictures: Any, columns: int) -> None:
    """pictures [N, 3, H, W] in rows of `columns`; small ones enlarged without smoothing."""
    import torch
    from PIL import Image

    count, channels, height, width = pictures.shape
    grid = torch.ones(channels, math.ceil(count / columns) * height, columns * width)
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * width
        grid[:, top : top + height, left : left + width] = picture
    image = Image.fromarray((grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    times = max(1, 128 // width)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST).save(path)


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="RUN_OR_RECIPE key=value", help="a run's newest weights or a recipe's base model"
    )
    parser.add_argument("--held-out", type=_positive, metavar="N", help="pictures (default: the recipe's)")
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


OF_A_SUITE = ("prompts", "seeds", "samplers", "weights", "judge", "judge_model", "judge_key_env", "reward", "out")


def _eval(options: argparse.Namespace) -> int:
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
    setup, folder = _recipe_or_run(options.words[0], options.words[1:])
    if options.suite is not None:
        return _eval_suite(setup, folder, options)

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


def _eval_suite(setup: Setup, folder: Path | None, options: argparse.Namespace) -> int:
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


# ------------------------------------------------------------------------------------ report, pretrain-world


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run folder")
    parser.add_argument("--json", action="store_true", help="the numbers, and no page")


def _report(options: argparse.Namespace) -> int:
    from rlkit.report import summary as report

    if options.json:
        print(json.dumps(report.summary(options.folder), indent=2))
        return 0
    page = report.write(options.folder)
    print(report.sentence(report.summary(options.folder)))
    print(f"report: {page}")
    return 0


def _pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings, such as samples=200000")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the backbone goes")


def _pretrain(options: argparse.Namespace) -> int:
    from rlkit.pretrain.generator import Pretraining, pretrain

    pretrain(options.out, _settings(Pretraining, options, "pretrain-world"))
    return 0


def _pretrain_agent(options: argparse.Namespace) -> int:
    from rlkit.pretrain.agent import Reading, pretrain_agent

    pretrain_agent(options.out, _settings(Reading, options, "pretrain-agent"))
    return 0


def _pretrain_captioner(options: argparse.Namespace) -> int:
    from rlkit.pretrain.captioner import Captioning, pretrain_captioner

    pretrain_captioner(options.out, _settings(Captioning, options, "pretrain-captioner"))
    return 0


def _pretrain_connector(options: argparse.Namespace) -> int:
    from rlkit.pretrain.connector import Connecting, pretrain_connector

    pretrain_connector(options.out, _settings(Connecting, options, "pretrain-connector"))
    return 0


def _pretrain_encoder(options: argparse.Namespace) -> int:
    from rlkit.pretrain.encoder import Encoding, pretrain_encoder

    pretrain_encoder(options.out, _settings(Encoding, options, "pretrain-encoder"))
    return 0


def _settings(kind: type[Any], options: argparse.Namespace, command: str) -> Any:
    """The settings that the words give; RecipeError for those that it has not, and for a folder that is in use."""
    settings = {}
    for word in options.words:
        key, equals, value = word.partition("=")
        if not equals:
            raise RecipeError(f"{word!r} is not key=value.", where=command, hint="For instance samples=200000")
        settings[key] = sources.value_of(key, value)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise RecipeError(f"{options.out} exists and is not empty.", where="--out", hint="Choose another folder.")
    return registry.construct(kind, settings, command, what=command)


# ----------------------------------------------------------------------------------------------------- bench


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", type=_benchmark, metavar="KIND", help=f"one of {', '.join(BENCHMARKS)}")
    parser.add_argument("words", nargs="*", metavar="key=value", help="changes to the workload's recipe")
    parser.add_argument("--workload", required=True, metavar="NAME", help="what is timed: tiny, sd3_50m")
    parser.add_argument("--algorithm", metavar="NAME", help="with its defaults (default: the workload's own)")
    parser.add_argument("--repeats", type=_positive, default=3, metavar="N", help="steps that are timed (default: 3)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="of torch (default: torch's own choice)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true")


def _benchmark(word: str) -> str:
    if word not in BENCHMARKS:
        raise argparse.ArgumentTypeError(f"there is no benchmark {word!r}.{nearest(word, BENCHMARKS)}")
    return word


def _bench(options: argparse.Namespace) -> int:
    from rlkit.bench import train as bench

    words = [f"run.threads={options.threads}"] if options.threads else []
    words += [f"run.device={options.device}"] if options.device else []
    result = bench.train(options.workload, options.algorithm, [*words, *options.words], options.repeats)
    print(json.dumps(asdict(result), indent=2) if options.json else bench.table(result))
    return 0


# ------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Command:
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "train": Command("Train a recipe, or go on with a run.", _train_arguments, _train),
    "check": Command("Say what a recipe would do, or what is wrong with it, in seconds.", check.arguments, check.run),
    "list": Command("List a catalogue: what a recipe may name.", _list_arguments, _list),
    "describe": Command("Say what one entry is and which options it has.", _describe_arguments, _describe),
    "sample": Command("Draw prompts with a recipe's base model or a run's weights.", _sample_arguments, _sample),
    "eval": Command("Score the held-out prompts once, or a benchmark's with intervals.", _eval_arguments, _eval),
    "report": Command("Write a run's report again, or print its numbers.", _report_arguments, _report),
    "bench": Command("Time the phases of a step against the bare network's calls.", _bench_arguments, _bench),
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
        "Make the embedded world's agent from nothing: it reads and copies.", _pretrain_arguments, _pretrain_agent
    ),
    "pretrain-captioner": Command(
        "Make the embedded world's captioner from nothing.", _pretrain_arguments, _pretrain_captioner
    ),
    "pretrain-connector": Command(
        "Make what connects the embedded world's captioner and generator.", _pretrain_arguments, _pretrain_connector
    ),
    "pretrain-encoder": Command(
        "Make the embedded world's image encoder from nothing.", _pretrain_arguments, _pretrain_encoder
    ),
    "pretrain-world": Command("Make the embedded world's base model from nothing.", _pretrain_arguments, _pretrain),
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


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {word!r}")
    return int(word)


if __name__ == "__main__":
    sys.exit(main())
