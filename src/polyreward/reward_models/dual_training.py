"""The second stage of think-then-score: thoughts by policy gradient and scores by Bradley-Terry, on the same rollouts.

Of each pair both members get G thoughts, written by the model. Each thought earns a reward, compared within the
thoughts of its sample; the i-th thoughts of both members make a pair of scores. One loss carries both
(`polyreward.reward_models.dual_objective`). Every step draws from generators of its own, so a run that was interrupted
goes on from its checkpoint to the same result.

Paper: Think, then Score: Decoupled Reasoning and Scoring for Video Reward Modeling (DeScore, arXiv 2605.05922).
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError, UnknownNameError, nearest
from polyreward.reward_models.checkpoints import read_checkpoint
from polyreward.reward_models.dual_objective import Ties, dual_objective_loss, group_advantages
from polyreward.reward_models.fit_options import FitProgress
from polyreward.reward_models.query_token import QueryTokenRewardModel
from polyreward.storage import write_atomically

ThoughtReward = Callable[[np.ndarray, Tensor], Sequence[float | None]]
"""Rewards (N,) of thoughts (N, T) about the samples `rows` (N,); None does not apply."""
_BOOKKEEPING = ("checkpoint", "checkpoint_steps", "progress")


@dataclass(frozen=True)
class DualOptions:
    """How the second stage runs; defaults of the paper where it has them.

    Parameters
    ----------
    steps : int
        Batches of rollouts.
    pairs : int
        Pairs of a batch.
    rollouts : int >= 2
        Thoughts a sample, G.
    minibatch : int, optional
        Pairs of an optimiser step; default all of the batch.
    learning_rate, weight_decay : float
        Of AdamW.
    bt_weight, kl_coef, clip_low, clip_high, dual_clip, ties, margin, theta : as of `dual_objective_loss`
    clip : float, optional
        Largest norm of the gradient, of the head and of all else apart.
    temperature : float > 0
    max_tokens : int, optional
        Of a thought; default the model's.
    seed : int
    checkpoint : file, optional
        Written every `checkpoint_steps` steps; a run that finds it goes on from there, one that ends removes it.
    checkpoint_steps : int
    progress : function of `FitProgress`, optional
    """

    steps: int = 100
    pairs: int = 16
    rollouts: int = 8
    minibatch: int | None = None
    learning_rate: float = 1e-6
    weight_decay: float = 1e-2
    bt_weight: float = 5e-3
    kl_coef: float = 1e-5
    clip_low: float = 0.2
    clip_high: float = 0.3
    dual_clip: float | None = 3.0
    ties: Ties = "dropped"
    margin: float = 0.0
    theta: float | None = None
    clip: float | None = 1.0
    temperature: float = 1.0
    max_tokens: int | None = None
    seed: int = 0
    checkpoint: str | Path | None = None
    checkpoint_steps: int = 20
    progress: Callable[[FitProgress], None] | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "pairs", "minibatch", "checkpoint_steps"):
            value = getattr(self, name)
            if not (value is None and name == "minibatch") and (type(value) is not int or value < 1):
                raise InvalidInputError(f"{name} must be a whole number of at least 1, got {value!r}")
        if type(self.rollouts) is not int or self.rollouts < 2:
            raise InvalidInputError(f"rollouts must be at least 2, since they are compared, got {self.rollouts!r}")
        if not self.temperature > 0:
            raise InvalidInputError(f"temperature must be above 0 for rollouts to differ, got {self.temperature}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> DualOptions:
        """From keyword arguments; `UnknownNameError` offers the nearest known one."""
        known = [item.name for item in fields(cls)]
        for name in options:
            if name not in known:
                raise UnknownNameError(f"unknown option of the second stage {name!r}{nearest(name, known)}")
        return cls(**options)


def train_dual(
    network: QueryTokenRewardModel, contexts: Tensor, labels: Tensor, reward: ThoughtReward, options: DualOptions
) -> list[dict[str, float]]:
    """Train in place; return the figures of every step.

    Parameters
    ----------
    network : QueryTokenRewardModel
    contexts : int64 (2 P, L)
        Samples: those of pair p are the rows 2p and 2p + 1.
    labels : int64 (P,)
        0 or 1 is the preferred one, -1 a tie, -2 not judged.
    reward : see `ThoughtReward`

    Returns
    -------
    list of dict
        ``reward``, ``loss``, ``policy``, ``kl``, ``bt``, ``accuracy``, ``clip_fraction``, ``length`` of the thoughts,
        ``undecided`` (share of the samples whose thoughts all earned the same).

    Raises
    ------
    InvalidInputError
        Contexts and labels that do not fit, a reward of another length or not finite, a checkpoint of another run.
    """
    if contexts.ndim != 2 or len(contexts) != 2 * len(labels) or not len(labels):
        raise InvalidInputError(
            f"expected contexts (2 P, L) and labels (P,) of at least one pair, got {tuple(contexts.shape)} and "
            f"{tuple(labels.shape)}"
        )
    run = _Run(network, contexts, labels, reward, options)
    run.resume()
    for step in range(len(run.history), options.steps):
        run.step(step)
    if options.checkpoint is not None:
        Path(options.checkpoint).unlink(missing_ok=True)
    return run.history


class _Run:
    def __init__(
        self,
        network: QueryTokenRewardModel,
        contexts: Tensor,
        labels: Tensor,
        reward: ThoughtReward,
        options: DualOptions,
    ) -> None:
        # without dropout: a thought must be as likely when it is learned from as it was when it was written
        self.network, self.options, self.reward = network.eval(), options, reward
        self.device = network.head.weight.device
        self.contexts, self.labels = contexts.to(self.device), labels.to(self.device)
        self.reference = copy.deepcopy(network).requires_grad_(False) if options.kl_coef else None
        self.learns = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.learns.values(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.history: list[dict[str, float]] = []
        self.key, self.start = self._key(), time.perf_counter()

    def step(self, step: int) -> None:
        """One batch of rollouts, and the optimiser steps on it."""
        options, network = self.options, self.network
        generator = torch.Generator(self.device).manual_seed(1_000_003 * options.seed + step)
        pairs = torch.from_numpy(self._pairs(step)).to(self.device)
        rows = (2 * pairs.unsqueeze(1) + torch.tensor([0, 1], device=self.device)).flatten()
        rows = rows.repeat_interleave(options.rollouts)
        contexts = self.contexts[rows]
        cots = network.generate_cot(contexts, options.temperature, options.max_tokens, generator)
        rewards = self._rewards(rows, cots).view(-1, options.rollouts)
        advantages = group_advantages(rewards).flatten().float()
        each = 2 * options.rollouts * (options.minibatch or len(pairs))
        parts = torch.arange(len(rows), device=self.device).split(each)
        with torch.no_grad():
            old = [network.log_probabilities(contexts[p], cots[p], options.temperature)[0] for p in parts]
            known = [
                None
                if self.reference is None
                else self.reference.log_probabilities(contexts[p], cots[p], options.temperature)[0]
                for p in parts
            ]
        seen: dict[str, float] = {}
        for part, before, reference in zip(parts, old, known, strict=True):
            terms = self._loss(contexts[part], cots[part], before, reference, advantages[part], rows[part])
            self.optimizer.zero_grad()
            terms["loss"].backward()
            self._clip()
            self.optimizer.step()
            for name, value in terms.items():
                seen[name] = seen.get(name, 0.0) + float(value.detach()) * len(part) / len(rows)
        applies = rewards[~torch.isnan(rewards)]
        seen |= {
            "reward": float(applies.mean()) if len(applies) else 0.0,
            "length": float((cots >= 0).sum(dim=1).double().mean()),
            "undecided": float((advantages.view(-1, options.rollouts) == 0).all(dim=1).double().mean()),
        }
        self.history.append(seen)
        done = step + 1
        if options.checkpoint is not None and done % options.checkpoint_steps == 0 and done < options.steps:
            self._save()
        if options.progress is not None:
            seconds = time.perf_counter() - self.start
            options.progress(FitProgress(1, 1, done, options.steps, seen["loss"], None, seconds))

    def _loss(
        self, contexts: Tensor, cots: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, rows: Tensor
    ) -> dict[str, Tensor]:
        options, network = self.options, self.network
        logp, mask = network.log_probabilities(contexts, cots, options.temperature)
        scores = network.score(contexts, cots)
        # (pairs, member, rollout) -> rollout i of the one beside rollout i of the other
        scores = scores.view(-1, 2, options.rollouts).transpose(1, 2).reshape(-1, 2)
        labels = self.labels[rows.view(-1, 2, options.rollouts)[:, 0] // 2].flatten()
        return dual_objective_loss(
            logp,
            old,
            advantages,
            mask,
            reference,
            scores,
            labels,
            options.bt_weight,
            options.kl_coef,
            clip_low=options.clip_low,
            clip_high=options.clip_high,
            dual_clip=options.dual_clip,
            ties=options.ties,
            margin=options.margin,
            theta=options.theta,
        )

    def _pairs(self, step: int) -> np.ndarray:
        """The pairs of a step: each once before any comes again."""
        count, size = len(self.labels), self.options.pairs
        first, last = step * size // count, ((step + 1) * size - 1) // count
        rounds = [np.random.default_rng([self.options.seed, r]).permutation(count) for r in range(first, last + 1)]
        return np.concatenate(rounds)[step * size - first * count :][:size]

    def _rewards(self, rows: Tensor, cots: Tensor) -> Tensor:
        found = list(self.reward(rows.cpu().numpy(), cots))
        if len(found) != len(rows):
            raise InvalidInputError(f"the reward of thoughts returned {len(found)} values for {len(rows)} thoughts")
        return torch.tensor(
            [np.nan if value is None else float(value) for value in found], dtype=torch.float64, device=self.device
        )

    def _clip(self) -> None:
        if self.options.clip is not None:
            head = set(self.network.head.parameters())
            for group in ([p for p in self.learns.values() if p not in head], list(head)):
                nn.utils.clip_grad_norm_(group, self.options.clip)

    def _key(self) -> str:
        settings = {f.name: getattr(self.options, f.name) for f in fields(self.options) if f.name not in _BOOKKEEPING}
        shapes = {name: tuple(p.shape) for name, p in self.learns.items()}
        digest = hashlib.sha256(repr((settings, shapes)).encode())
        # head and query stand for the weights that the first stage left
        for tensor in (self.contexts, self.labels, self.network.head.weight, self.network.query):
            whole = tensor.detach().cpu()
            digest.update((whole.float() if whole.is_floating_point() else whole).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _save(self) -> None:
        state = {
            "key": self.key,
            "weights": {name: p.detach() for name, p in self.learns.items()},
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        }
        assert self.options.checkpoint is not None
        write_atomically(self.options.checkpoint, lambda path: torch.save(state, path))

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        state = read_checkpoint(
            self.options.checkpoint, self.key, "a run of other data, options or weights", self.device
        )
        if state is None:
            return
        with torch.no_grad():
            for name, parameter in self.learns.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]
