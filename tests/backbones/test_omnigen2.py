"""OmniGen2 of a few thousand weights. diffusers has no pipeline of it, so the network is held to two others: to
Lumina-Image 2.0's of diffusers, which it equals without pictures but for the positions of words, and to a forward pass
written out below, a row at a time, with sines in the place of complex numbers."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import conforms, tiny_words
from making import told
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlkit import parity, registry
from rlkit.backbones import _omnigen2, omnigen2
from rlkit.errors import DataError, RecipeError
from rlkit.policy import Policy
from rlkit.types import FlowModel, Prompt
from rlkit.weights import Lora

picture = conforms.picture
SHAPE: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 24,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 8,
    "norm_eps": 1e-5,
    "axes_dim_rope": (4, 4, 4),
    "axes_lens": (300, 16, 16),
    "text_feat_dim": tiny_words.WIDTH,
    "timestep_scale": 1000.0,
}
PUBLISHED = SHAPE | {  # options/ft.yml of the authors' repository
    "in_channels": 16,
    "hidden_size": 2520,
    "num_layers": 32,
    "num_attention_heads": 21,
    "num_kv_heads": 7,
    "multiple_of": 256,
    "axes_dim_rope": (40, 40, 40),
    "axes_lens": (10000, 10000, 10000),
    "text_feat_dim": 2048,
}
INDEX = {
    "_class_name": "OmniGen2Pipeline",
    "mllm": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "processor": ["transformers", "Qwen2_5_VLProcessor"],
    "scheduler": ["scheduling_flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["transformer_omnigen2", "OmniGen2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
PROMPTS = (  # none, one and several pictures, of different sizes
    Prompt(0, "a red circle"),
    Prompt(1, "make it red, and the sky much bluer", source=picture("a", 40, 64)),
    Prompt(2, "", source=picture("b", 24, 24), references=(picture("c", 64, 40), picture("d", 20, 60))),
    Prompt(3, "the cat of the first one", references=(picture("e", 32, 16),)),
)


def transformer(seed: int = 0, **changed: Any) -> Any:
    with conforms.seeded(seed):
        return tiny_words.shaken(_omnigen2.network()(**(SHAPE | changed))).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("omnigen2") / "base"
    words = tiny_words.qwen_tokenizer()
    with conforms.seeded():
        encoder, vae = tiny_words.vision_language(words), tiny_words.autoencoder()
    transformer().save_pretrained(path / "transformer")
    encoder.save_pretrained(path / "mllm")
    vae.save_pretrained(path / "vae")
    words.save_pretrained(path / "processor")
    (path / "scheduler").mkdir()
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "dynamic_time_shift": True, "num_train_timesteps": 1000}
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    (path / "model_index.json").write_text(json.dumps(INDEX))
    return path


@pytest.fixture(scope="module")
def options(folder: Path) -> dict[str, Any]:
    return {"name": "omnigen2", "path": str(folder), "size": [16, 32], "picture_area": 32 * 32}


@pytest.fixture(scope="module")
def model(options: dict[str, Any]) -> FlowModel:
    return conforms.loaded(**options)


@torch.no_grad()
def answer(model: FlowModel, prompt: Prompt, sigma: float = 0.7) -> Tensor:
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    return model.velocity(model.net, x, torch.tensor([sigma]), model.collate(model.encode([prompt])))


# ---- the network, written out for one row ----------------------------------------------------------------------------


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotated(heads: Tensor, places: Sequence[tuple[int, int, int]]) -> Tensor:
    """Heads [S, N, D] whose channels 2i and 2i + 1 turn, four channels for each of the three positions."""
    out = heads.clone()
    for axis in range(3):
        for i in range(2):
            angle = torch.tensor([[place[axis] / 10000 ** (2 * i / 4)] for place in places])
            at = 4 * axis + 2 * i
            a, b = heads[..., at], heads[..., at + 1]
            out[..., at] = a * angle.cos() - b * angle.sin()
            out[..., at + 1] = a * angle.sin() + b * angle.cos()
    return out


def block(w: Mapping[str, Tensor], name: str, x: Tensor, places: Sequence[Any], time: Tensor | None) -> Tensor:
    def of(layer: str) -> Tensor:
        return w[f"{name}.{layer}.weight"]

    if time is None:
        read, gate, scale, last = normed(x, of("norm1")), *(torch.tensor(n) for n in (1.0, 0.0, 1.0))
    else:
        given = of("norm1.linear") @ nn.functional.silu(time) + w[f"{name}.norm1.linear.bias"]
        first, gate, scale, last = given.split(24)
        read, gate, last = normed(x, of("norm1.norm")) * (1 + first), gate.tanh(), last.tanh()
    query = rotated(normed((read @ of("attn.to_q").T).view(-1, 2, 12), of("attn.norm_q")), places)
    key = rotated(normed((read @ of("attn.to_k").T).view(-1, 1, 12), of("attn.norm_k")), places)
    value = read @ of("attn.to_v").T
    heads = [(query[:, n] @ key[:, 0].T / math.sqrt(12)).softmax(-1) @ value for n in range(2)]
    x = x + gate * normed(torch.cat(heads, -1) @ of("attn.to_out.0").T, of("norm2"))
    read = normed(x, of("ffn_norm1")) * (1 + scale)
    inner = nn.functional.silu(read @ of("feed_forward.linear_1").T) * (read @ of("feed_forward.linear_3").T)
    return x + last * normed(inner @ of("feed_forward.linear_2").T, of("ffn_norm2"))


def written_out(w: Mapping[str, Tensor], x: Tensor, time: float, words: Tensor, latents: Sequence[Tensor]) -> Tensor:
    """data - noise [C, H, W] for x [C, H, W], words [L, D] and latents [C, h, w] of pictures."""

    def linear(name: str, tokens: Tensor) -> Tensor:
        return tokens @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def cut(one: Tensor) -> Tensor:
        rows, columns = one.shape[1] // 2, one.shape[2] // 2
        return torch.stack(
            [
                one[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].permute(1, 2, 0).flatten()
                for r in range(rows)
                for c in range(columns)
            ]
        )

    def grid(one: Tensor, instance: int) -> list[tuple[int, int, int]]:
        return [(instance, r, c) for r in range(one.shape[1] // 2) for c in range(one.shape[2] // 2)]

    rates = 10000 ** (-torch.arange(128) / 128)
    angles = 1000 * (time * rates)
    moment = linear("time_caption_embed.timestep_embedder.linear_1", torch.cat([angles.cos(), angles.sin()]))
    moment = linear("time_caption_embed.timestep_embedder.linear_2", nn.functional.silu(moment))
    text = linear(
        "time_caption_embed.caption_embedder.1", normed(words, w["time_caption_embed.caption_embedder.0.weight"])
    )
    places: list[tuple[int, int, int]] = [(i, i, i) for i in range(len(words))]
    for n in range(2):
        text = block(w, f"context_refiner.{n}", text, places, None)
    parts, instance = [text], len(words)
    for index, one in enumerate(latents):
        read, at = linear("ref_image_patch_embedder", cut(one)) + w["image_index_embedding"][index], grid(one, instance)
        for n in range(2):
            read = block(w, f"ref_image_refiner.{n}", read, at, moment)
        parts.append(read)
        places += at
        instance += max(one.shape[1], one.shape[2]) // 2
    drawn, at = linear("x_embedder", cut(x)), grid(x, instance)
    for n in range(2):
        drawn = block(w, f"noise_refiner.{n}", drawn, at, moment)
    tokens, places = torch.cat([*parts, drawn]), places + at
    for n in range(2):
        tokens = block(w, f"layers.{n}", tokens, places, moment)
    tail = nn.functional.layer_norm(tokens[-len(drawn) :], (24,), eps=1e-6)
    patches = linear("norm_out.linear_2", tail * (1 + linear("norm_out.linear_1", nn.functional.silu(moment))))
    out = torch.zeros_like(x)
    for patch, (_, r, c) in zip(patches, at, strict=True):
        out[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = patch.view(2, 2, -1).permute(2, 0, 1)
    return out


@torch.no_grad()
def test_the_network_is_what_it_is_said_to_be(model: FlowModel) -> None:
    conditions = model.encode(PROMPTS)
    x = torch.randn(len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([1.0, 0.7, 0.3, 0.02])
    found = model.velocity(model.net, x, sigma, model.collate(conditions))
    assert found.std() > 0.1
    weights = model.net.state_dict()
    for i, one in enumerate(conditions):
        sizes = [(height, width) for height, width in one["grids"].tolist()]
        tokens = one["pictures"].split([height * width for height, width in sizes]) if sizes else ()
        latents = [_omnigen2.unpatched(t[None], 2 * h, 2 * w)[0] for t, (h, w) in zip(tokens, sizes, strict=True)]
        expected = written_out(weights, x[i], float(1 - sigma[i]), one["tokens"], latents)
        torch.testing.assert_close(found[i], -expected, rtol=0, atol=2e-4)  # noise - data, and its time is 1 - sigma


@torch.no_grad()
def test_without_pictures_it_is_lumina_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the words' positions, of which Lumina 2 leaves two at 0."""
    from diffusers import Lumina2Transformer2DModel

    usual = _omnigen2.positions

    def as_there(*asked: Any) -> tuple[Tensor, Tensor, Tensor]:
        words, *others = usual(*asked)
        return words * torch.tensor([1, 0, 0]), *others

    theirs = {name: value for name, value in SHAPE.items() if name not in ("text_feat_dim", "timestep_scale")}
    lumina = Lumina2Transformer2DModel(sample_size=8, cap_feat_dim=SHAPE["text_feat_dim"], **theirs).eval()
    net = transformer(timestep_scale=1.0)
    extra = ("ref_image", "image_index")
    lumina.load_state_dict({n: tensor for n, tensor in net.state_dict().items() if not n.startswith(extra)})
    draws = torch.Generator().manual_seed(0)
    x, words = torch.randn(2, 4, 6, 8, generator=draws), torch.randn(2, 5, tiny_words.WIDTH, generator=draws)
    time = torch.tensor([0.1, 0.8])
    there = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    none = torch.zeros(2, 0, 16), torch.zeros(2, 0, 2, dtype=torch.int64)
    expected = lumina(x, time, words, there, return_dict=False)[0]
    assert (net(x, time, words, there, *none) - expected).abs().max() > 1e-2
    monkeypatch.setattr(_omnigen2, "positions", as_there)
    torch.testing.assert_close(net(x, time, words, there, *none), expected, rtol=0, atol=1e-4)


