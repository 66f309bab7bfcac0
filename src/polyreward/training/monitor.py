"""What happens between the steps of a run: metrics, held-out scores, complete checkpoints, and stopping on request."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from polyreward.storage import write_json
from polyreward.training.evaluation import HeldOut
from polyreward.training.journal import COMPLETE, Report
from polyreward.training.recipe import Recipe

# Figures that differ between two equal runs: they measure the machine.
_OF_THE_MACHINE = ("time", "per_second", "epoch", "profiling", "seconds", "executor/")


class Monitor(TrainerCallback):
    """Writes metrics, evaluates, marks checkpoints complete, stops on request."""

    def __init__(
        self,
        stop: dict[str, bool],
        judge: HeldOut,
        report: Report,
        recipe: Recipe,
        trainer: Any,
        folder: Path,
        writes: bool,
    ) -> None:
        self.stop, self.judge, self.report, self.recipe = stop, judge, report, recipe
        self.trainer, self.folder, self.writes = trainer, folder, writes
        self.score = judge.latest()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show where the run starts."""
        self._show(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Append the step's figures to ``metrics.jsonl``, and those that measure the machine to ``timing.jsonl``."""
        if not self.writes or not logs or "reward" not in logs:
            return
        files: dict[str, dict[str, Any]] = {name: {"step": state.global_step} for name in ("metrics", "timing")}
        for key, value in logs.items():
            if isinstance(value, int | float) and value == value:
                measured = any(word in key for word in _OF_THE_MACHINE)
                files["timing" if measured else "metrics"][key] = value
        curriculum = self.trainer.curriculum
        if curriculum is not None:
            drawn = dict(zip(curriculum.names, curriculum.probabilities().tolist(), strict=True))
            files["metrics"]["curriculum"] = drawn
        for name, entry in files.items():
            with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Evaluate when it is time, show progress, and stop with a checkpoint when asked to."""
        every = self.recipe.evaluation.every
        if every and state.global_step % every == 0 and self.writes:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            self.score = self.judge(model, state.global_step)["score"]
        self._show(state.global_step)
        # Between the updates on one set of completions a checkpoint would lose them.
        if self.stop["asked"] and state.global_step % self.recipe.training.updates_per_rollout == 0:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint as whole."""
        if self.writes:
            checkpoint = self.folder / "checkpoints" / f"checkpoint-{state.global_step}"
            write_json(checkpoint / COMPLETE, {"step": state.global_step})

    def _show(self, step: int) -> None:
        self.report("training", step, self.recipe.training.steps, f"held-out {self.score:.3f}")


@contextmanager
def stop_on_interrupt() -> Iterator[dict[str, bool]]:
    """Turn the first Ctrl-C (or SIGTERM) into a request to stop after the step; the second one interrupts at once."""
    stop = {"asked": False}

    def ask(number: int, frame: Any) -> None:
        if stop["asked"]:
            raise KeyboardInterrupt
        stop["asked"] = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # signals belong to the main thread
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
