"""Rollout logs for the detection tests, made independently of `polyreward.tasks.synthetic_logs`.

`SHAPES` are the forms that a log can have, `CLEAN` the rewards of logs without a problem, `PLANTED` those with one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from polyreward.batch import RewardBatch

SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "20 groups": {"groups": 20},
    "40 groups of 16": {"groups": 40, "size": 16},
    "groups of 4": {"groups": 300, "size": 4},
    "groups of 16": {"size": 16},
    "ragged groups": {"groups": 200, "ragged": True},
    "no task": {"tasks": 0},
    "no step": {"steps": 0},
    "neither": {"tasks": 0, "steps": 0},
    "large": {"groups": 1500},
    "repeated prompts": {"groups": 200, "prompts": 40},
    "six tasks": {"groups": 400, "tasks": 6},
}


class Log:
    """Quality of each sample, the same for all rewards, with group, task and time, flat over the samples."""

    def __init__(
        self,
        rng: np.random.Generator,
        groups: int = 120,
        size: int = 8,
        steps: int = 20,
        tasks: int = 3,
        ragged: bool = False,
        prompts: int = 0,
        strata: str | None = "words",
    ) -> None:
        self.rng, self.groups, self.prompts, self.tasks = rng, groups, prompts, tasks
        self.group = np.repeat(np.arange(groups), rng.integers(2, size + 1, groups) if ragged else size)
        self.n = len(self.group)
        self.task = rng.integers(0, max(tasks, 1), groups)[self.group]
        step = np.arange(groups) // 10 if prompts else np.sort(rng.integers(0, max(steps, 1), groups))
        self.time = (step / max(int(step.max()), 1))[self.group]
        self.quality = rng.normal(0, 0.7, groups)[self.group] + rng.standard_normal(self.n)
        self.length = rng.lognormal(5, 0.5, self.n).round()
        self.columns: dict[str, np.ndarray] = {"length": self.length}
        self.columns["completion"] = np.array([f"t{v}" for v in rng.integers(0, 1 << 30, self.n)], dtype=object)
        if tasks:
            self.columns["task"] = np.array([f"task {t}" for t in self.task], dtype=object)
        if steps:
            self.columns["step"] = step[self.group]
        self.stratum = rng.integers(0, 3, self.n)
        if strata == "words":
            self.columns["stratum"] = np.array(["direct", "search", "tool"], dtype=object)[self.stratum]
        elif strata == "calls":
            self.columns["tool_calls"] = self.stratum + (self.stratum == 2) * rng.integers(0, 3, self.n)

    def noise(self, scale: float = 1.0) -> np.ndarray:
        return scale * self.rng.standard_normal(self.n)

    def chance(self, share: float | np.ndarray) -> np.ndarray:
        return (self.rng.random(self.n) < share) * 1.0

    def some_groups(self, share: float) -> np.ndarray:
        return (self.rng.random(self.groups) < share)[self.group]

    def batch(self, rewards: dict[str, np.ndarray]) -> RewardBatch:
        order = self.rng.permutation(self.n)
        group = self.group % self.prompts if self.prompts else self.group
        values = torch.from_numpy(np.stack(list(rewards.values()), 1)[order].astype(float))
        columns = {name: column[order] for name, column in self.columns.items()}
        return RewardBatch(values, tuple(rewards), torch.from_numpy(group[order]), columns)


def bounded(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def _gauss(log: Log) -> dict[str, np.ndarray]:
    q = log.quality
    return {"verifier": q + log.noise(0.4), "rm a": 0.7 * q + log.noise(0.7), "rm b": 0.5 * q + log.noise(0.8)}


def _binary(log: Log) -> dict[str, np.ndarray]:
    return {
        "accuracy": (log.quality + log.noise(0.3) > 0) * 1.0,
        "style": bounded(0.7 * log.quality + log.noise(0.7)),
    }


def _missing(log: Log) -> dict[str, np.ndarray]:
    rewards = _gauss(log)
    rewards["rm a"][log.rng.random(log.n) < 0.1] = np.nan
    rewards["rm b"][log.task == 0] = np.nan
    return rewards


def _missing_strata(log: Log) -> dict[str, np.ndarray]:
    if "stratum" in log.columns:
        log.columns["stratum"][log.rng.random(log.n) < 0.2] = None
    return _binary(log)


def _improves(log: Log) -> dict[str, np.ndarray]:
    q = log.quality + 2 * log.time - 1
    return {"accuracy": (q > 0) * 1.0, "rm": q + log.noise()}


def _saturating_proxy(log: Log) -> dict[str, np.ndarray]:
    q = log.quality + log.time
    return {"verifier": q, "format": np.clip(0.3 + 0.9 * log.time + log.noise(0.2), 0, 1), "rm": q + log.noise(0.8)}


def _saturating_verifier(log: Log) -> dict[str, np.ndarray]:
    q = log.quality + 4 * log.time - 1
    return {"accuracy": (q > 0) * 1.0, "rm": q + log.noise()}


def _all_saturate(log: Log) -> dict[str, np.ndarray]:
    q = log.quality + 3 * log.time - 0.5
    return {name: bounded(k * q + log.noise(0.5)) for k, name in ((1.0, "verifier"), (1.2, "rm"), (2.0, "format"))}


def _format_learned(log: Log) -> dict[str, np.ndarray]:
    formed = log.chance(0.3 + 0.69 * np.minimum(1, 2 * log.time))
    return {"correct": formed * (log.quality + 0.5 * log.time > 0), "format": 0.5 * formed}


def _hard_and_easy(log: Log) -> dict[str, np.ndarray]:
    q = log.quality + np.array([-0.6, 0.0, 0.6])[log.task % 3]
    return {"verifier": (q + log.noise(0.3) > 0) * 1.0, "rm": 0.7 * q + log.noise(0.7)}


def _graded_hard_and_easy(log: Log) -> dict[str, np.ndarray]:
    q = log.quality + np.array([-0.7, 0.0, 0.7])[log.task % 3]
    return {"verifier": bounded(q + log.noise(0.3)), "rm": 0.5 * bounded(q + log.noise())}


def _marks(log: Log) -> dict[str, np.ndarray]:
    marks = np.clip(np.round(5 + 2 * log.quality), 0, 10)
    return {"task_score": marks, "brevity": -0.5 * np.round(log.rng.gamma(4, 1, log.n))}


CLEAN: dict[str, Callable[[Log], dict[str, np.ndarray]]] = {
    "gaussian": _gauss,
    "0/1 and graded": _binary,
    "one 0/1 reward": lambda log: {"correct": (log.quality + log.noise(0.3) > 0) * 1.0},
    "one graded reward": lambda log: {"score": np.clip(0.5 + 0.25 * log.quality, 0, 1)},
    "independent": lambda log: {"verifier": 50 + 10 * log.quality, "helpful": 20 + log.noise(5)},
    "large offset": lambda log: {name: 1e6 + values for name, values in _gauss(log).items()},
    "tiny scale": lambda log: {name: 1e-7 * values for name, values in _binary(log).items()},
    "a reward twice": lambda log: {"verifier": log.quality, "again": log.quality, "less": 0.3 * log.quality},
    "eight rewards": lambda log: {f"rm {k}": 0.6 * log.quality + log.noise(0.8) for k in range(8)},
    "twenty of noise": lambda log: {f"r {k}": log.noise() for k in range(20)},
    "missing rewards": _missing,
    "missing strata": _missing_strata,
    "improves": _improves,
    "saturating proxy": _saturating_proxy,
    "saturating verifier": _saturating_verifier,
    "all saturate": _all_saturate,
    "one dominates": lambda log: {"verifier": log.quality + log.noise(0.3), "bonus": 4 * (log.quality + log.noise())},
    "format is learned": _format_learned,
    "hard and easy tasks": _hard_and_easy,
    "marks and cost": _marks,
    "graded, hard and easy tasks": _graded_hard_and_easy,
}


def _drowned(log: Log) -> dict[str, np.ndarray]:
    return [
        lambda: {"accuracy": (log.quality > 0) * 1.0, "style": log.noise(0.02)},
        lambda: {"verifier": 50 * log.quality, "helpful": bounded(log.noise())},
        lambda: {"verifier": log.quality + log.noise(0.3), "rm": 0.03 * (0.5 * log.quality + log.noise())},
    ][log.rng.integers(3)]()


def _collapse(log: Log) -> dict[str, np.ndarray]:
    if log.rng.random() < 0.5:
        return {"accuracy": (log.quality > 0) * 1.0, "format": log.chance(0.6)}
    return {name: log.rng.integers(0, 3, log.n) * 0.5 for name in ("accuracy", "format")}


def _scale(log: Log) -> dict[str, np.ndarray]:
    factor = np.where(log.task == 1, log.rng.choice([10, 0.05, 30]), 1.0)
    rewards = _gauss(log) if log.rng.random() < 0.5 else {"accuracy": (log.quality > 0) * 1.0}
    return {name: factor * values for name, values in rewards.items()}


def _tail(log: Log) -> dict[str, np.ndarray]:
    values = [
        log.quality + 40 * log.chance(0.015),
        log.rng.standard_t(1.6, log.n) + 0.3 * log.quality,
        np.exp(1.3 * log.quality),
    ]
    return {"rm": values[log.rng.integers(3)]}


def _skew(log: Log) -> dict[str, np.ndarray]:
    exponential = log.rng.exponential(1.0, log.n)
    skewed = [exponential, -exponential, log.noise() ** 2][log.rng.integers(3)]
    return {"rm": np.where(log.task == 0, skewed, log.noise())}


def _dead(log: Log) -> dict[str, np.ndarray]:
    correct = (log.quality > 0) * 1.0
    kind = log.rng.integers(3)
    if kind == 0 and log.tasks:
        return {"accuracy": np.where(log.task == 2, 0.0, correct)}
    if kind == 1:
        return {"accuracy": np.where((log.task == 0) & log.some_groups(0.85), 1.0, correct)}
    return {"accuracy": np.where(log.some_groups(0.75), 0.0, correct)}


def _dead_late(log: Log) -> dict[str, np.ndarray]:
    alive = log.rng.random(log.groups)[log.group] > 1.2 * log.time - 0.1
    return {"verifier": np.where(alive, log.quality, -3.0)}


def _strata(log: Log) -> dict[str, np.ndarray]:
    offset = 0.9 * (log.stratum == 2)
    if log.rng.random() < 0.5:
        return {"verifier": log.quality + offset + log.noise(0.3)}
    return {"accuracy": (log.quality + 1.3 * offset > 0.5) * 1.0, "rm": log.quality + offset}


def _conflict(log: Log) -> dict[str, np.ndarray]:
    if log.rng.random() < 0.5:
        return {"accuracy": (log.quality > 0) * 1.0, "brevity": -0.6 * log.quality + log.noise(0.8)}
    return {"verifier": log.quality + log.noise(0.3), "safety": -log.quality + log.noise(0.8)}


def _length(log: Log) -> dict[str, np.ndarray]:
    long = log.rng.choice([-1, 1]) * (np.log(log.length) - 5) / 0.5
    if log.rng.random() < 0.5:
        return {"accuracy": (log.quality > 0) * 1.0, "rm": 0.6 * log.quality + 0.6 * long + log.noise(0.6)}
    return {"verifier": log.quality, "rm": bounded(0.6 * log.quality + long + log.noise(0.5))}


def _opposite(log: Log) -> dict[str, np.ndarray]:
    trusted, proxy = log.quality - 1.3 * log.time, 0.8 * log.quality + 1.5 * log.time + log.noise(0.5)
    if log.rng.random() < 0.5:
        return {"accuracy": (trusted > -0.5) * 1.0, "rm": proxy}
    return {"verifier": trusted + log.noise(0.3), "rm": proxy}


def _decoupled(log: Log) -> dict[str, np.ndarray]:
    left = 1 - log.time
    return {"verifier": log.quality, "rm": left * log.quality + np.sqrt(1 - left**2) * log.noise() + log.time}


def _rise_and_fall(log: Log) -> dict[str, np.ndarray]:
    hump = np.where(log.time < 0.5, 2 * log.time, 2.4 - 2.8 * log.time)
    return {"verifier": log.quality + 1.8 * hump, "rm": log.quality + 2.5 * log.time + log.noise(0.5)}


def _plateau(log: Log) -> dict[str, np.ndarray]:
    return {"verifier": log.quality + log.noise(0.3), "rm": log.quality + 2 * log.time + log.noise(0.5)}


def _texts(log: Log) -> dict[str, np.ndarray]:
    same = np.array([f"g{g}" for g in log.group], dtype=object)
    log.columns["completion"] = np.where(log.chance(0.9 * log.time) > 0, same, log.columns["completion"])
    return _binary(log)


def _entropy(log: Log) -> dict[str, np.ndarray]:
    log.columns["entropy"] = 2 * np.exp(-3 * log.time + log.noise(0.1))
    return _gauss(log)


PLANTED: dict[str, tuple[str, Callable[[Log], dict[str, np.ndarray]], set[str]]] = {
    "drowned": ("drowned", _drowned, set()),
    "collapse": ("collapse", _collapse, set()),
    "scale": ("scale", _scale, {"tasks"}),
    "heavy tail": ("heavy tail", _tail, set()),
    "skew": ("skew", _skew, {"tasks"}),
    "groups without signal": ("groups without signal", _dead, set()),
    "signal is lost": ("groups without signal", _dead_late, {"steps"}),
    "cross-stratum bias": ("cross-stratum bias", _strata, set()),
    "conflict": ("conflict", _conflict, set()),
    "length dependence": ("length dependence", _length, set()),
    "opposite trends": ("drift", _opposite, {"steps"}),
    "decoupling": ("drift", _decoupled, {"steps"}),
    "rise and fall": ("drift", _rise_and_fall, {"steps"}),
    "plateau": ("drift", _plateau, {"steps"}),
    "fewer texts": ("loss of diversity", _texts, {"steps"}),
    "less entropy": ("loss of diversity", _entropy, {"steps"}),
}
"""Problem: the kind that finds it, the rewards, and what of a log it needs."""


def clean_log(kind: str, shape: str, seed: int) -> RewardBatch:
    """A log without a problem."""
    rng = np.random.default_rng([seed, list(CLEAN).index(kind), list(SHAPES).index(shape)])
    log = Log(rng, **SHAPES[shape], strata=("words", "calls", None)[seed % 3])
    return log.batch(CLEAN[kind](log))


def planted_log(problem: str, shape: str, seed: int) -> RewardBatch:
    """A log with one problem."""
    rng = np.random.default_rng([seed + 5000, list(PLANTED).index(problem), list(SHAPES).index(shape)])
    log = Log(rng, **SHAPES[shape], strata=("words", "calls")[seed % 2])
    return log.batch(PLANTED[problem][1](log))


def shapes_for(problem: str) -> list[str]:
    """Shapes that have the columns which the problem shows in."""
    return [shape for shape, spec in SHAPES.items() if all(spec.get(need, 1) for need in PLANTED[problem][2])]
