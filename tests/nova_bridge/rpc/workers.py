"""A worker of the RPC door as the daemon starts it, with the bus of a daemon in this process."""

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

from bus_doors import BusDoor

from nova_bridge.rpc import worker

HERE = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parents[2]), os.environ.get("PYTHONPATH")])),
    "PYTHONWARNINGS": "ignore",
    "OS_NOVA_DISABLE_EVENTLET_PATCHING": "true",
}


@contextlib.contextmanager
def bus():
    """The path of a socket behind which `lucd://` works."""
    with tempfile.TemporaryDirectory(prefix="lucd") as folder:
        door = BusDoor(str(Path(folder) / "s"))
        door.start()
        try:
            yield door.path
        finally:
            door.close()


@contextlib.contextmanager
def running_worker(socket, server, connection, api_connection):
    """A worker process that serves; it has to end well when told to."""
    argv = worker.command(
        transport_url=f"lucd://{socket}", connection=connection, api_connection=api_connection, server=server
    )
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stdout.readline().strip() == worker.READY
            yield process
            process.terminate()
            assert process.wait(120) == 0
        finally:
            process.kill()
