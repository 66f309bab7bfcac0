"""Processes as the fork server sees them: whether they ended, what they use, and what they started."""

from __future__ import annotations

import _socket
import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from . import folders
from .cell import END, FAILURE, REPORT

#: The numbers of an order, in this sequence.
LIMITS = ("wall_seconds", "cpu_seconds", "memory_bytes", "processes", "open_files", "file_bytes")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_CLOCK = os.sysconf("SC_CLK_TCK")
_SIGKILL, _SIGSTOP = 9, 19
_REPORT_SECONDS = 5


class Cell:
    """A cell as its server knows it. With a `home` it runs one program, as itself."""

    def __init__(
        self, pid: int, role: int, limits: Mapping[str, float], channel: _socket.socket, home: str | None
    ) -> None:
        self.pid, self.role, self.limits, self.channel, self.home = pid, role, limits, channel, home
        self.alive = True
        self.handle: int | None = None
        if home is not None:
            with contextlib.suppress(OSError):  # before Linux 5.3
                self.handle = os.pidfd_open(pid)

    def order(self, what: bytes, files: Sequence[int]) -> None:
        """Have it run something with these open files."""
        numbers = b"".join(file.to_bytes(4, "little") for file in files)
        self.channel.sendmsg([what], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers)])

    def register(self, poll: Any) -> bool:
        """Have `poll` wake when it is done; False where it cannot."""
        if self.home is None:
            poll.register(self.channel, 1)
        elif self.handle is not None:
            poll.register(self.handle, 1)
        return self.home is None or self.handle is not None

    def done(self) -> bool:
        """Whether what it runs ended."""
        if self.home is not None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        try:
            found = self.channel.recv(1000, _socket.MSG_PEEK | _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return self.home is not None
        except OSError:
            return True
        if found.startswith(FAILURE):
            raise OSError(found[1:].decode("utf-8", "replace"))
        return True

    def end(self, well: bool, table: Table) -> tuple[int, float] | None:
        """End what it runs: exit status or minus the signal, and seconds of CPU.

        Unless all went well, the cell ends with it.
        """
        found = None
        if well and self.home is None:
            found = self._report()
        if found is None or not found[2]:
            status = self._kill(table)
            found = found or status
        return found[:2] if found is not None else None

    def _report(self) -> tuple[int, float, bool] | None:
        self.channel.settimeout(_REPORT_SECONDS)
        try:
            if self.role == 0:
                self.channel.send(END)
            data = self.channel.recv(64)
        except OSError:
            return None
        finally:
            self.channel.settimeout(None)
        return REPORT.unpack(data) if len(data) == REPORT.size else None

    def _kill(self, table: Table) -> tuple[int, float, bool]:
        if not self.alive:
            return 0, 0.0, False
        self.alive = False
        if self.home is not None:
            table.slay(self.pid)
        send(self.pid, _SIGKILL)
        _, status, usage = os.wait4(self.pid, 0)
        self.channel.close()
        if self.handle is not None:
            os.close(self.handle)
        if self.home is not None:
            folders.remove(self.home)
        return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, False


class Table:
    """The system's table of processes, as far as it is ours."""

    def __init__(self) -> None:
        self.folder = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY) if os.path.isdir("/proc/self") else -1
        self.everything_is_ours = False
        self.cells: set[int] = set()
        self.known: frozenset[int] = frozenset()
        self.own_memory = 0

    def settle(self, everything_is_ours: bool) -> None:
        """Note what runs before any program does; all that appears later is a program's if `everything_is_ours`."""
        self.everything_is_ours = everything_is_ours
        self.known = frozenset(self._numbers()) if everything_is_ours else frozenset()
        self.own_memory = self._memory(os.getpid())

    def address_space(self) -> int:
        """Bytes of address space of this process."""
        fields = self._read("self/statm").split()
        return int(fields[0]) * _PAGE if fields else 1 << 30

    def waited(self) -> float:
        """Seconds for which programs and tests could have run and had no processor."""
        fields = [self._read(f"{pid}/schedstat").split() for pid in self.members()]
        return sum(int(field[1]) for field in fields if len(field) > 1) / 1e9

    def over(self, limits: Mapping[str, float], running: Sequence[Cell]) -> str | None:
        """Which limit programs and tests with all that they started are over: cpu, memory, processes or disk."""
        members = self.members()
        cpu = memory = threads = 0.0
        for pid in members:
            fields = self._read(f"{pid}/stat").rpartition(")")[2].split()
            if len(fields) > 17:
                cpu += sum(map(int, fields[11:15])) / _CLOCK
                threads += int(fields[17])
            memory += max(0, self._memory(pid) - self.own_memory)
        if cpu >= limits["cpu_seconds"]:
            return "cpu"
        most = limits["memory_bytes"] * len(running)
        if memory > most and sum(map(self._proportional, members)) > most:
            return "memory"
        if threads > 2 * limits["processes"] + len(running):
            return "processes"
        homes = [ours.home for ours in running if ours.home is not None]
        return (
            "disk"
            if any(folders.size(home, int(limits["file_bytes"])) > limits["file_bytes"] for home in homes)
            else None
        )

    def members(self) -> set[int]:
        """The processes of programs and tests, as far as they live."""
        if self.everything_is_ours:
            return self._numbers() - self.known - self.cells
        found = self._children(os.getpid())  # also those whose parents ended
        more = set(found)
        while more := {child for parent in more for child in self._children(parent)} - found:
            found |= more
        return found

    def slay(self, first: int | None) -> None:
        """SIGKILL to all that was started by a program, until none is left but `first` itself, which is stopped.

        None: to all that was started by any program, and the cells with it.
        """
        spared = set() if first is None else self.cells | {first}
        if first is not None:
            send(first, _SIGSTOP)
        for _ in range(200):
            others = {pid for pid in self.members() - spared if self._state(pid) not in "ZX"}
            for number in (_SIGSTOP, _SIGKILL):
                for pid in others:
                    send(pid, number)
            if not others:
                break
            time.sleep(0.001)
        for pid in self._children(os.getpid()) - spared:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def _numbers(self) -> set[int]:
        return {int(name) for name in os.listdir(self.folder) if name.isdigit()}

    def _children(self, pid: int) -> set[int]:
        """Children of a process of one thread; of all its threads where it has more."""
        try:
            threads = _listed(self.folder, f"{pid}/task")
        except OSError:
            return set()
        return {int(child) for thread in threads for child in self._read(f"{pid}/task/{thread}/children").split()}

    def _state(self, pid: int) -> str:
        return (self._read(f"{pid}/stat").rpartition(")")[2].split() or ["X"])[0]

    def _memory(self, pid: int) -> int:
        fields = self._read(f"{pid}/statm").split()
        return (int(fields[1]) - int(fields[2])) * _PAGE if len(fields) > 2 else 0

    def _proportional(self, pid: int) -> int:
        """Memory of a process with pages that several share counted in part."""
        for line in self._read(f"{pid}/smaps_rollup").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
        return self._memory(pid)

    def _read(self, path: str) -> str:
        if self.folder < 0:
            return ""
        try:
            descriptor = os.open(path, os.O_RDONLY, dir_fd=self.folder)
        except OSError:
            return ""
        try:
            return os.read(descriptor, 65536).decode("utf-8", "replace")
        except OSError:
            return ""
        finally:
            os.close(descriptor)


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _listed(folder: int, path: str) -> list[str]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
    try:
        return os.listdir(descriptor)
    finally:
        os.close(descriptor)
