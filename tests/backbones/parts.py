"""Small parts of pipeline folders: the real classes with a few thousand random weights, and tokenizers of letters."""

import string
from typing import Any

LETTERS = string.ascii_lowercase + string.digits + string.punctuation
CLIP_LENGTH = 24


def clip_tokenizer(length: int = CLIP_LENGTH, pad: str = "<|endoftext|>") -> Any:
    """Every letter is a token. The end token has the largest id, as CLIP's text encoders expect."""
    from transformers import CLIPTokenizer

    pieces = ["!", "<|startoftext|>", *(one for one in LETTERS if one != "!"), *(f"{one}</w>" for one in LETTERS)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=length)


def clip(
    kind: str = "CLIPTextModelWithProjection", width: int = 32, length: int = CLIP_LENGTH, act: str = "gelu"
) -> Any:
    """A text encoder for `clip_tokenizer`; its projection is as wide as it is."""
    import transformers

    tokenizer = clip_tokenizer(length)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act=act,
    )
    return getattr(transformers, kind)(config).eval()


def t5_tokenizer(length: int = 64) -> Any:
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    vocabulary = [(piece, 0.0 if i < 3 else -2.0) for i, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=length)


def t5(width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config).eval()


def autoencoder(channels: int = 4, scaling: float = 1.5, shift: float | None = 0.1, quantised: bool = False) -> Any:
    """An AutoencoderKL whose latent pixels are 2 x 2 pixels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=quantised,
        use_post_quant_conv=quantised,
    ).eval()
