import copy
import math
from functools import partial

import numpy as np
import pytest
import torch

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.preferences import TIE, PreferenceData
from polyreward.reward_models.encoders import Features
from polyreward.reward_models.ensembles import RewardEnsemble
from polyreward.reward_models.heads import Items, LinearHead
from polyreward.reward_models.ideal_point_heads import IdealPointHead, fit_new_users
from polyreward.reward_models.ideal_points import IdealPointReward
from polyreward.reward_models.likelihoods import BradleyTerry
from polyreward.reward_models.model import PreferenceModel, UnknownAnnotatorWarning
from polyreward.reward_models.pair_losses import PairLoss, user_balanced_weights


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


FAST = {"map_rate": 3e-3, "prototype_rate": 3e-2, "user_rate": 3e-2, "scale_rate": 1e-2}
OPTIONS = {"epochs": 25, "batch_size": 100, "validation": None}
NEAR = partial(IdealPointHead, components=2, distance="sq_l2", **FAST)


def divided(pairs=600, users=20, seed=0, first=0, kind_b=False):
    """People of two kinds with opposed ideal points; of kind B, a prompt turns the points round."""
    rng = np.random.default_rng(seed)
    features = np.random.default_rng(99).normal(size=(400, 4)).astype(np.float32)
    prompts = np.eye(3, dtype=np.float32)[:2] * 2
    point = np.array([1.5, -1.0, 0.5, 0.0])
    user, asked = rng.integers(users, size=pairs), rng.integers(2, size=pairs)
    left, right = rng.integers(200, size=pairs), 200 + rng.integers(200, size=pairs)
    sign = np.where(user % 2 == 0, 1, -1) * (np.where(asked == 0, 1, -1) if kind_b else 1)
    near, far = (((features[rows] - sign[:, None] * point) ** 2).sum(axis=1) for rows in (left, right))
    data = PreferenceData(
        asked,
        np.stack([left, right], axis=1).reshape(-1),
        choice=(near > far).astype(int),
        annotators=[f"u{first + u}" for u in user],
        source="divided",
    )
    return data, Features(features, prompts, name="divided")


@pytest.fixture(scope="module")
def near():
    data, encoder = divided()
    return PreferenceModel(encoder, NEAR, PairLoss("logistic")).fit(data, **OPTIONS), data


def test_kinds_of_people_are_found(near):
    model, _ = near
    test, encoder = divided(seed=5)
    single = PreferenceModel(encoder, LinearHead).fit(test, **OPTIONS)
    assert model.evaluate(test)["accuracy"] > 0.9 > 0.65 > single.evaluate(test)["accuracy"]
    weights = model.head.weights(torch.arange(20)).detach()
    kinds = np.array([int(name[1:]) % 2 for name in model.annotators])
    likes = weights.argmax(dim=1).numpy()
    assert max((likes == kinds).mean(), (likes != kinds).mean()) > 0.9


def test_ideal_points_of_the_prompt_are_found():
    data, encoder = divided(900, kind_b=True)
    test, _ = divided(400, seed=5, kind_b=True)
    head = partial(IdealPointHead, kind="B", components=2, latent=8, prompt_width=3, distance="sq_l2", **FAST)
    model = PreferenceModel(encoder, head, PairLoss("cross_entropy")).fit(data, **{**OPTIONS, "epochs": 40})
    fixed = PreferenceModel(encoder, NEAR, PairLoss("cross_entropy")).fit(data, **OPTIONS)
    assert model.head.uses_prompt
    assert model.evaluate(test)["accuracy"] > 0.85 > 0.75 > fixed.evaluate(test)["accuracy"]
    new, _ = divided(60, users=4, first=100, kind_b=True)
    fit_new_users(model, new)
    other, _ = divided(200, users=4, first=100, seed=8, kind_b=True)
    assert model.evaluate(other)["accuracy"] > 0.8


