"""Preference data from JSON lines, CSV, Parquet, `datasets` or records, whole or in pieces.

    data = read_preferences("hh.jsonl.gz")                                       # the layout is recognised
    data = read_preferences("votes.csv", columns={"choice": "vote", "annotator": "worker"})
    for piece in iterate_preferences("large.parquet", rows=10_000): ...          # more than fits in memory

Layouts are in `polyreward.data.preference_layouts`. Errors name file, row (from 1, without a header) and field.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from polyreward.data.files import json_object
from polyreward.data.preference_layouts import layout_of, reader_of
from polyreward.errors import InvalidInputError, MissingColumnError, MissingFileError, nearest
from polyreward.preferences import Preference, PreferenceData, concatenate
from polyreward.storage import write_atomically

KINDS = (".jsonl", ".ndjson", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
_TEXTS = ("chosen", "rejected", "prompt")
_NESTED = ("responses", "ranking", "ranks", "ratings", "completions", "chosen", "rejected", "prompt")
Identical = Literal["drop", "error", "keep"]


def read_preferences(
    source: Any,
    *,
    layout: str = "auto",
    columns: Mapping[str, str] | None = None,
    scale: tuple[float, float] | None = None,
    identical: Identical = "drop",
    known_annotators: Iterable[Any] | None = None,
    name: str | None = None,
) -> PreferenceData:
    """Read preferences.

    Parameters
    ----------
    source : path, folder of files, `datasets.Dataset` or iterable one, or iterable of dicts
        A ``.jsonl``, ``.csv`` (also ``.gz``) or ``.parquet`` file. Lists in CSV cells are JSON.
    layout : "auto", "native", "trl", "hh" or "ultrafeedback"
    columns : mapping of a name of the layout to the column that holds it
        ``{"choice": "label", "annotator": "objective"}``, for example.
    scale : (lowest, highest)
        Ratings outside it are an error.
    identical : "drop" (with a warning that counts them), "error" or "keep"
        What to do with comparisons whose responses are all the same.
    known_annotators : ids, optional
        Another annotator is an error.
    name : str, optional
        How errors call a source that is not a file.

    Raises
    ------
    MissingFileError, MissingColumnError, UnknownNameError, InvalidInputError
        The message names file, row and field.
    """
    options: dict[str, Any] = {"layout": layout, "columns": columns, "scale": scale, "name": name}
    parts = list(iterate_preferences(source, rows=50_000, identical="keep", **options))
    if not parts:
        raise InvalidInputError(f"{name or source} has no comparisons")
    data = parts[0] if len(parts) == 1 else concatenate(parts)
    _check_annotators(data, known_annotators)
    return data.without_identical(identical)


def iterate_preferences(
    source: Any,
    *,
    rows: int = 10_000,
    layout: str = "auto",
    columns: Mapping[str, str] | None = None,
    scale: tuple[float, float] | None = None,
    identical: Identical = "drop",
    known_annotators: Iterable[Any] | None = None,
    name: str | None = None,
) -> Iterator[PreferenceData]:
    """The same in pieces of `rows` comparisons, read one after the other; arguments of `read_preferences`."""
    if rows < 1:
        raise InvalidInputError(f"rows must be at least 1, got {rows}")
    known = None if known_annotators is None else list(known_annotators)
    for where, stream in _sources(source, name):
        read = None if layout == "auto" else reader_of(layout)
        numbered = enumerate(stream, start=1)
        while chunk := list(islice(numbered, rows)):
            records = []
            for number, raw in chunk:
                place = f"{where}, row {number}"
                row = _renamed(raw, columns or {}, place)
                read = read or reader_of(layout_of(list(row), row, place))
                records.append(_checked(read(row, place), place))
            data = PreferenceData.of(records, scale=scale, source=where, rows=[number for number, _ in chunk])
            _check_annotators(data, known)
            data = data.without_identical(identical)
            if len(data):
                yield data


def iterate_responses(
    source: Any, *, columns: Mapping[str, str] | None = None, layout: str = "auto"
) -> Iterator[tuple[dict[str, Any], Preference]]:
    """Rows whose responses are to be scored, judged or not: the row as it is, and prompt, responses and annotator.

    A row has `prompt` (may be missing) and `completion` or `response` (one) or `responses` or `completions` (a list),
    or is a preference of any layout.

    Raises
    ------
    MissingFileError, MissingColumnError, UnknownNameError, InvalidInputError
        The message names file, row and field.
    """
    read = None if layout == "auto" else reader_of(layout)
    for where, stream in _sources(source, None):
        for number, raw in enumerate(stream, start=1):
            place = f"{where}, row {number}"
            row = _renamed(raw, columns or {}, place)
            several = row.get("responses", row.get("completions") if "instruction" not in row else None)
            one = row.get("completion", row.get("response"))
            if read is not None or (several is None and one is None):
                found = (read or reader_of(layout_of(list(row), row, place)))(row, place)
            elif several is None or isinstance(several, list):
                found = Preference(
                    row.get("prompt"), [one] if several is None else several, annotator=row.get("annotator")
                )
            else:
                raise InvalidInputError(f"{place}: responses is {type(several).__name__}, expected a list")
            yield row, _checked(found, place)


def write_preferences(data: PreferenceData, path: str | Path) -> Path:
    """Write as JSON lines in the native layout, which `read_preferences` reads back."""

    def write(target: Path) -> None:
        with target.open("w", encoding="utf-8") as stream:
            for record in data:
                stream.write(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False, default=_scalar) + "\n")

    return write_atomically(path, write)


def _plain(record: Preference) -> dict[str, Any]:
    fields = ("prompt", "responses", "choice", "ranks", "ratings", "margin", "target", "annotator")
    kept = {name: getattr(record, name) for name in fields}
    return {name: value for name, value in kept.items() if value is not None} | dict(record.columns)


def _scalar(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def _sources(source: Any, name: str | None) -> Iterator[tuple[str, Iterator[Mapping[str, Any]]]]:
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.exists():
            raise MissingFileError(f"{path} does not exist")
        files = sorted(p for p in path.iterdir() if _kind(p)) if path.is_dir() else [path]
        if not files:
            raise MissingFileError(f"{path} holds no file of the kinds {', '.join(KINDS)}")
        for file in files:
            yield str(file), _rows_of(file)
    elif hasattr(source, "__iter__"):
        yield name or type(source).__name__, iter(source)
    else:
        raise InvalidInputError(f"preferences must come from a path, a data set or dicts, got {type(source).__name__}")


def _kind(path: Path) -> str | None:
    return next((kind for kind in sorted(KINDS, key=len, reverse=True) if path.name.endswith(kind)), None)


def _rows_of(path: Path) -> Iterator[Mapping[str, Any]]:
    kind = _kind(path)
    if kind is None:
        raise InvalidInputError(f"{path}: unknown kind of file; expected {', '.join(KINDS)}")
    try:
        if kind == ".parquet":
            yield from _parquet(path)
        else:
            with gzip.open(path, "rb") if kind.endswith(".gz") else path.open("rb") as stream:
                yield from _csv(stream, path) if kind.startswith(".csv") else _json_lines(stream, path)
    except (OSError, EOFError) as error:
        raise InvalidInputError(f"{path} cannot be read: {error}") from error


def _json_lines(stream: Iterable[bytes], path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield json_object(line if line.endswith(b"\n") else line + b"\n", f"{path}, line {number}")


def _csv(stream: Iterable[bytes], path: Path) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(1 << 30)
    lines = (line.decode("utf-8-sig" if first else "utf-8") for first, line in _marked(stream))
    for number, row in enumerate(csv.DictReader(lines), start=1):
        if None in row or None in row.values():
            raise InvalidInputError(f"{path}, row {number}: the number of cells differs from the header's")
        yield {name: _cell(name, text) for name, text in row.items()}


def _marked(stream: Iterable[bytes]) -> Iterator[tuple[bool, bytes]]:
    return ((number == 0, line) for number, line in enumerate(stream))


def _cell(name: str, text: str) -> Any:
    if text == "":
        return None
    if name in _NESTED and text[0] in "[{":
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(text)
            # a text may look like a list of numbers; a prompt or response that is a list is one of messages
            if name not in _TEXTS or (isinstance(value, list) and value and all(isinstance(m, dict) for m in value)):
                return value
    return text


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise InvalidInputError(f"{path} is not a readable Parquet file: {error}") from error


def _renamed(row: Any, columns: Mapping[str, str], place: str) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise InvalidInputError(f"{place}: expected a mapping of names to values, found {type(row).__name__}")
    for name, column in columns.items():
        if column not in row:
            raise MissingColumnError(f"{place}: no column {column!r} (mapped to {name!r}){nearest(column, row)}")
    moved = {name: row[column] for name, column in columns.items()}
    return {**{name: value for name, value in row.items() if name not in columns.values()}, **moved}


def _checked(record: Preference, place: str) -> Preference:
    for number, response in enumerate(record.responses):
        if not isinstance(response, str | list | int) or isinstance(response, bool):
            raise InvalidInputError(f"{place}: responses[{number}] is {type(response).__name__}, expected a text")
    if not isinstance(record.prompt, str | list | int | None) or isinstance(record.prompt, bool):
        raise InvalidInputError(f"{place}: prompt is {type(record.prompt).__name__}, expected a text or messages")
    return replace(record, prompt="") if record.prompt is None else record


def _check_annotators(data: PreferenceData, known: Iterable[Any] | None) -> None:
    if known is None:
        return
    names = list(known)
    unknown = (data.annotator_codes(names) < 0).nonzero()[0]
    if len(unknown):
        row = int(unknown[0])
        found = None if data.annotators is None else data.annotators[row]
        raise InvalidInputError(f"{data.where(row)}: annotator {found!r} is not one of the {len(names)} known")
