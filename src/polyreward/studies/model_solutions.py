"""Best-of-N among real model solutions of GSM8K: what a learned verifier adds to picking at random and to a vote.

Each question comes with four solutions, two each of a 6B and a 175B model, and whether they are right. Verifiers learn
on one half of the questions and choose on the other. A return is ``H - words`` for a right solution, H = 128, else 0.
"""

from __future__ import annotations

import functools
import gzip
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from polyreward.audit.anti_concentration import anti_concentration, heterogeneity
from polyreward.rewards.answers import find_answer, numbers_in, parse_number
from polyreward.rewards.best_of_n import BestOfN
from polyreward.rewards.contract import Sample
from polyreward.rewards.learned_verifier import VerifierFit

FILE = ("math", "gsm8k_model_solutions.jsonl.gz")
SOURCES = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
WORDS, KAPPA = 128, 0.5

_CALCULATION = re.compile(r"<<([-+*/().\d\s]+)=([-\d.,]+)>>")
_FACTOR = re.compile(r"\d+(?:\.\d+)?|\.\d+|[-+*/()]")


def select_solutions(data: Path | None, seed: int, quick: bool = False) -> dict[str, dict[str, float]]:
    """Figures of one split; empty without the file."""
    path = None if data is None else Path(data).joinpath(*FILE)
    if path is None or not path.exists():
        return {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        questions = [json.loads(line) for line in lines]
    rng = np.random.default_rng([seed, 9])
    order = rng.permutation(len(questions))[: 200 if quick else None]
    train, test = np.array_split(order, 2)
    rows = Rows([questions[q] for q in train], rng), Rows([questions[q] for q in test], rng)
    figures = {"GSM8K selection": _selection(*rows)}
    for size in ("6b", "175b"):
        pairs = [[entry[f"{size}_{kind}"] for kind in ("finetuning", "verification")] for entry in questions]
        right = np.array([[s["is_correct"] for s in pair] for pair in pairs], dtype=np.float64)
        words = np.array([[len(s["solution"].split()) for s in pair] for pair in pairs])
        returns = right * np.clip(WORDS - words, 0, None)
        variance = heterogeneity(returns)
        figures[f"GSM8K, {size}"] = {
            "right": float(right.mean()),
            "mean return": float(returns.mean()),
            "deviation within questions, mean": float(np.sqrt(variance).mean()),
            "deviation within questions, median": float(np.sqrt(np.median(variance))),
            "deviation over all": float(returns.std()),
            "questions with spread": float((variance > 0).mean()),
            # Two returns that differ always have one above the mean by a whole deviation: one half wherever there is
            # spread, one where there is none. Spread over questions is the informative figure.
            "c(.5) where there is spread": float(anti_concentration(returns[variance > 0], KAPPA)),
            "c(.5) over all": float(anti_concentration(returns.ravel(), KAPPA)),
        }
    return figures


class Rows:
    """Four rows a question, in random order."""

    def __init__(self, questions: list[dict[str, Any]], rng: np.random.Generator) -> None:
        cells = [(i, q, SOURCES[s]) for i, q in enumerate(questions) for s in rng.permutation(len(SOURCES))]
        self.group = [i for i, _, _ in cells]
        self.prompts = [q["question"] for _, q, _ in cells]
        self.source = [source for _, _, source in cells]
        self.texts = [q[source]["solution"] for _, q, source in cells]
        self.right = np.array([q[source]["is_correct"] for _, q, source in cells], dtype=np.float64)
        answers = [answer_of(text) for text in self.texts]
        votes = Counter(zip(self.group, answers, strict=True))
        self.votes = np.array([votes[i, a] if a is not None else 0 for i, a in zip(self.group, answers, strict=True)])
        self.features = np.array([features_of(q, t) for q, t in zip(self.prompts, self.texts, strict=True)])


def _selection(train: Rows, test: Rows) -> dict[str, float]:
    """Share of right solutions under every way to choose, on the test half."""
    right = test.right.reshape(-1, len(SOURCES))
    votes = test.votes.reshape(right.shape)
    most = votes == votes.max(axis=1, keepdims=True)
    figures = {
        "random": float(right.mean()),
        "majority vote": float(((right * most).sum(axis=1) / most.sum(axis=1)).mean()),  # ties drawn alike
        "any right": float(right.max(axis=1).mean()),
        "largest source alone": float(test.right[np.array(test.source) == SOURCES[-1]].mean()),
    }
    both = tuple(np.column_stack([rows.features, rows.votes]) for rows in (train, test))
    for loss in ("squared", "zero_one"):
        text = VerifierFit(loss).fit(train.features, train.right)  # type: ignore[arg-type]
        figures[f"verifier of text, {loss}"] = _chosen(text.as_reward(_text_features), test)
    figures["verifier of text and votes"] = _chosen(
        VerifierFit().fit(both[0], train.right).as_reward(_text_and_votes), test, votes=test.votes.tolist()
    )
    table = VerifierFit().fit(train.source, train.right)
    figures["verifier of the source"] = _chosen(table.as_reward(_source), test, source=test.source)
    return figures


def _chosen(reward: Any, rows: Rows, **columns: Any) -> float:
    picked = BestOfN(reward).select(rows.prompts, rows.texts, group=rows.group, **columns)
    return float(rows.right[picked.rows].mean())


def _text_features(sample: Sample) -> tuple[float, ...]:
    return features_of(sample.prompt, sample.text)


def _text_and_votes(sample: Sample) -> list[float]:
    return [*features_of(sample.prompt, sample.text), float(sample.columns["votes"])]


def _source(sample: Sample) -> str:
    return str(sample.columns["source"])


def answer_of(solution: str) -> float | None:
    """The number after the last ``A:``; None where there is none."""
    _, mark, rest = solution.rpartition("A:")
    found = find_answer(rest, "last_number") if mark else None
    return None if found is None else parse_number(found)


@functools.cache  # every verifier of a split reads the same texts
def features_of(question: str, solution: str) -> tuple[float, ...]:
    """What a solution looks like, 9 numbers: lengths, calculations, and how question and answer hang together."""
    calculations = _CALCULATION.findall(solution)
    right = [checks(term, result) for term, result in calculations]
    answer, given = answer_of(solution), [parse_number(n) for n in numbers_in(question)]
    used = {parse_number(n) for n in numbers_in(solution)}
    last = parse_number(calculations[-1][1]) if calculations else None
    return (
        math.log1p(len(solution.split())),
        float(len(solution.splitlines())),
        float(len(calculations)),
        float(np.mean(right)) if right else 0.0,
        float(answer is None),
        0.0 if answer is None else math.log1p(abs(answer)),
        0.0 if answer is None else float(answer == round(answer) and answer >= 0),
        float(answer is not None and answer == last),
        float(np.mean([n in used for n in given])) if given else 1.0,
    )


def checks(term: str, result: str) -> bool:
    """Whether a calculation of numbers, ``+ - * /`` and parentheses is right to one in a thousand."""
    value, stated = _value(_FACTOR.findall(term)), parse_number(result)
    return value is not None and stated is not None and abs(value - stated) <= 1e-3 * max(1.0, abs(stated))


def _value(symbols: list[str]) -> float | None:
    """Value of an expression by precedence climbing; None where it has none."""
    at = 0

    def factor() -> float:
        nonlocal at
        symbol = symbols[at]
        at += 1
        if symbol in "+-":
            return -factor() if symbol == "-" else factor()
        if symbol == "(":
            inner = total()
            if symbols[at] != ")":
                raise ValueError
            at += 1
            return inner
        return float(symbol)

    def product() -> float:
        nonlocal at
        value = factor()
        while at < len(symbols) and symbols[at] in "*/":
            operator, at = symbols[at], at + 1
            other = factor()
            value = value * other if operator == "*" else value / other
        return value

    def total() -> float:
        nonlocal at
        value = product()
        while at < len(symbols) and symbols[at] in "+-":
            operator, at = symbols[at], at + 1
            other = product()
            value = value + other if operator == "+" else value - other
        return value

    try:
        value = total()
    except (IndexError, ValueError, ZeroDivisionError, OverflowError, RecursionError):
        return None
    return value if at == len(symbols) and math.isfinite(value) else None
