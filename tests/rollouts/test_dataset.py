"""Pairs of a data set in the place of samples; and a run that learns from them while its evaluations really sample."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rlkit import recipe, session
from rlkit.data.prompts import PairFile, PromptBatch
from rlkit.dist import Processes
from rlkit.errors import DataError, RecipeError
from rlkit.policy import Policy
from rlkit.rollouts.dataset import Dataset
from rlkit.rollouts.local import Local
from rlkit.stages import Setup
from rlkit.tracking import Metrics
from rlkit.types import Context, Plan, Prompt, Samples
from rlkit.world import grammar, scenes

MakeContext = Callable[..., Context]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Six pairs of the embedded world: the chosen picture shows its caption, the rejected one another."""
    captions = grammar.panel("train", 12)
    pictures = (scenes.render_batch(captions, np.random.default_rng(0)) * 255).round().astype(np.uint8)
    rows = []
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.transpose(1, 2, 0)).save(tmp_path / f"{i}.png")
    for i in range(6):
        rows.append(json.dumps({"prompt": captions[i].text, "chosen": f"{i}.png", "rejected": f"{i + 6}.png"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    return tmp_path / "pairs.jsonl"


def drawn(pairs: Path, per_step: int = 3, step: int = 0) -> PromptBatch:
    return PairFile(str(pairs), per_step).open().draw(0, "main", step)


def collect(
    policy: Policy, prompts: PromptBatch, context: Context, rank: int = 0, count: int = 1, **more: Any
) -> Samples:
    rollout = Dataset(**more).start(policy, Processes(rank, count))
    rollout.load({}, 7)
    return rollout.collect(prompts, Plan(), context)


def test_a_pair_is_a_group_of_two_with_the_chosen_first(tiny_policy: Policy, context: MakeContext, pairs: Path) -> None:
    batch = drawn(pairs)
    samples = collect(tiny_policy, batch, context(4))
    assert samples.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert samples.preference is not None
    assert samples.preference.tolist() == [True, False] * 3
    assert samples.index.tolist() == list(range(6))
    assert samples.sample_id.tolist() == list(range(24, 30))
    assert (samples.total, samples.version, samples.path, samples.sigmas) == (6, 7, None, None)
    for i, prompt in enumerate(samples.prompts):
        assert prompt == batch.prompts[i // 2]
        stored = torch.from_numpy(prompt.metadata["chosen" if i % 2 == 0 else "rejected"].read())
        assert torch.equal(samples.media[i], stored.permute(2, 0, 1).float() / 255), "as stored, to the last digit"
    assert samples.media.dtype == samples.latents.dtype == torch.float32
    assert samples.latents.shape == (6, *tiny_policy.model.latent_shape)
    assert (tiny_policy.model.decode(samples.latents) - samples.media).abs().mean() < 0.03
    v = tiny_policy.models.current.velocity(samples.latents, torch.full((6,), 0.5), [p.text for p in samples.prompts])
    assert v.isfinite().all(), "the prompts are encoded"


@pytest.mark.parametrize("count", [2, 4, 9])
def test_shares_make_the_whole(tiny_policy: Policy, context: MakeContext, pairs: Path, count: int) -> None:
    whole = collect(tiny_policy, drawn(pairs), context())
    parts = [collect(tiny_policy, drawn(pairs), context(), rank, count) for rank in range(count)]
    assert (min(len(part) for part in parts) == 0) == (count == 9)
    for name in ("media", "latents", "group", "index", "sample_id", "preference"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert tuple(prompt for part in parts for prompt in part.prompts) == whole.prompts


def test_the_batch_changes_no_latent(tiny_policy: Policy, context: MakeContext, pairs: Path) -> None:
    whole, pieces = (collect(tiny_policy, drawn(pairs), context(), batch=batch) for batch in (None, 4))
    torch.testing.assert_close(pieces.latents, whole.latents)


@pytest.mark.parametrize("group", [1, 2])
def test_prompts_without_pictures_are_sampled(tiny_policy: Policy, context: MakeContext, group: int) -> None:
    prompts = PromptBatch((Prompt(0, "a red circle"), Prompt(1, "two blue crosses")), group)
    found = collect(tiny_policy, prompts, context(), steps=3)
    expected = Local(steps=3).start(tiny_policy, Processes()).collect(prompts, Plan(), context())
    assert torch.equal(found.media, expected.media)
    assert torch.equal(found.latents, expected.latents)
    assert found.preference is None
    assert found.sigmas is not None
    assert len(found.sigmas) == 4
    assert found.version == 7


def test_pictures_of_another_size_are_refused(tiny_policy: Policy, context: MakeContext, pairs: Path) -> None:
    for file in pairs.parent.glob("*.png"):
        Image.open(file).resize((40, 24)).save(file)
    text = r"pairs\.jsonl:\d: the chosen picture is 40x24, but the policy draws 32x32\. Give the pictures the size"
    with pytest.raises(DataError, match=text):
        collect(tiny_policy, drawn(pairs), context())


def test_a_backbone_that_cannot_encode_is_named_at_the_start(toy_policy: Policy) -> None:
    with pytest.raises(RecipeError, match=r"^policy\.backbone: the policy's backbone \(ToyNet\) cannot encode"):
        Dataset().start(toy_policy, Processes())


@pytest.mark.parametrize(("options", "text"), [({"steps": 0}, "steps must be 1"), ({"batch": 0}, "batch must be 1")])
def test_option_errors(options: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Dataset(**options)


# ---- a run -----------------------------------------------------------------------------------------------------------


def offline(pairs: Path, backbone: Path, **changes: Any) -> Setup:
    stage = {
        "data": {"name": "pairs", "path": str(pairs), "per_step": 3, "held_out_split": "validation"},
        "rollout": {"name": "dataset", "steps": 4},
        "algorithm": {"name": "diffusion_dpo", "pairs": "dataset", "beta": 100, "draws": 4},
        "rewards": {},
        "learner": {"lr": 1e-3, "batch": 12},
        "evaluate": {"every": 0, "held_out": 4},
        "steps": 2,
    }
    run = {"checkpoint_every": 1, "keep_checkpoints": 9, "threads": 1, "wandb": "disabled", "device": "cpu"}
    policy = {"backbone": {"name": "tiny", "path": str(backbone)}}
    setup = recipe.resolve({"run": run, "policy": policy, "stages": {"main": {**stage, **changes}}})
    recipe.check(setup)
    return setup


@pytest.mark.parametrize("rewards", [{}, {"composition": 1.0}], ids=["no reward", "a reward to look at"])
def test_a_run_learns_from_pairs_and_evaluates_what_the_policy_draws(
    pairs: Path, small_backbone: Path, tmp_path: Path, rewards: dict[str, float]
) -> None:
    setup = offline(pairs, small_backbone, rewards=rewards, steps=8, learner={"lr": 3e-4, "batch": 12})
    session.run(setup, tmp_path / "run", Processes(), quiet=True)
    rows = Metrics.read(tmp_path / "run")
    training = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert training[0]["accuracy"] == 0.5
    assert training[0]["loss/preference"] == pytest.approx(0.693147, abs=1e-5)
    assert training[-1]["accuracy"] > 0.5
    assert training[-1]["loss/preference"] < 0.69
    assert [row["count"] for row in evaluations] == [4, 4]
    if rewards:
        assert training[0]["composition/strict"] == pytest.approx(0.5, abs=0.2), "the data's pictures: half are right"
        assert evaluations[0]["held_out/strict"] < 0.2, "the untrained policy's, which are noise"


def test_a_dataset_and_an_algorithm_that_samples_do_not_fit(pairs: Path, small_backbone: Path) -> None:
    with pytest.raises(RecipeError, match=r"needs path and log_prob .* this rollout does not give"):
        offline(pairs, small_backbone, algorithm={"name": "flow_grpo"}, rewards={"composition": 1.0})


def test_an_unusable_pair_stops_the_run_before_its_first_evaluation(
    pairs: Path, small_backbone: Path, tmp_path: Path
) -> None:
    (pairs.parent / "8.png").unlink()
    with pytest.raises(DataError, match=r"pairs\.jsonl:3: the rejected picture .*8\.png does not exist"):
        session.run(offline(pairs, small_backbone), tmp_path / "run", Processes(), quiet=True)
    assert not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize("anchor", ["base", "stage_start"])
def test_a_run_that_refreshes_its_reference_resumes_to_the_bit(
    pairs: Path, small_backbone: Path, tmp_path: Path, anchor: str
) -> None:
    algorithm = {"name": "diffusion_dpo", "pairs": "dataset", "beta": 100, "draws": 4, "refresh_reference": 2}
    setup = offline(pairs, small_backbone, algorithm=algorithm, anchor=anchor, steps=4)
    session.run(setup, tmp_path / "whole", Processes(), quiet=True)
    short = replace(setup, stages=(replace(setup.stages[0], steps=3),))
    session.run(short, tmp_path / "cut", Processes(), quiet=True)
    session.run(setup, tmp_path / "cut", Processes(), resume=True, quiet=True)

    def losses(folder: Path) -> list[float]:
        return [row["loss/preference"] for row in Metrics.read(folder) if row["kind"] == "train"]

    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole")[2] == pytest.approx(0.693147, abs=1e-5), "the reference has just caught up"
