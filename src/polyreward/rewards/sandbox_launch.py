"""How a worker of the sandbox is started: in a bubblewrap container, or with limits alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import queue
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polyreward.errors import InvalidInputError, PolyrewardError
from polyreward.rewards.sandbox_command import python_paths, start_alone, start_container

if TYPE_CHECKING:
    from polyreward.rewards.sandbox_inside.cell import Rules

Mode = Literal["bubblewrap", "limits"]
_START_SECONDS = 30.0
_SPARE_USERS = 2_000_000_000


class SandboxError(PolyrewardError, RuntimeError):
    """The sandbox cannot be started, or was closed."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """How workers are started, found by starting one."""

    mode: Mode
    rules: Rules
    spare: range | None = None  # user ids that nothing else has, of which each worker takes two
    facts: tuple[str, ...] = ()
    weaker: tuple[str, ...] = ()
    why: str = ""  # why not bubblewrap

    def start(self) -> tuple[subprocess.Popen[bytes], socket.socket, str | None]:
        """Start a worker: its process, the socket to talk to it, and its folder for programs."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        spare = None if self.spare is None else self.spare[2 * secrets.randbelow(len(self.spare) // 2)]
        with theirs:
            try:
                if self.mode == "bubblewrap":
                    return start_container(self.rules, spare, theirs), ours, None
                folder = tempfile.mkdtemp(prefix="polyreward-sandbox-")
                os.chmod(folder, 0o711)
                rules = self.rules if spare is None else _rules(**{**vars(self.rules), "users": (spare, spare + 1)})
                return start_alone(rules, theirs, folder), ours, folder
            except BaseException:
                ours.close()
                raise


@functools.cache
def find(mode: Literal["auto", "bubblewrap", "limits"]) -> Launch:
    """The way to start workers in this process; tries it once.

    Raises
    ------
    SandboxError
        Where not even limits alone work, or where bubblewrap is demanded and does not work.
    InvalidInputError
        For a mode that does not exist.

    """
    if sys.platform != "linux":
        raise SandboxError(f"the sandbox needs Linux, and this is {sys.platform}")
    if mode == "limits":
        return dataclasses.replace(_with_limits(), why="as demanded")
    if mode not in ("auto", "bubblewrap"):
        raise InvalidInputError(f"isolation is {mode!r}; it is 'auto', 'bubblewrap' or 'limits'")
    try:
        return _with_bubblewrap()
    except SandboxError as error:
        if mode == "bubblewrap":
            raise
        return dataclasses.replace(_with_limits(), why=str(error))


def _with_bubblewrap() -> Launch:
    if shutil.which("bwrap") is None:
        raise SandboxError("bubblewrap is not installed; install the package 'bubblewrap' (apt install bubblewrap)")
    spare_users = _spare_users() if os.geteuid() == 0 and _readable(python_paths()) else None
    problem = ""
    for spare in [None] if spare_users is None else [spare_users, None]:
        users = None if spare is None else (1, 2)  # as they are called inside
        counted = spare is not None or not _is_root_of_machine()
        rules = _rules(
            namespaces=True, own_user=spare is None, users=users, seccomp=True, landlock=False, may_fork=counted
        )  # fmt: skip
        try:
            hello = _greet(Launch("bubblewrap", rules, spare))
        except SandboxError as error:
            problem = str(error)
            continue
        facts = [
            "bubblewrap container for each worker: user, PID, mount, network, IPC, UTS and cgroup namespaces",
            "PID and mount namespaces and a tmpfs of its own for each process that runs programs or tests",
            "no network, no home folder, no environment, no /proc; Python and /usr read-only",
            "no capabilities, no new privileges, rlimits on memory, CPU, processes, files and file size",
        ]
        weaker = []
        if hello["seccomp"]:
            facts.append("seccomp filter")
        else:
            weaker.append("no seccomp filter on this machine")
        if not counted:
            weaker.append("there are no user ids to spare, so that programs may start neither processes nor threads")
        rules.seccomp = hello["seccomp"]
        return Launch("bubblewrap", rules, spare, tuple(facts), tuple(weaker))
    raise SandboxError(f"bubblewrap is installed and does not work here: {problem}")


