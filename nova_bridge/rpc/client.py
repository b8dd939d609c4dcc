"""The caller's side of the RPC door: after `install` this process's database calls go to the workers on its host.

The public functions of nova.db.main.api and the object methods of the catalogue are replaced where Nova looks them up,
so the process runs no SQL. A context with an open SQL transaction keeps using that: with the door opened by URL alone
(`nova_bridge.rpc.plugin`) the first call is under way already when this code first runs.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import nova.context
import oslo_messaging
from oslo_db import exception as db_exception

from nova_bridge.rpc import options
from nova_bridge.rpc.driver import TooLarge
from nova_bridge.rpc.failures import RemoteFailure
from nova_bridge.rpc.methods import API, Catalogue, Kind, ObjectMethod, catalogue
from nova_bridge.rpc.serializer import TAG, Decoder, Encoder
from nova_bridge.rpc.server import EXCHANGE, NAMESPACE, OBJECT_METHOD, TOPIC, VERSION


class Channel(Protocol):
    """Carries one call to the workers. Raises DBConnectionError if no answer came: whether it ran is not known then."""

    def request(self, method: str, content: dict[str, Any]) -> dict[str, Any]: ...


class OsloChannel:
    """A channel over oslo.messaging. The transport is made at the first call of each process: sockets and threads do
    not survive a fork, and Nova forks its workers after its first database calls.

    `conf` must be the global one, parsed: tracing and metrics options of oslo.messaging exist only there.
    """

    def __init__(
        self, conf: Any, url: str | None = None, server: str | None = None, timeout_s: int | None = None
    ) -> None:
        self._conf = conf
        self._url = url
        self._server = server
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._transport: Any = None
        self._client: Any = None
        self._inherited: list[Any] = []
        here = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: forget_connection(here()))

    def request(self, method: str, content: dict[str, Any]) -> dict[str, Any]:
        client = self._client or self._connect()
        try:
            answer: dict[str, Any] = client.call({}, method, **content)
        except oslo_messaging.RemoteError as error:
            raise RemoteFailure(str(error.exc_type), f"{method} through the RPC door: {error.value}") from error
        except TooLarge as error:
            raise RemoteFailure(type(error).__name__, f"{method} through the RPC door: {error}") from error
        except (oslo_messaging.MessagingTimeout, oslo_messaging.MessageDeliveryFailure, OSError) as error:
            raise db_exception.DBConnectionError(unreachable(method, error)) from error
        except oslo_messaging.MessagingException as error:
            raise RemoteFailure(type(error).__name__, f"{method} through the RPC door: {error}") from error
        return answer

    def close(self) -> None:
        with self._lock:
            if self._transport is not None:
                self._transport.cleanup()
            self._transport = self._client = None

    def forget_connection(self) -> None:
        """In a child process: connect anew at the next call. The parent's transport is kept and not touched, for its
        end would say goodbye on the parent's sockets; its lock may be held by a thread that is not here."""
        self._inherited.append((self._transport, self._client))
        self._lock = threading.Lock()
        self._transport = self._client = None

    def _connect(self) -> Any:
        with self._lock:
            if self._client is None:
                options.register_opts(self._conf)
                url = self._url or options.transport_url(self._conf)
                self._transport = oslo_messaging.get_rpc_transport(self._conf, url=url)
                target = oslo_messaging.Target(
                    exchange=EXCHANGE,
                    topic=TOPIC,
                    server=self._server or options.server_name(self._conf),
                    namespace=NAMESPACE,
                    version=VERSION,
                )
                timeout_s = self._timeout_s or self._conf.lucd.rpc_timeout
                self._client = oslo_messaging.get_rpc_client(self._transport, target, timeout=timeout_s)
            return self._client


def forget_connection(channel: OsloChannel | None) -> None:
    if channel is not None:
        channel.forget_connection()


def unreachable(method: str, error: Exception) -> str:
    return (
        f"{method} through lucd's RPC door got no answer ({type(error).__name__}: {error}); it may have run or not. "
        "Check that the lucd daemon and its workers run on this host"
    )


