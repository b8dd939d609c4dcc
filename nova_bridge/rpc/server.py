"""The worker's side of the RPC door: Nova's own functions, one RPC method each.

A call holds {"args", "kwargs"}; the answer {"result"} or {"error"}, both written by `nova_bridge.rpc.serializer`,
besides {"objects"}: what the call changed in Nova objects among its arguments, and {"callbacks"}: calls of functions
among them.
Nova's exceptions travel as content: oslo.messaging would wrap them in classes of its own.
"""

from __future__ import annotations

import logging
import random
import time
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import oslo_messaging
from oslo_db import exception as db_exception
from oslo_db.api import wrap_db_retry
from oslo_versionedobjects.base import VersionedObject

from dht.errors import Invalid
from nova_bridge.rpc.methods import Catalogue
from nova_bridge.rpc.serializer import Decoder, Encoder

LOG = logging.getLogger(__name__)

TOPIC = "lucd.nova_db"
NAMESPACE = "nova.db.api"
VERSION = "1.0"
OBJECT_METHOD = "run_object_method"
EXCHANGE = "lucd"
ATTEMPTS = 10
FIRST_PAUSE_S = 0.01
LONGEST_PAUSE_S = 0.5
TRACE_LIMIT_CHARACTERS = 4000


class Runner:
    """Runs one function to its end; on a conflict again, from freshly decoded arguments, because Nova's functions
    change what they are given. `target(url)` gives the database manager of a cell."""

    def __init__(
        self,
        target: Callable[[str], Any],
        attempts: int = ATTEMPTS,
        pause: Callable[[float], None] = time.sleep,
        chance: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._target = target
        self._attempts = attempts
        self._pause = pause
        self._chance = chance

    def run(self, function: Callable[..., Any], call: dict[str, Any], returns_objects: bool = False) -> dict[str, Any]:
        for attempt in range(1, self._attempts + 1):
            decoder = Decoder(self._target)
            try:
                arguments = decoder.decode(call)
                result = function(*arguments["args"], **arguments["kwargs"])
                return self._answer(result, decoder, returns_objects)
            except db_exception.DBDeadlock as error:
                if attempt == self._attempts:
                    LOG.info("%s met a conflict in each of %d attempts", function.__name__, attempt)
                    return failure(error)
                longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1))
                self._pause(self._chance(0, longest))
            except Exception as error:
                return failure(error)
        raise AssertionError("the loop above returns")

    def _answer(self, result: Any, decoder: Decoder, returns_objects: bool) -> dict[str, Any]:
        encoder = Encoder(known=decoder.shared)
        answer = {"result": encoder.encode(result)}
        if returns_objects:
            changed = [
                (number, found) for number, found in decoder.shared.items() if isinstance(found, VersionedObject)
            ]
            answer["objects"] = [[number, encoder.flatten_object(found, encoder.encode)] for number, found in changed]
        if decoder.recorded:
            answer["callbacks"] = encoder.encode(decoder.recorded)
        return answer


def failure(error: Exception) -> dict[str, Any]:
    """The answer that raises `error` at the caller; `trace` tells an operator there where it came from."""
    answer = {"error": Encoder().encode(error)}
    if not type(error).__module__.startswith("nova."):
        answer["trace"] = "".join(traceback.format_exception(error))[-TRACE_LIMIT_CHARACTERS:]
    return answer


def retry_soon(catalogue: Catalogue) -> None:
    """Shorten the pauses of Nova's own retry decorators in this process.

    They wait a second at least, which suits a database that finds a deadlock after a long wait; here a conflict is
    known at once, and its winner is done.
    """
    functions = [*catalogue.functions.values(), *(method.function for method in catalogue.object_methods.values())]
    for function in functions:
        for retry in retries_of(function):
            retry.retry_interval = FIRST_PAUSE_S
            retry.max_retry_interval = LONGEST_PAUSE_S


def retries_of(function: Any) -> Iterator[wrap_db_retry]:
    """The retry decorators that `function` is wrapped in."""
    while isinstance(function, types.FunctionType):
        for cell in function.__closure__ or ():
            if isinstance(cell.cell_contents, wrap_db_retry):
                yield cell.cell_contents
        function = getattr(function, "__wrapped__", None)


class NovaDbEndpoint:
    """What oslo.messaging dispatches to. Only catalogued functions have a method, and only methods marked `exposed` are
    called (ExplicitRPCAccessPolicy)."""

    target = oslo_messaging.Target(namespace=NAMESPACE, version=VERSION)

    def __init__(self, catalogue: Catalogue, runner: Runner) -> None:
        self._object_methods = catalogue.object_methods
        self._runner = runner
        for name, function in catalogue.functions.items():
            setattr(self, name, self._method(function))

    def _method(self, function: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
        @oslo_messaging.expose
        def run(context: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
            return self._runner.run(function, call)

        return run

    @oslo_messaging.expose
    def run_object_method(
        self, context: dict[str, Any], module: str, name: str, call: dict[str, Any]
    ) -> dict[str, Any]:
        method = self._object_methods.get((module, name))
        if method is None:
            message = (
                f"{module}.{name} may not be called through the RPC door, or this release of Nova does not have it"
            )
            return failure(Invalid(message))
        return self._runner.run(method.bound(), call, returns_objects=True)


def make_server(transport: Any, server: str, endpoint: NovaDbEndpoint, executor: str = "threading") -> Any:
    """The oslo.messaging server; start() it. `server` is the host's name."""
    target = oslo_messaging.Target(exchange=EXCHANGE, topic=TOPIC, server=server)
    policy = oslo_messaging.ExplicitRPCAccessPolicy
    return oslo_messaging.get_rpc_server(transport, target, [endpoint], executor=executor, access_policy=policy)
