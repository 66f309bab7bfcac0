"""Presets as verl's advantage estimators, with their memory.

An estimator gets verl's tensors, makes the record of them, runs the preset and spreads the advantage of a sample over
its response tokens. The samples' fields, which verl does not hand over, come from `known_samples` around the call. A
preset with memory is made once a process (verl computes advantages in its driver only) and keeps it; `save_state` and
`load_state` put it into a file.

Nothing here imports verl.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from polyreward.advantages.presets import PRESETS
from polyreward.advantages.transform import Transform, compute_advantages
from polyreward.errors import InvalidInputError, MissingColumnError, MissingFileError, UnknownNameError, nearest
from polyreward.integrations.verl_samples import Samples, reward_batch
from polyreward.integrations.verl_settings import PREFIX, SECTION, make_transform, read_settings
from polyreward.storage import write_json

Estimator = Callable[..., tuple[Tensor, Tensor]]

_SAMPLES: ContextVar[Samples | None] = ContextVar("polyreward_samples", default=None)
_MADE: dict[str, tuple[str, Transform]] = {}
_RESTORED: dict[str, dict[str, Any]] = {}


def estimator(name: str) -> Estimator:
    """The preset `name` as a function that verl's registry takes.

    ``estimator(token_level_rewards, response_mask, config=None, index=None, non_tensor_batch=None)`` returns advantages
    and returns, the same tensor (N, T) in the dtype of the rewards: the sample's advantage at its response tokens, 0
    elsewhere. The score of a sample is the sum of its token-level rewards.
    """

    def estimate(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        config: Any = None,
        index: Sequence[Any] | np.ndarray | None = None,
        non_tensor_batch: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        samples = _SAMPLES.get() if non_tensor_batch is None else Samples(non_tensor_batch)
        settings, samples = read_settings(config), samples or Samples()
        batch = reward_batch(
            token_level_rewards.detach().sum(dim=-1), response_mask.sum(dim=-1), index, samples, settings
        )
        try:
            advantages = compute_advantages(transform_of(name, config), batch)
        except MissingColumnError as error:
            raise MissingColumnError(
                f"{PREFIX}{name}: {error}; name its field with +{SECTION}.columns.<column>=<field>. "
                f"Fields: {', '.join(samples.names()) or 'none reached the estimator'}"
            ) from error
        spread = samples.spread(advantages).to(token_level_rewards.dtype).unsqueeze(-1) * response_mask
        return spread, spread

    estimate.__name__ = estimate.__qualname__ = f"compute_{name.replace('-', '_')}_advantage"
    estimate.__doc__ = f"Advantages of polyreward's preset {name!r}. {PRESETS[name].__doc__}"
    return estimate


ESTIMATORS: dict[str, Estimator] = {PREFIX + name: estimator(name) for name in PRESETS}
"""Every estimator by the name it is registered under."""


def transform_of(name: str, algorithm: Any) -> Transform:
    """The transform that the estimator of preset `name` runs under verl's ``algorithm`` section, made on first use."""
    settings = read_settings(algorithm)
    if name not in PRESETS:
        raise UnknownNameError(f"no preset {name!r}{nearest(name, PRESETS)}")
    transform = make_transform(name, settings, algorithm)
    made_from = repr(transform)
    if name not in _MADE or _MADE[name][0] != made_from:
        if name in _RESTORED:
            transform.load_state_dict(_RESTORED[name])
        _MADE[name] = (made_from, transform)
    return _MADE[name][1]


@contextmanager
def known_samples(samples: Samples) -> Iterator[None]:
    """Estimators called inside read rewards and columns from `samples`."""
    token = _SAMPLES.set(samples)
    try:
        yield
    finally:
        _SAMPLES.reset(token)


def state_dict() -> dict[str, Any]:
    """Memory of every preset used in this process, as plain data; presets without memory are left out."""
    states = {name: transform.state_dict() for name, (_, transform) in _MADE.items()}
    return {**_RESTORED, **{name: state for name, state in states.items() if state}}


def load_state_dict(state: Mapping[str, Any]) -> None:
    """Take back what `state_dict` returned, in place of all memory of this process.

    Raises
    ------
    UnknownNameError
        A name that no preset has.
    """
    for name in state:
        if name not in PRESETS:
            raise UnknownNameError(f"the state names preset {name!r}{nearest(name, PRESETS)}")
    _MADE.clear()
    _RESTORED.clear()
    _RESTORED.update(state)


def save_state(path: str | Path) -> Path:
    """Write `state_dict` to a JSON file, whole or not at all."""
    return write_json(path, state_dict())


def load_state(path: str | Path) -> None:
    """Read what `save_state` wrote.

    Raises
    ------
    MissingFileError, InvalidInputError
        No such file, or no such content.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"no such file: {path}")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{path} is not valid JSON: {error.msg}") from error
    if not isinstance(state, dict):
        raise InvalidInputError(f"{path} holds a {type(state).__name__}, expected a table of presets")
    load_state_dict(state)
