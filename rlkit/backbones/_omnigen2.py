"""OmniGen2's transformer and schedule (arXiv 2506.18871), which diffusers does not have.

The blocks are those of Lumina-Image 2.0. Words, the noisy latents, and each picture that is read first go through
refiners of their own; then all of them are one sequence, words ahead, the latents behind. Modules have the names of the
published weights, and the class has the name of the published configuration.

Positions (Omni-RoPE): each token has three, and each turns a part of every head. The word i has (i, i, i). A token of a
picture has the picture's instance, its row and its column, counted from 0 in every picture, so that a source and its
edited copy have the same. Behind L words the first picture's instance is L, and each next one's is further by the
longer side of the one before, in tokens. The latents come last.

What is padded is masked, and takes part in nothing: a row's answer does not depend on what it stands beside. Left out
of the authors' code are its caches that skip steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from rlkit.backbones import _diffusers as shared

MOST = 5  # pictures: there are so many index embeddings
THETA = 10000.0
Grids = Sequence[tuple[int, int]]
"""Rows and columns of the tokens of each picture of a row."""


# ---- tokens and where they are ---------------------------------------------------------------------------------------


def patches(x: Tensor, side: int = 2) -> Tensor:
    """[B, C, H, W] -> tokens [B, H/side * W/side, side * side * C]: a patch each, channels fastest."""
    n, channels, height, width = x.shape
    tiles = x.reshape(n, channels, height // side, side, width // side, side)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(n, (height // side) * (width // side), side * side * channels)


def unpatched(tokens: Tensor, height: int, width: int, side: int = 2) -> Tensor:
    """The reverse, for latents of this height and width. [B, C, H, W]"""
    tiles = tokens.reshape(len(tokens), height // side, width // side, side, side, -1)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, height, width)


def spans(sizes: Sequence[Grids]) -> Iterator[tuple[int, slice, int]]:
    """(row, where its tokens are in the row, which of the row's it is) of every picture."""
    for row, grids in enumerate(sizes):
        start = 0
        for index, (height, width) in enumerate(grids):
            yield row, slice(start, start + height * width), index
            start += height * width


def filled(counts: Sequence[int], tokens: Tensor) -> Tensor:
    """[B, S] bool: the first `counts` of each row of tokens [B, S, D]."""
    there = torch.arange(tokens.shape[1])[None] < torch.tensor(counts)[:, None]
    return there.to(tokens.device)


def positions(
    lengths: Tensor, longest: int, grids: Sequence[Grids], drawn: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of words [B, longest, 3], of pictures that are read [B, P, 3], and of the one that is drawn [B, T, 3].

    lengths: [B] words that are there; drawn: rows and columns of its tokens.
    """
    read, last = [], []
    for row in grids:
        instance, ids = 0, [torch.zeros(0, 3)]
        for height, width in row:
            ids.append(shared.grid_ids(height, width, instance))
            instance += max(height, width)
        read.append(torch.cat(ids))
        last.append(shared.grid_ids(*drawn, instance))
    behind = functional.pad(lengths[:, None, None], (0, 2))  # [B, 1, 3]: the words' number, for the instance alone
    words = torch.arange(longest, device=lengths.device)[None, :, None].expand(len(lengths), longest, 3)
    pictures = pad_sequence(read, batch_first=True).to(lengths.device)
    return words, pictures + behind, torch.stack(last).to(lengths.device) + behind


def turns(places: Tensor, axes: Sequence[int]) -> Tensor:
    """Positions [B, S, 3] -> complex numbers of length 1 [B, S, sum(axes) / 2], by which pairs of channels turn."""
    angles = []
    for axis, size in enumerate(axes):
        powers = torch.arange(0, size, 2, dtype=torch.float64, device=places.device) / size
        angles.append(places[..., axis, None].double() / THETA**powers)
    whole = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(whole), whole).to(torch.complex64)


def turned(heads: Tensor, turn: Tensor) -> Tensor:
    """Queries or keys [B, S, N, D] by turns [B, S, D / 2]; channels 2i and 2i + 1 are a pair."""
    pairs = torch.view_as_complex(heads.float().reshape(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn[:, :, None]).flatten(3)


def waves(time: Tensor, scale: float, size: int = 256) -> Tensor:
    """[B] -> [B, size]: cosines, then sines."""
    rates = torch.exp(-math.log(THETA) * torch.arange(size // 2, device=time.device) / (size // 2))
    angles = scale * (time.float()[:, None] * rates)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# ---- layers ----------------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """Root mean square norm, computed in fp32. torch's own takes no weight of another precision than its input."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Every token looks at those of its row that are there. Several heads of queries share one of keys and values."""

    def __init__(self, size: int, heads: int, shared_heads: int) -> None:
        super().__init__()
        each = size // heads
        self.each, self.share = each, heads // shared_heads
        self.norm_q, self.norm_k = Norm(each, 1e-5), Norm(each, 1e-5)
        self.to_q = nn.Linear(size, heads * each, bias=False)
        self.to_k = nn.Linear(size, shared_heads * each, bias=False)
        self.to_v = nn.Linear(size, shared_heads * each, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(heads * each, size, bias=False)])

    def forward(self, x: Tensor, there: Tensor, turn: Tensor) -> Tensor:
        """x [B, S, D], there [B, S] bool, turn [B, S, each / 2]."""
        query, key, value = (layer(x).unflatten(-1, (-1, self.each)) for layer in (self.to_q, self.to_k, self.to_v))
        query, key = turned(self.norm_q(query), turn), turned(self.norm_k(key), turn)
        key, value = (one.repeat_interleave(self.share, dim=2) for one in (key, value))
        query, key, value = (one.to(value.dtype).transpose(1, 2) for one in (query, key, value))  # [B, N, S, each]
        heads = functional.scaled_dot_product_attention(query, key, value, attn_mask=there[:, None, None])
        mixed: Tensor = self.to_out[0](heads.transpose(1, 2).flatten(2))
        return mixed


class FeedForward(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(size, inner, bias=False)
        self.linear_2 = nn.Linear(inner, size, bias=False)
        self.linear_3 = nn.Linear(size, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.linear_1(x)
        mixed: Tensor = self.linear_2(functional.silu(gate.float()).to(gate.dtype) * self.linear_3(x))
        return mixed


class Modulation(nn.Module):
    """A norm that the time scales; it also gives what the time does to the rest of a block."""

    def __init__(self, size: int, time_size: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(time_size, 4 * size)
        self.norm = Norm(size, eps)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, S, D], time [B, E] -> x, the attention's gate, the feed-forward's scale and its gate [B, 1, D]."""
        scale, gate, next_scale, next_gate = self.linear(functional.silu(time))[:, None].chunk(4, dim=-1)
        return self.norm(x) * (1 + scale), gate, next_scale, next_gate


class Block(nn.Module):
    """Attention, then feed-forward, each normed before and behind. Words' refiners have no time."""

    def __init__(self, size: int, heads: int, shared_heads: int, inner: int, eps: float, timed: bool = True) -> None:
        super().__init__()
        self.attn = Attention(size, heads, shared_heads)
        self.feed_forward = FeedForward(size, inner)
        self.norm1 = Modulation(size, min(size, 1024), eps) if timed else Norm(size, eps)
        self.ffn_norm1, self.norm2, self.ffn_norm2 = (Norm(size, eps) for _ in range(3))

    def forward(self, x: Tensor, there: Tensor, turn: Tensor, time: Tensor | None = None) -> Tensor:
        if time is None:
            x = x + self.norm2(self.attn(self.norm1(x), there, turn))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        read, gate, scale, next_gate = self.norm1(x, time)
        x = x + gate.tanh() * self.norm2(self.attn(read, there, turn))
        return x + next_gate.tanh() * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * (1 + scale)))


class Beginning(nn.Module):
    """The time as the blocks take it [B, E], and words as wide as they are [B, L, D]."""

    def __init__(self, size: int, text_size: int, eps: float, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.timestep_embedder = nn.ModuleDict(
            {"linear_1": nn.Linear(256, min(size, 1024)), "linear_2": nn.Linear(*(min(size, 1024),) * 2)}
        )
        self.caption_embedder = nn.Sequential(Norm(text_size, eps), nn.Linear(text_size, size))

    def forward(self, time: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.timestep_embedder.values()
        return second(functional.silu(first(waves(time, self.scale).to(words.dtype)))), self.caption_embedder(words)


class End(nn.Module):
    """Tokens scaled by the time, then as patches of latents."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(min(size, 1024), size)
        self.norm = nn.LayerNorm(size, eps=1e-6, elementwise_affine=False)
        self.linear_2 = nn.Linear(size, out)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        tokens: Tensor = self.linear_2(self.norm(x) * (1 + self.linear_1(functional.silu(time)))[:, None])
        return tokens


# ---- the network -----------------------------------------------------------------------------------------------------


@cache
def network() -> type[Any]:
    """The transformer's class. It is made when asked for, since diffusers is imported for it: for reading and writing
    weights, for adapters, and for computing activations again."""
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.loaders import PeftAdapterMixin

    class OmniGen2Transformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
        _supports_gradient_checkpointing = True

        @register_to_config
        def __init__(
            self,
            patch_size: int = 2,
            in_channels: int = 16,
            out_channels: int | None = None,
            hidden_size: int = 2304,
            num_layers: int = 26,
            num_refiner_layers: int = 2,
            num_attention_heads: int = 24,
            num_kv_heads: int = 8,
            multiple_of: int = 256,
            ffn_dim_multiplier: float | None = None,
            norm_eps: float = 1e-5,
            axes_dim_rope: tuple[int, int, int] = (32, 32, 32),
            axes_lens: tuple[int, int, int] = (300, 512, 512),  # of the authors' tables, which are not needed here
            text_feat_dim: int = 1024,
            timestep_scale: float = 1.0,
        ) -> None:
            super().__init__()
            each = hidden_size // num_attention_heads
            if each != sum(axes_dim_rope):
                raise ValueError(f"heads are {each} wide, and axes_dim_rope are {list(axes_dim_rope)}, not as much")
            inner = multiple_of * math.ceil(int(4 * hidden_size * (ffn_dim_multiplier or 1)) / multiple_of)
            patch = patch_size**2 * in_channels
            self.x_embedder = nn.Linear(patch, hidden_size)
            self.ref_image_patch_embedder = nn.Linear(patch, hidden_size)
            self.time_caption_embed = Beginning(hidden_size, text_feat_dim, norm_eps, timestep_scale)

            def blocks(count: int, timed: bool = True) -> nn.ModuleList:
                sizes = (hidden_size, num_attention_heads, num_kv_heads, inner)
                return nn.ModuleList([Block(*sizes, norm_eps, timed) for _ in range(count)])

            self.noise_refiner = blocks(num_refiner_layers)
            self.ref_image_refiner = blocks(num_refiner_layers)
            self.context_refiner = blocks(num_refiner_layers, timed=False)
            self.layers = blocks(num_layers)
            self.norm_out = End(hidden_size, patch_size**2 * (out_channels or in_channels))
            self.image_index_embedding = nn.Parameter(0.02 * torch.randn(MOST, hidden_size))
            self.gradient_checkpointing = False

        def forward(
            self, x: Tensor, time: Tensor, words: Tensor, there: Tensor, pictures: Tensor, grids: Tensor
        ) -> Tensor:
            """data - noise [B, C, H, W] for noisy latents x [B, C, H, W] at time [B], 0 for noise and 1 for data.

            words [B, L, D], of which `there` [B, L] bool are; tokens of pictures [B, P, 4C], and their grids [B, K, 2],
            with zeros where a row has fewer.
            """
            height, width, side = *x.shape[-2:], self.config.patch_size
            sizes = [[(rows, columns) for rows, columns in row if rows] for row in grids.tolist()]
            places = positions(there.sum(dim=1), there.shape[1], sizes, (height // side, width // side))
            word_turn, picture_turn, turn = (turns(one, self.config.axes_dim_rope) for one in places)
            moment, text = self.time_caption_embed(time, words)
            text = self._through(self.context_refiner, text, there, word_turn)
            drawn = self.x_embedder(patches(x, side))
            whole = torch.ones(drawn.shape[:2], dtype=torch.bool, device=x.device)
            drawn = self._through(self.noise_refiner, drawn, whole, turn, moment)
            read, read_there = self._refined(pictures, sizes, picture_turn, moment)
            tokens = self._through(
                self.layers,
                torch.cat([text, read, drawn], dim=1),
                torch.cat([there, read_there, whole], dim=1),
                torch.cat([word_turn, picture_turn, turn], dim=1),
                moment,
            )
            return unpatched(self.norm_out(tokens[:, -drawn.shape[1] :], moment), height, width, side)

        def _refined(
            self, pictures: Tensor, sizes: Sequence[Grids], turn: Tensor, moment: Tensor
        ) -> tuple[Tensor, Tensor]:
            """Tokens [B, P, D] of the pictures, each refined by itself, and which are there [B, P]."""
            tokens = self.ref_image_patch_embedder(pictures)
            there = filled([sum(height * width for height, width in row) for row in sizes], tokens)
            found = list(spans(sizes))
            if not found:
                return tokens, there
            parts = [tokens[row, span] + self.image_index_embedding[index] for row, span, index in found]
            together = pad_sequence(parts, batch_first=True)
            inside = filled([len(part) for part in parts], together)
            refined = self._through(
                self.ref_image_refiner,
                together,
                inside,
                pad_sequence([turn[row, span] for row, span, _ in found], batch_first=True),
                moment[[row for row, _, _ in found]],
            )
            return refined.new_zeros(tokens.shape).masked_scatter(there[..., None], refined[inside]), there

        def _through(self, blocks: nn.ModuleList, x: Tensor, *rest: Tensor) -> Tensor:
            for block in blocks:
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x = self._gradient_checkpointing_func(block, x, *rest)
                else:
                    x = block(x, *rest)
            return x

    return OmniGen2Transformer2DModel


# ---- the schedule ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """The family's scheduler. diffusers has one of the same name, with other options."""

    follows_size: bool

    @classmethod
    def from_pretrained(cls, folder: Path) -> Schedule:
        config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
        return cls(bool(config.get("dynamic_time_shift", True)))

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        """[steps + 1] fp32 from 1 down to 0, for latents of this height and width: 40 x 40 have even steps."""
        shift = math.sqrt(height * width) / 40 if self.follows_size else 1.0
        even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return (shift * even / (1 + (shift - 1) * even)).float()
