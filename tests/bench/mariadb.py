"""A private MariaDB for comparison: Debian's package, its own data directory and socket, durable commits."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

START_WAIT_S = 30.0


class MariaDB:
    """One mariadbd on a Unix socket below `directory`; nothing of the system's own server touched.

    `launcher`: what its command line begins with, if it is not started as it is. `options`: of mariadbd; as they are by
    default it has no network. `user`: whom it runs as (default: whoever this is); `directory` must be that user's.
    """

    def __init__(
        self,
        directory: Path,
        launcher: Sequence[str] = (),
        options: Sequence[str] = ("--skip-networking",),
        user: str = "",
    ) -> None:
        self._launcher = list(launcher)
        self._options = list(options)
        self._user = f"--user={user or os.environ.get('USER', 'root')}"
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

    @property
    def _log(self) -> Path:
        return self.data.parent / "mariadb.log"

    def start(self) -> None:
        """Raises SystemExit with the server's log when it does not come up in time."""
        self.make_data()
        self.run()

    def make_data(self) -> None:
        """An empty data directory."""
        command = ["mariadb-install-db", "--no-defaults", f"--datadir={self.data}", self._user]
        command.append("--auth-root-authentication-method=normal")
        with self._log.open("wb") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)

    def run(self) -> None:
        """On the data directory that is there; see `start`."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *self._launcher,
                    "mariadbd",
                    "--no-defaults",
                    f"--datadir={self.data}",
                    f"--socket={self.socket}",
                    self._user,
                    *self._options,
                    "--innodb-flush-log-at-trx-commit=1",
                    f"--pid-file={self.data}/pid",
                ],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_WAIT_S
        while self.sql("SELECT 1").returncode:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise SystemExit(f"bench: mariadbd did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.1)

    def sql(self, statement: str) -> subprocess.CompletedProcess[bytes]:
        """Run a statement as root on the server's own socket."""
        command = ["mariadb", "--no-defaults", f"--socket={self.socket}", "-uroot", "-N", "-e", statement]
        return subprocess.run(command, capture_output=True, check=False)

    def create(self, name: str) -> str:
        """Create a database; returns its SQLAlchemy URL."""
        done = self.sql(f"CREATE DATABASE {name} CHARACTER SET utf8mb3")
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
