import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.rewards.text_diversity import (
    METRICS,
    WEIGHTS,
    DiversityReward,
    adjacent_distance,
    distinct_ngrams,
    diversity_metrics,
    function_word_entropy,
    length_variation,
    sentence_pattern,
    text_diversity,
    type_token_ratio,
    word_entropy,
    yule,
    yule_k,
)
from polyreward.rewards.text_encoding import FUNCTION_WORDS, EncodedTexts, encode, split_sentences, tokenize

WORKED, LIST = "I see a cat. I see a dog. Do you see it?", ("a", "i", "it", "you", "do")
EXPECTED = {"lex": 0.6667, "ent": 0.951796, "len": 0.0, "pat": 0.579380, "adj": 0.628571, "yule": 0.125874,
            "bi": 0.818182, "func": 0.962961}  # fmt: skip


def plain(text, functions=FUNCTION_WORDS, scale=100.0):
    """The eight metrics of a text of words, spaces and sentence ends, by loops."""
    sentences = [s for s in re.findall(r"[^.!?]+[.!?]*", text) if re.search(r"\w", s)]
    words = [re.findall(r"[a-z']+", s.lower()) for s in sentences]
    flat = [word for sentence in words for word in sentence]
    n = len(flat)
    if n < 2:
        return dict.fromkeys(METRICS, 0.0)

    def entropy(counts):
        return -sum(c / sum(counts) * math.log(c / sum(counts)) for c in counts if c)

    counts, lengths = Counter(flat), [len(sentence) for sentence in words]
    mean = sum(lengths) / len(lengths)
    kinds = Counter("?" if "?" in s else "!" if "!" in s else "." for s in sentences)
    distances = [1 - len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in itertools.pairwise(words)]
    used = Counter(word for word in flat if word in functions)
    k = 1e4 * (sum(c * c for c in counts.values()) - n) / n**2
    pairs = list(itertools.pairwise(flat))
    return {
        "lex": len(counts) / n,
        "ent": entropy(counts.values()) / math.log(len(counts)) if len(counts) > 1 else 0.0,
        "len": min(1.0, math.sqrt(sum((x - mean) ** 2 for x in lengths) / len(lengths)) / mean),
        "pat": entropy(kinds.values()) / math.log(3),
        "adj": sum(distances) / len(distances) if distances else 0.0,
        "yule": 1 / (1 + k / scale),
        "bi": len(set(pairs)) / len(pairs),
        "func": entropy(used.values()) / math.log(len(functions)) if used else 0.0,
    }


def test_worked_example():
    values = text_diversity(WORKED, function_words=LIST)
    assert tuple(values) == METRICS
    for name, expected in EXPECTED.items():
        assert values[name] == pytest.approx(expected, abs=5e-5 if name == "lex" else 5e-7)
    assert yule_k(WORKED) == pytest.approx(694.44, abs=5e-3)
    assert text_diversity(WORKED, yule_scale=1)["yule"] == pytest.approx(0.001438, abs=5e-7)


def test_each_metric_by_itself():
    coded = encode([WORKED], function_words=LIST)
    found = (type_token_ratio(coded), word_entropy(coded), length_variation(coded), sentence_pattern(coded),
             adjacent_distance(coded), yule(coded), distinct_ngrams(coded), function_word_entropy(coded))  # fmt: skip
    assert [float(value[0]) for value in found] == pytest.approx([EXPECTED[name] for name in METRICS], abs=5e-5)
    assert type_token_ratio(WORKED) == pytest.approx(2 / 3)
    assert type_token_ratio([WORKED, "a a"]).tolist() == pytest.approx([2 / 3, 1 / 2])
    assert distinct_ngrams(WORKED, (1, 2, 3)) == pytest.approx((8 / 12 + 9 / 11 + 9 / 10) / 3)


def test_tokens_and_sentences_may_be_given():
    sentences = ["I see a cat.", "I see a dog.", "Do you see it?"]
    tokens = tokenize(WORKED)
    expected = text_diversity(WORKED, function_words=LIST)
    assert text_diversity(tokens, sentences, function_words=LIST) == expected
    split = [["I", "see", "a", "cat", "."], ["I", "see", "a", "dog"], ["Do", "you", "see", "it", "?"]]
    assert text_diversity(tokens, split, function_words=LIST) == expected
    with pytest.raises(InvalidInputError, match="needs their sentences"):
        text_diversity(tokens)
    with pytest.raises(InvalidInputError, match="other tokens than the text"):
        text_diversity(tokens[1:], sentences)


PUBLISHED = {"lex": 93.35, "ent": 93.40, "len": 64.61, "pat": 65.24, "adj": 98.87, "yule": 67.29, "bi": 87.07,
             "func": 91.50}  # fmt: skip


def test_weights_of_a_published_row():
    assert DiversityReward("table").combine(PUBLISHED) == pytest.approx(77.93, abs=0.005)
    assert DiversityReward("equal").combine(PUBLISHED) == pytest.approx(sum(PUBLISHED.values()) / 8)
    assert DiversityReward({"lex": 0.5, "func": 0.25}).combine(PUBLISHED) == pytest.approx(46.675 + 22.875)
    assert [sum(weights.values()) for weights in WEIGHTS.values()] == pytest.approx([1, 1])


