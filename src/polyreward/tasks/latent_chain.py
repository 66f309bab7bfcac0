"""Latent chain of thought: prompts whose answers are easy behind the right thought, small enough to sum over thoughts.

P prompts belong to hidden classes. A chain of thought z is one of a few symbols, drawn from a table of logits with a
row for each prompt. The answer's tokens are drawn independently, given prompt, thought and position, from a small
network. A class has its own answer, and a share of the tokens is the prompt's own. Sums over the thoughts give
likelihood and success exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from polyreward.errors import InvalidInputError


@dataclass(frozen=True)
class LatentChainTask:
    """The task.

    Parameters
    ----------
    prompts, length : P and L, number of prompts and of answer tokens
    classes, symbols, thoughts : number of classes, answer symbols and thoughts
    own : in [0, 1], share of the tokens that are the prompt's own
    """

    prompts: int
    length: int
    classes: int = 8
    symbols: int = 16
    thoughts: int = 8
    own: float = 0.0

    def __post_init__(self) -> None:
        sizes = (self.prompts, self.length, self.classes, self.symbols, self.thoughts)
        if min(sizes) < 1 or not 0 <= self.own <= 1:
            raise InvalidInputError(f"a latent chain task needs sizes of at least 1 and own in [0, 1], got {self}")

    def answers(self, rng: np.random.Generator) -> np.ndarray:
        """Reference answers, int64 (P, L): prompt i is of class ``i mod classes``."""
        of_class = rng.integers(self.symbols, size=(self.classes, self.length))
        if self.classes <= self.symbols:  # classes differ even in one token
            of_class[:, 0] = rng.permutation(self.symbols)[: self.classes]
        answers = of_class[np.arange(self.prompts) % self.classes]
        own = rng.random(answers.shape) < self.own
        return np.where(own, rng.integers(self.symbols, size=answers.shape), answers)


class LatentChainPolicy(nn.Module):
    """Table of thoughts, uniform at first, and answer head.

    Parameters
    ----------
    task : LatentChainTask
    seed : int
    thinks : bool
        False leaves the thought out of the head: supervised training without a chain.
    opinion : float > 0
        Deviation of the embeddings: with 0.1 the head begins nearly uniform over answers, with 1 it has opinions of its
        own about each prompt, thought and place.
    """

    def __init__(self, task: LatentChainTask, seed: int, thinks: bool = True, opinion: float = 0.1) -> None:
        super().__init__()
        self.thinks = thinks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.logits = nn.Parameter(torch.zeros(task.prompts, task.thoughts))
            self.thought = nn.Parameter(opinion * torch.randn(task.thoughts, 32))
            self.position = nn.Parameter(opinion * torch.randn(task.length, 32))
            self.prompt = nn.Parameter(opinion * torch.randn(task.prompts, 8))
            self.hidden, self.out = nn.Linear(72, 64), nn.Linear(64, task.symbols)
            nn.init.zeros_(self.out.bias)

    def thoughts(self, prompts: Tensor) -> Tensor:
        """Log-probability of each thought, (B, thoughts)."""
        return self.logits[prompts].log_softmax(dim=-1)

    def answers(self, prompts: Tensor) -> Tensor:
        """Log-probability of each symbol, (B, thoughts, L, symbols); one thought where the policy does not think."""
        thought = self.thought if self.thinks else torch.zeros_like(self.thought[:1])
        # The first layer is linear in the parts, so their images are added instead of their concatenation mapped.
        by_thought, by_place, by_prompt = self.hidden.weight.split([32, 32, 8], dim=1)
        mapped = (
            (thought @ by_thought.T).view(1, -1, 1, 64)
            + (self.position @ by_place.T).view(1, 1, -1, 64)
            + (self.prompt[prompts] @ by_prompt.T).view(-1, 1, 1, 64)
            + self.hidden.bias
        )
        return self.out(mapped.tanh()).log_softmax(dim=-1)

    @torch.no_grad()
    def measure(self, answers: Tensor) -> dict[str, float]:
        """Exact figures by summing over thoughts, for the references `answers` (P, L).

        ``nll`` is ``-log pi(a*|p) / L``, mean over prompts; ``success`` and ``token accuracy`` are those of the most
        likely thought with the most likely tokens; ``entropy`` is that of the thoughts, in nats.
        """
        every = torch.arange(len(answers), device=answers.device)
        table = self.answers(every)
        logp = table.gather(-1, answers[:, None, :, None].expand(-1, table.shape[1], -1, -1)).squeeze(-1).double()
        thoughts = self.thoughts(every).double()
        prior = thoughts if self.thinks else torch.zeros_like(thoughts[:, :1])
        nll = -(prior + logp.sum(dim=-1)).logsumexp(dim=1) / answers.shape[1]
        best = table[every, prior.argmax(dim=1)].argmax(dim=-1) == answers
        return {
            "nll": float(nll.mean()),
            "success": float(best.all(dim=1).double().mean()),
            "token accuracy": float(best.double().mean()),
            "entropy": float(-(prior.exp() * prior).sum(dim=1).mean()),
        }
