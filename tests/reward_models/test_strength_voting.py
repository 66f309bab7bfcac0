import warnings

import numpy as np
import pytest
import torch
from planted_preferences import planted

from polyreward.data.preference_strength import PreferenceCleaner, preference_strength
from polyreward.errors import InvalidInputError
from polyreward.preferences import PreferenceData
from polyreward.reward_models.encoders import Features, HashingEncoder
from polyreward.reward_models.ensembles import RewardEnsemble
from polyreward.reward_models.heads import LinearHead, TwoLayerHead
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.strength_voting import OverfittedVotersWarning, StrengthVoting

FIT = {"epochs": 8, "batch_size": 64, "learning_rate": 1e-2, "validation": None}


def noisy(pairs=300, noise=0.25, seed=0):
    """Certain preferences by a direction, a share of them turned round; and which."""
    data, encoder, direction = planted(pairs, seed=seed)
    score = encoder.responses @ direction
    wrong = np.random.default_rng(seed + 1).random(pairs) < noise
    choice = (score[1::2] > score[::2]).astype(int) ^ wrong
    return PreferenceData(data.prompts, data.responses, choice=choice, source="noisy"), encoder, wrong


def test_votes_are_the_differences_of_the_members():
    data, encoder, _ = noisy(100)
    model = PreferenceModel(encoder, TwoLayerHead)
    votes = StrengthVoting(model, voters=3)(data, seed=5, **FIT)
    members = RewardEnsemble.of(model, 3).fit(data, seed=5, **FIT).members
    rows = 2 * np.arange(100)
    chosen, rejected = rows + data.choice, rows + 1 - data.choice
    same = preference_strength(members, chosen, rejected, prompts=data.prompts)
    assert np.allclose(votes["raw"], same["raw"].numpy())
    assert np.allclose(votes["mean"], same["mean"].numpy(), atol=1e-6)
    assert np.allclose(votes["std"], same["std"].numpy(), atol=1e-6)
    assert not np.allclose(votes["raw"][0], votes["raw"][1])
    assert model.head is None


def test_wrong_labels_sink_and_cleaning_helps():
    data, encoder, wrong = noisy()
    model = PreferenceModel(encoder, LinearHead)
    votes = StrengthVoting(model, voters=3)(data, **FIT)
    order = votes["mean"].argsort()
    assert wrong[order[:30]].mean() > 0.9
    assert wrong[order[150:]].mean() < 0.05
    cleaned = PreferenceCleaner(flip_below=0.0, margin=False).clean(data, votes)
    flipped = cleaned.columns["flipped"]
    assert (flipped == wrong).mean() > 0.9
    truth = PreferenceData(data.prompts, data.responses, choice=data.choice ^ wrong)
    slow = {**FIT, "epochs": 20}
    before, after = (
        PreferenceModel(encoder, LinearHead).fit(d, **slow).evaluate(truth)["loss"] for d in (data, cleaned)
    )
    assert after < before


def test_target_and_margin_reach_the_fit():
    data, encoder, _ = noisy(60)
    full = {"optimizer": "lbfgs", "epochs": 10, "validation": None, "weight_decay": 0.1}
    sized = []
    for cleaner in (PreferenceCleaner(flip_fraction=0.0, soft="smooth", alpha=0.4, margin=False), PreferenceCleaner()):
        record = cleaner.clean(data, np.ones(60))
        model = PreferenceModel(encoder, LinearHead).fit(record, **full)
        sized.append(float(model.head.linear.weight.detach().norm()))
    plain = PreferenceModel(encoder, LinearHead).fit(data, **full)
    assert sized[0] < float(plain.head.linear.weight.detach().norm()) < sized[1]


