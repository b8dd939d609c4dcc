"""Calls of every public function of nova.db.main.api, with arguments as Nova gives them, in an order that makes sense.

Each function takes `call`, a Lockstep; what one part makes, later parts use.
"""

import datetime

import nova.context
from nova import exception, objects
from nova.db.main import api
from oslo_utils import timeutils

NOON = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC).replace(tzinfo=None)  # as Nova's columns are
ADMIN = nova.context.get_admin_context()
USER = nova.context.RequestContext("user-1", "project-1", is_admin=False)
EVERYTHING = nova.context.get_admin_context(read_deleted="yes")


def uuid_of(number):
    return f"00000000-0000-4000-8000-{number:012d}"


A, B, C, D = (uuid_of(n) for n in range(1, 5))
NOBODY = uuid_of(999)


def services(call):
    for number, (host, binary, topic) in enumerate(
        [
            ("host-1", "nova-compute", "compute"),
            ("host-2", "nova-compute", "compute"),
            ("host-1", "nova-scheduler", "scheduler"),
            ("host-3", "nova-conductor", "conductor"),
        ]
    ):
        values = {"host": host, "binary": binary, "topic": topic, "report_count": 0, "version": 60 + number}
        call("service_create", ADMIN, {**values, "uuid": uuid_of(100 + number), "last_seen_up": NOON})
    duplicate = {"host": "host-1", "binary": "nova-compute", "topic": "other", "report_count": 0}
    call.fails("service_create", exception.ServiceBinaryExists, ADMIN, duplicate)
    call.fails("service_create", exception.ServiceTopicExists, ADMIN, {**duplicate, "binary": "x", "topic": "compute"})
    call("service_get", ADMIN, 1)
    call.fails("service_get", exception.ServiceNotFound, ADMIN, 99)
    call("service_get_by_uuid", ADMIN, uuid_of(101))
    call.fails("service_get_by_uuid", exception.ServiceNotFound, ADMIN, NOBODY)
    call("service_update", ADMIN, 2, {"disabled": True, "disabled_reason": "läuft nicht"})
    call("service_update", ADMIN, 1, {"report_count": 5})
    call.fails("service_update", exception.ServiceNotFound, ADMIN, 99, {"disabled": True})
    call("service_get_minimum_version", ADMIN, ["nova-compute", "nova-conductor", "nova-none"])
    assert len(call("service_get_all", ADMIN)) == 4
    assert len(call("service_get_all", ADMIN, disabled=True)) == 1
    call("service_get_all_by_topic", ADMIN, "compute")
    call("service_get_by_host_and_topic", ADMIN, "host-1", "scheduler")
    assert call("service_get_by_host_and_topic", ADMIN, "host-9", "scheduler") is None
    call("service_get_all_by_binary", ADMIN, "nova-compute")
    call("service_get_all_by_binary", ADMIN, "nova-compute", include_disabled=True)
    call("service_get_by_host_and_binary", ADMIN, "host-1", "nova-compute")
    call.fails("service_get_by_host_and_binary", exception.HostBinaryNotFound, ADMIN, "host-9", "nova-compute")
    call("service_get_all_by_host", ADMIN, "host-1")
    call("service_get_by_compute_host", ADMIN, "host-1")
    call.fails("service_get_by_compute_host", exception.ComputeHostNotFound, ADMIN, "host-9")


def node_values(number, **more):
    values = {
        "service_id": 1,
        "host": "host-1",
        "hypervisor_hostname": f"node-{number}",
        "uuid": uuid_of(200 + number),
        "vcpus": 8,
        "memory_mb": 16384,
        "local_gb": 1024,
        "vcpus_used": 1,
        "memory_mb_used": 512,
        "local_gb_used": 10,
        "free_ram_mb": 15872,
        "free_disk_gb": 1014,
        "current_workload": 0,
        "running_vms": 1,
        "disk_available_least": 900,
        "hypervisor_type": "fake",
        "hypervisor_version": 1000,
        "cpu_info": '{"arch": "x86_64"}',
        "stats": '{"io_workload": "0"}',
        "host_ip": "192.0.2.7",
        "cpu_allocation_ratio": 16.0,
        "ram_allocation_ratio": 1.5,
        "disk_allocation_ratio": 1.0,
        "mapped": 0,
        "created_at": "2026-03-01T12:00:00+00:00",
    }
    return values | more


