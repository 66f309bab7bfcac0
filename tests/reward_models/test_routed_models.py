from functools import partial

import numpy as np
import pytest
import torch

from polyreward.errors import InvalidInputError
from polyreward.preferences import TIE, PreferenceData
from polyreward.reward_models.context_routing import EmptyContextWarning, HedgeRouterTrainer
from polyreward.reward_models.encoders import Features, HashingEncoder
from polyreward.reward_models.mixture_models import MixtureHead, MixtureLikelihood
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.ordinal_likelihood import OrdinalLikelihood
from polyreward.reward_models.routed_models import route_to_context


def split_population(pairs=600, width=6, seed=0):
    """Two opposed tastes, told by the prompt; the last prompts carry a context (feature 1) and no such sign."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=width)
    direction *= 4 / np.linalg.norm(direction)
    features = rng.normal(size=(2 * pairs, width)).astype(np.float32)
    kind = rng.integers(2, size=pairs)
    gap = (features[::2] - features[1::2]) @ direction
    prompts = 0.1 * rng.normal(size=(pairs, 3)).astype(np.float32)
    train = np.arange(pairs) < pairs - 200
    prompts[train, 0] = 2.0 * kind[train] - 1
    prompts[~train, 1] = 2.0 * kind[~train] - 1
    lost = rng.random(pairs) > 1 / (1 + np.exp(-gap * np.where(kind == 0, 1, -1)))
    data = PreferenceData(np.arange(pairs), np.arange(2 * pairs), choice=lost.astype(int), source="contexts")
    return data.select(train), data.select(~train), Features(features, prompts, name="contexts")


@pytest.fixture(scope="module", params=["bradley-terry", "ordinal"])
def fitted(request):
    train, context, encoder = split_population()
    outputs, inner = (1, None) if request.param == "bradley-terry" else (4, OrdinalLikelihood(4))
    head = partial(MixtureHead, components=2, outputs=outputs, prompt_width=3, hidden=16, entropy=0.02)
    model = PreferenceModel(encoder, head, MixtureLikelihood(inner))
    model.fit(train, epochs=15, batch_size=100, learning_rate=0.05, weight_decay=0.0)
    return model, context


def test_a_fitted_model_learns_a_context_and_keeps_its_heads(fitted, tmp_path):
    model, context = fitted
    few, test = context.select(np.arange(60)), context.select(np.arange(60, 200))
    state = {name: value.clone() for name, value in model.head.state_dict().items()}
    routed = route_to_context(model, few, 0.3, learning_rate=0.02, epochs=15)
    assert routed.evaluate(test)["accuracy"] > model.evaluate(test)["accuracy"] + 0.1
    assert all(torch.equal(value, state[name]) for name, value in model.head.state_dict().items())
    changed = {n for n, v in routed.head.state_dict().items() if not torch.equal(v, state[n])}
    assert changed == {name for name in state if name.startswith("router.")}
    rows = np.arange(9)
    assert torch.equal(routed.evaluate_head(rows, rows).values, model.evaluate_head(rows, rows).values)
    again = route_to_context(model, few, 0.3, learning_rate=0.02, epochs=15)
    assert torch.equal(again.score(rows, rows), routed.score(rows, rows))
    other = route_to_context(model, few, 0.3, learning_rate=0.02, epochs=15, seed=1)
    assert not torch.equal(other.score(rows, rows), routed.score(rows, rows))
    routed.save_pretrained(tmp_path)
    back = PreferenceModel.from_pretrained(tmp_path, encoder=model.encoder)
    assert torch.equal(back.score(rows, rows), routed.score(rows, rows))


def test_it_is_the_trainer_on_the_models_features(fitted):
    import copy

    model, context = fitted
    few = context.select(np.arange(40))
    routed = route_to_context(model, few, 0.2, epochs=3, seed=7)
    chosen, rejected = (few.responses[2 * np.arange(40) + np.abs(side - few.choice)] for side in (0, 1))
    rows = few.prompts
    values = [model.evaluate_head(rows, side).values for side in (chosen, rejected)]
    losses = -model.likelihood.inner.pair_log_probability(*values)
    router = copy.deepcopy(model.head.router)
    trainer = HedgeRouterTrainer(router, None, 0.2, epochs=3, generator=torch.Generator().manual_seed(7))
    trainer.fit_losses(torch.from_numpy(model.encoder.prompts[rows]), losses)
    for name, value in router.state_dict().items():
        assert torch.allclose(routed.head.router.state_dict()[name], value, atol=1e-6)


def test_validation_chooses_the_epoch_and_ties_are_left_out(fitted):
    model, context = fitted
    few, held = context.select(np.arange(40)), context.select(np.arange(40, 100))
    kept = route_to_context(model, few, 0.2, epochs=4, validation=held, learning_rate=0.02)
    accuracies = [
        route_to_context(model, few, 0.2, epochs=n, learning_rate=0.02).evaluate(held)["accuracy"] for n in (1, 2, 3, 4)
    ]
    assert kept.evaluate(held)["accuracy"] == pytest.approx(max(accuracies), abs=1e-6)
    tied = PreferenceData(few.prompts, few.responses, choice=np.full(40, TIE))
    with pytest.warns(EmptyContextWarning):
        same = route_to_context(model, tied, 0.2)
    rows = np.arange(5)
    assert torch.equal(same.score(rows, rows), model.score(rows, rows))


def test_no_pairs_and_models_that_cannot_be_routed(fitted):
    model, context = fitted
    with pytest.warns(EmptyContextWarning):
        same = route_to_context(model, context.select(np.zeros(0, int)), 0.1)
    rows = np.arange(5)
    assert torch.equal(same.score(rows, rows), model.score(rows, rows))
    with pytest.raises(ValueError, match="tau must be above 0"):
        route_to_context(model, context, 0.0)
    unfitted = PreferenceModel(model.encoder, MixtureHead, MixtureLikelihood())
    static = PreferenceModel(model.encoder, MixtureHead(6, 2, router="static"), MixtureLikelihood())
    for wrong in (unfitted, static):
        with pytest.raises(InvalidInputError, match="routing needs a fitted PreferenceModel"):
            route_to_context(wrong, context)


def test_texts_with_a_context_in_the_prompt():
    prompts = [f"question {i}" for i in range(40)]
    short, long = ["yes"] * 40, ["yes indeed and for many reasons"] * 40
    swap = np.arange(40) % 2
    data = PreferenceData.pairs(
        prompts, [long[i] if s else short[i] for i, s in enumerate(swap)], [short[0] if s else long[0] for s in swap]
    )
    head = partial(MixtureHead, components=2, entropy=0.01, hidden=16)
    model = PreferenceModel(HashingEncoder(64), head, MixtureLikelihood()).fit(
        data, epochs=60, learning_rate=0.05, validation=None, seed=1
    )
    brief = PreferenceData.pairs([f"be brief. {p}" for p in prompts], short, long)
    routed = route_to_context(model, brief, 0.1, epochs=30, learning_rate=0.02)
    chance = routed.probability(["be brief. question 99"], ["yes"], ["yes indeed and for many reasons"])
    assert float(chance) > float(model.probability(["be brief. question 99"], ["yes"], [long[0]]))
    assert float(chance) > 0.5
