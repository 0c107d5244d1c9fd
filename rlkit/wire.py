"""The protocol `rlkit-reward/1`: samples on their way to a reward server, and numbers on their way back.

A message is
    "rlkit-reward/1\\n"   15 bytes
    SHA-256               32 bytes, of all that follows
    header length         4 bytes, big-endian
    header                JSON
    parts                 the pictures, one behind the other; the header says where and how large
A picture is a PNG, or raw bytes [H, W, 3]; one that several samples share travels once. The digest finds damage; it is
no signature. So whatever a message says is checked, and every length is bounded before anything is allocated by it.
Nothing is pickled, and no address or path is followed. A message that breaks a rule is a WireError, on either side.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlkit import pictures
from rlkit.types import Prompt, Samples

PROTOCOL = "rlkit-reward/1"
CONTENT_TYPE = "application/x-rlkit-reward"

LARGEST_BODY = 64 << 20  # bytes
LARGEST_HEADER = 4 << 20
LARGEST_TEXT = 16 << 10  # of a prompt, and of all its target texts together
LARGEST_METADATA = 64 << 10  # of a prompt, as JSON
DEEPEST = 8  # mappings and lists within each other
PICTURES = 256  # in a message; and samples
SIDE = 4096
PIXELS = 1 << 27  # of all samples and parts together: a PNG of a few bytes may decode to any size
COMPONENTS = 64
LONGEST_NAME = 256  # characters; of names, and of what is not meant for reading
LONGEST_REASON = 1000

_MAGIC = f"{PROTOCOL}\n".encode()
_START = len(_MAGIC) + 32  # where the digested part begins
_INT = 1 << 63

Status = Literal["ok", "failed", "timeout"]


class WireError(ValueError):
    """A message that breaks the protocol, or samples that it cannot carry."""


@dataclass(frozen=True)
class Question:
    """What a client asks."""

    samples: Samples
    reward: str | None  # of those that the server has; None: its only one
    config: str  # what the server's card said of the reward's options, so that it cannot change unseen; "": any
    id: str  # of the message, from its content: the same question again has the same


@dataclass(frozen=True)
class Result:
    """One sample's answer."""

    id: int  # the sample's
    value: float | None
    components: Mapping[str, float | None] = field(default_factory=dict)
    status: Status = "ok"
    reason: str = ""  # why there is no value

    def __post_init__(self) -> None:
        if (self.value is None) == (self.status == "ok") or bool(self.reason) != (self.value is None):
            raise WireError("an answer has either a value, or a reason why not")


# ---- questions -------------------------------------------------------------------------------------------------------


def encode_request(
    samples: Samples, reward: str | None = None, config: str = "", codec: Literal["png", "raw"] = "png"
) -> bytes:
    """The message that asks for these samples' scores. WireError if it would break a limit."""
    if not 0 < len(samples) <= PICTURES:
        raise WireError(f"{len(samples)} samples; a message has 1 to {PICTURES}")
    known: dict[tuple[Any, ...], int] = {}
    parts: list[dict[str, Any]] = []
    blobs: list[bytes] = []

    def put(picture: Tensor) -> int:
        if picture.ndim != 3:
            raise WireError(f"a picture has shape [3, H, W], not {tuple(picture.shape)}")
        try:
            pixels = pictures.to_uint8(picture)
        except pictures.PictureError as error:
            raise WireError(str(error)) from error
        key = (pixels.shape, hashlib.sha256(pixels.tobytes()).digest())
        if key not in known:
            known[key] = len(parts)
            blob = pixels.tobytes() if codec == "raw" else pictures.png(picture)
            blobs.append(blob)
            parts.append({"codec": codec, "bytes": len(blob), "height": pixels.shape[0], "width": pixels.shape[1]})
        return known[key]

    prompts: dict[str, int] = {}
    numbers: dict[int, int] = {}  # of the prompts that were met: those of a group are one object, and written once
    rows = []
    for i, prompt in enumerate(samples.prompts):
        if id(prompt) not in numbers:
            words = json.dumps(_prompt_words(prompt, put), allow_nan=False)
            numbers[id(prompt)] = prompts.setdefault(words, len(prompts))
        row = {"id": int(samples.sample_id[i]), "group": int(samples.group[i]), "picture": put(samples.media[i])}
        rows.append({**row, "prompt": numbers[id(prompt)]})
    known_prompts = [json.loads(words) for words in prompts]
    header: dict[str, Any] = {"reward": reward, "config": config, "version": samples.version}
    header |= {"prompts": known_prompts, "samples": rows, "parts": parts}
    _check_sizes(header)
    return _frame(header, blobs)


