import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.reward_models.user_prototypes import Histories, PrototypeRefiner, UserPrototypes, history_attention

EVENTS = torch.tanh(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).double())
A, Q = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()


def unit(rows, seed=0, width=3):
    E = np.random.default_rng(seed).normal(size=(rows, width))
    return E / np.linalg.norm(E, axis=1, keepdims=True)


def histories(rows, width=3, past=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    current = [torch.randn(rows, width, generator=g) for _ in range(3)]
    events = [torch.randn(rows, past, width, generator=g) for _ in range(3)]
    return Histories(*current, *events, torch.rand(rows, past, generator=g) < 0.7)


def test_the_worked_example():
    weights, summary = history_attention(EVENTS, A, Q, rho=0.5)
    assert weights.tolist() == pytest.approx([0.248603, 0.325421, 0.425976], abs=1e-6)
    assert summary.tolist() == pytest.approx([0.513755, 0.572260], abs=1e-6)
    refiner = PrototypeRefiner(A.unsqueeze(0)).double()
    with torch.no_grad():
        refiner.query.weight.copy_(torch.eye(2))
        refiner.summary.weight.copy_(torch.eye(2))
        refiner.history.weight.zero_()
        refiner.history.weight[:, :2] = torch.eye(2)
        refiner.history.bias.zero_()
    assert refiner.query.bias is None
    zero = torch.zeros(1, 3, 2).double()
    pre = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]).double()
    made = Histories(
        Q.unsqueeze(0), torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double(),
        pre, zero, zero, torch.ones(1, 3, dtype=torch.bool),
    )  # fmt: skip
    difference = refiner(made, torch.tensor([0]))
    assert float(difference.detach()) == pytest.approx(-0.058504, abs=1e-6)
    assert math.log1p(math.exp(-float(difference.detach()))) == pytest.approx(0.722827, abs=1e-6)


def test_the_released_form_weighs_the_query():
    weights, _ = history_attention(EVENTS, A, Q, rho=0.5, form="released")
    logits = [float(o @ A + 0.5 * (o @ Q)) / math.sqrt(2) for o in EVENTS]
    total = sum(map(math.exp, logits))
    assert weights.tolist() == pytest.approx([math.exp(value) / total for value in logits])
    assert PrototypeRefiner(A.unsqueeze(0).float(), form="released").query.bias is not None


@pytest.mark.parametrize("form", ["paper", "released"])
def test_one_event_is_that_event_and_none_is_zero(form):
    weights, summary = history_attention(EVENTS[:1], A, Q, form=form)
    assert weights.tolist() == [1]
    assert torch.equal(summary, EVENTS[0])
    for events, mask in ((EVENTS, torch.zeros(3, dtype=torch.bool)), (EVENTS[:0], None)):
        weights, summary = history_attention(events, A, Q, mask=mask, form=form)
        assert not weights.any()
        assert summary.tolist() == [0, 0]
    # z is then a + lambda_q W_q q
    refiner = PrototypeRefiner(A.unsqueeze(0).float(), lambda_q=2.0, form=form)
    data = histories(1, width=2)
    empty = Histories(*(getattr(data, n) for n in list(Histories.__dataclass_fields__)[:-1]), torch.zeros(1, 2).bool())
    bias = refiner.summary(torch.zeros(1, 2))
    z = A.float() + 2 * refiner.query(data.query) + bias
    expected = float((z * (data.chosen - data.rejected)).sum().detach())
    assert float(refiner(empty, torch.tensor([0])).detach()) == pytest.approx(expected, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(-2, 2))
def test_attention_equals_a_loop_over_members_and_events(seed, rho):
    g = torch.Generator().manual_seed(seed)
    events = torch.tanh(torch.randn(3, 4, 2, generator=g).double())
    a, q = torch.randn(3, 2, generator=g).double(), torch.randn(3, 2, generator=g).double()
    mask = torch.rand(3, 4, generator=g) < 0.6
    weights, summary = history_attention(events, a, q, rho, mask)
    for row in range(3):
        kept = [t for t in range(4) if mask[row, t]]
        logits = [float(events[row, t] @ q[row] + rho * (events[row, t] @ a[row])) / math.sqrt(2) for t in kept]
        total = sum(map(math.exp, logits))
        expected = torch.zeros(2).double()
        for t, logit in zip(kept, logits, strict=True):
            assert float(weights[row, t]) == pytest.approx(math.exp(logit) / total)
            expected += math.exp(logit) / total * events[row, t]
        assert torch.allclose(summary[row], expected)
        assert float(weights[row].sum()) == pytest.approx(1.0 if kept else 0.0)


