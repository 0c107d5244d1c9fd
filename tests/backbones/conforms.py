"""What every backbone that loads a pipeline folder has to do. A family's test file makes a tiny folder and calls these.

parity    the pictures are those of diffusers' own pipeline, guidance on and off
contract  schedule, velocity, latents, layers, what stands in the same batch, and pictures of other sizes
frees     the encoders may live elsewhere than the model, and may be let go
on_policy the recorded log-probabilities of a path are computed again to the bit or nearly
trains    a recipe runs, with LoRA or with all weights
exports   a saved LoRA is loaded by diffusers in one line, and draws the same
card      what the catalogue says without importing it
"""

import copy
import gc
import itertools
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlkit import parity as measures
from rlkit import pictures, recipe, registry, session
from rlkit.dist import Processes
from rlkit.errors import RecipeError
from rlkit.policy import Policy
from rlkit.resources import without_encoders
from rlkit.tracking import Metrics
from rlkit.types import FlowModel, Plan, Prompt, generator
from rlkit.weights import Lora

CPU = torch.device("cpu")
CLOSE = 1e-4
GUIDANCE = (1.0, 4.0)


def awake(net: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight that begins at 0 or nearly so is drawn anew: a network of which half is switched off agrees with
    anything."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * (0.1 if parameter.ndim > 1 else 0.05))
    return net


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Modules made inside have the same random weights each time, and torch's own generator is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def picture(name: str, height: int = 32, width: int = 32) -> Tensor:
    """[3, H, W] in 0..1, smooth, rounded to bytes as a file would be."""
    small = torch.rand(1, 3, 4, 4, generator=generator("picture", name))
    large = nn.functional.interpolate(small, (height, width), mode="bilinear")[0]
    return (large * 255).round() / 255


def loaded(name: str, **options: Any) -> FlowModel:
    """The entry's own `load`, with these options, on the CPU in fp32."""
    return registry.build("backbones", name, options).load(CPU, torch.float32)


# ---- parity ----------------------------------------------------------------------------------------------------------


def parity(
    model: FlowModel,
    prompts: Sequence[Prompt],
    guidance: Sequence[float] = GUIDANCE,
    steps: int = 3,
    tolerance: float = CLOSE,
    others: Sequence[tuple[int, int]] = (),
) -> dict[float, float]:
    """guidance -> the largest difference of a pixel. The pictures also have to depend on the prompt and on guidance.

    others: further sizes (height, width) that are compared; default: `other_sizes`.
    """
    found = {scale: measures.pixels_apart(model, prompts, CPU, steps, scale) for scale in guidance}
    assert max(found.values()) <= tolerance, found
    noise = measures.initial_noise(model, 1).repeat(len(prompts), 1, 1, 1)
    assert model.pipeline is not None
    drawn = [model.pipeline(prompts, noise, steps, scale, measures.NEGATIVE) for scale in guidance]
    assert drawn[0].shape[0] == len(prompts)
    assert min(float(one.std()) for one in drawn) > 1e-2, "the pictures are empty: nothing was compared"
    assert (drawn[0][0] - drawn[0][1]).abs().max() > 20 * tolerance, "the prompt is not read"
    for one, other in itertools.pairwise(drawn):
        assert (one - other).abs().max() > 20 * tolerance, "guidance does nothing"
    assert model.at is not None, "it draws one size only"
    for size in others or other_sizes(model):
        apart = measures.pixels_apart(model.at(size), prompts, CPU, 2, guidance[-1])
        assert apart <= tolerance, (size, apart)
    return found


def other_sizes(model: FlowModel) -> tuple[tuple[int, int], ...]:
    """(height, width) of its pictures laid on their side, and of a square of the longer side, so of more tokens."""
    height, width = measures.picture_shape(model)[1:]
    turned = (width, height) if height != width else (height, 2 * width)
    return turned, (max(height, width), max(height, width))


# ---- the contract ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def contract(model: FlowModel, prompts: Sequence[Prompt], others: Sequence[tuple[int, int]] = ()) -> None:
    """prompts: two or more, of different length; others: sizes that it draws too, by default `other_sizes`."""
    for steps in (1, 2, 7, 28):
        sigmas = model.sigmas(steps)
        assert (sigmas.shape, sigmas.dtype) == ((steps + 1,), torch.float32)
        assert (sigmas.diff() < 0).all()
        assert 0.9 < sigmas[0] <= 1
        assert sigmas[-1] == 0
        assert torch.equal(model.sigmas(steps), sigmas), "a scheduler's memory may not show"
    conditions = model.encode(prompts)
    assert len(conditions) == len(prompts)
    assert not any(column.requires_grad for one in conditions for column in one.values())
    n = len(prompts)
    x = torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(1.0, 0.02, n)
    v = model.velocity(model.net, x, sigma, model.collate(conditions))
    assert (v.shape, v.dtype) == (x.shape, x.dtype)
    assert v.isfinite().all()
    for i in range(n):  # what it is padded with, and what it stands beside, is nothing to a prompt
        alone = model.velocity(model.net, x[i : i + 1], sigma[i : i + 1], model.collate(conditions[i : i + 1]))
        torch.testing.assert_close(alone, v[i : i + 1], rtol=0, atol=CLOSE)
        again = model.collate(model.encode(prompts[i : i + 1]))
        encoded_alone = model.velocity(model.net, x[i : i + 1], sigma[i : i + 1], again)
        torch.testing.assert_close(encoded_alone, alone, rtol=0, atol=CLOSE)
    other = model.velocity(model.net, x, sigma, model.collate(conditions[::-1]))
    assert (other - v).abs().max() > 1e-3, "the prompt is read"
    shapes = measures.shapes(model, CPU)
    assert shapes.passed, shapes.found
    assert not model.net.training
    for target in model.lora_targets:
        assert measures.linear_layers(model, target), target
    decodes_with_gradient(model)
    sizes(model, prompts, others or other_sizes(model))


@torch.no_grad()
def sizes(model: FlowModel, prompts: Sequence[Prompt], others: Sequence[tuple[int, int]]) -> None:
    """The model draws other sizes (height, width) with the same modules, and refuses those that do not fit."""
    assert model.at is not None, "it draws one size only"
    height, width = measures.picture_shape(model)[1:]
    same = model.at((height, width))
    assert same.latent_shape == model.latent_shape
    assert torch.equal(same.sigmas(5), model.sigmas(5))
    cond = model.collate(model.encode(prompts[:1]))
    x, sigma = torch.randn(1, *model.latent_shape, generator=generator("sizes")), torch.tensor([0.5])
    v = model.velocity(model.net, x, sigma, cond)
    assert torch.equal(same.velocity(same.net, x, sigma, same.collate(same.encode(prompts[:1]))), v)
    for size in others:
        there = model.at(size)
        assert there.net is model.net, "the network is one for all sizes"
        assert there.encoders == model.encoders
        assert measures.picture_shape(there) == (3, *size)
        drawn = measures.collected(Policy(own(there), None, CPU, "fp32", 0), prompts, Plan(), 2)
        assert drawn.media.shape == (len(prompts), 3, *size)
    with pytest.raises((ValueError, RecipeError), match="multiple"):
        model.at((height + 1, width))


@torch.no_grad()
def frees(prompts: Sequence[Prompt], name: str, **options: Any) -> None:
    """Encoders that live on the CPU encode for a model that lives elsewhere, and the memory of those let go returns.

    The model's other device is `meta`, which every machine has: it tells where a tensor is, and no values.
    """
    model = loaded(name, **options)
    assert model.encoders, "which modules are the encoders?"
    kept = {id(parameter) for parameter in model.net.parameters()}
    assert not any(id(parameter) in kept for one in model.encoders for parameter in one.parameters())
    away = registry.build("backbones", name, options).load(torch.device("meta"), torch.float32)
    for there, here in zip(away.encoders, model.encoders, strict=True):
        for one, other in zip(there.modules(), here.modules(), strict=True):
            one._parameters.update(other._parameters)
            one._buffers.update(other._buffers)
    told, expected = away.encode(prompts), model.encode(prompts)
    for one, other in zip(told, expected, strict=True):
        assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
        # What is read as numbers may stay on the CPU: integers, such as the grids of pictures.
        wrong = [k for k, v in one.items() if v.device.type != "meta" and v.is_floating_point()]
        assert not wrong, f"{wrong} stay where the encoders are"
    alive = [weakref.ref(one) for one in model.encoders]
    left = without_encoders(model, {})
    del model, here, other, there
    gc.collect()
    assert not any(one() is not None for one in alive), "something besides encode, unread, pipeline and at holds them"
    x = torch.zeros(1, *left.latent_shape)
    v = left.velocity(left.net, x, torch.ones(1), left.collate(expected[:1]))
    assert v.isfinite().all()
    media = left.decode(x)
    if left.encode_media is not None:
        assert left.encode_media(media).shape == x.shape


def decodes_with_gradient(model: FlowModel) -> None:
    with torch.enable_grad():
        latents = torch.zeros(1, *model.latent_shape, requires_grad=True)
        model.decode(latents).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().max() > 0


def on_policy(model: FlowModel, prompts: Sequence[Prompt], guidance: Sequence[float] = GUIDANCE) -> None:
    for scale in guidance:
        assert measures.ratio_off(own(model), prompts, CPU, scale) <= 1e-5


def own(model: FlowModel) -> FlowModel:
    """The model with a network of its own, so that a policy's changes stay there. It has no pipeline any more."""
    return replace(model, net=copy.deepcopy(model.net), pipeline=None)


# ---- training --------------------------------------------------------------------------------------------------------


ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "flow_grpo": {"name": "flow_grpo", "window": 2, "shared_noise": True},
    "diffusion_nft": {"name": "diffusion_nft", "draws": 2},
}
TRAIN: Mapping[str, Mapping[str, Any]] = {"lora": {"lora": {"rank": 2}}, "full": {"full": True}}
RUNS = (  # (algorithm, train, guidance) of `trains`
    ("flow_grpo", "lora", 1.0),
    ("flow_grpo", "full", 3.0),
    ("diffusion_nft", "lora", 3.0),
    ("diffusion_nft", "full", 1.0),
)


