"""Sweeps: what a file may say, that nothing starts which a recipe refuses, and that nothing that was run is lost."""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rlkit import cli, recipe, recipe_course
from rlkit.errors import DataError, RecipeError
from rlkit.sweep import command as sweep
from rlkit.sweep import file as sweep_file
from rlkit.sweep import table as sweep_table
from rlkit.sweep import trials as sweep_trials
from rlkit.sweep.space import text_of
from rlkit.sweep.stop import Hyperband
from rlkit.sweep.trials import Board, Crew, Trial
from rlkit.tracking import Metrics

LR, WINDOW = "stages.main.learner.lr", "stages.main.algorithm.window"
CLIP = "stages.main.algorithm.clip"
COMMAND = ["${env}", "${program}", "train", "quickstart", "${args_no_hyphens}"]


READ: dict[tuple[str, ...], object] = {}  # recipes: most tests have the same two settings


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """No pause between two looks at the trials; no recipe read twice; and no thread count of another test's."""
    real = recipe.read

    def read(name, words=()):
        if name != "quickstart":  # a file may change
            return real(name, words)
        key = (name, *words)
        if key not in READ:
            READ[key] = real(name, words)
        return READ[key]

    monkeypatch.setattr(sweep_file.recipe, "read", read)
    monkeypatch.setattr(sweep_trials, "PAUSE", 0)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])


def a_file(folder: Path, **changes) -> Path:
    """A sweep file of two settings; a change to None takes a key out."""
    node = {"program": "rlkit", "command": COMMAND, "method": "grid"}
    node |= {"metric": {"name": "held_out/strict", "goal": "maximize"}, "parameters": {LR: {"values": [0.001, 0.002]}}}
    node = {key: value for key, value in (node | changes).items() if value is not None}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(node, sort_keys=False))
    return path


def parse(*words):
    parser = argparse.ArgumentParser()
    sweep.arguments(parser)
    return parser.parse_intermixed_args([str(word) for word in words])


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_wandb_reads_it(tmp_path):
    words = ["python", "-m", "rlkit.cli", "train", "quickstart", "run.seed=3", "${args_no_hyphens}", "--nproc", "2"]
    stop = {"type": "hyperband", "min_iter": 3}
    more = {"name": "mine", "project": "rlkit", "early_terminate": stop, "run_cap": 5}
    found = sweep_file.read(a_file(tmp_path, command=words, **more))
    assert (found.recipe, found.words) == ("quickstart", ("run.seed=3", "--nproc", "2"))
    assert (found.metric.name, found.maximize, found.cap) == ("held_out/strict", True, 5)
    assert found.hyperband == Hyperband(min_iter=3)
    assert found.settings() == [{LR: 0.001}, {LR: 0.002}]
    assert sweep_file.check_setting(found, (), found.settings()[1]).stages[0].learner.lr == 0.002


def test_a_grid_is_every_combination_in_the_order_of_the_file(tmp_path):
    both = {WINDOW: {"values": [2, 4]}, LR: {"values": [0.1, 0.2]}, "run.device": {"value": "cpu"}}
    points = [tuple(one.values()) for one in sweep_file.read(a_file(tmp_path, parameters=both)).settings()]
    assert points == [(2, 0.1, "cpu"), (2, 0.2, "cpu"), (4, 0.1, "cpu"), (4, 0.2, "cpu")]


