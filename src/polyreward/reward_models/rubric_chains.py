"""Rewards of evaluation chains for policy gradient: the verdict is right, the process covers what the user wants.

    R = alpha PR + beta OR,   OR = 1 where the preferred response has strictly the highest score, else 0

PR in [0, 1] says how far a chain covers the user's criteria. A chain that cannot be read earns a penalty. Naming
criteria is cheap: a coverage that does not look at the weights can be gamed.

Paper: P-GenRM: Personalized Generative Reward Model with Test-time User-based Scaling (arXiv 2602.12116).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyreward.errors import InvalidInputError
from polyreward.reward_models.dual_objective import group_advantages
from polyreward.reward_models.evaluation_chains import EvaluationChain, FormatError, parse_chain


@dataclass(frozen=True)
class RubricChainReward:
    """``alpha PR + beta OR`` of chains (arXiv 2602.12116).

    Parameters
    ----------
    alpha, beta : float
        Weights of process and outcome, 0.5 and 1 in the paper; the curriculum's last stage has ``alpha=0``.
    format_penalty : float
        Reward of a chain that cannot be read.
    coverage_fn : function of (chain, item) -> [0, 1], optional
        PR, such as a judge's rating; `item` is what the caller passes for that row. None or NaN from it counts as 0.
        Needed with ``alpha > 0``, and called with no chain that cannot be read.
    """

    alpha: float = 0.5
    beta: float = 1.0
    format_penalty: float = -0.1
    coverage_fn: Callable[[EvaluationChain, Any], float | None] | None = None

    def __post_init__(self) -> None:
        if not np.isfinite([self.alpha, self.beta, self.format_penalty]).all():
            raise InvalidInputError(f"alpha, beta and format_penalty must be finite, got {self}")

    def __call__(
        self,
        chains: Sequence[Sequence[EvaluationChain | FormatError]],
        chosen: Sequence[int] | int = 0,
        items: Sequence[Any] | None = None,
        responses: int | None = None,
    ) -> Tensor:
        """Rewards float64 (B, K).

        Parameters
        ----------
        chains : B rows of K chains
        chosen : index of the preferred response, one a row or one for all
        items : length B, optional
            What `coverage_fn` gets beside the chain.
        responses : number of responses of every input, optional
            Default: what most chains of a row score, 2 at least. A chain that scores another number, such as the
            chosen one alone, counts as one that cannot be read.

        Raises
        ------
        InvalidInputError
            Rows of different length, `chosen` or `items` of another, a coverage outside [0, 1], or none with
            ``alpha > 0``.
        """
        rows, width = len(chains), len(chains[0]) if len(chains) else 0
        if any(len(row) != width for row in chains):
            raise InvalidInputError(f"every row needs as many chains, got {[len(row) for row in chains]}")
        best = [chosen] * rows if isinstance(chosen, int | np.integer) else list(chosen)
        if len(best) != rows or (items is not None and len(items) != rows):
            raise InvalidInputError(f"{rows} rows of chains need as many entries in chosen and items")
        process, outcome = torch.zeros(rows, width).double(), torch.zeros(rows, width).double()
        readable = torch.zeros(rows, width, dtype=torch.bool)
        for b, row in enumerate(chains):
            count = _responses(row, int(best[b]), responses)
            for k, chain in enumerate(row):
                if isinstance(chain, FormatError) or chain.responses != count:
                    continue
                readable[b, k] = True
                outcome[b, k] = prefers(chain.score(), int(best[b]))
                if self.alpha:
                    process[b, k] = self._coverage(chain, None if items is None else items[b], b)
        return self.combine(process, outcome, readable)

    def combine(self, process: Tensor, outcome: Tensor, readable: Tensor | None = None) -> Tensor:
        """Rewards of PR and OR, any shape: for policies whose chains are no text."""
        rewards = self.alpha * process + self.beta * outcome
        return rewards if readable is None else torch.where(readable, rewards, self.format_penalty)

    def of_texts(
        self, completions: Sequence[str], chosen: Sequence[int], responses: int = 2, items: Sequence[Any] | None = None
    ) -> list[float]:
        """The reward of each text, as trainers of language models call it."""
        rows = [[parse_chain(text, responses)] for text in completions]
        return [float(value) for value in self(rows, chosen, items, responses).flatten()]

    def _coverage(self, chain: EvaluationChain, item: Any, row: int) -> float:
        if self.coverage_fn is None:
            raise InvalidInputError(
                "RubricChainReward: alpha is above 0 and there is no coverage_fn; pass it or alpha=0"
            )
        value = self.coverage_fn(chain, item)
        if value is None or value != value:
            return 0.0
        if not 0 <= value <= 1:
            raise InvalidInputError(f"RubricChainReward: the coverage of row {row} is {value}, expected [0, 1]")
        return float(value)


def prefers(scores: np.ndarray, chosen: int) -> bool:
    """Whether the chosen of b scores is strictly above all others.

    Raises
    ------
    InvalidInputError
        `chosen` is no index of a score.
    """
    if not 0 <= chosen < len(scores):
        raise InvalidInputError(f"chosen is {chosen}, the chain scores {len(scores)} responses")
    others = np.delete(scores, chosen)
    return bool((scores[chosen] > others).all())


def chain_advantages(rewards: Tensor) -> Tensor:
    """``(R - mean) / deviation`` of the K chains of each input, deviation of the population; 0 where all are equal.

    Parameters
    ----------
    rewards : float (B, K)
    """
    return group_advantages(rewards, epsilon=0.0, ddof=0)


def _responses(chains: Sequence[EvaluationChain | FormatError], chosen: int, given: int | None) -> int:
    """How many responses an input has: the number given, or what most of its chains score.

    Raises
    ------
    InvalidInputError
        `chosen` is none of them.
    """
    found = Counter(chain.responses for chain in chains if isinstance(chain, EvaluationChain))
    count = given if given is not None else max(2, max(found, key=lambda size: (found[size], size), default=2))
    if chosen < 0 or (found and chosen >= count):
        raise InvalidInputError(f"chosen is {chosen}, the chain scores {count} responses")
    return count


def select_right_chains(chains: Sequence[EvaluationChain | FormatError], chosen: Sequence[int]) -> np.ndarray:
    """Which chains have the right verdict, bool (M,): the rejection sampling before supervised fine-tuning.

    A chain that leaves the chosen response out, or scores it alone, has none.
    """
    if len(chains) != len(chosen):
        raise InvalidInputError(f"{len(chains)} chains and {len(chosen)} choices")
    return np.array(
        [
            isinstance(c, EvaluationChain) and c.responses > max(int(b), 1) and prefers(c.score(), int(b))
            for c, b in zip(chains, chosen, strict=True)
        ],
        bool,
    )


def hard_negatives(chains: Sequence[Sequence[EvaluationChain | FormatError]], chosen: Sequence[int]) -> np.ndarray:
    """Pairs that the model gets wrong or splits on, bool (B,): at most half of the readable chains are right.

    A pair of which no chain can be read is none.
    """
    found = []
    for row, best in zip(chains, chosen, strict=True):
        readable = [chain for chain in row if isinstance(chain, EvaluationChain)]
        right = select_right_chains(readable, [best] * len(readable))
        found.append(bool(len(readable)) and float(right.mean()) <= 0.5)
    return np.array(found, bool)


def hard_share(progress: float, first: float = 0.0, last: float = 1.0) -> float:
    """Share of hard negatives in a batch, linear in the share of the training that is done."""
    return first + (last - first) * min(max(progress, 0.0), 1.0)
