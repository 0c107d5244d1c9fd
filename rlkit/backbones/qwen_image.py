"""Qwen-Image (arXiv 2508.02324): a 20 B double-stream transformer that reads Qwen2.5-VL-7B's last hidden state.

Conventions of the network: its time is sigma, it predicts noise - data, and it takes 2x2 patches of the latents as
tokens. The prompt stands in a chat; the tokens ahead of it are left out of what the network reads. Texts of one batch
are padded at their end and masked. Guidance is classifier-free, and each token is then given the length that the told
prediction has (`rescaled`). The autoencoder is that of a video model: a picture is one frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlkit.backbones import _diffusers
from rlkit.types import Condition, FlowModel, Prompt, classifier_free

CHAT = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
AHEAD = 34  # tokens of the chat ahead of the prompt
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LONGEST = 1024  # tokens of a prompt that the pipeline reads at most


def check_tokens(max_tokens: int) -> None:
    if not 1 <= max_tokens <= LONGEST:
        raise ValueError(f"max_tokens must be between 1 and {LONGEST}, not {max_tokens}")


def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """v [B, C, H, W] for x [B, C, H, W] and tokens [B, L, D]; `mask` [B, L], if any, says which are there."""
    n, _, height, width = x.shape
    tokens = net(
        hidden_states=_diffusers.packed(x.to(cond["tokens"].dtype)),
        timestep=sigma,
        encoder_hidden_states=cond["tokens"],
        encoder_hidden_states_mask=cond.get("mask"),
        img_shapes=[[(1, height // 2, width // 2)]] * n,
        return_dict=False,
    )[0]
    return _diffusers.unpacked(tokens, height, width).to(x.dtype)


def collate(conditions: Sequence[Condition]) -> Condition:
    """Texts as tokens [B, L, D], and mask [B, L] where their lengths differ: without one, attention is quicker."""
    texts = [one["tokens"] for one in conditions]
    tokens = pad_sequence(texts, batch_first=True)
    if all(len(text) == tokens.shape[1] for text in texts):
        return {"tokens": tokens}
    there = [torch.ones(len(text), dtype=torch.bool, device=text.device) for text in texts]
    return {"tokens": tokens, "mask": pad_sequence(there, batch_first=True)}


def rescaled(told: Tensor, untold: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance [B, C, H, W] whose tokens are as long as those of the told prediction."""
    guided, plain = _diffusers.packed(classifier_free(told, untold, guidance)), _diffusers.packed(told)
    lengths = plain.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    return _diffusers.unpacked(guided * lengths, *told.shape[-2:])


