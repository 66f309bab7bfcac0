"""Which reward drives the advantages: each reward's share of the advantage variance.

With the weighted, group-centred rewards ``c_k`` and their sum ``c``, GRPO's advantage is ``c / deviation of the
group``.
Its variance splits exactly into ``cov(c_k, c) / var(c)``, averaged over the groups with signal; the shares add up to
1 and
one is negative where a reward pulls against the sum. A reward is *drowned out* when it tells samples of most groups
apart
and yet holds next to no share, and the advantages do not follow it either (a reward that agrees with the driving one is
redundant, not drowned).
"""

from __future__ import annotations

import numpy as np

from polyreward.audit.diagnose.evidence import Estimate, Evidence, ratio
from polyreward.audit.diagnose.findings import CheckResult, Finding, Table, Tested

DROWNED_SHARE = 0.02
DROWNED_CORRELATION = 0.2
VARIES_IN = 0.25


def check_driver(evidence: Evidence) -> CheckResult:
    """Shares overall and per task; rewards that are drowned out, and rewards that never vary."""
    names, active = evidence.names, evidence.weights != 0
    alive, sizes = evidence.alive, evidence.sizes
    if not alive.any():
        return CheckResult(not_checked={"which reward drives the advantages": "no group has a signal"})
    energy = np.where(alive, evidence.energy, 1.0)
    scale = np.where(alive, sizes / energy, 0.0)
    parts = (
        evidence.sum(evidence.centred * evidence.total[:, None]) * scale[:, None]
    )  # (groups, K), adds up to the size
    own = evidence.sum(evidence.centred**2) * scale[:, None]
    varies = own > 1e-12
    weight = np.where(alive, sizes, 0.0)
    shares = [evidence.estimate(np.stack([parts[:, k], weight], 1), ratio()) for k in range(len(names))]
    agreement = [
        evidence.estimate(
            np.stack([parts[:, k], weight, own[:, k]], 1), lambda s: s[..., 0] / np.sqrt(s[..., 1] * s[..., 2])
        )
        for k in range(len(names))
    ]
    tables = {"shares": _share_table(evidence, shares, varies, alive)}
    tests: list[Tested] = []
    notes: list[Finding] = []
    if len(names) > 1:
        leader = int(np.argmax([share.value for share in shares]))
        low, high = shares[leader].interval
        notes.append(
            Finding(
                "driver", "info", names[leader], shares[leader].value, (low, high),
                f"{names[leader]!r} drives the advantages: it holds {shares[leader].value:.0%} of their variance "
                f"(95 % interval {low:.0%} to {high:.0%}).",
            )
        )  # fmt: skip
    for k, name in enumerate(names):
        often = float(varies[:, k][alive].mean())
        if not (np.abs(evidence.centred[:, k]) > 1e-12 * evidence.magnitude).any():
            if active[k]:
                notes.append(_constant(name))
            continue
        if len(names) == 1 or not active[k] or often < VARIES_IN:
            continue
        p = max(
            shares[k].below(DROWNED_SHARE),
            shares[k].above(-DROWNED_SHARE),
            _toward_zero(agreement[k], DROWNED_CORRELATION),
        )
        tests.append(Tested(p, _drowned(name, shares[k], often)))
    if evidence.tasks is not None and len(names) > 1:
        tables["shares per task"] = _task_table(evidence, parts, weight)
    return CheckResult(tests, notes, tables)


def _toward_zero(estimate: Estimate, bound: float) -> float:
    return max(estimate.below(bound), estimate.above(-bound))


def _drowned(name: str, share: Estimate, often: float) -> Finding:
    low, high = share.interval
    return Finding(
        "drowned", "warning", name, share.value, (low, high),
        f"{name!r} is drowned out: it tells samples apart in {often:.0%} of the groups with a signal, yet holds only "
        f"{share.value:.1%} of the advantage variance (95 % interval {low:.1%} to {high:.1%}). Its scale or weight "
        f"is too "
        "small beside the others.",
        "gdpo",
    )  # fmt: skip


def _constant(name: str) -> Finding:
    return Finding(
        "constant reward", "info", name, 0.0, (0.0, 0.0),
        f"{name!r} never differs inside a group, so it has no influence on the advantages.",
    )  # fmt: skip


def _share_table(evidence: Evidence, shares: list[Estimate], varies: np.ndarray, alive: np.ndarray) -> Table:
    rows = tuple(
        (name, float(evidence.weights[k]), shares[k].value, *shares[k].interval, float(varies[:, k][alive].mean()))
        for k, name in enumerate(evidence.names)
    )
    headers = ("reward", "weight", "share of advantage variance", "low", "high", "groups where it varies")
    return Table("Share of the advantage variance", headers, rows)


def _task_table(evidence: Evidence, parts: np.ndarray, weight: np.ndarray) -> Table:
    assert evidence.tasks is not None
    codes, tasks = evidence.tasks
    total = np.maximum(np.bincount(codes, weight, len(tasks)), 1e-300)
    shares = np.stack([np.bincount(codes, column, len(tasks)) / total for column in parts.T], 1)
    rows = tuple((task, *(float(share) for share in shares[t])) for t, task in enumerate(tasks))
    return Table("Share of the advantage variance, by task", ("task", *evidence.names), rows)
