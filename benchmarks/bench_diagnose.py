"""Time and peak memory of `polyreward diagnose` on 1,000,000 rollouts with 8 rewards, from Parquet file to report.

No peer diagnoses a log of rewards, so the table holds ours against the target: 20 s and 2 GB on 2 cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from polyreward.batch import RewardBatch

SECONDS, GIGABYTES = 20.0, 2.0


def write_log(path: Path, rollouts: int, rewards: int, size: int = 8, steps: int = 250) -> None:
    rng = np.random.default_rng(0)
    groups = rollouts // size
    quality = rng.standard_normal((groups, size))
    values = np.stack([0.7 * quality + 0.7 * rng.standard_normal(quality.shape) for _ in range(rewards)], -1).reshape(
        -1, rewards
    )
    values[:, 1] = values[:, 1] > 0
    values[:, 2] = 0.02 * rng.standard_normal(rollouts)  # something to find, so that the what-if runs too
    step = np.repeat(np.sort(rng.integers(0, steps, groups)), size)
    stratum = rng.integers(0, 4, rollouts)
    values[:, :2] += 3.0 * (stratum == 0)[:, None]
    task = np.array([f"task_{t}" for t in range(12)], dtype=object)[np.repeat(rng.integers(0, 12, groups), size)]
    columns = {
        "task": task, "stratum": stratum, "step": step, "length": np.exp(rng.normal(5, 0.4, rollouts)).round(),
        "logp": rng.normal(-1.2, 0.2, rollouts), "completion_hash": rng.integers(0, 1 << 40, rollouts),
    }  # fmt: skip
    names = ("verifier", *(f"reward_{k}" for k in range(1, rewards)))
    group = np.repeat(np.arange(groups), size)
    RewardBatch(torch.from_numpy(values), names, torch.from_numpy(group), columns).write_parquet(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=1_000_000)
    parser.add_argument("--rewards", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log, report = Path(folder) / "log.parquet", Path(folder) / "report.html"
        writer = (
            "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import bench_diagnose as bench; "
            "bench.write_log(pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))"
        )
        here = str(Path(__file__).parent)
        subprocess.run(
            [sys.executable, "-c", writer, here, str(log), str(options.rollouts), str(options.rewards)], check=True
        )
        megabytes = log.stat().st_size / 1e6
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        begin = time.perf_counter()
        command = [sys.executable, "-m", "polyreward", "diagnose", str(log), "--html", str(report)]
        run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(run.pid, 0)
        seconds = time.perf_counter() - begin
    peak = usage.ru_maxrss / (1 if sys.platform == "darwin" else 1024) / 1e3 * 1.048576
    print("## diagnose\n")
    print(
        f"`polyreward diagnose LOG --html REPORT` on {options.rollouts:,} rollouts x {options.rewards} rewards "
        f"({megabytes:.0f} MB of Parquet, 12 tasks,"
    )
    print("250 steps, 4 strata), start of Python, reading, what-if and HTML included.\n")
    print("| quantity | measured | target |\n|---|---|---|")
    print(f"| seconds | {seconds:.1f} | {SECONDS:.0f} |")
    print(f"| of these, seconds of one core | {usage.ru_utime + usage.ru_stime:.1f} | |")
    print(f"| peak memory, GB | {peak:.2f} | {GIGABYTES:.0f} |")
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
