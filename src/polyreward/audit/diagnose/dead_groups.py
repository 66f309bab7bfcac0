"""Groups without signal: all samples have the same total reward, so every advantage is 0 and the rollouts teach
nothing.

Reported overall, by task, and for the first and last third of the steps. DUMP (arXiv 2504.09710) moves sampling to
tasks
with signal; dynamic filtering draws other prompts instead.
"""

from __future__ import annotations

import numpy as np

from polyreward.audit.diagnose.evidence import Estimate, Evidence, ratio
from polyreward.audit.diagnose.findings import CheckResult, Finding, Table, Tested

MANY = 0.5
MOST = 0.85


def check_dead_groups(evidence: Evidence) -> CheckResult:
    """Share of groups without signal; a warning for a task (or the log) where it is above one half."""
    real = evidence.sizes > 1
    if not real.any():
        return CheckResult(
            not_checked={"groups without signal": "every group has one sample, so none can have a signal"}
        )
    dead = np.stack([(~evidence.alive & real).astype(float), real.astype(float)], 1)
    whole = evidence.estimate(dead, ratio(), real)
    codes, tasks = evidence.tasks if evidence.tasks else (np.zeros(evidence.groups, dtype=np.int64), ["all"])
    shares = [evidence.estimate(dead, ratio(), real & (codes == t)) for t in range(len(tasks))]
    first, last = evidence.thirds or (None, None)
    level = evidence.sum(evidence.values @ evidence.weights) / evidence.sizes
    rows = [_row(evidence, "all", np.ones_like(codes, dtype=bool), whole, dead, first, last)]
    if len(tasks) > 1:
        rows += [_row(evidence, task, codes == t, shares[t], dead, first, last) for t, task in enumerate(tasks)]
    headers = ("task", "groups", "without signal", "first third", "last third")
    notes = [
        Finding(
            "groups without signal", "info", "all", whole.value, whole.interval,
            f"{whole.value:.0%} of the groups have no signal (95 % interval {whole.interval[0]:.0%} to "
            f"{whole.interval[1]:.0%}).",
        )
    ] if whole.value > 0.05 else []  # fmt: skip
    tests = []
    for t, task in enumerate(tasks):
        over_time = _over_time(dead, first, last, real & (codes == t))
        at = real & (codes == t) & ~evidence.alive
        cause = _cause(level, at, real & (codes == t) & evidence.alive)
        tests.append(
            Tested(_above(shares[t], MANY), _finding(task, shares[t], over_time, cause, evidence.tasks is not None))
        )
    reason = {}
    if first is None:
        reason["groups without signal over time"] = "no column 'step' with at least six distinct steps"
    return CheckResult(
        tests, notes, {"groups without signal": Table("Groups without signal", headers, tuple(rows))}, reason
    )


def _above(share: Estimate, threshold: float) -> float:
    """Exact when every group is dead, where the jackknife has no error to estimate."""
    if share.value == 1.0:
        return threshold ** (share.freedom + 1)
    return share.above(threshold)


def _over_time(dead: np.ndarray, first: np.ndarray | None, last: np.ndarray | None, within: np.ndarray) -> str:
    if first is None or last is None:
        return ""
    early, late = (_share(dead, part & within) for part in (first, last))
    return (
        ""
        if early is None or late is None
        else f", from {early:.0%} in the first third of the steps to {late:.0%} in the last"
    )


def _share(dead: np.ndarray, within: np.ndarray) -> float | None:
    sums = dead[within].sum(axis=0)
    return float(sums[0] / sums[1]) if sums[1] > 0 else None


def _cause(level: np.ndarray, dead: np.ndarray, alive: np.ndarray) -> str:
    if not dead.any() or not alive.any():
        return ""
    high = float((level[dead] > np.median(level[alive])).mean())
    return f" {high:.0%} of them are above the usual reward (solved), {1 - high:.0%} below (out of reach)."


def _finding(task: str, share: Estimate, over_time: str, cause: str, named: bool) -> Finding:
    low, high = share.interval
    where = f" of task {task!r}" if named else ""
    return Finding(
        "groups without signal", "error" if low > MOST else "warning", task, share.value, (low, high),
        f"{share.value:.0%} of the groups{where} have no signal (95 % interval {low:.0%} to {high:.0%}){over_time}: "
        f"all samples of "
        f"the group get the same reward, so these rollouts are wasted.{cause}",
        "dump",
    )  # fmt: skip


def _row(
    evidence: Evidence,
    task: str,
    within: np.ndarray,
    share: Estimate,
    dead: np.ndarray,
    first: np.ndarray | None,
    last: np.ndarray | None,
) -> tuple[object, ...]:
    early = None if first is None else _share(dead, first & within)
    late = None if last is None else _share(dead, last & within)
    return (task, int(within.sum()), share.value, early, late)
