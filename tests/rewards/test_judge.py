import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint_server import ChatServer, Raw, Status, completion
from polyreward.endpoints import ChatClient, EndpointError, EndpointWarning
from polyreward.errors import InvalidInputError, MissingColumnError
from polyreward.rewards.judge import JudgeReward, JudgeWarning, judge

HERE = ChatClient("http://localhost/v1", "m")


def client(server, **options):
    return ChatClient(server.url, "m", backoff=0.001, tries=2, **options)


def scores(request):
    """A judge that counts the letter x in the last message."""
    return completion(f"Well.\nScore: {request['messages'][-1]['content'].count('x')}")


def test_marks_in_one_call_and_rescaled():
    with ChatServer(answer=scores) as server:
        judge = JudgeReward(client(server), template="{completion}", low=0, high=4)
        assert judge(["p"] * 4, ["", "x", "xx", "xxxx"]) == [0, 0.25, 0.5, 1]
        wide = JudgeReward(client(server), template="{completion}", low=0, high=4, scale=(1, -1))
        assert wide(["p"] * 2, ["x", "xxxx"]) == [0.5, -1]
        assert judge([], []) == []
        assert judge.per_sample is False


def test_a_malformed_answer_is_none_and_counted():
    replies = {
        "a": "Score: 7", "b": "seven", "c": "Score: 11", "d": "score: nan", "e": "", "f": "Score: -1",
        "g": "**Score:** 3/10", "h": "Score (1-10): 8", "i": "Score: 2\nNo, wait.\nScore: 9 out of 10.",
        "j": "Score: 5 5",
    }  # fmt: skip
    with ChatServer(answer=lambda r: completion(replies[r["messages"][0]["content"]])) as server:
        judge, logged = JudgeReward(client(server), template="{completion}", low=0), {}
        values = judge(["p"] * 10, list(replies), log_metric=logged.__setitem__)
    assert values == [0.7, None, None, None, None, None, 0.3, None, 0.9, None]
    assert judge.counts == {"asked": 10, "failed": 0, "malformed": 7}
    assert logged == {"judge/failed": 0, "judge/malformed": 0.7}


def test_a_request_that_fails_is_none_and_the_batch_goes_on():
    def plan(request):
        return {"bad": Status(400), "broken": Raw(b"}")}.get(request["messages"][0]["content"])

    with ChatServer(answer=lambda _: completion("Score: 10"), plan=plan) as server:
        judge = JudgeReward(client(server), template="{completion}")
        with pytest.warns(EndpointWarning, match="2 of 4"):
            assert judge(["p"] * 4, ["a", "bad", "broken", "b"]) == [1, None, None, 1]
    assert judge.counts == {"asked": 4, "failed": 2, "malformed": 0}


def test_when_no_reply_can_be_read_there_is_a_warning():
    with ChatServer(answer=lambda _: completion("I like it")) as server:
        judge = JudgeReward(client(server))
        with pytest.warns(JudgeWarning, match="none of 2 replies has a line .Score: N. from 1 to 10.*'I like it'"):
            assert judge(["p"] * 2, ["a", "b"]) == [None, None]


def test_a_wrong_address_is_an_error():
    with ChatServer(plan=lambda _: Status(404)) as server, pytest.raises(EndpointError):
        JudgeReward(client(server))(["p"], ["c"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"score": 7}', 0.7),
        ('Sure: ```json\n{"why": "a {b}", "score": "7.5"}\n``` bye', 0.75),
        ('{"score": 1} then {"score": 9}', 0.9),
        ('{"other": 1} {"score": 4} {"other": 2}', 0.4),
        ('{"score": true}', None),
        ('{"score": "9/10"}', None),
        ('{"score": null}', None),
        ('{"score": NaN}', None),
        ('{"score": 1e400}', None),
        ('{"score": ' + "9" * 400 + "}", None),
        ('{"score": [7]}', None),
        ('{"score": 7', None),
        ("{" * 2000, None),
        ('{"a":' * 5000, None),
        ("7", None),
        ("", None),
    ],
)
def test_json_replies(text, value):
    assert JudgeReward(HERE, json_field="score", low=0).mark(text) == value


@given(st.text())
def test_no_reply_is_a_crash(text):
    for strict in (JudgeReward(HERE), JudgeReward(HERE, json_field="score")):
        for reply in (text, f"Score: {text}", f'{{"score": {text}}}'):
            mark = strict.mark(reply)
            assert mark is None or 0 <= mark <= 1


