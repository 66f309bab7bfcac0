import asyncio
import copy
import dataclasses
import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
import warnings
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endpoint_server import ChatServer, Close, Drip, Hang, Raw, Status, Truncated, completion
from polyreward import endpoint_transport
from polyreward.endpoint_transport import retry_after
from polyreward.endpoints import ChatClient, ChatReply, EndpointError, EndpointWarning
from polyreward.errors import InvalidInputError, MissingExtraError, PolyrewardError, StorageError

KEY = "sk-not-to-be-seen"


def client(server, **options):
    return ChatClient(server.url, "tiny", **{"backoff": 0.001, "timeout": 10.0} | options)


def unused_url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def waits(monkeypatch):
    """Every wait before another try, in seconds; none of them takes time."""
    found = []

    async def wait(seconds):
        found.append(seconds)
        await asyncio.sleep(0)

    monkeypatch.setattr(endpoint_transport, "_sleep", wait)
    return found


def test_replies_in_order_with_tokens_and_cost():
    with ChatServer() as server, client(server, prices=(1.0, 2.0)) as chat:
        replies = chat.complete(
            ["one", "two words", [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]]
        )
        assert [reply.text for reply in replies] == ["ONE", "TWO WORDS", "Y"]
        assert replies[1] == ChatReply("TWO WORDS", None, 3, 2, "stop", None, False, 1)
        assert replies[1].tokens == 5
        assert chat.ask(["again"]) == ["AGAIN"]
        usage = chat.usage
        assert (usage.answered, usage.failed, usage.cached, usage.retries) == (4, 0, 0, 0)
        assert (usage.prompt_tokens, usage.completion_tokens) == (12, 5)
        assert usage.cost == pytest.approx((12 * 1 + 5 * 2) / 1e6)
        assert chat.complete([]) == []


def test_what_is_sent():
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    with ChatServer() as server:
        client(server).complete(
            ["a"], temperature=0.5, max_tokens=7, seed=3, response_format=schema, logprobs=2, parameters={"top_p": 0.9}
        )
        assert server.requests[0] == {
            "model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": 0.5, "max_tokens": 7,
            "seed": 3, "response_format": schema, "logprobs": True, "top_logprobs": 2, "top_p": 0.9,
        }  # fmt: skip
        client(server).complete(["a"], temperature=None, max_tokens=None)
        assert server.requests[1].keys() == {"model", "messages"}


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (Status(429, {"error": {"message": "slow down"}}), "429 after 3 tries: slow down"),
        (Status(408), "408 after 3 tries"),
        (Status(500, {"error": {"message": "oops"}}), "500 after 3 tries: oops"),
        (Status(503, {"detail": "loading"}), "503 after 3 tries: loading"),
        (Close(), "connection broken after 3 tries: Server disconnected without sending a response."),
        (Raw(b'{"choices": [{"mess'), "malformed reply, no JSON (application/json, 19 bytes) after 3 tries"),
        (Raw(b"<html>busy</html>", "text/html"), "malformed reply, no JSON (text/html, 17 bytes) after 3 tries"),
        (Raw(b"{}"), "malformed reply, JSON without choices after 3 tries"),
        (Raw(b"[" * 100_000), "malformed reply, no JSON (application/json, 100000 bytes) after 3 tries"),
        (Raw(b'\xff\xfe{"choices"'), "malformed reply, no JSON (application/json, 12 bytes) after 3 tries"),
        (Status(200, {"error": {"message": "upstream", "code": 502}}), "an error as reply after 3 tries: upstream"),
        (Status(400, {"error": {"message": "too long"}}), "400: too long"),
        (Status(422, {"detail": "no such field"}), "422: no such field"),
        (Status(200, {"error": {"message": "bad", "code": 400}}), "an error as reply: bad"),
        (Status(429, {"error": {"message": "pay", "code": "insufficient_quota"}}), "429: pay"),
        (Status(429, None, {"Retry-After": "86400"}), "429"),
        (Status(200, completion(None, "tool_calls")), "a reply without text (finish reason 'tool_calls')"),
        (Status(200, completion(None, refusal="I will\nnot")), "refused: I will not"),
    ],
)  # fmt: skip
def test_one_bad_reply_does_not_stop_the_batch(trouble, reason, waits):
    def plan(request):
        return trouble if request["messages"][0]["content"] == "bad" else None

    with ChatServer(plan=plan) as server:
        chat = client(server, tries=3)
        with pytest.warns(EndpointWarning, match="1 of 4 requests to http.* failed: 1 x ") as caught:
            replies = chat.complete(["a", "bad", "b", "c"])
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert [reply.text for reply in replies] == ["A", None, "B", "C"]
        assert replies[1].error == reason
        tries = 3 if "3 tries" in reason else 1
        assert server.texts.count("bad") == tries == replies[1].tries
        assert (chat.usage.failed, chat.usage.answered, chat.usage.retries) == (1, 3, tries - 1)


