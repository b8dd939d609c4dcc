"""oslo.messaging clients and servers on `lucd://`, for tests with real daemons."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from oslo_config import cfg

with warnings.catch_warnings():
    # It imports eventlet, which says that it is deprecated.
    warnings.simplefilter("ignore")
    import oslo_messaging
    from futurist._thread import ThreadWorker

__all__ = ["Clients", "Served", "ThreadWorker", "oslo_messaging", "transport_of"]


def transport_of(socket: Path, bus: str = "") -> Any:
    return oslo_messaging.get_rpc_transport(cfg.CONF, f"lucd://{socket}?bus={bus}")


class Clients:
    """What asks topics, through the daemon behind a socket."""

    def __init__(self) -> None:
        self._transports: list[Any] = []

    def of(self, socket: Path, topic: str = "t", bus: str = "", timeout_s: float = 10.0) -> Any:
        self._transports.append(transport_of(socket, bus))
        return oslo_messaging.get_rpc_client(
            self._transports[-1], oslo_messaging.Target(topic=topic), timeout=timeout_s
        )

    def close(self) -> None:
        for transport in self._transports:
            transport.cleanup()


class Served:
    """`with Served(socket, "host1") as served`: a server that notes in `got` what it was asked, and tells its name."""

    def __init__(self, socket: Path, server: str, topic: str = "t", bus: str = "") -> None:
        self.name = server
        self.got: list[Any] = []
        self.go_on = threading.Event()
        target = oslo_messaging.Target(topic=topic, server=server)
        self._transport = transport_of(socket, bus)
        self._server = oslo_messaging.get_rpc_server(self._transport, target, [self], executor="threading")

    def ask(self, ctxt: Any, n: int = 0) -> str:
        self.got.append(n)
        return self.name

    def hang(self, ctxt: Any) -> str:
        self.got.append("hang")
        self.go_on.wait(200)
        return self.name

    def __enter__(self) -> Served:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.go_on.set()
        self._server.stop()
        self._server.wait()
        self._transport.cleanup()
