"""Rewards for tool calls: format, correctness and cost (ToolRL: Reward is All Tool Learning Needs, arXiv 2504.13958).

The reference is the text of a right answer, with ``<tool_call>`` (one JSON object a line with "name" and "parameters")
and ``<response>``, or a list of calls. The model writes ``<think>...</think>`` and then the same blocks. The paper's
reward is format in [0, 1] plus correctness in [-3, 3], which `toolrl` puts together; what correctness means stands in
`polyreward.rewards.tool_matching`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyreward.errors import InvalidInputError
from polyreward.rewards.composition import weighted_sum
from polyreward.rewards.contract import Reward, Sample, is_finite
from polyreward.rewards.length import ThinkLengthReward
from polyreward.rewards.schedules import Scale, Schedule, as_schedule, limits_at
from polyreward.rewards.tool_matching import (
    Granularity,
    Matching,
    ToolCall,
    ToolCallScore,
    check_options,
    score_tool_calls,
)

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_THINK, _CALLS, _RESPONSE = "<think>.*?</think>", r"\n<tool_call>\n.*?\n</tool_call>", r"\n<response>.*?</response>"


@dataclass(frozen=True)
class ParseError:
    """Why a text holds no readable tool calls. `line` counts from 1 inside the block; 0 where there is no block."""

    reason: str
    line: int = 0


def parse_tool_calls(text: str) -> list[ToolCall] | ParseError:
    """The calls in the first ``<tool_call>`` block.

    Every line must be a JSON object with a text "name" and an object "parameters" ("arguments" is not read); further
    keys are ignored, of a repeated key the last counts. Blank lines inside the block, an empty block and a missing tag
    are errors, as in the paper's code.
    """
    if OPEN not in text:
        return ParseError(f"no {OPEN}")
    if CLOSE not in text:
        return ParseError(f"no {CLOSE}")
    block = text.split(OPEN)[1].split(CLOSE)[0].strip()
    if not block:
        return ParseError("the block is empty")
    calls = []
    for number, line in enumerate(block.split("\n"), start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return ParseError("the line is not JSON", number)
        call = _as_call(value)
        if isinstance(call, str):
            return ParseError(call, number)
        calls.append(call)
    return calls


def reference_calls(answer: Any) -> list[ToolCall] | None:
    """The calls of a reference; None for a text without a tool call.

    Parameters
    ----------
    answer : str, or list of `ToolCall` or of mappings with "name" and "parameters"

    Raises
    ------
    InvalidInputError
        A block that cannot be read, an empty one included, or an entry that is no call.
    """
    if isinstance(answer, str):
        if OPEN not in answer:
            return None
        calls = parse_tool_calls(answer if CLOSE in answer else answer + CLOSE)
        if isinstance(calls, ParseError):
            raise InvalidInputError(f"the reference has a bad tool call, line {calls.line}: {calls.reason}")
        return calls
    if not isinstance(answer, Sequence):
        raise InvalidInputError(f"the reference must be a text or a list of calls, got {type(answer).__name__}")
    found = []
    for entry in answer:
        call = entry if isinstance(entry, ToolCall) else _as_call(entry)
        if isinstance(call, str):
            raise InvalidInputError(f"the reference has a bad tool call: {call}")
        found.append(call)
    return found or None


@dataclass(frozen=True)
class ToolCallReward(Reward):
    """Correctness of tool calls, graded by names, parameter names and values (ToolRL, arXiv 2504.13958).

    Parameters
    ----------
    column : str
        Column of the reference: text or list of calls, see `reference_calls`.
    granularity : "fine", "refined", "intermediate" or "coarse"
    matching : "greedy" (as released) or "optimal" (as written in the paper)
    limits : (low, high), "default", "equal", "two_stage", "dynamic", or a `Schedule`
        Range of the reward. The last three named ones and most schedules need the training step.

    A reference without a tool call gives exactly 0, whatever the model does: calling a tool without need costs nothing
    here, only in the format. Unreadable predictions earn the lower limit, also where only a call that no reference call
    would be compared with lacks its parameters (the released code grades those). A completion whose messages carry
    structured ``tool_calls`` is scored by these.

    Range: [low, high], and 0.
    """

    column: str = "answer"
    granularity: Granularity = "fine"
    matching: Matching = "greedy"
    limits: Schedule | str | Sequence[float] = "default"

    def __post_init__(self) -> None:
        check_options(self.granularity, self.matching)
        object.__setattr__(self, "limits", as_schedule(self.limits, "correctness"))

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the reference."""
        return (self.column,)

    def score(self, sample: Sample) -> float:
        """Value of one completion."""
        found = self.explain(sample)
        return 0.0 if found is None else found.total

    def explain(self, sample: Sample) -> ToolCallScore | None:
        """The score with its parts and, for an unreadable prediction, the reason; None without a reference call."""
        low, high = limits_at(self.limits, sample.step, self.__name__)  # type: ignore[arg-type]
        try:
            wanted = reference_calls(sample.columns[self.column])
        except InvalidInputError as error:
            raise self.refuse(sample, self.column, str(error)) from error
        if wanted is None:
            return None
        given = predicted_calls(sample)
        if isinstance(given, ParseError):
            return ToolCallScore(low, reason=f"line {given.line}: {given.reason}" if given.line else given.reason)
        return score_tool_calls(wanted, given, low, high, self.granularity, self.matching)


