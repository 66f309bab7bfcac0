"""Users with tastes, and a small judge that reads a user's choices and writes a rubric as a chain of six tokens.

The task of the study of personal judges. Users belong to latent clusters of sparse weights over six criteria; in each
of three scenarios a user cares more for one of them. Responses are levels of the criteria from 1 to 10, and a choice is
drawn from Bradley-Terry of three times the weighted gap. The judge reads earlier choices and the scenario, and samples
for every criterion one of five weight levels; the score of a response is the rubric's arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

CRITERIA, CLUSTERS, SCENARIOS, LEVELS = 6, 6, 3, 5
SPARSE, CLOSENESS, FLOOR, SHIFT, STEEPNESS = 0.35, 30.0, 0.15, 0.25, 3.0
WIDTH, HIDDEN = 32, 64


@dataclass(frozen=True)
class Users:
    """Choices of U users.

    Attributes
    ----------
    weights : float32 (U, 3, 6), by scenario, adding up to 1
    scenario : int64 (U, P) of each choice
    responses : float32 (U, P, 2, 6), levels from 1 to 10, the chosen one first
    """

    weights: Tensor
    scenario: Tensor
    responses: Tensor

    @classmethod
    def drawn(cls, rng: np.random.Generator, users: int, pairs: int) -> Users:
        """Users and their noisy choices."""
        clusters = rng.dirichlet(np.full(CRITERIA, SPARSE), size=CLUSTERS)
        own = np.stack([rng.dirichlet(CLOSENESS * clusters[c] + FLOOR) for c in rng.integers(CLUSTERS, size=users)])
        extra = np.stack([rng.permutation(CRITERIA)[:SCENARIOS] for _ in range(users)])
        weights = own[:, None] + SHIFT * np.eye(CRITERIA)[extra]
        weights /= weights.sum(axis=2, keepdims=True)
        scenario = rng.integers(SCENARIOS, size=(users, pairs))
        responses = rng.integers(1, 11, size=(users, pairs, 2, CRITERIA)).astype(np.float32)
        worth = np.einsum("upc,uprc->upr", weights[np.arange(users)[:, None], scenario], responses)
        first = rng.random((users, pairs)) < 1 / (1 + np.exp(-STEEPNESS * (worth[..., 0] - worth[..., 1])))
        responses = np.where(first[..., None, None], responses, responses[:, :, ::-1])
        return cls(
            torch.from_numpy(weights.astype(np.float32)), torch.from_numpy(scenario), torch.from_numpy(responses)
        )

    def select(self, rows: slice) -> Users:
        """Some of the users."""
        return Users(self.weights[rows], self.scenario[rows], self.responses[rows])

    def true_weights(self, user: Tensor, pair: Tensor) -> Tensor:
        """Weights (N, 6) behind some of the choices."""
        return self.weights[user, self.scenario[user, pair]]


@dataclass(frozen=True)
class Batch:
    """N choices to be judged, each with H earlier ones of the same user.

    Attributes
    ----------
    user, pair : int64 (N,)
    scenario : int64 (N,)
    responses : float32 (N, 2, 6), the chosen one first
    history : float32 (N, H, 6), chosen less rejected levels, by 9
    past_scenario : int64 (N, H)
    """

    user: Tensor
    pair: Tensor
    scenario: Tensor
    responses: Tensor
    history: Tensor
    past_scenario: Tensor

    @classmethod
    def of(cls, users: Users, user: Tensor, pair: Tensor, history: int, generator: torch.Generator) -> Batch:
        """With `history` other choices of each user, drawn without the current one, which is left out by its place."""
        pairs = users.responses.shape[1]
        noise = torch.rand(len(user), pairs, generator=generator).scatter(1, pair.unsqueeze(1), 2.0)
        past = noise.argsort(dim=1)[:, :history]
        gap = users.responses[user.unsqueeze(1), past, 0] - users.responses[user.unsqueeze(1), past, 1]
        return cls(
            user,
            pair,
            users.scenario[user, pair],
            users.responses[user, pair],
            gap / 9,
            users.scenario[user.unsqueeze(1), past],
        )

    @property
    def gap(self) -> Tensor:
        """Chosen less rejected levels, (N, 6)."""
        return self.responses[:, 0] - self.responses[:, 1]


class RubricPolicy(nn.Module):
    """The judge: logits (N, 6, 5) of the weight levels of each criterion, from earlier choices and the scenario."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = nn.Sequential(
            nn.Linear(CRITERIA + 2 * SCENARIOS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH), nn.ReLU()
        )
        self.out = nn.Sequential(nn.Linear(WIDTH + SCENARIOS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CRITERIA * LEVELS))

    def forward(self, batch: Batch) -> Tensor:
        """Log-probabilities (N, 6, 5)."""
        now = torch.eye(SCENARIOS)[batch.scenario]
        then = torch.eye(SCENARIOS)[batch.past_scenario]
        both = now.unsqueeze(1).expand(-1, then.shape[1], -1)
        read = self.choice(torch.cat([batch.history, then, both], dim=-1)).mean(dim=1)
        logits: Tensor = self.out(torch.cat([read, now], dim=-1)).view(-1, CRITERIA, LEVELS)
        return logits.log_softmax(dim=-1)


def sampled(chances: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Chains of weight levels (N, count, 6) from log-probabilities (N, 6, 5)."""
    flat = chances.detach().exp().reshape(-1, LEVELS)
    drawn = torch.multinomial(flat, count, replacement=True, generator=generator)
    return drawn.view(len(chances), CRITERIA, count).transpose(1, 2)


def chain_logp(chances: Tensor, levels: Tensor) -> Tensor:
    """Log-probabilities (N, K, 6) of the tokens of chains (N, K, 6)."""
    return chances.unsqueeze(1).expand(-1, levels.shape[1], -1, -1).gather(3, levels.unsqueeze(3)).squeeze(3)


def rubric_weights(levels: Tensor) -> Tensor:
    """Weights (..., 6) of levels 0 to 4, adding up to 1; equal ones where every level is 0."""
    total = levels.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, levels / total.clamp(min=1), 1 / CRITERIA)


def rubric_scores(levels: Tensor, responses: Tensor) -> Tensor:
    """Scores (N, K, b) of responses (N, b, 6) by chains (N, K, 6)."""
    return rubric_weights(levels) @ responses.transpose(1, 2)


def quantised(weights: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """A teacher's chain (N, 6): the true weights with noise, relative to the largest, in levels 0 to 4."""
    noisy = (weights + noise * torch.randn(weights.shape, generator=generator)).clamp(min=0)
    return (noisy / noisy.amax(dim=-1, keepdim=True).clamp(min=1e-6) * (LEVELS - 1)).round().long()
