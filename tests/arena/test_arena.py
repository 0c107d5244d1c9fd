"""The arena: what may compete, that one failure costs one run, that it goes on where it stopped, and what it tells."""

import argparse
import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from rlkit import cli, recipe, registry
from rlkit.arena import command as arena
from rlkit.arena import page as arena_page
from rlkit.errors import DataError, RecipeError
from rlkit.report import summary as report
from rlkit.tracking import Metrics
from rlkit.types import Samples

BUILT_IN = [name for name in registry.recipes() if name.startswith(arena.PREFIX)]
NO_TIME = "0.000000001"  # seconds: a run of one step


@pytest.fixture(autouse=True)
def _global_state():
    """Loading a policy sets switches of torch for its whole process."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])


def parse(*words):
    parser = argparse.ArgumentParser()
    arena.arguments(parser)
    return parser.parse_intermixed_args(words)


def a_file(folder: Path, name: str, text: str) -> str:
    file = folder / f"{name}.yaml"
    file.write_text(f"defaults: [arena_flow_grpo, _self_]\n{text}")
    return str(file)


# ---- contestants -----------------------------------------------------------------------------------------------------


def test_all_contestants_share_all_but_how_they_learn():
    found = arena.contestants(BUILT_IN, [], 60)
    assert len(found) >= 9
    shared = {}
    for one in found:
        plain = one.setup.recipe
        main = plain["stages"]["main"]
        evaluation = {key: value for key, value in main["evaluate"].items() if key != "every"}
        task = {"policy": plain["policy"], "run": plain["run"], "rollout": main["rollout"], "evaluate": evaluation}
        task |= {"until": main["until"], "steps": main["steps"], "average": main["learner"]["ema"]}
        task |= {"data": main["data"], "rewards": main["rewards"]}
        if one.note:
            del task["data"], task["rewards"]
        for key, value in task.items():
            assert shared.setdefault(key, value) == value, f"{one.name} differs in {key}"
    assert [one.note for one in found if one.note] == ["trained on colour_area"]
    assert (shared["until"]["metric"], shared["until"]["above"]) == ("cpu_seconds", 60.0)
    assert shared["run"]["threads"] == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: {main: {evaluate: {weights: current}}}", "evaluate.weights is 'current' and not 'ema'"),
        ("stages: {main: {evaluate: {ends: 8}}}", "evaluate.ends is 8"),
        ("stages: {main: {data: {kinds: [single]}}}", "data.kinds is"),
        ("stages: {main: {rollout: {steps: 20}}}", "evaluate.steps is 20"),
        ("policy: {guidance: 2.0}", "policy is"),
    ],
)
def test_a_recipe_with_another_task_is_refused(text, said, tmp_path):
    with pytest.raises(RecipeError, match="this is another task") as refused:
        arena.contestants([a_file(tmp_path, "mine", text)], [], 60)
    assert said in str(refused.value)


def test_a_recipe_of_ones_own_joins_and_other_rewards_are_said(tmp_path):
    own = a_file(tmp_path, "mine", "stages: {main: {learner: {lr: 1.0e-3}, data: {per_step: 6, group: 32}}}")
    strict = a_file(tmp_path, "strict", "stages: {main: {rewards: {composition: {score: strict}}}}")
    options = parse("--algorithms", "arena_flow_grpo", "--recipes", own, strict)
    found = arena.contestants(arena._chosen(options), [], 60)
    assert [one.name for one in found] == ["flow_grpo", "mine", "strict"]
    assert [one.note for one in found] == ["", "", "other options of the reward"]
    with pytest.raises(RecipeError, match="two contestants are called 'mine'"):
        arena.contestants([own, own], [], 60)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="Did you mean 'flow_grpo_guard'") as refused:
        arena.run(parse("--algorithms", "flow_grpo,flow_grpo_gard"))
    assert "--recipes FILE" in str(refused.value)


def test_evaluations_are_as_many_whatever_the_budget():
    setup = recipe.read("arena_flow_grpo")
    every = setup.stages[0].evaluate.every
    for seconds, expected in ((120, every), (240, 2 * every), (1, 1)):
        assert arena._often(setup, seconds) == [f"stages.main.evaluate.every={expected}"]


@pytest.mark.parametrize(
    "words", [["--seeds", "0,x"], ["--seeds", "1,1"], ["--seconds", "0"], ["--seconds", "nan"], ["--jobs", "0"]]
)
def test_numbers_that_make_no_sense_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(*words)
    assert "must be" in capsys.readouterr().err


def test_no_core_is_shared():
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("processes cannot be pinned here")
    free = os.sched_getaffinity(0)
    cores = arena._cores(len(free))
    assert set(cores) == free
    with pytest.raises(RecipeError, match="need as many cores"):
        arena._cores(len(free) + 1)


# ---- running ---------------------------------------------------------------------------------------------------------


class Ended:
    """A child that has ended."""

    def __init__(self, code):
        self.returncode = code

    def poll(self):
        return self.returncode


@pytest.fixture
def small(small_backbone, monkeypatch):
    """Words for runs of a second; and smaller measurements."""
    for name, value in (("COMPARED", 8), ("SHOWN", 2), ("PICTURES", 2)):
        monkeypatch.setattr(arena, name, value)
    return [
        *(f"policy.backbone.path={small_backbone}", "stages.main.learner.batch=8"),
        *("stages.main.data.per_step=2", "stages.main.data.group=2", "stages.main.evaluate.held_out=8"),
        *("stages.main.evaluate.ends=8", "run.wandb=disabled", "run.device=cpu"),
    ]


@pytest.fixture
def begun(monkeypatch):
    """The runs that were begun, in this process and not in one of their own. `begun.fail` is one that fails,
    `begun.stop` one at which somebody presses Ctrl+C."""

    class Begun(list):
        fail = stop = ""

    record = Begun()

    def start(words, log, core):
        name = log.stem
        if name == record.stop:
            raise KeyboardInterrupt
        record.append(name)
        if name == record.fail:
            log.write_text("Traceback (most recent call last):\n  ...\nRuntimeError: no luck\n\n")
            return Ended(1)
        return Ended(cli.main([*words, "--quiet"]))

    monkeypatch.setattr(arena, "_start", start)
    return record


def test_an_interrupted_arena_goes_on_and_a_failure_costs_one_run(small, begun, tmp_path, capsys):
    words = [
        "--algorithms",
        "flow_grpo,ddpo",
        "--seeds",
        "3,4",
        "--out",
        str(tmp_path),
        "--split",
        "validation",
        *small,
    ]
    begun.stop = "flow_grpo-4"
    with pytest.raises(KeyboardInterrupt):
        arena.run(parse("--seconds", NO_TIME, *words))
    assert begun == ["flow_grpo-3", "ddpo-3"]
    assert not (tmp_path / "arena.json").exists()

    begun.stop, begun.fail = "", "ddpo-4"
    assert arena.run(parse("--seconds", NO_TIME, *words)) == 1
    assert begun == ["flow_grpo-3", "ddpo-3", "flow_grpo-4", "ddpo-4"], "what is complete is not run again"
    assert "ddpo-4: FAILED: RuntimeError: no luck" in capsys.readouterr().out
    facts = json.loads((tmp_path / "arena.json").read_text())
    failed = [run for run in facts["runs"] if "failed" in run]
    assert [(run["contestant"], run["seed"], run["failed"]) for run in failed] == [("ddpo", 4, "RuntimeError: no luck")]
    for run in facts["runs"]:
        if run not in failed:
            assert (run["steps"], run["samples"], len(run["curve"])) == (1, 4, 2)
            assert run["network_calls"] > 4 * 4
            assert run["divergence"] > 0
            assert run["diversity"] > 0
    assert facts["settings"]["split"] == "validation"
    summary = report.summary(tmp_path / "flow_grpo-3")  # a run like any other
    assert facts["runs"][0]["after"]["strict"] == summary["held_out"]["strict"]["after"]
    assert summary["command"].startswith("rlkit train arena_flow_grpo ")
    assert len(facts["base"]["scores"]) == arena.NOISES, "two of the seeds and one more"
    assert "1 of 2 seeds" in (tmp_path / "arena.md").read_text()
    assert "ddpo, seed 4, failed: RuntimeError: no luck" in (tmp_path / "arena.md").read_text()

    begun.fail = ""
    assert arena.run(parse("--seconds", NO_TIME, *words)) == 0
    assert begun[4:] == ["ddpo-4"], "only what failed is tried again"
    with pytest.raises(RecipeError, match=r"stages\.main\.until\.above differ"):
        arena.run(parse("--seconds", "9", *words))
    again = arena_page.table(facts)
    (tmp_path / "arena.md").unlink()
    (tmp_path / "arena.json").write_text(json.dumps(facts))
    assert arena.run(parse("--report", str(tmp_path))) == 0
    assert (tmp_path / "arena.md").read_text() == again


def test_a_run_that_was_cut_short_is_resumed(tmp_path):
    (one,) = arena.contestants(["arena_ddpo"], [], 60)
    race = arena.Race(one, 5, tmp_path / "ddpo-5")
    assert "--resume" not in race.command()
    race.folder.mkdir()
    assert race.command()[-2:] == ["--resume", str(race.folder)]
    assert race.command()[:2] == ["train", "arena_ddpo"]
    assert "run.seed=5" in race.command()


def test_whoever_ends_the_arena_ends_its_runs(tmp_path, monkeypatch):
    (one,) = arena.contestants(["arena_ddpo"], [], 60)
    asked = []

    class Running(Ended):
        def terminate(self):
            asked.append("terminate")

        def wait(self):
            asked.append("wait")

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(arena, "_start", lambda words, log, core: Running(None))
    monkeypatch.setattr(arena.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        arena._train([arena.Race(one, 5, tmp_path / "ddpo-5")], [None])
    assert asked == ["terminate", "wait"]


def test_a_child_has_a_core_of_its_own_and_a_log(tmp_path, monkeypatch):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("processes cannot be pinned here")
    probe = tmp_path / "probe"
    probe.write_text(f"#!{sys.executable}\nimport os, sys\nprint(sorted(os.sched_getaffinity(0)), sys.argv[1:])\n")
    probe.chmod(0o755)
    monkeypatch.setattr(arena.sys, "executable", str(probe))
    core = max(os.sched_getaffinity(0))
    log = tmp_path / "log"
    log.write_text("before\n")
    assert arena._start(["train", "x"], log, core).wait() == 0
    assert arena._last_line(log) == f"[{core}] ['-m', 'rlkit.cli', 'train', 'x']"
    assert log.read_text().startswith("before\n"), "a resumed run adds to its log"


def test_quick_is_one_seed_of_few_seconds_and_few_pictures(monkeypatch, tmp_path):
    asked = {}

    def stop(recipes, words, seconds):
        asked.update(words=words, seconds=seconds)
        raise RecipeError("enough")

    monkeypatch.setattr(arena, "contestants", stop)
    for extra, seconds in (([], 20), (["--seconds", "7"], 7)):
        with pytest.raises(RecipeError, match="enough"):
            arena.run(parse("--quick", *extra, "--out", str(tmp_path)))
        assert asked["seconds"] == seconds
        assert "stages.main.evaluate.ends=256" in asked["words"]


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_a_run_is_told_by_its_last_evaluation_and_not_by_its_best(tmp_path):
    metrics = Metrics(tmp_path)
    scores = {0: 0.3, 2: 0.9, 3: 0.5}
    for step in range(4):
        row = {"stage": "main", "step": step, "at": step}
        if step:
            effort = {"seconds/sample": 9.0, "cpu_seconds": 2.5, "samples": 8, "network_calls": 100 * step}
            metrics.append({"kind": "train", **row, **effort})
        if step in scores:
            strict = {"held_out/strict": scores[step], "held_out/graded": 0.6, "seconds/evaluate": 40.0, "count": 16}
            metrics.append({"kind": "evaluation", **row, **strict})
    told = arena.told(tmp_path)
    assert told["before"] == {"strict": 0.3, "graded": 0.6}
    assert told["after"] == {"strict": 0.5, "graded": 0.6}
    assert told["curve"] == [[0.0, 0, 0.3], [5.0, 300, 0.9], [7.5, 600, 0.5]], "evaluations take no training time"
    assert (told["steps"], told["seconds"], told["samples"], told["network_calls"]) == (3, 7.5, 24, 600)
    assert told["pictures"] == 16


def test_a_run_without_two_evaluations_is_refused(tmp_path):
    row = {"kind": "evaluation", "stage": "main", "step": 0, "at": 0, "held_out/strict": 0.3}
    Metrics(tmp_path).append(row)
    with pytest.raises(DataError, match="not two evaluations"):
        arena.told(tmp_path)


def test_the_divergence_is_the_mean_square_of_what_the_velocity_moved_by(toy_policy, samples_of):
    moved = copy.deepcopy(toy_policy)
    clean = samples_of(["a", "b", "c"])
    assert arena.divergence(moved, toy_policy, clean) == 0
    with torch.no_grad():
        moved.net.out.bias += 0.5
    assert arena.divergence(moved, toy_policy, clean) == pytest.approx(0.25, rel=1e-5)
    moved.keep("ema", toy_policy.snapshot())
    assert arena.divergence(moved, toy_policy, clean, "ema") == 0, "the weights that were evaluated are meant"


def test_the_diversity_is_within_a_caption(monkeypatch, samples_of, toy_policy):
    media = torch.zeros(arena.SHOWN * arena.PICTURES, 3, 4, 4)
    groups = media.view(arena.SHOWN, arena.PICTURES, 3, 4, 4)
    setup = recipe.read("arena_flow_grpo")

    def show(setup, policy, prompts, group) -> Samples:
        return samples_of([prompt.text for prompt in prompts for _ in range(group)], group, media)

    monkeypatch.setattr(arena, "sampled", show)
    groups[1::2] = 1.0  # captions differ, pictures of one do not
    assert arena.diversity(setup, toy_policy) == 0
    groups[:, 0] = 0.0
    groups[:, 1:] = 0.5
    pairs = arena.PICTURES * (arena.PICTURES - 1) / 2
    assert arena.diversity(setup, toy_policy) == pytest.approx(0.5 * (arena.PICTURES - 1) / pairs)


# ---- telling ---------------------------------------------------------------------------------------------------------


def a_run(contestant, seed, gain, note="", curve=None, before=0.4):
    after = {"strict": before + gain, "graded": 0.7}
    scores = {"before": {"strict": before, "graded": 0.55}, "after": after, "pictures": 1024}
    curve = curve or [[0.0, 0, before], [60.0, 100_000, before + gain / 2], [120.0, 250_000, before + gain]]
    effort = {"steps": 80 + seed, "seconds": 120.5, "samples": 10_000, "network_calls": 250_000, "curve": curve}
    numbers = {"divergence": 0.0123, "diversity": 0.2}
    return {"contestant": contestant, "seed": seed, "note": note} | scores | effort | numbers


@pytest.fixture
def facts():
    runs = [a_run("first", seed, gain) for seed, gain in ((0, 0.05), (1, 0.09), (2, 0.07))]
    runs += [a_run("second", seed, gain) for seed, gain in ((0, 0.20), (1, 0.10))]
    runs += [{"contestant": "second", "seed": 2, "note": "", "failed": "RuntimeError: no luck"}]
    runs += [a_run("third", seed, -0.0126, "trained on another") for seed in range(3)]
    noises = {str(seed): {"strict": strict, "graded": 0.55} for seed, strict in enumerate((0.384, 0.393, 0.39))}
    base = {"weights": "00", "pictures": 1024, "scores": noises, "diversity": 0.25}
    return {"settings": {"seconds": 120.0, "seeds": [0, 1, 2], "split": "held_out"}, "base": base, "runs": runs}


def test_the_table_is_sorted_by_the_mean_gain_and_says_ranges_and_failures(facts):
    text = arena_page.table(facts)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0][:2] == ["algorithm", "gain in strict"]
    assert rows[2] == [
        *("second", "+.150", "+.100 to +.200 (2 of 3 seeds)", ".550", ".700", "80", "0.25", "0.012", ".200"),
    ]
    assert rows[3][:5] == ["first", "+.070", "+.050 to +.090", ".470", ".700"]
    assert rows[3][5] == "81"
    assert rows[4][:3] == ["third (trained on another)", "-.013", "-.013 to -.013"]
    assert rows[5][0] == "*the base*"
    assert {len(row) for row in rows} == {len(arena_page.COLUMNS)}
    assert "from .384 to .393, by .009" in text.replace("\n", " ")
    assert "120 s of one processor core" in text
    assert "seeds 0, 1 and 2" in text
    assert "1,024 pictures of held-out captions" in text.replace("\n", " ")
    assert "* second, seed 2, failed: RuntimeError: no luck" in text
    assert all(len(line) <= arena_page.WIDTH for line in text.splitlines() if not line.startswith("|"))


def test_one_seed_has_no_range(facts):
    facts["runs"], facts["settings"]["seeds"] = facts["runs"][:1], [0]
    assert "| first | +.050 | one seed | .450 |" in arena_page.table(facts)


def test_the_plot_has_a_line_for_each_contestant(facts, tmp_path, monkeypatch):
    (tmp_path / "arena.json").write_text(json.dumps(facts))
    assert arena_page.write(tmp_path) == tmp_path / "arena.md"
    with Image.open(tmp_path / "arena.png") as picture:
        colours = {pixel for _, pixel in picture.convert("RGB").getcolors(1 << 24)}
        assert picture.width > 1200
    drawn = [colour for colour in arena_page.COLOURS if tuple(bytes.fromhex(colour[1:])) in colours]
    assert drawn == list(arena_page.COLOURS[:3])


def test_an_arena_in_which_all_failed_is_told_too(facts, tmp_path):
    facts["runs"] = [run for run in facts["runs"] if "failed" in run]
    (tmp_path / "arena.json").write_text(json.dumps(facts))
    text = arena_page.write(tmp_path).read_text()
    assert "no luck" in text
    assert "arena.png" not in text
    assert not (tmp_path / "arena.png").exists()
    with pytest.raises(DataError, match=r"no arena\.json"):
        arena_page.write(tmp_path / "nowhere")


def test_curves_are_averaged_at_equal_shares_and_end_where_the_table_does():
    one = [[0.0, 0, 0.4], [60.0, 10, 0.5], [120.0, 20, 0.6]]
    other = [[0.0, 0, 0.4], [124.0, 40, 0.8]]
    x, mean, low, high = arena_page.averaged([one, other], 0)
    assert x == pytest.approx([0, 61, 122])
    assert mean == pytest.approx([0.4, 0.55, 0.7])
    assert low == pytest.approx([0.4, 0.5, 0.6])
    assert high == pytest.approx([0.4, 0.6, 0.8])
    assert arena_page.averaged([one, other], 1)[0] == pytest.approx([0, 15, 30])
