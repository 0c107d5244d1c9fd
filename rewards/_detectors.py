"""Detectors for claims about pictures: what loads one, by name, and how its answers become a `Detection`.

Four families of transformers classes, and the reader of the embedded world, which loads nothing. A detector with a
fixed list of classes says so when it is asked for another one, and none calls a picture empty because its own numbers
are broken.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkit import registry
from rlkit.clauses import Detection, Detector, Wanted
from rlkit.embedding import frozen, load_network
from rlkit.pictures import to_pil
from rlkit.types import Unscored
from rlkit.world.checker import UNKNOWN, detect_batch
from rlkit.world.grammar import COLOURS, SHAPES
from rlkit.world.scenes import SIZE

USUAL = {  # the checkpoint of each family where none is named; what follows the @ is a revision
    "mask2former": "facebook/mask2former-swin-small-coco-instance",
    "detr": "facebook/detr-resnet-50@no_timm",
    "owlv2": "google/owlv2-base-patch16-ensemble",
    "grounding_dino": "IDEA-Research/grounding-dino-base",
    "world": "",
}
ALIASES = {  # classes that GenEval calls otherwise than COCO
    "computer keyboard": "keyboard",
    "computer mouse": "mouse",
    "tv remote": "remote",
}
SEPARATORS = ("[CLS]", "[SEP]", ".", "?")  # between the phrases that Grounding DINO reads
BROKEN = Unscored("the detector's own numbers are not finite")


def check(name: str) -> None:
    """ValueError where nothing is called so. A name with a colon is somebody's own and is looked up when it loads."""
    if name not in USUAL and ":" not in name:
        near = get_close_matches(name, USUAL, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"detector={name!r} is none of {', '.join(USUAL)}, nor package.module:function{hint}")


def load(name: str, path: str | None, device: torch.device) -> Detector:
    """The detector of this name. One's own function is called with (path, device) and returns a `Detector`."""
    if ":" in name:
        own: Detector = registry.load("rewards", name)(path, device)
        return own
    if name == "world":
        return read_world
    if name == "mask2former":
        importlib.import_module("scipy")  # transformers wants it for this model's loss, and says so less clearly
    from transformers import (
        AutoImageProcessor,
        AutoModelForObjectDetection,
        AutoModelForUniversalSegmentation,
        AutoModelForZeroShotObjectDetection,
        AutoProcessor,
    )

    repository, options = checkpoint(path or USUAL[name])
    kind, reader = {
        "mask2former": (AutoModelForUniversalSegmentation, AutoImageProcessor),
        "detr": (AutoModelForObjectDetection, AutoImageProcessor),
        "owlv2": (AutoModelForZeroShotObjectDetection, AutoProcessor),
        "grounding_dino": (AutoModelForZeroShotObjectDetection, AutoProcessor),
    }[name]
    model = frozen(load_network(kind, repository, **options), device, "fp32")
    processor = reader.from_pretrained(repository, **options)
    if name in ("mask2former", "detr"):
        return _Closed(model, processor, _segments if name == "mask2former" else _boxes)
    return _Open(model, processor, _ask_owl if name == "owlv2" else _ask_grounding)


