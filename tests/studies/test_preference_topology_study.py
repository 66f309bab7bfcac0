import numpy as np
import pytest

from polyreward.data.bayesian_network import ResponseTree
from polyreward.studies.base import StudyConfig
from polyreward.studies.preference_topology import (
    MODELS,
    POSTERIOR_ALPHAS,
    REGIMES,
    SIZES,
    STUDY,
    balanced_tree,
    designs,
    leaf_numbers,
    model_case,
    regime,
    run_seed,
)


@pytest.mark.parametrize("leaves", [64, 128, 256])
def test_a_balanced_tree_is_full_at_the_top_and_random_below(leaves):
    tree = balanced_tree(leaves, 5, np.random.default_rng(0))
    assert len(tree) == leaves
    assert tree.duplicates == 0
    assert len(np.unique(tree.responses[:, :3], axis=0)) == 64
    per_top = np.bincount(tree.responses[:, 0])
    assert per_top.tolist() == [leaves // 4] * 4
    assert len(np.unique(leaf_numbers(tree.responses))) == leaves
    other = balanced_tree(leaves, 5, np.random.default_rng(1))
    if leaves < 4**4:
        assert not np.array_equal(np.sort(leaf_numbers(tree.responses)), np.sort(leaf_numbers(other.responses)))


def test_leaf_numbers_share_the_steps_of_the_tree():
    tree = ResponseTree(4, 3, 0.5)
    steps = np.array([[1, 2, 3], [1, 2, 0], [1, 0, 3]])
    numbers = leaf_numbers(steps)
    assert numbers.tolist() == [27, 24, 19]
    assert tree.common_depth(numbers[0], numbers).tolist() == [3, 2, 1]


def test_designs_have_n_pairs_and_differ_in_reuse():
    found = designs(256, np.random.default_rng(0))
    uses = {name: np.unique(pairs, return_counts=True)[1] for name, pairs in found.items()}
    for name, pairs in found.items():
        assert 250 <= len(pairs) <= 256, name
        assert (pairs[:, 0] != pairs[:, 1]).all()
    assert uses["chain"].mean() < 1.02
    assert (uses["tree, each leaf twice"] == 2).all()
    assert (uses["tree of 2n leaves, each once"] == 1).all()
    assert 2 < uses["tree"].mean() < 2.6
    assert 2 < uses["n independent leaves, reused"].mean() < 2.6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::polyreward.data.prefix_trees.DuplicateResponsesWarning")
def test_a_quick_run_is_finite_and_repeats():
    figures = run_seed(0, StudyConfig(quick=True))
    assert all(np.isfinite(value) for part in figures.values() for value in part.values())
    assert run_seed(0, StudyConfig(quick=True)) == figures
    for alpha in POSTERIOR_ALPHAS:
        for design, value in figures[f"posterior, alpha {alpha:g}"].items():
            assert value <= figures[f"designs, alpha {alpha:g}"][design]
    assert np.isfinite(STUDY.judge([figures]).effect)


def figures_of(ratios=(1.6, 2.0, 2.2), half=2.0, close=1.05, win=0.6):
    made = {}
    for alpha, variance in REGIMES:
        for place, n in enumerate(SIZES):
            ratio = ratios[place] if (alpha, variance) == (0.3, 1e-3) else half if alpha == 0.5 else close
            made[regime(alpha, variance, n)] = {"chain": 0.2 * ratio, "tree": 0.2}
    for alpha in POSTERIOR_ALPHAS:
        made |= {f"{kind}, alpha {alpha:g}": {"chain": 0.2, "tree": 0.19} for kind in ("designs", "posterior")}
    for case in MODELS:
        made[model_case(*case)] = {"win rate of tree": win} | {
            f"{key}, {name}": 1.0
            for key in ("accuracy", "best of 64", "tokens a pair", "responses")
            for name in ("chain", "tree")
        }
    return made


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "supported"),
        ({"win": 0.45}, "supported"),
        ({"ratios": (1.6, 2.2, 2.0)}, "inconclusive"),
        ({"half": 1.4}, "inconclusive"),
        ({"close": 1.3}, "inconclusive"),
        ({"close": 0.8}, "inconclusive"),
        ({"ratios": (1.0, 1.05, 1.1), "half": 1.1}, "not supported"),
    ],
)
def test_the_rule_can_fail(changed, verdict):
    runs = [figures_of(**changed) for _ in range(STUDY.seeds)]
    judged = STUDY.judge(runs)
    assert judged.verdict == verdict
    assert all(judged.checks.values()) == (verdict == "supported")
    assert judged.effect == pytest.approx(changed.get("ratios", (0, 2.0))[1])
    assert ("no gain" in judged.summary) == (changed.get("win") == 0.5)
    assert ("a loss" in judged.summary) == (changed.get("win") == 0.45)
