"""The controllers of the WAN benchmark: Nova's own database API in processes at the sites.

    python -m tests.wan_bench.controllers     # started by `tests.wan_bench.crew`

Standard input: first a JSON list of the controllers, then lists of [number, order], one a line, each answered by one
line. Nova is imported once; every controller is a fork that enters its site's network namespace, so that eighty of them
fit into the memory of a small machine, each with connections of its own.

An order names what to do (a method of `Controller` that begins with `do_`) and to whom; the others stand still. Those
who are told start together and answer together.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import socket
import sys
import time
import traceback
import warnings
from typing import Any

from tests.wan_bench import work

CLONE_NEWNET = 0x40000000


def enter_network(pid: int) -> None:
    """Go where the process is, as `nsenter --net` does."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        if libc.setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"the network namespace of process {pid} cannot be entered")
    finally:
        os.close(descriptor)


def serve(spec: dict[str, Any], orders: socket.socket) -> None:
    """One controller: answer orders until the other end is closed."""
    enter_network(spec["pid"])
    controller = work.Controller(spec["name"], spec["url"], spec["far_url"])
    stream = orders.makefile("rw")
    for line in stream:
        order = json.loads(line)
        method = getattr(controller, "do_" + order.pop("do"))
        try:
            cpu_s, began_s = time.process_time(), time.monotonic()
            answer = method(**order) or {}
            answer |= {"began_s": began_s, "ended_s": time.monotonic(), "cpu_s": time.process_time() - cpu_s}
        except Exception:
            answer = {"failed": traceback.format_exc()}
        stream.write(json.dumps(answer) + "\n")
        stream.flush()


def main() -> None:
    """See the module."""
    warnings.simplefilter("ignore")
    # What fails is answered, and while a site is cut off much does.
    logging.disable()
    work.load_nova()
    gc.collect()
    gc.freeze()
    ends: list[socket.socket] = []
    children: list[int] = []
    for spec in json.loads(sys.stdin.readline()):
        mine, theirs = socket.socketpair()
        child = os.fork()
        if child == 0:
            for end in ends:
                end.close()
            mine.close()
            sys.stdin.close()
            code = 1
            try:
                serve(spec, theirs)
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        ends.append(mine)
        children.append(child)
    streams = [end.makefile("rw") for end in ends]
    print(json.dumps({"ready": len(streams)}), flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        for number, order in told:
            streams[number].write(json.dumps(order) + "\n")
            streams[number].flush()
        answers = [streams[number].readline().strip() for number, _ in told]
        print("[" + ",".join(answer or '{"failed": "the controller ended"}' for answer in answers) + "]", flush=True)
    for stream, end in zip(streams, ends, strict=True):
        stream.close()
        end.close()
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
