"""What a step and an evaluation say: numbers for metrics.jsonl, over all processes, and a sheet of pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rlkit import advantage
from rlkit.tracking import ASIDE, stage_of
from rlkit.types import Prompt, Rows, Samples, Scores

SHEET = 24  # pictures on a sheet of samples
COLUMNS = 8

Gather = Callable[[Tensor], Tensor]  # [n, ...] of each process -> [sum n, ...] of all, in rank order


def describe_scores(samples: Samples, scores: Scores, gather: Gather) -> dict[str, float]:
    """A training step's rewards over all processes: total, by reward and by component."""
    group, scored, total = gather(samples.group), gather(scores.scored), gather(scores.total)
    row = {"reward/mean": _mean(total, scored), "reward/std": _std(total, scored)}
    sizes = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add(0, group, scored.double())
    means = torch.zeros_like(sizes).index_add(0, group, total.double() * scored) / sizes.clamp(min=1)
    spread = (total.double() - means[group]).square() * scored
    variance = torch.zeros_like(sizes).index_add(0, group, spread) / sizes.clamp(min=1)
    row["reward/group_std"] = float(variance.sqrt().mean())
    for i, name in enumerate(scores.names):
        row[f"{name}/mean"] = _mean(gather(scores.raw[:, i]), gather(scores.valid[:, i]))
    for name, values in components_of(scores, gather).items():
        everywhere = gather(values)
        row[name] = _mean(everywhere, torch.isfinite(everywhere))
    row["zero_std"] = advantage.zero_std_fraction(total, group, scored)
    row["unscored"] = 1.0 - float(scored.double().mean())
    if samples.tokens is not None:
        row["tokens/length"] = float(gather(samples.tokens.decided.sum(1)).double().mean())
        row["tokens/cut"] = float(gather(~samples.tokens.finished).double().mean())
    return row | _describe_previews(samples, scores, gather)


def describe_ages(samples: Samples, version: int, gather: Gather) -> dict[str, float]:
    """How many updates older than the weights that learn (`version`) those were that wrote: of the oldest token of each
    answer. Pictures are always drawn by the newest."""
    if samples.tokens is None:
        return {}
    age = version - gather(samples.oldest)
    return {"age/mean": float(age.double().mean()), "age/max": float(age.max()), "stale/refilled": samples.refilled}


def _describe_previews(samples: Samples, scores: Scores, gather: Gather) -> dict[str, float]:
    """`reward_at/STEP`: the mean reward of the pictures that the states before this step of the schedule promise."""
    if samples.preview_of is None or scores.previews is None or samples.path is None:
        return {}
    at = samples.preview_of.clamp(min=0)
    promised, known = gather(scores.previews.total[at]), gather(scores.previews.scored[at] & (samples.preview_of >= 0))
    return {
        f"reward_at/{step}": _mean(promised[:, k], known[:, k]) for k, step in enumerate(samples.path.steps.tolist())
    }


def write_rows(file: Path, rows: Rows, culprit: int | None) -> None:
    """Training rows as safetensors: the tensors by name, and in its metadata the other columns as json and, as
    `culprit`, the position of the row that is to blame."""
    from safetensors.torch import save_file

    columns = rows.columns()
    tensors = {
        name: column.cpu().clone().contiguous() for name, column in columns.items() if isinstance(column, Tensor)
    }
    words = {name: json.dumps([str(one) for one in column]) for name, column in columns.items() if name not in tensors}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata=words | {"culprit": json.dumps(culprit)})


def describe_held_out(samples: Samples, scores: Scores, gather: Gather) -> dict[str, float]:
    """Held-out means of the total, of every reward and component: with standard errors, and by kind of prompt."""
    components = components_of(scores, gather)
    columns = {"reward": torch.where(scores.scored, scores.total, torch.nan)}
    if len(scores.names) > 1:  # one alone is the reward
        columns |= dict(zip(scores.names, scores.raw.unbind(1), strict=True))
    columns |= {column_of(name, components): values for name, values in components.items()}
    kinds = {prompt.kind for prompt in samples.prompts if prompt.kind}
    row: dict[str, float] = {}
    for name, here in columns.items():
        values = gather(here).double()
        finite = torch.isfinite(values)
        row[f"held_out/{name}"] = _mean(values, finite)
        row[f"held_out/{name}_se"] = _std(values, finite) / max(1, int(finite.sum())) ** 0.5
    for kind in sorted(_everywhere(sorted(kinds), gather)):
        of_kind = gather(torch.tensor([prompt.kind == kind for prompt in samples.prompts], dtype=torch.bool))
        for name, here in columns.items():
            values = gather(here)
            row[f"held_out/{name}/{kind}"] = _mean(values, of_kind & torch.isfinite(values))
    return row


def components_of(scores: Scores, gather: Gather) -> dict[str, Tensor]:
    """The components that any process has, NaN where this one has not: without samples, or after a failed reward."""
    missing = torch.full((len(scores.raw),), torch.nan)
    return {name: scores.components.get(name, missing) for name in _everywhere(list(scores.components), gather)}