@pytest.mark.parametrize("count", [2, 3, 7, 50])
def test_all_tokens_equal_and_all_distinct(count):
    same = text_diversity("word " * count)
    assert (same["lex"], same["ent"]) == (pytest.approx(1 / count), 0)
    assert same["bi"] == pytest.approx(1 / (count - 1))
    distinct = text_diversity(" ".join(f"w{i}" for i in range(count)))
    assert [distinct[name] for name in ("lex", "ent", "yule", "bi")] == pytest.approx([1, 1, 1, 1])
    assert yule_k(" ".join(f"w{i}" for i in range(count))) == 0


@pytest.mark.parametrize("text", ["", " ", "...!?", "one", "One.", "\x00", "—"])
def test_texts_below_two_tokens_have_no_diversity(text):
    assert text_diversity(text) == dict.fromkeys(METRICS, 0.0)
    assert DiversityReward()(None, [text]) == [0.0]


def test_what_is_not_defined_is_0():
    one = text_diversity("Seven cats slept")
    assert (one["adj"], one["len"], one["pat"], one["func"]) == (0, 0, 0, 0)
    assert text_diversity("a cat", function_words=("a",))["func"] == 0  # ln |F| = 0
    assert text_diversity("a cat", function_words=())["func"] == 0
    assert distinct_ngrams("two words", (3,)) == 0


def test_length_variation_can_exceed_1_without_the_limit():
    text = "a. " * 20 + "b " * 200
    lengths = [1] * 20 + [200]
    expected = np.std(lengths) / np.mean(lengths)
    assert expected > 1
    assert text_diversity(text)["len"] == 1
    assert text_diversity(text, clip=False)["len"] == pytest.approx(expected)


texts = st.lists(
    st.sampled_from(["the", "a", "is", "cat", "dog", "don't", ".", "!", "?", "?!", "..."]), max_size=40
).map(" ".join)


@settings(max_examples=200)
@given(st.lists(texts, max_size=5))
def test_equal_to_plain_loops_and_independent_of_the_batch(batch):
    together = diversity_metrics(batch)
    rewards = DiversityReward("table")(None, batch)
    for row, text in enumerate(batch):
        expected = plain(text)
        assert {name: together[name][row] for name in METRICS} == pytest.approx(expected, abs=1e-12)
        assert text_diversity(text) == {name: together[name][row] for name in METRICS}
        assert rewards[row] == pytest.approx(sum(WEIGHTS["table"][name] * expected[name] for name in METRICS))
        assert 0 <= rewards[row] <= 1
    assert DiversityReward("table")(None, batch[::-1]) == rewards[::-1]


@given(st.lists(st.text(max_size=60), max_size=4))
def test_any_text_earns_a_value_in_range(batch):
    values = DiversityReward(ngrams=(1, 2, 3), length_normalised=True)(None, batch)
    assert all(0 <= value <= 1 + 1e-12 for value in values)


def test_tokens_and_sentences():
    assert tokenize("It’s a Cat-like_thing, 3 times: ÉTÉ!") == [
        "it's",
        "a",
        "cat",
        "like",
        "thing",
        "3",
        "times",
        "été",
    ]
    assert split_sentences("Is 3.14 pi? Yes! Or... no. end") == ["Is 3.14 pi?", "Yes!", "Or...", "no.", "end"]
    assert split_sentences("?! . a") == ["a"]
    assert encode(["What?! So! he said 'why?' Done"]).kind.tolist() == [1, 2, 1, 0]


def test_arrays_of_words_are_texts():
    words = np.random.default_rng(0).integers(0, 6, (9, 3, 5))
    written = [" ".join(" ".join(f"w{code}" for code in s) + "." for s in text) for text in words]
    one, other = diversity_metrics(EncodedTexts.from_array(words)), diversity_metrics(encode(written))
    for name in METRICS:
        np.testing.assert_allclose(one[name], other[name], atol=1e-12)


def test_length_normalised():
    words = " ".join(f"w{i % 30}" for i in range(100))
    plain_value, scaled = (DiversityReward(length_normalised=flag)(None, [words])[0] for flag in (False, True))
    assert scaled == pytest.approx(plain_value * (0.68 + 0.065 * math.log(100)))


def test_word_salad_has_high_diversity_and_a_repeated_answer_low():
    salad = " ".join(f"w{i}" for i in range(60))
    value = DiversityReward({"lex": 0.25, "ent": 0.25, "yule": 0.25, "bi": 0.25})
    assert value(None, [salad, "yes yes yes yes"]) == pytest.approx([1.0, 0.25 * (1 / 4 + 0 + 1 / 76 + 1 / 3)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": "equel"}, UnknownNameError, "did you mean 'equal'"),
        ({"weights": {"lexx": 1}}, UnknownNameError, "did you mean 'lex'"),
        ({"weights": {"lex": -1}}, InvalidInputError, "weight of 'lex'"),
        ({"weights": {"lex": math.nan}}, InvalidInputError, "weight of 'lex'"),
        ({"weights": {}}, InvalidInputError, "at least one weight"),
        ({"yule_scale": 0}, InvalidInputError, "yule_scale"),
        ({"ngrams": ()}, InvalidInputError, "ngrams"),
        ({"ngrams": (0,)}, InvalidInputError, "ngrams"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        DiversityReward(**options)


def test_metrics_that_lack_a_weighted_name_are_refused():
    with pytest.raises(UnknownNameError, match="no metric 'ent'"):
        DiversityReward().combine({"lex": 1.0})


def test_function_words_are_distinct_and_lower_case():
    assert len(set(FUNCTION_WORDS)) == len(FUNCTION_WORDS)
    assert all(word == word.lower() for word in FUNCTION_WORDS)