def test_clusters_and_their_members():
    centres = np.eye(3)
    E = np.concatenate([c + 0.05 * unit(10, i) for i, c in enumerate(centres)])
    made = UserPrototypes(3, refine=False).fit(E)
    assert np.allclose(np.linalg.norm(made.prototypes, axis=1), 1, atol=1e-6)
    codes = made.assign(centres)
    assert len(set(codes)) == 3
    for code, rows in zip(codes, np.arange(30).reshape(3, 10), strict=True):
        assert made.members(code).tolist() == rows.tolist()
    assert (made.assign(E) == made.assignments).all()
    again = UserPrototypes(3, refine=False).fit(E)
    assert np.array_equal(again.prototypes, made.prototypes)


def test_one_prototype_means_the_most_similar_of_all():
    E, q = unit(20), unit(4, 1)
    made = UserPrototypes(1, refine=False).fit(E)
    indices, similar = made.neighbours(q, 5)
    for row in range(4):
        order = sorted(range(20), key=lambda i: -float(E[i] @ q[row]))[:5]
        assert indices[row].tolist() == order
        assert similar[row].tolist() == pytest.approx([float(E[i] @ q[row]) for i in order], abs=1e-6)
    # cosines, so the length of a vector does not matter
    assert np.array_equal(made.neighbours(7 * q, 5)[0], indices)


def test_a_small_prototype_gives_all_its_members():
    E = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [0.2, 0.9]], float)
    made = UserPrototypes(2, refine=False).fit(E)
    indices, similar = made.neighbours([[1, 0], [0, 1]], 9)
    assert indices.shape == (2, 3)
    assert indices[0].tolist() == [0, 1, -1]
    assert np.isnan(similar[0, 2])
    assert sorted(indices[1]) == [2, 3, 4]


def test_a_user_is_no_neighbour_of_their_own():
    E = unit(12)
    users = [f"u{i % 4}" for i in range(12)]
    made = UserPrototypes(1, refine=False).fit(E, users=users)
    indices, _ = made.neighbours(E[:2], 12, users=["u0", "new"])
    assert indices.shape == (2, 12)
    assert not {users[i] for i in indices[0] if i >= 0} & {"u0"}
    assert (indices[0] >= 0).sum() == 9
    assert indices[1, 0] == 1
    with pytest.raises(InvalidInputError, match="fitted without users"):
        UserPrototypes(1, refine=False).fit(E).neighbours(E[:1], 1, users=["u0"])
    with pytest.raises(InvalidInputError, match="1 users for 2 queries"):
        made.neighbours(E[:2], 1, users=["u0"])


@pytest.mark.parametrize("form", ["paper", "released"])
def test_refinement_learns_from_choices_and_keeps_unit_rows(form):
    rng = np.random.default_rng(0)
    tastes = np.eye(4)[:2]
    kind = np.arange(200) % 2
    E = tastes[kind] + 0.3 * rng.normal(size=(200, 4))
    chosen = tastes[kind] + 0.3 * rng.normal(size=(200, 4))
    rejected = tastes[1 - kind] + 0.3 * rng.normal(size=(200, 4))
    records = [
        (
            rng.normal(size=4),
            chosen[i],
            rejected[i],
            [(rng.normal(size=4), chosen[j], rejected[j]) for j in (i - 2, i - 4)],
        )
        for i in range(200)
    ]
    data = Histories.of(records)
    made = UserPrototypes(2, form=form, epochs=3, learning_rate=3e-2).fit(E, data)
    assert made.history[-1] < made.history[0]
    assert np.allclose(np.linalg.norm(made.prototypes, axis=1), 1, atol=1e-5)
    assert np.array_equal(made.assignments, made.assign(E))
    plain = UserPrototypes(2, refine=False).fit(E)
    assert not np.allclose(made.prototypes, plain.prototypes, atol=1e-3)
    difference = made.refiner(data, torch.from_numpy(made.assignments))
    assert float((difference > 0).float().mean()) > 0.9
    again = UserPrototypes(2, form=form, epochs=3, learning_rate=3e-2).fit(E, data)
    assert np.array_equal(again.prototypes, made.prototypes)


