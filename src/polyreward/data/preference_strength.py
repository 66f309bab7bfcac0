"""How strongly several reward models agree with each preference label, and labels corrected by it.

Reward models that were fitted to the same pairs vote on every pair; the mean of their differences is its strength.
Pairs at the bottom are mostly labelled the wrong way round, those above them are ambiguous, the rest is right.

    d_im = r_m(chosen_i) - r_m(rejected_i)     mu_i = mean_m d_im     s_i = sqrt(mean_m (d_im - mu_i)^2)

`PreferenceCleaner` swaps the labels of the weakest pairs, softens those of the others, and asks for a margin equal to
the strength. It cannot tell a wrong label from the preference of a minority: look at `flips_by_group`.

Paper: Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080).
`polyreward.reward_models.strength_voting` fits the voters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyreward.data.pair_columns import flip_pairs, identical_pairs, take
from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.preferences import TIE, UNLABELLED, IdenticalResponsesWarning, PreferenceData

Scale = Literal["none", "std"]
SOFT = ("none", "smooth", "sigmoid")


class SingleVoterWarning(UserWarning):
    """One voter has no spread: every ``std`` is 0."""


class CleanedPairs(NamedTuple):
    """Pairs with corrected labels; arrays, or tensors where the strengths are one.

    Attributes
    ----------
    chosen, rejected : as given, swapped where `flipped`, without the pairs whose responses are the same
    target : float32 (N,), in [0, 1]
        Probability that `chosen` is the better one.
    margin : float32 (N,)
        By how much it should be ahead; negative where the voters side with `rejected` and the pair was not flipped.
    flipped : bool (N,)
    """

    chosen: Any
    rejected: Any
    target: Any
    margin: Any
    flipped: Any


def preference_strength(
    score_fns: Sequence[Callable[..., Any]], chosen: Any, rejected: Any, *, prompts: Any = None, scale: Scale = "none"
) -> dict[str, Any]:
    """Votes of M reward models on N pairs (arXiv 2401.06080).

    Parameters
    ----------
    score_fns : M functions of responses -> (N,), or objects with such a ``score``
        With `prompts`, functions of (prompts, responses), as reward models are.
    chosen, rejected : length N
    prompts : length N, optional
    scale : as of `strength_of_differences`

    Returns
    -------
    dict
        ``mean`` (N,), ``std`` (N,) and ``raw`` (M, N), as of `strength_of_differences`.

    Raises
    ------
    InvalidInputError
        No voter, lengths that differ, a voter whose scores are NaN, infinite or of another number than the pairs.
    """
    if not len(score_fns):
        raise InvalidInputError("preference_strength needs at least one voter")
    if len(chosen) != len(rejected) or (prompts is not None and len(prompts) != len(chosen)):
        counts = f"{len(chosen)} chosen and {len(rejected)} rejected responses"
        raise InvalidInputError(f"{counts}{'' if prompts is None else f' for {len(prompts)} prompts'}")
    rows = []
    for number, voter in enumerate(score_fns):
        score: Any = getattr(voter, "score", voter)
        both = []
        for responses in (chosen, rejected):
            found = score(responses) if prompts is None else score(prompts, responses)
            found = found.detach() if isinstance(found, Tensor) else np.asarray(found)
            if tuple(found.shape) != (len(chosen),):
                raise InvalidInputError(
                    f"voter {number} gave scores of shape {tuple(found.shape)}, expected ({len(chosen)},)"
                )
            both.append(_wide(found))
        rows.append(both[0] - both[1])
    if any(isinstance(row, Tensor) for row in rows):
        first = next(row for row in rows if isinstance(row, Tensor))
        return strength_of_differences(torch.stack([torch.as_tensor(row).to(first) for row in rows]), scale)
    return strength_of_differences(np.stack(rows), scale)


def strength_of_differences(raw: Any, scale: Scale = "none") -> dict[str, Any]:
    """Mean and population deviation over the voters of differences of scores.

    Parameters
    ----------
    raw : (M, N) array or tensor
        Score of the chosen response less that of the rejected one.
    scale : "none", or "std": divide each voter's differences by their population deviation over the pairs
        For voters of different scale. Strengths are then in deviations and no log-odds.

    Returns
    -------
    dict
        ``mean`` (N,), ``std`` (N,) and ``raw`` (M, N) after scaling; float32 or wider. One voter has ``std`` 0, with a
        `SingleVoterWarning`.

    Raises
    ------
    InvalidInputError
        No voter, a wrong shape, NaN or infinite entries, or `scale` "std" and a voter without spread.
    """
    if scale not in ("none", "std"):
        raise UnknownNameError(f"unknown scale {scale!r}{nearest(str(scale), ('none', 'std'))}")
    work = _wide(raw if isinstance(raw, Tensor) else np.asarray(raw))
    if work.ndim != 2 or not len(work):
        raise InvalidInputError(f"differences must have shape (voters, pairs) with a voter, got {tuple(work.shape)}")
    bad = ~(torch.isfinite(work) if isinstance(work, Tensor) else np.isfinite(work))
    if bool(bad.any()):
        voter, pair = (int(i) for i in np.argwhere(bad.cpu().numpy() if isinstance(bad, Tensor) else bad)[0])
        raise InvalidInputError(f"the score of voter {voter} for pair {pair} is NaN or infinite")
    if scale == "std" and work.shape[1]:
        spread = _deviation(work, 1)
        if not bool((spread > 0).all()):
            raise InvalidInputError(
                f"voter {int((spread <= 0).nonzero()[0][0])} sees the same difference in all pairs: it has no scale"
            )
        work = work / spread[:, None]
    if len(work) < 2:
        warnings.warn(SingleVoterWarning("one voter has no spread: std is 0"), stacklevel=2)
    return {"mean": work.mean(0), "std": _deviation(work, 0), "raw": work}


@dataclass(frozen=True)
class StrengthBinner:
    """The regime of each pair by the rank of its strength: -1 incorrect, 0 ambiguous, 1 normal (arXiv 2401.06080).

    Parameters
    ----------
    quantiles : (float, float), ascending in [0, 1]
        Share of the pairs that is incorrect, and share that is incorrect or ambiguous.

    Calling it with strengths (N,), or what `preference_strength` returns, gives int64 (N,). Ranks are mid-ranks: pairs
    of equal strength are in one regime.
    """

    quantiles: tuple[float, float] = (0.1, 0.4)

    def __post_init__(self) -> None:
        if len(self.quantiles) != 2 or not 0 <= self.quantiles[0] <= self.quantiles[1] <= 1:
            raise InvalidInputError(f"quantiles must be two ascending shares in [0, 1], got {self.quantiles}")

    def __call__(self, strengths: Any) -> Any:
        """Regimes (N,)."""
        mean, given = _mean(strengths)
        _, places, counts = np.unique(mean, return_inverse=True, return_counts=True)
        rank = (np.cumsum(counts) - counts / 2)[places]
        bounds = np.asarray(self.quantiles)[:, None] * len(mean) - 1e-9  # 0.1 of 30 is 3, rounded or not
        return _like(-1 + (rank >= bounds).sum(axis=0), given)


@dataclass(frozen=True)
class PreferenceCleaner:
    """Flip the weakest labels, soften the others, and turn strength into a margin (arXiv 2401.06080).

    Parameters
    ----------
    flip_fraction : in [0, 1], optional
        Share of the pairs, the weakest, whose labels are swapped; the nearest whole number of pairs, half down. 0.1
        unless `flip_below` is given. On clean labels every flip is an error.
    flip_below : float, optional
        Swap where the strength is below it; 0 follows the amount of noise in the data.
    soft : "none" (target 1), "smooth" (``1 - alpha``) or "sigmoid" (``sigma(mu)``, ``sigma(|mu|)`` where flipped)
    alpha : in [0, 0.5]
    margin : bool
        Margin ``mu``, ``|mu|`` where flipped; otherwise 0. A pair that is not flipped though its strength is negative
        has a negative margin, which lets the rejected response stay ahead.

    Raises
    ------
    InvalidInputError
        A value out of range, or both ways to flip.
    """

    flip_fraction: float | None = None
    flip_below: float | None = None
    soft: Literal["none", "smooth", "sigmoid"] = "none"
    alpha: float = 0.1
    margin: bool = True

    def __post_init__(self) -> None:
        if self.flip_fraction is None and self.flip_below is None:
            object.__setattr__(self, "flip_fraction", 0.1)
        if self.flip_fraction is not None and self.flip_below is not None:
            raise InvalidInputError("give flip_fraction or flip_below, not both")
        if self.flip_fraction is not None and not 0 <= self.flip_fraction <= 1:
            raise InvalidInputError(f"flip_fraction must be in [0, 1], got {self.flip_fraction}")
        if self.flip_below is not None and np.isnan(self.flip_below):
            raise InvalidInputError("flip_below must be a number, got NaN")
        if self.soft not in SOFT:
            raise UnknownNameError(f"unknown soft {self.soft!r}{nearest(str(self.soft), SOFT)}")
        if not 0 <= self.alpha <= 0.5:
            raise InvalidInputError(f"alpha must be in [0, 0.5], got {self.alpha}")

    def __call__(
        self, chosen: Any, rejected: Any, strengths: Any, rng: np.random.Generator | None = None
    ) -> CleanedPairs:
        """Clean pairs.

        Parameters
        ----------
        chosen, rejected : length N; arrays or tensors (N, ...), or lists
        strengths : (N,), or what `preference_strength` returns
        rng : numpy generator, optional
            Chooses which of equal strengths are flipped; default the first.

        Returns
        -------
        CleanedPairs
            New ones. Pairs whose responses are the same are left out, with a warning that counts them.

        Raises
        ------
        InvalidInputError
            Lengths that differ, strengths that are NaN or infinite.
        """
        mean, given = _mean(strengths)
        if not len(chosen) == len(rejected) == len(mean):
            raise InvalidInputError(
                f"{len(chosen)} chosen and {len(rejected)} rejected responses for {len(mean)} strengths"
            )
        same = identical_pairs(chosen, rejected)
        if same.any():
            warnings.warn(
                IdenticalResponsesWarning(f"dropped {same.sum()} of {len(same)} pairs whose responses are the same"),
                stacklevel=2,
            )
            chosen, rejected = take(chosen, np.flatnonzero(~same)), take(rejected, np.flatnonzero(~same))
        target, margin, flipped = self.labels(mean[~same], rng)
        return CleanedPairs(
            *flip_pairs(chosen, rejected, flipped), *(_like(x, given) for x in (target, margin, flipped))
        )

    def labels(
        self, strengths: Any, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Target float32, margin float32 and flipped bool, each (N,), of strengths (N,)."""
        mean, _ = _mean(strengths)
        if self.flip_below is not None:
            flipped = mean < self.flip_below
        else:
            assert self.flip_fraction is not None
            count = max(int(np.ceil(self.flip_fraction * len(mean) - 0.5 - 1e-9)), 0)
            among = np.arange(len(mean)) if rng is None else rng.permutation(len(mean))
            flipped = np.zeros(len(mean), bool)
            flipped[np.lexsort((among, mean))[:count]] = True
        corrected = np.where(flipped, np.abs(mean), mean)
        target = np.ones(len(mean))
        if self.soft == "smooth":
            target -= self.alpha
        elif self.soft == "sigmoid":
            target = 0.5 + 0.5 * np.tanh(corrected / 2)
        margin = corrected if self.margin else np.zeros(len(mean))
        return target.astype(np.float32), margin.astype(np.float32), flipped

    def clean(self, data: PreferenceData, strengths: Any, rng: np.random.Generator | None = None) -> PreferenceData:
        """Clean a record of pairs, so that a fit uses the new choice, target and margin.

        Ties and unlabelled pairs stay as they are; their strengths may be NaN. Ranks and ratings are left out: they
        would contradict the new choice. The columns ``flipped`` and ``strength`` are added. A record has no negative
        margins: where ``mu < 0`` and the pair was not flipped, the other response is the choice, with target ``1 - t``
        and margin ``-mu``, which is the same loss. Without `margin`, that of the data stays, and is 0 where flipped.

        Raises
        ------
        InvalidInputError
            A comparison of more than two responses, another number of strengths, a strength that is NaN or infinite.
        """
        mean, _ = _mean(strengths, finite=False)
        if len(mean) != len(data):
            raise InvalidInputError(f"{data.source} has {len(data)} comparisons, got {len(mean)} strengths")
        if (data.sizes != 2).any():
            at = int((data.sizes != 2).argmax())
            raise InvalidInputError(f"{data.where(at)}: {data.sizes[at]} responses, strengths are of pairs")
        # as a column, so that the strength of a pair that is dropped goes with it
        data = replace(data, columns={**data.columns, "strength": mean}).without_identical()
        mean = np.asarray(data.columns["strength"])
        left, right = data.order()[0].reshape(-1, 2).T
        decided = (left < right) | (right < left)
        wrong = decided & ~np.isfinite(mean)
        if wrong.any():
            raise InvalidInputError(f"{data.where(int(wrong.argmax()))}: the strength is NaN or infinite")
        target, margin, flips = (np.full(len(data), fill, kind) for fill, kind in _UNKNOWN)
        target[decided], margin[decided], flips[decided] = self.labels(mean[decided], rng)
        turned = margin < 0
        target, margin = np.where(turned, 1 - target, target), np.abs(margin)
        if not self.margin and data.margin is not None:
            margin = np.where(flips, 0, data.margin)
        choice = np.where(left == right, TIE, UNLABELLED)
        choice[decided] = ((right < left) ^ flips ^ turned)[decided]
        columns = {**data.columns, "flipped": flips}
        return replace(data, choice=choice, ranks=None, ratings=None, target=target, margin=margin, columns=columns)


