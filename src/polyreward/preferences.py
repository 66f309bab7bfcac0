"""`PreferenceData`: the one record of what people preferred, as columns.

N comparisons. Each has a prompt, two or more responses, and one of: a choice, a (partial) ranking, a rating of each
response, or a choice with its strength. Responses of all comparisons lie in one flat list; `offsets` says where each
comparison begins. Readers of files are in `polyreward.data.preferences`; reward models take the record as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError, MissingColumnError, nearest
from polyreward.preference_record import (
    TIE,
    UNLABELLED,
    Column,
    Preference,
    choice_of,
    content_key,
    listed,
    number_of,
    single,
)

__all__ = [
    "TIE",
    "UNLABELLED",
    "Column",
    "IdenticalResponsesWarning",
    "Preference",
    "PreferenceData",
    "concatenate",
    "content_key",
]


class IdenticalResponsesWarning(UserWarning):
    """Comparisons were dropped because all their responses are the same."""


@dataclass(frozen=True, eq=False)
class PreferenceData:
    """Comparisons as columns.

    Parameters
    ----------
    prompts : length N
        Texts, lists of chat messages, or integers (rows of given features).
    responses : length M, flat
        The same. Those of comparison i are ``responses[offsets[i]:offsets[i + 1]]``.
    offsets : int (N + 1,), default two responses a comparison
    choice : int (N,), optional
        Index of the preferred response within the comparison, `TIE` or `UNLABELLED`.
    ranks : float (M,), optional
        1 is best, equal is a tie, NaN was not compared.
    ratings : float (M,), optional
        Higher is better, NaN was not rated.
    margin : float (N,), optional
        Strength, at least 0; NaN is none.
    target : float (N,), optional
        Probability in [0, 1] that the chosen response is the better one; NaN counts as 1.
    annotators : length N, optional
        Hashable ids; None is unknown.
    columns : mapping of name to length-N values
    scale : (lowest, highest) rating, optional
    source : str
        Name in errors, such as the path of a file.
    rows : int (N,), optional
        Rows in the source, from 1.

    Raises
    ------
    InvalidInputError
        Lengths that do not fit, a comparison of fewer than two responses, a choice, rank, rating, margin or target out
        of range. The message names source, row and field.
    """

    prompts: Column
    responses: Column
    offsets: np.ndarray | None = None
    choice: np.ndarray | None = None
    ranks: np.ndarray | None = None
    ratings: np.ndarray | None = None
    margin: np.ndarray | None = None
    target: np.ndarray | None = None
    annotators: Column | None = None
    columns: Mapping[str, Column] = field(default_factory=dict)
    scale: tuple[float, float] | None = None
    source: str = "preferences"
    rows: np.ndarray | None = None

    def __post_init__(self) -> None:
        count, flat = len(self.prompts), len(self.responses)
        if self.offsets is None and flat != 2 * count:
            raise InvalidInputError(
                f"{self.source}: {count} prompts and {flat} responses are not two a comparison; pass offsets"
            )
        offsets = np.arange(0, 2 * count + 1, 2) if self.offsets is None else np.asarray(self.offsets, np.int64)
        if offsets.shape != (count + 1,) or offsets[0] != 0 or offsets[-1] != flat:
            raise InvalidInputError(
                f"{self.source}: offsets must be {count + 1} numbers from 0 to {flat}, got shape {offsets.shape}"
            )
        object.__setattr__(self, "offsets", offsets)
        self._numbers("rows", count, np.int64)
        self._refuse(np.diff(offsets) < 2, "responses", "fewer than 2 responses", "two or more")
        self._numbers("choice", count, np.int64)
        for name, length in (("ranks", flat), ("ratings", flat), ("margin", count), ("target", count)):
            self._numbers(name, length, np.float32)
        if self.annotators is not None and len(self.annotators) != count:
            raise InvalidInputError(f"{self.source}: annotators has {len(self.annotators)} entries, expected {count}")
        for name, values in self.columns.items():
            if len(values) != count:
                raise InvalidInputError(f"{self.source}: column {name!r} has {len(values)} entries, expected {count}")
        self._check_labels()

    def _numbers(self, name: str, length: int, dtype: Any) -> None:
        values = getattr(self, name)
        if values is None:
            return
        try:
            array = np.asarray(values, dtype=np.float64 if dtype is np.float32 else dtype).astype(dtype, copy=False)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"{self.source}: {name} must be numbers ({error})") from error
        if array.shape != (length,):
            raise InvalidInputError(f"{self.source}: {name} has shape {array.shape}, expected ({length},)")
        object.__setattr__(self, name, array)

    def _check_labels(self) -> None:
        if self.choice is not None:
            wrong = (self.choice < UNLABELLED) | (self.choice >= self.sizes)
            self._refuse(wrong, "choice", self.choice, f"an index of a response, {TIE} (tie) or {UNLABELLED} (none)")
        owner = self.owner
        if self.ranks is not None:
            self._refuse((self.ranks < 1) | np.isinf(self.ranks), "ranks", self.ranks, "numbers from 1", owner)
        if self.ratings is not None:
            self._refuse(np.isinf(self.ratings), "ratings", self.ratings, "finite numbers", owner)
            if self.scale is not None:
                low, high = self.scale
                wrong = (self.ratings < low) | (self.ratings > high)
                self._refuse(wrong, "ratings", self.ratings, f"the scale {low:g} to {high:g}", owner)
        if self.margin is not None:
            self._refuse((self.margin < 0) | np.isinf(self.margin), "margin", self.margin, "a finite number from 0")
        if self.target is not None:
            self._refuse((self.target < 0) | (self.target > 1), "target", self.target, "a probability in [0, 1]")

    def _refuse(self, wrong: np.ndarray, name: str, found: Any, expected: str, owner: np.ndarray | None = None) -> None:
        if wrong.any():
            first = int(wrong.argmax())
            row = int(owner[first]) if owner is not None else first
            shown = found if isinstance(found, str) else f"{found[first]:g}"
            raise InvalidInputError(f"{self.where(row)}: {name} is {shown}, expected {expected}")

    @classmethod
    def pairs(cls, prompts: Column, chosen: Column, rejected: Column, **fields: Any) -> PreferenceData:
        """Comparisons of two, of which the first was preferred; `fields` as of the class."""
        if not len(prompts) == len(chosen) == len(rejected):
            raise InvalidInputError(
                f"pairs: {len(prompts)} prompts, {len(chosen)} chosen and {len(rejected)} rejected responses"
            )
        if isinstance(chosen, np.ndarray) and isinstance(rejected, np.ndarray):
            flat: Any = np.stack([chosen, rejected], axis=1).reshape(-1)
        else:
            flat = [response for pair in zip(chosen, rejected, strict=True) for response in pair]
        return cls(prompts, flat, choice=np.zeros(len(prompts), np.int64), **fields)

    @classmethod
    def of(
        cls,
        records: Iterable[Preference],
        *,
        scale: tuple[float, float] | None = None,
        source: str = "preferences",
        rows: Sequence[int] | None = None,
    ) -> PreferenceData:
        """Comparisons from records; a field that no record has stays None.

        Raises
        ------
        InvalidInputError
            As of the class, and for a ranking or ratings of another length than the responses.
        """
        records = list(records)
        numbers = list(range(1, len(records) + 1)) if rows is None else list(rows)
        sizes = [len(record.responses) for record in records]
        fields: dict[str, Any] = {}
        for name in ("ranks", "ratings"):
            if any(getattr(record, name) is not None for record in records):
                flat: list[float] = []
                for record, size, number in zip(records, sizes, numbers, strict=True):
                    values = [None] * size if getattr(record, name) is None else list(getattr(record, name))
                    if len(values) != size:
                        raise InvalidInputError(
                            f"{source}, row {number}: {name} has {len(values)} entries for {size} responses"
                        )
                    flat += [number_of(value, f"{source}, row {number}: {name}") for value in values]
                fields[name] = flat
        for name in ("margin", "target"):
            if any(getattr(record, name) is not None for record in records):
                fields[name] = [
                    number_of(getattr(record, name), f"{source}, row {number}: {name}")
                    for record, number in zip(records, numbers, strict=True)
                ]
        if any(record.choice is not None for record in records):
            fields["choice"] = [
                choice_of(record.choice, f"{source}, row {number}")
                for record, number in zip(records, numbers, strict=True)
            ]
        if any(record.annotator is not None for record in records):
            fields["annotators"] = [record.annotator for record in records]
        names = dict.fromkeys(name for record in records for name in record.columns)
        return cls(
            [record.prompt for record in records],
            [response for record in records for response in record.responses],
            np.cumsum([0, *sizes]),
            columns={name: [record.columns.get(name) for record in records] for name in names},
            scale=scale,
            source=source,
            rows=np.asarray(numbers, np.int64),
            **fields,
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Preference:
        index = range(len(self))[index]
        span = slice(int(self._starts[index]), int(self._starts[index + 1]))
        choice = None if self.choice is None else int(self.choice[index])
        return Preference(
            self.prompts[index],
            list(self.responses[span]),
            None if choice in (None, UNLABELLED) else "tie" if choice == TIE else choice,
            listed(self.ranks, span),
            listed(self.ratings, span),
            single(self.margin, index),
            single(self.target, index),
            None if self.annotators is None else self.annotators[index],
            {name: values[index] for name, values in self.columns.items()},
        )

    def __iter__(self) -> Iterator[Preference]:
        return (self[index] for index in range(len(self)))

    def where(self, index: int) -> str:
        """Source and row of a comparison, for errors."""
        return f"{self.source}, row {index + 1 if self.rows is None else int(self.rows[index])}"

    @property
    def _starts(self) -> np.ndarray:
        assert self.offsets is not None
        return self.offsets

    @property
    def sizes(self) -> np.ndarray:
        """Number of responses of each comparison, int64 (N,)."""
        return np.diff(self._starts)

    @cached_property
    def owner(self) -> np.ndarray:
        """Comparison of each response, int64 (M,)."""
        return np.repeat(np.arange(len(self)), self.sizes)

    @cached_property
    def annotator_names(self) -> tuple[Any, ...]:
        """The distinct known annotators, in order of appearance."""
        return tuple(dict.fromkeys(a for a in (() if self.annotators is None else self.annotators) if a is not None))

    def annotator_codes(self, names: Sequence[Any] | None = None) -> np.ndarray:
        """Place of each comparison's annotator in `names` (default `annotator_names`), int64 (N,); -1 is unknown."""
        if self.annotators is None:
            return np.full(len(self), -1, np.int64)
        place = {name: i for i, name in enumerate(self.annotator_names if names is None else names)}
        return np.array([place.get(a, -1) for a in self.annotators], np.int64)

    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """What is known of the order of the responses, from ranks, else the choice, else the ratings.

        Returns
        -------
        ranks : float32 (M,)
            Lower is better, NaN was not compared.
        top_only : bool (N,)
            Responses of equal rank were not judged to be ties: only the best is known, from a choice.
        """
        ranks = np.full(len(self.responses), np.nan, np.float32)
        top_only = np.zeros(len(self), bool)
        if self.ratings is not None:
            ranks = -self.ratings
        if self.choice is not None:
            labelled = self.choice != UNLABELLED
            chosen = np.full(len(ranks), 2.0, np.float32)
            chosen[self._starts[:-1][self.choice >= 0] + self.choice[self.choice >= 0]] = 1.0
            ranks = np.where(labelled[self.owner], chosen, ranks)
            top_only = self.choice >= 0
        if self.ranks is not None:
            ranked = np.logical_or.reduceat(~np.isnan(self.ranks), self._starts[:-1]) if len(self) else top_only
            ranks = np.where(ranked[self.owner], self.ranks, ranks)
            top_only = top_only & ~ranked
        return ranks, top_only

    def select(self, index: Any) -> PreferenceData:
        """The comparisons at `index`: integers, or a bool mask (N,)."""
        index = np.asarray(index)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)
        starts, sizes = self._starts[index], self.sizes[index]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        flat = np.repeat(starts - offsets[:-1], sizes) + np.arange(offsets[-1])

        def pick(values: Any, at: np.ndarray) -> Any:
            if values is None or isinstance(values, np.ndarray):
                return None if values is None else values[at]
            return [values[i] for i in at.tolist()]

        return replace(
            self,
            prompts=pick(self.prompts, index),
            responses=pick(self.responses, flat),
            offsets=offsets,
            choice=pick(self.choice, index),
            ranks=pick(self.ranks, flat),
            ratings=pick(self.ratings, flat),
            margin=pick(self.margin, index),
            target=pick(self.target, index),
            annotators=pick(self.annotators, index),
            columns={name: pick(values, index) for name, values in self.columns.items()},
            rows=index + 1 if self.rows is None else self.rows[index],
        )

    def groups(self, by: str = "prompt") -> np.ndarray:
        """Dense code of each comparison's prompt, annotator, or value of a column, int64 (N,)."""
        if by == "annotator" and self.annotators is None:
            raise MissingColumnError(f"{self.source} has no annotators")
        if by not in ("prompt", "annotator", *self.columns):
            raise MissingColumnError(f"{self.source} has no column {by!r}{nearest(by, self.columns)}")
        values: Any = self.prompts if by == "prompt" else self.annotators if by == "annotator" else self.columns[by]
        if isinstance(values, np.ndarray):
            return np.unique(values, return_inverse=True)[1]
        codes: dict[Any, int] = {}
        return np.array([codes.setdefault(content_key(value), len(codes)) for value in values], np.int64)

    def split(self, by: str = "prompt", fraction: float = 0.1, seed: int = 0) -> tuple[PreferenceData, PreferenceData]:
        """Two parts that share no prompt (no annotator, no value of a column): the larger, and about `fraction`.

        Raises
        ------
        InvalidInputError
            `fraction` is not between 0 and 1, or there are fewer than two prompts (annotators, values).
        MissingColumnError
            No such column, or no annotators.
        """
        held = self.held_out(by, fraction, seed)
        return self.select(~held), self.select(held)

    def held_out(self, by: str = "prompt", fraction: float = 0.1, seed: int = 0) -> np.ndarray:
        """Which comparisons are in the second part of `split`, bool (N,)."""
        if not 0 < fraction < 1:
            raise InvalidInputError(f"split needs a fraction between 0 and 1, got {fraction}")
        codes = self.groups(by)
        sizes = np.bincount(codes) if len(codes) else np.zeros(0, np.int64)
        if len(sizes) < 2:
            raise InvalidInputError(f"{self.source}: a split by {by} needs two of them, found {len(sizes)}")
        order = np.random.default_rng(seed).permutation(len(sizes))
        reached = np.cumsum(sizes[order])
        # at least one group on each side; the group that crosses the fraction goes where it misses it by less
        count = int(np.abs(reached - fraction * len(self))[:-1].argmin()) + 1
        held = np.zeros(len(sizes), bool)
        held[order[:count]] = True
        return np.asarray(held[codes])

    def of_responses(self, values: Column) -> Column:
        """What belongs to each comparison (length N), such as prompts or annotators, for each response (length M)."""
        owner = self.owner
        return values[owner] if isinstance(values, np.ndarray) else [values[i] for i in owner.tolist()]

    def without_identical(self, action: Literal["drop", "error", "keep"] = "drop") -> PreferenceData:
        """Without the comparisons whose responses are all the same; they say nothing about any response.

        Parameters
        ----------
        action : "drop" with an `IdenticalResponsesWarning` that counts them, "error", or "keep"
        """
        if action not in ("drop", "error", "keep"):
            raise InvalidInputError(f"identical must be 'drop', 'error' or 'keep', got {action!r}")
        if action == "keep" or not len(self):
            return self
        first = self._starts[:-1][self.owner]
        if isinstance(self.responses, np.ndarray):
            same = self.responses == self.responses[first]
        else:
            pairs = zip(self.responses, first.tolist(), strict=True)
            same = np.array([response == self.responses[at] for response, at in pairs], bool)
        identical = np.logical_and.reduceat(same, self._starts[:-1])
        if not identical.any():
            return self
        where = self.where(int(identical.argmax()))
        if action == "error":
            raise InvalidInputError(f"{where}: all responses are the same, expected different ones")
        warnings.warn(
            IdenticalResponsesWarning(
                f"{self.source}: dropped {int(identical.sum())} of {len(self)} comparisons whose responses are all the "
                f"same (first: {where})"
            ),
            stacklevel=2,
        )
        return self.select(~identical)


def concatenate(parts: Sequence[PreferenceData]) -> PreferenceData:
    """Put data below one another; what a part lacks is unknown there."""
    records = [record for part in parts for record in part]
    scales = {part.scale for part in parts}
    return PreferenceData.of(
        records,
        scale=scales.pop() if len(scales) == 1 else None,
        source=parts[0].source if parts else "preferences",
        rows=[int(r) for p in parts for r in (np.arange(1, len(p) + 1) if p.rows is None else p.rows)],
    )
