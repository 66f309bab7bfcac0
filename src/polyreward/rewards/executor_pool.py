"""The trainer's side of the reward executor on one machine: a pool of worker processes behind a guard.

A pool runs a task (a pickled reward) on numbered items, each pickled when its turn comes. Idle workers get several
items at once, as many as take some milliseconds, and announce each; the time limit is that of a single item. A worker
that is over the limit, or dies, costs the item it was at: the rest of its items goes to other workers.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import selectors
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from polyreward.errors import InvalidInputError, MissingColumnError, PolyrewardError
from polyreward.rewards.executor_guard import HEADER, NOT_STARTED, frame

CHUNK_SECONDS, LARGEST_CHUNK = 0.01, 64
_LAST_WORDS = 5.0  # seconds to wait for the guard's word on a worker that it was told to kill


@dataclass(frozen=True)
class Task:
    """A reward as workers get it: a number of its own, its name, its pickle, and where to look for its modules."""

    key: int
    name: str
    payload: bytes
    path: list[str]


class Outcome(NamedTuple):
    """What became of an item.

    `kind` is "value", "raised" (an exception; `text` is its traceback), "slow" (killed at the time limit; `text` is the
    stack it was at) or "died" (the worker ended; `text` says how). `logs` are the reward's calls of trainer hooks.
    """

    kind: str
    values: list[float | None]
    seconds: float
    text: str = ""
    logs: list[tuple[Any, ...]] = []  # noqa: RUF012 - never written to


@dataclass
class _Worker:
    """A worker, the items it has, and until when it must show a sign of life."""

    number: int
    channel: socket.socket
    deadline: float = float("inf")
    template: bool = False
    loading: Task | None = None
    open: bool = True
    items: deque[int] = field(default_factory=deque)
    loaded: set[int] = field(default_factory=set)
    unsent: bytearray = field(default_factory=bytearray)
    unread: bytearray = field(default_factory=bytearray)

    @property
    def busy(self) -> bool:
        """Whether something is expected of it."""
        return self.loading is not None or bool(self.items)


class LocalPool:
    """Worker processes on this machine. Calls from several threads wait for each other.

    Parameters
    ----------
    workers : int >= 1
    queue : int >= 1
        Most items that are pickled and not finished.
    start_limit : float
        Seconds that a worker may take to start and to load a reward.
    """

    def __init__(self, workers: int, queue: int, start_limit: float) -> None:
        if not (hasattr(os, "fork") and hasattr(os, "waitid")):
            raise PolyrewardError("the reward executor needs Linux or another system with fork and waitid")
        self.size, self.queue, self.start_limit = workers, queue, start_limit
        self._numbers = itertools.count()
        self._paces: dict[int, float] = {}
        self._owner, self._lock = os.getpid(), threading.Lock()
        self._forget()

    def _forget(self) -> None:
        """Start from nothing."""
        self._control: socket.socket | None = None
        self._finish: Callable[[], Any] = lambda: None
        self._lines = b""
        self._workers: dict[int, _Worker] = {}
        self._template: _Worker | None = None  # one of the workers, which loads and is copied
        self._copies = True  # whether what has been loaded so far allows copies
        self._killed: dict[int, tuple[int | None, float]] = {}  # worker -> its item, until when the guard may tell

    def run(self, task: Task, count: int, encode: Callable[[int], bytes], limit: float) -> list[Outcome]:
        """Run items 0..count-1 of a task, at most `limit` seconds each.

        Parameters
        ----------
        encode : function of an item's number to what the worker reads, see `executor_guard`

        Raises
        ------
        InvalidInputError
            The reward cannot be loaded, or returned something that is no reward.
        MissingColumnError
            The reward reads a column that the batch does not have.
        PolyrewardError
            The guard process is gone.
        """
        if os.getpid() != self._owner:  # a fork of the process that has the workers
            self._owner, self._lock = os.getpid(), threading.Lock()
            self._forget()
        with self._lock:
            self._start()
            call = _Call(self, task, count, encode, limit)
            try:
                return call.run()
            except BaseException:
                self._abandon()
                raise

    def close(self) -> None:
        """Kill the workers and all that they started, and wait for the guard's end."""
        if os.getpid() == self._owner:
            with self._lock:
                self._end()

    def _end(self) -> None:
        self._finish()
        for worker in self._workers.values():
            worker.channel.close()
        self._forget()

    def _start(self) -> None:
        """Start the guard, unless it runs."""
        if self._control is not None:
            return
        ours, theirs = socket.socketpair()
        script = (
            f"import sys; sys.path[:] = {[*map(str, sys.path)]!r}; from polyreward.rewards.executor_guard import main; "
            f"main({theirs.fileno()}, {os.getpid()})"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        theirs.close()
        self._control = ours
        self._finish = weakref.finalize(self, _bid_farewell, process, ours, os.getpid())

    def _spawn(self, template: bool = False) -> _Worker:
        ours, theirs = socket.socketpair()
        worker = _Worker(next(self._numbers), ours, template=template)
        ours.setblocking(False)
        with theirs:
            self._command(f"{'template' if template else 'start'} {worker.number}\n", theirs)
        self._workers[worker.number] = worker
        if template:
            self._template = worker
        elif self._template is not None:
            worker.loaded |= self._template.loaded
        return worker

    def _command(self, line: str, channel: socket.socket | None = None) -> None:
        assert self._control is not None
        try:
            if channel is None:
                self._control.sendall(line.encode())
            else:
                socket.send_fds(self._control, [line.encode()], [channel.fileno()])
        except OSError as error:
            raise self._lost() from error

    def _lost(self) -> PolyrewardError:
        self._end()
        return PolyrewardError("the guard process of the reward executor is gone; the next call starts another")

    def _kill(self, worker: _Worker, item: int | None) -> None:
        """Have the guard kill a worker; its word on the item that the worker was at comes later."""
        self._command(f"kill {worker.number}\n")
        self._killed[worker.number] = item, time.monotonic() + _LAST_WORDS
        self._drop(worker)

    def _drop(self, worker: _Worker) -> None:
        worker.channel.close()
        self._workers.pop(worker.number, None)
        if worker is self._template:
            self._template = None

    def _abandon(self) -> None:
        """Kill the workers that are at something."""
        try:
            for worker in list(self._workers.values()):
                if worker.busy:
                    self._kill(worker, None)
            self._killed = {number: (None, until) for number, (_, until) in self._killed.items()}
        except PolyrewardError:
            pass  # the guard is gone and took the workers along

    def _news(self) -> Iterator[dict[str, Any]]:
        """What the guard has to tell: workers that are gone."""
        assert self._control is not None
        try:
            data = self._control.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            raise self._lost()
        *lines, self._lines = (self._lines + data).split(b"\n")
        yield from map(json.loads, lines)


class _Call:
    """One call of `LocalPool.run`."""

    def __init__(self, pool: LocalPool, task: Task, count: int, encode: Callable[[int], bytes], limit: float) -> None:
        self.pool, self.task, self.encode, self.limit = pool, task, encode, limit
        self.waiting = deque(range(count))
        self.outcomes: list[Outcome | None] = [None] * count
        self.left = count

    def run(self) -> list[Outcome]:
        """Everything, in order."""
        pool = self.pool
        for news in pool._news():  # workers that ended since the last call
            self.bury(news)
        self.prepare()
        while self.left:
            self.dispatch()
            self.wait()
        return self.outcomes  # type: ignore[return-value]

    def prepare(self) -> None:
        """Have the template load the reward, where one can be; workers that do not have it make way for copies."""
        pool = self.pool
        if pool._copies and (pool._template is None or self.task.key not in pool._template.loaded):
            self.load(pool._template or pool._spawn(template=True))
            while pool._template is not None and pool._template.loading:
                self.wait()
        if pool._copies:
            for worker in list(pool._workers.values()):
                if self.task.key not in worker.loaded:
                    pool._kill(worker, None)

    def load(self, worker: _Worker) -> None:
        """Send the reward to a worker."""
        worker.loading = self.task
        worker.unsent += frame(("load", self.task.key, self.task.path, self.task.payload))
        self.alive(worker)

    def dispatch(self) -> None:
        """Give items to idle workers, while the queue has room; start workers while there are too few.

        A worker that has to load the reward gets no item before it has, so that no item waits for it.
        """
        if not self.waiting:
            return
        pool = self.pool
        workers = [worker for worker in pool._workers.values() if not worker.template]
        idle = [worker for worker in workers if not worker.busy]
        idle += [pool._spawn() for _ in range(min(pool.size - len(workers), len(self.waiting) - len(idle)))]
        room = pool.queue - sum(len(worker.items) for worker in workers)
        pace = pool._paces.get(self.task.key)
        size = 1 if pace is None else int(CHUNK_SECONDS / max(pace, 1e-9))
        for worker in idle:
            if self.task.key not in worker.loaded:
                self.load(worker)
            elif self.waiting and room > 0:
                fair = -(-len(self.waiting) // (2 * pool.size))
                worker.items.extend(self.waiting.popleft() for _ in range(max(1, min(size, fair, room, LARGEST_CHUNK))))
                room -= len(worker.items)
                worker.unsent += frame(("run", self.task.key, [self.encode(item) for item in worker.items]))
                self.alive(worker)

    def wait(self) -> None:
        """Wait for the next event, and deal with all that have happened."""
        pool = self.pool
        deadlines = [worker.deadline for worker in pool._workers.values() if worker.busy]
        deadlines += [until for _, until in pool._killed.values()]
        with selectors.PollSelector() as selector:
            selector.register(pool._control, selectors.EVENT_READ)  # type: ignore[arg-type]
            for worker in pool._workers.values():
                if worker.busy and worker.open:
                    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.unsent else 0)
                    selector.register(worker.channel, events, worker)
            ready = selector.select(max(0.0, min(deadlines) - time.monotonic()))
        for key, events in ready:
            if key.data is not None and events & selectors.EVENT_WRITE:
                self.write(key.data)
            if key.data is not None and events & selectors.EVENT_READ:
                self.read(key.data)
        for news in pool._news():
            self.bury(news)
        now = time.monotonic()
        for worker in list(pool._workers.values()):
            if worker.busy and worker.deadline <= now and not self.read(worker):
                self.overdue(worker)
        for number, (item, until) in list(pool._killed.items()):
            if until <= now:
                del pool._killed[number]
                self.settle(item, Outcome("slow", [], self.limit))

    def alive(self, worker: _Worker) -> None:
        """A sign of life: the limit runs anew."""
        worker.deadline = time.monotonic() + (self.pool.start_limit if worker.loading else self.limit)

    def write(self, worker: _Worker) -> None:
        """Send what the socket takes."""
        try:
            sent = worker.channel.send(worker.unsent)
        except BlockingIOError:
            return
        except OSError:  # it died, and the guard will tell how; or it has closed its socket, and is soon overdue
            worker.open = False
            return
        del worker.unsent[:sent]
        self.alive(worker)

    def read(self, worker: _Worker) -> bool:
        """Read and handle what a worker has sent; whether there was anything."""
        data = b""
        try:
            while piece := worker.channel.recv(1 << 20):
                data += piece
            worker.open = False
        except BlockingIOError:
            pass
        except OSError:
            worker.open = False
        worker.unread += data
        start = 0
        while len(worker.unread) >= start + HEADER.size:
            end = start + HEADER.size + HEADER.unpack_from(worker.unread, start)[0]
            if len(worker.unread) < end:
                break
            self.handle(worker, *pickle.loads(memoryview(worker.unread)[start + HEADER.size : end]))
            start = end
        if start:
            worker.unread = worker.unread[start:]
        if data:
            self.alive(worker)
        return bool(data)

    def handle(self, worker: _Worker, kind: str, *content: Any) -> None:
        """One message of a worker."""
        if kind == "loaded":
            worker.loading = None
            worker.loaded.add(content[0])
            if worker.template and not content[1]:
                self.pool._copies = False
                self.pool._kill(worker, None)
        elif kind == "unknown":  # a worker of the guard's own, started because the template had just died
            worker.loaded.clear()
            self.waiting.extendleft(reversed(worker.items))
            worker.items.clear()
        elif kind == "unloadable":
            raise InvalidInputError(f"reward {_loading(worker)!r} cannot be loaded in a worker process:\n{content[0]}")
        elif kind == "missing":
            raise MissingColumnError(content[0])
        elif kind == "wrong":
            raise InvalidInputError(content[0])
        elif kind == "raised":
            self.settle(worker.items.popleft(), Outcome("raised", [], content[1], content[0]))
        else:
            values, seconds, logs = content
            self.settle(worker.items.popleft(), Outcome("value", values, seconds, "", logs))
            pace = self.pool._paces.get(self.task.key, seconds)
            self.pool._paces[self.task.key] = pace + 0.1 * (seconds - pace)

    def settle(self, item: int | None, outcome: Outcome) -> None:
        """The end of an item; None for one that no call waits for any more."""
        if item is not None:
            self.outcomes[item] = outcome
            self.left -= 1

    def overdue(self, worker: _Worker) -> None:
        """Kill a worker that is over the limit; its other items go back to the queue."""
        if worker.loading:
            raise InvalidInputError(
                f"reward {_loading(worker)!r} is not loaded in a worker process after {self.pool.start_limit:g} s"
            )
        item, *rest = worker.items
        self.waiting.extendleft(reversed(rest))
        self.pool._kill(worker, item)

    def bury(self, news: dict[str, Any]) -> None:
        """A worker is gone: settle the item it was at, give the others back."""
        number, how, stack = news["worker"], news["how"], news["stack"]
        if number in self.pool._killed:
            item, _ = self.pool._killed.pop(number)
            self.settle(item, Outcome("slow", [], self.limit, stack))
        elif number in self.pool._workers:
            worker = self.pool._workers[number]
            if worker.busy:
                self.read(worker)  # its last messages
            self.pool._drop(worker)
            if how == NOT_STARTED and not worker.template:  # no fork, or the template is gone
                if self.pool._template is None:
                    raise PolyrewardError(f"reward {self.task.name!r}: the system starts no further process")
                self.pool._drop(self.pool._template)
                self.waiting.extendleft(reversed(worker.items))
                return
            if worker.loading:
                end = f"the worker process {how}\n{stack}".strip()
                raise InvalidInputError(f"reward {_loading(worker)!r} cannot be loaded: {end}")
            if worker.items:
                item, *rest = worker.items
                self.waiting.extendleft(reversed(rest))
                self.settle(item, Outcome("died", [], 0.0, f"the worker process {how}\n{stack}".strip()))


def _loading(worker: _Worker) -> str:
    return worker.loading.name if worker.loading else ""


def _bid_farewell(process: subprocess.Popen[bytes], control: socket.socket, owner: int) -> None:
    """Let the guard go, which kills every worker, and wait for it."""
    control.close()
    if os.getpid() == owner:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
