"""Calls of every method outside nova.db.main.api that opens a transaction of its own, in an order that makes sense.

Each part takes `call`, a Lockstep, and names methods as "module.name" below nova.objects.
"""

from nova import exception, objects
from nova.db.main import api
from nova.objects import virtual_interface
from scenario import ADMIN, NOBODY, NOON, USER, instance_values, node_values, uuid_of

A, B = uuid_of(1), uuid_of(2)
CELL = uuid_of(50)


def aggregates(call):
    created = call.method("aggregate._aggregate_create_in_db", ADMIN, {"name": "a", "uuid": uuid_of(1)}, {"az": "az1"})
    call.method("aggregate._aggregate_create_in_db", ADMIN, {"name": "b", "uuid": uuid_of(2)})
    again = {"name": "a", "uuid": uuid_of(3)}
    call.method_fails("aggregate._aggregate_create_in_db", exception.AggregateNameExists, ADMIN, again)
    call.method("aggregate._host_add_to_db", ADMIN, created.id, "host-1")
    call.method_fails("aggregate._host_add_to_db", exception.AggregateHostExists, ADMIN, created.id, "host-1")
    call.method("aggregate._metadata_add_to_db", ADMIN, created.id, {"trait:HW": "required", "az": "az2"})
    call.method("aggregate._aggregate_get_from_db", ADMIN, created.id)
    call.method_fails("aggregate._aggregate_get_from_db", exception.AggregateNotFound, ADMIN, 99)
    call.method("aggregate._aggregate_get_from_db_by_uuid", ADMIN, uuid_of(1))
    call.method("aggregate._aggregate_update_to_db", ADMIN, created.id, {"name": "c", "metadata": {"x": "y"}})
    call.method("aggregate._get_all_from_db", ADMIN)
    call.method("aggregate._get_by_host_from_db", ADMIN, "host-1", key="az")
    call.method("aggregate._get_by_metadata_from_db", ADMIN, key="az")
    call.method("aggregate._get_non_matching_by_metadata_keys_from_db", ADMIN, ["none"], "trait:", "required")
    call.method("aggregate._metadata_delete_from_db", ADMIN, created.id, "x")
    missing = exception.AggregateMetadataNotFound
    call.method_fails("aggregate._metadata_delete_from_db", missing, ADMIN, created.id, "x")
    call.method("aggregate._host_delete_from_db", ADMIN, created.id, "host-1")
    call.method_fails("aggregate._host_delete_from_db", exception.AggregateHostNotFound, ADMIN, created.id, "host-1")
    call.method("aggregate._aggregate_delete_from_db", ADMIN, 2)


def flavors(call):
    values = {"name": "m1", "flavorid": "1", "memory_mb": 512, "vcpus": 1, "root_gb": 1, "ephemeral_gb": 0}
    more = {"extra_specs": {"hw:a": "b"}, "projects": ["project-1"], "is_public": False}
    created = call.method("flavor._flavor_create", ADMIN, values | more)
    call.method_fails("flavor._flavor_create", exception.FlavorIdExists, ADMIN, values | {"name": "m2"})
    call.method_fails("flavor._flavor_create", exception.FlavorExists, ADMIN, values | {"flavorid": "2"})
    number = created["id"]
    call.method("flavor._flavor_add_project", ADMIN, number, "project-2")
    call.method_fails("flavor._flavor_add_project", exception.FlavorAccessExists, ADMIN, number, "project-2")
    call.method("flavor._get_projects_from_db", ADMIN, "1")
    call.method("flavor._flavor_del_project", ADMIN, number, "project-2")
    call.method_fails("flavor._flavor_del_project", exception.FlavorAccessNotFound, ADMIN, number, "project-2")
    call.method("flavor._flavor_extra_specs_add", ADMIN, number, {"hw:a": "c", "hw:d": "e"})
    call.method("flavor._flavor_extra_specs_del", ADMIN, number, "hw:d")
    call.method_fails("flavor._flavor_extra_specs_del", exception.FlavorExtraSpecsNotFound, ADMIN, number, "hw:d")
    call.method("flavor.Flavor._flavor_get_from_db", ADMIN, number)
    call.method("flavor.Flavor._flavor_get_by_name_from_db", USER, "m1")
    call.method_fails("flavor.Flavor._flavor_get_by_name_from_db", exception.FlavorNotFoundByName, ADMIN, "none")
    call.method("flavor.Flavor._flavor_get_by_flavor_id_from_db", ADMIN, "1")
    call.method("flavor._flavor_get_all_from_db", ADMIN, False, {"min_memory_mb": 1}, "flavorid", "asc", 10, None)
    marker = (ADMIN, False, None, "flavorid", "asc", 10, "none")
    call.method_fails("flavor._flavor_get_all_from_db", exception.MarkerNotFound, *marker)
    flavor = objects.Flavor(ADMIN, id=number, name="m1", flavorid="1", extra_specs={"hw:a": "c"})
    call.method("flavor.Flavor._save", flavor, ADMIN, {"description": "changed"})
    call.method("flavor._flavor_destroy", ADMIN, flavorid="1")
    call.method_fails("flavor._flavor_destroy", exception.FlavorNotFound, ADMIN, flavorid="1")


