"""Figures of single checks against values worked by hand or by another implementation."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from polyreward.audit.diagnose import diagnose
from polyreward.audit.diagnose.dead_groups import check_dead_groups
from polyreward.audit.diagnose.driver import check_driver
from polyreward.audit.diagnose.estimates import Estimate, jackknife, ratio
from polyreward.audit.diagnose.evidence import Evidence
from polyreward.audit.diagnose.saturation import kept_spread
from polyreward.audit.diagnose.scale import check_scale
from polyreward.audit.diagnose.shape import check_shape
from polyreward.audit.diagnose.strata import check_strata
from polyreward.audit.diagnose.trends import Pair
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.tasks.synthetic_logs import clean


def batch_of(rewards, groups, names=(), **columns):
    return RewardBatch(torch.as_tensor(np.asarray(rewards, dtype=np.float64)), names, torch.as_tensor(groups), columns)


def test_a_warning_needs_the_size_and_the_evidence():
    small, sure, unsure = Estimate(0.08, 0.001, 50), Estimate(0.12, 0.01, 50), Estimate(0.12, 0.1, 50)
    assert small.above(0.1, 0.05) == 1.0
    assert sure.above(0.1, 0.05) == pytest.approx(stats.t.sf(7, 50))
    assert unsure.above(0.1, 0.05) == pytest.approx(stats.t.sf(0.7, 50))
    assert Estimate(-0.12, 0.01, 50).below(-0.1, -0.05) == pytest.approx(stats.t.sf(7, 50))
    assert Estimate(-0.12, 0.01, 50).beyond(0.1, 0.05) == pytest.approx(2 * stats.t.sf(7, 50))
    assert Estimate(0.5, 0.0, 3).above(0.1) == 1.0, "too few units"
    assert Estimate(0.5, 0.0, 9).above(0.1) == 0.0
    assert Estimate(float("nan"), 0.1, 9).above(0.1) == 1.0
    assert Estimate(0.5, 0.3, 9).minus(0.1, 0.4) == Estimate(0.4, 0.5, 9)


def test_jackknife_over_blocks_is_the_error_of_block_means():
    values = np.arange(12.0) ** 2
    block = np.repeat([5, 7, 9, 11], 3)
    found = jackknife(np.stack([values, np.ones(12)], 1), ratio(), block)
    means = values.reshape(4, 3).mean(axis=1)
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(means.std(ddof=1) / 2)
    assert found.freedom == 3


def test_what_a_reward_alone_says_is_its_residual():
    rng = np.random.default_rng(0)
    loud = rng.standard_normal((300, 6))
    small = 0.05 * (0.6 * loud + 0.8 * rng.standard_normal((300, 6)))
    rewards = np.stack([loud.ravel(), small.ravel()], 1)
    (_, test) = check_driver(Evidence(batch_of(rewards, np.repeat(np.arange(300), 6), ("loud", "small")))).tests
    total = loud + small
    weight = 1 / (total - total.mean(1, keepdims=True)).var(axis=1, keepdims=True)
    x, y = ((v - v.mean(1, keepdims=True)) * np.sqrt(weight) for v in (loud, small))
    own = y - x * (x * y).sum() / (x * x).sum()
    assert test.finding.subject == "small"
    assert test.finding.figure == pytest.approx((own**2).sum() / y.size)
    assert test.p < 1e-6


def test_groups_in_which_the_others_are_constant_do_not_hide_a_drowned_reward():
    rng = np.random.default_rng(1)
    accuracy = (rng.random((200, 4)) < 0.5) * 1.0
    rewards = np.stack([accuracy.ravel(), 0.02 * rng.standard_normal(800)], 1)
    diagnosis = diagnose(batch_of(rewards, np.repeat(np.arange(200), 4), ("accuracy", "style")), recompute=False)
    assert [finding.subject for finding in diagnosis.problems()] == ["style"]
    shares = {row[0]: row[2] for row in diagnosis.tables["shares"].rows}
    assert shares["style"] > 0.05, "it decides groups in which all samples are right or all are wrong"


def test_a_copy_and_a_learned_reward_are_not_drowned():
    rng = np.random.default_rng(2)
    value = rng.standard_normal((200, 8)).ravel()
    group = np.repeat(np.arange(200), 8)
    copy = np.stack([value, 0.02 * value], 1)
    assert diagnose(batch_of(copy, group, ("a", "b")), recompute=False).problems() == []
    left = np.repeat(np.linspace(1, 0, 200), 8)
    learned = np.stack([value, 0.05 * left * rng.standard_normal(1600)], 1)
    step = np.repeat(np.arange(200) // 10, 8)
    assert diagnose(batch_of(learned, group, ("a", "b"), step=step), recompute=False).problems() == []


def test_a_small_weight_is_meant_and_a_small_scale_is_not():
    rng = np.random.default_rng(3)
    rewards = rng.standard_normal((1600, 2))
    group = np.repeat(np.arange(200), 8)
    weighted = diagnose(batch_of(rewards, group, ("a", "b")), weights={"b": 0.03}, recompute=False)
    assert weighted.problems() == []
    assert {row[0]: row[2] for row in weighted.tables["shares"].rows}["b"] < 0.01
    scaled = diagnose(batch_of(rewards * [1, 0.03], group, ("a", "b")), recompute=False)
    assert [finding.kind for finding in scaled.problems()] == ["drowned"]
    restored = diagnose(batch_of(rewards * [1, 0.03], group, ("a", "b")), weights={"b": 30}, recompute=False)
    assert restored.problems() == []


def test_scale_of_few_values_is_the_range_and_of_many_the_deviation():
    rewards = [0.0, 4.0, 0, 0] * 6 + [0.0, 1.0, 1, 1] * 6
    task = ["x"] * 24 + ["y"] * 24
    rows = check_scale(Evidence(batch_of(rewards, np.repeat(np.arange(12), 4), task=task))).tables["scale"].rows
    assert [row[2] for row in rows] == [4.0, 1.0]
    rng = np.random.default_rng(0)
    values = rng.standard_normal((40, 10))
    log = Evidence(
        batch_of(values.ravel(), np.repeat(np.arange(40), 10), task=np.repeat(["x", "y"], 200).astype(object))
    )
    expected = (values[:20] - np.median(values[:20], axis=1, keepdims=True)) ** 2
    assert check_scale(log).tables["scale"].rows[0][2] == pytest.approx(math.sqrt(expected.mean()))


def test_an_outlier_is_no_scale():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((200, 8))
    values[:100][rng.random((100, 8)) < 0.02] += 100
    log = batch_of(values.ravel(), np.repeat(np.arange(200), 8), task=np.repeat(["x", "y"], 800).astype(object))
    assert {finding.kind for finding in diagnose(log, recompute=False).problems()} == {"heavy tail"}


def test_skew_is_the_share_of_the_largest_possible():
    rng = np.random.default_rng(0)
    one_up = np.zeros((50, 5))
    one_up[:, 0] = rng.uniform(1, 2, 50)  # one sample against all others: as skewed as can be
    level = rng.standard_normal((50, 1))
    values = np.concatenate([one_up + level, rng.standard_normal((50, 5))])
    log = batch_of(values.ravel(), np.repeat(np.arange(100), 5), task=np.repeat(["x", "y"], 250).astype(object))
    rows = check_shape(Evidence(log)).tables["shape"].rows
    standard = values[50:] - values[50:].mean(1, keepdims=True)
    moment = ((standard / standard.std(1, keepdims=True)) ** 3).mean()
    assert rows[0][2] == pytest.approx(1.0)
    assert rows[1][2] == pytest.approx(moment / (3 / 2))


def test_a_trend_is_the_slope_of_a_line_with_a_level_for_each_task():
    rng = np.random.default_rng(0)
    step, task = np.sort(rng.integers(0, 10, 60)), rng.integers(0, 2, 60)
    level = rng.standard_normal(60) + 3 * task + 0.1 * step
    batch = batch_of(
        np.repeat(level, 3),
        np.repeat(np.arange(60), 3),
        step=np.repeat(step, 3),
        task=np.repeat(np.array(["x", "y"], dtype=object)[task], 3),
    )
    log = Evidence(batch)
    values = log.values[:, 0]
    pair = Pair(log, values, values, np.ones(180, dtype=bool))
    design = np.stack([step / 9, task == 0, task == 1], 1).astype(float)
    slope = np.linalg.lstsq(design, level, rcond=None)[0][0]
    found = pair.trend("proxy")
    assert found.value == pytest.approx(slope / np.repeat(level, 3).std())
    assert pair.trend("difference").value == pytest.approx(0)
    # the error is that of the line fitted anew without each step
    left_out = [np.linalg.lstsq(design[step != s], level[step != s], rcond=None)[0][0] for s in np.unique(step)]
    error = math.sqrt(0.9 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2)) / np.repeat(level, 3).std()
    assert found.error == pytest.approx(error)


def test_kept_spread_compares_the_thirds():
    step = np.repeat(np.arange(9), 4)
    values = np.tile([-1.0, 1.0, -1.0, 1.0], 9) * np.where(step < 3, 2.0, np.where(step < 6, 9.0, 1.0))
    log = Evidence(batch_of(values, np.repeat(np.arange(9), 4), step=step))
    assert kept_spread(log, 0) == pytest.approx(0.25)
    assert kept_spread(Evidence(batch_of(values, np.repeat(np.arange(9), 4))), 0) is None


def test_solved_groups_are_not_lost_signal():
    rng = np.random.default_rng(0)
    step = np.repeat(np.arange(200) // 10, 8)
    right = rng.random(1600) < np.where(step < 12, 0.5, 0.999)
    group = np.repeat(np.arange(200), 8)
    solved = check_dead_groups(Evidence(batch_of(right * 1.0, group, step=step)))
    assert [test.p for test in solved.tests] == [1.0, 1.0]
    lost = check_dead_groups(Evidence(batch_of(np.where(step < 12, right, 0) * 1.0, group, step=step)))
    assert "last third" in lost.tests[-1].finding.statement
    assert lost.tests[-1].p < 1e-6


def test_common_offsets_are_seen_through_small_groups():
    rng = np.random.default_rng(0)
    stratum = rng.integers(0, 3, 1200)
    values = rng.standard_normal(1200) + 0.8 * (stratum == 2)
    result = check_strata(Evidence(batch_of(values, np.repeat(np.arange(300), 4), stratum=stratum)))
    assert result.tests[0].p < 1e-4
    shuffled = check_strata(Evidence(batch_of(values, np.repeat(np.arange(300), 4), stratum=rng.permutation(stratum))))
    assert shuffled.tests[0].p > 0.5


def test_the_same_prompt_at_another_step_is_another_group():
    batch = batch_of([0.0, 1.0] * 6, [3] * 12, step=np.repeat(np.arange(3), 4))
    assert Evidence(batch).groups == 3
    assert Evidence(batch_of([0.0, 1.0] * 6, [3] * 12)).groups == 1


def test_missing_labels_are_one_of_their_own():
    names = np.array(["a", None, "b", float("nan")] * 3, dtype=object)
    ids = Evidence(batch_of(np.arange(12.0), [0] * 12, stratum=names)).ids("stratum")
    assert sorted(ids.label(code) for code in range(ids.count)) == ["(none)", "a", "b"]
    halves = torch.tensor([0.5, 1.5, float("nan")] * 4)
    ids = Evidence(batch_of(np.arange(12.0), [0] * 12, stratum=halves)).ids("stratum")
    assert sorted(ids.label(code) for code in range(ids.count)) == ["(none)", "0.5", "1.5"]
    whole = torch.tensor([2.0, 1.0] * 6)
    ids = Evidence(batch_of(np.arange(12.0), [0] * 12, stratum=whole)).ids("stratum")
    assert [ids.label(code) for code in range(ids.count)] == [1, 2]


def test_the_trusted_reward_is_guessed_from_numbers_only():
    texts = np.array(["42"] * 12, dtype=object)
    log = batch_of(np.arange(12.0), [0] * 12, ("rm",), correct_answer=texts, acc=torch.arange(12))
    assert Evidence(log).reference == "acc"
    assert Evidence(batch_of(np.arange(12.0), [0] * 12, ("rm",), correct_answer=texts)).reference is None
    with pytest.raises(InvalidInputError, match="'correct_answer' is a column without numbers"):
        Evidence(log, reference="correct_answer")
    both = batch_of(np.zeros((4, 2)), [0] * 4, ("exact_match", "verifier"))
    assert Evidence(both).reference == "verifier"


def test_length_is_counted_where_there_is_no_column():
    texts = np.array(["ab", "abcd", None, "é"], dtype=object)
    name, values = Evidence(batch_of(np.arange(4.0), [0] * 4, completion=texts)).length
    assert name == "characters of 'completion'"
    np.testing.assert_array_equal(values, [2, 4, np.nan, 1])
    given = batch_of(np.arange(4.0), [0] * 4, completion=texts, response_length=torch.arange(4))
    assert Evidence(given).length[0] == "response_length"


def test_numbers_come_from_columns_with_gaps():
    gaps = np.array([1, None, 2.5, True], dtype=object)
    np.testing.assert_array_equal(Evidence(batch_of(np.zeros(4), [0] * 4, x=gaps)).numbers("x"), [1, np.nan, 2.5, 1])
    words = np.array(["1", "2", "3", "4"], dtype=object)
    assert Evidence(batch_of(np.zeros(4), [0] * 4, x=words)).numbers("x") is None


def test_columns_and_weights_that_do_not_fit_are_named():
    batch = clean(0, "short log")
    with pytest.raises(MissingColumnError, match=r"no column 'tsk'.*did you mean 'task'"):
        diagnose(batch, task="tsk")
    with pytest.raises(MissingColumnError, match="no column 'arm'"):
        diagnose(batch, stratum="arm")
    with pytest.raises(InvalidInputError, match="weight of reward 'verifier' is nan"):
        diagnose(batch, weights={"verifier": float("nan")})


def test_a_transform_with_memory_is_not_fed_the_log():
    from polyreward.advantages.presets import ema_grpo
    from polyreward.tasks.synthetic_logs import planted

    trained_with = ema_grpo()
    assert diagnose(planted("cross-stratum bias", 0), transform=trained_with).what_if is not None
    assert trained_with.state_dict() == ema_grpo().state_dict()
