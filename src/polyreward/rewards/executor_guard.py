"""What the reward executor runs outside the trainer's process: a guard, a template, and workers.

The trainer never forks itself, which a process with torch's threads and a CUDA context must not do. It starts one
guard, which runs nothing but this module, and tells it over a socket to start and to kill processes. The template loads
rewards and never runs one; workers are forks of it, so that what a reward imports is loaded once, and a worker that was
killed is replaced in milliseconds. Where loading leaves threads or open files, which a fork must not share, there is
no template, and every worker loads for itself.

A worker reads samples from a socket of its own and announces every sample's end on it, so that the trainer knows which
sample a worker is at. Killing is SIGKILL to the worker and to everything it started; no signal handler and no loop in
C code escapes it. The guard runs no user code: when the trainer ends, however it ends, the guard sees its socket close
and kills what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import functools
import inspect
import json
import os
import pickle
import random
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.rewards.contract import as_list, check_values, first_row, name_of

HEADER = struct.Struct("<Q")
TAG = "POLYREWARD_WORKER"
NOT_STARTED = "could not be started"
_LONGEST_TRACEBACK = 8000
_DEATH_SIGNAL, _SUBREAPER = 1, 36  # of prctl(2)


def main(control: int, parent: int) -> None:
    """Serve until the socket `control` closes or the process `parent` ends, then kill every worker."""
    guard = Guard(socket.socket(fileno=control), parent)
    try:
        guard.serve()
    finally:
        guard.end()


def frame(message: Any) -> bytes:
    """A message between trainer and worker as bytes: its length, then its pickle."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


