"""Statistics of segments against brute force, ids of every kind, gradients, labels."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.grouped import Segments, cross, factorize, whole

NAN = float("nan")
KINDS: dict[str, Any] = {
    "int": lambda code: code,
    "string": lambda code: f"prompt-{code}",
    "negative": lambda code: -7 * code - 1,
    "huge": lambda code: 2**62 + 10**15 * code,
    "beyond 64 bits": lambda code: 2**70 + code,
    "tuple": lambda code: (code // 2, f"s{code}"),
}


@st.composite
def tables(draw: Any, columns: int | None = None) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Codes in no order, values (N,) or (N, K) and a mask of the same shape."""
    codes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=24))
    width = draw(st.sampled_from([None, 1, 3])) if columns is None else columns
    cells = len(codes) * (width or 1)
    number = st.one_of(st.sampled_from([0.0, 1.0, 0.1]), st.floats(-50, 50, width=32))
    values = torch.tensor(draw(st.lists(number, min_size=cells, max_size=cells)))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=cells, max_size=cells)))
    shape = (len(codes),) if width is None else (len(codes), width)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return codes, values.to(dtype).reshape(shape), mask.reshape(shape)


def brute(
    codes: list[int], values: torch.Tensor, mask: torch.Tensor | None, count: int, statistic: Any
) -> torch.Tensor:
    """A statistic of the list of values that take part, for each segment and column, in plain Python."""
    columns = values.reshape(len(codes), -1).double().tolist()
    used = None if mask is None else mask.reshape(len(codes), -1).tolist()
    width = len(columns[0])
    rows = [
        [
            statistic([columns[i][k] for i, c in enumerate(codes) if c == code and (used is None or used[i][k])])
            for k in range(width)
        ]
        for code in range(count)
    ]
    result = torch.tensor(rows, dtype=torch.float64)
    return result.squeeze(1) if values.ndim == 1 else result


def mean(x: list[float]) -> float:
    return math.fsum(x) / len(x) if x else 0.0


def variance(ddof: int) -> Any:
    def of(x: list[float]) -> float:
        return math.fsum((v - mean(x)) ** 2 for v in x) / (len(x) - ddof) if len(x) > ddof else 0.0

    return of


@settings(max_examples=30, deadline=None)
@given(tables(), st.booleans(), st.sampled_from([0, 1]))
def test_statistics_match_brute_force(table: Any, masked: bool, ddof: int) -> None:
    codes, values, mask = table
    segments = factorize(torch.tensor(codes))
    used = mask if masked else None

    def expect(statistic: Any) -> torch.Tensor:
        return brute(codes, values, used, segments.count, statistic)

    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(segments.sum(values, used), expect(math.fsum), **close)
    number = segments.number(used)
    torch.testing.assert_close(
        number if number.ndim == values.ndim else number.unsqueeze(1).expand(-1, values.shape[1]), expect(len), **close
    )
    torch.testing.assert_close(segments.mean(values, used), expect(mean), **close)
    torch.testing.assert_close(segments.variance(values, used, ddof), expect(variance(ddof)), **close)
    deviation = segments.deviation(values, used, ddof)
    torch.testing.assert_close(deviation.square(), expect(variance(ddof)), **close)
    assert segments.constant(values, used).double().equal(expect(lambda x: float(len(set(x)) <= 1)))
    smallest, largest = segments.extremes(values, used)
    assert smallest.equal(expect(lambda x: min(x, default=math.inf)))
    assert largest.equal(expect(lambda x: max(x, default=-math.inf)))
    # a segment of equal values is exactly 0, in every dtype
    assert bool((deviation[segments.constant(values, used)] == 0).all())


@settings(max_examples=60, deadline=None)
@given(tables(), st.booleans(), st.booleans())
def test_centred_matches_brute_force(table: Any, masked: bool, keep_single: bool) -> None:
    codes, values, mask = table
    segments = factorize(torch.tensor(codes))
    used = mask if masked else torch.ones_like(mask)
    result = segments.centred(values, mask if masked else None, keep_single=keep_single)
    means = brute(codes, values, used, segments.count, lambda x: 0.0 if keep_single and len(x) == 1 else mean(x))
    expected = torch.where(used, values.double() - means[torch.tensor(codes)], 0.0)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    flat = segments.constant(values, used) & (segments.number(used) > 1)
    assert bool((result[flat[torch.tensor(codes)]] == 0).all())
    if not masked:
        torch.testing.assert_close(result, segments.centred(values, keep_single=keep_single))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_equal_values_have_deviation_exactly_zero(dtype: torch.dtype) -> None:
    for number in (3, 7, 10, 99, 1001):
        values = torch.full((number,), 0.1, dtype=torch.float64).to(dtype)
        for segments in (whole(number), factorize([7] * number), factorize(torch.arange(number) % 3)):
            assert segments.deviation(values).tolist() == [0.0] * segments.count
            assert not segments.centred(values).any()


