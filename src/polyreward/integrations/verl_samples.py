"""The samples of a verl rollout batch as a `RewardBatch`.

What verl knows about a sample is scattered: dataset columns (``data_source``, ``ability``), what the reward function
returned beside the score (``reward_extra_info``), and nested tables (``extra_fields``, ``extra_info``). `Samples` finds
a value by its name wherever it stands. Two kinds of row take no part in statistics: the synthetic rows that verl
appends to fill a batch, and the earlier outputs of a session with several, which share the advantage of its last one.

Nothing here imports verl.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError, nearest
from polyreward.integrations.verl_settings import SECTION, Settings

TABLES = ("extra_fields", "extra_info")
"""Fields that hold a table a sample; the first holds what the reward function returned."""

FALLBACKS = {"task": "data_source"}
"""Where a column comes from that neither the settings nor the samples name."""


@dataclass(frozen=True)
class Samples:
    """Per-sample fields of N rows.

    Parameters
    ----------
    values : mapping of field to N values
    counted : rows that take part in statistics, or None for all
    source : (N,) for each row the position in `counted` of the row whose advantage it has, -1 for none; or None
    """

    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    counted: Sequence[int] | None = None
    source: Sequence[int] | None = None

    @classmethod
    def of_sessions(cls, values: Mapping[str, Sequence[Any]], keys: Sequence[str], padding: Sequence[bool]) -> Samples:
        """Samples of verl's queue, whose keys read ``uid_session_index``; `padding` marks the synthetic rows."""
        last: dict[str, tuple[int, int]] = {}
        sessions = [key.rsplit("_", 1) for key in keys]
        for row, ((session, index), synthetic) in enumerate(zip(sessions, padding, strict=True)):
            if not synthetic and (session not in last or last[session][0] < int(index)):
                last[session] = (int(index), row)
        counted = sorted(row for _, row in last.values())
        place = {row: position for position, row in enumerate(counted)}
        source = [
            -1 if synthetic else place[last[session][1]]
            for (session, _), synthetic in zip(sessions, padding, strict=True)
        ]
        return cls(values, counted, source)

    def find(self, name: str) -> list[Any] | None:
        """Values of the field `name`, None where a row lacks it; None when every row does."""
        if name in self.values:
            return list(self.values[name])
        for table in TABLES:
            if table not in self.values:
                continue
            rows = [row if isinstance(row, Mapping) else {} for row in self.values[table]]
            for tables in ([row.get("reward_extra_info") or {} for row in rows], rows):
                found = [row.get(name) for row in tables]
                if any(value is not None for value in found):
                    return found
        return None

    def names(self) -> list[str]:
        """Every name that `find` knows."""
        found = {name for name in self.values if name not in TABLES}
        for table in TABLES:
            for row in self.values.get(table, ()):
                if isinstance(row, Mapping):
                    found |= {str(key) for key in row if key != "reward_extra_info"}
                    found |= set(row.get("reward_extra_info") or {})
        return sorted(found)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the counted rows given to all N rows; 0 for a row that has none."""
        if self.source is None:
            return values
        source = torch.tensor(self.source, dtype=torch.int64, device=values.device)
        padded = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
        return padded[source]


def fields_wanted(settings: Settings) -> list[str]:
    """Per-sample fields that the settings may need, for a store that must be told what to fetch."""
    names = {*TABLES, *FALLBACKS, *FALLBACKS.values(), "stratum", *settings.rewards, *settings.columns.values()}
    return sorted(names | set(_strings(settings.parameters)))


def reward_batch(
    scores: Tensor, lengths: Tensor, uids: Sequence[Any] | np.ndarray | None, samples: Samples, settings: Settings
) -> RewardBatch:
    """The counted samples as a record: rewards, groups by uid, columns.

    Parameters
    ----------
    scores : float tensor (N,), the one reward where the settings name none
    lengths : tensor (N,), response tokens, the column ``length``
    uids : N ids, equal for samples of one prompt
    samples : where rewards and columns come from
    settings : which rewards and columns

    Raises
    ------
    MissingColumnError
        A reward or a column that no sample has; the message offers the nearest name.
    InvalidInputError
        A reward that is not a number, samples without uid, a column that some counted rows lack.
    """
    if uids is None:
        raise InvalidInputError("the batch has no 'uid', so nothing says which samples share a prompt")
    rows = list(range(len(scores)) if samples.counted is None else samples.counted)
    index = torch.tensor(rows, dtype=torch.int64, device=scores.device)
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    names = settings.rewards or ("score",)
    rewards = scores[index].unsqueeze(1)
    if settings.rewards:
        columns = [_reward(name, samples, rows) for name in settings.rewards]
        rewards = torch.tensor(columns, dtype=torch.float64, device=scores.device).T
    found = {name: _column(name, samples, rows, settings) for name in _column_names(settings)}
    known = {"length": lengths[index], **{name: values for name, values in found.items() if values is not None}}
    return RewardBatch(rewards, names, [str(uids[row]) for row in rows], known)


def _column_names(settings: Settings) -> list[str]:
    named = set(_strings(settings.parameters)) - {"group", "batch", "length", *settings.rewards}
    return sorted({*FALLBACKS, "stratum", *settings.columns} | named)


def _reward(name: str, samples: Samples, rows: Sequence[int]) -> list[float]:
    values = samples.find(name)
    if values is None:
        raise MissingColumnError(
            f"{SECTION}.rewards names {name!r}, which no sample has{nearest(name, samples.names())}; "
            "let the reward function return it beside 'score'"
        )
    numbers = []
    for row in rows:
        value = values[row]
        try:
            numbers.append(math.nan if value is None else float(value))
        except (TypeError, ValueError):
            raise InvalidInputError(f"reward {name!r} is {value!r} in row {row}, expected a number or None") from None
    return numbers


def _column(name: str, samples: Samples, rows: Sequence[int], settings: Settings) -> list[Any] | None:
    field_name = settings.columns.get(name, name)
    values = samples.find(field_name)
    if values is None and name in settings.columns:
        raise MissingColumnError(
            f"{SECTION}.columns.{name} names {field_name!r}, which no sample has{nearest(field_name, samples.names())}"
        )
    if values is None and name in FALLBACKS:
        values = samples.find(FALLBACKS[name])
    if values is None:
        return None
    absent = [row for row in rows if values[row] is None]
    if absent and name in settings.columns:
        raise InvalidInputError(
            f"column {name!r} ({field_name!r}) has no value in row {absent[0]}; every sample needs one"
        )
    return None if absent else [_scalar(values[row]) for row in rows]


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic | Tensor) else value


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)
