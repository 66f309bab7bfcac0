import numpy as np
import pytest
import tiny_models
import tiny_vision_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.preferences import PreferenceData
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.contract import RewardModel
from polyreward.reward_models.heads import Scores
from polyreward.reward_models.likelihoods import PlackettLuce
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.multimodal_encoders import FineTunedMultimodalEncoder
from polyreward.reward_models.one_pass import BestOfList, one_pass_model, score_group, without_empty_responses

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
FIT = {"epochs": 6, "batch_size": 8, "encoder_learning_rate": 3e-3, "learning_rate": 1e-2, "validation": None}


def encoder(**options):
    # 24 embeddings and 24 words: the separator needs a new row
    return FineTunedMultimodalEncoder(
        tiny_models.model(vocabulary=24), tiny_models.tokenizer(), together=True, name="tiny", **options
    )


def lists(count=16):
    rng = np.random.default_rng(0)
    words = ["good", "bad", "fine", "poor"]
    prompts, responses, ranks = [], [], []
    for i in range(count):
        order = rng.permutation(4)[: 2 + i % 3]
        prompts.append("the " + "was " * (i % 5))
        responses += [words[j] for j in order]
        ranks += [float(1 + sorted(order).index(j)) for j in order]
    return PreferenceData(prompts, responses, np.cumsum([0, *(2 + i % 3 for i in range(count))]), ranks=ranks)


@given(st.integers(0, 10**6))
def test_the_loss_is_that_of_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 5, size=4)
    ranks = rng.integers(1, 4, size=sizes.sum()).astype(float)
    ranks[rng.random(len(ranks)) < 0.2] = np.nan
    scores = rng.normal(size=len(ranks))
    data = PreferenceData(["p"] * 4, np.arange(len(ranks)), np.cumsum([0, *sizes]), ranks=ranks)
    comparisons = ComparisonTable(data).batch(np.arange(4))
    loss, figures = BestOfList().loss(Scores(torch.from_numpy(scores)), comparisons)
    losses, hits = [], []
    for i in range(4):
        mine = slice(*data.offsets[i : i + 2])
        r, s = ranks[mine], scores[mine]
        r, s = r[~np.isnan(r)], s[~np.isnan(r)]
        if not len(r) or r.min() == r.max():
            continue
        best = [j for j in range(len(r)) if r[j] == r.min()]
        log_sum = np.log(np.exp(s).sum())
        losses.append(np.mean([log_sum - s[j] for j in best]))
        hits.append(float(int(s.argmax()) in best))
    assert float(loss) == pytest.approx(np.mean(losses) if losses else 0.0, abs=1e-9)
    assert float(figures["accuracy"]) == pytest.approx(np.mean(hits) if hits else 0.0)
    assert int(figures["skipped"]) == 4 - len(losses)


def test_nothing_known_is_no_nan():
    data = PreferenceData(["p"], [0, 1], ranks=[np.nan, np.nan])
    values = torch.zeros(2, requires_grad=True)
    loss, _ = BestOfList().loss(Scores(values), ComparisonTable(data).batch(np.arange(1)))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not values.grad.any()
    with pytest.raises(InvalidInputError, match="one score a response"):
        BestOfList().score(Scores(torch.zeros(2, 3)))


@pytest.mark.parametrize("lora", [None, LORA])
def test_it_learns_and_survives_saving(tmp_path, lora):
    base = tmp_path / "base"
    tiny_models.model(vocabulary=24).save_pretrained(base)
    tiny_models.tokenizer().save_pretrained(base)
    learns = FineTunedMultimodalEncoder(str(base), lora=lora, together=True, max_length=64)
    assert learns.network.get_input_embeddings().weight.shape[0] == 25
    model = one_pass_model(learns, hidden_dim=32)
    assert isinstance(model, RewardModel)
    data = lists()
    model.fit(data, **FIT | {"epochs": 12, "encoder_learning_rate": 1e-2})
    assert model.history[-1]["loss"] < 0.6 * model.history[0]["loss"]
    assert model.evaluate(data)["accuracy"] > 0.8
    prompts, responses = ["the was"] * 3, ["bad", "good", "poor"]
    scores = model.score(prompts, responses)
    assert scores.argmax() == 1
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "encoder" / "adapter_config.json").exists() == (lora is not None)
    back = PreferenceModel.from_pretrained(tmp_path / "model")
    assert torch.allclose(back.score(prompts, responses), scores, atol=1e-6)
    assert back.encoder.settings == model.encoder.settings
    if lora is not None:
        names = [name for name, p in back.encoder.named_parameters() if p.requires_grad]
        assert any("trainable_tokens" in name for name in names)


