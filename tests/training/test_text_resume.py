from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_runs import history, resumable

from polyreward.data.rollouts import read_rollouts

SCRIPT = Path(__file__).parent / "text_runs.py"
UPDATES_ON_OLD_ROLLOUTS = {"num_iterations": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def assert_same_rollouts(one: Path, other: Path, *, exactly: bool = True) -> None:
    first, second = read_rollouts(one), read_rollouts(other)
    assert first.names == second.names
    assert set(first.columns) == set(second.columns)
    torch.testing.assert_close(first.rewards, second.rewards, rtol=0, atol=0, equal_nan=True)
    for name, values in first.columns.items():
        if name == "advantage" and not exactly:
            np.testing.assert_allclose(values, second.column(name), rtol=1e-6, atol=1e-7)
        else:
            assert list(values) == list(second.column(name)), name


@pytest.mark.parametrize("options", [{}, UPDATES_ON_OLD_ROLLOUTS, {"steps_per_generation": 4}])
def test_a_resumed_run_has_the_figures_of_an_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = resumable(tmp_path / "whole", **options)
    whole.train()
    resumable(tmp_path / "parts", **options).train()
    part = resumable(tmp_path / "parts", **options)
    part.train(resume_from_checkpoint=str(tmp_path / "parts" / "run" / "checkpoint-4"))
    expected, found = history(whole), history(part)
    assert found[-2:] == expected[-2:]
    assert whole.advantage.state_dict()
    assert part.advantage.state_dict() == whole.advantage.state_dict()
    assert part.curriculum.state_dict() == whole.curriculum.state_dict()
    assert_same_rollouts(tmp_path / "whole" / "rollouts", tmp_path / "parts" / "rollouts")


@pytest.mark.slow
def test_a_killed_run_resumes_without_duplicates(tmp_path: Path) -> None:
    resumable(tmp_path / "whole").train()
    killed = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "killed"), "--kill", "5"],
        env=environment(),
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr.decode()
    steps = read_rollouts(tmp_path / "killed" / "rollouts").column("step")
    assert sorted(set(steps.tolist())) == [1, 2, 3, 4, 5]  # step 5 lies after the checkpoint of step 4
    run = resumable(tmp_path / "killed")
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 6
    assert_same_rollouts(tmp_path / "whole" / "rollouts", tmp_path / "killed" / "rollouts")


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
                *(str(SCRIPT), str(folder), "--processes", str(processes)),
            ],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    assert_same_rollouts(tmp_path / "1" / "rollouts", tmp_path / "2" / "rollouts")
    one, two = (json.loads((tmp_path / n / "history.json").read_text()) for n in ("1", "2"))
    assert len(one) == 3
    local = ("objective/ratio/m", "objective/clip_fraction/", "objective/entropy/", "entropy")
    for expected, found in zip(one, two, strict=True):
        assert set(expected) == set(found)
        for name, value in expected.items():
            if not name.startswith(local):  # means of micro-batches, which hold other samples
                assert found[name] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)), name
