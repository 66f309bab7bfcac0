"""Ideal points: people and responses in one learned space, where each person likes best what is closest to them.

    PAL-A  a_u = f(w_u P)                      s(x) = -|f(x) - a_u|
    PAL-B  a_u(q) = sum_k w_uk g_k(q)          s(q, x) = exp(t) cos(f(x), a_u(q))

K prototypes P, or K maps g_k of the prompt, are shared, and a person is a mixture w_u of them (`UserMixture`). A left
response is preferred to a right one where ``s(left) - s(right)`` is positive. From "PAL: Pluralistic Alignment
Framework for Learning from Heterogeneous Preferences" (arXiv 2406.08469); `IdealPointHead` is the same in
`PreferenceModel`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.reward_models.heads import ACTIVATIONS
from polyreward.reward_models.pair_losses import PairLossName
from polyreward.reward_models.user_mixtures import Ids, Mode, UserMixture, check_weights

Kind = Literal["A", "B"]
Distance = Literal["l2", "sq_l2", "cosine"]
Mixing = Literal["before", "after", "latent"]

SCALE, LARGEST_SCALE = 1 / 0.07, 100.0
EPSILON = 1e-12
"""Under the root of a distance, whose gradient would be NaN where an item is at the ideal point."""


def ideal_point(weights: Tensor, anchors: Tensor) -> Tensor:
    """``a = sum_k w_k p_k``, (..., d), of weights (..., K) and prototypes (K, d) or (..., K, d)."""
    return (weights.unsqueeze(-2) @ anchors).squeeze(-2) if anchors.ndim > 2 else weights @ anchors


def utility(items: Tensor, points: Tensor, distance: Distance = "l2", scale: Tensor | float = SCALE) -> Tensor:
    """What items are worth to whose ideal points these are: minus the distance, or `scale` times the cosine.

    Parameters
    ----------
    items, points : float (..., d), broadcast
        A zero vector has cosine 0.
    distance : "l2", "sq_l2" or "cosine"
    scale : exp(t) of the cosine; 1 / 0.07 before it is learned

    Returns
    -------
    float (...,)
        In float32 or wider.
    """
    _known("distance", distance, Distance)
    wide = torch.promote_types(torch.promote_types(items.dtype, points.dtype), torch.float32)
    items, points = items.to(wide), points.to(wide)
    if distance == "cosine":
        return scale * (normalize(items, dim=-1, eps=1e-8) * normalize(points, dim=-1, eps=1e-8)).sum(dim=-1)
    squared = (items - points).square().sum(dim=-1)
    return -squared if distance == "sq_l2" else -(squared + EPSILON).sqrt()


def ideal_point_margin(
    left: Tensor, right: Tensor, points: Tensor, distance: Distance = "l2", scale: Tensor | float = SCALE
) -> Tensor:
    """By how much the left items are preferred, (...,): `utility` of the left minus that of the right.

    The paper's code has the opposite sign. With squared distances it is ``2 a (left - right) + |right|^2 - |left|^2``,
    linear in the ideal point a, so that the margin of a mixture is the mixture of the margins.
    """
    return utility(left, points, distance, scale) - utility(right, points, distance, scale)


def bound_penalty(points: Tensor, bound: float = 4.0) -> Tensor:
    """``sum max(0, |a| - bound)``, scalar; the paper's code computes it and leaves it out of the loss."""
    return (points.norm(dim=-1) - bound).clamp(min=0).sum()


