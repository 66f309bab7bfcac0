"""Train a language model on heterogeneous rewards: TRL's `GRPOTrainer` with composable advantages.

`PolyrewardGRPOTrainer` is a `trl.GRPOTrainer` whose advantages come from an advantage transform, whose loss may come
from an objective, and whose prompts may be drawn by a curriculum. Generation, rewards, optimiser, logging and
distribution stay TRL's. Rewards are gathered from all processes before anything is computed, so that every process sees
the same batch and the result does not depend on their number.

Of TRL's settings, an advantage transform replaces ``scale_rewards`` and ``multi_objective_aggregation`` (refused unless
at their defaults); an objective replaces ``loss_type``, ``epsilon``, ``epsilon_high`` and ``use_bias_correction_kl``
(its KL gradient is that of the estimator, TRL's with the correction off), and other settings of the loss are refused
beside it. Evaluation is TRL's own throughout.

GRPO: DeepSeekMath (arXiv 2402.03300).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig, GRPOTrainer

from polyreward.advantages.config import columns_of
from polyreward.advantages.transform import Transform, compute_advantages
from polyreward.batch import RewardBatch
from polyreward.curricula import Curriculum, CurriculumSampler
from polyreward.data.rollouts import RolloutLog
from polyreward.errors import InvalidInputError, MissingColumnError, nearest
from polyreward.grouped import Segments
from polyreward.objectives import ElasticTrustRegion, PolicyObjective
from polyreward.rewards.contract import name_of
from polyreward.rewards.groups import needs_group
from polyreward.storage import write_atomically
from polyreward.training.columns import completion_hash, gather_columns, text_of
from polyreward.training.likelihood import bind_rewards, wants_policy
from polyreward.training.reward_calls import checked_reward, with_reward_weights
from polyreward.training.signals import batch_statistics

ExtraColumns = Callable[..., Mapping[str, Sequence[Any]]]

_STATE = "polyreward.pt"
_OPTIONAL_COLUMNS = ("task", "stratum")
_SET_BY_ADVANTAGE = ("scale_rewards", "multi_objective_aggregation")
_REFUSED_BY_OBJECTIVE = (
    "importance_sampling_level",
    "delta",
    "top_entropy_quantile",
    "off_policy_mask_threshold",
    "entropy_coef",
    "use_adaptive_entropy",
)


class PolyrewardGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with advantage transform, objective, curriculum and rollout log.

    Parameters
    ----------
    model, reward_funcs, args, train_dataset, **trl
        As for `trl.GRPOTrainer`. A part of `advantage` or an elastic trust region that takes weights and has none gets
        ``args.reward_weights``.
    advantage : Transform, optional
        From rewards to advantages, over the rollouts of all processes. Default: TRL's own computation, bit for bit.
    objective : PolicyObjective, optional
        Default: TRL's own loss. A KL penalty needs ``args.beta`` at the same weight, for TRL to provide the reference.
    curriculum : Curriculum, optional
        Draws the prompts of each generation and hears their advantages. The dataset's own order is not used then.
    curriculum_column : str
        Column of `train_dataset` that names each row's source.
    batch_columns : sequence of str, optional
        Columns that the advantage sees and the rollout log keeps: dataset columns, columns of a rollout function, or
        columns that a reward passes to ``log_extra``. Default: ``task``, ``stratum`` and the columns that `advantage`
        names, where they exist.
    extra_columns : callable, optional
        ``extra_columns(prompts=..., completions=..., inputs=...)``, each a list of this process's B samples, returns
        further columns by name, B values each: the number of tool calls as ``stratum``, say.
    rollout_log : path, optional
        Folder of the rollout log, written by the main process, one part a generation. A run that resumes first drops
        what lies after its checkpoint, and a run that starts anew drops all.
    log_texts : bool
        Keep prompts and completions in the log, not only a hash of each completion.

    Raises
    ------
    InvalidInputError
        Settings that contradict each other; a curriculum on an iterable dataset; while training, a reward with a wrong
        number of values or an infinite one (the message names reward and row).
    MissingColumnError
        A column that the dataset lacks.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        *,
        advantage: Transform | None = None,
        objective: PolicyObjective | None = None,
        curriculum: Curriculum | None = None,
        curriculum_column: str = "task",
        batch_columns: Sequence[str] | None = None,
        extra_columns: ExtraColumns | None = None,
        rollout_log: str | Path | None = None,
        log_texts: bool = False,
        **trl: Any,
    ) -> None:
        super().__init__(model, reward_funcs, args, train_dataset, **trl)
        names = self.reward_func_names
        if len(set(names)) != len(names):
            raise InvalidInputError(f"reward functions must have distinct names, got {names}; set their __name__")
        self._check_sharding()
        policy = (self.model, self.processing_class, self.chat_template_kwargs)
        bound, self._direct_terms = bind_rewards(self.reward_funcs, names, self._reward_weights(), *policy)
        self.reward_funcs: list[Any] = [
            reward if isinstance(reward, nn.Module) else checked_reward(reward, name)
            for reward, name in zip(bound, names, strict=True)
        ]
        self._check_groups()
        self.advantage, self.objective, self.curriculum = advantage, objective, curriculum
        self.extra_columns, self.log_texts = extra_columns, log_texts
        self.rollout_log = None if rollout_log is None else RolloutLog(rollout_log)
        if batch_columns is None:
            of_advantage = () if advantage is None else columns_of(advantage)
            self._columns = tuple(dict.fromkeys((*_OPTIONAL_COLUMNS, curriculum_column, *of_advantage)))
        else:
            self._columns = tuple(batch_columns)
        self._required_columns = () if batch_columns is None else self._columns
        self._batch: RewardBatch | None = None
        self._task_labels: list[Any] | None = None
        self._sampler: CurriculumSampler | None = None
        if advantage is not None:
            self._refuse(_SET_BY_ADVANTAGE, "an advantage transform")
            self.advantage = with_reward_weights(advantage, self._reward_weights())
        if objective is not None:
            self._check_objective(objective)
            region = objective.trust_region
            if isinstance(region, ElasticTrustRegion) and region.weights is None:
                self.objective = replace(objective, trust_region=replace(region, weights=self._reward_weights()))
        if self.rollout_log is not None and self.accelerator.is_main_process:
            self.add_callback(_DropLaterRollouts(self.rollout_log))
        if curriculum is not None:
            self._sampler = self._make_sampler(curriculum, curriculum_column)

    def _check_sharding(self) -> None:
        """A reward that scores with the policy needs it whole in every process."""
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            for reward in filter(wants_policy, self.reward_funcs):
                raise InvalidInputError(
                    f"the reward {name_of(reward)!r} is scored by the policy, which FSDP and ZeRO-3 spread over "
                    "processes; give it a model and tokenizer of its own"
                )

    def _check_groups(self) -> None:
        """A reward that compares the samples of a prompt must get all of them in one call."""
        local = self.args.per_device_train_batch_size * self.args.steps_per_generation
        whole = self.accelerator.num_processes == 1 or local % self.num_generations == 0
        for reward in self.reward_funcs:
            if not whole and needs_group(reward):
                raise InvalidInputError(
                    f"the reward {name_of(reward)!r} compares the completions of a prompt, and "
                    f"per_device_train_batch_size * steps_per_generation = {local} splits groups of num_generations="
                    f"{self.num_generations} over processes; make it a multiple"
                )

    def _reward_weights(self) -> dict[str, float]:
        weights = self.args.reward_weights or [1.0] * len(self.reward_func_names)
        return dict(zip(self.reward_func_names, weights, strict=True))

    def _refuse(self, options: Sequence[str], by: str) -> None:
        for option in options:
            value = getattr(self.args, option)
            if value != GRPOConfig.__dataclass_fields__[option].default:
                raise InvalidInputError(f"{option}={value!r} has no effect beside {by}; leave it at its default")

    def _check_objective(self, objective: PolicyObjective) -> None:
        self._refuse(_REFUSED_BY_OBJECTIVE, "an objective")
        weight = 0.0 if objective.kl is None else objective.kl.weight
        if weight != self.beta:
            raise InvalidInputError(
                f"the objective's KL weight is {weight} and GRPOConfig's beta is {self.beta}; set both to the same "
                "value (beta makes TRL provide the reference log-probabilities)"
            )

    def _make_sampler(self, curriculum: Curriculum, column: str) -> CurriculumSampler:
        known = getattr(self.train_dataset, "column_names", None) or []
        if not hasattr(self.train_dataset, "__len__") or not hasattr(self.train_dataset, "__getitem__"):
            raise InvalidInputError(
                "a curriculum draws rows by number and cannot use an iterable dataset; load it as a datasets.Dataset"
            )
        if column not in known:
            raise MissingColumnError(
                f"train_dataset has no column {column!r} for the curriculum{nearest(column, known)}"
            )
        rng = np.random.default_rng(self.args.seed)
        return CurriculumSampler(list(self.train_dataset[column]), curriculum, rng)

    # From prompts to advantages ---------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        # Drawn here and not by the data loader, which reads ahead and would use outdated probabilities.
        if self._sampler is not None:
            inputs, sources = self._draw(self._sampler, len(inputs))
        output = super()._generate_and_score_completions(inputs)
        batch, self._batch = self._batch, None
        assert batch is not None
        log = self._logs["advantages"]
        if self.advantage is None:
            everyone = self.accelerator.gather(output["advantages"])
        else:
            everyone = compute_advantages(self.advantage, batch)
            for _ in range(min(len(everyone), len(log))):
                log.pop()
            log.extend(everyone.tolist())
        start = self.accelerator.process_index * len(inputs)
        local = slice(start, start + len(inputs))
        output["advantages"] = everyone[local]
        for term in self._direct_terms:
            output |= term.tensors(len(inputs), self.accelerator.device)
        if self.objective is not None:
            self._add_objective_inputs(output, everyone, batch, local)
        if self._sampler is not None:
            self._sampler.curriculum.update(sources, everyone)
        self._record(batch, everyone)
        return output

    def _draw(self, sampler: CurriculumSampler, size: int) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Draw new prompts: `size` samples of this process, and the sources of the samples of all processes."""
        copies = self.num_generations
        rows, codes = sampler.draw(size * self.accelerator.num_processes // copies)
        start = self.accelerator.process_index * size
        chosen = np.repeat(rows, copies)[start : start + size]
        return [dict(self.train_dataset[int(row)]) for row in chosen], np.repeat(codes, copies)

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.model.training:
            columns = self._gather_columns(inputs, prompts, completions, completion_ids_list)
            self._batch = RewardBatch.from_trl(rewards, self.reward_func_names, self.num_generations, **columns)
        return rewards

    def _gather_columns(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], ids: list[Any]
    ) -> dict[str, list[Any]]:
        """Columns of the samples of all processes, in the order of the gathered rewards."""
        local: dict[str, Sequence[Any]] = {
            name: [row.get(name) for row in inputs] for name in self._columns if any(name in row for row in inputs)
        }
        local |= {name: values for name, values in self._pending_extra_logs.items() if name in self._columns}
        if self.extra_columns is not None:
            local |= self.extra_columns(prompts=prompts, completions=completions, inputs=inputs)
        local["length"] = [len(tokens) for tokens in ids]
        if self.rollout_log is not None:
            local["completion_hash"] = [completion_hash(tokens) for tokens in ids]
            if self.log_texts:
                local |= {"prompt": [text_of(p) for p in prompts], "completion": [text_of(c) for c in completions]}
        columns = gather_columns(local, len(completions))
        for name in self._required_columns:
            if name not in columns:
                raise MissingColumnError(
                    f"neither the dataset nor a reward provides the column {name!r}{nearest(name, columns)}"
                )
        return columns

    def _record(self, batch: RewardBatch, advantages: Tensor) -> None:
        """Log figures of the batch, and the batch itself on the main process."""
        batch = batch.to("cpu")
        advantages = advantages.detach().cpu()
        metrics = self._metrics["train"]
        for name, value in batch_statistics(batch, advantages).items():
            metrics[name].append(value)
        if self.curriculum is not None:
            for name, probability in zip(self.curriculum.names, self.curriculum.probabilities().tolist(), strict=True):
                metrics[f"curriculum/{name}"].append(probability)
        if self.rollout_log is not None and self.accelerator.is_main_process:
            # The step that these rollouts are generated for; a checkpoint of step s needs the parts up to s.
            self.rollout_log.append(batch.with_columns(advantage=advantages), step=self.state.global_step + 1)

    # From advantages to the loss --------------------------------------------------------------------------------------

    def _add_objective_inputs(
        self, output: dict[str, Any], advantages: Tensor, batch: RewardBatch, local: slice
    ) -> None:
        """Bounds and task of each sample, as tensors that are shuffled and split with it."""
        assert self.objective is not None
        for name, bound in zip(("clip_low", "clip_high"), self.objective.bounds(advantages, batch), strict=True):
            output[name] = torch.as_tensor(bound, dtype=advantages.dtype, device=advantages.device).expand(
                len(advantages)
            )[local]
        self._task_labels = None
        if "task" in batch.columns:
            tasks = batch.segments("task")
            self._task_labels = [tasks.label(code) for code in range(tasks.count)]
            output["task_code"] = tasks.codes[local].to(advantages.device)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = self._policy_loss(model, inputs)
        for term in self._direct_terms if self.model.training else ():
            with self.accelerator.autocast():
                value = term.value(model, inputs)
            loss = loss - term.factor * value / self.current_gradient_accumulation_steps
            mean = self.accelerator.gather(value.detach()).mean().item()
            self._metrics["train"][f"direct_term/{term.__name__}"].append(mean)
        return loss

    def _policy_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.objective is None or not self.model.training:
            return super()._compute_loss(model, inputs)
        tokens = inputs["completion_ids"]
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], tokens], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            tokens.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs.get(name) for name in _FORWARD_INPUTS},
        )
        old_logps = inputs.get("old_per_token_logps")
        advantages = inputs["advantages"]
        if "importance_sampling_ratio" in inputs:
            # The surrogate is linear in the advantage, so weighting a token's loss is weighting its advantage.
            advantages = (advantages.unsqueeze(1) * inputs["importance_sampling_ratio"]).expand_as(logps)
        tasks = None
        if self._task_labels is not None:
            tasks = Segments(inputs["task_code"], len(self._task_labels), self._task_labels)
        result = self.objective(
            logps,
            logps.detach() if old_logps is None else old_logps,
            advantages,
            mask,
            reference_logp=inputs.get("ref_per_token_logps"),
            low=inputs["clip_low"],
            high=inputs["clip_high"],
            entropy=entropies,
            tasks=tasks,
            normaliser=self._normaliser(inputs),
        )
        self._log_objective(result.metrics)
        loss = result.loss
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss
            self._metrics["train"]["aux_loss"].append(self.accelerator.gather(aux_loss).mean().item())
        return loss / self.current_gradient_accumulation_steps

    def _normaliser(self, inputs: dict[str, Any]) -> Tensor | None:
        """Mean number of tokens of a micro-batch, which makes a token mean run over the whole generation batch."""
        assert self.objective is not None
        if self.objective.aggregation != "token-mean":
            return None
        parts = self.accelerator.num_processes * self.args.steps_per_generation
        return inputs["num_items_in_batch"].clamp(min=1) / parts

    def _log_objective(self, metrics: dict[str, Tensor]) -> None:
        tasks = [f"entropy/{label}" for label in self._task_labels or ()]
        names = [*(name for name in metrics if not name.startswith("entropy/")), *tasks]
        absent = torch.full((), torch.nan, device=self.accelerator.device)
        values = torch.stack([metrics.get(name, absent).detach().float() for name in names])
        means = self.accelerator.gather(values).view(-1, len(names)).nanmean(dim=0).tolist()
        for name, value in zip(names, means, strict=True):
            self._metrics["train"][name if name in ("kl", "entropy") else f"objective/{name}"].append(value)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        cycle = self.args.steps_per_generation * self.num_iterations
        if self._step % cycle:  # completions that later steps still train on
            own = self._buffer_file(output_dir)
            write_atomically(own, lambda path: torch.save((self._buffered_inputs, self._task_labels), path))
        if self.args.should_save:
            state = {
                "step": self._step,
                "tokens": self._total_train_tokens,
                "advantage": {} if self.advantage is None else self.advantage.state_dict(),
                "curriculum": None if self._sampler is None else self._sampler.state_dict(),
            }
            write_atomically(Path(output_dir) / _STATE, lambda path: torch.save(state, path))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._resume(Path(checkpoint))

    def _resume(self, checkpoint: Path) -> None:
        if not (checkpoint / _STATE).is_file():
            if self._sampler is not None or (self.advantage is not None and self.advantage.state_dict()):
                raise InvalidInputError(f"{checkpoint} has no {_STATE}: it was not saved by a PolyrewardGRPOTrainer")
            return
        state = torch.load(checkpoint / _STATE, weights_only=True)
        if (state["curriculum"] is None) != (self._sampler is None):
            raise InvalidInputError(f"{checkpoint} was saved with{'out' if self._sampler else ''} a curriculum")
        self._step, self._total_train_tokens = state["step"], state["tokens"]
        if self.advantage is not None:
            self.advantage.load_state_dict(state["advantage"])
        if self._sampler is not None:
            self._sampler.load_state_dict(state["curriculum"])
        own = self._buffer_file(checkpoint)
        if own.is_file():
            self._buffered_inputs, self._task_labels = torch.load(
                own, weights_only=True, map_location=self.accelerator.device
            )

    def _buffer_file(self, folder: str | Path) -> Path:
        return Path(folder) / f"polyreward_rollouts_{self.accelerator.process_index}.pt"


class _DropLaterRollouts(TrainerCallback):
    """Rollouts after the step at which training begins belong to an interrupted run."""

    def __init__(self, log: RolloutLog) -> None:
        self.log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.log.truncate(state.global_step)


_FORWARD_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
