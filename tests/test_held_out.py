"""Which stages run, in which order, and what an evaluation says of the tasks of other stages."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlkit import recipe, recipe_course, session
from rlkit.dist import Processes
from rlkit.errors import CheckpointError, RecipeError
from rlkit.held_out import under
from rlkit.stages import Setup
from rlkit.tracking import Metrics

NAMES = ("edges", "middle", "bright")
ENDS = {"edges": 6, "middle": 4, "bright": 8}  # held-out pictures
STEPS = {"edges": None, "middle": 4, "bright": None}  # of denoising, in evaluations
REWARDS = {"edges": {"composition": 1.0}, "middle": {"composition": 1.0}, "bright": {"brightness": 1.0}}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(before[0])
    torch.set_rng_state(before[1])


def described(path: Path, order: list[str] | None = None, **also: Any) -> dict[str, Any]:
    """Three stages of one training step each. also: of each stage, what its evaluation names."""
    kinds = {"edges": None, "middle": ["single"], "bright": None}
    stages: dict[str, dict[str, Any]] = {
        name: {
            "data": {"name": "world", "per_step": 2, "group": 2, "kinds": kinds[name]},
            "rollout": {"name": "local", "steps": 3 if name == "middle" else 2},
            "algorithm": {"name": "flow_grpo", "clip": 2e-3, "window": 1},
            "rewards": REWARDS[name],
            "learner": {"lr": 1e-3, "batch": 4},
            "evaluate": {"every": 0, "held_out": 4, "ends": ENDS[name], "steps": STEPS[name]},
            "steps": 1,
        }
        for name in NAMES
    }
    for name, others in also.items():
        stages[name]["evaluate"]["also"] = others
    run = {"checkpoint_every": 1, "keep_checkpoints": 9, "threads": 1, "wandb": "disabled", "device": "cpu"}
    policy = {"backbone": {"name": "tiny", "path": str(path)}, "train": {"full": True}}
    return {"run": {**run, "order": order}, "policy": policy, "stages": stages}


def went(values: dict[str, Any], folder: Path, resume: bool = False) -> tuple[Setup, list[dict[str, Any]]]:
    setup = recipe.resolve(values)
    recipe.check(setup)
    session.run(setup, folder, Processes(), resume=resume, quiet=True)
    rows = [row for row in Metrics.read(folder) if row["kind"] == "evaluation"]
    return setup, rows


def test_stages_run_in_the_order_asked_for_and_the_others_rest(small_backbone: Path, tmp_path: Path) -> None:
    setup, rows = went(described(small_backbone, ["bright", "edges"]), tmp_path / "run")
    assert [row["stage"] for row in rows] == ["bright", "bright", "edges", "edges"]
    assert [row["at"] for row in rows] == [0, 1, 1, 2]
    assert list(recipe_course.running(setup.recipe)) == ["bright", "edges"]
    again = recipe.resolve(setup.recipe)
    assert again.recipe == setup.recipe
    assert [stage.name for stage in again.stages] == ["bright", "edges"]
    assert list(recipe_course.running(recipe.resolve(described(small_backbone)).recipe)) == list(NAMES)


def test_a_run_does_not_go_on_in_another_order(small_backbone: Path, tmp_path: Path) -> None:
    went(described(small_backbone, ["bright"]), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"run\.order"):
        went(described(small_backbone, ["bright", "edges"]), tmp_path / "run", resume=True)


def test_what_another_stage_finds_is_what_it_finds_when_its_turn_comes(small_backbone: Path, tmp_path: Path) -> None:
    """The end of one stage and the begin of the next have the same weights, so the numbers must be the same."""
    also = ["edges", "middle", "bright"]
    _, rows = went(described(small_backbone, edges=also, middle=also), tmp_path / "run")
    ends = {(row["stage"], row["step"]): row for row in rows}
    for one, following in (("edges", "middle"), ("middle", "bright")):
        said, found = ends[one, 1], ends[following, 0]
        columns = [name for name in found if f"{name}_se" in found and name.count("/") == 1]
        assert "held_out/reward" in columns
        for name in columns:
            assert said[f"{name}/{following}"] == found[name]
            assert said[f"{name}/{following}_se"] == found[f"{name}_se"]
            assert said[f"{name}/{one}"] == said[name], "its own is not drawn again"
    assert ends["edges", 1]["held_out/reward/bright"] != ends["edges", 1]["held_out/reward/middle"]
    assert not any("/edges" in name for name in ends["bright", 0]), "it names nobody"


def test_it_changes_nothing_of_the_training(small_backbone: Path, tmp_path: Path) -> None:
    also = list(NAMES)
    plain = went(described(small_backbone), tmp_path / "plain")[1]
    more = went(described(small_backbone, edges=also, middle=also, bright=also), tmp_path / "more")[1]
    for one, other in zip(plain, more, strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k}.items() <= other.items()
    trained = [row for row in Metrics.read(tmp_path / "more") if row["kind"] == "train"]
    calls = [row["network_calls"] for row in trained]
    assert calls == [r["network_calls"] for r in Metrics.read(tmp_path / "plain") if r["kind"] == "train"]


@pytest.mark.parametrize("ending", ["an alarm", "a goal"])
def test_an_evaluation_that_ends_a_stage_has_the_other_tasks(small_backbone: Path, tmp_path: Path, ending: str) -> None:
    """Nobody knows beforehand that it is the last."""
    values = described(small_backbone, ["edges"], edges=["bright"])
    early: dict[str, Any] = {
        "an alarm": {"monitors": {"colour": {"most": 1e-9, "action": "stop"}}},
        "a goal": {"until": {"metric": "held_out/reward", "above": -1.0}},
    }
    values["stages"]["edges"] |= {"steps": 4} | early[ending]
    values["stages"]["edges"]["evaluate"]["every"] = 1
    _, rows = went(values, tmp_path / "run")
    assert [(row["step"], row["count"], row["ends"]) for row in rows] == [(0, 6, True), (1, 4, False), (1, 6, True)]
    assert ["held_out/reward/bright" in row for row in rows] == [True, False, True]
    values["stages"]["edges"]["evaluate"]["held_out"] = 6
    _, rows = went(values, tmp_path / "once")
    assert [(row["step"], row["ends"]) for row in rows] == [(0, True), (1, True)], "it had the right size already"
    assert all("held_out/reward/bright" in row for row in rows)


def test_monitors_do_not_look_at_other_tasks(small_backbone: Path, tmp_path: Path) -> None:
    """They are measured at the ends alone: nothing between could be compared with them."""
    values = described(small_backbone, edges=["bright"])
    values["stages"]["edges"]["monitors"] = {"best_by": "held_out/reward", "colour": {"action": "roll_back"}}
    went(values, tmp_path / "run")
    values["stages"]["edges"]["monitors"]["best_by"] = "held_out/reward/bright"
    with pytest.raises(RecipeError, match="two ends of stage 'edges'") as error:
        recipe.check(recipe.resolve(values))
    assert error.value.where == "stages.edges.monitors.best_by"
    values["stages"]["edges"]["monitors"]["best_by"] = "held_out/strct"
    with pytest.raises(RecipeError, match="Did you mean 'strict'"):
        recipe.check(recipe.resolve(values))


def test_only_columns_go_under_a_stages_name() -> None:
    row = {"held_out/strict": 0.5, "held_out/strict_se": 0.1, "held_out/strict/count": 0.4, "count": 9.0}
    assert under("edit", row) == {"held_out/strict/edit": 0.5, "held_out/strict/edit_se": 0.1}


WRONG = {
    "a stage that is none": ({"order": ["edges", "midle"]}, "run.order", "Did you mean 'middle'"),
    "a stage twice": ({"order": ["edges", "edges"]}, "run.order", "twice"),
    "no stage": ({"order": []}, "run.order", "no stage is left"),
    "an evaluation of none": ({"edges": ["brite"]}, "stages.edges.evaluate.also", "Did you mean 'bright'"),
    "an evaluation twice": ({"edges": ["bright", "bright"]}, "stages.edges.evaluate.also", "twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_names_of_stages_that_are_none(small_backbone: Path, case: str) -> None:
    given, where, what = WRONG[case]
    with pytest.raises(RecipeError, match=what) as error:
        recipe.resolve(described(small_backbone, **given))
    assert error.value.where == where


def test_a_score_that_two_things_have_is_refused(small_backbone: Path, tmp_path: Path) -> None:
    """The world's captions have kinds, `single` among them, whose scores are named as those of a stage would be."""
    values = described(small_backbone, ["edges"])
    values["stages"]["single"] = values["stages"].pop("bright")
    values["stages"]["edges"]["evaluate"] |= {"also": ["single"], "ends": 32}
    values["stages"]["single"]["rewards"] = {"composition": 1.0}
    with pytest.raises(RecipeError, match="kind of this stage's prompts") as error:
        went(values, tmp_path / "run")
    assert error.value.where == "stages.edges.evaluate.also"


