"""Published objectives by name, and objectives to and from plain data.

``make_objective`` reads what a recipe holds: a preset's name, a mapping with ``preset`` and its options, or the full
description that ``objective_config`` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from inspect import Parameter, signature
from typing import Any, Literal

from polyreward.errors import InvalidInputError, PolyrewardError, UnknownNameError, nearest
from polyreward.objectives.divergence import KLPenalty
from polyreward.objectives.entropy import EntropyBonus, EntropyHinge
from polyreward.objectives.likelihood import likelihood_objective
from polyreward.objectives.surrogate import PolicyObjective
from polyreward.objectives.trust_region import ElasticTrustRegion, FixedClip


def grpo_objective(low: float = 0.2, high: float = 0.2, kl: float = 0.0) -> PolicyObjective:
    """GRPO (arXiv 2402.03300): token ratio, mean over sequences of token means. The paper's KL weight is 0.04."""
    return PolicyObjective(FixedClip(low, high), kl=_penalty(kl))


def token_mean_objective(low: float = 0.2, high: float = 0.2, kl: float = 0.0) -> PolicyObjective:
    """GRPO's surrogate averaged over all tokens: verl's default, ToolRL (arXiv 2504.13958), ``bnpo`` in TRL."""
    return PolicyObjective(FixedClip(low, high), aggregation="token-mean", kl=_penalty(kl))


def dapo_objective(low: float = 0.2, high: float = 0.28) -> PolicyObjective:
    """DAPO (arXiv 2503.14476): clip-higher and mean over all tokens, no KL."""
    return PolicyObjective(FixedClip(low, high), aggregation="token-mean")


def dr_grpo_objective(max_length: int, low: float = 0.2, high: float = 0.2) -> PolicyObjective:
    """Dr. GRPO (arXiv 2503.20783): sum over tokens divided by the largest response length `max_length`, no KL."""
    return PolicyObjective(FixedClip(low, high), aggregation="fixed-length", length=max_length)


def gspo_objective(low: float = 3e-4, high: float = 4e-4) -> PolicyObjective:
    """GSPO (arXiv 2507.18071): ratio of the sequence, mean over sequences."""
    return PolicyObjective(FixedClip(low, high), ratio="sequence")


def etr_objective(
    micro: float | None = None,
    macro: float | None = None,
    low: float = 0.2,
    high: float = 0.2,
    form: Literal["bounded", "proportional", "additive"] = "bounded",
    minimum: float = 0.02,
    maximum: float = 0.8,
    reward_range: tuple[float, float] | None = (0.0, 1.0),
    weights: Mapping[str, float] | None = None,
    kl: float = 0.0,
) -> PolicyObjective:
    """ETR (arXiv 2601.03723): GRPO's loss, averaged over tokens, in an `ElasticTrustRegion`."""
    region = ElasticTrustRegion(form, low, high, micro, macro, minimum, maximum, reward_range, weights)
    return PolicyObjective(region, aggregation="token-mean", kl=_penalty(kl))


def ema_grpo_objective(kl: float = 0.01) -> PolicyObjective:
    """OneThinker (arXiv 2512.03043): clip 0.2 and 0.3, dual clip 3, token mean, k3 penalty 0.01."""
    return PolicyObjective(FixedClip(0.2, 0.3), aggregation="token-mean", kl=_penalty(kl), dual_clip=3.0)


def gaussian_grpo_objective(
    entropy_low: float = 0.2, entropy_high: float = 0.6, entropy_weight: float = 0.02
) -> PolicyObjective:
    """OpenVLThinkerV2 (arXiv 2604.08539): clip 0.2 and 0.3, dual clip 3, token mean, entropy hinge per task, no KL."""
    hinge = EntropyHinge(entropy_low, entropy_high, entropy_weight)
    return PolicyObjective(FixedClip(0.2, 0.3), aggregation="token-mean", dual_clip=3.0, entropy=hinge)


