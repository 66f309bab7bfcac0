"""The process that runs tests and gives the verdict. The program is elsewhere; only values get here."""

from __future__ import annotations

import os
import sys

from .channel import Channel
from .client import Client, Namespace, ProgramFailure, TestsModule
from .program import _Source, read_all
from .remote import NOTHING

FILE = "tests.py"
_LARGEST_TEXT = 2000


def body(files: list[int]) -> int:
    """Run tests; `files` are the tests, the pipes of replies and of requests, and the pipe for the verdict."""
    entry_point, _, code = read_all(files[0]).decode("utf-8", "surrogatepass").partition("\n")
    os.closerange(3, files[1])
    os.closerange(files[3] + 1, 1 << 16)
    client = Client(Channel(files[1], files[2]))
    names = Namespace(client)
    sys.modules["__main__"] = TestsModule(names)
    status, message = judge(code, entry_point or None, client, names)
    os.write(files[3], f"{status}\n{message}".encode("utf-8", "replace"))
    return 0


def tame_body(files: list[int]) -> int:
    """Run tests that leave nothing behind, in a process that runs more of them; 0 where it can."""
    entry_point, _, code = read_all(files[0]).decode("utf-8", "surrogatepass").partition("\n")
    client = Client(Channel(files[1], files[2]))
    if "random" in sys.modules:
        sys.modules["random"].seed()
    status, message = judge(code, entry_point or None, client)
    os.write(files[3], f"{status}\n{message}".encode("utf-8", "replace"))
    return 1 if status == "memory" or client.foreign else 0


def judge(code: str, entry_point: str | None, client: Client, names: Namespace | None = None) -> tuple[str, str]:
    """Run tests; status and message."""
    try:
        status, message = _run(code, entry_point, client, Namespace(client) if names is None else names)
    except ProgramFailure as failure:
        status, message = "error", str(failure)
    except MemoryError:
        status, message = "memory", "MemoryError"
    except BaseException as error:
        status, message = "error", f"{type(error).__name__} in the tests"
    if client.broken is not None:
        status, message = "memory" if client.memory else "error", client.broken
    return status, message[:_LARGEST_TEXT]


def _run(code: str, entry_point: str | None, client: Client, names: Namespace) -> tuple[str, str]:
    names["__loader__"] = _Source(code)
    try:
        compiled = compile(code, FILE, "exec", dont_inherit=True)  # meanwhile the program loads
        candidate = client.start(entry_point)
        if entry_point is not None:
            if candidate is NOTHING:
                return "error", f"the program does not define {entry_point!r}"
            names["candidate"] = candidate
            names[entry_point] = candidate
        exec(compiled, names)
        if entry_point is not None and dict.__contains__(names, "check"):
            names["check"](names["candidate"])
    except SystemExit as stop:  # unittest.main ends in this way
        return ("passed", "") if not stop.code else ("failed", f"the tests ended with exit status {stop.code}")
    except Exception as error:
        return _verdict(error, client, code)
    return "passed", ""


def _verdict(error: Exception, client: Client, code: str) -> tuple[str, str]:
    line, inner = 0, error.__traceback__
    while inner is not None:
        if inner.tb_frame.f_code.co_filename == FILE:
            line = inner.tb_lineno
        inner = inner.tb_next
    text = str(error)
    message = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if line:
        message += f" (tests, line {line}: {code.splitlines()[line - 1].strip()[:200]})"
    ours = id(error) not in client.raised
    if isinstance(error, AssertionError) and ours:
        return "failed", message
    if isinstance(error, MemoryError):
        return "memory", message
    return "error", message if ours else f"the program raised {message}"
