"""Check `polyreward.integrations.verl` against verl itself: its registries, configuration, tensors, queue and losses.

Run by `make test-verl` in an environment of its own. Prints a line a check and closes with "N passed, N failed".
Words on the command line select checks by their names.
"""

# ruff: noqa: D102, D103, E402

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    HF_HUB_OFFLINE="1",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_USAGE_STATS_ENABLED="0",
    TQ_LOGGING_LEVEL="ERROR",
    VERL_LOGGING_LEVEL="ERROR",
)
warnings.filterwarnings("ignore")

import numpy as np
import torch
from torch import Tensor

torch.set_num_threads(1)

CHECKS: list[Callable[[], None]] = []
OURS = "polyreward-"
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS.append(function)
    return function


def expect(condition: Any, message: str) -> None:
    if not bool(condition):
        raise AssertionError(message)


def close(found: Any, expected: Any, tolerance: float, what: str) -> None:
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    expect(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    gap = float((found - expected).abs().max()) if found.numel() else 0.0
    expect(gap <= tolerance, f"{what}: differs by {gap:.3g}, allowed {tolerance:.3g}")


@contextlib.contextmanager
def refused(error: type[Exception], *words: str) -> Iterator[None]:
    try:
        yield
    except error as raised:
        for word in words:
            expect(word in str(raised), f"the error does not say {word!r}: {raised}")
        return
    raise AssertionError(f"no {error.__name__} was raised")


def configuration(*overrides: str) -> Any:
    """Verl's own configuration, composed by Hydra as its command line does."""
    return copy.deepcopy(composed(overrides))


@functools.cache
def composed(overrides: tuple[str, ...]) -> Any:
    from hydra import compose, initialize_config_module

    given = ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2", "actor_rollout_ref.rollout.n=4", *overrides]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", given)


def actor_configuration(*overrides: str) -> Any:
    from verl.utils.config import omega_conf_to_dataclass

    return omega_conf_to_dataclass(configuration(*overrides).actor_rollout_ref.actor)


def rollouts(seed: int, sizes: Sequence[int] = (4, 4, 1, 3, 4, 1), binary: bool = False) -> Any:
    """A `DataProto` as verl has it before advantages: shuffled uids, ragged lengths, two rewards and their sum."""
    from verl import DataProto

    generator = np.random.default_rng(seed)
    uids = np.repeat([f"prompt-{seed}-{group}-é" for group in range(len(sizes))], sizes)
    order = generator.permutation(len(uids))
    uids = uids[order].astype(object)
    rows, width, prompt = len(uids), 9, 3
    lengths = generator.integers(1, width + 1, rows)
    mask = torch.from_numpy(np.arange(width) < lengths[:, None]).long()
    accuracy = generator.integers(0, 2, rows).astype(np.float32)
    style = generator.normal(0.3, 2.0, rows).astype(np.float32)
    score = accuracy if binary else accuracy + style
    rewards = torch.zeros(rows, width)
    rewards[torch.arange(rows), torch.from_numpy(lengths) - 1] = torch.from_numpy(score)
    return DataProto.from_dict(
        tensors={
            "prompts": torch.ones(rows, prompt, dtype=torch.long),
            "responses": torch.ones(rows, width, dtype=torch.long),
            "attention_mask": torch.cat([torch.ones(rows, prompt, dtype=torch.long), mask], dim=1),
            "response_mask": mask,
            "token_level_rewards": rewards,
            "token_level_scores": rewards.clone(),
        },
        non_tensors={
            "uid": uids,
            "accuracy": accuracy,
            "style": style,
            "data_source": np.array([f"source-{int(uid.split('-')[2]) % 2}" for uid in uids], dtype=object),
            "stratum": np.asarray(generator.integers(0, 2, rows)),
            "num_turns": np.asarray(generator.integers(1, 3, rows)),
            "extra_info": np.array([{"level": int(uid.split("-")[2]) % 3} for uid in uids], dtype=object),
        },
    )


def advantages(data: Any, name: str, *overrides: str) -> Tensor:
    """Advantages (N, T) by verl's `compute_advantage`, with the keywords its trainers pass."""
    from verl.trainer.ppo.ray_trainer import compute_advantage

    algorithm = configuration(f"algorithm.adv_estimator={name}", *overrides).algorithm
    data = data.select(deepcopy=True)
    result = compute_advantage(
        data,
        adv_estimator=algorithm.adv_estimator,
        gamma=algorithm.gamma,
        lam=algorithm.lam,
        num_repeat=4,
        norm_adv_by_std_in_grpo=algorithm.get("norm_adv_by_std_in_grpo", True),
        config=algorithm,
    )
    return result.batch["advantages"]


