"""Texts to vectors, for `EmbeddingSurrogateReward`: two embedders without a download, and sentence-transformers.

`HashingEmbedder` counts words and pairs of words and has no state. `LatentEmbedder` weighs them by how rare they are in
texts that it was fitted to and keeps the main directions (latent semantic analysis), so that texts with no word in
common can still be alike. `SentenceEmbedder` runs a model of sentence-transformers (Sentence-BERT, arXiv 1908.10084).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from polyreward.errors import InvalidInputError, require


@dataclass(frozen=True)
class HashingEmbedder:
    """Hashed counts of words and their pairs, of length 1 (scikit-learn's HashingVectorizer).

    Parameters
    ----------
    features : int
        Length of the vectors.
    ngrams : (int, int)
        Shortest and longest run of words.
    characters : bool
        Runs of characters inside words in place of words; forgiving to endings and misspellings.
    """

    features: int = 4096
    ngrams: tuple[int, int] = (1, 2)
    characters: bool = False

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors float64 (n, features); 0 for a text without words."""
        text: Any = require("sklearn.feature_extraction.text", "tasks")
        kind = "char_wb" if self.characters else "word"
        pattern = {} if self.characters else {"token_pattern": r"(?u)\b\w+\b"}
        vectorizer = text.HashingVectorizer(
            n_features=self.features, ngram_range=self.ngrams, analyzer=kind, alternate_sign=False, **pattern
        )
        return np.asarray(vectorizer.transform(list(texts)).toarray())


class LatentEmbedder:
    """Latent semantic analysis: TF-IDF of words and the main directions of a corpus (scikit-learn).

    Parameters
    ----------
    corpus : texts
        What it is fitted to; at least two different words.
    dimensions : int
        Directions to keep, fewer where the corpus has fewer words.
    seed : int
        Of the randomised decomposition.
    """

    def __init__(self, corpus: Sequence[str], dimensions: int = 128, seed: int = 0) -> None:
        text: Any = require("sklearn.feature_extraction.text", "tasks")
        decomposition: Any = require("sklearn.decomposition", "tasks")
        try:
            self._tfidf = text.TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
            counts = self._tfidf.fit_transform(list(corpus))
        except ValueError as error:
            raise InvalidInputError(
                f"LatentEmbedder: a corpus of {len(corpus)} texts without words: {error}"
            ) from error
        width = min(dimensions, counts.shape[1] - 1)
        if width < 1:
            raise InvalidInputError(f"LatentEmbedder needs dimensions >= 1 and two different words, got {dimensions}")
        self._svd = decomposition.TruncatedSVD(width, random_state=seed).fit(counts)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors float64 (n, dimensions); 0 for a text without known words."""
        return np.asarray(self._svd.transform(self._tfidf.transform(list(texts))))


@dataclass(frozen=True)
class SentenceEmbedder:
    """A frozen model of sentence-transformers; loaded at the first call, and again in each process that it is sent to.

    Parameters
    ----------
    model : name on the Hugging Face hub, or folder
    device : str or None
    batch_size : int
    options : mapping
        Further arguments of ``SentenceTransformer``.
    """

    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    device: str | None = None
    batch_size: int = 64
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors float32 (n, d)."""
        return np.asarray(
            self._loaded.encode(list(texts), batch_size=self.batch_size, show_progress_bar=False, convert_to_numpy=True)
        )

    @cached_property
    def _loaded(self) -> Any:
        library: Any = require("sentence_transformers", "embeddings")
        return library.SentenceTransformer(self.model, device=self.device, **self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_loaded"}
