"""Rewards for predicting what a program prints, and for filling in its masked lines (CodeBoost, arXiv 2508.05242).

Forward: the completion holds blocks ``answer_stdout`` and ``answer_stderr``. Backward: it holds the masked lines as
``answer_MASKED_LINE_0``, ...; the completed program is run in the sandbox, and what it prints stands in their place.

    fmt = share of the required blocks that are present; 0 earns 0
    c   = 1 where stdout is the true one, up to one newline at its start or end, else 0
    e   = stderr_weight * IoU of the lines of stderr, as multisets
    acc = (c + e) / 2, or c where stderr is not rewarded
    R   = (1 - format_weight) * acc + format_weight * fmt

A perfect answer earns 0.775 with the paper's weights, as in the released code; `rescale` makes it 1. Most programs
print nothing on stderr, so an empty stderr block beside any wrong stdout earns 0.325: `ExecutionReward.silent` is that
floor, to be watched.

Paper: CodeBoost: Boosting Code LLMs by Squeezing Knowledge from Code Snippets with RL (arXiv 2508.05242).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.rewards.contract import Reward, Sample, as_list

if TYPE_CHECKING:
    from polyreward.rewards.execution import Sandbox, ScriptResult

Pick = Literal["last", "first", "released"]
PARTS = ("overall", "format", "accuracy", "stdout", "stderr")
SECONDS = 5.0
"""Time limit of one program in the paper."""


class Runnable(Protocol):
    """A program to run: its code, its input and its arguments."""

    @property
    def code(self) -> str: ...  # noqa: D102
    @property
    def stdin(self) -> str: ...  # noqa: D102
    @property
    def arguments(self) -> Sequence[str]: ...  # noqa: D102


def line_multiset_iou(first: str | Sequence[str], second: str | Sequence[str]) -> float:
    """Lines in common over all lines, both as multisets; in [0, 1], symmetric, blind to order.

    Parameters
    ----------
    first, second : str, or sequences of lines
        Texts are cut by ``str.splitlines``. Two without lines are equal: 1.

    Paper: arXiv 2508.05242.
    """
    one, other = (Counter(t.splitlines() if isinstance(t, str) else t) for t in (first, second))
    union = (one | other).total()
    return (one & other).total() / union if union else 1.0


def same_output(truth: str, answer: str) -> bool:
    """Whether two outputs are equal up to one newline at the start or the end of one of them."""
    return truth == answer or any(a in (b + "\n", "\n" + b) for a, b in ((truth, answer), (answer, truth)))


def answer_block(text: str, tag: str, pick: Pick = "last") -> str | None:
    """Content of the fenced block with the info string `tag`; None where there is none.

    Parameters
    ----------
    text : str
    tag : str
        "answer_stdout" for a block that opens with three or more backticks and ``answer_stdout``. The block ends at the
        next run of as many backticks; the line end before it is not part of the content.
    pick : "last", "first" or "released"
        Which counts of several: by position, or as in the released code, the last in alphabetical order, with the
        white space before the end of the block and blank lines at its start removed.
    """
    name = re.escape(tag)
    if pick == "released":
        blocks = re.findall(rf"```{name}\s*\n(.*?)```", text, re.DOTALL)
        return max((block.rstrip() for block in blocks), default=None)
    # Possessive, from the start of a run of backticks: no backtracking over what a model may write.
    found = re.findall(rf"(?<!`)(`{{3,}}+){name}[ \t\r]*\n(.*?)\1", text, re.DOTALL)
    if not found:
        return None
    content: str = found[0 if pick == "first" else -1][1]
    return content.removesuffix("\n")


def normalise_stderr(text: str) -> str:
    """`text` without what depends on the machine: folders in tracebacks, addresses.

    ``File "/tmp/x/main.py"`` becomes ``File "main.py"``, a file of a library keeps what follows ``python3.11/`` or
    ``site-packages/``, and ``0x7f3a...`` becomes ``0x0``. Doing it twice changes nothing.
    """
    return _ADDRESS.sub("0x0", _PATH.sub(lambda match: f'File "{_place(match.group(1))}"', text))


_PATH = re.compile(r'File "((?:[A-Za-z]:)?[/\\][^"\n]*)"')
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")
_LIBRARY = re.compile(r".*(?:site-packages|dist-packages|python\d\.\d+)[/\\]")


def _place(path: str) -> str:
    inside = _LIBRARY.sub("", path)
    return inside.replace("\\", "/") if inside != path else re.split(r"[/\\]", path)[-1]


@dataclass(frozen=True)
class ExecutionReward:
    """Reward of one predicted execution (arXiv 2508.05242).

    Parameters
    ----------
    format_weight : float in [0, 1]
        0.1 in the paper.
    stderr_weight : float >= 0
        Weight of the IoU of stderr before it is averaged with stdout; 0.5 in the paper.
    reward_stderr : bool
        Whether stderr counts.
    rescale : bool
        Divide the accuracy by the largest possible one, ``(1 + stderr_weight) / 2``: a perfect answer earns 1 in place
        of 0.775.

    Raises
    ------
    InvalidInputError
        A weight out of range.
    """

    format_weight: float = 0.1
    stderr_weight: float = 0.5
    reward_stderr: bool = True
    rescale: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.format_weight <= 1 and 0 <= self.stderr_weight < np.inf):
            raise InvalidInputError(
                "ExecutionReward: format_weight must be in [0, 1] and stderr_weight finite and >= 0, "
                f"got {self.format_weight} and {self.stderr_weight}"
            )

    def __call__(
        self, truth: Mapping[str, str], answer: Mapping[str, str | None], format: float | None = None
    ) -> dict[str, float]:
        """The reward and its parts.

        Parameters
        ----------
        truth : mapping with "stdout" and "stderr"
        answer : mapping with "stdout" and "stderr", or the tags "answer_stdout" and "answer_stderr"
            None or absent for a block that is missing.
        format : float in [0, 1], optional
            Share of the required blocks that are present; default that of the two in `answer`. For filled-in lines it
            is the share of lines, and `answer` is what the completed program printed.

        Returns
        -------
        dict
            "overall" R, "format", "accuracy", "stdout" c and "stderr" e, weighted. All 0 where the format is 0.

        Raises
        ------
        InvalidInputError
            `truth` without stdout or stderr as texts, a format out of range.
        """
        for name in ("stdout", "stderr"):
            if not isinstance(truth.get(name), str):
                raise InvalidInputError(f"ExecutionReward: truth[{name!r}] is {truth.get(name)!r}, expected a text")
        stdout, stderr = (_text(answer.get(n, answer.get(f"answer_{n}"))) for n in ("stdout", "stderr"))
        present = ((stdout is not None) + (stderr is not None)) / 2 if format is None else float(format)
        if not 0 <= present <= 1:
            raise InvalidInputError(f"ExecutionReward: format must be in [0, 1], got {format}")
        if present == 0:
            return dict.fromkeys(PARTS, 0.0)
        c = float(stdout is not None and same_output(truth["stdout"], stdout))
        e = 0.0 if stderr is None else self.stderr_weight * line_multiset_iou(truth["stderr"], stderr)
        accuracy = (c + e) / 2 if self.reward_stderr else c
        if self.rescale and self.reward_stderr:
            accuracy /= (1 + self.stderr_weight) / 2
        overall = (1 - self.format_weight) * accuracy + self.format_weight * present
        return dict(zip(PARTS, (overall, present, accuracy, c, e), strict=True))

    def silent(self, truth: Mapping[str, str]) -> float:
        """What an answer of two empty blocks earns: the floor that a policy reaches without reading the program."""
        return self(truth, {"stdout": "", "stderr": ""})["overall"]


def fill_masked_lines(code: str, lines: Sequence[str | None]) -> str:
    """`code` with the line ``MASKED_LINE_k`` replaced by ``lines[k]``; None leaves it.

    Whole lines are replaced, all at once: ``MASKED_LINE_1`` is no part of ``MASKED_LINE_10``, and what a filled-in line
    says is not read again.
    """
    known = {f"MASKED_LINE_{k}": line for k, line in enumerate(lines) if line is not None}
    return "\n".join(known.get(line.strip(), line) for line in code.split("\n"))


def execute_programs(
    programs: Sequence[Runnable], sandbox: Sandbox | None = None, seconds: float = SECONDS
) -> list[ScriptResult]:
    """Run programs in the sandbox, in one call, and normalise what they write to stderr.

    Parameters
    ----------
    programs : objects with `code`, `stdin` and `arguments`, such as those of `polyreward.tasks.code_prediction`
    sandbox : Sandbox, optional
        Default: the one of this process.
    seconds : float
        Wall-clock limit of one program.
    """
    if not programs:
        return []
    from polyreward.rewards.execution import Limits, Script, shared_sandbox

    limits = Limits(wall_seconds=seconds)
    scripts = [Script(p.code, p.stdin, tuple(p.arguments), limits) for p in programs]
    results = (sandbox or shared_sandbox()).execute(scripts)
    return [replace(result, stderr=normalise_stderr(result.stderr)) for result in results]


@dataclass(frozen=True)
class _Filled:
    code: str
    stdin: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class ExecutionPredictionReward(Reward):
    """`ExecutionReward` of completions, forward and backward (arXiv 2508.05242). Range [0, 0.775] by default.

    Columns, as `ForwardTask` and `LineInfillTask` of `polyreward.tasks.code_prediction` make them:

    - `truth`: a mapping with "stdout" and "stderr" of the true execution;
    - `meta`: a mapping with "task", "forward" or "backward"; for "backward" also "code" with ``MASKED_LINE_k`` lines,
      "masked", their number, and where the program reads them "stdin" and "arguments".

    Backward completions of a batch are run in one call of the sandbox. One that does not finish, or prints more than
    the limit, has accuracy 0. Any text that reproduces the outputs is right, as in the paper; that includes a line
    which prints the expected output and ends the program.

    Parameters
    ----------
    scoring : ExecutionReward
    pick : "last", "first" or "released"
        Which of several blocks with one tag counts, see `answer_block`.
    seconds : float > 0
        Limit of one program; 5 in the paper.
    sandbox : Sandbox, optional
        Default: the one of the process.
    truth, meta : str
        Names of the columns.

    Raises
    ------
    InvalidInputError
        At a call: a truth or meta that cannot be used, named by column and row.
    """

    scoring: ExecutionReward = field(default_factory=ExecutionReward)
    pick: Pick = "last"
    seconds: float = SECONDS
    sandbox: Sandbox | None = None
    truth: str = "truth"
    meta: str = "meta"

    def __post_init__(self) -> None:
        if self.pick not in ("last", "first", "released"):
            raise InvalidInputError(f"pick must be 'last', 'first' or 'released', got {self.pick!r}")
        if not self.seconds > 0:
            raise InvalidInputError(f"seconds must be positive, got {self.seconds}")

    @property
    def reads(self) -> tuple[str, ...]:
        """The truth and what kind of task it is."""
        return (self.truth, self.meta)

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion."""
        return as_list(self.explain(prompts, completions, **columns)["overall"])

    def explain(
        self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any
    ) -> dict[str, np.ndarray]:
        """The reward with its parts, float64 (N,) each, NaN where it does not apply.

        Beside the parts of `ExecutionReward`: "silent", whether a forward answer is two empty blocks, and "floor", what
        such an answer earns on that row. A mean "silent" that rises with "overall" near "floor" is a policy that has
        learnt to say nothing.
        """
        names = (*PARTS, "silent", "floor")
        table = {name: np.full(len(completions), np.nan) for name in names}
        programs: list[_Filled] = []
        waiting: list[tuple[Sample, dict[str, str], float]] = []
        for sample in self.samples(prompts, completions, columns):
            truth, meta = self._truth(sample), self._meta(sample)
            if meta["task"] == "forward":
                answer = {name: answer_block(sample.text, f"answer_{name}", self.pick) for name in truth}
                answer["stderr"] = answer["stderr"] and normalise_stderr(answer["stderr"])
                parts = self.scoring(truth, answer)
                silent = all(block is not None and not block.strip() for block in answer.values())
                _put(table, sample.row, parts | {"silent": float(silent), "floor": self.scoring.silent(truth)})
                continue
            count = meta["masked"]
            blocks = [answer_block(sample.text, f"answer_MASKED_LINE_{k}", self.pick) for k in range(count)]
            present = sum(block is not None for block in blocks) / count
            if present == 0:
                _put(table, sample.row, dict.fromkeys(PARTS, 0.0))
                continue
            code = fill_masked_lines(meta["code"], blocks)
            programs.append(_Filled(code, meta.get("stdin") or "", tuple(meta.get("arguments") or ())))
            waiting.append((sample, truth, present))
        results = execute_programs(programs, self.sandbox, self.seconds)
        for (sample, truth, present), result in zip(waiting, results, strict=True):
            complete = result.status == "finished" and not result.truncated
            printed = {"stdout": result.stdout, "stderr": result.stderr} if complete else {}
            _put(table, sample.row, self.scoring(truth, printed, format=present))
        return table

    def _truth(self, sample: Sample) -> dict[str, str]:
        truth = sample.columns[self.truth]
        if not isinstance(truth, Mapping) or not all(isinstance(truth.get(n), str) for n in ("stdout", "stderr")):
            raise self.refuse(sample, self.truth, f"{truth!r} has no texts 'stdout' and 'stderr'")
        return {"stdout": truth["stdout"], "stderr": normalise_stderr(truth["stderr"])}

    def _meta(self, sample: Sample) -> Mapping[str, Any]:
        meta = sample.columns[self.meta]
        if not isinstance(meta, Mapping) or meta.get("task") not in ("forward", "backward"):
            raise self.refuse(sample, self.meta, f"{meta!r} has no 'task' that is 'forward' or 'backward'")
        if meta["task"] == "backward":
            masked = meta.get("masked")
            if isinstance(masked, bool) or not isinstance(masked, int | np.integer) or masked < 1:
                raise self.refuse(sample, self.meta, f"'masked' is {masked!r}, expected the number of masked lines")
            if not isinstance(meta.get("code"), str):
                raise self.refuse(sample, self.meta, f"'code' is {meta.get('code')!r}, expected a program")
        return meta


def codeboost(
    format_weight: float = 0.1,
    stderr_weight: float = 0.5,
    reward_stderr: bool = True,
    rescale: bool = False,
    pick: Pick = "last",
    seconds: float = SECONDS,
) -> ExecutionPredictionReward:
    """The reward of CodeBoost (arXiv 2508.05242) from plain options, as recipes give them.

    Parameters are those of `ExecutionReward` and `ExecutionPredictionReward`; defaults are the paper's.
    """
    return ExecutionPredictionReward(
        ExecutionReward(format_weight, stderr_weight, reward_stderr, rescale), pick, seconds
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _put(table: Mapping[str, np.ndarray], row: int, parts: Mapping[str, float]) -> None:
    for name, value in parts.items():
        table[name][row] = value
