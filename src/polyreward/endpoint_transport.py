"""Sends chat requests to a server and tries again where that can help; `polyreward.endpoints` stands on it.

One event loop in a thread of its own serves every client of a process. So replies come with hundreds of requests under
way, connections are kept alive from call to call, a time limit covers the whole of a request, and Ctrl-C ends what is
under way at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from polyreward.errors import require

RETRIED = {408, 409, 425, 429}
WRONG_ADDRESS = {401, 403, 404, 405}
LARGEST_REPLY = 64 << 20
OUT_OF_QUOTA = "insufficient_quota"

Kind = Literal["refused", "connect", "down", "busy", "request"]
_sleep = asyncio.sleep
_random = random.Random()


@dataclass(frozen=True)
class Failure:
    """Why a try failed.

    Attributes
    ----------
    reason : str
        In a few words, without secrets.
    kind : "refused" (key, address or model), "connect", "down" (time limit, closed, 5xx, no JSON), "busy" (429), or
        "request" (this conversation or reply)
    again : bool
        Whether another try can help.
    wait : float or None
        Seconds that the server asks to wait.
    detail : str
        What the server said.
    """

    reason: str
    kind: Kind
    again: bool = False
    wait: float | None = None
    detail: str = ""

    def told(self, tries: int) -> str:
        """The failure with the number of tries."""
        many = "" if tries < 2 else f" in each of {tries} tries" if "after" in self.reason else f" after {tries} tries"
        return f"{self.reason}{many}{': ' if self.detail else ''}{self.detail}"


class Secret:
    """A key that neither `repr` nor pickle shows."""

    def __init__(self, value: str | None) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "None" if self.value is None else "'***'"

    def __reduce__(self) -> tuple[Any, ...]:
        return Secret, (None,)

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: Any) -> Secret:
        return self


@dataclass
class Call:
    """What the requests of one call share: whether it still makes sense to go on."""

    patience: int
    failures_in_a_row: int = 0
    stopped: str | None = None
    fatal: Failure | None = None


@dataclass(frozen=True)
class Outcome:
    """The reply's JSON object, or the failure; and the number of tries, 0 where the request was not sent."""

    data: dict[str, Any] | None
    failure: str | None
    tries: int


@dataclass(eq=False, repr=False)
class Session:
    """Connections of one client in one process.

    Parameters
    ----------
    url, key : address of the chat completions, and the key or None
    timeout, tries, backoff, longest_wait : as in `polyreward.endpoints.ChatClient`
    concurrency : int
        Requests under way at once.
    """

    url: str
    key: str | None
    timeout: float
    tries: int
    backoff: float
    longest_wait: float
    concurrency: int
    pid: int = field(default_factory=os.getpid)
    reached: bool = False
    succeeded: bool = False
    _resume_at: float = 0.0
    _http: Any = None
    _gate: Any = None

    async def ask(self, body: bytes, call: Call) -> Outcome:
        """Send one request until it is answered, cannot succeed, or has used up its tries."""
        tries = 0
        while True:
            await self._pause()
            if call.stopped is not None:
                return Outcome(None, call.stopped, tries)
            tries += 1
            result = await self._once(body)
            if not isinstance(result, Failure):
                call.failures_in_a_row, self.succeeded = 0, True
                return Outcome(result, None, tries)
            limit = min(2, self.tries) if result.kind == "connect" and not self.reached else self.tries
            if not result.again or tries >= limit or (result.wait or 0) > self.longest_wait:
                self._note(result, tries, call)
                return Outcome(None, result.told(tries), tries)
            delay = min(self.backoff * 2 ** (tries - 1), self.longest_wait) * _random.uniform(0.5, 1)
            if result.wait is not None:
                delay = result.wait + _random.uniform(0, self.backoff) / 10
                if result.kind == "busy":  # every request waits, not only the one that was told
                    self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + delay)
            await _sleep(delay)

    def _note(self, failure: Failure, tries: int, call: Call) -> None:
        """Decide whether the other requests of the call are still worth sending."""
        if failure.kind in ("refused", "connect") and not self.succeeded:
            call.fatal = failure
            call.stopped = f"not sent: {failure.told(tries)}"
        elif failure.kind in ("connect", "down"):
            call.failures_in_a_row += 1
            if failure.kind == "connect" or call.failures_in_a_row >= call.patience:
                call.stopped = f"not sent: {failure.told(tries)}"

    async def _pause(self) -> None:
        loop = asyncio.get_running_loop()
        while (left := self._resume_at - loop.time()) > 0:
            await _sleep(left)

    async def _once(self, body: bytes) -> dict[str, Any] | Failure:
        httpx: Any = require("httpx2", "endpoints")
        if self._http is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency, keepalive_expiry=30)
            # in `auth` and not in the headers, where a traceback with local variables would show the key
            self._http = httpx.AsyncClient(timeout=None, limits=limits, auth=_bearer(httpx, self.key))
            self._gate = asyncio.Semaphore(self.concurrency)
            weakref.finalize(self, _release, self._http, asyncio.get_running_loop(), self.pid).atexit = False
        async with self._gate:
            try:
                async with asyncio.timeout(self.timeout):
                    headers = {"Content-Type": "application/json", "Accept": "application/json"}
                    async with self._http.stream("POST", self.url, content=body, headers=headers) as response:
                        self.reached = True
                        return self._read(response, await _content(response))
            except TimeoutError:
                return Failure(f"timeout after {self.timeout:g} s", "down", again=True)
            except (httpx.ConnectError, httpx.ProxyError) as error:
                return Failure("cannot connect", "connect", again=True, detail=self.clean(str(error)))
            except (httpx.HTTPError, OSError, _TooLarge) as error:
                detail = self.clean(str(error)) or type(error).__name__
                return Failure("connection broken", "down", again=True, detail=detail)

    def _read(self, response: Any, content: bytes) -> dict[str, Any] | Failure:
        status = int(response.status_code)
        try:
            data = json.loads(content)
        except (ValueError, RecursionError):
            data = None
        wait, detail = retry_after(response.headers), self.clean(_message(data))
        code = _code(data)
        if status == 200:
            if isinstance(data, dict) and isinstance(data.get("choices"), list) and data["choices"]:
                return data
            if isinstance(data, dict) and data.get("error"):  # some gateways report failures as a success
                number = int(code) if code.isdigit() else 500
                return Failure("an error as reply", "request", number in RETRIED or number >= 500, wait, detail)
            kind = str(response.headers.get("content-type", "no content type")).split(";")[0]
            what = "JSON without choices" if data is not None else f"no JSON ({kind}, {len(content)} bytes)"
            return Failure(f"malformed reply, {what}", "down", again=True)
        if status in WRONG_ADDRESS or 300 <= status < 400:
            where = f"moved to {response.headers.get('location')}" if status < 400 else detail
            return Failure(str(status), "refused", detail=self.clean(where))
        if status == 429:
            return Failure("429", "busy", code != OUT_OF_QUOTA, wait, detail)
        if status in RETRIED or status >= 500:
            return Failure(str(status), "down", True, wait, detail)
        return Failure(str(status), "request", detail=detail)

    def clean(self, text: str) -> str:
        """One short line of what a server or library said, without the key."""
        text = " ".join(text.replace(self.key, "***").split() if self.key else text.split())
        return text if len(text) <= 200 else text[:199] + "…"

    async def close(self) -> None:
        """Close the connections."""
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()


