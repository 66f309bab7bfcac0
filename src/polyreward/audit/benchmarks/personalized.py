"""Personalized RewardBench: does a reward model prefer the good answer that this user wants?

An item pairs two answers of equal quality to one user's question: one written to meet what the user expects (aspects of
a rubric), one written to avoid it (`PersonalizedPairItem`; `PairBuilder` makes them). `PointwiseEvaluator` scores the
two answers apart, `PairwiseEvaluator` asks a judge for A or B at positions drawn for each item; ties and replies
without a result count as failures, and are counted.

Personalized RewardBench: Evaluating Reward Models with Human Aligned Personalization, arXiv 2604.07343.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from polyreward.audit.benchmarks.intervals import bootstrap_ratios, numbers
from polyreward.audit.benchmarks.pair_building import (
    PairBuilder,
    PairsBuilt,
    quality_match,
    quality_match_report,
    rubric_score,
    rubric_scores,
)
from polyreward.audit.benchmarks.personalized_items import (
    ANSWERS,
    CONDITIONS,
    POSTS,
    Condition,
    ModelView,
    PersonalizedPairItem,
    Planner,
    Ranker,
    check_items,
    prompts_for,
    rank_by_dot_product,
    users_of,
)
from polyreward.errors import InvalidInputError

__all__ = [
    "CONDITIONS",
    "EvalReport",
    "ModelView",
    "PairBuilder",
    "PairsBuilt",
    "PairwiseEvaluator",
    "PersonalizedPairItem",
    "PointwiseEvaluator",
    "check_items",
    "evaluate_scores",
    "judge_prompt",
    "parse_result",
    "quality_match",
    "quality_match_report",
    "rank_by_dot_product",
    "rubric_score",
    "rubric_scores",
]

_RESULT = re.compile(r"^[\W_]*result\W*:[\W_]*([AB])\b", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class EvalReport:
    """Accuracy on personalised pairs.

    Attributes
    ----------
    accuracy : float
        Share of items whose chosen answer scores strictly higher; ties and failures to parse count as wrong.
    ties, parse_failures : int
    mean_gap : float
        Mean of the chosen less the rejected score; NaN for a judge of pairs.
    per_user, per_category : mapping of name to accuracy
    ci95 : (low, high) of the accuracy, bootstrap over items
    items, wins : int
    counts : mapping of "user" and "category" to the items of each name
    condition : what the model saw; "oracle" is an upper bound
    """

    accuracy: float
    ties: int
    parse_failures: int
    mean_gap: float
    per_user: Mapping[str, float]
    per_category: Mapping[str, float]
    ci95: tuple[float, float]
    items: int = 0
    wins: int = 0
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    condition: str = "question"


def evaluate_scores(
    chosen: Any,
    rejected: Any,
    users: Sequence[Any] | None = None,
    categories: Sequence[Any] | None = None,
    *,
    resamples: int = 1000,
    seed: int | np.random.Generator = 0,
) -> EvalReport:
    """The report of scores (N,) of the chosen and the rejected answers.

    Raises
    ------
    InvalidInputError
        No item, lengths that differ, NaN or infinity.
    """
    first, second = numbers(chosen, "scores of chosen", 1), numbers(rejected, "scores of rejected", 1)
    if len(first) != len(second) or not len(first):
        raise InvalidInputError(f"expected one score of chosen and rejected an item, got {len(first)}, {len(second)}")
    return _report(
        first > second,
        int((first == second).sum()),
        0,
        float((first - second).mean()),
        users,
        categories,
        resamples,
        seed,
    )


def _report(
    won: np.ndarray,
    ties: int,
    failures: int,
    gap: float,
    users: Sequence[Any] | None,
    categories: Sequence[Any] | None,
    resamples: int,
    seed: int | np.random.Generator,
) -> EvalReport:
    low, high = bootstrap_ratios(won[:, None], resamples=resamples, rng=seed)
    tables = {"user": _by(won, users, "users"), "category": _by(won, categories, "categories")}
    return EvalReport(
        float(won.mean()),
        ties,
        failures,
        gap,
        {name: share for name, (share, _) in tables["user"].items()},
        {name: share for name, (share, _) in tables["category"].items()},
        (float(low[0]), float(high[0])),
        len(won),
        int(won.sum()),
        {kind: {name: count for name, (_, count) in table.items()} for kind, table in tables.items()},
    )


def _by(won: np.ndarray, labels: Sequence[Any] | None, name: str) -> dict[str, tuple[float, int]]:
    if labels is None:
        return {}
    if len(labels) != len(won):
        raise InvalidInputError(f"{name} has {len(labels)} entries for {len(won)} items")
    codes: dict[str, int] = {}
    code = np.array([codes.setdefault(str(label), len(codes)) for label in labels], np.int64)
    count = np.bincount(code)
    share = np.bincount(code, won) / count
    return {key: (float(share[i]), int(count[i])) for key, i in codes.items()}


@dataclass(frozen=True)
class PointwiseEvaluator:
    """Score both answers apart (arXiv 2604.07343).

    Parameters
    ----------
    score_fn : (prompts, answers) -> (N,) scores, or (N, C) logits
        Of several logits the score is the softmax probability of the last class.
    annotators : bool
        Call ``score_fn(prompts, answers, annotator=users)``, for models that know their users.
    """

    score_fn: Callable[..., Any]
    annotators: bool = False

    def evaluate(
        self,
        items: Sequence[PersonalizedPairItem],
        condition: Condition = "question",
        *,
        profile_k: int = POSTS,
        rank: Ranker | None = None,
        planner: Planner | None = None,
        resamples: int = 1000,
        seed: int | np.random.Generator = 0,
    ) -> EvalReport:
        """Accuracy over items; `condition` to `planner` as of `prompts_for`.

        Raises
        ------
        InvalidInputError
            Ids that come twice, a score that is NaN (the message names the item), and as of `prompts_for`.
        """
        chosen, rejected = self.scores(items, prompts_for(items, condition, profile_k, rank, planner))
        report = evaluate_scores(
            chosen, rejected, users_of(items), [item.category for item in items], resamples=resamples, seed=seed
        )
        return replace(report, condition=condition)

    __call__ = evaluate

    def scores(self, items: Sequence[PersonalizedPairItem], prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the chosen and of the rejected answers, float64 (N,) each."""
        check_items(items)
        options = {"annotator": users_of(items) * 2} if self.annotators else {}
        texts = [item.chosen for item in items] + [item.rejected for item in items]
        given = self.score_fn([*prompts, *prompts], texts, **options)
        array = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given, dtype=np.float64)
        if array.shape[:1] != (len(texts),) or array.ndim > 2:
            raise InvalidInputError(f"score_fn gave shape {array.shape} for {len(texts)} answers")
        wrong = ~np.isfinite(array.reshape(len(texts), -1)).all(axis=1)
        if wrong.any():
            at = int(wrong.argmax())
            kind = ANSWERS[at >= len(items)]
            raise InvalidInputError(f"item {items[at % len(items)].id!r}: the score of {kind} is NaN or infinite")
        if array.ndim == 2:
            array = array[:, 0] if array.shape[1] == 1 else _last_class(array)
        return array[: len(items)], array[len(items) :]


