"""One small client for language models behind OpenAI-compatible endpoints: judges, generators, annotators.

`ChatClient` sends many conversations at once and gives back one reply each, in order. It tries again where that can
help, keeps replies on disk, counts tokens and cost, and a request that fails is a reply with the reason in place of
the text: the batch goes on. A wrong address or key is one `EndpointError` before anything else is sent.

    client = ChatClient("http://localhost:8000/v1", "Qwen/Qwen3-0.6B", cache="runs/replies")
    texts = client.ask(["Name a prime number.", "And an even one?"])

Any server with ``POST /chat/completions`` will do: OpenAI, vLLM, SGLang, llama.cpp, ``transformers serve``, and others.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from polyreward.endpoint_replies import ChatReply, ReplyCache, Usage, messages_of, read_reply, sorted_json
from polyreward.endpoint_transport import Call, Secret, Session, wait_for
from polyreward.errors import InvalidInputError, PolyrewardError, StorageError

Message = Mapping[str, Any]
Conversation = str | Sequence[Message]
Progress = Callable[[int, int], None]


class EndpointError(PolyrewardError, ConnectionError):
    """The endpoint cannot be used: wrong address, key or model, or nothing answers there."""


class EndpointWarning(RuntimeWarning):
    """Requests of a call failed, or a reply could not be kept; the call went on."""


class _State:
    """What changes in a client: its counts and its connections; a copy starts afresh."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.session: Session | None = None

    def add(self, counts: Mapping[str, int]) -> None:
        """Add to the totals; calls of several threads meet here."""
        with self.lock:
            self.counts.update(counts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _State, ()


@dataclass(frozen=True, eq=False)
class ChatClient:
    """Client for the chat completions of one model.

    Parameters
    ----------
    base_url : str
        Address up to and without ``/chat/completions``; it usually ends in ``/v1``.
    model : str
        Name of the model at the server.
    api_key : str or None
        Default: the environment variable `api_key_env`; without either, no key is sent. The key goes into no cache,
        error, log or pickle: a copy in another process reads the variable there.
    api_key_env : str
    timeout : float
        Seconds for one try, from connecting to the last byte.
    tries : int
        Requests for a conversation at most. Tried again: 408, 409, 425, 429, 5xx, the time limit, connections that
        fail, replies that are no JSON. Before the server has answered anything, connecting is tried twice at most.
    backoff : float
        Seconds after the first try; they double from try to try, times a random factor in [1/2, 1]. ``Retry-After``
        comes before it, and on 429 all requests wait.
    longest_wait : float
        Seconds. A server that asks for more fails the conversation at once.
    concurrency : int
        Requests under way at once.
    cache : path of a folder, or None
        Where replies are kept, one JSON file each, written whole: any number of processes and machines may share it. A
        file has the request and the reply. The key is a hash of `identity`, model, messages and every parameter.
    identity : str or None
        What stands for the server in the cache's keys; default the address. The same text makes servers share replies.
    prices : (float, float) or None
        Cost of a million prompt and completion tokens, for `usage`.
    on_outage : "auto", "raise" or "none"
        When every request of a call fails because of the address, the key, the model's name or the connection. "auto":
        `EndpointError` until a first request has succeeded, and from then on replies with an error and one
        `EndpointWarning` a call, so that a server that goes down does not end a training run. "raise": always the
        error, whatever the reason. "none": never.

    Raises
    ------
    InvalidInputError
        An address that is none or holds a password, an empty model, a number out of its range.
    """

    base_url: str
    model: str
    api_key: str | Secret | None = None
    api_key_env: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    tries: int = 5
    backoff: float = 0.5
    longest_wait: float = 60.0
    concurrency: int = 16
    cache: str | Path | None = None
    identity: str | None = None
    prices: tuple[float, float] | None = None
    on_outage: Literal["auto", "raise", "none"] = "auto"
    _state: _State = field(default_factory=_State, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.api_key, Secret):
            object.__setattr__(self, "api_key", Secret(self.api_key))
        object.__setattr__(self, "base_url", _address(self.base_url))
        if not isinstance(self.model, str) or not self.model:
            raise InvalidInputError(f"ChatClient: model must be the name of a model at the server, got {self.model!r}")
        for name, value in (("timeout", self.timeout), ("longest_wait", self.longest_wait)):
            if not (_is_number(value) and value > 0):
                raise InvalidInputError(f"ChatClient: {name} must be a positive number of seconds, got {value!r}")
        if not (_is_number(self.backoff) and self.backoff >= 0):
            raise InvalidInputError(
                f"ChatClient: backoff must be a number of seconds, at least 0, got {self.backoff!r}"
            )
        for name, count in (("tries", self.tries), ("concurrency", self.concurrency)):
            if type(count) is not int or count < 1:
                raise InvalidInputError(f"ChatClient: {name} must be a whole number, at least 1, got {count!r}")
        if self.on_outage not in ("auto", "raise", "none"):
            raise InvalidInputError(f"ChatClient: on_outage must be 'auto', 'raise' or 'none', got {self.on_outage!r}")
        if self.prices is not None and not (len(self.prices) == 2 and all(map(_is_number, self.prices))):
            raise InvalidInputError(f"ChatClient: prices must be two numbers a million tokens, got {self.prices!r}")
        if self.cache is not None and Path(self.cache).is_file():
            raise StorageError(f"the cache {self.cache} is a file, expected a folder")

    @property
    def usage(self) -> Usage:
        """Totals since the client was made, in this process."""
        counts = self._state.counts
        names = [f.name for f in fields(Usage) if f.name != "cost"]
        cost = None
        if self.prices is not None:
            cost = (self.prices[0] * counts["prompt_tokens"] + self.prices[1] * counts["completion_tokens"]) / 1e6
        return Usage(**{name: counts[name] for name in names}, cost=cost)

    def ask(self, prompts: Sequence[Conversation], **options: Any) -> list[str | None]:
        """Texts of the replies, None where a request failed; `options` and errors as in `complete`."""
        return [reply.text for reply in self.complete(prompts, **options)]

    def complete(
        self,
        conversations: Sequence[Conversation],
        *,
        temperature: float | None = 0.0,
        max_tokens: int | None = 1024,
        seed: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        logprobs: int | None = None,
        parameters: Mapping[str, Any] | None = None,
        use_cache: bool | None = None,
        progress: bool | Progress = False,
    ) -> list[ChatReply]:
        """One reply a conversation, in order.

        Parameters
        ----------
        conversations : N texts, each one message of the user, or lists of messages
        temperature, max_tokens, seed : sent where they are not None
        response_format : mapping, for example ``{"type": "json_schema", "json_schema": {...}}``
        logprobs : int or None
            Ask for the log-probabilities of the reply's tokens and of this many others a place.
        parameters : mapping
            Further fields of the request (``top_p``, ``stop``, ``max_completion_tokens``, ...).
        use_cache : bool or None
            Default: where the reply is a function of the request, that is at temperature 0 or with a seed; equal
            requests are then sent once. True also keeps samples: the k-th of equal requests gets the k-th sample, in
            every later call.
        progress : bool, or function of (finished, total)
            True shows a bar once the call has taken two seconds.

        Raises
        ------
        EndpointError
            As `on_outage` says. Replies until then are in the cache.
        InvalidInputError
            A conversation that is neither text nor messages, named by its place; parameters that JSON cannot hold.
        """
        rows = [messages_of(conversation, row) for row, conversation in enumerate(conversations)]
        wanted: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        wanted |= {"response_format": response_format}
        if logprobs is not None:
            wanted |= {"logprobs": True, "top_logprobs": logprobs or None}
        common = {name: value for name, value in wanted.items() if value is not None} | dict(parameters or {})
        if type(common.get("temperature")) is int:  # 0 and 0.0 are one request
            common["temperature"] = float(common["temperature"])
        steady = common.get("temperature") == 0 or common.get("seed") is not None
        keep = steady if use_cache is None else use_cache
        try:
            bodies = [json.dumps({"model": self.model, "messages": row, **common}, allow_nan=False) for row in rows]
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"ChatClient: a message or parameter cannot be sent as JSON: {error}") from error
        keys = self._keys(bodies, steady, keep)
        cache = ReplyCache(Path(self.cache)) if keep and self.cache is not None else None
        replies: dict[str, ChatReply] = {}
        if cache is not None:
            replies = {key: kept for key in dict.fromkeys(keys) if (kept := cache.get(key)) is not None}
        pending = {key: body for key, body in zip(keys, bodies, strict=True) if key not in replies}
        if pending:
            self._send(pending, replies, cache, progress)
        return self._in_order(keys, replies, set(pending))

    def _keys(self, bodies: Sequence[str], steady: bool, keep: bool) -> list[str]:
        """What tells requests apart: equal ones share a reply where it is a function of the request."""
        server = self.base_url if self.identity is None else self.identity
        seen: Counter[str] = Counter()
        keys = []
        for row, body in enumerate(bodies):
            seen[body] += 1
            number = 0 if keep and steady else seen[body] if keep else row
            keys.append(hashlib.sha256(f"{server}\n{number}\n{sorted_json(body)}".encode()).hexdigest())
        return keys

    def _send(
        self,
        pending: Mapping[str, str],
        replies: dict[str, ChatReply],
        cache: ReplyCache | None,
        progress: bool | Progress,
    ) -> None:
        """Fill in the replies of the pending requests."""
        session = self._connected()
        call = Call(patience=max(3, self.concurrency))
        complaints: list[str] = []

        async def one(key: str, body: str) -> None:
            reply, paid = read_reply(await session.ask(body.encode(), call))
            self._state.add(paid)
            if reply.text is not None and cache is not None:
                try:
                    await asyncio.shield(asyncio.to_thread(cache.put, key, body, reply))
                except StorageError as error:
                    complaints.append(str(error))
            replies[key] = reply

        async def work(queue: Iterator[tuple[str, str]]) -> None:
            for key, body in queue:
                await one(key, body)
                if call.fatal is not None and self.on_outage != "none":
                    raise self._outage(call.fatal.told(replies[key].tries))

        async def all_of() -> None:
            queue = iter(pending.items())
            tasks = [asyncio.create_task(work(queue)) for _ in range(min(self.concurrency, len(pending)))]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        total = len(pending.keys() | replies.keys())
        with _shown(progress) as tell:
            wait_for(all_of(), (lambda: tell(len(replies), total)) if tell else None)
            if tell:
                tell(total, total)
        self._complain([replies[key] for key in pending], complaints)

    def _complain(self, replies: Sequence[ChatReply], storage: Sequence[str]) -> None:
        reasons = Counter(reply.error for reply in replies if reply.error is not None)
        if reasons and len(replies) == reasons.total() and self.on_outage == "raise":
            raise self._outage(str(reasons.most_common(1)[0][0]))
        if reasons:
            listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
            where = f"{self.base_url} (model {self.model!r})"
            message = f"{reasons.total()} of {len(replies)} requests to {where} failed: {listed}"
            warnings.warn(message, EndpointWarning, stacklevel=_outside())
        if storage:
            message = f"{len(storage)} replies of {self.model!r} were not kept: {storage[0]}"
            warnings.warn(message, EndpointWarning, stacklevel=_outside())

    def _in_order(self, keys: Sequence[str], replies: Mapping[str, ChatReply], sent: set[str]) -> list[ChatReply]:
        found, counts = [], Counter[str]()
        for key in keys:
            reply, first = replies[key], key in sent
            sent.discard(key)
            if not first and reply.error is None and not reply.cached:
                reply = ChatReply(**asdict(reply) | {"cached": True, "tries": 0})
            outcome = "failed" if reply.error is not None else "answered" if first else "cached"
            counts[outcome] += 1
            found.append(reply)
        self._state.add(counts)
        return found

    def _connected(self) -> Session:
        """The session of this process, made where there is none (at first, after a fork, after `close`)."""
        with self._state.lock:
            session = self._state.session
            if session is None or session.pid != os.getpid():
                url, limits = f"{self.base_url}/chat/completions", (self.timeout, self.tries, self.backoff)
                session = Session(url, self._key(), *limits, self.longest_wait, self.concurrency)
                self._state.session = session
        return session

    def _key(self) -> str | None:
        key = self.api_key.value if isinstance(self.api_key, Secret) else None
        key = (key if key is not None else os.environ.get(self.api_key_env, "")).strip()
        if not (key.isascii() and key.isprintable()):
            raise InvalidInputError("ChatClient: the API key has characters that no key has (line ends, accents)")
        return key or None

    def _outage(self, reason: str) -> EndpointError:
        key, hint = self._key(), ""
        if reason.startswith(("401", "403")):
            hint = "check the key" if key else f"no key was sent: give api_key or set {self.api_key_env}"
        elif reason.startswith(("404", "405", "30")):
            hint = "check base_url, which usually ends in /v1, and the model's name"
        elif reason.startswith("cannot connect"):
            hint = "check that a server listens there"
        return EndpointError(f"{self.base_url} (model {self.model!r}): {reason}{'; ' * bool(hint)}{hint}")

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        session, self._state.session = self._state.session, None
        if session is not None and session.pid == os.getpid():
            wait_for(session.close())

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _address(url: Any) -> str:
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.username is not None or parts.password is not None:
        raise InvalidInputError("ChatClient: base_url must not hold a user name or password; give the key as api_key")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise InvalidInputError(f"ChatClient: base_url must look like http://localhost:8000/v1, got {url!r}")
    if parts.query or parts.fragment:
        raise InvalidInputError(f"ChatClient: base_url must have no query or fragment, got {url!r}")
    return str(url).rstrip("/").removesuffix("/chat/completions")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _outside() -> int:
    """Stack level of the code that called this library, for warnings."""
    import sys

    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("polyreward."):
        level, frame = level + 1, frame.f_back
    return level


@contextlib.contextmanager
def _shown(progress: bool | Progress) -> Iterator[Progress | None]:
    """What to call with (finished, total): the caller's function, a bar that appears after two seconds, or nothing."""
    if progress is not True:
        yield progress or None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar, started = Progress(*columns, console=Console(stderr=True), transient=True), time.monotonic()
    task = bar.add_task("requests", total=None)

    def tell(finished: int, total: int) -> None:
        if not bar.live.is_started and time.monotonic() - started > 2:
            bar.start()
        bar.update(task, completed=finished, total=total)

    try:
        yield tell
    finally:
        bar.stop()
