"""Editing by a judge of two questions and by a reward for the goal: what the gate says, and how the two are joined."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlkit import cli, recipe, registry
from rlkit.errors import RecipeError
from rlkit.scoring import Scoring
from rlkit.types import Context, Prompt, Samples, Scores
from rlkit.world.scenes import Item, render_scenes

NAME, PAPER = "world_joyai_edit", "joyai_image_edit"
CIRCLE, SQUARE = Item("red", "circle", 9.0, 9.0, 5.0), Item("blue", "square", 22.0, 22.0, 5.0)
GREEN, STRANGER = replace(CIRCLE, colour="green"), Item("cyan", "cross", 22.0, 9.0, 4.5)


@pytest.fixture(scope="module")
def stage() -> Any:
    (only,) = recipe.read(NAME).stages
    return only


def picture(*items: Item) -> Tensor:
    return torch.from_numpy(render_scenes([items])[0])


def asked(text: str, *made: Sequence[Item]) -> Samples:
    """One group: what was made of a red circle and a blue square, when it was asked for this."""
    n = len(made)
    rows, media = torch.arange(n), torch.stack([picture(*items) for items in made])
    prompts = (Prompt(0, text, source=picture(CIRCLE, SQUARE)),) * n
    return Samples(media, torch.zeros(n, 1, 1, 1), prompts, torch.zeros_like(rows), rows, rows, version=0, total=n)


def scored(stage: Any, samples: Samples) -> Scores:
    return Scoring(stage.rewards)(samples, lambda column: column)


def test_it_composes_and_its_head_says_the_command_once() -> None:
    head = registry.recipes()[NAME].read_text(encoding="utf-8").partition("\n\n")[0]
    assert re.findall(r"^#   rlkit train (\S+)$", head, flags=re.MULTILINE) == [NAME]
    assert "A healthy run" in head
    assert cli.main(["check", NAME]) == 0


def test_it_expects_what_a_healthy_run_meets() -> None:
    expect = recipe.read(NAME).recipe["stages"]["main"]["expect"]
    assert "held_out/strict" in expect
    assert "held_out/execution" in expect


def test_it_is_the_papers_course(stage: Any) -> None:
    """DiffusionNFT, and two rewards with the same weights, of which the first says how far it was the edit, and how far
    nothing else."""
    (paper,) = recipe.read(PAPER).stages
    for one in (stage, paper):
        assert type(one.algorithm).__name__ == "DiffusionNFT"
        assert one.algorithm.advantage == "gdpo"
        assert one.total.plain, "the gate is inside the judge"
        assert [reward.weight for reward in one.rewards] == [1.0, 0.5]
        judge: Any = one.rewards[0].reward
        assert {"execution", "consistency"} <= set(judge.components)


@pytest.mark.parametrize(
    ("text", "made", "execution", "consistency"),
    [
        ("make the circle green", (GREEN, SQUARE), 1, 1),
        ("make the circle green", (GREEN,), 1, (0 + 1 / 2) / 2),  # the square is lost: 'kept' is 0, 'number' 1/2
        ("make the circle green", (GREEN, SQUARE, STRANGER), 1, (1 + 2 / 3) / 2),
        ("make the circle green", (CIRCLE, SQUARE), 0.25, 1),  # given back as it was: only the shape is right
        ("make the circle green", (SQUARE,), 0, (1 + 1 / 2) / 2),
        ("remove the circle", (SQUARE,), 1, 1),
        ("remove the circle", (), 1, 0),  # all is gone
        ("remove the circle", (CIRCLE, SQUARE), 0, (1 + 1 / 2) / 2),
        ("add a cyan cross", (CIRCLE, SQUARE), 0, (1 + 1 + 2 / 3) / 3),
    ],
)
def test_the_gated_score(stage: Any, text: str, made: tuple[Item, ...], execution: float, consistency: float) -> None:
    """execution x (0.6 + 0.4 consistency), which is what the judge of the paper's recipe says too."""
    scores = scored(stage, asked(text, made))
    assert scores.components["composition/execution"].item() == pytest.approx(execution)
    assert scores.components["composition/consistency"].item() == pytest.approx(consistency)
    assert scores.raw[0, 0].item() == pytest.approx(execution * (0.6 + 0.4 * consistency))
    strict = scores.components["composition/strict"].item()
    assert (scores.raw[0, 0].item() == 1) == (strict == 1), "nothing but a true picture has it all"


