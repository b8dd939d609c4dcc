"""What crosses the door comes out as it went in; what cannot cross is refused by name."""

import collections
import datetime
import decimal
import json
import uuid

import netaddr
import nova.context
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nova import exception, objects
from nova.db.api import models as api_models
from nova.db.main import api, models
from oslo_db import exception as db_exception
from sqlalchemy.engine import result_tuple
from sqlalchemy.orm.exc import DetachedInstanceError

from dht.errors import Conflict, Invalid
from nova_bridge.rpc.failures import RemoteFailure
from nova_bridge.rpc.serializer import DEPTH_LIMIT, TAG, Decoder, Encoder

text = st.text(st.characters(codec="utf-8"))
zones = st.just(datetime.UTC) | st.integers(-14, 14).map(lambda h: datetime.timezone(datetime.timedelta(hours=h)))
hashable = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | text
    | st.binary()
    | st.datetimes()
    | st.datetimes(timezones=zones)
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.uuids()
)
values = st.recursive(
    hashable | st.sets(hashable) | st.frozensets(hashable),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(text | st.just(TAG), inner, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.dictionaries(text, inner, max_size=4).map(lambda d: collections.defaultdict(list, d))
    ),
    max_leaves=20,
)


def no_cell(url):
    raise AssertionError(f"asked for the cell {url}")


def crossed(value, target=no_cell):
    return Decoder(target).decode(json.loads(json.dumps(Encoder().encode(value))))


