"""Messages over a pair of pipes, each a length and that many bytes."""

from __future__ import annotations

import os
import struct

#: No message is longer, in bytes.
LONGEST = 16 << 20
_HEAD = struct.Struct("<Q")
_PIECE = 1 << 12


class ChannelError(Exception):
    """The other end wrote no message, or a message is too long."""


class ClosedError(ChannelError):
    """The other end is gone."""


class Channel:
    """One end: reads messages from the descriptor `source` and writes them to `target`."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target
        self.rest = b""

    def send(self, body: bytes) -> None:
        """Write a message."""
        if len(body) > LONGEST:
            raise ChannelError(f"a message of {len(body)} bytes; at most {LONGEST} cross")
        data = _HEAD.pack(len(body)) + body
        try:
            written = os.write(self.target, data)
            while written < len(data):
                written += os.write(self.target, memoryview(data)[written:])
        except OSError as error:
            raise ClosedError(f"the other end is closed ({error.strerror})") from None

    def receive(self) -> bytes:
        """Wait for a message and return it."""
        while len(self.rest) < _HEAD.size:
            self.rest += self._piece(_PIECE)
        size = _HEAD.unpack_from(self.rest)[0]
        if size > LONGEST:
            raise ChannelError(f"a message of {size} bytes; at most {LONGEST} cross")
        pieces, missing = [self.rest[_HEAD.size :]], size + _HEAD.size - len(self.rest)
        while missing > 0:
            pieces.append(self._piece(max(_PIECE, missing)))
            missing -= len(pieces[-1])
        body = b"".join(pieces)
        self.rest = body[size:]
        return body[:size] if self.rest else body

    def _piece(self, size: int) -> bytes:
        try:
            piece = os.read(self.source, size)
        except OSError as error:
            raise ClosedError(f"cannot be read ({error.strerror})") from None
        if not piece:
            raise ClosedError("the other end is closed")
        return piece
