"""Prompts from text, JSON lines, comma-separated values, and Hugging Face datasets: rows of any column names."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.data.picture_files import Picture, Unread
from rlkit.errors import DataError, nearest
from rlkit.types import Prompt

NAMES = ("prompt", "source", "references", "target_text", "size")  # what we call the columns that we know
MORE = ("target_text", "source", "references")  # those of them that rewards may read besides the prompt
Columns = Mapping[str, str | None]  # our name -> the file's; None: the file's column of our name is only metadata

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def check_columns(columns: Columns) -> None:
    for ours, theirs in columns.items():
        if ours not in NAMES:
            hint = f"Write OUR NAME: THE FILE'S; ours: {', '.join(NAMES)}."
            raise ValueError(f"columns: no name {ours!r}.{nearest(ours, NAMES)} {hint}")
        if theirs == "" or (theirs is None and ours == "prompt"):
            raise ValueError(f"columns.{ours} must be the name of a column, not {theirs!r}")


def their_name(columns: Columns, ours: str) -> str | None:
    return columns.get(ours, ours)


def check_there(columns: Columns, there: Iterable[str], where: str) -> None:
    """That every column which a recipe names is somewhere in the file."""
    known = list(there)
    for ours, theirs in columns.items():
        if theirs is not None and theirs not in known:
            hint = f"Its columns: {', '.join(known) or 'none'}."
            raise DataError(f"columns.{ours}: no column {theirs!r}.{nearest(theirs, known)}", where=where, hint=hint)


# ---- one row ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Makes rows of records."""

    columns: Columns
    folder: Path  # where the paths of pictures begin

    def row(self, index: int, where: str, record: Mapping[str, Any], pictures: Mapping[str, Any]) -> Unread:
        """`pictures`: a Picture as source and a list of them as references, by our names; the rest is in `record`."""
        names = {ours: their_name(self.columns, ours) or "" for ours in ("prompt", "target_text", "size")}
        told = {ours: record.get(theirs) for ours, theirs in names.items()}  # two of ours may be one column of theirs
        used = set(names.values())
        text = told["prompt"]
        if not text and "prompt" not in self.columns:
            text = record.get("text")
            used.add("text")
        if not isinstance(text, str) or not text.strip():
            column = their_name(self.columns, "prompt")
            instead = f", or say `columns: {{prompt: NAME}}`; it has {', '.join(record)}" if record else ""
            hint = f'Write {{"{column}": "a red circle", ...}}{instead}.'
            raise DataError(f'no "{column}" in this line', where=where, hint=hint)
        target, size = _texts(told["target_text"], where), _size(told["size"], where)
        left = {key: value for key, value in record.items() if key not in used}
        prompt = Prompt(id=index, text=text, metadata=left, target_text=target, size=size)
        return Unread(prompt, pictures.get("source"), tuple(pictures.get("references", ())))

    def named(self, index: int, where: str, record: dict[str, Any], more: Mapping[str, Any] | None = None) -> Unread:
        """The same of a record that names the files of its pictures. `more`: pictures that it does not name."""
        pictures = dict(more or {})
        source = record.pop(their_name(self.columns, "source") or "", None)
        if source is not None:
            pictures["source"] = self._file("source", where, source)
        column = their_name(self.columns, "references")
        references = record.pop(column or "", None)
        if references is not None and not isinstance(references, list):
            raise DataError(f"{column!r} must be a list of picture files, not {references!r}", where=where)
        if references:
            pictures["references"] = [self._file(f"references[{i}]", where, one) for i, one in enumerate(references)]
        return self.row(index, where, record, pictures)

    def _file(self, key: str, where: str, name: Any) -> Picture:
        return Picture(key, where, 0, [{key: name}], self.folder)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        raise DataError(f"'target_text' must be a text or a list of texts, not {value!r}", where=where)
    return tuple(texts)