def trains(
    folder: Path,
    backbone: Mapping[str, Any],
    algorithm: str,
    train: str,
    guidance: float = 1.0,
    data: Mapping[str, Any] | None = None,
) -> Path:
    """Two steps of a recipe into `folder`, which is returned, from the options of a backbone.

    algorithm: a key of ALGORITHMS; train: a key of TRAIN; data: for pictures, what `picture_prompts` gives.
    """
    stage = {
        "data": dict(data or {"name": "world"}) | {"per_step": 2, "group": 2},
        "rollout": {"name": "local", "steps": 4},
        "algorithm": dict(ALGORITHMS[algorithm]),
        "rewards": {"brightness": 1.0},
        "learner": {"lr": 1e-3, "batch": 8},
        "evaluate": {"every": 0, "held_out": 0},
        "steps": 2,
    }
    policy = {"backbone": dict(backbone), "train": dict(TRAIN[train]), "guidance": guidance}
    run = {"device": "cpu", "threads": 1, "wandb": "disabled", "checkpoint_every": 99}
    setup = recipe.resolve({"run": run, "policy": policy, "stages": {"main": stage}})
    recipe.check(setup)
    session.run(setup, folder, Processes(), quiet=True)
    rows = [row for row in Metrics.read(folder) if row["kind"] == "train"]
    assert len(rows) == 2
    for row in rows:
        assert row["grad_norm"] > 0, row
    if "ratio/deviation" in rows[0]:
        assert rows[0]["ratio/deviation"] <= 1e-5
    return folder