def retry_after(headers: Any) -> float | None:
    """Seconds that a response asks to wait: ``retry-after-ms``, or ``Retry-After`` in seconds or as a date."""
    with contextlib.suppress(KeyError, ValueError):
        return max(float(headers["retry-after-ms"]) / 1000, 0.0)
    text = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        seconds = float(text)
        return max(seconds, 0.0) if seconds < float("inf") else None
    with contextlib.suppress(ValueError, TypeError):
        at = parsedate_to_datetime(text)
        return max((at - datetime.now(UTC)).total_seconds(), 0.0)
    return None


def _release(http: Any, loop: asyncio.AbstractEventLoop, pid: int) -> None:
    """Close the connections of a session that nobody holds any more."""
    if os.getpid() == pid and loop.is_running():
        asyncio.run_coroutine_threadsafe(http.aclose(), loop)


class _TooLarge(Exception):
    pass


async def _content(response: Any) -> bytes:
    parts, size = [], 0
    async for part in response.aiter_bytes():
        parts.append(part)
        size += len(part)
        if size > LARGEST_REPLY:
            raise _TooLarge(f"the reply is larger than {LARGEST_REPLY >> 20} MiB")
    return b"".join(parts)


def _message(data: Any) -> str:
    """The message in an error's body, in the forms that servers give it."""
    error = (data.get("error") or data.get("detail") or data.get("message")) if isinstance(data, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) else json.dumps(error) if error else ""


def _code(data: Any) -> str:
    error = data.get("error") if isinstance(data, dict) else None
    return str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""


def _bearer(httpx: Any, key: str | None) -> Any:
    class Bearer(httpx.Auth):  # type: ignore[misc]
        def auth_flow(self, request: Any) -> Any:
            if key:
                request.headers["Authorization"] = f"Bearer {key}"
            yield request

    return Bearer()


_lock = threading.Lock()
_running: dict[int, asyncio.AbstractEventLoop] = {}


def background_loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process, running in a daemon thread; a forked child makes one of its own."""
    with _lock:
        pid = os.getpid()
        if pid not in _running:
            _running.clear()
            loop = _running[pid] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="polyreward-endpoints", daemon=True).start()
        return _running[pid]


def wait_for(coroutine: Any, tick: Callable[[], None] | None = None, every: float = 0.2) -> Any:
    """Run a coroutine on the background loop and wait for it, calling `tick` meanwhile; Ctrl-C cancels it."""
    future = asyncio.run_coroutine_threadsafe(coroutine, background_loop())
    try:
        while True:
            try:
                return future.result(every if tick else None)
            except TimeoutError:
                if future.done():
                    raise
                if tick:
                    tick()
    except BaseException:
        future.cancel()
        raise
