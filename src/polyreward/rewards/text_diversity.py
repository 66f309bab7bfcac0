"""Lexical and structural diversity of a response, eight metrics in [0, 1], and the reward that weighs them.

Each metric is computed for a whole batch of texts at once: words become integers, and the rest is counting. `encode`
makes the batch; a metric takes a batch, one text or a list of texts.

    lex   |V| / N, types over tokens                     ent   entropy of the words / ln |V|
    len   deviation over mean of the sentence lengths    pat   entropy of the sentence types / ln 3
    adj   mean Jaccard distance of consecutive sentences yule  1 / (1 + K / K0), K = 1e4 (sum_r r^2 V_r - N) / N^2
    bi    distinct bigrams / bigrams                     func  entropy of the function words / ln |F|

Tokens are lower-case words, sentences end with ``.``, ``!`` or ``?``: see `polyreward.rewards.text_encoding`. A metric
that is not defined (one sentence, no function word, one type in an entropy ratio) is 0, and all are below two tokens.

lex, bi and yule fall with length, so the reward favours short texts; len and pat favour odd punctuation; a random
sequence of words has near the highest value. Keep its weight low, and put a format or fluency gate in front.

Paper: MultiRole-R1, Diversity-Enhanced Reasoning for Subjective Questions (arXiv 2507.20187).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.rewards.contract import Reward, is_finite
from polyreward.rewards.text_encoding import (
    FUNCTION_WORDS,
    SENTENCE_TYPES,
    EncodedTexts,
    distinct,
    encode,
    sentence_words,
    words_of,
)

Texts = str | Sequence[str] | EncodedTexts


def _metric(function: Callable[..., np.ndarray]) -> Callable[..., Any]:
    """A metric of a batch: for one text a float, for several (B,); 0 where it is not defined and below two tokens."""

    @wraps(function)
    def metric(texts: Texts, *args: Any, **options: Any) -> Any:
        encoded = texts if isinstance(texts, EncodedTexts) else encode(texts)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = function(encoded, *args, **options)
        values = np.where(np.isfinite(values) & (encoded.tokens >= 2), values, 0.0)
        return float(values[0]) if isinstance(texts, str) else values

    return metric


@_metric
def type_token_ratio(texts: EncodedTexts) -> np.ndarray:
    """D_lex = |V| / N, (B,) in [0, 1]."""
    return texts.per_text(texts.types[0]) / texts.tokens


@_metric
def word_entropy(texts: EncodedTexts) -> np.ndarray:
    """D_ent, entropy of the words over ln |V|, (B,) in [0, 1]; 0 for a single type."""
    owner, counts = texts.types
    return _entropy(texts, owner, counts) / np.log(texts.per_text(owner))


@_metric
def length_variation(texts: EncodedTexts, clip: bool = True) -> np.ndarray:
    """D_len, population deviation over mean of the sentence lengths in tokens, (B,); can exceed 1 without `clip`."""
    lengths = np.bincount(texts.sentence, minlength=len(texts.text))
    count, total, squares = (texts.per_text(texts.text, lengths.astype(float) ** power) for power in (0, 1, 2))
    values = np.sqrt(count * squares - total**2) / total  # whole numbers: exactly 0 for equal lengths
    return values.clip(0, 1) if clip else values


@_metric
def sentence_pattern(texts: EncodedTexts) -> np.ndarray:
    """D_pat, entropy of declarative, interrogative and exclamatory sentences over ln 3, (B,) in [0, 1]."""
    counts = np.bincount(texts.text * SENTENCE_TYPES + texts.kind, minlength=texts.texts * SENTENCE_TYPES)
    owner = np.arange(counts.size) // SENTENCE_TYPES
    return _entropy(texts, owner, counts) / np.log(SENTENCE_TYPES)


@_metric
def adjacent_distance(texts: EncodedTexts) -> np.ndarray:
    """D_adj, mean Jaccard distance of the word sets of consecutive sentences, (B,) in [0, 1]; 0 for one sentence."""
    size = texts.vocabulary
    members = distinct(texts.sentence * size + texts.words)
    sizes = np.bincount(members // size, minlength=len(texts.text))
    also_next = members[np.isin(members + size, members, assume_unique=True)] // size
    shared = np.bincount(also_next, minlength=len(texts.text))[:-1]
    distance = 1 - shared / (sizes[:-1] + sizes[1:] - shared)
    same = texts.text[:-1] == texts.text[1:]
    owner = texts.text[:-1][same]
    return texts.per_text(owner, distance[same]) / texts.per_text(owner)


@_metric
def yule(texts: EncodedTexts, scale: float = 100.0) -> np.ndarray:
    """D_yule = 1 / (1 + K / scale), (B,) in [0, 1].

    The formula printed in the paper has scale 1, which cannot give the values of its tables: K of plain text is 50 to
    200. The default is 100.
    """
    return 1 / (1 + _yule_k(texts) / scale)


@_metric
def yule_k(texts: EncodedTexts) -> np.ndarray:
    """Yule's K = 1e4 (sum_r r^2 V_r - N) / N^2, (B,) from 0 (all words distinct)."""
    return _yule_k(texts)


