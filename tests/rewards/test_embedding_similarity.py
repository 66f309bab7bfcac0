import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, MissingColumnError, MissingExtraError
from polyreward.rewards.embedders import HashingEmbedder, LatentEmbedder, SentenceEmbedder
from polyreward.rewards.embedding_similarity import (
    EmbeddingSurrogateReward,
    RunningSigmoid,
    SquashedReward,
    cosine,
    unrelated_threshold,
)

VECTORS = {"east": (1, 0), "far east": (5, 0), "north": (0, 2), "west": (-3, 0), "north east": (1, 1), "void": (0, 0)}


def compass(texts):
    return np.array([VECTORS[text] for text in texts], dtype=np.float32)


def test_identical_orthogonal_and_opposite():
    reward = EmbeddingSurrogateReward(compass)
    completions = ["east", "far east", "north", "west", "north east", "void", "", "  "]
    values = reward(None, completions, answer=["east"] * 8)
    assert values == pytest.approx([1, 1, 0, 0, np.sqrt(0.5), 0, 0, 0], abs=1e-7)
    signed = EmbeddingSurrogateReward(compass, clip=False)(None, completions, answer=["east"] * 8)
    assert signed == pytest.approx([1, 1, 0, -1, np.sqrt(0.5), 0, 0, 0], abs=1e-7)
    assert reward(None, ["east", ""], answer=["", ""]) == [0, 0]


def test_several_references_and_missing_ones():
    reward = EmbeddingSurrogateReward(compass, column="reference", extract="<answer>")
    values = reward(
        None,
        ["<answer>north</answer>", "no tag", "<answer>north</answer>", "<answer>north</answer>"],
        reference=[["east", "north", None], ["east"], None, np.array(["north east", "west"], dtype=object)],
    )
    assert values == [1, 0, None, pytest.approx(np.sqrt(0.5))]
    with pytest.raises(InvalidInputError, match=r"column 'reference', row 0: an empty list"):
        reward(None, ["x"], reference=[[]])
    with pytest.raises(MissingColumnError):
        reward(None, ["x"], answer=["east"])
    assert reward([], []) == []


def test_each_text_is_embedded_once_and_empty_text_never():
    asked = []

    def embed(texts):
        asked.append(texts)
        return compass(texts)

    EmbeddingSurrogateReward(embed)(None, ["east", "east", "", "north"], answer=["north", "east", "north", "north"])
    assert asked == [["east", "north"]]
    assert EmbeddingSurrogateReward(embed)(None, ["", " "], answer=["", "\n"]) == [0, 0]
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("embed", "message"),
    [
        (lambda texts: np.zeros((1, 3)), r"shape \(1, 3\) for 2 texts"),
        (lambda texts: np.zeros(2), r"shape \(2,\)"),
        (lambda texts: np.full((2, 3), np.nan), "NaN or infinity for the text 'a'"),
        (lambda texts: [["x"], ["y"]], "no table of numbers"),
        (lambda texts: np.zeros((2, 0)), r"shape \(2, 0\)"),
    ],
)
def test_bad_embeddings_are_named(embed, message):
    with pytest.raises(InvalidInputError, match=message):
        EmbeddingSurrogateReward(embed)(None, ["a"], answer=["b"])
    with pytest.raises(InvalidInputError, match="embed must be a function"):
        EmbeddingSurrogateReward(None)


def test_tensors_as_embeddings():
    reward = EmbeddingSurrogateReward(lambda texts: torch.from_numpy(compass(texts)).bfloat16())
    assert reward(None, ["east", "north"], answer=["far east", "east"]) == [1, 0]


vectors = st.lists(st.floats(-1e150, 1e150), min_size=3, max_size=3)


@given(vectors, vectors, st.floats(1e-3, 1e3))
def test_cosine(left, right, factor):
    a, b = np.array(left), np.array(right)
    value = cosine(a, b, clip=False)
    assert -1 <= value <= 1
    assert np.isfinite(value)
    assert value == pytest.approx(float(cosine(b, a, clip=False)), abs=1e-12)
    assert cosine(a * factor, b, clip=False) == pytest.approx(float(value), abs=1e-9)
    assert cosine(a, b) == max(float(value), 0)
    assert cosine(torch.tensor(a), torch.tensor(b), clip=False).item() == pytest.approx(float(value), abs=1e-12)


def test_cosine_of_tensors_keeps_device_and_shape():
    left = torch.tensor([[1.0, 0], [0, 0]], dtype=torch.float16)
    found = cosine(left, torch.ones(2, 2, dtype=torch.float16))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([2**-0.5, 0])


def test_threshold_of_unrelated_texts():
    texts = ["east", "north", "north east"]
    assert unrelated_threshold(compass, texts, 1.0) == pytest.approx(2**-0.5)
    assert unrelated_threshold(compass, texts, 0.0) == 0
    with pytest.raises(InvalidInputError, match="at least two texts"):
        unrelated_threshold(compass, ["east"])


def test_embedders():
    corpus = ["the cat sat on the mat", "a dog ran in the park", "cats and dogs are animals", "prime numbers are odd"]
    for embed in (HashingEmbedder(), HashingEmbedder(characters=True, ngrams=(2, 4)), LatentEmbedder(corpus, 3)):
        reward = pickle.loads(pickle.dumps(EmbeddingSurrogateReward(embed)))
        same, near, far, odd = reward(
            None, [corpus[0], "the cat sat", "prime numbers", "\ud800 \x00 zzz"], answer=[corpus[0]] * 4
        )
        assert same == pytest.approx(1)
        assert same >= near > far
        assert 0 <= odd <= 1
        assert embed(["...", "x"]).shape[0] == 2
    assert np.abs(HashingEmbedder()(["!!!"])).sum() == 0
    assert (HashingEmbedder()(corpus) == HashingEmbedder()(corpus)).all()
    with pytest.raises(InvalidInputError, match="without words"):
        LatentEmbedder(["...", ""])
    with pytest.raises(InvalidInputError, match="two different words"):
        LatentEmbedder(["one one", "one"])


