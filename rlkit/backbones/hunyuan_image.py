"""HunyuanImage 2.1: a 17 B transformer for 2048 x 2048 pixels, whose latent pixels are 32 pixels wide.

Conventions of the network: its time is 1000 sigma, it predicts noise - data, and a latent pixel is a token. It reads
Qwen2.5-VL's last hidden state but two, without the first 34 tokens, which are the template's; and, by a ByT5 encoder of
glyphs, each text in quotation marks that a prompt asks to be drawn. It sorts the words that the masks keep ahead of the
others, so that a row does not depend on what its texts are padded with.

Differences from the pipeline: guidance is classifier-free throughout. The published guider does that for its first six
steps, and then guides along a running mean of the differences so far, projected (arXiv 2410.02416): its velocity
depends on the way to a state, and a policy's has to depend on the state alone. The refiner, a second network, is left
out; so is the distilled checkpoint, whose network is also told the time of the next step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlkit.backbones import _diffusers as shared
from rlkit.errors import RecipeError
from rlkit.types import Condition, FlowModel, Prompt

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>"
)
AHEAD = 34  # tokens of the template before the prompt
GLYPHS = 128  # bytes of quoted text, the end token included
QUOTES = (r"'(.*?)'", r'"(.*?)"', r"‘(.*?)’", r"“(.*?)”")
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def glyphs(text: str) -> str:
    """What the glyph encoder reads of a prompt; nothing where it has no quotation."""
    return "".join(f'Text "{one}". ' for one in quoted(text))


def quoted(text: str) -> list[str]:
    return [found for marks in QUOTES for found in re.findall(marks, text)]


def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """v [B, C, H, W] for x [B, C, H, W], tokens [B, L, D], glyphs [B, K, E] and their masks."""
    dtype = cond["tokens"].dtype
    answer: Tensor = net(
        hidden_states=x.to(dtype),
        timestep=(1000 * sigma).to(dtype),
        encoder_hidden_states=cond["tokens"],
        encoder_attention_mask=cond["tokens_mask"],
        encoder_hidden_states_2=cond["glyphs"],
        encoder_attention_mask_2=cond["glyphs_mask"],
        return_dict=False,
    )[0]
    return answer.to(x.dtype)


def collate(conditions: Sequence[Condition]) -> Condition:
    """Texts of different lengths, padded, and masks that say which tokens are there."""
    batch: dict[str, Tensor] = {}
    for name in ("tokens", "glyphs"):
        columns = [one[name] for one in conditions]
        there = [torch.ones(len(column), dtype=torch.bool, device=column.device) for column in columns]
        batch[name] = pad_sequence(columns, batch_first=True)
        batch[f"{name}_mask"] = pad_sequence(there, batch_first=True)
    return batch


@dataclass(frozen=True)
class HunyuanImage:
    """HunyuanImage 2.1: text to image at 2048 x 2048 with 17 B parameters."""

    kind = "flow"
    tasks = ("t2i",)
    pipelines = ("HunyuanImagePipeline",)
    licence = "Tencent Hunyuan Community License"
    parameters = "17 B, and 8.5 B of text encoders"
    paper = ""
    source = "https://github.com/Tencent-Hunyuan/HunyuanImage-2.1"

    path: str = "hunyuanvideo-community/HunyuanImage-2.1-Diffusers"  # a hub name, or a diffusers folder
    revision: str | None = None  # of the hub repository; None: its newest
    size: tuple[int, int] = (2048, 2048)  # height and width in pixels
    max_tokens: int = 1000  # of a prompt; a longer one is cut

    def __post_init__(self) -> None:
        shared.check_size(self.size, 32)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, not {self.max_tokens}")

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The text encoders take `dtype`; the autoencoder stays in fp32."""
        from diffusers import AdaptiveProjectedMixGuidance as Guider
        from diffusers import AutoencoderKLHunyuanImage, FlowMatchEulerDiscreteScheduler, HunyuanImagePipeline
        from diffusers import HunyuanImageTransformer2DModel as Network
        from transformers import ByT5Tokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, T5EncoderModel

        words = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        folder = shared.opened(self.path, self.revision, self.pipelines, ("transformer", "vae", "scheduler", *words))
        scheduler = folder.plain("scheduler", FlowMatchEulerDiscreteScheduler)
        tokenizer = folder.plain("tokenizer", Qwen2Tokenizer)
        byte_tokenizer = folder.plain("tokenizer_2", ByT5Tokenizer)
        refuse_distilled(Network.load_config(folder.folder / "transformer"), self.path)
        net = folder.net("transformer", Network, device, dtype)
        vae = folder.frozen("vae", AutoencoderKLHunyuanImage, device, torch.float32)
        text_encoder = folder.frozen("text_encoder", Qwen2_5_VLForConditionalGeneration, device, dtype)
        glyph_encoder = folder.frozen("text_encoder_2", T5EncoderModel, device, dtype)
        scale, factor = vae.config.scaling_factor, vae.config.spatial_compression_ratio

        @torch.no_grad()
        def encode(prompts: Sequence[Prompt]) -> list[Condition]:
            return [{"tokens": read(prompt.text), "glyphs": read_glyphs(prompt.text)} for prompt in prompts]

        def read(text: str) -> Tensor:  # [L, D], not padded: a text is encoded by itself
            options = {"truncation": True, "max_length": self.max_tokens + AHEAD, "return_tensors": "pt"}
            ids = tokenizer(TEMPLATE.format(text), **options).input_ids.to(text_encoder.device)
            states: Tensor = text_encoder(input_ids=ids, output_hidden_states=True).hidden_states[-3]
            return states[0, AHEAD:].to(device, dtype)

        def read_glyphs(text: str) -> Tensor:  # [K, E]; none of a prompt without quotations
            if not glyphs(text):
                return torch.zeros(0, glyph_encoder.config.d_model, device=device, dtype=dtype)
            ids = byte_tokenizer(glyphs(text), truncation=True, max_length=GLYPHS, return_tensors="pt").input_ids
            states: Tensor = glyph_encoder(input_ids=ids.to(glyph_encoder.device))[0]
            return states[0].to(device, dtype)

        def decode(latents: Tensor) -> Tensor:
            pictures: Tensor = vae.decode(latents.to(vae.device, vae.dtype) / scale, return_dict=False)[0]
            return (pictures.float() * 0.5 + 0.5).clamp(0, 1)

        @torch.no_grad()
        def encode_media(pictures: Tensor) -> Tensor:
            codes: Tensor = vae.encode((2 * pictures - 1).to(vae.device, vae.dtype)).latent_dist.mode()
            return (codes * scale).float()

        def unread(text: str) -> list[str]:
            """What the language model does not read, and what of quotations the glyph encoder does not."""
            kept = glyphs(text).encode()[: GLYPHS - 1].decode(errors="ignore")
            cut = shared.cut_words(tokenizer, text, self.max_tokens)
            return cut + [word for one in quoted(text) if one not in kept for word in one.split() if word not in kept]

        targets = shared.present(net, LAYERS)  # while it has no adapters

        def at(size: tuple[int, int]) -> FlowModel:
            here = replace(self, size=size)  # refuses one that does not fit

            def pipeline(
                prompts: Sequence[Prompt], noise: Tensor, steps: int, guidance: float, negative: str
            ) -> Tensor:
                own = type(scheduler).from_config(scheduler.config)  # a schedule is part of a scheduler
                options = {"adaptive_projected_guidance_start_step": steps}  # never projected
                guider = Guider(guidance_scale=guidance, **options)
                parts: tuple[Any, ...] = (own, vae, text_encoder, tokenizer, glyph_encoder, byte_tokenizer, net)
                whole = HunyuanImagePipeline(*parts, guider=guider, ocr_guider=guider)
                whole.tokenizer_max_length = self.max_tokens
                return shared.drawn(
                    whole,
                    prompt=[prompt.text for prompt in prompts],
                    negative_prompt=[negative] * len(prompts),
                    height=here.size[0],
                    width=here.size[1],
                    num_inference_steps=steps,
                    latents=noise,
                )

            return FlowModel(
                net=net,
                velocity=velocity,
                encode=encode,
                decode=decode,
                sigmas=shared.sigmas_with(scheduler),
                latent_shape=shared.latent_shape(net.config.in_channels, size, factor),
                lora_targets=targets,
                unread=unread,
                encode_media=encode_media,
                collate=collate,
                tasks=self.tasks,
                encoders=(text_encoder, glyph_encoder),
                at=at,
                pipeline=pipeline,
            )

        return at(self.size)


def refuse_distilled(config: Any, path: str) -> None:
    if config.get("use_meanflow") or config.get("guidance_embeds"):
        what = f"{path} is a distilled HunyuanImage, whose network is told the time of the next step or a guidance"
        hint = "Use hunyuanvideo-community/HunyuanImage-2.1-Diffusers."
        raise RecipeError(what, where=shared.WHERE, hint=hint)
