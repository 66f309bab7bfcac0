"""Columns of a rollout batch, collected from every process in the order of the gathered rewards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from polyreward.errors import InvalidInputError


def gather_columns(columns: Mapping[str, Sequence[Any]], rows: int) -> dict[str, list[Any]]:
    """Concatenate the columns of all processes.

    Parameters
    ----------
    columns : mapping of name to `rows` values of this process
        A column that some processes lack is None there.
    rows : samples of this process

    Raises
    ------
    InvalidInputError
        A column of another length.
    """
    for name, values in columns.items():
        if len(values) != rows:
            raise InvalidInputError(f"column {name!r} has {len(values)} values for {rows} completions")
    samples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    everyone = gather_object(samples)
    names = dict.fromkeys(name for sample in everyone for name in sample)
    return {name: [sample.get(name) for sample in everyone] for name in names}


def completion_hash(tokens: Sequence[int]) -> int:
    """A 64-bit number that identifies a completion, the same in every process and run."""
    digest = hashlib.blake2b(np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt or completion as text: itself, or the contents of its messages, a line each."""
    if isinstance(content, str):
        return content
    return "\n".join(str(message.get("content") or "") for message in content)
