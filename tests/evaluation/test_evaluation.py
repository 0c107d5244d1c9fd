"""Evaluations of suites: drawn with the tiny base, kept, gone on with, refused where they do not belong, compared."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from painting import draw_picture

from rlkit import checkpoint, cli, recipe, session
from rlkit.data.picture_files import Picture, Unread
from rlkit.endpoints import Endpoints, Reply
from rlkit.errors import CheckpointError, DataError, RecipeError, RewardError
from rlkit.evaluation import evaluate as evaluation
from rlkit.evaluation import table as evaluation_table
from rlkit.evaluation.evaluate import Record, Records, Settings, evaluate, plan_of
from rlkit.evaluation.formats import Case
from rlkit.stages import RunOptions
from rlkit.types import Prompt, Samples, Scores

FEW = [
    "stages.main.rollout.steps=3",
    "stages.main.algorithm.window_start=[0,1]",
    "stages.main.evaluate.weights=current",
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert cli.main(["eval", *words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


# ---- with the tiny base ----------------------------------------------------------------------------------------------


def test_the_world_by_two_samplers_and_what_is_left_after_a_kill(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "PORTION", 4)
    words = ["quickstart", *FEW, "--suite", "world", "--held-out", "6", "--samplers", "ode,sde", "--seeds", "0,3"]
    told = said(capsys, *words)
    out = Path("evaluations/quickstart/world-base-current")
    before = lines(out)
    assert [(one["sampler"], one["seed"]) for one in before[::4]][:4] == [
        ("ode", 0),
        ("ode", 3),
        ("sde", 0),
        ("sde", 3),
    ]
    assert len({(one["key"], one["seed"], one["sampler"]) for one in before}) == len(before) == 24
    assert told["counts"] == "composition/strict"
    for sampler in ("ode", "sde"):
        rows = [one for one in before if one["sampler"] == sampler]
        overall = told["samplers"][sampler]["overall"]
        assert overall["mean"] == pytest.approx(sum(one["scores"]["composition/strict"] for one in rows) / 12)
        assert (overall["prompts"], overall["pictures"], overall["unscored"]) == (6, 12, 0)
    drawn = {one["picture"]: (out / one["picture"]).read_bytes() for one in before}
    assert len(set(drawn.values())) == 24, "another seed, prompt or sampler is another picture"
    assert "| ode | **overall** |" in (out / "summary.md").read_text()

    file = out / "records.jsonl"
    text = file.read_text().splitlines(keepends=True)
    file.write_text("".join(text[:9]) + text[9][:30])  # killed while it wrote the tenth
    (out / before[-1]["picture"]).unlink()
    assert said(capsys, *words) == told
    after = lines(out)
    assert after[:9] == before[:9], "what was there is kept"
    assert len(after) == 24, "and nothing is done twice"
    assert sorted(map(json.dumps, after)) == sorted(map(json.dumps, before))
    assert {one["picture"]: (out / one["picture"]).read_bytes() for one in after} == drawn

    assert cli.main(["eval", *words, "stages.main.evaluate.steps=2"]) == 1
    assert "differs in steps" in capsys.readouterr().err
    more = said(capsys, *words[:-1], "0,3,5")
    assert more["samplers"]["ode"]["overall"]["pictures"] == 18, "more seeds go on in the same folder"


def test_geneval_as_published_with_the_worlds_detector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"tag": tag, "include": [{"class": shape, "count": 1}], "prompt": f"a {colour} {shape}"}
        for tag, shape, colour in (("single", "circle", "red"), ("single", "square", "blue"), ("odd", "circle", "red"))
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = said(
        *(capsys, "quickstart", "stages.main.rollout.steps=8", "--suite", "geneval", "--prompts", "m.jsonl"),
        *("--reward", "detector=world", "--seeds", "0", "--out", "out"),
    )
    one = told["samplers"]["ode"]
    assert set(one["categories"]) == {"single", "odd"}
    means = [one["categories"][tag]["mean"] for tag in ("single", "odd")]
    assert one["overall"]["mean"] == pytest.approx(sum(means) / 2), "the mean of the tags"
    assert {"geneval", "geneval/strict", "geneval/object"} <= set(lines(Path("out"))[0]["scores"])
    assert one["overall"]["unscored"] == 0


def test_gedit_as_published_with_a_judge_that_always_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Pool:
        def map(self, requests: Any) -> list[Reply]:
            asked.extend(one.json for one in requests)
            message = {"content": json.dumps({"reasoning": "r", "score": [4, 9]})}
            reply = {"choices": [{"finish_reason": "stop", "message": message}]}
            return [Reply(200, json.dumps(reply).encode()) for _ in requests]

        def close(self) -> None:
            pass

    monkeypatch.setattr(Endpoints, "open", lambda self: Pool())
    draw_picture(tmp_path / "a.png", 1, (32, 32))
    row = {"task_type": "color", "instruction": "make the circle red", "instruction_language": "en"}
    rows = [{**row, "key": key, "input_image": "a.png"} for key in ("k1", "k2")]
    (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--suite", "gedit", "--prompts", "g.jsonl", "--seeds", "0", "--judge", "http://127.0.0.1:1"]
    told = said(capsys, "world_edit", FEW[0], *words, "--judge-model", "m", "--out", "out")
    assert told["samplers"]["ode"]["categories"]["color"]["mean"] == pytest.approx(0.4), "viescore: sqrt(4 * 4) / 10"
    assert len(asked) == 4, "two questions about each of two pictures"
    assert cli.main(["eval", "quickstart", *FEW, *words, "--judge-model", "m", "--out", "other"]) == 1
    assert "the suite gedit needs edit" in capsys.readouterr().err, "a policy that would not look at the picture"


# ---- which weights ---------------------------------------------------------------------------------------------------


def test_records_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    setup = recipe.read("quickstart", FEW)
    policy: Any = session.load_policy(setup)
    run = tmp_path / "run"
    numbers = {"stage": "main", "state": {}}
    tensors = {f"policy/{name}": value.clone() for name, value in policy.state().items()}
    checkpoint.save(run, 5, tensors, numbers, 2)
    settings = Settings("world", seeds=(0,), count=2)
    out = evaluate(setup, run, "run", settings)
    assert out == run / "evaluations" / "world-000005-current"
    first = lines(out)
    checkpoint.save(run, 6, {name: torch.zeros_like(value) for name, value in tensors.items()}, numbers, 2)
    with pytest.raises(DataError, match="differs in checkpoint"):
        evaluate(setup, run, "run", replace(settings, out=out))
    other = evaluate(setup, run, "run", settings)
    assert other.name == "world-000006-current"
    blank = (other / lines(other)[0]["picture"]).read_bytes()
    assert (out / first[0]["picture"]).read_bytes() != blank, "the newest checkpoint's weights are those that draw"
    shutil.copy(out / "records.jsonl", other / "records.jsonl")
    with pytest.raises(DataError, match=r"records\.jsonl:1: this record is of another checkpoint"):
        Records.open(other)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        evaluate(setup, tmp_path / "nothing", "run", settings)


def stage_of(name: str) -> Any:
    return recipe.read(name).stages[-1]


def test_the_stochastic_sampler_is_the_algorithms_at_all_steps_but_the_last() -> None:
    policy = SimpleNamespace(sets={"ema": {}})
    plan = plan_of("sde", stage_of("quickstart"), policy, None, {})
    assert (plan.dynamics, plan.noise_level, plan.window, plan.policy_set) == ("flow", 0.7, (0, 9), "ema")
    assert (plan.record, plan.tail, plan.shared_noise, plan.steps) == (False, None, False, None)
    plain = plan_of("ode", stage_of("quickstart"), policy, "current", {})
    assert (plain.dynamics, plain.window, plain.policy_set) == ("ode", None, "current")
    for name, what in (("world_nft", "DiffusionNFT samples without noise"), ("world_agent_grpo", "writes, and has no")):
        with pytest.raises(RecipeError, match=rf"algorithm: {what}.* Use --samplers ode"):
            plan_of("sde", stage_of(name), policy, None, {})
    with pytest.raises(RecipeError, match="--weights: there is no set 'ema'"):
        plan_of("ode", stage_of("quickstart"), SimpleNamespace(sets={}), "ema", {})


# ---- with a rollout and a reward made by hand ------------------------------------------------------------------------


class Rollout:
    """Draws grey pictures and remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[Prompt] = []

    def collect(self, batch: Any, plan: Any, context: Any) -> Samples:
        self.told += batch.prompts
        n = len(batch.prompts)
        rows = torch.arange(n)
        return Samples(torch.full((n, 3, 2, 2), 0.5), torch.zeros(n, 1), batch.prompts, rows, rows, rows, 0, n)