def decode_request(data: bytes) -> Question:
    """What was asked. Samples of one prompt share it, with its pictures."""
    header, body = _unframe(data)
    kinds = {"reward": (str, type(None)), "config": str, "version": int}
    _record(header, {**kinds, "prompts": list, "samples": list, "parts": list}, "the header")
    _check_sizes(header)
    decoded = list(_decode(header["parts"], body))

    def picture(number: Any) -> Tensor:
        return decoded[_index(number, len(decoded), "parts")]

    prompts = [_prompt(words, picture) for words in header["prompts"]]
    rows = header["samples"]
    group, ids = ([_whole(row[key], key) for row in rows] for key in ("group", "id"))
    if len(set(ids)) < len(ids):
        raise WireError("two samples have the same id")
    n = len(rows)
    samples = Samples(
        media=torch.stack([picture(row["picture"]) for row in rows]),
        latents=torch.zeros(n, 0),  # rewards look at pictures
        prompts=tuple(prompts[_index(row["prompt"], len(prompts), "prompts")] for row in rows),
        group=torch.tensor(group, dtype=torch.int64),
        index=torch.arange(n),
        sample_id=torch.tensor(ids, dtype=torch.int64),
        version=_whole(header["version"], "version"),
        total=n,
    )
    return Question(samples, header["reward"], header["config"], name_of(data))


def name_of(data: bytes) -> str:
    """The id of a message."""
    return hashlib.sha256(data).hexdigest()[:16]


def _check_sizes(header: Mapping[str, Any]) -> None:
    """Everything that bounds memory, from the header alone."""
    parts, rows, prompts = header["parts"], header["samples"], header["prompts"]
    if not (0 < len(rows) <= PICTURES and 0 < len(prompts) <= len(rows) and 0 < len(parts) <= PICTURES):
        raise WireError(f"a message has 1 to {PICTURES} samples and pictures, and no more prompts than samples")
    for part in parts:
        _record(part, {"codec": str, "bytes": int, "height": int, "width": int}, "a part")
        if part["codec"] not in ("png", "raw") or not (0 < part["height"] <= SIDE and 0 < part["width"] <= SIDE):
            raise WireError(f"a picture is png or raw, and 1 to {SIDE} pixels a side")
        if part["bytes"] < 1 or (part["codec"] == "raw" and part["bytes"] != 3 * part["height"] * part["width"]):
            raise WireError("a picture's size does not fit its sides")
    sizes = set()
    for row in rows:
        _record(row, {"id": int, "group": int, "picture": int, "prompt": int}, "a sample")
        part = parts[_index(row["picture"], len(parts), "parts")]
        sizes.add((part["height"], part["width"]))
    if len(sizes) != 1:
        raise WireError("the samples of a message have pictures of one size")
    ((height, width),) = sizes
    pixels = len(rows) * height * width + sum(part["height"] * part["width"] for part in parts)
    if pixels > PIXELS:
        raise WireError(f"{pixels} pixels in all; at most {PIXELS} are taken")


