"""How large a flow backbone is, and what one row costs it, without its weights: from its configuration.

Found in this order: the configuration in the backbone's folder, which may be the one that ships with rlkit; the
published configuration of a checkpoint that is listed here; the number of parameters that the backbone's card states,
with a shape that is guessed. The network is built on the meta device, where nothing has a memory, and its linear layers
are counted: 2 FLOPs a weight and token, and 4 T^2 D of each attention over T tokens of width D. Convolutions,
activation functions and norms are left out.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlkit.errors import RecipeError
from rlkit.weights import Lora

UNITS = {"M": 1e6, "B": 1e9}
QUERIES = {"to_q": 1, "img_attn_qkv": 3}  # ends of the names of layers that make queries, and of how much in all
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MORE_ATTENTION = ("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj")
ONCE = ("norm", "mod", "time", "guidance", "text_embedder", "adaln")  # of these names: once a picture, not per token
WORDS = ("context", "txt", "add_", "to_add")  # of a network with two streams: on the text's tokens


@dataclass(frozen=True)
class Published:
    """A checkpoint's architecture: a class of diffusers with these changes to its defaults."""

    kind: str
    changes: Mapping[str, Any]
    encoders: float = 0.0  # parameters of what reads prompts
    cell: int = 16  # pixels a side of what becomes one token
    words: int = 0  # tokens of the prompt beside the backbone's max_tokens

    def config(self) -> dict[str, Any]:
        return {"_class_name": self.kind, **self.changes}


