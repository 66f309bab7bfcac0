"""Behaviour cloning, the verifier-free learner: copy the traces, whatever they earned.

    loss = - sum_i sum_h ln pi(a_ih | s_ih)    over expert traces i and their tokens h

Rewards take no part. Every token counts alike, so that a long trace weighs more than a short one: where the experts
are slow in one style and quick in another, the clone leans towards the slow style. `aggregation` "sequence-mean" gives
every trace the same weight instead. For tables of states and actions the minimum has a closed form, `fit`.

Scaling Test-Time Compute Without Verification or RL is Suboptimal, arXiv 2502.12118.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.objectives.aggregation import aggregate
from polyreward.objectives.surrogate import ObjectiveResult

Weighting = Literal["token-mean", "sequence-mean"]


class NoEvidenceWarning(UserWarning):
    """There was nothing to learn from, and the base policy is the result."""


@dataclass(frozen=True)
class BehaviourCloning:
    """Maximum likelihood of expert traces (VF in arXiv 2502.12118), as a loss and in closed form for tables.

    Parameters
    ----------
    aggregation : "token-mean" or "sequence-mean"
        Whether every token counts alike (the paper) or every trace.
    pseudo_count : float >= 0
        Total count, spread evenly over the actions of a state, that smooths a table.

    Raises
    ------
    UnknownNameError
        No such aggregation.
    InvalidInputError
        A negative pseudo-count.
    """

    aggregation: Weighting = "token-mean"
    pseudo_count: float = 1.0

    def __post_init__(self) -> None:
        if self.aggregation not in get_args(Weighting):
            raise UnknownNameError(
                f"no aggregation {self.aggregation!r}{nearest(self.aggregation, get_args(Weighting))}"
            )
        if not 0 <= self.pseudo_count < np.inf:
            raise InvalidInputError(f"pseudo_count must be a finite number of at least 0, got {self.pseudo_count}")

    def __call__(
        self,
        logp: Tensor,
        old_logp: Tensor | None = None,
        advantages: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        normaliser: float | Tensor | None = None,
    ) -> ObjectiveResult:
        """Loss of N traces of T tokens, with the arguments of every objective.

        Parameters
        ----------
        logp : float tensor (N, T)
            Log-probabilities of the traces' tokens. What stands where `mask` is false touches neither loss nor
            gradient.
        old_logp, advantages
            Accepted and not read.
        mask : bool, integer or float tensor (N, T), nonzero at tokens to copy; default all
        normaliser : see `polyreward.objectives.aggregate`

        Returns
        -------
        ObjectiveResult
            ``loss`` in float32 or wider; metric ``policy_loss``.

        Raises
        ------
        InvalidInputError
            Shapes that do not fit.
        """
        if logp.ndim != 2:
            raise InvalidInputError(f"logp must have shape (N, T), got {tuple(logp.shape)}")
        keep = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask.to(torch.bool)
        if keep.shape != logp.shape:
            raise InvalidInputError(f"mask has shape {tuple(keep.shape)}, logp has {tuple(logp.shape)}")
        losses = -torch.where(keep, logp if logp.dtype == torch.float64 else logp.float(), 0.0)
        loss = aggregate(losses, keep, self.aggregation, normaliser=normaliser)
        return ObjectiveResult(loss, {"policy_loss": loss.detach()})

    def fit(self, states: Any, actions: Any, n_states: int, n_actions: int, mask: Any = None, base: Any = None) -> Any:
        """The table that minimises the loss, smoothed.

        Parameters
        ----------
        states, actions : int (N, T), or (N,) for traces of one step
            In ``[0, n_states)`` and ``[0, n_actions)`` where `mask` is true; anything elsewhere.
        mask : bool (N, T) or (N,), default all
        base : float (n_states, n_actions), optional
            Policy that is returned when there is nothing to copy; default uniform.

        Returns
        -------
        float64 (n_states, n_actions), rows sum to 1; a tensor on the device of `states` where that is one, else NumPy.
        States never visited are uniform.

        Warns
        -----
        NoEvidenceWarning
            Nothing to copy: `base` is the result.

        Raises
        ------
        InvalidInputError
            Shapes that do not fit, ids that are no whole numbers or out of range.
        """
        state, action = _ids(states, "states"), _ids(actions, "actions")
        device = state.device
        keep = torch.ones_like(state, dtype=torch.bool) if mask is None else torch.as_tensor(mask).to(device).bool()
        if not (state.shape == action.shape == keep.shape and state.ndim in (1, 2)):
            shapes = ", ".join(str(tuple(t.shape)) for t in (state, action, keep))
            raise InvalidInputError(f"states, actions and mask have shapes {shapes}, expected one of (N, T) or (N,)")
        state, action, keep = (t.reshape(len(t), -1) if t.numel() else t.reshape(0, 1) for t in (state, action, keep))
        for name, ids, count in (("states", state, n_states), ("actions", action, n_actions)):
            wrong = keep & ((ids < 0) | (ids >= count))
            if bool(wrong.any()):
                row, step = wrong.nonzero()[0].tolist()
                raise InvalidInputError(f"{name}[{row}, {step}] is {int(ids[row, step])}, expected 0..{count - 1}")
        if not bool(keep.any()):
            warnings.warn("nothing to copy: the result is the base policy", NoEvidenceWarning, stacklevel=2)
            table = torch.full((n_states, n_actions), 1 / n_actions, dtype=torch.float64, device=device)
            table = table if base is None else _table(base, (n_states, n_actions), device)
        else:
            table = self._counted(state, action, keep, n_states, n_actions)
        return table if isinstance(states, Tensor) else table.numpy()

    def _counted(self, state: Tensor, action: Tensor, keep: Tensor, n_states: int, n_actions: int) -> Tensor:
        weight = keep.to(torch.float64)
        if self.aggregation == "sequence-mean":  # as many tokens in all, spread evenly over the traces
            lengths = weight.sum(dim=1, keepdim=True)
            weight = weight / lengths.clamp(min=1) * (lengths.sum() / (lengths > 0).sum())
        cells = (state * n_actions + action)[keep]
        counts = torch.zeros(n_states * n_actions, dtype=torch.float64, device=state.device)
        counts = counts.index_add_(0, cells, weight[keep]).view(n_states, n_actions)
        total = counts.sum(dim=1, keepdim=True) + self.pseudo_count
        smooth = (counts + self.pseudo_count / n_actions) / torch.where(total > 0, total, 1.0)
        return torch.where(total > 0, smooth, 1 / n_actions)


def _ids(values: Any, name: str) -> Tensor:
    ids = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise InvalidInputError(f"{name} must be whole numbers, got {ids.dtype}")
    return ids.to(torch.int64)


def _table(base: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    table = torch.as_tensor(base, dtype=torch.float64, device=device)
    if table.shape != shape:
        raise InvalidInputError(f"base has shape {tuple(table.shape)}, expected {shape}")
    return table
