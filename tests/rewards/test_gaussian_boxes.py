import math
import pickle
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.advantages.presets import grpo_trl
from polyreward.advantages.transform import compute_advantages
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.rewards.composition import weighted_sum
from polyreward.rewards.gaussian_boxes import (
    BoxParser,
    BoxReward,
    GaussianCoverageReward,
    GaussianPointReward,
    GuiGroundingReward,
    Kind,
    SpatialGaussian,
    fixed_std,
)

TARGET = np.array([100.0, 100.0, 200.0, 140.0])
CLOSE, FAR = np.array([110.0, 104.0, 190.0, 144.0]), np.array([200.0, 120.0, 300.0, 160.0])
POINT, COVERAGE = GaussianPointReward(round_digits=None), GaussianCoverageReward(round_digits=None)
NAN, INF = float("nan"), float("inf")

positions, sizes = st.floats(-500, 500), st.floats(1, 300)
boxes = st.tuples(positions, positions, sizes, sizes).map(lambda b: np.array([b[0], b[1], b[0] + b[2], b[1] + b[3]]))


def plain(pred, target, alpha=0.5):
    """Both rewards of one pair, by the formulas of the paper with matrices and logarithms."""
    middle = [np.array([(b[0] + b[2]) / 2, (b[1] + b[3]) / 2]) for b in (pred, target)]
    spread = [np.diag([(alpha * (b[2] - b[0])) ** 2, (alpha * (b[3] - b[1])) ** 2]) for b in (pred, target)]
    apart, mean = middle[0] - middle[1], (spread[0] + spread[1]) / 2
    point = math.exp(-0.5 * apart @ np.linalg.inv(spread[1]) @ apart)
    determinants = [np.linalg.det(matrix) for matrix in (mean, *spread)]
    second = 0.5 * math.log(determinants[0] / math.sqrt(determinants[1] * determinants[2]))
    return point, math.exp(-apart @ np.linalg.inv(mean) @ apart / 8 - second)


@pytest.mark.parametrize(
    ("pred", "point", "coverage", "total"),
    [(CLOSE, 0.980199, 0.982803, 1.963), (FAR, 0.082085, 0.535261, 0.617), (TARGET, 1.0, 1.0, 2.0)],
)
def test_worked_examples(pred, point, coverage, total):
    assert float(POINT(pred, TARGET)) == pytest.approx(point, abs=5e-7)
    assert float(COVERAGE(pred, TARGET)) == pytest.approx(coverage, abs=5e-7)
    assert float(GaussianPointReward()(pred, TARGET)) == pytest.approx(round(point, 3), abs=1e-7)
    assert float(GaussianCoverageReward()(pred, TARGET)) == pytest.approx(round(coverage, 3), abs=1e-7)
    assert float(BoxReward()(pred, TARGET)) == pytest.approx(total, abs=1e-6)
    exact = float(BoxReward(round_digits=None, point_weight=0.8, coverage_weight=0.2)(pred, TARGET))
    assert exact == pytest.approx(0.8 * point + 0.2 * coverage, abs=1e-6)


def test_numbers_in_between_of_the_worked_example():
    p, g = SpatialGaussian.from_boxes(CLOSE), SpatialGaussian.from_boxes(TARGET)
    assert p.std.tolist() == [40, 20]
    assert g.std.tolist() == [50, 20]
    assert (p.center - g.center).tolist() == [0, 4]
    assert p.bhattacharyya(g) == pytest.approx(math.exp(-16 / 3200) / math.sqrt(1.025), abs=1e-12)


def test_center_on_side_and_corner():
    side, corner = np.array([150.0, 100, 250, 140]), np.array([150.0, 120, 250, 160])
    assert float(POINT(side, TARGET)) == pytest.approx(0.6065, abs=5e-5)
    assert float(POINT(corner, TARGET)) == pytest.approx(0.3679, abs=5e-5)


@given(boxes, st.floats(0, 1), st.floats(0, 1))
def test_inside_the_target_the_point_reward_is_at_least_exp_minus_1(target, x, y):
    center = target[:2] + np.array([x, y]) * (target[2:] - target[:2])
    assert POINT(np.concatenate([center - 1, center + 1]), target) >= 0.36787


