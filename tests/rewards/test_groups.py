"""Rewards of a whole group: which samples are one, in which order values come back, and what is refused."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest

from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.rewards import ExactMatch, RewardExecutor, weighted_sum
from polyreward.rewards.groups import GroupReward, needs_group


@dataclass(frozen=True)
class Rank(GroupReward):
    """Place of a completion among those of its prompt, by length; not of empty ones. Range [0, N)."""

    reference: str | None = None

    @property
    def reads(self):
        return () if self.reference is None else (self.reference,)

    def score_group(self, samples):
        lengths = [len(sample.text) for sample in samples]
        return [sorted(lengths).index(n) if n else None for n in lengths]


class Short(GroupReward):
    def score_group(self, samples):
        return [0.0]


class Undefined(GroupReward):
    pass


class InOneCall(ExactMatch):
    """Asks a server once for the whole batch."""

    per_sample = False


def test_samples_of_a_prompt_are_a_group_wherever_they_stand():
    values = Rank()(["a", "b", "a", "b", "a"], ["xx", "xxxx", "x", "xxx", ""])
    assert values == [2, 1, 1, 0, None]


def test_a_group_column_comes_before_the_prompt():
    assert Rank()(["p"] * 4, ["x", "xx", "xxx", "xxxx"], group=[0, 1, 0, 1]) == [0, 0, 1, 1]
    assert Rank()(None, ["x", "xx", "xxx"], group=np.array([7, 8, 7])) == [0, 0, 1]
    assert Rank()(None, ["x", "xx", "xxx"], group=["a", "b", "a"]) == [0, 0, 1]


def test_chat_prompts_are_compared_by_content():
    first, second = ([{"role": "user", "content": text}] for text in "ab")
    assert Rank()([first, second, [dict(first[0])]], ["x", "xx", "xxx"]) == [0, 0, 1]


def test_rows_without_a_reference_take_no_part():
    assert Rank("answer")(["a"] * 3, ["xxx", "x", "xx"], answer=["r", None, "r"]) == [1, None, 0]
    with pytest.raises(MissingColumnError, match="'rank' reads the column 'answer'"):
        Rank("answer")(["a"], ["x"])


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(InvalidInputError, match="'rank' compares the samples of a prompt: give prompts or 'group'"):
        Rank()(None, ["x"])
    assert Rank()(None, []) == []
    with pytest.raises(InvalidInputError, match="1 prompts for 2 completions"):
        Rank()(["a"], ["x", "y"])
    with pytest.raises(InvalidInputError, match="'short': 1 values for a group of 2 samples"):
        Short()(["a", "a"], ["x", "y"])
    with pytest.raises(TypeError, match="Undefined does not define score_group"):
        Undefined()(["a"], ["x"])


def test_what_needs_the_group_shows_through_names_sums_and_the_executor():
    assert needs_group(Rank())
    assert needs_group(weighted_sum(ExactMatch(), 0.5 * Rank()))
    assert not needs_group(weighted_sum(ExactMatch(), ExactMatch()))
    assert not needs_group(len)
    with RewardExecutor(workers=2) as executor:
        own = executor.wrap(Rank())
        assert needs_group(own)
        assert not needs_group(executor.wrap(ExactMatch()))
        assert not needs_group(executor.wrap(InOneCall()))
        assert executor.wrap(InOneCall()).per_sample is False
        assert executor.wrap(weighted_sum(ExactMatch(), InOneCall())).per_sample is False
        assert own(["a", "b", "a"], ["xx", "x", "x"]) == [1, 0, 0]


def test_it_pickles_and_composes():
    reward = pickle.loads(pickle.dumps(Rank()))
    assert (reward + 1.0)(["a", "a"], ["xx", "x"]) == [2, 1]
