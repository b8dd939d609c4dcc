"""The blocking client of the local door, for Nova's processes.

Plain blocking sockets and nothing else: no event loop, no locks, no thread-locals. The pool is a deque, whose append
and pop are atomic; a connection belongs to one call at a time and to the process that opened it. So it works in
threads, in greenlets (`socket.socket` and `time.sleep` are looked up at each use, hence monkey-patching reaches them)
and after fork.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import TypeVar

from dht import requests
from dht.codec import Message
from dht.errors import (
    Conflict,
    DhtError,
    Indeterminate,
    Invalid,
    NotFound,
    ProtocolError,
    RemoteProtocolError,
    Unavailable,
)
from dht.limits import REQUEST_TIMEOUT_S
from dht.model import (
    ZERO,
    Applied,
    Ballot,
    FindQuery,
    FindResult,
    GroupKey,
    GroupRead,
    PopClaim,
    Struct,
    Transaction,
    TransactionId,
)
from dht.wire import frames
from dht.wire.frames import FrameReader

IDLE_CONNECTIONS_MAX = 64
CONNECT_WAIT_S = 8.0
"""How long a call waits for a daemon that is not there (it restarts) before it gives up, its own timeout permitting.

A start with a large file takes seconds on a loaded host, and what is left of ten is enough for a request."""
CONNECT_PAUSE_MIN_S = 0.01
CONNECT_PAUSE_MAX_S = 0.25
DYING_S = 0.5
"""A process that is killed loses its connections one by one: what is lost so soon after the first loss is the same
death, not a second one."""
RECEIVE_BYTES = 64 * 1024
OUTCOME_PAUSE_S = 0.05
_REFUSALS = (Conflict, Unavailable, NotFound, Invalid)
"""Of a commit: certainly not applied. Of any other error that is to be found out."""

R = TypeVar("R", bound=Message)


class Lost(Exception):
    """The connection ended; `sent` tells whether the whole request had left."""

    def __init__(self, why: object, sent: bool) -> None:
        super().__init__(str(why))
        self.sent = sent


class Channel:
    """One connection, used by one call at a time."""

    __slots__ = ("_buffer", "_request_id", "_socket", "_timeout_s", "pid")

    def __init__(self, path: str, timeout_s: float) -> None:
        self.pid = os.getpid()
        self._request_id = 0
        # Receiving into one's own buffer spares an allocation of its size for each reply.
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._timeout_s = timeout_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def call(self, message: Struct, deadline: float) -> Message:
        """Raises TimeoutError at the deadline and Lost when the daemon is gone; the channel is useless after both."""
        self._request_id += 1
        left_s = deadline - time.monotonic()
        data = frames.encode_frame(self._request_id, frames.timeout_ms(left_s), message)
        try:
            self._wait_at_most(left_s)
            self._socket.sendall(data)
        except OSError as error:
            # An incomplete frame is never served, and a whole one never raises.
            raise Lost(error, sent=False) from None
        reader = FrameReader()
        while True:
            try:
                size = self._socket.recv_into(self._buffer)
            except TimeoutError:
                raise
            except OSError as error:
                raise Lost(error, sent=True) from None
            if not size:
                raise Lost("closed by the daemon", sent=True)
            replies = reader.feed(bytes(self._buffer[:size]))
            if replies:
                break
            self._wait_at_most(deadline - time.monotonic())
        request_id, timeout_ms, raw = replies[0]
        if len(replies) != 1 or reader.pending_bytes or request_id != self._request_id or timeout_ms != frames.REPLY:
            raise RemoteProtocolError("the daemon's reply does not belong to the request: is something else listening?")
        return frames.read_reply(raw)

    def _wait_at_most(self, left_s: float) -> None:
        if left_s <= 0:
            raise TimeoutError("no time left")
        # Setting a socket's timeout is a system call: spared while the one that is set is at most a tenth off.
        if not left_s <= self._timeout_s <= left_s * 1.1:
            self._socket.settimeout(left_s)
            self._timeout_s = left_s


class BlockingClient:
    """Requests to the daemon of this host; any number of threads, greenlets and forked children may share one."""

    def __init__(self, path: str | os.PathLike[str], timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        self.path = os.fspath(path)
        self.timeout_s = timeout_s
        self._idle: deque[Channel] = deque()

    def call(
        self,
        message: Struct,
        timeout_s: float | None = None,
        *,
        repeatable: bool = False,
        connect_wait_s: float = CONNECT_WAIT_S,
    ) -> Message:
        """The reply, in at most `timeout_s` (None: the client's), of which up to `connect_wait_s` for a connection.

        Raises the daemon's error as its own class; `Unavailable` with detail sent=False when the request did not
        leave; `Indeterminate` when it may have been served. A repeatable request (a read) outlives one death of the
        daemon, if another answers in time, and ends as Unavailable, never as Indeterminate.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        name = type(message).__name__
        lost_s = 0.0
        while True:
            channel = self._take(deadline, connect_wait_s)
            usable = False
            try:
                reply = channel.call(message, deadline)
                usable = True
                return reply
            except Lost as loss:
                if loss.sent and not repeatable:
                    raise Indeterminate(f"{name}: the daemon went away before it replied ({loss})") from None
                now_s = time.monotonic()
                if loss.sent:
                    lost_s = lost_s or now_s
                    if now_s > lost_s + DYING_S:
                        raise Unavailable(f"{name}: the daemon went away twice before it replied ({loss})") from None
                if loss.sent or not self._idle:
                    time.sleep(CONNECT_PAUSE_MIN_S)
            except TimeoutError:
                text = f"{name}: no reply from the daemon in {timeout_s:.3f} s"
                raise (Unavailable(text) if repeatable else Indeterminate(text)) from None
            except DhtError as error:
                usable = not isinstance(error, ProtocolError) and not error.detail.get("closing")
                if repeatable and isinstance(error, Indeterminate):
                    raise Unavailable(error.message, **error.detail) from None
                raise
            finally:
                self._put(channel, usable)

    def close(self) -> None:
        """Close the idle connections; the client stays usable."""
        while self._idle:
            self._idle.pop().close()

    def connect(self, deadline: float, wait_s: float) -> Channel:
        """A connection that is not the pool's, for a caller that keeps it. Tries for `wait_s`, at least once."""
        give_up = min(deadline, time.monotonic() + wait_s)
        pause_s = CONNECT_PAUSE_MIN_S
        why: object = "no time left"
        left_s = deadline - time.monotonic()
        while left_s > 0:
            try:
                return Channel(self.path, left_s)
            except OSError as error:
                why = error
            left_s = give_up - time.monotonic()
            time.sleep(max(0.0, min(pause_s, left_s)))
            pause_s = min(2 * pause_s, CONNECT_PAUSE_MAX_S)
        raise Unavailable(f"no daemon answers on {self.path} ({why}); is lucd running?", sent=False)

    def _take(self, deadline: float, connect_wait_s: float) -> Channel:
        pid = os.getpid()
        while time.monotonic() < deadline:
            try:
                channel = self._idle.pop()
            except IndexError:
                break
            if channel.pid == pid:
                return channel
            # The parent's connection: closing our copy of the descriptor leaves the parent's alone.
            channel.close()
        return self.connect(deadline, connect_wait_s)

    def _put(self, channel: Channel, usable: bool) -> None:
        if usable and len(self._idle) < IDLE_CONNECTIONS_MAX:
            self._idle.append(channel)
        else:
            channel.close()


class SocketStore:
    """`dht.requests.BlockingStore` through the local door."""

    def __init__(self, client: BlockingClient) -> None:
        self.client = client

    def read(
        self,
        keys: Sequence[GroupKey],
        known: Sequence[Ballot | None] | None = None,
        timeout_s: float | None = None,
        near: bool = False,
    ) -> tuple[GroupRead, ...]:
        ballots = (None,) * len(keys) if known is None else tuple(known)
        return self._ask(requests.ReadGroups(tuple(keys), ballots, near), requests.ReadGroupsReply, timeout_s).groups

    def find(self, query: FindQuery, timeout_s: float | None = None) -> FindResult:
        return self._ask(requests.Find(query), requests.FindReply, timeout_s).result

    def commit(self, transaction: Transaction, attempt: int = 0, timeout_s: float | None = None) -> Applied:
        """When the reply is lost the window is asked for the id; what was not applied is sent again under the same id.

        Once: who asked has ended the transaction, so that a group which forgets may say for ever that it cannot tell.
        If the store knows that it was applied but cannot say at which ballots, they are ZERO, which no cache believes.
        """
        if not transaction.parts:
            return Applied(())
        deadline = time.monotonic() + (self.client.timeout_s if timeout_s is None else timeout_s)
        applied = ended = False
        while True:
            try:
                message = requests.Commit(transaction, attempt)
                reply = self.client.call(message, deadline - time.monotonic())
                return _expect(reply, requests.CommitReply).applied
            except DhtError as error:
                if applied:
                    return Applied((ZERO,) * len(transaction.parts))
                if isinstance(error, _REFUSALS):
                    raise
                lost = error
            outcome = self._settled(transaction, deadline)
            if outcome == "unknown":
                raise Indeterminate(lost.message, **{**lost.detail, "id": transaction.id}) from None
            applied = outcome == "applied"
            if not applied and not isinstance(lost, Indeterminate):
                raise lost
            if ended and not applied:
                raise Conflict(
                    "the transaction was interrupted, and was ended without being applied; run it again",
                    part=0,
                    what="intent",
                    index=0,
                )
            attempt, ended = attempt + 1, True

    def _settled(self, transaction: Transaction, deadline: float) -> str:
        """What became of the transaction; "unknown" too if nobody can say, at once if the daemon is cut off."""
        witness = transaction.witness
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                return self.outcome(transaction.id, witness.key, witness.seen, left_s)
            except Unavailable as error:
                if error.detail.get("cut_off"):
                    break
                time.sleep(min(OUTCOME_PAUSE_S, left_s))
            except DhtError:
                # Its database is gone, or its daemon has failed: of the commit that says nothing.
                break
        return "unknown"

    def reserve_ids(self, database: str, name: str, count: int, above: int = 0, timeout_s: float | None = None) -> int:
        message = requests.ReserveIds(database, name, count, above)
        return self._ask(message, requests.ReserveIdsReply, timeout_s).first

    def raise_sequence(self, database: str, name: str, above: int, timeout_s: float | None = None) -> None:
        self._ask(requests.RaiseSequence(database, name, above), requests.Done, timeout_s)

    def outcome(
        self, id: TransactionId, key: GroupKey, seen: Ballot | None = None, timeout_s: float | None = None
    ) -> str:
        return self._ask(requests.AskOutcome(id, key, seen), requests.AskOutcomeReply, timeout_s).outcome

    def fence(
        self, database: str, version: int, prefixes: Sequence[bytes], first: int = 0, timeout_s: float | None = None
    ) -> int:
        message = requests.RaiseFence(database, version, tuple(prefixes), first)
        return self._ask(message, requests.RaiseFenceReply, timeout_s).following

    def list_databases(self, timeout_s: float | None = None) -> tuple[str, ...]:
        return self._ask(requests.ListDatabases(), requests.ListDatabasesReply, timeout_s).names

    def homes(self, timeout_s: float | None = None) -> dict[str, str]:
        """Database -> the PoP that it lives in, or "global"."""
        return self._ask(requests.ListHomes(), requests.ListHomesReply, timeout_s).homes

    def pops(self, timeout_s: float | None = None) -> dict[str, PopClaim]:
        """All PoPs, by index."""
        return self._ask(requests.ListPops(), requests.ListPopsReply, timeout_s).pops

    def home(self, database: str, timeout_s: float | None = None) -> str:
        """See `AskHomeReply`."""
        return self._ask(requests.AskHome(database), requests.AskHomeReply, timeout_s).home

    def create_database(self, name: str, timeout_s: float | None = None, home: str = "") -> bool:
        return self._ask(requests.CreateDatabase(name, home), requests.Done, timeout_s).changed

    def drop_database(self, name: str, timeout_s: float | None = None) -> bool:
        return self._ask(requests.DropDatabase(name), requests.Done, timeout_s).changed

    def _ask(self, message: Message, kind: type[R], timeout_s: float | None) -> R:
        return _expect(self.client.call(message, timeout_s, repeatable=True), kind)


def _expect(reply: Message, kind: type[R]) -> R:
    if not isinstance(reply, kind):
        raise RemoteProtocolError(f"the daemon replied {type(reply).__name__} where {kind.__name__} was due")
    return reply
