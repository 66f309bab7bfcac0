"""Which reward drives the advantages: each reward's share of the advantage variance.

With the weighted, group-centred rewards ``c_k`` and their sum ``c``, GRPO's advantage is ``c / deviation of the
group``. Its variance splits exactly into ``cov(c_k, c) / var(c)``, averaged over the groups with signal; the shares
add up to 1, and one is negative where a reward pulls against the sum.

A reward is *drowned out* when what it alone says is not heard in the groups in which the others vary too. Let ``e_k``
be the part of ``c_k`` that the sum of the others does not explain (least squares inside groups). The reward is
drowned when the share ``var(e_k) / var(c)`` is below 1 % because its deviation, weights aside, is less than a tenth
of the others' (root mean square). A reward that repeats the others (R^2 above 3/4) is redundant, and one that has
climbed to its ceiling is learned; neither is drowned.
"""

from __future__ import annotations

import numpy as np

from polyreward.audit.diagnose.estimates import Estimate, jackknife, ratio
from polyreward.audit.diagnose.evidence import Evidence
from polyreward.audit.diagnose.findings import CheckResult, Finding, Table, Tested
from polyreward.audit.diagnose.saturation import SATURATED, kept_spread

DROWNED = 0.01
QUIET = 1 / 10
"""Deviation relative to the others', below which a reward is quiet."""
OWN_PART = 0.25
VARIES_IN = 0.25


def check_driver(evidence: Evidence) -> CheckResult:
    """Shares overall and per task; rewards that are drowned out, and rewards that never vary."""
    names, active = evidence.names, evidence.weights != 0
    alive, sizes = evidence.alive, evidence.sizes
    if not alive.any():
        return CheckResult(not_checked={"which reward drives the advantages": "no group has a signal"})
    scale = np.where(alive, sizes / np.where(alive, evidence.energy, 1.0), 0.0)
    # (groups, K): adds up to the size of the group
    parts = evidence.sum(evidence.centred * evidence.total[:, None]) * scale[:, None]
    own = evidence.sum(evidence.centred**2) * scale[:, None]
    varies = own > 1e-12
    weight = np.where(alive, sizes, 0.0)
    shares = [evidence.estimate(np.stack([parts[:, k], weight], 1), ratio()) for k in range(len(names))]
    tables = {"shares": _share_table(evidence, shares, varies, alive)}
    notes = [_leader(names, shares)] if len(names) > 1 else []
    tests: list[Tested] = []
    for k, name in enumerate(names):
        if not active[k]:
            continue
        if not (np.abs(evidence.centred[:, k]) > 1e-12 * evidence.magnitude).any():
            notes.append(_constant(name))
            continue
        often = float(varies[:, k][alive].mean())
        kept = kept_spread(evidence, k)
        if active.sum() < 2 or often < VARIES_IN or (kept is not None and kept < SATURATED):
            continue
        test = _drowned_test(evidence, k, varies, often)
        if test is not None:
            tests.append(test)
    if evidence.tasks is not None and len(names) > 1:
        tables["shares per task"] = _task_table(evidence, parts, weight)
    return CheckResult(tests, notes, tables)


def _drowned_test(evidence: Evidence, k: int, varies: np.ndarray, often: float) -> Tested | None:
    """Test that the part of reward `k` that is its own holds next to nothing, where others vary too."""
    others = (evidence.weights != 0) & (np.arange(len(evidence.weights)) != k)
    contested = varies[:, k] & varies[:, others].any(axis=1)
    if contested.sum() < 2:
        return None
    mine = evidence.centred[:, k]
    rest = evidence.total - mine
    # spreads without the weights: a weight is meant, a scale often is not
    spreads = evidence.sum(((evidence.centred[:, others] / evidence.weights[others]) ** 2).sum(axis=1)) / others.sum()
    products = (evidence.sum(mine**2), evidence.sum(mine * rest), evidence.sum(rest**2), spreads, evidence.energy)
    # dividing by the variance of the group's sum makes groups count as they do in the advantages
    statistics = np.stack(products, 1)[contested] * (evidence.sizes[contested] / evidence.energy[contested])[:, None]

    def own(s: np.ndarray) -> np.ndarray:
        return s[..., 0] - s[..., 1] ** 2 / s[..., 2]

    block = None if evidence.block is None else evidence.block[contested]
    share = jackknife(statistics, lambda s: own(s) / s[..., 4], block)
    quiet = jackknife(statistics, lambda s: np.sqrt(s[..., 0] / s[..., 3]) / abs(evidence.weights[k]), block)
    total = statistics.sum(axis=0)
    if own(total) < OWN_PART * total[0]:
        return None
    p = max(share.below(DROWNED, 2 * DROWNED), quiet.below(QUIET, 1.5 * QUIET))
    return Tested(p, _drowned(evidence.names[k], share, quiet, often))


def _leader(names: tuple[str, ...], shares: list[Estimate]) -> Finding:
    leader = int(np.argmax([share.value for share in shares]))
    low, high = shares[leader].interval
    return Finding(
        "driver", "info", names[leader], shares[leader].value, (low, high),
        f"{names[leader]!r} drives the advantages: it holds {shares[leader].value:.0%} of their variance "
        f"(95 % interval {low:.0%} to {high:.0%}).",
    )  # fmt: skip


def _drowned(name: str, share: Estimate, quiet: Estimate, often: float) -> Finding:
    low, high = max(share.interval[0], 0.0), share.interval[1]
    return Finding(
        "drowned", "warning", name, share.value, (low, high),
        f"{name!r} is drowned out: it tells samples apart in {often:.0%} of the groups with a signal, yet where "
        f"other rewards vary too, what it alone says makes up {_percent(share.value)} of the advantage variance (95 "
        f"% interval {_percent(low)} to {_percent(high)}). Its spread times its weight is {1 / quiet.value:,.0f} "
        "times smaller than theirs.",
        "gdpo",
    )  # fmt: skip


def _percent(share: float) -> str:
    return f"{share:.2%}" if share >= 1e-4 or share == 0 else "under 0.01%"


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
    total = np.bincount(codes, weight, len(tasks))
    sums = np.stack([np.bincount(codes, column, len(tasks)) for column in parts.T], 1)
    rows = tuple(
        (task, *(float(part) / float(total[t]) if total[t] > 0 else None for part in sums[t]))
        for t, task in enumerate(tasks)
    )
    return Table("Share of the advantage variance, by task", ("task", *evidence.names), rows)