def test_random_settings_are_a_function_of_their_number(tmp_path):
    drawn = {LR: {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-1}, WINDOW: {"min": 1, "max": 9}}
    long, short = (sweep_file.read(a_file(tmp_path, method="random", parameters=drawn, run_cap=n)) for n in (40, 4))
    several = [one.setting for one in sweep.planned(long, (), 1)]
    assert several[:4] == [one.setting for one in sweep.planned(short, (), 1)]
    assert several[:4] != [one.setting for one in sweep.planned(short, (), 2)]
    assert all(1e-5 <= one[LR] <= 1e-1 and 1 <= one[WINDOW] <= 9 for one in several)
    assert 10 < sum(one[LR] < 1e-3 for one in several) < 30, "half of them below the geometric middle"
    few = sweep_file.read(a_file(tmp_path, method="random", parameters={WINDOW: {"values": [1, 2, 4]}}, run_cap=9))
    assert sorted(one.setting[WINDOW] for one in sweep.planned(few, (), 1)) == [1, 2, 4], "none of them twice"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metod": "grid"}, r"mine\.yaml: metod: no such key. Did you mean 'method'\?"),
        ({"stages": {}}, r"stages: no such key.*looks like a recipe: rlkit train"),
        ({"program": None, "metric": None}, "a sweep needs program, metric"),
        ({"method": "gird"}, "method: no method 'gird'. Did you mean 'grid'"),
        ({"method": "random"}, "run_cap: random has no end"),
        ({"run_cap": 0}, "run_cap: must be a whole number"),
        ({"metric": {"name": "held_out/strict"}}, "metric.*goal"),
        ({"metric": {"name": "held_out/strict", "goal": "up"}}, "metric.*goal"),
        ({"early_terminate": {"type": "hyperband"}}, "needs min_iter, or max_iter and s"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 9}}, "max_iter needs s"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 2, "s": 1}}, "no bracket"),
        ({"early_terminate": {"type": "envelope", "min_iter": 1}}, "must be hyperband"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 1}}, "eta must be above 1"),
        ({"early_terminate": {"type": "hyperband", "min_itr": 1}}, "Did you mean 'min_iter'"),
        ({"parameters": {}}, "parameters: must be a mapping"),
        ({"parameters": {LR: {"values": []}}}, rf"parameters\.{LR}: values is empty"),
        ({"parameters": {LR: {"min": 0.1, "max": 1.0}}}, rf"parameters\.{LR}: a grid has no end"),
        ({"parameters": {LR: {"min": 1, "max": 5000}}}, "a grid of 5,000 settings"),
        ({"parameters": {"run.dir": {"value": "here"}}}, "a folder of its own"),
        ({"command": "rlkit train quickstart"}, "must be a list of words"),
        ({"command": [*COMMAND[:2], "check", "quickstart", COMMAND[-1]]}, "does not start `rlkit train`"),
        ({"program": "train.py"}, "does not start `rlkit train`"),
        ({"command": [*COMMAND[:4], "${args}"]}, r"\$\{args\} writes what a recipe does not read"),
        ({"command": COMMAND[:4]}, r"needs \$\{args_no_hyphens\} once"),
        ({"command": [*COMMAND[:3], COMMAND[-1]]}, "names no recipe"),
        ({"command": [*COMMAND, "--resume", "runs/x"]}, "--resume is for one run"),
        ({"command": [*COMMAND, f"{LR}=1.0"]}, "sets a key that is swept"),
        ({"command": [*COMMAND, "run.dir=here"]}, "a folder of its own"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(changes, said, tmp_path):
    with pytest.raises(RecipeError, match=said) as refused:
        sweep_file.read(a_file(tmp_path, **changes))
    assert "mine.yaml" in str(refused.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"there is no file .*min\.yaml.*Did you mean .*mine\.yaml"):
        sweep_file.read(a_file(tmp_path).with_name("min.yaml"))
    (tmp_path / "mine.yaml").write_text("method: [grid\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml:2:1: this is not YAML"):
        sweep_file.read(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("[grid]\n")
    with pytest.raises(RecipeError, match="a sweep has keys and values"):
        sweep_file.read(tmp_path / "mine.yaml")


def test_a_sweep_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="this is a sweep"):
        recipe.read(str(a_file(tmp_path)))


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({LR: {"value": 1}, "stages.main.learner.lrr": {"values": [1]}}, "parameters.stages.main.learner.lrr: "),
        ({"stages.main.learner.lrr": {"values": [1]}}, "Did you mean 'lr'?"),
        ({"stages.man.steps": {"values": [1]}}, "Did you mean 'main'?"),
        ({"stages.main.steps": {"values": [2, "many"]}}, "parameters.stages.main.steps: stages.main.steps=many: "),
        ({WINDOW: {"value": 4}, f"{WINDOW}_start": {"value": [7, 7]}}, f"parameters.{WINDOW} and parameters.{WINDOW}_"),
    ],
)
def test_what_a_trial_would_refuse_is_refused_before_any_starts(parameters, said, tmp_path, monkeypatch):
    def never(*words):
        raise AssertionError("nothing may start")

    monkeypatch.setattr(sweep_trials, "start", never)
    file = a_file(tmp_path, parameters=parameters, command=[*COMMAND, "stages.main.learner.batch=192"])
    with pytest.raises(RecipeError) as refused:
        sweep.run(parse(file, "--dir", tmp_path / "out"))
    assert str(refused.value).startswith(f"{file}: parameters.")
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_the_command_itself_may_be_at_fault(tmp_path):
    found = sweep_file.read(a_file(tmp_path, command=[*COMMAND, "stages.main.learner.bach=8"]))
    with pytest.raises(RecipeError, match=r"mine\.yaml: command: .*Did you mean 'batch'"):
        sweep_file.check_setting(found, (), found.settings()[0])