@given(boxes, st.floats(0.05, 20))
def test_coverage_of_a_scaled_box(target, scale):
    center, half = (target[:2] + target[2:]) / 2, (target[2:] - target[:2]) / 2
    pred = np.concatenate([center - scale * half, center + scale * half])
    assert float(COVERAGE(pred, target)) == pytest.approx(2 * scale / (1 + scale**2), abs=1e-6)
    assert float(COVERAGE(target, pred)) == pytest.approx(2 * scale / (1 + scale**2), abs=1e-6)
    assert float(POINT(pred, target)) == pytest.approx(1, abs=1e-6)


def test_coverage_of_twice_the_size_is_four_fifths():
    assert float(COVERAGE([50, 80, 250, 160], TARGET)) == pytest.approx(0.8, abs=1e-7)


@given(boxes, positions, positions)
def test_same_size_coverage_is_the_fourth_root_of_the_point_reward(target, x, y):
    pred = target + np.array([x, y, x, y]) / 4
    assert float(COVERAGE(pred, target)) == pytest.approx(float(POINT(pred, target)) ** 0.25, abs=1e-5)


@settings(max_examples=200)
@given(boxes, boxes)
def test_equal_to_matrices_and_logarithms(pred, target):
    point, coverage = plain(pred, target)
    assert float(POINT(pred, target)) == pytest.approx(point, abs=1e-6)
    assert float(COVERAGE(pred, target)) == pytest.approx(coverage, abs=1e-6)


@given(boxes, boxes, positions, positions, st.floats(0.01, 100), st.floats(0.01, 100))
def test_translation_scale_and_symmetry(pred, target, x, y, across, down):
    shift, scale = np.array([x, y, x, y]), np.array([across, down, across, down])
    for reward in (POINT, COVERAGE):
        value = float(reward(pred, target))
        assert float(reward(pred + shift, target + shift)) == pytest.approx(value, abs=1e-5)
        assert float(reward(pred * scale, target * scale)) == pytest.approx(value, abs=1e-5)
    assert float(COVERAGE(target, pred)) == pytest.approx(float(COVERAGE(pred, target)), abs=1e-6)


def test_the_point_reward_is_not_symmetric():
    assert abs(float(POINT([90, 100, 130, 140], TARGET)) - float(POINT(TARGET, [90, 100, 130, 140]))) > 0.1


@pytest.mark.parametrize("pred", [CLOSE, FAR, np.array([80.0, 60.0, 130.0, 200.0])])
def test_coverage_is_the_integral_of_the_root_of_the_product(pred):
    x, y = (np.linspace(-400, 700, 1101), np.linspace(-400, 700, 1101))
    grid = np.stack(np.meshgrid(x, y, indexing="ij"), -1)
    total = np.ones(grid.shape[:-1])
    for box in (pred, TARGET):
        gaussian = SpatialGaussian.from_boxes(box)
        total *= np.sqrt(gaussian.density(grid) / (2 * math.pi * gaussian.std.prod()))
    assert float(COVERAGE(pred, TARGET)) == pytest.approx(total.sum(), abs=1e-3)


