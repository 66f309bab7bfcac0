"""Transforms as plain data and as code, and what is said about data that is wrong."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from polyreward import advantages
from polyreward.advantages import (
    PRESETS,
    Blend,
    Center,
    Chain,
    Gaussianize,
    LeaveOneOut,
    MovingScale,
    Multiply,
    Standardize,
    Stratify,
    Transform,
    WeightedSum,
    Whiten,
    blend,
    chain,
    columns_of,
    dr_grpo,
    from_config,
    gaussian_grpo,
    grpo,
    grpo_trl,
    preset,
    stratified_grpo,
    to_code,
    to_config,
)
from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, UnknownNameError

SHAPES: list[Transform] = [
    Center(),
    chain(),
    chain(Center()),
    Multiply(2),
    chain(Multiply(0.5)),
    0.5 * chain(),
    -0.5 * grpo(),
    0.5 * (0.25 * grpo()),
    blend(Center()),
    blend(0.5 * Center(), -1 * chain(), Multiply(3.0)),
    blend(blend(grpo(), 0.1 * grpo()), 0.5 * blend(grpo(), dr_grpo())),
    chain(blend(WeightedSum(), WeightedSum([1.0, 2.0])), Center(("group", "task"))),
    Chain((Chain((Center(),)), Multiply(1e-3))),
    Blend((chain(WeightedSum({"a b": 1.5, "c": -2.0})),)),
    Stratify(blend=np.float64(0.25)),
    gaussian_grpo(levels=[["group"], ["task", "stratum"]], zero_dead_groups=True),
]


@pytest.mark.parametrize("transform", SHAPES, ids=repr)
def test_round_trips(transform: Transform) -> None:
    config = json.loads(json.dumps(to_config(transform)))
    assert from_config(config) == transform
    names = {key: getattr(advantages, key) for key in advantages.__all__}
    assert eval(to_code(transform), {"__builtins__": {}}, names) == transform


def test_what_is_written() -> None:
    transform = blend(0.7 * chain(WeightedSum({"a": 2.0}), Center("task")), Standardize(ddof=0))
    assert to_config(transform) == {
        "blend": [
            {
                "weight": 0.7,
                "chain": [{"part": "WeightedSum", "weights": {"a": 2.0}}, {"part": "Center", "by": "task"}],
            },
            {"part": "Standardize", "ddof": 0},
        ]
    }
    assert to_code(transform) == (
        "blend(0.7 * chain(WeightedSum(weights={'a': 2.0}), Center(by='task')), Standardize(ddof=0))"
    )


def test_forms_of_recipes() -> None:
    for share in (0.6, 1, 0, 0.0):
        assert from_config({"preset": "stratified-grpo", "blend": share}) == stratified_grpo(blend=share)
        assert from_config({"part": "Stratify", "blend": share}) == Stratify(share)
    inner = {"blend": [{"weight": 0.5, "preset": "stratified-grpo", "blend": 0.6}, {"preset": "grpo"}]}
    assert from_config(inner) == blend(0.5 * stratified_grpo(blend=0.6), grpo())
    assert from_config({"preset": "grpo_trl", "options": {"scale_rewards": "batch"}}) == grpo_trl(scale_rewards="batch")
    assert from_config({"chain": [{"preset": "grpo"}, {"part": "Multiply", "factor": 2}]}) == 2 * grpo()
    assert from_config({"blend": [{"weight": 1, "preset": "grpo"}, {"preset": "dr-grpo"}]}) == blend(
        1 * grpo(), dr_grpo()
    )
    assert from_config(grpo()) == grpo()
    weights = {"a": 1.0, "b": 2.0}
    assert from_config({"preset": "grpo"}, weights=weights) == grpo(weights)
    assert from_config({"preset": "grpo", "weights": [1.0, 1.0]}, weights=weights) == grpo([1.0, 1.0])
    assert from_config({"chain": [{"part": "WeightedSum"}, {"part": "Center"}]}, weights=weights) == dr_grpo(weights)
    assert from_config({"part": "Center", "by": ["group", "task"]}) == Center(("group", "task"))


class Sign(Transform):
    def __call__(self, signal: torch.Tensor, batch: RewardBatch) -> torch.Tensor:
        return signal.sign()


def test_parts_of_ones_own() -> None:
    made = from_config({"chain": [{"part": "WeightedSum"}, {"part": "Sign"}]}, parts={"Sign": Sign})
    assert isinstance(made, Chain)
    assert isinstance(made.parts[1], Sign)
    with pytest.raises(InvalidInputError, match="Sign is not a dataclass, so its arguments cannot be written down"):
        to_config(made)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("grpo", InvalidInputError, "advantage: expected a table, got 'grpo'"),
        ({}, InvalidInputError, "advantage: give one of preset, chain, blend, part; got nothing"),
        ({"blend": []}, InvalidInputError, r"advantage: give one of .*; got \['blend'\]"),
        ({"prset": "grpo"}, InvalidInputError, r"got \['prset'\]; did you mean 'preset'"),
        (
            {"preset": "grpo", "chain": [{"part": "Center"}]},
            InvalidInputError,
            "give one of preset, chain, blend, part",
        ),
        ({"preset": "gropo"}, UnknownNameError, "advantage: no preset 'gropo'; did you mean 'grpo'"),
        ({"preset": "grpo", "epsilom": 1}, UnknownNameError, "has no parameter 'epsilom'; did you mean 'epsilon'"),
        ({"preset": "stratified-grpo", "blend": 3}, InvalidInputError, r"advantage: blend must be in \[0, 1\], got 3"),
        ({"preset": "stratified-grpo", "options": 3}, InvalidInputError, "advantage: options must be a table, got 3"),
        ({"part": "Centre"}, UnknownNameError, "advantage: no part 'Centre'; did you mean 'Center'"),
        ({"part": "Center", "on": "task"}, UnknownNameError, "advantage: part Center has no argument 'on'"),
        ({"part": "Multiply"}, InvalidInputError, "advantage: .*missing 1 required positional argument: 'factor'"),
        ({"part": "Multiply", "factor": "x"}, InvalidInputError, "advantage: "),
        ({"chain": {"part": "Center"}}, InvalidInputError, "advantage: chain must be a list"),
        ({"chain": "Center"}, InvalidInputError, "advantage: chain must be a list, got 'Center'"),
        ({"chain": [{"part": "Center"}], "by": "task"}, UnknownNameError, "advantage: unknown key 'by'"),
        ({"chain": [{"part": "Center"}, {"part": "Scal"}]}, UnknownNameError, r"advantage.chain\[1\]: no part 'Scal'"),
        (
            {"blend": [{"preset": "grpo", "weight": "x"}]},
            InvalidInputError,
            r"blend\[0\]: weight must be a number, got 'x'",
        ),
        ({"blend": [{"preset": "grpo"}, 3]}, InvalidInputError, r"advantage.blend\[1\]: expected a table, got 3"),
    ],
)
def test_data_that_is_refused(config: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_config(config)


def test_values_that_plain_data_cannot_hold() -> None:
    @dataclass(frozen=True)
    class Own(Transform):
        table: torch.Tensor

    with pytest.raises(InvalidInputError, match="argument 'table' holds a Tensor, which plain data cannot"):
        to_config(Own(torch.tensor(0.5)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"preset": "ema-grpo", "decay": "x"}, "decay must be a number, got 'x'"),
        ({"preset": "ema-grpo", "options": {"guard": "x"}}, "guard must be a number, got 'x'"),
        ({"preset": "stratified-grpo", "blend": "x"}, "blend must be a number, got 'x'"),
        ({"part": "Stratify", "blend": "x"}, "blend must be a number, got 'x'"),
        ({"part": "Gaussianize", "tolerance": "x"}, "tolerance must be a finite number >= 0, got 'x'"),
        ({"preset": "grpo", "weights": 5}, "weights must be a mapping by name or K numbers, got 5"),
    ],
)
def test_a_value_of_the_wrong_kind_names_the_argument(config: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"^advantage: {message}"):
        from_config(config)


def test_columns_that_a_transform_reads() -> None:
    mixture = blend(0.5 * stratified_grpo(by=("stratum", "tool")), preset("gdpo-verl"), preset("gaussian-grpo"))
    assert columns_of(mixture) == ("stratum", "tool", "length", "task")
    assert columns_of(grpo({"by": 1.0})) == ()


def test_presets_by_name() -> None:
    for name, function in PRESETS.items():
        assert preset(name) == preset(name.replace("-", "_")) == function()
    with pytest.raises(UnknownNameError, match="no preset 'gdpoo'; did you mean 'gdpo"):
        preset("gdpoo")
    with pytest.raises(UnknownNameError, match="preset 'grpo' has no parameter 'dof'; did you mean 'ddof'"):
        preset("grpo", dof=1)
    with pytest.raises(InvalidInputError, match="scale_rewards must be 'group', 'batch' or 'none', got 'task'"):
        preset("grpo-trl", scale_rewards="task")


# What each preset is, with the constants that papers and released codes differ in written out.
CHAINS = {
    "reinforce": [Center("group", "zero")],
    "rloo": [LeaveOneOut("group", "zero")],
    "rloo-trl": [LeaveOneOut("group", "zero")],
    "rloo-verl": [LeaveOneOut("group", "raw")],
    "grpo": [Standardize("group", None, 1e-6, 1, "zero")],
    "grpo-trl": [Standardize("group", None, 1e-4, 1, "zero")],
    "grpo-verl": [Standardize("group", None, 1e-6, 1, "raw")],
    "dr-grpo": [Center("group", "zero")],
    "reinforce-plus-plus": [Standardize("batch", None, 1e-8, 1)],
    "reinforce-plus-plus-baseline": [Center("group", "zero"), Standardize("batch", None, 1e-8, 1)],
    "reinforce-plus-plus-verl": [Whiten("batch", "length", 1e-8, 1)],
    "reinforce-plus-plus-baseline-verl": [Center("group", "raw"), Whiten("batch", "length", 1e-8, 1)],
    "stratified-grpo": [Stratify(0.8, "stratum", 1e-6, 0)],
    "ema-grpo": [MovingScale("task", 0.99, 0.0, 0.0, None, "task", "error")],
    "ema-grpo-released": [MovingScale("task", 0.99, 1e-3, 1e-6, 5.0, "task", "error")],
    "gaussian-grpo": [Gaussianize("group", 1e-6), Gaussianize("task", 1e-9, "group")],
    "gaussian-grpo-released": [Gaussianize("group", 0.0), Gaussianize("task", 1e-9)],
}
FIRST_PER_REWARD = {
    "gdpo": (Standardize("group", None, 1e-6, 1, "zero"), Standardize("batch", None, 1e-6, 1)),
    "gdpo-trl": (Standardize("group", None, 1e-4, 1, "zero"), Standardize("batch", None, 1e-4, 1)),
    "gdpo-verl": (Standardize("group", None, 1e-6, 1, "raw"), Whiten("batch", "length", 1e-8, 1)),
    "gaussian-gdpo": (Gaussianize("group", 1e-6), Gaussianize("task", 1e-6, "group")),
}


@pytest.mark.parametrize("name", PRESETS)
def test_constants_of_presets(name: str) -> None:
    if name in CHAINS:
        assert preset(name) == chain(WeightedSum(), *CHAINS[name])
    else:
        inner, outer = FIRST_PER_REWARD[name]
        assert preset(name) == chain(inner, WeightedSum(), outer)
