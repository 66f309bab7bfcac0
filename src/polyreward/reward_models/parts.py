"""Reward models by name: the encoders, heads and likelihoods that the command line composes, and models in folders.

`compose` makes a model that has not been fitted, `load_reward_model` reads any reward model back: one of polyreward's,
a sequence classifier of transformers, or ``module:name`` of one's own.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from polyreward.errors import InvalidInputError, MissingFileError, PolyrewardError, UnknownNameError, nearest
from polyreward.preferences import PreferenceData
from polyreward.reward_models.contract import ModelReward, RewardModel
from polyreward.reward_models.ensembles import RewardEnsemble
from polyreward.reward_models.feature_cache import CachedEncoder
from polyreward.reward_models.model import PreferenceModel

_ROOM = "polyreward.reward_models"
ENCODERS: Mapping[str, str] = {
    "hashing": f"{_ROOM}.encoders:HashingEncoder",
    "sentence": f"{_ROOM}.text_encoders:SentenceEncoder",
    "frozen": f"{_ROOM}.text_encoders:FrozenEncoder",
    "fine-tuned": f"{_ROOM}.fine_tuning:FineTunedEncoder",
    "multimodal": f"{_ROOM}.multimodal_encoders:MultimodalEncoder",
    "fine-tuned-multimodal": f"{_ROOM}.multimodal_encoders:FineTunedMultimodalEncoder",
}
HEADS: Mapping[str, tuple[str, str]] = {
    "linear": (f"{_ROOM}.heads:LinearHead", "bradley-terry"),
    "two-layer": (f"{_ROOM}.heads:TwoLayerHead", "bradley-terry"),
    "mixture": (f"{_ROOM}.mixture_models:MixtureHead", "mixture"),
    "latent-user": (f"{_ROOM}.latent_user_head:LatentUserHead", "bradley-terry"),
    "ideal-points": (f"{_ROOM}.ideal_point_heads:IdealPointHead", "bradley-terry"),
    "reward": (f"{_ROOM}.reward_head:RewardHead", "bradley-terry"),
    "ordinal": (f"{_ROOM}.ordinal_likelihood:OrdinalHead", "ordinal"),
    "dropout-views": (f"{_ROOM}.contrastive:DropoutViewsHead", "contrastive"),
}
LIKELIHOODS: Mapping[str, str] = {
    "bradley-terry": f"{_ROOM}.likelihoods:BradleyTerry",
    "plackett-luce": f"{_ROOM}.likelihoods:PlackettLuce",
    "regression": f"{_ROOM}.likelihoods:Regression",
    "mixture": f"{_ROOM}.mixture_models:MixtureLikelihood",
    "ordinal": f"{_ROOM}.ordinal_likelihood:OrdinalLikelihood",
    "pair-loss": f"{_ROOM}.pair_losses:PairLoss",
    "best-of-list": f"{_ROOM}.one_pass:BestOfList",
    "contrastive": f"{_ROOM}.contrastive:Contrastive",
    "integer": f"{_ROOM}.integer_ratings:IntegerRatings",
}


def compose(
    data: PreferenceData,
    encoder: str = "hashing",
    head: str = "linear",
    likelihood: str | None = None,
    members: int = 1,
    cache: str | Path | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> PreferenceModel | RewardEnsemble:
    """A reward model that has not been fitted.

    Parameters
    ----------
    data : PreferenceData
        What it will be fitted to; likelihoods of ratings take their range from it.
    encoder : a key of `ENCODERS`, or ``key:model`` with a name on the Hugging Face hub or a folder
    head : a key of `HEADS`
    likelihood : a key of `LIKELIHOODS`, optional
        Default: the one that belongs to the head.
    members : int
        More than 1 makes a `RewardEnsemble`.
    cache : folder for the features of a frozen encoder, optional
    options : mapping of "encoder", "head", "likelihood", "ensemble" to the arguments of each, optional

    Raises
    ------
    UnknownNameError, InvalidInputError
        A name or argument that does not exist; a value that a part refuses.
    """
    name, _, model = encoder.partition(":")
    given = {key: dict(value) for key, value in (options or {}).items()}
    if model:
        given.setdefault("encoder", {})["model"] = model
    parts_of = partial(_called, given=given)
    made = parts_of("encoder", _part(ENCODERS, name, "encoder"))
    path, usual = _entry(HEADS, head, "head")
    chosen = likelihood or usual
    kind = _part(LIKELIHOODS, chosen, "likelihood")
    judge = parts_of("likelihood", partial(kind.of, data) if hasattr(kind, "of") else kind)
    head_kind = _load(path)
    outputs = getattr(judge, "outputs", None)
    if outputs is not None and "outputs" in inspect.signature(head_kind).parameters:
        given.setdefault("head", {}).setdefault("outputs", outputs)
    _check(head_kind, given.get("head", {}), "head")
    if cache is not None and hasattr(made, "encode") and not hasattr(made, "parameters"):
        made = CachedEncoder(made, cache)
    single = PreferenceModel(made, partial(head_kind, **given.get("head", {})), judge)
    extra = given.get("ensemble", {})
    _check(RewardEnsemble, extra, "ensemble")
    return single if members == 1 else RewardEnsemble.of(single, members, **extra)


def load_reward_model(reference: str | Path, **options: Any) -> RewardModel:
    """Read a reward model.

    Parameters
    ----------
    reference : folder of `save_pretrained`, of a sequence classifier of transformers, or ``module:name``
        What the name stands for is a reward model, or makes one when called with `options`.

    Raises
    ------
    MissingFileError, UnknownNameError, InvalidInputError
        There is no such folder or name; the folder holds something else.
    """
    folder = Path(reference)
    if not folder.exists():
        module, _, title = str(reference).rpartition(":")
        if not module:
            raise MissingFileError(f"{folder} does not exist; expected the folder of a reward model, or module:name")
        made = _imported(module, title)
        model = made if hasattr(made, "score") and not isinstance(made, type) else made(**options)
        if not hasattr(model, "score"):
            raise InvalidInputError(f"{reference} is a {type(model).__name__} without score(prompts, completions)")
        return model  # type: ignore[no-any-return]
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFileError(f"{folder} holds no reward model: there is no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInputError(f"{path} is not valid JSON: {error}") from error
    if isinstance(config, dict) and "model_type" in config:
        from polyreward.reward_models.classifier import SequenceClassifier

        return SequenceClassifier(str(folder), **options)
    own = str(config.get("model", "")) if isinstance(config, dict) else ""
    if own.startswith(f"{_ROOM}."):
        return _load(own).from_pretrained(folder, **options)  # type: ignore[no-any-return]
    kind: Any = RewardEnsemble if isinstance(config, dict) and "ensemble" in config else PreferenceModel
    return kind.from_pretrained(folder, **options)  # type: ignore[no-any-return]


def stored_reward(model: str, name: str = "reward_model", **options: Any) -> ModelReward:
    """The reward ``reward_model`` of recipes: any reward model that `load_reward_model` reads.

    Parameters
    ----------
    model : folder, or ``module:name``
    name : str
    options : as of `load_reward_model`
    """
    return ModelReward(load_reward_model(model, **options), name)


def _entry(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise UnknownNameError(f"unknown {what} {name!r}{nearest(name, table)}; known are {', '.join(table)}")
    return table[name]


def _part(table: Mapping[str, str], name: str, what: str) -> Any:
    return _load(_entry(table, name, what))


def _load(path: str) -> Any:
    module, _, title = path.partition(":")
    return getattr(importlib.import_module(module), title)


def _imported(module: str, title: str) -> Any:
    try:
        return getattr(importlib.import_module(module), title)
    except Exception as error:
        raise InvalidInputError(f"{module}:{title} cannot be imported: {type(error).__name__}: {error}") from error


def _called(what: str, kind: Any, given: Mapping[str, Mapping[str, Any]]) -> Any:
    """A part with its options; errors name which part they are about."""
    options = given.get(what, {})
    _check(kind, options, what)
    try:
        return kind(**options)
    except PolyrewardError as error:
        raise type(error)(f"{what}: {error}") from error
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{what}: {error}") from error


def _check(kind: Any, options: Mapping[str, Any], what: str) -> None:
    known = inspect.signature(kind).parameters
    for option in options:
        if option not in known:
            raise UnknownNameError(f"{what} has no option {option!r}{nearest(option, known)}")
