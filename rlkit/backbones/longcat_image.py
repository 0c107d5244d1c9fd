"""LongCat-Image (arXiv 2512.07584): a 6 B transformer of FLUX's kind that reads Qwen2.5-VL's last hidden state.

Conventions: rectified flow; the network is given sigma (it multiplies by 1000 itself) and answers with noise - data. It
takes packed latents, whose positions begin behind the text's. A text is always `max_tokens` tokens between its chat's
two ends, padding included and attended to, as in training: no condition is longer than another. What stands in
quotation marks is cut into single characters, so that it can be spelt. Guidance is classifier-free, each token then
scaled down to its norm without guidance where it is longer, as the pipeline does by default.

Differences from the pipeline: a prompt is used as it is, where the pipeline has Qwen2.5-VL rewrite it unless told
otherwise; and of several words like don't, which hold no quotation, each is kept (the pipeline repeats one).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlkit.backbones import _diffusers as shared
from rlkit.types import Condition, FlowModel, Prompt, classifier_free

BEFORE = (
    "<|im_start|>system\nAs an image captioning expert, generate a descriptive text prompt based on an image content, "
    "suitable for input to a text-to-image model.<|im_end|>\n<|im_start|>user\n"
)
BEHIND = "<|im_end|>\n<|im_start|>assistant\n"
PARTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
QUOTED = re.compile("|".join(f"{a}[^{a}{b}]*?{b}" for a, b in ("''", '""', "‘’", "“”")))


def pieces(text: str) -> Iterator[str]:
    """A text as its tokenizer is given it: whole, but for what is quoted, which comes in single characters."""
    plain = re.sub(r"([a-zA-Z]+)'([a-zA-Z]+)", "\\1\0\\2", text)  # the one of "don't" opens no quotation
    end = 0
    for found in QUOTED.finditer(plain):
        yield text[end : found.start()]
        yield from text[found.start() : found.end()]
        end = found.end()
    yield text[end:]


def tokens_of(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """(token ids, where in the text each ends)."""
    ids: list[int] = []
    ends: list[int] = []
    start = 0
    for piece in pieces(text):
        if piece:
            found = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            ids += found["input_ids"]
            ends += [start + end for _, end in found["offset_mapping"]]
        start += len(piece)
    return ids, ends


def chat(tokenizer: Any, before: str, text: str, longest: int) -> tuple[Tensor, Tensor]:
    """(ids [1, L], mask [1, L]) of a text of exactly `longest` tokens, cut or padded, in its chat."""
    ids = tokens_of(tokenizer, text)[0][:longest]
    filled = tokenizer.pad({"input_ids": [ids]}, max_length=longest, padding="max_length", return_tensors="pt")
    ends = [tokenizer(one, add_special_tokens=False, return_tensors="pt").input_ids for one in (before, BEHIND)]
    whole = torch.cat([ends[0], filled.input_ids.to(torch.int64), ends[1]], dim=1)
    mask = torch.cat([torch.ones_like(ends[0]), filled.attention_mask, torch.ones_like(ends[1])], dim=1)
    return whole, mask


def cut_words(tokenizer: Any, text: str, longest: int) -> list[str]:
    """The words of a text that are behind its first `longest` tokens, whole or in part."""
    ends = tokens_of(tokenizer, text)[1]
    if len(ends) <= longest:
        return []
    return [match.group() for match in re.finditer(r"\S+", text) if match.end() > ends[longest - 1]]


def positions(first: int, height: int, width: int, kind: int, device: torch.device) -> Tensor:
    """[height * width, 3] of a picture's tokens: its kind, then row and column, both from `first`."""
    ids = shared.grid_ids(height, width, kind)
    ids[:, 1:] += first
    return ids.to(device)


def text_positions(length: int, device: torch.device) -> Tensor:
    """[L, 3]: a token's place, twice."""
    places = torch.arange(length, dtype=torch.float32)
    return torch.stack([torch.zeros(length), places, places], dim=1).to(device)


