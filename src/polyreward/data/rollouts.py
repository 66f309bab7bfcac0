"""Rollout logs: writing our own, and reading ours, TRL's, verl's and plain tables into one `RewardBatch`.

Our log is a folder of Parquet parts, one a generation step, each written whole by an atomic rename: a reader never sees
half a part, and a killed run loses at most the step it was in. One Parquet file of the same layout is read too.

==============================================  =====================================================================
path                                            read as
==============================================  =====================================================================
folder with ``part-*.parquet``, or a run folder polyreward rollout log
with ``rollouts/``
folder (or its parent) with                     what TRL writes with ``log_completions=True``; consecutive rows of one
``completions_*.parquet``                       prompt are a group, files repeated within one generation are read once
folder or file of JSONL with ``input``,         verl's rollout dump; a group is one prompt (verl's uid) of one step
``output`` and ``score``
``.parquet``, ``.csv``, ``.jsonl`` file         our layout (``group``, ``reward/<name>``), or any table with `mapping`
==============================================  =====================================================================

Samples are grouped within a step: the same prompt drawn again later is another group, as it is for the trainer.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyreward.batch import REWARD_PREFIX, RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError, MissingFileError, nearest
from polyreward.grouped import Segments, cross, factorize
from polyreward.storage import write_parquet

if TYPE_CHECKING:
    import pyarrow as pa

_TRL_COLUMNS = {"step", "prompt", "completion", "advantage"}
_VERL_COLUMNS = {"input", "output", "score"}


class RolloutLog:
    """A rollout log that training appends to.

    Parameters
    ----------
    folder : path
        Created on the first append.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def append(self, batch: RewardBatch, step: int) -> Path:
        """Write the samples of one step as a part of their own and return its path.

        Raises
        ------
        StorageError
            The part could not be written (full disk, permissions); the log is as before.
        """
        earlier = len(list(self.folder.glob(f"part-{step:08d}-*.parquet")))
        table = batch.with_columns(step=np.full(len(batch), step, dtype=np.int64)).to_arrow()
        return write_parquet(table, self.folder / f"part-{step:08d}-{earlier:02d}.parquet")

    def truncate(self, step: int) -> int:
        """Delete the parts after `step`, for a run that resumes from its checkpoint of that step; return how many."""
        late = [part for part in self.parts() if _step_of(part) > step]
        for part in late:
            part.unlink()
        return len(late)

    def parts(self) -> list[Path]:
        """Parts in the order of their steps."""
        return sorted(self.folder.glob("part-*.parquet"))


