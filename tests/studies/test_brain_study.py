import numpy as np
import pytest
import torch

from polyreward.studies.base import StudyConfig
from polyreward.studies.brain import (
    EXACT,
    FEWER,
    HARDENING,
    OFFSETS,
    RATES,
    STUDY,
    TRAINED,
    Drawn,
    hardened,
    objective,
    recover,
    run_seed,
    variance,
)
from polyreward.tasks.posterior_recovery import PosteriorTask

SMALL = PosteriorTask(prompts=10, length=2, symbols=4, features=3)


@pytest.mark.parametrize(
    ("offset", "dpg", "gdcpp", "brain"),
    [
        (0.0, 0.124, 0.593, 0.175),
        (0.25, 0.217, 0.338, 0.192),
        (0.5, 0.395, 0.354, 0.192),
        (0.75, 0.762, 0.590, 0.193),
        (1.0, 1.489, 1.117, 0.172),
    ],
)
def test_variances_of_the_published_experiment(offset, dpg, gdcpp, brain):
    found = variance(offset, 0, 20_000)
    assert found["DPG var"] == pytest.approx(dpg, rel=0.2)
    assert found["GDC++ var"] == pytest.approx(gdcpp, rel=0.2)
    assert found["BRAIn var"] == pytest.approx(brain, rel=0.06)
    assert found["DPG mean"] == pytest.approx(-1, abs=0.03)
    assert found["GDC++ mean"] == pytest.approx(-1, abs=0.03)
    assert -0.86 < found["BRAIn mean"] < -0.75


def test_every_arm_starts_from_one_set_of_samples():
    problem = SMALL.draw(0)
    first, second = Drawn(problem, 0, 8), Drawn(problem, 0, 8)
    assert torch.equal(first.chosen, second.chosen)
    assert first.prefers_first.shape == (10, 4)
    better = first.reward[:, 0::2] > first.reward[:, 1::2]
    assert (first.prefers_first == better).float().mean() > 0.5


def test_the_gradient_of_brain_is_zero_at_the_posterior_and_of_the_others_is_not():
    problem = SMALL.draw(1)
    drawn = Drawn(problem, 1, 16)
    for name in TRAINED:
        parameters = (problem.prior + problem.direction).requires_grad_(True)
        (gradient,) = torch.autograd.grad(
            objective(name)(problem.logp(parameters).gather(1, drawn.chosen), drawn), parameters
        )
        assert (gradient.abs().max() < 1e-6) == (name == "BRAIn"), name


def test_hardening_ends_in_the_arg_max():
    problem = SMALL.draw(2)
    drawn = Drawn(problem, 2, 8)
    logq = problem.logp(problem.prior * 0.5).gather(1, drawn.chosen)
    assert hardened(0.0)(logq, drawn).item() == pytest.approx(objective("BRAIn")(logq, drawn).item(), rel=1e-5)
    log_policy = (logq - drawn.prior).log_softmax(dim=1)
    best = drawn.reward.argmax(dim=1)
    expected = -log_policy[torch.arange(10), best].mean().item()
    assert hardened(1.0)(logq, drawn).item() == pytest.approx(expected, rel=1e-5)


def test_brain_recovers_a_small_posterior():
    problem = SMALL.draw(3)
    found = recover(problem, objective("BRAIn"), 3, 300, 0.05, 16)
    assert found["kl"] < 0.01
    assert found["reward"] == pytest.approx(problem.value(problem.prior + problem.direction), abs=0.1)


@pytest.mark.slow
def test_quick_run_is_finite_and_judged(monkeypatch):
    monkeypatch.setattr("polyreward.studies.brain.RATES", (0.05,))
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for arm in figures.values() for value in arm.values())
    assert STUDY.judge([figures]).verdict in ("supported", "not supported", "inconclusive")


def _figures(brain=0.001, rival=0.03, least=0.19, dpg=1.5, mean=-0.8):
    run = {}
    for offset in OFFSETS:
        run[f"variance, m={offset:g}"] = {
            "DPG var": dpg, "DPG mean": -1.0, "GDC++ var": 1.2, "GDC++ mean": -1.0,
            "BRAIn var": least, "BRAIn mean": mean,
        }  # fmt: skip
    for part in ("exact", "noisy"):
        run[f"{part}, SFT"] = {"kl": 0.9, "reward": 0.0}
        run[f"{part}, posterior"] = {"reward": 2.0}
        for name in TRAINED:
            for rate in RATES:
                value = brain if name == "BRAIn" else rival
                run[f"{part}, {name}, rate {rate:g}"] = {"kl": value + (rate != 0.05), "reward": 2.0}
    run |= {f"samples, {number}": {"kl": 0.1} for number in FEWER}
    return run | {f"hardening, {share:g}": {"kl": 0.1} for share in HARDENING}


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([{}, {}], "supported"),
        ([{"least": 1.6}, {}], "not supported"),
        ([{"brain": 0.04}], "not supported"),
        ([{"brain": 0.02}], "inconclusive"),
        ([{"brain": 0.009, "rival": 0.008}, {}], "inconclusive"),
        ([{"dpg": 0.8}], "inconclusive"),
        ([{"mean": -0.3}], "inconclusive"),
    ],
)
def test_rule(runs, verdict):
    assert STUDY.judge([_figures(**change) for change in runs]).verdict == verdict


def test_the_task_is_the_one_described():
    assert EXACT.symbols**EXACT.length == 512
    assert STUDY.seeds == 5
