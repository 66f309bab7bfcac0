import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.audit.benchmarks.personalized import (
    PairBuilder,
    PairwiseEvaluator,
    PersonalizedPairItem,
    PointwiseEvaluator,
    evaluate_scores,
    judge_prompt,
    parse_result,
    quality_match,
    quality_match_report,
    rank_by_dot_product,
    rubric_score,
    rubric_scores,
)
from polyreward.audit.benchmarks.personalized_items import prompts_for
from polyreward.errors import InvalidInputError

POSTS = [{"id": str(i), "category": "c", "text": f"post {i} on {word}"} for i, word in enumerate("abcd")]


def item(name="1", **fields):
    given = {
        "question": "Where to eat?", "profile": POSTS, "narrative": "I am tired of loud places.",
        "rubric_aspects": [{"aspect": "quiet", "evidence": "loud", "reason": "tired"}], "category": "food",
        "chosen": f"chosen {name}", "rejected": f"rejected {name}", **fields,
    }  # fmt: skip
    return PersonalizedPairItem(name, **given)


def items(count):
    return [item(str(i), user=f"u{i % 3}", category="ab"[i % 2]) for i in range(count)]


def table(chosen, rejected):
    """A score function that reads its scores from the two lists by the number in the answer."""
    lists = {"chosen": chosen, "rejected": rejected}
    return lambda prompts, answers: [lists[a.split()[0]][int(a.split()[1])] for a in answers]


def test_four_items_by_hand():
    report = PointwiseEvaluator(table((1, 2, 3, 0), (0, 2, 1, 1))).evaluate(items(4))
    assert report.accuracy == 0.5
    assert (report.wins, report.ties, report.items, report.parse_failures) == (2, 1, 4, 0)
    assert report.mean_gap == pytest.approx(0.5)
    assert report.per_user == {"u0": 0.5, "u1": 0.0, "u2": 1.0}
    assert report.counts["user"] == {"u0": 2, "u1": 1, "u2": 1}
    assert report.per_category == {"a": 1.0, "b": 0.0}
    assert 0 <= report.ci95[0] < 0.5 < report.ci95[1] <= 1
    assert evaluate_scores((1, 2, 3, 0), (0, 2, 1, 1)).accuracy == 0.5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=20))
def test_what_leaves_accuracy_alone(pairs):
    chosen, rejected = np.array(pairs, float).T
    report = evaluate_scores(chosen, rejected, resamples=5)
    assert report.accuracy == sum(a > b for a, b in pairs) / len(pairs)
    assert evaluate_scores(np.exp(chosen), np.exp(rejected), resamples=5).accuracy == report.accuracy
    moved = evaluate_scores(chosen + np.arange(len(pairs)), rejected + np.arange(len(pairs)), resamples=5)
    assert (moved.accuracy, moved.ties) == (report.accuracy, report.ties)
    assert moved.mean_gap == pytest.approx(report.mean_gap)
    back = evaluate_scores(rejected, chosen, resamples=5)
    assert back.accuracy == pytest.approx(1 - report.accuracy - report.ties / len(pairs))


def test_a_random_scorer_is_at_chance():
    rng = np.random.default_rng(0)
    report = evaluate_scores(*rng.normal(size=(2, 4000)))
    assert abs(report.accuracy - 0.5) < 3 * np.sqrt(0.25 / 4000)
    assert report.ci95[1] - report.ci95[0] == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 4000), rel=0.15)
    # a constant model wins nothing
    constant = evaluate_scores(np.zeros(10), np.zeros(10))
    assert (constant.accuracy, constant.ties) == (0.0, 10)
    assert constant.ci95[0] == 0
    assert constant.ci95[1] > 0.2


def test_several_logits_are_the_probability_of_the_last_class():
    logits = {"chosen": [[0.0, 1.0], [5.0, 6.0]], "rejected": [[3.0, 3.5], [0.0, 2.0]]}

    def score(prompts, answers):
        return torch.tensor([logits[a.split()[0]][int(a.split()[1])] for a in answers])

    report = PointwiseEvaluator(score).evaluate(items(2))
    assert report.accuracy == 0.5
    p = 1 / (1 + np.exp(-np.array([1.0, 1.0, 0.5, 2.0])))
    assert report.mean_gap == pytest.approx((p[0] - p[2] + p[1] - p[3]) / 2)
    one = PointwiseEvaluator(lambda p, a: torch.arange(len(a)).float()[:, None]).evaluate(items(2))
    assert one.accuracy == 0


