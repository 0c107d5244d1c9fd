"""Lumina-Image 2.0 (arXiv 2503.21758): a 2.6 B single-stream transformer behind Gemma 2's last hidden state but one.

Conventions of the network: its time is 1 - sigma, and it predicts data - noise. It cuts 2x2 patches itself and puts the
words that `mask` keeps ahead of the picture, so that a row does not depend on what its text is padded with. Guidance is
classifier-free, each row of the latents' pixels then scaled to its norm without guidance, as the pipeline does by
default.

A prompt follows a system prompt. The pipeline leaves it out of the negative text; an encoder is not told which text is
the negative one, so it is left out for the empty text alone, which is the usual one. The pipeline's end of guidance
late in the schedule (`cfg_trunc_ratio`), off by default, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlkit.backbones import _diffusers as shared
from rlkit.errors import RecipeError
from rlkit.types import Condition, FlowModel, Prompt, classifier_free

SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts."
)
LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"),
)


def asked(text: str) -> str:
    """A prompt as the text encoder reads it."""
    return f"{SYSTEM} <Prompt Start> {text}" if text else ""


def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """v [B, C, H, W] for x [B, C, H, W], tokens [B, L, D] and mask [B, L]."""
    answer: Tensor = net(
        hidden_states=x.to(cond["tokens"].dtype),
        timestep=1 - sigma,
        encoder_hidden_states=cond["tokens"],
        encoder_attention_mask=cond["mask"],
        return_dict=False,
    )[0]
    return -answer.to(x.dtype)


def collate(conditions: Sequence[Condition]) -> Condition:
    """Texts of different lengths as tokens [B, L, D] and mask [B, L]."""
    texts = [one["tokens"] for one in conditions]
    there = [torch.ones(len(text), dtype=torch.int64, device=text.device) for text in texts]
    return {"tokens": pad_sequence(texts, batch_first=True), "mask": pad_sequence(there, batch_first=True)}


def guide(told: Tensor, untold: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance at the norm of the told velocity, row by row of pixels. [B, C, H, W]"""
    guided = classifier_free(told, untold, guidance)
    return guided * (told.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


@dataclass(frozen=True)
class Lumina2:
    """Lumina-Image 2.0: text to image with 2.6 B parameters."""

    kind = "flow"
    tasks = ("t2i",)
    pipelines = ("Lumina2Pipeline", "Lumina2Text2ImgPipeline")  # the second is the first one's older name
    licence = "Apache-2.0"
    parameters = "2.6 B, and 2.6 B of text encoder"
    paper = "arXiv 2503.21758"
    source = "https://huggingface.co/Alpha-VLLM/Lumina-Image-2.0"

    path: str = "Alpha-VLLM/Lumina-Image-2.0"  # a hub name, or a diffusers folder
    revision: str | None = None  # of the hub repository; None: its newest
    size: tuple[int, int] = (1024, 1024)  # height and width in pixels
    max_tokens: int = 256  # of a prompt with the system prompt; a longer one is cut

    def __post_init__(self) -> None:
        shared.check_size(self.size, 16)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, not {self.max_tokens}")

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The text encoder takes `dtype`; the autoencoder stays in fp32."""
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
        from transformers import Gemma2Model, GemmaTokenizer

        parts = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
        folder = shared.opened(self.path, self.revision, self.pipelines, parts)
        tokenizer = folder.plain("tokenizer", GemmaTokenizer)
        scheduler = folder.plain("scheduler", FlowMatchEulerDiscreteScheduler)
        vae = folder.frozen("vae", AutoencoderKL, device, torch.float32)
        text_encoder = folder.frozen("text_encoder", Gemma2Model, device, dtype)
        net = folder.net("transformer", Lumina2Transformer2DModel, device, dtype)
        factor = shared.vae_factor(vae)
        longest = net.config.axes_lens[0] - 1  # positions: the text's, and the picture's one
        if self.max_tokens > longest:
            raise RecipeError(f"max_tokens is {self.max_tokens}", where="policy.backbone", hint=f"At most {longest}.")

        @torch.no_grad()
        def encode(prompts: Sequence[Prompt]) -> list[Condition]:
            encoded: list[Condition] = []
            for prompt in prompts:  # one by one: a text is then not padded
                text = asked(prompt.text)
                ids = tokenizer(text, truncation=True, max_length=self.max_tokens, return_tensors="pt").input_ids
                states = text_encoder(input_ids=ids.to(text_encoder.device), output_hidden_states=True).hidden_states
                encoded.append({"tokens": states[-2][0].to(device, dtype)})
            return encoded

        def unread(text: str) -> list[str]:
            lost = shared.cut_words(tokenizer, asked(text), self.max_tokens)
            return lost[max(0, len(lost) - len(text.split())) :]  # those of the system prompt are no one's

        targets = shared.present(net, LAYERS)  # while it has no adapters

        def at(size: tuple[int, int]) -> FlowModel:
            here = replace(self, size=size)  # refuses one that does not fit
            shape = shared.latent_shape(net.config.in_channels, size, factor, 2 * factor)
            # The pipeline takes the number of channels for that of tokens. It matters where a schedule follows the
            # size, which the published one does not.
            mu = shared.mu_of(scheduler, shape[0])

            def pipeline(
                prompts: Sequence[Prompt], noise: Tensor, steps: int, guidance: float, negative: str
            ) -> Tensor:
                own = type(scheduler).from_config(scheduler.config)  # a schedule is part of a scheduler
                return shared.drawn(
                    Lumina2Pipeline(net, own, vae, text_encoder, tokenizer),
                    prompt=[prompt.text for prompt in prompts],
                    negative_prompt=[asked(negative)] * len(prompts),
                    height=here.size[0],
                    width=here.size[1],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    latents=noise.to(dtype),
                    max_sequence_length=self.max_tokens,
                )

            return FlowModel(
                net=net,
                velocity=velocity,
                encode=encode,
                decode=shared.decode_with(vae),
                sigmas=shared.sigmas_with(scheduler, mu),
                latent_shape=shape,
                lora_targets=targets,
                unread=unread,
                encode_media=shared.encode_with(vae),
                collate=collate,
                guide=guide,
                tasks=self.tasks,
                encoders=(text_encoder,),
                at=at,
                pipeline=pipeline,
            )

        return at(self.size)
