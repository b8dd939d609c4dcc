"""The same call here on stock SQLite and through the RPC door; reports every difference that a caller can see."""

import datetime

from oslo_db.sqlalchemy.models import ModelBase
from oslo_versionedobjects.base import VersionedObject
from oslo_versionedobjects.fields import CoercedDict, CoercedList
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import object_session
from sqlalchemy.orm.collections import InstrumentedList
from sqlalchemy.orm.exc import DetachedInstanceError

from nova_bridge.rpc.methods import catalogue

# Both sides run one after the other.
CLOCK_SLACK = datetime.timedelta(seconds=60)
# Functions whose results are ordered by SQL.
ORDERED = frozenset(
    {
        "action_events_get",
        "actions_get",
        "compute_node_get_all",
        "compute_node_get_all_by_pagination",
        "instance_get_all_by_filters",
        "instance_get_all_by_filters_sort",
        "virtual_interface_get_by_instance",
    }
)
# The second: Nova copies a model by way of a session without database, which lives until it is collected.
NOT_LOADED = (DetachedInstanceError, UnboundExecutionError)


class Lockstep:
    """`lockstep(name, context, ...)` returns what stock SQLite returned, after comparing the door's answer with it."""

    def __init__(self, client, any_order=False):
        self._client = client
        self._any_order = any_order
        self._catalogue = catalogue()
        self.called = set()
        self.methods_called = set()

    def __call__(self, name, /, *args, **kwargs):
        outcome = self._both(name, args, kwargs)
        if isinstance(outcome, Exception):
            raise AssertionError(f"{name} failed on stock SQLite") from outcome
        return outcome

    def fails(self, name, kind, /, *args, **kwargs):
        """The call raises `kind` on both sides, with the same content."""
        outcome = self._both(name, args, kwargs)
        assert isinstance(outcome, kind), f"{name} gave {outcome!r} instead of {kind.__name__}"
        return outcome

    def method(self, name, /, *args, **kwargs):
        """As a call, of an object method; `name` begins at nova or below nova.objects."""
        outcome = self._both_methods(name, args, kwargs)
        if isinstance(outcome, Exception):
            raise AssertionError(f"{name} failed on stock SQLite") from outcome
        return outcome

    def method_fails(self, name, kind, /, *args, **kwargs):
        outcome = self._both_methods(name, args, kwargs)
        assert isinstance(outcome, kind), f"{name} gave {outcome!r} instead of {kind.__name__}"

    def _both_methods(self, name, args, kwargs):
        full = name if name.startswith("nova.") else f"nova.objects.{name}"
        found = next(m for m in self._catalogue.object_methods.values() if f"{m.module}.{m.qualified_name}" == full)
        self.methods_called.add((found.module, found.qualified_name))
        theirs = copied(args), copied(kwargs)
        here = outcome_of(found.bound(), *args, **kwargs)
        there = outcome_of(self._client.call_object_method, found.module, found.qualified_name, *theirs)
        # Besides the result: what the method did to Nova objects that it was given.
        return self._compared(name, (here, *objects_in(args)), (there, *objects_in(theirs[0])))[0]

    def _both(self, name, args, kwargs):
        self.called.add(name)
        theirs_args, theirs_kwargs = copied(args), copied(kwargs)
        here = outcome_of(self._catalogue.functions[name], *args, **kwargs)
        there = outcome_of(self._client.call, name, theirs_args, theirs_kwargs)
        return self._compared(name, here, there)

    def _compared(self, name, here, there):
        comparison = Comparison(self._any_order)
        comparison.compare(here, there, name)
        assert not comparison.differences, "\n".join(comparison.differences)
        return here


def copied(value):
    """A copy of the containers: functions of nova.db.main.api change their arguments."""
    match value:
        case dict() if type(value) is dict:
            return {k: copied(v) for k, v in value.items()}
        case list() | tuple() if type(value) in (list, tuple):
            return type(value)(copied(v) for v in value)
        case VersionedObject():
            copy = value.obj_clone()
            copy._context = value._context
            return copy
    return value


def objects_in(args):
    return [value for value in args if isinstance(value, VersionedObject)]