def test_names_and_shapes_are_those_of_the_published_size() -> None:
    """As far as is known without the weights: the authors' configuration and the names in their code."""
    with torch.device("meta"):
        net = _omnigen2.network()(**PUBLISHED)
    found = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    inner = {
        "attn.norm_k.weight": (120,),
        "attn.norm_q.weight": (120,),
        "attn.to_k.weight": (840, 2520),
        "attn.to_out.0.weight": (2520, 2520),
        "attn.to_q.weight": (2520, 2520),
        "attn.to_v.weight": (840, 2520),
        "feed_forward.linear_1.weight": (10240, 2520),
        "feed_forward.linear_2.weight": (2520, 10240),
        "feed_forward.linear_3.weight": (10240, 2520),
        "ffn_norm1.weight": (2520,),
        "ffn_norm2.weight": (2520,),
        "norm2.weight": (2520,),
    }
    timed = {"norm1.linear.weight": (10080, 1024), "norm1.linear.bias": (10080,), "norm1.norm.weight": (2520,)}
    expected = {
        "image_index_embedding": (5, 2520),
        "norm_out.linear_1.bias": (2520,),
        "norm_out.linear_1.weight": (2520, 1024),
        "norm_out.linear_2.bias": (64,),
        "norm_out.linear_2.weight": (64, 2520),
        "ref_image_patch_embedder.bias": (2520,),
        "ref_image_patch_embedder.weight": (2520, 64),
        "time_caption_embed.caption_embedder.0.weight": (2048,),
        "time_caption_embed.caption_embedder.1.bias": (2520,),
        "time_caption_embed.caption_embedder.1.weight": (2520, 2048),
        "time_caption_embed.timestep_embedder.linear_1.bias": (1024,),
        "time_caption_embed.timestep_embedder.linear_1.weight": (1024, 256),
        "time_caption_embed.timestep_embedder.linear_2.bias": (1024,),
        "time_caption_embed.timestep_embedder.linear_2.weight": (1024, 1024),
        "x_embedder.bias": (2520,),
        "x_embedder.weight": (2520, 64),
    }
    for stack, count in {"layers": 32, "noise_refiner": 2, "ref_image_refiner": 2, "context_refiner": 2}.items():
        block = inner | ({"norm1.weight": (2520,)} if stack == "context_refiner" else timed)
        expected |= {f"{stack}.{i}.{name}": shape for i in range(count) for name, shape in block.items()}
    assert found == expected
    assert round(sum(math.prod(shape) for shape in found.values()) / 1e9, 1) == 4.0