def test_what_a_model_may_see():
    view = item().model_view(2)
    assert set(view) == {"id", "question", "category", "profile"}
    assert [post["id"] for post in view["profile"]] == ["0", "1"]
    assert view.question == "Where to eat?"
    for name in ("rubric_aspects", "narrative", "chosen", "rejected"):
        with pytest.raises(ValueError, match=f"{name!r} is hidden"):
            view[name]
        with pytest.raises(ValueError, match="hidden"):
            getattr(view, name)
        with pytest.raises(ValueError, match="hidden"):
            view.get(name)
    assert view.get("other", 3) == 3
    with pytest.raises(AttributeError):
        _ = view.other
    assert item().model_view()["profile"] == []
    assert item(profile=()).model_view(0)["profile"] == []
    with pytest.raises(ValueError, match="item '1' has no profile"):
        item(profile=()).model_view(10)


def test_ranked_posts_keep_id_and_text_together():
    def encode(texts):
        return np.array([[1.0, 0.0]] + [[i % 3, 0.0] for i in range(len(texts) - 1)])

    found = rank_by_dot_product(encode)("q", POSTS)
    assert [post["id"] for post in found] == ["2", "1", "0", "3"]
    assert all(post in POSTS for post in found)
    view = item().model_view(1, rank_by_dot_product(encode))
    assert view["profile"][0]["text"] == "post 2 on c"


