"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer in which words and pixels attend to each other.

Conventions: rectified flow; the network's time is 1000 sigma and it answers with noise - data. Two CLIP encoders give
the pooled vector and, side by side, the first tokens; T5 gives the others, always `max_tokens` of them, padding
included and attended to, as in training. So no condition is longer than another. Latents have 16 channels, each pixel
of theirs being 8 x 8, and are cut into 2x2 patches inside the network. The schedule spaces its own steps and shifts
them by 3, so that the last one before 0 is near 0.009. Guidance is classifier-free.

Differences from diffusers' pipeline: skip-layer guidance and image adapters are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlkit.backbones import _diffusers as shared
from rlkit.errors import RecipeError
from rlkit.types import Condition, FlowModel, Prompt

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LONGEST = 512  # tokens of T5 that the pipeline takes


def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """v [B, C, H, W]."""
    output: Tensor = net(
        hidden_states=x,
        timestep=1000 * sigma,
        encoder_hidden_states=cond["tokens"],
        pooled_projections=cond["pooled"],
        return_dict=False,
    )[0]
    return output


@dataclass(frozen=True)
class SD3:
    """Stable Diffusion 3 and 3.5: text to image, by a multimodal diffusion transformer.

    Without T5 its tokens are zeros, which the networks were trained for: less memory, and long prompts are cut.
    """

    kind = "flow"
    pipelines = ("StableDiffusion3Pipeline",)
    tasks = ("t2i",)
    licence = "Stability AI Community License"
    parameters = "2.5 B (3.5 medium), 8.1 B (3.5 large)"
    paper = "arXiv 2403.03206"
    source = "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium"

    path: str = "stabilityai/stable-diffusion-3.5-medium"  # a hub name, or a diffusers folder
    revision: str | None = None  # of the hub repository; None: its newest
    size: tuple[int, int] = (512, 512)  # height and width in pixels
    max_tokens: int = 256  # of T5; a longer prompt is cut
    t5: bool = True  # false: zeros in its place

    def __post_init__(self) -> None:
        shared.check_size(self.size, 16)
        if not 1 <= self.max_tokens <= LONGEST:
            raise ValueError(f"max_tokens must be within 1..{LONGEST}, not {self.max_tokens}")

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The text encoders take `dtype`; the autoencoder stays in fp32."""
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
        from diffusers import StableDiffusion3Pipeline as Pipeline
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        clips, third = ("", "_2"), ("_3",) if self.t5 else ()
        words = [f"{part}{end}" for end in (*clips, *third) for part in ("text_encoder", "tokenizer")]
        folder = shared.opened(self.path, self.revision, self.pipelines, ["transformer", "vae", "scheduler", *words])
        net = folder.net("transformer", SD3Transformer2DModel, device, dtype)
        vae = folder.frozen("vae", AutoencoderKL, device, torch.float32)
        scheduler = folder.plain("scheduler", FlowMatchEulerDiscreteScheduler)
        tokenizers = [folder.plain(f"tokenizer{end}", CLIPTokenizer) for end in clips]
        encoders = [folder.frozen(f"text_encoder{end}", CLIPTextModelWithProjection, device, dtype) for end in clips]
        t5 = t5_tokenizer = None
        if self.t5 and folder.has("text_encoder_3"):
            t5 = folder.frozen("text_encoder_3", T5EncoderModel, device, dtype)
            t5_tokenizer = folder.plain("tokenizer_3", T5TokenizerFast)
        width = net.config.joint_attention_dim
        patch = shared.vae_factor(vae) * net.config.patch_size
        largest = net.config.pos_embed_max_size * patch

        @torch.no_grad()
        def encode(prompts: Sequence[Prompt]) -> list[Condition]:
            texts = [prompt.text for prompt in prompts]
            pairs = [shared.clip_states(one, words, texts) for one, words in zip(encoders, tokenizers, strict=True)]
            first = torch.cat([states.to(device) for states, _ in pairs], dim=-1)  # [N, 77, D1 + D2]
            rest = torch.zeros(len(texts), self.max_tokens, width, device=device, dtype=dtype)
            if t5 is not None and t5_tokenizer is not None:
                rest = shared.t5_states(t5, t5_tokenizer, texts, self.max_tokens).to(device)
            tokens = torch.cat([functional.pad(first, (0, width - first.shape[-1])), rest], dim=1).to(dtype)
            pooled = torch.cat([vector for _, vector in pairs], dim=-1).to(device, dtype)
            return [{"tokens": t, "pooled": p} for t, p in zip(tokens, pooled, strict=True)]

        def unread(text: str) -> list[str]:
            """What no encoder reads."""
            if t5_tokenizer is not None:
                return shared.cut_words(t5_tokenizer, text, self.max_tokens)
            return shared.cut_words(tokenizers[0], text, tokenizers[0].model_max_length)

        targets = shared.present(net, LAYERS)  # while it has no adapters

        def at(size: tuple[int, int]) -> FlowModel:
            here = replace(self, size=size)  # refuses one that does not fit
            shape = shared.latent_shape(net.config.in_channels, size, shared.vae_factor(vae), patch)
            if max(size) > largest:
                what = f"this checkpoint draws at most {largest} pixels a side"
                raise RecipeError(what, where="policy.backbone.size")
            mu = shared.mu_of(scheduler, (shape[1] * shape[2]) // net.config.patch_size**2, largest=1.16)

            def pipeline(
                prompts: Sequence[Prompt], noise: Tensor, steps: int, guidance: float, negative: str
            ) -> Tensor:
                whole = Pipeline(
                    net, scheduler, vae, encoders[0], tokenizers[0], encoders[1], tokenizers[1], t5, t5_tokenizer
                )
                return shared.drawn(
                    whole,
                    prompt=[prompt.text for prompt in prompts],
                    negative_prompt=[negative] * len(prompts),
                    latents=noise,
                    height=here.size[0],
                    width=here.size[1],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    max_sequence_length=self.max_tokens,
                )

            return FlowModel(
                net=net,
                velocity=velocity,
                encode=encode,
                decode=shared.decode_with(vae),
                sigmas=shared.sigmas_with(scheduler, mu, even=False),
                latent_shape=shape,
                lora_targets=targets,
                unread=unread,
                encode_media=shared.encode_with(vae),
                tasks=self.tasks,
                encoders=(*encoders, *([] if t5 is None else [t5])),
                at=at,
                pipeline=pipeline,
            )

        return at(self.size)
