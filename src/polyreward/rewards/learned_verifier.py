"""Learned verifiers: the probability that a sample succeeds, fitted to outcomes that a checker gave.

    r^ = argmin over a class of functions of  sum_i (r_i - r^(x_i))^2         loss "squared"
                                              sum_i [r_i != r^(x_i)]          loss "zero_one"

The class is a table (one value for each key: an answer, a tool, a pair of tokens) or a logistic function of features. A
table knows what it has never seen and says nothing there, which is what keeps an improvement pessimistic. Its `lower`
is the least value of a key among all tables that fit the data within a tolerance of the best.

Scaling Test-Time Compute Without Verification or RL is Suboptimal, arXiv 2502.12118, algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.grouped import factorize
from polyreward.rewards.contract import Reward, Sample, is_missing

Loss = Literal["squared", "zero_one"]

_BIAS_RIDGE = 1e-3


@dataclass(frozen=True)
class VerifierFit:
    """How to fit a verifier; `fit` gives the verifier.

    Parameters
    ----------
    loss : "squared" or "zero_one"
        Squared: values are means or probabilities. Zero-one: values are verdicts, 0 or 1. For features, zero-one loss
        is minimised by a logistic fit whose threshold makes the fewest errors.
    ridge : float >= 0
        Penalty ``ridge / 2 * |weights|^2`` beside the summed loss, for features, which are standardised.

    Raises
    ------
    UnknownNameError
        No such loss.
    InvalidInputError
        A negative penalty.
    """

    loss: Loss = "squared"
    ridge: float = 1.0

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise UnknownNameError(f"no loss {self.loss!r}{nearest(str(self.loss), get_args(Loss))}")
        if not 0 <= self.ridge < math.inf:
            raise InvalidInputError(f"ridge must be a finite number of at least 0, got {self.ridge}")

    def fit(self, inputs: Any, outcomes: Any, weights: Any = None) -> TableVerifier | LogisticVerifier:
        """Fit to M samples.

        Parameters
        ----------
        inputs : float (M, D) for features, or M keys (integers, strings, tuples) for a table
        outcomes : (M,) numbers
            What the checker said; NaN: it was not asked. 0 or 1, save for a table with squared loss (any finite number)
            and features with squared loss (any probability).
        weights : float >= 0 (M,), default 1

        Returns
        -------
        TableVerifier, which is empty where there is no outcome; or LogisticVerifier

        Raises
        ------
        InvalidInputError
            Lengths that do not fit, outcomes or weights out of range, features that are not finite, features without a
            single outcome.
        """
        features = _features(inputs)
        rows = len(inputs) if features is None else len(features)
        device = torch.device("cpu") if features is None else features.device
        outcome = _column("outcomes", outcomes, rows, device)
        weight = torch.ones_like(outcome) if weights is None else _column("weights", weights, rows, device)
        known = ~outcome.isnan()
        _refuse(known & ~((weight >= 0) & torch.isfinite(weight)), weight, "weights", "a finite number of at least 0")
        if self.loss == "zero_one":
            _refuse(known & (outcome != 0) & (outcome != 1), outcome, "outcomes", "0 or 1")
        elif features is not None:
            _refuse(known & ~((outcome >= 0) & (outcome <= 1)), outcome, "outcomes", "a number in [0, 1]")
        else:
            _refuse(known & ~torch.isfinite(outcome), outcome, "outcomes", "a finite number")
        if features is None:
            return self._table(inputs, torch.where(known, outcome, 0.0), torch.where(known, weight, 0.0))
        known = known & (weight > 0)
        if not bool(known.any()):
            raise InvalidInputError("VerifierFit: no outcome to fit to")
        _refuse_features(features, known)
        return self._logistic(features[known], outcome[known], weight[known])

    def _table(self, keys: Any, outcome: Tensor, weight: Tensor) -> TableVerifier:
        segments = factorize(keys, name="keys", device="cpu")
        counts = segments.sum(weight).numpy()
        totals = segments.sum(weight * outcome).numpy()
        seen = np.flatnonzero(counts > 0)
        labels = tuple(segments.label(int(code)) for code in seen)
        return TableVerifier(labels, counts[seen], totals[seen], self.loss)

    def _logistic(self, features: Tensor, outcome: Tensor, weight: Tensor) -> LogisticVerifier:
        centre = (weight[:, None] * features).sum(0) / weight.sum()
        scale = ((weight[:, None] * (features - centre).square()).sum(0) / weight.sum()).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        inputs = (features - centre) / scale
        parameters = torch.zeros(inputs.shape[1] + 1, dtype=torch.float64, device=features.device)
        # From the optimum of the log-loss, which is convex, to that of the squared loss nearby.
        for loss in ("log", "squared") if self.loss == "squared" else ("log",):
            parameters = self._minimise(loss, parameters, inputs, outcome, weight)
        slope = parameters[:-1] / scale
        bias = parameters[-1] - (slope * centre).sum()
        threshold = 0.5
        if self.loss == "zero_one":
            threshold = _best_threshold(torch.sigmoid(features @ slope + bias), outcome, weight)
        return LogisticVerifier(slope, bias, self.loss, threshold)

    def _minimise(self, loss: str, start: Tensor, inputs: Tensor, outcome: Tensor, weight: Tensor) -> Tensor:
        parameters = start.clone().requires_grad_(True)
        penalty = torch.full_like(start, self.ridge)
        penalty[-1] = _BIAS_RIDGE  # outcomes of one kind alone still have a finite optimum
        solver = torch.optim.LBFGS(
            [parameters], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            solver.zero_grad()
            logits = inputs @ parameters[:-1] + parameters[-1]
            if loss == "log":
                errors = torch.nn.functional.binary_cross_entropy_with_logits(logits, outcome, reduction="none")
            else:
                errors = (torch.sigmoid(logits) - outcome).square()
            total = ((weight * errors).sum() + (penalty * parameters.square()).sum() / 2) / weight.sum()
            total.backward()
            return total

        with torch.enable_grad():
            solver.step(closure)
        return parameters.detach()


@dataclass(frozen=True, eq=False)
class TableVerifier:
    """A value for each key.

    Attributes
    ----------
    keys : the K keys seen
    counts, totals : float64 (K,)
        Number of outcomes (weights included) and their sum.
    loss : "squared" or "zero_one"
    """

    keys: tuple[Any, ...]
    counts: np.ndarray
    totals: np.ndarray
    loss: Loss = "squared"
    _index: dict[Any, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {key: row for row, key in enumerate(self.keys)})

    def __call__(self, keys: Any) -> np.ndarray:
        """Mean outcome of each key, or the verdict under zero-one loss (a tie is 0), float64; NaN where never seen."""
        means = self.totals / self.counts
        return self._spread((means > 0.5).astype(np.float64) if self.loss == "zero_one" else means, keys)

    def lower(self, keys: Any, tolerance: float, least: float = 0.0) -> np.ndarray:
        """Least value of each key over the tables whose summed squared error is within `tolerance` of the best.

        ``max(least, mean - sqrt(tolerance / count))``, float64; `least` for a key never seen.

        Raises
        ------
        InvalidInputError
            A negative tolerance.
        """
        if not 0 <= tolerance < math.inf:
            raise InvalidInputError(f"tolerance must be a finite number of at least 0, got {tolerance}")
        bounds = np.maximum(self.totals / self.counts - np.sqrt(tolerance / self.counts), least)
        return np.nan_to_num(self._spread(bounds, keys), nan=least)

    def as_reward(self, describe: Callable[[Sample], Any], name: str = "learned_verifier") -> VerifierReward:
        """The verifier as a reward; `describe` gives the key of a sample, None where it has none."""
        return VerifierReward(self, describe, name)

    def _spread(self, values: np.ndarray, keys: Any) -> np.ndarray:
        segments = factorize(keys, name="keys", device="cpu")
        rows = np.array([self._index.get(segments.label(c), len(self.keys)) for c in range(segments.count)], dtype=int)
        return np.append(values, np.nan)[rows[segments.codes.numpy()]] if len(rows) else np.zeros(0)


@dataclass(frozen=True, eq=False)
class LogisticVerifier:
    """Probability of success, ``sigmoid(features @ weights + bias)``.

    Attributes
    ----------
    weights : float64 tensor (D,)
    bias : float64 tensor ()
    loss : "squared" or "zero_one"
    threshold : float
        Probability from which the verdict of a zero-one verifier is 1.
    """

    weights: Tensor
    bias: Tensor
    loss: Loss = "squared"
    threshold: float = 0.5

    def __call__(self, features: Any) -> Any:
        """Probability, or the verdict under zero-one loss, float64 (M,); NaN where a feature is NaN or infinite.

        A tensor on its own device for a tensor, else NumPy.
        """
        values = self.probability(features)
        if self.loss == "squared":
            return values
        if isinstance(values, Tensor):
            return torch.where(values.isnan(), values, (values >= self.threshold).to(values.dtype))
        return np.where(np.isnan(values), values, (values >= self.threshold).astype(np.float64))

    def probability(self, features: Any) -> Any:
        """Probability whatever the loss was, float64 (M,)."""
        inputs = _features(features)
        if inputs is None or inputs.shape[1] != len(self.weights):
            shape = tuple(getattr(features, "shape", (len(features),)))
            raise InvalidInputError(f"features have shape {shape}, expected (M, {len(self.weights)})")
        weights, bias = self.weights.to(inputs.device), self.bias.to(inputs.device)
        readable = torch.isfinite(inputs).all(dim=1)
        values = torch.sigmoid(torch.where(readable[:, None], inputs, 0.0) @ weights + bias)
        values = torch.where(readable, values, torch.nan)
        return values if isinstance(features, Tensor) else values.numpy()

    def as_reward(self, describe: Callable[[Sample], Any], name: str = "learned_verifier") -> VerifierReward:
        """The verifier as a reward; `describe` gives the D features of a sample, None where it has none."""
        return VerifierReward(self, describe, name)


@dataclass(frozen=True)
class VerifierReward(Reward):
    """A learned verifier (arXiv 2502.12118) under the reward contract.

    Parameters
    ----------
    verifier : TableVerifier or LogisticVerifier
    describe : function of a `Sample`
        Its key or features; None: the verifier does not apply.
    name : str

    Range: that of the verifier. None where it has no opinion: a key never seen, features that are not finite.
    """

    verifier: TableVerifier | LogisticVerifier
    describe: Callable[[Sample], Any]
    name: str = "learned_verifier"

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score a batch, as every reward does."""
        values: list[float | None] = [None] * len(completions)
        described = [(s.row, self.describe(s)) for s in self.samples(prompts, completions, columns)]
        described = [(row, entry) for row, entry in described if not is_missing(entry)]
        if described:
            rows, entries = zip(*described, strict=True)
            logistic = isinstance(self.verifier, LogisticVerifier)
            scores = self.verifier(np.array(entries, dtype=np.float64) if logistic else list(entries))
            for row, score in zip(rows, scores.tolist(), strict=True):
                values[row] = None if math.isnan(score) else score
        return values


