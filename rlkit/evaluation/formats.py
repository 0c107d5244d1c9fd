"""The files in which benchmarks publish their prompts, read as they are. Nothing is downloaded and nothing invented.

Each converter takes the path of a user's copy and gives cases. What was looked up is cited beside it; where a thing
could not be looked up, the converter says so. Paths of pictures begin where the file lies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlkit import clauses
from rlkit.data import tables
from rlkit.data.picture_files import Picture, Unread
from rlkit.errors import DataError, nearest
from rlkit.types import Prompt

TABLES = (".parquet", ".arrow")


@dataclass(frozen=True)
class Case:
    """One prompt of a suite."""

    key: str  # unique in its suite: what records are found by
    category: str
    asked: Unread  # all that the policy is told
    truth: tuple[Picture, ...] = ()  # pictures of the right answer, which the judge alone is shown


# ---- the suites ------------------------------------------------------------------------------------------------------


def geneval(path: Path) -> tuple[Case, ...]:
    """evaluation_metadata.jsonl: a line {"tag", "include", "exclude", "prompt"} for each prompt.

    The names: those of evaluation_metadata.jsonl in github.com/djghosh13/geneval.
    """
    cases = []
    for number, (where, record) in enumerate(_lines(path)):
        text, tag = _text(record, "prompt", where), _text(record, "tag", where)
        try:
            clauses.read(record)
        except ValueError as error:
            raise DataError(f"no claims that can be checked: {error}", where=where) from error
        prompt = Prompt(number, text, kind=tag, metadata=_without(record, "prompt"))
        cases.append(Case(f"{number:05d}", tag, Unread(prompt)))
    return _unique(cases, path)


def dpg(path: Path) -> tuple[Case, ...]:
    """A folder of ITEM.txt, a prompt each, or dpg_bench.csv, whose lines are questions about the prompt `text`.

    The names: github.com/TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py. Its categories are of questions and not
    of prompts, so that all prompts are of one category here; the questions are in the metadata `questions`.
    """
    if path.is_dir():
        found = [(file.stem, _whole(file)) for file in sorted(path.glob("*.txt"))]
        return _unique([Case(key, "all", Unread(Prompt(i, text))) for i, (key, text) in enumerate(found)], path)
    asked: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    for where, record in _csv(path):
        item, text = _text(record, "item_id", where), _text(record, "text", where)
        _text(record, "question_natural_language", where)
        known, questions = asked.setdefault(item, (text, []))
        if known != text:
            raise DataError(f"item {item!r} has another text here than above", where=where)
        questions.append(_without(record, "item_id", "text", "keywords"))
    return _unique(
        [
            Case(item, "all", Unread(Prompt(i, text, metadata={"questions": questions})))
            for i, (item, (text, questions)) in enumerate(asked.items())
        ],
        path,
    )


def oneig(path: Path) -> tuple[Case, ...]:
    """OneIG-Bench.csv or OneIG-Bench-ZH.csv, or a JSON list of the same: category, id, and prompt_en or prompt_cn.

    The names: as excerpts of github.com/OneIG-Bench/OneIG-Benchmark's example have them. An id is unique in its
    category only. What other columns mean was not looked up: they are metadata.
    """
    cases = []
    for number, (where, record) in enumerate(_entries(path)):
        category, own = _text(record, "category", where), _text(record, "id", where)
        column = next((one for one in ("prompt_en", "prompt_cn") if record.get(one)), "prompt_en")
        prompt = Prompt(number, _text(record, column, where), kind=category, metadata=_without(record, column))
        cases.append(Case(f"{category}/{own}", category, Unread(prompt)))
    return _unique(cases, path)


def gedit(path: Path) -> tuple[Case, ...]:
    """The data set's columns key, task_type, instruction, instruction_language, input_image: as parquet or arrow, a
    folder of these, or JSON with the picture's path.

    The names: github.com/stepfun-ai/Step1X-Edit, GEdit-Bench/generate_image_example.py. Both languages have the same
    keys; where a file holds both, the language is part of the category.
    """
    found = _pictured(path, {"prompt": "instruction", "source": "input_image", "size": None})
    languages = {where: _text(row.prompt.metadata, "instruction_language", where) for where, row in found}
    cases = []
    for where, row in found:
        key, task = _text(row.prompt.metadata, "key", where), _text(row.prompt.metadata, "task_type", where)
        if row.source is None:
            raise DataError("no 'input_image' to edit", where=where)
        language = languages[where]
        category = task if len(set(languages.values())) == 1 else f"{language}/{task}"
        cases.append(Case(f"{language}/{key}", category, row))
    return _unique(cases, path)


def imgedit(path: Path) -> tuple[Case, ...]:
    """basic_edit.json: {KEY: {"id": PICTURE, "prompt", "edit_type"}}.

    The names: github.com/PKU-YuanGroup/ImgEdit, Benchmark/Basic/basic_bench.py. `id` is the picture's path.
    """
    cases = []
    reader = tables.Reader({"source": "id", "size": None}, path.parent)
    for number, (where, record, key) in enumerate(_mapping(path)):
        _text(record, "prompt", where)
        _text(record, "id", where)
        kind = _text(record, "edit_type", where)
        cases.append(Case(key, kind, reader.named(number, where, dict(record))))
    return _unique(cases, path)


def omnicontext(path: Path) -> tuple[Case, ...]:
    """The data set's columns key, task_type, instruction, input_images: as parquet or arrow, a folder of these, or JSON
    with a list of paths.

    The names: github.com/VectorSpaceLab/OmniGen2, omnicontext/inference.py.
    """
    cases = []
    for where, row in _pictured(path, {"prompt": "instruction", "references": "input_images", "size": None}):
        key, task = _text(row.prompt.metadata, "key", where), _text(row.prompt.metadata, "task_type", where)
        if not row.references:
            raise DataError("no 'input_images' to draw from", where=where)
        cases.append(Case(key, task, row))
    return _unique(cases, path)


def genevolve(path: Path) -> tuple[Case, ...]:
    """JSON or JSON lines: {"id", "prompt", "gt_image", "meta": {"eval_type", "category"}}; `eval_type` may stand
    outside of `meta`. The truth may be in words too, as `truth`, and what should be legible as `target_text`.

    The names: github.com/MeiGen-AI/GenEvolve, scripts/run_agent.py and scripts/evaluate_images.py, which read results
    of these keys. How the data set itself lies on the hub was not looked up.
    """
    cases = []
    reader = tables.Reader({"source": None, "references": None, "size": None}, path.parent)
    for number, (where, record) in enumerate(_entries(path)):
        _text(record, "prompt", where)
        meta = record.get("meta")
        told = {**(meta if isinstance(meta, Mapping) else {}), **record}
        image, words = told.get("gt_image"), told.get("truth") or told.get("caption")
        if not image and not words:
            hint = "Give the right picture as `gt_image`, or say in `truth` what it shows."
            raise DataError("no truth to judge by", where=where, hint=hint)
        row = reader.named(number, where, {**record, **({"truth": words} if words else {})})
        truth = (Picture("gt_image", where, 0, [{"gt_image": image}], path.parent),) if image else ()
        category = str(told.get("eval_type") or told.get("category") or "all")
        own = str(record["id"]) if record.get("id") is not None else str(number)
        cases.append(Case(own, category, replace(row, prompt=replace(row.prompt, kind=category)), truth))
    return _unique(cases, path)


# ---- reading ---------------------------------------------------------------------------------------------------------


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    """A column that every row must have. Numbers are taken as they are written."""
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        hint = f"It has: {', '.join(map(str, record)) or 'nothing'}."
        near = "" if key in record else nearest(key, map(str, record))
        raise DataError(f"no text {key!r} here.{near}", where=where, hint=hint)
    return value


def _without(record: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}


def _whole(file: Path) -> str:
    """All of a file is one prompt."""
    lines = [line for _, line in tables.text_lines(file, "a prompt")]
    if not lines:
        raise DataError("no prompt in this file", where=f"{file}:1", hint="Write one, or remove the file.")
    return " ".join(lines)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in tables.text_lines(path, "prompts"):
        yield where, tables.json_object(line, where)


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix != ".csv":
        raise DataError("is no .csv file", where=str(path), hint="Give the file as it was published.")
    yield from tables.records_of(path)


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file of any of the plain forms."""
    if path.suffix == ".csv":
        yield from _csv(path)
    elif path.suffix == ".jsonl":
        yield from _lines(path)
    else:
        document = _document(path)
        if not isinstance(document, list):
            raise DataError("is no list of prompts", where=str(path), hint='Write [{"prompt": ...}, ...].')
        for number, one in enumerate(document):
            yield _entry(path, f"entry {number}", one)


