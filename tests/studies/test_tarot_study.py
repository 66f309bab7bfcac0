import gzip
import itertools
import json

import numpy as np
import pytest

from polyreward.rewards.execution import Program, Sandbox
from polyreward.rewards.unit_tests import tests_of
from polyreward.studies import tarot
from polyreward.studies.base import StudyConfig
from polyreward.studies.tarot import (
    ALL,
    ARMS,
    EASY_TO_HARD,
    HARD_FIRST,
    RATE,
    RATES,
    REGIMES,
    STATIC,
    STUDY,
    SlotPolicies,
    probe,
    released_sample,
    rewards_of,
    truth_table,
)
from polyreward.tasks.program_slots import NEEDS, TESTS, program


@pytest.mark.slow
def test_tiers_need_their_slots():
    table = truth_table()
    assert table.shape == (9, 8, 8, 8, 4)
    for choice in itertools.product(range(9), range(8), range(8), range(8)):
        expected = [choice[0] < 8 and all(choice[slot] == 0 for slot in slots) for slots in NEEDS.values()]
        assert table[choice].tolist() == ([False, False, False, True] if choice[0] == 8 else expected)


@pytest.mark.slow
def test_slots_that_a_test_does_not_call_do_not_matter():
    choices = np.random.default_rng(0).integers(0, [9, 8, 8, 8], size=(24, 4))
    choices[:12] *= np.random.default_rng(1).integers(0, 2, size=(12, 4))  # many right fragments
    tests = tuple(entry.test for entry in tests_of(list(TESTS)))
    with Sandbox() as sandbox:
        results = sandbox.run([Program(program(choice), tests) for choice in choices.tolist()])
    assert [r.passed.tolist() for r in results] == truth_table()[tuple(choices.T)].tolist()


def test_rewards_of_the_arms():
    passed = np.array([[True, False, True, False], [True] * 4])
    assert rewards_of(ALL, passed, 0.0).tolist() == [0, 1]
    assert rewards_of(STATIC, passed, 0.0) == pytest.approx([0.5, 1.0])
    assert rewards_of(EASY_TO_HARD, passed, 0.3) == pytest.approx([0.15, 0.30])
    assert rewards_of(HARD_FIRST, passed, 0.1) == pytest.approx([0.35, 0.35])


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
def test_policies_start_at_their_capability(regime):
    chances, degenerate = REGIMES[regime]
    policies = SlotPolicies(0, 2, chances, degenerate)
    assert policies.right().mean(axis=2) == pytest.approx(np.tile(chances, (2, 1)))
    assert policies.success() == pytest.approx([np.prod(chances)] * 2)
    assert (policies.fragment[0] == 8).sum() == (12 if degenerate else 0)
    figures = probe(0, chances, degenerate)
    assert figures["chooses hard first"] == float(regime == "strong")
    assert figures["pass rate, basic"] == pytest.approx(chances[0], abs=0.15)


@pytest.mark.slow
def test_hard_first_has_no_signal_for_the_weak():
    figures = tarot.train(HARD_FIRST, 0, 40, (RATE,), *REGIMES["weak"])[0]
    easy = tarot.train(EASY_TO_HARD, 0, 40, (RATE,), *REGIMES["weak"])[0]
    assert figures["dead groups, first fifth"] > 0.9 > easy["dead groups, first fifth"]
    assert easy == tarot.train(EASY_TO_HARD, 0, 40, (RATE,), *REGIMES["weak"])[0]


def test_released_sample_of_a_file(tmp_path):
    cases = [
        {"input": "3\n", "output": out, "label": label}
        for label, out in ((None, "4  5\n"), ("basic", "4 5\n"), ("high", "4\n"))
    ]
    row = {
        "gold_standard_solution": "```python\nn = int(input())\nprint(n + 1, n + 2)\n```",
        "verification_info": {"test_cases": cases},
    }
    (tmp_path / "code").mkdir()
    with gzip.open(tmp_path / "code" / "tarot_sample.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n")
    assert released_sample(tmp_path) == {
        "problems": 1, "cases": 3, "labelled cases passed": 1, "original, lines": 0, "original, tokens": 1,
    }  # fmt: skip
    with pytest.raises(FileNotFoundError, match="tarot_sample"):
        released_sample(tmp_path / "none")


@pytest.mark.slow
def test_quick_run_is_finite_and_judged():
    figures = tarot.run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for each in figures.values() for value in each.values())
    assert STUDY.judge([figures]).verdict in ("supported", "not supported", "inconclusive")


def _figures(weak=(0.58, 0.20), strong=(0.875, 0.93), degenerate=(0.52, 0.46), hard=(0.0, 1.0)):
    levels = {
        "weak": {EASY_TO_HARD: weak[0], HARD_FIRST: weak[1], STATIC: 0.75},
        "strong": {EASY_TO_HARD: strong[0], HARD_FIRST: strong[1], STATIC: 0.93},
        "degenerate": {EASY_TO_HARD: degenerate[0], HARD_FIRST: 0.0, STATIC: degenerate[1]},
    }
    run = {}
    for regime, known in levels.items():
        for name in ARMS:
            for rate in RATES:
                figures = {"success": known.get(name, 0.5), "dead groups, first fifth": 0.5}
                run[f"{regime}, {name}, rate {rate:g}"] = figures
        chosen = dict(zip(("weak", "strong"), hard, strict=True)).get(regime, 0.0)
        run[f"{regime}, probe"] = {"capability": 0.3, "chooses hard first": chosen}
    return run


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "supported"),
        ({"weak": (0.34, 0.20)}, "inconclusive"),
        ({"strong": (0.92, 0.93)}, "inconclusive"),
        ({"degenerate": (0.48, 0.46)}, "inconclusive"),
        ({"hard": (1.0, 1.0)}, "inconclusive"),
        ({"hard": (0.0, 0.0)}, "inconclusive"),
        ({"strong": (0.94, 0.93)}, "not supported"),
        ({"weak": (0.20, 0.58)}, "not supported"),
    ],
)
def test_rule(changes, verdict):
    judged = STUDY.judge([_figures(**changes)] * 3)
    assert judged.verdict == verdict
    assert "Best in the weak regime: binary" in judged.summary
