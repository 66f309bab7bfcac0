r"""Unit tests as a reward: programs that a model wrote, run in the sandbox against the tests of the data set.

The column ``tests`` holds, for each row, a list of tests in any mixture of these forms, or JSON text of it:

    "assert f(2) == 3"                                         Python that raises where the program is wrong
    {"code": "def check(candidate): ...", "entry_point": "f"}  the form of HumanEval
    {"stdin": "1 2\n", "stdout": "3\n"}                        a script that reads and prints
    {"inputs": ["1 2", "3 4"], "outputs": ["3", "7"]}          many of these, as in TACO and APPS

with ``name`` and ``tier`` where wanted; ``input`` and ``output`` are read like ``stdin`` and ``stdout``. All programs
of a batch run in one call of the sandbox. Two rewards that want the same programs run in the same batch, such as
`UnitTestReward` beside `VeRPOReward`, run them once.
"""

from __future__ import annotations

import json
import re
import textwrap
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.rewards.contract import Reward, Sample
from polyreward.rewards.execution import AssertTest, Limits, OutputTest, Program, ProgramResult, Sandbox, shared_sandbox

Compare = Literal["lines", "tokens", "exact"]
Extract = Literal["code", "first_code", "text"]
EXTRACTS = ("code", "first_code", "text")
COMPARES = ("lines", "tokens", "exact")
_ALIASES = {"python": ("python", "python3", "py", "")}
_FENCE = re.compile(r"(`{3,})[ \t]*([^\s`]*)([^\n`]*)")


def code_of(text: str, language: str = "python", which: Literal["last", "first"] = "last") -> str:
    """The code in the last (or first) closed block of at least three backticks; "" where there is none.

    A block of another language does not count, one without a language does. ``py`` and ``python3`` are Python. A block
    begins at the end of a line, and ends with as many backticks that begin or end one.
    """
    wanted, found = _ALIASES.get(language, (language, "")), ""
    opened: re.Match[str] | None = None
    for mark in _FENCE.finditer(text):
        if opened is None:
            opened = mark if text[mark.end() : mark.end() + 1] == "\n" else None
            continue
        begins = not text[text.rfind("\n", 0, mark.start()) + 1 : mark.start()].strip()
        ends = not mark[2] and not mark[3].strip() and text[mark.end() : mark.end() + 1] in ("", "\n")
        if len(mark[1]) >= len(opened[1]) and (begins or ends):
            if opened[2].lower() in wanted:
                found = textwrap.dedent(text[opened.end() + 1 : mark.start()])
                if which == "first":
                    break
            opened = None
    return found


@dataclass(frozen=True)
class SuiteTest:
    """A test, and its tier where the data set gives one."""

    __test__ = False

    test: OutputTest | AssertTest
    tier: str | None = None


def tests_of(reference: Any, compare: Compare = "lines") -> tuple[SuiteTest, ...]:  # noqa: PT028 - no test
    """The tests that a reference holds, in order; the forms are those of the module.

    Parameters
    ----------
    reference : list, mapping, text of one test, or JSON text
    compare : how printed output is compared: "lines", "tokens" or "exact"

    Raises
    ------
    InvalidInputError
        Nothing that reads as a test, a test that is no Python, inputs and outputs of different number, or no test at
        all; the message names the place of the test.
    """
    if isinstance(reference, str):
        reference = _from_text(reference)
    entries = reference if isinstance(reference, list | tuple) else [reference]
    found = [test for place, entry in enumerate(entries) for test in _entry(entry, place, compare)]
    if not found:
        raise InvalidInputError("there is no test; expected at least one")
    return tuple(found)


tests_of.__test__ = False  # type: ignore[attr-defined]  # not a test, though pytest would think so by its name


def _from_text(text: str) -> Any:
    if text.lstrip()[:1] not in ("[", "{"):
        return [text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"the tests are no JSON: {error}") from None


