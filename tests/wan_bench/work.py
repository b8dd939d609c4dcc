"""What a controller does: one Nova-like transaction, the hot calls, the life of an instance, and counting under a cut.

All of it goes through Nova's models, its db API and its own engines (oslo.db), as nova-conductor does it; nothing but
the URL tells the stores apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tests.bench import calls

INSTANCES = 4
"""A controller's own at the start. The last is for the neighbour site's controller to read and write."""
ATTEMPTS_MAX = 20
"""Of a call that the database refused because another transaction was in its way; Nova does the same."""


def load_nova() -> None:
    """Import all that a controller uses, so that its forks share it."""
    from nova import config, objects
    from nova.db import migration  # noqa: F401
    from nova.db.main import api  # noqa: F401

    from nova_bridge.sql import dialect  # noqa: F401

    config.parse_args(["bench"], default_config_files=[], configure_db=False, init_rpc=False)
    objects.register_all()


def life(world: calls.World, number: int) -> None:
    """What nova-conductor asks of the database from an instance's creation to its end, in a boot's order (FACTS of a
    boot: 23 calls), then the calls of its deletion.
    """
    db, context = world.db, world.context
    instance = _again(db.instance_create, context, calls.instance_values(number, world.host))["uuid"]

    def update(**values: object) -> None:
        _again(db.instance_update_and_get_original, context, instance, values)

    def extra(field: str) -> None:
        _again(db.instance_extra_update_by_uuid, context, instance, {field: str(number)})

    device = {"instance_uuid": instance, "source_type": "image", "destination_type": "local"}
    device |= {"boot_index": 0, "device_name": "vda"}
    event = {"event": "compute__do_build", "instance_uuid": instance, "request_id": f"req-{instance}"}
    _again(db.quota_get_all_by_project_and_user, context, calls.PROJECT, calls.USER)
    _again(db.quota_get_all_by_project, context, calls.PROJECT)
    bdm = _again(db.block_device_mapping_update_or_create, context, device, legacy=False)["id"]
    _again(db.action_start, context, calls.action(instance))
    update(task_state="scheduling")
    extra("pci_requests")
    _again(db.action_event_start, context, event | {"start_time": calls.now()})
    update(host=world.host, node=world.host, launched_on=world.host)
    extra("numa_topology")
    _again(db.compute_node_update, context, world.compute_id, {"vcpus_used": number % 64, "memory_mb_used": 512})
    update(task_state="networking", vm_state="building")
    extra("vcpu_model")
    update(task_state="block_device_mapping")
    _again(db.block_device_mapping_update, context, bdm, {"connection_info": "{}"}, legacy=False)
    extra("device_metadata")
    update(task_state="spawning")
    extra("trusted_certs")
    _again(db.instance_get_by_uuid, context, instance)
    update(vm_state="active", task_state=None, power_state=1, launched_at=calls.now())
    extra("resources")
    _again(db.quota_get_all_by_project_and_user, context, calls.PROJECT, calls.USER)
    _again(db.action_event_finish, context, event | {"finish_time": calls.now(), "result": "Success"})
    update(task_state="deleting")
    _again(db.block_device_mapping_destroy, context, bdm)
    _again(db.instance_destroy, context, instance)


def _again(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Once more where the database says that the transaction was in another's way."""
    from oslo_db import exception

    for attempt in range(ATTEMPTS_MAX):
        try:
            return call(*arguments, **named)
        except exception.DBDeadlock:
            if attempt == ATTEMPTS_MAX - 1:
                raise
    return None


