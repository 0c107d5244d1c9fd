"""PickScore: exp(logit_scale) times the cosine, with model and processor from two places."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rlkit.errors import RewardError
from rlkit.rewards.pickscore import PickScore
from rlkit.types import Samples, Unscored

CPU = torch.device("cpu")
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SCALE = 4.6  # near that of real checkpoints; bf16 holds 4.59375, which would make every score 0.6 % smaller


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of the weights, and of tokenizer and preprocessing."""
    model, processor = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("processor")
    torch.manual_seed(0)
    words = {"vocab_size": 10, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 9}
    texts, seen = {**TINY, **words}, {**TINY, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=texts, vision_config=seen, projection_dim=24, logit_scale_init_value=SCALE)
    CLIPModel(config).save_pretrained(model)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(processor)
    vocabulary = {"<|startoftext|>": 0, "a": 1, "b": 2, "c": 3, "a</w>": 4, "b</w>": 5, "c</w>": 6, "<|endoftext|>": 9}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(processor)
    return str(model), str(processor)


@pytest.fixture
def samples(samples_of: Callable[..., Samples]) -> Samples:
    media = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(1)) / 255
    return samples_of(media, ["ab c", "c", "ab c"])


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 2.0)])
def test_values_are_the_scaled_cosines_of_the_networks_own_vectors(
    places: tuple[str, str], samples: Samples, dtype: str, tolerance: float
) -> None:
    network = CLIPModel.from_pretrained(places[0]).eval()
    mean, std = (
        torch.tensor(getattr(CLIPImageProcessorPil, name))[:, None, None] for name in ("image_mean", "image_std")
    )
    with torch.no_grad():
        pictures = network.get_image_features((samples.media - mean) / std).pooler_output
        ids = [torch.tensor([[0, 1, 5, 6, 9]]), torch.tensor([[0, 6, 9]])]  # "ab c" and "c"
        first, second = (network.get_text_features(one).pooler_output for one in ids)
    cosine = torch.cosine_similarity(pictures, torch.cat([first, second, first]))
    scorer = PickScore(*places, dtype=dtype).load(CPU)
    values, parts = scorer(samples)
    torch.testing.assert_close(values, math.exp(SCALE) * cosine, atol=tolerance, rtol=0)
    assert values.abs().max() > 2  # not divided by 26
    assert scorer.clip.temperature == pytest.approx(math.exp(SCALE), rel=1e-6)
    assert parts["truncated"].tolist() == [0, 0, 0]


def test_a_sample_alone_is_what_it_is_among_others(places: tuple[str, str], samples: Samples) -> None:
    scorer = PickScore(*places).load(CPU)
    together = scorer(samples)[0]
    alone = torch.cat([scorer(samples.select(torch.tensor([row])))[0] for row in (2, 0, 1)])
    torch.testing.assert_close(alone, together[[2, 0, 1]], atol=1e-4, rtol=0)


def test_a_bad_sample_costs_only_itself(places: tuple[str, str], samples_of: Callable[..., Samples]) -> None:
    media = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    media[1] = math.inf
    values, parts = PickScore(*places).load(CPU)(samples_of(media, ["a", "a", "abcabcabcabc"]))
    assert [isinstance(value, Unscored) for value in values] == [False, True, False]
    assert parts["truncated"][[0, 2]].tolist() == [0, 1]
    empty, _ = PickScore(*places).load(CPU)(samples_of(media[:1], ["  "]))
    assert "empty" in empty[0].reason


def test_it_has_a_gradient(places: tuple[str, str], samples: Samples) -> None:
    media = samples.media.clone().requires_grad_()
    values, _ = PickScore(*places).load(CPU)(Samples(**{**vars(samples), "media": media}))
    values.sum().backward()
    assert media.grad is not None
    assert media.grad.isfinite().all()
    assert media.grad.flatten(1).norm(dim=1).min() > 1e-4


def test_the_model_has_no_processor_of_its_own(places: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="cannot read"):
        PickScore(places[0], processor="").load(CPU)
    with pytest.raises(RewardError, match="no such folder"):
        PickScore(str(tmp_path / "nowhere")).load(CPU)
    with pytest.raises(ValueError, match="dtype"):
        PickScore(dtype="half")
