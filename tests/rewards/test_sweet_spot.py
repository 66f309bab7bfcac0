import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.advantages.parts import Center, Scale, WeightedSum
from polyreward.advantages.transform import chain, compute_advantages
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError
from polyreward.rewards.overlap import OverlapReward
from polyreward.rewards.proximity import (
    BlockMatch,
    BoxProximity,
    GaussianBoxField,
    GridProximity,
    SequencePrefix,
    SequenceProximity,
    over_target,
)
from polyreward.rewards.sweet_spot import SweetSpotReward, ZoneQuantizer, assert_order_preserving, sweet_spot
from polyreward.rewards.verifiers import ExactMatch, LinesCorrect

OFFSETS = np.array([(0, 0), (1, 0), (1, 1), (2, 0), (3, 1)], dtype=np.float64)


def test_proximity_and_zones_of_the_card():
    boxes = np.tile([-2.0, -4.0, 2.0, 4.0], (5, 1))  # half-widths 2 and 4
    values = GaussianBoxField()(OFFSETS * [2, 4], boxes)
    assert values == pytest.approx([1, 0.6065, 0.3679, 0.1353, 0.0067], abs=1e-4)
    assert ZoneQuantizer().zone(values).tolist() == [3, 2, 1, 0, 0]
    wide = GaussianBoxField(2.0)(OFFSETS * [4, 8], boxes)
    assert wide == pytest.approx(values)


@pytest.mark.parametrize(("hit", "zone", "value"), [(1, 3, 1.5), (1, 1, 1.1667), (0, 2, 0.3333), (0, 0, 0.0)])
def test_rewards_of_the_card(hit, zone, value):
    parts = sweet_spot(np.array([hit]), np.array([zone / 4 + 0.01]), ZoneQuantizer())
    assert parts.total == pytest.approx([value], abs=1e-4)
    assert (parts.outcome[0], parts.zone[0], parts.level[0]) == (hit, zone, pytest.approx(zone / 3))


def test_amplified_levels():
    assert ZoneQuantizer(levels="amplified").levels == pytest.approx((0, 1 / 7, 3 / 7, 1))
    assert ZoneQuantizer(2, levels="amplified").levels == (0, 1)


def test_thresholds_belong_to_the_upper_zone_in_every_dtype():
    for k in (2, 3, 4, 5, 8, 10, 16):
        quantizer = ZoneQuantizer(k)
        for dtype in (np.float32, np.float64):
            edges = np.array(quantizer.thresholds, dtype=dtype)
            assert quantizer.zone(edges).tolist() == list(range(1, k))
            assert quantizer.zone(torch.from_numpy(edges)).tolist() == list(range(1, k))
            assert quantizer.zone(np.nextafter(edges, dtype(0))).tolist() == list(range(k - 1))


def test_custom_thresholds_and_levels():
    quantizer = ZoneQuantizer(3, thresholds=(0.1, 0.9), levels=(0.0, 0.2, 1.0))
    assert quantizer(np.array([0, 0.1, 0.9, 1.0])).tolist() == [0, 0.2, 1, 1]
    assert ZoneQuantizer(3, thresholds=(0.5, 1.0)).zone(np.array([0.49, 0.5, 0.99, 1.0])).tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"zones": 1},
        {"zones": 2.5},
        {"zones": 3, "thresholds": (0.5,)},
        {"zones": 3, "thresholds": (0.5, 0.4)},
        {"zones": 2, "thresholds": (1.1,)},
        {"zones": 2, "thresholds": (0.0,)},
        {"zones": 2, "levels": (0.0, 0.5, 1.0)},
        {"zones": 2, "levels": (0.5, 0.5)},
        {"zones": 2, "levels": (0.0, 1.1)},
        {"zones": 2, "levels": "steep"},
        {"zones": 2, "thresholds": 5},
        {"zones": 2, "thresholds": "5"},
        {"zones": 2, "levels": 5},
        {"zones": 2, "levels": (0.0, float("nan"))},
    ],
)
def test_bad_quantizers(options):
    with pytest.raises(InvalidInputError, match=r"zones|levels"):
        ZoneQuantizer(**options)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.integers(2, 64))
