"""verl: every preset as an advantage estimator, and the elastic trust region as a policy loss.

Importing this module registers ``polyreward-<preset>`` for ``algorithm.adv_estimator`` and ``polyreward-etr`` for
``actor_rollout_ref.actor.policy_loss.loss_mode``. It must be imported by verl's driver and workers, which
``actor_rollout_ref.model.external_lib=polyreward.integrations.verl`` sees to. Parameters: `verl_settings`.

verl hands an estimator the token-level rewards, the mask and the uids, and a policy loss one micro batch of token
tensors in another process. What else a method needs travels with the samples: importing also wraps five functions of
verl, which stay as they are for every other estimator and loss.

    compute_advantage              rewards and columns reach the estimators from the batch
    PPOTrainer._compute_advantage  and from the queue; the radii of the trust region are put there, a field a sample
    ppo_loss                       the radii of a micro batch reach the policy loss
    PPOTrainer._save_checkpoint,
    PPOTrainer._load_checkpoint    memory of the presets is kept with the checkpoint, and settings are checked early

Papers: those of the presets, and ETR: Outcome-Guided Elastic Trust Regions for Policy Optimization (arXiv 2601.03723).
"""

# ruff: noqa: E402
from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyreward.errors import InvalidInputError, require

require("verl", "verl")

from tensordict import TensorDict
from verl.trainer.ppo import core_algos, ray_trainer
from verl.trainer.ppo.v1 import trainer_base
from verl.workers.utils import losses

from polyreward.advantages.transform import Chain, Transform
from polyreward.data.rollouts import RolloutLog
from polyreward.integrations.verl_estimators import (
    ESTIMATORS,
    known_samples,
    load_state,
    load_state_dict,
    save_state,
    state_dict,
    transform_of,
)
from polyreward.integrations.verl_samples import Samples, fields_wanted, reward_batch
from polyreward.integrations.verl_settings import (
    POLICY_LOSS,
    PREFIX,
    SECTION,
    Settings,
    make_trust_region,
    read_settings,
)

__all__ = ["POLICY_LOSS", "load_state", "load_state_dict", "register", "save_state", "state_dict"]

RADII = "polyreward_radius"
"""Field of verl's batch with the lower and upper radius of each sample, float32 (N, 2)."""

STATE_FILE = "polyreward.json"
"""Memory of the presets, beside the weights in a checkpoint's folder."""

_RADII: ContextVar[Tensor | None] = ContextVar("polyreward_radii", default=None)
_log = logging.getLogger(__name__)


def register() -> None:
    """Register estimators and policy loss, and wrap what verl needs wrapped; a second call changes nothing."""
    for name, function in ESTIMATORS.items():
        core_algos.register_adv_est(name)(function)
    core_algos.register_policy_loss(POLICY_LOSS)(elastic_policy_loss)
    _replace(ray_trainer, "compute_advantage", _with_batch)
    _replace(losses, "ppo_loss", _with_radii)
    _replace(trainer_base.PPOTrainer, "_compute_advantage", _with_queue)
    _replace(trainer_base.PPOTrainer, "_save_checkpoint", _with_saved_state)
    _replace(trainer_base.PPOTrainer, "_load_checkpoint", _with_loaded_state)


