"""Groupwise reranking: candidates in small groups, one score a document, averaged over random groupings.

The N candidates of a query are shuffled and cut into M = ceil(N / c) disjoint groups. A scorer reads a group at once
and gives one score of 0 to 10 a document, so groups run in parallel, and T passes with different shuffles are averaged:

    score(d) = 1/T sum_t f(query, group of d in pass t),    final = w score + (1 - w) retriever score

Pointwise scoring is c = 1; a listwise window that slides over the list (`SlidingWindowReranker`) needs its calls one
after the other. Paper: GroupRank: A Groupwise Reranking Paradigm Driven by Reinforcement Learning (arXiv 2511.11653).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.rewards.contract import is_finite
from polyreward.rewards.score_answers import parse_scores

Scorer = Callable[[Any, Any], Sequence[float] | np.ndarray | None]
Message = dict[str, str]
Ask = Callable[[Sequence[str | list[Message]]], Sequence[str | None]]
SIZE = 20
#: Sampling of the released inference, as options of ``ChatClient.ask``.
RELEASED_SAMPLING: dict[str, Any] = {"temperature": 0.3, "parameters": {"top_p": 0.8}}

INSTRUCTION = """\
Judge how relevant each of the {count} passages below is to the query. Compare the passages with each other, then give \
every passage a whole number from 0 (irrelevant) to 10 (answers the query completely).

Query: {query}

{passages}

Write your comparison and your scores in exactly this form, with every passage number once:
<reason>your comparison</reason><answer>{{"1": score, ..., "{count}": score}}</answer>"""


class UnparsedGroupWarning(UserWarning):
    """Groups of a reranking got no score, because the scorer gave no answer or one that cannot be read."""


@dataclass(frozen=True)
class GroupPartitioner:
    """Cuts candidates into disjoint groups (arXiv 2511.11653).

    Parameters
    ----------
    size : int >= 1
        c in the paper, 20; the released inference has 10. The last group holds the remainder and is never filled up: a
        remainder of one document has nothing to be compared with.
    strategy : "random", or "sorted" to keep neighbours in the retriever's order together (an ablation of the paper)
    seed : int or numpy Generator
        With a number, pass t of every call has the same shuffle; a generator gives new ones at every call.

    Raises
    ------
    InvalidInputError
        A size below 1, an unknown strategy, a seed that is neither.
    """

    size: int = SIZE
    strategy: Literal["random", "sorted"] = "random"
    seed: int | np.random.Generator = 0

    def __post_init__(self) -> None:
        _at_least_one("GroupPartitioner", size=self.size)
        if self.strategy not in ("random", "sorted"):
            raise InvalidInputError(f"strategy must be 'random' or 'sorted', got {self.strategy!r}")
        seeded = isinstance(self.seed, int | np.integer) and not isinstance(self.seed, bool) and self.seed >= 0
        if not (seeded or isinstance(self.seed, np.random.Generator)):
            raise InvalidInputError(f"seed must be a whole number from 0 up or a numpy Generator, got {self.seed!r}")

    def order(self, count: int, number: int = 0, retriever: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
        """Documents in the order in which they are cut into groups, int64 (N,).

        Parameters
        ----------
        count : int
            N, number of documents.
        number : int
            Which pass.
        retriever : (N,), optional
            Scores that "sorted" sorts by, highest first, ties in the order of the input; without them the documents
            are in the retriever's order already.
        """
        if self.strategy == "random":
            seeded = not isinstance(self.seed, np.random.Generator)
            generator = np.random.default_rng([int(self.seed), number]) if seeded else self.seed  # type: ignore[arg-type]
            return np.asarray(generator.permutation(count))  # type: ignore[union-attr]
        if retriever is None:
            return np.arange(count)
        scores = np.asarray(retriever, dtype=np.float64)
        if scores.shape != (count,) or np.isnan(scores).any():
            raise InvalidInputError(f"retriever must be {count} numbers, one a document, got shape {scores.shape}")
        return np.argsort(-scores, kind="stable")

    def __call__(
        self, count: int, number: int = 0, retriever: Sequence[float] | np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Groups as arrays of document indices; every document is in one of them. Arguments as `order`."""
        order = self.order(count, number, retriever)
        return np.split(order, np.arange(self.size, count, self.size)) if count else []


@dataclass(frozen=True)
class Reranking:
    """What a reranker found for one query.

    Attributes
    ----------
    scores : float64 (N,)
        Higher is better; NaN only for documents that no pass scored, with ``on_failure="skip"``.
    calls : int
        Groups that were given to the scorer.
    rounds : int
        Calls that must wait for one another; the latency where calls run in parallel.
    failures : int
        Calls without an answer that could be read.
    """

    scores: np.ndarray
    calls: int
    rounds: int
    failures: int


