"""Stable Diffusion XL (arXiv 2307.01952): a U-Net that predicts noise, as a flow that every flow algorithm can train.

Such a network was trained on x = sqrt(a) data + sqrt(1 - a) noise, at 1000 levels a. Divided by sqrt(a) + sqrt(1 - a)
that is a state of the flow, (1 - sigma) data + sigma noise with sigma = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)); with its
predicted noise e the flow's velocity, noise - data, is (e - x) / (1 - sigma). An Euler step along it is DDIM's step
(arXiv 2010.02502), and Euler's in the variance-exploding form, whose sigma is s = sigma / (1 - sigma). The network is
asked at the nearest of its 1000 times. Latents have 4 channels, each pixel of theirs being 8 x 8.

Its noisiest level is sigma 0.936, where sampling begins: it has never seen noise alone. A state above that level is
read as one of it. Two CLIP encoders give 77 tokens, the second one's pooled vector too; with them the network is told
the picture's size. Where the checkpoint says so, an empty prompt is zeros. Guidance is classifier-free.

Differences from diffusers' pipeline: the times are spaced from the last one down ("trailing"), not from 1 up, so that
few steps begin at the noisiest level too. Guidance rescaling, the refiner and the watermark are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlkit.backbones import _diffusers as shared
from rlkit.errors import RecipeError
from rlkit.types import Condition, FlowModel, Prompt

LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def flow_levels(scheduler: Any) -> Tensor:
    """[1000] fp64, ascending: the flow's sigma at each time that the network was trained at."""
    kept = scheduler.alphas_cumprod.double().cpu()
    return (1 - kept).sqrt() / (kept.sqrt() + (1 - kept).sqrt())


def velocity(levels: Tensor, net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """v [B, C, H, W]. levels: what `flow_levels` gives."""
    levels = levels.to(sigma.device)
    time = (levels[None] - sigma[:, None].double()).abs().argmin(dim=1)
    above = sigma.reshape(-1, 1, 1, 1)
    level = above.clamp(max=float(levels[-1]))
    noise: Tensor = net(
        x / (above**2 + (1 - above) ** 2).sqrt(),  # variance 1, as the network knows it
        time,
        encoder_hidden_states=cond["tokens"],
        added_cond_kwargs={"text_embeds": cond["pooled"], "time_ids": cond["sizes"]},
        return_dict=False,
    )[0]
    # Above the last level the state is first brought to that level's variance.
    scale = ((level**2 + (1 - level) ** 2) / (above**2 + (1 - above) ** 2)).sqrt()
    clean = (x * scale - level * noise) / (1 - level)
    return torch.where(above <= level, (noise - x) / (1 - level), (x - clean) / above)


def sigmas(scheduler: Any, steps: int) -> Tensor:
    """[steps+1] fp32: the scheduler's sigmas s as the flow's, s / (1 + s)."""
    scheduler.set_timesteps(steps)
    exploding = scheduler.sigmas.double().cpu()
    return (exploding / (1 + exploding)).float()


@dataclass(frozen=True)
class SDXL:
    """Stable Diffusion XL: text to image, by a U-Net that predicts noise, trained here as a flow."""

    kind = "flow"
    pipelines = ("StableDiffusionXLPipeline",)
    tasks = ("t2i",)
    licence = "CreativeML Open RAIL++-M"
    parameters = "2.6 B"
    paper = "arXiv 2307.01952"
    source = "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0"

    path: str = "stabilityai/stable-diffusion-xl-base-1.0"  # a hub name, or a diffusers folder
    revision: str | None = None  # of the hub repository; None: its newest
    size: tuple[int, int] = (1024, 1024)  # height and width in pixels

    def __post_init__(self) -> None:
        shared.check_size(self.size, 8)

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The text encoders take `dtype`; the autoencoder stays in fp32, outside of which it overflows."""
        from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        texts = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
        folder = shared.opened(self.path, self.revision, self.pipelines, ["unet", "vae", "scheduler", *texts])
        net = folder.net("unet", UNet2DConditionModel, device, dtype)
        vae = folder.frozen("vae", AutoencoderKL, device, torch.float32)
        saved = folder.plain("scheduler", EulerDiscreteScheduler).config
        if saved.prediction_type != "epsilon":
            what = f"{self.path} predicts {saved.prediction_type!r}; only networks that predict noise are read"
            raise RecipeError(what, where=shared.WHERE)
        scheduler = EulerDiscreteScheduler.from_config(saved, timestep_spacing="trailing", use_karras_sigmas=False)
        levels = flow_levels(scheduler)
        tokenizers = [folder.plain(part, CLIPTokenizer) for part in ("tokenizer", "tokenizer_2")]
        first = folder.frozen("text_encoder", CLIPTextModel, device, dtype)
        second = folder.frozen("text_encoder_2", CLIPTextModelWithProjection, device, dtype)
        zeros = bool(folder.index.get("force_zeros_for_empty_prompt", True))

        @torch.no_grad()
        def words(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
            """Tokens [N, 77, D] and pooled vectors [N, P]."""
            states, _ = shared.clip_states(first, tokenizers[0], texts)
            more, pooled = shared.clip_states(second, tokenizers[1], texts)
            tokens, pooled = torch.cat([states.to(device), more.to(device)], dim=-1), pooled.to(device)
            kept = torch.tensor([bool(text) or not zeros for text in texts], device=device)
            return (tokens * kept[:, None, None]).to(dtype), (pooled * kept[:, None]).to(dtype)

        targets = shared.present(net, LAYERS)  # while it has no adapters

        def at(size: tuple[int, int]) -> FlowModel:
            here = replace(self, size=size)  # refuses one that does not fit
            shape = shared.latent_shape(net.config.in_channels, size, shared.vae_factor(vae))
            sizes = torch.tensor([*size, 0, 0, *size], device=device, dtype=dtype)  # original, corner, target

            def encode(prompts: Sequence[Prompt]) -> list[Condition]:
                pairs = zip(*words([prompt.text for prompt in prompts]), strict=True)
                return [{"tokens": t, "pooled": p, "sizes": sizes} for t, p in pairs]

            def pipeline(
                prompts: Sequence[Prompt], noise: Tensor, steps: int, guidance: float, negative: str
            ) -> Tensor:
                whole = StableDiffusionXLPipeline(
                    vae=vae,
                    text_encoder=first,
                    text_encoder_2=second,
                    tokenizer=tokenizers[0],
                    tokenizer_2=tokenizers[1],
                    unet=net,
                    scheduler=scheduler,
                    force_zeros_for_empty_prompt=zeros,
                    add_watermarker=False,
                )
                return shared.drawn(
                    whole,
                    prompt=[prompt.text for prompt in prompts],
                    negative_prompt=[negative] * len(prompts) if negative else None,
                    latents=noise,
                    height=here.size[0],
                    width=here.size[1],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                )

            return FlowModel(
                net=net,
                velocity=partial(velocity, levels),
                encode=encode,
                decode=shared.decode_with(vae),
                sigmas=partial(sigmas, scheduler),
                latent_shape=shape,
                lora_targets=targets,
                unread=lambda text: shared.cut_words(tokenizers[0], text, tokenizers[0].model_max_length),
                encode_media=shared.encode_with(vae),
                tasks=self.tasks,
                start=float(levels[-1]),
                encoders=(first, second),
                at=at,
                pipeline=pipeline,
            )

        return at(self.size)