REWARDS = "+algorithm.polyreward.rewards=[accuracy,style]"


@check
def every_preset_is_in_verls_registry() -> None:
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, get_adv_estimator_fn, get_policy_loss_fn

    import polyreward.integrations.verl as ours
    from polyreward.advantages.presets import PRESETS

    found = {name.removeprefix(OURS) for name in ADV_ESTIMATOR_REGISTRY if name.startswith(OURS)}
    expect(found == set(PRESETS), f"registered {sorted(found)}, expected {sorted(PRESETS)}")
    expect(callable(get_adv_estimator_fn("polyreward-gaussian-grpo")), "not callable")
    expect(get_policy_loss_fn("polyreward-etr") is ours.elastic_policy_loss, "another loss is registered")
    before = dict(ADV_ESTIMATOR_REGISTRY)
    ours.register()
    expect(before == ADV_ESTIMATOR_REGISTRY, "registering twice changes the registry")


@check
def importing_by_verls_own_hooks_registers() -> None:
    program = (
        "from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY as a, POLICY_LOSS_REGISTRY as p\n"
        "import verl.workers.engine_workers as w, verl.trainer.ppo.v1.utils as u\n"
        "wrapped = hasattr(w.ppo_loss, '_polyreward') and hasattr(u.compute_advantage, '_polyreward')\n"
        "print('polyreward-grpo' in a, 'polyreward-etr' in p, wrapped)"
    )
    hooks = {
        "environment": ("import verl\n" + program, {"VERL_USE_EXTERNAL_MODULES": "polyreward.integrations.verl"}),
        "external_lib": (
            "import contextlib, verl.workers.engine_workers, verl.trainer.ppo.v1  # as in a worker and in the driver\n"
            "from verl.workers.config import HFModelConfig\n"
            "with contextlib.suppress(Exception): HFModelConfig(path='/nowhere', "
            f"external_lib='polyreward.integrations.verl')\n{program}",
            {},
        ),
    }
    for name, (code, environment) in hooks.items():
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        expect(done.stdout.strip().endswith("True True True"), f"{name}: {done.stdout[-300:]} {done.stderr[-600:]}")


@check
def every_preset_runs_through_compute_advantage() -> None:
    from polyreward.advantages.presets import PRESETS

    sizes = (4, 4, 2, 3, 4)  # a moving scale refuses groups of one
    for name in PRESETS:
        for overrides in ((), (REWARDS,)):
            data = rollouts(7, sizes)
            found, mask = advantages(data, OURS + name, *overrides), data.batch["response_mask"]
            expect(found.shape == mask.shape and found.dtype == torch.float32, f"{name}: {found.shape} {found.dtype}")
            expect(torch.isfinite(found).all() and found.abs().sum() > 0, f"{name}: not finite, or nothing")
            close(found * (1 - mask), torch.zeros_like(found), 0.0, f"{name} at masked tokens")
            shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
            again = advantages(data.select_idxs(shuffled), OURS + name, *overrides)
            if not name.startswith("ema"):  # has memory
                close(again, found[shuffled], 1e-6, f"{name} after shuffling the rows")


@check
def dtype_is_kept() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        data = rollouts(3)
        data.batch["token_level_rewards"] = data.batch["token_level_rewards"].to(dtype)
        found = advantages(data, OURS + "grpo-verl")
        expect(found.dtype == dtype, f"{dtype} became {found.dtype}")


@check
def equal_to_verls_grpo() -> None:
    for seed in range(5):
        for norm in (True, False):
            setting = f"algorithm.norm_adv_by_std_in_grpo={norm}"
            data = rollouts(seed)
            expected = advantages(data, "grpo", setting)
            close(advantages(data, OURS + "grpo-verl", setting), expected, 1e-6, f"seed {seed}, {setting}")
        close(
            advantages(rollouts(seed), OURS + "grpo-verl"), advantages(rollouts(seed), "grpo_vectorized"), 2e-6,
            f"seed {seed}, vectorized",
        )  # fmt: skip


@check
def a_group_of_equal_rewards_gets_exactly_zero_where_verl_divides_rounding_by_epsilon() -> None:
    data = rollouts(0, (7, 7))
    data.batch["token_level_rewards"] = (data.batch["token_level_rewards"] != 0) * 10.1
    expect(advantages(data, "grpo").abs().max() > 0.1, "verl's noise is gone: compare these groups too")
    expect((advantages(data, OURS + "grpo-verl") == 0).all(), "not exactly 0")


