"""How large a language model is, and what a token costs it, without its weights: from its configuration.

Found in this order: the configuration in the backbone's folder, which may be the one that ships with rlkit; the
published configuration of a checkpoint that is listed here. It is built on the meta device, and counted as the networks
of sizes.py are; the vision tower's first convolution too, which cuts a picture into patches.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlkit.errors import RecipeError
from rlkit.plan.sizes import Size, adapted, linears_of, read_json
from rlkit.weights import Lora

LANGUAGE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # that adapters are put on
PATCHED = 1280  # tokens of a picture where nothing says how large pictures are: about a megapixel of 28 x 28 each


@dataclass(frozen=True)
class Words:
    """A language model in numbers."""

    source: str
    parameters: float
    layers: int
    heads: int  # width of all heads' queries together
    kept: int  # values of one token's key and value in one layer
    saved: float  # values that the backward pass needs of one token in one layer
    width: int
    body: float  # weights that every token is multiplied with
    head: float  # and those of the output layer
    vocabulary: int
    linears: Mapping[str, tuple[int, int]]
    picture: int = 0  # tokens of a picture; 0: it sees none
    seeing: float = 0.0  # FLOPs of looking at one
    seen: float = 0.0  # values that the backward pass needs of that

    def flops(self, tokens: float, said: float, pictures: float = 0.0, before: float = 0.0) -> float:
        """Of a forward pass over so many tokens behind `before` others, with logits for `said` of them."""
        attention = 4 * self.layers * self.heads * tokens * (tokens + before)
        return 2 * (self.body * tokens + self.head * said) + attention + pictures * self.seeing

    def row(self, tokens: float, said: float, pictures: float, learns: float | None = None) -> Size:
        """One that reads so many tokens, with logits for some of them. learns: parameters; None: all."""
        return Size(
            source=self.source,
            parameters=self.parameters,
            encoders=0.0,
            layers=self.layers,
            width=self.width,
            tokens=round(tokens),
            flops=self.flops(tokens, said, pictures),
            linears=self.linears,
            pixels=0,
            saved=self.saved,
            aside=pictures * self.seen,
            kept=self.kept,
            vocabulary=self.vocabulary if said > 1 else 0,
            learns=learns,
        )

    def trained(self, lora: Lora | None, only: Sequence[str] = ()) -> float:
        """Parameters that learn; only: those of tensors whose names hold one of these words."""
        if lora is not None:
            return adapted(
                {name: shape for name, shape in self.linears.items() if "visual" not in name}, lora, LANGUAGE
            )
        if only:
            chosen = (shape for name, shape in self.linears.items() if any(word in name for word in only))
            return float(sum(math.prod(shape) for shape in chosen))
        return self.parameters


def _reading(width: int, inner: int, layers: int, heads: tuple[int, int], words: int, tied: bool) -> dict[str, Any]:
    """heads: of queries, and of the keys that they share. tied: the output layer is the embedding."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": words}
    return sizes | {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "tie_word_embeddings": tied}


