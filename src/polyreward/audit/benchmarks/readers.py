"""Files of the benchmarks: RewardMATH's problems and recorded scores, pairs of Personalized RewardBench.

JSON (a list of objects) and JSON lines, also ``.gz``. Errors name file, row (from 1) and field. Plain preference files
are read by `polyreward.data.preferences.read_preferences`.

Evaluating Robustness of Reward Models for Mathematical Reasoning, arXiv 2410.01729; Personalized RewardBench, arXiv
2604.07343.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyreward.audit.benchmarks.intervals import numbers
from polyreward.audit.benchmarks.one_to_many import OneToManyBenchmark, aggregate_steps
from polyreward.audit.benchmarks.personalized_items import PersonalizedPairItem, check_items
from polyreward.errors import InvalidInputError, MissingColumnError, MissingFileError, nearest
from polyreward.preferences import content_key

CORRECT = "human_to_GPT-4"
"""Tag of the correct solution in RewardMATH's files. One wrong solution there has no tag, so the tag alone tells."""


@dataclass(frozen=True, eq=False)
class OneToManyFile:
    """Problems with the texts of correct and wrong solutions, R solutions in all.

    Attributes
    ----------
    prompts, completions : R texts
        The problem of each solution, and the solution, its steps on lines of their own.
    owner : int64 (R,)
        Place in `problem_ids`.
    correct : bool (R,)
    sources : R texts, who wrote it
    problem_ids : Q ids
    """

    prompts: list[str]
    completions: list[str]
    owner: np.ndarray
    correct: np.ndarray
    sources: list[str]
    problem_ids: list[Any]

    def benchmark(self, scores: Any) -> OneToManyBenchmark:
        """The benchmark under scores (R,) of the solutions.

        Raises
        ------
        InvalidInputError
            Another number of scores; NaN or infinity.
        """
        given = numbers(scores, "scores", 1)
        if len(given) != len(self.completions):
            raise InvalidInputError(f"{len(given)} scores for {len(self.completions)} solutions")
        order = np.argsort(self.owner, kind="stable")
        bounds = np.searchsorted(self.owner[order], np.arange(len(self.problem_ids) + 1))
        records = []
        for place, name in enumerate(self.problem_ids):
            rows = order[bounds[place] : bounds[place + 1]]
            right = self.correct[rows]
            records.append(
                {
                    "problem_id": name,
                    "chosen": given[rows[right]],
                    "rejected": given[rows[~right]],
                    "sources": [self.sources[row] for row in rows[~right].tolist()],
                }
            )
        return OneToManyBenchmark(records)


def read_one_to_many(path: str | Path) -> OneToManyFile:
    """Read problems with their solutions, one row a solution: RewardMATH's direct format.

    Fields: ``problem``, ``eval_solution`` (text or list of steps), ``solution_type`` ("chosen" or "rejected"), and
    optional ``problem_id`` (default the problem's text) and ``solution_reference``.

    Raises
    ------
    MissingFileError, MissingColumnError, InvalidInputError
        The message names file, row and field; also for a problem without correct or without wrong solution.
    """
    prompts, completions, owner, correct, sources = [], [], [], [], []
    places: dict[Any, int] = {}
    ids, first_row = [], []
    for row, where in rows_of(path):
        problem = _text(row, "problem", where)
        name = row.get("problem_id", problem)
        kind = _field(row, "solution_type", where)
        if kind not in ("chosen", "rejected"):
            raise InvalidInputError(f"{where}: solution_type is {kind!r}, expected 'chosen' or 'rejected'")
        key = content_key(name)
        if key not in places:
            places[key] = len(places)
            ids.append(name)
            first_row.append(where)
        prompts.append(problem)
        completions.append(_solution(_field(row, "eval_solution", where), where))
        owner.append(places[key])
        correct.append(kind == "chosen")
        sources.append(str(row.get("solution_reference") or ""))
    which, right = np.array(owner, np.int64), np.array(correct, bool)
    for kind, rows in (("chosen", right), ("rejected", ~right)):
        counts = np.bincount(which[rows], minlength=len(ids))
        if not counts.all():
            place = int((counts == 0).argmax())
            raise InvalidInputError(f"{first_row[place]}: problem {ids[place]!r} has no {kind} solution")
    return OneToManyFile(prompts, completions, which, right, sources, ids)


def read_recorded_scores(path: str | Path, how: str = "prod", correct: str | int = CORRECT) -> OneToManyBenchmark:
    """Read scores that a reward model or judge gave, one row a problem.

    Fields: ``problem``, ``solution_reference`` (who wrote each solution) and ``score``: a number a solution, a list of
    step probabilities a solution, or with ``chosen_position`` the letters that a judge picked, one a wrong solution.
    Rows of one solution with ``solution_type`` and ``output.step_scores`` (RewardBench's mathematical pairs as scored
    by process reward models) are put together by ``problem_id``.

    Parameters
    ----------
    how : aggregation of steps, see `aggregate_steps`
    correct : tag of the correct solution, or its place where the file labels it by place (RewardBench: 0)

    Raises
    ------
    MissingFileError, MissingColumnError, InvalidInputError
        The message names file, row and field.
    """
    records: dict[Any, dict[str, Any]] = {}
    for place, (row, where) in enumerate(rows_of(path)):
        if "output" in row:
            _add_solution(records, row, where, how)
        else:
            records[place] = _scored(row, where, how, correct)
    for record in records.values():
        for name in ("chosen", "rejected"):
            if "wins" not in record and not len(record.get(name, [])):
                raise InvalidInputError(f"{record['where']}: the problem has no {name} solution")
    return OneToManyBenchmark(list(records.values()))