def checkpoint(path: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` is called with, for a folder, a repository, or repository@revision."""
    repository, _, revision = path.partition("@")
    return (path, {}) if Path(path).is_dir() or not revision else (repository, {"revision": revision})


# --------------------------------------------------------------------------------------- a fixed list of classes


Read = tuple[list[int], Detection] | Unscored  # the label ids of what was found in one picture, and the rest of it


@dataclass(frozen=True)
class _Closed:
    """A model that was taught certain classes."""

    model: Any
    processor: Any
    read: Callable[[Any, Any, float, tuple[int, int]], list[Read]]  # (processor, outputs, least score, size)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, wanted: Sequence[Wanted]) -> list[Detection | Unscored]:
        known = {str(name).casefold(): int(number) for number, name in self.model.config.id2label.items()}
        inputs = self.processor(images=[to_pil(one) for one in pictures], return_tensors="pt")
        outputs = self.model(**inputs.to(self.model.device))
        lowest = min(one.threshold for one in wanted)
        answers: list[Detection | Unscored] = []
        for one, read in zip(wanted, self.read(self.processor, outputs, lowest, _size(pictures)), strict=True):
            spoken = {_number(label, known): label for label in one.labels}
            if None in spoken:
                answers.append(Unscored(f"the detector knows no class {spoken[None]!r}"))
            elif len(spoken) < len(one.labels):
                answers.append(Unscored(f"two of the classes {', '.join(one.labels)} are the same to the detector"))
            else:
                answers.append(read if isinstance(read, Unscored) else _only(*read, spoken))
        return answers


def _number(label: str, known: Mapping[str, int]) -> int | None:
    plain = label.strip().casefold()
    return known.get(plain, known.get(ALIASES.get(plain, plain)))


def _only(ids: Sequence[int], found: Detection, spoken: Mapping[int | None, str]) -> Detection:
    """The objects of the wanted classes, under the names that were asked for."""
    rows = [row for row, number in enumerate(ids) if number in spoken]
    kept = found.select(rows)
    return Detection(kept.boxes, tuple(spoken[ids[row]] for row in rows), kept.scores, kept.masks)


def _boxes(processor: Any, outputs: Any, lowest: float, size: tuple[int, int]) -> list[Read]:
    sizes = [size] * len(outputs.logits)
    answers = processor.post_process_object_detection(outputs, threshold=lowest, target_sizes=sizes)
    return [
        BROKEN if bad else (one["labels"].tolist(), _detection(one["boxes"], one["scores"]))
        for one, bad in zip(answers, _broken(outputs.logits), strict=True)
    ]


def _segments(processor: Any, outputs: Any, lowest: float, size: tuple[int, int]) -> list[Read]:
    logits = outputs.class_queries_logits
    answers = processor.post_process_instance_segmentation(
        outputs, threshold=lowest, target_sizes=[size] * len(logits), return_binary_maps=True
    )
    found: list[Read] = []
    for one, bad in zip(answers, _broken(logits), strict=True):
        info = one["segments_info"]
        masks = one["segmentation"].bool().cpu() if info else torch.zeros(0, *size, dtype=torch.bool)
        scores = torch.tensor([segment["score"] for segment in info])
        numbers = [segment["label_id"] for segment in info]
        found.append(BROKEN if bad else (numbers, _detection(_around(masks), scores, masks)))
    return found


def _around(masks: Tensor) -> Tensor:
    """The bounding boxes [K, 4] of masks [K, H, W], none of them empty."""
    ends = []
    for axis in (1, 2):  # what is left: columns, then rows
        line = masks.any(axis).long()  # [K, W] or [K, H]
        ends.append((line.argmax(1), line.shape[1] - line.flip(1).argmax(1)))
    (left, right), (top, bottom) = ends
    return torch.stack([left, top, right, bottom], dim=1).float()


# ------------------------------------------------------------------------------------------- classes by their names


@dataclass(frozen=True)
class _Open:
    """A model that is told in words what to look for. Pictures of the same words share a call: no word is padded."""

    model: Any
    processor: Any
    ask: Callable[[Any, Any, Tensor, Sequence[str], float], list[Detection | Unscored]]

    @torch.no_grad()
    def __call__(self, pictures: Tensor, wanted: Sequence[Wanted]) -> list[Detection | Unscored]:
        answers: dict[int, Detection | Unscored] = {}
        for labels in dict.fromkeys(one.labels for one in wanted):
            rows = [row for row, one in enumerate(wanted) if one.labels == labels]
            lowest = min(wanted[row].threshold for row in rows)
            found = self.ask(self.model, self.processor, pictures[rows], labels, lowest)
            answers.update(zip(rows, found, strict=True))
        return [answers[row] for row in range(len(wanted))]


def _ask_owl(
    model: Any, processor: Any, pictures: Tensor, labels: Sequence[str], lowest: float
) -> list[Detection | Unscored]:
    words = [[f"a photo of a {label}" for label in labels]] * len(pictures)
    inputs = processor(text=words, return_tensors="pt", truncation=True).to(model.device)
    outputs = model(**inputs, pixel_values=_squared(pictures.to(model.device), processor.image_processor))
    sizes = [_size(pictures)] * len(pictures)
    found = processor.post_process_grounded_object_detection(outputs, threshold=lowest, target_sizes=sizes)
    return [
        BROKEN if bad else _detection(one["boxes"], one["scores"], labels=[labels[i] for i in one["labels"].tolist()])
        for one, bad in zip(found, _broken(outputs.logits), strict=True)
    ]


def _squared(pictures: Tensor, processor: Any) -> Tensor:
    """What OWLv2 sees: black below or to the right up to a square, resized, normalised. Its own processor would need
    another package for this."""
    height, width = pictures.shape[-2:]
    side = max(height, width)
    padded = torch.nn.functional.pad(pictures.float(), (0, side - width, 0, side - height))
    size = (processor.size["height"], processor.size["width"])
    resized = torch.nn.functional.interpolate(padded, size, mode="bilinear", antialias=True)
    mean, std = resized.new_tensor(processor.image_mean), resized.new_tensor(processor.image_std)
    return (resized - mean[:, None, None]) / std[:, None, None]


def _ask_grounding(
    model: Any, processor: Any, pictures: Tensor, labels: Sequence[str], lowest: float
) -> list[Detection | Unscored]:
    """A box belongs to the phrase that holds its surest word. The processor's own way reads labels out of all words
    that are sure enough, so that a label may be a piece or a mixture of the wanted ones."""
    words = ". ".join(label.strip().lower() for label in labels) + "."
    inputs = processor(
        images=[to_pil(one) for one in pictures], text=[words] * len(pictures), return_tensors="pt", truncation=True
    ).to(model.device)
    phrases = _phrases(inputs["input_ids"][0], processor.tokenizer)
    if len(phrases) != len(labels) or max(map(max, phrases)) >= model.config.max_text_len:
        return [Unscored(f"the detector cannot tell these classes apart: {words!r}")] * len(pictures)
    outputs = model(**inputs)
    chances = outputs.logits.sigmoid()  # [N, queries, words]
    scores, best = torch.stack([chances[..., phrase].amax(-1) for phrase in phrases], dim=-1).max(-1)  # [N, queries]
    height, width = _size(pictures)
    x, y, w, h = outputs.pred_boxes.unbind(-1)  # centre and size, as shares of the picture
    corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)
    boxes = corners * torch.tensor([width, height, width, height], device=corners.device)
    found: list[Detection | Unscored] = []
    for row, bad in enumerate(_broken(outputs.logits)):
        sure = scores[row] > lowest
        names = [labels[i] for i in best[row][sure].tolist()]
        found.append(BROKEN if bad else _detection(boxes[row][sure], scores[row][sure], labels=names))
    return found


def _phrases(ids: Tensor, tokenizer: Any) -> list[list[int]]:
    """The positions of the words of each phrase of one text."""
    between = set(tokenizer.convert_tokens_to_ids(list(SEPARATORS)))
    phrases: list[list[int]] = [[]]
    for place, token in enumerate(ids.tolist()):
        if token not in between:
            phrases[-1].append(place)
        elif phrases[-1]:
            phrases.append([])
    return [one for one in phrases if one]


# ------------------------------------------------------------------------------------------------ the embedded world


def read_world(pictures: Tensor, wanted: Sequence[Wanted]) -> list[Detection | Unscored]:
    """The shapes of the embedded world, with their colours: connected pixels of one colour, found by rules."""
    if _size(pictures) != (SIZE, SIZE):
        height, width = _size(pictures)
        return [Unscored(f"the world's pictures are {SIZE}x{SIZE}, not {width}x{height}")] * len(pictures)
    found = detect_batch(pictures.detach().to("cpu", torch.float32).numpy())
    answers: list[Detection | Unscored] = []
    for objects, one in zip(found, wanted, strict=True):
        strange = [*(set(one.labels) - {*SHAPES, UNKNOWN}), *(set(one.colours) - {*COLOURS, UNKNOWN})]
        if strange:
            answers.append(Unscored(f"the world knows no {min(strange)!r}"))
            continue
        # The reader gives a centre and an area; a square of that area stands for the bounding box.
        sides = [thing.area**0.5 / 2 for thing in objects]
        corners = [
            (thing.x - half, thing.y - half, thing.x + half, thing.y + half)
            for thing, half in zip(objects, sides, strict=True)
        ]
        boxes, colours = torch.tensor(corners).reshape(-1, 4), tuple(thing.colour for thing in objects)
        labels = tuple(thing.shape for thing in objects)
        answers.append(Detection(boxes, labels, torch.ones(len(objects)), colours=colours))
    return answers


# ------------------------------------------------------------------------------------------------------------ shared


def _detection(
    boxes: Tensor, scores: Tensor, masks: Tensor | None = None, labels: Sequence[str] | None = None
) -> Detection:
    names = tuple(labels) if labels is not None else ("",) * len(scores)
    return Detection(boxes.float().cpu(), names, scores.float().cpu(), masks)


def _broken(logits: Tensor) -> list[bool]:
    """Of each picture, whether a number is NaN: it would be left out as an object that is not sure enough. Minus
    infinity is how a model marks words that are not there."""
    return [bool(one) for one in logits.isnan().flatten(1).any(1)]


def _size(pictures: Tensor) -> tuple[int, int]:
    return pictures.shape[-2], pictures.shape[-1]
