import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.reward_models.quality_levels import MODES, QualityPartition, region_mask

BAD, NORMAL, GOOD = 0, 1, 2


def cells(mask):
    """Pairs (k, j) of ratings from 1 in a mask (K, K)."""
    return {(int(k) + 1, int(j) + 1) for k, j in zip(*np.nonzero(np.asarray(mask)), strict=True)}


def triangle(low, high):
    return {(k, j) for k in range(low, high + 1) for j in range(low, k)}


@pytest.mark.parametrize(
    ("chosen", "rejected", "low", "high"),
    [(GOOD, GOOD, 7, 9), (GOOD, NORMAL, 4, 9), (NORMAL, BAD, 1, 6), (GOOD, BAD, 1, 9), (BAD, BAD, 1, 3), (1, 1, 4, 6)],
)
def test_triangles_of_the_paper(chosen, rejected, low, high):
    mask = region_mask(torch.tensor([chosen]), torch.tensor([rejected]))
    assert mask.dtype == torch.bool
    assert mask.shape == (1, 9, 9)
    assert cells(mask[0]) == triangle(low, high)


def test_rectangles_and_tents():
    mask = region_mask(torch.tensor([2, 1, 2]), torch.tensor([1, 1, -1]), mode="rectangle")
    assert cells(mask[0]) == {(k, j) for k in (7, 8, 9) for j in (4, 5, 6)}
    assert cells(mask[1]) == triangle(4, 6)
    assert cells(mask[2]) == triangle(1, 9)
    weights = region_mask(torch.tensor([2, 1]), torch.tensor([1, 1]), mode="weighted")
    tent = torch.tensor([0.5, 1.0, 0.5])
    assert torch.equal(weights[0, 6:, 3:6], tent[:, None] * tent)
    assert float(weights[0].sum()) == 4.0
    assert cells(weights[1] > 0) == triangle(4, 6)
    assert weights[1, 4, 3] == 0.5  # ratings 5 and 4
    assert weights[1, 5, 3] == 0.25


@pytest.mark.parametrize("mode", MODES)
def test_unlabelled_pairs_get_the_whole_triangle(mode):
    mask = region_mask(torch.tensor([-1, 2, -1]), torch.tensor([-1, -1, 0]), mode=mode)
    assert all(cells(one) == triangle(1, 9) for one in mask)
    assert set(mask.float().unique().tolist()) == {0.0, 1.0}
    with_nan = region_mask(torch.tensor([float("nan"), 2.0]), torch.tensor([1.0, 1.0]), mode=mode)
    assert cells(with_nan[0]) == triangle(1, 9)


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda s: sum(s) >= 2)


@settings(deadline=None)
@given(sizes, st.data())
def test_regions_are_those_of_the_definition(blocks, data):
    ends = np.cumsum(blocks).tolist()
    partition = QualityPartition(tuple((end - size + 1, end) for size, end in zip(blocks, ends, strict=True)))
    pairs = [(c, r) for c in range(len(blocks)) for r in range(c + 1) if c != r or blocks[c] > 1]
    if not pairs:
        return
    c, r = data.draw(st.sampled_from(pairs))
    (lo_c, hi_c), (lo_r, hi_r) = partition.boundaries[c], partition.boundaries[r]
    wide, narrow = set(), set()
    for k in range(1, partition.num_ratings + 1):
        for j in range(1, partition.num_ratings + 1):
            if j < k and lo_r <= j and k <= hi_c:
                wide.add((k, j))
                if lo_c <= k and j <= hi_r:
                    narrow.add((k, j))
    found = {mode: region_mask(np.array([c]), np.array([r]), partition, mode)[0] for mode in MODES}
    assert cells(found["triangle"]) == wide
    assert cells(found["rectangle"]) == cells(found["weighted"] > 0) == narrow
    assert narrow <= wide <= triangle(1, partition.num_ratings)


def test_pairs_are_independent_of_one_another_and_of_the_type():
    chosen, rejected = [2, -1, 1, 0], [0, -1, 1, 0]
    whole = region_mask(torch.tensor(chosen), torch.tensor(rejected))
    for i in range(4):
        assert torch.equal(region_mask(torch.tensor(chosen[i : i + 1]), torch.tensor(rejected[i : i + 1]))[0], whole[i])
    array = region_mask(np.array(chosen), np.array(rejected))
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, whole.numpy())
    assert np.array_equal(region_mask(chosen, rejected), array)
    assert region_mask(torch.zeros(0).long(), torch.zeros(0).long()).shape == (0, 9, 9)


@pytest.mark.parametrize(
    ("chosen", "rejected", "partition", "message"),
    [
        ([2, 0], [1, 1], None, r"pair 1: the chosen response has level 0, below the rejected one's 1"),
        ([3], [1], None, r"level_c\[0\] is 3, expected a level from 0 to 2"),
        ([1], [-2], None, r"level_r\[0\] is -2"),
        ([1.5], [1], None, r"level_c\[0\] is 1.5"),
        ([1, 1], [1], None, "expected \\(pairs,\\) of both"),
        ([1], [1], QualityPartition(((1, 1), (2, 2))), "single rating"),
    ],
)
def test_wrong_levels(chosen, rejected, partition, message):
    with pytest.raises(ValueError, match=message):
        region_mask(torch.tensor(chosen), torch.tensor(rejected), partition)


def test_unknown_mode():
    with pytest.raises(UnknownNameError, match="did you mean 'rectangle'"):
        region_mask([1], [0], mode="rectangel")


@pytest.mark.parametrize(
    "boundaries",
    [((1, 3), (5, 9)), ((2, 9),), ((1, 3), (3, 9)), ((1, 3), (4, 2)), (), ((1, 1),), ((1, 2.5), (3, 4)), ((1,), (2,))],
)
def test_partitions_must_tile(boundaries):
    with pytest.raises(InvalidInputError, match=r"tile the ratings|whole numbers"):
        QualityPartition(boundaries)


def test_partitions():
    assert QualityPartition().boundaries == ((1, 3), (4, 6), (7, 9)) == QualityPartition.even(9).boundaries
    assert QualityPartition.even(5).boundaries == ((1, 2), (3, 4), (5, 5))
    assert QualityPartition.even(4, 1).boundaries == ((1, 4),)
    assert QualityPartition([[1, 2], [3, 5]]).boundaries == ((1, 2), (3, 5))
    with pytest.raises(InvalidInputError, match="2 ratings cannot be cut into 3"):
        QualityPartition.even(2)
    membership = QualityPartition(((1, 2), (3, 5))).membership
    assert membership.tolist() == [[True, True, False, False, False], [False, False, True, True, True]]


def test_levels_of_ratings():
    partition = QualityPartition()
    levels = partition.level_of(torch.tensor([1.0, 3.0, 3.4, 3.5, 6.49, 9.0, float("nan")]))
    assert levels.tolist() == [0, 0, 0, 1, 1, 2, -1]
    assert partition.level_of(np.array([[9, 4]])).tolist() == [[2, 1]]
    with pytest.raises(InvalidInputError, match="rating 10 is outside the scale 1 to 9"):
        partition.level_of([10.0])
    with pytest.raises(InvalidInputError, match="rating 0 is outside"):
        partition.level_of([0])