def test_advantages_of_the_worked_group():
    def advantages(values):
        return compute_advantages(grpo_trl(), RewardBatch(torch.tensor(values))).tolist()

    assert advantages([1.963, 0.617, 0.0, 0.0]) == pytest.approx([1.4239, -0.0302, -0.6968, -0.6968], abs=5e-5)
    assert advantages([0.0] * 4) == [0.0] * 4


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_tensors_in_tensors_out_and_shapes(kind, dtype):
    options = {"fixed": {"std": (20, 20)}, "distance": {"diagonal": 500.0}}.get(kind, {})
    reward = BoxReward(kind, **options)
    pred = np.stack([np.stack([TARGET, CLOSE, FAR]), np.stack([FAR, FAR, CLOSE])])  # (2, 3, 4)
    target = np.stack([TARGET, CLOSE])
    values = reward(pred, target)
    assert values.shape == (2, 3)
    assert values.dtype == np.float32
    expected = [[float(reward(p, t)) for p in row] for row, t in zip(pred, target, strict=True)]
    np.testing.assert_array_equal(values, np.float32(expected))
    np.testing.assert_array_equal(values, reward(pred, target[:, None]))
    np.testing.assert_array_equal(reward(pred[0], target[0]), values[0])
    tensors = reward(torch.tensor(pred, dtype=dtype), torch.tensor(target, dtype=dtype))
    assert tensors.dtype == torch.float32
    np.testing.assert_allclose(tensors.numpy(), values, atol=1e-6)
    assert reward(np.zeros((0, 4)), np.zeros((0, 4))).shape == (0,)
    assert reward(np.zeros((0, 8, 4)), np.zeros((0, 4))).shape == (0, 8)
    assert reward(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


def test_values_of_the_baselines():
    preds = np.stack([TARGET, CLOSE, FAR, [0, 0, 10, 10]])
    assert BoxReward("point")(preds, TARGET).tolist() == [1, 1, 0, 0]
    assert BoxReward("iou")(preds, TARGET).tolist() == [1, 1, 0, 0]
    assert BoxReward("iou", threshold=0.8)(preds, TARGET).tolist() == [1, 0, 0, 0]
    assert BoxReward("point+iou")(preds, TARGET).tolist() == [2, 2, 0, 0]
    assert BoxReward("inside")(preds, TARGET) == pytest.approx([2, 1.963, 0, 0])
    assert BoxReward("distance", diagonal=200.0)(preds, TARGET) == pytest.approx(
        [1, 1 - 4 / 200, 1 - math.hypot(100, 20) / 200, 1 - math.hypot(145, 115) / 200], abs=1e-6
    )
    assert float(BoxReward("distance", diagonal=10.0)(FAR, TARGET)) == 0
    fixed = BoxReward("fixed", std=(50.0, 20.0), round_digits=None)(CLOSE, TARGET)
    assert float(fixed) == pytest.approx(math.exp(-16 / 800) + math.exp(-16 / 3200), abs=1e-6)
    assert float(BoxReward("point")([200, 140, 200, 140], TARGET)) == 1  # the border belongs to the target
    assert float(BoxReward("point")([190, 130, 212, 150], TARGET)) == 0


def test_iou_of_exactly_one_half_does_not_count():
    assert float(BoxReward("iou")([0, 0, 1, 1], [0, 0, 2, 1])) == 0
    assert float(BoxReward("iou")([0, 0, 1.01, 1], [0, 0, 2, 1])) == 1


def test_fixed_std_is_the_median_of_the_sizes():
    targets = np.array([[0, 0, 10, 20], [5, 5, 45, 6], [0, 0, 2, 2.0]])
    assert fixed_std(targets) == (5.0, 1.0)
    assert fixed_std(torch.tensor(targets), alpha=1.0) == (10.0, 2.0)


def test_small_units_do_not_exceed_1_and_the_released_arithmetic_does():
    box = np.array([0.1, 0.1, 0.2, 0.2])
    assert float(COVERAGE(box, box)) == 1.0
    released = GaussianCoverageReward(round_digits=None, absolute_eps=True)
    assert float(released(box, box)) == pytest.approx(4.0039, abs=5e-5)
    assert float(released(CLOSE, TARGET)) == pytest.approx(0.982803, abs=5e-7)
    assert released(torch.from_numpy(box), torch.from_numpy(box)).item() == pytest.approx(4.0039, abs=5e-5)
    assert float(BoxReward("gaussian_coverage", absolute_eps=True)(box, box)) == pytest.approx(4.004)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=4, max_size=4), boxes)
def test_any_prediction_earns_a_value_in_range(pred, target):
    for reward in (POINT, COVERAGE, GaussianCoverageReward(allow_inverted=True)):
        for made in (np.array, torch.tensor):
            value = float(reward(made(pred), made(target)))
            assert 0 <= value <= 1


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_invalid_predictions_earn_0_and_are_counted(make):
    preds = make([[NAN, 0, 1, 1], [0.0, 0, INF, 1], [200, 100, 100, 140], [100, 140, 200, 100], [100, 100, 200, 140.0]])
    for reward in (GaussianPointReward(), GaussianCoverageReward(), BoxReward(), BoxReward("point"), BoxReward("iou")):
        assert reward(preds, make(TARGET)).tolist() == [0, 0, 0, 0, 2 if reward == BoxReward() else 1]
        assert reward.invalid == {"non-finite": 2, "inverted": 2}
        reward(preds, make(TARGET))
        assert reward.invalid == {"non-finite": 4, "inverted": 4}
        reward.invalid.clear()
    for reward in (GaussianPointReward(allow_inverted=True), GaussianCoverageReward(allow_inverted=True)):
        assert reward(preds, make(TARGET)).tolist() == [0, 0, 1, 1, 1]
        assert reward.invalid == {"non-finite": 2}


