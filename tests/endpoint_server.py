"""A chat completions server on this machine that does what a test tells it to: answer, refuse, stall, or break off."""

import contextlib
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, finish_reason="stop", **message):
    """A reply's JSON, with 3 prompt tokens and as many completion tokens as the text has words."""
    return {
        "id": "1",
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **message},
                "finish_reason": finish_reason,
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": len(str(text or "").split())},
    }


def echo(request):
    """Answer with the last message in capitals."""
    return completion(request["messages"][-1]["content"].upper())


@dataclass
class Status:
    """A response with this status, headers and body."""

    code: int
    body: object = None
    headers: dict = field(default_factory=dict)


@dataclass
class Raw:
    """A response with this body as it is."""

    body: bytes
    content_type: str = "application/json"


class Hang:
    """No answer for ten seconds."""


class Drip:
    """A body that comes byte by byte and never ends."""


class Truncated:
    """Half of the body that the header promises."""


class Close:
    """The connection ends without an answer."""


class ChatServer:
    """Answers with `answer`, a function of the request; what `script` holds comes first, one entry a request.

    `plan`, a function of the request, picks what happens by content; None from it means the answer.
    """

    def __init__(self, answer=echo, script=(), plan=None):
        self.answer, self.script, self.plan = answer, list(script), plan
        self.requests, self.headers, self.connections = [], [], 0
        self.active = self.most_active = 0
        self.lock, self.ended = threading.Lock(), threading.Event()
        self._open = set()

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self):
                super().setup()
                with server.lock:
                    server.connections += 1
                    server._open.add(self.connection)

            def finish(self):
                with server.lock:
                    server._open.discard(self.connection)
                super().finish()

            def log_message(self, *_):
                pass

            def do_POST(self):
                server._handle(self)

        class Server(ThreadingHTTPServer):
            request_queue_size = 256

            def handle_error(self, *_):
                pass

        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()
        with self.lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @property
    def texts(self):
        """Last message of every request."""
        return [request["messages"][-1]["content"] for request in self.requests]

    def _handle(self, handler):
        request = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self.lock:
            self.requests.append(request)
            self.headers.append(dict(handler.headers))
            self.active += 1
            self.most_active = max(self.most_active, self.active)
            what = self.script.pop(0) if self.script else None
        if what is None and self.plan is not None:
            what = self.plan(request)
        if what is None and not handler.path.endswith("/v1/chat/completions"):
            what = Status(404, {"detail": "Not Found"})
        try:
            self._respond(handler, what, request)
        except OSError:
            handler.close_connection = True
        finally:
            with self.lock:
                self.active -= 1

    def _respond(self, handler, what, request):
        if isinstance(what, Hang):
            self.ended.wait(10)
            handler.close_connection = True
        elif isinstance(what, Drip):
            _head(handler, 200, 10**6)
            while not self.ended.wait(0.01):
                handler.wfile.write(b" ")
                handler.wfile.flush()
        elif isinstance(what, Truncated):
            body = json.dumps(completion("half")).encode()
            _head(handler, 200, len(body))
            handler.wfile.write(body[: len(body) // 2])
            handler.close_connection = True
        elif isinstance(what, Close):
            handler.close_connection = True
        elif isinstance(what, Raw):
            _head(handler, 200, len(what.body), {"Content-Type": what.content_type})
            handler.wfile.write(what.body)
        else:
            status = what if isinstance(what, Status) else Status(200, what or self.answer(request))
            body = json.dumps(status.body).encode() if status.body is not None else b""
            _head(handler, status.code, len(body), {"Content-Type": "application/json", **status.headers})
            handler.wfile.write(body)


def _head(handler, code, length, headers=()):
    handler.send_response(code)
    for name, value in dict(headers).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(length))
    handler.end_headers()
