"""`PreferenceModel`: a reward model of encoder, head and likelihood.

    model = PreferenceModel(HashingEncoder(), LinearHead, BradleyTerry()).fit(data)
    model.score(prompts, completions)
    reward = as_reward(model)

An encoder that is a `torch.nn.Module` learns with the head; any other gives its features once. A mixture, ideal points,
ordinal ratings or a latent user is another head and likelihood in the same two places, a correction of a bias is a
penalty, an ensemble is `RewardEnsemble` of such models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError
from polyreward.preferences import Column, PreferenceData
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.contract import ModelReward, as_reward
from polyreward.reward_models.encoders import FeatureTable, look_up
from polyreward.reward_models.fit_options import FitOptions
from polyreward.reward_models.fitting import evaluate_network, fit_network
from polyreward.reward_models.heads import Items, Scores, run_head
from polyreward.reward_models.likelihoods import BradleyTerry
from polyreward.reward_models.network import Network, Source

ROWS = 16_384
"""Responses that go through the head at once when scoring."""


class UnknownAnnotatorWarning(UserWarning):
    """Someone whom the model has not seen is scored as the population."""


class PreferenceModel:
    """Encoder, head and likelihood as one reward model.

    Parameters
    ----------
    encoder : Encoder, or `FineTunedEncoder`
    head : module, or function of the width of the features that makes one
        A class such as `LinearHead` is such a function. With one, `fit` starts from the seed's own head each time; with
        a module, it goes on from where that is.
    likelihood : Likelihood
    penalties : functions of (scores (R,), comparisons) -> scalar, added to the loss
        A module's weights learn too; ``prepare(table, features)``, ``parameter_groups()`` and ``step(share)`` as of
        heads. While its ``holds_model`` is true, the model's own weights rest.

    Attributes
    ----------
    annotators : tuple
        Whom the model has seen.
    history : list of dict
        Loss and accuracy of each epoch of the last fit.
    """

    def __init__(
        self,
        encoder: Any,
        head: nn.Module | Callable[[int], nn.Module],
        likelihood: Any = None,
        penalties: Sequence[Any] = (),
    ) -> None:
        self.encoder = encoder
        self.head: nn.Module | None = head if isinstance(head, nn.Module) else None
        self._make_head = None if isinstance(head, nn.Module) else head
        self.likelihood = BradleyTerry() if likelihood is None else likelihood
        self.penalties = tuple(penalties)
        self.annotators: tuple[Any, ...] = ()
        self.history: list[dict[str, float]] = []

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        first = next(iter(self._fitted.parameters()), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def _fitted(self) -> nn.Module:
        if self.head is None:
            raise InvalidInputError("the model has not been fitted; call fit(preferences) first")
        return self.head

    def fit(self, preferences: PreferenceData, **options: Any) -> PreferenceModel:
        """Fit to preferences and return self.

        Parameters
        ----------
        preferences : PreferenceData
            Comparisons whose responses are all the same are dropped with a warning that counts them.
        options : as of `FitOptions`

        Raises
        ------
        InvalidInputError
            Nothing is preferred to anything (or, for likelihoods of ratings, all ratings are the same); features that
            are NaN, with row; a checkpoint of another fit.
        UnknownNameError
            An option that does not exist.
        """
        settings = FitOptions.of(options)
        data = _checked(preferences).without_identical("drop")
        table = ComparisonTable(data)
        _require(self.likelihood, table)
        training, validation = np.arange(len(data)), None
        if isinstance(settings.validation, float):
            held = data.held_out("prompt", settings.validation, settings.seed)
            training, validation = np.flatnonzero(~held), np.flatnonzero(held)
        # all noise of a fit comes from its seed, and the caller's generator is left as it was
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            source = self._source(table, with_prompts=False)
            if self._make_head is not None:
                self.head = self._make_head(self._width(source))
            source.prompt_features = self._prompt_features(data.prompts)
            self.annotators = table.annotators
            held_source = (source, validation) if validation is not None else None
            if isinstance(settings.validation, PreferenceData):
                other = ComparisonTable(_checked(settings.validation), self.annotators)
                held_source = (self._source(other), np.arange(len(other)))
            for part in (self._fitted, self.likelihood, *self.penalties):
                if hasattr(part, "prepare"):
                    part.prepare(table, source.features)
            self.history = fit_network(self._network(), (source, training), held_source, settings)
        return self

    def score(self, prompts: Column, completions: Column, annotator: Any = None, **columns: Any) -> Tensor:
        """What each completion is worth, float32 (N,), on the CPU.

        Parameters
        ----------
        prompts, completions : length N
        annotator : length N, or one for all, optional
            For whom; someone unknown gets the population's score and an `UnknownAnnotatorWarning`, see `knows`.
        """
        return self.likelihood.score(self.evaluate_head(prompts, completions, annotator)).cpu()

    @torch.no_grad()
    def evaluate_head(self, prompts: Column, completions: Column, annotator: Any = None) -> Scores:
        """What the head says of each completion, which is more than the score where it has components or ratings."""
        head = self._fitted.eval()
        if len(prompts) != len(completions):
            raise InvalidInputError(f"{len(prompts)} prompts and {len(completions)} completions")
        table = self._features(prompts, completions)
        prompt = self._prompt_features(prompts)
        codes = self._codes(annotator, len(completions))
        found = []
        for start in range(0, len(completions), ROWS):
            rows = np.arange(start, min(start + ROWS, len(completions)))
            features = table.take(rows, self.device)
            bad = ~torch.isfinite(features).all(dim=1)
            if bool(bad.any()):
                raise InvalidInputError(
                    f"the features of completion {start + int(bad.int().argmax())} are NaN or infinite"
                )
            items = Items(
                features,
                torch.from_numpy(codes[rows]).to(self.device),
                torch.from_numpy(rows).to(self.device),
                None if prompt is None else torch.from_numpy(prompt[rows]).to(self.device),
            )
            found.append(run_head(head, items))
        if not found:
            return Scores(torch.zeros(0))
        weights = [scores.log_weights for scores in found if scores.log_weights is not None]
        return Scores(torch.cat([scores.values for scores in found]), torch.cat(weights) if weights else None)

    def probability(self, prompts: Column, first: Column, second: Column, annotator: Any = None) -> Tensor:
        """Probability that the first completion is preferred to the second, float32 (N,)."""
        pair = (self.evaluate_head(prompts, completions, annotator) for completions in (first, second))
        found: Tensor = self.likelihood.probability(*pair)
        return found.cpu()

    def evaluate(self, preferences: PreferenceData) -> dict[str, float]:
        """Mean ``loss`` and ``accuracy`` (share of pairs in the right order, equal scores count half)."""
        table = ComparisonTable(_checked(preferences), self.annotators)
        self._fitted.eval()
        return evaluate_network(self._network(), self._source(table), np.arange(len(table)), self.device)

    def knows(self, annotators: Sequence[Any]) -> np.ndarray:
        """Which annotators the model has seen, bool (N,)."""
        known = set(self.annotators)
        return np.array([a in known for a in annotators], bool)

    def as_reward(self, name: str = "reward_model") -> ModelReward:
        """As a reward of TRL's and polyreward's trainers."""
        return as_reward(self, name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json``, ``model.safetensors``, a model card, and an encoder that has learned."""
        from polyreward.reward_models.saving import save_model

        save_model(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **parts: Any) -> PreferenceModel:
        """Read a model back.

        Parameters
        ----------
        folder : where it was saved
        parts : ``encoder``, ``head``, ``likelihood``, ``base`` (the model under an adapter)
            In place of what the folder names; needed for parts that are not polyreward's own.

        Raises
        ------
        MissingFileError, InvalidInputError
            No model in the folder; weights of another architecture.
        """
        from polyreward.reward_models.saving import load_model

        return load_model(cls, folder, **parts)

    @property
    def learns_encoder(self) -> bool:
        """Whether the encoder's weights learn with the head."""
        return isinstance(self.encoder, nn.Module)

    def _network(self) -> Network:
        return Network(self._fitted, self.likelihood, self.penalties, self.encoder if self.learns_encoder else None)

    def _source(self, table: ComparisonTable, with_prompts: bool = True) -> Source:
        data = table.data
        prompt_features = self._prompt_features(data.prompts) if with_prompts else None
        if self.learns_encoder:
            return Source(table, None, prompt_features, (data.prompts, data.responses))
        return Source(table, self._features(data.of_responses(data.prompts), data.responses), prompt_features)

    def _features(self, prompts: Column, responses: Column) -> FeatureTable:
        if self.encoder is None:
            raise InvalidInputError("the model was loaded without its encoder; pass encoder=... to from_pretrained")
        return look_up(self.encoder, prompts, responses)

    def _prompt_features(self, prompts: Column) -> np.ndarray | None:
        if not getattr(self._fitted, "uses_prompt", False):
            return None
        if not hasattr(self.encoder, "encode_prompts"):
            raise InvalidInputError(f"the head reads the prompt alone, and {self.encoder.identity} cannot encode it")
        return np.asarray(self.encoder.encode_prompts(prompts), dtype=np.float32)

    def _width(self, source: Source) -> int:
        return int(self.encoder.width) if source.features is None else source.features.width

    def _codes(self, annotator: Any, count: int) -> np.ndarray:
        if annotator is None or isinstance(annotator, str) or not isinstance(annotator, Sequence | np.ndarray):
            annotator = [annotator] * count
        if len(annotator) != count:
            raise InvalidInputError(f"annotator has {len(annotator)} entries for {count} completions")
        place = {name: i for i, name in enumerate(self.annotators)}
        codes = np.array([place.get(a, -1) for a in annotator], np.int64)
        unknown = {str(a) for a, code in zip(annotator, codes.tolist(), strict=True) if code < 0 and a is not None}
        if unknown and self.annotators:
            shown = ", ".join(sorted(unknown)[:3])
            warnings.warn(
                UnknownAnnotatorWarning(f"{len(unknown)} unknown annotators ({shown}) get the population's score"),
                stacklevel=4,
            )
        return codes


def _checked(preferences: Any) -> PreferenceData:
    if not isinstance(preferences, PreferenceData):
        raise InvalidInputError(
            f"expected PreferenceData (polyreward.data.preferences reads it), got {type(preferences).__name__}"
        )
    if not len(preferences):
        raise InvalidInputError(f"{preferences.source} has no comparisons")
    return preferences


def _require(likelihood: Any, table: ComparisonTable) -> None:
    if getattr(likelihood, "needs", "order") == "ratings":
        table.require_ratings()
    else:
        table.require_order()
