"""Ideal points of annotators in `PreferenceModel` (PAL, arXiv 2406.08469).

    model = PreferenceModel(encoder, partial(IdealPointHead, components=4), PairLoss("hinge")).fit(data)
    model.score(prompts, completions, annotator="ann")
    fit_new_users(model, comparisons_of_new_people)             # nothing else changes
    model.score(prompts, completions, annotator="new")

An annotator has one ideal point (kind "A"), or one for each prompt (kind "B"). Someone unknown is scored at the mean
weights of the annotators of the fit. "PAL: Pluralistic Alignment Framework for Learning from Heterogeneous
Preferences".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.preferences import PreferenceData
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.heads import Items, Scores
from polyreward.reward_models.ideal_points import Distance, IdealPointSpace, Kind, Mixing
from polyreward.reward_models.model import PreferenceModel
from polyreward.reward_models.user_mixtures import MODES, Mode, fit_logits, mixture_weights

USERS, ROWS = 256, 16_384
"""New people who are fitted at once, and responses that are mapped at once."""


class IdealPointHead(nn.Module):
    """Minus the distance of a response to the annotator's ideal point, a mixture of prototypes.

    Parameters
    ----------
    width : int
        Of the features.
    components : int
        Prototypes, K. With too few the mixture cannot hold the kinds of people there are; a few too many do not hurt.
    latent : int, optional
        Width of the space, default `width`, the paper's.
    kind : "A" or "B"
        One ideal point for all prompts, or one for each; the second reads the prompts' features.
    distance, hidden_layers, residual, activation, mixing : as of `IdealPointSpace`
    prompt_width : int, optional
        Width of the prompts' features, for kind B; default `width`.
    temperature, mode : as of `UserMixture`
    spread : float >= 0
        Deviation of the annotators' logits at the start, 1 in the paper's code.
    map_rate, prototype_rate, user_rate, scale_rate, map_decay : float
        Learning rates of f and g, P, W and t, and weight decay of f and g, in place of those of the fit. The defaults
        are the paper's, for batches of 4; larger batches and frozen features bear ten times as much.
    annotators, population : int
        Whose weights there are, and how many of them, the first, make up the population; set by a fit.
    """

    def __init__(
        self,
        width: int,
        components: int = 4,
        latent: int | None = None,
        kind: Kind = "A",
        distance: Distance | None = None,
        hidden_layers: int = 2,
        residual: bool | None = None,
        activation: str | None = None,
        mixing: Mixing = "before",
        prompt_width: int | None = None,
        temperature: float = 1.0,
        mode: Mode = "mixture",
        spread: float = 1.0,
        map_rate: float = 1e-4,
        prototype_rate: float = 5e-3,
        user_rate: float = 5e-3,
        scale_rate: float = 0.1,
        map_decay: float = 0.01,
        annotators: int = 0,
        population: int = 0,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise UnknownNameError(f"unknown mode {mode!r}{nearest(str(mode), MODES)}")
        numbers = {
            "spread": spread, "map_rate": map_rate, "prototype_rate": prototype_rate, "user_rate": user_rate,
            "scale_rate": scale_rate, "map_decay": map_decay,
        }  # fmt: skip
        for name, value in numbers.items():
            if not 0 <= value < math.inf:
                raise InvalidInputError(f"{name} must be a finite number from 0, got {value}")
        if not 0 < temperature < math.inf:
            raise InvalidInputError(f"temperature must be a positive number, got {temperature}")
        self.config: dict[str, Any] = {
            "width": width, "components": components, "latent": latent, "kind": kind, "distance": distance,
            "hidden_layers": hidden_layers, "residual": residual, "activation": activation, "mixing": mixing,
            "prompt_width": prompt_width, "temperature": temperature, "mode": mode, **numbers,
            "annotators": annotators, "population": population,
        }  # fmt: skip
        self.uses_prompt = kind == "B"
        self.space = IdealPointSpace(
            kind, components, width, latent, distance, hidden_layers, residual, activation=activation, mixing=mixing,
            d_prompt=prompt_width,
        )  # fmt: skip
        self.logits = nn.Parameter(torch.zeros(annotators, components))
        self._names: tuple[Any, ...] = ()

    def prepare(self, table: ComparisonTable, features: Any = None) -> None:
        """Weights for the annotators of a fit; those of annotators from the fit before are kept.

        Raises
        ------
        InvalidInputError
            There are several prototypes, and the data name no annotators.
        """
        names = tuple(table.annotators)
        if not names and self.config["components"] > 1:
            raise InvalidInputError(
                f"{table.data.source} names no annotators, and {type(self).__name__} learns "
                f"{self.config['components']} prototypes from them; use components=1 or another head"
            )
        kept = dict(zip(self._names, self.logits.detach(), strict=False))
        rows = self.config["spread"] * torch.randn(len(names), self.config["components"])
        rows = rows.to(self.logits)
        for place, name in enumerate(names):
            if name in kept:
                rows[place] = kept[name]
        self.logits, self._names = nn.Parameter(rows), names
        self.config |= {"annotators": len(names), "population": len(names)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups at the rates of the head."""
        rates = {name: self.config[name] for name in ("map_rate", "prototype_rate", "scale_rate", "map_decay")}
        users = {"params": [self.logits], "lr": self.config["user_rate"], "weight_decay": 0.0}
        return [*self.space.parameter_groups(**rates), users]

    def forward(self, items: Items) -> Tensor:
        """Scores (R,)."""
        users, place = torch.unique(items.annotator, return_inverse=True)
        weights = self.weights(users)
        if not self.uses_prompt:
            return self.space.utility(self.space.f(items.features), self.space.points(weights)[place])
        prompt = self._prompt(items)
        # responses that are compared share a prompt and an annotator: one ideal point serves them all
        fresh = torch.ones_like(items.comparison, dtype=torch.bool)
        fresh[1:] = items.comparison[1:] != items.comparison[:-1]
        rows = fresh.nonzero().squeeze(1)
        points = self.space.points(weights[place[rows]], prompt[rows])
        return self.space.utility(self.space.f(items.features), points[fresh.cumsum(0) - 1])

    def weights(self, annotator: Tensor) -> Tensor:
        """Weights (R, K) of annotators' codes (R,); -1 has the population's mean."""
        hard = self.config["mode"] == "partition" and not self.training
        own = mixture_weights(self.logits, self.config["temperature"], hard)
        if len(annotator) and int(annotator.max()) >= len(own):
            raise InvalidInputError(f"annotator code {int(annotator.max())} of {len(own)} known annotators")
        some = own[: self.config["population"]]
        mean = some.mean(dim=0, keepdim=True) if len(some) else own.new_full((1, own.shape[1]), 1 / own.shape[1])
        return torch.cat([mean, own])[annotator + 1]

    def _prompt(self, items: Items) -> Tensor:
        if items.prompt is None:
            raise InvalidInputError(
                "an ideal point of the prompt (kind 'B') reads the prompts' features, and there are none; the "
                "encoder needs encode_prompts"
            )
        if items.prompt.shape[1] != self.space.d_prompt:
            raise InvalidInputError(
                f"the prompts have {items.prompt.shape[1]} features and the head reads {self.space.d_prompt}; pass "
                f"prompt_width={items.prompt.shape[1]}"
            )
        bad = ~torch.isfinite(items.prompt).all(dim=1)
        if bool(bad.any()):
            raise InvalidInputError(f"the features of the prompt of response {int(bad.int().argmax())} are not finite")
        return items.prompt


