"""The benchmark: it runs the real loop, counts what the network is asked, leaves nothing behind. No time is judged."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from making import told

from rlkit import cli, recipe, registry
from rlkit.bench import train as bench
from rlkit.bench.train import Call, Watch
from rlkit.errors import RecipeError, RlkitError

CPU = torch.device("cpu")
SMALLEST = ("stages.main.data.per_step=1", "stages.main.data.group=4", "stages.main.rollout.steps=3")
ONE_UPDATE = ("stages.main.learner.batch=8", "stages.main.algorithm.window_start=[0,0]")  # 4 samples x a window of 2
KEYS = {
    *("workload", "algorithm", "device", "threads", "repeats", "sample_ratio", "train_ratio", "memory_ratio", "calls"),
    *("seconds", "ideal_seconds"),
}


@pytest.fixture
def words(small_backbone):
    """Changes that make `tiny` as small as it gets."""
    path = f"policy.backbone.path={small_backbone}"
    return ["run.threads=1", "run.device=cpu", path, *SMALLEST, *ONE_UPDATE]


def test_a_measurement_is_whole_and_leaves_nothing(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_rng_state()
    torch.set_num_threads(2)
    arguments = ["bench", "train", "--workload", "tiny", "--repeats", "1", "--json", *words]
    try:
        assert cli.main([*arguments, "run.deterministic=true"]) == 0
        assert torch.get_num_threads() == 2
        assert torch.are_deterministic_algorithms_enabled() == before[1]
        assert torch.equal(torch.get_rng_state(), before[2])
    finally:
        torch.set_num_threads(before[0])
    assert [file for file in tmp_path.rglob("*") if not file.is_dir()] == []
    assert {folder.name for folder in tmp_path.rglob("*")} == {"here", "temporary"}
    found = json.loads(capsys.readouterr().out)
    assert set(found) == KEYS
    assert (found["workload"], found["device"], found["threads"], found["repeats"]) == ("tiny", "cpu", 1, 1)
    assert found["algorithm"] == recipe.compose("quickstart")["stages"]["main"]["algorithm"]["name"]
    for ratio in ("sample_ratio", "train_ratio", "memory_ratio"):
        assert math.isfinite(found[ratio])
        assert found[ratio] > 0
    assert found["memory_ratio"] > 1, "the moments of the optimiser, at the least, come on top"
    assert set(found["seconds"]) == {"encode", "sample", "reward", "train", "save"}
    assert all(seconds > 0 for seconds in found["seconds"].values()), "every phase takes some time"
    assert set(found["ideal_seconds"]) == {"sample", "train"}


@pytest.mark.parametrize(("shared", "rows"), [(False, 4 * 3), (True, 1 + 4 * 2)], ids=["apart", "together"])
def test_calls_are_those_that_were_made(words, shared, rows):
    """Members that share their noise are one row until they part, which the demand does not know."""
    result = bench.train("tiny", None, [*words, f"stages.main.algorithm.shared_noise={shared}"], repeats=1)
    assert result.calls == {
        "sample": {"calls": 3, "rows": rows},
        "train": {"calls": 1, "rows": 8, "backward": 8},
        "demanded": {"sample": 4 * 3, "train": 8},
    }


def test_passes_without_gradient_and_guidance_are_counted(words):
    """Two micro-batches; the reference answers each once more, and guidance doubles whatever is asked."""
    more = ["stages.main.algorithm.kl=0.01", "stages.main.learner.micro_batch=4", "policy.guidance=2"]
    more += ["stages.main.algorithm.shared_noise=false"]
    calls = bench.train("tiny", None, [*words, *more], repeats=1).calls
    assert calls["sample"] == {"calls": 3, "rows": 2 * 12}
    assert calls["train"] == {"calls": 4, "rows": 2 * 2 * 8, "backward": 2 * 8}
    assert calls["demanded"] == {"sample": 2 * 12, "train": 2 * 8}


def test_the_stand_in_trains():
    """One layer: the network's size is the only thing that is not tested."""
    words = ["run.threads=1", "run.device=cpu", "policy.backbone.layers=1", "policy.backbone.heads=1", *SMALLEST]
    words += [*ONE_UPDATE, "stages.main.learner.micro_batch=4", "policy.train.lora.rank=2"]
    result = bench.train("sd3_50m", None, words, repeats=1)
    assert result.calls["train"] == {"calls": 2, "rows": 8, "backward": 8}
    assert "sd3_50m" in bench.table(result)
    assert f"{result.train_ratio:.3f}" in bench.table(result)


def test_the_stand_in_is_an_sd3_of_about_50_million_parameters():
    with torch.device("meta"):
        net = bench.StandIn().load(torch.device("meta"), torch.float32).net
    assert type(net).__name__ == "SD3Transformer2DModel"
    assert 45e6 < sum(parameter.numel() for parameter in net.parameters()) < 55e6
    assert "StandIn" not in registry.names("backbones")
    model = bench.StandIn(layers=1, heads=1).load(CPU, torch.float32)
    latents = torch.randn(2, *model.latent_shape, requires_grad=True)
    pictures = model.decode(latents)
    assert pictures.shape == (2, 3, 128, 128)
    assert pictures.requires_grad
    (one,), (again,) = model.encode(told(["a"])), model.encode(told(["a"]))
    assert torch.equal(one["tokens"], again["tokens"])
    assert model.sigmas(4)[[0, -1]].tolist() == [1.0, 0.0]


