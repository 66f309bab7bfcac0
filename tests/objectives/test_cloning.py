import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.objectives.cloning import BehaviourCloning, NoEvidenceWarning
from polyreward.tasks.planted_subsequence import HETEROGENEOUS, PlantedSubsequence


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.booleans()), min_size=4, max_size=4),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(["token-mean", "sequence-mean"]),
    st.sampled_from([0.0, 1.0, 2.5]),
)
@settings(deadline=None)
def test_table_equals_plain_counting(traces, aggregation, pseudo):
    rows = np.array(traces)
    states, actions, mask = rows[..., 0], rows[..., 1], rows[..., 2].astype(bool)
    if not mask.any():
        return
    tokens, full = mask.sum(), mask.any(axis=1).sum()
    counts = [[0.0] * 4 for _ in range(3)]
    for trace in traces:
        length = sum(kept for _, _, kept in trace)
        for state, action, kept in trace:
            if kept:
                counts[state][action] += 1 if aggregation == "token-mean" else tokens / full / length
    want = []
    for row in counts:
        total = sum(row) + pseudo
        want.append([(count + pseudo / 4) / total if total else 0.25 for count in row])
    part = BehaviourCloning(aggregation, pseudo)
    assert part.fit(states, actions, 3, 4, mask) == pytest.approx(np.array(want))
    tensor = part.fit(torch.from_numpy(states), torch.from_numpy(actions), 3, 4, torch.from_numpy(mask))
    assert tensor.dtype == torch.float64
    assert tensor.numpy() == pytest.approx(np.array(want))


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_the_table_minimises_the_loss(aggregation):
    rng = np.random.default_rng(0)
    states, actions = torch.from_numpy(rng.integers(2, size=(8, 5))), torch.from_numpy(rng.integers(3, size=(8, 5)))
    mask = torch.from_numpy(np.arange(5) < rng.integers(1, 6, size=(8, 1)))
    part = BehaviourCloning(aggregation, 0.0)
    table = part.fit(states, actions, 2, 3, mask)
    logits = table.log().clone().requires_grad_(True)
    loss = part(torch.log_softmax(logits, -1)[states, actions], mask=mask).loss
    loss.backward()
    assert logits.grad.abs().max() < 1e-6
    for _ in range(20):
        other = torch.log_softmax(table.log() + 0.1 * torch.from_numpy(rng.normal(size=(2, 3))), -1)
        assert part(other[states, actions], mask=mask).loss > loss


def test_loss_of_a_worked_example():
    logp = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, float("nan"), -float("inf")]], requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    result = BehaviourCloning()(logp, mask=mask)
    assert result.loss.item() == pytest.approx(2.5)
    assert float(result.metrics["policy_loss"]) == pytest.approx(2.5)
    result.loss.backward()
    assert logp.grad.tolist() == [[-0.25] * 3, [-0.25, 0, 0]]
    assert BehaviourCloning("sequence-mean")(logp, mask=mask).loss.item() == pytest.approx(3)
    assert BehaviourCloning()(logp, mask=mask, normaliser=8).loss.item() == pytest.approx(1.25)
    assert BehaviourCloning()(logp.detach().half().nan_to_num(), mask=mask).loss.dtype == torch.float32
    assert float(BehaviourCloning()(torch.zeros(0, 3)).loss) == 0


def test_rewards_take_no_part():
    logp, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])
    part = BehaviourCloning()
    assert part(logp, logp * 3, torch.tensor([5.0]), mask).loss == part(logp, logp, torch.tensor([-5.0]), mask).loss


def test_many_traces_tend_to_the_time_weighted_style():
    task = PlantedSubsequence(np.array([1, 2]), 4)
    rng = np.random.default_rng(1)
    styles = (0.1, 0.6)
    traces = task.sample(task.base_policy(styles), 20_000, 24, rng)
    table = BehaviourCloning().fit(traces.needed, traces.tokens, 2, 4, traces.until_solved & (traces.progress == 0))
    kept = traces.until_solved & (traces.progress == 0) & (traces.needed == 0)
    times = [kept[traces.styles == style].sum() for style in (0, 1)]
    gold = [(traces.tokens == 1)[kept & (traces.styles == style)[:, None]].mean() for style in (0, 1)]
    assert table[0, 1] == pytest.approx(np.average(gold, weights=times), abs=1e-3)
    assert times[0] > 1.5 * times[1]  # the slow style has more tokens
    assert table[0, 1] < np.mean(gold) - 0.03
    even = BehaviourCloning("sequence-mean").fit(
        traces.needed, traces.tokens, 2, 4, traces.until_solved & (traces.progress == 0)
    )
    assert even[0, 1] > table[0, 1] + 0.05


