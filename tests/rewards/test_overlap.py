import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.rewards.overlap import (
    OverlapReward,
    PointInBox,
    PointsReward,
    RelativeAccuracyReward,
    TranscriptionReward,
    iou_1d,
    iou_2d,
    matched_point_similarity,
    mean_relative_accuracy,
    wer_score,
)


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [((0, 2), (1, 3), 1 / 3), ((0, 2), (0, 2), 1), ((0, 1), (1, 2), 0), ((0, 1), (5, 6), 0), ((2, 0), (0, 2), 0),
     ((0, 0), (0, 0), 0), ((0, 4), (1, 2), 0.25)],
)  # fmt: skip
def test_intervals(first, second, value):
    assert iou_1d(first, second) == pytest.approx(value)
    assert iou_1d(second, first) == pytest.approx(value)


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7), ((0, 0, 2, 2), (0, 0, 2, 2), 1), ((0, 0, 1, 1), (2, 2, 3, 3), 0),
     ((0, 0, 2, 2), (0, 0, 2, 1), 0.5), ((2, 2, 0, 0), (0, 0, 2, 2), 0), ((1, 1, 1, 1), (0, 0, 2, 2), 0)],
)  # fmt: skip
def test_boxes(first, second, value):
    assert iou_2d(first, second) == pytest.approx(value)
    tensors = [torch.tensor(box, dtype=torch.float32) for box in (first, second)]
    result = iou_2d(*tensors)
    assert result.dtype == torch.float32
    assert float(result) == pytest.approx(value)
    assert float(iou_2d(first, tensors[1])) == pytest.approx(value)


cell = st.integers(0, 6)


@given(st.tuples(cell, cell, cell, cell), st.tuples(cell, cell, cell, cell))
def test_boxes_equal_counting_unit_cells(first, second):
    def cells(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    a, b = cells(first), cells(second)
    assert iou_2d(first, second) == pytest.approx(len(a & b) / len(a | b) if a | b else 0)
    assert iou_2d([first, second], second).shape == (2,)


def test_relative_accuracy_of_the_card():
    assert mean_relative_accuracy(11, 10) == pytest.approx(0.8)
    assert mean_relative_accuracy(9, 10) == pytest.approx(0.8)
    assert mean_relative_accuracy(10.5, 10) == pytest.approx(0.9)  # 0.05 is not smaller than 1 - 0.95
    assert mean_relative_accuracy(10, 10) == 1
    assert mean_relative_accuracy(15, 10) == 0
    assert mean_relative_accuracy(14.9, 10) == pytest.approx(0.1)
    assert mean_relative_accuracy(-10, -10) == 1
    assert [float(mean_relative_accuracy(p, 0)) for p in (0, 0.1)] == [1, 0]
    assert mean_relative_accuracy(np.nan, 10) == 0
    tensor = mean_relative_accuracy(torch.tensor([11.0, 10.0]), torch.tensor([10.0, 10.0]))
    assert tensor.tolist() == pytest.approx([0.8, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_relative_accuracy_exactly_on_a_threshold_in_every_dtype(dtype):
    for target in (0.1, 0.3, 7.0, 1000.0):
        for k in range(1, 10):  # relative error 0.05 k is not smaller than 0.05 k, and smaller than the next
            given = torch.tensor([target * (1 + 0.05 * k)], dtype=dtype)
            for reference in (target, torch.tensor([target], dtype=dtype), np.array([target])):
                assert float(mean_relative_accuracy(given, reference)) == pytest.approx((10 - k) / 10), (target, k)
            if dtype != torch.float16:
                assert mean_relative_accuracy(given.numpy(), target) == pytest.approx((10 - k) / 10)
    assert float(mean_relative_accuracy(torch.tensor([0.11]), 0.1)) == pytest.approx(0.8)
    assert float(mean_relative_accuracy(torch.tensor(11), torch.tensor(10))) == pytest.approx(0.8)
    near = torch.tensor([1.0, 1.0 + torch.finfo(torch.bfloat16).eps], dtype=torch.bfloat16)
    assert mean_relative_accuracy(near, 1.0).tolist() == pytest.approx([1, 1])


def test_points_of_the_best_matching():
    targets = np.array([(0.0, 0.0), (100.0, 0.0), (0.0, 100.0)])
    assert matched_point_similarity(targets[[2, 0, 1]], targets) == 1
    assert matched_point_similarity(targets + np.array([30, 40]), targets) == pytest.approx(np.exp(-0.5))
    assert matched_point_similarity(targets + np.array([0, 10]), targets, spread=10) == pytest.approx(np.exp(-0.5))
    assert matched_point_similarity(targets[:2], targets) == 0
    assert matched_point_similarity(targets * np.nan, targets) == 0
    for wrong in (np.zeros((0, 2)), np.zeros(2), np.zeros((3, 3))):
        with pytest.raises(InvalidInputError):
            matched_point_similarity(targets, wrong)


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=6, max_size=6))
def test_points_equal_permutations(numbers):
    points, targets = np.array(numbers[:3]), np.array(numbers[3:])
    best = min(np.linalg.norm(points[list(o)] - targets, axis=1).mean() for o in itertools.permutations(range(3)))
    assert matched_point_similarity(points, targets) == pytest.approx(np.exp(-(best**2) / 5000))


def edit_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    replaced = edit_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(replaced, edit_distance(a[1:], b) + 1, edit_distance(a, b[1:]) + 1)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=5), st.lists(st.sampled_from("abcd"), max_size=5))
def test_word_error_equals_plain_recursion(reference, hypothesis):
    score = wer_score(" ".join(reference), " ".join(hypothesis))
    assert score == pytest.approx(max(0, 1 - edit_distance(reference, hypothesis) / len(reference)))


