"""What the mirrors of a run show of it, and that none of them can stop it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from wandb_server import Wandb

from rlkit import recipe, session
from rlkit.dist import Processes
from rlkit.errors import RecipeError
from rlkit.mirrors import mirror
from rlkit.mirrors.content import numbers, table
from rlkit.mirrors.mirror import Mirrors
from rlkit.record import write_sheet
from rlkit.run import Interrupted
from rlkit.tracking import Metrics, Tracker
from rlkit.types import Samples, Scores

COURSE = {"stages": {"edit": {"steps": 3}, "t2i": {"steps": 2}}}
WIDTH, HEIGHT, GIVEN, COLUMNS = 4, 2, 1, 8


def painted_sheet(folder: Path, at: int = 3) -> Path:
    """Ten pictures of an evaluation in two rows, each beside what its prompt came with: picture i is 10 i grey, what
    stands beside it 10 i + 5."""
    pixels = np.zeros((2 * HEIGHT, COLUMNS * 2 * WIDTH), dtype=np.uint8)
    items: list[dict[str, Any]] = []
    for i in range(10):
        top, left = i // COLUMNS * HEIGHT, i % COLUMNS * 2 * WIDTH
        pixels[top : top + HEIGHT, left : left + WIDTH] = 10 * i + 5
        pixels[top : top + HEIGHT, left + WIDTH : left + 2 * WIDTH] = 10 * i
        items.append({"prompt": f"make it {i}", "seed": i, "reward": i / 4, "colour": None if i == 2 else 1.0})
    items[1]["kind"] = "recolour"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{at:06d}.png"
    Image.fromarray(pixels).convert("RGB").save(file)
    known = {"stage": "edit", "step": at, "at": at, "width": WIDTH, "height": HEIGHT, "given": GIVEN}
    file.with_suffix(".json").write_text(json.dumps(known | {"columns": COLUMNS, "drawn": True, "items": items}))
    return file


def items_of(sheet: Path) -> list[dict[str, Any]]:
    """A sheet's JSON in the columns of the table, which has a place for what only some pictures have."""
    items = json.loads(sheet.with_suffix(".json").read_text())["items"]
    return [{**dict.fromkeys(("prompt", "seed", "reward", "colour", "kind")), **item} for item in items]


def row(at: int, stage: str = "edit", kind: str = "train", **more: Any) -> dict[str, Any]:
    return {"kind": kind, "stage": stage, "step": at - 3 if stage == "t2i" else at, "at": at, **more}


# ---- what is shown


def test_several_stages_have_their_numbers_twice_and_one_has_them_once() -> None:
    given = row(5, "t2i", kl=0.25, ends=True, text="words", grad_norm=None)
    known = numbers(given, several=True)
    assert (known.stage, known.step, known.at) == ("t2i", 2, 5)
    assert known.overall == {"step": 2, "at": 5, "kl": 0.25}
    assert known.of_stage == {"t2i/step": 2, "t2i/kl": 0.25}
    assert numbers(given, several=False).of_stage == {}
    assert numbers(row(5, "t2i", "event", value=1.0), several=True).of_stage == {}, "an alarm is of the run"


def test_the_table_is_what_the_sheet_s_json_says_beside_its_pictures(tmp_path: Path) -> None:
    sheet = painted_sheet(tmp_path)
    known = table(sheet)
    assert [dict(zip(known.columns, one, strict=True)) for one in known.rows] == items_of(sheet)
    for shift, name in ((0, "picture"), (5, "given")):
        colours = [np.unique(np.asarray(picture)).tolist() for picture in known.pictures[name]]
        assert colours == [[10 * i + shift] for i in range(10)]
        assert {picture.size for picture in known.pictures[name]} == {(WIDTH, HEIGHT)}
    columns, rows = known.with_pictures(lambda picture: picture.getpixel((0, 0))[0])
    assert columns == ["picture", "given", *known.columns]
    assert rows[7] == [70, 75, *known.rows[7]]