class Scoring:
    """Gives each prompt the number that its text says; none for "nan"."""

    def __init__(self) -> None:
        self.told: list[Prompt] = []

    def __call__(self, samples: Samples, gather: Any, held_out: bool) -> Scores:
        self.told += samples.prompts
        raw = torch.tensor([[float(prompt.text)] for prompt in samples.prompts])
        return Scores(("one",), raw, torch.isfinite(raw), torch.ones(1))


IDENTITY = {"suite": "s", "prompts": "p", "reward": {}, "counts": "one", "overall": "prompts", "count": 2}
IDENTITY |= {"checkpoint": None, "weights": "current"}


def by_hand(cases: list[Case], folder: Path, max_unscored: float = 0.1) -> Any:
    setup = SimpleNamespace(stages=[SimpleNamespace(rollout=SimpleNamespace(steps=2))])
    setup.options = RunOptions(max_unscored=max_unscored)
    policy = SimpleNamespace(conditions=SimpleNamespace(forget=lambda prompts: None))
    records = Records.open(folder, IDENTITY)
    whole: Any = setup
    scoring: Any = Scoring()
    return evaluation._Evaluation(whole, policy, cases, Rollout(), scoring, records, {})


def case(key: str, text: str, truth: tuple[Picture, ...] = ()) -> Case:
    return Case(key, "all", Unread(Prompt(0, text)), truth)


