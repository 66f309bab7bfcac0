"""Groups without signal: all samples have the same total reward, so every advantage is 0 and the rollouts are wasted.

Reported overall, by task, and for the first and last third of the steps. A task is warned about when more than half of
its groups have no signal, or when that comes about over the steps: in the last third, more than half, and at least
a quarter more than in the first. Groups at the highest reward of their task do not count for the latter: they are
solved. DUMP (arXiv 2504.09710) moves sampling to tasks with signal; dynamic filtering draws other prompts instead.
"""

from __future__ import annotations

import numpy as np

from polyreward.audit.diagnose.estimates import Estimate, ratio
from polyreward.audit.diagnose.evidence import Evidence
from polyreward.audit.diagnose.findings import CheckResult, Finding, Table, Tested

MANY = 0.5
NULL = 0.45
MOST = 0.85
RISE = 0.25
WORTH_A_NOTE = 0.05


def check_dead_groups(evidence: Evidence) -> CheckResult:
    """Share of groups without signal, by task and over the steps."""
    what = "groups without signal"
    real = evidence.sizes > 1
    if not real.any():
        return CheckResult(not_checked={what: "every group has one sample, so none can have a signal"})
    codes, tasks = evidence.tasks or (np.zeros(evidence.groups, dtype=np.int64), ["all"])
    dead = ~evidence.alive & real
    level = evidence.sum(evidence.values @ evidence.weights) / evidence.sizes
    whole = _share(evidence, dead, real)
    rows = [_row(evidence, "all", real, dead, whole.value)]
    tests = []
    for t, task in enumerate(tasks):
        here = real & (codes == t)
        if not here.any():
            continue
        share = _share(evidence, dead, here)
        if len(tasks) > 1:
            rows.append(_row(evidence, task, here, dead, share.value))
        over_time = _over_time(evidence, dead, here)
        cause = _cause(level, here & dead, here & ~dead)
        tests.append(Tested(_above(share), _finding(task, share, over_time, cause, evidence.tasks is not None)))
        late = _late(evidence, dead & ~_solved(evidence, level, here), here)
        if late is not None and share.value <= MANY:
            p, share = late
            tests.append(Tested(p, _finding(task, share, over_time, cause, evidence.tasks is not None, late=True)))
    headers = ("task", "groups", "without signal", "first third", "last third")
    tables = {what: Table("Groups without signal", headers, tuple(rows))}
    reason = {} if evidence.thirds else {f"{what} over time": "no column 'step' with at least six distinct steps"}
    return CheckResult(tests, [_note(whole)] if whole.value > WORTH_A_NOTE else [], tables, reason)


def _share(evidence: Evidence, dead: np.ndarray, within: np.ndarray) -> Estimate:
    return evidence.estimate(np.stack([dead, np.ones(len(dead))], 1).astype(float), ratio(), within)


def _above(share: Estimate) -> float:
    """Exact when every group is dead, where the jackknife has no error to estimate."""
    if share.value == 1.0:
        return float(NULL ** (share.freedom + 1))
    return share.above(MANY, NULL)


def _late(evidence: Evidence, dead: np.ndarray, within: np.ndarray) -> tuple[float, Estimate] | None:
    """p-value and share of the last third, where the groups without signal became many over the steps."""
    if evidence.thirds is None:
        return None
    first, last = evidence.thirds
    late = _share(evidence, dead, within & last)
    both = np.stack([dead & last, last, dead & first, first], 1).astype(float)
    rise = evidence.estimate(both, lambda s: s[..., 0] / s[..., 1] - s[..., 2] / s[..., 3], within & (first | last))
    return max(_above(late), rise.above(RISE, RISE / 2)), late


def _solved(evidence: Evidence, level: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Groups whose mean is the highest sum that any sample of the task has."""
    best = evidence.values[within[evidence.group]] @ evidence.weights
    return within & (level >= best.max() - 1e-6 * evidence.magnitude)


def _over_time(evidence: Evidence, dead: np.ndarray, within: np.ndarray) -> str:
    if evidence.thirds is None:
        return ""
    first, last = (dead[within & part] for part in evidence.thirds)
    if not len(first) or not len(last):
        return ""
    return f", from {first.mean():.0%} in the first third of the steps to {last.mean():.0%} in the last"


def _cause(level: np.ndarray, dead: np.ndarray, alive: np.ndarray) -> str:
    if not dead.any() or not alive.any():
        return ""
    high = float((level[dead] > np.median(level[alive])).mean())
    return f" {high:.0%} of them lie above the usual reward (solved), {1 - high:.0%} below (out of reach)."


def _note(whole: Estimate) -> Finding:
    low, high = whole.interval
    return Finding(
        "groups without signal", "info", "all", whole.value, (low, high),
        f"{whole.value:.0%} of the groups have no signal (95 % interval {low:.0%} to {high:.0%}).",
    )  # fmt: skip


def _finding(task: str, share: Estimate, over_time: str, cause: str, named: bool, late: bool = False) -> Finding:
    low, high = share.interval
    where = (f" of task {task!r}" if named else "") + (" in the last third of the steps" if late else "")
    return Finding(
        "groups without signal", "error" if low > MOST else "warning", task, share.value, (low, high),
        f"{share.value:.0%} of the groups{where} have no signal (95 % interval {max(low, 0):.0%} to {min(high, 1):.0%})"
        f"{over_time}: all samples of the group get the same reward, so these rollouts are wasted.{cause}",
        "dump",
    )  # fmt: skip


def _row(evidence: Evidence, task: str, within: np.ndarray, dead: np.ndarray, share: float) -> tuple[object, ...]:
    thirds = evidence.thirds or (np.zeros_like(dead), np.zeros_like(dead))
    parts = [dead[within & part] for part in thirds]
    return (task, int(within.sum()), share, *(float(part.mean()) if len(part) else None for part in parts))
