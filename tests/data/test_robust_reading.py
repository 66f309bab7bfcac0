"""Reading logs as they come: gaps, numbers as text, chat messages, mixed types, files that end in the middle."""

import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from polyreward.batch import RewardBatch
from polyreward.data.files import UnfinishedError, read_file
from polyreward.data.rollouts import RolloutLog, read_rollouts
from polyreward.errors import InvalidInputError

MAP = {"rewards": "r", "group": "g"}


def json_lines(path, rows, end="\n"):
    path.write_text("\n".join(json.dumps(row) for row in rows) + end, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ([True, False, None], [1, 0, np.nan]),
        ([1, 2, None], [1, 2, np.nan]),
        (["0.5", " 2 ", ""], [0.5, 2, np.nan]),
        (["True", "false", "nan"], [1, 0, np.nan]),
        ([1, 0.5, float("nan")], [1, 0.5, np.nan]),
        ([None, None, None], [np.nan] * 3),
        ([1, True, 2.5], [1, 1, 2.5]),
    ],
)
def test_rewards_of_any_type_are_numbers(tmp_path, values, read):
    path = json_lines(tmp_path / "a.jsonl", [{"g": 1, "r": value} for value in values])
    np.testing.assert_array_equal(read_rollouts(path, MAP).rewards[:, 0].numpy(), read)
    if not any(isinstance(value, str) for value in values) and values != [1, True, 2.5]:
        pq.write_table(pa.table({"g": [1, 1, 1], "r": values}), tmp_path / "a.parquet")
        np.testing.assert_array_equal(read_rollouts(tmp_path / "a.parquet", MAP).rewards[:, 0].numpy(), read)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("high", "reward 'r' is 'high' in row 3, expected a number"),
        (float("inf"), "reward 'r' is inf in row 3"),
        ("-inf", "reward 'r' is -inf in row 3"),
        ([1.0], r"reward 'r' is .*in row [13], expected a number"),
    ],
)
def test_a_reward_that_is_no_number_is_named_with_its_row(tmp_path, value, words):
    path = json_lines(tmp_path / "a.jsonl", [{"g": 1, "r": v} for v in (1.0, 2.0, value, 3.0)])
    with pytest.raises(InvalidInputError, match=words):
        read_rollouts(path, MAP)


