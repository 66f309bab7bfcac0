"""Objects of a program as the tests see them.

The tests hold a stand-in for every object that does not cross by value. Calls, attributes, items and iteration go to
the program. What compares or computes with a value of the tests stays here: a stand-in equals no plain value (or, for
an object of a class derived from a plain type, compares as that plain value), and arithmetic between a stand-in and a
plain value is refused. So an object that claims to equal everything equals nothing, and no expected value reaches
the program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import Client

#: Stands for what is not there.
NOTHING: Any = object()
_MOST_AT_ONCE = 1024


class RemoteError(Exception):
    """An exception of a class which the program defined."""


def exception_class(name: str, number: int, bases: Any) -> type:
    """A class of the tests for an exception class of the program, below the same built-in exceptions."""
    known = [base for base in bases if isinstance(base, type)]
    if not known or not all(issubclass(base, Exception) for base in known):
        return type(name, (BaseException,), {"_number": number})
    ours = [base for base in known if issubclass(base, RemoteError)]
    others = [base for base in known if not issubclass(base, RemoteError) and base is not Exception]
    try:
        return type(name, (*ours, *([] if ours else [RemoteError]), *others), {"_number": number})
    except TypeError:  # no common layout or order
        return type(name, (RemoteError,), {"_number": number})


def _special(name: str) -> Callable[..., Any]:
    """An operation that the program carries out; on an object of a class derived from plain data, done here."""

    def operation(self: Any, *arguments: Any) -> Any:
        if self._plain is not NOTHING and name in _ON_PLAIN:
            return getattr(self._plain, f"__{name}__")(*arguments)
        return self._client.ask("special", self, name, arguments)

    return operation


_ON_PLAIN = frozenset(
    ["len", "getitem", "int", "float", "complex", "index", "round", "neg", "pos", "abs", "invert", "reversed", "hash"]
)


def _own(name: str) -> Callable[..., Any]:
    """An operation with another object: of the program's objects among themselves, else with the plain value."""

    def operation(self: Any, other: Any) -> Any:
        if isinstance(other, Remote):
            return self._client.ask("special", self, name, (other,))
        if self._plain is not NOTHING:
            return getattr(operator, name)(self._plain, other)
        return NotImplemented

    return operation


def _reflected(name: str) -> Callable[..., Any]:
    """The same with the other object on the left, which is a value of the tests."""

    def operation(self: Any, other: Any) -> Any:
        return NotImplemented if self._plain is NOTHING else getattr(operator, name)(other, self._plain)

    return operation


class Remote:
    """Stands for an object of the program."""

    __slots__ = ("_client", "_number", "_plain")
    _client: Client
    _number: int
    _plain: Any

    def __getattr__(self, name: str) -> Any:
        return self._client.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._client.ask("set", self, name, (value,))

    def __eq__(self, other: object) -> Any:
        if self is other:
            return True
        if isinstance(other, Remote):
            answer = self._client.ask("special", self, "eq", (other,))
            return answer if type(answer) is bool else NotImplemented
        return self._plain == other if self._plain is not NOTHING else False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._plain) if self._plain is not NOTHING else id(self)

    def __iter__(self) -> Iterator[Any]:
        if self._plain is not NOTHING:
            return iter(self._plain)
        return self._client.ask("special", self, "iter")

    def __contains__(self, thing: object) -> bool:
        return any(item is thing or item == thing for item in self)

    def __enter__(self) -> Any:
        return self._client.ask("special", self, "enter")

    def __exit__(self, *_: object) -> None:
        self._client.ask("special", self, "exit")

    def __instancecheck__(self, thing: object) -> bool:
        return isinstance(thing, Remote) and self._client.ask("special", thing, "isinstance", (self,)) is True

    def __subclasscheck__(self, thing: object) -> bool:
        return isinstance(thing, Remote) and self._client.ask("special", thing, "issubclass", (self,)) is True

    def __bool__(self) -> bool:
        return bool(self._plain) if self._plain is not NOTHING else self._client.ask("special", self, "bool") is True

    def __dir__(self) -> list[str]:
        return list(self._client.ask("special", self, "dir"))

    __len__, __repr__, __str__ = _special("len"), _special("repr"), _special("str")
    __format__, __reversed__ = _special("format"), _special("reversed")
    __getitem__, __setitem__, __delitem__ = _special("getitem"), _special("setitem"), _special("delitem")
    __int__, __float__, __complex__, __index__ = (
        _special("int"),
        _special("float"),
        _special("complex"),
        _special("index"),
    )
    __round__, __neg__, __pos__, __abs__ = _special("round"), _special("neg"), _special("pos"), _special("abs")
    __invert__ = _special("invert")
    __lt__, __le__, __gt__, __ge__ = _own("lt"), _own("le"), _own("gt"), _own("ge")
    __add__, __sub__, __mul__, __truediv__ = _own("add"), _own("sub"), _own("mul"), _own("truediv")
    __floordiv__, __mod__, __pow__, __matmul__ = _own("floordiv"), _own("mod"), _own("pow"), _own("matmul")
    __and__, __or__, __xor__ = _own("and_"), _own("or_"), _own("xor")
    __radd__, __rsub__, __rmul__ = _reflected("add"), _reflected("sub"), _reflected("mul")
    __rtruediv__, __rfloordiv__, __rmod__ = _reflected("truediv"), _reflected("floordiv"), _reflected("mod")
    __rpow__, __rand__, __ror__, __rxor__ = _reflected("pow"), _reflected("and_"), _reflected("or_"), _reflected("xor")


class RemoteFunction(Remote):
    """Stands for something that can be called."""

    __slots__ = ()

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Have the program call it."""
        return self._client.ask("call", self, "", arguments, tuple(keywords.items()))


class RemoteIterator(Remote):
    """Stands for an iterator or generator; fetches ever more items at once."""

    __slots__ = ("_items", "_more", "_size")
    _items: list[Any]
    _more: bool
    _size: int

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            items = object.__getattribute__(self, "_items")
        except AttributeError:
            items = []
            object.__setattr__(self, "_items", items)
            object.__setattr__(self, "_more", True)
            object.__setattr__(self, "_size", 1)
        if not items:
            if not self._more:
                raise StopIteration
            answer = self._client.ask("next", self, "", (self._size,))
            if type(answer) is not tuple or len(answer) != 2 or type(answer[0]) is not list:
                self._client.fail("the program broke the protocol")
            object.__setattr__(self, "_items", items := answer[0][::-1])
            object.__setattr__(self, "_more", answer[1] is True)
            object.__setattr__(self, "_size", min(2 * self._size, _MOST_AT_ONCE))
            if not items:
                raise StopIteration
        return items.pop()


class RemoteCoroutine(Remote):
    """Stands for a coroutine, which runs in the program where the tests await it."""

    __slots__ = ()

    def __await__(self) -> Iterator[Any]:
        return self._client.ask("special", self, "await")
        yield


#: Kinds of objects on the wire.
KINDS: dict[str, type[Remote]] = {
    "o": Remote,
    "f": RemoteFunction,
    "c": RemoteFunction,
    "i": RemoteIterator,
    "a": RemoteCoroutine,
}
