"""Runs a study: seeds over processes or a Ray cluster, finished seeds kept, the result written as JSON.

A finished seed goes to ``<output>/.partial/<slug>.json`` at once. An interrupted run goes on from there when the study,
its configuration and the source of the library's parts are the same. Only a full run writes ``<output>/<slug>.json``: a
quick one writes to ``<output>/quick/``, one with fewer seeds than the study fixes to ``<output>/few-seeds/``.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import polyreward
from polyreward.catalogue import find
from polyreward.errors import InvalidInputError, PolyrewardError, require
from polyreward.rewards.executor_ray import connect
from polyreward.storage import write_json
from polyreward.studies.base import Figures, Judgement, Study, StudyConfig

NOT_FINGERPRINTED = ("audit", "cli.py", "commands", "integrations", "report")

Outcome = tuple[int, Any, float, str | None]
Progress = Callable[[int, int], None]


class StudyError(PolyrewardError, RuntimeError):
    """A seed of a study failed; the message names study and seed and holds the traceback."""


@dataclass(frozen=True)
class StudyResult:
    """The record of a study, as stored, and the file that holds it."""

    record: dict[str, Any]
    path: Path


def result_path(study: Study, output: Path, quick: bool, seeds: int) -> Path:
    """Where the result goes; a quick run or one with fewer seeds never replaces a full one."""
    folder = output / "quick" if quick else output if seeds >= study.seeds else output / "few-seeds"
    return folder / f"{study.slug}.json"


def run_study(
    study: Study,
    config: StudyConfig | None = None,
    *,
    seeds: int | None = None,
    workers: int | None = None,
    ray_address: str | None = None,
    output: str | Path = "results",
    progress: Progress | None = None,
) -> StudyResult:
    """Run every seed, judge, and write the result.

    Parameters
    ----------
    seeds : int or None
        Number of seeds, from 0 up; None for the study's own number, or 2 in a quick run.
    workers : int or None
        Processes, or CPUs of a local Ray cluster; None for one a core.
    ray_address : str or None
        "local" for a cluster on this machine, or the address of a running one, on whose nodes polyreward and
        ``config.data`` are in the same place.
    progress : (finished, total) -> None

    Raises
    ------
    StudyError
        A seed failed. Finished seeds are kept.
    InvalidInputError
        A figure is NaN or infinite, or seeds, device or Ray address cannot be used.
    StorageError
        The output cannot be written; found out before the first seed runs.
    """
    config, started = config or StudyConfig(), time.perf_counter()
    count = seeds if seeds is not None else min(2, study.seeds) if config.quick else study.seeds
    if count < 1:
        raise InvalidInputError(f"seeds must be at least 1, got {count}")
    _check_device(config.device, ray_address)
    path = result_path(study, Path(output), config.quick, count)
    kept = Path(output) / ".partial" / f"{study.slug}{'.quick' if config.quick else ''}.json"
    key = _key(study, config)
    done, before = _finished(kept, key)
    report = progress or (lambda finished, total: None)

    def keep() -> None:
        runs = {str(seed): done[seed] for seed in sorted(done)}
        write_json(kept, {"key": key, "wall_seconds": before + time.perf_counter() - started, "runs": runs})
        report(sum(seed in done for seed in range(count)), count)

    keep()
    missing = [seed for seed in range(count) if seed not in done]
    outcomes = (
        _on_ray(study, config, missing, workers, ray_address)
        if ray_address
        else _on_processes(study, config, missing, workers)
    )
    with contextlib.closing(outcomes):
        for seed, figures, seconds, failure in outcomes:
            if failure is not None:
                raise StudyError(f"study {study.slug}, seed {seed} failed:\n{failure}")
            done[seed] = {"figures": _finite(study, seed, figures), "seconds": seconds}
            keep()
    wall = before + time.perf_counter() - started
    record = _record(study, config, [done[seed] for seed in range(count)], wall)
    write_json(path, record)
    kept.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other studies may be under way
        kept.parent.rmdir()
    return StudyResult(record, path)


def judge_runs(study: Study, runs: Sequence[Figures], quick: bool) -> Judgement:
    """Verdict of the study's rule; "not judged" in a quick run or with fewer seeds than the study fixes."""
    judged = study.judge(runs)
    if quick or len(runs) < study.seeds:
        return Judgement("not judged", judged.effect, judged.interval, judged.summary, judged.checks)
    return judged


