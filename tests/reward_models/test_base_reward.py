import math

import numpy as np
import planted_preferences
import pytest
import tiny_models
import tiny_vision_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.preferences import PreferenceData
from polyreward.reward_models.base_reward import (
    HybridReward,
    RewardHead,
    ScalarRewardModel,
    ZeroPenalty,
    base_reward,
    combine_rewards,
    grouped_accuracy,
    length_normalize,
    mixture_ablation,
    pair_accuracy,
    pairwise_loss,
)
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.likelihoods import bradley_terry_loss
from polyreward.reward_models.modality import ModalityRouter, holds_images
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.multimodal_encoders import MultimodalEncoder
from polyreward.reward_models.parts import load_reward_model

QUESTION, IMAGE = tiny_vision_models.question, tiny_vision_models.image
floats = st.floats(-30, 30)


def test_losses_by_hand():
    won, lost = torch.tensor([1.5]), torch.tensor([-0.5])
    assert float(pairwise_loss(won, lost)) == pytest.approx(0.126928, abs=1e-6)
    assert float(pairwise_loss(won, lost, 0.1)) == pytest.approx(0.251928, abs=1e-6)
    assert float(pairwise_loss(won, lost, 0.1, squares="sum")) == pytest.approx(0.376928, abs=1e-6)


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=6), st.floats(0, 1), floats)
def test_the_pairwise_loss_is_a_plain_loop(pairs, zero, shift):
    won, lost = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    expected = np.mean([np.logaddexp(0, -(w - l)) + zero * 0.5 * (w * w + l * l) for w, l in pairs])
    assert float(pairwise_loss(won, lost, zero)) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert torch.equal(pairwise_loss(won, lost, 0.0), bradley_terry_loss(won - lost))
    assert float(pairwise_loss(won + shift, lost + shift)) == pytest.approx(float(pairwise_loss(won, lost)), abs=1e-9)


def test_the_regulariser_centres_the_pair():
    pair = torch.tensor([3.0, 1.0], requires_grad=True)
    for _ in range(300):
        (slope,) = torch.autograd.grad(pairwise_loss(pair[:1], pair[1:], 0.5), pair)
        with torch.no_grad():
            pair -= 0.1 * slope
    assert float(pair.mean().detach()) == pytest.approx(0, abs=1e-4)
    assert float((pair[0] - pair[1]).detach()) > 0


def test_the_penalty_is_the_term_of_the_loss():
    data = PreferenceData(np.arange(3), np.arange(6), choice=[0, 1, 0])
    comparisons = ComparisonTable(data).batch(np.arange(3))
    scores = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0, -2.0])
    won, lost = scores[[0, 3, 4]], scores[[1, 2, 5]]
    for squares in ("half", "sum"):
        term = pairwise_loss(won, lost, 0.3, squares) - pairwise_loss(won, lost)
        assert float(ZeroPenalty(0.3, squares)(scores, comparisons)) == pytest.approx(float(term), rel=1e-5)


@pytest.mark.parametrize("bad", [-0.1, math.inf, math.nan])
def test_weights_of_the_regulariser(bad):
    for call in (lambda: pairwise_loss(torch.ones(1), torch.ones(1), bad), lambda: ZeroPenalty(bad)):
        with pytest.raises(InvalidInputError, match="zero_coef must be"):
            call()
    with pytest.raises(InvalidInputError, match="squares must be"):
        ZeroPenalty(0.1, "both")
    for shape in ((2,), (0,)):
        with pytest.raises(InvalidInputError, match="expected the same, not empty"):
            pairwise_loss(torch.ones(shape), torch.ones(shape if shape == (0,) else (3,)))


def test_length_normalisation_and_its_trap():
    r = torch.tensor([-4.0, -2.0])
    found = length_normalize(r, torch.tensor([100, 3]))
    assert found.tolist() == pytest.approx([-4 / math.log(100), -2 / math.log(3)])
    # the longer and worse one is better now
    assert r[0] < r[1]
    assert found[0] > found[1]
    with pytest.raises(InvalidInputError, match=r"length 1 is 1: .* at least 2"):
        length_normalize(r, torch.tensor([5, 1]))
    with pytest.raises(InvalidInputError, match="expected the same"):
        length_normalize(r, torch.tensor([5]))


