"""Prompts and pairs: a pure function of seed, stage and step; files that are read or refused by line."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from painting import draw_picture, pair_file
from PIL import Image

from rlkit import recipe
from rlkit.data.prompts import (
    DATA,
    FilePrompts,
    HubPrompts,
    ImageFolder,
    Mixture,
    PairFile,
    Picture,
    PromptBatch,
    Prompts,
    WorldPrompts,
)
from rlkit.data.tables import read_prompts
from rlkit.errors import DataError, RecipeError
from rlkit.types import Prompt
from rlkit.world import grammar, obeys


def held_by(split: str) -> set[str]:
    return {caption.canonical for caption in grammar.split(split)}


def file_prompts(folder: Path, lines: list[str], per_step: int = 2, held_out: list[str] | None = None) -> Prompts:
    (folder / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    if held_out is not None:
        (folder / "held_out.txt").write_text("\n".join(held_out), encoding="utf-8")
    kept = str(folder / "held_out.txt") if held_out is not None else None
    return FilePrompts(str(folder / "prompts.txt"), per_step, group=3, held_out_path=kept).open()


@pytest.fixture(params=["world", "file", "sized", "images", "hub", "mixture", "pairs"])
def prompts(request: pytest.FixtureRequest, tmp_path: Path) -> Prompts:
    """A data set of each sort."""
    if request.param == "world":
        return WorldPrompts(per_step=4, group=3).open()
    if request.param == "pairs":
        return PairFile(str(pair_file(tmp_path, 11)), per_step=4).open()
    if request.param == "images":
        for i in range(11):
            draw_picture(tmp_path / f"{i}.png", i)
        return ImageFolder(str(tmp_path), per_step=4, group=3, text="repeat this picture").open()
    if request.param == "hub":
        table(tmp_path, [f"picture {i}" for i in range(11)])
        return HubPrompts(str(tmp_path / "saved"), per_step=4, group=3, held_out_share=0.2).open()
    lines = [f"picture {i}" for i in range(11)]
    if request.param == "mixture":
        file_prompts(tmp_path, lines)
        sources = {"lines": {"name": "prompts", "path": str(tmp_path / "prompts.txt")}, "world": {"name": "world"}}
        return Mixture(sources, per_step=4, group=3).open()
    if request.param == "sized":
        file_prompts(tmp_path, lines)
        sizes = ((8, 8), (8, 16))
        return FilePrompts(str(tmp_path / "prompts.txt"), per_step=4, group=3, sizes=sizes).open()
    return file_prompts(tmp_path, lines, per_step=4)


def table(folder: Path, texts: list[str]) -> None:
    import datasets

    datasets.Dataset.from_dict({"prompt": texts}).save_to_disk(str(folder / "saved"))


def texts_of(path: Path) -> list[Prompt]:
    return [row.prompt for row in read_prompts(path)]


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


def test_everything_is_what_may_be_drawn_and_what_is_held_out(prompts: Prompts) -> None:
    everything = prompts.everything()
    drawn = {prompt.text for step in range(12) for prompt in prompts.draw(0, "main", step).prompts}
    if everything is None:
        assert any(text.split()[0] != "picture" for text in drawn), "only the world has no end"
        return
    held_out = {prompt.text for prompt in prompts.held_out(40)}
    assert {prompt.text for prompt in everything} == drawn | held_out == set(prompts.texts())
    assert len(everything) == 11
    assert not drawn & held_out


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 1)])
def test_sizes_below_1_are_refused(sizes: tuple[int, int]) -> None:
    named = [partial(DATA[name], "nowhere") for name in ("prompts", "images", "hub", "pairs")]
    for make in (WorldPrompts, partial(Mixture, {"a": {"name": "world"}}), *named):
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
    first, second = texts_of(tmp_path / "a.txt")
    assert (first.text, second.text) == ("a red circle", "un café")
    assert (first.id, second.id) == (0, 1)


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "a red circle", "target": "OK", "n": 3}, {"text": "two crosses"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = texts_of(tmp_path / "a.jsonl")
    assert first.text == "a red circle"
    assert first.metadata == {"target": "OK", "n": 3}
    assert (second.text, second.metadata) == ("two crosses", {})


def test_marks_and_separators_that_editors_and_json_leave(tmp_path: Path) -> None:
    # A byte order mark would hide the brace, and a text may hold what splitlines() takes for the end of a line.
    row = json.dumps({"prompt": "one\u2028two\x85three"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"\ufeff{row}\n{row}\n", encoding="utf-8")
    assert [prompt.text for prompt in texts_of(tmp_path / "a.jsonl")] == ["one\u2028two\x85three"] * 2


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


def test_none_that_are_held_out_may_be_asked_for(tmp_path: Path) -> None:
    """Then none of them is broken."""
    (tmp_path / "a.txt").write_text("a red circle\n")
    files = {"path": str(tmp_path / "a.txt"), "held_out_path": str(tmp_path / "a.txt")}
    assert FilePrompts(per_step=1, group=2, **files).open().held_out(0) == ()
    assert len(FilePrompts(per_step=1, group=2, **files).open().held_out(2)) == 2


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


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (partial(FilePrompts, held_out_path="a", held_out_share=0.1), "held_out_share and held_out_path exclude"),
        (partial(HubPrompts, held_out_split="test", held_out_share=0.1), "held_out_share and held_out_split exclude"),
        (partial(HubPrompts, held_out_split="train"), "held_out_split must not be the split to train on, 'train'"),
        (partial(FilePrompts, columns={"promt": "a"}), "no name 'promt'. Did you mean 'prompt'?"),
        (partial(HubPrompts, columns={"promt": "a"}), "no name 'promt'. Did you mean 'prompt'?"),
        (partial(FilePrompts, max_broken=1.0), "max_broken must be 0 or more and below 1, not 1.0"),
        (partial(PairFile, max_broken=0.1, verify=False), "max_broken needs verify: true here"),
        (partial(PairFile, max_broken=1.5), "max_broken must be 0 or more and below 1, not 1.5"),
        (partial(HubPrompts, sizes=((8, 0),)), r"sizes must be \[height, width\]"),
        (partial(ImageFolder, held_out_salt="a"), "give held_out_share too"),
    ],
)
def test_options_of_lists_that_do_not_fit(make: partial[Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make("a", 1) if make.func is PairFile else make("a", 1, 1)


def test_a_recipe_says_sizes_columns_and_shares_and_its_resolved_form_says_the_same_again() -> None:
    words = "{path: a.jsonl, per_step: 12, group: 16, columns: {prompt: caption, source: null}, held_out_share: 0.05"
    more = "held_out_salt: b, sizes: [[512, 512], [384, 640]], max_broken: 0.01, verify: true}"
    for name in ("prompts", "hub"):
        said = f"stages.main.data={words}, {more[:-1]}, name: {name}}}"
        setup = recipe.read("quickstart", [said])
        data, plain = setup.stages[0].data, dict(setup.recipe["stages"]["main"]["data"])
        assert data.sizes == ((512, 512), (384, 640))
        assert data.columns == {"prompt": "caption", "source": None}
        assert plain["sizes"] == [[512, 512], [384, 640]]
        assert plain.pop("name") == name
        assert DATA[name](**plain | {"sizes": data.sizes}) == data
    with pytest.raises(RecipeError, match=r"stages\.main\.data.*sizes\[0\] must be a list of 2|sizes\[0\]"):
        recipe.read("quickstart", ["stages.main.data={name: prompts, path: a, per_step: 12, group: 16, sizes: [[8]]}"])


@pytest.mark.parametrize("word", ["folder", "parquet", "remote"])
def test_what_a_hugging_face_data_set_gives(tmp_path: Path, word: str) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"caption": ["x"], "edit_of": ["a.png"], "references": [["a.png"]]})
    columns = {"prompt": "caption", "source": "edit_of"}
    if word == "folder":
        rows.save_to_disk(str(tmp_path / "a"))
    elif word == "parquet":
        rows.to_parquet(str(tmp_path / "a.parquet"))
    path = {"folder": str(tmp_path / "a"), "parquet": str(tmp_path / "a.parquet"), "remote": "owner/name"}[word]
    known = ("prompt", "metadata", "source", "references")
    unknown = ("prompt", "metadata", "target_text", "source", "references", "demonstration")
    assert HubPrompts(path, 1, 1, columns=columns).gives == (unknown if word == "remote" else known)


def test_opening_a_hugging_face_data_set_reads_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"prompt": ["x"], "source": [{"bytes": b"none", "path": None}]})
    rows.cast_column("source", datasets.Image()).save_to_disk(str(tmp_path / "a"))
    with monkeypatch.context() as patch:
        patch.setattr(Picture, "source", lambda _: pytest.fail("a picture was read"))
        data = HubPrompts(str(tmp_path / "a"), 1, 1).open()
    with pytest.raises(DataError, match="a row 0: cannot read the source picture in this row"):
        data.draw(0, "main", 0)


def test_a_hugging_face_data_set_with_pictures_and_another_split(tmp_path: Path) -> None:
    import datasets

    for i in range(3):
        draw_picture(tmp_path / f"{i}.png", i)
    texts = {"caption": [f"edit {i}" for i in range(3)], "image": [str(tmp_path / f"{i}.png") for i in range(3)]}
    rows = datasets.Dataset.from_dict(texts).cast_column("image", datasets.Image())
    splits = {"train": rows.select([0, 1]), "test": rows.select([2])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))  # the pictures themselves go into the folder
    for i in range(3):
        (tmp_path / f"{i}.png").unlink()
    columns = {"prompt": "caption", "source": "image"}
    data = HubPrompts(str(tmp_path / "saved"), 2, 1, columns=columns, held_out_split="test", verify=True).open()
    drawn = {prompt.text: prompt.source for prompt in data.draw(0, "main", 0).prompts}
    (kept,) = data.held_out(1)
    assert sorted(drawn) == ["edit 0", "edit 1"]
    for i, source in enumerate((drawn["edit 0"], drawn["edit 1"], kept.source)):
        assert source is not None
        expected = np.random.default_rng(i).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        assert np.array_equal((source * 255).round().byte().movedim(0, -1).numpy(), expected)


def test_what_a_file_gives_is_read_from_its_first_line_and_an_absent_one_denies_nothing(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    everything = ("prompt", "metadata", "target_text", "source", "references", "demonstration")
    assert FilePrompts(str(file), 1, 1).gives == everything
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


def test_pictures_for_a_policy_that_writes() -> None:
    data = WorldPrompts(20, 2, task="caption")
    drawn = data.draw(0, "main", 0).prompts
    assert data.gives == ("prompt", "metadata", "source")
    assert all(prompt.text == "" and prompt.source is not None for prompt in drawn), "the caption is not told"
    assert len({prompt.id for prompt in drawn}) == 20
    texts = [prompt.metadata["caption"] for prompt in drawn]
    pictures = np.stack([prompt.source.numpy() for prompt in drawn if prompt.source is not None])
    assert all(verdict.strict == 1 for verdict in obeys.check_captions(pictures, texts))
    kept = {prompt.metadata["caption"] for prompt in data.held_out(200)}
    assert kept <= {caption.text for caption in grammar.split("held_out")}
    assert {prompt.kind for prompt in WorldPrompts(30, 1, task="caption", kinds=("two",)).draw(0, "a", 0).prompts} == {
        "two"
    }


@pytest.mark.parametrize(("task", "given"), [("edit", "source"), ("in_context", "references")])
def test_instructions_come_with_their_pictures(task: str, given: str) -> None:
    data = WorldPrompts(20, 2, task=task)  # type: ignore[arg-type]
    assert given in data.gives
    drawn = data.draw(0, "main", 0).prompts
    assert drawn == data.draw(0, "main", 0).prompts
    for prompt in (*drawn, *data.held_out(20)):
        pictures = [prompt.source] if task == "edit" else prompt.references
        assert all(picture is not None and picture.shape == (3, 32, 32) for picture in pictures)
    assert len({prompt.key for prompt in drawn}) == 20


def test_kinds_belong_to_their_task() -> None:
    with pytest.raises(ValueError, match=r"the task edit named 'removed'.* 'remove'"):
        WorldPrompts(1, 1, task="edit", kinds=("removed",))
