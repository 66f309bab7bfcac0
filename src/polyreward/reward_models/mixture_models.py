"""Mixtures in `PreferenceModel`: `MixtureHead` gives scores of K heads and their weights, `MixtureLikelihood` mixes.

    PreferenceModel(encoder, partial(MixtureHead, components=5), MixtureLikelihood()).fit(data)

The likelihood of a pair is ``log sum_k w_k P_k`` with P_k of any likelihood of pairs: a mixture of ordinal ratings is
``partial(MixtureHead, components=3, outputs=9)`` with ``MixtureLikelihood(OrdinalLikelihood(9))``. "MiCRo: Mixture
Modeling and Context-aware Routing for Personalized Preference Learning" (arXiv 2505.24846).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.reward_models.comparisons import Comparisons
from polyreward.reward_models.heads import Items, Scores
from polyreward.reward_models.likelihoods import BradleyTerry
from polyreward.reward_models.mixtures import (
    POINTWISE,
    ContextRouter,
    MultiHeadReward,
    Pointwise,
    entropy,
    head_regularizers,
    mixture_log_probability,
    mixture_score,
    require_components,
)

Router = Literal["context", "static", "annotator"]
ROUTERS = ("context", "static", "annotator")


class MixtureHead(nn.Module):
    """K linear rewards and the weights of each (arXiv 2505.24846).

    Parameters
    ----------
    width : int
        d.
    components : int
        K; the paper takes 5 and 10, and merges heads whose held-out predictions correlate strongly.
    outputs : int
        Numbers a response of each head, for a likelihood inside the mixture that reads several.
    router : "context", "static" or "annotator"
        The weights come from the prompt's features; are the same for all; or are each annotator's own. Someone unknown
        then gets the mean of the weights of all whom the fit has seen, which is the exact mixture of that population.
    hidden : int or None
        Units of the router from the prompt; None is linear.
    prompt_width : int, optional
        Width of the prompt's features, default d.
    entropy : float >= 0
        Weight of the negative entropy of the weights, alpha in the paper, where it is 0.5. On little data so much keeps
        the heads alike; on none of it one head may take all.
    orthogonality, norm, correlation : float >= 0
        Weights of `head_regularizers`.
    bias : bool, optional
        Of the heads; default only with several outputs.
    annotators : int
        Whom the weights are of with "annotator"; a fit sets it.
    """

    uses_prompt = True

    def __init__(
        self,
        width: int,
        components: int = 5,
        outputs: int = 1,
        router: Router = "context",
        *,
        hidden: int | None = 128,
        prompt_width: int | None = None,
        entropy: float = 0.5,
        orthogonality: float = 0.0,
        norm: float = 0.0,
        correlation: float = 0.0,
        bias: bool | None = None,
        annotators: int = 0,
    ) -> None:
        super().__init__()
        require_components(components)
        if outputs < 1:
            raise InvalidInputError(f"outputs must be at least 1, got {outputs}")
        if router not in ROUTERS:
            raise UnknownNameError(f"unknown router {router!r}{nearest(str(router), ROUTERS)}")
        penalties = {"orthogonality": orthogonality, "norm": norm, "correlation": correlation}
        for name, value in {"entropy": entropy, **penalties}.items():
            if not 0 <= value < math.inf:
                raise InvalidInputError(f"{name} must be a finite number from 0, got {value}")
        self.config: dict[str, Any] = {
            "width": width,
            "components": components,
            "outputs": outputs,
            "router": router,
            "hidden": hidden,
            "prompt_width": prompt_width,
            "entropy": entropy,
            **penalties,
            "bias": bias,
            "annotators": annotators,
        }
        self.uses_prompt = router == "context"
        self.rewards = MultiHeadReward(width, components * outputs, outputs > 1 if bias is None else bias)
        self.router = ContextRouter(prompt_width or width, components, hidden) if router == "context" else None
        rows = {"static": 1, "annotator": annotators}.get(router)
        self.logits = nn.Parameter(torch.zeros(rows, components)) if rows is not None else None
        self._names: tuple[Any, ...] | None = None

    def prepare(self, table: Any, features: Any = None) -> None:
        """Weights for the annotators of a fit; those of annotators from the fit before are kept.

        Raises
        ------
        InvalidInputError
            The router is "annotator" and the data have none.
        """
        if self.config["router"] != "annotator":
            return
        assert self.logits is not None
        names = tuple(table.annotators)
        if not names:
            raise InvalidInputError("router='annotator' needs annotators, and the data name none; use 'static'")
        kept = dict(zip(self._names or (), self.logits.detach(), strict=False))
        rows = self.logits.new_zeros(len(names), self.config["components"])
        for place, name in enumerate(names):
            if name in kept:
                rows[place] = kept[name]
        self.logits, self._names = nn.Parameter(rows), names
        self.config["annotators"] = len(names)

    def forward(self, items: Items) -> Scores:
        """Values (R, K), or (R, K, outputs), log-weights (R, K), and the terms of the loss."""
        count, outputs = self.config["components"], self.config["outputs"]
        values = self.rewards(items.features)
        if outputs > 1:
            values = values.reshape(len(values), count, outputs)
        # responses that are compared share a prompt and an annotator: one row of weights serves them all
        fresh = torch.ones_like(items.comparison, dtype=torch.bool)
        fresh[1:] = items.comparison[1:] != items.comparison[:-1]
        log_weights = self._log_weights(items, fresh.nonzero().squeeze(1))
        return Scores(values, log_weights[fresh.cumsum(0) - 1], self._terms(log_weights))

    def _log_weights(self, items: Items, rows: Tensor) -> Tensor:
        """Of each comparison, (B, K)."""
        if self.router is not None:
            if items.prompt is None:
                raise InvalidInputError("MixtureHead(router='context') reads the prompt's features, and there are none")
            wanted = self.config["prompt_width"] or self.config["width"]
            if items.prompt.shape[1] != wanted:
                raise InvalidInputError(
                    f"the prompts have {items.prompt.shape[1]} features and the router reads {wanted}; pass "
                    f"prompt_width={items.prompt.shape[1]} to MixtureHead"
                )
            return self.router(items.prompt[rows]).log_softmax(dim=-1)
        assert self.logits is not None
        own = self.logits.log_softmax(dim=-1)
        if self.config["router"] == "static":
            return own.expand(len(rows), -1)
        if not len(own):
            raise InvalidInputError("MixtureHead(router='annotator') has not been fitted and knows no annotators")
        population = torch.logsumexp(own, dim=0, keepdim=True) - math.log(len(own))
        return torch.cat([population, own])[items.annotator[rows] + 1]

    def _terms(self, log_weights: Tensor) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if self.config["entropy"]:
            terms["entropy"] = -self.config["entropy"] * entropy(log_weights).sum() / max(len(log_weights), 1)
        weighted = {name: self.config[name] for name in ("orthogonality", "norm", "correlation") if self.config[name]}
        if weighted:
            found = head_regularizers(self.rewards.linear.weight.reshape(self.config["components"], -1))
            terms |= {name: weight * found[name] for name, weight in weighted.items()}
        return terms


class MixtureLikelihood(nn.Module):
    """``log sum_k w_k P_k`` of pairs under K heads, each with the same likelihood of pairs (arXiv 2505.24846).

    A comparison of more than two counts as its pairs, each drawn from the mixture anew, with weights that sum to 1. A
    tie counts as half a win of each, or, where the inner likelihood has a `theta`, as what its wins leave. The data's
    targets are read, and the smoothing and centring of the inner likelihood are kept; margins and labels of levels are
    not read.

    Parameters
    ----------
    inner : Likelihood with ``pair_log_probability(first, second)``, default `BradleyTerry`
        The log-probability that the first is preferred, elementwise over leading axes. Or its description, as stored.
    pointwise : "reward" or "log_sigmoid"
        What a single response is worth, as of `mixture_score`, of the inner likelihood's scores of each head. It cannot
        order all pairs as the mixture does; ``probability`` and the accuracies are the mixture's own.
    """

    needs: ClassVar[Literal["order", "ratings"]] = "order"

    def __init__(self, inner: Any = None, pointwise: Pointwise = "reward") -> None:
        from polyreward.reward_models.saving import describe, make

        super().__init__()
        if isinstance(inner, Mapping):
            inner = make(inner, "likelihood", Path("MixtureLikelihood"))
        self.inner = BradleyTerry() if inner is None else inner
        if not hasattr(self.inner, "pair_log_probability"):
            raise InvalidInputError(f"{type(self.inner).__name__} has no pair_log_probability, which a mixture needs")
        if pointwise not in POINTWISE:
            raise UnknownNameError(f"unknown score {pointwise!r}{nearest(str(pointwise), POINTWISE)}")
        self.pointwise: Pointwise = pointwise
        self.config = {"inner": describe(self.inner), "pointwise": pointwise}

    def extra_repr(self) -> str:
        """What tells two mixtures apart."""
        return f"inner={self.inner!r}, pointwise={self.pointwise!r}"

    @property
    def outputs(self) -> int | None:
        """Numbers a response of each head that the inner likelihood reads, where it says so."""
        found = getattr(self.inner, "outputs", getattr(self.inner, "ratings", None))
        return found if isinstance(found, int) else None

    def pair_log_probabilities(self, first: Scores, second: Scores) -> tuple[Tensor, Tensor]:
        """Log-probabilities under the mixture that the first, and that the second is preferred, each (P,).

        The weights are the first's: those of a prompt and annotator, whom the two share.
        """
        a, b = _components(first), _components(second)
        assert first.log_weights is not None
        both = self.inner.pair_log_probability(a, b), self.inner.pair_log_probability(b, a)
        if both[0].shape != first.log_weights.shape:
            raise InvalidInputError(
                f"{type(self.inner).__name__} made {tuple(both[0].shape)} of values {tuple(a.shape)}, expected "
                f"{tuple(first.log_weights.shape)}; give the head outputs={self.outputs or 1}"
            )
        won, lost = (mixture_log_probability(first.log_weights, each) for each in both)
        return won, lost

    def loss(self, scores: Scores, comparisons: Comparisons) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean over comparisons of the mean over their pairs."""
        pairs = comparisons.pairs
        won, lost = self.pair_log_probabilities(_rows(scores, pairs.first), _rows(scores, pairs.second))
        smoothing = getattr(self.inner, "smoothing", 0.0)
        target = torch.where(pairs.tie, 0.5, pairs.target + smoothing * (1 - 2 * pairs.target))
        each = -target * won - (1 - target) * lost
        if getattr(self.inner, "theta", None) is not None:
            rest = (1 - won.exp() - lost.exp()).clamp(min=torch.finfo(won.dtype).tiny)
            each = torch.where(pairs.tie, -rest.log(), each)
        loss = (each * pairs.weight).sum()
        assert scores.log_weights is not None
        metrics = {
            "nll": loss.detach(),
            "accuracy": comparisons.pairs.accuracy(won - lost),
            "router_entropy": entropy(scores.log_weights.detach()).mean(),
        }
        centering = getattr(self.inner, "centering", 0.0)
        if centering:
            worth = self.score(scores)
            loss = loss + centering * ((worth[pairs.first] + worth[pairs.second]).square() * pairs.weight).sum()
        return loss, metrics

    def score(self, scores: Scores) -> Tensor:
        """What a response is worth by itself, (R,); see `pointwise`."""
        if scores.values.ndim == 1 and not len(scores.values):
            return scores.values
        values = _components(scores)
        assert scores.log_weights is not None
        each = self.inner.score(Scores(values.flatten(0, 1))).reshape(scores.log_weights.shape)
        return mixture_score(each, scores.log_weights, self.pointwise)

    def probability(self, first: Scores, second: Scores) -> Tensor:
        """Probability under the mixture that the first is preferred, plus half of that of a tie; (P,)."""
        if first.values.ndim == 1 and not len(first.values):
            return first.values
        won, lost = self.pair_log_probabilities(first, second)
        return 0.5 * (1 + won.exp() - lost.exp())


def _components(scores: Scores) -> Tensor:
    if scores.log_weights is None or scores.values.ndim < 2 or scores.values.shape[:2] != scores.log_weights.shape:
        weights = None if scores.log_weights is None else tuple(scores.log_weights.shape)
        raise InvalidInputError(
            f"a mixture needs scores (R, K) with log-weights (R, K), the head returned {tuple(scores.values.shape)} "
            f"and {weights}; use MixtureHead"
        )
    return scores.values


def _rows(scores: Scores, rows: Tensor) -> Scores:
    weights = None if scores.log_weights is None else scores.log_weights[rows]
    return Scores(scores.values[rows], weights)
