import csv
import gzip
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.data.preference_layouts import dialogue, read_trl
from polyreward.data.preferences import iterate_preferences, read_preferences, write_preferences
from polyreward.errors import InvalidInputError, MissingColumnError, MissingFileError, UnknownNameError
from polyreward.preferences import TIE, UNLABELLED, IdenticalResponsesWarning, Preference, PreferenceData

USER = {"role": "user", "content": "Two plus two?"}
HH = {
    "chosen": "\n\nHuman: Two plus two?\n\nAssistant: Four.\n\nHuman: Sure?\n\nAssistant: Yes, four.",
    "rejected": "\n\nHuman: Two plus two?\n\nAssistant: Four.\n\nHuman: Sure?\n\nAssistant: Yes, five.",
}


def said(text):
    return {"role": "assistant", "content": text}


def lines(path: Path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_native_layout_with_every_kind_of_judgement(tmp_path):
    rows = [
        {"prompt": "p", "responses": ["a", "b"], "choice": 1, "annotator": "ann", "length": 3},
        {"prompt": "p", "responses": ["a", "b"], "choice": "tie"},
        {"prompt": "q", "responses": ["a", "b", "c"], "ranking": [2, [0, 1]]},
        {"prompt": "q", "responses": ["a", "b", "c"], "ratings": [1, None, 5]},
        {"prompt": "r", "responses": ["a", "b"], "strength": -2},
        {"prompt": "r", "responses": ["a", "b"], "choice": 0, "target": 0.75},
    ]
    data = read_preferences(lines(tmp_path / "votes.jsonl", rows), scale=(1, 5))
    assert data.choice.tolist() == [1, TIE, UNLABELLED, UNLABELLED, 1, 0]
    assert data.offsets.tolist() == [0, 2, 4, 7, 10, 12, 14]
    assert data[2].ranks == [2.0, 2.0, 1.0]
    assert data[3].ratings == [1.0, None, 5.0]
    assert data[4].margin == 2.0
    assert data[5].target == 0.75
    assert data.annotators == ["ann", None, None, None, None, None]
    assert data.annotator_codes().tolist() == [0, -1, -1, -1, -1, -1]
    assert data.columns["length"] == [3, None, None, None, None, None]
    ranks, top_only = data.order()
    assert np.array_equal(ranks, [2, 1, 2, 2, 2, 2, 1, -1, np.nan, -5, 2, 1, 1, 2], equal_nan=True)
    assert top_only.tolist() == [True, False, False, False, True, True]


def test_csv_parquet_datasets_and_gzip_give_the_same(tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"prompt": "p", "responses": ["a, b", "c"], "choice": 0, "annotator": "x"},
        {"prompt": "q", "responses": ["d", "e\nf"], "choice": 1, "annotator": "y"},
    ]
    with (tmp_path / "v.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "responses": json.dumps(row["responses"])} for row in rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "v.parquet")
    with gzip.open(tmp_path / "v.jsonl.gz", "wt") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows))
    expected = read_preferences(rows)
    held = datasets.Dataset.from_list(rows)
    for source in (
        tmp_path / "v.csv",
        tmp_path / "v.parquet",
        tmp_path / "v.jsonl.gz",
        held,
        held.to_iterable_dataset(),
    ):
        data = read_preferences(source)
        assert list(data) == list(expected)
        assert list(data.responses) == ["a, b", "c", "d", "e\nf"]


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "p ", "chosen": "a", "rejected": "b"}, "p ", ["a", "b"]),
        ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "The sky is ", ["blue.", "black."]),
        ({"chosen": "yes", "rejected": "yes no"}, "", ["yes", "yes no"]),
        ({"chosen": [USER, said("4")], "rejected": [USER, said("5")]}, [USER], [[said("4")], [said("5")]]),
        ({"prompt": [USER], "chosen": [said("4")], "rejected": [said("5")]}, [USER], [[said("4")], [said("5")]]),
        (
            {"prompt": "Two plus two?", "chosen": [USER, said("4")], "rejected": [USER, said("5")]},
            [USER],
            [[said("4")], [said("5")]],
        ),
    ],
)
def test_trl_layouts(row, prompt, responses):
    record = read_trl(row, "here")
    assert (record.prompt, list(record.responses), record.choice) == (prompt, responses, 0)


