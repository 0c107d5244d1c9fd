"""Z-Image (arXiv 2511.22699): a 6 B single-stream transformer that reads Qwen3-4B's last hidden state but one.

Conventions of the network: its time is 1 - sigma, it predicts data - noise, and it takes lists of pictures and of
texts, each text as long as it is. It cuts 2x2 patches and pads itself, each text to a multiple of 32, so that a row
does not depend on its neighbours. Guidance: the pipeline adds `guidance_scale` times the difference to the told
prediction, so that its scale is rlkit's `guidance` minus 1; cutting guidance off late in the schedule
(`cfg_truncation`) and its norm (`cfg_normalization`), which the pipeline leaves off unless asked, are left out.
Z-Image-Turbo is distilled for guidance 1 and 8 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlkit.backbones import _diffusers as shared
from rlkit.errors import RecipeError
from rlkit.types import Condition, FlowModel, Prompt

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """v [B, C, H, W] for x [B, C, H, W] and tokens [B, L, D] of which `mask` [B, L] says which are there."""
    texts = [tokens[mask] for tokens, mask in zip(cond["tokens"], cond["mask"], strict=True)]
    pictures = list(x.to(cond["tokens"].dtype).unsqueeze(2).unbind(0))  # [C, 1, H, W] each: one frame
    answers: list[Tensor] = net(pictures, (1000 - 1000 * sigma) / 1000, texts, return_dict=False)[0]
    return -torch.stack(answers).squeeze(2).to(x.dtype)


def collate(conditions: Sequence[Condition]) -> Condition:
    """Texts of different lengths as tokens [B, L, D] and mask [B, L]."""
    texts = [one["tokens"] for one in conditions]
    there = [torch.ones(len(text), dtype=torch.bool, device=text.device) for text in texts]
    return {"tokens": pad_sequence(texts, batch_first=True), "mask": pad_sequence(there, batch_first=True)}


def asked(tokenizer: Any, text: str) -> str:
    """A prompt as the chat that the text encoder reads."""
    chat = [{"role": "user", "content": text}]
    whole: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    return whole


@dataclass(frozen=True)
class ZImage:
    """Z-Image and Z-Image-Turbo: 6 B parameters, bilingual text rendering."""

    kind = "flow"
    tasks = ("t2i",)
    pipelines = ("ZImagePipeline",)
    licence = "Apache-2.0"
    parameters = "6 B, and 4 B of text encoder"
    paper = "arXiv 2511.22699"
    source = "https://huggingface.co/Tongyi-MAI/Z-Image"

    path: str = "Tongyi-MAI/Z-Image"  # a hub name (there is also Tongyi-MAI/Z-Image-Turbo), or a diffusers folder
    revision: str | None = None  # of the hub repository; None: its newest
    size: tuple[int, int] = (1024, 1024)  # height and width in pixels
    max_tokens: int = 512  # of a prompt with its chat template; a longer one is cut

    def __post_init__(self) -> None:
        shared.check_size(self.size, 16)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, not {self.max_tokens}")

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The text encoder takes `dtype`; the autoencoder stays in fp32."""
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
        from transformers import Qwen2Tokenizer, Qwen3Model

        parts = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
        folder = shared.opened(self.path, self.revision, self.pipelines, parts)
        tokenizer = folder.plain("tokenizer", Qwen2Tokenizer)
        scheduler = folder.plain("scheduler", FlowMatchEulerDiscreteScheduler)
        vae = folder.frozen("vae", AutoencoderKL, device, torch.float32)
        factor = shared.vae_factor(vae)
        text_encoder = folder.frozen("text_encoder", Qwen3Model, device, dtype)
        net = folder.net("transformer", ZImageTransformer2DModel, device, dtype)
        longest = net.config.axes_lens[0] - 33  # positions: the text's, up to 31 of padding, the picture's one
        if self.max_tokens > longest:
            raise RecipeError(f"max_tokens is {self.max_tokens}", where="policy.backbone", hint=f"At most {longest}.")
        before = len(tokenizer(asked(tokenizer, "\0").split("\0")[0]).input_ids)  # the template ahead of the prompt

        @torch.no_grad()
        def encode(prompts: Sequence[Prompt]) -> list[Condition]:
            encoded: list[Condition] = []
            for prompt in prompts:  # one by one: a text is then not padded
                text = asked(tokenizer, prompt.text)
                ids = tokenizer(text, truncation=True, max_length=self.max_tokens, return_tensors="pt").input_ids
                states = text_encoder(input_ids=ids.to(text_encoder.device), output_hidden_states=True).hidden_states
                encoded.append({"tokens": states[-2][0].to(device, dtype)})
            return encoded

        targets = shared.present(net, LAYERS)  # while it has no adapters

        def at(size: tuple[int, int]) -> FlowModel:
            here = replace(self, size=size)  # refuses one that does not fit
            shape = shared.latent_shape(net.config.in_channels, size, factor, 2 * factor)
            mu = shared.mu_of(scheduler, (shape[1] // 2) * (shape[2] // 2))

            def pipeline(
                prompts: Sequence[Prompt], noise: Tensor, steps: int, guidance: float, negative: str
            ) -> Tensor:
                own = type(scheduler).from_config(scheduler.config)  # a schedule is part of a scheduler
                return shared.drawn(
                    ZImagePipeline(own, vae, text_encoder, tokenizer, net),
                    prompt=[prompt.text for prompt in prompts],
                    negative_prompt=[negative for _ in prompts],
                    height=here.size[0],
                    width=here.size[1],
                    num_inference_steps=steps,
                    guidance_scale=guidance - 1,
                    latents=noise,
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
                unread=lambda text: shared.cut_words(tokenizer, text, max(0, self.max_tokens - before)),
                encode_media=shared.encode_with(vae),
                collate=collate,
                tasks=self.tasks,
                encoders=(text_encoder,),
                at=at,
                pipeline=pipeline,
            )

        return at(self.size)
