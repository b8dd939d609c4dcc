"""Serves nova-api or Placement as a WSGI application: both have no server of their own since they left eventlet."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys

APPLICATIONS = {"nova-api": "nova.wsgi.osapi_compute", "placement": "placement.wsgi.api"}
THREADS = 16
QUEUE_MAX = 512


def main() -> None:
    """Serve until SIGTERM. The application finds its configuration by its own environment variables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("service", choices=sorted(APPLICATIONS))
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    # The application parses sys.argv too.
    del sys.argv[1:]
    if options.service == "nova-api":
        from nova import monkey_patch

        monkey_patch.patch(backend="threading")
    from cheroot import wsgi

    application = importlib.import_module(APPLICATIONS[options.service]).application
    server = wsgi.Server(
        ("127.0.0.1", options.port), application, numthreads=THREADS, max=THREADS, request_queue_size=QUEUE_MAX
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.safe_start()
