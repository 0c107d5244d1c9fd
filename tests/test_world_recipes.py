"""The recipes of the embedded world: each says its command and what to expect; those of papers keep their courses."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest

from rlkit import recipe, recipe_course, registry
from rlkit.tracking import HELD_OUT

ROOT = Path(__file__).parents[1]
WORLD = {name: file for name, file in registry.recipes().items() if name.startswith("world_")}
PAIRS = {  # at the world's scale: at the paper's
    "world_dense_grpo": "dense_grpo_geneval",
    "world_hunyuan": "hunyuan_image_3",
    "world_joyai_t2i": "joyai_image_t2i",
    "world_longcat": "longcat_image_rl",
    "world_mix_grpo": "mix_grpo",
    "world_nft_multi": "diffusion_nft_multi",
    "world_qwen_image": "qwen_image_rl",
    "world_wan": "wan_image",
}

read = functools.cache(recipe.read)


def stages(name: str) -> dict[str, dict[str, Any]]:
    """The stages of a recipe, resolved, in the order in which they run."""
    return recipe_course.running(read(name).recipe)


def course(name: str) -> list[tuple[str, str]]:
    return [(stage, one["algorithm"]["name"]) for stage, one in stages(name).items()]


def trained(stage: dict[str, Any]) -> set[str]:
    """The rewards that a stage learns from."""
    return {name for name, one in stage["rewards"].items() if one["weight"]}


def pattern(values: list[Any]) -> list[int]:
    """Which of the values are equal: each by the place of its first."""
    return [values.index(one) for one in values]


# ---- every recipe of the world ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLD)
def test_a_head_says_the_command_once_and_what_a_healthy_run_is(name: str) -> None:
    head = WORLD[name].read_text(encoding="utf-8").partition("\n\n")[0]
    assert re.findall(r"^#   rlkit train (.+)$", head, flags=re.MULTILINE) == [name]
    assert f"#   rlkit train {name}" in head.splitlines()[2:4], "after what it is, in one line or two"
    assert "A healthy run" in " ".join(line.removeprefix("#").strip() for line in head.splitlines())


@pytest.mark.parametrize("name", WORLD)
def test_its_last_stage_expects_something_and_all_that_is_expected_is_measured(name: str) -> None:
    setup = read(name)
    *_, last = stages(name).values()
    assert last["expect"], "or nobody could tell a healthy run from another"
    for stage in setup.stages:
        known = recipe_course.measured(stage)
        for metric in stages(name)[stage.name]["expect"] if known is not None else ():
            column = metric.removeprefix(HELD_OUT)
            assert column in known or column.rpartition("/")[0] in known, f"{stage.name}: {metric}"


@pytest.mark.parametrize("name", WORLD)
def test_a_plateau_can_end_its_stage_early(name: str) -> None:
    for stage in read(name).stages:
        if stage.until is not None and stage.until.plateau is not None:
            assert stage.until.plateau * stage.evaluate.every < stage.steps


@pytest.mark.parametrize("name", WORLD)
def test_it_neither_trains_nor_tunes_on_what_it_is_judged_by(name: str) -> None:
    for stage in read(name).stages:
        assert getattr(stage.data, "split", "train") == "train"
        assert getattr(stage.data, "held_out_split", "held_out") == "held_out"


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("world_*.yaml")), ids=lambda one: one.stem)
def test_no_entry_has_the_recipes_name(file: Path) -> None:
    kinds = ("algorithms", "rewards", "backbones", "rollouts", "tools")
    assert not [kind for kind in kinds if file.stem in registry.names(kind)]


# ---- the papers' courses, at the world's scale -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "paper"), PAIRS.items())
def test_its_stages_and_algorithms_are_those_of_the_papers_recipe(name: str, paper: str) -> None:
    assert course(name) == course(paper)


@pytest.mark.parametrize("name", PAIRS)
def test_a_course_begins_and_ends_with_1024_pictures(name: str) -> None:
    """The standard error of a change is then .021, which the expectations reckon with."""
    evaluations = [one["evaluate"] for one in stages(name).values()]
    for one in (evaluations[0], evaluations[-1]):
        assert (one["ends"] or one["held_out"]) == 1024


@pytest.mark.parametrize("name", PAIRS)
def test_a_later_stage_goes_on_from_the_weights_that_were_evaluated(name: str) -> None:
    before = None
    for stage in stages(name).values():
        if before is not None:
            assert stage["carry"]["weights"] == before["evaluate"]["weights"]
        before = stage


@pytest.mark.parametrize(("name", "paper"), PAIRS.items())
def test_rewards_are_compared_one_by_one_where_the_paper_does_so(name: str, paper: str) -> None:
    """Where the paper has each reward by itself (gdpo) there are several here too, and they are taken apart too."""
    for ours, theirs in zip(stages(name).values(), stages(paper).values(), strict=True):
        if theirs["algorithm"].get("advantage") == "gdpo":
            assert ours["algorithm"]["advantage"] == "gdpo"
            assert len(trained(ours)) >= 2


def test_nft_multi_takes_turns_of_prompts_and_rewards_as_the_paper_does() -> None:
    ours, theirs = (list(stages(name).values()) for name in ("world_nft_multi", "diffusion_nft_multi"))
    prompts = [one["data"]["kinds"] for one in ours]
    assert pattern(prompts) == pattern([one["data"]["path"] for one in theirs]) == [0, 1, 0, 1, 4]
    learnt = [trained(one) for one in ours]
    # The judge joins the rewards of preference where the prompts are its own, as GenEval and OCR do in the paper.
    theirs_join = [len(trained(one) - trained(theirs[0])) for one in theirs]
    assert [len(one - learnt[0]) for one in learnt] == theirs_join == [0, 1, 0, 1, 1]
    assert all(learnt[0] <= one for one in learnt)
    assert {one["algorithm"]["old_decay"] for one in (*ours, *theirs)} == {"slow"}


@pytest.mark.parametrize("name", ["world_mix_grpo", "world_hunyuan"])
def test_the_window_of_mix_grpo_slides_over_all_its_places_and_an_ode_does_the_rest(name: str) -> None:
    first, *_ = stages(name).values()
    options, (low, high) = first["algorithm"], first["algorithm"]["window_start"]
    assert options["window_moves"] == "slide"
    assert options["shared_noise"] is True
    assert first["steps"] == options["window_every"] * (high - low + 1), "each place once, for as long as the others"
    assert high + options["window"] < first["rollout"]["steps"], "the last step has no noise"


def test_dense_grpo_is_calibrated_and_credits_gains_as_in_the_paper() -> None:
    (ours,), (theirs,) = (stages(name).values() for name in ("world_dense_grpo", "dense_grpo_geneval"))
    for key in ("completion_steps", "credit"):
        assert ours["algorithm"][key] == theirs["algorithm"][key]
    assert ours["algorithm"]["calibration"] > 0 < theirs["algorithm"]["calibration"]


def test_joyai_joins_a_reward_that_does_not_read_the_prompt_with_one_that_does() -> None:
    for name in ("world_joyai_t2i", "joyai_image_t2i"):
        (stage,) = read(name).stages
        assert sorted("prompt" in one.reward.reads for one in stage.rewards if one.weight) == [False, True]


def test_longcat_leaves_out_pairs_that_are_near_and_world_dpo_does_not() -> None:
    """A true picture scores 1 and any other less than .25: the margin is what both a hit and a miss must lie around."""
    (longcat,), (dpo,) = (stages(name).values() for name in ("world_longcat", "world_dpo"))
    assert 0.25 < longcat["algorithm"]["margin"] < 0.75
    assert dpo["algorithm"]["margin"] == 0.0
    assert longcat["rewards"]["composition"]["score"] == "mixed"


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_a_row_for_each() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name, paper in PAIRS.items():
        assert re.search(rf"^\| `{name}` \| `{paper}` \| .+ \| .+ \|$", page, flags=re.MULTILINE), name