def compute_nodes(call):
    for number in (1, 2, 3):
        call("compute_node_create", ADMIN, node_values(number))
    call("compute_node_create", ADMIN, node_values(4, host="host-2", service_id=2, host_ip="2001:DB8:0:0:0:0:0:1"))
    call("compute_node_get", ADMIN, 1)
    call.fails("compute_node_get", exception.ComputeHostNotFound, ADMIN, 99)
    call("compute_node_get_model", ADMIN, 1)
    call.fails("compute_node_get_model", exception.ComputeHostNotFound, ADMIN, 99)
    call("compute_nodes_get_by_service_id", ADMIN, 1)
    call.fails("compute_nodes_get_by_service_id", exception.ServiceNotFound, ADMIN, 99)
    call("compute_node_get_by_host_and_nodename", ADMIN, "host-1", "node-2")
    call.fails("compute_node_get_by_host_and_nodename", exception.ComputeHostNotFound, ADMIN, "host-9", "node-2")
    call("compute_node_get_by_nodename", ADMIN, "node-3")
    call.fails("compute_node_get_by_nodename", exception.ComputeHostNotFound, ADMIN, "node-9")
    assert len(call("compute_node_get_all", ADMIN)) == 4
    call("compute_node_get_all_by_host", ADMIN, "host-1")
    call.fails("compute_node_get_all_by_host", exception.ComputeHostNotFound, ADMIN, "host-9")
    call("compute_node_get_all_mapped_less_than", ADMIN, 1)
    call("compute_node_get_all_by_pagination", ADMIN, limit=2, marker=1)
    call.fails("compute_node_get_all_by_pagination", exception.MarkerNotFound, ADMIN, limit=2, marker=99)
    call("compute_node_search_by_hypervisor", ADMIN, "ode-")
    call("compute_node_update", ADMIN, 1, {"vcpus_used": 3, "free_ram_mb": 1000, "stats": "{}"})
    call.fails("compute_node_update", exception.ComputeHostNotFound, ADMIN, 99, {"vcpus_used": 3})
    call("compute_node_statistics", ADMIN)
    call("service_get_all_computes_by_hv_type", ADMIN, "fake")
    call("service_get_all_computes_by_hv_type", ADMIN, "fake", include_disabled=True)
    wrong = api.constraint(host=api.not_equal("host-2"))
    call.fails("compute_node_delete", exception.ConstraintNotMet, ADMIN, 4, constraint=wrong)
    right = api.constraint(host=api.equal_any("host-1", "host-2"))
    call("compute_node_delete", ADMIN, 4, constraint=right)
    call.fails("compute_node_delete", exception.ComputeHostNotFound, ADMIN, 99)
    # A deleted node with the same uuid comes back.
    call("compute_node_create", ADMIN, node_values(4, host="host-2", service_id=2))
    call("service_destroy", ADMIN, 2)
    call.fails("service_destroy", exception.ServiceNotFound, ADMIN, 2)


def instance_values(uuid, number, **more):
    values = {
        "uuid": uuid,
        "user_id": "user-1",
        "project_id": "project-1",
        "host": "host-1",
        "node": "node-1",
        "display_name": f"vm {number} \N{SNOWMAN}",
        "hostname": f"vm-{number}",
        "vm_state": "building",
        "task_state": "scheduling",
        "instance_type_id": 3,
        "memory_mb": 512,
        "vcpus": 1,
        "root_gb": 1,
        "ephemeral_gb": 0,
        "power_state": 0,
        "image_ref": uuid_of(500),
        "launched_at": NOON,
        "access_ip_v4": "192.0.2.44",
        "metadata": {"role": "web", "tier": "1"},
        "system_metadata": {"image_base_image_ref": uuid_of(500)},
        "info_cache": {"network_info": "[]"},
        "extra": {"flavor": '{"cur": {}}', "numa_topology": "{}"},
        "security_groups": ["default"],
    }
    return values | more


