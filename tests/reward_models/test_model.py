import json
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from planted_preferences import planted
from torch import nn

from polyreward.errors import InvalidInputError, MissingFileError, UnknownNameError
from polyreward.preferences import IdenticalResponsesWarning, Preference, PreferenceData
from polyreward.reward_models.contract import RewardModel, as_reward
from polyreward.reward_models.encoders import Features, HashingEncoder
from polyreward.reward_models.feature_cache import CachedEncoder
from polyreward.reward_models.heads import LinearHead, Scores, TwoLayerHead
from polyreward.reward_models.likelihoods import BradleyTerry, PlackettLuce, Regression
from polyreward.reward_models.model import PreferenceModel, UnknownAnnotatorWarning


class PersonalHead(nn.Module):
    """One direction for all and one for each annotator, zero for someone unknown; a head as others may write them."""

    uses_prompt = True

    def __init__(self, width):
        super().__init__()
        self.config = {"width": width}
        self.shared = nn.Linear(width, 1, bias=False)
        self.own = None
        self.seen = []

    def prepare(self, table, features):
        self.own = nn.Embedding(len(table.annotators) + 1, self.config["width"], padding_idx=0)
        nn.init.zeros_(self.own.weight)

    def parameter_groups(self):
        return [{"params": self.shared.parameters()}, {"params": self.own.parameters(), "lr": 0.05}]

    def step(self, share):
        self.seen.append(share)

    def forward(self, items):
        assert items.prompt.shape == (len(items.features), 2)
        own = (self.own(items.annotator + 1) * items.features).sum(-1)
        values = self.shared(items.features).squeeze(-1) + own
        return Scores(values, terms={"ridge": 1e-3 * self.own.weight.square().sum()})


@pytest.mark.parametrize("optimizer", ["adamw", "lbfgs"])
def test_a_linear_head_finds_the_planted_direction(optimizer):
    data, encoder, direction = planted(pairs=2000)
    model = PreferenceModel(encoder, LinearHead)
    assert isinstance(model, RewardModel)
    options = {"weight_decay": 0.0, "epochs": 8}
    if optimizer == "adamw":
        options = {"learning_rate": 0.05, "batch_size": 100, "epochs": 30, "weight_decay": 0.0}
    assert model.fit(data, optimizer=optimizer, **options) is model
    weight = model.head.linear.weight.detach().numpy()[0]
    assert weight @ direction / np.linalg.norm(weight) > 0.98
    assert np.linalg.norm(weight) == pytest.approx(3.0, rel=0.2)
    assert model.history[0]["validation_loss"] < np.log(2)


def test_lbfgs_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    data, encoder, _ = planted(pairs=300)
    model = PreferenceModel(encoder, LinearHead)
    model.fit(data, optimizer="lbfgs", epochs=5, weight_decay=1.0 / 300, validation=None)
    chosen = np.arange(300) * 2 + data.choice
    rejected = np.arange(300) * 2 + 1 - data.choice
    difference = encoder.responses[chosen] - encoder.responses[rejected]
    both = np.concatenate([difference, -difference])
    peer = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-8).fit(both, np.repeat([1, 0], 300))
    assert model.head.linear.weight.detach().numpy()[0] == pytest.approx(peer.coef_[0], abs=2e-3)


def test_fits_repeat_and_leave_the_callers_randomness_alone():
    data, encoder, _ = planted(pairs=100)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = PreferenceModel(encoder, partial(TwoLayerHead, dropout=0.2)).fit(data, epochs=3, seed=1)
    assert torch.equal(torch.rand(1), expected)
    second = PreferenceModel(encoder, partial(TwoLayerHead, dropout=0.2)).fit(data, epochs=3, seed=1)
    other = PreferenceModel(encoder, partial(TwoLayerHead, dropout=0.2)).fit(data, epochs=3, seed=2)
    rows = np.arange(50)
    assert torch.equal(first.score(rows, rows), second.score(rows, rows))
    assert not torch.equal(first.score(rows, rows), other.score(rows, rows))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", [3, 8, 10])