def test_levels_are_monotone_and_close_to_the_proximity(values, k):
    s = np.sort(np.array(values))
    levels = ZoneQuantizer(k)(s)
    assert (np.diff(levels) >= 0).all()
    assert (np.abs(levels - s) <= 1 / (k - 1) + 1e-12).all()


@given(
    st.floats(0, 0.999),
    st.integers(2, 6),
    st.sampled_from(["linear", "amplified"]),
    st.sampled_from(["none", "only_success"]),
)
def test_order_by_brute_force_over_outcome_and_zone(weight, k, levels, gate):
    quantizer = ZoneQuantizer(k, levels=levels)
    pairs = list(itertools.product((0.0, 1.0), range(k)))
    parts = sweet_spot(
        np.array([c for c, _ in pairs]), np.array([(z + 0.5) / k for _, z in pairs]), quantizer, weight, gate
    )
    success, failure = parts.total[k:], parts.total[:k]
    gap = 1 - weight if gate == "none" else 1
    assert success.min() - failure.max() == pytest.approx(gap)
    assert (np.diff(success) >= 0).all()
    assert (np.diff(failure) >= 0).all()


@pytest.mark.parametrize("weight", [1.0, 2.0, -0.1, float("nan")])
def test_a_weight_that_breaks_the_order_is_refused_at_construction(weight):
    with pytest.raises(InvalidInputError, match="does not preserve the order"):
        SweetSpotReward(ExactMatch(), LinesCorrect(), weight=weight)


def test_narrow_levels_allow_a_larger_weight():
    assert_order_preserving(1.5, (0.2, 0.8))
    assert SweetSpotReward(ExactMatch(), LinesCorrect(), ZoneQuantizer(2, levels=(0.2, 0.8)), 1.5).weight == 1.5


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.floats(0, 1)), max_size=9), st.sampled_from([None, 2, 4]))
def test_arrays_equal_a_plain_loop(rows, zones):
    quantizer = None if zones is None else ZoneQuantizer(zones)
    c, s = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    got = sweet_spot(c, s, quantizer, 0.4).total
    for (outcome, proximity), value in zip(rows, got, strict=True):
        level = proximity
        if zones is not None:
            level = sum(proximity >= k / zones for k in range(1, zones)) / (zones - 1)
        assert value == pytest.approx(outcome + 0.4 * level)


def test_tensors_keep_dtype_and_shape():
    s = torch.tensor([[0.1, 0.3], [0.6, 0.9]])
    parts = sweet_spot(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), s, ZoneQuantizer())
    assert parts.total.dtype == torch.float32
    torch.testing.assert_close(parts.total, torch.tensor([[0, 1 + 1 / 6], [1 / 3, 1.5]]))
    assert parts.zone.dtype == torch.int64
    assert ZoneQuantizer()(s.double()).dtype == torch.float64
    assert ZoneQuantizer()(np.float32([0.3])).dtype == np.float32
    assert ZoneQuantizer()(0.3) == pytest.approx(1 / 3)