def test_positions() -> None:
    words, read, drawn = _omnigen2.positions(torch.tensor([3, 2]), 3, [[(1, 2), (2, 1)], []], (2, 2))
    assert words[0].tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert read[0].tolist() == [[3, 0, 0], [3, 0, 1], [5, 0, 0], [5, 1, 0]]  # the first is 2 tokens long: 3 + 2
    assert drawn[0].tolist() == [[7, 0, 0], [7, 0, 1], [7, 1, 0], [7, 1, 1]]
    assert drawn[1].tolist() == [[2, 0, 0], [2, 0, 1], [2, 1, 0], [2, 1, 1]]


def test_patches_are_put_back() -> None:
    x = torch.randn(2, 4, 6, 8)
    assert torch.equal(_omnigen2.unpatched(_omnigen2.patches(x), 6, 8), x)
    assert torch.equal(_omnigen2.patches(x)[0, 1, :4], x[0, :, 0, 2])  # channels are next to each other


def test_the_schedule_follows_the_size(model: FlowModel) -> None:
    times = torch.arange(9) / 8  # the authors' scheduler: t / (m - m t + t), from 0 for noise to 1 for data
    m = math.sqrt(128 * 128) / 40
    expected = 1 - times / (m - m * times + times)
    torch.testing.assert_close(_omnigen2.Schedule(True).sigmas(8, 128, 128), expected, rtol=0, atol=1e-6)
    assert _omnigen2.Schedule(True).sigmas(4, 40, 40).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert _omnigen2.Schedule(False).sigmas(4, 128, 128).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert model.at is not None
    assert model.at((80, 80)).sigmas(4).tolist() == [1, 0.75, 0.5, 0.25, 0]  # a latent pixel is 2 pixels wide
    assert model.sigmas(4).tolist() != [1, 0.75, 0.5, 0.25, 0]


