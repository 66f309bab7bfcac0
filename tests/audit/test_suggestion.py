"""The suggestion: one transform, whose code and recipe build an equal one, for every combination of findings."""

import itertools
import tomllib

import numpy as np
import pytest
import torch

from polyreward.advantages.config import from_config
from polyreward.advantages.presets import PRESETS
from polyreward.advantages.transform import compute_advantages
from polyreward.audit.diagnose import diagnose
from polyreward.audit.diagnose.evidence import Evidence
from polyreward.audit.diagnose.findings import Finding
from polyreward.audit.diagnose.remedies import remedy
from polyreward.audit.diagnose.suggestion import suggest
from polyreward.batch import RewardBatch
from polyreward.storage import toml_value
from polyreward.tasks.synthetic_logs import PROBLEMS, clean, planted
from polyreward.training.parts import make_advantage
from polyreward.training.recipe import RewardSection, load_recipe

KINDS = ("drowned", "collapse", "scale", "heavy tail", "skew", "cross-stratum bias")
RECIPE = """
[tasks]
families = [{ name = "chain_sum" }]
[evaluation]
score = "verifier"
"""


def finding(kind):
    return Finding(kind, "warning", "verifier", 1.0, (0.5, 1.5), "")


def combinations():
    for size in range(1, len(KINDS) + 1):
        yield from itertools.combinations(KINDS, size)


def evidence(weights=None, **options):
    batch = clean(0, "short log")
    return Evidence(batch, weights, **options)


def built_by_code(code):
    names = {}
    exec(code, names)
    return names["advantage"]


def section_of(recipe, evidence, folder):
    rewards = "".join(
        f"[[rewards]]\nname = {toml_value(name)}\nweight = {weight}\n"
        for name, weight in zip(evidence.names, evidence.weights.tolist(), strict=True)
    )
    (folder / "recipe.toml").write_text(f"{rewards}\n{RECIPE}\n{recipe}\n", encoding="utf-8")
    return load_recipe(folder / "recipe.toml")


@pytest.mark.parametrize("weights", [None, {"reward_1": 0.25, "reward_2": 0.0}], ids=["equal weights", "weights"])
def test_code_and_recipe_build_the_suggested_transform(weights, tmp_path):
    log = evidence(weights)
    for kinds in combinations():
        made = suggest([finding(kind) for kind in kinds], log)
        assert built_by_code(made.code()) == made.transform, kinds
        recipe = section_of(made.recipe(), log, tmp_path)
        assert from_config(recipe.advantage.model_dump(exclude_defaults=True)) == made.transform, kinds
        # a recipe hands its weights to an advantage that names none: the same advantages
        told = make_advantage(recipe.advantage, recipe.rewards)
        batch = log.batch
        torch.testing.assert_close(compute_advantages(told, batch), compute_advantages(made.transform, batch))


@pytest.mark.parametrize(
    ("kinds", "preset", "options"),
    [
        (["cross-stratum bias"], "stratified-grpo", {"blend": 0.8, "by": "stratum"}),
        (["drowned"], "gdpo", {}),
        (["collapse", "drowned"], "gdpo", {}),
        (["scale"], "ema-grpo", {"by": "task"}),
        (["heavy tail"], "gaussian-grpo", {"by": "task"}),
        (["skew", "scale"], "gaussian-grpo", {"by": "task"}),
        (["skew", "drowned"], "gaussian-gdpo", {"by": "task"}),
    ],
)
def test_presets_are_named(kinds, preset, options):
    made = suggest([finding(kind) for kind in kinds], evidence())
    assert (made.preset, dict(made.options)) == (preset, options)
    assert made.transform == PRESETS[preset](**options)


