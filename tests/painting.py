"""Pictures and files of pairs, made by hand for the tests of data."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def draw_picture(path: Path, seed: int, size: tuple[int, int] = (6, 4)) -> None:
    """A picture of its own for each seed; size is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def pair_file(folder: Path, count: int = 2, rows: Sequence[object] | None = None) -> Path:
    """A file of pairs with their pictures, `chosen_0.png` and so on; `rows` are written in the place of its lines."""
    for i in range(count):
        draw_picture(folder / f"chosen_{i}.png", 2 * i)
        draw_picture(folder / f"rejected_{i}.png", 2 * i + 1)
    lines = [good_row(i) for i in range(count)] if rows is None else rows
    text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    return folder / "pairs.jsonl"


def good_row(i: int, **changes: object) -> dict[str, object]:
    return {"prompt": f"picture {i}", "chosen": f"chosen_{i}.png", "rejected": f"rejected_{i}.png", **changes}
