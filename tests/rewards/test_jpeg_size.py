"""The size as a JPEG file: without the header, by the formula of the literature, and for what cannot be saved."""

import io
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from PIL import Image

from rlkit.rewards.jpeg_size import JpegSize
from rlkit.types import Samples, Unscored


def noise(n: int, size: int) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(size))


def file_size(picture: torch.Tensor, quality: int) -> int:
    buffer = io.BytesIO()
    pixels = (picture * 255).round().byte().movedim(0, -1).numpy()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return len(buffer.getvalue())


def test_the_formula_of_the_literature(samples_of: Callable[..., Samples]) -> None:
    media = torch.cat([noise(2, 32), torch.full((1, 3, 32, 32), 0.5)])
    values = JpegSize(mode="kb")(samples_of(media, ["", "", ""]))
    assert values == pytest.approx([-file_size(picture, 95) / 1000 / 500 for picture in media])
    assert values[2] - values[0] < 0.003, "why it is not the default: the header dominates small files"


def test_bits_are_those_beyond_a_grey_picture(samples_of: Callable[..., Samples]) -> None:
    media = torch.cat([noise(1, 32), torch.full((1, 3, 32, 32), 128 / 255)])
    values = JpegSize(quality=80)(samples_of(media, ["", ""]))
    assert values[1] == 0
    assert values[0] == pytest.approx(-8 * (file_size(media[0], 80) - file_size(media[1], 80)) / 1024)


def test_bits_do_not_depend_on_the_size_of_the_picture(samples_of: Callable[..., Samples]) -> None:
    bits = [JpegSize()(samples_of(noise(1, size), [""]))[0] for size in (32, 64, 256)]
    assert bits == pytest.approx([bits[-1]] * 3, rel=0.02)
    kilobytes = [JpegSize(mode="kb")(samples_of(noise(1, size), [""]))[0] for size in (32, 256)]
    assert kilobytes[1] < 30 * kilobytes[0]


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (32, 16)])
def test_no_picture_is_outside_the_range(shape: tuple[int, int], samples_of: Callable[..., Samples]) -> None:
    colours = torch.tensor(list(product((0.0, 0.25, 0.5, 0.502, 0.75, 1.0), repeat=3)))
    media = colours[:, :, None, None].expand(-1, 3, *shape)
    for mode in ("bits", "kb"):
        assert max(JpegSize(mode=mode)(samples_of(media, [""] * len(media)))) <= 0
    assert JpegSize.range == (None, 0.0)


def test_more_structure_costs_more(samples_of: Callable[..., Samples]) -> None:
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    media = torch.stack([torch.full((3, 64, 64), 0.5), ramp, noise(1, 64)[0]])
    for mode in ("bits", "kb"):
        values = JpegSize(mode=mode)(samples_of(media, ["", "", ""]))
        assert values[0] > values[1] > values[2]
    rough, fine = (JpegSize(quality=quality)(samples_of(media, ["", "", ""]))[2] for quality in (30, 95))
    assert rough > fine


def test_values_do_not_depend_on_the_batch(samples_of: Callable[..., Samples]) -> None:
    samples = samples_of(noise(4, 24), ["a", "b", "c", "d"])
    together = JpegSize()(samples)
    alone = [JpegSize()(samples.select(torch.tensor([row])))[0] for row in range(4)]
    assert together == alone
    assert len(set(alone)) == 4
    low = replace(samples, media=samples.media.bfloat16().requires_grad_())
    assert JpegSize()(low) == pytest.approx(together, rel=0.05)


def test_nothing_and_what_cannot_be_saved(samples_of: Callable[..., Samples]) -> None:
    assert JpegSize()(samples_of(torch.zeros(0, 3, 8, 8), [])) == []
    media = noise(2, 8)
    media[0, 0, 0, 0] = torch.nan
    bad, good = JpegSize()(samples_of(media, ["", ""]))
    assert isinstance(bad, Unscored)
    assert "NaN or infinite" in bad.reason
    assert isinstance(good, float)
    (four,) = JpegSize()(samples_of(torch.zeros(1, 4, 8, 8), [""]))
    assert isinstance(four, Unscored)
    assert "[3, H, W]" in four.reason


def test_options() -> None:
    with pytest.raises(ValueError, match=r"mode='bit' is none of bits, kb; did you mean 'bits'\?"):
        JpegSize(mode="bit")
    for quality in (0, 96):
        with pytest.raises(ValueError, match=f"quality={quality} must be 1 to 95"):
            JpegSize(quality=quality)
