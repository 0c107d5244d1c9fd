"""Skills by their names: a folder of NAME.md, read whole when the tool starts.

What an agent writes is looked up among the names and never becomes a path, so that nothing outside of the folder can
be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path
from typing import Annotated

from rlkit.errors import DataError
from rlkit.tools import _index

NAMED = 20  # skills that an answer names when it has not the one that was asked for


@dataclass(frozen=True)
class QueryKnowledge:
    """The text of a skill, from a folder of skill files."""

    folder: str  # of NAME.md, one skill each; world: those of the atlas

    def start(self) -> None:
        """Read the folder: what is wrong with it is known before the first call."""
        _ = self._skills

    def __call__(self, skill: Annotated[str, "the name of a skill"]) -> str:
        """Read a skill: what is known about how to do something. An unknown name is answered with those that exist."""
        if skill in self._skills:
            return self._skills[skill]
        near = sorted(self._skills, key=lambda name: -SequenceMatcher(None, skill.lower(), name.lower()).ratio())
        more = f" and {len(near) - NAMED} more" if len(near) > NAMED else ""
        return f"There is no such skill. Known: {', '.join(near[:NAMED])}{more}."

    @cached_property
    def _skills(self) -> dict[str, str]:
        folder = _index.folder_of(self.folder, "skills")
        found = {file.stem: _text(file, folder) for file in sorted(folder.glob("*.md")) if file.name[0] != "."}
        if not found:
            raise DataError("no skills in this folder", where=str(folder), hint="Write each into a NAME.md there.")
        return found


def _text(file: Path, folder: Path) -> str:
    if not file.resolve().is_relative_to(folder.resolve()):
        raise DataError("this link leads out of the folder", where=str(file), hint="Copy the file in its place.")
    text = _index.text_of(file).strip()
    if not text:
        raise DataError("no text in this file", where=str(file))
    return text
