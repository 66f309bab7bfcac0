"""Contrastive learning beside the loss of a reward model: two noisy views of one response (or pair) should be alike.

    SimCSE: l_i = -log exp(cos(h_s^i, h_t^i) / tau) / sum_j exp(cos(h_s^i, h_t^j) / tau)
    SwAV:   l_i = -sum_k [q_t log p_s + q_s log p_t],  p = softmax(h C^T / tau),  q = Sinkhorn codes of the batch
    L = L_rm + beta mean_i l_i

Views are two passes with dropout. What is contrasted is the feature of each response ("pairs") or chosen less rejected
("difference"). In a `PreferenceModel`:

    PreferenceModel(encoder, partial(DropoutViewsHead, dropout=0.1), Contrastive(beta=0.1))

Papers: Secrets of RLHF in Large Language Models Part II (arXiv 2401.06080); SimCSE (arXiv 2104.08821); SwAV
(arXiv 2006.09882). That the first pass gives the scores of the fit, and SwAV's own Sinkhorn settings and ``tau``,
are this library's reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, normalize

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.reward_models.comparisons import Comparisons
from polyreward.reward_models.heads import ACTIVATIONS, Items, Scores
from polyreward.reward_models.likelihoods import BradleyTerry, Reduction
from polyreward.reward_models.saving import describe, make

KINDS, VIEWS = ("simcse", "swav"), ("pairs", "difference")
TAU = {"simcse": 0.05, "swav": 0.1}


def info_nce(cosines: Tensor, tau: float = 0.05, *, reduction: Reduction = "mean") -> Tensor:
    """SimCSE's loss of a matrix of cosines (B, B), rows the first view: cross-entropy of the diagonal.

    Parameters
    ----------
    cosines : float (B, B)
    tau : float > 0
    reduction : "mean", or "none" for (B,)
    """
    if cosines.ndim != 2 or cosines.shape[0] != cosines.shape[1]:
        raise InvalidInputError(f"cosines must have shape (B, B), got {tuple(cosines.shape)}")
    _positive("tau", tau)
    if not len(cosines):
        return cosines.sum() if reduction == "mean" else cosines.sum(1)
    return cross_entropy(cosines / tau, torch.arange(len(cosines), device=cosines.device), reduction=reduction)


def simcse_loss(first: Tensor, second: Tensor, tau: float = 0.05, *, reduction: Reduction = "mean") -> Tensor:
    """SimCSE (arXiv 2104.08821) of two views (B, d); 0 for a batch of one, which has no negatives.

    A feature of length 0 has cosine 0 with everything.
    """
    first, second = _views(first, second)
    return info_nce(normalize(first, dim=1) @ normalize(second, dim=1).T, tau, reduction=reduction)


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Codes of a batch in which each prototype gets the same share (SwAV, arXiv 2006.09882).

    Parameters
    ----------
    scores : float (B, K)
    epsilon : float > 0
        Entropy; the smaller, the harder the codes.
    iterations : int
        Columns, then rows, so often.

    Returns
    -------
    float (B, K)
        Rows sum to 1, columns to about B / K; without gradient.
    """
    _positive("epsilon", epsilon)
    log = scores.double() / epsilon
    for _ in range(iterations):
        log = log - torch.logsumexp(log, dim=0, keepdim=True)
        log = log - torch.logsumexp(log, dim=1, keepdim=True)
    return log.softmax(dim=1).to(scores.dtype)


