"""Heads: from features to scores, and the protocol by which further heads join the same fit.

A head is a `torch.nn.Module` that takes `Items` and returns scores (R,), or a `Scores` where there is more to say:
scores under several components (R, K) with log-weights of the components, logits of ratings, extra terms of the loss.
A likelihood reads what its head returns.

Beyond ``forward`` a head may have

* ``config``: the arguments that make it again, stored with the model;
* ``uses_prompt``: true where it reads `Items.prompt`; the encoder must then have ``encode_prompts``;
* ``prepare(table, features)``: called once before a fit with all training data (`ComparisonTable`, `FeatureTable`), for
  heads with a vector an annotator or sets of earlier judgements;
* ``parameter_groups()``: optimiser groups, where parts learn at rates of their own;
* ``step(progress)``: called before each optimiser step with the share of the fit that is done, for annealing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from polyreward.errors import InvalidInputError

ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
}


@dataclass(frozen=True)
class Items:
    """Responses as a head sees them.

    Attributes
    ----------
    features : float32 (R, d)
    annotator : int64 (R,)
        Code of who judges; -1 is unknown, and earns the population's score.
    comparison : int64 (R,)
        Which responses belong together.
    prompt : float32 (R, p) or None
        Features of the prompt alone.
    """

    features: Tensor
    annotator: Tensor
    comparison: Tensor
    prompt: Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """What a head says.

    Attributes
    ----------
    values : float (R,), or (R, K) for K components or ratings
    log_weights : float (R, K) or None
        Log-probabilities of the components.
    terms : mapping of name to a scalar that is added to the loss
    """

    values: Tensor
    log_weights: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Head(Protocol):
    """A module from `Items` to scores."""

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that make the head again."""
        ...

    def __call__(self, items: Items) -> Tensor | Scores:
        """Scores (R,), or `Scores`."""
        ...


class LinearHead(nn.Module):
    """``w . features``; with one output zero at the start, so that a fit begins from no opinion.

    Parameters
    ----------
    width : int
        d.
    bias : bool
        A constant says nothing about preferences; use it for ratings.
    outputs : int
        Numbers a response, for a likelihood that reads several.
    """

    def __init__(self, width: int, bias: bool = False, outputs: int = 1) -> None:
        super().__init__()
        _require_outputs(outputs)
        self.config: dict[str, Any] = {"width": width, "bias": bias, "outputs": outputs}
        self.linear = nn.Linear(width, outputs, bias=bias)
        if outputs == 1:  # several outputs that started alike would stay alike in a mixture
            nn.init.zeros_(self.linear.weight)
            if bias:
                nn.init.zeros_(self.linear.bias)

    def forward(self, items: Items) -> Tensor:
        """Scores (R,), or (R, outputs)."""
        scores: Tensor = self.linear(items.features)
        return scores.squeeze(-1) if self.config["outputs"] == 1 else scores


class TwoLayerHead(nn.Module):
    """Linear layers with an activation between them, two by default.

    Parameters
    ----------
    width : int
        d.
    hidden : int, optional
        Width of the hidden layers, default d.
    layers : int
        Linear layers in all; 1 is a linear head with a random start.
    activation : "silu", "relu", "tanh" or "gelu"
    dropout : float
        Before the last layer.
    outputs : int
        Numbers a response, for a likelihood that reads several.
    """

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        layers: int = 2,
        activation: str = "silu",
        dropout: float = 0.0,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        _require_outputs(outputs)
        if activation not in ACTIVATIONS:
            raise InvalidInputError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if layers < 1:
            raise InvalidInputError(f"layers must be at least 1, got {layers}")
        self.config: dict[str, Any] = {
            "width": width,
            "hidden": hidden,
            "layers": layers,
            "activation": activation,
            "dropout": dropout,
            "outputs": outputs,
        }
        inner = hidden or width
        parts: list[nn.Module] = []
        for layer in range(layers - 1):
            parts += [nn.Linear(width if layer == 0 else inner, inner), ACTIVATIONS[activation]()]
        if dropout:
            parts.append(nn.Dropout(dropout))
        self.network = nn.Sequential(*parts, nn.Linear(width if layers == 1 else inner, outputs))

    def forward(self, items: Items) -> Tensor:
        """Scores (R,), or (R, outputs)."""
        scores: Tensor = self.network(items.features)
        return scores.squeeze(-1) if self.config["outputs"] == 1 else scores


def run_head(head: nn.Module, items: Items) -> Scores:
    """What a head says, always as `Scores`; `InvalidInputError` for a wrong number of rows."""
    found = head(items)
    scores = found if isinstance(found, Scores) else Scores(found)
    if scores.values.shape[:1] != items.features.shape[:1]:
        raise InvalidInputError(
            f"{type(head).__name__} returned shape {tuple(scores.values.shape)} for {len(items.features)} responses"
        )
    return scores


def _require_outputs(outputs: int) -> None:
    if outputs < 1:
        raise InvalidInputError(f"outputs must be at least 1, got {outputs}")
