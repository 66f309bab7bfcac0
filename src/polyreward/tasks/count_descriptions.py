"""Task family `describe_counts`: an open question, say in words what a list of counts says.

There is no one right wording; the column ``answer`` holds one that a reader would accept, and the column ``type`` says
that the question is open, so that a hybrid reward scores it by likeness to that wording.
"""

from __future__ import annotations

import random

from polyreward.errors import InvalidInputError
from polyreward.tasks.own import Entry, OwnTask

_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
_THINGS = ("apples", "boats", "chairs", "doors", "eagles", "flags")


def problem(rng: random.Random, *, things: int) -> Entry:
    """Counts of two to `things` kinds of thing."""
    if not 2 <= things <= len(_THINGS):
        raise InvalidInputError(f"expected things from 2 to {len(_THINGS)}")
    counts = [(rng.randint(2, 9), thing) for thing in rng.sample(_THINGS, rng.randint(2, things))]
    parts = [f"{_NUMBERS[count - 2]} {thing}" for count, thing in counts]
    answer = ", ".join(parts[:-1]) + f" and {parts[-1]}"
    listed = ", ".join(f"{thing}: {count}" for count, thing in counts)
    return {
        "question": f"Say in words what this list says: {listed}. Answer as <answer>...</answer>.",
        "answer": answer,
        "metadata": {"counts": counts},
        "columns": {"type": "open"},
    }


def prompt(entry: Entry) -> str:
    """``3 boats,2 flags``."""
    return ",".join(f"{count} {thing}" for count, thing in entry["metadata"]["counts"])


def solution(entry: Entry, rng: random.Random, noise: float) -> str:
    """The wording; with probability `noise` a part is left out or has another number."""
    parts = [f"{_NUMBERS[count - 2]} {thing}" for count, thing in entry["metadata"]["counts"]]
    if rng.random() < noise:
        place = rng.randrange(len(parts))
        if rng.random() < 0.5:
            del parts[place]
        else:
            parts[place] = f"{rng.choice(_NUMBERS)} {parts[place].split()[1]}"
    text = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
    return text if rng.random() < noise / 2 else f"<answer>{text}</answer>"


TASK = OwnTask(problem, prompt, solution, words=(*_NUMBERS, *_THINGS, " and ", ", "), options={"things": 3})
