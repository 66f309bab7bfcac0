"""Differences of scale between tasks: how far apart a reward sets the samples of a group, task by task.

A task whose scale is far from the others' either dominates the update or vanishes from it unless the deviation of
each group is divided out, which in turn inflates groups with meaningless differences. EMA-GRPO (arXiv 2512.03043)
gives each task a moving scale of its own. The scale is the root mean square distance to the median of the group, in
groups where the reward varies, with outliers beyond six robust deviations pulled in, so that a heavy tail is no
scale. For a reward of few values it is the mean range of a group: the deviation of 0/1 rewards measures how many
pass, not what a pass is worth.
"""

from __future__ import annotations

import numpy as np

from polyreward.audit.diagnose.estimates import Estimate
from polyreward.audit.diagnose.evidence import Evidence
from polyreward.audit.diagnose.findings import CheckResult, Finding, Table, Tested
from polyreward.audit.diagnose.shape import FAR, MANY_VALUES, robust_deviation

SCALE_RATIO = 3.0
NULL_RATIO = 2.0
SEVERE_RATIO = 30.0


def check_scale(evidence: Evidence) -> CheckResult:
    """Compare each task's scale with that of the other tasks, reward by reward."""
    what = "differences of scale between tasks"
    if evidence.tasks is None:
        return CheckResult(not_checked={what: f"no column {evidence.task_name!r}"})
    codes, tasks = evidence.tasks
    if len(tasks) < 2:
        return CheckResult(not_checked={what: "there is one task"})
    tests: list[Tested] = []
    rows = []
    for k, name in enumerate(evidence.names):
        if evidence.weights[k] == 0:
            continue
        scales = _scales(evidence, k, codes, len(tasks))
        rows += [(name, task, _value(scale)) for task, scale in zip(tasks, scales, strict=True)]
        tests += _tests(name, tasks, scales)
    return CheckResult(tests, (), {"scale": Table("Scale by task", ("reward", "task", "scale in groups"), tuple(rows))})


def _scales(evidence: Evidence, k: int, codes: np.ndarray, number: int) -> list[Estimate]:
    """Logarithm of the scale of reward `k` in each task."""
    valid = evidence.valid[:, k]
    values = evidence.values[:, k]
    reach = evidence.range(values, valid)
    centred = (values - evidence.median(values, valid)[evidence.group]) * valid
    varies = reach > 1e-12 * float(np.abs(values).max())
    sample = evidence.values[valid, k]
    few = len(np.unique(sample[:: max(1, len(sample) // 5000)])) < MANY_VALUES
    scales = []
    for t in range(number):
        within = varies & (codes == t)
        if not within.any():
            scales.append(Estimate(float("nan"), float("nan"), 0))
            continue
        if few:
            ranges = np.stack([reach, np.ones(evidence.groups)], 1)
            scales.append(evidence.estimate(ranges, lambda s: np.log(s[..., 0] / s[..., 1]), within))
            continue
        here = centred[within[evidence.group] & valid]
        limit = FAR * robust_deviation(here) or float("inf")
        squares, count = evidence.sum(np.minimum(centred**2, limit**2)), evidence.sum(valid)
        scales.append(
            evidence.estimate(np.stack([squares, count], 1), lambda s: 0.5 * np.log(s[..., 0] / s[..., 1]), within)
        )
    return scales


def _tests(name: str, tasks: list[str], scales: list[Estimate]) -> list[Tested]:
    known = [t for t in range(len(tasks)) if np.isfinite(scales[t].value)]
    tests = []
    # of two tasks, "larger" and "smaller" are one finding
    for t in known[1:] if len(known) == 2 else known:
        others = sorted((scales[o] for o in known if o != t), key=lambda scale: scale.value)
        if not others:
            continue
        middle = float(np.median([scale.value for scale in others]))
        difference = scales[t].minus(middle, others[len(others) // 2].error)
        p = difference.beyond(float(np.log(SCALE_RATIO)), float(np.log(NULL_RATIO)))
        tests.append(Tested(p, _finding(name, tasks[t], difference)))
    return tests


def _finding(name: str, task: str, difference: Estimate) -> Finding:
    factor = float(np.exp(difference.value))
    low, high = (float(np.exp(np.clip(bound, -700, 700))) for bound in difference.interval)
    shown, bounds = (factor, (low, high)) if factor > 1 else (1 / factor, (1 / high, 1 / low))
    word, effect = ("larger", "it outweighs the others") if factor > 1 else ("smaller", "it is lost beside the others")
    return Finding(
        "scale", "error" if shown > SEVERE_RATIO else "warning", f"{name} / {task}", factor, (low, high),
        f"{name!r} spreads {shown:.1f} times {word} in task {task!r} than in the median of the others (95 % interval "
        f"{bounds[0]:.1f} to {bounds[1]:.1f}): without a scale per task {effect}, and dividing by each group's "
        "deviation instead inflates groups whose samples hardly differ.",
        "ema-grpo",
    )  # fmt: skip


def _value(scale: Estimate) -> float | None:
    return float(np.exp(scale.value)) if np.isfinite(scale.value) else None
