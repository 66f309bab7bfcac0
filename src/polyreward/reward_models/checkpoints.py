"""Checkpoints of fits: read back only where they belong to the same fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from polyreward.errors import InvalidInputError


def read_checkpoint(path: str | Path | None, key: str, of: str, device: torch.device | str = "cpu") -> Any:
    """What a fit has written to `path` under "key" `key`; None where there is no file.

    Parameters
    ----------
    path : file or None
    key : str
        Of the fit that asks.
    of : str
        What an error says it belongs to, such as "a fit of other data".

    Raises
    ------
    InvalidInputError
        It is damaged, or of another fit.
    """
    if path is None or not Path(path).exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        found = state["key"]
    except Exception as error:
        raise InvalidInputError(f"{path} is not a readable checkpoint ({error}); delete it to start anew") from error
    if found != key:
        raise InvalidInputError(f"{path} is the checkpoint of {of}; delete it")
    return state
