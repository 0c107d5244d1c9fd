"""`rlkit pretrain-encoder`: make the embedded world's image encoder, whose cosine says "these two show the same".

CLIP on procedurally drawn pictures of the training captions, of which the picture tower alone is kept. Two things are
not as in CLIP. A batch is made of families: a caption and others that differ from it in one fact, because captions
drawn at random differ in nearly all. And whatever caption is true of a picture is a positive of it: "a red circle and a
blue square" is no wrong answer to a picture of "a red circle left of a blue square".
Not here: which pictures are alike to the eye. Where a caption leaves a place open, any place is as good as another.
Learned last, and hardly by the weights that ship: which way two objects stand to each other.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rlkit.embedding import Pictures, load_pictures
from rlkit.preprocessing import Preprocessing
from rlkit.pretrain import likeness
from rlkit.pretrain.schedule import follow, rate
from rlkit.types import generator
from rlkit.world import grammar, scenes
from rlkit.world.checker import Detection, judge
from rlkit.world.grammar import Caption
from rlkit.world.scenes import Scene

WIDTH, LAYERS, HEADS, PATCH = 96, 4, 4, 8
EMBEDDING = 64
THINGS = tuple((colour, shape) for colour in grammar.COLOURS for shape in grammar.SHAPES)
MEAN, STD = 0.15, 0.25  # of the pixels of the world's pictures, about


@dataclass(frozen=True)
class Encoding:
    """Settings of one pretraining run. `samples` is the length of the schedule, in pictures."""

    samples: int = 240_000
    batch: int = 128
    family: int = 4  # pictures whose captions differ from the first one's in a fact each
    lr: float = 4e-3
    warmup: int = 100  # optimiser steps
    decay: float = 0.5  # share of the schedule over which the rate falls linearly to 0
    ema: float = 0.998
    scale: float = 10.0  # of the cosines in the loss. Fixed: the larger it is, the closer together they may stay
    noise: float = 0.05  # standard deviation of what is added to half of the pictures: a generator draws no clean edges
    seed: int = 0
    threads: int = 1
    evaluate_every: int = 20_000  # samples
    evaluate_on: int = 400  # captions of the validation split
    score_on: int = 512  # captions of the validation and of the held-out split, at the end
    stop_at: int | None = None  # samples after which to stop inside the schedule; None: at its end

    def __post_init__(self) -> None:
        if self.family < 1 or self.batch % self.family:
            raise ValueError(f"batch={self.batch} is not made of whole families of {self.family}")
        for name in ("samples", "scale", "warmup", "evaluate_every", "evaluate_on", "score_on"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.stop_at is not None and self.stop_at <= 0:
            raise ValueError(f"stop_at must be above 0, or none, not {self.stop_at}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is a share within (0, 1], not {self.decay}")
        if self.noise < 0:
            raise ValueError(f"noise is a standard deviation, 0 or more, not {self.noise}")


def families(count: int, size: int, numbers: np.random.Generator) -> list[Caption]:
    """`count` training captions one after another, each followed by `size` - 1 that differ from it in one fact: always
    in its relation or place, if it has one, which are learned last."""
    found = []
    for caption in grammar.draw("train", count, numbers):
        near = list(likeness.neighbours(caption, ("train",)).values())
        chosen = [near[-1], *(near[i] for i in numbers.integers(len(near), size=size - 1))][: size - 1]
        found += [caption, *(some[numbers.integers(len(some))] for some in chosen)]
    return found


def truths(captions: Sequence[Caption], drawn: Sequence[Scene]) -> Tensor:
    """[scenes, captions] bool: is the caption true of the scene, in the eyes of the world's checker?"""
    table = torch.zeros(len(drawn), len(captions), dtype=torch.bool)
    of_objects: dict[tuple[grammar.Object, ...], list[int]] = {}
    for column, caption in enumerate(captions):
        of_objects.setdefault(tuple(sorted(caption.targets)), []).append(column)
    for row, scene in enumerate(drawn):
        seen = [Detection(item.colour, item.shape, item.x, item.y, 0) for item in scene]
        for column in of_objects.get(tuple(sorted((item.colour, item.shape) for item in scene)), ()):
            table[row, column] = judge(seen, captions[column]).strict == 1
    return table


# -------------------------------------------------------------------------------------------------- the network