# ------------------------------------------------------------------------------------------- its parts


@pytest.mark.parametrize("name", registry.names("algorithms"))
def test_an_algorithm_composes_or_is_refused_by_the_recipe(name):
    """No entry is known by name here; another one's rows are fitted into whole updates."""
    try:
        (stage,) = bench.compose("sd3_50m", name).stages
    except RlkitError as error:
        pytest.skip(f"refused: {error}")
    rows = recipe.rows_per_step(stage)
    assert rows is None or rows % stage.learner.batch == 0
    assert stage.learner.micro_batch <= 8
    assert stage.evaluate.held_out == 0


def test_a_users_words_win():
    setup = bench.compose("sd3_50m", None, ["stages.main.learner.batch=16", "policy.backbone.layers=2"])
    assert setup.stages[0].learner.batch == 16
    assert setup.policy.backbone.layers == 2
    with pytest.raises(RecipeError, match="does not divide"):
        bench.compose("tiny", None, ["stages.main.learner.batch=7"])


def test_a_replay_makes_the_calls_again_and_leaves_no_gradient(toy_policy):
    policy, watch = toy_policy, Watch()
    policy.conditions.encode(told(["a", "b"]))
    hook = policy.net.register_forward_hook(watch.hook, with_kwargs=True)
    x = torch.randn(2, 4, 2, 2, requires_grad=True)
    watch.phase = "sample"
    with torch.no_grad():
        policy.models.current.velocity(x[:1], torch.ones(1), ["a"])
    watch.phase = "train"
    policy.models.current.velocity(x, torch.ones(2), ["a", "b"]).sum().backward()
    made = list(watch.calls)
    assert made == [Call("sample", 1, False), Call("train", 2, True)]
    assert watch.backward == 2
    policy.net.zero_grad()
    x.grad = None
    bench.replay(policy, watch, made)
    hook.remove()
    assert [(call.rows, call.gradient) for call in watch.calls[2:]] == [(1, False), (2, True)]
    assert watch.backward == 2 + 2
    assert x.grad is None
    assert all(parameter.grad is None for parameter in policy.net.parameters())


def test_memory_is_what_is_there_at_the_worst_moment():
    def action() -> None:
        for _ in range(3):  # one after the other: never more than two at a time
            _ = torch.zeros(1000), torch.zeros(500)

    one, pair = 4000, 6000
    assert pair <= bench._peak(CPU, action) <= 2 * pair
    assert bench._peak(CPU, lambda: None) == 0
    before = bench._alive(CPU)
    kept = torch.zeros(1000)
    views = [kept[:10], kept.view(10, 100)]
    assert bench._alive(CPU) - before == one, f"{len(views)} views are no memory of their own"


# ------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--workload", "tiyn"], 1, "Did you mean 'tiny'?"),
        (["--workload", "sd3"], 1, "Known: tiny, sd3_50m."),
        (["--workload", "tiny", "--algorithm", "flow_grp"], 1, "stages.main.algorithm: no algorithm named 'flow_grp'"),
        (["--workload", "tiny", "stages.main.data.group=1"], 1, "2 or more, not 1"),
        (["--workload", "tiny", "stages.main.stpes=1"], 1, "Did you mean"),
        (["--workload", "tiny", "--repeats", "0"], 2, "1 or more"),
        ([], 2, "--workload"),
    ],
)
def test_errors_say_what_is_near(words, code, said, capsys):
    assert cli.main(["bench", "train", *words]) == code
    error = capsys.readouterr().err
    assert said in error


def test_an_unknown_benchmark_is_a_usage_error(capsys):
    assert cli.main(["bench", "trian", "--workload", "tiny"]) == 2
    assert "'train'" in capsys.readouterr().err


def test_an_algorithm_that_the_reward_cannot_serve_is_refused(monkeypatch):
    """In the recipe check's own words; the entries that need a gradient are other files' business."""
    entry = type(bench.compose("tiny").stages[0].algorithm)
    needs = entry.needs
    monkeypatch.setattr(entry, "needs", lambda self: replace(needs(self), differentiable=True))
    with pytest.raises(RecipeError, match="passes no gradient back to the picture"):
        bench.compose("tiny")
    assert bench.compose("sd3_50m").stages[0].rewards[0].reward == bench.Brightness()


def test_the_table_says_what_json_says():
    result = bench.Result(
        *("tiny", "some", "cpu", 1, 3, 0.98, 0.95, 1.2),
        calls={
            "sample": {"calls": 10, "rows": 1000},
            "train": {"calls": 2, "rows": 256, "backward": 256},
            "demanded": {"sample": 1280, "train": None},
        },
        seconds={"encode": 0.1, "sample": 2.0, "reward": 0.2, "train": 1.0, "save": 0.3},
        ideal_seconds={"sample": 1.96, "train": 0.95},
    )
    text = bench.table(result)
    assert "1 thread," in text
    assert "network calls, sample: 10 with 1,000 rows, 1,280 demanded" in text
    assert text.endswith("network calls, train: 2 with 256 rows (256 backward)")
    assert "unknown" in bench.table(replace(result, memory_ratio=None))
    assert set(asdict(result)) == KEYS
