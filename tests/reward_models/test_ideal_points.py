import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.reward_models.ideal_points import (
    IdealPointReward,
    IdealPointSpace,
    PointMap,
    bound_penalty,
    ideal_point,
    ideal_point_margin,
    utility,
)
from polyreward.reward_models.pair_losses import pair_loss

DISTANCES = ("l2", "sq_l2", "cosine")


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def by_hand(distance="l2", mixing="before"):
    """f is the identity, the prototypes are (0, 0) and (4, 0), the weights (0.25, 0.75)."""
    model = IdealPointReward("A", 2, 2, 2, distance, 0, False, mixing=mixing)
    with torch.no_grad():
        model.space.f.layers[0].weight.copy_(torch.eye(2))
        model.space.f.layers[0].bias.zero_()
        model.space.P.copy_(torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
    model.users.register(["u"])
    with torch.no_grad():
        model.users.logits[:] = torch.tensor([[0.0, math.log(3)]])
    return model


LEFT, RIGHT = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])


@pytest.mark.parametrize("mixing", ["before", "after", "latent"])
def test_the_ideal_point_and_margins_by_hand(mixing):
    model = by_hand(mixing=mixing)
    assert model.users.weights(["u"]).tolist()[0] == pytest.approx([0.25, 0.75])
    assert model.space.points(model.users.weights(["u"])).tolist()[0] == pytest.approx([3.0, 0.0])
    # distances 1 and 3; the paper's code has -2 where the left one is preferred
    margin = model.score(["u"], LEFT, RIGHT)
    assert margin.tolist() == pytest.approx([2.0])
    assert float(pair_loss(margin, "hinge")) == 0.0
    assert by_hand("sq_l2", mixing).score(["u"], LEFT, RIGHT).tolist() == pytest.approx([8.0])
    assert model.reward(torch.tensor([0.25, 0.75]), torch.cat([LEFT, RIGHT])).tolist() == pytest.approx([-1.0, -3.0])
    assert model.prototypes().tolist() == [[0.0, 0.0], [4.0, 0.0]]
    assert model.user_table()["u"] == pytest.approx([0.25, 0.75])


def test_cosines_by_hand():
    point = torch.tensor([1.0, 0.0], dtype=torch.float64)
    items = torch.tensor([[0.8, 0.6], [0.6, 0.8]], dtype=torch.float64)
    logits = utility(items, point, "cosine", 1 / 0.07)
    assert logits.tolist() == pytest.approx([11.4286, 8.5714], abs=1e-4)
    assert float(pair_loss(logits[0] - logits[1], "cross_entropy")) == pytest.approx(0.055844, abs=1e-6)
    space = IdealPointSpace("B", 2, 3)
    assert float(space.scale) == pytest.approx(1 / 0.07)
    with torch.no_grad():
        space.log_scale.fill_(10.0)
    assert float(space.scale) == 100.0


def plain_utility(item, point, distance, scale=1 / 0.07):
    squared = sum((x - a) ** 2 for x, a in zip(item, point, strict=True))
    if distance != "cosine":
        return -squared if distance == "sq_l2" else -math.sqrt(squared)
    dot = sum(x * a for x, a in zip(item, point, strict=True))
    return scale * dot / (math.hypot(*item) * math.hypot(*point))


vectors = st.lists(st.floats(-4, 4), min_size=3, max_size=3).filter(lambda v: math.hypot(*v) > 0.1)


@given(vectors, vectors, vectors, st.sampled_from(DISTANCES))
def test_margins_against_a_plain_reference(left, right, point, distance):
    found = ideal_point_margin(*(torch.tensor(v, dtype=torch.float64) for v in (left, right, point)), distance)
    expected = plain_utility(left, point, distance) - plain_utility(right, point, distance)
    assert float(found) == pytest.approx(expected, abs=2e-5)


@given(vectors, vectors, st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda w: sum(w) > 0.1))
def test_with_squared_distances_the_margin_of_a_mixture_is_the_mixture_of_the_margins(left, right, raw):
    left, right = torch.tensor(left, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    anchors = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor(raw, dtype=torch.float64) / sum(raw)
    point = ideal_point(weights, anchors)
    found = ideal_point_margin(left, right, point, "sq_l2")
    each = ideal_point_margin(left, right, anchors, "sq_l2")
    assert float(found) == pytest.approx(float(weights @ each), abs=1e-6)
    linear = 2 * point @ (left - right) + right @ right - left @ left
    assert float(found) == pytest.approx(float(linear), abs=1e-6)


def test_rotations_and_translations_leave_distances_and_scaling_leaves_cosines():
    draw = torch.Generator().manual_seed(0)
    left, right, point = torch.randn(3, 5, 4, dtype=torch.float64, generator=draw)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=draw))[0]
    shift = torch.randn(4, dtype=torch.float64, generator=draw)
    moved = [x @ turn + shift for x in (left, right, point)]
    for distance in ("l2", "sq_l2"):
        before = ideal_point_margin(left, right, point, distance)
        assert torch.allclose(before, ideal_point_margin(*moved, distance), atol=1e-9)
    before = ideal_point_margin(left, right, point, "cosine")
    assert torch.allclose(before, ideal_point_margin(3 * left, 0.5 * right, 7 * point, "cosine"), atol=1e-9)


