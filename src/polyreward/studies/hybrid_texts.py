"""The text panels of the hybrid study: best of eight by each reward, and real model solutions of GSM8K.

The candidates are generated with their exact worth (`polyreward.tasks.templated_answers`); the surrogate is the cosine
of hashed words and their pairs. GSM8K brings four solutions a question, two each of a 6B and a 175B model, and whether
they are right.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyreward.rewards.contract import RewardFunction, values_of
from polyreward.rewards.embedders import HashingEmbedder, LatentEmbedder
from polyreward.rewards.embedding_similarity import EmbeddingSurrogateReward, unrelated_threshold
from polyreward.rewards.group_length import GroupLengthPenalty
from polyreward.rewards.hybrid import ConfidentRule, HybridReward
from polyreward.rewards.verifiers import NumericAnswer
from polyreward.tasks.templated_answers import draw_answers

FILE = ("math", "gsm8k_model_solutions.jsonl.gz")
SOURCES = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
PARTS = 10


def brevity(prompts: Any, completions: Sequence[str], **columns: Any) -> list[float]:
    """A weakly right model that loves brevity: ``sigmoid(1.2 (worth - .5) - .1 (words - 20) + noise)``."""
    words = np.array([len(text.split()) for text in completions])
    logits = 1.2 * (np.array(columns["worth"]) - 0.5) - 0.1 * (words - 20) + np.array(columns["noise"])
    return (1 / (1 + np.exp(-logits))).tolist()


def rule_alone(prompts: Any, completions: Sequence[str], **columns: Any) -> list[float]:
    """The verifier, and 0 where it does not apply."""
    values = values_of(NumericAnswer(), prompts, completions, columns)
    return np.nan_to_num(values).tolist()


def best_of_eight(seed: int, questions: int) -> dict[str, dict[str, float]]:
    """Mean true worth of the candidate that each reward would choose, on word problems and on descriptions."""
    rng = np.random.default_rng([seed, 5])
    rows = draw_answers(rng, questions)
    surrogate = EmbeddingSurrogateReward(HashingEmbedder(), column="reference")
    rule = ConfidentRule(NumericAnswer())
    rewards: dict[str, RewardFunction] = {
        "reward model": brevity,
        "rule": rule_alone,
        "surrogate": surrogate,
        "hybrid": HybridReward(rule, surrogate),
        "hybrid, fallback model": HybridReward(rule, surrogate, fallback="model"),
        "hybrid, reward model": HybridReward(rule, brevity),
    }
    columns = {"answer": rows.answers, "reference": rows.references, "type": rows.types, "worth": rows.worth.tolist()}
    noise = (0.8 * rng.normal(size=len(rows.worth))).tolist()
    figures = {}
    verifiable = np.array(rows.types) == "verifiable"
    for name, reward in rewards.items():
        scores = values_of(reward, rows.prompts, rows.completions, {**columns, "noise": noise})
        chosen = choose(scores, rows.worth, rows.groups)
        half = len(chosen) // 2
        figures[f"best of 8, {name}"] = {"word problems": chosen[:half].mean(), "descriptions": chosen[half:].mean()}
    everyone = {"word problems": rows.worth[verifiable].mean(), "descriptions": rows.worth[~verifiable].mean()}
    return figures | {"best of 8, random": everyone}


def choose(scores: np.ndarray, worth: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Worth of the best-scored candidate of each group, float64 (groups,); the mean of those that tie."""
    table, value = (column.reshape(groups.max() + 1, -1) for column in (scores, worth))
    best = table == table.max(axis=1, keepdims=True)
    return np.asarray((value * best).sum(axis=1) / best.sum(axis=1))


@functools.cache
def solutions(path: Path) -> list[Mapping[str, Any]]:
    """The entries of the file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@functools.cache
def _embedder(path: Path) -> LatentEmbedder:
    return LatentEmbedder([entry["ground_truth"] for entry in solutions(path)], 64)


def gsm8k(data: Path | None, seed: int, quick: bool = False) -> dict[str, dict[str, float]]:
    """Rule, surrogate and length penalty on one tenth of the questions; empty without the file."""
    path = None if data is None else Path(data).joinpath(*FILE)
    if path is None or not path.exists():
        return {}
    entries = solutions(path)[seed % PARTS :: PARTS][: 40 if quick else None]
    cells = [(number, entry, entry[source]) for number, entry in enumerate(entries) for source in SOURCES]
    groups = np.array([number for number, _, _ in cells])
    right = np.array([solution["is_correct"] for _, _, solution in cells], dtype=np.float64)
    texts = [solution["solution"] for _, _, solution in cells]
    columns = {
        "answer": [entry["ground_truth"].rpartition("A:")[2] for _, entry, _ in cells],
        "reference": [entry["ground_truth"] for _, entry, _ in cells],
        "type": ["verifiable"] * len(cells),
    }
    prompts = [entry["question"] for _, entry, _ in cells]
    embed = _embedder(path)
    rule, surrogate = NumericAnswer(), EmbeddingSurrogateReward(embed, column="reference")
    scores = {
        "rule": values_of(rule, prompts, texts, columns),
        "surrogate": values_of(surrogate, prompts, texts, columns),
        "hybrid": values_of(HybridReward(ConfidentRule(rule), surrogate, "type", "model"), prompts, texts, columns),
        "shortest": -np.array([float(len(text.split())) for text in texts]),
    }
    words = -scores["shortest"]
    penalty = GroupLengthPenalty()(scores["rule"], words, groups)
    unrelated = unrelated_threshold(embed, [entry["ground_truth"] for entry in entries], 0.99)
    wrong, mixed = right == 0, np.array([0 < right[groups == g].mean() < 1 for g in range(len(entries))])
    chosen = {f"best of 4, {name}": float(choose(values, right, groups).mean()) for name, values in scores.items()}
    return {
        "GSM8K": {
            "right": float(right.mean()),
            "any right": float(right.reshape(-1, len(SOURCES)).max(axis=1).mean()),
            "rule agrees": float((scores["rule"] == right).mean()),
            **chosen,
            "wrong with similarity above 0.5": float((scores["surrogate"][wrong] >= 0.5).mean()),
            "threshold of unrelated": unrelated,
            "wrong above that threshold": float((scores["surrogate"][wrong] >= unrelated).mean()),
            "words, right": float(words[~wrong & mixed[groups]].mean()),
            "words, wrong": float(words[wrong & mixed[groups]].mean()),
            "wrong with a length penalty": float((penalty[wrong & mixed[groups]] < 0).mean()),
        }
    }