@_metric
def distinct_ngrams(texts: EncodedTexts, sizes: Sequence[int] = (2,)) -> np.ndarray:
    """D_bi, distinct n-grams over n-grams, across sentences, mean over the sizes: (B,) in [0, 1]."""
    ratios = []
    for size in sizes:
        grams = texts.words
        for shift in range(1, size):
            if texts.vocabulary ** (shift + 1) * texts.texts >= 2**62:  # make room in 64 bits
                grams = np.unique(grams, return_inverse=True)[1]
            following = texts.words[shift:]
            grams = grams[: len(following)] * texts.vocabulary + following
        first = texts.of_token[: len(grams)]
        whole = first == texts.of_token[size - 1 :]
        owner = distinct(grams[whole] * texts.texts + first[whole]) % max(texts.texts, 1)
        ratio = texts.per_text(owner) / texts.per_text(first[whole])
        ratios.append(np.where(np.isfinite(ratio), ratio, 0.0))
    return np.mean(ratios, axis=0)


@_metric
def function_word_entropy(texts: EncodedTexts) -> np.ndarray:
    """D_func, entropy of the function words over ln |F|, (B,) in [0, 1]; 0 without any, and for a list of one."""
    if texts.function_words < 2:
        return np.zeros(texts.texts)
    among = texts.function >= 0
    keys, counts = np.unique(texts.of_token[among] * texts.function_words + texts.function[among], return_counts=True)
    return _entropy(texts, keys // texts.function_words, counts) / np.log(texts.function_words)


#: Names of the eight metrics, in the order of the paper.
METRICS: tuple[str, ...] = ("lex", "ent", "len", "pat", "adj", "yule", "bi", "func")

#: "equal" is what the paper says; "table" was fitted to its tables, whose rows it gives to 0.01.
WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "equal": dict.fromkeys(METRICS, 1 / 8),
    "table": dict(zip(METRICS, (0.05, 0.05, 0.05, 0.40, 0.10, 0.10, 0.05, 0.20), strict=True)),
}


def diversity_metrics(
    texts: EncodedTexts | Sequence[str],
    *,
    yule_scale: float = 100.0,
    ngrams: Sequence[int] = (2,),
    function_words: Sequence[str] = FUNCTION_WORDS,
    clip: bool = True,
) -> dict[str, np.ndarray]:
    """The eight metrics of a batch, each float64 (B,); options as in `text_diversity`."""
    encoded = texts if isinstance(texts, EncodedTexts) else encode(texts, function_words=function_words)
    values = (
        type_token_ratio(encoded),
        word_entropy(encoded),
        length_variation(encoded, clip),
        sentence_pattern(encoded),
        adjacent_distance(encoded),
        yule(encoded, yule_scale),
        distinct_ngrams(encoded, ngrams),
        function_word_entropy(encoded),
    )
    return dict(zip(METRICS, values, strict=True))


def text_diversity(
    text: str | Sequence[str],
    sentences: Sequence[str] | Sequence[Sequence[str]] | None = None,
    *,
    yule_scale: float = 100.0,
    ngrams: Sequence[int] = (2,),
    function_words: Sequence[str] = FUNCTION_WORDS,
    clip: bool = True,
) -> dict[str, float]:
    """The eight metrics of one text, by the names in `METRICS` (arXiv 2507.20187).

    Parameters
    ----------
    text : str, or list of tokens with `sentences`
    sentences : list of sentences, each a text or a list of tokens; its words are the tokens
    yule_scale : float > 0
        K0; 1 gives the formula as printed.
    ngrams : sizes of the n-grams of ``bi``; (1, 2, 3) is the paper's other form
    function_words : sequence of str
        F in the paper, whose list is not published; `FUNCTION_WORDS` by default.
    clip : bool
        Limit ``len`` to 1, as the reward supposes.

    Returns
    -------
    dict of name to float, in [0, 1]; all 0 for a text of fewer than two tokens

    Raises
    ------
    InvalidInputError
        Tokens without sentences, or sentences that hold other tokens.
    """
    if isinstance(text, str):
        given: Any = [text]
    else:
        if sentences is None:
            raise InvalidInputError("text_diversity of tokens needs their sentences; of many texts: diversity_metrics")
        given = [sentences]
        inside = [word for sentence in sentences for word in sentence_words(sentence)]
        if inside != words_of(text):
            raise InvalidInputError(f"the sentences hold other tokens than the text: {inside} and {list(text)}")
    _check_options(yule_scale, ngrams)
    encoded = encode(given, function_words=function_words)
    values = diversity_metrics(encoded, yule_scale=yule_scale, ngrams=ngrams, clip=clip)
    return {name: float(value[0]) for name, value in values.items()}


