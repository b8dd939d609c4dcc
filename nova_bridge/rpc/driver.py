"""The oslo.messaging driver `lucd://`: calls, casts, fanouts and notifications through the daemon of this host.

    transport_url = lucd://                                   the default socket
    transport_url = lucd:///run/lucd/lucd.sock
    transport_url = lucd:///run/lucd/lucd.sock?bus=cell1      the bus of that name, as a virtual host of RabbitMQ's
    transport_url = lucd://?socket=/run/lucd/lucd.sock&bus=cell1

Messages travel as JSON, as over RabbitMQ, so that a serializer that works with one works with the other. A call is one
request on a connection of its own; a listener keeps one connection on which it waits for messages. All of it is plain
blocking sockets (`dht.wire.blocking`): it works in threads and in greenlets, and after fork.

How losses show: nobody could be reached: MessageDeliveryFailure. The reply did not come in time, the server died
after it had taken the call, or the daemon did: MessagingTimeout, since nobody knows whether the call took effect. No
frame can carry it: TooLarge, as it would be again. If a server's answer is that, the caller gets a RemoteError.
"""

from __future__ import annotations

import logging
import os
import re
import time

import msgspec
import oslo_messaging
from oslo_messaging._drivers import base, common
from oslo_serialization import jsonutils

from dht.errors import DhtError, Indeterminate, Invalid
from dht.wire.blocking import BlockingClient, Channel, Lost
from dht.wire.frames import timeout_ms
from nova_bridge.rpc.bus_messages import (
    Acknowledge,
    Address,
    Answered,
    Call,
    Cast,
    Delivery,
    Heartbeat,
    Reply,
    Requeue,
    StopTaking,
    Subscribe,
    Subscribed,
    Take,
    Taken,
)

DEFAULT_SOCKET = "/run/lucd/lucd.sock"
DEFAULT_EXCHANGE = "openstack"
CAST_TIMEOUT_S = 60.0
"""How long a cast tries to reach a daemon that is not there, if the caller sets no bound."""
RETRY_WAIT_S = 1.0
"""What one of oslo.messaging's retries is worth as time to wait for a daemon."""
STOP_TIMEOUT_S = 1.0
SHORT_TIMEOUT_S = 10.0
"""For what the daemon answers at once: acknowledgements, replies, heartbeats."""
TAKE_WAIT_S = 20.0
TAKE_SLACK_S = 5.0
RECONNECT_PAUSE_S = 0.2
BUS_NAME = re.compile(r"[A-Za-z0-9_.-]{0,64}")

LOG = logging.getLogger(__name__)


class TooLarge(oslo_messaging.MessageDeliveryFailure):  # type: ignore[misc]
    """The bus does not carry such a message, however often it is sent."""


def socket_of(url: oslo_messaging.TransportURL) -> str:
    """The daemon's socket that the transport URL names. Raises InvalidTransportURL for anything but a path."""
    unknown = sorted(set(url.query) - {"socket", "bus"})
    if url.hosts or unknown:
        what = f"option {unknown[0]}" if unknown else "a host"
        raise oslo_messaging.InvalidTransportURL(str(url), f"lucd:// takes a socket's path and ?bus=NAME, not {what}")
    path = url.query.get("socket") or (f"/{url.virtual_host}" if url.virtual_host else DEFAULT_SOCKET)
    if not os.path.isabs(path):
        raise oslo_messaging.InvalidTransportURL(str(url), f"the socket's path {path} must begin with /")
    return path


def bus_of(url: oslo_messaging.TransportURL) -> str:
    """The name of the bus, empty for the default one. Raises InvalidTransportURL for what cannot be a name."""
    name: str = url.query.get("bus", "")
    if not BUS_NAME.fullmatch(name):
        why = f"the bus's name {name!r} has to be letters, digits, '_', '-' and '.', at most 64"
        raise oslo_messaging.InvalidTransportURL(str(url), why)
    return name


