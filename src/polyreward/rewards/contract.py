"""The contract of a reward, and what every reward that scores one sample at a time shares.

A reward is TRL's own callable: ``reward(prompts, completions, **columns) -> list[float | None]``. `completions` are
strings or lists of chat messages; columns are lists of the same length; None or NaN says that the reward does not apply
to that sample. Any function of that form is a reward. `Reward` is the base of those defined here: it has a name, it
adds and multiplies, and its subclasses are frozen dataclasses, which pickle into worker processes.

What a model wrote never raises an error: text that cannot be read earns the lowest value. A wrong reference, in a
column of the data set, is an error that names reward, column and row.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from polyreward.errors import InvalidInputError, MissingColumnError, nearest

RewardFunction = Callable[..., Sequence[float | None]]
_NUMBER = int | float | np.number

#: Row of the first completion in the caller's batch, for errors; a worker that is given a part of a batch sets it.
first_row: ContextVar[int] = ContextVar("first_row", default=0)


@dataclass(frozen=True)
class Sample:
    """One row of a batch, as `Reward.score` sees it.

    Attributes
    ----------
    row : int
        Index in the batch.
    prompt, completion : str or list of messages
    columns : mapping of column name to this row's value
        Every column of the batch that has one entry a row. Arrays in the columns that the reward reads (list columns of
        pandas and parquet) are lists here.
    step : float or None
        Training step, where the batch tells it.
    tokens : int or None
        Number of completion tokens, where the batch tells it.
    """

    row: int
    prompt: Any
    completion: Any
    columns: Mapping[str, Any]
    step: float | None = None
    tokens: int | None = None

    @cached_property
    def text(self) -> str:
        """What the model wrote."""
        return text_of(self.completion)


class Reward:
    """Base of rewards. A subclass defines `score` for one sample, or `__call__` for the whole batch."""

    @property
    def __name__(self) -> str:
        """Name in logs: the class name in snake case."""
        title: str = type(self).__name__  # type: ignore[assignment]
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", title).lower()

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns without which the reward cannot score; it does not apply to a row where one of them is None."""
        return ()

    def score(self, sample: Sample) -> float | None:
        """Value of one sample; None where the reward does not apply."""
        raise TypeError(f"{type(self).__name__} defines neither score nor __call__")

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score a batch.

        Parameters
        ----------
        prompts, completions : length N, strings or lists of messages
        columns : lists of length N; anything else a trainer passes (``trainer_state``, ``log_extra``, ...) is accepted

        Returns
        -------
        list of N finite floats or None

        Raises
        ------
        MissingColumnError
            A column that the reward reads is absent; the message offers the nearest one.
        InvalidInputError
            A column of another length than the completions, or a reference that the reward cannot use.
        """
        values: list[float | None] = [None] * len(completions)
        for sample in self.samples(prompts, completions, columns):
            value = self.score(sample)
            values[sample.row] = None if is_missing(value) else float(value)  # type: ignore[arg-type]
        return values

    def samples(
        self, prompts: Sequence[Any] | None, completions: Sequence[Any], columns: Mapping[str, Any]
    ) -> Iterator[Sample]:
        """The rows of a batch to which the reward applies; raises as `__call__` does."""
        rows = len(completions)
        if rows == 0:
            return
        if prompts is not None and len(prompts) != rows:
            raise InvalidInputError(f"reward {self.__name__!r}: {len(prompts)} prompts for {rows} completions")
        for name in self.reads:
            self._check(name, columns, rows)
        tables = {name: values for name, values in columns.items() if is_column(values, rows)}
        steps, tokens = _steps(columns, rows), tables.get("completion_ids")
        for row in range(rows):
            own = {name: column[row] for name, column in tables.items()}
            own |= {name: _without_arrays(own[name]) for name in self.reads}
            if any(is_missing(own[name]) for name in self.reads):
                continue
            ids = None if tokens is None or tokens[row] is None else len(tokens[row])
            prompt = None if prompts is None else prompts[row]
            yield Sample(row, prompt, completions[row], own, steps[row], ids)

    def _check(self, name: str, columns: Mapping[str, Any], rows: int) -> None:
        if name not in columns:
            raise MissingColumnError(f"reward {self.__name__!r} reads the column {name!r}{nearest(name, columns)}")
        if not is_column(columns[name], rows):
            found = f"{len(columns[name])} entries" if is_listing(columns[name]) else repr(columns[name])
            raise InvalidInputError(
                f"reward {self.__name__!r}: column {name!r} has {found}, expected a list of {rows}, one a completion"
            )

    def refuse(self, sample: Sample, column: str, problem: str) -> InvalidInputError:
        """The error of a reference that cannot be used; the caller raises it."""
        row = first_row.get() + sample.row
        return InvalidInputError(f"reward {self.__name__!r}: column {column!r}, row {row}: {problem}")

    def __add__(self, other: RewardFunction | float) -> Reward:
        from polyreward.rewards.composition import affine, weighted_sum

        return affine(self, shift=float(other)) if isinstance(other, _NUMBER) else weighted_sum(self, other)

    def __radd__(self, other: RewardFunction | float) -> Reward:
        from polyreward.rewards.composition import affine, weighted_sum

        return affine(self, shift=float(other)) if isinstance(other, _NUMBER) else weighted_sum(other, self)

    def __mul__(self, factor: float) -> Reward:
        from polyreward.rewards.composition import affine

        return affine(self, scale=float(factor)) if isinstance(factor, _NUMBER) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Reward:
        if not isinstance(divisor, _NUMBER):
            return NotImplemented
        if divisor == 0 or not is_finite(divisor):
            raise InvalidInputError(f"reward {self.__name__!r} / {divisor}: expected a finite divisor other than 0")
        return self * (1 / divisor)

    def __neg__(self) -> Reward:
        return self * -1.0

    def __sub__(self, other: RewardFunction | float) -> Reward:
        from polyreward.rewards.composition import affine, weighted_sum

        if isinstance(other, _NUMBER):
            return affine(self, shift=-float(other))
        return weighted_sum(self, other, weights=(1.0, -1.0))

    def __rsub__(self, other: RewardFunction | float) -> Reward:
        from polyreward.rewards.composition import affine, weighted_sum

        if isinstance(other, _NUMBER):
            return affine(self, scale=-1.0, shift=float(other))
        return weighted_sum(other, self, weights=(1.0, -1.0))


def text_of(completion: Any) -> str:
    """The text that the model wrote: the string itself, or the contents of the assistant's messages, joined.

    Messages of other roles (tool results) do not count. Contents may be strings, None, or lists of parts of which
    those with a ``text`` count. Anything else reads as empty text.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        completion = [completion]
    if not isinstance(completion, list | tuple):
        return ""
    messages = [m for m in completion if isinstance(m, Mapping) and m.get("role", "assistant") == "assistant"]
    return "".join(_content(message.get("content")) for message in messages)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        return "".join(part["text"] for part in content if isinstance(part, Mapping) and type(part.get("text")) is str)
    return ""


