"""The planted subsequence: emit two hidden tokens in direct succession, the sooner the better.

Each symbol has a gold token, ``gold[symbol]``, which no learner knows. A prompt is a pair of symbols (x1, x2); a trace
of H tokens solves it at the first step where ``gold[x1]`` is followed at once by ``gold[x2]``, and earns 1 from that
step to the end: ``r = H - t`` for completion at step t, counted from 0. A base policy writes in styles: a trace of
style gamma emits the token that it needs next with probability gamma at every step, and any token alike otherwise.
Styles of different gamma make the base heterogeneous; one gamma of the same mean makes it homogeneous.

A policy is a table over what is needed next: ``policy[progress, symbol, token]``, progress 0 before the first gold
token and 1 right after it. What such a policy is worth is exact:

    v1(h) = p2 h + q v1(h - 1) + (1 - p2 - q) v0(h - 1),    v0(h) = p1 v1(h - 1) + (1 - p1) v0(h - 1)

with h steps left, p1 and p2 the probabilities of the gold tokens, and q that of the first one again.

After the didactic task of Scaling Test-Time Compute Without Verification or RL is Suboptimal, arXiv 2502.12118.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyreward.errors import InvalidInputError

HETEROGENEOUS = (0.02, 0.05, 0.3, 0.6)
HOMOGENEOUS = (0.2425,)


@dataclass(frozen=True, eq=False)
class Traces:
    """N traces of H tokens.

    Attributes
    ----------
    prompts : int (N, 2)
    styles : int (N,), index of the policy that wrote the trace
    tokens : int (N, H)
    progress : int (N, H)
        What stood before each token: 1 where the token before it was the first gold token.
    solved : bool (N, H)
        Whether the trace is solved after each token; once true, true to the end.
    """

    prompts: np.ndarray
    styles: np.ndarray
    tokens: np.ndarray
    progress: np.ndarray
    solved: np.ndarray

    @property
    def needed(self) -> np.ndarray:
        """Symbol whose gold token comes next, int (N, H)."""
        return np.take_along_axis(self.prompts, self.progress, axis=1)

    @property
    def returns(self) -> np.ndarray:
        """Steps from the solving one to the end, float64 (N,); 0 where the trace is never solved."""
        return self.solved.sum(axis=1).astype(np.float64)

    @property
    def until_solved(self) -> np.ndarray:
        """Tokens of solved traces up to the solving one, bool (N, H)."""
        before = np.concatenate([np.zeros((len(self.solved), 1), dtype=bool), self.solved[:, :-1]], axis=1)
        return ~before & self.solved[:, -1:]

    def pairs(self, steps: np.ndarray) -> np.ndarray:
        """Tokens at the step before and at the given step >= 1 of each trace, int (N, 2)."""
        rows = np.arange(len(self.tokens))
        return np.stack([self.tokens[rows, steps - 1], self.tokens[rows, steps]], axis=1)


@dataclass(frozen=True, eq=False)
class PlantedSubsequence:
    """The task with its hidden map.

    Parameters
    ----------
    gold : int (symbols,), values in [0, tokens)
        Gold token of each symbol; two symbols may share one.
    tokens : int >= 2

    Raises
    ------
    InvalidInputError
        A gold token outside the vocabulary, or no symbol.
    """

    gold: np.ndarray
    tokens: int = 20

    def __post_init__(self) -> None:
        gold = np.asarray(self.gold)
        if gold.ndim != 1 or gold.size == 0 or gold.dtype.kind not in "iu":
            raise InvalidInputError(f"gold must be one whole number a symbol, got {gold.dtype} of shape {gold.shape}")
        if self.tokens < 2 or gold.min() < 0 or gold.max() >= self.tokens:
            raise InvalidInputError(f"gold tokens lie in {gold.min()}..{gold.max()}, expected 0..{self.tokens - 1}")
        object.__setattr__(self, "gold", gold)

    @classmethod
    def draw(cls, rng: np.random.Generator, symbols: int = 20, tokens: int = 20) -> PlantedSubsequence:
        """A task with a random map."""
        return cls(rng.integers(tokens, size=symbols), tokens)

    @property
    def prompts(self) -> np.ndarray:
        """All pairs of symbols, int (symbols^2, 2), in the order of `value`."""
        return np.indices((len(self.gold),) * 2).reshape(2, -1).T

    def base_policy(self, gammas: Sequence[float] | float) -> np.ndarray:
        """Policies of the given styles, float64 (styles, 2, symbols, tokens)."""
        gamma = np.atleast_1d(np.asarray(gammas, dtype=np.float64))[:, None, None, None]
        if not ((gamma >= 0) & (gamma <= 1)).all():
            raise InvalidInputError(f"styles must lie in [0, 1], got {gammas}")
        table = gamma * np.eye(self.tokens)[self.gold] + (1 - gamma) / self.tokens
        return np.broadcast_to(table, (len(gamma), 2, *table.shape[2:])).copy()

    def sample(
        self, policy: np.ndarray, count: int, horizon: int, rng: np.random.Generator, prompts: np.ndarray | None = None
    ) -> Traces:
        """Draw `count` traces.

        Parameters
        ----------
        policy : float (styles, 2, symbols, tokens)
            Each trace keeps one style, drawn alike.
        prompts : int (count, 2), default drawn alike from all pairs

        Raises
        ------
        InvalidInputError
            A policy or prompts of another shape, a horizon below 1.
        """
        policy = self._checked(policy, horizon)
        if policy.ndim != 4:
            raise InvalidInputError(f"policy must have shape (styles, 2, symbols, tokens), got {policy.shape}")
        if prompts is None:
            prompts = rng.integers(len(self.gold), size=(count, 2))
        if prompts.shape != (count, 2):
            raise InvalidInputError(f"prompts have shape {prompts.shape}, expected ({count}, 2)")
        styles = rng.integers(len(policy), size=count)
        upto, wanted, rows = policy.cumsum(axis=-1), self.gold[prompts], np.arange(count)
        tokens = np.empty((count, horizon), dtype=np.int64)
        progress, solved = np.zeros_like(tokens), np.zeros((count, horizon), dtype=bool)
        now, done = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool)
        for step in range(horizon):
            bounds = upto[styles, now, prompts[rows, now]]
            token = (rng.random((count, 1)) * bounds[:, -1:] >= bounds[:, :-1]).sum(axis=1)
            progress[:, step], tokens[:, step] = now, token
            done = done | ((now == 1) & (token == wanted[:, 1]))
            solved[:, step], now = done, (token == wanted[:, 0]).astype(np.int64)
        return Traces(prompts, styles, tokens, progress, solved)

    def value(self, policy: np.ndarray, horizon: int) -> np.ndarray:
        """Exact expected return of every prompt, float64 (..., symbols, symbols).

        Parameters
        ----------
        policy : float (..., 2, symbols, tokens)
        horizon : int >= 1
        """
        first, second, again = self._chances(policy, horizon)
        start = after = np.zeros_like(first)
        for left in range(1, horizon + 1):
            start, after = (
                first * after + (1 - first) * start,
                second * left + again * after + (1 - second - again) * start,
            )
        return start

    def return_distribution(self, policy: np.ndarray, horizon: int) -> np.ndarray:
        """Exact probability of every return 0..H, float64 (..., symbols, symbols, H + 1). Parameters as in `value`."""
        first, second, again = self._chances(policy, horizon)
        chances = np.zeros((*first.shape, horizon + 1))
        start, after = np.ones_like(first), np.zeros_like(first)
        for step in range(horizon):
            chances[..., horizon - step] = after * second
            start, after = start * (1 - first) + after * (1 - second - again), start * first + after * again
        chances[..., 0] = start + after
        return chances

    def _chances(self, policy: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probabilities of the first gold token, of the second one after it, and of the first one again."""
        policy = self._checked(policy, horizon)
        x1, x2 = np.indices((len(self.gold),) * 2)
        first, second = policy[..., 0, x1, self.gold[x1]], policy[..., 1, x2, self.gold[x2]]
        again = np.where(self.gold[x1] == self.gold[x2], 0.0, policy[..., 1, x2, self.gold[x1]])
        return first, second, again

    def _checked(self, policy: np.ndarray, horizon: int) -> np.ndarray:
        policy, shape = np.asarray(policy, dtype=np.float64), (2, len(self.gold), self.tokens)
        if policy.shape[-3:] != shape:
            raise InvalidInputError(f"policy has shape {policy.shape}, expected (..., {', '.join(map(str, shape))})")
        if horizon < 1:
            raise InvalidInputError(f"horizon must be at least 1, got {horizon}")
        return policy
