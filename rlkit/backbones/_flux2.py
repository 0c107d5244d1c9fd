"""What FLUX.2's dev and klein differ in, which is how they read words; and their autoencoder and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rlkit.backbones import _diffusers as shared

DEV, KLEIN = "Flux2Pipeline", "Flux2KleinPipeline"
LAYERS = {DEV: (10, 20, 30), KLEIN: (9, 18, 27)}  # of the text encoder whose states are read


@dataclass(frozen=True)
class Words:
    """What a checkpoint reads of a prompt: its chat, `max_tokens` long, through three layers of its text encoder."""

    pipeline: str
    tokenizer: Any
    text_encoder: Any
    max_tokens: int

    @classmethod
    def of(cls, folder: shared.Checkpoint, max_tokens: int, device: torch.device, dtype: torch.dtype) -> Words:
        from transformers import (
            Mistral3ForConditionalGeneration,
            PreTrainedTokenizerFast,
            Qwen2Tokenizer,
            Qwen3ForCausalLM,
        )

        klein = folder.pipeline == KLEIN
        text_encoder = Qwen3ForCausalLM if klein else Mistral3ForConditionalGeneration
        # dev's folder holds a processor of words and pictures, which transformers makes with torchvision only. Its
        # tokenizer has the same chat, and no picture goes through it.
        tokenizer = folder.plain("tokenizer", Qwen2Tokenizer if klein else PreTrainedTokenizerFast)
        return cls(folder.pipeline, tokenizer, folder.frozen("text_encoder", text_encoder, device, dtype), max_tokens)

    def chat(self, text: str) -> str:
        """A prompt as the text encoder reads it."""
        if self.pipeline == KLEIN:
            asked: list[Any] = [{"role": "user", "content": text}]
            options = {"add_generation_prompt": True, "enable_thinking": False}
        else:
            from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

            said = {"system": SYSTEM_MESSAGE, "user": text.replace("[IMG]", "")}  # which would stand for a picture
            asked = [{"role": role, "content": [{"type": "text", "text": one}]} for role, one in said.items()]
            options = {"add_generation_prompt": False}
        return str(self.tokenizer.apply_chat_template(asked, tokenize=False, **options))

    def states(self, text: str) -> Tensor:
        """[max_tokens, 3D], where the text encoder is."""
        read = self.tokenizer(
            self.chat(text),
            add_special_tokens=False,  # the chat has its own
            padding="max_length",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        states = self.text_encoder(
            input_ids=read["input_ids"],
            attention_mask=read["attention_mask"],
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,
        ).hidden_states
        return torch.cat([states[layer][0] for layer in LAYERS[self.pipeline]], dim=-1)

    def unread(self, text: str) -> list[str]:
        ahead = self.tokenizer(self.chat("\0").split("\0")[0], add_special_tokens=False).input_ids  # of the prompt
        left = self.max_tokens - len(ahead) + self.tokenizer.num_special_tokens_to_add()
        return shared.cut_words(self.tokenizer, text, max(0, left))


def tokens_of(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h*w, C]."""
    return latents.flatten(2).transpose(1, 2)


def moments(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [1, 4C, 1, 1] of the latents."""
    mean, variance = (column.view(1, -1, 1, 1) for column in (vae.bn.running_mean, vae.bn.running_var))
    return mean, torch.sqrt(variance + vae.config.batch_norm_eps)


def decode_with(vae: Any) -> Callable[[Tensor], Tensor]:
    """Latents [N, 4C, h, w] -> pictures [N, 3, H, W] in 0..1, fp32. The gradient flows through."""
    mean, std = moments(vae)

    def decode(latents: Tensor) -> Tensor:
        codes = functional.pixel_shuffle(latents.to(vae.device, vae.dtype) * std + mean, 2)  # [N, C, 2h, 2w]
        pictures: Tensor = vae.decode(codes, return_dict=False)[0]
        return (pictures.float() * 0.5 + 0.5).clamp(0, 1)

    return decode


def encode_with(vae: Any) -> Callable[[Tensor], Tensor]:
    """Pictures [N, 3, H, W] in 0..1 -> latents [N, 4C, h, w] fp32: the mode of the autoencoder's distribution."""
    mean, std = moments(vae)

    @torch.no_grad()
    def encode(pictures: Tensor) -> Tensor:
        codes: Tensor = vae.encode((2 * pictures - 1).to(vae.device, vae.dtype)).latent_dist.mode()
        return ((functional.pixel_unshuffle(codes, 2) - mean) / std).float()

    return encode


def brought_down(picture: Any, area: int) -> Any:
    """A PIL picture of no more than this area, in the same proportions."""
    from PIL import Image

    width, height = picture.size
    if width * height <= area:
        return picture
    scale = math.sqrt(area / (width * height))
    return picture.resize((int(width * scale), int(height * scale)), Image.Resampling.LANCZOS)
