"""GroupRank's heterogeneous reward of scores for a group of documents: ranking utility, distribution, format.

A model reads a query and a small group of documents, reasons, and writes one score of 0 to 10 a document:

    <reason>...</reason><answer>{"1": 7, "2": 8, "3": 1, "4": 0}</answer>

    R = NDCG@10 + gamma Recall@10 + eps (1 - JS(P, Q))   for a valid answer,
        -0.1 for an answer that is no JSON with one score a document, -0.5 without the tags

P and Q are the distributions of predicted and gold scores. NDCG and recall see only the order inside the group; the
last term also sees how large the scores are, which is what makes scores of different groups comparable. Paper:
GroupRank: A Groupwise Reranking Paradigm Driven by Reinforcement Learning (arXiv 2511.11653).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.rewards.contract import Reward, Sample, as_list, is_finite
from polyreward.rewards.ranking_measures import (
    Gain,
    Ties,
    arrays,
    check_options,
    jensen_shannon,
    ndcg,
    rankable,
    rbo,
    recall,
)
from polyreward.rewards.score_answers import BAD_JSON, BAD_TAGS, HIGHEST, OK, STATUSES, bare, parse_scores
from polyreward.rewards.sweet_spot import at_first

if TYPE_CHECKING:
    from torch import Tensor

    Array = np.ndarray | Tensor

Mode = Literal["documents", "softmax", "histogram"]
MODES = ("documents", "softmax", "histogram")
LEVELS = {BAD_JSON: -0.1, BAD_TAGS: -0.5}


@dataclass(frozen=True)
class RankingUtilityReward:
    """NDCG@k plus a share of Recall@k, of arrays (arXiv 2511.11653).

    Parameters
    ----------
    k : int >= 1
    recall_weight : float
        gamma in the paper.
    gain : "linear" (the paper's) or "exp2"
    ties : "stable" or "expected"
        Scores are whole numbers and tie. "stable" keeps tied documents in the order of the input, which must then tell
        nothing: shuffle the group. "expected" is the mean over the orders of the tied.
    rbo_weight, rbo_p : float
        Weight and depth of rank-biased overlap, a term of the first version of the paper; off by default.

    Range [0, 1 + recall_weight + rbo_weight].

    Raises
    ------
    InvalidInputError
        k below 1, a weight that is not finite or negative, an unknown gain or ties, rbo_p outside (0, 1).
    """

    k: int = 10
    recall_weight: float = 0.2
    gain: Gain = "linear"
    ties: Ties = "stable"
    rbo_weight: float = 0.0
    rbo_p: float = 0.9

    def __post_init__(self) -> None:
        check_options(self.k, self.gain, self.ties)
        _weights("RankingUtilityReward", recall_weight=self.recall_weight, rbo_weight=self.rbo_weight)
        rbo(np.ones(1), np.ones(1), self.rbo_p)

    def __call__(self, scores: Array, gold: Array) -> Array:
        """Utility of each group: (..., c), (..., c) -> (...,); 0 where all gold is 0. Raises as `ndcg` does."""
        value = ndcg(scores, gold, self.k, self.gain, self.ties)
        if self.recall_weight:
            value = value + self.recall_weight * recall(scores, gold, self.k, self.ties)
        if self.rbo_weight:
            value = value + self.rbo_weight * rbo(scores, gold, self.rbo_p) * rankable(gold)
        return value


@dataclass(frozen=True)
class ScoreDistributionReward:
    """One minus the Jensen-Shannon divergence of predicted and gold scores, of arrays (arXiv 2511.11653).

    The paper does not say which distribution a group of scores is. Three readings:

    - "documents": scores over their sum, a distribution over the documents. Scaling all scores changes nothing.
    - "softmax": softmax of the scores, over the documents. Shifting all scores changes nothing.
    - "histogram": how many documents have each of the scores 0, 1, .., 10 (rounded, halves up). Exchanging documents
      changes nothing, so only this one, beside NDCG, fixes both order and magnitude.

    Parameters
    ----------
    mode : "documents", "softmax" or "histogram"
    base : float > 1
        Base of the logarithm; with 2 the divergence is at most 1.
    smoothing : float >= 0
        Added to every entry of a distribution ("documents", "histogram"), which is then divided by its sum. Scores
        that are all 0 are uniform over the documents.

    Range [0, 1] with base 2.

    Raises
    ------
    InvalidInputError
        An unknown mode, a base not above 1, a smoothing that is negative or not finite.
    """

    mode: Mode = "documents"
    base: float = 2
    smoothing: float = 1e-3

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InvalidInputError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        _weights("ScoreDistributionReward", smoothing=self.smoothing)
        jensen_shannon(np.ones(1), np.ones(1), self.base)

    def __call__(self, scores: Array, gold: Array) -> Array:
        """Agreement of each group: (..., c), (..., c) -> (...,). Raises as `divergence` does."""
        return 1 - self.divergence(scores, gold)

    def divergence(self, scores: Array, gold: Array) -> Array:
        """Jensen-Shannon divergence of each group.

        Raises
        ------
        InvalidInputError
            No document, shapes that do not fit, NaN or infinity; a negative score ("documents"), one outside [0, 10]
            ("histogram").
        """
        xp, values, restore = arrays("ScoreDistributionReward", scores=scores, gold=gold)
        p, q = (self._distribution(xp, v, name) for v, name in zip(values, ("scores", "gold"), strict=True))
        return restore(jensen_shannon(p, q, self.base))

    def _distribution(self, xp: Any, values: Any, name: str) -> Any:
        if self.mode == "softmax":
            high = values.max(axis=-1, keepdims=True) if xp is np else values.amax(dim=-1, keepdim=True)
            odds = xp.exp(values - high)
            return odds / odds.sum(axis=-1, keepdims=True)
        top = HIGHEST if self.mode == "histogram" else math.inf
        wrong = (values < 0) | (values > top)
        if bool(wrong.any()):
            raise InvalidInputError(f"{name}{at_first(wrong)} is outside [0, {top}], which mode {self.mode!r} expects")
        if self.mode == "histogram":
            bins = xp.arange(HIGHEST + 1, device=values.device)
            held = xp.floor(values + 0.5)[..., None] == bins
            values = held.sum(axis=-2) * 1.0 if xp is np else held.sum(dim=-2).to(values.dtype)
        total = values.sum(axis=-1, keepdims=True)
        share = xp.where(total > 0, values / xp.where(total > 0, total, 1.0), 1 / values.shape[-1])
        return (share + self.smoothing) / (1 + values.shape[-1] * self.smoothing)


@dataclass(frozen=True)
class FormatGate:
    """Levels for answers that cannot be read, in place of their reward (arXiv 2511.11653).

    Parameters
    ----------
    levels : mapping of "bad_json" and "bad_tags" to numbers, -0.1 and -0.5 by default
        A number for "ok" replaces the reward of valid answers too; None there lets it through, as does leaving it out.

    The statuses exclude each other and come from one reading of the answer (`parse_scores`); for conditions that are
    rewards of their own, `polyreward.rewards.gate` does the same, one level at a time.

    Raises
    ------
    UnknownNameError
        A status that is not "ok", "bad_json" or "bad_tags".
    InvalidInputError
        A level that is not finite.
    """

    levels: Mapping[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        levels: dict[str, float | None] = {OK: None, **LEVELS, **self.levels}
        for status, level in levels.items():
            _known(status)
            if not (is_finite(level) or (status == OK and level is None)):
                raise InvalidInputError(f"FormatGate: the level of {status!r} must be a finite number, got {level!r}")
        object.__setattr__(self, "levels", levels)

    def __call__(self, status: str | Sequence[str] | np.ndarray, reward: Any = None) -> Any:
        """`reward` where the status is "ok", else the level: a number for one status, else (...,) like the statuses.

        Raises
        ------
        UnknownNameError
            Another status.
        InvalidInputError
            A status "ok" and neither a reward nor a level for it.
        """
        found = np.asarray(status)
        for name in np.unique(found).tolist():
            _known(name)
        passing = (found == OK) if self.levels[OK] is None else np.zeros(found.shape, dtype=bool)
        if passing.any() and reward is None:
            raise InvalidInputError("FormatGate: the status is 'ok', so it needs the reward of the answer")
        level = np.zeros(found.shape)
        for name in STATUSES:
            level[found == name] = self.levels[name] or 0.0
        if hasattr(reward, "new_tensor"):
            import torch

            kept = torch.as_tensor(passing, device=reward.device)
            return torch.where(kept, reward, torch.as_tensor(level, dtype=reward.dtype, device=reward.device))
        result = np.where(passing, 0.0 if reward is None else np.asarray(reward, dtype=np.float64), level)
        return result if result.ndim else float(result)


@dataclass(frozen=True)
class GroupRankBreakdown:
    """GroupRank's reward with its parts, each float64 (N,), NaN where it does not apply; `status` texts or None."""

    total: np.ndarray
    utility: np.ndarray
    alignment: np.ndarray
    status: tuple[str | None, ...]


@dataclass(frozen=True)
class GroupRankReward(Reward):
    """Reward of the scores that a completion gives to a group of documents (GroupRank, arXiv 2511.11653).

    Parameters
    ----------
    column : str
        Gold scores of the group, 0 to 10 each: a list for the documents "1" to "c" in this order, or a mapping of ids
        to scores. Keys with None (as parquet fills up structs) are no document.
    utility : RankingUtilityReward
    alignment : ScoreDistributionReward, or None for the utility alone
    alignment_weight : float
        eps in the paper.
    gate : FormatGate

    Range [-0.5, 1.3] with the defaults. Does not apply where all gold scores are 0, which leaves no best order.

    Raises
    ------
    InvalidInputError
        A negative weight; at a call, gold scores that are empty, no numbers, or outside [0, 10].
    """

    column: str = "gold"
    utility: RankingUtilityReward = field(default_factory=RankingUtilityReward)
    alignment: ScoreDistributionReward | None = field(default_factory=ScoreDistributionReward)
    alignment_weight: float = 0.1
    gate: FormatGate = field(default_factory=FormatGate)

    def __post_init__(self) -> None:
        _weights("GroupRankReward", alignment_weight=self.alignment_weight)

    @property
    def __name__(self) -> str:
        """Name in logs."""
        return "grouprank"

    @property
    def reads(self) -> tuple[str, ...]:
        """The gold scores."""
        return (self.column,)

    def of_scores(self, scores: Array, gold: Array) -> Array:
        """Reward of valid answers, as arrays: (..., c), (..., c) -> (...,). Raises as `ndcg` does."""
        value = self.utility(scores, gold)
        return value if self.alignment is None else value + self.alignment_weight * self.alignment(scores, gold)

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion."""
        return as_list(self.explain(prompts, completions, **columns).total)

    def explain(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> GroupRankBreakdown:
        """The reward with its parts. Completions are read one by one, groups of equal size scored together."""
        rows = len(completions)
        total, utility, alignment = (np.full(rows, np.nan) for _ in range(3))
        status: list[str | None] = [None] * rows
        sized: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
        for sample in self.samples(prompts, completions, columns):
            ids, gold = self._gold(sample)
            if not gold.any():
                continue
            read = parse_scores(sample.text, ids)
            status[sample.row] = read.status
            if read.scores is None:
                total[sample.row] = self.gate(read.status)
            else:
                sized.setdefault(len(gold), []).append((sample.row, read.scores, gold))
        for entries in sized.values():
            where, scores, gold = (np.array(part) for part in zip(*entries, strict=True))
            utility[where] = self.utility(scores, gold)
            alignment[where] = 0.0 if self.alignment is None else self.alignment(scores, gold)
            total[where] = self.gate([OK] * len(where), utility[where] + self.alignment_weight * alignment[where])
        return GroupRankBreakdown(total, utility, alignment, tuple(status))

    def _gold(self, sample: Sample) -> tuple[list[str], np.ndarray]:
        """Ids and gold scores of a row."""
        reference = sample.columns[self.column]
        if isinstance(reference, Mapping):
            pairs = [(str(name), value) for name, value in reference.items() if value is not None]
        elif isinstance(reference, list | tuple):
            pairs = [(str(place), value) for place, value in enumerate(reference, start=1)]
        else:
            raise self.refuse(sample, self.column, f"expected a list or mapping of gold scores, got {reference!r}")
        if not pairs:
            raise self.refuse(sample, self.column, "no gold scores, expected one a document")
        for name, value in pairs:
            if isinstance(value, str | bytes) or not is_finite(value) or not 0 <= value <= HIGHEST:
                problem = f"the gold score of document {name!r} is {value!r}, expected a number from 0 to {HIGHEST}"
                raise self.refuse(sample, self.column, problem)
        ids = [name for name, _ in pairs]
        if len({bare(name) for name in ids}) < len(ids):
            raise self.refuse(sample, self.column, "two documents have the same id (brackets do not count)")
        return ids, np.array([float(value) for _, value in pairs])


def grouprank(
    column: str = "gold",
    k: int = 10,
    recall_weight: float = 0.2,
    gain: Gain = "linear",
    ties: Ties = "stable",
    alignment: Mode | Literal["none"] = "documents",
    alignment_weight: float = 0.1,
    smoothing: float = 1e-3,
    levels: Mapping[str, float] | None = None,
) -> GroupRankReward:
    """The reward of GroupRank (arXiv 2511.11653) with every option flat, as a recipe names them.

    See `GroupRankReward` and its parts; ``alignment="none"`` leaves the utility alone. Range [-0.5, 1.3].
    """
    return GroupRankReward(
        column,
        RankingUtilityReward(k, recall_weight, gain, ties),
        None if alignment == "none" else ScoreDistributionReward(alignment, smoothing=smoothing),
        alignment_weight,
        FormatGate(levels or {}),
    )


def _known(status: str) -> None:
    if status not in STATUSES:
        raise UnknownNameError(f"FormatGate: no status {status!r}{nearest(str(status), STATUSES)}")


def _weights(where: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not is_finite(number) or number < 0:
            raise InvalidInputError(f"{where}: {name} must be a finite number, at least 0, got {number!r}")