def test_a_broken_body_is_asked_for_again(waits):
    with ChatServer(script=[Truncated(), Close(), Status(500), Raw(b"nothing")]) as server:
        reply = client(server).complete(["x"])[0]
        assert (reply.text, reply.tries) == ("X", 5)


def test_waits_double_and_heed_the_server(waits):
    script = [
        Status(500),
        Status(500),
        Status(503, None, {"Retry-After": "7"}),
        Status(429, None, {"retry-after-ms": "50"}),
    ]
    with ChatServer(script=script) as server:
        chat = client(server, backoff=1.0)
        assert chat.ask(["x"]) == ["X"]
        assert 0.5 <= waits[0] <= 1
        assert 1 <= waits[1] <= 2
        assert 7 <= waits[2] <= 7.1
        assert 0.05 <= waits[3] <= 0.15


def test_all_requests_wait_when_the_server_is_busy():
    with ChatServer(script=[Status(429, None, {"Retry-After": "0.2"})]) as server:
        chat = client(server, concurrency=1)
        assert chat.ask(["a", "b", "c"]) == ["A", "B", "C"]
        assert chat._state.session._resume_at > 0
        assert chat.usage.retries == 1


def test_retry_after():
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "-3"}) == 0
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 55 < retry_after({"retry-after": soon}) <= 60
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    for nonsense in ("", "soon", "inf", "nan", "1e999"):
        assert retry_after({"retry-after": nonsense}) is None
    assert retry_after({}) is None


@pytest.mark.parametrize("trouble", [Hang(), Drip()])
def test_the_time_limit_covers_the_whole_request(trouble, waits):
    def plan(request):
        return trouble if request["messages"][0]["content"] == "slow" else None

    with ChatServer(plan=plan) as server:
        with pytest.warns(EndpointWarning):
            replies = client(server, timeout=0.2, tries=1).complete(["slow", "a"])
        assert [(reply.text, reply.error) for reply in replies] == [(None, "timeout after 0.2 s"), ("A", None)]
        with pytest.warns(EndpointWarning):
            reply = client(server, timeout=0.05, tries=2).complete(["slow"])[0]
        assert reply.error == "timeout after 0.05 s in each of 2 tries"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            Status(401, {"error": {"message": f"Incorrect API key {KEY}"}}),
            "401: Incorrect API key [*]{3}; check the key",
        ),
        (Status(403), "403; check the key"),
        (Status(404, {"detail": "Not Found"}), "404: Not Found; check base_url, which usually ends in /v1"),
        (Status(405), "405; check base_url"),
        (Status(308, None, {"Location": "https://other/v1"}), "308: moved to https://other/v1; check base_url"),
    ],
)
def test_a_wrong_key_or_address_is_refused_at_once(status, message):
    with ChatServer(plan=lambda _: status) as server:
        chat = client(server, api_key=KEY, concurrency=2)
        with pytest.raises(EndpointError, match=message) as caught:
            chat.ask([f"{i}" for i in range(50)])
        assert isinstance(caught.value, ConnectionError | PolyrewardError)
        assert KEY not in str(caught.value)
        assert "tiny" in str(caught.value)
        assert len(server.requests) <= 4


def test_without_a_key_the_error_says_so():
    with ChatServer(plan=lambda _: Status(401)) as server, pytest.raises(EndpointError, match="set JUDGE_KEY"):
        client(server, api_key_env="JUDGE_KEY").ask(["x"])


