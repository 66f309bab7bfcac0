"""Mixtures of task families: prompts, graded scores, and worked solutions to warm-start a small policy.

Most families are reasoning-gym's, with its problems and scores (`create_dataset`, `score_answer`); a few are ours
(`polyreward.tasks.own`). The families of the built-in recipe differ on purpose: in
difficulty, in how many tool calls a solution needs, in how a wrong answer is graded (by letter, in three levels, all
or nothing) and in `points`, the mark a perfect answer earns.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError, nearest
from polyreward.tasks.own import OWN_TASKS, own_task
from polyreward.tasks.tools import TOOLS, ToolBox, final_answer

Entry = dict[str, Any]

INSTRUCTION = (
    "Give the final answer as <answer>...</answer>. You may call <calc>12*3</calc> for integer arithmetic and "
    "<search>Cat</search> for the number of legs of an animal; the result follows as <result>...</result>."
)


@dataclass(frozen=True)
class Family:
    """One task family in a mixture.

    Parameters
    ----------
    name : a registered reasoning-gym dataset, or one of `polyreward.tasks.own.OWN_TASKS`
    points : float > 0
        What a perfect answer is worth; the graded score in [0, 1] is multiplied by it.
    options : the family's own configuration
    """

    name: str
    points: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in OWN_TASKS and self.name not in (known := _datasets()):
            raise UnknownNameError(f"reasoning-gym has no task {self.name!r}{nearest(self.name, {*known, *OWN_TASKS})}")
        if not self.points > 0:
            raise InvalidInputError(f"task {self.name!r}: points must be positive, got {self.points}")

    def problems(self, size: int, seed: int) -> Sequence[Entry]:
        """`size` problems, the same for the same seed.

        Raises
        ------
        InvalidInputError
            Options that the dataset does not take, or refuses.
        """
        if (own := own_task(self.name)) is not None:
            return own.problems(self.name, size, seed, self.options)
        import reasoning_gym

        try:
            return reasoning_gym.create_dataset(self.name, size=size, seed=seed, **self.options)  # type: ignore[no-any-return]
        except (TypeError, AssertionError, ValueError) as error:
            raise InvalidInputError(f"task {self.name!r} with options {dict(self.options)}: {error}") from error


def rows(
    families: Sequence[Family],
    size: int,
    seed: int,
    *,
    style: str = "compact",
    exclude: frozenset[str] = frozenset(),
) -> list[dict[str, Any]]:
    """Rows of a prompt dataset, `size` distinct prompts a family (fewer when the family has no more).

    Each row holds ``prompt``, ``answer``, ``task``, ``points``, ``metadata`` (JSON, what the scorer needs),
    ``type`` ("verifiable", or "open" where there is no one right answer), and the further columns of its families, None
    where a family does not have one.

    Parameters
    ----------
    style : "compact" for a small policy made here, "question" for reasoning-gym's own wording with an instruction
    exclude : prompts to leave out, the held-out ones
    """
    chosen: list[dict[str, Any]] = []
    for family in families:
        seen = set(exclude)
        found = 0
        for entry in family.problems(4 * size, seed):
            prompt = compact_prompt(family.name, entry) if style == "compact" else question_prompt(family.name, entry)
            if prompt in seen:
                continue
            seen.add(prompt)
            chosen.append(
                {
                    "prompt": prompt,
                    "answer": entry["answer"],
                    "task": family.name,
                    "points": family.points,
                    "metadata": json.dumps(entry["metadata"], default=str),
                    "type": "verifiable",
                    **entry.get("columns", {}),
                }
            )
            found += 1
            if found == size:
                break
        if not found:
            raise InvalidInputError(f"task {family.name!r} has no prompt beyond the {len(exclude)} held-out ones")
    columns = dict.fromkeys(name for row in chosen for name in row)
    return [{name: row.get(name) for name in columns} for row in chosen]


def score(task: str, answer: str | None, entry: Entry) -> float:
    """reasoning-gym's graded score of `answer`, in [0, 1]; 0 where there is no answer."""
    if answer is None:
        return 0.0
    return float(_scorer(task).score_answer(answer, entry))


@dataclass(frozen=True)
class TaskScore:
    """Reward: the graded score of the final answer times the points of its task.

    Reads the columns ``answer``, ``task`` and, when present, ``metadata`` (JSON) and ``points``. A row whose task is
    no reasoning-gym family is scored by exact match of the stripped answer. Range ``[0, points]``. Raises
    `MissingColumnError` without answers.
    """

    __name__ = "task_score"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion."""
        count = len(completions)
        if "answer" not in columns:
            raise MissingColumnError(
                f"the reward 'task_score' reads the column 'answer'{nearest('answer', columns)}; "
                "map it with --column answer=NAME, or score with a reward of your own"
            )
        answers = columns["answer"]
        tasks = columns.get("task") or [None] * count
        metadata = columns.get("metadata") or [None] * count
        points = columns.get("points") or [1.0] * count
        known = _datasets()
        values: list[float | None] = []
        for completion, answer, task, details, mark in zip(completions, answers, tasks, metadata, points, strict=True):
            given = final_answer(completion)
            if task in known and details:
                value = score(task, given, {"answer": answer, "metadata": _parse(details)})
            else:
                value = float(given == str(answer).strip())
            values.append(value * (1.0 if mark is None else float(mark)))
        return values


@dataclass(frozen=True)
class ToolCost:
    """Reward: minus `cost` for each tool call that was answered. Range ``(-inf, 0]``."""

    cost: float = 0.1
    tools: tuple[str, ...] = tuple(TOOLS)
    __name__ = "tool_cost"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion."""
        from polyreward.tasks.tools import text_of

        box = ToolBox.of(self.tools)
        return [-self.cost * box.calls(text_of(completion)) for completion in completions]


