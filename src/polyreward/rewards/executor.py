"""Rewards in processes of their own, in parallel, with a time limit for every sample.

A reward is a person's own code: it can loop for ever, leak, or crash the interpreter. `RewardExecutor` keeps that out
of the training loop. Samples are spread over worker processes; one that is over its limit is killed, together with all
that its worker started, and only it is lost.

    with RewardExecutor(workers=4, time_limit=5.0) as executor:
        trainer = GRPOTrainer(model, reward_funcs=[executor.wrap(passes_tests), executor.wrap(brevity)], ...)

What can go wrong, and what becomes of it:

- An exception, the time limit, the end of the worker (``os._exit``, a segmentation fault, no memory): None for that
  sample, and one `RewardFailureWarning` a call, which names the reward, the first row and its traceback.
- A result that is no reward (a wrong number of values, a text, an infinite number), a column that the reward reads and
  the batch does not have (`MissingColumnError`), a reward that cannot be loaded in a worker: an error. These would fail
  in the same way for every sample of every batch.

The executor isolates mistakes, not malice: workers have the rights of the process that started them.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from numbers import Integral, Real
from typing import Any, NoReturn

import cloudpickle

from polyreward.errors import InvalidInputError, PolyrewardError
from polyreward.rewards.contract import Reward, RewardFunction, is_listing, name_of
from polyreward.rewards.executor_pool import LocalPool, Outcome, Task
from polyreward.rewards.groups import needs_batch

HOOKS = ("log_extra", "log_metric")
_log = logging.getLogger(__name__)
_keys = count()


class RewardFailureWarning(RuntimeWarning):
    """Samples of a call were not scored: the reward failed on them."""


@dataclass(frozen=True)
class RewardTiming:
    """What a reward has cost since the executor was made.

    Attributes
    ----------
    calls, samples : int
    seconds : float
        Time that callers waited.
    busy_seconds : float
        Time that workers spent in the reward; a sample killed at the limit counts with the limit.
    slowest : float
        Largest time of one sample, or of one batch for a reward that sees the whole batch.
    timeouts, exceptions, crashes : int
        Samples that were not scored, by cause.
    """

    calls: int = 0
    samples: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0
    slowest: float = 0.0
    timeouts: int = 0
    exceptions: int = 0
    crashes: int = 0

    @property
    def mean(self) -> float:
        """Mean time of a sample in its worker."""
        return self.busy_seconds / self.samples if self.samples else 0.0

    def __add__(self, other: RewardTiming) -> RewardTiming:
        sums = {name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__}
        return RewardTiming(**{**sums, "slowest": max(self.slowest, other.slowest)})


class RewardExecutor:
    """Runs rewards in worker processes.

    Workers start with the first call and stay until `close` (or the end of the ``with`` block, or of the process,
    however it ends). Wrapped rewards may be called from several threads; their calls take turns. Workers run with
    ``OMP_NUM_THREADS=1``, unless the variable is set.

    Parameters
    ----------
    workers : int or None
        Number of processes; default one a CPU that this process may use, or one a CPU of the Ray cluster.
    time_limit : float
        Seconds for one sample.
    queue : int
        Most samples that are pickled and not finished, which bounds memory.
    ray_address : str or None
        Spread the workers over a Ray cluster: an address, ``"auto"``, or ``"local"`` for one on this machine. A session
        that is connected already is used as it is.
    start_limit : float
        Seconds for a worker to start and load a reward, imports included.

    Raises
    ------
    InvalidInputError
        A number that is not positive, or not whole where it counts.
    MissingExtraError
        Ray is asked for and not installed.
    """

    def __init__(
        self,
        workers: int | None = None,
        time_limit: float = 10.0,
        queue: int = 256,
        ray_address: str | None = None,
        start_limit: float = 120.0,
    ) -> None:
        if workers is not None:
            _check_positive("RewardExecutor: workers", workers, whole=True)
        _check_positive("RewardExecutor: queue", queue, whole=True)
        _check_positive("RewardExecutor: time_limit", time_limit)
        _check_positive("RewardExecutor: start_limit", start_limit)
        self.time_limit = float(time_limit)
        self._timings: dict[str, RewardTiming] = {}
        self._lock = threading.Lock()
        self._closed = False
        if ray_address is None:
            self._pool: Any = LocalPool(workers or processors(), queue, start_limit)
        else:
            from polyreward.rewards.executor_ray import RayPool

            self._pool = RayPool(workers, queue, start_limit, ray_address)

    def wrap(
        self,
        reward: RewardFunction,
        *,
        per_sample: bool | None = None,
        time_limit: float | None = None,
        name: str | None = None,
    ) -> ExecutedReward:
        """The same reward, run by this executor.

        Parameters
        ----------
        reward : callable under the reward contract; lambdas, closures, coroutine functions, functions of a notebook
            It is copied into the workers now: what it changes in itself, or what changes around it, stays there.
        per_sample : bool or None
            Whether samples are scored one by one. False for a reward that must see the whole batch at once, such as a
            set reward or one relative to the group: the call is then one unit, run in one worker. Default: false
            where the reward compares groups or has
            ``per_sample = False``, else true.
        time_limit : float or None
            Seconds for one sample; default the executor's. With ``per_sample=False`` seconds for the whole call;
            default the executor's limit times the number of samples.
        name : str or None
            Name in logs; default the reward's own.

        Raises
        ------
        InvalidInputError
            `reward` is not callable or cannot be pickled.
        """
        title = name or name_of(reward)
        if not callable(reward):
            raise InvalidInputError(f"{reward!r} is not a reward function")
        if time_limit is not None:
            _check_positive(f"reward {title!r}: time_limit", time_limit)
        try:
            task = Task(next(_keys), title, cloudpickle.dumps(reward), [*map(str, sys.path)])
        except PolyrewardError:
            raise
        except Exception as error:
            raise InvalidInputError(
                f"reward {title!r} cannot be sent to worker processes, because something it holds does not pickle: "
                f"{type(error).__name__}: {error}; make that inside the reward, at its first call"
            ) from error
        if per_sample is None:
            per_sample = not needs_batch(reward)
        return ExecutedReward(self, reward, task, per_sample, time_limit)

    def timings(self) -> dict[str, RewardTiming]:
        """What each reward has cost so far, by name."""
        with self._lock:
            return dict(self._timings)

    def close(self) -> None:
        """Kill the workers and all that they started."""
        self._closed = True
        self._pool.close()

    def __enter__(self) -> RewardExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self, task: Task, sizes: Sequence[int], encode: Callable[[int], bytes], limit: float
    ) -> tuple[list[Outcome], RewardTiming]:
        if self._closed:
            raise PolyrewardError(f"reward {task.name!r}: its executor is closed")
        begin = time.perf_counter()
        outcomes = self._pool.run(task, len(sizes), encode, limit)
        failed = {
            kind: sum(size for size, outcome in zip(sizes, outcomes, strict=True) if outcome.kind == kind)
            for kind in ("slow", "raised", "died")
        }
        timing = RewardTiming(
            calls=1,
            samples=sum(sizes),
            seconds=time.perf_counter() - begin,
            busy_seconds=sum(outcome.seconds for outcome in outcomes),
            slowest=max(outcome.seconds for outcome in outcomes),
            timeouts=failed["slow"],
            exceptions=failed["raised"],
            crashes=failed["died"],
        )
        with self._lock:
            self._timings[task.name] = self._timings.get(task.name, RewardTiming()) + timing
        return outcomes, timing


class ExecutedReward(Reward):
    """A reward that a `RewardExecutor` runs; made by `RewardExecutor.wrap`. Range: that of the reward."""

    def __init__(
        self, executor: RewardExecutor, reward: RewardFunction, task: Task, per_sample: bool, time_limit: float | None
    ) -> None:
        self.executor, self.reward, self.per_sample, self.time_limit = executor, reward, per_sample, time_limit
        self._task = task

    @property
    def __name__(self) -> str:
        """Name in logs."""
        return self._task.name

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns that the reward reads, where it says so."""
        return tuple(getattr(self.reward, "reads", ()))

    def __reduce__(self) -> NoReturn:
        raise InvalidInputError(
            f"reward {self.__name__!r} is run by an executor and does not pickle; wrap the whole composition"
        )

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score a batch.

        Columns are split like the completions. Whatever does not pickle is not sent, ``trainer_state`` goes as its
        plain fields, and calls of ``log_extra`` and ``log_metric`` reach the trainer after the samples are scored.

        Where the trainer passes ``log_metric``, it hears ``executor/NAME/seconds`` (the caller's wait),
        ``sample_seconds_mean``, ``sample_seconds_max``, ``timeouts``, ``exceptions`` and ``crashes``.

        Raises
        ------
        InvalidInputError
            Prompts or columns of another length than the completions; a result that is no reward; a reward that cannot
            be loaded in a worker.
        MissingColumnError
            The reward reads a column that the batch does not have.
        """
        rows = len(completions)
        if rows == 0:
            return []
        batch = _Batch(self._task.name, prompts, completions, columns, self.per_sample)
        limit = self.time_limit
        if limit is None:
            limit = self.executor.time_limit * (1 if self.per_sample else rows)
        outcomes, timing = self.executor._run(self._task, [len(unit) for unit in batch.units], batch.encode, limit)
        values = [value for unit, outcome in zip(batch.units, outcomes, strict=True)
                  for value in (outcome.values if outcome.kind == "value" else [None] * len(unit))]  # fmt: skip
        self._report(timing, columns.get("log_metric"))
        batch.replay(outcomes, columns)
        if any(outcome.kind != "value" for outcome in outcomes):
            warnings.warn(batch.complaint(outcomes, timing, limit), RewardFailureWarning, stacklevel=2)
        return values

    def _report(self, timing: RewardTiming, log_metric: Any) -> None:
        figures = {
            "seconds": timing.seconds,
            "sample_seconds_mean": timing.mean,
            "sample_seconds_max": timing.slowest,
            "timeouts": timing.timeouts,
            "exceptions": timing.exceptions,
            "crashes": timing.crashes,
        }
        _log.info("reward %s: %s", self.__name__, ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        if callable(log_metric):
            for name, value in figures.items():
                log_metric(f"executor/{self.__name__}/{name}", float(value))


class _Batch:
    """A batch in the units in which workers get it."""

    def __init__(
        self, name: str, prompts: Any, completions: Sequence[Any], columns: Mapping[str, Any], per_sample: bool
    ) -> None:
        rows = len(completions)
        self.name, self.prompts, self.completions, self.per_sample = name, prompts, completions, per_sample
        self.units = [range(row, row + 1) for row in range(rows)] if per_sample else [range(rows)]
        self.hooks = [hook for hook in HOOKS if callable(columns.get(hook))]
        self.columns: dict[str, Any] = {}
        self.shared: dict[str, Any] = {}
        self.unsent: dict[str, str] = {}
        if prompts is not None and len(prompts) != rows:
            raise InvalidInputError(f"reward {name!r}: {len(prompts)} prompts for {rows} completions")
        for title, column in columns.items():
            if title in self.hooks:
                continue
            if title == "trainer_state":
                self.shared[title] = _plain_state(column)
            elif not is_listing(column):
                self.shared[title] = column
            elif len(column) != rows and per_sample:
                raise InvalidInputError(
                    f"reward {name!r}: column {title!r} has {len(column)} entries for {rows} completions; "
                    "it cannot be split by sample"
                )
            else:
                self.columns[title] = column

    def encode(self, number: int) -> bytes:
        """A unit as a worker reads it."""
        unit = self.units[number]
        try:
            return self._dumps(unit)
        except Exception:  # find out what does not pickle, and do without it
            for title, value in (self.columns | self.shared).items():
                try:
                    cloudpickle.dumps(value)
                except Exception as error:
                    self.unsent[title] = f"{type(error).__name__}: {error}"
        try:
            return self._dumps(unit)
        except Exception as error:
            raise InvalidInputError(
                f"reward {self.name!r}: row {unit[0]} cannot be sent to a worker: {type(error).__name__}: {error}"
            ) from error

    def _dumps(self, unit: range) -> bytes:
        columns = {title: _part(column, unit) for title, column in self.columns.items() if title not in self.unsent}
        shared = {title: value for title, value in self.shared.items() if title not in self.unsent}
        prompts = None if self.prompts is None else _part(self.prompts, unit)
        content = unit[0], prompts, _part(self.completions, unit), columns | shared, self.hooks, self.name
        return cloudpickle.dumps(content)  # type: ignore[no-any-return]

    def replay(self, outcomes: Sequence[Outcome], columns: Mapping[str, Any]) -> None:
        """Hand what the reward logged to the trainer, in the order of rows; None where it did not score."""
        extras: dict[str, list[Any]] = {}
        for unit, outcome in zip(self.units, outcomes, strict=True):
            for hook, title, value in outcome.logs:
                if hook == "log_metric":
                    columns[hook](title, value)
                    continue
                if len(value) != len(unit):
                    got = f"{len(value)} values for {len(unit)} completions"
                    raise InvalidInputError(f"reward {self.name!r}: log_extra({title!r}) got {got}")
                extras.setdefault(title, [None] * len(self.completions))[unit.start : unit.stop] = value
        for title, values in extras.items():
            columns["log_extra"](title, values)

    def complaint(self, outcomes: Sequence[Outcome], timing: RewardTiming, limit: float) -> str:
        """The warning about samples that were not scored."""
        unit, first = next(pair for pair in zip(self.units, outcomes, strict=True) if pair[1].kind != "value")
        counts = {f"over the time limit of {limit:g} s": timing.timeouts, "by an exception": timing.exceptions,
                  "by the end of the worker": timing.crashes}  # fmt: skip
        failed, rows = sum(counts.values()), len(self.completions)
        causes = ", ".join(f"{number} {cause}" for cause, number in counts.items() if number)
        where = f"row {unit[0]}" if self.per_sample else "the whole batch"
        what = f"killed at the time limit of {limit:g} s\n" if first.kind == "slow" else ""
        note = "".join(f"\nNot sent to workers: column {t!r} ({why})" for t, why in self.unsent.items())
        return (
            f"reward {self.name!r} failed on {failed} of {rows} samples ({causes}); they count as not scored. "
            f"First, {where}: {what}{first.text}{note}"
        )


def _check_positive(what: str, value: Any, whole: bool = False) -> None:
    if not isinstance(value, Integral if whole else Real) or not value > 0:  # type: ignore[operator]
        raise InvalidInputError(f"{what} must be a positive {'whole ' if whole else ''}number, got {value!r}")


def processors() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _part(column: Any, unit: range) -> Any:
    """The rows of a unit; a copy where the column is an array or tensor, of which a view would pickle whole."""
    if len(unit) == len(column):
        return column
    return column[list(unit)] if hasattr(column, "dtype") else [column[row] for row in unit]


def _plain_state(state: Any) -> Any:
    """A trainer's state without its history and without its class, which would load the trainer in the worker."""
    if state is None:
        return None
    fields = {name: inspect.getattr_static(state, name) for name in dir(state) if name[0] != "_"}
    return types.SimpleNamespace(**{k: v for k, v in fields.items() if isinstance(v, int | float | str | None)})