def _entry(entry: Any, place: int, compare: Compare) -> list[SuiteTest]:
    if isinstance(entry, str) and entry.lstrip().startswith("{"):  # as Python it would be a dict, which always passes
        entry = _from_text(entry)
    if isinstance(entry, str):
        return [SuiteTest(_asserts(entry, place))]
    if not isinstance(entry, Mapping):
        raise InvalidInputError(f"test {place} is {type(entry).__name__}, expected a text or an object")
    entry = {key: value for key, value in entry.items() if value is not None}  # Arrow fills absent keys with None
    name, tier = (_text_or_none(entry, key, place) for key in ("name", "tier"))
    tier = tier if "tier" in entry else _text_or_none(entry, "label", place)
    if "fn_name" in entry:
        raise InvalidInputError(f"test {place} calls a function by 'fn_name'; write it as an assert")
    if "code" in entry:
        code = _text(entry, "code", place)
        return [SuiteTest(_asserts(code, place, name, _text_or_none(entry, "entry_point", place)), tier)]
    for given, expected in (("stdin", "stdout"), ("input", "output")):
        if expected in entry:
            shown = _text(entry, given, place) if given in entry else ""
            return [SuiteTest(OutputTest(shown, _text(entry, expected, place), compare, name), tier)]
    if "inputs" in entry and "outputs" in entry:
        many = [entry["inputs"], entry["outputs"]]
        if not all(isinstance(texts, list | tuple) and all(isinstance(t, str) for t in texts) for texts in many):
            raise InvalidInputError(f"test {place}: 'inputs' and 'outputs' must be lists of texts")
        if len(many[0]) != len(many[1]):
            raise InvalidInputError(f"test {place} has {len(many[0])} inputs and {len(many[1])} outputs")
        return [SuiteTest(OutputTest(given, wanted, compare, name), tier) for given, wanted in zip(*many, strict=True)]
    raise InvalidInputError(
        f"test {place} has the keys {', '.join(map(repr, entry)) or 'none'}; expected 'stdout' (with 'stdin'), "
        "'inputs' and 'outputs', or 'code'"
    )


def _text(entry: Mapping[str, Any], key: str, place: int) -> str:
    if not isinstance(entry[key], str):
        raise InvalidInputError(f"test {place}: {key!r} is {type(entry[key]).__name__}, expected a text")
    return str(entry[key])


def _text_or_none(entry: Mapping[str, Any], key: str, place: int) -> str | None:
    return _text(entry, key, place) if key in entry else None


def _asserts(code: str, place: int, name: str | None = None, entry_point: str | None = None) -> AssertTest:
    if not code.strip():
        raise InvalidInputError(f"test {place} is empty")
    try:
        return AssertTest(code, name, entry_point)
    except InvalidInputError as error:
        raise InvalidInputError(f"test {place}: {error}") from None


@dataclass(frozen=True)
class SuiteRun:
    """What one completion did on its tests.

    Attributes
    ----------
    tests : U tests
    passed : bool (U,), by the first run
    stopped : bool (U,)
        Tests that ended the program from outside: over the time or the memory.
    stable : bool (U,)
        False where repeated runs disagree.
    """

    tests: tuple[SuiteTest, ...]
    passed: np.ndarray
    stopped: np.ndarray
    stable: np.ndarray


@dataclass(frozen=True)
class UnitTests:
    """How the programs of a batch are found, and run on the tests of their column; rewards from unit tests share it.

    Parameters are those of `UnitTestReward`; `repeats` is the number of runs of every program.
    """

    column: str = "tests"
    extract: Extract = "code"
    compare: Compare = "lines"
    limits: Limits | Mapping[str, Any] | None = None
    repeats: int = 1
    sandbox: Sandbox | None = None

    def suites(self, reward: Reward, samples: Sequence[Sample]) -> list[tuple[SuiteTest, ...]]:
        """Tests of each sample; ``reward.refuse`` where the reference holds none that can be used."""
        known: dict[tuple[bool, str], tuple[SuiteTest, ...]] = {}
        found = []
        for sample in samples:
            reference = sample.columns[self.column]
            key = (True, reference) if isinstance(reference, str) else (False, repr(reference))
            if key not in known:
                try:
                    known[key] = tests_of(reference, self.compare)
                except InvalidInputError as error:
                    raise reward.refuse(sample, self.column, str(error)) from None
            found.append(known[key])
        return found

    def program(self, text: str) -> str:
        """The program that a completion holds; "" where there is none."""
        if self.extract == "text":
            return text
        return code_of(text, which="last" if self.extract == "code" else "first")

    def run(self, samples: Sequence[Sample], suites: Sequence[tuple[SuiteTest, ...]]) -> list[SuiteRun]:
        """Run the program of each sample on its tests, equal ones once, all in one call; no program passes no test."""
        codes = [self.program(sample.text) for sample in samples]
        limits = limits_of(self.limits)
        programs = [
            Program(code, tuple(entry.test for entry in suite), limits) if code.strip() and suite else None
            for code, suite in zip(codes, suites, strict=True)
        ]
        place = {program: at for at, program in enumerate(dict.fromkeys(filter(None, programs)))}
        results = _executed([*place] * self.repeats, self.sandbox)
        runs = []
        for program, suite in zip(programs, suites, strict=True):
            if program is None:
                nothing = np.zeros(len(suite), dtype=bool)
                runs.append(SuiteRun(suite, nothing, nothing, ~nothing))
                continue
            each = results[place[program] :: len(place)]
            passes = np.array([result.passed for result in each])
            stopped = np.array([test.status in ("timeout", "memory") for test in each[0].tests])
            runs.append(SuiteRun(suite, passes[0], stopped, (passes == passes[0]).all(axis=0)))
        return runs