@dataclass(frozen=True)
class AnswerFormat:
    """Reward: 1 where the only ``<answer>...</answer>`` ends the completion, 0.5 where more follows it, else 0."""

    __name__ = "answer_format"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion."""
        from polyreward.tasks.tools import text_of

        return [_format_of(text_of(completion).strip()) for completion in completions]


def _format_of(text: str) -> float:
    complete = text.count("<answer>") == 1 == text.count("</answer>") and final_answer(text) not in (None, "")
    if complete and text.endswith("</answer>"):
        return 1.0
    return 0.5 if final_answer(text) else 0.0


def compact_prompt(task: str, entry: Entry) -> str:
    """The problem in as few characters as a small policy needs: ``chain_sum 12+7-3:``."""
    form = own.prompt if (own := own_task(task)) is not None else _COMPACT.get(task)
    return f"{task} {form(entry) if form else entry['question'].strip()}:"


def question_prompt(task: str, entry: Entry) -> str:
    """The problem in full words, with the answer and tool protocol explained where it is reasoning-gym's."""
    if task in OWN_TASKS:
        return f"{entry['question']}\n"
    return f"{entry['question'].strip()}\n{INSTRUCTION}\n"


def words_of(tasks: Sequence[str]) -> list[str]:
    """Texts that a small tokenizer for these families should know as one token, such as ``Praying Mantis``."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    own = [word for task in tasks if (found := own_task(task)) is not None for word in found.words]
    return [*own, *(name.title() for name in ANIMALS)]


def solution(task: str, entry: Entry, rng: random.Random, noise: float) -> str:
    """A worked solution for the warm start, of mixed quality.

    With probability `noise` it guesses instead of working the problem out, and with half of it the format is
    broken; a warm start on such traces gives a policy that knows every move and prefers none of the good ones.
    """
    if (own := own_task(task)) is not None:
        return own.solution(entry, rng, noise)
    work = _work(task, entry)
    answer = _guess(entry["answer"], rng) if rng.random() < noise else entry["answer"]
    if answer != entry["answer"] or rng.random() < noise / 2:
        work = []
    elif work and rng.random() < noise / 2:
        work = [*work, work[-1]]
    box = ToolBox(TOOLS)
    text = "".join(call + (box.respond(call) or "") for call in work)
    return text + (answer if rng.random() < noise / 2 else f"<answer>{answer}</answer>")


def _work(task: str, entry: Entry) -> list[str]:
    details = entry["metadata"]
    if task in ("chain_sum", "products"):
        return [f"<calc>{details['expression'].replace(' ', '')}</calc>"]
    if task == "leg_counting":
        from reasoning_gym.arithmetic.leg_counting import ANIMALS

        animals = details["animals"]
        lookups = [f"<search>{name.title()}</search>" for name in animals]
        expression = "+".join(f"{count}*{ANIMALS[name]}" for name, count in animals.items())
        return [*lookups, f"<calc>{expression}</calc>"]
    return []


def _guess(answer: str, rng: random.Random) -> str:
    """A wrong answer of the right shape: one character replaced, or two letters swapped."""
    letters = list(answer)
    at = rng.randrange(len(letters))
    if letters[at].isdigit():
        letters[at] = rng.choice("0123456789")
    else:
        other = rng.randrange(len(letters))
        letters[at], letters[other] = letters[other], letters[at]
    return "".join(letters)


def _legs(entry: Entry) -> str:
    return ",".join(f"{count} {name.title()}" for name, count in entry["metadata"]["animals"].items())


_COMPACT: dict[str, Callable[[Entry], str]] = {
    "chain_sum": lambda entry: entry["metadata"]["expression"].replace(" ", ""),
    "products": lambda entry: entry["metadata"]["expression"].replace(" ", ""),
    "leg_counting": _legs,
    "spell_backward": lambda entry: entry["metadata"]["word"].lower(),
    "palindrome_generation": lambda entry: "".join(entry["metadata"]["letters"]),
}


def _parse(details: Any) -> dict[str, Any]:
    return json.loads(details) if isinstance(details, str) else dict(details)


@functools.cache
def _scorer(task: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, size=1, seed=0)


@functools.cache
def _datasets() -> frozenset[str]:
    from reasoning_gym.factory import DATASETS

    return frozenset(DATASETS)
