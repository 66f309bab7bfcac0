"""Rule rewards of a written judgement: labels of its sub-dimensions, the form of its answer, and its length.

A judge model thinks aloud and ends with ``<answer>{"dimensional_scores": {"motion": 3, ...}}</answer>``. It is worth

    R = 0.7 R_sub + 0.1 R_fmt + 0.2 R_len

with R_sub the share of the annotated labels that the answer reproduces, R_fmt 1 for an answer that can be read, and
R_len a step function of the number of characters. R_len pays for length as such: watch its share (`variance_shares`).

Paper: Think, then Score: Decoupled Reasoning and Scoring for Video Reward Modeling (DeScore, arXiv 2605.05922).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.rewards.composition import Composed, weighted_sum
from polyreward.rewards.contract import Reward, Sample, is_finite

_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


def read_answer(text: str, tag: str | None = "answer") -> dict[str, Any] | None:
    """The JSON object of the last ``<tag>`` block, bare or in a code fence; None where there is none that parses.

    Without a tag: the last JSON object that stands in the text.
    """
    if tag is None:
        return _last_object(text)
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    if end < 0 or start < 0:
        return None
    content = text[start + len(tag) + 2 : end].strip()
    fenced = _FENCE.search(content)
    try:
        found = json.loads(fenced.group(1) if fenced else content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class RubricMatchReward(Reward):
    """Share of the annotated labels that the final JSON reproduces, R_sub (DeScore, arXiv 2605.05922). Range 0 to 1.

    Parameters
    ----------
    column : str
        Holds a mapping of name to label a row. An empty mapping does not apply.
    field : str or None
        Where in the JSON the labels are; None for the object itself.
    tag : as in `read_answer`

    Range [0, 1]; 0 where nothing can be read. A number equals a number of the same value, true and 1 differ.

    Raises
    ------
    InvalidInputError
        A row of the column that is no mapping.
    """

    column: str = "labels"
    field: str | None = "dimensional_scores"
    tag: str | None = "answer"

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of labels."""
        return (self.column,)

    def score(self, sample: Sample) -> float | None:
        """Share of the labels of one row."""
        labels = sample.columns[self.column]
        if not isinstance(labels, Mapping):
            raise self.refuse(sample, self.column, f"expected a mapping of name to label, got {labels!r}")
        if not labels:
            return None
        found: Any = read_answer(sample.text, self.tag)
        if self.field is not None and found is not None:
            found = found.get(self.field)
        if not isinstance(found, dict):
            return 0.0
        return sum(name in found and _same(found[name], label) for name, label in labels.items()) / len(labels)


@dataclass(frozen=True)
class JsonFormatReward(Reward):
    """1 where the answer block parses and has the keys, else 0, R_fmt (DeScore, arXiv 2605.05922); range 0 to 1.

    Parameters
    ----------
    keys : names
    tag : as in `read_answer`
    """

    keys: tuple[str, ...] = ("dimensional_scores",)
    tag: str | None = "answer"

    def __post_init__(self) -> None:
        if isinstance(self.keys, str):
            raise InvalidInputError(f"JsonFormatReward: keys is a list of names, got {self.keys!r}")
        object.__setattr__(self, "keys", tuple(self.keys))

    def score(self, sample: Sample) -> float:
        """1 or 0."""
        found = read_answer(sample.text, self.tag)
        return float(found is not None and all(key in found for key in self.keys))


# The paper's name; the package exports the other one, since HARMO has a FormatReward of its own.
FormatReward = JsonFormatReward


@dataclass(frozen=True)
class LengthBucketReward(Reward):
    """Step function of the number of characters, R_len (DeScore, arXiv 2605.05922). Range 0 to 1.

    Parameters
    ----------
    edges : increasing numbers >= 0
        A length on an edge belongs to the upper bucket.
    levels : one number more than edges

    Range: [min(levels), max(levels)].
    """

    edges: tuple[float, ...] = (500, 1000, 1500, 2000)
    levels: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 1.0)

    def __post_init__(self) -> None:
        edges, levels = tuple(self.edges), tuple(self.levels)
        if not all(map(is_finite, (*edges, *levels))) or list(edges) != sorted(set(edges)) or min(edges, default=0) < 0:
            raise InvalidInputError(
                f"LengthBucketReward: expected increasing edges from 0 and finite levels, got {edges}, {levels}"
            )
        if len(levels) != len(edges) + 1:
            raise InvalidInputError(
                f"LengthBucketReward: {len(edges)} edges need {len(edges) + 1} levels, got {len(levels)}"
            )
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "levels", levels)

    def score(self, sample: Sample) -> float:
        """The level of one completion."""
        return float(self.levels[int(np.searchsorted(self.edges, len(sample.text), side="right"))])


def judgement_reward(
    *,
    column: str = "labels",
    field: str | None = "dimensional_scores",
    tag: str | None = "answer",
    weights: Sequence[float] = (0.7, 0.1, 0.2),
    decimals: int | None = None,
) -> Reward:
    """``0.7 R_sub + 0.1 R_fmt + 0.2 R_len`` (DeScore, arXiv 2605.05922). Range [0, 1] with these weights.

    Parameters
    ----------
    column, field, tag : as in `RubricMatchReward`; without a field any object has the right form
    weights : (labels, format, length)
    decimals : int or None
        Round the sum; the released code rounds to 3.

    Where a row has no labels, the other two terms remain.
    """
    parts = (
        RubricMatchReward(column, field, tag),
        JsonFormatReward(() if field is None else (field,), tag),
        LengthBucketReward(),
    )
    total = weighted_sum(*parts, weights=weights, name="judgement_reward")
    if decimals is None:
        return total
    return Composed((total,), partial(_rounded, decimals=decimals), "judgement_reward")


def _rounded(values: np.ndarray, decimals: int) -> np.ndarray:
    return np.round(values[0], decimals)


def _same(found: Any, label: Any) -> bool:
    return isinstance(found, bool) == isinstance(label, bool) and bool(found == label)


def _last_object(text: str) -> dict[str, Any] | None:
    decoder, end, last = json.JSONDecoder(), 0, None
    while (start := text.find("{", end)) >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
            continue
        last = found if isinstance(found, dict) else last
    return last