def test_proximity_is_clipped_and_nan_is_an_error():
    assert ZoneQuantizer().zone(np.array([-1.0, 2.0])).tolist() == [0, 3]
    for empty in (np.array([np.nan]), torch.tensor([float("nan")])):
        with pytest.raises(InvalidInputError, match="NaN"):
            ZoneQuantizer().zone(empty)


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_errors_of_arrays_say_which_element(make):
    nan = float("nan")
    field, prefix = GaussianBoxField(), SequencePrefix()
    steps = make([[0.0, 0.0], [0.0, nan]])
    for call, message in (
        (lambda: ZoneQuantizer().zone(make([0.0, nan])), "NaN in the proximity at index 1"),
        (lambda: ZoneQuantizer().zone(make([[0.0, 0.0], [nan, 0.0]])), r"NaN in the proximity at index \(1, 0\)"),
        (lambda: ZoneQuantizer().zone(make(nan)), "NaN in the proximity$"),
        (lambda: sweet_spot(make([1.0, 0.5]), make([1.0, 1.0]), None), "outcome at index 1 .* must be 0 or 1"),
        (lambda: field(make([0.0, 0.0]), make([[0.0, 0, 1, 1], [0, 0, 0, 1]])), "the box at index 1 has no area"),
        (lambda: field(make([0.0, 0.0]), make([0.0, 0, 0, 1])), "the box has no area"),
        (lambda: field(make([[0.0, nan], [0.0, 0.0]]), make([0.0, 0, 1, 1])), "NaN in the point at index 0"),
        (lambda: prefix(make([[1], [1]]), make([[1], [1]]), make([1, 0])), "an empty target at index 1"),
        (lambda: over_target(make([[1.0], [1.0]]), make([1, 0])), "an empty target at index 1"),
        (lambda: over_target(steps, 0), "an empty target$"),
        (lambda: over_target(steps, 2), r"NaN in the proximity of the step at index \(1, 1\)"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            call()


def test_completions_may_be_an_array():
    reward = SweetSpotReward(ExactMatch(), LinesCorrect())
    assert reward(None, np.array(["a", "b"], dtype=object), answer=["a", "a"]) == [1.5, 0]
    assert reward(None, np.array([], dtype=object)) == []


def test_outcomes_other_than_0_and_1_and_unknown_gates_are_refused():
    with pytest.raises(InvalidInputError, match="must be 0 or 1"):
        sweet_spot(np.array([0.5]), np.array([0.5]), ZoneQuantizer())
    with pytest.raises(InvalidInputError, match="gate must be"):
        sweet_spot(np.array([1.0]), np.array([0.5]), ZoneQuantizer(), gate="always")


def test_a_dead_group_under_binary_rewards_is_alive_under_tiers():
    recipe = chain(WeightedSum(), Center("group"), Scale("group", ddof=0))
    outcome, proximity = np.zeros(4), np.array([0.1, 0.3, 0.6, 0.9])
    binary = compute_advantages(recipe, RewardBatch(torch.from_numpy(outcome)))
    tiered = compute_advantages(
        recipe, RewardBatch(torch.from_numpy(sweet_spot(outcome, proximity, ZoneQuantizer()).total))
    )
    assert binary.tolist() == [0, 0, 0, 0]
    assert (np.diff(tiered.numpy()) > 0.5).all()


def test_weight_0_is_the_verifier():
    columns = {"answer": ["a\nb"] * 3}
    texts = ["a\nb", "a\nc", ""]
    reward = SweetSpotReward(ExactMatch(ignore_spaces=False), LinesCorrect(), weight=0)
    assert reward(None, texts, **columns) == ExactMatch(ignore_spaces=False)(None, texts, **columns)


def test_reward_of_text_with_its_parts():
    reward = SweetSpotReward(ExactMatch(ignore_spaces=False), LinesCorrect())
    columns = {"answer": ["a\nb\nc\nd"] * 3 + [None]}
    texts = ["a\nb\nc\nd", "a\nb\nc\nx", "a", "a"]
    assert reward(None, texts, **columns) == pytest.approx([1.5, 0.5, 1 / 6, None])
    parts = reward.explain(None, texts, **columns)
    np.testing.assert_array_equal(parts.zone, [3, 3, 1, np.nan])
    np.testing.assert_array_equal(parts.outcome, [1, 0, 0, np.nan])
    gated = SweetSpotReward(ExactMatch(ignore_spaces=False), LinesCorrect(), gate="only_success")
    assert gated(None, texts, **columns) == [1.5, 0, 0, None]
    smooth = SweetSpotReward(ExactMatch(ignore_spaces=False), LinesCorrect(), quantizer=None)
    assert smooth(None, texts, **columns) == pytest.approx([1.5, 0.375, 0.125, None])


def test_members_out_of_range_are_named():
    def far(prompts, completions, **columns):
        return [0.5, 2.0]

    with pytest.raises(InvalidInputError, match="'far' gave 2 for completion 1, expected a value in"):
        SweetSpotReward(ExactMatch(), far)(None, ["a", "b"], answer=["a", "b"])
    with pytest.raises(InvalidInputError, match=r"'far' gave 0\.5 for completion 0, expected 0 or 1"):
        SweetSpotReward(far, ExactMatch())(None, ["a", "b"], answer=["a", "b"])


def test_box_field_broadcasts_and_works_on_tensors():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    box = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    torch.testing.assert_close(GaussianBoxField()(points, box), torch.tensor([1.0, 0.60653]), atol=1e-5, rtol=0)
    assert float(GaussianBoxField()(points[1], [-1, -1, 1, 1])) == pytest.approx(np.exp(-0.5))
    assert GaussianBoxField()([0, 0], [[-1, -1, 1, 1], [0, 0, 2, 2]]).tolist() == pytest.approx([1, np.exp(-1)])


@pytest.mark.parametrize("box", [(0, 0, 0, 1), (0, 0, 1, 0), (1, 1, 0, 0), (0, 0, float("nan"), 1)])
def test_box_without_area(box):
    with pytest.raises(InvalidInputError, match="no area"):
        GaussianBoxField()((0, 0), box)
    with pytest.raises(InvalidInputError):
        GaussianBoxField(0)


def test_block_match_of_a_sudoku():
    solution = np.arange(81).reshape(9, 9) % 9
    assert BlockMatch()(solution, solution) == 1
    wrong = solution.copy()
    wrong[4, 7] += 1
    blocks = BlockMatch().blocks(wrong, solution)
    assert blocks[1, 2] == pytest.approx(8 / 9)
    assert (np.delete(blocks.ravel(), 5) == 1).all()
    assert BlockMatch()(wrong, solution) == pytest.approx(1 - 1 / 81)
    assert BlockMatch(quantizer=ZoneQuantizer(3))(wrong, solution) == 1  # 8/9 is in the top zone
    stack = np.stack([solution, wrong])
    assert BlockMatch()(stack, solution).shape == (2,)
    tensor = BlockMatch()(torch.from_numpy(stack), torch.from_numpy(solution))
    assert tensor.tolist() == pytest.approx([1, 80 / 81])


def test_block_match_refuses_what_does_not_fit():
    for prediction, target in ((np.zeros((4, 4)), np.zeros((9, 9))), (np.zeros((4, 4)), np.zeros((4, 4)))):
        with pytest.raises(InvalidInputError):
            BlockMatch((3, 3))(prediction, target)
    for block in ((0, 3), (3,), (1.5, 2), 5, "33"):
        with pytest.raises(InvalidInputError, match="block must be two positive whole numbers, got"):
            BlockMatch(block)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=8), st.integers(1, 8))
