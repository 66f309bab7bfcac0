"""Which combinations of rewards become one advantage when rewards are summed and then normalised.

Two samples of a group with different reward vectors but equal weighted sums get the same advantage, although the
rewards tell them apart. The figure is the share of such pairs among all pairs of a group that the rewards tell apart:
``1 - pairs with different sums / pairs with different vectors``. Normalising each reward first (GDPO, arXiv
2601.05242) keeps most of them apart.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from polyreward.audit.diagnose.estimates import ratio
from polyreward.audit.diagnose.evidence import Evidence
from polyreward.audit.diagnose.findings import CheckResult, Finding, Table, Tested

LOST = 0.1
TOLERANCE = 1e-4
EXAMPLES = 20_000


def check_collapse(evidence: Evidence) -> CheckResult:
    """Share of the distinctions that the sum loses, and the combinations that collapse most often."""
    if int((evidence.weights != 0).sum()) < 2:
        return CheckResult(
            not_checked={"combinations of rewards that collapse": "fewer than two rewards with a weight"}
        )
    vectors = fingerprint(evidence.values, evidence.valid, evidence.weights)
    sizes = evidence.sizes
    spread = float(np.sqrt(evidence.energy.sum() / max(sizes.sum(), 1)))
    if spread == 0:
        return CheckResult(not_checked={"combinations of rewards that collapse": "no group has a signal"})
    by_vector, _ = same_pairs(evidence.group, vectors, 0.0)
    by_sum, sum_class = same_pairs(evidence.group, evidence.total, TOLERANCE * spread)
    told_apart = sizes**2 - by_vector
    # equal vectors have equal sums, so what the sum joins beyond equal vectors is lost
    lost = np.clip(by_sum - by_vector, 0, None)
    if not told_apart.any():
        return CheckResult(
            not_checked={"combinations of rewards that collapse": "the rewards are constant in every group"}
        )
    estimate = evidence.estimate(np.stack([lost, told_apart], 1), ratio())
    low, high = estimate.interval
    examples = _examples(evidence, vectors, sum_class) if estimate.value > 0.01 else ()
    shown = f" Most often: {examples[0][0]} and {examples[0][1]}." if examples else ""
    finding = Finding(
        "collapse", "warning", " + ".join(n for n, w in zip(evidence.names, evidence.weights, strict=True) if w),
        estimate.value, (low, high),
        f"Summing the rewards before normalising loses {estimate.value:.0%} of what they tell apart (95 % interval "
        f"{low:.0%} to {high:.0%} of the pairs in a group): different rewards, same advantage.{shown}",
        "gdpo",
    )  # fmt: skip
    tables = {}
    if examples:
        tables["collapse"] = Table(
            "Combinations that get the same advantage", ("one sample", "another", "share"), examples
        )
    return CheckResult([Tested(estimate.above(LOST, LOST / 2), finding)], (), tables)


def fingerprint(values: np.ndarray, valid: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A number a sample that is equal for equal reward vectors and, for all practical purposes, only for them."""
    factors = np.random.default_rng(1).standard_normal(len(weights))
    mark = np.zeros(len(values))
    for k in np.flatnonzero(weights):
        mark += np.where(valid[:, k], values[:, k] * factors[k], 1e6 * factors[k])
    return mark


def same_pairs(group: np.ndarray, values: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Ordered pairs (a sample with itself included) of each group with the same value, and the class of each sample."""
    order = np.lexsort((values, group))
    ordered, at = values[order], group[order]
    fresh = np.empty(len(order), dtype=bool)
    fresh[0], fresh[1:] = True, (ordered[1:] - ordered[:-1] > tolerance) | (at[1:] != at[:-1])
    classes = np.empty(len(order), dtype=np.int64)
    classes[order] = np.cumsum(fresh) - 1
    counts = np.bincount(classes).astype(np.float64)
    return np.bincount(at[fresh], counts**2, int(group.max()) + 1), classes


def _examples(evidence: Evidence, vectors: np.ndarray, sum_class: np.ndarray) -> tuple[tuple[str, str, float], ...]:
    """The most frequent pairs of reward vectors with the same sum, among the first samples of the log."""
    rows = np.flatnonzero(evidence.group < max(1, int(EXAMPLES / max(evidence.sizes.mean(), 1))))[:EXAMPLES]
    order = rows[np.lexsort((vectors[rows], sum_class[rows]))]
    joined = (sum_class[order[1:]] == sum_class[order[:-1]]) & (vectors[order[1:]] != vectors[order[:-1]])
    pairs = Counter(
        (_words(evidence, int(a)), _words(evidence, int(b)))
        for a, b in zip(order[:-1][joined], order[1:][joined], strict=True)
    )
    whole = sum(pairs.values())
    return tuple((a, b, count / whole) for (a, b), count in pairs.most_common(6))


def _words(evidence: Evidence, row: int) -> str:
    entries = [
        f"{name} {evidence.values[row, k]:.3g}" if evidence.valid[row, k] else f"{name} –"
        for k, name in enumerate(evidence.names)
    ]
    return f"({', '.join(entries)})"
