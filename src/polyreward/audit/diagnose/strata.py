"""Cross-stratum bias: does the structure of a trajectory, rather than its quality, decide the sign of its advantage?

With one baseline a group, the advantage is the distance to the mean of the sample's own stratum plus the offset
``mean of the stratum - mean of the group`` (Stratified GRPO, arXiv 2510.06214). The variance of that offset is ``sum
of n_k (mean_k - mean)^2 / n``. Chance alone makes it positive, so the figure is the chance-corrected share (epsilon
squared, pooled within groups): ``(between - df_between * within / df_within) / total``. Where strata differ in the
same way in all groups, their common offsets (least squares inside groups) say so with less noise; the test uses both.
The baseline error of a stratum is its mean offset.
"""

from __future__ import annotations

import numpy as np
import torch

from polyreward.audit.diagnose.estimates import Estimate, ratio
from polyreward.audit.diagnose.evidence import Evidence
from polyreward.audit.diagnose.findings import CheckResult, Finding, Table, Tested
from polyreward.grouped import Segments, cross

SHARE = 0.05
SEVERE = 0.4
MOST = 8
"""Strata told apart in the common offsets; rarer ones are taken together."""


def check_strata(evidence: Evidence) -> CheckResult:
    """Chance-corrected share of the within-group variance that lies between strata, and the baseline error of each."""
    what = "cross-stratum bias"
    strata = evidence.ids(evidence.stratum_name)
    if strata is None:
        return CheckResult(not_checked={what: f"no column {evidence.stratum_name!r} (nor 'tool_calls')"})
    if strata.count < 2:
        return CheckResult(not_checked={what: f"column {evidence.stratum_name!r} holds one value"})
    codes = strata.codes.numpy()
    cells = cross(Segments(torch.from_numpy(evidence.group), evidence.groups), strata)
    cell = cells.codes.numpy()
    size = np.bincount(cell, minlength=cells.count).astype(float)
    offset = np.bincount(cell, evidence.total, cells.count) / np.maximum(size, 1)
    home = np.zeros(cells.count, dtype=np.int64)
    home[cell] = evidence.group
    between = np.bincount(home, size * offset**2, evidence.groups)
    used = np.bincount(home, size > 0, evidence.groups)
    mixed = (used > 1) & evidence.alive
    if not mixed.any():
        return CheckResult(not_checked={what: "no group with a signal holds more than one stratum"})
    inside = evidence.energy - between
    statistics = np.stack([between, inside, used - 1, evidence.sizes - used], 1) * mixed[:, None]

    def share(s: np.ndarray) -> np.ndarray:
        noise = np.where(s[..., 3] > 0, s[..., 1] / np.maximum(s[..., 3], 1), 0.0)
        return (s[..., 0] - s[..., 2] * noise) / (s[..., 0] + s[..., 1])

    estimate = evidence.estimate(statistics, share, mixed)
    low, high = estimate.interval
    deviation = float(np.sqrt(evidence.energy[mixed].sum() / evidence.sizes[mixed].sum()))
    rows, offsets = [], []
    row_mixed = mixed[evidence.group]
    for code in range(strata.count):
        here = (codes == code) & row_mixed
        if not here.any():
            continue
        bias = evidence.estimate(
            np.stack([evidence.sum(np.where(here, evidence.total, 0.0)), evidence.sum(here)], 1), ratio(), mixed
        )
        bounds = bias.interval
        label = str(strata.label(code))
        rows.append((label, int(here.sum()), bias.value, *bounds, bias.value / deviation))
        offsets.append((bias.value / deviation, label))
    lowest, highest = min(offsets), max(offsets)
    finding = Finding(
        "cross-stratum bias",
        "error" if low > SEVERE else "warning",
        evidence.stratum_name,
        estimate.value,
        (low, high),
        f"{estimate.value:.0%} of the variance inside groups lies between the strata of {evidence.stratum_name!r} "
        f"beyond chance (95 % interval {low:.0%} to {high:.0%}). One baseline for all moves every sample of stratum "
        f"{highest[1]!r} by {highest[0]:+.2f} deviations and of stratum {lowest[1]!r} by {lowest[0]:+.2f}, whatever "
        "its quality.",
        "stratified-grpo",
    )  # fmt: skip
    headers = ("stratum", "samples", "baseline error", "low", "high", "in deviations")
    table = Table(f"Baseline error by stratum ({evidence.stratum_name})", headers, tuple(rows))
    common = _common(evidence, codes, mixed)
    p = min(1.0, 2 * min(estimate.above(SHARE, SHARE / 2), common.above(SHARE, SHARE / 2)))
    return CheckResult([Tested(p if estimate.value > SHARE / 2 else 1.0, finding)], (), {"strata": table})


def _common(evidence: Evidence, codes: np.ndarray, mixed: np.ndarray) -> Estimate:
    """Share of the variance inside groups that one offset a stratum, the same in all groups, explains."""
    frequent = np.argsort(-np.bincount(codes), kind="stable")[:MOST]
    marks = [evidence.center((codes == code).astype(np.float64)) for code in frequent]
    number = len(marks)
    products = [evidence.sum(a * b) for a in marks for b in marks] + [evidence.sum(a * evidence.total) for a in marks]
    statistics = np.stack([*products, evidence.energy], 1) * mixed[:, None]

    def explained(s: np.ndarray) -> np.ndarray:
        gram = s[..., : number**2].reshape(*s.shape[:-1], number, number)
        with_total = s[..., number**2 : -1, None]
        # the marks of all strata add up to 0, so the smallest eigenvalue is 0 or rounding
        offsets = np.linalg.pinv(gram, rcond=1e-9, hermitian=True) @ with_total
        return (offsets * with_total).sum(axis=(-2, -1)) / s[..., -1]

    return evidence.estimate(statistics, explained, mixed)
