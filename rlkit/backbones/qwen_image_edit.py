"""Qwen-Image-Edit (arXiv 2508.02324) and its successors 2509 and 2511: Qwen-Image that reads pictures.

A picture is read twice: by Qwen2.5-VL, as a part of the chat, and by the network, as tokens of latents behind those
that are drawn. The first checkpoint reads one, a source; 2509 and 2511, whose pipeline is called Plus, read up to
three, which the chat numbers and shows small. Time, sign, packing and guidance are Qwen-Image's. 2511 keeps the time of
picture tokens at 0, which its transformer does itself.

Differences from diffusers' pipelines: each picture drawn has the recipe's size, whatever that of its source is; the
area that pictures are brought to can be chosen; and tokens of pictures have their rows and columns as positions inside
Qwen2.5-VL, as they had in training, which the pipelines lost with transformers 5 (diffusers issue 14194). Pictures are
made ready by PIL, as they were in training; torchvision, where it is installed, rounds otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from rlkit.backbones import _diffusers, _pictures, qwen_image
from rlkit.pictures import to_pil
from rlkit.types import Condition, FlowModel, Prompt

ONE, PLUS = "QwenImageEditPipeline", "QwenImageEditPlusPipeline"
CHAT = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n"
)
AHEAD = 64  # tokens of the chat ahead of pictures and prompt
MARK = "<|image_pad|>"
PICTURE = {ONE: f"<|vision_start|>{MARK}<|vision_end|>", PLUS: f"Picture {{}}: <|vision_start|>{MARK}<|vision_end|>"}
MOST = {ONE: 1, PLUS: 3}  # pictures
READ_AREA = 384 * 384  # pixels of a picture as Plus shows it to Qwen2.5-VL


def fitted(size: tuple[int, int], area: int) -> tuple[int, int]:
    """(width, height) of about this area, in the proportions of `size`, multiples of 32."""
    ratio = size[0] / size[1]
    wide = math.sqrt(area * ratio)
    return max(1, round(wide / 32)) * 32, max(1, round(wide / ratio / 32)) * 32


class Reader:
    """Chats and their pictures, if any -> what Qwen2.5-VL takes. transformers' own needs torchvision, for videos."""

    def __init__(self, tokenizer: Any, pictures: Any) -> None:
        self.tokenizer, self.pictures = tokenizer, pictures

    def __call__(self, text: Sequence[str], images: Any, padding: bool = True, return_tensors: str = "pt") -> Any:
        from transformers import BatchFeature

        seen: Any = self.pictures(images=images, return_tensors=return_tensors) if images else {}
        counts = (int(grid.prod()) // self.pictures.merge_size**2 for grid in seen.get("image_grid_thw", ()))
        whole = []
        for chat in text:
            first, *rest = chat.split(MARK)
            whole.append(first + "".join(MARK * next(counts) + more for more in rest))
        words = self.tokenizer(whole, padding=padding, return_tensors=return_tensors)
        return BatchFeature({**words, **seen})


def tell_pictures_apart(text_encoder: nn.Module, mark: int) -> None:
    """Let the encoder know which tokens are pictures; without it, it gives them the positions of words."""

    def before(module: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, options | {"mm_token_type_ids": (options["input_ids"] == mark).int()}

    text_encoder.register_forward_pre_hook(before, with_kwargs=True)


def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """v [B, C, H, W] for x [B, C, H, W], tokens [B, L, D] with their mask, and the pictures' tokens."""
    height, width = x.shape[-2:]
    drawn = _diffusers.packed(x.to(cond["tokens"].dtype))  # [B, T, 4C]

    def rows(part: Any, at: Tensor, grids: _pictures.Grids) -> Tensor:
        places = at.to(x.device)
        answer: Tensor = net(
            hidden_states=torch.cat([drawn[places], part["pictures"]], dim=1),
            timestep=sigma[places],
            encoder_hidden_states=part["tokens"],
            encoder_hidden_states_mask=part.get("mask"),
            img_shapes=[[(1, height // 2, width // 2), *((1, *grid) for grid in grids)]] * len(at),
            return_dict=False,
        )[0]
        return answer[:, : drawn.shape[1]]

    return _diffusers.unpacked(_pictures.by_grids(cond, rows), height, width).to(x.dtype)


def collate(conditions: Sequence[Condition]) -> Condition:
    return {**qwen_image.collate(conditions), **_pictures.collate(conditions)}


@dataclass(frozen=True)
class QwenImageEdit:
    """Qwen-Image-Edit: edits a picture by instruction; 2509 and 2511 also draw what up to three pictures show."""

    kind = "flow"
    tasks = ("edit", "in_context")
    pipelines = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
    licence = "Apache-2.0"
    parameters = "20 B, and 8 B of text encoder"
    paper = "arXiv 2508.02324"

    path: str = "Qwen/Qwen-Image-Edit-2511"  # a hub name or a diffusers folder; or Qwen/Qwen-Image-Edit, and -2509
    revision: str | None = None  # of the hub repository
    size: tuple[int, int] = (1024, 1024)  # height and width in pixels of what is drawn
    picture_area: int = 1024 * 1024  # pixels that each picture read is brought to; fewer are quicker
    max_tokens: int = 1024  # of a prompt, without its chat and pictures; a longer one is cut

    def __post_init__(self) -> None:
        _diffusers.check_size(self.size, 16)
        qwen_image.check_tokens(self.max_tokens)
        if self.picture_area < 32 * 32:
            raise ValueError(f"picture_area must be 1024 pixels (32 x 32) or more, not {self.picture_area}")

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The network and its frozen neighbours. The autoencoder stays in fp32."""
        import diffusers
        from diffusers.image_processor import VaeImageProcessor
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        parts = ("transformer", "text_encoder", "tokenizer", "processor", "vae", "scheduler")
        folder = _diffusers.opened(self.path, self.revision, self.pipelines, parts)
        plus = folder.pipeline == PLUS
        most, template = MOST[folder.pipeline], PICTURE[folder.pipeline]
        tokenizer = folder.plain("tokenizer", Qwen2Tokenizer)
        reader = Reader(tokenizer, folder.plain("processor", Qwen2VLImageProcessorPil))
        scheduler = folder.plain("scheduler", diffusers.FlowMatchEulerDiscreteScheduler)
        vae = folder.frozen("vae", diffusers.AutoencoderKLQwenImage, device, torch.float32)
        text_encoder = folder.frozen("text_encoder", Qwen2_5_VLForConditionalGeneration, device, dtype)
        tell_pictures_apart(text_encoder, tokenizer.convert_tokens_to_ids(MARK))
        net = folder.net("transformer", diffusers.QwenImageTransformer2DModel, device, dtype)
        factor = vae.spatial_compression_ratio
        targets = _diffusers.present(net, qwen_image.TARGETS)  # while it has no adapters
        resizer = VaeImageProcessor(vae_scale_factor=2 * factor)
        encode_media = qwen_image.encode_with(vae)

        def cut(text: str) -> str:
            """The prompt without what is behind its first `max_tokens` tokens, or would stand for a picture."""
            text = text.replace(MARK, "")
            places = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            return text if len(places) <= self.max_tokens else text[: places[self.max_tokens][0]]

        @torch.no_grad()
        def encode(prompts: Sequence[Prompt]) -> list[Condition]:
            encoded: list[Condition] = []
            for prompt in prompts:
                found = _pictures.of_prompt(prompt, 1, most)
                sizes = [fitted(one.size, self.picture_area) for one in found]
                shown = [fitted(one.size, READ_AREA) for one in found] if plus else sizes
                small = [resizer.resize(one, high, wide) for one, (wide, high) in zip(found, shown, strict=True)]
                numbered = "".join(template.format(i + 1) for i in range(len(found)))
                read = reader([CHAT.format(numbered, cut(prompt.text))], small).to(text_encoder.device)
                states = text_encoder(**read, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
                tokens = states[0, AHEAD:].to(device, dtype)
                pixels = [resizer.preprocess(one, high, wide) for one, (wide, high) in zip(found, sizes, strict=True)]
                latents = [encode_media(one * 0.5 + 0.5).to(dtype) for one in pixels]
                beside = _pictures.columns(latents, _diffusers.packed, tokens.new_zeros(0, 4 * vae.config.z_dim))
                encoded.append({"tokens": tokens, **beside})
            return encoded

        def pipeline(prompts: Sequence[Prompt], noise: Tensor, steps: int, guidance: float, negative: str) -> Tensor:
            module = getattr(diffusers.pipelines.qwenimage, f"pipeline_qwenimage_edit{'_plus' * plus}")
            own = type(scheduler).from_config(scheduler.config)  # a schedule is part of a scheduler
            whole = getattr(diffusers, folder.pipeline)(own, vae, text_encoder, tokenizer, reader, net)
            height, width = (factor * side for side in noise.shape[2:])
            pictures = []
            usual = module.calculate_dimensions

            def sized(area: int, ratio: float) -> Any:
                return usual(self.picture_area if area == 1024 * 1024 else area, ratio)

            with mock.patch.object(module, "calculate_dimensions", sized):  # the area is fixed there
                for prompt, one in zip(prompts, noise, strict=True):  # pictures may differ in size
                    found = [to_pil(picture) for picture in (prompt.source, *prompt.references) if picture is not None]
                    pictures.append(
                        _diffusers.drawn(
                            whole,
                            image=found if plus else found[0],
                            prompt=cut(prompt.text),
                            negative_prompt=negative if guidance > 1 else None,
                            height=height,
                            width=width,
                            num_inference_steps=steps,
                            true_cfg_scale=guidance,
                            latents=_diffusers.packed(one[None].to(device)),
                        )
                    )
            return torch.cat(pictures)

        def at(size: tuple[int, int]) -> FlowModel:
            shape = _diffusers.latent_shape(vae.config.z_dim, replace(self, size=size).size, factor, 2 * factor)
            return FlowModel(
                net=net,
                velocity=velocity,
                encode=encode,
                decode=qwen_image.decode_with(vae),
                sigmas=qwen_image.schedule(scheduler, shape),
                latent_shape=shape,
                lora_targets=targets,
                unread=lambda text: _diffusers.cut_words(tokenizer, text, self.max_tokens),
                encode_media=encode_media,
                collate=collate,
                guide=qwen_image.rescaled,
                tasks=self.tasks if plus else ("edit",),
                encoders=(text_encoder,),
                at=at,
                pipeline=pipeline,
            )

        return at(self.size)
