import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from polyreward.audit.benchmarks.readers import read_one_to_many, read_personalized, read_recorded_scores, rows_of
from polyreward.errors import InvalidInputError, MissingColumnError, MissingFileError

TAGS = ["human_to_GPT-4", "", "gpt"]


def write(path, rows, lines=False):
    text = "\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def solution(problem=1, kind="chosen", **fields):
    return {
        "problem": f"What is {problem}?", "problem_id": problem, "eval_solution": ["one", "two"],
        "solution_type": kind, "solution_reference": "someone", **fields,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl"])
def test_problems_and_solutions(tmp_path, name):
    rows = [
        solution(1, "rejected", solution_reference="a"),
        solution(2, "chosen"),
        solution(1, "chosen"),
        solution(2, "rejected", eval_solution="text", solution_reference=None),
        solution(1, "rejected", solution_reference="b"),
    ]
    file = read_one_to_many(write(tmp_path / name, rows, lines=name.endswith("jsonl")))
    assert file.problem_ids == [1, 2]
    assert file.completions[0] == "one\ntwo"
    assert file.completions[3] == "text"
    assert file.owner.tolist() == [0, 1, 0, 1, 0]
    bench = file.benchmark([0.5, 1, 0.7, 2, 0.9])
    assert bench.outcomes()["mrr"].tolist() == [0.5, 0.5]
    assert bench.evaluate(resamples=3)["per_source_accuracy"] == {"": 0.0, "a": 1.0, "b": 0.0}
    with pytest.raises(InvalidInputError, match="4 scores for 5"):
        file.benchmark([1, 2, 3, 4])
    with pytest.raises(InvalidInputError, match=r"scores\[1\] is nan"):
        file.benchmark([1, np.nan, 3, 4, 5])


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (solution(kind="good"), InvalidInputError, "row 3: solution_type is 'good'"),
        (solution(eval_solution=[]), InvalidInputError, r"row 3: eval_solution is \[\]"),
        (solution(problem="") | {"problem": " "}, InvalidInputError, "row 3: problem is ' '"),
        ({"problem": "x"}, MissingColumnError, "row 3 has no 'solution_type'"),
        (solution(7), InvalidInputError, "row 3: problem 7 has no rejected solution"),
        (solution(7, "rejected"), InvalidInputError, "row 3: problem 7 has no chosen solution"),
        ("text", InvalidInputError, "row 3 is str, expected an object"),
    ],
)
def test_errors_name_file_and_row(tmp_path, row, error, message):
    path = write(tmp_path / "a.json", [solution(), solution(kind="rejected"), row])
    with pytest.raises(error, match=message) as caught:
        read_one_to_many(path)
    assert str(path) in str(caught.value)


def test_recorded_numbers_steps_and_letters(tmp_path):
    numbers = [{"problem": "p", "solution_reference": TAGS, "score": [3, 1, 2]}] * 2
    bench = read_recorded_scores(write(tmp_path / "a.json", numbers))
    assert (len(bench), bench.duplicates) == (1, 1)
    assert bench.table().tolist() == [[3, 1, 2]]
    # the correct solution is known by its tag, not by its place
    moved = [{"problem": "p", "solution_reference": TAGS[::-1], "score": [2, 1, 3]}]
    assert read_recorded_scores(write(tmp_path / "b.json", moved)).table().tolist() == [[3, 2, 1]]
    steps = [{"problem": "p", "solution_reference": TAGS, "score": [[0.9, 0.9], [0.7], [0.5, 1.0]]}]
    path = write(tmp_path / "c.json", steps)
    assert read_recorded_scores(path).table() == pytest.approx(np.array([[0.81, 0.7, 0.5]]))
    assert read_recorded_scores(path, "min").table() == pytest.approx(np.array([[0.9, 0.7, 0.5]]))
    letters = [
        {"problem": "p", "solution_reference": ["a", "b"], "score": ["A", "B"], "chosen_position": ["A", "A"]},
    ]
    judged = read_recorded_scores(write(tmp_path / "d.json", letters)).outcomes("pairwise")
    assert judged["pairwise_mean"].tolist() == [0.5]
    # a file that labels both columns alike is read by place
    pairs = [{"problem": "p", "solution_reference": ["human_to_GPT-4", "modified_with_GPT-4"], "score": [1, 2]}]
    assert read_recorded_scores(write(tmp_path / "e.json", pairs), correct=1).table().tolist() == [[2, 1]]
    apart = [
        {"problem_id": 4, "solution_type": "rejected", "output": {"step_scores": [0.4, 0.5]}},
        {"problem_id": 4, "solution_type": "chosen", "output": {"step_scores": [0.6]}},
    ]
    found = read_recorded_scores(write(tmp_path / "f.json", apart), "prod").table()
    assert found == pytest.approx(np.array([[0.6, 0.2]]))
    with pytest.raises(InvalidInputError, match="has no chosen solution"):
        read_recorded_scores(write(tmp_path / "g.json", apart[:1]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score": [1, 2]}, "score has 2 entries for 3"),
        ({"score": [1, None, 2]}, r"score: score\[1\] is None"),
        ({"score": [1, float("nan"), 2]}, r"score: score\[1\] is nan"),
        ({"score": [[0.5], [], [0.5]]}, "score: solution 1 has no steps"),
        ({"score": [[0.5], [2.0], [0.5]]}, "score: step 0 of solution 1 is 2"),
        ({"score": [1, 2, 3], "solution_reference": ["", "gpt", "x"]}, "0 entries 'human_to_GPT-4'"),
        ({"score": ["A", "B", "A"], "chosen_position": ["A"]}, "chosen_position has 1 entries"),
        ({"score": "high"}, "score is 'high', expected a list"),
    ],
)
def test_wrong_recorded_scores(tmp_path, fields, message):
    path = write(tmp_path / "a.json", [{"problem": "p", "solution_reference": TAGS, **fields}])
    with pytest.raises(InvalidInputError, match=f"a.json, row 1: .*{message}"):
        read_recorded_scores(path)


