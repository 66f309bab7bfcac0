from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.preferences import Preference, PreferenceData
from polyreward.reward_models.bias_fitting import decorrelation_loss, fitting_loss
from polyreward.reward_models.bias_penalty import BiasPenalty, spread, with_attribute, word_count
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.encoders import Features, HashingEncoder
from polyreward.reward_models.heads import LinearHead, TwoLayerHead
from polyreward.reward_models.length_bias import confound_split_accuracy, correlation_ratio, identity_fitter
from polyreward.reward_models.likelihoods import BradleyTerry, PlackettLuce
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.ordinal_likelihood import OrdinalHead, OrdinalLikelihood


def biased(pairs=600, seed=0):
    """Quality in one feature, length in another; people like length too, up to 200."""
    rng = np.random.default_rng(seed)
    quality, length = rng.normal(size=2 * pairs), rng.integers(5, 400, size=2 * pairs)
    features = np.stack([quality, length / 400, np.minimum(length, 200) / 200, rng.normal(size=2 * pairs)], axis=1)
    liked = 2 * quality + 6 * np.minimum(length, 200) / 200
    noise = rng.logistic(size=pairs)
    data = PreferenceData(
        np.arange(pairs),
        np.arange(2 * pairs),
        choice=(liked[1::2] - liked[::2] > noise).astype(int),
        columns={"length": length.reshape(-1, 2).astype(np.float32)},
    )
    return data, Features(features.astype(np.float32), name="biased"), quality, length


OPTIONS = {"epochs": 40, "batch_size": 100, "learning_rate": 0.02, "validation": None, "weight_decay": 0.0}


def records(*rows, **columns):
    made = [
        Preference(f"p{i}", row, choice=choice, columns={k: v[i] for k, v in columns.items()})
        for i, (row, choice) in enumerate(rows)
    ]
    return PreferenceData.of(made)


def batch_of(data):
    return ComparisonTable(data).batch(np.arange(len(data)))


def in_phase(penalty, share, steps=1):
    for _ in range(steps):
        penalty.step(share)
    return penalty.train()


@pytest.mark.parametrize(
    ("head", "likelihood"),
    [
        (partial(TwoLayerHead, hidden=16), BradleyTerry()),
        (partial(TwoLayerHead, hidden=16), PlackettLuce()),
        (partial(OrdinalHead, hidden=16), OrdinalLikelihood()),
    ],
)
def test_it_takes_the_bias_from_any_head_and_likelihood(head, likelihood):
    data, encoder, quality, length = biased()
    rows = np.arange(len(length))
    scores = {}
    for name, penalties in (("plain", ()), ("debiased", (BiasPenalty(warmup=0.3, fit=0.1),))):
        model = PreferenceModel(encoder, head, likelihood, penalties=penalties).fit(data, **OPTIONS | {"epochs": 50})
        scores[name] = model.score(rows, rows).numpy()
    assert correlation_ratio(scores["debiased"], length) < 0.6 * correlation_ratio(scores["plain"], length)
    right = (quality[::2] > quality[1::2])[:, None] == np.array([True, False])
    won, lost = np.where(right[:, 0], 0, 1), np.where(right[:, 0], 1, 0)
    at = np.arange(len(won))
    pairs = [2 * at + won, 2 * at + lost]
    accuracy = {
        name: confound_split_accuracy(s[pairs[0]], s[pairs[1]], length[pairs[0]], length[pairs[1]])
        for name, s in scores.items()
    }
    assert accuracy["debiased"].overall > accuracy["plain"].overall + 0.04
    assert accuracy["debiased"].less > accuracy["plain"].less + 0.08


