"""Drift of a reward (the proxy) away from the trusted reward over the steps, told apart from harmless saturation.

Two signs count. *Opposite trends*: group means of the proxy rise over the steps while those of the trusted reward fall
(slopes inside tasks, so a changing task mix does not count). *Decoupling*: inside groups, the slope of the proxy on the
trusted reward and their correlation both drop from the first to the last third of the steps, while neither reward has
lost its spread. A reward that saturates loses spread, so its correlation falls without drift; a reward that dominates
the
sum but keeps to the trusted one has not drifted either.
"""

from __future__ import annotations

import numpy as np

from polyreward.audit.diagnose.evidence import Estimate, Evidence, ratio
from polyreward.audit.diagnose.findings import CheckResult, Finding, Table, Tested
from polyreward.audit.diagnose.length import reference_values

TREND = 0.2
CORRELATION_DROP = 0.1
SLOPE_DROP = 0.3
KEPT_SPREAD = 0.5
WINDOWS = 12


def check_drift(evidence: Evidence) -> CheckResult:
    """Compare trends and coupling of every reward with the trusted one."""
    what = "drift away from the trusted reward"
    reference = reference_values(evidence)
    if evidence.thirds is None:
        return CheckResult(not_checked={what: "no column 'step' with at least six distinct steps"})
    if reference is None:
        return CheckResult(not_checked={what: "no trusted reward: name one with --reference"})
    assert evidence.steps is not None
    tests: list[Tested] = []
    notes: list[Finding] = []
    rows: list[tuple[object, ...]] = []
    for k, name in enumerate(evidence.names):
        if name == evidence.reference:
            continue
        valid = evidence.valid[:, k] & np.isfinite(reference)
        count = evidence.sum(valid)
        if not (count > 0).any():
            continue
        proxy_values, trusted_values = np.where(valid, evidence.values[:, k], 0.0), np.where(valid, reference, 0.0)
        rises, falls = (_trend(evidence, values, count) for values in (proxy_values, trusted_values))
        proxy, trusted = evidence.center(proxy_values, valid), evidence.center(trusted_values, valid)
        moments = np.stack([evidence.sum(proxy * trusted), evidence.sum(proxy**2), evidence.sum(trusted**2), count], 1)
        coupling = _coupling(evidence, moments)
        rows += _windows(evidence, name, moments, proxy_values, trusted_values, count)
        opposite = max(rises.above(TREND), falls.below(-TREND))
        parted = max(coupling["correlation"].above(CORRELATION_DROP), coupling["slope"].above(SLOPE_DROP))
        kept = coupling["proxy"].value > KEPT_SPREAD and coupling["trusted"].value > KEPT_SPREAD / 2
        # both signs are one test each of the same finding; the smaller p-value is doubled for having two
        p = min(1.0, 2 * min(opposite, parted if kept else 1.0))
        by_trend = opposite <= parted or not kept
        tests.append(Tested(p, _drift(evidence, name, rises, falls, coupling, by_trend)))
        if coupling["proxy"].value < 0.25:
            notes.append(_saturated(name, coupling["proxy"].value))
    headers = ("reward", "step", "mean", "mean of the trusted reward", "correlation inside groups")
    return CheckResult(
        tests, notes, {"drift": Table(f"Rewards beside {evidence.reference!r} over the steps", headers, tuple(rows))}
    )


def _trend(evidence: Evidence, values: np.ndarray, count: np.ndarray) -> Estimate:
    """Change of the group means from the first to the last step, in deviations of a sample, inside tasks."""
    assert evidence.steps is not None
    mean = evidence.sum(values) / np.maximum(count, 1)
    spread = evidence.sum(values**2)
    use = (count > 0).astype(float)
    codes = evidence.tasks[0] if evidence.tasks else np.zeros(evidence.groups, dtype=np.int64)
    number = np.maximum(np.bincount(codes, use), 1)
    step = (evidence.steps - (np.bincount(codes, evidence.steps * use) / number)[codes]) * use
    level = (mean - (np.bincount(codes, mean * use) / number)[codes]) * use
    whole = float(spread.sum() / count.sum() - (values.sum() / count.sum()) ** 2)
    if whole <= 1e-18 or not step.any():
        return Estimate(float("nan"), float("nan"), 0)
    factor = float(np.ptp(evidence.steps)) / np.sqrt(whole)
    return evidence.estimate(np.stack([step * level * factor, step**2], 1), ratio())


