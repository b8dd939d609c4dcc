"""A process of Nova's with its own way to the API database: makes and destroys build requests as it is told.

Lines of JSON on standard input: {"make": uuid}, {"destroy": uuid, "at": time.monotonic()} or {"reruns": true}, how
often a transaction of this process lost a race; one line of answer each.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

from nova_bridge.sql import rerun


def _open(url: str) -> Any:
    warnings.simplefilter("ignore")
    from nova import config, context, objects
    from nova.conf import CONF
    from nova.db.api import api

    config.parse_args(["nova"], default_config_files=[], configure_db=False, init_rpc=False)
    CONF.set_override("connection", url, "api_database")
    api.configure(CONF)
    objects.register_all()
    return context.get_admin_context()


def _answer(admin: Any, order: dict[str, Any]) -> str:
    from nova import exception
    from nova.objects.build_request import BuildRequest

    if "reruns" in order:
        return str(rerun.counters["rerun"])
    if "make" in order:
        BuildRequest._create_in_db(admin, {"instance_uuid": order["make"], "project_id": "p", "instance": "{}"})
        return "made"
    time.sleep(max(0.0, order["at"] - time.monotonic()))
    try:
        BuildRequest._destroy_in_db(admin, order["destroy"])
    except exception.BuildRequestNotFound:
        return "not found"
    return "destroyed"


def main() -> None:
    """Argument: the URL of the API database."""
    admin = _open(sys.argv[1])
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        try:
            answer = _answer(admin, json.loads(line))
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
