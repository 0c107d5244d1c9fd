"""JoyAI-Image-Edit (arXiv 2605.04128) and Edit-Plus: 16 B double-stream transformers that edit, or draw from words.

A picture is read twice: by Qwen3-VL-8B, as a part of the chat, and by the network, as latents. Edit reads one, a
source, as one more frame ahead of the one that is drawn and of its size. Edit-Plus reads up to six, each of a size of
its own, as patches behind those that are drawn. Time is 1000 sigma; the networks predict noise - data, and read what
Qwen3-VL's last layer gives before the final norm. Edit's has no mask for texts, so the rows of a batch go through it
together where their texts are of one length, and a batch of k lengths takes k passes; Edit-Plus takes one for each set
of sizes. Guidance is classifier-free; each latent pixel is then given the length that the told prediction has
(`rescaled`). The autoencoder is Wan's, that of a video model: a picture is one frame.

Differences from diffusers' pipelines: what is drawn has the recipe's `size`; Edit scales and crops its source to that
too, where the pipeline takes the nearest of a list of sizes for both, and it reads the mode of the source's latents,
where the pipeline draws from their distribution. Edit-Plus takes the nearest of the list, which can be brought to
another area (`picture_area`). The autoencoder stays in fp32. Pictures are made ready by PIL; torchvision, where it is
installed, rounds otherwise.

diffusers gives these networks no adapters (0.42). Here they have them, by `adaptable`; a pipeline of diffusers loads a
trained LoRA after `pipe.transformer.__class__ = adaptable(type(pipe.transformer))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlkit.backbones import _diffusers, _pictures, qwen_image, qwen_image_edit
from rlkit.backbones.qwen_image_edit import Reader, tell_pictures_apart
from rlkit.types import Condition, FlowModel, Prompt, classifier_free

ONE, PLUS = "JoyImageEditPipeline", "JoyImageEditPlusPipeline"
NETS = {ONE: "JoyImageEditTransformer3DModel", PLUS: "JoyImageEditPlusTransformer3DModel"}
MOST = {ONE: 1, PLUS: 6}  # pictures
SYSTEM = (
    "<|im_start|>system\n \\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n"
)
CHAT = SYSTEM + "<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n"
AHEAD = 34  # tokens of the chat that the network does not read
MARK, PLACE = "<|image_pad|>", "<image>\n"  # of a picture: in the chat, and in the prompts that the pipeline takes
PICTURE = f"<|vision_start|>{MARK}<|vision_end|>"
LONGEST = 4096  # tokens of chat and picture, of which the network reads the last
TARGETS = ("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj")


def adaptable(kind: type[Any]) -> type[Any]:
    """The same class of network, by the same name, with diffusers' functions for LoRA."""
    from diffusers.loaders import PeftAdapterMixin

    return kind if issubclass(kind, PeftAdapterMixin) else type(kind.__name__, (kind, PeftAdapterMixin), {})


def nearest(sizes: Sequence[tuple[int, int]], area: int, multiple: int) -> Callable[[int, int], tuple[int, int]]:
    """(height, width) -> the one of these sizes of 1024 x 1024 pixels, brought to this area, of nearest proportions."""
    scale = math.sqrt(area) / 1024 / multiple
    brought = [(max(1, round(h * scale)) * multiple, max(1, round(w * scale)) * multiple) for h, w in sizes]
    return lambda height, width: min(brought, key=lambda one: abs(one[0] / one[1] - height / width))


def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """v [B, C, H, W] for x [B, C, H, W], tokens [B, L, D], source [B, K, C, H, W] and how many of both there are."""
    sets: dict[tuple[int, ...], list[int]] = {}
    for place, counts in enumerate(cond["counts"].tolist()):
        sets.setdefault(tuple(counts), []).append(place)
    answers = []
    for (length, pictures), places in sets.items():
        at = torch.tensor(places, device=x.device)
        text, source = cond["tokens"][at, :length], cond["source"][at, :pictures]
        frames = torch.cat([source, x[at, None].to(text.dtype)], dim=1)  # [b, K+1, C, H, W]
        answer: Tensor = net(
            hidden_states=frames.unsqueeze(3),  # each frame is a video of one
            timestep=1000 * sigma[at],
            encoder_hidden_states=text,
            return_dict=False,
        )[0]
        answers.append(answer[:, -1, :, 0])
    order = torch.tensor([place for places in sets.values() for place in places], device=x.device)
    return torch.cat(answers)[order.argsort()].to(x.dtype)