def limits_of(limits: Limits | Mapping[str, Any] | None) -> Limits | None:
    """Limits from a recipe's table or as they are.

    Raises
    ------
    UnknownNameError
        A limit that does not exist.
    """
    if limits is None or isinstance(limits, Limits):
        return limits
    known = [item.name for item in fields(Limits)]
    for name in limits:
        if name not in known:
            raise UnknownNameError(f"there is no limit {name!r}{nearest(str(name), known)}")
    return Limits(**limits)


def check_options(reward: Any) -> None:
    """Refuse options of a reward from unit tests that cannot be used; limits become `Limits`."""
    if reward.extract not in EXTRACTS:
        raise InvalidInputError(f"extract must be one of {', '.join(EXTRACTS)}, got {reward.extract!r}")
    if reward.compare not in COMPARES:
        raise InvalidInputError(f"compare must be one of {', '.join(COMPARES)}, got {reward.compare!r}")
    repeats = getattr(reward, "repeats", 1)
    if not isinstance(repeats, int) or repeats < 1:
        raise InvalidInputError(f"repeats must be a whole number of at least 1, got {repeats!r}")
    object.__setattr__(reward, "limits", limits_of(reward.limits))


def without_sandbox(reward: Any) -> dict[str, Any]:
    """The state of a reward for pickling; a worker makes a sandbox of its own."""
    return {**reward.__dict__, "sandbox": None}


@dataclass(frozen=True)
class UnitTestReward(Reward):
    """1 where the program passes every test of its row (HumanEval's pass@1, arXiv 2107.03374), or the share it passes.

    Parameters
    ----------
    column : str
        Column of tests, in the forms of this module.
    extract : "code", "first_code" or "text"
        Where the program is: the last or the first fenced block of Python, or the whole completion.
    mode : "all" or "fraction"
    compare : "lines", "tokens" or "exact"
        How printed output is compared.
    limits : Limits, mapping of their names, or None for those of the sandbox
        Of one test.
    sandbox : Sandbox or None
        None: the one that the process shares. It is not pickled; a worker uses its own.

    Range [0, 1]. A completion without a program earns 0. Does not apply where the tests are None.

    Raises
    ------
    InvalidInputError
        An unknown option; at a call, tests that cannot be used, named by column and row.
    """

    column: str = "tests"
    extract: Extract = "code"
    mode: Literal["all", "fraction"] = "all"
    compare: Compare = "lines"
    limits: Limits | Mapping[str, Any] | None = None
    sandbox: Sandbox | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_options(self)
        if self.mode not in ("all", "fraction"):
            raise InvalidInputError(f"mode must be 'all' or 'fraction', got {self.mode!r}")

    def __getstate__(self) -> dict[str, Any]:
        return without_sandbox(self)

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of tests."""
        return (self.column,)

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion; every program runs in one call of the sandbox."""
        samples = list(self.samples(prompts, completions, columns))
        runner = UnitTests(self.column, self.extract, self.compare, self.limits, sandbox=self.sandbox)
        values: list[float | None] = [None] * len(completions)
        for sample, run in zip(samples, runner.run(samples, runner.suites(self, samples)), strict=True):
            values[sample.row] = float(run.passed.all() if self.mode == "all" else run.passed.mean())
        return values


class _Latest:
    """Programs of the latest batch and their results, for the next reward of the same batch."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.key: tuple[Sandbox | None, tuple[Program, ...]] | None = None
        self.results: list[ProgramResult] = []


_latest = _Latest()


def _executed(programs: Sequence[Program], sandbox: Sandbox | None) -> list[ProgramResult]:
    if not programs:
        return []
    key = (sandbox, tuple(programs))
    with _latest.lock:
        if _latest.key == key:
            return _latest.results
    results = (sandbox or shared_sandbox()).run(programs)
    with _latest.lock:
        _latest.key, _latest.results = key, results
    return results
