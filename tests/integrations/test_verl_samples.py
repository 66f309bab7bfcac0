from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.integrations.verl_samples import Samples, fields_wanted, reward_batch
from polyreward.integrations.verl_settings import Settings

SCORES, LENGTHS, UIDS = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([4, 2, 3]), ["b", "a", "b"]
NESTED = {
    "extra_fields": [
        {"reward_extra_info": {"accuracy": 1.0, "style": 0.1}, "turns": 2},
        {"reward_extra_info": {"accuracy": 0.0, "style": None}, "turns": 1},
        {"reward_extra_info": {"accuracy": 1.0, "style": 0.3}, "turns": 1},
    ],
    "extra_info": [{"level": 1}, {"level": 2}, {"level": 1}],
    "data_source": ["x", "y", "x"],
}


def test_a_value_is_found_wherever_it_stands() -> None:
    samples = Samples(NESTED)
    assert samples.find("data_source") == ["x", "y", "x"]
    assert samples.find("accuracy") == [1.0, 0.0, 1.0]
    assert samples.find("turns") == [2, 1, 1]
    assert samples.find("level") == [1, 2, 1]
    assert samples.find("nothing") is None
    assert samples.names() == ["accuracy", "data_source", "level", "style", "turns"]
    assert Samples({**NESTED, "level": [7, 8, 9]}).find("level") == [7, 8, 9]


def test_the_score_is_the_reward_when_none_is_named() -> None:
    batch = reward_batch(SCORES, LENGTHS, UIDS, Samples(), Settings())
    assert batch.names == ("score",)
    assert batch.rewards.squeeze(1).tolist() == SCORES.tolist()
    assert batch.segments("group").codes.tolist()[0] == batch.segments("group").codes.tolist()[2]
    assert list(batch.columns) == ["length"]
    assert batch.column("length").tolist() == [4, 2, 3]


def test_named_rewards_become_columns_and_none_becomes_nan() -> None:
    batch = reward_batch(SCORES, LENGTHS, UIDS, Samples(NESTED), Settings(rewards=("style", "accuracy")))
    assert batch.names == ("style", "accuracy")
    assert batch.reward("accuracy").tolist() == [1.0, 0.0, 1.0]
    style = batch.reward("style").tolist()
    assert style[0] == pytest.approx(0.1)
    assert math.isnan(style[1])


def test_columns_come_from_the_settings_the_parameters_and_the_data_source() -> None:
    settings = Settings(columns={"task": "level", "depth": "turns"}, parameters={"by": ["level", "group"]})
    batch = reward_batch(SCORES, LENGTHS, UIDS, Samples(NESTED), settings)
    assert batch.column("task").tolist() == batch.column("level").tolist() == [1, 2, 1]
    assert batch.column("depth").tolist() == [2, 1, 1]
    batch = reward_batch(SCORES, LENGTHS, UIDS, Samples(NESTED), Settings())
    assert list(batch.column("task")) == ["x", "y", "x"]
    assert {"level", "turns", "extra_info", "data_source", "task"} <= set(fields_wanted(settings))


def test_numpy_and_tensor_scalars_are_taken() -> None:
    values = {"task": np.array([1, 2, 1]), "accuracy": [torch.tensor(1.0), torch.tensor(0.0), np.float32(0.5)]}
    batch = reward_batch(SCORES, LENGTHS, np.array(UIDS), Samples(values), Settings(rewards=("accuracy",)))
    assert batch.column("task").tolist() == [1, 2, 1]
    assert batch.reward("accuracy").tolist() == [1.0, 0.0, 0.5]


def test_mistakes_are_named() -> None:
    with pytest.raises(MissingColumnError, match=r"rewards names 'acuracy'.*did you mean 'accuracy'"):
        reward_batch(SCORES, LENGTHS, UIDS, Samples(NESTED), Settings(rewards=("acuracy",)))
    with pytest.raises(MissingColumnError, match=r"columns\.task names 'levle'.*did you mean 'level'"):
        reward_batch(SCORES, LENGTHS, UIDS, Samples(NESTED), Settings(columns={"task": "levle"}))
    with pytest.raises(InvalidInputError, match="reward 'data_source' is 'x' in row 0"):
        reward_batch(SCORES, LENGTHS, UIDS, Samples(NESTED), Settings(rewards=("data_source",)))
    with pytest.raises(InvalidInputError, match=r"column 'task' \('style'\) has no value in row 1"):
        reward_batch(SCORES, LENGTHS, UIDS, Samples(NESTED), Settings(columns={"task": "style"}))
    with pytest.raises(InvalidInputError, match="'uid'"):
        reward_batch(SCORES, LENGTHS, None, Samples(), Settings())


def test_a_default_column_with_holes_is_left_out() -> None:
    samples = Samples({"stratum": [1, None, 2]})
    assert "stratum" not in reward_batch(SCORES, LENGTHS, UIDS, samples, Settings()).columns


def test_sessions_share_the_advantage_of_their_last_output() -> None:
    keys = ["a_0_1", "a_0_0", "a_1_0", "pad_0_0", "a_0_2", "b_0_0"]
    samples = Samples.of_sessions({}, keys, [False, False, False, True, False, False])
    assert samples.counted == [2, 4, 5]
    spread = samples.spread(torch.tensor([10.0, 20.0, 30.0]))
    assert spread.tolist() == [20.0, 20.0, 10.0, 0.0, 20.0, 30.0]
    pairs = samples.spread(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert pairs.tolist() == [[3, 4], [3, 4], [1, 2], [0, 0], [3, 4], [5, 6]]


def test_only_counted_rows_enter_the_record() -> None:
    samples = Samples({"task": ["x", None, "z"]}, counted=[0, 2], source=[0, -1, 1])
    batch = reward_batch(SCORES, LENGTHS, UIDS, samples, Settings())
    assert batch.rewards.squeeze(1).tolist() == [1.0, 0.5]
    assert list(batch.column("task")) == ["x", "z"]