def _features(inputs: Any) -> Tensor | None:
    """Inputs as features (M, D), float64; None where they are keys."""
    if isinstance(inputs, Tensor):
        return inputs.to(torch.float64) if inputs.ndim == 2 else None
    if isinstance(inputs, np.ndarray):
        numeric = inputs.ndim == 2 and inputs.dtype.kind in "fiub"
        return torch.from_numpy(inputs.astype(np.float64)) if numeric else None
    if len(inputs) and all(isinstance(row, list | np.ndarray) for row in inputs):
        try:
            array = np.array(inputs, dtype=np.float64)
        except (TypeError, ValueError):
            return None
        return torch.from_numpy(array) if array.ndim == 2 else None
    return None


def _column(name: str, values: Any, rows: int, device: torch.device) -> Tensor:
    if not isinstance(values, Tensor):
        try:
            values = torch.from_numpy(np.array(values, dtype=np.float64))
        except (TypeError, ValueError):
            raise InvalidInputError(f"{name} must be numbers, got {values!r:.80}") from None
    if values.shape != (rows,):
        raise InvalidInputError(f"{name} has shape {tuple(values.shape)}, expected ({rows},), one an input")
    return values.to(device, torch.float64)


def _refuse(wrong: Tensor, values: Tensor, name: str, expected: str) -> None:
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise InvalidInputError(f"{name}[{row}] is {values[row].item():g}, expected {expected}")


