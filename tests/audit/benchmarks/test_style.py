import numpy as np
import pytest

from polyreward.audit.benchmarks.style import style_features, style_gap
from polyreward.errors import InvalidInputError


def test_features_of_texts():
    found = style_features(["one two\n\nthree", "", "a"])
    assert found["words"].tolist() == [3, 0, 1]
    assert found["steps"].tolist() == [2, 0, 1]
    assert found["characters"].tolist() == [14, 0, 1]
    assert found["words a step"].tolist() == [1.5, 0, 1]
    with pytest.raises(InvalidInputError, match="text 1 is int"):
        style_features(["a", 3])


def test_effect_sizes_by_hand():
    # means 2 and 5, both variances 1
    gap = style_gap([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])["0"]
    assert gap["d"] == pytest.approx(-3)
    assert gap["delta"] == -1
    assert gap["interval"][0] < -3 < gap["interval"][1]
    assert (gap["chosen"], gap["rejected"]) == (2, 5)
    same = style_gap({"words": [1, 2, 2]}, {"words": [2, 1, 2]})["words"]
    assert (same["d"], same["delta"]) == (0, 0)
    back = style_gap([4.0, 5.0, 6.0], [1.0, 2.0, 3.0])["0"]
    assert back["d"] == pytest.approx(3)


def test_no_spread():
    assert style_gap([0.1, 0.1, 0.1], [0.1, 0.1])["0"]["d"] == 0
    assert style_gap([2.0, 2.0], [1.0])["0"]["d"] == np.inf
    assert style_gap([1.0], [2.0])["0"]["delta"] == -1


def test_delta_counts_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 20), rng.integers(0, 4, 15)
    pairs = np.sign(a[:, None] - b[None, :])
    assert style_gap(a, b)["0"]["delta"] == pytest.approx(pairs.mean())
    both = style_gap(np.stack([a, a], 1), np.stack([b, b], 1))
    assert list(both) == ["0", "1"]


def test_wrong_features():
    with pytest.raises(InvalidInputError, match="expected the same"):
        style_gap({"a": [1]}, {"b": [1]})
    with pytest.raises(InvalidInputError, match="no values"):
        style_gap([], [1.0])
    with pytest.raises(InvalidInputError, match="nan"):
        style_gap([np.nan], [1.0])
