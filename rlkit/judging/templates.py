"""Prompt files for judges, and what they can show of a sample.

Above a line `---` stands the rubric, which is the same in every request; below it the request, with `$names` for what
varies. So a server that caches prefixes reads the rubric once; in the request, too, what a group shares (the source
picture, the instruction) should stand before the picture. A prompt shows the pictures that its file names.

`$instruction` is the prompt written as a JSON string, and so is what a judge said in an earlier stage: no text can get
out of its quotation marks, and the rubrics say that what stands in them is content. `$instruction_as_is` is the bare
text, for prompt files of others.

Not every prompt has what these show; in its place stands `none`, without quotation marks, or no picture. `$truth`: what
the right picture shows, in words, from the prompt's metadata (`truth`, or else `caption`). `$target_text`: what should
be legible. `$any_references`: the reference pictures, where `$references` leaves a prompt without them unscored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.errors import nearest
from rlkit.pictures import PictureError, data_uri
from rlkit.types import Prompt, Unscored

if TYPE_CHECKING:
    from torch import Tensor

ASKED = ("instruction", "instruction_as_is")
TEXTS = (*ASKED, "truth", "target_text")
PICTURES = ("picture", "source", "references", "any_references")
TRUTHS = ("truth", "caption")  # keys of a prompt's metadata; the first that is there counts


@dataclass(frozen=True)
class Template:
    """A prompt file: the rubric, and the request as texts and names in turn."""

    rubric: str
    request: tuple[str, ...]  # text, name, text, name, ..., text

    @property
    def names(self) -> tuple[str, ...]:
        return self.request[1::2]

    def fill(self, texts: Mapping[str, str], pictures: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
        """The messages of a chat request. pictures: name -> data URIs."""
        parts: list[dict[str, Any]] = []
        run = self.request[0]
        for name, after in zip(self.names, self.request[2::2], strict=True):
            if name in pictures:
                shown = [{"type": "image_url", "image_url": {"url": uri}} for uri in pictures[name]]
                parts += [*_text(run), *shown]
                run = after
            else:
                run += texts[name] + after
        user = {"role": "user", "content": [*parts, *_text(run)]}
        return [{"role": "system", "content": self.rubric}, user] if self.rubric else [user]


def _text(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text.strip()}] if text.strip() else []


def read_template(path: Path, known: Collection[str]) -> Template:
    """The prompt file at this path. ValueError if there is none, or if it names something that is not known."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompt file {path} cannot be read: {error}") from error
    halves = re.split(r"^---[ \t]*$", text, flags=re.MULTILINE)
    if len(halves) != 2:
        raise ValueError(
            f"{path} needs exactly one line with --- between the rubric, which may be empty, and the request"
        )
    request = tuple(re.split(r"\$([A-Za-z_]\w*)", halves[1].strip()))
    for name in request[1::2]:
        if name not in known:
            raise ValueError(f"{path} names ${name}.{nearest(name, known)} Known here: {', '.join(known)}")
    return Template(halves[0].strip(), request)


def quoted(answer: str | Sequence[str]) -> str:
    """A text, or a numbered list of texts, that nothing in it can end."""
    if isinstance(answer, str):
        return json.dumps(answer, ensure_ascii=False)
    return "\n".join(f"{number}. {quoted(one)}" for number, one in enumerate(answer, 1))


def reads(templates: Mapping[str, Template]) -> tuple[str, ...]:
    """What these prompts show beside the picture, in the words of a reward's card."""
    names = _names(templates)
    texts = ("prompt",) if names & set(ASKED) else ()
    return (*texts, *(name for name in ("source", "references") if name in names))


def optional(templates: Mapping[str, Template]) -> tuple[str, ...]:
    """What they show where there is any, in the same words."""
    shown = {"truth": "metadata", "target_text": "target_text", "any_references": "references"}
    return tuple(word for name, word in shown.items() if name in _names(templates))


def _names(templates: Mapping[str, Template]) -> set[str]:
    return {name for template in templates.values() for name in template.names}


def fingerprint(templates: Mapping[str, Template]) -> str:
    """Of the prompts' texts: part of a reward's version, because other prompts give other numbers."""
    texts = [[name, one.rubric, one.request] for name, one in sorted(templates.items())]
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=4).hexdigest()


def material(
    media: Tensor, prompt: Prompt, shown: Collection[str], uris: dict[int, str]
) -> tuple[dict[str, str], dict[str, list[str]]] | Unscored:
    """What prompts can show of one sample: texts, and pictures as data URIs. `uris` keeps the sources of a call, which
    a group shares, by the tensor's identity."""
    texts = texts_of(prompt, shown)
    if isinstance(texts, Unscored):
        return texts
    if prompt.source is None and "source" in shown:
        return Unscored("the prompt has no source picture")
    if not prompt.references and "references" in shown:
        return Unscored("the prompt has no reference pictures")

    def encoded(picture: Tensor) -> str:
        if id(picture) not in uris:
            uris[id(picture)] = data_uri(picture)
        return uris[id(picture)]

    try:
        pictures = {"picture": [data_uri(media)]}
        if prompt.source is not None and "source" in shown:
            pictures["source"] = [encoded(prompt.source)]
        if "references" in shown:
            pictures["references"] = [encoded(one) for one in prompt.references]
        if "any_references" in shown:
            pictures["any_references"] = [encoded(one) for one in prompt.references]
    except PictureError as error:  # it costs this sample, and not the batch
        return Unscored(str(error))
    return texts, pictures


def texts_of(prompt: Prompt, shown: Collection[str]) -> dict[str, str] | Unscored:
    """The texts that prompts can show of a sample's prompt."""
    if not prompt.text.strip() and set(ASKED) & set(shown):
        return Unscored("the prompt is empty")
    texts = {"instruction": quoted(prompt.text), "instruction_as_is": prompt.text}
    if "target_text" in shown:
        texts["target_text"] = quoted(legible(prompt)) or "none"
    if "truth" in shown:
        truth = _truth(prompt)
        if isinstance(truth, Unscored):
            return truth
        texts["truth"] = quoted(truth) if truth else "none"
    return texts


def legible(prompt: Prompt) -> tuple[str, ...]:
    """What should be legible in the picture."""
    return tuple(one for one in prompt.target_text if one.strip())


def _truth(prompt: Prompt) -> str | Unscored:
    for key in TRUTHS:
        found = prompt.metadata.get(key)
        if found is None:
            continue
        if not isinstance(found, str):
            what = f"the prompt's metadata has {key} as {type(found).__name__} and not as a text"
            return Unscored(f"{what}: write the truth as one text, under {TRUTHS[0]}")
        if found.strip():
            return found
    return ""
