"""What TensorBoard gets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlkit.mirrors.content import SAMPLES, SHEET, Numbers, table


class TensorBoardMirror:
    """Event files: numbers over `at`, and those of a stage as STAGE/NAME over its own steps; each evaluation's sheet,
    and what is known of its pictures as a table of text."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, row: Numbers) -> None:
        for names, at in ((row.overall, row.at), (row.of_stage, row.step)):
            for name, value in names.items():
                self._writer.add_scalar(name, value, at)

    def sheet(self, path: Path) -> None:
        import numpy as np
        from PIL import Image

        known = table(path)
        with Image.open(path) as picture:
            self._writer.add_image(SHEET, np.asarray(picture.convert("RGB")), known.at, dataformats="HWC")
        lines = [known.columns, ["---"] * len(known.columns), *known.rows]
        self._writer.add_text(SAMPLES, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines), known.at)

    def alert(self, title: str, text: str, at: int) -> None:
        self._writer.add_text("alarms", f"**{title}** {text}", at)

    def keep(self, files: Sequence[Path]) -> None:
        """Nothing: it shows no files, and these lie beside its own."""

    def finish(self) -> None:
        self._writer.close()


def _cell(value: Any) -> str:
    """A value inside a table of Markdown, where a bar or the end of a line would end its cell."""
    words = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(words.replace("|", "\\|").split())
