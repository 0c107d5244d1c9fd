"""Pairs of pictures: read or refused by line, from files and from saved data sets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from painting import draw_picture, good_row, pair_file
from PIL import Image

from rlkit import recipe
from rlkit.data.prompts import PairFile, WorldPrompts, read_pairs
from rlkit.errors import DataError, RecipeError


def test_pairs_carry_their_pictures_and_the_other_keys(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    draw_picture(tmp_path / "deeper" / "a.png", 50)
    absolute = str(tmp_path / "chosen_1.png")
    rows = [good_row(0, chosen="deeper/a.png", judge="me", chosen_by=3), good_row(1, chosen=absolute)]
    first, second = read_pairs(pair_file(tmp_path, rows=rows))
    assert (first.id, first.text, second.id, second.text) == (0, "picture 0", 1, "picture 1")
    assert set(first.metadata) == {"chosen", "rejected", "judge", "chosen_by"}
    for prompt, half, seed in ((first, "chosen", 50), (first, "rejected", 1), (second, "chosen", 2)):
        pixels = prompt.metadata[half].read()
        assert (pixels.shape, pixels.dtype) == ((4, 6, 3), np.uint8)
        assert np.array_equal(pixels, np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8))


def test_only_where_a_picture_is_stays_in_memory(tmp_path: Path) -> None:
    (pair,) = read_pairs(pair_file(tmp_path, 1))
    before = pair.metadata["chosen"].read()
    draw_picture(tmp_path / "chosen_0.png", 99)
    assert not np.array_equal(pair.metadata["chosen"].read(), before)
    (tmp_path / "chosen_0.png").unlink()
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: the chosen picture .*chosen_0\.png does not exist"):
        pair.metadata["chosen"].read()


def test_a_picture_is_turned_as_the_camera_says_and_made_rgb(tmp_path: Path) -> None:
    path = pair_file(tmp_path, 1, [good_row(0, chosen="turned.png", rejected="grey.png")])
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    left = np.zeros((4, 6, 3), np.uint8)
    left[:, :3] = 255
    Image.fromarray(left).save(tmp_path / "turned.png", exif=exif)
    Image.new("L", (4, 6), 7).save(tmp_path / "grey.png")
    (pair,) = read_pairs(path)
    turned = pair.metadata["chosen"].read()
    assert turned.shape == (6, 4, 3)
    assert turned[:3].min() == 255
    assert turned[3:].max() == 0
    assert pair.metadata["rejected"].read().tolist() == [[[7] * 3] * 4] * 6


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], r"pairs\.jsonl: no pairs in this file.* Write one {"),
        (["", "  "], "no pairs in this file"),
        ([good_row(0), "", '{"prompt": "a", }'], r"pairs\.jsonl:3: not a JSON object: "),
        ([good_row(0), "a red circle"], r"pairs\.jsonl:2: not a JSON object: "),
        (["[1, 2]"], r"pairs\.jsonl:1: not a JSON object: \[1, 2\]"),
        (
            [{"prompt": "a", "choosen": "chosen_0.png", "rejected": "rejected_0.png"}],
            r"pairs\.jsonl:1: no 'chosen' here, but 'choosen'\. Did you mean 'chosen'\? A pair is {",
        ),
        ([good_row(0), {"prompt": "a", "chosen": "chosen_1.png"}], r"pairs\.jsonl:2: no 'rejected' here\. A pair is {"),
        ([good_row(0, prompt=" ")], r"pairs\.jsonl:1: 'prompt' must be a text, not ' '"),
        ([good_row(0, chosen=3)], r"pairs\.jsonl:1: 'chosen' must be the path of a picture, not 3"),
        (
            [good_row(0), good_row(1, rejected="none.png")],
            r"pairs\.jsonl:2: the rejected picture .*none\.png does not exist\. Paths begin in ",
        ),
        (
            [good_row(0), good_row(1, rejected="./chosen_1.png")],
            r"pairs\.jsonl:2: chosen and rejected are the same file, .*chosen_1\.png",
        ),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_pairs_that_cannot_be_used_are_named_by_file_and_line(
    tmp_path: Path, rows: list[object], text: str, verify: bool
) -> None:
    path = pair_file(tmp_path, rows=rows)
    with pytest.raises(DataError, match=text):
        PairFile(str(path), 1, verify=verify).open()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("copy", r"pairs\.jsonl:2: chosen and rejected have the same pixels\. Leave this pair out"),
        ("size", r"pairs\.jsonl:2: the rejected picture is 8x4, but those from .*pairs\.jsonl:1 on are 6x4\. Give all"),
        ("cut", r"pairs\.jsonl:2: cannot read the rejected picture .*rejected_1\.png: "),
        ("text", r"pairs\.jsonl:2: cannot read the rejected picture .*rejected_1\.png: cannot identify"),
    ],
)
def test_what_only_the_pixels_tell_is_found_when_the_data_is_opened(tmp_path: Path, change: str, text: str) -> None:
    path, place = pair_file(tmp_path), tmp_path / "rejected_1.png"
    if change == "copy":  # the same pixels in other bytes
        Image.open(tmp_path / "chosen_1.png").save(place, compress_level=0)
        assert place.read_bytes() != (tmp_path / "chosen_1.png").read_bytes()
    elif change == "size":
        draw_picture(place, 3, size=(8, 4))
    else:
        place.write_bytes(place.read_bytes()[:60] if change == "cut" else b"no picture at all")
    with pytest.raises(DataError, match=text):
        PairFile(str(path), 1).open()
    assert len(PairFile(str(path), 1, verify=False).open().draw(0, "main", 0).prompts) == 1


def test_a_link_to_the_chosen_picture_is_the_same_file(tmp_path: Path) -> None:
    path = pair_file(tmp_path, 1)
    (tmp_path / "rejected_0.png").unlink()
    (tmp_path / "rejected_0.png").symlink_to(tmp_path / "chosen_0.png")
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: chosen and rejected are the same file"):
        PairFile(str(path), 1, verify=False).open()


def test_files_of_pairs_that_are_missing_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot read pairs: No such file"):
        PairFile(str(tmp_path / "none.jsonl"), 1).open()
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match=r"b\.jsonl: not a UTF-8 text file"):
        PairFile(str(tmp_path / "b.jsonl"), 1).open()
    with pytest.raises(DataError, match=r"not a folder that datasets\.save_to_disk wrote"):
        PairFile(str(tmp_path), 1).open()


@pytest.mark.parametrize("stored", ["pictures", "paths"])
def test_pairs_of_a_saved_dataset(tmp_path: Path, stored: str) -> None:
    import datasets

    folder = tmp_path / "saved"
    pair_file(tmp_path, 3)
    columns: dict[str, list[str]] = {"prompt": [f"picture {i}" for i in range(3)]}
    for half in ("chosen", "rejected"):
        columns[half] = [str(tmp_path / f"{half}_{i}.png") for i in range(3)]
    table = datasets.Dataset.from_dict(columns)
    if stored == "pictures":
        table = table.cast_column("chosen", datasets.Image()).cast_column("rejected", datasets.Image())
        table = table.map(lambda row: row)  # the bytes themselves go into the folder
    table.save_to_disk(str(folder))
    pairs = read_pairs(folder)
    assert [(pair.id, pair.text) for pair in pairs] == [(i, f"picture {i}") for i in range(3)]
    for i, pair in enumerate(pairs):
        for k, half in enumerate(("chosen", "rejected")):
            expected = np.random.default_rng(2 * i + k).integers(0, 256, (4, 6, 3), dtype=np.uint8)
            assert np.array_equal(pair.metadata[half].read(), expected)

    renamed = table.rename_column("rejected", "rejectd")
    renamed.save_to_disk(str(tmp_path / "renamed"))
    with pytest.raises(DataError, match=r"renamed: no 'rejected' here, but 'rejectd'\. Did you mean 'rejected'\?"):
        read_pairs(tmp_path / "renamed")
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match=r"splits: holds several splits: train\. Give one of them, .*splits/train"):
        read_pairs(tmp_path / "splits")
    twice = datasets.concatenate_datasets([table, table.select([0]).map(lambda row: {"rejected": row["chosen"]})])
    twice.save_to_disk(str(tmp_path / "twice"))
    with pytest.raises(DataError, match=r"twice row 3: chosen and rejected "):
        read_pairs(tmp_path / "twice")


def test_held_out_prompts_of_pairs(tmp_path: Path) -> None:
    path = str(pair_file(tmp_path))
    (tmp_path / "held_out.txt").write_text("x\ny")
    assert PairFile(path, 1).open().held_out(3) == ()
    from_file = PairFile(path, 1, held_out_path=str(tmp_path / "held_out.txt")).open()
    assert [prompt.text for prompt in from_file.held_out(3)] == ["x", "y", "x"]
    assert from_file.texts() == ("picture 0", "picture 1", "x", "y")
    from_world = PairFile(path, 1, held_out_split="validation").open()
    assert from_world.held_out(40) == WorldPrompts(1, 1, held_out_split="validation").held_out(40)
    assert PairFile(path, 1, held_out_split="held_out").open().held_out(40) == WorldPrompts(1, 1).held_out(40)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"group": 4}, "group must be 2, not 4: a pair is a group of two pictures"),
        ({"held_out_path": "a.txt", "held_out_split": "validation"}, "exclude each other"),
    ],
)
def test_pair_options_that_do_not_fit_are_refused_by_check(options: Mapping[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PairFile("a.jsonl", 1, **options)
    words = [f"stages.main.data.{key}={value}" for key, value in {"name": "pairs", "path": "a", "per_step": 8}.items()]
    words += [f"stages.main.data.{key}={value}" for key, value in options.items()]
    with pytest.raises(RecipeError, match=rf"command line: stages\.main\.data.*{text}"):
        recipe.read("quickstart", words)


def test_pairs_whose_pictures_are_broken_may_be_left_out(tmp_path: Path) -> None:
    path = pair_file(tmp_path, 10)
    (tmp_path / "chosen_3.png").unlink()
    (tmp_path / "rejected_5.png").write_bytes(b"no picture")
    data = PairFile(str(path), 8, max_broken=0.2).open()
    assert sorted(prompt.id for prompt in data.draw(0, "main", 0).prompts) == [0, 1, 2, 4, 6, 7, 8, 9]
    with pytest.raises(DataError, match=r"too many broken pictures: 2 of 10 .*:4: the chosen.*:6: cannot read the rej"):
        PairFile(str(path), 8, max_broken=0.1).open()
    with pytest.raises(DataError, match=r"pairs\.jsonl:4: the chosen picture .* does not exist"):
        PairFile(str(path), 8).open()
    Image.open(tmp_path / "chosen_1.png").save(tmp_path / "rejected_1.png")
    with pytest.raises(DataError, match="same pixels"):  # a mistake, and no broken picture
        PairFile(str(path), 8, max_broken=0.5).open()
