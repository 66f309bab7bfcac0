"""The record: construction, columns, segments, selection, Arrow and Parquet, error texts."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.batch import RewardBatch
from polyreward.errors import InvalidInputError, MissingColumnError, MissingFileError
from polyreward.grouped import factorize

NAN = float("nan")


def example(**changes: Any) -> RewardBatch:
    parts: dict[str, Any] = {
        "rewards": torch.tensor([[1.0, NAN], [0.5, 2.0], [0.0, -1.0], [NAN, NAN]]),
        "names": ("accuracy", "format"),
        "groups": ["b", "a", "b", "a"],
        "columns": {
            "task": ["maths", "code", "maths", "code"],
            "length": [3, 1, 4, 1],
            "flag": [True, False, True, True],
        },
    }
    return RewardBatch(**{**parts, **changes})


def same(first: RewardBatch, second: RewardBatch) -> None:
    assert first.rewards.dtype == second.rewards.dtype
    torch.testing.assert_close(first.rewards, second.rewards, rtol=0, atol=0, equal_nan=True)
    assert first.names == second.names
    a, b = first.segments("group"), second.segments("group")
    assert [a.label(c) for c in a.codes.tolist()] == [b.label(c) for c in b.codes.tolist()]
    assert set(first.columns) == set(second.columns)
    for name, column in first.columns.items():
        other = second.columns[name]
        assert type(column) is type(other), name
        if isinstance(column, torch.Tensor):
            torch.testing.assert_close(column, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert column.tolist() == other.tolist()


# construction


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_are_kept_as_they_are(dtype: torch.dtype) -> None:
    rewards = torch.tensor([[1.0, 2.0]], dtype=dtype)
    batch = RewardBatch(rewards)
    assert batch.rewards is rewards
    assert batch.names == ("reward_0", "reward_1")
    assert len(batch) == 1


@pytest.mark.parametrize(
    ("rewards", "dtype", "expected"),
    [
        ([1, 0, None], torch.float32, [[1.0], [0.0], [NAN]]),
        ([[1.5, None], [2, 3]], torch.float32, [[1.5, NAN], [2.0, 3.0]]),
        (np.array([1.0, 2.0]), torch.float64, [[1.0], [2.0]]),
        (np.arange(4, dtype=np.float32)[::-2], torch.float32, [[3.0], [1.0]]),
        (np.array([[1, 2]]), torch.float32, [[1.0, 2.0]]),
        (torch.tensor([3, 4]), torch.float32, [[3.0], [4.0]]),
        (torch.tensor([True, False]), torch.float32, [[1.0], [0.0]]),
        ([], torch.float32, []),
    ],
)
def test_what_rewards_may_be(rewards: Any, dtype: torch.dtype, expected: list[list[float]]) -> None:
    batch = RewardBatch(rewards)
    assert batch.rewards.dtype == dtype
    torch.testing.assert_close(
        batch.rewards, torch.tensor(expected, dtype=dtype).reshape(batch.rewards.shape), equal_nan=True
    )
    assert batch.rewards.ndim == 2


def test_names_and_groups_by_default() -> None:
    batch = RewardBatch([1.0, 2.0, 3.0])
    assert batch.names == ("reward",)
    assert batch.segments("group").codes.tolist() == [0, 0, 0]
    assert RewardBatch([1.0], names="accuracy").names == ("accuracy",)
    assert RewardBatch([[1.0, 2.0]], names=["a", "b"]).names == ("a", "b")


def test_gradients_pass_through_the_record() -> None:
    rewards = torch.ones(3, 1, requires_grad=True)
    batch = RewardBatch(rewards, groups=[0, 0, 1])
    batch.segments().mean(batch.rewards).sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.flatten().tolist() == [0.5, 0.5, 1.0]


def test_from_trl() -> None:
    batch = RewardBatch.from_trl(
        torch.tensor([[1.0, NAN], [2.0, 0.0], [3.0, 1.0], [4.0, 1.0]]), ["a", "b"], 2, task=list("xxyy")
    )
    assert batch.names == ("a", "b")
    assert batch.segments("group").codes.tolist() == [0, 0, 1, 1]
    assert batch.column("task").tolist() == list("xxyy")
    assert len(RewardBatch.from_trl(torch.zeros(0, 2), ["a", "b"], 4)) == 0
    for number in (3, 0, -1):
        with pytest.raises(InvalidInputError, match=f"4 rows cannot be split into groups of num_generations={number}"):
            RewardBatch.from_trl(torch.zeros(4, 1), ["a"], number)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": torch.zeros(4, 2, 2)}, r"rewards must have shape \(N, K\), got \(4, 2, 2\)"),
        ({"rewards": torch.tensor(1.0)}, r"rewards must have shape \(N, K\), got \(\)"),
        ({"rewards": [[1.0], [1.0, 2.0]]}, r"rewards must be numbers in a rectangle \(N, K\)"),
        ({"rewards": ["good", "bad"]}, r"rewards must be numbers in a rectangle \(N, K\)"),
        ({"rewards": torch.zeros(4, 2, dtype=torch.complex64)}, "rewards must be real numbers, got torch.complex64"),
        ({"rewards": torch.tensor([[0, 0], [0, float("inf")], [0, 0], [0, 0]])}, "reward 'format' is inf in row 1"),
        (
            {"rewards": torch.tensor([[NAN, 0], [0, 0], [float("-inf"), 0], [0, 0]])},
            "reward 'accuracy' is -inf in row 2",
        ),
        ({"names": ("a",)}, r"2 rewards but 1 names \('a',\)"),
        ({"names": ("a", "a")}, r"reward names must be distinct strings, got \('a', 'a'\)"),
        ({"names": (1, 2)}, r"reward names must be distinct strings, got \(1, 2\)"),
        ({"groups": [0, 1]}, "groups has 2 entries, rewards has 4 rows"),
        ({"groups": [0, None, 1, 1]}, "groups has no value in row 1"),
        ({"groups": torch.zeros(4)}, "groups must be integers or strings, got torch.float32"),
        ({"columns": {"task": ["a"]}}, "column 'task' has 1 entries, rewards has 4 rows"),
        ({"columns": {"task": "math"}}, "column 'task' has a single value, rewards has 4 rows"),
        ({"columns": {"task": {"a": 1, "b": 2}}}, "column 'task' has a single value, rewards has 4 rows"),
        ({"columns": {"step": 3}}, "column 'step' has a single value, rewards has 4 rows"),
        ({"columns": {"step": torch.tensor(3)}}, "column 'step' has a single value, rewards has 4 rows"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        example(**changes)


def test_huge_finite_rewards_are_not_taken_for_infinite() -> None:
    batch = RewardBatch(torch.full((4,), 6e4, dtype=torch.float16))
    assert batch.valid is None
    assert RewardBatch(torch.full((2,), 3e38)).valid is None


# valid, columns, rewards


def test_valid() -> None:
    valid = example().valid
    assert valid is not None
    assert valid.tolist() == [[True, False], [True, True], [True, True], [False, False]]
    assert RewardBatch([1.0]).valid is None
    assert RewardBatch([]).valid is None


@pytest.mark.parametrize(
    ("values", "kind", "dtype"),
    [
        ([1, 2], torch.Tensor, torch.int64),
        ([1, 2.5], torch.Tensor, torch.float64),
        ([True, False], torch.Tensor, torch.bool),
        ((1, 2), torch.Tensor, torch.int64),
        (np.array([1, 2], dtype=np.uint8), torch.Tensor, torch.int64),
        (np.array([1, 2], dtype=">i4"), torch.Tensor, torch.int32),
        (np.array([1.0, 2.0], dtype=np.float32)[::-1], torch.Tensor, torch.float32),
        (np.zeros((2, 3)), torch.Tensor, torch.float64),
        (torch.zeros(2, 3, dtype=torch.int8), torch.Tensor, torch.int8),
        (["a", "b"], np.ndarray, np.dtype(object)),
        ([1, None], np.ndarray, np.dtype(object)),
        ([[1, 2], [3, 4]], np.ndarray, np.dtype(object)),
        ([{"role": "user"}, {"role": "user"}], np.ndarray, np.dtype(object)),
        ([2**70, 1], np.ndarray, np.dtype(object)),
        (np.array([2**63, 1], dtype=np.uint64), np.ndarray, np.dtype(np.uint64)),
        ((x for x in "ab"), np.ndarray, np.dtype(object)),
    ],
)
def test_columns(values: Any, kind: type, dtype: Any) -> None:
    column = RewardBatch([0.0, 1.0], columns={"c": values}).column("c")
    assert isinstance(column, kind)
    assert column.dtype == dtype
    assert column.shape[0] == 2


def test_lists_in_a_column_stay_lists() -> None:
    column = RewardBatch([0.0, 1.0], columns={"c": [[1, 2], [3, 4]]}).column("c")
    assert column.shape == (2,)
    assert column[0] == [1, 2]


def test_missing_columns_and_rewards() -> None:
    batch = example()
    with pytest.raises(MissingColumnError, match="the batch has no column 'tsk'; did you mean 'task'"):
        batch.column("tsk")
    with pytest.raises(MissingColumnError, match="the batch has no reward 'acuracy'; did you mean 'accuracy'"):
        batch.reward("acuracy")
    with pytest.raises(MissingColumnError, match="the batch has no column 'stratum'"):
        batch.segments(("group", "stratum"))
    assert batch.reward("format")[1:3].tolist() == [2.0, -1.0]


# segments


def test_segments_by_one_and_several_keys() -> None:
    batch = example()
    groups = batch.segments("group")
    assert [groups.label(c) for c in groups.codes.tolist()] == ["b", "a", "b", "a"]
    assert batch.segments("batch").codes.tolist() == [0, 0, 0, 0]
    assert batch.segments("batch").count == 1
    both = batch.segments(("task", "flag"))
    assert [both.label(c) for c in both.codes.tolist()] == [("maths", 1), ("code", 0), ("maths", 1), ("code", 1)]
    assert batch.segments(["group", "task"]).codes.tolist() == batch.segments(("group", "task")).codes.tolist()
    assert batch.segments("group") is batch.segments(("group",))  # computed once
    three = batch.segments(("group", "task", "length"))
    assert three.codes.unique().numel() == 3


def test_segments_by_a_float_column() -> None:
    with pytest.raises(InvalidInputError, match=r"column 'x' must be integers or strings, got torch\.float64"):
        RewardBatch([0.0], columns={"x": [0.5]}).segments("x")
    with pytest.raises(InvalidInputError, match=r"column 'x' must be one-dimensional, got shape \(1, 2\)"):
        RewardBatch([0.0], columns={"x": torch.zeros(1, 2, dtype=torch.int64)}).segments("x")


# select, with_columns, to


@pytest.mark.parametrize(
    "rows",
    [
        [2, 0],
        torch.tensor([2, 0]),
        np.array([2, 0]),
        [-2, 0],
        (2, 0),
        np.array([0, 2])[::-1],
        np.array([2, 0], np.uint8),
    ],
)
def test_select_rows(rows: Any) -> None:
    picked = example().select(rows)
    assert picked.reward("accuracy").tolist() == [0.0, 1.0]
    assert picked.column("task").tolist() == ["maths", "maths"]
    assert picked.column("length").tolist() == [4, 3]
    groups = picked.segments("group")
    assert [groups.label(c) for c in groups.codes.tolist()] == ["b", "b"]


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_select_by_mask(form: Any) -> None:
    assert example().select(form([False, True, False, True])).column("length").tolist() == [1, 1]
    assert len(example().select(form([False] * 4))) == 0


def test_select_nothing_and_repeats() -> None:
    assert len(example().select([])) == 0
    assert example().select([1, 1, 1]).column("length").tolist() == [1, 1, 1]
    assert len(example().select(range(2))) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([4], "row 4 of a batch of 4"),
        ([0, -5], "row -5 of a batch of 4"),
        ([True, False], "a mask of 2 rows for a batch of 4"),
        ([0.5], "rows must be whole numbers or booleans, got torch.float64"),
        ([[0]], "rows must be whole numbers or booleans"),
        (["a"], "rows must be whole numbers or booleans"),
    ],
)
def test_select_refuses(rows: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        example().select(rows)


def test_with_columns() -> None:
    batch = example()
    more = batch.with_columns(step=[1, 2, 3, 4], length=[9, 9, 9, 9])
    assert more.column("step").tolist() == [1, 2, 3, 4]
    assert more.column("length").tolist() == [9] * 4
    assert batch.column("length").tolist() == [3, 1, 4, 1]
    assert more.segments("group") is batch.segments("group")
    with pytest.raises(InvalidInputError, match="column 'step' has 1 entries"):
        batch.with_columns(step=[1])


def test_to_a_device() -> None:
    batch = example()
    assert batch.to("cpu") is batch
    if torch.cuda.is_available():
        moved = batch.to("cuda")
        assert moved.rewards.is_cuda
        assert moved.segments("task").codes.is_cuda
        same(batch, moved.to("cpu"))


# Arrow and Parquet


@pytest.mark.parametrize(
    "groups", [["b", "a", "b", "a"], [5, 5, -3, 5], [2**40, 0, 2**40, 1], [(1, 2), (3, 4), (1, 2), (3, 4)]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip(tmp_path: Path, groups: Any, dtype: torch.dtype) -> None:
    batch = example(groups=groups)
    columns = {
        "score": torch.tensor([0.5, NAN, 1.0, 2.0]),
        "wide": torch.tensor([0.1, 0.2, NAN, 1.0], dtype=torch.float64),
        "small": torch.tensor([1, 2, 3, 4], dtype=torch.int32),
        "partly": ["a", None, "b", "c"],
        "messages": [[{"role": "user", "content": "hi"}]] * 4,
        "tokens": [[1, 2], [3], [], [4, 5, 6]],
    }
    batch = RewardBatch(batch.rewards.to(dtype), batch.names, batch.groups, {**batch.columns, **columns})
    same(batch, RewardBatch.from_arrow(batch.to_arrow()))
    assert batch.write_parquet(tmp_path / "log.parquet") == tmp_path / "log.parquet"
    same(batch, RewardBatch.read_parquet(tmp_path / "log.parquet"))


def test_layout_in_arrow() -> None:
    table = example().to_arrow()
    assert table.column_names == ["group", "reward/accuracy", "reward/format", "task", "length", "flag"]
    assert table["reward/accuracy"].to_pylist() == [1.0, 0.5, 0.0, None]  # NaN is null
    assert table["group"].to_pylist() == ["b", "a", "b", "a"]


def test_what_arrow_widens() -> None:
    batch = RewardBatch(
        torch.tensor([0.5, NAN], dtype=torch.bfloat16, requires_grad=True), columns={"h": torch.ones(2, 2)}
    )
    read = RewardBatch.from_arrow(batch.to_arrow())
    assert read.rewards.dtype == torch.float32
    assert read.rewards[0].item() == 0.5
    assert torch.isnan(read.rewards[1])
    assert read.column("h").tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_no_rows_round_trip(tmp_path: Path) -> None:
    batch = example().select([])
    for groups in (batch.groups, []):
        empty = RewardBatch(batch.rewards, batch.names, groups, batch.columns)
        read = RewardBatch.read_parquet(empty.write_parquet(tmp_path / "empty.parquet"))
        assert len(read) == 0
        assert read.names == ("accuracy", "format")
        assert read.segments("group").count == 0


def test_tables_of_others() -> None:
    table = pa.table(
        {
            "group": pa.array(["x", "x", "y"]).dictionary_encode(),
            "reward/correct": pa.array([True, None, False]),
            "reward/points": pa.array([1, 2, None]),
            "reward/nothing": pa.nulls(3),
            "count": pa.array([1, None, 3]),
        }
    )
    batch = RewardBatch.from_arrow(table)
    expected = torch.tensor([[1.0, 1.0, NAN], [NAN, 2.0, NAN], [0.0, NAN, NAN]], dtype=torch.float64)
    torch.testing.assert_close(batch.rewards, expected, equal_nan=True)
    assert batch.segments("group").codes.tolist() == [0, 0, 1]
    assert batch.column("count").tolist() == [1, None, 3]


def test_arrow_works_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "pandas":
            raise ImportError(name)
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    same(example(), RewardBatch.from_arrow(example().to_arrow()))


def test_tables_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingColumnError, match=r"no column named 'reward/<name>'; found \['group'\]"):
        RewardBatch.from_arrow(pa.table({"group": [1]}))
    with pytest.raises(MissingColumnError, match=r"no column named 'group'; found \['reward/a'\]"):
        RewardBatch.from_arrow(pa.table({"reward/a": [1.0]}))
    with pytest.raises(InvalidInputError, match="column 'reward/a' holds string, expected numbers"):
        RewardBatch.from_arrow(pa.table({"reward/a": ["1"], "group": [1]}))
    with pytest.raises(InvalidInputError, match="groups has no value in row 0"):
        RewardBatch.from_arrow(pa.table({"reward/a": [1.0], "group": pa.array([None], pa.int64())}))
    with pytest.raises(InvalidInputError, match="reward 'a' is inf in row 0"):
        RewardBatch.from_arrow(pa.table({"reward/a": [float("inf")], "group": [1]}))
    with pytest.raises(MissingFileError, match=r"no such file: .*nothing\.parquet"):
        RewardBatch.read_parquet(tmp_path / "nothing.parquet")


@pytest.mark.parametrize("name", ["group", "reward/other"])
def test_reserved_names_of_columns(name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"the column name '{name}' is reserved in a rollout log"):
        RewardBatch([1.0], columns={name: [1]}).to_arrow()


def test_what_arrow_cannot_hold_is_named() -> None:
    with pytest.raises(InvalidInputError, match="column 'mixed' cannot be stored"):
        RewardBatch([1.0, 2.0], columns={"mixed": ["a", object()]}).to_arrow()
    with pytest.raises(InvalidInputError, match="column 'group' cannot be stored"):
        RewardBatch([1.0, 2.0], groups=["a", 1]).to_arrow()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.one_of(st.none(), st.floats(-1e6, 1e6, width=32)), st.text(max_size=4)), max_size=12),
)
def test_any_rewards_and_groups_survive(rows: list[tuple[float | None, str]]) -> None:
    batch = RewardBatch([r for r, _ in rows], groups=[g for _, g in rows])
    same(batch, RewardBatch.from_arrow(batch.to_arrow()))


def test_a_partition_can_be_given_as_it_is() -> None:
    groups = factorize(["x", "y"])
    assert RewardBatch([1.0, 2.0], groups=groups).segments("group") is groups
