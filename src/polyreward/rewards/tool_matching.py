"""How well a list of tool calls agrees with the reference calls, part by part (ToolRL, arXiv 2504.13958).

With multiset Jaccard J, reference G, prediction P and m(g, p) = J(keys(g), keys(p)) + number of equal values:

    S = J(names(G), names(P)) + sum over matched pairs of m(g, p),   S_max = 1 + sum over g of (1 + |parameters of g|)

and the reward is ``low + (high - low) * S / S_max``. Only calls of the same name are matched, each once. The paper
writes an optimal assignment; its released code takes for each reference call in order the best unused prediction.

Values are equal as Python compares parsed JSON: 1, 1.0 and true are equal, "1" is none of them; order counts in lists
and not in objects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError

Granularity = Literal["fine", "refined", "intermediate", "coarse"]
Matching = Literal["greedy", "optimal"]
GRANULARITIES: tuple[Granularity, ...] = ("fine", "refined", "intermediate", "coarse")
MATCHINGS: tuple[Matching, ...] = ("greedy", "optimal")


@dataclass(frozen=True)
class ToolCall:
    """A call: the tool's name and its parameters by name."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ToolCallScore:
    """Correctness of predicted calls, with its parts.

    Attributes
    ----------
    total : float in [low, high]
    names, keys, values : float
        Points earned for tool names, parameter names and parameter values. With intermediate granularity `values`
        counts identical calls; with coarse all are 0.
    largest : float
        S_max, the points of a right answer.
    equal : bool
        Prediction and reference are the same list.
    reason : str or None
        Why the prediction could not be read; `total` is then the lower limit.
    """

    total: float
    names: float = 0.0
    keys: float = 0.0
    values: float = 0.0
    largest: float = 0.0
    equal: bool = False
    reason: str | None = None


def multiset_jaccard(first: Iterable[Hashable], second: Iterable[Hashable]) -> float:
    """``|a n b| / (|a| + |b| - |a n b|)`` counting repetitions; 1 for two empty collections. Range [0, 1]."""
    a, b = Counter(first), Counter(second)
    shared = (a & b).total()
    union = a.total() + b.total() - shared
    return shared / union if union else 1.0


def score_tool_calls(
    reference: Sequence[ToolCall],
    predicted: Sequence[ToolCall],
    low: float = -3.0,
    high: float = 3.0,
    granularity: Granularity = "fine",
    matching: Matching = "greedy",
) -> ToolCallScore:
    """Correctness of `predicted` against `reference`.

    Parameters
    ----------
    reference, predicted : lists of `ToolCall`
    low, high : float, low < high
    granularity : "fine" (the equation above), "refined" (every Jaccard is 1 for equal lists in equal order, else 0),
        "intermediate" (a call earns 1 where an identical unused one exists), "coarse" (`high` or `low`)
    matching : "greedy" as released, "optimal" as written

    Raises
    ------
    InvalidInputError
        An unknown granularity or matching.
    """
    check_options(granularity, matching)
    equal = list(reference) == list(predicted)
    whole = granularity in ("coarse", "intermediate")
    largest = 1.0 + sum(1.0 if whole else 1.0 + len(call.parameters) for call in reference)
    if granularity == "coarse":
        return ToolCallScore(high if equal else low, largest=largest, equal=equal)
    strict = granularity == "refined"
    names = _agreement([call.name for call in reference], [call.name for call in predicted], strict)
    keys = np.zeros((len(reference), len(predicted)))
    values = np.zeros_like(keys)
    for row, wanted in enumerate(reference):
        for column, given in enumerate(predicted):
            if wanted.name != given.name:
                continue
            if granularity == "intermediate":
                values[row, column] = wanted == given
                continue
            keys[row, column] = _agreement(list(wanted.parameters), list(given.parameters), strict)
            values[row, column] = sum(
                key in given.parameters and given.parameters[key] == value for key, value in wanted.parameters.items()
            )
    rows, columns = _greedy(keys + values) if matching == "greedy" else _optimal(keys + values)
    key_points, value_points = float(keys[rows, columns].sum()), float(values[rows, columns].sum())
    total = high if equal else low + (high - low) * (names + key_points + value_points) / largest
    return ToolCallScore(total, names, key_points, value_points, largest, equal)


def check_options(granularity: str, matching: str) -> None:
    """Refuse an unknown granularity or matching."""
    if granularity not in GRANULARITIES:
        raise InvalidInputError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    if matching not in MATCHINGS:
        raise InvalidInputError(f"matching must be one of {', '.join(MATCHINGS)}, got {matching!r}")


def _agreement(first: list[str], second: list[str], strict: bool) -> float:
    return float(first == second) if strict else multiset_jaccard(first, second)


def _greedy(points: np.ndarray) -> tuple[list[int], list[int]]:
    """For each row in order the first best unused column, where it earns anything."""
    rows, columns = [], []
    free = points.copy()
    for row in range(points.shape[0] if points.shape[1] else 0):
        best = int(free[row].argmax())
        if free[row, best] > 0:
            rows.append(row)
            columns.append(best)
            free[:, best] = 0
    return rows, columns


def _optimal(points: np.ndarray) -> tuple[Any, Any]:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(points, maximize=True)  # type: ignore[no-any-return]
