"""A process behind the RPC door: Nova's own objects work over a real worker, and no SQL is run here."""

import collections
import os
from pathlib import Path

import nova.context
import pytest
from nova import exception, objects, quota
from nova.compute import api as compute_api
from nova.db.main import api as main_db
from nova.objects import aggregate, flavor, instance_mapping, keypair, quotas, virtual_interface
from nova_databases import copy_of, url_of, use_databases
from oslo_utils.fixture import uuidsentinel as uuids
from workers import bus, running_worker

from nova_bridge.rpc import client
from nova_bridge.rpc.methods import LOCAL, Kind, public_functions

SERVER = "this-host"


@pytest.fixture(scope="module")
def door(template, tmp_path_factory, nova_conf):
    """A worker on a fresh database, reached through the bus of a daemon; this process knows no database."""
    folder = copy_of(template, tmp_path_factory.mktemp("worker") / "there")
    with bus() as socket, running_worker(socket, SERVER, url_of(folder, "main"), url_of(folder, "api")):
        use_databases(nova_conf, Path("/no/such/folder"))
        yield f"lucd://{socket}", folder


class Recorder:
    """A channel that notes what is shipped."""

    def __init__(self, channel):
        self._channel = channel
        self.shipped = collections.Counter()

    def request(self, method, content):
        self.shipped[f"{content['module']}.{content['name']}" if "module" in content else method] += 1
        return self._channel.request(method, content)


@pytest.fixture(scope="module")
def shipped(door, nova_conf):
    """The counter of what this process ships, while the client is installed in it."""
    channel = client.OsloChannel(nova_conf, url=door[0], server=SERVER, timeout_s=30)
    recorder = Recorder(channel)
    client.install(recorder)
    yield recorder.shipped
    client.uninstall()
    channel.close()


@pytest.fixture
def context(shipped):
    return nova.context.RequestContext("user-1", "project-1", is_admin=True)


@pytest.fixture(scope="module")
def cell(shipped, door):
    mapping = objects.CellMapping(
        nova.context.get_admin_context(),
        uuid=uuids.cell1,
        name="cell1",
        transport_url="none:///",
        database_connection=url_of(door[1], "main"),
        disabled=False,
    )
    mapping.create()
    return mapping


@pytest.fixture
def instance(context):
    made = objects.Instance(
        context,
        user_id="user-1",
        project_id="project-1",
        host="host-1",
        node="node-1",
        compute_id=1,
        vm_state="active",
        vcpus=2,
        memory_mb=512,
        metadata={"role": "web"},
        flavor=objects.Flavor(
            id=1,
            name="m1",
            memory_mb=512,
            vcpus=2,
            root_gb=1,
            ephemeral_gb=0,
            flavorid="1",
            swap=0,
            rxtx_factor=1.0,
            vcpu_weight=1,
            disabled=False,
            is_public=True,
            extra_specs={},
        ),
    )
    made.create()
    return made


def test_instance_created_saved_and_destroyed_as_nova_does(context, instance, shipped):
    found = objects.Instance.get_by_uuid(context, instance.uuid, expected_attrs=["flavor", "metadata", "tags"])
    assert (found.flavor.name, found.metadata, found.name) == ("m1", {"role": "web"}, instance.name)
    found.task_state = "rebooting"
    found.save(expected_task_state=[None])
    stale = objects.Instance.get_by_uuid(context, instance.uuid)
    stale.task_state = "deleting"
    with pytest.raises(exception.UnexpectedTaskStateError):
        stale.save(expected_task_state=[None])
    assert stale.obj_attr_is_set("numa_topology") is False
    assert stale.numa_topology is None
    assert stale.info_cache.instance_uuid == instance.uuid
    instance.destroy()
    with pytest.raises(exception.InstanceNotFound):
        objects.Instance.get_by_uuid(context, instance.uuid)
    assert shipped["instance_update_and_get_original"] >= 2


