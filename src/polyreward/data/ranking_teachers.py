"""Gold scores from a language model: a pointwise and a listwise teacher judge the pool of every query.

The pointwise teacher scores one passage a prompt; the listwise one orders the whole pool in one. Their places are fused
into gold scores (`polyreward.data.ranking`). An answer that cannot be read is recorded and never raises: a passage
without a pointwise score is left out (NaN), a pool without a listwise order has no gold at all, and the other queries
go on. Paper: GroupRank: A Groupwise Reranking Paradigm Driven by Reinforcement Learning (arXiv 2511.11653).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from polyreward.data.ranking import GROUP_SIZES, gold_scores, group_sizes, interval_groups, places, rank_fusion_labels
from polyreward.errors import InvalidInputError

Message = dict[str, str]
Ask = Callable[[Sequence[str | list[Message]]], Sequence[str | None]]
MAX_CHARACTERS = 3000
POINTWISE = """\
How relevant is the passage to the query? Give a number from 0 (irrelevant) to 10 (answers the query completely); \
decimals are allowed.

Query: {query}

Passage: {passage}

Reason first if you like, and end with exactly one line of this form:
<answer>number</answer>"""
LISTWISE = """\
Order the {count} passages below by their relevance to the query, most relevant first.

Query: {query}

{passages}

