import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.rewards.composition import Composed, affine, clip, gate, named, penalise, tier, weighted_sum
from polyreward.rewards.contract import Reward, name_of
from polyreward.rewards.verifiers import ExactMatch


class Given(Reward):
    """Gives the values of a column."""

    def __init__(self, column):
        self.column = column

    @property
    def __name__(self):
        return self.column

    def __call__(self, prompts, completions, **columns):
        return columns[self.column]


A, B = Given("a"), Given("b")


def run(reward, **columns):
    rows = len(next(iter(columns.values())))
    return reward([""] * rows, [""] * rows, **columns)


def test_weighted_sum_leaves_out_what_does_not_apply():
    reward = weighted_sum(A, B, weights=(2, -1))
    assert run(reward, a=[1, None, 3, None], b=[10, 10, math.nan, None]) == [-8, -10, 6, None]
    assert reward.__name__ == "2*a + -1*b"


@pytest.mark.parametrize("members", [2, 4, 7, 16])
def test_rows_of_equal_values_have_equal_sums_to_the_bit_in_every_batch(members):
    rng = np.random.default_rng(0)
    row, weights = rng.normal(size=members), rng.normal(size=members)
    reward = weighted_sum(*(Given(f"m{k}") for k in range(members)), weights=weights.tolist())
    expected = 0.0
    for weight, value in zip(weights, row, strict=True):
        expected += weight * value
    for size in (1, 2, 3, 5, 8, 17):
        assert set(run(reward, **{f"m{k}": [row[k]] * size for k in range(members)})) == {expected}


@pytest.mark.parametrize(
    "reward",
    [
        weighted_sum(A, B, weights=(10, -10), name="r"),  # inf - inf
        weighted_sum(A, B, weights=(10, 0), name="r"),
        affine(A, 10, name="r"),
        affine(A, 1, 1e308, name="r"),
        named(A * 10, "r"),
        penalise(A, B, weight=-10, name="r"),
    ],
)
def test_an_overflow_is_an_error_of_its_row(reward):
    with pytest.raises(InvalidInputError, match="reward 'r' returned inf for completion 1; rewards must be finite"):
        run(reward, a=[1.0, 1e308], b=[1.0, 1e308])


@pytest.mark.parametrize("divisor", [0, 0.0, math.nan, math.inf, np.int64(0)])
def test_a_divisor_must_be_finite_and_not_0(divisor):
    with pytest.raises(InvalidInputError, match=f"reward 'a' / {divisor}: expected a finite divisor other than 0"):
        A / divisor


def test_gate_pays_the_floor_below_the_threshold_and_opens_where_the_condition_does_not_apply():
    reward = gate(A, B, threshold=0.5, floor=-1)
    assert run(reward, a=[2, 2, 2, None, None], b=[0.5, 0.49, None, 0.0, 1.0]) == [2, -1, 2, None, None]
    assert reward.__name__ == "a if b"


def test_tier_puts_a_threshold_into_the_upper_level():
    reward = tier(A, thresholds=(0.25, 0.5), levels=(0, 10, 30))
    assert run(reward, a=[0.0, 0.25, 0.4999, 0.5, 9, None]) == [0, 10, 10, 30, 30, None]
    assert run(tier(A, (1, 2)), a=[0, 1, 2]) == [0, 0.5, 1]


def test_penalise_subtracts_and_stops_at_the_floor():
    columns = {"a": [1, 1, None, 1], "b": [0.5, 4, 1, None]}
    assert run(penalise(A, B, weight=2), **columns) == [0, -7, None, 1]
    assert run(penalise(A, B, weight=2, floor=-1), **columns) == [0, -1, None, 1]


def test_clip_and_affine():
    assert run(clip(A, -1, 1), a=[-5, 0.5, 5, None]) == [-1, 0.5, 1, None]
    assert run(clip(A, high=1), a=[-5, 5]) == [-5, 1]
    assert run(clip(A, low=0), a=[-5, 5]) == [0, 5]
    assert run(affine(A, 2, -1), a=[3, None]) == [5, None]