def test_what_is_masked_touches_nothing() -> None:
    segments = factorize([1, 0, 1, 0])
    values = torch.tensor([1.0, NAN, 3.0, math.inf])
    mask = torch.tensor([True, False, True, False])
    assert segments.sum(values, mask).tolist() == [0.0, 4.0]
    assert segments.mean(values, mask).tolist() == [0.0, 2.0]
    assert segments.deviation(values, mask).tolist() == [0.0, 1.0]
    assert segments.centred(values, mask).tolist() == [-1.0, 0.0, 1.0, 0.0]
    assert segments.constant(values, mask).tolist() == [True, False]
    pairs = torch.stack([values, values], 1)
    assert segments.mean(pairs, mask).tolist() == [[0.0, 0.0], [2.0, 2.0]]  # one mask for every column


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    codes=st.lists(st.integers(0, 6), max_size=20), form=st.sampled_from(["list", "array", "object", "reversed view"])
)
def test_ids_of_every_kind(kind: str, codes: list[int], form: str) -> None:
    ids = [KINDS[kind](code) for code in codes]
    given_ids: Any = ids
    if form == "object" or kind in ("tuple", "beyond 64 bits"):
        given_ids = np.fromiter(ids, dtype=object, count=len(ids))
    elif form != "list":
        given_ids = np.array(ids) if ids else np.array([], dtype=np.int64)
    if form == "reversed view" and isinstance(given_ids, np.ndarray):
        given_ids = np.ascontiguousarray(given_ids[::-1])[::-1]
    segments = factorize(given_ids)
    assert [segments.label(code) for code in segments.codes.tolist()] == ids
    assert len(segments) == len(ids)
    assert segments.sizes.sum() == len(ids)
    assert segments.sizes.shape == (segments.count,)
    assert all(0 <= code < segments.count for code in segments.codes.tolist())


def test_ids_of_other_types() -> None:
    assert factorize(torch.tensor([True, False, True])).codes.tolist() == [1, 0, 1]
    assert factorize(torch.tensor([3, 1], dtype=torch.int8)).codes.dtype == torch.int64
    assert factorize(np.array([2**64 - 1, 5, 2**64 - 1], dtype=np.uint64)).codes.tolist() == [0, 1, 0]
    assert factorize(np.array(["b", "a", "b"])).labels == ["b", "a"]
    assert factorize([[1, "a"], [1, "a"], [2, "a"]]).labels == [(1, "a"), (2, "a")]
    assert factorize(range(3)).count == 3
    assert factorize([np.int32(4), 4]).codes.unique().numel() == 1
    assert factorize(np.arange(6, dtype=">i4")[::2]).codes.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2), "ids must be integers or strings, got torch.float32"),
        (torch.zeros(2, dtype=torch.complex64), "ids must be integers or strings, got torch.complex64"),
        (torch.zeros(2, 2, dtype=torch.int64), r"ids must be one-dimensional, got shape \(2, 2\)"),
        (np.zeros((2, 2), dtype=np.int64), r"ids must be one-dimensional, got shape \(2, 2\)"),
        (np.array([0.5]), "ids must be integers or strings, got float64"),
        ([1, 2.5], "ids must be integers or strings, got 2.5 in row 1"),
        (["a", NAN], "ids must be integers or strings, got nan in row 1"),
        (["a", None], "ids has no value in row 1; every row needs one"),
        ([torch.tensor(1)], r"ids must be integers or strings, got tensor\(1\) in row 0"),
        ([{"a": 1}], "ids must be integers, strings or tuples, got dict"),
        ("prompt", "ids must be a sequence with one id a row, got 'prompt'"),
        (7, "ids must be a sequence with one id a row, got 7"),
    ],
)
def test_ids_that_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        factorize(ids)
    with pytest.raises(InvalidInputError, match=message.replace("ids", "groups", 1)):
        factorize(ids, name="groups")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.sampled_from("abc"), st.integers(0, 2)), max_size=20),
    st.sampled_from([0, 10**13]),
)
def test_cross_joins_rows_that_agree_in_all(rows: list[tuple[int, str, int]], far: int) -> None:
    rows = [(a * (far or 1), b, c) for a, b, c in rows]
    parts = [factorize(list(column)) for column in zip(*rows, strict=True)] if rows else [factorize([])] * 3
    pairs = cross(parts[0], parts[1])
    triples = cross(pairs, parts[2])
    assert [pairs.label(code) for code in pairs.codes.tolist()] == [(a, b) for a, b, _ in rows]
    assert [triples.label(code) for code in triples.codes.tolist()] == [((a, b), c) for a, b, c in rows]
    assert triples.sizes.sum() == len(rows)


