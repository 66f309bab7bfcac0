"""Making pairs of equal quality that differ in what one user wants, checking that they do, and scoring by the rubric.

The same generator writes both answers from the user's posts: one with the aspects that the user expects, one with the
aspects to avoid, both short and direct. A matcher of quality keeps the pairs that are level otherwise.

Personalized RewardBench: Evaluating Reward Models with Human Aligned Personalization, arXiv 2604.07343.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from polyreward.audit.benchmarks.intervals import numbers
from polyreward.audit.benchmarks.personalized_items import (
    POSTS,
    PersonalizedPairItem,
    Ranker,
    aspect_text,
    check_items,
    prompt_of,
    refuse_leaks,
)
from polyreward.errors import InvalidInputError

WORDS = 100


@dataclass(frozen=True)
class PairsBuilt:
    """What `PairBuilder.build` made.

    Attributes
    ----------
    items : list of PersonalizedPairItem
    without_aspects, too_long, identical, unmatched : int
        Items left out: no aspects; an answer of too many words, or none; the same answer twice; unequal quality.
    """

    items: list[PersonalizedPairItem]
    without_aspects: int = 0
    too_long: int = 0
    identical: int = 0
    unmatched: int = 0


@dataclass(frozen=True)
class PairBuilder:
    """Write a chosen and a rejected answer for each question (arXiv 2604.07343).

    Parameters
    ----------
    generator : N prompts -> N texts
    rubric_source : item -> aspects that the user expects, or (aspects to meet, aspects to avoid); default the item's
        own With one list, the answer to reject is asked to avoid the very aspects that the other meets.
    quality_matcher : items -> N booleans, optional
        Whether the two answers are of equal quality.
    max_words : int
        Longer answers are left out, so that length decides nothing.
    profile_k : int
        Posts that the generator sees, where the item has any.
    rank : order of the posts, optional
    """

    generator: Callable[[Sequence[str]], Sequence[str]]
    rubric_source: Callable[[PersonalizedPairItem], Any] | None = None
    quality_matcher: Callable[[Sequence[PersonalizedPairItem]], Sequence[bool]] | None = None
    max_words: int = WORDS
    profile_k: int = POSTS
    rank: Ranker | None = None

    def build(self, items: Sequence[PersonalizedPairItem]) -> PairsBuilt:
        """Answers for items whose own answers, if any, are replaced.

        Raises
        ------
        InvalidInputError
            Ids that come twice, a generator or matcher that returns another number of entries.
        """
        check_items(items)
        rubrics = [self._rubric(item) for item in items]
        kept = [(item, meet, avoid) for item, (meet, avoid) in zip(items, rubrics, strict=True) if meet]
        prompts = [self._prompt(item, meet, "meet") for item, meet, _ in kept]
        prompts += [self._prompt(item, avoid, "avoid") for item, _, avoid in kept]
        texts = list(self.generator(prompts)) if prompts else []
        if len(texts) != len(prompts):
            raise InvalidInputError(f"the generator gave {len(texts)} texts for {len(prompts)} prompts")
        made = [
            replace(item, rubric_aspects=item.rubric_aspects or meet, chosen=chosen, rejected=rejected)
            for (item, meet, _), chosen, rejected in zip(kept, texts[: len(kept)], texts[len(kept) :], strict=True)
        ]
        short = [i for i in made if all(0 < len(t.split()) <= self.max_words for t in (i.chosen, i.rejected))]
        differing = [item for item in short if item.chosen.strip() != item.rejected.strip()]
        level = differing
        if self.quality_matcher is not None and differing:
            matched = list(self.quality_matcher(differing))
            if len(matched) != len(differing):
                raise InvalidInputError(f"the quality matcher gave {len(matched)} results for {len(differing)} items")
            level = [item for item, same in zip(differing, matched, strict=True) if same]
        return PairsBuilt(
            level,
            len(items) - len(kept),
            len(made) - len(short),
            len(short) - len(differing),
            len(differing) - len(level),
        )

    def _rubric(self, item: PersonalizedPairItem) -> tuple[list[str], list[str]]:
        found = item.rubric_aspects if self.rubric_source is None else self.rubric_source(item)
        pair = isinstance(found, tuple) and len(found) == 2 and not isinstance(found[0], str)
        meet, avoid = found if pair else (found, found)
        return [aspect_text(aspect) for aspect in meet], [aspect_text(aspect) for aspect in avoid]

    def _prompt(self, item: PersonalizedPairItem, aspects: Sequence[str], kind: str) -> str:
        view = item.model_view(self.profile_k if len(item.profile) else 0, self.rank)
        asked = "\n".join(f"- {aspect}" for aspect in aspects)
        verb = "Cover each of these aspects" if kind == "meet" else "Do not touch on any of these aspects"
        prompt = (
            f"{prompt_of(view)}\n\nAnswer directly, correctly and helpfully in at most {self.max_words} words. "
            f"{verb}:\n{asked}"
        )
        refuse_leaks([item], [prompt])
        return prompt


def quality_match_report(
    items: Sequence[PersonalizedPairItem], quality_fn: Callable[[Sequence[str], Sequence[str]], Any]
) -> dict[str, float]:
    """`quality_match` of what a function says of the general quality of the answers.

    Parameters
    ----------
    quality_fn : (questions, answers) -> N numbers
    """
    check_items(items)
    questions = [item.question for item in items]
    both = [quality_fn(questions, [getattr(item, kind) for item in items]) for kind in ("chosen", "rejected")]
    return quality_match(*both)


def quality_match(chosen: Any, rejected: Any, *, tolerance: float = 0.0) -> dict[str, float]:
    """Are chosen and rejected answers of equal quality?

    Parameters
    ----------
    chosen, rejected : (N,)
        Quality of the two answers of each item.
    tolerance : float
        Largest difference that counts as a tie.

    Returns
    -------
    dict
        ``mean_gap`` (chosen - rejected), ``mean_gap_sd`` (in deviations of all qualities; 0 without spread),
        ``mean_gap_low`` and ``mean_gap_high`` (its 95 % interval, normal, in the unit of the qualities), ``ks_p`` (test
        of Kolmogorov and Smirnov that both have one distribution), ``tie_rate``, ``chosen_higher``.

    Raises
    ------
    InvalidInputError
        No item, lengths that differ, NaN or infinity.
    """
    from scipy.stats import ks_2samp

    first, second = numbers(chosen, "quality of chosen", 1), numbers(rejected, "quality of rejected", 1)
    if len(first) != len(second) or not len(first):
        raise InvalidInputError(f"expected the quality of both answers of each item, got {len(first)}, {len(second)}")
    gap = first - second
    spread = float(np.concatenate([first, second]).std())
    error = float(gap.std(ddof=1) / np.sqrt(len(gap))) if len(gap) > 1 else 0.0
    mean = float(gap.mean())
    return {
        "mean_gap": mean,
        "mean_gap_sd": mean / spread if spread > 0 else 0.0,
        "mean_gap_low": mean - 1.96 * error,
        "mean_gap_high": mean + 1.96 * error,
        "ks_p": float(ks_2samp(first, second).pvalue),
        "tie_rate": float((np.abs(gap) <= tolerance).mean()),
        "chosen_higher": float((gap > tolerance).mean()),
    }


def rubric_score(matches: Any) -> float:
    """Mean over the aspects of a rubric of 0 (absent), 1 (partly) and 2 (fully); NaN where there are no aspects.

    Raises
    ------
    InvalidInputError
        Another number.
    """
    found = np.asarray(matches, dtype=np.float64)
    if found.ndim != 1:
        raise InvalidInputError(f"matches must be (aspects,), got shape {found.shape}")
    wrong = ~np.isin(found, (0, 1, 2))
    if wrong.any():
        at = int(wrong.argmax())
        raise InvalidInputError(f"matches[{at}] is {found[at]:g}, expected 0, 1 or 2")
    return float(found.mean()) if len(found) else float("nan")


def rubric_scores(matches: Sequence[Any]) -> dict[str, float]:
    """Mean and deviation over items of `rubric_score`; items without aspects are excluded and counted."""
    scores = np.array([rubric_score(row) for row in matches], dtype=np.float64)
    known = scores[~np.isnan(scores)]
    return {
        "mean": float(known.mean()) if len(known) else float("nan"),
        "sd": float(known.std(ddof=1)) if len(known) > 1 else 0.0,
        "items": float(len(known)),
        "excluded": float(len(scores) - len(known)),
    }
