"""Reports of made-up runs whose answers are known."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rlkit.errors import DataError, RlkitError
from rlkit.report import charts
from rlkit.report import page as report_page
from rlkit.report import stages as report_stages
from rlkit.report.summary import Run, sentence, summary, write
from rlkit.tracking import Metrics

RECIPE = """
stages:
  main:
    steps: 4
    expect: {held_out/strict: "> before + 0.15", kl: "< 0.05"}
"""
RED, BLUE = (255, 0, 0), (0, 0, 255)


def evaluation(at: int, strict: float, error: float = 0.03, stage: str = "main", **more: Any) -> dict[str, Any]:
    numbers = {"held_out/strict": strict, "held_out/strict_se": error, "held_out/strict/place": strict / 2}
    row = {
        "kind": "evaluation",
        "stage": stage,
        "step": at,
        "at": at,
        **numbers,
        "count": 1024,
        "seconds/evaluate": 2.0,
    }
    return row | more


def train(at: int, stage: str = "main") -> dict[str, Any]:
    numbers = {"reward/mean": 0.1 * at, "reward/std": 0.2, "kl": 0.01 * at, "grad_norm": 1.0 + at}
    times = {"seconds/sample": 1.0, "seconds/score": 0.25, "seconds/train": 0.5}
    return {"kind": "train", "stage": stage, "step": at, "at": at, **numbers, **times}


def event(at: int, name: str, **more: Any) -> dict[str, Any]:
    return {"kind": "event", "stage": "main", "step": at, "at": at, "event": name, **more}


FINISHED = [
    event(0, "unknown_words", text="2 prompts <hold> unknown words", **{"seconds/start": 3.0}),
    evaluation(0, 0.25, error=0.03),
    train(1),
    train(2),
    evaluation(2, 0.75),  # the best one, which counts for nothing
    train(3),
    train(4),
    evaluation(4, 0.5, error=0.04),
    event(4, "finished", **{"seconds/total": 20.0}),
]


def run_folder(folder: Path, rows: list[dict[str, Any]], recipe: str = RECIPE) -> Path:
    folder.mkdir()
    metrics = Metrics(folder)
    for row in rows:
        metrics.append(row)
    (folder / "recipe.yaml").write_text(recipe)
    environment = {
        "command": "rlkit train recipes/quick<start>.yaml a=1",
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def sheet(
    folder: Path,
    at: int,
    colour: tuple[int, int, int],
    strict: float,
    tile: int = 4,
    seed: int = 0,
    stage: str = "main",
    end: str = "",
    reward: float = 0.5,
) -> None:
    """Three tiles in two columns; the last one is of the given colour. end: of its name, after the step."""
    (folder / "samples").mkdir(exist_ok=True)
    picture = Image.new("RGB", (2 * tile, 2 * tile))
    picture.paste(colour, (0, tile, tile, 2 * tile))
    picture.save(folder / "samples" / f"{at:06d}{end}.png")
    items = [
        {"prompt": f"a <b>{i}</b>", "seed": seed + i, "reward": reward, "strict": strict if i == 2 else 1.0}
        for i in range(3)
    ]
    known = {
        "stage": stage,
        "step": at,
        "at": at,
        "width": tile,
        "height": tile,
        "given": 0,
        "columns": 2,
        "drawn": True,
        "items": items,
    }
    (folder / "samples" / f"{at:06d}{end}.json").write_text(json.dumps(known))


def pair(folder: Path) -> list[charts.Sheet]:
    """Of the sheets that the record has an evaluation of, in their order: what the page compares."""
    return charts.pair(charts.sheets(folder, Run.open(folder).evaluations))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "run", FINISHED)


# ---- numbers


def test_before_is_the_first_evaluation_and_after_the_last(finished: Path) -> None:
    facts = summary(finished)
    strict = facts["held_out"]["strict"]
    assert (strict["before"], strict["after"], strict["before_se"], strict["after_se"]) == (0.25, 0.5, 0.03, 0.04)
    assert strict["change"] == 0.25
    assert strict["change_se"] == pytest.approx(0.05)  # 3-4-5
    assert strict["count"] == 1024
    assert facts["stages"] == {
        "main": {"strict": {"before": 0.25, "after": 0.5}, "strict/place": {"before": 0.125, "after": 0.25}}
    }
    assert (facts["recipe"], facts["finished"], facts["steps"]) == ("quick<start>", True, 4)
    assert facts["seconds"] == {"total": 20.0, "sample": 4.0, "score": 1.0, "train": 2.0, "evaluate": 6.0, "start": 3.0}
    json.dumps(facts, allow_nan=False)


def test_stages_have_their_own_before_and_after(tmp_path: Path) -> None:
    rows = [
        evaluation(0, 0.1, stage="easy"),
        train(1, "easy"),
        evaluation(1, 0.3, stage="easy"),
        evaluation(1, 0.2, stage="hard", step=0),
        train(2, "hard"),
        evaluation(2, 0.4, stage="hard", step=1),
    ]
    facts = summary(run_folder(tmp_path / "run", rows))
    assert facts["stages"]["easy"]["strict"] == {"before": 0.1, "after": 0.3}
    assert facts["stages"]["hard"]["strict"] == {"before": 0.2, "after": 0.4}
    assert (facts["held_out"]["strict"]["before"], facts["held_out"]["strict"]["after"]) == (0.1, 0.4)
    assert facts["seconds"]["total"] == pytest.approx(2 * 1.75 + 4 * 2.0)  # no word from the end: what is known


def test_an_evaluation_repeated_after_a_resume_counts_once(tmp_path: Path) -> None:
    rows = [evaluation(0, 0.1), train(1), evaluation(1, 0.2), event(1, "resumed"), evaluation(1, 0.3)]
    facts = summary(run_folder(tmp_path / "run", rows))
    assert facts["held_out"]["strict"]["after"] == 0.3
    assert facts["seconds"]["evaluate"] == 4.0


def test_expectations_are_reported(finished: Path) -> None:
    met = {rule["metric"]: rule["met"] for rule in summary(finished)["expect"]}
    assert met == {"held_out/strict": True, "kl": True}  # kl: from training rows, 0.04 in the last tenth


@pytest.mark.parametrize(
    ("rule", "met"), [("> before + 0.25", False), (">= before + 0.25", True), ("< 0.6", True), ("nonsense", None)]
)
def test_expectations_compare_the_last_evaluation(tmp_path: Path, rule: str, met: bool | None) -> None:
    recipe = (
        f"stages: {{main: {{expect: {{held_out/strict: '{rule}', absent: '> 1'}}}}, later: {{expect: {{kl: '> 0'}}}}}}"
    )
    folder = run_folder(tmp_path / "run", FINISHED, recipe)
    assert [one["met"] for one in summary(folder)["expect"]] == [met, None, None]


def test_a_run_that_was_killed(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", FINISHED[:4])
    with (folder / Metrics.NAME).open("a") as file:
        file.write('{"kind": "trai')
    facts = summary(folder)
    assert (facts["finished"], facts["steps"]) == (False, 2)
    assert (facts["held_out"]["strict"]["before"], facts["held_out"]["strict"]["after"]) == (0.25, None)
    assert [rule["met"] for rule in facts["expect"]] == [None, None]
    text = sentence(facts)
    assert text.startswith("The run did not finish")
    assert "0.250 (1,024 images) at its only evaluation" in text
    page = write(folder).read_text()
    assert "not finished" in page
    assert "2 of 4 steps" in page


def test_a_finished_run_that_was_taken_up_again_has_not_finished(tmp_path: Path) -> None:
    assert not summary(run_folder(tmp_path / "run", [*FINISHED, event(4, "resumed"), train(5)]))["finished"]


def test_only_an_event(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [event(0, "interrupted", text="stopped by the user")], recipe="")
    assert "nothing was evaluated" in sentence(summary(folder))
    assert "stopped by the user" in write(folder).read_text()


def test_what_is_no_run_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such run folder.*Give the folder"):
        summary(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no numbers.*before its first step"):
        write(tmp_path)


# ---- words


def test_the_sentence_of_a_rise(finished: Path) -> None:
    expected = "Held-out strict reward rose from 0.250 to 0.500 (+0.250 ± 0.050, 1,024 images) in 20 s and 4 steps."
    assert sentence(summary(finished)).startswith(expected)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (0.0, "fell from 0.250 to 0.000 (-0.250 ± 0.050, 1,024 images)"),
        (0.34, "did not move beyond the noise: from 0.250 to 0.340 (+0.090 ± 0.050"),  # less than two standard errors
        (0.36, "rose from 0.250 to 0.360"),
    ],
)
def test_the_sentence_is_honest(tmp_path: Path, after: float, words: str) -> None:
    rows = [evaluation(0, 0.25, error=0.03), train(1), evaluation(1, after, error=0.04)]
    assert words in sentence(summary(run_folder(tmp_path / "run", rows)))


def test_a_reward_that_rises_while_strict_falls_is_named(tmp_path: Path) -> None:
    rows = [evaluation(at, 0.5 - 0.4 * at) | {"held_out/reward": 0.1 + 0.5 * at} for at in (0, 1)]
    assert "Reward rose while strict fell" in sentence(summary(run_folder(tmp_path / "run", rows)))


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((1024, 1024), "± 0.042, 1,024 images)"),
        ((1024, 64), "± 0.042, 64 images, and 1,024 before)"),  # a run that was killed between its ends
        ((64, 1024), "± 0.042, 64 images, and 1,024 after)"),
    ],
)
def test_a_change_is_of_as_many_images_as_its_smaller_end(tmp_path: Path, counts: tuple[int, int], words: str) -> None:
    rows = [evaluation(at, 0.25 + at, count=count) for at, count in enumerate(counts)]
    facts = summary(run_folder(tmp_path / "run", rows))
    assert words in sentence(facts)
    assert facts["held_out"]["strict"]["count"] == min(counts)


# ---- the page


def test_the_page_loads_nothing_and_escapes_everything(finished: Path) -> None:
    for at, colour, strict in ((0, RED, 0.0), (4, BLUE, 1.0)):
        sheet(finished, at, colour, strict)
    page = write(finished).read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 6
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<b>0</b>" not in page
    assert "a &lt;b&gt;0&lt;/b&gt;" in page
    assert "2 prompts &lt;hold&gt; unknown words" in page
    assert "quick&lt;start&gt;" in page
    assert "&gt; before + 0.15" in page  # the recipe
    assert "torch 2.13.0" in page
    assert "1 got better and 0 got worse" in page
    assert "0 → 1" in page


def test_pictures_beside_the_page(finished: Path) -> None:
    for at, colour in ((0, RED), (2, RED), (4, BLUE)):
        sheet(finished, at, colour, 0.0)
    write(finished)
    for name, colour in (("before.png", RED), ("after.png", BLUE)):
        with Image.open(finished / name) as picture:
            assert picture.size == (24, 24)  # three times the sheet
            assert picture.getpixel((0, 12)) == picture.getpixel((11, 23)) == colour
            assert picture.getpixel((12, 12)) == (0, 0, 0)
    with Image.open(finished / "curve.png") as picture:
        assert picture.width > picture.height > 100


def test_before_is_the_first_sheet_of_the_same_prompts(finished: Path) -> None:
    sheet(finished, 0, RED, 0.0, seed=100)
    sheet(finished, 2, RED, 0.0)
    sheet(finished, 4, BLUE, 0.0)
    (finished / "samples" / "000006.json").write_text('{"stage": "ma')  # killed while writing
    assert [one.at for one in pair(finished)] == [2, 4]


def test_sheets_of_steps_that_a_resumed_run_took_back_are_no_after(tmp_path: Path) -> None:
    rows = [evaluation(0, 0.2), train(1), train(2), event(2, "resumed"), train(3), evaluation(3, 0.3)]
    folder = run_folder(tmp_path / "run", rows)
    for at, end in ((0, ""), (3, "-alarm"), (3, ""), (4, "")):  # an earlier future had a monitor go back at step 3
        sheet(folder, at, BLUE, 0.0, end=end)
    assert [one.path.stem for one in pair(folder)] == ["000000", "000003"]
    assert [one.path.stem for one in charts.sheets(folder, Run.open(folder).evaluations)] == ["000000", "000003"]


def test_a_sheet_that_was_set_aside_stands_before_what_was_restored(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [evaluation(0, 0.2), evaluation(4, 0.1), evaluation(4, 0.2, restored=0)])
    for end in ("", "-alarm"):
        sheet(folder, 4, BLUE, 0.0, end=end)
    stems = [one.path.stem for one in charts.sheets(folder, Run.open(folder).evaluations)]
    assert stems == ["000004-alarm", "000004"]


def test_the_closing_sheet_of_a_stage_stands_before_the_opening_one_of_the_next(tmp_path: Path) -> None:
    rows = [
        evaluation(0, 0.1, stage="easy"),
        evaluation(4, 0.2, stage="easy"),
        evaluation(4, 0.3, stage="a", step=0),
    ]
    folder = run_folder(tmp_path / "run", rows, recipe="")
    for stage, end in (("easy", ""), ("a", "-a")):
        sheet(folder, 4, BLUE, 0.0, stage=stage, end=end)
    stems = [one.path.stem for one in charts.sheets(folder, Run.open(folder).evaluations)]
    assert stems == ["000004", "000004-a"], "as they were made, whatever their names"


def test_large_tiles_become_thumbnails(finished: Path) -> None:
    sheet(finished, 4, BLUE, 0.0, tile=256)
    page = write(finished).read_text()
    assert page.count("data:image/jpeg") == 3
    assert len(page) < 100_000
    with Image.open(finished / "before.png") as picture:
        assert picture.size == (512, 512)  # as it is


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.31, 0.69, [0.4, 0.5, 0.6]),
        (0, 60, [0, 10, 20, 30, 40, 50, 60]),
        (2, 2, [2]),
    ],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == expected


def test_long_lines_are_thinned_to_means() -> None:
    line = charts.Line("x", [(float(i), float(i % 2)) for i in range(1600)], spread=[1.0] * 1600).thinned()
    assert len(line.points) == charts.MOST_POINTS
    assert line.points[0] == (1.5, 0.5)
    assert line.spread == [1.0] * charts.MOST_POINTS


def test_heavy_libraries_wait_until_a_report_is_written() -> None:
    program = (
        "import sys, rlkit.report.summary; print(sorted({'matplotlib', 'PIL', 'torch', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_was_given_and_pictures_that_are_not_square_are_cut_where_they_lie(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    picture = Image.new("RGB", (2 * 2 * 6, 2 * 4))
    picture.paste((255, 0, 0), (6, 4, 12, 8))  # the sample of the third tile
    picture.paste((0, 0, 255), (0, 4, 6, 8))  # and what it was made from
    picture.save(tmp_path / "samples" / "000001.png")
    items = [{"prompt": str(i), "seed": i} for i in range(3)]
    known = {"stage": "main", "at": 1, "width": 6, "height": 4, "given": 1, "columns": 2, "drawn": True, "items": items}
    (tmp_path / "samples" / "000001.json").write_text(json.dumps(known))
    (sheet,) = charts.sheets(tmp_path, [evaluation(1, 0.5)])
    ((given, made),) = charts.tiles(sheet, [2])
    for uri, colour in ((given, (0, 0, 255)), (made, (255, 0, 0))):
        cut = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGB")
        assert cut.size == (6, 4)
        assert {colour} == {cut.getpixel((x, y)) for x in range(6) for y in range(4)}
    page = report_page.pictures(charts.pair([sheet]))
    assert "What was given, then: Step 1." in page


def test_texts_are_shown_beside_what_they_are_about(finished: Path) -> None:
    for at, text in ((0, "a red <circle>"), (4, "a blue circle")):
        sheet(finished, at, RED, 0.0)
        file = finished / "samples" / f"{at:06d}.json"
        known = json.loads(file.read_text())
        known |= {"items": [item | {"text": text} for item in known["items"]], "drawn": False}
        file.write_text(json.dumps(known))
    page = report_page.pictures(pair(finished))
    assert "a red &lt;circle&gt; → a blue circle" in page
    assert "Said of each picture: step 0 → step 4. Of these 3 texts" in page
    assert page.count("<img") == 3, "one picture each: it is the same before and after"


def test_what_an_agent_drew_stands_with_the_request_and_what_it_told_the_generator(finished: Path) -> None:
    for at, text in ((0, ""), (4, "a blue circle")):
        sheet(finished, at, RED, 0.0)
        file = finished / "samples" / f"{at:06d}.json"
        known = json.loads(file.read_text())
        known["items"] = [item | {"prompt": "the flag of Kesh Bay", "text": text} for item in known["items"]]
        file.write_text(json.dumps(known))
    page = report_page.pictures(pair(finished))
    assert "the flag of Kesh Bay: – → a blue circle" in page
    assert page.count("<img") == 6, "before and after"
    assert "Of these 3 pictures" in page


def test_a_run_of_several_tasks_is_summed_up_by_its_last_one(tmp_path: Path) -> None:
    rows = [
        evaluation(0, 0.5, stage="edit"),
        train(1, "edit"),
        evaluation(1, 0.6, stage="edit"),
        evaluation(1, 0.1, stage="put", step=0),
        train(2, "put"),
        evaluation(2, 0.2, stage="put", step=1),
    ]
    data = "data: {{name: world, task: {}, kinds: {}}}"
    told = "stages:\n  edit: {{{}, steps: 1}}\n  put: {{{}, steps: 1}}\n"
    several = told.format(data.format("edit", "null"), data.format("in_context", "null"))
    facts = summary(run_folder(tmp_path / "run", rows, several))
    assert (facts["held_out"]["strict"]["before"], facts["held_out"]["strict"]["after"]) == (0.1, 0.2)
    assert facts["stages"]["edit"]["strict"] == {"before": 0.5, "after": 0.6}
    alike = told.format(data.format("edit", "[add]"), data.format("edit", "null"))
    facts = summary(run_folder(tmp_path / "other", rows, alike))
    assert (facts["held_out"]["strict"]["before"], facts["held_out"]["strict"]["after"]) == (0.5, 0.2)


# ---- stages with other rewards

TWO = """
stages:
  first: {{data: {{name: world}}, rewards: {first}, total: {{form: sum, gates: []}}, steps: 2}}
  second: {{data: {{name: world}}, rewards: {second}, total: {{form: sum, gates: []}}, steps: 2}}