@pytest.mark.parametrize("kind", ["A", "B"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_sides_prototypes_and_a_single_prototype(kind, distance):
    prompt = torch.randn(6, 5) if kind == "B" else None
    model = IdealPointReward(kind, 3, 4, 8, distance, d_prompt=5)
    model.users.register(range(6), spread=1.0)
    left, right = torch.randn(6, 4), torch.randn(6, 4)
    found = model.score(range(6), left, right, prompt)
    assert found.shape == (6,)
    assert torch.allclose(found, -model.score(range(6), right, left, prompt), atol=1e-6)
    order = torch.tensor([2, 0, 1])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.users.logits.copy_(model.users.logits[:, order])
        if kind == "A":
            other.space.P.copy_(model.space.P[order])
        else:
            other.space.g = torch.nn.ModuleList([model.space.g[k] for k in order.tolist()])
    assert torch.allclose(found, other.score(range(6), left, right, prompt), atol=1e-5)
    single = IdealPointReward(kind, 1, 4, 8, distance, d_prompt=5)
    single.users.register(["a", "b"], spread=3.0)
    pair = [None if x is None else x[:1] for x in (left, right, prompt)]
    assert torch.equal(single.score(["a"], *pair), single.score(["b"], *pair))


def test_the_score_is_the_difference_of_rewards():
    for kind, prompt in (("A", None), ("B", torch.randn(4, 3))):
        model = IdealPointReward(kind, 2, 3)
        model.users.register(["u"], spread=1.0)
        left, right = torch.randn(4, 3), torch.randn(4, 3)
        weights = model.users.weights(["u"])[0]
        difference = model.reward(weights, left, prompt) - model.reward(weights, right, prompt)
        assert torch.allclose(model.score(["u"] * 4, left, right, prompt), difference, atol=1e-5)


def test_shapes_and_defaults_are_the_papers():
    a, b = IdealPointReward("A", 3, 6).space, IdealPointReward("B", 3, 6, 4, d_prompt=5).space
    assert (a.distance, b.distance) == ("l2", "cosine")
    assert [type(part).__name__ for part in a.f.layers] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert [type(part).__name__ for part in b.f.layers] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert isinstance(a.f.around, torch.nn.Identity)
    assert b.f.around is None
    assert a.P.norm(dim=1).tolist() == pytest.approx([1.0] * 3)
    assert (a.log_scale, a.g, b.P) == (None, None, None)
    assert b.anchors(torch.zeros(2, 5)).shape == (2, 3, 4)
    assert IdealPointReward("A", 3, 6, 4, mixing="latent").space.P.shape == (3, 4)
    model = IdealPointReward("B", 2, 3)
    model.users.register(["u"])
    groups = model.parameter_groups()
    assert [group["lr"] for group in groups] == [1e-4, 0.1, 5e-3]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0, 0.0]
    assert [group["lr"] for group in IdealPointReward("A", 2, 3).parameter_groups()] == [1e-4, 5e-3, 5e-3]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    # the way around a map whose widths differ is linear
    assert PointMap(3, 2).around.weight.shape == (2, 3)


def test_gradients_at_the_ideal_point_and_at_zero_are_finite():
    point = torch.zeros(1, 3, requires_grad=True)
    item = torch.zeros(1, 3, requires_grad=True)
    for distance in DISTANCES:
        found = torch.autograd.grad(utility(item, point, distance).sum(), [item, point])
        assert all(torch.isfinite(part).all() for part in found)
    half = utility(torch.ones(2, 3, dtype=torch.float16), torch.zeros(3, dtype=torch.float16))
    assert half.dtype == torch.float32
    assert bound_penalty(torch.tensor([[5.0, 0.0], [1.0, 0.0]])).item() == pytest.approx(1.0)


@pytest.mark.parametrize("loss", ["hinge", "logistic"])
def test_gradients_reach_only_the_users_of_the_batch(loss):
    model = IdealPointReward("A", 2, 3)
    model.users.register(["a", "b", "c"], spread=1.0)
    margin = model.score(["a", "c"], torch.randn(2, 3), torch.randn(2, 3))
    pair_loss(margin, loss).backward()
    assert model.users.logits.grad.abs().sum(dim=1).bool().tolist() == [True, False, True]


@pytest.mark.parametrize(("distance", "loss"), [("l2", "hinge"), ("sq_l2", "logistic"), ("cosine", "cross_entropy")])
def test_training_brings_the_preferred_item_closer(distance, loss):
    model = IdealPointReward("A", 2, 3, distance=distance)
    model.users.register(["u"])
    left, right = torch.randn(1, 3), torch.randn(1, 3)
    weights = model.users.weights(["u"])[0].detach()
    worth = model.reward(weights, torch.cat([left, right]))
    if worth[0] > worth[1]:
        left, right = right, left
    optimizer = torch.optim.Adam(model.parameter_groups(map_rate=0.01, prototype_rate=0.05, scale_rate=0.01))
    for _ in range(40):
        optimizer.zero_grad()
        pair_loss(model.score(["u"], left, right), loss).backward()
        optimizer.step()
    assert model.score(["u"], left, right).item() > 0
    after = model.reward(model.users.weights(["u"])[0].detach(), left)
    assert float(after.detach()) > float(worth.min())


@pytest.mark.parametrize("kind", ["A", "B"])
def test_fit_new_leaves_every_other_tensor_as_it_is(kind):
    model = IdealPointReward(kind, 3, 4)
    model.users.register(["old"], spread=1.0)
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    comparisons = tuple(torch.randn(5, 4) for _ in range(3 if kind == "B" else 2))
    with pytest.raises(KeyError):
        model.score(["new"] * 5, *comparisons)
    first = model.users.margin(torch.full((5, 3), 1 / 3), comparisons).sum().item()
    model.fit_new(["new"] * 5, comparisons, lr=0.05, epochs=40)
    assert model.score(["new"] * 5, *comparisons).sum().item() > first
    after = model.state_dict()
    assert all(torch.equal(after[name][: len(value)] if "logits" in name else after[name], value)
               for name, value in before.items())  # fmt: skip
    assert all(parameter.grad is None for parameter in model.parameters())
    # a copy is whole: it fits in its own space
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.space.parameters():
            parameter.zero_()
    assert other.users.fit_new(["n"] * 5, comparisons, 0.05, 3).state["n"].abs().sum() > 0


def test_new_people_of_planted_kinds_are_told_apart():
    model = by_hand("sq_l2")
    items = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) * 2
    left, right = items[:20], items[20:]
    for k, point in enumerate(model.prototypes()):
        label = torch.where(ideal_point_margin(left, right, point) > 0, 1.0, -1.0)
        model.fit_new([k] * 20, (left, right), lr=0.1, epochs=100, label=label, loss="logistic")
    assert float(model.users.weights([0])[0, 0]) > 0.7
    assert float(model.users.weights([1])[0, 1]) > 0.7


