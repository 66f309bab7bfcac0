import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.audit.anti_concentration import (
    anti_concentration,
    audit_base,
    heterogeneity,
    solve_time_return,
    wilson_interval,
)
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.tasks.planted_subsequence import HETEROGENEOUS, HOMOGENEOUS, PlantedSubsequence
from polyreward.tilting import chi2_tilt

NAN = float("nan")


def test_returns_are_the_steps_from_the_solving_one_on():
    solved = np.array([[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=bool)
    assert solve_time_return(solved).tolist() == [0, 1, 3, 4]
    assert solve_time_return(solved.astype(int)).tolist() == [0, 1, 3, 4]
    tensor = solve_time_return(torch.from_numpy(solved))
    assert tensor.dtype == torch.float32
    assert tensor.tolist() == [0, 1, 3, 4]
    assert solve_time_return(np.zeros((0, 4), dtype=bool)).shape == (0,)
    assert solve_time_return(np.zeros((2, 0), dtype=bool)).tolist() == [0, 0]


def test_a_reward_that_falls_is_refused():
    with pytest.raises(InvalidInputError, match=r"solved\[1\] falls from 1 to 0 after step 2"):
        solve_time_return([[0, 1, 1, 1], [0, 0, 1, 0]])
    with pytest.raises(InvalidInputError, match=r"solved\[0, 1\] is 0\.5, expected 0 or 1"):
        solve_time_return([[0, 0.5, 1.0]])
    with pytest.raises(InvalidInputError, match=r"solved\[0, 0\] is nan"):
        solve_time_return([[NAN, 1.0]])
    with pytest.raises(InvalidInputError, match=r"must have shape \(traces, steps\), got \(3,\)"):
        solve_time_return([True, True, True])


def test_variance_identity_of_the_worked_example():
    # First action left or right with 1/2; success .2 after left, .8 after right.
    first = 0.5 * (0.2 - 0.5) ** 2 + 0.5 * (0.8 - 0.5) ** 2
    second = 0.5 * 0.2 * 0.8 + 0.5 * 0.8 * 0.2
    assert (first, second) == (pytest.approx(0.09), pytest.approx(0.16))
    returns = [0.0] * 8 + [1.0] * 2 + [0.0] * 2 + [1.0] * 8  # ten traces after each action
    assert heterogeneity([returns])[0] == pytest.approx(first + second) == 0.25


@given(st.integers(0, 1000), st.integers(1, 4))
@settings(deadline=None)
def test_variance_of_the_return_is_the_sum_of_the_variances_of_q(seed, horizon):
    """On the planted task, whose dynamics are deterministic: total variance over all traces against states and Q."""
    rng = np.random.default_rng(seed)
    task = PlantedSubsequence(np.array([0, 1]), 3)
    policy = rng.dirichlet(np.ones(3), size=(2, 2))
    chances = task.return_distribution(policy, horizon)[0, 1]
    support = np.arange(horizon + 1)
    mean = chances @ support
    total = chances @ (support - mean) ** 2

    values = [task.value(policy, left)[0, 1] if left else 0.0 for left in range(horizon + 1)]

    def after(left):  # value right after the first gold token, by one step of the recursion
        if left == 0:
            return 0.0
        p = policy[1, 1]
        return p[1] * left + p[0] * after(left - 1) + p[2] * values[left - 1]

    by_step, start, ready = 0.0, 1.0, 0.0
    for left in range(horizon, 0, -1):
        q_start = np.array([after(left - 1), values[left - 1], values[left - 1]])
        q_ready = np.array([after(left - 1), left, values[left - 1]])
        for weight, p, q in ((start, policy[0, 0], q_start), (ready, policy[1, 1], q_ready)):
            by_step += weight * (p @ (q - p @ q) ** 2)
        start, ready = (
            start * (1 - policy[0, 0, 0]) + ready * policy[1, 1, 2],
            start * policy[0, 0, 0] + ready * policy[1, 1, 0],
        )
    assert by_step == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("ddof", [0, 1])
def test_heterogeneity_in_every_form(ddof):
    rows = [[1.0, 2.0, 6.0], [4.0, 4.0, 4.0], [0.0, 10.0, 5.0]]
    want = [np.var(row, ddof=ddof) for row in rows]
    assert heterogeneity(rows, ddof=ddof) == pytest.approx(want)
    assert heterogeneity(np.array(rows), ddof=ddof) == pytest.approx(want)
    assert heterogeneity({"a": rows[0], "b": rows[1], "c": rows[2]}, ddof=ddof) == pytest.approx(want)
    flat, ids = np.ravel(rows), np.repeat([7, 7000, 90], 3)
    assert heterogeneity(flat, ids, ddof=ddof) == pytest.approx([want[0], want[2], want[1]])
    assert heterogeneity(flat, np.repeat(["x", "y", "z"], 3), ddof=ddof) == pytest.approx(want)
    assert heterogeneity(flat, np.repeat([5, 7, 6], 3), ddof=ddof) == pytest.approx([want[0], want[2], want[1]])
    order = np.random.default_rng(0).permutation(9)
    assert heterogeneity(flat[order], ids[order], ddof=ddof) == pytest.approx([want[0], want[2], want[1]])
    tensor = heterogeneity(torch.tensor(rows), ddof=ddof)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.tolist() == pytest.approx(want)
    ragged = [[1.0, 2.0, 6.0], [3.0], []]
    assert heterogeneity(ragged, ddof=ddof) == pytest.approx([want[0], 0, 0])
    padded = np.array([[1.0, 2.0, 6.0], [3.0, NAN, NAN], [NAN, NAN, NAN]])
    assert heterogeneity(padded, ddof=ddof) == pytest.approx([want[0], 0, 0])
    assert heterogeneity([1.0, 2.0, 6.0], ddof=ddof) == pytest.approx([want[0]])


def test_difficulty_is_not_heterogeneity():
    returns = np.array([[1.0, 1.0], [100.0, 100.0]])
    assert heterogeneity(returns).tolist() == [0, 0]
    assert heterogeneity(returns.ravel())[0] > 2000


def test_anti_concentration_of_worked_examples():
    two = [0.0, 10.0]  # mean 5, deviation 5
    assert anti_concentration(two, 0.25) == 0.5
    assert anti_concentration(two, 1.0) == 0.5  # on the threshold counts
    assert anti_concentration(two, 1.01) == 0
    assert anti_concentration([3.0, 3.0, 3.0], 5.0) == 1
    assert anti_concentration([0.0, 0.0, 0.0, 8.0], 3.0) == 0.25  # kappa = (1 - p) / p
    assert anti_concentration([0.1] * 9 + [0.7], 9.0) == 0.1
    assert anti_concentration([0.0, NAN, 10.0, NAN], 0.25) == 0.5


@given(st.lists(st.lists(st.integers(-20, 20), min_size=1, max_size=6), min_size=1, max_size=5), st.floats(0, 4))
@settings(deadline=None)
def test_anti_concentration_equals_a_plain_loop(rows, kappa):
    hits = total = 0
    for row in rows:
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in row) / len(row))
        margins = [r - mean - deviation * math.sqrt(kappa) for r in row]
        if any(0 < abs(m) < 1e-6 for m in margins):  # on the threshold but for rounding
            return
        hits, total = hits + sum(m >= 0 for m in margins), total + len(row)
    share = anti_concentration([[float(r) for r in row] for row in rows], kappa)
    assert share == pytest.approx(hits / total)
    assert share.low <= share <= share.high
    assert share.traces == total
    flat = [float(r) for row in rows for r in row]
    ids = [f"prompt {i}" for i, row in enumerate(rows) for _ in row]
    assert anti_concentration(flat, kappa, ids) == share


