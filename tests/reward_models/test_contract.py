"""A reward model becomes a reward."""

import pytest
import torch

from polyreward.errors import InvalidInputError
from polyreward.reward_models.contract import RewardModel, as_reward


class LengthModel:
    """A fitted scale times the length; no opinion on empty completions."""

    def fit(self, preferences, **options):
        self.scale = sum(preferences) / len(preferences)
        return self

    def score(self, prompts, completions, **columns):
        return torch.tensor([self.scale * len(c) if c else float("nan") for c in completions])

    def save_pretrained(self, folder):
        torch.save(self.scale, folder / "scale.pt")


def test_as_reward_follows_the_reward_contract():
    model = LengthModel().fit([0.5, 1.5])
    assert isinstance(model, RewardModel)
    reward = as_reward(model, "length")
    assert reward.__name__ == "length"
    assert reward(prompts=["p", "p"], completions=["abc", ""], task=["x", "y"]) == [3.0, None]
    assert reward(prompts=[], completions=[]) == []


def test_wrong_number_of_scores_is_refused():
    class Broken(LengthModel):
        def score(self, prompts, completions, **columns):
            return torch.zeros(len(completions) + 1)

    with pytest.raises(InvalidInputError, match=r"'broken' returned shape \(3,\) for 2 samples"):
        as_reward(Broken(), "broken")(["p", "p"], ["a", "b"])