def mappings(call):
    values = {"uuid": CELL, "name": "cell1", "transport_url": "none:///", "database_connection": "none:///"}
    cell = call.method("cell_mapping.CellMapping._create_in_db", ADMIN, values)
    call.method("cell_mapping.CellMapping._create_in_db", ADMIN, values | {"uuid": uuid_of(51), "disabled": True})
    call.method("cell_mapping.CellMapping._save_in_db", ADMIN, uuid_of(51), {"name": "old"})
    call.method("cell_mapping.CellMapping._get_by_uuid_from_db", ADMIN, CELL)
    not_found = exception.CellMappingNotFound
    call.method_fails("cell_mapping.CellMapping._get_by_uuid_from_db", not_found, ADMIN, NOBODY)
    call.method("cell_mapping.CellMappingList._get_all_from_db", ADMIN)
    call.method("cell_mapping.CellMappingList._get_by_disabled_from_db", ADMIN, True)
    host = {"host": "host-1", "cell_id": cell.id}
    mapping = call.method("host_mapping.HostMapping._create_in_db", ADMIN, host)
    call.method("host_mapping.HostMapping._get_by_host_from_db", ADMIN, "host-1")
    call.method_fails("host_mapping.HostMapping._get_by_host_from_db", exception.HostMappingNotFound, ADMIN, "host-9")
    found = objects.HostMapping(ADMIN, id=mapping.id, host="host-1")
    call.method("host_mapping.HostMapping._get_cell_mapping", found)
    call.method("host_mapping.HostMapping._save_in_db", ADMIN, found, {"host": "host-2"})
    call.method("host_mapping.HostMappingList._get_from_db", ADMIN, cell_id=cell.id)
    call.method("host_mapping.HostMapping._destroy_in_db", ADMIN, "host-2")
    instance_mappings(call, cell.id)
    call.method("cell_mapping.CellMapping._destroy_in_db", ADMIN, uuid_of(51))


def instance_mappings(call, cell_id):
    one, many = "instance_mapping.InstanceMapping", "instance_mapping.InstanceMappingList"
    for number in (1, 2, 3):
        values = {"instance_uuid": uuid_of(number), "project_id": "project-1", "user_id": f"user-{number % 2}"}
        call.method(f"{one}._create_in_db", ADMIN, values | {"cell_id": cell_id, "queued_for_delete": False})
    call.method(f"{one}._save_in_db", ADMIN, B, {"queued_for_delete": True})
    call.method(f"{one}._get_by_instance_uuid_from_db", ADMIN, A)
    call.method_fails(f"{one}._get_by_instance_uuid_from_db", exception.InstanceMappingNotFound, ADMIN, NOBODY)
    call.method(f"{many}._get_by_project_id_from_db", ADMIN, "project-1")
    call.method(f"{many}._get_by_cell_id_from_db", ADMIN, cell_id)
    call.method(f"{many}._get_by_instance_uuids_from_db", ADMIN, [A, B])
    call.method(f"{many}._get_not_deleted_by_cell_and_project_from_db", ADMIN, CELL, "project-1", 10)
    call.method(f"{many}._get_counts_in_db", ADMIN, "project-1", user_id="user-1")
    call.method(f"{many}._get_count_by_uuids_and_user_in_db", ADMIN, [A, B], "user-1")
    call.method("cell_mapping.CellMappingList._get_by_project_id_from_db", ADMIN, "project-1")
    call.method("instance_mapping.populate_user_id", ADMIN, 10)
    call.method("instance_mapping.populate_queued_for_delete", ADMIN, 10)
    call.method("nova.quota._user_id_queued_for_delete_populated", ADMIN, project_id="project-1")
    call.method(f"{one}._destroy_in_db", ADMIN, A)
    call.method(f"{many}._destroy_bulk_in_db", ADMIN, [B, uuid_of(3)])


