"""A length penalty that looks at the whole group: wrong answers shorter than the group's correct ones are marked down.

A score that prefers short answers pushes a policy to brevity. Here lengths are compared inside the group of one prompt.
C are the samples whose score reaches tau, L* is their mean length, and

    R_i = -P_max (1 - |y_i| / L*)    where i is not in C and |y_i| < L*,    else 0

so a wrong short answer is worst, a correct one is never punished for its length, and a wrong one may be as long as the
correct ones. Without a correct sample nobody is punished. Real-valued scores count through tau.

Paper: Beyond Monolithic Rewards: A Hybrid and Multi-Aspect Reward Optimization for MLLM Alignment (HARMO, arXiv
2510.05283), which names the penalty, its group, P_max and tau; the formula is our reading of them.

A penalty belongs to the group as it was sampled: compute it before samples are filtered out or spread over devices.
Wrong answers are paid to become as long as the correct ones, so watch their length; one lucky long answer sets L*,
which the median softens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.rewards.contract import RewardFunction, as_list, is_finite, is_listing, name_of, values_of
from polyreward.rewards.groups import GroupReward, label_of
from polyreward.rewards.length import UNITS, Unit, length_of

if TYPE_CHECKING:
    from torch import Tensor

    from polyreward.grouped import Ids, Segments

Side = Literal["short", "two_sided"]
Centre = Literal["mean", "median"]


@dataclass(frozen=True)
class GroupLengthPenalty:
    """Penalty of lengths against the correct samples of the group; stateless (arXiv 2510.05283).

    Parameters
    ----------
    p_max : float >= 0
        P_max in the paper, the penalty of a wrong answer of length 0; 0.5 by default.
    tau : float
        Score from which a sample counts as correct, 0.5 by default. Cosine scores of unrelated texts are often above
        it: see `polyreward.rewards.embedding_similarity.unrelated_threshold`.
    side : "short", or "two_sided" for ``-P_max min(1, |y| / L* - 1)`` on wrong answers longer than L* too
    centre : "mean" or "median"
        What L* is of the lengths of the correct samples.

    Raises
    ------
    InvalidInputError
        A negative or infinite p_max, a tau that is no number, an unknown side or centre.
    """

    p_max: float = 0.5
    tau: float = 0.5
    side: Side = "short"
    centre: Centre = "mean"

    def __post_init__(self) -> None:
        if not (is_finite(self.p_max) and self.p_max >= 0 and is_finite(self.tau)):
            raise InvalidInputError(
                f"GroupLengthPenalty needs a finite p_max >= 0 and tau, got p_max={self.p_max!r}, tau={self.tau!r}"
            )
        if self.side not in ("short", "two_sided"):
            raise InvalidInputError(f"side must be 'short' or 'two_sided', got {self.side!r}")
        if self.centre not in ("mean", "median"):
            raise InvalidInputError(f"centre must be 'mean' or 'median', got {self.centre!r}")

    def __call__(self, scores: Any, lengths: Any, groups: Segments | Ids | None = None, tau: Any = None) -> Any:
        """Penalties in [-p_max, 0].

        Parameters
        ----------
        scores : float (N,)
            R_hyb in the paper. NaN: the sample takes no part and its penalty is NaN.
        lengths : (N,) numbers >= 0
            Tokens of the responses, without prompt and padding.
        groups : ids (N,) or `Segments`; None where all samples are one group
        tau : float (N,), optional
            Thresholds of single samples (of their source, say) in place of the part's.

        Returns
        -------
        (N,) array, or tensor on the device of `scores`; in its floating dtype, float32 for whole numbers

        Raises
        ------
        InvalidInputError
            Shapes that differ or are not one-dimensional; lengths that are negative or not finite.
        """
        return _in_and_out(self, scores, lengths, groups, tau)


@dataclass(frozen=True)
class GroupLengthReward(GroupReward):
    """`GroupLengthPenalty` as a reward: the penalty alone, to be added to the reward that decides what is correct.

    Of HARMO (arXiv 2510.05283).

    Parameters
    ----------
    accuracy : reward
        Its values are the scores; it is called once, on the whole batch.
    penalty : GroupLengthPenalty
    unit : "tokens" (words where the trainer passes no ``completion_ids``), "words" or "characters"

    Range [-p_max, 0]. Does not apply where the accuracy does not.
    """

    accuracy: RewardFunction
    penalty: GroupLengthPenalty = field(default_factory=GroupLengthPenalty)
    unit: Unit = "tokens"

    def __post_init__(self) -> None:
        if not callable(self.accuracy):
            raise InvalidInputError(f"GroupLengthReward: {self.accuracy!r} is not a reward function")
        if self.unit not in UNITS:
            raise InvalidInputError(f"unit must be one of {', '.join(UNITS)}, got {self.unit!r}")

    @property
    def members(self) -> tuple[RewardFunction, ...]:
        """The reward whose values are the scores."""
        return (self.accuracy,)

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One penalty a completion."""
        if len(completions) == 0:
            return []
        scores = values_of(self.accuracy, prompts, completions, columns)
        lengths = response_lengths(self, prompts, completions, columns, self.unit)
        groups = group_labels(name_of(self), prompts, len(completions), columns)
        return as_list(np.asarray(self.penalty(scores, lengths, groups), dtype=np.float64))


