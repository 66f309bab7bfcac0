"""Cross-stratum bias: does the structure of a trajectory, rather than its quality, decide the sign of its advantage?

With one baseline a group, the advantage is the distance to the mean of the sample's own stratum plus the offset
``mean of the stratum - mean of the group`` (Stratified GRPO, arXiv 2510.06214). The variance of that offset is
``sum of n_k (mean_k - mean)^2 / n``. Chance alone makes it positive, so the figure is the chance-corrected share
(epsilon squared, pooled within groups): ``(between - df_between * within / df_within) / total``. The baseline error
of a
stratum is its mean offset.
"""

from __future__ import annotations

import numpy as np
import torch

from polyreward.audit.diagnose.evidence import Evidence, ratio
from polyreward.audit.diagnose.findings import CheckResult, Finding, Table, Tested
from polyreward.grouped import Segments, cross

SHARE = 0.05
SEVERE = 0.4


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
        f"beyond chance (95 % "
        f"interval {low:.0%} to {high:.0%}): the common baseline is off by {highest[0]:+.2f} deviations for stratum "
        f"{highest[1]} and "
        f"{lowest[0]:+.2f} for stratum {lowest[1]}, whatever the quality of the sample.",
        "stratified-grpo",
    )  # fmt: skip
    headers = ("stratum", "samples", "baseline error", "low", "high", "in deviations")
    table = Table(f"Baseline error by stratum ({evidence.stratum_name})", headers, tuple(rows))
    return CheckResult([Tested(estimate.above(SHARE), finding)], (), {"strata": table})