def _decode(parts: Sequence[Mapping[str, Any]], body: memoryview) -> Iterator[Tensor]:
    """Each part as [3, H, W] in 0..1."""
    if sum(part["bytes"] for part in parts) != len(body):
        raise WireError("the parts are not as long as the header says")
    start = 0
    for part in parts:
        height, width = part["height"], part["width"]
        blob, start = bytes(body[start : start + part["bytes"]]), start + part["bytes"]
        if part["codec"] == "raw":
            pixels = np.frombuffer(blob, np.uint8).reshape(height, width, 3)
            yield torch.from_numpy(pixels.copy()).movedim(-1, 0).contiguous().float() / 255
            continue
        try:
            picture = pictures.read(blob, max_side=max(height, width))
        except pictures.PictureError as error:
            raise WireError(str(error)) from error
        if picture.shape != (3, height, width):
            raise WireError("a picture is not of the size that the header says")
        yield picture


_PROMPT: dict[str, Any] = {"id": int, "text": str, "kind": str, "target_text": list, "metadata": dict}
_PROMPT |= {"source": (int, type(None)), "references": list}


def _prompt_words(prompt: Prompt, put: Any) -> dict[str, Any]:
    """A prompt as JSON. `put` gives a picture's number."""
    words = {"id": prompt.id, "text": prompt.text, "kind": prompt.kind, "target_text": list(prompt.target_text)}
    words |= {"metadata": _plain(prompt.metadata), "source": None if prompt.source is None else put(prompt.source)}
    words |= {"references": [put(one) for one in prompt.references]}
    _check_prompt(words)
    return words


def _prompt(words: Any, picture: Any) -> Prompt:
    _check_prompt(words)
    return Prompt(
        id=words["id"],
        text=words["text"],
        kind=words["kind"],
        metadata=_plain(words["metadata"]),
        target_text=tuple(words["target_text"]),
        source=None if words["source"] is None else picture(words["source"]),
        references=tuple(picture(one) for one in words["references"]),
    )


def _check_prompt(words: Any) -> None:
    _record(words, _PROMPT, "a prompt")
    _whole(words["id"], "id")
    targets, references = words["target_text"], words["references"]
    if any(type(one) is not str for one in targets) or _bytes(targets) + len(targets) > LARGEST_TEXT:
        raise WireError(f"target_text is a list of texts, together at most {LARGEST_TEXT} bytes")
    if _bytes([words["text"]]) > LARGEST_TEXT or _bytes([words["kind"]]) > LONGEST_NAME:
        raise WireError(f"a prompt has at most {LARGEST_TEXT} bytes, and its kind {LONGEST_NAME}")
    if len(json.dumps(_plain(words["metadata"]))) > LARGEST_METADATA:
        raise WireError(f"a prompt's metadata has at most {LARGEST_METADATA} bytes as JSON")
    if len(references) > PICTURES:
        raise WireError(f"a prompt has at most {PICTURES} references")


# ---- answers ---------------------------------------------------------------------------------------------------------


def encode_reply(question: str, results: Sequence[Result]) -> bytes:
    """The message that answers the question with this id."""
    rows = []
    for one in results:
        numbers = {name: _number(value, name) for name, value in one.components.items()}
        row = {"id": one.id, "value": _number(one.value, "value"), "components": numbers, "status": one.status}
        rows.append({**row, "reason": one.reason[:LONGEST_REASON]})
    return _frame({"question": question, "results": rows}, [])


def decode_reply(data: bytes, question: str, ids: Sequence[int]) -> list[Result]:
    """The answers to a question, if they are just those of these samples, in this order, with finite numbers."""
    header, body = _unframe(data)
    _record(header, {"question": str, "results": list}, "the header")
    if header["question"] != question or body:
        raise WireError("this answers another question")
    rows = header["results"]
    if len(rows) != len(ids):
        raise WireError(f"{len(rows)} answers for {len(ids)} samples")
    results = [_result(row) for row in rows]
    if [one.id for one in results] != list(ids):
        raise WireError("the answers are not in the order of the samples")
    return results


