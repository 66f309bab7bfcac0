import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint_server import ChatServer, Status, completion
from polyreward.endpoints import ChatClient, EndpointWarning
from polyreward.errors import InvalidInputError
from polyreward.reward_models.evaluation_chains import (
    ChatJudge,
    EvaluationChain,
    FormatError,
    GenerativeJudge,
    own_scores,
    parse_chain,
)

CRITERIA = [("clarity", 40, (8, 5)), ("depth", 60, (6, 9))]


def written(payload, persona="They like proofs.", heading="Part 1: Chain-of-Thought Analysis"):
    text = payload if isinstance(payload, str) else json.dumps(payload)
    return f"{heading}\n{persona}\nPart 2: Final Scoring and JSON Output\n<JSON_START>\n{text}\n<JSON_END>"


def payload(**changes):
    made = {
        "criteria": [
            {"name": name, "weight": weight, "scores": {"response_1": a, "response_2": b}}
            for name, weight, (a, b) in CRITERIA
        ],
        "better_response": {"response_1": 6.8, "response_2": 7.4},
    }
    return {**made, **changes}


def test_scores_are_the_weighted_sum():
    chain = EvaluationChain("p", CRITERIA)
    assert chain.score().tolist() == pytest.approx([0.4 * 8 + 0.6 * 6, 0.4 * 5 + 0.6 * 9])
    assert chain.weights().tolist() == pytest.approx([0.4, 0.6])
    assert chain.responses == 2
    assert EvaluationChain("p", stated=(3, 4, 5)).score().tolist() == [3, 4, 5]


@given(
    st.lists(st.tuples(st.floats(0, 100), st.lists(st.floats(1, 10), min_size=3, max_size=3)), min_size=1, max_size=5),
    st.floats(0.01, 100),
)
def test_a_factor_of_the_weights_changes_nothing(criteria, factor):
    named = [(str(i), weight + 0.1, scores) for i, (weight, scores) in enumerate(criteria)]
    found = EvaluationChain("p", named).score()
    scaled = EvaluationChain("p", [(name, factor * weight, scores) for name, weight, scores in named]).score()
    assert scaled.tolist() == pytest.approx(found.tolist())
    total = sum(weight for _, weight, _ in named)
    slow = [sum(weight * scores[i] for _, weight, scores in named) / total for i in range(3)]
    assert found.tolist() == pytest.approx(slow)
    assert all(1 - 1e-9 <= score <= 10 + 1e-9 for score in found)


def test_all_weight_on_one_criterion_is_that_criterion():
    assert EvaluationChain("p", [("a", 0, (1, 2)), ("b", 7, (5, 3))]).score().tolist() == [5, 3]
    assert EvaluationChain("p", [("a", 1e-320, (5, 3))]).score().tolist() == [5, 3]


def test_a_chain_is_read_with_its_persona():
    chain = parse_chain(written(payload()))
    assert isinstance(chain, EvaluationChain)
    assert chain.persona == "They like proofs."
    assert chain.criteria[1] == ("depth", 60, (6, 9))
    assert chain.stated == (6.8, 7.4)
    assert chain.score().tolist() == pytest.approx([6.8, 7.4])
    assert chain.text.startswith("Part 1")
    # the arithmetic of the model errs: the criteria count
    wrong = parse_chain(written(payload(better_response={"response_1": 9, "response_2": 1})))
    assert wrong.score().tolist() == pytest.approx([6.8, 7.4])


@pytest.mark.parametrize(
    "heading",
    [
        "Part 1: User Preference Model Analysis (Chain-of-Thought)",
        "**Part 1: Chain-of-Thought Analysis**",
        "part 1:",
        "### Part 1",
    ],
)
def test_headings(heading):
    assert parse_chain(written(payload(), heading=heading)).persona == "They like proofs."
    one_line = f"Part 1: They like proofs. Part 2: <JSON_START>{json.dumps(payload())}<JSON_END>"
    assert parse_chain(one_line).persona == "They like proofs."