AMISS = {
    "a goal that is measured at the ends": (
        *({"until": {"metric": "held_out/reward/bright", "above": 0.5}}, "until.metric", "two ends"),
    ),
    "no evaluations": (
        {"evaluate": {"every": 0, "held_out": 0, "also": ["bright"]}},
        "evaluate.also",
        "there are none",
    ),
}


@pytest.mark.parametrize("case", AMISS)
def test_an_evaluation_that_could_not_be_made(small_backbone: Path, case: str) -> None:
    given, where, what = AMISS[case]
    values = described(small_backbone, edges=["bright"])
    values["stages"]["edges"] |= given
    with pytest.raises(RecipeError, match=what) as error:
        recipe.check(recipe.resolve(values))
    assert error.value.where == f"stages.edges.{where}"


def test_a_second_engine_is_refused() -> None:
    """One process has one, and closing the second would take the first with it."""
    stage = {
        "data": {"name": "world", "task": "caption", "per_step": 2, "group": 2},
        "rollout": {"name": "vllm", "most": 8},
        "algorithm": {"name": "token_grpo"},
        "rewards": {"caption_truth": 1.0},
        "learner": {"lr": 1e-3, "batch": 4},
        "evaluate": {"held_out": 4, "also": ["other"]},
        "steps": 1,
    }
    other = {**stage, "rollout": {"name": "vllm", "most": 9}, "evaluate": {"held_out": 4}}
    values = {"policy": {"backbone": "tiny_captioner"}, "stages": {"main": stage, "other": other}}
    with pytest.raises(RecipeError, match="there can be one") as error:
        recipe.check(recipe.resolve(values))
    assert error.value.where == "stages.main.evaluate.also"
    other["rollout"] = stage["rollout"]
    recipe.check(recipe.resolve(values))


