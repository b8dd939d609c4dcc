"""Every public function of nova.db.main.api through the RPC door gives what it gives on stock SQLite."""

import pytest
import scenario
from lockstep import Lockstep
from nova_databases import PipeChannel, copy_of, url_of, use_databases

from nova_bridge.rpc.client import NovaDbClient
from nova_bridge.rpc.methods import LOCAL, public_functions


@pytest.fixture(scope="module", params=["stock SQLite", "SQL door"])
def finished(request, template, tmp_path_factory, nova_conf):
    """The whole scenario, run once, for its parts need each other: the Lockstep and what each part raised.

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
    raised = {}
    for part in scenario.PARTS:
        try:
            part(call)
        except Exception as error:
            raised[part] = error
    yield call, raised
    channel.close()


@pytest.mark.parametrize("part", scenario.PARTS, ids=lambda part: part.__name__)
def test_part_of_scenario_through_door_equals_stock_sqlite(finished, part):
    _, raised = finished
    if part in raised:
        raise raised[part]


def test_scenario_every_public_function_called(finished):
    call, _ = finished
    assert call.called == set(public_functions()) - LOCAL


def test_local_functions_exist_in_this_release_and_run_no_query():
    assert set(public_functions()) >= LOCAL
