"""OmniGen2 (arXiv 2506.18871): a 4 B transformer that draws, edits by instruction, and draws what pictures show.

Conventions of the network: its time is 1 - sigma, 0 for noise and 1 for data, and it predicts data - noise; the
authors' path is x = t data + (1 - t) noise, with d data - d noise as its target (`ICPlan` in omnigen2/transport/path.py
of github.com/VectorSpaceLab/OmniGen2), and their sampler steps from t = 0 to 1. It cuts 2x2 patches itself, channels
fastest. It reads the last hidden state of Qwen2.5-VL-3B, which is shown the words alone, in a chat; pictures reach it
as latents of FLUX.1's autoencoder. A source is the first picture, references follow, up to five in all. The schedule
is shifted by the size of the latents.

There is no pipeline in diffusers to compare with. Differences from the authors': guidance is classifier-free in the
words, the pictures staying in both halves, which is their formula at an image guidance of 1; they drop the pictures
there, and have a third pass for an image guidance above 1. Each picture drawn has the recipe's size, whatever that of
its source is. Pictures are the mode of the autoencoder's distribution, where they draw from it. A prompt that is too
long is cut inside its chat, which stays whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlkit.backbones import _diffusers, _omnigen2, _pictures
from rlkit.types import Condition, FlowModel, Prompt

CHAT = (
    "<|im_start|>system\nYou are a helpful assistant that generates high-quality images based on user instructions."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
)
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")  # they would stand for pictures
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # that the authors' LoRA recipe has
PARTS = ("transformer", "mllm", "processor", "vae", "scheduler")


def fitted(size: tuple[int, int], area: int, side: int, multiple: int = 16) -> tuple[int, int]:
    """(width, height) of a picture that is read: made smaller, never larger, to this area and longest side."""
    width, height = size
    ratio = min((area / (width * height)) ** 0.5, side / max(size), 1.0)
    wide, high = (max(1, int(one * ratio) // multiple) * multiple for one in (width, height))
    return wide, high


def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """v [B, C, H, W] for x [B, C, H, W], tokens [B, L, D] with their mask, and the pictures' tokens."""
    drawn = x.to(cond["tokens"].dtype)
    answer: Tensor = net(drawn, 1 - sigma, cond["tokens"], cond["mask"], cond["pictures"], cond["grids"])
    return -answer.to(x.dtype)


def collate(conditions: Sequence[Condition]) -> Condition:
    """Texts of different lengths as tokens [B, L, D] and mask [B, L], and the pictures."""
    texts = [one["tokens"] for one in conditions]
    there = [torch.ones(len(text), dtype=torch.bool, device=text.device) for text in texts]
    words = {"tokens": pad_sequence(texts, batch_first=True), "mask": pad_sequence(there, batch_first=True)}
    return {**words, **_pictures.collate(conditions)}


@dataclass(frozen=True)
class OmniGen2:
    """OmniGen2: text to image, editing by instruction, and subjects from up to five pictures, with 4 B parameters."""

    kind = "flow"
    tasks = ("t2i", "edit", "in_context")
    pipelines = ("OmniGen2Pipeline",)
    licence = "Apache-2.0"
    parameters = "4 B, and 3 B of text encoder"
    paper = "arXiv 2506.18871"
    source = "https://huggingface.co/OmniGen2/OmniGen2"

    path: str = "OmniGen2/OmniGen2"  # a hub name, or a folder of the authors' pipeline
    revision: str | None = None  # of the hub repository; None: its newest
    size: tuple[int, int] = (1024, 1024)  # height and width in pixels of what is drawn
    picture_area: int = 1024 * 1024  # pixels of each picture read, at most; fewer are quicker
    picture_side: int = 1024  # pixels of its longer side, at most
    max_tokens: int = 888  # of a prompt, without its chat; a longer one is cut

    def __post_init__(self) -> None:
        _diffusers.check_size(self.size, 16)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, not {self.max_tokens}")
        if self.picture_area < 16 * 16 or self.picture_side < 16:
            raise ValueError("picture_area must be 256 pixels (16 x 16) or more, and picture_side 16 or more")

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The network and its frozen neighbours. The autoencoder stays in fp32."""
        from diffusers import AutoencoderKL
        from diffusers.image_processor import VaeImageProcessor
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

        folder = _diffusers.opened(self.path, self.revision, self.pipelines, PARTS)
        tokenizer = folder.plain("processor", Qwen2Tokenizer)
        schedule = folder.plain("scheduler", _omnigen2.Schedule)
        vae = folder.frozen("vae", AutoencoderKL, device, torch.float32)
        text_encoder = folder.frozen("mllm", Qwen2_5_VLForConditionalGeneration, device, dtype)
        net = folder.net("transformer", _omnigen2.network(), device, dtype)
        factor, side = _diffusers.vae_factor(vae), net.config.patch_size
        channels = net.config.in_channels
        targets = _diffusers.present(net, LAYERS)  # while it has no adapters
        resizer = VaeImageProcessor(vae_scale_factor=side * factor)
        encode_media = _diffusers.encode_with(vae)
        empty = torch.zeros(0, side**2 * channels, device=device, dtype=dtype)

        def cut(text: str) -> str:
            """The prompt without what is behind its first `max_tokens` tokens, or would stand for a picture."""
            for mark in MARKS:
                text = text.replace(mark, "")
            places = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            return text if len(places) <= self.max_tokens else text[: places[self.max_tokens][0]]

        def seen(picture: Any) -> Tensor:
            """Latents [1, C, h, w] of a picture."""
            wide, high = fitted(picture.size, self.picture_area, self.picture_side, side * factor)
            return encode_media(resizer.preprocess(picture, high, wide) * 0.5 + 0.5).to(dtype)

        @torch.no_grad()
        def encode(prompts: Sequence[Prompt]) -> list[Condition]:
            encoded: list[Condition] = []
            for prompt in prompts:  # one by one: a text is then not padded
                latents = [seen(one) for one in _pictures.of_prompt(prompt, 0, _omnigen2.MOST)]
                beside = _pictures.columns(latents, lambda one: _omnigen2.patches(one, side), empty, side)
                ids = tokenizer(CHAT.format(cut(prompt.text)), return_tensors="pt").input_ids
                states = text_encoder.model(input_ids=ids.to(text_encoder.device)).last_hidden_state
                encoded.append({"tokens": states[0].to(device, dtype), **beside})
            return encoded

        def at(size: tuple[int, int]) -> FlowModel:
            shape = _diffusers.latent_shape(channels, replace(self, size=size).size, factor, side * factor)
            return FlowModel(
                net=net,
                velocity=velocity,
                encode=encode,
                decode=_diffusers.decode_with(vae),
                sigmas=lambda steps: schedule.sigmas(steps, *shape[1:]),
                latent_shape=shape,
                lora_targets=targets,
                unread=lambda text: _diffusers.cut_words(tokenizer, text, self.max_tokens),
                encode_media=encode_media,
                collate=collate,
                tasks=self.tasks,
                encoders=(text_encoder,),
                at=at,
            )

        return at(self.size)
