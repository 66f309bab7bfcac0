import multiprocessing

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError
from polyreward.reward_models.encoders import Encoder, Features, FeatureTable, HashingEncoder, look_up
from polyreward.reward_models.feature_cache import CachedEncoder
from polyreward.reward_models.text_encoders import FrozenEncoder, batches_by_length, pool
from polyreward.reward_models.texts import digests, joined

PROMPTS = ["the cat", "the dog", "a cat", [{"role": "user", "content": "the dog"}]]
RESPONSES = ["sat", "ran . a very good answer", "", [{"role": "assistant", "content": "is fine"}]]


class Counting:
    """Length of prompt and response, and how many were asked for."""

    def __init__(self, bad=None):
        self.asked, self.bad, self.identity = 0, bad, "counting"

    def encode(self, prompts, responses):
        self.asked += len(responses)
        pairs = zip(prompts, responses, strict=True)
        return np.array([[len(p), np.nan if r == self.bad else len(r)] for p, r in pairs], np.float32).reshape(-1, 2)

    def encode_prompts(self, prompts):
        return np.array([[len(p)] * 3 for p in prompts], np.float32)


def test_joined_texts():
    assert joined("Say hi.", "hi") == "Say hi.\nhi"
    assert joined("Say hi. ", "hi") == "Say hi. hi"
    assert joined("", "hi") == "hi"
    assert joined([{"role": "user", "content": "a"}], "b") == "\n\nuser: a\n\nassistant: b"
    with pytest.raises(InvalidInputError, match="response 3 must be a text"):
        HashingEncoder().encode(["p"] * 4, ["a", "b", "c", 1.5])


def test_digests_tell_prompt_and_response_apart():
    assert len(set(digests(["ab", "a", "", "ab"], ["c", "bc", "abc", [{"content": "c"}]]))) == 4
    assert digests([{"a": 1, "b": 2}], ["x"]) == digests([{"b": 2, "a": 1}], ["x"])
    assert digests(["p"], ["x"])[0].hex() == digests(["p"], ["x"])[0].hex()


def test_hashing_encoder():
    encoder = HashingEncoder(32)
    assert isinstance(encoder, Encoder)
    found = encoder.encode(PROMPTS, RESPONSES)
    assert found.shape == (4, 32)
    assert found.dtype == np.float32
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1, 0, 1], abs=1e-6)
    with_prompt = HashingEncoder(32, with_prompt=True)
    assert not np.allclose(with_prompt.encode(PROMPTS, RESPONSES)[0], found[0])
    assert with_prompt.identity != encoder.identity
    assert encoder.encode([], []).shape == (0, 32)
    assert encoder.encode_prompts(PROMPTS[:2]).shape == (2, 32)


def test_given_features():
    array = np.arange(12, dtype=np.float16).reshape(4, 3)
    encoder = Features(array, np.arange(4, dtype=np.float32).reshape(2, 2), name="mine")
    assert encoder.encode([0, 0], [3, 1]).tolist() == [[9, 10, 11], [3, 4, 5]]
    assert encoder.encode_prompts([1]).tolist() == [[2, 3]]
    table = encoder.lookup([0] * 4, np.arange(4))
    assert table.parts[0] is array
    assert table.take(np.array([2, 0])).dtype == torch.float32
    for responses, message in ((["a"], "row numbers"), ([4], r"responses\[0\] is row 4"), ([0, -1], "row -1")):
        with pytest.raises(InvalidInputError, match=message):
            encoder.encode([0] * len(responses), responses)
    with pytest.raises(InvalidInputError, match="no features of prompts"):
        Features(array).encode_prompts([0])
    for wrong in (array[0], array.astype(int), [[1.0]]):
        with pytest.raises(InvalidInputError, match="floating-point array"):
            Features(wrong)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 11), max_size=10), st.booleans())
