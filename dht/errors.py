"""Everything the store can answer besides success.

Four outcomes of a write are never mixed up (DESIGN section 6): applied (no exception), `Conflict` or
`Duplicate` (certainly not applied, a guard failed), `Unavailable` (certainly not applied, no quorum in time) and
`Indeterminate` (nobody knows; ask for the transaction's id before doing anything else).

Each class maps once to an HTTP status, a CLI exit code and, in the bridge, to a DB-API and an oslo.db exception.
A message says what was asked, what is the case, and what to do.
"""

from __future__ import annotations

from typing import ClassVar


class DhtError(Exception):
    """Base of all errors that the store raises on purpose."""

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, **detail: object) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail


class Unavailable(DhtError):
    """Certainly not applied, or not readable now: no quorum, queue full, deadline passed before sending."""

    code, http_status, exit_code = "unavailable", 503, 69


class NotServing(Unavailable):
    """This replica answers nothing of the tablet at that epoch (sealed, not initialised, not a member).

    `detail`: domain, tablet, roster_epoch = newest link the replica holds. The asker fetches the chain and tries again.
    """

    code = "not_serving"


class Indeterminate(DhtError):
    """The write may or may not have been applied; `detail["id"]` is the transaction to ask for."""

    code, http_status, exit_code = "indeterminate", 504, 75


class Conflict(DhtError):
    """Certainly not applied: a guard failed or the window no longer covers the transaction."""

    code, http_status, exit_code = "conflict", 409, 70


class Duplicate(Conflict):
    """Certainly not applied: a row or unique entry exists that had to be absent."""

    code, http_status, exit_code = "duplicate", 409, 71


class NotFound(DhtError):
    """The named database, table, node or domain does not exist."""

    code, http_status, exit_code = "not_found", 404, 66


class Invalid(DhtError):
    """The request itself is wrong: type, limit, unknown option. Sending it again cannot help."""

    code, http_status, exit_code = "invalid", 400, 64


class SchemaChanged(Conflict):
    """The caller's catalog version is older than the store's; reload the catalog and run again."""

    code, http_status, exit_code = "schema_changed", 409, 72


class ProtocolError(DhtError):
    """A peer sent what the protocol does not allow (`RemoteError`) or we were about to (`LocalError`)."""

    code, http_status, exit_code = "protocol", 502, 76


class LocalProtocolError(ProtocolError):
    """This process was about to send something that the protocol does not allow: a bug here."""


class RemoteProtocolError(ProtocolError):
    """A peer sent something that the protocol does not allow; its link is closed."""


class StorageError(DhtError):
    """The node's file cannot be trusted or written; the node casts no vote until a human or a wipe mends it."""

    code, http_status, exit_code = "storage", 507, 74


BY_CODE: dict[str, type[DhtError]] = {
    c.code: c
    for c in (
        Unavailable,
        NotServing,
        Indeterminate,
        Conflict,
        Duplicate,
        NotFound,
        Invalid,
        SchemaChanged,
        ProtocolError,
        StorageError,
    )
}


def rebuild(code: str, message: str, detail: dict[str, object]) -> DhtError:
    """The error that a peer or the daemon reported, as its own class; an unknown code becomes `DhtError`."""
    return BY_CODE.get(code, DhtError)(message, **detail)