def test_cross_of_different_lengths() -> None:
    with pytest.raises(InvalidInputError, match="partitions of 2 and 3 rows cannot be crossed"):
        cross(factorize([0, 1]), factorize([0, 1, 2]))


def test_cross_labels_are_a_sequence() -> None:
    labels = cross(factorize(["x", "y"]), factorize([0, 1])).labels
    assert labels is not None
    assert len(labels) == 4
    assert list(labels) == [("x", 0), ("x", 1), ("y", 0), ("y", 1)]


def test_no_rows() -> None:
    for segments in (factorize([]), whole(0), cross(whole(0), whole(0)), factorize(torch.zeros(0, dtype=torch.int64))):
        assert (len(segments), segments.count) == (0, 0)
        for values in (torch.zeros(0), torch.zeros(0, 3)):
            assert segments.sum(values).shape == values.shape
            assert segments.deviation(values).shape == values.shape
            assert segments.centred(values).shape == values.shape
            assert segments.constant(values).shape == values.shape
            assert segments.spread(segments.mean(values)).shape == values.shape


def test_empty_segments_between_others() -> None:
    segments = Segments(torch.tensor([3, 1, 3]), 5)
    assert segments.sizes.tolist() == [0, 1, 0, 2, 0]
    assert segments.mean(torch.tensor([1.0, 5.0, 3.0])).tolist() == [0, 5, 0, 2, 0]
    assert segments.constant(torch.tensor([1.0, 5.0, 3.0])).tolist() == [True, True, True, False, True]
    assert segments.spread(torch.arange(5)).tolist() == [3, 1, 3]


@pytest.mark.parametrize("shape", [(3,), (5,), (4, 2, 2), ()])
def test_values_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    for segments in (whole(4), factorize([0, 1, 0, 1])):
        with pytest.raises(InvalidInputError, match=r"expected \(4,\) or \(4, K\)"):
            segments.sum(torch.zeros(shape))


def test_non_contiguous_values() -> None:
    segments = factorize([2, 0, 2, 0])
    values = torch.arange(8.0).reshape(2, 4).t()
    assert segments.sum(values).equal(segments.sum(values.contiguous()))
    assert segments.centred(values[:, 1]).equal(segments.centred(values[:, 1].contiguous()))
    assert segments.sum(torch.arange(8.0)[::2]).tolist() == [8.0, 0.0, 4.0]


@pytest.mark.parametrize("shape", [(6,), (6, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(shape: tuple[int, ...], masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(shape, generator=generator) < 0.8 if masked else None
    segments = factorize(["b", "a", "b", "b", "a", "a"])
    for statistic in (segments.sum, segments.mean, segments.variance, segments.deviation, segments.centred):
        assert torch.autograd.gradcheck(lambda x, f=statistic: f(x, mask), (values,))
    single = whole(6)
    assert torch.autograd.gradcheck(lambda x: single.variance(x, mask, 1), (values,))


def test_gradient_of_a_deviation_that_is_zero_is_zero() -> None:
    for dtype in (torch.float32, torch.float64):
        values = torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0], dtype=dtype, requires_grad=True)
        factorize([0, 0, 0, 1, 1]).deviation(values).sum().backward()
        assert values.grad is not None
        assert values.grad[:3].tolist() == [0.0] * 3
        torch.testing.assert_close(values.grad[3:], torch.tensor([-0.5, 0.5], dtype=dtype))
