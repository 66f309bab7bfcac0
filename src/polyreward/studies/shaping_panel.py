"""Entropy hinge and length trapezoid on a tiny character policy: the shaping panel of the Gaussian GRPO study.

The policy holds one softmax over characters for each position. Rewards are mostly noise with a weak drive, so that the
drive and the shaping terms are of the same order. Two drives move the entropy (pay the commonest letter: it falls; pay
distinct letters: it rises), a third pays longer texts.

The hinge is fed with the sampled estimate ``-log pi(token)``, as in the paper, or with the exact entropy. On samples of
the present policy the gradient of ``-log pi(token)`` has mean zero, so the two need not do the same.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from polyreward.advantages.presets import gaussian_grpo
from polyreward.advantages.transform import compute_advantages
from polyreward.batch import RewardBatch
from polyreward.grouped import whole
from polyreward.objectives.entropy import EntropyHinge
from polyreward.rewards.length import Trapezoid

LETTERS, POSITIONS, GROUPS, GROUP = 8, 16, 32, 8
LEARNING_RATE, STEPS = 32.0, 1000
WEIGHTS = (0.02, 0.1)
KINDS = ("sampled", "exact")
DRIVES = ("entropy falls", "entropy rises")
LONGEST, BOUNDS, LENGTH_WEIGHT = 48, (8, 12, 20, 28), 0.1


def entropy_panel(seed: int, steps: int = STEPS, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Mean entropy over the last quarter of training, by drive, kind of estimate and weight of the hinge."""
    figures = {}
    for drive in DRIVES:
        settings: list[tuple[str, EntropyHinge | None, str]] = [("no hinge", None, "exact")]
        for weight in WEIGHTS:
            settings += [(f"{kind} hinge {weight}", EntropyHinge(weight=weight), kind) for kind in KINDS]
        for name, hinge, kind in settings:
            trace = _train_entropy(drive, hinge, kind, seed, steps, device)
            figures[f"{drive}, {name}"] = {"entropy": float(np.mean(trace[-max(1, steps // 4) :]))}
    return figures


def length_panel(seed: int, steps: int = STEPS, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Share of texts whose length lies on the plateau, and the mean length, with and without the trapezoid."""
    return {
        "length, no shaping": _train_length(0.0, seed, steps, device),
        "length, trapezoid": _train_length(LENGTH_WEIGHT, seed, steps, device),
    }


def _train_entropy(
    drive: str, hinge: EntropyHinge | None, kind: str, seed: int, steps: int, device: str
) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(POSITIONS, LETTERS)
    logits[:, 0] = 4.3  # entropy 0.49, inside the band
    logits.requires_grad_()
    mask = torch.ones(GROUPS * GROUP, POSITIONS, dtype=torch.bool)
    trace = []
    for _ in range(steps):
        logp = logits.log_softmax(dim=1)
        tokens = torch.multinomial(logp.detach().exp(), GROUPS * GROUP, replacement=True, generator=generator).T
        pay = (tokens == 0).float().mean(dim=1)
        if drive == "entropy rises":
            pay = torch.nn.functional.one_hot(tokens, LETTERS).amax(dim=1).float().mean(dim=1)
        rewards = pay + torch.randn(len(tokens), generator=generator)
        chosen = logp[torch.arange(POSITIONS), tokens]
        entropy = -(logp.exp() * logp).sum(dim=1)
        loss = -(_advantages(rewards, device)[:, None] * chosen).mean()
        if hinge is not None:
            term = entropy.expand(len(tokens), -1) if kind == "exact" else -chosen
            loss = loss + hinge(term, mask, whole(len(tokens)))
        _descend(logits, loss)
        trace.append(float(entropy.detach().mean()))
    return trace


def _train_length(weight: float, seed: int, steps: int, device: str) -> dict[str, float]:
    """The policy chooses at each position to stop or go on; correctness is a little likelier for longer texts."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((LONGEST,), -3.0, requires_grad=True)
    shape = Trapezoid(*BOUNDS)
    for _ in range(steps):
        stop = torch.rand(GROUPS * GROUP, LONGEST, generator=generator) < logits.detach().sigmoid()
        lengths = torch.where(stop.any(dim=1), stop.long().argmax(dim=1), LONGEST)
        correct = (torch.rand(len(lengths), generator=generator) < 0.4 + 0.2 * lengths / LONGEST).float()
        shaped = torch.as_tensor(shape(lengths.float()), dtype=torch.float32)
        at = torch.arange(LONGEST)
        went_on, stopped = at < lengths[:, None], at == lengths[:, None]
        logp = torch.where(went_on, -torch.nn.functional.softplus(logits), 0.0)
        logp = logp + torch.where(stopped, torch.nn.functional.logsigmoid(logits), 0.0)
        advantages = _advantages((1 - weight) * correct + weight * shaped, device)
        _descend(logits, -(advantages * logp.sum(dim=1)).mean() / LONGEST)
    going = (-torch.nn.functional.softplus(logits.detach())).double().cumsum(0).exp()
    reach = torch.cat([torch.ones(1, dtype=torch.float64), going])
    chance = torch.cat([reach[:-1] * logits.detach().double().sigmoid(), reach[-1:]])
    lengths = torch.arange(LONGEST + 1)
    plateau = (lengths >= BOUNDS[1]) & (lengths <= BOUNDS[2])
    return {"share on the plateau": float(chance[plateau].sum()), "mean length": float((chance * lengths).sum())}


def _advantages(rewards: Tensor, device: str) -> Tensor:
    batch = RewardBatch(
        rewards.round(decimals=6)[:, None].to(device),
        ("reward",),
        torch.arange(GROUPS).repeat_interleave(GROUP),
        {"task": torch.zeros(len(rewards), dtype=torch.int64)},
    )
    return compute_advantages(gaussian_grpo(), batch).cpu()


def _descend(logits: Tensor, loss: Tensor) -> None:
    (gradient,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        logits -= LEARNING_RATE * gradient
