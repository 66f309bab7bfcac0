"""Verifiable tasks from bare programs: predict what one prints, or fill in its masked lines (CodeBoost).

A snippet of code has no instruction and no test, but it can be run. Forward, the model reads the program and predicts
stdout and stderr. Backward, it sees both and one or more masked lines, and any lines that reproduce the outputs are
right. Programs that crash are kept where the error is one of seven kinds, since predicting an error is a task too;
programs that time out, print without end or print something else the second time are drawn again.

    (prompt, truth, meta) = ForwardTask().build(snippet, truth)
    items = PredictionTasks(snippets, run, mutate=CodeMutator(0.1, seed).mutate).draw(64, rng).items

`run` is whatever runs programs: ``polyreward.rewards.execution_prediction.execute_programs`` does it in the sandbox.

Paper: CodeBoost: Boosting Code LLMs by Squeezing Knowledge from Code Snippets with RL (arXiv 2508.05242).
"""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from polyreward.errors import InvalidInputError

SUPPORTED_ERRORS = ("syntax", "index", "value", "name", "type", "key", "zero division")
"""Errors that stay in the corpus; the paper's seven."""

FILE = "main.py"
MASK = "MASKED_LINE_"


@dataclass(frozen=True)
class Snippet:
    """A program with what it reads: `code`, `stdin` and command-line `arguments`."""

    code: str
    stdin: str = ""
    arguments: tuple[str, ...] = ()


class ExecutionOutcome(Protocol):
    """What running a program gives; the sandbox's ``ScriptResult`` is one."""

    @property
    def status(self) -> str: ...  # noqa: D102
    @property
    def stdout(self) -> str: ...  # noqa: D102
    @property
    def stderr(self) -> str: ...  # noqa: D102
    @property
    def truncated(self) -> bool: ...  # noqa: D102


Run = Callable[[Sequence[Snippet]], Sequence[ExecutionOutcome]]
Truth = dict[str, str]


class Item(NamedTuple):
    """One task.

    Attributes
    ----------
    prompt : str
    truth : dict with "stdout" and "stderr"
    meta : dict
        "task" ("forward" or "backward"), "code" (backward: with masked lines), "stdin", "arguments", "masked" (number
        of masked lines) and "lines" (their original text). It has the same keys for both tasks, as tables want it.
    """

    prompt: str
    truth: Truth
    meta: dict[str, Any]


class Checked(NamedTuple):
    """What came of running a program: its truth, or None and the reason why it must be drawn again."""

    truth: Truth | None
    reason: str = ""


class Draw(NamedTuple):
    """Tasks, and how many programs were drawn again for which reason."""

    items: list[Item]
    rejected: dict[str, int]


def supported_error(stderr: str, errors: Sequence[str] = SUPPORTED_ERRORS) -> bool:
    """Whether a program with this stderr stays in the corpus.

    Where stderr says "error" or "warning" in any case, one of `errors` has to be in it, written "zero division error"
    or "ZeroDivisionError". Anything else stays.
    """
    text = stderr.lower()
    if "error" not in text and "warning" not in text:
        return True
    return any(f"{name.lower()} error" in text or f"{name.lower().replace(' ', '')}error" in text for name in errors)


def ground_truths(
    snippets: Sequence[Snippet], run: Run, errors: Sequence[str] | None = SUPPORTED_ERRORS, repeats: int = 2
) -> list[Checked]:
    """Run every program `repeats` times, in one call, and keep what can serve as truth.

    Parameters
    ----------
    snippets : sequence of Snippet
    run : (snippets) -> outcomes
    errors : names as in `SUPPORTED_ERRORS`, or None to keep every error
    repeats : int >= 1
        Outputs that differ between the runs are no truth. 2 finds time, randomness and addresses.

    Returns
    -------
    list of Checked, one a snippet
        Reasons: "timeout", "memory", "killed", "truncated", "not deterministic", "unsupported error".

    Raises
    ------
    InvalidInputError
        ``repeats < 1``, or another number of outcomes than of programs.
    """
    if repeats < 1:
        raise InvalidInputError(f"repeats must be at least 1, got {repeats}")
    outcomes = list(run([*snippets] * repeats)) if snippets else []
    if len(outcomes) != len(snippets) * repeats:
        raise InvalidInputError(f"run gave {len(outcomes)} outcomes for {len(snippets) * repeats} programs")
    return [_checked(outcomes[at :: len(snippets)], errors) for at in range(len(snippets))]


def _checked(outcomes: Sequence[ExecutionOutcome], errors: Sequence[str] | None) -> Checked:
    first = outcomes[0]
    for outcome in outcomes:
        if outcome.status != "finished":
            return Checked(None, outcome.status)
        if outcome.truncated:
            return Checked(None, "truncated")
        if (outcome.stdout, outcome.stderr) != (first.stdout, first.stderr):
            return Checked(None, "not deterministic")
    if errors is not None and not supported_error(first.stderr, errors):
        return Checked(None, "unsupported error")
    return Checked({"stdout": first.stdout, "stderr": first.stderr})


