"""Messages as bytes: msgpack arrays that begin with the message's number.

A message class derives from `Message` with `tag=<number>`; numbers come in blocks (1-49 register, 50-99 domain,
100-149 local door, 150-199 bus, 200-249 daemon) and never reused. Decoding validates every field by its annotation;
what does not fit raises RemoteProtocolError and nothing of it is used.
"""

from __future__ import annotations

from typing import Any, TypeVar, Union

import msgspec

from dht.errors import RemoteProtocolError
from dht.model import Struct


class Message(Struct, frozen=True):
    """Base of requests and replies."""


class Failure(Message, frozen=True, tag=0):
    """The reply of a request that raised a DhtError; `dht.errors.rebuild` makes the error again."""

    code: str
    message: str
    detail: dict[str, Any] = {}


M = TypeVar("M", bound=type[Message])
_types: dict[int, type[Message]] = {0: Failure}
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] | None = None


def message(cls: M) -> M:
    """Class decorator: makes the message known to `decode`. Two messages with one number raise at import."""
    global _decoder
    tag = cls.__struct_config__.tag
    if not isinstance(tag, int) or tag in _types:
        raise RuntimeError(f"message {cls.__name__}: number {tag!r} is missing or taken")
    _types[tag] = cls
    _decoder = None
    return cls


def encode(value: Struct) -> bytes:
    """Bytes of a message."""
    return _encoder.encode(value)


def decode(data: bytes | memoryview) -> Message:
    """The message in the bytes. Raises RemoteProtocolError when they are not one."""
    global _decoder
    if _decoder is None:
        _decoder = msgspec.msgpack.Decoder(Union[tuple(_types.values())])
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"{len(data)} bytes are not a message of this version: {error}") from None
