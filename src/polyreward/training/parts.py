"""The parts a recipe names, made from their names: rewards, advantage, objective, curriculum.

Everything is resolved before a run starts, so that a misspelt name or a wrong parameter costs a second and not a night.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyreward import curricula, objectives
from polyreward.advantages.config import from_config
from polyreward.advantages.transform import Transform
from polyreward.curricula import Curriculum
from polyreward.errors import InvalidInputError, MissingFileError, PolyrewardError, UnknownNameError, nearest
from polyreward.objectives import PolicyObjective
from polyreward.rewards import REWARDS, RewardExecutor
from polyreward.rewards.executor import processors
from polyreward.training.recipe import (
    AdvantageSection,
    CurriculumSection,
    ExecutorSection,
    ObjectiveSection,
    RewardSection,
)

Reward = Callable[..., list[float | None]]

_OTHER_REWARDS = {
    "reward_model": "polyreward.reward_models.parts:stored_reward",
    "task_score": "polyreward.tasks.mixture:TaskScore",
    "answer_format": "polyreward.tasks.mixture:AnswerFormat",
    "tool_cost": "polyreward.tasks.mixture:ToolCost",
}


def make_reward(section: RewardSection, executor: RewardExecutor | None = None) -> Reward:
    """The reward of one recipe entry, under the entry's name; one of the person's own runs in the executor, if any.

    Raises
    ------
    UnknownNameError, MissingFileError, InvalidInputError
        No such built-in, module, file or function, or parameters it does not take.
    """
    wanted = section.use or section.name
    own = ":" in wanted
    reward = _configured(
        _from_reference(wanted if own else _built_in(wanted)), section.options, f"reward {section.name!r}"
    )
    if not callable(reward):
        raise InvalidInputError(f"reward {section.name!r}: {wanted} is not a function")
    if own and executor is not None:
        limit = section.time_limit
        return executor.wrap(reward, per_sample=section.per_sample, time_limit=limit, name=section.name)
    return _Named(reward, section.name)


def make_executor(section: ExecutorSection) -> RewardExecutor | None:
    """The processes in which a person's own rewards run; None where the recipe wants them in the training process.

    Without a number of workers, the processes of an ``accelerate launch`` share the CPUs.
    """
    if section.workers == 0:
        return None
    workers = section.workers
    if workers is None and section.ray is None:
        workers = max(1, processors() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return RewardExecutor(workers, section.time_limit, ray_address=section.ray)


class _Named:
    """A reward under the name that the recipe gives it."""

    def __init__(self, reward: Reward, name: str) -> None:
        self.reward, self.__name__ = reward, name

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        try:
            result: Any = self.reward(prompts=prompts, completions=completions, **columns)
            return asyncio.run(_finish(result)) if inspect.isawaitable(result) else result  # type: ignore[no-any-return]
        except PolyrewardError:
            raise
        except Exception as error:
            raise InvalidInputError(f"reward {self.__name__!r} failed: {type(error).__name__}: {error}") from error


async def _finish(result: Any) -> Any:
    return await result


def make_advantage(section: AdvantageSection, rewards: Sequence[RewardSection]) -> Transform:
    """The advantage transform of a recipe, with the weights of its rewards; GRPO where the recipe names none."""
    config = section.model_dump(exclude_defaults=True) or {"preset": "grpo"}
    return from_config(config, weights={reward.name: reward.weight for reward in rewards})


def make_objective(section: ObjectiveSection) -> PolicyObjective | None:
    """The objective of a recipe; None for TRL's own loss."""
    if section.name is None and not section.parts:
        return None
    config = dict(section.parts) or {"preset": section.name, **section.options}
    with _in_section("objective"):
        return objectives.make_objective(config)


def make_curriculum(section: CurriculumSection, tasks: Sequence[str]) -> Curriculum | None:
    """The curriculum over tasks; None for uniform draws of the rows."""
    if section.name == "uniform":
        return None
    with _in_section("curriculum"):
        return curricula.make_curriculum({"name": section.name, **section.options}, tasks)


@contextmanager
def _in_section(name: str) -> Iterator[None]:
    """Say in an error which section of the recipe it is about."""
    try:
        yield
    except PolyrewardError as error:
        raise type(error)(f"{name}: {error}") from error


def _built_in(name: str) -> str:
    known, wanted = _OTHER_REWARDS | REWARDS, name.replace("-", "_")
    if wanted not in known:
        raise UnknownNameError(
            f"no built-in reward {name!r}{nearest(wanted, known)}; your own is 'module:function' or 'path.py:function'"
        )
    return known[wanted]


def _from_reference(reference: str) -> Any:
    """The object behind ``module:name`` or ``path.py:name``."""
    source, _, name = reference.rpartition(":")
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise MissingFileError(f"reward {reference!r}: no such file: {path}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        load: Callable[[], Any] = lambda: spec.loader.exec_module(module)  # type: ignore[union-attr]  # noqa: E731
    else:
        module = None

        def load() -> Any:
            return importlib.import_module(source)

    try:
        module = load() or module
    except Exception as error:
        raise InvalidInputError(
            f"reward {reference!r}: importing it failed: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        public = [title for title in vars(module) if title[0] != "_"]
        raise UnknownNameError(f"reward {reference!r}: {source} has no {name!r}{nearest(name, public)}")
    return getattr(module, name)


def _configured(part: Any, options: Mapping[str, Any], where: str) -> Any:
    """Call a class or factory with its options; a function that is itself the reward takes none."""
    parameters = inspect.signature(part).parameters
    if not isinstance(part, type) and {"prompts", "completions"} <= set(parameters):
        if options:
            raise InvalidInputError(f"{where}: a plain function takes no options, got {sorted(options)}")
        return part
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option not in parameters and not open_ended:
            raise UnknownNameError(f"{where}: unknown option {option!r}{nearest(option, parameters)}")
    try:
        return part(**options)
    except (PolyrewardError, TypeError, ValueError) as error:
        raise InvalidInputError(f"{where}: {error}") from error