"""


def rewarded(folder: Path, first: str, second: str, recipe: str = TWO, strict: bool = False) -> Path:
    """A run of two stages, both of which get better at what they are rewarded for. strict: it is measured, too."""
    rows = []
    for at, stage, step, reward in (
        (0, "first", 0, 0.1),
        (2, "first", 2, 0.4),
        (2, "second", 0, -0.8),
        (4, "second", 2, -0.5),
    ):
        row = evaluation(at, 0.1 * (at + 1), stage=stage, step=step) | {"held_out/reward": reward}
        rows += [train(at, stage) | {"step": step} | ({"composition/strict": 0.5} if strict else {})] * (step > 0)
        rows.append({key: value for key, value in row.items() if strict or "strict" not in key})
    return run_folder(folder, [*rows, event(4, "finished")], recipe.format(first=first, second=second))


def test_stages_with_other_rewards_are_not_compared_by_their_totals(tmp_path: Path) -> None:
    folder = rewarded(tmp_path / "run", "{brightness: {weight: 1.0}}", "{jpeg_size: {weight: 1.0}}")
    facts = summary(folder)
    reward = facts["held_out"]["reward"]
    assert (reward["before"], reward["after"], reward["of"]) == (-0.8, -0.5, ["second"]), "the last stage sums up"
    first, *others = sentence(facts).splitlines()
    assert first.startswith("Held-out reward of second rose from -0.800 to -0.500 (")
    assert [re.search(r"reward .*? \(", one)[0] for one in others] == [
        "reward 0.100 to 0.400 (",
        "reward -0.800 to -0.500 (",
    ]
    page = write(folder).read_text()
    assert "<span>held-out reward of second</span><b>-0.500</b>from -0.800 " in page
    assert "Held-out prompts of second" in page


def test_a_score_that_does_not_depend_on_weights_is_compared_over_all_stages(tmp_path: Path) -> None:
    told = "{{composition: {{weight: {}}}, brightness: {{weight: 1.0}}}}"
    folder = rewarded(tmp_path / "run", told.format(1.0), told.format(0.5), strict=True)
    facts = summary(folder)
    assert (facts["headline"], facts["held_out_of"]) == ("strict", ["first", "second"])
    text = sentence(facts)
    assert "Held-out strict reward rose from 0.100 to 0.500" in text
    assert "Held-out reward of second rose from -0.800 to -0.500 (+0.300, 1,024 images)." in text
    page = write(folder).read_text()
    assert "<span>held-out strict</span>" in page
    assert "<span>held-out reward of second</span>" in page
    assert "<td>reward of second</td>" in page
    assert "<td>strict</td>" in page


@pytest.mark.parametrize(
    ("second", "strict", "reward"),
    [
        ("{composition: {weight: 1.0, form: loose}, brightness: {weight: 1.0}}", False, False),
        ("{composition: {weight: 1.0, scale: 2.0}, brightness: {weight: 1.0}}", True, False),
        ("{composition: {weight: 1.0, workers: 4}, brightness: {weight: 1.0}}", True, True),
        ("{composition: {weight: 1.0}, brightness: {weight: 1.0}, sharpness: {weight: 0.0}}", True, True),
        ("{composition: {weight: 1.0}, brightness: {weight: 1.0, dark: true}}", True, False),
        ("{brightness: {weight: 1.0}}", False, False),
    ],
)
def test_what_a_score_depends_on(tmp_path: Path, second: str, strict: bool, reward: bool) -> None:
    folder = rewarded(tmp_path / "run", "{composition: {weight: 1.0}, brightness: {weight: 1.0}}", second, strict=True)
    run = Run.open(folder)
    assert run.alike("first", "second", "strict/place") is strict
    assert run.alike("first", "second", "reward/place") is reward


@pytest.mark.parametrize("total", ["{form: product, gates: []}", "{form: sum, gates: [{when: a < 1, at_most: 0}]}"])
def test_a_reward_joined_in_another_way_is_another_one(tmp_path: Path, total: str) -> None:
    before, _, after = TWO.rpartition("{{form: sum, gates: []}}")
    recipe = before + total.replace("{", "{{").replace("}", "}}") + after
    same = "{composition: {weight: 1.0}}"
    run = Run.open(rewarded(tmp_path / "run", same, same, recipe, strict=True))
    assert not run.alike("first", "second", "reward")
    assert run.alike("first", "second", "strict")


def test_reward_and_strict_of_other_stages_do_not_make_a_hack(tmp_path: Path) -> None:
    told = "{{composition: {{weight: {}}}, brightness: {{weight: 1.0}}}}"
    folder = rewarded(tmp_path / "run", told.format(1.0), told.format(0.0), strict=True)
    rows = [row | ({"held_out/strict": 0.9} if row["at"] == 0 else {}) for row in Metrics.read(folder)]
    facts = summary(run_folder(tmp_path / "other", rows, (folder / "recipe.yaml").read_text()))
    assert "strict reward fell" in sentence(facts)
    assert "Reward rose while strict fell" not in sentence(facts), "reward rose in the second stage, as strict did"


def test_pictures_are_counted_by_what_both_stages_measure(tmp_path: Path) -> None:
    told = "{{composition: {{weight: {}}}, brightness: {{weight: 1.0}}}}"
    folder = rewarded(tmp_path / "run", told.format(1.0), told.format(0.5), strict=True)
    sheet(folder, 0, RED, 0.0, stage="first", reward=0.4)
    sheet(folder, 4, BLUE, 1.0, stage="second", reward=-0.5)
    page = write(folder).read_text()
    assert "1 got better and 0 got worse" in page, "not by a reward that fell for all three"
    assert "<small>reward<br>" not in page


def test_pictures_of_stages_that_no_score_compares_are_those_of_the_last(tmp_path: Path) -> None:
    folder = rewarded(tmp_path / "run", "{brightness: {weight: 1.0}}", "{jpeg_size: {weight: 1.0}}")
    for at, stage, end, reward in ((0, "first", "", 0.1), (2, "second", "-second", -0.8), (4, "second", "", -0.5)):
        sheet(folder, at, RED, 1.0, stage=stage, end=end, reward=reward)
    page = write(folder).read_text()
    assert "Left: step 2. Right: step 4. Of these 3 pictures, 3 got better and 0 got worse." in page


# ---- several stages

CURRICULUM = """
run: {order: [edit, t2i, put]}
stages:
  never_asked: {steps: 7, expect: {kl: "> 0"}}
  edit: &stage
    algorithm: {name: diffusion_nft}
    rewards: {composition: {weight: 1.0}, <b>: {weight: 0.5}}
    data: {name: world, task: edit}
    evaluate: {also: [t2i]}
    steps: 2
    until: null
    carry: {weights: current, optimizer: false}
    anchor: stage_start
    expect: {held_out/strict: "> before + 0.1"}
  t2i:
    <<: *stage
    data: {name: world, task: t2i}
    evaluate: {also: [edit]}
    carry: {weights: ema, optimizer: true}
  put:
    <<: *stage
    data: {name: world, task: in_context}
    evaluate: {also: []}
