"""Recipes: what a training run is made of, as a TOML file checked before anything starts.

A key that does not exist is refused with the nearest key that does, with the file and line it stands on.
``--set a.b=value`` on the command line overrides single values (``rewards.format.weight=0.5`` finds the reward by its
name).
"""

from __future__ import annotations

import re
import tomllib
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from polyreward.errors import InvalidInputError, MissingFileError, UnknownNameError, nearest
from polyreward.storage import toml_key, toml_value, write_text

_FORMS = ("preset", "chain", "blend")  # of an advantage


class Section(BaseModel):
    """Base of all sections: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PolicySection(Section):
    """The policy: a Hugging Face causal model, or a small decoder made and warm-started here."""

    model: str | None = Field(
        default=None,
        description="Hugging Face model name or local folder. Left out: a small decoder is made and warm-started.",
    )
    width: int = Field(default=96, ge=8, description="Hidden size of the small decoder.")
    layers: int = Field(default=3, ge=1, description="Layers of the small decoder.")
    heads: int = Field(default=4, ge=1, description="Attention heads of the small decoder; divides the width.")
    warm_start_steps: int = Field(
        default=1300, ge=0, description="Supervised steps on worked solutions of mixed quality."
    )
    warm_start_batch: int = Field(default=16, ge=1, description="Worked solutions in a supervised step.")
    warm_start_learning_rate: float = Field(default=4e-3, gt=0, description="Peak learning rate of the warm start.")
    warm_start_noise: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="How often a solution in the last third of the warm start guesses or is malformed.",
    )

    @model_validator(mode="after")
    def _divisible(self) -> PolicySection:
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width} is not a multiple of 2 * heads={2 * self.heads}")
        return self


class FamilySection(Section):
    """One task family."""

    name: str = Field(description="A dataset of reasoning-gym, e.g. chain_sum, or a family of ours.")
    points: float = Field(default=1.0, gt=0, description="What a perfect answer is worth.")
    options: dict[str, Any] = Field(default_factory=dict, description="The family's own configuration.")


class TasksSection(Section):
    """A mixture of task families: reasoning-gym's, or `write_function`, `call_tools`, `describe_counts`."""

    families: tuple[FamilySection, ...] = Field(default=(), description="The families of the mixture.")
    prompts: int = Field(default=400, ge=1, description="Training prompts a family.")
    held_out: int = Field(default=60, ge=1, description="Held-out prompts a family; never trained on.")
    style: Literal["auto", "compact", "question"] = Field(
        default="auto",
        description="compact: a few characters, for the small decoder; question: reasoning-gym's wording.",
    )
    tools: tuple[str, ...] = Field(default=("calc", "search"), description="Tools the policy may call; empty for none.")


class ColumnsSection(Section):
    """Which columns of a prompts file mean what."""

    prompt: str = Field(default="prompt", description="Column of the prompts (text or chat messages).")
    answer: str | None = Field(
        default=None, description="Column of the reference answers; default `answer` where there is one."
    )
    task: str | None = Field(
        default=None, description="Column of the task or source; default `task` where there is one."
    )


class DataSection(Section):
    """Prompts of your own, in place of a task mixture."""

    path: str | None = Field(
        default=None, description="JSONL, Parquet or CSV file, or the name of a `datasets` data set."
    )
    split: str = Field(default="train", description="Split of a `datasets` data set.")
    columns: ColumnsSection = Field(default_factory=ColumnsSection, description="Column mapping.")
    held_out: float = Field(default=0.1, gt=0, lt=1, description="Share of the prompts kept for the held-out score.")


