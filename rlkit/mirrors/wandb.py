"""What Weights & Biases gets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlkit.mirrors.content import SAMPLES, SHEET, Numbers, table


class WandbMirror:
    """A run of W&B: numbers under the names of metrics.jsonl, the name of the stage, and STAGE/NAME beside them; each
    evaluation's sheet, and the same pictures as a table with their scores; at the end an artifact, which a resumed run
    leaves another version of.

    Unprefixed names stay, for the metric of a sweep and for charts over the whole run.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._defined: set[str] = set()

    def log(self, row: Numbers) -> None:
        axis = f"{row.stage}/step"
        for name in sorted(row.of_stage.keys() - self._defined):  # one by one: of two patterns, which counts?
            self._run.define_metric(name, step_metric=None if name == axis else axis)
            self._defined.add(name)
        self._run.log({**row.overall, "stage": row.stage, **row.of_stage})

    def sheet(self, path: Path) -> None:
        import wandb

        known = table(path)
        columns, rows = known.with_pictures(wandb.Image)
        shown = wandb.Table(columns=columns, data=rows)
        self._run.log({SHEET: wandb.Image(str(path)), SAMPLES: shown, "at": known.at})

    def alert(self, title: str, text: str, at: int) -> None:
        self._run.alert(title=title, text=text)

    def keep(self, files: Sequence[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"report-{self._run.id}", type="report")
        for file in files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        self._run.finish()
