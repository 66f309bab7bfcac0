"""A program under test: run as a script, or loaded and then called by the tests over a channel."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from typing import Any

from .channel import Channel, ChannelError
from .wire import Decoder, Encoder, WireError

FILE = "main.py"
_LARGEST_TEXT = 2000
_HERE = (lambda: None).__code__.co_filename
_MOST_OBJECTS = 100_000
_PIECE = 1 << 14
_COPIES: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    complex: lambda value: complex.__add__(value, 0j),
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    bytearray: lambda value: bytearray.__getitem__(value, slice(None)),
    list: lambda value: list.__getitem__(value, slice(None)),
    tuple: lambda value: tuple.__getitem__(value, slice(None)),
    dict: lambda value: dict(dict.items(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
}


def script_body(files: list[int]) -> int:
    """Run a program as a script; `files` are its code, stdin, stdout and stderr."""
    content = read_all(files[0])
    for number, file in enumerate(files[1:]):
        os.dup2(file, number)
    os.closerange(3, 1 << 16)
    code, arguments = content[1:].decode("utf-8", "surrogatepass"), []
    if content[:1] == b"J":
        import json

        given = json.loads(content[1:])
        code, arguments = given["code"], given["arguments"]
        for name, text in given["files"].items():
            _write_file(name, text)
    return run_script(code, arguments)


def served_body(files: list[int]) -> int:
    """Run a program that tests call; `files` are its code and the pipes of requests and of replies."""
    code = read_all(files[0])[1:].decode("utf-8", "surrogatepass")
    os.closerange(3, files[1])
    os.closerange(files[2] + 1, 1 << 16)
    serve(code, Channel(files[1], files[2]))
    return 0


def read_all(file: int) -> bytes:
    """What stands in a file, from where it is."""
    content = os.read(file, _PIECE)
    while len(content) % _PIECE == 0 and (piece := os.read(file, _PIECE)):
        content += piece
    return content


class _Source:
    """Loader of a program's module, from which tracebacks get its lines."""

    def __init__(self, code: str) -> None:
        self.code = code

    def get_source(self, name: str) -> str:
        return self.code


_source = _Source("")
_module = types.ModuleType("main")
_module.__dict__.update(__file__=FILE, __loader__=_source, __builtins__=__builtins__)


def module_of(code: str, name: str) -> types.ModuleType:
    """The module for a program, made before the fork, which gives each program its own; tracebacks show its source."""
    _source.code = code
    _module.__name__ = name
    sys.modules[name] = _module
    return _module


def run_script(code: str, arguments: list[str]) -> int:
    """Run a program as ``python main.py arguments`` does, to the end of its threads; the exit status."""
    sys.argv = [FILE, *arguments]
    if FILE in code or "__file__" in code or "argv" in code:
        _write_file(FILE, code)
    module = module_of(code, "__main__")
    status = _outcome(lambda: exec(compile(code, FILE, "exec", dont_inherit=True), module.__dict__))
    if "threading" in sys.modules:
        status = _outcome(sys.modules["threading"]._shutdown) or status  # waits for threads that are no daemons
    if "atexit" in sys.modules:
        _outcome(sys.modules["atexit"]._run_exitfuncs)
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None:
                stream.flush()
        except Exception:
            status = status or 120  # as Python itself does
    return status


def _outcome(run: Callable[[], Any]) -> int:
    """Exit status that a part of a script stands for."""
    try:
        run()
    except SystemExit as stop:
        return _status_of(stop)
    except BaseException as error:
        _print_traceback(error)
        return 1
    return 0


