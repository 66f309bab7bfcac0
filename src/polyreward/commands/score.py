"""``polyreward score``: what a reward model says of every response of a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from polyreward.preferences import Preference
    from polyreward.reward_models import RewardModel


def score(
    model: Annotated[
        str, typer.Argument(help="Folder of a reward model (polyreward's or transformers'), or mod:name.")
    ],
    data: Annotated[Path, typer.Argument(help="Prompts with completions, or preferences: JSON lines, CSV, Parquet.")],
    out: Annotated[Path | None, typer.Option(help="JSON lines, CSV or Parquet; default scores.jsonl.")] = None,
    annotator: Annotated[str | None, typer.Option(help="For whom; default the column `annotator`, if any.")] = None,
    layout: Annotated[str, typer.Option(help="Layout of preferences: auto, native, trl, hh, ultrafeedback.")] = "auto",
    column: Annotated[
        list[str] | None,
        typer.Option(help="Column of a field, e.g. prompt=question. Repeatable.", metavar="FIELD=NAME"),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows that are read, scored and written at once.")] = 2000,
) -> None:
    """Score every response; rows come back in order with a column `score` (a list where a row has several responses).

    Ctrl-C leaves a file of what is done, with which the same command goes on.
    """
    from rich.console import Console

    from polyreward.commands.options import pairs
    from polyreward.data.preferences import iterate_responses
    from polyreward.errors import InvalidInputError
    from polyreward.reward_models.parts import load_reward_model

    target = out or Path("scores.jsonl")
    if target.suffix not in (".jsonl", ".csv", ".parquet"):
        raise InvalidInputError(f"--out {target}: expected a .jsonl, .csv or .parquet file")
    loaded = load_reward_model(model)
    console = Console(stderr=True)
    part = target.with_name(target.name + ".part")
    done = _finished_rows(part, key := _key(model, data, annotator, layout, column))
    if done:
        console.print(f"{done:,} rows are done already", highlight=False)
    total = done
    try:
        with part.open("a", encoding="utf-8") as stream:
            if not done:
                stream.write(json.dumps(key) + "\n")
            records = islice(iterate_responses(data, columns=pairs(column, "--column"), layout=layout), done, None)
            while piece := list(islice(records, rows)):
                stream.writelines(
                    json.dumps(row, ensure_ascii=False) + "\n" for row in _scored(loaded, piece, annotator)
                )
                stream.flush()
                total += len(piece)
                console.print(f"{total:,} rows", highlight=False)
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on.", highlight=False)
        raise typer.Exit(130) from None
    finally:
        if not total:
            part.unlink(missing_ok=True)
    if not total:
        raise InvalidInputError(f"{data} has no rows")
    _convert(part, target)
    Console().print(f"Scores: {target}", markup=False, highlight=False, soft_wrap=True)


def _key(model: str, data: Path, annotator: str | None, layout: str, column: list[str] | None) -> dict[str, Any]:
    return {
        "model": str(Path(model).resolve()) if Path(model).exists() else model,
        "data": str(data.resolve()),
        "annotator": annotator,
        "layout": layout,
        "columns": sorted(column or []),
    }


def _finished_rows(part: Path, key: Mapping[str, Any]) -> int:
    """Rows of an unfinished file that are whole; the torn last one is cut off."""
    from polyreward.errors import InvalidInputError

    if not part.exists():
        return 0
    content = part.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.splitlines()
    if not lines:
        part.unlink()
        return 0
    if json.loads(lines[0]) != key:
        raise InvalidInputError(f"{part} is the unfinished output of another command; delete it")
    if whole != content:
        part.write_bytes(whole)
    return len(lines) - 1


def _scored(
    model: RewardModel, piece: Sequence[tuple[dict[str, Any], Preference]], annotator: str | None
) -> list[dict[str, Any]]:
    prompts = [record.prompt for _, record in piece for _ in record.responses]
    responses = [response for _, record in piece for response in record.responses]
    people = [annotator or record.annotator for _, record in piece for _ in record.responses]
    columns = {} if all(person is None for person in people) else {"annotator": people}
    scores = iter(model.score(prompts, responses, **columns).tolist())
    found = []
    for row, record in piece:
        own = [None if value != value else value for value in islice(scores, len(record.responses))]
        single = "responses" not in row and ("completion" in row or "response" in row)
        found.append({**row, "score": own[0] if single else own})
    return found


def _convert(part: Path, target: Path) -> None:
    from polyreward.storage import write_atomically

    def write(path: Path) -> None:
        with part.open(encoding="utf-8") as stream:
            next(stream)
            if target.suffix == ".jsonl":
                with path.open("w", encoding="utf-8") as out:
                    out.writelines(stream)
                return
            import polars

            frame = polars.DataFrame([json.loads(line) for line in stream], infer_schema_length=None)
        if target.suffix == ".parquet":
            frame.write_parquet(path)
            return
        nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
        frame.with_columns(
            polars.col(name).map_elements(lambda cell: json.dumps(_plain(cell)), return_dtype=polars.String)
            for name in nested
        ).write_csv(path)

    write_atomically(target, write)
    part.unlink()


def _plain(cell: Any) -> Any:
    return cell.to_list() if hasattr(cell, "to_list") else cell
