"""Frozen encoders: preprocessing as PIL does it, unit vectors, texts that are too long, checkpoints that do not fit."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rlkit import embedding
from rlkit.embedding import Clip, feature_tensor, load_clip, load_pictures, load_state, load_tokenizer
from rlkit.errors import RewardError
from rlkit.types import Prompt, Samples, Unscored

CPU = torch.device("cpu")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONGEST = 8
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def made(media: Tensor, texts: list[str]) -> Samples:
    rows = torch.arange(len(texts))
    prompts = tuple(Prompt(row, text) for row, text in enumerate(texts))
    return Samples(media, torch.zeros(len(texts), 1), prompts, rows, rows, rows, version=0, total=len(texts))


def pictures(n: int, height: int = 32, width: int = 32) -> Tensor:
    """Noise in bytes: the hardest case for a filter."""
    draw = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (n, 3, height, width), generator=draw) / 255


def clip_config() -> CLIPConfig:
    words = {"vocab_size": 60, "max_position_embeddings": LONGEST, "bos_token_id": 0, "eos_token_id": 59}
    texts, seen = {**TINY, **words}, {**TINY, "image_size": 32, "patch_size": 8}  # their projection_dim: the default
    return CLIPConfig(text_config=texts, vision_config=seen, projection_dim=24)


def save_tokenizer(folder: Path) -> None:
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 59}
    vocabulary |= {
        letter + end: 1 + 26 * i + LETTERS.index(letter) for i, end in enumerate(("", "</w>")) for letter in LETTERS
    }
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(clip_config()).save_pretrained(place)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(place)
    save_tokenizer(place)
    return place


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return load_clip(str(folder), CPU, "fp32")


@pytest.fixture(scope="module")
def network(folder: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(folder).eval()


# ---- vectors ---------------------------------------------------------------------------------------------------------


def test_features_come_out_of_whatever_a_network_returns() -> None:
    vectors = torch.ones(2, 3)
    assert feature_tensor(vectors) is vectors
    assert feature_tensor(SimpleNamespace(image_embeds=vectors, pooler_output=torch.zeros(1))) is vectors
    assert feature_tensor(SimpleNamespace(image_embeds=None, text_embeds=vectors)) is vectors
    assert feature_tensor(SimpleNamespace(pooler_output=vectors)) is vectors
    with pytest.raises(TypeError, match="no embedding"):
        feature_tensor(SimpleNamespace(last_hidden_state=vectors))


def test_vectors_are_those_of_the_whole_network(clip: Clip, network: CLIPModel) -> None:
    """CLIPModel's own forward projects and normalises by itself; `get_image_features` returns no tensor any more."""
    texts, media = ["ab c", "zebra", "q"], pictures(3)
    tokens = clip.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        whole = network(**tokens, pixel_values=clip.pictures.preprocessing(media))
    assert not isinstance(network.get_image_features(clip.pictures.preprocessing(media)), Tensor)
    torch.testing.assert_close(clip.pictures(media), whole.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.texts(texts)[0], whole.text_embeds, atol=1e-5, rtol=0)
    values, _ = clip.agreement(made(media, texts), clip.temperature)
    torch.testing.assert_close(values, whole.logits_per_image.diagonal(), atol=1e-4, rtol=0)