def _last_class(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights[:, -1] / weights.sum(axis=1))


def parse_result(text: Any) -> str | None:
    """Letter A or B of the last line ``Result: A`` of a judge's reply; None where there is none."""
    found = _RESULT.findall(text) if isinstance(text, str) else []
    return found[-1].upper() if found else None


def judge_prompt(prompt: str, first: str, second: str) -> str:
    """A question to a judge of two answers, which asks for the line that `parse_result` reads."""
    return (
        f"{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n"
        "Which answer does this user prefer? End with one line: Result: A or Result: B"
    )


@dataclass(frozen=True)
class PairwiseEvaluator:
    """Ask a judge which of two answers the user prefers, at positions drawn for each item (arXiv 2604.07343).

    Parameters
    ----------
    judge_fn : (prompts, first answers, second answers) -> N replies, each with a line ``Result: A`` or ``Result: B``
        `judge_prompt` makes a text of the three for a language model.
    seed : int
        Of the positions; 42 in the paper.
    """

    judge_fn: Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[Any]]
    seed: int = 42

    def chosen_first(self, items: int) -> np.ndarray:
        """Whether the chosen answer is A, bool (items,); each with probability 1/2."""
        return np.random.default_rng(self.seed).random(items) < 0.5

    def evaluate(
        self,
        items: Sequence[PersonalizedPairItem],
        condition: Condition = "question",
        *,
        profile_k: int = POSTS,
        rank: Ranker | None = None,
        planner: Planner | None = None,
        resamples: int = 1000,
        seed: int | np.random.Generator = 0,
    ) -> EvalReport:
        """Accuracy over items; a reply without a result is wrong, and counted."""
        check_items(items)
        prompts = prompts_for(items, condition, profile_k, rank, planner)
        order = self.chosen_first(len(items))
        pairs = [(item.chosen, item.rejected)[:: 1 if a else -1] for item, a in zip(items, order.tolist(), strict=True)]
        replies = self.judge_fn(prompts, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
        if len(replies) != len(items):
            raise InvalidInputError(f"judge_fn gave {len(replies)} replies for {len(items)} items")
        results = [parse_result(reply) for reply in replies]
        won = np.array([result == ("A" if a else "B") for result, a in zip(results, order.tolist(), strict=True)])
        failures = sum(result is None for result in results)
        report = _report(
            won, 0, failures, float("nan"), users_of(items), [item.category for item in items], resamples, seed
        )
        return replace(report, condition=condition)

    __call__ = evaluate
