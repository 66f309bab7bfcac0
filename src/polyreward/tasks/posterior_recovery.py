"""Posterior recovery: a policy family that holds the reward-tilted posterior, over sequences that can all be listed.

Each prompt has random features of every sequence. Prior, reward and policy are linear in them, so with temperature beta
the posterior ``p(y|x) exp(r / beta)`` has the parameters ``theta0 + w / beta`` exactly; noise on the reward of each
sequence takes it out of the family. Divergences are sums over all sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError


@dataclass(frozen=True)
class PosteriorTask:
    """The task.

    Parameters
    ----------
    prompts : number of prompts
    length, symbols : tokens of a sequence and symbols of a token; ``symbols ** length`` sequences
    features : dimension of the features
    scale : deviation of the reward over sequences
    noise : deviation of what is added to the reward of each sequence
    """

    prompts: int = 40
    length: int = 3
    symbols: int = 8
    features: int = 24
    scale: float = 2.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if min(self.prompts, self.length, self.symbols, self.features) < 1 or self.scale < 0 or self.noise < 0:
            raise InvalidInputError(f"a posterior task needs sizes of at least 1 and scale, noise >= 0, got {self}")

    def draw(self, seed: int, device: str = "cpu") -> PosteriorProblem:
        """One problem, the same for the same seed."""
        rng = np.random.default_rng([seed, 27])
        shape = (self.prompts, self.symbols**self.length, self.features)
        features = rng.normal(size=shape)
        prior, reward = rng.normal(size=(2, self.features)) / np.sqrt(self.features)
        noise = self.noise * rng.normal(size=shape[:2])
        parts = (features, prior, self.scale * reward, noise)
        return PosteriorProblem(*(torch.tensor(part, dtype=torch.float32, device=device) for part in parts))


@dataclass(frozen=True)
class PosteriorProblem:
    """Features (P, S, F), parameters of prior and reward (F,), noise of the reward (P, S)."""

    features: Tensor
    prior: Tensor
    direction: Tensor
    noise: Tensor

    @property
    def reward(self) -> Tensor:
        """Reward of every sequence, (P, S)."""
        return self.features @ self.direction + self.noise

    def logp(self, parameters: Tensor) -> Tensor:
        """Log-probability of every sequence, (P, S)."""
        return (self.features @ parameters).log_softmax(dim=1)

    def posterior(self, beta: float = 1.0) -> Tensor:
        """Log-probability of every sequence under the posterior, (P, S)."""
        return (self.logp(self.prior) + self.reward / beta).log_softmax(dim=1)

    def sample(self, number: int, rng: np.random.Generator) -> Tensor:
        """Sequences drawn from the prior, int64 (P, number)."""
        chances = self.logp(self.prior).double().exp().cpu().numpy().cumsum(axis=1)
        draws = rng.random((len(chances), number)) * chances[:, -1:]
        found = np.stack([np.searchsorted(row, own, side="right") for row, own in zip(chances, draws, strict=True)])
        return torch.from_numpy(found.clip(max=chances.shape[1] - 1)).to(self.prior.device)

    def divergence(self, parameters: Tensor, beta: float = 1.0) -> float:
        """Mean over prompts of KL(posterior || policy), exact."""
        with torch.no_grad():
            target, policy = self.posterior(beta).double(), self.logp(parameters).double()
            # Renormalised: in float32 the probabilities sum to 1 only nearly, and the divergence may fall below 0.
            target, policy = target.log_softmax(dim=1), policy.log_softmax(dim=1)
            return float((target.exp() * (target - policy)).sum(dim=1).mean())

    def value(self, parameters: Tensor) -> float:
        """Mean over prompts of the expected reward, exact."""
        with torch.no_grad():
            return float((self.logp(parameters).double().exp() * self.reward.double()).sum(dim=1).mean())