@pytest.mark.parametrize(
    "changes",
    [
        {"criteria": None, "rationale": "clarity (40 %): 8 against 5; depth (60 %): 6 against 9"},
        {"criteria": []},
        {"criteria": [{"name": "a", "weight": "100%", "scores": [6.8, "7.4"]}]},
        {"better_response": {"response_2": "7.4", "response_1": 6.8}},
    ],
)
def test_other_ways_to_say_it(changes):
    assert parse_chain(written(payload(**changes)), 2).score().tolist() == pytest.approx([6.8, 7.4])


def test_a_rationale_that_is_a_list_holds_the_criteria():
    criteria = payload()["criteria"]
    text = written({"rationale": criteria, "better_response": {"response_1": 2, "response_2": 1}})
    assert parse_chain(text).score().tolist() == pytest.approx([6.8, 7.4])
    fenced = written("```json\n" + json.dumps(payload()) + "\n```")
    assert parse_chain(fenced).score().tolist() == pytest.approx([6.8, 7.4])
    ten = {f"response_{i}": i % 10 + 1 for i in range(1, 12)}
    assert parse_chain(written({"better_response": ten})).stated[8:] == (10, 1, 2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON"),
        (json.dumps(payload()), "no JSON"),
        ("<JSON_END> <JSON_START>", "no JSON"),
        (written("{"), "cannot be read"),
        (written("[1]"), "no object"),
        (written('{"a":' * 9000), "cannot be read"),
        (written({}), "better_response"),
        (written(payload(better_response={})), "better_response"),
        (written(payload(better_response={"a": 1})), "expected response_1"),
        (written(payload(better_response={"response_1": 1, "response_3": 2})), "expected response_1"),
        (written(payload(better_response={"response_1": 11, "response_2": 2})), "a score is 11"),
        (written(payload(better_response={"response_1": 0, "response_2": 2})), "a score is 0"),
        (written(payload(better_response={"response_1": None, "response_2": 2})), "no number"),
        (written(payload(better_response={"response_1": True, "response_2": 2})), "no number"),
        (written('{"better_response": {"response_1": NaN, "response_2": 2}}'), "a score is nan"),
        (written('{"better_response": {"response_1": 1e999, "response_2": 2}}'), "a score is inf"),
        (written(payload(criteria=[{"name": "a", "weight": -1, "scores": [1, 2]}])), "at least 0"),
        (written(payload(criteria=[{"name": "a", "weight": 0, "scores": [1, 2]}])), "not all 0"),
        (written(payload(criteria=[{"name": "a", "weight": 1, "scores": [1]}])), "expected 2"),
        (written(payload(criteria=[{"name": "a", "scores": [1, 2]}])), "weight"),
        (written(payload(criteria=["a"])), "no object"),
        (written(payload(criteria=[{"name": "a", "weight": 1, "scores": {"response_1": 2}}])), "response_2"),
    ],
)
def test_what_cannot_be_read_is_a_value(text, reason):
    found = parse_chain(text)
    assert isinstance(found, FormatError)
    assert reason in found.reason
    assert found.text == text


def test_a_wrong_number_of_responses_and_no_text():
    assert "expected 3" in parse_chain(written(payload()), 3).reason
    assert isinstance(parse_chain(None), FormatError)


@given(st.text())
def test_no_text_is_a_crash(text):
    for made in (text, written(text), written(f'{{"better_response": {text}}}')):
        found = parse_chain(made)
        assert isinstance(found, FormatError | EvaluationChain)


