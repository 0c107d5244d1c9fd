"""HPS v2: people's preference as a CLIP ViT-H/14 learnt it, from its published open_clip checkpoint, without open_clip.

Protocol: Wu et al. 2023 (arXiv 2306.09341, github.com/tgxs002/HPSv2): the cosine of picture and prompt, without the
logit scale. The picture keeps its shape: its longer side becomes 224, and black fills up the rest.

The checkpoint names its weights as open_clip does. They are renamed, and the fused attention weights cut in three, for
the CLIPModel of transformers; every name and shape has to fit.

Differences from the reference code:
* It runs picture by picture and in half precision where CUDA is; here pictures go together, and in `dtype`.
* It does not fill up a picture whose longer side is 224 already; then its network refuses what is not square.
* It repairs broken Unicode and HTML entities in the prompt (ftfy); here prompts are read as they are.
* The picture is resized in floating point and not rounded to bytes in between, so that a gradient can pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlkit.embedding import Clip, check_dtype, clip_of, load_network, load_state, load_tokenizer
from rlkit.errors import RewardError
from rlkit.preprocessing import Preprocessing

if TYPE_CHECKING:
    from rlkit.types import Samples, Values

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class HpsV2:
    """Cosine of picture and prompt in CLIP tuned on people's choices, about 0.2 to 0.35, with a gradient.

    Returns (values [N], {"truncated": [N]}): 1 where the end of a prompt was cut off, after 77 tokens. Not scored: an
    empty prompt, and a picture with pixels that are not finite.
    """

    weights: str = "xswu/HPSv2/HPS_v2.1_compressed.pt"  # a file, or OWNER/REPOSITORY/FILE on the hub
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # hub name or folder
    dtype: str = "fp32"  # or bf16

    reads = ("prompt",)
    range = (-1.0, 1.0)
    higher_is_better = True
    components = ("truncated",)
    groupwise = False
    differentiable = True
    licence = "Apache-2.0"
    size = "4 GB"
    protocol = "HPS v2.1, arXiv 2306.09341"
    version = "1"

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    def load(self, device: torch.device) -> _Scorer:
        network = clip_model(load_state(self.weights), VIT_H)
        side = VIT_H.picture
        pad = Preprocessing("pad", (side, side), MEAN, STD)
        return _Scorer(clip_of(network, load_tokenizer(self.tokenizer), pad, device, self.dtype))


@dataclass(frozen=True)
class _Scorer:
    clip: Clip

    def __call__(self, samples: Samples) -> tuple[Values, dict[str, Tensor]]:
        return self.clip.agreement(samples)


@dataclass(frozen=True)
class Tower:
    """One of the two transformers of a CLIP model."""

    width: int
    layers: int
    heads: int
    inner: int  # width inside the MLP


@dataclass(frozen=True)
class Shape:
    """The architecture: the checkpoint does not say it, and heads do not show in its weights."""

    embedding: int
    pictures: Tower
    texts: Tower
    picture: int = 224  # side of a picture
    patch: int = 14
    words: int = 49408
    tokens: int = 77


VIT_H = Shape(1024, Tower(1280, 32, 16, 5120), Tower(1024, 24, 16, 4096))


def clip_model(state: Mapping[str, Tensor], shape: Shape) -> Any:
    """A CLIPModel with the weights of an open_clip state dict. RewardError for one that does not fit."""
    from transformers import CLIPModel

    weights, config = renamed(state, shape), config_of(shape)
    with torch.device("meta"):
        wanted = CLIPModel(config).state_dict()
    _check(weights, wanted)
    return load_network(CLIPModel, None, config=config, state_dict=weights)


def config_of(shape: Shape) -> Any:
    from transformers import CLIPConfig

    def tower(of: Tower) -> dict[str, Any]:  # open_clip's ViT-H has the exact GELU, OpenAI's own models the quick one
        sizes = {"hidden_size": of.width, "num_hidden_layers": of.layers, "num_attention_heads": of.heads}
        return {**sizes, "intermediate_size": of.inner, "hidden_act": "gelu", "projection_dim": shape.embedding}

    last = {"bos_token_id": shape.words - 2, "eos_token_id": shape.words - 1}  # the text's vector is at its end token
    texts = {**tower(shape.texts), **last, "vocab_size": shape.words, "max_position_embeddings": shape.tokens}
    pictures = {**tower(shape.pictures), "image_size": shape.picture, "patch_size": shape.patch}
    return CLIPConfig(text_config=texts, vision_config=pictures, projection_dim=shape.embedding)


def renamed(state: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """An open_clip state dict under the names of transformers. A name that is not known stays, for `_check` to see."""
    names = {
        "logit_scale": "logit_scale",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "text_projection": "text_projection.weight",
        "visual.proj": "visual_projection.weight",
    }
    norms = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm"}
    norms["visual.ln_post"] = "vision_model.post_layernorm"
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    parts["attn.out_proj"] = "self_attn.out_proj"
    fused: dict[str, str] = {}
    for theirs, ours, of in (("", "text_model", shape.texts), ("visual.", "vision_model", shape.pictures)):
        for layer in range(of.layers):
            block, mine = f"{theirs}transformer.resblocks.{layer}", f"{ours}.encoder.layers.{layer}"
            norms |= {f"{block}.{part}": f"{mine}.{name}" for part, name in parts.items()}
            fused |= {
                f"{block}.attn.in_proj_{kind}": f"{mine}.self_attn.{{}}_proj.{kind}" for kind in ("weight", "bias")
            }
    names |= {f"{name}.{kind}": f"{norms[name]}.{kind}" for name in norms for kind in ("weight", "bias")}
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in fused:  # query, key and value, one below the other
            weights |= {fused[name].format(which): part for which, part in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            turned = tensor.T if name in ("text_projection", "visual.proj") else tensor  # there: x @ W
            weights[names.get(name, name)] = turned
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def _check(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    wrong = [f"{name} is missing" for name in wanted if name not in weights]
    wrong += [f"{name} is not known" for name in weights if name not in wanted]
    for name in sorted(set(weights) & set(wanted)):
        if weights[name].shape != wanted[name].shape:
            wrong.append(f"{name} is {list(weights[name].shape)}, not {list(wanted[name].shape)}")
    if wrong:
        shown = "; ".join(wrong[:3])
        what = f"these are not the weights of an open_clip ViT-H-14: {shown}{'; ...' if wrong[3:] else ''}"
        raise RewardError(
            what, where="rewards.hpsv2.weights", hint="Use HPS_v2.1_compressed.pt or HPS_v2_compressed.pt."
        )
