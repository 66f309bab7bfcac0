"""Encoders: what turns prompts and responses into features, and two that need no model.

An encoder has `identity`, a text that changes whenever its features would, and `encode(prompts, responses)`, which
gives float32 (M, d). It may have `encode_prompts(prompts)` (N, p), for heads that look at the prompt alone, and
`lookup(prompts, responses)`, which gives a `FeatureTable` in place of an array so that features can stay on disk.
Language models are in `polyreward.reward_models.text_encoders`, encoders that learn in `.fine_tuning`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, require
from polyreward.preferences import Column
from polyreward.reward_models.texts import joined, plain


@runtime_checkable
class Encoder(Protocol):
    """Frozen features of responses."""

    @property
    def identity(self) -> str:
        """Changes whenever the features would."""
        ...

    def encode(self, prompts: Column, responses: Column) -> np.ndarray:
        """Features float32 (M, d) of response i given prompt i."""
        ...


class FeatureTable:
    """Rows of one or several feature arrays, in memory or mapped from disk.

    Parameters
    ----------
    parts : arrays (R, d) of float16 or float32
        One below the other.
    index : int (M,), optional
        Which of these rows each row of the table is; default all of them in order.
    """

    def __init__(self, parts: Sequence[np.ndarray], index: np.ndarray | None = None) -> None:
        self.parts = [_matrix(part) for part in parts]
        if len({part.shape[1] for part in self.parts}) != 1 or len({part.dtype for part in self.parts}) != 1:
            raise InvalidInputError(
                f"features of different widths or dtypes: {[(p.shape[1], str(p.dtype)) for p in self.parts]}"
            )
        self.index = index
        # torch gathers rows several times faster than NumPy, also of a mapped file
        self._tensors = [_shared(part) for part in self.parts]
        self._starts = np.cumsum([0, *(len(part) for part in self.parts)])
        if index is not None and len(index) and not (index.min() >= 0 and index.max() < self._starts[-1]):
            raise InvalidInputError(f"row {int(index.max())} of features that have {self._starts[-1]} rows")

    @property
    def width(self) -> int:
        """Width d of the features."""
        return int(self.parts[0].shape[1])

    def __len__(self) -> int:
        return int(self._starts[-1]) if self.index is None else len(self.index)

    def take(self, rows: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        """Features of some rows, float32 (R, d)."""
        places = torch.from_numpy(np.ascontiguousarray(rows if self.index is None else self.index[rows], np.int64))
        if len(self._tensors) == 1:
            taken = self._tensors[0].index_select(0, places)
        else:
            taken = self._tensors[0].new_empty((len(places), self.width))
            starts = torch.from_numpy(self._starts)
            part = torch.searchsorted(starts, places, right=True) - 1
            for number in part.unique().tolist():
                here = torch.nonzero(part == number).squeeze(1)
                taken[here] = self._tensors[number].index_select(0, places[here] - starts[number])
        return taken.to(device).float()

    def array(self) -> np.ndarray:
        """All of it, float32 (M, d), in memory."""
        if self.index is None and len(self.parts) == 1:
            return np.asarray(self.parts[0], dtype=np.float32)
        return self.take(np.arange(len(self))).numpy()


def look_up(encoder: Encoder, prompts: Column, responses: Column) -> FeatureTable:
    """Features of any encoder as a table.

    Raises
    ------
    InvalidInputError
        The encoder returned another number of rows than there are responses.
    """
    if hasattr(encoder, "lookup"):
        table: FeatureTable = encoder.lookup(prompts, responses)
    else:
        table = FeatureTable([encoder.encode(prompts, responses)])
    if len(table) != len(responses):
        raise InvalidInputError(f"{encoder.identity} gave {len(table)} rows for {len(responses)} responses")
    return table


@dataclass(frozen=True, eq=False)
class Features:
    """Features that are already there; prompts and responses are numbers of their rows.

    Parameters
    ----------
    responses : (R, d) array of float16 or float32, also one that is mapped from disk
    prompts : (P, p) array, optional
        For heads that look at the prompt alone.
    name : str
        Stored with a model that was fitted on these features.
    """

    responses: np.ndarray
    prompts: np.ndarray | None = None
    name: str = "features"

    def __post_init__(self) -> None:
        _matrix(self.responses)

    @property
    def identity(self) -> str:
        """Name and width."""
        return f"{self.name} ({self.responses.shape[1]})"

    def encode(self, prompts: Column, responses: Column) -> np.ndarray:
        """Rows `responses`, float32 (M, d)."""
        return self.lookup(prompts, responses).array()

    def lookup(self, prompts: Column, responses: Column) -> FeatureTable:
        """The same without a copy."""
        rows = _row_numbers(responses, "responses", len(self.responses))
        everything = len(rows) == len(self.responses) and np.array_equal(rows, np.arange(len(rows)))
        return FeatureTable([self.responses], None if everything else rows)

    def encode_prompts(self, prompts: Column) -> np.ndarray:
        """Rows `prompts` of the prompts' features, float32 (N, p)."""
        if self.prompts is None:
            raise InvalidInputError(f"{self.identity} has no features of prompts; pass Features(responses, prompts)")
        rows = _row_numbers(prompts, "prompts", len(self.prompts))
        return np.asarray(self.prompts[rows], dtype=np.float32)