@check
def equal_to_verls_rloo() -> None:
    for seed in range(5):
        data = rollouts(seed)
        expected = advantages(data, "rloo")
        close(advantages(data, OURS + "rloo-verl"), expected, 1e-6, f"seed {seed}")
        expected = advantages(data, "rloo_vectorized")
        setting = "+algorithm.polyreward.parameters.singleton=zero"
        close(advantages(data, OURS + "rloo-verl", setting), expected, 1e-6, f"seed {seed}, vectorized")


@check
def equal_to_verls_reinforce_plus_plus() -> None:
    for seed in range(5):
        for name in ("reinforce_plus_plus", "reinforce_plus_plus_baseline"):
            data = rollouts(seed)
            expected = advantages(data, name)
            close(advantages(data, f"{OURS}{name.replace('_', '-')}-verl"), expected, 1e-6, f"{name}, seed {seed}")


@check
def equal_to_verls_gdpo() -> None:
    keys = "+algorithm.gdpo_reward_keys=[accuracy,style]"
    for seed in range(5):
        for extra in ((), ("+algorithm.gdpo_reward_weights=[0.7,2.0]",)):
            data = rollouts(seed)
            expected = advantages(data, "gdpo", keys, *extra)
            close(advantages(data, OURS + "gdpo-verl", keys, *extra), expected, 1e-6, f"seed {seed} {extra}")
    data = rollouts(0)
    weights = "+algorithm.polyreward.parameters.weights={accuracy:0.7,style:2.0}"
    expected = advantages(data, "gdpo", keys, "+algorithm.gdpo_reward_weights=[0.7,2.0]")
    close(advantages(data, OURS + "gdpo-verl", REWARDS, weights), expected, 1e-6, "by our own keys")


@check
def rewards_columns_and_parameters_come_from_the_configuration() -> None:
    from polyreward.advantages.presets import gaussian_grpo, stratified_grpo
    from polyreward.advantages.transform import compute_advantages
    from polyreward.batch import RewardBatch

    data = rollouts(11)
    fields, mask = data.non_tensor_batch, data.batch["response_mask"]
    first = torch.arange(len(data)), mask.argmax(dim=1)
    stacked = np.stack([fields["accuracy"], fields["style"]], axis=1).astype(np.float64)
    levels = [row["level"] for row in fields["extra_info"]]

    def direct(transform: Any, **columns: Any) -> Tensor:
        batch = RewardBatch(torch.from_numpy(stacked), ("accuracy", "style"), list(fields["uid"]), columns)
        return compute_advantages(transform, batch)

    found = advantages(data, OURS + "gaussian-grpo", REWARDS)[first]
    close(found, direct(gaussian_grpo(), task=list(fields["data_source"])), 1e-6, "task from data_source")
    found = advantages(data, OURS + "gaussian-grpo", REWARDS, "+algorithm.polyreward.columns.task=level")[first]
    close(found, direct(gaussian_grpo(), task=levels), 1e-6, "task from extra_info")
    found = advantages(data, OURS + "gaussian-grpo", REWARDS, "+algorithm.polyreward.parameters.by=level")[first]
    close(found, direct(gaussian_grpo(by="level"), level=levels), 1e-6, "a column named by a parameter")
    usual = advantages(data, OURS + "stratified-grpo", REWARDS)[first]
    close(usual, direct(stratified_grpo(), stratum=fields["stratum"]), 1e-6, "stratum")
    setting = "+algorithm.polyreward.parameters.blend=0.1"
    found = advantages(data, OURS + "stratified-grpo", REWARDS, setting)[first]
    close(found, direct(stratified_grpo(blend=0.1), stratum=fields["stratum"]), 1e-6, "blend")
    expect((found - usual).abs().max() > 1e-2, "the parameter changes nothing")
    setting = "+algorithm.polyreward.parameters.by=[data_source,level]"
    expect(torch.isfinite(advantages(data, OURS + "stratified-grpo", setting)).all(), "crossed strata")


@check
def a_reward_of_none_does_not_apply() -> None:
    data = rollouts(4, (4, 4))
    style = data.non_tensor_batch["style"].astype(object)
    style[0] = None
    data.non_tensor_batch["style"] = style
    found = advantages(data, OURS + "gdpo", "+algorithm.polyreward.rewards=[style]")
    expect(torch.isfinite(found).all() and (found[0] == 0).all(), "the sample without the reward has an advantage")
    expect((found[1:].abs().sum(dim=1) > 0).all(), "the others have none")


