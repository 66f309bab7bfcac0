"""Fitted mixtures routed to a context: `route_to_context` tunes the router of a `PreferenceModel` from few pairs.

    for_brevity = route_to_context(model, pairs_judged_for_brevity)

The second stage of "MiCRo: Mixture Modeling and Context-aware Routing for Personalized Preference Learning"
(arXiv 2505.24846); see `polyreward.reward_models.context_routing`.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.preferences import PreferenceData
from polyreward.reward_models.comparisons import ComparisonTable
from polyreward.reward_models.context_routing import HedgeRouterTrainer
from polyreward.reward_models.mixture_models import MixtureHead, MixtureLikelihood


def route_to_context(
    model: Any,
    preferences: PreferenceData,
    tau: float = 1e-3,
    *,
    validation: PreferenceData | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A fitted `PreferenceModel` routed to a context: its router learns from few pairs, its heads are the same.

    Parameters
    ----------
    model : PreferenceModel with a `MixtureHead` whose router reads the prompt
        Left as it is.
    preferences : PreferenceData
        Some 50 pairs a context. The prompts hold the context as they will when the model scores; ties are left out.
    tau : float > 0
    validation : PreferenceData, optional
        Chooses the epoch.
    seed : int
        Of the batches.
    options : ``epochs``, ``batch``, ``refresh``, ``learning_rate`` as of `HedgeRouterTrainer`

    Returns
    -------
    PreferenceModel

    Raises
    ------
    InvalidInputError
        The model has no such head, or is not fitted.
    """
    head, likelihood = model.head, model.likelihood
    if not isinstance(head, MixtureHead) or head.router is None or not isinstance(likelihood, MixtureLikelihood):
        raise InvalidInputError(
            "routing needs a fitted PreferenceModel of MixtureHead(router='context') and MixtureLikelihood, got "
            f"{type(head).__name__} and {type(likelihood).__name__}"
        )
    routed = copy.copy(model)
    routed.head = copy.deepcopy(head)
    generator = torch.Generator().manual_seed(seed)
    trainer = HedgeRouterTrainer(routed.head.router, None, tau, generator=generator, **options)
    held = None if validation is None else _context_losses(model, validation)
    trainer.fit_losses(*_context_losses(model, preferences), held)
    routed.head.eval()
    return routed


@torch.no_grad()
def _context_losses(model: Any, preferences: PreferenceData) -> tuple[Tensor, Tensor]:
    """Features of the prompts (P, p) and losses under each head (P, K) of the pairs that are no ties."""
    if not len(preferences):
        head = model.head
        return torch.zeros(0, head.config["prompt_width"] or head.config["width"]), torch.zeros(
            0, head.config["components"]
        )
    pairs = ComparisonTable(preferences).batch(np.arange(len(preferences)), model.device).pairs
    kept = ~pairs.tie
    prompts: Any = preferences.prompts
    values = model.evaluate_head(preferences.of_responses(prompts), preferences.responses).values
    losses = -model.likelihood.inner.pair_log_probability(values[pairs.first[kept]], values[pairs.second[kept]])
    features = np.asarray(model.encoder.encode_prompts(prompts), dtype=np.float32)
    return torch.from_numpy(features).to(losses.device)[pairs.comparison[kept]], losses
