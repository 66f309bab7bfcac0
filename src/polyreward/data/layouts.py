"""Layouts of rollout logs - ours, TRL's, verl's, a plain table with a mapping - turned into ours.

Ours has a column ``group``, columns ``reward/<name>``, and any others. See `polyreward.data.rollouts` for what is
recognised.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from polyreward.batch import REWARD_PREFIX
from polyreward.data.columns import codes_of, numbers_of
from polyreward.errors import MissingColumnError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

Columns = str | Sequence[str]
_TRL = {"step", "prompt", "completion", "advantage"}
_VERL = {"input", "output", "score"}


def to_our_layout(table: pa.Table, mapping: Mapping[str, Columns], where: str) -> pa.Table:
    """Rename what `mapping` names, recognise TRL's and verl's tables, and put rewards and group in their columns.

    Raises
    ------
    MissingColumnError
        A mapped column does not exist, or it is not clear which columns are the rewards or the group.
    """
    for key, wanted in mapping.items():
        for column in _listed(wanted):
            if column not in table.column_names:
                raise MissingColumnError(
                    f"{where} has no column {column!r} (mapped to {key!r}){nearest(column, table.column_names)}"
                )
    fields = {key: _listed(wanted) for key, wanted in mapping.items()}
    rewards, group = fields.pop("rewards", []), fields.pop("group", [])
    for key, columns in fields.items():
        table = put(table, key, table[columns[0]] if len(columns) == 1 else codes_of(table, columns, where)[0])
    if not rewards and not any(name.startswith(REWARD_PREFIX) for name in table.column_names):
        names = set(table.column_names)
        if names >= _TRL:
            rewards = _trl_rewards(table, where)
            if not group:
                table, group = put(table, "group", _trl_groups(table, where)), ["group"]
        elif names >= _VERL:
            rewards = _verl_rewards(table, where)
            table, group = _verl_groups(table, group)
            if "task" not in names and "data_source" in names:
                table = put(table, "task", table["data_source"])
        else:
            raise MissingColumnError(
                f"{where}: cannot tell which columns are rewards; name them, e.g. --map rewards=score "
                f"--map group=prompt. Columns: {', '.join(table.column_names)}"
            )
    for column in rewards:
        table = put(table, REWARD_PREFIX + column.removeprefix(REWARD_PREFIX), table[column])
    table = table.drop_columns([c for c in dict.fromkeys(rewards) if not c.startswith(REWARD_PREFIX)])
    if group and group != ["group"]:
        table = put(table, "group", codes_of(table, group, where)[0])
    if "group" not in table.column_names:
        raise MissingColumnError(f"{where} has no column 'group'; name the prompt's column, e.g. --map group=prompt")
    return table


def put(table: pa.Table, name: str, values: Any) -> pa.Table:
    """The table with a column added or replaced."""
    import pyarrow as pa

    column = values if isinstance(values, pa.ChunkedArray | pa.Array) else pa.array(values)
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)


def without_repeats(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Leave out rows that TRL logged before.

    It logs the completions of its last generation at each logging step, so a generation that serves several optimiser
    steps comes again as a whole, and one that an evaluation followed comes again in part, at the head of the next file.
    """
    kept: list[pa.Table] = []
    before: pa.Table | None = None
    for table in tables:
        content = table.drop_columns(["step"]) if "step" in table.column_names else table
        repeated = 0 if before is None else _overlap(before, content)
        before = content
        if repeated < table.num_rows or not table.num_rows:
            kept.append(table.slice(repeated))
    return kept


def _overlap(before: pa.Table, table: pa.Table) -> int:
    """Rows at the head of `table` that are the last ones of `before`; fewer than half of them may be chance."""
    if before.schema != table.schema:
        return 0
    for rows in range(min(before.num_rows, table.num_rows), max(table.num_rows // 2, 1) - 1, -1):
        if before.slice(before.num_rows - rows).equals(table.slice(0, rows)):
            return rows
    return 0


def _listed(columns: Columns) -> list[str]:
    return [columns] if isinstance(columns, str) else list(columns)


def _trl_rewards(table: pa.Table, where: str) -> list[str]:
    """Reward columns of a TRL table: numbers between completion and advantage, before what `log_extra` adds.

    Extra columns follow the rewards, and may be numbers too. Where the sum of the first few columns, standardised by
    group, gives the advantages of the table, these (the most that do) are the rewards.
    """
    import pyarrow as pa

    names = table.column_names
    between = names[names.index("completion") + 1 : names.index("advantage")]
    kinds = {n: table.schema.field(n).type for n in between}
    found = [n for n in between if pa.types.is_floating(kinds[n]) or pa.types.is_null(kinds[n])]
    if not found:
        raise MissingColumnError(f"{where}: no reward column between 'completion' and 'advantage'; found {between}")
    groups = _trl_groups(table, where)
    advantage = numbers_of(table, "advantage", where)
    total, rewards = np.zeros(len(groups)), found
    for number, name in enumerate(found, start=1):
        total = total + np.nan_to_num(numbers_of(table, name, where))
        if np.allclose(_standardised(total, groups), advantage, rtol=1e-2, atol=1e-2) and advantage.any():
            rewards = found[:number]
    return rewards


def _standardised(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    count = np.bincount(groups)
    centred = values - (np.bincount(groups, values) / count)[groups]
    deviation = np.sqrt(np.bincount(groups, centred**2) / np.maximum(count - 1, 1))
    return centred / (deviation + 1e-4)[groups]


def _trl_groups(table: pa.Table, where: str) -> np.ndarray:
    """Group of each row: consecutive equal prompts of a step; one drawn twice in a row is split by the common size."""
    codes, _ = codes_of(table, ["prompt", "step"], where)
    starts = np.flatnonzero(np.append(True, codes[1:] != codes[:-1]))
    lengths = np.diff(np.append(starts, len(codes)))
    size = math.gcd(*lengths.tolist())
    if size == 1:
        return np.repeat(np.arange(len(lengths)), lengths)
    return np.arange(len(codes)) // size


def _verl_rewards(table: pa.Table, where: str) -> list[str]:
    """The score, or its components when further columns of numbers add up to it."""
    import pyarrow as pa

    extras = [
        name
        for name in table.column_names
        if name not in {*_VERL, "gts", "step", "uid", "request_id"}
        and (pa.types.is_floating(kind := table.schema.field(name).type) or pa.types.is_integer(kind))
    ]
    parts = {name: numbers_of(table, name, where) for name in extras}
    score = numbers_of(table, "score", where)
    for number in range(2, len(extras) + 1) if len(extras) <= 8 else [len(extras)]:
        for chosen in itertools.combinations(extras, number):
            if np.allclose(sum(parts[name] for name in chosen), score, atol=1e-6, equal_nan=True) and all(
                np.nanstd(parts[name]) > 0 for name in chosen
            ):
                return list(chosen)
    return ["score"]


def _verl_groups(table: pa.Table, group: list[str]) -> tuple[pa.Table, list[str]]:
    """Group by what the mapping names, else by verl's uid (sample_rollout_output), else by the prompt."""
    if group or "uid" not in table.column_names:
        return table, group or ["input"]
    samples = [None if uid is None else str(uid).rsplit("_", 2)[0] for uid in table["uid"].to_pylist()]
    return put(table, "group", samples), ["group"]