@check
def mistakes_are_refused_with_the_nearest_name() -> None:
    from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError

    data, section = rollouts(5), "+algorithm.polyreward."
    with refused(UnknownNameError, "blnd", "did you mean 'blend'"):
        advantages(data, OURS + "stratified-grpo", section + "parameters.blnd=0.1")
    with refused(UnknownNameError, "algorithm.polyreward has no key 'reward'", "did you mean 'rewards'"):
        advantages(data, OURS + "grpo", section + "reward=[accuracy]")
    with refused(MissingColumnError, "acuracy", "did you mean 'accuracy'", "reward function"):
        advantages(data, OURS + "gdpo", section + "rewards=[acuracy,style]")
    with refused(MissingColumnError, "columns.task", "did you mean 'data_source'"):
        advantages(data, OURS + "gaussian-grpo", section + "columns.task=datasource")
    with refused(MissingColumnError, "no column 'task'", "+algorithm.polyreward.columns."):
        advantages(data.select(non_tensor_batch_keys=["uid"]), OURS + "gaussian-grpo")
    with refused(InvalidInputError, "algorithm.gamma"):
        advantages(data, OURS + "reinforce-plus-plus-verl", "algorithm.gamma=0.9")
    with refused(InvalidInputError, "use_kl_in_reward"):
        advantages(data, OURS + "gdpo", REWARDS, "algorithm.use_kl_in_reward=True")
    with refused(InvalidInputError, "blend"):
        advantages(data, OURS + "stratified-grpo", section + "parameters.blend=2")
    with refused(InvalidInputError, "'uid'"):
        advantages(data.select(non_tensor_batch_keys=["accuracy"]), OURS + "grpo")


@check
def memory_is_kept_saved_and_restored() -> None:
    import polyreward.integrations.verl as ours
    from polyreward.errors import InvalidInputError, MissingFileError

    name, sizes = OURS + "ema-grpo", (4, 4, 3)
    ours.load_state_dict({})
    first = advantages(rollouts(1, sizes), name)
    second = advantages(rollouts(2, sizes), name)
    ours.load_state_dict({})
    fresh = advantages(rollouts(2, sizes), name)
    expect((fresh - second).abs().max() > 1e-3, "the first batch leaves no trace")
    with tempfile.TemporaryDirectory() as folder:
        ours.load_state_dict({})
        close(advantages(rollouts(1, sizes), name), first, 0.0, "first batch again")
        path = ours.save_state(Path(folder) / "state.json")
        ours.load_state_dict({})
        ours.load_state(path)
        close(advantages(rollouts(2, sizes), name), second, 0.0, "second batch after restoring")
        with refused(MissingFileError, "nothing.json"):
            ours.load_state(Path(folder) / "nothing.json")
        path.write_text("[")
        with refused(InvalidInputError, "not valid JSON"):
            ours.load_state(path)
    ours.load_state_dict({})


def token_tensors(seed: int, rows: int = 8, width: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)
    old = -torch.rand(rows, width, generator=generator) * 3
    new = (old + 0.5 * torch.randn(rows, width, generator=generator)).requires_grad_()
    return old, new, torch.randn(rows, 1, generator=generator) * 2 * mask, mask


def radii_of(advantages: Tensor, uids: Sequence[int], scores: Tensor, *overrides: str) -> Tensor:
    from polyreward.batch import RewardBatch
    from polyreward.integrations.verl_settings import make_trust_region, read_settings

    config = configuration(*overrides)
    region = make_trust_region(read_settings(config.algorithm), config.actor_rollout_ref.actor)
    per_sample = torch.where(advantages.abs().amax(1) > 0, advantages[:, 0], 0.0).double()
    low, high = region.bounds(per_sample, RewardBatch(scores, (), list(uids)))
    return torch.stack([low, high], dim=1).float()


@check
def without_elasticity_the_loss_is_verls_bit_for_bit() -> None:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    from polyreward.integrations.verl import known_radii

    for seed, (low, high) in enumerate([(0.2, 0.2), (0.2, 0.28), (0.1, 0.4), (0.37, 0.61)]):
        clip = (f"actor_rollout_ref.actor.clip_ratio_low={low}", f"actor_rollout_ref.actor.clip_ratio_high={high}")
        flat = ("+algorithm.polyreward.trust_region={micro:0,macro:0}",)
        config = actor_configuration(*clip)
        old, new, weight, mask = token_tensors(seed)
        scores = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
        radii = radii_of(weight, [0, 0, 0, 0, 1, 1, 1, 1], scores, *clip, *flat)
        for aggregation in AGGREGATIONS:
            for rollout_weights in (None, torch.rand(mask.shape)):
                losses, gradients, metrics = [], [], []
                for mode in ("vanilla", "polyreward-etr"):
                    new.grad = None
                    with known_radii(radii):
                        loss, figures = get_policy_loss_fn(mode)(
                            old_log_prob=old,
                            log_prob=new,
                            advantages=weight,
                            response_mask=mask,
                            loss_agg_mode=aggregation,
                            config=config,
                            rollout_is_weights=rollout_weights,
                        )
                    loss.backward()
                    losses.append(loss.detach())
                    gradients.append(new.grad.clone())
                    metrics.append(figures)
                what = f"clip {low}, {high}, {aggregation}"
                close(losses[1], losses[0], 0.0, f"loss, {what}")
                close(gradients[1], gradients[0], 0.0, f"gradient, {what}")
                expect(metrics[0].items() <= metrics[1].items(), f"metrics {metrics}, {what}")
                expect(abs(metrics[1]["actor/radius_low"] - low) < 1e-6, f"radius {metrics[1]}, {what}")


