"""FLUX.1 Kontext (arXiv 2506.15742): FLUX.1 dev that reads a source picture and edits it by instruction.

The tokens of the source stand behind those of the latents, and the first of their three positions is 1 in the place of
0. All else is FLUX.1's: time sigma, noise - data, 2x2 patches, T5 and CLIP, an even schedule that is shifted by the
number of tokens drawn, guidance that the network is told (`guidance`), and a policy's own, which is classifier-free.
Without a source it draws from words alone.

Differences from diffusers' pipeline: each picture drawn has exactly the recipe's size, where the pipeline brings it to
about a megapixel unless told not to; and image adapters are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlkit.backbones import _diffusers as shared
from rlkit.backbones import _pictures, flux
from rlkit.types import Condition, FlowModel, Prompt, stacked


def velocity(guidance: float | None, net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """v [B, C, H, W]. guidance: what the network is told; None where it has no ear for it."""
    height, width = x.shape[-2:]
    drawn = shared.packed(x.to(cond["tokens"].dtype))  # [B, T, 4C]
    own = shared.grid_ids(height // 2, width // 2)

    def rows(part: Any, at: Tensor, grids: _pictures.Grids) -> Tensor:
        places = at.to(x.device)
        ids = torch.cat([own, *(shared.grid_ids(*grid, first=1) for grid in grids)]).to(x.device)
        times = sigma[places]
        answer: Tensor = net(
            hidden_states=torch.cat([drawn[places], part["pictures"]], dim=1),
            timestep=times,
            guidance=None if guidance is None else torch.full_like(times, guidance),
            encoder_hidden_states=part["tokens"],
            pooled_projections=part["pooled"],
            txt_ids=torch.zeros(part["tokens"].shape[1], 3, device=x.device),
            img_ids=ids,
            return_dict=False,
        )[0]
        return answer[:, : drawn.shape[1]]

    return shared.unpacked(_pictures.by_grids(cond, rows), height, width).to(x.dtype)


def collate(conditions: Sequence[Condition]) -> Condition:
    words = [{name: one[name] for name in ("tokens", "pooled")} for one in conditions]
    return {**stacked(words), **_pictures.collate(conditions)}


@dataclass(frozen=True)
class FluxKontext:
    """FLUX.1 Kontext: edits a picture by instruction, 12 B parameters."""

    kind = "flow"
    pipelines = ("FluxKontextPipeline",)
    tasks = ("edit", "t2i")
    licence = "FLUX.1 [dev] Non-Commercial License"
    parameters = "12 B"
    paper = "arXiv 2506.15742"
    source = "https://huggingface.co/black-forest-labs/FLUX.1-Kontext-dev"

    path: str = "black-forest-labs/FLUX.1-Kontext-dev"  # a hub name, or a diffusers folder
    revision: str | None = None  # of the hub repository; None: its newest
    size: tuple[int, int] = (1024, 1024)  # height and width in pixels of what is drawn
    resize_source: bool = True  # to a size of training, about a megapixel, nearest in shape; false: as it is
    max_tokens: int = 512  # of T5; a longer prompt is cut
    guidance: float = 3.5  # that the network is told; apart from the policy's guidance

    def __post_init__(self) -> None:
        shared.check_size(self.size, 16)
        if not 1 <= self.max_tokens <= flux.LONGEST:
            raise ValueError(f"max_tokens must be within 1..{flux.LONGEST}, not {self.max_tokens}")

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The text encoders take `dtype`; the autoencoder stays in fp32."""
        from diffusers import (
            AutoencoderKL,
            FlowMatchEulerDiscreteScheduler,
            FluxKontextPipeline,
            FluxTransformer2DModel,
        )
        from diffusers.image_processor import VaeImageProcessor
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
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
        resizer = VaeImageProcessor(vae_scale_factor=2 * factor)
        encode_media = shared.encode_with(vae)

        def pixels(picture: Any) -> Tensor:
            """A PIL picture as the network is to see it: [1, 3, H, W] in 0..1."""
            height, width = resizer.get_default_height_width(picture)  # multiples of a token's side
            if self.resize_source:
                ratio, multiple = width / height, 2 * factor
                _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
                width, height = width // multiple * multiple, height // multiple * multiple
            resized: Tensor = resizer.preprocess(picture, height, width)
            return resized * 0.5 + 0.5

        @torch.no_grad()
        def encode(prompts: Sequence[Prompt]) -> list[Condition]:
            texts = [prompt.text for prompt in prompts]
            tokens = shared.t5_states(t5, t5_tokenizer, texts, self.max_tokens).to(device, dtype)
            ids = clip_tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            pooled = clip(ids.to(clip.device)).pooler_output.to(device, dtype)
            encoded: list[Condition] = []
            for prompt, words, vector in zip(prompts, tokens, pooled, strict=True):
                latents = [encode_media(pixels(one)).to(dtype) for one in _pictures.of_prompt(prompt, 0, 1)]
                beside = _pictures.columns(latents, shared.packed, words.new_zeros(0, net.config.in_channels))
                encoded.append({"tokens": words, "pooled": vector, **beside})
            return encoded

        targets = shared.present(net, (*flux.ATTENTION, *flux.WORDS, *flux.FEED_FORWARD))  # while it has no adapters

        def at(size: tuple[int, int]) -> FlowModel:
            here = replace(self, size=size)  # refuses one that does not fit
            shape = shared.latent_shape(net.config.in_channels // 4, size, factor, 2 * factor)
            mu = shared.mu_of(scheduler, shape[1] * shape[2] // 4)

            def pipeline(
                prompts: Sequence[Prompt], noise: Tensor, steps: int, guidance: float, negative: str
            ) -> Tensor:
                whole = FluxKontextPipeline(scheduler, vae, clip, clip_tokenizer, t5, t5_tokenizer, net)
                pictures = [
                    shared.drawn(
                        whole,
                        image=next(iter(_pictures.of_prompt(prompt, 0, 1)), None),
                        prompt=prompt.text,
                        negative_prompt=negative,
                        true_cfg_scale=guidance,
                        guidance_scale=self.guidance,
                        latents=shared.packed(one[None].to(device)),
                        height=here.size[0],
                        width=here.size[1],
                        max_area=here.size[0] * here.size[1],
                        num_inference_steps=steps,
                        max_sequence_length=self.max_tokens,
                        _auto_resize=self.resize_source,
                    )
                    for prompt, one in zip(prompts, noise, strict=True)  # pictures may differ in size
                ]
                return torch.cat(pictures)

            return FlowModel(
                net=net,
                velocity=partial(velocity, self.guidance if net.config.guidance_embeds else None),
                encode=encode,
                decode=shared.decode_with(vae),
                sigmas=shared.sigmas_with(scheduler, mu),
                latent_shape=shape,
                lora_targets=targets,
                unread=lambda text: shared.cut_words(t5_tokenizer, text, self.max_tokens),
                encode_media=encode_media,
                collate=collate,
                tasks=self.tasks,
                encoders=(clip, t5),
                at=at,
                pipeline=pipeline,
            )

        return at(self.size)
