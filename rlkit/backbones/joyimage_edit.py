"""JoyAI-Image-Edit (arXiv 2605.04128): a 16 B double-stream transformer that edits a picture, or draws from words.

The source is read twice: by Qwen3-VL-8B, as a part of the chat, and by the network, as one more frame of latents, of
the same size as the frame that is drawn. Time is 1000 sigma; the network predicts noise - data and cuts the latents
into 2x2 patches itself. It reads what Qwen3-VL's last layer gives before the final norm. It has no mask for texts, so
the rows of a batch go through it together where their texts are of one length, and a batch of k lengths takes k passes.
Guidance is classifier-free; each latent pixel is then given the length that the told prediction has (`rescaled`). The
autoencoder is Wan's, that of a video model: a picture is one frame.

Differences from diffusers' pipeline: the source is scaled and cropped to the recipe's `size`, and so is what is drawn,
where the pipeline takes the nearest of its list of sizes; the source's latents are the mode of their distribution,
where the pipeline draws from it; the autoencoder stays in fp32. Pictures are made ready by PIL; torchvision, where it
is installed, rounds otherwise.

diffusers gives this network no adapters (0.42). Here it has them, by `adaptable`; a pipeline of diffusers loads a
trained LoRA after `pipe.transformer.__class__ = adaptable(type(pipe.transformer))`.

Not here: Edit-Plus, which reads several pictures. Its transformer is another class, with other inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlkit.backbones import _diffusers, _pictures, qwen_image
from rlkit.backbones.qwen_image_edit import Reader, tell_pictures_apart
from rlkit.types import Condition, FlowModel, Prompt, classifier_free

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
    """JoyAI-Image-Edit: edits a picture by instruction, moves and turns things and the camera; draws without one."""

    kind = "flow"
    tasks = ("t2i", "edit")
    pipelines = ("JoyImageEditPipeline",)
    licence = "Apache-2.0"
    parameters = "16 B, and 8 B of text encoder"
    paper = "arXiv 2605.04128"
    source = "https://huggingface.co/jdopensource/JoyAI-Image-Edit"

    path: str = "jdopensource/JoyAI-Image-Edit-Diffusers"  # a hub name, or a diffusers folder
    revision: str | None = None  # of the hub repository; None: its newest
    size: tuple[int, int] = (1024, 1024)  # height and width in pixels, of the source too
    max_tokens: int = 1024  # of a prompt, without its chat and picture; a longer one is cut

    def __post_init__(self) -> None:
        _diffusers.check_size(self.size, 16)
        if not 1 <= self.max_tokens <= 2000:  # the pipeline reads 2048 with the end of the chat
            raise ValueError(f"max_tokens must be between 1 and 2000, not {self.max_tokens}")

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The network and its frozen neighbours. The autoencoder stays in fp32."""
        import diffusers
        from diffusers.pipelines.joyimage import image_processor as module
        from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        parts = ("transformer", "text_encoder", "tokenizer", "processor", "vae", "scheduler")
        folder = _diffusers.opened(self.path, self.revision, self.pipelines, parts)
        scheduler = folder.plain("scheduler", diffusers.FlowMatchEulerDiscreteScheduler)
        tokenizer = folder.plain("tokenizer", Qwen2Tokenizer)
        reader: Any = Reader(tokenizer, folder.plain("processor", Qwen2VLImageProcessorPil))
        vae = folder.frozen("vae", diffusers.AutoencoderKLWan, device, torch.float32)
        text_encoder = folder.frozen("text_encoder", Qwen3VLForConditionalGeneration, device, dtype)
        tell_pictures_apart(text_encoder, tokenizer.convert_tokens_to_ids(MARK))
        net = folder.net("transformer", adaptable(diffusers.JoyImageEditTransformer3DModel), device, dtype)
        factor = vae.config.scale_factor_spatial
        shape = _diffusers.latent_shape(vae.config.z_dim, self.size, factor, 2 * factor)
        cropper = module.JoyImageEditImageProcessor(vae_scale_factor=factor)
        encode_media = qwen_image.encode_with(vae)

        def cut(text: str) -> str:
            """The prompt without what is behind its first `max_tokens` tokens, or would stand for a picture."""
            text = text.replace(MARK, "").replace(PLACE, "")
            places = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            return text if len(places) <= self.max_tokens else text[: places[self.max_tokens][0]]

        @torch.no_grad()
        def encode(prompts: Sequence[Prompt]) -> list[Condition]:
            return [one_condition(prompt) for prompt in prompts]  # one by one: a text is then not padded

        def one_condition(prompt: Prompt) -> Condition:
            found = [cropper.resize_center_crop(one, self.size) for one in _pictures.of_prompt(prompt, 0, 1)]
            chat = [CHAT.format(PICTURE * len(found), cut(prompt.text))]
            read = reader(chat, found) if found else tokenizer(chat, return_tensors="pt")
            tokens = last_layer(text_encoder, read.to(device))[0, AHEAD:][-LONGEST:].to(dtype)
            pixels = [cropper.numpy_to_pt(cropper.pil_to_numpy([one])) for one in found]  # [1, 3, H, W] in 0..1
            beside = torch.cat([tokens.new_zeros(0, *shape), *(encode_media(one).to(dtype) for one in pixels)])
            return {"tokens": tokens, "source": beside, "counts": torch.tensor([len(tokens), len(found)])}

        def pipeline(prompts: Sequence[Prompt], noise: Tensor, steps: int, guidance: float, negative: str) -> Tensor:
            own = type(scheduler).from_config(scheduler.config)  # a schedule is part of a scheduler
            whole = diffusers.JoyImageEditPipeline(own, vae, text_encoder, tokenizer, net, reader)
            usual_encode, usual_decode = vae.encode, vae.decode

            def mode(pixels: Tensor) -> Any:
                codes = usual_encode(pixels.to(vae.dtype)).latent_dist.mode().to(pixels.dtype)
                return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: codes))

            def decode(codes: Tensor, return_dict: bool) -> Any:
                return usual_decode(codes.to(vae.dtype), return_dict=return_dict)

            with (
                mock.patch.object(module, "find_best_bucket", return_value=self.size),  # a list of sizes there
                mock.patch.object(vae, "encode", mode),  # drawn there
                mock.patch.object(vae, "decode", decode),  # as precise as the network there
            ):
                drawn = [
                    _diffusers.drawn(
                        whole,
                        image=next(iter(_pictures.of_prompt(prompt, 0, 1)), None),
                        prompt=cut(prompt.text),
                        negative_prompt=negative,
                        num_inference_steps=steps,
                        guidance_scale=guidance,
                        latents=one[None, None, :, None].to(device),  # [1, 1, C, 1, h, w]
                    )
                    for prompt, one in zip(prompts, noise, strict=True)  # it would read the padding of several
                ]
            return torch.cat(drawn)

        return FlowModel(
            net=net,
            velocity=velocity,
            encode=encode,
            decode=qwen_image.decode_with(vae),
            sigmas=_diffusers.sigmas_with(scheduler, even=False),
            latent_shape=shape,
            lora_targets=_diffusers.present(net, TARGETS),
            unread=lambda text: _diffusers.cut_words(tokenizer, text, self.max_tokens),
            encode_media=encode_media,
            collate=collate,
            guide=rescaled,
            tasks=self.tasks,
            pipeline=pipeline,
        )