def new_network() -> Any:
    """An untrained CLIP: 0.4 M parameters that see, and half as many that read."""
    from transformers import CLIPConfig, CLIPModel

    end = grammar.VOCABULARY.index("<eos>")
    size = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": HEADS}
    seen = size | {"num_hidden_layers": LAYERS, "image_size": scenes.SIZE, "patch_size": PATCH}
    read = size | {
        "num_hidden_layers": 2,
        "vocab_size": len(grammar.VOCABULARY),
        "max_position_embeddings": grammar.LENGTH,
        "pad_token_id": grammar.PAD,
        "bos_token_id": grammar.BOS,
        "eos_token_id": end,
    }
    width = {"projection_dim": EMBEDDING}
    return CLIPModel(CLIPConfig(vision_config=seen | width, text_config=read | width, **width))


def new_parts() -> nn.ModuleDict:
    """The network, and three tutors that are thrown away with the text tower: linear layers that say what each patch
    shows, and what the whole picture holds where."""
    net = new_network()
    # CLIP's own start is for 400 M pictures: patches would be all but invisible beside the biases, places beside both.
    nn.init.normal_(net.vision_model.embeddings.patch_embedding.weight, std=0.1)
    nn.init.normal_(net.vision_model.embeddings.position_embedding.weight, std=0.3)
    sizes = {"colour": len(grammar.COLOURS) + 1, "shape": len(grammar.SHAPES) + 1, "inventory": 3 * len(THINGS)}
    return nn.ModuleDict({"net": net, **{name: nn.Linear(WIDTH, size) for name, size in sizes.items()}})


def loss_of(parts: Any, captions: Sequence[Caption], drawn: Sequence[Scene], pictures: Tensor, scale: float) -> Tensor:
    """CLIP's symmetric cross-entropy, its target spread evenly over all true pairs; and the tutors' losses, without
    which shapes and places take many times as many pictures. pictures [N, 3, 32, 32] in 0..1."""
    net = parts["net"]
    output = net.vision_model(pixel_values=(pictures - MEAN) / STD)
    seen = functional.normalize(net.visual_projection(output.pooler_output), dim=-1)
    tokens = torch.tensor([grammar.tokenize(one.text) for one in captions])
    read = functional.normalize(net.get_text_features(input_ids=tokens).pooler_output, dim=-1)
    logits = scale * seen @ read.T  # [pictures, captions]
    target = truths(captions, drawn).float()
    rows = functional.cross_entropy(logits, target / target.sum(1, keepdim=True))
    columns = functional.cross_entropy(logits.T, (target / target.sum(0)).T)
    patches = output.last_hidden_state[:, 1:].flatten(0, 1)  # [N * patches, WIDTH]; the first is the class token
    named = sum(functional.cross_entropy(parts[fact](patches), there) for fact, there in shown(drawn).items())
    count, places = inventory(drawn)
    said = parts["inventory"](output.pooler_output).unflatten(1, (len(THINGS), 3))
    wrong = (said[..., 0] - count).square().sum(1) + ((said[..., 1:] - places).square().sum(2) * (count > 0)).sum(1)
    return (rows + columns) / 2 + named + wrong.mean()


def shown(drawn: Sequence[Scene]) -> dict[str, Tensor]:
    """The colour and the shape in each patch, [N * patches] int64: those of the object whose box fills most of it; the
    last number is for none."""
    side = scenes.SIZE // PATCH
    corners = np.arange(side) * PATCH
    colours = np.full((len(drawn), side, side), len(grammar.COLOURS))
    shapes = np.full((len(drawn), side, side), len(grammar.SHAPES))
    for row, scene in enumerate(drawn):
        most = np.full((side, side), 4.0)  # pixels; less shows nothing
        for item in scene:
            x, y = (
                np.minimum(centre + item.extent, corners + PATCH) - np.maximum(centre - item.extent, corners)
                for centre in (item.x, item.y)
            )
            area = np.maximum(y, 0)[:, None] * np.maximum(x, 0)[None]  # of its box, within each patch
            mine = area > most
            most = np.where(mine, area, most)
            colours[row][mine] = list(grammar.COLOURS).index(item.colour)
            shapes[row][mine] = grammar.SHAPES.index(item.shape)
    return {"colour": torch.from_numpy(colours).flatten(), "shape": torch.from_numpy(shapes).flatten()}


