"""The WAN's router: one process that reads the packets of every site, holds each back as long as its way takes, loses
some, and writes them to the site that they are for.

    python -m lucd.demo.wan.router SITES      # started by `lucd.demo.wan.sites`, which is its standard input

Standard input is a Unix socket: first the TUN devices' descriptors, one for each site, then orders as JSON lines, each
answered by one line. A site's addresses are 10.80.SITE.x, and only IPv4 is carried. Packets of one way leave in the
order in which they came, as they do on a line; jitter delays, it does not reorder.

Python and one `select` are enough: a packet is some 50 us late, of which a round trip of 10 ms notices one per cent.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import json
import os
import random
import select
import socket
import sys
import time
from dataclasses import dataclass

NETWORK = bytes((10, 80))
PACKET_BYTES_MAX = 2048
"""More than the devices' MTU."""
PACKETS_AT_ONCE = 64
"""Read of one site before the others have their turn."""
WAITING_PACKETS_MAX = 20_000
"""On the way in all; a line drops what exceeds its queue."""
NICENESS = -10
"""Where it may: a router that waits for the processor is a slower line than the one that was ordered."""


@dataclass(slots=True)
class Way:
    """From one site to another. What was carried and lost is counted since the start, in packets and bytes."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    """Share of the packets, 0 to 1."""
    cut: bool = False
    packets: int = 0
    bytes: int = 0
    lost: int = 0
    last_due_s: float = 0.0


class Router:
    """`devices[n]`: descriptor of site n's TUN device, non-blocking. `control`: where orders come from."""

    def __init__(self, devices: list[int], control: socket.socket, seed: int = 0) -> None:
        self._devices = devices
        self._control = control
        self._orders = b""
        self._chance = random.Random(seed)
        sites = range(len(devices))
        self.ways = {(a, b): Way() for a in sites for b in sites if a != b}
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._number = 0
        self.stray = 0
        """Packets for nobody: another protocol, another network, a site that is not there."""

    def run(self) -> None:
        """Until the other end of the control socket is closed."""
        watched = [*self._devices, self._control.fileno()]
        while True:
            pause_s = max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None
            readable, _, _ = select.select(watched, [], [], pause_s)
            for descriptor in readable:
                if descriptor == self._control.fileno():
                    if not self._obey():
                        return
                else:
                    self._take(descriptor)
            self._deliver()

    def _take(self, device: int) -> None:
        site = self._devices.index(device)
        for _ in range(PACKETS_AT_ONCE):
            try:
                packet = os.read(device, PACKET_BYTES_MAX)
            except BlockingIOError:
                return
            self.send(site, packet, time.monotonic())

    def send(self, site: int, packet: bytes, now_s: float) -> None:
        """Put a packet of the site on its way, or lose it."""
        way = None
        if len(packet) >= 20 and packet[0] >> 4 == 4 and packet[16:18] == NETWORK:
            way = self.ways.get((site, packet[18]))
        if way is None:
            self.stray += 1
            return
        if way.cut or len(self._waiting) >= WAITING_PACKETS_MAX or (way.loss and self._chance.random() < way.loss):
            way.lost += 1
            return
        way.packets += 1
        way.bytes += len(packet)
        late_s = self._chance.uniform(0.0, way.jitter_s) if way.jitter_s else 0.0
        way.last_due_s = due_s = max(way.last_due_s, now_s + way.delay_s + late_s)
        self._number += 1
        heapq.heappush(self._waiting, (due_s, self._number, packet[18], packet))

    def _deliver(self) -> None:
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            _, _, site, packet = heapq.heappop(self._waiting)
            # A full device drops, as one does.
            with contextlib.suppress(BlockingIOError):
                os.write(self._devices[site], packet)

    def _obey(self) -> bool:
        data = self._control.recv(65536)
        self._orders += data
        *lines, self._orders = self._orders.split(b"\n")
        for line in lines:
            self._control.sendall(json.dumps(self.order(json.loads(line))).encode() + b"\n")
        return bool(data)

    def order(self, order: dict[str, object]) -> object:
        """`{"ways": [[from, to], ...], "set": {field: value}}`, or anything else for the counts of every way."""
        ways, changes = order.get("ways"), order.get("set")
        if not isinstance(ways, list) or not isinstance(changes, dict):
            return [[a, b, way.packets, way.bytes, way.lost] for (a, b), way in self.ways.items()]
        for a, b in ways:
            for name, value in changes.items():
                setattr(self.ways[a, b], name, value)
        return "done"


def main() -> None:
    """See the module."""
    control = socket.socket(fileno=0)
    devices: list[int] = []
    while len(devices) < int(sys.argv[1]):
        _, got, _, _ = socket.recv_fds(control, 1, 1)
        devices += got
    for device in devices:
        os.set_blocking(device, False)
    with contextlib.suppress(PermissionError):
        os.nice(NICENESS)
    gc.disable()
    control.sendall(b'"ready"\n')
    Router(devices, control).run()


if __name__ == "__main__":
    main()
