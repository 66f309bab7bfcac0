"""`BiasPenalty`: bias fitting inside `PreferenceModel`, with any head and likelihood; `with_attribute` for its data.

    data = with_attribute(data, word_count, name="length")
    penalty = BiasPenalty("length")
    model = PreferenceModel(encoder, head, likelihood, penalties=[penalty]).fit(data, validation=None)

"Bias Fitting to Mitigate Length Bias of Reward Model in RLHF" (FiMi-RM, arXiv 2505.12843).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError, MissingColumnError, nearest
from polyreward.preferences import PreferenceData
from polyreward.reward_models.bias_fitting import (
    PHASES,
    Phase,
    check_settings,
    decorrelation_loss,
    fitting_loss,
    learns,
    turn_of,
)
from polyreward.reward_models.comparisons import Comparisons, ComparisonTable
from polyreward.reward_models.length_bias import BiasFitter, correlation_ratio, varies
from polyreward.reward_models.texts import plain


def word_count(response: Any) -> int:
    """Words of a response: a text, or chat messages."""
    return len(plain(response).split())


def with_attribute(
    data: PreferenceData, attribute: Callable[[Any], float] = word_count, name: str = "length"
) -> PreferenceData:
    """The same data with a column of the attribute of each response, float32 (N, K), NaN where there is no response.

    Parameters
    ----------
    attribute : function of a response to a number
        Or None where it is unknown. Count tokens of the reward model's own tokenizer where there is one.

    Raises
    ------
    InvalidInputError
        An attribute that is infinite or no number, with the row.
    """
    values = np.empty(len(data.responses), np.float32)
    for row, response in enumerate(data.responses):
        try:
            values[row] = attribute(response)
        except (TypeError, ValueError) as error:
            place = data.where(int(data.owner[row]))
            raise InvalidInputError(
                f"{place}: the attribute {name!r} of a response cannot be computed: {error}"
            ) from error
    if np.isinf(values).any():
        row = int(np.isinf(values).argmax())
        raise InvalidInputError(f"{data.where(int(data.owner[row]))}: the attribute {name!r} is {values[row]}")
    return replace(data, columns={**data.columns, name: spread(values, data.sizes)})


def spread(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Values of all responses (M,) as (N, K), NaN where a comparison has fewer."""
    width = int(sizes.max()) if len(sizes) else 0
    out = np.full((len(sizes), width), np.nan, np.float32)
    out[np.arange(width)[None] < sizes[:, None]] = values
    return out