def inventory(drawn: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Of each thing, how many there are [N, things], and their mean place [N, things, 2] in -1..1 from the middle."""
    count, places = torch.zeros(len(drawn), len(THINGS)), torch.zeros(len(drawn), len(THINGS), 2)
    half = scenes.SIZE / 2
    for row, scene in enumerate(drawn):
        for item in scene:
            thing = THINGS.index((item.colour, item.shape))
            count[row, thing] += 1
            places[row, thing] += torch.tensor([item.x / half - 1, item.y / half - 1])
    return count, places / count.clamp(min=1)[..., None]


# ----------------------------------------------------------------------------------------------------- training


def pretrain_encoder(out: Path, settings: Encoding, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train, evaluate on the validation split now and then, and write the folder `out`.

    Its scores are measured on the 16-bit weights as they were written, on the held-out split once.
    """
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)  # the initial weights: transformers draws from the global generator
    numbers = np.random.default_rng(settings.seed)
    draws = generator(settings.seed, "pretrain-encoder")
    parts = new_parts().train()
    average = copy.deepcopy(parts).eval().requires_grad_(False)
    parameters = list(parts.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    started, history, running, seen = time.process_time(), [], [], 0
    while seen < settings.samples:
        captions = families(settings.batch // settings.family, settings.family, numbers)
        drawn = [scenes.compose(caption, numbers) for caption in captions]
        pictures = _noised(torch.from_numpy(scenes.render_scenes(drawn)), settings.noise, draws)
        loss = loss_of(parts, captions, drawn, pictures, settings.scale)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate(seen, settings.samples, settings.batch, settings.warmup, settings.decay)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        before, seen = seen, seen + settings.batch
        follow(average.parameters(), parameters, seen / settings.batch, settings.ema)
        running.append(loss.item())
        if before // settings.evaluate_every != seen // settings.evaluate_every or seen >= settings.samples:
            found = likeness.evaluate(_encoder(average), "validation", settings.evaluate_on)
            minutes = (time.process_time() - started) / 60  # of a core that may be shared with others
            stand = {"samples": seen, "cpu_minutes": round(minutes, 2), "loss": round(float(np.mean(running)), 4)}
            history.append(stand | found)
            running.clear()
            say(str(history[-1]))
            save(out, average)
            if seen >= (settings.stop_at or settings.samples):
                break
    return finish(out, settings, history)


def _noised(pictures: Tensor, noise: float, draws: torch.Generator) -> Tensor:
    """Every other picture with noise of a strength of its own, up to `noise`."""
    strength = noise * torch.rand(len(pictures), 1, 1, 1, generator=draws)
    strength[::2] = 0
    return (pictures + strength * torch.randn(pictures.shape, generator=draws)).clamp(0, 1)


def _encoder(parts: Any) -> Pictures:
    """The network's picture tower, as it will be loaded."""
    keep = Preprocessing("keep", (0, 0), (MEAN,) * 3, (STD,) * 3)
    return Pictures(lambda x: parts["net"].get_image_features(pixel_values=x), keep, torch.device("cpu"), torch.float32)


def save(folder: Path, parts: Any) -> None:
    """The picture tower alone, in 16 bits, as transformers' CLIPVisionModelWithProjection."""
    from transformers import CLIPVisionModelWithProjection
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    net = parts["net"]
    with torch.random.fork_rng():  # its own first weights must not move what is drawn for the others
        tower = CLIPVisionModelWithProjection(net.config.vision_config)
    tower.vision_model.load_state_dict(net.vision_model.state_dict())
    tower.visual_projection.load_state_dict(net.visual_projection.state_dict())
    tower.to(torch.float16).save_pretrained(folder)  # more mantissa than bf16, and every weight is far inside its range
    read = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,  # pictures of other sizes; those of the world are left as they are
        "size": {"height": scenes.SIZE, "width": scenes.SIZE},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(read, indent=2) + "\n")


def finish(out: Path, settings: Encoding, history: list[dict[str, float]]) -> dict[str, Any]:
    """Score the weights as they lie on disk, and write that beside them."""
    encoder = load_pictures(str(out.resolve()), torch.device("cpu"), "fp32")
    scores: dict[str, Any] = {
        "command": "rlkit pretrain-encoder --out DIR "
        + " ".join(f"{name}={value}" for name, value in asdict(settings).items() if value is not None),
        "settings": asdict(settings),
        "history": history,
    }
    for split in ("validation", "held_out"):
        scores[split] = likeness.evaluate(encoder, split, settings.score_on)
        scores[split] |= likeness.evaluate_drawn(encoder, split, max(1, settings.score_on // 4))
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores
