"""The embedded world's policy for all three tasks: drawing, editing a picture, and putting what others show into one.

`tiny` with two pictures in further channels of its input, as InstructPix2Pix (arXiv 2211.09800) gives a network the
picture to edit: the source, or one reference or two, and zeros where there is none. The words say which they are. The
shipped weights are what `rlkit pretrain-world` made of tiny's; `tiny_omni_base/scores.json` says how.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rlkit.backbones import tiny
from rlkit.types import FlowModel

BASE = Path(__file__).parent / "tiny_omni_base"


@dataclass(frozen=True)
class TinyOmni:
    """The embedded world's generator for text-to-image, editing and in-context generation: `tiny` that sees pictures.

    `path`: a folder that `rlkit pretrain-world` wrote with `edit` and `in_context`; by default the weights that ship.
    """

    kind = "flow"
    tasks = ("t2i", "edit", "in_context")
    licence = "Apache-2.0"
    parameters = "2.3 M"
    paper = ""

    path: str | None = None

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel:
        """The network and its frozen neighbours. The text encoder and the autoencoder stay in fp32."""
        return tiny.assemble(Path(self.path) if self.path else BASE, device, dtype, tiny.SHOWN)
