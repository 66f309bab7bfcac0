import itertools

import numpy as np
import pytest

from polyreward.rewards.proximity import BlockMatch
from polyreward.studies.base import StudyConfig
from polyreward.studies.stratified_grpo import softmax
from polyreward.studies.sweet_spot import (
    OTHERS,
    RATES,
    STUDY,
    TUNED,
    Screens,
    advantages,
    click,
    hit_rate,
    run_seed,
    signal_to_noise,
    sudoku,
    sudoku_grids,
    sudoku_puzzles,
)


@pytest.mark.parametrize(
    ("offset", "binary", "continuous", "tiered"),
    [(4, 0.2180, 0.4238, 0.4784), (8, 0.0822, 0.2494, 0.2628), (12, 0.0155, 0.0770, 0.0636)],
)
def test_signal_to_noise_of_the_worked_example(offset, binary, continuous, tiered):
    figures = signal_to_noise(offset)
    assert figures["binary"] == pytest.approx(binary, abs=1e-4)
    assert figures["continuous"] == pytest.approx(continuous, abs=1e-4)
    assert figures["SSL-4"] == pytest.approx(tiered, abs=1e-4)


def test_signal_to_noise_equals_a_plain_sum():
    x = [float(cell) for cell in range(-20, 21)]
    weight = [np.exp(-(((cell - 8) / 5) ** 2) / 2) for cell in x]
    policy = [w / sum(weight) for w in weight]
    centre = sum(p * cell for p, cell in zip(policy, x, strict=True))
    hit = [float(abs(cell) <= 1) for cell in x]
    baseline = sum(p * r for p, r in zip(policy, hit, strict=True))
    gradient = [(r - baseline) * (cell - centre) / 25 for r, cell in zip(hit, x, strict=True)]
    mean = sum(p * g for p, g in zip(policy, gradient, strict=True))
    second = sum(p * g * g for p, g in zip(policy, gradient, strict=True))
    assert signal_to_noise(8)["binary"] == pytest.approx(mean**2 / (second - mean**2))


def test_a_fresh_policy_hits_about_two_percent_of_the_time():
    screens = Screens(np.random.default_rng(0), 500, 24)
    rate = hit_rate(np.zeros((2, 10, 24)), screens)
    assert 0.01 < rate < 0.025
    cells = list(itertools.product(range(24), range(24)))
    hits = [np.mean([l <= c + 0.5 <= r and t <= d + 0.5 <= b for c, d in cells]) for l, t, r, b in screens.boxes[:20]]
    assert hit_rate(np.zeros((2, 10, 24)), _first(screens, 20)) == pytest.approx(np.mean(hits))


def _first(screens, count):
    screens.bumps, screens.boxes = screens.bumps[:count], screens.boxes[:count]
    return screens


def test_hit_rate_equals_sampling():
    rng = np.random.default_rng(1)
    screens, weights = Screens(rng, 3, 24), rng.normal(size=(2, 10, 24)) * 5
    chances = softmax(np.einsum("sab,abc->sac", screens.bumps, weights))
    x, y = (np.array([rng.choice(24, size=20_000, p=chances[s, axis]) for s in range(3)]) + 0.5 for axis in (0, 1))
    left, top, right, bottom = screens.boxes.T[..., None]
    hits = ((x >= left) & (x <= right) & (y >= top) & (y <= bottom)).mean()
    assert hit_rate(weights, screens) == pytest.approx(hits, abs=0.01)


def test_binary_groups_are_dead_at_the_start_and_tiered_ones_are_not():
    binary, tiered = (click(TUNED[name], 0, 10) for name in ("binary", "SSL-4"))
    assert binary["dead groups"] > 0.8
    assert tiered["dead groups"] < 0.5


def test_training_raises_the_hit_probability():
    figures = click(TUNED["SSL-4"], 3, 120, rate=16.0)
    assert figures["hit probability"] > 0.3
    assert figures == click(TUNED["SSL-4"], 3, 120, rate=16.0)


def test_advantages_are_standardised_inside_groups():
    gain, dead = advantages(np.array([[0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    assert gain == pytest.approx(np.array([[-1, 1, -1, 1], [0, 0, 0, 0]]), abs=1e-5)
    assert dead == 0.5


def test_sudoku_grids_and_puzzles():
    grids = sudoku_grids()
    assert len(grids) == 288 == len(np.unique(grids.reshape(288, 16), axis=0))
    for grid in grids[::37]:
        groups = [*grid, *grid.T, *(grid[r : r + 2, c : c + 2].ravel() for r in (0, 2) for c in (0, 2))]
        assert all(sorted(group) == [0, 1, 2, 3] for group in groups)
    solutions, empty = sudoku_puzzles(np.random.default_rng(0))
    for solution, hidden in zip(solutions, empty, strict=True):
        assert sum((grid == solution)[~hidden].all() for grid in grids) == 1
        assert 8 <= hidden.sum() <= 10


def test_sudoku_with_tiers_learns_and_binary_does_not():
    tiered = sudoku(TUNED["SSL-4"], BlockMatch((2, 2)), 0, 100)
    binary = sudoku(TUNED["binary"], BlockMatch((2, 2)), 0, 20)
    assert tiered["cells right"] > 0.35
    assert binary["solved"] < 1e-4
    assert binary["cells right"] == pytest.approx(0.25, abs=0.01)


@pytest.mark.slow
def test_quick_run_is_finite_and_judged():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for arm in figures.values() for value in arm.values())
    judged = STUDY.judge([figures])
    assert judged.verdict in ("supported", "not supported", "inconclusive")


def _figures(binary, tiered, final=0.7, dead=0.4):
    run = {}
    for name, steps in (("binary", binary), ("SSL-4", tiered), ("continuous", tiered)):
        for rate in RATES:
            run[f"{name}, rate {rate:g}"] = {
                "steps to 0.5": steps,
                "hit probability": final if name == "SSL-4" else 0.7,
                "dead groups, first 10 steps": 0.9 if name == "binary" else dead,
            }
        run[f"{name}, 28 cells"] = {"steps to 0.5": steps}
    run |= {name: {"steps to 0.5": tiered} for name in OTHERS}
    for offset in (4, 8, 12):
        run[f"signal to noise, {offset} cells off"] = signal_to_noise(offset)
    for name in ("binary", "SSL-4", "SSL, zoned blocks", "continuous"):
        run[f"sudoku, {name}"] = {"solved": 0.5}
    return run


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([_figures(300, 150), _figures(300, 200)], "supported"),
        ([_figures(300, 150), _figures(300, 150, final=0.6)], "inconclusive"),
        ([_figures(300, 150, dead=0.6)], "inconclusive"),
        ([_figures(300, 220)], "inconclusive"),
        ([_figures(300, 290)], "not supported"),
    ],
)
def test_rule(runs, verdict):
    assert STUDY.judge(runs).verdict == verdict
