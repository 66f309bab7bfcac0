from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyreward.errors import InvalidInputError, MissingFileError, PolyrewardError, UnknownNameError
from polyreward.preferences import PreferenceData
from polyreward.reward_models import HashingEncoder, LinearHead, PreferenceModel
from polyreward.training.parts import make_advantage, make_curriculum, make_objective, make_reward
from polyreward.training.recipe import (
    AdvantageSection,
    CurriculumSection,
    ObjectiveSection,
    RewardSection,
    load_recipe,
    to_toml,
    write_recipe,
)
from polyreward.training.run import check_parts

MINIMAL = """\
name = "mine"

[[tasks.families]]
name = "chain_sum"

[[rewards]]
name = "task_score"

[training]
steps = 3
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_fill_in_and_the_written_recipe_reads_back_equal(tmp_path: Path) -> None:
    for source in (write(tmp_path, MINIMAL), "demo"):
        recipe = load_recipe(source)
        again = load_recipe(write_recipe(recipe, tmp_path / "resolved.toml"))
        assert again == recipe
    assert load_recipe(write(tmp_path, MINIMAL)).training.steps == 3


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_every_shown_recipe_can_be_run(path: Path) -> None:
    assert check_parts(load_recipe(path)).rewards


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps = 3", "stesp = 3"), r"mine\.toml, line 10: unknown key 'training\.stesp'; did you mean 'steps'"),
        (("[training]", "[trainig]"), r"line 9: unknown key 'trainig'; did you mean 'training'"),
        (("steps = 3", "steps = 0"), r"line 10: training\.steps: Input should be greater than or equal to 1"),
        (("steps = 3", "steps = 'many'"), r"line 10: training\.steps: Input should be a valid integer"),
        (("steps = 3", "group_size = 1"), r"a group of one has no baseline"),
        (("steps = 3", "micro_batch = 7"), r"micro_batch=7 does not divide .* 12 \* 8 = 96"),
        (("[[rewards]]", "[[rewards]]\nname='task_score'\n[[rewards]]"), r"reward names must be distinct"),
        (("task_score", "mine"), r"evaluation\.score names no reward: 'task_score'; known: mine"),
        (
            ("[training]", "[advantage]\npreset='grpo'\nchain=[{part='Center'}]\n[training]"),
            r"a preset, a chain or a blend, only one",
        ),
        (("steps = 3", "steps = = 3"), r"not valid TOML.*line 10"),
        (('[[tasks.families]]\nname = "chain_sum"', ""), r"nothing to train on"),
        (("steps = 3", "steps = 3\n[policy]\nwidth = 90\nheads = 4"), r"width=90 is not a multiple"),
        (
            ('name = "chain_sum"', 'name = "chain_sum"\npoint = 3'),
            r"unknown key 'tasks\.families\.0\.point'; did you mean 'points'",
        ),
    ],
)
def test_bad_recipes_are_refused_with_place_and_remedy(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in MINIMAL
    with pytest.raises(PolyrewardError, match=message):
        load_recipe(write(tmp_path, MINIMAL.replace(*change)))


def test_a_recipe_that_does_not_exist_is_named_with_the_built_in_ones() -> None:
    with pytest.raises(MissingFileError, match=r"no recipe dmeo: .*built in: demo"):
        load_recipe("dmeo")


def test_overrides_reach_sections_list_entries_and_names(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, MINIMAL),
        [
            "training.steps=9",
            "rewards.task_score.weight=0.5",
            "tasks.families.0.points=3",
            "name=other",
            "tasks.tools=[]",
        ],
    )
    assert (recipe.training.steps, recipe.rewards[0].weight, recipe.tasks.families[0].points) == (9, 0.5, 3.0)
    assert (recipe.name, recipe.tasks.tools) == ("other", ())


def test_an_overriding_preset_replaces_the_chain_and_its_options() -> None:
    assert load_recipe("demo").advantage.blend
    recipe = load_recipe("demo", ["advantage.preset=grpo"])
    assert recipe.advantage == AdvantageSection(preset="grpo")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "expected KEY=VALUE"),
        ("rewards.fromat.weight=1", "rewards has no entry 'fromat'"),
        ("training.steps.more=1", "training.steps is a value, not a section"),
        ("training.step=1", "unknown key 'training.step'; did you mean 'steps'"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(PolyrewardError, match=message):
        load_recipe(write(tmp_path, MINIMAL), [override])


values = st.recursive(
    st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), values, max_size=4))
def test_toml_writer_is_read_back_by_the_standard_library(data: dict) -> None:
    import tomllib

    assert tomllib.loads(to_toml(data)) == data


def test_chain_of_parts_takes_the_weights_of_the_rewards() -> None:
    import torch

    from polyreward import RewardBatch, compute_advantages

    rewards = [RewardSection(name="a", weight=2.0), RewardSection(name="b", weight=0.0)]
    section = AdvantageSection(chain=({"part": "Center", "by": "group"}, {"part": "WeightedSum"}))
    batch = RewardBatch(torch.tensor([[1.0, 5.0], [3.0, 9.0]]), ("a", "b"))
    assert compute_advantages(make_advantage(section, rewards), batch).tolist() == [-2.0, 2.0]


def test_blend_adds_its_weighted_branches() -> None:
    import torch

    from polyreward import RewardBatch, compute_advantages

    summed = [{"part": "WeightedSum"}]
    section = AdvantageSection.model_validate(
        {"blend": [{"weight": 0.75, "chain": summed}, {"weight": 0.25, "chain": [*summed, {"part": "Center"}]}]}
    )
    batch = RewardBatch(torch.tensor([[1.0], [3.0]]), ("a",))
    found = compute_advantages(make_advantage(section, [RewardSection(name="a")]), batch)
    assert found.tolist() == [0.75 - 0.25, 2.25 + 0.25]


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (({"part": "Centre"},), "no part 'Centre'; did you mean 'Center'"),
        (({"part": "Center", "buy": "task"},), r"chain\[0\]: part Center has no argument 'buy'; did you mean 'by'"),
    ],
)
def test_misspelt_parts_are_refused(chain: tuple[dict, ...], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        make_advantage(AdvantageSection(chain=chain), [])


def test_own_rewards_by_file_and_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def short(prompts, completions, **columns):\n    return [-float(len(c)) for c in completions]\n")
    for use in (f"{path}:short", "mine:short"):
        monkeypatch.syspath_prepend(tmp_path)
        reward = make_reward(RewardSection(name="brevity", use=use))
        assert reward.__name__ == "brevity"
        assert reward(["p"], ["abc"], answer=["x"]) == [-3.0]


def test_a_fitted_reward_model_is_a_reward_of_a_recipe(tmp_path: Path) -> None:
    data = PreferenceData(["p"] * 8, ["good", "bad"] * 8, choice=np.zeros(8, int))
    model = PreferenceModel(HashingEncoder(64), LinearHead).fit(data, epochs=20, learning_rate=0.1, validation=None)
    model.save_pretrained(tmp_path)
    for use in ("reward_model", "reward-model"):
        reward = make_reward(RewardSection(name="liked", use=use, options={"model": str(tmp_path)}))
        good, bad = reward(["p", "p"], ["good", "bad"], answer=["", ""])
        assert reward.__name__ == "liked"
        assert good > bad
    with pytest.raises(PolyrewardError, match=r"reward .liked.: .*does not exist"):
        make_reward(RewardSection(name="liked", use="reward_model", options={"model": str(tmp_path / "no")}))


@pytest.mark.parametrize(
    ("use", "options", "message"),
    [
        ("task_scor", {}, "no built-in reward 'task_scor'; did you mean 'task_score'"),
        ("no_such_module:f", {}, "importing it failed: ModuleNotFoundError"),
        ("gone.py:f", {}, "no such file: gone.py"),
        ("json:lods", {}, "json has no 'lods'; did you mean 'loads'"),
        ("tool_cost", {"costs": 1}, "reward 'r': unknown option 'costs'; did you mean 'cost'"),
    ],
)
def test_rewards_that_cannot_be_made(use: str, options: dict, message: str) -> None:
    with pytest.raises(PolyrewardError, match=message):
        make_reward(RewardSection(name="r", use=use, options=options))


def test_reward_file_that_fails_to_import_says_why(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_that_name\n")
    with pytest.raises(
        InvalidInputError, match="importing it failed: ModuleNotFoundError: No module named 'nothing_of_that_name'"
    ):
        make_reward(RewardSection(name="r", use=f"{path}:f"))


def test_curriculum_options_are_checked() -> None:
    assert make_curriculum(CurriculumSection(), ["a"]) is None
    assert make_curriculum(CurriculumSection(name="dump", options={"window": 9}), ["a", "b"]).window == 9
    assert make_curriculum(CurriculumSection(name="easy-to-hard", options={"steps": 9}), ["a", "b"]).names == ("a", "b")
    with pytest.raises(UnknownNameError, match="curriculum: no curriculum 'dmp'; did you mean 'dump'"):
        make_curriculum(CurriculumSection(name="dmp"), ["a"])
    with pytest.raises(UnknownNameError, match="has no option 'windw'; did you mean 'window'"):
        make_curriculum(CurriculumSection(name="dump", options={"windw": 9}), ["a"])
    with pytest.raises(InvalidInputError, match="curriculum: window must be an integer of at least 1"):
        make_curriculum(CurriculumSection(name="dump", options={"window": 0}), ["a"])


def test_objectives_by_name_and_by_parts() -> None:
    assert make_objective(ObjectiveSection()) is None
    named = make_objective(ObjectiveSection(name="etr", options={"micro": 0.5, "kl": 0.01}))
    parts = {"trust_region": {"kind": "elastic", "micro": 0.5}, "aggregation": "token-mean", "kl": {"weight": 0.01}}
    assert make_objective(ObjectiveSection(parts=parts)) == named
    with pytest.raises(UnknownNameError, match="objective: no objective 'ert'; did you mean 'etr'"):
        make_objective(ObjectiveSection(name="ert"))
    with pytest.raises(UnknownNameError, match=r"objective: .*no option 'mikro'; did you mean 'micro'"):
        make_objective(ObjectiveSection(name="etr", options={"mikro": 0.5}))
    with pytest.raises(InvalidInputError, match="objective: micro must be in"):
        make_objective(ObjectiveSection(name="etr", options={"micro": 2.0}))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("name='etr'\nkl=0.1", "kl belongs to TRL's own loss"),
        ("name='etr'\nparts={ratio='token'}", "a name or parts, only one"),
        ("options={low=0.1}", "options belong to a name"),
    ],
)
def test_an_objective_is_described_once(tmp_path: Path, section: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        load_recipe(write(tmp_path, MINIMAL + f"[objective]\n{section}\n"))


def test_the_page_on_training_holds_the_present_reference() -> None:
    from polyreward.training.reference import recipe_reference

    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
    assert page.endswith(recipe_reference())