def instances(call):
    call("security_group_ensure_default", USER)
    call("instance_create", USER, instance_values(A, 1))
    aware = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)
    call("instance_create", USER, instance_values(B, 2, created_at=aware))
    none = objects.SecurityGroupList(objects=[])
    call("instance_create", USER, instance_values(C, 3, host="host-2", node="node-4", security_groups=none))
    other = nova.context.RequestContext("user-2", "project-2", is_admin=False)
    call("instance_create", other, instance_values(D, 4, project_id="project-2", user_id="user-2"))
    call.fails(
        "instance_create",
        exception.SecurityGroupNotFoundForProject,
        USER,
        instance_values(NOBODY, 9, security_groups=["missing"]),
    )
    call("instance_get_by_uuid", USER, A)
    call("instance_get_by_uuid", ADMIN, A, columns_to_join=[])
    joins = ["metadata", "system_metadata", "info_cache", "security_groups", "pci_devices", "services", "tags", "extra"]
    call("instance_get_by_uuid", ADMIN, A, columns_to_join=[*joins, "extra.flavor", "extra.numa_topology"])
    call.fails("instance_get_by_uuid", exception.InstanceNotFound, USER, NOBODY)
    call.fails("instance_get_by_uuid", exception.InstanceNotFound, USER, D)
    call.fails("instance_get_by_uuid", exception.Forbidden, nova.context.get_context(), A)
    call("instance_get", ADMIN, 2)
    call.fails("instance_get", exception.InstanceNotFound, ADMIN, 99)
    models = call("instance_get_all", ADMIN)
    assert len(models) == 4
    call("instance_get_all", ADMIN, columns_to_join=["metadata", "fault", "pci_devices"])
    call("instances_fill_metadata", ADMIN, [dict(m) for m in models], manual_joins=["metadata", "fault"])
    call("instances_fill_metadata", ADMIN, [{"uuid": A}, {"uuid": B}])
    filtered(call)
    call("instance_get_active_by_window_joined", ADMIN, NOON - datetime.timedelta(days=1), NOON, "project-1")
    call("instance_get_active_by_window_joined", ADMIN, NOON, columns_to_join=["metadata"], limit=2, marker=B)
    call("instance_get_all_by_host", ADMIN, "host-1")
    call("instance_get_all_by_host", ADMIN, "host-1", columns_to_join=["system_metadata", "tags"])
    uuids = call("instance_get_all_uuids_by_hosts", ADMIN, ["host-1", "host-9"])
    assert uuids["host-9"] == []
    call("instance_get_all_by_host_and_node", ADMIN, "host-1", "node-1", columns_to_join=["metadata"])
    call("instance_get_all_by_host_and_not_type", ADMIN, "host-1", type_id=1)


def filtered(call):
    by_filters, by_sort = "instance_get_all_by_filters", "instance_get_all_by_filters_sort"
    call(by_filters, USER, {"project_id": "project-1"})
    call(by_filters, ADMIN, {"host": ["host-1", "host-2"], "deleted": False}, sort_key="uuid", sort_dir="asc")
    call(by_filters, ADMIN, {"metadata": {"role": "web"}}, limit=2, columns_to_join=["metadata", "fault"])
    call(by_filters, ADMIN, {"name": "vm [12]"})
    call(by_filters, ADMIN, {"uuid": [A, B]}, columns_to_join=[])
    call(by_filters, ADMIN, {"changes-since": NOON})
    call(by_filters, ADMIN, {"task_state": set()})
    call(by_filters, ADMIN, {"host": "host-1"}, marker=A, limit=5)
    call.fails(by_filters, exception.MarkerNotFound, ADMIN, {}, marker=NOBODY, limit=5)
    call(by_sort, ADMIN, {}, limit=3, sort_keys=["display_name", "uuid"], sort_dirs=["desc", "asc"])
    call.fails(by_sort, exception.InvalidSortKey, ADMIN, {}, limit=3, sort_keys=["no such column"])
    call("instance_get_by_sort_filters", ADMIN, ["display_name"], ["asc"], ["vm 2"])