Reason first if you like, and end with exactly one line of this form, with every passage number once:
<answer>[most relevant, ..., least relevant]</answer>"""
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class LabelledPool:
    """A query with its candidates and what the teachers said.

    Attributes
    ----------
    query : str
    documents : tuple of n texts
    gold : float64 (n,)
        0 to 10; NaN for documents without a judgment of both teachers.
    pointwise : float64 (n,)
        Scores of the pointwise teacher, NaN where it gave none.
    listwise : float64 (n,)
        Places 1 to n by the listwise teacher, all NaN where its order could not be read.
    """

    query: str
    documents: tuple[str, ...]
    gold: np.ndarray
    pointwise: np.ndarray
    listwise: np.ndarray

    @property
    def failures(self) -> int:
        """Judgments that could not be read: passages of the pointwise teacher, and 1 for the listwise order."""
        return int(np.isnan(self.pointwise).sum()) + int(np.isnan(self.listwise).any())


@dataclass(frozen=True)
class TeacherLabels:
    """Asks both teachers about pools (arXiv 2511.11653).

    Parameters
    ----------
    pointwise, listwise : (prompts) -> texts, None where there is no answer
        Any client, for example ``ChatClient.ask``; all prompts of all pools go out in one call each.
    beta : float in [0, 1]
        Weight of the pointwise teacher.
    by : "score" or "place", see `gold_scores`
    max_characters : int >= 1
        Where passages are cut.

    Raises
    ------
    InvalidInputError
        At a call: a number of pools that is not that of the queries, a pool without documents, a client that returns
        another number of answers than prompts.
    """

    pointwise: Ask
    listwise: Ask
    beta: float = 0.5
    by: Literal["score", "place"] = "score"
    max_characters: int = MAX_CHARACTERS

    def __post_init__(self) -> None:
        rank_fusion_labels(np.ones(1), np.ones(1), self.beta)
        gold_scores(np.ones(1), self.by)

    def __call__(self, queries: Sequence[str], pools: Sequence[Sequence[str]]) -> list[LabelledPool]:
        """Labels of every query's pool, in order.

        Parameters
        ----------
        queries : Q texts
        pools : Q lists of texts, as `candidate_pool` chooses them
        """
        if len(queries) != len(pools):
            raise InvalidInputError(f"TeacherLabels: {len(queries)} queries and {len(pools)} pools")
        for place, pool in enumerate(pools):
            if len(pool) == 0:
                raise InvalidInputError(f"TeacherLabels: the pool of query {place} is empty, expected its candidates")
        if len(queries) == 0:
            return []
        cut = [[text[: self.max_characters] for text in pool] for pool in pools]
        pairs = zip(queries, cut, strict=True)
        singles = [POINTWISE.format(query=query, passage=text) for query, pool in pairs for text in pool]
        lists = [listwise_prompt(query, pool) for query, pool in zip(queries, cut, strict=True)]
        scores = np.array([read_score(text) for text in _asked(self.pointwise, singles)], dtype=np.float64)
        ends = np.cumsum([len(pool) for pool in pools])
        orders = _asked(self.listwise, lists)
        return [
            self._label(query, tuple(pool), own, read_order(text, len(pool)))
            for query, pool, own, text in zip(queries, pools, np.split(scores, ends[:-1]), orders, strict=True)
        ]

    def _label(self, query: str, pool: tuple[str, ...], scores: np.ndarray, order: np.ndarray) -> LabelledPool:
        both = ~np.isnan(scores) & ~np.isnan(order)
        gold = np.full(len(pool), np.nan)
        if both.any():
            gold[both] = gold_scores(rank_fusion_labels(places(scores[both]), places(-order[both]), self.beta), self.by)
        return LabelledPool(query, pool, gold, scores, order)


def training_groups(
    pool: LabelledPool,
    groups: int,
    rng: np.random.Generator,
    size: int | None = None,
    prompt: Callable[[str, Sequence[str]], Any] | None = None,
) -> list[dict[str, Any]]:
    """Rows of a training set: groups drawn from the documents of a pool that have gold.

    Parameters
    ----------
    pool : LabelledPool
    groups : int
    rng : numpy Generator
    size : int, or None to draw sizes by `group_sizes`
        A pool with fewer documents gives groups of all of them.
    prompt : (query, documents) -> prompt, optional
        For example `polyreward.rewards.groupwise.group_prompt`.

    Returns
    -------
    list of rows
        ``query``, ``documents`` (c texts), ``gold`` (c numbers, which `GroupRankReward` reads), and ``prompt``. Empty
        where gold says nothing: fewer than two documents, or no differences.
    """
    usable = np.flatnonzero(~np.isnan(pool.gold))
    gold = pool.gold[usable]
    if not (gold > 0).any():
        return []
    if size is None and len(usable) >= min(GROUP_SIZES):
        sizes = group_sizes(groups, rng, len(usable))
    else:
        sizes = np.full(groups, min(size or len(usable), len(usable)))
    rows = []
    for own in sizes.tolist():
        chosen = usable[interval_groups(gold, own, 1, rng)[0]]
        texts = [pool.documents[place] for place in chosen]
        row = {"query": pool.query, "documents": texts, "gold": pool.gold[chosen].tolist()}
        rows.append(row if prompt is None else {"prompt": prompt(pool.query, texts), **row})
    return rows


def listwise_prompt(query: str, documents: Sequence[str]) -> str:
    """Prompt for the order of a pool, documents numbered from 1."""
    passages = "\n\n".join(f"[{place}] {text}" for place, text in enumerate(documents, start=1))
    return LISTWISE.format(count=len(documents), query=query, passages=passages)


def read_score(text: str | None) -> float:
    """The pointwise score in the last ``<answer>``, NaN where it is no number from 0 to 10."""
    found = _last_answer(text)
    try:
        value = float(found) if found is not None else math.nan
    except ValueError:
        return math.nan
    return value if 0 <= value <= 10 else math.nan


def read_order(text: str | None, count: int) -> np.ndarray:
    """Places 1 to n from the listwise order in the last ``<answer>``; all NaN where it is no order of all documents."""
    found = _last_answer(text)
    try:
        order = json.loads(found or "")
    except (ValueError, RecursionError):
        order = None
    result = np.full(count, np.nan)
    whole = isinstance(order, list) and all(type(place) is int for place in order)
    if whole and sorted(order) == list(range(1, count + 1)):
        result[np.array(order) - 1] = np.arange(1, count + 1)
    return result


def _last_answer(text: str | None) -> str | None:
    answers = _ANSWER.findall(text) if isinstance(text, str) else []
    return answers[-1].strip() if answers else None


def _asked(ask: Ask, prompts: Sequence[str]) -> Sequence[str | None]:
    texts = ask(prompts) if prompts else []
    if len(texts) != len(prompts):
        raise InvalidInputError(f"TeacherLabels: the client gave {len(texts)} answers to {len(prompts)} prompts")
    return texts
