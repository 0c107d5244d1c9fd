"""`rlkit serve-rollout`: start the vLLM servers that a recipe's rollouts ask, on this machine, until somebody ends it.

A server begins with the recipe's own network. A learner elsewhere finds it by `rollout.urls`, and gives it its weights
before it asks: by gloo, or through a folder that both see.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.errors import RecipeError

if TYPE_CHECKING:
    from rlkit.stages import Setup, Stage
    from rlkit.workers.serving import Engine, Served

READY = 900.0  # seconds that a server may take to load


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's name or file")
    parser.add_argument("words", nargs="*", metavar="key=value", help="changes to it")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at; weights come in without a token")
    parser.add_argument("--port", type=int, default=0, help="of the first server; 0: any that is free")
    parser.add_argument("--logs", type=Path, default=Path("logs"), metavar="DIR", help="where the servers' logs go")


def run(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    from rlkit import recipe

    setup = recipe.read(options.recipe, options.words)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    serve_until(ended, setup, options.host, options.port, options.logs)
    return 0


def _writes(stage: Stage) -> tuple[str, Any]:
    """What writes in a stage, its rollout or a part of that, and where the recipe has it."""
    captions = getattr(stage.rollout, "captions", None)
    where = f"stages.{stage.name}.rollout"
    return (where, stage.rollout) if captions is None else (f"{where}.writer", captions())


def serve_until(ended: threading.Event, setup: Setup, host: str, port: int, logs: Path) -> None:
    """Start, say where, and stop once `ended` is set. RecipeError if the recipe has no rollout that asks servers."""
    from rlkit import session
    from rlkit.language import LanguagePolicy
    from rlkit.parts import Parts
    from rlkit.workers.serving import serve

    written = dict(_writes(stage) for stage in setup.stages)
    asking = {key: one for key, one in written.items() if callable(getattr(one, "engine_for", None))}
    if not asking:
        raise RecipeError("no stage has a rollout that asks servers.", where="stages", hint="Set rollout.name: vllm.")
    whole = session.load_policy(setup)
    policy = whole.writer if isinstance(whole, Parts) else whole
    assert isinstance(policy, LanguagePolicy)  # the check of kinds has seen to it
    engines: dict[str, Engine] = {key: rollout.engine_for(policy, served=True) for key, rollout in asking.items()}
    servers: dict[Engine, Served] = {}
    with tempfile.TemporaryDirectory(prefix="rlkit-") as folder:
        policy.write_base(Path(folder))
        try:
            for index, engine in enumerate(dict.fromkeys(engines.values())):
                log = logs / f"vllm-{index}.log"
                servers[engine] = serve(Path(folder), port + index if port else 0, engine, log, host=host)
                print(f"starting {servers[engine].url}, log {log}", flush=True)
            for server in servers.values():
                server.wait(READY)
            for name, engine in engines.items():
                print(f"ready: {name}.urls=[{servers[engine].url}]", flush=True)
            while not ended.wait(0.5):
                gone = [server for server in servers.values() if not server.alive()]
                if gone:
                    raise RecipeError(f"{gone[0].url} has ended by itself.", where=str(gone[0].log), hint="See there.")
        finally:
            for server in servers.values():
                server.stop()
            print("stopped", flush=True)