def read_rollouts(
    path: str | Path,
    mapping: Mapping[str, str | Sequence[str]] | None = None,
    *,
    columns: Sequence[str] | None = None,
) -> RewardBatch:
    """Read any supported rollout log into one batch.

    Parameters
    ----------
    path : file or folder, see the module docstring
    mapping : mapping of field to column name(s), optional
        For plain tables, and to override what is recognised. ``"rewards"`` names the reward columns, ``"group"`` the
        column (or columns) that identifies a prompt; any other key renames a column: ``{"task": "data_source"}``.
    columns : names to keep beside group and rewards, optional
        Default all. Leaving out long texts saves memory on large logs.

    Raises
    ------
    MissingFileError, MissingColumnError, InvalidInputError
        The message names the file, and the row and column where there is one.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"no such file or folder: {path}")
    table = _read_table(path, columns)
    if table.num_rows == 0:
        raise InvalidInputError(f"{path} has no rows")
    table = _to_our_layout(table, dict(mapping or {}), path)
    if columns is not None:
        kept = ("group", *columns)
        table = table.select([n for n in table.column_names if n in kept or n.startswith(REWARD_PREFIX)])
    _check_rewards(table, path)
    batch = RewardBatch.from_arrow(table)
    if "step" not in batch.columns:
        return batch
    steps = factorize(batch.column("step"), name=f"column 'step' of {path}")
    present, codes = torch.unique(cross(batch.segments("group"), steps).codes, return_inverse=True)
    return RewardBatch(batch.rewards, batch.names, Segments(codes, len(present)), batch.columns)


def _read_table(path: Path, columns: Sequence[str] | None) -> pa.Table:
    if path.is_file():
        return _read_file(path, columns)
    for folder, pattern in (
        (path, "part-*.parquet"),
        (path / "rollouts", "part-*.parquet"),
        (path, "completions_*.parquet"),
        (path / "completions", "completions_*.parquet"),
        (path, "*.jsonl"),
        (path, "*.parquet"),
        (path, "*.csv"),
    ):
        files = sorted(folder.glob(pattern), key=_natural_order)
        if files:
            tables = [_read_file(file, columns) for file in files]
            if pattern.startswith("completions_"):
                tables = _without_repeats(tables)
            return _concatenate(tables, files)
    raise MissingFileError(
        f"{path} holds no rollout log; expected part-*.parquet, completions_*.parquet (TRL), *.jsonl (verl), or a table"
    )


def _read_file(path: Path, columns: Sequence[str] | None) -> pa.Table:
    if path.suffix not in (".parquet", ".csv", ".jsonl"):
        raise InvalidInputError(f"{path}: unknown kind of file {path.suffix!r}; expected .parquet, .csv or .jsonl")
    if path.stat().st_size == 0:
        raise InvalidInputError(f"{path} is empty")
    if path.suffix == ".parquet":
        return _read_parquet(path, columns)
    return _read_csv(path) if path.suffix == ".csv" else _read_jsonl(path)


def _read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        ours = any(name.startswith(REWARD_PREFIX) for name in schema.names)
        if columns is None or not ours:
            return pq.read_table(path)
        wanted = {"group", "step", *columns}
        return pq.read_table(path, columns=[n for n in schema.names if n in wanted or n.startswith(REWARD_PREFIX)])
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidInputError(f"{path} is not a readable Parquet file: {error}") from error


def _read_csv(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.csv as csv

    try:
        return csv.read_csv(path, convert_options=csv.ConvertOptions(strings_can_be_null=True))
    except pa.ArrowInvalid as error:
        raise InvalidInputError(f"{path}: {error}") from error


def _read_jsonl(path: Path) -> pa.Table:
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InvalidInputError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise InvalidInputError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
            rows.append(row)
    if not rows:
        raise InvalidInputError(f"{path} has no rows")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _column_of([row.get(name) for row in rows]) for name in names})


def _column_of(values: list[Any]) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        if all(v is None or isinstance(v, int | float) for v in values):
            return pa.array([None if v is None else float(v) for v in values])
        return pa.array([v if v is None or isinstance(v, str) else json.dumps(v, default=str) for v in values])


def _concatenate(tables: Sequence[pa.Table], files: Sequence[Path]) -> pa.Table:
    import pyarrow as pa

    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InvalidInputError(f"the files in {files[0].parent} do not have the same columns: {error}") from error


def _without_repeats(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Drop a table that holds the rows of the one before: TRL logs one generation at each of its optimiser steps."""
    kept: list[pa.Table] = []
    for table in tables:
        content = table.drop_columns(["step"]) if "step" in table.column_names else table
        if kept and content.equals(kept[-1].drop_columns(["step"]) if "step" in kept[-1].column_names else kept[-1]):
            continue
        kept.append(table)
    return kept


def _to_our_layout(table: pa.Table, mapping: dict[str, Any], path: Path) -> pa.Table:
    for field, wanted in mapping.items():
        for column in [wanted] if isinstance(wanted, str) else wanted:
            if column not in table.column_names:
                raise MissingColumnError(
                    f"{path} has no column {column!r} (mapped to {field!r}){nearest(column, table.column_names)}"
                )
    names = set(table.column_names)
    rewards = mapping.pop("rewards", None)
    group = mapping.pop("group", None)
    if rewards is None and not any(name.startswith(REWARD_PREFIX) for name in names):
        if names >= _TRL_COLUMNS:
            rewards, group = _trl_rewards(table), group or "prompt"
            if group == "prompt":
                table = table.append_column("group", [_runs(table["prompt"].to_pylist(), table["step"].to_pylist())])
                group = "group"
        elif names >= _VERL_COLUMNS:
            rewards = _verl_rewards(table)
            if group is None and "uid" in names:
                uids = [str(uid).rsplit("_", 2)[0] for uid in table["uid"].to_pylist()]
                table = _put(table, "group", uids)
                group = "group"
            group = group or "input"
        else:
            raise MissingColumnError(
                f"{path}: cannot tell which columns are rewards; name them, "
                f"e.g. --map rewards=score --map group=prompt. Columns: {', '.join(table.column_names)}"
            )
    for field, column in mapping.items():
        table = _put(table, field, table[column])
    chosen = [rewards] if isinstance(rewards, str) else list(rewards or [])
    for column in chosen:
        table = _put(table, REWARD_PREFIX + column.removeprefix(REWARD_PREFIX), table[column])
    table = table.drop_columns([c for c in chosen if c in table.column_names and not c.startswith(REWARD_PREFIX)])
    if group is not None and group != "group":
        keys = [group] if isinstance(group, str) else list(group)
        values = [table[key].to_pylist() for key in keys]
        table = _put(table, "group", [str(v[0]) if len(v) == 1 else str(v) for v in zip(*values, strict=True)])
    if "group" not in table.column_names:
        raise MissingColumnError(f"{path} has no column 'group'; name the prompt's column, e.g. --map group=prompt")
    return table