def outcome_of(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return error


class Comparison:
    """Collects a line for each difference. `any_order`: lists whose order no ORDER BY promises are compared as sets."""

    def __init__(self, any_order):
        self.differences = []
        self._any_order = any_order
        self._seen = set()

    def compare(self, here, there, path):
        if seen_as(here) is not seen_as(there):
            self._differ(path, f"{type(here)} {here!r}", f"{type(there)} {there!r}")
            return
        match here:
            case ModelBase():
                self._models(here, there, path)
            case datetime.datetime():
                if abs(here - there) > CLOCK_SLACK:
                    self._differ(path, here, there)
            case dict():
                self._dicts(here, there, path)
            case list() | tuple():
                self._lists(here, there, path)
            case VersionedObject():
                self.compare(here.obj_what_changed(), there.obj_what_changed(), f"{path} changes")
                for name in here.obj_fields:
                    given = [side.obj_attr_is_set(name) for side in (here, there)]
                    self.compare(*given, f"{path}.{name} set")
                    if all(given):
                        self.compare(getattr(here, name), getattr(there, name), f"{path}.{name}")
            case Exception():
                self.compare(here.args, there.args, f"{path}.args")
                self.compare(str(here), str(there), f"str({path})")
                self._dicts(plain_state(here), plain_state(there), f"{path}.__dict__")
            case _:
                if here != there:
                    self._differ(path, repr(here), repr(there))

    def _differ(self, path, here, there):
        self.differences.append(f"{path}: {here} here, {there} there")

    def _lists(self, here, there, path):
        if len(here) != len(there):
            self._differ(path, f"{len(here)} items", f"{len(there)} items")
        if self._any_order and path not in ORDERED:
            here, there = in_one_order(here), in_one_order(there)
        for number, (one, other) in enumerate(zip(here, there, strict=False)):
            self.compare(one, other, f"{path}[{number}]")

    def _dicts(self, here, there, path):
        # The order of a model's keys depends on the hashes of its relationships, in each process another.
        if set(here) != set(there):
            self._differ(path, f"keys {list(here)}", f"keys {list(there)}")
        factories = [getattr(side, "default_factory", None) for side in (here, there)]
        if factories[0] is not factories[1]:
            self._differ(f"{path}.default_factory", *factories)
        for key in here:
            if key in there:
                self.compare(here[key], there[key], f"{path}[{key!r}]")

    def _models(self, here, there, path):
        """All that Nova can see of a model: every column, every relationship (or the exception that reading it raises),
        the dict-like methods, and that it belongs to no session."""
        if (id(here), id(there)) in self._seen:
            return
        self._seen.add((id(here), id(there)))
        for name in [*sa_inspect(type(here)).attrs.keys(), *here._extra_keys]:
            one, other = outcome_of(getattr, here, name), outcome_of(getattr, there, name)
            if isinstance(one, NOT_LOADED) and isinstance(other, DetachedInstanceError):
                continue
            self.compare(one, other, f"{path}.{name}")
            self.compare(outcome_of(here.get, name), outcome_of(there.get, name), f"{path}.get({name})")
        self.compare(set(loaded(here)), set(loaded(there)), f"{path} loaded")
        self.compare(sa_inspect(here).identity, sa_inspect(there).identity, f"{path} identity")
        assert object_session(there) is None
        for method, kind in (("keys", set), ("items", dict)):
            one, other = outcome_of(getattr(here, method)), outcome_of(getattr(there, method))
            if isinstance(one, Exception):
                assert isinstance(one, NOT_LOADED)
                assert isinstance(other, DetachedInstanceError)
            else:
                self.compare(kind(one), kind(other), f"{path}.{method}()")


def seen_as(value):
    """The type that must be the same. Containers that watch what is put into them cross the door as their base type:
    Nova's coerced ones (some functions return the very argument they were given), a model's list outside the model."""
    return {CoercedDict: dict, CoercedList: list, InstrumentedList: list}.get(type(value), type(value))


def in_one_order(values):
    return sorted(values, key=lambda value: str(value["id"] if hasattr(value, "keys") and "id" in value else value))


def loaded(model):
    return [name for name in model.__dict__ if name != "_sa_instance_state"]


def plain_state(error):
    """The attributes of an exception that oslo.db and Nova read. What a driver's own exception holds stays behind."""
    return {k: v for k, v in vars(error).items() if k not in ("__notes__", "inner_exception", "cause")}
