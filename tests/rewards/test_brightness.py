"""Brightness: closed values, a gradient that is the same everywhere, and bad input."""

from collections.abc import Callable

import pytest
import torch

from rlkit.rewards.brightness import REC_709, Brightness
from rlkit.types import Samples


def flat(*colours: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(colours).view(-1, 3, 1, 1).expand(-1, 3, 5, 7)


def test_flat_colours_have_known_values(samples_of: Callable[..., Samples]) -> None:
    media = flat((0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    values = Brightness()(samples_of(media, [""] * 6))
    torch.testing.assert_close(values, torch.tensor([0, 1, 0.5, 0.2126, 0.7152, 0.0722]))
    assert values.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 31, 256, 1024])
def test_white_is_1_at_every_size_and_in_low_precision(size: int, samples_of: Callable[..., Samples]) -> None:
    white = torch.ones(1, 3, size, size)
    assert Brightness()(samples_of(white, ["white"])).item() == 1, "more would be outside the range, and not counted"
    assert Brightness()(samples_of(white.bfloat16(), ["white"])).item() == 1


def test_the_gradient_is_the_same_at_every_pixel(samples_of: Callable[..., Samples]) -> None:
    media = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(Brightness()(samples_of(media, ["a", "b"])).sum(), media)
    expected = torch.tensor(REC_709).view(1, 3, 1, 1).expand(2, 3, 4, 6) / 24
    torch.testing.assert_close(gradient, expected)
    assert Brightness.differentiable


def test_nothing_and_what_is_no_picture(samples_of: Callable[..., Samples]) -> None:
    assert Brightness()(samples_of(torch.zeros(0, 3, 4, 4), [])).shape == (0,)
    with pytest.raises(ValueError, match=r"brightness is of pictures \[N, 3, H, W\], not \[1, 4, 4, 4\]"):
        Brightness()(samples_of(torch.zeros(1, 4, 4, 4), ["a"]))
    broken = torch.stack([torch.full((3, 2, 2), torch.nan), torch.ones(3, 2, 2)])
    assert Brightness()(samples_of(broken, ["a", "b"])).isnan().tolist() == [True, False], "its own row alone"
