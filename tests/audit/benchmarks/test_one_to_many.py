import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.audit.benchmarks.one_to_many import HOWS, OneToManyBenchmark, aggregate_steps, parse_rating
from polyreward.errors import InvalidInputError, MissingColumnError, UnknownNameError

REJECTED = (0.1, 0.5, 0.2, 0.6, 0.3, 0.3, 0.3, 0.3, 0.3)


def one(chosen, rejected, **fields):
    return OneToManyBenchmark([{"problem_id": "p", "chosen": [chosen], "rejected": rejected, **fields}])


def test_one_problem_by_hand():
    report = one(0.5, REJECTED).evaluate(resamples=10)
    assert report["accuracy"] == 0
    assert report["accuracy_with_ties"] == 0
    assert report["mrr"] == pytest.approx(1 / 3)
    assert report["tie_rate"] == 1
    assert report["pairwise_mean"] == pytest.approx(7 / 9)
    milder = [0.4 if value == 0.6 else value for value in REJECTED]
    report = one(0.5, milder).evaluate(resamples=10)
    assert (report["accuracy"], report["accuracy_with_ties"], report["mrr"]) == (0, 1, 0.5)


def test_equal_scores_are_ranked_last():
    report = OneToManyBenchmark.from_scores(np.zeros((5, 10))).evaluate(resamples=10)
    assert report["accuracy"] == 0
    assert report["accuracy_with_ties"] == 1
    assert report["mrr"] == pytest.approx(0.1)
    assert report["tie_rate"] == 1
    assert report["pairwise_mean"] == 0


def test_the_random_level():
    rng = np.random.default_rng(0)
    bench = OneToManyBenchmark.from_scores(rng.normal(size=(8000, 10)))
    level = bench.random_level()
    assert level["accuracy"] == pytest.approx(0.1)
    assert level["mrr"] == pytest.approx(0.2928968)
    figures = {name: values.mean() for name, values in bench.outcomes().items()}
    assert figures["accuracy"] == pytest.approx(0.1, abs=0.012)
    assert figures["mrr"] == pytest.approx(0.292897, abs=0.012)
    assert figures["pairwise_mean"] == pytest.approx(0.5, abs=0.01)
    assert figures["tie_rate"] == 0


@pytest.mark.parametrize(("won", "rank", "accuracy"), [(7, 3, 0), (9, 1, 1), (0, 10, 0)])
def test_pairwise_mode(won, rank, accuracy):
    record = {"problem_id": 0, "wins": [1] * won + [0] * (9 - won)}
    report = OneToManyBenchmark([record]).evaluate("pairwise", resamples=5)
    assert report["mrr"] == pytest.approx(1 / rank)
    assert report["accuracy"] == accuracy
    assert report["pairwise_mean"] == pytest.approx(won / 9)
    # the same as the scores that the paper gives: W + 1 against 1 and 11
    scores = one(won + 1, [1] * won + [11] * (9 - won)).evaluate(resamples=5)
    assert (scores["mrr"], scores["accuracy"]) == (report["mrr"], report["accuracy"])


def test_a_tie_of_a_judge_is_no_win():
    report = OneToManyBenchmark([{"wins": [1, 0.5, 1]}]).evaluate("pairwise", resamples=5)
    assert (report["accuracy"], report["accuracy_with_ties"], report["mrr"]) == (0, 1, 0.5)
    assert report["tie_rate"] == 1
    # one score of the correct solution for each comparison
    rows = [{"chosen": [3, 1, 2], "rejected": [1, 1, 3]}]
    assert OneToManyBenchmark(rows).evaluate("pairwise", resamples=5)["pairwise_mean"] == pytest.approx(1 / 3)


def plain(chosen, rejected):
    """The definitions, one problem at a time."""
    figures = []
    for right, wrong in zip(chosen, rejected, strict=True):
        order = sorted([(s, "rej") for s in wrong] + [(s, "cho") for s in right], reverse=True)
        rank = next(place for place, (_, kind) in enumerate(order, 1) if kind == "cho")
        figures.append(
            (
                float(min(right) > max(wrong)),
                float(min(right) >= max(wrong)),
                1 / rank,
                sum(w < min(right) for w in wrong) / len(wrong),
                float(any(w == min(right) for w in wrong)),
            )
        )
    return np.mean(figures, axis=0)


