import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.reward_models.multi_response_batch import (
    SEPARATOR,
    MultiResponseCollator,
    add_separator,
    response_boundaries,
    strip_separator,
)

SEP = 99


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_places_of_the_paper_s_example():
    batch = MultiResponseCollator(SEP, shuffle=False)([([1] * 8, [[2] * 4] * 4, [4, 3, 2, 1])])
    assert batch["end_indices"].tolist() == [[11, 16, 21, 26]]
    assert batch["start_indices"].tolist() == [[8, 13, 18, 23]]
    assert batch["input_ids"].shape == (1, 27)
    assert batch["labels"].tolist() == [3]
    assert {name: value.dtype for name, value in batch.items() if name != "ranks"} == dict.fromkeys(
        [n for n in batch if n != "ranks"], torch.int64
    )


samples = st.lists(
    st.tuples(
        st.lists(st.integers(0, 50), max_size=5),
        st.lists(st.tuples(st.lists(st.integers(0, 50), max_size=4), st.integers(1, 3)), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=4,
)


@given(samples, st.booleans(), st.integers(0, 5))
def test_every_place_is_that_of_the_response(drawn, shuffle, seed):
    given_samples, usable = [], []
    for number, (prompt, several) in enumerate(drawn):
        responses, ranks = [ids for ids, _ in several], [rank for _, rank in several]
        full = [i for i, ids in enumerate(responses) if ids]
        if not full:
            continue
        given_samples.append((prompt, responses, ranks))
        if len(full) == 1 or len({ranks[i] for i in full}) > 1:
            usable.append(len(given_samples) - 1)
        del number
    collator = MultiResponseCollator(SEP, shuffle, generator=seeded(seed))
    if not usable:
        with pytest.raises(InvalidInputError):
            collator(given_samples)
        return
    batch = collator(given_samples)
    assert batch["kept"].tolist() == usable
    assert int(batch["skipped"]) == len(given_samples) - len(usable)
    width = max(sum(bool(ids) for ids in given_samples[i][1]) for i in usable)
    assert batch["end_indices"].shape == (len(usable), width)
    for row, number in enumerate(usable):
        prompt, responses, ranks = given_samples[number]
        order = [i for i in batch["permutation"][row].tolist() if i >= 0]
        assert sorted(order) == [i for i, ids in enumerate(responses) if ids]
        if not shuffle:
            assert order == sorted(order)
        expected = list(prompt)
        for place, i in enumerate(order):
            expected += ([SEP] if place else []) + responses[i]
        length = int(batch["attention_mask"][row].sum())
        assert batch["input_ids"][row, :length].tolist() == expected
        for place, i in enumerate(order):
            start, end = int(batch["start_indices"][row, place]), int(batch["end_indices"][row, place])
            assert batch["input_ids"][row, start : end + 1].tolist() == responses[i]
            assert float(batch["ranks"][row, place]) == ranks[i]
        rest = slice(len(order), None)
        assert (batch["end_indices"][row, rest] == -1).all()
        assert (batch["start_indices"][row, rest] == -1).all()
        assert (batch["permutation"][row, rest] == -1).all()
        assert torch.isnan(batch["ranks"][row, rest]).all()
        best = order[int(batch["labels"][row])]
        assert ranks[best] == min(ranks[i] for i in order)


def test_orders_and_tied_labels_are_uniform():
    collator = MultiResponseCollator(SEP, generator=seeded())
    batch = collator([([1], [[2], [3], [4]], [1, 1, 2])] * 3000)
    first = np.bincount(batch["permutation"][:, 0].numpy(), minlength=3) / 3000
    assert np.abs(first - 1 / 3).max() < 0.04
    winner = batch["permutation"].gather(1, batch["labels"].unsqueeze(1)).flatten()
    share = np.bincount(winner.numpy(), minlength=3) / 3000
    assert share[2] == 0
    assert abs(share[0] - 0.5) < 0.04
    fixed = MultiResponseCollator(SEP, shuffle=False, generator=seeded())([([1], [[2], [3], [4]], [1, 2, 1])] * 3000)
    share = np.bincount(fixed["labels"].numpy(), minlength=3) / 3000
    assert share[1] == 0
    assert abs(share[0] - 0.5) < 0.04
    again = MultiResponseCollator(SEP, generator=seeded())([([1], [[2], [3], [4]], [1, 1, 2])] * 3000)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_empty_responses_go_with_their_ranks():
    batch = MultiResponseCollator(SEP, shuffle=False)([([1], [[], [5, 6], [7]], [1, 3, 2])])
    assert batch["permutation"].tolist() == [[1, 2]]
    assert batch["ranks"].tolist() == [[3, 2]]
    assert batch["labels"].tolist() == [1]
    with pytest.raises(InvalidInputError, match="sample 1 has only empty responses"):
        MultiResponseCollator(SEP)([([1], [[2]], [1]), ([1], [[], []], [1, 2])])
    with pytest.raises(InvalidInputError, match="sample 0 has no responses"):
        MultiResponseCollator(SEP)([([1], [], [])])
    with pytest.raises(InvalidInputError, match="no samples"):
        MultiResponseCollator(SEP)([])


def test_equal_ranks_are_skipped_and_counted():
    samples = [([1], [[2], [3]], [2, 2]), ([1], [[2], [3]], [2, 1]), ([1], [[2]], [1])]
    batch = MultiResponseCollator(SEP)(samples)
    assert int(batch["skipped"]) == 1
    assert batch["kept"].tolist() == [1, 2]
    with pytest.raises(InvalidInputError, match=r"none of the 1 samples is left: in 1 all ranks are equal"):
        MultiResponseCollator(SEP)(samples[:1])


def test_the_separator_in_a_text_is_refused_or_taken_out():
    for sample, where in ((([1], [[2, SEP, 3]], [1]), "response 0: token 1"), (([SEP], [[2]], [1]), "prompt: token 0")):
        with pytest.raises(InvalidInputError, match=f"sample 0, {where} is the separator"):
            MultiResponseCollator(SEP)([sample])
    batch = MultiResponseCollator(SEP, shuffle=False, injection="strip")([([1, SEP], [[2, SEP, 3], [4]], [1, 2])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, SEP, 4]]
    assert strip_separator("a<|resp<|resp_sep|>_sep|>b") == "ab"
    assert strip_separator("a<image>", "<image>") == "a"


def test_long_samples_are_refused_or_dropped_and_never_cut():
    samples = [([1] * 8, [[2] * 4] * 2, [1, 2]), ([1], [[2], [3]], [1, 2])]
    with pytest.raises(InvalidInputError, match="sample 0 has 17 tokens, at most 16 fit"):
        MultiResponseCollator(SEP, max_length=16)(samples)
    batch = MultiResponseCollator(SEP, max_length=16, too_long="drop")(samples)
    assert (int(batch["dropped"]), batch["kept"].tolist()) == (1, [1])
    whole = MultiResponseCollator(SEP, max_length=17, shuffle=False)(samples)
    # what cuts the batch afterwards is found out
    with pytest.raises(InvalidInputError, match="sequence 0 has 0 separators after its prompt, expected 1"):
        response_boundaries(
            whole["input_ids"][:, :12], whole["attention_mask"][:, :12], SEP, torch.tensor([8, 1]), torch.tensor([2, 2])
        )


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (([1], [[2], [3]], [1]), "ranks .1.0., expected a finite number for each of its 2"),
        (([1], [[2], [3]], [1, float("nan")]), "expected a finite number"),
        (([1], [[2]]), "sample 0 is no"),
        (([[1]], [[2]], [1]), "prompt: token numbers must be one row"),
    ],
)
def test_malformed_samples(sample, message):
    with pytest.raises(InvalidInputError, match=message):
        MultiResponseCollator(SEP)([sample])


def test_samples_without_ranks_are_for_scoring():
    batch = MultiResponseCollator(SEP, shuffle=False)([([1], [[2], [3]], None)])
    assert batch["labels"].tolist() == [-1]
    assert torch.isnan(batch["ranks"]).all()


def test_an_unknown_way_is_refused():
    with pytest.raises(InvalidInputError, match="too_long must be"):
        MultiResponseCollator(SEP, too_long="cut")


def test_the_separator_is_one_token():
    model, tokenizer = tiny_models.model(vocabulary=24), tiny_models.tokenizer()
    number = add_separator(tokenizer, model)
    assert number == 24
    assert model.get_input_embeddings().num_embeddings == 25
    assert add_separator(tokenizer, model) == number
    assert tokenizer(f"the{SEPARATOR}cat")["input_ids"] == [3, number, 5]
