import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from polyreward.advantages import presets
from polyreward.advantages.transform import compute_advantages
from polyreward.audit.diagnose import diagnose
from polyreward.audit.diagnose.collapse import check_collapse
from polyreward.audit.diagnose.conflict import check_conflict
from polyreward.audit.diagnose.dead_groups import check_dead_groups
from polyreward.audit.diagnose.driver import check_driver
from polyreward.audit.diagnose.estimates import ratio
from polyreward.audit.diagnose.evidence import Evidence
from polyreward.audit.diagnose.length import check_length
from polyreward.audit.diagnose.run import holm
from polyreward.audit.diagnose.strata import check_strata
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.tasks.synthetic_logs import KIND_OF, PROBLEMS, SCENARIOS, clean, planted


def batch_of(rewards, groups, names=(), **columns):
    return RewardBatch(torch.tensor(rewards, dtype=torch.float64), names, torch.tensor(groups), columns)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_problem_is_found_and_no_other(problem, seed):
    diagnosis = diagnose(planted(problem, seed + 100), recompute=False)
    assert {finding.kind for finding in diagnosis.problems()} == {KIND_OF.get(problem, problem)}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_clean_log_has_no_warning(scenario):
    assert diagnose(clean(7, scenario), recompute=False).problems() == []


def test_saturation_is_information_and_domination_is_no_drift():
    saturated = diagnose(clean(3, "saturation"), recompute=False)
    assert "saturation" in {finding.kind for finding in saturated.findings}
    assert saturated.worst() == "info"
    heavy = diagnose(clean(3, "one heavier reward"), recompute=False)
    driver = next(finding for finding in heavy.findings if finding.kind == "driver")
    assert driver.subject == "reward_1"
    assert driver.figure > 0.6
    assert heavy.worst() == "info"


def test_shares_of_two_independent_rewards():
    first = [2.0, -2.0, 2.0, -2.0]
    second = [1.0, 1.0, -1.0, -1.0]
    rewards = list(zip(first, second, strict=True)) * 3
    table = check_driver(Evidence(batch_of(rewards, [0] * 4 + [1] * 4 + [2] * 4, ("a", "b")))).tables["shares"]
    assert [row[2] for row in table.rows] == pytest.approx([0.8, 0.2])
    halved = Evidence(batch_of(rewards, [0] * 4 + [1] * 4 + [2] * 4, ("a", "b")), {"a": 0.5})
    assert [row[2] for row in check_driver(halved).tables["shares"].rows] == pytest.approx([0.5, 0.5])


def test_collapse_counts_the_pairs_that_the_sum_joins():
    # of the 12 ordered pairs of distinct vectors, (1,0)-(0,1) and its mirror get one advantage
    square = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    result = check_collapse(Evidence(batch_of(square * 3, [0] * 4 + [1] * 4 + [2] * 4)))
    assert result.tests[0].finding.figure == pytest.approx(2 / 12)
    weighted = check_collapse(Evidence(batch_of(square * 3, [0] * 4 + [1] * 4 + [2] * 4, ("a", "b")), {"b": 0.5}))
    assert weighted.tests[0].finding.figure == 0


def test_strata_of_the_worked_example():
    # R = [1,0,0,1,1,0], strata [0,0,0,1,1,1]: between 6 * 0.027778, within 6 * 0.222222, chance 1/4 of within
    reward, stratum = [1.0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]
    evidence = Evidence(
        batch_of(reward * 3, [g for g in range(3) for _ in range(6)], stratum=torch.tensor(stratum * 3))
    )
    result = check_strata(evidence)
    assert result.tests[0].finding.figure == pytest.approx((1 / 6 - 1 / 3) / 1.5)
    rows = result.tables["strata"].rows
    assert [(row[0], row[1]) for row in rows] == [("0", 9), ("1", 9)]
    assert [row[2] for row in rows] == pytest.approx([-1 / 6, 1 / 6])


def test_conflict_is_the_pooled_rank_correlation():
    rewards = [[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]] * 3
    result = check_conflict(Evidence(batch_of(rewards, [0] * 4 + [1] * 4 + [2] * 4)))
    assert result.tables["conflict"].rows[0][2] == pytest.approx(-1)
    # differences between groups play no role
    shifted = [[a + 10 * g, b + 10 * g] for g in range(3) for a, b in rewards[:4]]
    result = check_conflict(Evidence(batch_of(shifted, [0] * 4 + [1] * 4 + [2] * 4)))
    assert result.tables["conflict"].rows[0][2] == pytest.approx(-1)


def test_dead_groups_are_those_with_equal_sums():
    rewards = [[1.0, 0.0], [0.0, 1.0]] * 3 + [[1.0, 0.0], [0.0, 0.0]]
    table = check_dead_groups(Evidence(batch_of(rewards, [0, 0, 1, 1, 2, 2, 3, 3]))).tables["groups without signal"]
    assert table.rows[0][2] == 0.75
    third = [[0.1 + 0.2], [0.3]]  # rounding is no signal
    assert check_dead_groups(Evidence(batch_of(third, [0, 0]))).tables["groups without signal"].rows[0][2] == 1.0


def test_partial_correlation_is_the_correlation_of_residuals():
    rng = np.random.default_rng(0)
    verifier, length = rng.standard_normal((2, 40, 10))
    length = length + verifier
    proxy = verifier + 0.5 * length + rng.standard_normal((40, 10))
    group = np.repeat(np.arange(40), 10)
    batch = batch_of(
        np.stack([verifier.ravel(), proxy.ravel()], 1).tolist(), group, ("verifier", "proxy"), length=length.ravel()
    )
    row = check_length(Evidence(batch)).tables["length"].rows[0]
    x, y, z = (np.concatenate([stats.rankdata(v) - 5.5 for v in values]) for values in (proxy, length, verifier))
    residual = [v - z * (v @ z) / (z @ z) for v in (x, y)]
    expected = residual[0] @ residual[1] / np.linalg.norm(residual[0]) / np.linalg.norm(residual[1])
    assert row[0] == "proxy"
    assert row[1] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert row[2] == pytest.approx(expected)


def test_length_without_a_trusted_reward_is_only_information():
    batch = planted("length dependence", 0)
    unnamed = RewardBatch(batch.rewards, ("a", "b", "c"), batch.groups, batch.columns)
    diagnosis = diagnose(unnamed, recompute=False)
    assert diagnosis.worst() == "info"
    assert "length dependence beyond correctness" in diagnosis.not_checked
    assert "length dependence" in {finding.kind for finding in diagnosis.findings}


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_ranks_match_scipy_group_by_group(rows):
    groups, values = (np.array(column) for column in zip(*rows, strict=True))
    evidence = Evidence(batch_of(values.astype(float).tolist(), groups))
    found = evidence.ranks(evidence.values[:, 0])
    for code in range(evidence.groups):
        inside = evidence.group == code
        ranks = stats.rankdata(evidence.values[inside, 0])
        assert found[inside] == pytest.approx(ranks - ranks.mean())


def test_jackknife_of_a_mean_is_the_textbook_error():
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    evidence = Evidence(batch_of([0.0] * 10, np.repeat(np.arange(5), 2)))
    estimate = evidence.estimate(np.stack([values, np.ones(5)], 1), ratio())
    assert estimate.value == pytest.approx(6.2)
    assert estimate.error == pytest.approx(values.std(ddof=1) / math.sqrt(5))
    reach = stats.t.ppf(0.975, 4) * estimate.error
    assert estimate.interval == pytest.approx((6.2 - reach, 6.2 + reach))


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == [True, False, False, True]
    assert holm([0.01, 0.02]).tolist() == [True, True]
    assert holm([]).tolist() == []


def test_rows_in_another_order_give_the_same_findings():
    batch = planted("cross-stratum bias", 5)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    first, second = (diagnose(b, recompute=False) for b in (batch, batch.select(order)))
    assert [f.kind for f in first.findings] == [f.kind for f in second.findings]
    assert [f.figure for f in first.findings] == pytest.approx([f.figure for f in second.findings], rel=1e-9)


def test_every_check_says_why_it_was_not_made():
    diagnosis = diagnose(batch_of([0.0, 1.0, 1.0, 0.0], [0, 0, 1, 1]))
    assert diagnosis.problems() == []
    reasons = diagnosis.not_checked
    assert reasons["cross-stratum bias"] == "no column 'stratum' (nor 'tool_calls')"
    assert reasons["length dependence"] == "no numeric column 'length', and no text to measure"
    assert "step" in reasons["loss of diversity"]
    assert "step" in reasons["drift away from the trusted reward"]
    assert "task" in reasons["differences of scale between tasks"]
    assert "fewer than two" in reasons["conflict between rewards"]