@dataclass(frozen=True)
class ToolFormatReward(Reward):
    """Whether the completion has the blocks that its reference has, in order (ToolRL, arXiv 2504.13958).

    ``<think>`` always comes first; then ``<tool_call>`` and ``<response>`` where the reference has them, each on a new
    line and exactly once, calls between line breaks. One line break may follow the end. The tags of the thinking are
    not counted, as in the released code.

    Parameters
    ----------
    column : str
        Column of the reference: a text with tags, or a list of calls.
    limits : (low, high), "default", "equal", "two_stage", "dynamic", or a `Schedule`

    Range: low or high; 0 or 1 by default.
    """

    column: str = "answer"
    limits: Schedule | str | Sequence[float] = "default"

    def __post_init__(self) -> None:
        object.__setattr__(self, "limits", as_schedule(self.limits, "format"))

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the reference."""
        return (self.column,)

    def score(self, sample: Sample) -> float:
        """Lower or upper limit."""
        low, high = limits_at(self.limits, sample.step, self.__name__)  # type: ignore[arg-type]
        answer = sample.columns[self.column]
        if not isinstance(answer, str):
            try:
                answer = OPEN if reference_calls(answer) else ""
            except InvalidInputError as error:
                raise self.refuse(sample, self.column, str(error)) from error
        return high if matches_format(sample.text, OPEN in answer, "<response>" in answer) else low


def matches_format(text: str, calls: bool, response: bool) -> bool:
    """Whether `text` is thinking, then a block of calls and a response where these are asked for."""
    pattern = f"^{_THINK}{_CALLS if calls else ''}{_RESPONSE if response else ''}$"
    once = [f"{bracket}{tag}>" for tag, used in (("tool_call", calls), ("response", response)) if used
            for bracket in ("<", "</")]  # fmt: skip
    return all(text.count(mark) == 1 for mark in once) and re.search(pattern, text, re.DOTALL) is not None


@dataclass(frozen=True)
class ToolUseCost(Reward):
    """``-cost`` for each tool call beyond `free` (tool productivity, OTC-PO, arXiv 2504.14870, in its simplest form).

    Calls are lines in ``<tool_call>`` blocks, or the structured ``tool_calls`` of the messages, readable or not.

    Parameters
    ----------
    cost : float >= 0, finite
    free : int >= 0
        Calls that cost nothing.
    most : int or None
        Calls beyond this number cost nothing more, which bounds the reward.

    Range: (-inf, 0], or [-cost * (most - free), 0].
    """

    cost: float = 0.1
    free: int = 0
    most: int | None = None

    def __post_init__(self) -> None:
        most = self.free if self.most is None else self.most
        if not all(map(is_finite, (self.cost, self.free, most))) or self.cost < 0 or not 0 <= self.free <= most:
            raise InvalidInputError(f"expected finite numbers with cost >= 0 and 0 <= free <= most, got {self}")

    def score(self, sample: Sample) -> float:
        """Value of one completion."""
        calls = count_calls(sample)
        if self.most is not None:
            calls = min(calls, self.most)
        return -self.cost * max(calls - self.free, 0) + 0.0


def toolrl(
    scale: Scale = "default",
    granularity: Granularity = "fine",
    matching: Matching = "greedy",
    think_length: str | None = None,
    column: str = "answer",
    name: str = "toolrl",
) -> Reward:
    """The reward of ToolRL (arXiv 2504.13958): format plus correctness, plus the thinking's length where asked for.

    Parameters
    ----------
    think_length : None, "static" or "dynamic"
    """
    terms: list[Reward] = [ToolFormatReward(column, scale), ToolCallReward(column, granularity, matching, scale)]
    if think_length not in (None, "static", "dynamic"):
        raise InvalidInputError(f"think_length must be None, 'static' or 'dynamic', got {think_length!r}")
    if think_length is not None:
        terms.append(ThinkLengthReward(dynamic=think_length == "dynamic"))
    return weighted_sum(*terms, name=name)


def predicted_calls(sample: Sample) -> list[ToolCall] | ParseError:
    """The calls of a completion: the structured ones of its messages, or those in its text."""
    structured = _structured(sample.completion)
    if not structured:
        return parse_tool_calls(sample.text)
    calls = []
    for number, entry in enumerate(structured, start=1):
        function = entry.get("function", entry) if isinstance(entry, Mapping) else entry
        if isinstance(function, Mapping) and "arguments" in function:
            function = {"name": function.get("name"), "parameters": _decoded(function["arguments"])}
        call = _as_call(function)
        if isinstance(call, str):
            return ParseError(call, number)
        calls.append(call)
    return calls


def count_calls(sample: Sample) -> int:
    """Number of tool calls of a completion, readable or not."""
    blocks = re.findall(r"<tool_call>(.*?)(?:</tool_call>|$)", sample.text, re.DOTALL)
    lines = sum(len([line for line in block.split("\n") if line.strip()]) for block in blocks)
    return lines + len(_structured(sample.completion))


def _structured(completion: Any) -> list[Any]:
    if not isinstance(completion, list | tuple):
        return []
    found: list[Any] = []
    for message in completion:
        calls = message.get("tool_calls") if isinstance(message, Mapping) else None
        found.extend(calls if isinstance(calls, list | tuple) else [])
    return found


def _decoded(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return None


def _as_call(value: Any) -> ToolCall | str:
    """A call from parsed JSON, or what is wrong with it."""
    if not isinstance(value, Mapping):
        return "the line is not an object"
    if not isinstance(value.get("name"), str):
        return "'name' is missing or not a text"
    if not isinstance(value.get("parameters"), Mapping):
        return "'parameters' is missing or not an object"
    return ToolCall(value["name"], value["parameters"])
