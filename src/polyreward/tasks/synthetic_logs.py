"""Synthetic rollout logs for testing a diagnosis: clean ones, and ones with exactly one planted problem.

Every log has latent quality ``q`` a sample, a trusted reward ``verifier`` that measures it with noise, further rewards
that agree with it, tasks, steps, strata and lengths that have nothing to do with the rewards. A planted problem changes
one thing.

    batch = planted("conflict", seed=0)     # PROBLEMS lists what can be planted
    batch = clean(seed=3, scenario="saturation")   # SCENARIOS lists the kinds of clean log
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from polyreward.batch import RewardBatch
from polyreward.errors import UnknownNameError, nearest


@dataclass
class _Draft:
    """A log in the making: (groups, size) arrays."""

    rng: np.random.Generator
    rewards: dict[str, np.ndarray]
    task: np.ndarray
    step: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Groups and samples a group."""
        rows, size = next(iter(self.rewards.values())).shape
        return rows, size

    def noise(self) -> np.ndarray:
        """Standard normal draws, one a sample."""
        return self.rng.standard_normal(self.shape)

    def time(self) -> np.ndarray:
        """Time from 0 to 1, one column for all samples of a group."""
        return (self.step / max(int(self.step.max()), 1))[:, None]

    def batch(self) -> RewardBatch:
        """Shuffle the rows and wrap them."""
        groups, size = self.shape
        order = self.rng.permutation(groups * size)
        columns = {name: values.reshape(-1)[order] for name, values in self.columns.items()}
        columns["task"] = np.array([f"task_{t}" for t in self.task], dtype=object)[order // size]
        columns["step"] = self.step[order // size]
        rewards = np.stack([values.reshape(-1)[order] for values in self.rewards.values()], 1)
        return RewardBatch(torch.from_numpy(rewards), tuple(self.rewards), torch.from_numpy(order // size), columns)


def _draft(
    seed: int, rewards: int = 3, tasks: int = 3, groups: int = 600, size: int = 8, steps: int = 30, strata: bool = True
) -> _Draft:
    rng = np.random.default_rng(seed)
    task = rng.integers(0, tasks, groups)
    level = rng.normal(0, 0.3, groups)[:, None] + np.linspace(-0.3, 0.3, tasks)[task][:, None]
    quality = level + rng.standard_normal((groups, size))
    named = {"verifier": quality + 0.4 * rng.standard_normal(quality.shape)}
    for k in range(1, rewards):
        named[f"reward_{k}"] = 0.7 * quality + 0.7 * rng.standard_normal(quality.shape)
    draft = _Draft(rng, named, task, np.sort(rng.integers(0, steps, groups)))
    draft.columns["length"] = np.exp(rng.normal(4, 0.4, quality.shape)).round()
    draft.columns["completion_hash"] = rng.integers(0, 1 << 40, quality.shape)
    draft.columns["logp"] = -1.2 + 0.2 * rng.standard_normal(quality.shape)
    if strata:
        draft.columns["stratum"] = rng.integers(0, 3, quality.shape)
    return draft


def clean(seed: int, scenario: str = "plain") -> RewardBatch:
    """A log without a problem.

    Parameters
    ----------
    seed : int
    scenario : one of `SCENARIOS`
    """
    if scenario not in SCENARIOS:
        raise UnknownNameError(f"no scenario {scenario!r}{nearest(scenario, SCENARIOS)}")
    return SCENARIOS[scenario](seed).batch()


def planted(problem: str, seed: int) -> RewardBatch:
    """A log with one problem.

    Parameters
    ----------
    problem : one of `PROBLEMS`, which are the kinds of `polyreward.audit.diagnose.Finding`
    seed : int
    """
    if problem not in PROBLEMS:
        raise UnknownNameError(f"no problem {problem!r}{nearest(problem, PROBLEMS)}")
    return PROBLEMS[problem](seed).batch()


def _saturation(seed: int) -> _Draft:
    """All rewards climb to their ceiling and lose their spread."""
    draft = _draft(seed)
    left = 1 - 0.85 * draft.time()
    for name, values in draft.rewards.items():
        draft.rewards[name] = 3 - left * (3 - values)
    return draft


def _binary(seed: int) -> _Draft:
    """A verifier of 0 or 1 whose pass rate climbs, and a graded reward."""
    draft = _draft(seed, rewards=2)
    climb = draft.rewards["verifier"] + 1.2 * draft.time() - 0.4
    draft.rewards["verifier"] = (climb > 0).astype(float)
    return draft


def _ceiling(seed: int) -> _Draft:
    """A format reward that is learnt early and then always earned, beside a verifier that keeps its spread."""
    draft = _draft(seed)
    draft.rewards["reward_1"] = np.minimum(draft.rewards["reward_1"] + 4 * draft.time(), 2.0)
    return draft


def _heavier(seed: int) -> _Draft:
    """One reward of three times the scale dominates the sum, and stays true to the verifier."""
    draft = _draft(seed)
    draft.rewards["reward_1"] *= 3
    return draft


SCENARIOS: dict[str, Callable[[int], _Draft]] = {
    "plain": _draft,
    "one reward": lambda seed: _draft(seed, rewards=1),
    "eight rewards": lambda seed: _draft(seed, rewards=8, groups=400),
    "many tasks": lambda seed: _draft(seed, tasks=10, groups=1000),
    "small groups": lambda seed: _draft(seed, size=4),
    "large groups": lambda seed: _draft(seed, size=32, groups=150),
    "short log": lambda seed: _draft(seed, groups=60, steps=8, tasks=2),
    "no strata": lambda seed: _draft(seed, strata=False),
    "binary verifier": _binary,
    "saturation": _saturation,
    "ceiling": _ceiling,
    "one heavier reward": _heavier,
}


def _drowned(seed: int) -> _Draft:
    draft = _draft(seed)
    draft.rewards["reward_2"] = 0.03 * draft.noise()
    return draft


def _collapse(seed: int) -> _Draft:
    draft = _draft(seed, rewards=1)
    draft.rewards["verifier"] = (draft.rewards["verifier"] > 0).astype(float)
    draft.rewards["format"] = (draft.noise() > 0).astype(float)
    return draft


def _scale(seed: int) -> _Draft:
    draft = _draft(seed, rewards=1)
    draft.rewards["verifier"] *= np.where(draft.task == 1, 8.0, 1.0)[:, None]
    return draft


def _tail(seed: int) -> _Draft:
    draft = _draft(seed, rewards=1)
    lucky = (draft.rng.random(draft.shape) < 0.02) & (draft.task == 2)[:, None]
    draft.rewards["verifier"] = np.where(lucky, draft.rewards["verifier"] + 12, draft.rewards["verifier"])
    return draft


def _skew(seed: int) -> _Draft:
    draft = _draft(seed, rewards=1)
    skewed = draft.rng.exponential(1.0, draft.shape)
    draft.rewards["verifier"] = np.where((draft.task == 0)[:, None], skewed, draft.rewards["verifier"])
    return draft


def _dead(seed: int) -> _Draft:
    draft = _draft(seed, rewards=1)
    hopeless = (draft.task == 0) & (draft.rng.random(len(draft.task)) < 0.8)
    draft.rewards["verifier"] = np.where(hopeless[:, None], -2.0, draft.rewards["verifier"])
    return draft


def _strata(seed: int) -> _Draft:
    draft = _draft(seed)
    for values in draft.rewards.values():
        values += 0.9 * (draft.columns["stratum"] == 0)
    return draft


def _conflict(seed: int) -> _Draft:
    draft = _draft(seed, rewards=2)
    draft.rewards["reward_1"] = -0.5 * draft.rewards["verifier"] + 0.9 * draft.noise()
    return draft


def _length(seed: int) -> _Draft:
    draft = _draft(seed)
    draft.rewards["reward_1"] = draft.rewards["reward_1"] + 2.5 * (np.log(draft.columns["length"]) - 4)
    return draft


def _drift(seed: int) -> _Draft:
    draft = _draft(seed)
    draft.rewards["verifier"] = draft.rewards["verifier"] - 1.5 * draft.time()
    draft.rewards["reward_1"] = draft.rewards["reward_1"] + 1.5 * draft.time()
    return draft


def _decoupling(seed: int) -> _Draft:
    draft = _draft(seed)
    proxy, time = draft.rewards["reward_1"], draft.time()
    draft.rewards["reward_1"] = (1 - time) * proxy + np.sqrt(1 - (1 - time) ** 2) * draft.noise()
    return draft


def _diversity(seed: int) -> _Draft:
    draft = _draft(seed)
    alike = draft.rng.random(draft.shape) < 0.8 * draft.time()
    same = np.broadcast_to(np.arange(draft.shape[0])[:, None], draft.shape)
    draft.columns["completion_hash"] = np.where(alike, same, draft.columns["completion_hash"])
    return draft


PROBLEMS: dict[str, Callable[[int], _Draft]] = {
    "drowned": _drowned,
    "collapse": _collapse,
    "scale": _scale,
    "heavy tail": _tail,
    "skew": _skew,
    "groups without signal": _dead,
    "cross-stratum bias": _strata,
    "conflict": _conflict,
    "length dependence": _length,
    "drift": _drift,
    "decoupling": _decoupling,
    "loss of diversity": _diversity,
}
KIND_OF = {"decoupling": "drift"}
