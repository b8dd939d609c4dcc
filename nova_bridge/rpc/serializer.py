"""Everything that crosses the RPC door, as JSON-able primitives: str, int, float, bool, None, list, dict with str keys.

A primitive stands for itself. Anything else is a dict with the key "$" that names its kind; a dict of the caller's that
has this key or other keys than strings is tagged too. Models, contexts and Nova's objects are numbered within one
message, so that identity is kept and cycles end. Nothing is ever unpickled; classes are found in fixed lists, not by
import.

A type that is not known is refused by name (`Invalid`): shipping a guess would corrupt Nova's state quietly.
"""

from __future__ import annotations

import base64
import collections
import datetime
import decimal
import functools
import types
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import netaddr
import nova.context
from nova.db.main import api
from nova.objects import base as objects_base
from oslo_versionedobjects import base as versioned
from sqlalchemy.engine import Row, RowMapping, result_tuple

from dht.errors import Invalid
from nova_bridge.rpc.failures import flatten_exception, rebuild_exception
from nova_bridge.rpc.models import empty_model, fill_model, flatten_model

TAG = "$"
DEPTH_LIMIT = 100
ORIGINAL = "_orig_"
FACTORIES: dict[str, Callable[[], Any]] = {f.__name__: f for f in (int, list, str, dict, set, float, tuple, bool)}
CONDITIONS = {c.__name__: c for c in (api.Constraint, api.EqualityCondition, api.InequalityCondition)}
# Of no use to database code, long, and secret.
CONTEXT_KEYS_KEPT_HOME = ("service_catalog", "auth_token")
_INT64 = range(-(2**63), 2**63)
CALLABLES = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
Flatten = Callable[[Any, Callable[[Any], Any]], dict[str, Any]]
_CONTAINERS = frozenset({dict, list})
_DICT_VIEWS = (type({}.keys()), type({}.values()))


def connection_of(context: Any) -> str | None:
    """The URL of the cell that `context` is targeted at; None means the process's own database."""
    manager = getattr(context, "db_connection", None)
    if manager is None:
        return None
    url = getattr(manager, "lucd_connection", None)
    if url is None:
        # Made before the door was opened: oslo.db keeps what it was configured with.
        url = manager._factory._url_cfg.get("connection")
    if not isinstance(url, str):
        raise Invalid(
            "the context is targeted at a cell whose database connection is not known; target it by its mapping"
        )
    return url


class Encoder:
    """One message out.

    `callbacks[i]` is the i-th function among the arguments; its calls come back with the answer. `shared` are the
    contexts and Nova objects by their number. `known`: those of the message that this one answers; they are only
    referred to.
    """

    def __init__(self, known: Mapping[int, Any] | None = None) -> None:
        self.callbacks: list[Callable[..., Any]] = []
        self.shared: dict[int, Any] = {}
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no id() is used twice within one message
        self._known = {id(value): number for number, value in (known or {}).items()}
        self._depth = 0

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if kind is str:
            return _text(value)
        if value is None or kind is bool or kind is float:
            return value
        if kind is int:
            return value if value in _INT64 else {TAG: "int", "v": str(value)}
        self._depth += 1
        if self._depth > DEPTH_LIMIT:
            raise Invalid(f"the RPC door was given a value nested deeper than {DEPTH_LIMIT} levels")
        try:
            return _encoder_of(kind)(self, value)
        finally:
            self._depth -= 1

    def _list(self, value: Any) -> list[Any]:
        return [self.encode(v) for v in value]

    def _all(self, tag: str, value: Any) -> dict[str, Any]:
        return {TAG: tag, "v": [self.encode(v) for v in value]}

    def _row(self, value: Any) -> dict[str, Any]:
        return {**self._all("row", value), "k": list(value._fields)}

    def _error(self, value: Any) -> dict[str, Any]:
        return {TAG: "error", **flatten_exception(value, self.encode)}

    def _condition(self, value: Any) -> dict[str, Any]:
        return {TAG: "condition", "c": type(value).__name__, "v": self._dict(vars(value))}

    def _callback(self, value: Any) -> dict[str, Any]:
        self.callbacks.append(value)
        return {TAG: "callback", "n": len(self.callbacks) - 1}

    def _dict(self, value: Any) -> dict[str, Any]:
        if TAG not in value and all(type(k) is str for k in value):
            return {_text(k): self.encode(v) for k, v in value.items()}
        return {TAG: "dict", "v": [[self.encode(k), self.encode(v)] for k, v in value.items()]}

    def _defaultdict(self, value: Any) -> dict[str, Any]:
        factory = value.default_factory
        name = getattr(factory, "__name__", None)
        if factory is not None and FACTORIES.get(str(name)) is not factory:
            raise Invalid(f"the RPC door cannot carry a defaultdict of {factory!r}, only of {', '.join(FACTORIES)}")
        items = [[self.encode(k), self.encode(v)] for k, v in value.items()]
        return {TAG: "defaultdict", "f": name if factory is not None else None, "v": items}

    def _numbered(self, tag: str, value: Any, flatten: Flatten) -> Any:
        number = self._numbers.get(id(value))
        if number is not None:
            return {TAG: "seen", "n": number}
        number = len(self._numbers)
        self._numbers[id(value)] = number
        self._kept.append(value)
        return {TAG: tag, "i": number, **flatten(value, self.encode)}

    def _shared(self, tag: str, value: Any, flatten: Flatten) -> Any:
        known = self._known.get(id(value))
        if known is not None:
            return {TAG: "known", "n": known}
        sent = self._numbered(tag, value, flatten)
        if "i" in sent:
            self.shared[sent["i"]] = value
        return sent

    def flatten_object(self, value: Any, encode: Callable[[Any], Any]) -> dict[str, Any]:
        flat = {"v": encode(value.obj_to_primitive()), "x": encode(value._context)}
        # What some objects compare with to know their changes; Nova's own primitive leaves it out.
        originals = {name: encode(found) for name, found in vars(value).items() if name.startswith(ORIGINAL)}
        return {**flat, "o": originals} if originals else flat

    def _flatten_context(self, value: Any, encode: Callable[[Any], Any]) -> dict[str, Any]:
        # to_dict drops the targeted cell.
        content = {k: v for k, v in value.to_dict().items() if k not in CONTEXT_KEYS_KEPT_HOME}
        return {"v": encode(content), "cell": getattr(value, "cell_uuid", None), "db": connection_of(value)}