def test_activations_computed_again_give_the_same_gradient(model: FlowModel) -> None:
    cond = model.collate(model.encode(PROMPTS))
    gradients = []
    for again in (False, True):
        own = conforms.own(model)
        if again:
            own.net.enable_gradient_checkpointing()  # type: ignore[operator]
        x = torch.ones(len(PROMPTS), *model.latent_shape)
        own.velocity(own.net, x, torch.full((len(PROMPTS),), 0.5), cond).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in own.net.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        if name != "image_index_embedding":  # of five, three are in use here
            assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("train", [None, Lora(rank=2)])
def test_it_is_trained_in_bf16(options: dict[str, Any], model: FlowModel, train: Lora | None) -> None:
    """Trained weights are kept in fp32 beside frozen ones and activations in bf16."""
    low = registry.build("backbones", "omnigen2", {k: v for k, v in options.items() if k != "name"})
    policy = Policy(low.load(conforms.CPU, torch.bfloat16), train, conforms.CPU, "bf16", 0, 3.0)
    exact = Policy(conforms.own(model), None, conforms.CPU, "fp32", 0, 3.0)
    x = torch.randn(len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma, keys = torch.linspace(0.9, 0.2, len(PROMPTS)), [prompt.key for prompt in PROMPTS]
    found = []
    for one in (policy, exact):
        one.conditions.encode(PROMPTS)
        found.append(one.models.current.velocity(x, sigma, keys))
    assert (found[0] - found[1]).norm() < 0.1 * found[1].norm()
    found[0].square().mean().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in policy.trainable.values()
    )