def test_wilson_interval():
    # 10 of 50 at 95 %: the textbook interval.
    assert wilson_interval(10, 50) == pytest.approx((0.11243, 0.33037), abs=1e-5)
    assert wilson_interval(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)
    assert wilson_interval(10, 10) == pytest.approx((0.72247, 1), abs=1e-5)
    share = anti_concentration([0.0] * 40 + [1.0] * 10, 0.5)
    assert share == 0.2
    assert share.interval == pytest.approx((0.11243, 0.33037), abs=1e-5)
    assert anti_concentration([0.0] * 40 + [1.0] * 10, 0.5, level=0.99).high > share.high
    assert repr(share) == "0.200 (0.112 to 0.330, 50 traces)"
    again = pickle.loads(pickle.dumps(share))
    assert (float(again), again.interval, again.traces) == (float(share), share.interval, 50)


def test_the_ball_is_worth_the_deviation_where_the_base_is_anti_concentrated():
    rng = np.random.default_rng(0)
    for _ in range(20):
        returns = rng.integers(0, 30, size=40).astype(float)
        for kappa in (0.1, 0.5):
            best = chi2_tilt(np.full(40, 1 / 40), returns, kappa) @ returns
            assert best <= returns.mean() + math.sqrt(kappa * heterogeneity(returns)[0]) + 1e-9
            assert anti_concentration(returns, kappa) > 0


