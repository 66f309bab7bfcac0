"""A recipe over several seeds: each seed a process and a run folder of its own, and one summary over them.

One seed runs in this process and its folder is the run folder. Several seeds run in ``seed-<n>/`` below it, together
where the policy is the small one, one after the other where it is a model of one's own. A seed that fails does not stop
the others; the first error is raised at the end.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyreward.errors import InvalidInputError, PolyrewardError, StorageError
from polyreward.rewards.executor import processors
from polyreward.storage import write_json
from polyreward.training.prompts import load_prompts
from polyreward.training.recipe import Recipe, load_recipe, write_recipe
from polyreward.training.run import Stopped, check_parts, check_prompts, train_seed

SeedReport = Callable[[int, str, int, int, str], None]
"""Progress: seed, phase, steps done, steps in all, a short note."""


def run_recipe(
    recipe: Recipe, folder: str | Path, report: SeedReport = lambda *_: None, *, fresh: bool = False
) -> dict[str, Any]:
    """Run all seeds of a recipe, or go on with the run that is in `folder`; return the summary.

    Parameters
    ----------
    fresh : delete a run of another recipe that is in the way; without it such a run is an error

    Raises
    ------
    InvalidInputError
        `folder` holds something else than a run of this recipe.
    PolyrewardError, Stopped
        As `train_seed`.
    """
    folder = Path(folder)
    parts = check_parts(recipe)
    if recipe.data.path is not None:
        check_prompts(recipe, load_prompts(recipe, recipe.seed), parts)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and recipe.seeds > 1:
        raise InvalidInputError(f"{recipe.seeds} seeds under {processes} launched processes; use --seeds 1 there")
    main = int(os.environ.get("RANK", "0")) == 0
    if not main:
        return summarise(_all_seeds(recipe, folder, report))
    with _only_one(folder):
        _claim(recipe, folder, fresh)
        summary = summarise(_all_seeds(recipe, folder, report))
        write_json(folder / "summary.json", summary)
    return summary


def _all_seeds(recipe: Recipe, folder: Path, report: SeedReport) -> list[dict[str, Any]]:
    seeds = range(recipe.seed, recipe.seed + recipe.seeds)
    if recipe.seeds == 1:
        return [train_seed(recipe, recipe.seed, folder, lambda *news: report(recipe.seed, *news))]
    return _in_processes(recipe, list(seeds), folder, report)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; the lock is gone with the process, however it ends."""
    import fcntl

    lock = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("w")
    except OSError as error:
        raise StorageError(f"cannot write to {folder.parent}: {error.strerror}") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidInputError(f"another process is running {folder}") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def seed_folders(folder: str | Path) -> list[Path]:
    """The folders of the single runs in a run folder, by seed."""
    folder = Path(folder)
    several = sorted(folder.glob("seed-*"), key=lambda path: int(path.name.split("-")[1]))
    return several or [folder]


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Held-out scores before and after, and the change, with 95 % Student-t intervals over seeds."""
    from polyreward.training.evaluation import mean_interval

    before = [result["held_out_before"]["score"] for result in results]
    after = [result["held_out_after"]["score"] for result in results]
    change = [b - a for a, b in zip(before, after, strict=True)]

    def entry(values: list[float]) -> dict[str, Any]:
        mean, low, high = mean_interval(values)
        return {"mean": mean, "low": low, "high": high, "per_seed": values}

    tasks = results[0]["held_out_after"]["tasks"]
    return {
        "name": results[0]["name"],
        "seeds": [result["seed"] for result in results],
        "before": entry(before),
        "after": entry(after),
        "change": entry(change),
        "tasks": {
            task: {
                when: entry([result[f"held_out_{when}"]["tasks"].get(task, 0.0) for result in results])
                for when in ("before", "after")
            }
            for task in tasks
        },
    }


def _claim(recipe: Recipe, folder: Path, fresh: bool) -> None:
    """Make the run folder this recipe's, or refuse."""
    kept = folder / "recipe.toml"
    if kept.is_file():
        differing = _differences(load_recipe(kept).model_dump(), recipe.model_dump())
        if not differing:
            return
        if not fresh and _has_begun(folder):
            raise InvalidInputError(
                f"{folder} holds a run of another recipe (it differs in {', '.join(differing[:4])}); "
                "give another --out, or --fresh to replace it"
            )
        shutil.rmtree(folder)
    elif folder.is_file():
        raise InvalidInputError(f"{folder} is a file; a run needs a folder")
    elif folder.is_dir() and any(folder.iterdir()):
        raise InvalidInputError(f"{folder} is not empty and holds no run; give another --out")
    write_recipe(recipe, kept)


