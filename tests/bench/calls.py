"""The hot calls of nova.db.main.api during a VM's boot (FACTS: what one boot calls), as repeatable operations.

`World` holds what the calls work on; `CALLS` maps a name to (how often it happens in one boot, operation), `LISTS` a
name to what the API asks for a page of servers. Every operation must leave the world fit for the next repetition.
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

HOST = "host-0"
HOST_INSTANCES_MAX = 50
"""Of a cell that grows: a full compute host, and then the next."""
LIST_INSTANCES_MAX = 1000
"""Nova's max_limit: the largest page that its API gives."""
PROJECT = "p" * 32
USER = "u" * 32
FLAVOR = json.dumps(
    {
        "cur": {
            "nova_object.name": "Flavor",
            "nova_object.namespace": "nova",
            "nova_object.version": "1.2",
            "nova_object.data": {
                "id": 1,
                "flavorid": "1",
                "name": "m1.tiny",
                "description": None,
                "memory_mb": 512,
                "vcpus": 1,
                "root_gb": 1,
                "ephemeral_gb": 0,
                "swap": 0,
                "rxtx_factor": 1.0,
                "vcpu_weight": 0,
                "disabled": False,
                "is_public": True,
                "extra_specs": {},
                "created_at": None,
                "updated_at": None,
                "deleted_at": None,
                "deleted": False,
            },
        },
        "old": None,
        "new": None,
    }
)
"""What Nova keeps of it with each instance."""


@dataclass
class World:
    """One cell's content as the benchmark needs it."""

    db: Any
    context: Any
    host: str = HOST
    instances: list[str] = field(default_factory=list)
    bdms: list[int] = field(default_factory=list)
    compute_id: int = 0
    counter: itertools.count[int] = field(default_factory=itertools.count)

    def next_instance(self) -> str:
        return self.instances[next(self.counter) % len(self.instances)]


def instance_values(number: int, host: str = HOST) -> dict[str, Any]:
    """What nova-conductor passes to instance_create, in size and shape."""
    return {
        "uuid": str(uuid.uuid4()),
        "project_id": PROJECT,
        "user_id": USER,
        "host": host,
        "node": host,
        "hostname": f"vm-{number}",
        "display_name": f"vm-{number}",
        "vm_state": "building",
        "task_state": "scheduling",
        "memory_mb": 512,
        "vcpus": 1,
        "root_gb": 1,
        "ephemeral_gb": 0,
        "instance_type_id": 1,
        "image_ref": str(uuid.uuid4()),
        "reservation_id": f"r-{number:08d}",
        "system_metadata": {f"image_key_{i}": f"value {i}" for i in range(8)},
        "metadata": {"role": "bench"},
        "extra": {"numa_topology": None, "flavor": FLAVOR, "vcpu_model": None},
    }


def fill(db: Any, context: Any, instances: int, host: str = HOST) -> World:
    """A service, a compute node and `instances` instances on one host."""
    world = World(db, context, host)
    db.service_create(context, {"host": host, "binary": "nova-compute", "topic": "compute", "report_count": 0})
    node = {"host": host, "hypervisor_hostname": host, "uuid": str(uuid.uuid4()), "vcpus": 64, "memory_mb": 1 << 18}
    node |= {"local_gb": 1 << 12, "vcpus_used": 0, "memory_mb_used": 0, "local_gb_used": 0, "hypervisor_type": "fake"}
    node |= {"hypervisor_version": 1, "cpu_info": "{}", "mapped": 0}
    world.compute_id = db.compute_node_create(context, node)["id"]
    grow(world, instances)
    return world


def grow(world: World, instances: int) -> None:
    """More instances, until there are so many: on the world's host until it is full, then on others."""
    db, context = world.db, world.context
    for number in range(len(world.instances), instances):
        full = number // HOST_INSTANCES_MAX
        host = f"{world.host}-{full}" if full else world.host
        world.instances.append(db.instance_create(context, instance_values(number, host))["uuid"])
        bdm = {
            "instance_uuid": world.instances[-1],
            "source_type": "image",
            "destination_type": "local",
            "boot_index": 0,
        }
        world.bdms.append(db.block_device_mapping_create(context, bdm, legacy=False)["id"])
        db.action_start(context, action(world.instances[-1]))


