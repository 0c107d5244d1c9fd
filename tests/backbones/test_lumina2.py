"""Lumina-Image 2.0 of a few thousand weights, against diffusers' pipeline."""

from pathlib import Path
from typing import Any

import pytest
from backbones import conforms, tiny_words
from making import told

from rlkit import parity, registry
from rlkit.errors import RecipeError
from rlkit.types import FlowModel

PROMPTS = told(["a red circle", "two blue squares left of a green one"])


def tokenizer() -> Any:
    """Letters, and Gemma's mark ahead of every text."""
    import string

    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *string.printable[:95].replace(" ", "")]
    made = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 2)]
    )
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    words = tokenizer()
    with conforms.seeded():
        net = tiny_words.shaken(
            Lumina2Transformer2DModel(
                sample_size=8,
                in_channels=4,
                hidden_size=24,
                num_layers=2,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=8,
                axes_dim_rope=(4, 4, 4),
                axes_lens=(300, 16, 16),
                cap_feat_dim=tiny_words.WIDTH,
            )
        )
        text_encoder = Gemma2Model(Gemma2Config(**tiny_words.language_options(words)))
        vae = tiny_words.autoencoder(factor=8)  # the pipeline knows no other
    path = tmp_path_factory.mktemp("lumina2") / "base"
    schedule = FlowMatchEulerDiscreteScheduler(shift=6.0)
    Lumina2Pipeline(net, schedule, vae, text_encoder, words).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def options(folder: Path) -> dict[str, Any]:
    return {"name": "lumina2", "path": str(folder), "size": [64, 96]}


@pytest.fixture(scope="module")
def model(options: dict[str, Any]) -> FlowModel:
    return conforms.loaded(**options)


def test_the_card() -> None:
    conforms.card("lumina2")


@pytest.mark.parametrize("negative", ["", "blurred"])
def test_pictures_are_those_of_the_pipeline(model: FlowModel, negative: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "NEGATIVE", negative)
    print(conforms.parity(model, PROMPTS))


def test_the_contract(model: FlowModel) -> None:
    conforms.contract(model, [*PROMPTS, *told([""])])


def test_its_encoders_may_leave(options: dict[str, Any]) -> None:
    conforms.frees(PROMPTS, **options)


def test_log_probabilities_are_those_of_the_path(model: FlowModel) -> None:
    conforms.on_policy(model, PROMPTS)


@pytest.mark.parametrize(("algorithm", "train", "guidance"), conforms.RUNS)
def test_it_trains(options: dict[str, Any], algorithm: str, train: str, guidance: float, tmp_path: Path) -> None:
    conforms.trains(tmp_path, options, algorithm, train, guidance)


def test_diffusers_loads_the_lora(options: dict[str, Any], tmp_path: Path) -> None:
    conforms.exports(tmp_path, conforms.loaded(**options), PROMPTS, guidance=2.0)


def test_words_beyond_the_longest_prompt_are_named(model: FlowModel) -> None:
    assert model.unread("a red circle") == []
    assert model.unread("a red circle " * 30)[-1] == "circle"
    assert len(model.encode(told(["a red circle " * 30]))[0]["tokens"]) == 256
    assert model.unread("") == []


def test_words_of_the_system_prompt_are_not_named(folder: Path) -> None:
    short = conforms.loaded("lumina2", path=str(folder), size=[64, 96], max_tokens=20)
    assert short.unread("a red circle") == ["a", "red", "circle"]


def test_a_size_that_does_not_fit_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"multiples of 16 .* try \[512, 528\]"):
        registry.build("backbones", "lumina2", {"size": [512, 530]})


def test_more_tokens_than_positions_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="At most 299"):
        conforms.loaded("lumina2", path=str(folder), size=[64, 96], max_tokens=300)