class RewardSection(Section):
    """One reward of the run."""

    name: str = Field(description="Name in the log and the report.")
    use: str | None = Field(
        default=None,
        description="Built-in reward, `module:function` or `path.py:function`. Default: the built-in of that name.",
    )
    weight: float = Field(default=1.0, description="Weight in the sum of rewards.")
    options: dict[str, Any] = Field(default_factory=dict, description="Parameters of the reward, if it takes any.")
    per_sample: bool | None = Field(
        default=None,
        description="Of your own: false where it must see the whole batch in one call. Default: as the reward says.",
    )
    time_limit: float | None = Field(
        default=None, gt=0, description="Of your own: seconds for one sample (for the call, if not per_sample)."
    )


class ExecutorSection(Section):
    """Where rewards of your own run: in processes that are killed at a time limit, so that none can hang the run."""

    workers: int | None = Field(
        default=None, ge=0, description="Processes; default one a CPU. 0: in the training process, without a limit."
    )
    time_limit: float = Field(default=10.0, gt=0, description="Seconds for one sample; then it counts as not scored.")
    ray: str | None = Field(default=None, description="Address of a Ray cluster to spread over; `local` starts one.")


class BranchSection(Section):
    """One branch of a blend of advantages."""

    weight: float = Field(description="Factor of the branch in the sum.")
    preset: str | None = Field(default=None, description="A preset.")
    options: dict[str, Any] = Field(default_factory=dict, description="Parameters of the preset.")
    chain: tuple[dict[str, Any], ...] = Field(default=(), description="Parts in order, in place of a preset.")


class AdvantageSection(Section):
    """How rewards become advantages: a preset, a chain of parts, or a blend of several of these."""

    preset: str | None = Field(default=None, description="A preset of polyreward.advantages.presets, e.g. grpo.")
    options: dict[str, Any] = Field(default_factory=dict, description="Parameters of the preset.")
    chain: tuple[dict[str, Any], ...] = Field(
        default=(), description="Parts in order, each {part = 'Scale', by = 'task', ...}; used in place of a preset."
    )

    blend: tuple[BranchSection, ...] = Field(
        default=(), description="Branches, each {weight = 0.8, chain = [...]}; their sum."
    )

    @model_validator(mode="after")
    def _one_of(self) -> AdvantageSection:
        if sum(map(bool, (self.preset, self.chain, self.blend))) > 1:
            raise ValueError("give a preset, a chain or a blend, only one of them")
        return self


class ObjectiveSection(Section):
    """How advantages become a loss: TRL's own loss, an objective by name, or one described part by part."""

    name: str | None = Field(
        default=None, description="One of polyreward.objectives.OBJECTIVES, e.g. dapo; left out: TRL's own loss."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Parameters of the named objective.")
    parts: dict[str, Any] = Field(
        default_factory=dict,
        description="In place of a name: trust_region = {kind = 'elastic'}, aggregation = 'token-mean', ...",
    )
    clip: float = Field(default=0.2, gt=0, description="TRL's loss: clip of the probability ratio below.")
    clip_high: float | None = Field(default=0.28, gt=0, description="TRL's loss: clip of the ratio above.")
    kl: float = Field(default=0.0, ge=0, description="TRL's loss: weight of the KL term to the starting policy.")

    @model_validator(mode="after")
    def _one_loss(self) -> ObjectiveSection:
        if self.name is not None and self.parts:
            raise ValueError("give a name or parts, only one of them")
        if self.options and self.name is None:
            raise ValueError("options belong to a name")
        for key in ("clip", "clip_high", "kl"):
            if (self.name is not None or self.parts) and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} belongs to TRL's own loss; set it under options or parts of the objective")
        return self