def test_a_picture_alone_is_what_it_is_among_others(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    media = pictures(5, 40, 56)
    together = clip.pictures(media)
    torch.testing.assert_close(torch.cat([clip.pictures(one[None]) for one in media]), together, atol=1e-5, rtol=0)
    monkeypatch.setattr(embedding, "AT_ONCE", 2)
    torch.testing.assert_close(clip.pictures(media), together, atol=1e-5, rtol=0)


def test_a_text_alone_is_what_it_is_among_others(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a", "abc de", "abcdefghijkl", "zz"]
    together, cut = clip.texts(texts)
    torch.testing.assert_close(torch.cat([clip.texts([one])[0] for one in texts]), together, atol=1e-5, rtol=0)
    monkeypatch.setattr(embedding, "AT_ONCE", 3)
    torch.testing.assert_close(clip.texts(texts)[0], together, atol=1e-5, rtol=0)
    assert cut.tolist() == clip.texts(texts)[1].tolist() == [0, 0, 1, 0]


def test_each_text_is_encoded_once(clip: Clip) -> None:
    seen = []

    def count(**tokens: Tensor) -> Any:
        seen.append(len(tokens["input_ids"]))
        return clip.text_features(**tokens)

    vectors, _ = replace(clip, text_features=count).texts(["b", "a", "b", "b", "a"])
    assert seen == [2]
    torch.testing.assert_close(vectors, torch.cat([clip.texts([one])[0] for one in "babba"]), atol=1e-5, rtol=0)


def test_a_long_text_loses_its_end_but_not_the_token_that_ends_it(clip: Clip) -> None:
    room = LONGEST - 2
    vectors, cut = clip.texts([LETTERS[:room], LETTERS[: room + 1], LETTERS])
    assert cut.tolist() == [0, 1, 1]
    tokens = clip.tokenizer([LETTERS], truncation=True, max_length=LONGEST)["input_ids"][0]
    assert tokens[-1] == 59
    assert len(tokens) == LONGEST
    torch.testing.assert_close(vectors[1], vectors[2], atol=1e-5, rtol=0)
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3  # one ends a word, the other goes on


def test_bf16_rounds_the_network_and_not_the_vectors_or_the_temperature(clip: Clip, folder: Path) -> None:
    rough = load_clip(str(folder), CPU, "bf16")
    assert rough.temperature == clip.temperature == pytest.approx(math.exp(2.6592), rel=1e-6)
    vectors = rough.pictures(pictures(3))
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3), atol=1e-5, rtol=0)
    assert ((vectors * clip.pictures(pictures(3))).sum(1) > 0.99).all()
    assert not torch.equal(vectors, clip.pictures(pictures(3)))


def test_only_a_picture_that_asks_gets_a_gradient_and_weights_never(clip: Clip) -> None:
    media = pictures(2, 40, 40)
    assert not clip.pictures(media).requires_grad
    asking = media.clone().requires_grad_()
    values, _ = clip.agreement(made(asking, ["a", ""]))
    assert isinstance(values, Tensor)
    assert values.isnan().tolist() == [False, True]
    values[0].backward()
    assert asking.grad is not None
    assert asking.grad[0].abs().max() > 1e-6
    assert (asking.grad[1] == 0).all()  # nothing leaks from what is not scored
    model = clip.pictures.features.__self__  # type: ignore[attr-defined]
    assert not model.training
    assert all(not one.requires_grad and one.grad is None for one in model.parameters())
    with torch.no_grad():
        assert not clip.pictures(asking).requires_grad


def test_where_nothing_is_scored_the_gradient_is_nought(clip: Clip) -> None:
    media = pictures(2).requires_grad_()
    values, _ = clip.agreement(made(media, ["", " "]))
    assert isinstance(values, Tensor)
    assert values.isnan().all()
    values.sum().backward()
    assert (media.grad == 0).all()


# ---- what cannot be scored -------------------------------------------------------------------------------------------


def test_empty_prompts_and_broken_pictures_are_not_scored_and_harm_no_other(clip: Clip) -> None:
    media = pictures(4)
    alone, _ = clip.agreement(made(media[:1], ["abc"]))
    media[2, 0, 3, 3] = math.nan
    values, parts = clip.agreement(made(media, ["abc", " \n", "abc", "d"]))
    assert isinstance(values, list)
    assert [type(value) for value in values] == [float, Unscored, Unscored, float]
    assert "empty" in values[1].reason
    assert "not finite" in values[2].reason
    assert values[0] == pytest.approx(float(alone[0]), abs=1e-5)
    assert parts["truncated"].isnan().tolist() == [False, True, True, False]


def test_no_samples_no_values(clip: Clip) -> None:
    values, parts = clip.agreement(made(torch.zeros(0, 3, 32, 32), []))
    assert values.shape == parts["truncated"].shape == (0,)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 4, 32, 32), (2, 5, 3, 32, 32), (3, 32, 32)])
