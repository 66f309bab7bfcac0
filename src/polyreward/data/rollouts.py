"""Rollout logs: writing our own, and reading ours, TRL's, verl's and plain tables into one `RewardBatch`.

Our log is a folder of Parquet parts, one a generation step, each written whole by an atomic rename: a reader never sees
half a part, and a killed run loses at most the step it was in. One Parquet file of the same layout is read too.

==============================================  =====================================================================
path                                            read as
==============================================  =====================================================================
folder with ``part-*.parquet``, or a run folder polyreward rollout log
with ``rollouts/``
folder (or its parent) with                     what TRL writes with ``log_completions=True``; consecutive rows of one
``completions_*.parquet``                       prompt are a group, rows that TRL logs again are read once
folder or file of JSONL with ``input``,         verl's rollout dump; a group is one prompt (verl's uid) of one step
``output`` and ``score``
``.parquet``, ``.csv``, ``.jsonl`` file         our layout (``group``, ``reward/<name>``), or any table with `mapping`
==============================================  =====================================================================

Samples are grouped within a step: the same prompt drawn again later is another group, as it is for the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from polyreward.batch import REWARD_PREFIX, RewardBatch
from polyreward.data.columns import codes_of, numbers_of, plain, values_of
from polyreward.data.files import KINDS, Keep, UnfinishedError, concatenate, read_file
from polyreward.data.layouts import put, to_our_layout, without_repeats
from polyreward.errors import InvalidInputError, MissingFileError
from polyreward.grouped import Segments
from polyreward.storage import write_parquet

if TYPE_CHECKING:
    import pyarrow as pa

TEXTS = ("completion", "response", "output", "text")


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
    columns: Sequence[str] | Keep | None = None,
    measure_texts: bool = False,
    unfinished: bool = False,
) -> RewardBatch:
    """Read any supported rollout log into one batch.

    Parameters
    ----------
    path : file or folder, see the module docstring
    mapping : mapping of field to column name(s), optional
        For plain tables, and to override what is recognised. ``"rewards"`` names the reward columns, ``"group"`` the
        column (or columns) that identifies a prompt; any other key renames a column: ``{"task": "data_source"}``.
        Several columns for one field are crossed.
    columns : names to keep beside group and rewards, or a function that says whether to keep a name, optional
        Default all. Leaving out long texts saves memory on large logs.
    measure_texts : bool
        Read the texts of completions as the columns ``completion_hash`` and ``length`` (in characters, unless the
        log has a ``length``), which is all that a diagnosis asks of them.
    unfinished : bool
        Leave out a file that ends in the middle, for a log that is still being written, if there are others.

    Raises
    ------
    MissingFileError, MissingColumnError, InvalidInputError
        The message names the file, and the row and column where there is one.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"no such file or folder: {path}")
    if callable(columns):
        keep: Keep = columns
    else:
        names = None if columns is None else set(columns)
        keep = lambda name: names is None or name in names  # noqa: E731
    needed = {name for names in (mapping or {}).values() for name in ([names] if isinstance(names, str) else names)}
    needed |= {*TEXTS, "completion_hash", "length"} if measure_texts else set()
    table = _read_table(path, lambda name: name in needed or keep(name), measure_texts, unfinished)
    if table.num_rows == 0:
        raise UnfinishedError(f"{path} has no rows")
    twice = next((name for name in table.column_names if table.column_names.count(name) > 1), None)
    if twice is not None:
        raise InvalidInputError(
            f"{path} has the column {twice!r} {table.column_names.count(twice)} times; expected once"
        )
    table = to_our_layout(table, mapping or {}, str(path))
    # what was measured is left behind empty, because layouts are recognised by their columns
    texts = [name for name in TEXTS if measure_texts and name in table.column_names]
    table = table.drop_columns([name for name in texts if table[name].null_count == table.num_rows])
    return _to_batch(table, keep, str(path))


def _read_table(path: Path, keep: Keep, measure_texts: bool, unfinished: bool) -> pa.Table:
    def slim(table: pa.Table) -> pa.Table:
        return _measured(table) if measure_texts else table

    if path.is_file():
        return read_file(path, keep, slim, unfinished)
    for folder, pattern in (
        (path, "part-*.parquet"),
        (path / "rollouts", "part-*.parquet"),
        (path, "completions_*.parquet"),
        (path / "completions", "completions_*.parquet"),
        (path, "*.jsonl"),
        (path, "*.parquet"),
        (path, "*.csv"),
    ):
        files = sorted((file for file in folder.glob(pattern) if file.is_file()), key=_natural_order)
        if not files:
            continue
        tables = []
        for file in files:
            try:
                part = None if pattern.startswith("completions_") else slim
                tables.append(read_file(file, keep, part, unfinished))
            except UnfinishedError:
                if not unfinished or (file == files[-1] and not tables):
                    raise
        if pattern.startswith("completions_"):
            tables = [slim(table) for table in without_repeats(tables)]
        return concatenate(tables, f"the files in {folder}")
    raise MissingFileError(
        f"{path} holds no rollout log; expected part-*.parquet, completions_*.parquet (TRL), *.jsonl (verl), or a "
        f"table ({', '.join(KINDS)})"
    )


def _to_batch(table: pa.Table, keep: Keep, where: str) -> RewardBatch:
    names = [name for name in table.column_names if name.startswith(REWARD_PREFIX)]
    rewards = [numbers_of(table, name, where, f"reward {name.removeprefix(REWARD_PREFIX)!r}") for name in names]
    kind = np.float32 if all(values.dtype == np.float32 for values in rewards) else np.float64
    matrix = np.empty((table.num_rows, len(names)), dtype=kind)
    for k, values in enumerate(rewards):
        matrix[:, k] = values
    keys = ["group", "step"] if "step" in table.column_names else ["group"]
    codes, number = codes_of(table, keys, where)
    kept = [n for n in table.column_names if n not in names and n != "group" and keep(n)]
    shown = tuple(name.removeprefix(REWARD_PREFIX) for name in names)
    others = {name: values_of(table[name]) for name in kept}
    return RewardBatch(torch.from_numpy(matrix), shown, Segments(torch.from_numpy(codes), number), others)


def _measured(table: pa.Table) -> pa.Table:
    """Texts of completions replaced by their hash and length."""
    import polars as pl
    import pyarrow as pa
    import pyarrow.compute as pc

    text = next((name for name in TEXTS if name in table.column_names), None)
    values = None if text is None else plain(table[text])
    if text is None or values is None or not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return table
    if "completion_hash" not in table.column_names:
        hashes = pl.Series(pl.from_arrow(values)).hash(seed=0).to_numpy().view(np.int64)
        table = put(table, "completion_hash", hashes)
    if "length" not in table.column_names:
        table = put(table, "length", pc.utf8_length(values))
    return put(table, text, pa.nulls(table.num_rows))


def _step_of(part: Path) -> int:
    return int(part.stem.split("-")[1])


def _natural_order(path: Path) -> tuple[int, str]:
    digits = "".join(c for c in path.stem if c.isdigit())
    return (int(digits) if digits else 0, path.name)
