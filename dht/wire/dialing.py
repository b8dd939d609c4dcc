"""How a link is dialled: TCP within its own limit, then TLS, then HTTP."""

from __future__ import annotations

import inspect
import ssl
from contextvars import ContextVar
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from dht.errors import RemoteProtocolError, Unavailable
from dht.wire.entrance import LINK_PATH, OTHER_TLS_STATUS
from dht.wire.link import CLOSE_WAIT_S, MESSAGE_BYTES_MAX, DialedSocket

CONNECT_TIMEOUT_S = 0.5
"""Of a dial, for the other host's kernel to answer: it would repeat a lost packet after a second only, and while a
network is cut that is the longest part of what it costs once it has healed."""
_IN_CLEAR = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST"})
"""What OpenSSL says of an answer that is no TLS."""
_ENDED = "it ended the connection within TLS's handshake"
_dialed: ContextVar[URL] = ContextVar("dialed")


def check_aiohttp() -> None:
    """Raises Unavailable where aiohttp would not ask `LinkConnector` for its connections: links would have no TLS."""
    if not inspect.iscoroutinefunction(vars(aiohttp.TCPConnector).get("_create_connection")):
        raise Unavailable(
            f"aiohttp {aiohttp.__version__} opens connections in another way than this version of lucd knows, so links "
            "cannot have TLS with it: install one that lucd was tried with (constraints.txt, pyproject.toml)"
        )


class LinkConnector(aiohttp.TCPConnector):
    """TLS of our own beneath plain HTTP: aiohttp's would count its handshake to the limit of TCP's.

    What it overrides is what aiohttp's connectors override of each other, and nobody else is meant to.
    """

    def __init__(self, context: ssl.SSLContext | None) -> None:
        super().__init__(limit=0, force_close=True)
        self._tls = context

    async def _create_connection(self, req: aiohttp.ClientRequest, traces: Any, timeout: Any) -> ResponseHandler:
        if req.url != _dialed.get():
            # Who is not proven must not make this node ask others for anything.
            raise RemoteProtocolError(f"it answers by sending this node to {req.url}", reason="garbage")
        plain = await super()._create_connection(req, traces, timeout)
        if self._tls is None:
            return plain
        transport = plain.transport
        if transport is None or transport.is_closing():
            # The loop would begin TLS on it all the same, and never tell that it failed.
            raise aiohttp.ClientConnectionError(_ENDED)
        protocol = ResponseHandler(self._loop)
        try:
            # The dial's limit ends it, if it takes too long.
            over_tls = await self._loop.start_tls(transport, protocol, self._tls, ssl_shutdown_timeout=CLOSE_WAIT_S)
        except ssl.SSLError as error:
            if error.reason not in _IN_CLEAR:
                raise RemoteProtocolError(f"TLS with it failed: {error.reason or error}", reason="tls") from None
            text = "it answers in clear text, and this node's links have TLS (link_tls = true)"
            raise RemoteProtocolError(f"{text}: set link_tls alike on all nodes", reason="link_tls") from None
        except ConnectionError:
            raise aiohttp.ClientConnectionError(_ENDED) from None
        except BaseException:
            transport.abort()
            raise
        if over_tls is None:
            raise aiohttp.ClientConnectionError(_ENDED)
        protocol.connection_made(over_tls)
        return protocol


def session(context: ssl.SSLContext | None) -> aiohttp.ClientSession:
    """What dials for one node."""
    return aiohttp.ClientSession(
        connector=LinkConnector(context),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        auto_decompress=False,
        ws_response_class=DialedSocket,
    )


async def web_socket(session: aiohttp.ClientSession, host: str, port: int) -> DialedSocket:
    """Raises RemoteProtocolError where one end has TLS and the other has not, else what aiohttp raises."""
    url = URL.build(scheme="http", host=host, port=port, path=LINK_PATH)
    _dialed.set(url)
    try:
        ws = await session.ws_connect(
            url,
            compress=0,
            max_msg_size=MESSAGE_BYTES_MAX,
            timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_WAIT_S),
        )
    except aiohttp.WSServerHandshakeError as error:
        if error.status != OTHER_TLS_STATUS:
            raise
        text = "its links have TLS (link_tls = true), and this node's have none (link_tls = false)"
        raise RemoteProtocolError(f"{text}: set link_tls alike on all nodes", reason="link_tls") from None
    assert isinstance(ws, DialedSocket)
    return ws


def failure(where: str, error: Exception, timeout_s: float) -> Unavailable:
    """Why the dial of that address failed, as its caller is to know it."""
    if isinstance(error, TimeoutError):
        waited_s = CONNECT_TIMEOUT_S if isinstance(error, aiohttp.ConnectionTimeoutError) else timeout_s
        return Unavailable(f"{where} does not answer ({waited_s:.1f} s)", sent=False)
    return Unavailable(f"{where} cannot be reached: {error}", sent=False)