def _refuse_features(features: Tensor, known: Tensor) -> None:
    wrong = known[:, None] & ~torch.isfinite(features)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise InvalidInputError(
            f"features[{row}, {column}] is {features[row, column].item()}, expected a finite number"
        )


def _best_threshold(probability: Tensor, outcome: Tensor, weight: Tensor) -> float:
    """The probability from which to say 1 so that the weighted number of errors is least; of equals, the strictest."""
    ordered, order = probability.sort()
    right, wrong = weight * outcome, weight * (1 - outcome)
    # Saying 1 from rank k on misses the successes below and accepts the failures from there on.
    missed = torch.nn.functional.pad(right[order].cumsum(0), (1, 0))
    accepted = wrong.sum() - torch.nn.functional.pad(wrong[order].cumsum(0), (1, 0))
    allowed = torch.ones_like(missed, dtype=torch.bool)
    allowed[1:-1] = ordered[1:] > ordered[:-1]  # equal probabilities have equal verdicts
    errors = torch.where(allowed, missed + accepted, torch.inf)
    cut = len(errors) - 1 - int(errors.flip(0).argmin())
    if cut == 0:
        return 0.0
    if cut == len(ordered):
        return math.nextafter(float(ordered[-1]), math.inf)
    return float((ordered[cut - 1] + ordered[cut]) / 2)