# ---- the backbone ----------------------------------------------------------------------------------------------------


def test_the_card() -> None:
    conforms.card("omnigen2")


def test_the_contract(model: FlowModel) -> None:
    conforms.contract(model, PROMPTS)


def test_its_encoders_can_leave(options: dict[str, Any]) -> None:
    conforms.frees(PROMPTS[:3], **options)


def test_log_probabilities_are_those_of_the_path(model: FlowModel) -> None:
    conforms.on_policy(model, PROMPTS)


@pytest.mark.parametrize(("algorithm", "train", "guidance"), conforms.RUNS)
def test_it_trains(options: dict[str, Any], algorithm: str, train: str, guidance: float, tmp_path: Path) -> None:
    data = conforms.picture_prompts(tmp_path / "data", references=2 if train == "full" else 0)
    text_alone = (algorithm, train) == ("flow_grpo", "lora")  # then the pictures' refiner has no gradient
    conforms.trains(tmp_path / "run", options, algorithm, train, guidance, None if text_alone else data)


@torch.no_grad()
def test_a_lora_is_loaded_again_in_one_line(options: dict[str, Any], tmp_path: Path) -> None:
    model = conforms.loaded(**options)
    policy = Policy(conforms.own(model), Lora(rank=2), conforms.CPU, "fp32", 0)
    assert any("ref_image_refiner" in name for name in policy.trainable)
    for parameter in policy.trainable.values():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before = answer(model, PROMPTS[2])
    trained = answer(replace(model, net=policy.net), PROMPTS[2])
    exec(policy.export(tmp_path), {"transformer": model.net})  # the one line that the run's report shows
    after = answer(model, PROMPTS[2])
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, trained, rtol=0, atol=1e-5)
    assert model.at is not None
    assert model.at((32, 16)).lora_targets == model.lora_targets, "with its adapters too"


@torch.no_grad()
def test_all_weights_are_loaded_again(model: FlowModel, tmp_path: Path) -> None:
    policy = Policy(conforms.own(model), None, conforms.CPU, "fp32", 0)
    for parameter in policy.trainable.values():
        parameter.mul_(1.1)
    line = policy.export(tmp_path)
    net = eval(line, {"OmniGen2Transformer2DModel": _omnigen2.network()})
    again, trained = (answer(replace(model, net=one), PROMPTS[2]) for one in (net, policy.net))
    torch.testing.assert_close(again, trained, rtol=0, atol=1e-5)


def test_every_picture_is_read_and_their_order_counts(model: FlowModel) -> None:
    whole = PROMPTS[2]
    before = answer(model, whole)
    first, second = whole.references
    changed = picture("other", 24, 24)
    others = [
        replace(whole, source=changed),
        replace(whole, source=None),
        replace(whole, references=(changed, second)),
        replace(whole, references=(first, changed)),
        replace(whole, references=(second, first)),
        replace(whole, references=()),
    ]
    for other in others:
        assert (answer(model, other) - before).abs().max() > 1e-3


def test_a_source_is_the_first_picture(model: FlowModel) -> None:
    one = PROMPTS[1]
    assert one.source is not None
    assert torch.equal(answer(model, one), answer(model, replace(one, source=None, references=(one.source,))))


def test_pictures_are_made_smaller_and_never_larger(model: FlowModel) -> None:
    assert omnigen2.fitted((1600, 900), 1024 * 1024, 1024) == (1024, 576)
    assert omnigen2.fitted((1000, 1000), 512 * 512, 1024) == (512, 512)
    assert omnigen2.fitted((100, 70), 1024 * 1024, 1024) == (96, 64)
    assert omnigen2.fitted((3, 300), 1024 * 1024, 1024) == (16, 288)
    (condition,) = model.encode([PROMPTS[2]])
    assert condition["grids"].tolist() == [[6, 6], [10, 6], [4, 13]]  # 24x24, 40x25 -> 40x24, 18x55 -> 16x52
    assert condition["pictures"].shape == (36 + 60 + 52, 16)