def test_where_nothing_listens_there_is_one_error(waits):
    chat = ChatClient(unused_url(), "tiny")
    with pytest.raises(EndpointError, match=r"cannot connect after 2 tries.*check that a server listens there"):
        chat.ask(["a"] * 100)
    with pytest.warns(EndpointWarning, match="3 of 3 requests"):
        assert dataclasses.replace(chat, on_outage="none").ask(["a", "b", "c"]) == [None] * 3


def test_a_server_that_goes_down_in_the_middle_gives_none_and_one_warning(waits):
    with ChatServer() as server:
        chat = client(server, tries=4, timeout=1.0)
        assert chat.ask(["a"]) == ["A"]
        strict = client(server, tries=2, on_outage="raise")
        assert strict.ask(["a"]) == ["A"]
    with pytest.warns(EndpointWarning) as caught:
        replies = chat.complete([f"{i}" for i in range(200)])
    assert len(caught) == 1
    assert {reply.text for reply in replies} == {None}
    assert sum(reply.tries for reply in replies) <= 4 * 16
    assert any(reply.error.startswith("cannot connect after 4 tries") for reply in replies)
    assert any(reply.error.startswith("not sent: cannot connect") and reply.tries == 0 for reply in replies)
    with pytest.raises(EndpointError):
        strict.ask(["b", "c"])


def test_after_a_success_a_refused_key_does_not_end_the_run(waits):
    with ChatServer(script=[None, Status(401), Status(401)]) as server:
        chat = client(server)
        assert chat.ask(["a"]) == ["A"]
        with pytest.warns(EndpointWarning, match="401"):
            assert chat.ask(["b"]) == [None]


def test_a_server_that_hangs_is_given_up(waits):
    with ChatServer(plan=lambda _: Hang()) as server:
        chat = client(server, timeout=0.05, tries=2, concurrency=2)
        with pytest.warns(EndpointWarning, match="40 of 40"):
            replies = chat.complete([f"{i}" for i in range(40)])
        assert len(server.requests) <= 10
        assert replies[-1].error == "not sent: timeout after 0.05 s in each of 2 tries"


def test_cached_replies_need_no_server(tmp_path, waits):
    with ChatServer() as server:
        chat = client(server, cache=tmp_path / "cache", prices=(1, 1))
        first = chat.complete(["a", "b"])
        again = client(server, cache=tmp_path / "cache", prices=(1, 1))
        second = again.complete(["b", "a", "c"])
        assert [reply.text for reply in second] == ["B", "A", "C"]
        assert [reply.cached for reply in second] == [True, True, False]
        assert sorted(server.texts) == ["a", "b", "c"]
        assert second[1] == dataclasses.replace(first[0], cached=True, tries=0)
        assert (again.usage.cached, again.usage.answered, again.usage.prompt_tokens) == (2, 1, 3)
        url = server.url
    assert ChatClient(url, "tiny", cache=tmp_path / "cache").ask(["a", "c"]) == ["A", "C"]


def test_everything_that_changes_the_answer_is_in_the_key(tmp_path):
    with ChatServer() as server:
        base = client(server, cache=tmp_path)
        base.ask(["a"])
        base.ask(["a"], max_tokens=5)
        base.ask(["a"], seed=1)
        base.ask(["a"], parameters={"top_p": 0.5})
        base.ask([[{"role": "system", "content": "a"}]])
        base.ask(["a"], response_format={"type": "json_object"})
        dataclasses.replace(base, model="other").ask(["a"])
        dataclasses.replace(base, identity="shared").ask(["a"])
        assert len(server.requests) == 8
        dataclasses.replace(base, timeout=3.0, tries=2, concurrency=1).ask(["a"])  # these change no answer
        base.ask(["a"], parameters={"max_tokens": 5, "temperature": 0})
        assert len(server.requests) == 8
    with ChatServer() as server:
        client(server, cache=tmp_path, identity="shared").ask(["a"])
        assert not server.requests