def is_missing(value: Any) -> bool:
    """Whether a value is None or NaN."""
    return value is None or (isinstance(value, float | np.floating) and math.isnan(value))


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
        return False


def finite_numbers(values: Any) -> tuple[float, ...] | None:
    """The values as a tuple of floats; None where they are no list of finite numbers."""
    try:
        entries = list(values)
    except TypeError:
        return None
    return tuple(map(float, entries)) if all(map(is_finite, entries)) else None


def is_listing(values: Any) -> bool:
    """Whether values are a list or something like one, such as an array or tensor with an axis."""
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__getitem__"):
        return False
    return hasattr(values, "__len__") and _has_axis(values)


def name_of(reward: RewardFunction) -> str:
    """The name under which a reward is logged."""
    return str(getattr(reward, "__name__", type(reward).__name__))


def values_of(
    reward: RewardFunction, prompts: Sequence[Any] | None, completions: Sequence[Any], columns: Mapping[str, Any]
) -> np.ndarray:
    """Call a reward and check what comes back, float64 (N,), NaN where it does not apply.

    Raises
    ------
    InvalidInputError
        Not one number or None a completion, or an infinite number; the message names the reward and the row.
    """
    name = name_of(reward)
    result: Any = reward(prompts=prompts, completions=completions, **columns)
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise InvalidInputError(f"reward {name!r} is asynchronous; only plain functions compose")
    return check_values(result, len(completions), name)