def _trl_rewards(table: pa.Table) -> list[str]:
    """Reward columns of a TRL completions table: the numeric ones between the completion and the advantage."""
    import pyarrow as pa

    names = table.column_names
    between = names[names.index("completion") + 1 : names.index("advantage")]
    found = [n for n in between if pa.types.is_floating(table.schema.field(n).type)]
    if not found:
        raise MissingColumnError(f"no numeric reward column between 'completion' and 'advantage'; found {between}")
    return found


def _verl_rewards(table: pa.Table) -> list[str]:
    """The score, or its components when extra numeric columns add up to it."""
    import pyarrow as pa

    extras = [
        n
        for n in table.column_names
        if n not in {*_VERL_COLUMNS, "gts", "step", "uid"} and pa.types.is_floating(table.schema.field(n).type)
    ]
    if len(extras) > 1:
        parts = np.stack([table[n].to_pandas().to_numpy(dtype=float) for n in extras])
        if np.allclose(parts.sum(axis=0), table["score"].to_pandas().to_numpy(dtype=float), atol=1e-6):
            return extras
    return ["score"]


def _runs(prompts: Sequence[Any], steps: Sequence[Any]) -> pa.Array:
    """Group ids of consecutive equal prompts; a prompt drawn twice in a row is split by the common group size."""
    import pyarrow as pa

    keys = [(step, str(prompt)) for step, prompt in zip(steps, prompts, strict=True)]
    starts = [0] + [i for i in range(1, len(keys)) if keys[i] != keys[i - 1]] + [len(keys)]
    lengths = [b - a for a, b in itertools.pairwise(starts)]
    size = math.gcd(*lengths)
    if size == 1:
        return pa.array(np.repeat(np.arange(len(lengths)), lengths))
    return pa.array(np.arange(len(keys)) // size)


def _put(table: pa.Table, name: str, values: Iterable[Any]) -> pa.Table:
    import pyarrow as pa

    column = values if isinstance(values, pa.ChunkedArray | pa.Array) else pa.array(list(values))
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)


def _check_rewards(table: pa.Table, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in table.column_names:
        if not name.startswith(REWARD_PREFIX):
            continue
        column, kind = table[name], table.schema.field(name).type
        shown = name.removeprefix(REWARD_PREFIX)
        if pa.types.is_floating(kind):
            infinite = pc.is_inf(column)
            if pc.any(infinite).as_py():
                row = pc.index(infinite, True).as_py()
                raise InvalidInputError(f"{path}: reward {shown!r} is {column[row].as_py()} in row {row + 1}")
        elif not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
            values = column.to_pylist()
            # a text column may hold numbers up to the entry that is none; point at that entry
            row = next((i for i, v in enumerate(values) if not _is_number(v) and not _reads_as_number(v)), 0)
            raise InvalidInputError(f"{path}: reward {shown!r} is {values[row]!r} in row {row + 1}, expected a number")


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _reads_as_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _step_of(part: Path) -> int:
    return int(part.stem.split("-")[1])


def _natural_order(path: Path) -> tuple[int, str]:
    digits = "".join(c for c in path.stem if c.isdigit())
    return (int(digits) if digits else 0, path.name)
