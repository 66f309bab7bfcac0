"""Programs that try to pass without solving the task, to outlive their limits, or to harm the machine. None may."""

import contextlib
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from polyreward.rewards.execution import (
    AssertTest,
    Limits,
    OutputTest,
    Program,
    ProgramResult,
    Sandbox,
    SandboxError,
    Script,
)

LIMITS = Limits(wall_seconds=0.5, memory_mb=200, output_bytes=1 << 16, processes=8, file_bytes=1 << 20)
#: The expected values are nowhere else, so that a program which finds one has broken in.
SECRET = 918273645546372819
CALLED = AssertTest(f"assert f(2) == {SECRET}")
CHECKED = AssertTest(f"def check(candidate):\n    assert candidate(2) == {SECRET}", entry_point="f")
#: In a process of its own, as an import of sys may leave something behind.
APART = AssertTest(f"import sys\nassert f(2) == {SECRET}")
PRINTED = OutputTest(stdin="2\n", stdout=f"{SECRET}\n")
TESTS = (CALLED, CHECKED, APART, PRINTED)
ONE, BOTH = (CALLED,), (CALLED, PRINTED)

HONEST = Program(
    "def f(x):\n    return x * 2\nif __name__ == '__main__':\n    print(f(int(input())))",
    (
        AssertTest("assert f(2) == 4"),
        AssertTest("import sys\nassert f(2) == 4"),
        OutputTest("2", "4"),
    ),
    Limits(wall_seconds=20),
)


