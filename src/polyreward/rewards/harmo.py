"""The reward of HARMO: hybrid accuracy, a length penalty of the group and a reward for the format, added up.

    R = R_hyb + R_len + R_fmt

The accuracy comes from a rule or a model (`polyreward.rewards.hybrid`), the length penalty compares a response with the
correct ones of its group (`polyreward.rewards.group_length`), and the format is worth 0.5. Each term's share of the
variance inside groups goes to the trainer's metrics, so that a term of another scale shows.

Paper: Beyond Monolithic Rewards: A Hybrid and Multi-Aspect Reward Optimization for MLLM Alignment (HARMO, arXiv
2510.05283). It centres by the group's mean and does not divide by the deviation: ``dr_grpo()`` among the advantages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.rewards.contract import Reward, RewardFunction, Sample, as_list, check_values, values_of
from polyreward.rewards.embedders import HashingEmbedder, SentenceEmbedder
from polyreward.rewards.embedding_similarity import Embed, EmbeddingSurrogateReward
from polyreward.rewards.formats import RegexFormat, TagFormat
from polyreward.rewards.group_length import GroupLengthPenalty, group_labels, response_lengths
from polyreward.rewards.groups import GroupReward
from polyreward.rewards.hybrid import TYPES, ConfidentRule, Fallback, HybridParts, HybridReward
from polyreward.rewards.length import Unit
from polyreward.rewards.verifiers import ExactMatch, NumericAnswer

if TYPE_CHECKING:
    from polyreward.grouped import Segments


@dataclass(frozen=True)
class FormatReward(Reward):
    """`value` where the completion has the required form, else 0 (HARMO, arXiv 2510.05283).

    Parameters
    ----------
    pattern : tuple of tags, each once, in order and with nothing outside; or a regular expression for the whole text
    value : float
        0.5 by default.

    Range {0, value}.
    """

    pattern: str | tuple[str, ...] = ("think", "answer")
    value: float = 0.5

    def __post_init__(self) -> None:
        if not np.isfinite(self.value):
            raise InvalidInputError(f"FormatReward: value must be finite, got {self.value}")
        form = RegexFormat(self.pattern) if isinstance(self.pattern, str) else TagFormat(tuple(self.pattern))
        object.__setattr__(self, "_form", form)

    def score(self, sample: Sample) -> float:
        """`value` or 0."""
        return self.value * self._form.score(sample)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class HarmoParts:
    """The weighted terms of `HarmoReward`, float64 (N,), NaN where it does not apply; and what they were made of.

    `hybrid` are the hybrid's parts, `groups` the label of each row's group, `lengths` float64 (N,).
    """

    total: np.ndarray
    accuracy: np.ndarray
    length: np.ndarray
    format: np.ndarray
    hybrid: HybridParts
    groups: list[str | int]
    lengths: np.ndarray


@dataclass(frozen=True)
class HarmoReward(GroupReward):
    """``R = R_hyb + R_len + R_fmt`` (HARMO, arXiv 2510.05283, Eq. 3); see `harmo`.

    Parameters
    ----------
    hybrid : HybridReward
    penalty : GroupLengthPenalty
        What counts as correct is decided by the hybrid's unweighted value.
    form : reward
    weights : (accuracy, length, format)
    unit : unit of the lengths
    thresholds : mapping of "verifiable" or "open" to tau, in place of the penalty's own

    Range with weights 1: [-p_max, 1.5]. Does not apply where the hybrid does not. The trainer's ``log_extra`` hears
    ``hybrid_source``, its ``log_metric`` ``harmo/TERM`` and ``harmo/share/TERM``, the mean of each term and its
    share of the variance inside groups, and ``harmo/wrong_length``, the mean length of samples that do not count as
    correct.
    """

    hybrid: HybridReward
    penalty: GroupLengthPenalty = field(default_factory=GroupLengthPenalty)
    form: RewardFunction = field(default_factory=FormatReward)
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    unit: Unit = "tokens"
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.weights) != 3 or not np.isfinite(self.weights).all():
            raise InvalidInputError(
                f"harmo needs three finite weights (accuracy, length, format), got {self.weights!r}"
            )
        for name, tau in self.thresholds.items():
            if name not in TYPES or not np.isfinite(tau):
                raise InvalidInputError(f"harmo: thresholds are finite and of {TYPES}, got {name!r}: {tau!r}")

    @property
    def __name__(self) -> str:
        """Name in logs."""
        return "harmo"

    @property
    def members(self) -> tuple[RewardFunction, ...]:
        """Hybrid and format."""
        return (self.hybrid, self.form)

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion."""
        if len(completions) == 0:
            return []
        found = self.explain(prompts, completions, **columns)
        if callable(log_extra := columns.get("log_extra")):
            log_extra("hybrid_source", found.hybrid.source)
        if callable(log_metric := columns.get("log_metric")):
            self._log(found, log_metric)
        return as_list(check_values(found.total, len(completions), "harmo"))

    def explain(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> HarmoParts:
        """The reward with its terms."""
        hybrid = self.hybrid.explain(prompts, completions, **columns)
        groups = group_labels("harmo", prompts, len(completions), columns)
        lengths = response_lengths(self, prompts, completions, columns, self.unit)
        form = np.nan_to_num(values_of(self.form, prompts, completions, columns))
        penalty = self.penalty(hybrid.values, lengths, groups, self._tau(hybrid.verifiable))
        terms = [weight * term for weight, term in zip(self.weights, (hybrid.values, penalty, form), strict=True)]
        terms = [np.where(np.isnan(hybrid.values), np.nan, term) for term in terms]
        return HarmoParts(terms[0] + terms[1] + terms[2], terms[0], terms[1], terms[2], hybrid, groups, lengths)

    def _tau(self, verifiable: np.ndarray) -> np.ndarray:
        taus = [self.thresholds.get(name, self.penalty.tau) for name in TYPES]
        return np.where(verifiable, *taus)

    def _log(self, found: HarmoParts, log_metric: Callable[[str, float], None]) -> None:
        terms = {name: getattr(found, name) for name in ("accuracy", "length", "format")}
        applies = ~np.isnan(found.total)
        if not applies.any():
            return
        labels = [found.groups[row] for row in np.flatnonzero(applies)]
        table = np.stack([term[applies] for term in terms.values()], axis=1)
        shares = variance_shares(table, labels)
        for name, term, share in zip(terms, table.T, shares, strict=True):
            log_metric(f"harmo/{name}", float(term.mean()))
            log_metric(f"harmo/share/{name}", float(share))
        wrong = applies & (found.hybrid.values < self._tau(found.hybrid.verifiable))
        if wrong.any():
            log_metric("harmo/wrong_length", float(found.lengths[wrong].mean()))


def harmo(
    rule: Callable[..., Any],
    model: RewardFunction,
    route: Callable[[Any], str] | str = "type",
    *,
    fallback: Fallback = "zero",
    pattern: str | tuple[str, ...] = ("think", "answer"),
    format_value: float = 0.5,
    p_max: float = 0.5,
    tau: float | Mapping[str, float] = 0.5,
    side: Literal["short", "two_sided"] = "short",
    centre: Literal["mean", "median"] = "mean",
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    unit: Unit = "tokens",
) -> HarmoReward:
    """The reward of HARMO (arXiv 2510.05283, Eq. 3): hybrid accuracy + length penalty of the group + format.

    Parameters
    ----------
    rule, model, route, fallback : as in `HybridReward`
    pattern, format_value : as in `FormatReward`
    p_max, tau, side, centre : as in `GroupLengthPenalty`; tau may be a mapping of "verifiable" and "open"
    weights : (accuracy, length, format), 1 each by default
    unit : "tokens", "words" or "characters"

    Pair it with mean-only centring (``dr_grpo()`` among the advantages). Range with weights 1:
    [-p_max, 1 + format_value].
    """
    thresholds = dict(tau) if isinstance(tau, Mapping) else {}
    penalty = GroupLengthPenalty(p_max, 0.5 if isinstance(tau, Mapping) else tau, side, centre)
    hybrid = HybridReward(rule, model, route, fallback)
    return HarmoReward(hybrid, penalty, FormatReward(pattern, format_value), weights, unit, thresholds)


def answer_harmo(
    *,
    rule: Literal["exact", "number"] = "exact",
    extract: str = "<answer>",
    column: str = "answer",
    route: str = "type",
    embedder: str = "words",
    **options: Any,
) -> HarmoReward:
    """`harmo` from plain options, as recipes have them: a verifier, and likeness to the reference elsewhere.

    Parameters
    ----------
    rule : "exact" for `ExactMatch`, "number" for `NumericAnswer`
    extract : where the answer stands, for rule and likeness
    column, route : columns of the reference and of the type
    embedder : "words" or "characters" (`HashingEmbedder`), or a model of sentence-transformers
    options : further arguments of `harmo`
    """
    if rule not in ("exact", "number"):
        raise InvalidInputError(f"harmo: rule must be 'exact' or 'number', got {rule!r}")
    verifier = (ExactMatch if rule == "exact" else NumericAnswer)(column=column, extract=extract)
    embed: Embed = SentenceEmbedder(embedder)
    if embedder in ("words", "characters"):
        characters = embedder == "characters"
        embed = HashingEmbedder(ngrams=(2, 4) if characters else (1, 2), characters=characters)
    model = EmbeddingSurrogateReward(embed, column=column, extract=extract)
    return harmo(ConfidentRule(verifier), model, route, **options)


def variance_shares(terms: np.ndarray, groups: Segments | Sequence[Any]) -> np.ndarray:
    """Share of each term in the variance of their sum inside groups, float64 (K,): ``cov(c_k, c) / var(c)``.

    Parameters
    ----------
    terms : float (N, K)
        Terms that apply to every row; their sum is the reward.
    groups : ids (N,) or `Segments`

    The shares add up to 1; all are 0 where the sum is constant inside every group. A term that pulls against the sum
    has a negative share.
    """
    import torch

    from polyreward.grouped import Segments, factorize

    segments = groups if isinstance(groups, Segments) else factorize(groups, name="groups")
    centred = segments.centred(torch.as_tensor(np.asarray(terms, dtype=np.float64)))
    total = centred.sum(dim=1)
    energy = float(total.square().sum())
    return (centred * total[:, None]).sum(dim=0).numpy() / energy if energy > 0 else np.zeros(centred.shape[1])
