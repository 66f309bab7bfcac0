"""What a training run has written, as the series that its report draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polyreward.errors import MissingFileError
from polyreward.training.journal import read_lines
from polyreward.training.recipe import load_recipe


class Run:
    """What one seed has written so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seed = load_recipe(folder / "recipe.toml").seed if (folder / "recipe.toml").is_file() else 0
        self.held_out = read_lines(folder / "held_out.jsonl")
        self.metrics = read_lines(folder / "metrics.jsonl")
        self.done = (folder / "result.json").is_file()
        self._log: dict[str, np.ndarray] | None = None

    def log(self) -> dict[str, np.ndarray]:
        """Columns of the rollout log: step, task, stratum and the rewards."""
        if self._log is None:
            from polyreward.data.rollouts import read_rollouts

            try:
                batch = read_rollouts(self.folder / "rollouts", columns=("step", "task", "stratum"))
            except MissingFileError:
                self._log = {}
                return self._log
            columns = {name: np.asarray(values) for name, values in batch.columns.items()}
            columns |= {f"reward/{name}": batch.reward(name).numpy() for name in batch.names}
            self._log = columns
        return self._log


def over_seeds(
    series: Sequence[Sequence[tuple[float, float]]],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, mean, lowest and highest over seeds, at each step that any seed has."""
    steps = sorted({step for one in series for step, _ in one})
    tables = [dict(one) for one in series]
    values = np.array([[table.get(step, np.nan) for step in steps] for table in tables], dtype=float).reshape(
        len(tables), -1
    )
    if not steps:
        return [], [], [], []
    return steps, np.nanmean(values, 0).tolist(), np.nanmin(values, 0).tolist(), np.nanmax(values, 0).tolist()


def binned(steps: np.ndarray, values: np.ndarray, bins: int = 40) -> list[tuple[float, float]]:
    """Means of about `bins` stretches of steps, so that a curve is read and not its noise."""
    present = ~np.isnan(values)
    steps, values = steps[present], values[present]
    if not steps.size:
        return []
    width = max(1, int(np.ceil(steps.max() / bins)))
    codes = (steps - 1) // width
    found, inverse = np.unique(codes, return_inverse=True)
    totals = np.bincount(inverse, weights=values) / np.bincount(inverse)
    return [(float(code * width + (width + 1) / 2), float(total)) for code, total in zip(found, totals, strict=True)]