class LucdIncoming(base.RpcIncomingMessage):
    """A message that a listener took. What can only be done with the daemon's help never raises: it is logged."""

    def __init__(self, listener: LucdListener, delivery: Delivery) -> None:
        content = jsonutils.loads(delivery.body)
        super().__init__(content["ctxt"], content["message"])
        self.client_timeout = delivery.monitor_ms / 1000 or None
        self._listener = listener
        self._number = listener.number
        self._delivery = delivery

    def acknowledge(self) -> None:
        if self._listener.acknowledges:
            self._tell(Acknowledge(self._number, self._delivery.id))

    def requeue(self) -> None:
        if self._listener.acknowledges:
            self._tell(Requeue(self._number, self._delivery.id))
        else:
            # Taking a call or cast ended the daemon's interest in who has it, so it is sent anew.
            self._tell(Cast(self._listener.addresses[-1], self._delivery.body))

    def reply(self, reply: object = None, failure: object = None) -> None:
        if not self._delivery.call:
            return
        content = {"failure": common.serialize_remote_exception(failure)} if failure else {"result": reply}
        try:
            self._listener.client.call(Reply(self._delivery.call, jsonutils.dump_as_bytes(content)), SHORT_TIMEOUT_S)
        except Invalid as error:
            # Too large to be sent: the caller shall hear why instead of waiting for nothing.
            why = Invalid(
                f"the call has run, and its answer cannot be sent: {error.message}, as a list with a limit and a "
                "marker (servers: [api] max_limit in nova.conf)"
            )
            content = {"failure": common.serialize_remote_exception((Invalid, why, None))}
            self._tell(Reply(self._delivery.call, jsonutils.dump_as_bytes(content)))
        except DhtError as error:
            LOG.warning("the reply to message %s was not sent: %s", self.msg_id, error)

    def heartbeat(self) -> None:
        if self._delivery.call:
            self._tell(Heartbeat(self._delivery.call))

    def _tell(self, message: object) -> None:
        try:
            self._listener.client.call(message, SHORT_TIMEOUT_S)
        except DhtError as error:
            LOG.warning("%s for message %s failed: %s", type(message).__name__, self.msg_id, error)