def _scored(row: Mapping[str, Any], where: str, how: str, correct: str | int) -> dict[str, Any]:
    problem = _text(row, "problem", where)
    tags = ["" if tag is None else str(tag) for tag in _list(row, "solution_reference", where)]
    given = _list(row, "score", where)
    if len(given) != len(tags):
        raise InvalidInputError(f"{where}: score has {len(given)} entries for {len(tags)} of solution_reference")
    if "chosen_position" in row:
        asked = _list(row, "chosen_position", where)
        if len(asked) != len(given):
            raise InvalidInputError(f"{where}: chosen_position has {len(asked)} entries for {len(given)} of score")
        wins = [float(a == b) for a, b in zip(given, asked, strict=True)]
        return {"problem_id": problem, "wins": wins, "sources": tags, "where": where}
    scores = _numbers(given, where, how)
    if isinstance(correct, int):
        if not 0 <= correct < len(tags):
            raise InvalidInputError(f"{where}: there is no solution {correct} among {len(tags)}")
        at = correct
    elif tags.count(correct) != 1:
        raise InvalidInputError(
            f"{where}: solution_reference has {tags.count(correct)} entries {correct!r}, expected exactly one"
        )
    else:
        at = tags.index(correct)
    others = [i for i in range(len(tags)) if i != at]
    return {
        "problem_id": problem,
        "chosen": [scores[at]],
        "rejected": [scores[i] for i in others],
        "sources": [tags[i] for i in others],
        "where": where,
    }


def _add_solution(records: dict[Any, dict[str, Any]], row: Mapping[str, Any], where: str, how: str) -> None:
    output = _field(row, "output", where)
    if not isinstance(output, Mapping):
        raise InvalidInputError(f"{where}: output is {type(output).__name__}, expected an object")
    kind = _field(row, "solution_type", where)
    if kind not in ("chosen", "rejected"):
        raise InvalidInputError(f"{where}: solution_type is {kind!r}, expected 'chosen' or 'rejected'")
    name = _field(row, "problem_id", where)
    record = records.setdefault(
        ("id", content_key(name)), {"problem_id": name, "chosen": [], "rejected": [], "where": where}
    )
    record[kind] += _numbers([_list(output, "step_scores", where)], where, how).tolist()


def _numbers(given: Sequence[Any], where: str, how: str) -> np.ndarray:
    """One number a solution."""
    try:
        if all(isinstance(value, list) for value in given):
            return np.asarray(aggregate_steps(given, how), dtype=np.float64)
        for place, value in enumerate(given):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InvalidInputError(f"score[{place}] is {value!r:.40}, expected a number")
        return numbers(given, "score", 1)
    except InvalidInputError as error:
        raise InvalidInputError(f"{where}: score: {error}") from None


def read_personalized(path: str | Path) -> list[PersonalizedPairItem]:
    """Read pairs of Personalized RewardBench, one row an item, with the fields of `PersonalizedPairItem`.

    Raises
    ------
    MissingFileError, MissingColumnError, InvalidInputError
        The message names file, row and field; also for an id that comes twice.
    """
    items = []
    for row, where in rows_of(path):
        aspects = row.get("rubric_aspects") or []
        profile = row.get("profile") or []
        for name, value in (("rubric_aspects", aspects), ("profile", profile)):
            if not isinstance(value, list):
                raise InvalidInputError(f"{where}: {name} is {type(value).__name__}, expected a list")
        try:
            items.append(
                PersonalizedPairItem(
                    id=str(_field(row, "id", where)),
                    question=_text(row, "question", where),
                    profile=profile,
                    narrative=str(row.get("narrative") or ""),
                    rubric_aspects=aspects,
                    category=str(row.get("category") or ""),
                    chosen=_text(row, "chosen", where),
                    rejected=_text(row, "rejected", where),
                    user=None if row.get("user") is None else str(row["user"]),
                )
            )
        except InvalidInputError as error:
            text = str(error)
            raise InvalidInputError(text if text.startswith(where) else f"{where}: {text}") from None
    check_items(items, str(path))
    return items


def rows_of(path: str | Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Objects of a JSON list or of JSON lines, each with the file and row for errors.

    Raises
    ------
    MissingFileError, InvalidInputError
        No file; a file that is no JSON, or has no rows; a row that is no object.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist")
    try:
        with gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb") as stream:
            text = stream.read().decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{file} cannot be read: {error}") from None
    if text.lstrip().startswith("["):
        rows = _json(text, str(file))
    else:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        rows = [_json(line, f"{file}, line {number}") for number, line in lines]
    if not rows:
        raise InvalidInputError(f"{file} has no rows")
    for number, row in enumerate(rows, start=1):
        where = f"{file}, row {number}"
        if not isinstance(row, Mapping):
            raise InvalidInputError(f"{where} is {type(row).__name__}, expected an object")
        yield row, where


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{where}: not valid JSON ({error})") from None


def _field(row: Mapping[str, Any], name: str, where: str) -> Any:
    if row.get(name) is None:
        raise MissingColumnError(f"{where} has no {name!r}{nearest(name, map(str, row))}")
    return row[name]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = _field(row, name, where)
    if not isinstance(value, str) or not value.strip():
        raise InvalidInputError(f"{where}: {name} is {value!r:.60}, expected a text")
    return value


def _list(row: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = _field(row, name, where)
    if not isinstance(value, list) or not value:
        raise InvalidInputError(f"{where}: {name} is {value!r:.60}, expected a list with an entry")
    return value


def _solution(value: Any, where: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(isinstance(step, str) for step in value):
        return "\n".join(value)
    raise InvalidInputError(f"{where}: eval_solution is {value!r:.60}, expected a text or a list of steps")
