"""Plain data as bytes, between a program and the tests that call it.

Exactly these types cross: None, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset,
range, slice, Ellipsis, deque, OrderedDict, Counter, defaultdict, Decimal, Fraction, date, time, datetime, timedelta,
and builtin types by name. An object of any other class, also of a class derived from one of these, crosses as a number
that stands for it. So nothing that arrives has behaviour of the sender's making, and reading runs no code of the
sender.

Lists, dicts, sets and other mutable containers are numbered as they appear. A second appearance is a reference to the
first, so that shared and self-referring structures keep their shape.
"""

from __future__ import annotations

import builtins
import importlib
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

#: No structure that crosses is deeper.
DEEPEST = 200
#: Types that cross by name.
TYPES = {
    name: value
    for name, value in vars(builtins).items()
    if isinstance(value, type) and name not in ("__loader__", "super", "classmethod", "staticmethod", "property")
}
TYPES["NoneType"] = type(None)
_NAMES = {value: name for name, value in TYPES.items()}
_DOUBLE, _LONG = struct.Struct("<d"), struct.Struct("<q")
_HEAD, _NUMBER = struct.Struct("<cq"), struct.Struct("<cd")
_SEQUENCES: dict[type, bytes] = {list: b"l", tuple: b"t", set: b"e", frozenset: b"z", deque: b"D"}
_MAPPINGS: dict[type, bytes] = {dict: b"d", OrderedDict: b"O", Counter: b"C", defaultdict: b"G"}
_KINDS_OF_MAPPING: dict[bytes, Callable[[], Any]] = {b"d": dict, b"O": OrderedDict, b"C": Counter, b"G": defaultdict}
_MUTABLE = frozenset((list, dict, set, bytearray, deque, OrderedDict, Counter, defaultdict))
#: Types that cross as text, which are imported where they are used: tag -> module, class, function that reads one
_AS_TEXT = {
    b"M": ("decimal", "Decimal", ""),
    b"Q": ("fractions", "Fraction", ""),
    b"A": ("datetime", "date", "fromisoformat"),
    b"I": ("datetime", "time", "fromisoformat"),
    b"J": ("datetime", "datetime", "fromisoformat"),
}


class WireError(Exception):
    """Bytes that are no value, or a value that cannot cross."""


def _integer(value: int) -> bytes:
    if -(1 << 63) <= value < 1 << 63:
        return _HEAD.pack(b"i", value)
    return _counted(b"n", value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def _counted(tag: bytes, content: bytes) -> bytes:
    return _HEAD.pack(tag, len(content)) + content


_SCALARS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"N",
    bool: lambda value: b"T" if value else b"F",
    int: _integer,
    float: lambda value: _NUMBER.pack(b"f", value),
    str: lambda value: _counted(b"s", value.encode("utf-8", "surrogatepass")),
    bytes: lambda value: _counted(b"b", value),
    complex: lambda value: b"c" + _DOUBLE.pack(value.real) + _DOUBLE.pack(value.imag),
    type(Ellipsis): lambda _: b"E",
}