def schedule(scheduler: Any, shape: tuple[int, int, int]) -> Callable[[int], Tensor]:
    """The family's sigmas for latents [C, h, w]. One step goes all the way: the scheduler, which stretches the others
    to end at `shift_terminal`, would divide 0 by 0."""
    several = _diffusers.sigmas_with(scheduler, _diffusers.mu_of(scheduler, shape[1] * shape[2] // 4))
    return lambda steps: several(steps) if steps > 1 else torch.tensor([1.0, 0.0])


def moments(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [1, C, 1, 1, 1] of the latents, as an AutoencoderKLQwenImage has them configured."""
    columns = (torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std))
    mean, std = (column.view(1, -1, 1, 1, 1).to(vae.device, vae.dtype) for column in columns)
    return mean, std


def decode_with(vae: Any) -> Callable[[Tensor], Tensor]:
    """Latents [N, C, h, w] -> pictures [N, 3, H, W] in 0..1, fp32. The gradient flows through."""
    mean, std = moments(vae)

    def decode(latents: Tensor) -> Tensor:
        codes = latents.to(vae.device, vae.dtype).unsqueeze(2) * std + mean  # [N, C, 1, h, w]: one frame
        pictures: Tensor = vae.decode(codes, return_dict=False)[0][:, :, 0]
        return (pictures.float() * 0.5 + 0.5).clamp(0, 1)

    return decode


def encode_with(vae: Any) -> Callable[[Tensor], Tensor]:
    """Pictures [N, 3, H, W] in 0..1 -> latents [N, C, h, w] fp32: the mode of the autoencoder's distribution."""
    mean, std = moments(vae)

    @torch.no_grad()
    def encode(pictures: Tensor) -> Tensor:
        pixels = (2 * pictures - 1).to(vae.device, vae.dtype).unsqueeze(2)  # [N, 3, 1, H, W]
        codes: Tensor = vae.encode(pixels).latent_dist.mode()
        return ((codes - mean) / std).squeeze(2).float()

    return encode


@dataclass(frozen=True)
class QwenImage:
    """Qwen-Image: 20 B parameters, long texts in pictures, English and Chinese."""

    kind = "flow"
    tasks = ("t2i",)
    pipelines = ("QwenImagePipeline",)
    licence = "Apache-2.0"
    parameters = "20 B, and 7 B of text encoder"
    paper = "arXiv 2508.02324"

    path: str = "Qwen/Qwen-Image"  # a hub name or a diffusers folder; or Qwen/Qwen-Image-2512
    revision: str | None = None  # of the hub repository
    size: tuple[int, int] = (1024, 1024)  # height and width in pixels
    max_tokens: int = 512  # of a prompt, without its chat

    def __post_init__(self) -> None:
        _diffusers.check_size(self.size, 16)
        check_tokens(self.max_tokens)

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The network and its frozen neighbours. The autoencoder stays in fp32."""
        from diffusers import (
            AutoencoderKLQwenImage,
            FlowMatchEulerDiscreteScheduler,
            QwenImagePipeline,
            QwenImageTransformer2DModel,
        )
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

        parts = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
        folder = _diffusers.opened(self.path, self.revision, self.pipelines, parts)
        tokenizer = folder.plain("tokenizer", Qwen2Tokenizer)
        scheduler = folder.plain("scheduler", FlowMatchEulerDiscreteScheduler)
        vae = folder.frozen("vae", AutoencoderKLQwenImage, device, torch.float32)
        text_encoder = folder.frozen("text_encoder", Qwen2_5_VLForConditionalGeneration, device, dtype)
        net = folder.net("transformer", QwenImageTransformer2DModel, device, dtype)
        factor = vae.spatial_compression_ratio
        targets = _diffusers.present(net, TARGETS)  # while it has no adapters

        @torch.no_grad()
        def encode(prompts: Sequence[Prompt]) -> list[Condition]:
            encoded: list[Condition] = []
            for prompt in prompts:  # one by one: a text is then not padded
                read = tokenizer(
                    CHAT.format(prompt.text), truncation=True, max_length=AHEAD + self.max_tokens, return_tensors="pt"
                ).to(text_encoder.device)
                states = text_encoder(**read, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
                encoded.append({"tokens": states[0, AHEAD:].to(device, dtype)})
            return encoded

        def pipeline(prompts: Sequence[Prompt], noise: Tensor, steps: int, guidance: float, negative: str) -> Tensor:
            own = type(scheduler).from_config(scheduler.config)  # a schedule is part of a scheduler
            height, width = (factor * side for side in noise.shape[2:])
            return _diffusers.drawn(
                QwenImagePipeline(own, vae, text_encoder, tokenizer, net),
                prompt=[prompt.text for prompt in prompts],
                negative_prompt=[negative for _ in prompts] if guidance > 1 else None,
                height=height,
                width=width,
                num_inference_steps=steps,
                true_cfg_scale=guidance,
                latents=_diffusers.packed(noise.to(device)),
                max_sequence_length=self.max_tokens,
            )

        def at(size: tuple[int, int]) -> FlowModel:
            shape = _diffusers.latent_shape(vae.config.z_dim, replace(self, size=size).size, factor, 2 * factor)
            return FlowModel(
                net=net,
                velocity=velocity,
                encode=encode,
                decode=decode_with(vae),
                sigmas=schedule(scheduler, shape),
                latent_shape=shape,
                lora_targets=targets,
                unread=lambda text: _diffusers.cut_words(tokenizer, text, self.max_tokens),
                encode_media=encode_with(vae),
                collate=collate,
                guide=rescaled,
                tasks=self.tasks,
                encoders=(text_encoder,),
                at=at,
                pipeline=pipeline,
            )

        return at(self.size)
