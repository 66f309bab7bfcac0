import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.objectives.cloning import NoEvidenceWarning
from polyreward.objectives.pessimistic_improvement import PessimisticImprove
from polyreward.tasks.planted_subsequence import HETEROGENEOUS, HOMOGENEOUS, PlantedSubsequence
from polyreward.tilting import chi2_divergence, chi2_tilt, kl_divergence, kl_tilt

NAN = float("nan")


def test_full_evidence_is_the_tilt():
    p, r = np.array([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2]]), np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    assert PessimisticImprove(0.3)(p, r) == pytest.approx(chi2_tilt(p, r, 0.3))
    assert PessimisticImprove(0.3, "kl")(p, r) == pytest.approx(kl_tilt(p, r, 0.3))
    assert PessimisticImprove(0.5)([0.2425, 0.7575], [1.0, 0.0])[0] == pytest.approx(0.5456, abs=1e-4)
    assert PessimisticImprove() == PessimisticImprove(0.5, "chi2")


def test_unseen_entries_keep_their_probability():
    p = np.array([0.1, 0.2, 0.3, 0.4])
    for ball, divergence in (("chi2", chi2_divergence), ("kl", kl_divergence)):
        got = PessimisticImprove(0.05, ball)(p, [1.0, NAN, 0.0, NAN])
        assert got[[1, 3]].tolist() == [0.2, 0.4]
        assert got[0] > 0.1
        assert got.sum() == pytest.approx(1)
        assert divergence(got, p) == pytest.approx(0.05)
        assert PessimisticImprove(0.05, ball)(p, [1.0, 9.0, 0.0, 9.0], [True, False, True, False]) == pytest.approx(got)
    everything = PessimisticImprove(100.0)(p, [1.0, NAN, 0.0, NAN])
    assert everything == pytest.approx([0.4, 0.2, 0.0, 0.4])


def test_no_evidence_is_the_base_and_says_so():
    p = np.array([[0.1, 0.9], [0.5, 0.5]])
    with pytest.warns(NoEvidenceWarning, match="the base policy"):
        assert PessimisticImprove()(p, np.full((2, 2), NAN)).tolist() == p.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = PessimisticImprove()(p, [[NAN, NAN], [1.0, 0.0]])
        assert got[0].tolist() == p[0].tolist()
        assert got[1, 0] > 0.5
        assert PessimisticImprove()(p, [[1.0, NAN], [0.5, 0.5]]).tolist() == p.tolist()  # one entry has nowhere to go
        assert PessimisticImprove()(np.zeros((0, 2)), np.zeros((0, 2))).shape == (0, 2)


@st.composite
def problems(draw):
    count = draw(st.integers(2, 6))
    weights = np.array(draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)), dtype=float)
    weights[0] += 1
    worth = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, NAN]), min_size=count, max_size=count))
    return weights / weights.sum(), np.array(worth), draw(st.sampled_from([0.0, 0.1, 0.5, 4.0]))


@pytest.mark.filterwarnings("ignore::polyreward.objectives.cloning.NoEvidenceWarning")
@pytest.mark.parametrize(("ball", "divergence"), [("chi2", chi2_divergence), ("kl", kl_divergence)])
@given(problems())
@settings(deadline=None)
def test_never_worse_than_the_base_and_inside_the_ball(ball, divergence, problem):
    p, r, kappa = problem
    got = PessimisticImprove(kappa, ball)(p, r)
    seen = ~np.isnan(r)
    assert got.sum() == pytest.approx(1)
    assert (got >= 0).all()
    assert got[~seen] == pytest.approx(p[~seen])
    assert got[seen] @ r[seen] >= p[seen] @ r[seen] - 1e-9
    assert divergence(got / got.sum(), p) <= kappa + 1e-7
    if kappa == 0:
        assert got.tolist() == p.tolist()
    # Whatever the unseen entries are worth, the base is not beaten by more than what was seen.
    for worth in itertools.product([-3.0, 5.0], repeat=int((~seen).sum())):
        full = r.copy()
        full[~seen] = worth
        assert got @ full >= p @ full - 1e-9


