"""Pictures between tensors and the forms that others read: arrays of bytes, PIL, PNG, data URIs.

Outgoing pictures are always lossless: JPEG moves a pixel by 2 in the mean and 20 at worst, which a policy can learn.
PNG level 1 is five times as fast as the usual level 6, and a little larger. Incoming bytes may be anybody's: `read`
takes PNG and JPEG alone, looks at the size before it decodes, and says no with one kind of error.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

_ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}  # what is lacking in a file that was cut off


class PictureError(ValueError):
    """Bytes or numbers that are no picture that is accepted here."""


def to_uint8(media: Tensor) -> np.ndarray:
    """[3, H, W] or [N, 3, H, W] in 0..1 -> [H, W, 3] or [N, H, W, 3], rounded. What is outside 0..1 is clipped."""
    if media.ndim not in (3, 4) or media.shape[-3] != 3 or not media.is_floating_point():
        shape = f"{media.dtype} of shape {tuple(media.shape)}"
        raise PictureError(f"a picture is floats [3, H, W] or [N, 3, H, W] in 0..1, not {shape}")
    media = media.detach().to("cpu", torch.float32)
    if not torch.isfinite(media).all():  # it would become an arbitrary byte, and be scored
        raise PictureError("the picture has pixels that are NaN or infinite")
    return (media.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).contiguous().numpy()


def to_pil(media: Tensor) -> Image.Image:
    """One picture [3, H, W] in 0..1."""
    from PIL import Image

    if media.ndim != 3:
        raise PictureError(f"one picture has shape [3, H, W], not {tuple(media.shape)}")
    return Image.fromarray(to_uint8(media))


def from_pil(image: Image.Image) -> Tensor:
    """A picture in RGB as [3, H, W] in 0..1."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255


def png(media: Tensor, level: int = 1) -> bytes:
    """One picture [3, H, W] as a PNG file."""
    buffer = io.BytesIO()
    to_pil(media).save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def data_uri(media: Tensor) -> str:
    """One picture [3, H, W] as the text that chat endpoints take in the place of an address."""
    return "data:image/png;base64," + base64.b64encode(png(media)).decode()


def read(data: bytes, *, max_side: int = 4096, max_bytes: int = 64 << 20) -> Tensor:
    """A PNG or JPEG file as [3, H, W] in 0..1, turned upright, on white where it is transparent.

    PictureError if it is anything else, damaged, cut off, or larger than allowed."""
    from PIL import Image, ImageOps

    if len(data) > max_bytes:
        raise PictureError(f"a picture of {len(data)} bytes; at most {max_bytes} are read")
    try:
        with Image.open(io.BytesIO(data), formats=tuple(_ENDS)) as image:  # reads the header only
            if max(image.size) > max_side:
                width, height = image.size
                raise PictureError(f"a picture of {width}x{height}; at most {max_side} a side are read")
            if _ENDS[str(image.format)] not in data:  # PIL may be told, by anybody in the process, to pad such files
                raise PictureError("the picture is cut off")
            pixels = np.array(_rgb(ImageOps.exif_transpose(image)))
    except PictureError:
        raise
    except Exception as error:  # decoders raise a dozen kinds at damaged files, and all of them mean the same
        raise PictureError(f"not a PNG or JPEG that can be read ({type(error).__name__})") from error
    return torch.from_numpy(pixels).movedim(-1, 0).contiguous().float() / 255


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip 16 bits at 255
        raise PictureError("the picture has 16 bits a channel; write it with 8")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