@dataclass(frozen=True)
class DiversityReward(Reward):
    """Weighted sum of the eight diversity metrics of the text, R_div of MultiRole-R1 (arXiv 2507.20187).

    Parameters
    ----------
    weights : "equal", "table", or mapping of names in `METRICS` to weights >= 0
        Used as given; metrics that a mapping does not name have weight 0.
    yule_scale, ngrams, function_words : as in `text_diversity`
    length_normalised : bool
        Multiply by ``0.68 + 0.065 ln(words)`` and limit to 1: a fit of the length-normalised figures of the paper,
        which does not define them.

    Range [0, sum of the weights], which is 1 for both presets. Reads no column.
    """

    weights: str | Mapping[str, float] = "equal"
    yule_scale: float = 100.0
    ngrams: Sequence[int] = (2,)
    function_words: Sequence[str] = FUNCTION_WORDS
    length_normalised: bool = False

    def __post_init__(self) -> None:
        _check_options(self.yule_scale, self.ngrams)
        object.__setattr__(self, "_weights", _resolved(self.weights))

    def combine(self, metrics: Mapping[str, Any]) -> Any:
        """Weighted sum of metrics given by name: numbers or arrays."""
        weights: Mapping[str, float] = self._weights  # type: ignore[attr-defined]
        lacking = [name for name in weights if name not in metrics]
        if lacking:
            raise UnknownNameError(f"no metric {lacking[0]!r}{nearest(lacking[0], metrics)}")
        return sum(weight * metrics[name] for name, weight in weights.items())

    def values(self, texts: EncodedTexts | Sequence[str]) -> np.ndarray:
        """Rewards of a batch of texts, float64 (B,)."""
        encoded = texts if isinstance(texts, EncodedTexts) else encode(texts, function_words=self.function_words)
        combined = np.asarray(self.combine(diversity_metrics(encoded, yule_scale=self.yule_scale, ngrams=self.ngrams)))
        if self.length_normalised:
            combined = np.minimum(combined * (0.68 + 0.065 * np.log(np.maximum(encoded.tokens, 1))), 1.0)
        return combined

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion; the batch is counted at once."""
        texts = [sample.text for sample in self.samples(prompts, completions, columns)]
        return self.values(texts).tolist() if texts else []  # type: ignore[no-any-return]


def _resolved(weights: str | Mapping[str, float]) -> dict[str, float]:
    if isinstance(weights, str):
        if weights not in WEIGHTS:
            raise UnknownNameError(f"weights {weights!r}{nearest(weights, WEIGHTS)}")
        return dict(WEIGHTS[weights])
    for name, weight in weights.items():
        if name not in METRICS:
            raise UnknownNameError(f"metric {name!r}{nearest(str(name), METRICS)}")
        if not is_finite(weight) or weight < 0:
            raise InvalidInputError(f"weight of {name!r} must be a finite number >= 0, got {weight!r}")
    if not any(weights.values()):
        raise InvalidInputError("at least one weight must be above 0")
    return {name: float(weight) for name, weight in weights.items()}


def _check_options(yule_scale: float, ngrams: Sequence[int]) -> None:
    if not is_finite(yule_scale) or yule_scale <= 0:
        raise InvalidInputError(f"yule_scale must be a finite number > 0, got {yule_scale!r}")
    if not ngrams or not all(isinstance(size, int) and size >= 1 for size in ngrams):
        raise InvalidInputError(f"ngrams must be whole numbers >= 1, got {ngrams!r}")


def _entropy(texts: EncodedTexts, owner: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Entropy in nats of the counts of each text, (B,)."""
    share = counts / texts.per_text(owner, counts)[owner]
    terms = np.where(counts > 0, -share * np.log(np.where(counts > 0, share, 1.0)), 0.0)
    return texts.per_text(owner, terms)


def _yule_k(texts: EncodedTexts) -> np.ndarray:
    owner, counts = texts.types
    return 1e4 * (texts.per_text(owner, counts.astype(float) ** 2) - texts.tokens) / texts.tokens.astype(float) ** 2
