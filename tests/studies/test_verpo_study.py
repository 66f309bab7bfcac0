import gzip
import json

import numpy as np
import pytest

from polyreward.rewards.execution import Program, Sandbox
from polyreward.rewards.unit_tests import tests_of
from polyreward.studies import verpo
from polyreward.studies.base import StudyConfig
from polyreward.studies.verpo import (
    OTHERS,
    RATES,
    STUDY,
    TUNED,
    Episodes,
    ProgramPolicies,
    episodes,
    passed_by,
    touched,
)
from polyreward.studies.verpo_mutants import compare, mutants, mutate, split_check
from polyreward.tasks.shortcut_programs import EASY, TESTS, program


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as made:
        yield made


def test_programs_do_what_their_fragments_say():
    rng = np.random.default_rng(0)
    fragments = np.concatenate([rng.integers(0, 5, (200, 6)), rng.integers(0, 2, (50, 6))])
    for choice, passed in zip(fragments, passed_by(fragments), strict=True):
        way = choice[0]
        easy = way in (1, 2) or (way == 0 and choice[5] == 0)
        assert passed.tolist() == [easy] * EASY + [bool(way == 0 and choice[slot] == 0) for slot in range(1, 5)]


def test_the_pass_table_holds_for_programs_that_are_run(sandbox):
    fragments = np.random.default_rng(1).integers(0, 5, (12, 6))
    fragments[:6, 0] = 0
    tests = tuple(entry.test for entry in tests_of(list(TESTS))[EASY - 2 :])
    results = sandbox.run([Program(program(choice), tests) for choice in fragments.tolist()])
    assert [result.passed.tolist() for result in results] == passed_by(fragments)[:, EASY - 2 :].tolist()


def test_a_general_program_with_one_mistake_passes_less_than_a_shortcut():
    right, slip, shortcut = passed_by(np.array([[0] * 6, [0, 0, 0, 0, 0, 1], [1] * 6]))
    assert (right.sum(), slip.sum(), shortcut.sum()) == (20, 4, 16)
    table = np.stack([shortcut] * 9 + [slip])
    calibrated, share = TUNED["VeRPO"], TUNED["pass rate"]
    for part, better in ((calibrated, True), (share, False)):
        values = part.rewards(table, np.zeros(10, int), "cpu")
        assert (values[-1] > values[0]) == better


def test_success_of_a_fresh_policy_is_one_in_five_to_the_sixth():
    policies = ProgramPolicies(0, 2)
    figures = policies.figures(2)
    assert figures[0] == figures[1]
    assert figures[0] == pytest.approx({"success": 5.0**-6, "shortcut": 0.4})


def test_success_equals_sampling():
    policies = ProgramPolicies(3, 1)
    policies.logits += 2 * (policies.fragment == 0)
    found = episodes(policies, 400, np.random.default_rng(0))
    first = found.passed[: len(found.lengths)]
    assert first.all(axis=1).mean() == pytest.approx(policies.figures(1)[0]["success"], abs=0.01)


def test_episodes_draw_again_what_a_failing_test_runs():
    fragments = np.array([[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 0, 0]])
    assert touched(fragments, passed_by(fragments)).astype(int).tolist() == [
        [1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0],
    ]  # fmt: skip
    found: Episodes = episodes(ProgramPolicies(0, 1), 4, np.random.default_rng(0))
    assert len(found.problem) == found.lengths.sum()
    assert np.bincount(found.trajectory).tolist() == found.lengths.tolist()
    assert found.lengths.max() <= 3
    assert found.drawn[: len(found.lengths)].all()
    assert found.solved.sum() == found.passed.all(axis=1).sum()


def test_training_is_repeatable_and_the_arms_part():
    first = verpo.train(TUNED["VeRPO"], 0, 100, (8.0,))
    assert first == verpo.train(TUNED["VeRPO"], 0, 100, (8.0,))
    assert first[0]["success"] > 0.3
    assert verpo.train(TUNED["pass rate"], 0, 100, (8.0,))[0]["shortcut"] > 0.8


def test_copies_of_easy_tests_do_not_turn_the_preference():
    right, slip, shortcut = passed_by(np.array([[0] * 6, [0, 0, 0, 0, 0, 1], [1] * 6]))
    table = np.stack([shortcut] * 8 + [slip, right])
    for copies in (1, 4, 16, 64):
        values = verpo.Arm(copies=copies).rewards(table, np.zeros(10, int), "cpu")
        assert values[8] > values[0]
        share = verpo.Arm("pass rate", copies=copies).rewards(table, np.zeros(10, int), "cpu")
        assert share[8] < share[0]