def test_scores_of_both_sides_are_ratings():
    data = read_preferences([{"chosen": "x a", "rejected": "x b", "score_chosen": 8.5, "score_rejected": 3}])
    assert data.ratings.tolist() == [8.5, 3.0]


def test_dialogues_of_hh():
    data = read_preferences([HH])
    assert data.prompts[0] == [USER, said("Four."), {"role": "user", "content": "Sure?"}]
    assert list(data.responses) == ["Yes, four.", "Yes, five."]
    assert data.choice.tolist() == [0]
    early = {
        "chosen": HH["chosen"],
        "rejected": "\n\nHuman: Two plus two?\n\nAssistant: Five.\n\nHuman: Sure?\n\nAssistant: Yes.",
    }
    record = read_preferences([early])[0]
    assert record.prompt == [USER]
    assert [len(response) for response in record.responses] == [3, 3]
    assert dialogue("Human: a\n\nHuman b\n\nAssistant: c")[0]["content"] == "a\n\nHuman b"


def test_dialogue_that_ends_with_the_human_is_refused():
    with pytest.raises(InvalidInputError, match="row 1: rejected must end with a turn of the assistant"):
        read_preferences([{**HH, "rejected": "\n\nHuman: Two plus two?"}])


def test_ultrafeedback():
    row = {
        "instruction": "Say hi.",
        "source": "x",
        "completions": [
            {"response": "hi", "overall_score": 8.0},
            {"response": "bye", "annotations": {"honesty": {"Rating": "4"}, "helpfulness": {"Rating": "1"}}},
            {"response": "?", "annotations": {"honesty": {"Rating": "N/A"}}},
        ],
    }
    data = read_preferences([row])
    assert np.array_equal(data.ratings, np.array([8, 2.5, np.nan], np.float32), equal_nan=True)
    assert data.columns["source"] == ["x"]