def test_audit_of_planted_bases():
    task = PlantedSubsequence.draw(np.random.default_rng(1))
    found = {}
    for name, styles in (("het", HETEROGENEOUS), ("hom", HOMOGENEOUS)):
        prompts = np.repeat(task.prompts[:40], 50, axis=0)
        traces = task.sample(task.base_policy(styles), 2000, 256, np.random.default_rng(2), prompts)
        returns = solve_time_return(traces.solved)
        assert (returns == traces.returns).all()
        batch = RewardBatch(torch.from_numpy(returns), groups=np.repeat(np.arange(40), 50))
        found[name] = audit_base(batch)
    assert found["het"].deviation == pytest.approx(87, abs=8)
    assert found["hom"].deviation == pytest.approx(14, abs=2)
    assert found["het"].mean == pytest.approx(190, abs=6)
    assert found["hom"].mean == pytest.approx(241, abs=1)
    assert found["hom"].prompts_above == 1
    assert 0.4 < found["het"].prompts_above < 1  # thresholds lie close below the highest return
    for audit in found.values():
        assert audit.prompts == 40
        assert 0.15 < audit.anti_concentration < 0.5
        assert audit.ball_gain == pytest.approx(audit.deviation * math.sqrt(0.5))


def test_audit_reads_a_batch_by_group():
    rewards = torch.tensor([[0.0, 5.0], [10.0, 5.0], [NAN, 5.0], [3.0, 5.0], [4.0, 5.0], [4.0, 5.0]])
    columns = {"task": ["a", "a", "b", "b", "a", "a"]}
    batch = RewardBatch(rewards, ("solved", "format"), [0, 0, 0, 1, 2, 2], columns)
    audit = audit_base(batch, "solved", 0.25)
    assert audit.prompts == 2  # the second group has one trace
    assert audit.anti_concentration == 0.75  # of 0, 10, 4 and 4
    assert audit.anti_concentration.traces == 4
    assert audit.deviation == 2.5
    assert audit.mean == 4.5
    assert audit.prompts_above == 0.5  # a prompt without spread has nothing above
    assert audit_base(batch, "solved", 0.25, by="task").anti_concentration.traces == 4
    assert audit_base(batch, "format").deviation == 0
    with pytest.raises(InvalidInputError, match="the rewards solved, format: name one"):
        audit_base(batch)
    with pytest.raises(MissingColumnError, match="did you mean 'solved'"):
        audit_base(batch, "solve")
    with pytest.raises(InvalidInputError, match="no group of the batch has two traces"):
        audit_base(RewardBatch(torch.zeros(3, 1), groups=[0, 1, 2]))
    with pytest.raises(InvalidInputError, match="no group of the batch has two traces"):
        audit_base(RewardBatch(torch.zeros(0, 1)))


def test_bad_input_is_named():
    for kappa in (-1, NAN, math.inf, "1"):
        with pytest.raises(InvalidInputError, match="kappa must be a finite number"):
            anti_concentration([1.0, 2.0], kappa)
    for returns in ([], [NAN], [[], []]):
        with pytest.raises(InvalidInputError, match="at least one return"):
            anti_concentration(returns)
    with pytest.raises(InvalidInputError, match="the return of trace 1 is inf"):
        heterogeneity([0.0, math.inf])
    with pytest.raises(InvalidInputError, match="prompts has 1 entries for 2 returns"):
        heterogeneity([0.0, 1.0], [0])
    with pytest.raises(InvalidInputError, match=r"shape \(1, 1, 1\)"):
        heterogeneity(np.zeros((1, 1, 1)))
    with pytest.raises(InvalidInputError, match=r"shape \(2, 2\)"):
        heterogeneity(np.zeros((2, 2)), [0, 1])
    with pytest.raises(InvalidInputError, match="returns must be numbers"):
        heterogeneity(["a", "b"])
    with pytest.raises(InvalidInputError, match="level must be between"):
        anti_concentration([1.0], 0.5, level=1.0)