def instance_updates(call):
    call("instance_update", ADMIN, A, {"vm_state": "active", "task_state": None, "expected_task_state": "scheduling"})
    conflict = {"task_state": "rebooting", "expected_task_state": ["scheduling", "building"]}
    call.fails("instance_update", exception.UnexpectedTaskStateError, ADMIN, A, conflict)
    expected = {"host": "host-7"}
    call.fails("instance_update", exception.InstanceUpdateConflict, ADMIN, A, {"host": "host-8"}, expected=expected)
    call.fails("instance_update", exception.InvalidUUID, ADMIN, "no uuid", {"host": "host-8"})
    call("instance_update", ADMIN, B, {"metadata": {"role": "db", "new": "1"}, "system_metadata": {"k": "v"}})
    joins = ["metadata", "system_metadata", "extra.flavor"]
    changes = {"power_state": 1, "metadata": {"role": "web"}, "launched_at": "2026-03-02T00:00:00.000000"}
    original, changed = call("instance_update_and_get_original", ADMIN, A, changes, columns_to_join=joins)
    assert (original.power_state, changed.power_state) == (0, 1)
    call("instance_update_and_get_original", ADMIN, A, {"system_metadata": {"a": "b"}}, columns_to_join=joins)
    deleting = {"task_state": "deleting"}
    call("instance_update_and_get_original", ADMIN, A, deleting, expected={"task_state": None})
    name = "instance_update_and_get_original"
    wanted = {"task_state": "rebooting", "expected_task_state": None}
    call.fails(name, exception.UnexpectedDeletingTaskStateError, ADMIN, A, wanted)
    call.fails(name, exception.InstanceNotFound, ADMIN, NOBODY, {"host": "x"})
    old = timeutils.utcnow() - datetime.timedelta(hours=2)
    call("instance_update", ADMIN, A, {"task_state": "rebooting", "updated_at": old})
    call("instance_get_all_hung_in_rebooting", ADMIN, 10)
    call("instance_update", ADMIN, A, {"task_state": None})
    call("instance_info_cache_get", ADMIN, A)
    assert call("instance_info_cache_get", ADMIN, NOBODY) is None
    call("instance_info_cache_update", ADMIN, A, {"network_info": '[{"id": "x"}]', "updated_at": None})
    call("instance_info_cache_delete", ADMIN, B)
    call.fails("instance_info_cache_update", exception.InstanceInfoCacheNotFound, EVERYTHING, B, {"network_info": "[]"})
    call("instance_extra_update_by_uuid", ADMIN, A, {"pci_requests": "[]", "flavor": '{"cur": {"name": "m1"}}'})
    call("instance_extra_get_by_instance_uuid", ADMIN, A)
    call("instance_extra_get_by_instance_uuid", ADMIN, A, columns=["pci_requests", "flavor"])
    assert call("instance_extra_get_by_instance_uuid", ADMIN, NOBODY) is None


def metadata(call):
    call("instance_metadata_get", ADMIN, A)
    call("instance_metadata_update", ADMIN, A, {"role": "cache", "more": "x"}, False)
    call("instance_metadata_update", ADMIN, B, objects.Instance(metadata={"only": "this"}).metadata, True)
    call("instance_metadata_delete", ADMIN, A, "more")
    call("instance_metadata_get", ADMIN, A)
    call("instance_system_metadata_get", ADMIN, A)
    call("instance_system_metadata_update", ADMIN, A, {"boot_roles": "reader"}, True)
    call("instance_system_metadata_get", ADMIN, A)
    call("instance_tag_add", ADMIN, A, "red")
    call("instance_tag_add", ADMIN, A, "red")
    call("instance_tag_set", ADMIN, A, ["green"])
    call("instance_tag_get_by_instance_uuid", ADMIN, A)
    assert call("instance_tag_exists", ADMIN, A, "green") is True
    call("instance_tag_exists", ADMIN, A, "red")
    call("instance_tag_delete", ADMIN, A, "green")
    call.fails("instance_tag_delete", exception.InstanceTagNotFound, ADMIN, A, "green")
    call.fails("instance_tag_add", exception.InstanceNotFound, ADMIN, NOBODY, "red")
    call("instance_tag_set", ADMIN, B, {"one"})
    call("instance_tag_delete_all", ADMIN, B)


def security_groups(call):
    values = {"name": "web", "description": "80 und 443", "user_id": "user-1", "project_id": "project-1"}
    group = call("security_group_create", USER, values)
    call.fails("security_group_create", exception.SecurityGroupExists, USER, values)
    call("security_group_get_all", ADMIN)
    call("security_group_get", USER, group.id)
    call("security_group_get", USER, group.id, columns_to_join=["instances", "rules"])
    call.fails("security_group_get", exception.SecurityGroupNotFound, USER, 99)
    call("security_group_get_by_name", USER, "project-1", "default")
    call.fails("security_group_get_by_name", exception.SecurityGroupNotFoundForProject, USER, "project-1", "none")
    call("security_group_get_by_project", USER, "project-1")
    call("instance_add_security_group", USER, A, group.id)
    call("security_group_get_by_instance", USER, A)
    call("instance_get_by_uuid", USER, A, columns_to_join=["security_groups"])
    call("security_group_get", USER, group.id, columns_to_join=["instances.info_cache"])
    assert call("security_group_in_use", USER, group.id) is True
    call("instance_remove_security_group", USER, A, group.id)
    assert call("security_group_in_use", USER, group.id) is False
    call("security_group_update", USER, group.id, {"description": "changed"})
    call.fails("security_group_update", exception.SecurityGroupNotFound, USER, 99, {"description": "changed"})
    call("security_group_destroy", USER, group.id)