def _size(value: Any, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    whole = isinstance(value, list) and all(type(one) is int and one > 0 for one in value)
    if not whole or len(value) != 2:
        hint = "If it means something else here, say `columns: {size: null}`."
        raise DataError(f"'size' must be [height, width], not {value!r}", where=where, hint=hint)
    return (value[0], value[1])


# ---- files -----------------------------------------------------------------------------------------------------------


def read_prompts(path: Path, columns: Columns | None = None) -> tuple[Unread, ...]:
    """The prompts of a file; empty lines are passed over. DataError with file and line for what cannot be read."""
    columns = columns or {}
    if path.suffix in (".parquet", ".arrow"):
        return read_table(load_table(str(path)), str(path), path.parent, columns)
    records = list(records_of(path))
    if not records:
        raise DataError("no prompts in this file", where=str(path), hint="Write one prompt a line.")
    check_there(columns, dict.fromkeys(key for _, record in records for key in record), str(path))
    reader = Reader(columns, path.parent)
    return tuple(reader.named(i, where, record) for i, (where, record) in enumerate(records))


def first_columns(path: Path) -> list[str] | None:
    """The columns of a file's first row; None where that cannot be told without opening the whole."""
    if not path.is_file() or path.suffix == ".arrow":
        return None
    if path.suffix == ".parquet":
        import pyarrow.parquet  # type: ignore[import-untyped]

        return list(pyarrow.parquet.read_schema(path).names)
    return list(next(records_of(path), ("", {}))[1])


def given(columns: Columns, there: Sequence[str] | None) -> tuple[str, ...]:
    """What rewards may read. Of a file that is not there yet nothing is known, so nothing is denied."""
    known = [ours for ours in MORE if their_name(columns, ours) is not None]
    shown = there is None or not {"script", "messages"}.isdisjoint(there)
    found = [one for one in known if there is None or their_name(columns, one) in there]
    return ("prompt", "metadata", *found, *(("demonstration",) if shown else ()))


def records_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".csv":
        yield from _csv_records(path)
        return
    for where, line in text_lines(path, "prompts"):
        yield where, json_object(line, where) if line.startswith("{") else {"prompt": line}


def text_lines(path: Path, what: str) -> Iterator[tuple[str, str]]:
    """("file:number", line) of every line that is not empty."""
    # Not splitlines: it breaks at characters that JSON allows in a text.
    lines = _text(path, what).split("\n")
    yield from ((f"{path}:{i}", line.strip()) for i, line in enumerate(lines, start=1) if line.strip())


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except OSError as error:
        raise DataError(f"cannot read {what}: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"not a UTF-8 text file: {error}", where=str(path)) from error


def json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not a JSON object: {error}", where=where) from error
    if not isinstance(record, dict):
        raise DataError(f"not a JSON object: {line[:40]}", where=where)
    return record


def _csv_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every value is a text, or None where it is empty; one in [brackets] is read as a JSON list."""
    table = csv.DictReader(io.StringIO(_text(path, "prompts"), newline=""), strict=True)
    try:
        for record in table:
            where = f"{path}:{table.line_num}"
            if None in record or None in record.values():
                count = f"{len(table.fieldnames or ())} values"
                raise DataError(f"not the {count} of the first line", where=where, hint='Quote texts: "a, b".')
            yield where, {key: _listed(value) if value else None for key, value in record.items()}
    except csv.Error as error:
        what = f"not comma-separated values after line {table.line_num}: {error}"
        raise DataError(what, where=str(path)) from error


def _listed(value: str) -> Any:
    if not (value.startswith("[") and value.endswith("]")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value  # a text that happens to stand in brackets


# ---- Hugging Face datasets -------------------------------------------------------------------------------------------


def load_table(path: str, config: str | None = None, split: str = "train", revision: str | None = None) -> Any:
    """A `datasets.Dataset`: of a folder that `save_to_disk` wrote, a file, a folder of files, or a name of the hub."""
    import datasets

    place = Path(path).expanduser()
    # A lost connection is an OSError, and a data set that is a program, which is never run, a RuntimeError.
    failed = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(place))
            return _split(saved, split, path) if isinstance(saved, datasets.DatasetDict) else saved
        if place.is_file():
            if place.suffix not in BUILDERS:
                hint = f"Known endings: {', '.join(BUILDERS)}."
                raise DataError(f"no file of a data set ends in {place.suffix!r}", where=path, hint=hint)
            return datasets.load_dataset(BUILDERS[place.suffix], data_files=str(place), split="train")
        if not place.is_dir() and not hub_name(path):
            hint = "Write the path of what is there, or OWNER/NAME of a data set on the hub."
            raise DataError("no such file or folder", where=path, hint=hint)
        return datasets.load_dataset(path, name=config, split=split, revision=revision)
    except failed as error:
        offline = isinstance(error, ConnectionError) or "offline" in str(error).casefold()
        hint = OFFLINE.format(path=path) if offline else "Check its name, config, split and revision."
        nowhere = "" if place.exists() else "there is no such file or folder, and "
        raise DataError(f"{nowhere}cannot load this data set: {error}", where=path, hint=hint) from error


OFFLINE = (
    "Without a connection only what lies on this machine can be read: where there is one, run "
    "`hf download --repo-type dataset {path} --local-dir FOLDER`, and give FOLDER as the path."
)


def hub_columns(place: Path) -> list[str] | None:
    """The columns of a file, or of a folder that `save_to_disk` wrote; None where only opening it tells."""
    about = place / "dataset_info.json"
    if not about.is_file():
        return first_columns(place)
    features = json_object(_text(about, "a data set"), str(about)).get("features")
    return list(features) if isinstance(features, dict) else None


def hub_name(path: str) -> bool:
    """Whether this may be the name of a data set on the hub: NAME or OWNER/NAME, and no path of a file."""
    parts = path.split("/")
    return len(parts) <= 2 and all(one and not one.startswith((".", "~")) for one in parts) and not is_file_name(path)


def is_file_name(path: str) -> bool:
    return Path(path).suffix in (*BUILDERS, ".txt")


def _split(saved: Mapping[str, Any], split: str, path: str) -> Any:
    if split not in saved:
        hint = f"Its splits: {', '.join(saved)}."
        raise DataError(f"no split {split!r}.{nearest(split, saved)}", where=path, hint=hint)
    return saved[split]


def read_table(table: Any, where: str, folder: Path, columns: Columns) -> tuple[Unread, ...]:
    """The rows of a `datasets.Dataset`. Pictures stay in the table, as they were stored; other bytes are left out."""
    there = table.column_names
    check_there(columns, there, where)
    if their_name(columns, "prompt") not in there and "text" not in there:
        hint = f"Say `columns: {{prompt: NAME}}`; its columns: {', '.join(there)}."
        raise DataError("no column 'prompt'", where=where, hint=hint)
    stored = table.with_format("arrow")  # as it was written, undecoded
    found = {ours: str(name) for ours in ("source", "references") if (name := their_name(columns, ours)) in there}
    counts = {ours: _counts(table, name, ours, where) for ours, name in found.items()}
    bare = {ours: _Stored(stored.select_columns([name])) for ours, name in found.items()}
    binary = {one.name for one in table.data.schema if "binary" in str(one.type)}
    words = stored.select_columns([one for one in there if one not in binary and one not in found.values()])
    records = (record for part in words.iter(batch_size=1000) for record in part.to_pylist())
    reader, rows = Reader(columns, folder), []
    for row, record in enumerate(records):
        at, pictures = f"{where} row {row}", dict[str, Any]()
        if "source" in found and counts["source"][row]:
            pictures["source"] = Picture("source", at, row, bare["source"], folder, found["source"])
        if "references" in found:
            each = [(f"references[{i}]", i) for i in range(counts["references"][row])]
            column = (bare["references"], folder, found["references"])
            pictures["references"] = [Picture(key, at, row, *column, i) for key, i in each]
        rows.append(reader.row(row, at, record, pictures))
    if not rows:
        raise DataError("no rows in this data set", where=where)
    return tuple(rows)


@dataclass(frozen=True)
class _Stored:
    """One column of a table, row by row."""

    table: Any

    def __getitem__(self, row: int) -> Any:
        return self.table[row].to_pylist()[0]


def _counts(table: Any, column: str, ours: str, where: str) -> Sequence[int]:
    """How many pictures each row has in this column, without reading any."""
    values = table.data.column(column)  # of Arrow, in chunks
    lists = str(values.type).startswith(("list", "large_list"))
    if lists != (ours == "references"):
        what = f"the column {column!r} holds {'lists' if lists else 'single values'} and cannot be {ours!r}"
        hint = f"Say `columns: {{{'references' if lists else 'source'}: {column}}}`, or {{{ours}: null}}."
        raise DataError(what, where=where, hint=hint)
    if lists:
        return [count or 0 for chunk in values.chunks for count in chunk.value_lengths().to_pylist()]
    return [int(there) for there in values.is_valid().to_pylist()]