def fenced(tag: str, text: str) -> str:
    """`text` in a fenced block, with more backticks than any run of them in the text.

    The line end before the closing fence belongs to the fence; a text that ends in one line end lends its own.
    """
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lends = not text or (text.endswith("\n") and text[:-1] and not text.endswith("\n\n"))
    return f"{fence}{tag}\n{text}{'' if lends else chr(10)}{fence}"


@dataclass(frozen=True)
class ForwardTask:
    """Predict stdout and stderr of a program (arXiv 2508.05242); answers are blocks answer_stdout and answer_stderr.

    Parameters
    ----------
    run : (snippets) -> outcomes, optional
        Runs a program that comes without its truth.
    errors : names, or None to keep every error
    """

    run: Run | None = None
    errors: tuple[str, ...] | None = SUPPORTED_ERRORS

    def build(self, snippet: Snippet | str, truth: Mapping[str, str] | None = None) -> Item | None:
        """The task; None where the program has to be drawn again.

        Raises
        ------
        InvalidInputError
            Neither a truth nor `run`, or a truth without the texts "stdout" and "stderr".
        """
        snippet = _snippet(snippet)
        known = _truth(snippet, truth, self.run, self.errors)
        if known is None:
            return None
        prompt = (
            f"{_project(snippet)}\n{_command(snippet)}\nWhat exactly does the program print to stdout and to stderr? "
            "Think step by step. Then give both in blocks of this form, also where one is empty:\n"
            f"{fenced('answer_stdout', 'Hello, World!')}\n{fenced('answer_stderr', '')}\n"
        )
        return Item(prompt, known, _meta("forward", snippet, snippet.code, []))


@dataclass(frozen=True)
class LineInfillTask:
    """Fill in masked lines so that the program prints what it printed (arXiv 2508.05242).

    Answers are blocks answer_MASKED_LINE_0, ...; each stands for the whole line, with its indentation.

    Parameters
    ----------
    run, errors : as in `ForwardTask`
    max_lines : int >= 1
        The number of masked lines is uniform from 1 to this; 1 in the paper. Of a shorter program all lines are masked.
    """

    run: Run | None = None
    errors: tuple[str, ...] | None = SUPPORTED_ERRORS
    max_lines: int = 1

    def __post_init__(self) -> None:
        if self.max_lines < 1:
            raise InvalidInputError(f"max_lines must be at least 1, got {self.max_lines}")

    def build(
        self,
        snippet: Snippet | str,
        truth: Mapping[str, str] | None = None,
        rng: np.random.Generator | int | None = None,
    ) -> Item | None:
        """The task; None where the program has to be drawn again, or has no line to mask, or holds a mask already.

        Parameters
        ----------
        rng : numpy.random.Generator or seed
            Draws the lines; default seed 0.

        Raises
        ------
        InvalidInputError
            Neither a truth nor `run`, or a truth without the texts "stdout" and "stderr".
        """
        snippet, rng = _snippet(snippet), np.random.default_rng(0 if rng is None else rng)
        lines = snippet.code.replace("\r\n", "\n").split("\n")
        filled = [at for at, line in enumerate(lines) if line.strip()]
        if not filled or MASK in snippet.code:
            return None
        known = _truth(snippet, truth, self.run, self.errors)
        if known is None:
            return None
        count = min(int(rng.integers(1, self.max_lines + 1)), len(filled))
        chosen = sorted(rng.choice(filled, size=count, replace=False).tolist())
        original = [lines[at] for at in chosen]
        for k, at in enumerate(chosen):
            lines[at] = f"{MASK}{k}"
        masked = replace(snippet, code="\n".join(lines))
        examples = "\n".join(fenced(f"answer_{MASK}{k}", "    x = 1") for k in range(count))
        prompt = (
            f"{_project(masked)}\n{count} line(s) of the program are masked by {MASK}0 and so on. Before that the "
            f"program was run.\n{_command(snippet)}\nIt printed:\n{fenced('stdout', known['stdout'])}\n"
            f"{fenced('stderr', known['stderr'])}\nWhat were the masked lines? Keep their indentation. Think step by "
            f"step. Then give each in a block of this form:\n{examples}\n"
        )
        return Item(prompt, known, _meta("backward", snippet, masked.code, original))


