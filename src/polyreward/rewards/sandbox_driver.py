"""The sandbox in the caller's process: one thread that hands tests to workers and collects what comes back."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import queue
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from polyreward.rewards.sandbox_cases import Limits
from polyreward.rewards.sandbox_command import end
from polyreward.rewards.sandbox_inside.cell import LONGEST_WAIT
from polyreward.rewards.sandbox_inside.processes import LIMITS
from polyreward.rewards.sandbox_launch import Launch, SandboxError
from polyreward.rewards.sandbox_results import VERDICTS, Report

_START_SECONDS = 60.0
_GRACE = 10.0  # after the longest time a worker gives a test, before the worker is held to be lost
_MOST_FAILURES = 3
_DYING_SECONDS = 0.1  # a worker that ends so soon after it was given a task was ending before
_LONGEST_VERDICT = 65536


@dataclass
class Task:
    """One test or script: what its processes read, its limits, and where the report goes."""

    kind: str  # script, tests, or tame for tests that leave nothing behind
    code: bytes
    second: bytes  # standard input of a script, or the tests
    limits: Limits
    deliver: Callable[[Report | BaseException], None]
    cancelled: bool = False
    tries: int = 0


class Batch:
    """Reports of the tasks of one call, from the driver's thread to the caller's.

    Waking the caller for every report costs as much as half a task, so that is done only where it wants each.
    """

    def __init__(self, count: int, as_they_come: bool) -> None:
        self.left, self.as_they_come = count, as_they_come
        self.reports: list[tuple[int, Report | BaseException]] = []
        self.ready: queue.SimpleQueue[int] = queue.SimpleQueue()  # how many reports there are
        self.taken = self.known = 0

    def deliver(self, index: int, report: Report | BaseException) -> None:
        """Add the report of a task. In the driver's thread."""
        self.reports.append((index, report))
        self.left -= 1
        if self.as_they_come or not self.left or isinstance(report, BaseException):
            self.ready.put(len(self.reports))

    def next(self) -> tuple[int, Report]:
        """Wait for a report. In the caller's thread."""
        while self.taken == self.known:
            self.known = self.ready.get()
        index, report = self.reports[self.taken]
        self.taken += 1
        if isinstance(report, BaseException):
            raise report
        return index, report


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    channel: socket.socket
    folder: str | None
    deadline: float
    ready: bool = False
    started: float = 0.0  # when it was given its task
    task: Task | None = None
    number: int = 0
    report: Report = field(default_factory=Report)
    pipes: dict[int, bytearray] = field(default_factory=dict)  # stdout, stderr or verdict -> what came
    ending: bool = False