def test_a_sheet_says_the_kind_of_each_prompt_and_what_each_reward_gave(
    tmp_path: Path, samples_of: Callable[..., Samples]
) -> None:
    samples = samples_of(["a", "b"], group=1)
    first, second = samples.prompts
    samples = replace(samples, prompts=(replace(first, kind="count"), second))
    raw = torch.tensor([[1.0, 0.25], [0.0, torch.nan]])
    scores = Scores(("truth", "looks"), raw, torch.isfinite(raw), torch.tensor([1.0, 2.0]))
    known = table(write_sheet(tmp_path, {"stage": "main", "step": 0, "at": 0}, samples, scores))
    assert known.columns == ("prompt", "seed", "reward", "kind", "truth", "looks")
    assert known.rows == (("a", 0, 1.5, "count", 1.0, 0.25), ("b", 1, None, None, 0.0, None))


# ---- W&B

PROGRAM = """if True:
    from pathlib import Path
    from rlkit.tracking import Tracker
    report = Path("report.html")
    for at in (1, 2):
        report.write_text(f"report {at}")
        config = {"stages": {"edit": {"steps": 3}, "t2i": {"steps": 2}}}
        tracker = Tracker(Path("run"), config=config, wandb="online")
        end = {"stage": "edit", "step": at + 1, "at": at + 1}
        for step in (at, at + 1):
            tracker.write({"kind": "train", "stage": "edit", "step": step, "at": step, "reward/mean": step / 10})
        tracker.write({"kind": "evaluation", **end, "held_out/strict": at / 10})
        tracker.sheet(Path("samples/000003.png"))
        tracker.write({"kind": "event", "event": "alarm", **end, "monitor": "colour", "text": "too bright"})
        tracker.keep(lambda: [report])
        tracker.close()
"""


