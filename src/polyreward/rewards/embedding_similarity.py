"""Model scores in [0, 1] for answers that no rule can check: similarity to a reference, and a squashed reward model.

`EmbeddingSurrogateReward` is the cosine of frozen sentence embeddings of answer and reference, cut off at 0. It stands
in for a learned reward model and punishes good answers that read unlike the reference; several references soften that.
`RunningSigmoid` brings the raw scores of a reward model to [0, 1], standardised by a moving mean and deviation:

    mean <- mean + w d,   var <- (1 - w) (var + w d^2) + w var(batch),   d = mean(batch) - mean
    value = sigmoid((score - mean) / sqrt(var)),   w = (1 - momentum) / (1 - momentum^t) in update t

so that the first batches count alike, and the state is the exact mean and variance of the weighted past.

Paper: Beyond Monolithic Rewards: A Hybrid and Multi-Aspect Reward Optimization for MLLM Alignment (HARMO, arXiv
2510.05283); clipping, standardisation and momentum are our reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.rewards.answers import check_place, find_answer
from polyreward.rewards.contract import Reward, RewardFunction, Sample, as_list, is_missing, name_of, values_of

Embed = Callable[[list[str]], Any]


@dataclass(frozen=True)
class EmbeddingSurrogateReward(Reward):
    """Cosine of the embeddings of answer and reference (HARMO, arXiv 2510.05283).

    Parameters
    ----------
    embed : function of n texts to (n, d), an array or tensor
        Frozen; it is called once a batch, on each different text once. `polyreward.rewards.embedders` has some.
    clip : bool
        Cut off at 0, by default.
    column : str
        Column of the reference: a text, or a list of accepted ones of which the closest counts.
    extract : where the completion has its answer, as in `ExactMatch`; default the whole text

    Range [0, 1], or [-1, 1] without clipping. Empty text has similarity 0 to everything, and so has a zero vector.

    Raises
    ------
    InvalidInputError
        Embeddings of another shape or not finite; an empty list of references.
    """

    per_sample: ClassVar[bool] = False

    embed: Embed
    clip: bool = True
    column: str = "answer"
    extract: str = "text"

    def __post_init__(self) -> None:
        if not callable(self.embed):
            raise InvalidInputError(f"EmbeddingSurrogateReward: embed must be a function of texts, got {self.embed!r}")
        check_place(self.extract)

    @property
    def reads(self) -> tuple[str, ...]:
        """The column of the reference."""
        return (self.column,)

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion."""
        rows, left, right = [], [], []
        for sample in self.samples(prompts, completions, columns):
            answer = find_answer(sample.text, self.extract) or ""
            for reference in self._references(sample):
                rows.append(sample.row)
                left.append(answer)
                right.append(reference)
        best = np.full(len(completions), np.nan)
        if rows:
            np.fmax.at(best, rows, self.similarities(left, right))
        return as_list(best)

    def similarities(self, left: Sequence[str], right: Sequence[str]) -> np.ndarray:
        """Similarity of each pair of texts, float64 (n,)."""
        left, right = ([text.encode(errors="replace").decode() for text in side] for side in (left, right))
        texts = [text for text in dict.fromkeys([*left, *right]) if text.strip()]
        vectors = embedded(self.embed, texts)
        place = {text: row for row, text in enumerate(texts)}
        table = np.vstack([vectors, np.zeros((1, vectors.shape[1]))])  # the last row stands for empty text
        first, second = (table[[place.get(text, -1) for text in side]] for side in (left, right))
        return np.asarray(cosine(first, second, self.clip))

    def _references(self, sample: Sample) -> list[str]:
        value = sample.columns[self.column]
        references = [str(r) for r in (value if isinstance(value, list | tuple) else [value]) if not is_missing(r)]
        if not references:
            raise self.refuse(sample, self.column, "an empty list of references")
        return references