def test_relabelled_pairs_with_their_kind_of_annotator():
    row = {"prompt": "p", "responses": ["a", "b"], "label": 1, "objective": "harmless", "original_label": 0}
    data = read_preferences([row], columns={"choice": "label", "annotator": "objective"})
    assert (data.choice.tolist(), data.annotators) == ([1], ["harmless"])
    assert list(data.columns) == ["original_label"]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (
            {"prompt": "p", "responses": ["a"], "choice": 0},
            InvalidInputError,
            "responses must be a list of two or more",
        ),
        ({"prompt": "p", "responses": ["a", "b"], "choice": 2}, InvalidInputError, "row 2: choice is 2"),
        ({"prompt": "p", "responses": ["a", "b"], "choice": "best"}, InvalidInputError, "choice is 'best'"),
        (
            {"prompt": "p", "responses": ["a", "b"], "ratings": [1, 9]},
            InvalidInputError,
            "row 2: ratings is 9, expected the scale 1 to 5",
        ),
        ({"prompt": "p", "responses": ["a", "b"], "ratings": [1]}, InvalidInputError, "ratings has 1 entries for 2"),
        ({"prompt": "p", "responses": ["a", "b"], "ratings": ["good", 1]}, InvalidInputError, "ratings holds 'good'"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [0, 0]}, InvalidInputError, "ranking must name different"),
        ({"prompt": "p", "responses": ["a", "b"], "choice": 0, "margin": -1}, InvalidInputError, "margin is -1"),
        (
            {"prompt": "p", "responses": ["a", "b"], "choice": 0, "margin": "much"},
            InvalidInputError,
            "margin must be a number",
        ),
        ({"prompt": "p", "responses": ["a", "b"], "choice": 0, "target": 2}, InvalidInputError, "target is 2"),
        ({"prompt": "p", "responses": ["a", None], "choice": 0}, InvalidInputError, r"responses\[1\] is NoneType"),
        ({"prompt": "p", "responses": ["a", "b"]}, MissingColumnError, "no judgement"),
        ({"prompt": "p", "responses": ["a", "b", "c"], "strength": 1}, InvalidInputError, "strength is for two"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, error, message):
    good = {"prompt": "p", "responses": ["a", "b"], "choice": 0}
    path = lines(tmp_path / "v.jsonl", [good, row])
    with pytest.raises(error, match=message) as caught:
        read_preferences(path, scale=(1, 5))
    assert str(path) in str(caught.value)
    assert "row 2" in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(MissingFileError, match="does not exist"):
        read_preferences(tmp_path / "none.jsonl")
    with pytest.raises(MissingFileError, match="holds no file"):
        read_preferences(tmp_path)
    (tmp_path / "v.txt").write_text("x")
    with pytest.raises(InvalidInputError, match="unknown kind of file"):
        read_preferences(tmp_path / "v.txt")
    (tmp_path / "v.jsonl").write_text('{"chosen": "a"\n')
    with pytest.raises(InvalidInputError, match=r"v\.jsonl, line 1: not valid JSON"):
        read_preferences(tmp_path / "v.jsonl")
    (tmp_path / "v.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_preferences(tmp_path / "v.jsonl.gz")
    (tmp_path / "v.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(InvalidInputError, match="not a readable Parquet"):
        read_preferences(tmp_path / "v.parquet")
    (tmp_path / "v.csv").write_text("prompt,chosen,rejected\na,b\n")
    with pytest.raises(InvalidInputError, match=r"v\.csv, row 1: the number of cells"):
        read_preferences(tmp_path / "v.csv")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InvalidInputError, match="has no comparisons"):
        read_preferences(tmp_path / "empty.jsonl")
    with pytest.raises(MissingColumnError, match="cannot tell which columns"):
        read_preferences([{"text": "a"}])
    with pytest.raises(MissingColumnError, match=r"no column 'vote'.*did you mean 'votes'"):
        read_preferences([{"prompt": "p", "responses": ["a", "b"], "votes": 1}], columns={"choice": "vote"})
    with pytest.raises(UnknownNameError, match="did you mean 'trl'"):
        read_preferences([HH], layout="trr")


def test_identical_responses_are_dropped_and_counted():
    rows = [
        {"prompt": "p", "responses": ["a", "a"], "choice": 0},
        {"prompt": "p", "responses": ["a", "b"], "choice": 0},
        {"prompt": "p", "responses": ["b", "b", "b"], "choice": 0},
        {"prompt": "p", "responses": ["b", "b", "c"], "choice": 2},
    ]
    with pytest.warns(IdenticalResponsesWarning, match="dropped 2 of 4 comparisons .*row 1"):
        data = read_preferences(rows)
    assert data.rows.tolist() == [2, 4]
    with pytest.raises(InvalidInputError, match="row 1: all responses are the same"):
        read_preferences(rows, identical="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_preferences(rows, identical="keep")) == 4


def test_unknown_annotators_are_an_error_where_they_are_to_be_known():
    rows = [{"prompt": "p", "responses": ["a", "b"], "choice": 0, "annotator": who} for who in ("x", "z")]
    with pytest.raises(InvalidInputError, match="row 2: annotator 'z' is not one of the 2 known"):
        read_preferences(rows, known_annotators=["x", "y"])


def test_pieces_are_the_whole(tmp_path):
    rows = [{"prompt": f"p{i}", "responses": ["a", f"b{i}"], "choice": i % 2, "annotator": i} for i in range(23)]
    path = lines(tmp_path / "v.jsonl", rows)
    pieces = list(iterate_preferences(path, rows=5))
    assert [len(piece) for piece in pieces] == [5, 5, 5, 5, 3]
    assert [record for piece in pieces for record in piece] == list(read_preferences(path))
    assert pieces[2].where(0).endswith("row 11")


def test_pieces_are_read_only_when_asked_for():
    seen = []

    def source():
        for i in range(100):
            seen.append(i)
            yield {"prompt": "p", "responses": ["a", "b"], "choice": 0}

    next(iterate_preferences(source(), rows=10))
    assert len(seen) == 10


def test_written_data_is_read_back(tmp_path):
    data = PreferenceData.of(
        [
            Preference("p", ["a", "b"], choice=1, margin=0.5, annotator="x", columns={"kind": "k"}),
            Preference([USER], ["a", "b", "c"], ranks=[1, None, 2]),
            Preference("q", ["a", "b"], choice="tie", ratings=[3, 3], target=0.5),
        ]
    )
    path = write_preferences(data, tmp_path / "out.jsonl")
    back = read_preferences(path)
    for ours, theirs in zip(data, back, strict=True):
        assert {**vars(ours), "columns": None} == {**vars(theirs), "columns": None}
    assert back.columns["kind"] == ["k", None, None]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=2, max_size=40),
    st.floats(0.05, 0.95),
    st.integers(0, 5),
    st.sampled_from(["prompt", "annotator", "kind"]),
)
def test_a_split_never_leaks_and_loses_nothing(rows, fraction, seed, by):
    records = [
        Preference(f"p{p}", ["a", f"b{i}"], 0, annotator=f"u{u}", columns={"kind": p}) for i, (p, u) in enumerate(rows)
    ]
    data = PreferenceData.of(records)
    if len(set(data.groups(by).tolist())) < 2:
        with pytest.raises(InvalidInputError, match="needs two of them"):
            data.split(by, fraction, seed)
        return
    train, held = data.split(by, fraction, seed)
    key = {"prompt": lambda d: d.prompts, "annotator": lambda d: d.annotators, "kind": lambda d: d.columns["kind"]}[by]
    assert len(train)
    assert len(held)
    assert not set(key(train)) & set(key(held))
    assert sorted([*train.rows, *held.rows]) == list(range(1, len(data) + 1))
    again = data.split(by, fraction, seed)[1]
    assert again.rows.tolist() == held.rows.tolist()


