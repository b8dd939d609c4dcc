"""Every limit of the store in one place, with its unit last (DESIGN section 13)."""

from __future__ import annotations

GROUP_BYTES_MAX = 4 * 1024 * 1024
TRANSACTION_BYTES_MAX = 16 * 1024 * 1024
FRAME_BYTES_MAX = 24 * 1024 * 1024
TABLETS_PER_DOMAIN = 64
WINDOW_TRANSACTIONS = 64
SEQUENCE_BLOCK_IDS = 100
REQUEST_TIMEOUT_S = 10.0
PEER_TIMEOUT_S = 1.0
INTENT_TIMEOUT_S = 2.0
BACKOFF_MIN_S = 0.005
BACKOFF_MAX_S = 0.050
REMOVE_AFTER_S = 600.0
COPY_BYTES_PER_S = 16 * 1024 * 1024
REPAIR_BYTES_PER_S = 8 * 1024 * 1024
COLLECT_INTERVAL_S = 3600.0
READ_GROUPS_MAX = 10_000
FIND_ROWS_MAX = 100_000
GROUP_QUEUE_WRITES_MAX = 1_000
IDS_APART = 256
"""Ids of a table whose rows live in several PoPs are k * IDS_APART + the index of the PoP that gave them out."""
SPANNING_ID_MAX = 2**31 - 1
"""The greatest of them: MySQL's INT holds it, and so does whatever was written for it."""
ROUNDS_AHEAD_MAX = 1 << 40
"""A ballot whose round is further ahead of the acceptor's promise comes from a defect. Promised, it would leave too few
rounds above it for ever, as rounds are 64 bits wide."""
