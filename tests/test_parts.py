"""A policy of three parts: what a gradient reaches, what a stage leaves alone, and that each stage is what it says."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from making import scores_of
from torch import Tensor

from rlkit import checkpoint, dist, recipe, session
from rlkit.data.prompts import PromptBatch, WorldPrompts
from rlkit.errors import RecipeError
from rlkit.parts import Parts
from rlkit.rollouts.relay import Relay
from rlkit.run import Interrupted, Run, begin
from rlkit.scoring import Scoring, WeightedReward, averaged
from rlkit.stages import Setup
from rlkit.tracking import Metrics
from rlkit.types import Context, FlowModel, Loss, Plan, Prompt, Samples, Scores

CPU = torch.device("cpu")
ALL = {"captioner": {"lora": {"rank": 2}}, "connector": {"full": True}, "generator": {"lora": {"rank": 2}}}
MakeContext = Any


@dataclass(frozen=True)
class Likeness:
    """Minus the mean square between a picture and its prompt's source: a reward with a gradient and no weights."""

    reads = ("source",)
    differentiable = True

    def __call__(self, samples: Samples) -> Tensor:
        return self.of(samples.media, samples.prompts)

    def of(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        sources = torch.stack([prompt.source for prompt in prompts if prompt.source is not None])
        return -(media - sources).pow(2).flatten(1).mean(1)


@dataclass(frozen=True)
class Brevity:
    """Minus the number of a caption's letters: a reward that looks at no picture."""

    reads = ("text",)

    def __call__(self, samples: Samples) -> Tensor:
        return -torch.tensor([float(len(text)) for text in samples.texts])


@dataclass(frozen=True)
class Fixed:
    """The generator of `path`, which is told what a file says of each source's mean colour: a fixed condition."""

    path: str
    told: str

    kind = "flow"

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        from rlkit.backbones.tiny import Tiny

        conditions = torch.load(self.told, weights_only=True)
        model = Tiny(self.path).load(device, dtype)
        return replace(model, encode=lambda prompts: [conditions[place_of(prompt)] for prompt in prompts])


def place_of(prompt: Prompt) -> str:
    assert prompt.source is not None
    return f"{prompt.source.double().sum():.6f}"


@pytest.fixture(scope="module")
def base(small_backbone: Path) -> dict[str, Any]:
    """A recipe without stages."""
    parts = {
        "captioner": {"backbone": "tiny_captioner"},
        "connector": {"backbone": {"name": "projector", "width": 16}},
        "generator": {"backbone": {"name": "tiny", "path": str(small_backbone)}},
    }
    return {"run": {"threads": 1, "wandb": "disabled", "checkpoint_every": 1}, "policy": {"parts": parts}}


STAGE: dict[str, Any] = {
    "data": {"name": "world", "task": "caption", "per_step": 2, "group": 3},
    "rollout": {"name": "relay", "steps": 3, "writer": {"name": "local", "most": 8}},
    "rewards": {"likeness": {"reward": "test_parts:Likeness"}},
    "learner": {"lr": 1e-2, "batch": 6},
    "evaluate": {"held_out": 2},
    "monitors": None,
    "steps": 2,
}
COLD = STAGE | {"algorithm": {"name": "reward_backprop", "last_steps": 2}, "train": ALL}
WORDS = STAGE | {"algorithm": "token_grpo", "train": {"captioner": {"lora": {"rank": 2}}}}
PIXELS = STAGE | {
    "algorithm": {"name": "flow_grpo", "window": 2, "window_start": [0, 0]},
    "train": {"generator": {"lora": {"rank": 2}}},
    "learner": {"lr": 1e-2, "batch": 12},
}


def written(folder: Path, base: Mapping[str, Any], **stages: Any) -> Setup:
    """A recipe as a file, read and checked."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**base, "stages": stages}, sort_keys=False))
    return recipe.read(str(file))


def loaded(folder: Path, base: Mapping[str, Any], stage: Mapping[str, Any]) -> Parts:
    setup = written(folder, base, main=stage)
    policy = session.load_policy(setup)
    assert isinstance(policy, Parts)
    begin(policy, setup.stages[0])
    return policy


def run(folder: Path, setup: Setup, resume: bool = False) -> None:
    session.run(setup, folder, dist.Processes(), resume=resume, quiet=True)


def saved(folder: Path) -> dict[str, Tensor]:
    """The newest checkpoint's weights."""
    found = checkpoint.newest(folder)
    assert found is not None
    return {k.removeprefix("policy/current/"): v for k, v in found.tensors.items() if k.startswith("policy/current/")}


def batch(count: int = 2, group: int = 1) -> PromptBatch:
    return WorldPrompts(count, group, task="caption").draw(0, "test", 0)


def collected(policy: Parts, context: Context, prompts: PromptBatch, plan: Plan | None = None) -> Samples:
    options = Relay(steps=3, writer={"name": "local", "most": 8})
    return options.start(policy, dist.Processes()).collect(prompts, plan or Plan(), context)


# ---- the rollout -----------------------------------------------------------------------------------------------------


def test_captions_of_a_group_differ_and_their_pictures_grow_from_one_noise(
    tmp_path: Path, base: dict[str, Any], context: MakeContext
) -> None:
    policy = loaded(tmp_path, base, WORDS)
    samples = collected(policy, context(), batch(2, 4))
    assert samples.tokens is not None
    assert len(samples.texts) == 8
    assert len(set(samples.texts)) > 2
    assert [prompt.text for prompt in samples.prompts] == [""] * 8, "the prompts are the captioner's"
    for a in range(8):
        for b in range(a):
            same_words = bool((samples.tokens.ids[a] == samples.tokens.ids[b]).all())
            same_picture = bool(torch.allclose(samples.latents[a], samples.latents[b], atol=1e-5))
            assert same_picture == (same_words and a // 4 == b // 4), (a, b)


def test_several_pictures_of_a_caption_share_their_score(
    tmp_path: Path, base: dict[str, Any], context: MakeContext
) -> None:
    policy = loaded(tmp_path, base, WORDS)
    options = Relay(steps=3, pictures=3, writer={"name": "local", "most": 8})
    prompts = batch(2, 4)
    samples = options.start(policy, dist.Processes()).collect(prompts, Plan(), context())
    one = collected(policy, context(), prompts)
    assert samples.texts == one.texts
    assert torch.equal(samples.media, one.media), "the first picture is the only one's"
    assert samples.shots is not None
    shots = samples.shots.media.reshape(8, 3, *samples.media.shape[1:])
    assert torch.equal(shots[:, 0], samples.media)
    assert not torch.allclose(shots[:, 1], shots[:, 2], atol=1e-3), "of other noise"
    scored = Scoring([WeightedReward("likeness", Likeness(), 1.0), WeightedReward("brevity", Brevity(), 0.0)])
    scores = scored(samples, lambda values: values)
    sources = torch.stack([p.source for p in samples.prompts if p.source is not None])
    by_hand = -(shots - sources[:, None]).pow(2).flatten(2).mean(2).mean(1)
    torch.testing.assert_close(scores.total, by_hand)
    assert scores.raw[:, 1].tolist() == [-float(len(text)) for text in samples.texts]


def test_a_sample_of_which_a_picture_has_no_score_has_none() -> None:
    raw = torch.tensor([[1.0], [3.0], [torch.nan], [5.0]])
    found = averaged(Scores(("a",), raw, torch.isfinite(raw), torch.ones(1), {"a/b": raw[:, 0]}), 2)
    assert found.raw[0].item() == 2.0
    assert found.scored.tolist() == [True, False]
    assert found.total.tolist() == [2.0, 0.0]


def test_a_generators_group_draws_one_caption(tmp_path: Path, base: dict[str, Any], context: MakeContext) -> None:
    policy = loaded(tmp_path, base, PIXELS)
    plan = Plan(dynamics="flow", noise_level=0.7, window=(0, 2), record=True)
    samples = collected(policy, context(), batch(2, 3), plan)
    assert samples.path is not None
    assert samples.tokens is None
    assert samples.texts[0] == samples.texts[2]
    assert samples.texts[3] == samples.texts[5]
    assert [prompt.text for prompt in samples.prompts] == list(samples.texts)
    assert samples.prompts[0].key != samples.prompts[3].key
    assert not torch.equal(samples.media[0], samples.media[1])


def test_two_answers_that_read_alike_are_told_apart() -> None:
    asked = batch().prompts[0]
    one, other = (replace(asked, text="a cube", asked=asked, answer=ids) for ids in ((1, 2), (1, 3)))
    assert one.key != other.key
    assert one.key == replace(one, text="as it may be decoded").key


@pytest.mark.parametrize("reads", ["answer", "last", "picture"])
def test_what_the_connector_reads(tmp_path: Path, base: dict[str, Any], context: MakeContext, reads: str) -> None:
    parts = base["policy"]["parts"] | {"connector": {"backbone": {"name": "projector", "reads": reads}}}
    policy = loaded(tmp_path, {**base, "policy": {"parts": parts}}, PIXELS)
    samples = collected(policy, context(), batch(2, 1))
    keys = [prompt.key for prompt in samples.prompts]
    states = policy.conditions._states_of(keys, "current")
    answers = [len(prompt.answer) for prompt in samples.prompts]
    assert [len(one) for one in states] == {"answer": answers, "last": [1, 1], "picture": [16, 16]}[reads]
    if reads == "last":
        whole = replace(policy.connector.connection, reads="answer")
        policy.connector.connection = whole
        torch.testing.assert_close(states[0][0], policy.conditions._states_of(keys, "current")[0][-1])
    if reads == "picture":
        assert samples.texts == (), "nothing is written"
        assert answers == [0, 0]


@pytest.mark.parametrize("sees", [False, True])
def test_a_caption_is_read_by_itself_unless_the_captioner_is_to_see_the_picture(
    tmp_path: Path, base: dict[str, Any], sees: bool
) -> None:
    parts = base["policy"]["parts"] | {"connector": {"backbone": {"name": "projector", "sees": sees}}}
    policy = loaded(tmp_path, {**base, "policy": {"parts": parts}}, PIXELS)
    told = [replace(one, text="a", asked=one, answer=(7, 8, 9)) for one in batch(2).prompts]
    policy.conditions.encode(told)
    one, other = policy.conditions._states_of([prompt.key for prompt in told], "current")
    assert one.shape == other.shape
    assert torch.allclose(one, other, atol=1e-5) != sees


def test_a_held_reader_is_the_captioner_from_before_the_words_were_trained(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    held = base["policy"]["parts"] | {"connector": {"backbone": {"name": "projector", "width": 16, "held": True}}}
    base = {**base, "policy": {"parts": held}}
    words, pixels = (one | {"steps": 1} for one in (WORDS, PIXELS))
    setup = written(tmp_path, base, cold=COLD | {"steps": 1}, words=words, pixels=pixels)
    setup = replace(setup, options=replace(setup.options, keep_checkpoints=9))
    run(tmp_path / "run", setup)
    after = [checkpoint.at(tmp_path / "run", at).tensors for at in (1, 2, 3)]
    name = next(key for key in after[0] if key.startswith("policy/current/captioner/") and "up_proj.lora_A" in key)
    held_name = name.replace("/current/", "/reader/")
    assert held_name not in after[0], "the cold start trains what reads"
    for one in after[1:]:
        assert torch.equal(one[held_name], after[0][name])
        assert not torch.equal(one[name], after[0][name])
    policy = session.load_policy(setup, folder=tmp_path / "run")
    assert isinstance(policy, Parts)
    begin(policy, setup.stages[2])
    told = [replace(one, text="a", asked=one, answer=(7, 8, 9)) for one in batch(1).prompts]

    def read() -> Tensor:
        policy.conditions.renew()
        policy.conditions.encode(told)
        return policy.conditions.batch([told[0].key])["tokens"]

    with torch.no_grad():
        by_reader = read()
        policy.writer.use("reader")
        policy.writer.drop("reader")
        torch.testing.assert_close(read(), by_reader)
    assert (tmp_path / "run" / "weights" / "reader" / "adapter_model.safetensors").is_file()


def test_of_a_part_some_weights_can_be_trained_alone(tmp_path: Path, base: dict[str, Any]) -> None:
    way = {"full": True, "only": ["lm_head"]}
    folder = tmp_path / "run"
    run(folder, written(tmp_path, base, main=WORDS | {"train": {"captioner": way}}))
    start = loaded(tmp_path, base, WORDS | {"train": {"captioner": way}})
    assert set(start.trainable) == {"captioner/lm_head.weight"}
    before = start.state()
    changed = {name for name, one in saved(folder).items() if not torch.equal(one, before[f"current/{name}"])}
    assert changed == {"captioner/lm_head.weight"}
    with pytest.raises(RecipeError, match=r"stages.main.train.captioner.only: no weight of the captioner .* 'lm_haed'"):
        loaded(tmp_path, base, WORDS | {"train": {"captioner": way | {"only": ["lm_haed"]}}})
    with pytest.raises(RecipeError, match="a list of words"):
        written(tmp_path, base, main=WORDS | {"train": {"captioner": way | {"only": "lm_head"}}})


# ---- stage 1: what a gradient reaches --------------------------------------------------------------------------------


def reconstructing(policy: Parts, context: Context, steps: int = 2) -> Callable[[], Tensor]:
    """The loss of stage 1 on two pictures, as a function of the policy's weights."""
    from rlkit.algorithms.reward_backprop import RewardBackprop

    algorithm = RewardBackprop(last_steps=steps)
    context = replace(context, sampling_steps=3)
    samples = collected(policy, context, batch(), algorithm.plan(context))
    rows = algorithm.rows(samples, scores_of([0.0] * len(samples)), context)
    models = policy.models_with(lambda media, prompts: Likeness().of(media, prompts))

    def loss() -> Tensor:
        terms: Loss = algorithm.loss(models, rows)
        return terms.terms["reward"][0].sum()

    return loss


def stirred(policy: Parts) -> None:
    """Weights other than those that LoRA starts with, whose gradient is half 0."""
    with torch.no_grad():
        for i, tensor in enumerate(policy.trainable.values()):
            draw = torch.Generator().manual_seed(i)
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=draw))


@pytest.mark.parametrize(
    "trained", [["captioner"], ["connector"], ["generator"], ["captioner", "connector"], list(ALL)]
)
def test_the_cold_starts_gradient_reaches_what_the_stage_trains_and_nothing_else(
    tmp_path: Path, base: dict[str, Any], context: MakeContext, trained: list[str]
) -> None:
    policy = loaded(tmp_path, base, COLD)
    stirred(policy)
    policy.stage(dict.fromkeys(trained, ()), "flow")
    loss = reconstructing(policy, context())()
    everything = {f"{n}/{k}": p for n, one in policy.parts.items() for k, p in one.net.named_parameters()}
    wanted = {name for name, one in everything.items() if one.requires_grad}
    assert wanted == set(policy.trainable)
    assert {name.split("/")[0] for name in wanted} == set(trained)
    found = torch.autograd.grad(loss, [everything[name] for name in sorted(wanted)], allow_unused=True)
    without = [name for name, one in zip(sorted(wanted), found, strict=True) if one is None or not one.abs().max() > 0]
    # The generator's last block asks nothing in the words' name: what they would hear is read by nobody.
    unread = [name for name in sorted(wanted) if ".1.attn.add_q_proj." in name]
    assert without == unread


def test_the_cold_starts_gradient_is_that_of_differences(
    tmp_path: Path, base: dict[str, Any], context: MakeContext
) -> None:
    policy = loaded(tmp_path, base, COLD)
    stirred(policy)
    policy.stage(dict.fromkeys(ALL, ()), "flow")
    loss = reconstructing(policy, context())
    names = {part: next(n for n in policy.trainable if n.startswith(f"{part}/")) for part in ALL}
    for part, name in names.items():
        tensor = policy.trainable[name]
        (slope,) = torch.autograd.grad(loss(), [tensor])
        direction = slope / slope.norm()
        step = 2e-2 * float(tensor.detach().norm())
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(sign * step * direction)
                policy.updated()
                ends.append(float(loss()))
                tensor.sub_(sign * step * direction)
                policy.updated()
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(slope.norm()), rel=0.08), part


