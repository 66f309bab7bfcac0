"""NDCG of many groups: ours beside scikit-learn's `ndcg_score`, and groups made of a large candidate set.

scikit-learn averages over ties and gives the mean over the rows, so ours is timed both without ties in its stable form
and as ``ties="expected"`` on whole scores, where the two must agree too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.metrics import ndcg_score

from polyreward.rewards.groupwise import GroupPartitioner
from polyreward.rewards.ranking import GroupRankReward
from polyreward.rewards.ranking_measures import ndcg

ROWS, ROUNDS, CANDIDATES = 20_000, 7, 100_000
# Target: ours takes at most this share of scikit-learn's time.
TARGET = 1.0


def median(call: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Milliseconds, median over the rounds after one that is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return 1000 * float(np.median(seconds[1:]))


def main() -> int:
    rng = np.random.default_rng(0)
    print("## Ranking\n")
    print("| groups | scores | scikit-learn, ms | ours, ms | ours / scikit-learn | target | |")
    print("|---|---|---|---|---|---|---|")
    for size in (10, 20, 100):
        gold = rng.random((ROWS, size)) * 10
        for kind in ("no ties", "whole scores"):
            whole = kind == "whole scores"
            scores = rng.integers(0, 11, size=gold.shape) * 1.0 if whole else rng.random(gold.shape)
            ties: Any = "expected" if whole else "stable"
            theirs, own = ndcg_score(gold, scores, k=10), float(np.mean(ndcg(scores, gold, 10, ties=ties)))
            if abs(theirs - own) > 1e-9:
                print(f"groups of {size}, {kind}: scikit-learn {theirs}, ours {own}", file=sys.stderr)
                return 1
            times = [
                median(lambda g=gold, s=scores: ndcg_score(g, s, k=10), 1 if whole else ROUNDS),
                median(lambda g=gold, s=scores, t=ties: ndcg(s, g, 10, ties=t)),
            ]
            ratio = times[1] / times[0]
            met = "met" if ratio <= TARGET else "missed"
            print(f"| {ROWS} of {size} | {kind} | {times[0]:.1f} | {times[1]:.1f} | {ratio:.3f} | {TARGET:g} | {met} |")
    gold, scores = rng.random((ROWS, 20)) * 10, rng.integers(0, 11, size=(ROWS, 20))
    full = median(lambda: GroupRankReward().of_scores(scores, gold))
    cut = median(lambda: GroupPartitioner(20)(CANDIDATES))
    print(f"\nGroupRank's whole reward of {ROWS} groups of 20: {full:.1f} ms.")
    print(f"{CANDIDATES} candidates into groups of 20: {cut:.1f} ms.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
