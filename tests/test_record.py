"""What a step and an evaluation report: means, standard errors, kinds, and a sheet that hides no missing score."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rlkit.mirrors.content import table
from rlkit.record import COLUMNS, SHEET, describe_held_out, describe_scores, set_aside, write_sheet
from rlkit.types import Samples, Scores, Tokens

MakeSamples = Callable[..., Samples]
NAN = math.nan


def here(values: Tensor) -> Tensor:
    """The gathering of one process."""
    return values


def scores_of(raw: list[list[float]], weights: list[float], **components: list[float]) -> Scores:
    values = torch.tensor(raw)
    names = tuple(f"r{i}" for i in range(values.shape[1]))
    named = {name.replace("__", "/"): torch.tensor(column) for name, column in components.items()}
    return Scores(names, values, torch.isfinite(values), torch.tensor(weights), named)


# ---- a training step -------------------------------------------------------------------------------------------------


def test_a_step_by_hand(samples_of: MakeSamples) -> None:
    samples = samples_of(["a", "a", "b", "b"])
    scores = scores_of([[0.0, 4.0], [1.0, 4.0], [0.5, 0.0], [0.5, 0.0]], [1.0, 0.5], r0__part=[1.0, NAN, 0.0, 0.5])
    row = describe_scores(samples, scores, here)
    total = [2.0, 3.0, 0.5, 0.5]
    assert row["reward/mean"] == pytest.approx(np.mean(total))
    assert row["reward/std"] == pytest.approx(np.std(total))
    assert row["reward/group_std"] == pytest.approx((0.5 + 0) / 2)
    assert row["zero_std"] == 0.5
    assert (row["r0/mean"], row["r1/mean"]) == (pytest.approx(0.5), pytest.approx(2.0))
    assert row["r0/part"] == pytest.approx(0.5), "over those that have it"
    assert row["unscored"] == 0


def test_what_was_not_scored_is_no_0(samples_of: MakeSamples) -> None:
    row = describe_scores(samples_of(["a"] * 4, group=4), scores_of([[1.0], [NAN], [0.5], [NAN]], [1.0]), here)
    assert row["reward/mean"] == row["r0/mean"] == pytest.approx(0.75)
    assert row["reward/std"] == row["reward/group_std"] == pytest.approx(0.25)
    assert row["unscored"] == 0.5


def test_a_step_without_any_score(samples_of: MakeSamples) -> None:
    row = describe_scores(samples_of(["a", "a"]), scores_of([[NAN], [NAN]], [1.0]), here)
    assert math.isnan(row["reward/mean"])
    assert math.isnan(row["reward/std"])
    assert row["unscored"] == 1


def test_a_step_counts_the_samples_of_all_processes(samples_of: MakeSamples) -> None:
    whole = samples_of(["a", "a", "b", "b"])
    raw = torch.tensor([[0.0], [1.0], [0.5], [0.1]])
    part = Scores(("r0",), raw[:2], torch.ones(2, 1, dtype=torch.bool), torch.ones(1))
    rest = {torch.int64: whole.group[2:], torch.bool: torch.ones(2, dtype=torch.bool), torch.float32: raw[2:, 0]}

    def gather(values: Tensor) -> Tensor:
        # The other process has the second half. It has no components, so no letters of their names either.
        return values if not len(values) else torch.cat([values, rest[values.dtype]])

    row = describe_scores(whole.select(torch.arange(2)), part, gather)
    everything = describe_scores(whole, scores_of(raw.tolist(), [1.0]), here)
    assert row == pytest.approx(everything)


# ---- an evaluation ---------------------------------------------------------------------------------------------------

KINDS = ["one", "two words", "one", "two words", ""]


def test_held_out_means_errors_and_kinds(samples_of: MakeSamples) -> None:
    samples = samples_of(list("abcde"), group=1, kinds=KINDS)
    strict, graded = [1.0, 0.0, 1.0, 1.0, 0.0], [1.0, 0.25, 1.0, 1.0, NAN]
    scores = scores_of([[1.0], [0.1], [1.0], [1.0], [NAN]], [2.0], r0__strict=strict, r0__graded=graded)
    row = describe_held_out(samples, scores, here)
    assert row["held_out/strict"] == pytest.approx(0.6)
    assert row["held_out/strict_se"] == pytest.approx(np.std(strict) / 5**0.5)
    assert row["held_out/graded"] == pytest.approx(np.mean(graded[:4]))
    assert row["held_out/graded_se"] == pytest.approx(np.std(graded[:4]) / 4**0.5)
    assert row["held_out/reward"] == pytest.approx(2 * (3.1 / 4)), "the masked one is left out"
    assert row["held_out/strict/one"] == 1
    assert row["held_out/strict/two words"] == 0.5
    assert row["held_out/reward/two words"] == pytest.approx(1.1)
    assert {name.rsplit("/", 1)[1] for name in row if name.count("/") == 2} == {"one", "two words"}


def test_one_name_in_two_rewards_keeps_the_rewards_names(samples_of: MakeSamples) -> None:
    scores = scores_of([[1.0, 1.0]] * 2, [1.0, 1.0], r0__a=[1.0, 1.0], r1__a=[0.0, 0.0], r1__b=[0.5, 0.5])
    row = describe_held_out(samples_of(["x", "y"]), scores, here)
    assert (row["held_out/r0/a"], row["held_out/r1/a"], row["held_out/b"]) == (1.0, 0.0, 0.5)
    assert "held_out/a" not in row


def test_an_evaluation_without_any_score(samples_of: MakeSamples) -> None:
    row = describe_held_out(samples_of(["x", "y"]), scores_of([[NAN], [NAN]], [1.0]), here)
    assert math.isnan(row["held_out/reward"])
    assert math.isnan(row["held_out/reward_se"])


# ---- the sheet -------------------------------------------------------------------------------------------------------


def test_the_sheet_shows_the_first_pictures_where_its_json_says(samples_of: MakeSamples, tmp_path: Path) -> None:
    n = SHEET + 3
    media = (torch.arange(n) * 9 / 255)[:, None, None, None].expand(n, 3, 4, 6).contiguous()
    samples = samples_of([f"picture {i}" for i in range(n)], group=1, media=media)
    values = [[i / n] for i in range(n)]
    values[2] = [NAN]
    scores = scores_of(values, [2.0], r0__strict=[float(i % 2) for i in range(n)])
    row = {"kind": "evaluation", "stage": "main", "step": 3, "at": 43, "held_out/strict": 0.5}
    file = write_sheet(tmp_path / "samples", row, samples, scores)
    assert file == tmp_path / "samples" / "000043.png"

    described = json.loads(file.with_suffix(".json").read_text())
    assert (described["stage"], described["step"], described["at"]) == ("main", 3, 43)
    assert (described["width"], described["height"], described["given"]) == (6, 4, 0)
    assert (described["columns"], len(described["items"])) == (COLUMNS, SHEET)
    pixels = np.asarray(Image.open(file))
    assert pixels.shape == (SHEET // COLUMNS * 4, COLUMNS * 6, 3)
    for i, item in enumerate(described["items"]):
        top, left = i // COLUMNS * 4, i % COLUMNS * 6
        assert (pixels[top : top + 4, left : left + 6] == i * 9).all()
        assert (item["prompt"], item["seed"], item["strict"]) == (f"picture {i}", i, i % 2)
        assert item["reward"] == (None if i == 2 else pytest.approx(2 * i / n)), "an unscored picture has no reward"


def left(folder: Path) -> dict[str, str]:
    """The stage of each sheet by its name, once its picture is there too."""
    found = {file.stem: json.loads(file.read_text())["stage"] for file in sorted(folder.glob("*.json"))}
    assert {file.stem for file in folder.glob("*.png")} == set(found)
    return found


@pytest.mark.parametrize(
    ("second", "name"),
    [("second", "-second"), ("v1.5 a/b", "-v1.5_a_b"), ("alarm", "-alarm_"), ("x-alarm", "-x-alarm_")],
)
def test_the_opening_of_a_stage_leaves_the_closing_sheet_of_the_one_before(
    samples_of: MakeSamples, tmp_path: Path, second: str, name: str
) -> None:
    samples, scores = samples_of(["x"], group=1), scores_of([[1.0]], [1.0])
    closing = {"stage": "first", "step": 60, "at": 60}
    for row in (closing, closing, {"stage": second, "step": 0, "at": 60}, {"stage": second, "step": 0, "at": 60}):
        file = write_sheet(tmp_path, row, samples, scores)  # an evaluation made again replaces its own
    assert left(tmp_path) == {"000060": "first", f"000060{name}": second}
    assert file.name == f"000060{name}.png"
    assert table(file).at == 60, "mirrors find what is beside it"


def test_what_was_set_aside_stays_beside_what_comes_in_its_place(samples_of: MakeSamples, tmp_path: Path) -> None:
    samples, scores = samples_of(["x"], group=1), scores_of([[1.0]], [1.0])
    for row in ({"stage": "first", "step": 4, "at": 4}, {"stage": "alarm", "step": 0, "at": 4}):
        write_sheet(tmp_path, row, samples, scores)
        set_aside(tmp_path, row)
        write_sheet(tmp_path, row, samples, scores)
    names = {"000004": "first", "000004-alarm": "first", "000004-alarm_": "alarm", "000004-alarm_-alarm": "alarm"}
    assert left(tmp_path) == names


def test_without_a_sheet_there_is_nothing_to_set_aside(tmp_path: Path) -> None:
    set_aside(tmp_path, {"stage": "main", "at": 4})
    assert list(tmp_path.iterdir()) == []


def test_what_a_prompt_came_with_stands_beside_its_picture(samples_of: MakeSamples, tmp_path: Path) -> None:
    media = torch.full((2, 3, 4, 4), 0.6)
    samples = samples_of(["edit", "put"], group=1, media=media)
    flat = [torch.full((3, side, side), value) for side, value in ((4, 0.2), (8, 0.4))]
    first, second = samples.prompts
    samples = replace(samples, prompts=(replace(first, source=flat[0]), replace(second, references=tuple(flat))))
    file = write_sheet(tmp_path, {"stage": "main", "step": 0, "at": 0}, samples, scores_of([[1.0], [0.0]], [1.0]))
    known = json.loads(file.with_suffix(".json").read_text())
    assert (known["width"], known["height"], known["given"], known["drawn"]) == (4, 4, 2, True)
    pixels = np.asarray(Image.open(file))
    assert pixels.shape == (4, COLUMNS * 12, 3)
    assert [int(pixels[0, 4 * cell, 0]) for cell in range(6)] == [51, 0, 153, 51, 102, 153]


def test_a_sheet_of_few_pictures(samples_of: MakeSamples, tmp_path: Path) -> None:
    scores = scores_of([[1.0]], [1.0])
    file = write_sheet(tmp_path, {"stage": "main", "step": 0, "at": 0}, samples_of(["x"], group=1), scores)
    assert Image.open(file).size == (COLUMNS * 4, 4)
    assert len(json.loads(file.with_suffix(".json").read_text())["items"]) == 1


def test_several_rewards_have_columns_of_their_own_and_one_alone_is_the_reward(samples_of: MakeSamples) -> None:
    samples = samples_of(["x", "y"])
    both = describe_held_out(samples, scores_of([[1.0, 0.2], [0.0, 0.4]], [1.0, 0.0]), here)
    assert (both["held_out/r0"], both["held_out/r1"]) == (pytest.approx(0.5), pytest.approx(0.3))
    assert both["held_out/reward"] == pytest.approx(0.5), "the one of weight 0 is only watched"
    one = describe_held_out(samples, scores_of([[1.0], [0.0]], [1.0]), here)
    assert set(one) == {"held_out/reward", "held_out/reward_se"}


def test_answers_are_counted_in_tokens_over_all_samples(samples_of: MakeSamples) -> None:
    """Not weighted as a loss weights them: long answers would count for more, and masked ones not at all."""
    samples = samples_of(["x", "y"], group=1)
    decided = torch.tensor([[False, True, True, True], [False, True, False, False]])
    numbers = torch.zeros(2, 4)
    tokens = Tokens(
        numbers.long(), torch.tensor([4, 2]), torch.tensor([1, 1]), decided, numbers, torch.tensor([True, False]), 1.0
    )
    row = describe_scores(replace(samples, tokens=tokens), scores_of([[1.0], [0.0]], [1.0]), here)
    assert (row["tokens/length"], row["tokens/cut"]) == (2.0, 0.5)


def test_what_was_written_is_on_the_sheet_with_what_it_is_about(samples_of: MakeSamples, tmp_path: Path) -> None:
    samples = samples_of(["", ""], group=1, media=torch.zeros(2, 0))
    pictures = [torch.full((3, 4, 4), value) for value in (0.2, 0.6)]
    prompts = tuple(replace(one, source=picture) for one, picture in zip(samples.prompts, pictures, strict=True))
    samples = replace(samples, prompts=prompts, texts=("a dark one", "a light one"))
    file = write_sheet(tmp_path, {"stage": "main", "step": 0, "at": 0}, samples, scores_of([[1.0], [0.0]], [1.0]))
    known = json.loads(file.with_suffix(".json").read_text())
    assert [item["text"] for item in known["items"]] == ["a dark one", "a light one"]
    assert (known["given"], known["drawn"]) == (0, False)
    pixels = np.asarray(Image.open(file))
    assert (int(pixels[0, 0, 0]), int(pixels[0, 4, 0])) == (51, 153)