@dataclass(frozen=True)
class PredictionTasks:
    """An endless supply of tasks from a corpus of programs, changed anew each time (arXiv 2508.05242).

    Parameters
    ----------
    snippets : sequence of Snippet or str
    run : (snippets) -> outcomes
    mutate : (code) -> code or None, optional
        For example ``CodeMutator(0.1, seed).mutate``. None drops the draw.
    mutate_stdin : (text) -> text, optional
    forward : float in [0, 1]
        Share of forward tasks; 0.75 in the paper.
    max_lines, errors : as in `LineInfillTask`
    rounds : int
        Rounds of drawing again before `draw` gives up.

    Raises
    ------
    InvalidInputError
        No snippets, or `forward` out of range.
    """

    snippets: Sequence[Snippet | str]
    run: Run
    mutate: Callable[[str], str | None] | None = None
    mutate_stdin: Callable[[str], str] | None = None
    forward: float = 0.75
    max_lines: int = 1
    errors: tuple[str, ...] | None = SUPPORTED_ERRORS
    rounds: int = 50

    def __post_init__(self) -> None:
        if not len(self.snippets):
            raise InvalidInputError("PredictionTasks needs at least one snippet")
        if not 0 <= self.forward <= 1:
            raise InvalidInputError(f"forward must be in [0, 1], got {self.forward}")

    def draw(self, count: int, rng: np.random.Generator) -> Draw:
        """`count` tasks. Programs are run in one call a round; what is rejected is drawn again.

        Raises
        ------
        InvalidInputError
            Fewer than `count` after `rounds` rounds; the message counts the reasons.
        """
        forward, backward = ForwardTask(), LineInfillTask(max_lines=self.max_lines)
        items: list[Item] = []
        rejected: Counter[str] = Counter()
        for _ in range(self.rounds):
            if len(items) >= count:
                return Draw(items, dict(rejected))
            drawn = [self._changed(int(at)) for at in rng.integers(len(self.snippets), size=count - len(items))]
            changed = [snippet for snippet in drawn if snippet is not None]
            rejected["does not compile"] += len(drawn) - len(changed)
            for snippet, (truth, reason) in zip(changed, ground_truths(changed, self.run, self.errors), strict=True):
                if truth is None:
                    rejected[reason] += 1
                    continue
                to_the_front = rng.random() < self.forward
                item = forward.build(snippet, truth) if to_the_front else backward.build(snippet, truth, rng)
                if item is None:
                    rejected["nothing to mask"] += 1
                else:
                    items.append(item)
        if len(items) >= count:
            return Draw(items, dict(rejected))
        raise InvalidInputError(
            f"PredictionTasks: {len(items)} of {count} tasks after {self.rounds} rounds; drawn again: {dict(rejected)}"
        )

    def _changed(self, at: int) -> Snippet | None:
        snippet = _snippet(self.snippets[at])
        code = snippet.code if self.mutate is None else self.mutate(snippet.code)
        if code is None:
            return None
        stdin = snippet.stdin if self.mutate_stdin is None else self.mutate_stdin(snippet.stdin)
        return replace(snippet, code=code, stdin=stdin)


def reference_answer(item: Item) -> str:
    """The completion that answers an item perfectly."""
    if item.meta["task"] == "forward":
        return "\n".join(fenced(f"answer_{name}", item.truth[name]) for name in ("stdout", "stderr"))
    return "\n".join(fenced(f"answer_{MASK}{k}", line) for k, line in enumerate(item.meta["lines"]))


def _snippet(snippet: Snippet | str) -> Snippet:
    return Snippet(snippet) if isinstance(snippet, str) else snippet


def _truth(
    snippet: Snippet, truth: Mapping[str, str] | None, run: Run | None, errors: Sequence[str] | None
) -> Truth | None:
    if truth is None:
        if run is None:
            raise InvalidInputError("a task needs the truth of its program, or `run` to find it out")
        return ground_truths([snippet], run, errors)[0].truth
    if not all(isinstance(truth.get(name), str) for name in ("stdout", "stderr")):
        raise InvalidInputError(f"truth {truth!r} has no texts 'stdout' and 'stderr'")
    return {"stdout": truth["stdout"], "stderr": truth["stderr"]}


def _meta(task: str, snippet: Snippet, code: str, lines: list[str]) -> dict[str, Any]:
    return {
        "task": task,
        "code": code,
        "stdin": snippet.stdin,
        "arguments": list(snippet.arguments),
        "masked": len(lines),
        "lines": lines,
    }


def _project(snippet: Snippet) -> str:
    return f"A project has one file:\n{fenced('', FILE)}\n{FILE}:\n{fenced('python', snippet.code)}"


def _command(snippet: Snippet) -> str:
    import shlex

    command = shlex.join(["python", FILE, *snippet.arguments])
    told = f"Python {platform.python_version()}, command:\n{fenced('bash', command)}"
    return f"{told}\nstdin:\n{fenced('stdin', snippet.stdin)}" if snippet.stdin else told
