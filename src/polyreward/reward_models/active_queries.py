"""Which comparisons to ask a new user: those whose answers say most about the latent.

Of S candidate sets of N pairs each, L label vectors are drawn from {0, 1}^N (all of them where there are no more than
L) and weighted by their probability under the model. With the posteriors N(mu_l, diag exp lv_l) that they would give,

    information   1/2 logdet Cov_mix - sum_l w_l 1/2 sum lv_l,   Cov_mix of the moment-matched mixture of the posteriors
    entropy       - sum_l w_l (entropy of the posterior l)

and the set with the highest is asked. "Personalizing Reinforcement Learning from Human Feedback with Variational
Preference Learning" (arXiv 2408.10075); its released code has the log of a mean of variances in place of the
log-determinant, all label vectors weighted alike, and for "entropy" the lowest over the label vectors.

For a reward that is linear in z, `laplace_precision` and `linear_information` give the Gaussian approximation directly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from polyreward.errors import InvalidInputError, UnknownNameError, nearest

Criterion = Literal["information", "entropy", "random"]
CRITERIA = ("information", "entropy", "random")
SETS = 1 << 15
"""Sets that go through the encoder at once."""


class QueryModel(Protocol):
    """What choosing queries needs of a model; `VariationalPreferences` is one."""

    def encode(self, first: Tensor, second: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Posteriors of B sets."""
        ...

    def latent(self, mean: Tensor, log_variance: Tensor | None = None, generator: Any = None) -> Tensor:
        """What `logits` reads, drawn where there is a log-variance."""
        ...

    def logits(self, first: Tensor, second: Tensor, z: Tensor) -> Tensor:
        """Logits that the first is preferred."""
        ...

    def sample_prior(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Latents of people of whom nothing is known."""
        ...


@dataclass(frozen=True)
class Queries:
    """The chosen set.

    Attributes
    ----------
    index : int
        Which candidate; ``int(queries)`` is the same.
    scores : float (S,)
        The criterion; higher is better.
    """

    index: int
    scores: Tensor

    def __index__(self) -> int:
        return self.index

    def __int__(self) -> int:
        return self.index

    @property
    def order(self) -> Tensor:
        """Candidates from the best to the worst, int64 (S,)."""
        return self.scores.argsort(descending=True, stable=True)


@torch.no_grad()
def select_queries(
    candidates: Tensor | Sequence[Tensor],
    model: QueryModel | None,
    n_label_samples: int = 50,
    criterion: Criterion = "information",
    *,
    n_latent_samples: int = 64,
    given: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Queries:
    """Choose the set of pairs to ask (arXiv 2408.10075).

    Parameters
    ----------
    candidates : (first, second), each float (S, N, d), or one float (S, N, 2, d)
    model : `VariationalPreferences`, or another `QueryModel`
        Not read for "random".
    n_label_samples : int
        L, 50 in the paper. Bits are drawn one by one, so that N may be any number.
    criterion : "information", "entropy" or "random"
    n_latent_samples : int
        Draws of z over which the probability of the labels is averaged.
    given : (first (M, d), second (M, d), labels (M,)), optional
        What this user has answered: the draws of z are then from their posterior, and the answers stand before each
        candidate (for an attention encoder, or a concat encoder of M + N pairs).
    generator : torch.Generator, optional

    Raises
    ------
    InvalidInputError
        Shapes that do not fit, no candidates, counts below 1.
    UnknownNameError
        An unknown criterion.
    """
    if criterion not in CRITERIA:
        raise UnknownNameError(f"unknown criterion {criterion!r}{nearest(str(criterion), CRITERIA)}")
    if min(n_label_samples, n_latent_samples) < 1:
        raise InvalidInputError(
            f"n_label_samples and n_latent_samples must be at least 1, got {n_label_samples}, {n_latent_samples}"
        )
    first, second = _pairs(candidates)
    if criterion == "random":
        scores = torch.rand(len(first), generator=generator, device=first.device)
        return Queries(int(scores.argmax()), scores)
    if model is None:
        raise InvalidInputError(f"the criterion {criterion!r} needs a model")
    if given is None:
        z = model.sample_prior(n_latent_samples, generator)
    else:
        mean, log_variance = model.encode(given[0][None], given[1][None], given[2][None])
        z = model.latent(mean.expand(n_latent_samples, -1), log_variance.expand(n_latent_samples, -1), generator)
    labels = label_vectors(first.shape[1], n_label_samples, generator, first.device)
    weights = label_weights(model.logits(first, second, z.view(len(z), 1, 1, -1)), labels)
    means, log_variances = _posteriors(model, first, second, labels, given)
    scores = (
        mixture_information(means, log_variances, weights)
        if criterion == "information"
        else -(weights * _entropy(log_variances)).sum(dim=-1)
    )
    return Queries(int(scores.argmax()), scores)


def label_vectors(
    count: int, samples: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Label vectors float (L, count): all 2^count where these are no more than `samples`, else `samples` drawn ones."""
    if count <= 30 and 2**count <= samples:
        numbers = torch.arange(2**count, device=device)
        return (numbers.unsqueeze(1) >> torch.arange(count, device=device) & 1).float()
    return torch.randint(0, 2, (samples, count), generator=generator, device=device).float()


def label_weights(logits: Tensor, labels: Tensor) -> Tensor:
    """How probable each label vector is, among those given.

    Parameters
    ----------
    logits : float (Z, S, N)
        Under Z draws of the latent.
    labels : float (L, N)

    Returns
    -------
    float (S, L)
        Sums to 1 over L.
    """
    # sum_i log sigma(+-x_i) = sum_i (y_i x_i) + sum_i log sigma(-x_i)
    log_joint = logits @ labels.to(logits.dtype).T + logsigmoid(-logits).sum(dim=-1, keepdim=True)
    return (torch.logsumexp(log_joint, dim=0)).softmax(dim=-1)


def mixture_information(means: Tensor, log_variances: Tensor, weights: Tensor) -> Tensor:
    """``1/2 logdet Cov_mix - sum_l w_l 1/2 sum lv_l`` in nats; never negative.

    Parameters
    ----------
    means, log_variances : float (S, L, d)
    weights : float (S, L)

    Returns
    -------
    float (S,)
    """
    if means.shape != log_variances.shape or weights.shape != means.shape[:2]:
        raise InvalidInputError(
            f"means {tuple(means.shape)}, log_variances {tuple(log_variances.shape)} and weights "
            f"{tuple(weights.shape)} do not fit: expected (S, L, d) twice and (S, L)"
        )
    means, log_variances, weights = means.double(), log_variances.double(), weights.double()
    share = weights.unsqueeze(-1)
    centred = means - (share * means).sum(dim=1, keepdim=True)
    covariance = (share * centred).transpose(1, 2) @ centred
    covariance = covariance + torch.diag_embed((share * log_variances.exp()).sum(dim=1))
    inside = (weights * log_variances.sum(dim=-1)).sum(dim=-1)
    return (0.5 * (torch.linalg.slogdet(covariance)[1] - inside)).clamp(min=0)


def laplace_precision(differences: Tensor, z: Tensor | None = None, prior_precision: Tensor | None = None) -> Tensor:
    """Precision of z after N answers about a reward z . s, by Laplace's approximation: I + sum sigma'(z . ds) ds ds^T.

    Parameters
    ----------
    differences : float (..., N, d)
        ds, first less second.
    z : float (..., d), optional
        Where; default 0, at which sigma' is 1/4.
    prior_precision : float (..., d, d), optional
        Default the identity.

    Returns
    -------
    float (..., d, d)
    """
    if differences.ndim < 2:
        raise InvalidInputError(f"differences must be (..., N, d), got shape {tuple(differences.shape)}")
    at = differences.new_zeros(differences.shape[-1]) if z is None else z
    chance = torch.sigmoid((differences @ at.unsqueeze(-1)).squeeze(-1))
    prior = torch.eye(differences.shape[-1], dtype=differences.dtype, device=differences.device)
    curvature = (differences * (chance * (1 - chance)).unsqueeze(-1)).transpose(-1, -2) @ differences
    return (prior if prior_precision is None else prior_precision) + curvature


def linear_information(precision: Tensor, differences: Tensor, z: Tensor | None = None) -> Tensor:
    """By how many nats N further answers narrow a posterior of a linear reward: half the rise of its log-determinant.

    Parameters
    ----------
    precision : float (d, d)
    differences : float (..., N, d)

    Returns
    -------
    float (...,)
    """
    after = laplace_precision(differences, z, precision)
    return 0.5 * (torch.linalg.slogdet(after)[1] - torch.linalg.slogdet(precision)[1])


def _posteriors(
    model: QueryModel, first: Tensor, second: Tensor, labels: Tensor, given: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Posteriors (S, L, d) of every candidate under every label vector."""
    count, answers = len(labels), None
    if given is not None:
        # every label vector stands behind what has been answered
        first, second = (
            torch.cat([known.expand(len(asked), *known.shape), asked], dim=1)
            for known, asked in zip(given[:2], (first, second), strict=True)
        )
        answers = given[2].to(labels.dtype).expand(count, -1)
        labels = torch.cat([answers, labels], dim=1)
    found = []
    for some in torch.arange(len(first), device=first.device).split(max(SETS // count, 1)):
        sets = [part[some].repeat_interleave(count, dim=0) for part in (first, second)]
        found.append(torch.stack(model.encode(sets[0], sets[1], labels.repeat(len(some), 1))))
    means, log_variances = torch.cat(found, dim=1).unflatten(1, (len(first), count)).unbind(0)
    return means, log_variances


def _entropy(log_variances: Tensor) -> Tensor:
    return 0.5 * (log_variances + math.log(2 * math.pi) + 1).sum(dim=-1)


def _pairs(candidates: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    if isinstance(candidates, Tensor):
        if candidates.ndim != 4 or candidates.shape[2] != 2:
            raise InvalidInputError(f"candidates must be (S, N, 2, d), got shape {tuple(candidates.shape)}")
        first, second = candidates.unbind(dim=2)
    else:
        if len(candidates) != 2:
            raise InvalidInputError(f"candidates must be (first, second), got {len(candidates)} parts")
        first, second = candidates
    if first.ndim != 3 or first.shape != second.shape or not first.shape[0] or not first.shape[1]:
        raise InvalidInputError(
            f"candidates must be two tensors (S, N, d) with S and N above 0, got shapes {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    return first, second
