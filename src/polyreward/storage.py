"""Files that are written whole or not at all: to a temporary neighbour first, then put in place by an atomic rename.

Beside them, plain data as TOML, which the standard library reads and does not write.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polyreward.errors import StorageError


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Call ``write(temporary)``, flush it to disk and move it onto `path`.

    Raises
    ------
    StorageError
        The disk is full or not writable. An earlier file at `path` stays as it was and nothing half-written is left.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(f"cannot write {path}: {reason}; the earlier file, if any, is untouched") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8."""

    def write(target: Path) -> None:
        target.write_text(text, encoding="utf-8")

    return write_atomically(path, write)


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON; NaN and infinity are refused so that every reader can parse the file."""
    return write_text(path, json.dumps(value, indent=1, sort_keys=False, allow_nan=False, ensure_ascii=False) + "\n")


def write_parquet(table: Any, path: str | Path) -> Path:
    """Write an Arrow table as Parquet."""
    import pyarrow.parquet as pq

    return write_atomically(path, lambda target: pq.write_table(table, target))


def toml_value(value: Any) -> str:
    """Plain data (text, numbers, booleans, lists, mappings) as a TOML value; lists of tables over several lines."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        items = [toml_value(item) for item in value]
        if any(isinstance(item, Mapping) for item in value):
            return "[\n" + "".join(f"  {item.replace(chr(10), chr(10) + '  ')},\n" for item in items) + "]"
        return "[" + ", ".join(items) + "]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    # DEL is the one character that JSON leaves as it is and TOML does not
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_key(key: str) -> str:
    """A key of a TOML table, quoted where it must be."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)
