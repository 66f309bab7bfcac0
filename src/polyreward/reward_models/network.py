"""What a fit optimises: the parts that learn as one module, and where its features come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError
from polyreward.preferences import Column
from polyreward.reward_models.comparisons import Comparisons, ComparisonTable
from polyreward.reward_models.encoders import FeatureTable
from polyreward.reward_models.heads import Items, Scores, run_head


@dataclass
class Source:
    """Where the features of a data set come from: a table, or an encoder that learns and reads the texts."""

    table: ComparisonTable
    features: FeatureTable | None = None
    prompt_features: np.ndarray | None = None
    texts: tuple[Column, Column] | None = None
    owner: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.owner = self.table.data.owner

    def __call__(self, index: np.ndarray, network: Network, device: Any) -> tuple[Items, Comparisons]:
        """Items and comparisons of a batch."""
        comparisons, rows = self.table.batch(index, device), self.table.rows(index)
        if self.features is not None:
            features = self.features.take(rows, device)
        else:
            assert self.texts is not None
            assert network.encoder is not None
            prompts, responses = self.texts
            features = network.encoder(
                [prompts[i] for i in self.owner[rows]], [responses[i] for i in rows], comparisons.comparison
            )
        prompt = None
        if self.prompt_features is not None:
            prompt = torch.from_numpy(self.prompt_features[self.owner[rows]]).to(device)
        annotator = comparisons.annotator[comparisons.comparison]
        return Items(features, annotator, comparisons.comparison, prompt), comparisons


class Network(nn.Module):
    """Everything that learns, and the loss of a batch."""

    def __init__(self, head: nn.Module, likelihood: Any, penalties: Sequence[Any], encoder: nn.Module | None) -> None:
        super().__init__()
        self.head, self.encoder = head, encoder
        self.likelihood = likelihood
        self.penalties = list(penalties)
        self.learned = nn.ModuleList([part for part in (likelihood, *penalties) if isinstance(part, nn.Module)])

    def forward(self, source: Source, index: np.ndarray, device: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and figures of the comparisons at `index`."""
        items, comparisons = source(index, self, device)
        scores: Scores = run_head(self.head, items)
        loss, metrics = self.likelihood.loss(scores, comparisons)
        found = dict(metrics)
        # a penalty with a network of its own may take turns with the model, whose weights then rest
        rests = any(getattr(penalty, "holds_model", False) for penalty in self.penalties)
        loss = loss.detach() if rests else loss
        for name, term in scores.terms.items():
            loss, found[name] = loss + (term.detach() if rests else term), term.detach()
        for penalty in self.penalties:
            loss = loss + penalty(self.likelihood.score(scores), comparisons)
        if not bool(torch.isfinite(loss)):
            _explain(items, comparisons, source)
        return loss, found


def learned_state(network: Network) -> dict[str, Tensor]:
    """Weights and buffers that a fit changes: those of the head and what learns beside it, and of the encoder."""
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    return {name: value for name, value in network.state_dict().items() if name not in frozen}


def restore(network: Network, state: Mapping[str, Tensor]) -> None:
    """Put weights of `learned_state` back."""
    network.load_state_dict({**network.state_dict(), **state})


def _explain(items: Items, comparisons: Comparisons, source: Source) -> None:
    bad = ~torch.isfinite(items.features).all(dim=1)
    if bool(bad.any()):
        response = int(bad.int().argmax())
        comparison = int(comparisons.index[comparisons.comparison[response]])
        where = source.table.data.where(comparison)
        raise InvalidInputError(
            f"{where}: the features of response {int(comparisons.slot[response])} are NaN "
            f"or infinite (row {int(comparisons.row[response])} of the features)"
        )
    raise InvalidInputError("the loss is not finite although the features are: lower the learning rate")