class Guard:
    """Starts, kills and buries processes as it is told.

    Commands are lines: ``start N`` and ``template N``, each with a socket, and ``kill N``.
    """

    def __init__(self, control: socket.socket, parent: int) -> None:
        self.control, self.parent = control, parent
        self.pids: dict[int, int] = {}  # worker -> process
        self.stacks: dict[int, tuple[int, str]] = {}  # process -> pipe for stacks, stack found when it was killed
        self.template: tuple[int, socket.socket] | None = None  # process, and a socket to order copies on
        self.lines = b""
        self.sockets: list[int] = []
        self.waker = os.pipe()

    def serve(self) -> None:
        """Obey until the trainer is gone."""
        _prctl(_SUBREAPER, 1)
        for end in self.waker:
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.set_wakeup_fd(self.waker[1])
        while os.getppid() == self.parent:
            watched: list[Any] = [self.control, self.waker[0]]
            ready = select.select(watched, [], [], 1.0)[0]
            if self.waker[0] in ready:
                os.read(self.waker[0], 4096)
            if self.control in ready and not self.obey():
                return
            self.bury()

    def obey(self) -> bool:
        """Carry out the commands that have come; False when there will be no more."""
        try:
            data, sockets, _, _ = socket.recv_fds(self.control, 65536, 64)
        except ConnectionError:  # closed with news that nobody read
            return False
        self.lines += data
        self.sockets += sockets
        *commands, self.lines = self.lines.split(b"\n")
        for command in commands:
            verb, worker = command.split()
            if verb in (b"start", b"template"):
                self.start(int(worker), self.sockets.pop(0), verb == b"template")
            elif int(worker) in self.pids:
                self.kill(self.pids[int(worker)])
        return bool(data)

    def start(self, worker: int, channel: int, template: bool) -> None:
        """Start a process that talks over the socket `channel`."""
        os.set_inheritable(channel, False)
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        if template or self.template is None:
            pid = self.fork(worker, channel, reading, writing, template)
        else:
            pid = self.copy(worker, channel, writing)
        os.close(channel)
        os.close(writing)
        if pid:
            self.pids[worker], self.stacks[pid] = pid, (reading, "")
        else:
            os.close(reading)
            self.tell(worker, NOT_STARTED, "")

    def fork(self, worker: int, channel: int, reading: int, writing: int, template: bool) -> int:
        """Fork the template, or a worker without one; 0 where the system refuses."""
        ours, orders = socket.socketpair()
        try:
            pid = os.fork()
        except OSError:
            return 0
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGCHLD, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
                others = [pipe for pipe, _ in self.stacks.values()]
                for unwanted in (self.control.detach(), ours.detach(), *self.waker, reading, *others, *self.sockets):
                    os.close(unwanted)
                if not template:
                    orders.close()
                settle(worker, writing)
                work(socket.socket(fileno=channel), orders if template else None)
            finally:
                os._exit(0)
        if template:
            self.template = pid, ours
        return pid

    def copy(self, worker: int, channel: int, writing: int) -> int:
        """Have the template fork a worker, which falls to the guard as its child; 0 where it does not."""
        assert self.template is not None
        pid, orders = self.template
        with contextlib.suppress(OSError):
            socket.send_fds(orders, [str(worker).encode()], [channel, writing])
            if select.select([orders], [], [], 10.0)[0] and (answer := orders.recv(32)):
                return int(answer)
        self.slay(pid)
        return 0

    def kill(self, pid: int) -> None:
        """Note where the worker is, and kill it with everything it started."""
        pipe, _ = self.stacks[pid]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2)
            self.stacks[pid] = pipe, _read(pipe, patience=0.1)
        self.slay(pid)

    def slay(self, pid: int) -> None:
        """SIGKILL a worker and all that it started: its descendants, its session, and orphans that carry its tag.

        The worker is stopped first, so that it starts nothing while its descendants are looked up.
        """
        if self.template is not None and self.template[0] == pid:
            self.template[1].close()
            self.template = None
        tag = next((str(worker) for worker, known in self.pids.items() if known == pid), "")
        _send(pid, signal.SIGSTOP)
        for _ in range(50):
            table = _processes()
            orphans = self.orphans(table)
            found = {pid, *(orphan for orphan in orphans if table[orphan][1] == pid or _tagged(orphan, tag))}
            while more := {child for child, (parent, _) in table.items() if parent in found} - found:
                found |= more
            if not (found := found - {pid}):
                break
            for victim in found:
                _send(victim, signal.SIGKILL)
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        _send(pid, signal.SIGKILL)

    def orphans(self, table: Mapping[int, tuple[int, int]]) -> list[int]:
        """Processes whose parents ended and which fell to the guard."""
        own, me = set(self.pids.values()), os.getpid()
        return [pid for pid, (parent, _) in table.items() if parent == me and pid not in own]

    def bury(self) -> None:
        """Collect what has ended, and report the workers among them."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                pid = found.si_pid
                worker = next((number for number, known in self.pids.items() if known == pid), None)
                if worker is not None:
                    self.slay(pid)  # what it left behind
                _, status = os.waitpid(pid, 0)
                if worker is not None:
                    del self.pids[worker]
                    pipe, stack = self.stacks.pop(pid)
                    stack = stack or _read(pipe)
                    os.close(pipe)
                    self.tell(worker, _how(os.waitstatus_to_exitcode(status)), stack)

    def tell(self, worker: int, how: str, stack: str) -> None:
        """Tell the trainer that a worker is gone."""
        with contextlib.suppress(OSError):
            self.control.sendall(json.dumps({"worker": worker, "how": how, "stack": stack}).encode() + b"\n")

    def end(self) -> None:
        """Kill every worker and everything that workers ever started."""
        for pid in (*self.pids.values(), *self.orphans(_processes())):
            self.slay(pid)
        patience = time.monotonic() + 2
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < patience:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.002)


def settle(worker: int, stacks: int) -> None:
    """Make a fork a process of its own: a session, an end with the guard's, stacks to the pipe `stacks` when killed."""
    os.setsid()
    _prctl(_DEATH_SIGNAL, signal.SIGKILL)
    os.environ[TAG] = str(worker)
    os.set_blocking(stacks, False)
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR2, stacks, all_threads=False)
    np.random.seed()  # noqa: NPY002 - forks would share the state of a generator that user code may draw from
    random.seed()


def work(channel: socket.socket, orders: socket.socket | None) -> None:
    """The loop of a worker: load rewards, score samples, announce each. The template has `orders` and forks on them."""
    guard, rewards, clean = os.getppid(), dict[int, Any](), _open_files()
    stream = channel.makefile("rb", buffering=1 << 16)
    while True:
        if orders is not None and orders in select.select([channel, orders], [], [])[0]:
            if (copied := _copy(orders, guard)) is not None:
                stream.close()
                channel.close()
                orders.close()
                orders, channel = None, copied
                stream = channel.makefile("rb", buffering=1 << 16)
            continue
        header = stream.read(HEADER.size)
        if not header:
            return
        kind, key, *content = pickle.loads(stream.read(HEADER.unpack(header)[0]))
        if kind == "load":
            path, payload = content
            try:
                sys.path.extend(entry for entry in path if entry not in sys.path)
                rewards[key] = pickle.loads(payload)
                channel.sendall(frame(("loaded", key, _open_files() == clean and _threads() == 1)))
            except BaseException as error:
                channel.sendall(frame(("unloadable", _text_of(error))))
        elif key not in rewards:
            channel.sendall(frame(("unknown",)))
        else:
            (items,) = content
            for item in items:
                try:
                    answer = frame(_score(rewards[key], item))
                except Exception as error:  # what the reward logged does not pickle
                    answer = frame(("raised", _text_of(error), 0.0))
                channel.sendall(answer)
            sys.stdout.flush()


