"""The README keeps its promises: its first command runs as written, its other commands exist, its tables are true."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rlkit import cli, registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\S+)([^\n]*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
MARKED = [text for language, marks, text in BLOCKS if language == "bash" and "ci" in marks.split()]


def test_the_two_commands_are_there() -> None:
    assert len(MARKED) == 1, "one bash block is marked `ci`: install, and train the quickstart"
    assert "rlkit train quickstart" in MARKED[0]
    assert (ROOT / ".ci" / "run").read_text().count("pytest") >= 1
    assert any(re.search(r"^\.venv/bin/pytest$", text, flags=re.MULTILINE) for _, _, text in BLOCKS)


def commands(text: str) -> list[list[str]]:
    """The `rlkit ...` lines of a block, as words; comments and the path of the environment are left out."""
    lines = [line.split("#")[0].strip().removeprefix(".venv/bin/") for line in text.splitlines()]
    return [line.split()[1:] for line in lines if line.startswith("rlkit ")]


@pytest.mark.parametrize("words", [words for lang, _, text in BLOCKS if lang == "bash" for words in commands(text)])
def test_every_command_exists_and_names_a_recipe_that_composes(words: list[str]) -> None:
    assert words[0] in cli.COMMANDS, f"`rlkit {words[0]}` is not a command"
    if words[0] in ("train", "check") and "--resume" not in words and not words[1].endswith(".yaml"):
        settings = [word for word in words[2:] if "=" in word and not word.startswith("-")]
        assert cli.main(["check", words[1], *settings]) == 0


@pytest.mark.parametrize("kind", ["algorithms", "rewards", "backbones", "rollouts", "tools"])
def test_the_tables_are_what_the_registry_says(kind: str) -> None:
    rows = [f"| `{entry.name}` | {entry.summary} |" for entry in registry.describe(kind) if entry.source == "built in"]
    assert "\n".join(rows) in README, "the README's table should read:\n" + "\n".join(rows)


def card(entry: registry.Entry) -> str:
    """A reward's row in the table of cards."""
    said = entry.constants
    low, high = ("any" if end is None else f"{end:g}" for end in said["range"])
    ends = f"{low} to {high}" + ("" if said["higher_is_better"] else ", less is better")
    reads = ", ".join((*said["reads"], *(f"({one})" for one in said.get("optional", ())))) or "the picture alone"
    return f"| `{entry.name}` | {ends} | {reads} | {said['size']} | {said['licence']} | {said['protocol']} |"


def test_the_cards_of_the_rewards_are_what_the_registry_says() -> None:
    rows = [card(entry) for entry in registry.describe("rewards") if entry.source == "built in"]
    written = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in written, "the table in docs/rewards.md should read:\n" + "\n".join(rows)


def test_the_cards_of_the_backbones_are_what_the_registry_says() -> None:
    rows = []
    for entry in registry.describe("backbones"):
        said = entry.constants
        cells = (", ".join(said["tasks"]), said["parameters"], said["licence"], said["paper"])
        rows.append(f"| `{entry.name}` | {' | '.join(cells)} |")
    written = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in written, "the table in docs/backbones.md should read:\n" + "\n".join(rows)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """As the usual renderers make them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name}: there is no {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: {path} has no heading {anchor}"


@pytest.mark.readme
def test_the_first_command_trains_as_written(tmp_path: Path) -> None:
    """In a copy of the checkout, with a new environment: install, train, and a report that shows the gain."""
    ask = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(ask, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\n")):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, target, follow_symlinks=False)
    quiet = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "OMP_"))}
    done = subprocess.run(["bash", "-euc", MARKED[0]], cwd=tmp_path, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "report.html").stat().st_size > 10_000
    report = [tmp_path / ".venv/bin/rlkit", "report", folder, "--json"]
    shown = subprocess.run(report, check=True, capture_output=True, text=True, env=quiet)
    strict = json.loads(shown.stdout)["held_out"]["strict"]
    assert strict["after"] - strict["before"] > 0.05, strict  # more than two standard errors
    print(done.stdout[-1500:])