scores = st.integers(-3, 3).map(float)
problems = st.lists(
    st.tuples(st.lists(scores, min_size=1, max_size=2), st.lists(scores, min_size=1, max_size=5)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(problems)
def test_equals_plain_python_for_any_number_of_solutions(rows):
    bench = OneToManyBenchmark([{"chosen": c, "rejected": r} for c, r in rows])
    report = bench.evaluate(resamples=3)
    names = ("accuracy", "accuracy_with_ties", "mrr", "pairwise_mean", "tie_rate")
    assert [report[name] for name in names] == pytest.approx(list(plain(*zip(*rows, strict=True))))
    assert report["accuracy"] <= report["mrr"] <= 1
    assert report["accuracy"] <= report["pairwise_mean"]
    assert report["accuracy"] <= report["accuracy_with_ties"]
    changed = OneToManyBenchmark([{"chosen": np.exp(c), "rejected": np.exp(r)} for c, r in rows])
    for name, values in changed.outcomes().items():
        assert np.array_equal(values, bench.outcomes()[name])
    shuffled = OneToManyBenchmark([{"chosen": c, "rejected": r[::-1]} for c, r in rows[::-1]])
    assert [shuffled.outcomes()[n].mean() for n in names] == pytest.approx([report[n] for n in names])


def test_accuracy_by_source():
    rows = [
        {"chosen": [2], "rejected": [1, 3], "sources": ["a", "b"]},
        {"chosen": [2], "rejected": [1, 1, 2], "sources": ["human", "b", "", "a"]},
    ]
    report = OneToManyBenchmark(rows).evaluate(resamples=50)
    assert report["per_source_accuracy"] == {"": 1.0, "a": 0.5, "b": 0.5}
    assert report["per_source_count"] == {"": 1, "a": 2, "b": 2}
    assert set(report["intervals"]["per_source_accuracy"]) == {"", "a", "b"}
    with pytest.raises(InvalidInputError, match="problem 0: sources has 1 entries for 2"):
        OneToManyBenchmark([{"chosen": [2], "rejected": [1, 3], "sources": ["a"]}])


def test_a_pure_style_scorer():
    # a one-to-one benchmark in two styles is passed on style alone, one in one style is not
    rng = np.random.default_rng(1)
    human, machine = 1 + rng.random((400, 1)), rng.random((400, 10))
    matched = OneToManyBenchmark.from_scores(machine).outcomes()
    assert OneToManyBenchmark.from_scores(np.hstack([human, machine[:, :1]])).outcomes()["pairwise_mean"].mean() == 1
    assert matched["accuracy"].mean() == pytest.approx(0.1, abs=0.03)


def test_intervals_are_a_bootstrap_over_problems():
    rng = np.random.default_rng(0)
    bench = OneToManyBenchmark.from_scores(rng.normal(size=(400, 3)))
    report = bench.evaluate(resamples=4000)
    error = np.sqrt(report["accuracy"] * (1 - report["accuracy"]) / 400)
    low, high = report["intervals"]["accuracy"]
    assert [low, high] == pytest.approx(
        [report["accuracy"] - 1.96 * error, report["accuracy"] + 1.96 * error], abs=0.006
    )
    assert bench.evaluate(resamples=100) == bench.evaluate(resamples=100)
    narrow = bench.evaluate(resamples=4000, level=0.5)["intervals"]["accuracy"]
    assert narrow[1] - narrow[0] < 0.5 * (high - low)
    with pytest.raises(InvalidInputError, match="resamples"):
        bench.evaluate(resamples=0)
    with pytest.raises(InvalidInputError, match="level"):
        bench.evaluate(level=1.0)


def test_a_problem_that_comes_twice_counts_once():
    rows = [{"problem_id": "x", "chosen": 2, "rejected": [1]}, {"problem_id": "x", "chosen": 0, "rejected": [1]}]
    bench = OneToManyBenchmark(rows)
    assert (len(bench), bench.duplicates) == (1, 1)
    assert bench.evaluate(resamples=2)["accuracy"] == 1
    # 0 and "0" are different ids, and without ids nothing is a duplicate
    rows = [{"problem_id": name, "chosen": 2, "rejected": [1]} for name in (0, "0", None, None)]
    assert len(OneToManyBenchmark(rows)) == 4


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ({"chosen": [np.nan], "rejected": [1]}, InvalidInputError, r"problem 'q': chosen\[0\] is nan"),
        ({"chosen": [1], "rejected": [1, np.inf]}, InvalidInputError, r"problem 'q': rejected\[1\] is inf"),
        ({"chosen": [], "rejected": [1]}, InvalidInputError, "problem 'q' has no correct solution"),
        ({"chosen": [1], "rejected": []}, InvalidInputError, "problem 'q' has no wrong solution"),
        ({"chosen": [1]}, MissingColumnError, "'rejected'"),
        ({"chosen": ["x"], "rejected": [1]}, InvalidInputError, "array of numbers"),
        ({"wins": [2]}, InvalidInputError, "0, 0.5 or 1"),
        ({"chosen": [1], "rejected": [1], "wins": [1, 0]}, InvalidInputError, "1 entries of 0, 0.5 or 1"),
    ],
)
def test_wrong_records(record, error, message):
    with pytest.raises(error, match=message):
        OneToManyBenchmark([{"problem_id": "q", **record}])