@pytest.mark.parametrize("kind", ["A", "B"])
@pytest.mark.parametrize("distance", ["l2", "sq_l2", "cosine"])
def test_the_head_is_the_component(kind, distance):
    head = IdealPointHead(4, 3, 5, kind, distance, prompt_width=2, annotators=2, population=2)
    reward = IdealPointReward(kind, 3, 4, 5, distance, d_prompt=2)
    reward.users.register([0, 1])
    with torch.no_grad():
        head.logits.normal_()
        reward.space.load_state_dict(head.space.state_dict())
        reward.users.logits.copy_(head.logits)
    left, right, prompt = torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 2)
    flat = torch.stack([left, right], dim=1).flatten(0, 1)
    users = torch.tensor([0, 1, 1, 0, 0, 1])
    twice = torch.arange(6).repeat_interleave(2)
    scores = head(Items(flat, users[twice], twice, prompt[twice])).view(6, 2)
    expected = reward.score(users, left, right, prompt)
    assert torch.allclose(scores[:, 0] - scores[:, 1], expected, atol=1e-4)
    # alone, as in `score`, every response is a comparison of its own
    alone = head(Items(flat, users[twice], torch.arange(12), prompt[twice]))
    assert torch.allclose(alone, scores.flatten(), atol=1e-5)


def test_someone_unknown_has_the_populations_score(near):
    model, data = near
    prompts, rows = np.zeros(3, int), np.arange(3)
    population = model.score(prompts, rows)
    with pytest.warns(UnknownAnnotatorWarning, match="eve"):
        assert torch.equal(model.score(prompts, rows, annotator="eve"), population)
    mean = torch.softmax(model.head.logits, dim=1).mean(dim=0)
    points = model.head.space.points(mean[None])
    found = model.head.space.utility(model.head.space.f(torch.from_numpy(model.encoder.responses[:3])), points)
    assert torch.allclose(population, found, atol=1e-5)
    # comparisons of people unknown are learned at the mean
    mixed = PreferenceData(
        data.prompts, data.responses, choice=data.choice, annotators=[None, *data.annotators[1:]], source="divided"
    )
    assert (
        PreferenceModel(model.encoder, NEAR).fit(mixed, epochs=1, validation=None).score(prompts, rows).isfinite().all()
    )


def test_new_people_are_told_apart_and_nothing_else_changes(near):
    model = copy.deepcopy(near[0])
    new, _ = divided(80, users=6, seed=3, first=100)
    test, _ = divided(300, users=6, seed=4, first=100)
    before = {name: value.clone() for name, value in model.head.state_dict().items()}
    prompts, rows = np.zeros(5, int), np.arange(5)
    known, population = model.score(prompts, rows, annotator="u3"), model.score(prompts, rows)
    unseen = model.evaluate(test)["accuracy"]
    state = torch.get_rng_state()
    assert fit_new_users(model, new) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert model.evaluate(test)["accuracy"] > 0.88 > 0.7 > unseen
    assert model.annotators[-6:] == tuple(new.annotator_names)
    assert model.knows(["u100", "u3", "eve"]).tolist() == [True, True, False]
    after = model.head.state_dict()
    assert set(after) == set(before)
    for name, value in before.items():
        assert torch.equal(after[name][: len(value)] if name == "logits" else after[name], value)
    assert all(parameter.grad is None for parameter in model.head.parameters())
    assert torch.equal(model.score(prompts, rows, annotator="u3"), known)
    assert torch.equal(model.score(prompts, rows), population)


@pytest.mark.parametrize("likelihood", [PairLoss("hinge"), BradleyTerry()])
def test_nobody_depends_on_who_is_fitted_beside_them(near, likelihood):
    fitted, _ = near
    new, _ = divided(60, users=5, seed=3, first=100)
    names = np.array(new.annotators)
    model = copy.deepcopy(fitted)
    model.likelihood = likelihood
    together = fit_new_users(copy.deepcopy(model), new, epochs=40)
    alone = fit_new_users(copy.deepcopy(model), new.select(names == "u103"), epochs=40)
    place = together.annotators.index("u103")
    assert torch.allclose(together.head.logits[place], alone.head.logits[-1], atol=1e-5)
    # again from the same comparisons is the same, whoever is known already
    again = fit_new_users(together, new.select(names == "u103"), epochs=40)
    assert len(again.annotators) == len(fitted.annotators) + 5
    assert torch.allclose(again.head.logits[place], alone.head.logits[-1], atol=1e-5)