def test_the_clone_of_a_deterministic_base_is_the_base():
    task = PlantedSubsequence(np.array([0, 2, 3]), 4)
    base = task.base_policy(1.0)[0]
    traces = task.sample(base[None], 200, 6, np.random.default_rng(0))
    assert traces.returns.std() == 0
    states = traces.progress * 3 + traces.needed
    table = BehaviourCloning(pseudo_count=0).fit(states, traces.tokens, 6, 4, traces.until_solved)
    assert table.reshape(2, 3, 4) == pytest.approx(base)


def test_relabelling_the_rewards_leaves_the_clone_as_it_is():
    task = PlantedSubsequence.draw(np.random.default_rng(2))
    traces = task.sample(task.base_policy(HETEROGENEOUS), 64, 64, np.random.default_rng(3))
    arguments = (traces.needed, traces.tokens, 20, 20, traces.until_solved)
    one = BehaviourCloning().fit(*arguments)
    assert (one == BehaviourCloning().fit(*arguments)).all()  # no argument holds a reward
    order = np.random.default_rng(4).permutation(64)
    assert BehaviourCloning().fit(*(a[order] if isinstance(a, np.ndarray) else a for a in arguments)) == pytest.approx(
        one
    )


def test_nothing_to_copy_is_the_base_and_says_so():
    base = np.array([[0.9, 0.1], [0.3, 0.7]])
    for states in (np.zeros((0, 4), dtype=int), np.zeros((3, 4), dtype=int)):
        with pytest.warns(NoEvidenceWarning, match="nothing to copy"):
            got = BehaviourCloning().fit(states, states, 2, 2, np.zeros(states.shape, dtype=bool), base)
        assert got.tolist() == base.tolist()
        with pytest.warns(NoEvidenceWarning):
            assert BehaviourCloning().fit(states, states, 2, 2, states > 0).tolist() == [[0.5, 0.5]] * 2
    with pytest.warns(NoEvidenceWarning), pytest.raises(InvalidInputError, match=r"base has shape \(1, 2\)"):
        BehaviourCloning().fit(np.zeros(0, dtype=int), np.zeros(0, dtype=int), 2, 2, base=base[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert BehaviourCloning(pseudo_count=0).fit([0, 0, 0], [0, 1, 1], 2, 2).tolist() == [
            pytest.approx([1 / 3, 2 / 3]),
            [0.5, 0.5],
        ]


def test_bad_input_is_named():
    part, ids = BehaviourCloning(), np.zeros((2, 3), dtype=int)
    with pytest.raises(InvalidInputError, match=r"states\[1, 2\] is 7, expected 0\.\.4"):
        part.fit(np.array([[0, 1, 2], [0, 0, 7]]), ids, 5, 2)
    with pytest.raises(InvalidInputError, match=r"actions\[0, 0\] is -1, expected 0\.\.1"):
        part.fit(ids, ids - 1, 5, 2)
    with pytest.raises(InvalidInputError, match="states must be whole numbers"):
        part.fit(ids + 0.5, ids, 5, 2)
    with pytest.raises(InvalidInputError, match=r"shapes \(2, 3\), \(3,\)"):
        part.fit(ids, ids[0], 5, 2)
    with pytest.raises(InvalidInputError, match=r"logp must have shape"):
        part(torch.zeros(3))
    with pytest.raises(InvalidInputError, match=r"mask has shape \(1, 3\)"):
        part(torch.zeros(2, 3), mask=torch.ones(1, 3))
    with pytest.raises(UnknownNameError, match="did you mean 'token-mean'"):
        BehaviourCloning("token_mean")
    for pseudo in (-1, float("nan"), float("inf")):
        with pytest.raises(InvalidInputError, match="pseudo_count"):
            BehaviourCloning(pseudo_count=pseudo)
