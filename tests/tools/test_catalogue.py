"""Tools as a catalogue: what docs/tools.md says of them, and that another package adds its own."""

import json
import sys
import tomllib
from pathlib import Path

import pytest

from rlkit import cli, registry
from rlkit.agents import schemas
from rlkit.agents.tooling import Toolbox, tool_call

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests" / "plugin"


def row(entry: registry.Entry) -> str:
    """A tool's row in the table."""
    tool = registry.load("tools", entry.name)
    given = schemas.schema(tool, entry.name).properties
    arguments = ", ".join(f"`{name}`: {schemas.words(kind)}" for name, kind in given.items())
    told = " ".join(schemas.description(tool, entry.name).split())
    options = ", ".join(f"`{option.name}`" for option in entry.fields)
    return f"| `{entry.name}` | {entry.summary} | {arguments} | {told} | {options} |"


def test_the_table_of_tools_is_what_the_registry_says():
    rows = [row(entry) for entry in registry.describe("tools") if entry.source == "built in"]
    written = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in written, "the table in docs/tools.md should read:\n" + "\n".join(rows)


@pytest.mark.parametrize("entry", registry.describe("tools"), ids=lambda entry: entry.name)
def test_a_built_in_tool_says_what_it_does_and_what_it_takes(entry):
    tool = registry.load("tools", entry.name)
    assert schemas.description(tool, entry.name).endswith(".")
    assert all("description" in one for one in schemas.schema(tool, entry.name).properties.values())


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """tests/plugin as an installer leaves it: its module on the path, and what its pyproject.toml declares."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = tmp_path / "rlkit_warmth-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
        for group, points in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))
    monkeypatch.syspath_prepend(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("rlkit_warmth", None)


def test_a_function_of_another_package_is_a_tool(plugin, capsys):
    assert "colour_of" in registry.names("tools")
    box = Toolbox({"colour_of": registry.build("tools", "colour_of", {})})
    assert '{"enum": ["cold", "mild", "warm"]}' in box.described()
    ((call, _),) = box.run([box.parse(tool_call("colour_of", {"temperature": "warm"}))])
    assert (call.reply, call.failed) == ("red", False)
    assert "temperature must be one of" in box.parse(tool_call("colour_of", {"temperature": "hot"})).invalid
    assert cli.main(["list", "tools"]) == 0
    assert "(rlkit-warmth 0.1.0)" in capsys.readouterr().out
    assert cli.main(["describe", "colour_of"]) == 0
    said = capsys.readouterr().out
    assert "Which colour a temperature is painted in." in said
    assert 'temperature: {"enum": ["cold", "mild", "warm"]}' in said


def test_a_local_class_is_a_tool(tmp_path, monkeypatch):
    (tmp_path / "acme_tools.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Twice:\n    times: int = 2\n\n"
        "    def __call__(self, word: str) -> str:\n        return word * self.times\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    try:
        box = Toolbox({"twice": registry.build("tools", "acme_tools:Twice", {"times": 3})})
        ((call, _),) = box.run([box.parse(tool_call("twice", {"word": "a"}))])
        assert call.reply == "aaa"
    finally:
        sys.modules.pop("acme_tools", None)


def test_describe_shows_what_an_agent_gives(capsys):
    assert cli.main(["describe", "search"]) == 0
    said = capsys.readouterr().out
    assert 'an agent gives it:\n  query: {"type": "string"' in said
    assert "top_k: int = 3  results at most" in said
    assert cli.main(["describe", "search", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arguments"]["required"] == ["query"]


def test_describe_says_of_a_tool_that_is_none_why(plugin, monkeypatch, capsys):
    monkeypatch.setattr(registry, "load", lambda kind, name: lambda *everything: "")
    assert cli.main(["describe", "colour_of"]) == 0
    assert "the parameter 'everything' is variadic" in capsys.readouterr().out