def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """v [B, C, H, W] for x [B, C, H, W] and tokens [B, L, D]."""
    height, width = x.shape[-2:]
    text = cond["tokens"]
    answer: Tensor = net(
        hidden_states=shared.packed(x).to(text.dtype),
        timestep=1000 * sigma / 1000,  # the pipeline's rounding, which a sine 1000 times as quick would show
        encoder_hidden_states=text,
        txt_ids=text_positions(text.shape[1], x.device),
        img_ids=positions(text.shape[1], height // 2, width // 2, 1, x.device),
        return_dict=False,
    )[0]
    return shared.unpacked(answer, height, width).to(x.dtype)


def guide(told: Tensor, untold: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance, no token longer than it is without. [B, C, H, W]"""
    height, width = told.shape[-2:]
    guided = shared.packed(classifier_free(told, untold, guidance))  # [B, T, 4C]
    before, after = (one.norm(dim=-1, keepdim=True) for one in (shared.packed(told), guided))
    return shared.unpacked(guided * (before / (after + 1e-8)).clamp(0, 1), height, width)


@dataclass(frozen=True)
class LongCatImage:
    """LongCat-Image: text to image with 6 B parameters, in Chinese and English.

    What is to be spelt in the picture goes into quotation marks.
    """

    kind = "flow"
    tasks = ("t2i",)
    pipelines = ("LongCatImagePipeline",)
    licence = "Apache-2.0"
    parameters = "6 B, and 8 B of text encoder"
    paper = "arXiv 2512.07584"
    source = "https://huggingface.co/meituan-longcat/LongCat-Image"

    path: str = "meituan-longcat/LongCat-Image"  # a hub name (LongCat-Image-Dev is for training), or a diffusers folder
    revision: str | None = None  # of the hub repository; None: its newest
    size: tuple[int, int] = (1024, 1024)  # height and width in pixels
    max_tokens: int = 512  # of a prompt; a longer one is cut, and the network was trained with 512

    def __post_init__(self) -> None:
        shared.check_size(self.size, 16)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, not {self.max_tokens}")

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The text encoder takes `dtype`; the autoencoder stays in fp32."""
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, LongCatImagePipeline
        from diffusers import LongCatImageTransformer2DModel as Network
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

        folder = shared.opened(self.path, self.revision, self.pipelines, PARTS)
        scheduler = folder.plain("scheduler", FlowMatchEulerDiscreteScheduler)
        tokenizer = folder.plain("tokenizer", Qwen2Tokenizer)
        net = folder.net("transformer", Network, device, dtype)
        vae = folder.frozen("vae", AutoencoderKL, device, torch.float32)
        text_encoder = folder.frozen("text_encoder", Qwen2_5_VLForConditionalGeneration, device, dtype)
        factor = shared.vae_factor(vae)
        channels = net.config.in_channels // 4
        targets = shared.present(net, LAYERS)  # while it has no adapters
        ahead = len(tokenizer(BEFORE, add_special_tokens=False).input_ids)

        @torch.no_grad()
        def encode(prompts: Sequence[Prompt]) -> list[Condition]:
            encoded: list[Condition] = []
            for prompt in prompts:
                read = chat(tokenizer, BEFORE, prompt.text, self.max_tokens)
                ids, mask = (one.to(text_encoder.device) for one in read)
                states = text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
                encoded.append({"tokens": states[-1][0, ahead : ahead + self.max_tokens].to(device, dtype)})
            return encoded

        def pipeline(prompts: Sequence[Prompt], noise: Tensor, steps: int, guidance: float, negative: str) -> Tensor:
            own = type(scheduler).from_config(scheduler.config)  # a schedule is part of a scheduler
            processor: Any = None  # of the rewriting that is switched off
            whole = LongCatImagePipeline(own, vae, text_encoder, tokenizer, processor, net)
            whole.tokenizer_max_length = self.max_tokens
            height, width = (factor * side for side in noise.shape[2:])
            return shared.drawn(
                whole,
                prompt=[prompt.text for prompt in prompts],
                negative_prompt=[negative] * len(prompts),
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance,
                latents=shared.packed(noise),
                enable_prompt_rewrite=False,
            )

        def at(size: tuple[int, int]) -> FlowModel:
            shape = shared.latent_shape(channels, replace(self, size=size).size, factor, 2 * factor)
            return FlowModel(
                net=net,
                velocity=velocity,
                encode=encode,
                decode=shared.decode_with(vae),
                sigmas=shared.sigmas_with(scheduler, shared.mu_of(scheduler, shape[1] * shape[2] // 4)),
                latent_shape=shape,
                lora_targets=targets,
                unread=lambda text: cut_words(tokenizer, text, self.max_tokens),
                encode_media=shared.encode_with(vae),
                guide=guide,
                tasks=self.tasks,
                encoders=(text_encoder,),
                at=at,
                pipeline=pipeline,
            )

        return at(self.size)