def _threads() -> int:
    """Threads of this process; 2 where the system does not tell."""
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 2


def _open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else []


def _copy(orders: socket.socket, guard: int) -> socket.socket | None:
    """Fork a worker as the guard orders it. In the worker its socket, in the template None.

    The worker is a grandchild whose parent ends at once, and so becomes a child of the guard.
    """
    order, files, _, _ = socket.recv_fds(orders, 32, 2)
    if not order:
        os._exit(0)
    between = os.fork()
    if between == 0:
        own = os.getpid()
        pid = os.fork()
        if pid:
            orders.sendall(str(pid).encode())
            os._exit(0)
        while os.getppid() == own:
            time.sleep(0.0002)
        if os.getppid() != guard:
            os._exit(0)
        for file in files:
            os.set_inheritable(file, False)
        settle(int(order), files[1])
        return socket.socket(fileno=files[0])
    os.waitpid(between, 0)
    for file in files:
        os.close(file)
    return None


def _score(reward: Any, item: bytes) -> tuple[Any, ...]:
    """Run a reward on one item: ``("value", values, seconds, logs)``, or what went wrong and its text."""
    begin = time.perf_counter()
    logs: list[tuple[Any, ...]] = []
    try:
        first, prompts, completions, columns, hooks, name = pickle.loads(item)
        first_row.set(first)
        for hook in hooks:
            columns[hook] = functools.partial(_record, logs, hook)
        result = reward(prompts=prompts, completions=completions, **columns)
        if inspect.isawaitable(result):
            result = asyncio.run(_finish(result))
        result = list(result) if hasattr(result, "__iter__") else result
    except MissingColumnError as error:
        return "missing", str(error)
    except BaseException as error:
        return "raised", _text_of(error), time.perf_counter() - begin
    seconds = time.perf_counter() - begin
    try:
        values = check_values(result, len(completions), name or name_of(reward))
    except InvalidInputError as error:
        return "wrong", str(error)
    return "value", as_list(values), seconds, logs


async def _finish(result: Awaitable[Any]) -> Any:
    return await result


def _record(logs: list[tuple[Any, ...]], hook: str, name: str, value: Any) -> None:
    """Stands in for a trainer's `log_extra` or `log_metric`; the trainer's process hears of it with the result."""
    logs.append((hook, name, list(value) if hook == "log_extra" else float(value)))


def _text_of(error: BaseException) -> str:
    """The traceback without the frames of this module."""
    inner = error.__traceback__
    while inner is not None and inner.tb_frame.f_code.co_filename == __file__:
        inner = inner.tb_next
    text = "".join(traceback.format_exception(type(error), error, inner)).rstrip()
    half = _LONGEST_TRACEBACK // 2
    return text if len(text) <= 2 * half else f"{text[:half]}\n[...]\n{text[-half:]}"


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by signal {-code} ({signal.strsignal(-code)})"


def _processes() -> dict[int, tuple[int, int]]:
    """Parent and session of every process that has not ended; empty where the system has no /proc."""
    table = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if state not in "ZX":
                table[int(folder.name)] = int(parent), int(session)
    return table


def _tagged(pid: int, tag: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(tag) and f"{TAG}={tag}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _read(pipe: int, patience: float = 0.0) -> str:
    """What stands in a pipe; waits up to `patience` seconds for its beginning."""
    text = b""
    while select.select([pipe], [], [], 0.01 if text else patience)[0]:
        with contextlib.suppress(OSError):
            piece = os.read(pipe, 65536)
            if not piece:
                break
            text += piece
        if len(text) > _LONGEST_TRACEBACK:
            break
    return text.decode(errors="replace").partition(f'  File "{__file__}"')[0].strip()


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
