"""A cell: a process that gave up all it could, and in which programs or tests run one after another.

In a container a cell is the first process of a PID namespace of its own. It forks every program, so that a program
starts confined, and SIGKILL to all in the namespace ends what a program leaves behind. A cell serves another program
only if the last one left no process, and no trace in the folder. Without namespaces a cell runs one program, as itself.
"""

from __future__ import annotations

import _socket
import contextlib
import os
import resource
import signal
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

from . import kernel, landlock, seccomp

HOME, RUN = "/tmp", "/tmp/run"
#: Order of the server to end what runs.
END = b"E"
#: What a cell reports that could not be confined, before the reason.
FAILURE = b"!"
#: What a cell reports: exit status or minus the signal, seconds of CPU, whether it can serve another.
REPORT = struct.Struct("<id?")
#: Times of the limit on time after which a test ends, where the machine keeps it waiting for a processor.
LONGEST_WAIT = 2.0
_MOST_USES = 500
_SPARE_USER = 1000  # inside a user namespace of the cell's own

Body = Callable[[list[int]], int]


class Rules:
    """How cells of a worker are confined; the same for all of them."""

    def __init__(
        self,
        namespaces: bool,
        own_user: bool,
        users: tuple[int, int] | None,
        seccomp: bool,
        landlock: bool,
        readable: tuple[str, ...] = (),
        reads_anything: bool = False,
        may_fork: bool = True,
        other_processes: int = 0,
    ) -> None:
        self.namespaces = namespaces  # in a bubblewrap container, where mounts and namespaces can be made
        self.own_user = own_user  # each cell gets a user namespace, as there are no user ids to spare
        self.users = users  # user ids to spare: of programs, of tests
        self.seccomp, self.landlock = seccomp, landlock
        self.readable = readable  # what Landlock leaves readable
        self.reads_anything = reads_anything  # of these, whatever their permissions say
        self.may_fork = may_fork  # and start threads
        self.other_processes = other_processes  # of the same user, which count towards the limit as well


def confine(rules: Rules, limits: Mapping[str, Any], role: int, home: str, processes: int, address_space: int) -> None:
    """Confine the calling process; `role` is 0 for programs and 1 for tests.

    `home` is its folder, `processes` an open /proc, `address_space` the bytes it has from the start.
    """
    os.setsid()
    os.umask(0o077)
    if rules.namespaces:
        _own_namespaces(rules, limits, processes)
        os.mkdir(RUN)
        os.chmod(RUN, 0o1777)
    else:
        os.environ.update(HOME=home, TMPDIR=home)
    os.chdir(RUN if rules.namespaces else home)
    _set_limits(rules, limits, address_space)
    if rules.reads_anything:
        kernel.prctl(kernel.PR_SET_KEEPCAPS, 1)
    if rules.users:
        user = rules.users[role]
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if not rules.namespaces:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.keep_capabilities(kernel.CAP_DAC_READ_SEARCH if rules.reads_anything else 0)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    if rules.landlock:
        landlock.restrict(rules.readable, [home])
    if rules.seccomp:
        seccomp.install(seccomp.build(None if rules.namespaces else os.getpid()))


def serve(channel: _socket.socket, bodies: Mapping[bytes, Body], rules: Rules) -> None:
    """Run what is ordered, each in a fork, until there are no more orders; `bodies` says what to run for an order."""
    alone = seccomp.build_alone() if rules.seccomp and not rules.may_fork else None
    clean, uses, files = _traces(), 0, list[int]()
    while True:
        order, files_now = receive(channel)
        if not order:
            os._exit(0)
        if order == END:
            continue  # of something that ended by itself
        uses += 1
        for file in files:  # of tests; not sooner, as a program that sees its pipe close wakes up, only to be killed
            os.close(file)
        files = files_now
        if order == b"T":  # tests that leave nothing behind
            before = time.process_time()
            good = bodies[order](files) == 0
            now = time.process_time()
            channel.send(REPORT.pack(0, now - before, good and uses < _MOST_USES and now < 1.0))
            continue
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                if alone is not None:
                    seccomp.install(alone)
                status = bodies[order](files)
            except BaseException:
                status = 70
            finally:
                os._exit(status)
        if order != b"G":  # the tests must see the end of a program's pipe
            for file in files:
                os.close(file)
            files = []
        if order == b"P" and not receive(channel)[0]:  # a program that is called ends when the tests have ended
            os._exit(0)
        status, cpu = _wait(pid, kill=order == b"P")
        channel.send(REPORT.pack(status, cpu, _traces() == clean and uses < _MOST_USES))


