"""Gaussian box rewards of GUI grounding beside the arithmetic of their released code, which scores one pair at a time.

The peer is the released formula (2 x 2 matrices with numpy, one pair a call) written as a loop, timed on a part of the
pairs and scaled up. The target for ours: 1,000,000 pairs in less than 1 s.
"""

from __future__ import annotations

import argparse
import math
import sys
import time

import numpy as np
import torch

from polyreward.rewards.gaussian_boxes import BoxReward

SECONDS, ALPHA = 1.0, 0.5


def pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    corner, size = rng.uniform(0, 1800, (count, 2)), np.exp(rng.uniform(np.log(20), np.log(400), (count, 2)))
    target = np.concatenate([corner, corner + size], 1)
    shift, scale = rng.normal(0, 0.6, (count, 2)) * size, np.exp(rng.normal(0, 0.3, (count, 2)))
    center = corner + size / 2 + shift
    return np.concatenate([center - size * scale / 2, center + size * scale / 2], 1), target


def one_pair(pred: np.ndarray, target: np.ndarray) -> float:
    """Both rewards of one pair, each rounded."""
    apart = np.array([(pred[k] + pred[k + 2]) / 2 - (target[k] + target[k + 2]) / 2 for k in (0, 1)])
    spreads = [np.diag([((box[2] - box[0]) * ALPHA) ** 2, ((box[3] - box[1]) * ALPHA) ** 2]) for box in (pred, target)]
    point = math.exp(-0.5 * sum(apart[k] ** 2 / spreads[1][k, k] for k in (0, 1)))
    mean = sum(spreads) / 2
    first = apart @ np.linalg.inv(mean) @ apart / 8
    product = np.linalg.det(spreads[0]) * np.linalg.det(spreads[1])
    cover = math.exp(-first - 0.5 * math.log(np.linalg.det(mean) / math.sqrt(product)))
    return round(point, 3) + round(cover, 3)


def best_of(call, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--peer-pairs", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pred, target = pairs(options.pairs)
    part = min(options.peer_pairs, options.pairs)
    reward = BoxReward()
    expected = [one_pair(p, t) for p, t in zip(pred[:part], target[:part], strict=True)]
    # a value within rounding of the third decimal may fall on either side
    if not np.allclose(reward(pred[:part], target[:part]), expected, atol=1.001e-3) or (
        np.mean(np.abs(reward(pred[:part], target[:part]) - expected) > 1e-6) > 1e-3
    ):
        print("ours and the released arithmetic differ", file=sys.stderr)
        return 1
    peer = best_of(lambda: [one_pair(p, t) for p, t in zip(pred[:part], target[:part], strict=True)], 2)
    peer *= options.pairs / part
    print("## box rewards\n")
    print(
        f"`BoxReward(kind)` on {options.pairs:,} pairs of boxes, float64, one thread, beside the released arithmetic of"
    )
    print(f"both Gaussian rewards in a loop ({part:,} pairs, scaled up: {peer:.1f} s).\n")
    print("| kind | arrays | seconds | target | ours / peer |\n|---|---|---|---|---|")
    for name, one, other in (
        ("numpy", pred, target),
        ("torch", torch.from_numpy(pred), torch.from_numpy(target)),
    ):
        for kind in ("gaussian", "gaussian_point", "gaussian_coverage", "point+iou"):
            seconds = best_of(lambda k=kind, p=one, t=other: BoxReward(k)(p, t), 3)
            ratio = f"{seconds / peer:.4f}" if kind == "gaussian" else ""
            print(f"| {kind} | {name} | {seconds:.2f} | {SECONDS:.0f} | {ratio} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