def test_the_ends_of_a_bayes_sweep_are_tried(tmp_path):
    far = {LR: {"min": -1.0, "max": 0.1}}
    with pytest.raises(RecipeError, match=rf"parameters\.{LR}: {LR}=-.*lr must be above 0"):
        sweep.run(parse(a_file(tmp_path, method="bayes", run_cap=3, parameters=far), "--dir", tmp_path / "out"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which sweep?"),
        (["run.seed=1"], "which sweep?"),
        (["{file}", f"{LR}=3"], "sets a key that is swept"),
        (["{file}", "run.seed=3", "--seeds", "0,1"], "run.seed is set already"),
        (["{file}", "--dir", "{folder}"], "exists and is not empty"),
        (["{file}", "--dir", "{folder}/a,b"], "command line: run.dir: needs one value"),
        (["{file}", "--resume", "{folder}"], "goes on as it began"),
        (["--resume", "{folder}"], "there is no sweep here"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(words, said, tmp_path):
    file = a_file(tmp_path)
    with pytest.raises((RecipeError, DataError)) as refused:
        sweep.run(parse(*(word.format(file=file, folder=tmp_path) for word in words)))
    assert said in str(refused.value)


def test_seeds_are_given_once(tmp_path):
    file = a_file(tmp_path, parameters={"run.seed": {"values": [0, 1]}})
    with pytest.raises(RecipeError, match="has seeds of its own"):
        sweep.run(parse(file, "--seeds", "0,1"))
    for word in ("0,x", "1,1", ""):
        with pytest.raises(SystemExit):
            parse(file, "--seeds", word)


# ---- trials ----------------------------------------------------------------------------------------------------------


class Child:
    """A trial that logs the next of its values whenever it is looked at, and ends behind the last."""

    pid = 2**22 + 1  # no process has it

    def __init__(self, words, log, values, fails=False):
        self.words, self.log, self.values, self.fails = words, log, list(values), fails
        self.folder = Path(next(word for word in words if word.startswith("run.dir=")).removeprefix("run.dir="))
        self.signals, self.code, self.step = [], None, 0
        self.folder.mkdir(exist_ok=True)
        (self.folder / "recipe.yaml").write_text("{}")

    def write(self, kind, **more):
        self.step += 1
        Metrics(self.folder).append({"kind": kind, "stage": "main", "step": self.step, "at": self.step, **more})

    def poll(self):
        if self.code is None:
            if self.signals:
                self.write("event", event="interrupted")
                self.code = 130
            elif self.values:
                self.write("evaluation", **{"held_out/strict": self.values.pop(0)})
            elif self.fails:
                self.log.write_text("Traceback (most recent call last):\n  ...\nRuntimeError: no luck\n\n")
                self.code = 1
            else:
                self.write("event", event="finished")
                self.code = 0
        return self.code

    def send_signal(self, number):
        self.signals.append(number)

    def terminate(self):
        self.signals.append("terminate")

    def wait(self):
        self.signals.append("wait")


@pytest.fixture
def begun(monkeypatch):
    """The trials that were begun, none of them in a process. `values`: what one logs, by its name;
    `stop`: at whose beginning somebody presses Ctrl+C; `fails`: which ends badly."""

    class Begun(list):
        values, stop, fails = {}, "", ""
        environments = []

    record = Begun()

    def start(words, log, environment):
        child = Child(words, log, record.values.get(log.stem, [0.1, 0.5]), fails=log.stem == record.fails)
        record.append(child)
        record.environments.append(environment)
        if log.stem == record.stop:
            os.kill(os.getpid(), signal.SIGINT)
        return child

    monkeypatch.setattr(sweep_trials, "start", start)
    return record


def names(begun):
    return [child.folder.name for child in begun]


def test_every_setting_has_its_first_seed_before_any_has_its_second(tmp_path, begun, capsys):
    file = a_file(tmp_path)
    assert sweep.run(parse(file, "--seeds", "5,6", "--dir", tmp_path / "out", "stages.main.steps=7")) == 0
    assert [[word for word in one.words if "lr=" in word or "seed=" in word] for one in begun] == [
        [f"{LR}=0.001", "run.seed=5"],
        [f"{LR}=0.002", "run.seed=5"],
        [f"{LR}=0.001", "run.seed=6"],
        [f"{LR}=0.002", "run.seed=6"],
    ]
    one = begun[0]
    assert one.words[:2] == ["train", "quickstart"]
    assert "stages.main.steps=7" in one.words
    assert "--resume" not in one.words
    assert "trial-003: finished, held_out/strict 0.5" in capsys.readouterr().out


def test_the_machine_is_shared_out(tmp_path, begun, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,9")
    assert Crew.of(2) == Crew(2, 4, ("4,5", "6,7"))
    assert Crew.of(16) == Crew(16, 1, ())
    own = sweep_file.read(a_file(tmp_path, command=[*COMMAND, "--nproc", "2"]))
    assert Crew.of(2, own.processes).threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Crew.of(2).threads == 3
    sweep.run(parse(a_file(tmp_path), "--dir", tmp_path / "out", "--workers", "2"))
    assert [one["CUDA_VISIBLE_DEVICES"] for one in begun.environments] == ["4,5", "6,7"]
    assert {one["OMP_NUM_THREADS"] for one in begun.environments} == {"3"}
    assert all("run.threads=3" in one.words for one in begun)
    sweep.run(parse(a_file(tmp_path), "--dir", tmp_path / "again", "run.threads=1"))
    assert "run.threads=3" not in begun[-1].words


def test_a_failure_costs_one_trial_and_says_its_last_line(tmp_path, begun, capsys):
    begun.fails = "trial-000"
    assert sweep.run(parse(a_file(tmp_path), "--dir", tmp_path / "out")) == 1
    assert names(begun) == ["trial-000", "trial-001"]
    assert "trial-000: failed, held_out/strict 0.5: RuntimeError: no luck" in capsys.readouterr().out
    assert "trial-000 failed: RuntimeError: no luck" in (tmp_path / "out" / "table.md").read_text()
    begun.fails = ""
    assert sweep.run(parse("--resume", tmp_path / "out")) == 0
    assert names(begun)[2:] == ["trial-000"], "what finished is not run again"
    assert begun[-1].words[-2:] == ["--resume", str(tmp_path / "out" / "trial-000")]


def test_ctrl_c_asks_the_trials_to_save_themselves_and_the_sweep_goes_on_later(tmp_path, begun, capsys):
    file = a_file(tmp_path, parameters={LR: {"values": [0.001, 0.002, 0.003, 0.004]}})
    begun.stop = "trial-002"
    before = signal.getsignal(signal.SIGINT)  # in the background it is ignored
    assert sweep.run(parse(file, "--dir", tmp_path / "out", "--workers", "2")) == 130
    assert f"rlkit sweep --resume {tmp_path / 'out'}" in capsys.readouterr().err
    assert begun[2].signals == [signal.SIGINT]
    states = [one.state for one in Board.open(tmp_path / "out").trials.values()]
    assert states.count("interrupted") >= 1
    assert states[3] in ("waiting", "interrupted")
    done = [name for name, state in zip(names(begun), states, strict=False) if state == "finished"]
    file.unlink()  # the folder has all that it needs
    begun.stop, count = "", len(begun)
    assert sweep.run(parse("--resume", tmp_path / "out")) == 0
    assert set(names(begun[count:])).isdisjoint(done)
    assert all(one.state == "finished" for one in Board.open(tmp_path / "out").trials.values())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_trial_that_somebody_else_interrupted_is_gone_on_with(tmp_path, begun, monkeypatch, capsys):
    def start(words, log, environment):
        child = Child(words, log, [0.1, 0.5])
        begun.append(child)
        if len(begun) == 1:
            child.send_signal(signal.SIGINT)  # not by the sweep
        return child

    monkeypatch.setattr(sweep_trials, "start", start)
    assert sweep.run(parse(a_file(tmp_path), "--dir", tmp_path / "out")) == 130
    assert f"interrupted; go on with: rlkit sweep --resume {tmp_path / 'out'}" in capsys.readouterr().err
    assert [one.state for one in Board.open(tmp_path / "out").trials.values()] == ["interrupted", "finished"]
    assert sweep.run(parse("--resume", tmp_path / "out")) == 0
    assert names(begun) == ["trial-000", "trial-001", "trial-000"]


def test_asked_again_and_again_the_trials_are_ended_at_once(tmp_path, begun, monkeypatch):
    class Stubborn(Child):
        def poll(self):
            if signal.SIGKILL in self.signals:
                return -9
            os.kill(os.getpid(), signal.SIGINT)
            return None

    started = []

    def start(words, log, environment):
        started.append(Stubborn(words, log, []))
        return started[-1]

    monkeypatch.setattr(sweep_trials, "start", start)
    assert sweep.run(parse(a_file(tmp_path), "--dir", tmp_path / "out")) == 130
    assert started[0].signals == [signal.SIGINT, signal.SIGINT, signal.SIGKILL]


def test_whatever_goes_wrong_no_process_stays_behind(tmp_path, begun, monkeypatch):
    def broken(*words):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(sweep_trials, "_look", broken)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        sweep.run(parse(a_file(tmp_path), "--dir", tmp_path / "out"))
    assert begun[0].signals == ["terminate", "wait"]


def test_who_is_behind_is_stopped_as_by_ctrl_c(tmp_path, begun, capsys):
    begun.values = {"trial-000": [0.1, 0.5, 0.6], "trial-001": [0.1, 0.2, 0.9]}
    file = a_file(tmp_path, early_terminate={"type": "hyperband", "min_iter": 2})
    assert sweep.run(parse(file, "--dir", tmp_path / "out")) == 0, "to be stopped is no failure"
    assert begun[1].signals == [signal.SIGINT]
    assert begun[1].values == [0.9], "after its second value"
    stopped = Board.open(tmp_path / "out").trials["trial-001"]
    assert (stopped.state, stopped.why) == ("stopped", "behind at value 2 of held_out/strict")
    assert "stopped after 2 values" in (tmp_path / "out" / "table.md").read_text()
    assert sweep.run(parse("--resume", tmp_path / "out")) == 0
    assert len(begun) == 2, "a stopped trial stays stopped"


def test_a_trial_that_outlived_its_sweep_is_not_run_beside_itself(tmp_path, begun, monkeypatch):
    sweep.run(parse(a_file(tmp_path), "--dir", tmp_path / "out"))
    board = Board.open(tmp_path / "out")
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("no /proc here")
    lost = Trial("trial-000", {LR: 0.001}, state="running", process=os.getpid())
    board.put(lost)
    assert sweep_trials.still_running(board) == [], "the number is another process's by now"
    assert not sweep_trials._alive(Child.pid, board.place(lost))
    monkeypatch.setattr(sweep, "still_running", lambda board: [lost])
    with pytest.raises(RecipeError, match=rf"trial-000 still runs.*kill -INT {os.getpid()}"):
        sweep.run(parse("--resume", tmp_path / "out"))


@pytest.mark.parametrize("written", ["out/trial-000", "../{name}/out/trial-000", "{folder}/out/trial-000"])
def test_a_trial_is_found_however_its_folder_was_written(written, tmp_path, monkeypatch):
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("no /proc here")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    word = "run.dir=" + written.format(name=tmp_path.name, folder=tmp_path)
    # Without its site packages Python starts at once; what it waits for is the end of this test.
    waits = [sys.executable, "-S", "-E", "-c", "print(flush=True); input()", "train", word]
    own = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(waits, cwd=tmp_path, **own) as process:
        process.stdout.readline()  # until it runs, its command line is empty
        lost = Trial("trial-000", {LR: 0.001}, state="running", process=process.pid)
        monkeypatch.chdir(tmp_path)
        for folder in (tmp_path / "out", Path("out"), tmp_path / "link" / "out"):
            assert sweep_trials.still_running(Board(folder, {}, {"trial-000": lost})) == [lost], folder
        monkeypatch.chdir(tmp_path / "elsewhere")
        for folder in (Path("out"), tmp_path / "ou", tmp_path):
            assert sweep_trials.still_running(Board(folder, {}, {"trial-000": lost})) == [], folder


def test_a_recipe_that_changed_is_not_gone_on_with(tmp_path, begun):
    own = tmp_path / "own.yaml"
    own.write_text("defaults: [quickstart, _self_]\n")
    file = a_file(tmp_path, command=[*COMMAND[:3], str(own), COMMAND[-1]])
    sweep.run(parse(file, "--dir", tmp_path / "out"))
    own.write_text("defaults: [quickstart, _self_]\nstages: {main: {steps: 9}}\n")
    with pytest.raises(RecipeError, match=r"own\.yaml has changed since the sweep began"):
        sweep.run(parse("--resume", tmp_path / "out"))


def test_bayes_chooses_from_what_the_others_brought(tmp_path, begun, monkeypatch):
    places = {CLIP: {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-1}}
    file = a_file(tmp_path, method="bayes", run_cap=9, parameters=places)

    def start(words, log, environment):
        clip = float(next(word for word in words if word.startswith(CLIP)).partition("=")[2])
        begun.append(Child(words, log, [-((math.log10(clip) + 2) ** 2)]))
        return begun[-1]

    monkeypatch.setattr(sweep_trials, "start", start)
    assert sweep.run(parse(file, "--dir", tmp_path / "out", "--workers", "2")) == 0
    trials = list(Board.open(tmp_path / "out").trials.values())
    assert len(trials) == len({one.setting[CLIP] for one in trials}) == 9
    away = [abs(math.log10(one.setting[CLIP]) + 2) for one in trials]
    assert min(away) < 0.05, "nine random draws come as near one time in five"
    assert sum(away[5:]) / 4 < sum(away[:4]) / 4
    again = sweep.run(parse("--resume", tmp_path / "out"))
    assert (again, len(begun)) == (0, 9)


def test_bayes_takes_seeds_for_measurements_of_one_setting(tmp_path):
    own = {CLIP: {"min": 0.0, "max": 1.0}, "run.seed": {"min": 0, "max": 9}}
    found = sweep_file.read(a_file(tmp_path, method="bayes", run_cap=9, parameters=own))
    assert (
        sweep._place(found, {CLIP: 0.25, "run.seed": 0}) == sweep._place(found, {CLIP: 0.25, "run.seed": 9}) == [0.25]
    )
    alone = sweep_file.read(a_file(tmp_path, method="bayes", run_cap=9, parameters={"run.seed": own["run.seed"]}))
    board = a_board(tmp_path, [({"run.seed": seed}, None, "finished", [0.5]) for seed in (0, 1, 2)])
    board.facts["draw"] = 1
    assert sweep.proposed(alone, board)["run.seed"] not in (0, 1, 2), "nothing to search, and yet another seed"


def test_two_values_that_do_not_go_together_cost_bayes_one_trial(tmp_path, begun, monkeypatch):
    file = a_file(tmp_path, method="bayes", run_cap=2, parameters={LR: {"min": 0.001, "max": 0.1}})
    coming = iter([{LR: -1.0}, {LR: 0.01}])
    monkeypatch.setattr(sweep, "proposed", lambda found, board: next(coming))
    assert sweep.run(parse(file, "--dir", tmp_path / "out")) == 0
    assert [one.state for one in Board.open(tmp_path / "out").trials.values()] == ["refused", "finished"]
    assert sweep.run(parse("--resume", tmp_path / "out")) == 0
    assert len(begun) == 1


def test_a_metric_that_nobody_logs_is_said(tmp_path, begun):
    metric = {"name": "heldout/strict", "goal": "maximize"}
    assert sweep.run(parse(a_file(tmp_path, metric=metric), "--dir", tmp_path / "out")) == 0
    said = "trial-000 finished: heldout/strict was never logged. Did you mean 'held_out/strict'?"
    assert said in (tmp_path / "out" / "table.md").read_text()
    assert json.loads((tmp_path / "out" / "table.json").read_text())["best"] is None


@pytest.mark.parametrize("split", ["held_out", "validation"])
def test_choosing_on_the_test_prompts_is_never_silent(split, tmp_path, begun, capsys):
    word = f"stages.main.data.held_out_split={split}"
    sweep.run(parse(a_file(tmp_path), word, "--dir", tmp_path / "out"))
    said = capsys.readouterr().err
    assert said.count("warning:") == (split == "held_out")
    assert ("Add stages.main.data.held_out_split=validation to the command" in said) == (split == "held_out")
    sweep.run(parse(a_file(tmp_path, metric={"name": "reward/mean", "goal": "maximize"}), "--dir", tmp_path / "other"))
    assert "warning" not in capsys.readouterr().err


def test_a_value_that_a_resume_measured_again_counts_once(tmp_path):
    board = Board(tmp_path, {}, {})
    trial = Trial("trial-000", {})
    metrics = Metrics(board.place(trial))
    for step, value in ((0, 0.1), (5, 0.2), (5, 0.25), (10, None), (10, 0.4)):
        row = {"kind": "evaluation", "stage": "main", "step": step, "at": step}
        metrics.append({**row, "held_out/strict": value})
    assert board.values(trial, "held_out/strict") == [0.1, 0.25, 0.4]
    assert board.values(Trial("trial-001", {}), "held_out/strict") == []


def test_a_child_is_a_session_of_its_own_with_a_log(tmp_path, monkeypatch):
    probe = tmp_path / "probe"
    probe.write_text(f"#!{sys.executable}\nimport os, sys\nprint(os.getsid(0) == os.getpid(), sys.argv[1:])\n")
    probe.chmod(0o755)
    monkeypatch.setattr(sweep_trials.sys, "executable", str(probe))
    log = tmp_path / "log"
    log.write_text("before\n")
    assert sweep_trials.start(["train", "x"], log, os.environ).wait() == 0
    assert sweep_trials.last_line(log) == "True ['-m', 'rlkit.cli', 'train', 'x']"
    assert log.read_text().startswith("before\n"), "a resumed trial adds to its log"


def test_a_damaged_record_is_refused(tmp_path):
    (tmp_path / Board.NAME).write_text("{}")
    with pytest.raises(DataError, match="is no record of a sweep"):
        Board.open(tmp_path)


def test_real_trials_leave_runs_like_any_other(tmp_path, small_backbone, monkeypatch):
    class Ended:
        pid = Child.pid

        def __init__(self, code):
            self.code = code

        def poll(self):
            return self.code

    monkeypatch.setattr(sweep_trials, "start", lambda words, log, env: Ended(cli.main([*words, "--quiet"])))
    small = [f"policy.backbone.path={small_backbone}", "stages.main.learner.batch=8", "stages.main.steps=1"]
    small += ["stages.main.data.per_step=2", "stages.main.data.group=2", "stages.main.evaluate.held_out=8"]
    small += ["stages.main.evaluate.ends=8", "stages.main.learner.ema=null", "stages.main.evaluate.weights=current"]
    file = a_file(tmp_path, command=[*COMMAND, *small], parameters={LR: {"values": [0.001, 0.01]}})
    assert sweep.run(parse(file, "--dir", tmp_path / "out")) == 0
    told = json.loads((tmp_path / "out" / "table.json").read_text())
    ran = [json.loads((tmp_path / "out" / f"trial-00{i}" / "environment.json").read_text()) for i in (0, 1)]
    assert f"{LR}=0.01" in ran[1]["command"]
    for row in told["rows"]:
        (trial,) = row["trials"]
        rows = Metrics.read(Path(trial["path"]))
        strict = [one["held_out/strict"] for one in rows if "held_out/strict" in one]
        assert (row["mean"], trial["logged"]) == (strict[-1], 2)


# ---- the table -------------------------------------------------------------------------------------------------------


def a_board(folder: Path, trials: list[tuple[dict, int | None, str, list[float]]]) -> Board:
    board = Board(folder, {"words": ["stages.main.steps=9"]}, {})
    for i, (setting, seed, state, values) in enumerate(trials):
        trial = Trial(f"trial-{i:03}", setting, seed, state)
        board.put(trial)
        metrics = Metrics(board.place(trial))
        for step, value in enumerate(values):
            metrics.append({"kind": "evaluation", "stage": "main", "step": step, "at": step, "held_out/strict": value})
    return board


def test_seeds_are_one_row_with_their_mean_and_spread(tmp_path):
    own = sweep_file.read(a_file(tmp_path, parameters={LR: {"values": [1, 2]}, "run.seed": {"values": [0, 1]}}))
    runs = [(1, 0, [0.9, 0.2]), (1, 1, [0.9, 0.4]), (2, 0, [0.5]), (2, 1, [0.7])]
    board = a_board(tmp_path, [({LR: lr, "run.seed": seed}, None, "finished", v) for lr, seed, v in runs])
    told = sweep_table.facts(own, board)
    first, second = told["rows"]
    assert (first["setting"], first["n"], first["min"], first["max"]) == ({LR: 2}, 2, 0.5, 0.7)
    assert first["mean"] == pytest.approx(0.6)
    assert first["std"] == pytest.approx(math.sqrt(0.02))
    assert second["mean"] == pytest.approx(0.3), "the last value, not the best"
    assert [one["seed"] for one in first["trials"]] == [0, 1]
    assert told["best"]["command"] == f"rlkit train quickstart stages.main.steps=9 {LR}=2"
    text = sweep_table.markdown(told)
    assert text.splitlines()[0] == "| lr | held_out/strict | min to max | std | n | state | trials |"
    assert text.splitlines()[2] == "| 2 | 0.6 | 0.5 to 0.7 | 0.14 | 2 | finished | trial-002, trial-003 |"
    less = sweep_file.read(a_file(tmp_path, metric={"name": "held_out/strict", "goal": "minimize"}))
    assert [row["setting"][LR] for row in sweep_table.facts(less, board)["rows"]] == [1, 2]


def test_other_numbers_of_the_same_trials_stand_beside_the_metric(tmp_path):
    own = sweep_file.read(a_file(tmp_path, parameters={LR: {"values": [1, 2]}, "run.seed": {"values": [0, 1]}}))
    board = a_board(tmp_path, [({LR: 1, "run.seed": seed}, None, "finished", [0.5, 0.6]) for seed in (0, 1)])
    for trial, values in zip(board.trials.values(), ([0.9, 0.2], [0.4]), strict=True):
        for step, value in enumerate(values, 10):
            row = {"kind": "evaluation", "stage": "main", "step": step, "at": step}
            Metrics(board.place(trial)).append(row | {"held_out/strict/count": value})
    board.facts["show"] = ["held_out/strict/count", "held_out/strikt"]
    told = sweep_table.facts(own, board)
    count = told["rows"][0]["more"]["held_out/strict/count"]
    assert (count["mean"], count["n"]) == (pytest.approx(0.3), 2), "the last of each"
    assert count["std"] == pytest.approx(math.sqrt(0.02))
    head, _, first, *rest = sweep_table.markdown(told).splitlines()
    assert "| n | held_out/strict/count | held_out/strikt | state |" in head
    assert "| 2 | 0.3 ± 0.14 |  | finished |" in first
    assert "held_out/strikt was never logged. Did you mean 'held_out/strict'?" in "\n".join(rest)


def test_a_change_behind_show_is_no_metric(tmp_path, capsys):
    words = ["sweep", str(a_file(tmp_path)), "--show", "held_out/graded", "stages.main.steps=3"]
    assert cli.main(words) == 1
    assert "'stages.main.steps=3' is a change and no metric" in capsys.readouterr().err


def test_a_setting_that_lacks_a_seed_comes_after_those_that_have_all(tmp_path):
    trials = [({LR: 1}, 0, "finished", [0.9]), ({LR: 1}, 1, "failed", [0.9]), ({LR: 2}, 0, "finished", [0.3])]
    trials += [({LR: 2}, 1, "finished", [0.3]), ({LR: 3}, 0, "stopped", [0.95]), ({LR: 4}, 0, "waiting", [])]
    told = sweep_table.facts(sweep_file.read(a_file(tmp_path)), a_board(tmp_path, trials))
    assert [(row["setting"][LR], row["mean"], row["n"]) for row in told["rows"]] == [
        (2, 0.3, 2),
        (1, 0.9, 1),
        (3, 0.95, 1),
        (4, None, 0),
    ]
    assert told["best"]["setting"] == {LR: 2}
    assert "| 1 of 2 |" in sweep_table.markdown(told)


def test_a_setting_whose_seeds_were_cut_off_comes_after_those_that_have_all(tmp_path, begun):
    begun.values = {f"trial-00{i}": [value] for i, value in enumerate((0.3, 0.9, 0.4))}
    assert sweep.run(parse(a_file(tmp_path, run_cap=3), "--seeds", "5,6", "--dir", tmp_path / "out")) == 0
    told = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [(row["setting"][LR], row["n"], row["of"], row["complete"]) for row in told["rows"]] == [
        (0.001, 2, 2, True),
        (0.002, 1, 2, False),
    ]
    assert told["best"]["setting"] == {LR: 0.001}
    assert "| 1 of 2 |" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize("method", ["grid", "random", "bayes"])
def test_seeds_of_the_file_are_missed_as_those_of_the_command(method, tmp_path):
    own = {LR: {"values": [1, 2]}, "run.seed": {"values": [0, 1, 2]}}
    trials = [(1, 0, 0.3), (2, 0, 0.9), (1, 1, 0.3), (1, 2, 0.3)]
    board = a_board(tmp_path, [({LR: lr, "run.seed": seed}, None, "finished", [v]) for lr, seed, v in trials])
    told = sweep_table.facts(sweep_file.read(a_file(tmp_path, method=method, run_cap=4, parameters=own)), board)
    assert [(row["setting"][LR], row["n"], row["of"]) for row in told["rows"]] == [(1, 3, 3), (2, 1, 3)]
    assert told["best"]["setting"] == {LR: 1}


def test_columns_are_named_as_short_as_can_be():
    keys = ["stages.main.learner.lr", "stages.edit.learner.lr", "run.seed"]
    assert list(sweep_table.short(keys).values()) == ["main.learner.lr", "edit.learner.lr", "seed"]
    assert text_of({"a.b": [1, "x"], "c": True}) == ["a.b=[1, 'x']", "c=True"], "as Python writes them"


@pytest.mark.parametrize(("name", "trials"), [("quickstart", 8), ("omnigen2", 10)])
def test_the_sweeps_that_are_shipped_are_checked(name, trials):
    shipped = sweep_file.read(Path(__file__).parents[2] / "docs" / "sweeps" / f"{name}.yaml")
    for setting in shipped.settings():
        sweep_file.check_setting(shipped, (), setting)
    assert len(sweep.planned(shipped, (), 1)) == trials


def test_the_readme_shows_the_sweep_that_is_shipped():
    root = Path(__file__).parents[2]
    blocks = re.findall(r"```yaml\n# (docs/sweeps/\S+)\n(.*?)```", (root / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    for name, text in blocks:
        assert yaml.safe_load(text) == yaml.safe_load((root / name).read_text())


MISSED = {
    "a metric that no stage gives": ("held_out/strikt", [], "metric.name: no evaluation of stage 'main'"),
    "a kind that is none": ("held_out/strict/singel", [], "Did you mean 'single'"),
    "a column to show that no stage gives": ("held_out/strict", ["held_out/gradet"], "--show: .*'graded'"),
}


@pytest.mark.parametrize("case", MISSED)
def test_numbers_that_no_trial_would_give_are_refused_before_any_starts(tmp_path, monkeypatch, capsys, case):
    metric, show, said = MISSED[case]
    monkeypatch.setattr(sweep, "run_trials", lambda *_: pytest.fail("a trial was started"))
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "program: rlkit\nmethod: grid\ncommand: [rlkit, train, quickstart, '${args_no_hyphens}']\n"
        f"metric: {{name: {metric}, goal: maximize}}\nparameters: {{stages.main.learner.lr: {{values: [1.0e-4]}}}}\n"
    )
    words = ["sweep", str(path), "--dir", str(tmp_path / "out"), *(["--show", *show] if show else [])]
    assert cli.main(words) == 1
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_number_that_only_the_ends_give_can_be_compared():
    setup = recipe.read("world_omnigen2")
    recipe_course.check_compared(setup, "held_out/strict/t2i", "metric.name")
    recipe_course.check_compared(setup, "held_out/strict_se", "metric.name")
    with pytest.raises(RecipeError, match="no evaluation"):
        recipe_course.check_compared(setup, "held_out/strikt/t2i", "metric.name")


def test_the_warning_of_test_prompts_is_of_stages_that_run(capsys):
    for order, named in (("edit", ["edit"]), ("t2i", ["t2i"])):
        setup = recipe.read("world_omnigen2", [f"run.order=[{order}]"])
        sweep._warn_of_test_prompts(
            sweep_file.read(Path(__file__).parents[2] / "docs" / "sweeps" / "omnigen2.yaml"), setup
        )
        said = capsys.readouterr().err
        assert re.findall(r"stages\.(\w+)\.data", said) == named
