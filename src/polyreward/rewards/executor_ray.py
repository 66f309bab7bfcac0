"""The reward executor over a Ray cluster: an actor a worker, and in each actor a pool of one worker process.

Rewards run in the worker process, never in the actor, so an actor stays responsive whatever a reward does: the time
limit holds on the node itself, by SIGKILL, and costs one sample there too. An actor that does not answer in time all
the same is killed with ``ray.kill``. Items of an actor that is lost, with its node for example, run once more
elsewhere, one by one.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from polyreward.errors import InvalidInputError, PolyrewardError, require
from polyreward.rewards.executor_pool import LocalPool, Outcome, Task

_GRACE = 30.0  # seconds that an actor may be late before it is killed
_CHUNK_SECONDS, _LARGEST_CHUNK = 0.1, 256


def connect(address: str, cpus: int | None, **options: Any) -> bool:
    """Connect to the Ray cluster at `address` ("local": one on this machine with `cpus`), unless a session is open.

    Returns
    -------
    bool
        Whether this call connected, so that the caller disconnects.

    Raises
    ------
    InvalidInputError
        There is no cluster at `address`.
    """
    ray: Any = require("ray", "ray")
    if ray.is_initialized():
        return False
    if address == "local":
        options |= {"include_dashboard": False, "num_cpus": cpus}
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself tries for minutes where nobody listens
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        ray.init(address=address, logging_level="error", **options)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise InvalidInputError(f"cannot connect to a Ray cluster at {address!r}: {error}") from error
    return True


class Host:
    """The actor: a local pool of one worker."""

    def __init__(self, queue: int, start_limit: float) -> None:
        self.pool = LocalPool(1, queue, start_limit)

    def ready(self) -> bool:
        """Answers when the actor has started."""
        return True

    def run(self, task: Task, items: list[bytes], limit: float) -> list[Outcome]:
        """Run pickled items."""
        return self.pool.run(task, len(items), items.__getitem__, limit)


@dataclass(eq=False)
class _Actor:
    """An actor, what it was asked last, and until when it must have answered."""

    handle: Any
    request: Any
    deadline: float
    items: list[int] = field(default_factory=list)
    alone: bool = False  # its item runs for the second time


class RayPool:
    """As `LocalPool`, over the actors of a Ray cluster. See `RewardExecutor` for the parameters."""

    def __init__(self, workers: int | None, queue: int, start_limit: float, address: str) -> None:
        self._ray: Any = require("ray", "ray")
        self.size, self.queue, self.start_limit, self.address = workers, queue, start_limit, address
        self._lock = threading.Lock()
        self._connected = False  # by us
        self._actors: list[_Actor] = []
        self._tasks: dict[int, Any] = {}  # in Ray's object store
        self._paces: dict[int, float] = {}

    def run(self, task: Task, count: int, encode: Callable[[int], bytes], limit: float) -> list[Outcome]:
        """Run items 0..count-1 of a task; see `LocalPool.run`."""
        with self._lock:
            self._start()
            if task.key not in self._tasks:
                self._tasks[task.key] = self._ray.put(task)
            try:
                return self._run(task, count, encode, limit)
            except BaseException:
                self._kill_all()
                raise

    def close(self) -> None:
        """Kill the actors, and disconnect from Ray where the executor connected."""
        with self._lock:
            self._kill_all()
            self._tasks.clear()
            if self._connected and self._ray.is_initialized():
                self._ray.shutdown()
            self._connected = False

    def _start(self) -> None:
        ray = self._ray
        if connect(self.address, self.size):
            self._connected = True
            self._actors, self._tasks = [], {}
        if self.size is None:
            self.size = max(1, int(ray.cluster_resources().get("CPU", 1)))
        while len(self._actors) < self.size:
            self._actors.append(self._new())

    def _new(self) -> _Actor:
        handle = self._ray.remote(num_cpus=1)(Host).remote(self.queue, self.start_limit)
        return _Actor(handle, handle.ready.remote(), float("inf"))

    def _kill_all(self) -> None:
        for actor in self._actors:
            if self._ray.is_initialized():
                self._ray.kill(actor.handle)
        self._actors = []

    def _run(self, task: Task, count: int, encode: Callable[[int], bytes], limit: float) -> list[Outcome]:
        fresh, again = deque(range(count)), deque[int]()  # `again`: items of lost actors, which run once more, alone
        outcomes: dict[int, Outcome] = {}
        heard, failed_starts = time.monotonic(), 0
        while len(outcomes) < count:
            self._dispatch(task, fresh, again, encode, limit)
            asked = {actor.request: actor for actor in self._actors if actor.request is not None}
            done, _ = self._ray.wait(list(asked), num_returns=1, timeout=1.0)
            now = time.monotonic()
            if done or any(actor.items for actor in self._actors):
                heard = now
            if now - heard > self.start_limit:
                raise self._no_actor(task, f"none started in {self.start_limit:g} s")
            for request, actor in asked.items():
                if request not in done and actor.deadline > now:
                    continue
                found, loss = self._answer(actor, request in done)
                items, actor.items, actor.request = actor.items, [], None
                if not loss:
                    outcomes.update(zip(items, found, strict=True))
                    if items:
                        seconds = sum(outcome.seconds for outcome in found) / len(found)
                        self._paces[task.key] = (self._paces.get(task.key, seconds) + seconds) / 2
                    continue
                self._ray.kill(actor.handle)
                self._actors[self._actors.index(actor)] = self._new()
                failed_starts += not items
                if failed_starts > len(self._actors):
                    raise self._no_actor(task, loss)
                for item in items:
                    if actor.alone or request not in done:
                        outcomes[item] = Outcome("died", [], 0.0, loss)
                    else:
                        again.append(item)
        return [outcomes[item] for item in range(count)]

    def _answer(self, actor: _Actor, answered: bool) -> tuple[list[Outcome], str]:
        """What an actor found, and how it was lost where it was."""
        if not answered:
            return [], "the Ray actor did not answer in time"
        try:
            found = self._ray.get(actor.request)
            return (found if actor.items else []), ""
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, PolyrewardError) else error) from None
        except self._ray.exceptions.RayError as error:
            return [], f"the Ray actor is lost: {error}"

    def _no_actor(self, task: Task, why: str) -> PolyrewardError:
        free = self._ray.available_resources()
        return PolyrewardError(f"reward {task.name!r}: no Ray actor ({why}); free resources of the cluster: {free}")

    def _dispatch(
        self, task: Task, fresh: deque[int], again: deque[int], encode: Callable[[int], bytes], limit: float
    ) -> None:
        """Give items to actors that have answered, while the queue has room."""
        pace = self._paces.get(task.key)
        room = self.queue - sum(len(actor.items) for actor in self._actors)
        for actor in self._actors:
            if actor.request is not None or room <= 0 or not (fresh or again):
                continue
            size = 1 if pace is None else int(_CHUNK_SECONDS / max(pace, 1e-9))
            size = max(1, min(size, -(-len(fresh) // (2 * len(self._actors))), room, _LARGEST_CHUNK))
            actor.alone = bool(again)
            actor.items = [again.popleft()] if again else [fresh.popleft() for _ in range(size)]
            room -= len(actor.items)
            pickles = [encode(item) for item in actor.items]
            actor.request = actor.handle.run.remote(self._tasks[task.key], pickles, limit)
            actor.deadline = time.monotonic() + self.start_limit + len(pickles) * (limit + 1.0) + _GRACE
