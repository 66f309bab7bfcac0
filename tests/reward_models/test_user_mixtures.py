import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, PolyrewardError, UnknownNameError
from polyreward.reward_models.user_mixtures import UserMixture, check_weights, fit_logits, mixture_weights


def mixture(K=3, users=("ann", "bob"), **options):
    made = UserMixture(K, **options)
    return made.register(users, spread=1.0, generator=torch.Generator().manual_seed(0))


def test_weights_by_hand():
    users = UserMixture(2).register(["u"])
    with torch.no_grad():
        users.logits[:] = torch.tensor([[0.0, math.log(3)]])
    assert users.weights(["u"]).tolist()[0] == pytest.approx([0.25, 0.75])
    warm = UserMixture(2, temperature=0.5).register(["u"])
    warm.load_state_dict(users.state_dict())
    assert warm.weights(["u"]).tolist()[0] == pytest.approx([0.1, 0.9])
    assert users.table()["u"] == pytest.approx([0.25, 0.75])
    assert users.state["u"].tolist() == pytest.approx([0.0, math.log(3)])


@given(st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=1, max_size=5), st.floats(0.1, 4))
def test_weights_are_a_softmax(logits, temperature):
    found = mixture_weights(torch.tensor(logits, dtype=torch.float64), temperature)
    for row, weights in zip(logits, found.tolist(), strict=True):
        top = [math.exp(value / temperature) for value in row]
        assert weights == pytest.approx([value / sum(top) for value in top])
    hard = mixture_weights(torch.tensor(logits, dtype=torch.float64), temperature, hard=True)
    assert hard.sum(dim=1).tolist() == [1.0] * len(logits)
    assert set(hard.flatten().tolist()) <= {0.0, 1.0}


def test_a_partition_is_soft_in_training_and_one_hot_afterwards():
    users = mixture(mode="partition")
    soft = users.weights(["ann"]).detach()
    assert float(soft.min()) > 0
    assert users.eval().weights(["ann"]).tolist()[0] == pytest.approx(
        torch.nn.functional.one_hot(soft[0].argmax(), 3).tolist()
    )
    assert UserMixture(3, mode="partition").register(["new"]).eval().weights(["new"]).tolist() == [[1.0, 0.0, 0.0]]


def test_someone_unknown_is_a_key_error_that_says_what_to_do():
    users = mixture()
    with pytest.raises(KeyError, match=r"unknown user 'eve' of 2; register\(\['eve'\]\).*weights") as caught:
        users.weights(["ann", "eve"])
    assert isinstance(caught.value, PolyrewardError)
    assert not str(caught.value).startswith("'")


def test_registering_keeps_who_is_there():
    users = mixture()
    before = users.weights(["ann", "bob"]).detach().clone()
    users.register(["bob", "new", "new"])
    assert users.ids == ("ann", "bob", "new")
    assert torch.equal(users.weights(["ann", "bob"]), before)
    # someone without comparisons has equal weights
    assert users.weights(["new"]).tolist()[0] == pytest.approx([1 / 3] * 3)
    assert users.register(torch.tensor([4, 5])).weights([4]).shape == (1, 3)
    first = UserMixture(3).register(["a"], 1.0, torch.Generator().manual_seed(1))
    again = UserMixture(3).register(["a"], 1.0, torch.Generator().manual_seed(1))
    assert torch.equal(first.logits, again.logits)
    assert users.weights([]).shape == (0, 3)


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: UserMixture(0), InvalidInputError, "K must be at least 1"),
        (lambda: UserMixture(2, temperature=0.0), InvalidInputError, "temperature"),
        (lambda: UserMixture(2, mode="soft"), UnknownNameError, "mixture"),
        (lambda: UserMixture(2).register("ann"), InvalidInputError, "pass \\['ann'\\]"),
        (lambda: UserMixture(2).fit_new(["a"], torch.ones(1, 3)), InvalidInputError, r"\(1, 2\) under each prototype"),
        (lambda: UserMixture(2).fit_new(["a"], torch.full((1, 2), math.nan)), InvalidInputError, "NaN"),
        (
            lambda: UserMixture(2).fit_new(["a"], torch.ones(1, 2), label=torch.tensor([0.5])),
            InvalidInputError,
            "label",
        ),
        (lambda: UserMixture(2).fit_new(["a"], torch.ones(1, 2), lr=0.0), InvalidInputError, "lr"),
        (lambda: check_weights(torch.tensor([0.5, 0.6]), 2), InvalidInputError, "sum to 1"),
        (lambda: check_weights(torch.tensor([1.5, -0.5]), 2), InvalidInputError, "at least 0"),
        (lambda: check_weights(torch.tensor([1.0]), 2), InvalidInputError, "2 prototypes"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, told):
    with pytest.raises(error, match=told):
        call()


