"""The TRL presets compute what TRL's own lines compute.

TRL's arithmetic stands in the middle of `_generate_and_score_completions`. Its lines are cut out of the installed
source, from the sum of the rewards to the advantages, and run here on given rewards.
"""

import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.advantages import Transform, compute_advantages, gdpo_trl, grpo_trl, rloo_trl
from polyreward.batch import RewardBatch

pytestmark = pytest.mark.slow
NAN = float("nan")
LAST = "advantages = torch.nan_to_num(advantages, nan=0.0)"


def lines_of(trainer: str) -> Any:
    """TRL's lines from the mask of rows without a reward to the advantages, compiled, and what they need."""
    trl = pytest.importorskip("trl")
    from trl.trainer.utils import nanstd

    source = inspect.getsource(inspect.unwrap(getattr(trl, trainer)._generate_and_score_completions))
    begin = source.index("unscorable_mask = torch.isnan(rewards_per_func).all(dim=1)")
    begin = source.rindex("\n", 0, begin) + 1
    code = textwrap.dedent(source[begin : source.index(LAST, begin) + len(LAST)])
    return compile(code, trainer, "exec"), {"torch": torch, "nanstd": nanstd, "device": "cpu"}


def trl_advantages(
    trainer: str, rewards: torch.Tensor, size: int, weights: list[float], **settings: Any
) -> torch.Tensor:
    code, needed = lines_of(trainer)
    state = SimpleNamespace(reward_weights=torch.tensor(weights), reward_funcs=weights, beta=0.0, **settings)
    scope = {**needed, "self": state, "rewards_per_func": rewards.clone(), "num_generations": size}
    exec(code, scope)
    found = scope["advantages"]
    assert isinstance(found, torch.Tensor)
    return found


def sums(scale_rewards: str) -> dict[str, Any]:
    return {"multi_objective_aggregation": "sum_then_normalize", "scale_rewards": scale_rewards}


def rloo(normalize: bool) -> dict[str, Any]:
    return {"normalize_advantages": normalize, "reward_clip_range": None}


CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "group": ("GRPOTrainer", sums("group"), grpo_trl),
    "batch": ("GRPOTrainer", sums("batch"), lambda w: grpo_trl(w, scale_rewards="batch")),
    "none": ("GRPOTrainer", sums("none"), lambda w: grpo_trl(w, scale_rewards="none")),
    "gdpo": ("GRPOTrainer", {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "group"}, gdpo_trl),
    "rloo": ("RLOOTrainer", rloo(False), rloo_trl),
    "rloo, normalized": ("RLOOTrainer", rloo(True), lambda w: rloo_trl(w, normalize=True)),
}


@st.composite
def tables(draw: Any) -> tuple[torch.Tensor, int, list[float]]:
    size, groups, width = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    # multiples of 1/8: TRL's float32 means are exact, so that its groups of equal rewards have deviation 0 as well
    value = st.one_of(st.just(NAN), st.integers(-24, 24).map(lambda n: n / 8))
    cells = draw(st.lists(value, min_size=size * groups * width, max_size=size * groups * width))
    weights = draw(st.lists(st.sampled_from([1.0, 0.5, 2.0, 0.0]), min_size=width, max_size=width))
    return torch.tensor(cells).reshape(size * groups, width), size, weights


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=60, deadline=None)
@given(tables())
def test_any_rewards(name: str, table: Any) -> None:
    trainer, settings_of_trl, make = CASES[name]
    rewards, size, weights = table
    expected = trl_advantages(trainer, rewards, size, weights, **settings_of_trl)
    transform: Transform = make(weights)
    batch = RewardBatch.from_trl(rewards, [f"r{k}" for k in range(len(weights))], size)
    got = compute_advantages(transform, batch)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_dense_rewards_to_a_tight_tolerance(name: str) -> None:
    trainer, settings_of_trl, make = CASES[name]
    rewards = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    code_weights = [1.0, 0.25, 2.0]
    expected = trl_advantages(trainer, rewards, 8, code_weights, **settings_of_trl)
    got = compute_advantages(make(code_weights), RewardBatch.from_trl(rewards, ["a", "b", "c"], 8))
    # TRL's own factor n / (n - 1) is float32 whatever the rewards are
    tolerance = 1e-12 if name in ("none", "rloo") else 1e-7
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_trl_lines_are_the_ones_meant() -> None:
    rewards = torch.tensor([[1.0], [0.0], [3.0], [3.0]])
    got = trl_advantages("GRPOTrainer", rewards, 2, [1.0], **sums("group"))
    expected = torch.tensor([0.5, -0.5, 0.0, 0.0]) / (0.5**0.5 + 1e-4)
    torch.testing.assert_close(got, expected)
    got = trl_advantages("RLOOTrainer", rewards, 2, [1.0], **rloo(False))
    assert got.tolist() == [1.0, -1.0, 0.0, 0.0]