def test_instance_lists_and_counts(context, instance):
    listed = objects.InstanceList.get_by_host(context, "host-1", expected_attrs=["metadata", "flavor"])
    assert instance.uuid in [i.uuid for i in listed]
    assert objects.InstanceList.get_by_filters(context, {"project_id": "project-1"}, use_slave=True)
    assert objects.InstanceList.get_uuids_by_host_and_node(context, "host-1", "node-1")
    counts = objects.InstanceList.get_counts(context, "project-1", user_id="user-1")
    assert counts["project"]["instances"] == counts["user"]["instances"] >= 1
    assert objects.InstanceList.get_count_by_vm_state(context, "project-1", "user-1", "active") >= 1
    assert objects.InstanceList.get_count_by_hosts(context, ["host-1"]) >= 1
    begin = instance.created_at.replace(tzinfo=None)
    assert objects.InstanceList.get_active_by_window_joined(context, begin) is not None


def test_services_and_compute_nodes(context):
    service = objects.Service(context, host="host-1", binary="nova-compute", topic="compute", report_count=0)
    service.create()
    with pytest.raises(exception.ServiceBinaryExists):
        objects.Service(context, host="host-1", binary="nova-compute", topic="other").create()
    assert objects.Service.get_by_compute_host(context, "host-1").uuid == service.uuid
    assert objects.Service.get_minimum_version(context, "nova-compute", use_slave=True) == service.version
    node = objects.ComputeNode(context, host="host-1", hypervisor_hostname="node-1", uuid=uuids.node, vcpus=8)
    for name in ("memory_mb", "local_gb", "vcpus_used", "memory_mb_used", "local_gb_used", "hypervisor_version"):
        setattr(node, name, 1)
    node.hypervisor_type, node.cpu_info, node.service_id = "fake", "{}", service.id
    node.create()
    assert [n.uuid for n in objects.ComputeNodeList.get_all_by_uuids(context, [node.uuid])] == [node.uuid]
    assert len(objects.ComputeNodeList.get_all_by_host(context, "host-1", use_slave=True)) == 1
    assert len(objects.ComputeNodeList.get_by_hypervisor_type(context, "fake")) == 1


def test_flavor_saved_by_a_method_of_its_own_is_refreshed_here(context):
    made = objects.Flavor(context, name="m1.test", flavorid="test", memory_mb=1, vcpus=1, root_gb=1, ephemeral_gb=0)
    made.swap, made.rxtx_factor, made.disabled, made.is_public = 0, 1.0, False, True
    made.extra_specs, made.projects = {"hw:a": "b"}, ["project-1"]
    made.create()
    with pytest.raises(exception.FlavorIdExists):
        flavor._flavor_create(
            context, {"name": "x", "flavorid": "test", "memory_mb": 1, "vcpus": 1, "root_gb": 1, "ephemeral_gb": 0}
        )
    made = objects.Flavor.get_by_flavor_id(context, "test")
    assert made.updated_at is None
    made.description = "changed"
    own_context = made._context
    made.save()
    assert made.updated_at is not None
    assert made._context is own_context
    assert made.obj_what_changed() == set()
    made.extra_specs["hw:c"] = "d"
    made.save()
    assert objects.Flavor.get_by_name(context, "m1.test").extra_specs == {"hw:a": "b", "hw:c": "d"}
    assert objects.Flavor.get_by_id(context, made.id).projects == ["project-1"]
    made.add_access("project-2")
    made.remove_access("project-1")
    assert "test" in [f.flavorid for f in objects.FlavorList.get_all(context)]
    made.destroy()
    with pytest.raises(exception.FlavorNotFound):
        objects.Flavor.get_by_flavor_id(context, "test")


