"""Serving one request: within the time that its asker waits, and with every outcome turned into a reply."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

from dht.codec import Failure
from dht.errors import DhtError, Indeterminate
from dht.model import Struct
from dht.wire import frames

log = logging.getLogger(__name__)


async def answer_in_time(serving: Awaitable[Struct], message: Struct, timeout_s: float) -> Struct:
    """The reply, or the Failure that stands for whatever went wrong. Cancels the serving when the time is over."""
    frames.set_time_left(timeout_s)
    try:
        async with asyncio.timeout(timeout_s):
            return await serving
    except DhtError as error:
        return frames.failure_of(error)
    except TimeoutError:
        text = f"{type(message).__name__} was not answered in {timeout_s:.3f} s: it may or may not have taken effect"
        return frames.failure_of(Indeterminate(text))
    except Exception as error:
        log.exception("%s failed unexpectedly", type(message).__name__)
        return Failure("error", f"{type(message).__name__} failed: {type(error).__name__}: {error}; see the log")
