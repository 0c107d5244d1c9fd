"""The tool_calls reward: what is counted of an episode, and which rollouts it fits."""

import math
from pathlib import Path

import pytest
import torch

from rlkit import recipe
from rlkit.episodes import Call, Episode, Program
from rlkit.errors import RecipeError
from rlkit.rewards.tool_calls import ToolCalls
from rlkit.types import Prompt, Samples

GOOD, BROKEN = Call("...", "search"), Call("...", "search", failed=True)
BAD = Call("...", invalid="that is no JSON")


def done(*episodes: Episode, n: int = 0) -> Samples:
    n = n or len(episodes)
    nothing, rows = torch.zeros(n, 0), torch.arange(n)
    prompts = tuple(Prompt(i, "draw it") for i in range(n))
    return Samples(nothing, nothing, prompts, rows, rows, rows, version=0, total=n, episodes=episodes)


def test_what_could_be_done_is_counted() -> None:
    answered = Episode((GOOD, BAD, BROKEN), Program("a red circle"), "answer")
    at_once = Episode((), Program("a red circle"), "answer")
    never = Episode((BAD, BAD, GOOD), None, "turns")
    nothing = Episode((), None, "tokens")
    values, parts = ToolCalls()(done(answered, at_once, never, nothing))
    assert values.tolist() == parts["valid"].tolist() == pytest.approx([3 / 4, 1, 1 / 3, 0])
    assert {name: column.tolist() for name, column in parts.items() if name != "valid"} == {
        "calls": [2, 0, 1, 0],
        "invalid": [1, 0, 2, 0],
        "failed": [1, 0, 0, 0],
        "turns": [4, 1, 3, 0],
        "answered": [1, 1, 0, 0],
    }


def test_without_episodes_nothing_is_scored() -> None:
    values, parts = ToolCalls()(done(n=3))
    assert [math.isnan(one) for one in values.tolist()] == [True] * 3
    assert all(column.isnan().all() and column.shape == (3,) for column in parts.values())


def test_a_part_of_the_samples_is_counted_alike() -> None:
    samples = done(Episode((GOOD,), None, "turns"), Episode((BAD,), Program("x"), "answer"))
    assert ToolCalls()(samples.select(torch.tensor([1])))[0].tolist() == [0.5]


# ---- in a recipe -----------------------------------------------------------------------------------------------------

COUNTED = ["stages.main.rewards.tool_calls=1.0"]
AGENT = """\
from dataclasses import dataclass


@dataclass(frozen=True)
class OfTools:
    kind = "tokens"
    gives = ("log_prob",)
    makes = ("text", "image", "episode")
    steps = 0

    def start(self, policy, processes): ...
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local classes are found from the working directory."""
    monkeypatch.chdir(tmp_path)


def test_a_rollout_that_makes_episodes_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "a_rollout_of_tools.py").write_text(AGENT)
    setup = recipe.read("world_captioner", [*COUNTED, "stages.main.rollout.name=a_rollout_of_tools:OfTools"])
    assert "tool_calls" in [one.name for one in setup.stages[0].rewards]


@pytest.mark.parametrize("name", ["quickstart", "world_captioner"])
def test_a_rollout_that_makes_none_is_refused(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.read(name, COUNTED)
    assert "stages.main.rewards.tool_calls" in str(caught.value)
    if name == "quickstart":  # of pictures
        assert "reads 'episode', which" in str(caught.value)