def _mapping(path: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    document = _document(path)
    if not isinstance(document, dict):
        raise DataError("is no mapping of keys to edits", where=str(path), hint='Write {"1": {"prompt": ...}, ...}.')
    for key, one in document.items():
        yield *_entry(path, f"entry {key!r}", one), key


def _document(path: Path) -> Any:
    """A JSON file as a whole."""
    lines = list(tables.text_lines(path, "prompts"))  # no text of JSON goes over the end of a line
    try:
        return json.loads("\n".join(line for _, line in lines))
    except json.JSONDecodeError as error:
        where = lines[min(error.lineno, len(lines)) - 1][0] if lines else str(path)
        raise DataError(f"not JSON: {error.msg}", where=where) from error


def _entry(path: Path, name: str, one: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(one, dict):
        raise DataError(f"not a JSON object: {str(one)[:40]}", where=f"{path} {name}")
    return f"{path} {name}", one


def _pictured(path: Path, columns: tables.Columns) -> list[tuple[str, Unread]]:
    """(where, row) of a data set with pictures: within a table, or named by JSON."""
    if not path.is_dir() and path.suffix not in TABLES:
        reader = tables.Reader(columns, path.parent)
        return [(where, reader.named(i, where, dict(one))) for i, (where, one) in enumerate(_entries(path))]
    rows = tables.read_table(tables.load_table(str(path)), str(path), path if path.is_dir() else path.parent, columns)
    return [(f"{path} row {number}", row) for number, row in enumerate(rows)]


def _unique(cases: Sequence[Case], path: Path) -> tuple[Case, ...]:
    if not cases:
        raise DataError("no prompts here", where=str(path), hint="Give the benchmark's own file or folder.")
    for key in _twice(one.key for one in cases):
        raise DataError(f"two prompts are called {key!r}", where=str(path), hint="Each has a key of its own.")
    return tuple(cases)


def _twice(keys: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            yield key
        seen.add(key)
