"""The mirror on Weights & Biases: what metrics.jsonl holds, under the same names, where somebody wants to see it."""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlkit.errors import RecipeError, nearest

MIRROR_MODES = ("auto", "online", "offline", "disabled")
_PATIENCE = 20  # seconds that a run which did not ask for W&B by name waits for it


class Mirror:
    """The numbers of metrics.jsonl on W&B, under the same names; wandb is imported only when it is used.

    `auto` goes online where a login exists and does nothing otherwise; the variable WANDB_MODE decides before it. What
    goes wrong there is one warning and the end of the mirror, while `online` and `offline`, which somebody asked for,
    stop the run at its start. After the start no trouble of W&B's ever stops a run.
    Not here: rewinding. A resumed run continues its W&B run, where steps that were taken twice are shown twice.
    """

    def __init__(self, mode: str, folder: Path, config: Mapping[str, Any], say: Callable[[str], None]) -> None:
        if mode not in MIRROR_MODES:
            hint = f"Use {_either(MIRROR_MODES)}"
            raise RecipeError(f"no W&B mode {mode!r}.{nearest(mode, MIRROR_MODES)}", where="wandb", hint=hint)
        self._say = say
        self._run: Any = None
        asked = mode != "auto"
        chosen = mode if asked else os.environ.get("WANDB_MODE") or ("online" if _login_exists() else "disabled")
        if chosen == "disabled":
            return
        try:
            self._run = _start_wandb(chosen, folder, config, patience=None if asked else _PATIENCE)
        except Exception as error:  # wandb's own, OSError, TimeoutError, pydantic's: one list would never be complete
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if asked:
                raise RecipeError(
                    f"Weights & Biases did not start: {reason}",
                    where=f"wandb={mode}",
                    hint="Run `wandb login`, set WANDB_API_KEY, or choose offline (to sync later) or disabled.",
                ) from error
            say(f"warning: Weights & Biases did not start ({reason}); the run goes on without it")
            return
        if getattr(self._run, "url", None):
            say(f"Weights & Biases: {self._run.url}")

    def log(self, row: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        self._send(lambda: self._run.log(numbers))

    def alert(self, title: str, text: str) -> None:
        """A message to whoever follows the run."""
        self._send(lambda: self._run.alert(title=title, text=text))

    def image(self, path: Path, at: int) -> None:
        def send() -> None:
            import wandb

            self._run.log({"samples": wandb.Image(str(path)), "at": at})

        self._send(send)

    def finish(self) -> None:
        self._send(lambda: self._run.finish())
        self._run = None

    def _send(self, action: Callable[[], None]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:  # its background process may die; metrics.jsonl has the numbers all the same
            self._run = None
            self._say(f"warning: Weights & Biases stopped ({error}); the run goes on without it")


def _start_wandb(mode: Any, folder: Path, config: Mapping[str, Any], patience: float | None) -> Any:
    import wandb

    memory = folder / "wandb" / "id"  # so that a resumed run continues its page
    identity = os.environ.get("WANDB_RUN_ID") or (memory.read_text().strip() if memory.exists() else None)
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
    memory.parent.mkdir(exist_ok=True)
    memory.write_text(run.id)
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


def _either(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}."