def _result(row: Any) -> Result:
    number = (int, float, type(None))
    _record(row, {"id": int, "value": number, "components": dict, "status": str, "reason": str}, "an answer")
    if row["status"] not in ("ok", "failed", "timeout") or len(row["reason"]) > LONGEST_REASON:
        raise WireError("an answer has an unknown status or too long a reason")
    if len(row["components"]) > COMPONENTS or any(len(name) > LONGEST_NAME for name in row["components"]):
        raise WireError(f"an answer has at most {COMPONENTS} components")
    numbers = {name: _number(value, name) for name, value in row["components"].items()}
    return Result(row["id"], _number(row["value"], "value"), numbers, row["status"], row["reason"])


# ---- both ------------------------------------------------------------------------------------------------------------


def _frame(header: Mapping[str, Any], parts: Iterable[bytes]) -> bytes:
    text = json.dumps(header, allow_nan=False).encode()
    if len(text) > LARGEST_HEADER:
        raise WireError(f"texts and metadata of {len(text)} bytes; a message has at most {LARGEST_HEADER}")
    rest = b"".join([len(text).to_bytes(4, "big"), text, *parts])
    if _START + len(rest) > LARGEST_BODY:
        raise WireError(f"a message of {len(rest)} bytes; at most {LARGEST_BODY} are taken")
    return _MAGIC + hashlib.sha256(rest).digest() + rest


def _unframe(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header, and the bytes behind it."""
    if len(data) > LARGEST_BODY:
        raise WireError(f"a message of {len(data)} bytes; at most {LARGEST_BODY} are taken")
    if len(data) < _START + 4 or not data.startswith(_MAGIC):
        raise WireError(f"this is no message of {PROTOCOL}")
    rest = memoryview(data)[_START:]
    if hashlib.sha256(rest).digest() != data[len(_MAGIC) : _START]:
        raise WireError("the message is damaged")
    length = int.from_bytes(rest[:4], "big")
    if length > min(LARGEST_HEADER, len(rest) - 4):
        raise WireError("the header is longer than the message, or than allowed")
    try:
        header = json.loads(bytes(rest[4 : 4 + length]), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise WireError("the header is no JSON") from error
    if not isinstance(header, dict):
        raise WireError("the header is no mapping")
    return header, rest[4 + length :]


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _record(value: Any, kinds: Mapping[str, Any], what: str) -> None:
    """A mapping with exactly these keys, each of just this type: true is no number."""
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise WireError(f"{what} is a mapping of {', '.join(kinds)}")
    for key, kind in kinds.items():
        if type(value[key]) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise WireError(f"{what} has a wrong type of {key}")


def _index(number: Any, count: int, what: str) -> int:
    if type(number) is not int or not 0 <= number < count:
        raise WireError(f"there is no number {str(number)[:LONGEST_NAME]} among the {what}")
    return number


def _whole(number: int, what: str) -> int:
    if type(number) is not int or not -_INT <= number < _INT:
        raise WireError(f"{what} is no whole number of 64 bits")
    return number


def _number(value: float | None, what: str) -> float | None:
    """Finite or None; JSON knows neither NaN nor infinity, and 1e999 is read as one."""
    try:
        fits = value is None or (type(value) in (int, float) and math.isfinite(value))
    except OverflowError:  # a whole number beyond all floats
        fits = False
    if not fits:
        raise WireError(f"{what[:LONGEST_NAME]} is no finite number")
    return None if value is None else float(value)


def _bytes(texts: Iterable[str]) -> int:
    try:
        return sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError as error:
        raise WireError("a text with half a character") from error


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy of what JSON can hold, and no deeper than allowed."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        _bytes([value])
        return value
    if isinstance(value, int):
        return _whole(int(value), "a number in metadata")
    if isinstance(value, float):
        return _number(float(value), "a number in metadata")
    if depth >= DEEPEST:
        raise WireError(f"metadata is nested deeper than {DEEPEST}")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        _bytes(value)
        return {key: _plain(one, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, depth + 1) for one in value]
    raise WireError(f"metadata holds {type(value).__name__}, which JSON does not")
