"""Nova's hot calls look up what they need; none goes through all rows of a table that has families."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nova

# In a process of its own: Nova's configuration and its engines are global.
SCRIPT = """
import logging
import sys
import warnings

warnings.simplefilter("ignore")
from tests.bench import calls
from tests.bench.child import open_nova

db, context = open_nova("sql", "lucd+memory:///hot", sync=True)
world = calls.fill(db, context, 40)
log = logging.getLogger("nova_bridge.sql.plan")
told = logging.StreamHandler(sys.stdout)
told.setFormatter(logging.Formatter("%(message)s"))
log.addHandler(told)
log.setLevel(logging.DEBUG)
every = {name: call for name, (_, call) in calls.CALLS.items()} | calls.LISTS
for name, call in every.items():
    print("call", name, flush=True)
    calls.prepare(name, world)
    call(world)
print("call on purpose", flush=True)
with db.get_engine().connect() as connection:
    connection.exec_driver_sql("SELECT id FROM instances WHERE hostname = 'x' AND vcpus > 7").fetchall()
"""


def test_hot_calls_of_nova_scan_no_rooted_table() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    hot, _, provoked = done.stdout.partition("call on purpose")
    assert "rooted" not in hot, hot
    assert hot.count("call ") >= 10
    assert "scan of rooted table instances" in provoked, "the log must tell a scan when there is one"


PLACEMENT_SCRIPT = """
import json
import logging
import sys
import uuid

from placement import wsgi
from webob import Request

application = wsgi.init_application()


def ask(method, path, body=None):
    request = Request.blank(path, method=method)
    request.headers.update({"X-Auth-Token": "admin", "OpenStack-API-Version": "placement 1.39"})
    if body is not None:
        request.content_type, request.body = "application/json", json.dumps(body).encode()
    response = request.get_response(application)
    assert response.status_int < 300, response.text


providers = [str(uuid.uuid4()) for _ in range(6)]
for provider in providers:
    path = f"/resource_providers/{provider}"
    inventories = {"VCPU": {"total": 10}, "MEMORY_MB": {"total": 1000}}
    ask("POST", "/resource_providers", {"name": provider, "uuid": provider})
    ask("PUT", f"{path}/inventories", {"resource_provider_generation": 0, "inventories": inventories})
    ask("PUT", f"{path}/traits", {"resource_provider_generation": 1, "traits": ["COMPUTE_NODE"]})
told = logging.StreamHandler(sys.stdout)
told.setFormatter(logging.Formatter("%(message)s"))
log = logging.getLogger("nova_bridge.sql.plan")
log.addHandler(told)
log.setLevel(logging.DEBUG)
resources = {"VCPU": 1, "MEMORY_MB": 64}
claim = {
    "allocations": {providers[0]: {"resources": resources}},
    "project_id": "p",
    "user_id": "u",
    "consumer_generation": None,
    "consumer_type": "INSTANCE",
}
consumer = uuid.uuid4()
for name, call in {
    "candidates": ("GET", "/allocation_candidates?resources=VCPU:1,MEMORY_MB:64&required=COMPUTE_NODE&limit=1000"),
    "claim": ("PUT", f"/allocations/{consumer}", claim),
    "in tree": ("GET", f"/resource_providers?in_tree={providers[0]}"),
    "allocations": ("GET", f"/resource_providers/{providers[0]}/allocations"),
    "delete": ("DELETE", f"/allocations/{consumer}"),
}.items():
    print("call", name, flush=True)
    ask(*call)
"""


def test_claims_in_placement_scan_no_rooted_table(tmp_path: Path) -> None:
    (tmp_path / "placement.conf").write_text(
        "[placement_database]\nconnection = lucd+memory:///placement\nsync_on_startup = true\n"
        "[api]\nauth_strategy = noauth2\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLACEMENT_SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OS_PLACEMENT_CONFIG_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("call ") == 5
    assert "rooted" not in done.stdout, done.stdout