def elastic_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Clipped loss as verl computes it (dual clip, rollout weights, aggregation, metrics), in each sample's own bounds.

    Parameters as verl passes them, all token tensors (N, T). The radii come from the batch, with the metrics
    ``actor/radius_low`` and ``actor/radius_high``, their means over samples.

    Raises
    ------
    InvalidInputError
        The micro batch brought no radii.
    """
    radii = _RADII.get()
    if radii is None:
        raise InvalidInputError(
            f"the policy loss {POLICY_LOSS!r} got no radii with its samples: it needs verl's queue-based trainer "
            "(trainer.use_v1=True) and actor_rollout_ref.model.external_lib=polyreward.integrations.verl"
        )
    radii = (radii.to_padded_tensor(0.0) if radii.is_nested else radii).to(log_prob.device)
    if radii.shape != (len(log_prob), 2):
        raise InvalidInputError(f"{RADII} has shape {tuple(radii.shape)}, expected ({len(log_prob)}, 2)")
    low, high = radii[:, :1], radii[:, 1:]
    loss, metrics = core_algos.compute_policy_loss_vanilla(
        old_log_prob=old_log_prob,
        log_prob=log_prob,
        advantages=advantages,
        response_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        config=_Clipped(config, low, high),
        rollout_is_weights=rollout_is_weights,
    )
    return loss, {**metrics, "actor/radius_low": low.mean().item(), "actor/radius_high": high.mean().item()}


@contextmanager
def known_radii(radii: Tensor) -> Iterator[None]:
    """The policy loss called inside uses these radii (N, 2), lower and upper."""
    token = _RADII.set(radii)
    try:
        yield
    finally:
        _RADII.reset(token)


class _Clipped:
    """An actor's configuration with one clip ratio a sample, (N, 1) each."""

    def __init__(self, config: Any, low: Tensor, high: Tensor) -> None:
        self._config = config
        self.clip_ratio_low, self.clip_ratio_high = low, high

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _replace(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put ``wrap(function)`` in place of a function of verl, in every module that imported it by name."""
    function = getattr(owner, name, None)
    if function is None:
        raise InvalidInputError(f"this verl has no {owner.__name__}.{name}; polyreward supports verl 0.9")
    if hasattr(function, "_polyreward"):
        return
    wrapped = functools.wraps(function)(wrap(function))
    wrapped._polyreward = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "verl" and vars(module).get(name) is function:
            setattr(module, name, wrapped)


def _with_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_advantage(data: Any, adv_estimator: Any, *args: Any, **kwargs: Any) -> Any:
        if adv_estimator not in ESTIMATORS or not data.non_tensor_batch.keys() - {"uid"}:
            return original(data, adv_estimator, *args, **kwargs)
        with known_samples(Samples(data.non_tensor_batch)):
            return original(data, adv_estimator, *args, **kwargs)

    return compute_advantage


def _with_radii(original: Callable[..., Any]) -> Callable[..., Any]:
    def ppo_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> Any:
        if config.policy_loss.get("loss_mode", "vanilla") != POLICY_LOSS or RADII not in data:
            return original(config, model_output, data, dp_group)
        with known_radii(data[RADII]):
            return original(config, model_output, data, dp_group)

    return ppo_loss


def _with_queue(original: Callable[..., Any]) -> Callable[..., Any]:
    def _compute_advantage(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        settings = read_settings(self.config.algorithm)
        elastic = self.config.actor_rollout_ref.actor.policy_loss.loss_mode == POLICY_LOSS
        if self.config.algorithm.adv_estimator not in ESTIMATORS and not elastic and settings.rollout_log is None:
            return original(self, batch, metrics)
        samples = _samples_of(batch, settings)
        with known_samples(samples):
            result = original(self, batch, metrics)
        return _with_outcomes(self, result, samples, settings, elastic)

    return _compute_advantage


def _samples_of(batch: Any, settings: Settings) -> Samples:
    """Fields of the samples that verl's queue holds under the keys of `batch`."""
    data = trainer_base.tq.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=fields_wanted(settings)
    )
    padding = [bool(tag.get("is_padding", False)) for tag in batch.tags]
    return Samples.of_sessions({str(name): _values(data[name]) for name in data.keys()}, batch.keys, padding)  # noqa: SIM118


def _values(column: Any) -> list[Any]:
    if isinstance(column, Tensor) and column.is_nested:
        return list(column.unbind())
    return column.tolist() if hasattr(column, "tolist") else list(column)