def test_voters_that_know_the_labels_by_heart_are_told_and_folds_help():
    data, _, wrong = noisy(60)
    encoder = Features(np.eye(120, dtype=np.float32) * 10)  # nothing in common between two responses
    learned = {**FIT, "epochs": 60}
    with pytest.warns(OverfittedVotersWarning, match="fewer epochs, or pass folds"):
        votes = StrengthVoting(PreferenceModel(encoder, LinearHead), 2)(data, **learned)
    assert (votes["mean"] > 0).all()
    data, encoder, wrong = noisy(60)
    wide = Features(np.concatenate([encoder.responses, np.eye(120, dtype=np.float32) * 10], axis=1))
    model = PreferenceModel(wide, LinearHead)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OverfittedVotersWarning)
        inside = StrengthVoting(model, 2)(data, **learned)["mean"]
    outside = StrengthVoting(model, 2, folds=4)(data, **learned)["mean"]
    assert (inside[wrong] < 0).sum() < (outside[wrong] < 0).sum()


def test_folds_share_no_prompt_and_every_pair_gets_a_vote():
    data, encoder, _ = noisy(40)
    shared = PreferenceData(data.prompts // 4, data.responses, choice=data.choice)
    seen = []

    class Spy(PreferenceModel):
        def fit(self, preferences, **options):
            seen.append(set(np.asarray(preferences.prompts).tolist()))
            return super().fit(preferences, **options)

    votes = StrengthVoting(Spy(encoder, LinearHead), 2, folds=5)(shared, **FIT)
    assert (votes["raw"] != 0).all()
    assert len(seen) == 10
    for fitted in seen:
        assert len(fitted) == 8
    assert set.intersection(*seen) == set()


def test_division_by_each_voters_deviation():
    data, encoder, _ = noisy(80)
    model = PreferenceModel(encoder, LinearHead)
    plain = StrengthVoting(model, 3)(data, **FIT)["raw"]
    scaled = StrengthVoting(model, 3, scale="std")(data, **FIT)
    assert np.allclose(scaled["raw"], plain / plain.std(axis=1, keepdims=True))
    with pytest.raises(InvalidInputError, match="voter 0 sees the same difference"):
        StrengthVoting(model, 1, scale="std")(data, **{**FIT, "learning_rate": 0.0})


def test_texts_the_choice_second_and_equal_responses():
    prompts = [f"p{i}" for i in range(20)]
    answers = [text for i in range(20) for text in (("same", "same") if i == 3 else ("bad answer", "good answer"))]
    data = PreferenceData(prompts, answers, choice=np.ones(20, int))
    votes = StrengthVoting(PreferenceModel(HashingEncoder(64), LinearHead), 2)(data, **FIT)
    assert votes["mean"][3] == 0
    assert (np.delete(votes["mean"], 3) > 0).all()


def test_wrong_calls():
    data, encoder, _ = noisy(10)
    model = PreferenceModel(encoder, LinearHead)
    with pytest.raises(InvalidInputError, match="voters must be a whole number"):
        StrengthVoting(model, 0)
    with pytest.raises(InvalidInputError, match="folds must be a whole number"):
        StrengthVoting(model, folds=1.5)
    with pytest.raises(InvalidInputError, match="scale must be"):
        StrengthVoting(model, scale="sd")
    with pytest.raises(InvalidInputError, match="10 prompts for 11 folds"):
        StrengthVoting(model, 2, folds=11)(data)
    with pytest.raises(InvalidInputError, match="no comparisons"):
        StrengthVoting(model, 2)(data.select(np.zeros(0, int)))
    tied = PreferenceData(data.prompts, data.responses, choice=np.array([0] * 9 + [-1]), source="file")
    with pytest.raises(InvalidInputError, match="file, row 10: no response is preferred"):
        StrengthVoting(model, 2)(tied)
    lists = PreferenceData(np.zeros(1, int), np.arange(3), np.array([0, 3]), choice=np.array([0]))
    with pytest.raises(InvalidInputError, match="3 responses"):
        StrengthVoting(model, 2)(lists)

    class Broken(PreferenceModel):
        def score(self, prompts, completions, annotator=None, **columns):
            return torch.full((len(completions),), float("nan"))

    with pytest.raises(InvalidInputError, match="row 1: voter 0 gave a score that is NaN"):
        StrengthVoting(Broken(encoder, LinearHead), 2)(data, **FIT)
