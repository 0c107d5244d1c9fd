"""FLUX.1 (Black Forest Labs, 2024): a 12 B rectified-flow transformer, with guidance distilled into it (dev) or none.

Conventions: the network's time is sigma itself (it multiplies by 1000 inside) and it answers with noise - data. Latents
have 16 channels, each pixel of theirs being 8 x 8; `velocity` packs 2x2 of them into one token. T5 gives the tokens,
always `max_tokens` of them, padding included and attended to, as in training; CLIP gives one pooled vector. The
schedule is even and shifted by a number that grows with the count of tokens (dev) or not shifted (schnell).

Two things are called guidance. `guidance` here is a number that the network is told, which costs nothing; schnell has
no ear for it. A policy's guidance is classifier-free, against a negative prompt; diffusers says `true_cfg_scale`.

Differences from diffusers' pipeline: image adapters are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from rlkit.backbones import _diffusers as shared
from rlkit.types import Condition, FlowModel, Prompt

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
WORDS = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
LONGEST = 512  # tokens of T5 that the pipeline takes


def velocity(guidance: float | None, net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """v [B, C, H, W]. guidance: what the network is told; None where it has no ear for it."""
    height, width = x.shape[-2:]
    output: Tensor = net(
        hidden_states=shared.packed(x),
        timestep=sigma,
        guidance=None if guidance is None else torch.full_like(sigma, guidance),
        encoder_hidden_states=cond["tokens"],
        pooled_projections=cond["pooled"],
        txt_ids=torch.zeros(cond["tokens"].shape[1], 3, device=x.device),
        img_ids=shared.grid_ids(height // 2, width // 2).to(x.device),
        return_dict=False,
    )[0]
    return shared.unpacked(output, height, width)


@dataclass(frozen=True)
class Flux:
    """FLUX.1 dev, schnell and their kin: text to image, by a guidance-distilled transformer."""

    kind = "flow"
    pipelines = ("FluxPipeline",)
    tasks = ("t2i",)
    paper = ""
    licence = "FLUX.1 [dev] Non-Commercial License; schnell: Apache-2.0"
    parameters = "12 B"
    source = "https://huggingface.co/black-forest-labs/FLUX.1-dev"

    path: str = "black-forest-labs/FLUX.1-dev"  # a hub name, or a diffusers folder
    revision: str | None = None  # of the hub repository; None: its newest
    size: tuple[int, int] = (512, 512)  # height and width in pixels
    max_tokens: int = 512  # of T5; a longer prompt is cut. schnell was trained with 256
    guidance: float = 3.5  # that the network is told; apart from the policy's guidance

    def __post_init__(self) -> None:
        shared.check_size(self.size, 16)
        if not 1 <= self.max_tokens <= LONGEST:
            raise ValueError(f"max_tokens must be within 1..{LONGEST}, not {self.max_tokens}")

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The text encoders take `dtype`; the autoencoder stays in fp32."""
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        words = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
        folder = shared.opened(self.path, self.revision, self.pipelines, ["transformer", "vae", "scheduler", *words])
        net = folder.net("transformer", FluxTransformer2DModel, device, dtype)
        vae = folder.frozen("vae", AutoencoderKL, device, torch.float32)
        scheduler = folder.plain("scheduler", FlowMatchEulerDiscreteScheduler)
        clip = folder.frozen("text_encoder", CLIPTextModel, device, dtype)
        clip_tokenizer = folder.plain("tokenizer", CLIPTokenizer)
        t5 = folder.frozen("text_encoder_2", T5EncoderModel, device, dtype)
        t5_tokenizer = folder.plain("tokenizer_2", T5TokenizerFast)
        factor = shared.vae_factor(vae)

        @torch.no_grad()
        def encode(prompts: Sequence[Prompt]) -> list[Condition]:
            texts = [prompt.text for prompt in prompts]
            tokens = shared.t5_states(t5, t5_tokenizer, texts, self.max_tokens).to(device, dtype)
            ids = clip_tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            pooled = clip(ids.to(clip.device)).pooler_output.to(device, dtype)
            return [{"tokens": t, "pooled": p} for t, p in zip(tokens, pooled, strict=True)]

        targets = shared.present(net, (*ATTENTION, *WORDS, *FEED_FORWARD))  # while it has no adapters

        def at(size: tuple[int, int]) -> FlowModel:
            here = replace(self, size=size)  # refuses one that does not fit
            shape = shared.latent_shape(net.config.in_channels // 4, size, factor, 2 * factor)
            mu = shared.mu_of(scheduler, shape[1] * shape[2] // 4)

            def pipeline(
                prompts: Sequence[Prompt], noise: Tensor, steps: int, guidance: float, negative: str
            ) -> Tensor:
                return shared.drawn(
                    FluxPipeline(scheduler, vae, clip, clip_tokenizer, t5, t5_tokenizer, net),
                    prompt=[prompt.text for prompt in prompts],
                    negative_prompt=[negative] * len(prompts),
                    true_cfg_scale=guidance,
                    guidance_scale=self.guidance,
                    latents=shared.packed(noise),
                    height=here.size[0],
                    width=here.size[1],
                    num_inference_steps=steps,
                    max_sequence_length=self.max_tokens,
                )

            return FlowModel(
                net=net,
                velocity=partial(velocity, self.guidance if net.config.guidance_embeds else None),
                encode=encode,
                decode=shared.decode_with(vae),
                sigmas=shared.sigmas_with(scheduler, mu),
                latent_shape=shape,
                lora_targets=targets,
                unread=lambda text: shared.cut_words(t5_tokenizer, text, self.max_tokens),
                encode_media=shared.encode_with(vae),
                tasks=self.tasks,
                encoders=(clip, t5),
                at=at,
                pipeline=pipeline,
            )

        return at(self.size)
