"""Task family `call_tools`: turn a request into tool calls with the right names, parameters and values.

The reference is written in the form of ToolRL (arXiv 2504.13958): ``<think>``, then ``<tool_call>`` with one JSON
object a line.
"""

from __future__ import annotations

import json
import random
from typing import Any

from polyreward.errors import InvalidInputError
from polyreward.tasks.own import Entry, OwnTask

_CITIES = ("Oslo", "Rome", "Lima", "Cairo", "Delhi", "Quito")
_DAYS = ("Monday", "Tuesday", "Friday", "Sunday")
_PEOPLE = ("Anna", "Ben", "Chen", "Dora")
_TOOLS: dict[str, dict[str, tuple[str, ...]]] = {
    "weather": {"city": _CITIES, "day": _DAYS},
    "route": {"origin": _CITIES, "target": _CITIES},
    "remind": {"person": _PEOPLE, "day": _DAYS},
    "convert": {"amount": ("5", "10", "20", "50"), "currency": ("euro", "peso", "krone")},
}
_REQUESTS = {
    "weather": "rain in {city} on {day}?",
    "route": "way from {origin} to {target}?",
    "remind": "tell {person} on {day}",
    "convert": "change {amount} to {currency}",
}
_THINK, _CALL, _END = "<think>call</think>\n<tool_call>\n", '{"name": "', "\n</tool_call>"
_PARAMETERS, _CLOSE = '", "parameters": {', '"}}'


def problem(rng: random.Random, *, calls: int) -> Entry:
    """A request that needs one to `calls` calls of different tools."""
    if not 1 <= calls <= len(_TOOLS):
        raise InvalidInputError(f"expected calls from 1 to {len(_TOOLS)}")
    chosen = rng.sample(sorted(_TOOLS), rng.randint(1, calls))
    wanted: list[dict[str, Any]] = [
        {"name": tool, "parameters": {name: rng.choice(values) for name, values in _TOOLS[tool].items()}}
        for tool in chosen
    ]
    request = "; ".join(_REQUESTS[call["name"]].format(**call["parameters"]) for call in wanted)
    tools = "; ".join(f"{name}({', '.join(parameters)})" for name, parameters in _TOOLS.items())
    return {
        "question": f"Tools: {tools}. Request: {request}. Think in <think>...</think>, then give the calls in "
        '<tool_call>...</tool_call>, one JSON object {"name": ..., "parameters": {...}} a line.',
        "answer": _text(wanted),
        "metadata": {"request": request, "calls": wanted},
        "columns": {},
    }


def prompt(entry: Entry) -> str:
    """The request."""
    return str(entry["metadata"]["request"])


def solution(entry: Entry, rng: random.Random, noise: float) -> str:
    """The calls; with probability `noise` one has a wrong tool, parameter or value, or is missing."""
    calls = json.loads(json.dumps(entry["metadata"]["calls"]))
    if rng.random() < noise:
        call = rng.choice(calls)
        kind = rng.randrange(4)
        if kind == 0 and len(calls) > 1:
            calls.remove(call)
        elif kind == 1:
            call["name"] = rng.choice(sorted(_TOOLS))
        elif kind == 2:
            old = rng.choice(sorted(call["parameters"]))
            value = call["parameters"].pop(old)
            call["parameters"][rng.choice(["city", "day", "person", "target"])] = value
        else:
            name = rng.choice(sorted(call["parameters"]))
            call["parameters"][name] = rng.choice((*_CITIES, *_DAYS, *_PEOPLE))
    text = _text(calls)
    return text.removesuffix(_END) if rng.random() < noise / 4 else text


def _text(calls: list[dict[str, Any]]) -> str:
    return _THINK + "\n".join(json.dumps(call) for call in calls) + _END


TASK = OwnTask(
    problem,
    prompt,
    solution,
    words=(
        *(_THINK, _CALL, _END, _PARAMETERS, _CLOSE, '": "', '", "'),
        *dict.fromkeys(name for tool in _TOOLS.values() for name in tool),
        *(word for word in (*_CITIES, *_DAYS, *_PEOPLE)),
        *_TOOLS,
        *("rain in ", "way from ", "tell ", "change ", " on ", " to ", "euro", "peso", "krone"),
    ),
    options={"calls": 2},
)