def action(instance: str) -> dict[str, Any]:
    """What is passed to action_start."""
    values = {"action": "create", "instance_uuid": instance, "request_id": f"req-{instance}", "user_id": USER}
    return values | {"project_id": PROJECT, "start_time": now()}


def now() -> Any:
    """As Nova writes it."""
    from oslo_utils import timeutils

    return timeutils.utcnow()


def _update(world: World) -> None:
    number = next(world.counter)
    values = {"task_state": "spawning" if number % 2 else "networking", "progress": number % 100}
    world.db.instance_update_and_get_original(world.context, world.next_instance(), values)


def _extra(world: World) -> None:
    world.db.instance_extra_update_by_uuid(
        world.context, world.next_instance(), {"pci_requests": str(next(world.counter))}
    )


def _create(world: World) -> None:
    world.db.instance_create(world.context, instance_values(next(world.counter), world.host))


def _bdm(world: World) -> None:
    bdm = world.bdms[next(world.counter) % len(world.bdms)]
    world.db.block_device_mapping_update(world.context, bdm, {"connection_info": str(bdm)}, legacy=False)


def _compute(world: World) -> None:
    used = {"vcpus_used": next(world.counter) % 64, "memory_mb_used": 512}
    world.db.compute_node_update(world.context, world.compute_id, used)


def _event(instance: str) -> dict[str, Any]:
    return {"event": "compute__do_build", "instance_uuid": instance, "request_id": f"req-{instance}"}


def _event_start(world: World) -> None:
    world.db.action_event_start(world.context, _event(world.next_instance()) | {"start_time": now()})


def _event_finish(world: World) -> None:
    done = {"finish_time": now(), "result": "Success"}
    world.db.action_event_finish(world.context, _event(world.instances[0]) | done)


CALLS: dict[str, tuple[int, Callable[[World], object]]] = {
    "instance_update_and_get_original": (6, _update),
    "instance_extra_update_by_uuid": (6, _extra),
    "quota_get_all_by_project_and_user": (
        2,
        lambda w: w.db.quota_get_all_by_project_and_user(w.context, PROJECT, USER),
    ),
    "instance_create": (1, _create),
    "instance_get_by_uuid": (1, lambda w: w.db.instance_get_by_uuid(w.context, w.next_instance())),
    "action_start": (1, lambda w: w.db.action_start(w.context, action(w.next_instance()))),
    "action_event_start": (1, _event_start),
    "action_event_finish": (1, _event_finish),
    "block_device_mapping_update": (1, _bdm),
    "compute_node_update": (1, _compute),
    "instance_get_all_by_host": (1, lambda w: w.db.instance_get_all_by_host(w.context, w.host)),
    "service_get_all": (1, lambda w: w.db.service_get_all(w.context)),
}


def _list(world: World) -> None:
    """`GET /servers/detail` of one project, as nova-api asks each cell for it."""
    found = world.db.instance_get_all_by_filters_sort(
        world.context,
        {"deleted": False, "project_id": PROJECT},
        limit=LIST_INSTANCES_MAX,
        columns_to_join=["extra", "extra.flavor", "extra.numa_topology", "info_cache", "metadata"],
        sort_keys=["created_at", "id", "uuid"],
        sort_dirs=["desc", "desc", "desc"],
    )
    assert len(found) >= min(LIST_INSTANCES_MAX, len(world.instances)), len(found)


LISTS: dict[str, Callable[[World], object]] = {"list of at most 1,000 servers": _list}


def prepare(name: str, world: World) -> None:
    """What a call needs once before its repetitions."""
    if name == "action_event_finish":
        world.db.action_event_start(world.context, _event(world.instances[0]) | {"start_time": now()})
