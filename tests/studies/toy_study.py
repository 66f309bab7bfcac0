"""A study for the tests of the runner. Seeds can be made to fail, to die or to wait; every call leaves a line.

Started as a program it is the command line with this study as the method ``toy``, and it says on stdout how many seeds
are kept after each write.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np

from polyreward.studies.base import Judgement, Study, arm, paired_bootstrap

WAIT_AT = 2


def run_seed(seed, config):
    folder = Path(os.environ["TOY_FOLDER"])
    with (folder / "calls").open("a") as calls:
        calls.write(f"{seed}\n")
    behaviour = os.environ.get("TOY_BEHAVIOUR", "")
    if seed == WAIT_AT and behaviour == "wait" and (folder / "gate").exists():
        (folder / "gate").read_text()  # a named pipe that nobody writes to
    if seed == WAIT_AT and behaviour == "fail":
        raise RuntimeError("the toy is broken")
    if seed == WAIT_AT and behaviour == "die":
        os._exit(7)
    if seed == WAIT_AT and behaviour == "nan":
        return {"ours": {"score": float("nan")}, "theirs": {"score": 0.0}}
    return {"ours": {"score": np.float32(seed + 1.0)}, "theirs": {"score": float(config.quick)}}


def judge(runs):
    gain = arm(runs, "ours", "score") - arm(runs, "theirs", "score")
    effect, interval = paired_bootstrap(gain)
    return Judgement("supported" if effect > 0 else "not supported", effect, interval, "Toy.", {"more": effect > 0})


STUDY = Study(
    slug="25-dump",
    method="dump",
    claim="Toys score more.",
    task="toys",
    baselines="theirs",
    measure="score",
    rule="ours > theirs",
    effect="score, ours minus theirs",
    full_scale="big toys",
    seeds=4,
    run_seed=run_seed,
    judge=judge,
    config={"size": 3, "rates": (1.0, 2.0)},
)


def main():
    import toy_study  # the importable name, so that worker processes find run_seed

    from polyreward import catalogue, cli
    from polyreward.storage import write_json
    from polyreward.studies import runner

    sys.modules["polyreward.studies.dump"] = toy_study

    def announce(path, value):
        write_json(path, value)
        print(json.dumps({"kept": len(value.get("runs", ()))}), flush=True)

    runner.write_json = announce
    assert catalogue.find("dump").load_study() is toy_study.STUDY
    with contextlib.suppress(BrokenPipeError):
        cli.main()


if __name__ == "__main__":
    main()
