"""A seccomp filter: which system calls a program may not make.

The filter is a binary decision over the number of the system call, written as BPF by hand. What is denied returns
EPERM; `clone3` and numbers which this table does not know return ENOSYS, for which the C library has a fallback.
"""

from __future__ import annotations

import ctypes
import struct

from . import kernel

#: name -> number on x86_64, on aarch64 (None: does not exist there)
DENIED: dict[str, tuple[int | None, int | None]] = {
    # the network; socketpair stays, for asyncio's own use
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "bind": (49, 200), "listen": (50, 201),
    "accept4": (288, 242),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # memory outside the limits: shared memory, queues, files without a folder
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193),
    "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "userfaultfd": (323, 282), "mbind": (237, 235), "set_mempolicy": (238, 237),
    # the kernel
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280),
    "perf_event_open": (298, 241), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None), "uselib": (134, None), "ustat": (136, None), "_sysctl": (156, None),
    "syslog": (103, 116), "vhangup": (153, 58), "personality": (135, 92), "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    # settings of other processes of the same user
    "setpriority": (141, 140), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "sched_setaffinity": (203, 122), "ioprio_set": (251, 30),
}  # fmt: skip

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE, _CLONE3, _SOCKETPAIR, _IOCTL, _PRLIMIT = (56, 220), 435, (53, 199), (16, 29), (302, 261)
_FORK, _VFORK = (57, None), (58, None)
_KILL, _TKILL, _TGKILL, _QUEUE, _TGQUEUE, _PIDFD_KILL = (62, 129), (200, 130), (234, 131), (129, 138), (297, 240), 424
_LAST_KNOWN = 450
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NEW_NAMESPACES = 0x7E020080  # CLONE_NEW* of every kind
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_LOAD, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06

Instruction = tuple[int, int, int, int]


def available() -> bool:
    """Whether a filter can be written for this machine."""
    return kernel.MACHINE in _ARCHITECTURES


def build(own_process: int | None = None) -> bytes:
    """The filter of a process that runs programs.

    With `own_process` signals go to that process alone, which matters where processes share a user and a PID
    namespace with others.
    """
    column = _ARCHITECTURES[kernel.MACHINE][0]
    special = [
        (_CLONE3, _deny(_ENOSYS)),
        (_CLONE[column], _argument(0, _JSET, _NEW_NAMESPACES, _deny(), _allow())),
        (_PRLIMIT[column], _argument(0, _JEQ, 0, _allow(), _deny())),  # its own limits
        (_SOCKETPAIR[column], _argument(0, _JEQ, 1, _allow(), _deny())),
        (_IOCTL[column], _argument(1, _JEQ, _TIOCSTI, _deny(), _argument(1, _JEQ, _TIOCLINUX, _deny(), _allow()))),
    ]
    if own_process is not None:
        mine = _argument(0, _JEQ, own_process, _allow(), _deny())
        special += [(call[column], mine) for call in (_KILL, _TGKILL, _QUEUE, _TGQUEUE)]
        special += [(_TKILL[column], _deny()), (_PIDFD_KILL, _deny())]
    rules = {number: _deny() for row in DENIED.values() if (number := row[column]) is not None}
    return _assemble({**rules, **dict(special)})


def build_alone() -> bytes:
    """A further filter, with which a process starts neither processes nor threads."""
    column = _ARCHITECTURES[kernel.MACHINE][0]
    calls = (_CLONE[column], _FORK[column], _VFORK[column])
    return _assemble({number: _deny() for number in calls if number is not None})


def install(program: bytes) -> None:
    """Put a filter in force for the process and all that it starts. It cannot be taken back."""
    buffer = ctypes.create_string_buffer(program, len(program))
    head = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer)))
    kernel.prctl(kernel.PR_SET_SECCOMP, 2, ctypes.addressof(head))


def _assemble(rules: dict[int, list[Instruction]]) -> bytes:
    """The filter as bytes, from what happens to each number; all others up to the last known are allowed."""
    architecture = _ARCHITECTURES[kernel.MACHINE][1]
    bounds: list[tuple[int, list[Instruction]]] = [(0, _allow())]
    for number in sorted(rules):
        if bounds[-1][0] == number:
            bounds.pop()
        bounds += [(number, rules[number]), (number + 1, _allow())]
    bounds.append((_LAST_KNOWN + 1, _deny(_ENOSYS)))
    code = [
        (_LOAD, 0, 0, 4), (_JEQ, 1, 0, architecture), (_RETURN, 0, 0, _KILL_PROCESS), (_LOAD, 0, 0, 0), *_tree(bounds)
    ]  # fmt: skip
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _tree(bounds: list[tuple[int, list[Instruction]]]) -> list[Instruction]:
    """A binary decision: each of `bounds` is the first number of a range, and what happens to numbers of that range."""
    if len(bounds) == 1:
        return bounds[0][1]
    middle = len(bounds) // 2
    left, right = _tree(bounds[:middle]), _tree(bounds[middle:])
    if len(left) > 255:  # a conditional jump is one byte wide
        return [(_JGE, 0, 1, bounds[middle][0]), (0x05, 0, 0, len(left)), *left, *right]
    return [(_JGE, len(left), 0, bounds[middle][0]), *left, *right]


def _argument(
    index: int, test: int, value: int, then: list[Instruction], otherwise: list[Instruction]
) -> list[Instruction]:
    """Decide on the lower half of an argument, which is where flags, process numbers and families are."""
    return [(_LOAD, 0, 0, 16 + 8 * index), (test, 0, len(then), value), *then, *otherwise]


def _allow() -> list[Instruction]:
    return [(_RETURN, 0, 0, _ALLOW)]


def _deny(number: int = _EPERM) -> list[Instruction]:
    return [(_RETURN, 0, 0, _ERRNO | number)]
