import math

import numpy as np
import pytest
import torch

from polyreward.errors import InvalidInputError
from polyreward.tasks.latent_chain import LatentChainPolicy, LatentChainTask


def test_answers_are_those_of_the_class_but_for_the_prompts_own_share():
    answers = LatentChainTask(64, 1).answers(np.random.default_rng(0))
    assert answers.shape == (64, 1)
    assert len(set(answers[:8, 0])) == 8
    assert (answers == np.tile(answers[:8], (8, 1))).all()
    long = LatentChainTask(3200, 24, own=0.1).answers(np.random.default_rng(0))
    common = np.array([np.bincount(long[c::8, t]).argmax() for c in range(8) for t in range(24)]).reshape(8, 24)
    assert (long != common[np.arange(3200) % 8]).mean() == pytest.approx(0.1 * 15 / 16, abs=0.005)


def test_a_fresh_policy_is_uniform():
    task = LatentChainTask(32, 24)
    figures = LatentChainPolicy(task, 0).measure(torch.from_numpy(task.answers(np.random.default_rng(0))))
    assert figures["nll"] == pytest.approx(math.log(16), abs=0.02)
    assert figures["entropy"] == pytest.approx(math.log(8))
    assert figures["success"] == 0


def test_measures_equal_plain_sums():
    task = LatentChainTask(5, 3, classes=2, symbols=4, thoughts=3)
    policy = LatentChainPolicy(task, 1)
    with torch.no_grad():
        policy.logits.normal_()
        policy.thought.mul_(20)
        policy.prompt.mul_(20)
    answers = torch.from_numpy(task.answers(np.random.default_rng(1)))
    every = torch.arange(5)
    table, thoughts = policy.answers(every).detach().exp(), policy.thoughts(every).detach().exp()
    assert torch.allclose(table.sum(-1), torch.ones(5, 3, 3))
    nll, solved, right = 0.0, 0, 0
    for p in range(5):
        likelihood = sum(
            float(thoughts[p, z]) * math.prod(float(table[p, z, t, answers[p, t]]) for t in range(3)) for z in range(3)
        )
        nll -= math.log(likelihood) / 3 / 5
        best = table[p, thoughts[p].argmax()].argmax(-1)
        solved += bool((best == answers[p]).all())
        right += int((best == answers[p]).sum())
    found = policy.measure(answers)
    assert found["nll"] == pytest.approx(nll, rel=1e-5)
    assert found["success"] == pytest.approx(solved / 5)
    assert found["token accuracy"] == pytest.approx(right / 15)


def test_the_head_is_that_of_the_joined_parts():
    task = LatentChainTask(4, 2, thoughts=3)
    policy = LatentChainPolicy(task, 0)
    joined = torch.cat([policy.thought[2], policy.position[1], policy.prompt[3]])
    expected = policy.out(policy.hidden(joined).tanh()).log_softmax(-1)
    assert torch.allclose(policy.answers(torch.tensor([3]))[0, 2, 1], expected, atol=1e-6)
    silent = LatentChainPolicy(task, 0, thinks=False)
    joined = torch.cat([torch.zeros(32), silent.position[1], silent.prompt[3]])
    expected = silent.out(silent.hidden(joined).tanh()).log_softmax(-1)
    assert silent.answers(torch.tensor([3])).shape == (1, 1, 2, 16)
    assert torch.allclose(silent.answers(torch.tensor([3]))[0, 0, 1], expected, atol=1e-6)


def test_a_seed_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    LatentChainPolicy(LatentChainTask(2, 1), 3)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("options", [{"prompts": 0, "length": 1}, {"prompts": 1, "length": 1, "own": 2.0}])
def test_sizes_are_checked(options):
    with pytest.raises(InvalidInputError):
        LatentChainTask(**options)