def test_an_interrupted_fit_goes_on_to_the_same_result(tmp_path, at):
    data, encoder, _ = planted(pairs=100)
    make = partial(PreferenceModel, encoder, partial(TwoLayerHead, dropout=0.3))
    options = {"epochs": 4, "batch_size": 20, "checkpoint_steps": 2, "schedule": "cosine", "warmup": 0.2}
    straight = make().fit(data, **options)

    def stop(progress):
        if progress.step == at:
            raise Interrupted

    path = tmp_path / "fit.pt"
    with pytest.raises(Interrupted):
        make().fit(data, checkpoint=path, progress=stop, **options)
    assert path.exists()
    steps = []
    resumed = make().fit(data, checkpoint=path, progress=lambda p: steps.append(p.step), **options)
    assert steps[0] > 1
    assert not path.exists()
    rows = np.arange(100)
    assert torch.equal(straight.score(rows, rows), resumed.score(rows, rows))
    assert resumed.history == straight.history


def test_checkpoints_of_other_fits_and_damaged_ones_are_refused(tmp_path):
    data, encoder, _ = planted(pairs=60)
    path = tmp_path / "fit.pt"

    def stop(progress):
        if progress.epoch == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        PreferenceModel(encoder, LinearHead).fit(data, checkpoint=path, progress=stop)
    with pytest.raises(InvalidInputError, match="checkpoint of a fit of other data"):
        PreferenceModel(encoder, LinearHead).fit(data, checkpoint=path, learning_rate=0.5)
    with pytest.raises(InvalidInputError, match="checkpoint of a fit of other data"):
        PreferenceModel(encoder, LinearHead).fit(planted(pairs=60, seed=1)[0], checkpoint=path)
    path.write_bytes(b"broken")
    with pytest.raises(InvalidInputError, match="not a readable checkpoint"):
        PreferenceModel(encoder, LinearHead).fit(data, checkpoint=path)


def test_early_stopping_keeps_the_best_weights():
    data, encoder, _ = planted(pairs=40, width=30, strength=1.0)
    model = PreferenceModel(encoder, LinearHead)
    model.fit(data, epochs=60, learning_rate=0.3, patience=2, validation=0.5, batch_size=8)
    losses = [record["validation_loss"] for record in model.history]
    assert len(losses) == int(np.argmin(losses)) + 3
    held = data.select(data.held_out("prompt", 0.5, 0))
    assert model.evaluate(held)["loss"] == pytest.approx(min(losses), rel=1e-5)


def test_given_validation_and_progress():
    data, encoder, _ = planted(pairs=60)
    seen = []
    model = PreferenceModel(encoder, LinearHead)
    model.fit(
        data.select(np.arange(50)),
        validation=data.select(np.arange(50, 60)),
        epochs=2,
        batch_size=20,
        progress=seen.append,
    )
    assert [(p.epoch, p.step, p.steps) for p in seen] == [
        (1, 1, 6),
        (1, 2, 6),
        (1, 3, 6),
        (2, 4, 6),
        (2, 5, 6),
        (2, 6, 6),
    ]
    assert seen[0].validation is None
    assert seen[-1].validation == model.history[0]["validation_loss"]


def test_accumulated_passes_are_one_batch():
    data, encoder, _ = planted(pairs=64)
    options = {"validation": None, "batch_size": 32, "epochs": 2}
    whole = PreferenceModel(encoder, LinearHead).fit(data, **options)
    parts = PreferenceModel(encoder, LinearHead).fit(data, accumulate=4, **options)
    assert torch.allclose(whole.head.linear.weight, parts.head.linear.weight, atol=1e-6)


def test_shuffled_blocks_see_everything_once():
    from polyreward.reward_models.fitting import _shuffled

    index = np.arange(3, 20)
    found = _shuffled(index, 4, [0, 1])
    assert sorted(found.tolist()) == index.tolist()
    assert found.tolist() != index.tolist()


