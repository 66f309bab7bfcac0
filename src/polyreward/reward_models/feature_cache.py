"""Features kept on disk by what they are features of: a hash of the encoder's identity and of prompt and response.

A folder an encoder, with pairs of files: rows of features, and their hashes. A pair counts once the file of hashes is
there, which is put in place last and whole; so several processes may write at once, and one that is killed loses its
last piece only. Files are mapped, so a table of more features than memory holds can be read.
"""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Literal

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.preferences import Column
from polyreward.reward_models.encoders import Encoder, FeatureTable, look_up
from polyreward.reward_models.texts import digests
from polyreward.storage import write_atomically, write_json

_PROMPT_ONLY = "\x00prompt only"


class CachedEncoder:
    """An encoder whose features are computed once.

    Parameters
    ----------
    encoder : Encoder
    folder : path
        May hold the features of any number of encoders.
    dtype : "float32" or "float16"
        How features are stored; float16 halves disk and memory, and keeps three digits.
    piece : int
        Responses that are encoded and then written at once.
    """

    def __init__(
        self,
        encoder: Encoder,
        folder: str | Path,
        dtype: Literal["float32", "float16"] = "float32",
        piece: int = 8192,
    ) -> None:
        if dtype not in ("float32", "float16"):
            raise InvalidInputError(f"CachedEncoder stores 'float32' or 'float16', got {dtype!r}")
        self.encoder, self.dtype, self.piece = encoder, dtype, piece
        key = hashlib.blake2b(f"{encoder.identity}\n{dtype}".encode(), digest_size=12).hexdigest()
        self.folder = Path(folder) / key
        self._parts: dict[str, np.ndarray] = {}
        self._keys: np.ndarray = np.zeros(0, "V16")
        self._places: np.ndarray = np.zeros(0, np.int64)

    @property
    def identity(self) -> str:
        """That of the encoder."""
        return self.encoder.identity

    def encode(self, prompts: Column, responses: Column) -> np.ndarray:
        """Features float32 (M, d)."""
        return self.lookup(prompts, responses).array()

    def encode_prompts(self, prompts: Column) -> np.ndarray:
        """Features float32 (N, p) of the prompts alone, if the encoder has them."""
        return self._lookup(list(prompts), [_PROMPT_ONLY] * len(prompts), prompts_only=True).array()

    def lookup(self, prompts: Column, responses: Column) -> FeatureTable:
        """Features of the responses, on disk; what is not there is encoded and written first.

        Raises
        ------
        InvalidInputError
            A feature is NaN or infinite; the message names the row. Nothing of that piece is written.
        StorageError
            The folder cannot be written.
        """
        return self._lookup(prompts, responses, prompts_only=False)

    def _lookup(self, prompts: Column, responses: Column, prompts_only: bool) -> FeatureTable:
        if not len(responses):
            return look_up(self.encoder, prompts, responses)
        keys = np.frombuffer(b"".join(digests(prompts, responses)), "V16")
        self._read()
        missing = np.flatnonzero(self._find(keys) < 0)
        if len(missing):
            missing = missing[np.unique(keys[missing], return_index=True)[1]]
            missing.sort()
            for start in range(0, len(missing), self.piece):
                rows = missing[start : start + self.piece]
                if prompts_only:
                    found = self.encoder.encode_prompts([prompts[i] for i in rows])  # type: ignore[attr-defined]
                else:
                    found = self.encoder.encode([prompts[i] for i in rows], [responses[i] for i in rows])
                self._write(keys[rows], found, rows)
            self._read()
        places = self._find(keys)
        if (places < 0).any():
            raise InvalidInputError(f"{self.folder}: features that were just written are gone; was the folder cleared?")
        # prompts alone and responses may differ in width: only the files that are needed
        starts = np.cumsum([0, *(len(part) for part in self._parts.values())])
        part = np.searchsorted(starts, places, side="right") - 1
        used, compact = np.unique(part, return_inverse=True)
        arrays = [list(self._parts.values())[number] for number in used]
        shift = np.cumsum([0, *(len(array) for array in arrays)])
        return FeatureTable(arrays, places - starts[part] + shift[compact])

    def _find(self, keys: np.ndarray) -> np.ndarray:
        if not len(self._keys):
            return np.full(len(keys), -1, np.int64)
        at = np.minimum(np.searchsorted(_sortable(self._keys), _sortable(keys)), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._places[at], -1)

    def _read(self) -> None:
        """Take up pieces that this or another process has finished since."""
        names = {path.name.removesuffix(".keys.npy") for path in self.folder.glob("*.keys.npy")}
        if names == set(self._parts):
            return
        self._parts = {name: self._parts[name] if name in self._parts else self._open(name) for name in sorted(names)}
        keys = [np.load(self.folder / f"{name}.keys.npy").view("V16").reshape(-1) for name in self._parts]
        for name, part, found in zip(self._parts, self._parts.values(), keys, strict=True):
            if len(part) != len(found):
                raise InvalidInputError(f"{self.folder / name}.npy has {len(part)} rows for {len(found)} keys")
        together = np.concatenate(keys) if keys else np.zeros(0, "V16")
        order = np.argsort(_sortable(together), kind="stable")
        self._keys, self._places = together[order], order

    def _open(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"{path} is not a readable array of features ({error}); delete it") from error

    def _write(self, keys: np.ndarray, features: np.ndarray, rows: np.ndarray) -> None:
        if features.shape[0] != len(keys):
            raise InvalidInputError(f"{self.identity} gave {features.shape[0]} rows for {len(keys)} responses")
        stored = features.astype(self.dtype)
        bad = ~np.isfinite(stored).all(axis=1)
        if bad.any():
            row = int(rows[bad.argmax()])
            raise InvalidInputError(
                f"{self.identity} gave a feature that is NaN, infinite or too large for {self.dtype} for response {row}"
            )
        if not (self.folder / "encoder.json").exists():
            write_json(self.folder / "encoder.json", {"identity": self.identity, "dtype": self.dtype})
        name = uuid.uuid4().hex
        write_atomically(self.folder / f"{name}.npy", lambda path: _save(path, stored))
        write_atomically(
            self.folder / f"{name}.keys.npy", lambda path: _save(path, keys.view(np.uint8).reshape(-1, 16))
        )


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as stream:  # np.save would add an ending to the name
        np.save(stream, array)


def _sortable(keys: np.ndarray) -> np.ndarray:
    """The first 8 of the 16 bytes, as numbers that sort fast; of 1e8 texts two share them with probability 3e-4."""
    return np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)[:, 0]
