"""The part of nova-compute in the demo: Nova's own objects, whose every database call goes to the conductor by RPC."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lucd.demo.nova_site import COMPUTE_HOST
from lucd.demo.terminal import Calls

PROJECT, USER = "demo-project", "demo-user"


class ComputeRole:
    """As nova.cmd.compute does it: DISABLE_DB_ACCESS, and the conductor's RPC API as indirection of all objects."""

    def __init__(self, config: Path, calls: Calls, host: str = COMPUTE_HOST) -> None:
        warnings.simplefilter("ignore")
        os.environ["OS_NOVA_DISABLE_EVENTLET_PATCHING"] = "true"
        from nova import monkey_patch

        monkey_patch.patch(backend="threading")
        import nova.conf
        import nova.db.main.api
        from nova import config as nova_config
        from nova import context, objects
        from nova.conductor import rpcapi
        from nova.network import model
        from nova.objects import base
        from oslo_log import log

        nova_config.parse_args(["nova-compute", "--config-file", str(config)])
        log.setup(nova.conf.CONF, "nova")
        objects.register_all()
        nova.db.main.api.DISABLE_DB_ACCESS = True
        base.NovaObject.indirection_api = rpcapi.ConductorAPI()
        self._objects = objects
        self._no_network = model.NetworkInfo()
        self.calls = calls
        self._host = host
        self._context = context.get_admin_context()
        self._context.project_id, self._context.user_id = PROJECT, USER
        self.node: Any = None
        self.service: Any = None

    def wait_for_conductor(self) -> None:
        """Return when the conductor answers."""
        from nova import conductor

        conductor.API().wait_until_ready(self._context, early_timeout=3, early_attempts=20)

    def start(self) -> None:
        """Register the service and the compute node, as nova-compute does when it starts."""
        service = self._objects.Service(self._context)
        service.host, service.binary, service.topic, service.report_count = self._host, "nova-compute", "compute", 0
        self._timed("service create", service.create)
        node = self._objects.ComputeNode(self._context)
        values: dict[str, object] = {
            "host": self._host, "hypervisor_hostname": self._host, "uuid": str(uuid.uuid4()), "vcpus": 64,
            "memory_mb": 262144, "local_gb": 4096, "vcpus_used": 0, "memory_mb_used": 0, "local_gb_used": 0,
            "hypervisor_type": "fake", "hypervisor_version": 1, "cpu_info": "{}", "disk_available_least": 4096,
            "free_ram_mb": 262144, "free_disk_gb": 4096, "current_workload": 0, "running_vms": 0,
            "cpu_allocation_ratio": 16.0, "ram_allocation_ratio": 1.5, "disk_allocation_ratio": 1.0,
        }  # fmt: skip
        for name, value in values.items():
            setattr(node, name, value)
        node.service_id = service.id
        self._timed("compute node create", node.create)
        self.service, self.node = service, node

    def heartbeat(self) -> None:
        """What nova-compute reports every 10 seconds."""
        self.service.report_count += 1
        self._timed("service report", self.service.save)

    def create(self, number: int) -> str:
        """A new instance as the API leaves it to the conductor; returns its uuid."""
        instance = self._objects.Instance(self._context)
        instance.uuid = str(uuid.uuid4())
        instance.project_id, instance.user_id = PROJECT, USER
        instance.display_name = instance.hostname = f"vm-{number}"
        instance.vm_state, instance.task_state = "building", "scheduling"
        instance.vcpus, instance.memory_mb, instance.root_gb, instance.ephemeral_gb = 1, 2048, 10, 0
        instance.instance_type_id, instance.image_ref = 1, str(uuid.uuid4())
        instance.metadata, instance.system_metadata = {"number": str(number)}, {"image_os": "linux"}
        instance.info_cache = self._objects.InstanceInfoCache(instance_uuid=instance.uuid)
        instance.info_cache.network_info = self._no_network
        self._timed("instance create", instance.create)
        return str(instance.uuid)

    def claim(self, instance_uuid: str) -> None:
        """What the resource tracker writes when it takes the instance on."""
        instance = self._get(instance_uuid)
        instance.host = instance.node = instance.launched_on = self._host
        instance.compute_id = self.node.id
        self._timed("instance claim", instance.save)
        self.node.vcpus_used += 1
        self.node.memory_mb_used += instance.memory_mb
        self.node.running_vms += 1
        self._timed("compute node update", self.node.save)

    def boot(self, instance_uuid: str) -> None:
        """scheduling -> networking -> spawning -> active, each step with expected_task_state."""
        instance = self._get(instance_uuid)
        for before, after in (("scheduling", "networking"), ("networking", "spawning"), ("spawning", None)):
            instance.task_state = after
            if after is None:
                instance.vm_state, instance.power_state = "active", 1
            save = partial(instance.save, expected_task_state=before)
            self._timed("instance save, expected_task_state", save)

    def conflict(self, instance_uuid: str) -> str:
        """Save with a task state that the instance is not in; returns Nova's exception by name, or empty."""
        from nova import exception

        instance = self._get(instance_uuid)
        instance.task_state = "deleting"
        try:
            instance.save(expected_task_state="scheduling")
        except exception.UnexpectedTaskStateError as refused:
            return type(refused).__name__.removesuffix("_Remote")
        return ""

    def by_host(self) -> dict[str, Any]:
        """uuid -> instance of all on the compute host."""
        found = self._timed("list by host", lambda: self._objects.InstanceList.get_by_host(self._context, self._host))
        return {str(instance.uuid): instance for instance in found}

    def listed(self) -> dict[str, str]:
        """uuid -> state of all on the compute host: the vm_state, and the task that is under way."""
        return {uuid: instance.task_state or instance.vm_state for uuid, instance in self.by_host().items()}

    def destroy(self, instance_uuid: str) -> None:
        instance = self._get(instance_uuid)
        self._timed("instance destroy", instance.destroy)

    def _get(self, instance_uuid: str) -> Any:
        return self._timed(
            "instance get by uuid", lambda: self._objects.Instance.get_by_uuid(self._context, instance_uuid)
        )

    def _timed(self, name: str, call: Callable[[], Any]) -> Any:
        return self.calls.timed(name, call)
