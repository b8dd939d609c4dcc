"""One process of a suite run: runs the named tests with unittest and prints one JSON line per result."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import time
import unittest
import warnings

UNTIL = float(os.environ.get("LUCD_SUITE_UNTIL", "inf"))
"""Unix time after which no further test is begun."""


class Report(unittest.TestResult):
    """Outcome by test id, as JSON lines on the original standard output."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self._out = out
        self._started = 0.0

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._started = time.monotonic()

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        if time.time() > UNTIL:
            self.stop()

    def _say(self, test: unittest.TestCase, outcome: str, text: str = "") -> None:
        line = json.dumps(
            {"id": test.id(), "outcome": outcome, "text": text, "seconds": time.monotonic() - self._started}
        )
        os.write(self._out, line.encode() + b"\n")

    def addSuccess(self, test: unittest.TestCase) -> None:
        self._say(test, "passed")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._say(test, "skipped", reason)

    def addExpectedFailure(self, test: unittest.TestCase, err: object) -> None:
        self._say(test, "passed")

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        self._say(test, "failed", "unexpected success")

    def addFailure(self, test: unittest.TestCase, err: object) -> None:
        self._say(test, "failed", self._exc_info_to_string(err, test))  # type: ignore[attr-defined]

    addError = addFailure


def patch_first(names: list[str]) -> None:
    """What the suites of Nova do when they are imported: by then the door has imported what has to come after."""
    if any(name.startswith("nova.tests.") for name in names):
        from nova import monkey_patch

        monkey_patch.patch()


def find_installed_etc() -> None:
    """Nova's tests look for etc/nova beside the package, as in a source tree; pip puts it below the prefix."""
    try:
        from nova.conf import paths
    except ImportError:
        return  # the suite of another service

    in_tree = paths.state_path_def

    def anywhere(*parts: str) -> str:
        installed = os.path.join(sys.prefix, *parts)
        return installed if os.path.exists(installed) else in_tree(*parts)

    paths.state_path_def = anywhere


def load(name: str) -> unittest.TestSuite:
    """The tests of a module, class or method; of a package, those of all its modules."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is not None and spec.submodule_search_locations:
        return unittest.defaultTestLoader.discover(name)
    return unittest.defaultTestLoader.loadTestsFromName(name)


def main() -> None:
    """Arguments: store, then test names."""
    store, *names = sys.argv[1:]
    out = os.dup(1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    logging.disable(logging.NOTSET)
    patch_first(names)
    find_installed_etc()
    if store != "sqlite":
        import door

        door.install()
        if door.BUS:
            door.through_rpc()
    report = Report(out)
    for name in names:
        if not report.shouldStop:
            load(name).run(report)


if __name__ == "__main__":
    main()
