"""Folders of pictures, each picture a prompt: its text beside it, in metadata.jsonl, or one text for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from rlkit.data.picture_files import ENDINGS, Picture, Unread
from rlkit.data.tables import Columns, Reader, check_there, records_of, text_lines, their_name
from rlkit.errors import DataError

METADATA = ("metadata.jsonl", "metadata.csv")  # Hugging Face's imagefolder: a row names its picture by "file_name"


def metadata_file(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def read_folder(
    folder: Path, used_as: Literal["source", "references"], text: str | None, columns: Columns
) -> tuple[Unread, ...]:
    """The prompts of a folder, in the order of its metadata or of the pictures' names."""
    if not folder.is_dir():
        raise DataError("no such folder of pictures", where=str(folder))
    metadata = metadata_file(folder)
    records = _listed(metadata, columns, text) if metadata else _captioned(folder, columns, text)
    reader = Reader({**columns, used_as: None}, folder)
    prompt = str(their_name(columns, "prompt"))
    rows = []
    for i, (where, name, record) in enumerate(records):
        key = "source" if used_as == "source" else "references[0]"
        picture = Picture(key, where, 0, [{key: name}], folder)
        told = record if text is None else {**record, prompt: text}
        rows.append(reader.named(i, where, told, {used_as: picture if used_as == "source" else [picture]}))
    if not rows:
        raise DataError("no pictures in this folder", where=str(folder), hint=f"Known: {', '.join(ENDINGS)}.")
    return tuple(rows)


def _listed(metadata: Path, columns: Columns, text: str | None) -> list[tuple[str, str, dict[str, Any]]]:
    """(where, picture, the other columns) of each row."""
    records = list(records_of(metadata))
    there = dict.fromkeys(key for _, record in records for key in record)
    if "file_name" not in there:
        hint = 'Write {"file_name": "a.png", "prompt": "a red circle"}' + f"; it has {', '.join(there)}."
        raise DataError("no 'file_name' here", where=str(metadata), hint=hint)
    check_there(columns, there, str(metadata))
    for where, record in records:
        if not isinstance(record.get("file_name"), str):
            raise DataError(f"'file_name' must be the path of a picture, not {record.get('file_name')!r}", where=where)
    return [(where, record.pop("file_name"), record) for where, record in records]


def _captioned(folder: Path, columns: Columns, text: str | None) -> list[tuple[str, str, dict[str, Any]]]:
    if any(columns.values()):
        hint = f"Without {' or '.join(METADATA)} a picture has no columns."
        raise DataError("columns are of a file of metadata, and there is none", where=str(folder), hint=hint)
    found = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.suffix.lower() in ENDINGS and not any(part.startswith(".") for part in name.split("/")):
            found.append((str(file), name, {} if text is not None else {"prompt": _caption(file)}))
    return found


def _caption(picture: Path) -> str:
    beside = picture.with_suffix(".txt")
    if not beside.is_file():
        hint = f"Write it into {beside.name} beside it, or all into {METADATA[0]}, or give one `text` for all."
        raise DataError("this picture has no text", where=str(picture), hint=hint)
    caption = " ".join(line for _, line in text_lines(beside, "the text of a picture"))
    if not caption:
        raise DataError("no text in this file", where=str(beside))
    return caption