def test_responses_of_a_prompt_take_one_pass(monkeypatch):
    model = one_pass_model(encoder(), hidden_dim=None)
    model.fit(lists(4), **FIT | {"epochs": 1})
    calls = []
    network = model.encoder.network
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda **inputs: calls.append(inputs) or forward(**inputs))
    scores = model.score(["the cat"] * 4, ["good", "bad answer", "fine", "poor"])
    assert [call["input_ids"].shape for call in calls] == [(1, 2 + 5 + 3)]
    # an interleaved prompt of its own is another set, and the order of the list changes nothing
    other = model.score(
        ["the dog", "the cat", "the cat", "the cat", "the cat"], ["good", "poor", "bad answer", "good", "fine"]
    )
    assert torch.allclose(other[[3, 2, 4, 1]], scores, atol=1e-6)
    assert model.as_reward()(["the cat"] * 4, ["good", "bad answer", "fine", "poor"]) == pytest.approx(scores.tolist())


def test_single_responses_are_read_alone_by_the_same_network():
    alone = FineTunedMultimodalEncoder(tiny_models.model(vocabulary=25), tiny_models.tokenizer(), name="tiny")
    model = one_pass_model(alone, hidden_dim=None).fit(lists(4), **FIT | {"epochs": 1})
    pair = model.score(["the cat"] * 2, ["good", "bad"])
    assert torch.allclose(model.score(["the cat"], ["bad"])[0], pair[1], atol=1e-6)


def test_training_draws_orders_and_scoring_does_not():
    learns = encoder(order="given")
    prompts, responses, code = ["the"] * 3, ["good", "bad", "fine"], torch.zeros(3, dtype=torch.long)
    learns.train()
    torch.manual_seed(0)
    drawn = {tuple(learns(prompts, responses, code)[0].tolist()) for _ in range(12)}
    assert len(drawn) > 1
    learns.eval()
    still = {tuple(learns(prompts, responses, code)[0].tolist()) for _ in range(3)}
    assert len(still) == 1
    # in the given order the first response is read as if it were alone, the last is not
    first = learns(["the"], ["good"], torch.zeros(1, dtype=torch.long))
    assert torch.allclose(learns(prompts, responses, code)[0], first[0], atol=1e-5)
    with pytest.raises(InvalidInputError, match="order must be"):
        encoder(order="random")


def test_the_fit_repeats_and_passes_do_not_matter():
    runs = []
    for tokens in (16_384, 16_384, 1):
        torch.manual_seed(5)
        model = one_pass_model(encoder(batch_tokens=tokens), hidden_dim=8).fit(lists(8), **FIT | {"epochs": 2})
        runs.append(model.score(["the"] * 2, ["good", "bad"]))
    assert torch.equal(runs[0], runs[1])
    assert torch.allclose(runs[0], runs[2], atol=1e-5)


def test_separators_and_empty_responses_in_what_a_model_wrote():
    model = one_pass_model(encoder(), hidden_dim=None).fit(lists(4), **FIT | {"epochs": 1})
    clean = model.score(["the cat"] * 3, ["good answer", "bad", "poor"])
    dirty = model.score(["the <|resp_sep|>cat"] * 3, ["good <|resp_sep|>answer", "<|resp<|resp_sep|>_sep|>bad", "poor"])
    # the hash of a response decides its place, so scores are compared as sets of the same order
    ordered = [
        score_group(model, "the cat", texts) for texts in (["good answer", "bad"], ["good <|resp_sep|>answer", "bad"])
    ]
    assert torch.allclose(ordered[0], ordered[1], atol=1e-6)
    assert torch.isfinite(dirty).all()
    assert torch.isfinite(clean).all()
    assert torch.isfinite(model.score(["the cat"] * 3, ["", "bad", ""])).all()
    assert model.score([], []).shape == (0,)


