"""The command line: its commands, exit codes and messages. Training itself is replaced here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlkit import cli, dist, recipe, registry, session
from rlkit.commands import catalogue, train
from rlkit.dist import Processes
from rlkit.report import summary as report
from rlkit.run import Interrupted


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RLKIT_DEBUG", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def trained(monkeypatch):
    """What `session.run` was called with, in place of training. The run leaves a recipe and no numbers."""
    calls = []

    def run(setup, folder, processes, resume, command, started, quiet, tell):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(json.dumps(setup.recipe))
        calls.append({"setup": setup, "folder": folder, "resume": resume, "command": command, "quiet": quiet})
        tell()

    monkeypatch.setattr(session, "run", run)
    return calls


def failure(capsys, *words: str) -> tuple[int, str]:
    code = cli.main(words)
    return code, capsys.readouterr().err


# ------------------------------------------------------------------------------------------- usage


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        assert cli.main([name, "--help"]) == 0
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["trian", "quickstart"], "'train'"),
        (["train", "quickstart", "--nprc", "2"], "'--nproc'"),
        (["train", "world_unified", "--only", "generation", "--from", "generation"], "not allowed with"),
        (["train", "quickstart", "--resum", "x"], "'--resume'"),  # no abbreviations: they change their meaning later
        (["list", "reward"], "'rewards'"),
        (["list", "foo"], "no catalogue 'foo'. There are rewards, algorithms, "),
        (["list"], "which catalogue? There are rewards, algorithms, "),
        (["train", "quickstart", "--nproc", "0"], "1 or more"),
    ],
)
def test_usage_errors_say_what_is_near_and_end_with_2(words, near, capsys):
    code, text = failure(capsys, *words)
    assert code == 2
    assert "error: " in text
    assert near in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train"], "which recipe?"),
        (["train", "run.seed=1"], "which recipe?"),
        (["train", "quickstrat"], "Did you mean 'quickstart'?"),
        (["train", "quickstart", "world"], "'world' is not key=value"),
        (["train", "quickstart", "stages.main.algorithm.clipp=1"], "Did you mean 'clip'?"),
        (["train", "--resume", "nowhere"], "no run in nowhere"),
        (["train", "world_unified", "--from", "generaton"], "--from: the recipe has no stage named 'generaton'"),
        (["train", "world_unified", "--only", "generaton"], "Did you mean 'generation'?"),
        (["check", "quickstart", "stages.main.data.group=1"], "2 or more, not 1"),
        (["check", "quickstart", "run.seed"], "'run.seed' is a key, and lacks its =value"),
        (["train", "stages.main.steps"], "'stages.main.steps' is a key, and lacks its =value"),
        (["describe", "compositoin"], "Did you mean 'composition'?"),
        (["report", "nowhere"], "nowhere"),
        (["eval", "."], "recipe.yaml"),
        (["sample", "quickstart", "run.seed=1"], "what shall it draw?"),
        (["pretrain-world", "--out", "new", "sample=3"], "Did you mean 'samples'?"),
        (["pretrain-world", "--out", ".", "samples"], "not key=value"),
    ],
)
def test_errors_are_one_line_and_end_with_1(words, said, capsys):
    code, text = failure(capsys, *words)
    assert code == 1
    assert text.startswith("error: ")
    assert said in text
    assert text.count("\n") == 1


def test_debugging_shows_where_an_error_came_from(monkeypatch):
    monkeypatch.setenv("RLKIT_DEBUG", "1")
    with pytest.raises(recipe.RecipeError):
        cli.main(["check", "quickstrat"])


# ------------------------------------------------------------------------------------------- train


def test_a_run_gets_a_folder_of_its_own(trained, capsys):
    assert cli.main(["train", "quickstart", "stages.main.steps=3"]) == 0
    assert cli.main(["train", "quickstart"]) == 0
    first, second = (one["folder"] for one in trained)
    assert first.parent == Path("runs")
    assert first.name.startswith("quickstart-")
    assert first != second
    assert trained[0]["command"] == "rlkit train quickstart stages.main.steps=3"
    assert trained[0]["setup"].stages[0].steps == 3
    assert f"run folder: {first}" in capsys.readouterr().out


def test_options_may_stand_between_overrides(trained):
    assert cli.main(["train", "quickstart", "run.seed=1", "--quiet", "run.dir=here", "--nproc", "1"]) == 0
    assert trained[0]["quiet"]
    assert trained[0]["folder"] == Path("here")
    assert trained[0]["setup"].options.seed == 1


def test_a_folder_that_holds_something_is_never_written_into(trained, capsys):
    assert cli.main(["train", "quickstart", "run.dir=mine"]) == 0
    code, text = failure(capsys, "train", "quickstart", "run.dir=mine")
    assert code == 1
    assert "run.dir: mine exists and is not empty" in text
    assert "rlkit train --resume mine" in text
    Path("empty").mkdir()
    assert cli.main(["train", "quickstart", "run.dir=empty"]) == 0
    Path("file").write_text("")
    assert failure(capsys, "train", "quickstart", "run.dir=file")[0] == 1


def test_a_recipe_can_be_checked_where_its_data_is_not(tmp_path, capsys):
    data = "stages.main.data={name: prompts, path: prompts.jsonl, held_out_path: kept.jsonl, per_step: 12, group: 16}"
    words = ["check", "quickstart", data]
    assert cli.main(words) == 0
    told = capsys.readouterr()
    assert told.err == "stage main: not here yet, and needed to train: prompts.jsonl, kept.jsonl\n"
    assert told.out.endswith("ok\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": 7}\n')
    (tmp_path / "kept.jsonl").write_text('{"prompt": "a red circle"}\n')
    code, text = failure(capsys, *words)
    assert code == 1, "what is there is read"
    assert "prompts.jsonl" in text


def test_a_check_of_several_says_of_which_recipe_a_file_is_not_there(capsys):
    """The pairs that a monitor asks about are needed like the data."""
    missing = "stage main: not here yet, and needed to train: pairs.jsonl\n"
    words = ["stages.main.monitors.sanity={path: pairs.jsonl}"]
    assert cli.main(["check", "quickstart", *words]) == 0
    assert capsys.readouterr().err == missing
    assert cli.main(["check", "quickstart", "world_nft", *words]) == 0
    assert capsys.readouterr().err == f"quickstart: {missing}world_nft: {missing}"


def test_a_rate_that_would_fall_after_the_end_is_noted_and_no_error(capsys):
    assert cli.main(["check", "quickstart"]) == 0
    assert capsys.readouterr().err == "", "it falls until update 75 of 75"
    assert cli.main(["check", "quickstart", "stages.main.steps=74"]) == 0
    told = capsys.readouterr()
    said = "stage main: learner.decay lowers the rate from update 50 to 75, and the stage makes"
    assert told.err == f"note: {said} 74\n"
    assert told.out.endswith("ok\n")
    assert cli.main(["check", "quickstart", "stages.main.steps=37", "stages.main.learner.epochs=2"]) == 0
    assert capsys.readouterr().err == f"note: {said} 74\n"
    assert cli.main(["check", "quickstart", "world_hack", "stages.main.steps=7"]) == 0
    assert capsys.readouterr().err == f"note: quickstart: {said} 7\n"


def test_a_plateau_that_its_stage_is_too_short_for_is_noted_and_no_error(capsys):
    for plateau, said in ((2, ""), (3, "needs 4 evaluations, the opening one counted, and the stage makes 3 before")):
        until = f"stages.main.until={{metric: held_out/strict, plateau: {plateau}}}"
        assert cli.main(["check", "quickstart", until]) == 0
        assert said in capsys.readouterr().err


def test_a_run_that_has_lost_its_recipe_can_be_gone_on_with(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert cli.main(["train", "--resume", str(tmp_path)]) == 1
    assert "lost its recipe.yaml. Say which recipe it is of, with its changes: rlkit train" in capsys.readouterr().err


def test_of_several_recipes_each_has_a_line(capsys):
    recipes = [str(file) for file in sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))]
    assert cli.main(["check", *recipes]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == recipes
    assert {line.split(": ")[1].split(",")[0] for line in lines} == {"ok", "a part that others extend"}
    assert cli.main(["check", "quickstart", "quickstrat", "world_nft", "stages.main.steps=7"]) == 1
    first, wrong, last = capsys.readouterr().out.splitlines()
    assert first == "quickstart: ok, main 7 steps", "the changes are made to each"
    assert wrong.startswith("quickstrat: ")
    assert "Did you mean 'quickstart'" in wrong
    assert last == "world_nft: ok, main 7 steps", "one that is wrong hides no other"


def test_the_json_of_several_recipes_is_no_json(capsys):
    assert cli.main(["check", "quickstart", "world_nft", "--json"]) == 1
    assert "is for one recipe" in capsys.readouterr().err


def test_a_stage_that_ends_on_a_plateau_says_so(capsys):
    assert cli.main(["check", "quickstart", "stages.main.until={metric: held_out/strict, plateau: 2}"]) == 0
    assert "until      held_out/strict no higher for 2 evaluations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("which", "left"),
    [("--from", ["understanding", "generation"]), ("--only", ["understanding"])],
)
def test_stages_may_be_left_out(trained, which, left):
    """The others' options stay; a resumed run knows, since it reads its own recipe."""
    words = ["stages.understanding.carry={optimizer: false}", "run.dir=mine"]
    assert cli.main(["train", "world_unified", *words, which, "understanding"]) == 0
    (one,) = trained
    assert [stage.name for stage in one["setup"].stages] == left
    assert one["setup"].recipe["run"]["order"] == left
    assert f"run.order=[{','.join(left)}]" in one["command"]