@pytest.fixture(scope="module", params=["bubblewrap", "limits"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = Sandbox(workers=1, limits=LIMITS, isolation=request.param)
        except SandboxError as error:
            pytest.skip(str(error))
    with made:
        yield made


@pytest.fixture
def confined(sandbox: Sandbox) -> Sandbox:
    if sandbox.isolation != "bubblewrap":
        pytest.skip("needs namespaces")
    return sandbox


def remaining(sandbox: Sandbox) -> list[psutil.Process]:
    """Processes of programs: what runs below the processes that the sandbox itself consists of."""
    ours = 4 if sandbox.isolation == "bubblewrap" else 1  # bwrap twice, server, cell; server
    found: list[psutil.Process] = []

    def walk(process: psutil.Process, depth: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in process.children():
                if depth >= ours:
                    found.append(child)
                walk(child, depth + 1)

    assert sandbox._driver is not None
    folders = [worker.folder for worker in sandbox._driver.workers if worker.folder]
    for worker in sandbox._driver.workers:
        walk(psutil.Process(worker.process.pid), 1)
    for process in psutil.process_iter():  # what fell to the first process of the machine
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.ppid() == 1 and any(folder in " ".join(process.cmdline()) for folder in folders):
                found.append(process)
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]
    return []


def attack(
    sandbox: Sandbox, code: str, tests: tuple[AssertTest | OutputTest, ...] = TESTS, limits: Limits | None = None
) -> ProgramResult:
    """Run a program that must not pass; nothing of it may remain, and the next program must run as ever."""
    (result,) = sandbox.run([Program(code, tests, limits)])
    assert not result.passed.any(), result
    assert not remaining(sandbox)
    for honest in sandbox.run([HONEST] * 2):
        assert honest.all_passed, honest
    return result


def statuses(result: ProgramResult) -> set[str]:
    return {test.status for test in result.tests}


def printed(sandbox: Sandbox, code: str, limits: Limits | None = None) -> str:
    """What a script prints; it must end well."""
    (result,) = sandbox.execute([Script(code, limits=limits or Limits(wall_seconds=20))])
    assert (result.status, result.exit_code) == ("finished", 0), result
    assert not remaining(sandbox)
    return result.stdout


# ---- ending early

ENDINGS = {
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "SystemExit": "raise SystemExit",
    "SystemExit 0": "raise SystemExit(0)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "GeneratorExit": "raise GeneratorExit",
    "quit": "quit()",
    "exit in a call": "import os\ndef f(x):\n    os._exit(0)\nif __name__ == '__main__':\n    f(2)",
    "sys.exit in a call": "import sys\ndef f(x):\n    sys.exit(0)\nif __name__ == '__main__':\n    f(2)",
    "an exit that is an error": "class E(ValueError, SystemExit):\n    code = 0\ndef f(x):\n    raise E(0)\n",
    "an exit by other names": "class AssertionError(SystemExit):\n    pass\ndef f(x):\n    raise AssertionError(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x):\n    raise SystemExit\nprint(1)",
    "kills itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "aborts": "import os\nos.abort()",
    "stops itself in C": "import ctypes\nctypes.string_at(0)",
    "syntax": "def f(x: return",
    "null": "f = 1\x00",
    "empty": "",
}


@pytest.mark.parametrize("name", ENDINGS)
def test_ending_early_is_no_success(sandbox: Sandbox, name: str) -> None:
    result = attack(sandbox, ENDINGS[name])
    assert statuses(result) <= {"error", "failed"}
    assert result.tests[0].status == "error"


# ---- using up what there is

LOOPS = {
    "loop": "while True:\n    pass",
    "loop in a call": "def f(x):\n    while True:\n        pass\nif __name__ == '__main__':\n    f(1)",
    "loop in C": "sum(range(10 ** 15))",
    "regular expression": "import re\nre.match(r'(a+)+b', 'a' * 60)",
    "large power": "x = 7 ** (10 ** 9)",
    "sleep": "import time\ntime.sleep(10 ** 6)",
    "waits for a signal": "import signal\nsignal.pause()",
    "catches signals": (
        "import signal\nfor number in range(1, 65):\n    try:\n        signal.signal(number, lambda *_: None)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    try:\n        while True:\n"
        "            pass\n"
        "    except BaseException:\n        pass"
    ),
    "reads standard input for ever": "import sys\nwhile True:\n    sys.stdin.read()",
    "waits for a lock": "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()",
    "a thread that outlives it": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(10 ** 6,)).start()\n"
        "def f(x):\n    time.sleep(10 ** 6)"
    ),
    "settrace": "import sys\ndef trace(*_):\n    return trace\nsys.settrace(trace)\nwhile True:\n    x = 1",
    "faulthandler": "import faulthandler\nfaulthandler.dump_traceback_later(0.01, repeat=True)\nwhile True:\n    pass",
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_program_that_does_not_end_is_a_timeout(sandbox: Sandbox, name: str) -> None:
    limits = Limits(wall_seconds=0.3, memory_mb=200)
    assert statuses(attack(sandbox, LOOPS[name], BOTH, limits)) == {"timeout"}


def test_cpu_time_is_counted_over_all_processes(sandbox: Sandbox) -> None:
    code = "import threading\ndef burn():\n    while True:\n        pass\nthreading.Thread(target=burn).start()\nburn()"
    result = attack(sandbox, code, ONE, Limits(wall_seconds=30, cpu_seconds=0.3))
    assert result.tests[0].status == "timeout"
    assert "CPU" in result.tests[0].message


MEMORY = {
    "bytes": "x = bytearray(1 << 40)",
    "bytes that are used": "x = []\nwhile True:\n    x.append(b'x' * (1 << 20))",
    "list": "x = [0]\nwhile True:\n    x += x",
    "text": "x = 'x'\nwhile True:\n    x += x",
    "integer": "x = 1 << (1 << 40)",
    "mappings": "import mmap\nx = []\nwhile True:\n    x.append(mmap.mmap(-1, 1 << 20))\n",
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_bounded(sandbox: Sandbox, name: str) -> None:
    result = attack(sandbox, MEMORY[name], BOTH, Limits(wall_seconds=20, memory_mb=64))
    assert statuses(result) <= {"memory", "error"}
    if name != "mappings":
        assert statuses(result) == {"memory"}


def test_memory_of_children_counts(confined: Sandbox) -> None:
    code = (
        "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        x = b'x' * (40 << 20)\n"
        "        time.sleep(60)\ntime.sleep(60)"
    )
    result = attack(confined, code, ONE, Limits(wall_seconds=30, memory_mb=64, processes=10))
    assert result.tests[0].status == "memory"


def test_recursion_is_an_error(sandbox: Sandbox) -> None:
    limits = Limits(wall_seconds=20, memory_mb=64)
    code = (
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x):\n    return f(x)\nif __name__ == '__main__':\n    f(1)"
    )
    assert statuses(attack(sandbox, code, BOTH, limits)) <= {"error", "memory"}
    assert statuses(attack(sandbox, "def f(x):\n    return f(x)\nf(1)", BOTH, limits)) == {"error"}


OUTPUTS = {
    "print": "while True:\n    print('x' * 1000)",
    "standard error": "import sys\nwhile True:\n    sys.stderr.write('x' * 1000)",
    "descriptor": "import os\nwhile True:\n    os.write(1, b'x' * 65536)",
    "a child's": "import os\nos.fork()\nwhile True:\n    os.write(1, b'x' * 65536)",
    "one large piece": "import os\nos.write(1, b'x' * (50 << 20))",
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_is_cut(sandbox: Sandbox, name: str) -> None:
    limits = Limits(wall_seconds=20, memory_mb=300, output_bytes=1 << 16, processes=8)
    result = attack(sandbox, OUTPUTS[name], (PRINTED,), limits)
    assert statuses(result) == {"error"}
    (script,) = sandbox.execute([Script(OUTPUTS[name], limits=limits)])
    assert script.status == "killed" or name == "a child's"
    assert len(script.stdout) + len(script.stderr) <= 2 << 16
    assert script.truncated or name == "a child's"


def test_output_of_a_called_program_goes_nowhere(sandbox: Sandbox) -> None:
    code = "def f(x):\n    while True:\n        print('x' * 100000)"
    assert statuses(attack(sandbox, code, ONE)) == {"timeout"}


FILES = {
    "one file": "with open('x', 'wb') as file:\n    while True:\n        file.write(b'x' * 65536)",
    "many files": "for number in range(10 ** 6):\n    open(str(number), 'wb').write(b'x' * 65536)",
    "many empty files": "for number in range(10 ** 7):\n    open(str(number), 'wb').close()",
    "open files": "files = [open('x', 'wb') for _ in range(10 ** 6)]",
    "deep folders": "import os\nfor _ in range(10 ** 6):\n    os.mkdir('x')\n    os.chdir('x')",
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_bounded(sandbox: Sandbox, name: str) -> None:
    limits = Limits(wall_seconds=1.0, memory_mb=200, file_bytes=1 << 20)
    result = attack(sandbox, FILES[name], ONE, limits)
    assert statuses(result) <= {"error", "timeout"}
    if sandbox.isolation == "bubblewrap":
        assert statuses(result) == {"error"}


BOMBS = {
    "forks": "import os\nwhile True:\n    os.fork()",
    "forks that catch": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "daemons": (
        "import os, time\nfor _ in range(100):\n    try:\n        if os.fork() == 0:\n            os.setsid()\n"
        "            if os.fork():\n                os._exit(0)\n            time.sleep(10 ** 6)\n    except OSError:\n"
        "        pass\nwhile True:\n    pass"
    ),
    "threads": (
        "import threading, time\nthreading.stack_size(1 << 16)\nwhile True:\n    try:\n"
        "        threading.Thread(target=time.sleep, args=(10 ** 6,)).start()\n    except RuntimeError:\n        pass"
    ),
    "commands": "import subprocess\nwhile True:\n    subprocess.Popen(['/bin/sleep', '1000'])",
}


@pytest.mark.parametrize("name", BOMBS)
def test_processes_are_bounded(sandbox: Sandbox, name: str) -> None:
    assert statuses(attack(sandbox, BOMBS[name], BOTH)) <= {"error", "timeout", "memory"}


def test_a_daemon_does_not_outlive_its_program(sandbox: Sandbox) -> None:
    code = (
        "import os, time\ndef f(x):\n    return 4\ntry:\n    if os.fork() == 0:\n        os.setsid()\n"
        "        if os.fork():\n"
        "            os._exit(0)\n        time.sleep(10 ** 6)\nexcept OSError:\n    pass\nif __name__ == '__main__':\n"
        "    print(4)"
    )
    tests = (AssertTest("assert f(2) == 4"), OutputTest("", "4"))
    (result,) = sandbox.run([Program(code, tests, Limits(wall_seconds=20))])
    assert result.all_passed  # what it was asked for, it did
    assert not remaining(sandbox)


# ---- looking around

READS = {
    "passwd": "open('/etc/passwd').read()",
    "shadow": "open('/etc/shadow').read()",
    "this file": f"open({__file__!r}).read()",
    "other programs' folders": "import os\nos.listdir('/tmp/..')\nopen('/tmp/../var/log/dpkg.log').read()",
    "processes": "import os\n[int(name) for name in os.listdir('/proc')]\nopen('/proc/1/environ').read()",
    "own memory map": "open('/proc/self/maps').read()",
    "parent's memory": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "descriptors of others": "import os\nos.listdir(f'/proc/{os.getppid()}/fd')",
    "system": "import os\nos.listdir('/sys/kernel')",
    "disk": "open('/dev/sda').read()\n",
    "a link": "import os\nos.symlink('/etc/passwd', 'link')\nopen('link').read()",
    "a hard link": "import os\nos.link('/etc/hostname', 'link')\nopen('link').read()",
    "a way up": "open('../' * 20 + 'etc/passwd').read()",
    "chroot": "import os\nos.chroot('.')\nos.listdir('/')",
}


@pytest.mark.parametrize("name", READS)
def test_files_outside_are_out_of_reach(sandbox: Sandbox, name: str) -> None:
    if sandbox.isolation == "limits" and not any("Landlock" in fact for fact in sandbox.describe()["facts"]):
        pytest.skip("needs Landlock")
    (result,) = sandbox.execute([Script(READS[name], limits=Limits(wall_seconds=20))])
    assert result.exit_code == 1, result
    assert any(kind in result.stderr for kind in ("FileNotFoundError", "PermissionError", "OSError")), result


def test_the_home_folder_is_empty(sandbox: Sandbox) -> None:
    home = str(Path.home())
    code = f"import os\ntry:\n    print(os.listdir({home!r}))\nexcept OSError:\n    print([])"
    for name in eval(printed(sandbox, code)):  # a Python installation in the home folder is all there can be
        assert sys.base_prefix.startswith(f"{home}/{name}")


WRITES = ["/etc/x", "/usr/x", "/x", "/dev/x", "/sandbox/x", "/proc/x", "/dev/shm/x", "/var/tmp/x", sys.prefix + "/x"]


@pytest.mark.parametrize("path", WRITES)
def test_nothing_is_written_outside(sandbox: Sandbox, path: str) -> None:
    if sandbox.isolation == "limits" and not any("Landlock" in fact for fact in sandbox.describe()["facts"]):
        pytest.skip("needs Landlock")
    (result,) = sandbox.execute([Script(f"open({path!r}, 'w').write('x')", limits=Limits(wall_seconds=20))])
    assert result.exit_code == 1, result
    assert not Path(path).exists()


def test_the_environment_is_empty(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", str(SECRET))
    names = printed(sandbox, "import os\nprint(sorted(os.environ))")
    threads = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}  # each 1
    assert set(eval(names)) - threads <= {"HOME", "LANG", "PATH", "PWD", "PYTHONHASHSEED", "TMPDIR", "LC_CTYPE"}
    with Sandbox(workers=1, isolation=sandbox.isolation) as fresh:  # type: ignore[arg-type]
        assert "API_TOKEN" not in printed(fresh, "import os\nprint(dict(os.environ))")


def test_programs_do_not_see_what_others_left(sandbox: Sandbox) -> None:
    code = "import os\nfound = os.listdir('.') + os.listdir(os.environ['TMPDIR'])\nopen('secret', 'w').write('x')\n" \
        "open(os.path.join(os.environ['TMPDIR'], 'secret'), 'w').write('x')\nprint(found)"  # fmt: skip
    for _ in range(6):
        assert "secret" not in printed(sandbox, code)


def test_expected_values_are_nowhere_in_the_programs_process(sandbox: Sandbox) -> None:
    """The program searches every object and all memory that it can read for the value that the tests expect."""
    hidden = 10**18 + 7
    code = """
import ctypes, gc, sys
def f(x):
    start = 10 ** 18
    found, waiting, seen = [], list(gc.get_objects()), set()
    frame = sys._getframe()
    while frame:
        waiting += [dict(frame.f_globals)]
        frame = frame.f_back
    while waiting and len(seen) < 10 ** 6:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if type(thing) is int and start < thing < start + 1000:
            found.append(thing)
        if type(thing) is str and ("100000000000000" in thing or "assert" in thing and "f(2)" in thing):
            found.append(thing)
        waiting += gc.get_referents(thing)
    values = [value for value in found if type(value) is int]
    return values[0] if values else len([text for text in found if "00007" in text])
"""
    tests = tuple(AssertTest(f"{head}assert f(2) == {hidden}") for head in ("", "import sys\n"))
    limits = Limits(wall_seconds=60)
    for _ in range(2):  # the second time in processes that have run these tests before
        (result,) = sandbox.run([Program(code, tests, limits)])
        assert statuses(result) == {"failed"}, result


def test_code_of_other_programs_is_nowhere_in_memory(confined: Sandbox) -> None:
    """A program reads the heap of its process, which is a copy of one from which others were copied before."""
    others = [Program(f"mark = 'a' + 'secret_of_another_{number}'\ndef f(x): return x", ONE) for number in range(4)]
    confined.run(others)
    code = (
        "import ctypes, sys\nlow = min(id(object()) for _ in range(1000)) & ~0xfffff\n"
        "size = 1 << 20\nheap = ctypes.string_at(low, size)\nmark = bytes(reversed(b'_rehtona_fo_terces'))\n"
        "print(mark in heap)"
    )
    (result,) = confined.execute([Script(code, limits=Limits(wall_seconds=20))])
    assert result.stdout.strip() == "False" or result.exit_code == -11, result


# ---- the network and the kernel

CALLS = {
    "socket": "import socket\nsocket.socket()",
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)",
    "name service": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "udp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "abstract socket": "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0polyreward')",
    "raw socket": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "http": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)",
}


@pytest.mark.parametrize("name", CALLS)
def test_there_is_no_network(sandbox: Sandbox, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (result,) = sandbox.execute([Script(CALLS[name].replace("{port}", str(port)), limits=Limits(wall_seconds=20))])
        assert result.exit_code == 1, result
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


KERNEL = {
    "ptrace": ("ptrace", "16, PARENT, 0, 0"),
    "process_vm_readv": ("process_vm_readv", "PARENT, 0, 0, 0, 0, 0"),
    "mount": ("mount", "b'none', b'/tmp', b'tmpfs', 0, 0"),
    "umount": ("umount2", "b'/tmp', 2"),
    "unshare a user namespace": ("unshare", "0x10000000"),
    "unshare a mount namespace": ("unshare", "0x20000"),
    "setns": ("setns", "0, 0"),
    "chroot": ("chroot", "b'/tmp'"),
    "bpf": ("syscall", "NUMBER['bpf'], 0, 0, 0"),
    "userfaultfd": ("syscall", "NUMBER['userfaultfd'], 0"),
    "perf": ("syscall", "NUMBER['perf_event_open'], 0, 0, 0, 0, 0"),
    "keyring": ("syscall", "NUMBER['keyctl'], 0, -3, 0"),
    "io_uring": ("syscall", "425, 8, 0"),
    "clone with namespaces": ("syscall", "NUMBER['clone'], 0x10000011, 0, 0, 0, 0"),
    "shared memory": ("shmget", "0, 4096, 0o1666"),
    "memory file": ("memfd_create", "b'x', 0"),
    "kexec": ("syscall", "NUMBER['kexec_load'], 0, 0, 0, 0"),
    "modules": ("syscall", "NUMBER['init_module'], 0, 0, 0"),
    "handles": ("open_by_handle_at", "-100, 0, 0"),
    "limits of the parent": ("prlimit", "PARENT, 7, b'\\0' * 16, 0"),
    "priority of the parent": ("setpriority", "0, PARENT, 19"),
    "clock": ("clock_settime", "0, b'\\0' * 16"),
    "host name": ("sethostname", "b'x', 1"),
    "x32": ("syscall", "0x40000000 + 41, 2, 1, 0"),
}
NUMBERS = {
    "x86_64": {
        "bpf": 321, "userfaultfd": 323, "perf_event_open": 298, "keyctl": 250, "clone": 56, "kexec_load": 246,
        "init_module": 175,
    },
    "aarch64": {
        "bpf": 280, "userfaultfd": 282, "perf_event_open": 241, "keyctl": 219, "clone": 220, "kexec_load": 104,
        "init_module": 105,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KERNEL)
def test_calls_of_the_kernel_are_refused(sandbox: Sandbox, name: str) -> None:
    if not any("seccomp" in fact for fact in sandbox.describe()["facts"]):
        pytest.skip("needs seccomp")
    function, arguments = KERNEL[name]
    code = (
        f"import ctypes, os\nNUMBER = {NUMBERS.get(os.uname().machine, {})}\nPARENT = os.getppid() or 1\n"
        f"libc = ctypes.CDLL(None, use_errno=True)\nresult = libc.{function}({arguments})\n"
        "print(result, ctypes.get_errno())"
    )
    result, error = printed(sandbox, code).split()
    assert result == "-1"
    assert error in ("1", "38"), error  # EPERM, ENOSYS


def test_signals_do_not_reach_others(sandbox: Sandbox) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as victim:
        code = (
            "import os, signal\nfor pid in (1, os.getppid(), -1, VICTIM):\n    try:\n"
            "        os.kill(pid, signal.SIGKILL)\n"
            "    except OSError as error:\n        pass\nprint('survived')"
        ).replace("VICTIM", str(victim.pid))
        (result,) = sandbox.execute([Script(code, limits=Limits(wall_seconds=20))])
        assert victim.poll() is None
        victim.kill()
    assert result.stdout in ("survived\n", "")
    assert sandbox.run([HONEST])[0].all_passed


def test_a_cell_is_not_weakened_for_the_next_program(confined: Sandbox) -> None:
    code = (
        "import os, resource\ntry:\n    resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))\n"
        "except OSError:\n    pass\n"
        "for folder in ('/tmp', '/tmp/run'):\n    try:\n        os.chmod(folder, 0)\n    except OSError:\n"
        "        pass\n"
        "    try:\n        os.setxattr(folder, 'user.x', b'y')\n    except OSError:\n        pass\n"
        "try:\n    os.sched_setaffinity(1, [0])\nexcept OSError:\n    pass\ndef f(x): return 1"
    )
    for _ in range(3):
        attack(confined, code, ONE)
    assert (
        printed(confined, "import os\nprint(os.listxattr('/tmp'), oct(os.stat('/tmp/run').st_mode)[-3:])") == "[] 777\n"
    )


# ---- changing what judges

PATCHES = {
    "built-ins": (
        "import builtins\nclass Yes:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\n"
        "for name in ('abs', 'len', 'all', 'any', 'isinstance', 'round', 'sorted', 'type'):\n"
        "    setattr(builtins, name, lambda *_, **__: Yes())\nabs = len = all = any = lambda *_: Yes()\n"
        "AssertionError = None\ndef f(x): return Yes()"
    ),
    "import": "import builtins\nbuiltins.__import__ = lambda *_, **__: None\ndef f(x): return 1",
    "unittest and pytest": (
        "import sys, types\nfor name in ('unittest', 'pytest', 'math', 'operator'):\n"
        "    sys.modules[name] = types.ModuleType(name)\ndef f(x): return 1"
    ),
    "the sandbox's modules": (
        "import sys\nfor name, module in list(sys.modules.items()):\n    if 'sandbox' in name:\n"
        "        for key in list(vars(module)):\n            if not key.startswith('__'):\n"
        "                try:\n                    setattr(module, key, lambda *_, **__: ('passed', ''))\n"
        "                except Exception:\n                    pass\ndef f(x): return 1"
    ),
    "exit status": "import sys, os\nos._exit = sys.exit = lambda *_: None\nsys.excepthook = lambda *_: None\n1 / 0",
    "the test file": (
        "import os\nfor name in ('tests.py', 'main.py', '/sandbox/sandbox_inside/grader.py'):\n    try:\n"
        "        open(name, 'w').write('def judge(*_): return (\"passed\", \"\")')\n    except OSError:\n        pass\n"
        "def f(x): return 1"
    ),
    "check": "def check(candidate): pass\ncandidate = None\ndef f(x): return 1",
    "the loader": "__loader__ = None\n__builtins__ = {}\ndef f(x): return 1",
    "settrace": "import sys\nsys.settrace(lambda *_: None)\nsys.setprofile(lambda *_: None)\ndef f(x): return 1",
    "closed streams": "import sys\nsys.stdout.close()\nsys.stderr.close()\nsys.stdin.close()\ndef f(x): return 1",
    "replaced streams": "import sys, io\nsys.stdout = sys.stderr = sys.stdin = io.StringIO()\nprint(4)\n"
    "def f(x): return 1",
    "no streams": "import sys\nsys.stdout = sys.stderr = None\ndef f(x): return 1",
}


@pytest.mark.parametrize("name", PATCHES)
def test_patches_stay_with_the_program(sandbox: Sandbox, name: str) -> None:
    assert statuses(attack(sandbox, PATCHES[name], limits=Limits(wall_seconds=20))) <= {"failed", "error"}


CHANNELS = {
    "garbage everywhere": (
        "import os\nfor number in range(256):\n    try:\n        os.write(number, os.urandom(1000))\n"
        "    except OSError:\n"
        "        pass\ndef f(x): return 1"
    ),
    "a verdict everywhere": (
        "import os\nfor number in range(256):\n    try:\n        os.write(number, b'passed\\n')\n    except OSError:\n"
        "        pass\ndef f(x): return 1"
    ),
    "closes everything": "import os\nos.closerange(0, 256)\ndef f(x): return 1",
    "closes in a call": "import os\ndef f(x):\n    os.closerange(0, 256)\n    return 1",
    "a huge message": (
        "import os\nfor number in range(3, 64):\n    try:\n        os.write(number, (1 << 60).to_bytes(8, 'little'))\n"
        "    except OSError:\n        pass\ndef f(x): return 1"
    ),
    "replies ahead of questions": (
        "import os, struct\nvalue = b't' + struct.pack('<q', 3) + b'i' + struct.pack('<q', 0) + b's'"
        " + struct.pack('<q', 5) + b'value' + b'T'\n"
        "for number in range(3, 64):\n    try:\n        os.write(number, struct.pack('<Q', len(value)) + value)\n"
        "    except OSError:\n        pass\ndef f(x): return 1"
    ),
    "reads the questions": (
        "import os, threading\ndef steal():\n    while True:\n        for number in range(3, 16):\n            try:\n"
        "                os.read(number, 1)\n            except OSError:\n                pass\n"
        "threading.Thread(target=steal, daemon=True).start()\ndef f(x): return 1"
    ),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_the_channel_does_not_lie(sandbox: Sandbox, name: str) -> None:
    assert statuses(attack(sandbox, CHANNELS[name])) <= {"failed", "error", "timeout"}


def test_a_message_that_never_ends_is_a_timeout(sandbox: Sandbox) -> None:
    code = (
        "import os, struct, time\ndef f(x):\n    for number in range(3, 64):\n        try:\n"
        "            os.write(number, struct.pack('<Q', 1 << 20) + b'x')\n        except OSError:\n            pass\n"
        "    time.sleep(10 ** 6)"
    )
    assert statuses(attack(sandbox, code, (CALLED, APART))) <= {"timeout", "error"}


LIES = {
    "equals everything": "class E:\n    def __eq__(self, other): return True\n"
    "    __hash__ = lambda self: 0\ndef f(x): return E()",
    "a number that equals everything": "class E(int):\n    def __eq__(self, other): return True\ndef f(x): return E(1)",
    "a text that equals everything": "class E(str):\n    def __eq__(self, other): return True\ndef f(x): return E('1')",
    "a list that equals everything": "class E(list):\n    def __eq__(self, other): return True\n"
    "def f(x): return E([1])",
    "a liar about its class": (
        "class E:\n    __class__ = int\n    def __eq__(self, other): return True\n    def __int__(self): return 1\n"
        "def f(x): return E()"
    ),
    "a metaclass": (
        "class M(type):\n    def __eq__(self, other): return True\n"
        "    def __instancecheck__(self, other): return True\n"
        "    __hash__ = type.__hash__\nclass E(metaclass=M): pass\ndef f(x): return E"
    ),
    "a function for a class": "class f:\n    def __init__(self, x): pass\n    def __eq__(self, other): return True",
    "reduce": (
        "import os\nclass E:\n    def __reduce__(self): return (os._exit, (0,))\n"
        "    def __getstate__(self): return os._exit(0)\ndef f(x): return E()"
    ),
    "an exception of the tests": "def f(x): raise AssertionError('passed')",
    "a generator": "def f(x):\n    while True:\n        yield x",
    "a coroutine": "async def f(x): return 1",
    "itself": "def f(x): return f",
    "mock": "from unittest.mock import ANY\ndef f(x): return ANY",
}


@pytest.mark.parametrize("name", LIES)
def test_objects_that_lie_fail(sandbox: Sandbox, name: str) -> None:
    result = attack(sandbox, LIES[name], (CALLED, CHECKED, APART), Limits(wall_seconds=20))
    assert statuses(result) <= {"failed", "error"}


COMPARED = {
    "a difference": "assert abs(f(2) - 3.5) < 1e-6",
    "order": "assert 3 <= f(2) <= 4",
    "membership": "assert 3 in f(2)",
    "not equal": "assert not f(2) != 3",
    "a tuple": "assert (f(2), 1) == (3, 1)",
    "a list of results": "assert [f(number) for number in range(3)] == [0, 1, 2]",
    "a set": "assert {f(2)} == {3}",
    "a key": "assert {3: True}[f(2)]",
    "a sum": "assert sum([f(2)]) == 3",
    "identity": "assert f(2) is True",
    "a class": "assert isinstance(f(2), int)",
    "a type": "assert type(f(2)) is int",
    "a sorted list": "assert sorted([f(2), 3]) == [3, 3]",
    "a maximum": "assert max(f(2), 3) == 3 and f(2) == 3",
}
EVIL = """
class Any:
    def __getattr__(self, name): return self
    def __call__(self, *_, **__): return self
def yes(self, *_): return True
def me(self, *_): return self
for name in 'eq lt le gt ge contains bool instancecheck'.split():
    setattr(Any, f'__{name}__', yes)
Any.__ne__ = lambda self, other: False
for name in 'add radd sub rsub mul rmul truediv abs neg getitem enter round'.split():
    setattr(Any, f'__{name}__', me)
Any.__hash__ = lambda self: 3
Any.__float__ = Any.__int__ = Any.__index__ = Any.__len__ = lambda self: 3
Any.__class__ = property(lambda self: int)
Any.__iter__ = lambda self: iter([Any()])
def f(x): return Any()
"""


@pytest.mark.parametrize("name", COMPARED)
def test_an_object_that_agrees_with_everything_agrees_with_nothing(sandbox: Sandbox, name: str) -> None:
    tests = tuple(AssertTest(head + COMPARED[name]) for head in ("", "import sys\n"))
    (result,) = sandbox.run([Program(EVIL, tests, Limits(wall_seconds=20))])
    assert not result.passed.any(), result


def test_values_are_bounded(sandbox: Sandbox) -> None:
    limits = Limits(wall_seconds=20)
    for code in (
        "def f(x):\n    y = []\n    for _ in range(10 ** 5):\n        y = [y]\n    return y",
        "def f(x):\n    return 'x' * (100 << 20)",
        "def f(x):\n    y = []\n    y.append(y)\n    return y",
        "def f(x):\n    y = {}\n    y[1] = y\n    return (y, y)",
        "def f(x):\n    return 10 ** 100000",
    ):
        result = attack(sandbox, code, (CALLED, APART), limits)
        assert statuses(result) <= {"failed", "error", "memory"}


def test_a_program_that_names_a_module_for_a_function_gains_nothing(sandbox: Sandbox) -> None:
    code = "import operator, types\nisclose = types.ModuleType('os')\nfrom operator import truth as f\n"
    attack(sandbox, code, (AssertTest("assert isclose(f(2), 3)"), CALLED))


def test_tests_which_the_program_is_not_asked_by_do_not_change_others(sandbox: Sandbox) -> None:
    """A hostile test runs apart, so that the next test in line is judged as ever."""
    hostile = AssertTest(
        "import builtins, sys\nbuiltins.len = lambda *_: 4\nfor module in list(sys.modules.values()):\n"
        "    if 'grader' in getattr(module, '__name__', ''):\n        module.judge = lambda *_: ('passed', '')"
    )
    judged = AssertTest("assert len([f(2)]) == 4")
    results = sandbox.run([Program("def f(x): return 1", (hostile, judged), Limits(wall_seconds=20))] * 4)
    assert all(not result.passed[1] for result in results)
