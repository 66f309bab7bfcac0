"""Every error that polyreward raises on purpose.

Each class is a `PolyrewardError` and also the built-in that fits (`ValueError`, `KeyError`, ...), so that a caller can
catch either. A message says what was found, where it was found, and what was expected or how to fix it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PolyrewardError(Exception):
    """Base of all errors raised on purpose. The command line prints it as one line and exits with code 2."""


class InvalidInputError(PolyrewardError, ValueError):
    """A value, shape or type that the called part cannot accept."""


class MissingColumnError(PolyrewardError, LookupError):
    """A named column or reward that the batch or the file does not have."""


class UnknownNameError(PolyrewardError, LookupError):
    """A name (method, preset, recipe key, part) that does not exist; the message offers the nearest known one."""


class MissingFileError(PolyrewardError, FileNotFoundError):
    """A file or folder that does not exist."""


class MissingExtraError(PolyrewardError, ImportError):
    """An optional dependency that is not installed; the message names the extra to install."""


class StorageError(PolyrewardError, OSError):
    """A write that failed (full disk, no permission). What was there before is untouched."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest known name, or the list of known names when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def require(module: str, extra: str) -> object:
    """Import `module`, or raise `MissingExtraError` that names the extra (``pip install 'polyreward[extra]'``)."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module!r} is not installed; install it with: pip install 'polyreward[{extra}]'"
        ) from error
