"""Every metric of the router, a row each: the scrape, the reference page and the alerts are held against these.

Base units are in the names. Label values come from enums, from the table of errors, or are names that an operator
configured (projects, endpoints, agents), so that their number is bounded.
"""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What Prometheus calls the type of a metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One metric."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, without infinity."""


def _counter(name: str, text: str, *labels: str) -> Row:
    return Row(name=name, kind=Kind.COUNTER, help=text, labels=labels)


def _gauge(name: str, text: str, *labels: str) -> Row:
    return Row(name=name, kind=Kind.GAUGE, help=text, labels=labels)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Row:
    return Row(name=name, kind=Kind.HISTOGRAM, help=text, labels=labels, buckets=buckets)


# Requests last from milliseconds (tokenize) to the 1,800 s that a self-hosted one may take.
_REQUEST_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 1800.0)
_TTFT_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
# Ends in the default queue timeout, 30 s, and one for operators who raised it.
_QUEUE_WAIT_S = (0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 120.0)
ENTRIES_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)

REQUESTS = _counter(
    "xim_router_requests_total",
    "Requests answered or given up, by the error's code or else the engine's status.",
    "project",
    "endpoint",
    "code",
)
REQUESTS_REFUSED = _counter(
    "xim_router_requests_refused_total",
    "Requests that no endpoint was given, enrollments among them, by the code of the error that they were answered.",
    "code",
)
REQUEST_SECONDS = _histogram(
    "xim_router_request_seconds", "Time from a request's first byte to its end.", _REQUEST_S, "project", "endpoint"
)
TTFT_SECONDS = _histogram(
    "xim_router_ttft_seconds",
    "Time from a request's first byte to the first byte of its answer.",
    _TTFT_S,
    "project",
    "endpoint",
)
QUEUE_WAIT_SECONDS = _histogram(
    "xim_router_queue_wait_seconds", "Time a request was parked, by how it left the queue.", _QUEUE_WAIT_S, "outcome"
)
RETRIES = _counter("xim_router_retries_total", "Requests dispatched again, by what became of the attempt.", "reason")
LEASE_EXPIRED = _counter("xim_router_lease_expired_total", "Sessions that ended because their lease was not renewed.")
LINK_LOST = _counter("xim_router_link_lost_total", "Links that were lost while their session lived.")
CREDIT_STALLED = _counter("xim_router_credit_stalled_total", "Streams given up because no credit came in time.")
CLIENT_STALLED = _counter("xim_router_client_stalled_total", "Clients cut off because they took no byte in time.")
PROTOCOL_FAULTS = _counter(
    "xim_router_protocol_faults_total", "Sessions ended because an agent broke the protocol, by fault.", "reason"
)
HANDSHAKES_REFUSED = _counter(
    "xim_router_handshakes_refused_total",
    "CURVE handshakes refused, by ZAP status: 300 unknown key, 400 revoked key.",
    "status",
)
DROPPED_REPORTS = _counter(
    "xim_router_dropped_reports_total", "Reports to the control plane dropped because it did not keep up."
)
CLIENT_DISCONNECTS = _counter(
    "xim_router_client_disconnects_total", "Clients that left before their answer was whole, by phase.", "phase"
)

RELAYED_CHUNKS = _counter("xim_router_relayed_chunks_total", "Chunks of answers received from agents.")
RELAYED_BYTES = _counter("xim_router_relayed_bytes_total", "Bytes of answers received from agents.")
WIRE_MESSAGES = _counter("xim_router_wire_messages_total", "Messages on the wire, by direction.", "direction")
FENCED_MESSAGES = _counter(
    "xim_router_fenced_messages_total", "Messages dropped because they came by a link that had been replaced."
)
ENTRIES_PER_MESSAGE = _histogram(
    "xim_router_entries_per_message", "Entries of one message of chunks: few messages are cheap.", ENTRIES_BUCKETS
)
BUFFERED_BYTES = _gauge(
    "xim_router_buffered_bytes",
    "Bytes of answers held for clients that are slow to read, their connections' buffers included.",
)
STALLED_SECONDS = _counter(
    "xim_router_stalled_seconds_total",
    "Seconds in which a dispatched request stood still, over all requests, by what it waited for: its client, the link "
    "to its agent, or the engine.",
    "cause",
)
CREDIT_OWED_BYTES = _gauge(
    "xim_router_credit_owed_bytes", "Bytes of answers that left for clients and that agents were not told of yet."
)
EXCHANGES = _gauge("xim_router_exchanges", "Requests that hold a place or a slot now.")
STREAMS = _gauge("xim_router_streams", "Streams that the sessions with agents know now.")
TASKS = _gauge("xim_router_tasks", "Tasks of the event loop: one per client, and a few of the router's own.")
MEMORY_BLOCKS = _gauge(
    "xim_router_memory_blocks",
    "Blocks of memory that Python uses now, of any size. Resident memory keeps the height of the highest load; "
    "this falls back, and grows from day to day only where something leaks.",
)

QUEUE_DEPTH = _gauge("xim_router_queue_depth", "Requests parked now.", "project", "endpoint")
IN_FLIGHT = _gauge("xim_router_in_flight", "Requests of this router in flight now.", "project", "agent")
CAPACITY = _gauge("xim_router_capacity", "Most requests that an agent takes at once.", "project", "agent")
AGENTS = _gauge("xim_router_agents", "Enrolled agents and agents with a session, by state.", "state")
AGENTS_HELD_BACK = _gauge(
    "xim_router_agents_held_back", "Agents that refused a request and get none until they have room."
)
CONTROL_STALE_SECONDS = _gauge(
    "xim_router_control_stale_seconds", "Time since the database last confirmed the catalog."
)

ROWS: tuple[Row, ...] = (
    REQUESTS,
    REQUESTS_REFUSED,
    REQUEST_SECONDS,
    TTFT_SECONDS,
    QUEUE_WAIT_SECONDS,
    QUEUE_DEPTH,
    IN_FLIGHT,
    CAPACITY,
    AGENTS,
    AGENTS_HELD_BACK,
    RETRIES,
    LEASE_EXPIRED,
    LINK_LOST,
    RELAYED_CHUNKS,
    RELAYED_BYTES,
    WIRE_MESSAGES,
    ENTRIES_PER_MESSAGE,
    BUFFERED_BYTES,
    STALLED_SECONDS,
    CREDIT_OWED_BYTES,
    EXCHANGES,
    STREAMS,
    TASKS,
    MEMORY_BLOCKS,
    CREDIT_STALLED,
    CLIENT_STALLED,
    PROTOCOL_FAULTS,
    FENCED_MESSAGES,
    HANDSHAKES_REFUSED,
    DROPPED_REPORTS,
    CLIENT_DISCONNECTS,
    CONTROL_STALE_SECONDS,
)
"""All of them, in the order of the reference page."""