class NovaDbClient:
    """Calls a function through a channel as if it were called here: same result, same exception."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._targets: dict[str, Any] = {}

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of nova.db.main.api."""
        encoder = Encoder()
        content = {"call": encoder.encode({"args": list(args), "kwargs": kwargs})}
        return self._result(self._channel.request(name, content), encoder)

    def call_object_method(self, module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method of the catalogue; what it changes in Nova objects among the arguments is changed here too."""
        encoder = Encoder()
        call = encoder.encode({"args": list(args), "kwargs": kwargs})
        answer = self._channel.request(OBJECT_METHOD, {"module": module, "name": name, "call": call})
        return self._result(answer, encoder)

    def _result(self, answer: dict[str, Any], encoder: Encoder) -> Any:
        decoder = Decoder(self._target, known=encoder.shared)
        if "error" in answer:
            error = decoder.decode(answer["error"])
            if "trace" in answer:
                error.add_note(f"In the lucd worker:\n{answer['trace']}")
            raise error
        result = decoder.decode(answer["result"])
        for number, flat in answer.get("objects", ()):
            assume(encoder.shared[number], decoder.rebuild_object({TAG: "object", **flat}))
        for number, args, kwargs in decoder.decode(answer.get("callbacks", [])):
            encoder.callbacks[number](*args, **kwargs)
        return result

    def _target(self, url: str) -> Any:
        if url not in self._targets:
            self._targets[url] = importlib.import_module(API).create_context_manager(url)
        return self._targets[url]


def assume(ours: Any, theirs: Any) -> None:
    """Give our Nova object the state of the worker's copy; its context stays."""
    context = ours._context
    for name in [name for name in vars(ours) if name.startswith("_obj_")]:
        del ours.__dict__[name]
    ours.__dict__.update(vars(theirs))
    ours._context = context


def in_sql_transaction(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    context = kwargs.get("context")
    if context is None:
        context = next((a for a in args[:2] if isinstance(a, nova.context.RequestContext)), None)
    by_thread = getattr(context, "_enginefacade_context", None)
    return getattr(by_thread, "current", None) is not None


class Installation:
    """The replaced attributes, so that they can be put back."""

    def __init__(self, client: NovaDbClient, found: Catalogue) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []
        self._client = client
        self._api = importlib.import_module(API)
        for name, function in found.functions.items():
            self._replace(self._api, name, self._shipped_function(name, function))
        for method in found.object_methods.values():
            self._replace(method.owner, method.name, self._shipped_method(method))
        self._replace(self._api, "create_context_manager", remembering_connection(self._api.create_context_manager))

    def remove(self) -> None:
        for owner, name, original in reversed(self._replaced):
            setattr(owner, name, original)
        self._replaced.clear()

    def _replace(self, owner: Any, name: str, replacement: Any) -> None:
        self._replaced.append((owner, name, vars(owner)[name]))
        setattr(owner, name, replacement)

    def _shipped_function(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        client, api = self._client, self._api

        @functools.wraps(original)
        def shipped(*args: Any, **kwargs: Any) -> Any:
            if in_sql_transaction(args, kwargs):
                return original(*args, **kwargs)
            if api.DISABLE_DB_ACCESS:
                api._check_db_access()
            return client.call(name, args, kwargs)

        return shipped

    def _shipped_method(self, method: ObjectMethod) -> Any:
        client, original = self._client, method.function
        skipped = 1 if method.kind is Kind.CLASS else 0  # the worker has the class

        @functools.wraps(original)
        def shipped(*args: Any, **kwargs: Any) -> Any:
            if in_sql_transaction(args[skipped:], kwargs):
                return original(*args, **kwargs)
            return client.call_object_method(method.module, method.qualified_name, args[skipped:], kwargs)

        match method.kind:
            case Kind.STATIC:
                return staticmethod(shipped)
            case Kind.CLASS:
                return classmethod(shipped)
            case _:
                return shipped


def remembering_connection(create: Callable[..., Any]) -> Callable[..., Any]:
    """create_context_manager, whose product tells its URL: the worker needs it to target the same cell."""

    @functools.wraps(create)
    def create_context_manager(connection: str | None = None) -> Any:
        manager = create(connection)
        if connection is not None:
            manager.lucd_connection = connection
        return manager

    return create_context_manager


_installed: Installation | None = None
_install_lock = threading.RLock()


def install(channel: Channel | None = None) -> Installation:
    """Send this process's database calls through the RPC door from now on; a second time changes nothing.

    The default channel follows [lucd] of Nova's configuration, read at the first call.
    """
    global _installed
    with _install_lock:
        if _installed is None:
            import nova.conf

            options.register_opts(nova.conf.CONF)
            _installed = Installation(NovaDbClient(channel or OsloChannel(nova.conf.CONF)), catalogue())
        return _installed


def uninstall() -> None:
    global _installed
    with _install_lock:
        if _installed is not None:
            _installed.remove()
            _installed = None
