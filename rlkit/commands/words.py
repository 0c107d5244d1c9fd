"""What several commands read from their words."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlkit import recipe, sources
from rlkit.errors import RecipeError

if TYPE_CHECKING:
    from rlkit.stages import Setup


def positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {word!r}")
    return int(word)


def recipe_and_changes(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """(the recipe or None, overrides). The recipe is the first word, unless that changes a key."""
    if not words or sources.is_override(words[0]):
        return None, list(words)
    return words[0], list(words[1:])


def recipe_or_run(word: str, overrides: Sequence[str]) -> tuple[Setup, Path | None]:
    folder = Path(word)
    if not folder.is_dir():
        return recipe.read(word, overrides), None
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError("this folder is not a run: it has no recipe.yaml.", where=word)
    return recipe.read(str(folder / "recipe.yaml"), overrides), folder