def _finished(kept: Path, key: str) -> tuple[dict[int, dict[str, Any]], float]:
    """Seeds that an interrupted run finished, and its wall time; none when it was another run or cannot be read."""
    with contextlib.suppress(OSError, ValueError, LookupError, AttributeError, TypeError):
        stored = json.loads(kept.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return {int(seed): run for seed, run in stored["runs"].items()}, float(stored["wall_seconds"])
    return {}, 0.0


def _check_device(device: str, ray_address: str | None) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InvalidInputError(f"{device!r} is not a device that torch knows, for example cpu or cuda") from error
    if kind == "cuda" and not ray_address and not torch.cuda.is_available():
        raise InvalidInputError(f"device {device!r}: torch finds no CUDA device on this machine")


def _record(study: Study, config: StudyConfig, runs: Sequence[dict[str, Any]], wall: float) -> dict[str, Any]:
    figures = [run["figures"] for run in runs]
    judged, method = judge_runs(study, figures, config.quick), find(study.method)
    if not all(map(math.isfinite, (judged.effect, *judged.interval))):
        raise InvalidInputError(f"study {study.slug}: effect or interval is not finite: {judged}")
    versions = {"python": platform.python_version(), "polyreward": polyreward.__version__}
    for package in ("torch", "numpy", "scipy", "trl", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "slug": study.slug,
        "method": study.method,
        "paper": method.title,
        "arxiv": method.arxiv,
        "claim": study.claim,
        "verdict": judged.verdict,
        "effect": float(judged.effect),
        "effect_of": study.effect,
        "interval": [float(bound) for bound in judged.interval],
        "checks": {name: bool(held) for name, held in judged.checks.items()},
        "summary": judged.summary,
        "rule": study.rule,
        "task": study.task,
        "baselines": study.baselines,
        "measure": study.measure,
        "full_scale": study.full_scale,
        "config": json.loads(json.dumps(dict(study.config), default=str)),
        "quick": config.quick,
        "data": config.data is not None,
        "device": config.device,
        "versions": versions,
        "seeds": len(figures),
        "seconds": round(sum(run["seconds"] for run in runs), 2),
        "wall_seconds": round(wall, 2),
        "date": datetime.now(UTC).date().isoformat(),
        "figures": figures,
    }


def _finite(study: Study, seed: int, figures: Figures) -> dict[str, dict[str, float]]:
    plain = {name: {key: float(value) for key, value in arm.items()} for name, arm in figures.items()}
    for name, arm in plain.items():
        for quantity, value in arm.items():
            if not math.isfinite(value):
                raise InvalidInputError(
                    f"study {study.slug}, seed {seed}, arm {name!r}: {quantity!r} is {value}, expected a finite figure"
                )
    return plain


def _key(study: Study, config: StudyConfig) -> str:
    """What must be equal for a finished seed to be used again; the number of seeds may differ."""
    source = inspect.getsource(sys.modules[study.run_seed.__module__])
    parts = (source, dict(study.config), asdict(config), polyreward.__version__, _library())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@cache
def _library() -> str:
    """Fingerprint of what a study can use: a part that changed since makes finished seeds worthless."""
    root, digest = Path(polyreward.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if place.parts[0] not in NOT_FINGERPRINTED:
            digest.update(str(place).encode() + path.read_bytes())
    return digest.hexdigest()


def _work(run_seed: Callable[..., Figures], seed: int, config: StudyConfig) -> Outcome:
    import torch

    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        figures = {name: dict(arm) for name, arm in run_seed(seed, config).items()}
    except Exception:
        return seed, None, 0.0, traceback.format_exc()
    return seed, figures, time.perf_counter() - start, None


def _start() -> None:
    """In a worker: Ctrl-C is the parent's business, and the worker ends with its parent (Linux)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _on_processes(
    study: Study, config: StudyConfig, seeds: Sequence[int], workers: int | None
) -> Generator[Outcome, None, None]:
    if not seeds:
        return
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    size = min(len(seeds), workers or os.cpu_count() or 1)
    pool = ProcessPoolExecutor(size, multiprocessing.get_context("spawn"), _start)
    processes: list[Any] = []
    try:
        before = set(multiprocessing.active_children())
        tasks = {pool.submit(_work, study.run_seed, seed, config): seed for seed in seeds}
        processes = [child for child in multiprocessing.active_children() if child not in before]
        pending: set[Future[Outcome]] = set(tasks)
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            # A failure ends the run: what else is finished comes first, so that it is kept.
            outcomes = [_outcome(task, tasks[task]) for task in finished]
            yield from sorted(outcomes, key=lambda outcome: (bool(outcome[3]), outcome[0]))
    finally:
        for process in processes:
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = threads


def _outcome(task: Future[Outcome], seed: int) -> Outcome:
    try:
        return task.result()
    except BrokenProcessPool as error:
        return seed, None, 0.0, f"its process, or one beside it, died: {error}"
    except Exception:  # the task or its figures could not be sent between processes
        return seed, None, 0.0, traceback.format_exc()


def _on_ray(
    study: Study, config: StudyConfig, seeds: Sequence[int], workers: int | None, address: str
) -> Generator[Outcome, None, None]:
    if not seeds:
        return
    ray: Any = require("ray", "ray")
    started = connect(address, workers, log_to_driver=False)
    try:
        gpus = 0.25 if config.device.startswith("cuda") else 0
        work = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_work)
        tasks = {work.remote(study.run_seed, seed, config): seed for seed in seeds}
        while tasks:
            ready, _ = ray.wait(list(tasks), num_returns=1)
            seed = tasks.pop(ready[0])
            try:
                yield ray.get(ready[0])
            except ray.exceptions.RayError as error:
                yield seed, None, 0.0, str(error)
    finally:
        if started:
            ray.shutdown()
