"""Nova's hot calls look up what they need; none goes through all rows of a table that has families."""

from __future__ import annotations

import subprocess
import sys

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
for name, (_, call) in calls.CALLS.items():
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
