"""Likelihood rewards in the trainer: the policy scores its own references, and the direct term joins the loss.

A reward with a method ``bind(model, tokenizer, template_options)`` gets the trainer's policy and tokenizer at
construction, at any depth of a composition. Where a `ReferenceLikelihood` stands in the trainer's list by itself and is
differentiable, its samples carry the token ids of prompt, chain and reference through shuffling, splitting, buffering
and checkpoints, and each loss gets

    - direct_weight * reward_weight * (1/B) sum_i w_i R_i(theta)

over the B samples of the micro-batch, with R_i from a forward pass with gradient and w_i = 1 (0 for chains that are cut
off or clipped; the softmax weight of the group, times G, for "jepo").

Paper: Likelihood-Based Reward Designs for General LLM Reasoning (arXiv 2602.03979).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError
from polyreward.likelihood import likelihood_values
from polyreward.rewards.composition import Composed, _first
from polyreward.rewards.contract import as_list, name_of
from polyreward.rewards.executor import ExecutedReward
from polyreward.rewards.reference_likelihood import LikelihoodBatch, ReferenceLikelihood
from polyreward.rewards.reference_logprobs import answer_logprobs, padded


class _Named:
    """A reward under another name."""

    def __init__(self, reward: Any, name: str) -> None:
        self.reward, self.__name__ = reward, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.reward(*args, **kwargs)


class DirectTerm:
    """A likelihood reward as the trainer calls it, which remembers the last batch for the loss.

    Parameters
    ----------
    reward : ReferenceLikelihood bound to the policy
    name : name in logs
    weight : the trainer's weight of this reward
    """

    def __init__(self, reward: ReferenceLikelihood, name: str, weight: float) -> None:
        self.reward, self.__name__, self.weight = reward, name, weight
        self.batch: LikelihoodBatch | None = None

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        """Values of the reward."""
        self.batch = self.reward.explain(prompts, completions, **columns)
        return as_list(self.batch.values)

    def tensors(self, size: int, device: Any) -> dict[str, Tensor]:
        """What each of the last batch's `size` samples carries: ids and mask (B, T), answer length and weight (B,)."""
        batch, self.batch = self.batch, None
        ids: list[list[int]] = [[] for _ in range(size)]
        lengths, weights = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.float32)
        if batch is not None and batch.rows:
            for row, own in zip(batch.rows, batch.encoded.ids, strict=True):
                ids[row] = own
            lengths[batch.rows] = torch.tensor(batch.encoded.lengths)
            weights[batch.rows] = torch.from_numpy(batch.weights).float()
        tokens, mask = padded(ids, device)
        return {
            self._key("ids"): tokens,
            self._key("mask"): mask,
            self._key("lengths"): lengths.to(device),
            self._key("weights"): weights.to(device),
        }

    def value(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Mean of ``w_i R_i(theta)`` over the samples of a micro-batch, a scalar with gradient."""
        weights = inputs[self._key("weights")]
        rows = weights.nonzero().flatten()
        if not len(rows):
            return weights.new_zeros(())
        ids, mask, lengths = (inputs[self._key(part)][rows] for part in ("ids", "mask", "lengths"))
        first = ids.shape[1] - int(mask.sum(dim=1).max())  # padding that only longer samples need
        logp = answer_logprobs(model, ids[:, first:], mask[:, first:], lengths)
        counted = torch.arange(logp.shape[1], device=logp.device) < lengths.view(-1, 1)
        kind = "log-prob" if self.reward.kind == "jepo" else self.reward.kind
        # The reward's own floor would take the gradient from the references that need it most.
        values = likelihood_values(logp.unsqueeze(1), counted.unsqueeze(1), kind).flatten()
        return (weights[rows] * values).sum() / len(weights)

    @property
    def factor(self) -> float:
        """What the mean counts in the loss."""
        return self.weight * self.reward.direct_weight

    def _key(self, part: str) -> str:
        return f"{self.__name__}/reference_{part}"


def bind_rewards(
    rewards: Sequence[Any],
    names: Sequence[str],
    weights: Mapping[str, float],
    model: Any,
    tokenizer: Any,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[list[Any], list[DirectTerm]]:
    """The trainer's rewards with the policy bound to those that want it, and the direct terms among them.

    Raises
    ------
    InvalidInputError
        A reward that needs the policy inside an executor, whose processes do not have it; one with a direct term inside
        a composition, whose gradient would be another one.
    """
    bound: list[Any] = []
    terms: list[DirectTerm] = []
    for reward, name in zip(rewards, names, strict=True):
        own = reward if isinstance(reward, nn.Module) else _bound(reward, model, tokenizer, template_options, name)
        inner = own
        while not isinstance(inner, ReferenceLikelihood) and callable(getattr(inner, "reward", None)):
            inner = inner.reward
        if isinstance(inner, ReferenceLikelihood) and inner.model is model and inner.differentiable:
            own = DirectTerm(inner, name, weights[name])
            terms.append(own)
        bound.append(own)
    return bound, terms


def wants_policy(reward: Any) -> bool:
    """Whether a reward, or one that it is made of, takes the trainer's policy."""
    if isinstance(reward, nn.Module):
        return False
    if isinstance(reward, ReferenceLikelihood):
        return reward.model is None
    members = [*getattr(reward, "members", ()), *filter(callable, [getattr(reward, "reward", None)])]
    return callable(getattr(reward, "bind", None)) or any(map(wants_policy, members))


def _bound(reward: Any, model: Any, tokenizer: Any, options: Mapping[str, Any] | None, name: str) -> Any:
    if not wants_policy(reward):
        return reward
    if isinstance(reward, ExecutedReward):
        raise InvalidInputError(
            f"the reward {name!r} is scored by the policy and cannot run in an executor, whose processes do not have it"
        )
    if callable(getattr(reward, "bind", None)):
        return reward.bind(model, tokenizer, options)
    if isinstance(reward, Composed):
        if reward.combine is _first:  # a name around the reward
            return _Named(_bound(reward.members[0], model, tokenizer, options, name), reward.name)
        for member in reward.members:
            if isinstance(member, ReferenceLikelihood) and member.model is None and member.differentiable:
                raise InvalidInputError(
                    f"the reward {name!r} composes {name_of(member)!r}, whose direct term belongs to the loss by "
                    "itself: give the rewards to the trainer one by one with reward_weights, or set direct_term=False"
                )
        return replace(
            reward, members=tuple(_bound(member, model, tokenizer, options, name) for member in reward.members)
        )
    outer = copy.copy(reward)  # a name around the reward
    outer.reward = _bound(reward.reward, model, tokenizer, options, name)
    return outer