def test_a_stage_that_rests_trains_no_part() -> None:
    """Or it would be loaded to be trained: in fp32, and with an optimiser's room."""
    whole = recipe.read("world_unified")
    only = recipe.read("world_unified", ["run.order=[understanding]"])
    trains = {name for stage in only.stages for name in stage.train}
    assert {name for name, way in only.policy.train.items() if way != "frozen"} == trains
    assert trains < {name for name, way in whole.policy.train.items() if way != "frozen"}


def test_only_may_name_a_stage_that_rests() -> None:
    composed = recipe.compose("world_omnigen2")
    assert recipe_course.left_out(composed, None, "proxy") == ["run.order=[proxy]"]
    assert recipe_course.left_out(composed, "t2i", None) == ["run.order=[t2i,in_context]"]
    with pytest.raises(RecipeError, match="no stage named 'proxy'"):
        recipe_course.left_out(composed, "proxy", None)


def test_a_stage_that_is_only_evaluated_is_checked_too(small_backbone: Path) -> None:
    values = described(small_backbone, ["edges"], edges=["bright"])
    values["stages"]["bright"]["learner"]["batch"] = 3
    with pytest.raises(RecipeError, match="does not divide"):
        recipe.check(recipe.resolve(values))
    values["stages"]["edges"]["evaluate"]["also"] = []
    recipe.check(recipe.resolve(values))