def swav_loss(
    first: Tensor,
    second: Tensor,
    prototypes: Tensor,
    tau: float = 0.1,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    reduction: Reduction = "mean",
) -> Tensor:
    """SwAV's swapped prediction (arXiv 2006.09882) of two views (B, d) with prototypes (K, d), made unit rows."""
    first, second = _views(first, second)
    _positive("tau", tau)
    if prototypes.ndim != 2 or prototypes.shape[1] != first.shape[1]:
        raise InvalidInputError(
            f"prototypes have shape {tuple(prototypes.shape)}, expected (K, {first.shape[1]}) as the features"
        )
    unit = normalize(prototypes.to(first.dtype), dim=1)
    scores = [normalize(view, dim=1) @ unit.T for view in (first, second)]
    codes = [sinkhorn(score, epsilon, iterations) for score in scores]
    log_p = [log_softmax(score / tau, dim=1) for score in scores]
    loss = -(codes[1] * log_p[0] + codes[0] * log_p[1]).sum(dim=1)
    return loss.sum() if not len(loss) else loss.mean() if reduction == "mean" else loss


class ContrastiveRegularizer(nn.Module):
    """``beta`` times the contrastive loss of two views (arXiv 2401.06080).

    Parameters
    ----------
    kind : "simcse" or "swav"
    view : "pairs": each response's features; "difference": chosen less rejected
    tau : float > 0, optional
        Default 0.05 for SimCSE, 0.1 for SwAV.
    beta : float >= 0
    prototypes, width : int
        K and d of SwAV; its K x d prototypes are weights, unit rows.
    epsilon, iterations : of `sinkhorn`
    seed : int
        Of the prototypes' start.

    Calling it with two views (B, d) gives a scalar; `inputs` makes what a view holds of chosen and rejected features.
    """

    def __init__(
        self,
        kind: Literal["simcse", "swav"] = "simcse",
        view: Literal["pairs", "difference"] = "pairs",
        tau: float | None = None,
        beta: float = 1.0,
        *,
        prototypes: int = 32,
        width: int | None = None,
        epsilon: float = 0.05,
        iterations: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, known in (("kind", kind, KINDS), ("view", view, VIEWS)):
            if value not in known:
                raise UnknownNameError(f"unknown {name} {value!r}{nearest(str(value), known)}")
        self.kind, self.view, self.tau, self.beta = kind, view, TAU[kind] if tau is None else tau, beta
        self.epsilon, self.iterations = epsilon, iterations
        _positive("tau", self.tau)
        _positive("epsilon", epsilon)
        if not beta >= 0:
            raise InvalidInputError(f"beta must be at least 0, got {beta}")
        if kind == "swav":
            if width is None or width < 1 or prototypes < 2:
                raise InvalidInputError(
                    f"SwAV needs the width of the features and two or more prototypes, got width={width}, "
                    f"prototypes={prototypes}"
                )
            start = torch.randn(prototypes, width, generator=torch.Generator().manual_seed(seed))
            self.prototypes = nn.Parameter(normalize(start, dim=1))
        self.config: dict[str, Any] = {
            "kind": kind, "view": view, "tau": self.tau, "beta": beta, "prototypes": prototypes, "width": width,
            "epsilon": epsilon, "iterations": iterations, "seed": seed,
        }  # fmt: skip

    def inputs(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """What one view contrasts, of features (B, d) each: (2B, d) for "pairs", (B, d) for "difference"."""
        _views(chosen, rejected)
        return torch.cat([chosen, rejected]) if self.view == "pairs" else chosen - rejected

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """``beta`` times the mean loss."""
        if self.kind == "simcse":
            return self.beta * simcse_loss(first, second, self.tau)
        return self.beta * swav_loss(
            first, second, self.prototypes, self.tau, epsilon=self.epsilon, iterations=self.iterations
        )


@dataclass(frozen=True)
class ViewedScores(Scores):
    """Scores of the first view, and the features (R, d) of both; None outside training."""

    views: tuple[Tensor, Tensor] | None = None


class DropoutViewsHead(nn.Module):
    """Layers with dropout and a linear score of their features; in training two passes, which are the two views.

    Parameters
    ----------
    width : int
    hidden : int, optional
        Width d of the features, default `width`.
    layers : int
        Linear layers up to the features.
    activation : as of `TwoLayerHead`
    dropout : in (0, 1)
        After each layer.
    """

    def __init__(
        self, width: int, hidden: int | None = None, layers: int = 1, activation: str = "silu", dropout: float = 0.1
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise InvalidInputError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if layers < 1 or not 0 < dropout < 1:
            raise InvalidInputError(
                f"DropoutViewsHead needs layers >= 1 and dropout in (0, 1), without which both views are the same; "
                f"got {layers}, {dropout}"
            )
        self.config: dict[str, Any] = {
            "width": width, "hidden": hidden, "layers": layers, "activation": activation, "dropout": dropout
        }  # fmt: skip
        inner = hidden or width
        parts: list[nn.Module] = []
        for layer in range(layers):
            parts += [nn.Linear(width if layer == 0 else inner, inner), ACTIVATIONS[activation](), nn.Dropout(dropout)]
        self.trunk, self.score = nn.Sequential(*parts), nn.Linear(inner, 1)

    def forward(self, items: Items) -> Scores:
        """Scores (R,), with the two views in training."""
        features = self.trunk(items.features)
        views = (features, self.trunk(items.features)) if self.training else None
        return ViewedScores(self.score(features).squeeze(-1), views=views)


class Contrastive(nn.Module):
    """A likelihood with a `ContrastiveRegularizer` beside it, for heads that give `ViewedScores`.

    Parameters
    ----------
    likelihood : Likelihood, default `BradleyTerry`
    regularizer : ContrastiveRegularizer, optional
        Or its arguments, as `options`.

    Raises
    ------
    InvalidInputError
        In training, a head without views; for differences, a batch without a single preference is no error and adds 0.
    """

    def __init__(self, likelihood: Any = None, regularizer: Any = None, **options: Any) -> None:
        super().__init__()
        inner = BradleyTerry() if likelihood is None else likelihood
        self.likelihood = make(inner, "likelihood", Path("likelihood")) if isinstance(inner, Mapping) else inner
        if isinstance(regularizer, Mapping):
            regularizer, options = None, {**regularizer, **options}
        if regularizer is not None and options:
            raise InvalidInputError("give a regularizer or its arguments, not both")
        self.regularizer = ContrastiveRegularizer(**options) if regularizer is None else regularizer
        self.needs: Literal["order", "ratings"] = self.likelihood.needs

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that make it again."""
        return {"likelihood": describe(self.likelihood), "regularizer": self.regularizer.config}

    def loss(self, scores: Scores, comparisons: Comparisons) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of the likelihood, in training with the regulariser."""
        loss, metrics = self.likelihood.loss(scores, comparisons)
        if not self.training:
            return loss, metrics
        views = getattr(scores, "views", None)
        if views is None:
            raise InvalidInputError(
                "Contrastive needs a head that gives two views in training, such as DropoutViewsHead"
            )
        if self.regularizer.view == "difference":
            pairs = comparisons.pairs
            first, second = pairs.first[~pairs.tie], pairs.second[~pairs.tie]
            views = tuple(self.regularizer.inputs(view[first], view[second]) for view in views)
        term = self.regularizer(*views)
        return loss + term, {**metrics, "contrastive": term.detach()}

    def score(self, scores: Scores) -> Tensor:
        """That of the likelihood."""
        found: Tensor = self.likelihood.score(scores)
        return found

    def probability(self, first: Scores, second: Scores) -> Tensor:
        """That of the likelihood."""
        found: Tensor = self.likelihood.probability(first, second)
        return found

    def pair_log_probability(self, first: Tensor, second: Tensor) -> Tensor:
        """That of the likelihood."""
        found: Tensor = self.likelihood.pair_log_probability(first, second)
        return found


def _views(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    if first.ndim != 2 or first.shape != second.shape:
        raise InvalidInputError(
            f"both views must have one shape (B, d), got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    wide = torch.float32 if first.dtype in (torch.float16, torch.bfloat16) else first.dtype
    return first.to(wide), second.to(wide)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise InvalidInputError(f"{name} must be above 0, got {value}")