CLIP_L, CLIP_BIGG, T5_XXL, QWEN_VL = 123.65e6, 694.66e6, 4762.3e6, 8292.2e6  # parameters; QWEN_VL: Qwen2.5-VL of 7 B
SD35 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
PUBLISHED = {
    "stabilityai/stable-diffusion-3.5-medium": Published(
        "SD3Transformer2DModel",
        {**SD35, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
        encoders=CLIP_L + CLIP_BIGG + T5_XXL,
        words=77,
    ),
    "stabilityai/stable-diffusion-3.5-large": Published(
        "SD3Transformer2DModel", {**SD35_LARGE, "qk_norm": "rms_norm"}, encoders=CLIP_L + CLIP_BIGG + T5_XXL, words=77
    ),
    "black-forest-labs/FLUX.1-dev": Published(
        "FluxTransformer2DModel", {"guidance_embeds": True}, encoders=CLIP_L + T5_XXL
    ),
    "black-forest-labs/FLUX.1-Kontext-dev": Published(
        "FluxTransformer2DModel", {"guidance_embeds": True}, encoders=CLIP_L + T5_XXL
    ),
    "Qwen/Qwen-Image": Published("QwenImageTransformer2DModel", {}, encoders=QWEN_VL),
    "Alpha-VLLM/Lumina-Image-2.0": Published("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, encoders=2614.3e6),
    "hunyuanvideo-community/HunyuanImage-2.1-Diffusers": Published(
        "HunyuanImageTransformer2DModel", {}, encoders=QWEN_VL + 219.3e6, cell=32
    ),
    "jdopensource/JoyAI-Image-Edit-Diffusers": Published(
        "JoyImageEditTransformer3DModel",
        {"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 40, "text_dim": 4096},
        encoders=8767.1e6,
    ),
    "Tongyi-MAI/Z-Image": Published("ZImageTransformer2DModel", {}, encoders=4022.5e6),
}


@dataclass(frozen=True)
class Size:
    """A backbone in numbers, and one of its rows."""

    source: str  # where they come from, in words
    parameters: float
    encoders: float  # parameters
    layers: int
    width: int
    tokens: int  # of one row: picture and text
    flops: float  # of one row's forward pass
    linears: Mapping[str, tuple[int, int]]  # name -> (inputs, outputs); empty where the network was not built
    pixels: int  # of a picture that an autoencoder of convolutions decodes; 0: it costs nothing worth a number
    saved: float = 0.0  # values that the backward pass needs of a token in a layer, if known
    aside: float = 0.0  # values that it needs of a row beside: of the picture in it
    kept: int = 0  # values of a token's key and value in a layer, of a model that writes
    vocabulary: int = 0
    learns: float | None = None  # parameters that learn, where that is not for adapters to say

    def trained(self, lora: Lora | None) -> float:
        """Parameters that learn."""
        if self.learns is not None:
            return self.learns
        if lora is None:
            return self.parameters
        guess = lora.rank * 8.0 * self.width * self.layers  # where nothing was built: four square layers
        return adapted(self.linears, lora, ATTENTION + MORE_ATTENTION) or guess


def adapted(linears: Mapping[str, tuple[int, int]], lora: Lora, targets: Sequence[str]) -> float:
    """Parameters of adapters on the layers that the recipe names, or else on those of these names."""
    ends = tuple(lora.targets or targets)
    return float(sum(lora.rank * sum(shape) for name, shape in linears.items() if name.endswith(ends)))


def size_of(backbone: Any, reads_source: bool = False) -> Size:
    """reads_source: each row has another picture in its sequence, to edit. RecipeError where nothing is known."""
    path = getattr(backbone, "path", None)
    shipped = getattr(inspect.getmodule(type(backbone)), "BASE", None)
    folder = Path(path).expanduser() if path else shipped
    if folder is not None and (Path(folder) / "transformer" / "config.json").is_file():
        return _of_folder(backbone, Path(folder), reads_source)
    if path in PUBLISHED:
        known = PUBLISHED[path]
        net = built(known.config())
        tokens = _tokens(backbone, known.cell, known.words, reads_source)
        return _of_net(f"the published configuration of {path}", net, *tokens, known.encoders, _pixels(backbone))
    return _of_card(backbone, reads_source)


def built(config: Mapping[str, Any]) -> nn.Module:
    """The network of a configuration, on the meta device: shapes without memory."""
    import diffusers

    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if kind is None:
        what = f"diffusers has no network {config.get('_class_name')!r}"
        raise RecipeError(what, where="policy.backbone.path", hint="Its card's number is used for a hub name.")
    with torch.device("meta"):
        net: nn.Module = kind.from_config(dict(config))
    return net


def row_flops(net: nn.Module, picture: int, text: int) -> float:
    """FLOPs of one row's forward pass: `picture` and `text` tokens, and what is computed once."""
    linears = dict(linears_of(net))
    streams = any(one.startswith(WORDS) for name in linears for one in name.split(".")[-2:])
    total = 0.0
    for name, layer in linears.items():
        parts = name.casefold().split(".")
        if any(word in part for part in parts for word in ONCE):
            tokens = 1
        elif any(part.startswith(WORDS) or "_context" in part for part in parts):
            tokens = text
        else:
            tokens = picture if streams and "single" not in name else picture + text
        total += 2 * tokens * layer.in_features * layer.out_features
        if parts[-1] in QUERIES:
            total += 4 * (picture + text) ** 2 * layer.out_features / QUERIES[parts[-1]]
    return total


def linears_of(net: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, one) for name, one in net.named_modules() if isinstance(one, nn.Linear))


def _of_net(source: str, net: nn.Module, picture: int, text: int, encoders: float, pixels: int) -> Size:
    linears = {name: (one.in_features, one.out_features) for name, one in linears_of(net)}
    queries = {name: shape[1] // QUERIES[end] for name, shape in linears.items() if (end := _end(name)) in QUERIES}
    width = max(queries.values(), default=1)
    layers = len({name.split(".attn")[0].split(".attention")[0] for name in queries})
    parameters = float(sum(one.numel() for one in net.parameters()))
    flops = row_flops(net, picture, text)
    return Size(source, parameters, encoders, layers, width, picture + text, flops, linears, pixels)


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _of_folder(backbone: Any, folder: Path, reads_source: bool) -> Size:
    config = read_json(folder / "transformer" / "config.json")
    vae = folder / "vae" / "config.json"
    factor = 2 ** (len(read_json(vae).get("block_out_channels", [0] * 4)) - 1) if vae.is_file() else 1
    patch = config.get("patch_size", 1)
    cell = factor * int(patch if isinstance(patch, int) else patch[-1])
    texts = [
        read_json(file).get("max_position_embeddings", 0) for file in sorted(folder.glob("text_encoder/config.json"))
    ]
    words = 0 if getattr(backbone, "max_tokens", None) else max(texts, default=0)
    weights = sum(file.stat().st_size for file in folder.glob("text_encoder*/*.safetensors"))  # saved with 2 bytes each
    if getattr(backbone, "size", None) is None:  # of one size only: that of its configuration
        picture, text = (int(config.get("sample_size", 64)) // cell) ** 2, words
    else:
        alike = config.get("out_channels") in (None, config.get("in_channels"))
        picture, text = _tokens(backbone, cell, words, reads_source and alike)
    pixels = _pixels(backbone) if vae.is_file() else 0
    return _of_net(f"the configuration in {folder.name}", built(config), picture, text, weights / 2, pixels)


def _of_card(backbone: Any, reads_source: bool) -> Size:
    """By the number of parameters alone. The shape is guessed: P = 12 L D^2, and layers 64 times narrower than wide."""
    stated = card(getattr(backbone, "parameters", ""), str(getattr(backbone, "path", "")))
    if not stated:
        name = type(backbone).__name__
        what = f"nothing tells how large {name} is: no configuration, and no number on its card (`parameters`)."
        raise RecipeError(
            what, where="policy.backbone", hint="Give the folder of a checkpoint as policy.backbone.path."
        )
    parameters, encoders = stated
    width = round((parameters * 64 / 12) ** (1 / 3))
    layers = max(1, round(width / 64))
    picture, text = _tokens(backbone, 16, 0, reads_source)
    tokens = picture + text
    flops = 2 * parameters * tokens + 4 * layers * tokens**2 * width
    source = f"the card of {type(backbone).__name__} (its shape is guessed)"
    return Size(source, parameters, encoders, layers, width, tokens, flops, {}, _pixels(backbone))


def card(text: str, path: str) -> tuple[float, float] | None:
    """(parameters, of text encoders) from a card's words, such as `2.5 B (3.5 medium), 8.1 B (3.5 large)`; the one
    whose words in brackets are in the path, else the first."""
    main, _, encoders = text.partition(" and ") if "encoder" in text else (text, "", "")
    found = re.findall(r"([\d.]+) ([MB])\b(?: \(([^)]*)\))?", main)
    if not found:
        return None
    fitting = [one for one in found if one[2] and all(word in path.casefold() for word in one[2].casefold().split())]
    number, unit, _ = (fitting or found)[0]
    beside = re.search(r"([\d.]+) ([MB])\b", encoders)
    return float(number) * UNITS[unit], float(beside[1]) * UNITS[beside[2]] if beside else 0.0


def _tokens(backbone: Any, cell: int, words: int, reads_source: bool) -> tuple[int, int]:
    """(of the picture, with the one that it is made from; of the text)."""
    size: Sequence[int] = getattr(backbone, "size", None) or (512, 512)
    picture = math.prod(-(-side // cell) for side in size) * (2 if reads_source else 1)
    return picture, words + int(getattr(backbone, "max_tokens", 0))


def _pixels(backbone: Any) -> int:
    return math.prod(getattr(backbone, "size", None) or (0,))


def read_json(file: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return read