OBJECTIVES: dict[str, Callable[..., PolicyObjective]] = {
    "grpo": grpo_objective,
    "token-mean": token_mean_objective,
    "dapo": dapo_objective,
    "dr-grpo": dr_grpo_objective,
    "gspo": gspo_objective,
    "etr": etr_objective,
    "ema-grpo": ema_grpo_objective,
    "gaussian-grpo": gaussian_grpo_objective,
    "likelihood": likelihood_objective,
}

_PARTS: dict[str, dict[str, type[Any]]] = {
    "trust_region": {"fixed": FixedClip, "elastic": ElasticTrustRegion},
    "kl": {"penalty": KLPenalty},
    "entropy": {"bonus": EntropyBonus, "hinge": EntropyHinge},
}


def make_objective(config: str | Mapping[str, Any] | PolicyObjective) -> PolicyObjective:
    """Build an objective from a recipe's entry.

    Parameters
    ----------
    config : "etr", {"preset": "etr", "micro": 0.8}, or a full description
        {"trust_region": {"kind": "fixed", "low": 0.2, "high": 0.28}, "aggregation": "token-mean"}. Kinds: trust region
        "fixed", "elastic"; kl "penalty"; entropy "bonus", "hinge". A `PolicyObjective` comes back as it is.

    Raises
    ------
    UnknownNameError
        No such preset, part or option; the message offers the nearest.
    InvalidInputError
        A missing option, or a value that a part refuses.
    """
    if isinstance(config, PolicyObjective):
        return config
    if not isinstance(config, str | Mapping):
        raise InvalidInputError(f"an objective is a name or a table, got {config!r}")
    options: dict[str, Any] = {"preset": config} if isinstance(config, str) else dict(config)
    if "preset" in options:
        name = str(options.pop("preset"))
        if name not in OBJECTIVES:
            raise UnknownNameError(f"no objective {name!r}{nearest(name, OBJECTIVES)}")
        return _build(OBJECTIVES[name], options, f"objective {name!r}")
    for part, kinds in _PARTS.items():
        if isinstance(options.get(part), Mapping):
            values = dict(options[part])
            kind = str(values.pop("kind", next(iter(kinds))))
            if kind not in kinds:
                raise UnknownNameError(f"no kind {kind!r} of {part}{nearest(kind, kinds)}")
            options[part] = _build(kinds[kind], values, f"{part} {kind!r}")
        elif options.get(part) is not None and not isinstance(options[part], tuple(kinds.values())):
            kind = next(iter(kinds))
            raise InvalidInputError(f"{part}: expected a table such as {{kind = {kind!r}}}, got {options[part]!r}")
    return _build(PolicyObjective, options, "an objective")


def objective_config(objective: PolicyObjective) -> dict[str, Any]:
    """Full description of an objective as plain data; ``make_objective`` turns it back into an equal objective."""
    config: dict[str, Any] = {}
    for item in fields(objective):
        value = getattr(objective, item.name)
        for kind, part in _PARTS.get(item.name, {}).items():
            if isinstance(value, part):
                value = {"kind": kind} | {k: _plain(v) for k, v in asdict(value).items() if v is not None}
                break
        if value is not None:
            config[item.name] = value
    if isinstance(objective.trust_region, ElasticTrustRegion) and objective.trust_region.reward_range is None:
        config["trust_region"]["reward_range"] = "batch"
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _build(target: Callable[..., Any], options: dict[str, Any], what: str) -> Any:
    parameters = signature(target).parameters
    for option in options:
        if option not in parameters:
            raise UnknownNameError(f"{what} has no option {option!r}{nearest(option, parameters)}")
    for name, parameter in parameters.items():
        if parameter.default is Parameter.empty and name not in options:
            raise InvalidInputError(f"{what} needs the option {name!r}")
    if options.get("reward_range") == "batch":
        options["reward_range"] = None
    try:
        return target(**options)
    except PolyrewardError:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{what} cannot take {options}: {error}") from error


def _penalty(weight: float) -> KLPenalty | None:
    return KLPenalty(weight) if weight else None
