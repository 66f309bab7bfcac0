"""One Parquet, CSV or JSON-lines file as an Arrow table, with errors that name the file, row and column.

A file that is still being written may end in the middle: a Parquet file without its footer, a line without its end.
Such a file raises `UnfinishedError`, which a reader that follows a log can wait on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyreward.batch import REWARD_PREFIX
from polyreward.errors import InvalidInputError

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = (".parquet", ".csv", ".jsonl", ".ndjson")
CHUNK = 50_000
"""Lines of JSON that are turned into Arrow at once; as Python objects they take ten times the memory."""
WAIT = "if the file is still being written, --follow waits for the rest"

Keep = Callable[[str], bool]
Slim = Callable[["pa.Table"], "pa.Table"]


class UnfinishedError(InvalidInputError):
    """A file that ends in the middle, as one does that is still being written."""


def read_file(path: Path, keep: Keep | None = None, slim: Slim | None = None, unfinished: bool = False) -> pa.Table:
    """Read a file.

    Parameters
    ----------
    path : file
    keep : function of the name of a column, optional
        Whether to read it from a log of ours. Group, step and rewards are always read, and so is all of other files.
    slim : function of a table to a table, optional
        Applied to every stretch of rows as it is read, to leave out what takes room.
    unfinished : bool
        Leave out a last line without its end.

    Raises
    ------
    UnfinishedError, InvalidInputError
        The message names the file, and the row or line where there is one.
    """
    if path.suffix not in KINDS:
        raise InvalidInputError(f"{path}: unknown kind of file {path.suffix!r}; expected {', '.join(KINDS)}")
    read = {".parquet": _parquet, ".csv": _csv}.get(path.suffix, _json_lines)
    try:
        if path.stat().st_size == 0:
            raise UnfinishedError(f"{path} is empty")
        return read(path, keep, slim or (lambda table: table), unfinished)
    except FileNotFoundError as error:
        raise UnfinishedError(f"{path} was there a moment ago and is gone") from error
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror or error}") from error


def concatenate(tables: Sequence[pa.Table], where: str) -> pa.Table:
    """Put tables below one another; a column they lack is null there, one of numbers here and texts there is text."""
    import pyarrow as pa

    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        kinds: dict[str, set[str]] = {}
        for table in tables:
            for field in table.schema:
                kinds.setdefault(field.name, set()).add(str(field.type))
        mixed = [name for name, found in kinds.items() if len(found - {"null"}) > 1]
    try:
        return pa.concat_tables([_as_text(table, mixed) for table in tables], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise InvalidInputError(f"{where} do not have the same columns: {error}") from error


def _parquet(path: Path, keep: Keep | None, slim: Slim, unfinished: bool) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = names
            if keep is not None and any(name.startswith(REWARD_PREFIX) for name in names):
                wanted = [n for n in names if n in ("group", "step") or n.startswith(REWARD_PREFIX) or keep(n)]
            groups = [slim(file.read_row_group(i, columns=wanted)) for i in range(file.num_row_groups)]
            return pa.concat_tables(groups) if groups else slim(file.read(columns=wanted))
    except pa.ArrowInvalid as error:
        raise UnfinishedError(f"{path} is not a readable Parquet file: {_first(error)}; {WAIT}") from error
    except (pa.ArrowException, OSError) as error:
        raise InvalidInputError(f"{path} is not a readable Parquet file: {_first(error)}") from error


def _csv(path: Path, keep: Keep | None, slim: Slim, unfinished: bool) -> pa.Table:
    import pyarrow as pa
    import pyarrow.csv as csv

    kinds: dict[str, Any] = {}
    wider = {"int64": pa.float64()}
    last = _last_line_unfinished(path)
    whole = path.read_bytes() if last and unfinished else None
    while True:
        options = csv.ConvertOptions(strings_can_be_null=True, column_types=kinds)
        try:
            source = path if whole is None else pa.BufferReader(whole[: whole.rfind(b"\n") + 1])
            table = csv.read_csv(source, read_options=csv.ReadOptions(use_threads=False), convert_options=options)
        except pa.ArrowInvalid as error:
            # types are inferred from the first stretch of rows: widen the column that a later row does not fit
            found = re.search(r"In CSV column #(\d+).*conversion error to (\w+)", str(error))
            name = _csv_header(path)[int(found[1])] if found else None
            if name is None or kinds.get(name) == pa.string():
                kind = UnfinishedError if last and "Expected" in str(error) else InvalidInputError
                raise kind(f"{path}: {_first(error)}{f'; {WAIT}' if last else ''}") from error
            kinds[name] = wider.get(found[2], pa.string()) if found and name not in kinds else pa.string()
            continue
        return slim(table)


def _csv_header(path: Path) -> list[str]:
    import csv

    with path.open(encoding="utf-8-sig", newline="") as stream:
        return next(csv.reader(stream))


def _last_line_unfinished(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, 2)
        return stream.read(1) != b"\n"


def _json_lines(path: Path, keep: Keep | None, slim: Slim, unfinished: bool) -> pa.Table:
    tables: list[pa.Table] = []
    rows: list[dict[str, Any]] = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json_object(line, f"{path}, line {number}"))
            except UnfinishedError:
                if not unfinished:
                    raise
            if len(rows) == CHUNK:
                tables.append(slim(_json_table(rows)))
                rows = []
    if rows:
        tables.append(slim(_json_table(rows)))
    if not tables:
        raise UnfinishedError(f"{path} has no rows")
    return concatenate(tables, f"the lines of {path}")


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """One line of a JSON-lines file as a dict; the errors of `read_file` name `where`."""
    ended = line.endswith(b"\n")
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8"
        if ended:
            raise InvalidInputError(f"{where}: not valid JSON ({reason})") from error
        raise UnfinishedError(f"{where}: not valid JSON ({reason}), and the line has no end; {WAIT}") from error
    if not isinstance(row, dict):
        raise InvalidInputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _json_table(rows: list[dict[str, Any]]) -> pa.Table:
    import pyarrow as pa

    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _json_column([row.get(name) for row in rows]) for name in names})


def _json_column(values: list[Any]) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        if all(v is None or isinstance(v, int | float) for v in values):
            return pa.array([None if v is None else float(v) for v in values])
        return pa.array([v if v is None or isinstance(v, str) else json.dumps(v, default=str) for v in values])


def _as_text(table: pa.Table, names: Sequence[str]) -> pa.Table:
    import pyarrow as pa

    for name in names:
        if name in table.column_names and not pa.types.is_null(table.schema.field(name).type):
            texts = [v if v is None or isinstance(v, str) else json.dumps(v) for v in table[name].to_pylist()]
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(texts, pa.string()))
    return table


def _first(error: Exception) -> str:
    """The first line of an error of Arrow, without its full stop."""
    return str(error).splitlines()[0].rstrip(". ")
