"""Fits `VariationalPreferences` to sets of labelled pairs, each of one person (arXiv 2408.10075).

The shared fit of `PreferenceModel` takes comparisons one by one; here a set is the unit, as in the paper's control
experiments, which a decoder of pairs and an encoder of whole sets need.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.reward_models.latent_users import VariationalPreferences
from polyreward.reward_models.preference_sets import check_sets


def fit_sets(
    model: VariationalPreferences,
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    epochs: int = 100,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    validation: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[dict[str, float]]:
    """Fit in place with Adam; return the mean figures of each epoch.

    Parameters
    ----------
    first, second : float (S, N, d)
    labels : (S, N)
    mask : bool (S, N), optional
    epochs, batch_size : int
        500 epochs of batches of 256 sets in the paper. The schedule of beta advances once an epoch.
    learning_rate : float
    validation : float in [0, 1)
        Share of the sets on which the loss, with z at the mean and beta 1, chooses the weights that are kept. 0 keeps
        the last.
    generator : torch.Generator, optional
        Of the order of the sets and the draws of z.

    Raises
    ------
    InvalidInputError
        Sets that do not fit; too few for the validation; a loss that is not finite.
    """
    mask = check_sets(first, second, labels, mask)
    if epochs < 1 or batch_size < 1 or not learning_rate >= 0 or not 0 <= validation < 1:
        raise InvalidInputError(
            f"fit_sets needs epochs and batch_size from 1, learning_rate from 0 and validation in [0, 1), got "
            f"{epochs}, {batch_size}, {learning_rate}, {validation}"
        )
    count = len(first)
    held = math.ceil(validation * count)
    if count - held < 1:
        raise InvalidInputError(f"{count} sets leave none to fit beside {held} for validation")
    order = torch.randperm(count, generator=generator).to(first.device)
    kept, rest = order[:held], order[held:]
    model(*(part[rest[:1]] for part in (first, second, labels, mask)))  # a concat encoder takes its size
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    history: list[dict[str, float]] = []
    best: tuple[float, dict[str, Tensor]] | None = None
    for epoch in range(epochs):
        model.train()
        shuffled = rest[torch.randperm(len(rest), generator=generator).to(rest.device)]
        total: dict[str, float] = {}
        for some in shuffled.split(batch_size):
            sets = [part[some] for part in (first, second, labels, mask)]
            loss, metrics = model(*sets, generator=generator)
            if not bool(torch.isfinite(loss)):
                raise InvalidInputError("the loss is not finite: NaN in the items, or a learning rate that is too high")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            share = len(some) / len(rest)
            for name, value in (("loss", loss.detach()), *metrics.items()):
                total[name] = total.get(name, 0.0) + share * float(value)
        model.eval()
        record = {"epoch": epoch + 1.0, **total}
        if held:
            record["validation_loss"] = _validate(model, [part[kept] for part in (first, second, labels, mask)])
            if best is None or record["validation_loss"] < best[0]:
                weights = {name: value.detach().clone() for name, value in model.named_parameters()}
                best = (record["validation_loss"], weights)
        history.append(record)
        model.objective.step()
    if best is not None:
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(best[1][name])
    model.eval()
    return history


@torch.no_grad()
def _validate(model: VariationalPreferences, sets: list[Tensor]) -> float:
    _, metrics = model(*sets)
    return float((metrics["nll"] + metrics["kl"]) / len(sets[0]))
