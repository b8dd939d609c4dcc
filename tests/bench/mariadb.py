"""A private MariaDB for comparison: Debian's package, its own data directory and socket, durable commits."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path


class MariaDB:
    """One mariadbd on a Unix socket below `directory`; no network, nothing of the system's own server touched."""

    def __init__(self, directory: Path) -> None:
        self.data = directory / "mariadb"
        self.socket = directory / "mariadb.sock"
        self.process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def install() -> None:
        """Install the server from Debian when it is missing (needs root)."""
        if shutil.which("mariadbd"):
            return
        if os.getuid() != 0:
            raise SystemExit("bench: mariadbd is missing; install the Debian package mariadb-server and run again")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
        subprocess.run(["apt-get", "install", "-y", "-qq", "mariadb-server"], check=True, env=environment)

    def start(self) -> None:
        """Raises SystemExit with the server's log when it does not come up within 30 s."""
        user = f"--user={os.environ.get('USER', 'root')}"
        with (self.data.parent / "mariadb.log").open("wb") as log:
            subprocess.run(
                [
                    "mariadb-install-db",
                    "--no-defaults",
                    f"--datadir={self.data}",
                    user,
                    "--auth-root-authentication-method=normal",
                ],
                check=True,
                stdout=log,
                stderr=log,
            )
            self.process = subprocess.Popen(
                [
                    "mariadbd",
                    "--no-defaults",
                    f"--datadir={self.data}",
                    f"--socket={self.socket}",
                    user,
                    "--skip-networking",
                    "--innodb-flush-log-at-trx-commit=1",
                    f"--pid-file={self.data}/pid",
                ],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 30
        while self._sql("SELECT 1").returncode:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise SystemExit(
                    f"bench: mariadbd did not start: {(self.data.parent / 'mariadb.log').read_text()[-2000:]}"
                )
            time.sleep(0.1)

    def _sql(self, statement: str) -> subprocess.CompletedProcess[bytes]:
        command = ["mariadb", "--no-defaults", f"--socket={self.socket}", "-uroot", "-e", statement]
        return subprocess.run(command, capture_output=True, check=False)

    def create(self, name: str) -> str:
        """Create a database; returns its SQLAlchemy URL."""
        done = self._sql(f"CREATE DATABASE {name} CHARACTER SET utf8mb3")
        if done.returncode:
            raise SystemExit(f"bench: {done.stderr.decode()}")
        return self.url(name)

    def url(self, name: str) -> str:
        """For SQLAlchemy."""
        return f"mysql+pymysql://root@localhost/{name}?unix_socket={self.socket}&charset=utf8mb3"

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)