def _coupling(evidence: Evidence, moments: np.ndarray) -> dict[str, Estimate]:
    """Drops of correlation and slope (relative) from the first to the last third, and what is left of the spreads."""
    assert evidence.thirds is not None
    first, last = evidence.thirds
    both = np.concatenate([moments * first[:, None], moments * last[:, None]], 1)

    def correlation(s: np.ndarray) -> np.ndarray:
        return s[..., 0] / np.sqrt(s[..., 1] * s[..., 2]) - s[..., 4] / np.sqrt(s[..., 5] * s[..., 6])

    def slope(s: np.ndarray) -> np.ndarray:
        return 1 - (s[..., 4] / s[..., 6]) / (s[..., 0] / s[..., 2])

    figures = {
        "correlation": correlation,
        "slope": slope,
        "proxy": lambda s: (s[..., 5] / s[..., 7]) / (s[..., 1] / s[..., 3]),
        "trusted": lambda s: (s[..., 6] / s[..., 7]) / (s[..., 2] / s[..., 3]),
        "early": lambda s: s[..., 0] / np.sqrt(s[..., 1] * s[..., 2]),
        "late": lambda s: s[..., 4] / np.sqrt(s[..., 5] * s[..., 6]),
    }
    used = first | last
    return {name: evidence.estimate(both, figure, used) for name, figure in figures.items()}


def _drift(
    evidence: Evidence, name: str, rises: Estimate, falls: Estimate, coupling: dict[str, Estimate], by_trend: bool
) -> Finding:
    reference = evidence.reference
    if by_trend:
        low, high = rises.interval
        statement = (
            f"{name!r} rises over the steps by {rises.value:.2f} deviations (95 % interval {low:.2f} to {high:.2f}) "
            f"while the trusted "
            f"reward {reference!r} falls by {-falls.value:.2f} ({-falls.interval[1]:.2f} to "
            f"{-falls.interval[0]:.2f}): the policy "
            "gains on the proxy at the expense of what it stands for."
        )
        return Finding("drift", "error", name, rises.value, (low, high), statement, "penalise")
    drop = coupling["correlation"]
    low, high = drop.interval
    statement = (
        f"{name!r} comes apart from the trusted reward {reference!r}: their correlation inside groups goes from "
        f"{coupling['early'].value:.2f} in the first third of the steps to {coupling['late'].value:.2f} in the last "
        f"(drop {drop.value:.2f}, "
        f"95 % interval {low:.2f} to {high:.2f}), and neither has saturated."
    )
    return Finding("drift", "warning", name, drop.value, (low, high), statement, "penalise")


def _saturated(name: str, kept: float) -> Finding:
    return Finding(
        "saturation", "info", name, kept, (kept, kept),
        f"{name!r} saturates: {kept:.0%} of its early variance inside groups is left in the last third of the steps. "
        f"This is no "
        "sign of exploitation.",
    )  # fmt: skip


def _windows(
    evidence: Evidence, name: str, moments: np.ndarray, proxy: np.ndarray, trusted: np.ndarray, count: np.ndarray
) -> list[tuple[object, ...]]:
    assert evidence.steps is not None
    distinct = np.unique(evidence.steps)
    window = np.searchsorted(distinct, evidence.steps) * min(WINDOWS, len(distinct)) // len(distinct)
    number = int(window.max()) + 1
    sums = [np.bincount(window, column, number) for column in (*moments.T, evidence.sum(proxy), evidence.sum(trusted))]
    product, first, second, samples, total, reference = sums
    step = np.bincount(window, evidence.steps, number) / np.maximum(np.bincount(window, minlength=number), 1)
    rows: list[tuple[object, ...]] = []
    for w in range(number):
        if samples[w] == 0:
            continue
        both = float(np.sqrt(first[w] * second[w]))
        coupled = float(product[w] / both) if both > 0 else None
        rows.append((name, float(step[w]), float(total[w] / samples[w]), float(reference[w] / samples[w]), coupled))
    return rows
