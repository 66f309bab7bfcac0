"""Reasoning chains that argue from several roles, made without labels from a model's own samples.

Contrasting roles are chosen by relevance and distance; a chain stays where its answer is the majority answer of its
role; the kept chains of some roles are joined in random order into one text that ends with each role's answer; the
shortest and longest of all texts are dropped.

    P(role i) = softmax_i( relevance_i + alpha * mean_{j != i} (1 - cos(h_i, h_j)) )

The softmax maximises expected score plus entropy. The majority answer is the most probable one under a symmetric
Dirichlet prior, and errs with probability at most ``exp(-2 k (theta - 1/2)^2)`` where each of k samples is right with
probability theta. Everything here is numpy.

Paper: MultiRole-R1, Diversity-Enhanced Reasoning for Subjective Questions (arXiv 2507.20187).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError

#: What stands between two chains.
GLUE = "</think> Wait, I need to think from {role}'s perspective"


def role_probabilities(relevance: np.ndarray, embeddings: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """Probabilities of roles (..., R), float64.

    Parameters
    ----------
    relevance : float (..., R)
        Mean rating of each role for the question.
    embeddings : float (..., R, d)
        Of each role given the question. A zero vector has cosine 0 with every other.
    alpha : float
        Weight of the contrast; the paper does not give its value.

    Raises
    ------
    InvalidInputError
        Shapes that do not fit, NaN or infinity, no roles.
    """
    score, h = np.asarray(relevance, dtype=np.float64), np.asarray(embeddings, dtype=np.float64)
    if score.ndim < 1 or h.shape[:-1] != score.shape or not score.shape[-1]:
        raise InvalidInputError(f"expected relevance (..., R) and embeddings (..., R, d), got {score.shape}, {h.shape}")
    if not (np.isfinite(score).all() and np.isfinite(h).all() and math.isfinite(alpha)):
        raise InvalidInputError("relevance, embeddings and alpha of roles must be finite")
    norm = np.linalg.norm(h, axis=-1, keepdims=True)
    unit = h / np.where(norm > 0, norm, 1.0)
    cosine, count = unit @ np.swapaxes(unit, -1, -2), score.shape[-1]
    own = np.diagonal(cosine, axis1=-2, axis2=-1)
    contrast = 1 - (cosine.sum(-1) - own) / (count - 1) if count > 1 else np.zeros_like(score)
    total = score + alpha * contrast
    weights = np.exp(total - total.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def select_roles(
    relevance: np.ndarray,
    embeddings: np.ndarray,
    alpha: float = 1.0,
    n: int = 3,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Indices of n different roles, int (..., n), drawn one after the other by `role_probabilities`.

    Parameters
    ----------
    relevance, embeddings, alpha : as in `role_probabilities`
    rng : numpy Generator; None takes the n most probable roles

    Raises
    ------
    InvalidInputError
        n below 1 or above the number of roles; as `role_probabilities`.
    """
    chances = role_probabilities(relevance, embeddings, alpha)
    if not 1 <= n <= chances.shape[-1]:
        raise InvalidInputError(f"n must be between 1 and the {chances.shape[-1]} roles, got {n}")
    with np.errstate(divide="ignore"):
        keys = np.log(chances)
    if rng is not None:  # the largest of log p + Gumbel noise are draws without replacement
        keys = keys + rng.gumbel(size=keys.shape)
    return np.argsort(-keys, axis=-1, kind="stable")[..., :n]


def self_consistency_filter(answers: Any, tie: Literal["first", "drop"] = "first") -> np.ndarray:
    """Which chains answer as the majority of their role does: answers (..., k) -> bool (..., k).

    Parameters
    ----------
    answers : labels, one role's k samples along the last axis
        None and NaN are missing answers: they have no vote and are not kept. Pad roles with fewer samples by None.
    tie : "first" keeps the label that came first among those with most votes, "drop" keeps none
        The paper does not say.

    Raises
    ------
    InvalidInputError
        Rows of different length, unknown `tie`.
    """
    if tie not in ("first", "drop"):
        raise InvalidInputError(f"tie must be 'first' or 'drop', got {tie!r}")
    try:
        labels = np.asarray(answers, dtype=object) if isinstance(answers, list | tuple) else np.asarray(answers)
    except ValueError as error:
        raise InvalidInputError("roles have different numbers of answers: pad the shorter ones with None") from error
    if labels.ndim < 1:
        raise InvalidInputError(f"answers must be a list of labels, got {answers!r}")
    if labels.dtype == object and any(isinstance(label, list | tuple) for label in labels.ravel()):
        raise InvalidInputError("roles have different numbers of answers: pad the shorter ones with None")
    if not labels.shape[-1]:
        return np.zeros(labels.shape, dtype=bool)
    given = np.asarray((labels == labels) & (labels != np.array(None, dtype=object)), dtype=bool)
    same = (
        np.asarray(labels[..., :, None] == labels[..., None, :], dtype=bool) & given[..., :, None] & given[..., None, :]
    )
    votes = same.sum(-1)
    kept = np.take_along_axis(same, votes.argmax(-1)[..., None, None], axis=-2)[..., 0, :]
    if tie == "drop":
        leads = votes == votes.max(-1, keepdims=True)
        kept = kept & (leads == kept).all(-1, keepdims=True)
    return kept