def cosine(left: Any, right: Any, clip: bool = True) -> Any:
    """Cosine of vectors (..., d) along the last axis, (...,); 0 where one of them is 0, cut off at 0 with `clip`.

    Arrays give float64; tensors stay on their device, computed in float32 or wider.
    """
    if hasattr(left, "new_tensor"):
        import torch

        dtype = torch.promote_types(left.dtype, torch.float32)
        left, right = left.to(dtype), right.to(dtype)
        scale = [side.abs().amax(dim=-1, keepdim=True) for side in (left, right)]
        left, right = (s / torch.where(m > 0, m, 1.0) for s, m in zip((left, right), scale, strict=True))
        norm = left.norm(dim=-1) * right.norm(dim=-1)
        value = (left * right).sum(dim=-1) / torch.where(norm > 0, norm, 1.0)
        return value.clamp(0.0 if clip else -1.0, 1.0)
    left, right = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    scale = [np.abs(side).max(axis=-1, keepdims=True, initial=0.0) for side in (left, right)]  # squares neither vanish
    left, right = (s / np.where(m > 0, m, 1.0) for s, m in zip((left, right), scale, strict=True))  # nor overflow
    norm = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    return np.clip((left * right).sum(axis=-1) / np.where(norm > 0, norm, 1.0), 0.0 if clip else -1.0, 1.0)


def embedded(embed: Embed, texts: list[str]) -> np.ndarray:
    """What `embed` gives for texts, float64 (n, d).

    Raises
    ------
    InvalidInputError
        Not one finite vector a text.
    """
    if not texts:
        return np.zeros((0, 1))
    vectors: Any = embed(texts)
    vectors = vectors.detach().cpu().float().numpy() if hasattr(vectors, "detach") else vectors
    vectors = vectors.toarray() if hasattr(vectors, "toarray") else vectors
    try:
        table = np.asarray(vectors, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"embed returned no table of numbers for {len(texts)} texts: {error}") from error
    if table.ndim != 2 or table.shape[0] != len(texts) or table.shape[1] == 0:
        raise InvalidInputError(
            f"embed returned shape {table.shape} for {len(texts)} texts, expected ({len(texts)}, d)"
        )
    broken = ~np.isfinite(table).all(axis=1)
    if broken.any():
        raise InvalidInputError(f"embed returned NaN or infinity for the text {texts[int(broken.argmax())][:60]!r}")
    return table


def unrelated_threshold(embed: Embed, texts: Sequence[str], quantile: float = 0.99, clip: bool = True) -> float:
    """A tau for similarities: the quantile of the cosine between texts that answer different questions.

    Sentence embeddings of unrelated texts are often more than 0.5 alike, and with a tau of 0.5 everything would count
    as correct. Calibrate it for each source.

    Parameters
    ----------
    texts : references of different questions, at least two
    quantile : float in [0, 1]
    """
    if len(texts) < 2 or not 0 <= quantile <= 1:
        raise InvalidInputError(f"need at least two texts and a quantile in [0, 1], got {len(texts)} and {quantile}")
    vectors = embedded(embed, list(texts))
    first, second = np.triu_indices(len(texts), k=1)
    return float(np.quantile(cosine(vectors[first], vectors[second], clip), quantile))


