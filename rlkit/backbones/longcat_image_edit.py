"""LongCat-Image-Edit (arXiv 2512.07584): LongCat-Image that changes a picture as it is told.

The source is read twice: at half its size by Qwen2.5-VL, as a part of the chat, and by the network, as tokens of
latents behind those that are drawn and at the same positions. Time, sign, packing and quotations are LongCat-Image's.
Guidance is classifier-free; the untold text stands beside the same source.

Differences from the pipeline: the source is brought to the recipe's `size`, and so is what is drawn, where the pipeline
takes the source's proportions and an area of 1024 x 1024; and tokens of pictures have their rows and columns as
positions inside Qwen2.5-VL, as they had in training, which the pipeline lost with transformers 5 (diffusers issue
14194). Pictures are made ready by PIL; torchvision, where it is installed, rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from rlkit.backbones import _diffusers as shared
from rlkit.backbones import _pictures, longcat_image
from rlkit.backbones.qwen_image_edit import tell_pictures_apart
from rlkit.types import Condition, FlowModel, Prompt

START, MARK = "<|vision_start|>", "<|image_pad|>"
BEFORE = (
    "<|im_start|>system\nAs an image editing expert, first analyze the content and attributes of the input image(s). "
    "Then, based on the user's editing instructions, clearly and precisely determine how to modify the given image(s), "
    "ensuring that only the specified parts are altered and all other aspects remain consistent with the original(s)."
    f"<|im_end|>\n<|im_start|>user\n{START}{MARK}<|vision_end|>"
)


def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """v [B, C, H, W] for x [B, C, H, W], tokens [B, L, D] and the source's tokens [B, T, 4C]."""
    height, width = (side // 2 for side in x.shape[-2:])
    text = cond["tokens"]
    length = text.shape[1]
    grids = [longcat_image.positions(length, height, width, kind, x.device) for kind in (1, 2)]
    answer: Tensor = net(
        hidden_states=torch.cat([shared.packed(x).to(text.dtype), cond["source"]], dim=1),
        timestep=1000 * sigma / 1000,
        encoder_hidden_states=text,
        txt_ids=longcat_image.text_positions(length, x.device),
        img_ids=torch.cat(grids),
        return_dict=False,
    )[0]
    return shared.unpacked(answer[:, : height * width], 2 * height, 2 * width).to(x.dtype)


class _Processor:
    """What the pipeline asks its processor for. transformers' own needs torchvision, for the videos alone."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor


@dataclass(frozen=True)
class LongCatImageEdit:
    """LongCat-Image-Edit: edits a picture by instruction, with 6 B parameters."""

    kind = "flow"
    tasks = ("edit",)
    pipelines = ("LongCatImageEditPipeline",)
    licence = "Apache-2.0"
    parameters = "6 B, and 8 B of text encoder"
    paper = "arXiv 2512.07584"
    source = "https://huggingface.co/meituan-longcat/LongCat-Image-Edit"

    path: str = "meituan-longcat/LongCat-Image-Edit"  # a hub name, or a diffusers folder
    revision: str | None = None  # of the hub repository; None: its newest
    size: tuple[int, int] = (1024, 1024)  # height and width in pixels, of the source too
    max_tokens: int = 512  # of a prompt; a longer one is cut, and the network was trained with 512

    def __post_init__(self) -> None:
        shared.check_size(self.size, 16)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, not {self.max_tokens}")

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The text encoder takes `dtype`; the autoencoder stays in fp32."""
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, LongCatImageEditPipeline
        from diffusers import LongCatImageTransformer2DModel as Network
        from diffusers.image_processor import VaeImageProcessor
        from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as module
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        folder = shared.opened(self.path, self.revision, self.pipelines, (*longcat_image.PARTS, "text_processor"))
        scheduler = folder.plain("scheduler", FlowMatchEulerDiscreteScheduler)
        tokenizer = folder.plain("tokenizer", Qwen2Tokenizer)
        reader = folder.plain("text_processor", Qwen2VLImageProcessorPil)
        net = folder.net("transformer", Network, device, dtype)
        vae = folder.frozen("vae", AutoencoderKL, device, torch.float32)
        text_encoder = folder.frozen("text_encoder", Qwen2_5_VLForConditionalGeneration, device, dtype)
        tell_pictures_apart(text_encoder, tokenizer.convert_tokens_to_ids(MARK))
        factor = shared.vae_factor(vae)
        channels = net.config.in_channels // 4
        targets = shared.present(net, longcat_image.LAYERS)  # while it has no adapters
        encode_media, resizer = shared.encode_with(vae), VaeImageProcessor(vae_scale_factor=2 * factor)
        ahead = len(tokenizer(BEFORE.split(START)[0], add_special_tokens=False).input_ids)
        behind = len(tokenizer(longcat_image.BEHIND, add_special_tokens=False).input_ids)

        @torch.no_grad()
        def one_condition(prompt: Prompt, height: int, width: int) -> Condition:
            (found,) = _pictures.of_prompt(prompt, 1, 1)
            found = resizer.resize(found, height, width)
            small = resizer.resize(found, height // 2, width // 2)
            seen = reader(images=small, return_tensors="pt")
            count = int(seen["image_grid_thw"].prod()) // reader.merge_size**2
            before = BEFORE.replace(MARK, MARK * count)
            ids, mask = longcat_image.chat(tokenizer, before, prompt.text.replace(MARK, ""), self.max_tokens)
            read = {"input_ids": ids, "attention_mask": mask, **seen}
            read = {name: column.to(text_encoder.device) for name, column in read.items()}
            states = text_encoder(**read, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
            latents = encode_media(resizer.preprocess(found, height, width) * 0.5 + 0.5)  # [1, C, h, w]
            tokens = states[0, ahead:-behind].to(device, dtype)
            return {"tokens": tokens, "source": shared.packed(latents)[0].to(dtype)}

        def pipeline(prompts: Sequence[Prompt], noise: Tensor, steps: int, guidance: float, negative: str) -> Tensor:
            own = type(scheduler).from_config(scheduler.config)  # a schedule is part of a scheduler
            processor: Any = _Processor(reader)
            whole = LongCatImageEditPipeline(own, vae, text_encoder, tokenizer, processor, net)
            whole.tokenizer_max_length = self.max_tokens
            height, width = (factor * side for side in noise.shape[2:])
            with mock.patch.object(module, "calculate_dimensions", return_value=(width, height)):  # a fixed area there
                drawn = [
                    shared.drawn(
                        whole,
                        image=_pictures.of_prompt(prompt, 1, 1)[0],
                        prompt=prompt.text,
                        negative_prompt=negative,
                        num_inference_steps=steps,
                        guidance_scale=guidance,
                        latents=shared.packed(one[None]),
                    )
                    for prompt, one in zip(prompts, noise, strict=True)  # the pipeline takes one at a time
                ]
            return torch.cat(drawn)

        def at(size: tuple[int, int]) -> FlowModel:
            shape = shared.latent_shape(channels, replace(self, size=size).size, factor, 2 * factor)
            return FlowModel(
                net=net,
                velocity=velocity,
                encode=lambda prompts: [one_condition(prompt, *size) for prompt in prompts],
                decode=shared.decode_with(vae),
                sigmas=shared.sigmas_with(scheduler, shared.mu_of(scheduler, shape[1] * shape[2] // 4)),
                latent_shape=shape,
                lora_targets=targets,
                unread=lambda text: longcat_image.cut_words(tokenizer, text, self.max_tokens),
                encode_media=encode_media,
                tasks=self.tasks,
                encoders=(text_encoder,),
                at=at,
                pipeline=pipeline,
            )

        return at(self.size)
