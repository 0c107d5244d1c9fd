"""What trackio gets."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from rlkit.mirrors.content import SAMPLES, SHEET, Numbers, table


class TrackioMirror:
    """A run of trackio: numbers over `at`, STAGE/NAME beside them; each evaluation's sheet, and the same pictures as a
    table with their scores; at the end an artifact."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, row: Numbers) -> None:
        overall = {name: value for name, value in row.overall.items() if name != "step"}  # its own word for `at`
        self._run.log({**overall, "stage": row.stage, **row.of_stage}, step=row.at)

    def sheet(self, path: Path) -> None:
        import trackio

        known = table(path)
        columns, rows = known.with_pictures(trackio.Image)
        shown = trackio.Table(columns=columns, data=rows)
        self._run.log({SHEET: trackio.Image(str(path)), SAMPLES: shown}, step=known.at)

    def alert(self, title: str, text: str, at: int) -> None:
        with redirect_stdout(io.StringIO()):  # it prints what the run has just said
            self._run.alert(title=title, text=text, step=at)

    def keep(self, files: Sequence[Path]) -> None:
        import trackio

        artifact = trackio.Artifact(f"report-{self._run.id}", type="report")
        for file in files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        import trackio

        trackio.finish()  # and not the run's own, after which it would be finished once more at the process's end