@dataclass(frozen=True)
class HashingEncoder:
    """Hashed counts of words and their pairs, of length 1 (scikit-learn); no weights, no download.

    Parameters
    ----------
    width : int
        d.
    ngrams : (int, int)
        Shortest and longest run of words.
    with_prompt : bool
        Count the words of the prompt too. A linear head cannot use them: they are the same for all responses.
    """

    width: int = 1024
    ngrams: tuple[int, int] = (1, 2)
    with_prompt: bool = False

    @property
    def identity(self) -> str:
        """All parameters."""
        return f"hashing-{self.width}-{self.ngrams[0]}-{self.ngrams[1]}-{int(self.with_prompt)}"

    def encode(self, prompts: Column, responses: Column) -> np.ndarray:
        """Features float32 (M, d); 0 for a text without words."""
        if self.with_prompt:
            pairs = zip(prompts, responses, strict=True)
            return self._count([joined(prompt, response, row) for row, (prompt, response) in enumerate(pairs)])
        return self._count([plain(response, "response", row) for row, response in enumerate(responses)])

    def encode_prompts(self, prompts: Column) -> np.ndarray:
        """Features float32 (N, d) of the prompts alone."""
        return self._count([plain(prompt, "prompt", row) for row, prompt in enumerate(prompts)])

    def _count(self, texts: list[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0, self.width), np.float32)
        return np.asarray(self._vectorizer.transform(texts).toarray(), dtype=np.float32)

    @cached_property
    def _vectorizer(self) -> Any:
        text: Any = require("sklearn.feature_extraction.text", "tasks")
        return text.HashingVectorizer(
            n_features=self.width, ngram_range=self.ngrams, alternate_sign=True, token_pattern=r"(?u)\b\w+\b"
        )


def _row_numbers(values: Column, name: str, count: int) -> np.ndarray:
    rows = np.asarray(values)
    if rows.dtype.kind not in "iu" or rows.ndim != 1:
        if not len(rows):
            return np.zeros(0, np.int64)
        raise InvalidInputError(f"{name} must be row numbers of the given features, got {values[0]!r}")
    if len(rows) and not (rows.min() >= 0 and rows.max() < count):
        wrong = int(((rows < 0) | (rows >= count)).argmax())
        raise InvalidInputError(f"{name}[{wrong}] is row {rows[wrong]} of features that have {count} rows")
    return rows.astype(np.int64)


def _matrix(array: np.ndarray) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        shape = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InvalidInputError(f"features must be a floating-point array (rows, width), got {shape}")
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _shared(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
        return torch.from_numpy(array)