def test_resume_reads_the_runs_own_recipe(trained):
    assert cli.main(["train", "quickstart", "run.dir=mine", "stages.main.steps=3"]) == 0
    assert cli.main(["train", "--resume", "mine"]) == 0
    assert cli.main(["train", "--resume", "mine", "stages.main.steps=5"]) == 0
    assert cli.main(["train", "quickstart", "--resume", "new"]) == 0  # nothing there yet: from step 0
    assert [one["setup"].stages[0].steps for one in trained] == [3, 3, 5, 75]
    assert [one["folder"] for one in trained] == [Path("mine")] * 3 + [Path("new")]
    assert [one["resume"] for one in trained] == [False, True, True, True]


def test_an_interrupted_run_is_reported_and_ends_with_130(trained, monkeypatch, capsys):
    def stop(*arguments):
        arguments[-1]()  # `tell`
        raise Interrupted("stopped after step 2 of 60", hint="Go on with: rlkit train --resume mine")

    monkeypatch.setattr(session, "run", stop)
    monkeypatch.setattr(report, "write", lambda folder: folder / "report.html")
    monkeypatch.setattr(report, "summary", lambda folder: {})
    monkeypatch.setattr(report, "sentence", lambda facts: "It stopped.")
    assert cli.main(["train", "quickstart", "run.dir=mine"]) == 130
    said = capsys.readouterr()
    assert "--resume mine" in said.err
    assert "It stopped.\nreport: mine/report.html" in said.out