class Encoder:
    """Writes values. `export` turns an object of any other class into (kind, number, class name, plain value or None).

    One encoder writes one message: containers keep their numbers over all its values.
    """

    def __init__(self, export: Callable[[Any], tuple[str, int, str, Any]], numbers: dict[int, int] | None = None):
        self.export = export
        self.numbers = {} if numbers is None else numbers  # identity of a container -> its number
        self.kept: list[Any] = []  # so that no identity is used twice
        self.parts: list[bytes] = []

    def write(self, value: Any, depth: int = 0) -> None:
        """Append a value."""
        kind = type(value)
        if kind in _SCALARS:
            self.parts.append(_SCALARS[kind](value))
        elif depth >= DEEPEST:
            raise WireError(f"a structure deeper than {DEEPEST}")
        elif kind is tuple or kind is frozenset:
            self._content(value, depth)
        elif kind in _MUTABLE:
            number = self.numbers.get(id(value))
            if number is None:
                self.numbers[id(value)] = len(self.numbers)
                self.kept.append(value)
                self._content(value, depth)
            else:
                self.parts.append(_HEAD.pack(b"B", number))
        elif kind is range or kind is slice:
            self.parts.append(b"r" if kind is range else b"S")
            for part in (value.start, value.stop, value.step):
                self.write(part, depth + 1)
        elif kind is type and value in _NAMES:
            self.parts.append(_counted(b":", _NAMES[value].encode()))
        else:
            self._other(kind, value, depth)

    def _content(self, value: Any, depth: int) -> None:
        """Append a container with what is in it, whether it was seen or not."""
        kind, parts, scalars = type(value), self.parts, _SCALARS
        if kind is bytearray:
            parts.append(_counted(b"y", bytes(value)))
            return
        if kind in _SEQUENCES:
            items = list(value)
            parts.append(_HEAD.pack(_SEQUENCES[kind], len(items)))
            if kind is deque:
                self.write(value.maxlen, depth + 1)
        else:
            items = [part for pair in dict.items(value) for part in pair]
            parts.append(_HEAD.pack(_MAPPINGS[kind], len(items) // 2))
        for item in items:
            if type(item) in scalars:
                parts.append(scalars[type(item)](item))
            else:
                self.write(item, depth + 1)

    def _other(self, kind: type, value: Any, depth: int) -> None:
        """Append what crosses as text, or as the number that stands for it."""
        for tag, (module, name, reader) in _AS_TEXT.items():
            if (home := sys.modules.get(module)) is not None and home.__dict__.get(name) is kind:
                self.parts.append(_counted(tag, (value.isoformat() if reader else str(value)).encode()))
                return
        if (home := sys.modules.get("datetime")) is not None and home.__dict__.get("timedelta") is kind:
            self.parts.append(b"K")
            for part in (value.days, value.seconds, value.microseconds):
                self.write(part, depth + 1)
            return
        role, number, name, plain = self.export(value)
        self.parts.append(_counted(b"R", f"{role}{number} {name}".encode("utf-8", "replace")[:300]))
        self.write(plain, depth + 1)

    def bytes(self) -> bytes:
        """All that was written."""
        return b"".join(self.parts)


class Decoder:
    """Reads values. `resolve` turns (kind, number, class name, plain value or None) into the object they stand for."""

    def __init__(self, data: bytes, resolve: Callable[[str, int, str, Any], Any], objects: list[Any] | None = None):
        self.data, self.resolve, self.at = data, resolve, 0
        self.objects = [] if objects is None else objects  # containers by number

    def done(self) -> bool:
        """Whether all was read."""
        return self.at >= len(self.data)

    def read(self) -> Any:
        """The next value.

        Raises
        ------
        WireError
            Where the bytes are no value.

        """
        try:
            return self._read(0)
        except WireError:
            raise
        except (
            ValueError, TypeError, LookupError, struct.error, OverflowError, ArithmeticError, AttributeError
        ) as error:  # fmt: skip
            raise WireError(f"not a value: {error}") from None

    def _read(self, depth: int) -> Any:
        data, at = self.data, self.at
        tag = data[at : at + 1]
        self.at = at + 1
        if tag == b"i":
            self.at = at + 9
            return _LONG.unpack_from(data, at + 1)[0]
        if tag == b"s":
            return self._counted().decode("utf-8", "surrogatepass")
        if tag == b"N":
            return None
        if tag == b"T":
            return True
        if tag == b"F":
            return False
        if tag == b"f":
            self.at = at + 9
            return _DOUBLE.unpack_from(data, at + 1)[0]
        if depth > DEEPEST:
            raise WireError(f"a structure deeper than {DEEPEST}")
        if tag == b"t":
            return tuple(self._items(depth))
        if tag == b"l":
            found: Any = self._keep([])
            found += self._items(depth)
            return found
        if tag == b"d" or tag == b"O" or tag == b"C" or tag == b"G":
            return self._mapping(tag, depth)
        if tag == b"R":
            return self._reference(depth)
        if tag == b"B":
            return self.objects[self._count(len(self.objects))]
        return self._rarely(tag, depth)

    def _rarely(self, tag: bytes, depth: int) -> Any:
        """The kinds of value that are rare."""
        if tag == b"e":
            found: Any = self._keep(set())
            found.update(self._items(depth))
            return found
        if tag == b"z":
            return frozenset(self._items(depth))
        if tag == b"D":
            return self._deque(depth)
        if tag == b"n":
            return int.from_bytes(self._counted(), "big", signed=True)
        if tag == b"b":
            return self._counted()
        if tag == b"y":
            return self._keep(bytearray(self._counted()))
        if tag == b"c":
            self.at += 16
            return complex(*(_DOUBLE.unpack_from(self.data, self.at - back)[0] for back in (16, 8)))
        if tag == b"r" or tag == b"S":
            bounds = [self._read(depth + 1) for _ in range(3)]
            return range(*bounds) if tag == b"r" else slice(*bounds)
        if tag == b"E":
            return Ellipsis
        if tag == b"K":
            return importlib.import_module("datetime").timedelta(*(self._read(depth + 1) for _ in range(3)))
        if tag == b":":
            return TYPES[self._counted().decode()]
        if tag in _AS_TEXT:
            module, name, reader = _AS_TEXT[tag]
            kind = getattr(importlib.import_module(module), name)
            return (getattr(kind, reader) if reader else kind)(self._counted().decode())
        raise WireError(f"unknown tag {tag!r}")

    def _items(self, depth: int) -> list[Any]:
        size, read = self._count(len(self.data)), self._read
        return [read(depth + 1) for _ in range(size)]

    def _deque(self, depth: int) -> deque[Any]:
        size, slot = self._count(len(self.data)), len(self.objects)
        self.objects.append(None)
        longest = self._read(depth + 1)
        found: deque[Any] = deque(maxlen=longest)
        self.objects[slot] = found
        found.extend([self._read(depth + 1) for _ in range(size)])
        return found

    def _mapping(self, tag: bytes, depth: int) -> Any:
        found: Any = self._keep(_KINDS_OF_MAPPING[tag]())
        for _ in range(self._count(len(self.data))):
            key = self._read(depth + 1)
            found[key] = self._read(depth + 1)
        return found

    def _reference(self, depth: int) -> Any:
        head, _, name = self._counted().decode("utf-8", "replace").partition(" ")
        return self.resolve(head[:1], int(head[1:]), name, self._read(depth + 1))

    def _keep(self, value: Any) -> Any:
        self.objects.append(value)
        return value

    def _count(self, end: int) -> int:
        """A count or a number; a message of n bytes has no more than n of anything."""
        found = _LONG.unpack_from(self.data, self.at)[0]
        self.at += 8
        if not 0 <= found <= end:
            raise WireError(f"a count of {found}")
        return int(found)

    def _counted(self) -> bytes:
        start = self.at + 8
        end = start + self._count(len(self.data))
        if end > len(self.data):
            raise WireError("cut short")
        self.at = end
        return self.data[start:end]
