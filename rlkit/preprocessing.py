"""What a checkpoint's preprocessor_config.json asks for, on tensors: resize, cut or pad, shift and scale.

Pictures stay tensors from the first step to the last, on the network's device. So a gradient can reach the picture, and
neither PIL nor torchvision is needed. The numbers are those of PIL but for its rounding to bytes.
Not here: mirror images, patches of several sizes, and whatever else a processor of one single model does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

FILTERS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}  # by PIL's numbers, as configured


@dataclass(frozen=True)
class Preprocessing:
    """What a network wants done to a picture: resize, cut or pad, shift and scale.

    fit: 'short' makes the shorter side as long as `size`, and cuts the middle `crop` out; 'pad' makes the longer side
    that long, and fills up with black; 'stretch' makes the picture `size`; 'keep' leaves it.
    """

    fit: Literal["short", "pad", "stretch", "keep"]
    size: tuple[int, int]  # (height, width)
    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]
    crop: tuple[int, int] | None = None  # (height, width)
    resample: Literal["bicubic", "bilinear"] = "bicubic"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """As a preprocessor_config.json says. What is not understood is an error: a guess would shift all scores."""
        if not math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255):
            raise ValueError(f"rescale_factor={config['rescale_factor']} is not 1/255")
        number = config.get("resample", 3)
        if number not in FILTERS:
            raise ValueError(f"resample={number} is none of 2 (bilinear), 3 (bicubic)")
        if config.get("do_pad"):
            raise ValueError("do_pad is not understood")
        fit: Any = "stretch"
        if config.get("do_resize") is False:
            fit = "keep"
        elif isinstance(config["size"], int) or "shortest_edge" in config["size"]:
            fit = "short"
        size = (0, 0) if fit == "keep" else _size(config["size"])
        cut = bool(config.get("crop_size")) and config.get("do_center_crop") is not False
        crop = _size(config["crop_size"]) if cut else None
        if crop and fit != "keep" and (crop[0] > size[0] or crop[1] > size[1]):
            raise ValueError(f"crop_size={crop} is larger than size={size}")
        plain = config.get("do_normalize") is False
        mean, std = ((0.0,) * 3, (1.0,) * 3) if plain else (tuple(config["image_mean"]), tuple(config["image_std"]))
        return cls(fit, size, mean, std, crop, FILTERS[number])

    def __call__(self, media: Tensor) -> Tensor:  # [N, 3, H, W] in 0..1, fp32 -> [N, 3, h, w]
        height, width = media.shape[-2:]
        size = self._resized(height, width)
        for step in ((height, size[1]), size):  # PIL's filters in its order: along rows, clipped, then along columns
            if step != tuple(media.shape[-2:]):
                media = functional.interpolate(media, step, mode=self.resample, antialias=True).clamp(0, 1)
        if self.fit == "pad":
            down, right = self.size[0] - size[0], self.size[1] - size[1]
            media = functional.pad(media, (right // 2, right - right // 2, down // 2, down - down // 2))
        if self.crop:
            top, left = (media.shape[-2] - self.crop[0]) // 2, (media.shape[-1] - self.crop[1]) // 2
            if min(top, left) < 0:
                raise ValueError(f"a picture of {height} x {width} is smaller than the {self.crop} to be cut out of it")
            media = media[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = media.new_tensor(self.mean), media.new_tensor(self.std)
        return (media - mean[:, None, None]) / std[:, None, None]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.fit == "short":  # whole numbers as PIL's users round them: down
            side, short = self.size[0], min(height, width)
            return (side, int(side * width / height)) if short == height else (int(side * height / width), side)
        if self.fit == "pad":
            scale = max(self.size) / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        return self.size if self.fit == "stretch" else (height, width)


def _size(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, Mapping) and "shortest_edge" in value and "longest_edge" not in value:
        return value["shortest_edge"], value["shortest_edge"]
    if isinstance(value, Mapping) and {"height", "width"} <= set(value):
        return value["height"], value["width"]
    raise ValueError(f"size {value!r} is not understood; it is a number, shortest_edge, or height and width")
