"""FLUX.2 (Black Forest Labs, 2025): rectified-flow transformers that draw from words, a source and several references.

Two families, told apart by the checkpoint: dev, 32 B, which reads three layers of Mistral Small 3.2 and is told its
guidance; and klein, 4 B and 9 B, which reads three layers of Qwen3. Conventions of both: the network's time is sigma
(it multiplies by 1000 inside), it answers with noise - data, and a token is one pixel of a latent: 2 x 2 pixels of the
autoencoder's codes made one, and brought to mean 0 and deviation 1 by the statistics of its batch norm. Texts are
always `max_tokens` long, padding included and attended to, as in training. Positions have four axes: a picture's number
(10, 20, ..., and 0 for what is drawn), row, column, and place in the text. The schedule's shift depends on the number
of tokens drawn and on that of steps.

Guidance: dev is told a number (`guidance`). A policy's guidance is classifier-free; klein's base checkpoints were made
for it. The other klein checkpoints are distilled to do without, and refuse it.

Differences from diffusers' pipelines: each picture drawn has the recipe's size, whatever that of its source is; the
area that pictures are brought down to can be chosen; klein's negative prompt need not be empty; dev's pipeline has no
classifier-free guidance. Prompts are not rewritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlkit.backbones import _diffusers as shared
from rlkit.backbones import _flux2, _pictures
from rlkit.errors import DataError, RecipeError
from rlkit.types import Condition, FlowModel, Prompt, classifier_free, stacked

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
WORDS = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
LONGEST = 512  # tokens of a prompt with its chat that the networks were trained with
LARGEST = 1024 * 1024  # pixels of a picture that the pipelines let pass


def positions(picture: int, height: int, width: int) -> Tensor:
    """[height * width, 4]: (picture, row, column, 0)."""
    return functional.pad(shared.grid_ids(height, width, picture), (0, 1))


def velocity(guidance: float | None, net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """v [B, C, H, W]. guidance: what the network is told; None where it has no ear for it."""
    drawn = _flux2.tokens_of(x.to(cond["tokens"].dtype))  # [B, T, C]
    own = positions(0, *x.shape[-2:])

    def rows(part: Any, at: Tensor, grids: _pictures.Grids) -> Tensor:
        places = at.to(x.device)
        words, times = part["tokens"], sigma[places]
        order = functional.pad(torch.arange(words.shape[1]).float()[:, None], (3, 0))  # [L, 4]
        where = torch.cat([own, *(positions(10 * (i + 1), *grid) for i, grid in enumerate(grids))])
        answer: Tensor = net(
            hidden_states=torch.cat([drawn[places], part["pictures"]], dim=1),
            timestep=times,
            guidance=None if guidance is None else torch.full_like(times, guidance),
            encoder_hidden_states=words,
            txt_ids=order.to(x.device),
            img_ids=where.to(x.device),
            return_dict=False,
        )[0]
        return answer[:, : drawn.shape[1]]

    return _pictures.by_grids(cond, rows).transpose(1, 2).reshape(x.shape).to(x.dtype)


def collate(conditions: Sequence[Condition]) -> Condition:
    return {**stacked([{"tokens": one["tokens"]} for one in conditions]), **_pictures.collate(conditions)}


def no_guidance(told: Tensor, untold: Tensor, guidance: float) -> Tensor:
    what = f"this checkpoint is distilled to draw in few steps without guidance, and it is {guidance:g}"
    raise RecipeError(what, where="policy.guidance", hint="Leave it at 1, or train a base checkpoint.")


@dataclass(frozen=True)
class Flux2:
    """FLUX.2 dev and klein: draws from words, edits a source, and follows up to ten references."""

    kind = "flow"
    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline")
    tasks = ("t2i", "edit", "in_context")
    licence = "klein 4B: Apache-2.0; klein 9B and dev: FLUX Non-Commercial License"
    parameters = "4 B and 9 B (klein), 32 B (dev)"
    paper = ""
    source = "https://bfl.ai/blog/flux-2"

    path: str = "black-forest-labs/FLUX.2-klein-base-4B"  # a hub name, or a diffusers folder; or FLUX.2-dev
    revision: str | None = None  # of the hub repository; None: its newest
    size: tuple[int, int] = (1024, 1024)  # height and width in pixels of what is drawn
    picture_area: int = 1024 * 1024  # pixels that larger sources and references are brought down to
    max_pictures: int = 10  # that a prompt may have, its source among them
    max_tokens: int = 512  # of a prompt with its chat; a longer one is cut
    guidance: float = 4.0  # that dev is told; apart from the policy's guidance

    def __post_init__(self) -> None:
        shared.check_size(self.size, 16)
        if not 1 <= self.max_tokens <= LONGEST:
            raise ValueError(f"max_tokens must be within 1..{LONGEST}, not {self.max_tokens}")
        if not 64 * 64 <= self.picture_area <= LARGEST:
            raise ValueError(f"picture_area must be within {64 * 64}..{LARGEST} pixels, not {self.picture_area}")
        if self.max_pictures < 1:
            raise ValueError(f"max_pictures must be 1 or more, not {self.max_pictures}")

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The text encoder takes `dtype`; the autoencoder stays in fp32."""
        import diffusers
        from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        parts = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
        folder = shared.opened(self.path, self.revision, self.pipelines, parts)
        klein = folder.pipeline == _flux2.KLEIN
        distilled = klein and bool(folder.index.get("is_distilled", False))
        net = folder.net("transformer", diffusers.Flux2Transformer2DModel, device, dtype)
        vae = folder.frozen("vae", diffusers.AutoencoderKLFlux2, device, torch.float32)
        scheduler = folder.plain("scheduler", diffusers.FlowMatchEulerDiscreteScheduler)
        words = _flux2.Words.of(folder, self.max_tokens, device, dtype)
        factor = 2 * shared.vae_factor(vae)
        processor = Flux2ImageProcessor(vae_scale_factor=factor)
        encode_media = _flux2.encode_with(vae)
        told = self.guidance if net.config.guidance_embeds else None
        # By their whole names: the other blocks have lists, which LoRA cannot adapt, called attn.to_out.
        single = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(net.config.num_single_layers)]
        targets = shared.present(net, (*ATTENTION, *WORDS, "attn.to_qkv_mlp_proj", *single))  # while it has no adapters

        def pixels(prompt: Prompt) -> list[Tensor]:
            """A prompt's pictures as the network is to see them: [1, 3, H, W] in 0..1 each."""
            found = []
            for one in _pictures.of_prompt(prompt, 0, self.max_pictures):
                try:
                    processor.check_image_input(one)
                except ValueError as error:
                    raise DataError(str(error), where=f"prompt {prompt.id}") from error
                small = _flux2.brought_down(one, self.picture_area)
                width, height = (side // factor * factor for side in small.size)
                found.append(processor.preprocess(small, height=height, width=width, resize_mode="crop") * 0.5 + 0.5)
            return found

        @torch.no_grad()
        def encode(prompts: Sequence[Prompt]) -> list[Condition]:
            encoded: list[Condition] = []
            for prompt in prompts:
                tokens = words.states(prompt.text).to(device, dtype)
                latents = [encode_media(one).to(dtype) for one in pixels(prompt)]
                beside = _pictures.columns(latents, _flux2.tokens_of, tokens.new_zeros(0, net.config.in_channels), 1)
                encoded.append({"tokens": tokens, **beside})
            return encoded

        def pipeline(prompts: Sequence[Prompt], noise: Tensor, steps: int, guidance: float, negative: str) -> Tensor:
            if guidance != 1 and not klein:
                hint = "Compare without it: --guidance 1."
                raise RecipeError("diffusers' FLUX.2 dev has no classifier-free guidance", where="guidance", hint=hint)
            own = type(scheduler).from_config(scheduler.config)  # a schedule is part of a scheduler
            options: dict[str, Any] = {"guidance_scale": guidance if klein else self.guidance}
            whole = getattr(diffusers, folder.pipeline)(own, vae, words.text_encoder, words.tokenizer, net)
            if klein:
                whole.register_to_config(is_distilled=distilled)
                untold = whole.encode_prompt(negative, device, max_sequence_length=self.max_tokens)[0]
                options |= {"negative_prompt_embeds": untold}
            height, width = (factor * side for side in noise.shape[2:])
            pictures = []
            for prompt, one in zip(prompts, noise, strict=True):  # pictures may differ in size
                found = _pictures.of_prompt(prompt, 0, self.max_pictures)
                pictures.append(
                    shared.drawn(
                        whole,
                        image=[_flux2.brought_down(it, self.picture_area) for it in found] or None,
                        prompt=prompt.text,
                        latents=one[None].to(device),
                        height=height,
                        width=width,
                        num_inference_steps=steps,
                        max_sequence_length=self.max_tokens,
                        **options,
                    )
                )
            return torch.cat(pictures)

        def at(size: tuple[int, int]) -> FlowModel:
            shape = shared.latent_shape(net.config.in_channels, replace(self, size=size).size, factor)

            def sigmas(steps: int) -> Tensor:
                return shared.sigmas_with(scheduler, compute_empirical_mu(shape[1] * shape[2], steps))(steps)

            return FlowModel(
                net=net,
                velocity=partial(velocity, told),
                encode=encode,
                decode=_flux2.decode_with(vae),
                sigmas=sigmas,
                latent_shape=shape,
                lora_targets=targets,
                unread=words.unread,
                encode_media=encode_media,
                collate=collate,
                guide=no_guidance if distilled else classifier_free,
                tasks=self.tasks,
                encoders=(words.text_encoder,),
                at=at,
                pipeline=pipeline,
            )

        return at(self.size)
