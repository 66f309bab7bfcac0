"""Prompts of a run: a reasoning-gym mixture, or a person's own file with its columns mapped.

Rows always hold ``prompt``, ``task`` and ``points``, ``answer`` where there is one, and whatever other columns the file
has; rewards receive them all.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyreward.data.files import WAIT, UnfinishedError, json_object
from polyreward.errors import InvalidInputError, MissingColumnError, MissingFileError, nearest
from polyreward.tasks.mixture import Family, rows
from polyreward.training.recipe import ColumnsSection, Recipe

Row = dict[str, Any]
HELD_OUT_SEED = 999_983  # the held-out problems are the same for every seed of a run


@dataclass(frozen=True)
class Prompts:
    """Training and held-out rows."""

    train: list[Row]
    held_out: list[Row]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order of appearance."""
        return list(dict.fromkeys(str(row["task"]) for row in self.train))


def load_prompts(recipe: Recipe, seed: int) -> Prompts:
    """The rows a run trains on and those it is scored on; no held-out prompt is among the training prompts.

    Raises
    ------
    MissingFileError, MissingColumnError, InvalidInputError
        The message names file, row and column.
    """
    if recipe.data.path is not None:
        return _own(recipe, seed)
    families = families_of(recipe)
    style = prompt_style(recipe)
    held_out = rows(families, recipe.tasks.held_out, HELD_OUT_SEED, style=style)
    known = frozenset(row["prompt"] for row in held_out)
    train = rows(families, recipe.tasks.prompts, seed, style=style, exclude=known)
    return Prompts(_enough(train, recipe, "the task mixture"), held_out)


def families_of(recipe: Recipe) -> list[Family]:
    """The task families of a recipe."""
    return [Family(family.name, family.points, family.options) for family in recipe.tasks.families]


def prompt_style(recipe: Recipe) -> str:
    """How problems are worded: in a few characters for the policy made here, in full for any other."""
    if recipe.tasks.style != "auto":
        return recipe.tasks.style
    return "compact" if recipe.policy.model is None else "question"


def read_prompts(path: str | Path, columns: ColumnsSection, split: str = "train") -> list[Row]:
    """Read a JSONL, Parquet or CSV file, or a `datasets` data set, and map its columns."""
    table = _read(path, split)
    if not table:
        raise InvalidInputError(f"{path} has no rows")
    found = list(table[0])
    for meaning, name in columns.model_dump().items():
        if name is not None and name not in found:
            raise MissingColumnError(
                f"{path} has no column {name!r} for the {meaning}{nearest(name, found)}; "
                f"name it with --column {meaning}=NAME"
            )
    reserved = next((name for name in ("prompts", "completions") if name in found), None)
    if reserved is not None:
        raise InvalidInputError(f"{path} has a column {reserved!r}, which is what rewards get; give it another name")
    answer = columns.answer or ("answer" if "answer" in found else None)
    task = columns.task or ("task" if "task" in found else None)
    result = []
    for number, row in enumerate(table, start=1):
        prompt = row[columns.prompt]
        _check_prompt(prompt, f"{path}, row {number}: the column {columns.prompt!r}")
        mapped = {"points": 1.0, **row, "prompt": prompt, "task": str(row[task]) if task else "all"}
        if answer:
            mapped["answer"] = row[answer]
        result.append(mapped)
    return result


def _own(recipe: Recipe, seed: int) -> Prompts:
    assert recipe.data.path is not None
    table = read_prompts(recipe.data.path, recipe.data.columns, recipe.data.split)
    if len(table) < 2:
        raise InvalidInputError(f"{recipe.data.path} has {len(table)} rows; at least 2 are needed to hold some out")
    chosen = _held_out(table, recipe.data.held_out)
    held_out = [row for i, row in enumerate(table) if i in chosen]
    known = {json.dumps(row["prompt"], default=str) for row in held_out}
    train = [row for i, row in enumerate(table) if i not in chosen]
    train = [row for row in train if json.dumps(row["prompt"], default=str) not in known]
    if not train:
        raise InvalidInputError(f"{recipe.data.path}: every prompt is among the held-out ones")
    return Prompts(_enough(train, recipe, recipe.data.path), held_out)


def _held_out(table: Sequence[Row], share: float) -> set[int]:
    """Rows to hold out: the share of every task, at least one of each that has two, and at least one in all."""
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(table)).tolist()
    of_task: dict[str, list[int]] = {}
    for row in order:
        of_task.setdefault(table[row]["task"], []).append(row)
    chosen: set[int] = set()
    for own in of_task.values():
        chosen.update(own[: min(max(1, round(share * len(own))), len(own) - 1)])
    return chosen or set(order[:1])


def _enough(train: list[Row], recipe: Recipe, source: str) -> list[Row]:
    wanted = recipe.training.prompts_per_step
    if len(train) < wanted:
        raise InvalidInputError(
            f"{source} has {len(train)} prompts to train on, fewer than training.prompts_per_step={wanted}; give more "
            "prompts, or set it lower"
        )
    return train


def _check_prompt(prompt: Any, where: str) -> None:
    if prompt is None or prompt == "" or prompt == []:
        raise InvalidInputError(f"{where} is empty")
    if isinstance(prompt, list):
        for message in prompt:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise InvalidInputError(f"{where} holds {message!r}, expected messages with 'role' and 'content'")
    elif not isinstance(prompt, str):
        raise InvalidInputError(f"{where} is {prompt!r}, expected a text or a list of chat messages")


def _read(path: str | Path, split: str) -> list[Row]:
    file = Path(path)
    if file.suffix not in (".jsonl", ".json", ".csv", ".parquet"):
        return _data_set(str(path), split)
    if not file.is_file():
        raise MissingFileError(f"no such file: {path}")
    if file.stat().st_size == 0:
        raise InvalidInputError(f"{path} is empty")
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_table(file).to_pylist()  # type: ignore[no-any-return]
        except (pa.ArrowInvalid, OSError) as error:
            raise InvalidInputError(f"{path} is not a readable Parquet file: {error}") from error
    return _read_csv(file) if file.suffix == ".csv" else _read_jsonl(file)


def _read_jsonl(file: Path) -> list[Row]:
    table: list[Row] = []
    expected: set[str] = set()
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json_object(line, f"{file}, line {number}")
            except UnfinishedError as error:
                raise InvalidInputError(str(error).removesuffix(f"; {WAIT}")) from error
            expected = expected or set(row)
            if set(row) != expected:
                odd = sorted(set(row) ^ expected)
                raise InvalidInputError(
                    f"{file}, line {number}: its keys differ from the first line's in {', '.join(odd)}"
                )
            table.append(row)
    return table


def _read_csv(file: Path) -> list[Row]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        table = []
        try:
            header = next(reader, [])
            twice = next((name for name in header if header.count(name) > 1), None)
            if twice is not None:
                raise InvalidInputError(f"{file} has the column {twice!r} {header.count(twice)} times; expected once")
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise InvalidInputError(
                        f"{file}, line {reader.line_num}: {len(row)} fields, the header has {len(header)}"
                    )
                table.append(dict(zip(header, row, strict=True)))
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"{file}, after line {reader.line_num}: not UTF-8 ({error.reason})") from error
    return table


def _data_set(name: str, split: str) -> list[Row]:
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name, split=split)
        loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    except Exception as error:  # every data set script and hub failure has its own type
        raise MissingFileError(
            f"cannot read the data set {name!r} (split {split!r}): {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    return [dict(row) for row in loaded]
