"""A worker's endpoint over standard input and output instead of a message bus: one JSON object per line each way."""

import contextlib
import json
import sys


def main() -> None:
    answers = sys.stdout
    from nova_bridge.rpc import worker

    with contextlib.redirect_stdout(sys.stderr):
        conf = worker.configure(worker.parse(sys.argv[1:]))
        if conf.database.connection.startswith("lucd+memory:"):
            # It lives in this process, so it is made here.
            from nova.db import migration

            for database in ("main", "api"):
                migration.db_sync(database=database)
    from nova_bridge.rpc.methods import catalogue
    from nova_bridge.rpc.server import NovaDbEndpoint, Runner

    endpoint = NovaDbEndpoint(catalogue(), Runner(worker.Cells(conf.database.connection)))
    print(worker.READY, file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        method = getattr(endpoint, request["method"], None)
        answer = method({}, **request["content"]) if hasattr(method, "exposed") else {"refused": request["method"]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
