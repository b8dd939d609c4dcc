"""The same call here on stock SQLite and through the RPC door; reports every difference that a caller can see."""

import datetime

from nova.db.main import api
from oslo_db.sqlalchemy.models import ModelBase
from oslo_versionedobjects.fields import CoercedDict, CoercedList
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import object_session
from sqlalchemy.orm.collections import InstrumentedList
from sqlalchemy.orm.exc import DetachedInstanceError

# Both sides run one after the other.
CLOCK_SLACK = datetime.timedelta(seconds=60)
# The second: Nova copies a model by way of a session without database, which lives until it is collected.
NOT_LOADED = (DetachedInstanceError, UnboundExecutionError)


class Lockstep:
    """`lockstep(name, context, ...)` returns what stock SQLite returned, after comparing the door's answer with it."""

    def __init__(self, client):
        self._client = client
        self._direct = {name: getattr(api, name) for name in dir(api)}
        self.called = set()

    def __call__(self, name, *args, **kwargs):
        outcome = self._both(name, args, kwargs)
        if isinstance(outcome, Exception):
            raise AssertionError(f"{name} failed on stock SQLite") from outcome
        return outcome

    def fails(self, name, kind, *args, **kwargs):
        """The call raises `kind` on both sides, with the same content."""
        outcome = self._both(name, args, kwargs)
        assert isinstance(outcome, kind), f"{name} gave {outcome!r} instead of {kind.__name__}"
        return outcome

    def _both(self, name, args, kwargs):
        self.called.add(name)
        theirs_args, theirs_kwargs = copied(args), copied(kwargs)
        here = outcome_of(self._direct[name], *args, **kwargs)
        there = outcome_of(self._client.call, name, theirs_args, theirs_kwargs)
        differences = list(compare(here, there, name, set()))
        assert not differences, "\n".join(differences)
        return here


def copied(value):
    """A copy of the containers: functions of nova.db.main.api change their arguments."""
    match value:
        case dict() if type(value) is dict:
            return {k: copied(v) for k, v in value.items()}
        case list() | tuple() if type(value) in (list, tuple):
            return type(value)(copied(v) for v in value)
    return value


def outcome_of(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return error


def compare(here, there, path, seen):
    """Yield a line for each difference; `seen` holds the pairs of models that are compared already."""
    if seen_as(here) is not seen_as(there):
        yield f"{path}: {type(here)} {here!r} here, {type(there)} {there!r} there"
        return
    match here:
        case ModelBase():
            yield from compare_models(here, there, path, seen)
        case datetime.datetime():
            if abs(here - there) > CLOCK_SLACK:
                yield f"{path}: {here} here, {there} there"
        case dict():
            yield from compare_dicts(here, there, path, seen)
        case list() | tuple():
            if len(here) != len(there):
                yield f"{path}: {len(here)} items here, {len(there)} there"
            for number, (one, other) in enumerate(zip(here, there, strict=False)):
                yield from compare(one, other, f"{path}[{number}]", seen)
        case Exception():
            yield from compare(here.args, there.args, f"{path}.args", seen)
            yield from compare(str(here), str(there), f"str({path})", seen)
            yield from compare_dicts(plain_state(here), plain_state(there), f"{path}.__dict__", seen)
        case _:
            if here != there:
                yield f"{path}: {here!r} here, {there!r} there"


def seen_as(value):
    """The type that must be the same. Containers that watch what is put into them cross the door as their base type:
    Nova's coerced ones (some functions return the very argument they were given), a model's list outside the model."""
    return {CoercedDict: dict, CoercedList: list, InstrumentedList: list}.get(type(value), type(value))


def compare_dicts(here, there, path, seen):
    # The order of a model's keys depends on the hashes of its relationships, in each process another.
    if set(here) != set(there):
        yield f"{path}: keys {list(here)} here, {list(there)} there"
    if getattr(here, "default_factory", None) is not getattr(there, "default_factory", None):
        yield f"{path}: default_factory {here.default_factory} here, {there.default_factory} there"
    for key in here:
        if key in there:
            yield from compare(here[key], there[key], f"{path}[{key!r}]", seen)


def compare_models(here, there, path, seen):
    """All that Nova can see of a model: every column, every relationship (or the exception that reading it raises), the
    dict-like methods, and that it belongs to no session."""
    if (id(here), id(there)) in seen:
        return
    seen.add((id(here), id(there)))
    attributes = [*sa_inspect(type(here)).attrs.keys(), *here._extra_keys]
    for name in attributes:
        one, other = outcome_of(getattr, here, name), outcome_of(getattr, there, name)
        if isinstance(one, NOT_LOADED) and isinstance(other, DetachedInstanceError):
            continue
        yield from compare(one, other, f"{path}.{name}", seen)
        if isinstance(one, Exception) is False:
            yield from compare(here.get(name) is None, there.get(name) is None, f"{path}.get({name})", seen)
    yield from compare(set(loaded(here)), set(loaded(there)), f"{path} loaded", seen)
    yield from compare(sa_inspect(here).identity, sa_inspect(there).identity, f"{path} identity", seen)
    assert object_session(there) is None
    for method in ("keys", "items"):
        one, other = outcome_of(getattr(here, method)), outcome_of(getattr(there, method))
        if isinstance(one, Exception):
            assert isinstance(one, NOT_LOADED)
            assert isinstance(other, DetachedInstanceError)
        else:
            kind = set if method == "keys" else dict
            yield from compare(kind(one), kind(other), f"{path}.{method}()", seen)


def loaded(model):
    return [name for name in model.__dict__ if name != "_sa_instance_state"]


def plain_state(error):
    """The attributes of an exception that oslo.db and Nova read. What a driver's own exception holds stays behind."""
    return {k: v for k, v in vars(error).items() if k not in ("__notes__", "inner_exception", "cause")}
