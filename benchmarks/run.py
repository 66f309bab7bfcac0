"""Run every benchmark beside its peer and write benchmarks/README.md.

Each ``bench_*.py`` is a script that prints Markdown (a heading and a table of ratios) and exits with an error when a
peer and ours do not compute the same thing. ``--verl-python`` is handed to those that can time verl in its own
environment.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="bench_NAME.py to run; default all")
    parser.add_argument("--verl-python", help="interpreter of an environment with verl")
    options = parser.parse_args()
    scripts = [HERE / f"bench_{name}.py" for name in options.names] or sorted(HERE.glob("bench_*.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    sections, failed = [], []
    for script in scripts:
        command = [sys.executable, str(script)]
        if options.verl_python and "--verl-python" in script.read_text(encoding="utf-8"):
            command += ["--verl-python", options.verl_python]
        print(f"... {script.name}", flush=True)
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        print(run.stdout, end="")
        if run.returncode:
            print(run.stderr, file=sys.stderr)
            failed.append(script.name)
        else:
            sections.append(run.stdout.strip())
    if not options.names and not failed:
        date = datetime.date.today().isoformat()
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        note = f"Written by `make bench` on {date} ({machine}). Ratios are ours / peer unless a column says otherwise."
        text = "\n\n".join(["# Benchmarks", note, *sections])
        (HERE / "README.md").write_text(text + "\n", encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
