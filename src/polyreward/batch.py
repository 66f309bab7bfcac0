"""`RewardBatch`: the one record that flows through polyreward.

N samples (rollouts, images, trajectories), K rewards each, the group every sample belongs to (samples that share a
prompt, state or seed), and named columns of length N. NaN in `rewards` means "this reward does not apply to this
sample": it takes part in no statistic and earns advantage 0.

Stored as Arrow or Parquet, a reward named ``r`` is the column ``reward/r``, the group is ``group``, and every other
column keeps its name. That file is the rollout log which training writes and `polyreward diagnose` reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, MissingColumnError, nearest
from polyreward.grouped import Ids, Segments, cross, factorize, whole

if TYPE_CHECKING:
    import pyarrow as pa

REWARD_PREFIX = "reward/"


@dataclass(frozen=True, eq=False)
class RewardBatch:
    """Rewards of N samples under K reward functions, with groups and columns.

    Parameters
    ----------
    rewards : float tensor (N, K), numpy array or nested list; (N,) is read as (N, 1)
        NaN (None in a list): the reward does not apply. Infinite values are refused. Floats keep their dtype; integers,
        booleans and lists become float32.
    names : sequence of K distinct strings, optional; or the name of the one reward
        Default ``("reward",)`` for one reward, ``("reward_0", ...)`` for more.
    groups : integer or string ids, length N
        Samples that share a prompt, state or seed. Default: all samples form one group.
    columns : mapping of name to length-N values
        Numeric values become tensors on the device of `rewards`; everything else a numpy array. A tensor may have
        further dimensions (N, ...).

    Raises
    ------
    InvalidInputError
        Wrong shapes or lengths (the message names the column), rewards that are not numbers or are infinite (it names
        reward and row), names that are not distinct strings.
    """

    rewards: Tensor
    names: tuple[str, ...] = ()
    groups: Ids | Segments | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    _segments: dict[tuple[str, ...], Segments] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        rewards = _as_rewards(self.rewards)
        rows, width = rewards.shape
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        names = names or (("reward",) if width == 1 else tuple(f"reward_{k}" for k in range(width)))
        if len(names) != width:
            raise InvalidInputError(f"{width} rewards but {len(names)} names {names}")
        if len(set(names)) != width or not all(isinstance(name, str) for name in names):
            raise InvalidInputError(f"reward names must be distinct strings, got {names}")
        object.__setattr__(self, "rewards", rewards)
        object.__setattr__(self, "names", names)
        if not torch.isfinite(rewards.sum()):  # one cheap reduction decides whether a closer look is needed
            _refuse_infinite(rewards, names)
        groups = self.groups
        if groups is None:
            groups = whole(rows, rewards.device)
        elif not isinstance(groups, Segments):
            groups = factorize(groups, name="groups", device=rewards.device)
        if len(groups) != rows:
            raise InvalidInputError(f"groups has {len(groups)} entries, rewards has {rows} rows")
        object.__setattr__(self, "groups", groups)
        columns = {name: _as_column(name, values, rows, rewards.device) for name, values in self.columns.items()}
        object.__setattr__(self, "columns", columns)

    @classmethod
    def from_trl(
        cls, rewards_per_func: Tensor, names: Sequence[str], num_generations: int, **columns: Any
    ) -> RewardBatch:
        """Wrap TRL's gathered ``rewards_per_func`` (N, K), whose consecutive `num_generations` rows share a prompt.

        Raises
        ------
        InvalidInputError
            N is not a multiple of `num_generations`.
        """
        rows = rewards_per_func.shape[0]
        if num_generations < 1 or rows % num_generations:
            raise InvalidInputError(f"{rows} rows cannot be split into groups of num_generations={num_generations}")
        groups = torch.arange(rows, device=rewards_per_func.device) // num_generations
        return cls(rewards_per_func, tuple(names), groups, columns)

    def __len__(self) -> int:
        return self.rewards.shape[0]

    @cached_property
    def valid(self) -> Tensor | None:
        """Where a reward applies, bool (N, K); None when every reward applies everywhere."""
        if torch.isfinite(self.rewards.sum()):
            return None
        missing = torch.isnan(self.rewards)
        return ~missing if bool(missing.any()) else None

    def column(self, name: str) -> Tensor | np.ndarray:
        """The column `name`; ``MissingColumnError`` with the nearest known name if there is none."""
        if name not in self.columns:
            raise MissingColumnError(f"the batch has no column {name!r}{nearest(name, self.columns)}")
        return self.columns[name]

    def reward(self, name: str) -> Tensor:
        """Values of one reward (N,), NaN where it does not apply."""
        if name not in self.names:
            raise MissingColumnError(f"the batch has no reward {name!r}{nearest(name, self.names)}")
        return self.rewards[:, self.names.index(name)]

    def segments(self, by: str | Sequence[str] = "group") -> Segments:
        """The partition of the rows by one or several keys, computed once and kept.

        `by` is ``"group"``, ``"batch"`` (all rows together), the name of an integer or string column, or a sequence of
        these, whose partitions are crossed.
        """
        keys = (by,) if isinstance(by, str) else tuple(by)
        if keys not in self._segments:
            self._segments[keys] = self._partition(keys)
        return self._segments[keys]

    def _partition(self, keys: tuple[str, ...]) -> Segments:
        if not keys or keys == ("batch",):
            return whole(len(self), self.rewards.device)
        if len(keys) > 1:
            return cross(self.segments(keys[:-1]), self.segments(keys[-1]))
        if keys == ("group",):
            assert isinstance(self.groups, Segments)
            return self.groups
        return factorize(self.column(keys[0]), name=f"column {keys[0]!r}", device=self.rewards.device)

    def select(self, rows: Tensor | np.ndarray | Sequence[int]) -> RewardBatch:
        """The batch of the given rows (indices or a boolean mask), in that order.

        Raises
        ------
        InvalidInputError
            Neither whole numbers in ``[-N, N)`` nor N booleans.
        """
        index = _as_index(rows, len(self), self.rewards.device)
        at = index.cpu().numpy()
        groups = self.segments("group")
        columns = {k: v[index] if isinstance(v, Tensor) else v[at] for k, v in self.columns.items()}
        return RewardBatch(
            self.rewards[index], self.names, Segments(groups.codes[index], groups.count, groups.labels), columns
        )

    def with_columns(self, **columns: Any) -> RewardBatch:
        """The same batch with columns added or replaced."""
        return RewardBatch(self.rewards, self.names, self.groups, {**self.columns, **columns})

    def to(self, device: torch.device | str) -> RewardBatch:
        """The same batch on another device; itself when it is there already."""
        if torch.device(device) == self.rewards.device:
            return self
        groups = self.segments("group")
        columns = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in self.columns.items()}
        return RewardBatch(
            self.rewards.to(device), self.names, Segments(groups.codes.to(device), groups.count, groups.labels), columns
        )

    def to_arrow(self) -> pa.Table:
        """As an Arrow table: ``group``, ``reward/<name>`` and the columns. NaN rewards become nulls.

        Raises
        ------
        InvalidInputError
            A column is called ``group`` or ``reward/...``, or holds what Arrow cannot (values of mixed types, say).
        """
        import pyarrow as pa

        groups = self.segments("group")
        codes = groups.codes.cpu().numpy()
        arrays = {"group": _to_arrow(codes if groups.labels is None else [groups.labels[c] for c in codes], "group")}
        for name, values in zip(self.names, self.rewards.unbind(1), strict=True):
            arrays[REWARD_PREFIX + name] = pa.array(_to_numpy(values), from_pandas=True)
        for name, column in self.columns.items():
            if name == "group" or name.startswith(REWARD_PREFIX):
                raise InvalidInputError(f"the column name {name!r} is reserved in a rollout log")
            plain = _to_numpy(column) if isinstance(column, Tensor) else column
            arrays[name] = _to_arrow(plain if plain.ndim == 1 and plain.dtype != object else plain.tolist(), name)
        return pa.table(arrays)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> RewardBatch:
        """Read a table as `to_arrow` writes it.

        Raises
        ------
        MissingColumnError
            No column starts with ``reward/``, or ``group`` is absent.
        InvalidInputError
            A reward is not a column of numbers, or a row has no group.
        """
        names = [name for name in table.column_names if name.startswith(REWARD_PREFIX)]
        if not names:
            raise MissingColumnError(f"no column named '{REWARD_PREFIX}<name>'; found {table.column_names}")
        if "group" not in table.column_names:
            raise MissingColumnError(f"no column named 'group'; found {table.column_names}")
        narrow = all(str(table.schema.field(name).type) in ("float", "halffloat") for name in names)
        rewards = np.empty((len(table), len(names)), dtype=np.float32 if narrow else np.float64)
        for k, name in enumerate(names):
            rewards[:, k] = _numbers_from_arrow(table[name], name)
        others = [name for name in table.column_names if name not in names and name != "group"]
        return cls(
            torch.from_numpy(rewards),
            tuple(name.removeprefix(REWARD_PREFIX) for name in names),
            _from_arrow(table["group"]),
            {name: _from_arrow(table[name]) for name in others},
        )

    def write_parquet(self, path: str | Path) -> Path:
        """Write the batch to one Parquet file; an existing file is replaced as a whole or left untouched."""
        from polyreward.storage import write_parquet

        return write_parquet(self.to_arrow(), path)

    @classmethod
    def read_parquet(cls, path: str | Path) -> RewardBatch:
        """Read a file that `write_parquet` wrote. `polyreward.data.rollouts` reads other layouts and folders."""
        import pyarrow.parquet as pq

        from polyreward.errors import MissingFileError

        if not Path(path).exists():
            raise MissingFileError(f"no such file: {path}")
        return cls.from_arrow(pq.read_table(path))


def _as_rewards(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        rewards = values
    else:
        kept = isinstance(values, np.ndarray) and values.dtype.kind == "f"
        try:
            array = np.asarray(values) if kept else np.asarray(values, dtype=np.float64).astype(np.float32)
            rewards = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"rewards must be numbers in a rectangle (N, K): {error}") from error
    if rewards.ndim == 1:
        rewards = rewards.unsqueeze(1)
    if rewards.ndim != 2:
        raise InvalidInputError(f"rewards must have shape (N, K), got {tuple(rewards.shape)}")
    if rewards.is_complex():
        raise InvalidInputError(f"rewards must be real numbers, got {rewards.dtype}")
    return rewards if rewards.is_floating_point() else rewards.float()


def _refuse_infinite(rewards: Tensor, names: tuple[str, ...]) -> None:
    infinite = torch.isinf(rewards)
    if bool(infinite.any()):
        row, k = (int(i) for i in infinite.nonzero()[0])
        raise InvalidInputError(
            f"reward {names[k]!r} is {float(rewards[row, k])} in row {row}; rewards must be finite "
            "(use NaN for 'does not apply')"
        )


def _as_column(name: str, values: Any, rows: int, device: torch.device) -> Tensor | np.ndarray:
    if isinstance(values, Tensor):
        column: Tensor | np.ndarray = values.to(device)
    elif isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InvalidInputError(f"column {name!r} has a single value, rewards has {rows} rows")
    else:
        array = values if isinstance(values, np.ndarray) else _column_array(list(values))
        if array.dtype.kind == "u" and array.dtype != np.uint64:
            array = array.astype(np.int64)
        numeric = array.dtype.kind in "ifb" and array.dtype.itemsize <= 8
        column = (
            torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"])).to(device)
            if numeric
            else array
        )
    if column.ndim == 0 or column.shape[0] != rows:
        found = "a single value" if column.ndim == 0 else f"{column.shape[0]} entries"
        raise InvalidInputError(f"column {name!r} has {found}, rewards has {rows} rows")
    return column


def _column_array(values: list[Any]) -> np.ndarray:
    if values and all(isinstance(v, int | float | np.number | np.bool_) for v in values):
        return np.asarray(values)
    return np.fromiter(values, dtype=object, count=len(values))


def _as_index(rows: Any, number: int, device: torch.device) -> Tensor:
    try:
        index = rows if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"rows must be whole numbers or booleans: {error}") from error
    if not index.numel() and index.dtype != torch.bool:
        index = index.to(torch.int64)
    if index.ndim != 1 or index.is_floating_point() or index.is_complex():
        raise InvalidInputError(f"rows must be whole numbers or booleans, got {index.dtype} {tuple(index.shape)}")
    if index.dtype == torch.bool:
        if len(index) != number:
            raise InvalidInputError(f"a mask of {len(index)} rows for a batch of {number}")
        return index.to(device).nonzero().squeeze(1)
    index = index.to(device=device, dtype=torch.int64)
    outside = (index < -number) | (index >= number)
    if bool(outside.any()):
        raise InvalidInputError(f"row {int(index[outside][0])} of a batch of {number}")
    return index


def _to_numpy(values: Tensor) -> np.ndarray:
    values = values.detach().cpu()
    narrow = values.is_floating_point() and values.dtype not in (torch.float32, torch.float64)
    return (values.float() if narrow else values).numpy()


def _to_arrow(values: Any, name: str) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError) as error:
        raise InvalidInputError(f"column {name!r} cannot be stored: {error}") from error


def _from_arrow(column: pa.ChunkedArray) -> np.ndarray:
    import pyarrow as pa

    kind = column.type
    whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    if pa.types.is_floating(kind) or (whole and column.null_count == 0):
        return column.to_numpy()
    values = column.to_pylist()
    return np.fromiter(values, dtype=object, count=len(values))


def _numbers_from_arrow(column: pa.ChunkedArray, name: str) -> np.ndarray:
    import pyarrow as pa

    kind = column.type
    if not (
        pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    ):
        raise InvalidInputError(f"column {name!r} holds {kind}, expected numbers")
    return column.cast(pa.float64(), safe=False).to_numpy()
