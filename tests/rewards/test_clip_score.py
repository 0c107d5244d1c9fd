"""CLIPScore: the cosine of a picture with its own prompt, over a tiny random checkpoint of the real classes."""

from collections.abc import Callable

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rlkit import registry
from rlkit.rewards.clip_score import ClipScore
from rlkit.types import Samples, Unscored

CPU = torch.device("cpu")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    words = {"vocab_size": 60, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 59}
    texts, seen = {**TINY, **words}, {**TINY, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=texts, vision_config=seen, projection_dim=24)).save_pretrained(place)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(place)
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 59}
    vocabulary |= {letter: 1 + i for i, letter in enumerate(LETTERS)}
    vocabulary |= {letter + "</w>": 27 + i for i, letter in enumerate(LETTERS)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(place)
    return str(place)


@pytest.fixture
def samples(samples_of: Callable[..., Samples]) -> Samples:
    draw = torch.Generator().manual_seed(1)
    media = torch.randint(0, 256, (4, 3, 32, 32), generator=draw) / 255
    return samples_of(media, ["a cat", "dog", "a cat", "abcdefghijkl"])


def whole(folder: str, samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosines [N], logits [N]) by CLIPModel's own forward, which multiplies every picture with every text."""
    network, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    texts = [prompt.text for prompt in samples.prompts]
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=8, return_tensors="pt")
    mean, std = (
        torch.tensor(getattr(CLIPImageProcessorPil, name))[:, None, None] for name in ("image_mean", "image_std")
    )
    with torch.no_grad():
        output = network(**tokens, pixel_values=(samples.media - mean) / std)
    return (output.image_embeds @ output.text_embeds.T).diagonal(), output.logits_per_image.diagonal()


def test_values_are_cosines_and_on_demand_logits(folder: str, samples: Samples) -> None:
    cosines, logits = whole(folder, samples)
    values, parts = ClipScore(folder).load(CPU)(samples)
    torch.testing.assert_close(values, cosines, atol=1e-5, rtol=0)
    assert parts["truncated"].tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(ClipScore(folder, logits=True).load(CPU)(samples)[0], logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits / cosines, torch.full((4,), 2.6592).exp(), atol=1e-2, rtol=0)
    assert ClipScore(folder).range == (-1.0, 1.0)
    assert ClipScore(folder, logits=True).range == (-100.0, 100.0)


def test_values_do_not_depend_on_the_other_samples_or_their_order(folder: str, samples: Samples) -> None:
    scorer = ClipScore(folder).load(CPU)
    values = scorer(samples)[0]
    assert values.std() > 1e-3
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(scorer(samples.select(order))[0], values[order], atol=1e-5, rtol=0)
    alone = torch.cat([scorer(samples.select(torch.tensor([row])))[0] for row in range(4)])
    torch.testing.assert_close(alone, values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (32, 90), (100, 64)])
def test_pictures_of_any_size(folder: str, samples_of: Callable[..., Samples], size: tuple[int, int]) -> None:
    media = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    exact = ClipScore(folder).load(CPU)(samples_of(media, ["a", "b"]))[0]
    rough = ClipScore(folder, dtype="bf16").load(CPU)(samples_of(media, ["a", "b"]))[0]
    assert exact.isfinite().all()
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0)
    assert not torch.equal(rough, exact)


def test_an_empty_prompt_is_not_scored_and_no_samples_are_none(folder: str, samples_of: Callable[..., Samples]) -> None:
    scorer = ClipScore(folder).load(CPU)
    values, _ = scorer(samples_of(torch.zeros(2, 3, 32, 32), ["", "a"]))
    assert isinstance(values[0], Unscored)
    assert isinstance(values[1], float)
    assert len(scorer(samples_of(torch.zeros(0, 3, 32, 32), []))[0]) == 0


def test_the_gradient_leads_to_a_better_picture(folder: str, samples: Samples) -> None:
    scorer = ClipScore(folder).load(CPU)
    media = samples.media.clone().requires_grad_()
    values, parts = scorer(Samples(**{**vars(samples), "media": media}))
    values.sum().backward()
    assert media.grad is not None
    assert media.grad.flatten(1).norm(dim=1).min() > 1e-5
    assert not parts["truncated"].requires_grad
    better = Samples(**{**vars(samples), "media": (media + 0.02 * media.grad.sign()).detach().clamp(0, 1)})
    assert (scorer(better)[0] > values).all()


def test_the_card_and_the_options() -> None:
    entry = next(one for one in registry.describe("rewards") if one.name == "clip_score")
    assert entry.constants["reads"] == ("prompt",)
    assert entry.constants["range"] == (-1.0, 1.0)
    assert entry.summary.endswith(".")
    assert all(option.doc for option in entry.fields)
    with pytest.raises(ValueError, match="dtype='fp8'"):
        ClipScore(dtype="fp8")