_UNKNOWN: tuple[tuple[Any, Any], ...] = ((np.nan, np.float32), (np.nan, np.float32), (False, bool))


def flips_by_group(data: PreferenceData, by: str = "annotator") -> dict[Any, float]:
    """Share of flipped pairs for every annotator, prompt or value of a column, of what `PreferenceCleaner.clean` gave.

    A group far above the others may be a minority that is right about itself.

    Raises
    ------
    MissingColumnError, InvalidInputError
        The data have no such column; they have not been cleaned.
    """
    if "flipped" not in data.columns:
        raise InvalidInputError(f"{data.source} has no column 'flipped'; call PreferenceCleaner.clean first")
    codes = data.groups(by)
    if not len(codes):
        return {}
    values: Any = data.prompts if by == "prompt" else data.annotators if by == "annotator" else data.columns[by]
    _, first, place = np.unique(codes, return_index=True, return_inverse=True)
    share = np.bincount(place, np.asarray(data.columns["flipped"], float)) / np.bincount(place)
    return {values[at]: float(value) for at, value in zip(first.tolist(), share, strict=True)}


def _wide(values: Any) -> Any:
    """float32 or wider."""
    if isinstance(values, Tensor):
        return values if values.dtype in (torch.float32, torch.float64) else values.float()
    if values.dtype.kind not in "fiub":
        raise InvalidInputError(f"scores must be numbers, got {values.dtype}")
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)


def _deviation(values: Any, axis: int) -> Any:
    mean = values.mean(axis)
    centred = values - (mean if axis == 0 else mean[:, None])
    return (centred**2).mean(axis) ** 0.5


def _mean(strengths: Any, finite: bool = True) -> tuple[np.ndarray, Any]:
    """Strengths as float64 (N,), and what they were given as."""
    given = strengths["mean"] if isinstance(strengths, Mapping) else strengths
    array = given.detach().cpu().double().numpy() if isinstance(given, Tensor) else np.asarray(given, dtype=np.float64)
    if array.ndim != 1:
        raise InvalidInputError(f"strengths must have shape (pairs,), got {array.shape}")
    if finite and not np.isfinite(array).all():
        raise InvalidInputError(f"the strength of pair {int((~np.isfinite(array)).argmax())} is NaN or infinite")
    return array, given


def _like(values: np.ndarray, given: Any) -> Any:
    return torch.from_numpy(values).to(given.device) if isinstance(given, Tensor) else values
