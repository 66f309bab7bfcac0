"""What every preset and every part promises. A new preset is tested by being in ``PRESETS``; a new part needs a row."""

import inspect
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from polyreward import advantages
from polyreward.advantages import (
    PARTS,
    PRESETS,
    Center,
    Gaussianize,
    LeaveOneOut,
    MovingScale,
    Multiply,
    Scale,
    Standardize,
    Stratify,
    Transform,
    WeightedSum,
    Whiten,
    blend,
    chain,
    compute_advantages,
    from_config,
    preset,
    to_code,
    to_config,
)
from polyreward.batch import RewardBatch

NAN = float("nan")
SINGLES = {"ema-grpo", "ema-grpo-released"}  # presets that refuse groups of one unless told otherwise

# every part, in more than its default form where forms differ
PART_ROWS: dict[str, Transform] = {
    "WeightedSum": WeightedSum(),
    "WeightedSum by name": WeightedSum({"a": 1.0, "b": -0.5}),
    "WeightedSum by position": WeightedSum((1.0, 0.0)),
    "Center": Center(),
    "Center, raw": Center("task", "raw"),
    "LeaveOneOut": LeaveOneOut(),
    "LeaveOneOut, raw": LeaveOneOut(singleton="raw"),
    "Scale": Scale(),
    "Scale by two keys": Scale(("task", "stratum"), epsilon=0.0, ddof=0),
    "Standardize": Standardize(),
    "Standardize across": Standardize("group", "batch", epsilon=1e-3, ddof=0, singleton="raw"),
    "Standardize without singles": Standardize("batch", ignore_single="group"),
    "Whiten": Whiten(),
    "Whiten by length": Whiten("task", "length", epsilon=0.0),
    "Stratify": Stratify(),
    "MovingScale": MovingScale(singleton="zero"),
    "MovingScale of groups": MovingScale("task", 0.5, 1e-3, 1e-6, guard=1.5, moment="group", singleton="zero"),
    "Gaussianize": Gaussianize(),
    "Gaussianize with tolerance": Gaussianize("task", 1e-6, "group"),
    "Multiply": Multiply(-0.25),
}  # fmt: skip
MAKERS: dict[str, Callable[[], Transform]] = {
    **{name: (lambda name=name: preset(name, **_lenient(name))) for name in PRESETS},
    **{
        f"part {name}": (lambda name=name: chain(_copy(PART_ROWS[name]), WeightedSum()))
        for name in PART_ROWS
        if not name.startswith("WeightedSum")
    },
    **{f"part {name}": (lambda name=name: chain(PART_ROWS[name])) for name in PART_ROWS if name.startswith("Weighted")},
    "blend": lambda: blend(0.7 * preset("grpo"), 0.3 * preset("gdpo"), preset("ema-grpo", singleton="zero")),
    "no parts but a sum": lambda: 2 * chain(WeightedSum()),
}  # fmt: skip
every = pytest.mark.parametrize("name", MAKERS)


def _lenient(name: str) -> dict[str, Any]:
    return {"singleton": "zero"} if name in SINGLES else {}


def _copy(part: Transform) -> Transform:
    return from_config(to_config(part))


def ragged(dtype: torch.dtype = torch.float64, missing: bool = False) -> RewardBatch:
    """Groups of 5, 4, 4, 2 and 1 rows in no order, two tasks, two rewards; the group "flat" has equal rewards."""
    generator = torch.Generator().manual_seed(3)
    groups = ["a"] * 5 + ["b"] * 4 + ["flat"] * 4 + ["pair"] * 2 + ["one"]
    number = len(groups)
    rewards = torch.randn(number, 2, generator=generator, dtype=torch.float64)
    rewards[9:13] = torch.tensor([0.1, 1 / 3], dtype=torch.float64)
    if missing:
        rewards[[0, 6, 13, 13, 4, 4, 11], [0, 1, 0, 1, 0, 1, 1]] = NAN
    columns = {
        "task": [0] * 9 + [1] * 7,
        "stratum": torch.randint(-1, 3, (number,), generator=generator),
        "length": torch.randint(0, 50, (number,), generator=generator),
    }
    batch = RewardBatch(rewards.to(dtype), ("a", "b"), groups, columns)
    return batch.select(torch.randperm(number, generator=generator))


def alone(batch: RewardBatch, name: str) -> torch.Tensor:
    """Rows of the group called `name`."""
    groups = batch.segments("group")
    return torch.tensor([groups.label(code) == name for code in groups.codes.tolist()])


def test_every_part_and_preset_has_a_row() -> None:
    assert {type(part).__name__ for part in PART_ROWS.values()} == set(PARTS)
    assert set(PRESETS) <= set(MAKERS)
    exported = {value for value in vars(advantages).values() if inspect.isfunction(value)}
    assert set(PRESETS.values()) <= exported
    assert all(getattr(advantages, part) is kind for part, kind in PARTS.items())
    assert sorted(advantages.__all__) == sorted(set(advantages.__all__))
    for name in advantages.__all__:
        assert hasattr(advantages, name)


