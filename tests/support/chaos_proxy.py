"""A TCP proxy that is a bad network: slow, narrow, silent, forgetful, and breaking at any moment.

Bytes keep their order and none is lost while a connection lives, as TCP has it; what is bad is when they arrive, in
which pieces, and how connections end. Everything may be changed while bytes pass.
"""

import asyncio
import random
import socket
import struct
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self, cast

from tests.support.ports import free_ports

BEHIND_BYTES = 256 * 1024
"""So much may be on its way in one direction; then the proxy reads no more, and TCP holds the sender back."""


@dataclass(kw_only=True)
class Weather:
    """How bytes travel now; times in seconds."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    """At most so much is added, drawn anew for each piece; order is kept."""
    bytes_per_s: float = 0.0
    """In each direction of each connection; 0 is without a bound."""
    slice_bytes: int = 0
    """Pieces of at most this size, each a segment of its own; 0 passes on what came together."""


class ChaosProxy:
    """Listens on 127.0.0.1 and passes bytes on to `target`; an async context manager."""

    def __init__(self, target: str, port: int = 0, *, source: random.Random | None = None) -> None:
        """`target` is `tcp://host:port`; `port` is where to listen, 0 for any free one."""
        host, _, target_port = target.removeprefix("tcp://").rpartition(":")
        self.target = (host, int(target_port))
        self.weather = Weather()
        self.source = source or random.Random(0)
        self.connections = 0
        """How many were accepted so far."""
        self.passed_bytes = 0
        """What the far ends were given so far, in both directions together."""
        self.addresses: list[str] = []
        """Where the target saw each of them come from."""
        self.change_address = False
        """Each further connection comes from an address of its own, as of a machine that moves between networks."""
        self._port = port or free_ports(1)[0]
        self._server: asyncio.Server | None = None
        self._pairs: set[_Pair] = set()
        self._silent = False

    @property
    def port(self) -> int:
        """The port it listens on, the same for its whole life."""
        return self._port

    @property
    def carried(self) -> int:
        """Connections that both ends have open and on which bytes pass."""
        return sum(pair.carries for pair in self._pairs)

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        for pair in list(self._pairs):
            pair.reset()

    async def listen(self) -> None:
        """Take connections (again), on the same port."""
        if self._server is None:
            loop = asyncio.get_running_loop()
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self._port))
            self._server = await loop.create_server(lambda: _Near(self), sock=listener, backlog=1024)

    def refuse(self) -> None:
        """Refuse new connections until `listen`."""
        if self._server is not None:
            self._server.close()
            self._server = None

    # --- Faults ----------------------------------------------------------------------------------------------------

    def break_all(self) -> int:
        """Reset every connection at both ends; new ones are taken. Returns how many there were."""
        pairs = list(self._pairs)
        for pair in pairs:
            pair.reset()
        return len(pairs)

    def blackhole(self) -> None:
        """Nothing arrives any more, in either direction, on old connections and new ones, until `clear`."""
        self._silent = True
        for pair in list(self._pairs):
            pair.hold()

    def clear(self) -> None:
        """What was held goes on, as TCP's repetitions would bring it; forgotten connections stay forgotten."""
        self._silent = False
        for pair in list(self._pairs):
            pair.release()

    def forget(self) -> int:
        """Lose the mapping of every connection, as a NAT does of an idle one: nothing passes on them any more, and
        neither end is told. New ones work. Returns how many there were."""
        pairs = [pair for pair in self._pairs if not pair.forgotten]
        for pair in pairs:
            pair.forget()
        return len(pairs)

    # --- For its connections ---------------------------------------------------------------------------------------

    def joined(self, near: "_Near") -> None:
        pair = _Pair(self, near)
        self._pairs.add(pair)
        near.pair = pair
        self.connections += 1
        pair.dial(f"127.0.1.{self.connections % 200 + 1}" if self.change_address else "127.0.0.1")
        if self._silent:
            pair.hold()

    def parted(self, pair: "_Pair") -> None:
        self._pairs.discard(pair)


