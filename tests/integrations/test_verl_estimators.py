from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyreward.advantages.presets import PRESETS
from polyreward.errors import InvalidInputError, MissingColumnError, MissingFileError, UnknownNameError
from polyreward.integrations import verl_estimators
from polyreward.integrations.verl_estimators import ESTIMATORS, known_samples
from polyreward.integrations.verl_samples import Samples

MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
UIDS = np.array(["p", "q", "p", "q"], dtype=object)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    verl_estimators.load_state_dict({})
    yield
    verl_estimators.load_state_dict({})


def token_rewards(*scores: float, dtype: torch.dtype = torch.float32) -> Tensor:
    rewards = torch.zeros(4, 3, dtype=dtype)
    rewards[:, 0] = torch.tensor(scores, dtype=dtype)
    return rewards


def run(name: str, rewards: Tensor, **given: Any) -> Tensor:
    advantages, returns = ESTIMATORS["polyreward-" + name](
        token_level_rewards=rewards, response_mask=MASK, **{"index": UIDS, **given}
    )
    assert torch.equal(advantages, returns)
    return advantages


def test_every_preset_has_an_estimator() -> None:
    assert set(ESTIMATORS) == {"polyreward-" + name for name in PRESETS}
    assert "arXiv" in str(ESTIMATORS["polyreward-gdpo"].__doc__)


def test_an_advantage_is_spread_over_the_response_tokens() -> None:
    # groups (3, 1) and (5, 4): the centred rewards are +-1 and +-0.5, at the tokens of the response
    found = run("dr-grpo", token_rewards(3, 5, 1, 4))
    assert found.tolist() == [[1, 1, 0], [0.5, 0, 0], [-1, -1, -1], [0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
def test_dtype_of_the_rewards_is_kept(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    estimator = ESTIMATORS["polyreward-grpo"]
    rewards = token_rewards(3, 5, 1, 4, dtype=dtype)
    found, _ = estimator(token_level_rewards=rewards, response_mask=MASK.to(mask_dtype), index=UIDS)
    assert found.dtype in (dtype, torch.promote_types(dtype, mask_dtype))
    assert found.shape == MASK.shape


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=4, max_size=4), st.permutations(range(4)))
def test_the_order_of_the_rows_does_not_matter(scores: list[int], order: list[int]) -> None:
    rewards = token_rewards(*map(float, scores))
    estimator = ESTIMATORS["polyreward-grpo-verl"]
    first, _ = estimator(token_level_rewards=rewards, response_mask=MASK, index=UIDS)
    again, _ = estimator(token_level_rewards=rewards[order], response_mask=MASK[order], index=UIDS[order])
    assert torch.allclose(again, first[order], atol=1e-6)


def test_samples_come_with_the_call_or_from_around_it() -> None:
    fields = {"accuracy": [1.0, 0.0, 0.0, 1.0], "task": ["x", "y", "x", "y"]}
    config = {"polyreward": {"rewards": ["accuracy"]}}
    direct = run("gaussian-grpo", token_rewards(0, 0, 0, 0), config=config, non_tensor_batch=fields)
    with known_samples(Samples(fields)):
        around = run("gaussian-grpo", token_rewards(0, 0, 0, 0), config=config)
    assert torch.equal(direct, around)
    assert direct[0, 0] > 0 > direct[2, 0]
    with pytest.raises(MissingColumnError, match="none reached the estimator"):
        run("gaussian-grpo", token_rewards(0, 1, 2, 3))


def test_a_missing_column_says_where_to_name_it() -> None:
    with pytest.raises(MissingColumnError, match=r"algorithm\.polyreward\.columns.*Fields: ability"):
        run("stratified-grpo", token_rewards(0, 1, 2, 3), non_tensor_batch={"ability": ["x"] * 4})


def test_memory_is_kept_between_calls_and_through_a_file(tmp_path: Path) -> None:
    fields, first, second = {"task": ["x", "y", "x", "y"]}, token_rewards(9, 7, 0, 1), token_rewards(1, 1, 0, 0)
    run("ema-grpo", first, non_tensor_batch=fields)
    path = verl_estimators.save_state(tmp_path / "state.json")
    after = run("ema-grpo", second, non_tensor_batch=fields)
    verl_estimators.load_state(path)
    assert torch.equal(run("ema-grpo", second, non_tensor_batch=fields), after)
    verl_estimators.load_state_dict({})
    assert not torch.allclose(run("ema-grpo", second, non_tensor_batch=fields), after)
    assert set(verl_estimators.state_dict()) == {"ema-grpo"}


def test_presets_without_memory_have_no_state() -> None:
    run("grpo", token_rewards(1, 2, 3, 4))
    assert verl_estimators.state_dict() == {}


def test_other_parameters_are_another_transform() -> None:
    rewards, fields = token_rewards(1, 2, 3, 4), {"stratum": [0, 0, 1, 1]}
    low = run("stratified-grpo", rewards, non_tensor_batch=fields, config={"polyreward": {"parameters": {"blend": 0}}})
    high = run("stratified-grpo", rewards, non_tensor_batch=fields, config={"polyreward": {"parameters": {"blend": 1}}})
    assert low.abs().sum() > 0
    assert high.abs().sum() == 0


def test_bad_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'ema-grpo'"):
        verl_estimators.load_state_dict({"ema-grop": {}})
    with pytest.raises(MissingFileError, match=r"none\.json"):
        verl_estimators.load_state(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(InvalidInputError, match="holds a list"):
        verl_estimators.load_state(tmp_path / "bad.json")
    (tmp_path / "worse.json").write_text("{")
    with pytest.raises(InvalidInputError, match="not valid JSON"):
        verl_estimators.load_state(tmp_path / "worse.json")