def test_a_condition_is_read_anew_once_weights_have_changed(
    tmp_path: Path, base: dict[str, Any], context: MakeContext
) -> None:
    policy = loaded(tmp_path, base, COLD)
    keys = [prompt.key for prompt in collected(policy, context(), batch()).prompts]
    with torch.no_grad():
        before = policy.conditions.batch(keys)
        assert policy.conditions.batch(keys)["tokens"].equal(before["tokens"])
        policy.trainable["connector/first.bias"].add_(1.0)
        assert not torch.allclose(policy.conditions.batch(keys)["tokens"], before["tokens"], atol=1e-3)


# ---- stages 2 and 3: the algorithms that they are named after --------------------------------------------------------


def test_understanding_is_token_grpo_of_the_captioner_alone(tmp_path: Path, base: dict[str, Any]) -> None:
    """With a reward that looks at no picture, the relay trains the captioner to the very weights that it has alone."""
    brief = {"rewards": {"brevity": {"reward": "test_parts:Brevity"}}}
    run(tmp_path / "parts", written(tmp_path, base, main=WORDS | brief))
    alone = {**base, "policy": {"backbone": "tiny_captioner", "train": WORDS["train"]["captioner"]}}
    stage = {k: v for k, v in (WORDS | brief).items() if k != "train"} | {"rollout": STAGE["rollout"]["writer"]}
    run(tmp_path / "alone", written(tmp_path, alone, main=stage))
    parts, single = saved(tmp_path / "parts"), saved(tmp_path / "alone")
    assert parts.keys() == {f"captioner/{name}" for name in single}
    assert all(torch.equal(parts[f"captioner/{name}"], one) for name, one in single.items())
    start = loaded(tmp_path, base, WORDS).state()
    assert any(not torch.equal(one, start[f"current/{name}"]) for name, one in parts.items()), "it learned"


