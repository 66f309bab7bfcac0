"""Drift of a reward (the proxy) away from the trusted reward over the steps, told apart from harmless saturation.

Three signs count, each with its own test; steps are the independent units of trends, groups those of correlations.

- *Opposite trends*: the proxy rises while the trusted reward falls, over the whole log or its second half.
- *Unpaid gains*: the proxy follows the trusted reward inside groups, so a gain of one promises a gain of the other. The
  proxy rises from the first to the last third, and the trusted reward gets less than half of what that promises.
- *Decoupling*: inside groups, the slope of the proxy on the trusted reward and their correlation both drop.

The last two hold only while both rewards keep their spread: a reward at its ceiling moves no more and follows nothing,
which is saturation. A reward that dominates the sum but keeps to the trusted one has not drifted.
"""

from __future__ import annotations

import numpy as np

from polyreward.audit.diagnose import trends
from polyreward.audit.diagnose.estimates import Estimate
from polyreward.audit.diagnose.evidence import Evidence
from polyreward.audit.diagnose.findings import CheckResult, Finding, Table, Tested
from polyreward.audit.diagnose.saturation import saturated

TREND = 0.2
UNPAID = 0.3
PAID = 0.5
COUPLED = 0.3
EACH = 0.01
CORRELATION_DROP = 0.1
SLOPE_DROP = 0.3
KEPT_SPREAD = 0.5


def check_drift(evidence: Evidence) -> CheckResult:
    """Compare trends and coupling of every reward with the trusted one."""
    what = "drift away from the trusted reward"
    reference = evidence.reference_values
    if evidence.thirds is None:
        return CheckResult(not_checked={what: "no column 'step' with at least six distinct steps"})
    notes = saturated(evidence)
    if reference is None:
        return CheckResult((), notes, not_checked={what: "no trusted reward: name one with --reference"})
    tests: list[Tested] = []
    rows: list[tuple[object, ...]] = []
    for k, name in enumerate(evidence.names):
        if name == evidence.reference:
            continue
        valid = evidence.valid[:, k] & np.isfinite(reference)
        if not valid.any():
            continue
        pair = trends.Pair(
            evidence, np.where(valid, evidence.values[:, k], 0.0), np.where(valid, reference, 0.0), valid
        )
        signs = [*_opposite(evidence, name, pair), _unpaid(evidence, name, pair), _decoupled(evidence, name, pair)]
        smallest = min(signs, key=lambda sign: sign.p)
        # the signs are tests of one finding, so the smallest p-value is multiplied by their number
        tests.append(Tested(min(1.0, len(signs) * smallest.p), smallest.finding))
        rows += [(name, *row) for row in pair.windows()]
    headers = ("reward", "step", "mean", f"mean of {evidence.reference}", "correlation inside groups")
    table = Table(f"Rewards beside {evidence.reference!r} over the steps", headers, tuple(rows))
    return CheckResult(tests, notes, {"drift": table})


def _opposite(evidence: Evidence, name: str, pair: trends.Pair) -> list[Tested]:
    signs = []
    for half, where in ((False, "over the steps"), (True, "over the second half of the steps")):
        rises, falls = pair.trend("proxy", half), pair.trend("trusted", half)
        # both move for themselves, and the test is on the difference, in which the difficulty of the prompts cancels
        both = max(rises.above(TREND, 0.0), falls.below(-TREND, 0.0)) < EACH
        p = pair.trend("difference", half).above(2 * TREND, TREND) if both else 1.0
        low, high = rises.interval
        statement = (
            f"{name!r} rises {where} by {rises.value:.2f} deviations (95 % interval {low:.2f} to {high:.2f}) while the "
            f"trusted reward {evidence.reference!r} falls by {-falls.value:.2f} ({-falls.interval[1]:.2f} to "
            f"{-falls.interval[0]:.2f}): the policy gains on the proxy at the expense of what it stands for."
        )
        signs.append(Tested(p, Finding("drift", "error", name, rises.value, (low, high), statement, "gate")))
    return signs


def _unpaid(evidence: Evidence, name: str, pair: trends.Pair) -> Tested:
    gains, promised, gap = pair.gain("trusted"), pair.promised(), pair.gap()
    rises, early = pair.gain("proxy"), pair.coupling["early"]
    holds = pair.keeps(KEPT_SPREAD) and early.value > COUPLED and rises.above(TREND, 0.0) < EACH
    holds = holds and promised.value > UNPAID and gains.value < PAID * promised.value
    p = gap.above(UNPAID, UNPAID / 2) if holds else 1.0
    low, high = rises.interval
    statement = (
        f"{name!r} rises by {rises.value:.2f} deviations from the first to the last third of the steps (95 % interval "
        f"{low:.2f} to {high:.2f}). Going by how it follows the trusted reward {evidence.reference!r} inside groups, "
        f"that promises {promised.value:+.2f} deviations there, but {gains.value:+.2f} came: the gains are the proxy's."
    )
    return Tested(p, Finding("drift", "warning", name, rises.value, (low, high), statement, "gate"))


def _decoupled(evidence: Evidence, name: str, pair: trends.Pair) -> Tested:
    coupling = pair.coupling
    drop: Estimate = coupling["drop"]
    p = max(drop.above(CORRELATION_DROP, CORRELATION_DROP / 2), coupling["slope"].above(SLOPE_DROP, SLOPE_DROP / 2))
    low, high = drop.interval
    statement = (
        f"{name!r} comes apart from the trusted reward {evidence.reference!r}: their correlation inside groups goes "
        f"from {coupling['early'].value:.2f} in the first third of the steps to {coupling['late'].value:.2f} in the "
        f"last (drop {drop.value:.2f}, 95 % interval {low:.2f} to {high:.2f}), and neither has saturated."
    )
    finding = Finding("drift", "warning", name, drop.value, (low, high), statement, "gate")
    return Tested(p if pair.keeps(KEPT_SPREAD) else 1.0, finding)
