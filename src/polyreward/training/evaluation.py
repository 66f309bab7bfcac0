"""The held-out score of a policy, and its interval over seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyreward.storage import write_text
from polyreward.tasks.tools import ToolBox, text_of
from polyreward.training.journal import read_lines
from polyreward.training.recipe import Recipe
from polyreward.training.trajectories import prompt_tokens, sample_trajectories

_BATCH = 128


@dataclass(frozen=True)
class Evaluation:
    """Scores on the held-out prompts.

    Attributes
    ----------
    score : mean over tasks of the mean score, a share of each task's points; None where nothing was scored
    tasks : mean score of each task that has one
    calls : mean number of tool calls of each task
    samples : a few completions of each task, with their scores
    """

    score: float | None
    tasks: dict[str, float]
    calls: dict[str, float]
    samples: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    reward: Any,
    tools: ToolBox,
    *,
    max_tokens: int,
    temperature: float,
    samples: int,
    seed: int,
    shown: int = 2,
) -> Evaluation:
    """Sample `samples` completions of each row and score them; the same for the same seed and weights.

    The mode of the model and torch's global random state are left as they were.
    """
    training = model.training
    model.eval()
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    repeated = [row for row in rows for _ in range(samples)]
    completions: list[Any] = []
    calls: list[int] = []
    for start in range(0, len(repeated), _BATCH):
        part = repeated[start : start + _BATCH]
        found = sample_trajectories(
            model,
            tokenizer,
            prompt_tokens(tokenizer, [row["prompt"] for row in part]),
            tools,
            max_tokens=max_tokens,
            temperature=temperature,
            generator=generator,
        )
        texts = tokenizer.batch_decode(found.completion_ids, skip_special_tokens=True)
        chat = [isinstance(row["prompt"], list) for row in part]
        completions += [
            [{"role": "assistant", "content": text}] if is_chat else text
            for text, is_chat in zip(texts, chat, strict=True)
        ]
        calls += found.calls
    model.train(training)
    columns = {key: [row.get(key) for row in repeated] for key in repeated[0] if key != "prompt"}
    values = reward([row["prompt"] for row in repeated], completions, **columns)
    points = np.array([row.get("points") or 1.0 for row in repeated])
    scores = np.array([np.nan if value is None else value for value in values], dtype=float) / points
    tasks = np.array([str(row["task"]) for row in repeated])
    names = list(dict.fromkeys(tasks.tolist()))
    scored = ~np.isnan(scores)
    per_task = {name: float(scores[here].mean()) for name in names if (here := scored & (tasks == name)).any()}
    return Evaluation(
        score=float(np.mean(list(per_task.values()))) if per_task else None,
        tasks=per_task,
        calls={name: float(np.array(calls)[tasks == name].mean()) for name in names},
        samples=[
            {
                "task": name,
                "prompt": text_of(repeated[i]["prompt"]),
                "completion": text_of(completions[i]),
                "score": None if np.isnan(scores[i]) else float(scores[i]),
            }
            for name in names
            for i in np.flatnonzero(tasks == name)[: shown * samples : samples].tolist()
        ],
    )


class HeldOut:
    """Scores the policy on the held-out prompts at a step, once, and keeps the record in ``held_out.jsonl``.

    Parameters
    ----------
    reward : the reward that is the held-out score
    writes : whether this process keeps the record
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        rows: Sequence[dict[str, Any]],
        tokenizer: Any,
        reward: Any,
        tools: ToolBox,
        folder: Path,
        writes: bool,
    ) -> None:
        self.recipe, self.seed, self.rows, self.tokenizer = recipe, seed, rows, tokenizer
        self.reward, self.tools, self.path, self.writes = reward, tools, folder / "held_out.jsonl", writes

    def __call__(self, model: Any, step: int) -> dict[str, Any]:
        """The entry of this step, evaluated unless it is on record."""
        known = {entry["step"]: entry for entry in read_lines(self.path)}
        if step in known:
            return known[step]
        settings = self.recipe.evaluation
        found = evaluate(
            model,
            self.tokenizer,
            self.rows,
            self.reward,
            self.tools,
            max_tokens=self.recipe.training.max_tokens,
            temperature=settings.temperature,
            samples=settings.samples,
            seed=self.seed,
        )
        entry = {"step": step, **found.as_dict()}
        if step and entry["score"] is None:  # the rewards' warnings say why; at step 0 the run stops
            entry["score"] = 0.0
        if self.writes and entry["score"] is not None:
            write_text(self.path, "".join(json.dumps(e) + "\n" for e in [*known.values(), entry]))
        return entry

    def latest(self) -> float:
        """The newest score on record; 0 when there is none."""
        entries = read_lines(self.path)
        return float(entries[-1]["score"]) if entries else 0.0


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student-t interval over seeds; the interval of a single value is the value itself."""
    from scipy import stats

    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if array.size < 2:
        return mean, mean, mean
    half = float(stats.t.ppf((1 + confidence) / 2, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size))
    return mean, mean - half, mean + half