def velocity_plus(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """v [B, C, H, W] for x [B, C, H, W], tokens [B, L, D] with their mask, and the pictures' tokens."""
    height, width = x.shape[-2:]
    drawn = _diffusers.packed(x.to(cond["tokens"].dtype))  # [B, T, 4C]

    def rows(part: Any, at: Tensor, grids: _pictures.Grids) -> Tensor:
        places = at.to(x.device)
        patches = torch.cat([drawn[places], part["pictures"]], dim=1).unflatten(2, (-1, 1, 2, 2))  # [b, S, C, 1, 2, 2]
        answer: Tensor = net(
            hidden_states=patches,
            timestep=1000 * sigma[places],
            encoder_hidden_states=part["tokens"],
            encoder_hidden_states_mask=part.get("mask"),
            shape_list=[[(1, height // 2, width // 2), *((1, *grid) for grid in grids)]] * len(at),
            return_dict=False,
        )[0]
        return answer[:, : drawn.shape[1]].flatten(2)

    return _diffusers.unpacked(_pictures.by_grids(cond, rows), height, width).to(x.dtype)


def collate(conditions: Sequence[Condition]) -> Condition:
    """Texts [B, L, D] and sources [B, K, C, H, W] with zeros at their ends, and counts [B, 2], which say where."""
    padded = {name: pad_sequence([one[name] for one in conditions], batch_first=True) for name in ("tokens", "source")}
    return {**padded, "counts": torch.stack([one["counts"] for one in conditions])}


def rescaled(told: Tensor, untold: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance [B, C, H, W] whose pixels are as long as those of the told prediction."""
    guided = classifier_free(told, untold, guidance)
    return guided * (told.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True).clamp_min(1e-6))


def last_layer(text_encoder: Any, read: Any) -> Tensor:
    """[1, L, D] of Qwen3-VL's last layer, before the norm that its own hidden states have behind them."""
    found: list[Tensor] = []

    def after(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hook = text_encoder.model.language_model.layers[-1].register_forward_hook(after)
    try:
        text_encoder(**read, logits_to_keep=1)
    finally:
        hook.remove()
    return found[0]


@dataclass(frozen=True)
class JoyImageEdit:
    """JoyAI-Image-Edit: edits by instruction, moves and turns things and the camera; Plus reads up to six pictures."""

    kind = "flow"
    tasks = ("t2i", "edit", "in_context")
    pipelines = ("JoyImageEditPipeline", "JoyImageEditPlusPipeline")
    licence = "Apache-2.0"
    parameters = "16 B, and 8 B of text encoder"
    paper = "arXiv 2605.04128"
    source = "https://huggingface.co/jdopensource/JoyAI-Image-Edit"

    path: str = "jdopensource/JoyAI-Image-Edit-Diffusers"  # a hub name (JoyAI-Image-Edit-Plus-Diffusers), or a folder
    revision: str | None = None  # of the hub repository; None: its newest
    size: tuple[int, int] = (1024, 1024)  # height and width in pixels of what is drawn, and of what Edit reads
    picture_area: int = 1024 * 1024  # pixels that each picture which Edit-Plus reads is brought to; fewer are quicker
    max_tokens: int = 1024  # of a prompt, without its chat and pictures; a longer one is cut

    def __post_init__(self) -> None:
        _diffusers.check_size(self.size, 16)
        if not 1 <= self.max_tokens <= 2000:  # the pipeline reads 2048 with the end of the chat
            raise ValueError(f"max_tokens must be between 1 and 2000, not {self.max_tokens}")
        if self.picture_area < 32 * 32:
            raise ValueError(f"picture_area must be 1024 pixels (32 x 32) or more, not {self.picture_area}")

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The network and its frozen neighbours. The autoencoder stays in fp32."""
        import diffusers
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.pipelines.joyimage import image_processor as module
        from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        parts = ("transformer", "text_encoder", "tokenizer", "processor", "vae", "scheduler")
        folder = _diffusers.opened(self.path, self.revision, self.pipelines, parts)
        plus, most = folder.pipeline == PLUS, MOST[folder.pipeline]
        scheduler = folder.plain("scheduler", diffusers.FlowMatchEulerDiscreteScheduler)
        tokenizer = folder.plain("tokenizer", Qwen2Tokenizer)
        reader: Any = Reader(tokenizer, folder.plain("processor", Qwen2VLImageProcessorPil))
        vae = folder.frozen("vae", diffusers.AutoencoderKLWan, device, torch.float32)
        text_encoder = folder.frozen("text_encoder", Qwen3VLForConditionalGeneration, device, dtype)
        tell_pictures_apart(text_encoder, tokenizer.convert_tokens_to_ids(MARK))
        net = folder.net("transformer", adaptable(getattr(diffusers, NETS[folder.pipeline])), device, dtype)
        targets = _diffusers.present(net, TARGETS)  # while it has no adapters
        channels, factor = vae.config.z_dim, vae.config.scale_factor_spatial
        listed = nearest(module.BUCKETS[1024], self.picture_area, 2 * factor)
        cropper = module.JoyImageEditImageProcessor(vae_scale_factor=factor)
        encode_media = qwen_image.encode_with(vae)

        def cut(text: str) -> str:
            """The prompt without what is behind its first `max_tokens` tokens, or would stand for a picture."""
            text = text.replace(MARK, "").replace(PLACE, "")
            places = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            return text if len(places) <= self.max_tokens else text[: places[self.max_tokens][0]]

        def read_at(height: int, width: int, drawn: tuple[int, int]) -> tuple[int, int]:
            """Height and width that a picture is brought to, beside one of size `drawn`."""
            return listed(height, width) if plus else drawn

        @torch.no_grad()
        def one_condition(prompt: Prompt, size: tuple[int, int]) -> Condition:
            whole = _pictures.of_prompt(prompt, 0, most)
            found = [cropper.resize_center_crop(one, read_at(one.height, one.width, size)) for one in whole]
            read = reader([CHAT.format(PICTURE * len(found), cut(prompt.text))], found).to(text_encoder.device)
            tokens = last_layer(text_encoder, read)[0, AHEAD:][-LONGEST:].to(device, dtype)
            pixels = [cropper.numpy_to_pt(cropper.pil_to_numpy([one])) for one in found]  # [1, 3, H, W] in 0..1
            latents = [encode_media(one).to(dtype) for one in pixels]
            if plus:
                beside = _pictures.columns(latents, _diffusers.packed, tokens.new_zeros(0, 4 * channels))
                return {"tokens": tokens, **beside}
            source = torch.cat([tokens.new_zeros(0, channels, *(side // factor for side in size)), *latents])
            return {"tokens": tokens, "source": source, "counts": torch.tensor([len(tokens), len(found)])}

        def pipeline(prompts: Sequence[Prompt], noise: Tensor, steps: int, guidance: float, negative: str) -> Tensor:
            own = type(scheduler).from_config(scheduler.config)  # a schedule is part of a scheduler
            whole = getattr(diffusers, folder.pipeline)(own, vae, text_encoder, tokenizer, net, reader)
            height, width = (factor * side for side in noise.shape[2:])

            def bucket(high: int, wide: int, basesize: int) -> tuple[int, int]:
                return read_at(high, wide, (height, width))

            def mode(distribution: Any) -> Tensor:
                return distribution.mode().to(dtype)  # type: ignore[no-any-return]

            def given(prompt: Prompt, one: Tensor) -> dict[str, Any]:
                found = _pictures.of_prompt(prompt, 0, most)
                if plus:
                    return {"images": found or None, "height": height, "width": width, "latents": one[None, :, None]}
                return {"image": found[0] if found else None, "latents": one[None, None, :, None]}

            with (
                mock.patch.object(module, "find_best_bucket", bucket),  # a list of sizes there
                mock.patch.object(DiagonalGaussianDistribution, "sample", mode),  # drawn there
            ):
                drawn = [
                    _diffusers.drawn(
                        whole,
                        prompt=cut(prompt.text),
                        negative_prompt=negative,
                        num_inference_steps=steps,
                        guidance_scale=guidance,
                        **given(prompt, one.to(device)),
                    )
                    for prompt, one in zip(prompts, noise, strict=True)  # it would read the padding of several
                ]
            return torch.cat(drawn)

        def at(size: tuple[int, int]) -> FlowModel:
            shape = _diffusers.latent_shape(channels, replace(self, size=size).size, factor, 2 * factor)
            return FlowModel(
                net=net,
                velocity=velocity_plus if plus else velocity,
                encode=lambda prompts: [one_condition(prompt, size) for prompt in prompts],
                decode=qwen_image.decode_with(vae),
                sigmas=_diffusers.sigmas_with(scheduler, even=False),
                latent_shape=shape,
                lora_targets=targets,
                unread=lambda text: _diffusers.cut_words(tokenizer, text, self.max_tokens),
                encode_media=encode_media,
                collate=qwen_image_edit.collate if plus else collate,
                guide=rescaled,
                tasks=self.tasks if plus else ("t2i", "edit"),
                encoders=(text_encoder,),
                at=at,
                pipeline=pipeline,
            )

        return at(self.size)
