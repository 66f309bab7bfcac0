"""Verifiers: rewards that compare the answer with a reference in a column of the data set.

Exact match follows the normalisation of question answering (SQuAD, arXiv 1606.05250), numbers the ``#### N`` of GSM8K
(arXiv 2110.14168); graded verifiers give the fraction of lines or fields that are right; `ReasoningGymScore` hands the
answer to reasoning-gym's own scorer (arXiv 2505.24760). The reference, answered where the verifier looks for an answer,
earns the maximum, 1.
"""

from __future__ import annotations

import functools
import json
import math
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polyreward.errors import InvalidInputError, UnknownNameError, nearest, require
from polyreward.rewards.answers import check_place, find_answer, parse_number
from polyreward.rewards.contract import Reward, Sample, is_missing

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class ExactMatch(Reward):
    """1 where the answer equals the reference after normalisation, else 0 (SQuAD's exact match, arXiv 1606.05250).

    Parameters
    ----------
    column : str
        Column of the reference: a text, or a list of accepted texts.
    extract : "text", "boxed", "####", "last_number", or a tag such as "<answer>"
        Where the completion has its answer.
    ignore_case, ignore_spaces, ignore_punctuation, ignore_articles : bool
        What does not count as a difference. `ignore_spaces` reads any run of white space as one space.

    Range: 0 or 1.
    """

    column: str = "answer"
    extract: str = "text"
    ignore_case: bool = False
    ignore_spaces: bool = True
    ignore_punctuation: bool = False
    ignore_articles: bool = False

    def __post_init__(self) -> None:
        check_place(self.extract)

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the reference."""
        return (self.column,)

    def score(self, sample: Sample) -> float:
        """1 or 0."""
        reference = sample.columns[self.column]
        accepted = reference if isinstance(reference, list | tuple) else [reference]
        accepted = [text for text in accepted if not is_missing(text)]
        if not accepted:
            raise self.refuse(sample, self.column, "an empty list of accepted answers")
        answer = find_answer(sample.text, self.extract)
        if answer is None:
            return 0.0
        return float(self.normalise(answer) in {self.normalise(str(text)) for text in accepted})

    def normalise(self, text: str) -> str:
        """The text without what does not count as a difference."""
        text = text.strip()
        if self.ignore_case:
            text = text.lower()
        if self.ignore_punctuation:
            text = text.translate(_PUNCTUATION)
        if self.ignore_articles:
            text = re.sub(r"\b(a|an|the)\b", " ", text, flags=re.IGNORECASE)
        return " ".join(text.split()) if self.ignore_spaces or self.ignore_articles else text


@dataclass(frozen=True)
class NumericAnswer(Reward):
    """1 where the answer is the reference number within a tolerance, else 0 (GSM8K, arXiv 2110.14168).

    Parameters
    ----------
    column : str
        Column of the reference: a number, its text, or a worked solution that ends in ``#### N``.
    extract : as in `ExactMatch`
        ``"####"`` demands the mark of GSM8K; the default takes the last number.
    absolute, relative : float >= 0
        The answer counts where ``|answer - reference| <= max(absolute, relative * |reference|)``.

    Range: 0 or 1. A reference that is no number is an error.
    """

    column: str = "answer"
    extract: str = "last_number"
    absolute: float = 0.0
    relative: float = 1e-9

    def __post_init__(self) -> None:
        check_place(self.extract)
        if not (self.absolute >= 0 and self.relative >= 0):
            raise InvalidInputError(f"tolerances must not be negative, got {self.absolute} and {self.relative}")

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the reference."""
        return (self.column,)

    def score(self, sample: Sample) -> float:
        """1 or 0."""
        reference = str(sample.columns[self.column])
        target = parse_number(find_answer(reference, "####") or reference)
        if target is None:
            raise self.refuse(sample, self.column, f"{reference[-40:]!r} is no number and does not end in '#### N'")
        answer = find_answer(sample.text, self.extract)
        value = None if answer is None else parse_number(answer)
        if value is None:
            return 0.0
        return float(math.isclose(value, target, rel_tol=0, abs_tol=max(self.absolute, self.relative * abs(target))))