def test_chat_messages_identify_a_prompt(tmp_path):
    first, second = ([{"role": "user", "content": text}] for text in ("a", "b"))
    rows = [{"g": prompt, "r": 1.0} for prompt in (first, second, first)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (json_lines(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"):
        codes = read_rollouts(path, MAP).segments("group").codes.tolist()
        assert codes[0] == codes[2] != codes[1]


@pytest.mark.parametrize("values", [["a", None, "a"], [1, None, 1], [1.0, float("nan"), 1.0]])
def test_a_row_without_a_group_is_named(tmp_path, values):
    pq.write_table(pa.table({"g": values, "r": [1.0, 2.0, 3.0]}), tmp_path / "a.parquet")
    with pytest.raises(InvalidInputError, match="column 'g' has no value in row 2"):
        read_rollouts(tmp_path / "a.parquet", MAP)


def test_groups_and_steps_may_be_floats_or_words(tmp_path):
    table = pa.table(
        {"g": [1.0, 1.0, 2.5, 2.5], "r": [1.0] * 4, "step": [0.0, 1.0, 1.0, 1.0], "ü": ["é", "é", "ß", None]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    read = read_rollouts(tmp_path / "a.parquet", {**MAP, "task": "ü"})
    assert len(read.segments("group").codes.unique()) == 3
    assert read.column("task").tolist() == ["é", "é", "ß", None]


def test_several_columns_are_crossed(tmp_path):
    table = pa.table({"a": ["x", "x", "y"], "b": [1, 2, 1], "r": [1.0, 2.0, 3.0]})
    pq.write_table(table, tmp_path / "a.parquet")
    read = read_rollouts(tmp_path / "a.parquet", {"rewards": "r", "group": ["a", "b"], "stratum": ["b", "a"]})
    assert len(read.segments("group").codes.unique()) == 3
    assert len(set(read.column("stratum").tolist())) == 3


def test_csv_types_follow_the_whole_file(tmp_path):
    lines = ["g,r,t", *["1,1,2"] * 200_000, "1,0.5,word"]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    read = read_rollouts(tmp_path / "a.csv", MAP)
    assert read.rewards[-1, 0] == 0.5
    assert read.column("t")[-1] == "word"
    (tmp_path / "a.csv").write_text("\n".join([*lines, "1,bad,2"]) + "\n")
    with pytest.raises(InvalidInputError, match=r"a\.csv: reward 'r' is 'bad' in row 200002"):
        read_rollouts(tmp_path / "a.csv", MAP)


def test_json_types_follow_the_whole_file(tmp_path):
    rows = [{"g": 1, "r": 1, "t": 1}] * 50_001 + [{"g": 1, "r": 0.5, "t": "word", "new": {"a": 1}}]
    read = read_rollouts(json_lines(tmp_path / "a.jsonl", rows), MAP)
    assert read.rewards[-1, 0] == 0.5
    assert read.column("t")[-1] == "word"
    rows.append({"g": 1, "r": "bad", "t": 1})
    with pytest.raises(InvalidInputError, match="'bad' in row 50003"):
        read_rollouts(json_lines(tmp_path / "a.jsonl", rows), MAP)


def test_a_line_without_its_end_is_told_apart_from_a_wrong_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"g": 1, "r": 1}\n{"g": 1, "r"')
    with pytest.raises(UnfinishedError, match=r"a\.jsonl, line 2.*the line has no end.*--follow waits"):
        read_rollouts(path, MAP)
    assert len(read_rollouts(path, MAP, unfinished=True)) == 1
    path.write_text('{"g": 1, "r": 1}\n{"g": 1, "r"\n')
    for unfinished in (True, False):
        with pytest.raises(InvalidInputError, match="line 2") as raised:
            read_rollouts(path, MAP, unfinished=unfinished)
        assert not isinstance(raised.value, UnfinishedError)
    path.write_bytes(b'{"g": 1, "r": 1, "t": "\xff"}\n')
    with pytest.raises(InvalidInputError, match=r"line 1: not valid JSON .not UTF-8"):
        read_rollouts(path, MAP)
    path.write_text('\ufeff{"g": 1, "r": 1}\n{"g": 1, "r": 2}', encoding="utf-8")
    assert len(read_rollouts(path, MAP)) == 2


def test_the_last_line_of_a_csv_may_be_half_a_number(tmp_path):
    (tmp_path / "a.csv").write_text("g,r\n1,0.25\n1,0.7")  # of 0.75
    assert read_rollouts(tmp_path / "a.csv", MAP, unfinished=True).rewards[:, 0].tolist() == [0.25]
    assert len(read_rollouts(tmp_path / "a.csv", MAP)) == 2
    (tmp_path / "a.csv").write_text("g,r\n1,0.25\n1")
    with pytest.raises(UnfinishedError, match="Expected 2 columns, got 1"):
        read_rollouts(tmp_path / "a.csv", MAP)


def test_a_part_without_its_footer_is_left_out_while_following(tmp_path):
    log = RolloutLog(tmp_path)
    batch = RewardBatch([1.0, 2.0], ("r",), [0, 0])
    log.append(batch, 1)
    whole = log.append(batch, 2).read_bytes()
    (tmp_path / "part-00000002-00.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnfinishedError, match=r"part-00000002-00\.parquet is not a readable Parquet file"):
        read_rollouts(tmp_path)
    assert read_rollouts(tmp_path, unfinished=True).column("step").tolist() == [1, 1]
    log.parts()[0].unlink()
    with pytest.raises(UnfinishedError):
        read_rollouts(tmp_path, unfinished=True)


def test_embeddings_are_vectors_and_ragged_lists_are_not(tmp_path):
    table = pa.table({"g": [1, 1], "r": [1.0, 2.0], "embedding": [[1.0, 2.0], [3.0, 4.0]], "ids": [[1], [2, 3]]})
    pq.write_table(table, tmp_path / "a.parquet")
    read = read_rollouts(tmp_path / "a.parquet", MAP)
    assert read.column("embedding").tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert read.column("ids").tolist() == [[1], [2, 3]]


def test_texts_are_measured(tmp_path):
    rows = [{"g": 1, "r": 1.0, "completion": text} for text in ("aé", "b", "aé", None)]
    read = read_rollouts(json_lines(tmp_path / "a.jsonl", rows), MAP, measure_texts=True)
    assert set(read.columns) == {"g", "completion_hash", "length"}
    hashes = read.column("completion_hash").tolist()
    assert hashes[0] == hashes[2] != hashes[1]
    np.testing.assert_array_equal(read.column("length").numpy(), [2, 1, 2, np.nan])
    log = RewardBatch(
        [1.0, 2.0], ("r",), [0, 0], {"completion": np.array(["abc", "de"], dtype=object), "length": [7, 8]}
    )
    log.write_parquet(tmp_path / "ours.parquet")
    read = read_rollouts(tmp_path / "ours.parquet", columns=("length",), measure_texts=True)
    assert read.column("length").tolist() == [7, 8]
    assert set(read.columns) == {"length"}


def test_columns_may_be_chosen_by_a_function(tmp_path):
    batch = RewardBatch([1.0, 2.0], ("r",), [0, 0], {"a": [1, 2], "b": [1, 2]})
    batch.write_parquet(tmp_path / "a.parquet")
    assert set(read_rollouts(tmp_path / "a.parquet", columns=lambda name: name == "b").columns) == {"b"}
    mapped = read_rollouts(tmp_path / "a.parquet", {"task": "a"}, columns=["task"])
    assert mapped.column("task").tolist() == [1, 2]


def test_words_are_shared_between_rows(tmp_path):
    words = [f"a task with a rather long name {k % 3}" for k in range(100_000)]
    table = pa.table({"group": np.arange(100_000) // 8, "reward/r": np.ones(100_000), "task": words})
    pq.write_table(table, tmp_path / "a.parquet")
    tracemalloc.start()
    batch = read_rollouts(tmp_path / "a.parquet")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch.column("task")[4] is batch.column("task")[1]
    assert peak < 8e6


def trl(step, rows, **columns):
    prompts, completions, *rewards = zip(*rows, strict=True)
    table = {"step": [step] * len(rows), "prompt": prompts, "completion": completions}
    table |= {f"reward_{k}": values for k, values in enumerate(rewards)} | columns
    total = np.nansum(np.array(rewards, dtype=float), axis=0).reshape(-1, 2)
    deviation = total.std(axis=1, ddof=1, keepdims=True)
    return pa.table(table | {"advantage": ((total - total.mean(1, keepdims=True)) / (deviation + 1e-4)).ravel()})


def test_extra_numbers_of_trl_are_no_rewards(tmp_path):
    rows = [("p", "a", 1.0, 0.1), ("p", "b", 0.0, float("nan")), ("q", "c", 1.0, 0.2), ("q", "d", 0.5, 0.3)]
    pq.write_table(trl(1, rows, ratio=[0.0, 5.0, 0.0, 5.0]), tmp_path / "completions_00001.parquet")
    read = read_rollouts(tmp_path)
    assert read.names == ("reward_0", "reward_1")
    assert read.column("ratio").tolist() == [0.0, 5.0, 0.0, 5.0]


def test_rows_that_trl_logs_again_are_read_once(tmp_path):
    first = [("p", "a", 1.0, 0.1), ("p", "b", 0.0, 0.2), ("q", "c", 1.0, 0.2), ("q", "d", 0.5, 0.3)]
    evaluated = [*first[2:], ("e", "x", 1.0, 0.0), ("e", "y", 0.0, 0.0)]  # the last generation, then an evaluation
    for step, rows in ((1, first), (2, first), (3, evaluated)):
        pq.write_table(trl(step, rows), tmp_path / f"completions_{step:05d}.parquet")
    read = read_rollouts(tmp_path)
    assert read.column("completion").tolist() == ["a", "b", "c", "d", "x", "y"]


def verl(path, **extra):
    rows = [("p", "x", 1), ("p", "y", 0), ("q", "z", 0), ("q", "w", 1)]
    json_lines(
        path,
        [
            {"input": a, "output": b, "gts": None, "score": s, "step": 3} | {k: v[i] for k, v in extra.items()}
            for i, (a, b, s) in enumerate(rows)
        ],
    )
    return read_rollouts(path)


def test_verl_scores_may_be_whole_numbers_and_extras_texts(tmp_path):
    assert verl(tmp_path / "3.jsonl").rewards[:, 0].tolist() == [1, 0, 0, 1]
    read = verl(
        tmp_path / "3.jsonl", acc=["True", "False", "False", "True"], data_source=["gsm", "gsm", "mbpp", "mbpp"]
    )
    assert read.names == ("score",)
    assert read.column("task").tolist() == ["gsm", "gsm", "mbpp", "mbpp"]
    parts = verl(tmp_path / "3.jsonl", acc=[1, 0, 0, 0], form=[0, 0, 0, 1], turns=[1, 2, 3, 4])
    assert parts.names == ("acc", "form")


def test_unknown_files_and_folders_are_refused(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"1")
    with pytest.raises(InvalidInputError, match=r"unknown kind of file '\.xlsx'; expected \.parquet, \.csv"):
        read_rollouts(tmp_path / "a.xlsx")
    with pytest.raises(UnfinishedError, match=r"gone\.jsonl was there a moment ago"):
        read_file(tmp_path / "gone.jsonl")


def test_what_is_read_is_ready_for_torch(tmp_path):
    batch = RewardBatch(torch.ones(4), ("r",), [0, 0, 1, 1], {"flag": torch.tensor([True, False, True, False])})
    batch.write_parquet(tmp_path / "a.parquet")
    read = read_rollouts(tmp_path / "a.parquet")
    assert read.rewards.dtype == torch.float32
    assert read.column("flag").dtype == torch.bool