def test_weights_of_ones_own_may_be_off_by_rounding():
    third = torch.full((3,), 0.33333)
    assert torch.equal(check_weights(third, 3), third)


def reference_fit(margins, lr, epochs, decay=0.01, temperature=1.0):
    """AdamW by hand on the mean logistic loss of one person, margins (n, K) as lists."""
    count = len(margins[0])
    logits, first, second = [0.0] * count, [0.0] * count, [0.0] * count
    for step in range(1, epochs + 1):
        top = [math.exp(value / temperature) for value in logits]
        weights = [value / sum(top) for value in top]
        slope = [0.0] * count
        for row in margins:
            ahead = sum(w * m for w, m in zip(weights, row, strict=True))
            pull = -1 / (1 + math.exp(ahead)) / len(margins)
            for k in range(count):
                slope[k] += pull * weights[k] * (row[k] - ahead) / temperature
        for k in range(count):
            logits[k] *= 1 - lr * decay
            first[k] = 0.9 * first[k] + 0.1 * slope[k]
            second[k] = 0.999 * second[k] + 0.001 * slope[k] ** 2
            size = math.sqrt(second[k] / (1 - 0.999**step)) + 1e-8
            logits[k] -= lr * first[k] / (1 - 0.9**step) / size
    return logits


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.floats(-3, 3), min_size=2, max_size=2), min_size=1, max_size=4), st.floats(0.5, 2))
def test_fit_new_is_adamw_on_the_persons_own_comparisons(margins, temperature):
    users = UserMixture(2, temperature).double()
    table = torch.tensor(margins, dtype=torch.float64)
    users.fit_new(["u"] * len(margins), table, lr=0.05, epochs=7)
    expected = reference_fit(margins, 0.05, 7, temperature=temperature)
    assert users.state["u"].tolist() == pytest.approx(expected, abs=1e-6)


def test_fit_new_finds_the_prototype_and_labels_turn_it_round():
    margins = torch.tensor([[2.0, -2.0], [1.0, -1.0], [3.0, -3.0]])
    users = UserMixture(2).fit_new(["left"] * 3, margins, lr=0.1, epochs=100)
    users.fit_new(["right"] * 3, margins, lr=0.1, epochs=100, label=-torch.ones(3))
    users.fit_new(["right too"] * 3, margins, lr=0.1, epochs=100, label=torch.zeros(3, dtype=torch.bool))
    assert float(users.weights(["left"])[0, 0]) > 0.95
    assert float(users.weights(["right"])[0, 1]) > 0.95
    assert torch.equal(users.state["right"], users.state["right too"])


def test_nobody_depends_on_who_is_fitted_beside_them_or_was_there():
    users = mixture(2)
    before = {name: value.clone() for name, value in users.state.items()}
    margins = torch.tensor([[1.0, -1.0], [-2.0, 1.0], [0.5, 0.0], [3.0, 1.0]])
    together = copy.deepcopy(users).fit_new(["x", "y", "x", "y"], margins, lr=0.05, epochs=30, users=["z"])
    alone = copy.deepcopy(users).fit_new(["y", "y"], margins[[1, 3]], lr=0.05, epochs=30)
    assert torch.equal(together.state["y"], alone.state["y"])
    assert all(torch.equal(together.state[name], before[name]) for name in before)
    # someone without a comparison keeps equal weights; someone fitted again begins anew
    assert together.state["z"].tolist() == [0.0, 0.0]
    again = copy.deepcopy(together).fit_new(["y", "y"], margins[[1, 3]], lr=0.05, epochs=30)
    assert torch.equal(again.state["y"], together.state["y"])
    assert together.fit_new([], torch.zeros(0, 2), users=["w"]).state["w"].tolist() == [0.0, 0.0]


def test_fit_logits_leaves_gradients_and_generators_alone():
    shared = torch.nn.Parameter(torch.tensor([[1.0, -1.0]]))
    state = torch.get_rng_state()
    found = fit_logits(torch.zeros(1, 2), lambda weights: -(weights * shared).sum(), lr=0.1, epochs=5)
    assert shared.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert found[0, 0] > found[0, 1]
    assert not found.requires_grad
    with torch.no_grad():  # also where the caller asks for no gradients
        assert torch.equal(found, fit_logits(torch.zeros(1, 2), lambda w: -(w * shared).sum(), lr=0.1, epochs=5))


def test_state_with_ids_goes_through_a_file(tmp_path):
    users = mixture(3, ("ann", 7))
    torch.save(users.state_dict(), tmp_path / "users.pt")
    again = UserMixture(3)
    again.load_state_dict(torch.load(tmp_path / "users.pt", weights_only=True))
    assert again.ids == ("ann", 7)
    assert torch.equal(again.weights([7, "ann"]), users.weights([7, "ann"]))
    with pytest.raises(RuntimeError, match="size mismatch"):
        UserMixture(2).load_state_dict(users.state_dict())
