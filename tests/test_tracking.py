"""The record of a run, how its mirrors start and end, and its progress lines."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlkit.errors import DataError, RecipeError
from rlkit.mirrors.mirror import Mirrors
from rlkit.tracking import Expectation, Metrics, Progress, Tracker


def train(at: int, **numbers: Any) -> dict[str, Any]:
    return {"kind": "train", "stage": "main", "step": at, "at": at, **numbers}


def evaluation(at: int, **numbers: Any) -> dict[str, Any]:
    return {"kind": "evaluation", "stage": "main", "step": at, "at": at, **numbers}


# ---- metrics.jsonl


def test_rows_come_back_in_order_as_plain_json(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.append(train(1, kl=np.float32(0.5), grad_norm=math.nan, nested={"a": [math.inf, 2]}, words="é"))
    metrics.append(evaluation(1, ends=True))
    first, second = Metrics.read(tmp_path)
    assert first == train(1, kl=0.5, grad_norm=None, nested={"a": [None, 2]}, words="é")
    assert list(first)[:5] == ["kind", "stage", "step", "at", "kl"]
    assert second["ends"] is True


def test_a_row_without_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs stage, at"):
        Metrics(tmp_path).append({"kind": "train", "step": 1})


def test_a_torn_last_line_is_left_out_and_never_continued(tmp_path: Path) -> None:
    Metrics(tmp_path).append(train(1))
    path = tmp_path / Metrics.NAME
    path.write_bytes(path.read_bytes() + b'{"kind": "train", "words": "\xc3')
    assert Metrics.read(tmp_path) == [train(1)]
    Metrics(tmp_path).append(train(2))
    assert Metrics.read(tmp_path) == [train(1), train(2)]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / Metrics.NAME).write_text(f'{json.dumps(train(1))}\n{{"at":\n{json.dumps(train(2))}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        Metrics.read(tmp_path)


def test_rewind_keeps_the_checkpoint_s_own_rows_and_leaves_no_other_file(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    rows = [evaluation(0), train(1), train(2), evaluation(2), train(3), evaluation(3)]
    for row in rows:
        metrics.append(row)
    metrics.rewind(2)
    assert Metrics.read(tmp_path) == rows[:4]
    metrics.append(train(3))
    assert Metrics.read(tmp_path) == [*rows[:4], train(3)]
    metrics.rewind(0)
    assert Metrics.read(tmp_path) == rows[:1]
    assert [path.name for path in tmp_path.iterdir()] == [Metrics.NAME]


def test_rewind_of_a_run_without_rows(tmp_path: Path) -> None:
    Metrics(tmp_path).rewind(3)
    assert list(tmp_path.iterdir()) == []


def sheets(folder: Path, *stages: tuple[str, str]) -> Path:
    """(name, stage) of each; the JSON without a stage is torn."""
    folder.mkdir(parents=True)
    for name, stage in stages:
        (folder / f"{name}.png").write_bytes(b"picture")
        (folder / f"{name}.json").write_text(json.dumps({"stage": stage}) if stage else '{"sta')
    return folder


def test_rewind_forgets_the_sheets_of_the_rows_that_it_forgets_and_no_other_file(tmp_path: Path) -> None:
    of_first = [(name, "first") for name in ("000000", "000004-alarm", "000004", "000005", "000006-alarm")]
    of_second = [("000004-second", "second"), ("000003", "second"), ("1000000-second", "second")]
    folder = sheets(tmp_path / "samples", *of_first, *of_second, ("000002", ""), ("000007", ""))
    others = [folder / name for name in ("000009.txt", "mine.png", "notes.json", "9.png")]
    for file in others:
        file.write_text("kept")
    tracker = Tracker(tmp_path, config={}, wandb="disabled", quiet=True)
    tracker.rewind(4, ["second"])
    tracker.close()
    kept = [f"{name}.{end}" for name in ("000000", "000002", "000004", "000004-alarm") for end in ("json", "png")]
    assert sorted(file.name for file in folder.iterdir()) == sorted([*kept, *(file.name for file in others)])


# ---- expectations


@pytest.mark.parametrize(
    ("rule", "before", "after", "met"),
    [
        ("> before + 0.15", 0.25, 0.40625, True),
        ("> before + 0.15", 0.25, 0.40, False),  # equal is not larger
        (">= before", 0.5, 0.5, True),
        ("> before", 0.5, 0.5, False),
        ("<before-.1", 0.5, 0.3, True),
        ("<= 2e-2", 9.0, 0.02, True),
        ("< 0.02", 9.0, 0.02, False),
        ("> -1.5", 0.0, -1.0, True),
        ("> +3.", 0.0, 3.5, True),
    ],
)
def test_expectations(rule: str, before: float, after: float, met: bool) -> None:
    assert Expectation.parse(rule).met(before, after) is met


@pytest.mark.parametrize(
    "rule", ["", "before", "> after", "= 3", "> before + ", "> before 0.1", "> 1.2.3", "> 1 and < 2"]
)
def test_what_is_no_rule(rule: str) -> None:
    with pytest.raises(RecipeError, match=r"stages\.main\.expect.*no rule.*before \+ 0\.15"):
        Expectation.parse(rule, where="stages.main.expect")


# ---- W&B


def without_login(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_RUN_ID", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))


class FakeRun:
    id, url = "abc", "offline"

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log(self, row: Any) -> None:
        if self.rows and self.rows[-1] == "dead":
            raise BrokenPipeError("gone")
        self.rows.append(row)

    def finish(self) -> None:
        self.rows.append("finish")


def test_without_a_login_wandb_is_not_even_imported(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from rlkit.tracking import Tracker\n"
        "for mode in ('auto', 'disabled'):\n"
        "    tracker = Tracker(Path('run'), config={}, wandb=mode)\n"
        "    tracker.write({'kind': 'event', 'stage': 'main', 'step': 0, 'at': 0, 'event': 'resumed'})\n"
        "    tracker.close()\n"
        "print(sorted({'wandb', 'torch', 'rich', 'matplotlib', 'PIL'} & set(sys.modules)))"
    )
    environment = {"HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert [file.name for file in (tmp_path / "run").iterdir()] == [Metrics.NAME]


@pytest.mark.parametrize(
    ("environment", "netrc", "expected"),
    [
        ({}, "", None),
        ({"WANDB_API_KEY": "k"}, "", "online"),
        ({}, "machine api.wandb.ai login user password k\n", "online"),
        ({}, "machine github.com login user password k\n", None),
        ({"WANDB_BASE_URL": "https://wandb.here"}, "machine wandb.here login user password k\n", "online"),
        ({}, "machine", None),  # a damaged netrc is no login
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "", None),
        ({"WANDB_MODE": "offline"}, "", "offline"),
    ],
)
def test_auto_goes_online_only_with_a_login(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    netrc: str,
    expected: str | None,
) -> None:
    without_login(monkeypatch, tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".netrc").write_text(netrc)
    (tmp_path / ".netrc").chmod(0o600)
    modes: list[str] = []

    def start(mode: str, *_: Any, **__: Any) -> FakeRun:
        modes.append(mode)
        return FakeRun()

    monkeypatch.setattr("rlkit.mirrors.mirror._start_wandb", start)
    Mirrors(tmp_path, {}, lambda text: None, wandb="auto")
    assert modes == ([expected] if expected else [])


def test_a_failing_start_is_a_warning_in_auto_and_an_error_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("rlkit.mirrors.mirror._start_wandb", start)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    said: list[str] = []
    mirrors = Mirrors(tmp_path, {}, said.append, wandb="auto")
    mirrors.log(train(1))
    mirrors.finish()
    assert len(said) == 1
    assert "no route to host" in said[0]
    with pytest.raises(RecipeError, match=r"wandb=online.*no route to host.*wandb login"):
        Mirrors(tmp_path, {}, said.append, wandb="online")
    with pytest.raises(RecipeError, match="Did you mean 'offline'"):
        Mirrors(tmp_path, {}, said.append, wandb="ofline")


def test_w_and_b_gets_numbers_and_the_stage_and_its_death_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun()
    monkeypatch.setattr("rlkit.mirrors.mirror._start_wandb", lambda *_, **__: run)
    said: list[str] = []
    mirrors = Mirrors(tmp_path, {}, said.append, wandb="online")
    mirrors.log(evaluation(2, ends=True, kl=None, **{"held_out/strict": 0.5}))
    assert run.rows == [{"step": 2, "at": 2, "held_out/strict": 0.5, "stage": "main"}]
    run.rows.append("dead")
    mirrors.log(train(3))
    mirrors.log(train(4))
    mirrors.keep([tmp_path / "report.html"])
    mirrors.finish()
    assert [text for text in said if "warning" in text] == [
        "warning: Weights & Biases stopped (gone); the run goes on without it"
    ]


# ---- progress


def test_about_a_dozen_plain_lines_and_every_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(60, "main") as progress:
        for at in range(1, 61):
            progress.update(train(at, samples=128, **{"reward/mean": 0.5, "seconds/sample": 1.0, "seconds/train": 1.0}))
            if at % 20 == 0:
                numbers = {"held_out/strict": 0.25, "held_out/strict_se": 0.01, "held_out/strict/place": 0.5}
                progress.update(evaluation(at, count=1024, **numbers))
    lines = capsys.readouterr().out.splitlines()
    evaluations = [line for line in lines if "held out:" in line]
    assert evaluations[0] == "main 20/60  held out: strict 0.250 ± 0.010 (1,024 images)"
    assert len(evaluations) == 3
    assert 12 <= len(lines) - 3 <= 13
    assert lines[0].startswith("main 1/60  reward 0.500  64 samples/s")
    assert "left" not in lines[-2]
    assert "held-out strict 0.250" in lines[-2]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, "main", quiet=True) as progress:
        progress.update(train(1))
        progress.say("words")
    assert capsys.readouterr().out == ""


def test_on_a_terminal_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with Progress(4, "main", done=2) as progress:
        progress.update(train(3, **{"reward/mean": 0.5, "kl": 0.01}))
        progress.say("[not] markup")
    out = capsys.readouterr().out
    assert "3/4" in out
    assert "reward 0.500  kl 0.01" in out
    assert "[not] markup" in out


# ---- all three


def test_the_tracker_writes_says_and_rewinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path, config={}, wandb="disabled")
    tracker.say("before")
    tracker.stage("main", total=2)
    for at in (1, 2):
        tracker.write(train(at, **{"reward/mean": np.float64("nan")}))
    tracker.rewind(1)
    tracker.close()
    assert json.loads((tmp_path / Metrics.NAME).read_text()) == train(1, **{"reward/mean": None})
    assert capsys.readouterr().out.splitlines()[0] == "before"


def test_other_processes_leave_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path / "run", config={}, wandb="nonsense", first=False)
    tracker.stage("main", total=1)
    tracker.write(train(1))
    tracker.say("words")
    tracker.sheet(tmp_path / "sheet.png")
    tracker.rewind(0)
    tracker.keep(lambda: pytest.fail("the first process tells of the run"))
    tracker.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""