"""


def measured(at: int, stage: str, step: int, strict: float, **others: float) -> dict[str, Any]:
    """An evaluation that also measured other stages' tasks, as held_out/strict/STAGE."""
    also = {f"held_out/strict/{name}": value for name, value in others.items()}
    return evaluation(at, strict, stage=stage, step=step) | also | {f"{name}_se": 0.04 for name in also}


LEARNED = [
    measured(0, "edit", 0, 0.25, t2i=0.5, edit=0.25),
    train(1, "edit"),
    train(2, "edit"),
    measured(2, "edit", 2, 0.5, t2i=0.375, edit=0.5),
    measured(2, "t2i", 0, 0.375, edit=0.5, t2i=0.375),
    train(3, "t2i") | {"step": 1},
    train(4, "t2i") | {"step": 2},
    measured(4, "t2i", 2, 0.375, edit=0.25, t2i=0.375),
]
STOPPED = event(4, "finished", **{"seconds/total": 30.0})


def test_each_stage_says_what_it_learned_and_took_over(tmp_path: Path) -> None:
    course = summary(run_folder(tmp_path / "run", [*LEARNED, STOPPED], CURRICULUM))["course"]
    assert [one["name"] for one in course] == ["edit", "t2i", "put"], (
        "in the order of the run, without what is left out"
    )
    edit, t2i, put = course
    assert (edit["algorithm"], edit["rewards"]) == ("diffusion_nft", ["composition", "<b>"])
    assert (edit["steps"], edit["planned"], edit["ended"], edit["why"]) == (2, 2, "steps", "all steps")
    assert edit["headline"] == "strict"
    assert (edit["held_out"]["before"], edit["held_out"]["after"], edit["held_out"]["change"]) == (0.25, 0.5, 0.25)
    assert edit["held_out"]["change_se"] == pytest.approx(0.03 * 2**0.5)
    assert edit["seconds"] == pytest.approx(2 * 1.75 + 2 * 2.0)
    assert [one["met"] for one in edit["expect"]] == [True]
    assert [one["met"] for one in t2i["expect"]] == [False]
    assert (edit["carry"], t2i["carry"]) == (None, {"weights": "ema", "optimizer": True})
    assert (put["began"], put["ended"], put["why"], put["held_out"]) == (False, None, "never began", None)
    assert [one["met"] for one in put["expect"]] == [None]