def _write_file(name: str, text: str) -> None:
    if os.path.dirname(name):
        os.makedirs(os.path.dirname(name), exist_ok=True)
    with open(name, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        file.write(text)


def serve(code: str, channel: Channel) -> None:
    """Load a program and answer what the tests ask of it until they end."""
    module = module_of(code, "main")
    try:
        exec(compile(code, FILE, "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        channel.send(_first_message(error))
        return
    channel.send(_first_message(None))
    try:
        Server(module.__dict__, channel).serve()
    except ChannelError:
        return  # the tests ended


class Server:
    """Answers requests: looks names up, calls, reads attributes."""

    def __init__(self, names: dict[str, Any], channel: Channel) -> None:
        self.names, self.channel = names, channel
        self.numbers: dict[int, int] = {}  # identity -> number
        self.objects: list[Any] = []

    def serve(self) -> None:
        """Answer until the other end closes."""
        while True:
            self.answer(self.channel.receive())

    def answer(self, request: bytes) -> None:
        """Carry out one request."""
        given = Decoder(request, self.resolve)
        nonce, verb, target, name, arguments, keywords = given.read()
        before: list[bytes] = []
        if given.objects:
            known = {id(thing): number for number, thing in enumerate(given.objects)}
            before = [self.content(thing, known) for thing in given.objects]
        try:
            result = self.perform(verb, target, name, arguments, dict(keywords))
            reply = self.reply(nonce, "value", result, given.objects, before)
        except BaseException as error:
            reply = self.failure(nonce, error, given.objects, before)
        self.channel.send(reply)

    def perform(self, verb: str, target: Any, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """What a request asks for."""
        if verb == "call":
            return target(*arguments, **keywords)
        if verb == "name":
            return (True, _described(name, self.names[name])) if name in self.names else (False, None)
        if verb == "get":
            return getattr(target, name)
        if verb == "set":
            return setattr(target, name, *arguments)
        if verb == "next":
            return _taken(target, *arguments)
        if verb == "special":
            return _special(target, name, arguments)
        raise WireError(f"unknown verb {verb!r}")

    def reply(self, nonce: int, kind: str, result: Any, things: list[Any], before: list[bytes]) -> bytes:
        """A reply with its value and with the arguments that were changed in place."""
        numbers = {id(thing): number for number, thing in enumerate(things)}
        encoder = Encoder(self.export, dict(numbers))
        encoder.write((nonce, kind, result))
        if things:
            changed = [number for number, thing in enumerate(things) if self.content(thing, numbers) != before[number]]
            encoder.write(tuple((number, _items(things[number])) for number in changed))
        return encoder.bytes()

    def failure(self, nonce: int, error: BaseException, things: list[Any], before: list[bytes]) -> bytes:
        """A reply that carries an exception: its class, its arguments where they are plain, its text."""
        try:
            arguments = tuple(error.args)
            Encoder(_refuse).write(arguments)
        except BaseException:
            arguments = None
        content = (type(error), arguments, _text(error), _where(error))
        try:
            return self.reply(nonce, "raise", content, things, before)
        except BaseException as worse:
            content = (RuntimeError, None, f"{type(error).__name__}: {_text(worse)}", "")
            return self.reply(nonce, "raise", content, [], [])

    def content(self, thing: Any, known: dict[int, int]) -> bytes:
        """A container's content as bytes, to see whether a call changed it."""
        encoder = Encoder(self.export, dict(known))
        encoder.write(_items(thing))
        return encoder.bytes()

    def export(self, thing: Any) -> tuple[str, int, str, Any]:
        """Number an object that does not cross by value, and say what it is."""
        if type(thing) is _Callback:
            return "k", thing.number, "", None
        number = self.numbers.get(id(thing))
        if number is None:
            if len(self.objects) >= _MOST_OBJECTS:
                raise WireError(f"more than {_MOST_OBJECTS} objects cross")
            number = self.numbers[id(thing)] = len(self.objects)
            self.objects.append(thing)
        kind = type(thing)
        if isinstance(thing, type):
            if issubclass(thing, BaseException):
                return "x", number, thing.__name__, tuple(b for b in thing.__bases__ if issubclass(b, BaseException))
            return "c", number, thing.__name__, None
        if kind is types.CoroutineType:
            return "a", number, kind.__name__, None
        if hasattr(kind, "__next__"):
            return "i", number, kind.__name__, None
        base = next((base for base in _COPIES if issubclass(kind, base)), None)
        plain = None if base is None else _COPIES[base](thing)
        name = getattr(thing, "__name__", kind.__name__) if callable(thing) else kind.__name__
        return "f" if callable(thing) else "o", number, str(name), plain

    def resolve(self, kind: str, number: int, name: str, plain: Any) -> Any:
        """The object behind a number: one of ours, or a function of the tests."""
        return self.objects[number] if kind == "p" else _Callback(self, number)

    def call_back(self, number: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Call a function of the tests."""
        encoder = Encoder(self.export)
        encoder.write((0, "callback", (number, arguments, tuple(keywords.items()))))
        self.channel.send(encoder.bytes())
        while True:  # the function may call the program in turn
            message = self.channel.receive()
            given = Decoder(message, self.resolve).read()
            if given[0] is not None:
                self.answer(message)
                continue
            _, worked, result = given
            if worked:
                return result
            kind, text = result
            raise kind(text)


class _Callback:
    """Stands in the program for a function of the tests."""

    def __init__(self, server: Server, number: int) -> None:
        self.server, self.number = server, number

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.server.call_back(self.number, arguments, keywords)


def _described(name: str, value: Any) -> Any:
    """A looked-up value; what stems from the standard library goes by name, for the tests to import themselves."""
    if isinstance(value, types.ModuleType):
        return ("module", value.__name__)
    home = getattr(value, "__module__", None)
    if isinstance(home, str) and home != "main" and getattr(value, "__name__", None) == name and home != "builtins":
        return ("member", home)
    return ("value", value)


def _special(target: Any, name: str, arguments: tuple[Any, ...]) -> Any:
    """An operation that syntax or a built-in function carries out."""
    import operator

    known: dict[str, Callable[..., Any]] = {
        "len": len, "iter": iter, "reversed": reversed, "repr": repr, "str": str, "bool": bool, "format": format,
        "int": int, "float": float, "complex": complex, "round": round, "dir": dir, "hash": hash,
        "getitem": operator.getitem, "setitem": operator.setitem, "delitem": operator.delitem, "index": operator.index,
        "isinstance": isinstance, "issubclass": issubclass, "await": _run_coroutine,
        "enter": lambda thing: type(thing).__enter__(thing),
        "exit": lambda thing: type(thing).__exit__(thing, None, None, None),
    }  # fmt: skip
    function = known.get(name) or getattr(operator, name)
    return function(target, *arguments)


def _run_coroutine(coroutine: Any) -> Any:
    import asyncio

    return asyncio.run(coroutine)


def _taken(iterator: Any, most: int) -> tuple[list[Any], bool]:
    """Up to `most` items, and whether there may be more."""
    found: list[Any] = []
    for item in iterator:
        found.append(item)
        if len(found) >= most:
            return found, True
    return found, False


def _items(thing: Any) -> Any:
    if type(thing) is bytearray:
        return bytes(thing)
    if isinstance(thing, dict):
        return tuple(part for pair in dict.items(thing) for part in pair)
    return tuple(thing)


def _refuse(thing: Any) -> Any:
    raise WireError("not plain")


def _first_message(error: BaseException | None) -> bytes:
    encoder = Encoder(_refuse)
    if error is None:
        encoder.write(("ready", "", ""))
    else:
        encoder.write(("failed", type(error).__name__, f"{_summary(error)}{_where(error)}"))
    return encoder.bytes()


def _summary(error: BaseException) -> str:
    text = _text(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_LARGEST_TEXT]
    except BaseException:
        return ""


def _where(error: BaseException) -> str:
    """The last line of the program that an exception passed."""
    try:
        line, inner = None, error.__traceback__
        while inner is not None:
            if inner.tb_frame.f_code.co_filename == FILE:
                line = inner.tb_lineno
            inner = inner.tb_next
        return "" if line is None else f" ({FILE}, line {line})"
    except BaseException:
        return ""


def _status_of(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    try:
        print(stop.code, file=sys.stderr)
    except Exception:
        return 1
    return 1


def _print_traceback(error: BaseException) -> None:
    """As Python prints it, without the frames of this module."""
    try:
        import traceback

        inner = error.__traceback__
        while inner is not None and inner.tb_frame.f_code.co_filename == _HERE:
            inner = inner.tb_next
        hook = sys.excepthook
        if hook is not sys.__excepthook__:
            hook(type(error), error, inner)
        else:
            traceback.print_exception(type(error), error, inner)
    except BaseException:
        os.write(2, f"{type(error).__name__}\n".encode())
