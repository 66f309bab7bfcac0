"""Differences of scale, skew and tail between tasks.

Scale is the deviation of a reward inside the groups with a signal; a task whose scale is far from the others' either
dominates the update or vanishes from it unless the group deviation is divided out, which in turn blows up groups with
meaningless differences. EMA-GRPO (arXiv 2512.03043) gives each task a moving scale of its own. Tail is the share of
the squared deviation carried by samples further than six robust deviations from the median of their task, and skew is
Kelley's quantile skew; both are measured on rewards
that take many values, none of which a fifth of the samples share (a reward at its ceiling has no tail). Gaussian GRPO
(arXiv 2604.08539) removes them.
"""

from __future__ import annotations

import numpy as np

from polyreward.audit.diagnose.evidence import Estimate, Evidence, ratio
from polyreward.audit.diagnose.findings import CheckResult, Finding, Table, Tested

SCALE_RATIO = 3.0
TAIL_SHARE = 0.3
SKEW = 0.4
MANY_VALUES = 12
TIED = 0.2
FAR = 6
CUTS = 20


def check_scale(evidence: Evidence) -> CheckResult:
    """Compare each task's scale, skew and tail with those of the other tasks, reward by reward."""
    if evidence.tasks is None:
        codes, tasks = np.zeros(evidence.groups, dtype=np.int64), ["all"]
        reason = {"differences of scale and skew between tasks": f"no column {evidence.task_name!r}"}
    else:
        codes, tasks = evidence.tasks
        reason = {} if len(tasks) > 1 else {"differences of scale and skew between tasks": "there is one task"}
    centred = evidence.center(evidence.values, None if evidence.complete else evidence.valid)
    tests: list[Tested] = []
    rows = []
    for k, name in enumerate(evidence.names):
        if evidence.weights[k] == 0:
            continue
        squares = evidence.sum(centred[:, k] ** 2)
        counted = np.where(
            squares > 0, evidence.sum(evidence.valid[:, k]) if not evidence.complete else evidence.sizes, 0.0
        )
        moments = np.stack([squares, counted], 1)
        scales = [
            evidence.estimate(moments, lambda s: 0.5 * np.log(s[..., 0] / s[..., 1]), codes == t)
            for t in range(len(tasks))
        ]
        shapes = [_shape(evidence, k, codes == t, centred) for t in range(len(tasks))]
        rows += [_row(name, task, scales[t], shapes[t]) for t, task in enumerate(tasks)]
        tests += _scale_tests(name, tasks, scales)
        for t, task in enumerate(tasks):
            shape = shapes[t]
            if shape is None:
                continue
            tests.append(Tested(shape[1].above(TAIL_SHARE), _tail(name, task, shape[1], evidence.tasks is not None)))
            others = [s[0].value for o, s in enumerate(shapes) if o != t and s is not None]
            if others:
                difference = Estimate(shape[0].value - float(np.median(others)), shape[0].error, shape[0].freedom)
                p = min(1.0, 2 * min(difference.above(SKEW), difference.below(-SKEW)))
                tests.append(Tested(p, _skew(name, task, difference, shape[0].value)))
    table = Table(
        "Scale, skew and tail by task", ("reward", "task", "deviation in groups", "skew", "tail share"), tuple(rows)
    )
    return CheckResult(tests, (), {"scale": table}, reason)


def _scale_tests(name: str, tasks: list[str], scales: list[Estimate]) -> list[Tested]:
    tests = []
    for t, task in enumerate(tasks):
        others = [s for o, s in enumerate(scales) if o != t and np.isfinite(s.value)]
        if not others or not np.isfinite(scales[t].value):
            continue
        middle = float(np.median([s.value for s in others]))
        error = float(np.hypot(scales[t].error, min(s.error for s in others)))
        difference = Estimate(scales[t].value - middle, error, scales[t].freedom)
        threshold = float(np.log(SCALE_RATIO))
        p = min(1.0, 2 * min(difference.above(threshold), difference.below(-threshold)))
        tests.append(Tested(p, _scale(name, task, difference)))
    return tests