def test_accuracies_of_the_example():
    won = np.array([1, 1, 0, 1, 1, 1.0])
    lost = 1 - won
    groups = ["a", "a", "a", "b", "b", "b"]
    assert pair_accuracy(won, lost) == pytest.approx(5 / 6)
    assert grouped_accuracy(won, lost, groups) == pytest.approx(1 / 2)
    assert pair_accuracy(torch.tensor(won), torch.tensor(lost)) == pytest.approx(5 / 6)
    assert grouped_accuracy(torch.tensor(won), torch.tensor(lost), torch.tensor([0, 0, 0, 1, 1, 1])) == 0.5
    # ties and NaN are wrong
    assert pair_accuracy(np.array([1.0, np.nan, 2.0]), np.array([1.0, 0.0, 1.0])) == pytest.approx(1 / 3)
    with pytest.raises(InvalidInputError, match="groups must name"):
        grouped_accuracy(won, lost, [0])
    with pytest.raises(InvalidInputError, match="not empty"):
        pair_accuracy([], [])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=20))
def test_acc_plus_is_at_most_acc_where_groups_are_equally_large(rows):
    won, lost, groups = (np.array(column) for column in zip(*rows, strict=True))
    by_group: dict[int, list[bool]] = {}
    for w, l, g in rows:
        by_group.setdefault(g, []).append(w > l)
    assert grouped_accuracy(won, lost, groups) == pytest.approx(np.mean([all(v) for v in by_group.values()]))
    if len({len(v) for v in by_group.values()}) == 1:
        assert grouped_accuracy(won, lost, groups) <= pair_accuracy(won, lost) + 1e-12
    if all(len(v) == 1 for v in by_group.values()):
        assert grouped_accuracy(won, lost, groups) == pytest.approx(pair_accuracy(won, lost))


def test_ensembles_of_the_same_member_are_the_member():
    rng = np.random.default_rng(0)
    scores = np.tile(rng.normal(size=7), (3, 1))
    reference = np.tile(rng.normal(size=20), (3, 1))
    alone = (scores[0] - reference[0].mean()) / reference[0].std()
    assert np.allclose(combine_rewards(scores), scores[0])
    assert np.allclose(combine_rewards(scores, reference=reference), alone)
    assert np.allclose(combine_rewards(scores, "weighted", weights=[1, 2, 3]), scores[0])


@given(st.integers(0, 10**6), st.floats(0.01, 100), floats)
def test_a_member_s_scale_does_not_matter_once_standardised(seed, scale, shift):
    rng = np.random.default_rng(seed)
    scores, reference = rng.normal(size=(3, 6)), rng.normal(size=(3, 12))
    other, other_reference = scores.copy(), reference.copy()
    other[1], other_reference[1] = scale * other[1] + shift, scale * other_reference[1] + shift
    for mode in ("mean", "weighted"):
        weights = [1, 2, 3] if mode == "weighted" else None
        found = [
            combine_rewards(s, mode, weights=weights, reference=r)
            for s, r in ((scores, reference), (other, other_reference))
        ]
        assert np.allclose(found[0], found[1], atol=1e-6)
    assert np.allclose(combine_rewards(scores, "vote"), combine_rewards(other, "vote"))


@given(st.integers(0, 10**6))
def test_votes_are_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    members, samples = int(rng.integers(1, 4)), int(rng.integers(1, 9))
    scores, groups = rng.integers(0, 4, size=(members, samples)).astype(float), rng.integers(0, 3, size=samples)
    expected = np.zeros(samples)
    for b in range(samples):
        others = [c for c in range(samples) if c != b and groups[c] == groups[b]]
        for m in range(members):
            votes = [1.0 if scores[m, b] > scores[m, c] else 0.5 * (scores[m, b] == scores[m, c]) for c in others]
            expected[b] += (np.mean(votes) if votes else 0.5) / members
    assert np.allclose(combine_rewards(scores, "vote", groups=groups), expected)
    assert np.allclose(combine_rewards(torch.from_numpy(scores), "vote", groups=torch.from_numpy(groups)), expected)


