import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from polyreward.errors import InvalidInputError
from polyreward.preferences import TIE, PreferenceData
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.encoders import Features, FeatureTable
from polyreward.reward_models.heads import Items
from polyreward.reward_models.judgements import Judgements, content_hash
from polyreward.reward_models.latent_user_head import LatentUserHead, infer, infer_annotators
from polyreward.reward_models.model import PreferenceModel, UnknownAnnotatorWarning

WIDTH = 4


def people(pairs=1600, annotators=40, new=10, seed=0):
    """Annotators who like the first feature, and as many who dislike it; all like the second a little."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2 * pairs, WIDTH)).astype(np.float32)
    person = np.arange(pairs) % (annotators + new)
    worth = np.where(np.repeat(person, 2) % 2, 1, -1) * features[:, 0] + 0.5 * features[:, 1]
    data = PreferenceData(
        np.arange(pairs), np.arange(2 * pairs), choice=worth.reshape(-1, 2).argmax(1),
        annotators=[f"p{i}" for i in person], source="planted",
    )  # fmt: skip
    late = person >= annotators
    return Features(features, name="planted"), data.select(~late), data.select(late)


def fitted(encoder, data, epochs=12, **options):
    head = partial(LatentUserHead, hidden=32, latent=4, **options)
    return PreferenceModel(encoder, head).fit(
        data, epochs=epochs, batch_size=64, learning_rate=5e-3, validation=None, seed=1
    )


@pytest.fixture(scope="module")
def world():
    encoder, data, late = people()
    return encoder, data, late, fitted(encoder, data)


def test_people_of_opposed_tastes_are_served_and_new_ones_without_training(world, tmp_path):
    encoder, data, late, model = world
    assert model.head.active_units() >= 1
    assert model.head.kl() > 0
    assert model.evaluate(data)["accuracy"] > 0.85
    rows = np.arange(3200)
    odd, even = model.score(rows, rows, "p1"), model.score(rows, rows, "p0")
    first = torch.from_numpy(encoder.responses[:, 0])
    assert float(torch.corrcoef(torch.stack([odd, first]))[0, 1]) > 0.7
    assert float(torch.corrcoef(torch.stack([even, first]))[0, 1]) < -0.7
    # people who came later
    turn = np.arange(len(late)) // 10
    context, asked = late.select(turn < 16), late.select(turn >= 16)
    weights = [p.detach().clone() for p in model.head.parameters()]
    with pytest.warns(UnknownAnnotatorWarning):
        model.score([0], [0], "p41")
    assert infer(model, context) is model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = model.score(rows, rows, "p41")
    assert all(torch.equal(a, b) for a, b in zip(weights, model.head.parameters(), strict=True))
    assert model.evaluate(asked)["accuracy"] > 0.85
    assert torch.equal(model.score(rows, rows, "p1"), odd)
    model.save_pretrained(tmp_path)
    back = PreferenceModel.from_pretrained(tmp_path, encoder=encoder)
    assert back.annotators == model.annotators
    for name in ("p0", "p1", "p41", None):
        assert torch.equal(back.score(rows, rows, name), model.score(rows, rows, name))
    assert torch.equal(back.score(rows, rows, "p41"), scores)
    assert back.evaluate(asked)["accuracy"] == pytest.approx(model.evaluate(asked)["accuracy"])
    # a model that was read back registers people too
    again = infer_annotators(PreferenceModel.from_pretrained(tmp_path, encoder=encoder), context)
    assert torch.allclose(again.score(rows, rows, "p41"), scores, atol=1e-6)


def test_someone_unknown_gets_the_score_at_the_prior_mean(world):
    encoder, _, _, model = world
    rows = np.arange(50)
    found = model.score(rows, rows)
    expected = model.head.decoder.reward(torch.from_numpy(encoder.responses[:50]), model.head.prior.centre())
    assert torch.allclose(found, expected.detach(), atol=1e-6)
    with pytest.warns(UnknownAnnotatorWarning):
        assert torch.equal(model.score(rows, rows, "nobody"), found)
    # what all share is in it: the second feature, and not the disputed first one
    rows = np.arange(3200)
    table = torch.stack([model.score(rows, rows), *torch.from_numpy(encoder.responses[:, :2]).T])
    correlation = torch.corrcoef(table)[0, 1:]
    assert correlation[1] > 0.7 > 0.35 > abs(correlation[0])


def test_divergence_is_a_term_and_beta_follows_the_share_of_the_fit():
    encoder, data, _ = people(pairs=200)
    torch.manual_seed(0)
    head = LatentUserHead(WIDTH, latent=3, hidden=8, beta=0.4, cycles=2, context=8, population=0.0)
    table = ComparisonTable(data)
    head.prepare(table, FeatureTable([encoder.responses]))
    for share, expected in ((0.0, 0.0), (0.25, 0.2), (0.5, 0.4), (0.75, 0.2), (1.0, 0.4)):
        head.step(share)
        assert head.beta == pytest.approx(expected)
    batch, rows = table.batch(np.arange(20)), table.rows(np.arange(20))
    annotator = batch.annotator[batch.comparison]
    items = Items(torch.from_numpy(encoder.responses[rows]), annotator, batch.comparison)
    head.train()
    head.step(0.5)
    state = torch.get_rng_state()
    full = head(items).terms["kl"]
    head.step(0.25)
    torch.set_rng_state(state)
    assert float(head(items).terms["kl"]) == pytest.approx(float(full) / 2)
    assert float(full) > 0
    head.eval()
    head.step(0.0)
    assert float(head(items).terms["kl"]) > 0  # validations with beta at its full weight can be compared
    assert not head(Items(items.features, annotator, torch.arange(40))).terms


def test_predicted_comparisons_are_never_in_the_sets_they_are_predicted_from():
    encoder, data, _ = people(pairs=300, annotators=10, new=0)
    table, features = ComparisonTable(data), FeatureTable([encoder.responses])
    judgements = Judgements.of(table, features)
    assert judgements.sizes.tolist() == [30] * 10
    batch, rows = table.batch(np.arange(60)), table.rows(np.arange(60))
    targets = judgements.keys_of(content_hash(features.take(rows)), batch.annotator[batch.comparison], batch.comparison)
    assert len(targets) == 60
    asked = {frozenset(rows[2 * i : 2 * i + 2].tolist()) for i in range(60)}
    torch.manual_seed(0)
    sizes = set()
    for _ in range(200):
        chosen, mask = judgements.draw(np.arange(10), 8, targets)
        assert chosen.shape == mask.shape == (10, 8)
        for user in range(10):
            own = chosen[user][mask[user]]
            sizes.add(len(own))
            assert len(set(own.tolist())) == len(own)
            assert ((own >= judgements.starts[user]) & (own < judgements.starts[user] + 30)).all()
            pairs = {frozenset((int(judgements.first[i]), int(judgements.second[i]))) for i in own}
            assert not pairs & asked
    assert {0, 1, 8} <= sizes
    chosen, mask = judgements.latest(np.arange(10), 40, targets)
    assert mask.sum(axis=1).tolist() == [24] * 10
    chosen, mask = judgements.latest(np.arange(10), 5, targets)
    assert mask.sum(axis=1).tolist() == [5] * 10
    assert not np.isin(judgements.key[chosen], targets).any()
    assert judgements.asked(targets).tolist() == list(range(10))


def test_a_label_of_the_training_data_does_not_reach_its_own_prediction():
    encoder, data, _ = people(pairs=300, annotators=10, new=0)
    other = PreferenceData(
        data.prompts, data.responses, choice=np.where(np.arange(300) < 10, 1 - data.choice, data.choice),
        annotators=data.annotators, source="planted",
    )  # fmt: skip
    scores = []
    for given in (data, other):
        torch.manual_seed(0)
        head = LatentUserHead(WIDTH, latent=3, hidden=8)
        table = ComparisonTable(given)
        head.prepare(table, FeatureTable([encoder.responses]))
        batch, rows = table.batch(np.arange(10)), table.rows(np.arange(10))
        items = Items(torch.from_numpy(encoder.responses[rows]), batch.annotator[batch.comparison], batch.comparison)
        head.eval()
        scores.append(head(items).values)
        stored = head(Items(items.features, items.annotator, torch.arange(20))).values
        assert not torch.equal(stored, scores[-1])  # in use, all of someone's comparisons count
    # whatever the labels of the ten, one of each annotator, their prediction is the same
    assert torch.equal(*scores)


def test_hashes_are_of_content():
    features = torch.randn(50, 7)
    hashes = content_hash(features)
    assert len(set(hashes.tolist())) == 50
    assert torch.equal(content_hash(features[[3, 3, 9]]), hashes[[3, 3, 9]])
    assert torch.equal(content_hash(torch.zeros(1, 7)), content_hash(-torch.zeros(1, 7)))
    encoder, data, _ = people(pairs=300, annotators=10, new=0)
    judgements = Judgements.of(ComparisonTable(data), FeatureTable([encoder.responses]))
    hashes, person = content_hash(features[:2]), torch.tensor([3, 3])
    same = torch.tensor([0, 0])
    assert judgements.keys_of(hashes, person, same) == judgements.keys_of(hashes.flip(0), person, same)
    assert judgements.keys_of(hashes, person, same) != judgements.keys_of(hashes, person + 1, same)


def test_an_annotator_with_one_comparison_is_trained_at_the_prior():
    encoder, data, _ = people(pairs=100, annotators=100, new=0)
    model = fitted(encoder, data, epochs=1)
    assert all(np.isfinite(value) for value in model.history[0].values())
    assert model.evaluate(data)["loss"] > 0


def test_ties_lists_and_missing_annotators():
    features = np.random.default_rng(0).normal(size=(90, WIDTH)).astype(np.float32)
    data = PreferenceData(
        np.arange(30), np.arange(90), np.arange(0, 91, 3), ranks=np.tile([1.0, 2.0, 2.0], 30),
        annotators=[None if i % 5 == 0 else f"p{i % 3}" for i in range(30)],
    )  # fmt: skip
    judgements = Judgements.of(ComparisonTable(data), FeatureTable([features]))
    assert len(judgements) == 24 * 3
    assert sorted(set(judgements.label.tolist())) == [0.5, 1.0]
    model = fitted(Features(features), data, epochs=2)
    assert torch.isfinite(model.score(np.arange(90), np.arange(90), "p1")).all()
    ties = PreferenceData(
        np.arange(4), np.arange(8), choice=np.array([0, TIE, 1, TIE]), annotators=["a", "a", "b", "b"]
    )
    assert Judgements.of(ComparisonTable(ties), FeatureTable([features])).label.tolist().count(0.5) == 2


@pytest.mark.parametrize("prior", ["standard", "flow"])
def test_other_priors_and_ways_to_normalise(prior, tmp_path):
    encoder, data, late = people(pairs=200)
    model = fitted(encoder, data, epochs=1, prior=prior, normalize="always", cycles=0)
    infer_annotators(model, late)
    model.save_pretrained(tmp_path)
    rows = np.arange(40)
    back = PreferenceModel.from_pretrained(tmp_path, encoder=encoder)
    for name in ("p0", "p41", None):
        assert torch.equal(back.score(rows, rows, name), model.score(rows, rows, name))
    latent = model.head.latent(model.head.means)
    assert latent.norm(dim=-1).tolist() == pytest.approx([2.0] * len(latent), abs=1e-5)


def test_a_fit_repeats_and_goes_on_from_its_checkpoint(tmp_path):
    encoder, data, _ = people(pairs=200)
    rows = np.arange(40)
    whole = fitted(encoder, data, epochs=3).score(rows, rows, "p3")
    assert torch.equal(fitted(encoder, data, epochs=3).score(rows, rows, "p3"), whole)

    def stop(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    head = partial(LatentUserHead, hidden=32, latent=4)
    options = {
        "epochs": 3, "batch_size": 64, "learning_rate": 5e-3, "validation": None, "seed": 1,
        "checkpoint": tmp_path / "fit.pt", "checkpoint_steps": 1,
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        PreferenceModel(encoder, head).fit(data, progress=stop, **options)
    assert torch.equal(PreferenceModel(encoder, head).fit(data, **options).score(rows, rows, "p3"), whole)


def test_validation_chooses_weights_and_their_posteriors():
    encoder, data, _ = people(pairs=400)
    model = PreferenceModel(encoder, partial(LatentUserHead, hidden=16, latent=3))
    model.fit(data, epochs=4, batch_size=64, learning_rate=0.02, validation=0.2, patience=1)
    stored = model.head.means.clone()
    model.head._at = ()
    model.head.refresh()
    assert torch.allclose(stored, model.head.means, atol=1e-6)


def test_wrong_calls():
    encoder, data, late = people(pairs=200)
    with pytest.raises(InvalidInputError, match="context and largest from 1"):
        LatentUserHead(WIDTH, context=0)
    with pytest.raises(InvalidInputError, match="normalize"):
        LatentUserHead(WIDTH, normalize="no")
    with pytest.raises(InvalidInputError, match="frozen features"):
        LatentUserHead(WIDTH).prepare(ComparisonTable(data), None)
    nobody = PreferenceData(data.prompts, data.responses, choice=data.choice, source="nobody")
    with pytest.raises(InvalidInputError, match="nobody: no comparison"):
        fitted(encoder, nobody)
    model = fitted(encoder, data, epochs=1)
    with pytest.raises(InvalidInputError, match="has no annotators"):
        infer_annotators(model, nobody)
    with pytest.raises(InvalidInputError, match="LatentUserHead, got"):
        infer_annotators(PreferenceModel(encoder, nn.Linear(4, 1)), late)
    with pytest.raises(InvalidInputError, match="LatentUserHead, got NoneType"):
        infer_annotators(PreferenceModel(encoder, LatentUserHead), late)
    unlabelled = PreferenceData([0], [0, 1], choice=np.array([-2]), annotators=["x"], source="empty")
    with pytest.raises(InvalidInputError, match="'x' prefers"):
        infer_annotators(model, unlabelled)
    head = LatentUserHead(WIDTH).train()
    with pytest.raises(InvalidInputError, match="call prepare"):
        head(Items(torch.zeros(2, WIDTH), torch.tensor([0, 0]), torch.tensor([0, 0])))
    with pytest.raises(InvalidInputError, match="annotator code 9"):
        LatentUserHead(WIDTH, annotators=2).eval()(Items(torch.zeros(1, WIDTH), torch.tensor([9]), torch.tensor([0])))
