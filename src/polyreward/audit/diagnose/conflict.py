"""Conflict between rewards: do two rewards prefer opposite samples of the same group?

The figure is Spearman's rank correlation inside groups, pooled over groups: ranks are taken inside each group, centred,
and their products summed. Differences between prompts therefore play no role.
"""

from __future__ import annotations

import itertools

import numpy as np

from polyreward.audit.diagnose.estimates import Estimate
from polyreward.audit.diagnose.evidence import Evidence
from polyreward.audit.diagnose.findings import CheckResult, Finding, Table, Tested

CONFLICT = -0.2
SEVERE = -0.6


def check_conflict(evidence: Evidence) -> CheckResult:
    """Pooled rank correlation of each pair of rewards; a warning where it is below -0.2."""
    used = np.flatnonzero(evidence.weights)
    if len(used) < 2:
        return CheckResult(not_checked={"conflict between rewards": "fewer than two rewards with a weight"})
    ranks = {
        int(k): evidence.reward_ranks(int(k))
        if evidence.valid[:, k].all()
        else masked_ranks(evidence, evidence.values[:, k], evidence.valid[:, k])
        for k in used
    }
    tests, rows = [], []
    for a, b in itertools.combinations(ranks, 2):
        joint = evidence.valid[:, a] & evidence.valid[:, b]
        if joint.all():
            first, second = ranks[a], ranks[b]
        else:
            first, second = (masked_ranks(evidence, evidence.values[:, k], joint) for k in (a, b))
        estimate = correlation(evidence, first, second, evidence.weights[a] * evidence.weights[b])
        if not np.isfinite(estimate.value):
            continue
        names = evidence.names[a], evidence.names[b]
        rows.append((*names, estimate.value, *estimate.interval))
        tests.append(Tested(estimate.below(CONFLICT, CONFLICT / 2), _finding(names, estimate)))
    table = Table(
        "Rank correlation inside groups", ("reward", "other reward", "correlation", "low", "high"), tuple(rows)
    )
    return CheckResult(tests, (), {"conflict": table})


def masked_ranks(evidence: Evidence, values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Centred ranks inside groups among the valid rows, 0 elsewhere."""
    if valid.all():
        return evidence.ranks(values)
    # what does not apply goes to the end of its group, where it moves no other rank
    ranks = evidence.ranks(np.where(valid, values, np.inf))
    return evidence.center(ranks, valid)


def correlation(evidence: Evidence, first: np.ndarray, second: np.ndarray, sign: float = 1.0) -> Estimate:
    """Pooled correlation inside groups of two centred columns, its sign turned if `sign` is negative."""
    statistics = np.stack(
        [evidence.sum(first * second) * np.sign(sign), evidence.sum(first**2), evidence.sum(second**2)], 1
    )
    return evidence.estimate(statistics, lambda s: s[..., 0] / np.sqrt(s[..., 1] * s[..., 2]))


def _finding(names: tuple[str, str], estimate: Estimate) -> Finding:
    low, high = estimate.interval
    return Finding(
        "conflict", "error" if high < SEVERE else "warning", f"{names[0]} / {names[1]}", estimate.value, (low, high),
        f"{names[0]!r} and {names[1]!r} pull against each other: inside a group their rank correlation is "
        f"{estimate.value:.2f} (95 % interval {low:.2f} to {high:.2f}), so the weighted sum cancels part of both.",
        "gate",
    )  # fmt: skip
