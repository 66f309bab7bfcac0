"""Tilting: balls, temperatures and the best of n, against worked numbers, plain Python and scipy."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from polyreward.errors import InvalidInputError
from polyreward.tilting import (
    Chi2Tilt,
    KLTilt,
    best_of_n_distribution,
    best_of_n_kl,
    chi2_divergence,
    chi2_tilt,
    effective_sample_size,
    expected_best_of_n,
    exponential_tilt,
    kl_divergence,
    kl_tilt,
    logmeanexp,
)

NAN, INF = float("nan"), float("inf")
TILTS = [chi2_tilt, kl_tilt]


@st.composite
def rows(draw, size=6):
    count = draw(st.integers(1, size))
    weights = np.array(draw(st.lists(st.integers(1, 50), min_size=count, max_size=count)), dtype=float)
    worth = np.array(draw(st.lists(st.integers(-5, 5), min_size=count, max_size=count)), dtype=float)
    return weights / weights.sum(), worth


RADII = st.floats(0.001, 30)


def slow_chi2_tilt(p, a, kappa):
    """Water-filling by trying every support of best entries, in plain Python."""
    best, found = -INF, None
    for level in sorted(set(a)):
        kept = [i for i in range(len(p)) if a[i] >= level]
        inside = sum(p[i] for i in kept)
        mean = sum(p[i] * a[i] for i in kept) / inside
        variance = sum(p[i] * (a[i] - mean) ** 2 for i in kept) / inside
        room = (1 + kappa) * inside - 1
        if room < -1e-12:
            continue
        slope = math.sqrt(max(room, 0) / variance) if level < max(a) else 0.0
        q = [p[i] / inside * (1 + slope * (a[i] - mean)) if i in kept else 0.0 for i in range(len(p))]
        value = sum(x * y for x, y in zip(q, a, strict=True))
        if min(q) >= -1e-12 and value > best:
            best, found = value, q
    return found


def test_ball_of_the_worked_example():
    p, r = [0.5, 0.5], [0.0, 10.0]
    tilted = chi2_tilt(p, r, 0.25)
    assert tilted / p == pytest.approx([0.5, 1.5])
    assert tilted @ r == pytest.approx(7.5)
    assert chi2_divergence(tilted, p) == pytest.approx(0.25)
    for kappa in (1.0, 1.0001, 4.0, INF):
        assert chi2_tilt(p, r, kappa) == pytest.approx([0, 1], abs=1e-12)


def test_binary_case():
    assert chi2_tilt([0.2425, 0.7575], [1.0, 0.0], 0.5)[0] == pytest.approx(0.5456, abs=1e-4)
    for p, kappa in itertools.product((0.01, 0.2425, 0.5, 0.9), (0.1, 0.5, 2.0)):
        want = min(1.0, p + math.sqrt(kappa * p * (1 - p)))
        rest = np.full(4, (1 - p) / 4)
        tilted = chi2_tilt(np.array([p, *rest]), np.array([3.0, 1, 1, 1, 1]), kappa)
        assert tilted[0] == pytest.approx(want)
        assert tilted[1:] == pytest.approx([(1 - want) / 4] * 4)


@given(rows(), RADII)
@settings(deadline=None)
def test_chi2_equals_plain_water_filling(row, kappa):
    p, a = row
    tilted = chi2_tilt(p, a, kappa)
    assert tilted == pytest.approx(slow_chi2_tilt(p.tolist(), a.tolist(), kappa), abs=1e-9)
    assert tilted.sum() == pytest.approx(1)
    assert (tilted >= 0).all()
    assert chi2_divergence(tilted / tilted.sum(), p) <= kappa + 1e-9


@given(rows(), RADII)
@settings(deadline=None)
def test_no_negative_weight_means_the_closed_form(row, kappa):
    p, a = row
    mean = p @ a
    variance = p @ (a - mean) ** 2
    plain = p if a.min() == a.max() else p * (1 + math.sqrt(kappa / variance) * (a - mean))
    if (plain >= 0).all():
        tilted = chi2_tilt(p, a, kappa)
        assert tilted == pytest.approx(plain)
        assert tilted @ a == pytest.approx(mean + math.sqrt(kappa * variance))
    else:  # the formula promises more than the ball holds
        assert chi2_tilt(p, a, kappa) @ a < mean + math.sqrt(kappa * variance) + 1e-9


@pytest.mark.parametrize(("tilt", "divergence"), [(chi2_tilt, chi2_divergence), (kl_tilt, kl_divergence)])
def test_random_search_never_beats_the_tilt(tilt, divergence):
    rng = np.random.default_rng(0)
    for _ in range(20):
        p, a, kappa = rng.dirichlet(np.ones(5)), rng.normal(size=5), rng.exponential()
        best = tilt(p, a, kappa)
        assert divergence(best, p) <= kappa + 1e-9
        other = rng.dirichlet(rng.uniform(0.2, 2, size=5), size=2000)
        near = best + rng.uniform(0, 1, size=(2000, 1)) ** 4 * (other - best)  # also close to the best
        back = near + rng.uniform(0, 1, size=(2000, 1)) * (p - near)
        tried = np.concatenate([other, near, back])
        inside = tried[divergence(tried, p) <= kappa]
        assert len(inside) > 50
        assert (inside @ a).max() <= best @ a + 1e-9


@pytest.mark.parametrize("kappa", [0.05, 0.5, 3.0])
def test_balls_agree_with_a_general_solver(kappa):
    rng = np.random.default_rng(1)
    for _ in range(5):
        p, a = rng.dirichlet(np.full(6, 2.0)), rng.normal(size=6)
        for tilt, divergence in (
            (chi2_tilt, lambda q, p=p: (q**2 / p).sum() - 1),
            (kl_tilt, lambda q, p=p: (q * np.log(np.maximum(q, 1e-300) / p)).sum()),
        ):
            solved = minimize(
                lambda q, a=a: -q @ a,
                p,
                bounds=[(0, 1)] * 6,
                method="SLSQP",
                options={"maxiter": 500, "ftol": 1e-12},
                constraints=[
                    {"type": "eq", "fun": lambda q: q.sum() - 1},
                    {"type": "ineq", "fun": lambda q, divergence=divergence: kappa - divergence(q)},
                ],
            )
            assert tilt(p, a, kappa) @ a == pytest.approx(-solved.fun, abs=1e-5)


@given(rows(), st.floats(0.001, 5))
@settings(deadline=None)
def test_kl_ball_spends_the_radius_or_is_capped(row, kappa):
    p, a = row
    tilted = kl_tilt(p, a, kappa)
    best = a == a.max()
    cap = -math.log(p[best].sum())
    if kappa >= cap:
        assert tilted == pytest.approx(np.where(best, p, 0) / p[best].sum())
        return
    assert kl_divergence(tilted, p) == pytest.approx(kappa, abs=1e-7)
    ratio = np.log(tilted / p)  # linear in the advantage
    order = np.argsort(a)
    slopes = np.diff(ratio[order]) / np.where(np.diff(a[order]) == 0, NAN, np.diff(a[order]))
    slopes = slopes[np.isfinite(slopes)]
    assert slopes == pytest.approx(np.full(len(slopes), slopes.mean()), rel=1e-4)


@pytest.mark.parametrize("tilt", TILTS)
@given(rows(), RADII, st.integers(-3, 3), st.sampled_from([0.25, 1.0, 8.0]), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_tilts_ignore_shift_scale_and_order(tilt, row, kappa, shift, scale, random):
    p, a = row
    tilted = tilt(p, a, kappa)
    assert tilt(p, scale * a + shift, kappa) == pytest.approx(tilted, abs=1e-9)
    order = list(range(len(p)))
    random.shuffle(order)
    assert tilt(p[order], a[order], kappa) == pytest.approx(tilted[order], abs=1e-9)
    assert tilted @ a >= p @ a - 1e-9


@pytest.mark.parametrize("tilt", TILTS)
def test_a_larger_ball_is_worth_more(tilt):
    rng = np.random.default_rng(2)
    p, a = rng.dirichlet(np.ones(7)), rng.normal(size=7)
    values = [tilt(p, a, kappa) @ a for kappa in np.geomspace(1e-6, 100, 60)]
    assert (np.diff(values) >= -1e-12).all()
    assert values[0] == pytest.approx(p @ a, abs=0.01)
    assert values[-1] == pytest.approx(a.max(), abs=0.05)


@pytest.mark.parametrize("tilt", TILTS)
def test_radius_0_and_equal_advantages_give_the_base_itself(tilt):
    p = np.array([0.2, 0.3, 0.5])
    assert tilt(p, [1.0, 2, 3], 0.0).tolist() == p.tolist()
    assert tilt(p, [0.1, 0.1, 0.1], 2.0).tolist() == p.tolist()
    assert tilt(p, [0.1, 0.1, 0.1], INF).tolist() == p.tolist()
    assert tilt([1.0], [5.0], 2.0).tolist() == [1.0]


@pytest.mark.parametrize("tilt", TILTS)
def test_ties_at_the_top_keep_their_proportions(tilt):
    assert tilt([0.1, 0.3, 0.6], [1.0, 1.0, 0.0], INF) == pytest.approx([0.25, 0.75, 0])


@pytest.mark.parametrize("tilt", TILTS)
def test_rows_masks_and_absent_entries(tilt):
    p = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 0.0]])
    a = np.array([[0.0, 1.0, 9.0], [3.0, 1.0, 2.0], [NAN, NAN, NAN]])
    mask = np.array([[True] * 3, [True] * 3, [False] * 3])
    tilted = tilt(p, a, np.array([0.2, 0.4, 7.0]), mask)
    assert tilted[0, :2] == pytest.approx(tilt([0.5, 0.5], [0.0, 1.0], 0.2))
    assert tilted[0, 2] == 0  # no mass to begin with
    assert tilted[1] == pytest.approx(tilt(p[1], a[1], 0.4))
    assert tilted[2].tolist() == [0, 0, 0]
    padded = tilt([0.4, 0.6, NAN], [1.0, 0.0, INF], 0.1, [True, True, False])
    assert padded[:2] == pytest.approx(tilt([0.4, 0.6], [1.0, 0.0], 0.1))
    assert padded[2] == 0


@pytest.mark.parametrize("tilt", TILTS)
def test_kinds_and_dtypes(tilt):
    p, a = [0.2, 0.3, 0.5], [1.0, 2.0, 0.0]
    want = tilt(p, a, 0.3)
    assert want.dtype == np.float64
    assert tilt(np.float32(p), a, 0.3).dtype == np.float32
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tilted = tilt(torch.tensor(p, dtype=dtype), torch.tensor(a), 0.3)
        assert tilted.dtype == dtype
        assert tilted.tolist() == pytest.approx(want, abs=0.01)
    stacked = tilt(torch.tensor(p).expand(2, 4, 3), torch.tensor(a), torch.tensor([[0.3] * 4, [0.0] * 4]))
    assert stacked.shape == (2, 4, 3)
    assert stacked[0, 1].tolist() == pytest.approx(want)
    assert stacked[1, 2].tolist() == pytest.approx(p)
    assert tilt(np.zeros((0, 3)), np.zeros((0, 3)), 0.3).shape == (0, 3)


@pytest.mark.parametrize("tilt", TILTS)
def test_extreme_advantages_and_probabilities(tilt):
    for a in ([1e300, -1e300, 0.0], [1e-300, 0.0, 2e-300], [1e8 + 1, 1e8, 1e8 + 2]):
        tilted = tilt([0.3, 0.3, 0.4], a, 0.5)
        order = np.array(a) / np.abs(a).max() if max(a) != 1e8 + 2 else np.array([1.0, 0, 2])
        assert tilted == pytest.approx(tilt([0.3, 0.3, 0.4], order, 0.5), abs=1e-9)
    tiny = tilt([1e-12, 1 - 1e-12], [1.0, 0.0], 0.5)
    assert np.isfinite(tiny).all()
    assert tiny.sum() == pytest.approx(1)


@pytest.mark.parametrize(("tilt", "kappa"), [(chi2_tilt, 0.3), (chi2_tilt, 2.0), (kl_tilt, 0.3), (kl_tilt, 0.05)])
def test_gradients(tilt, kappa):
    rng = np.random.default_rng(3)
    logits, a = (torch.tensor(rng.normal(size=(3, 4)), requires_grad=True) for _ in range(2))
    radius = torch.full((3,), kappa, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda l, a, k: tilt(torch.softmax(l, -1), a, k), (logits, a, radius))


@pytest.mark.parametrize("tilt", TILTS)
def test_gradients_are_finite_where_nothing_moves(tilt):
    p = torch.tensor([[0.5, 0.5, 0.0], [0.3, 0.3, 0.4], [0.0, 0.0, 0.0]], requires_grad=True)
    a = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [NAN, 0.0, 0.0]], requires_grad=True)
    for kappa in (0.0, 0.5, 100.0):
        tilt(p, a, kappa, torch.tensor([[True], [True], [False]])).square().sum().backward()
        assert torch.isfinite(p.grad).all()
        assert torch.isfinite(a.grad).all()


def test_parts_hold_a_radius():
    p, a = np.array([0.2, 0.8]), np.array([1.0, 0.0])
    assert Chi2Tilt(0.3)(p, a) == pytest.approx(chi2_tilt(p, a, 0.3))
    assert KLTilt(0.3)(p, a) == pytest.approx(kl_tilt(p, a, 0.3))
    assert Chi2Tilt() == Chi2Tilt(0.5)
    for part in (Chi2Tilt, KLTilt):
        for kappa in (-1, NAN, "1", None, True):
            with pytest.raises(InvalidInputError, match=f"{part.__name__}: kappa must be"):
                part(kappa)


@pytest.mark.parametrize("tilt", [*TILTS, lambda p, a, k: best_of_n_distribution(p, a, 2)])
@pytest.mark.parametrize(
    ("p", "a", "message"),
    [
        ([[0.5, 0.5], [0.5, 0.6]], [1.0, 2.0], r"the sum of p at index 1 is 1\.1, expected 1"),
        ([-0.5, 1.5], [1.0, 2.0], r"p at index 0 is -0\.5, expected a probability"),
        ([NAN, 1.0], [1.0, 2.0], "p at index 0 is nan"),
        ([0.5, 0.5], [1.0, NAN], "advantage at index 1 is nan, expected a finite number"),
        ([0.5, 0.5], [[1.0, 0.0], [INF, 0.0]], r"advantage at index \(1, 0\) is inf"),
        ([0.5, 0.5], [1.0, 2.0, 3.0], r"shapes \(2,\), \(3,\), \(\) do not go together"),
        ([], [], "at least one entry on the last axis"),
        (0.5, 0.5, "at least one entry on the last axis"),
        ([0.5, 0.5], ["a", "b"], "expected numbers"),
    ],
)
def test_bad_rows_are_named(tilt, p, a, message):
    with pytest.raises(InvalidInputError, match=message):
        tilt(p, a, 0.5)


@pytest.mark.parametrize("tilt", TILTS)
def test_bad_radii_are_named(tilt):
    with pytest.raises(InvalidInputError, match="kappa is -1, expected at least 0"):
        tilt([0.5, 0.5], [1.0, 2.0], -1.0)
    with pytest.raises(InvalidInputError, match="kappa at index 1 is nan"):
        tilt([[0.5, 0.5]] * 2, [1.0, 2.0], [0.5, NAN])
    with pytest.raises(InvalidInputError, match=r"kappa of shape \(3,\) for rows of shape \(2,\)"):
        tilt([[0.5, 0.5]] * 2, [1.0, 2.0], [0.5] * 3)


def test_divergences():
    assert chi2_divergence([0.25, 0.75], [0.5, 0.5]) == pytest.approx(0.25)
    assert kl_divergence([1.0, 0.0], [0.25, 0.75]) == pytest.approx(math.log(4))
    for divergence in (chi2_divergence, kl_divergence):
        assert divergence([0.5, 0.5], [1.0, 0.0]) == INF
        assert divergence([[1.0, 0.0], [0.5, 0.5]], [1.0, 0.0]).tolist() == [0, INF]
        with pytest.raises(InvalidInputError, match="the sum of q at index"):
            divergence([[0.5, 0.5], [0.5, 0.0]], [0.5, 0.5])


def test_exponential_tilt_of_two_points():
    tilted = exponential_tilt([1.0, 0.0])
    assert tilted.weights == pytest.approx([0.731059, 0.268941], abs=1e-6)
    assert tilted.effective_size == pytest.approx(1 / (0.731059**2 + 0.268941**2), abs=1e-5)
    assert tilted.log_total == pytest.approx(math.log((math.e + 1) / 2))


@given(rows(), st.sampled_from([0.1, 1.0, 7.0]))
@settings(deadline=None)
def test_exponential_tilt_equals_plain_sums(row, temperature):
    p, r = row
    want = [q * math.exp(x / temperature) for q, x in zip(p, r, strict=True)]
    tilted = exponential_tilt(r, temperature, np.log(p))
    assert tilted.weights == pytest.approx(np.array(want) / sum(want))
    assert tilted.log_total == pytest.approx(math.log(sum(want)))
    assert 1 - 1e-9 <= tilted.effective_size <= len(p) + 1e-9
    soft = logmeanexp(r, temperature, np.log(p))
    assert soft == pytest.approx(temperature * math.log(sum(want)))
    assert p @ r - 1e-9 <= soft <= r.max() + 1e-9
    assert logmeanexp(r, temperature, np.log(p) + 3) == pytest.approx(soft)  # weights of any scale


def test_the_kl_tilt_is_an_exponential_tilt():
    p, a = np.array([0.2, 0.3, 0.5]), np.array([1.0, 2.0, 0.0])
    tilted = exponential_tilt(a, 0.7, np.log(p)).weights
    assert kl_tilt(p, a, kl_divergence(tilted, p)) == pytest.approx(tilted)


def test_soft_values_run_from_the_mean_to_the_maximum():
    values = np.array([0.0, 1.0, 5.0])
    assert logmeanexp(values, 1e6) == pytest.approx(2, abs=1e-4)
    assert logmeanexp(values, 1e-3) == pytest.approx(5, abs=0.01)
    assert logmeanexp([2.0, 2.0, 2.0]) == pytest.approx(2)  # logsumexp would add log 3
    assert logmeanexp([1e308, -1e308]) == pytest.approx(1e308)
    assert logmeanexp([3.0], 0.1) == pytest.approx(3)


def test_nothing_left_has_weight_0_and_no_nan():
    for r, mask in (([-INF, -INF], None), ([1.0, NAN], [False, False])):
        tilted = exponential_tilt(r, mask=mask)
        assert tilted.weights.tolist() == [0, 0]
        assert tilted.effective_size == 0
        assert tilted.log_total == -INF
        assert logmeanexp(r, mask=mask) == -INF
    assert logmeanexp([1.0, 2.0], log_weights=[-INF, -INF]) == -INF
    tilted = exponential_tilt([[0.0, -INF, 0.0], [1.0, 5.0, NAN]], mask=[[True] * 3, [True, False, False]])
    assert tilted.weights == pytest.approx(np.array([[0.5, 0, 0.5], [1, 0, 0]]))
    assert tilted.effective_size == pytest.approx([2, 1])
    assert tilted.log_total == pytest.approx([math.log(2 / 3), 1])


def test_soft_values_have_the_tilted_distribution_as_gradient():
    values = torch.tensor([[0.3, -1.0, 2.0], [-INF, -INF, -INF], [1.0, -INF, NAN]], requires_grad=True)
    mask = torch.tensor([[True] * 3, [True] * 3, [True, True, False]])
    soft = logmeanexp(values, 0.5, mask=mask)
    torch.where(soft > -INF, soft, 0.0).sum().backward()
    assert values.grad[0].tolist() == pytest.approx(torch.softmax(values[0].detach() / 0.5, 0).tolist())
    assert values.grad[1].tolist() == [0, 0, 0]
    assert values.grad[2].tolist() == [1, 0, 0]
    scores = torch.tensor([0.5, 1.5, -0.2], dtype=torch.float64, requires_grad=True)
    prior = torch.tensor([0.1, -0.5, 0.7], dtype=torch.float64, requires_grad=True)
    for standardize in (False, True):

        def tilt(r, l, standardize=standardize):
            return exponential_tilt(r, 0.7, l, standardize=standardize)

        assert torch.autograd.gradcheck(tilt, (scores, prior))


def test_axes():
    values = np.random.default_rng(4).normal(size=(3, 4, 2))
    for dim in (0, 1, 2, -1, -3):
        moved = np.moveaxis(values, dim, -1)
        assert logmeanexp(values, dim=dim) == pytest.approx(logmeanexp(moved))
        tilted = exponential_tilt(values, dim=dim)
        assert np.moveaxis(tilted.weights, dim, -1) == pytest.approx(exponential_tilt(moved).weights)
        assert tilted.weights.sum(dim) == pytest.approx(np.ones(tilted.log_total.shape))
    with pytest.raises(InvalidInputError, match="no axis 3"):
        logmeanexp(values, dim=3)


def test_standardised_rewards():
    r = np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0], [0.0, 2.0, -INF]])
    tilted = exponential_tilt(r, 0.5, standardize=True)
    deviation = math.sqrt(2 / 3)
    assert tilted.weights[0] == pytest.approx(exponential_tilt((r[0] - 2) / deviation, 0.5).weights)
    assert tilted.weights[1] == pytest.approx([1 / 3] * 3)
    assert tilted.weights[2] == pytest.approx([*exponential_tilt([-1.0, 1.0], 0.5).weights, 0])
    assert exponential_tilt(100 * r + 5, 0.5, standardize=True).weights == pytest.approx(tilted.weights)


def test_effective_sample_size():
    assert effective_sample_size([1.0, 1.0, 1.0, 1.0]) == pytest.approx(4)
    assert effective_sample_size([5.0, 0.0]) == 1
    assert effective_sample_size([[0.0, 0.0], [1e300, 1e300]]).tolist() == [0, 2]
    assert effective_sample_size([1e-300, 3e-300]) == pytest.approx(1.6)
    assert effective_sample_size([1.0, 1.0, NAN], [True, True, False]) == 2
    with pytest.raises(InvalidInputError, match="weight at index 1 is -1"):
        effective_sample_size([1.0, -1.0])


@pytest.mark.parametrize("function", [exponential_tilt, logmeanexp])
def test_bad_rewards_and_temperatures(function):
    for values, message in (([1.0, NAN], "index 1 is nan"), ([INF, 1.0], "index 0 is inf"), ([], "at least one entry")):
        with pytest.raises(InvalidInputError, match=message):
            function(values)
    for temperature in (0, -1.0, NAN, INF, "1"):
        with pytest.raises(InvalidInputError, match="temperature must be a positive number"):
            function([1.0], temperature)
    with pytest.raises(InvalidInputError, match="log-weight at index 0 is nan"):
        function([1.0], 1.0, [NAN])


@given(rows(4), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_best_of_n_equals_enumeration(row, n):
    p, scores = row
    want = np.zeros(len(p))
    for draws in itertools.product(range(len(p)), repeat=n):
        want[max(draws, key=lambda i: scores[i])] += np.prod(p[list(draws)])  # max keeps the first of equals
    got = best_of_n_distribution(p, scores, n)
    assert got == pytest.approx(want, abs=1e-10)
    divergence = kl_divergence(got, p)
    assert -1e-9 <= divergence <= best_of_n_kl(n) + 1e-9


def test_best_of_n_of_many_equal_draws_reaches_its_bound():
    p, scores = np.full(4000, 1 / 4000), np.arange(4000.0)
    for n in (2, 8, 64):
        assert kl_divergence(best_of_n_distribution(p, scores, n), p) == pytest.approx(best_of_n_kl(n), abs=0.01)


@pytest.mark.parametrize(
    ("n", "kl"), [(1, 0), (2, 0.193147), (4, 0.636294), (16, 1.835089), (64, 3.174508), (256, 4.549084)]
)
def test_best_of_n_kl(n, kl):
    assert best_of_n_kl(n) == pytest.approx(kl, abs=1e-6)
    assert best_of_n_kl(np.array([n]))[0] == pytest.approx(kl, abs=1e-6)
    assert float(best_of_n_kl(torch.tensor(n))) == pytest.approx(kl, abs=1e-6)


def test_best_of_n_of_masks_tensors_and_tiny_probabilities():
    got = best_of_n_distribution(torch.tensor([0.2, 0.3, 0.5]), torch.tensor([1.0, 1.0, 2.0]), 2)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([0.1, 0.15, 0.75])
    padded = best_of_n_distribution([0.4, 0.6, 9.0], [1.0, 0.0, NAN], 3, [True, True, False])
    assert padded == pytest.approx([1 - 0.6**3, 0.6**3, 0])
    assert best_of_n_distribution([1e-15, 1 - 1e-15], [1.0, 0.0], 1000)[0] == pytest.approx(1e-12, rel=1e-6)
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scores = torch.tensor([1.0, 3.0, 3.0, 0.0, 2.0])
    assert torch.autograd.gradcheck(lambda l: best_of_n_distribution(torch.softmax(l, 0), scores, 4), (logits,))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-9, 9)), min_size=1, max_size=6), st.data(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_expected_best_equals_all_subsets(samples, data, replace):
    n = data.draw(st.integers(1, 4 if replace else len(samples)))
    subsets = itertools.product(samples, repeat=n) if replace else itertools.combinations(samples, n)
    scores, values = (np.array(column, dtype=float) for column in zip(*samples, strict=True))
    means, best = [], []
    for subset in subsets:
        top = max(score for score, _ in subset)
        best.append(top)
        # Equal scores are taken with equal chance; over all subsets that is the mean of the tied values of all samples.
        means.append(np.mean([value for score, value in samples if score == top]))
    assert expected_best_of_n(scores, n, values, replace=replace) == pytest.approx(np.mean(means))
    assert expected_best_of_n(scores, n, replace=replace) == pytest.approx(np.mean(best))


def test_expected_best_of_binary_rewards_is_pass_at_k():
    right = np.array([1.0] * 3 + [0.0] * 7)
    for k in (1, 2, 5, 8):
        assert expected_best_of_n(right, k) == pytest.approx(1 - math.comb(7, k) / math.comb(10, k))
        assert expected_best_of_n(right, k, replace=True) == pytest.approx(1 - 0.7**k)
    constant = np.zeros(10)
    assert expected_best_of_n(constant, 4, right) == pytest.approx(0.3)


def test_expected_best_of_rows_masks_and_several_n():
    scores = np.array([[1.0, 2.0, 3.0, NAN], [5.0, 5.0, 1.0, 0.0]])
    mask = np.array([[True, True, True, False], [True] * 4])
    got = expected_best_of_n(scores, [1, 2, 3], mask=mask)
    assert got == pytest.approx(np.array([[2, 8 / 3, 3], [2.75, (5 * 5 + 1) / 6, 5]]))
    assert expected_best_of_n(scores[:1], 2, mask=mask[:1], replace=True) == pytest.approx([22 / 9])
    many = np.random.default_rng(5).normal(size=5000)
    curve = expected_best_of_n(many, [2**k for k in range(12)])
    assert (np.diff(curve) > 0).all()
    assert curve[1] == pytest.approx(1 / math.sqrt(math.pi), abs=0.05)
    tensor = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
    expected_best_of_n(tensor, 2).backward()
    assert tensor.grad.tolist() == pytest.approx([2 / 3, 0, 1 / 3])


def test_expected_best_refuses_what_does_not_fit():
    for arguments, message in (
        (([[1.0, 2.0]], 3), "the number of samples at index 0 is 2, expected at least 3"),
        (([1.0, NAN], 1), "score at index 1 is nan"),
        (([1.0, 2.0], 1, [INF, 0.0]), "value at index 0 is inf"),
        (([1.0, 2.0], 0), "n must be a whole number of at least 1, got 0"),
        (([1.0, 2.0], [1, 1.5]), r"got 1\.5"),
        (([], 1), "at least one entry"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            expected_best_of_n(*arguments)
    with pytest.raises(InvalidInputError, match="the number of samples"):
        expected_best_of_n([1.0], 1, mask=[False], replace=True)
    for n in (0, 1.5, True, "2"):
        with pytest.raises(InvalidInputError, match="whole number"):
            best_of_n_distribution([1.0], [1.0], n)
    with pytest.raises(InvalidInputError, match="n at index 1 is 0"):
        best_of_n_kl([1, 0])
