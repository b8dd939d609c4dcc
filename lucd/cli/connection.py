"""How commands find and ask the daemon of this host."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from dht.codec import Message
from dht.errors import Invalid, RemoteProtocolError
from dht.wire.blocking import BlockingClient, SocketStore
from lucd.conf.settings import Settings, load

SECONDS_MAX = 86_400.0
F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=Message)
CONFIG_FILE = Path("/etc/lucd/lucd.conf")


class Seconds(click.FloatRange):
    """How long to wait, of an option: from 1 second to a day."""

    name = "number of seconds"

    def __init__(self) -> None:
        super().__init__(1.0, SECONDS_MAX)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value} is not a number of seconds.", param, ctx)
        return seconds


def config_option(command: F) -> F:
    """The option --config that most commands have."""
    decorate: Callable[[F], F] = click.option(
        "--config",
        "config",
        type=click.Path(path_type=Path),
        envvar="LUCD_CONFIG",
        help=f"The node's configuration file (default: {CONFIG_FILE} if it exists; environment: LUCD_CONFIG).",
    )
    return decorate(command)


def socket_option(command: F) -> F:
    """--socket and --config: which daemon to ask."""
    decorate: Callable[[F], F] = click.option(
        "--socket",
        "socket",
        type=click.Path(path_type=Path),
        envvar="LUCD_SOCKET",
        help="The daemon's Unix socket (default: the configured one; environment: LUCD_SOCKET).",
    )
    return config_option(decorate(command))


def settings(config: Path | None) -> Settings:
    """The settings of the named file, else of the usual one, else the defaults."""
    try:
        if config is None and CONFIG_FILE.exists():
            config = CONFIG_FILE
        return load(config)
    except PermissionError as error:
        raise Invalid(f"{error.filename} cannot be read by this user; change its owner or mode") from None


@contextlib.contextmanager
def client(config: Path | None, socket: Path | None, timeout_s: float = 10.0) -> Iterator[BlockingClient]:
    """A client of the daemon that the options name, closed at the end."""
    path = socket if socket is not None else settings(config).socket
    with contextlib.closing(BlockingClient(os.fspath(path), timeout_s)) as opened:
        yield opened


def ask(config: Path | None, socket: Path | None, question: Message, kind: type[M]) -> M:
    """The daemon's reply to a question that may be repeated."""
    with client(config, socket) as daemon:
        reply = daemon.call(question, repeatable=True)
    if not isinstance(reply, kind):
        raise RemoteProtocolError(f"the daemon replied {type(reply).__name__} where {kind.__name__} was due")
    return reply


@contextlib.contextmanager
def store(config: Path | None, socket: Path | None, timeout_s: float = 10.0) -> Iterator[SocketStore]:
    """The store behind the daemon."""
    with client(config, socket, timeout_s) as daemon:
        yield SocketStore(daemon)