@pytest.mark.parametrize(
    ("until", "last", "ended", "why"),
    [
        ("{metric: held_out/strict, above: 0.4}", 0.5, "until", "held_out/strict above 0.4"),
        ("{metric: held_out/strict, above: 0.6}", 0.5, "early", "ended early"),  # the recipe was changed since
        ("{metric: held_out/strict, plateau: 2}", 0.2, "until", "held_out/strict rose no more"),
        ("{metric: cpu_seconds, above: 40}", 0.5, "time", "cpu_seconds above 40"),
        ("null", 0.5, "early", "ended early"),
    ],
)
def test_why_a_stage_ended_before_its_steps_were_over(
    tmp_path: Path, until: str, last: float, ended: str, why: str
) -> None:
    rows = [evaluation(0, 0.3), train(1), evaluation(1, last), event(1, "finished")]
    recipe = f"stages: {{main: {{steps: 9, until: {until}}}}}"
    (one,) = summary(run_folder(tmp_path / "run", rows, recipe))["course"]
    assert (one["ended"], one["why"], one["steps"], one["planned"]) == (ended, why, 1, 9)


@pytest.mark.parametrize(
    ("action", "more", "ending"),
    [
        ("stop", [], ("alarm", "alarm of collapse, run ended")),
        ("roll_back", [], ("alarm", "alarm of collapse, rolled back")),
        ("warn", [], ("steps", "all steps")),
        ("stop", [train(5)], ("steps", "all steps")),  # somebody let it go on
    ],
)
def test_a_stage_that_a_monitor_ended(tmp_path: Path, action: str, more: list[Any], ending: tuple[str, str]) -> None:
    alarm = event(4, "alarm", monitor="collapse", value=3.0, threshold=2.0, action=action, text="alarm, collapse: x")
    rows = [*FINISHED[:-1], alarm, *more, FINISHED[-1]]
    (one,) = summary(run_folder(tmp_path / "run", rows))["course"]
    assert (one["ended"], one["why"]) == ending