class BiasPenalty(nn.Module):
    """A penalty that fits the curve by which scores follow an attribute, then takes the correlation with it away.

    While a fit is below `warmup` it adds nothing; for `fit` more, the fitter learns; then fitter and model take turns
    of `period` steps, the fitter first. In the fitter's turns `holds_model` is true: the model's weights rest where the
    fit heeds it. The fitter learns at the fit's rate.

    Scores in evaluation, also those of held-out data during a fit, are charged ``weight | eta - target |``, eta the
    root of `correlation_ratio`, in all phases alike. Taking a bias away costs likelihood by design: fit with
    ``validation=None``, or early stopping may go back to the weights of the warm-up.

    Parameters
    ----------
    attribute : str, or function of a response to a number
        A numeric column of one value a response, as of `with_attribute`; or X for columns ``chosen_X`` and
        ``rejected_X`` of comparisons of two. A function is applied to the responses of the data that are fitted; data
        that come later without the column ``"attribute"`` are then not charged.
    fitter : module or function of (N,) to (N,), default `BiasFitter`
    warmup, fit : shares of the fit's steps
    period : int or None
        None leaves the fitter as it is after its phase.
    weight : float >= 0
    target : float in [0, 1)
        The correlation that may stay.
    bins : int
        Of the correlation ratio.
    eps : float

    Attributes
    ----------
    degenerate : int
        Batches in which scores or attributes did not vary.
    """

    counts: Tensor

    def __init__(
        self,
        attribute: str | Callable[[Any], float] = "length",
        fitter: Any = None,
        *,
        warmup: float = 0.4,
        fit: float = 0.15,
        period: int | None = 8,
        weight: float = 1.0,
        target: float = 0.0,
        bins: int = 10,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        check_settings(period, weight, target)
        if min(warmup, fit) < 0 or not warmup + fit <= 1:
            raise InvalidInputError(f"warmup and fit are shares of the steps, at most 1 together, got {warmup}, {fit}")
        self.attribute, self.fitter = attribute, BiasFitter() if fitter is None else fitter
        self.warmup, self.fit, self.period = warmup, fit, period
        self.weight, self.target, self.bins, self.eps = weight, target, bins, eps
        # phase, steps in it, degenerate batches: a buffer, so that a checkpoint of the fit holds them
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int64))

    @property
    def phase(self) -> Phase:
        """Which of "warmup", "fit" and "debias" it is."""
        return PHASES[int(self.counts[0])]

    @property
    def name(self) -> str:
        """Name of the column."""
        return self.attribute if isinstance(self.attribute, str) else "attribute"

    @property
    def turn(self) -> Literal["reward", "fitter"]:
        """Whose step this is; a fitter without weights has none."""
        if not learns(self.fitter):
            return "reward"
        return turn_of(self.phase, int(self.counts[1]) - 1, self.period)

    @property
    def holds_model(self) -> bool:
        """Whether the weights of the model rest in this step."""
        return self.training and self.turn == "fitter"

    @property
    def degenerate(self) -> int:
        """Batches in which scores or attributes did not vary."""
        return int(self.counts[2])

    def prepare(self, table: ComparisonTable, features: Any = None) -> None:
        """Begin a fit: a fresh fitter by the seed of the fit, counters at 0, and the attribute where it is computed."""
        self.counts.zero_()
        if isinstance(self.fitter, nn.Module):
            for part in self.fitter.modules():
                reset: Any = getattr(part, "reset_parameters", None)
                if reset is not None:
                    reset()
        if not isinstance(self.attribute, str):
            made = with_attribute(table.data, self.attribute, self.name)
            table.columns[self.name] = np.asarray(made.columns[self.name], np.float32)

    def step(self, share: float) -> None:
        """Before each optimiser step, with the share of the fit that is done."""
        end = self.warmup + self.fit - 1e-9  # 0.4 + 0.2 is a little above 0.6
        phase = 0 if share < self.warmup else 1 if share < end else 2
        if phase != int(self.counts[0]):
            self.counts[:2] = torch.tensor([phase, 0])
        self.counts[1] += 1

    def forward(self, scores: Tensor, comparisons: Comparisons) -> Tensor:
        """What is added to the loss, a scalar.

        Raises
        ------
        MissingColumnError
            The data have no such column.
        """
        attribute = self._values(comparisons)
        if attribute is None or not bool(torch.isfinite(scores.detach()).all()):
            return scores.sum() * 0  # scores that are not finite are for the fit to explain
        known = ~torch.isnan(attribute)
        scores, attribute = scores[known], attribute[known]
        if not self.training:
            reached = correlation_ratio(scores, attribute, self.bins).clamp(min=0).sqrt()
            charged: Tensor = self.weight * (reached - self.target).abs()
            return charged
        if self.phase == "warmup":
            return scores.sum() * 0
        self.counts[2] += not (varies(scores) and varies(attribute))
        if self.turn == "fitter":
            return fitting_loss(scores, self.fitter(attribute), self.eps)
        if self.phase == "fit":
            return scores.sum() * 0
        with torch.no_grad():
            fitted = self.fitter(attribute)
        return self.weight * decorrelation_loss(scores, fitted, self.target, self.eps)

    def _values(self, comparisons: Comparisons) -> Tensor | None:
        """The attribute of each response, float (R,), NaN where it is unknown; None for data without it."""
        columns, name = comparisons.columns, self.name
        sides = [f"chosen_{name}", f"rejected_{name}"]
        if name in columns:
            values = columns[name]
            if values.ndim != 2 or values.shape[1] < comparisons.width:
                raise InvalidInputError(
                    f"column {name!r} has shape {tuple(values.shape)} in a batch, expected a value for each of "
                    f"{comparisons.width} responses; make it by with_attribute(data, function, {name!r})"
                )
            return values[comparisons.comparison, comparisons.slot]
        if all(side in columns for side in sides):
            if comparisons.width > 2:
                raise InvalidInputError(f"columns {sides} speak of two responses; use with_attribute for more")
            ranks = comparisons.grid(comparisons.ranks)
            # of ties and unjudged pairs neither is chosen: the first takes the first column
            lost = torch.stack([ranks[:, 0] > ranks[:, 1], ~(ranks[:, 0] > ranks[:, 1])], dim=1)
            first, second = (columns[side].unsqueeze(1) for side in sides)
            return torch.where(lost, second, first)[comparisons.comparison, comparisons.slot]
        if isinstance(self.attribute, str):
            raise MissingColumnError(
                f"the data have no numeric column {name!r}{nearest(name, columns)}; add it by "
                f"with_attribute(data, function, {name!r})"
            )
        return None