def test_aggregate_hosts_and_metadata(context):
    made = objects.Aggregate(context, name="agg", metadata={"availability_zone": "az1"})
    made.create()
    with pytest.raises(exception.AggregateNameExists):
        objects.Aggregate(context, name="agg").create()
    aggregate._host_add_to_db(context, made.id, "host-1")
    with pytest.raises(exception.AggregateHostExists):
        aggregate._host_add_to_db(context, made.id, "host-1")
    aggregate._metadata_add_to_db(context, made.id, {"ssd": "true"})
    found = objects.Aggregate.get_by_uuid(context, made.uuid)
    assert (found.hosts, found.metadata) == (["host-1"], {"availability_zone": "az1", "ssd": "true"})
    assert len(objects.AggregateList.get_by_host(context, "host-1")) == 1
    assert len(objects.AggregateList.get_by_metadata(context, key="ssd")) == 1
    assert len(objects.AggregateList.get_all(context)) == 1
    aggregate._host_delete_from_db(context, made.id, "host-1")
    with pytest.raises(exception.AggregateHostNotFound):
        aggregate._host_delete_from_db(context, made.id, "host-1")


def test_mappings_of_hosts_cells_and_instances(context, cell):
    assert objects.CellMapping.get_by_uuid(context, uuids.cell1).name == "cell1"
    assert len(objects.CellMappingList.get_all(context)) == 1
    host = objects.HostMapping(context, host="host-1", cell_mapping=cell)
    host.create()
    assert objects.HostMapping.get_by_host(context, "host-1").cell_mapping.uuid == uuids.cell1
    bare = objects.HostMapping(context, host="host-1")
    assert bare.cell_mapping.uuid == uuids.cell1
    mapping = objects.InstanceMapping(
        context, instance_uuid=uuids.mapped, project_id="project-1", user_id="user-1", queued_for_delete=False
    )
    mapping.create()
    mapping.cell_mapping = cell
    mapping.save()
    assert objects.InstanceMapping.get_by_instance_uuid(context, uuids.mapped).cell_mapping.name == "cell1"
    assert len(objects.InstanceMappingList.get_by_cell_id(context, cell.id)) == 1
    assert objects.InstanceMappingList.get_counts(context, "project-1")["project"]["instances"] == 1
    assert quota._user_id_queued_for_delete_populated(context, "project-1") is True
    assert instance_mapping.populate_user_id(context, 10) == (0, 0)


def test_context_targeted_at_a_cell_reads_that_cell(context, cell, instance):
    with nova.context.target_cell(context, cell) as targeted:
        assert targeted.db_connection.lucd_connection == cell.database_connection
        assert objects.Instance.get_by_uuid(targeted, instance.uuid).uuid == instance.uuid
    nova.context.load_cells()
    results = nova.context.scatter_gather_all_cells(context, main_db.instance_get_all)
    assert [i["uuid"] for i in results[cell.uuid]] != []


def test_request_spec_build_request_and_mapping_created_in_one_transaction(context, instance, shipped):
    spec = objects.RequestSpec(context, instance_uuid=uuids.boot, num_instances=1, project_id="project-1")
    build = objects.BuildRequest(context, instance=instance, project_id="project-1", instance_uuid=uuids.boot)
    mapping = objects.InstanceMapping(context, instance_uuid=uuids.boot, project_id="project-1", user_id="user-1")
    compute_api.API._create_reqspec_buildreq_instmapping(context, spec, build, mapping)
    assert None not in (spec.id, build.id, mapping.id)
    assert spec.obj_what_changed() == set()
    assert objects.RequestSpec.get_by_instance_uuid(context, uuids.boot).id == spec.id
    assert objects.BuildRequest.get_by_instance_uuid(context, uuids.boot).instance.uuid == instance.uuid
    again = objects.RequestSpec(context, instance_uuid=uuids.other, num_instances=1, project_id="project-1")
    with pytest.raises(Exception, match=r"duplicate|UNIQUE|already"):
        compute_api.API._create_reqspec_buildreq_instmapping(context, again, build, mapping)
    with pytest.raises(exception.RequestSpecNotFound):
        objects.RequestSpec.get_by_instance_uuid(context, uuids.other)
    assert shipped["nova.compute.api.API._create_reqspec_buildreq_instmapping"] == 2
    build.destroy()
    assert objects.RequestSpec.destroy_bulk(context, [uuids.boot]) == 1