@every
@pytest.mark.parametrize("missing", [False, True])
def test_permutation(name: str, missing: bool) -> None:
    batch = ragged(missing=missing)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    got = compute_advantages(MAKERS[name](), batch)
    torch.testing.assert_close(compute_advantages(MAKERS[name](), batch.select(order)), got[order])


@every
@pytest.mark.parametrize("missing", [False, True])
def test_names_of_groups_do_not_matter(name: str, missing: bool) -> None:
    batch = ragged(missing=missing)
    codes = batch.segments("group").codes
    other = RewardBatch(batch.rewards, batch.names, 10**12 - 7 * codes, batch.columns)
    torch.testing.assert_close(compute_advantages(MAKERS[name](), other), compute_advantages(MAKERS[name](), batch))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    batch = ragged(dtype, missing=True)
    got = compute_advantages(MAKERS[name](), batch)
    assert got.dtype == dtype
    assert got.shape == (len(batch),)
    wide = RewardBatch(batch.rewards.double(), batch.names, batch.groups, batch.columns)
    reference = compute_advantages(MAKERS[name](), wide)
    if (
        dtype not in (torch.float16, torch.bfloat16) or "aussian" not in name
    ):  # sums of halves tie where wide ones do not
        tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4, torch.float64: 0.0}[dtype]
        torch.testing.assert_close(got.double(), reference, rtol=tolerance, atol=tolerance)


@every
def test_nan_gives_zero_and_touches_nothing(name: str) -> None:
    batch = ragged(missing=True)
    got = compute_advantages(MAKERS[name](), batch)
    assert bool(torch.isfinite(got).all())
    assert batch.valid is not None
    nothing = ~batch.valid.any(1)
    assert int(nothing.sum()) == 2
    assert got[nothing].tolist() == [0.0] * 2
    # a row without any reward leaves the others as if it were absent
    rest = batch.select(~nothing)
    torch.testing.assert_close(compute_advantages(MAKERS[name](), rest), got[~nothing])


@every
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (4, 3)])
def test_nothing_but_nan(name: str, shape: tuple[int, int]) -> None:
    number = shape[0]
    columns = {"task": [0] * number, "stratum": [0] * number, "length": [5] * number}
    names = ("a", "b", "c")[: shape[1]]
    if "by name" in name or "by position" in name:
        pytest.skip("its weights are for two rewards")
    batch = RewardBatch(torch.full(shape, NAN), names, columns=columns)
    assert compute_advantages(MAKERS[name](), batch).tolist() == [0.0] * number


@every
@pytest.mark.parametrize("width", [1, 2])
def test_no_rows(name: str, width: int) -> None:
    if width == 1 and ("by name" in name or "by position" in name):
        pytest.skip("its weights are for two rewards")
    columns: dict[str, Any] = {"task": [], "stratum": [], "length": torch.zeros(0)}
    batch = RewardBatch(torch.zeros(0, width), ("a", "b")[:width], [], columns)
    got = compute_advantages(MAKERS[name](), batch)
    assert got.shape == (0,)
    assert got.dtype == torch.float32
    full = ragged()
    assert compute_advantages(MAKERS[name](), full.select([])).shape == (0,)


CENTRED = [name for name in PRESETS if name != "gaussian-grpo-released"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name", [name for name in CENTRED if "reinforce-plus-plus" not in name and not name.startswith("gdpo")]
)
def test_a_group_of_equal_rewards_is_exactly_zero(name: str, dtype: torch.dtype) -> None:
    batch = ragged(dtype)
    got = compute_advantages(MAKERS[name](), batch)
    assert got[alone(batch, "flat")].tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("number", [2, 3, 10, 33])
def test_a_batch_of_equal_rewards_is_exactly_zero(name: str, dtype: torch.dtype, number: int) -> None:
    columns = {"task": [0] * number, "stratum": [0] * number, "length": list(range(3, 3 + number))}
    for value in (0.0, 0.1, -1 / 3, 1e6 + 0.1):
        batch = RewardBatch(torch.full((number, 2), value, dtype=dtype), groups=[0] * number, columns=columns)
        assert not compute_advantages(MAKERS[name](), batch).any()


@pytest.mark.parametrize("name", PRESETS)
def test_groups_of_one(name: str) -> None:
    columns = {"task": [0] * 4, "stratum": [0] * 4, "length": [3, 4, 5, 6]}
    batch = RewardBatch(torch.tensor([[1.0], [2.0], [0.5], [4.0]]), groups=torch.arange(4), columns=columns)
    got = compute_advantages(MAKERS[name](), batch)
    kept = {  # what these do with a single sample is the difference to the paper that they are there for
        "rloo-verl": batch.rewards[:, 0],
        "grpo-verl": batch.rewards[:, 0] / (1 + 1e-6),
        "reinforce-plus-plus": None,
        "reinforce-plus-plus-verl": None,
        "reinforce-plus-plus-baseline-verl": None,
        "gdpo-verl": None,
    }
    if name not in kept:
        assert got.tolist() == [0.0] * 4
    elif kept[name] is None:
        assert got.abs().min() > 0
    else:
        torch.testing.assert_close(got, kept[name])


