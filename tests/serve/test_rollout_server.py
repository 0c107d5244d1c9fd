"""`rlkit serve-rollout`: which servers a recipe asks for, and that they end. The servers themselves are fakes here."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlkit import recipe
from rlkit.errors import RecipeError
from rlkit.serve import rollout as rollout_server
from rlkit.workers import serving

VLLM = "{name: vllm, most: 12}"


@dataclass
class Served:
    """A server that is ready at once, and can end by itself."""

    url: str
    log: Path
    lives: bool = True
    stopped: bool = False

    def wait(self, seconds: float) -> None:
        assert seconds > 60

    def alive(self) -> bool:
        return self.lives

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[Served]:
    found: list[Served] = []

    def serve(folder: Path, port: int, engine: Any, log: Path, host: str) -> Served:
        assert (folder / "config.json").is_file()
        assert (folder / "model.safetensors").is_file()
        found.append(Served(f"http://{host}:{port}", log))
        return found[-1]

    monkeypatch.setattr(serving, "serve", serve)
    return found


def ended() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@pytest.mark.parametrize(
    ("name", "key", "place"),
    [
        ("world_captioner", "stages.main.rollout", "stages.main.rollout"),
        ("world_unified", "stages.understanding.rollout.writer", "stages.understanding.rollout.writer"),
    ],
)
def test_a_server_is_started_with_what_writes(
    servers: list[Served], capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, key: str, place: str
) -> None:
    setup = recipe.read(name, [f"{key}={VLLM}"])
    rollout_server.serve_until(ended(), setup, "127.0.0.1", 8101, tmp_path)
    assert [one.url for one in servers] == ["http://127.0.0.1:8101"]
    assert servers[0].stopped
    assert f"ready: {place}.urls=[http://127.0.0.1:8101]" in capsys.readouterr().out


def test_a_recipe_that_asks_no_server_is_refused(servers: list[Served], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no stage has a rollout that asks servers"):
        rollout_server.serve_until(ended(), recipe.read("world_captioner"), "127.0.0.1", 0, tmp_path)
    assert servers == []


def test_a_server_that_ends_by_itself_ends_all(servers: list[Served], tmp_path: Path) -> None:
    setup = recipe.read("world_captioner", [f"stages.main.rollout={VLLM}"])
    event = threading.Event()

    def wait(seconds: float) -> bool:
        servers[0].lives = False
        return False

    event.wait = wait  # type: ignore[method-assign, assignment]
    with pytest.raises(RecipeError, match="has ended by itself"):
        rollout_server.serve_until(event, setup, "127.0.0.1", 8101, tmp_path)
    assert servers[0].stopped
