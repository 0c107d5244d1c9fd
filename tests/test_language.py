"""A token policy: its sets, what it samples, what it learns, and how it is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlkit import recipe, registry, session
from rlkit.backbones import tiny_captioner
from rlkit.data.prompts import PromptBatch, WorldPrompts
from rlkit.dist import Processes
from rlkit.errors import RecipeError
from rlkit.language import LanguagePolicy
from rlkit.pretrain.captioner import assemble, save
from rlkit.resources import Resources
from rlkit.rollouts.local import Local
from rlkit.types import Context, Plan, Samples, TokenModel
from rlkit.weights import Lora

CPU = torch.device("cpu")
PLAN = Plan()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained captioner, its weights drawn wide enough to matter."""
    made = tmp_path_factory.mktemp("captioner")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = assemble()
        with torch.no_grad():
            for parameter in parts.net.parameters():
                parameter.mul_(3.0) if parameter.ndim > 1 else None
    save(made, parts, {})
    return made


@pytest.fixture
def policy(folder: Path) -> Callable[..., LanguagePolicy]:
    def make(train: Lora | None = None, **options: object) -> LanguagePolicy:
        model = registry.build("backbones", "tiny_captioner", {"path": str(folder)}).load(CPU, torch.float32)
        assert isinstance(model, TokenModel)
        return LanguagePolicy(model, train, CPU, "fp32", 0, **options)  # type: ignore[arg-type]

    return make


def context(step: int = 0) -> Context:
    return Context(0, "main", step, 10, {}, Processes().gather)


def asked(step: int = 0, prompts: int = 3, group: int = 4) -> PromptBatch:
    return WorldPrompts(prompts, group, task="caption").open().draw(0, "main", step)


def written(policy: LanguagePolicy, batch: int | None = None, plan: Plan = PLAN, **options: object) -> Samples:
    rollout = Local(most=6, batch=batch, **options).start(policy, Processes())  # type: ignore[arg-type]
    return rollout.collect(asked(), plan, context())


def keys(samples: Samples) -> list[str]:
    return [prompt.key for prompt in samples.prompts]


def test_samples_hold_the_sequences_as_they_were_sampled(policy: Callable[..., LanguagePolicy]) -> None:
    samples = written(policy())
    tokens = samples.tokens
    assert tokens is not None
    assert samples.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(samples.texts) == 12
    assert tokens.decided.sum(1).tolist() == (tokens.length - tokens.prompt).tolist()
    for row in range(12):
        start, end = int(tokens.prompt[row]), int(tokens.length[row])
        assert tokens.decided[row].nonzero()[:, 0].tolist() == list(range(start, end))
        assert bool(tokens.finished[row]) or end - start == 6
        assert not tokens.log_prob[row, :start].any()
    assert len({tuple(row.tolist()) for row in tokens.ids}) > 6, "members of a group differ"


def test_the_ratio_is_1_before_an_update(policy: Callable[..., LanguagePolicy]) -> None:
    of = policy()
    samples = written(of)
    tokens = samples.tokens
    assert tokens is not None
    with torch.no_grad():
        known = of.models.current.log_probs(tokens.ids, tokens.length, keys(samples), tokens.temperature)
    assert float((known - tokens.log_prob)[tokens.decided].abs().max()) < 2e-5


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_is_a_part_of_the_policy(policy: Callable[..., LanguagePolicy], temperature: float) -> None:
    of = policy()
    samples = written(of, temperature=temperature)
    tokens = samples.tokens
    assert tokens is not None
    asked_of = (tokens.ids, tokens.length, keys(samples))
    with torch.no_grad():
        here, there = (of.models.current.log_probs(*asked_of, one) for one in (temperature, 1.0))
    assert float((here - tokens.log_prob)[tokens.decided].abs().max()) < 2e-5
    assert float((there - tokens.log_prob)[tokens.decided].abs().max()) > 0.1


def test_any_batch_gives_the_same_answers(policy: Callable[..., LanguagePolicy]) -> None:
    of = policy()
    whole, pieces = written(of), written(of, batch=5)
    assert whole.texts == pieces.texts
    assert whole.tokens is not None
    assert pieces.tokens is not None
    torch.testing.assert_close(whole.tokens.log_prob, pieces.tokens.log_prob, rtol=0, atol=1e-5)


