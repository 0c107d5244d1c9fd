"""Mirrors: where a run is shown besides its own folder. What one is, which ones a run has, and how each starts.

metrics.jsonl is the record and needs none of them. What W&B, TensorBoard and trackio are told is in files of their own.
"""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from rlkit.errors import RecipeError, nearest
from rlkit.mirrors.content import Numbers, numbers
from rlkit.mirrors.tensorboard import TensorBoardMirror
from rlkit.mirrors.trackio import TrackioMirror
from rlkit.mirrors.wandb import WandbMirror

WANDB_MODES = ("auto", "online", "offline", "disabled")
_PATIENCE = 20  # seconds that a run which did not ask for W&B by name waits for it
_FLUSH = 10  # seconds after which TensorBoard's rows are on the disk

Config = Mapping[str, Any]
Say = Callable[[str], None]


class Mirror(Protocol):
    """May raise whatever it likes: `Mirrors` stands in between."""

    def log(self, row: Numbers) -> None: ...
    def sheet(self, path: Path) -> None: ...  # an evaluation's pictures: a PNG, its JSON beside it
    def alert(self, title: str, text: str, at: int) -> None: ...  # to whoever follows the run
    def keep(self, files: Sequence[Path]) -> None: ...  # what a run leaves at its end
    def finish(self) -> None: ...


class Mirrors:
    """Those that a recipe asks for. Their packages are imported only when they are used.

    One that was asked for stops the run at its start if it cannot be had. Only W&B's `auto` may be absent: it goes
    online where a login exists and does nothing otherwise; the variable WANDB_MODE decides before it. After the start
    no trouble of a mirror's ever stops a run: it is one warning and the end of that mirror.
    Not here: rewinding. A resumed run continues its page, where steps that were taken twice are shown twice.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        say: Say,
        *,
        wandb: str = "auto",
        tensorboard: bool = False,
        trackio: bool = False,
    ) -> None:
        self._say = say
        self._several = len((config.get("run") or {}).get("order") or config.get("stages") or {}) > 1
        self._open: dict[str, Mirror] = {}
        run = _wandb(wandb, folder, config, say)
        if run is not None:
            self._open["Weights & Biases"] = WandbMirror(run)
        if tensorboard:
            self._open["TensorBoard"] = _asked_for("tensorboard", lambda: _start_tensorboard(folder, config))
        if trackio:
            self._open["trackio"] = _asked_for("trackio", lambda: _start_trackio(folder, config))

    def log(self, row: Mapping[str, Any]) -> None:
        known = numbers(row, self._several)
        self._each(lambda mirror: mirror.log(known))

    def sheet(self, path: Path) -> None:
        self._each(lambda mirror: mirror.sheet(path))

    def alert(self, title: str, text: str, at: int) -> None:
        self._each(lambda mirror: mirror.alert(title, text, at))

    def keep(self, files: Sequence[Path]) -> None:
        self._each(lambda mirror: mirror.keep(files))

    def finish(self) -> None:
        self._each(lambda mirror: mirror.finish())
        self._open = {}

    def _each(self, action: Callable[[Mirror], None]) -> None:
        for name, mirror in list(self._open.items()):
            try:
                action(mirror)
            except Exception as error:  # a process or a server of its own may die; metrics.jsonl has the numbers
                del self._open[name]
                self._say(f"warning: {name} stopped ({error}); the run goes on without it")


# ---- W&B -------------------------------------------------------------------------------------------------------------


def _wandb(mode: str, folder: Path, config: Config, say: Say) -> Any:
    """A run of W&B, or None."""
    if mode not in WANDB_MODES:
        hint = f"Use {_either(WANDB_MODES)}"
        raise RecipeError(f"no W&B mode {mode!r}.{nearest(mode, WANDB_MODES)}", where="wandb", hint=hint)
    asked = mode != "auto"
    chosen = mode if asked else os.environ.get("WANDB_MODE") or ("online" if _login_exists() else "disabled")
    if chosen == "disabled":
        return None
    try:
        run = _start_wandb(chosen, folder, config, patience=None if asked else _PATIENCE)
    except Exception as error:  # wandb's own, OSError, TimeoutError, pydantic's: one list would never be complete
        if asked:
            raise RecipeError(
                f"Weights & Biases did not start: {_reason(error)}",
                where=f"wandb={mode}",
                hint="Run `wandb login`, set WANDB_API_KEY, or choose offline (to sync later) or disabled.",
            ) from error
        say(f"warning: Weights & Biases did not start ({_reason(error)}); the run goes on without it")
        return None
    if getattr(run, "url", None):
        say(f"Weights & Biases: {run.url}")
    return run


def _start_wandb(mode: Any, folder: Path, config: Config, patience: float | None) -> Any:
    import wandb

    memory = folder / "wandb" / "id"  # so that a resumed run continues its page
    identity = os.environ.get("WANDB_RUN_ID") or _remembered(memory)
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "rlkit"),
        name=os.environ.get("WANDB_NAME", folder.name),
        dir=str(folder),
        id=identity,
        resume="allow" if identity else None,
        mode=mode,
        # Nested: an agent of a sweep has put its flat, dotted keys at the top already.
        config={"recipe": dict(config)},
        # console: W&B would wrap the streams that the progress bar draws on.
        settings=wandb.Settings(console="off", **({} if patience is None else {"init_timeout": patience})),
    )
    run.define_metric("at")
    run.define_metric("*", step_metric="at")
    _remember(memory, run.id)
    return run


def _login_exists() -> bool:
    """Whether W&B would find a key: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for place in places:
        try:
            if netrc.netrc(os.path.expanduser(place)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


# ---- the others ------------------------------------------------------------------------------------------------------


def _asked_for(name: str, start: Callable[[], Mirror]) -> Mirror:
    """A mirror that a recipe switches on with `run.NAME`; its package is an extra of that name."""
    where = f"run.{name}"
    try:
        return start()
    except ImportError as error:
        hint = f"pip install 'rlkit-visual[{name}]', or leave {where} out."
        raise RecipeError(f"its package is not installed: {_reason(error)}.", where=where, hint=hint) from error
    except Exception as error:  # a folder, a database, a server: whatever it keeps its pages in
        raise RecipeError(f"did not start: {_reason(error)}", where=where, hint=f"Or leave {where} out.") from error


def _start_tensorboard(folder: Path, config: Config) -> Mirror:
    import yaml
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", flush_secs=_FLUSH)
    recipe = yaml.safe_dump(dict(config), sort_keys=False)
    writer.add_text("recipe", f"```\n{recipe}```", 0)
    return TensorBoardMirror(writer)


def _start_trackio(folder: Path, config: Config) -> Mirror:
    import trackio

    memory = folder / "trackio"  # the run's name, so that a resumed run continues its page
    name = _remembered(memory)
    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", "rlkit"),
        # It finds a run to resume by its name, and two folders may have one name.
        name=name or f"{folder.name}-{secrets.token_hex(2)}",
        config={"recipe": dict(config)},
        resume="allow" if name else "never",
        embed=False,
    )
    _remember(memory, run.name)
    return TrackioMirror(run)


def _remembered(memory: Path) -> str | None:
    return memory.read_text().strip() if memory.exists() else None


def _remember(memory: Path, name: str) -> None:
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(name)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _either(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}."
