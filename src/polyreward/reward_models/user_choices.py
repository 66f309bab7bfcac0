"""Choices of users, as a personal judge shows them: query, the response that was preferred, the one that was not.

Used by `polyreward.reward_models.personal_judge` (arXiv 2602.12116).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.preferences import PreferenceData

Choice = tuple[Any, Any, Any]
"""Query, chosen and rejected response."""


def choices_of(data: PreferenceData) -> tuple[dict[Hashable, list[Choice]], dict[Hashable, list[int]]]:
    """The choices (query, best, worst) of every known annotator, and their rows in the data.

    Ties and comparisons without judgement are left out.

    Raises
    ------
    InvalidInputError
        No annotators, or none who prefers something.
    """
    if data.annotators is None:
        raise InvalidInputError(f"{data.source} has no annotators, whose choices the judge would show")
    ranks, starts = data.order()[0], np.concatenate([[0], np.cumsum(data.sizes)])
    choices: dict[Hashable, list[Choice]] = {}
    rows: dict[Hashable, list[int]] = {}
    for row, user in enumerate(data.annotators):
        own = ranks[starts[row] : starts[row + 1]]
        if user is not None and np.isfinite(own).any() and np.nanmin(own) < np.nanmax(own):
            best, worst = starts[row] + int(np.nanargmin(own)), starts[row] + int(np.nanargmax(own))
            choices.setdefault(user, []).append((data.prompts[row], data.responses[best], data.responses[worst]))
            rows.setdefault(user, []).append(row)
    if not choices:
        raise InvalidInputError(f"{data.source}: no known annotator prefers one response to another")
    return choices, rows


def per_row(values: Any, count: int, name: str) -> list[Any]:
    """One value for each of `count` completions, from as many or from one for all.

    Raises
    ------
    InvalidInputError
        Another number of values; values that no mapping can hold.
    """
    if values is None or isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        found = [values] * count
    else:
        found = list(values)
    if len(found) != count:
        raise InvalidInputError(f"{name} has {len(found)} entries for {count} completions")
    for row, value in enumerate(found):
        try:
            hash(value)
        except TypeError as error:
            raise InvalidInputError(
                f"{name} of row {row} is a {type(value).__name__}, expected a plain value"
            ) from error
    return found


def plain_user(user: Any) -> Any:
    """A user as JSON holds it.

    Raises
    ------
    InvalidInputError
        Anything but a text or a number.
    """
    value = user.item() if isinstance(user, np.generic) else user
    if not isinstance(value, str | int | float | bool):
        raise InvalidInputError(f"the user {user!r} cannot be stored as JSON; name users by texts or numbers")
    return value