def interfaces(call):
    for number, uuid in enumerate((A, A, B)):
        values = {"address": f"fa:16:3e:00:00:0{number}", "instance_uuid": uuid, "uuid": uuid_of(300 + number)}
        call("virtual_interface_create", ADMIN, values | {"network_id": 7, "tag": f"t{number}"})
    again = {"address": "fa:16:3e:00:00:00", "instance_uuid": A, "uuid": uuid_of(300)}
    call.fails("virtual_interface_create", exception.VirtualInterfaceCreateException, ADMIN, again)
    call("virtual_interface_update", ADMIN, uuid_of(300), {"tag": "nic"})
    call("virtual_interface_get", ADMIN, 1)
    assert call("virtual_interface_get", ADMIN, 99) is None
    call("virtual_interface_get_by_address", ADMIN, "fa:16:3e:00:00:01")
    call("virtual_interface_get_by_uuid", ADMIN, uuid_of(302))
    call("virtual_interface_get_by_instance", ADMIN, A)
    call("virtual_interface_get_by_instance_and_network", ADMIN, A, 7)
    call("virtual_interface_get_all", ADMIN)
    call("virtual_interface_delete", ADMIN, 1)
    call("virtual_interface_delete_by_instance", ADMIN, A)
    call("virtual_interface_get_all", ADMIN)


def block_devices(call):
    volume = {
        "instance_uuid": A,
        "source_type": "volume",
        "destination_type": "volume",
        "device_name": "/dev/vda",
        "volume_id": uuid_of(600),
        "volume_size": 10,
        "boot_index": 0,
        "delete_on_termination": True,
        "connection_info": '{"serial": "x"}',
        "uuid": uuid_of(601),
    }
    call("block_device_mapping_create", ADMIN, volume, legacy=False)
    swap = {"instance_uuid": A, "source_type": "blank", "guest_format": "swap", "device_name": "/dev/vdb"}
    call("block_device_mapping_update_or_create", ADMIN, swap | {"uuid": uuid_of(602)}, legacy=False)
    call(
        "block_device_mapping_update_or_create", ADMIN, swap | {"device_name": "/dev/vdc", "uuid": uuid_of(603)}, False
    )
    legacy = {"instance_uuid": B, "device_name": "vda", "volume_id": uuid_of(604), "uuid": uuid_of(605)}
    call("block_device_mapping_create", ADMIN, legacy | {"delete_on_termination": False, "volume_size": ""})
    call.fails("block_device_mapping_create", exception.InvalidUUID, ADMIN, volume | {"uuid": "x"}, legacy=False)
    call("block_device_mapping_update", ADMIN, 1, {"attachment_id": uuid_of(606)}, legacy=False)
    call("block_device_mapping_get_all_by_instance_uuids", ADMIN, [A, B])
    call("block_device_mapping_get_all_by_instance_uuids", ADMIN, [])
    call("block_device_mapping_get_all_by_instance", ADMIN, A)
    call("block_device_mapping_get_all_by_volume_id", ADMIN, uuid_of(600), columns_to_join=["instance"])
    call("block_device_mapping_get_by_instance_and_volume_id", ADMIN, uuid_of(600), A, columns_to_join=["instance"])
    call("block_device_mapping_destroy", ADMIN, 3)
    call("block_device_mapping_destroy_by_instance_and_volume", ADMIN, B, uuid_of(604))
    call("block_device_mapping_destroy_by_instance_and_device", ADMIN, A, "/dev/vda")
    call("block_device_mapping_get_all_by_instance", EVERYTHING, A)


