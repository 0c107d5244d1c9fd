"""The embedded world's text-to-image policy, made of the real classes at toy size.

Stable Diffusion 3's transformer and flow-matching scheduler (diffusers), CLIP's text encoder (transformers) and a
linear autoencoder over 8x8 patches. 32x32 pixels, 16 image tokens, 12 text tokens, 2.5 M parameters. The shipped
weights are what `rlkit pretrain-world` made; `tiny_base/scores.json` says how, and how good they are. `tiny_omni` is
the same with pictures at its input.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlkit.errors import DataError, RecipeError
from rlkit.types import Condition, FlowModel, Prompt
from rlkit.world import grammar

BASE = Path(__file__).parent / "tiny_base"
PATCH = 8
COMPONENTS = 64
GRID = 4  # 32 pixels / PATCH
WIDTH = 128
TEXT_WIDTH = 96
SHOWN = 2  # pictures that `tiny_omni` sees: a source, or up to two references
MAX_WORDS = grammar.LENGTH - 2  # the first and the last token are <bos> and <eos>


class PatchAutoencoder(nn.Module):
    """Principal components of 8x8 patches: a stride-8 convolution and its transpose, fitted in closed form.

    Components are divided by the square root of their standard deviation: the strong ones stay stronger, as in a
    trained VAE, without drowning the weak ones that carry edges.
    """

    mean: Tensor  # [192]
    basis: Tensor  # [192, COMPONENTS], orthonormal columns
    scale: Tensor  # [COMPONENTS]

    def __init__(self) -> None:
        super().__init__()
        size = 3 * PATCH * PATCH
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.zeros(size, COMPONENTS))
        self.register_buffer("scale", torch.ones(COMPONENTS))

    @torch.no_grad()
    def fit(self, images: Tensor) -> float:
        """Fit to images [N, 3, H, W] in 0..1; returns the explained share of the variance."""
        patches = _patches(images).flatten(0, 1).double()
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))
        top = values.flip(0)[:COMPONENTS]
        self.mean.copy_(mean)
        self.basis.copy_(vectors.flip(1)[:, :COMPONENTS])
        self.scale.copy_(top.pow(-0.25))
        return float(top.sum() / values.sum())

    def encode(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in 0..1 -> latents [N, COMPONENTS, H/8, W/8]."""
        n, _, height, width = images.shape
        codes = (_patches(images) - self.mean) @ self.basis * self.scale
        return codes.transpose(1, 2).reshape(n, COMPONENTS, height // PATCH, width // PATCH)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, COMPONENTS, h, w] -> images [N, 3, 8h, 8w] clamped to 0..1."""
        n, _, height, width = latents.shape
        codes = latents.flatten(2).transpose(1, 2) / self.scale
        patches = codes @ self.basis.T + self.mean  # [N, h*w, 192]
        tiles = patches.reshape(n, height, width, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return tiles.reshape(n, 3, height * PATCH, width * PATCH).clamp(0, 1)


def _patches(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N, h*w, 192]."""
    n, channels, height, width = images.shape
    tiles = images.reshape(n, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(n, (height // PATCH) * (width // PATCH), channels * PATCH * PATCH)


def new_transformer(shown: int = 0) -> Any:
    """An untrained SD3 transformer of the tiny size; it sees `shown` pictures as further channels of its input."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=GRID,
        patch_size=1,
        in_channels=COMPONENTS * (1 + shown),
        out_channels=COMPONENTS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=GRID,
    )


def new_text_encoder() -> Any:
    """An untrained CLIP text encoder of the tiny size."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    end = grammar.VOCABULARY.index("<eos>")
    if end == 2:
        raise ValueError("CLIP treats an end token with id 2 as 'the largest id in the text'; give <eos> another id")
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(grammar.VOCABULARY),
            hidden_size=TEXT_WIDTH,
            intermediate_size=3 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=TEXT_WIDTH,
            max_position_embeddings=grammar.LENGTH,
            pad_token_id=grammar.VOCABULARY.index("<pad>"),
            bos_token_id=grammar.VOCABULARY.index("<bos>"),
            eos_token_id=end,
        )
    )


def token_ids(texts: Sequence[str]) -> Tensor:
    """[N, LENGTH] int64. A longer text is cut, as CLIP's tokenizer does; `unread` tells."""
    kept = [" ".join(text.split()[:MAX_WORDS]) for text in texts]
    return torch.tensor([grammar.tokenize(text) for text in kept], dtype=torch.int64)


def unread(text: str) -> list[str]:
    """The words of a text that the text encoder does not know, or that it cuts off."""
    words = text.split()
    return grammar.unknown_words(" ".join(words[:MAX_WORDS])) + words[MAX_WORDS:]


def encode_tokens(text_encoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids [N, LENGTH] -> (hidden states [N, LENGTH, D], pooled projection [N, D])."""
    output = text_encoder(input_ids=ids)
    return output.last_hidden_state, output.text_embeds


def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """SD3's calling convention: the model's time is 1000 sigma. Pictures of the condition follow x in the channels."""
    output: Tensor = net(
        hidden_states=torch.cat([x, cond["pictures"]], dim=1) if "pictures" in cond else x,
        timestep=1000 * sigma,
        encoder_hidden_states=cond["tokens"],
        pooled_projections=cond["pooled"],
        return_dict=False,
    )[0]
    return output


def sigmas(scheduler: Any, steps: int) -> Tensor:
    """[steps+1] fp32: 1, 1 - 1/steps, ..., 1/steps, 0, with the scheduler's own shift applied."""
    import numpy as np

    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps))
    result: Tensor = scheduler.sigmas.to(torch.float32).cpu().clone()
    return result