def test_what_is_filled_in_is_text():
    template = (
        'Q {prompt} A {completion} R {reference} L {level} literal {{prompt}} json {"score": {"a": 1}} {low}-{high}'
    )
    with ChatServer(answer=lambda _: completion("Score: 5")) as server:
        judge = JudgeReward(client(server), template=template, system="Be {fair}", column="solution")
        assert judge.reads == ("solution", "level")
        judge(["{completion} {0} {low"], ["{prompt} {{level}} {reference} %s \\1"], solution=["{a}"], level=[3])
        system, asked = server.requests[0]["messages"]
        assert system == {"role": "system", "content": "Be {fair}"}
        assert asked["content"] == (
            "Q {completion} {0} {low A {prompt} {{level}} {reference} %s \\1 R {a} L 3 literal {prompt} "
            'json {"score": {"a": 1}} 1-10'
        )


def test_prompts_and_completions_of_messages():
    with ChatServer(answer=lambda _: completion("Score: 5")) as server:
        judge = JudgeReward(client(server), template="{prompt}|{completion}")
        one = [{"role": "user", "content": "hi"}]
        two = [{"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
        judge([one, two], [[{"role": "assistant", "content": "yo"}], "plain"])
        assert sorted(server.texts) == ["hi|yo", "system: be kind\nuser: hi|plain"]


def test_rows_without_a_reference_are_not_asked():
    with ChatServer(answer=scores) as server:
        judge = JudgeReward(client(server), template="{completion}{reference}", low=0)
        assert judge(["p"] * 3, ["x", "xx", "xxx"], answer=["a", None, float("nan")]) == [0.1, None, None]
        assert len(server.requests) == 1
        with pytest.raises(MissingColumnError, match="'judge' reads the column 'answer'; did you mean 'answers'"):
            judge(["p"], ["x"], answers=["a"])


def test_aspects_are_weighted_and_a_missing_one_is_none():
    marks = {"long a": 10, "long b": 4, "kind a": 0, "kind b": 2}

    def answer(request):
        text = request["messages"][0]["content"]
        return completion(f"Score: {marks[text]}" if text in marks else "?")

    with ChatServer(answer=answer) as server:
        judge = JudgeReward(
            client(server),
            "{aspect} {completion}",
            low=0,
            aspects={"length": "long", "tone": "kind"},
            weights={"tone": 3},
        )
        logged = {}
        values = judge(["p"] * 3, ["a", "b", "c"], log_extra=logged.__setitem__)
        assert values == [pytest.approx((1.0 + 3 * 0) / 4), pytest.approx((0.4 + 3 * 0.2) / 4), None]
        assert logged == {"judge_length": [1.0, 0.4, None], "judge_tone": [0.0, 0.2, None]}
        found = judge.explain(["p"] * 3, ["a", "b", "c"])
        assert found.aspects["tone"][:2].tolist() == [0, 0.2]
        assert found.replies["length"][2].text == "?"
        assert np.isnan(found.values[2])
        mute = JudgeReward(
            client(server), "{aspect} {completion}", low=0, aspects={"length": "long", "x": "?"}, weights={"x": 0}
        )
        assert mute(["p"], ["a"]) == [1.0]


def test_composes_and_pickles_without_the_key():
    with ChatServer(answer=scores) as server:
        judge = JudgeReward(
            client(server, api_key="sk-hidden"), template="{completion}", low=0, options={"max_tokens": 9}
        )
        assert (2 * judge + 1)(["p"], ["xx"]) == [pytest.approx(1.4)]
        assert server.requests[0]["max_tokens"] == 9
        assert server.headers[0]["Authorization"] == "Bearer sk-hidden"
        assert "sk-hidden" not in repr(judge)
        stored = pickle.dumps(judge)
        assert b"sk-hidden" not in stored
        assert pickle.loads(stored)(["p"], ["xxx"]) == [0.3]
        assert "Authorization" not in server.headers[-1]
        assert judge.__name__ == "judge"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "Rate it"}, "no {completion}"),
        ({"template": "{completion}", "aspects": {"a": "b"}}, "no {aspect}"),
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": "score"}, "needs a group"),
        ({"pattern": "(a)", "json_field": "b"}, "not both"),
        ({"low": 3, "high": 3}, "low < high"),
        ({"high": float("inf")}, "low < high"),
        ({"scale": (0,)}, "scale"),
        ({"weights": {"a": 1}}, "weights must be"),
        ({"aspects": {"a": "b"}, "weights": {"a": 0}}, "weights must be"),
        ({"aspects": {"a": "b"}, "weights": {"a": -1}}, "weights must be"),
    ],
)
def test_bad_judges(options, message):
    with pytest.raises(InvalidInputError, match=message):
        JudgeReward(HERE, **options)


def test_a_judge_from_plain_options():
    with ChatServer(answer=scores) as server:
        built = judge(server.url, "m", client={"tries": 2}, template="{completion}", low=0, scale=[0, 2])
        assert built(["p"], ["xxx"]) == [pytest.approx(0.6)]
        assert built.client.tries == 2


def test_a_template_that_shows_a_prompt_needs_one():
    with pytest.raises(InvalidInputError, match="row 0 has none"):
        JudgeReward(HERE)(None, ["x"])