def test_operators_are_sums_and_affine_maps():
    columns = {"a": [1.0, None], "b": [10.0, 20.0]}
    assert run(A + B, **columns) == [11, 20]
    assert run(0.5 * A + 2 * B, **columns) == [20.5, 40]
    assert run(A - B, **columns) == [-9, -20]
    assert run(-A, **columns) == [-1, None]
    assert run(A + 1, **columns) == [2, None]
    assert run(1 + A * 3 - 0.5, **columns) == [3.5, None]
    assert run(1 - A / 4, **columns) == [0.75, None]
    assert run(np.float32(0.5) * A + np.int64(2), **columns) == [2.5, None]
    assert (A + B).__name__ == "a + b"
    assert (0.5 * A + 1).__name__ == "0.5*(a) + 1"


def test_a_plain_function_can_be_added_from_either_side():
    def plain(prompts, completions, **columns):
        return [1.0 for _ in completions]

    assert run(A + plain, a=[1.0]) == run(plain + A, a=[1.0]) == [2.0]
    assert run(A - plain, a=[3.0]) == [2.0]
    assert run(plain - A, a=[3.0]) == [-2.0]
    with pytest.raises(TypeError):
        A * A


def test_names():
    assert named(A, "x").__name__ == "x"
    assert named(A + B, "x").members == (A, B)
    assert weighted_sum(A, B, name="both").__name__ == "both"
    assert name_of(clip(A, 0)) == "clip(a)"


def test_a_member_that_returns_too_few_values_is_named():
    def short(prompts, completions, **columns):
        return [1.0]

    for reward in (weighted_sum(A, short), gate(A, short), gate(short, A), penalise(A, short), tier(short, [1])):
        with pytest.raises(InvalidInputError, match="'short' returned 1 values for 2 completions"):
            run(reward, a=[1.0, 2.0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: weighted_sum(),
        lambda: weighted_sum(A, weights=(1, 2)),
        lambda: weighted_sum(A, weights=(math.nan,)),
        lambda: tier(A, []),
        lambda: tier(A, [2, 1]),
        lambda: tier(A, [1], [1]),
        lambda: clip(A),
        lambda: clip(A, 2, 1),
        lambda: affine(A, math.inf),
        lambda: tier(A, [math.nan]),
        lambda: tier(A, [1], [0, math.inf]),
        lambda: gate(A, B, threshold=math.nan),
        lambda: penalise(A, B, weight=math.nan),
        lambda: penalise(A, B, floor="low"),
        lambda: clip(A, math.nan),
        lambda: named("a", "x"),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(InvalidInputError):
        make()


number = st.one_of(st.none(), st.floats(-100, 100))


@given(st.lists(st.tuples(number, number), min_size=1, max_size=8), st.floats(-5, 5), st.floats(-5, 5))
def test_sum_equals_a_plain_loop(rows, first, second):
    got = run(weighted_sum(A, B, weights=(first, second)), a=[r[0] for r in rows], b=[r[1] for r in rows])
    for (a, b), value in zip(rows, got, strict=True):
        if a is None and b is None:
            assert value is None
        else:
            assert value == pytest.approx((a or 0.0) * first + (b or 0.0) * second)


@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=8),
    st.lists(st.floats(-2, 2), min_size=1, max_size=4, unique=True).map(sorted),
)
def test_tier_equals_counting(values, thresholds):
    levels = list(range(len(thresholds) + 1))
    got = run(tier(A, thresholds, levels), a=values)
    assert got == [sum(t <= v for t in thresholds) for v in values]


def test_composition_is_a_reward_again():
    reward = gate(ExactMatch() + 0.5 * ExactMatch(ignore_case=True), ExactMatch(ignore_case=True), floor=-1)
    assert isinstance(reward, Composed)
    assert reward(["q"] * 3, ["a", "A", "b"], answer=["a"] * 3) == [1.5, 0.5, -1]
    assert np.isfinite(reward(["q"], ["a"], answer=["a"])).all()
