"""Functions whose transaction lost a race are run again, as a database that locks rows would have let them wait.

Nova, Placement and their like were written for MySQL: of two that change the same row the second waits for the first's
commit and then sees what it did: a row that is gone, a generation that moved, a name that is taken. For each they have
code. Here nobody waits; the second learns at its commit that it was late. The code that expects MySQL's answer has been
left by then, so few of their functions can do anything with DBDeadlock.

So the whole function that opened the transaction is run again, from its arguments: it certainly changed nothing, and
now it meets the other's work where it expects it. oslo.db's own wrap_db_retry does the same where somebody thought of
it, after a sleep of a second.

Both decorators that open a transaction (enginefacade's, and pick_context_manager_writer of nova.db.main.api) make
functions of one code object each. That code is replaced, in the functions that exist and in the decorator, so that
whatever holds one of these functions, under whatever other decorators, runs the new code. Errors of other databases in
the same process pass through. `with manager.writer.using(context):` is no function to run again: those of Nova's whose
body it is, and that run nothing else, are known by name. Elsewhere DBDeadlock remains, as it does for a function that
cannot be run again from where it began: one that was given an iterator, or during which this thread committed another
transaction (an independent one, another database's, the first piece of a long DELETE).
"""

from __future__ import annotations

import functools
import gc
import logging
import random
import sys
import threading
import time
import types
from collections.abc import Callable, ItemsView, Iterable, KeysView, ValuesView
from typing import Any

from oslo_db import exception
from oslo_db.sqlalchemy import enginefacade

from nova_bridge.sql import commit
from nova_bridge.sql.errors import ConflictError
from nova_bridge.sql.filters import DBLateDuplicateEntry, DBLateReferenceError

LOG = logging.getLogger(__name__)
RUNS_MAX = 400
PATIENCE_S = 50.0
"""From the first run on: then the function's caller gets the error. As long as InnoDB waits for a row lock."""
PAUSE_MIN_S = 0.002
PAUSE_MAX_S = 0.25
ARGUMENT_DEPTH_MAX = 7
"""How deep arguments are put back as they were: a list of objects that hold objects is 4."""
PLAIN = (str, int, float, bytes, type(None))
"""What cannot be changed, nor holds anything that can."""
LIVE = ("sqlalchemy", "oslo_", "threading", "_thread", "logging", "concurrent", "queue", "weakref", "contextlib")
"""Modules whose objects live on beside a function: engines, sessions, locks. It was not given them to change."""

BODIES = {"nova.objects.aggregate": ("_host_add_to_db", "_host_delete_from_db", "_metadata_add_to_db")}
"""Functions that open their transaction in their body, by module."""

counters = {"rerun": 0, "given_up": 0}
_codes: dict[str, types.CodeType] = {}
_lock = threading.Lock()


def install() -> None:
    """Once for each decorator that is loaded; called whenever an engine is made, so for late ones too."""
    with _lock:
        _replace("oslo_db", enginefacade._TransactionContextManager.__call__)
        nova = sys.modules.get("nova.db.main.api")
        if nova is not None:
            _replace("nova", nova.pick_context_manager_writer)
        for module, names in BODIES.items():
            for name in names:
                _wrap(sys.modules.get(module), name)


def _wrap(module: types.ModuleType | None, name: str) -> None:
    """Have the module's function run again; what is wrapped already, also by the RPC door's client, is left alone."""
    function = getattr(module, name, None)
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        return

    @functools.wraps(function)
    def wrapped(context: Any, *args: Any, **kwargs: Any) -> Any:
        if _inside(context):
            return function(context, *args, **kwargs)
        return again(lambda: function(context, *args, **kwargs), Before([args, kwargs]))

    setattr(module, name, wrapped)


def _replace(name: str, decorator: Any) -> None:
    if name in _codes:
        return
    inner = [c for c in decorator.__code__.co_consts if isinstance(c, types.CodeType) and c.co_name == "wrapper"]
    if len(inner) != 1:
        LOG.warning("%s's transaction decorator is not as expected: lost races are not run again", name)
        return
    original = inner[0]
    # The same free variables in the same order, or the functions' closures would not fit.
    captured = ", ".join(original.co_freevars)
    source = (
        f"def decorate({captured}):\n"
        "    def wrapper(*args, **kwargs):\n"
        f"        import {__name__} as rerun\n"
        f"        return rerun.run({name!r}, globals(), ({captured},), args, kwargs)\n"
        "    return wrapper\n"
    )
    made: dict[str, Any] = {}
    exec(compile(source, __file__, "exec"), made)
    # By its name the RPC door knows what opens a transaction (`nova_bridge.rpc.methods`).
    code = made["decorate"](*[None] * len(original.co_freevars)).__code__
    replacement = code.replace(co_qualname=original.co_qualname)
    if replacement.co_freevars != original.co_freevars:
        LOG.warning("%s's transaction decorator cannot be replaced: lost races are not run again", name)
        return
    _codes[name] = original
    # The decorator first: a function that another thread makes meanwhile is not missed.
    constants = tuple(replacement if c is original else c for c in decorator.__code__.co_consts)
    decorator.__code__ = decorator.__code__.replace(co_consts=constants)
    functions = [f for f in _referrers(original) if isinstance(f, types.FunctionType) and f.__code__ is original]
    for function in functions:
        function.__code__ = replacement
    LOG.debug("%d functions of %s are run again when they lost a race", len(functions), name)


def _referrers(target: object) -> list[Any]:
    """What refers to it, of what the application has frozen too, where the collector does not look."""
    frozen = gc.get_freeze_count()
    if frozen:
        gc.unfreeze()
    try:
        return gc.get_referrers(target)
    finally:
        if frozen:
            gc.freeze()