def test_phases_and_the_gradients_of_each():
    data = biased(8)[0]
    batch = batch_of(data)
    penalty = BiasPenalty(warmup=0.4, fit=0.2, period=2, weight=0.5, target=0.1)
    lengths = torch.tensor(data.columns["length"]).reshape(-1)
    r = torch.randn(16, generator=torch.Generator().manual_seed(0))

    def gradients(expected_turn, expected_phase):
        assert (penalty.turn, penalty.phase) == (expected_turn, expected_phase)
        scores = r.clone().requires_grad_()
        penalty.zero_grad()
        value = penalty(scores, batch)
        value.backward()
        on_scores = scores.grad is not None and bool(scores.grad.any())
        on_fitter = any(p.grad is not None for p in penalty.fitter.parameters())
        return float(value.detach()), on_scores, on_fitter

    in_phase(penalty, 0.0)
    assert gradients("reward", "warmup") == (0.0, False, False)
    assert not penalty.holds_model
    in_phase(penalty, 0.4)
    fitting = float(fitting_loss(r, penalty.fitter(lengths)).detach())
    assert gradients("fitter", "fit") == (pytest.approx(fitting), False, True)
    assert penalty.holds_model
    removing = float(0.5 * decorrelation_loss(r, penalty.fitter(lengths), 0.1).detach())
    for step, turn in enumerate(["fitter", "fitter", "reward", "reward", "fitter", "fitter"]):
        in_phase(penalty, 0.6 + 0.05 * step)
        value, on_scores, on_fitter = gradients(turn, "debias")
        assert (on_scores, on_fitter) == (turn == "reward", turn == "fitter")
        assert value == pytest.approx(removing if turn == "reward" else fitting)
        assert penalty.holds_model == (turn == "fitter")
    assert not penalty.eval().holds_model


def test_in_a_fit_only_one_of_the_two_networks_moves():
    data, encoder, _, _ = biased(100)
    penalty = BiasPenalty(warmup=0.3, fit=0.2, period=2)
    model = PreferenceModel(encoder, partial(TwoLayerHead, hidden=8), penalties=[penalty])
    seen = []

    def watch(progress):
        weights = [part.weight.detach().clone() for part in (model.head.network[0], penalty.fitter.head)]
        seen.append((penalty.turn, *weights))

    model.fit(data, **OPTIONS | {"epochs": 10, "batch_size": 20, "weight_decay": 0.1}, progress=watch)
    for (_, *before), (turn, *after) in pairwise(seen):
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert moved == [turn == "reward", turn == "fitter"]


def test_evaluation_is_charged_alike_in_all_phases():
    data = biased(50)[0]
    batch, lengths = batch_of(data), data.columns["length"].reshape(-1)
    scores = torch.tensor(lengths / 100) + torch.randn(100, generator=torch.Generator().manual_seed(0))
    penalty = BiasPenalty(weight=2.0, target=0.2)
    expected = 2 * abs(float(correlation_ratio(scores, torch.tensor(lengths))) ** 0.5 - 0.2)
    for share in (0.0, 0.5, 0.9):
        penalty.step(share)
        assert float(penalty.eval()(scores, batch)) == pytest.approx(expected, abs=1e-6)


def test_a_fitter_without_weights_has_no_turns():
    penalty = BiasPenalty(fitter=identity_fitter, warmup=0.1, fit=0.2)
    batch = batch_of(biased(8)[0])
    for share, value in ((0.0, 0.0), (0.2, 0.0), (0.5, None)):
        in_phase(penalty, share, 3)
        assert penalty.turn == "reward"
        assert not penalty.holds_model
        found = penalty(torch.randn(16, requires_grad=True), batch)
        assert found.requires_grad
        if value is not None:
            assert float(found.detach()) == value
    data, encoder, _, length = biased(200)
    model = PreferenceModel(encoder, LinearHead, penalties=[BiasPenalty(fitter=identity_fitter, weight=3.0)])
    model.fit(data, **OPTIONS)
    rows = np.arange(400)
    assert abs(np.corrcoef(model.score(rows, rows), length)[0, 1]) < 0.2


def test_fits_repeat_and_go_on_from_a_checkpoint(tmp_path):
    data, encoder, _, _ = biased(100)
    options = {**OPTIONS, "epochs": 6, "batch_size": 20, "checkpoint_steps": 2}

    def model():
        return PreferenceModel(
            encoder, partial(TwoLayerHead, dropout=0.2), penalties=[BiasPenalty(warmup=0.2, fit=0.2, period=3)]
        )

    rows = np.arange(200)
    straight = model().fit(data, **options)
    again = straight.score(rows, rows)
    # the same penalty begins anew
    assert torch.equal(straight.fit(data, **options).score(rows, rows), again)

    class Interrupted(Exception):
        pass

    for at in (9, 20, 27):

        def stop(progress, at=at):
            if progress.step == at:
                raise Interrupted

        path = tmp_path / f"{at}.pt"
        with pytest.raises(Interrupted):
            model().fit(data, checkpoint=path, progress=stop, **options)
        resumed = model().fit(data, checkpoint=path, **options)
        assert torch.equal(resumed.score(rows, rows), again)