def test_prefix_equals_a_plain_loop(pairs, length):
    prediction, target = np.array([p for p, _ in pairs]), np.array([t for _, t in pairs])
    length = min(length, len(pairs))
    right = 0
    while right < length and prediction[right] == target[right]:
        right += 1
    assert SequencePrefix()(prediction[None], target[None], np.array([length])) == pytest.approx([right / length])
    tensors = torch.from_numpy(prediction)[None], torch.from_numpy(target)[None], torch.tensor([length])
    assert SequencePrefix()(*tensors).tolist() == pytest.approx([right / length])
    if length == len(pairs):
        assert SequencePrefix()(prediction, target) == pytest.approx(right / length)


def test_prefix_refuses_what_does_not_fit():
    with pytest.raises(InvalidInputError, match="sequences of 3 and 2 steps"):
        SequencePrefix()(np.zeros(3), np.zeros(2))
    with pytest.raises(InvalidInputError, match="empty target"):
        SequencePrefix()(np.zeros(0), np.zeros(0))
    with pytest.raises(InvalidInputError, match="empty target"):
        SequencePrefix()(np.zeros((1, 3)), np.zeros((1, 3)), np.array([0]))


def test_box_reward_reads_the_last_point_and_the_closest_box():
    texts = ["click(3, 3) no, click(1, 1)", "(2, 1)", "1", ""]
    assert BoxProximity()(None, texts, box=[(0, 0, 2, 2)] * 4) == pytest.approx([1, np.exp(-0.5), 0, 0])
    assert BoxProximity()(None, ["(9, 9)"], box=[[(0, 0, 2, 2), (8, 8, 10, 10)]]) == [1]


