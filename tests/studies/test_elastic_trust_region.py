import math

import pytest
import torch

from polyreward.studies.base import StudyConfig
from polyreward.studies.elastic_trust_region import STUDY, entropy, entropy_at, make_prompts, run_seed


def figures(grpo, etr, matched):
    rest = {"radius": 0.2, "ratio of rare correct": 1.5, "ratio change of weak": 0.1, "entropy at pass rate 0.9": 1.0}
    arms = {"grpo": grpo, "etr": etr, "grpo-matched": matched}
    runs = {name: {"entropy": e, "pass rate": p, "area": a, **rest} for name, (e, p, a) in arms.items()}
    return {**runs, "etr, 5% of labels flipped": runs["etr"], "grpo, 5% of labels flipped": runs["grpo"]}


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


def test_entropy_is_interpolated_at_the_target():
    assert entropy_at([0.5, 0.8, 1.0], [3.0, 2.0, 1.0]) == pytest.approx(1.5)
    assert entropy_at([0.5, 0.8], [3.0, 2.0]) == 2.0


@pytest.mark.slow
def test_quick_run_is_finite_and_repeats():
    first, second = (run_seed(0, StudyConfig(quick=True)) for _ in range(2))
    assert first == second
    assert len(first) == 10
    assert all(math.isfinite(v) for arm in first.values() for v in arm.values())
    assert first["grpo"]["clip fraction"] > 0.1
    assert first["grpo-matched"]["radius"] == pytest.approx(first["etr"]["radius"])
