"""The tool `image_search`: pictures of a folder and of an endpoint, as an agent is shown them."""

import base64

import pytest
import torch

from rlkit import pictures, registry
from rlkit.agents.tooling import Toolbox, tool_call
from rlkit.errors import DataError, RecipeError
from rlkit.tools.image_search import ImageSearch, smaller

RED = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
BLUE = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1)


def save(file, colour, height=4, width=4):
    file.write_bytes(pictures.png(colour.expand(3, height, width)))


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "a.png", RED)
    save(tmp_path / "b.png", BLUE, 8, 16)
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "a red flag"}\n{"file_name": "b.png", "text": "a blue flag, flown at sea"}\n'
    )
    return tmp_path


def test_pictures_are_found_by_their_texts_and_titled_with_them(folder):
    seen = ImageSearch(str(folder), side=8)("flag")
    assert seen.text == "2 pictures found."
    assert [title for title, _ in seen.pictures] == ["a red flag", "a blue flag, flown at sea"]
    first, second = (picture for _, picture in seen.pictures)
    torch.testing.assert_close(first, RED.expand(3, 4, 4))
    torch.testing.assert_close(second, BLUE.expand(3, 4, 8), msg="half as large")
    assert ImageSearch(str(folder), top_k=1)("blue").text == "1 picture found."
    assert ImageSearch(str(folder))("zebra").pictures == ()
    assert ImageSearch(str(folder))("zebra").text == "No picture fits this query."


def test_texts_may_lie_beside_the_pictures(tmp_path):
    save(tmp_path / "a.png", RED)
    (tmp_path / "a.txt").write_text("a red flag\n")
    ((title, _),) = ImageSearch(str(tmp_path))("red").pictures
    assert title == "a red flag"


def test_a_picture_is_made_smaller_and_never_larger():
    assert smaller(torch.rand(3, 40, 20), 10).shape == (3, 10, 5)
    assert smaller(torch.rand(3, 4, 1000), 10).shape == (3, 1, 10)
    small = torch.rand(3, 4, 6)
    assert smaller(small, 6) is small


def test_an_endpoint_gives_pictures_as_base64(endpoint):
    image = base64.b64encode(pictures.png(RED.expand(3, 4, 4))).decode()
    there = endpoint(200, {"results": [{"title": "red", "image": image}]})
    tool = ImageSearch(None, url=there.url)
    ((title, picture),) = tool("flag").pictures
    assert title == "red"
    torch.testing.assert_close(picture, RED.expand(3, 4, 4))
    assert there.asked[0][2] == {"query": "flag", "top_k": 2}
    tool.close()


@pytest.mark.parametrize(
    ("image", "message"),
    [("///", "is no base64"), ("aGVsbG8=", "not a PNG or JPEG"), (None, "has no 'image'")],
)
def test_an_endpoint_that_gives_no_picture_fails_the_call(endpoint, image, message):
    box = Toolbox(
        {"image_search": ImageSearch(None, url=endpoint(200, {"results": [{"title": "a", "image": image}]}).url)}
    )
    ((call, shown),) = box.run([box.parse(tool_call("image_search", {"query": "a"}))])
    assert call.failed
    assert message in call.reply
    assert shown == ()
    box.close()


def test_a_picture_that_breaks_later_fails_its_call(folder):
    box = Toolbox({"image_search": ImageSearch(str(folder))})
    (folder / "a.png").write_bytes(b"no picture")
    calls = [box.parse(tool_call("image_search", {"query": word})) for word in ("red", "blue")]
    (broken, _), (fine, shown) = box.run(calls)
    assert (broken.failed, fine.failed, len(shown)) == (True, False, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"file_name": "gone.png", "text": "a"}', r"metadata\.jsonl:1: there is no picture"),
        ("metadata.jsonl", '{"file_name": "a.txt", "text": "a"}', "there is no picture"),
        ("metadata.jsonl", '{"file_name": "a.png"}', "has no 'file_name' or no 'text'"),
        ("metadata.jsonl", "{", "is no JSON"),
        ("metadata.jsonl", "", "no pictures in this folder"),
        ("a.txt", " ", r"a\.png: this picture has no text"),
        ("b.txt", "of another", r"a\.png: this picture has no text.* Write it into a\.txt"),
    ],
)
def test_what_is_wrong_with_a_folder_is_known_when_it_starts(tmp_path, name, content, message):
    save(tmp_path / "a.png", RED)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        Toolbox({"image_search": ImageSearch(str(tmp_path))})


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match="no pictures in this folder"):
        ImageSearch(str(tmp_path)).start()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folder": None}, "exactly one"),
        ({"folder": "a", "top_k": 9}, "top_k must be 1 to 8, not 9"),
        ({"folder": "a", "top_k": 0}, "top_k must be 1 to 8"),
        ({"folder": "a", "side": 0}, "side must be 1 or more"),
        ({"folder": "world"}, "the atlas has no pictures"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(RecipeError, match=message):
        registry.build("tools", "image_search", options, "tools.image_search")
