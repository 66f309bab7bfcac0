"""The presets give the loss and gradient of TRL's own `GRPOTrainer._compute_loss`, which runs here on given tensors."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from polyreward.objectives import EntropyBonus, FixedClip, KLPenalty, PolicyObjective, dr_grpo_objective, make_objective

pytestmark = pytest.mark.slow
ROWS, TOKENS, MAX_LENGTH = 6, 5, 11


def trl_loss(logp, given, loss_type, *, level="token", low=0.2, high=0.2, beta=0.0, delta=None, entropy_coef=0.0):
    accelerate = pytest.importorskip("accelerate")
    trainer = pytest.importorskip("trl").GRPOTrainer
    # The attributes that the method reads; the policy's forward pass is the given log-probabilities.
    state = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **options: (logp, given["entropy"], None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=delta, steps_per_generation=1),
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_LENGTH,
        accelerator=accelerate.Accelerator(cpu=True),
        _entropy_bonus_enabled=entropy_coef != 0,
        entropy_coef=entropy_coef,
        use_adaptive_entropy=False,
        _metrics={"train": defaultdict(list)},
    )
    state.accelerator.gradient_state._set_sync_gradients(True)
    empty = torch.zeros(ROWS, 0, dtype=torch.int64)
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": torch.zeros(ROWS, TOKENS, dtype=torch.int64),
        "completion_mask": given["mask"].long(),
        "advantages": given["advantages"],
        "old_per_token_logps": given["old_logp"],
        "ref_per_token_logps": given["reference_logp"],
        "num_items_in_batch": given["mask"].sum(),
    }
    loss = trainer._compute_loss(state, None, inputs)
    return loss, {name: values[-1] for name, values in state._metrics["train"].items()}


CASES = {
    "grpo": ("grpo", {}, make_objective("grpo")),
    "grpo with kl": ("grpo", {"beta": 0.3}, make_objective({"preset": "grpo", "kl": 0.3})),
    "grpo with dual clip": ("grpo", {"delta": 1.5}, PolicyObjective(dual_clip=1.5)),
    "grpo with entropy bonus": ("grpo", {"entropy_coef": 0.1}, PolicyObjective(entropy=EntropyBonus(0.1))),
    "bnpo": ("bnpo", {}, make_objective("token-mean")),
    "bnpo with kl": ("bnpo", {"beta": 0.3}, make_objective({"preset": "token-mean", "kl": 0.3})),
    "dapo": ("dapo", {"high": 0.28}, make_objective("dapo")),
    "dr_grpo": ("dr_grpo", {}, dr_grpo_objective(MAX_LENGTH)),
    "gspo": ("grpo", {"level": "sequence", "low": 3e-4, "high": 4e-4}, make_objective("gspo")),
    "gspo, wide, with kl": (
        "grpo",
        {"level": "sequence", "beta": 0.1},
        PolicyObjective(FixedClip(0.2, 0.2), ratio="sequence", kl=KLPenalty(0.1)),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("by_token", [False, True])
def test_same_loss_and_gradient(name, seed, by_token):
    loss_type, options, objective = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    old, noise, drift, entropy = torch.randn(4, ROWS, TOKENS, generator=generator, dtype=torch.float64)
    shape = (ROWS, TOKENS) if by_token else (ROWS,)
    given = {
        "old_logp": old,
        "reference_logp": old + 0.3 * drift,
        "entropy": entropy.abs(),
        "advantages": torch.randn(shape, generator=generator, dtype=torch.float64),
        "mask": torch.arange(TOKENS) < torch.tensor([1, 5, 3, 2, 5, 4])[:, None],
    }
    logp = (old + 0.4 * noise).requires_grad_()
    expected, logged = trl_loss(logp, given, loss_type, **options)
    found = objective(logp, **given)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, logp)[0] for loss in (found.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    if "kl" in logged:
        assert float(found.metrics["kl"]) == pytest.approx(logged["kl"], rel=1e-6)
    if options.get("level") != "sequence" and "delta" not in options:
        assert float(found.metrics["clip_fraction"]) == pytest.approx(logged["clip_ratio/region_mean"], abs=1e-6)