def pair(**fields):
    return {
        "id": "7", "question": "What to read?", "profile": [{"id": "1", "text": "I like crime"}],
        "narrative": "Long.", "rubric_aspects": [{"aspect": "crime", "evidence": "", "reason": ""}],
        "category": "books", "chosen": "A thriller.", "rejected": "A romance.", **fields,
    }  # fmt: skip


def test_personalised_pairs(tmp_path):
    items = read_personalized(write(tmp_path / "a.jsonl.gz", [pair(), pair(id=8, user="u", profile=None)], lines=True))
    assert [item.id for item in items] == ["7", "8"]
    assert items[1].user == "u"
    assert items[0].profile[0]["text"] == "I like crime"
    assert items[0].rubric_aspects[0]["aspect"] == "crime"
    for fields, error, message in (
        ({"id": "7"}, InvalidInputError, "rows 1 and 2 have the same id '7'"),
        ({"id": "8", "chosen": None}, MissingColumnError, "row 2 has no 'chosen'"),
        ({"id": "8", "profile": [{"id": 1}]}, InvalidInputError, r"row 2: item '8': profile\[0\]"),
        ({"id": "8", "profile": "x"}, InvalidInputError, "row 2: profile is str"),
        ({"id": "8", "question": 3}, InvalidInputError, "row 2: question is 3"),
    ):
        with pytest.raises(error, match=message):
            read_personalized(write(tmp_path / "b.jsonl", [pair(), pair(**fields)], lines=True))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(MissingFileError, match=r"nothing\.json does not exist"):
        list(rows_of(tmp_path / "nothing.json"))
    for name, content, message in (
        ("a.json", b"", "has no rows"),
        ("b.json", b"[]", "has no rows"),
        ("c.json", b"[1", "not valid JSON"),
        ("d.jsonl", b'{"a": 1}\n{"b"', "line 2: not valid JSON"),
        ("e.json.gz", b"plain", "cannot be read"),
        ("f.json", b"\xff\xfe\xff", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidInputError, match=message):
            list(rows_of(tmp_path / name))


@pytest.mark.skipif("POLYREWARD_DATA" not in os.environ, reason="needs the real data")
def test_the_released_files():
    folder = Path(os.environ["POLYREWARD_DATA"]) / "math"
    file = read_one_to_many(folder / "rewardmath_direct.json.gz")
    assert (len(file.problem_ids), len(file.prompts), int(file.correct.sum())) == (2, 20, 2)
    found = read_recorded_scores(folder / "rewardmath_scores" / "internlm2.json.gz").evaluate(resamples=10)
    assert 100 * found["accuracy"] == pytest.approx(37.27, abs=0.01)
    assert 100 * found["mrr"] == pytest.approx(55.17, abs=0.01)
    assert found["problems"] == 483
