"""Exceptions across the RPC door: by class, with arguments and attributes, never by pickle.

Only classes of the modules below are rebuilt; anything else arrives as `RemoteFailure` that names the original class.
Nova's handlers catch exceptions by class and read `kwargs`, `columns`, `message`; all of these are kept.
"""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Callable
from typing import Any

EXCEPTION_MODULES = frozenset(
    {
        "nova.exception",
        "oslo_db.exception",
        "oslo_db.sqlalchemy.update_match",
        "oslo_versionedobjects.exception",
        "sqlalchemy.exc",
        "sqlalchemy.orm.exc",
        "dht.errors",
        "nova_bridge.sql.filters",
        "builtins",
        __name__,
    }
)
NOVA_DB = "nova.db."


class RemoteFailure(Exception):
    """The worker met an exception whose class does not cross the door; `kind` is its full name."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


def allowed(module: str) -> bool:
    return module in EXCEPTION_MODULES or module.startswith(NOVA_DB)


def flatten_exception(error: BaseException, encode: Callable[[Any], Any]) -> dict[str, Any]:
    """`error` as primitives. What its attributes hold and `encode` refuses is replaced by its text: a failure to report
    a failure would hide it."""
    kind = type(error)
    if not allowed(kind.__module__) or "." in kind.__qualname__:
        error = RemoteFailure(f"{kind.__module__}.{kind.__qualname__}", str(error))
        kind = type(error)

    def lenient(value: Any) -> Any:
        try:
            return encode(value)
        except Exception:
            return str(value)

    return {
        "module": kind.__module__,
        "name": kind.__name__,
        "args": [lenient(a) for a in error.args],
        "state": {k: lenient(v) for k, v in vars(error).items()},
    }


def exception_class(module: str, name: str) -> type[Exception]:
    """The whitelisted class, or `RemoteFailure` if this process does not know it (another release of Nova there)."""
    if not allowed(module):
        return RemoteFailure
    if module in EXCEPTION_MODULES:
        namespace: Any = builtins if module == "builtins" else importlib.import_module(module)
    else:
        namespace = sys.modules.get(module)
    found = vars(namespace).get(name) if namespace is not None else None
    return found if isinstance(found, type) and issubclass(found, Exception) else RemoteFailure


def rebuild_exception(flat: dict[str, Any], decode: Callable[[Any], Any]) -> Exception:
    """The exception as its own class, without running its constructor (which would format the message again)."""
    arguments = tuple(decode(a) for a in flat["args"])
    state = {str(k): decode(v) for k, v in flat["state"].items()}
    kind = exception_class(str(flat["module"]), str(flat["name"]))
    if kind is RemoteFailure and flat["module"] != __name__:
        return RemoteFailure(f"{flat['module']}.{flat['name']}", ", ".join(str(a) for a in arguments))
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(state)
    return error
