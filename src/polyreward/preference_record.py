"""`Preference`: one comparison, and how its fields become numbers. `polyreward.preferences` holds many of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError

Column = Sequence[Any] | np.ndarray
"""Values of N comparisons or M responses."""

TIE, UNLABELLED = -1, -2
"""Values of `PreferenceData.choice`: no response was preferred; the comparison has no choice."""


@dataclass(frozen=True)
class Preference:
    """One comparison.

    Attributes
    ----------
    prompt : text, list of chat messages, or row of given features
    responses : two or more, each a text, a list of messages, or a row of given features
    choice : index of the preferred response, "tie", or None where there is no choice
    ranks : one number a response, 1 is best, equal numbers are ties, None was not compared
    ratings : one number a response, higher is better, None was not rated
    margin : strength of the preference, at least 0
    target : probability that the chosen one is the better one, in [0, 1]
    annotator : who judged
    columns : anything else
    """

    prompt: Any
    responses: Sequence[Any]
    choice: int | Literal["tie"] | None = None
    ranks: Sequence[float | None] | None = None
    ratings: Sequence[float | None] | None = None
    margin: float | None = None
    target: float | None = None
    annotator: Hashable = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def content_key(value: Any) -> Hashable:
    """A hashable that is equal for equal prompts or responses: the text itself, or the messages as JSON."""
    if isinstance(value, str | int | np.integer | tuple) or value is None:
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=_content)


def _content(value: Any) -> str:
    """A text that is the same for equal images and arrays, which JSON has no form for."""
    if not hasattr(value, "tobytes"):
        return str(value)
    shape = getattr(value, "shape", getattr(value, "size", ""))
    return f"{type(value).__name__} {shape} {hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()}"


def number_of(value: Any, where: str) -> float:
    """A number or NaN; `where` is how an error names it."""
    if value is None:
        return np.nan
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise InvalidInputError(f"{where} holds {value!r}, expected a number")
    return float(value)


def choice_of(value: Any, where: str) -> int:
    """A choice as a number: an index, `TIE` or `UNLABELLED`."""
    if value is None:
        return UNLABELLED
    if isinstance(value, str) and value == "tie":
        return TIE
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise InvalidInputError(f"{where}: choice is {value!r}, expected an index of a response or 'tie'")
    return int(value)


def listed(values: np.ndarray | None, span: slice) -> list[float | None] | None:
    """Numbers of one comparison, or None where there are none."""
    if values is None or np.isnan(values[span]).all():
        return None
    return [None if value != value else float(value) for value in values[span]]


def single(values: np.ndarray | None, index: int) -> float | None:
    """A number of one comparison, or None."""
    return None if values is None or np.isnan(values[index]) else float(values[index])
