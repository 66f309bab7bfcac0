"""Reward models in folders: ``config.json``, ``model.safetensors``, a model card, and an encoder that has learned.

Parts of polyreward are named by import path and made again from their arguments. A path outside polyreward is never
imported from a file: such parts are passed by the caller.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

import polyreward
from polyreward.errors import InvalidInputError, MissingFileError, require
from polyreward.storage import write_atomically, write_json, write_text

if TYPE_CHECKING:
    from polyreward.reward_models.model import PreferenceModel

FORMAT = 1
_PLAIN = str | int | float | bool | None


def save_model(model: PreferenceModel, folder: str | Path) -> None:
    """Write a fitted model; see the module."""
    folder, head = Path(folder), model._fitted
    state = {f"head.{name}": value for name, value in head.state_dict().items()}
    if isinstance(model.likelihood, nn.Module):
        state |= {f"likelihood.{name}": value for name, value in model.likelihood.state_dict().items()}
    annotators = [name.item() if isinstance(name, np.generic) else name for name in model.annotators]
    for annotator in annotators:
        if not isinstance(annotator, _PLAIN):
            raise InvalidInputError(f"annotator {annotator!r} cannot be stored; use texts or numbers as annotators")
    config = {
        "format": FORMAT,
        "polyreward": polyreward.__version__,
        "encoder": describe(model.encoder),
        "head": describe(head),
        "likelihood": describe(model.likelihood),
        "annotators": annotators,
        "history": model.history,
    }
    save: Any = require("safetensors.torch", "text")
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    if _learns(model.encoder):
        (folder / "encoder").mkdir(parents=True, exist_ok=True)
        model.encoder.save_pretrained(folder / "encoder")
    write_atomically(folder / "model.safetensors", lambda path: save.save_file(tensors, str(path)))
    write_text(folder / "README.md", _card(config))
    write_json(folder / "config.json", config)


def load_model(
    kind: type[PreferenceModel],
    folder: str | Path,
    *,
    encoder: Any = None,
    head: Any = None,
    likelihood: Any = None,
    base: Any = None,
) -> PreferenceModel:
    """Read a model back; see `PreferenceModel.from_pretrained`."""
    folder = Path(folder)
    config = read_config(folder)
    stored = config["encoder"]
    if encoder is None and (folder / "encoder").is_dir():
        encoder = _kind(stored, "encoder", folder).from_pretrained(folder / "encoder", base, **stored["args"])
    elif encoder is None and stored["args"] is not None and stored["part"]:
        encoder = make(stored, "encoder", folder)
    elif encoder is not None and stored["identity"] and encoder.identity != stored["identity"]:
        raise InvalidInputError(f"{folder} was fitted on features of {stored['identity']!r}, got {encoder.identity!r}")
    head = head if head is not None else make(config["head"], "head", folder)
    likelihood = likelihood if likelihood is not None else make(config["likelihood"], "likelihood", folder)
    state = _tensors(folder / "model.safetensors")
    for name, part in (("head", head), ("likelihood", likelihood)):
        if isinstance(part, nn.Module):
            load_state(
                part, {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}, folder
            )
    model = kind(encoder, head.eval(), likelihood)
    model.annotators = tuple(config["annotators"])
    model.history = config["history"]
    return model


def describe(part: Any) -> dict[str, Any]:
    """Import path, arguments and identity of a part; arguments are None where it cannot be made from plain data."""
    inner = getattr(part, "encoder", None)
    if inner is not None and hasattr(part, "folder"):  # a cache is no part of the model
        return describe(inner)
    args: Any = None
    if _learns(part):
        args = dict(part.settings)
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        args = {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if field.init}
    elif isinstance(getattr(part, "config", None), Mapping):
        args = dict(part.config)
    try:
        args = json.loads(json.dumps(args, allow_nan=False))
    except (TypeError, ValueError):
        args = None
    return {"part": _path(type(part)), "args": args, "identity": getattr(part, "identity", "")}


def make(description: Mapping[str, Any], name: str, folder: Path) -> Any:
    """Make a part of polyreward again, or None for an encoder that only the caller has.

    Raises
    ------
    InvalidInputError
        The part is not polyreward's own, or does not exist in this version.
    """
    kind = _kind(description, name, folder)
    if description["args"] is None:
        if name == "encoder":
            return None
        raise InvalidInputError(
            f"{folder}: the {name} {kind.__name__} cannot be made from its configuration; pass {name}=..."
        )
    try:
        return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in description["args"].items()})
    except TypeError as error:
        raise InvalidInputError(
            f"{folder}: this version cannot make the {name} {description['part']}: {error}"
        ) from error


def _kind(description: Mapping[str, Any], name: str, folder: Path) -> Any:
    """The class of a part; only of polyreward's own."""
    module, _, title = description["part"].partition(":")
    if not module.startswith("polyreward."):
        raise InvalidInputError(f"{folder}: the {name} {description['part']} is not polyreward's own; pass {name}=...")
    try:
        return getattr(importlib.import_module(module), title)
    except (ImportError, AttributeError) as error:
        raise InvalidInputError(
            f"{folder}: this version cannot make the {name} {description['part']}: {error}"
        ) from error


