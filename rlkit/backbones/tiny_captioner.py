"""The embedded world's captioner: Qwen2.5-VL's real class at toy size, which says what a 32x32 picture shows.

Its processor enlarges a picture to 112 x 112, which are 64 patches and 16 tokens. The tokenizer is a byte-level BPE in
which every word of the world is one token, and any other text is still readable, byte by byte. 1.1 M parameters. The
shipped weights are what `rlkit pretrain-captioner` made; `tiny_captioner_base/scores.json` says how, and how good they
are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlkit.backbones.qwen_vl import QwenVL
from rlkit.errors import RecipeError
from rlkit.types import TokenModel
from rlkit.world import grammar

BASE = Path(__file__).parent / "tiny_captioner_base"
INSTRUCTION = "What is in the picture?"
SIDE = 112  # pixels to which a picture is enlarged: multiples of 28, which make one token
LONGEST = 64  # tokens of a prompt (33 with one picture) and its answer
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{ part.text }}{%- else -%}<|vision_start|><|image_pad|><|vision_end|>{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def new_tokenizer() -> Any:
    """Bytes, the words of the world with and without a space before them, and the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = [*grammar.VOCABULARY[4:], *INSTRUCTION.split(), "user", "assistant", "system"]
    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    bytewise.train_from_iterator([*words, *(f"a {word}" for word in words)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return tokenizer


def new_network(tokenizer: Any) -> Any:
    """An untrained Qwen2.5-VL of the tiny size."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(f"<|{name}|>"))

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": token("im_end"),
        "pad_token_id": token("endoftext"),
    }
    vision = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 3,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [0, 1, 2],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("image_pad"),
        video_token_id=token("video_pad"),
        vision_start_token_id=token("vision_start"),
        vision_end_token_id=token("vision_end"),
        tie_word_embeddings=False,
    )
    net = Qwen2_5_VLForConditionalGeneration(config)
    net.generation_config.eos_token_id = token("im_end")
    net.generation_config.pad_token_id = token("endoftext")
    return net


def new_reader() -> Any:
    """The image processor of Qwen2.5-VL, set to enlarge every picture of the world alike."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(size={"shortest_edge": SIDE * SIDE, "longest_edge": 4 * SIDE * SIDE})


@dataclass(frozen=True)
class TinyCaptioner:
    """The embedded world's captioner: a Qwen2.5-VL of 1.1 M parameters that says what a 32x32 picture shows.

    `path`: a folder that `rlkit pretrain-captioner` wrote; by default the weights that ship with rlkit.
    """

    kind = "tokens"
    tasks = ("caption",)
    licence = "Apache-2.0"
    parameters = "1.1 M"
    paper = ""

    path: str | None = None

    def load(self, device: torch.device, dtype: torch.dtype) -> TokenModel:
        """The network with tokenizer and processor, as `qwen_vl` loads any other."""
        folder = Path(self.path) if self.path else BASE
        if not (folder / "config.json").is_file():
            what = f"there is no captioner in {folder}"
            raise RecipeError(what, where="policy.backbone.path", hint=f"rlkit pretrain-captioner --out {folder}")
        return QwenVL(path=str(folder), instruction=INSTRUCTION, longest=LONGEST).load(device, dtype)