def requests(call):
    build, spec = "build_request.BuildRequest", "request_spec.RequestSpec"
    values = {"instance_uuid": A, "project_id": "project-1", "instance": "{}"}
    created = call.method(f"{build}._create_in_db", ADMIN, values)
    call.method(f"{build}._get_by_instance_uuid_from_db", ADMIN, A)
    call.method_fails(f"{build}._get_by_instance_uuid_from_db", exception.BuildRequestNotFound, ADMIN, NOBODY)
    changed = objects.BuildRequest(ADMIN, id=created.id, instance_uuid=A)
    call.method(f"{build}._save_in_db", changed, ADMIN, created.id, {"project_id": "project-2"})
    call.method("build_request.BuildRequestList._get_all_from_db", ADMIN)
    call.method(f"{build}._destroy_in_db", ADMIN, A)
    for uuid in (A, B):
        call.method(f"{spec}._create_in_db", ADMIN, {"instance_uuid": uuid, "spec": "{}"})
    call.method(f"{spec}._save_in_db", ADMIN, A, {"spec": '{"a": 1}'})
    call.method(f"{spec}._get_by_instance_uuid_from_db", ADMIN, A)
    call.method_fails(f"{spec}._get_by_instance_uuid_from_db", exception.RequestSpecNotFound, ADMIN, NOBODY)
    call.method(f"{spec}._get_by_instance_uuids_from_db", ADMIN, [A, B])
    call.method(f"{spec}._destroy_in_db", ADMIN, A)
    call.method(f"{spec}._destroy_bulk_in_db", ADMIN, [B])
    new = objects.RequestSpec(ADMIN, instance_uuid=A, num_instances=1, project_id="project-1")
    instance = objects.Instance(ADMIN, uuid=A, project_id="project-1")
    request = objects.BuildRequest(ADMIN, instance=instance, project_id="project-1", instance_uuid=A)
    mapping = objects.InstanceMapping(ADMIN, instance_uuid=A, project_id="project-1", user_id="user-1")
    call.method("nova.compute.api.API._create_reqspec_buildreq_instmapping", ADMIN, new, request, mapping)


def groups_and_keys(call):
    one, many = "instance_group.InstanceGroup", "instance_group.InstanceGroupList"
    values = {"uuid": uuid_of(1), "name": "g", "project_id": "project-1", "user_id": "user-1"}
    policy = {"policy": "anti-affinity", "rules": {"max_server_per_host": 2}}
    created = call.method(f"{one}._create_in_db", ADMIN, values, members=[A], **policy)
    call.method_fails(f"{one}._create_in_db", exception.InstanceGroupIdExists, ADMIN, values)
    call.method(f"{one}._get_from_db_by_uuid", ADMIN, uuid_of(1))
    call.method_fails(f"{one}._get_from_db_by_uuid", exception.InstanceGroupNotFound, ADMIN, NOBODY)
    call.method(f"{one}._get_from_db_by_id", ADMIN, created.id)
    call.method(f"{one}._get_from_db_by_name", ADMIN, "g")
    call.method(f"{one}._get_from_db_by_instance", ADMIN, A)
    call.method(f"{one}._save_in_db", ADMIN, uuid_of(1), {"name": "h", "members": [A, B]})
    call.method(f"{one}._add_members_in_db", ADMIN, uuid_of(1), [uuid_of(3)])
    call.method(f"{many}._get_from_db", ADMIN, project_id="project-1")
    call.method(f"{many}._get_counts_from_db", ADMIN, "project-1", user_id="user-1")
    call.method(f"{one}._remove_members_in_db", ADMIN, created.id, [A])
    call.method(f"{one}._destroy_members_bulk_in_db", ADMIN, [B])
    call.method(f"{one}._destroy_in_db", ADMIN, uuid_of(1))
    key = {"user_id": "user-1", "name": "k", "public_key": "p", "fingerprint": "f", "type": "ssh"}
    call.method("keypair._create_in_db", ADMIN, key)
    call.method_fails("keypair._create_in_db", exception.KeyPairExists, ADMIN, key)
    call.method("keypair._get_from_db", ADMIN, "user-1", name="k")
    call.method("keypair._get_from_db", ADMIN, "user-1", limit=5)
    call.method_fails("keypair._get_from_db", exception.KeypairNotFound, ADMIN, "user-1", name="none")
    call.method("keypair._get_count_from_db", ADMIN, "user-1")
    call.method("keypair._destroy_in_db", ADMIN, "user-1", "k")