def test_rows_of_scores_have_nan_for_what_cannot_be_read():
    rows = own_scores([EvaluationChain("p", CRITERIA), FormatError("x"), EvaluationChain("p", stated=(1, 2, 3))], 2)
    assert rows[0].tolist() == pytest.approx([6.8, 7.4])
    assert np.isnan(rows[1:]).all()
    assert own_scores([], 2).shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "same responses throughout"),
        ({"criteria": [("a", 1, ())]}, "same responses"),
        ({"criteria": [("a", 1, (1,)), ("b", 1, (1, 2))]}, r"\[1, 2\]"),
        ({"criteria": [("a", 1, (1,))], "stated": (1, 2)}, r"\[1, 2\]"),
        ({"criteria": [("a", -1, (1,)), ("b", 2, (1,))]}, "at least 0"),
        ({"criteria": [("a", 0, (1,))]}, "not all 0"),
        ({"criteria": [("a", 1, (float("nan"),))]}, "finite"),
        ({"stated": (float("inf"),)}, "finite"),
    ],
)
def test_chains_that_cannot_be(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        EvaluationChain("p", **arguments)


def test_a_served_judge():
    def answer(request):
        return completion(written(payload(), persona=request["messages"][0]["content"].split("Chosen: ")[1][:4]))

    def plan(request):
        return Status(400) if "broken" in request["messages"][1]["content"] else None

    history = [("a {question}", "good", "bad"), ([{"role": "user", "content": "q"}], "yes", "no")]
    with ChatServer(answer=answer, plan=plan) as server:
        judge = ChatJudge(ChatClient(server.url, "m", backoff=0.001, tries=1), max_tokens=99)
        assert isinstance(judge, GenerativeJudge)
        chains = judge.sample("What is {x}?", history, ["first", "second"], 3, "be {kind}")
        assert len(server.requests) == 3
        request = server.requests[0]
        system, user = (message["content"] for message in request["messages"])
        assert "User: a {question}\nChosen: good\nRejected: bad" in system
        assert "What the user says to want:\nbe {kind}" in system
        assert '{"criteria": [{"name"' in system
        assert user == "[Request]\nWhat is {x}?\n\n[Response 1]\nfirst\n\n[Response 2]\nsecond"
        assert (request["temperature"], request["max_tokens"]) == (1.0, 99)
        assert [chain.score().tolist() for chain in chains] == [pytest.approx([6.8, 7.4])] * 3
        assert chains[0].persona == "good"
        with pytest.warns(EndpointWarning):
            found = judge.sample_each(
                [
                    ("q", history, ["broken", "b"], 1, None),
                    ("q", history, ["a", "b", "c"], 2, None),
                    ("q", history, ["a", "b"], 1, None),
                ]
            )
        assert [len(row) for row in found] == [1, 2, 1]
        assert "request failed: 400" in found[0][0].reason
        assert "2 responses are scored, expected 3" in found[1][1].reason
        assert isinstance(found[2][0], EvaluationChain)
        assert judge.sample_each([]) == []
        assert judge.sample("q", [], ["a", "b"], 0) == []
        assert "(none)" in judge.conversation("q", [], ["a"], None)[0]["content"]


@pytest.mark.parametrize("filling", [" ", "#", "*", "\n", "\t", "`", "part ", "# "])
def test_long_runs_of_the_same_take_no_longer(filling):
    # a model that repeats itself must not stop a batch: with a search that backtracks this takes hours
    run = filling * 20_000
    good = json.dumps({"better_response": {"response_1": 7, "response_2": 3}})
    found = parse_chain(f"Part 1: likes{run}proofs\nPart 2:\n<JSON_START>{good}<JSON_END>")
    assert found.stated == (7, 3)
    assert isinstance(parse_chain(f"x<JSON_START>```json{run}z<JSON_END>"), FormatError)
    assert isinstance(parse_chain(f"x<JSON_START>{run}```json{run}<JSON_END>"), FormatError)
    assert isinstance(parse_chain(run), FormatError)


def test_a_heading_begins_a_line_where_one_does():
    good = "<JSON_START>" + json.dumps(payload()) + "<JSON_END>"
    text = f"I start with part 1 now.\n## Part 1: Chain-of-Thought\nLikes part 2 of series.\n**Part 2**: Scores\n{good}"
    assert parse_chain(text).persona == "Likes part 2 of series."
    assert parse_chain(f"Part 10: a\nPart 20: b\n{good}").persona == ""