class CurriculumSection(Section):
    """Which task the next prompts come from."""

    name: str = Field(
        default="uniform", description="One of polyreward.curricula.CURRICULA, e.g. dump (bandit on |advantage|)."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Parameters of the curriculum.")


class TrainingSection(Section):
    """Sizes and rates of the reinforcement learning."""

    steps: int = Field(default=150, ge=1, description="Optimiser steps.")
    prompts_per_step: int = Field(default=12, ge=1, description="Prompts in a step.")
    group_size: int = Field(default=8, description="Completions of a prompt; at least 2.")
    updates_per_rollout: int = Field(default=1, ge=1, description="Optimiser steps on one set of completions.")
    micro_batch: int | None = Field(
        default=None, ge=1, description="Completions on a device at once; default all of a step."
    )
    learning_rate: float = Field(default=5e-4, gt=0, description="Peak learning rate of AdamW.")
    max_tokens: int = Field(default=64, ge=1, description="Most tokens of a completion, tool results included.")
    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature.")
    save_every: int = Field(default=50, ge=1, description="Steps between checkpoints.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Where to run.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 where the GPU has it."
    )
    report_to: tuple[str, ...] = Field(default=(), description="TRL's trackers, e.g. wandb, trackio, tensorboard.")
    trl: dict[str, Any] = Field(default_factory=dict, description="Further arguments of TRL's GRPOConfig, as they are.")

    @model_validator(mode="after")
    def _groups(self) -> TrainingSection:
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size}: a group of one has no baseline; use at least 2")
        batch = self.prompts_per_step * self.group_size
        if self.micro_batch is not None and batch % self.micro_batch:
            raise ValueError(
                f"micro_batch={self.micro_batch} does not divide prompts_per_step * group_size = "
                f"{self.prompts_per_step} * {self.group_size} = {batch}"
            )
        return self


class EvaluationSection(Section):
    """The held-out evaluation before and after training."""

    every: int = Field(default=25, ge=0, description="Steps between evaluations; 0: only before and after.")
    temperature: float = Field(default=1.0, ge=0, description="0: the most likely token; else sampled.")
    samples: int = Field(default=1, ge=1, description="Completions of each held-out prompt.")
    score: str = Field(default="task_score", description="Name of the reward that is the held-out score.")


class Recipe(Section):
    """A training run."""

    name: str = Field(default="run", min_length=1, description="Name of the run; its folder is runs/<name>.")
    seed: int = Field(default=0, ge=0, description="First seed.")
    seeds: int = Field(default=1, ge=1, description="Number of seeds to run, each a process.")
    policy: PolicySection = Field(default_factory=PolicySection, description="The policy.")
    tasks: TasksSection = Field(default_factory=TasksSection, description="Task mixture.")
    data: DataSection = Field(default_factory=DataSection, description="Prompts of your own.")
    rewards: tuple[RewardSection, ...] = Field(min_length=1, description="The rewards.")
    executor: ExecutorSection = Field(default_factory=ExecutorSection, description="Where rewards run.")
    advantage: AdvantageSection = Field(default_factory=AdvantageSection, description="Rewards to advantages.")
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection, description="Advantages to loss.")
    curriculum: CurriculumSection = Field(default_factory=CurriculumSection, description="What next.")
    training: TrainingSection = Field(default_factory=TrainingSection, description="Sizes and rates.")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="Held-out score.")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [reward.name for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"reward names must be distinct, got {names}")
        if self.data.path is None and not self.tasks.families:
            raise ValueError("nothing to train on: give tasks.families or data.path")
        if self.evaluation.score not in names:
            raise ValueError(
                f"evaluation.score names no reward: {self.evaluation.score!r}{nearest(self.evaluation.score, names)}"
            )
        return self


def built_in(name: str) -> Path | None:
    """Path of a recipe that ships with polyreward, or None."""
    path = Path(str(resources.files("polyreward.training") / "recipes" / f"{name}.toml"))
    return path if path.is_file() else None


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Parameters
    ----------
    source : path of a TOML file, or the name of a built-in recipe
    overrides : ``"training.steps=20"`` and the like; values in TOML, bare words are strings

    Raises
    ------
    MissingFileError, InvalidInputError, UnknownNameError
        The message names file, line and key, and the nearest known key.
    """
    path = Path(source)
    if not path.is_file():
        found = built_in(str(source))
        if found is None:
            raise MissingFileError(
                f"no recipe {source}: neither a file nor built in (built in: {', '.join(_built_ins())})"
            )
        path = found
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _apply(values, override)
    return check_recipe(values, origin=str(path), text=text)


def check_recipe(values: dict[str, Any], origin: str = "recipe", text: str = "") -> Recipe:
    """Check the values of a recipe; `origin` and `text` say where they come from in an error."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = tuple(part for part in first["loc"])
        key = ".".join(str(part) for part in place) or "recipe"
        line = _line_of(text, place)
        where = f"{origin}, line {line}" if line else origin
        if first["type"] == "extra_forbidden":
            known = _fields_at(place[:-1])
            raise UnknownNameError(f"{where}: unknown key {key!r}{nearest(str(place[-1]), known)}") from error
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidInputError(f"{where}: {key}: {message}") from error