def test_generation_is_flow_grpo_on_a_fixed_condition(tmp_path: Path, base: dict[str, Any]) -> None:
    """With a connector that reads the picture, what the generator is told is fixed: given by hand, it learns alike."""
    backbone = {"name": "projector", "width": 16, "reads": "picture"}
    ours = {**base, "policy": {"parts": base["policy"]["parts"] | {"connector": {"backbone": backbone}}}}
    setup = written(tmp_path, ours, main=PIXELS)
    policy = session.load_policy(setup)
    assert isinstance(policy, Parts)
    begin(policy, setup.stages[0])
    data = setup.stages[0].data
    prompts = [*data.held_out(2), *(one for step in range(2) for one in data.draw(0, "main", step).prompts)]
    told = {}
    for prompt in prompts:  # one by one, as other policies encode
        policy.conditions.encode([replace(prompt, asked=prompt)])
        with torch.no_grad():
            found = policy.conditions.batch([replace(prompt, asked=prompt).key])
        told[place_of(prompt)] = {name: one[0] for name, one in found.items()}
    torch.save(told, tmp_path / "told.pt")
    run(tmp_path / "parts", setup)
    own = {"name": "test_parts:Fixed", "path": base["policy"]["parts"]["generator"]["backbone"]["path"]}
    alone = {"backbone": own | {"told": str(tmp_path / "told.pt")}, "train": PIXELS["train"]["generator"]}
    stage = {k: v for k, v in PIXELS.items() if k != "train"} | {"rollout": {"name": "local", "steps": 3}}
    run(tmp_path / "alone", written(tmp_path, {**base, "policy": alone}, main=stage))
    parts, single = saved(tmp_path / "parts"), saved(tmp_path / "alone")
    assert parts.keys() == {f"generator/{name}" for name in single}
    start = policy.state()
    for name, one in single.items():
        # The captioner reads a batch here and one picture there: they differ in their last bits.
        torch.testing.assert_close(parts[f"generator/{name}"], one, atol=2e-4, rtol=0)
    assert any(not torch.allclose(one, start[f"current/{name}"], atol=2e-3) for name, one in parts.items())