def quotas(call):
    quota = "quotas.Quotas"
    call.method(f"{quota}._create_limit_in_db", ADMIN, "project-1", "cores", 5)
    call.method(f"{quota}._create_limit_in_db", ADMIN, "project-1", "ram", 6, user_id="user-1")
    call.method_fails(f"{quota}._create_limit_in_db", exception.QuotaExists, ADMIN, "project-1", "cores", 5)
    call.method(f"{quota}._update_limit_in_db", ADMIN, "project-1", "cores", 7)
    not_found = exception.ProjectQuotaNotFound
    call.method_fails(f"{quota}._update_limit_in_db", not_found, ADMIN, "project-9", "cores", 7)
    call.method(f"{quota}._get_from_db", ADMIN, "project-1", "cores")
    call.method(f"{quota}._get_from_db", ADMIN, "project-1", "ram", user_id="user-1")
    call.method(f"{quota}._get_all_from_db", ADMIN, "project-1")
    call.method(f"{quota}._get_all_from_db_by_project", ADMIN, "project-1")
    call.method(f"{quota}._get_all_from_db_by_project_and_user", ADMIN, "project-1", "user-1")
    call.method(f"{quota}._create_class_in_db", ADMIN, "gold", "cores", 8)
    call.method_fails(f"{quota}._create_class_in_db", exception.QuotaClassExists, ADMIN, "gold", "cores", 8)
    call.method(f"{quota}._update_class_in_db", ADMIN, "gold", "cores", 9)
    call.method(f"{quota}._get_class_from_db", ADMIN, "gold", "cores")
    call.method(f"{quota}._get_all_class_from_db_by_name", ADMIN, "gold")
    call.method(f"{quota}._destroy_all_in_db_by_project_and_user", ADMIN, "project-1", "user-1")
    call.method(f"{quota}._destroy_all_in_db_by_project", ADMIN, "project-1")
    for name in ("instances", "cores"):
        call("quota_create", ADMIN, "project-2", name, 3)
        call("quota_create", ADMIN, "project-2", name, 3, user_id="user-1")
        call("quota_class_create", ADMIN, "silver", name, 4)
    limits = call.method("quotas._get_main_per_project_limits", ADMIN, 10)
    call.method("quotas._create_limits_in_api_db", ADMIN, limits)
    call.method("quotas._destroy_main_per_project_limits", ADMIN, "project-2", "cores")
    limits = call.method("quotas._get_main_per_user_limits", ADMIN, 10)
    call.method("quotas._create_limits_in_api_db", ADMIN, limits, per_user=True)
    call.method("quotas._destroy_main_per_user_limits", ADMIN, "project-2", "cores", "user-1")
    classes = call.method("quotas._get_main_quota_classes", ADMIN, 10)
    call.method("quotas._create_classes_in_api_db", ADMIN, classes)
    call.method("quotas._destroy_main_quota_classes", ADMIN, classes)