def test_doing_nothing_does_not_pay() -> None:
    """Where both count alike, a source given back beats an edit that lost something; behind the gate it does not."""
    nothing, lossy = asked("make the circle green", (CIRCLE, SQUARE), (GREEN,)), [0.25, 0.7]
    values, parts = registry.build("rewards", "composition", {"score": "gated"})(nothing)
    assert values.tolist() == pytest.approx(lossy)
    linear = (parts["execution"] + parts["consistency"]) / 2
    assert linear.tolist() == pytest.approx([0.625, 0.625])
    assert parts["graded"].tolist() == pytest.approx([0.3125, 0.3125]), "half of that"


def test_the_second_reward_is_told_the_goal_and_not_the_source(stage: Any) -> None:
    done, swapped, undone = (GREEN, SQUARE), (replace(SQUARE, colour="green"), replace(CIRCLE, colour="blue")), ()
    samples = asked("make the circle green", done, (CIRCLE, SQUARE), swapped, undone)
    goal = scored(stage, samples).raw[:, 1]
    assert goal[0] > 0.99
    assert goal[1] < 0.8, "the source is not the goal"
    assert goal[2] > 0.9, "what looks like the goal from afar is as good"
    assert goal[3] < 0.3


def test_every_prompt_of_the_recipe_is_scored_by_both(stage: Any) -> None:
    prompts = tuple(prompt for step in range(4) for prompt in stage.data.draw(0, "main", step).prompts)
    n = len(prompts)
    rows, media = torch.arange(n), torch.stack([prompt.source for prompt in prompts if prompt.source is not None])
    samples = Samples(media, torch.zeros(n, 1, 1, 1), prompts, rows, rows, rows, version=0, total=n)
    scores = scored(stage, samples)
    assert bool(scores.scored.all())
    assert float(scores.raw[:, 0].max()) <= 0.25, "all of them are sources given back"


def test_each_reward_becomes_an_advantage_before_they_are_weighed(stage: Any, context: Any) -> None:
    """Groups of two: within each, every reward says -1 or 1, however far apart its numbers are; then weight and sum."""
    group = torch.tensor([0, 0, 1, 1])
    rows = torch.arange(4)
    samples = Samples(
        torch.zeros(4, 3, 2, 2), torch.randn(4, 1, 2, 2), (Prompt(0, ""),) * 4, group, rows, rows, version=0, total=4
    )
    samples = replace(samples, sigmas=torch.tensor([1.0, 0.5, 0.0]))
    gated, goal = [0.0, 1.0, 0.6, 0.2], [0.9, 0.91, 0.5, 0.9]
    raw = torch.tensor([gated, goal]).T
    weights = torch.tensor([one.weight for one in stage.rewards])  # 1, .5
    scores = Scores(("composition", "colour_area"), raw, torch.ones(4, 2, dtype=torch.bool), weights)
    joined = torch.tensor([-1.0 - 0.5, 1.0 + 0.5, 1.0 - 0.5, -1.0 + 0.5])
    expected = joined / joined.square().mean().sqrt()
    here: Context = context()
    found = stage.algorithm.rows(samples, scores, here).advantage.reshape(4, -1)[:, 0]
    assert found.tolist() == pytest.approx(expected.tolist(), abs=0.02)  # .01 beside eps of 1e-4 is 2 % short
    scaled = replace(scores, raw=raw * torch.tensor([1.0, 100.0]))
    again = stage.algorithm.rows(samples, scaled, here).advantage.reshape(4, -1)[:, 0]
    assert again.tolist() == pytest.approx(expected.tolist(), abs=0.02), "the scale of a reward does not matter"
    summed = replace(stage.algorithm, advantage="global_norm")
    by_sum = summed.rows(samples, scaled, here).advantage.reshape(4, -1)[:, 0]
    assert float(by_sum[2]) < 0 < float(found[2]), "of a plain sum the larger scale rules the sign"
    assert stage.algorithm.optimality(found).tolist() == pytest.approx((0.5 + expected / 10).tolist(), abs=0.002)


def test_the_gated_score_needs_a_source() -> None:
    with pytest.raises(RecipeError, match="reads 'source', which the data does not give"):
        recipe.read(NAME, ["stages.main.data.task=t2i"])
