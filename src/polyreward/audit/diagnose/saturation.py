"""Saturation: a reward that reaches its ceiling loses its spread inside groups. It is information, never a warning."""

from __future__ import annotations

from polyreward.audit.diagnose.evidence import Evidence
from polyreward.audit.diagnose.findings import Finding

SATURATED = 0.25


def kept_spread(evidence: Evidence, k: int) -> float | None:
    """Variance of reward `k` inside groups in the last third of the steps, relative to the first; None if unknown."""
    if evidence.thirds is None:
        return None
    valid = evidence.valid[:, k]
    squares = evidence.sum(evidence.center(evidence.values[:, k], valid) ** 2)
    count = evidence.sum(valid)
    early, late = ((squares[part].sum(), count[part].sum()) for part in evidence.thirds)
    if early[0] <= 0 or not early[1] or not late[1]:
        return None
    return float(late[0] / late[1] / (early[0] / early[1]))


def saturated(evidence: Evidence) -> list[Finding]:
    """A note for every reward that keeps less than a quarter of its early variance."""
    found = [(name, kept_spread(evidence, k)) for k, name in enumerate(evidence.names)]
    return [_note(name, kept) for name, kept in found if kept is not None and kept < SATURATED]


def _note(name: str, kept: float) -> Finding:
    return Finding(
        "saturation", "info", name, kept, (kept, kept),
        f"{name!r} saturates: {kept:.0%} of its early variance inside groups is left in the last third of the steps. "
        "This is no sign of exploitation.",
    )  # fmt: skip