class RunningSigmoid:
    """Raw scores to (0, 1): standardised by their moving mean and deviation, then a sigmoid (arXiv 2510.05283).

    The batch is taken in first and standardised with what it changed, so that the first batch has a scale. Inside one
    call the order of scores is kept.

    Parameters
    ----------
    momentum : float in [0, 1)
        Weight of the past in each update, 0.99 by default; 0 standardises each batch by itself.

    Attributes
    ----------
    mean, var : float
        Of the weighted past; 0 and 1 before the first update, which make a plain sigmoid.
    count : int
        Updates so far.
    """

    def __init__(self, momentum: float = 0.99) -> None:
        if not 0 <= momentum < 1:
            raise InvalidInputError(f"momentum must be in [0, 1), got {momentum!r}")
        self.momentum = momentum
        self.mean, self.var, self.count = 0.0, 1.0, 0

    def __repr__(self) -> str:
        return f"RunningSigmoid(momentum={self.momentum}, mean={self.mean:.4g}, var={self.var:.4g}, count={self.count})"

    def __call__(self, scores: Any, update: bool = True) -> Any:
        """Squash a batch.

        Parameters
        ----------
        scores : numbers, array or tensor of any shape
            NaN stays NaN and is not taken in.
        update : bool
            False leaves the state as it is, for evaluation.

        Returns
        -------
        array, or tensor on the device of `scores`; in their floating dtype. All 0.5 where the deviation is 0.

        Raises
        ------
        InvalidInputError
            An infinite score; nothing is changed then.
        """
        if hasattr(scores, "new_tensor"):
            import torch

            dtype = scores.dtype if scores.is_floating_point() else torch.get_default_dtype()
            return torch.sigmoid(self._standardised(scores.detach().double(), update)).to(dtype)
        values = np.asarray(scores, dtype=np.float64)
        squashed = 1 / (1 + np.exp(-np.clip(self._standardised(values, update), -700, 700)))
        kind: Any = getattr(scores, "dtype", np.float64)
        return squashed.astype(kind) if np.issubdtype(kind, np.floating) else squashed

    def _standardised(self, values: Any, update: bool) -> Any:
        """float64 array or tensor; the state takes the values in first."""
        known = values[values == values]
        if (abs(known) == math.inf).any():
            raise InvalidInputError("RunningSigmoid was given an infinite score")
        if update and len(known):
            mean = float(known.mean())
            with np.errstate(over="ignore"):
                self._take_in(mean, float(((known - mean) ** 2).mean()) if known.min() < known.max() else 0.0)
        return (values - self.mean) / (math.sqrt(self.var) if self.var > 0 else 1.0)

    def _take_in(self, mean: float, var: float) -> None:
        if not (math.isfinite(mean) and math.isfinite(var)):
            raise InvalidInputError("RunningSigmoid was given scores too large for a variance")
        self.count += 1
        weight = (1 - self.momentum) / (1 - self.momentum**self.count)
        before, step = (self.var if self.count > 1 else 0.0), mean - self.mean
        self.var = (1 - weight) * (before + weight * step * step) + weight * var
        self.mean = mean if weight == 1 else self.mean + weight * step

    def state_dict(self) -> dict[str, float | int]:
        """The state as plain numbers."""
        return {"mean": self.mean, "var": self.var, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; a state that cannot be used changes nothing."""
        try:
            mean, var, count = float(state["mean"]), float(state["var"]), int(state["count"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(f"the state of a RunningSigmoid needs mean, var and count: {error!r}") from error
        if not (math.isfinite(mean) and math.isfinite(var) and var >= 0 and count >= 0):
            raise InvalidInputError(f"the state of a RunningSigmoid cannot be mean={mean}, var={var}, count={count}")
        self.mean, self.var, self.count = mean, var, count


@dataclass(frozen=True)
class SquashedReward(Reward):
    """A reward of any scale, brought to (0, 1) by a `RunningSigmoid` over the batches.

    Parameters
    ----------
    reward : reward, such as a reward model's logit
    sigmoid : RunningSigmoid
        Its state moves with every call; copies in other processes go their own way.
    update : bool
        False for evaluation.

    Range (0, 1). Does not apply where the reward does not. For the hybrid of HARMO (arXiv 2510.05283).
    """

    per_sample: ClassVar[bool] = False

    reward: RewardFunction
    sigmoid: RunningSigmoid = field(default_factory=RunningSigmoid)
    update: bool = True

    @property
    def __name__(self) -> str:
        """Name in logs."""
        return f"sigmoid({name_of(self.reward)})"

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value a completion."""
        values = values_of(self.reward, prompts, completions, columns)
        return as_list(self.sigmoid(values, self.update))
