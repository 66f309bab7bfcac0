from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from text_runs import (
    TASKS,
    brevity,
    calls_as_stratum,
    fixed_rollout,
    history,
    letters,
    policy,
    prompts,
    trainer,
)
from transformers import TrainerCallback
from trl import GRPOTrainer

from polyreward.advantages.parts import Center, WeightedSum
from polyreward.advantages.presets import gdpo_trl, grpo_trl
from polyreward.advantages.transform import Transform, chain, compute_advantages
from polyreward.curricula import AdvantageBandit, FixedWeights
from polyreward.data.rollouts import read_rollouts
from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError
from polyreward.objectives import (
    KLPenalty,
    PolicyObjective,
    dr_grpo_objective,
    etr_objective,
    gaussian_grpo_objective,
    grpo_objective,
    token_mean_objective,
)
from polyreward.rewards import weighted_sum
from polyreward.rewards.groups import GroupReward
from polyreward.training.reward_calls import checked_reward

SEVERAL_UPDATES = {"num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}


def trained(folder: Path, *args: Any, **kwargs: Any) -> Any:
    run = trainer(folder, *args, **kwargs)
    run.train()
    return run


def weights_of(run: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


@pytest.mark.parametrize("args", [{}, SEVERAL_UPDATES, {"steps_per_generation": 2, "loss_type": "grpo"}])
def test_without_parts_of_ours_the_run_is_trls_bit_for_bit(tmp_path: Path, args: dict[str, Any]) -> None:
    theirs = trained(tmp_path, GRPOTrainer, args=args)
    ours = trained(tmp_path, args=args, rollout_log=tmp_path / "rollouts")
    for expected, found in zip(history(theirs), history(ours), strict=True):
        assert expected == {name: found[name] for name in expected}
    assert torch.equal(weights_of(theirs), weights_of(ours))
    assert list(ours._logs["advantages"]) == list(theirs._logs["advantages"])


@pytest.mark.parametrize(
    ("advantage", "args"),
    [
        (grpo_trl(), {}),
        (grpo_trl(), SEVERAL_UPDATES),
        (grpo_trl(scale_rewards="batch"), {"scale_rewards": "batch"}),
        (grpo_trl(scale_rewards="none"), {"scale_rewards": "none"}),
        (gdpo_trl(), {"multi_objective_aggregation": "normalize_then_sum"}),
    ],
)
def test_the_presets_of_trl_train_like_trl(tmp_path: Path, advantage: Transform, args: dict[str, Any]) -> None:
    weights = {"reward_weights": [2.0, 0.5]}
    theirs = trained(tmp_path, GRPOTrainer, args=args | weights, rollout_func=fixed_rollout)
    kept = {name: value for name, value in args.items() if name in SEVERAL_UPDATES} | weights
    ours = trained(tmp_path, args=kept, advantage=advantage, rollout_func=fixed_rollout)
    np.testing.assert_allclose(ours._logs["advantages"], theirs._logs["advantages"], atol=1e-5)
    assert torch.allclose(weights_of(theirs), weights_of(ours), atol=1e-4)


@pytest.mark.parametrize(
    ("loss_type", "objective"),
    [
        ("grpo", grpo_objective(high=0.28)),
        ("dapo", token_mean_objective(high=0.28)),
        ("dr_grpo", dr_grpo_objective(6, high=0.28)),
    ],
)
@pytest.mark.parametrize("args", [{}, SEVERAL_UPDATES, {"steps_per_generation": 2}])
def test_an_objective_gives_the_loss_of_trl(
    tmp_path: Path, loss_type: str, objective: PolicyObjective, args: dict[str, Any]
) -> None:
    args = args | {"loss_type": loss_type, "epsilon_high": 0.28, "learning_rate": 5e-2}
    theirs = trained(tmp_path, GRPOTrainer, args=args, rollout_func=fixed_rollout)
    ours = trained(tmp_path, args=args, objective=objective, rollout_func=fixed_rollout)
    for expected, found in zip(history(theirs), history(ours), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        assert found["entropy"] == pytest.approx(expected["entropy"], rel=1e-4)
    assert torch.allclose(weights_of(theirs), weights_of(ours), atol=1e-4)


def test_the_kl_penalty_is_trls_k3(tmp_path: Path) -> None:
    start = tmp_path / "start"
    policy().save_pretrained(start)
    args = {"loss_type": "grpo", "beta": 0.5, "learning_rate": 5e-2, "use_bias_correction_kl": False}
    theirs = trained(tmp_path, GRPOTrainer, model=str(start), args=args, rollout_func=fixed_rollout)
    ours = trained(
        tmp_path, model=str(start), args=args, rollout_func=fixed_rollout, objective=PolicyObjective(kl=KLPenalty(0.5))
    )
    assert history(theirs)[-1]["kl"] > 1e-4
    for expected, found in zip(history(theirs), history(ours), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["kl"] == pytest.approx(expected["kl"], abs=1e-5)


def test_elastic_bounds_travel_with_their_samples(tmp_path: Path) -> None:
    run = trainer(tmp_path, args=SEVERAL_UPDATES, objective=etr_objective(reward_range=None), advantage=grpo_trl())
    seen: list[dict[str, torch.Tensor]] = []
    original = run._compute_loss
    run._compute_loss = lambda model, inputs: seen.append(inputs) or original(model, inputs)
    run.train()
    first = torch.cat([s["clip_high"] for s in seen[:2]]), torch.cat([s["advantages"] for s in seen[:2]])
    assert len(first[0]) == 8
    assert len(first[0].unique()) > 3
    # In the bounded form the radius grows with |A| inside a group; ranks must agree sample by sample after the shuffle.
    rewards = torch.stack(first)
    logged = history(run)[0]
    assert logged["objective/radius/high"] == pytest.approx(float(rewards[0].mean()), rel=0.2)
    everyone = run.objective.trust_region
    for radius, advantage in zip(*first, strict=True):
        assert everyone.minimum <= float(radius) <= everyone.maximum
        same = [float(r) for r, a in zip(*first, strict=True) if abs(float(a) - float(advantage)) < 1e-7]
        assert float(radius) in same


def test_importance_ratio_of_the_sampler_weighs_the_tokens(tmp_path: Path) -> None:
    run = trainer(tmp_path, objective=grpo_objective())
    run.train()
    inputs = run._buffered_inputs[0]
    run.current_gradient_accumulation_steps = 1
    ones = torch.ones_like(inputs["completion_mask"], dtype=torch.float32)
    run.model.train()
    plain = run._compute_loss(run.model, inputs)
    same = run._compute_loss(run.model, {**inputs, "importance_sampling_ratio": ones})
    half = run._compute_loss(run.model, {**inputs, "importance_sampling_ratio": 0.5 * ones[:, :1]})
    assert float(same) == pytest.approx(float(plain), abs=1e-7)
    assert float(half) == pytest.approx(0.5 * float(plain), abs=1e-7)
    masked = run._compute_loss(run.model, {**inputs, "tool_mask": torch.zeros_like(inputs["completion_mask"])})
    assert float(masked) == 0


def test_the_log_holds_the_advantages_that_are_trained_on(tmp_path: Path) -> None:
    double = chain(WeightedSum(), Center("batch"))
    run = trainer(
        tmp_path, advantage=double, rollout_log=tmp_path / "rollouts", log_texts=True, args={"log_completions": True}
    )
    trained_on: list[list[float]] = []
    original = run._compute_loss
    run._compute_loss = lambda model, inputs: (
        trained_on.append(inputs["advantages"].tolist()) or original(model, inputs)
    )
    run.train()
    batch = read_rollouts(tmp_path / "rollouts")
    assert len(batch) == 24
    assert sorted(set(batch.column("step").tolist())) == [1, 2, 3]
    assert {"task", "length", "completion_hash", "prompt", "completion"} <= set(batch.columns)
    for step, advantages in enumerate(trained_on, start=1):
        part = batch.select(batch.column("step") == step)
        np.testing.assert_allclose(sorted(part.column("advantage").tolist()), sorted(advantages), atol=1e-6)
        again = compute_advantages(double, part)
        np.testing.assert_allclose(part.column("advantage"), again, atol=1e-6)
    theirs = read_rollouts(tmp_path / "run" / "completions")  # TRL's own table
    np.testing.assert_allclose(theirs.column("advantage"), batch.column("advantage"), atol=1e-6)


def test_columns_from_data_rewards_and_the_users_function(tmp_path: Path) -> None:
    run = trained(
        tmp_path,
        advantage=chain(WeightedSum(), Center(("group", "stratum"))),
        objective=gaussian_grpo_objective(),
        rollout_func=fixed_rollout,
        extra_columns=calls_as_stratum,
        batch_columns=("task", "difficulty", "words"),
        rollout_log=tmp_path / "rollouts",
    )
    batch = read_rollouts(tmp_path / "rollouts")
    assert set(batch.column("stratum")) == {"0 calls", "1 calls"}
    assert batch.column("words").tolist() == [n - 1 for n in batch.column("length").tolist()]
    assert set(batch.column("difficulty").tolist()) <= set(range(5))
    logged = history(run)[-1]
    assert logged["stratum/0 calls/advantage"] == pytest.approx(0, abs=1e-6)
    assert logged["stratum/1 calls/share"] == 0.5
    assert {"advantage/share/letters", "advantage/share/brevity", "advantage/zero_signal"} <= set(logged)
    assert any(name.startswith("objective/entropy/") for name in logged)


def test_trackers_get_every_figure(tmp_path: Path) -> None:
    received: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            received.append(dict(logs))

    trained(tmp_path, advantage=grpo_trl(), curriculum=AdvantageBandit(TASKS), callbacks=[Tracker()])
    assert {"reward", "loss", "advantage/zero_signal", "curriculum/count", "rewards/letters/mean"} <= set(received[0])
    json.dumps(received, allow_nan=False)


def test_the_curriculum_chooses_the_prompts_and_hears_their_advantages(tmp_path: Path) -> None:
    only = FixedWeights(TASKS, {"count": 0.0, "spell": 1.0, "sort": 0.0})
    trained(tmp_path, curriculum=only, rollout_log=tmp_path / "spell")
    assert set(read_rollouts(tmp_path / "spell").column("task")) == {"spell"}
    bandit = AdvantageBandit(TASKS)
    trained(tmp_path, curriculum=bandit, rollout_log=tmp_path / "all", advantage=grpo_trl())
    batch = read_rollouts(tmp_path / "all")
    tasks = batch.column("task")
    assert bandit.counts.tolist() == [int((tasks == task).sum()) for task in TASKS]
    sizes = {
        task: float(batch.column("advantage")[torch.from_numpy(tasks == task)].abs().mean()) for task in set(tasks)
    }
    for task, learnability in zip(TASKS, bandit.learnability(), strict=True):
        assert learnability == pytest.approx(sizes.get(task, 0.0), abs=1e-6)
    assert set(batch.segments("group").sizes.tolist()) == {4}


def test_what_a_curriculum_cannot_use_is_refused(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a", "task": "count"}]))
    with pytest.raises(InvalidInputError, match="iterable"):
        trainer(tmp_path, curriculum=AdvantageBandit(TASKS), train_dataset=stream)
    with pytest.raises(MissingColumnError, match=r"'tasks'.*did you mean 'task'"):
        trainer(tmp_path, curriculum=AdvantageBandit(TASKS), curriculum_column="tasks")
    with pytest.raises(UnknownNameError, match="'sort'"):
        trainer(tmp_path, curriculum=AdvantageBandit(("count", "spell")))


@pytest.mark.parametrize(
    ("parts", "args", "message"),
    [
        ({"advantage": grpo_trl()}, {"scale_rewards": "batch"}, "scale_rewards='batch' has no effect"),
        ({"objective": grpo_objective()}, {"top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2 has no effect"),
        ({"objective": grpo_objective(kl=0.1)}, {}, "KL weight is 0.1 and GRPOConfig's beta is 0.0"),
        ({"advantage": chain(WeightedSum([1, 1]), Center())}, {"reward_weights": [1.0, 3.0]}, "set them in one place"),
        ({"reward_funcs": [letters, letters]}, {}, "distinct names"),
    ],
)
def test_contradicting_settings_are_refused(
    tmp_path: Path, parts: dict[str, Any], args: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        trainer(tmp_path, args=args, **parts)


def test_a_column_that_nobody_provides_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingColumnError, match=r"'tsk'.*did you mean 'task'"):
        trained(tmp_path, batch_columns=("task", "tsk"))
    with pytest.raises(InvalidInputError, match="column 'stratum' has 1 values for 8 completions"):
        trained(tmp_path, extra_columns=lambda **_: {"stratum": [1]})


def test_wrong_rewards_stop_the_run_with_their_name(tmp_path: Path) -> None:
    def short(completions: list[Any], **_: Any) -> list[float]:
        return [1.0] * (len(completions) - 1)

    def endless(completions: list[Any], **_: Any) -> list[float]:
        return [1.0, float("inf")] + [0.0] * (len(completions) - 2)

    with pytest.raises(InvalidInputError, match="reward 'short' returned 7 values for 8 completions"):
        trained(tmp_path, reward_funcs=[brevity, short])
    with pytest.raises(InvalidInputError, match="reward 'endless' returned inf for completion 1"):
        trained(tmp_path, reward_funcs=[brevity, endless], advantage=grpo_trl())


def test_a_sample_without_any_reward_has_advantage_zero(tmp_path: Path) -> None:
    def partly(completions: list[Any], **_: Any) -> list[float | None]:
        return [None if i % 4 == 0 else float(i) for i in range(len(completions))]

    trained(tmp_path, reward_funcs=[partly], advantage=grpo_trl(), rollout_log=tmp_path / "rollouts")
    batch = read_rollouts(tmp_path / "rollouts")
    missing = torch.isnan(batch.rewards[:, 0])
    assert int(missing.sum()) == 6
    assert batch.column("advantage")[missing].tolist() == [0.0] * 6
    assert bool((batch.column("advantage")[~missing] != 0).any())


class Counting(Transform):
    """GRPO that counts the batches it sees."""

    seen = 0

    def __call__(self, signal: torch.Tensor, batch: Any) -> torch.Tensor:
        self.seen += 1
        return grpo_trl()(signal, batch)


def test_evaluation_neither_moves_state_nor_writes_the_log(tmp_path: Path) -> None:
    transform, bandit = Counting(), AdvantageBandit(TASKS)
    run = trained(
        tmp_path,
        advantage=transform,
        curriculum=bandit,
        objective=token_mean_objective(),
        eval_dataset=prompts(),
        rollout_log=tmp_path / "rollouts",
        args={"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8},
    )
    assert transform.seen == 3
    assert int(bandit.counts.sum()) == 24
    assert len(read_rollouts(tmp_path / "rollouts")) == 24
    assert any("eval_reward" in entry for entry in run.state.log_history)


def test_lora_on_conversations(tmp_path: Path) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = trainer(
        tmp_path,
        train_dataset=prompts(conversational=True),
        peft_config=adapter,
        args={"beta": 0.1, **SEVERAL_UPDATES},
        advantage=grpo_trl(),
        objective=grpo_objective(kl=0.1),
        curriculum=AdvantageBandit(TASKS),
        rollout_log=tmp_path / "rollouts",
        log_texts=True,
    )
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert history(run)[-1]["kl"] > 0
    texts = read_rollouts(tmp_path / "rollouts").column("prompt")
    assert set(texts) <= {row[0]["content"] for row in prompts(conversational=True)["prompt"]}


def test_a_run_that_starts_anew_clears_its_log(tmp_path: Path) -> None:
    for _ in range(2):
        trained(tmp_path, rollout_log=tmp_path / "rollouts")
    assert len(read_rollouts(tmp_path / "rollouts")) == 24


def test_a_checkpoint_of_another_trainer_is_refused_where_state_is_needed(tmp_path: Path) -> None:
    trained(tmp_path, GRPOTrainer, args={"save_strategy": "steps", "save_steps": 2})
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(InvalidInputError, match=r"checkpoint-2 has no polyreward\.pt"):
        trainer(tmp_path, curriculum=AdvantageBandit(TASKS)).train(resume_from_checkpoint=checkpoint)
    trainer(tmp_path, advantage=grpo_trl()).train(resume_from_checkpoint=checkpoint)


class Longest(GroupReward):
    """1 for the longest completions of a prompt."""

    def score_group(self, samples: Any) -> list[float]:
        lengths = [len(sample.text) for sample in samples]
        return [float(length == max(lengths)) for length in lengths]


def test_a_reward_that_compares_a_group_trains_and_refuses_groups_split_over_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path, reward_funcs=[weighted_sum(Longest(), letters)], args={"reward_weights": None})
    size = run.args.per_device_train_batch_size * run.args.steps_per_generation
    monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
    run._check_groups()
    run.num_generations = size - 1
    with pytest.raises(InvalidInputError, match=rf"compares the completions .* = {size} splits groups of num_generat"):
        run._check_groups()
    run.reward_funcs = [checked_reward(letters, "letters")]
    run._check_groups()