def _learns(part: Any) -> bool:
    """Whether an encoder's weights are the model's own, and are stored with it."""
    return isinstance(part, nn.Module) and hasattr(part, "save_pretrained")


def load_state(module: nn.Module, state: Mapping[str, Tensor], where: Path) -> None:
    """Load weights, or say which are missing, unknown or of another shape."""
    own = module.state_dict()
    for name in own.keys() | state.keys():
        if name not in state or name not in own:
            lacking = "the file lacks" if name not in state else "the model has no"
            raise InvalidInputError(
                f"{where} holds another architecture than {type(module).__name__}: {lacking} {name!r}"
            )
        if own[name].shape != state[name].shape:
            raise InvalidInputError(
                f"{where} holds another architecture than {type(module).__name__}: {name!r} has shape "
                f"{tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
            )
    module.load_state_dict(dict(state))


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration in a folder; errors name the file."""
    path = folder / "config.json"
    if not path.exists():
        raise MissingFileError(f"{folder} holds no reward model: there is no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format", config.get("model_type")) if isinstance(config, dict) else type(config).__name__
        raise InvalidInputError(f"{path} is not a reward model of polyreward of format {FORMAT} (found {found!r})")
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    load: Any = require("safetensors.torch", "text")
    if not path.exists():
        raise MissingFileError(f"{path} does not exist")
    try:
        found: dict[str, Tensor] = load.load_file(str(path))
    except Exception as error:
        raise InvalidInputError(f"{path} is not a readable safetensors file: {error}") from error
    return found


def _path(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _card(config: Mapping[str, Any]) -> str:
    encoder, head, likelihood = (config[name] for name in ("encoder", "head", "likelihood"))
    last = config["history"][-1] if config["history"] else {}
    figures = "\n".join(f"| {name} | {value:.4g} |" for name, value in last.items())
    table = f"\n| last epoch | |\n|---|---|\n{figures}\n" if figures else ""
    return f"""---
library_name: polyreward
tags: [reward-model, preferences]
---

# Reward model

| part | |
|---|---|
| encoder | {encoder["identity"] or encoder["part"]} |
| head | {head["part"].partition(":")[2]} `{json.dumps(head["args"])}` |
| likelihood | {likelihood["part"].partition(":")[2]} `{json.dumps(likelihood["args"])}` |
| annotators | {len(config["annotators"])} |
{table}
```python
from polyreward.reward_models import PreferenceModel

model = PreferenceModel.from_pretrained(FOLDER)
model.score(prompts, completions)
```

Scores order the responses to one prompt. Their zero and scale are the model's own.
"""
