r"""Layouts of preference data as one row of a file gives them, turned into `Preference`.

| layout | columns |
|---|---|
| ``native`` | `prompt`, `responses`, and `choice` (or `label`), `ranking`, `ranks`, `ratings` or `strength` |
| ``trl`` | `chosen`, `rejected`, with or without `prompt`, as texts or chat messages |
| ``hh`` | `chosen`, `rejected`, whole dialogues of ``"\n\nHuman: "`` and ``"\n\nAssistant: "`` (arXiv 2204.05862) |
| ``ultrafeedback`` | `instruction`, `completions` with a score of each (arXiv 2310.01377) |

Every reader gives back the columns it did not use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError, nearest
from polyreward.preferences import Preference

Row = Mapping[str, Any]
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def layout_of(columns: Sequence[str], row: Row, where: str) -> str:
    """Name of the layout of a row.

    Raises
    ------
    MissingColumnError
        None of the layouts has these columns.
    """
    names = set(columns)
    if {"instruction", "completions"} <= names:
        return "ultrafeedback"
    if "responses" in names:
        return "native"
    if {"chosen", "rejected"} <= names:
        chosen = row.get("chosen")
        return "hh" if isinstance(chosen, str) and _TURN.match(chosen) and "prompt" not in names else "trl"
    raise MissingColumnError(
        f"{where}: cannot tell which columns are the preferences; expected prompt and responses, chosen and rejected, "
        f"or instruction and completions, found {', '.join(sorted(names))}"
    )


def reader_of(layout: str) -> Callable[[Row, str], Preference]:
    """The function of a row and its place that reads a layout; `UnknownNameError` for a name that is none."""
    if layout not in _READERS:
        raise UnknownNameError(f"unknown layout of preferences {layout!r}{nearest(layout, _READERS)}")
    return _READERS[layout]


def read_native(row: Row, where: str) -> Preference:
    """A row with `prompt` and `responses` and at least one kind of judgement.

    `strength` is signed and for two responses: above 0 the first is better, below 0 the second, 0 is a tie. `ranking`
    lists indices of responses, the best first; a list in the list is a tie, and what it leaves out was not compared.
    """
    responses = _list(row, "responses", where)
    choice = row.get("choice", row.get("label"))
    margin = _float(row, "margin", where)
    if isinstance(choice, float) and choice.is_integer():
        choice = int(choice)
    if isinstance(choice, str) and choice.lstrip("-").isdigit():
        choice = int(choice)
    if choice == -1:
        choice = "tie"
    strength = _float(row, "strength", where)
    if strength is not None:
        if len(responses) != 2:
            raise InvalidInputError(f"{where}: strength is for two responses, found {len(responses)}")
        choice, margin = "tie" if strength == 0 else int(strength < 0), abs(strength)
    ranks = row.get("ranks")
    if row.get("ranking") is not None:
        ranks = _ranks(row["ranking"], len(responses), where)
    ratings = row.get("ratings")
    if choice is None and ranks is None and ratings is None:
        raise MissingColumnError(
            f"{where}: no judgement; expected choice, ranking, ranks, ratings or strength, found {', '.join(row)}"
        )
    used = {"prompt", "responses", "label" if "choice" not in row else "choice", "ranks", "ranking", "ratings"}
    return Preference(
        row.get("prompt"),
        responses,
        choice,
        ranks,
        ratings,
        margin,
        _float(row, "target", where),
        row.get("annotator"),
        _rest(row, used | {"strength", "margin", "target", "annotator"}),
    )


def read_trl(row: Row, where: str) -> Preference:
    """A row with `chosen` and `rejected`; without `prompt`, it is what the two have in common at the start.

    A text is cut at the last white space of the common part; of messages the common turns are the prompt. A prompt of
    messages is left out of the responses that repeat it.
    """
    chosen, rejected = (_response(row, name, where) for name in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise InvalidInputError(f"{where}: chosen and rejected must both be texts, or both messages")
    if prompt is None and isinstance(chosen, str):
        shared = _common(chosen, rejected)
        if shared < max(len(chosen), len(rejected)):
            shared = max(chosen.rfind(mark, 0, shared) for mark in (" ", "\n")) + 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    elif not isinstance(chosen, str):
        # the responses keep at least one turn, also where they are the same
        shared = min(_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        repeats = isinstance(prompt, str) and shared > 0 and chosen[0].get("content") == prompt
        if prompt is None or repeats or (isinstance(prompt, list) and prompt == chosen[:shared] and shared):
            prompt, chosen, rejected = list(chosen[:shared]), chosen[shared:], rejected[shared:]
    scores = [_float(row, "score_chosen", where), _float(row, "score_rejected", where)]
    return Preference(
        prompt,
        [chosen, rejected],
        choice=0,
        ratings=None if None in scores else scores,
        margin=_float(row, "margin", where),
        annotator=row.get("annotator"),
        columns=_rest(row, {"prompt", "chosen", "rejected", "margin", "annotator"}),
    )


def read_hh(row: Row, where: str) -> Preference:
    """A row of two whole dialogues; the common turns are the prompt, as messages, and the last turn is the response.

    Where the dialogues part before the last turn, the responses are lists of the messages that differ.
    """
    dialogues = []
    for name in ("chosen", "rejected"):
        turns = dialogue(_response(row, name, where), f"{where}: {name}")
        if turns[-1]["role"] != "assistant":
            raise InvalidInputError(f"{where}: {name} must end with a turn of the assistant")
        dialogues.append(turns)
    first, second = dialogues
    shared = min(_common(first, second), len(first) - 1, len(second) - 1)
    responses: list[Any] = [turns[shared:] for turns in dialogues]
    if all(len(turns) == 1 for turns in responses):
        responses = [turns[0]["content"] for turns in responses]
    used = {"chosen", "rejected", "annotator"}
    return Preference(first[:shared], responses, choice=0, annotator=row.get("annotator"), columns=_rest(row, used))


def read_ultrafeedback(row: Row, where: str) -> Preference:
    """A row with `instruction` and `completions`, each with a `response` and a score.

    The score is its `overall_score`, or else the mean of the ratings of its `annotations` (honesty, helpfulness, ...).
    """
    completions = _list(row, "completions", where)
    texts, ratings = [], []
    for number, completion in enumerate(completions):
        if not isinstance(completion, Mapping) or "response" not in completion:
            raise InvalidInputError(f"{where}: completions[{number}] has no 'response'")
        texts.append(completion["response"])
        score = _float(completion, "overall_score", f"{where}: completions[{number}]")
        given = (completion.get("annotations") or {}).values()
        aspects = [_rating(aspect) for aspect in given if isinstance(aspect, Mapping)]
        known = [rating for rating in aspects if rating is not None]
        ratings.append(score if score is not None else sum(known) / len(known) if known else None)
    return Preference(
        row["instruction"], texts, ratings=ratings, columns=_rest(row, {"instruction", "completions", "annotator"})
    )


def dialogue(text: str, where: str = "dialogue") -> list[dict[str, str]]:
    r"""Turns of ``"\n\nHuman: ...\n\nAssistant: ..."`` as chat messages.

    Raises
    ------
    InvalidInputError
        The text does not begin with such a turn.
    """
    if not isinstance(text, str) or _TURN.match(text) is None:
        raise InvalidInputError(f"{where} must begin with 'Human:' or 'Assistant:', found {str(text)[:40]!r}")
    pieces = _TURN.split(text)[1:]
    return [{"role": _ROLES[role], "content": content} for role, content in zip(pieces[::2], pieces[1::2], strict=True)]


_READERS: dict[str, Callable[[Row, str], Preference]] = {
    "native": read_native,
    "trl": read_trl,
    "hh": read_hh,
    "ultrafeedback": read_ultrafeedback,
}
LAYOUTS = tuple(_READERS)


def _response(row: Row, name: str, where: str) -> Any:
    value = row.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and all(isinstance(m, Mapping) and "role" in m for m in value):
        return [dict(message) for message in value]
    raise InvalidInputError(f"{where}: {name} must be a text or chat messages, found {_short(value)}")


def _list(row: Row, name: str, where: str) -> list[Any]:
    value = row.get(name)
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) < 2:
        raise InvalidInputError(f"{where}: {name} must be a list of two or more, found {_short(value)}")
    return list(value)


def _float(row: Row, name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{where}: {name} must be a number, found {_short(value)}") from error


def _rating(aspect: Mapping[str, Any]) -> float | None:
    try:
        return float(aspect.get("Rating", aspect.get("rating", "")))
    except (TypeError, ValueError):  # "N/A"
        return None


def _ranks(ranking: Any, size: int, where: str) -> list[float | None]:
    ranks: list[float | None] = [None] * size
    for place, entry in enumerate(ranking if isinstance(ranking, list) else [], start=1):
        for index in entry if isinstance(entry, list) else [entry]:
            if not isinstance(index, int) or not 0 <= index < size or ranks[index] is not None:
                raise InvalidInputError(
                    f"{where}: ranking must name different responses 0 to {size - 1}, found {_short(ranking)}"
                )
            ranks[index] = float(place)
    if sum(rank is not None for rank in ranks) < 2:
        raise InvalidInputError(f"{where}: ranking must be a list of two or more responses, found {_short(ranking)}")
    return ranks


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the common start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _rest(row: Row, used: set[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in used}


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
