"""The tool `query_knowledge`: skills by name, and nothing else that lies on the disk."""

import pytest

from rlkit.agents.tooling import Toolbox, tool_call
from rlkit.errors import DataError
from rlkit.tools.query_knowledge import QueryKnowledge
from rlkit.world import atlas


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "skills"
    inside.mkdir()
    (inside / "lettering.md").write_text("# Lettering\n\nQuote it.\n")
    (inside / "light.md").write_text("From the left.")
    (tmp_path / "secret.md").write_text("a password")
    return inside


def test_a_skill_is_its_whole_text(folder):
    tool = QueryKnowledge(str(folder))
    assert tool("lettering") == "# Lettering\n\nQuote it."
    assert tool("lihgt") == "There is no such skill. Known: light, lettering."
    assert tool("letters") == "There is no such skill. Known: lettering, light."


def test_no_more_than_twenty_are_named(tmp_path):
    for i in range(25):
        (tmp_path / f"skill {i:02}.md").write_text("a")
    said = QueryKnowledge(str(tmp_path))("skill 24x")
    assert said.startswith("There is no such skill. Known: skill 24, ")
    assert said.endswith(" and 5 more.")


@pytest.mark.parametrize(
    "where", ["../secret", "..%2fsecret", "../secret.md", "{absolute}", "light/../../secret", "\x00"]
)
def test_nothing_outside_of_the_folder_is_read(folder, where):
    box = Toolbox({"query_knowledge": QueryKnowledge(str(folder))})
    named = where.replace("{absolute}", str(folder.parent / "secret"))
    ((call, _),) = box.run([box.parse(tool_call("query_knowledge", {"skill": named}))])
    assert call.reply.startswith("There is no such skill. Known: ")
    assert not call.failed


def test_a_link_that_leads_out_is_refused(folder):
    (folder / "more.md").symlink_to(folder.parent / "secret.md")
    with pytest.raises(DataError, match=r"more\.md: this link leads out of the folder"):
        QueryKnowledge(str(folder)).start()
    (folder / "more.md").unlink()
    (folder / "more.md").symlink_to(folder / "light.md")
    assert QueryKnowledge(str(folder))("more") == "From the left."


def test_what_is_wrong_with_a_folder_is_known_when_it_starts(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        QueryKnowledge(str(tmp_path / "gone")).start()
    with pytest.raises(DataError, match="no skills in this folder"):
        QueryKnowledge(str(tmp_path)).start()
    (tmp_path / "a.md").write_text(" \n")
    with pytest.raises(DataError, match=r"a\.md: no text in this file"):
        QueryKnowledge(str(tmp_path)).start()
    (tmp_path / "a.md").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        Toolbox({"query_knowledge": QueryKnowledge(str(tmp_path))})


def test_the_skills_of_the_atlas_are_shipped():
    tool = QueryKnowledge("world")
    assert {name: tool(name) for name in atlas.skills()} == atlas.skills()
