from __future__ import annotations

import pytest

from polyreward.advantages.presets import grpo_verl, stratified_grpo
from polyreward.errors import InvalidInputError, UnknownNameError
from polyreward.integrations.verl_settings import Settings, make_transform, make_trust_region, read_settings
from polyreward.objectives import ElasticTrustRegion

ACTOR = {"clip_ratio": 0.2, "clip_ratio_low": 0.1, "clip_ratio_high": None}


def test_no_section_is_the_default() -> None:
    assert read_settings(None) == read_settings({}) == read_settings({"polyreward": None}) == Settings()


def test_a_full_section_is_read() -> None:
    section = {
        "rewards": ("accuracy", "format"),
        "parameters": {"weights": {"accuracy": 1}},
        "columns": {"task": "ability"},
        "trust_region": {"micro": 0.5},
        "rollout_log": "runs/a",
    }
    settings = read_settings({"polyreward": section})
    assert settings.rewards == ("accuracy", "format")
    assert settings.columns == {"task": "ability"}
    assert settings.rollout_log == "runs/a"


def test_verls_keys_of_gdpo_stand_in_for_rewards_and_weights() -> None:
    algorithm = {"gdpo_reward_keys": ["a", "b"], "gdpo_reward_weights": [1.0, 2.0]}
    assert read_settings(algorithm) == Settings(rewards=("a", "b"), parameters={"weights": [1.0, 2.0]})
    ours = {**algorithm, "polyreward": {"rewards": ["c"], "parameters": {"weights": [3.0]}}}
    assert read_settings(ours) == Settings(rewards=("c",), parameters={"weights": [3.0]})


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"reward": ["a"]}, ("algorithm.polyreward has no key 'reward'", "did you mean 'rewards'")),
        ({"trust_regoin": {}}, ("did you mean 'trust_region'",)),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(section: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(UnknownNameError) as raised:
        read_settings({"polyreward": section})
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize("section", [[1], {"parameters": 3}, {"columns": ["task"]}, {"rewards": "accuracy"}])
def test_a_value_of_another_kind_is_refused(section: object) -> None:
    with pytest.raises(InvalidInputError, match=r"algorithm\.polyreward"):
        read_settings({"polyreward": section})


def test_the_transform_has_the_parameters() -> None:
    settings = Settings(parameters={"blend": 0.3})
    assert make_transform("stratified-grpo", settings, None) == stratified_grpo(blend=0.3)


@pytest.mark.parametrize("norm", [True, False])
def test_verls_switch_of_the_deviation_is_scale(norm: bool) -> None:
    algorithm = {"norm_adv_by_std_in_grpo": norm}
    assert make_transform("grpo-verl", Settings(), algorithm) == grpo_verl(scale=norm)
    given = Settings(parameters={"scale": True})
    assert make_transform("grpo-verl", given, algorithm) == grpo_verl(scale=True)
    assert make_transform("stratified-grpo", Settings(), algorithm) == stratified_grpo()


def test_an_unknown_parameter_is_refused_with_the_nearest_and_its_place() -> None:
    with pytest.raises(UnknownNameError, match=r"algorithm\.polyreward\.parameters: .*'blnd'; did you mean 'blend'"):
        make_transform("stratified-grpo", Settings(parameters={"blnd": 0.3}), None)


def test_what_a_preset_cannot_do_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"algorithm\.gamma is 0\.9"):
        make_transform("reinforce-plus-plus-verl", Settings(), {"gamma": 0.9})
    with pytest.raises(InvalidInputError, match="use_kl_in_reward"):
        make_transform("gdpo", Settings(rewards=("a", "b")), {"use_kl_in_reward": True})
    make_transform("gdpo", Settings(), {"use_kl_in_reward": True})


def test_the_trust_region_stands_around_verls_clip_ratios() -> None:
    settings = Settings(trust_region={"micro": 0.5, "reward_range": [-1, 1]})
    expected = ElasticTrustRegion(low=0.1, high=0.2, micro=0.5, reward_range=(-1.0, 1.0))
    assert make_trust_region(settings, ACTOR) == expected


def test_mistakes_in_the_trust_region_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"algorithm\.polyreward\.trust_region: .*did you mean 'micro'"):
        make_trust_region(Settings(trust_region={"mirco": 1}), ACTOR)
    with pytest.raises(InvalidInputError, match=r"set actor_rollout_ref\.actor\.clip_ratio_low"):
        make_trust_region(Settings(trust_region={"low": 0.2}), ACTOR)
    with pytest.raises(InvalidInputError, match="micro"):
        make_trust_region(Settings(trust_region={"micro": 2}), ACTOR)