def test_groups_keypairs_and_quotas(context):
    group = objects.InstanceGroup(context, uuid=uuids.group, name="g", project_id="project-1", user_id="user-1")
    group.policy, group.members = "anti-affinity", [uuids.member]
    group.create()
    assert objects.InstanceGroup.get_by_uuid(context, uuids.group).members == [uuids.member]
    assert objects.InstanceGroup.get_by_instance_uuid(context, uuids.member).name == "g"
    objects.InstanceGroup.add_members(context, uuids.group, [uuids.member2])
    assert objects.InstanceGroupList.get_counts(context, "project-1")["project"]["server_groups"] == 1
    key = objects.KeyPair(context, user_id="user-1", name="k", public_key="p", fingerprint="f", type="ssh")
    key.create()
    with pytest.raises(exception.KeyPairExists):
        objects.KeyPair(context, user_id="user-1", name="k", public_key="p", fingerprint="f", type="ssh").create()
    assert objects.KeyPairList.get_count_by_user(context, "user-1") == 1
    keypair._destroy_in_db(context, "user-1", "k")
    objects.Quotas.create_limit(context, "project-1", "cores", 7)
    assert objects.Quotas.get_all_by_project(context, "project-1")["cores"] == 7
    with pytest.raises(exception.QuotaExists):
        objects.Quotas.create_limit(context, "project-1", "cores", 7)
    objects.Quotas.create_class(context, "gold", "cores", 8)
    objects.Quotas.update_class(context, "gold", "cores", 9)
    assert objects.Quotas.get_all_class_by_name(context, "gold")["cores"] == 9
    assert quotas._get_main_per_project_limits(context, 10) == []


def test_migrations_of_data_that_open_transactions_in_their_bodies(context, cell):
    assert objects.BlockDeviceMapping.populate_uuids(context, 10) == (0, 0)
    assert objects.PciDevice.populate_dev_uuids(context, 10) == (0, 0)
    assert virtual_interface.fill_virtual_interface_list(context, 50)[1] == 0


def test_two_threads_of_calls_do_not_mix(context, instance):
    from concurrent.futures import ThreadPoolExecutor

    def found(number):
        own = nova.context.get_admin_context()
        if number % 2:
            return objects.Instance.get_by_uuid(own, instance.uuid).uuid
        return objects.InstanceList.get_uuids_by_host_and_node(own, f"host-{number}", "none")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(found, range(2, 22))) == [[], instance.uuid] * 10


def test_child_process_after_fork_makes_its_own_connection(context, instance):
    child = os.fork()
    if child == 0:
        try:
            found = objects.Instance.get_by_uuid(nova.context.get_admin_context(), instance.uuid)
            os._exit(0 if found.uuid == instance.uuid else 3)
        except BaseException:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert objects.Instance.get_by_uuid(context, instance.uuid).uuid == instance.uuid


def test_every_function_and_method_replaced_and_put_back(door, nova_conf, shipped, methods_of_nova):
    installation = client.install()
    replaced = {(owner, name) for owner, name, _ in installation._replaced}
    assert {name for owner, name in replaced if owner is main_db} >= set(public_functions()) - LOCAL
    for method in methods_of_nova.object_methods.values():
        assert (method.owner, method.name) in replaced
    kinds = collections.Counter(method.kind for method in methods_of_nova.object_methods.values())
    assert kinds[Kind.STATIC] > 60
    assert kinds[Kind.FUNCTION] > 40
    assert kinds[Kind.CLASS] >= 3
    assert kinds[Kind.INSTANCE] >= 3


def test_process_with_database_access_disabled_is_refused(context, monkeypatch):
    monkeypatch.setattr(main_db, "DISABLE_DB_ACCESS", True)
    with pytest.raises(exception.DBNotAllowed):
        main_db.service_get_all(context)
