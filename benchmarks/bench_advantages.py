"""Time from rewards and group ids to advantages: our presets beside verl's `grpo` and `grpo_vectorized`.

verl lives in an environment of its own (``make .venv-verl/.ready``), in which polyreward is installed too: with
``--verl-python`` the whole comparison runs in that interpreter, both in one process and on the same tensors. Ours
includes what verl's does: ids to codes, and the `RewardBatch`.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyreward.advantages import PRESETS, compute_advantages, preset
from polyreward.batch import RewardBatch

ROWS, SIZE, REWARDS = 65_536, 8, 8
DEFAULT_PYTHON = Path(".venv-verl/bin/python")
# Target ratios: ours to verl's grpo_vectorized by integer and by string ids, a preset to our grpo, 8 rewards to one.
INTEGERS, STRINGS, PRESET, WIDE = 1.0, 1 / 3, 3.0, 3.0


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each call, the median over rounds that run all of them in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):  # the first two rounds are not counted
        for name, call in list(calls.items())[:: 1 if turn % 2 else -1]:
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return {name: 1000 * float(np.median(times[2:])) for name, times in seconds.items()}


def case(device: str = "cpu") -> dict[str, Any]:
    """Rewards, ids and columns of one batch: shuffled groups, one in eight of them with equal rewards."""
    generator = torch.Generator().manual_seed(0)
    group = (torch.arange(ROWS) // SIZE)[torch.randperm(ROWS, generator=generator)]
    rewards = torch.randn(ROWS, REWARDS, generator=generator)
    rewards[group % 8 == 0] = 0.5
    names = np.array(
        [str(uuid.UUID(int=(i + 1) * 0x9E3779B97F4A7C15F39CC0605CEDC834 % 2**128)) for i in range(ROWS // SIZE)]
    )
    columns = {
        "task": group % 12, "stratum": torch.randint(0, 4, (ROWS,), generator=generator),
        "length": torch.randint(1, 512, (ROWS,), generator=generator),
    }  # fmt: skip
    return {
        "one": rewards[:, 0].contiguous().to(device), "several": rewards.to(device), "group": group.to(device),
        "strings": names.astype(object)[group.numpy()], "columns": {n: c.to(device) for n, c in columns.items()},
    }  # fmt: skip


def ours(
    data: dict[str, Any], name: str = "grpo", rewards: str = "one", ids: str = "group"
) -> Callable[[], torch.Tensor]:
    transform = preset(name)

    def call() -> torch.Tensor:
        return compute_advantages(transform, RewardBatch(data[rewards], groups=data[ids], columns=data["columns"]))

    return call


def verl(data: dict[str, Any], estimator: Any, ids: str = "group") -> Callable[[], torch.Tensor]:
    index = data[ids].numpy() if isinstance(data[ids], torch.Tensor) else data[ids]
    mask, scores = torch.ones(ROWS, 1), data["one"].unsqueeze(1)

    def call() -> torch.Tensor:
        advantages: torch.Tensor = estimator(scores, mask, index)[0]
        return advantages.squeeze(1)

    return call


def row(*cells: Any) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def verdict(ratio: float, target: float) -> str:
    return "met" if ratio <= target else "missed"


def beside_verl(data: dict[str, Any], rounds: int) -> int:
    """The tables with verl; 1 when the two do not compute the same thing."""
    from verl.trainer.ppo import core_algos

    loop, vectorized = core_algos.compute_grpo_outcome_advantage, core_algos.compute_grpo_vectorized_outcome_advantage
    expected = ours(data)()
    results = {
        "grpo": verl(data, loop)(),
        "grpo_vectorized": verl(data, vectorized)(),
        "grpo_vectorized by strings": verl(data, vectorized, "strings")(),
        "ours by strings": ours(data, ids="strings")(),
    }
    for name, found in results.items():
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
            print(f"{name} and ours differ by {float((found - expected).abs().max())}", file=sys.stderr)
            return 1
    begin = time.perf_counter()
    verl(data, loop)()
    once = 1000 * (time.perf_counter() - begin)
    times = medians(
        {
            "ours": ours(data), "verl": verl(data, vectorized),
            "ours strings": ours(data, ids="strings"), "verl strings": verl(data, vectorized, "strings"),
        },
        rounds,
    )  # fmt: skip
    print("| ids | verl `grpo`, ms | verl `grpo_vectorized`, ms | ours, ms | ours / vectorized | target | |")
    print("|---|---|---|---|---|---|---|")
    ratio = times["ours"] / times["verl"]
    row(
        "integers",
        f"{once:.0f}",
        f"{times['verl']:.2f}",
        f"{times['ours']:.2f}",
        f"{ratio:.2f}",
        f"{INTEGERS:.2f}",
        verdict(ratio, INTEGERS),
    )
    ratio = times["ours strings"] / times["verl strings"]
    row(
        "strings (uuid)",
        "",
        f"{times['verl strings']:.2f}",
        f"{times['ours strings']:.2f}",
        f"{ratio:.2f}",
        f"{STRINGS:.2f}",
        verdict(ratio, STRINGS),
    )
    print()
    return 0


def alone(data: dict[str, Any], rounds: int) -> None:
    """Our presets beside our grpo, with one reward and with eight."""
    one = medians({name: ours(data, name) for name in PRESETS}, rounds)
    several = medians({name: ours(data, name, "several") for name in PRESETS}, max(3, rounds // 2))
    print(
        f"Integer ids, columns given; factorisation of ids and columns included. `grpo` takes {one['grpo']:.2f} ms.\n"
    )
    print(f"| preset | ms | / `grpo` | target | | {REWARDS} rewards, ms | / one reward | target | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in PRESETS:
        ratio, wide = one[name] / one["grpo"], several[name] / one[name]
        cells = (f"{ratio:.1f}", f"{PRESET:.0f}", verdict(ratio, PRESET), f"{several[name]:.2f}")
        row(f"`{name}`", f"{one[name]:.2f}", *cells, f"{wide:.1f}", f"{WIDE:.0f}", verdict(wide, WIDE))
    print()


def on_cuda(rounds: int) -> None:
    data = case("cuda")

    def waiting(call: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def both() -> None:
            call()
            torch.cuda.synchronize()

        return both

    calls = {
        name: waiting(ours(data, name)) for name in ("grpo", "gdpo", "stratified-grpo", "ema-grpo", "gaussian-grpo")
    }
    print(
        f"On {torch.cuda.get_device_name()}, ms: "
        + ", ".join(f"{n} {ms:.2f}" for n, ms in medians(calls, rounds).items())
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--verl-python", help="interpreter of an environment with verl and polyreward")
    parser.add_argument("--in-verl", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    python = options.verl_python or (str(DEFAULT_PYTHON) if DEFAULT_PYTHON.exists() else None)
    if python and not options.in_verl:
        command = [python, str(Path(__file__).resolve()), "--in-verl", "--rounds", str(options.rounds)]
        return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    data = case()
    print("## Advantages: our presets beside verl's grpo\n")
    shape = f"{ROWS:,} rollouts in {ROWS // SIZE:,} shuffled groups of {SIZE}"
    print(f"{shape}, float32, one thread, medians of {options.rounds} rounds.\n")
    if options.in_verl:
        failed = beside_verl(data, options.rounds)
        if failed:
            return failed
    else:
        print("No interpreter with verl (--verl-python): ours alone.\n")
    alone(data, options.rounds)
    if torch.cuda.is_available():
        on_cuda(options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