def _has_begun(folder: Path) -> bool:
    return any(any(folder.glob(f"**/{name}")) for name in ("result.json", "checkpoint-*", "part-*.parquet"))


def _differences(first: dict[str, Any], second: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for key in {**first, **second}:
        a, b = first.get(key), second.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{path}{key}.")
        elif a != b:
            found.append(f"{path}{key}")
    return found


def _in_processes(recipe: Recipe, seeds: list[int], folder: Path, report: SeedReport) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    news = context.SimpleQueue()
    waiting = list(seeds)
    running: dict[int, Any] = {}
    results: dict[int, dict[str, Any]] = {}
    failures: dict[int, PolyrewardError | Stopped] = {}
    atonce = _at_once(recipe)
    asked: list[int] = []

    def stop(number: int, frame: Any) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        while waiting or running:
            while waiting and len(running) < atonce:
                seed = waiting.pop(0)
                process = context.Process(target=_one_seed, args=(recipe, seed, folder / f"seed-{seed}", news))
                process.start()
                running[seed] = process
            multiprocessing.connection.wait([news._reader, *(p.sentinel for p in running.values())], timeout=1.0)  # type: ignore[attr-defined]
            while not news.empty():
                kind, seed, content = news.get()
                if kind == "progress":
                    report(seed, *content)
                elif kind == "result":
                    results[seed] = content
                else:
                    failures[seed] = content
            for seed, process in list(running.items()):
                if process.exitcode is None or not news.empty():
                    continue
                del running[seed]
                if seed not in results and seed not in failures:
                    failures[seed] = PolyrewardError(
                        f"the process of seed {seed} died (exit status {process.exitcode}); "
                        "run the same command again: it goes on from the last complete checkpoint"
                    )
            if any(isinstance(failure, Stopped) for failure in failures.values()):
                waiting.clear()
    except KeyboardInterrupt:
        # A terminal signals every child, a plain kill does not. Each stops after its step, with a checkpoint.
        for process in running.values():
            if asked:
                process.terminate()
            process.join()
        raise Stopped from None
    finally:
        signal.signal(signal.SIGTERM, before)
    for seed in seeds:
        if seed in failures:
            raise failures[seed]
    return [results[seed] for seed in seeds]


def _one_seed(recipe: Recipe, seed: int, folder: Path, news: Any) -> None:
    parent = multiprocessing.parent_process()

    def report(*content: Any) -> None:
        if parent is not None and not parent.is_alive():
            raise Stopped  # the command was killed; its next run must not find this one still writing
        news.put(("progress", seed, content))

    try:
        result = train_seed(recipe, seed, folder, report)
        news.put(("result", seed, result))
    except KeyboardInterrupt:
        news.put(("failure", seed, Stopped()))
    except PolyrewardError as error:
        news.put(("failure", seed, type(error)(f"seed {seed}: {error}")))
    except Exception as error:
        last = traceback.format_exc().strip()
        news.put(("failure", seed, PolyrewardError(f"seed {seed} failed: {type(error).__name__}: {error}\n{last}")))


def _at_once(recipe: Recipe) -> int:
    """How many seeds run together: a model of one's own needs the machine, the small one needs one thread.

    Up to two small ones share a processor: three seeds on two processors then take three halves of the time of one, not
    twice.
    """
    if recipe.policy.model is not None:
        return 1
    return 2 * processors()