def test_more_people_than_are_fitted_at_once(near, monkeypatch):
    new, _ = divided(60, users=5, seed=3, first=100)
    whole = fit_new_users(copy.deepcopy(near[0]), new, epochs=10).head.logits
    monkeypatch.setattr("polyreward.reward_models.ideal_point_heads.USERS", 2)
    monkeypatch.setattr("polyreward.reward_models.ideal_point_heads.ROWS", 7)
    parts = fit_new_users(copy.deepcopy(near[0]), new, epochs=10).head.logits
    assert torch.allclose(whole, parts, atol=1e-5)


def test_someone_who_prefers_nothing_keeps_equal_weights(near):
    model = copy.deepcopy(near[0])
    data = PreferenceData(
        np.zeros(2, int), np.array([0, 1, 2, 3]), choice=[-2, 0], annotators=["quiet", "loud"], source="few"
    )
    assert data.choice[0] != TIE
    fit_new_users(model, data)
    assert model.head.weights(torch.tensor([len(model.annotators) - 2])).tolist()[0] == pytest.approx([0.5, 0.5])
    assert model.head.logits[-1].abs().sum() > 0


@pytest.mark.parametrize("kind", ["A", "B"])
def test_a_model_goes_through_a_folder_with_its_new_people(kind, tmp_path):
    data, encoder = divided(200)
    name = {"A": NEAR, "B": partial(IdealPointHead, kind="B", components=2, prompt_width=3, mode="partition")}[kind]
    model = PreferenceModel(encoder, name, PairLoss("hinge")).fit(data, epochs=2, validation=None)
    new, _ = divided(40, users=4, first=100, seed=2)
    fit_new_users(model, new)
    model.save_pretrained(tmp_path)
    again = PreferenceModel.from_pretrained(tmp_path, encoder=encoder)
    prompts, rows = np.zeros(20, int), np.arange(20)
    for who in ("u3", "u102", None):
        assert torch.equal(again.score(prompts, rows, annotator=who), model.score(prompts, rows, annotator=who))
    assert type(again.head) is type(model.head)
    # and goes on learning from there
    assert fit_new_users(again, divided(20, users=2, first=200)[0]).knows(["u201"]).all()


def test_a_second_fit_keeps_the_weights_of_who_was_there(near):
    model = copy.deepcopy(near[0])
    fit_new_users(model, divided(40, users=2, first=100, seed=2)[0])
    kept = dict(zip(model.annotators, model.head.logits.detach().clone(), strict=True))
    data, _ = divided(60, users=3, first=100, seed=6)
    held = PreferenceModel(model.encoder, model.head, PairLoss("logistic"))
    model.head.config |= {"user_rate": 0.0}
    held.fit(data, epochs=1, validation=None)
    assert held.annotators == tuple(data.annotator_names)
    for place, name in enumerate(held.annotators):
        if name in kept:
            assert torch.equal(held.head.logits[place], kept[name])
    assert held.head.config["population"] == 3


def test_rates_groups_and_defaults_are_the_papers():
    head = IdealPointHead(4, 3, kind="B", prompt_width=2)
    rates = [(group["lr"], group["weight_decay"]) for group in head.parameter_groups()]
    assert rates == [(1e-4, 0.01), (0.1, 0.0), (5e-3, 0.0)]
    assert [group["lr"] for group in IdealPointHead(4).parameter_groups()] == [1e-4, 5e-3, 5e-3]
    assert (head.config["kind"], head.uses_prompt, IdealPointHead(4).uses_prompt) == ("B", True, False)
    assert sum(len(group["params"]) for group in head.parameter_groups()) == len(list(head.parameters()))


