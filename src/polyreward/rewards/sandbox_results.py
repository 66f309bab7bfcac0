"""What the sandbox gives back, and how it follows from what a worker reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from polyreward.rewards.sandbox_cases import AssertTest, OutputTest

TestStatus = Literal["passed", "failed", "error", "timeout", "memory"]
ScriptStatus = Literal["finished", "timeout", "memory", "killed"]
#: Verdicts that tests give.
VERDICTS: tuple[TestStatus, ...] = ("passed", "failed", "error", "memory")
_LONGEST_MESSAGE = 2000
_REASONS = {
    "wall": "over the limit on time",
    "cpu": "over the limit on CPU time",
    "memory": "over the limit on memory",
    "processes": "over the limit on processes",
    "disk": "over the limit on files",
    "output": "over the limit on output",
    "lost": "its worker was lost",
}


@dataclass
class Report:
    """What a worker and the pipes tell of one test or script."""

    why: str | None = None  # what ended it, where it did not end itself: a key of _REASONS or a text
    status: int | None = None  # exit status of the program run as a script, or minus the signal
    seconds: float = 0.0
    cpu: float = 0.0
    stdout: bytes = b""
    stderr: bytes = b""
    verdict: tuple[TestStatus, str] | None = None


@dataclass(frozen=True)
class TestResult:
    """What came of one test.

    Attributes
    ----------
    status : "passed", "failed", "error", "timeout" or "memory"
        failed: an assert, or the output; error: anything else that went wrong, in the program or in the test.
    seconds : float
        Time it took.
    message : str
        Why it did not pass.
    name : str or None
        Name of the test.

    """

    __test__ = False  # for pytest
    status: TestStatus
    seconds: float
    message: str = ""
    name: str | None = None


@dataclass(frozen=True)
class ProgramResult:
    """What came of a program, test by test.

    Attributes
    ----------
    tests : tuple of TestResult
        In the order of the program's tests.
    seconds : float
        Sum over the tests.
    passed : ndarray, bool (tests,)
        Which tests passed.
    all_passed : bool
        Whether there are tests, and all passed.
    pass_rate : float
        Share of tests that passed; 0 without tests.

    """

    tests: tuple[TestResult, ...]
    seconds: float
    passed: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        passed = np.array([test.status == "passed" for test in self.tests], dtype=bool)
        object.__setattr__(self, "passed", passed)

    @property
    def all_passed(self) -> bool:
        """Whether there are tests, and all passed."""
        return bool(self.tests) and bool(self.passed.all())

    @property
    def pass_rate(self) -> float:
        """Share of tests that passed; 0 without tests."""
        return float(self.passed.mean()) if self.tests else 0.0


@dataclass(frozen=True)
class ScriptResult:
    """What came of a script.

    Attributes
    ----------
    status : "finished", "timeout", "memory" or "killed"
        finished: it ended by itself, with whatever exit code; killed: by a signal, or at another limit.
    exit_code : int or None
        Exit status, or minus the signal; None where a limit ended it.
    stdout, stderr : str
        What it printed, as UTF-8.
    seconds : float
        Time it took.
    truncated : bool
        Whether it printed more than the limit, and the rest is lost.

    """

    status: ScriptStatus
    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float
    truncated: bool = False


def tested(test: OutputTest | AssertTest, report: Report) -> TestResult:
    """The result of a test."""
    status, message = _judged(test, report)
    return TestResult(status, report.seconds, message, test.name)


def ran(report: Report) -> ScriptResult:
    """The result of a script."""
    stdout, stderr = _text(report.stdout), _text(report.stderr)
    status: ScriptStatus = "finished"
    code = report.status
    if report.why is not None:
        ended = _ended(report.why)
        status, code = ended if ended in ("timeout", "memory") else "killed", None  # type: ignore[assignment]
    elif code is None or code < 0:
        status = "killed"
    elif code and _last_line(stderr).startswith("MemoryError"):
        status = "memory"
    return ScriptResult(status, code, stdout, stderr, report.seconds, report.why == "output")


def _judged(test: OutputTest | AssertTest, report: Report) -> tuple[TestStatus, str]:
    if report.why is not None:
        return _ended(report.why), _REASONS.get(report.why, report.why)
    if isinstance(test, AssertTest):
        return report.verdict or ("error", "the tests ended without a verdict")
    if report.status != 0:
        last = _last_line(_text(report.stderr))[:_LONGEST_MESSAGE]
        return "memory" if last.startswith("MemoryError") else "error", last or _how(report.status)
    if test.agrees(_text(report.stdout)):
        return "passed", ""
    return "failed", "it printed something else than expected"


def _ended(why: str) -> TestStatus:
    if why in ("wall", "cpu"):
        return "timeout"
    return "memory" if why == "memory" else "error"


def _how(status: int | None) -> str:
    if status is None:
        return "it did not end"
    return f"exit status {status}" if status > 0 else f"killed by signal {-status}"


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")