@pytest.mark.parametrize(
    "batch",
    [
        batch_of([[1.0, float("nan")]], [0]),
        batch_of([1.0] * 6, [0, 1, 2, 3, 4, 5]),
        batch_of([[0.0, 0.0]] * 8, [0] * 8),
        batch_of(
            [[float("nan")] * 2] * 8,
            [0] * 4 + [1] * 4,
            stratum=torch.arange(8),
            length=torch.arange(8),
            step=torch.arange(8),
        ),
        batch_of([[1.0, float("nan")], [float("nan"), 2.0]] * 4, [0] * 4 + [1] * 4, stratum=torch.arange(8) % 2),
    ],
    ids=["one row", "groups of one", "constant", "all missing", "never together"],
)
def test_degenerate_logs_are_diagnosed_without_warnings(batch):
    diagnosis = diagnose(batch)
    assert [f for f in diagnosis.problems() if f.kind != "groups without signal"] == []
    json.dumps(diagnosis.to_dict(), allow_nan=False)


def test_missing_entries_take_no_part():
    batch = planted("conflict", 2)
    extra = torch.full((len(batch), 1), float("nan"), dtype=batch.rewards.dtype)
    extra[::7] = 1.0
    wider = RewardBatch(torch.cat([batch.rewards, extra], 1), (*batch.names, "sometimes"), batch.groups, batch.columns)
    first, second = (
        next(f for f in diagnose(b, recompute=False).findings if f.kind == "conflict") for b in (batch, wider)
    )
    assert first.figure == pytest.approx(second.figure)


def test_bad_arguments():
    batch = clean(0)
    with pytest.raises(InvalidInputError, match="no rows"):
        diagnose(batch.select([]))
    with pytest.raises(MissingColumnError, match="did you mean 'reward_1'"):
        diagnose(batch, weights={"reward1": 2.0})
    with pytest.raises(MissingColumnError, match="verifer"):
        diagnose(batch, reference="verifer")


@pytest.mark.parametrize("problem", ["drowned", "collapse", "scale", "heavy tail", "cross-stratum bias"])
def test_the_printed_code_is_what_the_what_if_computed(problem):
    batch = planted(problem, 3)
    change = diagnose(batch).what_if
    names: dict = {}
    exec(change.code, names)
    transform = names["advantage"]
    steps = [batch.select((batch.column("step") == s).nonzero().squeeze(1)) for s in batch.column("step").unique()]
    now, suggested = (torch.cat([compute_advantages(t, step) for step in steps]) for t in (presets.grpo(), transform))
    assert change.rollouts == len(batch)
    assert change.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(now, suggested, dim=0)), abs=1e-6)


def test_the_what_if_answers_the_finding():
    strata = diagnose(planted("cross-stratum bias", 3)).what_if.tables["stratum"]
    assert max(abs(row[5]) for row in strata.rows) < 0.4 * max(abs(row[4]) for row in strata.rows)
    drowned = diagnose(planted("drowned", 3)).what_if.tables["reward"]
    now, suggested = next(row[1:] for row in drowned.rows if row[0] == "reward_2")
    assert now < 0.1 < 0.3 < suggested
    collapse = diagnose(planted("collapse", 3)).what_if
    assert collapse.lost[0] > 0.1
    assert collapse.lost[1] < 0.7 * collapse.lost[0]


def test_one_chain_answers_two_findings():
    batch = planted("cross-stratum bias", 3)
    noise = 0.03 * torch.randn(len(batch), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = RewardBatch(
        torch.cat([batch.rewards, noise.unsqueeze(1)], 1), (*batch.names, "small"), batch.groups, batch.columns
    )
    diagnosis = diagnose(batch)
    assert {finding.kind for finding in diagnosis.problems()} == {"cross-stratum bias", "drowned"}
    names: dict = {}
    exec(diagnosis.what_if.code, names)
    steps = [batch.select((batch.column("step") == s).nonzero().squeeze(1)) for s in batch.column("step").unique()]
    now, suggested = (
        torch.cat([compute_advantages(t, step) for step in steps]) for t in (presets.grpo(), names["advantage"])
    )
    cosine = float(torch.nn.functional.cosine_similarity(now, suggested, dim=0))
    assert diagnosis.what_if.cosine == pytest.approx(cosine, abs=1e-6)