@check
def the_elastic_loss_follows_its_formula_and_its_gradient_is_right() -> None:
    from polyreward.integrations.verl import elastic_policy_loss, known_radii

    clip = "actor_rollout_ref.actor.clip_ratio_high=0.3"
    config = actor_configuration(clip)
    old, new, weight, mask = (t.double() if t.is_floating_point() else t for t in token_tensors(9))
    new = new.detach().requires_grad_()
    scores = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    radii = radii_of(weight, [0, 0, 0, 0, 1, 1, 1, 1], scores, clip)
    expect(radii[:4].mean() > radii[4:].mean() and radii.unique().numel() > 4, f"radii {radii}")

    def loss(log_prob: Tensor) -> Tensor:
        with known_radii(radii.double()):
            return elastic_policy_loss(old, log_prob, weight, mask, "token-mean", config)[0]

    total, count = 0.0, 0
    for row in range(len(old)):
        for token in range(old.shape[1]):
            if not mask[row, token]:
                continue
            ratio = float((new[row, token] - old[row, token]).exp())
            advantage, (low, high) = float(weight[row, token]), radii[row].double().tolist()
            surrogate = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
            total += min(surrogate, -advantage * 3.0) if advantage < 0 else surrogate
            count += 1
    close(loss(new), total / count, 1e-12, "loss")
    expect(torch.autograd.gradcheck(loss, (new,), eps=1e-7), "gradcheck")


@check
def a_loss_without_radii_is_refused() -> None:
    from polyreward.errors import InvalidInputError, UnknownNameError
    from polyreward.integrations.verl import elastic_policy_loss, known_radii

    old, new, weight, mask = token_tensors(2)
    config = actor_configuration()
    with refused(InvalidInputError, "got no radii", "trainer.use_v1=True", "external_lib"):
        elastic_policy_loss(old, new, weight, mask, "token-mean", config)
    with refused(InvalidInputError, "(3, 2)", "(8, 2)"), known_radii(torch.full((3, 2), 0.2)):
        elastic_policy_loss(old, new, weight, mask, "token-mean", config)
    scores = torch.zeros(8)
    with refused(UnknownNameError, "mirco", "did you mean 'micro'"):
        radii_of(weight, range(8), scores, "+algorithm.polyreward.trust_region.mirco=0.1")
    with refused(InvalidInputError, "clip_ratio_low"):
        radii_of(weight, range(8), scores, "+algorithm.polyreward.trust_region.low=0.1")


class Queue:
    """A Ray cluster of this process with verl's TransferQueue, and a batch of it as verl's agent loop puts it there."""

    def __init__(self, data: Any) -> None:
        from verl.trainer.ppo.v1.trainer_base import tq
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        rows, seen, keys = [], {}, []
        for row in range(len(data)):
            uid = data.non_tensor_batch["uid"][row]
            session = seen[uid] = seen.get(uid, -1) + 1
            length = int(data.batch["response_mask"][row].sum())
            fields = {name: data.non_tensor_batch[name][row] for name in data.non_tensor_batch}
            rows.append(
                {
                    "uid": uid,
                    "prompts": torch.ones(3, dtype=torch.long),
                    "responses": torch.ones(length, dtype=torch.long),
                    "response_mask": torch.ones(length, dtype=torch.long),
                    "rm_scores": data.batch["token_level_rewards"][row, :length],
                    "old_log_probs": -torch.rand(length, generator=torch.Generator().manual_seed(row)),
                    "num_turns": int(fields["num_turns"]),
                    "data_source": fields["data_source"],
                    "extra_info": fields["extra_info"],
                    "extra_fields": {
                        "reward_extra_info": {
                            "accuracy": float(fields["accuracy"]),
                            "style": float(fields["style"]),
                            "stratum": int(fields["stratum"]),
                        }
                    },
                }
            )
            keys.append(f"{uid}_{session}_0")
        tags = [{"status": "success", "seq_len": 3 + len(row["responses"])} for row in rows]
        self.tq = tq
        self.batch = tq.kv_batch_put(
            keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(rows), tags=tags
        )

    def get(self, *fields: str) -> Any:
        return self.tq.kv_batch_get(
            keys=self.batch.keys, partition_id="train", select_fields=list(fields)
        ).to_padded_tensor(0)

    def clear(self) -> None:
        self.tq.kv_clear(keys=self.batch.keys, partition_id="train")