def test_several_processes_are_launched_after_the_recipe_was_checked(monkeypatch, capsys):
    started = []

    class Child:
        def __init__(self, command, env, start_new_session):
            started.append((command, env, start_new_session))

        def wait(self):
            return 0

    monkeypatch.setattr(subprocess, "Popen", Child)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cli.main(["train", "quickstart", "--nproc", "2", "run.seed=1", "--quiet"]) == 0
    [(command, env, apart)] = started
    tail = ["train", "quickstart", "run.seed=1", "--processes", "2", "--quiet"]
    assert command == dist.launch_command(2, tail)
    assert env["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert apart
    assert cli.main(["train", "quickstart", "--nproc", "2", "stages.main.steps=0"]) == 1
    assert len(started) == 1
    assert capsys.readouterr().err.count("error:") == 1


def test_every_process_writes_into_the_first_ones_folder(monkeypatch):
    chosen = Path("runs/é-1")
    assert train._same_folder(Processes(), chosen) == chosen


# ------------------------------------------------------------------------------------------- the other commands


def test_check_says_what_a_recipe_would_do(capsys):
    assert cli.main(["check", "quickstart", "stages.main.steps=1234"]) == 0
    text = capsys.readouterr().out
    assert "1,234 steps" in text
    assert "12 prompts x 16 = 192 samples" in text
    assert "384 rows a step" in text
    assert text.endswith("ok\n")


def test_check_counts_the_pictures_that_are_drawn(capsys):
    ends = ["stages.main.evaluate.ends=512", "stages.main.evaluate.held_out=64"]
    assert cli.main(["check", "quickstart", *ends, "stages.main.evaluate.every=0"]) == 0
    assert "512 held-out pictures first and last\n" in capsys.readouterr().out
    assert cli.main(["check", "quickstart", *ends, "stages.main.evaluate.every=5"]) == 0
    assert "64 held-out pictures every 5 steps, 512 first and last" in capsys.readouterr().out


def test_check_says_how_stages_follow_each_other(capsys):
    assert cli.main(["check", "world_unified", "run.order=[understanding]"]) == 0
    assert "rest (run.order): cold_start, generation\n" in capsys.readouterr().out
    assert cli.main(["check", "world_unified"]) == 0
    text = capsys.readouterr().out
    assert "rest (" not in text
    assert "  carry " not in text
    words = ["stages.t2i={carry: {weights: ema, optimizer: true}, anchor: ema}"]
    words += ["stages.t2i.monitors={best_by: held_out/reward}", "run.order=[edit,t2i]"]
    words += ["stages.edit.learner.ema=0.9", "stages.t2i.learner.ema=0.9"]
    assert cli.main(["check", "world_omnigen2", *words]) == 0
    text = capsys.readouterr().out
    assert "  carry      the average of the weights and the optimiser's moments of the stage before\n" in text
    assert "  anchor     ema\n" in text
    assert "  best_by    held_out/reward, to roll back to\n" in text


def test_check_gives_the_whole_recipe_as_json(capsys):
    assert cli.main(["check", "quickstart", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == recipe.read("quickstart").recipe


@pytest.mark.parametrize("kind", [*registry.KINDS, "recipes"])
def test_list(kind, capsys):
    known = list(registry.recipes()) if kind == "recipes" else registry.names(kind)
    assert cli.main(["list", kind, "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == known
    assert cli.main(["list", kind]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == known


@pytest.mark.parametrize("kind", [*registry.KINDS, "recipes"])
def test_describe_finds_every_entry(kind, capsys):
    for name in registry.recipes() if kind == "recipes" else registry.names(kind):
        assert cli.main(["describe", name]) == 0
        assert name in capsys.readouterr().out
        assert cli.main(["describe", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["name"] == name


def test_describe_shows_options_with_types_defaults_and_docs(capsys):
    assert cli.main(["describe", "composition"]) == 0
    text = capsys.readouterr().out
    assert "score: str = mixed" in text
    assert "'graded' gives partial credit" in text
    assert cli.main(["describe", "flow_grpo"]) == 0
    assert "Differences from the reference code" in capsys.readouterr().out, "what its file says at the top"


def test_sample_and_eval_draw_with_the_base_model(capsys):
    from PIL import Image

    words = ["sample", "quickstart", "a red circle", "a blue squre", "--n", "2", "--out", "new/grid.png"]
    assert cli.main([*words, "stages.main.rollout.steps=8"]) == 0
    said = capsys.readouterr()
    assert said.out.endswith("new/grid.png\n")
    assert "'squre'" in said.err
    assert Image.open("new/grid.png").size == (256, 256)  # two rows of two pictures of 32, enlarged
    assert cli.main(["eval", "quickstart", "--held-out", "2", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["count"] == 2
    assert 0 <= scores["held_out/graded"] <= 1


# ------------------------------------------------------------------------------------------- imports

HEAVY = ("accelerate", "diffusers", "matplotlib", "peft", "transformers", "vllm", "wandb", "tensorboard", "trackio")


@pytest.mark.parametrize(
    ("commands", "left_out"),
    [
        (
            [["--help"], ["train", "--help"], ["bench", "--help"], *(["list", kind] for kind in catalogue.KINDS)],
            ("torch", *HEAVY),
        ),
        ([["check", "quickstart"], ["check", "quickstart", "policy.train.lora.rank=4"]], HEAVY),
    ],
    ids=["help and list", "check"],
)
def test_what_is_not_imported(commands, left_out):
    probe = f"import sys; from rlkit.cli import main; assert not any(map(main, {commands!r})); "
    probe += f"print(sorted({set(left_out)!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"


def test_check_says_what_forms_the_total_and_which_monitors_act(capsys):
    words = [
        "stages.main.rewards.bright={reward: brightness, when: evaluation}",
        "stages.main.total={form: minimum, gates: [{when: 'composition/strict < 0.5', at_most: 0.1}]}",
        "stages.main.monitors={colour: {action: stop}, sharpness: null}",
    ]
    assert cli.main(["check", "quickstart", *words]) == 0
    said = capsys.readouterr().out
    assert "composition x 1, bright in evaluations" in said
    assert "total      minimum; at most 0.1 when composition/strict < 0.5" in said
    assert "monitors   colour stop; the others warn" in said
