"""The process of a worker: its command line, its container, and its end."""

from __future__ import annotations

import contextlib
import functools
import json
import marshal
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from polyreward.rewards.sandbox_inside.folders import remove

if TYPE_CHECKING:
    from polyreward.rewards.sandbox_inside.cell import Rules

_CODE = Path(__file__).parent / "sandbox_inside"
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
_ENVIRONMENT |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID", "CAP_SETFCAP", "CAP_KILL")
_PACKAGES = "/packages"
_LEAVE_SECONDS = 5.0
_DEVICES = ("null", "zero", "full", "random", "urandom")
_START = """
import marshal, sys
from importlib.machinery import ModuleSpec
class Modules:
    def __init__(self, codes):
        self.codes = codes
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=name == {package!r}) if name in self.codes else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        exec(self.codes.pop(module.__name__), module.__dict__)
with open({modules}, "rb") as file:
    finder = Modules(marshal.loads(file.read()))
sys.meta_path.insert(0, finder)
from {package}.server import main
sys.meta_path.remove(finder)
main({control}, {folder!r}, {packages!r}, **{rules!r})
"""


def start_container(rules: Rules, spare: int | None, control: socket.socket) -> subprocess.Popen[bytes]:
    """Start a worker in a bubblewrap container that sees Python, /usr and nothing else.

    `spare` and the next number are user ids which become 1 and 2 inside; this user is root there. None: this user has
    none to spare.
    """
    container = [
        shutil.which("bwrap") or "bwrap", "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net",
        "--unshare-uts", "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--hostname", "sandbox",
        "--clearenv", "--cap-drop", "ALL", *_file_system(),
    ]  # fmt: skip
    for name in _CAPABILITIES:
        container += ["--cap-add", name]
    for name, value in _ENVIRONMENT.items():
        container += ["--setenv", name, value]
    with _open_modules() as modules:
        descriptors = control.fileno(), modules.fileno()
        worker = _python(rules, *descriptors, "")
        if spare is None:
            return _popen([*container, *worker], {}, *descriptors)
        return _start_mapped(container, worker, spare, *descriptors)


def start_alone(rules: Rules, control: socket.socket, folder: str) -> subprocess.Popen[bytes]:
    """Start a worker as it is, whose programs have folders in `folder`."""
    with _open_modules() as modules:
        descriptors = control.fileno(), modules.fileno()
        environment = {**_ENVIRONMENT, "HOME": folder, "TMPDIR": folder}
        return _popen(_python(rules, *descriptors, folder), environment, *descriptors)


def end(process: subprocess.Popen[bytes], folder: str | None) -> None:
    """End a worker with all that it started, and remove its folder."""
    if folder:  # without a container the worker itself ends what it started
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            process.terminate()
            process.wait(_LEAVE_SECONDS)
    with contextlib.suppress(OSError):
        process.kill()
    process.wait()
    if process.stderr:
        process.stderr.close()
    if folder:
        _sweep(folder)
        remove(folder)


def _sweep(folder: str) -> None:
    """Kill what a worker left that was itself killed: its copies, whose command line has its folder."""
    for _ in range(100):
        found = False
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if folder.encode() in entry.read_bytes():
                    os.kill(int(entry.parent.name), signal.SIGKILL)
                    found = True
        if not found:
            return
        time.sleep(0.002)


def package_paths() -> list[str]:
    """Folders of installed packages, which programs may import."""
    paths = dict.fromkeys(os.path.realpath(sysconfig.get_path(kind)) for kind in ("purelib", "platlib"))
    return [path for path in paths if os.path.isdir(path)]


def python_paths() -> list[str]:
    """The interpreter, its standard library, installed packages, and the folder with its shared library."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    native = os.path.join(sys.base_exec_prefix, sys.platlibdir, version)  # in a virtual environment not "platstdlib"
    paths = [_interpreter(), sysconfig.get_path("stdlib"), native, sysconfig.get_config_var("LIBDIR"), *package_paths()]
    found: list[str] = []
    for path in sorted({os.path.realpath(path) for path in paths if path and os.path.exists(path)}, key=len):
        if not any(path.startswith(f"{known}/") for known in found):
            found.append(path)
    return found


def _file_system() -> list[str]:
    """What a container sees, as arguments of bubblewrap."""
    arguments = ["--ro-bind", "/usr", "/usr"]
    for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", path, path]
    packages = package_paths()
    arguments += ["--dir", _PACKAGES]  # what bubblewrap makes by itself, only root can pass
    for number, path in enumerate(packages):  # not in their own place: it may lie under /tmp, which programs replace
        arguments += ["--ro-bind", path, f"{_PACKAGES}/{number}"]
    for path in python_paths():
        if not path.startswith("/usr/") and path not in packages:
            for parent in [*reversed(Path(path).parents)][1:]:
                arguments += ["--dir", str(parent)]
            arguments += ["--ro-bind", path, path]
    for folder in ("/tmp", "/etc", "/dev"):
        arguments += ["--dir", folder]
    for device in _DEVICES:
        arguments += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    arguments += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--proc", "/proc"]
    return [*arguments, "--remount-ro", "/", "--chdir", "/"]


def _start_mapped(container: list[str], worker: list[str], spare: int, *descriptors: int) -> subprocess.Popen[bytes]:
    """Start a container that waits until its user ids are mapped, and map them."""
    info, info_there = os.pipe()
    gate_there, gate = os.pipe()
    try:
        mapped = ["--uid", "0", "--gid", "0", "--info-fd", str(info_there), "--userns-block-fd", str(gate_there)]
        process = _popen([*container, *mapped, *worker], {}, *descriptors, info_there, gate_there)
        os.close(info_there)
        info_there = -1
        text = b""
        while b"}" not in text and (piece := os.read(info, 4096)):
            text += piece
        try:
            child = json.loads(text)["child-pid"]
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{child}/{name}").write_text(f"0 {os.geteuid()} 1\n1 {spare} 2\n")
        except (ValueError, OSError) as error:
            reason = process.stderr.read().decode(errors="replace").strip() if process.stderr and not text else ""
            end(process, None)
            raise OSError(reason or f"no user ids to spare: {error}") from error
        os.write(gate, b"1")
    finally:
        for descriptor in (info, info_there, gate, gate_there):
            if descriptor >= 0:
                os.close(descriptor)
    return process


def _python(rules: Rules, control: int, modules: int, folder: str) -> list[str]:
    """The command of a worker; it reads its modules from the open file `modules`."""
    packages = package_paths()
    if rules.namespaces:
        packages = [f"{_PACKAGES}/{number}" for number in range(len(packages))]
    code = _START.format(
        package=_CODE.name, modules=modules, control=control, folder=folder, packages=packages, rules=vars(rules)
    )
    return [_interpreter(), "-s", "-S", "-P", "-B", "-c", code]


def _open_modules() -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    file.write(_modules())
    file.seek(0)
    return file


@functools.cache
def _modules() -> bytes:
    """The modules that run in a worker, compiled.

    A worker loads them from this and not from their sources, as the parser would leave memory behind, and the process
    of every program is a copy of the worker's.
    """
    codes = {}
    for path in sorted(_CODE.glob("*.py")):
        name = _CODE.name if path.stem == "__init__" else f"{_CODE.name}.{path.stem}"
        codes[name] = compile(path.read_bytes(), f"{_CODE.name}/{path.name}", "exec", dont_inherit=True, optimize=2)
    return marshal.dumps(codes)


def _popen(command: list[str], environment: dict[str, str], *descriptors: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment,
        pass_fds=descriptors, start_new_session=True, cwd="/",
    )  # fmt: skip


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))
