"""The tests' end of the channel to a program: questions, answers, and the names that tests look up."""

from __future__ import annotations

import builtins
import importlib
import os
import sys
import types
from typing import Any, NoReturn

from .channel import Channel, ChannelError, ClosedError
from .remote import KINDS, NOTHING, Remote, RemoteError, RemoteFunction, exception_class
from .wire import Decoder, Encoder, WireError

#: Modules in which nothing changes by calling their functions; the state of `random` is set anew for each test.
HARMLESS_MODULES = ("math", "cmath", "itertools", "heapq", "bisect", "random")


class ProgramFailure(BaseException):
    """The program ended, or broke the protocol. No `except Exception` of a test hides it."""


class Client:
    """The tests' side of the channel to a program."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.broken: str | None = None
        self.nonce = int.from_bytes(os.urandom(6), "big")
        self.memory = False
        self.foreign = False  # whether the tests got a module which they did not ask for
        self.raised: set[int] = set()  # identities of exceptions that came from the program
        self.kept: list[BaseException] = []
        self.proxies: dict[int, Any] = {}
        self.classes: dict[str, type[Remote]] = {}
        self.functions: list[Any] = []

    def start(self, name: str | None) -> Any:
        """Wait until the program is loaded; what it calls `name`, `NOTHING` where it has no such name."""
        asked = None
        if name is not None:
            try:  # before it is loaded, so that it has not to be woken for that
                asked = self._send_request("name", None, name, (), ())
            except ProgramFailure:  # it ended, and may have said why
                self.broken = None
        message = self._receive().read()
        if type(message) is not tuple or len(message) != 3 or message[0] not in ("ready", "failed"):
            self.fail("the program broke the protocol")
        _, kind, text = message
        if message[0] == "failed":
            self.memory = kind == "MemoryError"
            self.fail(str(text))
        if asked is None:
            return NOTHING if name is None else self.lookup(name)
        return self._meaning(name or "", self._receive_answer(*asked))

    def lookup(self, name: str) -> Any:
        """What the program calls `name`; `NOTHING` where it has no such name."""
        return self._meaning(name, self.ask("name", None, name))

    def _meaning(self, name: str, answer: Any) -> Any:
        """What the answer to a question for a name stands for."""
        if type(answer) is not tuple or len(answer) != 2:
            self.fail("the program broke the protocol")
        found, value = answer
        if found is not True:
            return NOTHING
        if type(value) is not tuple or len(value) != 2:
            self.fail("the program broke the protocol")
        kind, content = value
        if kind == "value":
            return content
        if kind not in ("module", "member") or type(content) is not str:
            self.fail("the program broke the protocol")
        if content.partition(".")[0] not in sys.stdlib_module_names or content.partition(".")[0] == "__main__":
            return NOTHING
        try:
            module = importlib.import_module(content)
            self.foreign = self.foreign or content not in HARMLESS_MODULES
            return module if kind == "module" else getattr(module, name)
        except (ImportError, AttributeError):
            return NOTHING

    def ask(self, verb: str, target: Any, name: str = "", arguments: tuple[Any, ...] = (), keywords: Any = ()) -> Any:
        """Have the program do something, and return or raise what comes of it."""
        return self._receive_answer(*self._send_request(verb, target, name, arguments, keywords))

    def _send_request(
        self, verb: str, target: Any, name: str, arguments: tuple[Any, ...], keywords: Any
    ) -> tuple[int, list[Any]]:
        """Send a request; its number, and the containers in it, which the program may change."""
        if self.broken is not None:
            raise ProgramFailure(self.broken)
        self.nonce += 1
        nonce = self.nonce
        encoder = Encoder(self.export)
        try:
            encoder.write((nonce, verb, target, name, arguments, keywords))
        except WireError as error:
            raise TypeError(f"cannot be passed to the program: {error}") from None
        self._send(encoder.bytes())
        return nonce, encoder.kept

    def _receive_answer(self, nonce: int, containers: list[Any]) -> Any:
        """Wait for the answer to a request, and return or raise it."""
        while True:
            reply = self._receive(list(containers))
            try:
                message = reply.read()
                if type(message) is not tuple or len(message) != 3:
                    raise WireError("no answer")
                answered, kind, content = message
                if kind not in ("value", "raise", "callback") or (kind != "callback" and answered != nonce):
                    raise WireError("no answer to what was asked")
                if not reply.done():
                    self.write_back(reply.read(), containers)
            except (WireError, TypeError, ValueError) as error:
                self.fail(f"the program broke the protocol: {error}")
            if kind == "callback":
                self.called_back(content)
                continue
            if kind == "value":
                return content
            self.throw(content)

    def write_back(self, changes: Any, arguments: list[Any]) -> None:
        """Give the arguments the content that the program left in them."""
        if type(changes) is not tuple or not all(type(change) is tuple and len(change) == 2 for change in changes):
            raise WireError("no changes")
        for number, items in changes:
            if type(number) is not int or not 0 <= number < len(arguments):
                raise WireError("no such argument")
            thing = arguments[number]
            if type(thing) is bytearray:
                if type(items) is not bytes:
                    raise WireError("no bytes")
                thing[:] = items
            elif type(items) is not tuple:
                raise WireError("no items")
            elif isinstance(thing, dict):
                thing.clear()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    thing[key] = value
            elif isinstance(thing, set):
                thing.clear()
                thing.update(items)
            else:
                thing.clear()
                thing.extend(items)

    def throw(self, content: Any) -> None:
        """Raise what the program raised."""
        try:
            kind, arguments, text, where = content
        except (TypeError, ValueError):
            self.fail("the program broke the protocol")
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            self.fail("the program broke the protocol")
        if not issubclass(kind, Exception):
            self.fail(f"the program raised {kind.__name__}{where}")
        if kind is MemoryError:
            self.memory = True
        try:
            error = kind(*arguments) if type(arguments) is tuple else kind(text)
        except Exception:
            error = RemoteError(f"{kind.__name__}: {text}")
        self.raised.add(id(error))
        self.kept.append(error)
        raise error

    def called_back(self, content: Any) -> None:
        """Run a function of the tests which the program was given."""
        try:
            number, arguments, keywords = content
            function = self.functions[number]
        except (TypeError, ValueError, IndexError):
            self.fail("the program broke the protocol")
        try:
            worked, result = True, function(*arguments, **dict(keywords))
        except Exception as error:
            kind = type(error) if type(error).__module__ == "builtins" else RuntimeError
            worked, result = False, (kind, str(error))
        encoder = Encoder(self.export)
        try:
            encoder.write((None, worked, result))
        except WireError as error:
            encoder = Encoder(self.export)
            encoder.write((None, False, (TypeError, f"cannot be passed to the program: {error}")))
        self._send(encoder.bytes())

    def fail(self, message: str) -> NoReturn:
        """Give the program up: whatever the test does now, it does not pass."""
        raise self.failure(message)

    def failure(self, message: str) -> ProgramFailure:
        """The exception for giving the program up."""
        if self.broken is None:
            self.broken = message
        return ProgramFailure(self.broken)

    def export(self, thing: Any) -> tuple[str, int, str, Any]:
        """A stand-in goes back as its number; a function of the tests gets one."""
        if isinstance(thing, Remote):
            return "p", object.__getattribute__(thing, "_number"), "", None
        if isinstance(thing, type) and issubclass(thing, RemoteError) and hasattr(thing, "_number"):
            return "p", thing._number, "", None
        if callable(thing):
            self.functions.append(thing)
            return "k", len(self.functions) - 1, "", None
        raise WireError(f"an object of class {type(thing).__name__}, which is no plain data")

    def resolve(self, kind: str, number: int, name: str, plain: Any) -> Any:
        """The stand-in for an object of the program."""
        if kind == "k":
            return self.functions[number]
        if kind == "x":
            if number not in self.proxies:
                self.proxies[number] = exception_class(name, number, plain)
            return self.proxies[number]
        found = self.proxies.get(number)
        if found is None:
            derived = KINDS[kind]
            if kind == "o":  # so that type(thing).__name__ is what the tests expect
                if name not in self.classes:
                    self.classes[name] = type(name, (Remote,), {"__slots__": ()})
                derived = self.classes[name]
            found = self.proxies[number] = object.__new__(derived)
            object.__setattr__(found, "_client", self)
            object.__setattr__(found, "_number", number)
        object.__setattr__(found, "_plain", NOTHING if plain is None else plain)
        return found

    def _send(self, body: bytes) -> None:
        try:
            self.channel.send(body)
        except ClosedError:
            self.fail("the program ended before the tests did")
        except ChannelError as error:
            raise TypeError(f"cannot be passed to the program: {error}") from None

    def _receive(self, objects: list[Any] | None = None) -> Decoder:
        try:
            return Decoder(self.channel.receive(), self.resolve, objects)
        except ClosedError:
            raise self.failure("the program ended before the tests did") from None
        except ChannelError as error:
            raise self.failure(f"the program broke the protocol: {error}") from None


class Namespace(dict[str, Any]):
    """Globals of the tests: a name which they do not define and which is no built-in is looked up in the program."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.client = client
        self["__name__"] = "__main__"
        self["__builtins__"] = builtins

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) or name.startswith("__"):
            raise KeyError(name)
        found = self.client.lookup(name)
        if found is NOTHING:
            raise KeyError(name)
        if isinstance(found, RemoteFunction):  # functions and classes stay what they are; data may change
            self[name] = found
        return found


class TestsModule(types.ModuleType):
    """The module ``__main__`` of tests, in which `unittest` looks for its cases."""

    def __init__(self, names: Namespace) -> None:
        super().__init__("__main__")
        self.__dict__["names"] = names

    def __getattr__(self, name: str) -> Any:
        try:
            return dict.__getitem__(self.__dict__["names"], name)
        except KeyError:
            raise AttributeError(name) from None

    def __dir__(self) -> list[str]:
        return list(self.__dict__["names"])