class LucdListener(base.PollStyleListener):
    """Takes messages from the daemon; subscribes again when its connection was lost."""

    def __init__(
        self, client: BlockingClient, addresses: tuple[Address, ...], fanout: bool, acknowledges: bool
    ) -> None:
        super().__init__()
        self.client = client
        self.addresses = addresses
        self.fanout = fanout
        self.acknowledges = acknowledges
        self.number = 0
        self._channel: Channel | None = None
        self._stopped = False
        self._lost_said = False
        # The queues exist before the first poll: what is sent from now on is kept.
        self._connected(time.monotonic() + SHORT_TIMEOUT_S, wait_s=SHORT_TIMEOUT_S)

    def poll(
        self, timeout: float | None = None, batch_size: int = 1, batch_timeout: float | None = None
    ) -> list[LucdIncoming]:
        """Up to `batch_size` messages: the first within `timeout`, the others within `batch_timeout` after it."""
        deadline = None if timeout is None else time.monotonic() + timeout
        taken: list[LucdIncoming] = []
        while not self._stopped and len(taken) < batch_size:
            left_s = TAKE_WAIT_S if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                break
            came = self._take(batch_size - len(taken), min(left_s, TAKE_WAIT_S))
            if came and not taken:
                deadline = None if batch_timeout is None else time.monotonic() + batch_timeout
            taken += came
        return taken

    def stop(self) -> None:
        """End the poll that waits in another thread, and every later one."""
        self._stopped = True
        if self.number:
            try:
                self.client.call(StopTaking(self.number), STOP_TIMEOUT_S)
            except DhtError as error:
                LOG.debug("the daemon was not told to stop listener %s: %s", self.number, error)

    def cleanup(self) -> None:
        """Close the connection; messages that were taken and not acknowledged go to other listeners."""
        self._stopped = True
        self._disconnect()

    def _take(self, count: int, wait_s: float) -> list[LucdIncoming]:
        deadline = time.monotonic() + wait_s + TAKE_SLACK_S
        try:
            channel = self._connected(deadline)
            if self._stopped:
                # stop() may have told the daemon of the listener that this one replaces.
                return []
            taken = channel.call(Take(self.number, count, timeout_ms(wait_s)), deadline)
        except (Lost, OSError, DhtError) as error:
            self._disconnect()
            if not self._lost_said and not self._stopped:
                LOG.warning("lost the daemon on %s (%s); connecting again", self.client.path, error)
                self._lost_said = True
            if not self._stopped:
                time.sleep(RECONNECT_PAUSE_S)
            return []
        self._lost_said = False
        deliveries = taken.deliveries if isinstance(taken, Taken) else ()
        return [message for message in map(self._incoming, deliveries) if message is not None]

    def _incoming(self, delivery: Delivery) -> LucdIncoming | None:
        try:
            return LucdIncoming(self, delivery)
        except (ValueError, TypeError, KeyError) as error:
            LOG.warning(
                "a message of %d bytes that is not oslo.messaging's was left out: %s", len(delivery.body), error
            )
            return None

    def _connected(self, deadline: float, wait_s: float = 0.0) -> Channel:
        channel = self._channel
        if channel is not None and channel.pid == os.getpid():
            return channel
        channel = self.client.connect(deadline, wait_s)
        try:
            reply = channel.call(Subscribe(self.addresses, self.fanout, self.acknowledges), deadline)
        except BaseException:
            channel.close()
            raise
        if isinstance(reply, Subscribed):
            self.number = reply.listener
        self._channel = channel
        return channel

    def _disconnect(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


class LucdDriver(base.BaseDriver):
    """What `oslo_messaging.get_rpc_transport` and `get_notification_transport` load for lucd:// URLs."""

    def __init__(self, conf, url, default_exchange=None, allowed_remote_exmods=None):  # type: ignore[no-untyped-def]
        super().__init__(conf, url, default_exchange, allowed_remote_exmods)
        self._client = BlockingClient(socket_of(url))
        self._bus = bus_of(url)

    def require_features(self, requeue: bool = False) -> None:
        """All that oslo.messaging may ask for is there."""

    def send(  # type: ignore[no-untyped-def]
        self,
        target,
        ctxt,
        message,
        wait_for_reply=None,
        timeout=None,
        call_monitor_timeout=None,
        retry=None,
        transport_options=None,
    ):
        body = jsonutils.dump_as_bytes({"ctxt": ctxt, "message": message})
        address = self._address(target)
        if not wait_for_reply:
            self._hand_over(Cast(address, body, bool(target.fanout)), timeout, retry)
            return None
        monitor_ms = timeout_ms(call_monitor_timeout) if call_monitor_timeout else 0
        reply = self._hand_over(Call(address, body, monitor_ms), timeout, retry)
        content = jsonutils.loads(reply.body)
        if content.get("failure"):
            raise common.deserialize_remote_exception(content["failure"], self._allowed_remote_exmods)
        return content.get("result")

    def send_notification(self, target, ctxt, message, version, retry=None):  # type: ignore[no-untyped-def]
        body = jsonutils.dump_as_bytes({"ctxt": ctxt, "message": message})
        self._hand_over(Cast(self._address(target), body, notification=True), None, retry)

    def listen(self, target, batch_size, batch_timeout):  # type: ignore[no-untyped-def]
        topic = self._topic(target)
        # The address that all servers of the topic share comes last: what is sent anew goes there.
        addresses = (msgspec.structs.replace(topic, server=target.server), topic)
        return self._listener(addresses, True, False, batch_size, batch_timeout)

    def listen_for_notifications(self, targets_and_priorities, pool, batch_size, batch_timeout):  # type: ignore[no-untyped-def]
        addresses = tuple(
            msgspec.structs.replace(self._topic(target), topic=f"{target.topic}.{priority}", pool=pool or "")
            for target, priority in targets_and_priorities
        )
        return self._listener(addresses, False, True, batch_size, batch_timeout)

    def cleanup(self) -> None:
        self._client.close()

    def _listener(self, addresses, fanout, acknowledges, batch_size, batch_timeout):  # type: ignore[no-untyped-def]
        try:
            listener = LucdListener(self._client, addresses, fanout, acknowledges)
        except (DhtError, Lost, OSError) as error:
            raise base.TransportDriverError(
                f"cannot listen through the daemon on {self._client.path}: {error}"
            ) from None
        return base.PollStyleListenerAdapter(listener, batch_size, batch_timeout)

    def _topic(self, target: oslo_messaging.Target) -> Address:
        exchange = target.exchange or self._default_exchange or DEFAULT_EXCHANGE
        return Address(exchange, target.topic, bus=self._bus)

    def _address(self, target: oslo_messaging.Target) -> Address:
        server = "" if target.fanout else target.server or ""
        return msgspec.structs.replace(self._topic(target), server=server)

    def _hand_over(self, request: Cast | Call, timeout: float | None, retry: int | None) -> Answered:
        """The daemon's answer. Only a request that certainly did not reach the daemon is sent again."""
        timeout_s = CAST_TIMEOUT_S if timeout is None else timeout
        connect_wait_s = timeout_s if retry is None or retry < 0 else retry * RETRY_WAIT_S
        try:
            return self._client.call(request, timeout_s, connect_wait_s=connect_wait_s)
        except DhtError as error:
            text = f"topic {request.address.topic}: {error}"
            if isinstance(request, Call) and isinstance(error, Indeterminate):
                raise oslo_messaging.MessagingTimeout(text) from None
            if isinstance(error, Invalid):
                raise TooLarge(text) from None
            raise oslo_messaging.MessageDeliveryFailure(text) from None