@pytest.mark.parametrize("likelihood", [BradleyTerry(smoothing=0.05, centering=0.01), PlackettLuce(), Regression()])
def test_lists_of_texts_with_every_likelihood(likelihood):
    words = ["poor", "fair", "good", "superb"]
    records = [Preference(f"p{i}", [f"a {w} answer" for w in words], ratings=[1, 2, 3, 4]) for i in range(30)]
    data = PreferenceData.of(records, scale=(1, 4))
    model = PreferenceModel(HashingEncoder(64, (1, 1)), partial(LinearHead, bias=True), likelihood)
    model.fit(data, epochs=60, learning_rate=0.1)
    scores = model.score(["p"] * 4, [f"a {w} answer" for w in words]).tolist()
    assert scores == sorted(scores)
    assert model.evaluate(data)["accuracy"] == 1.0
    assert float(model.probability(["p"], ["a superb answer"], ["a poor answer"])) > 0.8
    reward = as_reward(model, "words")
    assert reward(prompts=["p"], completions=["a good answer"], annotator=[None]) == pytest.approx([scores[2]])
    assert model.score([], []).shape == (0,)


def test_a_head_of_ones_own_with_annotators_and_prompts(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(800, 4)).astype(np.float32)
    encoder = Features(features, np.zeros((400, 2), np.float32), name="people")
    who = np.where(rng.random(400) < 0.5, "ann", "bob")
    # the two like opposite ends of the first feature, and agree on the second
    liked = features[:, 1] + np.repeat(np.where(who == "ann", 2.0, -2.0), 2) * features[:, 0]
    choice = liked.reshape(-1, 2).argmax(1)
    data = PreferenceData(np.arange(400), np.arange(800), choice=choice, annotators=who.tolist())
    model = PreferenceModel(encoder, PersonalHead).fit(data, epochs=40, learning_rate=0.05, batch_size=100)
    assert model.evaluate(data)["accuracy"] > 0.95
    assert model.annotators == tuple(dict.fromkeys(who.tolist()))
    assert model.head.seen[0] == 0
    assert 0.5 < model.head.seen[-1] < 1
    best = int(features[:, 0].argmax())
    prompts = [0, 0]
    ann, bob = (model.score(prompts, [best, 0], annotator=name)[0] for name in ("ann", "bob"))
    assert ann > bob
    with pytest.warns(UnknownAnnotatorWarning, match=r"1 unknown annotators \(eve\)"):
        eve = model.score(prompts, [best, 0], annotator=["eve", "ann"])
    population = model.score(prompts, [best, 0])
    assert float(eve[0]) == float(population[0])
    assert model.knows(["eve", "ann"]).tolist() == [False, True]
    assert model.history[-1].keys() >= {"loss", "accuracy", "validation_loss"}
    with pytest.raises(InvalidInputError, match="annotator has 3 entries for 2"):
        model.score(prompts, [best, 0], annotator=["a"] * 3)
    model.save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match=r"PersonalHead is not polyreward's own; pass head="):
        PreferenceModel.from_pretrained(tmp_path, encoder=encoder)
    head = PersonalHead(4)
    head.own = nn.Embedding(3, 4)
    back = PreferenceModel.from_pretrained(tmp_path, encoder=encoder, head=head)
    assert torch.equal(back.score(prompts, [best, 0], annotator="ann")[:1], ann[None])


def test_a_head_that_reads_prompts_needs_an_encoder_that_gives_them():
    data, encoder, _ = planted(pairs=20)

    class NoPrompts:
        identity = "none"
        encode = encoder.encode

    with pytest.raises(InvalidInputError, match="none cannot encode it"):
        PreferenceModel(NoPrompts(), PersonalHead).fit(data)