def response_lengths(
    reward: GroupReward,
    prompts: Sequence[Any] | None,
    completions: Sequence[Any],
    columns: Mapping[str, Any],
    unit: Unit,
) -> np.ndarray:
    """Lengths of the completions of a batch, float64 (N,)."""
    return np.array([length_of(sample, unit) for sample in reward.samples(prompts, completions, columns)], np.float64)


def group_labels(name: str, prompts: Sequence[Any] | None, rows: int, columns: Mapping[str, Any]) -> list[str | int]:
    """What tells the groups of a batch apart, one label a row: the column ``group``, else the prompt.

    Raises
    ------
    InvalidInputError
        Neither is there, or the column has another length.
    """
    labels = columns.get("group", prompts)
    if labels is None:
        raise InvalidInputError(f"reward {name!r} compares the samples of a prompt: give prompts or 'group'")
    if not is_listing(labels) or len(labels) != rows:
        raise InvalidInputError(f"reward {name!r}: 'group' must be a list of {rows}, one a completion")
    return [label_of(label) for label in labels]


def _in_and_out(part: GroupLengthPenalty, scores: Any, lengths: Any, groups: Any, tau: Any) -> Any:
    """The penalty of arrays or tensors, in the kind, device and dtype of the scores."""
    import torch

    from polyreward.grouped import Segments, factorize, whole

    given = torch.is_tensor(scores)
    try:
        values = scores if given else torch.from_numpy(np.array(scores, dtype=_floating(scores)))
        sizes = torch.as_tensor(lengths if torch.is_tensor(lengths) else np.asarray(lengths), device=values.device)
        limit = torch.as_tensor(part.tau if tau is None else tau, dtype=torch.float64, device=values.device)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"group length penalty: scores, lengths and tau must be numbers: {error}") from error
    rows = values.shape[0] if values.ndim == 1 else -1
    if rows < 0 or sizes.shape != values.shape or limit.shape not in ((), values.shape):
        raise InvalidInputError(
            f"group length penalty: scores {tuple(values.shape)}, lengths {tuple(sizes.shape)} and tau "
            f"{tuple(limit.shape)} must be one number a sample"
        )
    wrong = ~torch.isfinite(sizes) | (sizes < 0)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise InvalidInputError(f"group length penalty: length {sizes[row].item()} of sample {row}, expected >= 0")
    if groups is None:
        segments = whole(rows, device=values.device)
    else:
        segments = groups if isinstance(groups, Segments) else factorize(groups, name="groups", device=values.device)
    if len(segments) != rows:
        raise InvalidInputError(f"group length penalty: {len(segments)} group ids for {rows} samples")
    dtype = values.dtype if values.is_floating_point() else torch.float32
    result = _penalty(part, values.detach().double(), sizes.double(), limit, segments).to(dtype)
    return result if given else result.numpy()


def _penalty(part: GroupLengthPenalty, scores: Tensor, lengths: Tensor, tau: Tensor, segments: Segments) -> Tensor:
    """float64 (N,); NaN where the score is."""
    import torch

    correct = scores >= tau  # false for NaN
    centre = segments.mean(lengths, correct) if part.centre == "mean" else _median(lengths, correct, segments)
    target = segments.spread(centre)  # 0 where the group has no correct sample, or only empty ones
    ratio = lengths / torch.where(target > 0, target, 1.0)
    lack = (1 - ratio).clamp(min=0)
    if part.side == "two_sided":
        lack = lack + (ratio - 1).clamp(0, 1)
    punished = ~correct & (target > 0)
    penalty = torch.where(punished, -part.p_max * lack, 0.0)
    return torch.where(torch.isnan(scores), torch.nan, penalty) + 0.0  # no -0


def _median(values: Tensor, mask: Tensor, segments: Segments) -> Tensor:
    """Median of the masked values of each segment, float64 (count,); 0 where none is."""
    import torch

    chosen, codes = values[mask], segments.codes[mask]
    order = torch.argsort(chosen, stable=True)
    order = order[torch.argsort(codes[order], stable=True)]
    chosen = torch.cat([chosen[order], chosen.new_zeros(1)])  # one more, so that an empty segment has what to read
    sizes = torch.bincount(codes, minlength=segments.count)
    start = sizes.cumsum(0) - sizes
    low, high = start + (sizes - 1).clamp(min=0) // 2, start + sizes // 2
    last = len(chosen) - 1
    median = (chosen[low.clamp(max=last)] + chosen[high.clamp(max=last)]) / 2
    return torch.where(sizes > 0, median, 0.0)


def _floating(values: Any) -> Any:
    dtype = getattr(values, "dtype", None)
    if dtype is None:
        return np.float64
    return dtype if np.issubdtype(dtype, np.floating) else np.float32
