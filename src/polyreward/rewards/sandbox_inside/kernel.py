"""Calls of the Linux kernel that Python's standard library does not have, through ctypes."""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x08000000, 0x10000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 0x4000, 1 << 18, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = (
    1,
    4,
    8,
    22,
    36,
    38,
)
CAP_DAC_READ_SEARCH = 1 << 2
MACHINE = os.uname().machine

_libc = ctypes.CDLL(None, use_errno=True)
_CAPABILITIES_3 = 0x20080522


def call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """Call a function of the C library; raise `OSError` where it returns a negative number."""
    words = [ctypes.c_ulong(word & (1 << 64) - 1) if isinstance(word, int) else word for word in arguments]
    result = int(getattr(_libc, name)(*words))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Move the process to namespaces of its own; for CLONE_NEWPID the processes which it forks."""
    call("unshare", flags)


def enter(namespace: int, kind: int) -> None:
    """Go to the namespace that an open file stands for."""
    call("setns", namespace, kind)


def mount(source: bytes | None, target: bytes, kind: bytes | None, flags: int, options: bytes | None = None) -> None:
    """Put a file system into the tree."""
    call("mount", source, target, kind, flags, options)


def detach(target: bytes) -> None:
    """Take a file system off the tree; files open on it stay usable."""
    call("umount2", target, MNT_DETACH)


def prctl(option: int, value: int, pointer: int = 0) -> None:
    """Change a property of the process."""
    call("prctl", option, value, pointer, 0, 0)


def keep_capabilities(mask: int) -> None:
    """Give up every capability but those of `mask` for good."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0)
    data = (ctypes.c_uint32 * 6)(mask, mask)
    call("capset", bytes(header), bytes(data))


def syscall(number: int, *arguments: int | bytes | None) -> int:
    """A system call by number."""
    return call("syscall", number, *arguments)
