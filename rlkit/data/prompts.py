"""What a recipe may say under `data:`. What a step draws is a pure function of (seed, stage, step), so a resumed run
sees the same prompts.

Each class is the schema of its YAML: world, prompts (a file), images (a folder), hub (a Hugging Face data set), mixture
(several of these) and pairs. How lists of prompts are walked through is told in epochs.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rlkit import registry
from rlkit.agents.experience import Bundle, told
from rlkit.data.epochs import Choices, Listed, PromptBatch, Prompts, Size, Source, check_counts, listed
from rlkit.data.mixture import Mixed
from rlkit.data.pairs import HALVES, read_pairs
from rlkit.data.picture_files import Picture, Unread
from rlkit.data.picture_folders import metadata_file, read_folder
from rlkit.data.tables import check_columns, first_columns, given, hub_columns, load_table, read_prompts, read_table
from rlkit.errors import RecipeError, nearest
from rlkit.types import Prompt, seed_of
from rlkit.world import atlas, grammar, instructions, scenes

__all__ = [  # the entries, and what other rooms need to go with them
    "DATA",
    "HALVES",
    "FilePrompts",
    "HubPrompts",
    "ImageFolder",
    "Mixture",
    "PairFile",
    "Picture",
    "PromptBatch",
    "Prompts",
    "WorldPrompts",
    "read_pairs",
]


@dataclass(frozen=True)
class WorldPrompts:
    """What the embedded world asks for, drawn by kind from one split; held-out meanings are never trained on.

    t2i: captions. edit: a source picture and what to change in it. in_context: one or two references, and a scene to
    put them into. caption: a picture, for a policy that writes; what it was drawn from is its metadata `caption`.
    agent: what only the atlas knows the look of; metadata `caption` is the truth, `script` what a teacher writes.
    """

    per_step: int  # prompts a step
    group: int  # pictures a prompt
    task: Literal["t2i", "edit", "in_context", "caption", "agent"] = "t2i"
    kinds: tuple[str, ...] | None = None  # trained on, by the world's weights; None: all
    split: Literal["train", "validation"] = "train"  # never the held-out one
    held_out_split: Literal["held_out", "validation"] = "held_out"  # "validation" is for tuning
    flawed: float = 0.0  # task agent: how much of the flaws there is in scripts that no experience helps, 0..1
    experience: float = 0.0  # task agent: the share of prompts whose system text says what helps

    def __post_init__(self) -> None:
        check_counts(self.per_step, self.group)
        for name, share in (("flawed", self.flawed), ("experience", self.experience)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be a share from 0 to 1, not {share}")
            if share and self.task != "agent":
                raise ValueError(f"{name} is for the task agent, not {self.task}: leave it out, or set task: agent")
        known = {"caption": grammar.KINDS, "agent": atlas.KINDS}.get(self.task) or instructions.kinds(self.task)
        for kind in self.kinds or ():
            if kind not in known:
                what = "caption" if self.task == "t2i" else f"the task {self.task}"
                raise ValueError(f"no kind of {what} named {kind!r}.{nearest(kind, known)}")

    @property
    def gives(self) -> tuple[str, ...]:
        own = {"edit": ("source",), "in_context": ("references",), "caption": ("source",), "agent": ("demonstration",)}
        return ("prompt", "metadata", *own.get(self.task, ()))

    def open(self) -> Source:
        return self

    def draw(self, seed: int, stage: str, step: int) -> PromptBatch:
        rng = np.random.default_rng(seed_of(seed, stage, step, "prompts"))
        if self.task == "agent":
            asked = atlas.draw(self.split, self.per_step, rng, self.kinds or ())
            return PromptBatch(tuple(_taught(one, rng, self) for one in asked), self.group)
        if self.task != "t2i":
            task, made = ("t2i", _pictured) if self.task == "caption" else (self.task, _instruction)
            examples = instructions.draw(task, self.split, self.per_step, rng, self.kinds or ())
            return PromptBatch(tuple(made(example) for example in examples), self.group)
        captions = grammar.draw(self.split, self.per_step, rng)
        if self.kinds:
            weights = np.array([grammar.KINDS[kind] for kind in self.kinds])
            kinds = rng.choice(self.kinds, self.per_step, p=weights / weights.sum()).tolist()
            pools = [grammar.split(self.split, kind) for kind in kinds]
            captions = [pool[int(u * len(pool))] for pool, u in zip(pools, rng.random(self.per_step), strict=True)]
        return PromptBatch(tuple(_prompt(caption) for caption in captions), self.group)

    def held_out(self, count: int) -> tuple[Prompt, ...]:
        """Of all kinds, whatever is trained on: leaving a hard one out must not flatter the score."""
        if self.task == "agent":
            return tuple(_request(one) for one in atlas.panel(self.held_out_split, count))
        if self.task != "t2i":
            task, made = ("t2i", _pictured) if self.task == "caption" else (self.task, _instruction)
            return tuple(made(example) for example in instructions.panel(task, self.held_out_split, count))
        return tuple(_prompt(caption) for caption in grammar.panel(self.held_out_split, count))

    def texts(self) -> tuple[str, ...]:
        return ()

    def everything(self) -> None:
        """There is no end to what it can ask for."""

    def shares(self) -> Mapping[Size | None, float]:
        return {None: 1.0}

    def take(self, key: tuple[int, str, int], size: Size | None, start: int, count: int) -> tuple[Prompt, ...]:
        """Drawn anew for each step: there are no epochs to be at some place of."""
        return replace(self, per_step=count).draw(*key).prompts

    def panel_sizes(self) -> Mapping[Size | None, float]:
        return {None: 1.0}

    def panel(self, count: int, size: Size | None) -> tuple[Prompt, ...]:
        return self.held_out(count)


def _prompt(caption: grammar.Caption) -> Prompt:
    return Prompt(id=seed_of(caption.text), text=caption.text, kind=caption.kind)


def _request(asked: atlas.Request) -> Prompt:
    known = {"caption": asked.caption.text, "subject": asked.subject, "style": asked.style}
    return Prompt(id=seed_of(asked.text), text=asked.text, kind=asked.kind, metadata=known)


def _taught(asked: atlas.Request, rng: np.random.Generator, data: WorldPrompts) -> Prompt:
    """A request with what a teacher writes, and in its share with what experience says, which the teacher follows."""
    helped = rng.random() < data.experience
    prompt = replace(_request(asked), system=told(Bundle(**atlas.lesson(asked, rng))) if helped else "")
    script = atlas.script(asked, rng, 0.0 if helped else data.flawed)
    return replace(prompt, id=seed_of(prompt.key), metadata={**prompt.metadata, "script": script})


def _pictured(example: instructions.Example) -> Prompt:
    (picture,) = torch.from_numpy(scenes.render_scenes([example.answer]))
    prompt = Prompt(id=0, text="", kind=example.kind, metadata={"caption": example.text}, source=picture)
    return replace(prompt, id=seed_of(prompt.key))


def _instruction(example: instructions.Example) -> Prompt:
    pictures = tuple(torch.from_numpy(scenes.render_scenes(example.shown)))
    prompt = Prompt(
        id=0,
        text=example.text,
        kind=example.kind,
        source=pictures[0] if example.task == "edit" else None,
        references=pictures if example.task == "in_context" else (),
    )
    return replace(prompt, id=seed_of(prompt.key))


@dataclass(frozen=True)
class FilePrompts:
    """A file of prompts: text, one a line; JSON lines, .csv or .parquet with "prompt" (or "text") and other columns.

    Some columns are more than metadata: "target_text", a text or a list of what should be legible in the picture;
    "source", the file of a picture to edit or to repeat, and "references", a list of such files; "size", [height,
    width] of the picture wanted. Paths begin where the file lies. `columns` says what these are called in the file.
    """

    path: str
    per_step: int
    group: int
    held_out_path: str | None = None  # evaluated on, a file with the same columns; none: no held-out evaluation
    columns: Mapping[str, str | None] = field(default_factory=dict)  # {prompt: THEIR NAME, ...}; null: not for us
    held_out_share: float = 0.0  # of the prompts, chosen by a hash of what they say and show
    held_out_salt: str = ""  # another text, another choice
    sizes: tuple[tuple[int, int], ...] | None = None  # [[height, width], ...]: each prompt gets the nearest shape
    max_broken: float = 0.0  # stop above this share of prompts whose pictures cannot be read; 0: at the first
    verify: bool = False  # open every picture before the first step

    def __post_init__(self) -> None:
        _choices(self)
        check_columns(self.columns)
        _one_held_out(self.held_out_share, "held_out_path", self.held_out_path)

    @property
    def gives(self) -> tuple[str, ...]:
        """What the first row has."""
        return given(self.columns, first_columns(Path(self.path)))

    def open(self) -> Source:
        kept = read_prompts(Path(self.held_out_path), self.columns) if self.held_out_path else ()
        look = Path(self.path).suffix not in (".parquet", ".arrow")  # what lies in a table itself is not missing
        return listed(read_prompts(Path(self.path), self.columns), kept, _choices(self), self.path, look)


@dataclass(frozen=True)
class ImageFolder:
    """A folder of pictures, those of its folders too, each of them a prompt: to edit, or to draw once more.

    Its text stands in NAME.txt beside NAME.png; or in metadata.jsonl (or .csv), whose rows have "file_name", "prompt"
    (or "text") and what else a file of prompts may have; or is one `text` for all.
    """

    path: str
    per_step: int
    group: int
    used_as: Literal["source", "references"] = "source"  # what the picture is to the prompt
    text: str | None = None  # of every prompt, for instance "repeat this picture"
    held_out_path: str | None = None  # evaluated on, a folder of the same kind; none: no held-out evaluation
    columns: Mapping[str, str | None] = field(default_factory=dict)  # {prompt: THEIR NAME, ...}; null: not for us
    held_out_share: float = 0.0  # of the prompts, chosen by a hash of what they say and show
    held_out_salt: str = ""  # another text, another choice
    sizes: tuple[tuple[int, int], ...] | None = None  # [[height, width], ...]: each prompt gets the nearest shape
    max_broken: float = 0.0  # stop above this share of prompts whose pictures cannot be read; 0: at the first
    verify: bool = False  # open every picture before the first step

    def __post_init__(self) -> None:
        _choices(self)
        check_columns(self.columns)
        _one_held_out(self.held_out_share, "held_out_path", self.held_out_path)
        if self.text is not None and not self.text.strip():
            raise ValueError("text must say something. Leave it out where each picture has its own")
        for name, taken in (("prompt", self.text), (self.used_as, self.used_as)):
            if taken is not None and self.columns.get(name) is not None:
                raise ValueError(
                    f"columns.{name} is taken: {'text' if name == 'prompt' else 'used_as'} says what it is"
                )

    @property
    def gives(self) -> tuple[str, ...]:
        metadata = metadata_file(Path(self.path))
        there = first_columns(metadata) if metadata else None if not Path(self.path).is_dir() else []
        words = given({**self.columns, self.used_as: None}, there)
        return (*words, self.used_as)

    def open(self) -> Source:
        both = [Path(one) for one in (self.path, self.held_out_path) if one]
        rows, *kept = [read_folder(one, self.used_as, self.text, self.columns) for one in both]
        return listed(rows, kept[0] if kept else (), _choices(self), self.path)


@dataclass(frozen=True)
class HubPrompts:
    """A Hugging Face data set: OWNER/NAME on the hub, a folder that `save_to_disk` wrote, a file or folder of parquet,
    arrow, JSON lines or csv. Never one that has to be run.

    Its columns are those of a file of prompts; pictures may lie in the table, as its Image columns, or beside it.
    """

    path: str
    per_step: int
    group: int
    config: str | None = None  # of several that one name stands for
    split: str = "train"
    revision: str | None = None  # a branch, a tag or a commit on the hub; a commit is what stays as it is
    held_out_split: str | None = None  # evaluated on, another split; none: no held-out evaluation
    columns: Mapping[str, str | None] = field(default_factory=dict)  # {prompt: THEIR NAME, ...}; null: not for us
    held_out_share: float = 0.0  # of the prompts, chosen by a hash of what they say and show
    held_out_salt: str = ""  # another text, another choice
    sizes: tuple[tuple[int, int], ...] | None = None  # [[height, width], ...]: each prompt gets the nearest shape
    max_broken: float = 0.0  # stop above this share of prompts whose pictures cannot be read; 0: at the first
    verify: bool = False  # open every picture before the first step

    def __post_init__(self) -> None:
        _choices(self)
        check_columns(self.columns)
        _one_held_out(self.held_out_share, "held_out_split", self.held_out_split)
        if self.held_out_split == self.split:
            raise ValueError(f"held_out_split must not be the split to train on, {self.split!r}")

    @property
    def gives(self) -> tuple[str, ...]:
        return given(self.columns, hub_columns(Path(self.path)))

    def open(self) -> Source:
        kept = self._rows(self.held_out_split) if self.held_out_split else ()
        return listed(self._rows(self.split), kept, _choices(self), self.path, look=False)

    def _rows(self, split: str) -> tuple[Unread, ...]:
        table = load_table(self.path, self.config, split, self.revision)
        place = Path(self.path).expanduser()
        where = self.path if split == "train" else f"{self.path} ({split})"
        return read_table(table, where, place if place.is_dir() else place.parent, self.columns)


def _choices(entry: FilePrompts | ImageFolder | HubPrompts) -> Choices:
    return Choices(**{one.name: getattr(entry, one.name) for one in fields(Choices)})


def _one_held_out(share: float, name: str, other: str | None) -> None:
    if share and other:
        raise ValueError(f"held_out_share and {name} exclude each other: evaluation is on one of them")


@dataclass(frozen=True)
class PairFile:
    """Pairs of pictures, one of them preferred, for the rollout `dataset`; the other keys of a line are metadata.

    JSON lines with "prompt" and with "chosen" and "rejected", picture files whose paths begin where the JSON lies; or
    a folder that `datasets.save_to_disk` wrote, with columns of these names.
    """

    gives = ("prompt", "metadata", "pair")

    path: str
    per_step: int  # pairs a step
    group: int = 2  # a pair is a group of two
    held_out_path: str | None = None  # prompts to evaluate on, sampled by the policy; none: no held-out evaluation
    held_out_split: Literal["held_out", "validation"] | None = None  # the embedded world's captions in their place
    verify: bool = True  # look at every picture before the first step; false: only at whether its file is there
    max_broken: float = 0.0  # stop above this share of pairs whose pictures cannot be read; 0: at the first

    def __post_init__(self) -> None:
        self._choices()
        if self.group != 2:
            raise ValueError(f"group must be 2, not {self.group}: a pair is a group of two pictures. Leave it out")
        if self.held_out_path and self.held_out_split:
            raise ValueError("held_out_path and held_out_split exclude each other: evaluation is on one of them")
        if self.max_broken and not self.verify:
            raise ValueError("max_broken needs verify: true here: a pair is handed out as it lies")

    def open(self) -> Listed:
        kept = read_prompts(Path(self.held_out_path)) if self.held_out_path else ()
        pairs = [Unread(pair) for pair in read_pairs(Path(self.path), self.verify, self.max_broken)]
        world = WorldPrompts(1, 1, held_out_split=self.held_out_split) if self.held_out_split else None
        return replace(listed(pairs, kept, self._choices(), self.path), instead=world)

    def _choices(self) -> Choices:
        return Choices(self.per_step, self.group, max_broken=self.max_broken)


@dataclass(frozen=True)
class Mixture:
    """Several sources. A step draws the source of each of its prompts by weight; each source walks its own epochs."""

    sources: Mapping[str, Mapping[str, Any] | None]  # NAME: {name: prompts, path: ..., weight: 2}; null: not this one
    per_step: int  # prompts a step, of all sources together
    group: int

    def __post_init__(self) -> None:
        check_counts(self.per_step, self.group)
        if not self._named():
            raise ValueError("sources must name one or more: {NAME: {name: prompts, path: ..., weight: 1}}")
        self._entries()
        self._weights()

    @property
    def gives(self) -> tuple[str, ...]:
        """What all sources give."""
        each = [entry.gives for entry in self._entries().values()]
        return tuple(word for word in each[0] if all(word in one for one in each))

    def open(self) -> Prompts:
        opened = {name: entry.open() for name, entry in self._entries().items()}
        return Mixed(opened, self._weights(), self.per_step, self.group)

    def _named(self) -> dict[str, Mapping[str, Any]]:
        return {name: source for name, source in self.sources.items() if source is not None}

    def _weights(self) -> dict[str, float]:
        weights = {name: source.get("weight", 1.0) for name, source in self._named().items()}
        for name, weight in weights.items():
            if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < float("inf"):
                raise ValueError(f"sources.{name}.weight must be a number above 0, not {weight!r}")
        return weights

    def _entries(self) -> dict[str, Any]:
        return {name: self._entry(f"sources.{name}", source) for name, source in self._named().items()}

    def _entry(self, where: str, source: Mapping[str, Any]) -> Any:
        kind, known = source.get("name"), [one for one in DATA if one not in ("pairs", "mixture")]
        if kind not in known:
            near = nearest(str(kind), known)
            raise ValueError(f"{where}.name must be one of {', '.join(known)}, not {kind!r}.{near}")
        own = {key: value for key, value in source.items() if key not in ("name", "weight")}
        for key in ("per_step", "group"):
            if key in own:
                raise ValueError(f"{where}.{key} is said of the mixture as a whole: leave it out here")
        own |= {"per_step": self.per_step, "group": self.group}
        try:
            return registry.construct(DATA[str(kind)], own, where, what=f"data {kind!r}")
        except RecipeError as error:  # where the mixture stands in the recipe, only the caller knows
            raise ValueError(str(error)) from error


DATA: dict[str, type[Any]] = {
    "world": WorldPrompts,
    "prompts": FilePrompts,
    "images": ImageFolder,
    "hub": HubPrompts,
    "mixture": Mixture,
    "pairs": PairFile,
}