def _with_limits() -> Launch:
    hello = _greet(Launch("limits", _limits_rules(None, False)))
    spare = _spare_users() if os.geteuid() == 0 else None
    places = [*python_paths(), tempfile.gettempdir()]
    reachable = _readable(places[:-1]) and _reachable(places)
    if spare is not None and (reachable or (hello["landlock"] and hello["seccomp"])):
        rules = _limits_rules(spare, not reachable)
        try:
            _greet(Launch("limits", rules, spare))
        except SandboxError:
            spare, rules = None, _limits_rules(None, False)
    else:
        spare, rules = None, _limits_rules(None, False)
    rules.seccomp = hello["seccomp"]
    facts = [
        "rlimits on memory, CPU, processes, files and file size; no new privileges",
        "a session and a temporary folder for each process; killed with all that it started",
        "no environment",
    ]
    weaker = ["programs share the PID, mount and IPC namespaces of this machine"]
    if hello["seccomp"]:
        facts.append("seccomp filter: no network, no signals to other processes")
    else:
        weaker.append(
            "no seccomp filter: programs reach the network and can send signals to processes of the same user"
        )
    if hello["landlock"]:
        facts.append("Landlock: files other than Python's and its own folder are out of reach")
    else:
        weaker.append("no Landlock: programs read what this user can read and write where this user can write")
    if spare is not None:
        facts.append("a user id of its own")
    elif rules.may_fork:
        weaker.append("programs run as this user, whose other processes count towards the limit on processes")
    else:
        weaker.append("programs run as root without capabilities, and may start neither processes nor threads")
    return Launch("limits", rules, spare, tuple(facts), tuple(weaker))


def _limits_rules(spare: range | None, reads_anything: bool) -> Rules:
    counted = spare is not None or not _is_root_of_machine()
    return _rules(
        namespaces=False, own_user=False, users=None, seccomp=True, landlock=True, readable=tuple(_readable_paths()),
        reads_anything=reads_anything, may_fork=counted,
        other_processes=0 if spare is not None else _own_processes() + 256,
    )  # fmt: skip


def _rules(**rules: Any) -> Rules:
    from polyreward.rewards.sandbox_inside.cell import Rules  # only where there are Unix processes

    return Rules(**rules)


def _greet(launch: Launch) -> dict[str, bool]:
    """Run a program in this way, and return what the worker said of itself."""
    from polyreward.rewards.sandbox_cases import Limits
    from polyreward.rewards.sandbox_driver import Driver, Task
    from polyreward.rewards.sandbox_results import Report

    answers: queue.SimpleQueue[Report | BaseException] = queue.SimpleQueue()
    driver = Driver(launch, 1)
    try:
        limits = Limits(wall_seconds=_START_SECONDS)
        driver.submit([Task("script", b"Cprint(input())", b"ready", limits, answers.put)])
        report = answers.get()
    finally:
        driver.close()
    if isinstance(report, BaseException):
        raise report if isinstance(report, SandboxError) else SandboxError(str(report)) from report
    if report.stdout != b"ready\n":
        reason = report.why or report.stderr.decode(errors="replace").strip() or f"exit status {report.status}"
        raise SandboxError(f"a program did not run: {reason}")
    return {"seccomp": driver.hello[0] == "1", "landlock": driver.hello[1] == "1"}


def _readable_paths() -> list[str]:
    return [*python_paths(), "/usr", "/lib", "/lib64", "/bin", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]


def _readable(paths: Iterable[str]) -> bool:
    """Whether users without rights can read these, where they can get at them."""
    return all(os.stat(path).st_mode & stat.S_IROTH for path in paths)


def _reachable(paths: Iterable[str]) -> bool:
    """Whether users without rights can get at these."""
    return all(folder.stat().st_mode & stat.S_IXOTH for path in paths for folder in Path(path).parents)


def _spare_users() -> range | None:
    """User ids that exist here and that nothing should have."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/uid_map").read_text().splitlines():
            first, _, count = map(int, line.split())
            if count > 1000:
                start = min(first + count - 200, _SPARE_USERS)
                return range(start, min(start + 100_000, first + count - 100))
    return None


def _is_root_of_machine() -> bool:
    """Whether this is the user for whom the kernel does not count processes."""
    if os.geteuid() != 0:
        return False
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/uid_map").read_text().splitlines():
            inside, outside, _ = map(int, line.split())
            if inside == 0:
                return outside == 0
    return True


def _own_processes() -> int:
    """Threads that run under this user's id."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if folder.stat().st_uid == os.getuid():
                total += len(os.listdir(folder / "task"))
    return total