def fit_new_users(
    model: PreferenceModel,
    data: PreferenceData,
    learning_rate: float = 0.05,
    epochs: int = 150,
    weight_decay: float = 0.01,
) -> PreferenceModel:
    """Weights of new people from a few comparisons; `model.score(..., annotator=name)` then knows them.

    Everything else stays bit by bit as it is. Weights begin equal and go by AdamW, one step an epoch over all of a
    person's comparisons, and do not depend on who is fitted beside them. A person without a comparison that prefers
    one response to another keeps equal weights. The paper has 20 epochs of 5e-3 in batches of 4.

    Parameters
    ----------
    model : fitted PreferenceModel with an `IdealPointHead`
    data : PreferenceData
        Comparisons with annotators; those without one are not read. Someone known already is fitted anew, from these
        comparisons alone.

    Returns
    -------
    PreferenceModel
        The model itself. The population's score stays that of the annotators of the fit.

    Raises
    ------
    InvalidInputError
        Another head; no annotators; features that are NaN, with their row.
    """
    head = model.head
    if not isinstance(head, IdealPointHead):
        raise InvalidInputError(f"fit_new_users needs a fitted model with an IdealPointHead, got {type(head).__name__}")
    table = ComparisonTable(data)
    if not table.annotators:
        raise InvalidInputError(f"{data.source} names no annotators; fit_new_users needs to know whose weights to fit")
    begun = head.training
    head.eval()
    found = torch.zeros(len(table.annotators), head.config["components"]).to(head.logits)
    for first in range(0, len(found), USERS):
        some = np.flatnonzero((table.annotator >= first) & (table.annotator < first + USERS))
        objective = _objective(model, head, data.select(some), table.annotators[first : first + USERS])
        rates: dict[str, Any] = {"lr": learning_rate, "epochs": epochs, "weight_decay": weight_decay}
        start = found[first : first + USERS]
        found[first : first + USERS] = fit_logits(start, objective, temperature=head.config["temperature"], **rates)
    head.train(begun)
    names = (*model.annotators, *(name for name in table.annotators if name not in set(model.annotators)))
    place = {name: code for code, name in enumerate(names)}
    logits = head.logits.new_zeros(len(names), found.shape[1])
    with torch.no_grad():
        logits[: len(head.logits)] = head.logits
        logits[[place[name] for name in table.annotators]] = found
    head.logits, head._names = nn.Parameter(logits), names
    head.config["annotators"] = len(names)
    model.annotators = names
    return model


