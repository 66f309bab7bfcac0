"""Figures of one rollout batch that tell which rewards, tasks and strata its update listens to.

The advantages are regressed on the group-centred rewards, ``A ~ sum_k b_k c_k``; the share of reward k is
``b_k cov(c_k, A) / var(A)`` (Pratt's measure). The shares add up to the coefficient of determination: 1 where the
advantages are a linear function of the rewards, less where scaling by group or rank bends them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyreward.batch import RewardBatch

MOST_LABELS = 32
"""Tasks or strata beyond this number get no figures of their own."""


def advantage_shares(batch: RewardBatch, advantages: Tensor) -> Tensor:
    """Share of the advantage variance that each reward explains, float64 (K,); 0 where nothing varies."""
    groups, valid = batch.segments("group"), batch.valid
    rewards = batch.rewards.double().nan_to_num(nan=0.0)
    centred = rewards - groups.spread(groups.mean(rewards, valid))
    centred = centred if valid is None else centred * valid
    target = advantages.double() - advantages.double().mean()
    variance = target.square().sum()
    if not bool(variance > 0):
        return centred.new_zeros(centred.shape[1])
    gram, towards = centred.T @ centred, centred.T @ target
    return torch.linalg.pinv(gram, hermitian=True) @ towards * towards / variance


def batch_statistics(batch: RewardBatch, advantages: Tensor) -> dict[str, float]:
    """Figures of a rollout batch by metric name.

    Parameters
    ----------
    batch : RewardBatch on the CPU, with the columns ``task`` and ``stratum`` where there are any
    advantages : float tensor (N,), those the policy trains on

    Returns
    -------
    ``advantage/share/<reward>``; ``advantage/zero_signal``, the share of groups in which every advantage is 0; for each
    task and stratum ``<task|stratum>/<label>/share`` of the samples, ``/reward/<name>`` (mean; NaN where it never
    applies) and ``/advantage_size`` (mean absolute advantage), with ``/zero_signal`` for a task and ``/advantage``
    (mean) for a stratum.
    """
    silent = batch.segments("group").constant(advantages) & (batch.segments("group").sum(advantages.abs()) == 0)
    silent = batch.segments("group").spread(silent.double())
    found = {"advantage/zero_signal": _group_mean(batch, silent)}
    shares = advantage_shares(batch, advantages).tolist()
    found |= {f"advantage/share/{name}": share for name, share in zip(batch.names, shares, strict=True)}
    rewards = batch.rewards.double().nan_to_num(nan=0.0)
    for kind in ("task", "stratum"):
        if kind not in batch.columns:
            continue
        parts = batch.segments(kind)
        present = (parts.sizes > 0).nonzero().flatten().tolist()
        if len(present) > MOST_LABELS:
            continue
        means = parts.mean(rewards, batch.valid)
        if batch.valid is not None:
            means = torch.where(parts.number(batch.valid) > 0, means, torch.nan)
        mean, size, still = (parts.mean(values) for values in (advantages, advantages.abs(), silent))
        for code in present:
            place = f"{kind}/{parts.label(code)}"
            found[f"{place}/share"] = float(parts.sizes[code]) / len(batch)
            found[f"{place}/advantage_size"] = float(size[code])
            if kind == "task":
                found[f"{place}/zero_signal"] = float(still[code])
            else:  # a group has one task, so the mean of a task says nothing
                found[f"{place}/advantage"] = float(mean[code])
            for name, value in zip(batch.names, means[code].tolist(), strict=True):
                found[f"{place}/reward/{name}"] = value
    return found


def _group_mean(batch: RewardBatch, per_sample: Tensor) -> float:
    """Mean over groups of a figure that is constant within each group."""
    groups = batch.segments("group")
    return float(groups.mean(per_sample)[groups.sizes > 0].mean())