# ---- a curriculum ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curriculum(tmp_path_factory: pytest.TempPathFactory, base: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("curriculum")
    setup = written(folder, base, cold=COLD, words=WORDS, pixels=PIXELS)
    setup = replace(setup, options=replace(setup.options, keep_checkpoints=9))
    run(folder / "run", setup)
    return folder


def weights_at(folder: Path, at: int) -> dict[str, Tensor]:
    return {k: v for k, v in checkpoint.at(folder / "run", at).tensors.items() if k.startswith("policy/current/")}


@pytest.mark.parametrize(("stage", "moved"), [(0, set(ALL)), (1, {"captioner"}), (2, {"generator"})])
def test_a_stage_changes_what_it_trains_and_no_bit_of_the_rest(curriculum: Path, stage: int, moved: set[str]) -> None:
    before = weights_at(curriculum, 2 * stage) if stage else loaded_state(curriculum)
    after = weights_at(curriculum, 2 * stage + 2)
    assert after.keys() == before.keys()
    changed = {name.split("/")[2] for name in after if not torch.equal(after[name], before[name])}
    assert changed == moved


def loaded_state(folder: Path) -> dict[str, Tensor]:
    policy = session.load_policy(recipe.read(str(folder / "recipe.yaml")))
    return {f"policy/{name}": one for name, one in policy.state().items()}