def migrations(call):
    for number, (uuid, status) in enumerate([(A, "running"), (A, "error"), (B, "finished"), (C, "queued")]):
        values = {"instance_uuid": uuid, "status": status, "source_compute": "host-1", "source_node": "node-1"}
        values |= {"dest_compute": "host-2", "dest_node": "node-4", "migration_type": "live-migration"}
        call("migration_create", ADMIN, values | {"uuid": uuid_of(400 + number), "old_instance_type_id": number})
    call("migration_update", ADMIN, 3, {"updated_at": timeutils.utcnow() - datetime.timedelta(hours=3)})
    call("migration_update", ADMIN, 1, {"memory_total": 2**40})
    call.fails("migration_update", exception.MigrationNotFound, ADMIN, 99, {"status": "done"})
    call("migration_get", ADMIN, 1)
    call.fails("migration_get", exception.MigrationNotFound, ADMIN, 99)
    call("migration_get_by_uuid", ADMIN, uuid_of(401))
    call.fails("migration_get_by_uuid", exception.MigrationNotFound, ADMIN, NOBODY)
    call("migration_get_by_id_and_instance", ADMIN, 1, A)
    call.fails("migration_get_by_id_and_instance", exception.MigrationNotFoundForInstance, ADMIN, 1, B)
    call("migration_get_by_instance_and_status", ADMIN, A, "running")
    call.fails("migration_get_by_instance_and_status", exception.MigrationNotFoundByStatus, ADMIN, A, "none")
    assert len(call("migration_get_unconfirmed_by_dest_compute", ADMIN, 3600, "host-2")) == 1
    call("migration_get_in_progress_by_host_and_node", ADMIN, "host-1", "node-1")
    call("migration_get_in_progress_and_error_by_host_and_node", ADMIN, "host-2", "node-4")
    call("migration_get_in_progress_by_instance", ADMIN, A)
    call("migration_get_in_progress_by_instance", ADMIN, A, migration_type="resize")
    call("migration_get_all_by_filters", ADMIN, {"host": "host-1", "status": ["running", "error"]})
    call("migration_get_all_by_filters", ADMIN, {}, sort_keys=["uuid"], sort_dirs=["asc"], limit=2, marker=uuid_of(400))
    call.fails("migration_get_all_by_filters", exception.MarkerNotFound, ADMIN, {}, limit=2, marker=NOBODY)
    call("migration_get_by_sort_filters", ADMIN, ["source_compute"], ["asc"], ["host-1"])
    assert call("migration_migrate_to_uuid", ADMIN, 10) == (0, 0)


def faults_and_actions(call):
    for number in range(3):
        values = {"instance_uuid": A, "code": 500 + number, "message": f"no {number}", "details": "trace", "host": "h"}
        call("instance_fault_create", ADMIN, values)
    call("instance_fault_get_by_instance_uuids", ADMIN, [A, B])
    call("instance_fault_get_by_instance_uuids", ADMIN, [A, B], latest=True)
    call("instance_fault_get_by_instance_uuids", ADMIN, [])
    call("instance_get_all", ADMIN, columns_to_join=["fault"])
    aware = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)
    for number in range(3):
        values = {"action": "reboot", "instance_uuid": A, "request_id": f"req-{number}", "user_id": "user-1"}
        call("action_start", ADMIN, values | {"project_id": "project-1", "start_time": aware})
    finish = {"instance_uuid": A, "request_id": "req-0", "finish_time": aware, "updated_at": NOON}
    call("action_finish", ADMIN, finish)
    call.fails("action_finish", exception.InstanceActionNotFound, ADMIN, finish | {"request_id": "none"})
    call("actions_get", ADMIN, A)
    call("actions_get", ADMIN, A, limit=1, marker="req-1", filters={"changes-since": NOON})
    call.fails("actions_get", exception.MarkerNotFound, ADMIN, A, marker="none")
    call("action_get_by_request_id", ADMIN, A, "req-1")
    event = {"event": "compute_reboot", "instance_uuid": A, "request_id": "req-1", "host": "host-1"}
    call("action_event_start", ADMIN, event | {"start_time": aware})
    call.fails(
        "action_event_start", exception.InstanceActionNotFound, USER, event | {"request_id": "x", "start_time": aware}
    )
    done = event | {"finish_time": aware, "result": "Error", "traceback": "line 1", "details": "d"}
    call("action_event_finish", ADMIN, done)
    call.fails("action_event_finish", exception.InstanceActionEventNotFound, ADMIN, done | {"event": "none"})
    call("action_events_get", ADMIN, 2)
    call("action_event_get_by_id", ADMIN, 2, 1)
    assert call("action_event_get_by_id", ADMIN, 2, 99) is None