def test_a_stage_that_its_rewards_were_refused_in_has_begun(tmp_path: Path) -> None:
    alarm = event(0, "alarm", monitor="sanity", value=0.4, threshold=0.8, action="stop", text="alarm, sanity: x")
    (one,) = summary(run_folder(tmp_path / "run", [alarm]))["course"]
    assert (one["began"], one["ended"], one["steps"]) == (True, "alarm", 0)


def test_a_stage_under_way_has_not_ended(tmp_path: Path) -> None:
    edit, t2i, put = summary(run_folder(tmp_path / "run", LEARNED[:-1], CURRICULUM))["course"]
    assert (edit["ended"], t2i["ended"], put["ended"]) == ("steps", None, None)
    assert (edit["began"], t2i["began"], put["began"]) == (True, True, False)
    assert t2i["why"] == "not ended"


def test_how_each_task_fares_after_each_stage(tmp_path: Path) -> None:
    fared = summary(run_folder(tmp_path / "run", [*LEARNED, STOPPED], CURRICULUM))["tasks"]
    assert fared["score"] == {"edit": "strict", "t2i": "strict"}
    values = {row["after"]: {task: cell["value"] for task, cell in row["scores"].items()} for row in fared["rows"]}
    assert values == {
        None: {"edit": 0.25, "t2i": 0.5},
        "edit": {"edit": 0.5, "t2i": 0.375},
        "t2i": {"edit": 0.25, "t2i": 0.375},
    }
    forgotten = fared["rows"][2]["scores"]["edit"]
    assert forgotten["change"] == -0.25, "since the row above"
    assert forgotten["change_se"] == pytest.approx(0.05)  # its own evaluation's .03, and .04: 3-4-5


