"""Curricula: which source (task family, difficulty, data set) the next prompts come from.

Every curriculum has the contract of `Curriculum`; ``CURRICULA`` maps the names that recipes use to classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from polyreward.curricula.bandit import AdvantageBandit
from polyreward.curricula.mixture import CurriculumSampler
from polyreward.curricula.sampler import Curriculum, UnknownSourceError
from polyreward.curricula.schedules import EasyToHard, FixedWeights, Uniform
from polyreward.curricula.tier_portfolio import CapabilityProfile, CurriculumPortfolio, probe_capability, select
from polyreward.errors import InvalidInputError, UnknownNameError, nearest

__all__ = [
    "CURRICULA",
    "AdvantageBandit",
    "CapabilityProfile",
    "Curriculum",
    "CurriculumPortfolio",
    "CurriculumSampler",
    "EasyToHard",
    "FixedWeights",
    "Uniform",
    "UnknownSourceError",
    "make_curriculum",
    "probe_capability",
    "select",
]

CURRICULA: dict[str, type[Curriculum]] = {
    "dump": AdvantageBandit,
    "uniform": Uniform,
    "fixed-weights": FixedWeights,
    "easy-to-hard": EasyToHard,
}


def make_curriculum(config: str | Mapping[str, Any], names: Sequence[str]) -> Curriculum:
    """Build a curriculum from a recipe's entry.

    Parameters
    ----------
    config : name, or mapping with the key ``name`` and options
        ``"dump"`` or ``{"name": "dump", "window": 300, "temperature": 0.1}``.
    names : the sources of the data, easiest first for ``easy-to-hard``

    Raises
    ------
    UnknownNameError
        No such curriculum or option; the message offers the nearest.
    InvalidInputError
        No ``name``, a missing option, or a value that the curriculum refuses.
    """
    options = {"name": config} if isinstance(config, str) else dict(config)
    kind = options.pop("name", None)
    if kind is None:
        raise InvalidInputError(f"a curriculum needs the key 'name', one of: {', '.join(sorted(CURRICULA))}")
    if kind not in CURRICULA:
        raise UnknownNameError(f"no curriculum {kind!r}{nearest(str(kind), CURRICULA)}")
    build = CURRICULA[kind]
    parameters = list(signature(build).parameters.values())[1:]
    for option in options:
        if option not in {parameter.name for parameter in parameters}:
            raise UnknownNameError(
                f"curriculum {kind!r} has no option {option!r}{nearest(option, [p.name for p in parameters])}"
            )
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise InvalidInputError(f"curriculum {kind!r} needs the option {parameter.name!r}")
    try:
        return build(names, **options)
    except TypeError as error:
        raise InvalidInputError(f"curriculum {kind!r} cannot take {options}: {error}") from error
