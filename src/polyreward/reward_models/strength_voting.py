"""Voters: copies of a reward model, fitted with seeds of their own, that say how strong each preference is.

Each copy sees the pairs in another order and starts from another head, so what they agree on is in the data and not in
the seed. `polyreward.data.preference_strength` turns their votes into corrected labels.

    strengths = StrengthVoting(model, voters=10)(data, epochs=10)
    cleaned = PreferenceCleaner(flip_below=0.0, soft="sigmoid").clean(data, strengths)

Voters that fit long enough learn wrong labels by heart, and then every strength is positive: stop them early (a fit's
default), or let them vote only on prompts they were not fitted to (`folds`).

Paper: Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from polyreward.errors import InvalidInputError
from polyreward.preferences import IdenticalResponsesWarning, PreferenceData
from polyreward.reward_models.ensembles import RewardEnsemble


class OverfittedVotersWarning(UserWarning):
    """No pair has a negative strength, although the voters saw all of them: they may know the labels by heart."""


@dataclass(frozen=True, eq=False)
class StrengthVoting:
    """Strengths of pairs by M copies of a reward model (arXiv 2401.06080).

    Parameters
    ----------
    model : PreferenceModel that has not been fitted
        With a head that is made anew for each fit.
    voters : int
        M; 10 in the paper. One voter gives ``std`` 0.
    folds : int
        1: the voters vote on what they were fitted to, as in the paper. More: the prompts are divided, and those who
        vote on a part were fitted to the others.
    scale : "none", or "std": divide each voter's differences by their deviation over the pairs
    """

    model: Any
    voters: int = 10
    folds: int = 1
    scale: Literal["none", "std"] = "none"

    def __post_init__(self) -> None:
        for name in ("voters", "folds"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if self.scale not in ("none", "std"):
            raise InvalidInputError(f"scale must be 'none' or 'std', got {self.scale!r}")

    def __call__(self, data: PreferenceData, seed: int = 0, **options: Any) -> dict[str, np.ndarray]:
        """Fit the voters and let them vote; they are not kept.

        Parameters
        ----------
        data : PreferenceData of pairs with a preference each
            Pairs whose responses are the same have strength 0 and take no part in the fits.
        seed : int
            Voter m is fitted with seed ``seed + m``.
        options : as of the model's ``fit``

        Returns
        -------
        dict
            ``mean`` (N,), ``std`` (N,), ``raw`` (M, N), float64, in the order of the data.

        Raises
        ------
        InvalidInputError
            Lists of more than two, a pair without a preference, or fewer prompts than folds.
        """
        chosen, rejected = _sides(data)
        part = self._parts(data, seed)
        raw = np.zeros((self.voters, len(data)))
        for fold in range(self.folds):
            votes = np.flatnonzero(part == fold)
            fitted = data if self.folds == 1 else data.select(part != fold)
            with warnings.catch_warnings():  # once a fit would be M times a fold
                warnings.simplefilter("ignore", IdenticalResponsesWarning)
                ensemble = RewardEnsemble.of(self.model, self.voters).fit(fitted, seed=seed, **options)
            prompts, first, second = (_pick(values, at) for values, at in (
                (data.prompts, votes), (data.responses, chosen[votes]), (data.responses, rejected[votes])))  # fmt: skip
            difference = ensemble.member_scores(prompts, first) - ensemble.member_scores(prompts, second)
            raw[:, votes] = difference.double().numpy()
        return self._strengths(raw, data)

    def _strengths(self, raw: np.ndarray, data: PreferenceData) -> dict[str, np.ndarray]:
        if not np.isfinite(raw).all():
            voter, pair = (int(i) for i in np.argwhere(~np.isfinite(raw))[0])
            raise InvalidInputError(f"{data.where(pair)}: voter {voter} gave a score that is NaN or infinite")
        if self.scale == "std":
            spread = raw.std(axis=1, keepdims=True)
            if not (spread > 0).all():
                raise InvalidInputError(f"voter {int((spread <= 0).argmax())} sees the same difference in all pairs")
            raw = raw / spread
        mean = raw.mean(axis=0)
        if self.folds == 1 and len(mean) >= 50 and not (mean < 0).any():
            warnings.warn(
                OverfittedVotersWarning(
                    f"{data.source}: no pair of {len(mean)} has a negative strength; the voters may know the labels by "
                    "heart: fit them for fewer epochs, or pass folds=5"
                ),
                stacklevel=3,
            )
        return {"mean": mean, "std": raw.std(axis=0), "raw": raw}

    def _parts(self, data: PreferenceData, seed: int) -> np.ndarray:
        """Fold of each pair, (N,); a prompt is in one fold."""
        if self.folds == 1:
            return np.zeros(len(data), np.int64)
        codes = data.groups("prompt")
        count = int(codes.max()) + 1
        if count < self.folds:
            raise InvalidInputError(f"{data.source} has {count} prompts for {self.folds} folds")
        fold = np.random.default_rng(seed).permutation(count) % self.folds
        return np.asarray(fold[codes])


def _sides(data: PreferenceData) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the chosen and of the rejected responses."""
    if not len(data):
        raise InvalidInputError(f"{data.source} has no comparisons")
    if (data.sizes != 2).any():
        at = int((data.sizes != 2).argmax())
        raise InvalidInputError(f"{data.where(at)}: {data.sizes[at]} responses, strengths are of pairs")
    left, right = data.order()[0].reshape(-1, 2).T
    open_ = ~((left < right) | (right < left))
    if open_.any():
        raise InvalidInputError(f"{data.where(int(open_.argmax()))}: no response is preferred; select the others first")
    second = (right < left).astype(np.int64)
    rows = 2 * np.arange(len(data))
    return rows + second, rows + 1 - second


def _pick(values: Any, at: np.ndarray) -> Any:
    if isinstance(values, np.ndarray | torch.Tensor):
        return values[at]
    return [values[i] for i in at.tolist()]