def cell_database(call):
    service = {"host": "host-1", "binary": "nova-compute", "topic": "compute", "report_count": 0, "version": 60}
    call("service_create", ADMIN, service)
    call.method("service.Service._db_service_get_by_compute_host", ADMIN, "host-1", use_slave=False)
    call.method("service.Service._db_service_get_minimum_version", ADMIN, ["nova-compute"], use_slave=True)
    call("compute_node_create", ADMIN, node_values(1))
    call.method("compute_node.ComputeNodeList._db_compute_node_get_all_by_host", ADMIN, "host-1")
    call.method("compute_node.ComputeNodeList._db_compute_node_get_all_by_uuids", ADMIN, [uuid_of(201)])
    call.method("compute_node.ComputeNodeList._db_compute_node_get_by_hv_type", ADMIN, "fake")
    call.method("compute_node.migrate_empty_ratio", ADMIN, 10)
    for number, uuid in ((1, A), (2, B)):
        call("instance_create", USER, instance_values(uuid, number, vm_state="active"))
    instance, many = "instance.Instance", "instance.InstanceList"
    call.method(f"{instance}._db_instance_get_by_uuid", ADMIN, A, ["metadata", "extra.flavor"], use_slave=True)
    call.method(f"{many}._get_by_filters_impl", ADMIN, {"project_id": "project-1"}, expected_attrs=["metadata"])
    call.method(f"{many}._db_instance_get_all_by_host", ADMIN, "host-1", ["info_cache"])
    call.method(f"{many}._get_uuids_by_host_and_node", ADMIN, "host-1", "node-1")
    window = (ADMIN, NOON, None, None, "host-1", ["system_metadata"])
    call.method(f"{many}._db_instance_get_active_by_window_joined", *window)
    call.method(f"{many}._get_count_by_vm_state_in_db", ADMIN, "project-1", "user-1", "active")
    call.method(f"{many}._get_counts_in_db", ADMIN, "project-1", user_id="user-1")
    call.method(f"{many}._get_count_by_hosts", ADMIN, ["host-1", "host-2"])
    call.method("instance.populate_missing_availability_zones", ADMIN, 10)
    call.method("instance.populate_instance_compute_id", ADMIN, 10)
    call.method("security_group.SecurityGroupList._get_counts_from_db", ADMIN, "project-1", user_id="user-1")
    call("virtual_interface_create", ADMIN, {"address": "fa:16:3e:00:00:01", "instance_uuid": A, "uuid": uuid_of(300)})
    call.method("virtual_interface.VirtualInterfaceList._db_virtual_interface_get_by_instance", ADMIN, A)
    # It would make this instance itself, in a way that a SQLite file does not allow: two writers at once.
    call("instance_create", USER, instance_values(virtual_interface.FAKE_UUID, 9))
    call.method("virtual_interface._set_or_delete_marker_for_migrate_instances", ADMIN, marker=A)
    call.method("virtual_interface._get_marker_for_migrate_instances", ADMIN)
    migration = {"instance_uuid": A, "status": "finished", "dest_compute": "host-2", "uuid": uuid_of(400)}
    call("migration_create", ADMIN, migration)
    call.method("migration.MigrationList._db_migration_get_unconfirmed_by_dest_compute", ADMIN, 3600, "host-2")


def devices(call):
    device = {"instance_uuid": A, "source_type": "volume", "device_name": "/dev/vda", "volume_id": uuid_of(600)}
    made = call("block_device_mapping_create", ADMIN, device | {"uuid": uuid_of(601)}, legacy=False)
    many = "block_device.BlockDeviceMappingList._db_block_device_mapping_get_all_by"
    call.method(f"{many}_instance_uuids", ADMIN, [A, B])
    call.method(f"{many}_instance", ADMIN, A, use_slave=True)
    call.method(f"{many}_volume", ADMIN, uuid_of(600))
    call.method("block_device.BlockDeviceMapping.populate_uuids", ADMIN, 10)
    # As if somebody else had been first: the uuid in the database is the answer.
    assert call.method("block_device.BlockDeviceMapping._create_uuid", ADMIN, made.id) == uuid_of(601)
    values = {
        "compute_node_id": 1,
        "address": "0000:81:00.0",
        "product_id": "1",
        "vendor_id": "1",
        "uuid": uuid_of(700),
    }
    values |= {"dev_type": "type-PCI", "status": "available", "dev_id": "pci", "label": "l", "extra_info": "{}"}
    made = call("pci_device_update", ADMIN, 1, values["address"], values)
    call.method("pci_device.PciDevice.populate_dev_uuids", ADMIN, 10)
    assert call.method("pci_device.PciDevice._create_uuid", ADMIN, made.id) == uuid_of(700)
    if hasattr(api, "share_mapping_get_all"):
        assert call("share_mapping_get_all", ADMIN) == []


def interfaces_of_all_cells(call):
    assert call.method("virtual_interface.fill_virtual_interface_list", ADMIN, 0) == (0, 0)


PARTS = [
    aggregates,
    flavors,
    mappings,
    requests,
    groups_and_keys,
    quotas,
    cell_database,
    devices,
    interfaces_of_all_cells,
]