class Decoder:
    """One message in. `target(url)` gives the database manager of a cell.

    `shared` and `known` as in `Encoder`; `recorded` are the calls of the message's callbacks: number, args, kwargs.
    """

    def __init__(self, target: Callable[[str], Any], known: Mapping[int, Any] | None = None) -> None:
        self.shared: dict[int, Any] = {}
        self.recorded: list[list[Any]] = []
        self._target = target
        self._known = known or {}
        self._numbered: dict[int, Any] = {}

    def decode(self, value: Any) -> Any:
        kind = type(value)
        if kind is list:
            return [self.decode(v) if type(v) in _CONTAINERS else v for v in value]
        if kind is not dict:
            return value
        tag = value.get(TAG)
        if tag is None:
            return {k: self.decode(v) if type(v) in _CONTAINERS else v for k, v in value.items()}
        decoder = _DECODERS.get(tag) if isinstance(tag, str) else None
        if decoder is None:
            raise Invalid(
                f"the RPC door was sent a value of the unknown kind {tag!r}; run one lucd release on this host"
            )
        try:
            return decoder(self, value)
        except (KeyError, ValueError, TypeError, ArithmeticError) as error:
            raise Invalid(f"the RPC door was sent a malformed {tag}: {error!r}") from error

    def _all(self, value: dict[str, Any]) -> list[Any]:
        return [self.decode(v) for v in value["v"]]

    def _items(self, value: dict[str, Any]) -> list[tuple[Any, Any]]:
        return [(self.decode(k), self.decode(v)) for k, v in value["v"]]

    def _defaultdict(self, value: dict[str, Any]) -> Any:
        name = value["f"]
        return collections.defaultdict(FACTORIES[name] if name is not None else None, self._items(value))

    def _model(self, value: dict[str, Any]) -> Any:
        model = self._numbered[value["i"]] = empty_model(value["c"])
        fill_model(model, value, self.decode)
        return model

    def _context(self, value: dict[str, Any]) -> Any:
        context = nova.context.RequestContext.from_dict(self.decode(value["v"]))
        context.cell_uuid = value["cell"]
        if value["db"] is not None:
            context.db_connection = self._target(value["db"])
        self._numbered[value["i"]] = self.shared[value["i"]] = context
        return context

    def rebuild_object(self, value: dict[str, Any]) -> Any:
        context = self.decode(value["x"])
        found = objects_base.NovaObject.obj_from_primitive(self.decode(value["v"]), context=context)
        for name, original in value.get("o", {}).items():
            if name.startswith(ORIGINAL):
                setattr(found, name, self.decode(original))
        return found

    def _object(self, value: dict[str, Any]) -> Any:
        found = self._numbered[value["i"]] = self.shared[value["i"]] = self.rebuild_object(value)
        return found

    def _row(self, value: dict[str, Any]) -> Any:
        return result_tuple(value["k"])(tuple(self._all(value)))

    def _condition(self, value: dict[str, Any]) -> Any:
        kind = CONDITIONS[value["c"]]
        condition = kind.__new__(kind)
        condition.__dict__.update(self.decode(value["v"]))
        return condition

    def _callback(self, value: dict[str, Any]) -> Callable[..., None]:
        number = value["n"]

        def record(*args: Any, **kwargs: Any) -> None:
            self.recorded.append([number, list(args), kwargs])

        return record


