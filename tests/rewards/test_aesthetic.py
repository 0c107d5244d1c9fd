"""The aesthetic predictor: five linear layers on CLIP's unit vector."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rlkit.errors import RewardError
from rlkit.rewards.aesthetic import Aesthetic
from rlkit.types import Samples, Unscored

CPU = torch.device("cpu")
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def head() -> nn.Sequential:
    """As the protocol builds it; in a checkpoint it is called `layers`."""
    torch.manual_seed(5)
    first = (nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2))
    return nn.Sequential(*first, nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)).eval()


def state() -> dict[str, Tensor]:
    return {f"layers.{name}": tensor for name, tensor in head().state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    texts, seen = {**TINY, "vocab_size": 10}, {**TINY, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=texts, vision_config=seen, projection_dim=768)).save_pretrained(place)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(place)
    torch.save(state(), place / "head.pth")
    save_file(state(), place / "head.safetensors")
    return place


@pytest.fixture
def samples(samples_of: Callable[..., Samples]) -> Samples:
    media = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(1)) / 255
    return samples_of(media, ["", "b", "a"])


@pytest.mark.parametrize("file", ["head.pth", "head.safetensors"])
def test_values_are_the_heads_of_the_unit_vector(folder: Path, samples: Samples, file: str) -> None:
    network = CLIPModel.from_pretrained(folder).eval()
    mean, std = (
        torch.tensor(getattr(CLIPImageProcessorPil, name))[:, None, None] for name in ("image_mean", "image_std")
    )
    with torch.no_grad():
        vectors = network.get_image_features((samples.media - mean) / std).pooler_output
        expected = head()(vectors / vectors.norm(dim=1, keepdim=True))[:, 0]
        unscaled = head()(vectors)[:, 0]
    values = Aesthetic(str(folder / file), str(folder)).load(CPU)(samples)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
    assert (unscaled - expected).abs().min() > 1e-3  # so the vector's length matters


def test_a_sample_alone_is_what_it_is_among_others(folder: Path, samples: Samples) -> None:
    scorer = Aesthetic(str(folder / "head.pth"), str(folder)).load(CPU)
    together = scorer(samples)
    alone = torch.cat([scorer(samples.select(torch.tensor([row]))) for row in range(3)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    assert scorer(samples.select(torch.tensor([], dtype=torch.int64))).shape == (0,)


def test_a_broken_picture_costs_only_itself(folder: Path, samples_of: Callable[..., Samples]) -> None:
    media = torch.rand(3, 3, 20, 31, generator=torch.Generator().manual_seed(3))
    media[0, 0, 0, 0] = math.nan
    values = Aesthetic(str(folder / "head.pth"), str(folder), dtype="bf16").load(CPU)(samples_of(media, ["a"] * 3))
    assert [isinstance(value, Unscored) for value in values] == [True, False, False]


def test_it_has_a_gradient(folder: Path, samples: Samples) -> None:
    media = samples.media.clone().requires_grad_()
    values = Aesthetic(str(folder / "head.pth"), str(folder)).load(CPU)(Samples(**{**vars(samples), "media": media}))
    values.sum().backward()
    assert media.grad is not None
    assert media.grad.isfinite().all()
    assert media.grad.flatten(1).norm(dim=1).min() > 1e-6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers.7.bias": None}, r"layers.7.bias is missing, not \(1,\)"),
        ({"layers.0.weight": torch.zeros(1024, 512)}, r"layers.0.weight is \(1024, 512\), not \(1024, 768\)"),
        ({"layers.1.weight": torch.zeros(1024)}, r"layers.1.weight is \(1024,\), not known"),
    ],
)
def test_another_head_is_refused(folder: Path, tmp_path: Path, change: dict[str, Tensor | None], says: str) -> None:
    changed = {name: tensor for name, tensor in {**state(), **change}.items() if tensor is not None}
    torch.save(changed, tmp_path / "other.pth")
    with pytest.raises(RewardError, match=says):
        Aesthetic(str(tmp_path / "other.pth"), str(folder)).load(CPU)


def test_options() -> None:
    with pytest.raises(ValueError, match="dtype"):
        Aesthetic(dtype="fp16")
    assert Aesthetic.reads == ()