class Controller:
    """One, on the database of its site. `far_url`: where the next site's rows are found."""

    def __init__(self, name: str, url: str, far_url: str) -> None:
        from nova import conf, context
        from nova.db.main import api as db

        conf.CONF.set_override("connection", url, "database")
        db.configure(conf.CONF)
        self.name = name
        self.db = db
        self.context = context.get_admin_context()
        self.far = self.context
        if far_url != url:
            self.far = context.get_admin_context()
            self.far.db_connection = db.create_context_manager(connection=far_url)
        self.world: Any = None
        self.far_row = ""
        self._urls = url, far_url
        self._lives = 0

    # ---- preparing

    def do_sync(self) -> None:
        """Make Nova's schema."""
        from nova.db import migration

        migration.db_sync(database="main")

    def do_fill(self) -> dict[str, Any]:
        """Rows of its own."""
        self.world = calls.fill(self.db, self.context, INSTANCES, f"host-{self.name}")
        for name in calls.CALLS:
            calls.prepare(name, self.world)
        instances = list(self.world.instances)
        self.world.instances = instances[:-1]
        return {"instances": instances}

    def do_meet(self, row: str) -> None:
        """The next site's row that this one works on, seen once: what is cached then stays cached."""
        self.far_row = row
        self._update(self.far, row)
        self._read(self.far, row)
        self._update(self.context, self.world.instances[0])

    # ---- one transaction

    def _update(self, context: Any, instance: str) -> None:
        """Read a row, change it, commit: as nova.db.main.api does, by Nova's own writer."""
        from nova.db.main import models

        with self.db.get_context_manager(context).writer.using(context) as session:
            row = session.query(models.Instance).filter_by(uuid=instance, deleted=0).one()
            row.progress = (row.progress or 0) % 1000 + 1

    def _read(self, context: Any, instance: str) -> None:
        from nova.db.main import models

        with self.db.get_context_manager(context).reader.using(context) as session:
            session.query(models.Instance).filter_by(uuid=instance, deleted=0).one()

    def _repeat(self, what: Callable[[], object], times: int, seconds_max: float) -> dict[str, Any]:
        """Wall ms of each; at least one, at most so long."""
        walls: list[float] = []
        until_s = time.perf_counter() + seconds_max
        while len(walls) < times and (not walls or time.perf_counter() < until_s):
            begin_s = time.perf_counter()
            _again(what)
            walls.append((time.perf_counter() - begin_s) * 1000)
        return {"wall_ms": walls}

    def do_home_update(self, times: int, seconds_max: float) -> dict[str, Any]:
        return self._repeat(lambda: self._update(self.context, self.world.instances[0]), times, seconds_max)

    def do_home_read(self, times: int, seconds_max: float) -> dict[str, Any]:
        return self._repeat(lambda: self._read(self.context, self.world.instances[0]), times, seconds_max)

    def do_far_update(self, times: int, seconds_max: float) -> dict[str, Any]:
        return self._repeat(lambda: self._update(self.far, self.far_row), times, seconds_max)

    def do_far_read(self, times: int, seconds_max: float) -> dict[str, Any]:
        return self._repeat(lambda: self._read(self.far, self.far_row), times, seconds_max)

    def do_call(self, name: str, times: int, seconds_max: float) -> dict[str, Any]:
        """One of the hot calls of a boot (`tests.bench.calls`)."""
        return self._repeat(lambda: calls.CALLS[name][1](self.world), times, seconds_max)

    def do_life(self, count: int, seconds_max: float) -> dict[str, Any]:
        """So many instances from creation to end, one after the other, or as many as the time allows."""
        done: list[float] = []
        until_s = time.monotonic() + seconds_max
        while len(done) < count and time.monotonic() < until_s:
            begin_s = time.monotonic()
            self._lives += 1
            life(self.world, self._lives)
            done.append((time.monotonic() - begin_s) * 1000)
        return {"wall_ms": done}

    def do_store(self, times: int) -> dict[str, Any]:
        """Requests to lucd's store itself."""
        from tests.wan_bench.door import Door

        return {"kinds": Door(self.name, *self._urls).measure(times)}

    # ---- counting, for the cut

    def do_make_counters(self, sites: int) -> None:
        """A table with a row for each site's controller, in its own database."""
        from tests.wan_bench import counting

        counting.make(self.db.get_engine(context=self.context), sites)

    def do_count(self, row: int, far: bool, seconds: float) -> dict[str, Any]:
        """Count the row up until the time is over; what was acknowledged, and every pause."""
        from tests.wan_bench import counting

        engine = self.db.get_engine(context=self.far if far else self.context)
        return counting.count(engine, row, seconds)

    def do_look(self, far: bool) -> dict[str, Any]:
        """The counters as a read says now; empty with the reason when it is refused."""
        from tests.wan_bench import counting

        return counting.look(self.db.get_engine(context=self.far if far else self.context))