def test_sets_answer_for_themselves_and_only_current_learns(policy: Callable[..., LanguagePolicy]) -> None:
    of = policy()
    samples = written(of)
    tokens = samples.tokens
    assert tokens is not None
    of.keep("reference")
    with torch.no_grad():
        for parameter in of.trainable.values():
            parameter.mul_(0.9)
    request = (tokens.ids, tokens.length, keys(samples))
    reference, current = of.models.reference.log_probs(*request), of.models.current.log_probs(*request)
    assert not reference.requires_grad
    assert current.requires_grad
    assert float((reference - tokens.log_prob)[tokens.decided].abs().max()) < 2e-5
    assert float((current.detach() - tokens.log_prob)[tokens.decided].abs().max()) > 1e-3
    again = written(of, plan=replace(PLAN, policy_set="reference"))
    assert again.texts == samples.texts, "a set samples as it did when it was copied"
    with pytest.raises(KeyError, match="no set 'old'"):
        of.models["old"]


def test_lora_begins_as_the_base_and_its_checkpoint_comes_back(policy: Callable[..., LanguagePolicy]) -> None:
    of, base = policy(Lora(rank=2)), policy()
    assert written(of).texts == written(base).texts
    with torch.no_grad():
        for parameter in of.trainable.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    changed = written(of)
    assert changed.texts != written(base).texts
    other = policy(Lora(rank=2))
    other.load_state(of.state())
    assert written(other).texts == changed.texts


def test_what_is_exported_others_load(policy: Callable[..., LanguagePolicy], tmp_path: Path) -> None:
    of = policy()
    with torch.no_grad():
        next(iter(of.trainable.values())).add_(0.01)
    line = of.export(tmp_path / "weights")
    assert "from_pretrained" in line
    model = tiny_captioner.TinyCaptioner(str(tmp_path / "weights")).load(CPU, torch.float32)
    assert written(LanguagePolicy(model, None, CPU, "fp32", 0)).texts == written(of).texts


def test_pictures_change_what_is_written(policy: Callable[..., LanguagePolicy]) -> None:
    of = policy()
    (one, other) = WorldPrompts(2, 1, task="caption").open().draw(0, "main", 0).prompts
    of.conditions.encode([one, other])
    samples = written(of)
    tokens = samples.tokens
    assert tokens is not None
    ids, length = tokens.ids[:1], tokens.length[:1]
    asked_of = [of.models.current.log_probs(ids, length, [prompt.key]) for prompt in (one, other)]
    assert not torch.allclose(*asked_of)


def test_pictures_that_do_not_come_back_are_forgotten(policy: Callable[..., LanguagePolicy]) -> None:
    of = policy()
    samples = written(of)
    of.conditions.forget(samples.prompts)
    with pytest.raises(KeyError):
        of.conditions.of(samples.prompts[0].key)


def test_encoders_cannot_be_freed(policy: Callable[..., LanguagePolicy]) -> None:
    with pytest.raises(RecipeError, match="no encoders"):
        policy(resources=Resources(encoders="free"))


# ---- whole runs ------------------------------------------------------------------------------------------------------

SMALL = [
    "stages.main.data.per_step=4",
    "stages.main.data.group=4",
    "stages.main.learner.batch=16",
    "stages.main.evaluate.held_out=4",
    "stages.main.evaluate.ends=4",
    "run.checkpoint_every=2",
]


def trained(folder: Path, steps: int, *words: str, resume: bool = False) -> list[dict[str, Any]]:
    """A run's rows of training, without what a clock says."""
    setup = recipe.read("world_captioner", [*SMALL, f"stages.main.steps={steps}", *words])
    session.run(setup, folder, Processes(), resume=resume, quiet=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    timed = ("time", "cpu_seconds")
    return [{k: v for k, v in row.items() if k not in timed and not k.startswith("seconds/")} for row in rows]


@pytest.mark.parametrize("words", [[], ["policy.train={lora: {rank: 2}}"]], ids=["all weights", "lora"])
def test_a_resumed_run_gives_the_numbers_of_an_unbroken_one(tmp_path: Path, words: list[str]) -> None:
    whole = trained(tmp_path / "whole", 3, *words)
    trained(tmp_path / "broken", 2, *words)
    assert trained(tmp_path / "broken", 3, *words, resume=True) == whole
    assert len(whole) == 3
    assert all(row["ratio/deviation"] < 1e-4 for row in whole), "one update a step"
    assert whole[0]["tokens/length"] <= 12
    assert whole[0]["grad_norm"] > 0


def test_a_reference_holds_the_policy_back(tmp_path: Path) -> None:
    rows = trained(tmp_path / "run", 3, "stages.main.algorithm.kl=0.1")
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6), "nothing has moved yet"
    assert rows[2]["kl"] > 1e-6


def test_the_trainer_recomputes_what_another_engine_may_have_rounded(tmp_path: Path) -> None:
    """Sampled in process, both agree, and the weights that correct for the engine are 1."""
    rows = trained(tmp_path / "run", 2, "stages.main.algorithm.importance=truncate")
    for row in rows:
        assert row["mismatch/mean"] < 1e-5
        assert row["mismatch/high"] == pytest.approx(1, abs=1e-4)
        assert row["importance/bounded"] == 0
