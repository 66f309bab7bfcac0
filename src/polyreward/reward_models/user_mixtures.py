"""`UserMixture`: each person as weights over K prototypes that all share.

    w_u = softmax(W_u / T)

A person costs K numbers, so that a few comparisons tell a new one apart while everything that is shared stays as it is.
From "PAL: Pluralistic Alignment Framework for Learning from Heterogeneous Preferences" (arXiv 2406.08469); see
`polyreward.reward_models.ideal_points` for the prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.reward_models.pair_losses import PairLossName, pair_loss

Mode = Literal["mixture", "partition"]
MODES = get_args(Mode)
Ids = Sequence[Hashable] | np.ndarray | Tensor
Margin = Callable[[Tensor, Any], Tensor]


class UnknownUserError(UnknownNameError, KeyError):
    """A user of whom the mixture has no weights."""

    __str__ = Exception.__str__  # a KeyError shows its message in quotes


def mixture_weights(logits: Tensor, temperature: float = 1.0, hard: bool = False) -> Tensor:
    """``softmax(logits / T)`` over the last axis, or one-hot at its largest with `hard`; of equal ones the first."""
    weights = (logits / temperature).softmax(dim=-1)
    return torch.zeros_like(weights).scatter(-1, weights.argmax(-1, keepdim=True), 1.0) if hard else weights


def check_weights(weights: Tensor, components: int) -> Tensor:
    """Weights that are given in place of a user's, (..., K) on the simplex.

    Raises
    ------
    InvalidInputError
        Another number of them, a negative one, or a sum that is off 1 by more than 1e-4.
    """
    if weights.ndim < 1 or weights.shape[-1] != components:
        raise InvalidInputError(f"expected weights of {components} prototypes, got shape {tuple(weights.shape)}")
    if not bool((weights >= 0).all()) or not bool(((weights.sum(dim=-1) - 1).abs() <= 1e-4).all()):
        raise InvalidInputError(f"weights must be at least 0 and sum to 1, got {weights.tolist()}")
    return weights


def fit_logits(
    start: Tensor,
    objective: Callable[[Tensor], Tensor],
    lr: float = 5e-3,
    epochs: int = 20,
    *,
    temperature: float = 1.0,
    weight_decay: float = 0.01,
) -> Tensor:
    """Logits (U, K) by AdamW on them alone; nothing that `objective` reads is changed, nor its gradients.

    Parameters
    ----------
    start : float (U, K)
    objective : function of weights (U, K) -> scalar
        A sum over the users' own losses keeps each independent of the others.
    lr, epochs, weight_decay : as of AdamW, a step an epoch
    """
    if epochs < 0 or not 0 < lr < math.inf:
        raise InvalidInputError(f"epochs must be at least 0 and lr a positive number, got {epochs}, {lr}")
    with torch.enable_grad():
        logits = start.detach().clone().requires_grad_()
        optimizer = torch.optim.AdamW([logits], lr=lr, weight_decay=weight_decay)
        for _ in range(epochs):
            (logits.grad,) = torch.autograd.grad(objective(mixture_weights(logits, temperature)), [logits])
            optimizer.step()
    return logits.detach()


class UserMixture(nn.Module):
    """Weights over K prototypes of every user; ``logits`` (U, K) learns, ``ids`` says whose rows they are.

    The state, ids with it, is in ``state_dict()``; ids are to be texts or numbers there.

    Parameters
    ----------
    K : int
        Prototypes.
    temperature : float > 0
        T.
    mode : "mixture" or "partition"
        With the second, weights are soft in training and one-hot at the largest afterwards (``eval()``).
    margin : function of (weights (N, K), comparisons) -> (N,), optional
        How far the left response of each comparison is ahead, for `fit_new`. By default `comparisons` are the margins
        (N, K) under each prototype, and the margin is their mean by weight: exact for squared distances.
    """

    def __init__(self, K: int, temperature: float = 1.0, mode: Mode = "mixture", margin: Margin | None = None) -> None:
        super().__init__()
        if K < 1 or not 0 < temperature < math.inf:
            raise InvalidInputError(
                f"K must be at least 1 and the temperature a positive number, got {K}, {temperature}"
            )
        if mode not in MODES:
            raise UnknownNameError(f"unknown mode {mode!r}{nearest(str(mode), MODES)}")
        self.K, self.temperature, self.mode, self.margin = K, float(temperature), mode, margin
        self.logits = nn.Parameter(torch.zeros(0, K))
        self._place: dict[Hashable, int] = {}

    @property
    def ids(self) -> tuple[Hashable, ...]:
        """Users in the order of the rows of `logits`."""
        return tuple(self._place)

    @property
    def state(self) -> dict[Hashable, Tensor]:
        """Logits (K,) of each user."""
        return dict(zip(self._place, self.logits.detach(), strict=True))

    def register(self, ids: Ids, spread: float = 0.0, generator: torch.Generator | None = None) -> UserMixture:
        """Add users; those who are known are left as they are.

        The parameter `logits` is a new one afterwards: make the optimiser after it.

        Parameters
        ----------
        spread : float >= 0
            Deviation of the first logits. 0 begins at equal weights; the paper's code has 1 for everyone, which is
            noise for someone new with few comparisons. Above 0 and without `generator`, torch's own generator draws.
        """
        fresh = [user for user in dict.fromkeys(_listed(ids)) if user not in self._place]
        if not fresh:
            return self
        drawn = torch.zeros(len(fresh), self.K)
        if spread:
            drawn = spread * torch.randn(len(fresh), self.K, generator=generator)
        old = self.logits.detach()
        self.logits = nn.Parameter(torch.cat([old, drawn.to(old)]), requires_grad=self.logits.requires_grad)
        self._place |= {user: len(old) + row for row, user in enumerate(fresh)}
        return self

    def rows(self, ids: Ids) -> Tensor:
        """Rows of `logits`, int64 (B,).

        Raises
        ------
        UnknownUserError
            Someone is not registered.
        """
        listed = _listed(ids)
        for user in listed:
            if user not in self._place:
                raise UnknownUserError(
                    f"unknown user {user!r} of {len(self._place)}; register([{user!r}]) or fit_new them first, or "
                    "score with weights (K,) of your own"
                )
        return torch.tensor([self._place[user] for user in listed], dtype=torch.int64, device=self.logits.device)

    def weights(self, ids: Ids) -> Tensor:
        """Weights of users, float (B, K)."""
        hard = self.mode == "partition" and not self.training
        return mixture_weights(self.logits[self.rows(ids)], self.temperature, hard)

    forward = weights

    def table(self) -> dict[Hashable, list[float]]:
        """Weights of every user, for audits."""
        with torch.no_grad():
            found = mixture_weights(self.logits, self.temperature, self.mode == "partition").tolist()
        return dict(zip(self._place, found, strict=True))

    def fit_new(
        self,
        ids: Ids,
        comparisons: Any,
        lr: float = 5e-3,
        epochs: int = 20,
        *,
        label: Tensor | None = None,
        loss: PairLossName = "logistic",
        margin: Margin | None = None,
        users: Ids | None = None,
    ) -> UserMixture:
        """Logits of new users from their comparisons, everything else frozen; from 0, so that nothing is random.

        All comparisons make one step of AdamW an epoch, and each user's loss is the mean over their own: nobody's
        weights depend on who is fitted beside them. The paper's 20 epochs of 5e-3 go through batches of 4; for full
        batches of more, 150 epochs of 0.05 go as far as the weights need.

        Parameters
        ----------
        ids : length N
            Who made each comparison. Someone known is fitted anew.
        comparisons : what the margin reads
        label : (N,), optional
            +1 (or True) where the left one is preferred, -1 (or False) where the right one is; default left.
        loss : as of `pair_loss`
        margin : in place of the mixture's own
        users : optional
            Further users to register; without a comparison they keep equal weights.

        Raises
        ------
        InvalidInputError
            Labels that are neither; margins that are NaN or not (N,).
        """
        listed = _listed(ids)
        own = list(dict.fromkeys([*listed, *_listed(() if users is None else users)]))
        place = {user: row for row, user in enumerate(own)}
        device, dtype = self.logits.device, self.logits.dtype
        who = torch.tensor([place[user] for user in listed], dtype=torch.int64, device=device)
        sign = _signs(label, len(listed)).to(device, dtype)
        share = 1.0 / torch.bincount(who, minlength=len(own)).clamp(min=1)[who].to(dtype)
        ahead = margin or self.margin or _linear

        def objective(weights: Tensor) -> Tensor:
            found = ahead(weights[who], comparisons)
            if found.shape != sign.shape or not bool(torch.isfinite(found).all()):
                raise InvalidInputError(
                    f"fit_new needs a finite margin for each of {len(listed)} comparisons, got shape "
                    f"{tuple(found.shape)}" + ("" if found.shape != sign.shape else " with NaN or infinite entries")
                )
            return (pair_loss(sign * found, loss, reduction="none") * share).sum()

        start = torch.zeros(len(own), self.K, device=device, dtype=dtype)
        found = start
        if listed:
            found = fit_logits(start, objective, lr, epochs, temperature=self.temperature)
        self.register(own)
        with torch.no_grad():
            self.logits[self.rows(own)] = found
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """Ids, for ``state_dict``."""
        return {"ids": list(self._place)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Ids, from a ``state_dict``."""
        self._place = {user: row for row, user in enumerate(state["ids"])}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        stored = state_dict.get(f"{prefix}logits")
        if stored is not None and stored.ndim == 2 and stored.shape[1] == self.K:
            self.logits = nn.Parameter(self.logits.new_zeros(stored.shape))  # as many users as were stored
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _listed(ids: Ids | Iterable[Hashable]) -> list[Hashable]:
    if isinstance(ids, str):
        raise InvalidInputError(f"ids are a sequence of users, got the text {ids!r}; pass [{ids!r}]")
    return ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)


def _signs(label: Tensor | None, count: int) -> Tensor:
    if label is None:
        return torch.ones(count)
    signs = torch.as_tensor(label)
    signs = 2.0 * signs.float() - 1 if signs.dtype == torch.bool else signs.float()
    if signs.shape != (count,) or not bool((signs.abs() == 1).all()):
        raise InvalidInputError(
            f"label takes +1 (left preferred) or -1 (right) for each of {count} comparisons, got {label}"
        )
    return signs


def _linear(weights: Tensor, margins: Any) -> Tensor:
    if not isinstance(margins, Tensor) or margins.shape != weights.shape:
        found = tuple(margins.shape) if isinstance(margins, Tensor) else type(margins).__name__
        raise InvalidInputError(
            f"without a margin function comparisons are margins {tuple(weights.shape)} under each prototype, "
            f"got {found}"
        )
    return (weights * margins.to(weights)).sum(dim=-1)
