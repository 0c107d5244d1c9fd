"""Prompts and pairs: a pure function of seed, stage and step; files that are read or refused by line."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rlkit import recipe
from rlkit.data import FilePrompts, PairFile, PromptBatch, Prompts, WorldPrompts, read_pairs, read_prompts
from rlkit.errors import DataError, RecipeError
from rlkit.world import grammar


def held_by(split: str) -> set[str]:
    return {caption.canonical for caption in grammar.split(split)}


def file_prompts(folder: Path, lines: list[str], per_step: int = 2, held_out: list[str] | None = None) -> Prompts:
    (folder / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    if held_out is not None:
        (folder / "held_out.txt").write_text("\n".join(held_out), encoding="utf-8")
    kept = str(folder / "held_out.txt") if held_out is not None else None
    return FilePrompts(str(folder / "prompts.txt"), per_step, group=3, held_out_path=kept).open()


@pytest.fixture(params=["world", "file", "pairs"])
def prompts(request: pytest.FixtureRequest, tmp_path: Path) -> Prompts:
    """A data set of each sort."""
    if request.param == "world":
        return WorldPrompts(per_step=4, group=3).open()
    if request.param == "pairs":
        return PairFile(str(pair_file(tmp_path, 11)), per_step=4).open()
    return file_prompts(tmp_path, [f"picture {i}" for i in range(11)], per_step=4)


def draw_picture(path: Path, seed: int, size: tuple[int, int] = (6, 4)) -> None:
    """A picture of its own for each seed; size is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def pair_file(folder: Path, count: int = 2, rows: Sequence[object] | None = None) -> Path:
    """A file of pairs with their pictures, `chosen_0.png` and so on; `rows` are written in the place of its lines."""
    for i in range(count):
        draw_picture(folder / f"chosen_{i}.png", 2 * i)
        draw_picture(folder / f"rejected_{i}.png", 2 * i + 1)
    lines = [good_row(i) for i in range(count)] if rows is None else rows
    text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    return folder / "pairs.jsonl"


def good_row(i: int, **changes: object) -> dict[str, object]:
    return {"prompt": f"picture {i}", "chosen": f"chosen_{i}.png", "rejected": f"rejected_{i}.png", **changes}


# ---- every data set --------------------------------------------------------------------------------------------------


def test_a_draw_is_a_pure_function_of_seed_stage_and_step(prompts: Prompts) -> None:
    forward = [prompts.draw(0, "main", step) for step in range(6)]
    assert [prompts.draw(0, "main", step) for step in reversed(range(6))] == forward[::-1], "as a resumed run draws"
    assert any(batch != forward[0] for batch in forward)
    assert prompts.draw(1, "main", 0) != forward[0]
    assert prompts.draw(0, "next", 0) != forward[0]


def test_sizes(prompts: Prompts) -> None:
    batch = prompts.draw(0, "main", 0)
    assert isinstance(batch, PromptBatch)
    group = 2 if "chosen" in batch.prompts[0].metadata else 3
    assert (len(batch.prompts), batch.group, len(batch)) == (4, group, 4 * group)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 1)])
def test_sizes_below_1_are_refused(sizes: tuple[int, int]) -> None:
    for make in (WorldPrompts, partial(FilePrompts, "nowhere.txt"), partial(PairFile, "nowhere.jsonl")):
        with pytest.raises(ValueError, match=r"(per_step|group) must be 1 .*or more"):
            make(*sizes)


# ---- the embedded world ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_is_held_out_is_never_drawn(split: str) -> None:
    data = WorldPrompts(per_step=200, group=1, split=split)  # type: ignore[arg-type]
    drawn = {prompt.text for step in range(20) for prompt in data.draw(0, "main", step).prompts}
    meanings = {grammar.parse(text).canonical for text in drawn}
    assert len(meanings) > 60
    assert meanings <= held_by(split)
    assert not meanings & held_by("held_out")


@pytest.mark.parametrize("split", ["held_out", "validation"])
def test_the_panel_is_of_its_split(split: str) -> None:
    panel = WorldPrompts(per_step=1, group=1, held_out_split=split).held_out(100)  # type: ignore[arg-type]
    assert len(panel) == 100
    assert {grammar.parse(prompt.text).canonical for prompt in panel} <= held_by(split)
    assert {prompt.kind for prompt in panel} == set(grammar.KINDS)
    assert all(grammar.parse(prompt.text).kind == prompt.kind for prompt in panel)