def start_queue() -> None:
    import ray
    import transfer_queue as tq
    from omegaconf import OmegaConf

    if ray.is_initialized():
        return
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    config = configuration().transfer_queue
    OmegaConf.update(config, "backend.SimpleStorage.num_data_storage_units", 1)
    tq.init(config)


def trainer(*overrides: str, step: int = 3) -> Any:
    """Verl's default trainer without workers."""
    from verl.trainer.ppo.v1 import PPOTrainerSync

    made = PPOTrainerSync.__new__(PPOTrainerSync)
    made.config, made.global_steps, made.use_critic = configuration(*overrides), step, False
    made.trainer_mode = "sync"
    return made


@check
def the_queue_brings_rewards_and_columns_to_the_estimators() -> None:
    import polyreward.integrations.verl as ours

    start_queue()
    for name in ("gaussian-grpo", "stratified-grpo", "gdpo-verl", "grpo", "ema-grpo"):
        data = rollouts(21, (4, 4, 3))
        queue = Queue(data)
        extra = (REWARDS, "+algorithm.polyreward.columns={task:level,stratum:num_turns}")
        trainer(f"algorithm.adv_estimator={OURS}{name}", *extra)._compute_advantage(queue.batch, {})
        found = queue.get("advantages")["advantages"]
        ours.load_state_dict({})
        expected = advantages(data, OURS + name, *extra)[:, : found.shape[1]]
        ours.load_state_dict({})
        close(found, expected, 1e-6, name)
        queue.clear()


@check
def a_field_with_one_value_for_all_is_still_a_column() -> None:
    start_queue()
    data = rollouts(22, (4, 4))
    data.non_tensor_batch["data_source"][:] = "gsm8k"
    data.non_tensor_batch["extra_info"][:] = [{"level": 1}] * len(data)
    queue = Queue(data)
    trainer(f"algorithm.adv_estimator={OURS}gaussian-grpo")._compute_advantage(queue.batch, {})
    found = queue.get("advantages")["advantages"]
    close(found, advantages(data, OURS + "gaussian-grpo")[:, : found.shape[1]], 1e-6, "advantages")
    queue.clear()


@check
def synthetic_rows_and_earlier_outputs_of_a_session_count_for_nothing() -> None:
    start_queue()
    from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    data = rollouts(23, (4, 4))
    name, plain = f"algorithm.adv_estimator={OURS}reinforce-plus-plus", Queue(data)
    trainer(name, REWARDS)._compute_advantage(plain.batch, {})
    expected = plain.get("advantages")["advantages"]
    plain.clear()
    queue = Queue(data)
    queue.batch = upsample_batch_to_divisible_size(queue.batch, 7, eos_token_id=0)
    expect(len(queue.batch) == 14, f"{len(queue.batch)} rows")
    last = queue.tq.kv_batch_get(keys=[queue.batch.keys[2]], partition_id="train")[0]
    later = {key: (value.clone() if isinstance(value, Tensor) else value) for key, value in dict(last).items()}
    later["rm_scores"] = later["rm_scores"] * 0 + 100
    later["extra_fields"] = {"reward_extra_info": {"accuracy": 100.0, "style": 0.0, "stratum": 0}}
    key = queue.batch.keys[2][:-1] + "1"
    queue.tq.kv_batch_put(
        keys=[key], partition_id="train", fields=list_of_dict_to_tensordict([later]), tags=[dict(queue.batch.tags[2])]
    )
    queue.batch.keys.append(key)
    queue.batch.tags.append(dict(queue.batch.tags[2]))
    # the appended row is now the last output of session 2, so it replaces row 2 in the statistics
    changed = data.select(deepcopy=True)
    changed.non_tensor_batch["accuracy"][2], changed.non_tensor_batch["style"][2] = 100.0, 0.0
    expected_changed = advantages(changed, OURS + "reinforce-plus-plus", REWARDS)
    trainer(name, REWARDS)._compute_advantage(queue.batch, {})
    found = queue.get("advantages")["advantages"]
    close(found[:8], expected_changed[:, : found.shape[1]], 1e-6, "real rows")
    close(found[8:14], torch.zeros(6, found.shape[1]), 0.0, "synthetic rows")
    close(found[14], found[2], 0.0, "the outputs of one session")
    expect((found[:8, : expected.shape[1]] - expected).abs().max() > 0.1, "the last output changes nothing")
    queue.clear()