def test_a_table_in_parts_is_one_array(rows, indexed):
    array = np.arange(24, dtype=np.float32).reshape(12, 2)
    index = np.arange(11, -1, -1) if indexed else None
    table = FeatureTable([array[:5], array[5:6], array[6:]], index)
    expected = array[::-1] if indexed else array
    assert table.take(np.array(rows, int)).numpy().tolist() == expected[np.array(rows, int)].tolist()
    assert table.array().tolist() == expected.tolist()
    assert len(table) == 12


def test_an_encoder_with_a_wrong_number_of_rows_is_named():
    class Short(Counting):
        def encode(self, prompts, responses):
            return super().encode(prompts, responses)[1:]

    with pytest.raises(InvalidInputError, match="counting gave 1 rows for 2"):
        look_up(Short(), ["a", "b"], ["c", "d"])


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("pooling", ["last", "mean", "first"])
def test_frozen_features_do_not_depend_on_the_batch(kind, pooling):
    model, tokenizer = tiny_models.model(kind), tiny_models.tokenizer()
    together = FrozenEncoder(model, tokenizer, pooling, name="tiny").encode(PROMPTS, RESPONSES)
    alone = FrozenEncoder(model, tokenizer, pooling, name="tiny", batch_tokens=1)
    one_by_one = np.concatenate([alone.encode([p], [r]) for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    assert np.abs(together - one_by_one).max() < 1e-5
    ids = tokenizer(joined(PROMPTS[1], RESPONSES[1]), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model(input_ids=ids).last_hidden_state[0]
    expected = {"last": states[-1], "mean": states.mean(0), "first": states[0]}[pooling]
    assert np.abs(together[1] - expected.numpy()).max() < 1e-5


def test_frozen_encoder_options(tmp_path):
    model, tokenizer = tiny_models.model(), tiny_models.tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    from_folder = FrozenEncoder(str(tmp_path))
    loaded = FrozenEncoder(model, tokenizer, name="tiny")
    assert np.allclose(from_folder.encode(PROMPTS, RESPONSES), loaded.encode(PROMPTS, RESPONSES), atol=1e-6)
    unit = FrozenEncoder(model, tokenizer, "mean", normalize=True, name="tiny").encode(PROMPTS, RESPONSES)
    assert np.linalg.norm(unit, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    # the end of a text that is too long stays
    short = FrozenEncoder(model, tokenizer, name="tiny", max_length=2)
    assert np.allclose(
        short.encode(["the cat sat ."], ["good answer"]), short.encode(["a"], ["good answer"]), atol=1e-6
    )
    inner = FrozenEncoder(model, tokenizer, name="tiny", layer=1).encode(PROMPTS, RESPONSES)
    assert not np.allclose(inner, loaded.encode(PROMPTS, RESPONSES))
    assert loaded.encode_prompts(["the cat"]).shape == (1, 16)
    assert loaded.encode([], []).shape == (0, 16)
    assert len({short.identity, loaded.identity, from_folder.identity}) == 3


def test_mismatched_tokenizer_and_missing_parts(tmp_path):
    small = tiny_models.model(vocabulary=8)
    with pytest.raises(InvalidInputError, match="do not belong together"):
        FrozenEncoder(small, tiny_models.tokenizer(), name="tiny").encode(["a"], ["b"])
    with pytest.raises(InvalidInputError, match="needs its tokenizer"):
        FrozenEncoder(small, name="tiny").encode(["a"], ["b"])
    with pytest.raises(InvalidInputError, match="cannot load"):
        FrozenEncoder(str(tmp_path)).encode(["a"], ["b"])
    with pytest.raises(InvalidInputError, match="pooling must be"):
        FrozenEncoder("x", pooling="max")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 60))
def test_batches_by_length(lengths, tokens):
    found = list(batches_by_length(lengths, tokens))
    assert sorted(np.concatenate(found).tolist() if found else []) == list(range(len(lengths)))
    for rows in found:
        longest = max(lengths[i] for i in rows)
        assert len(rows) == 1 or longest * len(rows) <= tokens


def test_pooling_leaves_padding_out():
    states = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(states, mask, "last").tolist() == [[2, 3], [10, 11]]
    assert pool(states, mask, "mean").tolist() == [[1, 2], [8, 9]]
    assert pool(states, mask, "first").tolist() == [[0, 1], [6, 7]]


def test_features_are_computed_once(tmp_path):
    inner = Counting()
    cache = CachedEncoder(inner, tmp_path, piece=2)
    prompts, responses = ["p", "p", "qq", "p"], ["a", "bb", "a", "a"]
    first = cache.encode(prompts, responses)
    assert first.tolist() == [[1, 1], [1, 2], [2, 1], [1, 1]]
    assert inner.asked == 3
    other = CachedEncoder(Counting(), tmp_path)
    assert other.encode(prompts[::-1], responses[::-1]).tolist() == first[::-1].tolist()
    assert other.encoder.asked == 0
    table = other.lookup([*prompts, "new"], [*responses, "ccc"])
    assert other.encoder.asked == 1
    assert table.take(np.array([4, 0])).tolist() == [[3, 3], [1, 1]]
    assert isinstance(table.parts[0], np.memmap)
    assert other.encode_prompts(["p", "qq"]).tolist() == [[1, 1, 1], [2, 2, 2]]
    assert other.encode([], []).shape[0] == 0


def test_cache_keeps_encoders_and_precisions_apart(tmp_path):
    half = CachedEncoder(Counting(), tmp_path, "float16")
    full = CachedEncoder(Counting(), tmp_path)
    assert half.encode(["p"], ["a"]).dtype == np.float32
    assert half.lookup(["p"], ["a"]).parts[0].dtype == np.float16
    full.encode(["p"], ["a"])
    assert full.encoder.asked == 1
    renamed = Counting()
    renamed.identity = "other"
    CachedEncoder(renamed, tmp_path).encode(["p"], ["a"])
    assert renamed.asked == 1


def test_a_feature_that_is_no_number_is_named_and_not_kept(tmp_path):
    cache = CachedEncoder(Counting(bad="x"), tmp_path)
    with pytest.raises(InvalidInputError, match=r"counting gave a feature that is NaN.*for response 2"):
        cache.encode(["p"] * 4, ["a", "b", "x", "c"])
    assert cache.encode(["p"], ["a"]).tolist() == [[1, 1]]


def test_a_damaged_piece_is_named(tmp_path):
    cache = CachedEncoder(Counting(), tmp_path)
    cache.encode(["p"], ["a"])
    (path,) = (p for p in cache.folder.glob("*.npy") if "keys" not in p.name)
    path.write_bytes(b"broken")
    with pytest.raises(InvalidInputError, match="not a readable array"):
        CachedEncoder(Counting(), tmp_path).encode(["p"], ["a"])


def test_a_piece_without_its_hashes_does_not_count(tmp_path):
    cache = CachedEncoder(Counting(), tmp_path)
    cache.encode(["p"], ["a"])
    next(cache.folder.glob("*.keys.npy")).unlink()
    again = CachedEncoder(Counting(), tmp_path)
    assert again.encode(["p"], ["a"]).tolist() == [[1, 1]]
    assert again.encoder.asked == 1


def _encode(folder, start):
    texts = [str(i) * (i % 7) for i in range(start, start + 60)]
    return CachedEncoder(Counting(), folder, piece=7).encode(texts, texts).tolist()


@pytest.mark.slow
def test_several_processes_share_a_cache(tmp_path):
    starts = [0, 20, 40, 0]
    with multiprocessing.get_context("fork").Pool(4) as pool_:
        found = pool_.starmap(_encode, [(tmp_path, start) for start in starts])
    for start, rows in zip(starts, found, strict=True):
        assert rows == [[len(str(i) * (i % 7))] * 2 for i in range(start, start + 60)]
    last = CachedEncoder(Counting(), tmp_path)
    texts = [str(i) * (i % 7) for i in range(100)]
    last.encode(texts, texts)
    assert last.encoder.asked == 0
