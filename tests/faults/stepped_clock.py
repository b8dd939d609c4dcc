"""Starts a daemon whose wall clock a test can step: `stepped_clock.py FILE python -m MODULE ARGUMENTS...`.

FILE holds the seconds by which the clock is off, read at every look at it; no file: none. Only tests start daemons so.
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path


def main() -> None:
    offset, real = Path(sys.argv[1]), time.time

    def stepped() -> float:
        try:
            return real() + float(offset.read_text())
        except (OSError, ValueError):
            return real()

    time.time = stepped
    _, _, _, _, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
