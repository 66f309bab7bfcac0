"""The supervisor of a worker: makes cells, hands tests to them, watches and ends them, one test at a time.

It gets orders over a socket from the process that owns the sandbox. An order has limits and open files, never what is
in them: code, input and tests are read by the process that needs them, so that nothing of one test is in the memory
which the processes of the next are copied from.

The module imports little, as every process of every program is a copy of this one, and copying takes time.
"""

from __future__ import annotations

import _socket
import builtins
import gc
import importlib
import os
import select
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from . import cell, folders, grader, kernel, landlock, processes, program, seccomp, warmup

#: What most programs import. Less used modules cost every program more than they save the few.
_PRELOADED = [
    "bisect",
    "collections",
    "copy",
    "functools",
    "heapq",
    "itertools",
    "math",
    "operator",
    "re",
    "string",
    "typing",
]
_WARM_UP = 20
_TICK = 0.1
_PROGRAM, _TESTS = 0, 1
_BODIES = {b"S": program.script_body, b"P": program.served_body, b"G": grader.body, b"T": grader.tame_body}


class Server:
    """Carries out orders from `control`."""

    def __init__(self, control: _socket.socket, rules: cell.Rules, folder: str) -> None:
        self.control, self.rules, self.folder = control, rules, folder
        self.table = processes.Table()
        self.own_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY) if rules.namespaces else -1
        self.address_space = self.table.address_space()
        self.cells: dict[int, processes.Cell] = {}
        self.homes = 0
        self.numbers: list[str] = []  # the limits of the last order, as text and as numbers
        self.limits: dict[str, float] = {}

    def prepare(self) -> None:
        """Settle before the first order."""
        rules = self.rules
        if rules.namespaces:
            kernel.mount(None, b"/", None, kernel.MS_REC | kernel.MS_PRIVATE)
            kernel.detach(b"/proc")
        else:
            kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
            signal.signal(signal.SIGTERM, self.leave)
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGTERM)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        rules.seccomp = rules.seccomp and seccomp.available()
        rules.landlock = rules.landlock and landlock.version() > 0
        self.table.settle(rules.namespaces)
        warmup.run(_WARM_UP)
        sys.modules.pop("main", None)
        _streams()
        gc.collect()
        gc.freeze()

    def serve(self) -> None:
        """Carry out orders until the owner is gone."""
        self.say("hello", int(self.rules.seccomp), int(self.rules.landlock))
        while True:
            data, files = cell.receive(self.control)
            if not data:
                self.leave()
            kind, number, *numbers = data.decode().split()
            if kind != "end":  # the end of a test that is over
                if numbers != self.numbers:
                    self.numbers, self.limits = numbers, dict(zip(processes.LIMITS, map(float, numbers), strict=True))
                self.carry_out(kind, number, self.limits, files)

    def leave(self, *_: Any) -> NoReturn:
        """End with all that was ever started. In a container that is so by itself."""
        if not self.rules.namespaces:
            self.table.slay(None)
            folders.remove(self.folder)
        os._exit(0)

    def say(self, *words: Any) -> None:
        """Tell the owner something."""
        self.control.send(" ".join(map(str, words)).encode())

    def carry_out(self, kind: str, number: str, limits: dict[str, float], files: list[int]) -> None:
        """Run one test, and tell how it ended."""
        started = time.monotonic()
        why, status, cpu = "none", "none", 0.0
        running: list[processes.Cell] = []
        try:
            try:
                self.order(kind, limits, files, running)
            except BrokenPipeError:  # an idle cell was killed, by the system perhaps
                for ours in running:
                    ours.end(False, self.table)
                running.clear()
                self.cells.clear()
                self.order(kind, limits, files, running)
            why = self.watch(number, limits, running, started)
        except OSError as error:
            why = f"refused:_{error}".replace(" ", "_")
        seconds = time.monotonic() - started
        for ours in running:
            found = ours.end(why == "none", self.table)
            if not ours.alive:
                self.cells.pop(ours.role, None)
            if found is not None:
                status, cpu = str(found[0]), cpu + found[1]
        for file in files:  # not sooner: a program that sees its pipe close wakes up, only to be killed
            os.close(file)
        self.say("done", number, why, seconds, cpu, status)

    def order(self, kind: str, limits: dict[str, float], files: list[int], running: list[processes.Cell]) -> None:
        """Have cells, added to `running`, carry out an order."""
        if kind == "script":
            running.append(self.cell(_PROGRAM, limits))
            running[0].order(b"S", files)
        else:
            running += (self.cell(_TESTS, limits), self.cell(_PROGRAM, limits))
            self.tests(running, files, b"T" if kind == "tame" and self.rules.namespaces else b"G")

    def tests(self, running: list[processes.Cell], files: list[int], how: bytes) -> None:
        """Order a program and the tests that call it; `files` are code, tests and the pipe for the verdict."""
        grading, tested = running
        requests, requests_in = os.pipe()
        replies, replies_in = os.pipe()
        code, tests, verdict = files[:3]
        files += (requests, requests_in, replies, replies_in)
        tested.order(b"P", [code, requests, replies_in])
        grading.order(how, [tests, replies, requests_in, verdict])
        files.remove(requests_in)
        for file in files:  # the tests must see the end of a program's pipe
            os.close(file)
        files[:] = [requests_in]

    def cell(self, role: int, limits: Mapping[str, float]) -> processes.Cell:
        """A cell for programs or for tests: the one there is, or a new one."""
        found = self.cells.get(role)
        if found is not None:
            if found.limits is limits or found.limits == limits:
                return found
            found.end(False, self.table)
        made = self.cells[role] = self.make(role, dict(limits))
        self.table.cells = {ours.pid for ours in self.cells.values()}
        return made

    def make(self, role: int, limits: dict[str, float]) -> processes.Cell:
        """Fork a new cell."""
        rules, home = self.rules, cell.HOME
        whole = {name: int(value) for name, value in limits.items()}
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        if not rules.namespaces:
            self.homes += 1
            home = os.path.join(self.folder, str(self.homes))
            os.mkdir(home, 0o700)
            if rules.users:
                os.chown(home, rules.users[role], rules.users[role])
        else:
            kernel.unshare(kernel.CLONE_NEWPID)
        try:
            pid = os.fork()
        except OSError:
            pid = -1
        if pid == 0:
            status = 70
            try:
                cell.confine(rules, whole, role, home, self.table.folder, self.address_space)
                os.dup2(theirs.fileno(), 3)
                theirs = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, 3)
                os.closerange(4, 1 << 16)  # no copy of another cell's socket stays
                if rules.namespaces:
                    cell.serve(theirs, _BODIES, self.rules)
                status = cell.run_once(theirs, _BODIES, self.rules)
            except BaseException as error:
                theirs.send(cell.FAILURE + f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(status)
        if rules.namespaces:
            kernel.enter(self.own_namespace, kernel.CLONE_NEWPID)
        theirs.close()
        if pid < 0:
            raise OSError("the system refuses a further process")
        return processes.Cell(pid, role, limits, ours, None if rules.namespaces else home)

    def watch(self, number: str, limits: Mapping[str, float], running: list[processes.Cell], started: float) -> str:
        """Wait until the first of `running` is done, a limit is reached or the owner wants no more; the reason."""
        poll, first, wall = select.poll(), running[0], limits["wall_seconds"]
        poll.register(self.control, select.POLLIN)
        signs = first.register(poll)
        next_check = started + min(_TICK, wall)
        while True:
            patience = max(0.0, next_check - time.monotonic())
            for descriptor, _ in poll.poll(1000 * (patience if signs else min(patience, 0.002)) + 1):
                if descriptor == self.control.fileno():
                    data = self.control.recv(65536)
                    if not data:
                        self.leave()
                    if data.decode().split() == ["end", number]:
                        return "ended"
            if first.done():
                return "none"
            now = time.monotonic()
            if now < next_check:
                continue
            waited = min(self.table.waited(), (cell.LONGEST_WAIT - 1) * wall)
            if now - started - waited >= wall:
                return "wall"
            if (broken := self.table.over(limits, running)) is not None:
                return broken
            next_check = min(now + _TICK, max(started + wall + waited, now + 0.002))


def main(control: int, folder: str, packages: list[str], **rules: Any) -> None:
    """Serve on the socket `control`; `folder` is for programs in limits mode, `packages` are for them to import."""
    os.set_inheritable(control, False)
    channel = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, control)
    for name in _PRELOADED:
        importlib.import_module(name)
    quitter = importlib.import_module("_sitebuiltins").Quitter  # what the module site gives, without site
    builtins.exit, builtins.quit = quitter("exit", "Ctrl-D (i.e. EOF)"), quitter("quit", "Ctrl-D (i.e. EOF)")
    sys.path[:] = ["", *sys.path, *packages]
    server = Server(channel, cell.Rules(**rules), folder)
    server.prepare()
    server.serve()


def _streams() -> None:
    """Make the streams of scripts, while what stands behind them is a pipe and no device."""
    source, target = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    for number in (1, 2):
        os.dup2(target, number)
    streams = {
        "stdin": open(0, encoding="utf-8", errors="surrogateescape"),  # noqa: SIM115 - for as long as it runs
        "stdout": open(1, "w", encoding="utf-8", errors="surrogateescape"),  # noqa: SIM115
        "stderr": open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1),  # noqa: SIM115
    }
    for name, stream in streams.items():
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    for number in (1, 2):
        os.dup2(null, number)
    for descriptor in (source, target, null):
        os.close(descriptor)