def test_penalties_join_the_loss():
    data, encoder, _ = planted(pairs=200)
    calls = []

    class Shrink(nn.Module):
        def prepare(self, table, features):
            calls.append((len(table), len(features)))

        def forward(self, scores, comparisons):
            assert scores.shape == comparisons.row.shape
            return 10.0 * scores.square().mean()

    free = PreferenceModel(encoder, LinearHead).fit(data, learning_rate=0.05)
    held = PreferenceModel(encoder, LinearHead, penalties=[Shrink()]).fit(data, learning_rate=0.05)
    assert held.head.linear.weight.norm() < 0.3 * free.head.linear.weight.norm()
    assert calls == [(200, 400)]


@pytest.mark.parametrize("encoder", [HashingEncoder(32), "cached"])
def test_models_survive_saving(tmp_path, encoder):
    encoder = CachedEncoder(HashingEncoder(32), tmp_path / "cache") if encoder == "cached" else encoder
    data = PreferenceData.pairs(
        [f"p{i}" for i in range(20)], ["good one"] * 20, ["bad one"] * 20, annotators=["x"] * 20
    )
    model = PreferenceModel(encoder, partial(TwoLayerHead, hidden=8), BradleyTerry(theta=2.0)).fit(data, epochs=2)
    model.save_pretrained(tmp_path / "model")
    back = PreferenceModel.from_pretrained(tmp_path / "model")
    texts = ["good one", "bad one", "something else"]
    assert torch.equal(back.score(["p"] * 3, texts), model.score(["p"] * 3, texts))
    assert back.likelihood == BradleyTerry(theta=2.0)
    assert back.encoder == HashingEncoder(32)
    assert back.annotators == ("x",)
    assert back.head.config == model.head.config
    card = (tmp_path / "model" / "README.md").read_text()
    assert "TwoLayerHead" in card
    assert "hashing-32" in card


def test_checkpoints_of_another_architecture_are_refused(tmp_path):
    data, encoder, _ = planted(pairs=20)
    PreferenceModel(encoder, LinearHead).fit(data, epochs=1).save_pretrained(tmp_path)
    load = partial(PreferenceModel.from_pretrained, tmp_path)
    with pytest.raises(InvalidInputError, match=r"'linear.weight' has shape \(1, 8\), expected \(1, 5\)"):
        load(encoder=encoder, head=LinearHead(5))
    with pytest.raises(InvalidInputError, match="another architecture than TwoLayerHead"):
        load(encoder=encoder, head=TwoLayerHead(8))
    with pytest.raises(InvalidInputError, match=r"fitted on features of 'planted \(8\)', got 'features \(8\)'"):
        load(encoder=Features(np.zeros((2, 8), np.float32)))
    with pytest.raises(InvalidInputError, match="loaded without its encoder"):
        load().score(["p"], ["a"])
    config = json.loads((tmp_path / "config.json").read_text())
    config["head"]["part"] = "os:system"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInputError, match="not polyreward's own"):
        load(encoder=encoder)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InvalidInputError, match=r"not a reward model of polyreward .*'llama'"):
        load()
    with pytest.raises(MissingFileError, match=r"no config\.json"):
        PreferenceModel.from_pretrained(tmp_path / "nowhere")


def test_damaged_weights_are_named(tmp_path):
    data, encoder, _ = planted(pairs=20)
    PreferenceModel(encoder, LinearHead).fit(data, epochs=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InvalidInputError, match=r"model\.safetensors is not a readable"):
        PreferenceModel.from_pretrained(tmp_path, encoder=encoder)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"model\.safetensors does not exist"):
        PreferenceModel.from_pretrained(tmp_path, encoder=encoder)


def test_features_that_are_no_numbers_are_named():
    data, encoder, _ = planted(pairs=20)
    features = encoder.responses.copy()
    features[7, 2] = np.nan
    with pytest.raises(InvalidInputError, match=r"planted, row 4: the features of response 1 are NaN .*row 7"):
        PreferenceModel(Features(features), LinearHead).fit(data, validation=None)
    model = PreferenceModel(encoder, LinearHead).fit(data, epochs=1)
    model.encoder = Features(features)
    with pytest.raises(InvalidInputError, match="features of completion 1 are NaN"):
        model.score([0, 0], [6, 7])


