"""The recipes of the papers: their heads tell the truth, their courses are the papers', and the README lists them."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlkit import cli, recipe, recipe_course, registry
from rlkit.errors import RlkitError
from rlkit.stages import Setup

ROOT = Path(__file__).parents[1]
PAPERS = {name: file for name, file in registry.recipes().items() if file.parent.name == "papers"}
VALUES: dict[str, Any] = {  # of the columns that stand for something; the others are texts
    "tag": "single_object",
    "include": [{"class": "bench", "count": 1}],
    "exclude": [],
    "source": "a.png",
    "references": ["a.png", "b.png"],
    "chosen": "a.png",
    "rejected": "b.png",
    "target_text": ["OPEN"],
    "messages": [{"role": "assistant", "content": "the answer"}],
}


# A recipe without its files, which none of them has where the tests begin.
read = functools.cache(recipe.read)


def head(name: str) -> str:
    return PAPERS[name].read_text(encoding="utf-8").partition("\n\n")[0]


def columns(name: str) -> dict[str, list[str]]:
    """The files that a recipe's head asks for, with their columns."""
    found = re.findall(r"^#   (data/\S+): (.+)$", head(name), flags=re.MULTILINE)
    return {path: words.split(", ") for path, words in found}


def files(setup: Setup) -> set[str]:
    """The files that a recipe's data names."""
    return {path for one in setup.stages for path in (one.data.path, one.data.held_out_path) if path}


def bring(name: str, folder: Path, without: str = "") -> None:
    """The files of a recipe's head, with two rows each, and pictures for them."""
    from PIL import Image

    for path, names in columns(name).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        for shade, picture in enumerate(("a.png", "b.png")):
            Image.new("RGB", (16, 16), (shade, 0, 0)).save((folder / path).parent / picture)
        rows = [
            {one: VALUES.get(one, f'{one} {row}: a sign that says "OPEN"') for one in names if one != without}
            for row in range(2)
        ]
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "skills").mkdir(exist_ok=True)
    (folder / "skills" / "lettering.md").write_text("Say how large the letters are.")


def opened(name: str) -> None:
    """Its data, read."""
    for stage in recipe.read(name).stages:
        stage.data.open()


def test_there_are_recipes_of_papers() -> None:
    assert len(PAPERS) >= 15


@pytest.mark.parametrize("name", PAPERS)
def test_a_head_says_the_command_the_paper_and_that_it_was_never_run(name: str) -> None:
    said = head(name)
    assert said.splitlines()[:3:2] == [said.splitlines()[0], f"#   rlkit train {name}"]
    assert len(re.findall(r"^#   rlkit train ", said, flags=re.MULTILINE)) == 1
    words = " ".join(line.removeprefix("#").strip() for line in said.splitlines())
    assert "A healthy run" in words
    assert "Never run here" in words
    assert re.search(r"^# Paper: \S", said, flags=re.MULTILINE)