def test_a_run_that_is_stopped_in_its_second_stage_goes_on_to_the_same_numbers(
    curriculum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    setup = recipe.read(str(curriculum / "recipe.yaml"))
    report = Run.report

    def stopped(self: Run, *args: Any) -> None:
        report(self, *args)
        self.stop.asked = self.stage.name == "words" and self.done == 1

    monkeypatch.setattr(Run, "report", stopped)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", setup)
    monkeypatch.setattr(Run, "report", report)
    run(tmp_path / "run", setup, resume=True)
    assert saved(tmp_path / "run").keys() == saved(curriculum / "run").keys()
    for name, one in saved(curriculum / "run").items():
        assert torch.equal(saved(tmp_path / "run")[name], one), name


def test_a_row_shows_the_captions_length_beside_the_reward(curriculum: Path) -> None:
    rows = [row for row in Metrics.read(curriculum / "run") if row["kind"] == "train" and row["stage"] == "words"]
    assert len(rows) == 2
    assert all(row["tokens/length"] > 1 and row["reward/mean"] < 0 for row in rows)


@pytest.mark.parametrize("at", [0, 2, 4, 6])
def test_a_sheet_shows_each_source_beside_what_was_drawn_of_it(curriculum: Path, at: int) -> None:
    from PIL import Image

    samples = curriculum / "run" / "samples"
    told = json.loads((samples / f"{at:06d}.json").read_text())
    assert told["given"] == 1
    pixels = np.asarray(Image.open(samples / f"{at:06d}.png").convert("RGB"), dtype=np.float32)
    sheet = torch.from_numpy(pixels / 255).permute(2, 0, 1)
    for place, prompt in enumerate(WorldPrompts(2, 3, task="caption").held_out(2)):
        assert prompt.source is not None
        torch.testing.assert_close(sheet[:, :, place * 64 : place * 64 + 32], prompt.source, atol=3e-3, rtol=0)
        assert told["items"][place]["text"], "and what was said"
    assert (sheet[:, :, 32:64] - sheet[:, :, :32]).abs().mean() > 0.01


def test_what_is_exported_is_loaded_again(curriculum: Path) -> None:
    from safetensors.torch import load_file

    weights = curriculum / "run" / "weights"
    connector = load_file(weights / "connector" / "connector.safetensors")
    ours = {k.removeprefix("connector/"): v for k, v in saved(curriculum / "run").items() if k.startswith("connector/")}
    assert all(torch.equal(connector[name], one) for name, one in ours.items())
    assert connector.keys() == ours.keys()
    assert (weights / "captioner" / "adapter_model.safetensors").is_file()
    assert (weights / "generator" / "pytorch_lora_weights.safetensors").is_file()


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "where", "words"),
    [
        (WORDS | {"train": None}, "stages.main.train", "which parts"),
        (WORDS | {"train": {"captoner": {"full": True}}}, "stages.main.train.captoner", "captioner"),
        (WORDS | {"train": {"connector": {"full": True}}}, "stages.main.train.connector", "no gradient"),
        (WORDS | {"train": {"captioner": {"rank": 3}}}, "stages.main.train.captioner.rank", "no such key"),
        (WORDS | {"rollout": {"name": "local", "steps": 3}}, "stages.main.rollout", "one network"),
        (WORDS | {"rollout": {"name": "relay", "writer": {"name": "dataset"}}}, "rollout.writer", "no captions"),
        (WORDS | {"learner": {"lr": 1e-3, "batch": 6, "lr_of": {"captoner": 1e-3}}}, "lr_of.captoner", "captioner"),
        (COLD | {"data": STAGE["data"] | {"task": "t2i"}}, "stages.main.rollout", "source"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(
    tmp_path: Path, base: dict[str, Any], stage: dict[str, Any], where: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        written(tmp_path, base, main=stage)
    assert where in str(caught.value)


def test_parts_that_make_no_policy_are_refused(tmp_path: Path, base: dict[str, Any]) -> None:
    parts = dict(base["policy"]["parts"])
    del parts["connector"]
    with pytest.raises(RecipeError, match="a connector"):
        written(tmp_path, {**base, "policy": {"parts": parts}}, main=WORDS)
    with pytest.raises(RecipeError, match="one network"):
        written(tmp_path, {**base, "policy": {"backbone": "tiny_captioner"}}, main={**WORDS, "train": None})


def test_two_stages_that_train_a_part_in_different_ways_are_refused(tmp_path: Path, base: dict[str, Any]) -> None:
    other = WORDS | {"train": {"captioner": {"full": True}}}
    with pytest.raises(RecipeError, match="stage 'cold' trains the captioner in another way"):
        written(tmp_path, base, cold=COLD, words=other)


def test_a_connector_of_other_neighbours_is_refused(tmp_path: Path, base: dict[str, Any]) -> None:
    policy = loaded(tmp_path, base, COLD)
    policy.connector.write(tmp_path / "made")
    path = {"name": "projector", "width": 17, "path": str(tmp_path / "made")}
    parts = base["policy"]["parts"] | {"connector": {"backbone": path}}
    with pytest.raises(RecipeError, match=r"other neighbours: first.bias has \(16,\), and these need \(17,\)"):
        loaded(tmp_path, {**base, "policy": {"parts": parts}}, COLD)
    gone = base["policy"]["parts"] | {"connector": {"backbone": path | {"path": str(tmp_path / "nowhere")}}}
    with pytest.raises(RecipeError, match="no connector in"):
        loaded(tmp_path, {**base, "policy": {"parts": gone}}, COLD)


def test_several_processes_do_not_ask_the_same_servers_for_one_caption(tmp_path: Path, base: dict[str, Any]) -> None:
    policy = loaded(tmp_path, base, PIXELS)
    served = Relay(steps=3, writer={"name": "vllm", "urls": ["http://127.0.0.1:1", "http://127.0.0.1:2"]})
    with pytest.raises(RecipeError, match="all ask the same servers"):
        served.start(policy, dist.Processes(0, 2))
    policy.stage({"captioner": ()}, "tokens")
    served.start(policy, dist.Processes(0, 2)).close()


def test_a_prompt_that_nobody_answered_is_not_drawn(tmp_path: Path, base: dict[str, Any]) -> None:
    policy = loaded(tmp_path, base, PIXELS)
    with pytest.raises(ValueError, match="no answer of the captioner"):
        policy.conditions.encode([Prompt(id=0, text="a red circle")])