class _Way:
    """One direction of one connection: what is on its way, and when each piece arrives."""

    def __init__(self, proxy: ChaosProxy, pair: "_Pair") -> None:
        self._proxy, self._pair = proxy, pair
        self._loop = asyncio.get_running_loop()
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._behind = 0
        self._free_at = self._last_due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False
        self.source: asyncio.Transport | None = None
        self.sink: asyncio.Transport | None = None
        self.held = False

    def push(self, data: bytes) -> None:
        weather, now = self._proxy.weather, self._loop.time()
        size = weather.slice_bytes or len(data)
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            due = now + weather.latency_s + self._proxy.source.uniform(0.0, weather.jitter_s)
            if weather.bytes_per_s:
                self._free_at = max(self._free_at, now) + len(piece) / weather.bytes_per_s
                due = max(due, self._free_at)
            self._last_due = max(self._last_due, due)
            self._pieces.append((self._last_due, piece))
        self._behind += len(data)
        if self._behind > BEHIND_BYTES and self.source is not None:
            self.source.pause_reading()
        self.deliver()

    def end(self) -> None:
        """The source sends nothing more; told to the sink behind what is on its way."""
        self._ended = True
        self.deliver()

    def deliver(self) -> None:
        """Pass on what has arrived by now."""
        if self.held or self.sink is None or self.sink.is_closing():
            return
        now = self._loop.time()
        while self._pieces and self._pieces[0][0] <= now:
            _, piece = self._pieces.popleft()
            self._behind -= len(piece)
            self._proxy.passed_bytes += len(piece)
            self.sink.write(piece)
        if self._behind <= BEHIND_BYTES // 2 and self.source is not None and not self.source.is_closing():
            self.source.resume_reading()
        if self._pieces:
            if self._timer is None or self._timer.when() > self._pieces[0][0] or self._timer.cancelled():
                self._timer = self._loop.call_at(self._pieces[0][0], self._due)
        elif self._ended:
            self._pair.close()

    def _due(self) -> None:
        self._timer = None
        self.deliver()

    def drop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._pieces.clear()


class _Pair:
    """One connection through the proxy: the dialling side, the target's side, and a way in each direction."""

    def __init__(self, proxy: ChaosProxy, near: "_Near") -> None:
        self._proxy = proxy
        self._near = near.transport
        self._far: asyncio.Transport | None = None
        self.out, self.back = _Way(proxy, self), _Way(proxy, self)
        self.out.source = self.back.sink = self._near
        self.forgotten = False
        self._dialling: asyncio.Task[None] | None = None

    @property
    def carries(self) -> bool:
        """Both ends are open, and nobody forgot them."""
        return not self.forgotten and not any(end is None or end.is_closing() for end in (self._near, self._far))

    def dial(self, own_address: str) -> None:
        self._dialling = asyncio.get_running_loop().create_task(self._dial(own_address))

    async def _dial(self, own_address: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            far, _ = await loop.create_connection(lambda: _Far(self), *self._proxy.target, local_addr=(own_address, 0))
        except OSError:
            self.reset()
            return
        self._far = far
        self._proxy.addresses.append(own_address)
        self.out.sink = self.back.source = far
        self.out.deliver()

    def hold(self) -> None:
        self.out.held = self.back.held = True

    def release(self) -> None:
        if not self.forgotten:
            self.out.held = self.back.held = False
            self.out.deliver()
            self.back.deliver()

    def forget(self) -> None:
        self.forgotten = True
        self.hold()

    def gone(self, way: _Way) -> None:
        """One end closed: told to the other, unless nobody knows any more who that is."""
        if not self.forgotten:
            way.end()
        elif all(end is None or end.is_closing() for end in (self._near, self._far)):
            self.close()

    def close(self) -> None:
        self._drop()
        for end in (self._near, self._far):
            if end is not None and not end.is_closing():
                end.close()

    def reset(self) -> None:
        """End both sides at once, without an orderly end."""
        if self._dialling is not None and self._far is None:
            self._dialling.cancel()
        self._drop()
        for end in (self._near, self._far):
            if end is not None and not end.is_closing():
                plain = cast(socket.socket, end.get_extra_info("socket"))
                # With no time to linger a TCP connection ends in a reset.
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.abort()

    def _drop(self) -> None:
        self.out.drop()
        self.back.drop()
        self._proxy.parted(self)


class _Near(asyncio.Protocol):
    """The dialling side."""

    def __init__(self, proxy: ChaosProxy) -> None:
        self._proxy = proxy
        self.pair: _Pair | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._proxy.joined(self)

    def data_received(self, data: bytes) -> None:
        assert self.pair is not None
        self.pair.out.push(data)

    def connection_lost(self, exc: Exception | None) -> None:
        assert self.pair is not None
        self.pair.gone(self.pair.out)


class _Far(asyncio.Protocol):
    """The target's side."""

    def __init__(self, pair: _Pair) -> None:
        self._pair = pair

    def data_received(self, data: bytes) -> None:
        self._pair.back.push(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pair.gone(self._pair.back)
