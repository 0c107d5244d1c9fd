"""JoyAI-Image-Edit and Edit-Plus, the real classes with a few thousand random weights, against diffusers' pipelines."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import conforms, tiny_words
from torch import Tensor

from rlkit import parity as measures
from rlkit import registry
from rlkit.backbones import joyimage_edit
from rlkit.backbones.joyimage_edit import ONE, PLUS
from rlkit.errors import DataError, RecipeError
from rlkit.policy import Policy
from rlkit.types import FlowModel, Plan, Prompt
from rlkit.weights import Lora

NAME = "joyimage_edit"
SIZE = [16, 32]
picture = conforms.picture
SOURCES = (
    Prompt(0, "make it red", source=picture("a", 40, 64)),
    Prompt(1, "two blue crosses, and make it green", source=picture("b", 64, 40)),
    Prompt(2, "", source=picture("c", 48, 48)),
)
MIXED = (Prompt(0, "a red circle"), replace(SOURCES[1], id=1), Prompt(2, ""), replace(SOURCES[0], id=3))
SEVERAL = (  # none, one and more, of different sizes
    Prompt(0, "a red circle"),
    SOURCES[1],
    Prompt(2, "make it red", source=picture("a", 40, 64), references=(picture("d"), picture("e", 20, 60))),
    Prompt(3, "", references=(picture("f", 64, 20), picture("g", 64, 40))),
)
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


def save(at: Path, pipeline: str) -> Path:
    """A folder of this pipeline's class. One latent pixel is 2 pixels wide."""
    import diffusers

    words = tiny_words.qwen_tokenizer()
    with conforms.seeded():
        net = getattr(diffusers, joyimage_edit.NETS[pipeline])(
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
    getattr(diffusers, pipeline)(scheduler, vae, encoder, words, net, processor).save_pretrained(at)
    (at / "processor").mkdir()
    if pipeline == PLUS:  # as that checkpoint has it
        whole = {"image_processor": PROCESSOR, "processor_class": "Qwen3VLProcessor"}
        (at / "processor" / "processor_config.json").write_text(json.dumps(whole))
    else:
        (at / "processor" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    index = json.loads((at / "model_index.json").read_text())
    (at / "model_index.json").write_text(json.dumps(index | {"processor": ["transformers", "Qwen3VLProcessor"]}))
    return at


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a pipeline."""
    made: dict[str, Path] = {}

    def at(pipeline: str) -> Path:
        if pipeline not in made:
            made[pipeline] = save(tmp_path_factory.mktemp(pipeline) / "base", pipeline)
        return made[pipeline]

    return at


@pytest.fixture(scope="module")
def folder(of: Callable[[str], Path]) -> Path:
    return of(ONE)


def load(folder: Path, **options: Any) -> FlowModel:
    return conforms.loaded(NAME, path=str(folder), **({"size": SIZE, "picture_area": 32 * 32} | options))


@pytest.fixture(scope="module")
def model(folder: Path) -> FlowModel:
    return load(folder)


@pytest.fixture(scope="module")
def plus(of: Callable[[str], Path]) -> FlowModel:
    return load(of(PLUS))


def test_the_card() -> None:
    conforms.card(NAME)


def test_edited_pictures_are_those_of_the_pipeline(model: FlowModel) -> None:
    conforms.parity(model, SOURCES)


def test_pictures_drawn_from_words_are_those_of_the_pipeline(model: FlowModel) -> None:
    conforms.parity(model, [replace(prompt, source=None) for prompt in SOURCES])


def test_pictures_are_those_of_the_pipeline_that_reads_several(plus: FlowModel) -> None:
    conforms.parity(plus, SEVERAL)


def test_it_does_what_every_backbone_does(model: FlowModel, plus: FlowModel) -> None:
    conforms.contract(model, SOURCES)
    conforms.contract(model, MIXED)
    conforms.contract(plus, SEVERAL)


@pytest.mark.parametrize("pipeline", [ONE, PLUS])
def test_its_encoders_can_leave(of: Callable[[str], Path], pipeline: str) -> None:
    conforms.frees(SEVERAL[:2], NAME, path=str(of(pipeline)), size=SIZE, picture_area=1024)


def test_each_checkpoint_says_what_it_can_do(model: FlowModel, plus: FlowModel) -> None:
    assert model.tasks == ("t2i", "edit")
    assert plus.tasks == ("t2i", "edit", "in_context")


def test_the_ratio_is_1_before_any_update(model: FlowModel, plus: FlowModel) -> None:
    conforms.on_policy(model, MIXED)
    conforms.on_policy(plus, SEVERAL)


@pytest.mark.parametrize(("algorithm", "train", "guidance"), conforms.RUNS)
def test_a_recipe_trains_it(
    of: Callable[[str], Path], tmp_path: Path, algorithm: str, train: str, guidance: float
) -> None:
    """Edit with a source, Plus with several pictures, and both with words alone."""
    edits, one = train == "lora", (algorithm, train) in (("flow_grpo", "lora"), ("diffusion_nft", "full"))
    data = conforms.picture_prompts(tmp_path / "data", references=0 if one else 2) if edits else None
    options = {"name": NAME, "path": str(of(ONE if one else PLUS)), "size": [16, 16], "picture_area": 1024}
    conforms.trains(tmp_path / "run", options, algorithm, train, guidance, data)


@pytest.mark.parametrize(("pipeline", "prompts"), [(ONE, MIXED), (PLUS, SEVERAL)])
def test_diffusers_loads_what_was_trained(
    of: Callable[[str], Path], tmp_path: Path, pipeline: str, prompts: tuple[Prompt, ...]
) -> None:
    model = load(of(pipeline))
    conforms.exports(tmp_path, model, prompts, 3.0)


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


def test_every_picture_is_read_in_its_place(plus: FlowModel) -> None:
    def drawn(prompt: Prompt) -> Tensor:
        x = torch.zeros(1, *plus.latent_shape)
        with torch.no_grad():
            return plus.velocity(plus.net, x, torch.ones(1), plus.collate(plus.encode([prompt])))

    before = drawn(SEVERAL[3])
    first, second = SEVERAL[3].references
    for others in ((second, first), (first, picture("other", 64, 40)), (picture("other", 64, 20), second), (first,)):
        assert (drawn(replace(SEVERAL[3], references=others)) - before).abs().max() > 1e-3


def test_pictures_are_brought_to_the_nearest_of_a_list_of_sizes(plus: FlowModel) -> None:
    from diffusers.pipelines.joyimage.image_processor import BUCKETS, find_best_bucket

    sizes = [(h, w) for h in range(100, 3000, 170) for w in range(100, 3000, 170)]
    usual = joyimage_edit.nearest(BUCKETS[1024], 1024 * 1024, 16)
    assert all(usual(*size) == find_best_bucket(*size, 1024) for size in sizes)
    small = joyimage_edit.nearest(BUCKETS[1024], 256 * 256, 16)
    assert small(900, 900) == (256, 256)
    assert small(1080, 1920) == (192, 336)  # 768 x 1344 at full size
    assert all(small(*small(*size)) == small(*size) for size in sizes), "the pipeline asks twice"
    (condition,) = plus.encode([SEVERAL[3]])
    tiny = joyimage_edit.nearest(BUCKETS[1024], 32 * 32, 4)
    assert condition["grids"].tolist() == [[side // 4 for side in tiny(64, 20)], [side // 4 for side in tiny(64, 40)]]


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


def test_too_many_pictures(model: FlowModel, plus: FlowModel) -> None:
    with pytest.raises(DataError, match="has 2 pictures, and this backbone reads 0 to 1"):
        model.encode([replace(SOURCES[0], references=(picture("d"),))])
    with pytest.raises(DataError, match="has 7 pictures, and this backbone reads 0 to 6"):
        plus.encode([replace(SOURCES[0], references=(picture("d"),) * 6)])


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


@pytest.mark.parametrize(("pipeline", "drawn"), [(ONE, SOURCES[:2]), (PLUS, SEVERAL[2:])])
@torch.no_grad()
def test_in_bfloat16_pictures_stay_near_the_pipeline(
    of: Callable[[str], Path], pipeline: str, drawn: tuple[Prompt, ...]
) -> None:
    """As on a large machine: a LoRA that changes nothing yet beside a network that is rounded."""
    cpu = torch.device("cpu")
    backbone = registry.build("backbones", NAME, {"path": str(of(pipeline)), "size": SIZE, "picture_area": 1024})
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
        ({"picture_area": 9}, "32 x 32"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        registry.build("backbones", NAME, options)


def test_a_checkpoint_of_another_family_is_named(folder: Path, tmp_path: Path) -> None:
    for name, said in (("QwenImageEditPipeline", "'qwen_image_edit'"), ("AnimaPipeline", "No backbone")):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(RecipeError, match=name) as error:
            load(tmp_path)
        assert said in str(error.value)
