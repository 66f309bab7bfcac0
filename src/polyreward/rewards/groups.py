"""Rewards that compare the samples of one prompt: the base of every reward which needs the whole group at once.

A group is the samples with the same entry in the column ``group``, where the batch has one, else those with the same
prompt. Trainers hand a reward all samples of a prompt in one call; `PolyrewardGRPOTrainer` refuses settings that split
a group over processes. `RewardExecutor.wrap` sends a whole batch to one worker for such a reward.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from polyreward.errors import InvalidInputError
from polyreward.rewards.contract import Reward, RewardFunction, Sample, is_missing


class GroupReward(Reward):
    """Base of rewards of a whole group; a subclass defines `score_group`. Range: that of the subclass."""

    compares_group: ClassVar[bool] = True

    def score_group(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        """Values of the samples of one group, in order; None where the reward does not apply to a sample."""
        raise TypeError(f"{type(self).__name__} does not define score_group")

    def __call__(self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score a batch, group by group.

        Parameters
        ----------
        prompts, completions : length N, strings or lists of messages
        columns : lists of length N; ``group`` names the group of each sample where prompts do not

        Returns
        -------
        list of N finite floats or None

        Raises
        ------
        MissingColumnError
            A column that the reward reads is absent.
        InvalidInputError
            Neither prompts nor a column ``group``; columns of another length; a reference that cannot be used.
        """
        values: list[float | None] = [None] * len(completions)
        for members in self.groups(prompts, completions, columns):
            found = self.score_group(members)
            if len(found) != len(members):
                raise InvalidInputError(
                    f"reward {self.__name__!r}: {len(found)} values for a group of {len(members)} samples"
                )
            for sample, value in zip(members, found, strict=True):
                values[sample.row] = None if is_missing(value) else float(value)  # type: ignore[arg-type]
        return values

    def groups(
        self, prompts: Sequence[Any] | None, completions: Sequence[Any], columns: Mapping[str, Any]
    ) -> list[list[Sample]]:
        """The samples to which the reward applies, group by group; raises as `__call__` does."""
        if prompts is None and "group" not in columns and len(completions) > 0:
            raise InvalidInputError(
                f"reward {self.__name__!r} compares the samples of a prompt: give prompts or 'group'"
            )
        groups: dict[str | int, list[Sample]] = {}
        for sample in self.samples(prompts, completions, columns):
            groups.setdefault(group_key(sample), []).append(sample)
        return list(groups.values())


def needs_group(reward: RewardFunction) -> bool:
    """Whether a reward, or one that it is made of, compares the samples of a prompt (``compares_group``)."""
    return getattr(reward, "compares_group", False) or any(map(needs_group, _inside(reward)))


def needs_batch(reward: RewardFunction) -> bool:
    """Whether a reward wants a batch in one call: it compares groups, or says so by ``per_sample = False``."""
    own = needs_group(reward) or getattr(reward, "per_sample", True) is False
    return own or any(map(needs_batch, _inside(reward)))


def _inside(reward: RewardFunction) -> list[RewardFunction]:
    """Rewards that a reward is made of, stands for, or wraps."""
    wrapped = getattr(reward, "reward", None), getattr(reward, "__wrapped__", None)
    return [*getattr(reward, "members", ()), *filter(callable, wrapped)]


def group_key(sample: Sample) -> str | int:
    """What tells the group of a sample apart."""
    return label_of(sample.columns.get("group", sample.prompt))


def label_of(entry: Any) -> str | int:
    """A prompt or an entry of the column ``group`` as something hashable: messages and arrays become texts."""
    if isinstance(entry, str | int | np.integer):
        return entry  # type: ignore[return-value]
    return json.dumps(entry, sort_keys=True, default=str)