def _with_outcomes(trainer: Any, batch: Any, samples: Samples, settings: Settings, elastic: bool) -> Any:
    """Put the radii of the samples into the queue, and the samples into the rollout log."""
    fields = ["uid", "advantages", "response_mask", "rm_scores"]
    data = trainer_base.tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    uids = _values(data.pop("uid"))
    data = data.to_padded_tensor(0)
    mask = data["response_mask"].bool()
    record = reward_batch(data["rm_scores"].sum(dim=-1), mask.sum(dim=-1), uids, samples, settings)
    counted = torch.tensor(range(len(mask)) if samples.counted is None else samples.counted, dtype=torch.int64)
    advantages = _per_sample(data["advantages"], mask, required=elastic)[counted]
    if settings.rollout_log is not None:
        RolloutLog(settings.rollout_log).append(record.with_columns(advantage=advantages), trainer.global_steps)
    if not elastic:
        return batch
    low, high = make_trust_region(settings, trainer.config.actor_rollout_ref.actor).bounds(advantages.double(), record)
    radii = samples.spread(torch.stack([low, high], dim=1)).float()
    return trainer_base.tq.kv_batch_put(
        keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict({RADII: radii}, batch_size=len(radii))
    )


def _per_sample(advantages: Tensor, mask: Tensor, required: bool) -> Tensor:
    """Advantage (N,) of samples whose response tokens all have the same; 0 for a sample without tokens."""
    largest = torch.where(mask, advantages, -torch.inf).amax(dim=1)
    smallest = torch.where(mask, advantages, torch.inf).amin(dim=1)
    filled = mask.any(dim=1)
    if required and bool((filled & (largest != smallest)).any()):
        raise InvalidInputError(
            f"the policy loss {POLICY_LOSS!r} needs one advantage a sample, but algorithm.adv_estimator gives a sample "
            f"tokens of different advantage (row {int((filled & (largest != smallest)).nonzero()[0])})"
        )
    mean = (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return torch.where(filled & (largest == smallest), largest, mean)


def _with_saved_state(original: Callable[..., Any]) -> Callable[..., Any]:
    def _save_checkpoint(self: Any) -> Any:
        if state_dict():  # first, so that a checkpoint which verl has declared complete has it
            save_state(Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}" / STATE_FILE)
        return original(self)

    return _save_checkpoint


def _with_loaded_state(original: Callable[..., Any]) -> Callable[..., Any]:
    def _load_checkpoint(self: Any) -> Any:
        _check(self.config)
        result = original(self)
        settings, step = read_settings(self.config.algorithm), self.global_steps
        if settings.rollout_log is not None:
            RolloutLog(settings.rollout_log).truncate(step)
        if not step:
            return result
        trainer = self.config.trainer
        folder = Path(trainer.default_local_dir) / f"global_step_{step}"
        path = (Path(trainer.resume_from_path) if trainer.resume_mode == "resume_path" else folder) / STATE_FILE
        if path.exists():
            load_state(path)
        elif _has_memory(self.config.algorithm):
            _log.warning("%s is missing: the moving averages of %s start anew", path, trainer.experiment_name)
        return result

    return _load_checkpoint


def _check(config: Any) -> None:
    """Refuse settings that cannot work before anything is generated."""
    settings, name = read_settings(config.algorithm), config.algorithm.adv_estimator
    actor = config.actor_rollout_ref.actor
    if name in ESTIMATORS:
        transform_of(str(name).removeprefix(PREFIX), config.algorithm)
    if actor.policy_loss.loss_mode == POLICY_LOSS:
        make_trust_region(settings, actor)
    elif settings.trust_region:
        raise InvalidInputError(
            f"{SECTION}.trust_region is for actor_rollout_ref.actor.policy_loss.loss_mode={POLICY_LOSS}, "
            f"but loss_mode is {actor.policy_loss.loss_mode!r}"
        )


def _has_memory(algorithm: Any) -> bool:
    if algorithm.adv_estimator not in ESTIMATORS:
        return False
    transform = transform_of(str(algorithm.adv_estimator).removeprefix(PREFIX), algorithm)
    parts = transform.parts if isinstance(transform, Chain) else (transform,)
    return any(type(part).state_dict is not Transform.state_dict for part in parts)


register()