def test_training_may_not_be_asked_for_the_held_out_split() -> None:
    assert "held_out" not in str(WorldPrompts.__annotations__["split"])


@pytest.mark.parametrize("kinds", [("count",), ("single", "place"), ("relation",), tuple(grammar.KINDS)])
def test_kinds_are_the_only_ones_to_train_on_and_the_panel_keeps_all(kinds: tuple[str, ...]) -> None:
    data = WorldPrompts(per_step=50, group=1, kinds=kinds)
    batch = data.draw(0, "main", 0)
    assert {prompt.kind for prompt in batch.prompts} == set(kinds)
    for count in (1, 7, 64, 300):
        panel = data.held_out(count)
        assert len(panel) == count
        assert panel == WorldPrompts(per_step=1, group=1).held_out(count)


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no kind of caption named 'counts'\. Did you mean 'count'\?"):
        WorldPrompts(per_step=1, group=1, kinds=("counts",))


def test_a_caption_has_one_id_wherever_it_is_drawn() -> None:
    data = WorldPrompts(per_step=300, group=1)
    ids: dict[str, int] = {}
    for batch in (data.draw(0, "main", 0), data.draw(1, "next", 4)):
        for prompt in batch.prompts:
            assert ids.setdefault(prompt.text, prompt.id) == prompt.id
    assert len(set(ids.values())) == len(ids)
    assert data.texts() == ()


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "per_step"), [(6, 2), (7, 3), (3, 5), (1, 2)])
def test_every_prompt_comes_once_an_epoch(tmp_path: Path, size: int, per_step: int) -> None:
    data = file_prompts(tmp_path, [f"picture {i}" for i in range(size)], per_step)
    drawn = [prompt.text for step in range(size * 2) for prompt in data.draw(3, "main", step).prompts]
    epochs = [tuple(drawn[start : start + size]) for start in range(0, len(drawn), size)]
    assert all(set(Counter(epoch).values()) == {1} for epoch in epochs)
    assert len(epochs) == 2 * per_step
    assert (len(set(epochs)) > 1) == (size > 1), "each epoch has an order of its own"


def test_text_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("  a red circle \r\n\r\n\nun café\n".encode())
    first, second = read_prompts(tmp_path / "a.txt")
    assert (first.text, second.text) == ("a red circle", "un café")
    assert (first.id, second.id) == (0, 1)


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "a red circle", "target": "OK", "n": 3}, {"text": "two crosses"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_prompts(tmp_path / "a.jsonl")
    assert first.text == "a red circle"
    assert first.metadata == {"target": "OK", "n": 3}
    assert (second.text, second.metadata) == ("two crosses", {})


def test_marks_and_separators_that_editors_and_json_leave(tmp_path: Path) -> None:
    # A byte order mark would hide the brace, and a text may hold what splitlines() takes for the end of a line.
    row = json.dumps({"prompt": "one\u2028two\x85three"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"\ufeff{row}\n{row}\n", encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(tmp_path / "a.jsonl")] == ["one\u2028two\x85three"] * 2


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", r"a\.txt: no prompts in this file.* Write one prompt a line\."),
        ("\n  \n", "no prompts in this file"),
        ('a cat\n\n{"prompt": "a", }\n', r"a\.txt:3: not a JSON object: "),
        ('{"caption": "a cat"}', r'a\.txt:1: no "prompt" in this line.* Write {"prompt": '),
        ('{"prompt": 7}', r'a\.txt:1: no "prompt"'),
        ('a cat\n{"prompt": "  "}', r'a\.txt:2: no "prompt"'),
    ],
)
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(DataError, match=text):
        read_prompts(tmp_path / "a.txt")


def test_files_that_are_missing_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.txt: cannot read prompts: No such file"):
        FilePrompts(str(tmp_path / "a.txt"), 1, 1).open()
    with pytest.raises(DataError, match="cannot read prompts: Is a directory"):
        read_prompts(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match=r"b\.txt: not a UTF-8 text file"):
        read_prompts(tmp_path / "b.txt")


