"""Weighted sum, centring, leave-one-out, scaling, standardising and whitening against plain Python."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.advantages import Center, LeaveOneOut, Scale, Standardize, Transform, WeightedSum, Whiten, chain
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError

NAN = float("nan")
Rows = list[tuple[int, int, float, int]]  # group, task, reward (NaN: none), length


def rows(most: int = 14, numbers: Any = None) -> st.SearchStrategy[Rows]:
    numbers = st.one_of(st.sampled_from([0.0, 0.1, 1.0]), st.floats(-9, 9, width=32)) if numbers is None else numbers
    reward = st.one_of(st.just(NAN), numbers)
    return st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 1), reward, st.integers(0, 5)), min_size=1, max_size=most
    )


EIGHTHS = st.integers(-40, 40).map(lambda n: n / 8)  # a shift rounds nothing off


def batch_of(data: Rows) -> RewardBatch:
    groups, tasks, rewards, lengths = zip(*data, strict=True)
    columns = {"task": [f"t{t}" for t in tasks], "length": list(lengths)}
    return RewardBatch(torch.tensor(rewards, dtype=torch.float64), groups=list(groups), columns=columns)


def by_hand(
    data: Rows, key: Callable[[Any], Any], score: Callable[[float, list[Any]], float], also: Any = None
) -> list[float]:
    """``score(reward, rows that share the key and have a reward)`` for each row with a reward, 0 for the others."""
    shared = defaultdict(list)
    for row in data:
        if not math.isnan(row[2]) and (also is None or also(row)):
            shared[key(row)].append(row)
    return [
        0.0 if math.isnan(row[2]) or (also is not None and not also(row)) else score(row[2], shared[key(row)])
        for row in data
    ]


def mean(x: list[Any]) -> float:
    return math.fsum(r[2] for r in x) / len(x)


def deviation(x: list[Any], ddof: int) -> float:
    if len(x) <= ddof or len({r[2] for r in x}) == 1:
        return 0.0
    return math.sqrt(math.fsum((r[2] - mean(x)) ** 2 for r in x) / (len(x) - ddof))


def divisor(x: list[Any], ddof: int, epsilon: float) -> float:
    return deviation(x, ddof) + epsilon if deviation(x, ddof) > 0 else 1.0


def whitened(r: float, x: list[Any], epsilon: float) -> float:
    total = sum(row[3] for row in x)
    middle = math.fsum(row[2] * row[3] for row in x) / total
    if total <= 1 or len({row[2] for row in x}) == 1:
        return 0.0
    variance = math.fsum(row[3] * (row[2] - middle) ** 2 for row in x) / (total - 1)
    return (r - middle) / math.sqrt(variance + epsilon)


def group(row: Any) -> Any:
    return row[0]


def task(row: Any) -> Any:
    return row[1]


CASES: dict[str, tuple[Transform, Callable[[Rows], list[float]]]] = {
    "center": (Center(), lambda d: by_hand(d, group, lambda r, x: r - mean(x))),
    "center, raw": (
        Center(singleton="raw"),
        lambda d: by_hand(d, group, lambda r, x: r - mean(x) if len(x) > 1 else r),
    ),
    "center by batch": (Center("batch"), lambda d: by_hand(d, lambda row: 0, lambda r, x: r - mean(x))),
    "center by two keys": (
        Center(("group", "task")),
        lambda d: by_hand(d, lambda row: row[:2], lambda r, x: r - mean(x)),
    ),
    "leave one out": (
        LeaveOneOut(),
        lambda d: by_hand(d, group, lambda r, x: r - (mean(x) * len(x) - r) / (len(x) - 1) if len(x) > 1 else 0.0),
    ),
    "leave one out, raw": (
        LeaveOneOut(singleton="raw"),
        lambda d: by_hand(d, group, lambda r, x: r - (mean(x) * len(x) - r) / (len(x) - 1) if len(x) > 1 else r),
    ),
    "scale": (Scale(epsilon=0.5), lambda d: by_hand(d, group, lambda r, x: r / divisor(x, 1, 0.5))),
    "scale by task": (
        Scale("task", epsilon=0.25, ddof=0),
        lambda d: by_hand(d, task, lambda r, x: r / divisor(x, 0, 0.25)),
    ),
    "standardize": (
        Standardize(epsilon=0.1),
        lambda d: by_hand(d, group, lambda r, x: (r - mean(x)) / divisor(x, 1, 0.1)),
    ),
    "standardize, population": (
        Standardize(epsilon=0.1, ddof=0),
        lambda d: by_hand(d, group, lambda r, x: (r - mean(x)) / divisor(x, 0, 0.1)),
    ),
    "standardize, raw": (
        Standardize(epsilon=0.1, singleton="raw"),
        lambda d: by_hand(d, group, lambda r, x: (r - mean(x)) / divisor(x, 1, 0.1) if len(x) > 1 else r / 1.1),
    ),
    "standardize without singles": (
        Standardize("batch", epsilon=0.1, ignore_single="group"),
        lambda d: by_hand(
            d,
            lambda row: 0,
            lambda r, x: (r - mean(x)) / divisor(x, 1, 0.1),
            also=lambda row: sum(other[0] == row[0] and not math.isnan(other[2]) for other in d) > 1,
        ),
    ),
    "whiten by length": (
        Whiten("batch", "length", epsilon=0.1),
        lambda d: by_hand(d, lambda row: 0, lambda r, x: whitened(r, x, 0.1), also=lambda row: row[3] > 0),
    ),
    "whiten by length and task": (
        Whiten("task", "length", epsilon=0.1),
        lambda d: by_hand(d, task, lambda r, x: whitened(r, x, 0.1), also=lambda row: row[3] > 0),
    ),
    "whiten": (
        Whiten("group", epsilon=0.1),
        lambda d: by_hand(
            d, group, lambda r, x: (r - mean(x)) / math.sqrt(deviation(x, 1) ** 2 + 0.1) if deviation(x, 1) else 0.0
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=40, deadline=None)
@given(data=rows())
def test_parts_against_plain_python(name: str, data: Rows) -> None:
    part, reference = CASES[name]
    batch = batch_of(data)
    expected = torch.tensor(reference(data), dtype=torch.float64)
    torch.testing.assert_close(part(batch.rewards[:, 0], batch), expected, rtol=1e-7, atol=1e-7)
    # each column of (N, K) has its own statistics
    both = RewardBatch(torch.cat([batch.rewards, batch.rewards.flip(0)], 1), groups=batch.groups, columns=batch.columns)
    torch.testing.assert_close(part(both.rewards, both)[:, 0], expected, rtol=1e-7, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(data=rows())
def test_standardize_across_keys(data: Rows) -> None:
    batch = batch_of(data)
    got = Standardize("group", "batch", epsilon=0.1)(batch.rewards[:, 0], batch)
    centred = by_hand(data, group, lambda r, x: r - mean(x))
    scales = by_hand(data, lambda row: 0, lambda r, x: divisor(x, 1, 0.1))
    expected = [c / s if s else 0.0 for c, s in zip(centred, scales, strict=True)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(data=rows(numbers=EIGHTHS), factor=st.sampled_from([0.25, 2.0, 1024.0]), shift=st.sampled_from([-4.0, 0.0, 1.0]))
def test_invariances(data: Rows, factor: float, shift: float) -> None:
    batch = batch_of(data)
    signal = batch.rewards[:, 0]
    for part in (Standardize(epsilon=0.0), Standardize("batch", epsilon=0.0), Whiten("batch", "length", epsilon=0.0)):
        torch.testing.assert_close(part(factor * signal + shift, batch), part(signal, batch), rtol=1e-6, atol=1e-6)
    for part in (Center(), LeaveOneOut()):
        torch.testing.assert_close(
            part(factor * signal + shift, batch), factor * part(signal, batch), rtol=1e-6, atol=1e-6
        )
    torch.testing.assert_close(Scale(epsilon=0.0)(-signal, batch), -Scale(epsilon=0.0)(signal, batch))


def test_equal_values_give_exactly_zero_in_every_dtype() -> None:
    parts = (
        Center(), LeaveOneOut(), Standardize(epsilon=0.0), Standardize("batch", epsilon=0.0),
        Whiten("batch", epsilon=0.0), Whiten("batch", "weight", epsilon=0.0), Whiten("batch", "length", epsilon=0.0),
    )  # fmt: skip
    for value in (0.1, 1 / 3, 1e-30, 12345.678):
        for dtype in (torch.float32, torch.float64):
            for number in (3, 10, 1001):
                columns = {"weight": torch.rand(number).double(), "length": torch.arange(number) % 7}
                batch = RewardBatch(torch.full((number,), value, dtype=dtype), columns=columns)
                for part in parts:
                    assert not part(batch.rewards[:, 0], batch).any(), (part, value, dtype, number)
                assert Scale(epsilon=1e-6)(batch.rewards[:, 0], batch).equal(batch.rewards[:, 0])


def test_rows_of_length_zero_take_no_part() -> None:
    batch = RewardBatch([1.0, 3.0, 100.0], columns={"length": [1, 1, 0]})
    expected = torch.tensor([-(0.5**0.5), 0.5**0.5, 0.0])
    torch.testing.assert_close(Whiten("batch", "length", epsilon=0.0)(batch.rewards[:, 0], batch), expected)


# the weighted sum


def test_weighted_sum() -> None:
    batch = RewardBatch(torch.tensor([[1.0, 10.0], [NAN, 20.0], [NAN, NAN]]), ("a", "b"))
    assert WeightedSum()(batch.rewards, batch).tolist() == [11.0, 20.0, 0.0]
    assert WeightedSum({"b": 0.5, "a": 2})(batch.rewards, batch).tolist() == [7.0, 10.0, 0.0]
    assert WeightedSum([2.0, 0.0])(batch.rewards, batch).tolist() == [2.0, 0.0, 0.0]
    assert WeightedSum((-1, 1))(batch.rewards, batch).tolist() == [9.0, 20.0, 0.0]
    assert WeightedSum([3.0])(torch.tensor([1.0, NAN, 2.0]), RewardBatch([0.0, 0.0, 0.0])).tolist() == [3.0, 0.0, 6.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [None, (0.3, -1.7, 0.11, 1.0, 2.3, 0.7, 0.9)])
def test_equal_rewards_have_equal_sums_to_the_bit(dtype: torch.dtype, weights: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in (5, 17, 65, 129):
        row = torch.randn(1, 7, generator=generator, dtype=dtype)
        for rewards in (row.repeat(number, 1), row.t().repeat(1, number).t()):
            sums = WeightedSum(weights)(rewards, RewardBatch(rewards))
            assert len(sums.unique()) == 1


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"a": 1.0, "c": 1.0}, MissingColumnError, "a weight names reward 'c'"),
        ({"a": 1.0}, InvalidInputError, "no weight for reward 'b'; use 0 to leave it out"),
        ([1.0], InvalidInputError, r"1 weights for a signal of 2 columns; rewards: \('a', 'b'\)"),
    ],
)
def test_weights_that_do_not_fit(weights: Any, error: type[Exception], message: str) -> None:
    batch = RewardBatch(torch.zeros(2, 2), ("a", "b"))
    with pytest.raises(error, match=message):
        WeightedSum(weights)(batch.rewards, batch)


def test_named_weights_on_a_signal_that_is_summed_already() -> None:
    batch = RewardBatch(torch.zeros(2, 2), ("a", "b"))
    with pytest.raises(InvalidInputError, match="2 weights for a signal of 1 columns"):
        chain(WeightedSum(), WeightedSum({"a": 1.0, "b": 1.0}))(batch.rewards, batch)


@pytest.mark.parametrize("weight", [NAN, float("inf"), "heavy", None])
def test_weights_that_are_not_numbers(weight: Any) -> None:
    for weights in ({"a": weight}, [weight]):
        with pytest.raises(InvalidInputError, match="a weight must be a finite number"):
            WeightedSum(weights)


# arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scale(epsilon=-1.0), "epsilon must be a finite number >= 0, got -1.0"),
        (lambda: Standardize(epsilon=NAN), "epsilon must be a finite number >= 0, got nan"),
        (lambda: Whiten(epsilon="small"), "epsilon must be a finite number >= 0, got 'small'"),
        (lambda: Scale(ddof=2), "ddof must be 0"),
        (lambda: Center(singleton="keep"), "singleton must be 'zero' or 'raw', got 'keep'"),
        (lambda: Center(3), "by must be the name of a column or several names, got 3"),
        (lambda: Center(None), "by must be the name of a column or several names, got None"),
        (lambda: Center(()), "by must be the name of a column or several names"),
        (lambda: Standardize(scale_by=["a", 1]), "scale_by must be the name of a column or several names"),
        (lambda: Standardize(ignore_single=1), "ignore_single must be the name of a column or several names"),
    ],
)
def test_arguments_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make()


def test_lists_of_keys_are_tuples() -> None:
    assert Center(["group", "task"]) == Center(("group", "task"))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["a", "b"], "column 'length' must hold one number a row to weight by"),
        (torch.ones(2, 2), "column 'length' must hold one number a row to weight by"),
        ([1.0, -2.0], "column 'length' is -2.0 in row 1; a weight is finite and >= 0"),
        ([NAN, 1.0], "column 'length' is nan in row 0; a weight is finite and >= 0"),
    ],
)
def test_weights_of_rows_that_are_refused(column: Any, message: str) -> None:
    batch = RewardBatch([1.0, 2.0], columns={"length": column})
    with pytest.raises(InvalidInputError, match=message):
        Whiten("batch", "length")(batch.rewards, batch)
    with pytest.raises(MissingColumnError, match="no column 'tokens'"):
        Whiten("batch", "tokens")(batch.rewards, batch)