def same(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    return one == other


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(values)
def test_value_crossing_comes_out_equal_and_of_same_type(value):
    assert same(crossed(value), value)


@pytest.mark.parametrize("factory", [int, list, str, dict, set, None])
def test_defaultdict_crossing_keeps_its_factory(factory):
    out = crossed(collections.defaultdict(factory, {"a": 1}))
    assert out.default_factory is factory
    assert out == {"a": 1}


def test_defaultdict_with_other_factory_refused():
    with pytest.raises(Invalid, match="defaultdict"):
        crossed(collections.defaultdict(lambda: 7))


class Unknown:
    pass


@pytest.mark.parametrize("value", [Unknown(), object(), Unknown, {"deep": [(Unknown(),)]}, (x for x in "ab"), 1 + 2j])
def test_unknown_type_refused_by_its_name(value):
    with pytest.raises(Invalid, match=r"cannot carry a (\w+\.)*(Unknown|object|type|generator|complex)"):
        Encoder().encode(value)


def test_lone_surrogate_refused():
    with pytest.raises(Invalid, match="not Unicode"):
        Encoder().encode("\ud800")


def test_nesting_beyond_limit_refused():
    value = []
    for _ in range(DEPTH_LIMIT):
        value = [value]
    with pytest.raises(Invalid, match="deeper"):
        Encoder().encode(value)


@pytest.mark.parametrize(
    "sent",
    [
        {TAG: "pickle", "v": "gASVKg=="},
        {TAG: ["list"]},
        {TAG: "datetime", "v": "yesterday"},
        {TAG: "bytes", "v": "not base64!"},
        {TAG: "tuple"},
        {TAG: "seen", "n": 3},
        {TAG: "model", "i": 0, "c": "main.NoSuch", "v": {}},
        {TAG: "condition", "c": "os.system", "v": {}},
        {TAG: "defaultdict", "f": "eval", "v": []},
        {TAG: "Decimal", "v": "many"},
    ],
    ids=lambda sent: str(sent[TAG]),
)
def test_malformed_or_unknown_kind_refused(sent):
    with pytest.raises(Invalid):
        Decoder(no_cell).decode(sent)


def test_addresses_rows_and_views_crossing():
    assert crossed(netaddr.IPAddress("2001:db8::1")) == netaddr.IPAddress("2001:db8::1")
    assert crossed(netaddr.IPNetwork("192.0.2.0/24")) == netaddr.IPNetwork("192.0.2.0/24")
    assert crossed({"a": 1}.keys()) == ["a"]
    row = crossed(result_tuple(["uuid", "count"])(("x", 3)))
    assert (row.uuid, row.count, row[1], row._mapping["uuid"]) == ("x", 3, 3, "x")


def test_coerced_containers_crossing_become_plain():
    instance = objects.Instance(metadata={"a": "b"})
    assert type(crossed(instance.metadata)) is dict


def test_conditions_crossing_keep_their_values():
    out = crossed(api.constraint(host=api.equal_any("a", None), task_state=api.not_equal("deleting")))
    assert isinstance(out, api.Constraint)
    assert isinstance(out.conditions["host"], api.EqualityCondition)
    assert out.conditions["host"].values == ("a", None)
    assert out.conditions["task_state"].values == ("deleting",)


def test_context_crossing_keeps_identity_and_drops_secrets():
    context = nova.context.RequestContext("user", "project", is_admin=False, read_deleted="only", auth_token="secret")
    sent = Encoder().encode([context, {"again": context}])
    assert "secret" not in json.dumps(sent)
    first, second = Decoder(no_cell).decode(sent)
    assert first is second["again"]
    assert (first.user_id, first.project_id, first.is_admin, first.read_deleted) == ("user", "project", False, "only")
    assert first.request_id == context.request_id
    assert first.timestamp == context.timestamp
    assert first.db_connection is None


def test_targeted_context_crossing_is_targeted_at_the_same_cell():
    context = nova.context.get_admin_context()
    context.db_connection = api.create_context_manager("sqlite:////somewhere/cell1")
    context.cell_uuid = "cell-1"
    asked = []
    out = crossed(context, lambda url: asked.append(url) or "manager of the cell")
    assert asked == ["sqlite:////somewhere/cell1"]
    assert (out.db_connection, out.cell_uuid) == ("manager of the cell", "cell-1")


def test_nova_object_crossing_keeps_fields_changes_and_context():
    context = nova.context.get_admin_context()
    groups = objects.SecurityGroupList()
    groups.objects = [objects.SecurityGroup(name="web")]
    instance = objects.Instance(context, uuid=str(uuid.uuid4()), host="h", security_groups=groups)
    out, again = crossed([instance, instance])
    assert out is again
    assert out.obj_what_changed() == instance.obj_what_changed()
    assert out.security_groups[0].name == "web"
    assert not out.obj_attr_is_set("node")
    assert out._context.request_id == context.request_id


def detached(model, **key):
    """As a model is after its session was closed."""
    from sqlalchemy.orm import Session, make_transient_to_detached

    make_transient_to_detached(model)
    session = Session()
    session.add(model)
    session.expunge(model)
    return model


def test_model_crossing_keeps_what_is_loaded():
    group = models.SecurityGroup(id=5, name="web")
    instance = models.Instance(id=7, uuid="u", host="h", security_groups=[group, group], info_cache=None)
    detached(instance)
    out = crossed(instance)
    assert isinstance(out, models.Instance)
    assert out.host == out["host"] == out.get("host") == "h"
    assert out.name == "instance-00000007"
    assert out.security_groups[0] is out.security_groups[1]
    assert out.info_cache is None
    with pytest.raises(DetachedInstanceError):
        _ = out.metadata
    with pytest.raises(DetachedInstanceError):
        _ = out.node


def test_model_never_saved_reads_unset_columns_as_none():
    out = crossed(models.InstanceExtra(instance_uuid="u"))
    assert out.flavor is None
    assert out.instance is None


def test_deferred_column_of_saved_model_stays_absent():
    extra = detached(models.InstanceExtra(id=3, instance_uuid="u"))
    out = crossed(extra)
    assert "flavor" not in out.__dict__
    with pytest.raises(DetachedInstanceError):
        _ = out.flavor


def test_models_pointing_at_each_other_cross():
    instance = models.Instance(id=1, uuid="u")
    instance.info_cache = models.InstanceInfoCache(id=2, instance_uuid="u", instance=instance)
    out = crossed({"one": instance, "other": instance.info_cache})
    assert out["one"].info_cache is out["other"]
    assert out["other"].instance is out["one"]


def test_model_of_api_database_crosses():
    out = crossed(api_models.Flavors(id=1, name="m1", extra_specs=[api_models.FlavorExtraSpecs(key="a", value="b")]))
    assert out.extra_specs[0].value == "b"


def test_nova_exception_crosses_with_message_and_kwargs():
    out = crossed(exception.UnexpectedTaskStateError(instance_uuid="u", expected={"task_state": [None]}, actual={}))
    assert type(out) is exception.UnexpectedTaskStateError
    assert out.kwargs["expected"] == {"task_state": [None]}
    assert "u" in out.format_message()


def test_database_exceptions_cross_with_their_fields():
    out = crossed(db_exception.DBDuplicateEntry(columns=["host", "binary"], value="x"))
    assert type(out) is db_exception.DBDuplicateEntry
    assert (out.columns, out.value) == (["host", "binary"], "x")
    assert type(crossed(db_exception.DBDeadlock())) is db_exception.DBDeadlock
    assert type(crossed(Conflict("no", part=1))) is Conflict


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("k"), TypeError()])
def test_builtin_exception_crosses_as_itself(error):
    out = crossed(error)
    assert (type(out), out.args) == (type(error), error.args)


class Homemade(Exception):
    pass


def test_exception_of_other_module_becomes_remote_failure_that_names_it():
    out = crossed(Homemade("text"))
    assert type(out) is RemoteFailure
    assert "Homemade" in str(out)
    assert "text" in str(out)


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "eval", "nothing", "object"])
def test_exception_that_is_none_is_not_rebuilt(name):
    sent = {TAG: "error", "module": "builtins", "name": name, "args": ["x"], "state": {}}
    assert type(Decoder(no_cell).decode(sent)) is RemoteFailure


def test_exception_of_foreign_module_is_not_imported():
    sent = {TAG: "error", "module": "this", "name": "Zen", "args": [], "state": {}}
    assert type(Decoder(no_cell).decode(sent)) is RemoteFailure
    assert "this" not in __import__("sys").modules


def test_decimal_special_values_cross():
    assert crossed(decimal.Decimal("-Infinity")) == decimal.Decimal("-Infinity")