def test_the_truth_is_shown_to_the_judge_and_never_to_the_policy(tmp_path: Path) -> None:
    draw_picture(tmp_path / "gt.png", 1)
    truth = (Picture("gt_image", "here", 0, [{"gt_image": "gt.png"}], tmp_path),)
    run = by_hand([case("a", "1", truth), case("b", "0")], tmp_path / "out")
    run.run({"ode": None}, (0,))
    assert all(prompt.references == () for prompt in run.rollout.told)
    assert [len(prompt.references) for prompt in run.scoring.told] == [1, 0]


def test_what_was_not_scored_is_counted_and_asked_again(tmp_path: Path) -> None:
    cases = [case("a", "1"), case("b", "nan"), case("c", "0.5")]
    by_hand(cases, tmp_path / "out").run({"ode": None}, (0,))
    overall = evaluation_table.summary(tmp_path / "out")["samplers"]["ode"]["overall"]
    assert (overall["mean"], overall["prompts"], overall["pictures"]) == (0.75, 2, 3)
    assert overall["unscored"] == pytest.approx(1 / 3)
    mended = by_hand([cases[0], case("b", "0.0"), cases[2]], tmp_path / "out")
    mended.run({"ode": None}, (0,))
    assert [prompt.text for prompt in mended.scoring.told] == ["0.0"], "only the one that had no number"
    overall = evaluation_table.summary(tmp_path / "out")["samplers"]["ode"]["overall"]
    assert (overall["mean"], overall["unscored"]) == (0.5, 0), "the last line of a key counts"


def test_a_judge_that_answers_nothing_ends_the_evaluation(tmp_path: Path) -> None:
    run = by_hand([case(str(i), "nan") for i in range(64)], tmp_path / "out")
    with pytest.raises(RewardError, match="32 of 32 pictures were not scored"):
        run.run({"ode": None}, (0,))
    assert len(run.rollout.told) == 32, "and not all 64 are drawn for nothing"
    by_hand([case(str(i), "nan") for i in range(64)], tmp_path / "more", max_unscored=1.0).run({"ode": None}, (0,))
    overall = evaluation_table.summary(tmp_path / "more")["samplers"]["ode"]["overall"]
    assert (overall["mean"], overall["low"], overall["unscored"]) == (None, None, 1.0)
    assert "| - | - | 0 | 64 | 100.0% |" in (tmp_path / "more" / "summary.md").read_text()


def test_texts_with_odd_line_ends_survive(tmp_path: Path) -> None:
    records = Records.open(tmp_path / "out", IDENTITY)
    row = Record("a", "one\u2028two\x85three", "all", 0, "ode", {"one": 1.0}, "x.png")
    records.add([row])
    assert Records.open(tmp_path / "out").found == {row.place: row}


