"""Pictures that lie in files or tables: their pixels, sizes and names, and what PIL cannot read."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlkit.data.picture_files import Picture, Unread, UnreadPrompts
from rlkit.errors import DataError
from rlkit.types import Prompt


def stored(value: object, folder: Path = Path(".")) -> Picture:
    return Picture("source", "a.jsonl:3", 0, [{"source": value}], folder)


def in_bytes(size: tuple[int, int] = (3, 2), level: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_pixels_for_every_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png", exif=exif)
    picture = stored("a.png", tmp_path)
    assert picture.size() == picture.read().shape[:2] == ((6, 4) if orientation >= 5 else (4, 6))


def test_the_size_is_read_from_the_head_of_a_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    assert stored("a.png", tmp_path).size() == (64, 48)
    with pytest.raises(DataError, match=r"a\.jsonl:3: cannot read the source picture .*a\.png: "):
        stored("a.png", tmp_path).read()


def test_a_column_of_lists_holds_several() -> None:
    table = [{"refs": [{"bytes": in_bytes(level=i), "path": None} for i in range(3)]}]
    picture = Picture("references[2]", "t row 0", 0, table, Path("."), "refs", 2)
    assert picture.read()[0, 0].tolist() == [2, 0, 0]
    broken = Picture("references[0]", "t row 0", 0, [{"refs": [{"bytes": b"none"}]}], Path("."), "refs", 0)
    with pytest.raises(DataError, match=r"t row 0: cannot read the references\[0\] picture in this row: "):
        broken.read()


def test_a_picture_that_may_be_an_attack_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="cannot read the source picture in this row: Image size"):
        stored({"bytes": in_bytes((6, 6))}).read()


def test_names_are_what_the_data_says_and_for_bytes_without_one_what_they_hold(tmp_path: Path) -> None:
    assert stored("deep/a.png", tmp_path).name() == stored("deep/a.png").name() == "deep/a.png"
    one, same, other = (stored({"bytes": in_bytes(level=level), "path": None}) for level in (1, 1, 2))
    assert one.name() == same.name() != other.name()
    assert stored({"bytes": in_bytes(), "path": "b.png"}).name() == "b.png"


def test_prompts_differ_by_text_source_and_references() -> None:
    prompt, picture = Prompt(0, "x"), stored("a.png")
    told = [
        Unread(prompt),
        Unread(Prompt(0, "y")),
        Unread(prompt, picture),
        Unread(prompt, None, (picture,)),
        Unread(prompt, None, (picture, picture)),
    ]
    assert len({one.meaning() for one in told}) == 5
    assert Unread(Prompt(7, "x", metadata={"n": 1}, size=(8, 8))).meaning() == told[0].meaning()


def test_a_prompt_without_pictures_is_read_as_it_is() -> None:
    prompt = Prompt(0, "x", metadata={"n": 1})
    assert list(UnreadPrompts([Unread(prompt)])) == [prompt]
    assert Unread(prompt).read() is prompt
