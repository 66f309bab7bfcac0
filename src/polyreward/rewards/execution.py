"""Programs that a model wrote, run against tests in a sandbox.

A `Sandbox` runs thousands of untrusted Python programs. Each is forked from a warm interpreter inside a bubblewrap
container, or confined by limits alone where there is none, and is killed with everything it started when its test
ends or reaches a limit. Expected values never enter the process of a program: what it prints is compared by the
caller's process, and tests made of asserts run in another process, which calls the program's functions over a
protocol for plain data. Every test gets a result: passed, failed, error, timeout or memory, with the time it took.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from polyreward.errors import InvalidInputError
from polyreward.rewards.executor import processors
from polyreward.rewards.sandbox_cases import AssertTest, Limits, OutputTest, Program, Script
from polyreward.rewards.sandbox_launch import Launch, SandboxError, find
from polyreward.rewards.sandbox_results import ProgramResult, Report, ScriptResult, TestResult, ran, tested
from polyreward.rewards.sandbox_tame import is_tame

if TYPE_CHECKING:
    from polyreward.rewards.sandbox_driver import Driver, Task

__all__ = [
    "AssertTest",
    "Limits",
    "OutputTest",
    "Program",
    "ProgramResult",
    "Sandbox",
    "SandboxError",
    "SandboxWarning",
    "Script",
    "ScriptResult",
    "TestResult",
    "shared_sandbox",
]

_WORKERS_A_PROCESSOR = 2  # so that a processor has work while a worker waits


class SandboxWarning(UserWarning):
    """The sandbox is weaker on this machine than it could be; the text says in what."""


class Sandbox:
    """Runs untrusted programs, several at once, in workers that start at first use.

    It may be used from several threads, and after a fork, where it starts workers of its own. When its process ends,
    however it ends, no worker and no program remains.

    Parameters
    ----------
    workers : int or None
        Processors to keep busy. None: all that this process may use.
    limits : Limits
        For tests and scripts that bring none.
    isolation : "auto", "bubblewrap" or "limits"
        auto: bubblewrap where it works, otherwise limits with a `SandboxWarning` that says what is weaker.

    Raises
    ------
    InvalidInputError
        For a number of workers below 1 or an unknown isolation.
    SandboxError
        Where bubblewrap is demanded and does not work, or where the system is not Linux.

    """

    def __init__(
        self,
        workers: int | None = None,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        isolation: Literal["auto", "bubblewrap", "limits"] = "auto",
    ) -> None:
        self._closed = True  # until it is made, for __del__
        if workers is not None and workers < 1:
            raise InvalidInputError(f"Sandbox: workers is {workers}; it needs at least 1")
        if not isinstance(limits, Limits):
            raise InvalidInputError(f"Sandbox: limits is {type(limits).__name__}; it must be Limits")
        self.workers, self.limits = workers or processors(), limits
        self._launch = find(isolation)
        _warn(self._launch)
        self._lock = threading.Lock()
        self._driver: Driver | None = None
        self._closed = False
        _sandboxes.add(self)

    @property
    def isolation(self) -> str:
        """What confines programs: bubblewrap or limits."""
        return self._launch.mode

    def describe(self) -> dict[str, Any]:
        """What is in force: `isolation`, its `facts`, and in what it is `weaker` than it could be."""
        return {"isolation": self._launch.mode, "facts": list(self._launch.facts), "weaker": list(self._launch.weaker)}

    def run(
        self, programs: Sequence[Program], progress: Callable[[int, int], None] | None = None
    ) -> list[ProgramResult]:
        """Run every test of every program.

        Parameters
        ----------
        programs : sequence of Program
            In any number; they wait for workers in this order.
        progress : callable, optional
            Is told how many programs are done, and how many there are, after each.

        Returns
        -------
        list of ProgramResult
            In the order of the programs.

        Raises
        ------
        SandboxError
            Where the sandbox is closed, or workers do not start any more.

        """
        programs = list(programs)
        cases = [(number, test) for number, program in enumerate(programs) for test in program.tests]
        payloads = [_payload(program.code) for program in programs]
        results: list[list[TestResult | None]] = [[None] * len(program.tests) for program in programs]
        places = [place for program in programs for place in range(len(program.tests))]
        left = [len(program.tests) for program in programs]
        done = left.count(0)

        def task(index: int, deliver: Callable[[Report | BaseException], None]) -> Task:
            number, test = cases[index]
            return _task_of(test, payloads[number], programs[number].limits or self.limits, deliver)

        for index, report in self._reports(len(cases), task, progress is not None):
            number, test = cases[index]
            results[number][places[index]] = tested(test, report)
            left[number] -= 1
            if not left[number]:
                done += 1
                if progress is not None:
                    progress(done, len(programs))
        whole = [tuple(result for result in row if result is not None) for row in results]
        return [ProgramResult(row, sum(result.seconds for result in row)) for row in whole]

    def execute(self, scripts: Sequence[Script]) -> list[ScriptResult]:
        """Run scripts without tests.

        Each has a folder of its own, where its traceback knows it as ``main.py``. Hashes of texts are the same in
        every run.

        Parameters
        ----------
        scripts : sequence of Script
            In any number.

        Returns
        -------
        list of ScriptResult
            In the order of the scripts.

        Raises
        ------
        SandboxError
            Where the sandbox is closed, or workers do not start any more.

        """
        scripts = list(scripts)

        def task(index: int, deliver: Callable[[Report | BaseException], None]) -> Task:
            script = scripts[index]
            code = _payload(script.code, script.arguments, script.files)
            return _script_task(code, script.stdin, script.limits or self.limits, deliver)

        results: list[Any] = [None] * len(scripts)
        for index, report in self._reports(len(scripts), task):
            results[index] = ran(report)
        return results

    def close(self) -> None:
        """End all workers. Calls that run in other threads raise `SandboxError`."""
        if self._closed:
            return
        with self._lock:
            self._closed = True
            driver, self._driver = self._driver, None
        if driver is not None:
            driver.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # at the end of the interpreter, when there is nothing to close any more
            return

    def _reports(
        self,
        count: int,
        make: Callable[[int, Callable[[Report | BaseException], None]], Task],
        as_they_come: bool = False,
    ) -> Iterator[tuple[int, Report]]:
        """Have tasks done, and yield their numbers and reports: as they come, or all at the end, which costs less."""
        from polyreward.rewards.sandbox_driver import Batch

        driver = self._started()
        if not count:
            return
        batch = Batch(count, as_they_come)
        tasks = [make(index, functools.partial(batch.deliver, index)) for index in range(count)]
        try:
            driver.submit(tasks)
            for _ in range(count):
                yield batch.next()
        except BaseException:  # Ctrl-C, an error in `progress`, a closed sandbox
            driver.cancel(tasks)
            raise

    def _started(self) -> Driver:
        from polyreward.rewards.sandbox_driver import Driver

        with self._lock:
            if self._closed:
                raise SandboxError("the sandbox is closed; make a new one")
            if self._driver is None or self._driver.closing:
                self._driver = Driver(self._launch, _WORKERS_A_PROCESSOR * self.workers)
            return self._driver


def shared_sandbox() -> Sandbox:
    """The sandbox of this process with default settings, made at first use and closed when the process ends.

    Returns
    -------
    Sandbox
        The same one at each call, unless someone closed it.

    """
    global _shared
    with _shared_lock:
        if _shared is None or _shared._closed:
            _shared = Sandbox()
        return _shared


_shared: Sandbox | None = None
_shared_lock = threading.Lock()
_sandboxes: weakref.WeakSet[Sandbox] = weakref.WeakSet()
_warned: set[tuple[str, ...]] = set()


@atexit.register
def _at_exit() -> None:
    for sandbox in list(_sandboxes):
        sandbox.close()


def _after_fork() -> None:
    """A fork has no threads: each sandbox starts workers of its own there when it needs some."""
    global _shared_lock
    _shared_lock = threading.Lock()
    for sandbox in list(_sandboxes):
        sandbox._lock = threading.Lock()
        driver, sandbox._driver = sandbox._driver, None
        if driver is not None:
            driver.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _warn(launch: Launch) -> None:
    """Say once what is weaker."""
    if not launch.weaker or launch.weaker in _warned:
        return
    _warned.add(launch.weaker)
    head = "programs run in bubblewrap" if launch.mode == "bubblewrap" else f"no bubblewrap ({launch.why})"
    warnings.warn(f"{head}: {'; '.join(launch.weaker)}", SandboxWarning, stacklevel=3)


def _payload(code: str, arguments: Sequence[str] = (), files: Mapping[str, str] | None = None) -> bytes:
    """What the process of a program reads: its code, or JSON where there is more."""
    if not arguments and not files:
        return b"C" + code.encode("utf-8", "surrogatepass")
    return b"J" + json.dumps({"code": code, "arguments": list(arguments), "files": dict(files or {})}).encode()


def _task_of(
    test: OutputTest | AssertTest, code: bytes, limits: Limits, deliver: Callable[[Report | BaseException], None]
) -> Task:
    from polyreward.rewards.sandbox_driver import Task

    if isinstance(test, OutputTest):
        return _script_task(code, test.stdin, limits, deliver)
    tests = f"{test.entry_point or ''}\n{test.code}".encode("utf-8", "surrogatepass")
    return Task("tame" if is_tame(test.code) else "tests", code, tests, limits, deliver)


def _script_task(code: bytes, stdin: str, limits: Limits, deliver: Callable[[Report | BaseException], None]) -> Task:
    from polyreward.rewards.sandbox_driver import Task

    return Task("script", code, stdin.encode("utf-8", "surrogatepass"), limits, deliver)