def write_recipe(recipe: Recipe, path: str | Path) -> Path:
    """Write the recipe with every default filled in; reading it back gives an equal recipe."""
    return write_text(path, to_toml(recipe.model_dump(mode="json", exclude_none=True)))


def to_toml(values: dict[str, Any]) -> str:
    """Plain data as TOML; lists of tables become inline."""
    lines: list[str] = []
    _table(values, (), lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _table(values: dict[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    if path:
        lines += ["", f"[{'.'.join(toml_key(part) for part in path)}]"]
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    for key, value in values.items():
        if key not in tables:
            lines.append(f"{toml_key(key)} = {toml_value(value)}")
    for key, value in tables.items():
        _table(value, (*path, key), lines)


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, raw = override.partition("=")
    if not separator or not key.strip():
        raise InvalidInputError(f"--set {override!r}: expected KEY=VALUE, e.g. training.steps=20")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    *parents, last = key.strip().split(".")
    target: Any = values
    for depth, part in enumerate(parents):
        if isinstance(target, list):
            target = _entry(target, part, ".".join(parents[:depth]))
        else:
            target = target.setdefault(part, {})
    if isinstance(target, list):
        place = next((i for i, entry in enumerate(target) if entry is _entry(target, last, ".".join(parents))), 0)
        target[place] = value
    elif isinstance(target, dict):
        # A preset replaces a chain or blend and the other way round, with the parameters that belong to it.
        if parents[-1:] == ["advantage"] and last in _FORMS and target.get(last) != value:
            for other in (*_FORMS, "options"):
                target.pop(other, None)
        target[last] = value
    else:
        raise InvalidInputError(f"--set {override!r}: {'.'.join(parents)} is a value, not a section")


def _entry(entries: list[Any], part: str, path: str) -> Any:
    if part.isdigit() and int(part) < len(entries):
        return entries[int(part)]
    named = {str(entry.get("name")): entry for entry in entries if isinstance(entry, dict)}
    if part not in named:
        raise UnknownNameError(f"{path} has no entry {part!r}{nearest(part, named)}")
    return named[part]


def _fields_at(place: Sequence[Any]) -> list[str]:
    """Names of the fields of the section at `place` of a recipe."""
    section: Any = Recipe
    for part in place:
        if isinstance(part, int) or section is None:
            continue
        section = _section_in(section.model_fields[part].annotation)
    return list(section.model_fields) if section else []


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for arg in typing.get_args(annotation) if (found := _section_in(arg))), None)


def _line_of(text: str, place: Sequence[Any]) -> int | None:
    """Line on which the key at `place` stands, as far as that shows without parsing TOML again."""
    names = [str(part) for part in place if not isinstance(part, int)]
    if not names or not text:
        return None
    header = ""
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith("["):
            header = stripped.strip("[] ").split("#")[0].strip("[] ")
            if header == ".".join(names):
                return number
        elif re.match(rf"{re.escape(names[-1])}\s*=", stripped) and header == ".".join(names[:-1]):
            return number
    return None


def _built_ins() -> list[str]:
    folder = Path(str(resources.files("polyreward.training") / "recipes"))
    return sorted(path.stem for path in folder.glob("*.toml"))
