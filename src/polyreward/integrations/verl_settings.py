"""The part of verl's configuration that is ours: ``algorithm.polyreward``.

verl hands ``algorithm`` to the estimators as Hydra made it and never turns it into a dataclass, so keys that verl does
not know are allowed there (with a ``+`` on the command line); in ``actor_rollout_ref.actor`` they are not. Everything
is therefore read from one place, on the driver:

    +algorithm.polyreward.rewards=[accuracy,format]       K rewards instead of the one score
    +algorithm.polyreward.parameters.blend=0.5            parameters of the preset
    +algorithm.polyreward.columns.task=ability            where a column of the batch comes from
    +algorithm.polyreward.trust_region.micro=0.5          elasticities of the policy loss polyreward-etr
    +algorithm.polyreward.rollout_log=runs/a/rollouts     the log that ``polyreward diagnose`` reads

Nothing here imports verl.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from polyreward.advantages.presets import PRESETS, preset
from polyreward.advantages.transform import Transform
from polyreward.errors import InvalidInputError, PolyrewardError, UnknownNameError, nearest
from polyreward.objectives.presets import make_objective
from polyreward.objectives.trust_region import ElasticTrustRegion

SECTION = "algorithm.polyreward"
PREFIX = "polyreward-"
"""Registered names are this and the name of a preset: ``polyreward-gaussian-grpo``."""

POLICY_LOSS = PREFIX + "etr"
"""Name of the policy loss with the elastic trust region."""


@dataclass(frozen=True)
class Settings:
    """What ``algorithm.polyreward`` holds.

    Attributes
    ----------
    rewards : names of the per-sample fields that are the rewards; empty: the score alone
    parameters : parameters of the preset
    columns : column of the batch to the per-sample field it comes from
    trust_region : parameters of the elastic trust region
    rollout_log : folder of the rollout log, or None
    """

    rewards: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    trust_region: Mapping[str, Any] = field(default_factory=dict)
    rollout_log: str | None = None


def read_settings(algorithm: Any) -> Settings:
    """Read the settings from verl's ``algorithm`` section (a mapping or verl's own config class), or from None.

    verl's ``gdpo_reward_keys`` and ``gdpo_reward_weights`` stand in for `rewards` and the parameter ``weights`` where
    these are not given.

    Raises
    ------
    UnknownNameError
        A key that does not exist; the message offers the nearest one.
    InvalidInputError
        A value of another kind.
    """
    section = _plain(_get(algorithm, "polyreward") or {})
    if not isinstance(section, dict):
        raise InvalidInputError(f"{SECTION} must be a table, got {section!r}")
    known = [item.name for item in fields(Settings)]
    for key in section:
        if key not in known:
            raise UnknownNameError(f"{SECTION} has no key {key!r}{nearest(str(key), known)}")
    for key in ("parameters", "columns", "trust_region"):
        section[key] = section.get(key) or {}
        if not isinstance(section[key], dict):
            raise InvalidInputError(f"{SECTION}.{key} must be a table, got {section[key]!r}")
    rewards = section.get("rewards") or _plain(_get(algorithm, "gdpo_reward_keys")) or []
    if not isinstance(rewards, list) or not all(isinstance(name, str) for name in rewards):
        raise InvalidInputError(f"{SECTION}.rewards must be a list of names, got {rewards!r}")
    weights = _plain(_get(algorithm, "gdpo_reward_weights"))
    if weights is not None:
        section["parameters"] = {"weights": weights, **section["parameters"]}
    return Settings(**{**section, "rewards": tuple(rewards)})


def make_transform(name: str, settings: Settings, algorithm: Any) -> Transform:
    """The preset `name` with the parameters of the settings.

    ``norm_adv_by_std_in_grpo`` is the parameter ``scale`` of the presets that have one, unless it is given.

    Raises
    ------
    UnknownNameError, InvalidInputError
        A parameter that the preset does not have or cannot take.
    """
    parameters = dict(settings.parameters)
    if "scale" in inspect.signature(PRESETS[name]).parameters:
        parameters.setdefault("scale", bool(_get(algorithm, "norm_adv_by_std_in_grpo", True)))
    gamma = _get(algorithm, "gamma", 1.0)
    if name == "reinforce-plus-plus-verl" and gamma != 1:
        raise InvalidInputError(
            f"{PREFIX}{name} has no discount, but algorithm.gamma is {gamma}; set algorithm.gamma=1"
        )
    if settings.rewards and _get(algorithm, "use_kl_in_reward", False):
        raise InvalidInputError(
            f"{SECTION}.rewards and algorithm.use_kl_in_reward exclude each other: the penalty is in the score, not in "
            "the rewards; use actor_rollout_ref.actor.use_kl_loss"
        )
    try:
        return preset(name, **parameters)
    except PolyrewardError as error:
        raise type(error)(f"{SECTION}.parameters: {error}") from error
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{SECTION}.parameters of {name!r}: {error}") from error


def make_trust_region(settings: Settings, actor: Any) -> ElasticTrustRegion:
    """The elastic trust region around the clip ratios of verl's ``actor_rollout_ref.actor``.

    Raises
    ------
    UnknownNameError, InvalidInputError
        A parameter that the trust region does not have or cannot take, ``low`` and ``high`` among them.
    """
    given = dict(settings.trust_region)
    for side in ("low", "high"):
        if side in given:
            raise InvalidInputError(f"{SECTION}.trust_region.{side}: set actor_rollout_ref.actor.clip_ratio_{side}")
        ratio = _get(actor, f"clip_ratio_{side}")
        given[side] = float(_get(actor, "clip_ratio") if ratio is None else ratio)
    try:
        region = make_objective({"trust_region": {"kind": "elastic", **given}}).trust_region
    except PolyrewardError as error:
        raise type(error)(f"{SECTION}.trust_region: {error}") from error
    assert isinstance(region, ElasticTrustRegion)
    return region


def _get(config: Any, key: str, default: Any = None) -> Any:
    return default if config is None else config.get(key, default)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