def test_a_partition_in_use_is_one_prototype_and_soft_in_training():
    head = IdealPointHead(4, 3, mode="partition", annotators=2, population=2)
    with torch.no_grad():
        head.logits.normal_()
    assert head.train().weights(torch.tensor([0])).min() > 0
    assert head.eval().weights(torch.tensor([1])).max() == 1
    assert head.weights(torch.tensor([-1])).sum().item() == pytest.approx(1.0)


def test_one_prototype_needs_no_annotators_and_several_do():
    data, encoder = divided(60)
    nobody = PreferenceData(data.prompts, data.responses, choice=data.choice, source="nobody")
    single = PreferenceModel(encoder, partial(NEAR, components=1)).fit(nobody, epochs=1, validation=None)
    assert single.score([0, 0], np.arange(2)).isfinite().all()
    with pytest.raises(InvalidInputError, match=r"nobody names no annotators.*2 prototypes"):
        PreferenceModel(encoder, NEAR).fit(nobody)
    with pytest.raises(InvalidInputError, match="nobody names no annotators"):
        fit_new_users(single, nobody)
    with pytest.raises(InvalidInputError, match="LinearHead"):
        fit_new_users(PreferenceModel(encoder, LinearHead).fit(data, epochs=1), data)


def test_user_balanced_fits_and_ensembles():
    data, encoder = divided(200)
    data = PreferenceData(
        data.prompts,
        data.responses,
        choice=data.choice,
        annotators=data.annotators,
        columns={"weight": user_balanced_weights(data.annotators)},
    )
    model = PreferenceModel(encoder, NEAR, PairLoss("hinge", weights="weight"))
    herd = RewardEnsemble.of(model, 2).fit(data, epochs=3, batch_size=50, validation=None)
    assert herd.score(np.zeros(3, int), np.arange(3), annotator="u1").shape == (3,)


def test_a_fit_repeats():
    data, encoder = divided(100)
    first, second = (PreferenceModel(encoder, NEAR).fit(data, epochs=2, seed=3) for _ in range(2))
    assert torch.equal(first.head.logits, second.head.logits)
    assert torch.equal(first.head.space.P, second.head.space.P)


NAN = Features(np.array([[0.0, 1.0], [math.nan, 0.0], [1.0, 1.0]], np.float32), name="broken")


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: IdealPointHead(4, mode="hard"), UnknownNameError, "partition"),
        (lambda: IdealPointHead(4, spread=-1.0), InvalidInputError, "spread"),
        (lambda: IdealPointHead(4, user_rate=math.nan), InvalidInputError, "user_rate"),
        (lambda: IdealPointHead(4, temperature=0.0), InvalidInputError, "temperature"),
        (lambda: IdealPointHead(4).weights(torch.tensor([0])), InvalidInputError, "code 0 of 0"),
        (
            lambda: IdealPointHead(4, kind="B")(Items(torch.zeros(1, 4), torch.tensor([-1]), torch.tensor([0]))),
            InvalidInputError,
            "encode_prompts",
        ),
        (
            lambda: PreferenceModel(divided()[1], partial(IdealPointHead, kind="B")).fit(divided(20)[0]),
            InvalidInputError,
            "prompt_width=3",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call, error, told):
    with pytest.raises(error, match=told):
        call()


def test_features_of_new_people_that_are_nan(near):
    model = copy.deepcopy(near[0])
    broken = model.encoder.responses.copy()
    broken[3] = math.nan
    model.encoder = Features(broken, name="divided")
    data = PreferenceData(np.zeros(2, int), np.array([0, 1, 2, 3]), choice=[0, 0], annotators=["x", "x"], source="few")
    before = model.annotators
    with pytest.raises(InvalidInputError, match="few: the features of response 3 are NaN"):
        fit_new_users(model, data)
    assert model.annotators == before
