"""The catalogue: what is shipped is all that opens a transaction in the Nova that is installed, and nothing else."""

import re
from pathlib import Path

import nova
import sqlalchemy

from nova_bridge.rpc.methods import Kind, catalogue, opens_transaction

OPENS = re.compile(
    r"context_manager\.(reader|writer)|pick_context_manager_|select_db_reader_mode|get_context_manager\("
)


def test_no_other_module_of_nova_opens_transactions(methods_of_nova):
    root = Path(nova.__file__).parent
    found = set()
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).with_suffix("").parts
        if parts[0] not in ("tests", "db") and OPENS.search(file.read_text()):
            found.add(".".join(("nova", *parts)))
    assert found == {method.module for method in methods_of_nova.object_methods.values()}


def test_methods_whose_bodies_open_transactions_found(methods_of_nova):
    for module, name, kind in (
        ("nova.objects.host_mapping", "HostMapping._get_cell_mapping", Kind.INSTANCE),
        ("nova.objects.aggregate", "_metadata_add_to_db", Kind.FUNCTION),
        ("nova.objects.block_device", "BlockDeviceMapping.populate_uuids", Kind.CLASS),
        ("nova.objects.pci_device", "PciDevice._create_uuid", Kind.STATIC),
    ):
        assert methods_of_nova.object_methods[module, name].kind is kind


def test_methods_whose_functions_are_run_again_are_found_as_before():
    """A plugin in the URL takes the catalogue when an engine is made; `nova_bridge.sql.rerun` was there before it."""
    sqlalchemy.create_engine("lucd+memory:///methods").dispose()
    found = catalogue().object_methods
    for module, name in (
        ("nova.objects.aggregate", "_aggregate_create_in_db"),
        ("nova.compute.api", "API._create_reqspec_buildreq_instmapping"),
    ):
        assert (module, name) in found


def test_method_without_a_transaction_of_its_own_is_not_shipped(methods_of_nova):
    assert ("nova.objects.instance", "Instance.save") not in methods_of_nova.object_methods
    assert ("nova.objects.flavor", "Flavor._flavor_get_query_from_db") not in methods_of_nova.object_methods
    assert not opens_transaction(lambda context: context)
