"""A vision-language model for tests: an untrained Qwen2.5-VL of the real classes, with tokenizer and chat template.

It knows nothing, but everything that it is shown changes what it says: weights are drawn ten times wider than for
training. Two tokens make it a judge of sorts. The chat template ends its prompt with one of them when the request has
`chat_template_kwargs: {lean: words}` or `{lean: digits}`, and then most of the next token's probability is on yes and
no, or on 1 to 5; which of them, the rest of the request decides. Without it, the probability is spread over everything.

Needs torchvision, as the processor of Qwen2.5-VL does. The weights are fp32, 0.35 million.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = {
    "end": "<|im_end|>",
    "start": "<|im_start|>",
    "picture_start": "<|vision_start|>",
    "picture_end": "<|vision_end|>",
    "picture": "<|image_pad|>",
    "video": "<|video_pad|>",
}
LEANINGS: Mapping[str, tuple[str, ...]] = {
    "words": ("yes", "no", "Yes", "No", "Ġyes"),  # Ġ: a space
    "digits": ("1", "2", "3", "4", "5"),
}
LEAN = ("<|words|>", "<|digits|>")
QUOTATION_MARK, END = 1, 263  # tokens that end a text
HIDDEN, HEADS = 64, 2
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
<|im_start|>assistant
{% if lean %}{{ '<|' + lean + '|>' }}{% endif -%}
"""


def save_tiny_vlm(folder: Path) -> None:
    """Write config, weights, tokenizer, processor and chat template: what vLLM and transformers load."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokenizer = _tokenizer()
    assert tokenizer.convert_tokens_to_ids(['"', SPECIAL["end"]]) == [QUOTATION_MARK, END]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(_config(tokenizer))
        _lean(model, tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    _processor(tokenizer).save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, the labels that are longer than one byte, and the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("y", "e"), ("ye", "s"), ("n", "o"), ("Y", "e"), ("Ye", "s"), ("N", "o"), ("Ġ", "yes")]
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    bytewise = Tokenizer(models.BPE(vocab={symbol: row for row, symbol in enumerate(symbols)}, merges=merges))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token=SPECIAL["end"], pad_token=SPECIAL["end"], chat_template=TEMPLATE
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL.values(), *LEAN]})
    return tokenizer


def _config(tokenizer: PreTrainedTokenizerFast):
    from transformers import Qwen2_5_VLConfig

    def token(name: str) -> int:
        return tokenizer.convert_tokens_to_ids(SPECIAL[name])

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "max_position_embeddings": 8192,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": token("end"),
        "pad_token_id": token("end"),
    }
    vision = {
        "depth": 2,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_heads": HEADS,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("picture"),
        video_token_id=token("video"),
        vision_start_token_id=token("picture_start"),
        vision_end_token_id=token("picture_end"),
        tie_word_embeddings=False,
        initializer_range=0.2,
    )


@torch.no_grad()
def _lean(model, tokenizer: PreTrainedTokenizerFast) -> None:
    """One direction of the residual stream for each leaning: the token writes it, and its labels are read along it."""
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight  # [V, D]
    for token, labels in zip(LEAN, LEANINGS.values(), strict=True):
        direction = torch.nn.functional.normalize(torch.randn(HIDDEN), dim=0)
        inputs[tokenizer.convert_tokens_to_ids(token)] = 10 * direction
        rows = tokenizer.convert_tokens_to_ids(list(labels))
        along = outputs[rows] @ direction  # [labels], made equal: the rest of the request decides between them
        outputs[rows] += (3 - along)[:, None] * direction


def _processor(tokenizer: PreTrainedTokenizerFast):
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 28 * 28, "longest_edge": 224 * 224}  # pixels in all
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )
