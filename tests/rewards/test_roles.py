import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.advantages.presets import dr_grpo, grpo_trl
from polyreward.advantages.transform import compute_advantages
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.rewards.roles import (
    RoleAnswersReward,
    RoleAwareAccuracy,
    ShapedReward,
    cantelli_bound,
    convergent_accuracy,
    divergent_accuracy,
    multirole_r1,
    role_answers,
)
from polyreward.rewards.text_diversity import DiversityReward

DIVERGENT, CONVERGENT = RoleAwareAccuracy(), RoleAwareAccuracy("convergent")


def test_worked_answers():
    assert CONVERGENT(["A", "B", "A"], "A") == 1
    assert DIVERGENT(["C", "A", "C"], ["C", "A", "B"]) == pytest.approx(2 / 3)
    assert DIVERGENT({"x": "C", "y": "A", "z": "C"}, {"x": "C", "y": "A", "z": "B"}) == pytest.approx(2 / 3)
    assert CONVERGENT({"x": "A", "y": "B", "z": "A"}, "A") == 1
    assert CONVERGENT(["A", "B", "B"], "A") == 0


@pytest.mark.parametrize(
    ("answers", "truth", "value"),
    [
        (["A", None, "C"], ["A", "B", "C"], 2 / 3),
        (["A", math.nan], ["A", "B"], 1 / 2),
        (["A"], ["A", "B"], 1 / 2),
        ({"x": "A"}, {"x": "A", "y": "B"}, 1 / 2),
        ({}, {"x": "A"}, 0),
        ([], ["A"], 0),
        (["B", "A"], {"x": "A", "y": "A"}, 1 / 2),
        (["A", "B", "A"], "A", 2 / 3),
        (np.array(["A", "B"]), np.array(["A", "C"]), 1 / 2),
        (torch.tensor([1, 2]), [1, 3], 1 / 2),
        ([["A", "B"]], {"x": ["A", "B"]}, 1),
    ],
)
def test_divergent(answers, truth, value):
    assert DIVERGENT(answers, truth) == pytest.approx(value)


@pytest.mark.parametrize(
    ("answers", "value"),
    [
        (["A"], 1),
        (["B"], 0),
        (["A", "B"], 0),  # a tie
        (["A", "A", "B", "B", "C"], 0),
        (["A", "A", "B", "C"], 1),
        (["A", None, None], 0),
        (["A", None], 0),
        (["A", "A", None], 1),
        (["A", "A", None, math.nan], 0),  # missing answers are one wrong option
        ([None, None], 0),
        ([], 0),
    ],
)
def test_convergent_with_ties_and_missing_answers_as_wrong(answers, value):
    assert CONVERGENT(answers, "A") == value


def test_roles_that_were_asked_for_but_do_not_answer_count():
    truth = {"x": "A", "y": "B", "z": "C"}
    assert DIVERGENT({"x": "A"}, truth, roles=["x", "y"]) == 1 / 2
    assert DIVERGENT(["A", "B"], truth, roles=["x", "y"]) == 1
    assert CONVERGENT({"x": "A"}, "A", roles=["x", "y", "z"]) == 0
    assert CONVERGENT({"x": "A", "y": "A"}, "A", roles=["x", "y", "z"]) == 1


def test_random_ties_are_right_as_often_as_labels_tie():
    rule, rng = RoleAwareAccuracy("convergent", tie="random"), np.random.default_rng(0)
    values = [rule(["A", "B", "C"], "A", rng=rng) for _ in range(3000)]
    assert set(values) == {0.0, 1.0}
    assert np.mean(values) == pytest.approx(1 / 3, abs=0.04)
    assert rule(["A", "A", "C"], "A", rng=rng) == 1
    with pytest.raises(InvalidInputError, match="needs a generator"):
        rule(["A", "B"], "A")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DIVERGENT({"w": "A"}, {"x": "A"}), "the truth has no role 'w'"),
        (lambda: DIVERGENT(["A"], {"x": "A"}, roles=["y"]), "the truth has no role 'y'"),
        (lambda: DIVERGENT(["A", "B"], ["A"]), "2 answers for 1 roles"),
        (lambda: DIVERGENT(["A"], {"x": None}), "a truth is missing"),
        (lambda: CONVERGENT(["A"], None), "a truth is missing"),
        (lambda: CONVERGENT(["A"], {"x": "A"}), "one truth for all roles"),
        (lambda: CONVERGENT(["A"], ["A", "B"]), "one truth for all roles"),
    ],
)
def test_wrong_references_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_mode_and_tie():
    with pytest.raises(UnknownNameError, match="did you mean 'divergent'"):
        RoleAwareAccuracy("divergnt")
    with pytest.raises(UnknownNameError, match="tie 'right'"):
        RoleAwareAccuracy(tie="right")


labels = st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=6)


@given(labels, st.integers(0, 3))
def test_arrays_equal_a_plain_loop(rows, truth):
    answers = np.array(rows)
    expected = []
    for row in rows:
        (top, most), *rest = Counter(row).most_common()
        expected.append(float(top == truth and all(count < most for _, count in rest)))
    assert convergent_accuracy(answers, np.array(truth)).tolist() == expected
    assert CONVERGENT(answers, np.full(len(rows), truth)).tolist() == expected
    assert CONVERGENT(torch.tensor(rows), torch.full((len(rows),), truth)).tolist() == expected
    assert [CONVERGENT(row, truth) for row in rows] == expected
    right = divergent_accuracy(answers, answers[0])
    assert right == pytest.approx([sum(a == b for a, b in zip(row, rows[0], strict=True)) / 5 for row in rows])
    assert DIVERGENT(torch.tensor(rows), torch.tensor(rows[0])).tolist() == pytest.approx(right)


def test_shaped_reward():
    assert ShapedReward()(1.0, 0.5) == pytest.approx(0.95)
    assert ShapedReward(0.8)(np.array([1.0, 0.0]), np.array([0.5, 1.0])).tolist() == pytest.approx([0.9, 0.2])
    assert ShapedReward(0.5)(torch.tensor([1.0]), torch.tensor([0.5])).tolist() == [0.75]
    assert ShapedReward(1.0)(0.3, 0.9) == 0.3
    for delta in (-0.1, 1.1, math.nan, "a"):
        with pytest.raises(InvalidInputError, match="delta must lie in"):
            ShapedReward(delta)


values = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12)


@given(values, st.floats(0, 1))
def test_variance_identity(pairs, delta):
    accuracy, diversity = np.array(pairs).T
    total = ShapedReward(delta)(accuracy, diversity)
    covariance = np.cov(accuracy, diversity, ddof=0) if len(pairs) > 1 else np.zeros((2, 2))
    expected = (
        delta**2 * covariance[0, 0] + (1 - delta) ** 2 * covariance[1, 1] + 2 * delta * (1 - delta) * covariance[0, 1]
    )
    assert total.var() == pytest.approx(expected, abs=1e-12)
    constant = ShapedReward(delta)(np.full(len(pairs), 0.5), diversity)
    assert constant.var() == pytest.approx((1 - delta) ** 2 * diversity.var(), abs=1e-12)


def test_equal_accuracies_leave_diversity_at_full_strength_after_scaling_and_not_after_centring():
    diversity = np.array([0.1, 0.2, 0.6, 0.7])
    scaled, centred = [], []
    for delta in (0.5, 0.9):
        batch = RewardBatch(torch.tensor(ShapedReward(delta)(np.ones(4), diversity)))
        scaled.append(compute_advantages(grpo_trl(), batch).numpy())
        centred.append(compute_advantages(dr_grpo(), batch).numpy())
    np.testing.assert_allclose(scaled[0], scaled[1], rtol=5e-3)
    np.testing.assert_allclose(centred[0], 5 * centred[1])


@pytest.mark.parametrize(("correlation", "bound"), [(0, 0.636364), (0.5, 0.777778), (1, 0.84)])
def test_cantelli(correlation, bound):
    assert cantelli_bound(3, 0.7, correlation) == pytest.approx(bound, abs=5e-7)


def test_cantelli_bounds_the_error_of_independent_and_of_copied_roles():
    for roles, accuracy in itertools.product((1, 3, 5), (0.6, 0.7, 0.9)):
        need = roles // 2 + 1
        error = 1 - sum(
            math.comb(roles, k) * accuracy**k * (1 - accuracy) ** (roles - k) for k in range(need, roles + 1)
        )
        assert error <= cantelli_bound(roles, accuracy, 0.0)
        assert 1 - accuracy <= cantelli_bound(roles, accuracy, 1.0) + 1e-12
    for wrong in ((0, 0.7, 0), (3, 0.5, 0), (3, 0.7, 1.1), (3, 0.7, -0.6)):
        with pytest.raises(InvalidInputError, match="cantelli_bound needs"):
            cantelli_bound(*wrong)


def test_role_answers_of_text():
    text = "reasoning: long\n- **Teacher**: B.\nTEACHER: (C)\nstudent: -1\nnurse :\nFinal answer: D\nno colon"
    assert role_answers(text) == {"reasoning": "long", "teacher": "(c)", "student": "-1"}
    assert role_answers(text, ["Teacher", "Student", "Doctor"]) == {"teacher": "(c)", "student": "-1"}
    assert role_answers("") == {}
    assert role_answers("x" * 81 + ": a") == {}


TRUTH = {"Teacher": "A", "Student": "B", "Nurse": "C"}
BEST = "thoughts\nTeacher: A\nStudent: B\nNurse: C"


def test_reward_of_text():
    reward = RoleAnswersReward()
    texts = [BEST, "teacher: a", "Teacher: B\nTeacher: A\nDoctor: Z", "", "Teacher A"]
    assert reward(None, texts, answer=[TRUTH] * 5) == pytest.approx([1, 1 / 3, 1 / 3, 0, 0])
    assert reward(None, [BEST, BEST], answer=[json.dumps(TRUTH), None]) == [1, None]
    padded = TRUTH | {"Pilot": None, "Cook": math.nan}
    assert reward(None, [BEST], answer=[padded]) == [1]
    asked = RoleAnswersReward(roles="roles")
    assert asked(None, [BEST, BEST], answer=[TRUTH] * 2, roles=[["Teacher", "Nurse"], None]) == [1, None]
    inside = RoleAnswersReward(extract="<answer>")
    assert inside(None, [BEST, f"Teacher: Z <answer>{BEST}</answer>"], answer=[TRUTH] * 2) == [0, 1]


def test_convergent_reward_of_text():
    reward = RoleAnswersReward(mode="convergent")
    texts = ["x: A\ny: B\nz: A\nFinal answer: A", "x: A\ny: B", "", "x: a"]
    assert reward(None, texts, answer=["A"] * 4) == [1, 0, 0, 1]
    asked = RoleAnswersReward(mode="convergent", roles="roles")
    assert asked(None, ["x: A", "x: A\ny: A\nw: B"], answer=["A"] * 2, roles=[["x", "y", "z"]] * 2) == [0, 1]
    assert reward(None, ["x: 7"], answer=[7]) == [1]


@pytest.mark.parametrize(
    ("reward", "bad"),
    [(RoleAnswersReward(), bad) for bad in ("x", "[1]", {}, ["A"], {"x": None}, 3)]
    + [(RoleAnswersReward(mode="convergent"), bad) for bad in ("", ["A"], {"x": "A"})],
)
def test_bad_truths_name_column_and_row(reward, bad):
    good = TRUTH if reward.mode == "divergent" else "A"
    with pytest.raises(InvalidInputError, match="reward 'role_answers_reward': column 'answer', row 1"):
        reward(None, ["x: A"] * 2, answer=[good, bad])


def test_roles_without_truth_and_empty_roles_name_column_and_row():
    reward = RoleAnswersReward(roles="roles")
    with pytest.raises(InvalidInputError, match="column 'answer', row 0: the truth has no role 'pilot'"):
        reward(None, ["Teacher: A"], answer=[TRUTH], roles=[["Teacher", "Pilot"]])
    with pytest.raises(InvalidInputError, match="column 'roles', row 0: expected a list of roles"):
        reward(None, ["Teacher: A"], answer=[TRUTH], roles=["Teacher"])


def test_the_whole_reward():
    reward = multirole_r1(weights="table")
    assert reward.__name__ == "multirole_r1"
    diversity = DiversityReward("table")(None, [BEST, "nothing here"])
    values = reward(None, [BEST, "nothing here", BEST], answer=[TRUTH, TRUTH, None])
    assert values == [pytest.approx(0.9 + 0.1 * diversity[0]), pytest.approx(0.1 * diversity[1]), None]
    alone = multirole_r1(delta=1.0)(None, [BEST], answer=[TRUTH])
    assert alone == [1.0]