def rewards_of(task, traces):
    """What flips of the outcome say about each symbol's token: 1 and 0 where one was seen, else NaN."""
    solved = traces.solved[:, -1]
    rewards = np.full((len(task.gold), task.tokens), NAN)
    flips = traces.pairs(np.where(solved, traces.solved.argmax(axis=1), 1))
    for symbol, token in zip(traces.prompts[solved].ravel(), flips[solved].ravel(), strict=True):
        rewards[symbol] = 0
        rewards[symbol, token] = 1
    return rewards


@pytest.mark.filterwarnings("ignore::polyreward.objectives.cloning.NoEvidenceWarning")
@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([HETEROGENEOUS, HOMOGENEOUS, (0.0, 0.6)]))
@settings(max_examples=40, deadline=None)
def test_planted_task_every_data_set_is_at_least_the_base(seed, count, styles):
    rng = np.random.default_rng(seed)
    task = PlantedSubsequence.draw(rng, symbols=6, tokens=5)
    base = task.base_policy(styles)
    rewards = rewards_of(task, task.sample(base, count, 16, rng))
    better = PessimisticImprove(0.5)(base, rewards)
    assert (task.value(better, 16) >= task.value(base, 16) - 1e-9).all()
    assert PessimisticImprove(0.0)(base, rewards).tolist() == base.tolist()


def test_relabelled_rewards_change_the_improvement():
    task = PlantedSubsequence(np.arange(4), 5)
    base = task.base_policy(HOMOGENEOUS)
    rewards = rewards_of(task, task.sample(base, 50, 20, np.random.default_rng(0)))
    assert not np.allclose(PessimisticImprove()(base, rewards), PessimisticImprove()(base, 1 - rewards))
    assert task.value(PessimisticImprove()(base, 1 - rewards), 20).mean() < task.value(base, 20).mean()


def test_a_deterministic_base_cannot_be_improved():
    task = PlantedSubsequence(np.arange(3), 4)
    base = task.base_policy(1.0)
    rewards = rewards_of(task, task.sample(base, 30, 6, np.random.default_rng(0)))
    assert PessimisticImprove(2.0)(base, rewards).tolist() == base.tolist()


def test_the_ball_over_traces_gains_the_deviation():
    rng = np.random.default_rng(1)
    returns = rng.normal(size=400)
    base = np.full(400, 1 / 400)
    better = PessimisticImprove(0.05)(base, returns)
    part = PessimisticImprove(0.05)
    assert (better > 0).all()
    assert better @ returns == pytest.approx(returns.mean() + part.gain(returns.std()))
    assert PessimisticImprove(4.0)(base, returns) @ returns < returns.mean() + 2 * returns.std()  # cut at 0


def test_tensors_and_gradients():
    p = torch.tensor([[0.2, 0.3, 0.5]] * 2)
    r = torch.tensor([[1.0, 0.0, NAN], [NAN, NAN, NAN]], requires_grad=True)
    got = PessimisticImprove(0.1)(p, r)
    assert got.dtype == torch.float32
    assert got[1].tolist() == p[1].tolist()
    got.square().sum().backward()
    assert torch.isfinite(r.grad).all()
    logits = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    worth = torch.tensor([0.3, NAN, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda l: PessimisticImprove(0.1)(torch.softmax(l, 0), worth), (logits,))


def test_bad_input_is_named():
    for kappa in (-0.1, NAN, "x"):
        with pytest.raises(InvalidInputError, match="PessimisticImprove: kappa"):
            PessimisticImprove(kappa)
    with pytest.raises(UnknownNameError, match="did you mean 'chi2'"):
        PessimisticImprove(0.5, "chi")
    with pytest.raises(InvalidInputError, match="the sum of base at index 1"):
        PessimisticImprove()([[0.5, 0.5], [0.5, 0.4]], [0.0, 1.0])
    with pytest.raises(InvalidInputError, match="advantage at index 1 is inf"):
        PessimisticImprove()([0.5, 0.5], [0.0, math.inf])
    with pytest.raises(InvalidInputError, match="do not go together"):
        PessimisticImprove()([0.5, 0.5], [0.0, 1.0, 2.0])