def check_values(result: Any, rows: int, name: str) -> np.ndarray:
    """What a reward returned as float64 (rows,), NaN where it does not apply.

    Parameters
    ----------
    result : list, tensor, array or iterator of numbers, None and NaN
    rows : int
        Number of completions that it was given.
    name : str
        Name of the reward, for errors.

    Raises
    ------
    InvalidInputError
        Not one number or None a completion, or an infinite number; the message names the reward and the row, counted
        from `first_row`.
    """
    if isinstance(result, str | bytes | Mapping | Set) or not (hasattr(result, "__iter__") and _has_axis(result)):
        kind = type(result).__name__
        raise InvalidInputError(f"reward {name!r} returned {kind}, expected a list of {rows} numbers or None")
    returned = list(result)
    if len(returned) != rows:
        raise InvalidInputError(f"reward {name!r} returned {len(returned)} values for {rows} completions")
    values, first = np.full(rows, np.nan), first_row.get()
    for row, value in enumerate(returned):
        if value is None:
            continue
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            values[row] = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
            raise InvalidInputError(
                f"reward {name!r} returned {value!r} for completion {first + row}, expected a number or None"
            ) from None
        if math.isinf(values[row]):
            raise InvalidInputError(
                f"reward {name!r} returned {values[row]} for completion {first + row}; rewards must be finite"
            )
    return values


def _has_axis(result: Any) -> bool:
    return getattr(result, "ndim", 1) > 0


def needed_columns(reward: Callable[..., Any]) -> tuple[str, ...]:
    """Columns that a reward function cannot be called without: its parameters without a default."""
    while callable(inner := getattr(reward, "reward", None)):  # under a name, or in the executor
        reward = inner
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # some callables of other languages have no signature
        return ()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = (p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind in by_name)
    return tuple(name for name in needed if name not in ("prompts", "completions"))


def refuse_missing(name: str, needed: Sequence[str], known: Iterable[str]) -> None:
    """`MissingColumnError` for the first column that a reward needs and that is not known."""
    known = set(known)
    for column in needed:
        if column not in known:
            raise MissingColumnError(f"reward {name!r} reads the column {column!r}{nearest(column, known)}")


def as_list(values: np.ndarray) -> list[float | None]:
    """Float array (N,) as a list with None in place of NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def is_column(values: Any, rows: int) -> bool:
    """Whether values are a listing with one entry a row."""
    return is_listing(values) and len(values) == rows


def _without_arrays(value: Any) -> Any:
    """A value with lists in place of arrays, at any depth of what arrays and dicts hold."""
    if isinstance(value, dict):
        return {key: _without_arrays(entry) for key, entry in value.items()}
    if not isinstance(value, np.ndarray):
        return value
    return [_without_arrays(entry) for entry in value] if value.dtype == object and value.ndim else value.tolist()


def _steps(columns: Mapping[str, Any], rows: int) -> list[float | None]:
    """The training step of each row: the trainer's, or the column or number ``step``."""
    state = columns.get("trainer_state")
    step = columns.get("step") if state is None else state.global_step
    if is_column(step, rows):
        return [None if is_missing(value) else float(value) for value in step]  # type: ignore[union-attr]
    if getattr(step, "ndim", None) == 0:  # an array or tensor of one number
        step = step.item()  # type: ignore[union-attr]
    return [float(step) if isinstance(step, int | float) else None] * rows
