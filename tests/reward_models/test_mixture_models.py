import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.preferences import TIE, PreferenceData
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.encoders import Features, HashingEncoder
from polyreward.reward_models.ensembles import RewardEnsemble
from polyreward.reward_models.heads import Items, LinearHead, Scores
from polyreward.reward_models.likelihoods import BradleyTerry, Regression
from polyreward.reward_models.mixture_models import MixtureHead, MixtureLikelihood
from polyreward.reward_models.mixtures import MixtureBTLoss, head_regularizers
from polyreward.reward_models.model import PreferenceModel, UnknownAnnotatorWarning
from polyreward.reward_models.ordinal import OrdinalDistribution
from polyreward.reward_models.ordinal_likelihood import OrdinalLikelihood


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def divided(pairs=800, width=6, seed=0, users=20):
    """Judges of two kinds with opposed tastes; the prompt tells the kind, and so does who judges."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=width)
    direction *= 4 / np.linalg.norm(direction)
    features = rng.normal(size=(2 * pairs, width)).astype(np.float32)
    annotator = rng.integers(users, size=pairs)
    kind = annotator % 2
    gap = (features[::2] - features[1::2]) @ direction * np.where(kind == 0, 1, -1)
    lost = rng.random(pairs) > 1 / (1 + np.exp(-gap))
    prompts = rng.normal(size=(pairs, 3)).astype(np.float32)
    prompts[:, 0] = 2.0 * kind - 1
    data = PreferenceData(
        np.arange(pairs), np.arange(2 * pairs), choice=lost.astype(int), annotators=annotator.tolist(), source="divided"
    )
    return data, Features(features, prompts, name="divided"), direction, kind


OPTIONS = {"epochs": 15, "batch_size": 100, "learning_rate": 0.05, "weight_decay": 0.0}


@pytest.mark.parametrize("router", ["context", "annotator"])
def test_the_heads_find_the_tastes_and_the_router_who_has_which(router):
    data, encoder, direction, kind = divided()
    head = partial(MixtureHead, components=2, router=router, entropy=0.02, prompt_width=3, hidden=16)
    model = PreferenceModel(encoder, head, MixtureLikelihood()).fit(data, **OPTIONS)
    single = PreferenceModel(encoder, LinearHead).fit(data, **OPTIONS)
    assert model.evaluate(data)["accuracy"] > 0.8 > 0.62 > single.evaluate(data)["accuracy"]
    weight = model.head.rewards.linear.weight.detach().numpy()
    cosine = weight @ direction / np.linalg.norm(weight, axis=1) / np.linalg.norm(direction)
    assert max(cosine) > 0.95
    assert min(cosine) < -0.95
    rows = np.arange(len(data))
    scores = model.evaluate_head(rows, 2 * rows, data.annotators)
    assert scores.values.shape == scores.log_weights.shape == (len(data), 2)
    likes = int(np.argmax(cosine))
    assert ((scores.log_weights.exp()[:, likes].numpy() > 0.5) == (kind == 0)).mean() > 0.97


def test_the_loss_in_a_fit_is_that_of_the_component():
    data, encoder, _, _ = divided(pairs=40)
    head = partial(MixtureHead, components=3, prompt_width=3, entropy=0.5, correlation=0.1, orthogonality=0.2)
    model = PreferenceModel(encoder, head, MixtureLikelihood())
    model.fit(data, epochs=1, validation=None)
    head = model.head
    chosen = encoder.responses[2 * np.arange(40) + data.choice]
    rejected = encoder.responses[2 * np.arange(40) + 1 - data.choice]
    margins = head.rewards(torch.from_numpy(chosen)) - head.rewards(torch.from_numpy(rejected))
    usual = MixtureBTLoss(0.5)(margins, head.router(torch.from_numpy(encoder.prompts)))[0]
    extra = head_regularizers(head.rewards.linear.weight)
    usual = usual + 0.1 * extra["correlation"] + 0.2 * extra["orthogonality"]
    assert model.evaluate(data)["loss"] == pytest.approx(float(usual.detach()), rel=1e-4)


def test_the_default_head_has_the_papers_entropy_and_no_regularizers():
    config = MixtureHead(4).config
    assert config["entropy"] == 0.5
    assert [config[name] for name in ("orthogonality", "norm", "correlation")] == [0.0] * 3
    assert (config["components"], config["hidden"], config["router"]) == (5, 128, "context")


def test_probability_is_exactly_the_mixture_and_the_score_is_what_it_says():
    data, encoder, _, _ = divided(pairs=60)
    head = partial(MixtureHead, components=3, prompt_width=3)
    model = PreferenceModel(encoder, head, MixtureLikelihood()).fit(data, epochs=2, learning_rate=0.05)
    rows = np.arange(30)
    first, second = model.evaluate_head(rows, rows), model.evaluate_head(rows, rows + 30)
    found = model.probability(rows, rows, rows + 30)
    margins = (first.values - second.values).double().numpy()
    weights = first.log_weights.exp().double().numpy()
    slow = [
        sum(w / (1 + math.exp(-m)) for w, m in zip(ws, ms, strict=True))
        for ws, ms in zip(weights, margins, strict=True)
    ]
    assert found.tolist() == pytest.approx(slow, abs=1e-6)
    assert torch.allclose(found + model.probability(rows, rows + 30, rows), torch.ones(30))
    assert model.score(rows, rows).tolist() == pytest.approx(
        (weights * first.values.double().numpy()).sum(1).tolist(), abs=1e-6
    )
    model.likelihood = MixtureLikelihood(pointwise="log_sigmoid")
    pointwise = -(weights * np.log1p(np.exp(-first.values.double().numpy()))).sum(1)
    assert model.score(rows, rows).tolist() == pytest.approx(pointwise.tolist(), abs=1e-5)
    # accuracy counts what the mixture prefers
    chosen, rejected = (2 * np.arange(60) + np.abs(side - data.choice) for side in (0, 1))
    right = model.probability(np.arange(60), chosen, rejected) > 0.5
    assert model.evaluate(data)["accuracy"] == pytest.approx(float(right.float().mean()), abs=1e-6)


def test_weights_depend_on_the_prompt_alone():
    data, encoder, _, _ = divided(pairs=60)
    head = partial(MixtureHead, components=3, prompt_width=3)
    model = PreferenceModel(encoder, head, MixtureLikelihood()).fit(data, epochs=2)
    rows = np.arange(40)
    together = model.evaluate_head(rows, rows).log_weights
    assert torch.allclose(model.evaluate_head(rows, rows[::-1].copy()).log_weights, together)
    assert torch.allclose(model.evaluate_head(rows[5:6], rows[:1]).log_weights[0], together[5], atol=1e-6)


def test_permuting_heads_and_router_columns_changes_nothing():
    data, encoder, _, _ = divided(pairs=60)
    head = partial(MixtureHead, components=3, prompt_width=3, hidden=None)
    model = PreferenceModel(encoder, head, MixtureLikelihood()).fit(data, epochs=2)
    rows, before = np.arange(60), model.evaluate(data)
    score = model.score(rows, rows)
    order = torch.tensor([2, 0, 1])
    for linear in (model.head.rewards.linear, model.head.router.network):
        with torch.no_grad():
            for part in linear.parameters():
                part.copy_(part[order].clone())
    assert model.evaluate(data) == pytest.approx(before, rel=1e-5)
    assert torch.allclose(model.score(rows, rows), score, atol=1e-6)


def test_someone_unknown_gets_the_mean_of_all_weights():
    data, encoder, _, _ = divided(pairs=600)
    head = partial(MixtureHead, components=2, router="annotator", entropy=0.02)
    model = PreferenceModel(encoder, head, MixtureLikelihood()).fit(data, **OPTIONS)
    rows = np.arange(10)
    everyone = [model.probability(rows, rows, rows + 20, annotator=a) for a in range(20)]
    with pytest.warns(UnknownAnnotatorWarning):
        stranger = model.probability(rows, rows, rows + 20, annotator="stranger")
    assert torch.allclose(stranger, torch.stack(everyone).mean(0), atol=1e-6)
    assert torch.allclose(model.probability(rows, rows, rows + 20), stranger)
    assert not torch.allclose(everyone[0], everyone[1], atol=0.1)


def test_a_second_fit_keeps_the_weights_of_annotators_by_name():
    data, _, _, _ = divided(pairs=100)
    table = ComparisonTable(data)
    head = MixtureHead(6, 2, router="annotator")
    head.prepare(table)
    with torch.no_grad():
        head.logits.copy_(torch.arange(40.0).reshape(20, 2))
    kept = dict(zip(table.annotators, head.logits.detach().clone(), strict=True))
    head.prepare(ComparisonTable(data, [7, 99, 3]))
    assert torch.equal(head.logits.detach(), torch.stack([kept[7], torch.zeros(2), kept[3]]))
    assert head.config["annotators"] == 3


def test_static_weights_are_the_same_for_all_and_need_no_prompts():
    data, encoder, _, _ = divided(pairs=200)
    bare = Features(encoder.responses, name="bare")
    torch.manual_seed(0)
    model = PreferenceModel(bare, MixtureHead(6, 3, router="static"), MixtureLikelihood()).fit(data, epochs=3)
    rows = np.arange(9)
    weights = model.evaluate_head(rows, rows).log_weights.exp()
    assert torch.equal(weights, weights[:1].expand(9, 3))
    assert torch.allclose(weights.sum(1), torch.ones(9))


@pytest.mark.parametrize("router", ["context", "static", "annotator"])
def test_models_survive_saving(tmp_path, router):
    data, encoder, _, _ = divided(pairs=100)
    head = partial(MixtureHead, components=3, router=router, prompt_width=3, hidden=8)
    inner = BradleyTerry(smoothing=0.1)
    model = PreferenceModel(encoder, head, MixtureLikelihood(inner, "log_sigmoid")).fit(data, epochs=2)
    model.save_pretrained(tmp_path)
    back = PreferenceModel.from_pretrained(tmp_path, encoder=encoder)
    rows = np.arange(50)
    assert torch.equal(back.score(rows, rows, 3), model.score(rows, rows, 3))
    assert torch.equal(back.probability(rows, rows, rows + 7, 4), model.probability(rows, rows, rows + 7, 4))
    assert back.head.config == model.head.config
    assert back.likelihood.inner == inner
    assert back.likelihood.pointwise == "log_sigmoid"
    assert model.as_reward("mixed")(rows, rows) == pytest.approx(model.score(rows, rows).tolist())


def test_an_ensemble_of_mixtures_of_ordinal_ratings_is_one_composition(tmp_path):
    data, encoder, _, _ = divided(pairs=400)
    head = partial(MixtureHead, components=2, outputs=5, prompt_width=3, hidden=8, entropy=0.02)
    model = PreferenceModel(encoder, head, MixtureLikelihood(OrdinalLikelihood(5)))
    ensemble = RewardEnsemble.of(model, 2).fit(data, epochs=15, batch_size=64, learning_rate=0.03)
    rows = np.arange(20)
    assert ensemble.member_scores(rows, rows).shape == (2, 20)
    assert all(member.evaluate(data)["accuracy"] > 0.75 for member in ensemble.members)
    ensemble.save_pretrained(tmp_path)
    back = RewardEnsemble.from_pretrained(tmp_path, encoder=encoder)
    assert torch.equal(back.score(rows, rows), ensemble.score(rows, rows))
    member = ensemble.members[0]
    first, second = member.evaluate_head(rows, rows), member.evaluate_head(rows, rows + 30)
    assert first.values.shape == (20, 2, 5)
    mixed = torch.zeros(20)
    for k in range(2):
        a, b = OrdinalDistribution(first.values[:, k]), OrdinalDistribution(second.values[:, k])
        mixed += first.log_weights[:, k].exp() * (a.prob_greater(b) + 0.5 * a.prob_equal(b))
    assert torch.allclose(member.probability(rows, rows, rows + 30), mixed, atol=1e-5)
    expected = first.log_weights.exp() * torch.stack([OrdinalDistribution(first.values[:, k]).mean for k in (0, 1)], 1)
    assert torch.allclose(member.score(rows, rows), expected.sum(1), atol=1e-5)
    assert member.likelihood.outputs == 5


class Given(nn.Module):
    """Values and weights as they are given."""

    def __init__(self, values, log_weights):
        super().__init__()
        self.config, self.values, self.log_weights = {}, values, log_weights

    def forward(self, items):
        return Scores(self.values, self.log_weights)


def batch_of(data):
    return ComparisonTable(data).batch(np.arange(len(data)))


def test_lists_ties_targets_smoothing_and_centring_by_hand():
    values = torch.tensor([[1.0, -1.0], [0.0, 0.5], [-1.0, 2.0], [0.3, 0.2], [0.1, -0.4]])
    log_weights = torch.tensor([[0.25, 0.75]] * 5).log()
    data = PreferenceData(
        np.arange(2), np.arange(5), np.array([0, 3, 5]), ranks=np.array([1, 2, 3, 1, 1.0]), target=np.array([0.9, 1.0])
    )
    inner = BradleyTerry(smoothing=0.1, centering=0.5)
    loss, metrics = MixtureLikelihood(inner).loss(Scores(values, log_weights), batch_of(data))

    def chance(i, j):
        return sum(w / (1 + math.exp(-float(values[i, k] - values[j, k]))) for k, w in enumerate((0.25, 0.75)))

    target, slow = 0.9 + 0.1 * (1 - 1.8), 0.0
    worth = [0.25 * float(v[0]) + 0.75 * float(v[1]) for v in values]
    centre = 0.0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        slow += (-target * math.log(chance(i, j)) - (1 - target) * math.log(chance(j, i))) / 6
        centre += (worth[i] + worth[j]) ** 2 / 6
    slow += (-0.5 * math.log(chance(3, 4)) - 0.5 * math.log(chance(4, 3))) / 2
    centre += (worth[3] + worth[4]) ** 2 / 2
    assert float(metrics["nll"]) == pytest.approx(slow, rel=1e-5)
    assert float(loss) == pytest.approx(slow + 0.5 * centre, rel=1e-5)
    right = sum(chance(i, j) > 0.5 for i, j in ((0, 1), (0, 2), (1, 2)))
    assert float(metrics["accuracy"]) == pytest.approx(right / 3)
    assert float(metrics["router_entropy"]) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


def test_an_inner_model_of_ties_is_used():
    values, log_weights = torch.tensor([[1.0, -1.0], [0.0, 0.5]]), torch.tensor([[0.4, 0.6]] * 2).log()
    likelihood = MixtureLikelihood(BradleyTerry(theta=1.5))
    data = PreferenceData(np.arange(1), np.arange(2), choice=np.array([TIE]))
    loss, _ = likelihood.loss(Scores(values, log_weights), batch_of(data))
    cut = math.log(1.5)

    def wins(sign):
        return sum(
            w / (1 + math.exp(-(sign * float(values[0, k] - values[1, k]) - cut))) for k, w in enumerate((0.4, 0.6))
        )

    assert float(loss) == pytest.approx(-math.log(1 - wins(1) - wins(-1)), rel=1e-5)
    one, other = Scores(values[:1], log_weights[:1]), Scores(values[1:], log_weights[1:])
    tie = 1 - wins(1) - wins(-1)
    assert float(likelihood.probability(one, other)) == pytest.approx(wins(1) + 0.5 * tie, rel=1e-5)


def test_a_single_component_is_the_inner_likelihood():
    values = torch.randn(8, 1)
    data = PreferenceData(np.arange(4), np.arange(8), choice=np.array([0, 1, 1, 0]))
    mixed, _ = MixtureLikelihood().loss(Scores(values, torch.zeros(8, 1)), batch_of(data))
    usual, _ = BradleyTerry().loss(Scores(values[:, 0]), batch_of(data))
    assert float(mixed) == pytest.approx(float(usual))


def test_text_models_and_scores_of_nothing():
    prompts, good, bad = [f"prompt {i}" for i in range(30)], ["good answer"] * 30, ["bad answer"] * 30
    data = PreferenceData.pairs(prompts, good, bad)
    head = partial(MixtureHead, components=2)
    model = PreferenceModel(HashingEncoder(64), head, MixtureLikelihood()).fit(data, learning_rate=0.05)
    assert float(model.probability(["new prompt"], ["good"], ["bad"])) > 0.5
    assert model.score([], []).shape == (0,)
    assert model.probability([], [], []).shape == (0,)


def test_wrong_compositions():
    data, encoder, _, _ = divided(pairs=50)
    with pytest.raises(InvalidInputError, match="use MixtureHead"):
        PreferenceModel(encoder, LinearHead, MixtureLikelihood()).fit(data)
    with pytest.raises(InvalidInputError, match="pass prompt_width=3"):
        PreferenceModel(encoder, MixtureHead, MixtureLikelihood()).fit(data)
    with pytest.raises(InvalidInputError, match="no features of prompts"):
        PreferenceModel(Features(encoder.responses), MixtureHead, MixtureLikelihood()).fit(data)
    with pytest.raises(InvalidInputError, match="has no pair_log_probability"):
        MixtureLikelihood(Regression())
    with pytest.raises(UnknownNameError, match="log_sigmoid"):
        MixtureLikelihood(pointwise="sigmoid")
    with pytest.raises(UnknownNameError, match="did you mean 'static'"):
        MixtureHead(4, router="statik")
    with pytest.raises(InvalidInputError, match="at least 1 head"):
        MixtureHead(4, 0)
    with pytest.raises(InvalidInputError, match="outputs must be at least 1"):
        MixtureHead(4, 2, outputs=0)
    with pytest.raises(InvalidInputError, match="norm must be a finite number"):
        MixtureHead(4, 2, norm=-1.0)
    wide = partial(MixtureHead, components=2, prompt_width=3, outputs=4)
    with pytest.raises(InvalidInputError, match="give the head outputs=1"):
        PreferenceModel(encoder, wide, MixtureLikelihood()).fit(data)
    nobody = PreferenceData(np.arange(50), np.arange(100), choice=data.choice)
    with pytest.raises(InvalidInputError, match="the data name none"):
        PreferenceModel(encoder, partial(MixtureHead, router="annotator"), MixtureLikelihood()).fit(nobody)
    zeros = torch.zeros(1, dtype=torch.long)
    with pytest.raises(InvalidInputError, match="knows no annotators"):
        MixtureHead(4, router="annotator")(Items(torch.zeros(1, 4), zeros, zeros))