def quotas(call):
    call("quota_create", ADMIN, "project-1", "instances", 10)
    call("quota_create", ADMIN, "project-1", "cores", 20, user_id="user-1")
    call.fails("quota_create", exception.QuotaExists, ADMIN, "project-1", "instances", 11)
    call("quota_get", ADMIN, "project-1", "instances")
    call("quota_get", ADMIN, "project-1", "cores", user_id="user-1")
    call.fails("quota_get", exception.ProjectQuotaNotFound, ADMIN, "project-9", "instances")
    call.fails("quota_get", exception.ProjectUserQuotaNotFound, ADMIN, "project-9", "cores", user_id="user-1")
    call("quota_get_all_by_project_and_user", ADMIN, "project-1", "user-1")
    call("quota_get_all_by_project", ADMIN, "project-1")
    call("quota_get_all", ADMIN, "project-1")
    call("quota_get_per_project_resources")
    call("quota_update", ADMIN, "project-1", "instances", 12)
    call.fails("quota_update", exception.ProjectQuotaNotFound, ADMIN, "project-9", "instances", 12)
    call("quota_class_create", ADMIN, "default", "instances", 5)
    call("quota_class_create", ADMIN, "gold", "cores", 50)
    call("quota_class_get", ADMIN, "gold", "cores")
    call.fails("quota_class_get", exception.QuotaClassNotFound, ADMIN, "gold", "none")
    call("quota_class_get_default", ADMIN)
    call("quota_class_get_all_by_name", ADMIN, "gold")
    call("quota_class_update", ADMIN, "gold", "cores", 60)
    call.fails("quota_class_update", exception.QuotaClassNotFound, ADMIN, "none", "cores", 60)
    call("quota_destroy_all_by_project_and_user", ADMIN, "project-1", "user-1")
    call("quota_destroy_all_by_project", ADMIN, "project-1")
    call("quota_get_all_by_project", ADMIN, "project-1")


def small_tables(call):
    values = {"project_id": "project-1", "user_id": "user-1", "file_name": "cert.pem"}
    call("certificate_create", ADMIN, values)
    call("certificate_get_all_by_project", ADMIN, "project-1")
    call("certificate_get_all_by_user", ADMIN, "user-1")
    call("certificate_get_all_by_user_and_project", ADMIN, "user-1", "project-1")
    usage = (100, 1000, 200, 2000, A, "project-1", "user-1", "az")
    call("vol_usage_update", ADMIN, uuid_of(600), *usage)
    call("vol_usage_update", ADMIN, uuid_of(600), *usage, update_totals=True)
    call("vol_usage_update", ADMIN, uuid_of(600), 1, *usage[1:])
    call("vol_get_usage_by_time", ADMIN, NOON)
    call("s3_image_create", ADMIN, uuid_of(700))
    call("s3_image_get", ADMIN, 1)
    call.fails("s3_image_get", exception.ImageNotFound, ADMIN, 99)
    call("s3_image_get_by_uuid", ADMIN, uuid_of(700))
    call.fails("s3_image_get_by_uuid", exception.ImageNotFound, ADMIN, NOBODY)
    call("ec2_instance_create", ADMIN, uuid_of(800))
    call("ec2_instance_create", ADMIN, uuid_of(801), id=4711)
    call("ec2_instance_get_by_uuid", ADMIN, A)
    call.fails("ec2_instance_get_by_uuid", exception.InstanceNotFound, ADMIN, NOBODY)
    call("ec2_instance_get_by_id", ADMIN, 4711)
    call("get_instance_uuid_by_ec2_id", ADMIN, 4711)
    call.fails("get_instance_uuid_by_ec2_id", exception.InstanceNotFound, ADMIN, 99999)
    tokens(call)
    shares(call)
    task_log(call)


def tokens(call):
    now = timeutils.utcnow_ts()
    for number, (uuid, expires) in enumerate([(A, now + 3600), (A, now - 10), (B, now - 10)]):
        token = {"token_hash": f"hash-{number}", "console_type": "novnc", "host": "host-1", "port": 6080}
        call("console_auth_token_create", ADMIN, token | {"instance_uuid": uuid, "expires": expires})
    call("console_auth_token_get_valid", ADMIN, "hash-0", A)
    assert call("console_auth_token_get_valid", ADMIN, "hash-1") is None
    call.fails("console_auth_token_get_valid", exception.InstanceNotFound, ADMIN, "hash-0", NOBODY)
    call("console_auth_token_destroy_expired_by_host", ADMIN, "host-1")
    call("console_auth_token_destroy_expired", ADMIN)
    call("console_auth_token_destroy_all_by_instance", ADMIN, A)


