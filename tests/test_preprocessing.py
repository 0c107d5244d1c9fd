"""Preprocessing on tensors against PIL and the image processor of transformers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rlkit.preprocessing import Preprocessing

SIZES = [(32, 32), (64, 48), (48, 97), (17, 90), (20, 21), (224, 160)]


def pictures(n: int, height: int = 32, width: int = 32) -> Tensor:
    """Noise in bytes: the hardest case for a filter."""
    draw = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (n, 3, height, width), generator=draw) / 255


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("edge", [32, 37])
def test_preprocessing_is_that_of_the_image_processor(size: tuple[int, int], edge: int) -> None:
    """Within a byte and a bit: theirs rounds to bytes after each of the two directions. Noise is its hardest case."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": 32, "width": 32})
    media = pictures(2, *size)
    theirs = [Image.fromarray((one.permute(1, 2, 0) * 255).round().byte().numpy()) for one in media]
    expected = processor(theirs, return_tensors="pt")["pixel_values"]
    ours = Preprocessing.from_config(processor.to_dict())(media)
    assert ours.shape == expected.shape == (2, 3, 32, 32)
    bytes_off = (ours - expected).abs() * torch.tensor(processor.image_std)[:, None, None] * 255
    assert bytes_off.max() < (0.01 if size == (edge, edge) else 1.2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "number"), [("bilinear", 2), ("bicubic", 3)])
def test_both_filters_are_those_of_pil_without_its_rounding(size: tuple[int, int], name: str, number: int) -> None:
    media = pictures(1, *size)
    shrunk = Preprocessing("stretch", (24, 40), (0,) * 3, (1,) * 3, resample=name)(media)[0]
    for ours, channel in zip(shrunk, media[0].numpy(), strict=True):
        wide = np.asarray(Image.fromarray(channel).resize((40, size[0]), resample=number)).clip(0, 1)
        expected = np.asarray(Image.fromarray(wide).resize((40, 24), resample=number)).clip(0, 1)
        torch.testing.assert_close(ours, torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_padding_keeps_the_whole_picture_in_the_middle_of_black() -> None:
    pad = Preprocessing("pad", (8, 8), (0.5,) * 3, (0.25,) * 3)
    wide = pad(torch.ones(1, 3, 3, 8))  # 5 rows to fill: 2 above, 3 below
    assert (wide[0, 0, :, 0] == torch.tensor([-2.0, -2, 2, 2, 2, -2, -2, -2])).all()
    assert pad(torch.ones(1, 3, 100, 40)).shape == (1, 3, 8, 8)
    assert pad(torch.ones(1, 3, 1, 400)).shape == (1, 3, 8, 8)  # a line does not vanish
    assert (pad(torch.ones(1, 3, 16, 16)) == 2).all()


def test_configurations_old_and_new() -> None:
    usual = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    old = {**usual, "crop_size": 224, "size": 224, "do_center_crop": True, "resample": 3}  # as OpenAI's CLIP has it
    short = Preprocessing("short", (224, 224), (0.1, 0.2, 0.3), (1, 1, 1), (224, 224))
    assert Preprocessing.from_config(old) == short
    dino = {**usual, "crop_size": None, "do_center_crop": None, "resample": 2, "size": {"height": 16, "width": 32}}
    assert Preprocessing.from_config(dino) == replace(
        short, fit="stretch", size=(16, 32), crop=None, resample="bilinear"
    )
    assert Preprocessing.from_config({**old, "do_center_crop": False}).crop is None
    kept = Preprocessing.from_config({"do_resize": False, "do_normalize": False})
    assert torch.equal(kept(pictures(1, 9, 5)), pictures(1, 9, 5))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rescale_factor": 1.0}, "rescale_factor=1.0 is not 1/255"),
        ({"resample": 1}, "resample=1 is none of"),
        ({"size": {"longest_edge": 9}}, "is not understood"),
        ({"size": {"shortest_edge": 9, "longest_edge": 9}}, "is not understood"),
        ({"crop_size": 33}, "larger than"),
        ({"do_pad": True}, "do_pad"),
    ],
)
def test_what_a_configuration_asks_and_nobody_does_is_an_error(wrong: dict[str, Any], says: str) -> None:
    usual = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "size": 32}
    assert Preprocessing.from_config(usual).size == (32, 32)
    with pytest.raises(ValueError, match=says):
        Preprocessing.from_config({**usual, **wrong})


def test_a_crop_out_of_too_small_a_picture_is_an_error() -> None:
    with pytest.raises(ValueError, match="smaller than"):
        Preprocessing("keep", (0, 0), (0,) * 3, (1,) * 3, crop=(8, 8))(pictures(1, 8, 7))
