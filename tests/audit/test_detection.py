"""A planted problem is found and nothing else, a clean log gives nothing: on logs of many forms, made independently."""

import json

import numpy as np
import pytest
import torch
from audit_logs import CLEAN, PLANTED, SHAPES, clean_log, planted_log, shapes_for

from polyreward.audit.diagnose import diagnose
from polyreward.batch import RewardBatch
from polyreward.tasks.synthetic_logs import SCENARIOS, clean


def problems(batch):
    return {finding.kind for finding in diagnose(batch, recompute=False).problems()}


@pytest.mark.parametrize("problem", PLANTED)
def test_a_planted_problem_is_found_and_no_other(problem):
    kind = PLANTED[problem][0]
    logs = [(shape, seed) for shape in shapes_for(problem) if shape != "20 groups" for seed in range(2)]
    found = {log: problems(planted_log(problem, *log)) for log in logs}
    assert {log: kinds for log, kinds in found.items() if kinds - {kind}} == {}
    assert sum(kind in kinds for kinds in found.values()) >= 0.8 * len(logs)
    assert all(kind in found["large", seed] for seed in range(2))


@pytest.mark.parametrize("problem", ["drowned", "scale", "length dependence", "less entropy"])
def test_plain_problems_show_in_twenty_groups(problem):
    assert problems(planted_log(problem, "20 groups", 1)) == {PLANTED[problem][0]}


@pytest.mark.slow
def test_false_positive_rate_on_clean_logs_of_every_form():
    logs = [(kind, shape) for kind in CLEAN for shape in SHAPES]
    assert len(logs) >= 200
    alarms = {log: found for log in logs if (found := problems(clean_log(*log, seed=len(log[0]))))}
    assert len(alarms) <= 0.05 * len(logs), alarms


@pytest.mark.slow
def test_false_positive_rate_on_the_scenarios():
    logs = [(seed, scenario) for scenario in SCENARIOS for seed in range(1000, 1005)]
    alarms = {log: found for log in logs if (found := problems(clean(*log)))}
    assert len(alarms) <= 0.05 * len(logs), alarms


@pytest.mark.parametrize("kind", ["saturating proxy", "saturating verifier", "all saturate", "one dominates"])
def test_saturation_and_domination_are_no_drift(kind):
    diagnosis = diagnose(clean_log(kind, "large", 0), recompute=False)
    assert diagnosis.problems() == []
    notes = {finding.kind for finding in diagnosis.findings}
    assert "driver" in notes
    assert ("saturation" in notes) == (kind != "one dominates")


def test_several_tasks_with_the_same_problem_are_one_finding():
    log = planted_log("heavy tail", "six tasks", 2)
    tails = [finding for finding in diagnose(log, recompute=False).problems() if finding.kind == "heavy tail"]
    assert len(tails) == 1
    assert "Tasks of which the same is true: 'task " in tails[0].statement


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.filterwarnings("error")
def test_any_log_is_diagnosed_without_a_crash_or_a_warning_of_numpy(seed):
    rng = np.random.default_rng(seed)
    rows, rewards = int(rng.integers(1, 60)), int(rng.integers(1, 5))
    columns = {
        "task": np.array(["a", "b", None], dtype=object)[rng.integers(0, 3, rows)],
        "step": torch.from_numpy(rng.integers(0, 12, rows)),
        "stratum": rng.choice([0.0, 1.5, np.nan], rows),
        "length": np.array([None, 3, 4.5], dtype=object)[rng.integers(0, 3, rows)],
        "completion": np.array(["x", None, "yy"], dtype=object)[rng.integers(0, 3, rows)],
        "logp": rng.normal(size=rows),
        "embedding": torch.from_numpy(rng.normal(size=(rows, 3))),
    }
    chosen = {name: column for name, column in columns.items() if rng.random() < 0.6}
    values = rng.choice([0.0, 1.0, 0.5, np.nan, 1e9, -3.0], (rows, rewards))
    names = tuple(f"r{k}" for k in range(rewards))
    group = torch.from_numpy(rng.integers(0, max(rows // 4, 1), rows))
    batch = RewardBatch(torch.from_numpy(values), names, group, chosen)
    weights = {name: float(rng.choice([0, 1, -1, 0.5])) for name in names}
    diagnosis = diagnose(batch, weights=weights, reference=rng.choice([None, "r0"]))
    json.dumps(diagnosis.to_dict(), allow_nan=False)
    assert all(finding.fix for finding in diagnosis.problems())