def _seeing25(text: dict[str, Any]) -> dict[str, Any]:
    tower: dict[str, Any] = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    tower |= {"patch_size": 14, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": text["hidden_size"]}
    tied = text["tie_word_embeddings"]
    return {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": tower, "tie_word_embeddings": tied}


WRITERS: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen2.5-1.5B-Instruct": {"model_type": "qwen2", **_reading(1536, 8960, 28, (12, 2), 151936, tied=True)},
    "Qwen/Qwen2.5-VL-3B-Instruct": _seeing25(_reading(2048, 11008, 36, (16, 2), 151936, tied=True)),
    "Qwen/Qwen2.5-VL-7B-Instruct": _seeing25(_reading(3584, 18944, 28, (28, 4), 152064, tied=False)),
    "Qwen/Qwen3-VL-8B-Instruct": {
        "model_type": "qwen3_vl",
        "text_config": {**_reading(4096, 12288, 36, (32, 8), 151936, tied=False), "head_dim": 128},
        "vision_config": {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        "tie_word_embeddings": False,
    },
}


def words_of(backbone: Any) -> Words:
    """Of a backbone that writes. RecipeError where nothing is known."""
    path = str(getattr(backbone, "path", None) or "")
    folder = Path(path).expanduser() if path else getattr(inspect.getmodule(type(backbone)), "BASE", None)
    if folder is not None and (Path(folder) / "config.json").is_file():
        config, source = read_json(Path(folder) / "config.json"), f"the configuration in {Path(folder).name}"
    elif path in WRITERS:
        config, source = dict(WRITERS[path]), f"the published configuration of {path}"
    else:
        what = f"nothing tells how large {path or type(backbone).__name__} is."
        hint = f"Give a folder of transformers as its path. Known without one: {', '.join(WRITERS)}."
        raise RecipeError(what, where="policy.backbone.path", hint=hint)
    return _of_writer(source, writer(config), _patches(backbone, config, Path(folder) if folder else None))


def writer(config: Mapping[str, Any]) -> nn.Module:
    """The language model of a configuration, on the meta device."""
    import transformers

    kind = str(config["model_type"])
    options = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
    settings = transformers.AutoConfig.for_model(kind, **options)
    sees = "vision_config" in config
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        net: nn.Module = auto.from_config(settings)
    return net


def _patches(backbone: Any, config: Mapping[str, Any], folder: Path | None) -> int:
    """Tokens of a picture, if any: at the most that the recipe allows, or at the least that a folder asks for, to which
    the embedded world's pictures are enlarged."""
    if "vision_config" not in config:
        return 0
    tower = config["vision_config"]
    side = int(tower.get("patch_size", 14)) * int(tower.get("spatial_merge_size", 2))
    pixels = getattr(backbone, "pixels", None)
    if pixels:
        return int(pixels[1]) // side**2
    told = folder / "preprocessor_config.json" if folder else None
    if told is not None and told.is_file() and getattr(backbone, "path", None) is None:
        return int(read_json(told)["size"]["shortest_edge"]) // side**2
    return PATCHED


def _of_writer(source: str, net: Any, picture: int) -> Words:
    text = net.config.get_text_config()
    linears = {name: (one.in_features, one.out_features) for name, one in linears_of(net)}
    told = {name: shape for name, shape in linears.items() if "visual" not in name}
    head = math.prod(told["lm_head"])
    size = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return Words(
        source=source,
        parameters=float(sum(one.numel() for one in net.parameters())),
        layers=text.num_hidden_layers,
        heads=size * text.num_attention_heads,
        kept=2 * size * text.num_key_value_heads,
        saved=13 * text.hidden_size + 4 * text.intermediate_size,
        width=text.hidden_size,
        body=float(sum(math.prod(shape) for name, shape in told.items() if name != "lm_head")),
        head=float(head),
        vocabulary=text.vocab_size,
        linears=linears,
        picture=picture,
        seeing=_seeing(net, linears, picture) if picture else 0.0,
        seen=_saved(net.config.vision_config, picture) if picture else 0.0,
    )


def _saved(tower: Any, picture: int) -> float:
    patches = picture * tower.spatial_merge_size**2
    return float(patches * tower.depth * (13 * tower.hidden_size + 4 * tower.intermediate_size))


def _seeing(net: Any, linears: Mapping[str, tuple[int, int]], picture: int) -> float:
    """FLOPs of a picture's way through the vision tower. Attention within windows is not counted."""
    tower = net.config.vision_config
    patches = picture * tower.spatial_merge_size**2
    seen = {name: math.prod(shape) for name, shape in linears.items() if "visual" in name}
    merged = sum(count for name, count in seen.items() if "merger" in name)
    cut = sum(one.weight.numel() for one in net.modules() if isinstance(one, nn.Conv3d))
    whole = len(getattr(tower, "fullatt_block_indexes", None) or range(tower.depth))
    attention = 4 * whole * patches**2 * tower.hidden_size
    return 2.0 * (patches * (sum(seen.values()) - merged + cut) + picture * merged) + attention