def test_prompts_of_the_four_conditions():
    one = [item()]
    assert prompts_for(one) == ["Where to eat?"]
    profile = prompts_for(one, "profile", 2)[0]
    assert "post 1 on b" in profile
    assert "post 2" not in profile
    assert profile.endswith("Where to eat?")
    inferred = prompts_for(one, "inferred", 2, planner=lambda questions, posts: [["cheap"]] * len(questions))[0]
    assert "- cheap" in inferred
    assert "quiet" not in inferred
    oracle = prompts_for(one, "oracle")[0]
    assert "- quiet" in oracle
    assert "tired of loud" not in oracle
    report = PointwiseEvaluator(table((1,), (0,))).evaluate([item("0")], "oracle")
    assert report.condition == "oracle"
    for condition, options, message in (
        ("all", {}, "condition must be"),
        ("inferred", {}, "needs a planner"),
        ("profile", {"profile_k": 0}, "at least 1"),
        ("inferred", {"planner": lambda q, p: []}, "aspects of 0 items"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            prompts_for(one, condition, **options)
    leak = item(profile=[{"id": "0", "text": "As I said: I am tired of loud places."}])
    with pytest.raises(ValueError, match="narrative is in the model's input"):
        prompts_for([leak], "profile")


def test_annotators_are_passed_on():
    seen = []

    def score(prompts, answers, annotator):
        seen.extend(annotator)
        return [float(a.startswith("chosen")) for a in answers]

    assert PointwiseEvaluator(score, annotators=True)(items(2)).accuracy == 1
    assert seen == ["u0", "u1", "u0", "u1"]


def test_wrong_scores_and_items():
    with pytest.raises(InvalidInputError, match="item '1': the score of rejected is NaN"):
        PointwiseEvaluator(table((1, 2), (0, np.nan))).evaluate(items(2))
    with pytest.raises(InvalidInputError, match=r"shape \(1,\) for 4 answers"):
        PointwiseEvaluator(lambda p, a: [1.0]).evaluate(items(2))
    with pytest.raises(ValueError, match="rows 1 and 3 have the same id '0'"):
        PointwiseEvaluator(table((1,) * 3, (0,) * 3)).evaluate([*items(2), item("0")])
    with pytest.raises(InvalidInputError, match="no items"):
        PairwiseEvaluator(lambda p, a, b: []).evaluate([])
    with pytest.raises(InvalidInputError, match="one score of chosen and rejected"):
        evaluate_scores([1.0], [])
    with pytest.raises(InvalidInputError, match=r"profile\[0\]"):
        item(profile=["text"])


def test_a_judge_that_always_says_a():
    judge = PairwiseEvaluator(lambda p, first, second: ["Result: A"] * len(p))
    report = judge.evaluate(items(60))
    share = judge.chosen_first(60).mean()
    assert report.accuracy == share
    assert 0.3 < share < 0.7
    assert PairwiseEvaluator(judge.judge_fn, seed=1).evaluate(items(60)).accuracy != share
    assert np.array_equal(judge.chosen_first(60), PairwiseEvaluator(judge.judge_fn).chosen_first(60))


def test_a_judge_that_knows_and_one_that_fails():
    def knows(prompts, first, second):
        return [f"...\n**Result: {'A' if a.startswith('chosen') else 'B'}**" for a in first]

    assert PairwiseEvaluator(knows).evaluate(items(20)).accuracy == 1

    def fails(prompts, first, second):
        replies = knows(prompts, first, second)
        return ["no idea", None, *replies[2:]]

    report = PairwiseEvaluator(fails).evaluate(items(20))
    assert (report.parse_failures, report.accuracy, report.ties) == (2, 0.9, 0)
    assert np.isnan(report.mean_gap)
    with pytest.raises(InvalidInputError, match="1 replies for 2"):
        PairwiseEvaluator(lambda p, a, b: ["Result: A"]).evaluate(items(2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Result: A", "A"), ("thinking\nresult: b", "B"), ("**Result:** [A]", "A"), ("Result: A\nResult: B", "B"),
        ("Result: AB", None), ("the Result: A is", None), ("A", None), ("", None), (None, None), ("Result: C", None),
    ],
)  # fmt: skip
def test_results_of_a_judge(text, expected):
    assert parse_result(text) == expected


def test_the_prompt_of_a_judge_asks_for_what_is_parsed():
    prompt = judge_prompt("Question?", "one", "two")
    assert prompt.index("one") < prompt.index("two")
    assert "Result: A" in prompt


def test_rubric_scores():
    assert rubric_score([0, 1, 2, 2]) == 1.25
    assert np.isnan(rubric_score([]))
    assert rubric_scores([[2, 2], [], [0, 1]]) == {
        "mean": 1.25, "sd": pytest.approx(np.std([2, 0.5], ddof=1)), "items": 2.0, "excluded": 1.0,
    }  # fmt: skip
    with pytest.raises(InvalidInputError, match=r"matches\[1\] is 3"):
        rubric_score([0, 3])
    with pytest.raises(InvalidInputError, match=r"shape \(1, 2\)"):
        rubric_score([[0, 1]])


def test_quality_of_the_two_answers():
    found = quality_match([1.0, 2.0, 3.0, 4.0], [1.0, 2.5, 2.5, 4.0])
    assert found["mean_gap"] == 0
    assert found["tie_rate"] == 0.5
    assert found["chosen_higher"] == 0.25
    assert found["ks_p"] > 0.9
    apart = quality_match(np.arange(50.0) + 100, np.arange(50.0))
    assert apart["mean_gap"] == 100
    assert apart["ks_p"] < 1e-6
    assert quality_match([1.0], [1.0])["mean_gap_sd"] == 0
    by_items = quality_match_report(items(3), lambda q, a: [float(len(text)) for text in a])
    assert by_items["mean_gap"] == len("chosen") - len("rejected")
    with pytest.raises(InvalidInputError, match="quality of both"):
        quality_match([], [])


def test_pairs_are_built():
    prompts = []

    def write(asked):
        prompts.extend(asked)
        return ["quiet corner" if "Cover each" in p else "loud bar" for p in asked]

    built = PairBuilder(write).build([item("1"), item("2", rubric_aspects=[], profile=())])
    assert (len(built.items), built.without_aspects) == (1, 1)
    assert (built.items[0].chosen, built.items[0].rejected) == ("quiet corner", "loud bar")
    assert "post 3" in prompts[0]
    assert "at most 100 words" in prompts[0]
    assert "- quiet" in prompts[1]
    assert "tired of loud" not in "".join(prompts)
    two = PairBuilder(write, rubric_source=lambda i: (["near"], ["far"])).build([item("1", rubric_aspects=[])])
    assert "- near" in prompts[2]
    assert "- far" in prompts[3]
    assert two.items[0].rubric_aspects == ["near"]


def test_pairs_that_are_left_out():
    def write(asked):
        half = len(asked) // 2
        return ["a", "word " * 101, "same", "b"][:half] + ["c", "d", "same ", "e"][:half]

    builder = PairBuilder(write, quality_matcher=lambda made: [i.id != "3" for i in made])
    built = builder.build([item(str(i)) for i in range(4)])
    assert [i.id for i in built.items] == ["0"]
    assert (built.too_long, built.identical, built.unmatched) == (1, 1, 1)
    with pytest.raises(InvalidInputError, match="1 texts for 2 prompts"):
        PairBuilder(lambda asked: ["x"]).build([item()])
    with pytest.raises(InvalidInputError, match="0 results for 1"):
        PairBuilder(lambda asked: list("xy"), quality_matcher=lambda made: []).build([item()])