@pytest.mark.parametrize("name", sorted(SINGLES))
def test_presets_that_refuse_a_group_of_one(name: str) -> None:
    with pytest.raises(ValueError, match="has one row"):
        compute_advantages(preset(name), ragged())


@every
def test_rewards_that_require_grad_and_strided_rewards(name: str) -> None:
    batch = ragged(torch.float64, missing=True)
    got = compute_advantages(MAKERS[name](), batch)
    strided = RewardBatch(batch.rewards.t().contiguous().t(), batch.names, batch.groups, batch.columns)
    assert not strided.rewards.is_contiguous()
    assert compute_advantages(MAKERS[name](), strided).equal(got)
    rewards = batch.rewards.clone().requires_grad_()
    with_grad = compute_advantages(MAKERS[name](), RewardBatch(rewards, batch.names, batch.groups, batch.columns))
    assert with_grad.detach().equal(got)
    if with_grad.requires_grad:  # ranks carry no gradient
        with_grad.sum().backward()
        assert rewards.grad is not None
        assert bool(torch.isfinite(rewards.grad).all())


@every
def test_the_input_is_left_alone_and_the_result_repeats(name: str) -> None:
    batch = ragged(missing=True)
    before = batch.rewards.clone()
    first, second = (compute_advantages(MAKERS[name](), batch) for _ in range(2))
    torch.testing.assert_close(batch.rewards, before, rtol=0, atol=0, equal_nan=True)
    assert first.equal(second)


@every
def test_memory_round_trip(name: str) -> None:
    first, second = MAKERS[name](), MAKERS[name]()
    assert first.state_dict() == {}
    compute_advantages(first, ragged())
    state = json.loads(json.dumps(first.state_dict()))
    assert bool(state) == ("ema" in name or "Moving" in name or name == "blend")
    second.load_state_dict(state)
    batch = ragged(missing=True)
    assert compute_advantages(first, batch).equal(compute_advantages(second, batch))


@every
def test_config_round_trip(name: str) -> None:
    transform = MAKERS[name]()
    config = to_config(transform)
    assert from_config(json.loads(json.dumps(config))) == transform
    assert from_config(config) == transform


@every
def test_code_round_trip(name: str) -> None:
    transform = MAKERS[name]()
    names = {key: getattr(advantages, key) for key in advantages.__all__}
    assert eval(to_code(transform), {"__builtins__": {}}, names) == transform


@pytest.mark.parametrize("name", PART_ROWS)
def test_parts_keep_dtype_and_shape(name: str) -> None:
    part = PART_ROWS[name]
    batch = ragged(torch.float32, missing=True)
    wide = _copy(part)(batch.rewards, batch)
    assert wide.dtype == torch.float32
    assert bool(torch.isfinite(wide).all())
    if isinstance(part, WeightedSum):
        assert wide.shape == (len(batch),)
        return
    assert wide.shape == batch.rewards.shape
    assert not wide[torch.isnan(batch.rewards)].any()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        single = _copy(part)(batch.rewards[:, 0].to(dtype), batch)
        assert (single.shape, single.dtype) == ((len(batch),), dtype)


@pytest.mark.parametrize("name", PRESETS)
def test_docstrings_name_paper_and_shapes(name: str) -> None:
    text = PRESETS[name].__doc__ or ""
    assert "(N, K) -> (N,)" in text
    assert "Paper:" in text
    assert re.search(r"arXiv \d{4}\.\d{5}|Williams, 1992", text)
    assert "weights" in inspect.signature(PRESETS[name]).parameters


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_docstrings_of_parts_explain_every_argument(part: type[Transform]) -> None:
    text = part.__doc__ or ""
    for argument in inspect.signature(part).parameters:
        assert re.search(rf"\b{argument}\b", text), argument


@pytest.mark.parametrize("name", PRESETS)
def test_weights(name: str) -> None:
    batch = ragged()
    by_name = compute_advantages(preset(name, weights={"b": 0.5, "a": 2.0}, **_lenient(name)), batch)
    by_place = compute_advantages(preset(name, weights=[2.0, 0.5], **_lenient(name)), batch)
    assert by_name.equal(by_place)
    only_a = compute_advantages(preset(name, weights=[1.0, 0.0], **_lenient(name)), batch)
    alone_a = RewardBatch(batch.rewards[:, :1], ("a",), batch.groups, batch.columns)
    torch.testing.assert_close(only_a, compute_advantages(MAKERS[name](), alone_a))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@every
def test_cuda_agrees_with_the_cpu_and_repeats(name: str) -> None:
    batch = ragged(missing=True)
    first, second = (compute_advantages(MAKERS[name](), batch.to("cuda")) for _ in range(2))
    assert first.is_cuda
    assert first.equal(second)
    torch.testing.assert_close(first.cpu(), compute_advantages(MAKERS[name](), batch))
