import copy

import pytest
import tiny_thinkers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.reward_models.query_token import QueryTokenRewardModel, pack, padded

QUERY = 11


def small(**options):
    return QueryTokenRewardModel(tiny_thinkers.TinyCausal(), QUERY, **options)


def backed(**options):
    return QueryTokenRewardModel(tiny_thinkers.llama(), QUERY, **options)


MAKERS = {"small": small, "llama": backed}
each = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@each
def test_the_reward_is_the_head_on_the_hidden_state_of_the_query(make):
    model = make()
    context, cot = torch.tensor([[2, 3, 4]]), torch.tensor([[5, 6]])
    ids = torch.tensor([[2, 3, 4, 5, 6, QUERY]])
    found = model.backbone(input_ids=ids, **({} if make is small else {"output_hidden_states": True}))
    hidden = getattr(found, "last_hidden_state", None)
    hidden = found.hidden_states[-1] if hidden is None else hidden
    expected = float((hidden[0, -1] * model.head.weight[0]).sum().detach())
    assert model.head.bias is None
    assert model.score(context, cot).tolist() == pytest.approx([expected], abs=1e-6)
    assert torch.equal(model(context, cot), model.score(context, cot))
    assert model.score(context).shape == (1,)
    assert not torch.allclose(model.score(context), model.score(context, cot))


@each
def test_padding_anywhere_changes_nothing_and_rows_do_not_meet(make):
    model = make()
    contexts, cots = [[2, 3, 4], [5], [6, 7, 8, 9]], [[3], [4, 5, 6], []]
    alone = [
        float(model.score(torch.tensor([a]), torch.tensor([b], dtype=torch.int64)).detach())
        for a, b in zip(contexts, cots, strict=True)
    ]
    assert model.score(padded(contexts), padded(cots)).tolist() == pytest.approx(alone, abs=1e-5)
    gaps = torch.tensor([[-1, 2, -1, 3, 4, -1], [-1, -1, -1, -1, -1, 5], [6, 7, -1, -1, 8, 9]])
    assert model.score(gaps, padded(cots)).tolist() == pytest.approx(alone, abs=1e-5)
    order = torch.tensor([2, 0, 1])
    again = model.score(padded(contexts)[order], padded(cots)[order])
    assert again.tolist() == pytest.approx([alone[i] for i in order], abs=1e-5)


@each
def test_tokens_after_the_query_have_no_effect(make):
    model = make()
    plain = model.score_sequence(torch.tensor([[2, 3, QUERY]]))
    longer = model.score_sequence(torch.tensor([[2, 3, QUERY, 7, 8]]))
    before = model.score_sequence(torch.tensor([[7, 8, 2, 3, QUERY]]))
    assert longer.tolist() == pytest.approx(plain.tolist(), abs=1e-5)
    assert before.tolist() != pytest.approx(plain.tolist(), abs=1e-5)


@each
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_changes_the_query_row_and_no_other_embedding(make, optimizer):
    model = make()
    table = model.backbone.get_input_embeddings().weight
    before, head = table.detach().clone(), model.head.weight.detach().clone()
    steps = optimizer(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        steps.zero_grad()
        model.score(torch.tensor([[2, 3], [4, 5]])).sum().backward()
        steps.step()
    changed = (table != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [QUERY]
    assert torch.equal(table[QUERY], model.query)
    assert not torch.equal(model.head.weight, head)


def test_the_query_stays_one_row_in_copies_and_moves():
    model = small()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.query += 1.0
    ids = torch.tensor([[2, 3]])
    assert not torch.allclose(twin.score(ids), model.score(ids))
    assert torch.equal(twin.backbone.embedding.weight[QUERY], twin.query)
    assert not torch.equal(model.query, twin.query)
    wide = copy.deepcopy(twin).double()
    assert wide.score(ids).dtype == torch.float64
    assert wide.score(ids).tolist() == pytest.approx(twin.score(ids).tolist(), abs=1e-5)
    with torch.no_grad():
        wide.query.zero_()
    wide.score(ids)
    assert not wide.backbone.embedding.weight[QUERY].any()
    state = model.state_dict()
    twin.load_state_dict(state)
    assert torch.equal(twin.score(ids), model.score(ids))


def test_rewards_are_float32_of_half_precision_backbones():
    model = small().bfloat16()
    assert model.score(torch.tensor([[2, 3]])).dtype == torch.float32


@each
def test_log_probabilities_equal_one_token_at_a_time(make):
    model = make()
    contexts, cots = [[2, 3, 4], [5], [6, 7]], [[3, 4], [4, 5, 6], [9]]
    found, mask = model.log_probabilities(padded(contexts), padded(cots), temperature=0.7)
    assert mask.tolist() == (padded(cots) >= 0).tolist()
    for row, (context, cot) in enumerate(zip(contexts, cots, strict=True)):
        for place, token in enumerate(cot):
            ids = torch.tensor([context + cot[:place]])
            logits = model.backbone(input_ids=ids).logits[0, -1] / 0.7
            logits[QUERY] = -torch.inf
            assert float(found[row, place]) == pytest.approx(float(logits.log_softmax(0)[token]), abs=1e-5)
        assert not found[row, len(cot) :].any()


@each
def test_the_policy_never_writes_the_query(make):
    model = make(max_cot_tokens=6)
    if make is small:
        with torch.no_grad():
            model.backbone.out.bias[QUERY] = 50.0
    cot = model.generate_cot(torch.tensor([[2, 3]] * 40), generator=torch.Generator().manual_seed(0))
    assert cot.shape == (40, 6)
    assert not (cot == QUERY).any()
    assert len(cot.unique()) > 3
    again = model.generate_cot(torch.tensor([[2, 3]] * 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(cot, again)
    with pytest.raises(InvalidInputError, match="cot_ids, row 1 holds the query token 11"):
        model.log_probabilities(torch.tensor([[2], [3]]), torch.tensor([[4], [QUERY]]))


@each
def test_greedy_thoughts_take_the_likeliest_token_of_the_whole_sequence(make):
    model = make()
    contexts = [[2, 3, 4], [5], [6, 7, 8, 9]]
    cot = model.generate_cot(padded(contexts), temperature=0.0, max_tokens=4)
    for context, written in zip(contexts, cot.tolist(), strict=True):
        ids = list(context)
        for token in written:
            logits = model.backbone(input_ids=torch.tensor([ids])).logits[0, -1]
            logits[QUERY] = -torch.inf
            assert token == int(logits.argmax())
            ids.append(token)
    rewards, thoughts = model.think_then_score(padded(contexts), max_tokens=4)
    assert torch.equal(thoughts, cot)
    assert torch.allclose(rewards, model.score(padded(contexts), cot))


def test_a_thought_ends_with_its_last_token():
    model = small(eos_token_id=1, max_cot_tokens=5)
    with torch.no_grad():
        model.backbone.out.weight.zero_()
        model.backbone.out.bias.fill_(-9.0)
        model.backbone.out.bias[1] = 9.0
    assert model.generate_cot(torch.tensor([[2], [3]])).tolist() == [[1], [1]]
    model.eos_token_id = 2
    with torch.no_grad():
        model.backbone.out.bias[2] = 9.0
    cot = model.generate_cot(torch.tensor([[2]] * 50), generator=torch.Generator().manual_seed(1))
    ended = (cot == 2).int().cumsum(dim=1)
    assert ended.max() == 1
    after = (ended - (cot == 2).int()) > 0
    assert bool((cot[after] == -1).all())
    assert bool((cot[~after] >= 0).all())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 9), min_size=5, max_size=5), min_size=1, max_size=4), st.booleans())
