"""What a training loop asks of reward functions: values that fit, and weights that are set in one place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
from trl.trainer.utils import is_async_callable

from polyreward.advantages.transform import Transform
from polyreward.errors import InvalidInputError


def checked_reward(reward: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wrap a reward function (or coroutine function) so that a wrong result is one error that names the reward.

    The wrapped reward raises `InvalidInputError` for a result that is not a list of one number or None a completion.
    """
    if is_async_callable(reward):

        async def call_later(*args: Any, **kwargs: Any) -> list[float | None]:
            return _check(await reward(*args, **kwargs), len(kwargs["completions"]), name)

        return functools.update_wrapper(call_later, reward, updated=())

    def call(*args: Any, **kwargs: Any) -> list[float | None]:
        return _check(reward(*args, **kwargs), len(kwargs["completions"]), name)

    return functools.update_wrapper(call, reward, updated=())


def with_reward_weights(transform: Transform, weights: Mapping[str, float]) -> Transform:
    """Give a transform the trainer's reward weights.

    Every part with a field ``weights`` that is None takes them; one with weights of its own must agree.

    Raises
    ------
    InvalidInputError
        Weights other than 1 are set for the trainer, and the transform has different ones or no part that takes them.
    """
    if all(weight == 1 for weight in weights.values()):
        return transform
    weighted, found = _weighted(transform, dict(weights))
    if not found:
        raise InvalidInputError(
            f"reward_weights={list(weights.values())} is set, but no part of the advantage takes weights; "
            "start its chain with WeightedSum() or leave reward_weights out"
        )
    return weighted


def _check(values: Any, expected: int, name: str) -> list[float | None]:
    try:
        values = list(values)
    except TypeError:
        raise InvalidInputError(
            f"reward {name!r} returned {type(values).__name__}, expected a list of {expected} numbers or None"
        ) from None
    if len(values) != expected:
        raise InvalidInputError(f"reward {name!r} returned {len(values)} values for {expected} completions")
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, int | float | np.number | np.bool_):
            if not (hasattr(value, "item") and getattr(value, "numel", lambda: 0)() == 1):
                raise InvalidInputError(f"reward {name!r} returned {value!r} for completion {row}, expected a number")
            values[row] = value.item()
    return values


def _weighted(part: Any, weights: dict[str, float]) -> tuple[Any, bool]:
    """The part with the weights filled in, and whether it takes any."""
    if isinstance(part, tuple) and any(isinstance(p, Transform) for p in part):
        results = [_weighted(p, weights) for p in part]
        found = any(f for _, f in results)
        changed = any(new is not old for (new, _), old in zip(results, part, strict=True))
        return (tuple(new for new, _ in results) if changed else part), found
    if not (isinstance(part, Transform) and is_dataclass(part)):
        return part, False
    changes: dict[str, Any] = {}
    found = False
    for item in fields(part):
        value = getattr(part, item.name)
        if item.name == "weights" and item.init:
            found = True
            if value is None:
                changes["weights"] = weights
            elif _numbers(value, weights) != list(weights.values()):
                raise InvalidInputError(
                    f"reward_weights={list(weights.values())} and the {value} of {type(part).__name__} differ; "
                    "set them in one place"
                )
        elif item.init:
            new, inside = _weighted(value, weights)
            found = found or inside
            if new is not value:
                changes[item.name] = new
    return (replace(part, **changes) if changes else part), found


def _numbers(value: Mapping[str, float] | Sequence[float], names: Mapping[str, float]) -> list[float | None]:
    return [value.get(name) for name in names] if isinstance(value, Mapping) else [float(v) for v in value]
