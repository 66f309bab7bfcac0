import math

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.reward_models.multi_response import (
    MultiResponseRewardModel,
    average_over_orders,
    flops_ratio,
    order_consistency,
    plackett_luce_loss,
    response_vectors,
    select_best_loss,
)
from polyreward.reward_models.multi_response_batch import MultiResponseCollator, add_separator
from polyreward.reward_models.reward_head import RewardHead

SEP = 60
MODES = ["last", "first", "first_last_concat", "first_last_add", "first_last_sub", "response_mean"]


def backbone(kind="llama"):
    if kind == "llama":
        return tiny_models.model()
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32, "num_key_value_heads": 1, "pad_token_id": 0}  # fmt: skip
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model.eval()


def scorer(kind="llama", mode="last", **options):
    torch.manual_seed(1)
    head = RewardHead(32 if mode == "first_last_concat" else 16, hidden_dim=24)
    return MultiResponseRewardModel(backbone(kind), head, mode, sep_token_id=SEP, **options).eval()


def batch_of(*samples, shuffle=False):
    return MultiResponseCollator(SEP, shuffle, generator=torch.Generator().manual_seed(0))(samples)


SAMPLE = ([5, 6, 7], [[8, 9], [10, 11, 12], [13], [14, 15]], [2, 1, 3, 4])


def test_the_loss_of_the_paper_s_example():
    raw = torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    label = torch.tensor([0])
    assert float(select_best_loss(raw, label)) == pytest.approx(0.746567, abs=1e-6)
    assert float(select_best_loss(raw / math.sqrt(64), label)) == pytest.approx(1.281131, abs=1e-6)


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=2), st.floats(-50, 50))
def test_two_responses_are_bradley_terry_and_a_constant_changes_nothing(values, shift):
    scores = torch.tensor([values], dtype=torch.float64)
    loss = select_best_loss(scores, torch.tensor([1]))
    assert float(loss) == pytest.approx(np.logaddexp(0, -(values[1] - values[0])), abs=1e-9)
    assert float(select_best_loss(scores + shift, torch.tensor([1]))) == pytest.approx(float(loss), abs=1e-9)
    padded = torch.cat([scores, torch.full((1, 3), -torch.inf, dtype=torch.float64)], dim=1)
    assert float(select_best_loss(padded, torch.tensor([1]))) == pytest.approx(float(loss), abs=1e-12)


