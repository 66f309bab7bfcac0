"""The main job for one seed: prepare the policy, train it, score it, write the run folder.

    recipe.toml      the recipe with every default filled in
    policy/          the starting policy with its tokenizer (Hugging Face format)
    rollouts/        the rollout log, one Parquet part a generation step
    checkpoints/     checkpoint-N/ to resume from, final/ to use
    metrics.jsonl    one line a logged step
    timing.jsonl     what rewards, sampling and updates took, a line a step
    held_out.jsonl   the held-out score before, during and after training
    result.json      written last: the run is complete

A run that was stopped or killed goes on from its newest complete checkpoint and ends with the figures of a run that was
not.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyreward.advantages.config import columns_of
from polyreward.errors import (
    InvalidInputError,
    MissingColumnError,
    MissingExtraError,
    MissingFileError,
    StorageError,
    nearest,
)
from polyreward.rewards.contract import needed_columns, refuse_missing
from polyreward.storage import write_json, write_text
from polyreward.tasks.tools import ToolBox
from polyreward.training.evaluation import HeldOut
from polyreward.training.journal import COMPLETE, Report, read_lines
from polyreward.training.parts import (
    make_advantage,
    make_curriculum,
    make_executor,
    make_objective,
    make_reward,
)
from polyreward.training.prompts import Prompts, families_of, load_prompts
from polyreward.training.recipe import Recipe, write_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polyreward.rewards import RewardExecutor

MOST_CALLS_TOLD_APART = 3  # strata: 0, 1, 2, and 3 or more tool calls
_OF_RUN = {"task", "stratum", "tool_calls", "length", "completion_hash"}
_OF_TRAINER = ("completion_ids", "trainer_state", "log_extra", "log_metric")
_DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG)


class Stopped(KeyboardInterrupt):
    """The run was interrupted after a checkpoint; it can be resumed."""


@dataclass(frozen=True)
class Checked:
    """The parts of a recipe, resolved."""

    rewards: list[Any]
    advantage: Any
    objective: Any
    tools: ToolBox


def check_parts(recipe: Recipe, executor: RewardExecutor | None = None) -> Checked:
    """Resolve every name in the recipe and every file it points to; cheap, and before anything is written.

    Rewards of the person's own run in `executor`, if it is given.
    """
    if recipe.policy.model is not None and not Path(recipe.policy.model).exists():
        name = recipe.policy.model
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise MissingFileError(f"policy.model: no such folder: {name}")
    families_of(recipe)
    if recipe.data.path is None:
        make_curriculum(recipe.curriculum, [family.name for family in recipe.tasks.families])
    _check_machine(recipe)
    tools = ToolBox.of(recipe.tasks.tools if recipe.data.path is None else ())
    return Checked(
        [make_reward(reward, executor) for reward in recipe.rewards],
        make_advantage(recipe.advantage, recipe.rewards),
        make_objective(recipe.objective),
        tools,
    )


def check_prompts(recipe: Recipe, prompts: Prompts, parts: Checked) -> None:
    """Refuse what the prompts cannot serve: a curriculum over other tasks, columns that a reward or `by` lacks."""
    make_curriculum(recipe.curriculum, prompts.tasks)
    known = {*prompts.train[0], *_OF_TRAINER} | ({"tool_calls"} if parts.tools.tools else set())
    for reward in parts.rewards:
        refuse_missing(reward.__name__, needed_columns(reward), known)
    for column in columns_of(parts.advantage):
        if column not in known | _OF_RUN:
            raise MissingColumnError(f"advantage: no column {column!r} to group by{nearest(column, known | _OF_RUN)}")


def _check_machine(recipe: Recipe) -> None:
    settings = recipe.training
    if settings.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InvalidInputError("training.device is 'cuda', but torch finds no CUDA device here")
    if settings.report_to:
        from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

        try:
            get_reporting_integration_callbacks(list(settings.report_to))
        except ValueError as error:
            raise InvalidInputError(f"training.report_to: {error}") from error
        installed = get_available_reporting_integrations()
        for tracker in settings.report_to:
            if tracker not in (*installed, "none", "all"):
                raise MissingExtraError(f"training.report_to: {tracker!r} is not installed: pip install {tracker}")


def train_seed(recipe: Recipe, seed: int, folder: Path, report: Report = lambda *_: None) -> dict[str, Any]:
    """Run the recipe with one seed in `folder`, or go on with the run that is there; return ``result.json``.

    Raises
    ------
    PolyrewardError
        A part, file or setting of the recipe does not work; the message says which.
    StorageError
        The disk is full or not writable; what was complete before is untouched.
    Stopped
        Interrupted; the folder can be resumed.
    """
    done = folder / "result.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    with _clear_disk_errors(folder), make_executor(recipe.executor) or nullcontext() as executor:
        return _train(recipe, seed, folder, report, executor)


def _train(recipe: Recipe, seed: int, folder: Path, report: Report, executor: RewardExecutor | None) -> dict[str, Any]:
    report("starting", 0, 1, "loading libraries")
    import torch

    _quiet()
    if recipe.policy.model is None:
        torch.set_num_threads(
            1
        )  # a policy this small is slower on several threads, and the figures depend on their number
    from accelerate import PartialState

    from polyreward.training.monitor import Monitor, stop_on_interrupt

    state = PartialState(cpu=recipe.training.device == "cpu")
    main = state.is_main_process
    report = report if main else (lambda *_: None)
    parts = check_parts(recipe, executor)
    prompts = load_prompts(recipe, seed)
    check_prompts(recipe, prompts, parts)
    if main:
        write_recipe(recipe.model_copy(update={"seed": seed, "seeds": 1}), folder / "recipe.toml")
    with state.main_process_first():
        model, tokenizer = _policy(recipe, seed, folder, prompts, report)
    prompts = _worded(recipe, prompts, tokenizer)
    if isinstance(prompts.train[0]["prompt"], list) and not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError(
            f"{recipe.data.path} has chat messages as prompts, but the tokenizer of {recipe.policy.model} has no chat "
            "template; give a model that has one, or prompts as texts"
        )
    device = "cpu" if recipe.training.device == "cpu" else state.device
    scorer = parts.rewards[[reward.name for reward in recipe.rewards].index(recipe.evaluation.score)]
    judge = HeldOut(recipe, seed, prompts.held_out, tokenizer, scorer, parts.tools, folder, main)
    before = judge(model.to(device), 0)
    if before["score"] is None:
        raise InvalidInputError(
            f"the reward {recipe.evaluation.score!r} scored none of the {len(prompts.held_out)} held-out prompts, so "
            "the run would have no score; see the warnings, or name another reward in evaluation.score"
        )
    trainer = _trainer(recipe, seed, folder, parts, prompts, model, tokenizer, judge, report)
    resume = newest_checkpoint(folder)
    _forget_after(folder, int(resume.name.split("-")[1]) if resume else 0, main, state)
    with stop_on_interrupt() as stop:
        trainer.add_callback(Monitor(stop, judge, report, recipe, trainer, folder, main))
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.state.global_step < recipe.training.steps:
        raise Stopped
    after = judge(trainer.accelerator.unwrap_model(trainer.model), recipe.training.steps)
    result = {
        "name": recipe.name,
        "seed": seed,
        "steps": recipe.training.steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_before": before,
        "held_out_after": after,
    }
    trainer.save_model(str(folder / "checkpoints" / "final"))
    if main:
        write_json(folder / "result.json", result)
    state.wait_for_everyone()
    return result


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; None when there is none."""
    complete = [path.parent for path in (folder / "checkpoints").glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def _policy(recipe: Recipe, seed: int, folder: Path, prompts: Prompts, report: Report) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = recipe.policy
    source = settings.model or str(folder / "policy")
    if settings.model is None and not Path(source).is_dir():
        _make_policy(recipe, seed, Path(source), prompts, report)
    report("starting", 0, 1, "loading the policy")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=_dtype(recipe))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInputError(f"policy.model: cannot load {source!r} as a causal language model: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _make_policy(recipe: Recipe, seed: int, target: Path, prompts: Prompts, report: Report) -> None:
    from polyreward.training.policy import make_model, make_tokenizer, warm_start

    settings = recipe.policy
    families = families_of(recipe)
    if not families:
        raise InvalidInputError("policy.model is needed with data.path: the small decoder knows only the task mixture")
    tokenizer = make_tokenizer([family.name for family in families])
    model = make_model(tokenizer, width=settings.width, layers=settings.layers, heads=settings.heads, seed=seed)
    warm_start(
        model,
        tokenizer,
        families,
        steps=settings.warm_start_steps,
        batch=settings.warm_start_batch,
        learning_rate=settings.warm_start_learning_rate,
        noise=settings.warm_start_noise,
        seed=seed,
        exclude=frozenset(row["prompt"] for row in prompts.held_out),
        progress=lambda step, loss: report("warm start", step, settings.warm_start_steps, f"loss {loss:.2f}"),
    )
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(target)


def _worded(recipe: Recipe, prompts: Prompts, tokenizer: Any) -> Prompts:
    """Task prompts as chat messages where the tokenizer has a chat template; a person's own prompts as they are."""
    if recipe.data.path is not None or recipe.policy.model is None or not getattr(tokenizer, "chat_template", None):
        return prompts

    def chat(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}

    return Prompts([chat(row) for row in prompts.train], [chat(row) for row in prompts.held_out])


def _trainer(
    recipe: Recipe,
    seed: int,
    folder: Path,
    parts: Checked,
    prompts: Prompts,
    model: Any,
    tokenizer: Any,
    judge: HeldOut,
    report: Report,
) -> Any:
    from transformers import PrinterCallback, ProgressCallback
    from trl import GRPOConfig

    from polyreward.training.text import PolyrewardGRPOTrainer

    settings = recipe.training
    world = int(os.environ.get("WORLD_SIZE", "1"))
    batch = settings.prompts_per_step * settings.group_size
    if batch % world:
        raise InvalidInputError(
            f"training.prompts_per_step * group_size = {batch} completions cannot be shared by {world} processes"
        )
    local = batch // world
    micro = min(settings.micro_batch or local, local)
    if local % micro:
        raise InvalidInputError(f"training.micro_batch={micro} does not divide the {local} completions of a process")
    arguments: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": local // micro,
        "num_generations": settings.group_size,
        "num_iterations": settings.updates_per_rollout,
        "max_completion_length": settings.max_tokens,
        "temperature": settings.temperature,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": min(5, settings.steps),
        "max_steps": settings.steps,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": settings.save_every,
        "save_total_limit": 2,
        "report_to": list(settings.report_to),
        "reward_weights": [reward.weight for reward in recipe.rewards],
        "epsilon": recipe.objective.clip,
        "epsilon_high": recipe.objective.clip_high,
        "beta": recipe.objective.kl if parts.objective is None else _kl_weight(parts.objective),
        "seed": seed,
        "use_cpu": settings.device == "cpu",
        "bf16": _wants_bfloat16(recipe),
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    try:
        config = GRPOConfig(**{**arguments, **settings.trl})
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"training: TRL refuses these settings: {error}") from error
    extra: dict[str, Any] = {}
    if parts.tools.tools:
        extra["rollout_func"] = _Rollout(recipe, seed, parts.tools, tokenizer)
    trainer = PolyrewardGRPOTrainer(
        model=model,
        reward_funcs=parts.rewards,
        args=config,
        train_dataset=_dataset(prompts.train, recipe),
        processing_class=tokenizer,
        advantage=parts.advantage,
        objective=parts.objective,
        curriculum=make_curriculum(recipe.curriculum, prompts.tasks),
        extra_columns=strata_columns,
        rollout_log=folder / "rollouts",
        **extra,
    )
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    return trainer


