"""JoyAI-Image-Edit, the real classes with a few thousand random weights, against diffusers' pipeline."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import conforms, tiny_words

from rlkit import parity as measures
from rlkit import registry
from rlkit.backbones import joyimage_edit
from rlkit.errors import DataError, RecipeError
from rlkit.policy import Lora, Policy
from rlkit.types import FlowModel, Plan, Prompt

NAME = "joyimage_edit"
SIZE = [16, 32]
picture = conforms.picture
SOURCES = (
    Prompt(0, "make it red", source=picture("a", 40, 64)),
    Prompt(1, "two blue crosses, and make it green", source=picture("b", 64, 40)),
    Prompt(2, "", source=picture("c", 48, 48)),
)
MIXED = (Prompt(0, "a red circle"), replace(SOURCES[1], id=1), Prompt(2, ""), replace(SOURCES[0], id=3))
PROCESSOR = {  # as the checkpoint has it, but for the sizes: the class that it names needs torchvision
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
    "do_convert_rgb": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": 16,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 16777216, "shortest_edge": 1024},
    "temporal_patch_size": 2,
}


def text_encoder(words: Any) -> Any:
    """Qwen3-VL with two layers; what its first layer sees of a picture reaches the words' first layer too."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = tiny_words.language_options(words) | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        }
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": tiny_words.WIDTH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.3,
    }
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    marks = {option: words.convert_tokens_to_ids(f"<|{name}|>") for option, name in names.items()}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **marks)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One latent pixel is 2 pixels wide."""
    import diffusers

    at = tmp_path_factory.mktemp(NAME) / "base"
    words = tiny_words.qwen_tokenizer()
    with conforms.seeded():
        net = diffusers.JoyImageEditTransformer3DModel(
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=tiny_words.WIDTH,
            mlp_width_ratio=2.0,
            num_layers=2,
            rope_dim_list=[4, 6, 6],
        )
        vae = diffusers.AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[-0.7, 0.1, 0.4, -0.2],
            latents_std=[2.8, 1.4, 0.9, 1.9],
            scale_factor_temporal=1,
            scale_factor_spatial=2,
        )
        encoder = text_encoder(words)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0)
    processor: Any = None  # the real one needs torchvision
    tiny_words.shaken(net)
    diffusers.JoyImageEditPipeline(scheduler, vae, encoder, words, net, processor).save_pretrained(at)
    (at / "processor").mkdir()
    (at / "processor" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    index = json.loads((at / "model_index.json").read_text())
    (at / "model_index.json").write_text(json.dumps(index | {"processor": ["transformers", "Qwen3VLProcessor"]}))
    return at


def load(folder: Path, **options: Any) -> FlowModel:
    return conforms.loaded(NAME, path=str(folder), **({"size": SIZE} | options))


@pytest.fixture(scope="module")
def model(folder: Path) -> FlowModel:
    return load(folder)


def test_the_card() -> None:
    conforms.card(NAME)


def test_edited_pictures_are_those_of_the_pipeline(model: FlowModel) -> None:
    conforms.parity(model, SOURCES)


def test_pictures_drawn_from_words_are_those_of_the_pipeline(model: FlowModel) -> None:
    conforms.parity(model, [replace(prompt, source=None) for prompt in SOURCES])


def test_it_does_what_every_backbone_does(model: FlowModel) -> None:
    conforms.contract(model, SOURCES)
    conforms.contract(model, MIXED)


def test_the_ratio_is_1_before_any_update(model: FlowModel) -> None:
    conforms.on_policy(model, MIXED)


@pytest.mark.parametrize(("algorithm", "train", "guidance"), conforms.RUNS)
def test_a_recipe_trains_it(folder: Path, tmp_path: Path, algorithm: str, train: str, guidance: float) -> None:
    edits = train == "lora"
    data = conforms.picture_prompts(tmp_path / "data") if edits else None
    options = {"name": NAME, "path": str(folder), "size": [16, 16]}
    conforms.trains(tmp_path / "run", options, algorithm, train, guidance, data)


def test_diffusers_loads_what_was_trained(folder: Path, tmp_path: Path) -> None:
    conforms.exports(tmp_path, load(folder), MIXED, 3.0)


def test_the_network_of_a_plain_pipeline_loads_it_once_it_is_adaptable(folder: Path, tmp_path: Path) -> None:
    from diffusers import JoyImageEditTransformer3DModel

    ours = load(folder)
    conforms.exports(tmp_path, ours, SOURCES[:1])
    transformer = JoyImageEditTransformer3DModel.from_pretrained(folder / "transformer")
    assert not hasattr(transformer, "load_lora_adapter"), "diffusers can do it alone: `adaptable` can go"
    transformer.__class__ = joyimage_edit.adaptable(type(transformer))
    transformer.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    condition = ours.collate(ours.encode(SOURCES[:1]))
    x, sigma = torch.ones(1, *ours.latent_shape), torch.ones(1)
    with torch.no_grad():
        told, expected = (ours.velocity(net, x, sigma, condition) for net in (transformer, ours.net))
    torch.testing.assert_close(told, expected, rtol=0, atol=conforms.CLOSE)


def test_an_adaptable_network_stays_itself() -> None:
    import diffusers

    plain = diffusers.JoyImageEditTransformer3DModel
    found = joyimage_edit.adaptable(plain)
    assert issubclass(found, plain)
    assert found.__name__ == plain.__name__, "folders are read and written by the class's name"
    assert joyimage_edit.adaptable(diffusers.QwenImageTransformer2DModel) is diffusers.QwenImageTransformer2DModel


def test_the_source_is_scaled_and_cropped(model: FlowModel) -> None:
    tall = torch.zeros(3, 64, 32)
    tall[:, 24:40] = picture("middle", 16, 32)
    (condition,) = model.encode([Prompt(0, "", source=tall)])
    assert model.encode_media is not None
    expected = model.encode_media(tall[None, :, 24:40])
    torch.testing.assert_close(condition["source"], expected, rtol=0, atol=1e-5)


def test_the_source_is_read_by_both(model: FlowModel) -> None:
    """By the encoder: its tokens differ. By the network: its answer differs with the tokens of another source."""
    one, other = model.encode([SOURCES[0], replace(SOURCES[0], source=picture("other"))])
    assert (one["tokens"] - other["tokens"]).abs().max() > 1e-3
    x, sigma = torch.zeros(1, *model.latent_shape), torch.ones(1)
    with torch.no_grad():
        before, after = (
            model.velocity(model.net, x, sigma, model.collate([condition]))
            for condition in (one, {**one, "source": other["source"]})
        )
    assert (before - after).abs().max() > 1e-3


def test_the_encoder_gives_pictures_two_axes_of_positions(model: FlowModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    seen: list[Any] = []
    usual = Qwen3VLModel.compute_3d_position_ids

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(usual(self, *args, **options))
        return seen[-1]

    monkeypatch.setattr(Qwen3VLModel, "compute_3d_position_ids", watched)
    model.encode([SOURCES[0], MIXED[0]])
    assert seen[1] is None, "words alone have the usual positions"
    time, row, column = seen[0][:, 0]
    assert not torch.equal(row, column)
    assert not torch.equal(time, column)


def test_guidance_keeps_the_length_of_each_pixel() -> None:
    told, untold = torch.randn(2, 1, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    guided = joyimage_edit.rescaled(told, untold, 4.0)
    torch.testing.assert_close(guided.norm(dim=1), told.norm(dim=1))
    assert joyimage_edit.rescaled(torch.zeros(1, 4, 1, 1), torch.zeros(1, 4, 1, 1), 4.0).isfinite().all()


def test_too_many_pictures(model: FlowModel) -> None:
    with pytest.raises(DataError, match="has 2 pictures, and this backbone reads 0 to 1"):
        model.encode([replace(SOURCES[0], references=(picture("d"),))])


def test_a_long_prompt_is_cut_and_what_is_lost_is_named(folder: Path) -> None:
    short = load(folder, max_tokens=8)
    long = "two blue crosses"
    assert short.unread(long) == ["crosses"]
    assert short.unread("two blue") == []
    cut, same = short.encode([replace(SOURCES[0], text=text) for text in (long, long[:8])])
    assert torch.equal(cut["tokens"], same["tokens"])


@pytest.mark.parametrize("mark", [joyimage_edit.MARK, joyimage_edit.PLACE])
def test_a_prompt_cannot_stand_for_a_picture(model: FlowModel, mark: str) -> None:
    plain, marked = model.encode([replace(SOURCES[0], text=text) for text in ("make it red", f"make{mark} it red")])
    assert torch.equal(plain["tokens"], marked["tokens"])


@torch.no_grad()
def test_in_bfloat16_pictures_stay_near_the_pipeline(folder: Path) -> None:
    """As on a large machine: a LoRA that changes nothing yet beside a network that is rounded."""
    cpu, drawn = torch.device("cpu"), SOURCES[:2]
    backbone = registry.build("backbones", NAME, {"path": str(folder), "size": SIZE})
    model = backbone.load(cpu, torch.bfloat16)
    policy = Policy(conforms.own(model), Lora(rank=2), cpu, "bf16", 0, 3.0, measures.NEGATIVE)
    ours = model.decode(measures.collected(policy, drawn, Plan(), 3).latents)
    theirs = model.pipeline(drawn, measures.initial_noise(model, 2), 3, 3.0, measures.NEGATIVE)
    assert (ours - theirs).abs().max() < 0.1
    assert (ours - theirs).abs().mean() < 0.01


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": [100, 96]}, r"try \[96, 96\]"),
        ({"max_tokens": 0}, "between 1 and 2000"),
        ({"max_tokens": 2001}, "2001"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        registry.build("backbones", NAME, options)


def test_a_checkpoint_of_another_family_is_named(folder: Path, tmp_path: Path) -> None:
    for name, said in (("QwenImageEditPipeline", "'qwen_image_edit'"), ("JoyImageEditPlusPipeline", "No backbone")):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(RecipeError, match=name) as error:
            load(tmp_path)
        assert said in str(error.value)