@dataclass(frozen=True)
class GroupwiseReranker:
    """Scores every candidate of a query in groups, averaged over passes (arXiv 2511.11653). It keeps no state.

    Parameters
    ----------
    scorer : (query, documents) -> c scores, or None where there is no answer that can be read
        A scorer with a method ``score_many(query, groups) -> list of these`` gets all groups of all passes at once, as
        `PromptedScorer` wants. Documents are given as they came: a list, or rows of an array or tensor.
    size : int >= 1
        c in the paper.
    passes : int >= 1
        T in the paper; gains saturate after 4.
    strategy, seed : see `GroupPartitioner`
        With "sorted" every pass has the same groups.
    on_failure : "zero", or "skip"
        What a group without an answer gets: score 0 for all its documents, as the released inference does, or nothing,
        so that the other passes count alone. Failures are counted either way and a call warns of them.
    scale : float > 0
        Scores are divided by it; the released inference divides by 10.

    Raises
    ------
    InvalidInputError
        Size or passes below 1, another scale, strategy or `on_failure`; at a call, a scorer that returns something
        else than one finite score a document, or None.
    """

    scorer: Scorer
    size: int = SIZE
    passes: int = 1
    strategy: Literal["random", "sorted"] = "random"
    seed: int | np.random.Generator = 0
    on_failure: Literal["zero", "skip"] = "zero"
    scale: float = 1.0

    def __post_init__(self) -> None:
        GroupPartitioner(self.size, self.strategy, self.seed)
        _at_least_one("GroupwiseReranker", passes=self.passes)
        if self.on_failure not in ("zero", "skip"):
            raise InvalidInputError(f"on_failure must be 'zero' or 'skip', got {self.on_failure!r}")
        if not is_finite(self.scale) or self.scale <= 0:
            raise InvalidInputError(f"scale must be a positive number, got {self.scale!r}")
        if not (callable(self.scorer) or hasattr(self.scorer, "score_many")):
            raise InvalidInputError(f"the scorer {self.scorer!r} is no function and has no score_many")

    def __call__(self, query: Any, documents: Any, retriever: Any = None) -> np.ndarray:
        """Scores of the documents, float64 (N,); empty without documents.

        Warns
        -----
        UnparsedGroupWarning
            Groups without an answer, with their number.
        """
        return _warned(self.explain(query, documents, retriever))

    def explain(self, query: Any, documents: Any, retriever: Any = None) -> Reranking:
        """Scores with the number of calls and failures.

        Parameters
        ----------
        query : anything that the scorer reads
        documents : N documents
        retriever : (N,) scores, optional
            Only for the strategy "sorted", where the documents are not in the retriever's order.
        """
        count = len(documents)
        partition = GroupPartitioner(self.size, self.strategy, self.seed)
        groups = [group for number in range(self.passes) for group in partition(count, number, retriever)]
        answers = _answers(self.scorer, query, [_rows(documents, group) for group in groups])
        total, counted, failures = np.zeros(count), np.zeros(count), 0
        for group, answer in zip(groups, answers, strict=True):
            failures += answer is None
            if answer is not None:
                total[group] += _checked(answer, len(group))  # a group holds a document once
            if answer is not None or self.on_failure == "zero":
                counted[group] += 1
        scores = np.where(counted > 0, total / np.maximum(counted, 1), np.nan) / self.scale
        return Reranking(scores, len(groups), min(len(groups), 1), failures)


def released(scorer: Scorer, seed: int | np.random.Generator = 0) -> GroupwiseReranker:
    """The reranker of the released inference script: groups of 10, 2 passes, scores over 10, failures as 0.

    Its other choices: `PromptedScorer` with texts cut at 3000 characters, `RELEASED_SAMPLING` in the client, and `fuse`
    with 0.6.
    """
    return GroupwiseReranker(scorer, size=10, passes=2, seed=seed, on_failure="zero", scale=10.0)


@dataclass(frozen=True)
class SlidingWindowReranker:
    """Listwise baseline: a window slides from the end of the list to its front and sorts what it sees.

    Each step moves the best of a window into the next one, so that a document can rise from the last place to the first
    in one run, and every call waits for the one before. The last window starts at the first place, whatever the step.
    Method of RankGPT (arXiv 2304.09542).

    Parameters
    ----------
    scorer : see `GroupwiseReranker`
        A window without an answer keeps its order.
    window, step : int >= 1, step <= window

    Raises
    ------
    InvalidInputError
        A window or step below 1, a step above the window.
    """

    scorer: Scorer
    window: int = 10
    step: int = 5

    def __post_init__(self) -> None:
        _at_least_one("SlidingWindowReranker", window=self.window, step=self.step)
        if self.step > self.window:
            raise InvalidInputError(f"step {self.step} above the window {self.window} leaves documents out")

    def __call__(self, query: Any, documents: Any) -> np.ndarray:
        """Scores float64 (N,): N for the first place to 1 for the last. Warns as `GroupwiseReranker` does."""
        return _warned(self.explain(query, documents))

    def explain(self, query: Any, documents: Any) -> Reranking:
        """Scores with the number of calls, all in sequence. The documents come in the retriever's order."""
        count = len(documents)
        order, calls, failures = np.arange(count), 0, 0
        end = count
        while end > 0:
            seen = order[max(end - self.window, 0) : end]
            (answer,) = _answers(self.scorer, query, [_rows(documents, seen)])
            calls, failures = calls + 1, failures + (answer is None)
            if answer is not None:
                scores = _checked(answer, len(seen))
                order[max(end - self.window, 0) : end] = seen[np.argsort(-scores, kind="stable")]
            end = end - self.step if end > self.window else 0
        scores = np.zeros(count)
        scores[order] = np.arange(count, 0, -1)
        return Reranking(scores, calls, calls, failures)