def test_attributes_of_texts(tmp_path):
    rows = [(["a b c", "d"], 0), (["e", "f g"], 1), (["h i", "j", "k l m n"], 2)]
    data = with_attribute(records(*rows))
    assert word_count([{"role": "user", "content": "two words"}]) == 3  # the role counts
    assert np.array_equal(data.columns["length"], [[3, 1, np.nan], [1, 2, np.nan], [2, 1, 4]], equal_nan=True)
    penalty = BiasPenalty()
    assert penalty._values(batch_of(data)).tolist() == [3, 1, 1, 2, 2, 1, 4]
    assert penalty._values(batch_of(data.select([2, 0]))).tolist() == [2, 1, 4, 3, 1]
    # a function is applied when a fit begins, and other data are then not charged
    computed = BiasPenalty(len, warmup=0.0, fit=0.0, period=None)
    table = ComparisonTable(records(*rows))
    computed.prepare(table)
    assert computed._values(table.batch(np.array([1, 0]))).tolist() == [1, 3, 5, 1]
    other = batch_of(records(*rows))
    assert float(computed.eval()(torch.randn(7), other)) == 0
    model = PreferenceModel(HashingEncoder(64), LinearHead, penalties=[computed])
    model.fit(records(*rows), epochs=2, validation=None)
    assert np.isfinite(model.evaluate(records(*rows))["loss"])
    assert np.array_equal(spread(np.arange(3.0), np.array([2, 1])), [[0, 1], [2, np.nan]], equal_nan=True)


def test_columns_of_chosen_and_rejected():
    rows = [(["a", "b"], 0), (["a", "b"], 1), (["a", "b"], "tie")]
    data = records(*rows, chosen_length=[5.0, 6.0, 7.0], rejected_length=[1.0, 2.0, None])
    values = BiasPenalty()._values(batch_of(data))
    assert values[:5].tolist() == [5, 1, 2, 6, 7]
    assert torch.isnan(values[5])
    # what is unknown takes no part
    penalty = in_phase(BiasPenalty(fitter=identity_fitter, warmup=0, fit=0), 0.5)
    found = penalty(torch.arange(6.0), batch_of(data))
    known = decorrelation_loss(torch.arange(5.0), torch.tensor([5.0, 1, 2, 6, 7]))
    assert float(found) == pytest.approx(float(known))


def test_batches_without_variance_are_counted_and_harmless():
    data = with_attribute(records((["a", "b"], 0), (["c", "d"], 1)))
    penalty = in_phase(BiasPenalty(warmup=0, fit=0.5), 0.2)
    value = penalty(torch.randn(4, requires_grad=True), batch_of(data))
    value.backward()
    assert float(value.detach()) == 0
    assert penalty.degenerate == 1
    assert all(p.grad is None or not p.grad.any() for p in penalty.fitter.parameters())


def test_wrong_use():
    plain = records((["a", "b"], 0), lenght=[3.0])
    with pytest.raises(MissingColumnError, match=r"no numeric column 'length'; did you mean 'lenght'"):
        in_phase(BiasPenalty(), 0.5)(torch.zeros(2), batch_of(plain))
    single = records((["a", "b"], 0), length=[3.0])
    with pytest.raises(InvalidInputError, match="expected a value for each of 2 responses"):
        in_phase(BiasPenalty(), 0.5)(torch.zeros(2), batch_of(single))
    three = records((["a", "b", "c"], 0), chosen_length=[3.0], rejected_length=[2.0])
    with pytest.raises(InvalidInputError, match="speak of two responses"):
        in_phase(BiasPenalty(), 0.5)(torch.zeros(3), batch_of(three))
    with pytest.raises(InvalidInputError, match="row 1: the attribute 'length' is inf"):
        with_attribute(plain, lambda text: np.inf)
    with pytest.raises(InvalidInputError, match="row 1: the attribute 'length' of a response cannot be computed"):
        with_attribute(plain, lambda text: text)
    for wrong in ({"warmup": 0.8, "fit": 0.3}, {"warmup": -0.1}):
        with pytest.raises(InvalidInputError, match="shares of the steps"):
            BiasPenalty(**wrong)
    with pytest.raises(InvalidInputError, match="period"):
        BiasPenalty(period=0)
    # features that are not finite are named by the fit, not by the correlation
    data, encoder, _, _ = biased(20)
    encoder.responses[3] = np.nan
    with pytest.raises(InvalidInputError, match="row 2: the features of response 1 are NaN"):
        PreferenceModel(encoder, LinearHead, penalties=[BiasPenalty(warmup=0)]).fit(data, epochs=1, validation=None)
    assert isinstance(BiasPenalty().fitter, nn.Module)
