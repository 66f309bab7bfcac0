import math

import numpy as np
import pytest
import torch

from polyreward.studies.base import StudyConfig
from polyreward.studies.likelihood_rewards import (
    ARMS,
    KINDS,
    OPINIONATED,
    RATES,
    STUDY,
    TASKS,
    deviations,
    loss,
    pick,
    run_seed,
    train,
)
from polyreward.tasks.latent_chain import LatentChainPolicy, LatentChainTask

TINY = LatentChainTask(4, 2, classes=2, symbols=3, thoughts=3)


def test_picks_follow_the_probabilities():
    logp = torch.tensor([0.2, 0.0, 0.5, 0.3]).log()
    found = pick(logp, torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 0.999]))
    assert found.tolist() == [0, 0, 2, 2, 3, 3]
    draws = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    assert (torch.bincount(pick(logp, draws)) / 100_000).tolist() == pytest.approx([0.2, 0, 0.5, 0.3], abs=0.01)


def test_the_binary_loss_rewards_an_answer_that_is_right_in_full():
    policy, answers = LatentChainPolicy(TINY, 0), torch.tensor([[0, 1]])
    draws, noise = torch.full((1, 2), 0.5), np.array([[[0.01, 0.5], [0.99, 0.5]]])
    value = loss("binary", policy, torch.tensor([0]), answers, draws, noise)
    table, thoughts = policy.answers(torch.tensor([0]))[0, 1], policy.thoughts(torch.tensor([0]))[0, 1]
    right = thoughts + table[0, 0] + table[1, 1]
    wrong = thoughts + table[0, 2] + table[1, 1]
    assert value.item() == pytest.approx(-(right - wrong).item() / 2, rel=1e-3)


def test_rewards_hardly_differ_at_first_where_answers_are_long():
    task = LatentChainTask(32, 24, own=0.1)
    answers = torch.from_numpy(task.answers(np.random.default_rng(0)))
    found = deviations(LatentChainPolicy(task, 0), answers)
    assert found["prob"] < 1e-28
    assert 0.01 < found["log-prob"] < 1
    assert found["avg-log-prob"] == pytest.approx(found["log-prob"] / 24)


@pytest.mark.slow
def test_probability_does_not_move_on_long_answers_and_log_probability_does():
    task = TASKS["long"][0]
    answers = torch.from_numpy(task.answers(np.random.default_rng(0)))
    start = LatentChainPolicy(task, 0).measure(answers)["nll"]
    assert start == pytest.approx(math.log(16), abs=0.02)
    moved = {kind: train(kind, task, answers, 0, 12, 1e-2)["nll"] - start for kind in ("prob", "binary", "log-prob")}
    assert abs(moved["prob"]) < 1e-4
    assert moved["binary"] == 0
    assert moved["log-prob"] < -0.05


@pytest.mark.slow
def test_quick_run_is_finite_and_judged(monkeypatch):
    monkeypatch.setattr("polyreward.studies.likelihood_rewards.RATES", (3e-3,))
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for arm in figures.values() for value in arm.values())
    assert STUDY.judge([figures]).verdict in ("supported", "not supported", "inconclusive")


def _figures(prob=2.772, binary=2.772, log_prob=0.33, sft=0.3, success=1.0, perplexity=87.0):
    run = {"long, start": {"nll": 2.773}}
    long = dict.fromkeys(ARMS, 1.0) | {"prob": prob, "binary": binary, "log-prob": log_prob, "sft": sft}
    short = dict.fromkeys(ARMS, 1.0) | {"prob": perplexity, "binary": perplexity}
    logs = {kind: math.log(value) for kind, value in short.items()}
    for task, table in (("long", long), ("short", logs), (OPINIONATED, logs)):
        run[f"{task}, deviation over thoughts"] = dict.fromkeys(KINDS, 0.1)
        for kind in ARMS:
            for rate in RATES:
                reached = success if kind == "log-prob" else 0.9
                figures = {"nll": table[kind] + (rate != 3e-3), "success": reached, "token accuracy": 0.9}
                run[f"{task}, {kind}, rate {rate:g}"] = figures
    return run


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "supported"),
        ({"prob": 2.7}, "not supported"),
        ({"log_prob": 0.7}, "not supported"),
        ({"log_prob": 0.45}, "inconclusive"),
        ({"success": 0.8}, "inconclusive"),
        ({"perplexity": 4.0}, "inconclusive"),
        ({"binary": 2.6}, "inconclusive"),
        ({"prob": 2.9}, "inconclusive"),
    ],
)
def test_rule(change, verdict):
    assert STUDY.judge([_figures(**change), _figures(**change)]).verdict == verdict