def test_packing_keeps_tokens_in_order(rows, left):
    packed, keep = pack(torch.tensor(rows), left)
    for row, ids, mask in zip(rows, packed.tolist(), keep.tolist(), strict=True):
        tokens = [token for token in row if token >= 0]
        assert [token for token, kept in zip(ids, mask, strict=True) if kept] == tokens
        assert mask == sorted(mask, reverse=not left)
    assert packed.shape[1] == max(sum(token >= 0 for token in row) for row in rows)


def test_gradients_reach_query_head_and_backbone():
    model = small().double()
    model.score(torch.tensor([[2, 3]]), torch.tensor([[4]])).sum().backward()
    assert model.query.grad.abs().sum() > 0
    assert model.head.weight.grad.abs().sum() > 0
    assert model.backbone.layer.linear1.weight.grad.abs().sum() > 0
    assert model.backbone.embedding.weight.grad is None
    step, weight = 1e-6, model.query
    numeric = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0] += sign * step
            numeric.append(float(model.score(torch.tensor([[2, 3]]), torch.tensor([[4]]))))
            weight[0] -= sign * step
    assert float(model.query.grad[0]) == pytest.approx((numeric[0] - numeric[1]) / (2 * step), abs=1e-6)


def test_tied_output_embeddings_learn_the_query_row_alone():
    model = QueryTokenRewardModel(tiny_thinkers.llama(tied=True), QUERY)
    before = model.backbone.lm_head.weight.detach().clone()
    steps = torch.optim.AdamW(model.parameters(), lr=0.1)
    logp, _ = model.log_probabilities(torch.tensor([[2, 3]]), torch.tensor([[4]]))
    (logp.sum() + model.score(torch.tensor([[2, 3]])).sum()).backward()
    steps.step()
    assert (model.backbone.lm_head.weight != before).any(dim=1).nonzero().flatten().tolist() == [QUERY]


def test_wrong_calls():
    model = small()
    with pytest.raises(InvalidInputError, match="rows 0 to 11"):
        QueryTokenRewardModel(tiny_thinkers.TinyCausal(), 12)
    with pytest.raises(InvalidInputError, match="max_cot_tokens"):
        small(max_cot_tokens=0)
    with pytest.raises(InvalidInputError, match="get_input_embeddings"):
        QueryTokenRewardModel(torch.nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="context_ids, row 0 holds the query token"):
        model.score(torch.tensor([[2, QUERY]]))
    with pytest.raises(ValueError, match="row 1 has it 2 times"):
        model.score_sequence(torch.tensor([[2, QUERY, 3], [QUERY, QUERY, 2]]))
    with pytest.raises(ValueError, match="row 0 has it 0 times"):
        model.score_sequence(torch.tensor([[2, 3]]))
    with pytest.raises(InvalidInputError, match="2 contexts and 1 thoughts"):
        model.score(torch.tensor([[2], [3]]), torch.tensor([[4]]))
    with pytest.raises(InvalidInputError, match=r"shape \(B, L\), got torch.float32"):
        model.score(torch.zeros(1, 2))
    with pytest.raises(InvalidInputError, match="temperature"):
        model.generate_cot(torch.tensor([[2]]), temperature=-1.0)
    with pytest.raises(InvalidInputError, match="temperature above 0"):
        model.log_probabilities(torch.tensor([[2]]), torch.tensor([[2]]), temperature=0.0)
    with pytest.raises(InvalidInputError, match="no token"):
        model.log_probabilities(torch.tensor([[-1]]), torch.tensor([[2]]))
    assert model.score(torch.zeros(0, 3, dtype=torch.int64)).shape == (0,)
    assert model.generate_cot(torch.zeros(0, 3, dtype=torch.int64)).shape[0] == 0