def test_the_penalties_hold_prototypes_where_they_were():
    E, data = unit(60), histories(60)
    start = UserPrototypes(3, refine=False).fit(E).prototypes
    moved = [
        np.abs(
            UserPrototypes(3, lambda_cent=weight, epochs=4, learning_rate=3e-2).fit(E, data).prototypes - start
        ).mean()
        for weight in (0.0, 1.0)
    ]
    assert moved[1] < 0.5 * moved[0]
    # the released form has the penalties and does not use them
    free, held = (
        UserPrototypes(3, form="released", lambda_cent=weight, epochs=2).fit(E, data).prototypes
        for weight in (0.0, 9.0)
    )
    assert np.array_equal(free, held)


def test_records_become_padded_tensors():
    v = [np.full(2, float(i)) for i in range(9)]
    made = Histories.of([(v[0], v[1], v[2], []), (v[3], v[4], v[5], [(v[6], v[7], v[8])])])
    assert made.mask.tolist() == [[False], [True]]
    assert made.past_rejected[1, 0].tolist() == [8, 8]
    assert made.query[1].tolist() == [3, 3]
    assert len(made.take(torch.tensor([1]))) == 1


def test_wrong_calls():
    E = unit(5)
    with pytest.raises(ValueError, match="k is 6 and there are 5 embeddings"):
        UserPrototypes(6, refine=False).fit(E)
    with pytest.raises(InvalidInputError, match="needs histories"):
        UserPrototypes(2).fit(E)
    with pytest.raises(InvalidInputError, match="4 users for 5"):
        UserPrototypes(2, refine=False).fit(E, users=list("abcd"))
    with pytest.raises(InvalidInputError, match="histories of shape"):
        UserPrototypes(2).fit(E, histories(4))
    with pytest.raises(InvalidInputError, match="E must be finite"):
        UserPrototypes(2, refine=False).fit(np.full((3, 2), np.nan))
    with pytest.raises(InvalidInputError, match="E: row 1 is all 0"):
        UserPrototypes(1, refine=False).fit([[1.0, 0.0], [0.0, 0.0]])
    with pytest.raises(InvalidInputError, match="not been fitted"):
        UserPrototypes(2).assign(E)
    made = UserPrototypes(2, refine=False).fit(E)
    with pytest.raises(InvalidInputError, match="width 2, the prototypes 3"):
        made.assign([[1.0, 0.0]])
    with pytest.raises(InvalidInputError, match="n must be at least 1"):
        made.neighbours(E, 0)
    with pytest.raises(InvalidInputError, match="k must be"):
        UserPrototypes(0)
    with pytest.raises(UnknownNameError, match="did you mean 'paper'"):
        UserPrototypes(2, form="papers")
    data = histories(3)
    with pytest.raises(InvalidInputError, match="chosen has shape"):
        Histories(data.query, data.chosen[:2], *(getattr(data, n) for n in list(Histories.__dataclass_fields__)[2:]))
    with pytest.raises(InvalidInputError, match="past_query has shape"):
        Histories(*(getattr(data, n) for n in list(Histories.__dataclass_fields__)[:-1]), torch.zeros(3, 5).bool())
    with pytest.raises(InvalidInputError, match="at least one record"):
        Histories.of([])


def test_choices_that_are_no_numbers():
    v = np.ones(2)
    with pytest.raises(InvalidInputError, match="chosen of row 1 is not finite"):
        Histories.of([(v, v, v, []), (v, v * np.nan, v, [])])
    with pytest.raises(InvalidInputError, match="past_query of row 0 is not finite"):
        Histories.of([(v, v, v, [(v * np.inf, v, v)])])
    with pytest.raises(InvalidInputError, match="record 1 must all have width 2"):
        Histories.of([(v, v, v, []), (v, v, v, [(v, v, np.ones(3))])])


@pytest.mark.parametrize(
    "changes",
    [{"rho": math.nan}, {"lambda_q": math.inf}, {"lambda_cent": -1.0}, {"learning_rate": 0.0}, {"decay": 2.0}],
)
def test_settings_out_of_range(changes):
    with pytest.raises(InvalidInputError, match=next(iter(changes))):
        UserPrototypes(2, **changes)


def test_narrow_types_are_kept_and_summed_in_wide_ones():
    weights, summary = history_attention(EVENTS.bfloat16(), A.bfloat16(), Q.bfloat16())
    assert weights.dtype == summary.dtype == torch.bfloat16
    exact, _ = history_attention(EVENTS.bfloat16().double(), A, Q)
    assert torch.equal(weights, exact.bfloat16())
