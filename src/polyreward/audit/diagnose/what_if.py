"""The what-if: how the update changes with the transform that answers all findings.

Advantages before and after are computed step by step, as training does, on up to 100,000 rollouts of evenly spaced
steps, and compared by reward, task and stratum.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polyreward.advantages.presets import grpo
from polyreward.advantages.transform import Transform, compute_advantages
from polyreward.audit.diagnose.collapse import TOLERANCE, fingerprint, same_pairs
from polyreward.audit.diagnose.evidence import Evidence
from polyreward.audit.diagnose.findings import Finding, Table
from polyreward.audit.diagnose.suggestion import suggest
from polyreward.batch import RewardBatch

ROWS = 100_000


@dataclass(frozen=True)
class WhatIf:
    """How the update changes with the suggested parts.

    Attributes
    ----------
    code : str
        Python that builds the suggested transform.
    recipe : str
        Lines of a recipe (TOML) for `polyreward train`.
    rollouts, steps : int
        On how much of the log the advantages were computed again.
    cosine : float
        Between the advantages before and after, -1 to 1.
    sign_flips : float
        Share of samples (with an advantage before and after) whose advantage changes sign.
    lost : (now, suggested)
        Share of the pairs of a group that the rewards tell apart and that get the same advantage.
    tables : mapping of name to Table
        Shares of the squared advantages by task and stratum, mean advantage by stratum, correlation with each reward.
    """

    code: str
    recipe: str
    rollouts: int
    steps: int
    cosine: float
    sign_flips: float
    lost: tuple[float, float]
    tables: Mapping[str, Table]


def what_if(evidence: Evidence, findings: Sequence[Finding], transform: Transform | None = None) -> WhatIf | None:
    """Advantages before and after the suggested chain, compared by task, stratum and reward."""
    suggestion = suggest(findings, evidence)
    if suggestion is None:
        return None
    # a copy: a transform with memory must not take in this log
    present = copy.deepcopy(transform) or grpo(dict(zip(evidence.names, evidence.weights.tolist(), strict=True)))
    columns = dict(evidence.batch.columns) if transform else {}
    for name in (evidence.task_name, evidence.stratum_name):
        labels = _labels(evidence, name)
        columns |= {} if labels is None else {name: labels}
    parts = _steps(evidence, columns)
    before = torch.cat([compute_advantages(present, part) for part in parts]).double().numpy()
    after = torch.cat([compute_advantages(suggestion.transform, part) for part in parts]).double().numpy()
    moved = (before != 0) & (after != 0)
    norm = float(np.linalg.norm(before) * np.linalg.norm(after))
    rewards = torch.cat([part.rewards for part in parts]).double().numpy()
    offset = np.cumsum([0, *(part.segments("group").count for part in parts[:-1])])
    groups = np.concatenate([p.segments("group").codes.numpy() + o for p, o in zip(parts, offset, strict=True)])
    tables = {"reward": _by_reward(evidence, rewards, groups, before, after)}
    for name, title in ((evidence.task_name, "task"), (evidence.stratum_name, "stratum")):
        if name in parts[0].columns:
            labels = np.concatenate([np.asarray(part.columns[name]).astype(str) for part in parts])
            tables[title] = _by_label(title, labels, before, after)
    return WhatIf(
        suggestion.code(),
        suggestion.recipe(),
        len(before),
        len(parts),
        float(before @ after / norm) if norm else 0.0,
        float((np.sign(before) != np.sign(after))[moved].mean()) if moved.any() else 0.0,
        (_lost(evidence, rewards, groups, before), _lost(evidence, rewards, groups, after)),
        tables,
    )


def _lost(evidence: Evidence, rewards: np.ndarray, groups: np.ndarray, advantages: np.ndarray) -> float:
    valid = ~np.isnan(rewards)
    by_vector, _ = same_pairs(groups, fingerprint(np.nan_to_num(rewards), valid, evidence.weights), 0.0)
    by_advantage, _ = same_pairs(groups, advantages, TOLERANCE * float(advantages.std()))
    told_apart = np.bincount(groups).astype(float) ** 2 - by_vector
    return float(np.clip(by_advantage - by_vector, 0, None).sum() / max(told_apart.sum(), 1.0))


def _steps(evidence: Evidence, columns: Mapping[str, Any]) -> list[RewardBatch]:
    """The log as one batch a step, in the order of `evidence`, thinned to whole groups of about `ROWS` rollouts."""
    batch = evidence.batch
    slim = RewardBatch(batch.rewards.detach().cpu(), batch.names, batch.segments("group"), columns)
    step = np.zeros(evidence.groups) if evidence.steps is None else evidence.steps
    distinct, code = np.unique(step, return_inverse=True)
    wanted = max(1, min(len(distinct), int(ROWS / max(len(batch) / len(distinct), 1))))
    chosen = np.unique(np.linspace(0, len(distinct) - 1, wanted).round().astype(int))
    parts = []
    for s in chosen:
        groups = np.flatnonzero(code == s)
        fits = np.cumsum(evidence.sizes[groups]) <= max(ROWS / len(chosen), evidence.sizes[groups[0]])
        first, sizes = evidence.starts[groups[fits]], evidence.sizes[groups[fits]].astype(int)
        rows = np.repeat(first - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        parts.append(_compact(slim.select(evidence.order[rows])))
    return parts


def _labels(evidence: Evidence, name: str) -> np.ndarray | None:
    """A column of ids in the order of the batch, with a label where it has no value."""
    ids = evidence.ids(name)
    if ids is None:
        return None
    labels = [ids.label(code) for code in range(ids.count)]
    numbers = all(isinstance(label, int | np.integer) for label in labels)
    table = np.array(labels if numbers else [str(label) for label in labels], dtype=np.int64 if numbers else object)
    column = np.empty(len(evidence.batch), dtype=table.dtype)
    codes = ids.codes.numpy()
    # a group has the task of its first sample, as in the checks
    column[evidence.order] = table[codes[evidence.starts][evidence.group] if name == evidence.task_name else codes]
    return column


def _compact(batch: RewardBatch) -> RewardBatch:
    """The same batch with dense group codes, so that a step does not carry the groups of the whole log."""
    codes = torch.unique(batch.segments("group").codes, return_inverse=True)[1]
    return RewardBatch(batch.rewards, batch.names, codes, batch.columns)


def _by_reward(
    evidence: Evidence, rewards: np.ndarray, groups: np.ndarray, before: np.ndarray, after: np.ndarray
) -> Table:
    count = np.maximum(np.bincount(groups), 1)
    rows = []
    for k, name in enumerate(evidence.names):
        values = np.nan_to_num(rewards[:, k])
        centred = values - (np.bincount(groups, values) / count)[groups]
        rows.append((name, _correlation(centred, before), _correlation(centred, after)))
    return Table(
        "How closely the advantages follow each reward (correlation inside groups)",
        ("reward", "now", "suggested"),
        tuple(rows),
    )


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second / norm) if norm > 0 else 0.0


def _by_label(title: str, labels: np.ndarray, before: np.ndarray, after: np.ndarray) -> Table:
    names, code = np.unique(labels, return_inverse=True)
    number = np.bincount(code, minlength=len(names))
    rows = []
    energy = [
        np.bincount(code, advantage**2, len(names)) / max(float((advantage**2).sum()), 1e-300)
        for advantage in (before, after)
    ]
    mean = [np.round(np.bincount(code, advantage, len(names)) / number, 6) + 0.0 for advantage in (before, after)]
    flips = np.bincount(code, before * after < 0, len(names)) / number
    for t, name in enumerate(names):
        figures = (number[t] / len(labels), energy[0][t], energy[1][t], mean[0][t], mean[1][t], flips[t])
        rows.append((str(name), *(float(figure) for figure in figures)))
    headers = (
        title,
        "share of rollouts",
        "share of update now",
        "suggested",
        "mean advantage now",
        "suggested ",
        "sign flips",
    )
    return Table(f"The update by {title} (share of squared advantages)", headers, tuple(rows))
