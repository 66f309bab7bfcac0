"""Length dependence of each reward beyond what correctness explains.

The figure is the partial rank correlation of reward and response length inside groups given the trusted reward:
``(r_xy - r_xz r_yz) / sqrt((1 - r_xz^2)(1 - r_yz^2))`` of the pooled within-group rank correlations. Without a trusted
reward a correlation with length may be deserved, so it is then reported as information only. A reward that is named
after length or cost depends on it by intent.
"""

from __future__ import annotations

import numpy as np

from polyreward.audit.diagnose.conflict import masked_ranks
from polyreward.audit.diagnose.estimates import Estimate
from polyreward.audit.diagnose.evidence import Evidence
from polyreward.audit.diagnose.findings import CheckResult, Finding, Table, Tested

DEPENDENCE = 0.3
INTENDED = ("length", "brevity", "concise", "cost", "short", "token", "overlong", "verbos")


def check_length(evidence: Evidence) -> CheckResult:
    """Partial rank correlation of every reward with the length of the response."""
    if evidence.length is None:
        return CheckResult(not_checked={"length dependence": "no numeric column 'length', and no text to measure"})
    measure, length = evidence.length
    reference = evidence.reference_values
    known = np.isfinite(length)
    tests, notes, rows = [], [], []
    everywhere = bool(known.all()) and (reference is None or bool(np.isfinite(reference).all()))
    whole = [None if v is None else evidence.ranks(v) for v in (length, reference)] if everywhere else [None, None]
    for k, name in enumerate(evidence.names):
        if name == evidence.reference or evidence.weights[k] == 0:
            continue
        valid = evidence.valid[:, k] & known
        if reference is not None:
            valid &= np.isfinite(reference)
        size, control = whole
        if size is not None and valid.all():
            reward = evidence.reward_ranks(k)
        else:
            reward, size = (
                masked_ranks(evidence, np.where(valid, v, 0.0), valid) for v in (evidence.values[:, k], length)
            )
            control = None if reference is None else masked_ranks(evidence, np.where(valid, reference, 0.0), valid)
        plain, partial = _correlations(evidence, reward, size, control)
        if not np.isfinite(partial.value):
            continue
        rows.append((name, plain.value, partial.value if control is not None else None, *partial.interval))
        finding = _finding(name, partial, evidence.reference if control is not None else None)
        p = partial.beyond(DEPENDENCE, DEPENDENCE / 2)
        if finding.severity == "info":
            if p < 0.01:
                notes.append(finding)
        else:
            tests.append(Tested(p, finding))
    headers = ("reward", "rank correlation with length", "given the trusted reward", "low", "high")
    table = Table(f"Rewards and length ({measure})", headers, tuple(rows))
    reason = {}
    if reference is None:
        reason["length dependence beyond correctness"] = "no trusted reward: name one with --reference"
    return CheckResult(tests, notes, {"length": table}, reason)


def _correlations(
    evidence: Evidence, reward: np.ndarray, length: np.ndarray, control: np.ndarray | None
) -> tuple[Estimate, Estimate]:
    zero = np.zeros_like(reward)
    z = zero if control is None else control
    pairs = [(reward, length), (reward, reward), (length, length), (reward, z), (length, z), (z, z)]
    statistics = np.stack([evidence.sum(a * b) for a, b in pairs], 1)
    plain = evidence.estimate(statistics, lambda s: s[..., 0] / np.sqrt(s[..., 1] * s[..., 2]))
    if control is None or statistics[:, 5].sum() == 0:
        return plain, plain

    def partial(s: np.ndarray) -> np.ndarray:
        xy, xx, yy, xz, yz, zz = np.moveaxis(s, -1, 0)
        return (xy * zz - xz * yz) / np.sqrt(
            np.clip(xx * zz - xz**2, 1e-300, None) * np.clip(yy * zz - yz**2, 1e-300, None)
        )

    statistics[:, :] /= max(statistics.max(), 1e-300)
    return plain, evidence.estimate(statistics, partial)


def _finding(name: str, estimate: Estimate, reference: str | None) -> Finding:
    low, high = estimate.interval
    intended = any(word in name.lower() for word in INTENDED)
    beyond = f" at equal {reference!r}" if reference else " (not separated from correctness)"
    word = "longer" if estimate.value > 0 else "shorter"
    tail = ", as its name intends." if intended else ": the policy can raise it by length alone."
    return Finding(
        "length dependence", "warning" if reference and not intended else "info", name, estimate.value, (low, high),
        f"{name!r} prefers {word} responses{beyond}: rank correlation {estimate.value:.2f} inside groups (95 % "
        f"interval {low:.2f} to {high:.2f}){tail if reference or intended else '.'}",
        "" if intended else "length-shaping",
    )  # fmt: skip