@pytest.mark.parametrize("file", sorted({*(ROOT / "recipes" / "papers").glob("*.yaml")}), ids=lambda one: one.stem)
def test_a_line_fits_the_page(file: Path) -> None:
    assert [line for line in file.read_text(encoding="utf-8").splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("name", PAPERS)
def test_it_composes_without_its_files_and_its_head_names_them_all(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    setup = recipe.read(name)
    assert set(columns(name)) == files(setup)


@pytest.mark.parametrize("name", PAPERS)
def test_check_is_content_with_the_columns_that_the_head_names(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    bring(name, tmp_path)
    assert cli.main(["check", name]) == 0


@pytest.mark.parametrize(
    ("name", "column"),
    [
        *((name, "prompt") for name in ("flow_grpo_ocr", "diffusion_dpo_sdxl")),
        *((name, "source") for name in ("omnigen2_rl", "joyai_image_edit", "firered")),
        ("omnigen2_rl", "references"),
        *((name, "chosen") for name in ("diffusion_dpo_sdxl", "wan_image", "qwen_image_rl", "longcat_image_rl")),
        ("genevolve", "messages"),
    ],
)
def test_a_column_that_is_not_brought_is_named(name: str, column: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    bring(name, tmp_path, without=column)
    with pytest.raises(RlkitError, match="demonstration" if column == "messages" else column):
        opened(name)


@pytest.mark.parametrize("name", PAPERS)
def test_what_is_expected_is_measured(name: str) -> None:
    setup = read(name)
    for stage in setup.stages:
        known = recipe_course.measured(stage)
        expected = setup.recipe["stages"][stage.name]["expect"]
        assert known is not None, "each reward says what it gives"
        assert {one.removeprefix("held_out/") for one in expected} <= set(known)


# ---- they are the papers' courses ------------------------------------------------------------------------------------


def course(name: str) -> list[tuple[str, str, int]]:
    """(stage, algorithm, steps) in the order of running."""
    stages = read(name).recipe["stages"]
    return [(stage, one["algorithm"]["name"], one["steps"]) for stage, one in stages.items()]


def test_omnigen2_has_the_steps_of_table_5_in_the_order_of_section_3_5() -> None:
    steps = {"edit": 700, "t2i": 1500, "in_context": 200}
    for name, order in (("omnigen2_rl", list(steps)), ("omnigen2_rl_hpsv3", ["edit", "t2i"])):
        assert course(name) == [(stage, "flow_grpo", steps[stage]) for stage in order]
    ours, hacked = (read(name).recipe["stages"] for name in ("omnigen2_rl", "omnigen2_rl_hpsv3"))
    assert {**ours["edit"], "evaluate": None} == {**hacked["edit"], "evaluate": None}
    assert [name for name, one in hacked["t2i"]["rewards"].items() if one["weight"]] == ["hpsv3"]


@pytest.mark.parametrize("order", re.findall(r"run\.order=\[([\w,]+)\]", head("omnigen2_rl")))
def test_the_other_orders_of_omnigen2_are_the_same_recipe(order: str) -> None:
    ours, other = read("omnigen2_rl"), recipe.read("omnigen2_rl", [f"run.order=[{order}]"])
    assert [stage.name for stage in other.stages] == order.split(",")
    assert [stage.name for stage in other.stages] != [stage.name for stage in ours.stages]
    assert other.recipe["stages"] == ours.recipe["stages"]


def test_diffusion_nft_is_the_schedule_of_appendix_c() -> None:
    assert [steps for _, algorithm, steps in course("diffusion_nft_multi") if algorithm == "diffusion_nft"] == [
        *(800, 300, 200, 200, 100)
    ]
    stages = read("diffusion_nft_multi").recipe["stages"].values()
    assert [Path(one["data"]["path"]).parent.name for one in stages] == [
        *("pickscore", "geneval", "pickscore", "geneval", "ocr")
    ]
    assert all({"pickscore", "hpsv2", "clip_score"} <= set(one["rewards"]) for one in stages)


@pytest.mark.parametrize(
    ("name", "algorithms"),
    [
        ("wan_image", ["diffusion_dpo", "reward_backprop", "dense_grpo"]),
        ("hunyuan_image_3", ["flow_grpo", "reward_backprop"]),
        ("qwen_image_rl", ["diffusion_dpo", "flow_grpo"]),
        ("firered", ["diffusion_nft"]),
        ("longcat_image_rl", ["diffusion_dpo"]),
        ("joyai_image_t2i", ["flow_grpo"]),
        ("joyai_image_edit", ["diffusion_nft"]),
        ("genevolve", ["sft", "sdl"]),
    ],
)
def test_a_systems_course_is_its_papers(name: str, algorithms: list[str]) -> None:
    assert [algorithm for _, algorithm, _ in course(name)] == algorithms


@pytest.mark.parametrize("task", ["geneval", "ocr", "pickscore"])
def test_dense_grpo_differs_from_flow_grpo_by_what_its_paper_says(task: str) -> None:
    flow, dense = (read(f"{kind}_grpo_{task}").recipe for kind in ("flow", "dense"))
    one, other = flow["stages"]["main"], dense["stages"]["main"]
    assert flow["policy"] == dense["policy"]
    assert {key for key in one if one[key] != other[key]} <= {"algorithm", "learner", "steps", "expect"}
    assert one["algorithm"]["kl"] == other["algorithm"]["kl"] == {"pickscore": 0.01}.get(task, 0.04)
    assert other["algorithm"]["completion_steps"] == 0
    assert other["algorithm"]["credit"] == "gain"
    assert one["learner"]["batch"] * 2 == other["learner"]["batch"] == 48 * 24 * 9


# ---- the README ------------------------------------------------------------------------------------------------------


def row(name: str) -> str:
    """A recipe's row in the README's table."""
    plain = read(name).recipe
    found = re.search(r"^# Paper: ([^(;]+) \(([^)]+)\)", head(name), flags=re.MULTILINE)
    assert found, "# Paper: NAME (arXiv NUMBER)"
    stages = [
        f"{'' if stage == 'main' else f'{stage}: '}`{one['algorithm']['name']}`, {one['steps']:,} steps"
        for stage, one in plain["stages"].items()
    ]
    return f"| `{name}` | {found[1]} ({found[2]}) | `{plain['policy']['backbone']['name']}` | {'; '.join(stages)} |"


def test_the_readmes_table_is_what_the_files_say() -> None:
    rows = [row(name) for name in PAPERS]
    _, _, section = (ROOT / "README.md").read_text(encoding="utf-8").partition("### Recipes of the papers\n")
    written = section.partition("\n#")[0]
    assert "\n".join(rows) in written, "the README's table should read:\n" + "\n".join(rows)
    assert written.count("\n| `") == len(rows), "and have no other rows"