def test_sentence_transformers_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    embed = pickle.loads(pickle.dumps(SentenceEmbedder(device="cpu")))
    assert embed == SentenceEmbedder(device="cpu")
    with pytest.raises(MissingExtraError, match=r"polyreward\[embeddings\]"):
        EmbeddingSurrogateReward(embed)(None, ["a"], answer=["b"])


def test_running_sigmoid_by_hand():
    squash = RunningSigmoid(momentum=0.5)
    assert squash(np.array([0.0, 2.0])) == pytest.approx([1 / (1 + np.e), 1 / (1 + np.exp(-1))])
    assert (squash.mean, squash.var, squash.count) == (1, 1, 1)
    # second update: weight 0.5 / (1 - 0.25) = 2/3; batch mean 4, variance 0
    found = squash(np.array([4.0, 4.0]))
    assert squash.mean == pytest.approx(3)
    assert squash.var == pytest.approx(1 / 3 * (1 + 2 / 3 * 9))
    assert found == pytest.approx(1 / (1 + np.exp(-1 / np.sqrt(7 / 3))))
    before = squash.state_dict()
    squash(np.array([100.0]), update=False)
    assert squash.state_dict() == before


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=5), min_size=1, max_size=6), st.floats(0, 0.99))
def test_state_is_the_moment_of_the_weighted_past(batches, momentum):
    squash = RunningSigmoid(momentum)
    for batch in batches:
        squash(np.array(batch))
    weights = np.array([momentum ** (len(batches) - 1 - t) for t in range(len(batches))])
    per_value = np.concatenate([[w / len(b)] * len(b) for w, b in zip(weights, batches, strict=True)]) / weights.sum()
    values = np.concatenate(batches)
    mean = float(per_value @ values)
    assert squash.mean == pytest.approx(mean, abs=1e-8)
    assert squash.var == pytest.approx(float(per_value @ (values - mean) ** 2), abs=1e-6)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.floats(-100, 100), st.floats(0.01, 100))
def test_squashing_keeps_order_and_forgets_scale(values, shift, scale):
    raw = np.array(values)
    found = RunningSigmoid()(raw)
    assert ((found >= 0) & (found <= 1)).all()
    assert (np.diff(found[np.argsort(raw)]) >= 0).all()
    if raw.std() > 1e-3:
        assert RunningSigmoid()(raw * scale + shift) == pytest.approx(found, abs=1e-4)


def test_running_sigmoid_corner_cases():
    squash = RunningSigmoid()
    assert squash(np.array([1.0, -1.0]), update=False) == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.e)])
    assert squash(np.array([3.0, 3.0])).tolist() == [0.5, 0.5]
    assert squash(np.zeros(0)).shape == (0,)
    assert squash(np.array([np.nan])).tolist() == pytest.approx([np.nan], nan_ok=True)
    assert squash.count == 1
    with pytest.raises(InvalidInputError, match="infinite"):
        squash(np.array([0.0, np.inf]))
    with pytest.raises(InvalidInputError, match="too large"):
        squash(np.array([1e308, -1e308]))
    assert (squash.mean, squash.count) == (3, 1)
    mixed = RunningSigmoid()(np.array([0.0, np.nan, 2.0]))
    assert mixed == pytest.approx([1 / (1 + np.e), np.nan, 1 / (1 + np.exp(-1))], nan_ok=True)
    for dtype in (torch.float16, torch.float32, torch.float64):
        found = RunningSigmoid()(torch.tensor([0.0, 2.0], dtype=dtype))
        assert found.dtype == dtype
        assert found.float().numpy() == pytest.approx([1 / (1 + np.e), 1 / (1 + np.exp(-1))], abs=1e-3)
    assert RunningSigmoid()(np.array([0, 2], dtype=np.float32)).dtype == np.float32
    for momentum in (1.0, -0.1, float("nan")):
        with pytest.raises(InvalidInputError, match="momentum"):
            RunningSigmoid(momentum)


def test_state_goes_out_and_in():
    first, second = RunningSigmoid(0.9), RunningSigmoid(0.9)
    for batch in ([1.0, 5.0], [2.0], [0.0, 9.0, 4.0]):
        first(batch)
    second.load_state_dict(first.state_dict())
    assert (first([7.0, 1.0]) == second([7.0, 1.0])).all()
    assert second.state_dict() == first.state_dict() == pickle.loads(pickle.dumps(first)).state_dict()
    for broken in (
        {},
        {"mean": 0, "var": -1, "count": 1},
        {"mean": "x", "var": 1, "count": 1},
        {"mean": np.nan, "var": 1, "count": 1},
    ):
        with pytest.raises(InvalidInputError, match="state of a RunningSigmoid"):
            second.load_state_dict(broken)
    assert second.count == 4


def raw(prompts, completions, **columns):
    return [None if not text else 10.0 * len(text) for text in completions]


def test_squashed_reward():
    reward = SquashedReward(raw)
    assert reward(["p"] * 3, ["a", "", "aaa"]) == [
        pytest.approx(1 / (1 + np.e)),
        None,
        pytest.approx(1 / (1 + np.exp(-1))),
    ]
    assert (reward.sigmoid.mean, reward.sigmoid.count) == (20, 1)
    assert SquashedReward(raw, reward.sigmoid, update=False)(["p"], ["aa"]) == [0.5]
    assert reward.__name__ == "sigmoid(raw)"
    assert reward([], []) == []
    assert reward.per_sample is False