def test_grid_reward_counts_missing_cells_as_wrong():
    solution = "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1"
    reward = GridProximity(block=(2, 2))
    texts = [solution, solution.replace("2 1 4 3", "2 1 4 4"), "1 2 3 4\n3 4 1 2", "1 2\n3 4\n", "", solution + "\n5 6"]
    assert reward(None, texts, answer=[solution] * 6) == pytest.approx([1, 15 / 16, 0.5, 0.25, 0, 1])
    assert reward(None, [solution], answer=[["1 1\n1 1", solution]]) == [1]
    rows = [[int(cell) for cell in line.split()] for line in solution.split("\n")]
    assert reward(None, texts[:2], answer=[rows, [rows, [[0, 0], [0, 0]]]]) == pytest.approx([1, 15 / 16])
    with pytest.raises(InvalidInputError, match="no rectangular grid"):
        reward(None, [solution], answer=[[]])
    with pytest.raises(InvalidInputError, match="row 0: blocks of 2 x 2 do not tile a grid of 1 x 4"):
        reward(None, [solution], answer=[solution.split("\n")])  # a text in a list is a whole solution
    assert GridProximity(block=(1, 2))(None, ["3 4"], answer=[["1 2", "3 4"]]) == [1]
    zoned = GridProximity(block=(2, 2), zones=3)
    assert zoned(None, texts[:2], answer=[solution] * 2) == [1, 1]


def test_sequence_reward_is_a_prefix_over_the_target_length():
    texts = ["up left up", "up left down", "up, left", "down up left up", "up left up up"]
    assert SequenceProximity()(None, texts, answer=["up left up"] * 5) == pytest.approx([1, 2 / 3, 2 / 3, 0, 1])
    assert SequenceProximity()(None, ["b c"], answer=[["a b", "b c"]]) == [1]
    assert SequenceProximity()(None, ["b c", "b"], answer=[[["a", "b"], ["b", "c"]]] * 2) == [1, 0.5]


def test_a_trajectory_is_averaged_over_the_length_of_its_target():
    steps = np.array([[1.0, 0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 0.8]])
    assert over_target(steps, np.array([4, 2])).tolist() == [0.375, 1.0]
    assert over_target(steps, 8).tolist() == pytest.approx([1.5 / 8, 3.8 / 8])
    tensors = over_target(torch.from_numpy(steps), torch.tensor([4, 2]))
    assert tensors.tolist() == [0.375, 1.0]
    for wrong in ((steps, 0), (steps, np.array([1, 0])), (steps * np.nan, 4)):
        with pytest.raises(InvalidInputError):
            over_target(*wrong)


def test_any_graded_reward_serves_as_proximity():
    def inside(prompts, completions, **columns):
        return [float(v >= 0.5) for v in OverlapReward()(prompts, completions, **columns)]

    reward = SweetSpotReward(inside, OverlapReward())
    assert reward(None, ["0 0 2 2", "0 0 2 1", "1 1 3 3"], box=[(0, 0, 2, 2)] * 3) == pytest.approx([1.5, 4 / 3, 0])
