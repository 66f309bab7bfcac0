"""Shape of the rewards by task: heavy tails, and skew that differs between tasks.

*Tail*: values are taken relative to the median of their task and stretch of steps, in robust deviations there (at least
half the largest of any stretch), because rewards move and narrow as training goes on. The figure is the share of the
squared values that samples beyond six of these deviations carry.

*Skew*: the third moment of the rewards standardised by their group, which is what GRPO's advantages inherit, outliers
left out. In groups of n it is at most ``(n - 2) / sqrt(n - 1)``, when one sample stands against all the others; the
figure is the share of that, and a task is compared with the median of the others.

Both are measured on rewards that take many values, none of which a fifth of the samples share (a reward at its ceiling
has no tail). Gaussian GRPO (arXiv 2604.08539) ranks both away.
"""

from __future__ import annotations

import numpy as np

from polyreward.audit.diagnose.estimates import Estimate, ratio
from polyreward.audit.diagnose.evidence import Evidence
from polyreward.audit.diagnose.findings import CheckResult, Finding, Table, Tested
from polyreward.audit.diagnose.saturation import SATURATED, kept_spread

TAIL_SHARE = 0.3
SKEW = 0.25
MANY_VALUES = 12
TIED = 0.2
FAR = 6
WINDOWS = 6
FEWEST = 50


def check_shape(evidence: Evidence) -> CheckResult:
    """Tail of each reward in each task, and its skew compared with the other tasks."""
    codes, tasks = evidence.tasks or (np.zeros(evidence.groups, dtype=np.int64), ["all"])
    named = evidence.tasks is not None
    tests: list[Tested] = []
    rows = []
    for k, name in enumerate(evidence.names):
        kept = kept_spread(evidence, k)
        if evidence.weights[k] == 0 or (kept is not None and kept < SATURATED):
            continue
        relative = [_relative(evidence, k, codes == t) for t in range(len(tasks))]
        skewness = _skewness(evidence, k, [entry for entry in relative if entry is not None])
        shapes = [
            None if entry is None else (evidence.estimate(skewness, ratio(), codes == t), _tail_share(evidence, *entry))
            for t, entry in enumerate(relative)
        ]
        for t, (task, shape) in enumerate(zip(tasks, shapes, strict=True)):
            if shape is None:
                continue
            skew, tail = shape
            rows.append((name, task, skew.value, tail.value))
            others = sorted((s[0] for o, s in enumerate(shapes) if o != t and s), key=lambda s: s.value)
            # of two tasks, "more" and "less" skewed are one finding: that of the task that is further from symmetric
            if others and not (len(others) == 1 and abs(others[0].value) > abs(skew.value)):
                middle = float(np.median([other.value for other in others]))
                difference = skew.minus(middle, others[len(others) // 2].error)
                p = difference.beyond(SKEW, SKEW / 2)
                tests.append(Tested(p, _skew(name, task, difference, skew, tail)))
            tests.append(Tested(tail.above(TAIL_SHARE, TAIL_SHARE / 3), _tail(name, task, tail, named)))
    table = Table("Skew and tail by task", ("reward", "task", "skew", "tail share"), tuple(rows))
    reason = {} if len(tasks) > 1 else {"differences of skew between tasks": "fewer than two tasks"}
    return CheckResult(tests, (), {"shape": table}, reason)


def robust_deviation(values: np.ndarray) -> float:
    """1.4826 times the median distance to the median: the standard deviation of a normal distribution."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values)))) if len(values) else 0.0


def _relative(evidence: Evidence, k: int, within: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows of reward `k` in the chosen groups and their values in robust deviations; None where it takes few values."""
    rows = np.flatnonzero(within[evidence.group] & evidence.valid[:, k])
    values = evidence.values[rows, k]
    if len(values) < FEWEST:
        return None
    _, counts = np.unique(values[:: max(1, len(values) // 5000)], return_counts=True)
    whole = robust_deviation(values)
    if len(counts) < MANY_VALUES or counts.max() > TIED * counts.sum() or whole == 0:
        return None
    relative = np.empty(len(values))
    windows = _windows(evidence, rows)
    deviations = [robust_deviation(values[window]) for window in windows]
    for window, deviation in zip(windows, deviations, strict=True):
        relative[window] = (values[window] - np.median(values[window])) / max(deviation, max(*deviations, whole) / 2)
    return rows, relative


def _tail_share(evidence: Evidence, rows: np.ndarray, relative: np.ndarray) -> Estimate:
    squares = np.zeros(len(evidence.group))
    squares[rows] = relative**2
    far = np.where(squares > FAR**2, squares, 0.0)
    sums = np.stack([evidence.sum(far), evidence.sum(squares)], 1)
    return evidence.estimate(sums, ratio(), sums[:, 1] > 0)


def _skewness(evidence: Evidence, k: int, parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Third standardised moment of each group and its largest possible value, both times the samples, (groups, 2)."""
    used = np.zeros(len(evidence.group), dtype=bool)
    for rows, relative in parts:
        used[rows] = np.abs(relative) <= FAR
    centred = evidence.center(np.where(used, evidence.values[:, k], 0.0), used)
    count, variance = evidence.sum(used), evidence.sum(centred**2)
    varies = (count > 2) & (variance > 0)
    count, variance = np.where(varies, count, 3.0), np.where(varies, variance, 1.0)
    moment = evidence.sum(centred**3) / (variance / count) ** 1.5
    return np.stack([moment, count * (count - 2) / np.sqrt(count - 1)], 1) * varies[:, None]


def _windows(evidence: Evidence, rows: np.ndarray) -> list[np.ndarray]:
    """Places in `rows` of each stretch of steps; one stretch without steps or with few rows."""
    number = min(WINDOWS, 2 * len(rows) // FEWEST)
    if evidence.steps is None or number < 2:
        return [np.arange(len(rows))]
    order = np.argsort(evidence.steps[evidence.group[rows]], kind="stable")
    return np.array_split(order, number)


def _tail(name: str, task: str, tail: Estimate, named: bool) -> Finding:
    low, high = tail.interval
    where = f" in task {task!r}" if named else ""
    return Finding(
        "heavy tail", "warning", f"{name} / {task}" if named else name, tail.value, (low, high),
        f"{name!r} has a heavy tail{where}: outliers beyond {FAR} robust deviations carry {tail.value:.0%} of its "
        f"squared deviations (95 % interval {low:.0%} to {high:.0%}), so a few samples decide the update.",
        "gaussian-grpo",
    )  # fmt: skip


def _skew(name: str, task: str, difference: Estimate, skew: Estimate, tail: Estimate) -> Finding:
    low, high = difference.interval
    also = f"; outliers carry {tail.value:.0%} of its squared deviations" if tail.value > TAIL_SHARE else ""
    return Finding(
        "skew", "warning", f"{name} / {task}", difference.value, (low, high),
        f"{name!r} is distributed differently in task {task!r}: the skew inside its groups is {skew.value:+.0%} of the "
        f"largest possible, {difference.value:+.0%} beside the other tasks (95 % interval of the difference {low:+.0%} "
        f"to {high:+.0%}){also}. Equal advantages then mean different things in different tasks.",
        "gaussian-grpo",
    )  # fmt: skip
