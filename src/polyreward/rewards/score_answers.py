"""Answers that score a group of documents: one JSON object of id and score, after a reasoning text.

    <reason>...</reason><answer>{"1": 7, "2": 8}</answer>

The format of GroupRank: A Groupwise Reranking Paradigm Driven by Reinforcement Learning (arXiv 2511.11653).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from polyreward.rewards.answers import find_answer
from polyreward.rewards.contract import Sample
from polyreward.rewards.formats import TagFormat

HIGHEST = 10
OK, BAD_JSON, BAD_TAGS = STATUSES = ("ok", "bad_json", "bad_tags")
_TAGS = TagFormat(("reason", "answer"))


class ParsedScores(NamedTuple):
    """How an answer reads: "ok", "bad_json" or "bad_tags", and the scores float64 (c,) of an "ok" one, else None."""

    status: str
    scores: np.ndarray | None


def parse_scores(text: str, ids: Sequence[Any], highest: float = HIGHEST) -> ParsedScores:
    """Read ``<reason>...</reason><answer>{"id": score, ...}</answer>``; never raises for what stands in the text.

    "bad_tags": the tags are not there once each, in this order, with nothing but white space around them. "bad_json":
    the answer is no JSON object, an id of `ids` is missing, another one or one twice is there, or a score is no number
    in [0, highest] (a text, true, NaN). Brackets around an id do not count: ``"[3]"`` is 3.
    """
    if not _TAGS.score(Sample(0, None, text, {})):
        return ParsedScores(BAD_TAGS, None)
    try:
        pairs = json.loads(find_answer(text, "<answer>") or "", object_pairs_hook=tuple)
        found = {bare(name): value for name, value in pairs}
        scores = [found[bare(name)] for name in ids]
    except (ValueError, TypeError, KeyError, RecursionError):  # an array may not unpack
        return ParsedScores(BAD_JSON, None)
    whole = isinstance(pairs, tuple) and len(found) == len(pairs) == len(scores)
    if not (whole and all(type(score) in (int, float) and 0 <= score <= highest for score in scores)):
        return ParsedScores(BAD_JSON, None)
    return ParsedScores(OK, np.array(scores, dtype=np.float64))


def format_answer(scores: Sequence[float], ids: Sequence[Any] | None = None, reason: str = "") -> str:
    """The answer that `parse_scores` reads back: scores (c,) of the documents `ids` (default "1" to "c").

    It is the target of supervised fine-tuning. Whole numbers are written without a decimal point.
    """
    names = range(1, len(scores) + 1) if ids is None else ids
    numbers = [int(score) if float(score).is_integer() else float(score) for score in scores]
    answer = json.dumps({str(name): number for name, number in zip(names, numbers, strict=True)})
    return f"<reason>{reason}</reason><answer>{answer}</answer>"


def bare(name: Any) -> str:
    """An id without white space and brackets around it."""
    return str(name).strip().removeprefix("[").removesuffix("]").strip()