CHECK = """
METADATA = {}

def check(candidate):
    x = 3
    assert candidate(1) == x
    assert True
    for n in range(3):
        assert candidate(n) == n + 2
"""


def test_check_is_split_into_tests(sandbox):
    tests = split_check(CHECK, "f")
    assert len(tests) == 2
    result = sandbox.run([Program("def f(n):\n    return 3 if n == 1 else 0", tests)])[0]
    assert result.passed.tolist() == [True, False]


def test_mutants_are_different_programs():
    code = "def f(n):\n    return n + 2 if n > 1 and n < 5 else n == 3\n"
    found = mutate(code, np.random.default_rng(0), 10)
    assert len(set(found)) == 10
    assert code.strip() not in [mutant.strip() for mutant in found]
    assert found == mutate(code, np.random.default_rng(0), 10)
    assert mutate("def f(n):\n    return n\n", np.random.default_rng(0), 10) == []


def test_rankings_compared_by_hand():
    worked = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 1], [1, 1, 1, 1, 1, 0]], dtype=bool)
    agree = np.array([[1, 0], [1, 1], [0, 0]], dtype=bool)
    assert compare([worked, agree]) == {
        "problems": 2, "disagree": 0.5, "VeRPO passes the rarest": 1.0, "pass rate passes the rarest": 0.0,
    }  # fmt: skip
    assert compare([])["disagree"] == 0


def test_mutants_of_a_file(tmp_path):
    asserts = [f"assert candidate({n}) == {value}" for n, value in ((1, -1), (5, 3), (6, 7), (7, 5), (8, 9))]
    row = {
        "prompt": "def f(n):\n",
        "canonical_solution": "    if n > 5 and n % 2 == 0:\n        return n + 1\n    return n - 2\n",
        "entry_point": "f",
        "test": "\n    ".join(["def check(candidate):", *asserts]),
    }  # fmt: skip
    (tmp_path / "code").mkdir()
    with gzip.open(tmp_path / "code" / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n")
    found = mutants(tmp_path, 0)
    assert found["problems"] == 1
    with pytest.raises(FileNotFoundError, match="HumanEval"):
        mutants(tmp_path / "none", 0)


@pytest.mark.slow
def test_quick_run_is_finite_and_judged():
    figures = verpo.run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for each in figures.values() for value in each.values())
    assert STUDY.judge([figures]).verdict in ("supported", "not supported", "inconclusive")


def _figures(**success):
    levels = {
        "outcome": 0.03, "outcome, std": 0.2, "pass rate": 0.0, "pass rate + outcome": 0.0, "difficulty + outcome": 0.1,
        "VeRPO without outcome": 0.89, "VeRPO": 0.99,
    } | success  # fmt: skip
    run = {}
    for name, level in levels.items():
        for rate in RATES:
            run[f"{name}, rate {rate:g}"] = {
                "success": level - (0.1 if rate == 8 else 0),
                "shortcut": 0.1,
                "dead groups, last tenth": 0.2,
            }
    run |= {name: {"success": 0.5} for name in OTHERS}
    run |= {f"turns, gamma {gamma:g}": {"success": 1.0, "turns": gamma} for gamma in verpo.GAMMAS}
    return run


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "supported"),
        ({"VeRPO": 0.895}, "inconclusive"),
        ({"outcome, std": 0.41}, "inconclusive"),
        ({"pass rate + outcome": 0.11}, "inconclusive"),
        ({"difficulty + outcome": 0.31}, "inconclusive"),
        ({"VeRPO without outcome": 0.99}, "inconclusive"),
        ({"difficulty + outcome": 0.9}, "not supported"),
        ({"VeRPO": 0.15}, "not supported"),
    ],
)
def test_rule(changes, verdict):
    judged = STUDY.judge([_figures(**changes)] * 3)
    assert judged.verdict == verdict
    run = _figures(**changes) | {
        "mutants": {
            "problems": 9.0,
            "disagree": 0.1,
            "VeRPO passes the rarest": 0.9,
            "pass rate passes the rarest": 0.2,
        }
    }
    assert "of 9 groups" in STUDY.judge([run, _figures(**changes)]).summary