@check
def the_radii_travel_from_the_driver_to_the_workers_loss() -> None:
    start_queue()
    import verl.utils.tensordict_utils as tu
    from verl.utils.transferqueue_utils import _meta_to_realdata
    from verl.workers.engine.utils import prepare_micro_batches
    from verl.workers.engine_workers import ppo_loss

    from polyreward.batch import RewardBatch
    from polyreward.objectives import ElasticTrustRegion

    for estimator in ("grpo", OURS + "grpo-verl"):
        data = rollouts(31, (4, 4, 4), binary=True)
        queue = Queue(data)
        overrides = (
            f"algorithm.adv_estimator={estimator}",
            "actor_rollout_ref.actor.policy_loss.loss_mode=polyreward-etr",
            "actor_rollout_ref.actor.clip_ratio_high=0.3",
            "+algorithm.polyreward.trust_region.micro=0.5",
        )
        meta = trainer(*overrides)._compute_advantage(queue.batch, {})
        weight = advantages(data, estimator)[:, 0].double()
        batch = RewardBatch(data.batch["token_level_rewards"].sum(1), (), list(data.non_tensor_batch["uid"]))
        low, high = ElasticTrustRegion(low=0.2, high=0.3, micro=0.5).bounds(weight, batch)
        close(queue.get("polyreward_radius")["polyreward_radius"], torch.stack([low, high], 1), 1e-6, "radii")

        fetched = _meta_to_realdata(meta)  # what a worker does with the batch it is sent
        tu.assign_non_tensor(
            fetched, use_dynamic_bsz=False, micro_batch_size_per_gpu=3, dp_size=1, batch_num_tokens=None
        )
        tu.assign_non_tensor(fetched, global_batch_size=None)
        config = actor_configuration(*overrides)
        total, seen = 0.0, []
        for mini in tu.make_iterator(fetched, mini_batch_size=6, epochs=1, seed=5, dataloader_kwargs={"shuffle": True}):
            for micro in prepare_micro_batches(mini)[0]:
                lengths = [len(row) for row in micro["responses"].unbind()]
                logs = [row + 0.4 * torch.randn(len(row)) for row in micro["old_log_probs"].unbind()]
                # the model's output has prompt and response, shifted by one
                whole = [torch.cat([torch.zeros(2), row, torch.zeros(1)]) for row in logs]
                output = {"log_probs": torch.nested.as_nested_tensor(whole, layout=torch.jagged)}
                loss, metrics = partial(ppo_loss, config=config)(model_output=output, data=micro)
                expect("actor/radius_low" in metrics, f"metrics {sorted(metrics)}")
                expected, count = 0.0, sum(lengths)
                for row, log in enumerate(logs):
                    below, above = micro["polyreward_radius"][row].double().tolist()
                    ratio = (log - micro["old_log_probs"].unbind()[row]).double().exp()
                    sample = micro["advantages"].unbind()[row].double()
                    surrogate = torch.maximum(-sample * ratio, -sample * ratio.clamp(1 - below, 1 + above))
                    bounded = torch.where(sample < 0, torch.minimum(surrogate, -sample * 3.0), surrogate)
                    expected += float(bounded.sum())
                    seen.append((below, above))
                close(loss, expected / count, 1e-5, "loss of a micro batch")
                total += float(loss)
        expect(len(seen) == 12 and len(set(seen)) >= 3, f"radii seen: {seen}")
        queue.clear()


@check
def an_elastic_loss_refuses_advantages_that_differ_between_tokens() -> None:
    start_queue()
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    from polyreward.errors import InvalidInputError

    queue = Queue(rollouts(32, (4, 4)))
    ADV_ESTIMATOR_REGISTRY["by-token"] = lambda token_level_rewards, **_: (torch.rand_like(token_level_rewards),) * 2
    overrides = (
        "algorithm.adv_estimator=by-token", "actor_rollout_ref.actor.policy_loss.loss_mode=polyreward-etr",
    )  # fmt: skip
    with refused(InvalidInputError, "one advantage a sample"):
        trainer(*overrides)._compute_advantage(queue.batch, {})
    del ADV_ESTIMATOR_REGISTRY["by-token"]
    queue.clear()


@check
def what_is_not_ours_stays_verls() -> None:
    start_queue()
    queue = Queue(rollouts(33, (4, 4)))
    meta = trainer("algorithm.adv_estimator=grpo")._compute_advantage(queue.batch, {})
    expect("polyreward_radius" not in meta.fields, "a field was added")
    found = queue.get("advantages")["advantages"]
    close(found, advantages(rollouts(33, (4, 4)), "grpo")[:, : found.shape[1]], 0.0, "advantages")
    queue.clear()


