"""Texts as integers: tokens and sentences of a whole batch, so that counting needs no loop over words.

*Tokens* are runs of letters, digits and inner apostrophes, lower case; a script without spaces gives one token a run.
*Sentences* end with a run of ``.``, ``!`` or ``?``; a point between two digits ends none. A sentence is a question
where its end holds ``?``, an exclamation where it holds ``!`` and no ``?``, else declarative, also without an end.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_SENTENCE = re.compile(r"[^.!?]+(?:(?<=\d)\.(?=\d)[^.!?]+)*[.!?]*")
_ENDS = ".!?"
_AFTER_ENDS = _ENDS + " \t\r\n\"'’”)]"
SENTENCE_TYPES = 3

#: English function words, version 1; another list or language is an argument.
FUNCTION_WORDS: tuple[str, ...] = (
    "a", "about", "above", "after", "again", "against", "all", "although", "am", "among", "an", "and", "any", "are",
    "as", "at", "be", "because", "been", "before", "being", "below", "between", "both", "but", "by", "can", "could",
    "did", "do", "does", "down", "during", "each", "either", "every", "few", "for", "from", "had", "has", "have",
    "he", "her", "here", "hers", "him", "his", "how", "i", "if", "in", "into", "is", "it", "its", "itself", "just",
    "may", "me", "might", "mine", "more", "most", "must", "my", "neither", "no", "nor", "not", "of", "off", "on",
    "once", "only", "or", "other", "our", "ours", "out", "over", "own", "same", "shall", "she", "should", "since",
    "so", "some", "such", "than", "that", "the", "their", "theirs", "them", "then", "there", "these", "they", "this",
    "those", "though", "through", "to", "too", "under", "unless", "until", "up", "upon", "us", "very", "was", "we",
    "were", "what", "when", "where", "whether", "which", "while", "who", "whom", "whose", "why", "will", "with",
    "within", "without", "would", "yet", "you", "your", "yours",
)  # fmt: skip


@dataclass(frozen=True)
class EncodedTexts:
    """Texts as integers: T tokens in S sentences of B texts, in order.

    Attributes
    ----------
    words : int (T,)
        Equal for equal words.
    sentence : int (T,)
        Which sentence each token is in, not decreasing; every sentence has a token.
    text : int (S,)
        Which text each sentence is in, not decreasing.
    kind : int (S,)
        0 declarative, 1 interrogative, 2 exclamatory.
    texts : int
        B; texts without a token count.
    function : int (T,)
        Which function word each token is, -1 for none.
    function_words : int
        Number of function words in the list.
    """

    words: np.ndarray
    sentence: np.ndarray
    text: np.ndarray
    kind: np.ndarray
    texts: int
    function: np.ndarray
    function_words: int

    @cached_property
    def of_token(self) -> np.ndarray:
        """Which text each token is in, int (T,)."""
        return self.text[self.sentence]

    @cached_property
    def tokens(self) -> np.ndarray:
        """Number of tokens of each text, int (B,)."""
        return np.bincount(self.of_token, minlength=self.texts)

    @cached_property
    def vocabulary(self) -> int:
        """Upper bound of the codes of words."""
        return int(self.words.max(initial=0)) + 1

    @cached_property
    def types(self) -> tuple[np.ndarray, np.ndarray]:
        """Text and number of occurrences of each distinct word of each text, both int."""
        keys, counts = np.unique(self.of_token * self.vocabulary + self.words, return_counts=True)
        owner = keys // self.vocabulary
        # by count: codes depend on the other texts of the batch, and so would the rounding of a sum in their order
        most = int(counts.max(initial=0)) + 1
        ordered = np.sort(owner * most + counts)
        return ordered // most, ordered % most

    def per_text(self, owner: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
        """Sum of values, or count, over the texts that own them, (B,)."""
        return np.bincount(owner, values, minlength=self.texts)

    @classmethod
    def from_array(cls, words: np.ndarray) -> EncodedTexts:
        """Texts (B, S, L) of B texts with S declarative sentences of L words, integers >= 0; no function words."""
        texts, sentences, length = words.shape
        return cls(
            words.reshape(-1),
            np.repeat(np.arange(texts * sentences), length),
            np.repeat(np.arange(texts), sentences),
            np.zeros(texts * sentences, dtype=np.int64),
            texts,
            np.full(words.size, -1),
            0,
        )


def tokenize(text: str) -> list[str]:
    """Words of a text, lower case."""
    return _TOKEN.findall(text.lower().replace("’", "'"))


def split_sentences(text: str) -> list[str]:
    """Sentences of a text with their ends; those without a word are left out."""
    return [sentence.strip() for sentence in _SENTENCE.findall(text) if _TOKEN.search(sentence)]


def encode(
    texts: str | Sequence[str] | Sequence[Sequence[str]], *, function_words: Sequence[str] = FUNCTION_WORDS
) -> EncodedTexts:
    """Texts as integers; a text may also be given as a list of its sentences, each a text or a list of tokens.

    The end of a sentence given as tokens is its last token where that is one of ``.!?``.
    """
    listed = [texts] if isinstance(texts, str) else texts
    split = [split_sentences(text) if isinstance(text, str) else list(text) for text in listed]
    sentences = list(itertools.chain.from_iterable(split))
    tokens = [sentence_words(sentence) for sentence in sentences]
    counts = np.array([len(words) for words in tokens], dtype=np.int64)
    flat = list(itertools.chain.from_iterable(tokens))
    known = {word: code for code, word in enumerate(dict.fromkeys(flat))}
    words = np.fromiter(map(known.__getitem__, flat), dtype=np.int64, count=len(flat))
    special = {word: code for code, word in enumerate(dict.fromkeys(map(str.lower, function_words)))}
    function = np.fromiter((special.get(word, -1) for word in known), dtype=np.int64, count=len(known))
    full = counts > 0
    owner = np.repeat(np.arange(len(split)), np.array([len(part) for part in split], dtype=np.int64))
    kind = np.array([_kind(sentence) for sentence in sentences], dtype=np.int64)
    return EncodedTexts(
        words,
        np.repeat(np.arange(full.sum()), counts[full]),
        owner[full],
        kind[full],
        len(split),
        function[words] if len(words) else words,
        len(special),
    )


def distinct(keys: np.ndarray) -> np.ndarray:
    """Distinct integers in ascending order; sorting is faster here than the table of `numpy.unique`."""
    ordered = np.sort(keys)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(keys) else ordered


def words_of(tokens: Iterable[str]) -> list[str]:
    """Tokens in lower case without ends of sentences."""
    return [token.lower() for token in tokens if token.strip(_ENDS)]


def sentence_words(sentence: str | Sequence[str]) -> list[str]:
    """Tokens of a sentence, a text or a list of tokens."""
    return tokenize(sentence) if isinstance(sentence, str) else words_of(sentence)


def _kind(sentence: str | Sequence[str]) -> int:
    if isinstance(sentence, str):
        end = sentence[len(sentence.rstrip(_AFTER_ENDS)) :]
    else:
        end = sentence[-1] if sentence and not sentence[-1].strip(_ENDS) else ""
    return 1 if "?" in end else 2 if "!" in end else 0