def run_once(channel: _socket.socket, bodies: Mapping[bytes, Body], rules: Rules) -> int:
    """Run what is ordered in this process; the exit status."""
    order, files = receive(channel)
    if rules.seccomp and not rules.may_fork:
        seccomp.install(seccomp.build_alone())
    return bodies[order](files) if order else 0


def receive(channel: _socket.socket) -> tuple[bytes, list[int]]:
    """An order and the open files which came with it."""
    data, extra, _, _ = channel.recvmsg(65536, 256)
    files: list[int] = []
    for level, kind, content in extra:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            files += struct.unpack(f"{len(content) // 4}i", content)
    return data, files


def _wait(pid: int, kill: bool) -> tuple[int, float]:
    """Wait for a process, then end all others of the namespace; exit status and seconds of CPU of all."""
    if kill:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    cpu = usage.ru_utime + usage.ru_stime
    while True:  # whatever it started is a child of this process now
        try:
            if os.wait4(-1, os.WNOHANG)[0] == 0:
                _kill_all()
                cpu += sum(os.wait4(-1, 0)[2][:2])
        except ChildProcessError:
            return os.waitstatus_to_exitcode(status), cpu


def _kill_all() -> None:
    """SIGKILL to every process of the namespace but this one, its first."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)


def _traces() -> tuple[Any, ...]:
    """What changes when anything is written, made, removed or renamed in the folder, or its permissions change."""
    space, found = os.statvfs(HOME), []
    for folder in (HOME, RUN):
        entry = os.stat(folder)
        found += [entry.st_ctime_ns, entry.st_mode, entry.st_nlink, os.listxattr(folder)]
    return space.f_bfree, space.f_ffree, *found


def _own_namespaces(rules: Rules, limits: Mapping[str, Any], processes: int) -> None:
    owner = (os.geteuid(), os.getegid())
    kernel.unshare(kernel.CLONE_NEWNS | (kernel.CLONE_NEWUSER if rules.own_user else 0))
    user = 0
    if rules.own_user:
        user = _SPARE_USER
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # or its files in /proc are root's
        _write(processes, "self/setgroups", "deny")
        _write(processes, "self/uid_map", f"{user} {owner[0]} 1")
        _write(processes, "self/gid_map", f"{user} {owner[1]} 1")
    options = f"size={limits['file_bytes']},nr_inodes=4096,mode=1777,uid={user},gid={user}"
    kernel.mount(b"tmpfs", HOME.encode(), b"tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options.encode())


def _write(folder: int, path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY, dir_fd=folder)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _set_limits(rules: Rules, limits: Mapping[str, Any], address_space: int) -> None:
    wanted = {
        "RLIMIT_CPU": limits["cpu_seconds"] + 3,  # the server ends it at the exact time; this is the last resort
        "RLIMIT_AS": address_space + limits["memory_bytes"],
        "RLIMIT_FSIZE": limits["file_bytes"],
        "RLIMIT_NOFILE": limits["open_files"],
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_RTPRIO": 0,
        "RLIMIT_STACK": 8 << 20,
    }
    if rules.may_fork:
        wanted["RLIMIT_NPROC"] = limits["processes"] + rules.other_processes + 1  # the cell itself
    for name, value in wanted.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
