"""Rows of files and of Hugging Face data sets, with the columns that a recipe names."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rlkit.data.picture_files import Unread
from rlkit.data.tables import check_columns, first_columns, given, hub_columns, load_table, read_prompts, read_table
from rlkit.errors import DataError

THEIRS = {"prompt": "caption", "source": "input_image", "references": "refs", "target_text": "ocr", "size": "hw"}


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are kept in this test's folder, and nothing is asked of the network."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def jsonl(folder: Path, *rows: Mapping[str, Any]) -> Path:
    (folder / "a.jsonl").write_text("\n".join(json.dumps(one) for one in rows))
    return folder / "a.jsonl"


def png(folder: Path, name: str, level: int) -> str:
    Image.new("RGB", (3, 2), (level, 0, 0)).save(folder / name)
    return name


def in_bytes(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def levels(row: Unread) -> tuple[int | None, list[int]]:
    """The red of the source and of each reference."""
    return (
        None if row.source is None else int(row.source.read()[0, 0, 0]),
        [int(one.read()[0, 0, 0]) for one in row.references],
    )


# ---- columns ---------------------------------------------------------------------------------------------------------


def test_columns_map_our_names_to_the_files(tmp_path: Path) -> None:
    for i in range(3):
        png(tmp_path, f"{i}.png", 10 * i)
    row = {"caption": "make it blue", "input_image": "1.png", "refs": ["2.png", "0.png"], "ocr": "OPEN", "hw": [48, 64]}
    others = {"prompt": "not this one", "source": "laion", "size": "large"}
    (read,) = read_prompts(jsonl(tmp_path, {**row, **others}), THEIRS)
    assert (read.prompt.text, read.prompt.target_text, read.prompt.size) == ("make it blue", ("OPEN",), (48, 64))
    assert levels(read) == (10, [20, 0])
    assert read.prompt.metadata == others, "columns of our names are metadata where another one is named"


def test_one_column_may_be_two_of_ours(tmp_path: Path) -> None:
    (read,) = read_prompts(jsonl(tmp_path, {"word": "OPEN", "n": 1}), {"prompt": "word", "target_text": "word"})
    assert (read.prompt.text, read.prompt.target_text, read.prompt.metadata) == ("OPEN", ("OPEN",), {"n": 1})


def test_null_leaves_a_column_to_the_metadata(tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"prompt": "x", "source": "laion", "size": "large"})
    (read,) = read_prompts(file, {"source": None, "size": None})
    assert read.source is None
    assert read.prompt.size is None
    assert read.prompt.metadata == {"source": "laion", "size": "large"}


def test_what_a_line_leaves_empty_is_not_there(tmp_path: Path) -> None:
    png(tmp_path, "a.png", 7)
    empty = {"source": None, "references": None, "target_text": None, "size": None}
    first, second = read_prompts(jsonl(tmp_path, {"prompt": "x", **empty}, {"prompt": "y", "source": "a.png"}))
    assert (levels(first), first.prompt.target_text, first.prompt.size) == ((None, []), (), None)
    assert levels(second) == (7, [])


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (
            {"promt": "a"},
            r"columns: no name 'promt'\. Did you mean 'prompt'\? Write OUR NAME: THE FILE'S; ours: prompt,",
        ),
        ({"prompt": ""}, "columns.prompt must be the name of a column, not ''"),
        ({"prompt": None}, "columns.prompt must be the name of a column, not None"),
    ],
)
def test_names_that_are_not_ours(columns: dict[str, str | None], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_columns(columns)


def test_a_typo_in_a_column_lists_those_that_are_there(tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"caption": "a", "n": 1}, {"caption": "b", "image": "x.png"})
    with pytest.raises(DataError) as caught:
        read_prompts(file, {"prompt": "captoin"})
    expected = "columns.prompt: no column 'captoin'. Did you mean 'caption'? Its columns: caption, n, image."
    assert str(caught.value) == f"{file}: {expected}"
    with pytest.raises(DataError, match=r"a\.jsonl:1: no \"prompt\" in this line.*it has caption, n\."):
        read_prompts(file)
    with pytest.raises(DataError, match=r"a\.jsonl:2: no \"n\" in this line"):
        read_prompts(jsonl(tmp_path, {"n": "a"}, {"m": "b"}), {"prompt": "n"})


@pytest.mark.parametrize("size", ["512x384", [512], [512, 0], [512, 3.5], [True, 4], {"h": 1}])
def test_a_size_that_is_none(tmp_path: Path, size: object) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'size' must be \[height, width\], not .*columns: \{size: null\}"):
        read_prompts(jsonl(tmp_path, {"prompt": "x", "size": size}))


def test_what_is_given_is_told_by_the_first_row(tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"caption": "x", "input_image": "a.png", "target_text": "b"})
    assert given(THEIRS, first_columns(file)) == ("prompt", "metadata", "source")
    assert given({"source": None}, first_columns(file)) == ("prompt", "metadata", "target_text")
    assert given({"source": None}, None) == ("prompt", "metadata", "target_text", "references", "demonstration")
    assert first_columns(tmp_path / "none.jsonl") is None


# ---- comma-separated values ------------------------------------------------------------------------------------------


def test_csv(tmp_path: Path) -> None:
    png(tmp_path, "a.png", 3)
    text = 'prompt,source,references,size,note\n"one, two",,"[""a.png""]","[4, 8]",[sic]\nthree,a.png,,,"a\nb"\n'
    (tmp_path / "a.csv").write_text("\ufeff" + text)
    first, second = read_prompts(tmp_path / "a.csv")
    assert (first.prompt.text, first.prompt.size, levels(first)) == ("one, two", (4, 8), (None, [3]))
    assert (first.prompt.metadata, second.prompt.metadata) == ({"note": "[sic]"}, {"note": "a\nb"})
    assert first_columns(tmp_path / "a.csv") == ["prompt", "source", "references", "size", "note"], "empty ones too"
    assert (second.prompt.text, levels(second)) == ("three", (3, []))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,n\na,b,c\n", r"a\.csv:2: not the 2 values of the first line\. Quote texts"),
        ("prompt,n\na,1\nb\n", r"a\.csv:3: not the 2 values"),
        ('prompt\n"a', r"a\.csv: not comma-separated values after line 1: "),
        ("prompt\n", r"a\.csv: no prompts in this file"),
        ("caption\na\n", r'a\.csv:2: no "prompt" in this line.*it has caption'),
    ],
)
def test_csv_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / "a.csv")


# ---- Hugging Face data sets ------------------------------------------------------------------------------------------


def pictured() -> Any:
    from datasets import Dataset, Features, Image, List, Value

    columns = {
        "caption": ["a", "b", "c"],
        "input_image": [{"bytes": in_bytes(5), "path": None}, None, {"bytes": in_bytes(6), "path": "six.png"}],
        "refs": [[{"bytes": in_bytes(i), "path": None} for i in range(n)] for n in (2, 0, 1)],
        "ocr": [["X"], [], ["Y", "Z"]],
        "hw": [[4, 8], [4, 8], [4, 8]],
        "mask": [{"bytes": in_bytes(1), "path": None}] * 3,
        "n": [1, 2, 3],
    }
    texts = {"caption": Value("string"), "ocr": List(Value("string")), "hw": List(Value("int64")), "n": Value("int64")}
    pictures = {"input_image": Image(), "refs": List(Image()), "mask": Image()}
    features = Features({key: {**texts, **pictures}[key] for key in columns})
    return Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("stored", ["folder", "splits", "parquet", "memory"])
def test_pictures_of_a_table_are_read_when_they_are_wanted(
    tmp_path: Path, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    place = tmp_path / ("a.parquet" if stored == "parquet" else "saved")
    table = pictured()
    if stored == "folder":
        table.save_to_disk(str(place))
    elif stored == "splits":
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(place))
    elif stored == "parquet":
        table.to_parquet(str(place))
    if stored != "memory":
        table = load_table(str(place))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_: pytest.fail("a picture was decoded"))
        rows = read_table(table, str(place), tmp_path, THEIRS)
    assert [(row.prompt.id, row.prompt.text, row.prompt.metadata) for row in rows] == [
        *((0, "a", {"n": 1}), (1, "b", {"n": 2}), (2, "c", {"n": 3})),
    ]
    assert [row.prompt.target_text for row in rows] == [("X",), (), ("Y", "Z")]
    assert {row.prompt.size for row in rows} == {(4, 8)}
    assert [levels(row) for row in rows] == [(5, [0, 1]), (None, []), (6, [0])]
    assert rows[2].meaning()[1] == "six.png"
    assert rows[0].meaning() != rows[1].meaning()


def test_a_parquet_file_is_a_file_of_prompts_too(tmp_path: Path) -> None:
    pictured().to_parquet(str(tmp_path / "a.parquet"))
    assert [row.prompt.text for row in read_prompts(tmp_path / "a.parquet", THEIRS)] == ["a", "b", "c"]
    assert given(THEIRS, first_columns(tmp_path / "a.parquet")) == (
        *("prompt", "metadata", "target_text", "source", "references"),
    )


def test_tables_of_paths_find_their_pictures_beside_them(tmp_path: Path) -> None:
    png(tmp_path, "a.png", 9)
    file = jsonl(tmp_path, {"text": "x", "source": "a.png", "references": ["a.png"]}, {"text": "y", "references": []})
    first, second = read_table(load_table(str(file)), str(file), tmp_path, {})
    assert (levels(first), levels(second)) == ((9, [9]), (None, []))
    assert first.source is not None
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl row 0: the source picture .*a\.png does not exist"):
        first.source.read()


def test_a_folder_of_files_and_its_splits(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"prompt": f"a {split}"}))
    assert load_table(str(folder), split="test")["prompt"][:] == ["a test"]
    with pytest.raises(DataError, match=r'cannot load this data set: Unknown split "tests".* Check its name'):
        load_table(str(folder), split="tests")


def test_columns_of_a_folder_are_known_without_opening_it(tmp_path: Path) -> None:
    pictured().save_to_disk(str(tmp_path / "saved"))
    assert hub_columns(tmp_path / "saved") == ["caption", "input_image", "refs", "ocr", "hw", "mask", "n"]
    assert hub_columns(tmp_path / "none") is None


def test_data_sets_that_cannot_be_loaded(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": pictured()}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "a.parquet").write_bytes(b"no table")
    (tmp_path / "a.tar").write_bytes(b"")
    cases = {
        str(tmp_path / "none.parquet"): "no such file or folder. Write the path of what is there, or OWNER/NAME",
        "./nobody/here": "no such file or folder",
        "prompts.jsonl": "no such file or folder",
        str(tmp_path / "a.tar"): "no file of a data set ends in '.tar'. Known endings: .parquet",
        str(tmp_path / "a.parquet"): "cannot load this data set",
    }
    for path, text in cases.items():
        with pytest.raises(DataError) as caught:
            load_table(path)
        assert text in str(caught.value)
        assert caught.value.where == path
    with pytest.raises(DataError, match=r"splits: no split 'trian'\. Did you mean 'train'\? Its splits: train\."):
        load_table(str(tmp_path / "splits"), split="trian")


def test_without_a_connection_a_name_of_the_hub_is_a_clear_error() -> None:
    with pytest.raises(DataError) as caught:
        load_table("nobody/prompts")
    text = str(caught.value)
    assert text.startswith("nobody/prompts: there is no such file or folder, and cannot load this data set: ")
    assert "hf download --repo-type dataset nobody/prompts --local-dir FOLDER" in text


def test_a_data_set_that_is_a_program_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "program.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="cannot load this data set"):
        load_table(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({}, r"t: no column 'prompt'\. Say `columns: \{prompt: NAME\}`; its columns: caption, input_image,"),
        ({"prompt": "caption", "source": "input"}, r"no column 'input'.*Its columns: caption, input_image,"),
        ({"prompt": "caption", "source": "refs"}, r"'refs' holds lists and cannot be 'source'\. Say `columns: \{ref"),
        ({"prompt": "caption", "references": "input_image"}, r"'input_image' holds single values and cannot be 'refe"),
        ({"prompt": "n"}, r't row 0: no "n" in this line'),
    ],
)
def test_columns_of_a_table_that_cannot_be_used(tmp_path: Path, columns: dict[str, str | None], text: str) -> None:
    with pytest.raises(DataError, match=text):
        read_table(pictured(), "t", tmp_path, columns)


def test_a_table_without_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="t: no rows in this data set"):
        read_table(pictured().select([]), "t", tmp_path, THEIRS)
