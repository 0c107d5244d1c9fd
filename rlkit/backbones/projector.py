"""The connector of a captioner and a generator: a language model's states become what a generator is conditioned on.

UAE (arXiv 2509.09666) puts two linear layers between Qwen2.5-VL's last hidden states and SD3.5. Here these read each
state by itself; a first layer is common to all that the generator wants, a second makes each of it:

    tokens   one for each state, then what an empty state gives, up to as many as the generator's own encoders make
    pooled   of the last state, the only one that has seen the whole answer

States are normalised first (without weights): a language model's grow with its depth. The paper writes both of "the
last hidden state" h_T and of a semantic representation; `reads: last` is h_T alone, `answer` the last layer's states of
all tokens, and `picture` its visual-only condition g(v): what the vision tower makes of the picture, no caption at all.

The caption "is then fed into the autoregressive LLM" (its figure 4): it is read again by itself. With `sees` the states
are those that it was written with. They know the picture, and the words hardly matter: in the embedded world rewards
within a group of captions then have a correlation of -.02 with the captions' truth (40 groups of 12).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlkit.errors import RecipeError
from rlkit.types import Condition, Connection

WEIGHTS, SHAPES = "connector.safetensors", "config.json"
NAMES = {"tokens": 2, "pooled": 1}  # of a condition that can be made, and how many axes each has


class Projection(nn.Module):
    """Two linear layers. shapes: of what is made, "tokens": (L, D) and "pooled": (P,)."""

    def __init__(self, states: int, inner: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.states, self.inner, self.shapes = states, inner, dict(shapes)
        self.first = nn.Linear(states, inner)
        self.second = nn.ModuleDict({name: nn.Linear(inner, shape[-1]) for name, shape in shapes.items()})

    def forward(self, states: Tensor, there: Tensor) -> dict[str, Tensor]:
        """states [B, T, H], there [B, T] bool, true from the first on -> {"tokens": [B, L, D], "pooled": [B, P]}."""
        normed = functional.layer_norm(states.float(), (self.states,)) * there[..., None]
        made: dict[str, Tensor] = {}
        if "tokens" in self.shapes:
            length = self.shapes["tokens"][0]
            placed = functional.pad(normed, (0, 0, 0, max(0, length - normed.shape[1])))[:, :length]
            made["tokens"] = self.second["tokens"](functional.gelu(self.first(placed)))
        if "pooled" in self.shapes:
            last = normed[torch.arange(len(normed)), there.sum(1) - 1]
            made["pooled"] = self.second["pooled"](functional.gelu(self.first(last)))
        return made


@dataclass(frozen=True)
class Projector:
    """Two linear layers between a captioner's states and a generator's condition."""

    kind = "connection"
    tasks = ("caption to image",)
    licence = "Apache-2.0"
    parameters = "as its neighbours are wide"
    paper = "arXiv 2509.09666"

    width: int | None = None  # of the inner layer; None: that of the captioner's states
    reads: Literal["answer", "last", "picture"] = "answer"  # states of the answer's tokens, of its last, or no words
    sees: bool = False  # the captioner has the picture before it too as it reads its caption; false: the words alone
    # Captions are read for the generator by the captioner's weights from before the first stage that trains its words;
    # false: by those that write, so that what is said and how it is understood change together.
    held: bool = False
    path: str | None = None  # a folder with the weights; `world`: those between the embedded world's; None: untrained

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise ValueError(f"width must be 1 or more, not {self.width}")

    def load(self, device: torch.device, dtype: torch.dtype) -> Connection:
        """How the network is made once its neighbours are known. Its weights are fp32 whatever theirs are."""

        def build(states: int, condition: Condition) -> nn.Module:
            shapes = shapes_of(condition)
            net = Projection(states, self.width or states, shapes)
            if self.path is not None:
                read(net, BASE if self.path == "world" else Path(self.path))
            return net.to(device)

        return Connection(build=build, reads=self.reads, sees=self.sees, held=self.held, write=write)


BASE = Path(__file__).parent / "tiny_connector_base"


def shapes_of(condition: Condition) -> dict[str, tuple[int, ...]]:
    """What has to be made. RecipeError for a generator that is told more than can be."""
    shapes = {name: tuple(value.shape) for name, value in condition.items()}
    wrong = [name for name, shape in shapes.items() if NAMES.get(name) != len(shape)]
    if wrong or not shapes:
        what = f"the generator is told {', '.join(shapes) or 'nothing'}, and this connector makes tokens and pooled"
        raise RecipeError(what, where="policy.parts", hint="Use a generator that is told these, such as sd3 or tiny.")
    return shapes


def write(net: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    from safetensors.torch import save_file

    assert isinstance(net, Projection)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: one.detach().cpu().to(dtype).contiguous() for name, one in net.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    said = {"states": net.states, "inner": net.inner, "shapes": {name: list(s) for name, s in net.shapes.items()}}
    (folder / SHAPES).write_text(json.dumps(said, indent=2) + "\n")


def read(net: Projection, folder: Path) -> None:
    """Put the folder's weights into the network; RecipeError if they are none, or of other neighbours."""
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file():
        what = f"there is no connector in {folder}: no {WEIGHTS}"
        raise RecipeError(what, where="policy.parts", hint="Give a folder that a run has exported, or leave path out.")
    found = {name: one.float() for name, one in load_file(folder / WEIGHTS).items()}
    wanted = net.state_dict()
    for name in sorted(found.keys() | wanted.keys()):
        here, there = (tuple(one[name].shape) if name in one else "nothing" for one in (wanted, found))
        if here != there:
            what = f"the connector in {folder} is of other neighbours: {name} has {there}, and these need {here}"
            raise RecipeError(
                what, where="policy.parts", hint="Set `width` to what it was made with, or leave path out."
            )
    net.load_state_dict(found)
