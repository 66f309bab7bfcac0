"""Transforms as plain data and as Python code.

`to_config` writes a transform as nested dicts, lists, strings and numbers, which JSON and TOML can hold; `from_config`
reads it back to an equal transform. Recipes use the same form:

    {preset = "stratified-grpo", blend = 0.8}
    {chain = [{part = "WeightedSum"}, {part = "Center", by = "group"}, {part = "Scale", by = "task"}]}
    {blend = [{weight = 0.7, preset = "grpo"}, {weight = 0.3, chain = [...]}]}

The data holds what a transform is made of, not its memory; that is `Transform.state_dict`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polyreward.advantages.gaussian import Gaussianize
from polyreward.advantages.moving_scale import MovingScale
from polyreward.advantages.parts import Center, LeaveOneOut, Scale, Standardize, WeightedSum, Whiten
from polyreward.advantages.presets import PRESETS, preset
from polyreward.advantages.stratified import Stratify
from polyreward.advantages.transform import Blend, Chain, Multiply, Transform
from polyreward.errors import InvalidInputError, PolyrewardError, UnknownNameError, nearest

PARTS: dict[str, type[Transform]] = {
    part.__name__: part
    for part in (
        WeightedSum, Center, LeaveOneOut, Scale, Standardize, Whiten, Stratify, MovingScale, Gaussianize, Multiply,
    )
}  # fmt: skip
"""Every part by its name in recipes."""

_KEYS = ("by", "scale_by", "ignore_constant", "ignore_single", "weight")
"""Arguments of parts that name columns."""
_FORMS = ("preset", "chain", "blend", "part")


def to_config(transform: Transform) -> dict[str, Any]:
    """Write a transform as plain data; arguments that have their default value are left out.

    Raises
    ------
    InvalidInputError
        A part is not a dataclass, or holds a value that plain data cannot.
    """
    if isinstance(transform, Chain):
        return {"chain": [to_config(part) for part in transform.parts]}
    if isinstance(transform, Blend):
        return {"blend": [_branch(branch) for branch in transform.branches]}
    return {"part": type(transform).__name__, **{n: _plain(v, n) for n, v in _arguments(transform).items()}}


def from_config(
    config: Mapping[str, Any] | Transform,
    *,
    weights: Mapping[str, float] | Sequence[float] | None = None,
    parts: Mapping[str, type[Transform]] | None = None,
) -> Transform:
    """Make a transform from plain data; a transform is returned as it is.

    Parameters
    ----------
    config : mapping
        One of ``{preset = NAME, PARAMETER = ...}`` (parameters may also stand under ``options``),
        ``{chain = [...]}``, ``{blend = [{weight = ..., ...}, ...]}`` or ``{part = NAME, ARGUMENT = ...}``.
    weights : weights of the rewards, optional
        For every preset and `WeightedSum` of the data that names none.
    parts : mapping of name to class, optional
        Parts of your own, beside `PARTS`.

    Raises
    ------
    UnknownNameError
        An unknown key, preset, part or argument; the message says where and offers the nearest name.
    InvalidInputError
        Not one of the forms, or a value that a part refuses.
    """
    if isinstance(config, Transform):
        return config
    return _read(config, "advantage", weights, {**PARTS, **(parts or {})})


def columns_of(transform: Transform) -> tuple[str, ...]:
    """Names of the columns that a transform reads from its batch (``by`` and the like), in order of appearance."""
    inner = getattr(transform, "parts", None) or getattr(transform, "branches", None) or ()
    found = [column for part in inner for column in columns_of(part)]
    for name in _KEYS:
        keys = getattr(transform, name, None) or ()
        found += [key for key in ((keys,) if isinstance(keys, str) else keys) if key not in ("group", "batch")]
    return tuple(dict.fromkeys(found))


def to_code(transform: Transform) -> str:
    """Write a transform as a Python expression of `chain`, `blend` and the parts; evaluating it gives an equal one."""
    if isinstance(transform, Chain):
        *parts, last = transform.parts or (None,)
        if parts and isinstance(last, Multiply):
            scaled = to_code(Chain(tuple(parts)))
            twice = len(parts) > 1 and isinstance(parts[-1], Multiply)
            return f"{_literal(last.factor)} * {f'({scaled})' if twice else scaled}"
        return f"chain({', '.join(to_code(part) for part in transform.parts)})"
    if isinstance(transform, Blend):
        return f"blend({', '.join(to_code(branch) for branch in transform.branches)})"
    arguments = ", ".join(f"{name}={_literal(value)}" for name, value in _arguments(transform).items())
    return f"{type(transform).__name__}({arguments})"


def _arguments(transform: Transform) -> dict[str, Any]:
    if not dataclasses.is_dataclass(transform):
        raise InvalidInputError(
            f"{type(transform).__name__} is not a dataclass, so its arguments cannot be written down"
        )
    found = {}
    for field in dataclasses.fields(transform):
        value = getattr(transform, field.name) if field.init else None
        if field.init and (field.default is dataclasses.MISSING or value != field.default):
            found[field.name] = value
    return found


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise InvalidInputError(f"argument {name!r} holds a {type(value).__name__}, which plain data cannot")


def _literal(value: Any) -> str:
    return repr(value.item() if isinstance(value, np.generic) else value)


def _branch(branch: Transform) -> dict[str, Any]:
    if isinstance(branch, Chain) and branch.parts and isinstance(branch.parts[-1], Multiply):
        return {"weight": branch.parts[-1].factor, **to_config(Chain(branch.parts[:-1]))}
    return to_config(branch)


def _read(config: Any, where: str, weights: Any, parts: Mapping[str, type[Transform]]) -> Transform:
    if not isinstance(config, Mapping):
        raise InvalidInputError(f"{where}: expected a table, got {config!r}")
    # `blend` is a list of branches, or the number that a stratified preset or part takes
    listed = isinstance(config.get("blend"), list | tuple)
    numbers = {"blend"} & config.keys() if not listed and config.keys() & {"preset", "part"} else set()
    forms = [key for key in _FORMS if config.get(key) and key not in numbers]
    if not forms and "chain" in config:
        forms = ["chain"]
    if len(forms) != 1:
        unknown = [key for key in config if key not in _FORMS]
        hint = nearest(str(unknown[0]), _FORMS) if unknown and not forms else ""
        raise InvalidInputError(f"{where}: give one of {', '.join(_FORMS)}; got {sorted(config) or 'nothing'}{hint}")
    form, given = forms[0], {key: value for key, value in config.items() if key not in _FORMS or key in numbers}
    if form == "preset":
        name = str(config["preset"]).replace("_", "-")
        options = _options(given.pop("options", {}), where)
        given = {**given, **options}
        if name in PRESETS:
            given.setdefault("weights", weights)
        return _made(lambda **arguments: preset(name, **arguments), given, where)
    if form == "part":
        return _part(str(config["part"]), given, where, weights, parts)
    given = {key: value for key, value in given.items() if key != "options" or value}
    if given:
        raise UnknownNameError(f"{where}: unknown key {next(iter(given))!r}{nearest(next(iter(given)), _FORMS)}")
    entries = config[form]
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise InvalidInputError(f"{where}: {form} must be a list, got {entries!r}")
    if form == "chain":
        return Chain(tuple(_read(e, f"{where}.chain[{i}]", weights, parts) for i, e in enumerate(entries)))
    branches = [_weighted(entry, f"{where}.blend[{i}]", weights, parts) for i, entry in enumerate(entries)]
    return Blend(tuple(branches))


def _weighted(entry: Any, where: str, weights: Any, parts: Mapping[str, type[Transform]]) -> Transform:
    if not isinstance(entry, Mapping):
        raise InvalidInputError(f"{where}: expected a table, got {entry!r}")
    branch = _read({key: value for key, value in entry.items() if key != "weight"}, where, weights, parts)
    if "weight" not in entry:
        return branch
    try:
        return float(entry["weight"]) * branch
    except (TypeError, ValueError):
        raise InvalidInputError(f"{where}: weight must be a number, got {entry['weight']!r}") from None


def _part(
    name: str, given: dict[str, Any], where: str, weights: Any, parts: Mapping[str, type[Transform]]
) -> Transform:
    if name not in parts:
        raise UnknownNameError(f"{where}: no part {name!r}{nearest(name, parts)}")
    known = inspect.signature(parts[name]).parameters
    for argument in given:
        if argument not in known:
            raise UnknownNameError(f"{where}: part {name} has no argument {argument!r}{nearest(argument, known)}")
    if parts[name] is WeightedSum:
        given.setdefault("weights", weights)
    return _made(parts[name], {key: _frozen(value) for key, value in given.items()}, where)


def _made(maker: Any, given: Mapping[str, Any], where: str) -> Transform:
    try:
        made: Transform = maker(**given)
    except PolyrewardError as error:
        raise type(error)(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{where}: {error}") from error
    return made


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _options(options: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(options, Mapping):
        raise InvalidInputError(f"{where}: options must be a table, got {options!r}")
    return options
