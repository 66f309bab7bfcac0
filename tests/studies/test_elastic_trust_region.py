import math

import pytest
import torch
from planted import Figures

from polyreward.studies.base import StudyConfig
from polyreward.studies.elastic_trust_region import STUDY, entropy, entropy_at, make_prompts, run_seed


def figures(grpo, etr, matched):
    rows = {}
    for name, values in (("grpo", grpo), ("etr", etr), ("grpo-matched", matched)):
        for quantity, value in zip(("entropy", "pass rate", "area"), values, strict=True):
            rows[name, quantity] = value
    return Figures(rows)


@pytest.mark.parametrize(
    ("etr", "verdict"),
    [
        ((0.9, 0.945, 0.80), "supported"),
        ((0.7, 0.945, 0.80), "not supported"),
        ((0.9, 0.930, 0.80), "not supported"),
        ((0.9, 0.945, 0.787), "not supported"),
    ],
)
def test_rule(etr, verdict):
    runs = [figures((0.8, 0.95, 0.79), etr, (0.85, 0.94, 0.78))] * 5
    assert STUDY.judge(runs).verdict == verdict


def test_prompts_start_at_their_pass_rates():
    logits, correct = make_prompts(torch.Generator().manual_seed(0))
    mass = (logits.softmax(dim=1) * correct).sum(dim=1)
    torch.testing.assert_close(mass, torch.linspace(-4, 2, 60).sigmoid())
    assert 2 <= int(correct.sum(dim=1).min()) <= int(correct.sum(dim=1).max()) <= 6
    assert float(entropy(torch.full((1, 4), 0.25))) == pytest.approx(math.log(4))


def test_an_unequal_start_has_the_same_pass_rates_and_less_entropy():
    equal, unequal = (make_prompts(torch.Generator().manual_seed(0), flag) for flag in (False, True))
    assert torch.equal(equal[1], unequal[1])
    mass = (unequal[0].softmax(dim=1) * unequal[1]).sum(dim=1)
    torch.testing.assert_close(mass, torch.linspace(-4, 2, 60).sigmoid())
    assert float(entropy(unequal[0].softmax(1)).mean()) < float(entropy(equal[0].softmax(1)).mean()) - 0.2


def test_the_static_clips_that_are_at_least_as_good_are_named():
    run = figures((0.8, 0.95, 0.79), (0.9, 0.945, 0.80), (0.85, 0.94, 0.78))
    assert "at least ETR's in both: none" in STUDY.judge([run]).summary
    run["static 0.2"] = {"entropy": 0.9, "area": 0.8, "pass rate": 0.9}
    assert "at least ETR's in both: 0.2" in STUDY.judge([run]).summary


def test_entropy_is_interpolated_at_the_target():
    assert entropy_at([0.5, 0.8, 1.0], [3.0, 2.0, 1.0]) == pytest.approx(1.5)
    assert entropy_at([0.5, 0.8], [3.0, 2.0]) == 2.0


@pytest.mark.slow
def test_quick_run_is_finite_and_repeats():
    first, second = (run_seed(0, StudyConfig(quick=True)) for _ in range(2))
    assert first == second
    assert len(first) == 17
    assert all(math.isfinite(v) for arm in first.values() for v in arm.values())
    assert first["grpo"]["clip fraction"] > 0.1
    assert first["grpo-matched"]["radius"] == pytest.approx(first["etr"]["radius"])