def test_equal_messages_are_one_prompt():
    data = PreferenceData.pairs([[dict(USER)], [dict(USER)], "x"], ["a"] * 3, ["b"] * 3)
    assert data.groups().tolist() == [0, 0, 1]
    with pytest.raises(MissingColumnError, match="has no annotators"):
        data.groups("annotator")
    with pytest.raises(MissingColumnError, match="no column 'kind'"):
        data.split("kind")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=1, max_size=10), st.data())
def test_select_equals_a_loop(sizes, draw):
    data = PreferenceData.of(
        [Preference(i, [10 * i + k for k in range(n)], ranks=list(range(1, n + 1))) for i, n in enumerate(sizes)]
    )
    index = draw.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=8))
    assert list(data.select(np.array(index, int))) == [data[i] for i in index]
    mask = np.array([i % 2 == 0 for i in range(len(sizes))])
    assert list(data.select(mask)) == [data[i] for i in range(0, len(sizes), 2)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"responses": ["a", "b", "c"]}, "pass offsets"),
        ({"offsets": [0, 1, 4]}, "row 1: responses is fewer than 2"),
        ({"offsets": [0, 2]}, "offsets must be 3 numbers from 0 to 4"),
        ({"choice": [0]}, r"choice has shape \(1,\), expected \(2,\)"),
        ({"choice": [0, 2]}, "row 2: choice is 2"),
        ({"choice": [0, -3]}, "row 2: choice is -3"),
        ({"ranks": [1, 2, 0, 1]}, "row 2: ranks is 0"),
        ({"ratings": [1, 2, 3, np.inf]}, "row 2: ratings is inf"),
        ({"margin": [1, np.inf]}, "row 2: margin is inf"),
        ({"target": ["x", 1]}, "target must be numbers"),
        ({"annotators": ["x"]}, "annotators has 1 entries"),
        ({"columns": {"kind": [1]}}, "column 'kind' has 1 entries"),
    ],
)
def test_bad_columns_are_named(fields, message):
    with pytest.raises(InvalidInputError, match=message):
        PreferenceData(**{"prompts": ["p", "q"], "responses": ["a", "b", "c", "d"], **fields})


def test_ranks_count_more_than_a_choice_and_a_choice_more_than_ratings():
    data = PreferenceData.of(
        [
            Preference("p", ["a", "b", "c"], choice=2, ranks=[1, 2, 2], ratings=[1, 2, 3]),
            Preference("p", ["a", "b", "c"], choice=2, ratings=[5, 2, 3]),
            Preference("p", ["a", "b"], choice=0, annotator="x"),
        ]
    )
    ranks, top_only = data.order()
    assert ranks.tolist() == [1, 2, 2, 2, 2, 1, 1, 2]
    assert top_only.tolist() == [False, True, True]
    arrays = PreferenceData(["p"], ["a", "b"], choice=[0], annotators=np.array(["x"]))
    assert arrays.annotator_names == ("x",)


def test_what_belongs_to_a_comparison_is_spread_over_its_responses():
    data = PreferenceData(["p", "q"], ["a", "b", "c", "d", "e"], offsets=np.array([0, 2, 5]), choice=np.array([0, 1]))
    assert data.of_responses(data.prompts) == ["p", "p", "q", "q", "q"]
    assert data.of_responses(np.array([7, 8])).tolist() == [7, 7, 8, 8, 8]