def test_a_blend_reads_like_a_recipe():
    made = suggest([finding("cross-stratum bias"), finding("scale")], evidence())
    assert made.code().endswith(
        "advantage = blend(\n"
        "    0.8 * chain(WeightedSum(), Center(by=('group', 'stratum')), Scale(by='task', ddof=0)),\n"
        "    0.2 * chain(WeightedSum(), Center(), Scale(by='task')),\n)"
    )
    assert tomllib.loads(made.recipe())["advantage"]["blend"][0]["weight"] == 0.8


def test_information_suggests_nothing():
    assert suggest([], evidence()) is None
    assert suggest([Finding("scale", "info", "x", 1.0, (0, 2), "")], evidence()) is None
    assert suggest([finding("conflict"), finding("drift")], evidence()) is None


def test_names_of_columns_and_rewards_are_quoted(tmp_path):
    batch = clean(0, "short log")
    odd = 'a "b"\n\\ chain(c)'
    columns = {**batch.columns, odd: batch.column("stratum"), "näme": batch.column("task")}
    log = Evidence(
        RewardBatch(batch.rewards, (odd, "verifier", "c"), batch.groups, columns), {odd: 2.0}, task="näme", stratum=odd
    )
    for kinds in combinations():
        made = suggest([finding(kind) for kind in kinds], log)
        assert built_by_code(made.code()) == made.transform
        recipe = section_of(made.recipe(), log, tmp_path)
        assert from_config(recipe.advantage.model_dump(exclude_defaults=True)) == made.transform


def test_no_task_column_and_groups_of_one_are_minded():
    batch = clean(0, "short log")
    bare = Evidence(RewardBatch(batch.rewards, batch.names, batch.groups))
    assert dict(suggest([finding("heavy tail")], bare).options) == {"by": "batch"}
    lonely = Evidence(RewardBatch(batch.rewards, batch.names, torch.arange(len(batch)), batch.columns))
    assert suggest([finding("scale")], lonely).options["singleton"] == "zero"


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_remedy_runs(problem, tmp_path):
    batch = planted(problem, 100)
    diagnosis = diagnose(batch)
    assert diagnosis.problems()
    for found in diagnosis.problems():
        code, _, recipe = found.fix.partition("# or in a recipe\n")
        names = {"rewards": {name: lambda prompts, completions, **_: [1.0] * len(prompts) for name in batch.names}}
        exec(code if recipe else "", names)
        assert set(names) & {"advantage", "reward", "objective", "curriculum"} or not recipe
        if "reward" in names:
            assert len(names["reward"](prompts=["a"], completions=["b c"])) == 1
        if recipe:
            values = tomllib.loads(recipe)
            rewards = [*values.pop("rewards", []), {"name": "verifier"}]
            rewards = list({entry["name"]: entry for entry in rewards}.values())
            for entry in rewards:
                RewardSection(**entry)
            lines = "".join(f"[[rewards]]\nname = {toml_value(entry['name'])}\n" for entry in rewards)
            rest = recipe if "[[rewards]]" not in recipe else ""
            (tmp_path / "recipe.toml").write_text(f"{lines}{RECIPE}{rest}\n")
            load_recipe(tmp_path / "recipe.toml")


def test_the_gate_keeps_negative_rewards_below_what_passes():
    rng = np.random.default_rng(0)
    quality = rng.standard_normal((200, 8))
    rewards = np.stack([(quality > 0).ravel() * 1.0, (-3 - quality + rng.standard_normal((200, 8))).ravel()], 1)
    log = Evidence(RewardBatch(torch.from_numpy(rewards), ("correct", "brevity"), np.repeat(np.arange(200), 8)))
    code = remedy(Finding("conflict", "warning", "correct / brevity", -0.5, (-0.6, -0.4), ""), log)
    names = {
        "rewards": {
            "correct": lambda prompts, completions, **_: [0.0, 1.0],
            "brevity": lambda prompts, completions, **_: [-3.0, -3.0],
        }
    }
    exec(code, names)
    wrong, right = names["reward"](prompts=["a"] * 2, completions=["b"] * 2)
    assert wrong < right == -3.0
