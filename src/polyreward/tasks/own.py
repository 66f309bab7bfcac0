"""Small task families of our own, beside reasoning-gym's: code, tool requests and open descriptions.

Each gives what a mixture needs of a family: problems drawn from a seed, their wording for a small policy and for any
other, worked solutions of mixed quality for the warm start, the columns its rewards read, and words that the small
tokenizer knows as one token.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from polyreward.errors import InvalidInputError, nearest

Entry = dict[str, Any]


@dataclass(frozen=True)
class OwnTask:
    """A task family.

    Parameters
    ----------
    problem : (rng, **options) -> entry
        Draws one problem: ``question`` and ``answer`` (texts), ``metadata``, and ``columns``, what rewards read.
    prompt : (entry) -> str
        The problem in as few characters as a small policy needs, without the family's name.
    solution : (entry, rng, noise) -> str
        A worked solution; with probability `noise` it is wrong, and sometimes malformed.
    words : texts that the small tokenizer knows as one token
    options : names and defaults of the options of `problem`
    """

    problem: Callable[..., Entry]
    prompt: Callable[[Entry], str]
    solution: Callable[[Entry, random.Random, float], str]
    words: tuple[str, ...]
    options: Mapping[str, Any]

    def problems(self, name: str, size: int, seed: int, options: Mapping[str, Any]) -> list[Entry]:
        """`size` problems, the same for the same seed and options.

        Raises
        ------
        InvalidInputError
            An option that the family does not take, or a value that it refuses.
        """
        for option in options:
            if option not in self.options:
                raise InvalidInputError(f"task {name!r} takes no option {option!r}{nearest(option, self.options)}")
        rng = random.Random(seed)
        try:
            return [self.problem(rng, **{**self.options, **options}) for _ in range(size)]
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"task {name!r} with options {dict(options)}: {error}") from error


OWN_TASKS: dict[str, str] = {
    "write_function": "polyreward.tasks.function_writing:TASK",
    "call_tools": "polyreward.tasks.tool_requests:TASK",
    "describe_counts": "polyreward.tasks.count_descriptions:TASK",
}


def own_task(name: str) -> OwnTask | None:
    """The family of that name; None where it is not one of ours."""
    if name not in OWN_TASKS:
        return None
    module, _, attribute = OWN_TASKS[name].partition(":")
    task: OwnTask = getattr(importlib.import_module(module), attribute)
    return task
