"""Best of N: keep the completion that a verifier likes most, and count what that cost.

The simplest verifier-based policy. It samples N traces of a prompt and keeps the one of highest reward; its divergence
from the sampler is at most ``log N - (N - 1) / N`` (`polyreward.tilting.best_of_n_kl`). It spends N times the tokens
and N queries of the verifier, and a comparison at equal budget has to count both.

Scaling Test-Time Compute Without Verification or RL is Suboptimal, arXiv 2502.12118.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polyreward.errors import InvalidInputError
from polyreward.grouped import Ids, Segments, factorize
from polyreward.rewards.contract import (
    Reward,
    RewardFunction,
    as_list,
    is_column,
    is_missing,
    name_of,
    text_of,
    values_of,
)
from polyreward.rewards.groups import label_of


@dataclass(frozen=True, eq=False)
class Selection:
    """What `BestOfN.select` chose, for G groups of N completions.

    Attributes
    ----------
    rows : int64 (G,)
        Row of the chosen completion of each group, in the order in which the groups come; -1 where the verifier applies
        to no completion of the group.
    values : float64 (G,)
        Its reward; NaN for row -1.
    scores : float64 (N,)
        Reward of every completion that was looked at; NaN where the verifier does not apply, or was not asked.
    queries : int
        Completions that the verifier was asked about.
    tokens : int
        Their length in all: ``completion_ids`` where the batch has them, else words.
    """

    rows: np.ndarray
    values: np.ndarray
    scores: np.ndarray
    queries: int
    tokens: int


@dataclass(frozen=True)
class BestOfN(Reward):
    """Choose the best completion of each prompt by a reward (arXiv 2502.12118).

    Parameters
    ----------
    verifier : reward
        Any reward. Called once, on all completions that count.
    n : int >= 1, optional
        Look at the first `n` completions of a group only; default all.

    Range 0 or 1. `select` gives rows and cost. As a reward it is 1 for the chosen completion of each group and 0
    for the others, which is what rejection sampling trains on. A group is the samples with the same entry in the
    column ``group``, where the batch has one, else those with the same prompt. Of equal rewards the first
    completion wins. Where the verifier does not apply (None), a completion is never chosen, and its own reward here
    is None.

    Raises
    ------
    InvalidInputError
        A verifier that is no function, `n` that is no whole number of at least 1.
    """

    verifier: RewardFunction
    n: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.verifier):
            raise InvalidInputError(f"the verifier must be a reward function, got {self.verifier!r}")
        if self.n is not None and (isinstance(self.n, bool) or not isinstance(self.n, int | np.integer) or self.n < 1):
            raise InvalidInputError(f"n must be a whole number of at least 1, got {self.n!r}")

    @property
    def __name__(self) -> str:
        """``best_of_n`` or ``best_of_4``, and the verifier."""
        return f"best_of_{'n' if self.n is None else self.n}_by_{name_of(self.verifier)}"

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """1 for the chosen completions, 0 for the others, None where the verifier does not apply or was not asked."""
        chosen = self.select(prompts, completions, **columns)
        values = np.where(np.isnan(chosen.scores), np.nan, 0.0)
        values[chosen.rows[chosen.rows >= 0]] = 1.0
        return as_list(values)

    def select(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> Selection:
        """Choose in a batch.

        Parameters
        ----------
        prompts, completions : length N, strings or lists of messages
        columns : lists of length N; those that the verifier reads, and ``group``

        Raises
        ------
        InvalidInputError
            Neither prompts nor a column ``group``, lengths that do not fit, a reward that the contract does not allow.
        MissingColumnError
            A column that the verifier reads is absent.
        """
        rows = len(completions)
        groups = self._groups(prompts, columns, rows)
        place = _place_in_group(groups)
        asked = np.flatnonzero(place < (rows if self.n is None else self.n)).tolist()
        part = [completions[row] for row in asked]
        own = {k: [v[row] for row in asked] if is_column(v, rows) else v for k, v in columns.items()}
        asking = None if prompts is None else [prompts[row] for row in asked]
        scores = np.full(rows, np.nan)
        if len(asked):
            scores[asked] = values_of(self.verifier, asking, part, own)
        best = best_rows(scores, groups)
        values = np.where(best >= 0, np.append(scores, np.nan)[best], np.nan)
        ids = own.get("completion_ids")
        lengths = [len(text_of(c).split()) for c in part] if ids is None else [0 if i is None else len(i) for i in ids]
        return Selection(best, values, scores, len(asked), int(sum(lengths)))

    def _groups(self, prompts: Sequence[Any] | None, columns: Any, rows: int) -> Segments:
        labels = columns.get("group", prompts)
        if labels is None:
            if rows == 0:
                return factorize([], name="group")
            raise InvalidInputError(
                f"reward {self.__name__!r} compares the samples of a prompt: give prompts or 'group'"
            )
        if not hasattr(labels, "__len__") or len(labels) != rows:
            found = f"{len(labels)} entries" if hasattr(labels, "__len__") else repr(labels)
            what = "column 'group'" if "group" in columns else "prompts"
            raise InvalidInputError(f"reward {self.__name__!r}: {what} has {found}, expected {rows}, one a completion")
        if any(is_missing(label) for label in labels) and "group" in columns:
            row = next(row for row, label in enumerate(labels) if is_missing(label))
            raise InvalidInputError(f"reward {self.__name__!r}: column 'group' has no value in row {row}")
        return factorize([label_of(label) for label in labels], name="group")


def best_rows(scores: Any, groups: Ids | Segments) -> np.ndarray:
    """Row of the highest score of each group, int64 (G,); of equal scores the first row.

    Parameters
    ----------
    scores : float (N,), NaN: never chosen
    groups : N ids

    Returns
    -------
    In the order in which the groups first come; -1 for a group without any score.

    Raises
    ------
    InvalidInputError
        Lengths that do not fit.
    """
    score = np.asarray(scores.detach().cpu() if isinstance(scores, torch.Tensor) else scores, dtype=np.float64)
    segments = groups if isinstance(groups, Segments) else factorize(groups, name="groups")
    codes = segments.codes.cpu().numpy()
    if score.shape != codes.shape:
        raise InvalidInputError(f"scores have shape {score.shape} for {len(codes)} groups entries")
    present, first = np.unique(codes, return_index=True)
    ranked = np.where(np.isnan(score), -np.inf, score)
    order = np.lexsort((np.arange(len(score)), np.isnan(score), -ranked, codes))
    best = order[np.searchsorted(codes[order], present)] if len(order) else np.zeros(0, dtype=np.int64)
    best = np.where(np.isnan(score[best]), -1, best) if len(best) else best
    return np.asarray(best[np.argsort(first, kind="stable")], dtype=np.int64)


def _place_in_group(segments: Segments) -> np.ndarray:
    """How many rows of the same group come before each row."""
    codes = segments.codes.cpu().numpy()
    order = np.argsort(codes, kind="stable")
    start = np.searchsorted(codes[order], codes[order])
    place = np.empty(len(codes), dtype=np.int64)
    place[order] = np.arange(len(codes)) - start
    return place