def majority_is_right(accuracy: float, samples: int) -> float:
    """Chance that the majority of independent yes-or-no samples is right; a tie is right half the time."""
    half = samples / 2
    terms = (
        math.comb(samples, right)
        * accuracy**right
        * (1 - accuracy) ** (samples - right)
        * (0.5 if right == half else 1.0)
        for right in range(math.ceil(half), samples + 1)
    )
    return math.fsum(terms)


def drop_extremes(lengths: Sequence[float] | np.ndarray, share: float = 0.1) -> np.ndarray:
    """Which texts stay when the shortest and the longest are dropped, bool (N,).

    ``floor(share * N)`` go at each end; of equal lengths, those that come first are the shorter ones.

    Raises
    ------
    InvalidInputError
        A share outside [0, 0.5), lengths that are not a list of finite numbers.
    """
    sizes = np.asarray(lengths, dtype=np.float64)
    if not 0 <= share < 0.5 or sizes.ndim != 1 or not np.isfinite(sizes).all():
        raise InvalidInputError(f"drop_extremes needs lengths (N,) and a share in [0, 0.5), got {sizes.shape}, {share}")
    count = math.floor(share * len(sizes) + 1e-9)
    kept = np.zeros(len(sizes), dtype=bool)
    kept[np.argsort(sizes, kind="stable")[count : len(sizes) - count]] = True
    return kept


@dataclass(frozen=True)
class RoleSamples:
    """What a model wrote for one question.

    Attributes
    ----------
    chains : mapping of role to its k reasoning chains
    answers : mapping of role to their k answers, None where there is none
    """

    chains: Mapping[str, Sequence[str]]
    answers: Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class MergedChain:
    """A text that argues from several roles.

    Attributes
    ----------
    question : int
        Index of the question.
    text : str
    answers : mapping of role to answer, in the order of the text
    answer : the majority over the roles; None after divergent merging
    """

    question: int
    text: str
    answers: Mapping[str, Any]
    answer: Any = None


def merge_chains(
    chains: Mapping[str, str],
    answers: Mapping[str, Any],
    mode: Literal["divergent", "convergent"],
    rng: np.random.Generator,
    question: int = 0,
    glue: str = GLUE,
) -> MergedChain | None:
    """One chain a role, joined in random order and followed by a line ``role: answer`` for each.

    After convergent merging a line ``Final answer: ...`` with the majority follows; None where no label leads.

    Raises
    ------
    InvalidInputError
        Unknown mode, no chains, or other roles in the answers than in the chains.
    """
    if mode not in ("divergent", "convergent"):
        raise InvalidInputError(f"mode must be 'divergent' or 'convergent', got {mode!r}")
    if not chains or set(chains) != set(answers):
        raise InvalidInputError(f"expected a chain and an answer of each role, got {list(chains)} and {list(answers)}")
    order = [list(chains)[at] for at in rng.permutation(len(chains))]
    final, lines = None, [f"{role}: {answers[role]}" for role in order]
    if mode == "convergent":
        kept = self_consistency_filter([answers[role] for role in order], tie="drop")
        if not kept.any():
            return None
        final = answers[order[int(kept.argmax())]]
        lines.append(f"Final answer: {final}")
    parts = [chains[order[0]].strip()]
    parts += [f"{glue.format(role=role)}\n{chains[role].strip()}" for role in order[1:]]
    return MergedChain(
        question, "\n".join([*parts, "</think>", *lines]), {role: answers[role] for role in order}, final
    )


def role_chains(
    questions: Sequence[RoleSamples],
    mode: Literal["divergent", "convergent"],
    rng: np.random.Generator,
    *,
    roles: int = 3,
    per_question: int = 3,
    share: float = 0.1,
) -> list[MergedChain]:
    """Merged chains of all questions: `self_consistency_filter`, `merge_chains`, `drop_extremes` by words.

    Empty chains are malformed and dropped. A question with fewer than `roles` roles that have a kept chain gives none,
    and neither does a convergent merge without a majority.

    Parameters
    ----------
    roles : int
        Roles in a text, the first ones of the question that have a kept chain.
    per_question : int
        Texts a question, each from chains drawn anew; 900 questions gave the paper's 2,700.
    share : as in `drop_extremes`

    Raises
    ------
    InvalidInputError
        Another number of answers than chains of a role.
    """
    merged: list[MergedChain] = []
    for index, question in enumerate(questions):
        kept: dict[str, list[tuple[str, Any]]] = {}
        for role, texts in question.chains.items():
            labels = question.answers.get(role, ())
            if len(labels) != len(texts):
                raise InvalidInputError(
                    f"question {index}, role {role!r}: {len(labels)} answers of {len(texts)} chains"
                )
            mask = self_consistency_filter(list(labels))
            pairs = zip(texts, labels, mask, strict=True)
            if chosen := [(text, label) for text, label, keep in pairs if keep and text.strip()]:
                kept[role] = chosen
        names = list(kept)[:roles]
        if len(names) < roles:
            continue
        for _ in range(per_question):
            drawn = {role: kept[role][int(rng.integers(len(kept[role])))] for role in names}
            chains = {role: text for role, (text, _) in drawn.items()}
            answers = {role: label for role, (_, label) in drawn.items()}
            chain = merge_chains(chains, answers, mode, rng, index)
            if chain is not None:
                merged.append(chain)
    stays = drop_extremes([len(chain.text.split()) for chain in merged], share)
    return [chain for chain, stay in zip(merged, stays, strict=True) if stay]