def shares(call):
    for number, uuid in enumerate((A, B)):
        mapping = (uuid_of(900 + number), uuid, uuid_of(910), "inactive", "tag", "192.0.2.1:/x", "NFS")
        call("share_mapping_update", ADMIN, *mapping)
        call("share_mapping_update", ADMIN, *mapping[:3], "active", *mapping[4:])
    call("share_mapping_get_all", ADMIN)
    call("share_mapping_get_by_share_id", ADMIN, uuid_of(910))
    call("share_mapping_get_by_instance_uuid", ADMIN, A)
    if hasattr(api, "share_mapping_get_by_instance_uuids"):
        call("share_mapping_get_by_instance_uuids", ADMIN, [A, B])
    call("share_mapping_get_by_instance_uuid_and_share_id", ADMIN, A, uuid_of(910))
    call("share_mapping_delete_by_instance_uuid_and_share_id", ADMIN, A, uuid_of(910))
    call("share_mapping_get_all", ADMIN)


def task_log(call):
    period = ("instance_usage_audit", NOON, NOON + datetime.timedelta(hours=1))
    call("task_log_begin_task", ADMIN, *period, "host-1", task_items=42, message="begun")
    call.fails("task_log_begin_task", exception.TaskAlreadyRunning, ADMIN, *period, "host-1", message="again")
    call("task_log_get", ADMIN, *period, "host-1")
    call("task_log_get", ADMIN, *period, "host-1", state="DONE")
    call("task_log_end_task", ADMIN, *period, "host-1", 3, message="done")
    call.fails("task_log_end_task", exception.TaskNotRunning, ADMIN, *period, "host-9", 3)
    call("task_log_get_all", ADMIN, *period, host="host-1", state="DONE")


def pci_devices(call):
    for number in range(3):
        device = {
            "compute_node_id": 1,
            "address": f"0000:81:00.{number}",
            "product_id": "1017",
            "vendor_id": "15b3",
            "dev_type": "type-PF" if number == 0 else "type-VF",
            "status": "available",
            "dev_id": f"pci_{number}",
            "label": "label_15b3_1017",
            "parent_addr": "0000:81:00.0" if number else None,
            "extra_info": "{}",
            "uuid": uuid_of(1000 + number),
        }
        call("pci_device_update", ADMIN, 1, device["address"], device)
    call("pci_device_update", ADMIN, 1, "0000:81:00.1", {"status": "allocated", "instance_uuid": A})
    call("pci_device_get_by_addr", ADMIN, 1, "0000:81:00.1")
    call.fails("pci_device_get_by_addr", exception.PciDeviceNotFound, ADMIN, 1, "none")
    call("pci_device_get_by_id", ADMIN, 1)
    call.fails("pci_device_get_by_id", exception.PciDeviceNotFoundById, ADMIN, 99)
    call("pci_device_get_all_by_node", ADMIN, 1)
    call("pci_device_get_all_by_parent_addr", ADMIN, 1, "0000:81:00.0")
    call("pci_device_get_all_by_instance_uuid", ADMIN, A)
    call("instance_get_by_uuid", ADMIN, A, columns_to_join=["pci_devices", "services"])
    call("instance_get_all", ADMIN, columns_to_join=["pci_devices"])
    call("pci_device_destroy", ADMIN, 1, "0000:81:00.2")
    call.fails("pci_device_destroy", exception.PciDeviceNotFound, ADMIN, 1, "0000:81:00.2")


def ends(call):
    wrong = api.constraint(vm_state=api.equal_any("error"))
    call.fails("instance_destroy", exception.ConstraintNotMet, ADMIN, A, constraint=wrong)
    call("instance_destroy", ADMIN, A, constraint=api.constraint(vm_state=api.not_equal("error", "deleted")))
    call("instance_destroy", ADMIN, B, hard_delete=True)
    call.fails("instance_destroy", exception.InstanceNotFound, ADMIN, NOBODY)
    call.fails("instance_destroy", exception.InvalidUUID, ADMIN, "no uuid")
    call("instance_get_by_uuid", EVERYTHING, A)
    archived, uuids, total = call("archive_deleted_rows", ADMIN, max_rows=1000)
    assert uuids == [A]
    assert total == sum(archived.values()) > 5
    call("archive_deleted_rows", max_rows=5, before=NOON, task_log=True)
    call("purge_shadow_tables", ADMIN, NOON)
    assert call("purge_shadow_tables", ADMIN, None) == total


PARTS = [
    services,
    compute_nodes,
    instances,
    instance_updates,
    metadata,
    security_groups,
    interfaces,
    block_devices,
    migrations,
    faults_and_actions,
    quotas,
    small_tables,
    pci_devices,
    ends,
]
