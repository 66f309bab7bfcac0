"""Loss of diversity over the steps: fewer distinct completions in a group, or a collapsing entropy.

From the texts (or a hash of them): the share of distinct completions among those of a group. From ``embedding``
columns: one minus the squared length of the mean unit vector of the group. From ``entropy``, or ``logp`` (mean
log-probability of the tokens, of which minus the mean estimates the entropy): its level. A loss is the relative drop
from the first to the last third of the steps.
"""

from __future__ import annotations

import numpy as np

from polyreward.audit.diagnose.evidence import TEXTS, Evidence
from polyreward.audit.diagnose.findings import CheckResult, Finding, Table, Tested
from polyreward.grouped import factorize

LOST_TEXTS = 0.25
LOST_ENTROPY = 0.6
WINDOWS = 12


def check_diversity(evidence: Evidence) -> CheckResult:
    """Relative drop of each measure of diversity that the log allows."""
    what = "loss of diversity"
    if evidence.thirds is None:
        return CheckResult(not_checked={what: "no column 'step' with at least six distinct steps"})
    measures = _measures(evidence)
    if not measures:
        return CheckResult(
            not_checked={
                what: f"no column among {', '.join(('completion_hash', *TEXTS, 'embedding', 'entropy', 'logp'))}"
            }
        )
    first, last = evidence.thirds
    tests, rows = [], []
    for name, (sums, counts, threshold, words) in measures.items():
        both = np.stack([sums * first, counts * first, sums * last, counts * last], 1)
        estimate = evidence.estimate(
            both, lambda s: 1 - (s[..., 2] / s[..., 3]) / (s[..., 0] / s[..., 1]), (first | last) & (counts > 0)
        )
        early, late = (float(sums[part].sum() / max(counts[part].sum(), 1e-300)) for part in (first, last))
        if early <= 0:
            continue
        low, high = estimate.interval
        finding = Finding(
            "loss of diversity", "warning", name, estimate.value, (low, high),
            f"{words} falls by {estimate.value:.0%} over the steps (95 % interval {low:.0%} to {high:.0%}), from "
            f"{early:.2f} to {late:.2f}: the policy gives ever more alike answers.",
            "entropy-shaping",
        )  # fmt: skip
        tests.append(Tested(estimate.above(threshold), finding))
        rows += _windows(evidence, name, sums, counts)
    return CheckResult(
        tests, (), {"diversity": Table("Diversity over the steps", ("measure", "step", "value"), tuple(rows))}
    )


def _measures(evidence: Evidence) -> dict[str, tuple[np.ndarray, np.ndarray, float, str]]:
    """Per measure: sums and counts by group, the drop that matters, and its name in words."""
    measures: dict[str, tuple[np.ndarray, np.ndarray, float, str]] = {}
    text = next((name for name in ("completion_hash", *TEXTS) if evidence.column(name) is not None), None)
    real = evidence.sizes > 1
    if text is not None:
        distinct = _distinct(evidence, text)
        measures["distinct completions"] = (
            np.where(real, distinct - 1, 0.0), np.where(real, evidence.sizes - 1, 0.0), LOST_TEXTS,
            "The share of distinct completions in a group",
        )  # fmt: skip
    embedding = evidence.column("embedding")
    if embedding is not None and embedding.ndim == 2 and embedding.dtype.kind == "f":
        unit = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-12)
        spread = 1 - ((evidence.sum(unit) / evidence.sizes[:, None]) ** 2).sum(axis=1)
        measures["spread of embeddings"] = (
            np.where(real, spread, 0.0), real.astype(float), LOST_TEXTS, "The spread of the embeddings in a group",
        )  # fmt: skip
    for name, sign in (("entropy", 1.0), ("logp", -1.0)):
        values = evidence.numbers(name)
        if values is not None:
            known = np.isfinite(values)
            level = evidence.sum(np.where(known, sign * values, 0.0))
            measures["entropy"] = (level, evidence.sum(known), LOST_ENTROPY, "The entropy of the policy")
            break
    return measures


def _distinct(evidence: Evidence, name: str) -> np.ndarray:
    values = evidence.column(name)
    assert values is not None
    if values.dtype.kind == "O":
        values = np.array([hash(v) if isinstance(v, str) else hash(str(v)) for v in values.tolist()], dtype=np.int64)
    codes = factorize(values, name=f"column {name!r}").codes.numpy()
    order = np.lexsort((codes, evidence.group))
    ordered, at = codes[order], evidence.group[order]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (ordered[1:] != ordered[:-1]) | (at[1:] != at[:-1])
    return np.bincount(at[fresh], minlength=evidence.groups).astype(float)


def _windows(evidence: Evidence, name: str, sums: np.ndarray, counts: np.ndarray) -> list[tuple[object, ...]]:
    assert evidence.steps is not None
    distinct = np.unique(evidence.steps)
    window = np.searchsorted(distinct, evidence.steps) * min(WINDOWS, len(distinct)) // len(distinct)
    number = int(window.max()) + 1
    total, count = np.bincount(window, sums, number), np.bincount(window, counts, number)
    step = np.bincount(window, evidence.steps, number) / np.maximum(np.bincount(window, minlength=number), 1)
    return [(name, float(step[w]), float(total[w] / count[w])) for w in range(number) if count[w] > 0]
