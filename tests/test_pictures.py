"""Pictures: lossless on their way out, and on their way in nothing but a whole PNG or JPEG of an allowed size."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from rlkit.pictures import PictureError, data_uri, png, read, to_pil, to_uint8


def picture(height=5, width=7, seed=0):
    values = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed))
    return values.float() / 255


def file_of(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_bytes_are_rounded_and_clipped():
    values = torch.tensor([-1.0, 0.0, 0.49 / 255, 0.51 / 255, 1.0, 2.0])
    media = values.expand(3, 1, 6)
    assert to_uint8(media)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]
    assert to_uint8(media).shape == (1, 6, 3)
    assert to_uint8(media.to(torch.float64)).tolist() == to_uint8(media).tolist()


def test_several_pictures_and_those_with_a_gradient():
    media = torch.stack([picture(seed=0), picture(seed=1)])
    both = to_uint8(media.requires_grad_())
    assert both.shape == (2, 5, 7, 3)
    assert np.array_equal(both[1], to_uint8(media[1]))
    assert to_uint8(torch.zeros(0, 3, 4, 4)).shape == (0, 4, 4, 3)
    assert to_uint8(torch.ones(3, 2, 2, dtype=torch.bfloat16)).min() == 255


@pytest.mark.parametrize(
    "media",
    [torch.zeros(1, 4, 4), torch.zeros(4, 4, 3), torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(2, 2, 3, 4, 4)],
)
def test_what_is_no_picture_is_said_so(media):
    with pytest.raises(PictureError, match=r"a picture is floats \[3, H, W\]"):
        to_uint8(media)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_are_not_made_into_some(value):
    media = picture()
    media[1, 2, 3] = value
    with pytest.raises(PictureError, match="NaN or infinite"):
        png(media)


def test_one_picture_is_one():
    assert to_pil(picture()).size == (7, 5)
    with pytest.raises(PictureError, match="one picture"):
        to_pil(picture()[None])


@pytest.mark.parametrize("level", [0, 1, 9])
def test_png_loses_nothing(level):
    assert torch.equal(read(png(picture(33, 18), level)), picture(33, 18))


def test_a_data_uri_is_the_png():
    uri = data_uri(picture())
    assert uri.startswith("data:image/png;base64,")
    assert base64.b64decode(uri.partition(",")[2]) == png(picture())


def test_jpeg_is_read():
    grey = Image.new("RGB", (16, 8), (10, 200, 90))
    found = read(file_of(grey, "JPEG", quality=95))
    assert found.shape == (3, 8, 16)
    assert found.dtype == torch.float32
    assert torch.allclose(found * 255, torch.tensor([10.0, 200.0, 90.0]).view(3, 1, 1), atol=3)


def test_other_modes_become_rgb():
    assert read(file_of(Image.new("L", (2, 2), 51), "PNG")).unique().tolist() == pytest.approx([0.2])
    palette = Image.new("RGB", (2, 2), (255, 0, 0)).convert("P")
    assert read(file_of(palette, "PNG"))[:, 0, 0].tolist() == [1, 0, 0]


def test_what_is_transparent_lies_on_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))  # transparent black: without its alpha it would be black
    image.putpixel((1, 0), (255, 0, 0, 255))
    assert read(file_of(image, "PNG"))[:, 0].T.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_sixteen_bits_are_refused_and_not_clipped():
    deep = Image.fromarray(np.full((2, 2), 30000, dtype=np.uint16))
    with pytest.raises(PictureError, match="16 bits"):
        read(file_of(deep, "PNG"))


def test_a_turned_photograph_is_upright():
    image = Image.new("RGB", (2, 1), "white")
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    assert read(file_of(image, "JPEG", exif=exif)).shape == (3, 2, 1)


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "WEBP"])
def test_other_formats_are_refused(form):
    with pytest.raises(PictureError, match="PNG or JPEG"):
        read(file_of(Image.new("RGB", (4, 4)), form))


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"hello", b"\xff\xd8\xff\xd9", bytes(1000)])
def test_garbage_is_refused(data):
    with pytest.raises(PictureError):
        read(data)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_picture_that_is_cut_off_anywhere_is_refused(form, padded, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", padded)  # some library may have set it for everybody
    whole = file_of(to_pil(picture(24, 24)), form)
    for length in range(0, len(whole), 7):
        with pytest.raises(PictureError):
            read(whole[:length])
    with pytest.raises(PictureError):
        read(whole[:-1])


def test_damage_is_a_picture_error_or_another_picture():
    whole = bytearray(png(picture(12, 12)))
    refused = 0
    for place in range(len(whole)):
        whole[place] ^= 0x10
        try:
            assert read(bytes(whole)).ndim == 3
        except PictureError:
            refused += 1
        whole[place] ^= 0x10
    assert refused > 20


def bomb(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(4097, 1), (1, 4097), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_decoded(size, monkeypatch):
    def decode(*_):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with pytest.raises(PictureError):
        read(bomb(*size))


def test_the_limits_are_the_callers():
    with pytest.raises(PictureError, match="7x5; at most 6"):
        read(png(picture()), max_side=6)
    assert read(png(picture()), max_side=7).shape == (3, 5, 7)
    data = png(picture())
    with pytest.raises(PictureError, match=f"{len(data)} bytes; at most"):
        read(data, max_bytes=len(data) - 1)
    assert read(data, max_bytes=len(data)).shape == (3, 5, 7)