def test_one_response_teaches_nothing():
    model = scorer()
    batch = batch_of(([5], [[6, 7]], [1]))
    loss = select_best_loss(model(**batch), batch["labels"])
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "causal", "qwen2", "lora"])
@pytest.mark.parametrize("mode", MODES)
def test_scores_and_gradients_of_any_backbone(kind, mode):
    model = scorer(kind, mode)
    batch = batch_of(SAMPLE, ([5], [[6], [7]], [1, 2]), shuffle=True)
    scores = model(**batch)
    assert scores.shape == (2, 4)
    assert scores.dtype == torch.float32
    assert torch.isinf(scores).tolist() == [[False] * 4, [False, False, True, True]]
    loss = select_best_loss(scores, batch["labels"]) + plackett_luce_loss(scores, batch["ranks"])
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)
    # without the padded sample the numbers are the same
    alone = model(**batch_of(([5], [[6], [7]], [1, 2])))
    both = model(**batch_of(SAMPLE, ([5], [[6], [7]], [1, 2])))
    assert torch.allclose(both[1, :2], alone[0], atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_vectors_are_those_of_a_plain_loop(mode):
    torch.manual_seed(0)
    states = torch.randn(2, 9, 4, dtype=torch.float64)
    start, end = torch.tensor([[1, 4, 8], [0, 3, -1]]), torch.tensor([[2, 7, 8], [2, 3, -1]])
    found = response_vectors(states, start, end, mode)
    for b in range(2):
        for r in range(3):
            s, e = int(start[b, r]), int(end[b, r])
            if e < 0:
                assert not found[b, r].any()
                continue
            first, last = states[b, s], states[b, e]
            mean = sum(states[b, t] for t in range(s, e + 1)) / (e - s + 1)
            expected = {
                "last": last, "first": first, "first_last_concat": torch.cat([first, last]),
                "first_last_add": first + last, "first_last_sub": last - first, "response_mean": mean,
            }[mode]  # fmt: skip
            assert torch.allclose(found[b, r], expected)


def test_a_response_is_seen_by_those_after_it_only():
    model = scorer()
    base = model(**batch_of(SAMPLE))[0]
    for changed in range(4):
        responses = [list(ids) for ids in SAMPLE[1]]
        responses[changed] = [20 + i for i in range(len(responses[changed]))]
        other = model(**batch_of((SAMPLE[0], responses, SAMPLE[2])))[0]
        assert torch.allclose(other[:changed], base[:changed], atol=1e-6)
        assert ((other[changed:] - base[changed:]).abs() > 1e-4).all()
    alone = model(**batch_of((SAMPLE[0], SAMPLE[1][:1], [1])))[0]
    assert torch.allclose(alone[0], base[0], atol=1e-6)


def test_the_head_is_divided_by_the_root_of_the_width():
    scaled, plain = scorer(), scorer(scale_dot=False)
    batch = batch_of(SAMPLE)
    assert torch.allclose(scaled(**batch) * 4, plain(**batch), atol=1e-5)
    wide, plain_wide = scorer(mode="first_last_concat"), scorer(mode="first_last_concat", scale_dot=False)
    assert torch.allclose(wide(**batch) * 4, plain_wide(**batch), atol=1e-5)


def test_the_loss_starts_at_the_logarithm_of_n():
    head = RewardHead(16, hidden_dim=1024, init_std=0.01)
    model = MultiResponseRewardModel(backbone(), head)
    batch = batch_of(SAMPLE)
    assert float(select_best_loss(model(**batch), batch["labels"]).detach()) == pytest.approx(math.log(4), abs=3e-3)
    weights = head.network[0].weight
    assert abs(float(weights.std()) - 0.01) < 5e-4
    assert not head.network[0].bias.any()


def test_any_module_is_a_backbone():
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(64, 16)

        def forward(self, input_ids, attention_mask, shift=0.0):
            return self.embedding(input_ids) + shift

    model = MultiResponseRewardModel(Toy(), nn.Linear(16, 1))
    batch = batch_of(SAMPLE)
    assert model(**batch).shape == (1, 4)
    assert not torch.equal(model(**batch), model(**batch, shift=1.0))
    broken = MultiResponseRewardModel(nn.Module(), nn.Linear(16, 1))
    broken.backbone.forward = lambda **inputs: {"nothing": 1}
    with pytest.raises(InvalidInputError, match="gives no hidden states"):
        broken(**batch)


def test_half_precision_scores_are_float32():
    model = scorer().to(torch.bfloat16)
    assert model(**batch_of(SAMPLE)).dtype == torch.float32
    assert scorer().double()(**batch_of(SAMPLE)).dtype == torch.float64


def test_places_beyond_the_sequence_are_refused():
    model, batch = scorer(), batch_of(SAMPLE)
    cut = {**batch, "input_ids": batch["input_ids"][:, :8], "attention_mask": batch["attention_mask"][:, :8]}
    with pytest.raises(InvalidInputError, match=r"indices of sequence 0 .* beyond its 8 tokens"):
        scorer(mode="last")(**cut)
    with pytest.raises(InvalidInputError, match="lacks end_indices"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(InvalidInputError, match="lacks start_indices, which 'first' reads"):
        scorer(mode="first")(input_ids=batch["input_ids"], end_indices=batch["end_indices"])
    with pytest.raises(UnknownNameError, match="did you mean 'last'"):
        scorer(mode="lasst")
    with pytest.raises(InvalidInputError, match="ends before it starts"):
        response_vectors(torch.zeros(1, 5, 2), torch.tensor([[3]]), torch.tensor([[1]]))


@pytest.mark.parametrize(
    ("sizes", "tokens", "attention"),
    [((256, 32, 4), 2.98, 2.22), ((64, 64, 4), 1.59, 0.63), ((256, 32, 8), 4.44, 2.463), ((5, 3, 1), 1.0, 1.0)],
)
def test_cost_of_one_pass(sizes, tokens, attention):
    found = flops_ratio(*sizes)
    assert found.tokens == pytest.approx(tokens, abs=0.005)
    assert found.attention == pytest.approx(attention, abs=0.005)


def test_cost_of_nothing_is_refused():
    with pytest.raises(InvalidInputError, match="flops_ratio needs"):
        flops_ratio(0, 0, 4)


def test_score_group_of_one_order_is_the_pass_less_its_mean():
    model = scorer()
    direct = model(**batch_of(SAMPLE))[0]
    assert torch.allclose(model.score_group(*SAMPLE[:2]), direct - direct.mean(), atol=1e-6)


def test_all_orders_take_out_the_place():
    model = scorer()
    prompt, responses = SAMPLE[0], SAMPLE[1][:3]
    scores = model.score_group(prompt, responses, num_permutations=6)
    other = model.score_group(prompt, [responses[i] for i in (2, 0, 1)], num_permutations=6)
    assert torch.allclose(other, scores[[2, 0, 1]], atol=1e-5)
    once = model.score_group(prompt, [responses[i] for i in (2, 0, 1)])
    assert not torch.allclose(once, model.score_group(prompt, responses)[[2, 0, 1]], atol=1e-5)
    assert float(scores.sum()) == pytest.approx(0, abs=1e-5)


def test_some_orders_are_drawn_from_the_generator():
    model = scorer()
    draws = [model.score_group(*SAMPLE[:2], 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_orders_are_put_back():
    # a score that is the response's own, plus its place
    own = torch.tensor([1.0, 5.0, 3.0])

    def score(order):
        return own[list(order)] + torch.arange(3.0)

    assert torch.allclose(average_over_orders(score, 3, 6), own - own.mean())
    assert torch.allclose(average_over_orders(score, 3), own + torch.arange(3.0) - 4.0)
    with pytest.raises(InvalidInputError, match="at least 1"):
        average_over_orders(score, 3, 0)


def test_score_group_reads_texts_and_refuses_nothing_a_model_wrote():
    tokenizer, network = tiny_models.tokenizer(), tiny_models.model()
    number = add_separator(tokenizer, network)
    model = MultiResponseRewardModel(network, RewardHead(16), tokenizer=tokenizer)
    assert model.sep_token_id == number
    plain = model.score_group("the cat", ["good answer", "bad", ""])
    assert plain[2] == -torch.inf
    injected = model.score_group("the cat", ["good <|resp_sep|>answer", "bad", "<|resp_sep|>"])
    assert torch.equal(plain, injected)
    with pytest.raises(InvalidInputError, match="none of the 2 responses has a token"):
        model.score_group("the cat", ["", ""])
    with pytest.raises(InvalidInputError, match="texts need"):
        scorer().score_group("the", ["cat"])
    with pytest.raises(InvalidInputError, match="call add_separator"):
        MultiResponseRewardModel(network, RewardHead(16), tokenizer=tiny_models.tokenizer())


def test_scoring_leaves_the_mode_as_it_was():
    model = scorer().train()
    model.score_group(*SAMPLE[:2])
    assert model.training


def test_order_consistency_compares_responses_and_not_places():
    first, second = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[9.0, 0.0], [0.0, 1.0]])
    orders = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1, 0], [0, 1]])
    assert order_consistency(first, orders[0], second, orders[1]).tolist() == [True, False]


def test_a_causal_scorer_can_return_the_best_of_any_preorder():
    # a high score that grows with the place iff the response beats all earlier ones
    rng = np.random.default_rng(0)
    for _ in range(200):
        worth = rng.integers(0, 4, size=rng.integers(1, 7))
        record = [all(worth[i] > worth[j] for j in range(i)) for i in range(len(worth))]
        scores = [i + 1 if r else 0 for i, r in enumerate(record)]
        assert worth[int(np.argmax(scores))] == worth.max()