def _scale(name: str, task: str, difference: Estimate) -> Finding:
    factor = float(np.exp(difference.value))
    low, high = (float(np.exp(np.clip(bound, -700, 700))) for bound in difference.interval)
    shown, bounds = (factor, (low, high)) if factor > 1 else (1 / factor, (1 / high, 1 / low))
    word, effect = ("larger", "it outweighs the others") if factor > 1 else ("smaller", "it is lost beside the others")
    return Finding(
        "scale", "error" if shown > 30 else "warning", f"{name} / {task}", factor, (low, high),
        f"{name!r} spreads {shown:.1f} times {word} in task {task!r} than in the other tasks (95 % interval "
        f"{bounds[0]:.1f} to "
        f"{bounds[1]:.1f}): without a scale per task {effect}, and dividing by each group's deviation inflates its "
        f"narrow groups.",
        "ema-grpo",
    )  # fmt: skip


def _tail(name: str, task: str, tail: Estimate, named: bool) -> Finding:
    low, high = tail.interval
    where = f" in task {task!r}" if named else ""
    return Finding(
        "heavy tail", "warning", f"{name} / {task}" if named else name, tail.value, (low, high),
        f"{name!r} has a heavy tail{where}: outliers carry {tail.value:.0%} of its variance (95 % interval {low:.0%} "
        f"to {high:.0%}), "
        "so a few samples decide the update.",
        "gaussian-grpo",
    )  # fmt: skip


def _skew(name: str, task: str, difference: Estimate, skew: float) -> Finding:
    low, high = difference.interval
    return Finding(
        "skew", "warning", f"{name} / {task}", difference.value, (low, high),
        f"{name!r} is distributed differently in task {task!r}: skew {skew:.2f}, which is "
        f"{abs(difference.value):.2f} from the other "
        f"tasks (95 % interval of the difference {low:.2f} to {high:.2f}).",
        "gaussian-grpo",
    )  # fmt: skip


def _shape(evidence: Evidence, k: int, within: np.ndarray, centred: np.ndarray) -> tuple[Estimate, Estimate] | None:
    """Skew and tail share of a reward in the chosen groups; None for a reward that takes few values."""
    rows = within[evidence.group] & evidence.valid[:, k]
    values = evidence.values[rows, k]
    if len(values) < 50:
        return None
    _, counts = np.unique(values[:: max(1, len(values) // 5000)], return_counts=True)
    if len(counts) < MANY_VALUES or counts.max() > TIED * counts.sum():
        return None
    centre = float(np.median(values))
    deviation = 1.4826 * float(np.median(np.abs(values - centre)))
    if deviation == 0:
        return None
    part = evidence.block[evidence.group[rows]] % CUTS
    skews = np.array([_kelley(values[part == cut]) for cut in range(CUTS)])
    skews = skews[np.isfinite(skews)]
    error = float(skews.std(ddof=1) / np.sqrt(len(skews))) if len(skews) > 1 else float("nan")
    skew = Estimate(_kelley(values), error, len(skews) - 1)
    squares = np.zeros(len(evidence.group))
    squares[rows] = (values - centre) ** 2
    far = np.where(squares > (FAR * deviation) ** 2, squares, 0.0)
    tail = evidence.estimate(np.stack([evidence.sum(far), evidence.sum(squares)], 1), ratio(), within)
    return skew, tail


def _kelley(values: np.ndarray) -> float:
    if len(values) < 10:
        return float("nan")
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return float((high + low - 2 * middle) / (high - low)) if high > low else float("nan")


def _row(name: str, task: str, scale: Estimate, shape: tuple[Estimate, Estimate] | None) -> tuple[object, ...]:
    deviation = float(np.exp(scale.value)) if np.isfinite(scale.value) else 0.0
    return (name, task, deviation, shape[0].value if shape else None, shape[1].value if shape else None)
