"""Columns of an Arrow table as what a `RewardBatch` holds: numbers, codes, labels; errors name the row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from polyreward.errors import InvalidInputError

if TYPE_CHECKING:
    import pyarrow as pa

_WORDS = {"true": 1.0, "false": 0.0}


def numbers_of(table: pa.Table, name: str, where: str, shown: str = "") -> np.ndarray:
    """A column as floats (N,), NaN where it has no value; float32 stays float32.

    Booleans count 1 and 0, and texts that read as numbers are numbers.

    Raises
    ------
    InvalidInputError
        An entry that is no number, or is infinite; the message names the row, from 1.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column, shown = table[name], shown or f"column {name!r}"
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = np.array([_number(text, shown, row, where) for row, text in enumerate(column.to_pylist(), start=1)])
    elif pa.types.is_floating(kind):
        values = column.to_numpy()
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        values = pc.cast(pc.cast(column, pa.uint8()) if pa.types.is_boolean(kind) else column, pa.float64(), safe=False)
        values = values.to_numpy()
    else:
        row = next((i for i, value in enumerate(column.to_pylist(), start=1) if value is not None), 1)
        raise InvalidInputError(
            f"{where}: {shown} is {_short(column[row - 1].as_py())} in row {row}, expected a number"
        )
    infinite = np.flatnonzero(np.isinf(values))
    if len(infinite):
        row = int(infinite[0])
        raise InvalidInputError(f"{where}: {shown} is {values[row]} in row {row + 1}, expected a finite number")
    return values.astype(np.float32 if values.dtype.itemsize <= 4 else np.float64, copy=False)


def codes_of(table: pa.Table, names: Sequence[str], where: str) -> tuple[np.ndarray, int]:
    """Dense codes (N,) of the distinct values of one or several columns, and how many there are.

    Values of any type: texts, numbers, chat messages.

    Raises
    ------
    InvalidInputError
        A row without a value (null or NaN).
    """
    codes = np.zeros(table.num_rows, dtype=np.int64)
    number = 1
    for name in names:
        column = plain(table[name])
        encoded = column.dictionary_encode(null_encoding="mask").combine_chunks()
        found = encoded.indices.to_numpy(zero_copy_only=False)
        missing = np.isnan(found) if found.dtype.kind == "f" else np.zeros(len(found), dtype=bool)
        values = encoded.dictionary.to_numpy(zero_copy_only=False)
        if values.dtype.kind == "f":
            missing |= np.isin(found, np.flatnonzero(np.isnan(values)))
        if missing.any():
            row = int(np.flatnonzero(missing)[0]) + 1
            raise InvalidInputError(f"{where}: column {name!r} has no value in row {row}; every row needs one")
        joint = codes * max(len(values), 1) + found.astype(np.int64)
        distinct, codes = np.unique(joint, return_inverse=True)
        number = len(distinct)
    return codes, number


def values_of(column: pa.ChunkedArray) -> np.ndarray:
    """A column as numpy: numbers (NaN for null), vectors (N, D), or Python objects shared by equal rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_boolean(kind) and not column.null_count:
        return column.to_numpy()
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return column.to_numpy()
    if pa.types.is_boolean(kind):
        return pc.cast(pc.cast(column, pa.uint8()), pa.float64()).to_numpy()
    if pa.types.is_null(kind):
        return np.full(len(column), np.nan)
    if _is_list(kind) and pa.types.is_floating(kind.value_type) and not column.null_count:
        width = np.unique(pc.list_value_length(column).to_numpy())
        if len(width) == 1 and width[0] > 0:
            return pc.list_flatten(column).to_numpy().reshape(len(column), int(width[0]))
    if pa.types.is_nested(kind):
        values = np.empty(len(column), dtype=object)
        values[:] = column.to_pylist()
        return values
    encoded = column if pa.types.is_dictionary(kind) else column.dictionary_encode()
    encoded = encoded.combine_chunks()
    table = np.array([*encoded.dictionary.to_pylist(), None], dtype=object)
    indices = encoded.indices.fill_null(len(table) - 1).to_numpy(zero_copy_only=False)
    return table[indices]


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column, lists and records (chat messages) as their JSON text."""
    import pyarrow as pa

    if not pa.types.is_nested(column.type):
        return column
    texts = [None if value is None else json.dumps(value, default=str) for value in column.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _number(text: str | None, shown: str, row: int, where: str) -> float:
    if text is None or not text.strip():
        return float("nan")
    word = text.strip().lower()
    try:
        return _WORDS[word] if word in _WORDS else float(word)
    except ValueError:
        raise InvalidInputError(f"{where}: {shown} is {_short(text)} in row {row}, expected a number") from None


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