def test_equality_and_pickling_do_not_depend_on_the_counter():
    reward = GaussianPointReward()
    reward([NAN] * 4, TARGET)
    assert reward == GaussianPointReward()
    assert hash(reward) == hash(GaussianPointReward())
    assert pickle.loads(pickle.dumps(reward)) == reward


def test_predictions_without_area():
    flat = np.array([[150, 120, 150, 120], [100, 120, 200, 120], [150, 100, 150, 140.0]])
    assert COVERAGE(flat, TARGET).tolist() == [0, 0, 0]
    assert POINT(flat, TARGET).tolist() == [1, 1, 1]
    assert COVERAGE(torch.from_numpy(flat), torch.from_numpy(TARGET)).tolist() == [0, 0, 0]
    point = SpatialGaussian([0, 0], [0, 0])
    assert float(point.bhattacharyya(point)) == 0


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_a_target_without_area_is_an_error_with_the_box(make):
    for bad in ([1, 2, 1, 5], [1, 2, 5, 2], [5, 2, 1, 5], [1, 2, INF, 5], [NAN, 0, 1, 1]):
        target = make([TARGET.tolist(), [float(number) for number in bad]])
        shown = str([float(number) for number in bad]).replace("[", r"\[").replace("]", r"\]")
        for reward in (POINT, COVERAGE, BoxReward("point")):
            with pytest.raises(InvalidInputError, match=f"target box {shown} at index 1 has no area"):
                reward(make([TARGET.tolist()] * 2), target)
    with pytest.raises(ValueError, match=r"\[1.0, 2.0, 1.0, 5.0\] has no area"):
        POINT(make([0.0, 0, 1, 1]), make([1.0, 2, 1, 5]))


@pytest.mark.parametrize(
    ("pred", "target", "message"),
    [
        (np.zeros((2, 3)), TARGET, r"4 numbers in the last axis, got pred \(2, 3\)"),
        (np.zeros(4), np.array(3.0), r"target \(\)"),
        (np.zeros((2, 3, 4)), np.tile(TARGET, (3, 1)), r"pred \(2, 3, 4\) and target \(3, 4\) do not fit"),
        (np.zeros((2, 4)), np.tile(TARGET, (3, 1)), r"pred \(2, 4\) and target \(3, 4\) do not fit"),
        ("box", TARGET, "must be arrays of numbers"),
        ([[1, 2], [3]], TARGET, "must be arrays of numbers"),
    ],
)
def test_shapes_that_do_not_fit_are_named(pred, target, message):
    with pytest.raises(InvalidInputError, match=message):
        POINT(pred, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha must be a finite number > 0"),
        ({"alpha": NAN}, "alpha"),
        ({"round_digits": -1}, "round_digits must be None or"),
        ({"round_digits": 1.5}, "round_digits"),
        ({"eps": -1}, "eps"),
        ({"point_weight": INF}, "point_weight must be a finite number"),
        ({"kind": "fixed"}, "std belongs to kind 'fixed'"),
        ({"std": (1, 2)}, "std belongs to kind 'fixed'"),
        ({"kind": "fixed", "std": (1, 0)}, "std must be two positive numbers"),
        ({"kind": "distance"}, "needs diagonal > 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    for make in (BoxReward, GuiGroundingReward):
        with pytest.raises(InvalidInputError, match=message):
            make(**options)


def test_unknown_kinds_are_named():
    with pytest.raises(UnknownNameError, match="did you mean 'gaussian'"):
        BoxReward("gausian")
    with pytest.raises(InvalidInputError):
        SpatialGaussian([1.0], [1.0])
    with pytest.raises(InvalidInputError, match="extract"):
        BoxParser(extract="somewhere")


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[1, 2, 3, 4]", [1, 2, 3, 4]),
        ("at [ -1.5 ,.5, +3,4.25 ] and [5,6,7,8]", [-1.5, 0.5, 3, 4.25]),
        ("[1,2,3] [1,2,3,4,5] [9,8,7,6]", [9, 8, 7, 6]),
        ("user [1,2,3,4]\nassistant\n[5,6,7,8]", [5, 6, 7, 8]),
        ("user [1,2,3,4]\nassistant\nnone", None),
        ("[1,2,3", None),
        ("[1 2 3 4]", None),
        ("(1,2,3,4)", None),
        ("[a,b,c,d]", None),
        ("", None),
    ],
)
def test_parser(text, box):
    found = BoxParser()(text)
    assert (None if found is None else found.tolist()) == box
    assert (found is None) == (BoxParser().from_text(text) is None)


