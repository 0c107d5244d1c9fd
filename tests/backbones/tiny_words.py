"""Tokenizers and text encoders of the real classes at toy size, for the tests of several backbones."""

from typing import Any

import torch

CHAT = (  # Qwen's template without tools
    "{% for one in messages %}<|im_start|>{{ one['role'] }}\n{{ one['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WIDTH = 16  # of a hidden state


def qwen_tokenizer() -> Any:
    """A byte a token, without merges, and Qwen's marks."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[], additional_special_tokens=MARKS)
    tokenizer.chat_template = CHAT
    return tokenizer


def language_options(tokenizer: Any) -> dict[str, Any]:
    """Options of a decoder's configuration: two layers, two heads of 8."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,  # of what is not normalised, more than a trace arrives
    }


def vision_language(tokenizer: Any, layers: int = 2) -> Any:
    """Qwen2.5-VL, whose pictures are cut into patches of 14 x 14 pixels of which four make a token."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = language_options(tokenizer) | {
        "num_hidden_layers": layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [1],
    }
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    marks = {option: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for option, name in names.items()}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks))


def autoencoder(channels: int = 4, factor: int = 2) -> Any:
    """An AutoencoderKL with a scale and a shift, so that a test sees whether both are used."""
    from diffusers import AutoencoderKL

    levels = factor.bit_length()
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=channels,
        sample_size=32,
        scaling_factor=0.4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def shaken(module: torch.nn.Module, std: float = 0.2) -> Any:
    """The module with every weight drawn anew: layers that start at 0 or 1 would hide what they do."""
    for name, parameter in module.named_parameters():
        centre = 1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0
        torch.nn.init.normal_(parameter, centre, std)
    return module


def longcat(channels: int = 4) -> Any:
    """LongCat-Image's transformer over latents of this many channels."""
    from diffusers import LongCatImageTransformer2DModel

    return shaken(
        LongCatImageTransformer2DModel(
            in_channels=4 * channels,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=[2, 2, 4],
        )
    )


def following_size() -> Any:
    """A schedule whose shift grows with the picture."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64)
