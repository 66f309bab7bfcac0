"""Ensembles of reward models, and how their scores become one (Helping or Herding?, arXiv 2312.09244).

Models of the same accuracy disagree where a tuned policy goes. An aggregate of models that err differently is harder to
exploit; errors that all members share, it keeps.

    mean: sum_m r_m / M      median      min      mean - c * std: conservative where the members disagree

Scores of a model are defined up to what a prompt adds to all of them. Members must therefore share their zero (train
with `centering_penalty`) and scale (`RewardEnsemble.standardize`) before min, median or deviation mean anything.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.preferences import Column, PreferenceData
from polyreward.reward_models.contract import ModelReward, as_reward
from polyreward.storage import write_json

Aggregate = Literal["mean", "median", "min", "mean_minus_std"]
AGGREGATES = ("mean", "median", "min", "mean_minus_std")


class MemberFailureWarning(UserWarning):
    """A member gave scores that are NaN or infinite; they take no part."""


def aggregate_rewards(
    scores: Any, how: Aggregate = "mean", mask: Any = None, *, std_coef: float = 1.0, ddof: int = 0
) -> Any:
    """One score of the scores of M members.

    Parameters
    ----------
    scores : float (M, B) tensor or array
        NaN and infinite scores take no part, with a `MemberFailureWarning`.
    how : "mean", "median" (mean of the two middle ones where their number is even), "min" or "mean_minus_std"
    mask : bool (M, B) or (M,), optional
        False takes no part.
    std_coef : float
        c in ``mean - c * std``.
    ddof : int
        0 is the deviation of the population. The deviation of no more than `ddof` members is 0.

    Returns
    -------
    (B,) in the type, dtype and device of `scores`

    Raises
    ------
    InvalidInputError
        No members, a wrong shape, or a sample for which no member takes part.
    UnknownNameError
        Another `how`.
    """
    if how not in AGGREGATES:
        raise UnknownNameError(f"unknown aggregate {how!r}{nearest(str(how), AGGREGATES)}")
    array = not isinstance(scores, Tensor)
    given = torch.as_tensor(np.asarray(scores)) if array else scores
    if given.ndim != 2 or not len(given):
        raise InvalidInputError(f"scores must have shape (members, samples) with a member, got {tuple(given.shape)}")
    work = given if given.dtype in (torch.float32, torch.float64) else given.float()
    part = torch.isfinite(work)
    if not bool(part.all()):
        members = [int(m) for m in (~part).any(dim=1).nonzero().flatten()]
        warnings.warn(
            MemberFailureWarning(f"scores of members {members} that are not finite take no part"), stacklevel=2
        )
    if mask is not None:
        asked = torch.as_tensor(mask, device=work.device).bool()
        asked = asked.unsqueeze(1) if asked.ndim == 1 else asked
        if asked.shape[0] != len(work) or asked.shape[-1] not in (1, work.shape[1]):
            raise InvalidInputError(f"mask has shape {tuple(asked.shape)}, scores {tuple(work.shape)}")
        part = part & asked
    count = part.sum(dim=0)
    if not bool((count > 0).all()):
        raise InvalidInputError(f"no member has a score for sample {int((count == 0).int().argmax())}")
    result = _aggregate(work, part, count, how, std_coef, ddof)
    if array:
        dtype = np.asarray(scores).dtype
        return result.numpy().astype(dtype if dtype.kind == "f" else np.float64)
    return result.to(given.dtype) if given.is_floating_point() else result


def _aggregate(work: Tensor, part: Tensor, count: Tensor, how: str, std_coef: float, ddof: int) -> Tensor:
    if how == "min":
        return torch.where(part, work, torch.inf).amin(dim=0)
    if how == "median":
        ranked = torch.where(part, work, torch.inf).sort(dim=0).values
        low, high = ((count - 1) // 2).unsqueeze(0), (count // 2).unsqueeze(0)
        return 0.5 * (ranked.gather(0, low) + ranked.gather(0, high)).squeeze(0)
    mean = torch.where(part, work, 0.0).sum(dim=0) / count
    if how == "mean":
        return mean
    centred = torch.where(part, work - mean, 0.0)
    variance = centred.square().sum(dim=0) / (count - ddof).clamp(min=1)
    # equal members differ from their mean by rounding only, and a root has no gradient at 0
    same = torch.where(part, work, -torch.inf).amax(dim=0) == torch.where(part, work, torch.inf).amin(dim=0)
    varies = (count > ddof) & (variance > 0) & ~same
    return mean - std_coef * torch.where(varies, torch.where(varies, variance, 1.0).sqrt(), 0.0)


class RewardEnsemble:
    """Reward models that score as one (arXiv 2312.09244).

    Parameters
    ----------
    members : reward models, or functions of (prompts, completions) -> (B,)
    aggregate : "mean", "median", "min" or "mean_minus_std"
    std_coef, ddof : as of `aggregate_rewards`
    standardized : (means (M,), deviations (M,)), optional
        Subtracted from and divided into the members' scores; see `standardize`.
    """

    def __init__(
        self,
        members: Sequence[Any],
        aggregate: Aggregate = "mean",
        std_coef: float = 1.0,
        ddof: int = 0,
        standardized: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        if not len(members):
            raise InvalidInputError("an ensemble needs at least one member")
        if aggregate not in AGGREGATES:
            raise UnknownNameError(f"unknown aggregate {aggregate!r}{nearest(str(aggregate), AGGREGATES)}")
        self.members, self.aggregate = list(members), aggregate
        self.std_coef, self.ddof, self.standardized = std_coef, ddof, standardized

    @classmethod
    def of(cls, model: Any, members: int, **options: Any) -> RewardEnsemble:
        """Copies of a model that has not been fitted; `fit` gives each a seed of its own."""
        if members < 1:
            raise InvalidInputError(f"an ensemble needs at least one member, got {members}")
        return cls([copy.deepcopy(model) for _ in range(members)], **options)

    def fit(self, preferences: PreferenceData, seed: int = 0, **options: Any) -> RewardEnsemble:
        """Fit every member to the same data, member m with seed ``seed + m``; `options` as of the members' fit.

        With a checkpoint, members that were done when a fit was interrupted are not fitted again.
        """
        checkpoint = options.pop("checkpoint", None)
        keep = options.pop("keep_checkpoint", False)
        paths = [] if checkpoint is None else [Path(f"{checkpoint}.{number}") for number in range(len(self.members))]
        for number, member in enumerate(self.members):
            own = {"checkpoint": paths[number], "keep_checkpoint": True} if paths else {}
            member.fit(preferences, seed=seed + number, **own, **options)
        for path in paths:
            if not keep:
                path.unlink(missing_ok=True)
        self.standardized = None
        return self

    def member_scores(self, prompts: Column, completions: Column, **columns: Any) -> Tensor:
        """Scores of every member, (M, B), standardised where that is set."""
        found = []
        for number, member in enumerate(self.members):
            score = getattr(member, "score", member)
            scores = torch.as_tensor(score(prompts, completions, **columns))
            if scores.shape != (len(completions),):
                raise InvalidInputError(
                    f"member {number} returned shape {tuple(scores.shape)} for {len(completions)} completions"
                )
            found.append(scores if scores.is_floating_point() else scores.float())
        together = torch.stack(found)
        if self.standardized is None:
            return together
        means, deviations = (torch.as_tensor(part, dtype=together.dtype) for part in self.standardized)
        return (together - means[:, None]) / deviations[:, None]

    def __call__(self, prompts: Column, completions: Column, **columns: Any) -> Tensor:
        """The aggregate, (B,)."""
        scores = self.member_scores(prompts, completions, **columns)
        result: Tensor = aggregate_rewards(scores, self.aggregate, std_coef=self.std_coef, ddof=self.ddof)
        return result

    def score(self, prompts: Column, completions: Column, **columns: Any) -> Tensor:
        """The aggregate, (B,)."""
        return self(prompts, completions, **columns)

    def disagreement(self, prompts: Column, completions: Column, **columns: Any) -> Tensor:
        """Population deviation of the members' scores, (B,); it does not see errors that the members share."""
        scores = self.member_scores(prompts, completions, **columns)
        mean = aggregate_rewards(scores, "mean")
        spread: Tensor = mean - aggregate_rewards(scores, "mean_minus_std", std_coef=1.0, ddof=self.ddof)
        return spread

    def standardize(self, prompts: Column, completions: Column, **columns: Any) -> RewardEnsemble:
        """Give every member mean 0 and deviation 1 on these samples, from now on; return self.

        Raises
        ------
        InvalidInputError
            A member scores all of them the same.
        """
        self.standardized = None
        scores = self.member_scores(prompts, completions, **columns).double()
        means, deviations = scores.mean(dim=1), scores.std(dim=1, correction=0)
        if not bool((deviations > 0).all()):
            raise InvalidInputError(f"member {int((~(deviations > 0)).int().argmax())} scores all samples the same")
        self.standardized = (means.tolist(), deviations.tolist())
        return self

    def as_reward(self, name: str = "reward_ensemble") -> ModelReward:
        """As a reward of TRL's and polyreward's trainers."""
        return as_reward(self, name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write every member to a folder of its own, and ``config.json``."""
        folder = Path(folder)
        for number, member in enumerate(self.members):
            member.save_pretrained(folder / f"member-{number:02d}")
        write_json(
            folder / "config.json",
            {
                "format": 1,
                "ensemble": len(self.members),
                "aggregate": self.aggregate,
                "std_coef": self.std_coef,
                "ddof": self.ddof,
                "standardized": self.standardized,
            },
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, **parts: Any) -> RewardEnsemble:
        """Read an ensemble of `PreferenceModel` back; `parts` as of its ``from_pretrained``."""
        from polyreward.reward_models.model import PreferenceModel
        from polyreward.reward_models.saving import read_config

        folder = Path(folder)
        config = read_config(folder)
        if "ensemble" not in config:
            raise InvalidInputError(f"{folder} holds a single reward model; use PreferenceModel.from_pretrained")
        places = [folder / f"member-{number:02d}" for number in range(config["ensemble"])]
        members = [PreferenceModel.from_pretrained(place, **parts) for place in places]
        return cls(members, config["aggregate"], config["std_coef"], config["ddof"], config["standardized"])