def test_a_kind_of_prompt_is_no_task(tmp_path: Path) -> None:
    facts = summary(run_folder(tmp_path / "run", [*LEARNED, STOPPED], CURRICULUM))
    assert set(facts["held_out"]) == {"strict", "strict/place"}, "and a task is no kind of prompt"
    assert "place" not in facts["tasks"]["score"]
    plain = CURRICULUM.replace("also: [t2i]", "also: []").replace("also: [edit]", "also: []")
    assert summary(run_folder(tmp_path / "other", [*LEARNED, STOPPED], plain))["tasks"] is None


def test_the_terminal_has_a_line_for_each_of_several_stages(tmp_path: Path) -> None:
    first, *others = sentence(summary(run_folder(tmp_path / "run", [*LEARNED, STOPPED], CURRICULUM))).splitlines()
    assert first.startswith("Held-out strict reward of t2i did not move beyond the noise: from 0.375 to 0.375")
    assert "in 30 s and 4 steps of 3 stages." in first
    rule = "expected held_out/strict > before + 0.1"
    assert others == [
        f"  edit  2 of 2 steps; strict 0.250 to 0.500 (+0.250 ± 0.042); {rule}: met; 8 s",
        f"  t2i   2 of 2 steps; strict 0.375 to 0.375 (+0.000 ± 0.042); {rule}: not met; 8 s",
        "  put   never began",
        "  after t2i: edit 0.250, t2i 0.375",
    ]


