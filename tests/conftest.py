"""What tests of several files share: a small network of the real classes, a toy one for exact comparisons, makers."""

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlkit import registry
from rlkit.policy import Models, Policy
from rlkit.types import Condition, Context, FlowModel, Prompt, Samples, generator
from rlkit.weights import Lora

torch.set_num_threads(1)  # networks this small gain nothing by more, and threads wait long on a busy machine
CPU = torch.device("cpu")
TOY_SHAPE = (4, 2, 2)


@pytest.fixture(scope="session")
def small_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `policy.backbone.path`: an untrained transformer of 50,000 parameters beside the shipped encoders.

    For tests of what is round the network. It draws noise, but runs and saves ten times as fast.
    """
    from diffusers import SD3Transformer2DModel

    from rlkit.backbones import tiny

    folder = tmp_path_factory.mktemp("small") / "base"
    shutil.copytree(tiny.BASE, folder)
    config = {**json.loads((folder / "transformer" / "config.json").read_text()), "num_layers": 2}
    config |= {"attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SD3Transformer2DModel.from_config(config)
        torch.nn.init.normal_(net.proj_out.weight, std=0.1)  # as it is made, its velocity is nearly 0 everywhere
    net.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def tiny_model(small_backbone: Path) -> FlowModel:
    """The tiny backbone over `small_backbone`. Its network is shared: train on a copy, which `tiny` makes."""
    return registry.build("backbones", "tiny", {"path": str(small_backbone)}).load(CPU, torch.float32)


@pytest.fixture(scope="session")
def tiny(tiny_model: FlowModel) -> Callable[..., Policy]:
    """tiny(lora) -> a policy with a network of its own."""

    def make(lora: Lora | None = None, seed: int = 0) -> Policy:
        return Policy(replace(tiny_model, net=copy.deepcopy(tiny_model.net)), lora, CPU, "fp32", seed)

    return make


@pytest.fixture(scope="session")
def tiny_policy(tiny: Callable[..., Policy]) -> Policy:
    """A policy to sample from. Nothing may change its weights."""
    return tiny()


class ToyNet(nn.Module):
    """A velocity field of 1200 parameters that reads everything that a real one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16 + 1 + 8, 28)
        self.out = nn.Linear(28, 16)

    def forward(self, x: Tensor, sigma: Tensor, pooled: Tensor) -> Tensor:
        rows = torch.cat([x.flatten(1), sigma[:, None], pooled], dim=1)
        return self.out(torch.tanh(self.mix(rows))).view_as(x)


def toy_model() -> FlowModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ToyNet()

    def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        return net(x, sigma, cond["pooled"])

    def encode(prompts: Sequence[Prompt]) -> list[Condition]:
        return [{"pooled": torch.randn(8, generator=generator("toy", prompt.key))} for prompt in prompts]

    def decode(latents: Tensor) -> Tensor:
        return torch.sigmoid(latents[:, :3]).repeat_interleave(2, -1).repeat_interleave(2, -2)

    def sigmas(steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1)

    return FlowModel(net, velocity, encode, decode, sigmas, TOY_SHAPE, lora_targets=("mix", "out"))


@pytest.fixture
def toy_policy() -> Policy:
    """A policy of the toy network, the same in every test. Its reward is a picture's brightness."""
    policy = Policy(toy_model(), None, CPU, "fp32", 0)
    policy.models = Models(policy, lambda media, prompts: media.mean((1, 2, 3)))
    return policy


@pytest.fixture(scope="session")
def context() -> Callable[..., Context]:
    """context(step=0, ...) of a run with one process."""

    def make(step: int = 0, **changes: Any) -> Context:
        return replace(Context(0, "main", step, sampling_steps=6, state={}, gather=lambda values: values), **changes)

    return make


@pytest.fixture(scope="session")
def samples_of() -> Callable[..., Samples]:
    """samples_of(texts, group=2): blank pictures of these prompts, `group` neighbours being a group."""

    def make(texts: Sequence[str], group: int = 2, media: Tensor | None = None, kinds: Sequence[str] = ()) -> Samples:
        n = len(texts)
        index = torch.arange(n)
        prompts = tuple(Prompt(i // group, text, kind=kinds[i] if kinds else "") for i, text in enumerate(texts))
        media = torch.zeros(n, 3, 4, 4) if media is None else media
        return Samples(media, torch.zeros(n, *TOY_SHAPE), prompts, index // group, index, index, version=0, total=n)

    return make