def _objective(
    model: PreferenceModel, head: IdealPointHead, data: PreferenceData, names: tuple[Any, ...]
) -> Callable[[Tensor], Tensor]:
    """Loss of the comparisons of `names` as a function of their weights, summed over the comparisons."""
    table, network = ComparisonTable(data, names), model._network().eval()
    source, index = model._source(table), np.arange(len(table))
    with torch.no_grad():
        parts = [source(part, network, model.device)[0] for part in np.array_split(index, len(index) // ROWS + 1)]
        for part in parts:
            bad = ~torch.isfinite(part.features).all(dim=1)
            if bool(bad.any()):
                raise InvalidInputError(
                    f"{data.source}: the features of response {int(bad.int().argmax())} are NaN or infinite"
                )
        mapped = torch.cat([head.space.f(part.features) for part in parts])
        anchors = _anchors(head, parts)
    comparisons = table.batch(index, model.device)
    owner, who = comparisons.comparison, comparisons.annotator
    # a sum, and not a mean, so that a person's weights do not depend on who is fitted beside them
    judged = len(comparisons.pairs.comparison.unique())

    def objective(weights: Tensor) -> Tensor:
        if head.uses_prompt:
            points = head.space.points(weights[who], anchors=anchors)[owner]
        else:
            points = head.space.points(weights, anchors=anchors)[who[owner]]
        loss, _ = model.likelihood.loss(Scores(head.space.utility(mapped, points)), comparisons)
        total: Tensor = loss * judged
        return total

    return objective


def _anchors(head: IdealPointHead, parts: list[Items]) -> Tensor | None:
    if not head.uses_prompt:
        return None if head.config["mixing"] == "before" else head.space.anchors()
    found = []
    for part in parts:
        fresh = torch.ones_like(part.comparison, dtype=torch.bool)
        fresh[1:] = part.comparison[1:] != part.comparison[:-1]
        found.append(head.space.anchors(head._prompt(part)[fresh]))
    return torch.cat(found)