def test_samples_are_kept_only_when_asked(tmp_path):
    texts = iter("abcdefghijk")
    with ChatServer(answer=lambda _: completion(next(texts))) as server:
        chat = client(server, cache=tmp_path, concurrency=1)
        assert chat.ask(["x", "x"], temperature=1.0) == ["a", "b"]
        assert chat.ask(["x"], temperature=1.0) == ["c"]
        assert chat.ask(["x"], temperature=None) == ["d"]
        assert chat.ask(["x", "x"], temperature=1.0, use_cache=True) == ["e", "f"]
        assert chat.ask(["x", "x", "x"], temperature=1.0, use_cache=True) == ["e", "f", "g"]
        assert chat.ask(["x"], temperature=1.0, seed=4) == ["h"] == chat.ask(["x"], temperature=1.0, seed=4)
        assert chat.ask(["x"], use_cache=False) == ["i"]
        assert chat.ask(["x"], use_cache=False) == ["j"]


def test_equal_requests_are_sent_once():
    with ChatServer() as server:
        chat = client(server)
        replies = chat.complete(["a", "b", "a", "a"])
        assert sorted(server.texts) == ["a", "b"]
        assert [reply.cached for reply in replies] == [False, False, True, True]
        assert (chat.usage.answered, chat.usage.cached) == (2, 2)


def test_damaged_files_are_asked_for_again(tmp_path):
    with ChatServer() as server:
        chat = client(server, cache=tmp_path)
        chat.ask(["a"])
        (path,) = tmp_path.rglob("*.json")
        for damage in (b"", b"{", b"\xff", b"[1]", b'{"reply": {}}', b'{"reply": {"text": 3}}', b'{"reply": {"x": 1}}'):
            path.write_bytes(damage)
            assert chat.ask(["a"]) == ["A"]
        assert len(server.requests) == 8
        assert chat.ask(["a"]) == ["A"]
        assert len(server.requests) == 8


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    for number in range(256):
        (tmp_path / f"{number:02x}").write_text("")  # a file where a folder should be
    with ChatServer() as server, pytest.warns(EndpointWarning, match="2 replies of 'tiny' were not kept: cannot write"):
        assert client(server, cache=tmp_path).ask(["a", "b"]) == ["A", "B"]
    with pytest.raises(StorageError, match="is a file, expected a folder"):
        ChatClient("http://localhost/v1", "tiny", cache=tmp_path / "00")


def _fill(url, cache, start):
    chat = ChatClient(url, "tiny", cache=cache)
    return chat.ask([f"text {i % 40}" for i in range(start, start + 40)])


def test_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    with ChatServer() as server, context.Pool(3) as pool:
        found = pool.starmap(_fill, [(server.url, tmp_path, start) for start in (0, 13, 27)])
        assert [set(texts) for texts in found] == [{f"TEXT {i}" for i in range(40)}] * 3
        chat = ChatClient(server.url, "tiny", cache=tmp_path)
        assert [reply.cached for reply in chat.complete([f"text {i}" for i in range(40)])] == [True] * 40
        assert not list(tmp_path.rglob("*.tmp"))


def test_a_forked_child_opens_its_own_connections():
    with ChatServer() as server:
        chat = client(server)
        chat.ask(["a"])
        before = server.connections
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        child = context.Process(target=lambda: there.send(chat.ask(["b"])))
        child.start()
        assert here.poll(20)
        assert here.recv() == ["B"]
        child.join()
        assert server.connections == before + 1
        assert chat.ask(["c"]) == ["C"]


def test_interrupted_calls_keep_what_was_done(tmp_path):
    def plan(request):
        if request["messages"][0]["content"] != "stop":
            return None
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        return Hang()

    with ChatServer(plan=plan) as server:
        chat = client(server, cache=tmp_path, concurrency=1, timeout=20.0)
        with pytest.raises(KeyboardInterrupt):
            chat.ask(["a", "b", "stop", "c"])
        assert server.texts == ["a", "b", "stop"]
        assert chat.ask(["a", "b", "c"]) == ["A", "B", "C"]
        assert server.texts == ["a", "b", "stop", "c"]


def test_requests_run_side_by_side_on_connections_that_stay_open():
    together = threading.Barrier(3)

    def answer(request):
        together.wait(5)
        return completion("ok")

    with ChatServer(answer=answer) as server:
        chat = client(server, concurrency=3)
        for _ in range(3):
            assert chat.ask([f"{i}" for i in range(6)]) == ["ok"] * 6
        assert server.most_active == 3
        assert server.connections == 3