def test_word_error():
    assert wer_score("the cat sat", "the cat sat") == 1
    assert wer_score("the cat sat", "the  hat") == pytest.approx(1 / 3)
    assert wer_score("a", "b c d e") == 0
    with pytest.raises(InvalidInputError, match="no words"):
        wer_score(" ", "a")


def test_rewards_read_text():
    box = [(0, 0, 2, 2)] * 4
    texts = ["Box 1: [0, 0, 2, 1]", "[0, 0, 2]", "none", "0 0 2 2"]
    assert OverlapReward()(None, texts, box=box) == [0.5, 0, 0, 1]
    assert OverlapReward()(None, ["[100,200,300,400]"], box=[(100, 200, 300, 400)]) == [1]
    assert PointsReward()(None, ["[[100,200],[300,-400]]"], points=[[(300, -400), (100, 200)]]) == [1]
    assert RelativeAccuracyReward()(None, ["about 1,100"], answer=[1000]) == pytest.approx([0.8])
    assert OverlapReward()(None, ["0 0 2 1"], box=[[(5, 5, 6, 6), (0, 0, 2, 1)]]) == [1]
    assert OverlapReward("span", "interval")(None, ["1 to 3"], span=[(2, 3)]) == [0.5]
    hits = PointInBox()(
        None, ["(0,1)", "1 1.5", "2.1, 1", "9", "(9,9)"], box=[(0, 0, 2, 2)] * 4 + [[(0, 0, 2, 2), (8, 8, 9, 9)]]
    )
    assert hits == [1, 1, 0, 0, 1]
    assert RelativeAccuracyReward()(None, ["about 11", "ten", "-"], answer=[10] * 3) == pytest.approx([0.8, 0, 0])
    assert PointsReward()(None, ["(30, 40)", "(0, 0) (1, 1)", "1"], points=[[(0, 0)]] * 3) == pytest.approx(
        [np.exp(-0.5), 0, 0]
    )
    assert TranscriptionReward(ignore_case=True)(None, ["The Cat"], answer=["the cat"]) == [1]
    assert TranscriptionReward()(None, ["The cat"], answer=["the cat"]) == [0.5]
    for make in (lambda: OverlapReward(shape="circle"), lambda: PointsReward(spread=0)):
        with pytest.raises(InvalidInputError):
            make()