def picture_prompts(folder: Path, sources: bool = True, references: int = 0) -> dict[str, Any]:
    """The `data` of a recipe whose four prompts have a source picture, references, or both."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, text in enumerate(("make it red", "make the sky much bluer", "add a cat", "draw it again")):
        record: dict[str, Any] = {"prompt": text}
        names = [f"{i}-{j}.png" for j in range(references + sources)]
        for name in names:
            (folder / name).write_bytes(pictures.png(picture(name)))
        if sources:
            record["source"] = names.pop(0)
        if references:
            record["references"] = names
        lines.append(json.dumps(record))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return {"name": "prompts", "path": str(folder / "prompts.jsonl")}


# ---- weights that others load ----------------------------------------------------------------------------------------


def exports(folder: Path, model: FlowModel, prompts: Sequence[Prompt], guidance: float = 1.0) -> float:
    """A LoRA that is not the identity, saved by the policy and loaded by diffusers into the model's own network.

    Returns the largest difference of a pixel between the policy's pictures and the pipeline's. The model's network
    keeps the adapter: give a model that nothing else uses.
    """
    assert model.pipeline is not None
    policy = Policy(own(model), Lora(rank=2), CPU, "fp32", 0, guidance, measures.NEGATIVE)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draws))
        ours = model.decode(measures.collected(policy, prompts, Plan(), 3).latents)
        noise = measures.initial_noise(model, len(prompts))
        before = model.pipeline(prompts, noise, 3, guidance, measures.NEGATIVE)
        line = policy.export(folder)
        assert "load_lora_adapter" in line
        exec(line, {"transformer": model.net})  # the one line that the run's report shows
        after = model.pipeline(prompts, noise, 3, guidance, measures.NEGATIVE)
    assert model.at is not None
    again = model.at(measures.picture_shape(model)[1:])
    assert again.lora_targets == model.lora_targets, "a size may be asked for once the network has adapters"
    assert (after - before).abs().max() > 20 * CLOSE, "the adapter does nothing"
    apart = float((after - ours).abs().max())
    assert apart <= CLOSE, apart
    return apart


# ---- the card --------------------------------------------------------------------------------------------------------


def card(name: str) -> None:
    """What `rlkit list` and `describe` show, read from the source text."""
    (entry,) = (one for one in registry.describe("backbones") if one.name == name)
    assert entry.summary.endswith(".")
    said = entry.constants
    assert said["kind"] == "flow"
    for key in ("pipelines", "tasks"):
        assert isinstance(said[key], tuple), key
        assert said[key]
    assert set(said["tasks"]) <= {"t2i", "edit", "in_context"}
    for key in ("licence", "parameters"):
        assert isinstance(said[key], str), key
    assert {"paper", "source"} & set(said), "where it is described"
    options = {option.name: option for option in entry.fields}
    assert {"path", "revision", "size"} <= set(options)
    assert all(option.default is not None and option.doc for option in entry.fields), "every option: default, comment"