def run(name: str, names: dict[str, Any], captured: tuple[Any, ...], args: Any, kwargs: Any) -> Any:
    """What a decorated function does now. `captured`: the values that the decorator's own function had closed over."""
    cells = tuple(types.CellType(value) for value in captured)
    call = types.FunctionType(_codes[name], names, "wrapper", None, cells)
    context = next((a for a in (*args, *kwargs.values()) if hasattr(type(a), "transaction_ctx")), None)
    if context is None or _inside(context) or any(_reads(value) for value in captured):
        return call(*args, **kwargs)
    return again(lambda: call(*args, **kwargs), Before([args, kwargs, closures(captured)]))


def closures(captured: tuple[Any, ...]) -> list[types.CellType]:
    """The variables that a decorated function shares with the one around it: Placement's transactions change those."""
    cells: list[types.CellType] = []
    for function in captured:
        while isinstance(function, types.FunctionType):
            cells += function.__closure__ or ()
            function = getattr(function, "__wrapped__", None)  # noqa: PLW2901
    return cells


def _inside(context: Any) -> bool:
    """Whether a transaction of this context is open: then it is the outermost function's to run again."""
    by_thread = getattr(context, "_enginefacade_context", None)
    return getattr(by_thread, "current", None) is not None


def _reads(captured: Any) -> bool:
    manager = isinstance(captured, enginefacade._TransactionContextManager)
    return manager and captured._mode is not enginefacade._WRITER


def again(call: Callable[[], Any], before: Before) -> Any:
    """The call's result, after as many runs as it takes in the limits above."""
    give_up_s = time.monotonic() + PATIENCE_S
    committed = commit.counts.applied
    pause_s = PAUSE_MIN_S
    for number in range(RUNS_MAX):
        try:
            return call()
        except (exception.DBDeadlock, exception.DBDuplicateEntry) as error:
            if not lost_race(error) or not before.complete or commit.counts.applied != committed:
                raise
            if number + 1 == RUNS_MAX or time.monotonic() > give_up_s:
                counters["given_up"] += 1
                raise
        counters["rerun"] += 1
        before.put_back()
        # At random, so that those who met do not meet again.
        time.sleep(random.uniform(0, pause_s))
        pause_s = min(2 * pause_s, PAUSE_MAX_S)
    raise AssertionError("the last run returns or raises")


def lost_race(error: Exception) -> bool:
    """Whether it comes from a lucd database and says that the transaction certainly was not applied."""
    if isinstance(error, (DBLateDuplicateEntry, DBLateReferenceError)):
        return True
    driver = getattr(getattr(error, "inner_exception", None), "orig", None)
    return isinstance(error, exception.DBDeadlock) and isinstance(driver, ConflictError)


class Before:
    """The arguments as they were before the first run, which may have changed them.

    Containers, the attributes of objects and shared variables are put back in place. What is not given to be changed is
    left alone: contexts, rows and sessions of SQLAlchemy's, locks. `complete`: false where an iterator, which cannot be
    put back, is among them.
    """

    def __init__(self, arguments: Any) -> None:
        self.complete = True
        self._kept: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        self._keep(arguments, 0)

    def _keep(self, value: Any, depth: int) -> None:
        if depth > ARGUMENT_DEPTH_MAX or id(value) in self._seen:
            return
        self._seen.add(id(value))
        # What is looked through is a copy: another thread may change the original meanwhile.
        for one in self._parts(value):
            if not isinstance(one, PLAIN):
                self._keep(one, depth + 1)

    def _parts(self, value: Any) -> Iterable[Any]:
        match value:
            case dict():
                pairs = dict(value)
                self._kept.append((value, pairs))
                return [*pairs.keys(), *pairs.values()]
            case set():
                members = set(value)
                self._kept.append((value, members))
                return members
            case list() if type(value).__iter__ is list.__iter__:
                items = list(value)
                self._kept.append((value, items))
                return items
            case tuple() | frozenset() | KeysView() | ValuesView() | ItemsView():
                return tuple(value)
            case types.CellType():
                return self._variable(value)
            case type() | types.FunctionType() | types.ModuleType() | types.MethodType():
                return ()
            case _:
                return self._attributes(value)

    def _variable(self, cell: types.CellType) -> Iterable[Any]:
        try:
            held = cell.cell_contents
        except ValueError:
            # Not set yet; there is no way to unset it again that would matter.
            return ()
        self._kept.append((cell, held))
        return (held,)

    def _attributes(self, value: Any) -> Iterable[Any]:
        kind = type(value)
        if hasattr(kind, "__next__"):
            self.complete = False
        if hasattr(kind, "transaction_ctx") or kind.__module__.startswith(LIVE):
            return ()
        attributes = getattr(value, "__dict__", None)
        return (attributes,) if isinstance(attributes, dict) and "_sa_instance_state" not in attributes else ()

    def put_back(self) -> None:
        """Undo what a run did to them. What it left alone is not touched: another thread may be reading it."""
        for value, was in self._kept:
            match value:
                case types.CellType():
                    if value.cell_contents is not was:
                        value.cell_contents = was
                case dict():
                    for name in [name for name in value if name not in was]:
                        del value[name]
                    for name, before in was.items():
                        if name not in value or value[name] is not before:
                            value[name] = before
                case list():
                    if len(value) != len(was) or any(now is not before for now, before in zip(value, was, strict=True)):
                        value[:] = was
                case _:
                    if value != was:
                        value.intersection_update(was)
                        value.update(was)
