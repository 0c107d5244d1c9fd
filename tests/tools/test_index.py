"""BM25 in closed form, and folders that cannot be read."""

import math

import pytest

from rlkit.errors import DataError
from rlkit.tools import _index
from rlkit.tools._index import Document, Index, documents, words


def test_the_scores_are_those_of_the_formula():
    index = Index(["red red circle", "blue square here now", "red square"])
    mean = 3.0  # words

    def part(have, often, length):
        rare = math.log(1 + (3 - have + 0.5) / (have + 0.5))
        return rare * often * 2.5 / (often + 1.5 * (1 - 0.75 + 0.75 * length / mean))

    red, square = (part(2, 2, 3), 0.0, part(2, 1, 2)), (0.0, part(2, 1, 4), part(2, 1, 2))
    assert index.scores("red").tolist() == pytest.approx(red, abs=1e-12)
    both = [a + b for a, b in zip(red, square, strict=True)]
    assert index.scores("Red, square!").tolist() == pytest.approx(both, abs=1e-12)
    assert index.scores("square red square").tolist() == index.scores("red square").tolist(), "each word once"
    assert index.scores("nothing of it").tolist() == [0.0, 0.0, 0.0]


def test_the_best_come_first_and_what_has_no_word_never():
    index = Index(["a b", "b", "a b", "c"])
    assert index.best("b", 9) == [1, 0, 2]
    assert index.best("b", 2) == [1, 0]
    assert index.best("a", 1) == [0], "of equal ones the first"
    assert index.best("d", 3) == []
    assert index.best("", 3) == []
    assert Index(["", " "]).best("a", 1) == []


def test_words_are_lower_case_and_of_any_script():
    assert words("The Flag-of ÅLAND, 2026: 旗!") == ["the", "flag", "of", "åland", "2026", "旗"]


def test_a_folder_is_read_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("of b")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.md").write_text("\ufeffof c")
    (tmp_path / "a.jsonl").write_text(
        '\n{"title": "one", "text": "of one", "id": 3}\n\n{"title": "two", "text": "\\u2028"}\n'.replace("\\u2028", "x")
    )
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    assert documents(tmp_path) == (
        Document("one", "of one"),
        Document("two", "x"),
        Document("b", "of b"),
        Document("c", "of c"),
    )


def test_a_line_separator_within_a_text_is_no_new_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"title": "one", "text": "a\u2028b"}\n', encoding="utf-8")
    assert documents(tmp_path) == (Document("one", "a\u2028b"),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"title": "a", "text": "b"}\n{"title": "a", "te', r"a\.jsonl:2: this line is no JSON"),
        ("a.jsonl", b"\n[1]", r"a\.jsonl:2: this line is no object"),
        ("a.jsonl", b'{"title": "a"}', r"a\.jsonl:1: 'text' must be a text in this line, not None"),
        ("a.jsonl", b'{"title": 3, "text": "b"}', r"a\.jsonl:1: 'title' must be a text in this line, not 3"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: this line is no JSON"),
        ("a.txt", b"caf\xe9", r"a\.txt: byte 3 is not UTF-8"),
        ("a.png", b"", "no texts in this folder"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        documents(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="gone: no such folder"):
        _index.folder_of(str(tmp_path / "gone"), "skills")
    assert _index.folder_of(str(tmp_path), "skills") == tmp_path