def test_the_page_of_several_stages_has_both_tables(tmp_path: Path) -> None:
    page = write(run_folder(tmp_path / "run", [*LEARNED, STOPPED], CURRICULUM)).read_text()
    assert "<h2>Stages</h2>" in page
    assert "composition, &lt;b&gt;" in page
    assert "averaged weights, optimiser&#x27;s moments" in page
    assert "never began" in page
    assert "What the recipe expects" not in page, "the stages' table has it"
    assert "<h2>Each task after each stage</h2>" in page
    assert '<td class="down">0.250<small> ± 0.040</small></td>' in page, "forgotten"
    assert "<b>0.500<small> ± 0.030</small></b>" in page, "the stage's own"
    assert "Held-out prompts of t2i" in page


def test_the_page_of_one_stage_has_neither(finished: Path) -> None:
    page = write(finished).read_text()
    assert "<h2>Stages</h2>" not in page
    assert "after each stage" not in page
    assert "What the recipe expects" in page
    assert "\n" not in sentence(summary(finished))


DAMAGES = {
    "a recipe that was cut off": ("recipe.yaml", "stages: {main: [", "recipe.yaml: cannot be read"),
    "a recipe that is a list": ("recipe.yaml", "- 1\n", "recipe.yaml: holds no keys"),
    "an order of stages that are gone": (
        *("recipe.yaml", "run: {order: [mian]}\nstages: {main: {steps: 1}}\n"),
        "run.order: the recipe has no stage named 'mian'. Did you mean 'main'",
    ),
    "an environment that was cut off": ("environment.json", '{"python": "3.1', "environment.json: cannot be read"),
    "a number among the rows": ("metrics.jsonl", "123\n", "metrics.jsonl:1: this line is no row: it needs kind"),
    "a row without its keys": ("metrics.jsonl", '{"foo": 1}\n', "metrics.jsonl:1: this line is no row"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_told_by_its_file(finished: Path, case: str) -> None:
    name, text, said = DAMAGES[case]
    (finished / name).write_text(text)
    with pytest.raises(RlkitError, match=re.escape(said)):
        summary(finished)


@pytest.mark.parametrize("name", ["recipe.yaml", "environment.json"])
def test_a_report_does_without_what_is_not_there(finished: Path, name: str) -> None:
    (finished / name).unlink(missing_ok=True)
    assert write(finished).stat().st_size > 1000
    assert "of 0" not in "\n".join(report_stages.lines(summary(finished)["course"], None))
