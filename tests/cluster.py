"""Real daemons for tests: `with Cluster(tmp_path, nodes=3) as cluster: cluster.nodes[0].store()...`.

Paths of Unix sockets are short, pytest's are not: the daemons live below their own short directory, removed at the end.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from lucd.demo.daemons import Daemons, LocalNode

__all__ = ["Cluster", "LocalNode"]


class Cluster(Daemons):
    """`Daemons` whose logs are copied to `logs` when the block ends with an error."""

    def __init__(self, logs: Path, nodes: int = 3, pop: str = "pop1", options: str = "") -> None:
        self.logs = logs
        super().__init__(Path(tempfile.mkdtemp(prefix="lucd-")), nodes, pop, options)

    def __enter__(self) -> Cluster:
        try:
            super().__enter__()
        except BaseException:
            self._clean(keep_logs=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._clean(keep_logs=error is not None)

    def _clean(self, keep_logs: bool) -> None:
        for node in self.nodes:
            if keep_logs and node.log.exists():
                shutil.copyfile(node.log, self.logs / f"daemon{node.number}.log")
        shutil.rmtree(self.path, ignore_errors=True)