def fuse(rerank: Any, retriever: Any, w: float = 0.6) -> Any:
    """``w * rerank + (1 - w) * retriever`` of arrays (...,); w is 0.6 in the released inference of arXiv 2511.11653.

    Both should be on one scale: rerank scores over 10, retriever scores in [0, 1]. Where a document has no rerank score
    (NaN), its retriever score stands alone.

    Raises
    ------
    InvalidInputError
        w outside [0, 1], shapes that differ, NaN in the retriever scores.
    """
    if not is_finite(w) or not 0 <= w <= 1:
        raise InvalidInputError(f"fuse: w must lie in [0, 1], got {w!r}")
    tensor = next((values for values in (rerank, retriever) if hasattr(values, "new_tensor")), None)
    xp: Any = np
    if tensor is not None:
        import torch

        xp = torch
    first, second = (
        np.asarray(values) if tensor is None else xp.as_tensor(values, device=tensor.device)
        for values in (rerank, retriever)
    )
    if tuple(first.shape) != tuple(second.shape):
        raise InvalidInputError(f"fuse: {tuple(first.shape)} rerank and {tuple(second.shape)} retriever scores")
    if bool(xp.isnan(second).any()):
        raise InvalidInputError("fuse: NaN in the retriever scores")
    return xp.where(xp.isnan(first), second, w * first + (1 - w) * second)


def group_prompt(query: str, documents: Sequence[str], max_characters: int | None = 3000) -> str:
    """Prompt for the scores of a group, documents numbered from 1; texts cut at `max_characters` as in the release."""
    passages = "\n\n".join(f"[{place}] {text[:max_characters]}" for place, text in enumerate(documents, start=1))
    return INSTRUCTION.format(count=len(documents), query=query, passages=passages)


@dataclass(frozen=True)
class PromptedScorer:
    """Scores groups with a language model; all groups of a reranking go out in one call.

    Parameters
    ----------
    ask : (prompts) -> texts, None where there is no answer
        Any client, for example ``ChatClient.ask``; a prompt is a text or a list of messages.
    prompt : (query, documents) -> text or list of messages
    """

    ask: Ask
    prompt: Callable[[Any, Sequence[str]], str | list[Message]] = field(default=group_prompt)

    def __call__(self, query: Any, documents: Sequence[str]) -> np.ndarray | None:
        """Scores float64 (c,) of one group, None where the answer cannot be read."""
        return self.score_many(query, [documents])[0]

    def score_many(self, query: Any, groups: Sequence[Sequence[str]]) -> list[np.ndarray | None]:
        """Scores of each group.

        Raises
        ------
        InvalidInputError
            A client that returns another number of answers than prompts.
        """
        texts = self.ask([self.prompt(query, group) for group in groups]) if groups else []
        if len(texts) != len(groups):
            raise InvalidInputError(f"PromptedScorer: the client gave {len(texts)} answers to {len(groups)} prompts")
        return [
            parse_scores(text, range(1, len(group) + 1)).scores if isinstance(text, str) else None
            for text, group in zip(texts, groups, strict=True)
        ]


def _warned(found: Reranking) -> np.ndarray:
    if found.failures:
        message = f"{found.failures} of {found.calls} groups got no answer that can be read"
        warnings.warn(message, UnparsedGroupWarning, stacklevel=3)
    return found.scores


def _answers(scorer: Any, query: Any, groups: list[Any]) -> Sequence[Any]:
    many = getattr(scorer, "score_many", None)
    answers = [scorer(query, group) for group in groups] if many is None else many(query, groups)
    if len(answers) != len(groups):
        raise InvalidInputError(f"the scorer gave {len(answers)} answers to {len(groups)} groups")
    return answers


def _rows(documents: Any, group: np.ndarray) -> Any:
    if hasattr(documents, "new_tensor"):
        return documents[group.tolist()]
    return documents[group] if isinstance(documents, np.ndarray) else [documents[place] for place in group.tolist()]


def _checked(answer: Any, size: int) -> np.ndarray:
    values = answer.detach().cpu().numpy() if hasattr(answer, "new_tensor") else answer
    try:
        scores = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        scores = np.full(0, np.nan)
    if scores.shape != (size,) or not np.isfinite(scores).all():
        raise InvalidInputError(f"the scorer returned {values!r} for a group of {size}, expected as many finite scores")
    return scores


def _at_least_one(where: str, **numbers: int) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
            raise InvalidInputError(f"{where}: {name} must be a whole number, at least 1, got {number!r}")