@check
def the_rollout_log_is_written_and_read() -> None:
    start_queue()
    from polyreward.data.rollouts import read_rollouts

    with tempfile.TemporaryDirectory() as folder:
        data = rollouts(41, (4, 4))
        queue = Queue(data)
        overrides = (f"algorithm.adv_estimator={OURS}gdpo", REWARDS, f"+algorithm.polyreward.rollout_log={folder}")
        trainer(*overrides)._compute_advantage(queue.batch, {})
        log = read_rollouts(folder)
        expect(log.names == ("accuracy", "style"), f"rewards {log.names}")
        close(log.reward("style"), data.non_tensor_batch["style"], 1e-6, "style")
        expect({"advantage", "task", "stratum", "step", "length"} <= set(log.columns), f"columns {sorted(log.columns)}")
        expect(log.segments("group").count == 2, "groups")
        queue.clear()


@check
def a_checkpoint_carries_the_memory_and_wrong_settings_stop_the_run_early() -> None:
    import polyreward.integrations.verl as ours
    from polyreward.errors import InvalidInputError, UnknownNameError

    name, sizes = f"algorithm.adv_estimator={OURS}ema-grpo", (4, 4, 3)
    with tempfile.TemporaryDirectory() as folder:
        place = f"trainer.default_local_dir={folder}"
        ours.load_state_dict({})
        advantages(rollouts(1, sizes), OURS + "ema-grpo")
        made = trainer(name, place, step=7)
        made.actor_rollout_wg = SimpleNamespace(save_checkpoint=lambda *_, **__: None, load_checkpoint=lambda **_: None)
        made.train_dataloader = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
        made.checkpoint_callback = SimpleNamespace(on_save=lambda **_: None)
        made._save_checkpoint()
        second = advantages(rollouts(2, sizes), OURS + "ema-grpo")
        ours.load_state_dict({})
        made.global_steps = 0
        made._load_checkpoint()
        expect(made.global_steps == 7, f"resumed at {made.global_steps}")
        close(advantages(rollouts(2, sizes), OURS + "ema-grpo"), second, 0.0, "after resuming")
        ours.load_state_dict({})
        stored = json.loads((Path(folder) / "global_step_7" / "polyreward.json").read_text())
        expect(list(stored) == ["ema-grpo"] and stored["ema-grpo"], f"stored {stored}")
        with refused(UnknownNameError, "did you mean 'decay'"):
            trainer(name, place, "+algorithm.polyreward.parameters.decai=0.5")._load_checkpoint()
        with refused(InvalidInputError, "trust_region", "loss_mode"):
            trainer(name, place, "+algorithm.polyreward.trust_region.micro=0.5")._load_checkpoint()


@check
def verls_rollout_dumps_are_read() -> None:
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.trainer.ppo.v1 import PPOTrainerSync

    from polyreward.data.rollouts import read_rollouts

    data = rollouts(51, (3, 3, 2))
    score = data.batch["token_level_rewards"].sum(1)
    uids = list(data.non_tensor_batch["uid"])
    texts = [f"question of {uid}" for uid in uids]
    for kind, extras in (
        (PPOTrainerSync, {"uid": [f"{uid}_{row}_0" for row, uid in enumerate(uids)]}),
        (RayPPOTrainer, {name: data.non_tensor_batch[name].tolist() for name in ("accuracy", "style")}),
    ):
        with tempfile.TemporaryDirectory() as folder:
            made = kind.__new__(kind)
            made._init_dump_executor()
            for step in (1, 2):
                made.global_steps = step
                made._dump_generations(texts, ["an answer"] * 8, [None] * 8, score.tolist(), dict(extras), folder)
            made._shutdown_dump_executor()
            batch = read_rollouts(folder)
            expect(len(batch) == 16 and batch.segments("group").count == 6, f"{kind.__name__}: {len(batch)} rows")
            close(batch.rewards.nan_to_num().sum(1), torch.cat([score, score]), 1e-5, f"{kind.__name__}: scores")
            expected = ("score",) if kind is PPOTrainerSync else ("accuracy", "style")
            expect(batch.names == expected, f"{kind.__name__}: rewards {batch.names}")


def main() -> int:
    passed = failed = 0
    chosen = sys.argv[1:]
    for function in CHECKS:
        if chosen and not any(word in function.__name__ for word in chosen):
            continue
        output, title = io.StringIO(), function.__name__.replace("_", " ")
        try:
            with contextlib.redirect_stdout(output):
                function()
        except Exception:
            failed += 1
            print(f"FAIL  {title}\n{traceback.format_exc()}", flush=True)
        else:
            passed += 1
            print(f"ok    {title}", flush=True)
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        import transfer_queue as tq

        with contextlib.redirect_stdout(io.StringIO()):
            tq.close()
            sys.modules["ray"].shutdown()
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