class PointMap(nn.Module):
    """Layers of width `d_out` with an activation between them, a linear output, and optionally a way around them.

    Parameters
    ----------
    d_in, d_out : int
    hidden_layers : int
        0 is a linear map.
    residual : bool
        Add the input; through a linear map without bias where the widths differ.
    activation : "relu", "gelu", "silu" or "tanh"
    """

    def __init__(
        self, d_in: int, d_out: int, hidden_layers: int = 2, residual: bool = True, activation: str = "relu"
    ) -> None:
        super().__init__()
        if min(d_in, d_out) < 1 or hidden_layers < 0:
            raise InvalidInputError(
                f"widths must be at least 1 and hidden_layers at least 0, got {d_in}, {d_out}, {hidden_layers}"
            )
        if activation not in ACTIVATIONS:
            raise UnknownNameError(f"unknown activation {activation!r}{nearest(activation, ACTIVATIONS)}")
        widths = [d_in, *[d_out] * hidden_layers]
        hidden: list[nn.Module] = []
        for a, b in pairwise(widths):
            hidden += [nn.Linear(a, b), ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*hidden, nn.Linear(widths[-1], d_out))
        self.around: nn.Module | None = None
        if residual:
            self.around = nn.Identity() if d_in == d_out else nn.Linear(d_in, d_out, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        found: Tensor = self.layers(inputs)
        return found if self.around is None else found + self.around(inputs)


class IdealPointSpace(nn.Module):
    """The space that all share: f, and the K prototypes P (kind A) or maps g_k (kind B).

    Parameters
    ----------
    kind : "A" or "B"
        One ideal point for all prompts; or one for each prompt.
    K, d_in, d_latent : int
        Prototypes, width of the items' features, and of the space (default `d_in`, the paper's).
    distance : default "l2" for A, "cosine" for B
    hidden_layers : int
        Of f and g_k, each as wide as the space.
    residual, activation : default True and "relu" for A, False and "gelu" for B
    mixing : "before", "after" or "latent"
        Of A: ``f(w P)`` with prototypes among the items' features, ``w f(P)``, or ``w P`` with prototypes in the space.
    d_prompt : int
        Of B: width of the prompts' features, default `d_in`.
    """

    def __init__(
        self,
        kind: Kind,
        K: int,
        d_in: int,
        d_latent: int | None = None,
        distance: Distance | None = None,
        hidden_layers: int = 2,
        residual: bool | None = None,
        *,
        activation: str | None = None,
        mixing: Mixing = "before",
        d_prompt: int | None = None,
    ) -> None:
        super().__init__()
        _known("kind", kind, Kind)
        _known("mixing", mixing, Mixing)
        if K < 1:
            raise InvalidInputError(f"K must be at least 1, got {K}")
        first = kind == "A"
        self.kind, self.K, self.d_in, self.d_prompt, self.mixing = kind, K, d_in, d_prompt or d_in, mixing
        self.distance: Distance = distance or ("l2" if first else "cosine")
        _known("distance", self.distance, Distance)
        width = d_latent or d_in
        shape: tuple[Any, ...] = (
            width, hidden_layers, first if residual is None else residual, activation or ("relu" if first else "gelu"),
        )  # fmt: skip
        self.f = PointMap(d_in, *shape)
        self.P = self.g = self.log_scale = None
        if first:
            drawn = torch.randn(K, width if mixing == "latent" else d_in)
            self.P = nn.Parameter(normalize(drawn, dim=1))
        else:
            self.g = nn.ModuleList([PointMap(self.d_prompt, *shape) for _ in range(K)])
        if self.distance == "cosine":
            self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))

    @property
    def scale(self) -> Tensor | float:
        """exp(t), at most 100."""
        return SCALE if self.log_scale is None else self.log_scale.exp().clamp(max=LARGEST_SCALE)

    def anchors(self, prompt: Tensor | None = None) -> Tensor:
        """Prototypes in the space, (K, d), or (B, K, d) of prompts for kind B; with "before", where f takes each."""
        if self.P is not None:
            return self.P if self.mixing == "latent" else self.f(self.P)
        assert self.g is not None
        if prompt is None or prompt.ndim != 2 or prompt.shape[1] != self.d_prompt:
            found = "none" if prompt is None else f"shape {tuple(prompt.shape)}"
            raise InvalidInputError(
                f"kind 'B' has ideal points of prompts: it needs their features (B, {self.d_prompt}), got {found}"
            )
        return torch.stack([one(prompt) for one in self.g], dim=1)

    def points(self, weights: Tensor, prompt: Tensor | None = None, anchors: Tensor | None = None) -> Tensor:
        """Ideal points (B, d) of weights (B, K), for prompts (B, p) with kind B, or from `anchors` made before."""
        if self.P is not None and self.mixing == "before":
            found: Tensor = self.f(weights @ self.P)
            return found
        return ideal_point(weights, self.anchors(prompt) if anchors is None else anchors)

    def utility(self, mapped: Tensor, points: Tensor) -> Tensor:
        """`utility` in this space, of what f made of items."""
        return utility(mapped, points, self.distance, self.scale)

    def parameter_groups(
        self, map_rate: float = 1e-4, prototype_rate: float = 5e-3, scale_rate: float = 0.1, map_decay: float = 0.01
    ) -> list[dict[str, Any]]:
        """Optimiser groups at the paper's rates; decay acts on the maps alone."""
        maps = [*self.f.parameters(), *(() if self.g is None else self.g.parameters())]
        groups = [
            {"params": maps, "lr": map_rate, "weight_decay": map_decay},
            {"params": [] if self.P is None else [self.P], "lr": prototype_rate, "weight_decay": 0.0},
            {"params": [] if self.log_scale is None else [self.log_scale], "lr": scale_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


class IdealPointReward(nn.Module):
    """`IdealPointSpace` and the `UserMixture` of whom it has seen (arXiv 2406.08469).

    Parameters
    ----------
    kind, K, d_in, d_latent, distance, hidden_layers, residual, space : as of `IdealPointSpace`
    temperature, mode : as of `UserMixture`

    Examples
    --------
    >>> model = IdealPointReward("A", K=2, d_in=4)
    >>> users = model.users.register(["ann", "bob"])
    >>> model.score(["ann"], torch.zeros(1, 4), torch.ones(1, 4)).shape
    torch.Size([1])
    """

    def __init__(
        self,
        kind: Kind,
        K: int,
        d_in: int,
        d_latent: int | None = None,
        distance: Distance | None = None,
        hidden_layers: int = 2,
        residual: bool | None = None,
        *,
        temperature: float = 1.0,
        mode: Mode = "mixture",
        **space: Any,
    ) -> None:
        super().__init__()
        self.space = IdealPointSpace(kind, K, d_in, d_latent, distance, hidden_layers, residual, **space)
        self.users = UserMixture(K, temperature, mode, self._margin)

    def score(self, user_ids: Ids, left: Tensor, right: Tensor, prompt: Tensor | None = None) -> Tensor:
        """By how much each user prefers the left response, float (B,).

        Parameters
        ----------
        user_ids : length B
        left, right : float (B, d_in)
            Features of responses, of kind A with their prompts.
        prompt : float (B, d_prompt), optional
            For kind B; kind A does not read it.

        Raises
        ------
        UnknownUserError
            Someone is not registered.
        InvalidInputError
            Shapes that do not fit; NaN, with its row.
        """
        if len(user_ids) != len(left):
            raise InvalidInputError(f"{len(user_ids)} users for {len(left)} comparisons")
        return self._margin(self.users.weights(user_ids), (left, right, prompt))

    forward = score

    def reward(self, weights: Tensor, items: Tensor, prompt: Tensor | None = None) -> Tensor:
        """What items (N, d_in) are worth to weights (K,) or (N, K) on the simplex, float (N,): an ordinary reward."""
        weights = check_weights(torch.as_tensor(weights).to(items), self.space.K)
        mapped = self.space.f(self._checked("items", items))
        return self.space.utility(mapped, self.space.points(weights.expand(len(items), -1), prompt))

    def fit_new(
        self,
        ids: Ids,
        comparisons: tuple[Tensor, ...],
        lr: float = 5e-3,
        epochs: int = 20,
        *,
        label: Tensor | None = None,
        loss: PairLossName | None = None,
    ) -> IdealPointReward:
        """Weights of new users, everything else frozen; see `UserMixture.fit_new`.

        Parameters
        ----------
        ids : length N
            Who made each comparison.
        comparisons : (left (N, d_in), right (N, d_in)), and the prompt (N, d_prompt) for kind B
        label : +1 where the left one is preferred (default), -1 where the right one is
        loss : default "hinge" for kind A, "cross_entropy" for B
        """
        loss = loss or ("hinge" if self.space.kind == "A" else "cross_entropy")
        self.users.fit_new(ids, comparisons, lr, epochs, label=label, loss=loss)
        return self

    def prototypes(self, prompt: Tensor | None = None) -> Tensor:
        """`IdealPointSpace.anchors`. They are known only up to the simplex that the users span: compare predictions."""
        return self.space.anchors(prompt).detach()

    def user_table(self) -> dict[Any, list[float]]:
        """Weights of every user."""
        return self.users.table()

    def parameter_groups(self, user_rate: float = 5e-3, **rates: float) -> list[dict[str, Any]]:
        """Optimiser groups at the paper's rates, after all users are registered."""
        users = {"params": [self.users.logits], "lr": user_rate, "weight_decay": 0.0}
        return [*self.space.parameter_groups(**rates), users]

    def _margin(self, weights: Tensor, comparisons: tuple[Tensor | None, ...]) -> Tensor:
        left, right, prompt = (*comparisons, None)[:3]
        assert left is not None
        assert right is not None
        if left.shape != right.shape:
            raise InvalidInputError(
                f"left has shape {tuple(left.shape)}, right {tuple(right.shape)}: expected the same"
            )
        points = self.space.points(weights, prompt)
        sides = [self.space.f(self._checked(name, side)) for name, side in (("left", left), ("right", right))]
        return self.space.utility(sides[0], points) - self.space.utility(sides[1], points)

    def _checked(self, name: str, items: Tensor) -> Tensor:
        if items.ndim != 2 or items.shape[1] != self.space.d_in:
            raise InvalidInputError(f"{name} must have shape (B, {self.space.d_in}), got {tuple(items.shape)}")
        bad = ~torch.isfinite(items).all(dim=1)
        if bool(bad.any()):
            raise InvalidInputError(f"{name}: the features of row {int(bad.int().argmax())} are NaN or infinite")
        return items


def _known(name: str, value: Any, kind: Any) -> None:
    if value not in get_args(kind):
        raise UnknownNameError(f"unknown {name} {value!r}{nearest(str(value), get_args(kind))}")