def test_what_is_no_picture_is_an_error(clip: Clip, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pictures are \[N, 3, H, W\]"):
        clip.agreement(made(torch.zeros(shape), ["a"] * shape[0]))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def dino(kind: str) -> Any:
    if kind == "dinov2":
        small = {name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        return Dinov2Model(Dinov2Config(**small, mlp_ratio=2, image_size=28, patch_size=14))
    return DINOv3ViTModel(DINOv3ViTConfig(**TINY, image_size=32, patch_size=16, num_register_tokens=2))


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_a_dino_gives_its_class_token(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = dino(kind).eval()
    network.save_pretrained(tmp_path)
    side = 28 if kind == "dinov2" else 32
    config = {"size": {"height": side, "width": side}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    media = pictures(3, side, side)
    with torch.no_grad():
        token = network((media - 0.5) / 0.2).last_hidden_state[:, 0]
    ours = load_pictures(str(tmp_path), CPU, "fp32")(media)
    torch.testing.assert_close(ours, token / token.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)
    assert load_pictures(str(tmp_path), CPU, "bf16")(media).isfinite().all()


def test_the_picture_tower_alone_is_that_of_the_whole(clip: Clip, folder: Path) -> None:
    """In a whole checkpoint the width of the projection stands outside; inside it is a default that does not fit."""
    assert json.loads((folder / "config.json").read_text())["vision_config"]["projection_dim"] != 24
    tower = load_pictures(str(folder), CPU, "fp32")
    torch.testing.assert_close(tower(pictures(2)), clip.pictures(pictures(2)), atol=1e-5, rtol=0)


def test_a_checkpoint_that_lacks_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers makes up what is missing, and only warns."""
    network = CLIPModel.from_pretrained(folder)
    weights = network.state_dict()
    shorter = {**weights, "text_projection.weight": torch.zeros(3, 3)}
    for kept in ({name: weights[name] for name in weights if name != "text_projection.weight"}, shorter):
        network.save_pretrained(tmp_path, state_dict=kept)
        with pytest.raises(RewardError, match=r"lacks 1 weights of a CLIPModel, for instance 'text_projection.weight'"):
            load_clip(str(tmp_path), CPU, "fp32", processor=str(folder))


def test_loading_one_tower_does_not_list_the_weights_of_the_other(folder: Path) -> None:
    from transformers.utils import logging as theirs

    before, said = (theirs.get_verbosity(), theirs.is_progress_bar_enabled()), QueueHandler(SimpleQueue())
    logging.getLogger("transformers").addHandler(said)
    try:
        load_pictures(str(folder), CPU, "fp32")
    finally:
        logging.getLogger("transformers").removeHandler(said)
    assert said.queue.empty()
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == before


def test_the_processor_may_lie_elsewhere(clip: Clip, folder: Path, tmp_path: Path) -> None:
    CLIPModel.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="cannot read"):
        load_clip(str(tmp_path), CPU, "fp32")
    samples = made(pictures(2), ["a", "bc"])
    apart = load_clip(str(tmp_path), CPU, "fp32", processor=str(folder)).agreement(samples)[0]
    assert torch.equal(apart, clip.agreement(samples)[0])


def test_another_kind_of_network_is_refused(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"is a bert checkpoint.*Known: clip"):
        load_pictures(str(tmp_path), CPU, "fp32")


def test_a_configuration_that_is_not_understood_names_its_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32}))
    with pytest.raises(RewardError, match=r"preprocessor_config.json of .* has no 'image_mean'"):
        embedding.preprocessing_of(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32, "resample": 0}))
    with pytest.raises(RewardError, match=r"preprocessor_config.json of .*: resample=0"):
        embedding.preprocessing_of(str(tmp_path))


@pytest.mark.parametrize("read", [load_tokenizer, load_state, embedding.preprocessing_of])
def test_what_is_not_there_says_how_to_get_it(read: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RewardError, match=r"cannot read '/no/such/place': there is no such \w+. Check the path"):
        read("/no/such/place")
    with pytest.raises(RewardError, match=r"hf download nobody/nothing( weights/a.pt)?$"):
        read("nobody/nothing/weights/a.pt" if read is load_state else "nobody/nothing")


def test_a_file_of_tensors_is_read_and_a_pickle_is_not(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {"a": torch.arange(3.0)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "b.pt")
    torch.save({"a": Path("code")}, tmp_path / "c.pt")
    for name in ("a.safetensors", "a.pth", "b.pt"):
        found = load_state(str(tmp_path / name))
        assert list(found) == ["a"]
        assert torch.equal(found["a"], state["a"])
    with pytest.raises(Exception, match="Weights only load failed"):
        load_state(str(tmp_path / "c.pt"))


def test_a_dtype_that_is_none_is_an_error() -> None:
    embedding.check_dtype("bf16")
    with pytest.raises(ValueError, match="dtype='fp16' is none of fp32, bf16"):
        embedding.check_dtype("fp16")
