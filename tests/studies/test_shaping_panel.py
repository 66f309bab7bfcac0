import math

import pytest

from polyreward.studies.shaping_panel import entropy_panel, length_panel


def test_untrained_lengths_are_geometric_and_cut():
    stop = 1 / (1 + math.exp(3))
    chances = [(1 - stop) ** n * stop for n in range(48)] + [(1 - stop) ** 48]
    figures = length_panel(0, steps=0)["length, trapezoid"]
    assert figures["mean length"] == pytest.approx(sum(n * p for n, p in enumerate(chances)), rel=1e-5)
    assert figures["share on the plateau"] == pytest.approx(sum(chances[12:21]), rel=1e-5)


def test_the_policy_starts_inside_the_band():
    figures = entropy_panel(0, steps=1)
    odds = math.exp(4.3)
    chances = [odds / (odds + 7)] + [1 / (odds + 7)] * 7
    expected = -sum(p * math.log(p) for p in chances)
    assert 0.2 < expected < 0.6
    assert all(arm["entropy"] == pytest.approx(expected, rel=1e-5) for arm in figures.values())
