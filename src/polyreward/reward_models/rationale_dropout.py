"""Rationale dropout: leave out the chain of thought of some training pairs, of both members or of neither.

A reward model that scores after a chain of thought is trained with better chains than it will write itself. Dropping
the whole chain with probability p makes the score depend on the sample too. The draw is one a pair: were it one a
response, "has a chain" would leak into the difference of the scores.

Paper: Think, then Score: Decoupled Reasoning and Scoring for Video Reward Modeling (DeScore, arXiv 2605.05922).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyreward.errors import InvalidInputError


@dataclass(frozen=True)
class RationaleDropout:
    """Which pairs keep their chains of thought (arXiv 2605.05922).

    Parameters
    ----------
    p : float in [0, 1]
        Probability that a pair loses its chains. 0 never drops; 1 always, which leaves a model without chains.
    paired : bool
        One draw a pair. False draws for each member, which is the mistake that the pairing avoids; for ablations.
    """

    p: float = 0.5
    paired: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise InvalidInputError(f"RationaleDropout: p must be a probability in [0, 1], got {self.p}")

    def __call__(
        self, pairs: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Keep mask, bool (pairs,), or (pairs, 2) when not paired.

        Parameters
        ----------
        pairs : int
        generator : torch.Generator, optional
            Default: torch's own, which a fit seeds.
        device : where the mask goes; default the generator's
        """
        if pairs < 0:
            raise InvalidInputError(f"RationaleDropout: the number of pairs must be at least 0, got {pairs}")
        shape = (pairs,) if self.paired else (pairs, 2)
        where = generator.device if generator is not None else "cpu"
        keep = torch.rand(shape, generator=generator, device=where) >= self.p
        return keep if device is None else keep.to(device)
