"""Prompts: a pure function of seed, stage and step; files that are read or refused by line."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from rlkit.data import FilePrompts, PromptBatch, Prompts, WorldPrompts, read_prompts
from rlkit.errors import DataError
from rlkit.world import grammar


def held_by(split: str) -> set[str]:
    return {caption.canonical for caption in grammar.split(split)}


def file_prompts(folder: Path, lines: list[str], per_step: int = 2, held_out: list[str] | None = None) -> Prompts:
    (folder / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    if held_out is not None:
        (folder / "held_out.txt").write_text("\n".join(held_out), encoding="utf-8")
    kept = str(folder / "held_out.txt") if held_out is not None else None
    return FilePrompts(str(folder / "prompts.txt"), per_step, group=3, held_out_path=kept).open()


@pytest.fixture(params=["world", "file"])
def prompts(request: pytest.FixtureRequest, tmp_path: Path) -> Prompts:
    """A data set of each sort."""
    if request.param == "world":
        return WorldPrompts(per_step=4, group=3).open()
    return file_prompts(tmp_path, [f"picture {i}" for i in range(11)], per_step=4)


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
    assert (len(batch.prompts), batch.group, len(batch)) == (4, 3, 12)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 1)])
def test_sizes_below_1_are_refused(sizes: tuple[int, int]) -> None:
    for make in (lambda: WorldPrompts(*sizes), lambda: FilePrompts("nowhere.txt", *sizes)):
        with pytest.raises(ValueError, match=r"(per_step|group) must be 1 .*or more"):
            make()


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
