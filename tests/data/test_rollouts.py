"""Rollout logs: what we write comes back; TRL, verl and plain tables are read; bad files give one clear error."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from polyreward.batch import RewardBatch
from polyreward.data.rollouts import RolloutLog, read_rollouts
from polyreward.errors import InvalidInputError, MissingColumnError, MissingFileError, StorageError


def batch(offset: float = 0.0) -> RewardBatch:
    return RewardBatch(
        [[1 + offset, None], [0, 0.5], [1, 0.25], [0, None]],
        ("score", "format"),
        ["a", "a", "b", "b"],
        {"task": ["x", "x", "y", "y"], "length": [3, 4, 5, 6]},
    )


def test_log_round_trip_groups_within_a_step(tmp_path):
    log = RolloutLog(tmp_path / "rollouts")
    log.append(batch(), step=1)
    log.append(batch(0.5), step=2)
    for path in (tmp_path, tmp_path / "rollouts"):
        read = read_rollouts(path)
        assert read.names == ("score", "format")
        assert read.column("step").tolist() == [1] * 4 + [2] * 4
        np.testing.assert_array_equal(read.reward("score").numpy(), np.float32([1, 0, 1, 0, 1.5, 0, 1, 0]))
        assert torch.isnan(read.reward("format")).tolist() == [True, False, False, True] * 2
        codes = read.segments("group").codes
        assert len(codes.unique()) == 4, "the same prompt at another step is another group"
        assert codes[0] == codes[1] != codes[2] == codes[3]
        assert read.column("task").tolist() == ["x", "x", "y", "y"] * 2


def test_truncate_removes_later_steps_only(tmp_path):
    log = RolloutLog(tmp_path)
    for step in (1, 2, 3):
        log.append(batch(), step)
    assert log.truncate(2) == 1
    assert read_rollouts(tmp_path).column("step").unique().tolist() == [1, 2]
    log.append(batch(), 2)
    assert len(log.parts()) == 3


def test_only_the_named_columns_are_read(tmp_path):
    RolloutLog(tmp_path).append(batch(), 1)
    assert set(read_rollouts(tmp_path, columns=["length", "step"]).columns) == {"length", "step"}


def test_a_failed_write_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    log = RolloutLog(tmp_path)
    log.append(batch(), 1)

    def full_disk(table, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(StorageError, match="No space left on device"):
        log.append(batch(), 2)
    assert [p.name for p in tmp_path.iterdir()] == ["part-00000001-00.parquet"]


def trl_table(step: int, rows: list[tuple[str, str, float, float]], **extra) -> pd.DataFrame:
    prompts, completions, first, second = zip(*rows, strict=True)
    return pd.DataFrame(
        {"step": [step] * len(rows), "prompt": prompts, "completion": completions, "accuracy": first, "brevity": second}
        | extra
        | {"advantage": np.zeros(len(rows))}
    )


def test_trl_completions_folder(tmp_path):
    folder = tmp_path / "completions"
    folder.mkdir()
    rows = [("p", "1", 1.0, 0.1), ("p", "2", 0.0, np.nan), ("q", "3", 1.0, 0.2), ("q", "4", 1.0, 0.3)]
    kind = ["u", "v", "u", "v"]
    trl_table(5, rows, kind=kind).to_parquet(folder / "completions_00005.parquet")
    trl_table(6, rows, kind=kind).to_parquet(folder / "completions_00006.parquet")  # the same generation logged again
    trl_table(10, rows[::-1], kind=kind).to_parquet(folder / "completions_00010.parquet")
    for path in (tmp_path, folder):
        read = read_rollouts(path)
        assert read.names == ("accuracy", "brevity")
        assert read.column("step").tolist() == [5] * 4 + [10] * 4
        assert read.column("kind").tolist()[:2] == ["u", "v"]
        assert len(read.segments("group").codes.unique()) == 4


def test_trl_prompt_drawn_twice_in_a_row_makes_two_groups(tmp_path):
    rows = [("p", "1", 1.0, 0.1)] * 4 + [("q", "1", 1.0, 0.1)] * 2
    trl_table(1, rows).to_parquet(tmp_path / "completions_00001.parquet")
    assert read_rollouts(tmp_path).segments("group").codes.tolist() == [0, 0, 1, 1, 2, 2]


def verl_dump(path, step, **extra):
    rows = [("p", "x", 1.0), ("p", "y", 0.5), ("q", "z", 0.0), ("q", "w", 0.25)]
    with path.open("w") as stream:
        for i, (prompt, output, score) in enumerate(rows):
            row = {"input": prompt, "output": output, "gts": None, "score": score, "step": step}
            stream.write(json.dumps(row | {k: v[i] for k, v in extra.items()}) + "\n")


def test_verl_dumps(tmp_path):
    verl_dump(tmp_path / "9.jsonl", 9, acc=[1.0, 0.5, 0.0, 0.25], note=["a", "b", "c", "d"])
    verl_dump(tmp_path / "10.jsonl", 10, acc=[1.0, 0.5, 0.0, 0.25], note=["a", "b", "c", "d"])
    read = read_rollouts(tmp_path)
    assert read.names == ("score",)
    assert read.column("step").tolist() == [9] * 4 + [10] * 4
    assert len(read.segments("group").codes.unique()) == 4
    assert read.column("acc").tolist()[:4] == [1.0, 0.5, 0.0, 0.25]


def test_verl_components_that_add_up_to_the_score_are_the_rewards(tmp_path):
    verl_dump(tmp_path / "1.jsonl", 1, acc=[0.9, 0.4, 0.0, 0.2], form=[0.1, 0.1, 0.0, 0.05])
    assert read_rollouts(tmp_path).names == ("acc", "form")


def test_verl_uid_identifies_the_prompt(tmp_path):
    verl_dump(tmp_path / "1.jsonl", 1, uid=["s1_0_0", "s2_0_0", "s1_1_0", "s2_1_0"])
    assert read_rollouts(tmp_path / "1.jsonl").segments("group").codes.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_plain_table_with_mapping(tmp_path, suffix):
    frame = pd.DataFrame({"q": [7, 7, 8], "r1": [0.5, 1.0, 2.0], "r2": [1, 2, 3], "src": ["m", "m", "n"]})
    path = tmp_path / f"log.{suffix}"
    {"csv": lambda: frame.to_csv(path, index=False), "parquet": lambda: frame.to_parquet(path),
     "jsonl": lambda: frame.to_json(path, orient="records", lines=True)}[suffix]()  # fmt: skip
    read = read_rollouts(path, {"rewards": ["r1", "r2"], "group": "q", "task": "src"})
    assert read.names == ("r1", "r2")
    assert read.rewards.tolist() == [[0.5, 1], [1, 2], [2, 3]]
    assert read.segments("group").codes.tolist() == [0, 0, 1]
    assert read.column("task").tolist() == ["m", "m", "n"]


def test_errors_name_the_file_and_the_place(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere"):
        read_rollouts(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match="holds no rollout log"):
        read_rollouts(tmp_path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"score": 1}\n{"score": \n')
    with pytest.raises(InvalidInputError, match=r"bad\.jsonl, line 2"):
        read_rollouts(bad)
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    with pytest.raises(InvalidInputError, match="is empty"):
        read_rollouts(empty)
    header = tmp_path / "header.csv"
    header.write_text("group,score\n")
    with pytest.raises(InvalidInputError, match="has no rows"):
        read_rollouts(header, {"rewards": "score"})
    ragged = tmp_path / "ragged.csv"
    ragged.write_text("group,score\n1,2\n3\n")
    with pytest.raises(InvalidInputError, match=r"ragged\.csv.*Expected 2 columns, got 1"):
        read_rollouts(ragged, {"rewards": "score"})
    words = tmp_path / "words.csv"
    words.write_text("group,score\n1,2\n1,high\n")
    with pytest.raises(InvalidInputError, match=r"'score' is '2' in row 1|'score' is 'high' in row 2"):
        read_rollouts(words, {"rewards": "score"})
    pq.write_table(pa.table({"group": [0, 0], "reward/a": [1.0, np.inf]}), tmp_path / "inf.parquet")
    with pytest.raises(InvalidInputError, match=r"'a' is inf in row 2"):
        read_rollouts(tmp_path / "inf.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1....")
    with pytest.raises(InvalidInputError, match="not a readable Parquet file"):
        read_rollouts(tmp_path / "broken.parquet")
    plain = tmp_path / "plain.csv"
    plain.write_text("prompt,score\nx,1\n")
    with pytest.raises(MissingColumnError, match="--map rewards="):
        read_rollouts(plain)
    with pytest.raises(MissingColumnError, match=r"no column 'scor'.*did you mean 'score'"):
        read_rollouts(plain, {"rewards": "scor", "group": "prompt"})
    with pytest.raises(MissingColumnError, match="--map group="):
        read_rollouts(plain, {"rewards": "score"})