def _dataset(rows: list[dict[str, Any]], recipe: Recipe) -> Any:
    import pyarrow as pa
    from datasets import Dataset

    try:
        return Dataset.from_list(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        for name in rows[0]:
            kinds = {type(row.get(name)).__name__ for row in rows} - {"NoneType"}
            if len(kinds) > 1:
                raise InvalidInputError(
                    f"{recipe.data.path}: column {name!r} mixes {' and '.join(sorted(kinds))}; give one kind of value"
                ) from error
        raise InvalidInputError(f"{recipe.data.path}: {error}") from error


def _kl_weight(objective: Any) -> float:
    return 0.0 if objective.kl is None else float(objective.kl.weight)


class _Rollout:
    """TRL's rollout function: trajectories in which tools answer, with their tokens masked from the loss."""

    def __init__(self, recipe: Recipe, seed: int, tools: ToolBox, tokenizer: Any) -> None:
        self.settings, self.seed, self.tools, self.tokenizer = recipe.training, seed, tools, tokenizer

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        import torch

        from polyreward.training.trajectories import prompt_tokens, sample_trajectories

        model = trainer.accelerator.unwrap_model(trainer.model)
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        # A generator of its own for each step and process: a resumed run samples what the uninterrupted one would.
        key = (self.seed * 1_000_003 + trainer.state.global_step) * 1009 + trainer.accelerator.process_index
        ids = prompt_tokens(self.tokenizer, prompts)
        found = sample_trajectories(
            model,
            self.tokenizer,
            ids,
            self.tools,
            max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
            generator=torch.Generator(device=device).manual_seed(key % 2**63),
        )
        model.train(training)
        return {
            "prompt_ids": ids,
            "completion_ids": found.completion_ids,
            "logprobs": None,
            "env_mask": found.masks,
            "tool_calls": found.calls,
        }


def strata_columns(inputs: list[dict[str, Any]], *_: Any, **__: Any) -> dict[str, list[Any]]:
    """Columns of the reward batch: the task, the number of tool calls, and the stratum made of it."""
    calls = [int(row.get("tool_calls") or 0) for row in inputs]
    return {
        "task": [str(row["task"]) for row in inputs],
        "tool_calls": calls,
        "stratum": [min(count, MOST_CALLS_TOLD_APART) for count in calls],
    }


def _forget_after(folder: Path, step: int, main: bool, state: Any) -> None:
    """Drop what the interrupted run wrote after the checkpoint it resumes from."""
    from polyreward.data.rollouts import RolloutLog

    if main:
        for path in (folder / "checkpoints").glob("checkpoint-*"):
            if not (path / COMPLETE).is_file():
                shutil.rmtree(path)
        for name in ("metrics.jsonl", "timing.jsonl", "held_out.jsonl"):
            path = folder / name
            kept = [entry for entry in read_lines(path) if entry["step"] <= step]
            if path.is_file():
                write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        if step == 0:
            shutil.rmtree(folder / "rollouts", ignore_errors=True)
        else:
            RolloutLog(folder / "rollouts").truncate(step)
    state.wait_for_everyone()


@contextmanager
def _clear_disk_errors(folder: Path) -> Iterator[None]:
    """One clear error for a disk that is full or not writable, whichever library met it."""
    from safetensors import SafetensorError

    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        text = str(error)
        number = getattr(error, "errno", None)
        disk = (
            "No space left",
            "Disk quota",
            "File too large",
            "unexpected pos",
            "PytorchStreamWriter",
            "file write failed",
        )
        if number in _DISK_ERRORS or any(sign in text for sign in disk):
            raise StorageError(
                f"cannot write to {folder}: {getattr(error, 'strerror', None) or text.splitlines()[0]}; "
                "free some space and run the same command again: it goes on from the last complete checkpoint"
            ) from error
        raise


def _dtype(recipe: Recipe) -> Any:
    import torch

    return torch.bfloat16 if _wants_bfloat16(recipe) and recipe.policy.model is not None else torch.float32


def _wants_bfloat16(recipe: Recipe) -> bool:
    import torch

    settings = recipe.training
    if settings.precision != "auto":
        return settings.precision == "bfloat16"
    return settings.device != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _quiet() -> None:
    """Keep the libraries' own bars and notices out of ours; warnings of polyreward and errors still show."""
    import logging
    import warnings

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("trl", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(trl|transformers|torch|accelerate)")
