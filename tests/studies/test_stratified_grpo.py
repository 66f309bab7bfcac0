import itertools

import numpy as np
import pytest
import torch

from polyreward.advantages.presets import grpo, stratified_grpo
from polyreward.advantages.transform import compute_advantages
from polyreward.batch import RewardBatch
from polyreward.studies.base import StudyConfig
from polyreward.studies.stratified_grpo import (
    GROUP,
    QUESTIONS,
    STUDY,
    SearchPolicy,
    run_seed,
    score_gradient,
    softmax,
    variance_panel,
)


def test_stratified_advantages_alone_cannot_choose_a_stratum():
    rng = np.random.default_rng(0)
    policy = SearchPolicy(rng)
    searches, _, rewards = policy.rollouts(rng)
    batch = RewardBatch(
        torch.from_numpy(rewards.reshape(-1, 1)),
        ("answer",),
        torch.arange(QUESTIONS).repeat_interleave(GROUP),
        {"stratum": torch.from_numpy(searches.reshape(-1))},
    )

    def pull(transform):
        advantages = compute_advantages(transform, batch).numpy().reshape(QUESTIONS, GROUP)
        return np.abs(score_gradient(policy.searches, searches, advantages)).max()

    assert pull(stratified_grpo(blend=1.0, by="stratum")) < 1e-12
    assert pull(grpo(ddof=0)) > 0.01


def test_exact_success_equals_enumeration():
    rng = np.random.default_rng(1)
    policy = SearchPolicy(rng)
    policy.searches, policy.queries = rng.normal(size=(20, 3)), rng.normal(size=(20, 2, 6))
    n, queries = softmax(policy.searches), softmax(policy.queries)
    total = 0.0
    for question in range(20):
        for count, first, second in itertools.product(range(3), range(6), range(6)):
            chance = n[question, count] * queries[question, 0, first] * queries[question, 1, second]
            right = [first == policy.right[question, 0], second == policy.right[question, 1]]
            hops = policy.hops[question]
            complete = count >= hops and all(right[:hops])
            total += chance * (0.30 if count == 0 else 0.95 if complete else 0.05)
    assert policy.figures()["success"] == pytest.approx(total / 20)


def test_a_fresh_policy_finds_two_searches_worse_than_a_guess():
    rng = np.random.default_rng(2)
    wins = tries = 0.0
    for _ in range(200):
        policy = SearchPolicy(rng)
        searches, _, rewards = policy.rollouts(rng)
        two = (searches == 2) & (policy.hops == 2)[:, None]
        wins, tries = wins + rewards[two].sum(), tries + two.sum()
    assert wins / tries == pytest.approx(0.05 + 0.9 / 36, abs=0.01)


def test_variance_identity_holds():
    assert variance_panel(0, groups=200)["largest error of the variance identity"] < 1e-12


def test_quick_run_is_finite_and_judged():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(v) for arm in figures.values() for v in arm.values())
    assert STUDY.judge([figures]).verdict in ("supported", "not supported", "inconclusive")
