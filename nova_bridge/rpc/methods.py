"""What may be called through the RPC door, found by inspecting the Nova that is installed (33 and 34 differ).

Functions: the public ones of nova.db.main.api. Object methods: what opens a transaction of its own in nova.objects,
nova.quota and nova.compute.api, either by an enginefacade decorator or in its body.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, NamedTuple

API = "nova.db.main.api"
# These make things (decorators, managers, conditions) and run no query by themselves, or return what cannot leave a
# process.
LOCAL = frozenset(
    {
        "configure",
        "constraint",
        "convert_objects_related_datetimes",
        "create_context_manager",
        "equal_any",
        "get_context_manager",
        "get_engine",
        "model_query",
        "not_equal",
        "pick_context_manager_reader",
        "pick_context_manager_reader_allow_async",
        "pick_context_manager_writer",
        "select_db_reader_mode",
    }
)
MODULES_WITH_METHODS = ("nova.quota", "nova.compute.api")
DECORATORS = frozenset({name for name in LOCAL if name.startswith(("pick_context_manager", "select_db_reader"))})
# A body that names one of these opens a transaction: `with context_manager.writer.using(context)`, or an inner function
# that is decorated.
OPENERS = DECORATORS | {"context_manager", "get_context_manager"}


class Kind(StrEnum):
    FUNCTION = "function"
    STATIC = "staticmethod"
    CLASS = "classmethod"
    INSTANCE = "method"


class ObjectMethod(NamedTuple):
    """A function or method outside nova.db.main.api. `owner` is the module or class that holds it under `name`."""

    module: str
    qualified_name: str
    kind: Kind
    owner: Any
    name: str
    function: Callable[..., Any]

    def bound(self) -> Callable[..., Any]:
        """What to call with the arguments that crossed the door; for a method they begin with the instance."""
        return self.function.__get__(self.owner) if self.kind is Kind.CLASS else self.function


class Catalogue(NamedTuple):
    functions: dict[str, Callable[..., Any]]
    object_methods: dict[tuple[str, str], ObjectMethod]


def public_functions() -> dict[str, Callable[..., Any]]:
    """Every public function that nova.db.main.api defines itself, `LOCAL` ones included."""
    api = importlib.import_module(API)
    return {
        name: found
        for name, found in vars(api).items()
        if isinstance(found, types.FunctionType)
        and not name.startswith("_")
        and inspect.unwrap(found).__module__ == API
    }


def catalogue() -> Catalogue:
    """Take it before a client is installed in this process: it holds the functions as they are now."""
    functions = {name: found for name, found in public_functions().items() if name not in LOCAL}
    methods = {(m.module, m.qualified_name): m for module in _modules() for m in _methods_of(module)}
    return Catalogue(functions, methods)


def _modules() -> Iterator[types.ModuleType]:
    package = importlib.import_module("nova.objects")
    for found in pkgutil.iter_modules(package.__path__):
        yield importlib.import_module(f"{package.__name__}.{found.name}")
    for name in MODULES_WITH_METHODS:
        yield importlib.import_module(name)


def _methods_of(module: types.ModuleType) -> Iterator[ObjectMethod]:
    for name, found in list(vars(module).items()):
        if getattr(found, "__module__", None) != module.__name__:
            continue
        if isinstance(found, types.FunctionType) and opens_transaction(found):
            yield ObjectMethod(module.__name__, name, Kind.FUNCTION, module, name, found)
        elif isinstance(found, type):
            yield from _methods_of_class(module.__name__, found)


def _methods_of_class(module: str, owner: type) -> Iterator[ObjectMethod]:
    for name, found in list(vars(owner).items()):
        kind, function = Kind.INSTANCE, found
        if isinstance(found, staticmethod | classmethod):
            kind, function = Kind(type(found).__name__), found.__func__
        if isinstance(function, types.FunctionType) and opens_transaction(function):
            yield ObjectMethod(module, f"{owner.__qualname__}.{name}", kind, owner, name, function)


def opens_transaction(function: types.FunctionType) -> bool:
    layer: Any = function
    while isinstance(layer, types.FunctionType):
        made_by = layer.__code__.co_qualname
        decorator = made_by.removesuffix(".<locals>.wrapper")
        if decorator != made_by and (
            decorator in DECORATORS or decorator.endswith("TransactionContextManager.__call__")
        ):
            return True
        if OPENERS.intersection(layer.__code__.co_names):
            return True
        layer = getattr(layer, "__wrapped__", None)
    return False