@dataclass(frozen=True)
class LinesCorrect(Reward):
    """Fraction of lines that are right and in their place; blank lines and outer spaces do not count.

    The divisor is the larger number of lines, so that more lines than the reference cost as much as wrong ones. A
    graded form of exact match (arXiv 2505.24760 grades its grid tasks alike). Range [0, 1].
    """

    column: str = "answer"
    extract: str = "text"

    def __post_init__(self) -> None:
        check_place(self.extract)

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the reference."""
        return (self.column,)

    def score(self, sample: Sample) -> float:
        """Fraction in [0, 1]."""
        wanted = _lines(str(sample.columns[self.column]))
        if not wanted:
            raise self.refuse(sample, self.column, "the reference has no line")
        given = _lines(find_answer(sample.text, self.extract) or "")
        right = sum(a == b for a, b in zip(given, wanted, strict=False))
        return right / max(len(given), len(wanted))


@dataclass(frozen=True)
class FieldsCorrect(Reward):
    """Fraction of fields of a JSON object that are right; fields that the reference lacks enter the divisor.

    The reference is a mapping or the text of a JSON object. Values are equal as Python compares parsed JSON: 1, 1.0 and
    true are equal, "1" is none of them, order counts in lists and not in objects. A graded verifier in the sense of
    partial scores (arXiv 2505.24760). Range [0, 1]; text that is no JSON object earns 0.
    """

    column: str = "answer"
    extract: str = "text"

    def __post_init__(self) -> None:
        check_place(self.extract)

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the reference."""
        return (self.column,)

    def score(self, sample: Sample) -> float:
        """Fraction in [0, 1]."""
        reference = sample.columns[self.column]
        wanted = read_json(_as_json(reference) if isinstance(reference, Mapping) else str(reference))
        if not isinstance(wanted, dict) or not wanted:
            raise self.refuse(sample, self.column, f"{str(reference)[:40]!r} is no JSON object with a field")
        given = read_json(find_answer(sample.text, self.extract) or "")
        if not isinstance(given, dict):
            return 0.0
        right = sum(name in given and given[name] == value for name, value in wanted.items())
        return right / len(wanted.keys() | given.keys())


@dataclass(frozen=True)
class ReasoningGymScore(Reward):
    """reasoning-gym's graded score of the answer (arXiv 2505.24760). Range [0, 1].

    Reads the column `column` with the entry of the data set: a mapping, or its JSON text, with ``answer`` and
    ``metadata``. The task is the entry's ``metadata["source_dataset"]``, or the column ``task``.

    Parameters
    ----------
    column : str
    extract : as in `ExactMatch`
    options : mapping of task name to the configuration its scorer needs, where it is not the default

    Raises
    ------
    MissingExtraError
        reasoning-gym is not installed.
    """

    column: str = "entry"
    extract: str = "<answer>"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_place(self.extract)

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the entry."""
        return (self.column,)

    def score(self, sample: Sample) -> float:
        """Score in [0, 1]."""
        value = sample.columns[self.column]
        entry = dict(value) if isinstance(value, Mapping) else read_json(str(value))
        if not isinstance(entry, dict) or not {"answer", "metadata"} <= entry.keys():
            raise self.refuse(sample, self.column, "expected an entry of reasoning-gym with 'answer' and 'metadata'")
        if isinstance(entry["metadata"], str):
            entry["metadata"] = read_json(entry["metadata"])
        details = entry["metadata"] if isinstance(entry["metadata"], dict) else {}
        task = details.get("source_dataset") or sample.columns.get("task")
        if task is None:
            raise self.refuse(sample, self.column, "neither metadata['source_dataset'] nor a column 'task'")
        scorer = _scorer(str(task), json.dumps(dict(self.options.get(str(task), {})), sort_keys=True))
        answer = find_answer(sample.text, self.extract)
        try:
            return float(scorer.score_answer(answer, entry))
        except Exception:  # some scorers fail on odd answers, all of them on a broken entry: the reference tells which
            try:
                scorer.score_answer(entry["answer"], entry)
            except Exception as error:
                kind = f"{type(error).__name__}: {error}"
                raise self.refuse(sample, self.column, f"reasoning-gym cannot score {task!r}: {kind}") from error
            return 0.0


def read_json(text: str) -> Any:
    """Parsed JSON, or None where the text is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _as_json(reference: Mapping[Any, Any]) -> str:
    """A mapping as JSON, so that a tuple is what the model can write; empty where it has no such form."""
    try:
        return json.dumps(dict(reference), default=lambda value: value.tolist())
    except (AttributeError, TypeError, ValueError):
        return ""


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


@functools.cache
def _scorer(task: str, options: str) -> Any:
    gym: Any = require("reasoning_gym", "tasks")
    known = gym.factory.DATASETS
    if task not in known:
        raise UnknownNameError(f"reasoning-gym has no task {task!r}{nearest(task, known)}")
    return gym.create_dataset(task, **{"size": 1, "seed": 0, **json.loads(options)})
