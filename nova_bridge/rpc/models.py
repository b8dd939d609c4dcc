"""SQLAlchemy models as plain values, and back as detached instances.

What Nova's objects can observe of a model that left its session is kept: which columns and relationships are loaded,
that a deferred or expired attribute raises DetachedInstanceError, that a column never set on a new row reads as None,
that an unloaded relationship raises, and that the dict-like methods of Nova's model base work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from sqlalchemy import inspect as sa_inspect
from sqlalchemy.orm import attributes

from dht.errors import Invalid

DATABASES = {"main": "nova.db.main.models", "api": "nova.db.api.models"}
_STATE = "_sa_instance_state"
_CONTAINERS = frozenset({dict, list})
"""What decoding can change; anything else stands for itself."""


class ModelClass(NamedTuple):
    """What (un)packing needs to know of a mapped class. `name` is what crosses the door, like "main.Instance"."""

    name: str
    manager: Any
    key_attributes: tuple[str, ...]
    keys: frozenset[str]
    relationships: frozenset[str]
    attributes: frozenset[str]


@functools.cache
def model_classes() -> dict[str, type]:
    """Every mapped class of Nova's two databases, by the name that crosses the door."""
    import importlib

    found = {}
    for database, module in DATABASES.items():
        for mapper in importlib.import_module(module).BASE.registry.mappers:
            found[f"{database}.{mapper.class_.__name__}"] = mapper.class_
    return found


@functools.cache
def describe(kind: type) -> ModelClass:
    names = {cls: name for name, cls in model_classes().items()}
    if kind not in names:
        raise Invalid(f"the RPC door was given a model of {kind.__module__}.{kind.__qualname__}, which is not Nova's")
    mapper = sa_inspect(kind)
    keys = tuple(mapper.get_property_by_column(column).key for column in mapper.primary_key)
    relationships = frozenset(mapper.relationships.keys())
    attributes = frozenset(mapper.attrs.keys())
    return ModelClass(names[kind], mapper.class_manager, keys, frozenset(keys), relationships, attributes)


def flatten_model(model: Any, encode: Callable[[Any], Any]) -> dict[str, Any]:
    """c: class, v: loaded attributes, x: attributes that raise when read, n: True if it never reached the database.

    Only `__dict__` is read: getattr would load what the caller did not ask for.
    """
    described = describe(type(model))
    state = getattr(model, _STATE)
    values = model.__dict__
    # Most columns are sent as they are: what `encode` would do, without a call for each.
    loaded: dict[str, Any] = {}
    for key, value in values.items():
        kind = type(value)
        if value is None or kind is bool or (kind is str and value.isascii()):
            loaded[key] = value
        elif key != _STATE:
            loaded[key] = encode(value)
    flat: dict[str, Any] = {"c": described.name, "v": loaded}
    if state.expired_attributes or state.callables:
        absent = {key for key in (*state.expired_attributes, *state.callables) if key not in values}
        if absent:
            flat["x"] = sorted(absent)
    if state.key is None:
        flat["n"] = True
    return flat


def empty_model(name: str) -> Any:
    """A new instance without content, made before its content is decoded because that may point back to it."""
    kind = model_classes().get(name)
    if kind is None:
        raise Invalid(f"the RPC door was sent a model {name!r}, which this release of Nova does not have")
    return describe(kind).manager.new_instance()


def fill_model(model: Any, flat: dict[str, Any], decode: Callable[[Any], Any]) -> None:
    """Give `model` the content of `flat` and make it what a model is after its session was closed."""
    described = describe(type(model))
    state = getattr(model, _STATE)
    values = model.__dict__
    for key, sent in flat["v"].items():
        if type(sent) not in _CONTAINERS:
            values[key] = sent
            continue
        value = decode(sent)
        if key in described.relationships and isinstance(value, list):
            attributes.set_committed_value(model, key, value)
        else:
            values[key] = value
    if "x" in flat:
        state.expired_attributes.update(described.attributes.intersection(flat["x"]))
    if not flat.get("n") and described.keys <= values.keys():
        identity = tuple([values[key] for key in described.key_attributes])
        state.key = described.manager.mapper.identity_key_from_primary_key(identity)
