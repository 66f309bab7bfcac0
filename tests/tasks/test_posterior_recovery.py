import math

import numpy as np
import pytest
import torch

from polyreward.errors import InvalidInputError
from polyreward.tasks.posterior_recovery import PosteriorTask

SMALL = PosteriorTask(prompts=3, length=2, symbols=3, features=4)


def test_the_posterior_is_in_the_family_without_noise():
    problem = SMALL.draw(0)
    for beta in (0.5, 1.0, 3.0):
        assert problem.divergence(problem.prior + problem.direction / beta, beta) == pytest.approx(0, abs=1e-6)
    noisy = PosteriorTask(prompts=3, length=2, symbols=3, features=4, noise=0.5).draw(0)
    assert noisy.divergence(noisy.prior + noisy.direction) > 0.01


def test_divergence_and_value_equal_plain_sums():
    problem = SMALL.draw(1)
    q, target, reward = problem.logp(problem.prior).exp(), problem.posterior().exp(), problem.reward
    assert q.shape == (3, 9)
    divergence = sum(
        float(target[p, s]) * math.log(float(target[p, s]) / float(q[p, s])) for p in range(3) for s in range(9)
    )
    assert problem.divergence(problem.prior) == pytest.approx(divergence / 3, rel=1e-4)
    assert problem.value(problem.prior) == pytest.approx(float((q * reward).sum() / 3), rel=1e-5)
    weights = [float(q[0, s]) * math.exp(float(reward[0, s])) for s in range(9)]
    assert target[0].tolist() == pytest.approx([w / sum(weights) for w in weights], rel=1e-4)


def test_samples_follow_the_prior():
    problem = SMALL.draw(2)
    chosen = problem.sample(60_000, np.random.default_rng(0))
    shares = torch.stack([torch.bincount(row, minlength=9) for row in chosen]) / 60_000
    assert torch.allclose(shares.float(), problem.logp(problem.prior).exp(), atol=0.01)


def test_the_default_has_512_sequences_and_repeats():
    first, second = PosteriorTask().draw(3), PosteriorTask().draw(3)
    assert first.features.shape == (40, 512, 24)
    assert torch.equal(first.features, second.features)
    assert float(first.reward.std()) == pytest.approx(2, abs=0.8)


@pytest.mark.parametrize("options", [{"prompts": 0}, {"scale": -1.0}, {"noise": -1.0}])
def test_options_are_checked(options):
    with pytest.raises(InvalidInputError):
        PosteriorTask(**options)