def test_a_weight_of_one_is_that_member():
    scores = torch.tensor([[1.0, 2.0], [5.0, -3.0]], dtype=torch.bfloat16)
    found = combine_rewards(scores, "weighted", weights=[1, 0])
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [1.0, 2.0]
    two = combine_rewards(np.array([[1.0, 2.0], [3.0, 2.5], [0.0, 1.0]]), "vote")
    assert two.tolist() == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "weighted"}, "takes weights"),
        ({"weights": [1, 1]}, "takes no weights"),
        ({"mode": "weighted", "weights": [1, -1]}, "numbers of at least 0"),
        ({"mode": "weighted", "weights": [0, 0]}, "not all 0"),
        ({"reference": np.ones((2, 4))}, "model 0 scores the reference all the same"),
        ({"reference": np.ones((1, 4))}, r"expected \(2, samples\)"),
        ({"mode": "vote", "groups": [1]}, "groups must name"),
    ],
)
def test_what_an_ensemble_refuses(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        combine_rewards(np.array([[1.0, 2.0], [2.0, 1.0]]), **arguments)


def test_unknown_modes_and_scores_that_are_not_finite():
    with pytest.raises(UnknownNameError, match="did you mean 'mean'"):
        combine_rewards(np.ones((2, 2)), "meen")
    with pytest.raises(InvalidInputError, match="must be finite"):
        combine_rewards(np.array([[np.nan]]))


def test_leave_one_in():
    table = mixture_ablation({"code": [1, 2], "safety": [3]}, sum, lambda model: {"accuracy": model / 10})
    assert table == {"code": {"accuracy": 0.3}, "safety": {"accuracy": 0.3}}
    assert list(table) == ["code", "safety"]
    with pytest.raises(InvalidInputError, match="no data sets"):
        mixture_ablation({}, sum, len)


def test_the_rule_comes_first_and_the_model_where_it_says_nothing():
    class Model:
        def score(self, prompts, completions, **columns):
            return torch.tensor([columns["worth"][i] for i in range(len(completions))])

    def rule(prompts, completions, **columns):
        return [{"right": True, "wrong": False, "half": 0.5, "?": None, "nan": math.nan}[c] for c in completions]

    reward = HybridReward(rule, Model())
    completions = ["right", "wrong", "half", "?", "nan", "right", "?"]
    worth = [-9.0, 2.0, 2.0, 0.0, -2.0, math.nan, math.nan]
    found = reward(["p"] * 7, completions, worth=worth)
    sigma = 1 / (1 + math.exp(-2))
    assert found[:5] == pytest.approx([1.0, sigma, sigma, 0.5, 1 - sigma])
    assert found[5:] == [1.0, None]
    assert HybridReward(rule, lambda p, c: [-1e9, None])(["p"] * 2, ["?", "?"]) == [0.0, None]
    assert reward.__name__ == "hybrid_reward"
    with pytest.raises(InvalidInputError, match="the rule gave 1 results for 2"):
        HybridReward(lambda p, c: [1], lambda p, c: [0.0, 0.0])(["p"] * 2, ["a", "b"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["last", "first", "mean"])
def test_the_last_token_that_is_no_padding(side, pooling):
    class Toy(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return torch.nn.functional.one_hot(input_ids, 8).float()

    class Sum(torch.nn.Module):
        def forward(self, states):
            return states @ torch.arange(8.0)

    rows = [[3, 5, 4], [6]]
    padded = [([0] * (4 - len(r)) + r) if side == "left" else r + [0] * (4 - len(r)) for r in rows]
    mask = [([0] * (4 - len(r)) + [1] * len(r)) if side == "left" else [1] * len(r) + [0] * (4 - len(r)) for r in rows]
    model = ScalarRewardModel(Toy(), Sum(), pooling)
    found = model(torch.tensor(padded), torch.tensor(mask))
    assert found.tolist() == {"last": [4, 6], "first": [3, 6], "mean": [4, 6]}[pooling]
    with pytest.raises(InvalidInputError, match="sequence 1 is padding only"):
        model(torch.tensor(padded), torch.tensor([mask[0], [0] * 4]))


def test_a_scalar_model_of_transformers():
    model = ScalarRewardModel(tiny_models.model(), RewardHead(16))
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    rewards = model(ids, mask)
    assert rewards.shape == (2,)
    assert torch.allclose(model(ids[:1, :3]), rewards[:1], atol=1e-6)
    rewards.sum().backward()
    assert model.head.network[0].weight.grad.any()
    with pytest.raises(UnknownNameError, match="unknown pooling 'lst'; did you mean 'last'"):
        ScalarRewardModel(tiny_models.model(), RewardHead(16), "lst")


def test_the_preset_fits_and_survives_saving(tmp_path):
    data, features, _ = planted_preferences.planted(300)
    model = base_reward(features, zero_coef=0.01).fit(data, epochs=20, batch_size=64, validation=None)
    assert model.head.config["num_layers"] == 2
    assert model.evaluate(data)["accuracy"] > 0.75
    model.save_pretrained(tmp_path)
    back = PreferenceModel.from_pretrained(tmp_path, encoder=features)
    assert torch.equal(back.score(np.arange(5), np.arange(5)), model.score(np.arange(5), np.arange(5)))
    free = base_reward(features).fit(data, epochs=20, batch_size=64, validation=None)
    assert free.score(np.arange(9), np.arange(9)).abs().mean() > model.score(np.arange(9), np.arange(9)).abs().mean()


def test_prompts_with_images():
    prompts = [
        "text",
        QUESTION(IMAGE(True)),
        [{"role": "user", "content": "text"}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        3,
    ]
    assert holds_images(prompts).tolist() == [False, True, False, False, False]


def test_a_router_asks_the_model_of_the_modality(tmp_path):
    def frozen():
        return MultimodalEncoder(tiny_vision_models.model(), tiny_vision_models.processor(), name="tiny-vlm")

    prompts = [QUESTION(IMAGE(i % 4 == 0, seed=i)) if i % 2 == 0 else "the cat" for i in range(20)]
    data = PreferenceData.pairs(prompts, ["good"] * 20, ["bad"] * 20)
    router = ModalityRouter(base_reward(frozen()), base_reward(frozen()))
    router.fit(data, epochs=2, validation=None)
    words = ["good"] * 20
    scores = router.score(prompts, words)
    assert torch.equal(scores[::2], router.multimodal_rm.score(prompts[::2], words[::2]))
    assert torch.equal(scores[1::2], router.text_rm.score(prompts[1::2], words[1::2]))
    assert router.as_reward()(prompts, words) == pytest.approx(scores.tolist())
    assert router.score([], []).shape == (0,)
    # the text model has seen texts alone, the other one everything
    for model, rows in ((router.text_rm, np.arange(20) % 2 == 1), (router.multimodal_rm, np.ones(20, bool))):
        fitted = base_reward(frozen()).fit(data.select(rows), epochs=2, validation=None)
        assert torch.equal(fitted.score(prompts, words), model.score(prompts, words))
    router.save_pretrained(tmp_path)
    given = {"encoder": frozen()}
    back = ModalityRouter.from_pretrained(tmp_path, text=given, multimodal=given)
    assert torch.equal(back.score(prompts, words), scores)
    assert isinstance(load_reward_model(tmp_path, text=given, multimodal=given), ModalityRouter)


def test_a_router_hands_columns_on_and_checks_what_comes_back():
    seen = []

    def text(prompts, completions, user, scale):
        seen.append((list(prompts), user, scale))
        return [scale] * len(completions)

    router = ModalityRouter(text, lambda prompts, completions, **columns: torch.zeros(len(completions) + 1))
    assert router.score(["a", "b"], ["x", "y"], user=["u", "v"], scale=2.0).tolist() == [2.0, 2.0]
    assert seen == [(["a", "b"], ["u", "v"], 2.0)]
    with pytest.raises(InvalidInputError, match=r"returned shape \(2,\) for 1 completions"):
        router.score([QUESTION(IMAGE(True))], ["x"])
    with pytest.raises(InvalidInputError, match="1 prompts and 2 completions"):
        router.score(["a"], ["x", "y"])
    images = PreferenceData.pairs([QUESTION(IMAGE(True))], ["a"], ["b"])
    with pytest.raises(InvalidInputError, match="no prompts without images"):
        router.fit(images)
