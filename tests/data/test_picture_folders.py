"""Folders of pictures: texts beside them, in metadata.jsonl, or one for all."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rlkit.data.prompts import ImageFolder
from rlkit.errors import DataError
from rlkit.types import Prompt


def painted(folder: Path, **texts: str | None) -> str:
    """A picture of its own red for each name, in the order of the names, and its text beside it."""
    for i, (name, text) in enumerate(sorted(texts.items())):
        file = folder / f"{name.replace('__', '/')}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 2), (i, 0, 0)).save(file)
        if text is not None:
            file.with_suffix(".txt").write_text(text)
    return str(folder)


def told(data: ImageFolder) -> list[tuple[str, int, Prompt]]:
    """(text, red of its picture, prompt), in the order of the folder."""
    prompts = list(data.open().everything() or ())
    pictures = [one.source if data.used_as == "source" else one.references[0] for one in prompts]
    return [
        (one.text, round(float(picture[0, 0, 0]) * 255), one)
        for one, picture in zip(prompts, pictures, strict=True)
        if picture is not None
    ]


@pytest.mark.parametrize("used_as", ["source", "references"])
def test_texts_beside_the_pictures(tmp_path: Path, used_as: Any) -> None:
    folder = painted(tmp_path, b=" make it\n blue ", a="make it red", sub__c="crop it", _d="e")
    (tmp_path / "notes.txt").write_text("no picture of this name")
    painted(tmp_path / ".hidden", x="not this")
    data = ImageFolder(folder, 1, 1, used_as=used_as)
    assert data.gives == ("prompt", "metadata", used_as)
    rows = told(data)
    assert [(text, red) for text, red, _ in rows] == [
        *(("e", 0), ("make it red", 1), ("make it blue", 2), ("crop it", 3)),
    ]
    for _, _, prompt in rows:
        assert (prompt.source is not None, len(prompt.references)) == ((True, 0) if used_as == "source" else (False, 1))
        assert prompt.metadata == {}


def test_one_text_for_all(tmp_path: Path) -> None:
    folder = painted(tmp_path, a=None, b="not read")
    assert [row[:2] for row in told(ImageFolder(folder, 1, 1, text="again"))] == [("again", 0), ("again", 1)]


def metadata(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def test_metadata_names_the_pictures_and_may_say_more(tmp_path: Path) -> None:
    folder = painted(tmp_path, a="not read", b=None, c=None)
    rows = [{"file_name": "b.png", "caption": "x", "ref": ["a.png"], "n": 1}, {"file_name": "a.png", "caption": "y"}]
    metadata(tmp_path, *rows)
    data = ImageFolder(folder, 1, 1, columns={"prompt": "caption", "references": "ref"})
    assert data.gives == ("prompt", "metadata", "references", "source")
    (first, second) = told(data)
    assert [first[:2], second[:2]] == [("x", 1), ("y", 0)]
    assert (first[2].metadata, len(first[2].references), len(second[2].references)) == ({"n": 1}, 1, 0)
    assert [text for text, _, _ in told(ImageFolder(folder, 1, 1, text="again"))] == ["again", "again"]


def test_a_source_column_of_metadata_is_no_second_source(tmp_path: Path) -> None:
    folder = painted(tmp_path, a=None)
    metadata(tmp_path, {"file_name": "a.png", "prompt": "x", "source": "laion"})
    (only,) = told(ImageFolder(folder, 1, 1))
    assert (only[1], only[2].metadata) == (0, {"source": "laion"})


def test_metadata_may_be_csv(tmp_path: Path) -> None:
    folder = painted(tmp_path, a=None, b=None)
    (tmp_path / "metadata.csv").write_text("file_name,text\nb.png,x\n")
    assert [row[:2] for row in told(ImageFolder(folder, 1, 1))] == [("x", 1)]


def test_a_folder_that_is_not_there_yet_denies_nothing(tmp_path: Path) -> None:
    data = ImageFolder(str(tmp_path / "none"), 1, 1)
    assert data.gives == ("prompt", "metadata", "target_text", "references", "demonstration", "source")
    with pytest.raises(DataError, match="none: no such folder of pictures"):
        data.open()


def test_another_folder_is_held_out(tmp_path: Path) -> None:
    folder, other = painted(tmp_path / "a", a="x", b="y"), painted(tmp_path / "b", a="z")
    data = ImageFolder(folder, 1, 1, held_out_path=other).open()
    assert [prompt.text for prompt in data.held_out(2)] == ["z", "z"]
    assert {data.draw(0, "main", step).prompts[0].text for step in range(2)} == {"x", "y"}


@pytest.mark.parametrize(
    ("texts", "rows", "options", "message"),
    [
        ({}, None, {}, "no pictures in this folder. Known: .png"),
        ({"a": None}, None, {}, "a.png: this picture has no text. Write it into a.txt beside it"),
        ({"a": " \n"}, None, {}, "a.txt: no text in this file"),
        ({"a": "x"}, None, {"columns": {"size": "wh"}}, "columns are of a file of metadata, and there is none"),
        ({"a": "x"}, [{"filename": "a.png"}], {}, "metadata.jsonl: no 'file_name' here"),
        ({"a": "x"}, [{"file_name": "a.png"}, {"file_name": 3}], {}, "metadata.jsonl:2: 'file_name' must be the path"),
        ({"a": "x"}, [{"file_name": "b.png", "prompt": "x"}], {}, "metadata.jsonl:1: the source picture"),
        ({"a": "x"}, [{"file_name": "a.png"}], {}, 'metadata.jsonl:1: no "prompt" in this line'),
        ({"a": "x"}, [{"file_name": "a.png"}], {"columns": {"prompt": "file"}}, "Did you mean 'file_name'?"),
    ],
)
def test_folders_that_cannot_be_used(
    tmp_path: Path, texts: dict[str, str | None], rows: list[dict[str, Any]] | None, options: Any, message: str
) -> None:
    painted(tmp_path, **texts)
    if rows is not None:
        metadata(tmp_path, *rows)
    with pytest.raises(DataError) as caught:
        ImageFolder(str(tmp_path), 1, 1, **options).open()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"text": " "}, "text must say something"),
        ({"text": "a", "columns": {"prompt": "b"}}, "columns.prompt is taken: text says what it is"),
        ({"columns": {"source": "b"}}, "columns.source is taken: used_as says what it is"),
        ({"held_out_path": "a", "held_out_share": 0.1}, "held_out_share and held_out_path exclude each other"),
        ({"columns": {"sauce": "b"}}, "no name 'sauce'. Did you mean 'source'?"),
    ],
)
def test_options_that_do_not_fit(options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ImageFolder("a", 1, 1, **options)