def test_wrong_calls():
    with pytest.raises(InvalidInputError, match="no problems"):
        OneToManyBenchmark([])
    with pytest.raises(InvalidInputError, match="expected a mapping"):
        OneToManyBenchmark([[1, 2]])
    with pytest.raises(InvalidInputError, match="mode must be"):
        one(1, [0]).evaluate("both")
    with pytest.raises(InvalidInputError, match="use mode='pairwise'"):
        OneToManyBenchmark([{"wins": [1]}]).evaluate()
    with pytest.raises(InvalidInputError, match="several correct solutions"):
        OneToManyBenchmark([{"chosen": [1, 2], "rejected": [1, 2, 3]}]).evaluate("pairwise")
    with pytest.raises(InvalidInputError, match="the correct and a wrong solution"):
        OneToManyBenchmark.from_scores([[1.0]])
    with pytest.raises(InvalidInputError, match="a table needs"):
        OneToManyBenchmark([{"chosen": [1], "rejected": [1]}, {"chosen": [1], "rejected": [1, 2]}]).table()
    assert one(3, [1, 2]).table().tolist() == [[3, 1, 2]]


def test_steps_by_hand():
    steps = (0.9, 0.5, 0.8)
    expected = {"min": 0.5, "max": 0.9, "prod": 0.36, "geometric_mean": 0.711379, "mean": 0.733333, "last": 0.8}
    for how, value in expected.items():
        assert aggregate_steps(steps, how) == pytest.approx(value, abs=1e-6)
    logits = np.log(np.array(steps) / (1 - np.array(steps)))
    assert aggregate_steps(steps, "mean-logit") == pytest.approx(1 / (1 + np.exp(-logits.mean())))
    assert aggregate_steps(steps, "mean_odds") == pytest.approx((9 + 1 + 4) / 3)
    assert isinstance(aggregate_steps(steps), float)


def test_all_agree_on_one_step():
    for how in HOWS:
        assert aggregate_steps([0.3], how) == pytest.approx(0.3 / 0.7 if how == "mean_odds" else 0.3)


def test_certain_steps_stay_finite():
    assert aggregate_steps([1.0, 1.0], "mean_odds") == pytest.approx((1 - 1e-6) / 1e-6)
    assert aggregate_steps([0.0, 1.0], "mean_logit") == pytest.approx(0.5)
    assert aggregate_steps([0.0, 1.0], "geometric_mean") == 0
    assert aggregate_steps([0.5] * 2000, "geometric_mean") == pytest.approx(0.5)


def plain_steps(p, how):
    q = [min(max(x, 1e-6), 1 - 1e-6) for x in p]
    return {
        "min": min(p), "max": max(p), "prod": np.prod(p), "geometric_mean": np.prod(p) ** (1 / len(p)),
        "mean": sum(p) / len(p), "last": p[-1],
        "mean_logit": 1 / (1 + np.exp(-np.mean([np.log(x / (1 - x)) for x in q]))),
        "mean_odds": max(0.0, np.mean([x / (1 - x) for x in q])),
    }[how]  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=5), min_size=1, max_size=5))
def test_solutions_at_once_equal_plain_python(solutions):
    for how in HOWS:
        found = aggregate_steps(solutions, how)
        assert found.shape == (len(solutions),)
        assert found == pytest.approx([plain_steps(p, how) for p in solutions], rel=1e-6, abs=1e-12)


def test_prod_favours_short_solutions_and_the_geometric_mean_does_not():
    short, long = [0.9] * 2, [0.9] * 8
    assert aggregate_steps(short) > aggregate_steps(long)
    assert aggregate_steps(short, "geo") == pytest.approx(aggregate_steps(long, "geo"))


def test_wrong_steps():
    with pytest.raises(InvalidInputError, match="solution 1 has no steps"):
        aggregate_steps([[0.5], []])
    with pytest.raises(InvalidInputError, match="solution 0 has no steps"):
        aggregate_steps([])
    with pytest.raises(InvalidInputError, match=r"step 1 of solution 1 is 1\.5"):
        aggregate_steps([[0.5, 0.2], [0.1, 1.5]])
    with pytest.raises(InvalidInputError, match=r"steps of solution 0\[1\] is nan"):
        aggregate_steps([0.5, np.nan])
    with pytest.raises(UnknownNameError, match="did you mean 'mean'"):
        aggregate_steps([0.5], "meann")


def test_ratings_of_a_judge():
    assert parse_rating("Feedback ... Rating: 7") == 7
    assert parse_rating("Rating: 3\n**Rating:** 10.") == 10
    for reply in ("", "seven", None, "Rating: good"):
        assert parse_rating(reply) == 1


def test_every_order_of_a_judge_agrees():
    for wins in itertools.product((0, 1), repeat=3):
        bench = OneToManyBenchmark([{"wins": list(wins)}]).outcomes("pairwise")
        assert bench["mrr"][0] == 1 / (1 + 3 - sum(wins))