def test_the_limit_holds_over_calls_of_several_threads():
    with ChatServer() as server:
        chat = client(server, concurrency=2)
        threads = [threading.Thread(target=chat.ask, args=([f"{t} {i}" for i in range(20)],)) for t in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.most_active <= 2
        assert chat.usage.answered == 80


def test_works_inside_a_running_event_loop():
    async def main(chat):
        return chat.ask(["x"])

    with ChatServer() as server:
        assert asyncio.run(main(client(server))) == ["X"]


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MissingExtraError, match=r"polyreward\[endpoints\]"):
        ChatClient("http://localhost/v1", "m").ask(["x"])


def test_progress_is_told():
    seen = []
    with ChatServer() as server:
        client(server).ask(["a", "b", "a"], progress=lambda done, total: seen.append((done, total)))
        assert client(server).ask(["a"], progress=True) == ["A"]
    assert seen[-1] == (2, 2)
    assert seen == sorted(seen)


def test_the_key_is_sent_and_seen_nowhere_else(tmp_path, monkeypatch, waits, recwarn, caplog):
    caplog.set_level(0)
    with ChatServer(script=[None, Status(400, {"error": f"what is {KEY}?"})]) as server:
        chat = client(server, api_key=KEY, cache=tmp_path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            replies = chat.complete(["a"]) + chat.complete(["b"])
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        assert replies[1].error == "400: what is ***?"
        for shown in (repr(chat), str(dataclasses.asdict(chat)), repr(vars(chat)), repr(chat._state.session._http)):
            assert KEY not in shown
        assert KEY not in caplog.text
        assert KEY not in str([str(w.message) for w in caught])
        assert all(KEY not in path.read_text() for path in tmp_path.rglob("*.json"))
        for twin in (copy.copy(chat), copy.deepcopy(chat), dataclasses.replace(chat, timeout=9.0)):
            twin.ask(["twin"], use_cache=False)
            assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
        pickled = pickle.dumps(chat)
        assert KEY.encode() not in pickled
        stranger = pickle.loads(pickled)
        stranger.ask(["c"])
        assert "Authorization" not in server.headers[-1]
        monkeypatch.setenv("OPENAI_API_KEY", "from the environment")
        pickle.loads(pickled).ask(["d"])
        assert server.headers[-1]["Authorization"] == "Bearer from the environment"
        assert stranger.usage.answered == 1
        with pytest.raises(InvalidInputError, match="API key has characters") as error:
            client(server, api_key="sk-\nx: y").ask(["e"])
        assert "sk-" not in str(error.value)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(), max_size=20), min_size=1, max_size=6))
