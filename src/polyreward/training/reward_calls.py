"""What a training loop asks of reward functions: values that fit, and weights that are set in one place."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from trl.trainer.utils import is_async_callable

from polyreward.advantages.transform import Transform
from polyreward.errors import InvalidInputError
from polyreward.rewards.contract import as_list, check_values, needed_columns, refuse_missing


def checked_reward(reward: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wrap a reward function (or coroutine function) so that a wrong result is one error that names the reward.

    The wrapped reward raises `InvalidInputError` for a result that is not one finite number or None a completion, and
    gives None in place of NaN. Its time goes to the trainer's metrics as ``reward_seconds/NAME``.
    """
    needed = needed_columns(reward)
    if is_async_callable(reward):

        async def call_later(*args: Any, **kwargs: Any) -> list[float | None]:
            refuse_missing(name, needed, kwargs)
            begin = time.perf_counter()
            return _checked(await reward(*args, **kwargs), name, kwargs, time.perf_counter() - begin)

        return functools.update_wrapper(call_later, reward, updated=())

    def call(*args: Any, **kwargs: Any) -> list[float | None]:
        refuse_missing(name, needed, kwargs)
        begin = time.perf_counter()
        return _checked(reward(*args, **kwargs), name, kwargs, time.perf_counter() - begin)

    return functools.update_wrapper(call, reward, updated=())


def _checked(result: Any, name: str, kwargs: Mapping[str, Any], seconds: float) -> list[float | None]:
    values = as_list(check_values(result, len(kwargs["completions"]), name))
    if callable(log_metric := kwargs.get("log_metric")):
        log_metric(f"reward_seconds/{name}", seconds)
    return values


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
