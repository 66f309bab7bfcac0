"""Landlock: files that a process may see, where there are no namespaces to hide the rest."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence

from . import kernel

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14 | 1 << 15
_RIGHTS_OF_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_RIGHTS_NOW = (1 << 16) - 1  # version 5 and later
_ALL_SCOPES = 3  # version 6: abstract sockets and signals
_ALL_PORTS = 3  # version 4: bind and connect


def version() -> int:
    """Version of Landlock that the kernel offers; 0 where there is none."""
    try:
        return kernel.syscall(_CREATE, None, 0, 1)
    except OSError:
        return 0


def restrict(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Leave the process `readable` for reading and executing, `writable` for everything, and nothing else."""
    known = version()
    rights = _RIGHTS_OF_VERSION.get(known, _RIGHTS_NOW)
    attributes = struct.pack("=QQQ", rights, _ALL_PORTS if known >= 4 else 0, _ALL_SCOPES if known >= 6 else 0)
    rules = kernel.syscall(
        _CREATE,
        attributes[: 8 if known < 4 else 16 if known < 6 else 24],
        24 if known >= 6 else 16 if known >= 4 else 8,
        0,
    )
    try:
        for paths, allowed in ((readable, _EXECUTE | _READ_FILE | _READ_DIR), (writable, rights)):
            for path in paths:
                if os.path.lexists(path):
                    _allow(rules, path, allowed if os.path.isdir(path) else allowed & _FILE_RIGHTS)
        kernel.syscall(_RESTRICT, rules, 0)
    finally:
        os.close(rules)


def _allow(rules: int, path: str, allowed: int) -> None:
    descriptor = os.open(path, getattr(os, "O_PATH", 0) | os.O_CLOEXEC)
    try:
        beneath = ctypes.create_string_buffer(struct.pack("=Qi", allowed, descriptor))
        kernel.syscall(_ADD, rules, 1, beneath.raw, 0)
    finally:
        os.close(descriptor)
