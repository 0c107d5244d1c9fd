"""The tool `search`: what it finds in a folder and at an endpoint."""

import pytest

from rlkit import registry
from rlkit.agents.tooling import Toolbox, tool_call
from rlkit.errors import DataError, RecipeError, RewardError
from rlkit.tools.search import Search
from rlkit.world import atlas


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"title": "flag of Aland", "text": "A red\\ncross on blue."}\n{"title": "flag of Berry", "text": "A lion."}\n'
    )
    (tmp_path / "long.txt").write_text("lion " * 500)
    return str(tmp_path)


def test_results_are_numbered_and_the_best_comes_first(folder):
    tool = Search(folder, longest=25)
    assert tool("Aland's flag") == "1. flag of Aland: A red cross on blue.\n2. flag of Berry: A lion."
    assert tool("lion") == "1. long: lion lion lion lion lion  ...\n2. flag of Berry: A lion."
    assert Search(folder, top_k=1)("flag") == "1. flag of Berry: A lion.", "the shorter text"
    assert tool("zebra") == "No document fits this query."


def test_every_document_of_the_atlas_is_found_by_its_title():
    tool = Search("world", top_k=1)
    for known in (atlas.about(atlas.places("train")[3], "flag"), atlas.about(atlas.places("held_out")[0], "emblem")):
        document = atlas.document(known)
        assert tool(known.subject) == f"1. {document.title}: {document.text}"


def test_an_endpoint_is_asked_with_its_key(endpoint, monkeypatch):
    there = endpoint(200, {"results": [{"title": "a", "text": "of  a", "url": "http://x"}] * 5})
    monkeypatch.setenv("SEARCH_KEY", "secret")
    tool = Search(None, top_k=2, url=there.url, key_env="SEARCH_KEY")
    tool.start()
    assert tool("red") == "1. a (http://x): of a\n2. a (http://x): of a"
    assert there.asked == [("/find", "Bearer secret", {"query": "red", "top_k": 2})]
    tool.close()
    assert tool("again"), "what is closed is opened when it is asked"
    tool.close()


def test_an_endpoint_that_finds_nothing(endpoint):
    assert Search(None, url=endpoint(200, {"results": []}).url)("red") == "No document fits this query."


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (404, {}, "answered 404"),
        (200, b"<html>", "gave no JSON"),
        (200, [], "gave no {"),
        (200, {"results": {}}, "gave no {"),
        (200, {"results": ["a"]}, "gave no {"),
        (200, {"results": [{"text": "a"}]}, "has no 'title'"),
        (200, {"results": [{"title": "a", "text": 3}]}, "has no 'text'"),
    ],
)
def test_an_endpoint_that_answers_something_else_fails_the_call(endpoint, status, answer, message):
    box = Toolbox({"search": Search(None, url=endpoint(status, answer).url)})
    ((call, _),) = box.run([box.parse(tool_call("search", {"query": "a"}))])
    assert call.failed
    assert message in call.reply
    box.close()


def test_what_is_wrong_is_known_when_it_starts(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such folder"):
        Search(str(tmp_path / "gone")).start()
    with pytest.raises(DataError, match="no texts in this folder"):
        Search(str(tmp_path)).start()
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"a\.jsonl:1"):
        Toolbox({"search": Search(str(tmp_path))})
    monkeypatch.delenv("SEARCH_KEY", raising=False)
    with pytest.raises(RewardError, match="the environment has no SEARCH_KEY"):
        Search(None, url="http://127.0.0.1:9", key_env="SEARCH_KEY").start()


def test_a_folder_is_read_once(folder, tmp_path):
    tool = Search(folder)
    tool.start()
    (tmp_path / "a.jsonl").unlink()
    assert tool("Aland").startswith("1. flag of Aland")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs 'folder'"),
        ({"folder": None}, "give a folder, or folder: null and a url"),
        ({"folder": "a", "url": "http://127.0.0.1:9"}, "exactly one"),
        ({"folder": "a", "key_env": "KEY"}, "key_env is of a url"),
        ({"folder": None, "url": "127.0.0.1:9"}, "is no address like"),
        ({"folder": None, "url": "http://127.0.0.1:9", "seconds": 0.0}, "seconds must be above 0"),
        ({"folder": "a", "top_k": 0}, "top_k and longest must be 1 or more"),
        ({"folder": "a", "longest": 0}, "top_k and longest must be 1 or more"),
        ({"folder": "a", "topk": 1}, "Did you mean 'top_k'"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(RecipeError, match=message):
        registry.build("tools", "search", options, "tools.search")