def test_any_text_survives_the_way_and_the_cache(texts):
    # lone surrogates, which a tokenizer can cut out of a pair, included
    import tempfile

    with (
        ChatServer(answer=lambda r: completion(r["messages"][0]["content"])) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        assert client(server, cache=folder).ask(texts) == texts
        assert client(server, cache=folder).ask(texts) == texts
        assert len(server.requests) == len(set(texts))


def test_replies_in_other_forms():
    def plan(request):
        forms = {
            "parts": completion([{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]),
            "bare": {"choices": [{"message": {"content": "c"}}]},
            "odd": {"choices": [{"message": {"content": "d"}, "finish_reason": 3}], "usage": {"prompt_tokens": "x"}},
            "long": completion("e", "length"),
            "logprobs": {"choices": [{"message": {"content": "f"}, "logprobs": {"content": [{"logprob": -0.5}]}}]},
            "empty": completion(""),
            "nothing": {"choices": [None]},
        }
        return Status(200, forms[request["messages"][0]["content"]])

    with ChatServer(plan=plan) as server, pytest.warns(EndpointWarning):
        replies = client(server).complete(["parts", "bare", "odd", "long", "logprobs", "empty", "nothing"])
    assert [reply.text for reply in replies] == ["ab", "c", "d", "e", "f", "", None]
    assert (replies[1].tokens, replies[2].prompt_tokens, replies[2].finish_reason) == (0, 0, None)
    assert replies[3].finish_reason == "length"
    assert replies[4].logprobs == {"content": [{"logprob": -0.5}]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "must look like http://localhost:8000/v1"),
        ({"base_url": None}, "must look like"),
        ({"base_url": "http://[::1/v1"}, "must look like"),
        ({"base_url": "http://host:port/v1"}, "must look like"),
        ({"base_url": "http://user:secret@host/v1"}, "must not hold a user name or password"),
        ({"base_url": "http://host/v1?key=1"}, "no query"),
        ({"model": ""}, "name of a model"),
        ({"timeout": 0}, "timeout must be a positive number"),
        ({"timeout": float("nan")}, "timeout must be a positive number"),
        ({"tries": 0}, "tries must be a whole number"),
        ({"concurrency": 1.5}, "concurrency must be a whole number"),
        ({"backoff": -1}, "backoff must be"),
        ({"prices": (1, "x")}, "two numbers"),
        ({"on_outage": "stop"}, "on_outage must be"),
    ],
)
def test_bad_clients(options, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        ChatClient(**{"base_url": "http://host/v1", "model": "m"} | options)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("bad", [None, 3, [], ["text"], [{"content": "no role"}], b"bytes", {"role": "user"}])
def test_bad_conversations_are_named(bad):
    with pytest.raises(InvalidInputError, match="conversation 1: expected a text or a list of messages"):
        ChatClient("http://host/v1", "m").ask(["fine", bad])


def test_parameters_that_json_cannot_hold():
    with pytest.raises(InvalidInputError, match="cannot be sent as JSON"):
        ChatClient("http://host/v1", "m").ask(["fine"], temperature=float("nan"))
    with pytest.raises(InvalidInputError, match="cannot be sent as JSON"):
        ChatClient("http://host/v1", "m").ask(["fine"], parameters={"stop": {1, 2}})


def test_the_whole_address_may_be_given():
    assert ChatClient("http://host/v1/chat/completions/", "m").base_url == "http://host/v1"


SERVING = all(find_spec(name) for name in ("fastapi", "uvicorn", "openai"))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """``transformers serve`` with a model of two layers made here; its address and the name of the model."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789:.!? "]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}assistant: "
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), eos_token_id=2, bos_token_id=1, pad_token_id=2, **size)
    model = LlamaForCausalLM(config)
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    port = int(unused_url().split(":")[2].split("/")[0])
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--port", port, "--host", "127.0.0.1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = (folder / "log.txt").open("w")
    process = subprocess.Popen([*map(str, command), "--device", "cpu"], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log.txt").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                break
            except OSError:
                threading.Event().wait(0.1)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.kill()
        process.wait()
        log.close()


@pytest.mark.slow
@pytest.mark.skipif(not SERVING, reason="transformers serve needs fastapi, uvicorn and openai")
def test_with_a_real_model_behind_transformers_serve(served, tmp_path):
    url, model = served
    chat = ChatClient(url, model, cache=tmp_path, timeout=60, concurrency=4)
    replies = chat.complete(["how many?", "abc", "how many?"], max_tokens=8)
    assert all(reply.error is None and isinstance(reply.text, str) for reply in replies)
    assert replies[0].text == replies[2].text
    assert all(0 < reply.completion_tokens <= 8 for reply in replies)
    assert replies[1].prompt_tokens == len("user: abc") + 1 + len("assistant: ")
    fresh = ChatClient(url, model, timeout=60)
    assert fresh.ask(["how many?", "abc"], max_tokens=8) == [replies[0].text, replies[1].text]
    before = chat.usage
    assert chat.complete(["abc"], max_tokens=8)[0] == dataclasses.replace(replies[1], cached=True, tries=0)
    assert chat.usage.prompt_tokens == before.prompt_tokens
    sampled = chat.ask(["abc"] * 4, temperature=2.0, max_tokens=8)
    assert len(set(sampled)) > 1
    with pytest.warns(EndpointWarning, match="422: .*no_such_field"):
        assert chat.ask(["abc"], parameters={"no_such_field": 1}) == [None]
    with pytest.raises(EndpointError, match="404"):
        ChatClient(url.removesuffix("/v1"), model).ask(["abc"])


def test_the_cache_can_be_read_by_people(tmp_path):
    with ChatServer() as server:
        client(server, cache=tmp_path).ask(["a"])
    (path,) = tmp_path.rglob("*.json")
    record = json.loads(path.read_text())
    assert record["request"]["messages"] == [{"role": "user", "content": "a"}]
    assert record["reply"]["text"] == "A"