def _everywhere(names: list[str], gather: Gather) -> list[str]:
    """The names that any process knows, so that all walk through the same list."""
    letters = gather(torch.tensor(list("".join(f"{name}\n" for name in names).encode()), dtype=torch.int64))
    return [name for name in dict.fromkeys(bytes(letters.tolist()).decode().split("\n")) if name]


def column_of(component: str, components: Mapping[str, Tensor]) -> str:
    """`strict` for `composition/strict`, unless another reward has a component of that name."""
    ends = [name.split("/", 1)[1] for name in components]
    end = component.split("/", 1)[1]
    return end if ends.count(end) == 1 else component


def _mean(values: Tensor, which: Tensor) -> float:
    return float(values[which].double().mean()) if bool(which.any()) else float("nan")


def _std(values: Tensor, which: Tensor) -> float:
    return float(values[which].double().std(correction=0)) if bool(which.any()) else float("nan")


def write_sheet(folder: Path, row: Mapping[str, Any], samples: Samples, scores: Scores) -> Path:
    """The first pictures of an evaluation as one PNG without gaps, and beside it what each one is and scored.

    What prompts came with, a source or references, stands to the left of each picture, in `given` cells of its size.
    It is named by the row's `at`, and by the stage too where the stage before it ended with a sheet of that name.
    """
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    media = _pictured(samples)[:SHEET]
    count, channels, height, width = media.shape
    written = samples.media.ndim < 4  # nothing was drawn: what was written about stands in the picture's place
    shown = [[] if written else _given(prompt, height, width) for prompt in samples.prompts[:SHEET]]
    given = max(len(pictures) for pictures in shown)
    rows, tile = -(-count // COLUMNS), (given + 1) * width
    sheet = torch.zeros(channels, rows * height, COLUMNS * tile)
    reward = torch.where(scores.scored, scores.total, torch.nan)
    items = []
    for i in range(count):
        top, left = i // COLUMNS * height, i % COLUMNS * tile
        for cell, picture in enumerate([*shown[i], *[None] * (given - len(shown[i])), media[i]]):
            if picture is not None:
                sheet[:, top : top + height, left + cell * width : left + (cell + 1) * width] = picture
        prompt = samples.prompts[i]
        item = {"prompt": (prompt.asked or prompt).text, "seed": int(samples.index[i]), "reward": _number(reward[i])}
        if prompt.kind:
            item["kind"] = prompt.kind
        if samples.texts:
            item["text"] = samples.texts[i]
        if len(scores.names) > 1:  # one alone is the reward
            item |= {name: _number(scores.raw[i, r]) for r, name in enumerate(scores.names)}
        parts = scores.components
        items.append(item | {column_of(name, parts): _number(values[i]) for name, values in parts.items()})
    name = folder / _sheet_name(folder, row)
    pixels = (sheet * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file, beside = (name.with_name(name.name + end) for end in (".png", ".json"))
    Image.fromarray(pixels).save(file)
    described = {"stage": row["stage"], "step": row["step"], "at": row["at"]}
    described |= {"width": width, "height": height, "given": given, "columns": COLUMNS}
    described |= {"drawn": not written, "items": items}
    beside.write_text(json.dumps(described, indent=1))
    return file


def set_aside(folder: Path, row: Mapping[str, Any]) -> None:
    """Rename the sheet of this evaluation, since another of the same stage and step comes in its place."""
    name = _sheet_name(folder, row)
    for end in (".png", ".json"):
        if (folder / (name + end)).exists():
            (folder / (name + end)).replace(folder / (name + ASIDE + end))


def _sheet_name(folder: Path, row: Mapping[str, Any]) -> str:
    """AT, or AT-STAGE where AT is the closing sheet of the stage before. Whatever the stage is called, its sheet never
    looks like one that was set aside."""
    name = f"{row['at']:06d}"
    if stage_of(folder / f"{name}.json") in (None, row["stage"]):
        return name
    stage = re.sub(r"[^\w.-]", "_", row["stage"])
    return f"{name}-{stage}" + "_" * f"-{stage}".endswith(ASIDE)


def _pictured(samples: Samples) -> Tensor:
    """What is shown of each sample [N, 3, H, W]: its picture, or what a token policy wrote about, or nothing."""
    if samples.media.ndim == 4:
        return samples.media
    sources = [prompt.source.cpu() for prompt in samples.prompts if prompt.source is not None]
    if len(sources) == len(samples) and len({one.shape for one in sources}) == 1:
        return torch.stack(sources)
    return torch.zeros(len(samples), 3, 8, 8)


def _given(prompt: Prompt, height: int, width: int) -> list[Tensor]:
    """The pictures that a prompt came with, stretched to this size: [3, height, width] in 0..1 each."""
    pictures = [*([] if prompt.source is None else [prompt.source]), *prompt.references]
    return [
        one.cpu()
        if one.shape[1:] == (height, width)
        else interpolate(one[None].cpu(), (height, width), mode="area")[0].clamp(0, 1)
        for one in pictures
    ]


def _number(value: Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None
