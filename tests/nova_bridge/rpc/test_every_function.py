"""Every public function of nova.db.main.api through the RPC door gives what it gives on stock SQLite."""

import pytest
import scenario
from lockstep import Lockstep

from nova_bridge.rpc.methods import LOCAL, public_functions


@pytest.fixture(scope="module")
def finished(client):
    """The whole scenario, run once, for its parts need each other: the Lockstep and what each part raised."""
    call = Lockstep(client)
    raised = {}
    for part in scenario.PARTS:
        try:
            part(call)
        except Exception as error:
            raised[part] = error
    return call, raised


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