class Driver:
    """Runs tasks in up to `size` workers, which it starts as they are needed."""

    def __init__(self, launch: Launch, size: int) -> None:
        self.launch, self.size = launch, size
        self.pending: collections.deque[Task] = collections.deque()
        self.lock = threading.Lock()
        self.workers: list[_Worker] = []
        self.closing = False
        self.failures = 0
        self.hello: list[str] = []  # what workers say of themselves: whether seccomp and Landlock are in force
        self.numbers = 0
        self.selector = selectors.DefaultSelector()
        self.waker_out, self.waker = os.pipe()
        for descriptor in (self.waker_out, self.waker):
            os.set_blocking(descriptor, False)
        self.selector.register(self.waker_out, selectors.EVENT_READ)
        self.thread = threading.Thread(target=self._run, name="polyreward-sandbox", daemon=True)
        self.thread.start()

    def submit(self, tasks: Iterable[Task]) -> None:
        """Queue tasks; each is delivered from the driver's thread."""
        with self.lock:
            if self.closing:
                raise SandboxError("the sandbox is closed")
            self.pending.extend(tasks)
        self._wake()

    def cancel(self, tasks: Iterable[Task]) -> None:
        """End tasks, whose reports nobody waits for."""
        for task in tasks:
            task.cancelled = True
        self._wake()

    def close(self) -> None:
        """End all workers; what still runs is delivered as an error."""
        with self.lock:
            self.closing = True
        self._wake()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def forget(self) -> None:
        """In a fork of this process: close what belongs to the parent, without a word to the workers."""
        for worker in self.workers:
            for descriptor in (worker.channel.detach(), *worker.pipes):
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        with contextlib.suppress(OSError):
            self.selector.close()
        for descriptor in (self.waker_out, self.waker):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self.waker, b"x")

    def _run(self) -> None:
        failure: BaseException = SandboxError("the sandbox is closed")
        try:
            while not self.closing:
                self._sweep()
                self._hand_out()
                for key, _ in self.selector.select(self._patience()):
                    if key.fd == self.waker_out:
                        with contextlib.suppress(BlockingIOError):
                            while os.read(self.waker_out, 4096):
                                pass
                    elif isinstance(key.data, _Worker):
                        if key.fd in key.data.pipes:
                            self._read(key.data, key.fd)
                        elif key.fileobj is key.data.channel and key.data in self.workers:
                            self._hear(key.data)
        except BaseException as error:  # whoever waits must hear of it
            failure = error
        finally:
            with self.lock:
                self.closing = True
                tasks = [*(worker.task for worker in self.workers if worker.task is not None), *self.pending]
                self.pending.clear()
            for task in tasks:
                task.deliver(failure)
            for worker in self.workers:
                with contextlib.suppress(Exception):
                    self._drop(worker)
            self.selector.close()
            for descriptor in (self.waker_out, self.waker):
                os.close(descriptor)

    def _patience(self) -> float | None:
        deadlines = [worker.deadline for worker in self.workers if worker.task is not None or not worker.ready]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _sweep(self) -> None:
        """End what was cancelled or is lost."""
        now = time.monotonic()
        for worker in list(self.workers):
            if worker.task is not None and worker.task.cancelled and not worker.ending:
                self._stop(worker)
            if (worker.task is not None or not worker.ready) and now > worker.deadline:
                self._lose(worker)
        while self.pending and self.pending[0].cancelled:
            self.pending.popleft()

    def _hand_out(self) -> None:
        """Give pending tasks to idle workers, and start workers where there are too few."""
        for worker in list(self.workers):
            if worker.ready and worker.task is None and not self._dead(worker):
                while True:
                    with self.lock:
                        task = self.pending.popleft() if self.pending else None
                    if task is None or not task.cancelled:
                        break
                if task is None:
                    return
                self._give(worker, task)
        starting = sum(not worker.ready for worker in self.workers)
        while starting < len(self.pending) and len(self.workers) < self.size:
            try:
                process, channel, folder = self.launch.start()
            except (OSError, SandboxError) as error:
                self._failed(str(error))
                continue
            worker = _Worker(process, channel, folder, time.monotonic() + _START_SECONDS)
            self.workers.append(worker)
            self.selector.register(channel, selectors.EVENT_READ, worker)
            starting += 1

    def _dead(self, worker: _Worker) -> bool:
        """Whether an idle worker has ended, whose end was not heard of yet; buries it."""
        try:
            if worker.channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return False
        except BlockingIOError:
            return False
        except OSError:
            pass
        self._lose(worker)
        return True

    def _give(self, worker: _Worker, task: Task) -> None:
        self.numbers += 1
        worker.task, worker.number, worker.report, worker.ending = task, self.numbers, Report(), False
        worker.started, task.tries = time.monotonic(), task.tries + 1
        worker.deadline = worker.started + LONGEST_WAIT * task.limits.wall_seconds + _GRACE
        theirs = [_open_file(task.code), _open_file(task.second)]
        try:
            for _ in range(2 if task.kind == "script" else 1):
                reading, writing = os.pipe()
                os.set_blocking(reading, False)
                theirs.append(writing)
                worker.pipes[reading] = bytearray()
                if task.kind == "script":
                    self.selector.register(reading, selectors.EVENT_READ, worker)
            order = f"{task.kind} {worker.number} {_numbers(task.limits)}".encode()
            socket.send_fds(worker.channel, [order], theirs)
        except OSError:  # it ended while it was idle, so the task goes to another
            worker.task = None
            self._lose(worker)
            with self.lock:
                self.pending.appendleft(task)
        finally:
            for descriptor in theirs:
                os.close(descriptor)

    def _read(self, worker: _Worker, pipe: int) -> None:
        """Read what a pipe has; no more than the limit."""
        task, content = worker.task, worker.pipes[pipe]
        assert task is not None
        most = task.limits.output_bytes if task.kind == "script" else _LONGEST_VERDICT
        while len(content) <= most:
            try:
                piece = os.read(pipe, min(65536, most + 1 - len(content)))
            except BlockingIOError:
                return
            content += piece
            if not piece:
                break
        with contextlib.suppress(KeyError):
            self.selector.unregister(pipe)
        if len(content) > most:
            worker.report.why = "output"
            self._stop(worker)

    def _stop(self, worker: _Worker) -> None:
        """Have a worker end its test."""
        if not worker.ending:
            worker.ending = True
            with contextlib.suppress(OSError):
                worker.channel.send(f"end {worker.number}".encode())

    def _hear(self, worker: _Worker) -> None:
        """Take a message of a worker."""
        try:
            words = worker.channel.recv(65536).decode().split()
        except (OSError, ValueError):
            words = []
        if not words:
            self._lose(worker)
        elif words[0] == "hello":
            worker.ready, self.failures, self.hello = True, 0, words[1:]
        elif worker.task is not None and int(words[1]) == worker.number:
            self._finish(worker, *words[2:])

    def _finish(self, worker: _Worker, why: str, seconds: str, cpu: str, status: str) -> None:
        task, report = worker.task, worker.report
        assert task is not None
        for pipe in worker.pipes:
            self._read(worker, pipe)
        contents = [bytes(content) for content in worker.pipes.values()]
        self._close_pipes(worker)
        worker.task = None
        report.seconds, report.cpu = float(seconds), float(cpu)
        if report.why is None and why not in ("none", "ended"):
            report.why = why.replace("_", " ") if why.startswith("refused") else why
        report.status = None if status == "none" else int(status)
        if task.kind == "script":
            report.stdout, report.stderr = (content[: task.limits.output_bytes] for content in contents)
        else:
            status, _, text = contents[0].decode("utf-8", "replace").partition("\n")
            if status in VERDICTS:
                report.verdict = (status, text)
        task.deliver(report)

    def _lose(self, worker: _Worker) -> None:
        """Bury a worker that ended or does not answer; its task is delivered as lost, or goes to another."""
        task, ready = worker.task, worker.ready
        reason = "" if ready else _last_words(worker.process)
        self._drop(worker)
        self.workers.remove(worker)
        if task is not None and task.tries == 1 and time.monotonic() - worker.started < _DYING_SECONDS:
            with self.lock:
                self.pending.appendleft(task)
        elif task is not None:
            task.deliver(Report(why="lost"))
        elif not ready:
            self._failed(reason)

    def _failed(self, reason: str) -> None:
        self.failures += 1
        if self.failures >= _MOST_FAILURES:
            raise SandboxError(f"workers of the sandbox do not start: {reason}")

    def _drop(self, worker: _Worker) -> None:
        self._close_pipes(worker)
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(worker.channel)
        worker.channel.close()
        end(worker.process, worker.folder)

    def _close_pipes(self, worker: _Worker) -> None:
        for pipe in worker.pipes:
            with contextlib.suppress(KeyError):
                self.selector.unregister(pipe)
            os.close(pipe)
        worker.pipes.clear()


def _last_words(process: subprocess.Popen[bytes]) -> str:
    """The last line that a process wrote to standard error."""
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    lines = (process.stderr.read() or b"").decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no reason given"


@functools.lru_cache(maxsize=64)
def _numbers(limits: Limits) -> str:
    """Limits as a worker reads them, in the order of LIMITS."""
    numbers = {
        **vars(limits),
        "cpu_seconds": limits.cpu_seconds or limits.wall_seconds,
        "memory_bytes": int(limits.memory_mb * (1 << 20)),
    }
    return " ".join(str(numbers[name]) for name in LIMITS)


def _open_file(content: bytes) -> int:
    """An open file with this content, to be read from its start."""
    descriptor = os.memfd_create("polyreward", os.MFD_CLOEXEC)
    written = os.pwrite(descriptor, content, 0)
    while written < len(content):
        written += os.pwrite(descriptor, memoryview(content)[written:], written)
    return descriptor
