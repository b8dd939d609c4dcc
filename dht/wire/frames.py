"""Frames: several requests and replies on one byte stream or in one WebSocket message.

    4 bytes   length of what follows, big endian
    msgpack   [request id, timeout in ms, message]

A request carries the time its sender will wait (at least 1 ms); a reply carries the request's id and the timeout 0.
Node to node links and the local socket use the same frames. Anything else raises RemoteProtocolError; whoever reads
closes that link, counts it, and does nothing more.
"""

from __future__ import annotations

import contextvars
import time
from typing import Annotated, Any

import msgspec

from dht import codec
from dht.codec import Failure, Message
from dht.errors import DhtError, Invalid, RemoteProtocolError, rebuild
from dht.limits import FRAME_BYTES_MAX, REQUEST_TIMEOUT_S
from dht.model import Struct

TIMEOUT_MS_MAX = 24 * 3600 * 1000
LENGTH_BYTES = 4
REPLY = 0

Frame = tuple[int, int, msgspec.Raw]
"""(request id, timeout in ms or REPLY, undecoded message)."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(
    tuple[
        Annotated[int, msgspec.Meta(ge=0)],
        Annotated[int, msgspec.Meta(ge=0, le=TIMEOUT_MS_MAX)],
        msgspec.Raw,
    ]
)
_deadline_s: contextvars.ContextVar[float | None] = contextvars.ContextVar("lucd_request_deadline_s", default=None)


def encode_frame(request_id: int, timeout_ms: int, message: Struct) -> bytes:
    """The frame's bytes. Raises Invalid when the message is larger than a frame may be or holds what msgpack cannot."""
    try:
        body = _encoder.encode((request_id, timeout_ms, message))
    except (TypeError, OverflowError, ValueError) as error:
        raise Invalid(f"{type(message).__name__} cannot be sent: {error}") from None
    if len(body) > FRAME_BYTES_MAX:
        raise Invalid(
            f"{type(message).__name__} of {len(body)} bytes is larger than a frame may be ({FRAME_BYTES_MAX} bytes): "
            "ask for less at a time"
        )
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def encode_reply(request_id: int, reply: Struct) -> bytes:
    """The reply's bytes; a reply that cannot be sent becomes the Failure that says so."""
    try:
        return encode_frame(request_id, REPLY, reply)
    except Invalid as error:
        return encode_frame(request_id, REPLY, failure_of(error))


def failure_of(error: DhtError) -> Failure:
    """The error as a message; a detail that msgpack does not know travels as its text."""
    return Failure(error.code, error.message, {name: _plain(value) for name, value in error.detail.items()})


def _plain(value: object) -> Any:
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return str(value)


def timeout_ms(timeout_s: float) -> int:
    """A wait as it travels: whole milliseconds, at least 1, at most a day."""
    return max(1, min(TIMEOUT_MS_MAX, int(timeout_s * 1000)))


def split(data: bytes | memoryview) -> list[Frame]:
    """All frames of a WebSocket message. Raises RemoteProtocolError unless they fill it exactly."""
    frames: list[Frame] = []
    at, _ = _cut(memoryview(data), frames)
    if at < len(data):
        raise RemoteProtocolError(f"a message ends {len(data) - at} bytes into a frame")
    return frames


def _cut(view: memoryview, frames: list[Frame]) -> tuple[int, int]:
    """Append the whole frames; (where what is left begins, the bytes that it needs to be a frame)."""
    at, size = 0, len(view)
    while size - at >= LENGTH_BYTES:
        length = int.from_bytes(view[at : at + LENGTH_BYTES], "big")
        if length > FRAME_BYTES_MAX:
            raise RemoteProtocolError(f"a frame says that it has {length} bytes; {FRAME_BYTES_MAX} is the limit")
        end = at + LENGTH_BYTES + length
        if end > size:
            return at, end - at
        try:
            frames.append(_decoder.decode(view[at + LENGTH_BYTES : end]))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RemoteProtocolError(f"{length} bytes are not a frame: {error}") from None
        at = end
    return at, LENGTH_BYTES


class FrameReader:
    """Cuts a byte stream into frames; holds at most one incomplete frame."""

    __slots__ = ("_buffer", "_need_bytes")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._need_bytes = LENGTH_BYTES

    @property
    def pending_bytes(self) -> int:
        """How much of an incomplete frame is waiting for its rest."""
        return len(self._buffer)

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """The frames that the data completes. After RemoteProtocolError the stream is of no use any more."""
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._need_bytes:
                return []
            data = bytes(self._buffer)
            self._buffer.clear()
        view = memoryview(data)
        frames: list[Frame] = []
        at, self._need_bytes = _cut(view, frames)
        if at < len(view):
            self._buffer += view[at:]
        return frames


def read_reply(raw: msgspec.Raw) -> Message:
    """The message of a reply. Raises the error that it carries, as its own class."""
    reply = codec.decode(memoryview(raw))
    if isinstance(reply, Failure):
        raise error_of(reply)
    return reply


def error_of(failure: Failure) -> DhtError:
    """The error that a Failure carries, as its own class."""
    detail = {name: value for name, value in failure.detail.items() if name not in ("self", "message")}
    return rebuild(failure.code, failure.message, detail)


def set_time_left(timeout_s: float) -> None:
    """Note, for the running task, how long the asker of the request that it serves will wait."""
    _deadline_s.set(time.monotonic() + timeout_s)


def time_left_s() -> float:
    """How long the asker of the request that this task serves still waits; REQUEST_TIMEOUT_S outside of one."""
    deadline = _deadline_s.get()
    return REQUEST_TIMEOUT_S if deadline is None else max(0.0, deadline - time.monotonic())
