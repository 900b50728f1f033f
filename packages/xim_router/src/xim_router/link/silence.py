"""How long a peer has sent nothing, as the kernel knows it.

The router's own heartbeats are an option of a listening socket and so the same for every agent; the time to live that
an agent sends with each of its own is forgotten by libzmq 4.3.5 as soon as any other message comes. An agent with a
short lease is therefore watched here: it sends at least a heartbeat per interval on each of its connections, and the
kernel notes when bytes last came, whatever this process was doing meanwhile.
"""

import socket
import struct

from xim_protocol.lease import LONGEST_HEARTBEAT_S, heartbeat_s

SHORTEST_SILENCE_S = 1.0
"""Below this a busy machine looks like a dead one; a lease that is over sooner tells by itself."""
_LAST_DATA_RECV = 52
"""Offset of `tcpi_last_data_recv`, milliseconds, in Linux's `struct tcp_info` (include/uapi/linux/tcp.h)."""
_INFO = getattr(socket, "TCP_INFO", None)


def watch_interval_s(lease_s: float) -> float | None:
    """How often to look after an agent with this lease; None where the router's own heartbeats find out in time."""
    interval_s = heartbeat_s(lease_s)
    return interval_s if interval_s < LONGEST_HEARTBEAT_S else None


def too_silent(descriptor: int, lease_s: float) -> bool:
    """Nothing came through the TCP connection `descriptor` for a heartbeat's interval and timeout."""
    silence_s = silent_for_s(descriptor)
    return silence_s is not None and silence_s > max(SHORTEST_SILENCE_S, 2 * heartbeat_s(lease_s))


def silent_for_s(descriptor: int) -> float | None:
    """Seconds since bytes came through the TCP connection `descriptor`; None where nobody can say."""
    if _INFO is None:
        return None
    try:
        # fromfd duplicates, so libzmq's own descriptor stays its own to close.
        with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, _INFO, _LAST_DATA_RECV + 4)
    except OSError:
        return None  # closed in the same moment: the monitor says so
    if len(info) < _LAST_DATA_RECV + 4:
        return None
    milliseconds: int = struct.unpack_from("=I", info, _LAST_DATA_RECV)[0]
    return milliseconds / 1000
