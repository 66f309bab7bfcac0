"""What crosses between programs and tests: values as they are, and of anything else an error."""

import math
from collections import Counter, OrderedDict, deque
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyreward.rewards.sandbox_inside import seccomp, warmup
from polyreward.rewards.sandbox_inside.wire import DEEPEST, Decoder, Encoder, WireError


def refuse(*_: Any) -> Any:
    raise WireError("an object")


def encoded(value: Any) -> bytes:
    encoder = Encoder(refuse)
    encoder.write(value)
    return encoder.bytes()


def decoded(data: bytes) -> Any:
    return Decoder(data, refuse).read()


scalars = (
    st.none() | st.booleans() | st.integers() | st.integers(-(2**300), 2**300) | st.floats() | st.text(st.characters())
    | st.binary() | st.complex_numbers(allow_nan=False) | st.decimals(allow_nan=False) | st.fractions() | st.dates()
    | st.datetimes() | st.timedeltas()
)  # fmt: skip
hashable = st.recursive(
    scalars.filter(lambda x: x == x),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)


def containers(inner: st.SearchStrategy) -> st.SearchStrategy:  # type: ignore[type-arg]
    lists, tables = st.lists(inner, max_size=3), st.dictionaries(hashable, inner, max_size=3)
    sets = st.sets(hashable, max_size=3)
    return lists | st.tuples(inner) | tables | sets | st.builds(deque, lists) | st.builds(OrderedDict, tables)


values = st.recursive(scalars | st.builds(bytearray, st.binary()), containers, max_leaves=12)


def same(a: Any, b: Any) -> bool:
    """Equal with equal types throughout, and NaN equal to NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@settings(max_examples=300, deadline=None)
@given(values)
def test_values_come_back_as_they_were(value: Any) -> None:
    assert same(decoded(encoded(value)), value)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_a_wire_error(data: bytes) -> None:
    try:
        decoded(data)
    except WireError:
        return


@settings(max_examples=300, deadline=None)
@given(values, st.data())
def test_changed_bytes_are_a_value_or_a_wire_error(value: Any, data: st.DataObject) -> None:
    content = bytearray(encoded(value))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    for changed in (bytes(content), bytes(content[:cut])):
        try:
            decoded(changed)
        except WireError:
            continue


def test_shared_and_circular_structures_keep_their_shape() -> None:
    row = [1]
    value: list[Any] = [row, row, {"row": row}]
    value.append(value)
    found = decoded(encoded(value))
    assert found[0] is found[1] is found[2]["row"]
    assert found[3] is found


def test_depth_is_bounded() -> None:
    value: Any = 0
    for _ in range(DEEPEST - 1):
        value = (value,)
    assert decoded(encoded(value)) == value
    with pytest.raises(WireError, match="deeper"):
        encoded([[value, ((value,),)]])
    with pytest.raises(WireError, match="deeper"):
        decoded(b"t\x01\0\0\0\0\0\0\0" * 1000)


def size(number: int) -> bytes:
    return number.to_bytes(8, "little", signed=True)


class Liar(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    "value", [Liar(1), [Liar(1)], {"a": Liar(2)}, object(), len, type("A", (), {}), (x for x in ())]
)
def test_nothing_of_another_class_crosses(value: Any) -> None:
    with pytest.raises(WireError):
        encoded(value)


@pytest.mark.parametrize(
    "value", [Counter("aab"), Decimal("NaN"), Fraction(-1, 3), date(1, 1, 1), datetime.max, timedelta.min]
)
def test_some_more_types(value: Any) -> None:
    found = decoded(encoded(value))
    assert type(found) is type(value)
    assert found == value or found.is_nan()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"?", b"i123", b"l" + b"\xff" * 8, b"s" + size(5) + b"abc", b"s" + size(2) + b"\xff\xfe", b"B" + size(0),
        b"e" + size(1) + b"l" + size(0), b"M" + size(1) + b"x", b":" + size(4) + b"open", b"rNNN",
        b"d" + size(1) + b"N",
        b"A" + size(1) + b"1", b"Q" + size(3) + b"1/0", b"n" + size(-1),
    ],
)  # fmt: skip
def test_wrong_bytes_are_errors(data: bytes) -> None:
    with pytest.raises(WireError):
        decoded(data)


def test_a_program_and_its_tests_in_one_process() -> None:
    warmup.run(2)


def run_filter(program: bytes, number: int, arguments: tuple[int, ...] = (), architecture: int = 0xC000003E) -> int:
    """What a BPF program returns, by a plain interpreter of the few instructions that it uses."""
    import struct

    code = [struct.unpack("=HBBI", program[at : at + 8]) for at in range(0, len(program), 8)]
    data = struct.pack("=iIQ6Q", number, architecture, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    at = accumulator = 0
    while True:
        operation, yes, no, value = code[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif operation == 0x06:
            return int(value)
        elif operation == 0x05:
            at += value
        else:
            test = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: accumulator & value != 0}[operation]
            at += yes if test else no


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_denies_what_it_says_and_nothing_else(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp.kernel, "MACHINE", machine)
    column, architecture = seccomp._ARCHITECTURES[machine]
    program = seccomp.build()
    allow, deny, unknown, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    denied = {row[column] for row in seccomp.DENIED.values() if row[column] is not None}
    special = {row[column] for row in (seccomp._SOCKETPAIR, seccomp._IOCTL, seccomp._PRLIMIT, seccomp._CLONE)} | {435}
    for number in range(1000):
        if number not in special:
            expected = deny if number in denied else allow if number <= 450 else unknown
            assert run_filter(program, number, (), architecture) == expected, number
    assert run_filter(program, 435, (), architecture) == unknown  # clone3
    assert run_filter(program, 0x40000000 + 41, (), architecture) == unknown
    assert run_filter(program, 1, (), 0x40000003) == kill  # another architecture's numbers
    clone, pair = seccomp._CLONE[column], seccomp._SOCKETPAIR[column]
    assert run_filter(program, clone, (0x01200011,), architecture) == allow
    assert run_filter(program, clone, (0x003D0F00,), architecture) == allow
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000, 0x80):
        assert run_filter(program, clone, (flag | 17,), architecture) == deny
    assert run_filter(program, pair, (1,), architecture) == allow
    assert run_filter(program, pair, (2,), architecture) == deny
    assert run_filter(program, seccomp._PRLIMIT[column], (0,), architecture) == allow
    assert run_filter(program, seccomp._PRLIMIT[column], (1,), architecture) == deny
    assert run_filter(program, seccomp._IOCTL[column], (0, 0x5412), architecture) == deny
    assert run_filter(program, seccomp._IOCTL[column], (0, 0x5401), architecture) == allow
    own = seccomp.build(own_process=77)
    kill_number = seccomp._KILL[column]
    assert run_filter(own, kill_number, (77, 9), architecture) == allow
    assert run_filter(own, kill_number, (78, 9), architecture) == deny
    assert run_filter(own, kill_number, (0xFFFFFFFF, 9), architecture) == deny
    alone = seccomp.build_alone()
    assert [number for number in range(451) if run_filter(alone, number, (), architecture) != allow] == sorted(
        call[column] for call in (seccomp._CLONE, seccomp._FORK, seccomp._VFORK) if call[column] is not None
    )