def test_held_out_prompts_of_a_file(tmp_path: Path) -> None:
    assert file_prompts(tmp_path, ["a"]).held_out(5) == ()
    data = file_prompts(tmp_path, ["a", "b", "a"], held_out=["x", "y", "b"])
    assert [prompt.text for prompt in data.held_out(5)] == ["x", "y", "b", "x", "y"]
    assert data.texts() == ("a", "b", "x", "y")


def test_a_missing_held_out_file_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat")
    data = FilePrompts(str(tmp_path / "a.txt"), 1, 1)
    with pytest.raises(DataError, match=r"none\.txt: cannot read prompts"):
        replace(data, held_out_path=str(tmp_path / "none.txt")).open()


# ---- pairs -----------------------------------------------------------------------------------------------------------


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


# ---- prompts with pictures -------------------------------------------------------------------------------------------


def picture_file(folder: Path, name: str, size: tuple[int, int] = (4, 3), level: int = 255) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 0, 0)).save(folder / name)
    return name


def prompts_file(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "edits.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def test_a_line_may_name_its_text_its_source_and_its_references(tmp_path: Path) -> None:
    source, other = picture_file(tmp_path, "sub/a.png"), picture_file(tmp_path, "b.png", (2, 2), 51)
    row = {"prompt": "make it blue", "source": source, "references": [other], "target_text": "OPEN", "task": "edit"}
    file = prompts_file(tmp_path, row, {"prompt": "plain", "target_text": ["A", "B"]})
    data = FilePrompts(str(file), per_step=2, group=1, held_out_path=str(file))
    assert data.gives == ("prompt", "metadata", "target_text", "source", "references")
    drawn = sorted(data.open().draw(0, "main", 0).prompts, key=lambda prompt: prompt.id)
    for edit in (drawn[0], data.open().held_out(1)[0]):
        assert edit.target_text == ("OPEN",)
        assert edit.metadata == {"task": "edit"}
        assert edit.source is not None
        assert edit.source.shape == (3, 3, 4)
        assert edit.source[0].eq(1).all()
        assert edit.source[1:].eq(0).all()
        assert [tuple(one.shape) for one in edit.references] == [(3, 2, 2)]
        assert torch.equal(edit.references[0][0] * 255, torch.full((2, 2), 51.0))
    assert (drawn[1].target_text, drawn[1].source, drawn[1].references) == (("A", "B"), None, ())


def test_what_a_file_gives_is_read_from_its_first_line_and_an_absent_one_denies_nothing(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    assert FilePrompts(str(file), 1, 1).gives == ("prompt", "metadata", "target_text", "source", "references")
    file.write_text("a red circle\n")
    assert FilePrompts(str(file), 1, 1).gives == ("prompt", "metadata")


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a picture that is not there": ({"source": "none.png"}, "the source picture .*none.png does not exist"),
    "a source that is no path": ({"source": 7}, "'source' must be the path of a picture, not 7"),
    "a reference that is not there": ({"references": ["none.png"]}, r"the references\[0\] picture .* does not exist"),
    "references that are no list": ({"references": "a.png"}, "'references' must be a list of picture files"),
    "a text that is none": ({"target_text": [1]}, "'target_text' must be a text or a list of texts"),
    "no text at all": ({"target_text": {"a": 1}}, "'target_text' must be a text or a list of texts"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_pictures_and_texts_that_cannot_be_used(case: str, tmp_path: Path) -> None:
    columns, words = BROKEN[case]
    with pytest.raises(DataError, match=words) as caught:
        FilePrompts(str(prompts_file(tmp_path, {"prompt": "x", **columns})), 1, 1).open()
    assert caught.value.where.endswith("edits.jsonl:1")


def test_a_picture_that_is_cut_off_is_found_when_it_is_drawn(tmp_path: Path) -> None:
    name = picture_file(tmp_path, "a.png", (64, 64))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    data = FilePrompts(str(prompts_file(tmp_path, {"prompt": "x", "source": name})), 1, 1).open()
    with pytest.raises(DataError, match="cannot read the source picture"):
        data.draw(0, "main", 0)