def _without_bars() -> None:
    """diffusers and transformers draw a progress bar for every file, which takes longer than reading these."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def save(folder: Path, net: nn.Module, text_encoder: nn.Module, autoencoder: PatchAutoencoder, scores: object) -> None:
    """A diffusers-shaped folder in 16-bit safetensors."""
    import copy

    from diffusers import FlowMatchEulerDiscreteScheduler
    from safetensors.torch import save_file

    _without_bars()
    folder.mkdir(parents=True, exist_ok=True)
    half = torch.float16  # more mantissa than bf16, and every weight is far inside its range
    copy.deepcopy(net).to(half).save_pretrained(folder / "transformer")  # type: ignore[operator]
    config = folder / "transformer" / "config.json"  # diffusers notes the folder that the weights were loaded from
    described = json.loads(config.read_text())
    described.pop("_name_or_path", None)
    config.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    copy.deepcopy(text_encoder).to(half).save_pretrained(folder / "text_encoder")  # type: ignore[operator]
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    buffers = {name: buffer.to(half).contiguous() for name, buffer in autoencoder.state_dict().items()}
    save_file(buffers, folder / "autoencoder.safetensors")
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")


@dataclass(frozen=True)
class Tiny:
    """The embedded world's generator: an SD3 transformer of 2.3 M parameters that draws 32x32 pictures.

    `path`: a folder that `rlkit pretrain-world` wrote; by default the weights that ship with rlkit.
    """

    kind = "flow"
    tasks = ("t2i",)
    licence = "Apache-2.0"
    parameters = "2.3 M"
    paper = ""

    path: str | None = None

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The network and its frozen neighbours. The text encoder and the autoencoder stay in fp32."""
        return assemble(Path(self.path) if self.path else BASE, device, dtype)


def assemble(folder: Path, device: torch.device, dtype: torch.dtype, shown: int = 0) -> FlowModel:
    """A folder's model, whose network sees `shown` pictures; RecipeError if there is none like that."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from safetensors.torch import load_file
    from transformers import CLIPTextModelWithProjection

    _without_bars()
    config = folder / "transformer" / "config.json"
    how = "rlkit pretrain-world --out DIR" + (" edit=0.4 in_context=0.3" if shown else "")
    if not config.is_file():
        what, hint = f"there is no tiny backbone in {folder}", f"Make one with: {how}"
        raise RecipeError(what, where="policy.backbone.path", hint=hint)
    if json.loads(config.read_text())["in_channels"] != COMPONENTS * (1 + shown):
        what = f"the network in {folder} does not see {shown} pictures beside its own, as this backbone does"
        raise RecipeError(what, where="policy.backbone.path", hint=f"Make one with: {how}")
    net = SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype, low_cpu_mem_usage=False)
    text_encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    autoencoder = PatchAutoencoder()
    autoencoder.load_state_dict({k: v.float() for k, v in load_file(folder / "autoencoder.safetensors").items()})
    text_encoder.to(device).eval().requires_grad_(False)
    autoencoder.to(device)

    @torch.no_grad()
    def encode(prompts: Sequence[Prompt]) -> list[Condition]:
        ids = token_ids([prompt.text for prompt in prompts]).to(device)
        tokens, pooled = encode_tokens(text_encoder, ids)
        conditions = [{"tokens": t.to(dtype), "pooled": p.to(dtype)} for t, p in zip(tokens, pooled, strict=True)]
        if shown:
            for condition, prompt in zip(conditions, prompts, strict=True):
                pictures = encode_pictures(autoencoder, [_pictures(prompt, shown)], shown)
                condition["pictures"] = pictures[0].to(dtype)
        return list(conditions)

    return FlowModel(
        net=nn.Module.to(net, device, dtype).eval(),  # from_pretrained leaves weights saved in fp32 as they are
        velocity=velocity,
        encode=encode,
        decode=autoencoder.decode,
        sigmas=partial(sigmas, scheduler),
        latent_shape=(COMPONENTS, GRID, GRID),
        lora_targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        unread=unread,
        encode_media=autoencoder.encode,
        tasks=("t2i", "edit", "in_context") if shown else ("t2i",),
    )


def encode_pictures(autoencoder: PatchAutoencoder, rows: Sequence[Sequence[Tensor]], shown: int) -> Tensor:
    """[B, shown * COMPONENTS, GRID, GRID]: the latents of each row's pictures [3, 32, 32], and zeros for those it has
    not."""
    latents = torch.zeros(len(rows), shown, COMPONENTS, GRID, GRID, device=autoencoder.mean.device)
    places = [(row, slot) for row, pictures in enumerate(rows) for slot in range(len(pictures))]
    if places:
        given = torch.stack([picture for pictures in rows for picture in pictures]).to(latents)
        latents[tuple(torch.tensor(places).T)] = autoencoder.encode(given)
    return latents.flatten(1, 2)


def _pictures(prompt: Prompt, shown: int) -> tuple[Tensor, ...]:
    """The prompt's source or references; DataError if there are too many of them, or of another size."""
    pictures = (*([] if prompt.source is None else [prompt.source]), *prompt.references)
    side = GRID * PATCH
    where = f"prompt {prompt.id}"
    if len(pictures) > shown:
        raise DataError(f"{prompt.text!r} has {len(pictures)} pictures; this backbone reads {shown}", where=where)
    for one in pictures:
        if tuple(one.shape) != (3, side, side):
            size = "x".join(str(length) for length in reversed(one.shape[1:]))
            what = f"{prompt.text!r} has a picture of {size} pixels"
            raise DataError(what, where=where, hint=f"This backbone reads {side}x{side}.")
    return pictures