def test_state_goes_through_a_file(tmp_path):
    model = IdealPointReward("B", 2, 3)
    model.users.register(["a", "b"], spread=1.0)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = IdealPointReward("B", 2, 3)
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    sides = torch.randn(3, 2, 3)
    assert torch.equal(again.score(["b", "a"], *sides), model.score(["b", "a"], *sides))


@settings(max_examples=20)
@given(st.permutations(range(5)))
def test_the_order_of_the_comparisons_does_not_matter(order):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = IdealPointReward("A", 2, 3)
        model.users.register(range(5), spread=1.0)
        left, right = torch.randn(2, 5, 3)
    found = model.score(range(5), left, right)
    again = model.score(order, left[list(order)], right[list(order)])
    assert torch.allclose(again, found[list(order)], atol=1e-5)


def test_nothing_to_score():
    model = IdealPointReward("A", 2, 3)
    assert model.score([], torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)
    assert model.reward(torch.tensor([0.5, 0.5]), torch.zeros(0, 3)).shape == (0,)


BROKEN = torch.tensor([[0.0, 0.0, 0.0], [0.0, math.nan, 0.0]])


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda m: m.score(["u"], torch.zeros(2, 3), torch.zeros(2, 3)), InvalidInputError, "1 users for 2"),
        (lambda m: m.score(["u"], torch.zeros(1, 3), torch.zeros(1, 2)), InvalidInputError, "expected the same"),
        (lambda m: m.score(["u"], torch.zeros(1, 2), torch.zeros(1, 2)), InvalidInputError, r"left must .*\(B, 3\)"),
        (lambda m: m.score(["u"] * 2, torch.zeros(2, 3), BROKEN), InvalidInputError, "right: .* row 1"),
        (lambda m: m.reward(torch.tensor([0.5, 0.6]), torch.zeros(1, 3)), InvalidInputError, "sum to 1"),
        (lambda m: IdealPointReward("C", 2, 3), UnknownNameError, "kind"),
        (lambda m: IdealPointReward("A", 2, 3, distance="l1"), UnknownNameError, "distance"),
        (lambda m: IdealPointReward("A", 2, 3, mixing="first"), UnknownNameError, "mixing"),
        (lambda m: IdealPointReward("A", 0, 3), InvalidInputError, "K must"),
        (lambda m: IdealPointReward("A", 2, 3, hidden_layers=-1), InvalidInputError, "hidden_layers"),
        (lambda m: IdealPointReward("A", 2, 3, activation="swish"), UnknownNameError, "swish"),
        (lambda m: IdealPointReward("B", 2, 3).space.anchors(), InvalidInputError, "needs their features .*none"),
        (lambda m: IdealPointReward("B", 2, 3).prototypes(torch.zeros(1, 2)), InvalidInputError, r"\(1, 2\)"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, told):
    model = IdealPointReward("A", 2, 3)
    model.users.register(["u"])
    with pytest.raises(error, match=told):
        call(model)