_DECODERS: dict[str, Callable[[Decoder, dict[str, Any]], Any]] = {
    "int": lambda d, v: int(v["v"]),
    "bytes": lambda d, v: base64.b64decode(v["v"], validate=True),
    "Decimal": lambda d, v: decimal.Decimal(v["v"]),
    "UUID": lambda d, v: uuid.UUID(v["v"]),
    "IPAddress": lambda d, v: netaddr.IPAddress(v["v"]),
    "IPNetwork": lambda d, v: netaddr.IPNetwork(v["v"]),
    "datetime": lambda d, v: datetime.datetime.fromisoformat(v["v"]),
    "date": lambda d, v: datetime.date.fromisoformat(v["v"]),
    "time": lambda d, v: datetime.time.fromisoformat(v["v"]),
    "timedelta": lambda d, v: datetime.timedelta(*v["v"]),
    "tuple": lambda d, v: tuple(d._all(v)),
    "set": lambda d, v: set(d._all(v)),
    "frozenset": lambda d, v: frozenset(d._all(v)),
    "dict": lambda d, v: dict(d._items(v)),
    "defaultdict": Decoder._defaultdict,
    "row": Decoder._row,
    "model": Decoder._model,
    "context": Decoder._context,
    "object": Decoder._object,
    "condition": Decoder._condition,
    "callback": Decoder._callback,
    "error": lambda d, v: rebuild_exception(v, d.decode),
    "seen": lambda d, v: d._numbered[v["n"]],
    "known": lambda d, v: d._known[v["n"]],
}


def _text(value: str) -> str:
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Invalid(f"the RPC door was given text that is not Unicode: {error}") from error
    return value


def _as_text(tag: str) -> Callable[[Encoder, Any], Any]:
    return lambda e, value: {TAG: tag, "v": str(value)}


def _as_iso(tag: str) -> Callable[[Encoder, Any], Any]:
    return lambda e, value: {TAG: tag, "v": value.isoformat()}


def _as_bytes(e: Encoder, value: Any) -> dict[str, Any]:
    return {TAG: "bytes", "v": base64.b64encode(value).decode("ascii")}


# The first entry that a type is a subclass of decides.
_ENCODERS: list[tuple[type | tuple[type, ...], Callable[[Encoder, Any], Any]]] = [
    (datetime.datetime, _as_iso("datetime")),
    (datetime.date, _as_iso("date")),
    (datetime.time, _as_iso("time")),
    (datetime.timedelta, lambda e, v: {TAG: "timedelta", "v": [v.days, v.seconds, v.microseconds]}),
    (nova.context.RequestContext, lambda e, v: e._shared("context", v, e._flatten_context)),
    (versioned.VersionedObject, lambda e, v: e._shared("object", v, e.flatten_object)),
    (BaseException, Encoder._error),
    (Row, Encoder._row),
    (tuple, lambda e, v: e._all("tuple", v)),
    (collections.defaultdict, Encoder._defaultdict),
    ((dict, RowMapping), Encoder._dict),
    (frozenset, lambda e, v: e._all("frozenset", v)),
    (set, lambda e, v: e._all("set", v)),
    ((list, collections.deque, *_DICT_VIEWS), Encoder._list),
    (str, lambda e, v: _text(str(v))),
    ((bytes, bytearray, memoryview), _as_bytes),
    (int, lambda e, v: e.encode(int(v))),
    (float, lambda e, v: float(v)),
    (decimal.Decimal, _as_text("Decimal")),
    (uuid.UUID, _as_text("UUID")),
    (netaddr.IPAddress, _as_text("IPAddress")),
    (netaddr.IPNetwork, _as_text("IPNetwork")),
    (tuple(CONDITIONS.values()), Encoder._condition),
    (CALLABLES, Encoder._callback),
]


@functools.cache
def _encoder_of(kind: type) -> Callable[[Encoder, Any], Any]:
    if hasattr(kind, "__mapper__"):
        return lambda e, value: e._numbered("model", value, flatten_model)
    for base, encoder in _ENCODERS:
        if issubclass(kind, base):
            return encoder
    name = f"{kind.__module__}.{kind.__qualname__}"
    raise Invalid(f"the RPC door cannot carry a {name}; pass plain values, models or Nova objects")
