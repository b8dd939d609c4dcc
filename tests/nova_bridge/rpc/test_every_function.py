"""Every public function of nova.db.main.api, and every object method that opens a transaction of its own, gives through
the RPC door what it gives on stock SQLite."""

import object_scenario
import pytest
import scenario
from lockstep import Lockstep
from nova_databases import PipeChannel, copy_of, url_of, use_databases

from nova_bridge.rpc.client import NovaDbClient
from nova_bridge.rpc.methods import LOCAL, public_functions


def run(call, parts):
    """What each part raised. They are run once, in order, for they need each other."""
    raised = {}
    for part in parts:
        try:
            part(call)
        except Exception as error:
            raised[part] = error
    return raised


@pytest.fixture(scope="module", params=["stock SQLite", "SQL door"])
def functions(request, template, tmp_path_factory, nova_conf):
    """The scenario of functions: the Lockstep, and what each part raised.

    Here the calls go to stock SQLite; the worker has a copy of the same empty database, or its like on the SQL door.
    """
    root = tmp_path_factory.mktemp("databases")
    use_databases(nova_conf, copy_of(template, root / "here"))
    if request.param == "stock SQLite":
        there = copy_of(template, root / "there")
        channel = PipeChannel(url_of(there, "main"), url_of(there, "api"))
    else:
        channel = PipeChannel("lucd+memory:///nova_cell1", "lucd+memory:///nova_api")
    call = Lockstep(NovaDbClient(channel), any_order=request.param == "SQL door")
    yield call, run(call, scenario.PARTS)
    channel.close()


@pytest.fixture(scope="module")
def methods(template, tmp_path_factory, nova_conf):
    """The scenario of object methods, the same way, with stock SQLite on both sides."""
    root = tmp_path_factory.mktemp("databases")
    here, there = copy_of(template, root / "here"), copy_of(template, root / "there")
    use_databases(nova_conf, here)
    channel = PipeChannel(url_of(there, "main"), url_of(there, "api"))
    call = Lockstep(NovaDbClient(channel))
    yield call, run(call, object_scenario.PARTS)
    channel.close()


@pytest.mark.parametrize("part", scenario.PARTS, ids=lambda part: part.__name__)
def test_functions_through_door_equal_stock_sqlite(functions, part):
    _, raised = functions
    if part in raised:
        raise raised[part]


@pytest.mark.parametrize("part", object_scenario.PARTS, ids=lambda part: part.__name__)
def test_object_methods_through_door_equal_stock_sqlite(methods, part):
    _, raised = methods
    if part in raised:
        raise raised[part]


def test_scenario_every_public_function_called(functions):
    call, _ = functions
    assert call.called == set(public_functions()) - LOCAL


def test_scenario_every_object_method_called(methods, methods_of_nova):
    call, _ = methods
    assert call.methods_called == set(methods_of_nova.object_methods)


def test_local_functions_exist_in_this_release_and_run_no_query():
    assert set(public_functions()) >= LOCAL
