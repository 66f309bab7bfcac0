"""Advantages of turns: a local reward for each turn, fused with the outcome of its trajectory.

In an episode of several programs (or searches, or tool calls) every turn has a reward of its own, and the trajectory
one more for how it ended. Both are centred in their group, the local one over all turns, the outcome over trajectories:

    A(i, t) = (gamma^len_i O_i - mean over trajectories) + beta (R(i, t) - mean over all turns of the group)

and A(i, t) goes to all tokens of turn t. The decay makes a long success worth less than a short one. For one turn this
is the centred sum ``outcome + beta * local`` (preset ``reinforce``), which `degenerate_group_ratio` watches.

Paper: VeRPO: Verifiable Dense Reward Policy Optimization for Code Generation (arXiv 2601.03525).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyreward.advantages.normal import check_numbers, divisor_of
from polyreward.errors import InvalidInputError
from polyreward.grouped import Ids, Segments, factorize, whole


@dataclass(frozen=True)
class FusedAdvantage:
    """Advantage of every turn from its own reward and its trajectory's outcome (VeRPO, arXiv 2601.03525).

    Parameters
    ----------
    beta : float
        Weight of the local reward. The paper prints no figure; 1.
    gamma : float in (0, 1]
        Decay of the outcome by the number of turns. The paper prints no figure; 0.9, and 1 for single turns.
    normalise : "mean" or "std"
        "std" divides both centred rewards by their deviation in the group as well, which the paper finds worse.
    epsilon, ddof : as in `polyreward.advantages.Scale`
        Used with "std" only. A deviation of exactly 0 divides by 1.

    Raises
    ------
    InvalidInputError
        A parameter out of its range.
    """

    beta: float = 1.0
    gamma: float = 0.9
    normalise: Literal["mean", "std"] = "mean"
    epsilon: float = 1e-6
    ddof: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, "beta", "gamma", "epsilon")
        if self.epsilon is None or not 0 <= self.epsilon < math.inf or self.ddof not in (0, 1):
            raise InvalidInputError(f"epsilon must be >= 0 and ddof 0 or 1, got {self.epsilon!r} and {self.ddof!r}")
        if self.beta is None or not math.isfinite(self.beta):
            raise InvalidInputError(f"beta must be a finite number, got {self.beta!r}")
        if self.gamma is None or not 0 < self.gamma <= 1:
            raise InvalidInputError(f"gamma must be in (0, 1], got {self.gamma!r}")
        if self.normalise not in ("mean", "std"):
            raise InvalidInputError(f"normalise must be 'mean' or 'std', got {self.normalise!r}")

    def __call__(
        self, turn_rewards: Any, trajectory_rewards: Any, lengths: Any, traj_index: Any, groups: Ids | None = None
    ) -> Any:
        """Advantages of the turns.

        Parameters
        ----------
        turn_rewards : float (turns,), array or tensor
            R_turn in the paper.
        trajectory_rewards : float or bool (N,)
            R_traj in the paper, before the decay; 1 where the final program passes every test.
        lengths : int (N,)
            Number of turns of each trajectory.
        traj_index : int (turns,)
            Trajectory of each turn, 0 to N - 1.
        groups : int or str (N,), optional
            Problem of each trajectory; default all of one problem.

        Returns
        -------
        float (turns,) of the floating dtype, kind and device of `turn_rewards`. All 0 in a group of one trajectory,
        which has nothing to compare with; a warning says so.

        Raises
        ------
        InvalidInputError
            Lengths that do not agree, a trajectory out of range, NaN or infinite rewards.
        """
        local = _numbers(turn_rewards, "turn_rewards")
        outcome = _numbers(trajectory_rewards, "trajectory_rewards").to(local.device)
        index, size = (
            _whole_numbers(values, name, local) for values, name in ((traj_index, "traj_index"), (lengths, "lengths"))
        )
        count = outcome.shape[0]
        if index.shape != local.shape:
            raise InvalidInputError(f"traj_index has {len(index)} entries for {len(local)} turn_rewards")
        if size.shape != outcome.shape:
            raise InvalidInputError(f"lengths has {len(size)} entries for {count} trajectory_rewards")
        if bool(((index < 0) | (index >= count)).any()):
            raise InvalidInputError(f"traj_index must be from 0 to {count - 1}, got {index.min()} to {index.max()}")
        found = torch.bincount(index, minlength=count)
        if not torch.equal(found, size):
            wrong = int((found != size).nonzero()[0])
            raise InvalidInputError(
                f"lengths says {int(size[wrong])} turns for trajectory {wrong}, traj_index names it "
                f"{int(found[wrong])} times"
            )
        trajectories = (
            whole(count, local.device) if groups is None else factorize(groups, name="groups", device=local.device)
        )
        if len(trajectories) != count:
            raise InvalidInputError(f"groups has {len(trajectories)} entries for {count} trajectory_rewards")
        turns = Segments(trajectories.codes[index], trajectories.count)
        ends = self._compared(outcome * torch.pow(self.gamma, size.to(torch.float64)), trajectories)
        fused = ends[index] + self.beta * self._compared(local, turns)
        alone = trajectories.sizes == 1
        if bool(alone.any()):
            warnings.warn(
                f"{int(alone.sum())} of {int((trajectories.sizes > 0).sum())} groups have a single trajectory, and "
                "nothing to compare it with: its advantages are 0",
                stacklevel=2,
            )
            fused = torch.where(alone[turns.codes], 0.0, fused)
        if isinstance(turn_rewards, Tensor):
            return fused.to(turn_rewards.dtype) if turn_rewards.is_floating_point() else fused
        dtype = np.asarray(turn_rewards).dtype
        return fused.numpy().astype(dtype if np.issubdtype(dtype, np.floating) else np.float64)

    def _compared(self, values: Tensor, segments: Segments) -> Tensor:
        centred = segments.centred(values)
        if self.normalise == "mean":
            return centred
        return centred / segments.spread(divisor_of(segments.deviation(values, ddof=self.ddof), self.epsilon))


def degenerate_group_ratio(rewards: Any, groups: Ids, tol: float = 0.0) -> float:
    """Share of the groups whose rewards are all equal, so that every advantage of them is 0.

    Parameters
    ----------
    rewards : float (N,), array or tensor
        NaN does not apply and takes no part.
    groups : int or str (N,)
    tol : float >= 0
        Largest difference that counts as equal.

    Returns
    -------
    float in [0, 1]. Groups with fewer than two rewards have nothing to compare and are not counted; 0 where none is.

    Raises
    ------
    InvalidInputError
        Rewards that are not (N,) or are infinite, ids that cannot be used, or a negative `tol`.
    """
    if not tol >= 0:
        raise InvalidInputError(f"tol must be a number >= 0, got {tol!r}")
    values = _tensor(rewards, "rewards")
    if values.ndim != 1 or values.is_complex():
        raise InvalidInputError(f"rewards must have shape (N,), got {tuple(values.shape)}")
    values = values.to(torch.float64)
    if bool(torch.isinf(values).any()):
        raise InvalidInputError(f"the reward of row {int(torch.isinf(values).nonzero()[0])} is infinite")
    segments = factorize(groups, name="groups", device=values.device)
    if len(segments) != len(values):
        raise InvalidInputError(f"groups has {len(segments)} entries for {len(values)} rewards")
    known = ~torch.isnan(values)
    compared = segments.number(known) > 1
    smallest, largest = segments.extremes(torch.where(known, values, 0.0), known)
    dead = compared & (largest - smallest <= tol)
    return float(dead.sum() / compared.sum()) if bool(compared.any()) else 0.0


def _numbers(values: Any, name: str) -> Tensor:
    found = _tensor(values, name).detach().to(torch.float64)
    if found.ndim != 1:
        raise InvalidInputError(f"{name} must be one-dimensional, got shape {tuple(found.shape)}")
    if not bool(torch.isfinite(found).all()):
        row = int((~torch.isfinite(found)).nonzero()[0])
        raise InvalidInputError(f"{name} is {float(found[row])} at {row}; expected finite numbers")
    return found


def _whole_numbers(values: Any, name: str, like: Tensor) -> Tensor:
    found = _tensor(values, name).to(like.device)
    if found.ndim != 1 or (len(found) and (found.is_floating_point() or found.dtype == torch.bool)):
        raise InvalidInputError(
            f"{name} must be whole numbers in one dimension, got {found.dtype} {tuple(found.shape)}"
        )
    return found.to(torch.int64)


def _tensor(values: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"{name} must be numbers in one dimension: {error}") from error
