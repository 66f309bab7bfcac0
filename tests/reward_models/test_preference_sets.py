import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.reward_models.preference_sets import PreferenceSetEncoder, SetAttention


def sets(count=3, pairs=5, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(count, pairs, width, generator=generator) for _ in range(2))
    return first, second, torch.randint(0, 2, (count, pairs), generator=generator).float()


def encoder(kind, seed=0, **options):
    torch.manual_seed(seed)
    return PreferenceSetEncoder(kind, 4, 3, 16, **options)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 7))
def test_attention_does_not_see_the_order_of_pairs_and_concat_does(seed, pairs):
    first, second, labels = sets(pairs=pairs, seed=seed)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    attention = encoder("attention", clamp=None)
    for a, b in zip(
        attention(first, second, labels), attention(first[:, order], second[:, order], labels[:, order]), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-5)
    if pairs > 1 and not torch.equal(order, torch.arange(pairs)):
        concat = encoder("concat")
        mean, moved = concat(first, second, labels)[0], concat(first[:, order], second[:, order], labels[:, order])[0]
        assert not torch.allclose(mean, moved, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_attention_equals_a_slow_loop(seed, pairs):
    torch.manual_seed(seed)
    attention = SetAttention(6).double()
    elements, mask = torch.randn(2, pairs, 6).double(), torch.rand(2, pairs) < 0.7
    found = attention(elements, mask)
    for b in range(2):
        there = [i for i in range(pairs) if mask[b, i]]
        total = torch.zeros(6).double()
        for i in there:
            scores = [
                float(attention.query(elements[b, i]) @ attention.key(elements[b, j])) / math.sqrt(6) for j in there
            ]
            weights = [math.exp(s) / sum(math.exp(t) for t in scores) for s in scores]
            for weight, j in zip(weights, there, strict=True):
                total += weight * attention.value(elements[b, j]) / len(there)
        assert torch.allclose(found[b], total, atol=1e-9)


def test_a_set_of_one_gives_the_value_of_its_pair():
    torch.manual_seed(0)
    attention = SetAttention(6)
    pair = torch.randn(4, 1, 6)
    assert torch.allclose(attention(pair), attention.value(pair[:, 0]), atol=1e-6)


def test_masked_pairs_say_nothing_whatever_stands_there():
    first, second, labels = sets()
    model, mask = encoder("attention"), torch.ones(3, 5, dtype=torch.bool)
    mask[:, 3:] = False
    expected = model(first[:, :3], second[:, :3], labels[:, :3])
    first[:, 3:], labels[:, 3:] = torch.nan, torch.nan
    for a, b in zip(model(first, second, labels, mask), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    mean, log_variance = model(first, second, labels, torch.zeros_like(mask))
    assert torch.equal(mean, torch.zeros(3, 3))
    assert torch.equal(log_variance, torch.zeros(3, 3))
    empty = model(torch.zeros(2, 0, 4), torch.zeros(2, 0, 4), torch.zeros(2, 0))
    assert torch.equal(empty[0], torch.zeros(2, 3))


def test_gradients_are_finite_with_an_empty_set():
    first, second, labels = sets()
    mask = torch.tensor([[True] * 5, [False] * 5, [True] + [False] * 4])
    model = encoder("attention")
    sum(value.square().sum() for value in model(first, second, labels, mask)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_swapping_the_two_and_the_label_changes_nothing_with_attention():
    first, second, labels = sets()
    model = encoder("attention")
    assert torch.allclose(model(first, second, labels)[0], model(second, first, 1 - labels)[0], atol=1e-6)
    assert not torch.allclose(model(first, second, labels)[0], model(first, second, 1 - labels)[0], atol=1e-3)


def test_ties_and_other_labels():
    first, second, labels = sets()
    for kind in ("attention", "concat"):
        assert torch.isfinite(encoder(kind)(first, second, torch.full_like(labels, 0.5))[0]).all()
        for wrong in (2.0, -1.0, 0.3, math.nan):
            bad = labels.clone()
            bad[1, 2] = wrong
            with pytest.raises(ValueError, match=r"labels\[1, 2\] is"):
                encoder(kind)(first, second, bad)
    assert encoder("attention")(first, second, labels.long())[0].shape == (3, 3)
    assert encoder("attention")(first, second, labels.bool())[0].shape == (3, 3)


def test_concat_fixes_the_number_of_pairs():
    first, second, labels = sets()
    for model in (encoder("concat"), encoder("concat", n_pairs=5)):
        assert model(first, second, labels)[0].shape == (3, 3)
        with pytest.raises(ValueError, match="sets of 5 pairs"):
            model(first[:, :4], second[:, :4], labels[:, :4])
        with pytest.raises(ValueError, match="attention"):
            model(first, second, labels, torch.zeros(3, 5, dtype=torch.bool))


def test_bounds():
    first, second, labels = sets()
    for kind, bounded in (("attention", True), ("concat", False)):
        mean, log_variance = encoder(kind)(1000 * first, 1000 * second, labels)
        assert (max(mean.abs().max(), log_variance.abs().max()) <= 1) == bounded
    assert encoder("attention", clamp=0.5)(1000 * first, second, labels)[0].abs().max() <= 0.5


def test_wrong_calls():
    first, second, labels = sets()
    with pytest.raises(InvalidInputError, match="'concat' or 'attention'"):
        PreferenceSetEncoder("mean", 4, 3, 16)
    with pytest.raises(InvalidInputError, match="at least 1"):
        PreferenceSetEncoder("attention", 0, 3, 16)
    model = encoder("attention")
    for wrong, match in (
        ((first[0], second[0], labels[0]), "same shape"),
        ((first, second[:, :3], labels), "same shape"),
        ((first, second, labels[:, :3]), "labels have shape"),
        ((first, second, labels, labels[:, :2] > 0), "mask has shape"),
        ((first[..., :2], second[..., :2], labels), "d_in=4"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            model(*wrong)