def test_the_words_are_read_in_their_chat(model: FlowModel, folder: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    words = Qwen2Tokenizer.from_pretrained(folder / "processor")
    said = [{"role": "system", "content": omnigen2.CHAT.split("\n")[1].removesuffix("<|im_end|>")}]
    said.append({"role": "user", "content": "a red circle"})
    words.chat_template = tiny_words.CHAT
    ids = words.apply_chat_template(said, return_tensors="pt", return_dict=True)["input_ids"]
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "mllm").eval()
    with torch.no_grad():
        expected = encoder(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(model.encode(PROMPTS[:1])[0]["tokens"], expected, rtol=0, atol=1e-6)


def test_a_long_prompt_is_cut_and_what_is_lost_is_named(options: dict[str, Any], model: FlowModel) -> None:
    short = conforms.loaded(**(options | {"max_tokens": 8}))
    assert model.unread("a red circle") == []
    assert short.unread("a red circle") == ["circle"]
    whole, cut = (one.encode(told(["a red circle"]))[0]["tokens"] for one in (model, short))
    assert len(cut) == len(whole) - len("a red circle") + 8


def test_a_prompt_cannot_stand_for_a_picture(model: FlowModel) -> None:
    plain, marked = model.encode(told(["make it red", "make<|image_pad|> it red"]))
    assert torch.equal(plain["tokens"], marked["tokens"])


def test_too_many_pictures(model: FlowModel) -> None:
    with pytest.raises(DataError, match="has 6 pictures, and this backbone reads 0 to 5"):
        model.encode([replace(PROMPTS[1], references=(picture("a"),) * 5)])
    model.encode([replace(PROMPTS[1], references=(picture("a"),) * 4)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": [1000, 1024]}, r"multiples of 16 .* try \[992, 1024\]"),
        ({"max_tokens": 0}, "1 or more"),
        ({"picture_area": 9}, "16 x 16"),
        ({"picture_side": 9}, "16 or more"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        registry.build("backbones", "omnigen2", options)


def changed_copy(folder: Path, at: Path) -> Path:
    """The folder by links, with a transformer of its own."""
    at.mkdir()
    for part in folder.iterdir():
        if part.name != "transformer":
            (at / part.name).symlink_to(part)
    (at / "transformer").mkdir()
    (at / "transformer" / "config.json").write_bytes((folder / "transformer" / "config.json").read_bytes())
    return at


def test_weights_that_do_not_fit(folder: Path, options: dict[str, Any], tmp_path: Path) -> None:
    name = "diffusion_pytorch_model.safetensors"
    weights = load_file(folder / "transformer" / name)
    fewer = {key: tensor for key, tensor in weights.items() if key != "image_index_embedding"}
    more = weights | {"double_stream_layers.0.weight": torch.zeros(1)}
    other = weights | {"image_index_embedding": torch.zeros(4, 24)}
    for i, (tensors, said) in enumerate(
        (
            (fewer, "lacks weights of OmniGen2Transformer2DModel: image_index_embedding"),
            (more, "has weights that OmniGen2Transformer2DModel has not: double_stream_layers"),
            (other, "cannot be read"),
        )
    ):
        broken = changed_copy(folder, tmp_path / str(i))
        save_file(tensors, broken / "transformer" / name)
        with pytest.raises(RecipeError, match=said):
            conforms.loaded(**(options | {"path": str(broken)}))


def test_another_family_is_named(folder: Path, options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX | {"_class_name": "Lumina2Pipeline"}))
    with pytest.raises(RecipeError, match=r"is a Lumina2Pipeline, .*OmniGen2Pipeline.*'lumina2'"):
        conforms.loaded(**(options | {"path": str(tmp_path)}))
    with pytest.raises(RecipeError, match="backbone 'omnigen2'"):
        conforms.loaded("lumina2", path=str(folder))


def test_the_checks_of_a_backbone_pass_without_a_pipeline(model: FlowModel) -> None:
    found = {one.name: one.passed for one in parity.checks(model, conforms.CPU)}
    assert found.pop("parity, guidance 1") is None
    assert found.pop("parity, guidance 4") is None
    assert all(found.values()), found
