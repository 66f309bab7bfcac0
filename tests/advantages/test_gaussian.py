"""Gaussian GRPO: the card's oracles, a slow reference, invariances, ties, and groups without a preference."""

import math
from collections import defaultdict
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.advantages import (
    Gaussianize,
    Transform,
    WeightedSum,
    chain,
    compute_advantages,
    gaussian_gdpo,
    gaussian_grpo,
    gaussian_grpo_released,
    gaussianize,
)
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError

NAN = float("nan")
QUANTILE = NormalDist().inv_cdf


def psi(values: list[float]) -> list[float]:
    """The paper's equation in plain Python: sort, quantiles of the ranks, mean over exactly equal values."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = defaultdict(list)
    for rank, i in enumerate(order):
        found[values[i]].append(QUANTILE((rank + 0.5) / len(values)))
    return [math.fsum(found[v]) / len(found[v]) for v in values]


def close(got: torch.Tensor, expected: list[float], atol: float = 5e-5) -> None:
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0, 0, 0, 0, 1], [-0.3204] * 4 + [1.2816]),
        ([0, 0, 1, 1, 1], [-0.9030] * 2 + [0.6020] * 3),
        ([0.1, 0.1, 0.1, 0.2, 1.0], [-0.6020] * 3 + [0.5244, 1.2816]),
        ([0.81, 0.81, 0.82, 0.82, 0.83], [-0.9030] * 2 + [0.2622] * 2 + [1.2816]),
        ([8, 1, 5, 4, 2, 7, 3, 6], [1.5341, -1.5341, 0.1573, -0.1573, -0.8871, 0.8871, -0.4888, 0.4888]),
        ([3, 3, 3], [0.0] * 3),
        ([7], [0.0]),
    ],
)
def test_figure_two_of_the_paper(rewards: list[float], expected: list[float]) -> None:
    for dtype in (torch.float32, torch.float64):
        close(gaussianize(torch.tensor(rewards, dtype=dtype)), expected)
        batch = RewardBatch(torch.tensor(rewards, dtype=dtype), columns={"task": [0] * len(rewards)})
        for levels in (("group",), ("task",)):
            close(compute_advantages(gaussian_grpo(levels=levels), batch), expected)
    close(gaussianize(torch.tensor(rewards)), expected)  # integers too


@pytest.mark.parametrize(("number", "variance"), [(2, 0.4549), (4, 0.7124), (8, 0.8511), (16, 0.9237), (32, 0.9612)])
def test_variance_of_distinct_values(number: int, variance: float) -> None:
    scores = gaussianize(torch.arange(number, dtype=torch.float64))
    assert scores.var(correction=0).item() == pytest.approx(variance, abs=5e-5)
    assert scores.max().item() == pytest.approx(QUANTILE(1 - 1 / (2 * number)))


def test_two_passes_by_hand() -> None:
    rewards = [0, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1]
    batch = RewardBatch(
        torch.tensor(rewards, dtype=torch.float64), groups=[0] * 4 + [1] * 4 + [2] * 4, columns={"task": [0] * 12}
    )
    first = [-0.3834] * 3 + [1.1503] + [-0.7345] * 2 + [0.7345] * 2 + [0.0] * 4
    close(compute_advantages(gaussian_grpo(levels=("group",)), batch), first)
    second = [-0.5598] * 3 + [1.7317] + [-1.4410] * 2 + [0.9813] * 2 + [0.2168] * 4
    for released in (gaussian_grpo(zero_dead_groups=False), gaussian_grpo_released()):
        close(compute_advantages(released, batch), second)
    # dead groups are left out of the second pass and get exactly 0
    alive = compute_advantages(gaussian_grpo(), batch)
    assert alive[8:].tolist() == [0.0] * 4
    close(alive[:8], psi(psi(rewards[:4]) + psi(rewards[4:8])), 1e-12)


NUMBERS = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 0.1]), st.floats(-1e3, 1e3, width=32))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.one_of(st.just(NAN), NUMBERS)), min_size=1, max_size=30), st.booleans())
def test_segments_against_the_equation(data: list[tuple[int, float]], narrow: bool) -> None:
    dtype = torch.float32 if narrow else torch.float64
    signal = torch.tensor([r for _, r in data], dtype=dtype)
    batch = RewardBatch(signal, groups=[g * 7 - 9 for g, _ in data])
    found = defaultdict(list)
    for i, (g, r) in enumerate(data):
        if not math.isnan(r):
            found[g].append(i)
    expected = [0.0] * len(data)
    for rows in found.values():
        for i, score in zip(rows, psi([data[i][1] for i in rows]), strict=True):
            expected[i] = score
    got = Gaussianize("group")(signal, batch)
    assert got.dtype == dtype
    close(got, expected, 1e-6 if narrow else 1e-12)
    both = RewardBatch(torch.stack([signal, -signal], 1), groups=batch.groups)
    two = Gaussianize("group")(both.rewards, both)
    assert two[:, 0].equal(got)
    torch.testing.assert_close(two[:, 1], -got, rtol=1e-6, atol=1e-6)


MAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "affine": lambda x: 3 * x - 2,
    "cube": lambda x: x**3,
    "exp": torch.exp,
    "atan": torch.atan,
}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=25), st.sampled_from(sorted(MAPS)), st.randoms())
def test_invariances(values: list[int], name: str, random: Any) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    scores = gaussianize(x)
    assert gaussianize(MAPS[name](x)).equal(scores)  # any increasing map
    assert gaussianize(-x).equal(-scores)  # antisymmetry, to the bit
    assert scores.sum().item() == pytest.approx(0.0, abs=1e-12)
    order = torch.tensor(random.sample(range(len(values)), len(values)))
    assert gaussianize(x[order]).equal(scores[order])
    assert gaussianize(scores).equal(scores) or len(set(values)) < len(values)
    highest = x == x.max()
    assert gaussianize(torch.where(highest, 1e9, x)).equal(scores)  # an outlier is a rank
    assert len(set(scores.tolist())) == len(set(values))  # ties, and nothing else, share a score


def test_the_last_axis_with_masks_and_nan() -> None:
    values = torch.tensor([[[3.0, 1.0, NAN], [NAN, NAN, NAN]], [[1.0, 1.0, 1.0], [2.0, NAN, 5.0]]])
    got = gaussianize(values)
    q = QUANTILE(0.75)
    close(got[0, 0], [q, -q, 0.0])
    close(got[0, 1], [0.0] * 3)
    close(got[1, 0], [0.0] * 3)
    close(got[1, 1], [-q, 0.0, q])
    masked = gaussianize(values, mask=torch.tensor([True, True, False]).expand_as(values))
    close(masked[1, 1], [0.0] * 3)
    assert gaussianize(torch.zeros(0)).shape == (0,)
    assert gaussianize(torch.zeros(2, 0)).shape == (2, 0)
    assert gaussianize(torch.zeros(0, 4)).shape == (0, 4)
    assert gaussianize(torch.tensor(3.0)).item() == 0.0
    assert gaussianize(torch.tensor([1.0, 2.0], requires_grad=True)).requires_grad is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    got = gaussianize(torch.tensor([-1.0, 2.0, -3.0], dtype=dtype))
    assert got.dtype == dtype
    assert got.tolist() == torch.tensor(psi([-1.0, 2.0, -3.0])).to(dtype).tolist()


def test_a_tolerance_makes_ties_of_neighbours() -> None:
    noisy = torch.tensor([0.3, 0.1 + 0.2, 0.1, 0.9], dtype=torch.float64)
    close(gaussianize(noisy, tolerance=1e-6), psi([0.3, 0.3, 0.1, 0.9]), 1e-12)
    assert gaussianize(noisy)[0] != gaussianize(noisy)[1]
    batch = RewardBatch(noisy, columns={"task": [0] * 4})
    got = compute_advantages(gaussian_grpo(levels=("group",)), batch)
    assert got[0] == got[1]
    got = compute_advantages(gaussian_grpo_released(), batch)
    assert got[0] != got[1]
    sums = RewardBatch(torch.tensor([[0.1, 0.2], [0.3, 0.0]], dtype=torch.float64), columns={"task": [0, 0]})
    assert compute_advantages(gaussian_grpo(), sums).tolist() == [0.0, 0.0]


def test_gaussian_gdpo_ranks_each_reward_first() -> None:
    rewards = torch.tensor([[0.0, 5.0], [1.0, 0.0], [2.0, 1.0], [0.0, 0.0], [9.0, 9.0]], dtype=torch.float64)
    batch = RewardBatch(rewards, ("a", "b"), [0, 0, 0, 1, 1], {"task": [0] * 5})
    columns = [psi(c[:3]) + psi(c[3:]) for c in rewards.t().tolist()]
    close(
        compute_advantages(gaussian_gdpo({"a": 1.0, "b": 0.5}), batch),
        psi([a + 0.5 * b for a, b in zip(*columns, strict=True)]),
        1e-12,
    )
    dead = RewardBatch(rewards.clone().fill_(3.0), ("a", "b"), [0, 0, 0, 1, 1], {"task": [0] * 5})
    assert not compute_advantages(gaussian_gdpo(), dead).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [gaussian_grpo, gaussian_grpo_released])
def test_one_quantile_of_groups_of_different_size_is_a_tie(make: Callable[..., Transform], dtype: torch.dtype) -> None:
    batch = RewardBatch(
        torch.tensor([0, 1, 0, 1, 2, 3, 4, 5], dtype=dtype), groups=[0, 0, 1, 1, 1, 1, 1, 1], columns={"task": [0] * 8}
    )
    close(compute_advantages(make(), batch), [-0.68797, 0.68797, -1.5341, -0.68797, -0.1573, 0.1573, 0.68797, 1.5341])


def test_levels() -> None:
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns = {"task": [0] * 6 + [1] * 6, "difficulty": [0, 1] * 6}
    batch = RewardBatch(rewards, groups=torch.arange(12) // 3, columns=columns)
    three = gaussian_grpo(levels=["group", ["task", "difficulty"], "batch"])
    by_hand = chain(
        WeightedSum(),
        Gaussianize("group", 1e-6),
        Gaussianize(("task", "difficulty"), 1e-9, "group"),
        Gaussianize("batch", 1e-9, "group"),
    )
    assert three == by_hand
    close(compute_advantages(three, batch).sum(), 0.0, 1e-9)  # type: ignore[arg-type]
    assert gaussian_grpo(by="difficulty") == gaussian_grpo(levels=("group", "difficulty"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussianize(tolerance=-1.0), "tolerance must be a finite number >= 0, got -1.0"),
        (lambda: Gaussianize(tolerance=NAN), "tolerance must be a finite number >= 0, got nan"),
        (
            lambda: gaussianize(torch.zeros(2), tolerance=float("inf")),
            "tolerance must be a finite number >= 0, got inf",
        ),
        (lambda: gaussianize(torch.tensor([1.0, float("-inf")])), "values hold -inf; expected finite numbers or NaN"),
        (lambda: gaussianize(torch.zeros(2), torch.ones(3, dtype=torch.bool)), r"mask has shape \(3,\), values \(2,\)"),
        (lambda: gaussian_grpo(levels="task"), r"levels must be a sequence of keys such as .*, got 'task'"),
        (lambda: gaussian_grpo(levels=()), r"levels must be a sequence of keys such as .*, got \(\)"),
        (lambda: Gaussianize(None), "by must be the name of a column or several names, got None"),
        (
            lambda: Gaussianize(ignore_constant=3),
            "ignore_constant must be the name of a column or several names, got 3",
        ),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make()