def two_sessions(folder: Path) -> Wandb:
    """A run and its resumption, which takes its last step once more, online against the stand-in."""
    painted_sheet(folder / "samples")
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text("the recipe")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    own = {name: str(folder / "own") for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC")}
    with Wandb() as server:
        environment = {**clean, **own, **server.environment(), "PYTHONPATH": ":".join(filter(None, sys.path))}
        command = [sys.executable, "-c", PROGRAM]
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "warning" not in ran.stdout, ran.stdout
    return server


def test_a_run_and_its_resumption_are_one_page_with_curves_tables_and_report(tmp_path: Path) -> None:
    server = two_sessions(tmp_path)
    identity = (tmp_path / "run" / "wandb" / "id").read_text()
    assert list(server.history) == list(server.configs) == [identity], "one run"
    assert server.configs[identity]["recipe"]["value"] == COURSE
    history = server.history[identity]
    rewards = [(line["at"], line["reward/mean"]) for line in history if "reward/mean" in line]
    assert rewards == [(1, 0.1), (2, 0.2), (2, 0.2), (3, 0.3)], "appended; a step that was taken twice is there twice"
    staged = [(line["edit/step"], line["edit/reward/mean"]) for line in history if "edit/reward/mean" in line]
    assert staged == rewards
    assert {line["stage"] for line in history if "reward/mean" in line} == {"edit"}
    summary = server.summary[identity]
    assert summary["held_out/strict"] == summary["edit/held_out/strict"] == 0.2
    assert summary["stage"] == "edit"
    assert server.alerts == {identity: ["edit, step 2: colour", "edit, step 3: colour"]}

    artifacts = server.artifacts()
    kept = artifacts.pop(f"report-{identity}")
    assert [files["report.html"] for files in kept] == [b"report 1", b"report 2"], "a version for each session"
    assert {files["recipe.yaml"] for files in kept} == {b"the recipe"}
    assert kept[-1]["metrics.jsonl"] == (tmp_path / "run" / Metrics.NAME).read_bytes()
    [tables] = artifacts.values()
    for files in tables:
        shown = json.loads(files["held_out/samples.table.json"])
        assert shown["columns"][:2] == ["picture", "given"]
        rows = [dict(zip(shown["columns"], one, strict=True)) for one in shown["data"]]
        for i, (one, item) in enumerate(zip(rows, items_of(tmp_path / "samples" / "000003.png"), strict=True)):
            assert {name: one[name] for name in item} == item
            assert (one["picture"]["width"], one["picture"]["height"]) == (WIDTH, HEIGHT)
            assert files[one["picture"]["path"]].startswith(b"\x89PNG")
            assert one["picture"]["sha256"] != one["given"]["sha256"], i


def test_each_number_of_a_stage_is_over_the_steps_of_that_stage(tmp_path: Path, monkeypatch: Any) -> None:
    axes: dict[str, Any] = {}
    run = SimpleNamespace(
        log=lambda numbers: None,
        finish=lambda: None,
        define_metric=lambda name, step_metric=None: axes.update({name: step_metric}),
    )
    monkeypatch.setattr("rlkit.mirrors.mirror._start_wandb", lambda *_, **__: run)
    mirrors = Mirrors(tmp_path, COURSE, print, wandb="offline")
    mirrors.log(row(2, kl=0.1))
    mirrors.log(row(4, "t2i", kl=0.2))
    assert axes == {"edit/step": None, "edit/kl": "edit/step", "t2i/step": None, "t2i/kl": "t2i/step"}


def test_offline_mode_with_the_real_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_RUN_ID", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    sheet, folder = painted_sheet(tmp_path), tmp_path / "run"
    for at in (1, 2):  # the second start continues the first one's page
        tracker = Tracker(folder, config={"stages": {"main": {"lr": 0.1}}}, wandb="offline", quiet=True)
        tracker.write(row(at, kl=0.1))
        tracker.sheet(sheet)
        tracker.keep(lambda: [sheet])
        assert list(tracker._mirrors._open), "it is still there"
        tracker.close()
    runs = {path.name.rsplit("-", 1)[1] for path in (folder / "wandb").glob("offline-run-*")}
    assert runs == {(folder / "wandb" / "id").read_text()}
    assert list((folder / "wandb").rglob("held_out/sheet*.png"))
    assert list((folder / "wandb").rglob("held_out/samples*.table.json"))


# ---- the others


def test_tensorboard_shows_curves_by_stage_sheets_and_what_they_are(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sheet = painted_sheet(tmp_path / "samples")
    mirrors = Mirrors(tmp_path, COURSE, pytest.fail, wandb="disabled", tensorboard=True)
    for one in (row(3, kl=0.25), row(4, "t2i", kl=0.5), row(4, "t2i", "evaluation", **{"held_out/strict": 1.0})):
        mirrors.log(one)
    mirrors.sheet(sheet)
    mirrors.alert("t2i, step 1: colour", "too bright", 4)
    mirrors.finish()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    read = {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert read["kl"] == [(3, 0.25), (4, 0.5)]
    assert (read["edit/kl"], read["t2i/kl"], read["t2i/held_out/strict"]) == ([(3, 0.25)], [(1, 0.5)], [(1, 1.0)])
    [image] = found.Images("held_out/sheet")
    assert (image.step, image.width, image.height) == (3, COLUMNS * 2 * WIDTH, 2 * HEIGHT)
    text = {name: found.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in found.Tags()["tensors"]}
    lines = text["held_out/samples/text_summary"].splitlines()
    assert lines[:3] == [
        "| prompt | seed | reward | colour | kind |",
        "| --- | --- | --- | --- | --- |",
        "| make it 0 | 0 | 0 | 1 |  |",
    ]
    assert lines[2 + 1] == "| make it 1 | 1 | 0.25 | 1 | recolour |"
    assert len(lines) == 2 + 10
    assert "edit" in text["recipe/text_summary"]
    assert text["alarms/text_summary"] == "**t2i, step 1: colour** too bright"


def test_trackio_has_one_run_of_two_sessions(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    program = """if True:
        import json
        from pathlib import Path
        from rlkit.tracking import Tracker
        config = {"stages": {"edit": {}, "t2i": {}}}
        for at in (2, 3):
            tracker = Tracker(Path("run"), config=config, wandb="disabled", trackio=True)
            tracker.write({"kind": "train", "stage": "edit", "step": at, "at": at, "kl": at / 8})
            tracker.sheet(Path("samples/000003.png"))
            tracker.keep(lambda: [Path("samples/000003.png")])
            tracker.close()
        import trackio
        [run] = trackio.Api().runs("rlkit")
        from trackio.sqlite_storage import SQLiteStorage
        print(json.dumps([run.name, SQLiteStorage.get_logs("rlkit", run.name)]))
    """
    painted_sheet(tmp_path / "samples")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "own"), "PYTHONPATH": ":".join(filter(None, sys.path))}
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    name, logs = json.loads(ran.stdout.splitlines()[-1])
    assert name == (tmp_path / "run" / "trackio").read_text()
    curve = [(one["step"], one["kl"], one["edit/kl"], one["stage"]) for one in logs if "kl" in one]
    assert curve == [(2, 0.25, 0.25, "edit"), (3, 0.375, 0.375, "edit")]
    shown = [one["held_out/samples"]["_value"] for one in logs if "held_out/samples" in one]
    assert len(shown) == 2
    for rows in shown:
        plain = [{key: value for key, value in one.items() if key not in ("picture", "given")} for one in rows]
        assert plain == items_of(tmp_path / "samples" / "000003.png")


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio")])
def test_a_missing_package_is_an_error_that_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RecipeError, match=rf"run\.{name}: .*pip install 'rlkit-visual\[{name}\]'"):
        Mirrors(tmp_path, {}, print, wandb="disabled", **{name: True})


def test_a_mirror_that_cannot_begin_says_so_at_the_start(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where its folder should be")
    with pytest.raises(RecipeError, match=r"run\.tensorboard: did not start: .*leave run\.tensorboard out"):
        Mirrors(tmp_path, {}, print, wandb="disabled", tensorboard=True)


class Deaf:
    """A mirror that fails at one kind of message and remembers the others."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.heard = fails, []

    def __getattr__(self, name: str) -> Any:
        def hear(*message: Any) -> None:
            self.heard.append(name)
            if name == self.fails:
                raise BrokenPipeError("gone")

        return hear


@pytest.mark.parametrize("fails", ["log", "sheet", "alert", "keep", "finish"])
def test_a_mirror_that_raises_is_one_warning_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    broken, whole, said = Deaf(fails), Deaf(), []
    monkeypatch.setattr(mirror, "_start_tensorboard", lambda *_: broken)
    monkeypatch.setattr(mirror, "_start_trackio", lambda *_: whole)
    mirrors = Mirrors(tmp_path, {}, said.append, wandb="disabled", tensorboard=True, trackio=True)
    for _ in range(2):
        mirrors.log(row(1))
        mirrors.sheet(tmp_path / "sheet.png")
        mirrors.alert("title", "text", 1)
        mirrors.keep([])
    mirrors.finish()
    assert said == ["warning: TensorBoard stopped (gone); the run goes on without it"]
    assert broken.heard.count(fails) == 1
    assert whole.heard == ["log", "sheet", "alert", "keep"] * 2 + ["finish"]


# ---- a whole run


@pytest.mark.parametrize("stopped", [False, True], ids=["to its end", "stopped"])
def test_a_run_tells_of_itself_while_its_mirrors_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_backbone: Path, stopped: bool
) -> None:
    words = [f"policy.backbone.path={small_backbone}", "run.tensorboard=true", "run.wandb=disabled", "run.device=cpu"]
    words += ["run.threads=1", "stages.main.steps=1", "stages.main.evaluate.held_out=8", "stages.main.evaluate.ends=8"]
    words += ["stages.main.data.per_step=2", "stages.main.data.group=2", "stages.main.learner.batch=8"]
    seen, told, page = Deaf(), [], tmp_path / "report.html"
    seen.keep = lambda files: seen.heard.append(tuple(file.name for file in files))
    monkeypatch.setattr(mirror, "_start_tensorboard", lambda *_: seen)

    def stop(run: Any) -> None:
        raise Interrupted("stopped")

    def tell() -> list[Path]:
        told.append(Metrics.read(tmp_path / "run")[-1]["event" if not stopped else "kind"])
        return [page]

    if stopped:
        monkeypatch.setattr(session, "train", stop)
        with pytest.raises(Interrupted):
            session.run(recipe.read("quickstart", words), tmp_path / "run", Processes(), quiet=True, tell=tell)
    else:
        session.run(recipe.read("quickstart", words), tmp_path / "run", Processes(), quiet=True, tell=tell)
    assert told == (["evaluation"] if stopped else ["finished"]), "once, and after all other rows"
    assert seen.heard[-2:] == [("report.html", "recipe.yaml", "metrics.jsonl"), "finish"]
    assert seen.heard.count("sheet") == (1 if stopped else 2)
