"""What the sandbox is given: limits, tests, programs and scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from polyreward.errors import InvalidInputError
from polyreward.rewards.sandbox_tame import is_tame

_LEAST = {"memory_mb": 16, "output_bytes": 1, "processes": 1, "open_files": 16, "file_bytes": 1 << 16}


@dataclass(frozen=True)
class Limits:
    """What one test or one script may use, with all processes that it starts.

    Attributes
    ----------
    wall_seconds : float
        Time from start to end. Time for which the program could have run and the machine gave it no processor does not
        count, up to this limit once more, so that a program is not late because others run beside it.
    cpu_seconds : float or None
        Time on processors, of all processes and threads together. None: as `wall_seconds`.
    memory_mb : float
        MiB for each process and for all of them together.
    output_bytes : int
        Bytes of standard output, and of standard error. A program that writes more is ended.
    processes : int
        Processes and threads, the program itself included.
    open_files : int
        Open files of a process.
    file_bytes : int
        Bytes of one file, and of all files together.

    Raises
    ------
    InvalidInputError
        For a limit that is not a finite number over its least value.

    """

    wall_seconds: float = 5.0
    cpu_seconds: float | None = None
    memory_mb: float = 512
    output_bytes: int = 1 << 20
    processes: int = 32
    open_files: int = 64
    file_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for name in ("wall_seconds", "cpu_seconds", *_LEAST):
            value, least = getattr(self, name), _LEAST.get(name, 0)
            if value is None and name == "cpu_seconds":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < least or value <= 0:
                wanted = f"at least {least}" if least else "over 0"
                raise InvalidInputError(f"Limits: {name} is {value!r}; it must be a finite number, {wanted}")


@dataclass(frozen=True)
class OutputTest:
    """Runs the program as a script; passes where it ends with exit status 0 and prints what is expected.

    The expected text never enters the process of the program.

    Attributes
    ----------
    stdin : str
        Standard input of the program.
    stdout : str
        What it must print.
    compare : "lines", "tokens" or "exact"
        lines: the lines agree one by one without white space around them, and without empty lines at the end; tokens:
        the texts agree once they are split at white space; exact: character by character.
    name : str or None
        Comes back in the result.

    Raises
    ------
    InvalidInputError
        For a text that is none, or an unknown comparison.

    """

    stdin: str = ""
    stdout: str = ""
    compare: Literal["lines", "tokens", "exact"] = "lines"
    name: str | None = None

    def __post_init__(self) -> None:
        if self.compare not in ("lines", "tokens", "exact"):
            raise InvalidInputError(
                f"{_called(self)}: compare is {self.compare!r}; it is one of 'lines', 'tokens' and 'exact'"
            )
        for field_name in ("stdin", "stdout"):
            _demand_text(self, field_name)

    def agrees(self, printed: str) -> bool:
        """Whether a program that printed this passes."""
        if self.compare == "exact":
            return printed == self.stdout
        if self.compare == "tokens":
            return printed.split() == self.stdout.split()
        return _lines(printed) == _lines(self.stdout)


@dataclass(frozen=True)
class AssertTest:
    """Python code with asserts, which runs in a process apart from the program.

    A name which the code neither defines nor finds among the built-ins is looked up in the program. Functions become
    calls of the program, plain data its value, classes and other objects stand-ins. `SystemExit` with a false code,
    as ``unittest.main()`` raises it, passes.

    Attributes
    ----------
    code : str
        The code; its first failed assert is the verdict.
    name : str or None
        Comes back in the result.
    entry_point : str or None
        A function of the program that the code also knows as `candidate`; where the code defines ``check(candidate)``,
        it is called, as in HumanEval.

    Raises
    ------
    InvalidInputError
        For code that does not parse, or an entry point that is no name.

    """

    code: str
    name: str | None = None
    entry_point: str | None = None

    def __post_init__(self) -> None:
        _demand_text(self, "code")
        try:
            is_tame(self.code)
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise InvalidInputError(f"{_called(self)}: its code does not parse: {error}; tests are Python") from None
        if self.entry_point is not None and not (isinstance(self.entry_point, str) and self.entry_point.isidentifier()):
            raise InvalidInputError(
                f"{_called(self)}: entry_point is {self.entry_point!r}; it must be a function's name"
            )


@dataclass(frozen=True)
class Program:
    """A program with its tests.

    Attributes
    ----------
    code : str
        Python code; that it does not parse is an error in each test.
    tests : sequence of OutputTest or AssertTest
        Each runs the program anew.
    limits : Limits or None
        Of each test. None: those of the sandbox.

    """

    code: str
    tests: tuple[OutputTest | AssertTest, ...]
    limits: Limits | None = None

    def __post_init__(self) -> None:
        _demand_text(self, "code")
        object.__setattr__(self, "tests", tuple(self.tests))
        for number, test in enumerate(self.tests):
            if not isinstance(test, OutputTest | AssertTest):
                raise InvalidInputError(
                    f"Program: test {number} is {type(test).__name__}; a test is an OutputTest or an AssertTest"
                )


@dataclass(frozen=True)
class Script:
    """A program to be run without tests.

    Attributes
    ----------
    code : str
        Python code.
    stdin : str
        Standard input.
    arguments : sequence of str
        What ``sys.argv`` has after ``main.py``.
    limits : Limits or None
        None: those of the sandbox.
    files : mapping of str to str
        Texts to write to its folder before it runs, by path in that folder.

    Raises
    ------
    InvalidInputError
        For a path that leads out of the folder, or for what is no text.

    """

    code: str
    stdin: str = ""
    arguments: tuple[str, ...] = ()
    limits: Limits | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _demand_text(self, "code")
        _demand_text(self, "stdin")
        object.__setattr__(self, "arguments", tuple(map(str, self.arguments)))
        for path, text in self.files.items():
            if not path or path.startswith("/") or ".." in path.split("/") or "\0" in path:
                raise InvalidInputError(
                    f"Script: the file {path!r} is not in the script's folder; give a relative path"
                )
            if not isinstance(text, str):
                raise InvalidInputError(f"Script: the file {path!r} is {type(text).__name__}; it must be a text")


def _called(test: OutputTest | AssertTest) -> str:
    return f"{type(test).__name__} {test.name!r}" if test.name else type(test).__name__


def _demand_text(case: OutputTest | AssertTest | Program | Script, name: str) -> None:
    value = getattr(case, name)
    if not isinstance(value, str):
        label = _called(case) if isinstance(case, OutputTest | AssertTest) else type(case).__name__
        raise InvalidInputError(f"{label}: {name} is {type(value).__name__}; it must be a text")


def _lines(text: str) -> list[str]:
    lines = [line.strip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines
