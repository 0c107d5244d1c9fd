"""`rlkit sample`: draw prompts with a recipe's base model or a run's newest weights."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from rlkit import sources
from rlkit.commands.words import positive, recipe_or_run
from rlkit.errors import RecipeError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RECIPE_OR_RUN", help="a recipe's base model or a run's newest weights")
    parser.add_argument("words", nargs="+", metavar="PROMPT key=value")
    parser.add_argument("--n", type=positive, default=8, help="pictures of each prompt (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="where the picture goes (default: grid.png)")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    overrides = [word for word in options.words if sources.is_override(word)]
    prompts = [word for word in options.words if word not in overrides]
    if not prompts:
        raise RecipeError("what shall it draw?", hint='For instance rlkit sample RECIPE "a red circle"')
    setup, folder = recipe_or_run(options.source, overrides)

    from rlkit import dist, session

    policy = session.load_drawing(setup, dist.start(1, setup.options.device), folder)
    for prompt in prompts:
        for word in policy.model.unread(prompt):
            print(f"warning: the text encoder cannot read {word!r} in {prompt!r}", file=sys.stderr)
    pictures = session.draw(setup, policy, prompts, options.n, options.seed)
    _write_grid(options.out, pictures, columns=options.n if len(prompts) > 1 else min(options.n, 8))
    print(options.out)
    return 0


def _write_grid(path: Path, pictures: Any, columns: int) -> None:
    """pictures [N, 3, H, W] in rows of `columns`; small ones enlarged without smoothing."""
    import torch
    from PIL import Image

    count, channels, height, width = pictures.shape
    grid = torch.ones(channels, math.ceil(count / columns) * height, columns * width)
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * width
        grid[:, top : top + height, left : left + width] = picture
    image = Image.fromarray((grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    times = max(1, 128 // width)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST).save(path)