def test_parser_options_and_messages():
    assert BoxParser(marker=None)("user [1,2,3,4]\nassistant\n[5,6,7,8]").tolist() == [1, 2, 3, 4]
    assert BoxParser(extract="<answer>")("[1,2,3,4] <answer>[5,6,7,8]</answer>").tolist() == [5, 6, 7, 8]
    assert BoxParser()([{"role": "assistant", "content": "[1,2,3,4]"}]).tolist() == [1, 2, 3, 4]
    assert BoxParser()(None) is None
    assert [BoxParser().is_whole(text) for text in ("[1,2,3,4]", "[ 1, 2,3 ,4 ]", "[1,2,3,4.0]", "x [1,2,3,4]")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_long_digit_runs_are_read_in_linear_time():
    assert BoxParser()("[" + "9" * 200_000) is None
    assert BoxParser()("[" * 100_000 + "9" * 100_000) is None


def test_reward_of_text():
    reward = GuiGroundingReward(format_weight=1.0)
    texts = [
        "[110,104,190,144]",
        "it is [200, 120, 300, 160]",
        "nothing",
        "[190,144,110,104]",
        "[1,2,3," + "9" * 400 + "]",
    ]
    assert reward(None, texts, box=[TARGET.tolist()] * 5) == [2.963, 0.617, 0.0, 1.0, 1.0]
    assert reward.invalid == {"unreadable": 1, "inverted": 1, "non-finite": 1}
    assert GuiGroundingReward()(None, texts[:2], box=[TARGET] * 2) == [1.963, 0.617]
    assert GuiGroundingReward("target")(None, [texts[0], texts[0]], target=[None, TARGET]) == [None, 1.963]
    assert GuiGroundingReward(kind="point")(None, texts, box=[TARGET] * 5) == [1, 0, 0, 0, 0]
    assert GuiGroundingReward()(None, texts, box=[None] * 5) == [None] * 5


def test_the_best_of_several_targets_counts():
    targets = [[TARGET.tolist(), FAR.tolist()], [FAR.tolist()], TARGET.tolist()]
    values = GuiGroundingReward()(None, ["[200, 120, 300, 160]"] * 3, box=targets)
    assert values == [2.0, 2.0, 0.617]


def test_it_logs_the_share_of_invalid_predictions():
    heard = {}
    GuiGroundingReward()(None, ["[0,0,1,1]", "", "", "[0,0,1,1]"], box=[TARGET] * 4, log_metric=heard.__setitem__)
    assert heard == {"gui_grounding_reward/invalid": 0.5}


@pytest.mark.parametrize("bad", [[5, 2, 1, 5], [1, 2, 1, 5], [1, 2, 3], "box", [NAN, 0, 1, 1], []])
def test_bad_targets_name_reward_column_and_row(bad):
    with pytest.raises(InvalidInputError, match="reward 'gui_grounding_reward': column 'box', row 1"):
        GuiGroundingReward()(None, ["[0,0,1,1]"] * 2, box=[TARGET, bad])


def test_terms_combine_through_the_weighted_sum():
    point, cover = GuiGroundingReward(kind="gaussian_point"), GuiGroundingReward(kind="gaussian_coverage")
    texts = ["[110,104,190,144]", "[200,120,300,160]"]
    total = weighted_sum(point, cover, weights=(0.8, 0.2))(None, texts, box=[TARGET] * 2)
    assert total == pytest.approx(
        GuiGroundingReward(point_weight=0.8, coverage_weight=0.2)(None, texts, box=[TARGET] * 2)
    )


def test_exact_point_reward_has_a_gradient_and_the_rounded_one_has_none():
    pred = torch.tensor(CLOSE, requires_grad=True)
    (POINT(pred, torch.tensor(TARGET)) + COVERAGE(pred, torch.tensor(TARGET))).backward()
    step = 1e-5
    for axis in range(4):
        moved = [CLOSE + sign * step * np.eye(4)[axis] for sign in (1, -1)]
        up, down = (sum(plain(box, TARGET)) for box in moved)
        assert float(pred.grad[axis]) == pytest.approx((up - down) / (2 * step), abs=1e-6)