def test_long_prompts_lose_their_beginning_and_responses_are_never_cut():
    short = encoder(max_length=8, order="given").eval()
    code = torch.zeros(2, dtype=torch.long)
    long = short(["the " * 30 + "cat sat ran"] * 2, ["good", "bad"], code)
    # eight tokens: five of the prompt, the separator, two responses
    assert torch.allclose(long, short(["the the cat sat ran"] * 2, ["good", "bad"], code), atol=1e-6)
    with pytest.raises(InvalidInputError, match="9 of responses, max_length is 8 and the responses alone do not fit"):
        short(["the"] * 2, ["good " * 4, "bad " * 4], code)


def test_score_group_of_a_fitted_model():
    model = one_pass_model(encoder(), hidden_dim=8, likelihood=PlackettLuce()).fit(lists(8), **FIT)
    responses = ["good", "bad", "fine"]
    scores = score_group(model, "the", responses, num_permutations=6)
    other = score_group(model, "the", responses[::-1], num_permutations=6)
    assert torch.allclose(scores, other.flip(0), atol=1e-5)
    blocks = score_group(model, "the", ["good", "bad", "fine", "poor", "good answer"], block_size=3)
    assert blocks.shape == (5,)
    assert float(blocks.sum()) == pytest.approx(0, abs=1e-5)
    first = score_group(model, "the", ["good", "bad", "fine"])
    assert torch.allclose(blocks[:3] - blocks[0], first - first[0], atol=1e-6)
    for call, message in (
        (lambda: score_group(model, "the", []), "no responses"),
        (lambda: score_group(model, "the", responses, block_size=1), "block_size must be at least 2"),
        (lambda: score_group(one_pass_model(encoder()), "the", responses), "needs a fitted model"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            call()


def test_empty_responses_leave_the_training_data():
    data = PreferenceData(
        ["a", "b", "c", "d"], ["x", "", "y", " ", "z", "u", "", "v", "w", "t"], [0, 3, 5, 8, 10],
        choice=[2, 0, 1, 0], ranks=[2, 3, 1, np.nan, np.nan, 1, 1, 2, 1, 2], annotators=["p", "q", "r", "s"],
    )  # fmt: skip
    left = without_empty_responses(data)
    assert list(left.prompts) == ["a", "d"]
    assert list(left.responses) == ["x", "y", "w", "t"]
    assert left.choice.tolist() == [1, 0]
    assert left.ranks.tolist() == [2, 1, 1, 2]
    assert list(left.annotators) == ["p", "s"]
    assert left.rows.tolist() == [1, 4]
    assert without_empty_responses(lists(4)).sizes.tolist() == lists(4).sizes.tolist()


def test_images_are_read_with_all_their_responses_in_one_pass():
    learns = FineTunedMultimodalEncoder(
        tiny_vision_models.model(), tiny_vision_models.processor(), together=True, name="tiny-vlm"
    )
    prompts, responses = [], []
    for i in range(24):
        bright = i % 2 == 0
        prompts.append(tiny_vision_models.question(tiny_vision_models.image(bright, seed=i)))
        responses += ["good", "bad", "fine"] if bright else ["bad", "good", "fine"]
    data = PreferenceData(prompts, responses, np.arange(0, 73, 3), choice=np.zeros(24, int))
    model = one_pass_model(learns, hidden_dim=32)
    model.fit(data, **FIT | {"epochs": 24, "encoder_learning_rate": 1e-3})
    held = [tiny_vision_models.question(tiny_vision_models.image(i % 2 == 0, seed=100 + i)) for i in range(6)]
    scores = torch.stack([model.score([p] * 3, ["good", "bad", "fine"]) for p in held])
    assert scores.argmax(dim=1).tolist() == [0, 1] * 3
    # the image decides: with a text in its place all sets are alike
    flat = score_group(model, held[0], ["good", "bad"])
    assert (flat[0] > flat[1]) == (scores[0, 0] > scores[0, 1])