def test_what_is_no_folder_of_an_evaluation(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(DataError, match="there is no evaluation in this folder"):
        Records.open(tmp_path / "notes")
    (tmp_path / "notes" / "x.txt").write_text("mine")
    with pytest.raises(DataError, match="holds other files and no evaluation"):
        Records.open(tmp_path / "notes", IDENTITY)
    Records.open(tmp_path / "empty", IDENTITY)
    with pytest.raises(DataError, match="there are no records"):
        evaluation_table.summary(tmp_path / "empty")
    (tmp_path / "empty" / "records.jsonl").write_text('{"of": "x"\n')
    with pytest.raises(DataError, match=r"records\.jsonl:1: not a JSON object"):
        Records.open(tmp_path / "empty")


# ---- two evaluations -------------------------------------------------------------------------------------------------


def evaluated(folder: Path, numbers: Any, seeds: tuple[int, ...] = (0, 1), **changes: Any) -> Path:
    records = Records.open(folder, {**IDENTITY, **changes})
    rows = [
        Record(str(i), "t", "all", seed, "ode", {"one": None if math.isnan(x) else float(x)}, "x.png")
        for i, of_prompt in enumerate(numbers)
        for seed, x in zip(seeds, of_prompt, strict=True)
    ]
    records.add(rows)
    return folder


def test_a_difference_in_pairs_is_known_better_than_two_means(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    hard, noise = rng.normal(0.5, 0.3, (150, 1)), rng.normal(0, 0.05, (2, 150, 2))
    before = evaluated(tmp_path / "before", hard + noise[0])
    after = evaluated(tmp_path / "after", hard + 0.03 + noise[1])
    found = evaluation_table.compare(before, after)["samplers"]["ode"]["overall"]
    one, other = (evaluation_table.summary(folder)["samplers"]["ode"]["overall"] for folder in (before, after))
    assert found["mean"] == pytest.approx(other["mean"] - one["mean"])
    assert found["error"] == pytest.approx(0.05 / math.sqrt(150), rel=0.2), "two seeds halve 2 * .05**2"
    assert found["error"] < 0.2 * math.hypot(one["error"], other["error"])
    assert found["low"] > 0, "so that the gain is seen,"
    assert one["high"] > other["low"], "where two intervals apart overlap"


def test_only_pictures_that_both_have_and_both_scored_are_compared(tmp_path: Path) -> None:
    before = evaluated(tmp_path / "before", [[0.0, 1.0], [0.5, math.nan]])
    after = evaluated(tmp_path / "after", [[1.0], [0.75]], seeds=(0,), checkpoint={"at": 5})
    told = evaluation_table.compare(before, after)
    one = told["samplers"]["ode"]
    assert one["overall"]["mean"] == pytest.approx((1.0 + 0.25) / 2)
    assert (one["seeds"], one["overall"]["pictures"]) == ([0], 2)
    text = evaluation_table.table(told)
    assert "| ode | **overall** | +0.625 |" in text
    assert "difference" in text


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluated(tmp_path / "one", [[0.0]], seeds=(0,))
    judged = evaluated(tmp_path / "judged", [[0.0]], seeds=(0,), reward={"model": "other"})
    with pytest.raises(DataError, match="the evaluations differ in reward"):
        evaluation_table.compare(one, judged)
    with pytest.raises(DataError, match="no prompt, seed and sampler is in both"):
        evaluation_table.compare(one, evaluated(tmp_path / "two", [[0.0]], seeds=(7,)))
    assert cli.main(["eval", "--compare", str(one), str(one)]) == 0
    assert "| +0.000 |" in capsys.readouterr().out


@pytest.mark.parametrize("key", IDENTITY)
def test_an_evaluation_that_does_not_say_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    one, other = (evaluated(tmp_path / name, [[0.0, 1.0]]) for name in ("one", "other"))
    file = other / "evaluation.json"
    file.write_text(json.dumps({name: value for name, value in IDENTITY.items() if name != key}))
    assert cli.main(["eval", "--compare", str(one), str(other)]) == 1
    assert f"{file}: this evaluation does not say its '{key}'" in capsys.readouterr().err


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which run or recipe?"),
        (["quickstart", "--seeds", "1"], "--seeds: goes with --suite NAME"),
        (["quickstart", "--judge-key-env", "KEY"], "--judge-key-env: goes with --suite NAME"),
        (["quickstart", "--suite", "wrld"], "Did you mean 'world'?"),
        (["quickstart", "--suite", "world", "--seeds", "0,x"], "must be numbers with commas between them, not '0,x'"),
        (["quickstart", "--suite", "world", "--seeds", "1,1"], "one or more, and none twice"),
        (["quickstart", "--suite", "world", "--samplers", "sed"], "Did you mean 'sde'?"),
        (["quickstart", "--suite", "gedit", "--judge-model", "m"], "--judge-model: goes with --judge URL"),
        (["quickstart", "--suite", "geneval", "--held-out", "4"], "is for the suite world"),
        (["quickstart", "--suite", "world", "--reward", "score"], "'score' is not key=value"),
        (["quickstart", "--compare", "a", "b"], "compares what has been evaluated"),
        (["--compare", "a", "b"], "a: there is no evaluation in this folder. It has no evaluation.json."),
        (["--compare", "a", "b"], "RUN/evaluations/SUITE-STEP-WEIGHTS"),
    ],
)
def test_command_lines_that_mean_nothing(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", *words]) == 1
    assert told in capsys.readouterr().err


def test_a_record_is_a_line_of_plain_values(tmp_path: Path) -> None:
    row = Record("a", "red", "all", 0, "ode", {"one": None}, "x.png")
    Records.open(tmp_path / "out", IDENTITY).add([row])
    assert lines(tmp_path / "out") == [{"of": evaluation._digest(IDENTITY), **asdict(row)}]