def test_data_of_one_class_are_refused():
    texts = {"prompts": ["p", "q"], "responses": ["a", "b", "c", "d"]}
    model = PreferenceModel(HashingEncoder(16), LinearHead)
    with pytest.raises(InvalidInputError, match="none of the 2 comparisons prefers"):
        model.fit(PreferenceData(**texts, choice=[-1, -1]))
    with pytest.raises(InvalidInputError, match="none of the 2 comparisons prefers"):
        model.fit(PreferenceData(**texts, ratings=[3, 3, 2, np.nan]))
    with pytest.raises(InvalidInputError, match="only the rating 3"):
        PreferenceModel(HashingEncoder(16), LinearHead, Regression()).fit(
            PreferenceData(**texts, ratings=[3, 3, 3, np.nan])
        )
    with pytest.raises(InvalidInputError, match="has no ratings"):
        PreferenceModel(HashingEncoder(16), LinearHead, Regression()).fit(PreferenceData(**texts, choice=[0, 1]))


def test_identical_responses_are_dropped_and_counted_in_a_fit():
    data = PreferenceData.pairs(["p", "q", "r"], ["a", "good", "good"], ["a", "bad", "bad"])
    with pytest.warns(IdenticalResponsesWarning, match="dropped 1 of 3"):
        PreferenceModel(HashingEncoder(16), LinearHead).fit(data, epochs=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epoch": 3}, UnknownNameError, "did you mean 'epochs'"),
        ({"optimizer": "adam"}, UnknownNameError, "did you mean 'adamw'"),
        ({"epochs": 0}, InvalidInputError, "epochs must be"),
        ({"batch_size": 2.5}, InvalidInputError, "batch_size must be"),
        ({"learning_rate": float("nan")}, InvalidInputError, "learning_rate must be"),
        ({"warmup": 1.0}, InvalidInputError, "warmup"),
        ({"validation": 1.5}, InvalidInputError, "fraction between 0 and 1"),
    ],
)
def test_wrong_options(options, error, message):
    data, encoder, _ = planted(pairs=10)
    with pytest.raises(error, match=message):
        PreferenceModel(encoder, LinearHead).fit(data, **options)


def test_wrong_calls():
    data, encoder, _ = planted(pairs=10)
    model = PreferenceModel(encoder, LinearHead)
    with pytest.raises(InvalidInputError, match="has not been fitted"):
        model.score([0], [0])
    with pytest.raises(InvalidInputError, match="expected PreferenceData"):
        model.fit([("a", "b")])
    with pytest.raises(InvalidInputError, match="has no comparisons"):
        model.fit(data.select([]))
    with pytest.raises(InvalidInputError, match="split by prompt needs two"):
        model.fit(PreferenceData([0] * 10, np.arange(20), choice=[0] * 10))
    model.fit(data, epochs=1)
    with pytest.raises(InvalidInputError, match="1 prompts and 2 completions"):
        model.score([0], [0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.score([0], [0], annotator="anyone")  # a model without annotators has nothing to warn of


def test_heads():
    with pytest.raises(InvalidInputError, match="activation must be one of"):
        TwoLayerHead(4, activation="step")
    with pytest.raises(InvalidInputError, match="layers"):
        TwoLayerHead(4, layers=0)
    assert sum(p.numel() for p in TwoLayerHead(4, hidden=3, layers=3).parameters()) == 15 + 12 + 4

    class Wrong(LinearHead):
        def forward(self, items):
            return super().forward(items)[1:]

    data, encoder, _ = planted(pairs=10)
    with pytest.raises(InvalidInputError, match=r"Wrong returned shape"):
        PreferenceModel(encoder, Wrong).fit(data)
